"""Imitation by denoising: DDPM (epsilon, sample, v) and flow matching, on Level-2 batches.

A *process* says how a clean sample becomes a noisy one and what the network is asked for; it is an explicit object
because conventions differ (which end of time is noise, what the target's sign is). :class:`DenoisingLoss` is the
same for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.level2 import Drawn, Level2Batch, Noised
from minidiff_fast.ops.box_muller import rounded_sqrt
from minidiff_fast.ops.denoising_loss import denoising_loss
from minidiff_fast.ops.level2_noise import Level2Noise, NoiseDraw, TimestepDraw, level2_noise
from minidiff_fast.policy import Policy
from minidiff_fast.transitions import DDIMTransitions, FlowTransitions, Transitions

PredictionType = Literal["epsilon", "sample", "v_prediction"]


@dataclass(frozen=True, eq=False)
class DiffusionProcess:
    r"""Variance-preserving diffusion in discrete time: ``x_t = sqrt(ab_t) x0 + sqrt(1 - ab_t) eps``.

    Targets: ``epsilon`` eps; ``sample`` x0; ``v_prediction`` ``sqrt(ab_t) eps - sqrt(1 - ab_t) x0``.

    Sources: Ho et al., arXiv 2006.11239; v: Salimans and Ho, arXiv 2202.00512.

    >>> process = DiffusionProcess(torch.tensor([0.9, 0.5, 0.1]), "epsilon")
    >>> x0, eps = torch.zeros(1, 1, 2), torch.ones(1, 3, 1, 2)
    >>> process.noised(x0, eps, torch.tensor([[0, 1, 2]])).x[0, :, 0, 0].round(decimals=3)
    tensor([0.3160, 0.7070, 0.9490])
    """

    alphas_cumprod: Tensor
    """[steps] float: the share of signal variance ab_t left at timestep t, in [0, 1]."""
    prediction_type: PredictionType = "epsilon"
    """What the network predicts."""
    _on: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        ab = self.alphas_cumprod
        if self.prediction_type not in get_args(PredictionType):
            raise InvalidArgument(
                f"DiffusionProcess: prediction_type must be one of {', '.join(get_args(PredictionType))}, "
                f"got {self.prediction_type!r}"
            )
        if ab.dim() != 1 or ab.numel() < 1 or not bool(((ab > -1e-6) & (ab <= 1.0)).all()):
            raise InvalidArgument(
                f"DiffusionProcess: alphas_cumprod must be [steps] with values in [0, 1], got {list(ab.shape)}"
            )

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> DiffusionProcess:
        """The process of a diffusers scheduler (DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler, ...)."""
        ab = getattr(scheduler, "alphas_cumprod", None)
        if not isinstance(ab, Tensor):
            raise InvalidArgument(
                f"DiffusionProcess.from_scheduler: {type(scheduler).__name__} has no alphas_cumprod; "
                "flow-matching schedulers go with FlowMatching"
            )
        return cls(ab.detach().clone().float(), scheduler.config.prediction_type)

    @property
    def num_train_timesteps(self) -> int:
        """Timesteps are the integers below this."""
        return self.alphas_cumprod.numel()

    def draw_timesteps(
        self, shape: tuple[int, int], *, device: torch.device, generator: torch.Generator | None = None
    ) -> Tensor:
        """Uniform integers in [0, num_train_timesteps), int64 ``[B, K]``."""
        return torch.randint(0, self.num_train_timesteps, shape, device=device, generator=generator)

    def draw(
        self,
        x0: Tensor,  # [B, T, A]
        k: int,
        *,
        seed: Tensor,  # [1] int64
        timesteps: TimestepDraw = "iid",
        noise: NoiseDraw = "iid",
    ) -> Drawn:
        """Draw K times and noises for every condition and noise with them, in one pass: what :meth:`noised` gives."""
        drawn = level2_noise(
            x0, k, schedule=self._schedule(x0.device), prediction=self.prediction_type, timesteps=timesteps,
            noise=noise, seed=seed, return_noise=True,
        )  # fmt: skip
        return _drawn(x0, drawn, drawn.timesteps, self)

    def _schedule(self, device: torch.device) -> Tensor:
        if device not in self._on:
            self._on[device] = self.alphas_cumprod.to(device, torch.float32)
        return self._on[device]

    def noised(
        self,
        x0: Tensor,  # [B, T, A]
        noise: Tensor,  # [B, K, T, A]
        t: Tensor,  # [B, K] int64
    ) -> Noised:
        """Noise every condition's clean sample K times with noise at hand, in float32."""
        if t.is_floating_point():
            raise InvalidArgument(f"DiffusionProcess: timesteps must be integers, got {t.dtype}")
        ab = self._schedule(t.device)[t][:, :, None, None]
        signal, spread = rounded_sqrt(ab.clamp(min=0.0)), rounded_sqrt(1.0 - ab)
        clean, eps = x0[:, None].float(), noise.float()
        x = signal * clean + spread * eps
        if self.prediction_type == "epsilon":
            target = eps
        elif self.prediction_type == "sample":
            target = clean.expand_as(eps)
        else:
            target = signal * eps - spread * clean
        return Noised(x.to(x0.dtype), t, target)


