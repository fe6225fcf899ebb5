"""Rotary3D and Rotary1D: recipes as modules, in metres, without state."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.nn import BroadcastCrossAttention, Rotary1D, Rotary3D
from minidiff_fast.ops import Rotary, rotate_reference


def complex_rotation(x, angles):
    """Neighbouring channels as complex numbers, multiplied by exp(i angle)."""
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten(-2)


def test_blocks_of_three_axes_in_metres():
    torch.manual_seed(0)
    x, positions = torch.randn(2, 5, 3, 20, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)
    for scale in (1.0, 12.5):
        got = Rotary3D.for_heads(20, scale=scale).rotate(x, positions)
        frequency = 10000.0 ** (-torch.arange(3, dtype=torch.float64) / 3)
        angles = (positions[..., None] * scale * frequency).flatten(-2)[..., None, :]  # x's pairs, y's, z's
        want = torch.cat([complex_rotation(x[..., :18], angles.expand(2, 5, 3, 9)), x[..., 18:]], -1)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_full_width_turns_before_the_head_split():
    """3D Diffuser Actor: 120 channels, 8 heads of 15, axes in blocks of 40; pairs straddle heads."""
    torch.manual_seed(0)
    rotary = Rotary3D.across_heads(8, 15)
    assert rotary.recipe == Rotary(3, 120, full_width=True)
    x, positions = torch.randn(2, 7, 8, 15, dtype=torch.float64), torch.randn(2, 7, 3, dtype=torch.float64)
    frequency = 10000.0 ** (-torch.arange(20, dtype=torch.float64) / 20)
    want = complex_rotation(x.flatten(-2), (positions[..., None] * frequency).flatten(-2))
    torch.testing.assert_close(rotary.rotate(x, positions).flatten(-2), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("style", ["interleaved", "half"])
@pytest.mark.parametrize("axes", [1, 3])
def test_products_depend_on_differences_alone(axes, style):
    torch.manual_seed(0)
    rotary = (Rotary1D if axes == 1 else Rotary3D)(12, style=style)
    tail = (3,) if axes == 3 else ()
    q, k = torch.randn(2, 9, 2, 16, dtype=torch.float64)
    a, b = torch.randn(2, 9, *tail, dtype=torch.float64)
    shift = torch.randn(tail, dtype=torch.float64)
    near = (rotary.rotate(q, a) * rotary.rotate(k, b)).sum(-1)
    far = (rotary.rotate(q, a + shift) * rotary.rotate(k, b + shift)).sum(-1)
    torch.testing.assert_close(near, far, rtol=0, atol=1e-12)
    assert (near - (q * k).sum(-1)).abs().max() > 0.1


def test_forward_gives_what_attention_takes():
    rotary = Rotary3D(12, base=100.0, style="half", scale=2.0)
    q, own = torch.rand(2, 3, 4, 3), torch.rand(2, 3, 5, 3)
    rope = rotary(q, own)
    assert rope.rotary is rotary.recipe == Rotary(3, 12, 100.0, "half")
    assert torch.equal(rope.q_positions, 2 * q) and torch.equal(rope.own_positions, 2 * own)
    assert rotary(q).own_positions is None
    x = torch.randn(2, 3, 4, 1, 16)
    torch.testing.assert_close(rotary.rotate(x, q), rotate_reference(x, 2 * q, rotary.recipe))


def test_no_state_and_copies():
    rotary = Rotary3D.for_heads(64)
    assert not rotary.state_dict() and not list(rotary.buffers())
    for other in (copy.deepcopy(rotary), pickle.loads(pickle.dumps(rotary))):
        assert other.recipe == rotary.recipe and repr(other) == repr(rotary)
    assert "Rotary1D(8" in repr(BroadcastCrossAttention(16, 2, rotary=Rotary(1, 8)))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Rotary3D(10), "rotary_dim must be a positive multiple of 2 * axes = 6, got 10"),
        (lambda: Rotary3D(12, scale=0.0), "Rotary3D: scale must be a finite number above 0, got 0.0"),
        (lambda: Rotary1D(12, scale=float("nan")), "Rotary1D: scale must be a finite number above 0, got nan"),
        (lambda: Rotary3D.for_heads(5), "head_dim must be at least 6, got 5"),
        (lambda: BroadcastCrossAttention(32, 2, rotary=Rotary3D(18)), "rotary_dim of at most the head dimension 16, got 18"),
        (lambda: BroadcastCrossAttention(32, 2, rotary=Rotary3D.across_heads(3, 16)), "rotary_dim = H * D = 2 * 16 = 32, got 48"),
        (
            lambda: BroadcastCrossAttention(48, 2, rotary=Rotary3D.across_heads(2, 24), num_kv_heads=1),
            "needs num_kv_heads = num_heads = 2, got 1",
        ),
        (
            lambda: BroadcastCrossAttention(48, 2, rotary=Rotary3D.across_heads(2, 24), qk_norm="rms"),
            "qk_norm is per head, and rotary with full_width turns across heads",
        ),
        (lambda: BroadcastCrossAttention(32, 2, rotary=3), "rotary must be a Rotary3D, Rotary1D, Rotary or None, got int"),
    ],
)  # fmt: skip
def test_errors(make, text):
    with pytest.raises(InvalidArgument) as error:
        make()
    assert text in str(error.value) and "\n" not in str(error.value)
