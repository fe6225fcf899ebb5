"""Vector environments: every autoreset mode gives the transitions of a plain loop; dead processes are replaced."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

pytest.importorskip("gymnasium", minversion="1.1")

import gymnasium
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.finetuning.buffer import ObsEntry, RolloutBuffer
from minidiff_fast.finetuning.chunk import ActionChunk
from minidiff_fast.finetuning.counters import Counters
from minidiff_fast.finetuning.vector import (
    RestartingVectorEnv,
    StepResult,
    TooManyRestarts,
    VectorRunner,
    WorkerFailed,
    check_spaces,
    make_vector,
)

N = 3


class Walk(gymnasium.Env):
    """Episodes of random length that terminate or are truncated; observation: draw, step within the episode, episode.

    An action of 1 in its second place ends the process, one of -1 raises.
    """

    observation_space = spaces.Dict(
        {"state": spaces.Box(-np.inf, np.inf, (3,), np.float32), "image": spaces.Box(0, 255, (2, 2), np.uint8)}
    )
    action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}

    def __init__(self) -> None:
        self.episode = 0
        self.step_size = 1.0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.episode += 1
        self.count, self.length = 0, int(self.np_random.integers(1, 6))
        return self._observe(), {"env_steps": 0, "success": False, "first": True}

    def _observe(self) -> dict[str, np.ndarray]:
        draw = self.np_random.normal()
        state = np.array([draw, self.count, self.episode], dtype=np.float32)
        return {"state": state, "image": np.full((2, 2), self.count, dtype=np.uint8)}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if action[1] > 0.99:
            os._exit(3)
        if action[1] < -0.99:
            raise ConnectionError("the simulator said no")
        self.count += 1
        over = self.count >= self.length
        terminated = over and self.length % 2 == 0
        reward = float(self.np_random.normal() + self.step_size * action[0])
        info = {"env_steps": self.count, "success": terminated}
        return self._observe(), reward, terminated, over and not terminated, info


class Bare(Walk):
    """One Box, no info."""

    observation_space = Walk.observation_space["state"]

    def _observe(self) -> Any:
        return super()._observe()["state"]

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        return super().reset(**kwargs)[0], {}

    def step(self, action: np.ndarray) -> Any:
        return (*super().step(action)[:4], {})


def act(state: np.ndarray) -> np.ndarray:
    """An action that depends on the observation alone: modes differ in when an environment decides."""
    return np.stack([np.tanh(state[..., 0]), np.zeros_like(state[..., 0])], axis=-1).astype(np.float32)


Transition = tuple[Any, ...]


def by_hand(index: int, transitions: int) -> list[Transition]:
    """What environment ``index`` goes through, in a loop that everyone would write."""
    env = Walk()
    obs, _ = env.reset(seed=100 + index)
    out: list[Transition] = []
    while len(out) < transitions:
        after, reward, terminated, truncated, info = env.step(act(obs["state"]))
        out.append((*obs["state"], *after["state"], reward, terminated, truncated, info["env_steps"], info["success"]))
        obs = env.reset()[0] if terminated or truncated else after
    return out


def through(runner: VectorRunner, steps: int) -> tuple[list[list[Transition]], list[StepResult]]:
    """The valid transitions of every environment."""
    obs = runner.reset(seed=100)
    out: list[list[Transition]] = [[] for _ in range(N)]
    results = []
    for _ in range(steps):
        result = runner.step(act(obs["state"]))
        success = result.info("success", False)
        assert success.dtype == bool
        assert not result.info("first", False)[result.valid].any(), "that is the next episode's info"
        for i in np.flatnonzero(result.valid):
            assert (result.final_obs["image"][i] == result.final_obs["state"][i, 1]).all()
            out[i].append(
                (*obs["state"][i], *result.final_obs["state"][i], result.reward[i], result.terminated[i],
                 result.truncated[i], result.env_steps[i], success[i])
            )  # fmt: skip
        obs = result.obs
        results.append(result)
    return out, results


MODES: dict[str, Callable[[], Any]] = {
    "sync same step": lambda: make_vector([Walk] * N),
    "sync next step": lambda: SyncVectorEnv([Walk] * N, autoreset_mode=AutoresetMode.NEXT_STEP),
    "sync disabled": lambda: SyncVectorEnv([Walk] * N, autoreset_mode=AutoresetMode.DISABLED),
    "sync same step without copies": lambda: SyncVectorEnv(
        [Walk] * N, copy=False, autoreset_mode=AutoresetMode.SAME_STEP
    ),
    "async same step": lambda: AsyncVectorEnv([Walk] * N, autoreset_mode=AutoresetMode.SAME_STEP),
    "async next step": lambda: AsyncVectorEnv([Walk] * N, autoreset_mode=AutoresetMode.NEXT_STEP),
    "async disabled": lambda: AsyncVectorEnv([Walk] * N, autoreset_mode=AutoresetMode.DISABLED),
    "restarting": lambda: make_vector([Walk] * N, "async"),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_the_transitions_of_a_plain_loop(mode: str) -> None:
    counters = Counters()
    runner = VectorRunner(MODES[mode](), counters=counters)
    try:
        found, results = through(runner, 40)
    finally:
        runner.close()
    for i, transitions in enumerate(found):
        assert transitions == by_hand(i, len(transitions))
        assert sum(t[7] or t[8] for t in transitions) > 5, "the test needs episodes that end"
    assert any(t[7] for t in found[0]) and any(t[8] for t in found[0])
    assert counters.chunk_steps == sum(map(len, found)) and counters.restarts == 0
    assert counters.env_steps == sum(int(result.env_steps.sum()) for result in results)
    if "next" in mode:
        assert any(not result.valid.all() for result in results)
    else:
        assert all(len(transitions) == 40 for transitions in found)


@pytest.mark.parametrize("mode", ["sync same step", "sync next step", "sync disabled", "restarting"])
def test_the_next_episodes_observation_is_never_v_next(mode: str) -> None:
    runner = VectorRunner(MODES[mode]())
    try:
        _, results = through(runner, 30)
    finally:
        runner.close()
    ends = 0
    for result in results:
        for i in np.flatnonzero(result.ended):
            ends += 1
            assert result.final_obs["state"][i, 1] > 0  # within the episode, whose first observation has 0
            if "next" not in mode:
                assert result.obs["state"][i, 1] == 0
                assert result.obs["state"][i, 2] == result.final_obs["state"][i, 2] + 1
    assert ends > 5


def advantages_by_hand(index: int, transitions: int, gamma: float, lam: float) -> list[float]:
    """GAE of the episodes that are over, with V(obs) = the observation's draw."""
    path = by_hand(index, transitions)
    path = path[: max(i for i, t in enumerate(path) if t[7] or t[8]) + 1]
    out, carry = [0.0] * len(path), 0.0
    for i in range(len(path) - 1, -1, -1):
        value, next_value, reward, terminated, truncated = path[i][0], path[i][3], path[i][6], path[i][7], path[i][8]
        delta = reward + gamma * (0.0 if terminated else next_value) - value
        carry = delta + (0.0 if terminated or truncated else gamma * lam * carry)
        out[i] = carry
    return out


