"""Calls the native kernel of Level-2 noise: plain pointers and sizes through ctypes."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from minidiff_fast import native
from minidiff_fast.errors import BackendUnavailable, InvalidArgument

FLOW_STEPS = 2**24


@cache
def _function() -> Any:
    library = native.load()
    if library is None:
        raise BackendUnavailable(f"level2_noise: {native.why_missing()}")
    pointer, wide, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    return library.function(
        "minidiff_fast_level2_noise",
        [pointer, pointer, wide, pointer, *[wide] * 5, *[integer] * 4, *[pointer] * 4, integer, integer],
    )


def launch_forward(
    x0: Tensor, schedule: Tensor | None, seed: Tensor, num_samples: int, sample_offset: int, total_samples: int,
    prediction: str, noise_at: int, stratified: bool, antithetic: bool,
    x: Tensor, noise: Tensor, target: Tensor, times: Tensor,
) -> None:  # fmt: skip
    """Fill x, times, and of noise and target those that have elements."""
    clean = x0.to(torch.float32).contiguous()  # K times smaller than what comes out
    schedule = None if schedule is None else schedule.contiguous()
    status = _function()(
        clean.data_ptr(), _address(schedule), FLOW_STEPS if schedule is None else schedule.numel(), seed.data_ptr(),
        x0.shape[0], num_samples, x0.shape[1] * x0.shape[2], sample_offset, total_samples,
        noise_at, stratified, antithetic, x.dtype == torch.bfloat16,
        x.data_ptr(), _address(noise), _address(target), times.data_ptr(),
        torch.get_num_threads(), native.portable_simd(),
    )  # fmt: skip
    if status != 0:
        raise InvalidArgument(f"level2_noise: the native kernel refused its arguments (status {status})")


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None or tensor.numel() == 0 else tensor.data_ptr()
