"""The options of a training run. Imports nothing heavy, so that a command line can show them at once."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

from minidiff_fast.tasks.pusht.policy import InvalidOption, PolicyConfig

DEFAULT_BUDGET = "20m"
"""Training time of a run that names neither a budget nor a number of steps."""

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
TRACKERS = ("tensorboard", "wandb", "trackio")


class Interval(NamedTuple):
    """How often something happens; exactly one of the two is set, or none for never."""

    steps: int | None
    """Every so many steps."""
    seconds: float | None
    """Every so many seconds of training time."""


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    With ``max_steps`` the learning rate is a function of the step, and a run is reproducible to the last
    bit: same options, CPU, number of threads and library versions, same losses, with an interruption and
    ``resume`` or without. With ``budget`` alone the learning rate follows the share of the time that is
    spent; then the order of the data, the noise and the initial weights are reproducible, and the losses are
    not to the last bit.
    """

    out: str = "runs/pusht"
    """Run folder: checkpoints, metrics.jsonl, logs. It must be empty or not exist, unless --resume."""
    data: str | None = None
    """.npz, zarr folder or .zip, LeRobot folder, lerobot/<name>. None: the package's demonstrations."""
    demo_episodes: int | None = None
    """Train on the first so many episodes of the data. None: all of them."""
    mirror: bool = False
    """Train on the mirror image of every episode, too: the task is symmetric about the goal's stem."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """The policy's shapes."""
    batch_size: int = 64
    """B, conditions per step (per process)."""
    l2_batch: int = 8
    """K, noised action samples per condition; the condition is encoded once for all of them."""
    l2_chunk: int | None = None
    """Samples per condition that run at once; less needs less memory. None: all K."""
    timesteps: Literal["iid", "stratified"] = "iid"
    """stratified: the K timesteps of a condition cover the schedule evenly, for a gradient of lower variance."""
    noise: Literal["iid", "antithetic"] = "iid"
    """antithetic: the samples of a condition come in pairs of opposite noise, for a gradient of lower variance."""
    budget: str | None = None
    """Training time (90s, 5m, 1h) without evaluations and checkpoints. 20m if --max-steps is not given."""
    max_steps: int | None = None
    """Optimiser steps; the learning rate then depends on the step alone, see above."""
    seed: int = 0
    """Of initial weights, data order, noise, timesteps and dropout."""
    lr: float = 1e-3
    """Peak learning rate of AdamW; cosine decay to 0."""
    weight_decay: float = 1e-3
    """Of the weights of linear and attention layers."""
    warmup_steps: int = 200
    """Steps over which the learning rate rises from 0."""
    ema_power: float = 0.75
    """The average of the weights keeps a share of 1 - (1 + step) ** -power a step, at most 0.9999."""
    grad_clip: float = 1.0
    """Largest norm of the gradient."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Precision of matrix products; fp16 needs a GPU."""
    eval_every: str = "auto"
    """How often to evaluate: 500 (steps), 2m (training time), none; auto is 5 times a run."""
    eval_episodes: int = 20
    """Episodes of these evaluations."""
    eval_seed: int = 200_000
    """First start of these evaluations, other starts than the 100000.. on which results are reported."""
    checkpoint_every: str = "2m"
    """How often to write a checkpoint: 500 (steps), 2m (training time), none; always at the end."""
    keep: int = 2
    """Checkpoints to keep, beside the best."""
    log: str = "tensorboard"
    """Trackers: some of tensorboard,wandb,trackio, or none. metrics.jsonl is always written."""
    log_every: int = 10
    """Steps between two entries of the log; the loss is their mean."""
    num_threads: int | None = None
    """Threads of torch on the CPU; None leaves torch's choice."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train. auto: a GPU if there is one."""
    resume: bool = False
    """Go on from the last checkpoint in the run folder."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        low: dict[str, float] = {
            "demo_episodes": 1, "batch_size": 1, "l2_batch": 1, "l2_chunk": 1, "max_steps": 1, "seed": 0,
            "warmup_steps": 0, "eval_episodes": 1, "eval_seed": 0, "keep": 1, "log_every": 1, "num_threads": 1,
            "weight_decay": 0.0, "ema_power": 0.0,
        }  # fmt: skip
        meaning = {"l2_batch": " (K, samples per condition)", "batch_size": " (B, conditions per step)"}
        for name, least in low.items():
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= least):
                raise InvalidOption(f"{_flag(name)}{meaning.get(name, '')} must be at least {least:g}, got {value}")
        for name in ("lr", "grad_clip"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0.0):
                raise InvalidOption(f"{_flag(name)} must be above 0, got {getattr(self, name)}")
        choices = {
            "mixed_precision": ("no", "fp16", "bf16"), "device": ("auto", "cpu", "cuda"),
            "timesteps": ("iid", "stratified"), "noise": ("iid", "antithetic"),
        }  # fmt: skip
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InvalidOption(f"{_flag(name)} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.seed >= 2**32:
            raise InvalidOption(f"--seed must be below 2**32, got {self.seed}")
        if not self.out.strip():
            raise InvalidOption("--out must name a folder, got an empty string")
        # Read once here, so that a wrong text is an error before any work.
        _ = self.budget_seconds, self.trackers
        parse_interval("--eval-every", self.eval_every)
        parse_interval("--checkpoint-every", self.checkpoint_every)

    @property
    def budget_seconds(self) -> float | None:
        """Training time in seconds; None where ``max_steps`` alone ends the run."""
        if self.budget is None or self.budget == "none":
            return None if self.max_steps is not None else parse_duration("--budget", DEFAULT_BUDGET)
        return parse_duration("--budget", self.budget)

    @property
    def trackers(self) -> tuple[str, ...]:
        """The trackers of ``log``."""
        names = tuple(name.strip() for name in self.log.split(",") if name.strip() not in ("", "none"))
        unknown = [name for name in names if name not in TRACKERS]
        if unknown:
            raise InvalidOption(
                f"--log must be none or some of {','.join(TRACKERS)} separated by commas, got {self.log!r}"
            )
        return names

    def interval(self, name: Literal["eval_every", "checkpoint_every"]) -> Interval:
        """How often to evaluate or write a checkpoint."""
        found = parse_interval(_flag(name), getattr(self, name))
        if found is not None:
            return found
        if self.max_steps is not None:
            return Interval(-(-self.max_steps // 5), None)
        return Interval(None, (self.budget_seconds or 0.0) / 5)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold; the policy is stored beside them."""
        values = asdict(self)
        del values["policy"]
        return values


