"""Sampling with a cached condition: the observation is encoded once, whatever the number of samples and steps."""

from __future__ import annotations

import inspect
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.nn.condition_cache import held_conditions
from minidiff_fast.policy import Policy
from minidiff_fast.transitions import (
    ActSteps,
    NoiseStd,
    Transitions,
    check_act_steps,
    gaussian_log_prob,
    step_moments,
)


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


class Chain(NamedTuple):
    """B decisions: their denoising chains, and how likely each step was."""

    samples: Tensor
    """[B, K + 1, T, A] float32, as drawn, unclamped: entry 0 is where the fine-tuned steps begin, entry K actions."""
    log_prob: Tensor
    """[B, K] float32, of the K steps under the policy that drew them."""
    actions: Tensor
    """[B, T, A]: entry K clamped to [-1, 1], for execution."""
    cache: Any
    """What ``policy.encode`` gave, without history where it was called here."""


@torch.no_grad()
def sample_chain(
    policy: Policy,
    obs: Any,
    transitions: Transitions,
    *,
    shape: tuple[int, int],
    fine_tuned: int | None = None,
    base: Policy | None = None,
    min_std: float = 0.1,
    min_logprob_std: float = 0.1,
    noise_clip: float | None = 3.0,
    log_prob_clamp: tuple[float, float] | None = (-5.0, 2.0),
    act_steps: ActSteps = None,
    reduce: Literal["mean", "sum"] = "mean",
    noise_std: NoiseStd | None = None,
    generator: torch.Generator | None = None,
    cache: Any = None,
) -> Chain:
    """Draw one action sequence for each of B observations, keeping its denoising chain, from one encode.

    The last ``fine_tuned`` of the sampler's D steps are kept and scored as they are drawn: the log-probabilities need
    no second pass. The frozen steps before them run the ``base`` policy, and only where there are any.

    Args:
        policy: in the mode in which it is scored later; dropout or batch norm in training mode would give other
            log-probabilities there, so training mode is refused.
        obs: what ``policy.encode`` takes; only the base reads it where ``cache`` is given.
        transitions: the sampler, D steps.
        shape: (T, A), action tokens and action dimension.
        fine_tuned: K; None is all D steps.
        base: the frozen policy of the first D - K steps, with its own encoder; needed where K < D.
        min_std: lower bound of the standard deviation that is drawn; 0 with ``transitions.deterministic()``.
        min_logprob_std, log_prob_clamp, act_steps, reduce, noise_std: of the score, see
            :func:`~minidiff_fast.objectives.policy_gradient.chain_logprob`.
        noise_clip: standard normal draws of the steps are clamped to this; None does not clamp.
        generator: the only source of randomness.
        cache: what ``policy.encode(obs)`` gave, where that has been done already.

    Raises:
        InvalidArgument: K outside [1, D], frozen steps without ``base``, a policy in training mode, a cache whose parts
            differ in B.

    Source: Ren et al., DPPO, arXiv 2409.00588.
    """
    total = transitions.steps
    k = total if fine_tuned is None else fine_tuned
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= total:
        raise InvalidArgument(f"sample_chain: fine_tuned must be an int in [1, {total}], got {fine_tuned!r}")
    if k < total and base is None:
        raise InvalidArgument(
            f"sample_chain: {total - k} of {total} steps are frozen: base, the policy of those, is needed"
        )
    for name, network in (("policy", policy), ("base", base if k < total else None)):
        if getattr(network, "training", False):
            raise InvalidArgument(
                f"sample_chain: {name} is in training mode, under which log-probabilities are not what they will be "
                f"scored as; call {name}.eval()"
            )
    check_act_steps("sample_chain", act_steps, shape[0])
    cache = policy.encode(obs) if cache is None else cache
    batch = _batch_of(cache, "sample_chain")
    device = next(leaf.device for leaf in pytree.tree_leaves(cache) if isinstance(leaf, Tensor))
    base_cache = base.encode(obs) if base is not None and k < total else None
    if base_cache is not None and _batch_of(base_cache, "sample_chain") != batch:
        raise InvalidArgument(
            f"sample_chain: obs has {_batch_of(base_cache, 'sample_chain')} observations, cache has B = {batch}"
        )

    def normal() -> Tensor:
        source = device if generator is None else generator.device
        return torch.randn((batch, 1, *shape), generator=generator, device=source).to(device)

    x = normal()
    samples, scores = [], []
    for step in range(total):
        index = torch.full((batch, 1), step, dtype=torch.int64, device=device)
        frozen = step < total - k
        if frozen:
            assert base is not None
            moments = step_moments(base, base_cache, x, index, transitions=transitions)
        else:
            samples.append(x)
            moments = step_moments(policy, cache, x, index, transitions=transitions, noise_std=noise_std)
        noise = normal()
        noise = noise if noise_clip is None else noise.clamp(-noise_clip, noise_clip)
        x = moments.mean.float() + moments.std.float().clamp(min=min_std) * noise
        if not frozen:
            score, _ = gaussian_log_prob(
                x, moments.mean, moments.std.clamp(min=min_logprob_std), clamp=log_prob_clamp, act_steps=act_steps,
                reduce=reduce,
            )  # fmt: skip
            scores.append(score)
    samples.append(x)
    return Chain(torch.cat(samples, 1), torch.cat(scores, 1).float(), x[:, 0].clamp(-1.0, 1.0), cache)


def _batch_of(cache: Any, name: str = "sample_actions") -> int:
    """B, on which everything in the cache agrees."""
    held = held_conditions(cache)
    if not held:
        raise InvalidArgument(f"{name}: policy.encode returned no tensor")
    found, batch = held[0]
    for other, conditions in held:
        if batch is None or conditions != batch:
            raise InvalidArgument(
                f"{name}: everything that policy.encode returns must have leading dimension B, got {found} and {other}"
            )
    assert batch is not None
    return batch
