"""The fine-tuning loop: collect decisions, learn from them, evaluate, save; any policy, algorithm, environment."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minidiff_fast.errors import InvalidArgument, MinidiffFastError
from minidiff_fast.finetuning.buffer import RolloutBuffer, obs_entries
from minidiff_fast.finetuning.counters import CountedCritic, CountedPolicy, Counters
from minidiff_fast.finetuning.flat import FlatPolicy
from minidiff_fast.finetuning.learner import Algorithm, Learner, UpdateConfig, condition
from minidiff_fast.finetuning.reward_scaler import RewardScaler
from minidiff_fast.finetuning.vector import VectorRunner
from minidiff_fast.objectives._records import executed_tokens
from minidiff_fast.training.config import Interval
from minidiff_fast.training.runtime import Abandoned, Due, Signals, random_state, set_random_state


class NonFinite(MinidiffFastError, ArithmeticError):
    """A loss, a gradient or a parameter became NaN or infinite; the last checkpoint is from before."""


@dataclass(frozen=True)
class LoopConfig:
    """How a run collects and when it ends."""

    max_iterations: int | None = None
    """Iterations; None: until the time is used up."""
    max_seconds: float | None = None
    """Training time: collecting and learning."""
    chunk_steps: int = 50
    """S, decisions of each environment in an iteration."""
    gamma: float = 0.95
    """Discount per decision."""
    gae_lambda: float = 0.9
    """Lambda of the generalised advantage estimate."""
    critic_warmup: int = 2
    """Iterations that train the value function alone."""
    reward_scaling: bool = False
    """Divide rewards by the running standard deviation of the return."""
    update: UpdateConfig = field(default_factory=UpdateConfig)
    """How an iteration's decisions are learned from."""
    rescore: bool = False
    """Compute the old log-probabilities in a pass of their own over the rollout, not as the actions are drawn."""
    peer_passes: bool = False
    """With ``update.flat_pairs``: run the frozen network beside the policy's at every step, as DPPO's code does."""
    executed: tuple[int, int] | None = None
    """Places [start, stop) of the predicted tokens that the environment executes; None: all."""
    cameras: int = 1
    """Images of an observation, for the count of encoder passes."""
    seed: int = 0
    """Of environments, noise and minibatches."""
    evaluate: Interval = field(default_factory=lambda: Interval(None, None))
    """How often to evaluate; never by default."""
    save: Interval = field(default_factory=lambda: Interval(None, None))
    """How often to save; at the end in any case."""

    def __post_init__(self) -> None:
        if self.max_iterations is None and self.max_seconds is None:
            raise InvalidArgument("LoopConfig: max_iterations or max_seconds must be given, else the run never ends")
        for name, least in (("max_iterations", 1), ("chunk_steps", 1), ("critic_warmup", 0), ("cameras", 1)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise InvalidArgument(f"LoopConfig: {name} must be an int >= {least}, got {value!r}")
        for name in ("gamma", "gae_lambda"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InvalidArgument(f"LoopConfig: {name} must be in [0, 1], got {getattr(self, name)}")


@dataclass(frozen=True)
class IterationReport:
    """What one iteration did."""

    iteration: int
    """Number of iterations done."""
    seconds: float
    """Training time so far."""
    cpu_seconds: float
    """Processor time of this process so far, evaluations and checkpoints left out."""
    reward: float
    """Mean reward of a decision."""
    episodes: int
    """Episodes that ended in this iteration."""
    episode_return: float | None
    """Mean undiscounted return of those."""
    success: float | None
    """Share of those whose last ``info`` said ``is_success``; None where the environment does not say."""
    stats: dict[str, float]
    """Means over the update: losses, ratios, KL, clip fraction, gradient norms, saturated shares."""
    counters: Counters
    """Encoder passes, denoiser rows, environment steps of this iteration."""
    total: Counters
    """The same since the run began."""
    buffer_bytes: int
    """What the rollout holds."""
    flat_buffer_bytes: int
    """What it would hold with a row, observation included, for every (decision, sample) pair."""


@dataclass(frozen=True)
class FinetuneResult:
    """Where a run ended."""

    iterations: int
    """Iterations in all."""
    seconds: float
    """Training time: collecting and learning."""
    cpu_seconds: float
    """Processor time of that in this process."""
    total: Counters
    """All counted since the run began."""
    reports: tuple[IterationReport, ...]
    """Of this process; those before a resume are in the log."""


class Finetuner:
    """State of a run: policy, value function, environments, optimisers, counters.

    Args:
        policy: a :class:`~minidiff_fast.policy.DiffusionPolicy` or the like: features, condition, denoise,
            denormalize_actions. It is put into eval mode: collecting and scoring see the same network.
        critic: ``(obs, features) -> [B]``, see :mod:`minidiff_fast.finetuning.critic`. In eval mode, too: values of
            one observation do not depend on augmentation or dropout.
        algorithm: DPPO, FPO, ReinFlow, AWR.
        envs: a gymnasium vector environment whose actions are chunks, see
            :class:`~minidiff_fast.finetuning.chunk.ActionChunk` and
            :func:`~minidiff_fast.finetuning.vector.make_vector`.
        config: constants.
        base: a frozen copy of the policy, where the algorithm needs one.
        device: where the policy lies.

    Raises:
        InvalidArgument: parts that do not go together: executed tokens that are not the scored ones, environments with
            other actions, a form of the update that the algorithm does not have.
    """

    def __init__(
        self,
        policy: Any,
        critic: nn.Module,
        algorithm: Algorithm,
        envs: Any,
        config: LoopConfig,
        *,
        base: Any = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.device, self.algorithm = config, torch.device(device), algorithm
        self.module, self.critic_module = policy.to(self.device).eval(), critic.to(self.device).eval()
        extra = getattr(algorithm, "module", None)
        if extra is not None:
            extra.to(self.device)
        self.counters = Counters()
        self.policy: Any = CountedPolicy(self.module, self.counters, config.cameras)
        self.own_encoder = bool(getattr(critic, "own_encoder", False))
        self.critic: Any = CountedCritic(critic, self.counters, config.cameras if self.own_encoder else 0)
        self.base: Any = None
        if base is not None:
            frozen = base.to(self.device).eval().requires_grad_(False)
            self.base = CountedPolicy(frozen, self.counters, config.cameras, "base")
        shadow = self.base if config.peer_passes else None
        self.flat = FlatPolicy(self.policy, shadow) if config.update.flat_pairs else None
        self._check_forms()
        self._check_actions(envs)
        self.learner = Learner(self.policy, self.critic, algorithm, config.update, base=self.base, shadow=shadow)
        self.runner = VectorRunner(envs, counters=self.counters)
        self.buffer = RolloutBuffer(
            config.chunk_steps, envs.num_envs, obs_entries(envs.single_observation_space), device=self.device
        )
        self.scaler = RewardScaler(config.gamma) if config.reward_scaling else None
        self.generator = torch.Generator().manual_seed(config.seed)
        self.iteration, self.seconds, self.cpu_seconds = 0, 0.0, 0.0
        self.reports: list[IterationReport] = []
        self._obs: Any = None
        self._return = np.zeros(envs.num_envs)

    def run(
        self,
        *,
        evaluate: Callable[[Finetuner], None] | None = None,
        save: Callable[[Finetuner], None] | None = None,
        report: Callable[[IterationReport], None] | None = None,
    ) -> FinetuneResult:
        """Iterate until the iterations or the time are used up.

        Args:
            evaluate: called when due, with the policy in eval mode; its time is not training time.
            save: called when due and at the end, also after Ctrl-C or SIGTERM, which end the run between two
                iterations.
            report: called after each iteration.

        Raises:
            NonFinite: a loss, gradient or parameter is NaN or infinite; nothing is saved from then on.
            KeyboardInterrupt: after ``save``.
        """
        evaluations = Due(self.config.evaluate, self.iteration, self.seconds)
        saves = Due(self.config.save, self.iteration, self.seconds)
        saved = self.iteration if self.iteration else -1  # what was resumed lies there
        with Signals() as signals:
            try:
                while not self._finished():
                    done = self.iterate()
                    if report is not None:
                        report(done)
                    if evaluate is not None and evaluations.due(self.iteration, self.seconds):
                        with signals.immediate():
                            evaluate(self)
                    if save is not None and saves.due(self.iteration, self.seconds):
                        save(self)
                        saved = self.iteration
                    signals.check()
                if evaluate is not None and not evaluations.never and evaluations.last != self.iteration:
                    with signals.immediate():
                        evaluate(self)
            except Abandoned:
                raise
            except KeyboardInterrupt:
                if save is not None and saved != self.iteration:
                    save(self)
                interrupt = KeyboardInterrupt(f"interrupted after {self.iteration} iterations")
                interrupt.signum = signals.received or signal.SIGINT  # type: ignore[attr-defined]
                raise interrupt from None
            if save is not None and saved != self.iteration:
                save(self)
        return FinetuneResult(
            self.iteration, self.seconds, self.cpu_seconds, self.counters.snapshot(), tuple(self.reports)
        )

    def iterate(self) -> IterationReport:
        """Collect, learn, count."""
        wall, cpu, before = time.perf_counter(), time.process_time(), self.counters.snapshot()
        episodes = self._collect()
        stats = self.learner.update(
            self.buffer, train_actor=self.iteration >= self.config.critic_warmup, generator=self.generator
        )
        self._check_finite(stats)
        self.iteration += 1
        self.seconds += time.perf_counter() - wall
        self.cpu_seconds += time.process_time() - cpu
        spread = self.buffer.returns[self.buffer.valid].var()
        missed = (self.buffer.returns - self.buffer.value)[self.buffer.valid].var()
        stats["explained_variance"] = float(1.0 - missed / spread) if spread > 0 else 0.0
        made = IterationReport(
            iteration=self.iteration,
            seconds=self.seconds,
            cpu_seconds=self.cpu_seconds,
            reward=float(self.buffer.reward[self.buffer.valid].mean()),
            episodes=len(episodes),
            episode_return=float(np.mean([total for total, _ in episodes])) if episodes else None,
            success=_mean([solved for _, solved in episodes if solved is not None]),
            stats=stats,
            counters=self.counters.since(before),
            total=self.counters.snapshot(),
            buffer_bytes=self.buffer.nbytes["total"],
            flat_buffer_bytes=self.buffer.flat_nbytes(self._samples(), ("fpo_actions", "awr_actions")),
        )
        self.reports.append(made)
        return made

    # ------------------------------------------------------------------ collecting

    @torch.no_grad()
    def _collect(self) -> list[tuple[float, bool | None]]:
        """Fill the buffer with S decisions of every environment; return and success of the episodes that ended.

        An observation is encoded once, for its action, its log-probabilities and its value. The observation that an
        episode was cut at, and the last ones of the rollout, are encoded for their value alone.
        """
        seen = self._begin() if self._obs is None else self._obs
        self._obs = None  # whatever is raised on the way: the next collection begins new episodes
        self.buffer.clear()
        episodes: list[tuple[float, bool | None]] = []
        for _ in range(self.config.chunk_steps):
            obs = self._tensors(seen)
            decision, value = self._decide(obs)
            start, stop = self.config.executed or (0, decision.actions.shape[1])
            actions = self.module.denormalize_actions(decision.actions)[:, start:stop]
            result = self.runner.step(actions.float().cpu().numpy())
            self.buffer.add(
                seen, record=decision.record, reward=result.reward, terminated=result.terminated,
                truncated=result.truncated, value=value, final_value=self._final_value(result), valid=result.valid,
                env_steps=result.env_steps,
            )  # fmt: skip
            episodes += self._ended(result)
            seen = result.obs
        last = self._value(self._tensors(seen))
        self.buffer.finish(last, gamma=self.config.gamma, lam=self.config.gae_lambda, scaler=self.scaler)
        if self.config.rescore:
            self._rescore()
        self._obs = seen
        return episodes

    def _begin(self) -> dict[str, np.ndarray]:
        """New episodes in all environments; what was under way counts nowhere any more."""
        self._return[:] = 0.0
        if self.scaler is not None:
            self.scaler.begin()
        # A resumed run starts elsewhere than it began; the factor keeps clear of the seeds of evaluations.
        return self.runner.reset(seed=(self.config.seed * 1_000_003 + self.iteration * 1_000_033) % 2**31)

    def _decide(self, obs: dict[str, Tensor]) -> tuple[Any, Tensor]:
        """Actions, record and value from one encoder pass; from one for each denoising step in the flat form."""
        if self.flat is not None:
            base = None if self.base is None else FlatPolicy(self.base)
            decision = self.algorithm.act(
                self.flat, self.flat.encode(obs), obs=obs, base=base, generator=self.generator
            )
            return decision, self._value(obs)
        features = self.policy.features(obs)
        cache = condition(self.policy, self.algorithm, features)
        decision = self.algorithm.act(self.policy, cache, obs=obs, base=self.base, generator=self.generator)
        return decision, self.critic(obs, features)

    def _rescore(self) -> None:
        """Old log-probabilities of the whole rollout, in batches as the update's."""
        buffer, size = self.buffer, self.config.update.batch_size
        decisions = buffer.decisions * buffer.envs
        for start in range(0, decisions, size):
            index = torch.arange(start, min(start + size, decisions))
            rows = buffer.rows(index)
            if self.flat is not None:
                scored = self.algorithm.rescore(self.flat, self.flat.encode(rows.obs), rows.record)  # type: ignore[attr-defined]
            else:
                cache = condition(self.policy, self.algorithm, self.policy.features(rows.obs))
                scored = self.algorithm.rescore(self.policy, cache, rows.record)  # type: ignore[attr-defined]
            for name, tensor in scored.items():
                buffer.record[name].flatten(0, 1)[index] = tensor.float().cpu()

    def _check_forms(self) -> None:
        config = self.config
        if config.rescore and not callable(getattr(self.algorithm, "rescore", None)):
            raise InvalidArgument(f"LoopConfig: rescore is not for {type(self.algorithm).__name__}")
        joint = getattr(self.algorithm, "joint", False) or hasattr(self.algorithm, "condition")
        if config.update.flat_pairs and joint:
            raise InvalidArgument(
                f"UpdateConfig: flat_pairs is not for {type(self.algorithm).__name__}, which has one ratio a decision"
            )
        if config.peer_passes and (self.base is None or not config.update.flat_pairs):
            raise InvalidArgument("LoopConfig: peer_passes goes with flat_pairs and needs base, the frozen network")

    def _check_actions(self, envs: Any) -> None:
        """Tokens that are scored, those that are executed, and the actions of the environments are the same."""
        shape = getattr(self.algorithm, "shape", None)
        if shape is None:
            return
        start, stop = self.config.executed or (0, shape[0])
        scored = range(shape[0])[executed_tokens(getattr(self.algorithm, "act_steps", None))]
        if scored != range(start, stop):
            raise InvalidArgument(
                f"LoopConfig: executed must be act_steps of {type(self.algorithm).__name__}, the tokens "
                f"[{scored.start}, {scored.stop}) that are scored, got [{start}, {stop})"
            )
        expected, has = (len(scored), *shape[1:]), envs.single_action_space.shape
        if has != expected:
            raise InvalidArgument(
                f"Finetuner: envs must take actions {list(expected)}, the chunks of "
                f"{type(self.algorithm).__name__}, got {envs.single_action_space}"
            )

    def _final_value(self, result: Any) -> Tensor:  # [N]
        """V of the observations at which episodes were cut; 0 elsewhere."""
        found = torch.zeros(self.buffer.envs)
        rows = np.flatnonzero(result.truncated & ~result.terminated & result.valid)
        if len(rows):
            final = {name: values[rows] for name, values in result.final_obs.items()}
            found[torch.from_numpy(rows)] = self._value(self._tensors(final)).float().cpu()
        return found

    def _value(self, obs: Any) -> Tensor:
        value: Tensor = self.critic(obs, None if self.own_encoder else self.policy.features(obs))
        return value

    def _ended(self, result: Any) -> list[tuple[float, bool | None]]:
        self._return += np.where(result.valid, result.reward, 0.0)
        ended = np.flatnonzero(result.ended)
        solved = result.info("is_success", np.nan)
        found = [
            (float(self._return[row]), None if np.isnan(solved[row]) else bool(solved[row]))
            for row in ended
            if result.valid[row]
        ]
        self._return[ended] = 0.0
        return found

    def _tensors(self, obs: Any) -> dict[str, Tensor]:
        """As the buffer keeps them, so that the policy acts on what it learns from."""
        tensors = {name: torch.as_tensor(values).to(self.device) for name, values in obs.items()}
        return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}

    # ------------------------------------------------------------------ ends, checks, state

    def _finished(self) -> bool:
        config = self.config
        if config.max_iterations is not None and self.iteration >= config.max_iterations:
            return True
        return config.max_seconds is not None and self.seconds >= config.max_seconds

    def _samples(self) -> int:
        """K: steps of a chain, or noisings of a decision."""
        steps = getattr(self.algorithm, "steps", None)
        return int(self.algorithm.config.samples if steps is None else steps)  # type: ignore[attr-defined]

    def _check_finite(self, stats: dict[str, float]) -> None:
        wrong = [name for name, value in stats.items() if not np.isfinite(value)]
        weights = (*self.learner.actor_parameters, *self.learner.critic_parameters)
        if wrong or not all(bool(p.isfinite().all()) for p in weights):
            raise NonFinite(
                f"iteration {self.iteration + 1}: {', '.join(wrong) or 'the weights'} became NaN or infinite; nothing "
                "is saved from here on; try a smaller learning rate"
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything that going on needs, but the policy's weights and the environments' states: a resumed run begins
        new episodes."""
        extra = getattr(self.algorithm, "module", None)
        return {
            "iteration": self.iteration, "seconds": self.seconds, "cpu_seconds": self.cpu_seconds,
            "counters": self.counters.to_dict(), "critic": self.critic_module.state_dict(),
            "algorithm": None if extra is None else extra.state_dict(), "learner": self.learner.state_dict(),
            "base": None if self.base is None else self.base.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "generator": self.generator.get_state(), "random": random_state(),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The counterpart of :meth:`state_dict`."""
        self.critic_module.load_state_dict(state["critic"])
        for module, name in ((getattr(self.algorithm, "module", None), "algorithm"), (self.base, "base")):
            if module is not None:
                module.load_state_dict(state[name])
        self.learner.load_state_dict(state["learner"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.generator.set_state(state["generator"])
        set_random_state(state["random"])
        self.counters.reset()
        self.counters.add(**state["counters"])
        self.iteration, self.seconds, self.cpu_seconds = state["iteration"], state["seconds"], state["cpu_seconds"]


def _mean(values: list[bool]) -> float | None:
    return float(np.mean(values)) if values else None


def finetune(
    policy: Any,
    critic: nn.Module,
    algorithm: Algorithm,
    envs: Any,
    config: LoopConfig,
    *,
    base: Any = None,
    device: torch.device | str = "cpu",
    report: Callable[[IterationReport], None] | None = None,
) -> FinetuneResult:
    """Fine-tune ``policy`` in place on any environment; see :class:`Finetuner` for the arguments.

    Example::

        envs = make_vector([lambda: ActionChunk(gymnasium.make("Hopper-v5"), 4)] * 16)
        algorithm = DPPO(transitions, (4, 3))
        critic = SharedCritic(ValueHead(feature_width(policy, obs)))
        finetune(policy, critic, algorithm, envs, LoopConfig(max_iterations=50), report=print)
    """
    return Finetuner(policy, critic, algorithm, envs, config, base=base, device=device).run(report=report)
