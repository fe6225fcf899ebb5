"""Normals from words: within 1e-6 of the exact ones, normally distributed, and made of the documented bits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minidiff_fast.ops.box_muller import NEAR_ONE, rounded_sqrt, standard_normals
from minidiff_fast.ops.philox import philox_4x32

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def edges() -> Tensor:
    """Words around the ends, the branch, the quarters of a turn and every power of two."""
    powers = (2.0 ** torch.linspace(0, 31.999, 20000, dtype=torch.float64)).long()
    near = torch.arange(-300, 300)
    whole = torch.cat([powers, 2**32 - powers, NEAR_ONE + near, *(i * 2**29 + near for i in range(9))])
    return whole.clamp(0, 2**32 - 1)


def words(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(0, 2**32, (count,), generator=generator) for _ in range(2))
    edge = edges()
    other = edge[torch.randperm(edge.numel(), generator=generator)]
    return torch.cat([first, edge, other]).to(DEVICE), torch.cat([second, other, edge]).to(DEVICE)


def test_within_a_millionth_of_the_exact_normals():
    first, second = words(1_000_000)
    x, y = standard_normals(first, second)
    share = first.double() / 2**32
    radius = (-2 * torch.where(share < 0.5, torch.log1p(-share), ((2**32 - first).double() / 2**32).log())).sqrt()
    angle = 2 * math.pi * (second.double() / 2**32)
    assert (x - radius * angle.cos()).abs().max() < 1e-6
    assert (y - radius * angle.sin()).abs().max() < 1e-6
    # Next to u = 1 the radius goes to 0; it must do so in steps of its own size.
    small = first < 1000
    rounded = (x.double().square() + y.double().square()).sqrt()
    torch.testing.assert_close(rounded[small], radius[small], rtol=1e-6, atol=0)


def test_tails_reach_as_far_as_32_bits_do():
    top = torch.tensor([2**32 - 1], device=DEVICE)
    x, y = standard_normals(top, torch.tensor([0], device=DEVICE))
    assert abs(x.item() - math.sqrt(2 * 32 * math.log(2))) < 1e-6 and y.item() == 0
    x, y = standard_normals(top, torch.tensor([2**31], device=DEVICE))
    assert x.item() < -6.66


def test_rounded_sqrt_is_correctly_rounded():
    """No float32 is closer: x lies between the squares of the midpoints to both neighbours (exact in float64)."""
    x = torch.rand(200_000, generator=torch.Generator().manual_seed(1)) * 50
    root = rounded_sqrt(x)
    above, below = (torch.nextafter(root, torch.tensor(bound)).double() for bound in (math.inf, 0.0))
    assert (((root + below) / 2).square() <= x.double()).all() and (x.double() <= ((root + above) / 2).square()).all()


def test_distribution():
    """2^21 normals of one seed: moments, tails and Kolmogorov-Smirnov at five standard errors of each."""
    index = torch.arange(2**19, device=DEVICE)
    w = philox_4x32(torch.tensor(2024, device=DEVICE), (index, index * 0, index * 0, index * 0 + 2))
    z = torch.stack([*standard_normals(w[0], w[1]), *standard_normals(w[2], w[3])], -1).double()
    flat = z.flatten()
    n = flat.numel()
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10395 - 225)]:
        assert abs(flat.pow(power).mean().item() - moment) < 5 * math.sqrt(variance / n), power
    for bound in (1.0, 2.0, 3.0, 4.0, 4.5):
        p = math.erfc(bound / math.sqrt(2))
        assert abs((flat.abs() > bound).double().mean().item() - p) < 5 * math.sqrt(p / n), bound
    ordered = flat.sort().values
    below = 0.5 * torch.erfc(-ordered / math.sqrt(2))
    grid = torch.arange(n + 1, device=DEVICE, dtype=torch.float64) / n
    distance = torch.maximum((below - grid[:-1]).max(), (grid[1:] - below).max()).item()
    assert distance < 1.95 / math.sqrt(n)  # 0.1 % of honest samples are beyond
    # The four of a counter, and neighbours in the stream: uncorrelated, their squares too.
    for a, b in [
        (flat[:-1], flat[1:]),
        (flat[:-4], flat[4:]),
        *((z[:, i], z[:, j]) for i in range(4) for j in range(i)),
    ]:
        assert abs((a * b).mean().item()) < 5 / math.sqrt(a.numel())
        assert abs(((a.square() - 1) * (b.square() - 1)).mean().item()) < 5 * 2 / math.sqrt(a.numel())
