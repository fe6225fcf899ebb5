r"""ReinFlow: PPO over a flow policy's chain with learned exploration noise, on Level-2 batches.

A flow's Euler steps are made Gaussian, with a standard deviation that a small network reads off the observation and the
time, so that the whole chain has a likelihood and one ratio:

.. math::
    x_{i+1} \sim N(x_i + v(x_i, t_i, c_b) / K,\ \sigma_\phi(c_b, t_i)^2), \quad
    \log r_b = \frac{1}{K\, T_a D_a} \sum_i (\log N(x_{i+1}) - \log N^{old}(x_{i+1})), \quad
    L = \mathrm{mean}_b \max(-A_b r_b,\ -A_b\, \mathrm{clip}(r_b, 1 \pm \epsilon)) - c_H \bar H

The initial noise has the same likelihood under every policy and drops out. Sampling and scoring read their times from
one object. Evaluation is ``transitions.deterministic()``, the plain flow.

Source: Zhang et al., "ReinFlow", arXiv 2505.22094; the constants are its code's defaults.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.models.transformer_for_diffusion import timestep_embedding
from minidiff_fast.objectives._records import check_finite, check_record, executed_tokens
from minidiff_fast.objectives.dppo import Decision
from minidiff_fast.objectives.policy_gradient import (
    ActSteps,
    ObjectiveLoss,
    check_act_steps,
    masked_mean,
    ppo_loss,
    score_chain,
    transitions_of,
)
from minidiff_fast.policy import DiffusionPolicy, Policy
from minidiff_fast.sampling import sample_chain
from minidiff_fast.shapes import check_shape, describe
from minidiff_fast.transitions import FlowTransitions, Transitions


@dataclass(frozen=True)
class ReinFlowConfig:
    """ReinFlow's constants, those of its state-based tasks."""

    clip: float = 0.01
    """PPO's clip range; small, as log-probabilities are means over the chain and the chunk."""
    noise_low: float = 0.10
    """Lower end of the learned standard deviation; 0.08 from pixels."""
    noise_high: float = 0.24
    """Upper end of the learned standard deviation; 0.14 from pixels."""
    noise_hidden: tuple[int, ...] = (64, 64)
    """Widths of the noise network; (256, 256, 256) from pixels."""
    noise_clip: float = 3.0
    """Standard normal draws are clamped to this."""
    entropy_weight: float = 0.03
    """Weight of the mean entropy of an entry of a step; 0 from pixels."""
    bc_weight: float = 0.0
    """Weight of the behaviour-cloning term, see :meth:`ReinFlow.behaviour_cloning`."""

    def __post_init__(self) -> None:
        for name in ("clip", "noise_clip"):
            if not getattr(self, name) > 0.0:
                raise InvalidArgument(f"ReinFlowConfig: {name} must be above 0, got {getattr(self, name)}")
        if not 0.0 < self.noise_low < self.noise_high:
            raise InvalidArgument(
                "ReinFlowConfig: 0 < noise_low < noise_high expected, got "
                f"noise_low = {self.noise_low}, noise_high = {self.noise_high}"
            )
        for name in ("entropy_weight", "bc_weight"):
            if not getattr(self, name) >= 0.0:
                raise InvalidArgument(f"ReinFlowConfig: {name} must be at least 0, got {getattr(self, name)}")


