"""Push-T in gymnasium: registration, spaces, observations, and gymnasium's own checks."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gym_pusht")

import gymnasium
from gymnasium.utils.env_checker import check_env

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.tasks.pusht.env import PushTEnv, keypoints_from_state
from minidiff_fast.tasks.pusht.evaluation import evaluate
from minidiff_fast.tasks.pusht.register import ENV_ID, register
from minidiff_fast.tasks.pusht.task import PushTTask

KINDS = ["state", "keypoints", "image"]
SHAPES = {
    "state": {"state": (5,)},
    "keypoints": {"keypoints": (20,)},
    "image": {"image": (96, 96, 3), "agent_pos": (2,)},
}


def test_registration_is_lazy_and_may_be_repeated() -> None:
    code = (
        "import sys, minidiff_fast, minidiff_fast.tasks.pusht.register as r\n"
        "assert 'gymnasium' not in sys.modules and 'torch' not in sys.modules\n"
        "assert r.register() == r.register() == 'minidiff_fast/PushT-v0'\n"
        "assert 'pymunk' not in sys.modules\n"
        "import gymnasium; gymnasium.make(r.ENV_ID).close()\n"
    )
    subprocess.run([sys.executable, "-W", "error::UserWarning:gymnasium", "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("variant", ["stock", "near-goal"])
@pytest.mark.parametrize("obs", KINDS)
def test_gymnasium_checks_pass(obs: Any, variant: str) -> None:
    register()
    env = gymnasium.make(ENV_ID, obs=obs, variant=variant, render_mode="rgb_array")
    assert env.spec is not None and env.spec.max_episode_steps is None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(env.unwrapped)
    # Actions are pixels, as everywhere in Push-T; there is nothing else to remark.
    remarks = [str(warning.message) for warning in caught if "symmetric and normalized" not in str(warning.message)]
    assert not remarks, remarks
    env.close()


@pytest.mark.parametrize("obs", KINDS)
def test_observations_are_those_of_evaluation(obs: Any) -> None:
    env = PushTTask(obs)
    seen = [env.reset(seed=6)[0]]
    assert {name: value.shape for name, value in seen[0].items()} == SHAPES[obs]
    actions = np.random.default_rng(1).uniform(100.0, 400.0, (8, 2)).astype(np.float32)
    for action in actions:
        observation, _, _, _, info = env.step(action)
        assert env.observation_space.contains(observation) and set(info) == {"coverage", "is_success"}
        seen.append(observation)
    windows: list[dict[str, np.ndarray]] = []

    def act(window: dict[str, np.ndarray]) -> np.ndarray:
        windows.append(window)
        return actions[None, 4 * (len(windows) - 1) : 4 * len(windows)]

    evaluate(act, obs=obs, episodes=1, seed=6, max_steps=8)
    for name in SHAPES[obs]:
        assert windows[1][name].dtype == seen[4][name].dtype
        assert np.array_equal(windows[0][name][0], np.stack([seen[0][name]] * 2))
        assert np.array_equal(windows[1][name][0], np.stack([seen[3][name], seen[4][name]]))


def test_rewards_and_states_are_those_of_the_plain_environment() -> None:
    task, plain = PushTTask("keypoints"), PushTEnv(render_mode=None)
    task.reset(seed=8)
    plain.reset(seed=8)
    for action in np.random.default_rng(8).uniform(150.0, 350.0, (60, 2)):
        observation, *rest = task.step(action)
        state, *expected = plain.step(action)
        assert rest == expected and np.array_equal(task.get_obs(), state)
        points = keypoints_from_state(state.astype(np.float32)).ravel()
        assert np.array_equal(observation["keypoints"], np.append(points, state[:2].astype(np.float32)))


def test_images_of_snapshots_are_the_frames_of_their_moments() -> None:
    task = PushTTask("image")
    task.reset(seed=3)
    snapshots, frames = [], []
    for action in np.random.default_rng(3).uniform(150.0, 350.0, (40, 2)):
        snapshots.append(task.step_snapshot(action.tolist(), True)[0])
        frames.append(task.render_rgb(96))
    assert len({frame.tobytes() for frame in frames}) > 30
    assert np.array_equal(task.observe(snapshots)["image"], np.stack(frames))
    assert task.step_snapshot([256.0, 256.0], False)[0] is None


def test_the_spaces_hold_where_the_block_is_pushed_through_a_wall() -> None:
    for obs in ("state", "keypoints"):
        env = PushTTask(obs)
        for end, start in ((512.0, 440.0), (0.0, 70.0)):
            env.reset(options={"state": (start - 130.0 if end else start + 130.0, 256.0, start, 256.0, 0.3)})
            for _ in range(40):
                observation = env.step((end, 256.0))[0]
                assert env.observation_space.contains(observation), observation


def test_reset_to_a_state() -> None:
    env = PushTTask()
    state = np.array([100.0, 120.0, 300.0, 310.0, 1.0], dtype=np.float32)
    observation, info = env.reset(seed=0, options={"state": state})
    assert np.allclose(observation["state"], state, atol=1e-4) and not info["is_success"]
    assert info["coverage"] == env.coverage()
    assert not np.allclose(env.reset(seed=0)[0]["state"], state)


def test_refuses() -> None:
    with pytest.raises(InvalidArgument, match="PushTTask: obs must be one of state, keypoints, image, got 'pixels'"):
        PushTTask("pixels")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="render_mode must be rgb_array or None, got 'human'"):
        PushTTask(render_mode="human")
    with pytest.raises(InvalidArgument, match="variant must be one of stock, time-limit, near-goal, got 'no'"):
        PushTTask(variant="no")
    env = PushTTask()
    env.reset(seed=0)
    for options in ({"reset_to_state": [0.0] * 5}, {"state": [0.0] * 5, "more": 1}):
        with pytest.raises(InvalidArgument, match="options must be None or"):
            env.reset(options=options)
    with pytest.raises(InvalidArgument, match="state must be 5 finite numbers"):
        env.reset(options={"state": [0.0] * 4})
    with pytest.raises(InvalidArgument, match="action must be finite"):
        env.step((np.nan, 0.0))
