"""Small modules that models are built of."""

from minidiff_fast.nn._modulation import Modulation
from minidiff_fast.nn.adaln import AdaLN
from minidiff_fast.nn.broadcast_cross_attention import BroadcastCrossAttention
from minidiff_fast.nn.broadcast_linear import BroadcastLinear
from minidiff_fast.nn.condition_cache import ConditionCache, LayerCache
from minidiff_fast.nn.film import FiLM
from minidiff_fast.nn.normalizer import MinMaxNormalizer
from minidiff_fast.nn.rotary import Rotary1D, Rotary3D
from minidiff_fast.nn.shared_prefix_attention import SharedPrefixAttention, SharedPrefixOutput

__all__ = [
    "AdaLN",
    "BroadcastCrossAttention",
    "BroadcastLinear",
    "ConditionCache",
    "FiLM",
    "LayerCache",
    "MinMaxNormalizer",
    "Modulation",
    "Rotary1D",
    "Rotary3D",
    "SharedPrefixAttention",
    "SharedPrefixOutput",
]
