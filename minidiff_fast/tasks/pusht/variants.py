"""Variants of Push-T: what an imitated policy was not trained for, and reinforcement learning can gain.

``time-limit`` keeps the starts and cuts the episode early, ``near-goal`` starts with the block near its goal,
where pixels count. Both score by the stock reward; training and evaluation draw the same starts from a seed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from minidiff_fast.errors import InvalidArgument

_AGENT_ROOM = 20.0
"""Least distance of the agent's centre from the block at a near-goal start, pixels; its radius is 15."""


@dataclass(frozen=True)
class Variant:
    """Starts, length and cost of an episode."""

    name: str = "stock"
    """What results call it."""
    max_steps: int = 300
    """The episode is truncated after this many steps of 0.1 s."""
    step_cost: float = 0.0
    """Subtracted from the reward of every step. The score does not know it."""
    offset: tuple[float, float] | None = None
    """Least and largest distance of the block's centre of gravity from the goal's, pixels, at most 120;
    None: the stock starts."""
    turn: tuple[float, float] = (0.0, 0.0)
    """Least and largest angle between block and goal, radians, of either sign; only with ``offset``."""

    def __post_init__(self) -> None:
        for name, bounds, most in (("offset", self.offset, 120.0), ("turn", self.turn, math.pi)):
            if bounds is not None and not 0.0 <= bounds[0] <= bounds[1] <= most:
                raise InvalidArgument(
                    f"Variant: {name} must be (low, high) in [0, {most:g}], low <= high, got {bounds}"
                )
        if self.offset is None and self.turn != (0.0, 0.0):
            raise InvalidArgument(f"Variant: turn = {self.turn} needs offset, which is None: the stock starts")
        if self.offset is not None and max(self.offset[1], 45.0 * self.turn[1]) < 5.0:
            raise InvalidArgument(
                f"Variant: offset or turn must reach starts that are not solved (5 px or 0.12 radians), "
                f"got offset = {self.offset}, turn = {self.turn}"
            )
        if isinstance(self.max_steps, bool) or not isinstance(self.max_steps, int) or self.max_steps < 1:
            raise InvalidArgument(f"Variant: max_steps must be an integer >= 1, got {self.max_steps!r}")
        if not (math.isfinite(self.step_cost) and self.step_cost >= 0.0):
            raise InvalidArgument(f"Variant: step_cost must be finite and >= 0, got {self.step_cost}")

    def start(self, generator: np.random.Generator) -> NDArray[np.float64] | None:
        """Draw a start for ``PushTEnv.set_state``, or None where the stock start stays.

        The block is at ``offset`` and ``turn`` from the goal in a random direction; the agent is anywhere the
        stock environment puts it, but not in touch with the block. A start that is solved is drawn again.

        Returns:
            agent x, y, block x, y (pixels), block angle (radians). [5]
        """
        if self.offset is None:
            return None
        from minidiff_fast.tasks.pusht.env import BLOCK_CENTER, GOAL_POSE, SUCCESS_COVERAGE, coverage_of_pose

        goal = _to_world((*GOAL_POSE,), BLOCK_CENTER)
        while True:
            distance, direction = generator.uniform(*self.offset), generator.uniform(-math.pi, math.pi)
            angle = GOAL_POSE[2] + generator.choice((-1.0, 1.0)) * generator.uniform(*self.turn)
            center_x, center_y = _to_world((0.0, 0.0, angle), BLOCK_CENTER)
            x = goal[0] + distance * math.cos(direction) - center_x
            y = goal[1] + distance * math.sin(direction) - center_y
            if coverage_of_pose(x, y, angle) <= SUCCESS_COVERAGE:
                break
        while True:
            agent = generator.uniform(50.0, 450.0, 2)
            if _distance_to_block(agent[0], agent[1], (x, y, angle)) >= _AGENT_ROOM:
                return np.array((*agent, x, y, angle))


VARIANTS = {
    "stock": Variant(),
    "time-limit": Variant(name="time-limit", max_steps=100),
    "near-goal": Variant(name="near-goal", max_steps=100, offset=(10.0, 60.0), turn=(0.0, 0.6)),
}
"""The variants by name."""


def find_variant(variant: str | Variant) -> Variant:
    """A variant by its name; a :class:`Variant` is returned as it is.

    Raises:
        InvalidArgument: no variant has this name.
    """
    if isinstance(variant, Variant):
        return variant
    if variant not in VARIANTS:
        raise InvalidArgument(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    return VARIANTS[variant]


def _to_world(pose: tuple[float, float, float], point: tuple[float, float]) -> tuple[float, float]:
    cos, sin = math.cos(pose[2]), math.sin(pose[2])
    return pose[0] + cos * point[0] - sin * point[1], pose[1] + sin * point[0] + cos * point[1]


def _distance_to_block(x: float, y: float, pose: tuple[float, float, float]) -> float:
    """Distance of a point from the block, pixels; 0 inside."""
    from minidiff_fast.tasks.pusht.env import BLOCK_PARTS

    cos, sin = math.cos(pose[2]), math.sin(pose[2])
    dx, dy = x - pose[0], y - pose[1]
    u, v = cos * dx + sin * dy, cos * dy - sin * dx
    return min(math.hypot(max(x0 - u, 0.0, u - x1), max(y0 - v, 0.0, v - y1)) for x0, y0, x1, y1 in BLOCK_PARTS)
