"""token_conv against torch's own convolutions: values, gradients, memory, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.nn.token_conv import token_conv1d, token_conv_transpose1d

CONVS = [  # N, T, C, Co, k, stride, padding
    (3, 16, 4, 5, 3, 1, 1),
    (2, 8, 3, 7, 5, 1, 2),
    (1, 4, 2, 2, 5, 1, 2),
    (2, 1, 3, 2, 3, 1, 1),
    (2, 7, 3, 4, 1, 1, 0),
    (2, 7, 3, 4, 1, 2, 0),
    (3, 16, 4, 5, 3, 2, 1),
    (2, 5, 1, 1, 3, 2, 1),
    (2, 11, 3, 2, 4, 3, 2),
    (0, 8, 3, 2, 3, 1, 1),
]
TRANSPOSED = [
    (3, 4, 4, 5, 4, 2, 1),
    (2, 1, 3, 2, 4, 2, 1),
    (2, 5, 2, 3, 3, 1, 1),
    (1, 3, 2, 2, 5, 3, 0),
]
FORMS = [(token_conv1d, F.conv1d, case) for case in CONVS] + [
    (token_conv_transpose1d, F.conv_transpose1d, case) for case in TRANSPOSED
]


def tensors(form, case, dtype=torch.float64, device="cpu"):
    rows, tokens, channels, outputs, k, _, _ = case
    shape = (outputs, channels, k) if form is token_conv1d else (channels, outputs, k)
    generator = torch.Generator().manual_seed(0)
    made = [
        torch.randn(s, generator=generator, dtype=torch.float64) for s in ((rows, tokens, channels), shape, (outputs,))
    ]
    return [t.to(device, dtype).requires_grad_() for t in made]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("form", "torch_form", "case"), FORMS)
def test_values_and_gradients_are_those_of_torch(form, torch_form, case, bias):
    x, w, b = tensors(form, case)
    inputs = (x, w, b) if bias else (x, w)
    options = dict(stride=case[5], padding=case[6])
    want = torch_form(x.transpose(1, 2), *inputs[1:], **options).transpose(1, 2)
    got = form(x, *inputs[1:], **options)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(want)
    for ours, theirs in zip(
        torch.autograd.grad(got, inputs, cotangent), torch.autograd.grad(want, inputs, cotangent), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("form", "torch_form", "case"), [FORMS[0], FORMS[6], FORMS[-4]])
def test_float32_error_budget(form, torch_form, case):
    rows, tokens, _, _, *rest = case
    case = (rows, tokens, 64, 48, *rest)
    exact = tensors(form, case)
    single = tensors(form, case, torch.float32)
    options = dict(stride=case[5], padding=case[6])
    want = torch_form(exact[0].transpose(1, 2), *exact[1:], **options).transpose(1, 2)
    theirs = torch_form(single[0].transpose(1, 2), *single[1:], **options).transpose(1, 2)
    ours = form(*single, **options)
    eps = torch.finfo(torch.float32).eps

    def within(ours, theirs, want):
        error, budget = (ours - want).abs().max(), (theirs - want).abs().max() + eps * want.abs().max()
        assert error <= 2 * budget, f"{error} > 2 * {budget}"

    within(ours, theirs, want)
    cotangent = torch.randn_like(want)
    wanted = torch.autograd.grad(want, exact, cotangent)
    for g, t, w in zip(
        torch.autograd.grad(ours, single, cotangent.float()),
        torch.autograd.grad(theirs, single, cotangent.float()),
        wanted,
        strict=True,
    ):
        within(g, t, w)


@pytest.mark.parametrize(("form", "case"), [(f, c) for f, _, c in (FORMS[1], FORMS[6], FORMS[-4])])
def test_first_and_second_derivatives(form, case):
    def run(*inputs):
        return form(*inputs, stride=case[5], padding=case[6])

    inputs = tensors(form, case)
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_strided_inputs_and_only_what_is_asked_for():
    x = torch.randn(8, 2, 3).transpose(0, 1)
    w = torch.randn(3, 4, 3).transpose(0, 1).requires_grad_()
    y = token_conv1d(x, w, padding=1)
    torch.testing.assert_close(y, F.conv1d(x.transpose(1, 2), w, padding=1).transpose(1, 2))
    y.sum().backward()
    assert w.grad is not None and x.grad is None


def test_autograd_keeps_no_taps():
    x, w = torch.randn(4, 16, 32, requires_grad=True), torch.randn(32, 32, 5, requires_grad=True)
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = token_conv1d(x, w, padding=2)
    del y
    assert sum(kept.values()) == 4 * (x.numel() + w.numel())


def test_autocast_takes_its_dtype():
    x, w, b = tensors(token_conv1d, CONVS[0], torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = token_conv1d(x, w, b, padding=1)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert w.grad.dtype == torch.float32


def test_compiles_as_one_graph():
    x, w, b = tensors(token_conv1d, CONVS[6], torch.float32)

    def run(x, w, b):
        return token_conv1d(x, w, b, stride=2, padding=1).square().sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(run(x, w, b), (x, w, b))
    torch.testing.assert_close(torch.autograd.grad(compiled(x, w, b), (x, w, b)), want)


def test_errors_name_the_argument():
    x, w = torch.zeros(2, 8, 3), torch.zeros(5, 3, 3)
    with pytest.raises(
        InvalidArgument, match=r"token_conv1d: weight must be \[Co, C, k\] = \[Co, 4, k\], got \[5, 3, 3\]"
    ):
        token_conv1d(torch.zeros(2, 8, 4), w)
    with pytest.raises(InvalidArgument, match=r"bias must be \[Co\] = \[5\], got \[3\]"):
        token_conv1d(x, w, torch.zeros(3))
    with pytest.raises(InvalidArgument, match=r"x must be \[N, T, C\]"):
        token_conv1d(x[0], w)
    with pytest.raises(InvalidArgument, match="T \\+ 2 padding >= k = 3, got T = 2"):
        token_conv1d(x[:, :2], w)
    with pytest.raises(InvalidArgument, match="stride >= 1"):
        token_conv1d(x, w, stride=0)
    with pytest.raises(InvalidArgument, match=r"weight must be \[C, Co, k\] = \[3, Co, k\], got \[5, 3, 3\]"):
        token_conv_transpose1d(x, w)
    with pytest.raises(InvalidArgument, match="at least one token"):
        token_conv_transpose1d(x[:, :1], w.transpose(0, 1), padding=2)
