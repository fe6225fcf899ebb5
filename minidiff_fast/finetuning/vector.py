"""Vector environments seen in one way, whatever their autoreset mode."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from minidiff_fast.errors import InvalidArgument, require
from minidiff_fast.finetuning.counters import Counters
from minidiff_fast.finetuning.workers import RestartingVectorEnv, TooManyRestarts, WorkerFailed, same_step

__all__ = [
    "RestartingVectorEnv",
    "StepResult",
    "TooManyRestarts",
    "VectorRunner",
    "WorkerFailed",
    "check_spaces",
    "make_vector",
]


def make_vector(env_fns: Sequence[Callable[[], Any]], kind: Literal["sync", "async"] = "sync", **options: Any) -> Any:
    """A vector environment whose autoreset mode is SAME_STEP.

    Args:
        env_fns: make one environment each.
        kind: "sync" runs them in this process (gymnasium's SyncVectorEnv: right for an environment that takes less than
            a millisecond a decision), "async" in one process each (:class:`RestartingVectorEnv`).
        options: of :class:`RestartingVectorEnv`; "sync" has none.
    """
    if not env_fns:
        raise InvalidArgument("make_vector: env_fns must have at least one environment, got none")
    if kind == "async":
        return RestartingVectorEnv(env_fns, **options)
    if kind != "sync":
        raise InvalidArgument(f"make_vector: kind must be 'sync' or 'async', got {kind!r}")
    if options:
        raise InvalidArgument(f"make_vector: kind 'sync' has no options, got {sorted(options)}")
    return require("gymnasium.vector", extra="rl").SyncVectorEnv(list(env_fns), autoreset_mode=same_step())


@dataclass(frozen=True)
class StepResult:
    """One decision of N environments."""

    obs: dict[str, np.ndarray]
    """[N, ...]: what to decide on next. Where an episode ended, the next one's first observation; under NEXT_STEP,
    which resets a step later, still the last one."""
    final_obs: dict[str, np.ndarray]
    """[N, ...]: what this decision led to; where an episode ended, its true last observation. V(next) is V of this."""
    reward: np.ndarray
    """[N] float64."""
    terminated: np.ndarray
    """[N] bool."""
    truncated: np.ndarray
    """[N] bool."""
    valid: np.ndarray
    """[N] bool: False where this is no transition: a reset that NEXT_STEP inserts, or an environment that died."""
    env_steps: np.ndarray
    """[N] int64: environment steps of the decision, from ``info["env_steps"]``, else 1; 0 where not valid."""
    restarted: np.ndarray
    """[N] bool: the environment's process died and was started again."""
    infos: dict[str, Any]
    """As the vector environment gave them; :meth:`info` reads them by key."""

    @property
    def ended(self) -> np.ndarray:
        """[N] bool: terminated or truncated."""
        return self.terminated | self.truncated

    def info(self, key: str, default: Any) -> np.ndarray:
        """``info[key]`` of this decision, [N]: of the episode that ended where one did, not of the reset after it.

        Where an environment gave none, ``default``; the result has its dtype.
        """
        return _info(self.infos, key, default, self.ended)


