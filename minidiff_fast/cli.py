"""The command ``minidiff-fast``: train, finetune, eval, demos, demo, report, doctor.

Everything heavy is imported by the command that needs it. A :class:`~minidiff_fast.errors.MinidiffFastError`
becomes one line on stderr and exit code 2; Ctrl-C saves a checkpoint and exits with 130.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from minidiff_fast._version import __version__
from minidiff_fast.errors import (
    InvalidArgument,
    MinidiffFastError,
    MissingDependency,
    RunFolderError,
    require,
)
from minidiff_fast.finetuning.config import FinetuneConfig
from minidiff_fast.tasks.pusht.policy import PolicyConfig
from minidiff_fast.training.config import TrainConfig

if TYPE_CHECKING:
    from minidiff_fast.tasks.pusht.evaluation import EvaluationResult


@dataclass(frozen=True)
class EvalConfig:
    """Evaluate a checkpoint on unseen starts."""

    checkpoint: str
    """A checkpoint folder, or a run folder (then see --which)."""
    episodes: int = 50
    """Number of starts."""
    seed: int = 100_000
    """Seed of the first start."""
    which: Literal["last", "best"] = "last"
    """Of a run folder. best was chosen by the evaluations during training, on other starts."""
    weights: Literal["ema", "model"] = "ema"
    """The averaged weights, or those of the last step."""
    obs: Literal["state", "keypoints", "image"] | None = None
    """Fail if the checkpoint was trained on another observation kind."""
    num_inference_steps: int | None = None
    """Denoising steps, in place of the checkpoint's."""
    sampler: Literal["scheduler", "deterministic", "stochastic"] = "scheduler"
    """scheduler: as after imitation. deterministic, stochastic: as in fine-tuning, without and with noise."""
    min_std: float = 0.04
    """Least standard deviation of the stochastic sampler, in normalised actions; finetune's option of that name."""
    variant: Literal["stock", "time-limit", "near-goal"] = "stock"
    """Starts and length of the episodes: cut early, or from near the goal."""
    max_steps: int | None = None
    """Longest episode, steps of 0.1 s; default: the variant's, 300 for stock and 100 for the others."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the policy runs."""
    num_threads: int | None = None
    """Threads of torch on the CPU."""
    video: str | None = None
    """Also write the first --record episodes, one after the other, as .mp4 or .gif."""
    record: int = 4
    """Episodes of the video."""
    json: str | None = None
    """Also write the result, with the score of every start, to this file."""
    progress: bool = True
    """Show a progress bar."""


@dataclass(frozen=True)
class DemosConfig:
    """Make demonstrations with the scripted expert."""

    out: str = "pusht_demos.npz"
    """File to write, .npz; must not exist."""
    episodes: int = 200
    """Solved episodes to write, from the environment's own starts."""
    disturbed: int = 0
    """Further solved episodes, from starts where random pushes have moved the block to."""
    seed: int = 0
    """First start; evaluation uses 100000 and up."""
    workers: int = 1
    """Processes."""
    max_steps: int = 300
    """Longest episode, steps of 0.1 s."""
    progress: bool = True
    """Show a progress bar."""


@dataclass(frozen=True)
class DemoConfig:
    """Train on the demonstrations of the package, evaluate on unseen starts, write report and video."""

    out: str = "runs/demo"
    """Run folder; must be empty or not exist."""
    budget: str = "5m"
    """Training time."""
    max_steps: int | None = None
    """Optimiser steps instead of a time; the run is then reproducible to the last bit."""
    obs: Literal["state", "keypoints"] = "keypoints"
    """What the policy sees."""
    episodes: int = 50
    """Unseen starts of the evaluation, seeds 100000 and up."""
    seed: int = 0
    """Of everything random in training."""
    num_threads: int | None = 2
    """Threads of torch on the CPU; the model is too small for many."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""
    progress: bool = True
    """Show progress bars."""


@dataclass(frozen=True)
class ReportConfig:
    """Write report.md and report.png into a run folder; with several, compare their scores in one picture."""

    runs: tuple[str, ...]
    """Run folders."""
    out: str = "comparison.png"
    """The picture that compares several runs; must not exist."""


USAGE = """\
usage: minidiff-fast COMMAND [OPTIONS]      minidiff-fast COMMAND --help for the options

