"""Push-T: the stock gym-pusht environment with the same states and rewards, about six times faster.

A state is five numbers: agent x, y and block x, y in pixels (0..512), block angle in radians. An action is
the agent's target position in pixels, held for 0.1 s by a PD controller. The reward is the share of the goal
that the block covers, divided by 0.95 and clipped to [0, 1]; the episode ends once the share is over 0.95.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from minidiff_fast.errors import InvalidArgument, require

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")  # pygame prints a banner on import otherwise
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="pkg_resources is deprecated", category=UserWarning)
    require("gymnasium", extra="pusht")
    require("gym_pusht", extra="pusht")
    _stock = require("gym_pusht.envs.pusht", extra="pusht")
    pymunk = require("pymunk", extra="pusht")

if TYPE_CHECKING:
    from gym_pusht.envs.pusht import PushTEnv as StockPushTEnv
else:
    StockPushTEnv = _stock.PushTEnv

SUCCESS_COVERAGE = 0.95
"""The episode is solved, and ends, once the block covers more than this share of the goal."""

GOAL_POSE = (256.0, 256.0, math.pi / 4)
"""Goal of the block: x, y (pixels), angle (radians)."""

BLOCK_PARTS = ((-60.0, 0.0, 60.0, 30.0), (-15.0, 30.0, 15.0, 120.0))
"""The T in the block frame: its bar and its stem as (x low, y low, x high, y high), pixels."""

BLOCK_CENTER = (0.0, 45.0)
"""Centre of gravity of the block in the block frame, pixels. It is not the origin of the frame."""

Pose = tuple[float, float, float]
"""Block x, y (pixels), angle (radians)."""

_BGRX = (0xFF0000, 0xFF00, 0xFF, 0)  # masks of a screen with the bytes blue, green, red, unused

KEYPOINTS_LOCAL: NDArray[np.float64] = np.array(
    [
        [9.2698, 90.0410],
        [-60.9835, -1.1867],
        [60.9128, -1.3934],
        [-0.2705, 25.5436],
        [-14.0649, 122.8159],
        [39.0027, 32.8574],
        [-39.9664, 32.7297],
        [-16.8243, 62.8632],
        [23.5415, -1.7003],
    ]
)
"""The 9 block keypoints of the human Push-T demonstrations in the block frame, pixels, [9, 2].

