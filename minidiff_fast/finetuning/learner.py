"""One update from a rollout: epochs of Level-2 minibatches, or of the flat pairs that the peers train on."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from minidiff_fast.errors import InvalidArgument, MinidiffFastError
from minidiff_fast.finetuning.flat import flat_losses
from minidiff_fast.objectives.policy_gradient import ObjectiveLoss, clamp_advantage, normalize_advantage, value_loss


class StaleRecord(MinidiffFastError, RuntimeError):
    """The first ratio of an update is not 1: the record was not made by this policy."""


class Algorithm(Protocol):
    """What the learner and the loop need of DPPO, FPO, ReinFlow and the weighted methods."""

    def act(self, policy: Any, cache: Any, *, obs: Any = None, base: Any = None, generator: Any = None) -> Any:
        """Decision(actions ``[B, T, A]``, record)."""

    def minibatch(
        self, record: dict[str, Tensor], *, k: int | None = None, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """The record's rows as a Level-2 batch, ``[B, K, ...]`` each."""

    def loss(
        self, policy: Any, cache: Any, batch: dict[str, Tensor], advantage: Tensor, *, valid: Tensor | None = None
    ) -> ObjectiveLoss:
        """The actor's loss."""


class Rows(Protocol):
    """A minibatch of decisions."""

    obs: Any
    record: dict[str, Tensor]
    advantage: Tensor
    returns: Tensor
    value: Tensor


@dataclass(frozen=True)
class UpdateConfig:
    """How one rollout is learned from."""

    epochs: int = 10
    """Passes over the decisions."""
    batch_size: int = 500
    """B, decisions of a minibatch."""
    k: int | None = None
    """K of each decision that a minibatch takes (drawn anew each time); None takes all."""
    actor_lr: float = 1e-4
    """AdamW's learning rate of the policy."""
    critic_lr: float = 1e-3
    """AdamW's learning rate of the value function."""
    weight_decay: float = 0.0
    """Of both."""
    grad_clip: float = 1.0
    """Largest norm of the actor's gradient, and of the critic's."""
    value_clip: float | None = None
    """Clip range of the value around that of collection; None does not clip."""
    target_kl: float | None = 1.0
    """The actor stops for this update once a minibatch's mean KL is above this."""
    normalize_advantage: bool = True
    """Zero mean and unit variance over the minibatch's decisions."""
    advantage_quantiles: tuple[float, float] = (0.0, 1.0)
    """Quantiles of the minibatch's advantages to which they are clamped; (0, 1) clamps none."""
    flat_pairs: bool = False
    """Train on (decision, denoising step) pairs that each encode their own observation: what the peers do."""
    rows_per_pass: int | None = None
    """Decisions that run at once; less needs less memory, the gradient is the same. None: the whole minibatch."""
    critic_epochs: int | None = None
    """Passes of the critic, at least ``epochs``: those beyond train it alone. None: as many as ``epochs``."""

    def __post_init__(self) -> None:
        for name in ("epochs", "critic_epochs", "batch_size", "k", "rows_per_pass"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InvalidArgument(f"UpdateConfig: {name} must be an int >= 1, got {value!r}")
        if self.critic_epochs is not None and self.critic_epochs < self.epochs:
            raise InvalidArgument(
                f"UpdateConfig: critic_epochs must be at least epochs = {self.epochs}, got {self.critic_epochs}"
            )
        for name in ("actor_lr", "critic_lr", "grad_clip", "target_kl", "value_clip"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0.0):
                raise InvalidArgument(f"UpdateConfig: {name} must be above 0, got {value}")
        low, high = self.advantage_quantiles
        if not 0.0 <= low < high <= 1.0:
            raise InvalidArgument(
                f"UpdateConfig: advantage_quantiles must be 0 <= low < high <= 1, got {self.advantage_quantiles}"
            )
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0.0):
            raise InvalidArgument(f"UpdateConfig: weight_decay must be at least 0, got {self.weight_decay}")


class Encoded(NamedTuple):
    """What one encoder pass gave."""

    features: Tensor
    """[B, To, Dc]."""
    cache: Any
    """Of the algorithm, leading dimension B."""


def encode(policy: Any, algorithm: Algorithm, obs: Any) -> Encoded:
    """One encoder pass, for all that reads the observations in a step."""
    features = policy.features(obs)
    return Encoded(features, condition(policy, algorithm, features))