class ExplorationNoise(nn.Module):
    r"""The standard deviation of a step's noise, from the observation's features and the step's time.

    .. math::
        u = \mathrm{MLP}(W_c\, c_b + W_t\, e(t_{bk})), \quad
        \log \sigma_{bk} = \log \sigma_{low} + \tfrac12 (1 + \tanh u) (\log \sigma_{high} - \log \sigma_{low})

    The features' share of the first layer is computed once per decision and added to its K steps.

    Args:
        features: numbers in an observation's features, To * Dc.
        shape: (T, A).
        low, high: ends of the range.
        hidden: widths of the hidden layers, Tanh between them.
        time_dim: width of the time embedding (even, at least 4).
    """

    def __init__(
        self,
        features: int,
        shape: tuple[int, int],
        *,
        low: float = 0.10,
        high: float = 0.24,
        hidden: Sequence[int] = (64, 64),
        time_dim: int = 16,
    ) -> None:
        if not 0.0 < low < high:
            raise InvalidArgument(f"ExplorationNoise: 0 < low < high expected, got low = {low}, high = {high}")
        if features < 1 or len(hidden) < 1 or min(hidden) < 1:
            raise InvalidArgument(
                f"ExplorationNoise: features and all of hidden must be at least 1, got {features}, {tuple(hidden)}"
            )
        if time_dim < 4 or time_dim % 2:
            raise InvalidArgument(f"ExplorationNoise: time_dim must be even and at least 4, got {time_dim}")
        super().__init__()
        self.features, self.shape, self.low, self.high, self.time_dim = features, shape, low, high, time_dim
        self.condition_proj = nn.Linear(features, hidden[0])
        self.time_proj = nn.Linear(time_dim, hidden[0], bias=False)
        widths = [*hidden, shape[0] * shape[1]]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(
        self,
        features: Tensor,  # [B, ...], flattened to [B, features]
        times: Tensor,  # [B, K], as the policy's network sees them
    ) -> Tensor:  # [B, K, T, A], float32 at least
        """See the class."""
        flat = features.flatten(1)
        context = partial(describe, features=features, times=times)
        check_shape("ExplorationNoise", "features", flat, ["B", self.features], "[B, To * Dc]", context)
        check_shape("ExplorationNoise", "times", times, [len(flat), "K"], "[B, K]", context)
        time = timestep_embedding(times, self.time_dim).to(flat.dtype)
        hidden = self.condition_proj(flat)[:, None] + self.time_proj(time)
        for layer in self.layers:
            hidden = layer(torch.tanh(hidden))
        share = 0.5 * (1.0 + torch.tanh(hidden.to(torch.promote_types(hidden.dtype, torch.float32))))
        low, high = math.log(self.low), math.log(self.high)
        return torch.exp(low + (high - low) * share).unflatten(-1, self.shape)


class ReinFlowCache(NamedTuple):
    """What the policy keeps of B observations, and the features that the noise network reads: one encode for both."""

    policy: Any
    """Leading dimension B."""
    features: Tensor
    """[B, To, Dc]."""


