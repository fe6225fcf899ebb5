"""Same seed, same losses, bit for bit; a run that was interrupted and resumed is the run that was not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minidiff_fast.errors import CheckpointError, DataError
from minidiff_fast.tasks.pusht.data import PushTData, load_pusht
from minidiff_fast.tasks.pusht.policy import PolicyConfig, PushTActor, build_scheduler
from minidiff_fast.training.checkpoint import find_checkpoint, load_policy, load_state
from minidiff_fast.training.config import TrainConfig
from minidiff_fast.training.loop import NonFiniteLoss
from minidiff_fast.training.metrics import read_metrics
from minidiff_fast.training.order import DataOrder
from minidiff_fast.training.pusht import train_pusht
from minidiff_fast.training.runtime import Interrupted

for name in ("accelerate", "diffusers", "tqdm", "safetensors"):
    pytest.importorskip(name)

TINY = PolicyConfig(encoder_width=16, encoder_blocks=1, hidden_dim=32, n_blocks=1)
TINY_TRANSFORMER = PolicyConfig(
    obs="state", denoiser="transformer", n_layer=1, n_head=2, n_emb=16, p_drop_emb=0.1, p_drop_attn=0.1
)


@pytest.fixture(autouse=True)
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIDIFF_FAST_IMPL", "reference")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three random walks: enough to be cut into windows."""
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "walks.npz"
    steps = 90
    state = np.concatenate([random.uniform(50, 450, (steps, 4)), random.uniform(0, 6, (steps, 1))], axis=1)
    np.savez(
        path,
        state=state.astype(np.float32),
        action=random.uniform(50, 450, (steps, 2)).astype(np.float32),
        episode_ends=np.array([30, 55, 90]),
    )
    return str(path)


def options(data: str, out: Path, **values: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "policy": TINY, "batch_size": 8, "l2_batch": 2, "max_steps": 14, "warmup_steps": 3, "log_every": 1,
        "eval_every": "none", "log": "none", "device": "cpu", "num_threads": 1, "progress": False,
    }  # fmt: skip
    return TrainConfig(out=str(out), data=data, **{**settings, **values})


def losses(run: Path) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["lr"]) for row in read_metrics(run) if row["kind"] == "train"]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {
        f"{kind}.{name}": tensor
        for kind in ("model", "ema")
        for name, tensor in load_policy(run, weights=kind)[0].state_dict().items()  # type: ignore[arg-type]
    }


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def stop_at(step: int) -> Any:
    def on_step(done: int) -> None:
        if done == step:
            raise KeyboardInterrupt

    return on_step


@pytest.mark.parametrize("policy", [TINY, TINY_TRANSFORMER], ids=["mlp", "transformer"])
def test_same_seed_same_bits_and_resume_is_the_uninterrupted_run(
    data: str, tmp_path: Path, policy: PolicyConfig
) -> None:
    whole = options(data, tmp_path / "whole", policy=policy)
    train_pusht(whole)
    torch.randn(5)  # what was drawn before a run is nothing to it
    train_pusht(replace(whole, out=str(tmp_path / "again")))
    assert losses(tmp_path / "whole") == losses(tmp_path / "again")
    assert len(losses(tmp_path / "whole")) == 14
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "again"))

    broken = replace(whole, out=str(tmp_path / "broken"))
    with pytest.raises(Interrupted, match="checkpoint: .*step_00000005"):
        train_pusht(broken, on_step=stop_at(5))
    torch.randn(7)
    with pytest.raises(Interrupted):
        train_pusht(replace(broken, resume=True), on_step=stop_at(9))
    result = train_pusht(replace(broken, resume=True))
    assert result.step == 14
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "broken"))


def test_another_seed_gives_other_losses(data: str, tmp_path: Path) -> None:
    train_pusht(options(data, tmp_path / "a", max_steps=2))
    train_pusht(options(data, tmp_path / "b", max_steps=2, seed=1))
    assert losses(tmp_path / "a")[0][1] != losses(tmp_path / "b")[0][1]


