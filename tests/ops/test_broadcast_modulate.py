"""The definition of broadcast modulation, its checks, its schema and what autograd keeps of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from minidiff_fast.errors import BackendUnavailable, InvalidArgument
from minidiff_fast.ops import broadcast_modulate, broadcast_modulate_reference

KERNEL = "triton"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHARED, OWN, AFFINE = ("shift", "scale", "gate"), ("own_shift", "own_scale", "own_gate"), ("weight", "bias")
EVERYTHING = (*SHARED, *OWN, "residual", *AFFINE)


def tensors(
    *names: str, B=2, K=3, T=4, C=8, channels_first=False, dtype=torch.float64, grad=False
) -> dict[str, Tensor]:
    """x and the named arguments, standard normal."""
    generator = torch.Generator().manual_seed(B + 10 * K + 100 * T + 1000 * C)
    x = (B, K, C, T) if channels_first else (B, K, T, C)
    shapes = {
        "x": x, "residual": x, **dict.fromkeys(SHARED, (B, C)), **dict.fromkeys(OWN, (B, K, C)),
        **dict.fromkeys(AFFINE, (C,)),
    }  # fmt: skip
    return {
        name: torch.randn(shapes[name], generator=generator, dtype=dtype).to(DEVICE).requires_grad_(grad)
        for name in ("x", *names)
    }


def gradients(options: dict, impl: str, leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
    y = broadcast_modulate(**leaves, **options, impl=impl)
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=DEVICE).view_as(y)
    return torch.autograd.grad((y * weight).sum(), list(leaves.values()))


def rows(x: Tensor, K: int) -> Tensor:
    """[B, C] -> [B * K, C], a copy per sample: how policies write it."""
    return x.repeat_interleave(K, 0)


# -------------------------------------------------------------------------------------------- against PyTorch


def test_unet_block_is_group_norm_mish_film():
    """diffusion_policy: scale * mish(group_norm(x)) + bias, both from a projection of the repeated condition."""
    B, K, C, T = 2, 3, 16, 5
    a = tensors(*SHARED[:2], *AFFINE, B=B, K=K, C=C, T=T, channels_first=True, grad=True)
    n = nn.GroupNorm(8, C, dtype=torch.float64, device=DEVICE)
    n.weight.data, n.bias.data = a["weight"].data, a["bias"].data
    expected = rows(a["scale"], K)[..., None] * F.mish(n(a["x"].flatten(0, 1))) + rows(a["shift"], K)[..., None]
    ours = broadcast_modulate(**a, norm="group", num_groups=8, activation="mish", channels_first=True, impl="reference")
    torch.testing.assert_close(ours, expected.unflatten(0, (B, K)))
    leaves = [a["x"], a["shift"], a["scale"]]
    for one, two in zip(
        torch.autograd.grad(ours.square().sum(), leaves),
        torch.autograd.grad(expected.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(one, two)


def test_dit_block_is_layer_norm_adaln_gate_residual():
    """DiT: x + gate * f, with f here layer_norm(x) * (1 + scale) + shift."""
    B, K, T, C = 2, 3, 4, 8
    a = tensors(*SHARED, "residual", B=B, K=K, T=T, C=C)
    n = F.layer_norm(a["x"], (C,), eps=1e-6)
    shift, scale, gate = (a[name][:, None, None] for name in SHARED)
    ours = broadcast_modulate(**a, norm="layer", eps=1e-6, form="adaln", impl="reference")
    torch.testing.assert_close(ours, a["residual"] + gate * (n * (1 + scale) + shift))


def test_sum_before_the_activation():
    """3D Diffuser Actor's FiLM: the condition is added before the SiLU."""
    a = tensors("shift", "own_shift")
    ours = broadcast_modulate(**a, activation="silu", activation_at="output", impl="reference")
    torch.testing.assert_close(ours, F.silu(a["x"] + a["shift"][:, None, None] + a["own_shift"][:, :, None]))


