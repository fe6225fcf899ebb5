"""Fine-tuning on Push-T: every check first, then the loop."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minidiff_fast.errors import CheckpointError, InvalidArgument, RunFolderError, require
from minidiff_fast.finetuning.config import RESUMABLE, FinetuneConfig
from minidiff_fast.tasks.pusht.policy import (
    ACTION_DIM,
    LOW_DIM_ENTRIES,
    FrozenStart,
    InvalidOption,
    PolicyConfig,
    build_process,
    build_transitions,
)
from minidiff_fast.training import checkpoint
from minidiff_fast.training.pusht import check_run_folder, evaluate_policy

if TYPE_CHECKING:
    from torch import nn

    from minidiff_fast.finetuning.loop import Finetuner, FinetuneResult, IterationReport
    from minidiff_fast.policy import DiffusionPolicy

DEFAULT_SAMPLES = 8
"""K of fpo and awr where the options name none."""
DEFAULT_LR = {"dppo": 3e-4, "fpo": 1e-4, "reinflow": 1e-4, "awr": 1e-4}
"""Learning rate of the policy where the options name none."""
DEFAULT_CLIP = {"dppo": 0.1, "fpo": 0.002, "reinflow": 0.01}
"""Clip range where the options name none. FPO's ratio is that of denoising losses: its source's 0.05 is for policies
whose loss is about 1. After imitation it is about 0.02, and that clip lets the policy unlearn all in one update."""


def finetune_pusht(
    config: FinetuneConfig, *, on_iteration: Callable[[IterationReport], None] | None = None
) -> FinetuneResult:
    """Fine-tune a Push-T policy as ``config`` says; see :class:`minidiff_fast.finetuning.loop.Finetuner`.

    Raises:
        RunFolderError: the run folder cannot be written, or holds something and ``resume`` is False.
        CheckpointError: no checkpoint to start from, or it does not fit the algorithm or the options of the run.
        InvalidOption: options that do not fit the checkpoint's sampler.
        MissingDependency: a package is not installed.
    """
    check_run_folder(Path(config.out), resume=config.resume)
    for module in ("diffusers", "tqdm", "safetensors", *(("tensorboard",) if config.log == "tensorboard" else ())):
        require(module, extra="train")
    require("gym_pusht", extra="pusht")
    import torch

    from minidiff_fast.training.runtime import seed_everything, threads

    if config.device == "cuda" and not torch.cuda.is_available():
        raise InvalidArgument("--device cuda: torch sees no GPU here; use --device cpu")
    device = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
    config, found = _start(config)
    policy, info = checkpoint.load_policy(found, weights="model" if config.resume else config.weights, device=device)
    shapes = info.policy
    if config.denoising_steps is not None:
        shapes = replace(shapes, num_inference_steps=config.denoising_steps)
    config = resolved(config, shapes)
    with threads(config.num_threads):
        seed_everything(config.seed)
        run = _Run(config, shapes, policy, found, device)
        try:
            return run.tuner.run(evaluate=run.evaluate, save=run.save, report=run.reporter(on_iteration))
        finally:
            run.close()


def _start(config: FinetuneConfig) -> tuple[FinetuneConfig, Path]:
    """The checkpoint that the run begins or goes on from; a resumed run keeps its budget where none is given."""
    if not config.resume:
        assert config.checkpoint is not None  # the configuration checks it
        found = checkpoint.find_checkpoint(config.checkpoint, config.which)
        if checkpoint.fine_tuned_steps(checkpoint.read_info(found)) is not None:
            raise CheckpointError(
                f"{found}: is not one policy: its first denoising steps run the one that its fine-tuning began with "
                "(--fine-tuned-steps); --resume goes on with that run"
            )
        return config, found
    found = checkpoint.find_checkpoint(config.out)
    begun = checkpoint.read_info(found).train
    if "algo" not in begun:
        raise CheckpointError(f"{found}: is no run of finetune; --resume goes on with one, --checkpoint begins one")
    own: dict[str, Any] = {name: begun.get(name) for name in (*RESOLVED, "checkpoint") if getattr(config, name) is None}
    config = replace(config, **own)
    for name, value in config.to_dict().items():
        if name not in RESUMABLE and begun.get(name) != value:
            raise CheckpointError(
                f"{found}: was fine-tuned with --{name.replace('_', '-')} {begun.get(name)}, got {value}; resume with "
                "the options of the run, or start another with --out"
            )
    if config.budget is None and config.max_iterations is None:
        config = replace(config, budget=begun.get("budget"), max_iterations=begun.get("max_iterations"))
    return config, found


class _Run:
    """The parts of a run of a :func:`resolved` configuration, and what it writes."""

    def __init__(
        self, config: FinetuneConfig, shapes: PolicyConfig, policy: DiffusionPolicy, found: Path, device: str
    ) -> None:
        from minidiff_fast.finetuning.learner import UpdateConfig
        from minidiff_fast.finetuning.log import FinetuneLog
        from minidiff_fast.finetuning.loop import Finetuner, LoopConfig

        assert config.lr is not None  # resolved
        self.config, self.shapes, self.device = config, shapes, device
        self.interval = config.interval("eval_every")
        if config.fine_tuned_steps is not None and config.fine_tuned_steps > shapes.num_inference_steps:
            raise InvalidOption(
                f"--fine-tuned-steps must be at most the sampler's {shapes.num_inference_steps} steps, "
                f"got {config.fine_tuned_steps}"
            )
        algorithm = build_algorithm(config, shapes, policy)
        check_k(config, algorithm)
        part = config.algo == "dppo" and algorithm.steps != shapes.num_inference_steps
        frozen = part or config.bc_weight > 0.0 or config.peer_passes
        update = UpdateConfig(
            epochs=config.epochs, critic_epochs=config.critic_epochs, batch_size=config.batch_size, k=config.k,
            actor_lr=config.lr, critic_lr=config.critic_lr, target_kl=config.target_kl,
            flat_pairs=config.flat_pairs, rows_per_pass=config.rows_per_pass,
        )  # fmt: skip
        loop = LoopConfig(
            max_iterations=config.max_iterations, max_seconds=config.budget_seconds, chunk_steps=config.chunk_steps,
            gamma=config.gamma, gae_lambda=config.gae_lambda, critic_warmup=config.critic_warmup,
            reward_scaling=config.reward_scaling, update=update, executed=executed_tokens(shapes), seed=config.seed,
            rescore=config.peer_passes, peer_passes=config.peer_passes, evaluate=self.interval,
            save=config.interval("checkpoint_every"),
        )  # fmt: skip
        with ExitStack() as opened:  # what is open is closed where the rest cannot be built
            self.envs = build_envs(config, shapes)
            opened.callback(self.envs.close)
            self.tuner = Finetuner(
                policy, build_critic(config, shapes, policy), algorithm, self.envs, loop,
                base=copy.deepcopy(policy) if frozen else None, device=device,
            )  # fmt: skip
            self.frozen = FrozenStart(self.tuner.base.policy, algorithm.steps) if part else None
            self.store = checkpoint.CheckpointStore(Path(config.out), config.keep)
            self.best, self.earlier_wall = None, 0.0  # type: float | None, float
            if config.resume:
                self._resume(found)
            try:
                Path(config.out).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise RunFolderError(f"--out {config.out}: cannot be written ({error.strerror})") from error
            self.began = time.perf_counter()
            self.log = FinetuneLog(config, self.tuner.iteration)
            opened.callback(self.log.close)
            self._opened = opened.pop_all()

    def _resume(self, found: Path) -> None:
        state = checkpoint.load_state(found)
        try:
            self.best, self.earlier_wall = state["best"], state["wall"]
            self.tuner.load_state_dict(state["finetuner"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{found / checkpoint.STATE}: does not fit this run ({checkpoint.first_line(error)})"
            ) from error

    def reporter(self, on_iteration: Callable[[IterationReport], None] | None) -> Callable[[IterationReport], None]:
        def report(done: IterationReport) -> None:
            self.log.iteration(done, self._wall())
            if on_iteration is not None:
                on_iteration(done)

        return report

    def evaluate(self, tuner: Finetuner) -> None:
        """Score the policy on the stock measure, and keep the best."""
        config, began = self.config, time.perf_counter()
        result = evaluate_policy(
            tuner.module, self.shapes, sampler=config.eval_sampler, min_std=config.min_std, variant=config.variant,
            episodes=config.eval_episodes, seed=config.eval_seed, device=self.device, frozen=self.frozen,
        )  # fmt: skip
        self.log.evaluation(
            result, tuner.iteration, tuner.seconds, tuner.cpu_seconds, self._wall(), time.perf_counter() - began
        )
        if self.best is None or result.success_rate > self.best:
            before, self.best = self.best, result.success_rate
            try:
                self._write(tuner, best=True)
            except BaseException:  # Ctrl-C acts at once here: a best score without its checkpoint would be kept
                self.best = before
                raise

    def save(self, tuner: Finetuner) -> None:
        """Write a checkpoint."""
        self._write(tuner, best=False)

    def _write(self, tuner: Finetuner, best: bool) -> None:
        weights = tuner.module.state_dict()
        state = {"best": self.best, "wall": self._wall(), "finetuner": tuner.state_dict()}
        self.saved = self.store.save(
            tuner.iteration, policy=self.shapes, train=self.config.to_dict(), model=weights, ema=weights, state=state,
            best=best,
        )  # fmt: skip

    def _wall(self) -> float:
        return self.earlier_wall + time.perf_counter() - self.began

    def close(self) -> None:
        self._opened.close()


RESOLVED = ("lr", "clip", "critic_epochs")
"""Options whose None stands for a value that depends on the algorithm or the policy; a run stores the value."""


def resolved(config: FinetuneConfig, shapes: PolicyConfig) -> FinetuneConfig:
    """``config`` with a value for each of :data:`RESOLVED`, but no clip range for awr."""
    dear = config.critic == "shared" or shapes.obs == "image"
    values: dict[str, Any] = {
        "lr": DEFAULT_LR[config.algo],
        "clip": DEFAULT_CLIP.get(config.algo),
        "critic_epochs": config.epochs if dear else max(config.epochs, 10),
    }
    return replace(config, **{name: values[name] for name in RESOLVED if getattr(config, name) is None})


def executed_tokens(shapes: PolicyConfig) -> tuple[int, int]:
    """Places [start, stop) of the horizon that are executed: from the last observation on."""
    return shapes.n_obs_steps - 1, shapes.n_obs_steps - 1 + shapes.n_action_steps


def build_algorithm(config: FinetuneConfig, shapes: PolicyConfig, policy: DiffusionPolicy) -> Any:
    """The algorithm of ``--algo`` for a policy; ``config`` is :func:`resolved`.

    Raises :class:`CheckpointError` where it needs another kind of policy.
    """
    shape, act_steps = (shapes.horizon, ACTION_DIM), executed_tokens(shapes)
    clip = config.clip or 0.0  # awr alone has none, and does not read it
    if config.algo == "dppo":
        from minidiff_fast.objectives.dppo import DPPO, DPPOConfig

        constants = DPPOConfig(
            clip=clip, clip_base=config.clip_base, gamma_denoising=config.gamma_denoising,
            min_sampling_std=config.min_std, min_logprob_std=config.min_std, log_prob_high=LOG_PROB_HIGH,
            bc_weight=config.bc_weight,
        )  # fmt: skip
        transitions = build_transitions(shapes, std=config.min_std)
        return DPPO(transitions, shape, constants, fine_tuned=config.fine_tuned_steps, act_steps=act_steps)
    if config.algo == "reinflow":
        from minidiff_fast.objectives.reinflow import ReinFlow, ReinFlowConfig

        if shapes.prediction != "flow":
            raise CheckpointError(
                f"{config.checkpoint}: --algo reinflow fine-tunes flow policies (train pusht --prediction flow), this "
                f"one predicts {shapes.prediction!r}"
            )
        # The range of the source, 0.10 to 0.24, scaled to the exploration that was asked for.
        learned = ReinFlowConfig(
            clip=clip, noise_low=config.min_std, noise_high=2.4 * config.min_std, bc_weight=config.bc_weight
        )
        width = shapes.n_obs_steps * _width(policy.encoder)
        return ReinFlow(build_transitions(shapes), shape, width, learned, act_steps=act_steps)
    transitions, process = build_transitions(shapes), build_process(shapes)
    if config.algo == "fpo":
        from minidiff_fast.objectives.fpo import FPO, FPOConfig

        scored = FPOConfig(clip=clip, samples=config.samples or DEFAULT_SAMPLES, min_sampling_std=config.min_std)
        return FPO(transitions, process, shape, scored, act_steps=act_steps)
    from minidiff_fast.objectives.weighted import AWR, AWRConfig

    weights = AWRConfig(
        beta=config.awr_beta, samples=config.samples or DEFAULT_SAMPLES, min_sampling_std=config.min_std
    )
    return AWR(transitions, process, shape, weights, act_steps=act_steps)


def check_k(config: FinetuneConfig, algorithm: Any) -> None:
    """Raise :class:`InvalidOption` where a minibatch cannot take ``--k`` of a decision's K, before anything runs."""
    if config.k is None or config.algo == "awr":  # which draws as many as it is told
        return
    most = (config.samples or DEFAULT_SAMPLES) if config.algo == "fpo" else algorithm.steps
    if config.k > most or (config.algo == "reinflow" and config.k != most):
        expected = f"in [1, {most}]" if config.algo != "reinflow" else f"{most}, as a chain has one ratio,"
        raise InvalidOption(f"--k must be {expected} with --algo {config.algo}, got {config.k}")


