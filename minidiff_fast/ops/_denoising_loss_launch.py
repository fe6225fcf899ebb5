"""Launches the Triton kernels of the denoising loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.kernels import denoising_loss as kernels

HIP = torch.version.hip is not None
KINDS = {"mse": 0, "l1": 1, "huber": 2}


@dataclass(frozen=True)
class LaunchConfig:
    """The tile of one program."""

    block_r: int
    """Rows (samples)."""
    block_e: int
    """Elements of a row."""
    num_warps: int


def choose_config(rows: int, size: int, *, hip: bool) -> LaunchConfig:
    """The heuristic launch configuration.

    Args:
        rows: B * K.
        size: elements of a sample, T * A.
        hip: ROCm: wavefronts of 64, so half as many.
    """
    block_e = min(512, 1 << max(size - 1, 0).bit_length())
    block_r = max(1, min(1024 // block_e, 128, 1 << max(rows - 1, 0).bit_length()))
    return LaunchConfig(block_r, block_e, 2 if hip else 4)


def _sizes(pred: Tensor) -> tuple[int, int, LaunchConfig, int]:
    """Rows, elements of a row, configuration, tiles of a row."""
    rows, size = pred.shape[0] * pred.shape[1], pred.shape[2] * pred.shape[3]
    config = choose_config(rows, size, hip=HIP)
    tiles = max(1, -(-size // config.block_e))
    if max(rows + config.block_r, size + config.block_e, -(-rows // config.block_r) * tiles) >= 2**31:
        raise InvalidArgument(
            f"denoising_loss: B * K = {rows} samples, their T * A = {size} elements and their tiles must stay below "
            "2^31; run K in chunks"
        )
    return rows, size, config, tiles


def _strides(pred: Tensor, target: Tensor, mask: Tensor | None) -> tuple[int, ...]:
    """Of pred, of target, and of the mask along B, K (0 for a mask per condition) and T."""
    if mask is None:
        return *pred.stride(), *target.stride(), 0, 0, 0
    per_sample = mask.dim() == 3
    return *pred.stride(), *target.stride(), mask.stride(0), mask.stride(1) if per_sample else 0, mask.stride(-1)


def launch_forward(pred: Tensor, target: Tensor, mask: Tensor | None, kind: str, delta: float) -> tuple[Tensor, Tensor]:
    """loss and share, [B, K] float32."""
    loss = torch.empty(pred.shape[:2], dtype=torch.float32, device=pred.device)
    share = torch.empty_like(loss)
    if loss.numel() == 0:
        return loss, share
    rows, size, config, _ = _sizes(pred)
    with torch.cuda.device_of(pred):
        kernels._denoising_loss_fwd_kernel[(-(-rows // config.block_r),)](
            pred, target, pred if mask is None else mask, loss, share, *_strides(pred, target, mask),
            rows, pred.shape[1], max(pred.shape[3], 1), size, delta, KIND=KINDS[kind], HAS_MASK=mask is not None,
            BLOCK_R=config.block_r, BLOCK_E=config.block_e, num_warps=config.num_warps, num_stages=1,
        )  # fmt: skip
    return loss, share


def launch_backward(
    dloss: Tensor, pred: Tensor, target: Tensor, mask: Tensor | None, share: Tensor, kind: str, delta: float
) -> Tensor:
    """dpred, contiguous."""
    dpred = torch.empty(pred.shape, dtype=pred.dtype, device=pred.device)
    if dpred.numel() == 0:
        return dpred
    rows, size, config, tiles = _sizes(pred)
    with torch.cuda.device_of(pred):
        kernels._denoising_loss_bwd_kernel[(-(-rows // config.block_r) * tiles,)](
            dloss.contiguous(), pred, target, pred if mask is None else mask, share, dpred,
            *_strides(pred, target, mask), rows, pred.shape[1], max(pred.shape[3], 1), size, delta, tiles,
            KIND=KINDS[kind], HAS_MASK=mask is not None,
            BLOCK_R=config.block_r, BLOCK_E=config.block_e, num_warps=config.num_warps, num_stages=1,
        )  # fmt: skip
    return dpred