@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("norm", [None, "layer", "rms", "group"])
def test_norms_are_those_of_torch(norm, channels_first):
    B, K, T, C = 2, 3, 5, 12
    a = tensors(*AFFINE, B=B, K=K, T=T, C=C, channels_first=channels_first)
    x = a["x"].transpose(2, 3) if channels_first else a["x"]
    w, b = a["weight"], a["bias"]
    expected = {
        None: x * w + b,
        "layer": F.layer_norm(x, (C,), w, b),
        "rms": F.rms_norm(x, (C,), w, 1e-5) + b,
        "group": F.group_norm(x.flatten(0, 1).transpose(1, 2), 4, w, b).transpose(1, 2).unflatten(0, (B, K)),
    }[norm]
    ours = broadcast_modulate(**a, norm=norm, num_groups=4 if norm == "group" else None, channels_first=channels_first)
    torch.testing.assert_close(ours.transpose(2, 3) if channels_first else ours, expected)


def test_what_is_left_out_does_nothing():
    x = tensors()["x"]
    assert torch.equal(broadcast_modulate(x), x)
    zero = torch.zeros(2, 8, dtype=x.dtype, device=DEVICE)
    assert torch.equal(broadcast_modulate(x, scale=zero, shift=zero, form="adaln"), x)
    assert (broadcast_modulate(x, scale=zero, form="film") == 0).all()
    assert (broadcast_modulate(x, gate=zero) == 0).all()


# ------------------------------------------------------------------------------------------------ derivatives


GRADCHECK = {
    "unet": {"norm": "group", "num_groups": 2, "activation": "mish", "channels_first": True},
    "group-last": {"norm": "group", "num_groups": 4, "activation": "silu", "activation_at": "output", "form": "adaln"},
    "dit": {"norm": "layer", "form": "adaln"},
    "rms": {"norm": "rms", "activation": "silu"},
    "plain": {"activation": "mish", "activation_at": "output"},
}


@pytest.mark.parametrize("name", GRADCHECK)
def test_gradcheck(name):
    options = GRADCHECK[name]
    leaves = tensors(
        *EVERYTHING, B=1, K=2, T=2, C=4, channels_first=options.get("channels_first", False), grad=True
    )  # fmt: skip

    def run(*values: Tensor) -> Tensor:
        return broadcast_modulate(**dict(zip(leaves, values, strict=True)), **options, impl="reference")

    assert torch.autograd.gradcheck(run, tuple(leaves.values()))
    assert torch.autograd.gradgradcheck(run, tuple(leaves.values()), atol=1e-4)


def test_gradients_of_parameters_have_their_dtype_and_x_decides_the_output():
    a = tensors(*EVERYTHING, dtype=torch.float32)
    dtypes = {"shift": torch.float16, "own_scale": torch.bfloat16, "weight": torch.float64, "gate": torch.float32}
    for impl in ("reference", KERNEL):
        leaves = {name: x.detach().to(dtypes.get(name, x.dtype)).requires_grad_() for name, x in a.items()}
        y = broadcast_modulate(**leaves, norm="layer", impl=impl)
        assert y.dtype == torch.float32
        for leaf, gradient in zip(
            leaves.values(), torch.autograd.grad(y.square().sum(), list(leaves.values())), strict=True
        ):
            assert gradient.dtype == leaf.dtype and gradient.shape == leaf.shape


@pytest.mark.parametrize("impl", ["reference", KERNEL])
@pytest.mark.parametrize("activation", ["silu", "mish"])
def test_large_arguments_neither_overflow_nor_turn_to_nan(activation, impl):
    x = torch.tensor([-1e4, -200.0, -90.0, -20.0, 0.0, 20.0, 90.0, 200.0, 1e4], device=DEVICE).view(1, 1, 1, 9)
    x = x.requires_grad_()
    y = broadcast_modulate(x, activation=activation, impl=impl)
    (dx,) = torch.autograd.grad(y.sum(), x)
    exact = x.detach().double().requires_grad_()
    expected = getattr(F, activation)(exact)
    (expected_dx,) = torch.autograd.grad(expected.sum(), exact)
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dx.double(), expected_dx, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", ["reference", KERNEL])
def test_a_large_mean_does_not_eat_the_variance(impl):
    x = (1000 + tensors(dtype=torch.float32, C=64)["x"]).float()
    for norm, groups in (("layer", None), ("group", 4)):
        y = broadcast_modulate(x, norm=norm, num_groups=groups, impl=impl)
        exact = broadcast_modulate(x.double(), norm=norm, num_groups=groups, impl="reference")
        torch.testing.assert_close(y.double(), exact, rtol=0, atol=2e-4)  # x itself is rounded to 3e-5


# ------------------------------------------------------------------------------------------------------- torch


