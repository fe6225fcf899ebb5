"""The definition of the denoising loss, its checks, its schema and what autograd keeps of it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from minidiff_fast.errors import BackendUnavailable, InvalidArgument
from minidiff_fast.ops import denoising_loss, denoising_loss_reference

KERNEL = "triton"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = ["mse", "l1", "huber"]


def tensors(B=2, K=3, T=4, A=5, dtype=torch.float64, grad=False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(B + 10 * K + 100 * T + 1000 * A)
    pred, target = (torch.randn(B, K, T, A, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for _ in "pt")
    return pred.requires_grad_(grad), target


def options_of(weight: int, mask: int, B=2, K=3, T=4) -> dict[str, Tensor]:
    """``weight`` and ``mask`` say how many axes they have; 0 for none. The first sample's tokens never count."""
    generator = torch.Generator().manual_seed(5)
    options = {}
    if weight:
        options["weight"] = torch.rand((B, K)[:weight], generator=generator).to(DEVICE)
    if mask:
        counted = torch.rand((B, T) if mask == 2 else (B, K, T), generator=generator) > 0.4
        counted[0] = False
        options["mask"] = counted.to(DEVICE)
    return options


def by_hand(pred, target, weight=None, mask=None, kind="mse", delta=1.0) -> Tensor:
    B, K, T, _ = pred.shape
    rows = []
    for b, k in itertools.product(range(B), range(K)):
        tokens = [t for t in range(T) if mask is None or bool(mask[b, t] if mask.dim() == 2 else mask[b, k, t])]
        errors = []
        for t in tokens:
            p, y = pred[b, k, t], target[b, k, t]
            if kind == "huber":
                errors.append(F.huber_loss(p, y, delta=delta))
            else:
                errors.append(F.mse_loss(p, y) if kind == "mse" else F.l1_loss(p, y))
        loss = torch.stack(errors).mean() if errors else pred.new_zeros(())
        rows.append(loss if weight is None else loss * (weight[b] if weight.dim() == 1 else weight[b, k]))
    return torch.stack(rows).view(B, K)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight", [0, 1, 2])
@pytest.mark.parametrize("mask", [0, 2, 3])
def test_reference_is_the_formula(kind, weight, mask):
    pred, target = tensors()
    options = options_of(weight, mask)
    expected = by_hand(pred, target, kind=kind, delta=0.7, **options)
    for reduction, want in [("sample", expected), ("condition", expected.mean(1)), ("mean", expected.mean())]:
        loss = denoising_loss(pred, target, kind=kind, delta=0.7, reduction=reduction, **options)
        torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", [0, 2, 3])
@pytest.mark.parametrize("reduction", ["sample", "condition", "mean"])
def test_gradcheck(kind, mask, reduction):
    pred, target = tensors(grad=True)
    options = options_of(2, mask)
    weight = options.pop("weight").double().requires_grad_()

    def run(pred, weight):
        return denoising_loss(pred, target, weight=weight, kind=kind, delta=0.7, reduction=reduction, **options)

    assert torch.autograd.gradcheck(run, (pred, weight))
    assert torch.autograd.gradgradcheck(run, (pred, weight), atol=1e-4)


@pytest.mark.parametrize("impl", ["reference", KERNEL])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", [2, 3])
def test_tokens_that_do_not_count_may_hold_anything(impl, kind, mask):
    pred, target = tensors(dtype=torch.float32)
    options = options_of(0, mask)
    clean = denoising_loss(pred, target, kind=kind, impl=impl, **options)
    counted = options["mask"] if mask == 3 else options["mask"][:, None].expand(-1, 3, -1)
    dirty = pred.masked_fill(~counted[..., None], math.nan).requires_grad_()
    poisoned = target.masked_fill(~counted[..., None], math.inf)
    loss = denoising_loss(dirty, poisoned, kind=kind, impl=impl, **options)
    assert torch.equal(loss, clean) and (loss[0] == 0).all()
    gradient = torch.autograd.grad(loss.sum(), dirty)[0]
    assert torch.isfinite(gradient).all() and (gradient[~counted] == 0).all()


@pytest.mark.parametrize("impl", ["reference", KERNEL])
def test_only_predictions_and_weights_get_gradients(impl):
    pred, target = tensors(dtype=torch.float32, grad=True)
    target.requires_grad_()
    weight = torch.rand(2, 3, device=DEVICE, requires_grad=True)
    loss = denoising_loss(pred, target, weight=weight, reduction="mean", impl=impl)
    dpred, dtarget, dweight = torch.autograd.grad(loss, (pred, target, weight), allow_unused=True)
    assert dtarget is None
    torch.testing.assert_close(dweight, denoising_loss(pred, target) / 6)
    torch.testing.assert_close(dpred, 2 * (pred - target) * weight[:, :, None, None] / (6 * 20))


