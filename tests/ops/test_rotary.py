"""Rotary positions against complex numbers, one axis at a time, and what autograd keeps of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.ops import Rotary, rotate, rotate_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RECIPES = [
    Rotary(1, 12),
    Rotary(1, 8, base=100.0),
    Rotary(1, 12, style="half"),
    Rotary(3, 12),
    Rotary(3, 6, style="half"),
    Rotary(1, 48, full_width=True),
    Rotary(3, 48, style="half", full_width=True),
]


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).to(DEVICE)


def places(rotary: Rotary, *shape: int, seed: int = 1) -> Tensor:
    return 9 * draw(*shape, *([3] if rotary.axes == 3 else []), seed=seed)


def by_complex_numbers(x: Tensor, positions: Tensor, rotary: Rotary) -> Tensor:
    """A pair is one complex number, and turning it is one product with exp(i angle)."""
    heads, width = x.shape[-2:]
    out = x.clone().flatten(-2) if rotary.full_width else x.clone()
    w = rotary.rotary_dim // rotary.axes
    for axis in range(rotary.axes):
        place = positions[..., axis] if rotary.axes == 3 else positions
        for i in range(w // 2):
            near = axis * w + (2 * i if rotary.style == "interleaved" else i)
            far = near + (1 if rotary.style == "interleaved" else w // 2)
            turn = torch.polar(torch.ones_like(place), place * rotary.base ** (-2 * i / w))
            turn = turn if rotary.full_width else turn[..., None]
            turned = torch.complex(out[..., near], out[..., far]) * turn
            out[..., near], out[..., far] = turned.real, turned.imag
    return out.unflatten(-1, (heads, width)) if rotary.full_width else out


@pytest.mark.parametrize("rotary", RECIPES, ids=str)
def test_is_a_product_of_complex_numbers(rotary):
    x, positions = draw(2, 5, 4, 12), places(rotary, 2, 5)
    expected = by_complex_numbers(x, positions, rotary)
    torch.testing.assert_close(rotate_reference(x, positions, rotary), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(rotate(x, positions, rotary), rotate_reference(x, positions, rotary))
    norms = (expected.square().sum((-1, -2)), x.square().sum((-1, -2)))
    torch.testing.assert_close(*norms)
    still = rotate(x, torch.zeros_like(positions), rotary)
    assert torch.equal(still, x)


@pytest.mark.parametrize("style", ["interleaved", "half"])
def test_three_axes_are_one_axis_three_times(style):
    x, positions = draw(6, 2, 18), draw(6, 3)
    blocks = [rotate(x[..., 6 * i : 6 * i + 6], positions[:, i], Rotary(1, 6, style=style)) for i in range(3)]
    torch.testing.assert_close(rotate(x, positions, Rotary(3, 18, style=style)), torch.cat(blocks, -1))


def test_pairs_of_the_full_width_straddle_heads():
    """The head of 3D Diffuser Actor: 8 heads of 15 channels, blocks of 40 for x, y, z, turned before the split."""
    x, positions = draw(4, 8, 15), draw(4, 3)
    wide = rotate(x.flatten(1)[:, None], positions, Rotary(3, 120))
    torch.testing.assert_close(rotate(x, positions, Rotary(3, 120, full_width=True)), wide.view(4, 8, 15))


@pytest.mark.parametrize("rotary", RECIPES[:5], ids=str)
def test_products_depend_on_differences_of_positions(rotary):
    q, k = draw(7, 2, 12), draw(7, 2, 12, seed=2)
    at, to = places(rotary, 7), places(rotary, 7, seed=3)
    products = [(rotate(q, at + d, rotary) * rotate(k, to + d, rotary)).sum(-1) for d in (0.0, 3.7)]
    torch.testing.assert_close(*products)


@pytest.mark.parametrize("rotary", RECIPES, ids=str)
def test_gradients(rotary):
    x, positions = draw(3, 4, 12).requires_grad_(), places(rotary, 3)
    assert torch.autograd.gradcheck(lambda x: rotate(x, positions, rotary), (x,))
    assert torch.autograd.gradgradcheck(lambda x: rotate(x, positions, rotary), (x,))
    weight = draw(3, 4, 12, seed=5)
    ours, expected = (
        torch.autograd.grad((f(x, positions, rotary) * weight).sum(), x)[0] for f in (rotate, rotate_reference)
    )
    torch.testing.assert_close(ours, expected)


def test_autograd_keeps_the_positions_alone():
    x, positions = draw(3, 4, 12, dtype=torch.float32).requires_grad_(), torch.arange(3, device=DEVICE)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rotate(x, positions, Rotary(1, 12))
    assert [t.data_ptr() for t in saved] == [positions.data_ptr()]


def test_compiles_without_graph_breaks():
    x, positions, rotary = draw(3, 4, 12).requires_grad_(), draw(3, 3), Rotary(3, 12)
    run = lambda x: rotate(x, positions, rotary).square().sin().sum()  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x), torch.autograd.grad(run(x), x))


def test_sixteen_bits_are_turned_in_float32():
    x, positions = draw(5, 2, 12).half(), 300 * draw(5)
    wide = rotate(x.float(), positions, Rotary(1, 12))
    assert torch.equal(rotate(x, positions, Rotary(1, 12)), wide.half())


def test_no_heads_and_no_tokens():
    assert rotate(draw(0, 4, 12), draw(0, 3), Rotary(3, 12)).shape == (0, 4, 12)
    assert rotate(draw(2, 0, 12), draw(2), Rotary(1, 12)).shape == (2, 0, 12)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Rotary(2, 12), "axes must be 1 or 3, got 2"),
        (lambda: Rotary(3, 20), r"rotary_dim must be a positive multiple of 2 \* axes = 6, got 20"),
        (lambda: Rotary(1, 0), "positive multiple"),
        (lambda: Rotary(1, 12, base=1.0), "base must be over 1"),
        (lambda: Rotary(1, 12, style="neox"), "'interleaved' or 'half', got 'neox'"),
        (lambda: rotate(draw(3, 4, 12), draw(3), Rotary(1, 14)), r"at most D = 12, got 14 \(x: \[3, 4, 12\]\)"),
        (lambda: rotate(draw(3, 4, 12), draw(3), Rotary(1, 12, full_width=True)), r"H \* D = 4 \* 12 = 48"),
        (lambda: rotate(draw(3, 4, 12), draw(3), Rotary(3, 12)), r"positions must be \[..., 3\] = \[3, 3\] for axes = 3, got \[3\]"),
        (lambda: rotate(draw(3, 4, 12), draw(4), Rotary(1, 12)), r"= \[3\] for axes = 1, got \[4\]"),
        (lambda: rotate(draw(3, 4, 12), draw(3).bool(), Rotary(1, 12)), "real or integer, got torch.bool"),
        (lambda: rotate(draw(3, 4, 12), draw(3).to("meta"), Rotary(1, 12)), "must be on .*, got meta"),
        (lambda: rotate(draw(3, 4, 12), draw(3).requires_grad_(), Rotary(1, 12)), r"get no gradient; pass positions.detach\(\)"),
        (lambda: rotate(draw(3, 4, 12).long(), draw(3), Rotary(1, 12)), "x must be a floating-point tensor"),
        (lambda: rotate(draw(3, 4, 12), draw(3), "1d"), "rotary must be a Rotary, got str"),
        (lambda: rotate(draw(12), draw(1), Rotary(1, 12)), r"x must be \[..., H, D\], got \[12\]"),
    ],
)  # fmt: skip
def test_bad_input(build, message):
    with pytest.raises(InvalidArgument, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)
