"""Rotary position embeddings as modules: the recipe, and what turns positions into arguments of attention."""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import Tensor, nn

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.ops import Rotary, RotaryPositions, rotate


class RotaryModule(nn.Module):
    """A recipe and a unit of length; nothing of it is learnt, stored or as large as the tokens.

    Queries and a sample's own keys are rotated where attention reads them, from the positions that :meth:`forward`
    hands over; shared keys are rotated once per condition by :meth:`rotate`.
    """

    def __init__(self, recipe: Rotary, scale: float = 1.0) -> None:
        if not (isinstance(scale, (int, float)) and math.isfinite(scale) and scale > 0):
            raise InvalidArgument(f"{type(self).__name__}: scale must be a finite number above 0, got {scale!r}")
        super().__init__()
        self.recipe = recipe
        self.scale = float(scale)

    def forward(
        self,
        q_positions: Tensor,  # [B, K, T, 3]; [B, K, T] in one dimension
        own_positions: Tensor | None = None,  # [B, K, P, 3]; [B, K, P]
    ) -> RotaryPositions:
        """What ``broadcast_attention`` takes as ``rope``."""
        own = None if own_positions is None else self._scaled(own_positions)
        return RotaryPositions(self.recipe, self._scaled(q_positions), own)

    def rotate(
        self,
        x: Tensor,  # [..., H, D]
        positions: Tensor,  # [..., 3]; [...] in one dimension
    ) -> Tensor:  # [..., H, D]
        """``x`` rotated to its positions; autograd keeps the positions alone."""
        return rotate(x, self._scaled(positions), self.recipe)

    def check_heads(self, function: str, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        """Raise :class:`InvalidArgument` unless heads of this number and width can be rotated."""
        recipe = self.recipe
        if recipe.full_width:
            if num_kv_heads != num_heads:
                raise InvalidArgument(
                    f"{function}: rotary with full_width turns channels across heads and needs num_kv_heads = "
                    f"num_heads = {num_heads}, got {num_kv_heads}"
                )
            if recipe.rotary_dim != num_heads * head_dim:
                raise InvalidArgument(
                    f"{function}: rotary with full_width must have rotary_dim = H * D = {num_heads} * {head_dim} = "
                    f"{num_heads * head_dim}, got {recipe.rotary_dim}"
                )
        elif recipe.rotary_dim > head_dim:
            raise InvalidArgument(
                f"{function}: rotary must have rotary_dim of at most the head dimension {head_dim}, "
                f"got {recipe.rotary_dim}"
            )

    def extra_repr(self) -> str:
        recipe = self.recipe
        wide = ", full_width=True" if recipe.full_width else ""
        return f"{recipe.rotary_dim}, base={recipe.base:g}, style={recipe.style!r}, scale={self.scale:g}{wide}"

    def _scaled(self, positions: Tensor) -> Tensor:
        return positions if self.scale == 1.0 else positions * self.scale


class Rotary3D(RotaryModule):
    r"""Rotary position embedding of points in space.

    The first ``rotary_dim`` channels of a head fall into three equal blocks of width w for x, y and z; pair i of a
    block turns by

    .. math::
        \theta = scale \cdot position_{axis} \cdot base^{-2i/w} \text{ radians}

    so that attention sees differences of positions. The positions are metres; ``scale`` is the turn of the fastest
    pair in radians per metre. Its wavelength, 2 pi / scale metres, should exceed no detail that matters: with the
    default of 1 (that of 3D Diffuser Actor) a whole table top turns the fastest pair by less than one round.

    Args:
        rotary_dim: channels that turn, a multiple of 6: at most D, or all H * D with ``full_width``.
        base: how fast the turn slows from pair to pair.
        style: "interleaved" pairs channels 2i and 2i + 1 of a block, "half" pairs i and i + w/2.
        full_width: channels are counted over all heads, h * D + d, so that pairs may straddle heads: the rotation of
            3D Diffuser Actor (120 channels in 8 heads of 15). See :meth:`across_heads`.
        scale: radians per metre of the fastest pair.

    Raises :class:`InvalidArgument` for values that make no rotation.

    Source: RoFormer (Su et al., arXiv 2104.09864), in space 3D Diffuser Actor (Ke et al., arXiv 2402.10885).

    >>> Rotary3D.for_heads(64)
    Rotary3D(60, base=10000, style='interleaved', scale=1)
    >>> Rotary3D.across_heads(num_heads=8, head_dim=15)
    Rotary3D(120, base=10000, style='interleaved', scale=1, full_width=True)
    """

    def __init__(
        self,
        rotary_dim: int,
        *,
        base: float = 10000.0,
        style: Literal["interleaved", "half"] = "interleaved",
        full_width: bool = False,
        scale: float = 1.0,
    ) -> None:
        super().__init__(Rotary(3, rotary_dim, base, style, full_width), scale)

    @classmethod
    def for_heads(cls, head_dim: int, **options: Any) -> Rotary3D:
        """As many channels of a head as split into pairs for three axes: the largest multiple of 6."""
        if head_dim < 6:
            raise InvalidArgument(f"Rotary3D.for_heads: head_dim must be at least 6, got {head_dim}")
        return cls(head_dim - head_dim % 6, **options)

    @classmethod
    def across_heads(cls, num_heads: int, head_dim: int, **options: Any) -> Rotary3D:
        """All H * D channels, before they split into heads."""
        return cls(num_heads * head_dim, full_width=True, **options)


class Rotary1D(RotaryModule):
    """Rotary position embedding of token indices or times: :class:`Rotary3D` with one coordinate.

    Args:
        rotary_dim: channels that turn, even, at most D (or H * D with ``full_width``).
        base, style, full_width: see :class:`Rotary3D`; Llama, PaliGemma and pi0 use "half".
        scale: radians per unit of the position of the fastest pair.

    >>> Rotary1D(64, style="half")
    Rotary1D(64, base=10000, style='half', scale=1)
    """

    def __init__(
        self,
        rotary_dim: int,
        *,
        base: float = 10000.0,
        style: Literal["interleaved", "half"] = "interleaved",
        full_width: bool = False,
        scale: float = 1.0,
    ) -> None:
        super().__init__(Rotary(1, rotary_dim, base, style, full_width), scale)


def rotary_module(function: str, rotary: RotaryModule | Rotary | None) -> RotaryModule | None:
    """A module for a module or a bare recipe; None stays None."""
    if rotary is None or isinstance(rotary, RotaryModule):
        return rotary
    if not isinstance(rotary, Rotary):
        raise InvalidArgument(
            f"{function}: rotary must be a Rotary3D, Rotary1D, Rotary or None, got {type(rotary).__name__}"
        )
    kind = Rotary3D if rotary.axes == 3 else Rotary1D
    return kind(rotary.rotary_dim, base=rotary.base, style=rotary.style, full_width=rotary.full_width)
