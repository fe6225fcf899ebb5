r"""DPPO: PPO over the denoising steps of a diffusion policy's chain, on Level-2 batches.

A decision (one environment step) of a diffusion policy is a chain of Gaussian steps. Its K fine-tuned steps share the
observation and the advantage; each has its own ratio:

.. math::
    L = \mathrm{mean}_{b,k} \max(-\gamma_k A_b r_{bk},\ -\gamma_k A_b\, \mathrm{clip}(r_{bk}, 1 \pm \epsilon_k)),
    \quad \gamma_k = \gamma_{den}^{K-1-k}

Source: Ren et al., "Diffusion Policy Policy Optimization", arXiv 2409.00588; the constants are its code's defaults.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.objectives._records import check_record
from minidiff_fast.objectives.policy_gradient import (
    ObjectiveLoss,
    chain_logprob,
    denoising_clip,
    denoising_discount,
    masked_mean,
    ppo_loss,
    score_chain,
    transitions_of,
)
from minidiff_fast.policy import Policy
from minidiff_fast.sampling import sample_chain
from minidiff_fast.transitions import ActSteps, Transitions, check_act_steps


@dataclass(frozen=True)
class DPPOConfig:
    """DPPO's constants."""

    clip: float = 0.01
    """PPO's clip range at the last denoising step; small, as log-probabilities are means over the chunk."""
    clip_base: float = 0.001
    """Clip range at the first fine-tuned (noisiest) step."""
    clip_rate: float = 3.0
    """How fast the range grows from base to clip."""
    gamma_denoising: float = 0.99
    """Discount of the advantage per denoising step before the last."""
    min_sampling_std: float = 0.1
    """Lower bound of the standard deviation that is drawn in collection: exploration."""
    min_logprob_std: float = 0.1
    """Lower bound of the standard deviation in the log-probability."""
    noise_clip: float = 3.0
    """Standard normal draws are clamped to this."""
    log_prob_low: float = -5.0
    """Lower clamp of an entry's log-density."""
    log_prob_high: float = 2.0
    """Upper clamp of an entry's log-density; no gradient above it."""
    bc_weight: float = 0.0
    """Weight of the behaviour-cloning term: the frozen base's chains, scored under the fine-tuned policy."""

    def __post_init__(self) -> None:
        for name in ("clip", "min_sampling_std", "min_logprob_std", "noise_clip"):
            if not getattr(self, name) > 0.0:
                raise InvalidArgument(f"DPPOConfig: {name} must be above 0, got {getattr(self, name)}")
        if not 0.0 <= self.gamma_denoising <= 1.0:
            raise InvalidArgument(f"DPPOConfig: gamma_denoising must be in [0, 1], got {self.gamma_denoising}")
        if not 0.0 <= self.clip_base <= self.clip:
            raise InvalidArgument(f"DPPOConfig: clip_base must be in [0, clip = {self.clip}], got {self.clip_base}")
        if not self.log_prob_low < self.log_prob_high:
            raise InvalidArgument(
                f"DPPOConfig: log_prob_low must be below log_prob_high = {self.log_prob_high}, got {self.log_prob_low}"
            )
        if not self.bc_weight >= 0.0:
            raise InvalidArgument(f"DPPOConfig: bc_weight must be at least 0, got {self.bc_weight}")


def dppo_loss(
    log_prob: Tensor,  # [B, K]
    old_log_prob: Tensor,  # [B, K]
    advantage: Tensor,  # [B], normalised
    position: Tensor,  # [B, K] int64, in [0, steps)
    *,
    steps: int,
    config: DPPOConfig,
    weight: Tensor | None = None,  # [B, K]
    valid: Tensor | None = None,  # [B] bool
) -> ObjectiveLoss:
    """The clipped surrogate over decisions and their denoising steps.

    Advantages come normalised and, if at all, clamped to their quantiles (``normalize_advantage``,
    ``clamp_advantage``): both belong to the whole minibatch, this may see a part of it.

    Args:
        position: which of the chain's fine-tuned steps each is.
        steps: the number of those.

    Raises :class:`InvalidArgument` for shapes that do not fit, see
    :func:`~minidiff_fast.objectives.policy_gradient.ppo_loss`.
    """
    dtype = torch.promote_types(log_prob.dtype, torch.float32)
    clip = denoising_clip(position, steps, clip=config.clip, base=config.clip_base, rate=config.clip_rate, dtype=dtype)
    discount = denoising_discount(position, steps, config.gamma_denoising, dtype=dtype)
    return ppo_loss(log_prob, old_log_prob, advantage, clip=clip, discount=discount, weight=weight, valid=valid)