two-level minibatching for diffusion policies

  train pusht     train a policy: --data, --obs, --l2-batch K, --batch-size B, --budget 20m, --out, --resume
  finetune pusht  fine-tune a policy by reinforcement learning: --checkpoint, --algo dppo, --budget 10m, --out, --resume
  eval pusht      evaluate a checkpoint on unseen starts: --checkpoint, --episodes, --seed, --video
  demos pusht     make demonstrations with the scripted expert: --episodes, --seed, --out, --workers
  demo            train on the demonstrations of the package, evaluate, report, video: --out, --budget
  report          report.md and report.png of a run folder; several run folders: compare their scores
  doctor          versions, devices, and which implementation of each operation runs here
  --version
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Read when torch loads. Threads that spin at a barrier make a step of a small model tens of times slower as
    # soon as something else runs on the same cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return _run(arguments)
    except MinidiffFastError as error:
        print(f"minidiff-fast: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:  # a path that cannot be read or written; whatever was there is still there
        print(f"minidiff-fast: error: {error.filename or 'file'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"minidiff-fast: {interrupt if str(interrupt) else 'interrupted'}", file=sys.stderr)
        return 128 + int(getattr(interrupt, "signum", 2))


def _run(arguments: list[str]) -> int:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("--help", "-h", "help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    if command in ("--version", "-V"):
        print(__version__)
        return 0
    if command == "doctor":
        if rest not in ([], ["--help"], ["-h"]):
            raise InvalidArgument(f"doctor takes no options, got {' '.join(rest)}")
        print("usage: minidiff-fast doctor" if rest else "\n".join(doctor_lines()))
        return 0
    with_task: dict[str, tuple[type, Callable[..., int]]] = {
        "train": (TrainConfig, run_train),
        "finetune": (FinetuneConfig, run_finetune),
        "eval": (EvalConfig, run_eval),
        "demos": (DemosConfig, run_demos),
    }
    plain: dict[str, tuple[type, Callable[..., int]]] = {
        "demo": (DemoConfig, run_demo),
        "report": (ReportConfig, run_report),
    }
    name = command
    if command in with_task:
        if not rest or rest[0] not in ("pusht", "--help", "-h"):
            raise InvalidArgument(f"{command}: the task must be pusht, got {rest[0] if rest else 'nothing'}")
        name, rest = f"{command} pusht", rest[1:] if rest[0] == "pusht" else rest
    elif command not in plain:
        known = ", ".join([*with_task, *plain, "doctor"])
        raise InvalidArgument(f"the command must be one of {known}, got {command!r}")
    kind, function = {**with_task, **plain}[command]
    tyro = require("tyro", extra="train")
    settings = [tyro.conf.OmitArgPrefixes]
    if kind is ReportConfig:
        settings.append(tyro.conf.PositionalRequiredArgs)
    return function(tyro.cli(kind, prog=f"minidiff-fast {name}", args=rest, config=settings))


def run_train(config: TrainConfig) -> int:
    """Train, then print where the run is."""
    from minidiff_fast.training.pusht import train_pusht

    result = train_pusht(config)
    best = "" if result.best_score is None else f", best score on the way {result.best_score:.3f}"
    print(f"{result.step} steps in {result.seconds:.0f} s of training ({result.wall:.0f} s in all){best}")
    print(f"checkpoint: {result.checkpoint}")
    return 0


def run_finetune(config: FinetuneConfig) -> int:
    """Fine-tune, then print what it took and where the run is."""
    from minidiff_fast.finetuning.pusht import finetune_pusht

    result = finetune_pusht(config)
    total = result.total
    print(
        f"{result.iterations} iterations in {result.seconds:.0f} s of training ({result.cpu_seconds:.0f} s of CPU): "
        f"{total.env_steps} environment steps, {total.encoder_passes} encoder passes, {total.denoiser_rows} denoiser "
        f"rows, {total.restarts} restarts"
    )
    options = f"--checkpoint {config.out} --sampler stochastic --min-std {config.min_std:g} --variant {config.variant}"
    if not result.reports:
        print(f"nothing to do: the run is at iteration {result.iterations}")
    else:
        last = result.reports[-1]
        print(
            f"a rollout holds {last.buffer_bytes / 1e6:.1f} MB, each observation once; with one for every sample "
            f"{last.flat_buffer_bytes / 1e6:.1f} MB"
        )
    if result.iterations <= config.critic_warmup:
        print(
            f"the policy is as it was: --critic-warmup {config.critic_warmup} iterations train the value function alone"
        )
    print(f"run: {config.out}; score it: minidiff-fast eval pusht {options}")
    return 0


def run_eval(config: EvalConfig) -> int:
    """Evaluate, print the score, write what was asked for."""
    for name, path, suffixes in (
        ("--video", config.video, (".mp4", ".gif")),
        ("--json", config.json, (".json",)),
    ):
        if path is not None:
            _check_new_file(name, Path(path), suffixes)
    if config.video is not None:
        require("imageio_ffmpeg" if config.video.endswith(".mp4") else "PIL", extra="pusht")
    if config.record < 1:
        raise InvalidArgument(f"--record must be at least 1, got {config.record}")
    if config.num_threads is not None and config.num_threads < 1:
        raise InvalidArgument(f"--num-threads must be at least 1, got {config.num_threads}")
    if not 0.0 <= config.min_std < 1.0:
        raise InvalidArgument(f"--min-std must be in [0, 1), got {config.min_std}")
    from minidiff_fast.training.pusht import evaluate_checkpoint

    result = evaluate_checkpoint(
        config.checkpoint,
        which=config.which,
        weights=config.weights,
        obs=config.obs,
        num_inference_steps=config.num_inference_steps,
        sampler=config.sampler,
        min_std=config.min_std,
        episodes=config.episodes,
        seed=config.seed,
        device=_device(config.device, config.num_threads),
        progress=config.progress,
        record=min(config.record, config.episodes) if config.video is not None else 0,
        max_steps=config.max_steps,
        variant=config.variant,
    )
    print(_sentence(result))
    if config.json is not None:
        import json

        target = Path(config.json)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"checkpoint": config.checkpoint, **result.to_dict()}, indent=2)
        temporary = target.with_suffix(".tmp")
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, target)
        print(f"result: {config.json}")
    if config.video is not None:
        import numpy as np

        from minidiff_fast.tasks.pusht.video import write_video

        print(f"video: {write_video(np.concatenate(result.frames), config.video)}")
    return 0


