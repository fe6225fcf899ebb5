"""Small modules that models are built of."""

from minidiff_fast.nn.normalizer import MinMaxNormalizer

__all__ = ["MinMaxNormalizer"]
