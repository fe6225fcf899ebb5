r"""FPO: PPO with the denoising loss in place of the log-probability, on Level-2 batches.

No likelihood of the chain is needed: for N noisings (eps, t) of the action a decision took, drawn and scored once at
collection, the ratio is read off how their denoising losses have changed,

.. math::
    r_b = \exp(\tfrac1N \sum_n \ell^{old}_{bn} - \tfrac1N \sum_n \ell_{bn}), \quad
    L = \mathrm{mean}_b \max(-A_b r_b,\ -A_b\, \mathrm{clip}(r_b, 1 \pm \epsilon)).

Any sampler may have drawn the action. The N noisings share the observation: it is encoded once to act and to score
them, and once per minibatch.

Source: McAllister et al., "Flow Matching Policy Gradients", arXiv 2507.21053; the constants are its code's defaults.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.objectives._records import check_finite, check_record, executed_mask
from minidiff_fast.objectives.dppo import Decision, pick_steps
from minidiff_fast.objectives.imitation import DiffusionProcess, FlowMatching, check_sampler, il_loss
from minidiff_fast.objectives.policy_gradient import ActSteps, ObjectiveLoss, check_act_steps, masked_mean, ppo_loss
from minidiff_fast.policy import Policy
from minidiff_fast.sampling import sample_chain
from minidiff_fast.shapes import check_shape, describe
from minidiff_fast.transitions import Transitions


@dataclass(frozen=True)
class FPOConfig:
    """FPO's constants."""

    clip: float = 0.05
    """PPO's clip range."""
    samples: int = 8
    """N, the (noise, time) pairs that are stored with a decision."""
    average_before_exp: bool = True
    """One ratio a decision, of the mean loss of its pairs; False: one ratio a pair."""
    clamp: float = 3.0
    """Ratios of single pairs have their logarithm clamped to +-this; that of a mean is not clamped."""
    times: Literal["sampler", "process"] = "sampler"
    """Draw the pairs' times from those that the sampler visits, or as the process draws them in training."""
    flow_error: Literal["noise", "velocity"] = "velocity"
    """Of a flow's prediction: the error of the velocity, or of the noise that it implies (the velocity's times the
    distance in time from the noise). The latter, which the source's MuJoCo Playground runs use, ignores the sampler's
    first step, whose time is that of the noise. A diffusion process is scored in what it predicts."""
    min_sampling_std: float = 0.0
    """Lower bound of the standard deviation that the sampler's steps draw; 0 leaves the sampler as it is."""
    noise_clip: float | None = None
    """Standard normal draws of the sampler's steps are clamped to this; None does not clamp."""

    def __post_init__(self) -> None:
        for name in ("clip", "clamp"):
            if not getattr(self, name) > 0.0:
                raise InvalidArgument(f"FPOConfig: {name} must be above 0, got {getattr(self, name)}")
        if isinstance(self.samples, bool) or not isinstance(self.samples, int) or self.samples < 1:
            raise InvalidArgument(f"FPOConfig: samples must be an int >= 1, got {self.samples!r}")
        if self.times not in ("sampler", "process"):
            raise InvalidArgument(f"FPOConfig: times must be 'sampler' or 'process', got {self.times!r}")
        if self.flow_error not in ("noise", "velocity"):
            raise InvalidArgument(f"FPOConfig: flow_error must be 'noise' or 'velocity', got {self.flow_error!r}")
        if not self.min_sampling_std >= 0.0:
            raise InvalidArgument(f"FPOConfig: min_sampling_std must be at least 0, got {self.min_sampling_std}")
        if self.noise_clip is not None and not self.noise_clip > 0.0:
            raise InvalidArgument(f"FPOConfig: noise_clip must be above 0 or None, got {self.noise_clip}")


