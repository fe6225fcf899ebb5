r"""What policy gradients on Level-2 batches share: log-probabilities of denoising steps, PPO's ratio, GAE, values.

B decisions (environment steps: one chunk of actions each) of K denoising steps (or samples) each. Whatever belongs to a
decision (advantage, return, value, the condition) is ``[B]`` and stays so; whatever belongs to a step is ``[B, K]``.

Sources: Schulman et al., GAE, arXiv 1506.02438, and PPO, arXiv 1707.06347; Ren et al., DPPO, arXiv 2409.00588.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.policy import Policy
from minidiff_fast.shapes import check_shape, describe
from minidiff_fast.transitions import (
    ActSteps,
    NoiseStd,
    Transitions,
    check_act_steps,
    gaussian_log_prob,
    step_moments,
)


class ObjectiveLoss(NamedTuple):
    """What every objective returns."""

    loss: Tensor
    """[], differentiable."""
    stats: dict[str, Tensor]
    """[] each, detached; nothing here has waited for the device."""


class Advantages(NamedTuple):
    """What :func:`gae` gives."""

    advantage: Tensor
    """[S, N]."""
    returns: Tensor
    """[S, N]: the value's target, advantage + value."""


class ChainScore(NamedTuple):
    """Log-probabilities of denoising steps, and how much of them a clamp holds."""

    log_prob: Tensor
    """[B, K], float32 at least."""
    saturated: Tensor
    """[B, K]: share of the clean sample's entries at their clamp (no gradient flows there)."""
    clamped: Tensor
    """[B, K]: share of the entries whose log-probability is at its clamp."""


class Steps(NamedTuple):
    """Denoising steps of B chains."""

    x: Tensor
    """[B, K, T, A]: before the step."""
    x_next: Tensor
    """[B, K, T, A]: after it."""
    position: Tensor
    """[B, K] int64: which step of the chain, 0 the noisiest."""


def gae(
    reward: Tensor,  # [S, N]
    value: Tensor,  # [S, N]
    next_value: Tensor,  # [S, N]
    terminated: Tensor,  # [S, N] bool
    truncated: Tensor,  # [S, N] bool
    valid: Tensor | None = None,  # [S, N] bool
    *,
    gamma: float,
    lam: float,
) -> Advantages:
    r"""Generalised advantage estimation over S decisions of N environments.

    .. math::
        \delta_s = r_s + \gamma (1 - \mathrm{terminated}_s) V^{next}_s - V_s, \quad
        A_s = \delta_s + \gamma \lambda (1 - \mathrm{done}_s) A_{s+1}

    ``next_value`` is the value of the observation that this decision *led to*: of the final observation where the
    episode was cut (truncated), never of the next episode's first one. A row that is not ``valid`` (an inserted
    reset, a dead environment) gets 0 (advantage and return) and cuts the sum.

    Raises:
        InvalidArgument: a shape differs, a flag is not boolean, a reward or value that counts is not finite, or gamma
            or lam is outside [0, 1].
    """
    if reward.dim() != 2:
        raise InvalidArgument(f"gae: reward must be [S, N], got {list(reward.shape)}")
    flags = {"terminated": terminated, "truncated": truncated} | ({} if valid is None else {"valid": valid})
    context = partial(describe, reward=reward)
    for name, tensor in {"value": value, "next_value": next_value, **flags}.items():
        check_shape("gae", name, tensor, list(reward.shape), "[S, N]", context)
    for name, tensor in flags.items():
        _check_bool("gae", name, tensor)
    for name, number in (("gamma", gamma), ("lam", lam)):
        if not 0.0 <= number <= 1.0:
            raise InvalidArgument(f"gae: {name} must be in [0, 1], got {number}")
    counts = torch.ones_like(terminated) if valid is None else valid
    reward, value = reward.masked_fill(~counts, 0.0), value.masked_fill(~counts, 0.0)
    next_value = next_value.masked_fill(terminated | ~counts, 0.0)
    for name, tensor in {"reward": reward, "value": value, "next_value": next_value}.items():
        if not bool(torch.isfinite(tensor).all()):
            step, env = (~torch.isfinite(tensor)).nonzero()[0].tolist()
            raise InvalidArgument(
                f"gae: {name} must be finite, got {float(tensor[step, env])} at decision {step} of environment {env}"
            )
    delta = reward + gamma * next_value - value
    carries = gamma * lam * (~(terminated | truncated) & counts).to(delta.dtype)
    advantage = torch.zeros_like(delta)
    carry = torch.zeros_like(delta[0])
    for step in range(len(reward) - 1, -1, -1):
        carry = delta[step] + carries[step] * carry
        advantage[step] = carry
    return Advantages(advantage, advantage + value)


