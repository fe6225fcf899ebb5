"""Packed keys, rotary positions and query norms in the Triton kernels, within the error budget.

``err(kernel) <= 2 * (err(reference in the same dtype) + eps * max|ref|)``, both against float64, for the output, the
log-sum-exp and every gradient.
"""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from minidiff_fast.kernels._query_transform import _sin_cos
from minidiff_fast.ops import QueryNorm, Rotary, RotaryPositions, broadcast_attention

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
HALF = [torch.float16, torch.bfloat16] if CUDA else [torch.float16]


class Problem:
    """One call, its numbers rounded to ``dtype`` so that every implementation reads the same ones."""

    def __init__(
        self, B, K, T, S, P, H, Hkv, D, dtype=torch.float32, *, packed=None, rotary=None, own_turns=True, norm=None,
        affine=(True, True), far=5.0, **options,
    ) -> None:  # fmt: skip
        self.dtype, self.options = dtype, options
        self.random = torch.Generator().manual_seed(B + 10 * K + 100 * T + 1000 * S + P + D)
        keys = (S, Hkv, D) if packed is not None else (B, S, Hkv, D)
        self.leaves = {"q": self.draw(B, K, T, H, D), "k": self.draw(*keys), "v": self.draw(*keys)}
        if P:
            self.leaves |= {"own_k": self.draw(B, K, P, Hkv, D), "own_v": self.draw(B, K, P, Hkv, D)}
        for name, given in zip(("weight", "bias"), affine, strict=True):
            if norm and given:
                self.leaves[name] = self.draw(D) + 1
        self.norm, self.rope = norm, None
        if rotary is not None:
            axes = [3] if rotary.axes == 3 else []
            at, own = (far * (2 * torch.rand(B, K, n, *axes, generator=self.random) - 1).to(DEVICE) for n in (T, P))
            self.rope = RotaryPositions(rotary, at, own if P and own_turns else None)
        self.packed = None if packed is None else torch.tensor(packed, dtype=torch.int32, device=DEVICE)
        self.dout, self.dlse = self.draw(B, K, T, H, D), self.draw(B, K, T, H)

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random, dtype=torch.float64).to(self.dtype).double().to(DEVICE)

    def evaluate(self, dtype, impl) -> dict[str, Tensor]:
        leaves = {name: x.to(dtype).requires_grad_() for name, x in self.leaves.items()}
        norm = QueryNorm(self.norm, leaves.get("weight"), leaves.get("bias"), 1e-5) if self.norm else None
        tensors = [leaves.get(name) for name in ("q", "k", "v", "own_k", "own_v")]
        result = broadcast_attention(
            *tensors, cu_seqlens=self.packed, rope=self.rope, q_norm=norm, return_lse=True, impl=impl, **self.options
        )
        finite = torch.where(torch.isinf(result.lse), torch.zeros_like(result.lse), result.lse)
        objective = (result.out * self.dout.to(dtype)).sum() + (finite * self.dlse.to(finite.dtype)).sum()
        gradients = torch.autograd.grad(objective, list(leaves.values()))
        return {"out": result.out, "lse": result.lse, **dict(zip(leaves, gradients, strict=True))}

    def check(self) -> None:
        exact = self.evaluate(torch.float64, "reference")
        same, ours = self.evaluate(self.dtype, "reference"), self.evaluate(self.dtype, "triton")
        for name, want in exact.items():
            finite = torch.isfinite(want)
            assert torch.equal(finite, torch.isfinite(ours[name])), f"{name}: not finite in the same places"
            if not finite.any():
                continue
            error, reference = ((x[name].double() - want)[finite].abs().max().item() for x in (ours, same))
            budget = 2 * (reference + torch.finfo(self.dtype).eps * want[finite].abs().max().item())
            assert error <= budget, f"{name}: error {error:.3e} over the budget {budget:.3e}"


SEED = torch.tensor([2**40 + 17], device=DEVICE)
PACKED = {
    "one condition": ((1, 3, 2, 17, 0, 2, 1, 12), [0, 17]),
    "empty ones, single tokens, block ends": ((6, 2, 1, 55, 0, 2, 2, 8), [0, 0, 1, 17, 33, 33, 55]),
    "nobody's tokens at both ends": ((2, 3, 2, 40, 1, 2, 1, 15), [3, 20, 37]),
    "nobody has any": ((2, 2, 3, 5, 2, 2, 1, 8), [2, 2, 2]),
    "no tokens at all": ((2, 2, 3, 0, 2, 2, 1, 8), [0, 0, 0]),
    "many short ones": ((9, 2, 1, 13, 0, 1, 1, 8), [0, 1, 2, 5, 5, 5, 6, 9, 12, 13]),
}


@pytest.mark.parametrize("name", PACKED)
def test_packed(name):
    size, offsets = PACKED[name]
    Problem(*size, packed=offsets).check()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_packed_in_16_bits_with_dropout(dtype):
    Problem(3, 3, 2, 40, 2, 4, 2, 16, dtype, packed=[0, 18, 18, 40], dropout_p=0.3, seed=SEED).check()


