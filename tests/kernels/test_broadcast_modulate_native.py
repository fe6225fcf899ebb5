"""The native CPU kernels against the float64 definition, forward and every gradient, within the error budget.

``err(kernel) <= 2 * (err(reference in the same dtype) + eps * max|ref|)``, both against float64.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from minidiff_fast import native
from minidiff_fast.errors import BackendUnavailable, InvalidArgument, NativeError
from minidiff_fast.ops import _broadcast_modulate_native as launching
from minidiff_fast.ops import broadcast_modulate
from minidiff_fast.ops._broadcast_modulate_op import broadcast_modulate_fwd

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no native library: {native.why_missing()}")

PARAMETERS = ("shift", "scale", "gate", "own_shift", "own_scale", "own_gate", "weight", "bias")
EVERYTHING = (*PARAMETERS, "residual")
UNET = {"norm": "group", "num_groups": 4, "activation": "mish", "channels_first": True}
DIT = {"norm": "layer", "form": "adaln", "eps": 1e-6}


@pytest.fixture(params=["auto", "portable"])
def simd(request, monkeypatch) -> str:
    """Both instruction sets; the choice is read at every call."""
    monkeypatch.setenv(native.SIMD, request.param)
    return request.param


@pytest.fixture
def threads():
    """Sets the number of threads; the old one comes back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def leaves_of(names, B, K, T, C, dtype=torch.float32, channels_first=False, seed=0) -> dict[str, Tensor]:
    """float64, rounded to ``dtype`` so that every implementation reads the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    x = (B, K, C, T) if channels_first else (B, K, T, C)
    shapes = dict.fromkeys(("x", "residual"), x) | dict.fromkeys(("shift", "scale", "gate"), (B, C))
    shapes |= dict.fromkeys(("own_shift", "own_scale", "own_gate"), (B, K, C)) | dict.fromkeys(("weight", "bias"), (C,))
    return {
        name: torch.randn(shapes[name], generator=generator, dtype=torch.float64).to(dtype).double()
        for name in ("x", *names)
    }


def evaluate(leaves, dtype, impl, options, dy=None) -> dict[str, Tensor]:
    """y and the gradient of every leaf."""
    leaves = {name: x.to(dtype).requires_grad_() for name, x in leaves.items()}
    y = broadcast_modulate(**leaves, **options, impl=impl)
    if dy is None:
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).bfloat16()
    gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y, **{f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}}


def check(names, B, K, T, C, options, dtype=torch.float32) -> None:
    leaves = leaves_of(names, B, K, T, C, dtype, options.get("channels_first", False))
    exact = evaluate(leaves, torch.float64, "reference", options)
    same = evaluate(leaves, dtype, "reference", options)
    ours = evaluate(leaves, dtype, "native", options)
    for name, want in exact.items():
        got, reference = ours[name], same[name]
        assert got.dtype == dtype and got.shape == want.shape
        assert torch.isfinite(got).all(), f"{name} is not finite"
        error = (got.double() - want).abs().max().item()
        reference_error = (reference.double() - want).abs().max().item()
        budget = 2 * (reference_error + torch.finfo(dtype).eps * want.abs().max().item())
        assert error <= budget, f"{name}: error {error:.3e} over the budget {budget:.3e}"


CLASSES = list(
    itertools.product(
        (None, "layer", "rms", "group"), (None, "silu", "mish"), ("norm", "output"), ("film", "adaln"), (False, True)
    )
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("names", [EVERYTHING, ("shift", "scale", "weight", "bias")], ids=["everything", "condition"])
def test_every_class(names, dtype, simd):
    """All combinations of norm, activation, its place, form and layout, at sizes with a tail in every loop."""
    for i, (norm, activation, place, form, first) in enumerate(CLASSES):
        options = {"norm": norm, "activation": activation, "activation_at": place, "form": form}
        options |= {"channels_first": first, "num_groups": 4 if norm == "group" else None}
        B, K, T, C = [(2, 3, 5, 12), (1, 17, 4, 44), (2, 2, 7, 20)][i % 3]
        check(names, B, K, T, C, options, dtype)


SIZES = [
    # names, B, K, T, C, options: ones, primes, one off the vector, several blocks, runs and levels of sums
    (EVERYTHING, 1, 1, 1, 1, {**DIT, "eps": 0.1}),
    (EVERYTHING, 3, 5, 1, 17, DIT),
    (("shift", "own_scale"), 1, 2, 3, 513, DIT),
    (("scale", "shift"), 2, 33, 67, 31, DIT),
    (("gate", "weight"), 1, 3, 129, 9, {"norm": "rms", "channels_first": True}),
    (EVERYTHING, 1, 67, 1, 24, {"activation": "silu", "activation_at": "output"}),
    (EVERYTHING, 1, 3, 4, 700, {"activation": "mish", "channels_first": True}),
    (("bias",), 2, 2, 1500, 3, {"activation": "mish", "channels_first": True}),
    (("own_gate",), 1, 1, 1, 2100, {"channels_first": True}),
    ((), 2, 3, 5, 7, {}),
    (EVERYTHING, 2, 5, 1, 72, UNET),
    (EVERYTHING, 2, 3, 2, 140, UNET),
    (EVERYTHING, 1, 3, 3, 72, UNET),
    (EVERYTHING, 1, 18, 4, 136, UNET),
    (("scale", "shift", "weight", "bias"), 1, 37, 8, 64, UNET),
    (("scale", "own_scale"), 2, 3, 9, 36, UNET),
    (("own_shift", "gate"), 1, 2, 16, 64, UNET),
    (("own_shift", "residual", "weight"), 1, 2, 23, 20, UNET),
    (EVERYTHING, 1, 3, 67, 20, {**UNET, "channels_first": False}),
    (("scale", "bias"), 2, 20, 5, 52, {**UNET, "channels_first": False}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SIZES, ids=lambda case: f"{len(case[0])}-{case[1:5]}-{case[5].get('norm')}")
def test_sizes(case, dtype, simd):
    check(*case, dtype=dtype)


@pytest.mark.parametrize("activation", ["silu", "mish"])
def test_activations_over_the_whole_range(activation, simd):
    """To three units in the last place of themselves, their derivatives, which cross 0, of their terms; nothing
    overflows on the way."""
    size = torch.cat([torch.logspace(-30, 4, 4001), torch.linspace(0, 90, 4001)])
    x = torch.cat([size, -size, torch.tensor([0.0, 20.0, -20.0, 1e4, -1e4, 88.0, -87.5, 1e30, -1e30])])
    leaf, exact = x[None, None, None].requires_grad_(), x.double().requires_grad_()
    y = broadcast_modulate(leaf, activation=activation, impl="native")
    want = getattr(torch.nn.functional, activation)(exact)
    (dx,) = torch.autograd.grad(y.sum(), leaf)
    (dwant,) = torch.autograd.grad(want.sum(), exact)
    tiny = 1e-32  # below, subnormal weights count as 0
    ulp = torch.finfo(torch.float32).eps
    assert ((y[0, 0, 0] - want).abs() <= 3 * ulp * want.abs() + tiny).all()
    terms = torch.sigmoid(exact) * (1 + exact.abs())
    assert ((dx[0, 0, 0] - dwant).abs() <= 3 * ulp * terms + tiny).all()
    special = torch.tensor([math.nan, math.inf])[None, None, None]
    y = broadcast_modulate(special, activation=activation, impl="native")
    assert torch.isnan(y[..., 0]) and y[..., 1] == math.inf


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_a_large_mean_does_not_drown_the_variance(norm, simd):
    options = {"norm": norm, "num_groups": 2 if norm == "group" else None, "eps": 1e-6}
    leaves = leaves_of((), 2, 3, 4, 40)
    leaves["x"] = (1000 + leaves["x"]).float().double()
    exact, ours = (
        evaluate(leaves, dtype, impl, options)["y"]
        for dtype, impl in ((torch.float64, "reference"), (torch.float32, "native"))
    )
    assert (ours - exact).abs().max() < 1e-3


CASES = [
    (EVERYTHING, 3, 21, 5, 24, UNET),
    (EVERYTHING, 1, 7, 5, 24, DIT),
    (("scale", "shift", "weight", "bias"), 1, 40, 4, 40, {"norm": "rms", "activation": "silu"}),
]


@pytest.mark.parametrize("case", CASES, ids=["unet", "dit", "one-condition"])
def test_results_are_the_same_bits_for_any_number_of_threads(case, simd, threads):
    names, B, K, T, C, options = case
    leaves = leaves_of(names, B, K, T, C, channels_first=options.get("channels_first", False))
    threads(1)
    first = evaluate(leaves, torch.float32, "native", options)
    for count in (1, 2, 3):
        threads(count)
        again = evaluate(leaves, torch.float32, "native", options)
        assert all(torch.equal(first[name], again[name]) for name in first), count


@pytest.mark.parametrize("empty", ["B", "K", "T"])
@pytest.mark.parametrize(
    "options", [UNET, DIT, {"activation": "silu", "channels_first": True}], ids=["unet", "dit", "plain"]
)
def test_empty_axes(options, empty, simd):
    sizes = {"B": 2, "K": 3, "T": 5, "C": 8, empty: 0}
    leaves = leaves_of(EVERYTHING, **sizes, channels_first=options.get("channels_first", False))
    ours = evaluate(leaves, torch.float32, "native", options)
    for name, leaf in leaves.items():
        assert ours[f"d{name}"].shape == leaf.shape
        assert (ours[f"d{name}"] == 0).all()


@pytest.mark.parametrize("options", [UNET, DIT, {**UNET, "activation_at": "output"}], ids=["unet", "dit", "output"])
def test_each_gradient_alone(options, simd):
    """What is computed for one gradient does not depend on which others are wanted."""
    leaves = {
        n: x.float() for n, x in leaves_of(EVERYTHING, 2, 3, 5, 12, channels_first="channels_first" in options).items()
    }
    full = evaluate(leaves, torch.float32, "native", options, dy=torch.ones(leaves["x"].shape))
    for name in leaves:
        one = {n: x.detach().requires_grad_(n == name) for n, x in leaves.items()}
        y = broadcast_modulate(**one, **options, impl="native")
        (gradient,) = torch.autograd.grad(y, one[name], torch.ones_like(y))
        assert torch.equal(gradient, full[f"d{name}"]), name


def test_strided_and_expanded_inputs(simd):
    for options in (UNET, DIT):
        first = "channels_first" in options
        leaves = {n: x.float() for n, x in leaves_of(EVERYTHING, 2, 3, 5, 12, channels_first=first).items()}
        expected = evaluate(leaves, torch.float32, "native", options)
        for name, x in leaves.items():
            strided = torch.stack([x, torch.full_like(x, math.nan)], -1)[..., 0]
            turned = x.movedim(-1, 0).contiguous().movedim(0, -1)
            for view in (strided, turned):
                again = evaluate({**leaves, name: view}, torch.float32, "native", options)
                assert all(torch.equal(expected[each], again[each]) for each in expected), name
        ones = torch.ones(1).expand(leaves["x"].shape)
        expanded, dense = (evaluate(leaves, torch.float32, "native", options, dy) for dy in (ones, ones.contiguous()))
        assert all(torch.equal(expanded[each], dense[each]) for each in expanded)


@pytest.mark.parametrize("options", [UNET, DIT], ids=["unet", "dit"])
def test_every_parameter_has_a_dtype_of_its_own(options):
    dtypes = [torch.float16, torch.float32, torch.bfloat16, torch.float64]
    leaves = leaves_of(EVERYTHING, 1, 3, 4, 8, torch.bfloat16, "channels_first" in options)
    mixed = {
        n: x.to(torch.bfloat16 if n in ("x", "residual") else dtypes[i % 4]).requires_grad_()
        for i, (n, x) in enumerate(leaves.items())
    }
    y = broadcast_modulate(**mixed, **options, impl="native")
    assert y.dtype == torch.bfloat16
    plain = {
        n: x.to(torch.bfloat16 if n in ("x", "residual") else torch.float32).requires_grad_() for n, x in leaves.items()
    }
    expected = broadcast_modulate(**plain, **options, impl="native")
    assert torch.equal(y, expected)
    gradients = torch.autograd.grad(y.float().square().sum(), list(mixed.values()))
    for (name, leaf), gradient, want in zip(
        mixed.items(),
        gradients,
        torch.autograd.grad(expected.float().square().sum(), list(plain.values())),
        strict=True,
    ):
        assert gradient.dtype == leaf.dtype
        assert torch.equal(gradient, want.to(leaf.dtype)), name


def test_every_element_of_every_output_is_written(monkeypatch, simd):
    """Outputs start as NaN instead of whatever memory held; nothing may be left of it."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(math.nan))
    monkeypatch.setattr(torch, "empty_like", lambda x: empty(x.shape, dtype=x.dtype).fill_(math.nan))
    for options in (UNET, DIT, {"activation": "mish"}, {"norm": "rms", "channels_first": True}):
        leaves = leaves_of(EVERYTHING, 2, 19, 5, 12, channels_first=options.get("channels_first", False))
        for result in evaluate(leaves, torch.float32, "native", options).values():
            assert not torch.isnan(result).any()