def test_chunks_change_memory_not_the_gradient(data: str, tmp_path: Path) -> None:
    train_pusht(options(data, tmp_path / "a", max_steps=4))
    train_pusht(options(data, tmp_path / "b", max_steps=4, l2_chunk=1))
    first, second = losses(tmp_path / "a"), losses(tmp_path / "b")
    np.testing.assert_allclose([row[1] for row in first], [row[1] for row in second], rtol=1e-4)


def test_a_run_that_died_before_its_checkpoint_is_written_anew(data: str, tmp_path: Path) -> None:
    whole = options(data, tmp_path / "whole", checkpoint_every="4")
    train_pusht(whole)

    class Died(Exception):
        pass

    def die(done: int) -> None:
        if done == 7:
            raise Died

    broken = replace(whole, out=str(tmp_path / "broken"))
    with pytest.raises(Died):
        train_pusht(broken, on_step=die)
    assert find_checkpoint(tmp_path / "broken").name == "step_00000004"
    assert len(losses(tmp_path / "broken")) == 7
    train_pusht(replace(broken, resume=True))
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")


def test_a_time_budget_ends_the_run_and_the_rate_follows_the_time(data: str, tmp_path: Path) -> None:
    result = train_pusht(options(data, tmp_path / "run", max_steps=None, budget="0.5s", warmup_steps=2))
    assert 0.5 <= result.seconds < 5.0
    rows = losses(tmp_path / "run")
    assert rows[-1][2] < 0.2 * max(row[2] for row in rows)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minidiff_fast.objectives.imitation import DenoisingLoss

    good, calls = DenoisingLoss.per_sample, []

    def poisoned(self: Any, *arguments: Any) -> torch.Tensor:
        calls.append(1)
        return good(self, *arguments) * (float("nan") if len(calls) == 7 else 1.0)

    monkeypatch.setattr(DenoisingLoss, "per_sample", poisoned)
    config = options(data, tmp_path / "run", checkpoint_every="3", log_every=100)
    with pytest.raises(NonFiniteLoss, match="step 7: the loss is nan .*step_00000006"):
        train_pusht(config)
    found = find_checkpoint(tmp_path / "run")
    assert found.name == "step_00000006"
    assert all(bool(torch.isfinite(t).all()) for t in load_policy(found, weights="model")[0].parameters())