OPTIONS = {
    "unet": {"norm": "group", "num_groups": 2, "activation": "mish", "channels_first": True},
    "dit": {"norm": "layer", "form": "adaln"},
    "rms": {"norm": "rms", "activation": "silu", "activation_at": "output"},
    "plain": {},
}


@pytest.mark.parametrize(
    ("name", "names"),
    [("unet", EVERYTHING), ("dit", ("shift", "own_scale", "bias")), ("rms", EVERYTHING), ("plain", ())],
)
def test_opcheck(name, names):
    options = OPTIONS[name]
    a = tensors(
        *names, B=1, K=2, T=2, C=4, channels_first=options.get("channels_first", False), dtype=torch.float32, grad=True
    )
    order = ("x", *SHARED, *OWN, "residual", *AFFINE)
    arguments = (
        *(a.get(argument) for argument in order),
        options.get("norm", ""), options.get("num_groups", 0), 1e-5, options.get("activation", ""),
        options.get("activation_at", "norm"), options.get("form", "film"), options.get("channels_first", False), KERNEL,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.minidiff_fast.broadcast_modulate_fwd.default, arguments)


@pytest.mark.parametrize("impl", ["reference", KERNEL])
@pytest.mark.parametrize("name", ["unet", "dit"])
def test_compiles_without_graph_breaks(name, impl):
    options = OPTIONS[name]
    leaves = tensors(
        *EVERYTHING, B=2, K=2, T=2, channels_first=options.get("channels_first", False), dtype=torch.float32, grad=True
    )  # fmt: skip

    def run(leaves: dict[str, Tensor]) -> Tensor:
        return broadcast_modulate(**leaves, **options, impl=impl).square().sum()

    torch._dynamo.reset()
    eager = torch.autograd.grad(run(leaves), list(leaves.values()))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(leaves)
    for a, b in zip(eager, torch.autograd.grad(compiled, list(leaves.values())), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", ["reference", KERNEL])
def test_compiles_once_for_changing_shapes(impl):
    frames = CompileCounter()

    def run(leaves: dict[str, Tensor]) -> Tensor:
        return broadcast_modulate(**leaves, norm="layer", form="adaln", impl=impl)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=frames)
    for B, K, T in [(2, 3, 5), (3, 4, 6), (5, 2, 9), (4, 7, 11)]:
        leaves = tensors(*SHARED, "own_shift", B=B, K=K, T=T, dtype=torch.float32)
        torch.testing.assert_close(compiled(leaves), run(leaves))
    assert frames.frame_count <= 2


@pytest.mark.parametrize("shape", [{"B": 0}, {"K": 0}, {"T": 0}], ids=str)
@pytest.mark.parametrize("impl", ["reference", KERNEL])
@pytest.mark.parametrize("norm", [None, "layer", "group"])
def test_empty_axes(norm, impl, shape):
    leaves = tensors(*EVERYTHING, **shape, dtype=torch.float32, grad=True)
    y = broadcast_modulate(**leaves, norm=norm, num_groups=2 if norm == "group" else None, impl=impl)
    assert y.shape == leaves["x"].shape
    for leaf, gradient in zip(
        leaves.values(), torch.autograd.grad(y.sum(), list(leaves.values())), strict=True
    ):  # fmt: skip
        assert gradient.shape == leaf.shape and (gradient == 0).all()


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("unet", ("x",)),
        ("dit", ("shift", "own_gate")),
        ("plain", ("weight",)),
        ("dit", ("residual",)),
        ("rms", ("bias", "x")),
    ],
    ids=str,
)
def test_only_the_gradients_that_are_asked_for(name, wanted):
    options = OPTIONS[name]
    a = tensors(*EVERYTHING, B=1, K=2, channels_first=options.get("channels_first", False), dtype=torch.float32)

    def run(names: tuple[str, ...]) -> dict[str, Tensor]:
        leaves = {key: x.detach().requires_grad_(key in names) for key, x in a.items()}
        y = broadcast_modulate(**leaves, **options, impl=KERNEL)
        return dict(zip(names, torch.autograd.grad(y.sum(), [leaves[key] for key in names]), strict=True))

    every = run(tuple(a))
    for key, gradient in run(wanted).items():
        torch.testing.assert_close(gradient, every[key])


