"""The attention cases of the suite, taken from the configurations of real policies, and their inputs.

Letters are those of ``minidiff_fast/shapes.py``: B conditions, K samples per condition, T query tokens,
S condition tokens, P own tokens, H / Hkv heads, D head dimension.

``full`` sizes are for a GPU. ``cpu`` sizes keep what makes a case a case (head dimension, grouping, own
tokens, causality, masks, padding) and shrink the rest until forward + backward of the slowest ordinary
peer stays under a second on one slow core.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

SCALES = ("full", "cpu")


@dataclass(frozen=True)
class AttentionCase:
    """One configuration of broadcast attention; every K of ``samples`` and ``sweep`` is one cell."""

    name: str
    B: int
    """Conditions."""
    samples: tuple[int, ...]
    """The K of the published table."""
    T: int
    """Query tokens per sample."""
    S: int
    """Condition tokens, padded."""
    P: int
    """A sample's own key/value tokens; 0: plain cross-attention."""
    H: int
    """Query heads."""
    Hkv: int
    """Key/value heads, a divisor of H."""
    D: int
    """Head dimension."""
    sweep: tuple[int, ...] = ()
    """More K, for the slope per extra sample."""
    min_length: int | None = None
    """Lengths are drawn from [min_length, S], one per condition; None: every condition has S tokens."""
    memory_mask: bool = False
    """Causal memory: query t sees condition token s when s <= t (diffusion_policy's observation tokens)."""
    own_causal: bool = False
    """Own token p is visible to query t when p <= t; needs P == T."""
    note: str = ""
    """How the case differs from the policy that it stands for."""

    @property
    def all_samples(self) -> tuple[int, ...]:
        """Every K: those of the table first, those of the sweep after them."""
        return self.samples + tuple(k for k in self.sweep if k not in self.samples)


FULL_CASES: tuple[AttentionCase, ...] = (
    AttentionCase(
        "minidiffuser-neck", B=100, samples=(64, 256), sweep=(1, 4, 16, 64, 256),
        T=1, S=4000, P=0, H=4, Hkv=4, D=18, min_length=250,
        note="keys are packed in the policy, padded lengths here; its 3D rotary is left out",
    ),
    AttentionCase(
        "pusht-transformer", B=64, samples=(8, 32, 128), T=16, S=2, P=1, H=4, Hkv=4, D=64, memory_mask=True,
        note="the own token is the timestep; causal memory mask",
    ),
    AttentionCase(
        "diffuser-actor-cross", B=16, samples=(16, 64), T=20, S=4096, P=0, H=8, Hkv=8, D=15,
        note="its full-width rotary is left out",
    ),
    AttentionCase(
        "diffuser-actor-masked", B=16, samples=(16, 64), T=20, S=819, P=20, H=8, Hkv=8, D=15,
        note="scene + own tokens; its full-width rotary is left out",
    ),
    AttentionCase(
        "groot-cross", B=16, samples=(8, 32), T=41, S=300, P=0, H=32, Hkv=32, D=48, min_length=200,
        note="padded lengths",
    ),
    AttentionCase(
        "smolvla-joint", B=8, samples=(8, 32), sweep=(1, 4, 16, 64, 256),
        T=50, S=241, P=50, H=15, Hkv=5, D=64, own_causal=True,
        note="grouped heads, causal own tokens; its rotary is left out",
    ),
    AttentionCase(
        "pi0-joint", B=4, samples=(8, 32), T=50, S=817, P=50, H=8, Hkv=1, D=256,
        note="one key/value head; its rotary is left out",
    ),
    AttentionCase(
        "vla-jepa-cross", B=32, samples=(8, 32), T=16, S=32, P=0, H=12, Hkv=12, D=64,
        note="rows come in layout kb in the policy; bk here, for every contestant",
    ),
)  # fmt: skip

# Per case: B, samples, sweep, T, S, P and min_length of the cpu scale.
_CPU_SIZES: dict[str, tuple[int, tuple[int, ...], tuple[int, ...], int, int, int, int | None]] = {
    "minidiffuser-neck": (4, (16, 64), (1, 4, 16, 64), 1, 400, 0, 25),
    "pusht-transformer": (8, (8, 32, 128), (), 16, 2, 1, None),
    "diffuser-actor-cross": (2, (4, 16), (), 20, 512, 0, None),
    "diffuser-actor-masked": (2, (4, 16), (), 20, 205, 20, None),
    "groot-cross": (1, (4, 16), (), 41, 100, 0, 60),
    "smolvla-joint": (1, (2, 8), (1, 2, 4, 8, 16), 50, 61, 50, None),
    "pi0-joint": (1, (2, 8), (), 26, 129, 26, None),
    "vla-jepa-cross": (4, (8, 32), (), 16, 32, 0, None),
}


def _cpu_sized(case: AttentionCase) -> AttentionCase:
    b, samples, sweep, t, s, p, min_length = _CPU_SIZES[case.name]
    return replace(case, B=b, samples=samples, sweep=sweep, T=t, S=s, P=p, min_length=min_length)