@pytest.mark.parametrize("impl", ["reference", KERNEL])
@pytest.mark.parametrize("shape", [{"B": 0}, {"K": 0}, {"T": 0}, {"A": 0}], ids=str)
@pytest.mark.parametrize("mask", [0, 2, 3])
def test_empty_axes(impl, shape, mask):
    pred, target = tensors(**shape, dtype=torch.float32, grad=True)
    B, K, T, _ = pred.shape
    options = {"mask": torch.ones((B, T) if mask == 2 else (B, K, T), dtype=torch.bool, device=DEVICE)} if mask else {}
    loss = denoising_loss(pred, target, impl=impl, **options)
    assert torch.equal(loss, torch.zeros(B, K, device=DEVICE))
    assert torch.autograd.grad(loss.sum(), pred)[0].shape == pred.shape


@pytest.mark.parametrize("mask", [0, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind, mask):
    pred, target = tensors(dtype=torch.float32, grad=True)
    arguments = (pred, target, options_of(0, mask).get("mask"), kind, 0.7, KERNEL)
    torch.library.opcheck(torch.ops.minidiff_fast.denoising_loss_fwd.default, arguments)


@pytest.mark.parametrize("impl", ["reference", KERNEL])
def test_compiles_without_graph_breaks(impl):
    pred, target = tensors(dtype=torch.float32, grad=True)
    options = options_of(2, 2)

    def run(pred, target, weight, mask):
        return denoising_loss(pred, target, weight=weight, mask=mask, reduction="mean", impl=impl)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for function in (run, compiled):
        loss = function(pred, target, options["weight"], options["mask"])
        gradient = torch.autograd.grad(loss, pred)[0]
        if function is run:
            expected = (loss, gradient)
    torch.testing.assert_close((loss, gradient), expected)


def test_autograd_keeps_the_inputs_and_one_number_a_sample():
    pred, target = tensors(dtype=torch.float32, grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        denoising_loss(pred, target, impl=KERNEL)
    inputs = {pred.data_ptr(), target.data_ptr()}
    assert sum(x.numel() for x in kept if x.data_ptr() not in inputs) == 2 * 3


def test_result_is_float32_at_least():
    for dtype, result in [
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ]:
        assert denoising_loss(*tensors(dtype=dtype)).dtype == result
    pred, target = tensors(dtype=torch.float16)
    torch.testing.assert_close(denoising_loss(pred, target.float(), impl=KERNEL), denoising_loss(pred, target.float()))


def test_error_texts():
    pred, target = tensors(dtype=torch.float32)
    for message, change in [
        (r"pred must be \[B, K, T, A\] = \[B, K, T, A\], got \[6, 4, 5\]", {"pred": pred.flatten(0, 1)}),
        (r"target must be \[B, K, T, A\] = \[2, 3, 4, 5\], got \[2, 1, 4, 5\] \(pred", {"target": target[:, :1]}),
        ("pred must be a floating-point tensor, got torch.int64", {"pred": pred.long()}),
        ("weight must be a floating-point tensor, got torch.int64", {"weight": torch.ones(2, dtype=torch.int64)}),
        (r"weight must be \[B\] = \[2\] or \[B, K\] = \[2, 3\], got \[3\]", {"weight": torch.ones(3, device=DEVICE)}),
        ("mask must be boolean .True = counts., got torch.float32", {"mask": torch.ones(2, 4, device=DEVICE)}),
        (
            r"mask must be \[B, T\] = \[2, 4\] or \[B, K, T\] = \[2, 3, 4\], got \[2, 3\]",
            {"mask": torch.ones(2, 3, dtype=torch.bool, device=DEVICE)},
        ),
        ("target must be on the device of pred", {"target": target.to("meta")}),
        ("kind must be one of mse, l1, huber, got 'l2'", {"kind": "l2"}),
        ("reduction must be one of sample, condition, mean, got 'sum'", {"reduction": "sum"}),
        ("delta must be above 0, got 0", {"delta": 0}),
    ]:
        with pytest.raises(InvalidArgument, match="denoising_loss: " + message) as caught:
            denoising_loss(**{"pred": pred, "target": target, **change})
        assert "\n" not in str(caught.value)
    with pytest.raises(BackendUnavailable, match="denoising_loss has no flash implementation"):
        denoising_loss(pred, target, impl="flash")
    assert torch.equal(denoising_loss_reference(pred, target), denoising_loss(pred, target, impl="reference"))
