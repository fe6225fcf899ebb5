"""What a rollout leaves for the update: every observation once, whatever the number of denoising steps."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minidiff_fast.errors import InvalidArgument, MinidiffFastError
from minidiff_fast.finetuning.reward_scaler import RewardScaler
from minidiff_fast.objectives.policy_gradient import gae

__all__ = ["ObsEntry", "RewardScaler", "RolloutBuffer", "RolloutError", "Rows", "obs_entries"]


_SCALARS = ("reward", "value", "next_value", "advantage", "returns", "terminated", "truncated", "valid")


class RolloutError(MinidiffFastError, ValueError):
    """An environment gave what cannot be learned from: a NaN reward or observation, an episode of no steps."""


class ObsEntry(NamedTuple):
    """One entry of an observation."""

    shape: tuple[int, ...]
    """[To, ...], of one environment."""
    dtype: torch.dtype
    """What the environment gives; float64 and 16-bit floats are stored as float32."""


class Rows(NamedTuple):
    """A minibatch of decisions; B is the length of the index it was made from."""

    obs: dict[str, Tensor]
    """[B, To, ...] each, in the dtype of the buffer: images uint8, float32 otherwise."""
    record: dict[str, Tensor]
    """[B, ...] each: what the algorithm recorded when it acted."""
    advantage: Tensor
    """[B] float32."""
    returns: Tensor
    """[B] float32, the value's target."""
    value: Tensor
    """[B] float32, of the critic that collected."""
    valid: Tensor
    """[B] bool; True throughout for an index of :meth:`RolloutBuffer.minibatches`."""
    features: Tensor | None
    """[B, To, Dc] of the encoder that collected, detached; None if the buffer keeps none."""
    indices: Tensor
    """[B] int64 on the CPU: decision * envs + environment."""


def obs_entries(space: Any, name: str = "observation") -> dict[str, ObsEntry]:
    """The entries of an environment's (single) observation space: a Dict of Boxes, or one Box under ``name``."""
    spaces = getattr(space, "spaces", None) or {name: space}
    return {
        key: ObsEntry(tuple(entry.shape), torch.as_tensor(np.empty(0, entry.dtype)).dtype)
        for key, entry in spaces.items()
    }


