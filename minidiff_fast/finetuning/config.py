"""The options of a fine-tuning run. Imports nothing heavy, so that a command line can show them at once."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from minidiff_fast.tasks.pusht.policy import InvalidOption
from minidiff_fast.training.config import Interval, parse_duration, parse_interval

Algo = Literal["dppo", "fpo", "reinflow", "awr"]
DEFAULT_BUDGET = "10m"
"""Training time of a run that names neither a budget nor a number of iterations."""


@dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tune a Push-T policy by reinforcement learning.

    An iteration collects --chunk-steps decisions (action chunks) from each of --envs environments, and makes --epochs
    passes over them in minibatches of --batch-size decisions with their K samples each, or --k of them. An observation
    is encoded once to act and once in each of these passes, whatever K is; the value function's own encoder sees it
    once in collecting and in each of --critic-epochs passes. With --flat-pairs every (decision, sample) pair that is
    learned from encodes its own, as the published code of these methods does.

    The policy is trained on progress towards the goal and a bonus at success; evaluations report the stock score.
    """

    checkpoint: str | None = None
    """Where to start: a checkpoint folder or a run folder of train or finetune. Only --resume goes without."""
    algo: Algo = "dppo"
    """dppo: PPO over denoising chains. fpo: PPO of denoising losses. reinflow: PPO over flows. awr: weighted BC."""
    out: str = "runs/finetune"
    """Run folder: checkpoints, metrics.jsonl, logs. It must be empty or not exist, unless --resume."""
    variant: Literal["stock", "time-limit", "near-goal"] = "stock"
    """The task: stock Push-T (300 steps), a limit of 100 steps, or starts near the goal with that limit."""
    which: Literal["last", "best"] = "last"
    """Of a run folder, which checkpoint to start from."""
    weights: Literal["ema", "model"] = "ema"
    """The averaged weights of the checkpoint, or those of its last step."""
    budget: str | None = None
    """Time to collect and learn (90s, 5m, 1h), without evaluations. Neither this nor --max-iterations: 10m."""
    max_iterations: int | None = None
    """Iterations, more than --critic-warmup."""
    envs: int = 120
    """Environments N that collect side by side."""
    vector: Literal["sync", "async"] = "sync"
    """In this process, or one process each (worth it for slow environments alone)."""
    chunk_steps: int = 50
    """Decisions of each environment in an iteration."""
    denoising_steps: int | None = None
    """D, steps of the sampler, in place of the checkpoint's number of inference steps."""
    fine_tuned_steps: int | None = None
    """dppo: K, the last steps of the chain, which are trained; the first D - K run a frozen copy. None: all."""
    samples: int | None = None
    """fpo, awr: K, (noise, time) pairs of a decision. None: 8."""
    k: int | None = None
    """How many of a decision's K a minibatch takes, drawn anew each time; None: all. Not for reinflow."""
    epochs: int = 3
    """Passes over the decisions of an iteration."""
    critic_epochs: int | None = None
    """The value function's passes. None: 10, or --epochs if more; --epochs for images and with --critic shared."""
    batch_size: int = 2000
    """B, decisions of a minibatch."""
    rows_per_pass: int | None = None
    """Decisions that run at once: fewer need less memory, the expected gradient is the same. None: --batch-size."""
    lr: float | None = None
    """Learning rate of the policy (AdamW); None: 3e-4 for dppo, 1e-4 for the others."""
    critic_lr: float = 1e-3
    """Learning rate of the value function (AdamW)."""
    critic: Literal["own", "shared"] = "own"
    """own: the value function has its own encoder; shared: it reads the policy's (detached) features."""
    critic_warmup: int = 2
    """Iterations at the beginning that train the value function alone."""
    gamma: float = 0.95
    """Discount per decision."""
    gae_lambda: float = 0.9
    """Lambda of the generalised advantage estimate."""
    gamma_denoising: float = 0.95
    """dppo: discount of the advantage per denoising step before the last."""
    clip: float | None = None
    """Clip range of the ratio; None: 0.1 for dppo, 0.002 for fpo, 0.01 for reinflow."""
    clip_base: float = 0.01
    """dppo: clip range at the noisiest fine-tuned step."""
    min_std: float = 0.04
    """Least standard deviation of a step in collecting, in normalised actions. reinflow learns up to 2.4 times it."""
    awr_beta: float = 1.0
    """awr: inverse temperature of the weights exp(beta A)."""
    target_kl: float = 1.0
    """Not awr: above this KL of a minibatch, the policy learns no more from the iteration. fpo's KL is far smaller."""
    bc_weight: float = 0.0
    """dppo, reinflow: weight of the term that keeps the policy near the one it began as."""
    reward_scaling: bool = False
    """Divide rewards by the running standard deviation of the return, clipped at 10."""
    flat_pairs: bool = False
    """dppo, awr: encode the observation again for every denoising step, as published code does: for comparison."""
    peer_passes: bool = False
    """dppo with --flat-pairs: also the passes that DPPO's code makes without using, or makes twice."""
    eval_every: str = "auto"
    """How often to evaluate: 5 (iterations), 2m (training time), none; auto is 5 times a run."""
    eval_episodes: int = 100
    """Episodes of these evaluations."""
    eval_seed: int = 200_000
    """First start of these evaluations, other starts than the 100000.. on which results are reported."""
    eval_sampler: Literal["deterministic", "stochastic"] = "deterministic"
    """Evaluations: no noise after the initial one, or the noise of --min-std at every step."""
    checkpoint_every: str = "5m"
    """How often to write a checkpoint: 20 (iterations), 2m (training time), none; always at the end."""
    keep: int = 2
    """Checkpoints to keep, beside the best."""
    log: str = "tensorboard"
    """tensorboard or none. metrics.jsonl is always written."""
    seed: int = 0
    """Of environments, noise, minibatches and the value function's first weights."""
    num_threads: int | None = 1
    """Threads of torch on the CPU; None leaves torch's choice."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the policy learns. auto: a GPU if there is one."""
    resume: bool = False
    """Go on from the last checkpoint in the run folder."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        least: dict[str, float] = {
            "max_iterations": 1, "envs": 1, "chunk_steps": 1, "denoising_steps": 1, "fine_tuned_steps": 1, "samples": 1,
            "k": 1, "epochs": 1, "critic_epochs": 1, "batch_size": 1, "rows_per_pass": 1, "critic_warmup": 0,
            "eval_episodes": 1, "eval_seed": 0, "keep": 1, "seed": 0, "num_threads": 1, "gamma": 0.0, "gae_lambda": 0.0,
            "gamma_denoising": 0.0, "clip_base": 0.0, "bc_weight": 0.0,
        }  # fmt: skip
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= low):
                raise InvalidOption(f"{_flag(name)} must be at least {low:g}, got {value}")
        for name in ("lr", "critic_lr", "clip", "min_std", "target_kl", "awr_beta"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0.0):
                raise InvalidOption(f"{_flag(name)} must be above 0, got {value}")
        for name in ("gamma", "gae_lambda", "gamma_denoising"):
            if getattr(self, name) > 1.0:
                raise InvalidOption(f"{_flag(name)} must be at most 1, got {getattr(self, name)}")
        for name, annotation in get_type_hints(FinetuneConfig).items():
            choices = get_args(annotation)
            if get_origin(annotation) is Literal and getattr(self, name) not in choices:
                raise InvalidOption(f"{_flag(name)} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.log not in ("tensorboard", "none"):
            raise InvalidOption(f"--log must be tensorboard or none, got {self.log!r}")
        if self.critic_epochs is not None and self.critic_epochs < self.epochs:
            raise InvalidOption(f"--critic-epochs must be at least --epochs {self.epochs}, got {self.critic_epochs}")
        if self.max_iterations is not None and self.critic_warmup >= self.max_iterations:
            raise InvalidOption(
                f"--critic-warmup must be below --max-iterations {self.max_iterations}, got {self.critic_warmup}: "
                "every iteration would train the value function alone; for a short look give --critic-warmup 0"
            )
        if self.peer_passes and not self.flat_pairs:
            raise InvalidOption("--peer-passes goes with --flat-pairs")
        allowed = {
            "fine_tuned_steps": ("dppo",), "peer_passes": ("dppo",), "bc_weight": ("dppo", "reinflow"),
            "flat_pairs": ("dppo", "awr"), "samples": ("fpo", "awr"), "clip": ("dppo", "fpo", "reinflow"),
            "gamma_denoising": ("dppo",), "clip_base": ("dppo",), "awr_beta": ("awr",),
            "target_kl": ("dppo", "fpo", "reinflow"),
        }  # fmt: skip
        default = {field.name: field.default for field in fields(self)}
        for name, algos in allowed.items():
            if self.algo not in algos and getattr(self, name) != default[name]:
                raise InvalidOption(f"{_flag(name)} is an option of {' and '.join(algos)}, got --algo {self.algo}")
        if self.clip is not None and self.algo == "dppo" and self.clip_base > self.clip:
            raise InvalidOption(f"--clip-base must be at most --clip {self.clip}, got {self.clip_base}")
        if self.checkpoint is None and not self.resume:
            raise InvalidOption("--checkpoint must name the checkpoint or run folder to start from, got none")
        if not self.out.strip() or not (self.checkpoint is None or self.checkpoint.strip()):
            raise InvalidOption("--out and --checkpoint must name folders, got an empty string")
        if self.seed >= 2**31:
            raise InvalidOption(f"--seed must be below 2**31, got {self.seed}")
        _ = self.budget_seconds
        parse_interval("--eval-every", self.eval_every)
        parse_interval("--checkpoint-every", self.checkpoint_every)

    @property
    def budget_seconds(self) -> float | None:
        """Training time in seconds; None where ``max_iterations`` alone ends the run."""
        if self.budget is None or self.budget == "none":
            return None if self.max_iterations is not None else parse_duration("--budget", DEFAULT_BUDGET)
        return parse_duration("--budget", self.budget)

    def interval(self, name: Literal["eval_every", "checkpoint_every"]) -> Interval:
        """How often to evaluate or write a checkpoint."""
        found = parse_interval(_flag(name), getattr(self, name))
        if found is not None:
            return found
        if self.max_iterations is not None:
            return Interval(-(-self.max_iterations // 5), None)
        return Interval(None, (self.budget_seconds or 0.0) / 5)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return asdict(self)


RESUMABLE = frozenset(
    (
        "out", "budget", "max_iterations", "rows_per_pass", "vector", "eval_every",
        "eval_episodes", "eval_seed", "eval_sampler", "checkpoint_every", "keep", "log", "num_threads", "device",
        "resume", "progress",
    )
)  # fmt: skip
"""What may differ when a run is resumed."""


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
