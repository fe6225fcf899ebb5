"""`minidiff-fast finetune pusht` from end to end, small: every algorithm, resume, what it refuses."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

for module in ("gym_pusht", "diffusers", "safetensors", "accelerate", "tyro", "tensorboard"):
    pytest.importorskip(module)

from minidiff_fast.cli import main  # noqa: E402
from minidiff_fast.errors import CheckpointError, RunFolderError  # noqa: E402
from minidiff_fast.finetuning.config import FinetuneConfig  # noqa: E402
from minidiff_fast.finetuning.pusht import finetune_pusht, resolved  # noqa: E402
from minidiff_fast.sampling import sample_chain  # noqa: E402
from minidiff_fast.tasks.pusht.policy import InvalidOption, PolicyConfig, PushTActor, build_transitions  # noqa: E402
from minidiff_fast.training import checkpoint  # noqa: E402
from minidiff_fast.training.config import TrainConfig  # noqa: E402
from minidiff_fast.training.metrics import read_metrics  # noqa: E402
from minidiff_fast.training.pusht import train_pusht  # noqa: E402


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    monkeypatch.setenv("MINIDIFF_FAST_IMPL", "reference")


def train(folder, **shapes):
    small = {
        "horizon": 3,
        "n_obs_steps": 1,
        "n_action_steps": 3,
        "num_inference_steps": 3,
        "hidden_dim": 16,
        "n_blocks": 1,
    }
    policy = PolicyConfig(**{**small, "encoder_width": 8, "encoder_blocks": 1, **shapes})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIDIFF_FAST_IMPL", "reference")
        options = {"eval_every": "none", "log": "none", "progress": False, "num_threads": 1}
        train_pusht(
            TrainConfig(
                out=str(folder), policy=policy, max_steps=3, batch_size=4, l2_batch=2, demo_episodes=2, **options
            )
        )
    return str(folder)


@pytest.fixture(scope="module")
def cloned(tmp_path_factory):
    return train(tmp_path_factory.mktemp("bc") / "run")


@pytest.fixture(scope="module")
def cloned_flow(tmp_path_factory):
    return train(tmp_path_factory.mktemp("flow") / "run", prediction="flow")


def config(start, out, **options):
    values = {
        "max_iterations": 2, "envs": 2, "chunk_steps": 3, "epochs": 2, "batch_size": 4, "critic_warmup": 1,
        "eval_every": "none", "log": "none", "progress": False, "lr": 1e-3,
    }  # fmt: skip
    return FinetuneConfig(**{"checkpoint": start, "out": str(out), **values, **options})


def weights(folder):
    return checkpoint.load_policy(folder)[0].state_dict()


@pytest.mark.parametrize("algo", ["dppo", "fpo", "reinflow", "awr"])
def test_every_algorithm_changes_the_policy_and_can_be_evaluated(algo, cloned, cloned_flow, tmp_path, capsys):
    start = cloned_flow if algo == "reinflow" else cloned
    out = tmp_path / "run"
    result = finetune_pusht(config(start, out, algo=algo))
    assert result.iterations == 2 and result.total.chunk_steps == 12 and result.total.env_steps == 36
    before, after = weights(start), weights(out)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(torch.isfinite(value).all() for value in after.values())
    row = read_metrics(out)[-1]
    assert row["total_encoder_passes"] == result.total.encoder_passes and row["env_steps"] == 18
    assert main(["eval", "pusht", "--checkpoint", str(out), "--episodes", "1", "--max-steps", "3", "--no-progress", "--sampler", "stochastic"]) == 0  # fmt: skip
    assert "score" in capsys.readouterr().out


def test_from_the_command_line_with_tensorboard_and_evaluations(cloned, tmp_path, capsys):
    out = tmp_path / "run"
    options = "--max-iterations 2 --envs 2 --chunk-steps 2 --epochs 1 --batch-size 4 --critic-warmup 0 --eval-every 1 --eval-episodes 2 --no-progress --variant near-goal"  # fmt: skip
    assert main(["finetune", "pusht", "--checkpoint", cloned, "--out", str(out), *options.split()]) == 0
    printed = capsys.readouterr().out
    assert "encoder passes" in printed and "environment steps" in printed
    assert "--sampler stochastic --min-std 0.04 --variant near-goal" in printed
    assert list((out / "logs").glob("events*"))
    assert [row["step"] for row in read_metrics(out) if row["kind"] == "eval"] == [1, 2]
    assert (out / "checkpoints" / "best").is_file()
    assert main(["report", str(out)]) == 0
    assert "encoder passes" in (out / "report.md").read_text()


def test_a_resumed_run_goes_on(cloned, tmp_path, capsys):
    out, options = tmp_path / "run", {"critic_warmup": 0, "lr": None}
    begun = finetune_pusht(config(cloned, out, max_iterations=1, **options))
    stored = checkpoint.read_info(checkpoint.find_checkpoint(out)).train
    assert (stored["lr"], stored["clip"], stored["critic_epochs"]) == (3e-4, 0.1, 10)
    went = finetune_pusht(config(cloned, out, max_iterations=3, resume=True, **options | {"lr": 3e-4}))
    assert went.iterations == 3 and len(went.reports) == 2
    assert went.total.env_steps == 3 * begun.total.env_steps
    assert [row["step"] for row in read_metrics(out)] == [1, 2, 3]
    with pytest.raises(CheckpointError, match="--lr"):
        finetune_pusht(config(cloned, out, resume=True, **options | {"lr": 5e-3}))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if "checkpoints" in path.parts}
    same = ["--resume", "--out", str(out), "--max-iterations", "3", "--no-progress", "--log", "none"]
    shape = "--envs 2 --chunk-steps 3 --epochs 2 --batch-size 4 --critic-warmup 0 --eval-every none"
    assert main(["finetune", "pusht", *same, *shape.split()]) == 0  # from the checkpoint that it began with
    assert "nothing to do: the run is at iteration 3" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before
    with pytest.raises(CheckpointError, match="--checkpoint .*got elsewhere"):
        finetune_pusht(config("elsewhere", out, resume=True, **options))
    with pytest.raises(CheckpointError, match="--weights ema, got model"):
        finetune_pusht(config(cloned, out, resume=True, weights="model", **options))
    with pytest.raises(CheckpointError, match="no run of finetune"):
        finetune_pusht(config(cloned, cloned, resume=True))


def test_flat_pairs_learn_the_same_with_k_times_the_passes(cloned, tmp_path):
    results = []
    for flat in (False, True):
        out = tmp_path / f"flat{flat}"
        done = finetune_pusht(config(cloned, out, flat_pairs=flat, max_iterations=1, critic_warmup=0, critic="shared"))
        results.append((done.total, weights(out)))
    (ours, mine), (flat, theirs) = results
    assert ours.encoder_passes == 6 + 2 * 6 + 2 and flat.encoder_passes == (3 + 1) * 6 + 2 * 3 * 6 + 2
    assert ours.denoiser_rows == flat.denoiser_rows
    begun = weights(cloned)
    moved = max(float((mine[n] - begun[n]).abs().max()) for n in mine)
    assert moved > 1e-4
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=0.02 * moved)


def test_cheap_passes_of_the_value_function_are_more(cloned, tmp_path):
    """Ten of its own encoder on a state, as many as the policy's where each of them encodes something dear."""
    done = finetune_pusht(config(cloned, tmp_path / "own", max_iterations=1, critic_warmup=0))
    assert done.total.critic_encoder_passes == 6 + 10 * 6 + 2 and done.total.denoiser_rows > 0
    state, image = PolicyConfig(obs="state"), PolicyConfig(obs="image")
    for options, shapes, passes in (({}, state, 10), ({"epochs": 12}, state, 12), ({"critic": "shared"}, state, 2),
                                    ({}, image, 2), ({"critic_epochs": 4}, image, 4)):  # fmt: skip
        assert resolved(config(cloned, tmp_path, **options), shapes).critic_epochs == passes


