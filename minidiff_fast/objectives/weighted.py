r"""Weighted regression and Q-guided denoising on Level-2 batches: RWR, AWR, IDQL, Diffusion-QL.

- **AWR**: the denoising loss of the actions taken, K noisings each, weighted by :math:`\min(\exp(\beta A_b), w_{max})`;
  with normalised returns in place of advantages it is **RWR**. Noisings of a decision share condition and weight.
- **IDQL**: plain imitation for the policy, an expectile value function, and the best of K candidate actions of an
  observation by Q. The candidates' whole chains share one encode.
- **Diffusion-QL**: imitation plus :math:`-\eta\, Q` of an action whose whole chain is differentiated, from one encode.

Sources: Peters and Schaal, RWR, ICML 2007; Peng et al., AWR, arXiv 1910.00177; Hansen-Estruch et al., IDQL, arXiv
2304.10573; Wang et al., Diffusion-QL, arXiv 2208.06193. The constants are those of these methods in Ren et al., arXiv
2409.00588.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.nn.condition_cache import held_conditions
from minidiff_fast.objectives._records import check_finite, check_record, executed_mask, executed_tokens
from minidiff_fast.objectives.dppo import Decision
from minidiff_fast.objectives.imitation import DiffusionProcess, FlowMatching, check_sampler, il_loss
from minidiff_fast.objectives.policy_gradient import (
    ActSteps,
    ObjectiveLoss,
    check_act_steps,
    masked_mean,
    step_moments,
)
from minidiff_fast.policy import Policy
from minidiff_fast.sampling import sample_chain
from minidiff_fast.shapes import check_shape, describe
from minidiff_fast.transitions import Transitions


@dataclass(frozen=True)
class AWRConfig:
    """Constants of advantage- and reward-weighted regression."""

    beta: float = 10.0
    """Inverse temperature of the weights."""
    max_weight: float = 100.0
    """Upper bound of a weight."""
    samples: int = 1
    """K, fresh noisings of a decision's action in every minibatch."""
    min_sampling_std: float = 0.1
    """Lower bound of the standard deviation that is drawn in collection: exploration."""
    noise_clip: float = 3.0
    """Standard normal draws are clamped to this."""

    def __post_init__(self) -> None:
        for name in ("beta", "max_weight", "noise_clip"):
            if not getattr(self, name) > 0.0:
                raise InvalidArgument(f"AWRConfig: {name} must be above 0, got {getattr(self, name)}")
        if isinstance(self.samples, bool) or not isinstance(self.samples, int) or self.samples < 1:
            raise InvalidArgument(f"AWRConfig: samples must be an int >= 1, got {self.samples!r}")
        if not self.min_sampling_std >= 0.0:
            raise InvalidArgument(f"AWRConfig: min_sampling_std must be at least 0, got {self.min_sampling_std}")


def advantage_weights(
    advantage: Tensor,  # [B] or [B, K]
    *,
    beta: float = 10.0,
    max_weight: float = 100.0,
) -> Tensor:  # as advantage
    r""":math:`\min(\exp(\beta A), w_{max})`, without overflow on the way.

    Raises :class:`InvalidArgument` for an advantage that carries a gradient, beta <= 0 or max_weight <= 0.
    """
    if not (beta > 0.0 and max_weight > 0.0):
        raise InvalidArgument(f"advantage_weights: beta and max_weight must be above 0, got {beta} and {max_weight}")
    if advantage.dim() not in (1, 2):
        raise InvalidArgument(f"advantage_weights: advantage must be [B] or [B, K], got {list(advantage.shape)}")
    if advantage.requires_grad:
        raise InvalidArgument("advantage_weights: advantage is a constant; detach it")
    return (beta * advantage).clamp(max=math.log(max_weight)).exp()


