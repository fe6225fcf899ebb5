"""metrics.jsonl: one JSON object a line, what learning curves are drawn from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minidiff_fast.errors import RunFolderError

METRICS = "metrics.jsonl"
"""Rows of kind ``train``: step, seconds (training time so far), wall (with evaluations and checkpoints), loss (mean
since the row before), lr, grad_norm, conditions_per_second, samples_per_second.
Rows of kind ``eval``: step, seconds, wall, score, score_interval, success_rate, episodes, eval_seconds."""


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of a run, in order; a last line that was cut off in the middle is left out.

    Raises:
        RunFolderError: the run has no metrics, or a line that is not the last cannot be read.
    """
    path = Path(folder) / METRICS
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise RunFolderError(
            f"{path}: cannot be read ({error.strerror}); is {folder} a run folder?"
        ) from error
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


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"