def test_environments_are_closed_where_the_rest_cannot_be_opened(cloned, tmp_path, monkeypatch):
    """Processes of --vector async would live on."""
    from minidiff_fast.finetuning import log, pusht

    made, build = [], pusht.build_envs
    monkeypatch.setattr(pusht, "build_envs", lambda *arguments: made.append(build(*arguments)) or made[-1])

    def full(*arguments):
        raise RunFolderError("no space left")

    monkeypatch.setattr(log, "FinetuneLog", full)
    with pytest.raises(RunFolderError, match="no space left"):
        finetune_pusht(config(cloned, tmp_path / "run", vector="async"))
    assert len(made) == 1 and multiprocessing.active_children() == []


def test_a_run_of_warm_up_alone_says_so(cloned, tmp_path, capsys):
    options = (
        "--budget 0.01s --envs 2 --chunk-steps 2 --epochs 1 --batch-size 4 --eval-every none --log none --no-progress"
    )
    assert main(["finetune", "pusht", "--checkpoint", cloned, "--out", str(tmp_path / "run"), *options.split()]) == 0
    assert "the policy is as it was: --critic-warmup 2 iterations" in capsys.readouterr().out


def test_frozen_steps_and_cloning_run(cloned, tmp_path):
    done = finetune_pusht(config(cloned, tmp_path / "a", fine_tuned_steps=2, bc_weight=0.1, k=1))
    assert done.total.base_encoder_passes > 0
    assert "bc_loss" in done.reports[-1].stats


