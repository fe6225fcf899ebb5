"""The Triton kernels against the float64 definition, forward and every gradient, within the error budget.

``err(kernel) <= 2 * (err(reference in the same dtype) + eps * max|ref|)``, both against float64. Runs on the GPU
where there is one, else in Triton's interpreter (where bfloat16 products are wrong, so float16 stands in).
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from minidiff_fast.ops import broadcast_attention

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
HALF = [torch.float16, torch.bfloat16] if CUDA else [torch.float16]


def leaves_of(B, K, T, S, P, H, Hkv, D, dtype) -> list[Tensor | None]:
    """q, k, v, own_k, own_v in float64, rounded to ``dtype`` so that every implementation reads the same numbers."""
    generator = torch.Generator().manual_seed(hash((B, K, T, S, P, H, Hkv, D)) % 2**31)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).double().to(DEVICE)

    own = [draw(B, K, P, Hkv, D), draw(B, K, P, Hkv, D)] if P else [None, None]
    return [draw(B, K, T, H, D), draw(B, S, Hkv, D), draw(B, S, Hkv, D), *own]


def evaluate(leaves, dtype, impl, dout, dlse, options) -> list[Tensor]:
    """[out, lse, dq, dk, dv, down_k, down_v]."""
    leaves = [None if x is None else x.to(dtype).requires_grad_() for x in leaves]
    result = broadcast_attention(*leaves, **options, return_lse=True, impl=impl)
    finite_lse = torch.where(torch.isinf(result.lse), torch.zeros_like(result.lse), result.lse)
    objective = (result.out * dout.to(dtype)).sum() + (finite_lse * dlse.to(finite_lse.dtype)).sum()
    present = [x for x in leaves if x is not None]
    return [result.out, result.lse, *torch.autograd.grad(objective, present)]


def check(B, K, T, S, P, H, Hkv, D, dtype=torch.float32, impl="triton", **options) -> None:
    leaves = leaves_of(B, K, T, S, P, H, Hkv, D, dtype)
    generator = torch.Generator().manual_seed(7)
    dout = torch.randn(leaves[0].shape, generator=generator, dtype=torch.float64).to(dtype).double().to(DEVICE)
    dlse = torch.randn(leaves[0].shape[:-1], generator=generator, dtype=torch.float64).to(DEVICE)
    exact = evaluate(leaves, torch.float64, "reference", dout, dlse, options)
    same = evaluate(leaves, dtype, "reference", dout, dlse, options)
    ours = evaluate(leaves, dtype, impl, dout, dlse, options)
    names = ["out", "lse", "dq", "dk", "dv", "down_k", "down_v"]
    for name, want, reference, got in zip(names, exact, same, ours, strict=False):
        finite = torch.isfinite(want)
        assert torch.equal(finite, torch.isfinite(got)), f"{name}: not finite in the same places"
        if not finite.any():
            continue
        error = (got.double() - want)[finite].abs().max().item()
        reference_error = (reference.double() - want)[finite].abs().max().item()
        budget = 2 * (reference_error + torch.finfo(dtype).eps * want[finite].abs().max().item())
        assert error <= budget, f"{name}: error {error:.3e} over the budget {budget:.3e}"


SIZES = [
    # B, K, T, S, P, H, Hkv, D: ones, primes, one off every block boundary
    (1, 1, 5, 7, 0, 1, 1, 8),
    (2, 6, 1, 6, 1, 3, 1, 8),
    (3, 7, 3, 1, 2, 2, 2, 9),
    (2, 3, 5, 7, 3, 4, 2, 12),
    (1, 2, 3, 17, 1, 3, 3, 15),
    (3, 1, 2, 16, 2, 2, 1, 18),
    (1, 5, 7, 15, 0, 2, 2, 24),
    (1, 3, 11, 33, 11, 2, 1, 30),
    (1, 9, 2, 64, 1, 2, 2, 48),
    (1, 65, 1, 65, 2, 1, 1, 64),
    (1, 2, 3, 31, 5, 2, 1, 65),
    (1, 2, 2, 40, 3, 2, 1, 128),
    (1, 1, 3, 9, 2, 2, 1, 255),
    (1, 13, 5, 20, 0, 2, 1, 256),
    (1, 17, 8, 3, 1, 4, 4, 16),
    (2, 3, 4, 0, 2, 2, 2, 16),
]


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size, dtype):
    check(*size, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize(
    "name", ["lengths", "mask_ts", "mask_bs", "mask_bts", "own_causal", "scale", "dropout", "everything"]
)
def test_options(name, dtype):
    B, K, T, S, P, H, Hkv, D = 3, 4, 5, 37, 5, 4, 2, 20
    random = torch.Generator().manual_seed(3)
    options = {
        "lengths": {"lengths": torch.tensor([0, 37, 18], dtype=torch.int32)},
        "mask_ts": {"mask": torch.rand(T, S, generator=random) > 0.5},
        "mask_bs": {"mask": torch.rand(B, S, generator=random) > 0.5},
        "mask_bts": {"mask": torch.rand(B, T, S, generator=random) > 0.5},
        "own_causal": {"own_causal": True},
        "scale": {"scale": -1.3},
        "dropout": {"dropout_p": 0.35, "seed": torch.tensor([2**40 + 17])},
        "everything": {
            "lengths": torch.tensor([1, 30, 37]),
            "mask": torch.rand(1, T, S, generator=random) > 0.3,
            "own_causal": True,
            "dropout_p": 0.1,
            "seed": torch.tensor([9]),
            "scale": 0.5,
        },
    }[name]
    options = {key: x.to(DEVICE) if isinstance(x, Tensor) else x for key, x in options.items()}
    check(B, K, T, S, P, H, Hkv, D, dtype=dtype, **options)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_widest_head_with_own_tokens(dtype):
    """In 16 bits only: for the two own keys the float32 reference sums its 256 products in several lanes, to a third
    of the error of one running sum, which is how a matrix tile sums; the budget then asks for better than float32."""
    check(1, 13, 5, 20, 2, 2, 1, 256, dtype=dtype)


def test_all_ones():
    """One query, one own key beside one shared key: every axis 1. The budget scales with the largest element, and one
    query's gradient can cancel to less than its terms; here the bound is on the terms."""
    leaves = leaves_of(1, 1, 1, 1, 1, 1, 1, 8, torch.float32)
    dout, dlse = torch.ones_like(leaves[0]), torch.ones_like(leaves[0][..., 0])
    exact = evaluate(leaves, torch.float64, "reference", dout, dlse, {})
    ours = evaluate(leaves, torch.float32, "triton", dout, dlse, {})
    largest = max(x.abs().max().item() for x in leaves if x is not None)
    for want, got in zip(exact, ours, strict=True):
        assert (got.double() - want).abs().max() <= 4 * torch.finfo(torch.float32).eps * 8 * largest**2


