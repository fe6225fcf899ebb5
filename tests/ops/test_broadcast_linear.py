"""The definition of broadcast linear, its checks, its schema and what autograd keeps of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from minidiff_fast.errors import BackendUnavailable, InvalidArgument
from minidiff_fast.ops import broadcast_linear, broadcast_linear_reference

KERNEL = "triton"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ACT = {None: lambda x: x, "silu": F.silu, "mish": F.mish}
FORMS = [(combine, activation) for combine in ("cat", "sum") for activation in (None, "silu", "mish")]


def tensors(B=2, K=3, middle=(4,), Cx=5, Cg=7, Co=6, combine="cat", dtype=torch.float64, grad=False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(B + 10 * K + 100 * Cx + 1000 * Co)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype).requires_grad_(grad)

    Cg = Cx if combine == "sum" else Cg
    width = Cx if combine == "sum" else Cx + Cg
    return [draw(B, K, *middle, Cx), draw(B, Cg), draw(Co, width), draw(Co)]


def repeated(x, g, weight, bias, activation, combine) -> Tensor:
    """The ordinary practice: g repeated for every sample and token."""
    g = g.reshape(g.shape[0], *[1] * (x.dim() - 2), g.shape[1]).expand(*x.shape[:-1], g.shape[1])
    return F.linear(ACT[activation](x + g if combine == "sum" else torch.cat([x, g], -1)), weight, bias)


@pytest.mark.parametrize("middle", [(), (4,), (2, 3)], ids=str)
@pytest.mark.parametrize(("combine", "activation"), FORMS)
def test_reference_is_a_linear_over_repeated_conditions(combine, activation, middle):
    inputs = tensors(combine=combine, middle=middle, grad=True)
    ours = broadcast_linear(*inputs, activation=activation, combine=combine)
    expected = repeated(*inputs, activation, combine)
    torch.testing.assert_close(ours, expected)
    weight = torch.linspace(-1, 1, ours.numel(), dtype=ours.dtype, device=DEVICE).view_as(ours)
    for a, b in zip(
        torch.autograd.grad((ours * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("combine", "activation"), FORMS)
def test_gradcheck(combine, activation):
    inputs = tensors(B=2, K=2, middle=(), Cx=3, Cg=2, Co=2, combine=combine, grad=True)

    def run(*leaves: Tensor) -> Tensor:
        return broadcast_linear(*leaves, activation=activation, combine=combine, impl="reference")

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("combine", ["cat", "sum"])
@pytest.mark.parametrize("impl", ["reference", KERNEL])
@pytest.mark.parametrize("shape", [{"B": 0}, {"K": 0}, {"middle": (0,)}, {"Cx": 0}, {"Cg": 0}, {"Co": 0}], ids=str)
def test_empty_axes(shape, impl, combine):
    inputs = tensors(**shape, combine=combine, dtype=torch.float32, grad=True)
    out = broadcast_linear(*inputs, activation="mish", combine=combine, impl=impl)
    expected = repeated(*inputs, "mish", combine)
    torch.testing.assert_close(out, expected)
    ours = torch.autograd.grad(out.sum(), inputs)
    for leaf, a, b in zip(inputs, ours, torch.autograd.grad(expected.sum(), inputs), strict=True):
        assert a.shape == leaf.shape
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("combine", ["cat", "sum"])
def test_opcheck(combine, bias):
    x, g, weight, b = tensors(combine=combine, dtype=torch.float32, grad=True)
    arguments = (x, g, weight, b if bias else None, "silu", combine, KERNEL)
    torch.library.opcheck(torch.ops.minidiff_fast.broadcast_linear_fwd.default, arguments)


@pytest.mark.parametrize("combine", ["cat", "sum"])
@pytest.mark.parametrize("impl", ["reference", KERNEL])
def test_compiles_without_graph_breaks(impl, combine):
    inputs = tensors(combine=combine, dtype=torch.float32, grad=True)

    def run(*leaves):
        return broadcast_linear(*leaves, activation="mish", combine=combine, impl=impl).square().sum()

    torch._dynamo.reset()
    eager = torch.autograd.grad(run(*inputs), inputs)
    compiled = torch.autograd.grad(torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", ["reference", KERNEL])
def test_compiles_once_for_changing_shapes(impl):
    frames = CompileCounter()

    def run(*leaves):
        return broadcast_linear(*leaves, activation="silu", impl=impl)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=frames)
    for B, K in [(2, 3), (3, 4), (5, 2), (4, 7)]:
        inputs = tensors(B=B, K=K, dtype=torch.float32)
        torch.testing.assert_close(compiled(*inputs), run(*inputs))
    assert frames.frame_count <= 2


@pytest.mark.parametrize("impl", ["reference", KERNEL])
def test_autocast_lowers_every_input(impl):
    """As a linear layer does: a 16-bit x may meet float32 parameters."""
    x, g, weight, bias = tensors(dtype=torch.float32)
    low = torch.float16 if DEVICE == "cuda" else torch.bfloat16
    with torch.autocast(DEVICE, dtype=low):
        out = broadcast_linear(x, g, weight, bias, impl=impl)
        mixed = broadcast_linear(x.to(low), g, weight, bias, impl=impl)
        assert broadcast_linear(*(x.double() for x in (x, g, weight, bias))).dtype == torch.float64
    assert out.dtype == mixed.dtype == low
    assert torch.equal(out, mixed)
    assert torch.equal(out, broadcast_linear(*(x.to(low) for x in (x, g, weight, bias)), impl=impl))


@pytest.mark.parametrize("combine", ["cat", "sum"])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 1), (1, 3)], ids=str)
def test_only_the_gradients_that_are_asked_for(wanted, combine, monkeypatch):
    from minidiff_fast.ops import _broadcast_linear_launch as launcher

    launched = []
    for name in ("_input_gradient", "_weight_gradient"):
        real = getattr(launcher, name)

        def spy(*args, _name=name, _real=real):
            launched.append(_name)
            return _real(*args)

        monkeypatch.setattr(launcher, name, spy)
    inputs = tensors(combine=combine, dtype=torch.float32, grad=True)
    out = broadcast_linear(*inputs, activation="mish", combine=combine, impl=KERNEL)
    every = torch.autograd.grad(out.sum(), inputs)
    launched.clear()
    some = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
    out = broadcast_linear(*some, activation="mish", combine=combine, impl=KERNEL)
    got = torch.autograd.grad(out.sum(), [some[i] for i in wanted])
    assert all(torch.equal(every[i], x) for i, x in zip(wanted, got, strict=True))
    if combine == "cat":
        expected = ["_input_gradient"] * ((0 in wanted) + (1 in wanted)) + ["_weight_gradient"] * (2 * (2 in wanted))
    else:
        expected = ["_input_gradient"] * (0 in wanted or 1 in wanted) + ["_weight_gradient"] * (2 in wanted)
    assert sorted(launched) == expected


def test_float32_products_follow_every_switch_of_torch():
    from minidiff_fast.ops._broadcast_linear_launch import _precision

    x = torch.zeros(1)
    matmul, before = torch.backends.cuda.matmul, torch.get_float32_matmul_precision()
    try:
        for switch, expected in [("highest", "ieee"), ("high", "tf32")]:
            torch.set_float32_matmul_precision(switch)
            assert _precision(x) == expected and _precision(x.half()) == "ieee"
        matmul.fp32_precision = "ieee"
        assert _precision(x) == "ieee"
        matmul.fp32_precision = "tf32"
        assert _precision(x) == "tf32"
    finally:
        matmul.fp32_precision = "none"
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("combine", ["cat", "sum"])
def test_autograd_saves_the_inputs_and_nothing_else(combine):
    """Neither the activated input nor anything per sample that belongs to the condition."""
    inputs = tensors(B=2, K=50, combine=combine, dtype=torch.float32, grad=True)
    saved = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        broadcast_linear(*inputs, activation="mish", combine=combine, impl=KERNEL)
    assert set(saved) == {x.untyped_storage().data_ptr() for x in inputs[:3]}


def test_the_reference_repeats_no_condition():
    """In the form cat nothing of the width of g has K copies: the largest tensors made are act(x) and y."""
    B, K, Cx, Cg, Co = 2, 50, 3, 1000, 4
    inputs = tensors(B=B, K=K, middle=(), Cx=Cx, Cg=Cg, Co=Co, dtype=torch.float32, grad=True)
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, Tensor))
            return out

    with Sizes():
        out = broadcast_linear_reference(*inputs, activation="silu")
        torch.autograd.grad(out.sum(), inputs)
    weight = Co * (Cx + Cg)
    assert max(sizes) <= max(B * K * Co, B * K * Cx, B * Cg, weight)


def test_sizes_that_the_kernels_cannot_count_are_refused():
    x = torch.empty(1, 1, 1, dtype=torch.float32, device=DEVICE).expand(1 << 16, 1 << 15, 1)
    g, weight = torch.empty(1 << 16, 1, device=DEVICE), torch.empty(1, 2, device=DEVICE)
    with pytest.raises(InvalidArgument, match="2147483648 rows .* must stay below"):
        broadcast_linear(x, g, weight, impl=KERNEL)


BAD = {
    "x rank": (lambda x, g, w, b: (x[0, 0], g, w, b), {}, r"x must be \[B, K, ..., Cx\], got \[4, 5\]"),
    "g batch": (lambda x, g, w, b: (x, g[:1], w, b), {}, r"g must be \[B, Cg\] = \[2, Cg\], got \[1, 7\]"),
    "g per sample": (lambda x, g, w, b: (x, g[:, None], w, b), {}, r"g must be \[B, Cg\] = \[2, Cg\], got \[2, 1, 7\]"),
    "weight": (lambda x, g, w, b: (x, g, w[:, 1:], b), {}, r"weight must be \[Co, Cx \+ Cg\] = \[Co, 12\], got \[6, 11\]"),
    "sum g": (lambda x, g, w, b: (x, g, w, b), {"combine": "sum"}, r"g must be \[B, C\] = \[2, 5\], got \[2, 7\]"),
    "sum weight": (lambda x, g, w, b: (x, g[:, :5], w, b), {"combine": "sum"}, r"weight must be \[Co, C\] = \[Co, 5\]"),
    "bias": (lambda x, g, w, b: (x, g, w, b[1:]), {}, r"bias must be \[Co\] = \[6\], got \[5\]"),
    "dtype": (lambda x, g, w, b: (x, g.half(), w, b), {}, "g must have the dtype of x, torch.float32, got torch.float16"),
    "integers": (lambda x, g, w, b: (x.long(), g.long(), w.long(), b.long()), {}, "x must be a floating-point tensor"),
    "device": (lambda x, g, w, b: (x, g.to("meta"), w, b), {}, r"g must be on the device of x, .*, got meta"),
    "activation": (lambda x, g, w, b: (x, g, w, b), {"activation": "relu"}, "activation must be None, 'silu' or 'mish', got 'relu'"),
    "combine": (lambda x, g, w, b: (x, g, w, b), {"combine": "add"}, "combine must be 'cat' or 'sum', got 'add'"),
    "impl": (lambda x, g, w, b: (x, g, w, b), {"impl": "cuda"}, "impl must be one of"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    build, options, message = BAD[name]
    with pytest.raises(InvalidArgument, match=message) as caught:
        broadcast_linear(*build(*tensors(dtype=torch.float32)), **options)
    assert "\n" not in str(caught.value)


def test_a_named_implementation_never_falls_back():
    inputs = tensors(dtype=torch.float32)
    with pytest.raises(BackendUnavailable, match="has no native implementation"):
        broadcast_linear(*inputs, impl="native")
    with pytest.raises(BackendUnavailable, match="float64"):
        broadcast_linear(*(x.double() for x in inputs), impl=KERNEL)
