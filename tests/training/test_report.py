"""Curves and reports come from the files of a run folder alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minidiff_fast.errors import CheckpointError, RunFolderError
from minidiff_fast.nn.normalizer import MinMaxNormalizer
from minidiff_fast.tasks.pusht.policy import PolicyConfig, build_policy
from minidiff_fast.training import report
from minidiff_fast.training.checkpoint import CheckpointStore
from minidiff_fast.training.config import TrainConfig
from minidiff_fast.training.metrics import MetricsFile, read_metrics

pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")
image = pytest.importorskip("PIL.Image")

TINY = PolicyConfig(encoder_width=8, encoder_blocks=1, hidden_dim=16, n_blocks=1)


def train_row(step: int) -> dict[str, Any]:
    return {
        "kind": "train", "step": step, "seconds": step / 10, "wall": step / 8, "loss": 1.0 / step, "lr": 1e-3,
        "grad_norm": 1.0, "conditions_per_second": 100.0 * step, "samples_per_second": 800.0 * step,
    }  # fmt: skip


def eval_row(step: int, score: float) -> dict[str, Any]:
    return {
        "kind": "eval", "step": step, "seconds": step / 10, "wall": step / 8 + 1, "score": score,
        "score_interval": [score - 0.1, score + 0.1], "success_rate": 0.2, "episodes": 20, "eval_seconds": 1.0,
    }  # fmt: skip


RESULT = {
    "obs": "keypoints", "episodes": 2, "max_steps": 300, "mean_score": 0.8125,
    "mean_score_interval": [0.7, 0.9], "success_rate": 0.5, "success_rate_interval": [0.1, 0.9],
    "per_seed": [{"seed": 100000, "score": 0.8}, {"seed": 100001, "score": 0.825}],
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "my_run"
    channels = {"keypoints": MinMaxNormalizer(torch.zeros(20), torch.ones(20))}
    weights = build_policy(TINY, channels, MinMaxNormalizer(torch.zeros(2), torch.ones(2))).state_dict()
    CheckpointStore(folder).save(
        30, policy=TINY, train=TrainConfig(max_steps=30).to_dict(), model=weights, ema=weights, state={}
    )
    metrics = MetricsFile(folder)
    for row in (train_row(10), eval_row(10, 0.2), train_row(20), train_row(30), eval_row(30, 0.6)):
        metrics.write(row)
    metrics.close()
    return folder


def size(path: Path) -> tuple[int, int]:
    with image.open(path) as picture:
        assert picture.format == "PNG"
        return picture.size  # type: ignore[no-any-return]


def test_report_of_a_run(run: Path) -> None:
    markdown, picture = report.write_report(run)
    text = markdown.read_text()
    assert "# my_run" in text
    assert "| mean score | 0.600 [0.500, 0.700] (20 episodes) |" in text
    assert "| steps | 30 |" in text
    assert "| conditions/s | 2000 (median) |" in text
    assert "| samples/s | 16000 (median) |" in text
    assert "| l2_batch | 8 |" in text
    assert size(picture)[0] > 500
    assert (run / "curves.png").is_file()
    assert not [path for path in run.iterdir() if path.name.endswith(".tmp")]


def test_the_final_evaluation_and_the_contact_sheet_are_in_it(run: Path) -> None:
    plain = size(report.write_report(run)[1])
    report.write_evaluation(run, RESULT)
    image.new("RGB", (300, 200), "red").save(run / report.CONTACT_SHEET)
    markdown, picture = report.write_report(run)
    text = markdown.read_text()
    assert "| mean score | 0.812 [0.700, 0.900] |" in text
    assert "| success rate | 0.50 [0.10, 0.90] |" in text
    assert "seeds 100000 to 100001" in text
    assert "contact_sheet.png" in text
    assert size(picture)[1] > plain[1]


def test_runs_compared(run: Path, tmp_path: Path) -> None:
    path = report.compare([run, run], tmp_path / "both.png")
    assert size(path)[0] > 300


def test_a_run_without_evaluations(run: Path, tmp_path: Path) -> None:
    metrics = run / "metrics.jsonl"
    rows = [line for line in metrics.read_text().splitlines() if json.loads(line)["kind"] != "eval"]
    metrics.write_text("\n".join(rows) + "\n")
    markdown, picture = report.write_report(run)
    assert "mean score" not in markdown.read_text()
    assert size(picture)[0] > 500
    with pytest.raises(RunFolderError, match="my_run: metrics.jsonl has no evaluation"):
        report.compare([run], tmp_path / "both.png")
    assert not (tmp_path / "both.png").exists()


def test_what_is_not_a_run(tmp_path: Path, run: Path) -> None:
    with pytest.raises(RunFolderError, match="is .* a run folder"):
        report.write_report(tmp_path)
    (run / report.EVALUATION).write_text("{")
    with pytest.raises(RunFolderError, match="is not JSON"):
        report.write_report(run)
    (run / report.EVALUATION).unlink()
    (run / "checkpoints" / "last").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint"):
        report.write_report(run)


def test_metrics_survive_a_cut_and_a_resume(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path)
    for step in (1, 2, 3):
        metrics.write(train_row(step))
    metrics.close()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"kind": "tr')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    resumed = MetricsFile(tmp_path, from_step=2)
    resumed.write(train_row(3))
    resumed.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    assert all(json.loads(line) for line in path.read_text().splitlines())
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "damaged", lines[2]]))
    with pytest.raises(RunFolderError, match="line 2 is not JSON"):
        read_metrics(tmp_path)
