"""Rotary position embedding from positions in one or three dimensions: the recipe, and its plain PyTorch definition."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.shapes import describe

LARGEST_BASE = 2.0**100


@dataclass(frozen=True)
class Rotary:
    """Which channels turn together, and how fast.

    The first ``rotary_dim`` channels split into ``axes`` equal blocks of width w, one per coordinate of a position.
    Pair i of a block turns by the angle ``position * base ** (-2 i / w)`` (radians); the other channels stay.

    >>> Rotary(axes=3, rotary_dim=18).block
    6
    """

    axes: Literal[1, 3]
    """Coordinates of a position: 1 (an index in time) or 3 (x, y, z)."""
    rotary_dim: int
    """Channels that turn, a multiple of 2 * axes: at most D, or exactly H * D with ``full_width``."""
    base: float = 10000.0
    """Pair i of w / 2 has the wavelength 2 pi base ** (2 i / w), in the units of the positions."""
    style: Literal["interleaved", "half"] = "interleaved"
    """Pair i of a block: channels 2 i and 2 i + 1 (RoFormer), or i and i + w / 2 (GPT-NeoX, Llama)."""
    full_width: bool = False
    """Channels are counted over all heads, h * D + d, as 3D Diffuser Actor does, which turns before it splits heads."""

    def __post_init__(self) -> None:
        if self.axes not in (1, 3):
            raise InvalidArgument(f"Rotary: axes must be 1 or 3, got {self.axes!r}")
        if self.rotary_dim < 2 * self.axes or self.rotary_dim % (2 * self.axes):
            raise InvalidArgument(
                f"Rotary: rotary_dim must be a positive multiple of 2 * axes = {2 * self.axes}, got {self.rotary_dim}"
            )
        if not 1.0 < self.base <= LARGEST_BASE:
            raise InvalidArgument(f"Rotary: base must be over 1 and at most 2^100, got {self.base}")
        if self.style not in ("interleaved", "half"):
            raise InvalidArgument(f"Rotary: style must be 'interleaved' or 'half', got {self.style!r}")

    @property
    def block(self) -> int:
        """Channels of one coordinate, w."""
        return self.rotary_dim // self.axes


class RotaryPositions(NamedTuple):
    """Where a sample's queries, and its own keys, are. Shared keys are rotated before, once per condition."""

    rotary: Rotary
    q_positions: Tensor
    """[B, K, T] (axes = 1) or [B, K, T, 3]: real or integer, in the units that ``base`` is meant for; no gradient."""
    own_positions: Tensor | None = None
    """[B, K, P] or [B, K, P, 3]; None leaves the own keys as they are."""


def rotate(
    x: Tensor,  # [..., H, D]
    positions: Tensor,  # [...] or [..., 3]
    rotary: Rotary,
) -> Tensor:  # [..., H, D]
    r"""Rotate pairs of channels by angles that are linear in the position.

    .. math::
        (x_a, x_b) \mapsto (x_a \cos\theta - x_b \sin\theta,\; x_a \sin\theta + x_b \cos\theta), \quad
        \theta = position_{axis} \cdot base^{-2i/w}

    so that the product of a rotated query and a rotated key depends on the difference of their positions alone.

    Args:
        x: ``[..., H, D]``, any floating dtype; computed in float32 (float64 for float64), rounded once.
        positions: ``[...]`` for ``axes = 1``, ``[..., 3]`` for ``axes = 3``, real or integer, on the device of x.
        rotary: which channels turn, and how fast.

    Raises:
        InvalidArgument: a shape, dtype or device is wrong, or ``rotary_dim`` does not fit H and D.

    Autograd keeps the positions and nothing else: no table of cosines, no copy of x. Differentiable any number of
    times in x; positions get no gradient.

    Source: RoFormer (Su et al., arXiv 2104.09864); in three dimensions 3D Diffuser Actor (Ke et al., arXiv 2402.10885).

    >>> keys = torch.randn(2, 250, 4, 18)
    >>> rotate(keys, torch.rand(2, 250, 3), Rotary(axes=3, rotary_dim=18)).shape
    torch.Size([2, 250, 4, 18])
    """
    check_rotary("rotate", rotary, "x", x)
    check_positions("rotate", "positions", positions, rotary, x.shape[:-2], "[...]", x.device)
    return _Rotate.apply(x, positions, rotary, False)


