from __future__ import annotations

import importlib.resources
import math
import os
import time

import numpy as np
import pytest

pytest.importorskip("gym_pusht")

from gym_pusht.envs.pusht import PushTEnv as StockPushTEnv

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.tasks.pusht.env import (
    BLOCK_CENTER,
    BLOCK_PARTS,
    KEYPOINTS_LOCAL,
    PushTEnv,
    coverage_of_pose,
    keypoints_from_state,
    make_env,
)


def _actions(seed: int, state: np.ndarray, count: int):
    """Targets all over the arena for even seeds, at the block (many contacts) for odd ones."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        if seed % 2:
            yield (state[2:4] + rng.normal(0.0, 80.0, 2)).astype(np.float32)
        else:
            yield rng.uniform(0.0, 512.0, 2)


@pytest.mark.parametrize("seed", range(8))
def test_states_and_rewards_are_those_of_the_stock_environment(seed: int) -> None:
    ours, stock = make_env(), StockPushTEnv(obs_type="state")
    state, _ = ours.reset(seed=seed)
    expected, _ = stock.reset(seed=seed)
    assert np.array_equal(state, expected)
    moved = expected[2:].copy()
    for action in _actions(seed, expected, 100):
        state, reward, terminated, truncated, info = ours.step(action)
        expected, stock_reward, stock_terminated, _, stock_info = stock.step(action)
        assert np.array_equal(state, expected)
        assert abs(reward - stock_reward) <= 1e-9
        assert abs(info["coverage"] - stock_info["coverage"]) <= 1e-9
        assert (terminated, truncated) == (stock_terminated, False)
        assert info["is_success"] == stock_info["is_success"]
    if seed % 2:
        assert not np.array_equal(expected[2:], moved), "the actions never touched the block"


@pytest.mark.parametrize("first", range(1000, 1060, 10))
def test_sixty_short_rollouts_of_the_stock_environment(first: int) -> None:
    ours, stock = make_env(), StockPushTEnv(obs_type="state")
    for seed in range(first, first + 10):
        state, _ = ours.reset(seed=seed)
        expected, _ = stock.reset(seed=seed)
        assert np.array_equal(state, expected)
        for action in _actions(seed, expected, 30):
            state, reward, terminated, *_ = ours.step(action)
            expected, stock_reward, stock_terminated, *_ = stock.step(action)
            assert np.array_equal(state, expected)
            assert abs(reward - stock_reward) <= 1e-9 and terminated == stock_terminated


def test_solved_episodes_end_where_the_stock_environment_ends_them() -> None:
    resource = importlib.resources.files("minidiff_fast.tasks.pusht") / "demonstrations.npz"
    with importlib.resources.as_file(resource) as path, np.load(path) as archive:
        ends, seeds, actions = archive["episode_ends"], archive["seed"], archive["action"]
    shortest = np.argsort(np.diff(ends[:500], prepend=0))[:4]  # the first 500 start where reset does
    ours, stock = make_env(), StockPushTEnv(obs_type="state")
    for index in shortest:
        ours.reset(seed=int(seeds[index]))
        stock.reset(seed=int(seeds[index]))
        for row in range(ends[index - 1] if index else 0, ends[index]):
            state, reward, terminated, *_ = ours.step(actions[row])
            expected, stock_reward, stock_terminated, *_ = stock.step(actions[row])
            assert np.array_equal(state, expected) and abs(reward - stock_reward) <= 1e-9
            assert terminated == stock_terminated == (row == ends[index] - 1)


def test_at_least_four_times_as_fast_as_the_stock_environment() -> None:
    ours, stock = make_env(), StockPushTEnv(obs_type="state")
    ratios = []
    for seed in range(7):  # alternating, in processor time: what else runs does not matter
        seconds: list[float] = []
        for env, repeats in ((stock, 1), (ours, 4)):
            used = 0.0
            for _ in range(repeats):
                state, _ = env.reset(seed=2 * seed + 1)
                actions = list(_actions(2 * seed + 1, state, 30))
                begin = time.process_time()
                for action in actions:
                    env.step(action)
                used += time.process_time() - begin
            seconds.append(used / repeats)
        ratios.append(seconds[0] / seconds[1])
    assert np.median(ratios) >= 4.0, ratios


def test_reset_continues_the_generator_like_the_stock_environment() -> None:
    ours, stock = make_env(), StockPushTEnv(obs_type="state")
    assert np.array_equal(ours.reset(seed=3)[0], stock.reset(seed=3)[0])
    for _ in range(3):
        assert np.array_equal(ours.reset()[0], stock.reset()[0])


def test_frames_are_those_of_the_stock_environment() -> None:
    ours, stock = make_env(render=True), StockPushTEnv(obs_type="state", render_mode="rgb_array")
    ours.reset(seed=5)
    stock.reset(seed=5)
    for action in _actions(5, ours.get_obs(), 10):
        ours.step(action)
        stock.step(action)
    frame = ours.render_rgb(96)
    assert frame.shape == (96, 96, 3) and frame.dtype == np.uint8
    assert np.array_equal(frame, stock._render(visualize=False))
    assert np.array_equal(ours.render(), stock.render())
    for size in (1, 17, 64, 192, 384, 700):
        assert np.array_equal(ours.render_rgb(size), stock._get_img(stock._draw(), width=size, height=size))
    with pytest.raises(InvalidArgument, match="size must be >= 1, got 0"):
        ours.render_rgb(0)


def test_coverage_of_random_poses_is_that_of_shapely() -> None:
    stock = StockPushTEnv(obs_type="state")
    stock.reset(seed=0)
    rng = np.random.default_rng(0)
    seen = []
    for _ in range(300):
        x, y = 256.0 + rng.uniform(-150.0, 150.0, 2)
        angle = rng.uniform(-7.0, 7.0)
        stock.block.angle = angle
        stock.block.position = (x, y)
        seen.append(coverage_of_pose(x, y, angle))
        assert seen[-1] == pytest.approx(stock._get_coverage(), abs=1e-9)
    assert min(seen) == 0.0 and max(seen) > 0.3
    assert coverage_of_pose(256.0, 256.0, math.pi / 4) == pytest.approx(1.0, abs=1e-12)


def test_coverage_follows_the_pose() -> None:
    env = make_env()
    for pose in ((256.0, 256.0, 0.7), (256.0, 256.0, 1.0), (256.0, 250.0, 1.0), (250.0, 250.0, 1.0)):
        env.set_state((60.0, 60.0, *pose))
        for _ in range(2):
            assert env.coverage() == pytest.approx(coverage_of_pose(*pose), abs=1e-9)


def test_set_state_restores_a_recorded_state() -> None:
    env = make_env()
    env.reset(seed=1)
    recorded = env.get_obs()
    for action in _actions(1, recorded, 40):
        recorded = env.step(action)[0]
    coverage = env.coverage()
    other = make_env()
    other.reset(seed=2)
    restored = other.set_state(recorded)
    assert np.allclose(restored, recorded, rtol=0.0, atol=1e-9)
    assert other.coverage() == pytest.approx(coverage, abs=1e-9)
    assert tuple(other.agent.velocity) == (0.0, 0.0)
    # staying where it is leaves everything where it is
    assert np.allclose(other.step(recorded[:2])[0][:2], recorded[:2], atol=1e-6)


def test_set_state_does_not_depend_on_what_came_before() -> None:
    used, fresh = make_env(), make_env()
    used.reset(seed=1)
    for action in _actions(1, used.get_obs(), 40):
        used.step(action)
    state = (200.0, 200.0, 230.0, 250.0, 1.0)
    used.set_state(state, (50.0, 0.0))
    fresh.set_state(state, (50.0, 0.0))
    for _ in range(10):
        assert np.array_equal(used.step((250.0, 260.0))[0], fresh.step((250.0, 260.0))[0])


@pytest.mark.parametrize("state", [(1.0, 2.0, 3.0), (1.0, 2.0, 3.0, 4.0, math.nan)])
def test_set_state_refuses(state: tuple[float, ...]) -> None:
    with pytest.raises(InvalidArgument, match="state must be 5 finite numbers"):
        make_env().set_state(state)


def test_step_and_reset_refuse() -> None:
    env = make_env()
    before, _ = env.reset(seed=0)
    with pytest.raises(InvalidArgument, match=r"action must be \[2\], got \[3\]"):
        env.step((1.0, 2.0, 3.0))
    with pytest.raises(InvalidArgument, match="action must be finite"):
        env.step((1.0, math.nan))
    with pytest.raises(InvalidArgument, match="use set_state"):
        env.reset(options={"reset_to_state": [0.0] * 5})
    assert np.array_equal(env.get_obs(), before)


def test_keypoints_turn_with_the_block() -> None:
    state = np.array([0.0, 0.0, 100.0, 200.0, math.pi / 2], dtype=np.float32)
    points = keypoints_from_state(state)
    assert points.shape == (9, 2) and points.dtype == np.float32
    x, y = KEYPOINTS_LOCAL.T
    assert np.allclose(points, np.stack([100.0 - y, 200.0 + x], axis=1), atol=1e-4)
    batch = np.tile(state, (2, 3, 1))
    assert np.array_equal(keypoints_from_state(batch)[1, 2], points)
    with pytest.raises(InvalidArgument, match=r"state must be \[\.\.\., 5\], got \[4\]"):
        keypoints_from_state(np.zeros(4))


def test_keypoints_lie_on_the_block() -> None:
    slack = 3.0  # some lie up to 3 px outside
    for x, y in KEYPOINTS_LOCAL:
        assert any(x0 - slack <= x <= x1 + slack and y0 - slack <= y <= y1 + slack for x0, y0, x1, y1 in BLOCK_PARTS)


def test_block_center_is_the_centre_of_gravity() -> None:
    env = PushTEnv()
    env.reset(seed=0)
    assert tuple(env.block.center_of_gravity) == BLOCK_CENTER


@pytest.mark.skipif("MINIDIFF_FAST_PUSHT_HUMAN" not in os.environ, reason="MINIDIFF_FAST_PUSHT_HUMAN is not set")
def test_keypoints_are_those_of_the_human_demonstrations() -> None:
    with np.load(os.environ["MINIDIFF_FAST_PUSHT_HUMAN"]) as data:
        error = np.abs(keypoints_from_state(data["state"].astype(np.float64)) - data["keypoint"])
    assert np.median(error) < 2e-4
    assert np.percentile(error, 99) < 0.05