The data set gives world coordinates only. Each of its 25,650 rows was taken back to the block frame with
the recorded block pose, x_local = R(angle)^T (x_world - xy), and the median taken per coordinate. The
absolute residual is 7e-6 px in the median and 0.02 px at the 99th percentile (2.2 px at most, in rows that
were recorded while the block turned), so the points are fixed to the block.
"""


def keypoints_from_state(
    state: ArrayLike,  # [..., 5]
) -> NDArray[np.floating]:
    """World coordinates of the block's keypoints: ``xy + R(angle) KEYPOINTS_LOCAL``.

    Args:
        state: agent x, y, block x, y (pixels), block angle (radians). [..., 5]

    Returns:
        Pixels, [..., 9, 2], in the dtype of ``state`` (float64 for integers).

    Raises:
        InvalidArgument: the last axis of ``state`` is not 5.
    """
    array = np.asarray(state)
    if array.ndim == 0 or array.shape[-1] != 5:
        raise InvalidArgument(f"keypoints_from_state: state must be [..., 5], got {list(array.shape)}")
    dtype = array.dtype if np.issubdtype(array.dtype, np.floating) else np.dtype(np.float64)
    angle = array[..., 4].astype(np.float64)
    cos, sin = np.cos(angle)[..., None], np.sin(angle)[..., None]
    x, y = KEYPOINTS_LOCAL[:, 0], KEYPOINTS_LOCAL[:, 1]
    turned = np.stack([cos * x - sin * y, sin * x + cos * y], axis=-1)
    return (turned + array[..., None, 2:4]).astype(dtype)


def _clip(points: list[tuple[float, float]], axis: int, bound: float, sign: float) -> list[tuple[float, float]]:
    """The part of a convex polygon with ``sign * (point[axis] - bound) >= 0`` (Sutherland and Hodgman)."""
    if not points:
        return points
    kept: list[tuple[float, float]] = []
    previous = points[-1]
    before = sign * (previous[axis] - bound)
    for point in points:
        now = sign * (point[axis] - bound)
        if (now >= 0.0) != (before >= 0.0):
            part = before / (before - now)
            kept.append(
                (
                    previous[0] + part * (point[0] - previous[0]),
                    previous[1] + part * (point[1] - previous[1]),
                )
            )
        if now >= 0.0:
            kept.append(point)
        previous, before = point, now
    return kept


def _overlap(points: list[tuple[float, float]], box: tuple[float, float, float, float]) -> float:
    """Area that a convex polygon shares with an axis-aligned box (x low, y low, x high, y high)."""
    for axis in (0, 1):
        values = [point[axis] for point in points]
        low, high = box[axis], box[axis + 2]
        smallest, largest = min(values), max(values)
        if smallest >= high or largest <= low:
            return 0.0
        if smallest < low:
            points = _clip(points, axis, low, 1.0)
        if largest > high:
            points = _clip(points, axis, high, -1.0)
        if not points:
            return 0.0
    area = 0.0
    x0, y0 = points[-1]
    for x1, y1 in points:
        area += x0 * y1 - x1 * y0
        x0, y0 = x1, y1
    return abs(area) / 2.0


_GOAL_COS, _GOAL_SIN = math.cos(GOAL_POSE[2]), math.sin(GOAL_POSE[2])
_PART_CORNERS = [[(x0, y0), (x1, y0), (x1, y1), (x0, y1)] for x0, y0, x1, y1 in BLOCK_PARTS]
_GOAL_AREA = sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in BLOCK_PARTS)


def coverage_of_pose(x: float, y: float, angle: float) -> float:
    """Share of the goal T that a block at this pose (pixels, radians) covers, in [0, 1].

    The block is drawn in the goal's frame, where the goal is two axis-aligned rectangles; the two
    rectangles of a T do not overlap, so the four pairwise areas add up.
    """
    dx, dy = x - GOAL_POSE[0], y - GOAL_POSE[1]
    if dx * dx + dy * dy > 272.0**2:  # no corner is farther than 136 px from the origin of its T
        return 0.0
    tx, ty = _GOAL_COS * dx + _GOAL_SIN * dy, _GOAL_COS * dy - _GOAL_SIN * dx
    cos, sin = math.cos(angle - GOAL_POSE[2]), math.sin(angle - GOAL_POSE[2])
    area = 0.0
    for corners in _PART_CORNERS:
        moved = [(tx + cos * a - sin * b, ty + sin * a + cos * b) for a, b in corners]
        for box in BLOCK_PARTS:
            area += _overlap(moved, box)
    return area / _GOAL_AREA


class PushTEnv(StockPushTEnv):
    """gym-pusht's environment: same starts, states, rewards and frames, without its slow parts.

    The PD loop runs on Python floats instead of NumPy temporaries, coverage is convex clipping instead of
    shapely, and no Python function is called per contact. Observations under the same seed and actions are
    equal bit for bit; rewards differ by rounding (< 1e-9).

    ``info`` holds ``coverage`` (share of the goal covered, float) and ``is_success`` (bool) only: the stock
    contact counter needs the contact callback.
    """

    step_cost = 0.0
    """What the reward of a step lacks against the stock reward."""

    def __init__(self, render_mode: str | None = "rgb_array") -> None:
        super().__init__(obs_type="state", render_mode=render_mode)
        self._covered: tuple[Pose | None, float] = (None, 0.0)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float64], dict[str, Any]]:
        """Draw the start that the stock environment draws for this seed.

        Returns:
            (state [5], info). Coverage counts from here on, as in ``step``.

        Raises:
            InvalidArgument: ``options`` are given. The stock option ``reset_to_state`` sets the block's
                position and then its angle, which moves the block, because its centre of gravity is not its
                origin: a recorded state does not come back. ``set_state`` restores one.
        """
        if options:
            raise InvalidArgument(
                f"PushTEnv.reset: options must be None, got {options!r}; use set_state(state) for a recorded state"
            )
        super().reset(seed=seed)
        self._last_action = None  # a marker of the last episode's action would be drawn otherwise
        return self.get_obs(), {"coverage": self.coverage(), "is_success": False}

    def set_state(
        self,
        state: ArrayLike,  # [5]
        agent_velocity: Sequence[float] = (0.0, 0.0),
    ) -> NDArray[np.float64]:
        """Put agent and block where a recorded state says, at rest, without a physics step.

        The world is built anew, so what follows depends on the arguments alone and not on cached contacts.

        Args:
            state: agent x, y, block x, y (pixels), block angle (radians). [5]
            agent_velocity: pixels per second; part of the agent's dynamics, but not of the observation. [2]

        Returns:
            The state as ``step`` would report it, float64 (angle in [0, 2 pi)). [5]

        Raises:
            InvalidArgument: ``state`` is not five finite numbers.
        """
        values = np.asarray(state, dtype=np.float64)
        if values.shape != (5,) or not np.isfinite(values).all():
            raise InvalidArgument(
                f"PushTEnv.set_state: state must be 5 finite numbers, got {list(values.shape)}: {values}"
            )
        self._setup()
        self.agent.position = (float(values[0]), float(values[1]))
        self.block.angle = float(values[4])  # before the position: turning moves the origin, see reset
        self.block.position = (float(values[2]), float(values[3]))
        self.agent.velocity = (float(agent_velocity[0]), float(agent_velocity[1]))
        self.block.velocity = (0.0, 0.0)
        self.block.angular_velocity = 0.0
        self.space.reindex_shapes_for_body(self.agent)
        self.space.reindex_shapes_for_body(self.block)
        self._last_action = None
        return self.get_obs()

    def step(
        self,
        action: ArrayLike,  # [2]
    ) -> tuple[NDArray[np.float64], float, bool, bool, dict[str, Any]]:
        """Hold the target ``action`` (pixels) for 0.1 s: ten PD and physics steps of 0.01 s.

        Returns:
            (state [5], reward in [0, 1], terminated, truncated = False, info).

        Raises:
            InvalidArgument: ``action`` is not two finite numbers.
        """
        target = np.asarray(action)
        if target.shape != (2,):
            raise InvalidArgument(f"PushTEnv.step: action must be [2], got {list(target.shape)}")
        x, y = float(target[0]), float(target[1])
        if not (math.isfinite(x) and math.isfinite(y)):
            raise InvalidArgument(f"PushTEnv.step: action must be finite, got {target}")
        self._last_action = target  # type: ignore[assignment]
        self.advance(x, y)
        coverage = self.coverage()
        solved = coverage > self.success_threshold
        reward = min(max(coverage / self.success_threshold, 0.0), 1.0)
        return self.get_obs(), reward, solved, False, {"coverage": coverage, "is_success": solved}

    def render_rgb(self, size: int = 96) -> NDArray[np.uint8]:
        """The current frame, [size, size, 3]; at 96 it is the observation image of the stock environment.

        Raises:
            InvalidArgument: ``size`` is not positive.
        """
        if size < 1:
            raise InvalidArgument(f"PushTEnv.render_rgb: size must be >= 1, got {size}")
        screen = self._draw()
        if screen.get_masks() != _BGRX:
            return self._get_img(screen, width=size, height=size, render_action=False)
        pixels = np.frombuffer(screen.get_buffer(), np.uint8).reshape(512, 512, 4)
        # Shrinking first spares the stock conversion its transposed copies of the whole screen.
        return np.ascontiguousarray(_stock.cv2.resize(pixels, (size, size))[:, :, 2::-1])

    def advance(self, x: float, y: float) -> None:
        """``step`` without its checks, observation and reward, for look-ahead: target x, y in pixels."""
        agent, space, dt, k_p, k_v = self.agent, self.space, self.dt, self.k_p, self.k_v
        vx, vy = agent.velocity  # the agent is kinematic: only this loop changes its velocity
        for _ in range(int(1 / (dt * self.control_hz))):
            px, py = agent.position
            vx += (k_p * (x - px) + k_v * (0 - vx)) * dt
            vy += (k_p * (y - py) + k_v * (0 - vy)) * dt
            agent.velocity = (vx, vy)
            space.step(dt)

    def coverage(self) -> float:
        """Share of the goal that the block covers now, in [0, 1]."""
        pose = (*self.block.position, self.block.angle)
        if pose != self._covered[0]:  # the block stands still, to the last bit, while nothing touches it
            self._covered = (pose, coverage_of_pose(*pose))
        return self._covered[1]

    def _get_coverage(self) -> float:
        return self.coverage()

    def get_obs(self) -> NDArray[np.float64]:
        """The state [5]: agent x, y, block x, y (pixels), block angle in [0, 2 pi)."""
        ax, ay = self.agent.position
        bx, by = self.block.position
        return np.array((ax, ay, bx, by, self.block.angle % (2 * np.pi)), dtype=np.float64)

    def _get_info(self) -> dict[str, Any]:
        return {}

    def _setup(self) -> None:
        # The stock world without its contact callback, which Python would run for every contact and substep.
        self.space = pymunk.Space()
        self.space.gravity = 0, 0
        self.space.damping = self.damping if self.damping is not None else 0.0
        self.teleop = False
        corners = [((5, 506), (5, 5)), ((5, 5), (506, 5)), ((506, 5), (506, 506)), ((5, 506), (506, 506))]
        self.space.add(*[self.add_segment(self.space, a, b, 2) for a, b in corners])
        self.agent = self.add_circle(self.space, (256, 400), 15)
        self.block, self._block_shapes = self.add_tee(self.space, (256, 300), 0)
        self.goal_pose = np.array(GOAL_POSE)
        self.n_contact_points = 0


def make_env(render: bool = False) -> PushTEnv:
    """A Push-T environment.

    Args:
        render: make gymnasium's ``render()`` give 680-pixel frames with the target marked; ``render_rgb``
            works either way.
    """
    return PushTEnv(render_mode="rgb_array" if render else None)
