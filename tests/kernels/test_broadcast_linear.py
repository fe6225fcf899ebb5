"""The Triton kernels against the float64 definition, forward and every gradient, within the error budget.

``err(kernel) <= 2 * (err(reference in the same dtype) + eps * max|ref|)``, both against float64. Runs on the GPU
where there is one, else in Triton's interpreter (where bfloat16 products are wrong, so float16 stands in).
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from minidiff_fast.ops import broadcast_linear

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
HALF = [torch.float16, torch.bfloat16] if CUDA else [torch.float16]
NAMES = ("y", "dx", "dg", "dweight", "dbias")


def leaves_of(B, K, middle, Cx, Cg, Co, dtype=torch.float32, combine="cat") -> list[Tensor]:
    """x, g, weight, bias in float64, rounded to ``dtype`` so that every implementation reads the same numbers."""
    generator = torch.Generator().manual_seed(hash((B, K, middle, Cx, Cg, Co)) % 2**31)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).double().to(DEVICE)

    Cg = Cx if combine == "sum" else Cg
    return [draw(B, K, *middle, Cx), draw(B, Cg), draw(Co, Cx if combine == "sum" else Cx + Cg), draw(Co)]


def evaluate(leaves, dtype, impl, dy, options) -> list[Tensor]:
    """[y, dx, dg, dweight, dbias]."""
    leaves = [x.to(dtype).requires_grad_() for x in leaves]
    y = broadcast_linear(*leaves, **options, impl=impl)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]


def check(B, K, middle, Cx, Cg, Co, dtype=torch.float32, scale=1.0, **options) -> None:
    leaves = leaves_of(B, K, middle, Cx, Cg, Co, dtype, options.get("combine", "cat"))
    leaves[0] = (leaves[0] * scale).to(dtype).double()
    dy = torch.randn(B, K, *middle, Co, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    dy = dy.to(dtype).double().to(DEVICE)
    exact = evaluate(leaves, torch.float64, "reference", dy, options)
    same = evaluate(leaves, dtype, "reference", dy, options)
    ours = evaluate(leaves, dtype, "triton", dy, options)
    for name, want, reference, got in zip(NAMES, exact, same, ours, strict=True):
        error = (got.double() - want).abs().max().item()
        reference_error = (reference.double() - want).abs().max().item()
        budget = 2 * (reference_error + torch.finfo(dtype).eps * want.abs().max().item())
        assert error <= budget, f"{name}: error {error:.3e} over the budget {budget:.3e}"


SIZES = [
    # B, K, middle, Cx, Cg, Co: ones, primes, one off every block boundary
    (1, 1, (), 1, 1, 1),
    (2, 3, (), 5, 7, 11),
    (3, 1, (2,), 16, 16, 16),
    (1, 5, (), 15, 17, 31),
    (2, 5, (3,), 17, 15, 33),
    (2, 7, (2, 2), 31, 3, 32),
    (1, 33, (), 32, 32, 63),
    (3, 21, (), 33, 64, 64),
    (1, 13, (5,), 64, 13, 65),
    (2, 33, (), 48, 16, 129),
    (1, 127, (), 63, 1, 17),
    (5, 13, (2,), 65, 31, 16),
    (65, 1, (), 5, 3, 16),
]
FORMS = [(combine, activation) for combine in ("cat", "sum") for activation in (None, "silu", "mish")]


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("combine", ["cat", "sum"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size, combine, dtype):
    check(*size, dtype=dtype, combine=combine, activation="mish")


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize(("combine", "activation"), FORMS)
def test_forms(combine, activation, dtype):
    check(3, 4, (5,), 20, 12, 24, dtype=dtype, combine=combine, activation=activation)


@pytest.mark.parametrize("activation", ["silu", "mish"])
@pytest.mark.parametrize("combine", ["cat", "sum"])
def test_large_inputs_saturate_and_do_not_overflow(combine, activation):
    check(2, 9, (), 8, 8, 8, scale=60.0, combine=combine, activation=activation)


def test_without_a_bias():
    x, g, weight, _ = (t.float().requires_grad_() for t in leaves_of(2, 3, (), 8, 5, 6))
    for combine, w, condition in (("cat", weight, g), ("sum", weight[:, :8], weight[:2, :8])):
        ours = broadcast_linear(x, condition, w, activation="silu", combine=combine, impl="triton")
        theirs = broadcast_linear(x, condition, w, activation="silu", combine=combine, impl="reference")
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_many_rows_are_summed_in_chunks(dtype):
    """More rows than a chunk of dW takes, so that partial sums are added; a chunk's end inside a condition."""
    from minidiff_fast.ops._broadcast_linear_launch import row_chunk

    assert row_chunk(700, 1, 64) == 512 and row_chunk(700, 1, 16) == 128
    assert row_chunk(1 << 20, 1, 64) == 1 << 12
    check(7, 39 if dtype == torch.float32 else 75, (), 16, 16, 16, dtype=dtype, activation="silu")


