"""Action chunks as actions: one decision of a policy is one step of the environment."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike

from minidiff_fast.errors import InvalidArgument, require

if TYPE_CHECKING:
    from gymnasium import Env
    from gymnasium import Wrapper as _Wrapper

    Wrapper = _Wrapper[Any, Any, Any, Any]
else:
    Wrapper = require("gymnasium", extra="rl").Wrapper


@runtime_checkable
class ObservesLater(Protocol):
    """What an environment may offer so that only what a policy sees is observed.

    A snapshot is anything that the environment can make an observation from. Observations made this way must be
    those of ``reset`` and ``step``.
    """

    @property
    def steps_left(self) -> int:
        """Steps until the environment truncates the episode."""

    def snapshot(self) -> Any:
        """Of the state now; not None."""

    def step_snapshot(self, action: Any, look: bool) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """``step`` with a snapshot in place of the observation.

        Args:
            action: list of finite numbers, [A].
            look: whether the snapshot is needed. Without, it may be None, unless the episode ends here.
        """

    def observe(self, snapshots: Sequence[Any]) -> dict[str, np.ndarray]:
        """The observations {name: [n, ...]} at n snapshots."""


class ActionChunk(Wrapper):
    """Executes ``length`` actions per step and observes the last ``n_obs_steps`` observations.

    ``step(action [L, A])`` runs the actions one by one, in the dtype of the environment's action space and
    without clipping, and stops where the episode ends. Its reward is the sum of theirs; ``info`` is that of the
    last of them plus ``env_steps``, how many ran. Observations are {name: [To, ...]}, the oldest first; after
    ``reset`` the first one is repeated.

    An environment that is an :class:`ObservesLater` itself, not under another wrapper, need make only those
    observations that a policy sees: a chunk of 8 with To = 2 renders 2 images instead of 8. Where such an episode
    terminates within a chunk, after which no policy looks, observations that were not made are the next one.

    Args:
        env: any environment with a Box action space and a Box or Dict-of-Box observation space.
        length: actions L of a chunk.
        n_obs_steps: observations To.
        name: name of the observation where the space is a Box.

    Raises:
        InvalidArgument: the spaces are others, ``length`` or ``n_obs_steps`` is not an integer >= 1; in
            ``step``, the action is not [L, A] finite numbers, or the episode is over. Nothing was executed then.
    """

    def __init__(self, env: Env[Any, Any], length: int, n_obs_steps: int = 1, *, name: str = "observation") -> None:
        spaces = require("gymnasium", extra="rl").spaces
        for label, value in (("length", length), ("n_obs_steps", n_obs_steps)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidArgument(f"ActionChunk: {label} must be an integer >= 1, got {value!r}")
        space = env.action_space
        if not isinstance(space, spaces.Box):
            raise InvalidArgument(f"ActionChunk: env must have a Box action space, got {space}")
        seen = env.observation_space
        entries = dict(seen.spaces) if isinstance(seen, spaces.Dict) else {name: seen}
        for key, entry in entries.items():
            if not isinstance(entry, spaces.Box):
                raise InvalidArgument(f"ActionChunk: observation {key!r} of env must be a Box, got {entry}")
        super().__init__(env)
        self.length, self.n_obs_steps = length, n_obs_steps
        self.action_space = _repeat(spaces.Box, space, length)
        self.observation_space = spaces.Dict(
            {key: _repeat(spaces.Box, entry, n_obs_steps) for key, entry in entries.items()}
        )
        self._keys = tuple(entries)
        self._name = None if isinstance(seen, spaces.Dict) else name
        self._later = env if isinstance(env, ObservesLater) else None
        self._shape, self._dtype = (length, *space.shape), space.dtype
        self._window: deque[Any] = deque(maxlen=n_obs_steps)
        self._running = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start an episode; the window repeats the first observation."""
        observation, info = self.env.reset(seed=seed, options=options)
        first = self._later.snapshot() if self._later is not None else self._entries(observation)
        self._window.extend([first] * self.n_obs_steps)
        self._running = True
        return self._observe(), {**info, "env_steps": 0}

    def step(
        self,
        action: ArrayLike,  # [L, A]
    ) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Execute a chunk."""
        chunk = self._checked(action)
        window, later, env = self._window, self._later, self.env
        reward: Any  # some environments return NumPy scalars
        total, steps = 0.0, 0
        terminated = truncated = False
        info: dict[str, Any] = {}
        sure = self.length if later is None else min(self.length, later.steps_left)
        for row in chunk if later is None else chunk.tolist():
            if later is None:
                seen, reward, terminated, truncated, info = env.step(row)
                window.append(self._entries(seen))
            else:
                seen, reward, terminated, truncated, info = later.step_snapshot(row, sure - steps <= self.n_obs_steps)
                window.append(seen)
            total += float(reward)
            steps += 1
            if terminated or truncated:
                self._running = False
                break
        info["env_steps"] = steps
        return self._observe(), total, terminated, truncated, info

    def _checked(self, action: ArrayLike) -> np.ndarray:
        if not self._running:
            raise InvalidArgument("ActionChunk.step: the episode is over or has not begun; call reset first")
        chunk = np.asarray(action, dtype=self._dtype)
        if chunk.shape != self._shape:
            raise InvalidArgument(f"ActionChunk.step: action must be {list(self._shape)}, got {list(chunk.shape)}")
        if not np.isfinite(chunk).all():
            raise InvalidArgument(f"ActionChunk.step: action must be finite, got {chunk.tolist()}")
        return chunk

    def _entries(self, observation: Any) -> dict[str, Any]:
        return observation if self._name is None else {self._name: observation}

    def _observe(self) -> dict[str, np.ndarray]:
        window = list(self._window)
        if self._later is not None:
            for place in range(len(window) - 2, -1, -1):
                if window[place] is None:
                    window[place] = window[place + 1]
            return self._later.observe(window)
        return {key: np.stack([seen[key] for seen in window]) for key in self._keys}


def _repeat(box: Any, space: Any, count: int) -> Any:
    """The Box of ``count`` of these."""
    return box(np.stack([space.low] * count), np.stack([space.high] * count), dtype=space.dtype)