class VectorRunner:
    """Steps a vector environment of any autoreset mode and returns the same :class:`StepResult` for all.

    - SAME_STEP: the last observation is taken from ``infos["final_obs"]``.
    - NEXT_STEP: the step after an episode's end resets and ignores the action; its row is not valid.
    - DISABLED: environments whose episode ended are reset here, by gymnasium's ``reset_mask``.

    Args:
        env: a gymnasium VectorEnv, or what has its ``reset`` and ``step``.
        counters: environment steps, decisions and restarts are added.
        autoreset_mode: "SameStep", "NextStep", "Disabled" or gymnasium's enum; None reads
            ``env.metadata["autoreset_mode"]``.
        name: name of the observation where the observation space is a Box.

    Raises:
        InvalidArgument: the autoreset mode is unknown; in :meth:`step`, an episode ended under SAME_STEP and its last
            observation is missing: the next episode's must not stand for it.
    """

    def __init__(
        self, env: Any, *, counters: Counters | None = None, autoreset_mode: Any = None, name: str = "observation"
    ) -> None:
        missing = [each for each in ("num_envs", "metadata", "reset", "step") if not hasattr(env, each)]
        if missing:
            raise InvalidArgument(
                f"VectorRunner: env must be a vector environment, got a {type(env).__name__} without "
                f"{', '.join(missing)}"
            )
        mode = env.metadata.get("autoreset_mode") if autoreset_mode is None else autoreset_mode
        self.mode: str = getattr(mode, "value", mode)
        if self.mode not in ("SameStep", "NextStep", "Disabled"):
            raise InvalidArgument(
                f"VectorRunner: autoreset_mode must be 'SameStep', 'NextStep' or 'Disabled', got {mode!r} "
                f"(None reads env.metadata['autoreset_mode'])"
            )
        self.env = env
        self.num_envs: int = env.num_envs
        self.counters = counters
        self.name = name
        self._resets_next = np.zeros(self.num_envs, dtype=bool)
        self._obs: dict[str, np.ndarray] | None = None
        self._restarts = int(getattr(env, "restarts", 0))

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> dict[str, np.ndarray]:
        """Reset all environments; their first observations, [N, ...]."""
        observation, _ = self.env.reset(seed=seed, options=options)
        self._resets_next = np.zeros(self.num_envs, dtype=bool)
        self._obs = self._entries(observation)
        if self.counters is not None:
            self.counters.add(restarts=self._new_restarts())
        return self._obs

    def step(
        self,
        actions: np.ndarray,  # [N, ...]
    ) -> StepResult:
        """One decision of every environment."""
        if self._obs is None:
            raise InvalidArgument("VectorRunner.step: call reset first")
        observation, reward, terminated, truncated, infos = self.env.step(actions)
        terminated, truncated = np.array(terminated, dtype=bool), np.array(truncated, dtype=bool)
        ended = terminated | truncated
        obs = self._entries(observation)
        restarted = _info(infos, "restarted", False, np.zeros(self.num_envs, dtype=bool))
        valid = ~restarted & ~self._resets_next
        final_obs = self._final(obs, infos, ended) if self.mode == "SameStep" else obs
        if self.mode == "NextStep":
            self._resets_next = ended
        elif self.mode == "Disabled" and ended.any():
            after, _ = self.env.reset(options={"reset_mask": ended.copy()})
            obs = self._entries(after)
        env_steps = np.where(valid, _info(infos, "env_steps", 1, ended), 0).astype(np.int64)
        if self.counters is not None:
            self.counters.add(
                env_steps=int(env_steps.sum()), chunk_steps=int(valid.sum()), restarts=self._new_restarts()
            )
        self._obs = obs
        reward = np.array(reward, dtype=np.float64)
        return StepResult(obs, final_obs, reward, terminated, truncated, valid, env_steps, restarted, infos)

    def close(self) -> None:
        """Close the environments."""
        self.env.close()

    def _new_restarts(self) -> int:
        before, self._restarts = self._restarts, int(getattr(self.env, "restarts", 0))
        return self._restarts - before

    def _entries(self, observation: Any) -> dict[str, np.ndarray]:
        """Copies: an environment may reuse its arrays."""
        given = observation if isinstance(observation, Mapping) else {self.name: observation}
        return {key: np.array(value) for key, value in given.items()}

    def _final(self, obs: dict[str, np.ndarray], infos: dict[str, Any], ended: np.ndarray) -> dict[str, np.ndarray]:
        if not ended.any():
            return obs
        given = infos.get("final_obs")
        if given is None:
            raise InvalidArgument(
                f"VectorRunner.step: environments {np.flatnonzero(ended).tolist()} ended, and infos['final_obs'] is "
                f"missing in {sorted(infos)}; SAME_STEP must give the last observations"
            )
        final = {key: value.copy() for key, value in obs.items()}
        if isinstance(given, Mapping):  # batched, as vector environments on an accelerator give it
            for key, value in final.items():
                value[ended] = np.asarray(given[key])[ended]
            return final
        for index in np.flatnonzero(ended):
            if given[index] is None:
                raise InvalidArgument(
                    f"VectorRunner.step: environment {index} ended, and its infos['final_obs'] is None"
                )
            last = given[index] if isinstance(given[index], Mapping) else {self.name: given[index]}
            for key, value in final.items():
                value[index] = last[key]
        return final


def _info(infos: Mapping[str, Any], key: str, default: Any, ended: np.ndarray) -> np.ndarray:
    """``info[key]`` per environment; where an episode ended, from ``final_info`` if there is one."""
    found = np.full(len(ended), default)
    final = infos.get("final_info")
    for source, rows in ((infos, ~ended if final is not None else np.ones_like(ended)), (final or {}, ended)):
        if key in source:
            given = rows & np.asarray(source.get(f"_{key}", np.ones_like(ended)), dtype=bool)
            found[given] = np.asarray(source[key])[given]
    return found


def check_spaces(env: Any, obs_entries: Mapping[str, Sequence[int]], action_shape: Sequence[int]) -> None:
    """Whether an environment fits what a policy was made for.

    Args:
        env: an environment or a vector environment (its ``single_...`` spaces count).
        obs_entries: shapes of one environment's observation by name, as the policy reads them; where the space is a
            Box, a single entry of any name. Entries of the environment that the policy does not read are left alone.
        action_shape: of one decision of one environment, e.g. [L, A] for a chunk.

    Raises:
        InvalidArgument: naming what the policy expects and what the environment has: an observation that is missing or
            has another shape, an action space that is not a Box of that shape with finite bounds.
    """
    spaces = require("gymnasium.spaces", extra="rl")
    seen = getattr(env, "single_observation_space", None) or env.observation_space
    acts = getattr(env, "single_action_space", None) or env.action_space
    expected = {name: tuple(shape) for name, shape in obs_entries.items()}
    if isinstance(seen, spaces.Dict):
        has = dict(seen.spaces)
    elif len(expected) == 1:
        has = {next(iter(expected)): seen}
    else:
        raise InvalidArgument(f"check_spaces: the policy reads {expected}; the environment has one observation, {seen}")
    for name, shape in expected.items():
        if name not in has:
            raise InvalidArgument(
                f"check_spaces: the policy reads observation {name!r} {list(shape)}; the environment has "
                f"{ ({key: list(entry.shape or ()) for key, entry in has.items()}) }"
            )
        if not isinstance(has[name], spaces.Box) or tuple(has[name].shape) != shape:
            raise InvalidArgument(
                f"check_spaces: observation {name!r} must be a Box of shape {list(shape)} for this policy; the "
                f"environment has {has[name]}"
            )
    if not isinstance(acts, spaces.Box) or tuple(acts.shape) != tuple(action_shape):
        raise InvalidArgument(
            f"check_spaces: actions must be a Box of shape {list(action_shape)} for this policy; the environment has "
            f"{acts}"
        )
    if not (np.isfinite(acts.low).all() and np.isfinite(acts.high).all()):
        raise InvalidArgument(f"check_spaces: actions must have finite bounds; the environment has {acts}")
