"""Schema and fake of ``minidiff_fast::level2_noise_fwd``; kernels load when it runs. There is no gradient."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

LAUNCHERS = {"triton": "launch", "native": "native"}
"""Per implementation the end of the name of the module with its ``launch_forward``."""


def level2_noise_eager(
    x0: Tensor,  # [B, T, A]
    schedule: Tensor | None,  # [steps]
    seed: Tensor,  # [1]
    num_samples: int,
    sample_offset: int,
    total_samples: int,
    prediction: str,
    noise_at: int,
    stratified: bool,
    antithetic: bool,
    want_noise: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, noise (or empty), target (empty for epsilon and sample, which have it already), each [B, K, T, A]; times."""
    module = importlib.import_module(f"minidiff_fast.ops._level2_noise_{LAUNCHERS[impl]}")
    outputs = empty_outputs(x0, num_samples, prediction, want_noise)
    module.launch_forward(
        x0, schedule, seed, num_samples, sample_offset, total_samples, prediction, noise_at, stratified, antithetic,
        *outputs,
    )  # fmt: skip
    return outputs


def empty_outputs(
    x0: Tensor, num_samples: int, prediction: str, want_noise: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four outputs, not filled; what is not wanted has no elements."""
    shape = (x0.shape[0], num_samples, *x0.shape[1:])
    x = x0.new_empty(shape)
    noise = x0.new_empty(shape if want_noise else (0,), dtype=torch.float32)
    target = x0.new_empty(shape if prediction in ("v_prediction", "flow") else (0,), dtype=torch.float32)
    times = x0.new_empty(shape[:2], dtype=torch.float32 if prediction == "flow" else torch.int64)
    return x, noise, target, times


level2_noise_fwd = torch.library.custom_op("minidiff_fast::level2_noise_fwd", level2_noise_eager, mutates_args=())


@level2_noise_fwd.register_fake
def _(  # type: ignore[no-untyped-def]
    x0, schedule, seed, num_samples, sample_offset, total_samples, prediction, noise_at, stratified, antithetic,
    want_noise, impl,
):  # fmt: skip
    return empty_outputs(x0, num_samples, prediction, want_noise)