class RolloutBuffer:
    """S decisions of N environments, preallocated on the CPU.

    Stored once per decision: the observation in its own dtype, reward, flags, values, and the ``record`` that the
    algorithm made when it acted (a chain of K + 1 samples, K log-probabilities). Nothing else has a denoising axis.

    Life of a rollout: :meth:`clear`, S times :meth:`add`, :meth:`finish`, then :meth:`minibatches` and :meth:`rows`.

    Args:
        decisions: S.
        envs: N.
        obs: entries of an observation (:func:`obs_entries` makes them from a space).
        keep_features: also keep the encoder's features of the time of collection, which ``add`` must then be given.
        device: where :meth:`rows` puts a minibatch.

    Raises:
        InvalidArgument: decisions or envs < 1, no entries, or an image (four axes or more, time included) that is not
            uint8.
    """

    def __init__(
        self,
        decisions: int,
        envs: int,
        obs: Mapping[str, ObsEntry],
        *,
        keep_features: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, number in (("decisions", decisions), ("envs", envs)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise InvalidArgument(f"RolloutBuffer: {name} must be an int >= 1, got {number!r}")
        if not obs:
            raise InvalidArgument("RolloutBuffer: obs must have at least one entry, got none")
        for name, (shape, dtype) in obs.items():
            if len(shape) >= 4 and dtype != torch.uint8:
                raise InvalidArgument(
                    f"RolloutBuffer: images must be uint8 (a float image needs 4 or 8 times the memory); "
                    f"entry {name!r} is {list(shape)} {dtype}"
                )
        self.decisions, self.envs, self.keep_features = decisions, envs, keep_features
        self.device = torch.device(device)
        sizes = (decisions, envs)
        self.obs = {name: torch.zeros((*sizes, *shape), dtype=_stored(dtype)) for name, (shape, dtype) in obs.items()}
        self._given = {name: entry.dtype for name, entry in obs.items()}
        self.record: dict[str, Tensor] = {}
        self.features: Tensor | None = None
        self.reward, self.value, self.next_value, self.advantage, self.returns = (torch.zeros(sizes) for _ in range(5))
        self.terminated, self.truncated, self.valid = (torch.zeros(sizes, dtype=torch.bool) for _ in range(3))
        self.position = 0
        """Decisions added since :meth:`clear`."""
        self.finished = False

    @property
    def full(self) -> bool:
        """Whether all S decisions have been added."""
        return self.position == self.decisions

    def clear(self) -> None:
        """Start the next rollout in the same memory."""
        self.position, self.finished = 0, False

    def add(
        self,
        obs: Mapping[str, Any],  # name -> [N, To, ...]
        *,
        record: Mapping[str, Tensor],  # name -> [N, ...]
        reward: Any,  # [N]
        terminated: Any,  # [N] bool
        truncated: Any,  # [N] bool
        value: Any,  # [N]
        final_value: Any = None,  # [N]
        valid: Any = None,  # [N] bool
        env_steps: Any = None,  # [N] int
        features: Tensor | None = None,  # [N, To, Dc]
    ) -> None:
        """One decision of every environment. Arrays may be NumPy's or torch's, on any device.

        Args:
            obs: what the policy saw when it decided.
            record: what the algorithm recorded; float64 and 16-bit floats become float32, integers stay.
            reward: summed over the decision's environment steps.
            terminated, truncated: whether the episode ended, or was cut, within the decision.
            value: V of ``obs``; finite for rows that are not valid, too, as the decision before may need it.
            final_value: V of the episode's true last observation, read where ``truncated`` only; may be left out while
                nothing valid is truncated.
            valid: False for a row that is no transition (an inserted reset, a dead environment): it is never trained
                on and cuts the advantage's sum; its reward and record are stored as 0. None is all True.
            env_steps: environment steps that the decision took.
            features: see ``keep_features``.

        Raises:
            InvalidArgument: the buffer is full, or a name, shape or dtype does not fit.
            RolloutError: a valid row has a reward, value or observation that is NaN or infinite, or took no environment
                steps. Nothing has been written in any of these cases.
        """
        if self.full:
            raise InvalidArgument(
                f"RolloutBuffer.add: {self.decisions} decisions are in, which is all it holds; finish() and clear() it"
            )
        row = self._scalars(reward, terminated, truncated, value, final_value, valid)
        counts = row["valid"]
        seen = self._observations(obs)
        recorded = self._recorded(record)
        kept = self._features(features)
        self._check_numbers(row, seen, env_steps, truncation_valued=final_value is not None)
        self._allocate(recorded, kept)
        step = self.position
        for name, tensor in seen.items():
            self.obs[name][step].copy_(tensor)
        for name, tensor in recorded.items():
            self.record[name][step].copy_(_zeroed(tensor, counts))
        if self.features is not None and kept is not None:
            self.features[step].copy_(_zeroed(kept, counts))
        for name, tensor in row.items():
            stored: Tensor = getattr(self, name)
            # The value of an invalid row stays: the decision before it bootstraps from it.
            stored[step].copy_(_zeroed(tensor, counts) if name == "reward" else tensor)
        self.position += 1

    def finish(
        self,
        last_value: Any,  # [N]
        *,
        gamma: float,
        lam: float,
        scaler: RewardScaler | None = None,
    ) -> None:
        """Advantages and returns of a full buffer (:func:`~minidiff_fast.objectives.policy_gradient.gae`).

        The value after a decision is that of the next decision's observation, of the episode's last observation where
        the episode was cut, and ``last_value`` (V of what the environments show now) after the last decision.

        Args:
            last_value: V of the observation that decision S would see.
            gamma: discount per decision.
            lam: lambda of GAE.
            scaler: learns from this rollout's rewards and then scales all of them alike; ``reward`` stays as it came.

        Raises:
            InvalidArgument: the buffer is not full or is finished, or last_value is not [N] finite numbers.
        """
        if not self.full or self.finished:
            state = "is finished already" if self.finished else f"has {self.position} of {self.decisions} decisions"
            raise InvalidArgument(f"RolloutBuffer.finish: expected a full, unfinished buffer; this one {state}")
        after = self._vector("finish", "last_value", last_value, torch.float32)
        if not bool(after.isfinite().all()):
            raise InvalidArgument(f"RolloutBuffer.finish: last_value must be finite, got {after.tolist()}")
        following = torch.cat([self.value[1:], after[None]])
        next_value = torch.where(self.truncated, self.next_value, following).masked_fill(self.terminated, 0.0)
        ended = self.terminated | self.truncated
        reward = self.reward if scaler is None else scaler(self.reward, ended, self.valid)
        found = gae(reward, self.value, next_value, self.terminated, self.truncated, self.valid, gamma=gamma, lam=lam)
        self.next_value.copy_(next_value)
        self.advantage.copy_(found.advantage)
        self.returns.copy_(found.returns)
        self.finished = True

    def minibatches(self, batch_size: int, *, generator: torch.Generator | None = None) -> list[Tensor]:
        """One epoch: shuffled indices for :meth:`rows`, every valid decision in exactly one of them.

        Minibatches have ``batch_size`` decisions. What is left at the end is a smaller minibatch if it is at least half
        of ``batch_size``, and joins the one before it otherwise: no decision waits for the next epoch, and none weighs
        more than twice another.

        Raises:
            InvalidArgument: the buffer is not finished, batch_size < 1, or no row is valid.
        """
        self._assert_finished("minibatches")
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise InvalidArgument(f"RolloutBuffer.minibatches: batch_size must be an int >= 1, got {batch_size!r}")
        usable = self.valid.flatten().nonzero().squeeze(1)
        if len(usable) == 0:
            raise InvalidArgument("RolloutBuffer.minibatches: no decision of this rollout is valid")
        device = "cpu" if generator is None else generator.device
        order = usable[torch.randperm(len(usable), generator=generator, device=device).cpu()]
        parts = list(order.split(batch_size))
        if len(parts) > 1 and 2 * len(parts[-1]) < batch_size:
            last = parts.pop()
            parts[-1] = torch.cat([parts[-1], last])
        return parts

    def rows(
        self,
        index: Tensor,  # [B] int64
    ) -> Rows:
        """The decisions at ``index`` (decision * N + environment), copied to the buffer's device."""
        self._assert_finished("rows")
        index = index.cpu()

        def take(tensor: Tensor) -> Tensor:
            return self._move(tensor.flatten(0, 1).index_select(0, index))

        return Rows(
            {name: take(tensor) for name, tensor in self.obs.items()},
            {name: take(tensor) for name, tensor in self.record.items()},
            take(self.advantage),
            take(self.returns),
            take(self.value),
            take(self.valid),
            None if self.features is None else take(self.features),
            index,
        )

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes by entry (``obs.<name>``, ``record.<name>``, ``features``, the scalars) and in ``total``.

        The record and the features are counted from the first :meth:`add` on, which allocates them.
        """
        sizes = {name: tensor.nbytes for name, tensor in self._arrays().items()}
        return {**sizes, "total": sum(sizes.values())}

    def flat_nbytes(self, k: int, per_decision: Collection[str] = ("actions",)) -> int:
        """Bytes of a buffer with one row per (decision, denoising step), all of its entries once a row.

        Arithmetic on :attr:`nbytes`: every entry that belongs to a decision counts K times; a chain of K + 1 samples
        counts as K pairs (before, after), 2 K / (K + 1) times; a record with K values per decision counts once.

        Args:
            k: K.
            per_decision: record entries that belong to a decision and not to its K samples; of the others the first
                axis must be K or K + 1.
        """
        total = 0
        for name, tensor in self._arrays().items():
            group, _, entry = name.partition(".")
            if group != "record" or entry in per_decision:
                total += k * tensor.nbytes
                continue
            length = tensor.shape[2] if tensor.dim() > 2 else None
            if length not in (k, k + 1):
                raise InvalidArgument(
                    f"RolloutBuffer.flat_nbytes: record {entry!r} must be [S, N, K or K + 1, ...] with K = {k}, "
                    f"got {list(tensor.shape)}; name it in per_decision if it belongs to a decision"
                )
            total += tensor.nbytes if length == k else tensor.nbytes // (k + 1) * 2 * k
        return total

    def _arrays(self) -> dict[str, Tensor]:
        return {
            **{f"obs.{name}": tensor for name, tensor in self.obs.items()},
            **{f"record.{name}": tensor for name, tensor in self.record.items()},
            **({} if self.features is None else {"features": self.features}),
            **{name: getattr(self, name) for name in _SCALARS},
        }

    def _assert_finished(self, caller: str) -> None:
        if not self.finished:
            raise InvalidArgument(
                f"RolloutBuffer.{caller}: call finish() first; {self.position} of {self.decisions} decisions are in"
            )

    def _move(self, tensor: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)  # pageable memory makes the host wait

    def _vector(self, caller: str, name: str, given: Any, dtype: torch.dtype) -> Tensor:
        tensor = _tensor(given)
        if list(tensor.shape) != [self.envs]:
            raise InvalidArgument(
                f"RolloutBuffer.{caller}: {name} must be [N] = [{self.envs}], got {list(tensor.shape)}"
            )
        if (tensor.dtype == torch.bool) != (dtype == torch.bool):
            expected = "boolean" if dtype == torch.bool else "numbers"
            raise InvalidArgument(f"RolloutBuffer.{caller}: {name} must be {expected}, got {tensor.dtype}")
        return tensor.to(dtype)

    def _scalars(
        self, reward: Any, terminated: Any, truncated: Any, value: Any, final_value: Any, valid: Any
    ) -> dict[str, Tensor]:
        valid = np.ones(self.envs, dtype=bool) if valid is None else valid
        final_value = np.zeros(self.envs, dtype=np.float32) if final_value is None else final_value
        numbers = {"reward": reward, "value": value, "next_value": final_value}
        flags = {"terminated": terminated, "truncated": truncated, "valid": valid}
        return {
            **{name: self._vector("add", name, given, torch.float32) for name, given in numbers.items()},
            **{name: self._vector("add", name, given, torch.bool) for name, given in flags.items()},
        }

    def _observations(self, obs: Mapping[str, Any]) -> dict[str, Tensor]:
        missing = sorted(set(self.obs) - set(obs))
        if missing:
            raise InvalidArgument(f"RolloutBuffer.add: obs must hold {sorted(self.obs)}, {missing} missing")
        found = {}
        for name, stored in self.obs.items():
            tensor = _tensor(obs[name])
            expected = list(stored.shape[1:])
            if list(tensor.shape) != expected:
                raise InvalidArgument(
                    f"RolloutBuffer.add: obs[{name!r}] must be [N, To, ...] = {expected}, got {list(tensor.shape)}"
                )
            if _stored(tensor.dtype) != stored.dtype:
                raise InvalidArgument(
                    f"RolloutBuffer.add: obs[{name!r}] must be {self._given[name]}, got {tensor.dtype}"
                )
            found[name] = tensor.to(stored.dtype)
        return found

    def _recorded(self, record: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.record and set(record) != set(self.record):
            raise InvalidArgument(f"RolloutBuffer.add: record must hold {sorted(self.record)}, got {sorted(record)}")
        found = {}
        for name, tensor in record.items():
            expected = list(self.record[name].shape[1:]) if self.record else [self.envs, *tensor.shape[1:]]
            if list(tensor.shape) != expected:
                raise InvalidArgument(
                    f"RolloutBuffer.add: record[{name!r}] must be [N, ...] = {expected}, got {list(tensor.shape)}"
                )
            found[name] = tensor.detach().cpu().to(_stored(tensor.dtype))
        return found

    def _features(self, features: Tensor | None) -> Tensor | None:
        if (features is not None) != self.keep_features:
            raise InvalidArgument(
                f"RolloutBuffer.add: features must {'' if self.keep_features else 'not '}be given, as keep_features = "
                f"{self.keep_features}"
            )
        if features is None:
            return None
        expected = [self.envs, *features.shape[1:]] if self.features is None else list(self.features.shape[1:])
        if list(features.shape) != expected:
            raise InvalidArgument(
                f"RolloutBuffer.add: features must be [N, To, Dc] = {expected}, got {list(features.shape)}"
            )
        return features.detach().cpu()

    def _check_numbers(
        self, row: dict[str, Tensor], obs: dict[str, Tensor], env_steps: Any, *, truncation_valued: bool
    ) -> None:
        valid, cut = row["valid"], row["truncated"] & ~row["terminated"] & row["valid"]
        if bool(cut.any()) and not truncation_valued:
            raise InvalidArgument(
                f"RolloutBuffer.add: environments {cut.nonzero().flatten().tolist()} were truncated: final_value, V of "
                f"their last observation, is needed"
            )
        where = f"at decision {self.position} of {self.decisions}"
        for name, counts in (("reward", valid), ("value", torch.ones_like(valid)), ("next_value", cut)):
            wrong = (~row[name].isfinite() & counts).nonzero().flatten().tolist()
            if wrong:
                label = "final_value" if name == "next_value" else name
                raise RolloutError(
                    f"RolloutBuffer.add: environment {wrong[0]} has {label} {float(row[name][wrong[0]])} {where}; "
                    f"nothing of this decision was stored"
                )
        for name, tensor in obs.items():
            if tensor.is_floating_point():
                finite = tensor.flatten(1).isfinite().all(1) | ~valid
                if not bool(finite.all()):
                    raise RolloutError(
                        f"RolloutBuffer.add: environment {int((~finite).nonzero()[0])} has NaN or infinity in "
                        f"observation {name!r} {where}; nothing of this decision was stored"
                    )
        if env_steps is None:
            return
        steps = self._vector("add", "env_steps", env_steps, torch.int64)
        empty = (valid & (steps < 1)).nonzero().flatten().tolist()
        if empty:
            ended = bool((row["terminated"] | row["truncated"])[empty[0]])
            raise RolloutError(
                f"RolloutBuffer.add: environment {empty[0]} took {int(steps[empty[0]])} environment steps {where}"
                f"{', and its episode ended: a zero-length episode' if ended else ''}; a decision takes at least 1"
            )

    def _allocate(self, record: dict[str, Tensor], features: Tensor | None) -> None:
        """The first decision tells what the algorithm records."""
        sizes = (self.decisions, self.envs)
        if not self.record:
            self.record = {n: torch.zeros((*sizes, *t.shape[1:]), dtype=t.dtype) for n, t in record.items()}
        if self.features is None and features is not None:
            self.features = torch.zeros((*sizes, *features.shape[1:]), dtype=features.dtype)


def _stored(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.is_floating_point else dtype


def _tensor(given: Any) -> Tensor:
    if isinstance(given, np.ndarray) and not given.flags.writeable:
        given = given.copy()  # torch warns of tensors on read-only memory
    return torch.as_tensor(given).detach().cpu()


def _zeroed(
    tensor: Tensor,  # [N, ...]
    valid: Tensor,  # [N] bool
) -> Tensor:
    """0 where not valid: what such a row holds may be NaN, and 0 * NaN is NaN."""
    shape = (-1, *[1] * (tensor.dim() - 1))
    return tensor.masked_fill(~valid.view(shape), 0)