@pytest.mark.parametrize("mode", ["sync same step", "sync next step", "sync disabled", "restarting"])
def test_advantages_through_the_buffer_are_those_of_a_plain_loop(mode: str) -> None:
    steps = 40
    runner = VectorRunner(MODES[mode]())
    buffer = RolloutBuffer(steps, N, {"state": ObsEntry((1, 3), torch.float32)})
    obs = runner.reset(seed=100)
    for _ in range(steps):
        result = runner.step(act(obs["state"]))
        buffer.add(
            {"state": obs["state"][:, None]},
            record={},
            reward=result.reward,
            terminated=result.terminated,
            truncated=result.truncated,
            value=obs["state"][:, 0],
            final_value=result.final_obs["state"][:, 0],
            valid=result.valid,
            env_steps=result.env_steps,
        )
        obs = result.obs
    runner.close()
    buffer.finish(obs["state"][:, 0], gamma=0.9, lam=0.8)
    for i in range(N):
        found = buffer.advantage[:, i][buffer.valid[:, i]]
        expected = advantages_by_hand(i, len(found), 0.9, 0.8)
        assert len(expected) > 10
        np.testing.assert_allclose(found[: len(expected)], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_chunks_report_the_steps_of_the_episode_that_ended(kind: Any) -> None:
    counters = Counters()
    runner = VectorRunner(make_vector([lambda: ActionChunk(Walk(), 4, 2)] * N, kind), counters=counters)
    obs = runner.reset(seed=100)
    check_spaces(runner.env, {"state": (2, 3), "image": (2, 2, 2)}, (4, 2))
    running, lengths = np.zeros(N, dtype=int), []
    for _ in range(15):
        result = runner.step(np.zeros((N, 4, 2), np.float32))
        assert result.obs["state"].shape == obs["state"].shape == (N, 2, 3)
        running += result.env_steps
        for i in np.flatnonzero(result.ended):
            assert result.final_obs["state"][i, -1, 1] == running[i]
            lengths.append(running[i])
            running[i] = 0
    runner.close()
    assert len(lengths) > 20 and set(lengths) == {1, 2, 3, 4, 5}
    assert counters.env_steps == sum(lengths) + running.sum() and counters.chunk_steps == 15 * N


def test_a_box_observation_has_a_name_and_missing_infos_have_defaults() -> None:
    runner = VectorRunner(make_vector([Bare] * N), name="state")
    obs = runner.reset(seed=100)
    for _ in range(20):
        result = runner.step(act(obs["state"]))
        obs = result.obs
        assert (result.env_steps == 1).all() and result.valid.all()
        assert (result.info("success", -1.0) == -1.0).all()
    runner.close()


def test_a_missing_final_observation_is_an_error() -> None:
    class Forgetful(SyncVectorEnv):
        def step(self, actions: Any) -> Any:
            *out, infos = super().step(actions)
            infos.pop("final_obs", None)
            return (*out, infos)

    runner = VectorRunner(Forgetful([Walk] * N, autoreset_mode=AutoresetMode.SAME_STEP))
    obs = runner.reset(seed=100)
    with pytest.raises(InvalidArgument, match=r"infos\['final_obs'\] is missing"):
        for _ in range(20):
            obs = runner.step(act(obs["state"])).obs


def test_batched_final_observations_are_read() -> None:
    class Batched(SyncVectorEnv):
        def step(self, actions: Any) -> Any:
            obs, *out, infos = super().step(actions)
            if "final_obs" in infos:
                last = infos["final_obs"]
                infos["final_obs"] = {
                    key: np.stack([obs[key][i] if last[i] is None else last[i][key] for i in range(N)]) for key in obs
                }
            return (obs, *out, infos)

    runner = VectorRunner(Batched([Walk] * N, autoreset_mode=AutoresetMode.SAME_STEP))
    found, _ = through(runner, 20)
    assert all(transitions == by_hand(i, 20) for i, transitions in enumerate(found))


def test_an_unknown_autoreset_mode_is_refused() -> None:
    env = make_vector([Walk])
    env.metadata = {}
    with pytest.raises(InvalidArgument, match="autoreset_mode must be"):
        VectorRunner(env)
    assert VectorRunner(env, autoreset_mode="NextStep").mode == "NextStep"
    with pytest.raises(InvalidArgument, match="must be a vector environment, got a Walk"):
        VectorRunner(Walk())
    with pytest.raises(InvalidArgument, match="call reset first"):
        VectorRunner(make_vector([Walk])).step(np.zeros((1, 2)))


def test_make_vector_checks_its_arguments() -> None:
    with pytest.raises(InvalidArgument, match="at least one environment"):
        make_vector([])
    with pytest.raises(InvalidArgument, match="'sync' or 'async', got 'threads'"):
        make_vector([Walk], "threads")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="no options, got \\['timeout'\\]"):
        make_vector([Walk], timeout=1.0)
    assert make_vector([Walk]).metadata["autoreset_mode"] == AutoresetMode.SAME_STEP