def test_a_single_key():
    """The softmax of one key is 1 whatever q and k are: out is v, dq and dk are exactly 0, and what a kernel leaves
    there is the rounding of dout . v - dout . out, two equal sums of D products."""
    B, K, T, D = 2, 3, 5, 8
    leaves = leaves_of(B, K, T, 1, 0, 1, 1, D, torch.float32)
    dout = torch.randn(leaves[0].shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    out, lse, dq, dk, dv = evaluate(leaves, torch.float32, "triton", dout, torch.zeros_like(dout[..., 0]), {})
    q, k, v = (x.float() for x in leaves[:3])
    torch.testing.assert_close(out, v[:, None].expand_as(out), rtol=0, atol=0)
    torch.testing.assert_close(lse, (q * k[:, None]).sum(-1) * D**-0.5)
    torch.testing.assert_close(dv, dout.sum((1, 2))[:, None])
    rounding = torch.finfo(torch.float32).eps * D * (dout.abs() * v[:, None].abs()).sum(-1).max() * D**-0.5
    assert dq.abs().max() <= rounding * k.abs().max()
    assert dk.abs().max() <= rounding * q.abs().max() * K * T


def test_queries_that_see_nothing():
    mask = torch.zeros(1, 3, 6, dtype=torch.bool, device=DEVICE)
    mask[:, 1, 2] = True
    check(2, 3, 3, 6, 0, 2, 2, 16, mask=mask)
    check(2, 3, 3, 6, 0, 2, 2, 16, lengths=torch.zeros(2, dtype=torch.int64, device=DEVICE))


def _variants(x: Tensor) -> list[Tensor]:
    """The same numbers under other strides: transposed storage, a slice of a larger tensor, negative-free padding."""
    transposed = x.transpose(1, -1).contiguous().transpose(1, -1)
    padded = x.new_full((*x.shape[:-1], x.shape[-1] + 3), math.nan)
    padded[..., 1:-2] = x
    return [transposed, padded[..., 1:-2]]


def test_strided_and_expanded_inputs():
    leaves = [x.float() for x in leaves_of(2, 3, 4, 9, 2, 2, 2, 16, torch.float32)]
    expected = broadcast_attention(*leaves, impl="triton")
    for which in range(5):
        for variant in _variants(leaves[which]):
            assert not variant.is_contiguous()
            moved = [variant if i == which else x for i, x in enumerate(leaves)]
            assert torch.equal(broadcast_attention(*moved, impl="triton"), expected)
    one = leaves[1][:1].expand(2, -1, -1, -1)
    assert torch.equal(
        broadcast_attention(leaves[0], one, one, impl="triton"),
        broadcast_attention(leaves[0], one.contiguous(), one.contiguous(), impl="triton"),
    )


def test_expanded_gradient_is_read_with_its_strides():
    leaves = [x.float().requires_grad_() for x in leaves_of(2, 3, 4, 9, 2, 2, 2, 16, torch.float32)]
    out = broadcast_attention(*leaves, impl="triton")
    expanded = torch.autograd.grad(
        out, leaves, torch.ones(1, 1, 1, 1, 1, device=DEVICE).expand_as(out), retain_graph=True
    )
    dense = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert all(torch.equal(a, b) for a, b in zip(expanded, dense, strict=True))


def test_samples_do_not_see_each_other():
    q, k, v, own_k, own_v = (x.float() for x in leaves_of(2, 4, 3, 5, 3, 2, 1, 16, torch.float32))
    before = broadcast_attention(q, k, v, own_k, own_v, impl="triton")
    q2, own_k2, own_v2 = q.clone(), own_k.clone(), own_v.clone()
    for x in (q2, own_k2, own_v2):
        x[:, 1] = 50 * torch.randn_like(x[:, 1])
    after = broadcast_attention(q2, k, v, own_k2, own_v2, impl="triton")
    others = [0, 2, 3]
    assert torch.equal(before[:, others], after[:, others])
    assert not torch.equal(before[:, 1], after[:, 1])


def test_gradients_are_bitwise_reproducible():
    """Can only fail on a GPU, where atomics or a race would show."""
    leaves = leaves_of(2, 13, 5, 21, 2, 4, 2, 16, torch.float32)
    dout, dlse = torch.ones_like(leaves[0]), torch.ones_like(leaves[0][..., 0])
    first = evaluate(leaves, torch.float32, "triton", dout, dlse, {})
    for _ in range(2):
        again = evaluate(leaves, torch.float32, "triton", dout, dlse, {})
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_every_element_of_every_output_is_written(monkeypatch):
    """Outputs start as NaN instead of whatever memory held; nothing may be left of it."""
    real = torch.empty

    def poisoned(*args, **kwargs):
        made = real(*args, **kwargs)
        return made.fill_(math.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", lambda x, **kwargs: poisoned(x.shape, dtype=x.dtype, device=x.device))
    leaves = leaves_of(2, 3, 5, 37, 3, 4, 2, 20, torch.float32)
    lengths = torch.tensor([5, 0], device=DEVICE)
    dout, dlse = torch.ones_like(leaves[0]), torch.ones_like(leaves[0][..., 0])
    for result in evaluate(leaves, torch.float32, "triton", dout, dlse, {"lengths": lengths}):
        assert not torch.isnan(result).any()


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_auto_runs_triton_on_the_gpu():
    leaves = [x.to(torch.bfloat16) for x in leaves_of(2, 3, 4, 9, 2, 2, 2, 64, torch.bfloat16)]
    assert torch.equal(broadcast_attention(*leaves), broadcast_attention(*leaves, impl="triton"))
