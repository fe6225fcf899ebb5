"""What surrounds the steps: accelerator, random generators, threads, signals, when something is due."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from minidiff_fast.errors import InvalidArgument, require
from minidiff_fast.training.config import Interval, TrainConfig


class Interrupted(KeyboardInterrupt):
    """A signal ended the run after a step; a checkpoint was written."""

    def __init__(self, signum: int, saved: Path) -> None:
        super().__init__(f"interrupted; checkpoint: {saved}")
        self.signum, self.saved = signum, saved


class Due:
    """Says when an interval has passed, in steps or in training time."""

    def __init__(self, interval: Interval, step: int, seconds: float) -> None:
        self.interval, self.last = interval, -1  # step at which it was last due
        self.ticks = self._ticks(step, seconds)

    @property
    def never(self) -> bool:
        return self.interval == Interval(None, None)

    def due(self, step: int, seconds: float) -> bool:
        ticks = self._ticks(step, seconds)
        if ticks == self.ticks:
            return False
        self.ticks, self.last = ticks, step
        return True

    def _ticks(self, step: int, seconds: float) -> int:
        if self.interval.steps is not None:
            return step // self.interval.steps
        return 0 if self.interval.seconds is None else int(seconds / self.interval.seconds)


class Abandoned(KeyboardInterrupt):
    """A second Ctrl-C: the run ends at once, in the middle of a step, and nothing is saved."""


class Signals:
    """Turns Ctrl-C and SIGTERM into a KeyboardInterrupt between two steps; a second one acts at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}
        self._immediate = False

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before[signum] = signal.signal(signum, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise Abandoned
        self.received = signum
        if self._immediate:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def immediate(self) -> Iterator[None]:
        """Inside, a signal acts at once: for what changes no state and takes long."""
        self._immediate = True
        try:
            self.check()  # one may have come just before
            yield
        finally:
            self._immediate = False

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal has come."""
        if self.received is not None:
            raise KeyboardInterrupt


def choose_device(config: TrainConfig) -> torch.device:
    """Where the run trains. Raises :class:`InvalidArgument` if that cannot be."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise InvalidArgument("--device cuda: torch sees no GPU here; use --device cpu")
    on_cpu = config.device == "cpu" or not torch.cuda.is_available()
    if config.mixed_precision == "fp16" and on_cpu:
        raise InvalidArgument("--mixed-precision fp16 needs a GPU; on the CPU use bf16 or no")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))  # set by accelerate launch and torchrun
    return torch.device("cpu") if on_cpu else torch.device("cuda", local_rank)


def build_accelerator(config: TrainConfig) -> Any:
    """The Accelerator of a run.

    Accelerate keeps one state a process and refuses another configuration; two runs one after the other in
    one process are fine here, as long as they are not distributed.
    """
    accelerate = require("accelerate", extra="train")
    state = accelerate.state
    if state.PartialState._shared_state and not state.PartialState().use_distributed:
        state.AcceleratorState._reset_state(reset_partial_state=True)
    folders = accelerate.utils.ProjectConfiguration(project_dir=config.out, logging_dir=f"{config.out}/logs")
    return accelerate.Accelerator(
        mixed_precision=config.mixed_precision,
        cpu=choose_device(config).type == "cpu",
        log_with=list(config.trackers) or None,
        project_config=folders,
    )


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch (every device)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """The global generators, in types that ``torch.load(weights_only=True)`` reads."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def gather(accelerator: Any, value: Any) -> list[Any]:
    """One value of each process, in order."""
    if accelerator.num_processes == 1:
        return [value]
    from accelerate.utils import gather_object

    gathered: list[Any] = gather_object([value])
    return gathered


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def determinism(device: torch.device) -> Iterator[None]:
    """Deterministic algorithms for a run on the CPU; on a GPU the faster ones stay."""
    switches: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), switches.fill_uninitialized_memory
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        switches.fill_uninitialized_memory = False  # costs time, and nothing here reads such memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        switches.fill_uninitialized_memory = before[1]
