"""``python bench/run.py noise``: level2_noise against its peers.

``eager`` is how policies write it: every action repeated K times, ``torch.randint``, ``torch.randn_like``, a gather and
the scheduler's arithmetic; ``expand`` is the same without the repetition; ``randn`` draws the normals and does nothing
with them. Before a time is taken, x and the target must be what the returned noise and times say, to the error budget
against float64, and the noise must have mean 0 and variance 1 within five standard errors.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import small_ops
import torch
from offline import Launch, recorded_launches
from small_ops import EPS, Contestant, why_not_ours
from torch import Tensor

STEPS = 100


@dataclass(frozen=True)
class NoiseCase:
    """One call of Level-2 noise."""

    name: str
    B: int
    K: int
    T: int
    A: int
    prediction: str = "epsilon"
    timesteps: str = "iid"
    noise: str = "iid"


CASES = {
    case.name: case
    for case in (
        NoiseCase("pusht", 64, 32, 16, 2),
        NoiseCase("pusht-v-both", 64, 32, 16, 2, "v_prediction", "stratified", "antithetic"),
        NoiseCase("minidiffuser", 100, 256, 1, 3),
        NoiseCase("smolvla-flow", 8, 32, 50, 32, "flow", "stratified"),
        NoiseCase("one-sample", 256, 1, 16, 10),
    )
}


class Prepared(NamedTuple):
    """The inputs of a cell."""

    case: NoiseCase
    x0: Tensor
    schedule: Tensor
    seed: Tensor


class Drawn(NamedTuple):
    """What a contestant makes; a contestant that only draws normals has no x."""

    x: Tensor | None
    target: Tensor | None
    timesteps: Tensor
    noise: Tensor


def prepare(case: NoiseCase, dtype: torch.dtype, device: torch.device) -> Prepared:
    """Random actions and a cosine-like schedule."""
    x0 = torch.randn(case.B, case.T, case.A, device=device).to(dtype)
    schedule = torch.cos(torch.linspace(0.01, 1.55, STEPS, device=device)).square()
    return Prepared(case, x0, schedule, torch.tensor([1234], device=device))


def ours(impl: str | None, p: Prepared) -> Drawn:
    """The op."""
    from minidiff_fast.ops import level2_noise

    case: Any = p.case
    drawn = level2_noise(
        p.x0, case.K, schedule=None if case.prediction == "flow" else p.schedule, prediction=case.prediction,
        timesteps=case.timesteps, noise=case.noise, seed=p.seed, return_noise=True, impl=impl,
    )  # fmt: skip
    assert drawn.noise is not None
    return Drawn(drawn.x, drawn.target, drawn.timesteps, drawn.noise)


def eager(repeat: bool, p: Prepared) -> Drawn:
    """torch's own draws; independent ones, whatever the case asks for."""
    case = p.case
    shape = (case.B, case.K, case.T, case.A)
    x0 = p.x0.repeat_interleave(case.K, 0).view(shape) if repeat else p.x0[:, None]
    clean = x0.float()
    eps = torch.randn(shape, device=p.x0.device)
    if case.prediction == "flow":
        t = torch.rand(case.B, case.K, device=p.x0.device)
        level = t[:, :, None, None]
        return Drawn(((1 - level) * clean + level * eps).to(p.x0.dtype), eps - clean, t, eps)
    t = torch.randint(0, STEPS, (case.B, case.K), device=p.x0.device)
    ab = p.schedule[t][:, :, None, None]
    signal, spread = ab.sqrt(), (1 - ab).sqrt()
    target = eps if case.prediction == "epsilon" else signal * eps - spread * clean
    return Drawn((signal * clean + spread * eps).to(p.x0.dtype), target, t, eps)


def randn(p: Prepared) -> Drawn:
    """The normals alone."""
    case = p.case
    noise = torch.randn(case.B, case.K, case.T, case.A, device=p.x0.device)
    return Drawn(None, None, noise[:, :, 0, 0], noise)


def contestants(device: torch.device) -> list[Contestant]:
    """Everyone who may run on this kind of device, ours first."""
    mine = [
        Contestant(
            f"ours{'' if impl is None else '-' + impl}", f"minidiff_fast.ops.level2_noise(impl={impl or 'auto'!r})",
            True, {"draw": partial(ours, impl)}, why_not_ours("level2_noise", impl),
        )
        for impl in (None, "reference")
    ]  # fmt: skip
    return [
        *mine,
        Contestant("eager", "torch, actions repeated K times", False, {"draw": partial(eager, True)}),
        Contestant("expand", "torch, actions broadcast", False, {"draw": partial(eager, False)}),
        Contestant("randn", "torch.randn of the noise's shape, and nothing else", False, {"draw": randn}),
    ]


def refusal(contestant: Contestant, p: Prepared) -> str | None:
    """None, or what is wrong with what it draws."""
    drawn: Any = contestant.passes["draw"](p)
    noise = drawn.noise.double()
    paired = contestant.ours and p.case.noise == "antithetic"
    n = noise.numel() / (2 if paired else 1)
    if abs(noise.mean().item()) > 5 / math.sqrt(n) or abs(noise.var().item() - 1) > 5 * math.sqrt(2 / n):
        return f"noise has mean {noise.mean().item():.4f} and variance {noise.var().item():.4f}"
    if drawn.x is None:
        return None
    clean, t = p.x0[:, None].double(), drawn.timesteps[:, :, None, None]
    if p.case.prediction == "flow":
        x, target = (1 - t.double()) * clean + t.double() * noise, noise - clean
    else:
        ab = p.schedule.double()[t]
        x = ab.sqrt() * clean + (1 - ab).sqrt() * noise
        target = noise if p.case.prediction == "epsilon" else ab.sqrt() * noise - (1 - ab).sqrt() * clean
    for name, want, got in (("x", x, drawn.x), ("target", target, drawn.target)):
        budget = 4 * EPS[got.dtype] * want.abs().max().item()
        error = (got.double() - want).abs().max().item()
        if not error <= budget:
            return f"{name} is off by {error:.2e} (budget {budget:.2e})"
    return None


def record(case: NoiseCase, dtype: torch.dtype, *, hip: bool) -> list[Launch]:
    """The launch of ``case`` on meta tensors."""
    from minidiff_fast.ops import _level2_noise_launch as launcher
    from minidiff_fast.ops._level2_noise_op import empty_outputs

    x0 = torch.empty(case.B, case.T, case.A, dtype=dtype, device="meta")
    schedule = None if case.prediction == "flow" else torch.empty(STEPS, device="meta")
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    was, launcher.HIP = launcher.HIP, hip
    try:
        with recorded_launches(launcher.kernels) as launches:
            launcher.launch_forward(
                x0, schedule, seed, case.K, 0, case.K, case.prediction, 1, case.timesteps == "stratified",
                case.noise == "antithetic", *empty_outputs(x0, case.K, case.prediction, True),
            )  # fmt: skip
    finally:
        launcher.HIP = was
    return launches


def run(device: torch.device, budget: float, **options: Any) -> list[dict]:
    """Verify, time and print every cell that ``budget`` seconds allow; options as :func:`small_ops.run`."""
    return small_ops.run(sys.modules[__name__], device, budget, **options)


def main(argv: list[str] | None = None) -> int:
    """Time; the exit code."""
    return small_ops.main(sys.modules[__name__], argv)