@dataclass(frozen=True)
class BetaTimes:
    r"""The quantile function of ``start + (stop - start) * u`` with u of a Beta(alpha, beta) distribution.

    pi0 and SmolVLA draw ``0.001 + 0.999 u`` with u ~ Beta(1.5, 1), noise at t = 1; GR00T and starVLA's heads
    ``(0.999 - u) / 0.999`` with noise at t = 0. In closed form where alpha or beta is 1:
    :math:`p^{1 / alpha}` and :math:`1 - (1 - p)^{1 / beta}`.

    Raises :class:`InvalidArgument` where neither is 1 or one is not positive.

    Source: Black et al., pi0, arXiv 2410.24164, appendix B.

    >>> BetaTimes(1.5, start=0.001, stop=1.0)(torch.tensor([0.0, 0.125, 1.0]))
    tensor([0.0010, 0.2508, 1.0000])
    """

    alpha: float
    beta: float = 1.0
    start: float = 0.0
    """The time of u = 0."""
    stop: float = 1.0
    """The time of u = 1; may lie before start."""

    def __post_init__(self) -> None:
        if not (self.alpha > 0 and self.beta > 0 and 1 in (self.alpha, self.beta)):
            raise InvalidArgument(
                "BetaTimes: alpha and beta must be positive and one of them 1 (else the quantile function has no "
                f"closed form), got alpha = {self.alpha}, beta = {self.beta}"
            )

    def __call__(self, p: Tensor) -> Tensor:
        """Probabilities -> times."""
        u = p ** (1 / self.alpha) if self.beta == 1 else 1 - (1 - p) ** (1 / self.beta)
        return self.start + (self.stop - self.start) * u