def fpo_loss(
    loss_new: Tensor,  # [B, N]
    loss_old: Tensor,  # [B, N]
    advantage: Tensor,  # [B]
    *,
    clip: float = 0.05,
    average_before_exp: bool = True,
    clamp: float = 3.0,
    weight: Tensor | None = None,  # [B, N]
    valid: Tensor | None = None,  # [B] bool
) -> ObjectiveLoss:
    r"""PPO's clipped surrogate of the ratio that denoising losses imply.

    ``average_before_exp``: :math:`r_b = \exp(\mathrm{mean}_n\, w_{bn} (\ell^{old}_{bn} - \ell_{bn}))`, one a decision.
    Otherwise :math:`r_{bn} = \exp(\mathrm{clamp}(\ell^{old}_{bn} - \ell_{bn}, \pm clamp))`, one a pair, and the mean
    over pairs of :math:`w_{bn}` times their surrogates.

    Args:
        loss_new, loss_old: denoising losses of the same pairs now and at collection.
        advantage: one a decision.
        clip: PPO's epsilon.
        clamp: of a single pair's log-ratio; no gradient beyond.
        weight: factors on pairs.
        valid: decisions that count.

    Stats: those of :func:`~minidiff_fast.objectives.policy_gradient.ppo_loss`; ``log_ratio_clamped``, the share of
    pairs at the clamp; ``loss_old`` and ``loss_new``, their means.

    Raises:
        InvalidArgument: shapes, or losses of collection or advantages that carry a gradient.
    """
    if loss_new.dim() != 2:
        raise InvalidArgument(f"fpo_loss: loss_new must be [B, N], got {list(loss_new.shape)}")
    context = partial(describe, loss_new=loss_new)
    check_shape("fpo_loss", "loss_old", loss_old, list(loss_new.shape), "[B, N]", context)
    if weight is not None:
        check_shape("fpo_loss", "weight", weight, list(loss_new.shape), "[B, N]", context)
    if loss_old.requires_grad:
        raise InvalidArgument("fpo_loss: loss_old is a constant of collection; detach it")
    log_ratio = loss_old - loss_new
    clamped = torch.zeros_like(log_ratio)
    if average_before_exp:
        log_ratio = log_ratio if weight is None else log_ratio * weight
        weight = None
    else:
        clamped = (log_ratio.detach().abs() > clamp).to(log_ratio.dtype)
        log_ratio = log_ratio.clamp(-clamp, clamp)
    loss, stats = ppo_loss(
        log_ratio, torch.zeros_like(log_ratio), advantage, clip=clip,
        joint="chain" if average_before_exp else "step", weight=weight, valid=valid,
    )  # fmt: skip
    means = {"log_ratio_clamped": clamped, "loss_old": loss_old, "loss_new": loss_new.detach()}
    return ObjectiveLoss(loss, {**stats, **{name: masked_mean(values, valid) for name, values in means.items()}})