def normalize_advantage(
    advantage: Tensor,  # [B]
    valid: Tensor | None = None,  # [B] bool
) -> Tensor:  # [B]
    """Zero mean, unit (population) variance over the valid decisions, 0 for the others: a new tensor.

    On [B] and before anything is repeated, so that a decision counts once however many steps it has.
    """
    _check_decisions("normalize_advantage", advantage, valid)
    if valid is None:
        return (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-8)
    mean = masked_mean(advantage, valid)
    centred = (advantage - mean).masked_fill(~valid, 0.0)
    return centred / (masked_mean(centred.square(), valid).sqrt() + 1e-8)


def clamp_advantage(
    advantage: Tensor,  # [B]
    low: float = 0.0,
    high: float = 1.0,
    valid: Tensor | None = None,  # [B] bool
) -> Tensor:  # [B]
    """Advantages clamped to two of their quantiles over the valid decisions: a new tensor. 0 and 1 clamp none.

    The quantile q is the smallest advantage that a share of at least q of the decisions does not exceed.

    Raises :class:`InvalidArgument` unless 0 <= low < high <= 1.
    """
    _check_decisions("clamp_advantage", advantage, valid)
    if not 0.0 <= low < high <= 1.0:
        raise InvalidArgument(f"clamp_advantage: 0 <= low < high <= 1 expected, got low = {low}, high = {high}")
    counts = torch.ones_like(advantage, dtype=torch.bool) if valid is None else valid
    ordered = advantage.masked_fill(~counts, math.inf).sort().values

    def quantile(share: float) -> Tensor:
        place = (share * counts.sum() - 1e-6).ceil().long() - 1  # 1e-6: 0.07 * 100 is above 7 in floats
        return ordered.gather(0, place.clamp(min=0)[None])

    return torch.minimum(torch.maximum(advantage, quantile(low)), quantile(high))


def _check_decisions(name: str, advantage: Tensor, valid: Tensor | None) -> None:
    if advantage.dim() != 1:
        raise InvalidArgument(f"{name}: advantage must be [B], one a decision, got {list(advantage.shape)}")
    if valid is not None:
        context = partial(describe, advantage=advantage)
        check_shape(name, "valid", valid, list(advantage.shape), "[B]", context)
        _check_bool(name, "valid", valid)


def _check_bool(where: str, name: str, flag: Tensor) -> None:
    if flag.dtype != torch.bool:
        raise InvalidArgument(f"{where}: {name} must be boolean, got {flag.dtype}")


def transitions_of(
    chain: Tensor,  # [B, K + 1, T, A]
    pick: Tensor | None = None,  # [B, K'] int64, in [0, K)
) -> Steps:
    """The steps of stored chains: all K (views, no copy), or those picked for every decision."""
    if chain.dim() != 4 or chain.shape[1] < 2:
        raise InvalidArgument(f"transitions_of: chain must be [B, K + 1, T, A] with K >= 1, got {list(chain.shape)}")
    batch, k = chain.shape[0], chain.shape[1] - 1
    if pick is None:
        position = torch.arange(k, device=chain.device).expand(batch, k)
        return Steps(chain[:, :-1], chain[:, 1:], position)
    if pick.dim() != 2 or pick.shape[0] != batch or pick.is_floating_point():
        raise InvalidArgument(f"transitions_of: pick must be [B, K'] integers, B = {batch}, got {list(pick.shape)}")
    places = pick[:, :, None, None].expand(-1, -1, *chain.shape[2:])
    return Steps(chain.gather(1, places), chain.gather(1, places + 1), pick)


