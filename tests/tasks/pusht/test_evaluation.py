"""Evaluation: scores, observation history, batching, what it refuses, and the intervals."""

from __future__ import annotations

import importlib.resources
import json
import os

import numpy as np
import pytest

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.tasks.pusht import env as env_module
from minidiff_fast.tasks.pusht.data import load_pusht
from minidiff_fast.tasks.pusht.env import PushTEnv, keypoints_from_state, make_env
from minidiff_fast.tasks.pusht.evaluation import (
    bootstrap_interval,
    evaluate,
    wilson_interval,
)

HUMAN = os.environ.get("MINIDIFF_FAST_PUSHT_HUMAN")
Obs = dict[str, np.ndarray]


class Replay:
    """Recorded actions open loop. Episode i leaves the batch after ``lengths[i]`` steps."""

    def __init__(self, actions: list[np.ndarray], chunk: int = 8) -> None:
        self.actions, self.chunk, self.step = actions, chunk, 0
        self.batches: list[int] = []

    def __call__(self, obs: Obs) -> np.ndarray:
        running = [a for a in self.actions if len(a) > self.step]
        self.batches.append(len(next(iter(obs.values()))))
        assert self.batches[-1] == len(running)
        rows = np.arange(self.step, self.step + self.chunk)
        self.step += self.chunk
        return np.stack([a[np.minimum(rows, len(a) - 1)] for a in running])


def still(obs: Obs) -> np.ndarray:
    return np.repeat(obs["state"][:, -1:, :2], 8, axis=1)


def wander(obs: Obs) -> np.ndarray:
    """Three targets that depend on the state, so that episodes differ."""
    state = obs["state"][:, -1]
    return np.stack([state[:, 2:4], state[:, 2:4] + 40.0, 512.0 - state[:, :2]], axis=1)