def run_demos(config: DemosConfig) -> int:
    """Make demonstrations."""
    require("gym_pusht", extra="pusht")
    from minidiff_fast.tasks.pusht.demos import generate_demos

    report = generate_demos(
        config.episodes,
        config.seed,
        config.out,
        config.workers,
        config.progress,
        disturbed=config.disturbed,
        max_steps=config.max_steps,
    )
    print(f"{report.path}: {report.episodes} episodes, {report.steps} steps; {report.attempted} starts tried")
    return 0


def run_demo(config: DemoConfig) -> int:
    """Train, evaluate, and write report, curves, contact sheet and video into the run folder."""
    if config.episodes < 1:
        raise InvalidArgument(f"--episodes must be at least 1, got {config.episodes}")
    for module in ("gym_pusht", "PIL"):
        require(module, extra="pusht")
    require("matplotlib", extra="train")
    train = TrainConfig(
        out=config.out,
        policy=PolicyConfig(obs=config.obs),
        budget=None if config.max_steps is not None else config.budget,
        max_steps=config.max_steps,
        seed=config.seed,
        num_threads=config.num_threads,
        device=config.device,
        progress=config.progress,
        eval_episodes=min(20, config.episodes),
    )
    from minidiff_fast.training.pusht import evaluate_checkpoint, train_pusht

    trained = train_pusht(train)
    record = min(6, config.episodes)
    result = evaluate_checkpoint(
        trained.checkpoint,
        episodes=config.episodes,
        device=_device(config.device, config.num_threads),
        progress=config.progress,
        record=record,
    )
    _write_demo(Path(config.out), result)
    print(_sentence(result))
    print(f"report: {Path(config.out) / 'report.md'}")
    return 0


def run_report(config: ReportConfig) -> int:
    """Report one run, or compare several."""
    from minidiff_fast.training import report

    if not config.runs:
        raise InvalidArgument("report: name at least one run folder")
    if len(config.runs) == 1:
        markdown, picture = report.write_report(config.runs[0])
        print(f"report: {markdown}, {picture}")
        return 0
    _check_new_file("--out", Path(config.out), (".png",))
    print(f"comparison: {report.compare(config.runs, config.out)}")
    return 0