class Decision(NamedTuple):
    """What a policy decided for B observations, and what learning from it needs."""

    actions: Tensor
    """[B, T, A], normalised, in [-1, 1]."""
    record: dict[str, Tensor]
    """[B, ...] each, float32 or int64."""


class DPPO:
    """DPPO of one policy: how it acts, what a decision keeps, the loss of a Level-2 minibatch.

    Args:
        transitions: the sampler, D steps; steps without noise of their own get the config's least std.
        shape: (T, A).
        config: constants.
        fine_tuned: K, the last steps of the chain that are trained; None is all D.
        act_steps: the executed action tokens.
    """

    def __init__(
        self,
        transitions: Transitions,
        shape: tuple[int, int],
        config: DPPOConfig | None = None,
        *,
        fine_tuned: int | None = None,
        act_steps: ActSteps = None,
    ) -> None:
        check_act_steps("DPPO", act_steps, shape[0])
        total = transitions.steps
        steps = total if fine_tuned is None else fine_tuned
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= total:
            raise InvalidArgument(f"DPPO: fine_tuned must be an int in [1, {total}], got {fine_tuned!r}")
        self.transitions, self.shape, self.act_steps, self.steps = transitions, shape, act_steps, steps
        self.config = DPPOConfig() if config is None else config

    def act(
        self,
        policy: Policy,
        cache: Any,
        *,
        obs: Any = None,
        base: Policy | None = None,
        generator: torch.Generator | None = None,
    ) -> Decision:
        """Draw actions from an encoded observation; the record is the chain and its log-probabilities.

        ``obs`` and ``base`` are read where steps are frozen: the base encodes for itself, with its own weights.
        """
        config = self.config
        chain = sample_chain(
            policy, obs, self.transitions, shape=self.shape, fine_tuned=self.steps, base=base, cache=cache,
            min_std=config.min_sampling_std, min_logprob_std=config.min_logprob_std, noise_clip=config.noise_clip,
            log_prob_clamp=(config.log_prob_low, config.log_prob_high), act_steps=self.act_steps, generator=generator,
        )  # fmt: skip
        return Decision(chain.actions, {"chain": chain.samples, "log_prob": chain.log_prob})

    def minibatch(
        self,
        record: dict[str, Tensor],  # chain [B, K + 1, T, A], log_prob [B, K]
        *,
        k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """The steps of B decisions as a Level-2 batch: x, x_next ``[B, K', T, A]``, position, old_log_prob ``[B, K']``.

        With ``k`` each decision gives that many of its K steps, drawn without replacement: the mean over them has the
        expectation of the mean over all, so their weights are 1.

        Raises :class:`InvalidArgument` for a record that DPPO did not make, and for a chain of another length than the
        sampler's.
        """
        check_record("DPPO", record, {"chain": (self.steps + 1, *self.shape), "log_prob": (self.steps,)})
        chain, old = record["chain"], record["log_prob"]
        pick = None
        if k is not None and k != self.steps:
            pick = pick_steps(len(chain), self.steps, k, device=chain.device, generator=generator)
            old = old.gather(1, pick)
        x, x_next, position = transitions_of(chain, pick)
        return {"x": x, "x_next": x_next, "position": position, "old_log_prob": old}

    def loss(
        self,
        policy: Policy,
        cache: Any,
        batch: dict[str, Tensor],  # [B, K, ...] each, from minibatch
        advantage: Tensor,  # [B], normalised
        *,
        valid: Tensor | None = None,  # [B] bool
    ) -> ObjectiveLoss:
        """Score the steps from one encoded condition a decision, and take the clipped surrogate.

        Stats, beside those of :func:`~minidiff_fast.objectives.policy_gradient.ppo_loss`: ``saturated`` and
        ``log_prob_clamped``, the shares of clean samples and of log-densities that a clamp holds, without gradient.

        Raises :class:`InvalidArgument` for a policy in training mode and for shapes that do not fit.
        """
        self._check_mode("loss", policy)
        config, position = self.config, batch["position"]
        score = score_chain(
            policy, cache, batch["x"], batch["x_next"], position + (self.transitions.steps - self.steps),
            transitions=self.transitions, min_std=config.min_logprob_std,
            clamp=(config.log_prob_low, config.log_prob_high), act_steps=self.act_steps,
        )  # fmt: skip
        result = dppo_loss(
            score.log_prob, batch["old_log_prob"], advantage, position, steps=self.steps, config=config,
            weight=batch.get("weight"), valid=valid,
        )  # fmt: skip
        shares = {
            "saturated": masked_mean(score.saturated.detach(), valid),
            "log_prob_clamped": masked_mean(score.clamped, valid),
        }
        return ObjectiveLoss(result.loss, {**result.stats, **shares})

    @torch.no_grad()
    def rescore(self, policy: Policy, cache: Any, record: dict[str, Tensor]) -> dict[str, Tensor]:
        """The record's log-probabilities under ``policy``, computed as :meth:`loss` does."""
        batch, config = self.minibatch(record), self.config
        log_prob = chain_logprob(
            policy, cache, batch["x"], batch["x_next"], batch["position"] + (self.transitions.steps - self.steps),
            transitions=self.transitions, min_std=config.min_logprob_std,
            clamp=(config.log_prob_low, config.log_prob_high), act_steps=self.act_steps,
        )  # fmt: skip
        return {"log_prob": log_prob}

    def behaviour_cloning(
        self,
        policy: Policy,
        cache: Any,
        base: Policy,
        obs: Any,
        *,
        generator: torch.Generator | None = None,
        valid: Tensor | None = None,  # [B] bool
    ) -> Tensor:  # []
        """Minus the mean log-probability of fresh chains of the frozen base under the fine-tuned policy.

        The base encodes once and runs all D steps; the policy scores the last K of them from ``cache``.
        """
        self._check_mode("behaviour_cloning", policy)
        config = self.config
        chain = sample_chain(
            base, obs, self.transitions, shape=self.shape, min_std=config.min_sampling_std,
            noise_clip=config.noise_clip, generator=generator,
        )  # fmt: skip
        x, x_next, position = transitions_of(chain.samples[:, -self.steps - 1 :])
        log_prob = chain_logprob(
            policy, cache, x, x_next, position + (self.transitions.steps - self.steps), transitions=self.transitions,
            min_std=config.min_logprob_std, clamp=(config.log_prob_low, config.log_prob_high), act_steps=self.act_steps,
        )  # fmt: skip
        return -masked_mean(log_prob, valid)

    def _check_mode(self, where: str, policy: Policy) -> None:
        if getattr(policy, "training", False):
            raise InvalidArgument(
                f"DPPO.{where}: policy is in training mode, but its old log-probabilities are of eval mode; call "
                "policy.eval() (gradients flow all the same)"
            )


def pick_steps(
    batch: int, steps: int, k: int, *, device: torch.device, generator: torch.Generator | None = None
) -> Tensor:  # [B, k] int64
    """k different steps of K for each of B decisions, uniform, in order."""
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= steps:
        raise InvalidArgument(f"k, the denoising steps of a decision, must be in [1, {steps}], got {k!r}")
    source = device if generator is None else generator.device
    order = torch.rand((batch, steps), generator=generator, device=source).argsort(1)
    return order[:, :k].sort(1).values.to(device)