RESUMABLE = frozenset(
    (
        "out", "data", "budget", "max_steps", "l2_chunk", "eval_every", "eval_episodes", "eval_seed",
        "checkpoint_every", "keep", "log", "log_every", "num_threads", "device", "resume", "progress",
    )
)  # fmt: skip
"""What may differ when a run is resumed; data and policy are compared by what they are, not by name."""


def parse_duration(name: str, text: str) -> float:
    """``90s``, ``5m``, ``1.5h`` -> seconds. Raises :class:`InvalidOption` for anything else or 0."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    seconds = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if seconds <= 0.0:
        raise InvalidOption(f"{name} must be a time above 0 such as 90s, 5m or 1h, got {text!r}")
    return seconds


def parse_interval(name: str, text: str) -> Interval | None:
    """``500`` -> steps, ``2m`` -> seconds, ``none`` -> never, ``auto`` -> None."""
    text = text.strip()
    if text == "auto":
        return None
    if text == "none":
        return Interval(None, None)
    if text.isdecimal() and int(text) > 0:
        return Interval(int(text), None)
    try:
        return Interval(None, parse_duration(name, text))
    except InvalidOption:
        raise InvalidOption(
            f"{name} must be a number of steps, a time such as 2m, auto or none, got {text!r}"
        ) from None


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
