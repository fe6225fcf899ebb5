"""Push-T as a gymnasium environment to learn in: named observations, variants, truncation at the step limit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from minidiff_fast.errors import InvalidArgument, require
from minidiff_fast.tasks.pusht.data import ObservationKind
from minidiff_fast.tasks.pusht.env import PushTEnv, keypoints_from_state
from minidiff_fast.tasks.pusht.variants import Variant, find_variant

Snapshot = tuple[float, float, float, float, float]
"""Agent x, y, block x, y (pixels) and block angle (radians, not wrapped)."""

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
        self._scene: PushTEnv | None = None

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
        _, reward, terminated, truncated, info = self._count(super().step(action))
        return self._single(), reward, terminated, truncated, info

    def snapshot(self) -> Snapshot:
        """What an observation is made from: the poses now, without a NumPy array or an image."""
        ax, ay = self.agent.position
        bx, by = self.block.position
        return (ax, ay, bx, by, self.block.angle)

    def step_snapshot(
        self,
        action: Sequence[float],  # [2] finite
    ) -> tuple[Snapshot, float, bool, bool, dict[str, Any]]:
        """``step`` without its observation and checks, for ``minidiff_fast.finetuning.chunk.ActionChunk``."""
        x, y = action
        self._last_action = action  # type: ignore[assignment]
        self.advance(x, y)
        coverage = self.coverage()
        solved = coverage > self.success_threshold
        reward = min(coverage / self.success_threshold, 1.0)
        done = (self.snapshot(), reward, solved, False, {"coverage": coverage, "is_success": solved})
        return cast(tuple[Snapshot, float, bool, bool, dict[str, Any]], self._count(done))

    def observe(self, snapshots: Sequence[Snapshot]) -> dict[str, np.ndarray]:
        """The observations at these snapshots, {name: [n, ...]}."""
        state = np.array(snapshots, dtype=np.float64)
        state[:, 4] %= _TURN
        state = state.astype(np.float32)
        if self.obs == "state":
            return {"state": state}
        if self.obs == "keypoints":
            points = keypoints_from_state(state).reshape(len(state), 18)
            return {"keypoints": np.concatenate([points, state[:, :2]], axis=1)}
        images: list[NDArray[np.uint8]] = []
        for index, pose in enumerate(snapshots):
            images.append(images[-1] if index and pose is snapshots[index - 1] else self._image(pose))
        return {"image": np.stack(images), "agent_pos": state[:, :2].copy()}

    def _single(self) -> dict[str, np.ndarray]:
        return {name: value[0] for name, value in self.observe([self.snapshot()]).items()}

    def _count(self, result: tuple[Any, float, bool, bool, dict[str, Any]]) -> tuple[Any, float, bool, bool, dict]:
        self._steps += 1
        observation, reward, terminated, _, info = result
        truncated = not terminated and self._steps >= self.variant.max_steps
        return observation, reward - self.step_cost, terminated, truncated, info

    def _image(self, pose: Snapshot) -> NDArray[np.uint8]:
        """The observation image at a pose, drawn in a second world that only stands still."""
        if self._scene is None:
            self._scene = PushTEnv(render_mode=None)
            self._scene._setup()
        scene = self._scene
        scene.agent.position = pose[:2]
        scene.block.angle = pose[4]  # before the position: turning moves the origin
        scene.block.position = pose[2:4]
        scene.space.reindex_shapes_for_body(scene.agent)
        scene.space.reindex_shapes_for_body(scene.block)
        return scene.render_rgb(96)


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
