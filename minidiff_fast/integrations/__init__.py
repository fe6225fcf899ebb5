"""Other people's policies on Level-2 batches: what is replaced in them, and what is left as it is.

Every module here knows its peer by interface, not by import: the peer is whatever the user has installed.
"""

from minidiff_fast.integrations.adapter import Level2Adapter
from minidiff_fast.integrations.diffusers import BroadcastAttnProcessor, apply_broadcast_attention, cached_condition
from minidiff_fast.integrations.report import ConversionReport, Left, Replaced
from minidiff_fast.integrations.torch_modules import convert, encode_memory

__all__ = [
    "BroadcastAttnProcessor",
    "ConversionReport",
    "Left",
    "Level2Adapter",
    "Replaced",
    "apply_broadcast_attention",
    "cached_condition",
    "convert",
    "encode_memory",
]
