"""The Triton kernels against the float64 definition, forward and every gradient, within the error budget.

``err(kernel) <= 2 * (err(reference in the same dtype) + eps * max|ref|)``, both against float64. Runs on the GPU
where there is one, else in Triton's interpreter.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minidiff_fast.ops import broadcast_modulate

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
HALF = [torch.float16, torch.bfloat16] if CUDA else [torch.float16]
SHARED, OWN, AFFINE = ("shift", "scale", "gate"), ("own_shift", "own_scale", "own_gate"), ("weight", "bias")
EVERYTHING = (*SHARED, *OWN, "residual", *AFFINE)

DIT = {"norm": "layer", "form": "adaln", "eps": 1e-6}
RMS = {"norm": "rms", "form": "adaln"}
UNET = {"norm": "group", "num_groups": 2, "activation": "mish", "channels_first": True}
GROUP_LAST = {"norm": "group", "num_groups": 3, "activation": "silu", "activation_at": "output", "form": "adaln"}
SUM = {"activation": "silu", "activation_at": "output"}


def leaves_of(names, B, K, T, C, dtype=torch.float32, channels_first=False) -> dict[str, Tensor]:
    """float64, rounded to ``dtype`` so that every implementation reads the same numbers."""
    generator = torch.Generator().manual_seed(hash((B, K, T, C)) % 2**31)
    x = (B, K, C, T) if channels_first else (B, K, T, C)
    shapes = {
        "x": x, "residual": x, **dict.fromkeys(SHARED, (B, C)), **dict.fromkeys(OWN, (B, K, C)),
        **dict.fromkeys(AFFINE, (C,)),
    }  # fmt: skip
    return {
        name: torch.randn(shapes[name], generator=generator, dtype=torch.float64).to(dtype).double().to(DEVICE)
        for name in ("x", *names)
    }


def evaluate(leaves, dtype, impl, options, dtypes=None) -> dict[str, Tensor]:
    """y and the gradient of every leaf; ``dtypes``: of parameters that differ from x."""
    dtypes = {} if dtype == torch.float64 else dtypes or {}
    leaves = {name: x.to(dtypes.get(name, dtype)).requires_grad_() for name, x in leaves.items()}
    y = broadcast_modulate(**leaves, **options, impl=impl)
    generator = torch.Generator().manual_seed(7)
    dy = torch.randn(y.shape, generator=generator).half().to(DEVICE)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y, **{f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}}


def within_budget(exact, same, ours) -> None:
    for name, want in exact.items():
        got, reference = ours[name], same[name]
        assert got.dtype == reference.dtype and got.shape == want.shape
        assert torch.isfinite(got).all(), f"{name} is not finite"
        error = (got.double() - want).abs().max().item()
        reference_error = (reference.double() - want).abs().max().item()
        budget = 2 * (reference_error + torch.finfo(got.dtype).eps * want.abs().max().item())
        assert error <= budget, f"{name}: error {error:.3e} over the budget {budget:.3e}"


def check(names, B, K, T, C, options, dtype=torch.float32, dtypes=None) -> None:
    leaves = leaves_of(names, B, K, T, C, dtype, options.get("channels_first", False))
    exact = evaluate(leaves, torch.float64, "reference", options)
    same = evaluate(leaves, dtype, "reference", options, dtypes)
    within_budget(exact, same, evaluate(leaves, dtype, "triton", options, dtypes))


SIZES = [
    # names, B, K, T, C, options: ones, primes, powers of two and one off them; one tile, several, loops
    (EVERYTHING, 1, 1, 1, 1, {**DIT, "eps": 0.1}),
    (EVERYTHING, 2, 5, 3, 17, DIT),
    ((*SHARED, "residual"), 1, 5, 7, 63, DIT),
    ((*OWN, *AFFINE), 2, 1, 5, 65, DIT),
    (("shift", "own_scale"), 1, 2, 2, 2047, DIT),
    ((*SHARED, "own_shift"), 1, 2, 3, 2049, DIT),
    (EVERYTHING, 1, 2, 2, 4097, RMS),
    (EVERYTHING, 1, 3, 129, 31, RMS),
    (("own_shift", "bias"), 1, 1, 67, 1024, RMS),
    (EVERYTHING, 1, 67, 1, 72, SUM),
    ((), 2, 3, 5, 7, {}),
    (AFFINE, 2, 3, 5, 7, {"activation": "mish"}),
    (("shift", "own_shift", "scale"), 1, 3, 7, 130, {**SUM, "channels_first": True, "form": "adaln"}),
    (EVERYTHING, 1, 5, 3, 24, {**DIT, "channels_first": True}),
    (EVERYTHING, 2, 3, 5, 12, UNET),
    (("scale", "shift", *AFFINE), 1, 1, 16, 64, UNET),
    (("scale", "own_scale"), 1, 3, 1, 6, UNET),
    (EVERYTHING, 1, 5, 5, 12, GROUP_LAST),
    ((*SHARED, *AFFINE), 1, 1, 67, 260, {**UNET, "activation": "silu"}),
    (("own_gate", "scale", "weight"), 1, 1, 129, 129, GROUP_LAST),
]


def _name(case) -> str:
    return f"{len(case[0])}-{case[1:5]}-{case[5].get('norm')}"


@pytest.mark.parametrize("case", SIZES, ids=_name)
def test_sizes(case):
    check(*case)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", SIZES if CUDA else SIZES[1:-2:3], ids=_name)
def test_sizes_in_16_bits(case, dtype):
    check(*case, dtype=dtype)


@pytest.mark.parametrize("options", [DIT, UNET], ids=["dit", "unet"])
def test_every_parameter_has_a_dtype_of_its_own(options):
    dtypes = {
        "shift": torch.float16, "scale": torch.float32, "gate": torch.bfloat16, "own_shift": torch.float32,
        "own_scale": torch.float16, "own_gate": torch.float64, "weight": torch.float64, "bias": torch.bfloat16,
    }  # fmt: skip
    leaves = leaves_of(EVERYTHING, 1, 3, 4, 8, torch.bfloat16, options.get("channels_first", False))
    exact = evaluate(leaves, torch.float64, "reference", options)
    for dtype in (torch.float32, torch.float16):
        leaves["x"] = leaves["x"].half().double()
        same = evaluate(leaves, dtype, "reference", options, dtypes)
        ours = evaluate(leaves, dtype, "triton", options, dtypes)
        for name in ("down_gate", "dweight"):  # summed in float32, whatever they are stored in
            exact[name] = exact[name] if dtype == torch.float32 else same[name].double()
            same[name], ours[name] = same[name].float(), ours[name].float()
        within_budget(exact, same, ours)


# -------------------------------------------------------------------- the modules of torch, composed by hand


@pytest.mark.parametrize("K", [1, 5])
@pytest.mark.parametrize("kind", ["layer", "rms", "group"])
def test_against_the_modules_of_torch(kind, K):
    """norm, Mish, FiLM out of nn modules on conditions that are copied per sample, in float64."""
    B, T, C = 2, 4, 16
    a = leaves_of(("shift", "scale", "own_shift", *AFFINE), B, K, T, C, channels_first=kind == "group")
    module: nn.Module = {"layer": nn.LayerNorm(C), "rms": nn.RMSNorm(C, eps=1e-5), "group": nn.GroupNorm(2, C)}[kind]
    module = module.to(DEVICE, torch.float64)
    module.weight.data = a["weight"].clone()
    if kind != "rms":
        module.bias.data = a["bias"].clone()
    else:
        del a["bias"]

    leaves = {name: x.requires_grad_() for name, x in a.items()}
    middle = (slice(None), slice(None), None) if kind == "group" else (slice(None), None)

    def copied(name: str) -> Tensor:
        x = leaves[name].repeat_interleave(K, 0) if name in SHARED else leaves[name].flatten(0, 1)
        return x[middle]

    n = F.mish(module(leaves["x"].flatten(0, 1)))
    expected = (copied("scale") * n + copied("shift") + copied("own_shift")).unflatten(0, (B, K))
    generator = torch.Generator().manual_seed(7)
    dy = torch.randn(expected.shape, generator=generator).half().to(DEVICE, torch.float64)
    inputs = [leaves[name] for name in leaves if name not in AFFINE] + [*module.parameters()]
    names = [name for name in leaves if name not in AFFINE] + [name for name, _ in module.named_parameters()]
    exact = {
        "y": expected,
        **dict(zip([f"d{n}" for n in names], torch.autograd.grad(expected, inputs, dy), strict=True)),
    }
    options = {"norm": kind, "activation": "mish", "channels_first": kind == "group"}
    options |= {"num_groups": 2} if kind == "group" else {}
    plain = {name: x.detach() for name, x in a.items()}
    same = evaluate(plain, torch.float32, "reference", options)
    ours = evaluate(plain, torch.float32, "triton", options)
    within_budget(exact, same, ours)


# ------------------------------------------------------------------------------------------ strides, writing


def _variants(x: Tensor) -> list[Tensor]:
    """The same numbers under other strides: transposed storage, a slice of a larger tensor."""
    transposed = x.transpose(0, -1).contiguous().transpose(0, -1)
    padded = x.new_full((*x.shape[:-1], x.shape[-1] + 3), math.nan)
    padded[..., 1:-2] = x
    return [transposed, padded[..., 1:-2]]


@pytest.mark.parametrize("options", [DIT, UNET], ids=["dit", "unet"])
def test_strided_inputs(options):
    leaves = leaves_of(EVERYTHING, 2, 1, 4, 8, channels_first=options.get("channels_first", False))
    leaves = {name: x.float() for name, x in leaves.items()}
    expected = broadcast_modulate(**leaves, **options, impl="triton")
    for name in ("x", "residual", "shift", "own_scale"):
        for variant in _variants(leaves[name]):
            assert not variant.is_contiguous()
            assert torch.equal(broadcast_modulate(**{**leaves, name: variant}, **options, impl="triton"), expected)


@pytest.mark.parametrize("options", [DIT, UNET], ids=["dit", "unet"])
def test_chunks_of_one_projection(options):
    """shift, scale and gate as views into one Linear's output, own parts expanded over K: read where they are."""
    leaves = leaves_of(EVERYTHING, 2, 3, 4, 8, channels_first=options.get("channels_first", False))
    joined = torch.cat([leaves[name] for name in SHARED], -1).requires_grad_()
    one = leaves["own_shift"][:, :1].clone().requires_grad_()

    def run(dtype, impl):
        parts = dict(zip(SHARED, joined.to(dtype).chunk(3, -1), strict=True))
        own = {"own_shift": one.to(dtype).expand(-1, 3, -1)}
        y = broadcast_modulate(leaves["x"].to(dtype), **parts, **own, **options, impl=impl)
        return dict(zip(("y", "djoined", "done"), (y, *torch.autograd.grad(y.sum(), (joined, one))), strict=True))

    exact, ours = run(torch.float64, "reference"), run(torch.float32, "triton")
    for name, want in exact.items():
        torch.testing.assert_close(ours[name].double(), want.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [DIT, UNET, SUM], ids=["dit", "unet", "sum"])
