"""Push-T as a gymnasium environment to learn in: named observations, variants, truncation at the step limit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from minidiff_fast.errors import InvalidArgument, require
from minidiff_fast.tasks.pusht.data import ObservationKind
from minidiff_fast.tasks.pusht.env import PushTEnv, keypoints_from_state
from minidiff_fast.tasks.pusht.variants import Variant, find_variant

Snapshot = tuple[tuple[float, float, float, float, float], NDArray[np.uint8] | None]
"""Agent x, y, block x, y (pixels) and block angle (radians, not wrapped); the image, where one is observed."""

_TURN = 2 * np.pi


class PushTTask(PushTEnv):
    """Push-T with the observations that policies get and with the starts, limit and cost of a variant.

    Observations are {name: float32 array} in pixels and radians, the image uint8, as
    :func:`~minidiff_fast.tasks.pusht.evaluation.evaluate` hands them to a policy: ``state`` [5];
    ``keypoints`` [20], the 9 block keypoints x0, y0, ..., x8, y8 and agent x, y; or ``image`` [96, 96, 3] and
    ``agent_pos`` [2]. Positions may leave the arena of 0..512, because the agent can push the block through a
    wall; the spaces' bounds hold for every action of the action space.

    The reward is the stock one minus the variant's ``step_cost``. An episode is terminated when solved and
    truncated after the variant's ``max_steps``. ``info``: ``coverage`` (float), ``is_success`` (bool).

    Args:
        obs: ``"state"``, ``"keypoints"`` or ``"image"``.
        variant: a name of :data:`~minidiff_fast.tasks.pusht.variants.VARIANTS`, or a variant.
        render_mode: ``"rgb_array"`` or None.

    Raises:
        InvalidArgument: ``obs``, ``variant`` or ``render_mode`` is not one of these.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(
        self, obs: ObservationKind = "state", variant: str | Variant = "stock", render_mode: str | None = None
    ) -> None:
        if obs not in get_args(ObservationKind):
            raise InvalidArgument(f"PushTTask: obs must be one of {', '.join(get_args(ObservationKind))}, got {obs!r}")
        if render_mode not in (None, "rgb_array"):
            raise InvalidArgument(f"PushTTask: render_mode must be rgb_array or None, got {render_mode!r}")
        super().__init__(render_mode)
        self.obs, self.variant = obs, find_variant(variant)
        self.step_cost = self.variant.step_cost
        self.observation_space = _observation_space(obs)
        self._steps = 0
        self._with_image = obs == "image"

    def reset(  # type: ignore[override]
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start an episode.

        Args:
            seed: of the start; None continues the generator.
            options: None, or {"state": [5]} to start there (as ``set_state``).

        Raises:
            InvalidArgument: other options, or a state that is not five finite numbers.
        """
        if options and set(options) != {"state"}:
            raise InvalidArgument(f"PushTTask.reset: options must be None or {{'state': [5]}}, got {options!r}")
        super().reset(seed=seed)
        start = options["state"] if options else self.variant.start(self.np_random)
        if start is not None:
            self.set_state(start)
        self._steps = 0
        return self._single(), {"coverage": self.coverage(), "is_success": False}

    def step(  # type: ignore[override]
        self,
        action: ArrayLike,  # [2]
    ) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """As the stock step, with named observations and ``truncated`` at the variant's limit."""
        _, reward, terminated, _, info = super().step(action)
        self._steps += 1
        truncated = not terminated and self._steps >= self.variant.max_steps
        return self._single(), reward - self.step_cost, terminated, truncated, info

    @property
    def steps_left(self) -> int:
        """Steps until the variant truncates the episode."""
        return self.variant.max_steps - self._steps

    def snapshot(self) -> Snapshot:
        """What the observation of this moment is made from."""
        ax, ay = self.agent.position
        bx, by = self.block.position
        return (ax, ay, bx, by, self.block.angle), self.render_rgb(96) if self._with_image else None

    def step_snapshot(
        self,
        action: Sequence[float],  # [2] finite
        look: bool,
    ) -> tuple[Snapshot | None, float, bool, bool, dict[str, Any]]:
        """``step`` without its checks and with a snapshot, for ``minidiff_fast.finetuning.chunk.ActionChunk``.

        Without ``look`` an image is rendered only where the episode ends.
        """
        x, y = action
        self._last_action = action  # type: ignore[assignment]
        self.advance(x, y)
        coverage = self.coverage()
        solved = coverage > self.success_threshold
        reward = min(coverage / self.success_threshold, 1.0) - self.step_cost
        self._steps += 1
        truncated = not solved and self._steps >= self.variant.max_steps
        seen = self.snapshot() if look or solved or truncated or not self._with_image else None
        return seen, reward, solved, truncated, {"coverage": coverage, "is_success": solved}

    def observe(self, snapshots: Sequence[Snapshot]) -> dict[str, np.ndarray]:
        """The observations at these snapshots, {name: [n, ...]}."""
        state = np.array([pose for pose, _ in snapshots], dtype=np.float64)
        state[:, 4] %= _TURN
        state = state.astype(np.float32)
        if self.obs == "state":
            return {"state": state}
        if self.obs == "keypoints":
            points = keypoints_from_state(state).reshape(len(state), 18)
            return {"keypoints": np.concatenate([points, state[:, :2]], axis=1)}
        images = [image for _, image in snapshots if image is not None]
        return {"image": np.stack(images), "agent_pos": state[:, :2].copy()}

    def _single(self) -> dict[str, np.ndarray]:
        return {name: value[0] for name, value in self.observe([self.snapshot()]).items()}


def _observation_space(obs: ObservationKind) -> Any:
    spaces = require("gymnasium", extra="pusht").spaces
    # The agent reaches 0..512 and the block 136 px beyond what pushes it.
    low, high = -256.0, 768.0
    if obs == "state":
        lows = np.array([low] * 4 + [0.0], dtype=np.float32)
        highs = np.array([high] * 4 + [_TURN], dtype=np.float32)
        return spaces.Dict({"state": spaces.Box(lows, highs, dtype=np.float32)})
    if obs == "keypoints":
        return spaces.Dict({"keypoints": spaces.Box(low, high, (20,), np.float32)})
    return spaces.Dict(
        {
            "image": spaces.Box(0, 255, (96, 96, 3), np.uint8),
            "agent_pos": spaces.Box(low, high, (2,), np.float32),
        }
    )
