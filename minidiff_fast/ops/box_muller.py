"""Standard normals from random bits, the same to the last bit in every implementation.

Box-Muller on two 32-bit words, from float32 additions, subtractions, multiplications, comparisons, integer operations
and correctly rounded square roots in a fixed order, none of them fused: whoever follows the order gets these bits.
The Triton kernels and the native library repeat the arithmetic and the constants; tests compare them bit by bit.

Source: Box and Muller, "A note on the generation of random normal deviates", 1958.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEAR_ONE = 1257966796
"""floor((1 - sqrt(1/2)) * 2^32): words below it stand for a u above sqrt(1/2)."""
SQRT_2 = 1.41421354
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194442e-4
"""ln 2 in two parts; products of the first with a small integer are exact."""
LOG = (
    0.333333313, -0.250008196, 0.200012267, -0.16623357, 0.142017573, -0.131601825, 0.12761578, -0.076344974,
)  # fmt: skip
"""(ln(1 + f) - f + f^2 / 2) / f^3 on [sqrt(1/2) - 1, sqrt(2) - 1]; ln(1 + f) within a relative 6e-9."""
SIN = (-0.16666655, 8.33216e-3, -1.9515284e-4)
"""(sin(g) - g) / g^3 in powers of g^2 on [-pi/4, pi/4]; sin(g) within a relative 4e-9."""
COS = (4.1666646e-2, -1.3887368e-3, 2.4438452e-5)
"""(cos(g) - 1 + g^2 / 2) / g^4 in powers of g^2 on [-pi/4, pi/4]; cos(g) within 1e-10."""
RADIANS = 1.46291812e-9
"""2 pi / 2^32."""


def rounded_sqrt(x: Tensor) -> Tensor:
    """The correctly rounded square root of a float32 tensor; ``Tensor.sqrt`` on a CPU may miss it by one unit.

    >>> rounded_sqrt(torch.tensor([4.0, 2.0])).tolist()
    [2.0, 1.4142135381698608]
    """
    # The root of a float32 is never so close to a midpoint of two float32 that float64's error could matter.
    return x.double().sqrt().float()


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    value = coefficients[-1] * x + coefficients[-2]
    for coefficient in coefficients[-3::-1]:
        value = value * x + coefficient
    return value


def _radius(word: Tensor) -> Tensor:
    """sqrt(-2 ln u), u = 1 - word / 2^32 in (0, 1]."""
    # Next to u = 1 the distance to 1 is what a float can hold; elsewhere u itself is, as 2^exponent (1 + f).
    near_one = word < NEAR_ONE
    bits = (2**32 - word).to(torch.float32).view(torch.int32)
    exponent = (bits >> 23) - 159
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).view(torch.float32)
    high = mantissa > SQRT_2
    mantissa = torch.where(high, mantissa * 0.5, mantissa)
    exponent = torch.where(near_one, 0, exponent + high).to(torch.float32)
    f = torch.where(near_one, word.to(torch.float32) * -(2.0**-32), mantissa - 1.0)
    square = f * f
    log = square * f * _polynomial(f, LOG)
    log = log + exponent * LN2_LOW
    log = log - square * 0.5
    log = log + f
    log = log + exponent * LN2_HIGH
    return rounded_sqrt(log * -2.0)


def standard_normals(
    first: Tensor,  # int64 words in [0, 2^32)
    second: Tensor,  # int64 words in [0, 2^32), the shape of first
) -> tuple[Tensor, Tensor]:
    """Two independent standard normals, float32, for every pair of independent uniform 32-bit words.

    ``sqrt(-2 ln u) * (cos v, sin v)`` with ``u = 1 - first / 2^32`` and ``v = 2 pi second / 2^32``, within 1e-6 of the
    exact value for these words. No normal is beyond 6.67.

    >>> zero = torch.zeros((), dtype=torch.int64)
    >>> standard_normals(zero, zero)[0].item() == 0.0
    True
    """
    radius = _radius(first)
    # The nearest multiple of a quarter turn, and what is left of the angle.
    quarter = ((second + 2**29) >> 30) & 3
    rest = second - (((second + 2**29) >> 30) << 30)
    g = rest.to(torch.float32) * RADIANS
    square = g * g
    sin = square * g * _polynomial(square, SIN) + g
    cos = square * square * _polynomial(square, COS) - square * 0.5 + 1.0
    odd = (quarter & 1) == 1
    x = torch.where(odd, sin, cos)
    y = torch.where(odd, cos, sin)
    x = torch.where(((quarter + 1) & 2) == 2, -x, x)
    y = torch.where((quarter & 2) == 2, -y, y)
    return radius * x, radius * y