def weighted_loss(
    loss: Tensor,  # [B, K]
    advantage: Tensor,  # [B]
    *,
    beta: float = 10.0,
    max_weight: float = 100.0,
    valid: Tensor | None = None,  # [B] bool
) -> ObjectiveLoss:
    r""":math:`\mathrm{mean}_{bk} \min(\exp(\beta A_b), w_{max})\, \ell_{bk}` over the valid decisions,
    whatever the others' advantages are (NaN included).

    Stats: ``denoising_loss`` (unweighted), ``weight`` (mean), ``weight_capped`` (share of decisions at the bound).

    Raises:
        InvalidArgument: shapes; in particular an advantage that is not [B].
    """
    if loss.dim() != 2:
        raise InvalidArgument(f"weighted_loss: loss must be [B, K], got {list(loss.shape)}")
    context = partial(describe, loss=loss)
    for name, tensor in (("advantage", advantage), ("valid", valid)):
        if tensor is not None:
            check_shape("weighted_loss", name, tensor, [len(loss)], "[B]", context)
    if valid is not None:  # before it is a factor: 0 * NaN is NaN in the gradient
        advantage = advantage.masked_fill(~valid, 0.0)
    weight = advantage_weights(advantage, beta=beta, max_weight=max_weight)
    with torch.no_grad():
        capped = (beta * advantage >= math.log(max_weight)).to(weight.dtype)
        stats = {
            "denoising_loss": masked_mean(loss.detach(), valid),
            "weight": masked_mean(weight, valid),
            "weight_capped": masked_mean(capped, valid),
        }
    return ObjectiveLoss(masked_mean(loss * weight[:, None], valid), stats)