@pytest.fixture
def vector() -> Iterator[Callable[..., RestartingVectorEnv]]:
    made: list[RestartingVectorEnv] = []

    def make(count: int = N, **options: Any) -> RestartingVectorEnv:
        made.append(make_vector([Walk] * count, "async", **options))
        return made[-1]

    yield make
    for env in made:
        env.close()


def kill(env: RestartingVectorEnv, index: int) -> None:
    os.kill(env._processes[index].pid, signal.SIGKILL)


def check_death(runner: VectorRunner, before: dict[str, np.ndarray], result: StepResult, dead: int) -> None:
    others = [i for i in range(N) if i != dead]
    assert result.restarted.tolist() == [i == dead for i in range(N)]
    assert result.valid.tolist() == [i != dead for i in range(N)]
    assert result.truncated[dead] and not result.terminated[dead]
    assert result.reward[dead] == 0.0 and result.env_steps[dead] == 0
    assert (result.final_obs["state"][dead] == before["state"][dead]).all()
    assert result.obs["state"][dead, 1] == 0 and result.obs["state"][dead, 2] == 1  # the first step of a new process
    for i in others:
        advanced = result.final_obs["state"][i, 1] == before["state"][i, 1] + 1
        assert advanced and result.final_obs["state"][i, 2] == before["state"][i, 2]