def rotate_reference(
    x: Tensor,  # [..., H, D]
    positions: Tensor,  # [...] or [..., 3]
    rotary: Rotary,
) -> Tensor:  # [..., H, D]
    """The definition of :func:`rotate`, differentiated by autograd through every step."""
    check_rotary("rotate_reference", rotary, "x", x)
    check_positions("rotate_reference", "positions", positions, rotary, x.shape[:-2], "[...]", x.device)
    return _rotated(x, positions, rotary, inverse=False)


def _angles(positions: Tensor, rotary: Rotary, dtype: torch.dtype) -> Tensor:
    """``[..., axes, w / 2]`` radians; frequencies are float64 until they meet the positions."""
    exponents = torch.arange(0, rotary.block, 2, dtype=torch.float64, device=positions.device) / rotary.block
    frequencies = torch.exp2(exponents * -math.log2(rotary.base)).to(dtype)
    coordinates = positions.to(dtype) if rotary.axes == 3 else positions.to(dtype)[..., None]
    return coordinates[..., None] * frequencies


def _rotated(x: Tensor, positions: Tensor, rotary: Rotary, *, inverse: bool) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    angles = _angles(positions, rotary, dtype)
    cos, sin = angles.cos(), angles.sin()
    if inverse:
        sin = -sin
    wide = x.to(dtype)
    if rotary.full_width:
        wide = wide.flatten(-2)
    else:  # every head turns alike
        cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)
    pair = -1 if rotary.style == "interleaved" else -2
    sizes = (rotary.block // 2, 2) if rotary.style == "interleaved" else (2, rotary.block // 2)
    first, second = wide[..., : rotary.rotary_dim].unflatten(-1, (rotary.axes, *sizes)).unbind(pair)
    turned = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=pair).flatten(-3)
    out = torch.cat((turned, wide[..., rotary.rotary_dim :]), dim=-1)
    return out.reshape(x.shape).to(x.dtype)


class _Rotate(torch.autograd.Function):
    """The gradient of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, positions: Tensor, rotary: Rotary, inverse: bool) -> Tensor:
        ctx.save_for_backward(positions)
        ctx.rotary, ctx.inverse = rotary, inverse
        return _rotated(x, positions, rotary, inverse=inverse)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (positions,) = ctx.saved_tensors
        return _Rotate.apply(gradient, positions, ctx.rotary, not ctx.inverse), None, None, None


def check_positions(
    function: str,
    argument: str,
    positions: Tensor,
    rotary: Rotary,
    leading: tuple[int, ...],
    letters: str,
    device: torch.device,
) -> None:
    """Raise :class:`InvalidArgument` unless ``positions`` has a place for every token (metadata only)."""
    expected = [*leading, 3] if rotary.axes == 3 else [*leading]
    letters = letters.removesuffix("]") + ", 3]" if rotary.axes == 3 else letters
    if list(positions.shape) != expected:
        raise InvalidArgument(
            f"{function}: {argument} must be {letters} = {expected} for axes = {rotary.axes}, "
            f"got {list(positions.shape)}"
        )
    if positions.is_complex() or positions.dtype == torch.bool:
        raise InvalidArgument(f"{function}: {argument} must be real or integer, got {positions.dtype}")
    if positions.device != device:
        raise InvalidArgument(f"{function}: {argument} must be on {device}, got {positions.device}")
    if positions.requires_grad:
        raise InvalidArgument(f"{function}: {argument} get no gradient; pass {argument}.detach()")


def check_rotary(function: str, rotary: Rotary, argument: str, x: Tensor) -> None:
    """Raise :class:`InvalidArgument` unless the heads of ``x`` have the channels that ``rotary`` turns."""
    if not isinstance(rotary, Rotary):
        raise InvalidArgument(f"{function}: rotary must be a Rotary, got {type(rotary).__name__}")
    if not x.is_floating_point():
        raise InvalidArgument(f"{function}: {argument} must be a floating-point tensor, got {x.dtype}")
    if x.dim() < 2:
        raise InvalidArgument(f"{function}: {argument} must be [..., H, D], got {list(x.shape)}")
    heads, width = x.shape[-2:]
    if rotary.full_width and rotary.rotary_dim != heads * width:
        raise InvalidArgument(
            f"{function}: rotary_dim must be H * D = {heads} * {width} = {heads * width} with full_width, "
            f"got {rotary.rotary_dim} ({describe(**{argument: x})})"
        )
    if not rotary.full_width and rotary.rotary_dim > width:
        raise InvalidArgument(
            f"{function}: rotary_dim must be at most D = {width}, got {rotary.rotary_dim} ({describe(**{argument: x})})"
        )