class AWR:
    """Advantage-weighted regression of one policy (reward-weighted, where the loop gives normalised returns).

    Args:
        transitions: the sampler.
        process: how actions are noised and what the network predicts.
        shape: (T, A).
        config: constants.
        act_steps: the executed action tokens; the others do not count in the loss.

    Raises:
        InvalidArgument: a sampler and a process that differ in their times or predictions.
    """

    def __init__(
        self,
        transitions: Transitions,
        process: DiffusionProcess | FlowMatching,
        shape: tuple[int, int],
        config: AWRConfig | None = None,
        *,
        act_steps: ActSteps = None,
    ) -> None:
        check_sampler("AWR", transitions, process)
        check_act_steps("AWR", act_steps, shape[0])
        self.transitions, self.process, self.shape, self.act_steps = transitions, process, shape, act_steps
        self.config = AWRConfig() if config is None else config

    def act(
        self,
        policy: Policy,
        cache: Any,
        *,
        obs: Any = None,
        base: Policy | None = None,
        generator: torch.Generator | None = None,
    ) -> Decision:
        """Draw actions from an encoded observation; the record is these, as executed. ``obs`` and ``base`` are not
        read."""
        chain = sample_chain(
            policy, obs, self.transitions, shape=self.shape, cache=cache, min_std=self.config.min_sampling_std,
            noise_clip=self.config.noise_clip, log_prob_clamp=None, act_steps=self.act_steps, generator=generator,
        )  # fmt: skip
        check_finite("AWR.act", chain.actions)
        return Decision(chain.actions, {"awr_actions": chain.actions})

    def minibatch(
        self,
        record: dict[str, Tensor],  # awr_actions [B, T, A]
        *,
        k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Fresh noisings as a Level-2 batch: actions (a view that repeats), noise ``[B, K, T, A]``, times ``[B, K]``.

        ``k`` replaces the configuration's number of noisings. Raises :class:`InvalidArgument` for the record of another
        algorithm.
        """
        check_record("AWR", record, {"awr_actions": self.shape})
        actions, k = record["awr_actions"], self.config.samples if k is None else k
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise InvalidArgument(f"AWR: k, the noisings of a decision, must be an int >= 1, got {k!r}")
        source = actions.device if generator is None else generator.device
        size = (len(actions), k)
        noise = torch.randn((*size, *self.shape), generator=generator, device=source).to(actions.device)
        times = self.process.draw_timesteps(size, device=source, generator=generator).to(actions.device)
        return {"actions": actions[:, None].expand_as(noise), "noise": noise, "times": times}

    def loss(
        self,
        policy: Policy,
        cache: Any,
        batch: dict[str, Tensor],  # [B, K, ...] each, from minibatch
        advantage: Tensor,  # [B], normalised
        *,
        valid: Tensor | None = None,  # [B] bool
    ) -> ObjectiveLoss:
        """The weighted denoising loss, from one encoded condition a decision."""
        actions = batch["actions"][:, 0]
        loss = il_loss(
            policy, cache, actions, process=self.process, t=batch["times"], noise=batch["noise"],
            mask=executed_mask(actions, self.act_steps), reduction="none",
        )  # fmt: skip
        return weighted_loss(loss, advantage, beta=self.config.beta, max_weight=self.config.max_weight, valid=valid)


# ---------------------------------------------------------------- Q functions

CriticQ = Callable[[Tensor, Tensor], Tensor]
"""(features [B, ...], actions [B, K, T, A]) -> values [E, B, K] of E critics, or [B, K] of one."""


class TwinQ(nn.Module):
    r"""E critics of (observation, action chunk) pairs; the observation's share of the first layer is computed once.

    :math:`Q^e_{bk} = \mathrm{MLP}^e(W^e_c\, c_b + W^e_a\, a_{bk})`, SiLU between the layers.

    Args:
        features: numbers in an observation's features, To * Dc.
        shape: (T, A).
        hidden: widths of the hidden layers.
        critics: E.
        act_steps: the executed action tokens, which alone are read.
    """

    def __init__(
        self,
        features: int,
        shape: tuple[int, int],
        *,
        hidden: Sequence[int] = (256, 256),
        critics: int = 2,
        act_steps: ActSteps = None,
    ) -> None:
        if features < 1 or critics < 1 or len(hidden) < 1 or min(hidden) < 1:
            raise InvalidArgument(
                f"TwinQ: features, critics and all of hidden must be at least 1, got {features}, {critics}, "
                f"{tuple(hidden)}"
            )
        super().__init__()
        check_act_steps("TwinQ", act_steps, shape[0])
        self.features, self.shape, self.executed = features, shape, executed_tokens(act_steps)
        width = len(range(shape[0])[self.executed]) * shape[1]
        self.condition_proj = nn.ModuleList(nn.Linear(features, hidden[0]) for _ in range(critics))
        self.action_proj = nn.ModuleList(nn.Linear(width, hidden[0], bias=False) for _ in range(critics))
        self.heads = nn.ModuleList()
        for _ in range(critics):
            sizes = [*hidden, 1]
            layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
            self.heads.append(nn.Sequential(*(part for layer in layers for part in (nn.SiLU(), layer))))

    def forward(
        self,
        features: Tensor,  # [B, ...], flattened to [B, features]
        actions: Tensor,  # [B, K, T, A]
    ) -> Tensor:  # [E, B, K]
        """Values of every critic."""
        flat = features.flatten(1)
        context = partial(describe, features=features, actions=actions)
        check_shape("TwinQ", "features", flat, ["B", self.features], "[B, To * Dc]", context)
        check_shape("TwinQ", "actions", actions, [len(flat), "K", *self.shape], "[B, K, T, A]", context)
        rows = actions[:, :, self.executed].flatten(2).to(flat.dtype)
        values = [
            head(condition(flat)[:, None] + action(rows))[..., 0]
            for condition, action, head in zip(self.condition_proj, self.action_proj, self.heads, strict=True)
        ]
        return torch.stack(values)


def score_candidates(
    critic_q: CriticQ,
    features: Tensor,  # [B, ...]
    candidates: Tensor,  # [B, K, T, A]
) -> Tensor:  # [B, K]
    """The least of the critics' values of K candidates of each of B observations, whose features are not repeated.

    Raises :class:`InvalidArgument` where the critic returns another shape than [E, B, K] or [B, K].
    """
    values = critic_q(features, candidates)
    if values.dim() not in (2, 3) or values.shape[-2:] != candidates.shape[:2]:
        raise InvalidArgument(
            f"score_candidates: critic_q must return [E, B, K] or [B, K] with [B, K] = {list(candidates.shape[:2])}, "
            f"got {list(values.shape)}"
        )
    return values.amin(0) if values.dim() == 3 else values


def select_candidate(
    score: Tensor,  # [B, K]
    candidates: Tensor,  # [B, K, T, A]
    *,
    value: Tensor | None = None,  # [B]
    expectile: float = 0.7,
    generator: torch.Generator | None = None,
) -> Tensor:  # [B, T, A]
    """IDQL's action: the best candidate; with ``value``, one drawn with weight ``expectile`` where its score is above
    the value of the observation and ``1 - expectile`` where it is not (exploration)."""
    batch, k = score.shape
    context = partial(describe, score=score)
    check_shape("select_candidate", "candidates", candidates, [batch, k, "T", "A"], "[B, K, T, A]", context)
    if not 0.0 < expectile < 1.0:
        raise InvalidArgument(f"select_candidate: expectile must be in (0, 1), got {expectile}")
    if value is None:
        chosen = score.argmax(1)
    else:
        check_shape("select_candidate", "value", value, [batch], "[B]", context)
        weight = torch.where(score > value[:, None], expectile, 1.0 - expectile)
        source = score.device if generator is None else generator.device
        chosen = torch.multinomial(weight.to(source), 1, generator=generator)[:, 0].to(score.device)
    return candidates.gather(1, chosen[:, None, None, None].expand(-1, 1, *candidates.shape[2:]))[:, 0]


def expectile_value_loss(
    value: Tensor,  # [B]
    score: Tensor,  # [B], Q of the actions taken
    *,
    expectile: float = 0.8,
    valid: Tensor | None = None,  # [B] bool
) -> Tensor:  # []
    r""":math:`\mathrm{mean}_b |\tau - 1(Q_b \le V_b)|\, (Q_b - V_b)^2`: the value is the tau-expectile of Q.

    Raises :class:`InvalidArgument` for shapes other than [B], an expectile outside (0, 1), a score with a gradient.
    """
    if value.dim() != 1:
        raise InvalidArgument(f"expectile_value_loss: value must be [B], got {list(value.shape)}")
    check_shape("expectile_value_loss", "score", score, list(value.shape), "[B]", partial(describe, value=value))
    if not 0.0 < expectile < 1.0:
        raise InvalidArgument(f"expectile_value_loss: expectile must be in (0, 1), got {expectile}")
    if score.requires_grad:
        raise InvalidArgument("expectile_value_loss: score is a constant, of the target critics; detach it")
    difference = score - value
    if valid is not None:  # before it is squared: 0 * NaN is NaN in the gradient
        difference = difference.masked_fill(~valid, 0.0)
    return masked_mean(torch.where(difference > 0, expectile, 1.0 - expectile) * difference.square(), valid)


def sample_chain_differentiable(
    policy: Policy,
    cache: Any,
    transitions: Transitions,
    *,
    shape: tuple[int, int],
    k: int = 1,
    min_std: float = 0.1,
    noise_clip: float | None = 3.0,
    noise: Tensor | None = None,  # [B, K, T, A]
    generator: torch.Generator | None = None,
) -> Tensor:  # [B, K, T, A]
    """K action sequences for each of B conditions, in [-1, 1], with gradients through all steps into the one encode.

    The steps' noise is reparametrised. Memory grows with the sampler's steps; under ``torch.no_grad()`` it does not.

    Args:
        policy: its ``denoise`` runs once a step, on B * K rows.
        cache: what ``policy.encode`` gave.
        transitions: the sampler.
        shape: (T, A).
        k: samples per condition.
        min_std: lower bound of the standard deviation that is drawn.
        noise_clip: standard normal draws of the steps are clamped to this; None does not clamp.
        noise: the chain's start, whose dtype it has; None draws it in float32.
        generator: the only source of randomness.

    Raises:
        InvalidArgument: k < 1, or an initial noise of another shape.
    """
    held = held_conditions(cache)
    if not held or held[0][1] is None:
        raise InvalidArgument("sample_chain_differentiable: cache must hold tensors of leading dimension B")
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise InvalidArgument(f"sample_chain_differentiable: k must be an int >= 1, got {k!r}")
    size = (held[0][1], k, *shape)
    device = next(leaf.device for leaf in pytree.tree_leaves(cache) if isinstance(leaf, Tensor))
    source = device if generator is None else generator.device

    def normal(dtype: torch.dtype) -> Tensor:
        return torch.randn(size, generator=generator, device=source, dtype=dtype).to(device)

    if noise is not None:
        check_shape("sample_chain_differentiable", "noise", noise, list(size), "[B, K, T, A]", describe(noise=noise))
    x = normal(torch.float32) if noise is None else noise
    for step in range(transitions.steps):
        index = torch.full(size[:2], step, dtype=torch.int64, device=device)
        moments = step_moments(policy, cache, x, index, transitions=transitions)
        drawn = normal(x.dtype)
        drawn = drawn if noise_clip is None else drawn.clamp(-noise_clip, noise_clip)
        x = moments.mean + moments.std.clamp(min=min_std) * drawn
    return x.clamp(-1.0, 1.0)


def diffusion_ql_loss(
    policy: Policy,
    cache: Any,
    critic_q: nn.Module,
    features: Tensor,  # [B, ...]
    actions: Tensor,  # [B, T, A], of the data
    *,
    transitions: Transitions,
    process: DiffusionProcess | FlowMatching,
    eta: float = 1.0,
    k: int = 1,
    min_std: float = 0.1,
    noise_clip: float | None = 3.0,
    valid: Tensor | None = None,  # [B] bool
    noise: Tensor | None = None,  # [B, K, T, A]
    generator: torch.Generator | None = None,
) -> ObjectiveLoss:
    r"""Diffusion-QL's actor: imitation of the data's actions plus minus Q of the policy's own.

    :math:`L = L_{il} - \eta\, \mathrm{mean}\, Q^i / \mathrm{mean}\, |Q^j|`, i and j two of the critics in random order
    and the divisor held constant. The gradient runs through the critics into the actions and through the whole chain
    into the one encode that ``cache`` came from; the critics' parameters and ``features`` get none.

    Args:
        critic_q: see :data:`CriticQ`; its parameters are held constant here.
        features: what the critics read; detached.
        k: noisings for imitation, and actions for Q, per observation.
        valid: observations that count.
        noise: start of the chains.

    Stats: ``imitation`` and ``q`` (means).

    Raises:
        InvalidArgument: eta < 0, a critic that returns another shape, see also :func:`sample_chain_differentiable`.
    """
    if not eta >= 0.0:
        raise InvalidArgument(f"diffusion_ql_loss: eta must be at least 0, got {eta}")
    check_sampler("diffusion_ql_loss", transitions, process)
    own = sample_chain_differentiable(
        policy, cache, transitions, shape=(actions.shape[1], actions.shape[2]), k=k, min_std=min_std,
        noise_clip=noise_clip, noise=noise, generator=generator,
    )  # fmt: skip
    constants = {name: tensor.detach() for name, tensor in critic_q.named_parameters()}
    values = torch.func.functional_call(critic_q, constants, (features.detach(), own))
    if values.dim() == 2:
        values = values[None]
    if values.shape[1:] != own.shape[:2]:
        raise InvalidArgument(
            f"diffusion_ql_loss: critic_q must return [E, B, K] or [B, K] with [B, K] = {list(own.shape[:2])}, "
            f"got {list(values.shape)}"
        )
    source = values.device if generator is None else generator.device
    order = torch.rand(len(values), generator=generator, device=source).argsort().to(values.device)
    up, scale = values[order[0]], values[order[-1]]
    q = masked_mean(up, valid) / masked_mean(scale.detach().abs(), valid)
    imitation = masked_mean(
        il_loss(policy, cache, actions, k=k, process=process, reduction="none", generator=generator), valid
    )
    stats = {"imitation": imitation.detach(), "q": masked_mean(values.detach().amin(0), valid)}
    return ObjectiveLoss(imitation - eta * q, stats)