@pytest.mark.parametrize("how", ["killed before the step", "dies in the step"])
def test_a_dead_process_is_restarted_and_the_others_keep_their_states(vector: Any, how: str) -> None:
    env, counters = vector(), Counters()
    runner = VectorRunner(env, counters=counters)
    obs = runner.reset(seed=100)
    for _ in range(3):
        obs = runner.step(act(obs["state"])).obs
    actions = act(obs["state"])
    if how == "dies in the step":
        actions[1, 1] = 1.0
    else:
        kill(env, 1)
    start = time.monotonic()
    result = runner.step(actions)
    assert time.monotonic() - start < 5.0
    check_death(runner, obs, result, 1)
    assert counters.restarts == env.restarts == 1 and counters.chunk_steps == 3 * N + N - 1
    for _ in range(10):
        result = runner.step(act(result.obs["state"]))
        assert result.valid.all()


def test_the_others_go_on_as_if_nothing_had_died(vector: Any) -> None:
    env = vector()
    runner = VectorRunner(env)
    obs, found = runner.reset(seed=100), [[] for _ in range(N)]  # type: ignore[var-annotated]
    for step in range(25):
        if step in (4, 9):
            kill(env, 2)
        result = runner.step(act(obs["state"]))
        for i in (0, 1):
            found[i].append((*obs["state"][i], *result.final_obs["state"][i], result.reward[i]))
        obs = result.obs
    assert env.restarts == 2
    for i in (0, 1):
        assert found[i] == [t[:7] for t in by_hand(i, 25)]


def test_a_process_killed_within_a_step_is_noticed(vector: Any) -> None:
    class Slow(Walk):
        def step(self, action: np.ndarray) -> Any:
            if action[1] > 0.5:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().step(action)

    env = make_vector([Slow, Walk], "async")
    runner = VectorRunner(env)
    runner.reset(seed=0)
    actions = np.zeros((2, 2), dtype=np.float32)
    actions[0, 1] = 0.9
    start = time.monotonic()
    assert runner.step(actions).restarted.tolist() == [True, False]
    assert time.monotonic() - start < 5.0
    env.close()


def test_a_process_that_dies_in_reset_is_restarted(tmp_path: Any) -> None:
    marker = tmp_path / "died"

    class Once(Walk):
        def reset(self, **kwargs: Any) -> Any:
            if not marker.exists():
                marker.touch()
                os._exit(1)
            return super().reset(**kwargs)

    counters = Counters()
    runner = VectorRunner(make_vector([Once], "async"), counters=counters)
    assert runner.reset(seed=0)["state"][0, 1] == 0
    assert counters.restarts == 1
    runner.close()


def test_too_many_restarts_are_an_error(vector: Any) -> None:
    env = vector(max_restarts=2)
    runner = VectorRunner(env)
    obs = runner.reset(seed=100)
    for _ in range(2):
        kill(env, 0)
        obs = runner.step(act(obs["state"])).obs
    kill(env, 0)
    with pytest.raises(
        TooManyRestarts, match=r"died 3 times within 1000 steps \(at most 2.*environment 0, exit code -9"
    ):
        runner.step(act(obs["state"]))
    with pytest.raises(InvalidArgument, match="is closed"):
        runner.step(act(obs["state"]))


def test_restarts_long_ago_are_forgotten(vector: Any) -> None:
    env = vector(2, max_restarts=1, per_steps=5)
    runner = VectorRunner(env)
    obs = runner.reset(seed=100)
    for step in range(20):
        if step % 7 == 0:
            kill(env, 1)
        obs = runner.step(act(obs["state"])).obs
    assert env.restarts == 3


def test_an_environment_that_dies_at_every_start_is_an_error() -> None:
    class Doomed(Walk):
        def reset(self, **kwargs: Any) -> Any:
            os._exit(1)

    env = make_vector([Doomed], "async", max_restarts=2)
    with pytest.raises(TooManyRestarts, match="exit code 1"):
        env.reset(seed=0)


def test_a_python_exception_is_shown_and_not_restarted(vector: Any) -> None:
    env = vector()
    runner = VectorRunner(env)
    obs = runner.reset(seed=100)
    actions = act(obs["state"])
    actions[2, 1] = -1.0
    with pytest.raises(WorkerFailed, match="environment 2 raised ConnectionError: the simulator said no") as failure:
        runner.step(actions)
    assert "in step" in str(failure.value)  # its traceback
    assert env.restarts == 0 and not any(process.is_alive() for process in env._processes)


def test_an_environment_that_cannot_be_made_is_shown() -> None:
    def broken() -> Any:
        raise FileNotFoundError("no such mesh")

    with pytest.raises(WorkerFailed, match="FileNotFoundError: no such mesh"):
        make_vector([broken], "async")
    with pytest.raises(WorkerFailed, match=r"processes of environments \[0\] died, exit codes \[5\]"):
        make_vector([lambda: os._exit(5)], "async")