@pytest.mark.parametrize("name", OPTIONS)
def test_autograd_keeps_x_statistics_and_parameters(name):
    options = OPTIONS[name]
    B, K, T, C = 1, 5, 16, 32
    a = tensors(
        *EVERYTHING, B=B, K=K, T=T, C=C, channels_first=options.get("channels_first", False), dtype=torch.float32,
        grad=True,
    )  # fmt: skip
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        broadcast_modulate(**a, **options, impl=KERNEL)
    for key, x in a.items():
        kept = saved.pop(x.untyped_storage().data_ptr(), 0)
        assert (kept > 0) == (key != "residual"), key
    assert sum(saved.values()) <= 2 * 4 * B * K * T  # mean and rstd


# ------------------------------------------------------------------------------------------------------- errors


def wrong(message: str, **changes):
    a = tensors("shift", "own_scale", "residual", "weight") | changes
    with pytest.raises(InvalidArgument, match=message) as caught:
        broadcast_modulate(**a)
    assert "\n" not in str(caught.value)


def test_errors_name_the_argument_and_the_numbers():
    z = torch.zeros
    f64 = {"dtype": torch.float64, "device": DEVICE}
    wrong(r"broadcast_modulate: x must be \[B, K, T, C\] = \[B, K, T, C\], got \[2, 8\]", x=z(2, 8, **f64))
    wrong(r"shift must be \[B, C\] = \[2, 8\], got \[2, 3, 8\] \(x: \[2, 3, 4, 8\]\)", shift=z(2, 3, 8, **f64))
    wrong(r"own_scale must be \[B, K, C\] = \[2, 3, 8\], got \[6, 8\]", own_scale=z(6, 8, **f64))
    wrong(r"weight must be \[C\] = \[8\], got \[4\]", weight=z(4, **f64))
    wrong(r"residual must be \[B, K, T, C\] = \[2, 3, 4, 8\], got \[2, 1, 4, 8\]", residual=z(2, 1, 4, 8, **f64))
    wrong("residual must have the dtype of x, torch.float64, got torch.float32", residual=z(2, 3, 4, 8, device=DEVICE))
    wrong("gate must be a floating-point tensor, got torch.int64", gate=z(2, 8, dtype=torch.int64, device=DEVICE))
    wrong("x must be a floating-point tensor", x=z(2, 3, 4, 8, dtype=torch.int32, device=DEVICE))
    wrong(r"shift must be on the device of x, .*, got meta", shift=z(2, 8, device="meta"))
    wrong("C must be at least 1", x=z(2, 3, 4, 0, **f64))
    wrong("norm must be one of None, 'layer', 'rms', 'group', got 'batch'", norm="batch")
    wrong("activation must be one of None, 'silu', 'mish', got 'gelu'", activation="gelu")
    wrong("activation_at must be one of 'norm', 'output', got 'input'", activation_at="input")
    wrong("form must be one of 'film', 'adaln', got 'affine'", form="affine")
    wrong("num_groups belongs to norm='group', got None with norm='group'", norm="group")
    wrong("num_groups belongs to norm='group', got 4 with norm='layer'", norm="layer", num_groups=4)
    wrong("num_groups must be a positive integer, got 0", norm="group", num_groups=0)
    wrong("num_groups must divide C = 8, got 3", norm="group", num_groups=3)
    wrong("eps must be a finite number, at least 0, got -1", norm="layer", eps=-1.0)
    wrong("eps must be a finite number, at least 0, got nan", norm="layer", eps=float("nan"))
    wrong("impl must be one of", impl="cuda")


def test_channels_first_errors_speak_of_it():
    with pytest.raises(InvalidArgument, match=r"shift must be \[B, C\] = \[2, 4\], got \[2, 8\] \(x: \[2, 3, 4, 8\]\)"):
        broadcast_modulate(**tensors("shift"), channels_first=True)


def test_float64_has_no_kernel():
    with pytest.raises(BackendUnavailable, match="float32, float16 and bfloat16"):
        broadcast_modulate(tensors()["x"], impl=KERNEL)
    assert torch.equal(broadcast_modulate(**tensors(*SHARED)), broadcast_modulate_reference(**tensors(*SHARED)))


def test_twice_differentiable_on_the_reference_only():
    x = tensors(dtype=torch.float32, grad=True)["x"]
    (dx,) = torch.autograd.grad(broadcast_modulate(x, norm="layer", impl=KERNEL).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(dx.sum(), x)
