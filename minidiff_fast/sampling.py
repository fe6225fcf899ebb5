"""Sampling with a cached condition: the observation is encoded once, whatever the number of samples and steps."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.nn.condition_cache import held_conditions
from minidiff_fast.policy import Policy


@torch.no_grad()
def sample_actions(
    policy: Policy,
    obs: Any,
    scheduler: Any,
    *,
    num_inference_steps: int,
    shape: tuple[int, int],
    k: int = 1,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # [B, K, T, A], normalised
    """Draw K action sequences for each of B observations with a diffusers scheduler.

    Args:
        policy: encodes once, then denoises ``num_inference_steps`` times.
        obs: what ``policy.encode`` takes, every tensor with leading dimension B.
        scheduler: a diffusers scheduler (``set_timesteps``, ``scale_model_input``, ``step``), e.g. DDIMScheduler or
            FlowMatchEulerDiscreteScheduler, with the schedule and prediction type of training (for the latter:
            ``FlowMatching(noise_at=1)`` with its ``num_train_timesteps`` as ``timestep_scale``). Its state is reset.
        num_inference_steps: denoising steps.
        shape: (T, A), action tokens and action dimension.
        k: samples per observation.
        generator: the only source of randomness. On the CPU it gives one stream on every device.
        dtype: of the sample handed to the policy.

    Raises:
        InvalidArgument: k < 1, num_inference_steps < 1, more steps than the scheduler was trained with, a policy in
            training mode, or a cache whose parts differ in B.
    """
    if k < 1:
        raise InvalidArgument(f"sample_actions: k, the samples per observation, must be at least 1, got {k}")
    trained = scheduler.config.num_train_timesteps
    if not 1 <= num_inference_steps <= trained:
        raise InvalidArgument(
            f"sample_actions: num_inference_steps must be in [1, {trained}], got {num_inference_steps}"
        )
    if getattr(policy, "training", False):
        raise InvalidArgument("sample_actions: policy is in training mode, whose dropout draws on; call policy.eval()")
    cache = policy.encode(obs)
    batch = _batch_of(cache)
    device = next(leaf.device for leaf in pytree.tree_leaves(cache) if isinstance(leaf, Tensor))
    # The scheduler's own timesteps stay on the CPU, where it branches on them without waiting for the device.
    scheduler.set_timesteps(num_inference_steps)
    on_device = scheduler.timesteps.to(device)
    noise = torch.randn(
        (batch, k, *shape), generator=generator, device=device if generator is None else generator.device
    )
    # Schedulers see rows [B * K, T, A]: to them the second axis is channels, over which some of them take statistics.
    x = noise.flatten(0, 1).to(device) * getattr(scheduler, "init_noise_sigma", 1.0)
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": generator} if takes_generator else {}
    for step, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        times = on_device[step].expand(batch, k)
        prediction = policy.denoise(cache, scaled.unflatten(0, (batch, k)).to(dtype), times)
        x = scheduler.step(prediction.flatten(0, 1).to(x.dtype), t, x, **extra).prev_sample
    return x.unflatten(0, (batch, k))


def _batch_of(cache: Any) -> int:
    """B, on which everything in the cache agrees."""
    held = held_conditions(cache)
    if not held:
        raise InvalidArgument("sample_actions: policy.encode returned no tensor")
    found, batch = held[0]
    for other, conditions in held:
        if batch is None or conditions != batch:
            raise InvalidArgument(
                f"sample_actions: everything that policy.encode returns must have leading dimension B, "
                f"got {found} and {other}"
            )
    assert batch is not None
    return batch
