"""The ops: each a plain PyTorch definition, a schema, and kernels that are checked against the definition."""

from minidiff_fast.ops._query_transform import QueryNorm
from minidiff_fast.ops.broadcast_attention import (
    AttentionOutput,
    broadcast_attention,
    broadcast_attention_reference,
    draw_dropout_seed,
)
from minidiff_fast.ops.broadcast_linear import broadcast_linear, broadcast_linear_reference
from minidiff_fast.ops.broadcast_modulate import broadcast_modulate, broadcast_modulate_reference
from minidiff_fast.ops.denoising_loss import denoising_loss, denoising_loss_reference
from minidiff_fast.ops.level2_noise import Level2Noise, level2_noise, level2_noise_reference
from minidiff_fast.ops.rotary import Rotary, RotaryPositions, rotate, rotate_reference

__all__ = [
    "AttentionOutput",
    "Level2Noise",
    "QueryNorm",
    "Rotary",
    "RotaryPositions",
    "broadcast_attention",
    "broadcast_attention_reference",
    "broadcast_linear",
    "broadcast_linear_reference",
    "broadcast_modulate",
    "broadcast_modulate_reference",
    "denoising_loss",
    "denoising_loss_reference",
    "draw_dropout_seed",
    "level2_noise",
    "level2_noise_reference",
    "rotate",
    "rotate_reference",
]