CASES: dict[str, dict[str, AttentionCase]] = {
    "full": {case.name: case for case in FULL_CASES},
    "cpu": {case.name: _cpu_sized(case) for case in FULL_CASES},
}


@dataclass(frozen=True)
class Inputs:
    """One set of inputs of a cell. The tensors require gradients; structure (lengths, mask) does not vary."""

    q: Tensor  # [B, K, T, H, D]
    k: Tensor  # [B, S, Hkv, D]
    v: Tensor  # [B, S, Hkv, D]
    own_k: Tensor | None  # [B, K, P, Hkv, D]
    own_v: Tensor | None  # [B, K, P, Hkv, D]
    lengths: Tensor | None  # [B] int32
    mask: Tensor | None  # [T, S] bool, True = visible
    own_causal: bool
    grad_out: Tensor  # [B, K, T, H, D]

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The differentiable inputs by name."""
        named = {"q": self.q, "k": self.k, "v": self.v, "own_k": self.own_k, "own_v": self.own_v}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor, for byte counts."""
        rest = (self.lengths, self.mask)
        return [*self.leaves.values(), self.grad_out, *(t for t in rest if t is not None)]

    def condition_slice(self, b: int, dtype: torch.dtype) -> Inputs:
        """Condition ``b`` alone, as fresh leaves of another dtype: conditions do not interact."""

        def leaf(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[b : b + 1].detach().to(dtype).requires_grad_()

        q, k, v = leaf(self.q), leaf(self.k), leaf(self.v)
        assert q is not None and k is not None and v is not None
        return replace(
            self, q=q, k=k, v=v, own_k=leaf(self.own_k), own_v=leaf(self.own_v),
            lengths=None if self.lengths is None else self.lengths[b : b + 1],
            grad_out=self.grad_out[b : b + 1].to(dtype),
        )  # fmt: skip


def make_inputs(
    case: AttentionCase,
    K: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    sets: int = 1,
    seed: int = 0,
) -> list[Inputs]:
    """``sets`` sets of standard-normal inputs, equal in structure and different in values, from one seed."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def draw(*shape: int, grad: bool = True) -> Tensor:
        x = torch.randn(*shape, generator=generator, device=device, dtype=torch.float32).to(dtype)
        return x.requires_grad_() if grad else x

    lengths = None
    if case.min_length is not None:
        spread = torch.rand(case.B, generator=generator, device=device)
        lengths = (case.min_length + spread * (case.S + 1 - case.min_length)).to(torch.int32)
        lengths.clamp_(max=case.S)
    mask = None
    if case.memory_mask:
        mask = torch.ones(case.T, case.S, dtype=torch.bool, device=device).tril()
    own = (case.B, K, case.P, case.Hkv, case.D)
    return [
        Inputs(
            q=draw(case.B, K, case.T, case.H, case.D),
            k=draw(case.B, case.S, case.Hkv, case.D),
            v=draw(case.B, case.S, case.Hkv, case.D),
            own_k=draw(*own) if case.P else None,
            own_v=draw(*own) if case.P else None,
            lengths=lengths,
            mask=mask,
            own_causal=case.own_causal,
            grad_out=draw(case.B, K, case.T, case.H, case.D, grad=False),
        )
        for _ in range(sets)
    ]


Pass = Literal["forward", "train"]


@dataclass(frozen=True)
class Work:
    """What any implementation has to do for one pass: the numerators of the floor."""

    flops: float
    """Multiply-adds counted as two."""
    bytes: float
    """Every input read once, every output written once per pass; the backward reads the inputs again."""
    exponentials: float


def work(case: AttentionCase, K: int, inputs: Inputs, which: Pass) -> Work:
    """Work of the visible (query, key) pairs: two products forward, five more backward (one recomputed)."""
    visible = float(case.B * case.S) if inputs.lengths is None else float(inputs.lengths.sum())
    shared = visible * K * case.T
    if inputs.mask is not None:
        seen = inputs.mask.sum(0).cumsum(0)  # [S], pairs of one sample when the condition has s + 1 tokens
        lengths = torch.full((case.B,), case.S) if inputs.lengths is None else inputs.lengths
        shared = float(seen[lengths.long().to(seen.device) - 1].sum()) * K
    own_pairs = case.T * (case.T + 1) / 2 if case.own_causal else case.T * case.P
    pairs = (shared + case.B * K * own_pairs) * case.H
    size = inputs.q.element_size()
    keys = 2 * visible * case.Hkv * case.D * size
    if inputs.own_k is not None:
        keys += 2 * inputs.own_k.numel() * size
    rows = inputs.q.numel() * size
    lse = 4 * case.B * K * case.T * case.H
    forward = Work(4.0 * pairs * case.D, 2 * rows + keys, pairs)
    if which == "forward":
        return forward
    backward_bytes = 3 * rows + keys + lse + rows + keys  # q, out, grad_out, keys, lse in; dq, dkeys out
    return Work(3.5 * forward.flops, forward.bytes + lse + backward_bytes, 2 * pairs)
