"""The ops: each a plain PyTorch definition, a schema, and kernels that are checked against the definition."""

from minidiff_fast.ops._query_transform import QueryNorm
from minidiff_fast.ops.broadcast_attention import (
    AttentionOutput,
    broadcast_attention,
    broadcast_attention_reference,
    draw_dropout_seed,
)
from minidiff_fast.ops.broadcast_modulate import broadcast_modulate, broadcast_modulate_reference
from minidiff_fast.ops.rotary import Rotary, RotaryPositions, rotate, rotate_reference

__all__ = [
    "AttentionOutput",
    "QueryNorm",
    "Rotary",
    "RotaryPositions",
    "broadcast_attention",
    "broadcast_attention_reference",
    "broadcast_modulate",
    "broadcast_modulate_reference",
    "draw_dropout_seed",
    "rotate",
    "rotate_reference",
]