def score_chain(
    policy: Policy,
    cache: Any,
    x: Tensor,  # [B, K, T, A]
    x_next: Tensor,  # [B, K, T, A]
    index: Tensor,  # [B, K] int64, in [0, D)
    *,
    transitions: Transitions,
    min_std: float = 0.1,
    clamp: tuple[float, float] | None = (-5.0, 2.0),
    act_steps: ActSteps = None,
    reduce: Literal["mean", "sum"] = "mean",
    noise_std: NoiseStd | None = None,
) -> ChainScore:
    """:func:`chain_logprob` with the shares that clamps hold."""
    if x.dim() != 4 or x_next.shape != x.shape or index.shape != x.shape[:2] or index.is_floating_point():
        raise InvalidArgument(
            "chain_logprob: x and x_next must be [B, K, T, A] and index [B, K] integers, got "
            f"{list(x.shape)}, {list(x_next.shape)} and {list(index.shape)} {index.dtype}"
        )
    if not min_std > 0.0:
        raise InvalidArgument(f"chain_logprob: min_std must be above 0, a Gaussian has no width else, got {min_std}")
    check_act_steps("chain_logprob", act_steps, x.shape[2])
    moments = step_moments(policy, cache, x, index, transitions=transitions, noise_std=noise_std)
    log_prob, clamped = gaussian_log_prob(
        x_next.to(moments.mean.dtype), moments.mean, moments.std.clamp(min=min_std),
        clamp=clamp, act_steps=act_steps, reduce=reduce,
    )  # fmt: skip
    return ChainScore(log_prob, moments.saturated, clamped)


def chain_logprob(
    policy: Policy,
    cache: Any,
    x: Tensor,  # [B, K, T, A]
    x_next: Tensor,  # [B, K, T, A]
    index: Tensor,  # [B, K] int64, in [0, D)
    *,
    transitions: Transitions,
    min_std: float = 0.1,
    clamp: tuple[float, float] | None = (-5.0, 2.0),
    act_steps: ActSteps = None,
    reduce: Literal["mean", "sum"] = "mean",
    noise_std: NoiseStd | None = None,
) -> Tensor:  # [B, K]
    r"""Log-probabilities of K denoising steps of each of B decisions, from one encoded condition a decision.

    .. math:: \log \pi_{bk} = \log N(x'_{bk};\ \mu(x_{bk}, t_{i_{bk}}, c_b),\ \max(\sigma_{i_{bk}}, \sigma_{min})^2)

    Args:
        policy: its ``denoise`` runs once, on B * K rows.
        cache: what ``policy.encode`` gave for the B decisions.
        x, x_next: samples before and after each step.
        index: which of the sampler's D steps each of them is.
        transitions: the sampler that drew the chains.
        min_std: lower bound of the standard deviation.
        clamp: of every entry's log-density; None does not clamp.
        act_steps: the executed action tokens; the others do not count.
        reduce: mean (DPPO) or sum over the executed tokens and action dimensions.
        noise_std: replaces the sampler's standard deviation.

    Raises:
        InvalidArgument: shapes that do not fit, min_std <= 0.

    Source: Ren et al., DPPO, arXiv 2409.00588.
    """
    return score_chain(
        policy, cache, x, x_next, index, transitions=transitions, min_std=min_std, clamp=clamp, act_steps=act_steps,
        reduce=reduce, noise_std=noise_std,
    ).log_prob  # fmt: skip


