"""``python bench/run.py loss``: denoising_loss against its peers.

``eager`` is how policies write it: float32 copies, ``mse_loss(reduction="none")``, the mask multiplied on, means.
Before a time is taken, the loss and the gradient must be within the error budget of the float64 definition.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import small_ops
import torch
from offline import Launch, recorded_launches
from small_ops import EPS, Contestant, why_not_ours
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class LossCase:
    """One call of the denoising loss; squared error, per sample."""

    name: str
    B: int
    K: int
    T: int
    A: int
    mask: bool = False
    weight: bool = False


CASES = {
    case.name: case
    for case in (
        LossCase("pusht", 64, 32, 16, 2),
        LossCase("pusht-masked", 64, 32, 16, 2, mask=True, weight=True),
        LossCase("minidiffuser", 100, 256, 1, 3),
        LossCase("smolvla", 8, 32, 50, 32, mask=True),
    )
}


class Prepared(NamedTuple):
    """The inputs of a cell."""

    pred: Tensor
    target: Tensor
    mask: Tensor | None
    weight: Tensor | None
    dloss: Tensor


Loss = Callable[[Prepared], Tensor]


def prepare(case: LossCase, dtype: torch.dtype, device: torch.device) -> Prepared:
    """Random predictions and targets; about one token in ten is padding."""
    shape = (case.B, case.K, case.T, case.A)
    mask = torch.rand(case.B, case.T, device=device) > 0.1 if case.mask else None
    weight = torch.rand(case.B, case.K, device=device) if case.weight else None
    pred = torch.randn(shape, device=device).to(dtype).requires_grad_()
    return Prepared(pred, torch.randn(shape, device=device), mask, weight, torch.rand(shape[:2], device=device))


def ours(impl: str | None, p: Prepared) -> Tensor:
    """The op."""
    from minidiff_fast.ops import denoising_loss

    return denoising_loss(p.pred, p.target, weight=p.weight, mask=p.mask, impl=impl)


def eager(p: Prepared) -> Tensor:
    """Several passes over [B, K, T, A]."""
    error = F.mse_loss(p.pred.float(), p.target, reduction="none").mean(-1)
    if p.mask is None:
        loss = error.mean(-1)
    else:
        counted = p.mask[:, None].to(error.dtype)
        loss = (error * counted).sum(-1) / counted.sum(-1).clamp(min=1.0)
    return loss if p.weight is None else loss * p.weight


def forward(loss: Loss, p: Prepared) -> Tensor:
    """Without a graph."""
    with torch.no_grad():
        return loss(p)


def train(loss: Loss, p: Prepared) -> tuple[Tensor, Tensor]:
    """Loss and the gradient of the predictions."""
    out = loss(p)
    return out, torch.autograd.grad(out, p.pred, p.dloss.to(out.dtype))[0]


def contestants(device: torch.device) -> list[Contestant]:
    """Everyone who may run on this kind of device, ours first."""

    def contestant(name: str, what: str, loss: Loss, impl: str | None, mine: bool) -> Contestant:
        passes: dict[str, Callable[[Any], object]] = {"forward": partial(forward, loss), "train": partial(train, loss)}
        if not mine:
            return Contestant(name, what, False, passes)
        return Contestant(name, what, True, passes, why_not_ours("denoising_loss", impl))

    what = "minidiff_fast.ops.denoising_loss"
    mine = [
        contestant(f"ours{'' if impl is None else '-' + impl}", what, partial(ours, impl), impl, True)
        for impl in (None, "reference")
    ]
    return [*mine, contestant("eager", "torch, several passes", eager, None, False)]


def refusal(contestant: Contestant, p: Prepared) -> str | None:
    """None, or how far the loss or the gradient is from the float64 definition."""
    pred = p.pred.detach().double().requires_grad_()
    exact = train(partial(ours, "reference"), p._replace(pred=pred, target=p.target.double()))
    near = train(partial(ours, "reference"), p)
    got: Any = contestant.passes["train"](p)
    for name, want, same, have in zip(("loss", "gradient"), exact, near, got, strict=True):
        reference_error = (same.double() - want).abs().max().item()
        budget = 2 * (reference_error + EPS[p.pred.dtype] * want.abs().max().item())
        error = (have.double() - want).abs().max().item()
        if not error <= budget:
            return f"{name} is off by {error:.2e} (budget {budget:.2e})"
    return None


def record(case: LossCase, dtype: torch.dtype, *, hip: bool) -> list[Launch]:
    """The launches of one forward and one backward pass of ``case``, on meta tensors."""
    from minidiff_fast.ops import _denoising_loss_launch as launcher

    pred = torch.empty(case.B, case.K, case.T, case.A, dtype=dtype, device="meta")
    target = torch.empty(pred.shape, device="meta")
    mask = torch.empty(case.B, case.T, dtype=torch.bool, device="meta") if case.mask else None
    was, launcher.HIP = launcher.HIP, hip
    try:
        with recorded_launches(launcher.kernels) as launches:
            loss, share = launcher.launch_forward(pred, target, mask, "huber", 1.0)
            launcher.launch_backward(loss, pred, target, mask, share, "huber", 1.0)
    finally:
        launcher.HIP = was
    return launches


def run(device: torch.device, budget: float, **options: Any) -> list[dict]:
    """Verify, time and print every cell that ``budget`` seconds allow; options as :func:`small_ops.run`."""
    return small_ops.run(sys.modules[__name__], device, budget, **options)


def main(argv: list[str] | None = None) -> int:
    """Time; the exit code."""
    return small_ops.main(sys.modules[__name__], argv)