def test_where_steps_are_frozen_evaluations_run_the_frozen_policy_there(cloned, tmp_path, monkeypatch):
    """As in collecting: the fine-tuned weights were never trained at the first steps."""
    from minidiff_fast.training import pusht as training

    out, actors = tmp_path / "run", []
    monkeypatch.setattr(training, "PushTActor", lambda *a, **k: actors.append(PushTActor(*a, **k)) or actors[-1])
    options = {"fine_tuned_steps": 1, "critic_warmup": 0, "lr": 3e-3, "eval_every": "2", "eval_episodes": 1}
    finetune_pusht(config(cloned, out, **options))
    evaluate = ["eval", "pusht", "--checkpoint", str(out), "--episodes", "1", "--max-steps", "3", "--no-progress"]
    assert main([*evaluate, "--sampler", "deterministic"]) == 0
    policy, info = checkpoint.load_policy(out)
    begun, last = weights(cloned), policy.state_dict()
    assert len(actors) == 2 and any(not torch.equal(begun[name], last[name]) for name in begun)
    obs = {"keypoints": torch.rand(3, 1, 20).mul(512)}
    steps = build_transitions(info.policy).deterministic()
    chain = sample_chain(
        policy, obs, steps, shape=(3, 2), fine_tuned=1, base=checkpoint.load_policy(cloned)[0], min_std=0.0,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    alone = PushTActor(policy, None, info.policy, sampler="deterministic")
    assert not torch.allclose(alone._sample(obs), chain.actions, atol=1e-4)
    for actor in actors:
        actor._generator.manual_seed(0)
        assert torch.equal(actor._sample(obs), chain.actions)
    assert main(evaluate) == 2 and main([*evaluate, "--sampler", "stochastic", "--num-inference-steps", "2"]) == 2
    with pytest.raises(CheckpointError, match="is not one policy"):
        finetune_pusht(config(str(out), tmp_path / "next"))


def test_the_samplers_of_fine_tuning_act(cloned):
    policy, info = checkpoint.load_policy(cloned)
    obs = {"keypoints": torch.rand(3, 1, 20).mul(512).numpy()}
    for sampler, std in (("deterministic", 0.0), ("stochastic", 0.1)):
        first, second = (
            PushTActor(policy, None, info.policy, seed=seed, sampler=sampler, min_std=std)(obs) for seed in (4, 4)
        )
        assert first.shape == (3, 3, 2) and (first == second).all()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"algo": "ppo"}, "--algo"),
        ({"gamma": 1.5}, "--gamma"),
        ({"envs": 0}, "--envs"),
        ({"clip": 0.0}, "--clip"),
        ({"clip": 0.05, "clip_base": 0.1}, "--clip-base"),
        ({"critic_epochs": 1}, "--critic-epochs must be at least --epochs 2, got 1"),
        ({"algo": "awr", "clip": 0.1}, "--clip"),
        ({"samples": 4}, "--samples"),
        ({"log": "wandb"}, "--log"),
        ({"algo": "fpo", "flat_pairs": True}, "--flat-pairs"),
        ({"algo": "awr", "bc_weight": 1.0}, "--bc-weight"),
        ({"peer_passes": True}, "--peer-passes"),
        ({"algo": "fpo", "gamma_denoising": 0.9}, "--gamma-denoising is an option of dppo"),
        ({"algo": "awr", "target_kl": 0.1}, "--target-kl is an option of dppo and fpo and reinflow"),
        ({"awr_beta": 2.0}, "--awr-beta is an option of awr"),
        ({"critic_warmup": 2}, "--critic-warmup must be below --max-iterations 2, got 2"),
        ({"budget": "5 parsecs"}, "--budget"),
        ({"eval_every": "often"}, "--eval-every"),
        ({"out": " "}, "--out"),
        ({"checkpoint": None}, "--checkpoint must name .* got none"),
        ({"device": "tpu"}, "--device"),
        ({"critic": "none"}, "--critic"),
        ({"weights": "emma"}, "--weights"),
        ({"eval_sampler": "scheduler"}, "--eval-sampler"),
    ],
)
def test_wrong_options_are_named(options, text):
    with pytest.raises(InvalidOption, match=text):
        config("runs/bc", **{"out": "runs/x", **options})