class ReinFlow:
    """ReinFlow of one policy: how it acts, what a decision keeps, the loss of a Level-2 minibatch.

    ``module`` is the noise network; its parameters train with the policy's, and its ``state_dict`` belongs into the
    checkpoint. The caches of its methods come from :meth:`condition`.

    Args:
        transitions: the sampler of a flow, K steps, without noise of its own.
        shape: (T, A).
        features: numbers in an observation's features, To * Dc.
        config: constants.
        act_steps: the executed action tokens.

    Raises:
        InvalidArgument: a sampler that is not a flow's, or that has noise of its own.
    """

    def __init__(
        self,
        transitions: Transitions,
        shape: tuple[int, int],
        features: int,
        config: ReinFlowConfig | None = None,
        *,
        act_steps: ActSteps = None,
    ) -> None:
        if not isinstance(transitions, FlowTransitions):
            raise InvalidArgument(
                f"ReinFlow: transitions must be FlowTransitions, those of a flow policy, got "
                f"{type(transitions).__name__}; DPPO fine-tunes diffusion policies"
            )
        if transitions.std != 0.0:
            raise InvalidArgument(
                f"ReinFlow: the noise is learned, so transitions.std must be 0, got {transitions.std}"
            )
        check_act_steps("ReinFlow", act_steps, shape[0])
        self.transitions, self.shape, self.act_steps = transitions, shape, act_steps
        self.config = ReinFlowConfig() if config is None else config
        self.steps = transitions.steps
        self.module = ExplorationNoise(
            features, shape, low=self.config.noise_low, high=self.config.noise_high, hidden=self.config.noise_hidden
        )

    def condition(
        self,
        policy: DiffusionPolicy,
        features: Tensor,  # [B, To, Dc]
    ) -> ReinFlowCache:
        """The cache of this algorithm's methods, from what ``policy.features(obs)`` gave."""
        return ReinFlowCache(policy.condition(features), features)

    def act(
        self,
        policy: Policy,
        cache: ReinFlowCache,
        *,
        obs: Any = None,
        base: Policy | None = None,
        generator: torch.Generator | None = None,
    ) -> Decision:
        """Draw actions from an encoded observation; the record is the chain and its log-probabilities.

        ``obs`` and ``base`` are not read: every step of the chain is trained.
        """
        self._check(cache)
        times = self.transitions.times(cache.features.device)
        chain = sample_chain(
            policy, obs, self.transitions, shape=self.shape, cache=cache.policy, act_steps=self.act_steps,
            noise_std=lambda _, index: self.module(cache.features, times[index]), log_prob_clamp=None,
            noise_clip=self.config.noise_clip, min_std=self._floor, min_logprob_std=self._floor, generator=generator,
        )  # fmt: skip
        check_finite("ReinFlow.act", chain.actions)
        return Decision(chain.actions, {"reinflow_chain": chain.samples, "reinflow_log_prob": chain.log_prob})

    def minibatch(
        self,
        record: dict[str, Tensor],  # reinflow_chain [B, K + 1, T, A], reinflow_log_prob [B, K]
        *,
        k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """The steps of B decisions as a Level-2 batch: x, x_next ``[B, K, T, A]``, position, old_log_prob ``[B, K]``.

        Raises :class:`InvalidArgument` for the record of another algorithm or sampler, and for fewer than all K steps:
        the one ratio of a decision is that of its whole chain.
        """
        check_record(
            "ReinFlow",
            record,
            {"reinflow_chain": (self.steps + 1, *self.shape), "reinflow_log_prob": (self.steps,)},
        )
        if k is not None and k != self.steps:
            raise InvalidArgument(
                f"ReinFlow: the ratio of a decision is that of its whole chain: k must be {self.steps} or None, got {k}"
            )
        x, x_next, position = transitions_of(record["reinflow_chain"])
        return {"x": x, "x_next": x_next, "position": position, "old_log_prob": record["reinflow_log_prob"]}

    def loss(
        self,
        policy: Policy,
        cache: ReinFlowCache,
        batch: dict[str, Tensor],  # [B, K, ...] each, from minibatch
        advantage: Tensor,  # [B], normalised
        *,
        valid: Tensor | None = None,  # [B] bool
    ) -> ObjectiveLoss:
        """Score whole chains from one encoded condition a decision: the clipped surrogate minus the entropy bonus.

        Stats: those of :func:`~minidiff_fast.objectives.policy_gradient.ppo_loss`, ``entropy`` and ``noise_std``.
        """
        self._check(cache)
        position = batch["position"]
        if position.shape[1] != self.steps:
            raise InvalidArgument(
                f"ReinFlow: a chain has {self.steps} steps, got {position.shape[1]} in the batch; the one ratio of a "
                "decision cannot be taken from single steps (flat pairs)"
            )
        std = self.module(cache.features, self.transitions.times(position.device)[position])
        score = score_chain(
            policy, cache.policy, batch["x"], batch["x_next"], position, transitions=self.transitions,
            min_std=self._floor, clamp=None, act_steps=self.act_steps, noise_std=lambda *_: std,
        )  # fmt: skip
        result = ppo_loss(
            score.log_prob, batch["old_log_prob"], advantage, clip=self.config.clip, joint="chain", valid=valid
        )
        executed = std[:, :, executed_tokens(self.act_steps)]
        entropy = masked_mean(executed.log().mean((-2, -1)), valid) + 0.5 * math.log(2.0 * math.pi * math.e)
        stats = {"entropy": entropy.detach(), "noise_std": masked_mean(executed.detach().mean((-2, -1)), valid)}
        return ObjectiveLoss(result.loss - self.config.entropy_weight * entropy, {**result.stats, **stats})

    def behaviour_cloning(
        self,
        policy: Policy,
        cache: ReinFlowCache,
        base: Policy,
        obs: Any,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:  # []
        r"""The mean squared distance of the actions that both flows, without noise, make of the same initial noise.

        It bounds the squared Wasserstein-2 distance of the policies' actions. The gradient goes through the whole chain
        of ``policy``; ``base`` encodes ``obs`` itself.
        """
        self._check(cache)
        device, batch = cache.features.device, len(cache.features)
        source = device if generator is None else generator.device
        noise = torch.randn((batch, 1, *self.shape), generator=generator, device=source).to(device)
        noise = noise.to(torch.promote_types(cache.features.dtype, torch.float32))
        with torch.no_grad():
            target = self._flow(base, base.encode(obs), noise)
        return (self._flow(policy, cache.policy, noise) - target).square().mean()

    def _flow(
        self,
        policy: Policy,
        cache: Any,
        x: Tensor,  # [B, 1, T, A]
    ) -> Tensor:  # [B, 1, T, A]
        """The plain flow's actions, clamped as they are executed."""
        transitions = self.transitions.deterministic()
        times = transitions.times(x.device)
        for step in range(self.steps):
            index = torch.full(x.shape[:2], step, dtype=torch.int64, device=x.device)
            x = transitions.moments(x, policy.denoise(cache, x, times[index]), index).mean
        return x.clamp(-1.0, 1.0)

    @property
    def _floor(self) -> float:
        """A lower bound that the learned standard deviation never meets: its range is the noise network's."""
        return 0.5 * self.config.noise_low

    def _check(self, cache: Any) -> None:
        if not isinstance(cache, ReinFlowCache):
            raise InvalidArgument(
                "ReinFlow: cache must be what ReinFlow.condition(policy, policy.features(obs)) gives, got "
                f"{type(cache).__name__}"
            )
