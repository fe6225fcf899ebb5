"""The shaped reward: the potential telescopes, the bonus comes once, hovering earns nothing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gym_pusht")

import gymnasium

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.finetuning.chunk import ActionChunk
from minidiff_fast.tasks.pusht.env import GOAL_POSE, PushTEnv, coverage_of_pose
from minidiff_fast.tasks.pusht.expert import Expert
from minidiff_fast.tasks.pusht.rewards import ShapedReward, ShapedRewardConfig
from minidiff_fast.tasks.pusht.task import PushTTask
from minidiff_fast.tasks.pusht.variants import VARIANTS, Variant


def potential(core: PushTEnv, config: ShapedRewardConfig) -> float:
    """By the definition, from the state alone."""
    _, _, x, y, angle = core.get_obs()
    center, goal = (np.array(core.block.local_to_world((0.0, 45.0))), np.array(GOAL_POSE[:2]))
    turn = GOAL_POSE[2]
    goal = goal + 45.0 * np.array([-math.sin(turn), math.cos(turn)])
    angle_error = abs((angle - turn + math.pi) % (2 * math.pi) - math.pi)
    error = math.hypot(*(center - goal), config.angle_radius * angle_error)
    return -config.coverage * (1.0 - coverage_of_pose(x, y, angle)) - config.pose * error / 100.0


@pytest.fixture(scope="module")
def solution() -> tuple[int, np.ndarray]:
    """A near-goal seed and the expert's actions that solve it."""
    env, expert, actions = PushTTask(variant="near-goal"), Expert(), []
    env.reset(seed=1)
    while True:
        actions.append(expert.act(env))
        _, _, terminated, truncated, _ = env.step(actions[-1])
        assert not truncated
        if terminated:
            return 1, np.array(actions)


@pytest.mark.parametrize("discount", [1.0, 0.9])
def test_potential_telescopes(discount: float) -> None:
    config = ShapedRewardConfig(coverage=1.3, pose=0.7, discount=discount)
    env = ShapedReward(PushTTask(), config)
    _, info = env.reset(seed=5)
    core = env.unwrapped
    start = potential(core, config)
    assert info["potential"] == pytest.approx(start, abs=1e-9)
    rng = np.random.default_rng(5)
    total, moved = 0.0, 0
    for step in range(60):
        before = core.get_obs()[2:]
        _, reward, *_, info = env.step(core.get_obs()[2:4] + rng.normal(0.0, 60.0, 2))
        moved += not np.array_equal(before, core.get_obs()[2:])
        total += discount**step * reward
        assert info["potential"] == pytest.approx(potential(core, config), abs=1e-9)
    assert moved > 5
    assert total == pytest.approx(discount**60 * potential(core, config) - start, abs=1e-9)


def test_success_pays_its_bonus_once_and_ends_the_potential(solution: tuple[int, np.ndarray]) -> None:
    seed, actions = solution
    config = ShapedRewardConfig(success=3.0)
    env = ShapedReward(PushTTask(variant="near-goal"), config)
    start = env.reset(seed=seed)[1]["potential"]
    rewards, stock = [], []
    for action in actions:
        _, reward, terminated, _, info = env.step(action)
        rewards.append(reward)
        stock.append(info["stock_reward"])
    assert terminated and info["is_success"] and info["potential"] == 0.0
    assert sum(rewards) == pytest.approx(3.0 - start, abs=1e-9)  # no policy earns more from this start
    assert sum(reward > 2.5 for reward in rewards) == 1 and rewards[-1] > 2.5
    assert stock[-1] == 1.0 and stock[0] == pytest.approx(coverage_at_start(seed, actions) / 0.95, abs=1e-9)


def coverage_at_start(seed: int, actions: np.ndarray) -> float:
    env = PushTTask(variant="near-goal")
    env.reset(seed=seed)
    return env.step(actions[0])[4]["coverage"]