def test_a_process_that_hangs_is_killed_after_the_timeout() -> None:
    class Hanging(Walk):
        def step(self, action: np.ndarray) -> Any:
            while True:
                time.sleep(0.01)

    runner = VectorRunner(make_vector([Walk, Hanging], "async", timeout=1.0))
    runner.reset(seed=0)
    start = time.monotonic()
    assert runner.step(np.zeros((2, 2), np.float32)).restarted.tolist() == [False, True]
    assert 0.9 < time.monotonic() - start < 5.0
    runner.close()


def test_restarts_are_seeded(vector: Any) -> None:
    def run() -> list[np.ndarray]:
        env = vector()
        runner = VectorRunner(env)
        obs = runner.reset(seed=7)
        seen = []
        for step in range(6):
            if step in (1, 3):
                kill(env, 0)
            obs = runner.step(act(obs["state"])).obs
            seen.append(obs["state"])
        assert (seen[1][0, 0] != seen[3][0, 0]) and seen[1][0, 1] == seen[3][0, 1] == 0
        return seen

    assert all((a == b).all() for a, b in zip(run(), run(), strict=True))


def test_a_restarted_environment_keeps_the_attributes_that_were_set(vector: Any) -> None:
    env = vector()
    env.set_attr("step_size", [1.0, 2.0, 3.0])
    env.reset(seed=0)
    kill(env, 1)
    env.step(np.zeros((N, 2), np.float32))
    assert env.get_attr("step_size") == (1.0, 2.0, 3.0)


def test_an_abandoned_reply_does_not_pass_for_the_next(vector: Any) -> None:
    """As after a KeyboardInterrupt between sending and receiving."""
    env = vector()
    env.reset(seed=0)
    env._asked += 1
    for pipe in env._pipes:
        pipe.send((env._asked, "call", ("step_size", (), {})))
    obs, *_ = env.step(np.zeros((N, 2), np.float32))
    assert obs["state"].shape == (N, 3)


def test_workers_leave_sigint_to_the_parent(vector: Any) -> None:
    env = vector()
    runner = VectorRunner(env)
    obs = runner.reset(seed=100)
    for process in env._processes:
        os.kill(process.pid, signal.SIGINT)
    time.sleep(0.1)
    assert runner.step(act(obs["state"])).valid.all()


def test_environments_must_have_the_same_spaces() -> None:
    class Other(Walk):
        action_space = spaces.Box(-1.0, 1.0, (3,), np.float32)

    with pytest.raises(InvalidArgument, match="must have the same spaces"):
        make_vector([Walk, Other], "async")


def test_an_info_that_cannot_be_sent_is_shown() -> None:
    class Unsendable(Walk):
        def step(self, action: np.ndarray) -> Any:
            return (*super().step(action)[:4], {"handle": lambda: None})

    env = make_vector([Unsendable], "async")
    env.reset(seed=0)
    with pytest.raises(WorkerFailed, match="environment 0 raised"):
        env.step(np.zeros((1, 2), np.float32))


OBS = {"state": (3,), "image": (2, 2)}


@pytest.mark.parametrize("make", [Walk, lambda: make_vector([Walk])])
def test_spaces_that_fit(make: Callable[[], Any]) -> None:
    check_spaces(make(), OBS, (2,))
    check_spaces(make(), {"state": [3]}, [2])
    check_spaces(Bare(), {"anything": (3,)}, (2,))


@pytest.mark.parametrize(
    ("entries", "action", "message"),
    [
        ({"state": (3,), "depth": (2, 2)}, (2,), r"reads observation 'depth' \[2, 2\]; the environment has .*'state'"),
        ({"state": (4,)}, (2,), r"observation 'state' must be a Box of shape \[4\].*Box\("),
        (OBS, (8, 2), r"actions must be a Box of shape \[8, 2\] for this policy; the environment has Box"),
    ],
)
def test_spaces_that_do_not_fit(entries: Any, action: Any, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        check_spaces(Walk(), entries, action)


def test_actions_must_be_a_bounded_box() -> None:
    class Unbounded(Walk):
        action_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)

    class Discrete(Walk):
        action_space = spaces.Discrete(4)

    with pytest.raises(InvalidArgument, match="finite bounds"):
        check_spaces(Unbounded(), OBS, (2,))
    with pytest.raises(InvalidArgument, match=r"must be a Box.*Discrete\(4\)"):
        check_spaces(Discrete(), OBS, (2,))
    with pytest.raises(InvalidArgument, match="the environment has one observation"):
        check_spaces(Bare(), OBS, (2,))
