from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("gym_pusht")

from minidiff_fast.tasks.pusht.demos import run_episode
from minidiff_fast.tasks.pusht.env import GOAL_POSE, make_env
from minidiff_fast.tasks.pusht.expert import AGENT_RADIUS, Expert, _distance, pose_error


@pytest.mark.parametrize("seed", [50_000, 50_001, 50_002])
def test_expert_solves(seed: int) -> None:
    episode = run_episode(seed)
    assert episode.solved
    assert len(episode.state) < 220
    # targets stay in the arena's reach and lead the agent by a bounded distance
    assert np.all((episode.action > -20.0) & (episode.action < 532.0))
    lead = np.linalg.norm(episode.action - episode.state[:, :2], axis=1)
    assert lead.max() < 45.0
    assert np.median(lead) > 10.0


def test_expert_is_deterministic() -> None:
    first, second = run_episode(50_003, max_steps=20), run_episode(50_003, max_steps=20)
    assert np.array_equal(first.state, second.state)
    assert np.array_equal(first.action, second.action)


def test_expert_finds_back_from_a_disturbed_start() -> None:
    usual, disturbed = run_episode(50_005, max_steps=1), run_episode(50_005, disturbed=True)
    assert disturbed.disturbed and not usual.disturbed
    assert np.abs(usual.state[0, 2:] - disturbed.state[0, 2:]).max() > 5.0, "nothing was pushed"
    assert disturbed.solved


def test_expert_does_not_change_the_environment_it_looks_at() -> None:
    env, untouched = make_env(), make_env()
    env.reset(seed=50_004)
    untouched.reset(seed=50_004)
    expert = Expert()
    for _ in range(5):
        action = expert.act(env)
        assert np.array_equal(env.step(action)[0], untouched.step(action)[0])


def test_plan_starts_clear_of_the_block_and_walks_around_it() -> None:
    env = make_env()
    env.set_state((256.0, 80.0, 256.0, 200.0, 0.0))
    push = Expert().plan(env)
    assert push.path[0] == pytest.approx((256.0, 80.0))
    assert math.hypot(*push.direction) == pytest.approx(1.0)
    for a, b in zip(push.path, push.path[1:], strict=False):
        for part in np.linspace(0.0, 1.0, 30):
            x, y = a[0] + part * (b[0] - a[0]), a[1] + part * (b[1] - a[1])
            assert _distance(x - 256.0, y - 200.0) > AGENT_RADIUS + 2.0


def test_pose_error() -> None:
    x, y, angle = GOAL_POSE
    assert pose_error(x, y, angle, 45.0) == pytest.approx(0.0, abs=1e-9)
    assert pose_error(x + 3.0, y - 4.0, angle, 45.0) == pytest.approx(5.0)
    assert pose_error(x, y, angle + 2.0 * math.pi, 45.0) == pytest.approx(0.0, abs=1e-9)
    near, far = pose_error(x, y, angle + 0.1, 45.0), pose_error(x, y, angle + 3.0, 45.0)
    assert 4.5 < near < 10.0 < far


def test_distance_from_the_block() -> None:
    assert _distance(0.0, 60.0) == 0.0
    assert _distance(0.0, -10.0) == pytest.approx(10.0)
    assert _distance(63.0, 34.0) == pytest.approx(5.0)
    assert _distance(40.0, 60.0) == pytest.approx(25.0)