def test_recorded_expert_actions_score_one() -> None:
    data = load_pusht(None)
    resource = importlib.resources.files("minidiff_fast.tasks.pusht") / "demonstrations.npz"
    with importlib.resources.as_file(resource) as path, np.load(path) as archive:
        seeds = archive["seed"]
    # A run of consecutive seeds goes through one call.
    count = 1
    while count < min(4, len(seeds)) and seeds[count] == seeds[0] + count:
        count += 1
    actions = [data.action[data.episode(index)] for index in range(count)]
    act = Replay(actions)
    result = evaluate(act, episodes=count, seed=int(seeds[0]))
    assert result.scores == (1.0,) * count and result.successes == (True,) * count
    assert result.lengths == tuple(len(a) for a in actions)
    assert min(result.max_coverage) > 0.95 and result.final_coverage == result.max_coverage
    assert (result.mean_score, result.mean_score_interval) == (1.0, (1.0, 1.0) if count > 1 else (0.0, 1.0))
    assert result.success_rate == 1.0 and result.success_rate_interval[1] == 1.0
    assert len(act.batches) == -(-max(result.lengths) // 8)  # one call per chunk


def test_standing_still_scores_the_start() -> None:
    result = evaluate(still, episodes=6, seed=7, max_steps=20)
    assert result.lengths == (20,) * 6 and result.seeds == tuple(range(7, 13))
    env = make_env()
    for seed, score, largest in zip(result.seeds, result.scores, result.max_coverage, strict=True):
        _, info = env.reset(seed=seed)
        assert largest == pytest.approx(info["coverage"], abs=1e-6)
        assert score == pytest.approx(min(info["coverage"] / 0.95, 1.0), abs=1e-6)
    env.close()
    assert result.mean_score == pytest.approx(np.mean(result.scores))
    assert result.success_rate == 0.0 and result.success_rate_interval[0] == 0.0


def by_hand(seed: int, calls: int, to: int, max_steps: int) -> tuple[list[np.ndarray], list[float]]:
    """What ``wander`` sees in one environment, and the coverages, one step at a time."""
    env = make_env()
    state, info = env.reset(seed=seed)
    states, coverages, seen = [state], [info["coverage"]], []
    for _ in range(calls):
        window = [states[max(0, len(states) - to + i)] for i in range(to)]
        if len(states) < to:
            window = [states[0]] * (to - len(states)) + states
        seen.append(np.array(window, dtype=np.float32))
        for action in wander({"state": seen[-1][None]})[0]:
            if len(states) <= max_steps:
                state, _, _, _, info = env.step(action.astype(np.float64))
                states.append(state)
                coverages.append(info["coverage"])
    env.close()
    return seen, coverages


@pytest.mark.parametrize("to", [1, 2, 3, 5])
def test_history_and_steps_against_a_plain_loop(to: int) -> None:
    calls: list[np.ndarray] = []

    def act(obs: Obs) -> np.ndarray:
        assert set(obs) == {"state"} and obs["state"].dtype == np.float32
        calls.append(obs["state"])
        return wander(obs)

    result = evaluate(act, episodes=3, seed=11, max_steps=20, n_obs_steps=to)
    assert len(calls) == 7 and all(call.shape == (3, to, 5) for call in calls)
    assert result.lengths == (20,) * 3  # the last chunk is cut after 2 of 3 actions
    for index in range(3):
        seen, coverages = by_hand(11 + index, 7, to, 20)
        assert np.array_equal(np.stack([call[index] for call in calls]), np.stack(seen))
        assert result.max_coverage[index] == max(coverages)
        assert result.final_coverage[index] == coverages[20]
    assert np.array_equal(calls[0][:, 0], calls[0][:, -1])  # the first observation is repeated


def test_chunk_length_may_change_and_one_episode_alone_is_the_same() -> None:
    lengths = iter([1, 4, 2, 8, 8])

    def act(obs: Obs) -> np.ndarray:
        return still(obs)[:, : next(lengths)]

    assert evaluate(act, episodes=2, max_steps=20).lengths == (20, 20)
    together = evaluate(wander, episodes=3, seed=3, max_steps=30)
    alone = evaluate(wander, episodes=1, seed=5, max_steps=30)
    assert together.max_coverage[2] == alone.max_coverage[0]
    assert alone.mean_score_interval == (0.0, 1.0)


def test_keypoint_observations() -> None:
    states: list[np.ndarray] = []
    points: list[np.ndarray] = []
    targets = np.full((2, 8, 2), 256.0)
    evaluate(lambda o: states.append(o["state"]) or targets, episodes=2, max_steps=24)  # type: ignore[func-returns-value]
    evaluate(lambda o: points.append(o["keypoints"]) or targets, obs="keypoints", episodes=2, max_steps=24)  # type: ignore[func-returns-value]
    for state, point in zip(states, points, strict=True):
        assert point.shape == (2, 2, 20) and point.dtype == np.float32
        assert np.array_equal(point[..., 18:], state[..., :2])
        assert np.array_equal(point[..., :18].reshape(2, 2, 9, 2), keypoints_from_state(state))


def test_image_observations() -> None:
    seen: list[Obs] = []
    targets = np.full((1, 4, 2), 256.0)
    evaluate(lambda o: seen.append(o) or targets, obs="image", episodes=1, seed=2, max_steps=8)  # type: ignore[func-returns-value]
    env = make_env(render=True)
    state, _ = env.reset(seed=2)
    frames, agents = [env.render_rgb(96)], [state[:2]]
    for _ in range(4):
        state, *_ = env.step(targets[0, 0])
        frames.append(env.render_rgb(96))
        agents.append(state[:2])
    env.close()
    assert len(seen) == 2
    assert seen[0]["image"].shape == (1, 2, 96, 96, 3) and seen[0]["image"].dtype == np.uint8
    assert np.array_equal(seen[0]["image"][0], np.stack([frames[0]] * 2))
    assert np.array_equal(seen[1]["image"][0], np.stack(frames[3:5]))
    assert np.array_equal(seen[1]["agent_pos"][0], np.array(agents[3:5], dtype=np.float32))


def test_recorded_frames() -> None:
    result = evaluate(still, episodes=3, seed=4, max_steps=5, record=2, record_size=64)
    assert len(result.frames) == 2
    for index, frames in enumerate(result.frames):
        assert frames.shape == (6, 64, 64, 3) and frames.dtype == np.uint8
        env = make_env(render=True)
        env.reset(seed=4 + index)
        assert np.array_equal(frames[0], env.render_rgb(64))
        env.close()
    assert "frames" not in result.to_dict() and "frames" not in repr(result)


def test_to_dict_is_json_and_runs_repeat() -> None:
    first, second = (evaluate(wander, episodes=3, max_steps=30).to_dict() for _ in range(2))
    assert first == second
    assert json.loads(json.dumps(first)) == first
    assert first["episodes"] == 3 and [row["seed"] for row in first["per_seed"]] == [100000, 100001, 100002]
    assert set(first["per_seed"][0]) == {
        "seed",
        "score",
        "max_coverage",
        "final_coverage",
        "success",
        "length",
    }


def test_score_keeps_the_best_coverage_of_an_episode() -> None:
    result = evaluate(wander, episodes=8, seed=20, max_steps=120)
    assert any(f < m for f, m in zip(result.final_coverage, result.max_coverage, strict=True))
    for score, largest in zip(result.scores, result.max_coverage, strict=True):
        assert score == min(largest / 0.95, 1.0)


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (np.zeros((2, 8, 3)), r"\[n, L, 2\] with n = 2, L >= 1, got \[2, 8, 3\]"),
        (np.zeros((3, 8, 2)), r"got \[3, 8, 2\]"),
        (np.zeros((2, 0, 2)), r"got \[2, 0, 2\]"),
        (np.zeros((2, 2)), r"got \[2, 2\]"),
        (None, r"got \[\]"),
        (np.full((2, 8, 2), np.nan), "NaN or infinity for 2 of 2 episodes"),
        (np.stack([np.zeros((8, 2)), np.full((8, 2), np.inf)]), "for 1 of 2 episodes, first for number 1"),
        (np.zeros((2, 8, 2), bool), "numbers"),
    ],
)
def test_bad_actions(actions: np.ndarray, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[PushTEnv] = []
    monkeypatch.setattr(PushTEnv, "close", lambda self: closed.append(self))
    with pytest.raises(InvalidArgument, match=f"evaluate: act must return .*{message}"):
        evaluate(lambda _: actions, episodes=2)
    assert len(closed) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"obs": "pixels"},
        {"episodes": 0},
        {"episodes": 1.5},
        {"episodes": True},
        {"seed": -1},
        {"max_steps": 0},
        {"n_obs_steps": 0},
        {"record": -1},
        {"record": 51},
        {"record_size": 0},
    ],
)
def test_bad_arguments(change: dict[str, object]) -> None:
    with pytest.raises(InvalidArgument, match=f"evaluate: {next(iter(change))} must be"):
        evaluate(still, **change)  # type: ignore[arg-type]


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    evaluate(still, episodes=2, max_steps=4, progress=True)
    assert "Push-T" in capsys.readouterr().err
    evaluate(still, episodes=2, max_steps=4)
    assert capsys.readouterr().err == ""