@dataclass(frozen=True)
class FlowMatching:
    r"""Linear interpolation between data and noise, the network predicts the velocity dx/dt.

    With the noise at t = 1: ``x_t = (1 - t) x0 + t eps``, target ``eps - x0``. With the noise at t = 0:
    ``x_t = t x0 + (1 - t) eps``, target ``x0 - eps``.

    Sources: Lipman et al., arXiv 2210.02747; Liu et al. (rectified flow), arXiv 2209.03003.
    """

    noise_at: Literal[0, 1] = 1
    """Which end of time is noise. 1 is the convention of diffusers' FlowMatchEulerDiscreteScheduler and of pi0."""
    timestep_scale: float = 1000.0
    """The network sees t * timestep_scale, as sinusoidal embeddings made for integer timesteps need."""
    time_quantile: Callable[[Tensor], Tensor] | None = None
    """How times are distributed: the quantile function (the inverse of the cumulative distribution), which maps uniform
    draws in [0, 1) to times, e.g. :class:`BetaTimes`; None is uniform. Stratified draws stay stratified."""

    def __post_init__(self) -> None:
        if self.noise_at not in (0, 1):
            raise InvalidArgument(f"FlowMatching: noise_at must be 0 or 1, got {self.noise_at!r}")

    def draw_timesteps(
        self, shape: tuple[int, int], *, device: torch.device, generator: torch.Generator | None = None
    ) -> Tensor:
        """Times, float32 ``[B, K]``."""
        uniform = torch.rand(shape, device=device, generator=generator)
        return uniform if self.time_quantile is None else self.time_quantile(uniform)

    def draw(
        self,
        x0: Tensor,  # [B, T, A]
        k: int,
        *,
        seed: Tensor,  # [1] int64
        timesteps: TimestepDraw = "iid",
        noise: NoiseDraw = "iid",
    ) -> Drawn:
        """Draw K times and noises for every condition and noise with them, in one pass: what :meth:`noised` gives."""
        drawn = level2_noise(
            x0, k, schedule=None, prediction="flow", noise_at=self.noise_at, timesteps=timesteps, noise=noise,
            seed=seed, return_noise=True,
        )  # fmt: skip
        if self.time_quantile is None:
            return _drawn(x0, drawn, drawn.timesteps * self.timestep_scale, self)
        assert drawn.noise is not None
        times = self.time_quantile(drawn.timesteps)
        return Drawn(x0, times, drawn.noise, self.noised(x0, drawn.noise, times), self)

    def noised(
        self,
        x0: Tensor,  # [B, T, A]
        noise: Tensor,  # [B, K, T, A]
        t: Tensor,  # [B, K] float, in [0, 1]
    ) -> Noised:
        """Noise every condition's clean sample K times with noise at hand, in float32."""
        if not t.is_floating_point():
            raise InvalidArgument(f"FlowMatching: times must be floats in [0, 1], got {t.dtype}")
        level = (t if self.noise_at == 1 else 1.0 - t).float()[:, :, None, None]
        clean, eps = x0[:, None].float(), noise.float()
        x = (1.0 - level) * clean + level * eps
        velocity = eps - clean if self.noise_at == 1 else clean - eps
        return Noised(x.to(x0.dtype), t * self.timestep_scale, velocity)


def _drawn(x0: Tensor, drawn: Level2Noise, t: Tensor, process: DiffusionProcess | FlowMatching) -> Drawn:
    """What the op gave, as a batch carries it; ``t`` is the network's time input."""
    assert drawn.noise is not None
    return Drawn(x0, drawn.timesteps, drawn.noise, Noised(drawn.x, t, drawn.target), process)


@dataclass(frozen=True, eq=False)
class DenoisingLoss:
    r"""The mean squared error of the prediction, per sample: ``l_bk = w_bk mean_{t: mask} mean_a (pred - target)^2``.

    The mean over a sample's T action tokens counts the tokens that ``batch.mask`` marks; the sum is float32.
    """

    process: DiffusionProcess | FlowMatching
    """How samples are noised and what is predicted."""

    def draw(
        self,
        actions: Tensor,  # [B, T, A]
        k: int,
        *,
        seed: Tensor,  # [1] int64
        timesteps: TimestepDraw = "iid",
        noise: NoiseDraw = "iid",
    ) -> Drawn:
        """Times, noise and noised samples, K for every condition, from the process."""
        return self.process.draw(actions, k, seed=seed, timesteps=timesteps, noise=noise)

    def per_sample(
        self, denoise: Callable[[Any, Tensor, Tensor], Tensor], cache: Any, batch: Level2Batch
    ) -> Tensor:  # [B, K] float32 (float64 for float64 predictions)
        """The loss of every sample of ``batch``, weights applied.

        Raises:
            InvalidArgument: the prediction is not of the noise's shape.
        """
        noised = batch.noised(self.process)
        prediction = denoise(cache, noised.x, noised.t)
        if prediction.shape != noised.target.shape:
            raise InvalidArgument(
                f"DenoisingLoss: denoise must return [B, K, T, A] = {list(noised.target.shape)}, "
                f"got {list(prediction.shape)}"
            )
        return denoising_loss(prediction, noised.target, weight=batch.weight, mask=batch.mask)