def ppo_loss(
    log_prob: Tensor,  # [B, K]
    old_log_prob: Tensor,  # [B, K]
    advantage: Tensor,  # [B]
    *,
    clip: float | Tensor,  # or [B, K]
    discount: Tensor | None = None,  # [B, K]
    joint: Literal["step", "chain"] = "step",
    weight: Tensor | None = None,  # [B, K]
    valid: Tensor | None = None,  # [B] bool
) -> ObjectiveLoss:
    r"""PPO's clipped surrogate, one ratio a denoising step or one a decision.

    ``joint="step"``: :math:`r_{bk} = \exp(\log\pi_{bk} - \log\pi^{old}_{bk})`,
    :math:`L = \mathrm{mean}_{bk}\, w_{bk} \max(-A_{bk} r_{bk}, -A_{bk}\, \mathrm{clip}(r_{bk}, 1 \pm \epsilon_{bk}))`
    with :math:`A_{bk} = \gamma_{bk} A_b`. ``joint="chain"``: one ratio of the mean over K of the differences.

    Args:
        advantage: one a decision; it is broadcast over K, never replicated by the caller.
        clip: epsilon, one number or (``joint="step"``) one a step.
        discount: gamma_bk, see :func:`denoising_discount`.
        weight: factors on steps, where K is a sample of a decision's steps.
        valid: decisions that count; the mean is over those, whatever the others hold (NaN included).

    Stats: ``ratio`` (mean), ``ratio_max``, ``clip_fraction``, ``approx_kl`` (mean of r - 1 - log r).

    Raises:
        InvalidArgument: shapes; in particular an advantage that is not [B]. Constants that require gradients.

    Source: Schulman et al., arXiv 1707.06347.
    """
    _check_ppo(log_prob, old_log_prob, advantage, clip, discount, joint, weight, valid)
    difference = log_prob - old_log_prob
    gain = advantage[:, None] if discount is None else advantage[:, None] * discount
    if valid is not None:  # before exp, whose gradient would turn an overflow there into NaN
        difference, gain = difference.masked_fill(~valid[:, None], 0.0), gain.masked_fill(~valid[:, None], 0.0)
    if joint == "chain":
        difference = difference.mean(1, keepdim=True)
    ratio = difference.exp()
    held = ratio.clamp(1.0 - clip, 1.0 + clip)  # type: ignore[arg-type]
    surrogate = torch.maximum(-gain * ratio, -gain * held)
    if weight is not None:
        surrogate = surrogate * weight
    with torch.no_grad():
        stats = {
            "ratio": masked_mean(ratio, valid),
            "ratio_max": (ratio if valid is None else ratio.masked_fill(~valid[:, None], 0.0)).max(),
            "clip_fraction": masked_mean(((ratio - 1.0).abs() > clip).to(ratio.dtype), valid),
            "approx_kl": masked_mean(difference.expm1() - difference, valid),
        }
    return ObjectiveLoss(masked_mean(surrogate, valid), stats)


def _check_ppo(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    clip: float | Tensor,
    discount: Tensor | None,
    joint: str,
    weight: Tensor | None,
    valid: Tensor | None,
) -> None:
    if log_prob.dim() != 2:
        raise InvalidArgument(f"ppo_loss: log_prob must be [B, K], got {list(log_prob.shape)}")
    batch, k = log_prob.shape
    context = partial(describe, log_prob=log_prob)
    expected: dict[str, tuple[Any, list[int | str], str]] = {
        "old_log_prob": (old_log_prob, [batch, k], "[B, K]"), "advantage": (advantage, [batch], "[B]"),
        "discount": (discount, [batch, k], "[B, K]"), "weight": (weight, [batch, k], "[B, K]"),
        "valid": (valid, [batch], "[B]"),
    }  # fmt: skip
    for name, (tensor, shape, text) in expected.items():
        if tensor is not None:
            check_shape("ppo_loss", name, tensor, shape, text, context)
            if tensor.requires_grad:
                raise InvalidArgument(f"ppo_loss: {name} is a constant; detach it")
    if valid is not None:
        _check_bool("ppo_loss", "valid", valid)
    per_step = isinstance(clip, Tensor) and clip.dim() > 0
    if per_step:
        check_shape("ppo_loss", "clip", clip, [batch, k], "[B, K]", context)  # type: ignore[arg-type]
    if not isinstance(clip, Tensor) and not clip >= 0.0:
        raise InvalidArgument(f"ppo_loss: clip must be at least 0, got {clip}")
    if joint not in ("step", "chain"):
        raise InvalidArgument(f"ppo_loss: joint must be 'step' or 'chain', got {joint!r}")
    if joint == "chain" and (per_step or weight is not None or discount is not None):
        raise InvalidArgument('ppo_loss: joint="chain" has one ratio a decision: no clip, weight or discount a step')


