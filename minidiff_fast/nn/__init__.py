"""Small modules that models are built of."""

from minidiff_fast.nn._modulation import Modulation
from minidiff_fast.nn.adaln import AdaLN
from minidiff_fast.nn.broadcast_linear import BroadcastLinear
from minidiff_fast.nn.film import FiLM
from minidiff_fast.nn.normalizer import MinMaxNormalizer

__all__ = ["AdaLN", "BroadcastLinear", "FiLM", "MinMaxNormalizer", "Modulation"]
