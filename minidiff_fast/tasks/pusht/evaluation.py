"""Evaluation on Push-T: seeded episodes that advance together, one policy call per chunk of actions."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from minidiff_fast.errors import InvalidArgument, require
from minidiff_fast.tasks.pusht.data import ObservationKind
from minidiff_fast.tasks.pusht.variants import Variant, find_variant

if TYPE_CHECKING:
    from minidiff_fast.tasks.pusht.env import PushTEnv

Act = Callable[[dict[str, np.ndarray]], np.ndarray]
"""Observations {name: [n, To, ...]} in raw units -> actions [n, L, 2] in pixels, L >= 1, executed in full."""

SUCCESS_COVERAGE = 0.95
"""Share of the goal that counts as a full score. Diffusion Policy's threshold."""

_BOOTSTRAP_DRAWS = 10_000


@dataclass(frozen=True, eq=False)
class EvaluationResult:
    """Scores of the episodes, in the order of their seeds, and what they say about the mean."""

    obs: str
    """Observation kind: state, keypoints or image."""

    variant: str
    """Name of the variant: stock, time-limit, near-goal, or the user's own."""

    max_steps: int
    """Length at which an episode was cut, environment steps of 0.1 s."""

    seeds: tuple[int, ...]
    """Seed of each episode's start."""

    scores: tuple[float, ...]
    """clip(largest coverage / 0.95, 0, 1) of each episode, its start included."""

    max_coverage: tuple[float, ...]
    """Largest share of the goal covered in each episode, in [0, 1]."""

    final_coverage: tuple[float, ...]
    """Share of the goal covered when each episode ended, in [0, 1]."""

    successes: tuple[bool, ...]
    """Whether each episode's coverage went over 0.95, which ends it."""

    lengths: tuple[int, ...]
    """Steps each episode took."""

    mean_score: float
    """Mean of ``scores``, in [0, 1]."""

    mean_score_interval: tuple[float, float]
    """95 % percentile bootstrap over the episodes, 10,000 draws, seed 0."""

    success_rate: float
    """Mean of ``successes``, in [0, 1]."""

    success_rate_interval: tuple[float, float]
    """95 % Wilson score interval."""

    frames: tuple[np.ndarray, ...] = field(default=(), repr=False)
    """Frames of the first recorded episodes, uint8 [length + 1, size, size, 3]; not part of ``to_dict``."""

    @property
    def episodes(self) -> int:
        """Number of episodes."""
        return len(self.seeds)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the frames, as plain numbers, strings and lists that JSON can hold."""
        return {
            "obs": self.obs,
            "variant": self.variant,
            "episodes": self.episodes,
            "max_steps": self.max_steps,
            "mean_score": self.mean_score,
            "mean_score_interval": list(self.mean_score_interval),
            "success_rate": self.success_rate,
            "success_rate_interval": list(self.success_rate_interval),
            "mean_length": float(np.mean(self.lengths)),
            "per_seed": [
                {
                    "seed": seed,
                    "score": score,
                    "max_coverage": largest,
                    "final_coverage": final,
                    "success": success,
                    "length": length,
                }
                for seed, score, largest, final, success, length in zip(
                    self.seeds,
                    self.scores,
                    self.max_coverage,
                    self.final_coverage,
                    self.successes,
                    self.lengths,
                    strict=True,
                )
            ],
        }


def evaluate(
    act: Act,
    *,
    obs: ObservationKind = "state",
    episodes: int = 50,
    seed: int = 100_000,
    max_steps: int | None = None,
    n_obs_steps: int = 2,
    progress: bool = False,
    record: int = 0,
    record_size: int = 192,
    variant: str | Variant = "stock",
) -> EvaluationResult:
    """Run a policy on the Push-T starts of ``seed``, ``seed + 1``, ... and score it as Diffusion Policy does.

    All environments run in this process. They share the calls of ``act``: one per chunk for every episode
    that is still running, so the batch shrinks as episodes end. A chunk is executed in full, unless its
    episode ends, before the policy looks again. Where there is no earlier observation the first is repeated.

    Args:
        act: the policy. {name: [n, To, ...]} -> [n, L, 2] pixels. Names and units are those of
            :class:`~minidiff_fast.tasks.pusht.data.PushTWindows`, as NumPy arrays; its keypoints are computed
            from the state. L may differ from call to call.
        obs: which observations ``act`` gets.
        episodes: number of episodes.
        seed: seed of the first start. Diffusion Policy tests from 100000 on.
        max_steps: cut an episode after this many steps of 0.1 s; None: the variant's, 300 for stock.
        n_obs_steps: observations To.
        progress: show a progress bar of finished episodes on stderr.
        record: keep the frames of the first so many episodes.
        record_size: width and height of these frames, pixels.
        variant: starts and length of the episodes, see :mod:`minidiff_fast.tasks.pusht.variants`. Scored alike.

    Raises:
        InvalidArgument: an argument is out of range, or ``act`` returns another shape, or NaN or infinity.
        MissingDependency: gym-pusht, or with ``progress`` tqdm, is not installed.

    Source: Chi et al., Diffusion Policy, RSS 2023.
    """
    variant = find_variant(variant)
    max_steps = variant.max_steps if max_steps is None else max_steps
    _check_arguments(obs, episodes, seed, max_steps, n_obs_steps, record, record_size)
    from minidiff_fast.tasks.pusht.env import make_env

    with ExitStack() as stack:
        bar = stack.enter_context(_progress_bar(episodes)) if progress else None
        running: list[_Episode] = []
        for index in range(episodes):
            env = make_env(render=obs == "image" or index < record)
            stack.enter_context(closing(env))
            size = record_size if index < record else 0
            running.append(_Episode(env, seed + index, obs, n_obs_steps, variant, max_steps, size))
        everyone = tuple(running)
        while running:
            actions = _checked_actions(act(_observe(running, obs)), len(running))
            for episode, chunk in zip(running, actions, strict=True):
                episode.execute(chunk)
            before = len(running)
            running = [episode for episode in running if not episode.done]
            if bar is not None:
                bar.update(before - len(running))
    return _summary(everyone, obs, variant.name, max_steps)


class _Episode:
    """One environment, the observations its policy sees next, and its coverage so far."""

    def __init__(
        self, env: PushTEnv, seed: int, obs: str, n_obs_steps: int, variant: Variant, max_steps: int, record_size: int
    ) -> None:
        self.env, self.seed, self.max_steps, self.record_size = env, seed, max_steps, record_size
        self.with_image = obs == "image"
        self.frames: list[np.ndarray] = []
        state, info = env.reset(seed=seed)
        start = variant.start(env.np_random)
        if start is not None:
            state, info = env.set_state(start), {"coverage": env.coverage()}
        self.largest = self.coverage = float(info["coverage"])
        self.length, self.success = 0, False
        self.n_obs_steps = n_obs_steps
        self.states: deque[np.ndarray] = deque(maxlen=n_obs_steps)
        self.images: deque[np.ndarray] = deque(maxlen=n_obs_steps)
        self._look(state, times=n_obs_steps)
        self._record()

    @property
    def done(self) -> bool:
        return self.success or self.length >= self.max_steps

    def execute(
        self,
        chunk: np.ndarray,  # [L, 2]
    ) -> None:
        for place, action in enumerate(chunk):
            state, _, terminated, _, info = self.env.step(action)
            self.length += 1
            self.coverage = float(info["coverage"])
            self.largest = max(self.largest, self.coverage)
            self.success = bool(terminated)
            self._record()
            if self.done:
                return
            # Earlier ones would have left the window when the policy looks again, so they are not rendered.
            if len(chunk) - place <= self.n_obs_steps:
                self._look(state)

    def _look(self, state: np.ndarray, times: int = 1) -> None:
        self.states.extend([state.astype(np.float32)] * times)
        if self.with_image:
            self.images.extend([self.env.render_rgb(96)] * times)

    def _record(self) -> None:
        if self.record_size:
            self.frames.append(self.env.render_rgb(self.record_size))


def _observe(running: list[_Episode], obs: str) -> dict[str, np.ndarray]:
    state = np.stack([np.stack(episode.states) for episode in running])
    if obs == "state":
        return {"state": state}
    if obs == "image":
        image = np.stack([np.stack(episode.images) for episode in running])
        return {"image": image, "agent_pos": state[..., :2].copy()}
    from minidiff_fast.tasks.pusht.env import keypoints_from_state

    points = keypoints_from_state(state)
    return {"keypoints": np.concatenate([points.reshape(*state.shape[:2], 18), state[..., :2]], axis=-1)}


def _checked_actions(actions: Any, count: int) -> np.ndarray:
    array = np.asarray(actions)
    if array.ndim != 3 or array.shape[0] != count or array.shape[1] < 1 or array.shape[2] != 2:
        raise InvalidArgument(
            f"evaluate: act must return actions [n, L, 2] with n = {count}, L >= 1, got {list(array.shape)}"
        )
    if array.dtype.kind not in "fiu":
        raise InvalidArgument(f"evaluate: act must return numbers (pixels), got {array.dtype}")
    finite = np.isfinite(array).all(axis=(1, 2))
    if not finite.all():
        raise InvalidArgument(
            f"evaluate: act must return finite actions, got NaN or infinity for {int((~finite).sum())} of "
            f"{count} episodes, first for number {int(finite.argmin())} of the batch"
        )
    return array.astype(np.float64)


def _check_arguments(
    obs: str, episodes: int, seed: int, max_steps: int, n_obs_steps: int, record: int, record_size: int
) -> None:
    if obs not in get_args(ObservationKind):
        raise InvalidArgument(f"evaluate: obs must be one of {', '.join(get_args(ObservationKind))}, got {obs!r}")
    least = {"episodes": 1, "seed": 0, "max_steps": 1, "n_obs_steps": 1, "record": 0, "record_size": 1}
    given = (episodes, seed, max_steps, n_obs_steps, record, record_size)
    for (name, low), value in zip(least.items(), given, strict=True):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < low:
            raise InvalidArgument(f"evaluate: {name} must be an integer >= {low}, got {value!r}")
    if record > episodes:
        raise InvalidArgument(f"evaluate: record must be <= episodes = {episodes}, got {record}")


def _progress_bar(episodes: int) -> AbstractContextManager[Any]:
    bar: AbstractContextManager[Any] = require("tqdm", extra="train").tqdm(
        total=episodes, desc="Push-T", unit="episode", leave=False
    )
    return bar


def _summary(finished: tuple[_Episode, ...], obs: str, variant: str, max_steps: int) -> EvaluationResult:
    scores = np.array([min(max(episode.largest / SUCCESS_COVERAGE, 0.0), 1.0) for episode in finished])
    successes = [episode.success for episode in finished]
    return EvaluationResult(
        obs=obs,
        variant=variant,
        max_steps=max_steps,
        seeds=tuple(episode.seed for episode in finished),
        scores=tuple(scores.tolist()),
        max_coverage=tuple(episode.largest for episode in finished),
        final_coverage=tuple(episode.coverage for episode in finished),
        successes=tuple(successes),
        lengths=tuple(episode.length for episode in finished),
        mean_score=float(scores.mean()),
        mean_score_interval=bootstrap_interval(scores),
        success_rate=float(np.mean(successes)),
        success_rate_interval=wilson_interval(sum(successes), len(successes)),
        frames=tuple(np.stack(episode.frames) for episode in finished if episode.frames),
    )


def bootstrap_interval(
    values: np.ndarray,  # [n]
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of values in [0, 1]; 10,000 draws from seed 0.

    One value says nothing about the spread: the interval is then [0, 1].

    Raises:
        InvalidArgument: ``values`` is not [n] with n >= 1.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or sample.size == 0:
        raise InvalidArgument(f"bootstrap_interval: values must be [n] with n >= 1, got {list(sample.shape)}")
    if sample.size == 1:
        return 0.0, 1.0
    draws = np.random.default_rng(0).integers(sample.size, size=(_BOOTSTRAP_DRAWS, sample.size))
    low, high = np.percentile(sample[draws].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % Wilson score interval of a success rate.

    With ``p = successes / n`` and ``z = 1.96``:
    ``(p + z^2 / 2n ± z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)``.

    Raises:
        InvalidArgument: not 0 <= successes <= trials with trials >= 1.

    Source: Wilson, 1927.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise InvalidArgument(
            f"wilson_interval: 0 <= successes <= trials and trials >= 1 expected, got {successes} of {trials}"
        )
    z = 1.959963984540054
    p = successes / trials
    center = p + z * z / (2 * trials)
    spread = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    low = 0.0 if successes == 0 else (center - spread) / scale  # exact where rounding would leave 1e-17
    high = 1.0 if successes == trials else (center + spread) / scale
    return low, high
