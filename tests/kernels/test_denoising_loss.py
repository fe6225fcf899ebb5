"""The Triton kernels against the float64 definition, loss and gradient, within the error budget.

``err(kernel) <= 2 * (err(reference in the same dtype) + eps * max|ref|)``, both against float64.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from minidiff_fast.ops import _denoising_loss_launch as launch
from minidiff_fast.ops import denoising_loss

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16] if CUDA else [torch.float32, torch.float16]


def inputs_of(B, K, T, A, dtype) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """pred (in ``dtype``), target, dloss, and a mask per condition and one per sample."""
    generator = torch.Generator().manual_seed(B + 10 * K + 100 * T + 1000 * A)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE)

    masks = {"2": draw(B, T) > -0.3, "3": draw(B, K, T) > 0.3, "none": None}
    return draw(B, K, T, A).to(dtype), draw(B, K, T, A), draw(B, K), masks


def check(pred, target, dloss, dtype=torch.float32, **options) -> None:
    def evaluate(kind: torch.dtype, impl: str) -> tuple[Tensor, Tensor]:
        leaf = pred.detach().to(kind).requires_grad_()
        loss = denoising_loss(leaf, target.to(torch.promote_types(kind, torch.float32)), impl=impl, **options)
        return loss, torch.autograd.grad(loss, leaf, dloss.to(loss.dtype))[0]

    results = (evaluate(torch.float64, "reference"), evaluate(dtype, "reference"), evaluate(dtype, "triton"))
    for name, want, reference, got in zip(("loss", "dpred"), *results, strict=True):
        assert got.dtype == reference.dtype and torch.isfinite(got).all()
        error = (got.double() - want).abs().max().item()
        reference_error = (reference.double() - want).abs().max().item()
        budget = 2 * (reference_error + torch.finfo(dtype).eps * want.abs().max().item())
        assert error <= budget, f"{name}: error {error:.3e} over the budget {budget:.3e}"


SIZES = [
    # B, K, T, A: ones, primes, one off every block boundary
    (1, 1, 1, 1),
    (2, 3, 5, 7),
    (1, 257, 1, 3),
    (3, 1, 17, 15),
    (2, 5, 16, 2),
    (1, 2, 27, 19),
    (1, 3, 16, 33),
    (2, 2, 131, 11),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["mse", "l1", "huber"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size, kind, dtype):
    pred, target, dloss, masks = inputs_of(*size, dtype)
    mask = masks[("none", "2", "3")[(sum(size) + len(kind)) % 3]]
    check(pred, target, dloss, dtype, kind=kind, delta=0.7, mask=mask)


@pytest.mark.parametrize("mask", ["none", "2", "3"])
@pytest.mark.parametrize("kind", ["mse", "l1", "huber"])
def test_masks_and_weights(kind, mask):
    pred, target, dloss, masks = inputs_of(3, 4, 5, 6, torch.float32)
    for weight in (None, dloss.abs(), dloss[:, 0].abs()):
        check(pred, target, dloss, kind=kind, mask=masks[mask], weight=weight)


def test_strided_and_expanded_inputs():
    pred, target, dloss, masks = inputs_of(4, 6, 5, 8, torch.float32)
    big = torch.randn(8, 6, 10, 8, device=DEVICE)
    views = [big[::2, :, ::2], big[:4, :, 5:], big[4:, :, :5].flip(2), target[:, :1].expand_as(target), target[:1].expand_as(target)]  # fmt: skip
    for view in [*views, pred.transpose(0, 1).contiguous().transpose(0, 1), pred.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0)]:  # fmt: skip
        check(view, target, dloss, mask=masks["2"])
        check(pred, view, dloss, mask=masks["3"])
    check(pred, target, dloss[:1, :1].expand_as(dloss))
    wide = torch.rand(4, 6, 10, device=DEVICE) > 0.5
    for mask in (wide[:, :, ::2], wide[:, 0, 1::2], wide[:1, :1, :5].expand(4, 6, 5)):
        check(pred, target, dloss, mask=mask)


def test_every_output_is_written(monkeypatch):
    pred, target, dloss, masks = inputs_of(3, 5, 7, 3, torch.float32)
    plain = torch.empty

    def poisoned(*args, **kwargs):
        made = plain(*args, **kwargs)
        return made.fill_(math.nan) if made.is_floating_point() else made

    monkeypatch.setattr(launch.torch, "empty", poisoned)
    for mask in masks.values():
        check(pred, target, dloss, mask=mask)


def test_the_same_bits_twice():
    pred, target, dloss, masks = inputs_of(3, 5, 37, 23, torch.float32)
    runs = []
    for _ in range(2):
        leaf = pred.clone().requires_grad_()
        loss = denoising_loss(leaf, target, mask=masks["3"], impl="triton")
        runs.append((loss, torch.autograd.grad(loss, leaf, dloss)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_nan_reaches_the_loss_and_the_gradient():
    pred, target, dloss, _ = inputs_of(2, 2, 3, 4, torch.float32)
    pred[0, 1, 2, 3] = math.nan
    for kind in ("mse", "l1", "huber"):
        leaf = pred.clone().requires_grad_()
        loss = denoising_loss(leaf, target, kind=kind, impl="triton")
        gradient = torch.autograd.grad(loss, leaf, dloss)[0]
        assert torch.isnan(loss).sum() == 1 and torch.isnan(loss[0, 1])
        assert torch.isnan(gradient[0, 1, 2, 3]) and torch.isnan(gradient).sum() == 1
