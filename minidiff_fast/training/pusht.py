"""Training and evaluating on Push-T: every check first, then the loop."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from minidiff_fast.errors import CheckpointError, DataError, RunFolderError, require
from minidiff_fast.tasks.pusht.policy import (
    FrozenStart,
    PolicyConfig,
    PushTActor,
    Sampler,
    build_policy,
    build_process,
    build_scheduler,
)
from minidiff_fast.tasks.pusht.variants import Variant
from minidiff_fast.training import checkpoint
from minidiff_fast.training.config import Interval, TrainConfig

if TYPE_CHECKING:
    import numpy as np
    import torch

    from minidiff_fast.policy import DiffusionPolicy
    from minidiff_fast.tasks.pusht.evaluation import EvaluationResult
    from minidiff_fast.training.loop import TrainResult


def train_pusht(config: TrainConfig, *, on_step: Callable[[int], None] | None = None) -> TrainResult:
    """Train a Push-T policy as ``config`` says; see :func:`minidiff_fast.training.loop.train`.

    Raises:
        RunFolderError: the run folder cannot be written, or holds something and ``resume`` is False.
        CheckpointError: ``resume``, and there is no checkpoint or it does not fit.
        DataError: the demonstrations are missing, damaged, or hold NaN.
        MissingDependency: a package is not installed.
    """
    check_run_folder(Path(config.out), resume=config.resume)
    for module in ("diffusers", "accelerate", "tqdm", "safetensors", *config.trackers):
        require(module, extra="train")
    evaluates = config.interval("eval_every") != Interval(None, None)
    if evaluates:
        require("gym_pusht", extra="pusht")
    if config.resume:
        found = checkpoint.find_checkpoint(config.out)
        check_observation(found, config.policy.obs)
        if config.budget is None and config.max_steps is None:  # the run goes on as it was begun
            begun = checkpoint.read_info(found).train
            config = replace(config, budget=begun.get("budget"), max_steps=begun.get("max_steps"))

    from minidiff_fast.objectives.imitation import DenoisingLoss
    from minidiff_fast.tasks.pusht.data import PushTWindows, load_pusht
    from minidiff_fast.training import loop, runtime

    shapes = config.policy
    device = runtime.choose_device(config)
    data = load_pusht(config.data, images=shapes.obs == "image")
    episodes = first_episodes(config.demo_episodes, data.n_episodes, data.source)
    if config.mirror:
        import numpy as np

        episodes = None if episodes is None else np.concatenate([episodes, data.n_episodes + episodes])
        data = data.with_mirrored()
    windows = PushTWindows(
        data, shapes.obs, shapes.horizon, shapes.n_obs_steps, shapes.n_action_steps, episodes=episodes
    )
    normalizers = windows.normalizers()
    runtime.seed_everything(config.seed)
    policy = build_policy(shapes, normalizers.obs, normalizers.action)

    def score(trained: DiffusionPolicy) -> EvaluationResult:
        return evaluate_policy(trained, shapes, episodes=config.eval_episodes, seed=config.eval_seed, device=device)

    return loop.train(
        config,
        policy,
        DenoisingLoss(build_process(shapes)),
        windows.to(device),
        evaluate=score if evaluates else None,
        on_step=on_step,
    )


def evaluate_policy(
    policy: DiffusionPolicy,
    config: PolicyConfig,
    *,
    episodes: int = 50,
    seed: int = 100_000,
    device: torch.device | str = "cpu",
    progress: bool = False,
    record: int = 0,
    max_steps: int | None = None,
    variant: str | Variant = "stock",
    sampler: Sampler = "scheduler",
    min_std: float = 0.0,
    frozen: FrozenStart | None = None,
) -> EvaluationResult:
    """Evaluate a policy that lies on ``device``, in eval mode; ``seed`` also seeds the action samples. For ``sampler``,
    ``min_std`` and ``frozen`` see :class:`~minidiff_fast.tasks.pusht.policy.PushTActor`."""
    from minidiff_fast.tasks.pusht.evaluation import evaluate

    scheduler = build_scheduler(config) if sampler == "scheduler" else None
    actor = PushTActor(policy, scheduler, config, device, seed, sampler=sampler, min_std=min_std, frozen=frozen)
    return evaluate(
        actor,
        obs=config.obs,
        episodes=episodes,
        seed=seed,
        max_steps=max_steps,
        n_obs_steps=config.n_obs_steps,
        progress=progress,
        record=record,
        variant=variant,
    )


def evaluate_checkpoint(
    path: str | Path,
    *,
    which: Literal["last", "best"] = "last",
    weights: Literal["ema", "model"] = "ema",
    obs: str | None = None,
    num_inference_steps: int | None = None,
    episodes: int = 50,
    seed: int = 100_000,
    device: str = "cpu",
    progress: bool = False,
    record: int = 0,
    max_steps: int | None = None,
    variant: str | Variant = "stock",
    sampler: Sampler = "scheduler",
    min_std: float = 0.0,
) -> EvaluationResult:
    """Evaluate the policy of a checkpoint or run folder.

    Args:
        path, which, weights: see :func:`minidiff_fast.training.checkpoint.load_policy`.
        obs: what it must have been trained on; None takes what comes.
        num_inference_steps: denoising steps in place of those of the checkpoint's configuration.
        episodes, seed, progress, record, max_steps, variant: see
            :func:`minidiff_fast.tasks.pusht.evaluation.evaluate`.
        device: where to run the policy.
        sampler, min_std: see :class:`~minidiff_fast.tasks.pusht.policy.PushTActor`.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or of another observation kind; or fine-tuning has trained
            its last denoising steps alone, and the sampler or the number of steps is another than there.
    """
    if obs is not None:
        check_observation(checkpoint.find_checkpoint(path, which), obs)
    policy, info = checkpoint.load_policy(path, which=which, weights=weights, device=device)
    frozen, steps = checkpoint.load_frozen(info, device=device), num_inference_steps
    if frozen is not None and (sampler == "scheduler" or steps not in (None, info.policy.num_inference_steps)):
        raise CheckpointError(
            f"{info.path}: its first denoising steps run the policy that fine-tuning began with (--fine-tuned-steps "
            f"{frozen.fine_tuned} of {info.policy.num_inference_steps}); evaluate it with --sampler deterministic or "
            "stochastic and without --num-inference-steps"
        )
    config = info.policy if steps is None else replace(info.policy, num_inference_steps=steps)
    return evaluate_policy(
        policy, config, episodes=episodes, seed=seed, device=device, progress=progress, record=record,
        max_steps=max_steps, variant=variant, sampler=sampler, min_std=min_std, frozen=frozen,
    )  # fmt: skip


def first_episodes(count: int | None, total: int, source: str) -> np.ndarray | None:
    """Indices of the first ``count`` of ``total`` episodes [count]; None, all of them, for None.

    Raises :class:`DataError` if there are fewer.
    """
    if count is None:
        return None
    if count > total:
        raise DataError(f"--demo-episodes must be at most the {total} episodes of {source}, got {count}")
    import numpy as np

    return np.arange(count)


def check_observation(found: Path, obs: str) -> None:
    """Raise :class:`CheckpointError` if the checkpoint was trained on another observation kind."""
    trained = checkpoint.read_info(found).policy.obs
    if trained != obs:
        raise CheckpointError(f"{found}: was trained on --obs {trained}, got --obs {obs}")


def check_run_folder(folder: Path, *, resume: bool) -> None:
    """Raise :class:`RunFolderError` unless a run can be written there without overwriting anything."""
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"--out {folder}: is a file, a folder is expected")
    nearest = folder
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise RunFolderError(f"--out {folder}: cannot be written (no folder can be made in {nearest})")
    if resume:
        checkpoint.find_checkpoint(folder)
    elif folder.is_dir() and any(folder.iterdir()):
        raise RunFolderError(
            f"--out {folder}: is not empty and nothing is overwritten; name another folder, or --resume the run"
        )
