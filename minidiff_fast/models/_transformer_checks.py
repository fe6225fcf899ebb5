"""The argument checks of TransformerForDiffusion, from metadata only: nothing here waits for the device."""

from __future__ import annotations

from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from minidiff_fast.backend import IMPLS
from minidiff_fast.errors import InvalidArgument
from minidiff_fast.shapes import check_layout, check_shape, describe

NAME = "TransformerForDiffusion"
Unshared = Literal["error", "repeat"]


def check_sizes(least: int, **sizes: int) -> None:
    """Every size is an int (no bool) and at least ``least``."""
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InvalidArgument(f"{NAME}: {name} must be an int >= {least}, got {value!r}")


def check_width(n_emb: int, n_head: int, shares: bool) -> None:
    """n_emb splits into n_head heads and into sines and cosines; the shared form has heads of 8 to 256."""
    if n_emb % n_head:
        raise InvalidArgument(f"{NAME}: n_emb must be a multiple of n_head = {n_head}, got {n_emb}")
    if n_emb % 2 or n_emb < 4:
        raise InvalidArgument(f"{NAME}: n_emb must be even and >= 4, got {n_emb}")
    if shares and not 8 <= n_emb // n_head <= 256:
        raise InvalidArgument(
            f"{NAME}: with observation tokens the head dimension n_emb / n_head must be from 8 to 256, "
            f"got {n_emb} / {n_head} = {n_emb // n_head}"
        )


def check_options(layout: str, impl: str | None, unshared: str, **dropouts: float) -> None:
    """Names are known; dropout probabilities are in [0, 1)."""
    check_layout(NAME, layout)
    if impl is not None and impl not in IMPLS:
        raise InvalidArgument(f"{NAME}: impl must be None or one of {', '.join(IMPLS)}, got {impl!r}")
    if unshared not in get_args(Unshared):
        raise InvalidArgument(f"{NAME}: unshared must be 'error' or 'repeat', got {unshared!r}")
    for name, p in dropouts.items():
        if not 0.0 <= p < 1.0:
            raise InvalidArgument(f"{NAME}: {name} must be in [0, 1), got {p!r}")


def check_form(cond_dim: int, time_as_cond: bool, obs_as_cond: bool, n_cond_layers: int) -> None:
    """The arguments that choose the form of the model do not contradict each other."""
    if obs_as_cond and cond_dim == 0:
        raise InvalidArgument(f"{NAME}: obs_as_cond=True needs cond_dim >= 1, got cond_dim = 0")
    for name, value in (("cond_dim", cond_dim), ("n_cond_layers", n_cond_layers)):
        if not time_as_cond and value > 0:
            raise InvalidArgument(
                f"{NAME}: time_as_cond=False is the encoder-only form, without observations and condition "
                f"encoder: {name} must be 0, got {value}"
            )


def check_like(argument: str, tensor: Tensor, parameter: Tensor, name: str = NAME) -> None:
    """Device and (outside autocast) dtype of an input are those of the parameters."""
    if tensor.device != parameter.device:
        raise InvalidArgument(
            f"{name}: {argument} must be on the device of the parameters, {parameter.device}, got {tensor.device}"
        )
    if tensor.dtype != parameter.dtype and not torch.is_autocast_enabled(tensor.device.type):
        raise InvalidArgument(
            f"{name}: {argument} must have the dtype of the parameters, {parameter.dtype}, got {tensor.dtype}"
        )


def check_cond(
    cond: Tensor | None,  # [B, To, Dc]
    cond_dim: int,
    n_obs_steps: int,
    parameter: Tensor,
) -> Tensor:
    """``cond``, checked; fewer observation steps than n_obs_steps use the first positions, as in the peer."""
    wanted = f"[B, To, Dc] = [B, 1..{n_obs_steps}, {cond_dim}]"
    if cond is None:
        raise InvalidArgument(f"{NAME}: cond must be {wanted}, got None")
    if cond.ndim != 3 or cond.shape[2] != cond_dim or not 1 <= cond.shape[1] <= n_obs_steps:
        raise InvalidArgument(f"{NAME}: cond must be {wanted}, got {list(cond.shape)}")
    check_like("cond", cond, parameter)
    return cond


def check_sample(
    sample: Tensor,  # [B, K, T, Da]
    timestep: Tensor,  # [B, K]
    input_dim: int,
    horizon: int,
    parameter: Tensor,
) -> None:
    """The samples and their timesteps fit the model and each other."""
    context = partial(describe, sample=sample, timestep=timestep)
    check_shape(NAME, "sample", sample, ["B", "K", "T", input_dim], "[B, K, T, Da]", context)
    batch, samples, steps = sample.shape[:3]
    if not 1 <= steps <= horizon:
        raise InvalidArgument(f"{NAME}: sample must have 1 <= T <= horizon = {horizon}, got T = {steps} ({context()})")
    check_like("sample", sample, parameter)
    check_shape(NAME, "timestep", timestep, [batch, samples], "[B, K]", context)
    if timestep.device != sample.device:
        raise InvalidArgument(
            f"{NAME}: timestep must be on the device of sample, {sample.device}, got {timestep.device}"
        )


def row_timesteps(
    timestep: Tensor | float | int,  # a number, [], [1] or [N]
    sample: Tensor,  # [N, ...]
    name: str = NAME,
) -> Tensor:  # [N]
    """The timestep of every row; a Python number or a 0-d tensor (of any device) holds for all rows."""
    rows = sample.shape[0]
    if not isinstance(timestep, Tensor):
        if int(timestep) != timestep:
            raise InvalidArgument(
                f"{name}: timestep given as a Python number must be whole (others go in a floating tensor), "
                f"got {timestep!r}"
            )
        return torch.full((rows,), int(timestep), dtype=torch.long, device=sample.device)
    if timestep.ndim == 0:
        return timestep.to(sample.device).expand(rows)
    if tuple(timestep.shape) not in ((1,), (rows,)):
        raise InvalidArgument(
            f"{name}: timestep must be a scalar or [N] = [{rows}], got {list(timestep.shape)} "
            f"({describe(sample=sample)})"
        )
    return timestep.expand(rows)
