"""Checkpoints are whole or not there, and say in one line what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minidiff_fast.errors import CheckpointError, RunFolderError
from minidiff_fast.nn.normalizer import MinMaxNormalizer
from minidiff_fast.policy import DiffusionPolicy
from minidiff_fast.tasks.pusht.policy import LOW_DIM_ENTRIES, PolicyConfig, build_policy
from minidiff_fast.training import checkpoint
from minidiff_fast.training.checkpoint import (
    FILES,
    CheckpointStore,
    find_checkpoint,
    load_policy,
    load_state,
    load_weights,
    read_info,
)

pytest.importorskip("safetensors")

TINY = PolicyConfig(encoder_width=8, encoder_blocks=1, hidden_dim=16, n_blocks=1)


def policy(config: PolicyConfig = TINY) -> DiffusionPolicy:
    obs = {
        name: MinMaxNormalizer(torch.full((width,), -3.0), torch.full((width,), 7.0))
        for name, width in LOW_DIM_ENTRIES[config.obs].items()
    }
    return build_policy(config, obs, MinMaxNormalizer(torch.zeros(2), torch.full((2,), 512.0)))


def save(run: Path, step: int, *, keep: int = 2, best: bool = False, **values: Any) -> Path:
    module = policy()
    averaged = {name: tensor + 1.0 for name, tensor in module.state_dict().items()}
    arguments: dict[str, Any] = {
        "policy": TINY, "train": {"lr": 1e-3}, "model": module.state_dict(), "ema": averaged,
        "state": {"step": step}, **values,
    }  # fmt: skip
    return CheckpointStore(run, keep).save(step, best=best, **arguments)


def test_a_policy_comes_back_as_it_was(tmp_path: Path) -> None:
    module = policy()
    save(tmp_path, 3, model=module.state_dict())
    random = torch.get_rng_state()
    loaded, info = load_policy(tmp_path, weights="model")
    assert torch.equal(torch.get_rng_state(), random), "loading leaves the random generator alone"
    assert (info.step, info.policy, info.train) == (3, TINY, {"lr": 1e-3})
    assert not loaded.training
    wanted = module.state_dict()
    assert wanted.keys() == loaded.state_dict().keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.state_dict().items())
    averaged, _ = load_policy(tmp_path)
    assert not torch.equal(averaged.state_dict()["denoiser.head.1.weight"], wanted["denoiser.head.1.weight"])


@pytest.mark.parametrize("obs", ["state", "keypoints"])
@pytest.mark.parametrize("denoiser", ["mlp", "transformer", "unet"])
def test_every_form_of_policy_can_be_stored(tmp_path: Path, obs: Any, denoiser: Any) -> None:
    config = PolicyConfig(obs=obs, denoiser=denoiser, hidden_dim=16, n_layer=1, n_emb=16, n_head=2, unet_width=8)
    weights = policy(config).state_dict()
    save(tmp_path, 1, policy=config, model=weights, ema=weights)
    assert load_policy(tmp_path)[1].policy == config


def test_the_last_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2, best=True)
    for step in (3, 4, 5):
        save(tmp_path, step)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["best", "last", "step_00000002", "step_00000004", "step_00000005"]
    assert find_checkpoint(tmp_path).name == "step_00000005"
    assert find_checkpoint(tmp_path / "checkpoints", "best").name == "step_00000002"
    assert find_checkpoint(tmp_path / "checkpoints" / "step_00000004").name == "step_00000004"


def test_a_step_can_be_written_again(tmp_path: Path) -> None:
    save(tmp_path, 1, state={"step": 1, "which": "first"})
    save(tmp_path, 1, state={"step": 1, "which": "second"})
    assert load_state(find_checkpoint(tmp_path))["which"] == "second"
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["last", "step_00000001"]


@pytest.mark.parametrize("name", ["save_file", "torch.save", "move"])
def test_a_failure_while_writing_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    save(tmp_path, 1)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    targets = {"save_file": "safetensors.torch.save_file", "torch.save": "torch.save"}
    if name == "move":
        monkeypatch.setattr(CheckpointStore, "_move", full)
    else:
        monkeypatch.setattr(targets[name], full)
    with pytest.raises(RunFolderError, match="step_00000002: the checkpoint cannot be written .*No space"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert find_checkpoint(tmp_path).name == "step_00000001"
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["last", "step_00000001"]
    load_policy(tmp_path)


def test_what_a_killed_process_left_is_no_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)
    left = tmp_path / "checkpoints" / ".step_00000002.123.tmp"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    assert find_checkpoint(tmp_path).name == "step_00000001"
    save(tmp_path, 3)
    assert not left.exists()


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_named(tmp_path: Path, file: str) -> None:
    (save(tmp_path, 1) / file).unlink()
    with pytest.raises(CheckpointError, match=f"incomplete, {file} missing"):
        load_policy(tmp_path)


@pytest.mark.parametrize("file", ["ema.safetensors", "config.json", "state.pt"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_half_written_file_is_one_line(tmp_path: Path, file: str, share: float) -> None:
    path = save(tmp_path, 1) / file
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        load_state(load_policy(tmp_path)[1].path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_another_architecture_names_key_and_shapes(tmp_path: Path) -> None:
    found = save(tmp_path, 1)
    wide = policy(PolicyConfig(encoder_width=8, encoder_blocks=1, hidden_dim=32, n_blocks=1))
    before = {name: tensor.clone() for name, tensor in wide.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"denoiser.cond_encoder.0.weight must be \[32, 16\], got \[16"):
        load_weights(wide, found / "model.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in wide.state_dict().items())
    deep = policy(PolicyConfig(encoder_width=8, encoder_blocks=1, hidden_dim=16, n_blocks=2))
    with pytest.raises(CheckpointError, match=r"denoiser.blocks.1.norm.weight \[16\] is missing"):
        load_weights(deep, found / "model.safetensors")
    flat = policy(PolicyConfig(encoder_width=8, encoder_blocks=2, hidden_dim=16, n_blocks=1))
    save(tmp_path, 2, model=flat.state_dict())
    with pytest.raises(CheckpointError, match=r"encoder.blocks.1.0.bias \[16\] is not part of this policy"):
        load_weights(policy(), find_checkpoint(tmp_path) / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "has format 99, written by minidiff_fast"),
        ({"task": "chess"}, "is a policy for 'chess', expected 'pusht'"),
        ({"policy": {"obs": "state"}}, "missing"),
        ({"step": None, "policy": None}, "checkpoint|must|argument|iterable|NoneType"),
    ],
)
def test_configurations_of_others(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = save(tmp_path, 1) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        read_info(path.parent)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        find_checkpoint(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last").write_text("../../elsewhere\n")
    with pytest.raises(CheckpointError, match="must hold the name of a checkpoint"):
        find_checkpoint(tmp_path)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "pwned",))

    found = save(tmp_path, 1)
    torch.save({"step": Payload()}, found / checkpoint.STATE)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_state(found)
    assert not (tmp_path / "pwned").exists()
