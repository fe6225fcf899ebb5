"""Verify first: outputs and every gradient of a contestant against float64, before anything is timed.

Error budget, per tensor: ``err <= 2 * (err(reference in the same dtype) + eps * max|ref|)``, with ``err`` the
largest absolute difference from the float64 reference and ``eps`` the machine epsilon of the arithmetic.
The references run one condition at a time, which is exact since conditions do not interact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from cases import Inputs as AttentionInputs
from timing import Inputs, Run
from torch import Tensor


class Sliceable(Inputs, Protocol):
    """Inputs of which one condition can be had alone."""

    def condition_slice(self, b: int, dtype: torch.dtype) -> Any:
        """Condition ``b`` alone, as fresh leaves of another dtype."""
        ...


@dataclass(frozen=True)
class Check:
    """One tensor of one contestant."""

    error: float
    """Largest absolute difference from the float64 reference; NaN when the tensor holds NaN."""
    budget: float

    @property
    def passed(self) -> bool:
        """NaN does not pass."""
        return self.error <= self.budget


@dataclass(frozen=True)
class Truth:
    """The float64 results of a cell and how far each tensor may be from them."""

    tensors: dict[str, Tensor]
    budgets: dict[str, float]


def results(run: Run, inputs: Inputs) -> dict[str, Tensor]:
    """``out`` and ``d<leaf>`` of every differentiable input."""
    out = run(inputs)
    leaves = inputs.leaves
    gradients = torch.autograd.grad(out, list(leaves.values()), inputs.grad_out)
    named = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {"out": out.detach(), **named}


def reference(inputs: AttentionInputs) -> Tensor:
    """The library's definition of attention."""
    from minidiff_fast.ops import broadcast_attention_reference

    out = broadcast_attention_reference(
        inputs.q, inputs.k, inputs.v, inputs.own_k, inputs.own_v,
        lengths=inputs.lengths, mask=inputs.mask, own_causal=inputs.own_causal,
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out


def _by_condition(inputs: Sliceable, dtype: torch.dtype, definition: Run, summed: frozenset[str]) -> dict[str, Tensor]:
    conditions = range(inputs.grad_out.shape[0])
    parts = [results(definition, inputs.condition_slice(b, dtype)) for b in conditions]
    joined = {name: [part[name] for part in parts] for name in parts[0]}
    return {name: torch.stack(t).sum(0) if name in summed else torch.cat(t) for name, t in joined.items()}


def truth_of(inputs: Sliceable, eps: float, definition: Run = reference, summed: frozenset[str] = frozenset()) -> Truth:
    """Float64 results of the definition, and the budget of every tensor.

    ``summed`` names the gradients of what all conditions share, which add up; the others have a condition axis.
    """
    exact = _by_condition(inputs, torch.float64, definition, summed)
    same = _by_condition(inputs, inputs.grad_out.dtype, definition, summed)
    budgets = {}
    for name, tensor in exact.items():
        error = _largest(same[name].double() - tensor)
        budgets[name] = 2 * (error + eps * _largest(tensor))
    return Truth(exact, budgets)


def verify(run: Run, inputs: Inputs, truth: Truth) -> dict[str, Check]:
    """Every tensor of one contestant against the truth; shapes must agree, too."""
    checks = {}
    for name, tensor in results(run, inputs).items():
        exact = truth.tensors[name]
        same_shape = tensor.shape == exact.shape
        error = _largest(tensor.double() - exact) if same_shape else float("nan")
        checks[name] = Check(error, truth.budgets[name])
    return checks


def refusal(checks: dict[str, Check]) -> str | None:
    """None when every tensor passed, else the figures of those that did not."""
    failed = [
        f"{name} off by {check.error:.2e} (budget {check.budget:.2e})"
        for name, check in checks.items()
        if not check.passed
    ]
    return "; ".join(failed) or None


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0