def masked_mean(
    values: Tensor,  # [B] or [B, K]
    valid: Tensor | None,  # [B] bool
) -> Tensor:  # []
    """The mean over the valid decisions and all of their K; 0 where there is none."""
    if valid is None:
        return values.mean()
    mask = valid if values.dim() == 1 else valid[:, None].expand_as(values)
    return values.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


def denoising_clip(
    position: Tensor,  # [B, K] int64, in [0, steps)
    steps: int,
    *,
    clip: float,
    base: float,
    rate: float,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # [B, K]
    r"""DPPO's clip range, small for noisy steps: :math:`base + (clip - base) (e^{rate\,k/(K-1)} - 1) / (e^{rate} - 1)`.

    A single step (K = 1) has no k / (K - 1); its range is ``clip``.
    """
    if steps == 1:
        return torch.full(position.shape, clip, device=position.device, dtype=dtype)
    share = position.to(dtype) / (steps - 1)
    rise = share if rate == 0.0 else torch.expm1(rate * share) / math.expm1(rate)
    return base + (clip - base) * rise


def denoising_discount(
    position: Tensor,  # [B, K] int64, in [0, steps)
    steps: int,
    gamma: float,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # [B, K]
    """DPPO's discount of a decision's advantage at its earlier denoising steps: gamma ** (K - 1 - k)."""
    return gamma ** (steps - 1 - position).to(dtype)


def value_loss(
    value: Tensor,  # [B]
    returns: Tensor,  # [B]
    old_value: Tensor | None = None,  # [B]
    *,
    clip: float | None = None,
    valid: Tensor | None = None,  # [B] bool
) -> Tensor:  # []
    r""":math:`\tfrac12 \mathrm{mean}_b (V_b - R_b)^2`; with ``clip`` the larger of this and that of V kept within
    ``old_value +- clip``. One a decision, never one a denoising step. Rows that are not valid do not count, whatever
    they hold (NaN included).

    Raises:
        InvalidArgument: a shape other than [B], returns that require gradients, ``clip`` <= 0 or without ``old_value``.
    """
    if value.dim() != 1:
        raise InvalidArgument(f"value_loss: value must be [B], one a decision, got {list(value.shape)}")
    context = partial(describe, value=value)
    for name, tensor in (("returns", returns), ("old_value", old_value), ("valid", valid)):
        if tensor is not None:
            check_shape("value_loss", name, tensor, list(value.shape), "[B]", context)
            if tensor.requires_grad:
                raise InvalidArgument(f"value_loss: {name} is a constant; detach it")
    if clip is not None and (old_value is None or not clip > 0.0):
        raise InvalidArgument(
            f"value_loss: clip must be above 0 and needs old_value, the value at collection, got {clip}"
        )
    if valid is not None:
        _check_bool("value_loss", "valid", valid)
        value, returns = value.masked_fill(~valid, 0.0), returns.masked_fill(~valid, 0.0)
        old_value = None if old_value is None else old_value.masked_fill(~valid, 0.0)
    error = (value - returns).square()
    if clip is not None and old_value is not None:
        held = old_value + (value - old_value).clamp(-clip, clip)
        error = torch.maximum(error, (held - returns).square())
    return 0.5 * masked_mean(error, valid)
