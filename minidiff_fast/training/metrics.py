"""metrics.jsonl: one JSON object a line, what learning curves are drawn from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minidiff_fast.errors import RunFolderError, require
from minidiff_fast.training.config import TrainConfig

METRICS = "metrics.jsonl"
"""Rows of kind ``train``: step, seconds (training time so far), cpu_seconds (processor time in that), wall (with
evaluations and checkpoints), loss (mean since the row before), lr, grad_norm, conditions_per_second,
samples_per_second.
Rows of kind ``eval``: step, seconds, cpu_seconds, wall, score, score_interval, success_rate, episodes, eval_seconds."""


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of a run, in order; a last line that was cut off in the middle is left out.

    Raises:
        RunFolderError: the run has no metrics, or a line that is not the last cannot be read.
    """
    path = Path(folder) / METRICS
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be read ({error.strerror}); is {folder} a run folder?") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise RunFolderError(f"{path}: line {number} is not JSON ({error.msg})") from error
    return rows


class MetricsFile:
    """Appends rows to a run's metrics.

    Args:
        folder: the run folder.
        from_step: rows after this step are dropped, as a resumed run writes them anew.
    """

    def __init__(self, folder: Path, from_step: int = 0) -> None:
        path = folder / METRICS
        if path.exists():
            kept = [row for row in read_metrics(folder) if row["step"] <= from_step]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(_line(row) for row in kept), encoding="utf-8")
            os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row, at once."""
        self._file.write(_line(row))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class RunLog:
    """Where a run reports: metrics.jsonl, Accelerate's trackers, and a progress bar; on the main process
    only.

    Args:
        config: of the run; ``config.out`` exists.
        accelerator: with the trackers of ``config.trackers``.
        step: where the run starts; see :class:`MetricsFile`.
    """

    def __init__(self, config: TrainConfig, accelerator: Any, step: int) -> None:
        self._accelerator = accelerator
        self._tracked = bool(config.trackers)
        self._file = MetricsFile(Path(config.out), step) if accelerator.is_main_process else None
        if self._tracked:
            options = {**config.to_dict(), **vars(config.policy)}
            accelerator.init_trackers("pusht", {name: str(value) for name, value in options.items()})
        self._by_step = config.max_steps is not None
        self._bar = require("tqdm", extra="train").tqdm(
            total=config.max_steps if self._by_step else round(config.budget_seconds or 0.0),
            unit=" steps" if self._by_step else " s",
            desc="train",
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}{unit} [{elapsed}{postfix}]",
            disable=not (config.progress and accelerator.is_main_process),
        )

    def train(self, time: Mapping[str, float], **values: float | None) -> None:
        """A row of kind ``train``; ``time`` holds step, seconds, cpu_seconds, wall."""
        self._write("train", time, values)
        done = time["step"] if self._by_step else round(time["seconds"])
        self._bar.set_postfix_str(
            f"loss {values['loss']:.4f}, {values['conditions_per_second']:.0f} conditions/s, "
            f"{values['samples_per_second']:.0f} samples/s",
            refresh=False,
        )
        self._bar.update(min(done, self._bar.total) - self._bar.n if self._bar.total else 0)

    def evaluation(self, time: Mapping[str, float], **values: Any) -> None:
        """A row of kind ``eval``."""
        self._write("eval", time, values)
        low, high = values["score_interval"]
        if not self._bar.disable:
            self._bar.write(
                f"step {time['step']:.0f}, {time['seconds']:.0f} s of training: score {values['score']:.3f} "
                f"[{low:.2f}, {high:.2f}] over {values['episodes']} episodes"
            )

    def close(self) -> None:
        """End the trackers and close the file."""
        self._bar.close()
        if self._tracked:
            self._accelerator.end_training()
        if self._file is not None:
            self._file.close()

    def _write(self, kind: str, time: Mapping[str, float], values: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        self._file.write({"kind": kind, **time, **values})
        if self._tracked:
            numbers = {f"{kind}/{name}": v for name, v in values.items() if isinstance(v, (int, float))}
            self._accelerator.log({**numbers, "time/training": time["seconds"]}, step=int(time["step"]))


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"