@pytest.mark.parametrize("options", [UNET, {**UNET, "activation_at": "output"}, DIT], ids=["unet", "output", "dit"])
def test_autograd_keeps_x_statistics_and_parameters(options):
    leaves = leaves_of(EVERYTHING, 2, 3, 16, 24, channels_first="channels_first" in options)
    leaves = {name: x.float().requires_grad_() for name, x in leaves.items()}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        broadcast_modulate(**leaves, **options, impl="native")
    known = {leaf.data_ptr() for name, leaf in leaves.items() if name != "residual"}
    statistics = [t for t in kept if t.data_ptr() not in known]
    assert all(t.numel() <= 2 * 3 * 16 for t in statistics)
    assert len([t for t in kept if t.numel() >= leaves["x"].numel()]) == 1


@pytest.mark.parametrize("options", [UNET, DIT, {}], ids=["unet", "dit", "plain"])
def test_opcheck(options):
    leaves = leaves_of(PARAMETERS, 2, 3, 4, 8, channels_first="channels_first" in options)
    x, *parameters = (leaf.float().requires_grad_() for leaf in leaves.values())
    arguments = (
        x, *parameters[:6], None, *parameters[6:], options.get("norm", ""), options.get("num_groups", 0), 1e-5,
        options.get("activation", ""), "norm", options.get("form", "film"), "channels_first" in options, "native",
    )  # fmt: skip
    torch.library.opcheck(torch.ops.minidiff_fast.broadcast_modulate_fwd.default, arguments)
    assert broadcast_modulate_fwd(*arguments)[0].shape == x.shape


