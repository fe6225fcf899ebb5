"""The options of a run: what they mean, and the one line that a wrong one gives."""

from __future__ import annotations

import json
from typing import Any

import pytest

from minidiff_fast.tasks.pusht.policy import InvalidOption, PolicyConfig
from minidiff_fast.training.config import Interval, TrainConfig, parse_duration, parse_interval


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90.0), ("5m", 300.0), ("1h", 3600.0), ("1.5m", 90.0), (" 2s ", 2.0)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration("--budget", text) == seconds


@pytest.mark.parametrize("text", ["", "5", "m", "0s", "-1m", "5 m", "1d", "5m5s", "nan", "infs"])
def test_other_durations_are_refused(text: str) -> None:
    with pytest.raises(InvalidOption, match=r"--budget must be a time above 0 such as 90s, 5m or 1h"):
        parse_duration("--budget", text)


def test_intervals() -> None:
    assert parse_interval("--eval-every", "500") == Interval(500, None)
    assert parse_interval("--eval-every", "2m") == Interval(None, 120.0)
    assert parse_interval("--eval-every", "none") == Interval(None, None)
    assert parse_interval("--eval-every", "auto") is None
    for text in ("0", "-3", "often", "0s"):
        with pytest.raises(InvalidOption, match="--eval-every must be a number of steps, a time"):
            parse_interval("--eval-every", text)


def test_what_ends_a_run() -> None:
    assert TrainConfig().budget_seconds == 20 * 60.0
    assert TrainConfig(max_steps=7).budget_seconds is None
    assert TrainConfig(max_steps=7, budget="3m").budget_seconds == 180.0
    assert TrainConfig(budget="none", max_steps=7).budget_seconds is None


def test_auto_is_five_times_a_run() -> None:
    assert TrainConfig(max_steps=11).interval("eval_every") == Interval(3, None)
    assert TrainConfig(budget="5m").interval("eval_every") == Interval(None, 60.0)
    assert TrainConfig(checkpoint_every="30s").interval("checkpoint_every") == Interval(None, 30.0)


def test_trackers() -> None:
    assert TrainConfig(log="none").trackers == ()
    assert TrainConfig(log="tensorboard, wandb").trackers == ("tensorboard", "wandb")
    with pytest.raises(InvalidOption, match="got 'mlflow'"):
        TrainConfig(log="mlflow")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"l2_batch": 0}, r"--l2-batch \(K, samples per condition\) must be at least 1, got 0"),
        ({"batch_size": 0}, r"--batch-size \(B, conditions per step\) must be at least 1, got 0"),
        ({"l2_chunk": 0}, "--l2-chunk"),
        ({"demo_episodes": 0}, "--demo-episodes must be at least 1, got 0"),
        ({"max_steps": 0}, "--max-steps"),
        ({"lr": 0.0}, "--lr must be above 0"),
        ({"lr": float("nan")}, "--lr"),
        ({"weight_decay": -1.0}, "--weight-decay"),
        ({"grad_clip": -1.0}, "--grad-clip"),
        ({"seed": -1}, "--seed"),
        ({"mixed_precision": "int8"}, "--mixed-precision must be one of no, fp16, bf16"),
        ({"device": "tpu"}, "--device must be one of auto, cpu, cuda"),
        ({"timesteps": "even"}, "--timesteps must be one of iid, stratified, got 'even'"),
        ({"noise": "white"}, "--noise must be one of iid, antithetic, got 'white'"),
        ({"eval_every": "x"}, "--eval-every"),
        ({"budget": "x"}, "--budget"),
        ({"out": " "}, "--out"),
    ],
)
def test_wrong_options(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOption, match=message) as caught:
        TrainConfig(**values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"obs": "sound"}, "--obs|obs must be one of state, keypoints, image"),
        ({"n_layer": 0}, "--n-layer must be at least 1"),
        ({"horizon": 8}, r"n_obs_steps - 1 \+ n_action_steps must be at most horizon = 8"),
        ({"n_emb": 30}, "n_emb must be a multiple of n_head"),
        ({"p_drop_attn": 1.0}, r"must be in \[0, 1\)"),
        ({"num_inference_steps": 101}, "at most num_train_timesteps = 100"),
    ],
)
def test_wrong_shapes_of_a_policy(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOption, match=message):
        PolicyConfig(**values)


def test_configurations_survive_json() -> None:
    policy = PolicyConfig(obs="state", prediction="flow")
    assert PolicyConfig.from_dict(json.loads(json.dumps(vars(policy)))) == policy
    older = {name: value for name, value in vars(policy).items() if not name.startswith("unet_")}
    assert PolicyConfig.from_dict(older) == policy
    values = json.loads(json.dumps(TrainConfig(max_steps=3).to_dict()))
    assert values["max_steps"] == 3
    assert "policy" not in values
    with pytest.raises(InvalidOption, match=r"missing \['obs'\], unknown \['colour'\]"):
        PolicyConfig.from_dict({**{k: v for k, v in vars(policy).items() if k != "obs"}, "colour": 1})
