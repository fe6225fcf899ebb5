"""The ops: each a plain PyTorch definition, a schema, and kernels that are checked against the definition."""

from minidiff_fast.ops.broadcast_attention import (
    AttentionOutput,
    broadcast_attention,
    broadcast_attention_reference,
    draw_dropout_seed,
)
from minidiff_fast.ops.broadcast_modulate import broadcast_modulate, broadcast_modulate_reference

__all__ = [
    "AttentionOutput",
    "broadcast_attention",
    "broadcast_attention_reference",
    "broadcast_modulate",
    "broadcast_modulate_reference",
    "draw_dropout_seed",
]