class FPO:
    """FPO of one policy: how it acts, what a decision keeps, the loss of a Level-2 minibatch.

    Args:
        transitions: the sampler; for a flow :class:`~minidiff_fast.transitions.FlowTransitions` without noise.
        process: how actions are noised and what the network predicts.
        shape: (T, A).
        config: constants.
        act_steps: the executed action tokens; the others do not count in the losses.

    Raises:
        InvalidArgument: a sampler and a process that differ in their times or predictions.
    """

    def __init__(
        self,
        transitions: Transitions,
        process: DiffusionProcess | FlowMatching,
        shape: tuple[int, int],
        config: FPOConfig | None = None,
        *,
        act_steps: ActSteps = None,
    ) -> None:
        check_sampler("FPO", transitions, process)
        check_act_steps("FPO", act_steps, shape[0])
        self.transitions, self.process, self.shape, self.act_steps = transitions, process, shape, act_steps
        self.config = FPOConfig() if config is None else config
        self.joint = self.config.average_before_exp
        """Whether a decision has one ratio, so that its pairs cannot be told apart in a loss."""

    @torch.no_grad()
    def act(
        self,
        policy: Policy,
        cache: Any,
        *,
        obs: Any = None,
        base: Policy | None = None,
        generator: torch.Generator | None = None,
    ) -> Decision:
        """Draw actions from an encoded observation; the record is the N pairs and their losses, from the same encode.

        The record's actions are as drawn, unclamped: the ratio speaks of the sampler's own distribution. ``obs`` and
        ``base`` are not read; they are there for the loop, which calls all algorithms alike.

        Raises :class:`InvalidArgument` for a policy in training mode or one that gives actions that are not finite.
        """
        config = self.config
        chain = sample_chain(
            policy, obs, self.transitions, shape=self.shape, cache=cache, min_std=config.min_sampling_std,
            noise_clip=config.noise_clip, log_prob_clamp=None, act_steps=self.act_steps, generator=generator,
        )  # fmt: skip
        check_finite("FPO.act", chain.actions)
        actions = chain.samples[:, -1].clone()
        noise, times = self._pairs(actions, generator)
        loss = self._losses(policy, chain.cache, actions, noise, times)
        record = {"fpo_actions": actions, "fpo_noise": noise, "fpo_times": times, "fpo_loss": loss}
        return Decision(chain.actions, record)

    def minibatch(
        self,
        record: dict[str, Tensor],  # fpo_actions [B, T, A], fpo_noise [B, N, T, A], fpo_times, fpo_loss [B, N]
        *,
        k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """The pairs of B decisions as a Level-2 batch: actions (a view that repeats), noise ``[B, N', T, A]``, times,
        old_loss ``[B, N']``.

        With ``k`` each decision gives that many of its N pairs, drawn without replacement. With single ratios the mean
        over them is unbiased; with a ratio of the mean loss it is the ratio of a smaller sample, of old and new losses
        of the same pairs, so that it still is 1 with unchanged weights. Their weights are 1.

        Raises :class:`InvalidArgument` for the record of another algorithm or of another N.
        """
        n = self.config.samples
        check_record(
            "FPO",
            record,
            {"fpo_actions": self.shape, "fpo_noise": (n, *self.shape), "fpo_times": (n,), "fpo_loss": (n,)},
        )
        actions, noise = record["fpo_actions"], record["fpo_noise"]
        times, old = record["fpo_times"], record["fpo_loss"]
        if k is not None and k != n:
            pick = pick_steps(len(actions), n, k, device=actions.device, generator=generator)
            noise = noise.gather(1, pick[:, :, None, None].expand(-1, -1, *self.shape))
            times, old = times.gather(1, pick), old.gather(1, pick)
        return {"actions": actions[:, None].expand_as(noise), "noise": noise, "times": times, "old_loss": old}

    def loss(
        self,
        policy: Policy,
        cache: Any,
        batch: dict[str, Tensor],  # [B, N, ...] each, from minibatch
        advantage: Tensor,  # [B], normalised
        *,
        valid: Tensor | None = None,  # [B] bool
    ) -> ObjectiveLoss:
        """Score the stored pairs from one encoded condition a decision, and take the clipped surrogate."""
        config = self.config
        new = self._losses(policy, cache, batch["actions"][:, 0], batch["noise"], batch["times"])
        return fpo_loss(
            new, batch["old_loss"], advantage, clip=config.clip, average_before_exp=config.average_before_exp,
            clamp=config.clamp, weight=batch.get("weight"), valid=valid,
        )  # fmt: skip

    def _pairs(
        self,
        actions: Tensor,  # [B, T, A]
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor]:  # [B, N, T, A], [B, N]
        """N noises and times for every decision; the times are the process's."""
        shape, device = (len(actions), self.config.samples), actions.device
        source = device if generator is None else generator.device
        noise = torch.randn((*shape, *self.shape), generator=generator, device=source).to(device)
        if self.config.times == "process":
            return noise, self.process.draw_timesteps(shape, device=source, generator=generator).to(device)
        index = torch.randint(0, self.transitions.steps, shape, generator=generator, device=source).to(device)
        times = self.transitions.times(device)[index]
        return noise, times / self.process.timestep_scale if isinstance(self.process, FlowMatching) else times

    def _losses(
        self,
        policy: Policy,
        cache: Any,
        actions: Tensor,  # [B, T, A]
        noise: Tensor,  # [B, N, T, A]
        times: Tensor,  # [B, N]
    ) -> Tensor:  # [B, N]
        """Denoising losses of the pairs over the executed tokens."""
        weight = None
        if isinstance(self.process, FlowMatching) and self.config.flow_error == "noise":
            # From x and the velocity follows the noise: its error is the velocity's times the way left to the noise.
            weight = (1.0 - times if self.process.noise_at == 1 else times).square()
        return il_loss(
            policy, cache, actions, process=self.process, t=times, noise=noise, weight=weight,
            mask=executed_mask(actions, self.act_steps), reduction="none",
        )  # fmt: skip
