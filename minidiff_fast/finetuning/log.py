"""Where a fine-tuning run reports: metrics.jsonl, TensorBoard, a progress bar."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minidiff_fast.errors import require
from minidiff_fast.finetuning.config import FinetuneConfig
from minidiff_fast.training.metrics import MetricsFile

if TYPE_CHECKING:
    from minidiff_fast.finetuning.loop import IterationReport
    from minidiff_fast.tasks.pusht.evaluation import EvaluationResult


class FinetuneLog:
    """Rows of kind ``train`` (one an iteration) and ``eval`` in metrics.jsonl; the same numbers in TensorBoard.

    A ``train`` row has step (iterations), seconds (training time), wall, cpu_seconds, reward, episodes,
    episode_return, success, buffer_bytes, flat_buffer_bytes, the means of the update, and the counters of this
    iteration and in all (``total_``). An ``eval`` row has what those of ``minidiff-fast train`` have, and cpu_seconds.

    Args:
        config: of the run; ``config.out`` exists.
        step: iterations done; later rows of an interrupted run are dropped.
    """

    def __init__(self, config: FinetuneConfig, step: int) -> None:
        self._file = MetricsFile(Path(config.out), step)
        self._board: Any = None
        if config.log == "tensorboard":
            board = require("torch.utils.tensorboard", extra="train")
            self._board = board.SummaryWriter(str(Path(config.out) / "logs"), purge_step=step)
        self._by_iteration = config.max_iterations is not None
        self._bar = require("tqdm", extra="train").tqdm(
            total=config.max_iterations if self._by_iteration else round(config.budget_seconds or 0.0),
            unit=" iterations" if self._by_iteration else " s",
            initial=step if self._by_iteration else 0,
            desc=f"finetune {config.algo}",
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}{unit} [{elapsed}{postfix}]",
            disable=not config.progress,
        )

    def iteration(self, done: IterationReport, wall: float) -> None:
        """One iteration."""
        counted = {**done.counters.to_dict(), **{f"total_{n}": v for n, v in done.total.to_dict().items()}}
        self._write(
            "train",
            {"step": done.iteration, "seconds": done.seconds, "wall": wall, "cpu_seconds": done.cpu_seconds},
            {
                "reward": done.reward, "episodes": done.episodes, "episode_return": done.episode_return,
                "success": done.success, "buffer_bytes": done.buffer_bytes, "flat_buffer_bytes": done.flat_buffer_bytes,
                **done.stats, **counted,
            },
        )  # fmt: skip
        success = "" if done.success is None else f"success {done.success:.2f}, "
        self._bar.set_postfix_str(
            f"{success}reward {done.reward:.3f}, KL {done.stats.get('approx_kl', 0.0):.4f}, "
            f"{done.counters.env_steps} env steps, {done.counters.encoder_passes} encoder passes",
            refresh=False,
        )
        now = done.iteration if self._by_iteration else round(done.seconds)
        self._bar.update(min(now, self._bar.total) - self._bar.n if self._bar.total else 0)

    def evaluation(
        self, result: EvaluationResult, step: int, seconds: float, cpu_seconds: float, wall: float, took: float
    ) -> None:
        """One evaluation."""
        self._write(
            "eval",
            {"step": step, "seconds": seconds, "wall": wall, "cpu_seconds": cpu_seconds},
            {
                "score": result.mean_score, "score_interval": list(result.mean_score_interval),
                "success_rate": result.success_rate, "success_interval": list(result.success_rate_interval),
                "episodes": result.episodes, "eval_seconds": took,
            },
        )  # fmt: skip
        if not self._bar.disable:
            low, high = result.success_rate_interval
            self._bar.write(
                f"iteration {step}, {seconds:.0f} s of training: success {result.success_rate:.3f} "
                f"[{low:.2f}, {high:.2f}], score {result.mean_score:.3f} over {result.episodes} episodes"
            )

    def close(self) -> None:
        """Close bar, board and file."""
        self._bar.close()
        if self._board is not None:
            self._board.close()
        self._file.close()

    def _write(self, kind: str, time: dict[str, float], values: dict[str, Any]) -> None:
        finite = {n: v if not isinstance(v, float) or math.isfinite(v) else None for n, v in values.items()}
        self._file.write({"kind": kind, **time, **finite})
        if self._board is not None:
            for name, value in finite.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(f"{kind}/{name}", value, int(time["step"]))
