"""The argument checks of ConditionalUnet1D, from metadata only: nothing here waits for the device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from minidiff_fast.backend import IMPLS
from minidiff_fast.errors import InvalidArgument
from minidiff_fast.models._transformer_checks import check_like, row_timesteps
from minidiff_fast.shapes import check_layout, check_shape, describe, samples_per_condition

__all__ = [
    "NAME",
    "check_cache",
    "check_constructor",
    "check_global",
    "check_local",
    "check_rows",
    "check_sample",
    "row_timesteps",
]

NAME = "ConditionalUnet1D"
FINAL_GROUPS = 8
"""Groups of the norm of the last block, whatever n_groups is."""


def check_constructor(
    dims: tuple[int, ...],
    kernel_size: int,
    n_groups: int,
    step_dim: int,
    layout: str,
    impl: str | None,
    **sizes: int | None,
) -> None:
    """The arguments make a model; ``sizes`` are at least 1 or, but for input_dim, None."""
    check_layout(NAME, layout)
    if impl is not None and impl not in IMPLS:
        raise InvalidArgument(f"{NAME}: impl must be None or one of {', '.join(IMPLS)}, got {impl!r}")
    for name, value in {**sizes, "n_groups": n_groups, "kernel_size": kernel_size}.items():
        absent = value is None and name not in ("input_dim", "n_groups", "kernel_size")
        if not absent and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise InvalidArgument(f"{NAME}: {name} must be an int >= 1, got {value!r}")
    if kernel_size % 2 == 0:
        raise InvalidArgument(f"{NAME}: kernel_size must be odd, so that blocks keep T, got {kernel_size}")
    if step_dim < 4 or step_dim % 2:
        raise InvalidArgument(f"{NAME}: diffusion_step_embed_dim must be even and at least 4, got {step_dim}")
    if not dims or any(dim < 1 or dim % n_groups for dim in dims):
        raise InvalidArgument(
            f"{NAME}: down_dims must be one or more multiples of n_groups = {n_groups}, got {list(dims)}"
        )
    if dims[0] % FINAL_GROUPS:
        raise InvalidArgument(
            f"{NAME}: down_dims[0] must be a multiple of {FINAL_GROUPS}, the groups of the last block, got {dims[0]}"
        )


def check_rows(
    sample: Tensor,  # [N, T, Da]
    local_cond: Tensor | None,  # [B or N, T, Dl]
    global_cond: Tensor | None,  # [B, G]
    input_dim: int,
) -> tuple[int, bool]:
    """B of flattened arguments, and whether the local condition has rows of its own for every sample."""
    context = partial(describe, sample=sample, local_cond=local_cond, global_cond=global_cond)
    check_shape(NAME, "sample", sample, ["N", "T", input_dim], "[N, T, Da]", context)
    rows = sample.shape[0]
    conditions = [t.shape[0] for t in (global_cond, local_cond) if t is not None and t.ndim > 0]
    batch = conditions[0] if conditions else rows
    if batch != rows:
        samples_per_condition(NAME, rows, batch)
    if local_cond is not None and local_cond.shape[0] not in (batch, rows):
        raise InvalidArgument(
            f"{NAME}: local_cond must have B = {batch} rows, as global_cond, or N = {rows}, as sample, "
            f"got {local_cond.shape[0]} ({context()})"
        )
    return batch, local_cond is not None and local_cond.shape[0] != batch


def check_global(global_cond: Tensor | None, global_cond_dim: int | None, parameter: Tensor) -> None:
    """The global condition is there if and only if the model has one."""
    if global_cond_dim is None:
        if global_cond is not None:
            raise InvalidArgument(
                f"{NAME}: global_cond must be None for a model with global_cond_dim = None, "
                f"got {list(global_cond.shape)}"
            )
        return
    if global_cond is None:
        raise InvalidArgument(f"{NAME}: global_cond must be [B, G] = [B, {global_cond_dim}], got None")
    check_shape(
        NAME, "global_cond", global_cond, ["B", global_cond_dim], "[B, G]", partial(describe, global_cond=global_cond)
    )
    check_like("global_cond", global_cond, parameter, NAME)


def check_local(
    local_cond: Tensor,  # [*leading, T, Dl]
    local_cond_dim: int | None,
    leading: Sequence[int | None],
    parameter: Tensor,
    sample: Tensor | None = None,  # [B, K, T, Da]
) -> None:
    """The local condition fits the model and, where given, the sample."""
    if local_cond_dim is None:
        raise InvalidArgument(
            f"{NAME}: local_cond must be None for a model with local_cond_dim = None, got {list(local_cond.shape)}"
        )
    letters = "[B, T, Dl]" if len(leading) == 1 else "[B, K, T, Dl]"
    tokens: int | str = "T" if sample is None else sample.shape[2]
    expected = [*("B" if size is None else size for size in leading), tokens, local_cond_dim]
    check_shape(NAME, "local_cond", local_cond, expected, letters, partial(describe, sample=sample))
    check_like("local_cond", local_cond, parameter, NAME)


def check_sample(
    sample: Tensor,  # [B, K, T, Da]
    timestep: Tensor,  # [B, K]
    input_dim: int,
    multiple: int,
    parameter: Tensor,
) -> None:
    """The samples and their timesteps fit the model and each other."""
    context = partial(describe, sample=sample, timestep=timestep)
    check_shape(NAME, "sample", sample, ["B", "K", "T", input_dim], "[B, K, T, Da]", context)
    batch, samples, steps = sample.shape[:3]
    if steps < 1 or steps % multiple:
        raise InvalidArgument(
            f"{NAME}: sample must have T a positive multiple of 2 ** (len(down_dims) - 1) = {multiple}, as the "
            f"tokens are halved on the way down, got T = {steps} ({context()})"
        )
    check_like("sample", sample, parameter, NAME)
    check_shape(NAME, "timestep", timestep, [batch, samples], "[B, K]", context)
    if timestep.dtype == torch.bool or timestep.is_complex():
        raise InvalidArgument(f"{NAME}: timestep must be integer or floating, got {timestep.dtype}")
    if timestep.device != sample.device:
        raise InvalidArgument(
            f"{NAME}: timestep must be on the device of sample, {sample.device}, got {timestep.device}"
        )


def check_cache(
    film: tuple[Tensor, ...],
    local: tuple[Tensor, ...],
    blocks: int,
    tokens: int | None,
    sample: Tensor,  # [B, K, T, Da]
    local_cond: Tensor | None,  # [B, K, T, Dl]
) -> None:
    """The cache is one of this model and belongs to the samples."""
    if len(film) != blocks or len(local) not in (0, 2):
        raise InvalidArgument(
            f"{NAME}: cache must come from encode() of this model and hold {blocks} modulations, got {len(film)}"
        )
    batch = sample.shape[0]
    for held in (*film, *local):
        if held.shape[0] != batch:
            raise InvalidArgument(f"{NAME}: cache must hold B = {batch} conditions, as sample, got {held.shape[0]}")
    if tokens is not None and tokens != sample.shape[2]:
        raise InvalidArgument(
            f"{NAME}: the local condition in cache must have T = {sample.shape[2]} tokens, as sample, got {tokens}"
        )
    if local and local_cond is not None:
        raise InvalidArgument(f"{NAME}: local_cond must be given to encode() or to denoise(), not to both")
