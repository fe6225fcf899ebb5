"""ActionChunk against a plain loop, on environments of its own and on Push-T."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gymnasium")

import gymnasium

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.finetuning.chunk import ActionChunk

Box = gymnasium.spaces.Box


class Counter(gymnasium.Env):
    """Observes how many steps it ran and the last action; ends after ``end`` steps, cut after ``cut``."""

    def __init__(self, end: int = 1000, cut: int = 1000, as_dict: bool = False) -> None:
        self.action_space = Box(np.array([-1.0, 0.0], np.float32), np.array([1.0, 5.0], np.float32))
        flat = Box(-100.0, 2000.0, (3,), np.float32)
        picture = Box(0, 255, (2, 2, 3), np.uint8)
        self.observation_space = gymnasium.spaces.Dict(flat=flat, picture=picture) if as_dict else flat
        self.end, self.cut, self.as_dict = end, cut, as_dict
        self.executed: list[np.ndarray] = []

    def _see(self) -> Any:
        flat = np.array([len(self.executed), *(self.executed[-1] if self.executed else (0, 0))], np.float32)
        return {"flat": flat, "picture": np.full((2, 2, 3), len(self.executed), np.uint8)} if self.as_dict else flat

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.executed = []
        return self._see(), {"seed": seed, "options": options}

    def step(self, action: np.ndarray) -> tuple[Any, np.floating, bool, bool, dict[str, Any]]:
        self.executed.append(np.array(action))
        count = len(self.executed)
        return self._see(), np.float32(2.0**-count), count >= self.end, count >= self.cut, {"count": count}


def actions(env: ActionChunk, seed: int = 0) -> np.ndarray:
    env.action_space.seed(seed)
    return env.action_space.sample()


def test_spaces_and_dtypes() -> None:
    env = ActionChunk(Counter(as_dict=True), 4, 3)
    assert env.action_space.shape == (4, 2) and env.action_space.dtype == np.float32
    assert np.array_equal(env.action_space.low, [[-1.0, 0.0]] * 4)
    assert np.array_equal(env.action_space.high, [[1.0, 5.0]] * 4)
    spaces = env.observation_space.spaces
    assert spaces["flat"].shape == (3, 3) and spaces["picture"].shape == (3, 2, 2, 3)
    assert spaces["picture"].dtype == np.uint8
    observation, info = env.reset(seed=3, options={"a": 1})
    assert env.observation_space.contains(observation) and info == {"seed": 3, "options": {"a": 1}, "env_steps": 0}
    for seed in range(5):  # samples stay within the limits of the environment
        chunk = actions(env, seed)
        assert all(env.env.action_space.contains(row) for row in chunk)
        assert env.observation_space.contains(env.step(chunk)[0])


@pytest.mark.parametrize("to", [1, 2, 5])
@pytest.mark.parametrize("as_dict", [False, True])
def test_rewards_windows_and_steps_against_a_plain_loop(to: int, as_dict: bool) -> None:
    env, plain = ActionChunk(Counter(as_dict=as_dict), 3, to, name="flat"), Counter()
    seen = [plain.reset()[0]] * to
    observation, _ = env.reset()
    assert np.array_equal(observation["flat"], np.stack(seen))  # the first observation is repeated
    for seed in range(4):
        chunk = actions(env, seed)
        total = 0.0
        for row in chunk:
            next_seen, reward, *_ = plain.step(row)
            seen.append(next_seen)
            total += float(reward)
        observation, reward, terminated, truncated, info = env.step(chunk)
        assert np.array_equal(observation["flat"], np.stack(seen[-to:]))
        assert reward == total and isinstance(reward, float)
        assert (terminated, truncated) == (False, False)
        assert info == {"count": 3 * (seed + 1), "env_steps": 3}
    assert set(observation) == ({"flat", "picture"} if as_dict else {"flat"})


@pytest.mark.parametrize("kind", ["end", "cut"])
def test_a_chunk_stops_where_the_episode_ends(kind: str) -> None:
    env = ActionChunk(Counter(**{kind: 5}), 4, 3)
    env.reset()
    assert env.step(actions(env))[4]["env_steps"] == 4
    observation, reward, terminated, truncated, info = env.step(actions(env))
    assert (terminated, truncated) == (kind == "end", kind == "cut")
    assert info == {"count": 5, "env_steps": 1} and reward == 2.0**-5 and len(env.env.executed) == 5
    assert observation["observation"][:, 0].tolist() == [3.0, 4.0, 5.0]
    with pytest.raises(InvalidArgument, match="call reset first"):
        env.step(actions(env))
    assert len(env.env.executed) == 5
    assert env.reset()[0]["observation"][:, 0].tolist() == [0.0] * 3  # nothing of the last episode is left
    assert env.step(actions(env))[0]["observation"][:, 0].tolist() == [2.0, 3.0, 4.0]


def test_observations_already_given_do_not_change() -> None:
    env = ActionChunk(Counter(as_dict=True), 2, 3)
    first, _ = env.reset()
    kept = {key: value.copy() for key, value in first.items()}
    env.step(actions(env))
    assert all(np.array_equal(first[key], kept[key]) for key in kept)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (np.zeros(2), r"action must be \[4, 2\], got \[2\]"),
        (np.zeros((3, 2)), r"action must be \[4, 2\], got \[3, 2\]"),
        (np.zeros((1, 4, 2)), r"action must be \[4, 2\], got \[1, 4, 2\]"),
        ([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, np.nan]], "action must be finite"),
    ],
)
def test_bad_actions_execute_nothing(action: Any, message: str) -> None:
    env = ActionChunk(Counter(), 4)
    env.reset()
    with pytest.raises(InvalidArgument, match=f"ActionChunk.step: {message}"):
        env.step(action)
    assert env.env.executed == []


def test_refuses() -> None:
    with pytest.raises(InvalidArgument, match="call reset first"):
        ActionChunk(Counter(), 2).step(np.zeros((2, 2)))
    for change in ({"length": 0}, {"length": 2.0}, {"length": True}, {"length": 2, "n_obs_steps": 0}):
        with pytest.raises(InvalidArgument, match="must be an integer >= 1"):
            ActionChunk(Counter(), **change)
    env = Counter()
    env.action_space = gymnasium.spaces.Discrete(3)
    with pytest.raises(InvalidArgument, match="must have a Box action space, got Discrete"):
        ActionChunk(env, 2)
    env = Counter(as_dict=True)
    env.observation_space = gymnasium.spaces.Dict(flat=env.observation_space["flat"], text=gymnasium.spaces.Text(3))
    with pytest.raises(InvalidArgument, match="observation 'text' of env must be a Box"):
        ActionChunk(env, 2)


@pytest.mark.parametrize("obs", ["state", "keypoints", "image"])
def test_observing_later_is_observing_every_step(obs: Any) -> None:
    pytest.importorskip("gym_pusht")
    from minidiff_fast.tasks.pusht.task import PushTTask
    from minidiff_fast.tasks.pusht.variants import Variant

    variant = Variant("short", max_steps=22, step_cost=0.25)
    later, always = PushTTask(obs, variant), PushTTask(obs, variant)
    chunked = ActionChunk(later, 6, 2)
    plain = ActionChunk(gymnasium.Wrapper(always), 6, 2)  # a wrapper hides what observes later
    assert chunked._later is later and plain._later is None
    first, expected = chunked.reset(seed=4)[0], plain.reset(seed=4)[0]
    rng = np.random.default_rng(0)
    for call in range(4):
        if call:
            chunk = (always.get_obs()[2:4] + rng.normal(0.0, 60.0, (6, 2))).astype(np.float32)
            one, other = chunked.step(chunk), plain.step(chunk)
            first, expected = one[0], other[0]
            assert one[1:] == other[1:]
        assert first.keys() == expected.keys()
        for name in first:
            assert first[name].dtype == expected[name].dtype and np.array_equal(first[name], expected[name])
    one, other = chunked.step(chunk), plain.step(chunk)
    assert one[1:] == other[1:] and one[3] and one[4]["env_steps"] == 4
    assert all(np.array_equal(one[0][name], other[0][name]) for name in first)


def test_images_are_rendered_only_where_a_window_shows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gym_pusht")
    from minidiff_fast.tasks.pusht.env import PushTEnv
    from minidiff_fast.tasks.pusht.task import PushTTask

    env = ActionChunk(PushTTask("image"), 8, 2)
    env.reset(seed=0)
    rendered: list[int] = []
    render = PushTEnv.render_rgb
    monkeypatch.setattr(PushTEnv, "render_rgb", lambda self, size=96: rendered.append(size) or render(self, size))
    env.step(np.full((8, 2), 256.0))
    assert rendered == [96, 96]


def test_an_episode_that_ends_early_still_fills_its_window() -> None:
    pytest.importorskip("gym_pusht")
    from minidiff_fast.tasks.pusht.task import PushTTask

    for obs in ("state", "image"):
        env, plain = ActionChunk(PushTTask(obs), 8, 3), PushTTask(obs)
        near = {"state": (60.0, 60.0, 256.0, 254.0, np.pi / 4)}
        env.reset(options=near)
        seen = [plain.reset(options=near)[0]]
        env.env.success_threshold = 2.0
        env.step(np.full((8, 2), 60.0))
        env.env.success_threshold = 0.5
        observation, _, terminated, _, info = env.step(np.full((8, 2), 60.0))
        assert terminated and info["env_steps"] == 1 and info["is_success"]
        assert env.observation_space.contains(observation)
        for _ in range(9):
            seen.append(plain.step((60.0, 60.0))[0])
        for name in observation:
            assert np.array_equal(observation[name], np.stack([step[name] for step in seen[-3:]]))


@pytest.mark.parametrize("obs", ["state", "image"])
def test_the_window_of_an_episode_solved_within_a_chunk(obs: Any) -> None:
    pytest.importorskip("gym_pusht")
    from minidiff_fast.tasks.pusht.task import PushTTask

    # The block is 15 px from its goal, the agent behind it; its target moves 9 px with every action.
    start = {"state": (288.0, 224.0, 266.6, 245.4, np.pi / 4)}
    along = 9.0 * np.arange(8)[:, None] * np.array([-0.707, 0.707])
    chunk = (np.array([288.0, 224.0]) + along).astype(np.float32)

    def begin() -> PushTTask:
        env = PushTTask(obs)
        env.success_threshold = 2.0
        env.reset(options=start)
        return env

    plain = begin()
    steps = [plain.step(action) for action in chunk]
    coverage = [step[4]["coverage"] for step in steps]
    assert max(coverage[:5]) < coverage[5], coverage  # the sixth action solves it
    inner = begin()
    env = ActionChunk(inner, 8, 3)
    env.reset(options=start)
    inner.success_threshold = 0.5 * (max(coverage[:5]) + coverage[5])
    observation, _, terminated, truncated, info = env.step(chunk)
    assert (terminated, truncated, info["env_steps"]) == (True, False, 6)
    assert env.observation_space.contains(observation)
    for name, window in observation.items():
        last = [steps[place][0][name] for place in ((3, 4, 5) if obs == "state" else (5, 5, 5))]
        assert np.array_equal(window, np.stack(last))


@pytest.mark.parametrize("obs", ["state", "keypoints"])
def test_chunks_and_shaping_cost_less_than_the_physics(obs: Any) -> None:
    pytest.importorskip("gym_pusht")
    from minidiff_fast.tasks.pusht.env import PushTEnv
    from minidiff_fast.tasks.pusht.rewards import ShapedReward
    from minidiff_fast.tasks.pusht.task import PushTTask

    plain, wrapped = PushTEnv(render_mode=None), ShapedReward(ActionChunk(PushTTask(obs), 8, 2))
    ratios = []
    for seed in range(9):  # alternating, in processor time: what else runs does not matter
        chunks = (256.0 + np.random.default_rng(seed).normal(0.0, 90.0, (12, 8, 2))).astype(np.float32)
        plain.reset(seed=seed)
        wrapped.reset(seed=seed)
        begin = time.process_time()
        for action in chunks.reshape(-1, 2):
            plain.step(action)
        middle = time.process_time()
        for chunk in chunks:
            wrapped.step(chunk)
        ratios.append((time.process_time() - middle) / (middle - begin))
    assert np.median(ratios) <= 1.7, ratios