def test_packed_is_padded_with_lengths():
    """The same tokens, packed and padded."""
    lengths, S = [5, 0, 20], 20
    padded = Problem(3, 2, 3, S, 2, 2, 1, 16, lengths=torch.tensor(lengths, device=DEVICE))
    offsets = [0, 5, 5, 25]
    packed = Problem(3, 2, 3, 25, 2, 2, 1, 16, packed=offsets)
    packed.leaves = dict(padded.leaves)
    for name in ("k", "v"):
        packed.leaves[name] = torch.cat([x[:n] for x, n in zip(padded.leaves[name], lengths, strict=True)])
    packed.dout, packed.dlse = padded.dout, padded.dlse
    a, b = packed.evaluate(torch.float32, "triton"), padded.evaluate(torch.float32, "triton")
    for name in ("k", "v"):
        b[name] = torch.cat([x[:n] for x, n in zip(b[name], lengths, strict=True)])
    for name, want in b.items():
        torch.testing.assert_close(a[name], want)


ROTARY = {
    "time": ((2, 3, 5, 7, 0, 4, 2, 12), Rotary(1, 12)),
    "time, half, part of the channels": ((1, 2, 3, 9, 3, 2, 1, 18), Rotary(1, 8, base=100.0, style="half")),
    "space": ((2, 2, 3, 17, 2, 4, 1, 18), Rotary(3, 18)),
    "space, half, part of the channels": ((1, 3, 2, 6, 1, 2, 2, 15), Rotary(3, 12, style="half")),
    "full width, odd heads": ((2, 2, 3, 5, 2, 8, 8, 15), Rotary(3, 120, full_width=True)),
    "full width, half": ((1, 2, 3, 5, 1, 2, 2, 9), Rotary(1, 18, style="half", full_width=True)),
    "wide head": ((1, 2, 2, 6, 2, 1, 1, 64), Rotary(1, 64, style="half")),
}


@pytest.mark.parametrize("name", ROTARY)
def test_rotary(name):
    size, rotary = ROTARY[name]
    Problem(*size, rotary=rotary).check()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_rotary_in_16_bits(dtype):
    Problem(2, 2, 3, 17, 2, 4, 1, 18, dtype, rotary=Rotary(3, 18)).check()


def test_own_keys_without_positions_stay():
    Problem(2, 2, 3, 5, 2, 2, 1, 12, rotary=Rotary(1, 12), own_turns=False).check()


def test_large_angles():
    """10,000 radians: the reduction to a quarter turn must lose nothing; the rounding of the angle is float32's."""
    Problem(1, 3, 4, 5, 0, 2, 1, 8, rotary=Rotary(1, 8), far=10000.0).check()


@pytest.mark.parametrize("affine", [(True, True), (True, False), (False, False)], ids=str)
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_norm(norm, affine):
    Problem(2, 3, 3, 7, 1, 4, 2, 15, norm=norm, affine=affine).check()


EVERYTHING = {
    "packed": [2, 2, 19],
    "norm": "layer",
    "rotary": Rotary(3, 12, style="half"),
    "own_causal": True,
    "dropout_p": 0.2,
    "seed": SEED,
}


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_everything_at_once(dtype):
    Problem(2, 3, 3, 20, 3, 4, 2, 20, dtype, **EVERYTHING).check()


def test_more_rows_than_programs(monkeypatch):
    """The pass over dq shares its blocks of rows among a bounded number of programs."""
    from minidiff_fast.ops import _broadcast_attention_launch as launcher

    monkeypatch.setattr(launcher, "MOST_PARTIALS", 2)
    Problem(2, 11, 3, 3, 0, 5, 1, 8, norm="layer", rotary=Rotary(1, 8)).check()


def test_strides_and_other_dtypes_of_positions():
    problem = Problem(2, 3, 4, 5, 2, 2, 2, 12, rotary=Rotary(1, 12), norm="rms")
    expected = problem.evaluate(torch.float32, "triton")
    whole = torch.arange(4, device=DEVICE).expand(2, 3, 4)
    problem.rope = RotaryPositions(problem.rope.rotary, whole, whole[..., :2])
    integers = problem.evaluate(torch.float32, "triton")
    problem.rope = RotaryPositions(problem.rope.rotary, whole.double().contiguous(), whole[..., :2].half())
    for name, value in problem.evaluate(torch.float32, "triton").items():
        assert torch.equal(value, integers[name]) and not torch.equal(value, expected[name])


def test_every_element_is_written_and_bits_repeat(monkeypatch):
    real = torch.empty

    def poisoned(*args, **kwargs):
        made = real(*args, **kwargs)
        return made.fill_(math.nan) if made.is_floating_point() else made

    problem = Problem(2, 3, 3, 20, 3, 4, 2, 20, **EVERYTHING)
    expected = problem.evaluate(torch.float32, "triton")
    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", lambda x, **kwargs: poisoned(x.shape, dtype=x.dtype, device=x.device))
    for name, value in problem.evaluate(torch.float32, "triton").items():
        assert torch.equal(value, expected[name]), name
    assert (expected["k"][:2] == 0).all() and (expected["k"][19:] == 0).all()


@triton.jit
def _sines_and_cosines(x, sin, cos, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    s, c = _sin_cos(tl.load(x + i))
    tl.store(sin + i, s)
    tl.store(cos + i, c)


def test_sine_and_cosine_of_the_kernels():
    x = torch.linspace(-10000, 10000, 1 << 14, dtype=torch.float32, device=DEVICE)
    sin, cos = torch.empty_like(x), torch.empty_like(x)
    _sines_and_cosines[(4,)](x, sin, cos, N=1 << 12)
    for ours, exact in ((sin, x.double().sin()), (cos, x.double().cos())):
        assert (ours.double() - exact).abs().max() <= torch.finfo(torch.float32).eps