def test_wilson_interval() -> None:
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29, by the score method.
    for successes, trials, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(5, 5)[1] == 1.0
    for bad in ((1, 0), (-1, 3), (4, 3)):
        with pytest.raises(InvalidArgument, match="wilson_interval"):
            wilson_interval(*bad)


def test_bootstrap_interval() -> None:
    values = np.random.default_rng(3).uniform(0, 1, 200)
    low, high = bootstrap_interval(values)
    spread = 1.96 * values.std() / np.sqrt(200)
    assert (low, high) == pytest.approx((values.mean() - spread, values.mean() + spread), abs=0.05 * spread + 1e-3)
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval(np.full(4, 0.5)) == (0.5, 0.5)
    with pytest.raises(InvalidArgument, match="n >= 1"):
        bootstrap_interval(np.array([]))


@pytest.mark.skipif(not HUMAN, reason="MINIDIFF_FAST_PUSHT_HUMAN is not set")
def test_replay_of_the_human_demonstrations(monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_pusht(HUMAN)

    class FromHuman(PushTEnv):
        def reset(self, *, seed: int | None = None, options: object = None):  # type: ignore[no-untyped-def, override]
            super().reset(seed=seed)
            state = self.set_state(data.state[data.episode(seed or 0).start])
            return state, {"coverage": self._get_coverage(), "is_success": False}

    monkeypatch.setattr(env_module, "make_env", lambda render=False: FromHuman(None))
    coverage = []
    for index in range(60):
        actions = data.action[data.episode(index)]
        result = evaluate(Replay([actions]), episodes=1, seed=index, max_steps=len(actions))
        coverage.append(result.max_coverage[0])
    assert 0.85 < np.mean(coverage) < 0.95  # all 206 reach 0.885 in the stock environment
