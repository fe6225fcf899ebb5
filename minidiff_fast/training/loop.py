"""The training loop: Level-2 steps on Accelerate, averaged weights, evaluation, checkpoints, exact resume."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from minidiff_fast.errors import CheckpointError, MinidiffFastError, RunFolderError, require
from minidiff_fast.level2 import Level2Batch, Objective, level2_step
from minidiff_fast.policy import DiffusionPolicy
from minidiff_fast.tasks.pusht.data import WindowBatch
from minidiff_fast.training import checkpoint
from minidiff_fast.training.config import RESUMABLE, TrainConfig
from minidiff_fast.training.metrics import RunLog
from minidiff_fast.training.order import DataOrder
from minidiff_fast.training.runtime import (
    Abandoned,
    Due,
    Interrupted,
    Signals,
    build_accelerator,
    choose_device,
    determinism,
    gather,
    random_state,
    seed_everything,
    set_random_state,
    threads,
)

_COSINE_STEPS = 1_000_000  # resolution of the cosine where it follows time instead of steps


class NonFiniteLoss(MinidiffFastError, ArithmeticError):
    """The loss or the gradient became NaN or infinite; the last checkpoint is from before."""


class Windows(Protocol):
    """Training data, all of it at hand."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor) -> WindowBatch:
        """Observations ``{name: [B, To, ...]}`` and actions ``[B, T, A]``, on the policy's device."""


class Score(Protocol):
    """What the loop reads of an evaluation."""

    @property
    def mean_score(self) -> float: ...
    @property
    def mean_score_interval(self) -> tuple[float, float]: ...
    @property
    def success_rate(self) -> float: ...
    @property
    def episodes(self) -> int: ...


Evaluate = Callable[[DiffusionPolicy], Score]


@dataclass(frozen=True)
class TrainResult:
    """Where a run ended."""

    run: Path
    """Run folder."""
    checkpoint: Path
    """The last checkpoint."""
    step: int
    """Optimiser steps."""
    seconds: float
    """Training time, without evaluations and checkpoints."""
    cpu_seconds: float
    """Processor time of this process and its threads in that; of one process, whatever the device."""
    wall: float
    """All time."""
    loss: float
    """Mean loss of the last entry of the log."""
    best_score: float | None
    """Highest mean score of the evaluations on the way, if there were any."""


def train(
    config: TrainConfig,
    policy: DiffusionPolicy,
    objective: Objective,
    windows: Windows,
    *,
    evaluate: Evaluate | None = None,
    on_step: Callable[[int], None] | None = None,
) -> TrainResult:
    """Train ``policy`` until the steps or the time are used up.

    The loss of a step is the mean over B conditions and K samples each; AdamW, gradient norm clipped, cosine
    decay after a linear warm-up, averaged weights (EMA) for evaluation. Everything a run draws comes from
    ``config.seed``.

    Args:
        config: options; ``config.out`` is the run folder, which :func:`minidiff_fast.training.pusht.prepare`
            has checked.
        policy: with normalisers fitted.
        objective: e.g. :class:`~minidiff_fast.objectives.imitation.DenoisingLoss`.
        windows: training data.
        evaluate: called with the policy holding the averaged weights, in eval mode.
        on_step: called with the number of steps done after each of them; a KeyboardInterrupt from it ends
            the run as Ctrl-C does.

    Raises:
        NonFiniteLoss: no checkpoint is written from then on.
        CheckpointError: ``config.resume`` and the checkpoint does not fit.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint has been written.
    """
    with threads(config.num_threads), determinism(choose_device(config)), Signals() as signals:
        trainer = _Trainer(config, policy, objective, windows, evaluate)
        try:
            return trainer.run(signals, on_step)
        finally:
            trainer.close()