def level2_losses(
    policy: Any,
    critic: nn.Module,
    algorithm: Algorithm,
    obs: Any,
    batch: dict[str, Tensor],  # [B, K, ...] each
    advantage: Tensor,  # [B]
    returns: Tensor,  # [B]
    old_value: Tensor,  # [B]
    *,
    value_clip: float | None = None,
    encoded: Encoded | None = None,
) -> tuple[ObjectiveLoss, Tensor]:
    """Actor and value loss from one encoder pass a decision, or from none where it is ``encoded`` already."""
    features, cache = encode(policy, algorithm, obs) if encoded is None else encoded
    actor = algorithm.loss(policy, cache, batch, advantage)
    return actor, value_loss(critic(obs, features), returns, old_value, clip=value_clip)


def condition(policy: Any, algorithm: Algorithm, features: Tensor) -> Any:
    """The cache that the algorithm reads: the policy's, or with what the algorithm adds to it."""
    own = getattr(algorithm, "condition", None)
    return policy.condition(features) if own is None else own(policy, features)


class Learner:
    """Optimisers and the update of a policy and its critic.

    Args:
        policy: has features, condition, denoise; its parameters are trained, and those of ``algorithm.module``.
        critic: ``(obs, features) -> [B]``.
        algorithm: DPPO, FPO, ReinFlow, ...
        config: constants.
        base: the frozen policy of the behaviour-cloning term.
        shadow: with ``flat_pairs``, a network that runs beside the policy's for nothing, see
            :class:`~minidiff_fast.finetuning.flat.FlatPolicy`.
    """

    def __init__(
        self,
        policy: Any,
        critic: Any,
        algorithm: Algorithm,
        config: UpdateConfig,
        *,
        base: Any = None,
        shadow: Any = None,
    ) -> None:
        self.policy, self.critic, self.algorithm, self.config = policy, critic, algorithm, config
        self.shadow = shadow
        self.base, self.bc_weight = base, float(getattr(getattr(algorithm, "config", None), "bc_weight", 0.0))
        if self.bc_weight > 0.0 and base is None:
            raise InvalidArgument("Learner: bc_weight > 0 needs base, the frozen policy to stay near")
        extra = getattr(algorithm, "module", None)
        self.actor_parameters = [p for p in policy.parameters() if p.requires_grad]
        if extra is not None:
            self.actor_parameters += [p for p in extra.parameters() if p.requires_grad]
        self.critic_parameters = [p for p in critic.parameters() if p.requires_grad]
        if not self.actor_parameters or not self.critic_parameters:
            raise InvalidArgument("Learner: policy and critic must have parameters that require gradients")
        self.actor = torch.optim.AdamW(
            self.actor_parameters, lr=config.actor_lr, weight_decay=config.weight_decay, eps=1e-5
        )
        self.critic_optimizer = torch.optim.AdamW(
            self.critic_parameters, lr=config.critic_lr, weight_decay=config.weight_decay, eps=1e-5
        )

    def update(self, buffer: Any, *, train_actor: bool, generator: torch.Generator | None = None) -> dict[str, float]:
        """All epochs over a finished buffer; returns the means of what was seen on the way.

        With ``train_actor=False`` the policy is left alone (critic warm-up): no forward, no backward, no step of it.

        Raises:
            StaleRecord: the first ratio is not 1.
        """
        config, seen, first, stopped = self.config, _Means(), True, False
        for optimizer in (self.actor, self.critic_optimizer):  # an update that raised may have left gradients
            optimizer.zero_grad(set_to_none=True)
        for epoch in range(config.epochs):
            for index in buffer.minibatches(config.batch_size, generator=generator):
                act = train_actor and not stopped
                stats = self._minibatch(buffer.rows(index), act, generator)
                if act and first and "ratio_max" in stats:
                    _check_first_ratio(stats)
                if act and config.target_kl is not None and float(stats.get("approx_kl", 0.0)) > config.target_kl:
                    stopped = True  # before the step that would go on from there
                    self.actor.zero_grad(set_to_none=True)
                    seen.add({"kl_stops": torch.ones(())})
                elif act:
                    norm = nn.utils.clip_grad_norm_(self.actor_parameters, config.grad_clip)
                    self.actor.step()
                    seen.add({"actor_grad_norm": norm})
                self.actor.zero_grad(set_to_none=True)
                seen.add({**stats, "critic_grad_norm": self._step_critic()})
                first = first and not act
            seen.add({"epochs": torch.tensor(float(epoch + 1))}, keep_last=True)
        for _ in range(config.epochs, config.critic_epochs or config.epochs):
            for index in buffer.minibatches(config.batch_size, generator=generator):
                stats = self._minibatch(buffer.rows(index), False, generator)
                seen.add({**stats, "critic_grad_norm": self._step_critic()})
        return seen.result()

    def _step_critic(self) -> Tensor:
        """One step with the gradients that lie there; their norm."""
        norm = nn.utils.clip_grad_norm_(self.critic_parameters, self.config.grad_clip)
        self.critic_optimizer.step()
        self.critic_optimizer.zero_grad(set_to_none=True)
        return norm

    def _minibatch(self, rows: Any, train_actor: bool, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Gradients of one minibatch, in passes of ``rows_per_pass`` decisions; a mean over all of them."""
        config, total = self.config, len(rows.advantage)
        advantage = normalize_advantage(rows.advantage) if config.normalize_advantage else rows.advantage
        if config.advantage_quantiles != (0.0, 1.0):
            advantage = clamp_advantage(advantage, *config.advantage_quantiles)
        size = total if config.rows_per_pass is None else config.rows_per_pass
        gathered: dict[str, Tensor] = {}
        for start in range(0, total, size):
            part = slice(start, min(start + size, total))
            share = (part.stop - part.start) / total
            stats = self._pass(rows, advantage, part, share, train_actor, generator)
            for name, value in stats.items():
                if name.endswith("_max"):
                    gathered[name] = torch.maximum(gathered[name], value) if name in gathered else value
                else:
                    gathered[name] = gathered.get(name, torch.zeros(())) + share * value
        return gathered

    def _pass(
        self, rows: Any, advantage: Tensor, part: slice, share: float, train_actor: bool, generator: Any
    ) -> dict[str, Tensor]:
        config = self.config
        obs = torch.utils._pytree.tree_map(lambda leaf: leaf[part], rows.obs)
        returns, old_value = rows.returns[part], rows.value[part]
        if not train_actor:
            with torch.no_grad():
                features = None if getattr(self.critic, "own_encoder", False) else self.policy.features(obs)
            value = value_loss(self.critic(obs, features), returns, old_value, clip=config.value_clip)
            (share * value).backward()
            return {"value_loss": value.detach()}
        record = {name: tensor[part] for name, tensor in rows.record.items()}
        batch = self.algorithm.minibatch(record, k=config.k, generator=generator)
        given = (self.policy, self.critic, self.algorithm, obs, batch, advantage[part], returns, old_value)
        encoded = None
        if config.flat_pairs:
            actor, value = flat_losses(*given, value_clip=config.value_clip, shadow=self.shadow)
        else:
            encoded = encode(self.policy, self.algorithm, obs)
            actor, value = level2_losses(*given, value_clip=config.value_clip, encoded=encoded)
        loss, extra = actor.loss + value, {}
        if self.bc_weight > 0.0:
            cloning = self._cloning(obs, generator, encoded)
            loss, extra = loss + self.bc_weight * cloning, {"bc_loss": cloning.detach()}
        (share * loss).backward()
        found = {"actor_loss": actor.loss.detach(), "value_loss": value.detach()}
        return {**found, **actor.stats, **extra}

    def _cloning(self, obs: Any, generator: torch.Generator | None, encoded: Encoded | None = None) -> Tensor:
        cache = (encode(self.policy, self.algorithm, obs) if encoded is None else encoded).cache
        loss: Tensor = self.algorithm.behaviour_cloning(self.policy, cache, self.base, obs, generator=generator)  # type: ignore[attr-defined]
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Both optimisers."""
        return {"actor": self.actor.state_dict(), "critic": self.critic_optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The counterpart of :meth:`state_dict`."""
        self.actor.load_state_dict(state["actor"])
        self.critic_optimizer.load_state_dict(state["critic"])


def _check_first_ratio(stats: dict[str, Tensor]) -> None:
    # The mean ratio is near 1 for any policy, as the record's own is what it is an expectation under; the KL is not.
    ratio, kl = float(stats["ratio"]), float(stats["approx_kl"])
    if not (abs(ratio - 1.0) < 1e-2 and kl < 1e-3):
        raise StaleRecord(
            f"the first minibatch of an update must have ratio 1 and KL 0 (the policy has not changed since "
            f"collection), got {ratio:.4f} and {kl:.4f}: the record's log-probabilities or losses are those of another "
            "policy, sampler or mode"
        )


class _Means:
    """Running means of named scalars, on their device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, list[Tensor]] = {}
        self._last: dict[str, Tensor] = {}

    def add(self, values: dict[str, Tensor], *, keep_last: bool = False) -> None:
        for name, value in values.items():
            if keep_last:
                self._last[name] = value
            else:
                self._sums.setdefault(name, []).append(value.detach())

    def result(self) -> dict[str, float]:
        means = {name: float(torch.stack(_same_kind(values)).mean()) for name, values in self._sums.items()}
        if "kl_stops" in self._sums:
            means["kl_stops"] = float(len(self._sums["kl_stops"]))
        return {**means, **{name: float(value) for name, value in self._last.items()}}


def _same_kind(values: Iterable[Tensor]) -> list[Tensor]:
    return [value.detach().float().cpu() for value in values]