def test_expanded_x_and_gradient(options):
    """x expanded over B and K, and the gradient of a sum, which has no strides at all."""
    a = leaves_of(("shift", "own_scale", "weight"), 2, 2, 4, 8, channels_first=options.get("channels_first", False))
    a = {name: x.float() for name, x in a.items()}
    expanded = a["x"][:1, :1].expand_as(a["x"])
    results = []
    for x in (expanded, expanded.contiguous()):
        leaves = [x.detach().requires_grad_(), *(a[n].requires_grad_() for n in ("shift", "own_scale", "weight"))]
        y = broadcast_modulate(
            leaves[0], shift=leaves[1], own_scale=leaves[2], weight=leaves[3], **options, impl="triton"
        )
        grown = torch.ones(1, 1, 1, 1, device=DEVICE).expand_as(y)
        results.append([y, *torch.autograd.grad(y, leaves, grown if x is expanded else grown.contiguous())])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.parametrize("options", [DIT, UNET, GROUP_LAST, SUM], ids=["dit", "unet", "group-last", "sum"])
def test_every_element_of_every_output_is_written(options, monkeypatch):
    """Outputs start as NaN instead of whatever memory held; nothing may be left of it."""
    real = torch.empty

    def poisoned(*args, **kwargs):
        made = real(*args, **kwargs)
        return made.fill_(math.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)
    leaves = leaves_of(EVERYTHING, 1, 3, 5, 30, channels_first=options.get("channels_first", False))
    for name, result in evaluate(leaves, torch.float32, "triton", options).items():
        assert not torch.isnan(result).any(), name


