"""A look-ahead expert for Push-T: the source of the demonstrations.

The expert repeats: try straight pushes at fixed contact points of the T, each simulated on the real dynamics
from a copy of the state; take the one that leads to the goal in the fewest steps, as far as two pushes can
tell; walk around the block to its start without touching it; push until the look-ahead says that stopping
is better. Nothing is drawn at random, so an action is a function of the state and of the plan under way.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.tasks.pusht.env import BLOCK_CENTER, BLOCK_PARTS, GOAL_POSE, PushTEnv, coverage_of_pose

Point = tuple[float, float]
Pose = tuple[float, float, float]

AGENT_RADIUS = 15.0


@dataclass(frozen=True)
class ExpertConfig:
    """What the expert weighs. Lengths in pixels."""

    angle_radius: float = 45.0
    """Pixels that one radian of angle error counts for: both then cost the same coverage near the goal."""
    steps_to_go: float = 15.0
    """Environment steps to go at a pose error e are taken as ``steps_to_go * sqrt(e)``."""
    breadth: int = 5
    """Pushes that are looked one push further; 1 compares single pushes."""
    fine_error: float = 15.0
    """Pose error below which pushes are tried at half the speed."""
    spacing: float = 15.0
    """Distance between contact points along an edge of the T."""
    angles: tuple[float, ...] = (-0.45, 0.0, 0.45)
    """Push directions against the inward normal of the edge, radians."""
    gap: float = 12.0
    """Room between agent and block where a push starts."""
    clearance: float = 11.0
    """Room between agent and block while walking around it."""
    walk_lead: float = 28.0
    """How far the target leads the agent on a walk; the agent then moves about half of it per step."""
    push_lead: float = 20.0
    """The same in a push."""
    fine_leads: tuple[float, ...] = (20.0, 12.0, 6.0)
    """Leads tried at the end of a push, where it matters by the pixel."""
    push_steps: int = 40
    """Longest push, environment steps."""


@dataclass(frozen=True)
class Push:
    """One simulated straight push. World frame, pixels and environment steps."""

    contact: tuple[int, float]
    """Index of the contact point and direction against the inward normal, radians."""
    path: tuple[Point, ...]
    """Walk from the agent to where the push starts, both included."""
    direction: Point
    """Unit vector of the push."""
    score: float
    """Steps to go when this push is taken, about."""
    steps: float
    """Steps of the walk and the push."""
    pose: Pose
    """Block x, y, angle after the push."""
    agent: Point
    """Agent after the push."""
    solves: bool
    """Whether the push ends the episode."""


def pose_error(x: float, y: float, angle: float, angle_radius: float) -> float:
    """``hypot(|c - c_goal|, angle_radius * |angle - angle_goal|)``, pixels.

    c is the block's centre of gravity; the angle difference is the one in (-pi, pi].
    """
    cx, cy = BLOCK_CENTER
    cos, sin = math.cos(angle), math.sin(angle)
    goal_cos, goal_sin = math.cos(GOAL_POSE[2]), math.sin(GOAL_POSE[2])
    dx = x + cos * cx - sin * cy - (GOAL_POSE[0] + goal_cos * cx - goal_sin * cy)
    dy = y + sin * cx + cos * cy - (GOAL_POSE[1] + goal_sin * cx + goal_cos * cy)
    turn = math.remainder(angle - GOAL_POSE[2], 2.0 * math.pi)
    return math.hypot(dx, dy, angle_radius * turn)


def _distance(x: float, y: float) -> float:
    """Distance of a point in the block frame from the T; 0 inside."""
    best = math.inf
    for x0, y0, x1, y1 in BLOCK_PARTS:
        dx = max(x0 - x, 0.0, x - x1)
        dy = max(y0 - y, 0.0, y - y1)
        best = min(best, dx * dx + dy * dy)
    return math.sqrt(best)


def _contacts(spacing: float) -> list[tuple[Point, Point]]:
    """Contact points on the T's outline with their inward normals, block frame."""
    edges: list[tuple[Point, Point, Point]] = [
        ((-60.0, 0.0), (60.0, 0.0), (0.0, 1.0)),
        ((60.0, 0.0), (60.0, 30.0), (-1.0, 0.0)),
        ((60.0, 30.0), (15.0, 30.0), (0.0, -1.0)),
        ((15.0, 30.0), (15.0, 120.0), (-1.0, 0.0)),
        ((15.0, 120.0), (-15.0, 120.0), (0.0, -1.0)),
        ((-15.0, 120.0), (-15.0, 30.0), (1.0, 0.0)),
        ((-15.0, 30.0), (-60.0, 30.0), (0.0, -1.0)),
        ((-60.0, 30.0), (-60.0, 0.0), (1.0, 0.0)),
    ]
    found = []
    for (ax, ay), (bx, by), normal in edges:
        count = max(round(math.hypot(bx - ax, by - ay) / spacing), 1)
        for index in range(count):
            part = (index + 0.5) / count
            found.append(((ax + part * (bx - ax), ay + part * (by - ay)), normal))
    return found


