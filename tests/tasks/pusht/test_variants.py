"""Variants: starts by seed, never solved, and evaluation and training see the same task."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.tasks.pusht.variants import VARIANTS, Variant, find_variant

pytest.importorskip("gym_pusht")

from minidiff_fast.tasks.pusht.env import PushTEnv, coverage_of_pose
from minidiff_fast.tasks.pusht.evaluation import evaluate
from minidiff_fast.tasks.pusht.expert import Expert, pose_error
from minidiff_fast.tasks.pusht.task import PushTTask

TIGHT = Variant("tight", 50, offset=(0.0, 5.0), turn=(0.0, 0.05))
TURNED = Variant("turned", 50, offset=(0.0, 0.0), turn=(0.0, 0.12))


@pytest.mark.parametrize("variant", [VARIANTS["near-goal"], TIGHT, TURNED], ids=lambda v: v.name)
def test_near_goal_starts_are_in_range_and_never_solved(variant: Variant) -> None:
    assert variant.offset is not None
    generator = np.random.default_rng(0)
    starts = np.array([variant.start(generator) for _ in range(400)])
    env = PushTEnv(render_mode=None)
    for start in starts:
        agent, pose = start[:2], start[2:]
        assert coverage_of_pose(*pose) <= 0.95
        assert ((agent >= 50.0) & (agent < 450.0)).all()
        assert variant.offset[0] - 1e-9 <= pose_error(*pose, 0.0) <= variant.offset[1] + 1e-9
        turn = abs(pose[2] - math.pi / 4)
        assert variant.turn[0] <= turn <= variant.turn[1]
    for start in starts[:40]:  # the agent touches nothing: the block stays where it is
        env.set_state(start)
        before = env.block.position
        env.advance(*start[:2])
        assert env.block.position == before
    assert len({tuple(start) for start in starts}) == 400
    assert (starts[:, 4] > math.pi / 4).any() and (starts[:, 4] < math.pi / 4).any()


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_seeds_reproduce_starts_and_episodes(name: str) -> None:
    one, other = PushTTask(variant=name), PushTTask(variant=name)
    first = [one.reset(seed=seed)[0]["state"] for seed in (3, 4)] + [one.reset()[0]["state"] for _ in range(2)]
    other.reset(seed=9)
    other.step((300.0, 300.0))
    second = [other.reset(seed=seed)[0]["state"] for seed in (3, 4)] + [other.reset()[0]["state"] for _ in range(2)]
    assert np.array_equal(first, second) and len({tuple(state) for state in first}) == 4
    for action in np.random.default_rng(0).uniform(100.0, 400.0, (20, 2)):
        assert np.array_equal(one.step(action)[0]["state"], other.step(action)[0]["state"])


def test_time_limit_keeps_the_stock_starts() -> None:
    limited, stock = PushTTask(variant="time-limit"), PushTEnv(render_mode=None)
    for seed in range(5):
        assert np.array_equal(limited.reset(seed=seed)[0]["state"], stock.reset(seed=seed)[0].astype(np.float32))


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_the_limit_truncates_and_does_not_terminate(name: str) -> None:
    env = PushTTask(variant=name)
    for _ in range(2):  # the second episode counts from nought
        env.reset(seed=0)
        ends = [env.step((60.0, 60.0))[2:4] for _ in range(env.variant.max_steps)]
        assert ends[:-1] == [(False, False)] * (env.variant.max_steps - 1) and ends[-1] == (False, True)


def test_success_on_the_last_step_terminates_and_does_not_truncate() -> None:
    env, expert, actions = PushTTask(variant="near-goal"), Expert(), []
    env.reset(seed=1)
    terminated = False
    while not terminated:
        actions.append(expert.act(env))
        terminated = env.step(actions[-1])[2]
    near = VARIANTS["near-goal"]
    for limit, ends in ((len(actions), (True, False)), (len(actions) - 1, (False, True))):
        env = PushTTask(variant=Variant("near", limit, offset=near.offset, turn=near.turn))
        env.reset(seed=1)
        for action in actions[:limit]:
            _, *stepped = env.step(action)
        assert tuple(stepped[1:3]) == ends and stepped[3]["is_success"] == ends[0]
        env.reset(seed=1)
        for action in actions[:limit]:  # as chunks step
            _, *snapped = env.step_snapshot(action.tolist(), False)
        assert snapped == stepped


def test_step_cost_is_what_the_reward_lacks() -> None:
    costly, free = PushTTask(variant=Variant("costly", 100, 0.125)), PushTTask()
    costly.reset(seed=2)
    free.reset(seed=2)
    for _ in range(10):
        assert costly.step((256.0, 256.0))[1] == free.step((256.0, 256.0))[1] - 0.125


@pytest.mark.parametrize("name", ["time-limit", "near-goal"])
def test_evaluation_runs_the_task_that_is_trained_on(name: str) -> None:
    firsts: list[np.ndarray] = []

    def act(obs: dict[str, np.ndarray]) -> np.ndarray:
        if not firsts:
            firsts.extend(obs["state"][:, 0])
        return np.repeat(obs["state"][:, -1:, :2], 8, axis=1)

    result = evaluate(act, episodes=4, seed=11, variant=name)
    limit = VARIANTS[name].max_steps
    assert (result.variant, result.max_steps, result.lengths) == (name, limit, (limit,) * 4)
    assert result.to_dict()["variant"] == name
    env = PushTTask(variant=name)
    for seed, first, score in zip(result.seeds, firsts, result.scores, strict=True):
        observation, info = env.reset(seed=seed)
        assert np.array_equal(observation["state"], first)
        assert score == pytest.approx(info["coverage"] / 0.95, abs=1e-4)  # a moving agent may touch the block
    assert evaluate(act, episodes=1, variant=name, max_steps=5).lengths == (5,)
    assert evaluate(act, episodes=1, max_steps=5).variant == "stock"


def test_the_expert_solves_what_evaluation_measures() -> None:
    """Chunks of one action by the expert, on the state that evaluation gives, reach the goal."""
    expert, world = Expert(), PushTEnv(render_mode=None)

    def act(obs: dict[str, np.ndarray]) -> np.ndarray:
        state = obs["state"][0].astype(np.float64)
        velocity = (state[1, :2] - state[0, :2]) / 0.1
        world.set_state(state[1], velocity)
        return expert.act(world)[None, None]

    result = evaluate(act, episodes=1, seed=1, variant="near-goal")
    assert result.success_rate == 1.0 and 5 < result.lengths[0] <= 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_steps": 0}, "max_steps must be an integer >= 1, got 0"),
        ({"max_steps": 1.5}, "max_steps must be an integer >= 1"),
        ({"max_steps": True}, "max_steps must be an integer >= 1"),
        ({"step_cost": -0.1}, "step_cost must be finite and >= 0"),
        ({"step_cost": math.nan}, "step_cost must be finite"),
        ({"offset": (5.0, 4.0)}, r"offset must be \(low, high\) in \[0, 120\]"),
        ({"offset": (0.0, 300.0)}, "offset must be"),
        ({"offset": (0.0, 10.0), "turn": (0.0, 4.0)}, r"turn must be \(low, high\)"),
        ({"offset": (math.nan, 10.0)}, "offset must be"),
        ({"turn": (0.0, 1.0)}, "needs offset, which is None"),
        ({"offset": (0.0, 1.0)}, "must reach starts that are not solved"),
    ],
)
def test_bad_variants(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=f"Variant: .*{message}"):
        Variant(**change)


def test_variants_by_name() -> None:
    assert find_variant("near-goal") is VARIANTS["near-goal"] and find_variant(TIGHT) is TIGHT
    assert all(variant.name == name for name, variant in VARIANTS.items())
    with pytest.raises(InvalidArgument, match="variant must be one of stock, time-limit, near-goal, got 'far'"):
        evaluate(lambda obs: np.zeros((1, 1, 2)), variant="far")
