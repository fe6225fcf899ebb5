"""Philox-4x32-10 (Salmon et al., 2011) in plain PyTorch: the random bits that every implementation agrees on."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_ROUND = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def dropout_threshold(dropout_p: float) -> int:
    """A 32-bit word below this drops its weight, in every implementation."""
    return round(dropout_p * 2**32)


def _multiply(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32-bit words of ``constant * x``, x in [0, 2^32) held as int64 (a plain product overflows)."""
    low_product = constant * (x & 0xFFFF)
    high_product = constant * (x >> 16) + (low_product >> 16)
    return high_product >> 16, ((high_product & 0xFFFF) << 16) | (low_product & 0xFFFF)


def philox_4x32(
    seed: Tensor,  # [] or [1] int64
    counter: tuple[Tensor, Tensor, Tensor, Tensor],  # four broadcastable int64 tensors in [0, 2^32)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox-4x32: four 32-bit words, as int64 in [0, 2^32), for every counter.

    >>> zero = torch.zeros((), dtype=torch.int64)
    >>> [hex(int(word)) for word in philox_4x32(zero, (zero, zero, zero, zero))]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = seed.reshape(()) & _MASK, (seed.reshape(()) >> 32) & _MASK
    for _ in range(10):
        high0, low0 = _multiply(_ROUND[0], c0)
        high1, low1 = _multiply(_ROUND[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3