class Expert:
    """The planner; one object drives one episode after another (``reset`` between them)."""

    def __init__(self, config: ExpertConfig | None = None) -> None:
        self.config = config or ExpertConfig()
        self._sim = PushTEnv(render_mode=None)
        self._contacts = _contacts(self.config.spacing)
        margin = AGENT_RADIUS + self.config.clearance
        self._ring = [
            (-60 - margin, -margin),
            (60 + margin, -margin),
            (60 + margin, 30 + margin),
            (15 + margin, 120 + margin),
            (-15 - margin, 120 + margin),
            (-60 - margin, 30 + margin),
        ]
        self.reset()

    def reset(self) -> None:
        """Forget the plan of the last episode."""
        self._plan: Push | None = None
        self._progress = 0.0
        self._pushing = False
        self._pushed = 0
        self._before = 0.0
        self._failed: set[tuple[int, float]] = set()

    def act(self, env: PushTEnv) -> NDArray[np.float32]:
        """The target for the next step of ``env``, pixels, [2]."""
        for _ in range(3):  # a push that is over, or a walk of no length, gives no target: go on with what follows
            if self._plan is None:
                self._plan = self.plan(env)
                self._progress, self._pushing, self._pushed = 0.0, False, 0
                self._before = self._error(env)
            action = self._push(env, self._plan) if self._pushing else self._walk(env, self._plan)
            if action is not None:
                return np.array(action, dtype=np.float32)
        x, y = env.agent.position
        return np.array((x, y), dtype=np.float32)

    # --- planning -------------------------------------------------------------------------------------

    def plan(self, env: PushTEnv) -> Push:
        """The push with the least steps to go, the best ``breadth`` of them looked one push further.

        Raises:
            InvalidArgument: no contact point of the block can be reached.
        """
        bx, by = env.block.position
        pose = (bx, by, env.block.angle)
        pushes = self._pushes(env.agent.position, pose, self.config.angles, self._failed)
        if not pushes:  # nothing helps at once: take the push after which something does
            pushes = self._pushes(env.agent.position, pose, self.config.angles, self._failed, forced=12)
        if not pushes:
            pushes = self._pushes(env.agent.position, pose, self.config.angles, set(), forced=12)
        if not pushes:
            raise InvalidArgument(f"Expert.plan: no contact point can be reached from state {env.get_obs()}")
        pushes.sort(key=lambda push: push.score)
        best = pushes[0]
        if best.solves:
            return best
        lowest = math.inf
        for push in pushes[: self.config.breadth]:
            score = push.score
            if not push.solves:
                back = (
                    push.agent[0] - self.config.gap * push.direction[0],
                    push.agent[1] - self.config.gap * push.direction[1],
                )
                after = self._pushes(back, push.pose, (0.0,), set(), cutoff=min(lowest, push.score) - push.steps)
                follow = min((other.score for other in after), default=math.inf)
                score = min(push.score, push.steps + follow)
            if score < lowest:
                best, lowest = push, score
        return best

    def _pushes(
        self,
        agent: Point,
        pose: Pose,
        tilts: tuple[float, ...],
        skip: set[tuple[int, float]],
        forced: int = 0,
        cutoff: float = math.inf,
    ) -> list[Push]:
        """Every push that wins something; with a cutoff, one of score < cutoff if there is one."""
        bx, by, angle = pose
        cos, sin = math.cos(angle), math.sin(angle)
        ax, ay = agent[0] - bx, agent[1] - by
        routes = _Routes((cos * ax + sin * ay, cos * ay - sin * ax), self._ring, (bx, by, cos, sin), self.config)
        gap = self.config.gap
        found = []
        for index, ((cx, cy), (nx, ny)) in enumerate(self._contacts):
            for tilt in tilts:
                if (index, tilt) in skip:
                    continue
                dx = nx * math.cos(tilt) - ny * math.sin(tilt)
                dy = nx * math.sin(tilt) + ny * math.cos(tilt)
                # at the end of the gap the agent's circle touches the contact point
                start = (cx - nx * AGENT_RADIUS - dx * gap, cy - ny * AGENT_RADIUS - dy * gap)
                walk = routes.to(start) if _distance(*start) >= AGENT_RADIUS + 3.0 else None
                if walk is None:
                    continue
                path, length = walk
                steps = length / (0.5 * self.config.walk_lead) + 4.0
                if steps >= cutoff:
                    continue
                direction = (cos * dx - sin * dy, sin * dx + cos * dy)
                push = self._try((index, tilt), path, direction, pose, steps, forced)
                if push is not None:
                    found.append(push)
                    cutoff = min(cutoff, push.score) if cutoff < math.inf else cutoff
        return found

    def _value(self, error: float) -> float:
        """Steps to go from a pose error, about."""
        return 0.0 if error < 0.0 else self.config.steps_to_go * math.sqrt(error)

    def _error(self, env: PushTEnv) -> float:
        """Pose error, pixels; -10 where the episode would end solved."""
        x, y = env.block.position
        error = pose_error(x, y, env.block.angle, self.config.angle_radius)
        if error < 6.0 and coverage_of_pose(x, y, env.block.angle) > env.success_threshold:
            return -10.0
        return error

    def _try(
        self,
        contact: tuple[int, float],
        path: tuple[Point, ...],
        direction: Point,
        pose: Pose,
        steps: float,
        forced: int = 0,
    ) -> Push | None:
        """The push from rest at the end of ``path``, stopped at the best moment; None if it wins nothing."""
        sim, start = self._sim, path[-1]
        sim.set_state((*start, *pose))
        error = self._error(sim)
        lead = self.config.push_lead if error > self.config.fine_error else 0.5 * self.config.push_lead
        limit = self._value(error) - 0.5 if not forced else math.inf
        best: Push | None = None
        lowest, since = limit, 0
        for step in range(1, self.config.push_steps + 1):
            self._advance(sim, start, direction, lead)
            error = self._error(sim)
            value = self._value(error) + step
            since += 1
            if value < lowest and step >= forced:
                bx, by = sim.block.position
                lowest, since = value, 0
                best = Push(
                    contact=contact,
                    path=path,
                    direction=direction,
                    score=steps + value,
                    steps=steps + step,
                    pose=(bx, by, sim.block.angle),
                    agent=sim.agent.position,
                    solves=error < 0.0,
                )
            if error < 0.0 or since > 5 + forced:
                break
        return best

    @staticmethod
    def _ahead(agent: Point, start: Point, direction: Point, lead: float) -> Point:
        """The point of the push line that leads the agent's projection by ``lead``."""
        along = (agent[0] - start[0]) * direction[0] + (agent[1] - start[1]) * direction[1] + lead
        return (start[0] + along * direction[0], start[1] + along * direction[1])

    def _advance(self, sim: PushTEnv, start: Point, direction: Point, lead: float) -> None:
        sim.advance(*self._ahead(sim.agent.position, start, direction, lead))

    # --- acting ---------------------------------------------------------------------------------------

    def _walk(self, env: PushTEnv, plan: Push) -> Point | None:
        """Follow the path with a target that leads the agent; None once the push can start."""
        ax, ay = env.agent.position
        path = plan.path
        lengths = [math.dist(a, b) for a, b in pairwise(path)]
        total = sum(lengths)
        best, at, before = math.inf, self._progress, 0.0
        for (px, py), (qx, qy), length in zip(path, path[1:], lengths, strict=False):
            if length > 0.0:
                part = ((ax - px) * (qx - px) + (ay - py) * (qy - py)) / length
                part = min(max(part, self._progress - before, 0.0), length)
                if part >= 0 and before + part <= self._progress + 40.0:
                    x, y = px + part / length * (qx - px), py + part / length * (qy - py)
                    away = math.dist((x, y), (ax, ay))
                    if away < best - 1e-9:
                        best, at = away, before + part
            before += length
        self._progress = max(self._progress, at)
        remaining = total - self._progress
        if remaining < 5.0 and math.dist(path[-1], (ax, ay)) < 9.0:
            self._pushing = True
            return None
        lead = min(self.config.walk_lead, remaining + 4.0)
        goal = self._progress + lead
        if goal >= total:
            over = goal - total
            return (path[-1][0] + over * plan.direction[0], path[-1][1] + over * plan.direction[1])
        for (px, py), (qx, qy), length in zip(path, path[1:], lengths, strict=False):
            if goal <= length:
                part = goal / length
                return (px + part * (qx - px), py + part * (qy - py))
            goal -= length
        return path[-1]

    def _push(self, env: PushTEnv, plan: Push) -> Point | None:
        """The next target of the push; None once stopping leaves less pose error than going on."""
        state, velocity = env.get_obs(), env.agent.velocity
        start, direction, agent = plan.path[-1], plan.direction, env.agent.position
        sim = self._sim
        sim.set_state(state, velocity)
        best, when = math.inf, 0
        for step in range(self.config.push_steps):
            error = self._error(sim) + 0.02 * step
            if error < best - 1e-6:
                best, when = error, step
            elif step - when > 5:
                break
            self._advance(sim, start, direction, self.config.push_lead)
        lead = self.config.push_lead if when >= 4 else self._last_lead(state, velocity, plan)
        if lead == 0.0 or self._pushed >= self.config.push_steps:
            # a push that ends before it moved anything would be chosen again, and again
            self._failed = self._failed | {plan.contact} if self._error(env) > self._before - 0.3 else set()
            self._plan = None
            return None
        self._pushed += 1
        return self._ahead(agent, start, direction, lead)

    def _last_lead(self, state: NDArray[np.float64], velocity: Point, plan: Push) -> float:
        """The lead for the next of the last steps of a push; 0 when the push should end."""
        chosen, lowest = 0.0, self._after(state, velocity, plan, 0.0, 0) - 0.1
        for lead in self.config.fine_leads:
            for count in (1, 2, 3):
                error = self._after(state, velocity, plan, lead, count)
                if error < lowest - 0.05:
                    chosen, lowest = lead, error
        return chosen

    def _after(self, state: NDArray[np.float64], velocity: Point, plan: Push, lead: float, count: int) -> float:
        """Pose error after ``count`` steps at ``lead`` and then turning back."""
        sim = self._sim
        sim.set_state(state, velocity)
        for _ in range(count):
            self._advance(sim, plan.path[-1], plan.direction, lead)
            if self._error(sim) < 0.0:
                return -10.0
        x, y = sim.agent.position
        for _ in range(2):
            sim.advance(x - 20.0 * plan.direction[0], y - 20.0 * plan.direction[1])
        return self._error(sim)