def test_hovering_earns_nothing_where_the_stock_reward_pays_for_it() -> None:
    near = {"state": (60.0, 60.0, GOAL_POSE[0] + 2.0, GOAL_POSE[1] + 2.0, GOAL_POSE[2])}
    env = ShapedReward(PushTTask())
    env.reset(options=near)
    shaped, stock = 0.0, 0.0
    for _ in range(50):
        _, reward, terminated, _, info = env.step((60.0, 60.0))
        shaped, stock = shaped + reward, stock + info["stock_reward"]
    assert not terminated and 0.9 < info["coverage"] < 0.95
    assert shaped == 0.0 and stock > 45.0  # solving at once would have earned a stock reward of 1


def test_both_orders_of_the_wrappers_give_the_same_rewards(solution: tuple[int, np.ndarray]) -> None:
    seed, actions = solution
    variant = VARIANTS["near-goal"]
    variant = Variant("costly", variant.max_steps, 0.01, variant.offset, variant.turn)
    outside = ShapedReward(ActionChunk(PushTTask(variant=variant), 7, 2))
    inside = ActionChunk(ShapedReward(PushTTask(variant=variant)), 7, 2)
    outside.reset(seed=seed)
    inside.reset(seed=seed)
    padded = np.concatenate([actions, np.repeat(actions[-1:], 7, axis=0)])
    total = stock = 0.0
    terminated = False
    for call in range(-(-len(actions) // 7)):
        chunk = padded[7 * call : 7 * call + 7]
        observation, reward, terminated, _, info = outside.step(chunk)
        expected = inside.step(chunk)
        assert np.array_equal(observation["state"], expected[0]["state"])
        assert reward == pytest.approx(expected[1], abs=1e-9)
        assert terminated == expected[2] and info["env_steps"] == expected[4]["env_steps"]
        total, stock = total + reward, stock + info["stock_reward"]
    assert terminated
    env, bare = PushTTask(variant="near-goal"), 0.0
    env.reset(seed=seed)
    for action in actions:
        bare += env.step(action)[1]
    assert stock == pytest.approx(bare, abs=1e-9)  # the score of the episode is the stock one, cost and chunks or not
    outside.reset(seed=seed)
    cost = 0.01 * len(actions)
    assert total == pytest.approx(2.0 - outside.potential() - cost, abs=1e-9)


def test_truncation_treated_as_termination() -> None:
    """A truncated episode keeps its potential: its value goes on."""
    env = ShapedReward(PushTTask(variant=Variant("short", max_steps=3)))
    env.reset(seed=0)
    for _ in range(3):
        _, reward, terminated, truncated, info = env.step((256.0, 256.0))
    assert truncated and not terminated
    assert info["potential"] == env.potential() < -0.5 and reward < 0.5


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_is_an_error(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    env = ShapedReward(PushTTask())
    env.reset(seed=0)
    monkeypatch.setattr(PushTTask, "step", lambda self, action: ({}, bad, False, False, {"is_success": False}))
    with pytest.raises(InvalidArgument, match="rewards must be finite"):
        env.step((256.0, 256.0))
    monkeypatch.undo()
    env.reset(seed=0)
    env.step((256.0, 256.0))
    monkeypatch.setattr(ShapedReward, "potential", lambda self: bad)
    with pytest.raises(InvalidArgument, match="rewards must be finite"):
        env.step((256.0, 256.0))


def test_refuses() -> None:
    class Other(gymnasium.Env[Any, Any]):
        pass

    with pytest.raises(InvalidArgument, match=r"env must be Push-T \(PushTEnv\), got Other"):
        ShapedReward(Other())
    with pytest.raises(InvalidArgument, match="call reset first"):
        ShapedReward(PushTTask()).step((256.0, 256.0))
    for change in ({"coverage": -1.0}, {"pose": math.nan}, {"success": math.inf}, {"discount": 0.0}, {"discount": 1.1}):
        with pytest.raises(InvalidArgument, match=f"ShapedRewardConfig: {next(iter(change))} must be"):
            ShapedRewardConfig(**change)