LOG_PROB_HIGH = 5.0
"""Upper clamp of an entry's log-density. The source's 2 would cut the gradient of good steps at standard deviations
below 0.05: the density at the mean of a Gaussian with 0.04 is exp(2.3)."""


def build_envs(config: FinetuneConfig, shapes: PolicyConfig) -> Any:
    """The vector environment: chunks of ``n_action_steps`` actions, progress as reward."""
    from minidiff_fast.finetuning.vector import check_spaces, make_vector

    envs = make_vector([PushTFactory(shapes, config.variant)] * config.envs, kind=config.vector)
    entries: dict[str, tuple[int, ...]] = {
        name: (shapes.n_obs_steps, channels) for name, channels in LOW_DIM_ENTRIES[shapes.obs].items()
    }
    if shapes.obs == "image":
        entries["image"] = (shapes.n_obs_steps, 96, 96, 3)
    try:
        check_spaces(envs, entries, (shapes.n_action_steps, ACTION_DIM))
    except BaseException:
        envs.close()
        raise
    return envs


class PushTFactory:
    """Makes one environment; a class, so that it can go to another process."""

    def __init__(self, shapes: PolicyConfig, variant: str) -> None:
        self.shapes, self.variant = shapes, variant

    def __call__(self) -> Any:
        """A Push-T environment of the variant whose action is a chunk and whose reward is progress."""
        from minidiff_fast.finetuning.chunk import ActionChunk
        from minidiff_fast.tasks.pusht.rewards import ShapedReward
        from minidiff_fast.tasks.pusht.task import PushTTask

        task = PushTTask(self.shapes.obs, self.variant)
        return ShapedReward(ActionChunk(task, self.shapes.n_action_steps, self.shapes.n_obs_steps))


def build_critic(config: FinetuneConfig, shapes: PolicyConfig, policy: DiffusionPolicy) -> nn.Module:
    """The value function of ``--critic``."""
    from minidiff_fast.finetuning.critic import OwnCritic, SharedCritic, ValueHead
    from minidiff_fast.models import ImageEncoder, LowDimEncoder

    if config.critic == "shared":
        return SharedCritic(ValueHead(shapes.n_obs_steps * _width(policy.encoder)))
    entries = LOW_DIM_ENTRIES[shapes.obs]
    encoder = ImageEncoder(entries) if shapes.obs == "image" else LowDimEncoder(entries)
    normalizers: dict[str, Any] = copy.deepcopy(dict(policy.obs_normalizers.items()))
    return OwnCritic(encoder, ValueHead(shapes.n_obs_steps * _width(encoder)), normalizers).eval()


def _width(encoder: Any) -> int:
    """Dc of an encoder's features."""
    return int(encoder.output_dim)