class _Routes:
    """Shortest walks around the block from the agent, by a visibility graph in the block frame."""

    def __init__(
        self,
        agent: Point,
        ring: list[Point],
        frame: tuple[float, float, float, float],
        config: ExpertConfig,
    ) -> None:
        self._frame = frame
        self._keep = AGENT_RADIUS + config.clearance - 4.0
        self._prefix: list[Point] = [agent]
        away = _distance(*agent)
        if away < self._keep:
            agent = self._escape(agent)
            self._prefix.append(agent)
        self._nodes = [agent, *[node for node in ring if self._inside(node)]]
        count = len(self._nodes)
        self._near: list[list[tuple[int, float]]] = [[] for _ in range(count)]
        for i in range(count):
            for j in range(i + 1, count):
                if self._free(self._nodes[i], self._nodes[j]):
                    length = math.dist(self._nodes[i], self._nodes[j])
                    self._near[i].append((j, length))
                    self._near[j].append((i, length))
        self._length, self._parent = self._shortest()

    def to(self, goal: Point) -> tuple[tuple[Point, ...], float] | None:
        """(path in the world frame, length) from the agent to ``goal`` in the block frame, or None."""
        if not self._inside(goal):
            return None
        best, last = math.inf, -1
        for index, node in enumerate(self._nodes):
            length = self._length[index] + math.dist(node, goal)
            if length < best and self._free(node, goal):
                best, last = length, index
        if last < 0:
            return None
        path = [goal]
        while last >= 0:
            path.append(self._nodes[last])
            last = self._parent[last]
        path += self._prefix[:-1][::-1] if len(self._prefix) > 1 else []
        bx, by, cos, sin = self._frame
        world = tuple((bx + cos * x - sin * y, by + sin * x + cos * y) for x, y in reversed(path))
        return world, sum(math.dist(a, b) for a, b in pairwise(world))

    def _shortest(self) -> tuple[list[float], list[int]]:
        length = [math.inf] * len(self._nodes)
        parent = [-1] * len(self._nodes)
        length[0] = 0.0
        queue = [(0.0, 0)]
        while queue:
            far, node = heapq.heappop(queue)
            if far > length[node]:
                continue
            for other, step in self._near[node]:
                if far + step < length[other]:
                    length[other], parent[other] = far + step, node
                    heapq.heappush(queue, (far + step, other))
        return length, parent

    def _inside(self, point: Point) -> bool:
        bx, by, cos, sin = self._frame
        x, y = bx + cos * point[0] - sin * point[1], by + sin * point[0] + cos * point[1]
        return 10.0 <= x <= 502.0 and 10.0 <= y <= 502.0

    def _free(self, a: Point, b: Point) -> bool:
        """Whether the segment keeps its distance, except near its ends, which may be closer to the block."""
        length = math.dist(a, b)
        near_a, near_b = _distance(*a), _distance(*b)
        count = max(int(length / 5.0), 1)
        for index in range(1, count):
            part = index / count
            away = _distance(a[0] + part * (b[0] - a[0]), a[1] + part * (b[1] - a[1]))
            ramp = min(near_a + 0.1 * part * length, near_b + 0.1 * (1 - part) * length)
            if away < min(self._keep, ramp) - 0.5:
                return False
        return True

    def _escape(self, point: Point) -> Point:
        """The nearest point straight out of the block's reach."""
        best, nearest = point, math.inf
        for radius in (4.0, 8.0, 12.0, 16.0, 20.0, 28.0, 40.0, 60.0):
            for index in range(32):
                turn = 2.0 * math.pi * index / 32
                other = (point[0] + radius * math.cos(turn), point[1] + radius * math.sin(turn))
                away = _distance(*other)
                if away >= self._keep and radius < nearest and self._inside(other):
                    best, nearest = other, radius
            if nearest < math.inf:
                break
        return best