def doctor_lines() -> list[str]:
    """Versions, devices, and per operation which implementation runs and why the others do not."""
    import importlib
    import pkgutil
    import platform

    import torch

    from minidiff_fast import backend, native, ops

    lines = [f"minidiff_fast {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    for package in _PACKAGES:
        lines.append(f"  {package:<16} {backend.version(package) or 'not installed'}")
    lines.append(f"CPU: {torch.get_num_threads()} threads of torch, {os.cpu_count()} processors")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(f"cuda:{index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.is_available():
        lines.append("CUDA: torch sees no GPU")
    library = native.build_info()
    if library["available"]:
        cuda = library["cuda"]["architectures"] if library["cuda"]["compiled"] else "none"
        lines.append(f"native library: {library['path']} ({library['compiler']}; CUDA architectures: {cuda})")
    else:
        lines.append(f"native library: not available: {library['reason']}")
    for module in pkgutil.iter_modules(ops.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"{ops.__name__}.{module.name}")
    override = os.environ.get(backend.ENVIRONMENT_VARIABLE)
    if override:
        lines.append(f"{backend.ENVIRONMENT_VARIABLE}={override} replaces impl='auto'")
    for name, operation in sorted(backend.REGISTRY.items()):
        lines.append(f"operation {name}:")
        for device in ("cpu", "cuda"):
            lines += _operation_lines(operation, device)
    return lines


_PACKAGES = (
    "torch", "triton", "numpy", "einops", "diffusers", "accelerate", "tyro", "tqdm", "safetensors",
    "tensorboard", "matplotlib", "gymnasium", "gym-pusht", "pymunk", "zarr", "imageio-ffmpeg",
    "transformers", "flash-attn",
)  # fmt: skip


def _operation_lines(operation: Any, kind: str) -> list[str]:
    import torch

    from minidiff_fast import backend

    device, dtype = torch.device(kind), torch.float32
    if kind == "cuda" and not torch.cuda.is_available():
        return ["  cuda tensors: no GPU here"]
    try:
        lines = [f"  {kind} tensors: {backend.resolve(operation, None, device, dtype)}"]
    except MinidiffFastError as error:
        lines = [f"  {kind} tensors: none: {error}"]
    for impl in ("triton", "native", "flash"):
        reason = backend.why_not(operation, impl, device, dtype)
        lines.append(f"    {impl:<8} {'can run' if reason is None else reason}")
    return lines


def _write_demo(folder: Path, result: EvaluationResult) -> None:
    import numpy as np

    from minidiff_fast.tasks.pusht.video import contact_sheet, write_video
    from minidiff_fast.training import report

    report.write_evaluation(folder, result.to_dict())
    frames = result.frames
    contact_sheet(frames, result.scores[: len(frames)], folder / report.CONTACT_SHEET)
    try:
        require("imageio_ffmpeg", extra="pusht")
        video = folder / "rollout.mp4"
    except MissingDependency as missing:
        print(f"minidiff-fast: a .gif instead of a .mp4: {missing}", file=sys.stderr)
        video = folder / "rollout.gif"
    write_video(np.concatenate(frames), video)
    report.write_report(folder)


def _sentence(result: EvaluationResult) -> str:
    low, high = result.mean_score_interval
    least, most = result.success_rate_interval
    return (
        f"mean score {result.mean_score:.3f} [{low:.3f}, {high:.3f}], success rate {result.success_rate:.2f} "
        f"[{least:.2f}, {most:.2f}] over {result.episodes} episodes (seeds {result.seeds[0]} to {result.seeds[-1]})"
    )


def _device(name: str, num_threads: int | None) -> str:
    import torch

    if num_threads is not None:
        torch.set_num_threads(num_threads)
    if name == "cuda" and not torch.cuda.is_available():
        raise InvalidArgument("--device cuda: torch sees no GPU here; use --device cpu")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


def _check_new_file(option: str, path: Path, suffixes: tuple[str, ...]) -> None:
    if path.suffix not in suffixes:
        raise InvalidArgument(f"{option} must end in {' or '.join(suffixes)}, got {path}")
    if path.exists():
        raise RunFolderError(f"{option} {path}: exists already, and nothing is overwritten; name another file")
    nearest = path.absolute().parent
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise RunFolderError(f"{option} {path}: cannot be written (no file can be made in {nearest})")


if __name__ == "__main__":
    sys.exit(main())
