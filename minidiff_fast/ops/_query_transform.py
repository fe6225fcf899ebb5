"""What happens to queries (and own keys) between memory and their product: norm per head, then rotary."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.ops.rotary import RotaryPositions, check_positions, check_rotary, rotate, rotate_reference
from minidiff_fast.shapes import check_shape


class QueryNorm(NamedTuple):
    """A norm of every query head over its D channels, before rotary; keys are normed before they come."""

    kind: Literal["layer", "rms"]
    """``layer``: (q - mean) / sqrt(variance + eps); ``rms``: q / sqrt(mean(q^2) + eps)."""
    weight: Tensor | None = None
    """[D], any floating dtype; None for 1."""
    bias: Tensor | None = None
    """[D], any floating dtype; None for 0."""
    eps: float = 1e-5


class QueryTransform(NamedTuple):
    """Norm and rotary together, as the launch modules take them."""

    rope: RotaryPositions | None = None
    q_norm: QueryNorm | None = None


def transformed_reference(
    q: Tensor,  # [B, K, T, H, D]
    own_k: Tensor | None,  # [B, K, P, Hkv, D]
    rope: RotaryPositions | None,
    q_norm: QueryNorm | None,
    *,
    lean: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """q normed and rotated, own_k rotated: in float32 (float64 for float64), rounded once at the end.

    ``lean``: autograd keeps positions instead of cosines, and differentiates the rotation by its inverse.
    """
    turn = rotate if lean else rotate_reference
    dtype = torch.promote_types(q.dtype, torch.float32)
    out = q
    if q_norm is not None:
        wide = q.to(dtype)
        if q_norm.kind == "layer":
            wide = wide - wide.mean(-1, keepdim=True)
        out = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + q_norm.eps)
        out = out if q_norm.weight is None else out * q_norm.weight.to(dtype)
        out = out if q_norm.bias is None else out + q_norm.bias.to(dtype)
    if rope is not None:
        out = turn(out, rope.q_positions, rope.rotary)
        if own_k is not None and rope.own_positions is not None:
            own_k = turn(own_k, rope.own_positions, rope.rotary)
    return out.to(q.dtype), own_k


def check_transform(
    function: str,
    q: Tensor,
    own_k: Tensor | None,
    kv_heads: int,
    rope: RotaryPositions | None,
    q_norm: QueryNorm | None,
    context: Callable[[], str],
) -> None:
    """Every check of ``rope`` and ``q_norm``, from metadata only."""
    if rope is not None:
        _check_rope(function, q, own_k, kv_heads, rope, context)
    if q_norm is None:
        return
    if not isinstance(q_norm, QueryNorm):
        raise InvalidArgument(f"{function}: q_norm must be a QueryNorm, got {type(q_norm).__name__}")
    if q_norm.kind not in ("layer", "rms"):
        raise InvalidArgument(f"{function}: q_norm.kind must be 'layer' or 'rms', got {q_norm.kind!r}")
    if not isinstance(q_norm.eps, (int, float)) or not math.isfinite(q_norm.eps) or q_norm.eps < 0:
        raise InvalidArgument(f"{function}: q_norm.eps must be a finite number of at least 0, got {q_norm.eps!r}")
    if rope is not None and rope.rotary.full_width:
        raise InvalidArgument(
            f"{function}: q_norm is per head, and full_width rotates across heads; norm q before, or rotate per head"
        )
    for name in ("weight", "bias"):
        parameter = getattr(q_norm, name)
        if parameter is None:
            continue
        check_shape(function, f"q_norm.{name}", parameter, [q.shape[-1]], "[D]", context)
        if not parameter.is_floating_point() or parameter.device != q.device:
            raise InvalidArgument(
                f"{function}: q_norm.{name} must be a floating-point tensor on {q.device}, "
                f"got {parameter.dtype} on {parameter.device}"
            )


def _check_rope(
    function: str,
    q: Tensor,
    own_k: Tensor | None,
    kv_heads: int,
    rope: RotaryPositions,
    context: Callable[[], str],
) -> None:
    if not isinstance(rope, RotaryPositions):
        raise InvalidArgument(f"{function}: rope must be a RotaryPositions, got {type(rope).__name__}")
    check_rotary(function, rope.rotary, "q", q)
    if rope.rotary.full_width and kv_heads != q.shape[3]:
        raise InvalidArgument(
            f"{function}: full_width rotates across heads and needs Hkv = H = {q.shape[3]}, "
            f"got Hkv = {kv_heads} ({context()})"
        )
    check_positions(
        function, "rope.q_positions", rope.q_positions, rope.rotary, tuple(q.shape[:3]), "[B, K, T]", q.device
    )
    if rope.own_positions is None:
        return
    if own_k is None:
        raise InvalidArgument(f"{function}: rope.own_positions came without own_k")
    check_positions(
        function, "rope.own_positions", rope.own_positions, rope.rotary, tuple(own_k.shape[:3]), "[B, K, P]", q.device
    )