@pytest.mark.parametrize("combine", ["cat", "sum"])
def test_smaller_tiles_of_wide_outputs_agree(combine):
    """Aligned 16-bit operands take the large tiles and the loop over more than one block of summands."""
    check(2, 33, (), 80, 16, 144, dtype=torch.float16, combine=combine, activation="silu")


def _variants(x: Tensor) -> list[Tensor]:
    """The same numbers under other strides: transposed storage, a slice of a larger tensor."""
    transposed = x.transpose(0, -1).contiguous().transpose(0, -1)
    padded = x.new_full((*x.shape[:-1], x.shape[-1] + 3), math.nan)
    padded[..., 1:-2] = x
    return [transposed, padded[..., 1:-2]]


@pytest.mark.parametrize("combine", ["cat", "sum"])
def test_strided_and_expanded_inputs(combine):
    leaves = [x.float() for x in leaves_of(2, 3, (4,), 16, 12, 20, combine=combine)]
    options = {"activation": "mish", "combine": combine, "impl": "triton"}
    expected = broadcast_linear(*leaves, **options)
    for which in range(3):
        for variant in _variants(leaves[which]):
            assert not variant.is_contiguous()
            moved = [variant if i == which else x for i, x in enumerate(leaves)]
            assert torch.equal(broadcast_linear(*moved, **options), expected)
    channels_first = leaves[0].transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(broadcast_linear(channels_first, *leaves[1:], **options), expected)
    spread = leaves[3].repeat_interleave(2)[::2]
    assert torch.equal(broadcast_linear(*leaves[:3], spread, **options), expected)
    one = leaves[0][:, :1].expand(-1, 3, -1, -1)
    assert torch.equal(
        broadcast_linear(one, *leaves[1:], **options), broadcast_linear(one.contiguous(), *leaves[1:], **options)
    )


@pytest.mark.parametrize("combine", ["cat", "sum"])
def test_expanded_gradient_is_read_with_its_strides(combine):
    leaves = [x.float().requires_grad_() for x in leaves_of(2, 3, (4,), 16, 12, 20, combine=combine)]
    y = broadcast_linear(*leaves, activation="silu", combine=combine, impl="triton")
    expanded = torch.autograd.grad(y, leaves, torch.ones(1, 1, 1, 1, device=DEVICE).expand_as(y), retain_graph=True)
    dense = torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert all(torch.equal(a, b) for a, b in zip(expanded, dense, strict=True))


def test_samples_and_conditions_do_not_mix():
    x, g, weight, bias = (t.float() for t in leaves_of(3, 4, (2,), 16, 16, 8))
    before = broadcast_linear(x, g, weight, bias, impl="triton")
    other = g.clone()
    other[1] += 1.0
    after = broadcast_linear(x, other, weight, bias, impl="triton")
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert (before[1] != after[1]).any(-1).all()


@pytest.mark.parametrize("combine", ["cat", "sum"])
def test_gradients_are_bitwise_reproducible(combine):
    """Can only fail on a GPU, where atomics or a race would show."""
    leaves = leaves_of(3, 45, (), 16, 12, 24, combine=combine)
    dy = torch.randn(3, 45, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    options = {"activation": "mish", "combine": combine}
    first = evaluate(leaves, torch.float32, "triton", dy, options)
    again = evaluate(leaves, torch.float32, "triton", dy, options)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("combine", ["cat", "sum"])
def test_every_element_of_every_output_is_written(combine, monkeypatch):
    """Outputs start as NaN instead of whatever memory held; nothing may be left of it."""
    real = torch.empty

    def poisoned(*args, **kwargs):
        made = real(*args, **kwargs)
        return made.fill_(math.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)
    leaves = leaves_of(5, 27, (), 17, 12, 33, combine=combine)
    dy = torch.ones(5, 27, 33, device=DEVICE, dtype=torch.float64)
    for result in evaluate(leaves, torch.float32, "triton", dy, {"activation": "silu", "combine": combine}):
        assert not torch.isnan(result).any()


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("combine", ["cat", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sizes_of_real_models(dtype, combine):
    check(64, 32, (), 256, 274, 1024, dtype=dtype, combine=combine, activation="mish")
    check(16, 32, (16,), 384, 384, 2304, dtype=dtype, combine=combine, activation="silu")


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_auto_runs_triton_on_the_gpu():
    leaves = [x.to(torch.bfloat16) for x in leaves_of(2, 3, (4,), 64, 32, 48, torch.bfloat16)]
    assert torch.equal(broadcast_linear(*leaves), broadcast_linear(*leaves, impl="triton"))