def test_what_does_not_fit_is_refused_before_anything_is_written(cloned, cloned_flow, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(CheckpointError, match="flow policies"):
        finetune_pusht(config(cloned, out, algo="reinflow"))
    for start, options in ((cloned_flow, {"algo": "reinflow", "k": 2}), (cloned, {"k": 4}), (cloned, {"algo": "fpo", "k": 9})):  # fmt: skip
        with pytest.raises(InvalidOption, match=f"--k must be .*got {options['k']}"):
            finetune_pusht(config(start, out, **options))
    with pytest.raises(InvalidOption, match="--fine-tuned-steps must be at most the sampler's 3 steps, got 4"):
        finetune_pusht(config(cloned, out, fine_tuned_steps=4))
    with pytest.raises(CheckpointError, match="no such folder"):
        finetune_pusht(config(str(tmp_path / "nowhere"), out))
    assert not out.exists()
    (out / "something").mkdir(parents=True)
    with pytest.raises(RunFolderError, match="not empty"):
        finetune_pusht(config(cloned, out))


def test_an_environment_that_does_not_fit_the_checkpoint_is_refused(cloned, tmp_path, monkeypatch):
    from minidiff_fast.errors import InvalidArgument
    from minidiff_fast.finetuning import pusht

    real = pusht.PushTFactory
    monkeypatch.setattr(
        pusht, "PushTFactory", lambda shapes, variant: real(replace(shapes, n_obs_steps=2, horizon=8), variant)
    )
    with pytest.raises(InvalidArgument, match="observation 'keypoints'"):
        finetune_pusht(config(cloned, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_help_reads_well():
    done = subprocess.run(
        [sys.executable, "-c", "from minidiff_fast.cli import main; main(['finetune', 'pusht', '--help'])"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    for text in (
        "--checkpoint",
        "--algo {dppo,fpo,reinflow,awr}",
        "--flat-pairs",
        "--resume",
        "--target-kl",
        "--variant",
    ):
        assert text in done.stdout
    assert "torch" not in json.dumps(done.stderr)
