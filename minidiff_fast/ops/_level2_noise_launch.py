"""Launches the Triton kernel of Level-2 noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.kernels import level2_noise as kernels

HIP = torch.version.hip is not None
FLOW_STEPS = 2**24


@dataclass(frozen=True)
class LaunchConfig:
    """The tile of one program."""

    block_r: int
    """Rows (samples)."""
    block_q: int
    """Blocks of four elements."""
    num_warps: int


def choose_config(rows: int, size: int, *, hip: bool) -> LaunchConfig:
    """The heuristic launch configuration.

    Args:
        rows: B * K.
        size: elements of a sample, T * A.
        hip: ROCm: wavefronts of 64, so half as many.
    """
    block_q = min(64, 1 << max(-(-size // 4) - 1, 0).bit_length())
    block_r = max(1, min(256 // block_q, 1 << max(rows - 1, 0).bit_length()))
    return LaunchConfig(block_r, block_q, 2 if hip else 4)


def launch_forward(
    x0: Tensor, schedule: Tensor | None, seed: Tensor, num_samples: int, sample_offset: int, total_samples: int,
    prediction: str, noise_at: int, stratified: bool, antithetic: bool,
    x: Tensor, noise: Tensor, target: Tensor, times: Tensor,
) -> None:  # fmt: skip
    """Fill x, times, and of noise and target those that have elements."""
    rows, size = x0.shape[0] * num_samples, x0.shape[1] * x0.shape[2]
    if rows == 0:
        return
    config = choose_config(rows, size, hip=HIP)
    # Without elements one tile still writes the times.
    tiles = max(1, -(-size // (4 * config.block_q)))
    programs = -(-rows // config.block_r) * tiles
    if max(programs, rows + config.block_r, size + 4 * config.block_q) >= 2**31:
        raise InvalidArgument(
            f"level2_noise: B * K = {rows} samples, their T * A = {size} elements and their {programs} tiles must stay "
            "below 2^31; run K in chunks"
        )
    schedule = None if schedule is None else schedule.contiguous()
    with torch.cuda.device_of(x0):
        kernels._level2_noise_fwd_kernel[(programs,)](
            x0, x0 if schedule is None else schedule, seed, x, noise, target, times,
            *x0.stride(), rows, num_samples, total_samples, sample_offset, size, max(x0.shape[2], 1),
            FLOW_STEPS if schedule is None else schedule.numel(), tiles,
            FLOW=schedule is None, NOISE_AT_ONE=noise_at == 1, STRATIFIED=stratified, ANTITHETIC=antithetic,
            WANT_NOISE=noise.numel() > 0, WANT_TARGET=target.numel() > 0,
            BLOCK_R=config.block_r, BLOCK_Q=config.block_q, num_warps=config.num_warps, num_stages=1,
            enable_fp_fusion=False,
        )  # fmt: skip