def test_resume_refuses_what_does_not_fit(data: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = options(data, run, max_steps=2)
    train_pusht(config)
    before = sorted(path.relative_to(run) for path in run.rglob("*"))
    wrong: dict[str, Any] = {
        r"trained on --obs keypoints, got --obs state": {"policy": replace(TINY, obs="state")},
        r"denoiser.* must be \[.*\], got \[.*\]": {"policy": replace(TINY, hidden_dim=48)},
        r"--prediction sample, got epsilon": {"policy": replace(TINY, prediction="epsilon")},
        r"--l2-batch 2, got 3": {"l2_batch": 3},
        r"--seed 0, got 5": {"seed": 5},
    }
    for message, values in wrong.items():
        with pytest.raises(CheckpointError, match=message):
            train_pusht(options(data, run, **{"max_steps": 4, "resume": True, **values}))
    assert sorted(path.relative_to(run) for path in run.rglob("*")) == before


def test_the_first_episodes_are_a_data_set_of_their_own(data: str, tmp_path: Path) -> None:
    """Windows, normalisers and losses are those of a file that holds these episodes alone."""
    short = tmp_path / "short.npz"
    with np.load(data) as walks:
        np.savez(short, state=walks["state"][:55], action=walks["action"][:55], episode_ends=walks["episode_ends"][:2])
    train_pusht(options(data, tmp_path / "first", demo_episodes=2))
    train_pusht(options(str(short), tmp_path / "file"))
    train_pusht(options(data, tmp_path / "all"))
    assert losses(tmp_path / "first") == losses(tmp_path / "file") != losses(tmp_path / "all")
    assert same(weights(tmp_path / "first"), weights(tmp_path / "file"))
    with pytest.raises(DataError, match=r"--demo-episodes must be at most the 3 episodes of .*walks.npz, got 4"):
        train_pusht(options(data, tmp_path / "many", demo_episodes=4))
    assert not (tmp_path / "many").exists()


def test_mirror_images_of_the_chosen_episodes_alone(data: str, tmp_path: Path) -> None:
    """``mirror`` trains as on a file that holds the episodes and their mirror images."""
    arrays = load_pusht(data)
    first = PushTData(state=arrays.state[:55], action=arrays.action[:55], episode_ends=arrays.episode_ends[:2])
    both, file = first.with_mirrored(), tmp_path / "both.npz"
    np.savez(file, state=both.state, action=both.action, episode_ends=both.episode_ends)
    train_pusht(options(data, tmp_path / "mirror", demo_episodes=2, mirror=True))
    train_pusht(options(str(file), tmp_path / "file"))
    train_pusht(options(data, tmp_path / "plain", demo_episodes=2))
    assert losses(tmp_path / "mirror") == losses(tmp_path / "file") != losses(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="--mirror True, got False"):
        train_pusht(options(data, tmp_path / "mirror", demo_episodes=2, max_steps=20, resume=True))


def test_demo_episodes_on_resume(data: str, tmp_path: Path) -> None:
    """A run from before the option had all episodes; one with it keeps its own."""
    run = tmp_path / "older"
    train_pusht(options(data, run, max_steps=2))
    path = find_checkpoint(run) / "config.json"
    values = json.loads(path.read_text())
    del values["train"]["demo_episodes"]
    path.write_text(json.dumps(values))
    assert train_pusht(options(data, run, max_steps=4, resume=True)).step == 4
    with pytest.raises(CheckpointError, match="--demo-episodes None, got 2"):
        train_pusht(options(data, run, max_steps=6, resume=True, demo_episodes=2))


def test_processor_time_is_counted_across_a_resume(data: str, tmp_path: Path) -> None:
    train_pusht(options(data, tmp_path / "run", max_steps=3))
    result = train_pusht(options(data, tmp_path / "run", max_steps=6, resume=True))
    spent = [row["cpu_seconds"] for row in read_metrics(tmp_path / "run")]
    assert len(spent) == 6 and spent == sorted(set(spent))
    assert result.cpu_seconds > spent[-1] > spent[2] > 0.0


def test_the_data_order_visits_everything_once_a_pass_and_goes_on_from_its_state() -> None:
    order = DataOrder(10, seed=3)
    taken = torch.cat([order.take(4) for _ in range(5)])
    assert sorted(taken[:10].tolist()) == sorted(taken[10:].tolist()) == list(range(10))
    state = order.state_dict()
    expected = order.take(13)
    other = DataOrder(10, seed=99)
    other.load_state_dict(state)
    assert torch.equal(other.take(13), expected)
    with pytest.raises(CheckpointError, match="10 windows and the data has 11"):
        DataOrder(11, seed=3).load_state_dict(state)


def test_the_state_holds_no_pickled_code(data: str, tmp_path: Path) -> None:
    train_pusht(options(data, tmp_path / "run", max_steps=1))
    state = load_state(find_checkpoint(tmp_path / "run"))  # weights_only
    assert {"step", "optimizer", "ema", "orders", "randoms", "seconds"} <= set(state)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction", "flow"])
def test_an_actor_repeats_itself_and_gives_the_executed_part(data: str, tmp_path: Path, prediction: Any) -> None:
    config = replace(TINY, prediction=prediction, num_inference_steps=3)
    train_pusht(options(data, tmp_path / "run", max_steps=1, policy=config))
    policy, info = load_policy(tmp_path / "run")
    obs = {"keypoints": np.random.default_rng(0).uniform(50, 450, (3, 2, 20)).astype(np.float32)}

    def act(seed: int) -> np.ndarray:
        return PushTActor(policy, build_scheduler(info.policy), info.policy, seed=seed)(obs)

    first = act(0)
    assert first.shape == (3, 8, 2)
    assert np.array_equal(first, act(0))
    assert not np.array_equal(first, act(1))
    assert np.isfinite(first).all()