def test_poisoned_outputs_where_the_norm_spans_several_tiles(monkeypatch):
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: real(*a, **k).fill_(math.nan))
    for names, shape, options in [(SHARED, (1, 1, 2, 4100), DIT), (OWN, (1, 1, 66, 130), UNET)]:
        leaves = leaves_of(names, *shape, channels_first=options.get("channels_first", False))
        for name, result in evaluate(leaves, torch.float32, "triton", options).items():
            assert not torch.isnan(result).any(), name


@pytest.mark.parametrize("options", [DIT, UNET], ids=["dit", "unet"])
def test_gradients_are_bitwise_reproducible(options):
    """Can only fail on a GPU, where atomics or a race would show."""
    leaves = leaves_of(EVERYTHING, 1, 3, 4, 16, channels_first=options.get("channels_first", False))
    first, again = (evaluate(leaves, torch.float32, "triton", options) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("options", [DIT, UNET], ids=["dit", "unet"])
def test_samples_do_not_see_each_other(options):
    a = leaves_of((*SHARED, *OWN), 1, 4, 3, 8, channels_first=options.get("channels_first", False))
    a = {name: x.float() for name, x in a.items()}
    before = broadcast_modulate(**a, **options, impl="triton")
    changed = {**a, "x": a["x"].clone(), "own_shift": a["own_shift"].clone()}
    changed["x"][:, 1], changed["own_shift"][:, 1] = 50.0, -3.0
    after = broadcast_modulate(**changed, **options, impl="triton")
    assert torch.equal(before[:, [0, 2, 3]], after[:, [0, 2, 3]]) and not torch.equal(before[:, 1], after[:, 1])


def test_a_long_sum_keeps_its_digits():
    """K * T = 4,000 equal terms: one running float32 sum would be off by far more than the budget."""
    names, options = ("shift", "scale", "bias"), {"form": "adaln"}
    leaves = leaves_of(names, 1, 2000, 2, 3)
    leaves["x"] = torch.full_like(leaves["x"], 0.1).float().double()
    within_budget(
        evaluate(leaves, torch.float64, "reference", options),
        evaluate(leaves, torch.float32, "reference", options),
        evaluate(leaves, torch.float32, "triton", options),
    )


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_auto_runs_triton_on_the_gpu():
    leaves = {name: x.bfloat16() for name, x in leaves_of(EVERYTHING, 2, 3, 4, 64).items()}
    assert torch.equal(broadcast_modulate(**leaves, **DIT), broadcast_modulate(**leaves, **DIT, impl="triton"))