def test_compiles_without_graph_breaks():
    leaves = {n: x.float().requires_grad_() for n, x in leaves_of(EVERYTHING, 2, 3, 4, 8, channels_first=True).items()}

    def run(leaves: dict[str, Tensor]) -> Tensor:
        return broadcast_modulate(**leaves, **UNET, impl="native").square().sum()

    torch._dynamo.reset()
    inputs = list(leaves.values())
    eager = torch.autograd.grad(run(leaves), inputs)
    compiled = torch.autograd.grad(torch.compile(run, fullgraph=True, backend="aot_eager")(leaves), inputs)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)


def test_what_cannot_run_says_so(monkeypatch):
    x = torch.randn(1, 2, 3, 4)
    with pytest.raises(BackendUnavailable, match=r"float32 and bfloat16, not torch\.float16"):
        broadcast_modulate(x.half(), impl="native")
    options = launching._options(x, "", 0, 1e-5, "", "norm", "film", False)
    with pytest.raises(NativeError, match="native forward kernel returned -1"):
        launching._call("forward", {"x": x, "y": torch.empty_like(x)}, {**options, "sample_run": 0})
    monkeypatch.setenv(native.SIMD, "fastest")
    with pytest.raises(InvalidArgument, match="must be auto or portable, got 'fastest'"):
        broadcast_modulate(x, impl="native")