def il_loss(
    policy: Policy,
    cache: Any,
    a0: Tensor,  # [B, T, A], normalised
    *,
    k: int | None = None,
    process: DiffusionProcess | FlowMatching,
    weight: Tensor | None = None,  # [B] or [B, K]
    mask: Tensor | None = None,  # [B, T] bool
    t: Tensor | None = None,  # [B, K]
    noise: Tensor | None = None,  # [B, K, T, A]
    reduction: Literal["mean", "none"] = "mean",
    generator: torch.Generator | None = None,
) -> Tensor:  # [] or [B, K]
    r"""The denoising loss of K noised samples of each of B actions, from conditions encoded by the caller.

    :math:`l_{bk} = w_{bk} \| \mathrm{denoise}(c_b, x_{bk}, t_{bk}) - target_{bk} \|^2` (a mean over tokens and action
    dimensions), and their mean. See :class:`DenoisingLoss`.

    Args:
        policy: its ``denoise`` runs once, on B * K rows.
        cache: what ``policy.encode`` gave for the B conditions.
        a0: the clean actions, one sequence a condition.
        k: samples drawn per condition; leave out where ``t`` and ``noise`` are given.
        process: how samples are noised and what is predicted.
        weight: factor on each condition's, or each sample's, loss; the mean still divides by B * K.
        mask: True where an action token counts.
        t, noise: the process's times and standard normal noise; both, or neither and they are drawn.
        reduction: ``"none"`` gives ``[B, K]``.
        generator: the only source of randomness.

    Raises:
        InvalidArgument: one of ``t`` and ``noise`` alone, neither these nor ``k``, shapes that do not fit.
    """
    if (t is None) != (noise is None):
        raise InvalidArgument("il_loss: t and noise belong together: give both, or neither and k")
    if reduction not in ("mean", "none"):
        raise InvalidArgument(f"il_loss: reduction must be 'mean' or 'none', got {reduction!r}")
    samples = k if t is None else t.shape[-1]
    if samples is None or (k is not None and k != samples):
        raise InvalidArgument(f"il_loss: k, the samples per condition, must be {samples or 'given without t'}, got {k}")
    if weight is not None and weight.dim() == 1:
        weight = weight[:, None].expand(-1, samples)
    objective = DenoisingLoss(process)
    if t is None or noise is None:
        batch = Level2Batch.draw(None, a0, samples, objective, generator=generator, weight=weight, mask=mask)
    else:
        batch = Level2Batch(None, a0, t, noise, weight=weight, mask=mask)
    loss = objective.per_sample(policy.denoise, cache, batch)
    return loss.mean() if reduction == "mean" else loss


def check_sampler(where: str, transitions: Transitions, process: DiffusionProcess | FlowMatching) -> None:
    """Raise :class:`InvalidArgument` where a sampler and a process speak of different times or predictions."""
    if isinstance(transitions, FlowTransitions) and isinstance(process, FlowMatching):
        ours = (transitions.noise_at, transitions.timestep_scale)
        theirs = (process.noise_at, process.timestep_scale)
        if ours != theirs:
            raise InvalidArgument(
                f"{where}: sampler and process must share (noise_at, timestep_scale), got {ours} and {theirs}; "
                "FlowTransitions.from_process takes them over"
            )
    elif isinstance(transitions, DDIMTransitions) and isinstance(process, DiffusionProcess):
        if transitions.prediction_type != process.prediction_type:
            raise InvalidArgument(
                f"{where}: sampler and process must share prediction_type, got {transitions.prediction_type!r} and "
                f"{process.prediction_type!r}"
            )
    elif isinstance(transitions, FlowTransitions | DDIMTransitions):
        raise InvalidArgument(
            f"{where}: {type(transitions).__name__} does not sample what {type(process).__name__} trains"
        )