class _Trainer:
    def __init__(
        self,
        config: TrainConfig,
        policy: DiffusionPolicy,
        objective: Objective,
        windows: Windows,
        evaluate: Evaluate | None,
    ) -> None:
        self.config, self.policy, self.objective = config, policy, objective
        self.windows, self.evaluate = windows, evaluate
        self.run_folder = Path(config.out)
        self.accelerator = build_accelerator(config)
        self.device = self.accelerator.device
        self.rank = self.accelerator.process_index
        self.world = self.accelerator.num_processes
        policy.to(self.device).train()
        seed_everything(config.seed + self.rank)
        groups = _parameter_groups(policy, config.weight_decay)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.all_parameters = list(policy.parameters())
        optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)
        optimization = require("diffusers.optimization", extra="train")
        self.total = config.max_steps or config.warmup_steps + _COSINE_STEPS
        schedule = optimization.get_cosine_schedule_with_warmup(optimizer, config.warmup_steps, self.total)
        self.factor: Callable[[float], float] = schedule.lr_lambdas[0]
        self.ema = require("diffusers.training_utils", extra="train").EMAModel(
            self.all_parameters, decay=0.9999, use_ema_warmup=True, power=config.ema_power, foreach=True
        )
        self.model, self.optimizer = self.accelerator.prepare(policy, optimizer)
        self.order = DataOrder(len(windows), config.seed * 1_000_003 + self.rank)
        self.store = checkpoint.CheckpointStore(self.run_folder, config.keep)
        self.step, self.seconds, self.cpu_seconds, self.earlier_wall = 0, 0.0, 0.0, 0.0
        self.best: float | None = None
        self.saved: Path | None = None
        self.saved_step = -1
        self.loss = math.nan
        self.pending: list[tuple[Tensor, Tensor]] = []  # loss and gradient norm of steps not looked at yet
        if config.resume:
            self._resume()
        try:
            self.run_folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(f"--out {config.out}: cannot be written ({error.strerror})") from error
        self.log = RunLog(config, self.accelerator, self.step)
        self.logged_step, self.logged_seconds = self.step, self.seconds
        self.began = time.perf_counter()

    # ------------------------------------------------------------------ the run

    def run(self, signals: Signals, on_step: Callable[[int], None] | None) -> TrainResult:
        config = self.config
        evaluations = Due(config.interval("eval_every"), self.step, self.seconds)
        checkpoints = Due(config.interval("checkpoint_every"), self.step, self.seconds)
        try:
            while not self._finished():
                begun, cpu_begun = time.perf_counter(), time.process_time()
                self._train_step()
                if self.step % config.log_every == 0:
                    self._flush()
                self.seconds += time.perf_counter() - begun
                self.cpu_seconds += time.process_time() - cpu_begun
                if self._agree(evaluations.due(self.step, self.seconds)):
                    self._score(signals)
                if self._agree(checkpoints.due(self.step, self.seconds)):
                    self._save()
                if on_step is not None:
                    on_step(self.step)
                signals.check()
            if not evaluations.never and self._agree(evaluations.last != self.step):
                self._score(signals)
            if self.saved_step != self.step:
                self._save()
        except Abandoned:
            raise
        except KeyboardInterrupt:
            # Between two steps, or in an evaluation that has put the weights back: the state is whole.
            self._save()
            assert self.saved is not None
            raise Interrupted(signals.received or signal.SIGINT, self.saved) from None
        assert self.saved is not None
        return TrainResult(
            self.run_folder, self.saved, self.step, self.seconds, self.cpu_seconds, self._wall(), self.loss, self.best
        )

    def _finished(self) -> bool:
        if self.config.max_steps is not None and self.step >= self.config.max_steps:
            return True
        budget = self.config.budget_seconds
        return budget is not None and self._agree(self.seconds >= budget)

    def _train_step(self) -> None:
        config = self.config
        rate = config.lr * self._factor()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        raw = self.windows.batch(self.order.take(config.batch_size))
        batch = Level2Batch.draw(
            raw["obs"],
            self.policy.normalize_actions(raw["action"]),
            config.l2_batch,
            self.objective,
            generator=self.order.generator,
            timesteps=config.timesteps,
            noise=config.noise,
        )
        scaler = self.accelerator.scaler
        with self.accelerator.autocast():
            result = level2_step(
                self.model,
                self.objective,
                batch,
                chunk=config.l2_chunk,
                loss_scale=None if scaler is None else scaler.scale,
            )
        norm = self.accelerator.clip_grad_norm_(self.parameters, config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.all_parameters)
        self.step += 1
        self.pending.append((result.loss, norm))

    def _factor(self) -> float:
        """Share of the peak learning rate: of the step, or with a budget alone of the time that is spent."""
        warmup = self.config.warmup_steps
        if self.step < warmup:
            return self.factor(self.step + 1)  # the first step counts
        if self.config.max_steps is not None:
            return self.factor(self.step)
        assert self.config.budget_seconds is not None
        spent = self._common(min(self.seconds / self.config.budget_seconds, 1.0))
        return self.factor(warmup + spent * _COSINE_STEPS)

    def _flush(self) -> None:
        """Look at the losses since the last look, and log their mean."""
        if not self.pending:
            return
        losses = torch.stack([loss for loss, _ in self.pending]).double().cpu()
        norms = torch.stack([norm.detach() for _, norm in self.pending]).double().cpu()
        # With fp16 an infinite gradient is what tells the scaler to take a smaller scale.
        bad = ~torch.isfinite(losses if self.accelerator.scaler is not None else losses + norms)
        if bool(bad.any()):
            place = int(bad.nonzero()[0, 0])
            saved = "no checkpoint was written" if self.saved is None else f"the last checkpoint is {self.saved}"
            raise NonFiniteLoss(
                f"step {self.step - len(self.pending) + place + 1}: the loss is {losses[place]:g} and the norm of "
                f"the gradient {norms[place]:g}; {saved}; try a smaller --lr"
            )
        self.pending.clear()
        self.loss = float(losses.mean())
        norm = float(norms.mean())
        steps, seconds = self.step - self.logged_step, self.seconds - self.logged_seconds
        self.logged_step, self.logged_seconds = self.step, self.seconds
        conditions = steps * self.config.batch_size * self.world / seconds if seconds > 0.0 else 0.0
        self.log.train(
            self._time(),
            loss=self.loss,
            lr=float(self.optimizer.param_groups[0]["lr"]),
            grad_norm=norm if math.isfinite(norm) else None,
            conditions_per_second=conditions,
            samples_per_second=conditions * self.config.l2_batch,
        )

    def _score(self, signals: Signals) -> None:
        """Evaluate the averaged weights; the time is part of the wall clock, not of the training time."""
        if self.evaluate is None:
            return
        self._flush()
        improved = False
        if self.accelerator.is_main_process:
            begun = time.perf_counter()
            with self._averaged(), signals.immediate():
                result = self.evaluate(self.policy)
            self.log.evaluation(
                self._time(),
                score=result.mean_score,
                score_interval=list(result.mean_score_interval),
                success_rate=result.success_rate,
                episodes=result.episodes,
                eval_seconds=time.perf_counter() - begun,
            )
            improved = self.best is None or result.mean_score > self.best
            self.best = result.mean_score if improved else self.best
        if self._agree(improved):
            self._save(best=True)

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """The policy with the averaged weights, in eval mode."""
        self.ema.store(self.all_parameters)
        self.ema.copy_to(self.all_parameters)
        self.policy.eval()
        try:
            yield
        finally:
            self.ema.restore(self.all_parameters)
            self.policy.train()

    # ------------------------------------------------------------------ checkpoints

    def _save(self, best: bool = False) -> None:
        if self.saved_step == self.step and not best:
            return  # nothing has changed since; what `last` points to is not touched
        self._flush()  # no checkpoint from a loss that is not finite
        orders = gather(self.accelerator, self.order.state_dict())
        randoms = gather(self.accelerator, random_state())
        if self.accelerator.is_main_process:
            self._write(orders, randoms, best)
        self.saved, self.saved_step = self.store.path(self.step), self.step
        self.accelerator.wait_for_everyone()

    def _write(self, orders: list[Any], randoms: list[Any], best: bool) -> None:
        shadow = self.ema.shadow_params
        names = [name for name, _ in self.policy.named_parameters()]
        model = self.policy.state_dict()
        scaler = self.accelerator.scaler
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "wall": self._wall(),
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "ema": {k: v for k, v in self.ema.state_dict().items() if k != "shadow_params"},
            "orders": orders,
            "randoms": randoms,
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        self.store.save(
            self.step,
            policy=self.config.policy,
            train=self.config.to_dict(),
            model=model,
            ema={**model, **dict(zip(names, shadow, strict=True))},
            state=state,
            best=best,
        )

    def _resume(self) -> None:
        found = checkpoint.find_checkpoint(self.run_folder)
        info = checkpoint.read_info(found)
        state = checkpoint.load_state(found)
        if info.policy.obs != self.config.policy.obs:
            raise CheckpointError(f"{found}: was trained on --obs {info.policy.obs}, got {self.config.policy.obs}")
        checkpoint.load_weights(self.policy, found / checkpoint.EMA)
        averaged = [parameter.detach().clone() for parameter in self.all_parameters]
        checkpoint.load_weights(self.policy, found / checkpoint.MODEL)
        trained = {**info.train, **asdict(info.policy)}
        mine = {**self.config.to_dict(), **asdict(self.config.policy)}
        trained = {**TrainConfig().to_dict(), **trained}  # a run from before an option did what is its default
        for name, value in mine.items():
            if name not in RESUMABLE and trained.get(name) != value:
                raise CheckpointError(
                    f"{found}: was trained with --{name.replace('_', '-')} {trained.get(name)}, got {value}; "
                    "resume with the options of the run, or start another with --out"
                )
        try:
            if len(state["orders"]) != self.world:
                raise CheckpointError(f"{found}: was trained by {len(state['orders'])} processes, got {self.world}")
            self.ema.load_state_dict({**state["ema"], "shadow_params": averaged})
            self.optimizer.load_state_dict(state["optimizer"])
            self.order.load_state_dict(state["orders"][self.rank])
            if self.accelerator.scaler is not None and state["scaler"] is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            self.step, self.seconds = state["step"], state["seconds"]
            self.cpu_seconds = state.get("cpu_seconds", 0.0)  # not counted by earlier versions
            self.earlier_wall, self.best = state["wall"], state["best"]
            set_random_state(state["randoms"][self.rank])
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, MinidiffFastError):
                raise
            raise CheckpointError(
                f"{found / checkpoint.STATE}: does not fit this run ({checkpoint.first_line(error)})"
            ) from error
        self.saved, self.saved_step = found, self.step

    # ------------------------------------------------------------------ time, processes

    def _wall(self) -> float:
        return self.earlier_wall + time.perf_counter() - self.began

    def _time(self) -> dict[str, float]:
        return {
            "step": self.step, "seconds": self.seconds, "cpu_seconds": self.cpu_seconds, "wall": self._wall(),
        }  # fmt: skip

    def _agree(self, decision: bool) -> bool:
        """The main process's decision, as clocks differ from process to process."""
        return decision if self.world == 1 else self._common(float(decision)) > 0.5

    def _common(self, value: float) -> float:
        if self.world == 1:
            return value
        from accelerate.utils import broadcast

        return float(broadcast(torch.tensor(value, dtype=torch.float64, device=self.device)))

    def close(self) -> None:
        """End the trackers and close the files."""
        self.log.close()


def _parameter_groups(policy: DiffusionPolicy, weight_decay: float) -> list[dict[str, Any]]:
    """The denoiser's groups, and the encoder's matrices (decay) and its other parameters (no decay)."""
    groups: list[dict[str, Any]] = policy.denoiser.get_optim_groups(weight_decay)  # type: ignore[operator]
    encoder = [parameter for parameter in policy.encoder.parameters() if parameter.requires_grad]
    groups.append({"params": [p for p in encoder if p.ndim > 1], "weight_decay": weight_decay})
    groups.append({"params": [p for p in encoder if p.ndim <= 1], "weight_decay": 0.0})
    trainable = [{**group, "params": [p for p in group["params"] if p.requires_grad]} for group in groups]
    return [group for group in trainable if group["params"]]
