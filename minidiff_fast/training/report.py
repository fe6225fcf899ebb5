"""Learning curves, a one-page report of a run, and runs compared, from the files of run folders."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from minidiff_fast.errors import RunFolderError, require
from minidiff_fast.training.metrics import read_metrics

EVALUATION = "evaluation.json"
"""The result of the final evaluation in a run folder, ``EvaluationResult.to_dict()`` and what was
evaluated."""
CONTACT_SHEET = "contact_sheet.png"
CURVES, REPORT_PNG, REPORT_MD = "curves.png", "report.png", "report.md"

_OPTIONS = (
    "algo", "checkpoint", "variant", "envs", "chunk_steps", "epochs", "critic_epochs", "gamma", "clip", "min_std",
    "flat_pairs", "batch_size", "l2_batch", "lr", "budget", "max_steps", "max_iterations", "seed", "data",
    "demo_episodes", "mirror",
)  # fmt: skip
_SHAPES = ("obs", "prediction", "denoiser", "horizon", "n_action_steps", "num_inference_steps")


def learning_curves(run: str | Path, path: str | Path | None = None) -> Path:
    """Draw a run's loss over steps and its score over wall-clock time as a .png (default: ``curves.png`` in
    it).

    Raises:
        RunFolderError: the run has no metrics or the picture cannot be written.
        MissingDependency: matplotlib is not installed.
    """
    rows = read_metrics(run)
    figure, (left, right) = _figure(1, 2, (10.0, 3.6))
    _draw_loss(left, rows)
    _draw_score(right, rows, label=None)
    return _save(figure, Path(path) if path is not None else Path(run) / CURVES)


def compare(runs: Sequence[str | Path], path: str | Path) -> Path:
    """Draw the score over wall-clock time (and its 95 % interval) of several runs in one .png.

    Raises:
        RunFolderError: a run has no evaluation, or the picture cannot be written.
    """
    figure, (axes,) = _figure(1, 1, (7.0, 4.5))
    for run in runs:
        rows = read_metrics(run)
        if not any(row["kind"] == "eval" for row in rows):
            raise RunFolderError(f"{run}: metrics.jsonl has no evaluation to draw (--eval-every none?)")
        _draw_score(axes, rows, label=Path(run).name)
    axes.legend(fontsize=8)
    return _save(figure, Path(path))


def write_report(run: str | Path) -> tuple[Path, Path]:
    """Write ``report.md`` and ``report.png``: options, score with its interval, speed, curves, contact sheet.

    Reads metrics.jsonl, the last checkpoint's config.json, and evaluation.json and contact_sheet.png if
    there are.

    Returns:
        The paths of ``report.md`` and ``report.png``.

    Raises:
        RunFolderError: the run has no metrics, or a file cannot be written.
        CheckpointError: the run has no checkpoint.
    """
    from minidiff_fast.training.checkpoint import find_checkpoint, read_info

    folder = Path(run)
    rows = read_metrics(folder)
    info = read_info(find_checkpoint(folder))
    result = _read_evaluation(folder)
    facts = _facts(rows, result)
    options = {name: getattr(info.policy, name) for name in _SHAPES}
    options.update({name: info.train.get(name) for name in _OPTIONS if info.train.get(name) is not None})
    png = _draw_report(folder, rows, facts, options)
    curves = learning_curves(folder)
    lines = [f"# {folder.resolve().name}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in {**facts, **options}.items()]
    lines += ["", f"![learning curves]({curves.name})"]
    if (folder / CONTACT_SHEET).is_file():
        lines += ["", f"![episodes]({CONTACT_SHEET})"]
    markdown = folder / REPORT_MD
    _write(markdown, lambda temporary: _write_text(temporary, "\n".join(lines) + "\n"))
    return markdown, png


def write_evaluation(run: str | Path, result: dict[str, Any]) -> Path:
    """Write ``evaluation.json`` into a run folder."""
    path = Path(run) / EVALUATION
    _write(path, lambda temporary: _write_text(temporary, json.dumps(result, indent=2) + "\n"))
    return path


def _read_evaluation(folder: Path) -> dict[str, Any] | None:
    path = folder / EVALUATION
    if not path.is_file():
        return None
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunFolderError(f"{path}: is not JSON ({error})") from error
    return values


def _facts(rows: Sequence[dict[str, Any]], result: dict[str, Any] | None) -> dict[str, str]:
    steps = [row for row in rows if row["kind"] == "train"]
    scores = [row for row in rows if row["kind"] == "eval"]
    facts: dict[str, str] = {}
    if result is not None:
        low, high = result["mean_score_interval"]
        facts["mean score"] = f"{result['mean_score']:.3f} [{low:.3f}, {high:.3f}]"
        low, high = result["success_rate_interval"]
        facts["success rate"] = f"{result['success_rate']:.2f} [{low:.2f}, {high:.2f}]"
        seeds = [entry["seed"] for entry in result["per_seed"]]
        facts["episodes"] = f"{result['episodes']} (seeds {seeds[0]} to {seeds[-1]})"
    elif scores:
        low, high = scores[-1]["score_interval"]
        facts["mean score"] = f"{scores[-1]['score']:.3f} [{low:.3f}, {high:.3f}] ({scores[-1]['episodes']} episodes)"
    if steps and "encoder_passes" in steps[-1]:
        return {**facts, **_finetuning_facts(steps[-1])}
    if steps:
        last = steps[-1]
        facts["steps"] = str(last["step"])
        facts["training time"] = f"{last['seconds']:.0f} s ({last['wall']:.0f} s with evaluations)"
        facts["loss"] = f"{last['loss']:.5f}"
        for name in ("conditions", "samples"):
            speed = sorted(row[f"{name}_per_second"] for row in steps)[len(steps) // 2]
            facts[f"{name}/s"] = f"{speed:.0f} (median)"
    return facts


def _finetuning_facts(last: dict[str, Any]) -> dict[str, str]:
    facts = {
        "iterations": str(last["step"]),
        "training time": f"{last['seconds']:.0f} s ({last['wall']:.0f} s with evaluations)",
        "processor time": f"{last['cpu_seconds']:.0f} s",
    }
    names = {
        "total_env_steps": "environment steps", "total_encoder_passes": "encoder passes",
        "total_denoiser_rows": "denoiser rows", "total_restarts": "restarted environments",
    }  # fmt: skip
    return {**facts, **{text: f"{last[name]:,}" for name, text in names.items()}}


def _draw_report(folder: Path, rows: Sequence[dict[str, Any]], facts: dict[str, str], options: dict[str, Any]) -> Path:
    image = require("matplotlib.image", extra="train")
    sheet = folder / CONTACT_SHEET
    picture = image.imread(sheet) if sheet.is_file() else None
    below = 0.0 if picture is None else 10.0 * picture.shape[0] / picture.shape[1]
    above = 0.4 + 0.135 * max(len(facts), len(options))  # inches; a line of text each
    figure = _new_figure((10.0, above + 3.6 + below))
    grid = figure.add_gridspec(3 if below else 2, 2, height_ratios=[above, 3.6, *([below] if below else [])])
    for column, (title, table) in enumerate((("result", facts), ("options", options))):
        axes = figure.add_subplot(grid[0, column])
        axes.axis("off")
        text = "\n".join(f"{name:<22} {_end_of(str(value), 36)}" for name, value in table.items())
        axes.text(0.0, 1.0, text, family="monospace", fontsize=8, va="top")
        axes.set_title(f"{folder.resolve().name}: {title}", loc="left", fontsize=10)
    _draw_loss(figure.add_subplot(grid[1, 0]), rows)
    _draw_score(figure.add_subplot(grid[1, 1]), rows, label=None)
    if picture is not None:
        axes = figure.add_subplot(grid[2, :])
        axes.imshow(picture)
        axes.axis("off")
    return _save(figure, folder / REPORT_PNG)


def _end_of(text: str, width: int) -> str:
    """
    >>> _end_of("/a/long/path/runs/bc-1", 12), _end_of("runs/bc-1", 12)
    ('...runs/bc-1', 'runs/bc-1')
    """
    return text if len(text) <= width else f"...{text[3 - width :]}"


def _draw_loss(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    steps = [row for row in rows if row["kind"] == "train"]
    if steps and "encoder_passes" in steps[-1]:  # fine-tuning has no loss that falls
        axes.plot([row["step"] for row in steps], [row["reward"] for row in steps], linewidth=0.8)
        axes.set(xlabel="iteration", ylabel="mean reward of a decision", title="training reward")
        axes.grid(alpha=0.3)
        return
    axes.plot([row["step"] for row in steps], [row["loss"] for row in steps], linewidth=0.8)
    axes.set(xlabel="step", ylabel="loss", title="training loss")
    if steps:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)


def _draw_score(axes: Any, rows: Sequence[dict[str, Any]], label: str | None) -> None:
    scores = [row for row in rows if row["kind"] == "eval"]
    if not scores:
        axes.text(0.5, 0.5, "no evaluation on the way", transform=axes.transAxes, ha="center", va="center")
    minutes = [row["wall"] / 60.0 for row in scores]
    lines = axes.plot(minutes, [row["score"] for row in scores], marker="o", markersize=3, label=label)
    low = [row["score_interval"][0] for row in scores]
    high = [row["score_interval"][1] for row in scores]
    axes.fill_between(minutes, low, high, alpha=0.15, color=lines[0].get_color())
    axes.set(xlabel="wall-clock, minutes", ylabel="mean score", title="score (95 % interval)")
    axes.set_ylim(0.0, 1.0)
    axes.grid(alpha=0.3)


def _figure(height: int, width: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    figure = _new_figure(size)
    return figure, list(figure.subplots(height, width, squeeze=False).flat)


def _new_figure(size: tuple[float, float]) -> Any:
    # A figure without pyplot's state needs no display and is freed with its last reference.
    return require("matplotlib.figure", extra="train").Figure(figsize=size, layout="constrained")


def _save(figure: Any, path: Path) -> Path:
    _write(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    return path


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _write(path: Path, write: Callable[[Path], None]) -> None:
    """Write beside ``path`` and move there; a report of the same run is replaced."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)
