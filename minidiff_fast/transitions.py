r"""The denoising steps of a sampler as Gaussians: what a policy gradient through the chain needs.

A sampler with D steps takes the initial noise :math:`x_0` to the actions :math:`x_D`; step i (0 is the noisiest) draws
:math:`x_{i+1} \sim N(\mu_i, \sigma_i^2)` around the mean that the network's prediction at :math:`(x_i, t_i)` gives.
Sampling and scoring read times and moments from one object, through :func:`step_moments`, so that they cannot differ.

Sources: DDPM, Ho et al., arXiv 2006.11239; DDIM, Song et al., arXiv 2010.02502; as policies, Ren et al. (DPPO),
arXiv 2409.00588; flows with injected noise, Zhang et al. (ReinFlow), arXiv 2505.22094.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from minidiff_fast.errors import InvalidArgument

if TYPE_CHECKING:
    from minidiff_fast.objectives.imitation import FlowMatching
    from minidiff_fast.policy import Policy

PredictionType = Literal["epsilon", "sample", "v_prediction"]

ActSteps = int | tuple[int, int] | None
"""The action tokens that are executed, and alone count: the first n, or places [start, stop); None is all of them."""

NoiseStd = Callable[[Any, Tensor], Tensor]
"""(cache, index [B, K]) -> standard deviation, broadcastable to [B, K, T, A]: learned exploration noise (ReinFlow)."""


class Moments(NamedTuple):
    """The Gaussian of one denoising step."""

    mean: Tensor
    """[B, K, T, A], float32 at least."""
    std: Tensor
    """[B, K, 1, 1] or [B, K, T, A]: the sampler's own standard deviation; may be 0, see ``min_std`` of the callers."""
    saturated: Tensor
    """[B, K]: the share of the clean sample's entries that the clamp holds, and that give no gradient."""


class Transitions(Protocol):
    """A sampler of ``steps`` Gaussian denoising steps."""

    @property
    def steps(self) -> int:
        """D."""

    def times(self, device: torch.device) -> Tensor:
        """[D]: the time input of the network at each step, noisiest first."""

    def moments(
        self,
        x: Tensor,  # [B, K, T, A]
        prediction: Tensor,  # [B, K, T, A]
        index: Tensor,  # [B, K] int64, in [0, D)
    ) -> Moments:
        """Mean and standard deviation of the next sample."""

    def deterministic(self) -> Transitions:
        """The same sampler without noise: what acts in an evaluation."""


@dataclass(frozen=True, eq=False)
class DDIMTransitions:
    r"""DDIM between the timesteps of a diffusers scheduler, from the noisiest to the clean sample.

    With ab, ab' the signal variances at this timestep and the next (1 after the last), x0 the clean sample read off the
    prediction and clamped, and eps recomputed from the clamped x0:

    .. math::
        \epsilon = (x - \sqrt{ab}\, x_0) / \sqrt{1 - ab}, \quad
        \sigma = \eta \sqrt{\tfrac{1 - ab'}{1 - ab} \left(1 - \tfrac{ab}{ab'}\right)}, \quad
        \mu = \sqrt{ab'}\, x_0 + \sqrt{1 - ab' - \sigma^2}\, \epsilon

    eta = 1 over all timesteps is DDPM: sigma^2 is then the variance of its posterior. eta = 0 is the deterministic
    sampler; it changes the mean, too. The square roots are taken in float64 and kept in the dtype of the samples.

    Raises:
        InvalidArgument: an unknown prediction_type, eta or clip_sample out of range, tables of other shapes, signal
            variances that do not increase within [0, 1), and epsilon from a first step without signal, whose clean
            sample it does not determine.
    """

    timesteps: Tensor
    """[D] int64, decreasing: the network's time input."""
    alphas_cumprod: Tensor
    """[D + 1]: ab at each timestep and after the last step; from a diffusers scheduler its own float32 values."""
    prediction_type: PredictionType
    """What the network predicts."""
    eta: float = 1.0
    """Share of the posterior's standard deviation that is drawn, in [0, 1]."""
    clip_sample: float | None = 1.0
    """The clean sample is clamped to [-clip_sample, clip_sample]; None does not clamp."""
    _on: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.prediction_type not in get_args(PredictionType):
            raise InvalidArgument(
                f"DDIMTransitions: prediction_type must be one of {', '.join(get_args(PredictionType))}, "
                f"got {self.prediction_type!r}"
            )
        if not 0.0 <= self.eta <= 1.0:
            raise InvalidArgument(f"DDIMTransitions: eta must be in [0, 1], got {self.eta}")
        if self.clip_sample is not None and not self.clip_sample > 0.0:
            raise InvalidArgument(f"DDIMTransitions: clip_sample must be above 0 or None, got {self.clip_sample}")
        steps, ab = self.timesteps.numel(), self.alphas_cumprod
        if self.timesteps.dim() != 1 or steps < 1 or ab.shape != (steps + 1,):
            raise InvalidArgument(
                "DDIMTransitions: timesteps must be [D] and alphas_cumprod [D + 1] with D >= 1, got "
                f"{list(self.timesteps.shape)} and {list(ab.shape)}"
            )
        if not bool((ab.diff() > 0).all()) or not (float(ab[0]) >= 0.0 and float(ab[-1]) <= 1.0):
            raise InvalidArgument(
                "DDIMTransitions: alphas_cumprod must increase within [0, 1] from the noisiest step to after the last "
                f"(a scheduler with set_alpha_to_one=False and steps_offset=0 ends with a step that does nothing), got "
                f"{float(ab[0]):.3g} to {float(ab[-2]):.6g} and {float(ab[-1]):.6g} after the last"
            )
        if self.prediction_type == "epsilon" and float(ab[0]) == 0.0:
            raise InvalidArgument(
                "DDIMTransitions: alphas_cumprod is 0 at the first step, where epsilon says nothing about the sample; "
                "such schedules go with prediction_type sample or v_prediction"
            )

    @classmethod
    def from_scheduler(
        cls, scheduler: Any, steps: int, *, eta: float = 1.0, clip_sample: float | None = 1.0
    ) -> DDIMTransitions:
        """The ``steps`` timesteps that a diffusers scheduler (DDIMScheduler, DDPMScheduler) would visit.

        The scheduler is not changed. Its schedule, spacing and prediction type are read; eta and clip_sample are given
        here. A step leads to the next of these timesteps, also where their spacing is uneven.

        Raises :class:`InvalidArgument` for a scheduler without ``alphas_cumprod`` or with dynamic thresholding, and for
        more steps than it was trained with.
        """
        name = f"{cls.__name__}.from_scheduler"
        ab = getattr(scheduler, "alphas_cumprod", None)
        if not isinstance(ab, Tensor):
            raise InvalidArgument(
                f"{name}: {type(scheduler).__name__} has no alphas_cumprod; flow-matching schedulers go with "
                "FlowTransitions"
            )
        if getattr(scheduler.config, "thresholding", False):
            raise InvalidArgument(f"{name}: thresholding is not a step of these; use clip_sample")
        trained = scheduler.config.num_train_timesteps
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= trained:
            raise InvalidArgument(f"{name}: steps must be an int in [1, {trained}], got {steps!r}")
        own = copy.copy(scheduler)
        own.set_timesteps(steps)
        timesteps = own.timesteps.detach().cpu().long()
        ab = ab.detach().cpu()
        last = torch.as_tensor(getattr(scheduler, "final_alpha_cumprod", 1.0), dtype=ab.dtype).cpu().reshape(1)
        return cls(timesteps, torch.cat([ab[timesteps], last]), scheduler.config.prediction_type, eta, clip_sample)

    @property
    def steps(self) -> int:
        """D."""
        return self.timesteps.numel()

    def times(self, device: torch.device) -> Tensor:
        """[D] int64."""
        if device not in self._on:
            self._on[device] = self.timesteps.to(device)
        times: Tensor = self._on[device]
        return times

    def deterministic(self) -> DDIMTransitions:
        """eta = 0, in the noise and in the mean."""
        return replace(self, eta=0.0)

    def moments(
        self,
        x: Tensor,  # [B, K, T, A]
        prediction: Tensor,  # [B, K, T, A]
        index: Tensor,  # [B, K] int64, in [0, D)
    ) -> Moments:
        """See the class. In float32, float64 where x or the prediction is."""
        dtype = _working_dtype(x, prediction)
        x, prediction = x.to(dtype), prediction.to(dtype)
        rows = self._table(x.device, dtype)[:, index][..., None, None]  # [5, B, K, 1, 1]
        signal, spread, next_signal, direction, std = rows.unbind()
        if self.prediction_type == "epsilon":
            clean = (x - spread * prediction) / signal
        elif self.prediction_type == "sample":
            clean = prediction
        else:
            clean = signal * x - spread * prediction
        saturated = torch.zeros_like(x[..., 0, 0])
        if self.clip_sample is not None:
            saturated = (clean.detach().abs() > self.clip_sample).to(dtype).mean((-2, -1))
            clean = clean.clamp(-self.clip_sample, self.clip_sample)
        epsilon = (x - signal * clean) / spread
        return Moments(next_signal * clean + direction * epsilon, std, saturated)

    def _table(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """[5, D]: sqrt(ab), sqrt(1 - ab), sqrt(ab'), the factor of epsilon, sigma."""
        if (device, dtype) not in self._on:
            ab, ab_next = self.alphas_cumprod.double().cpu()[:-1], self.alphas_cumprod.double().cpu()[1:]
            variance = self.eta**2 * (1.0 - ab_next) / (1.0 - ab) * (1.0 - ab / ab_next)
            squares = torch.stack([ab, 1.0 - ab, ab_next, (1.0 - ab_next - variance).clamp(min=0.0), variance])
            self._on[device, dtype] = squares.sqrt().to(device, dtype)
        table: Tensor = self._on[device, dtype]
        return table


class DDPMTransitions(DDIMTransitions):
    """Ancestral sampling: the posterior of DDPM, which is DDIM with eta = 1."""

    @classmethod
    def from_scheduler(  # type: ignore[override]
        cls, scheduler: Any, steps: int | None = None, *, clip_sample: float | None = 1.0
    ) -> DDPMTransitions:
        """All training timesteps of a diffusers scheduler, or ``steps`` of them.

        Raises :class:`InvalidArgument` for a ``variance_type`` that is not the posterior's, beside what DDIM's raises.
        """
        variance = getattr(scheduler.config, "variance_type", "fixed_small")
        if variance not in ("fixed_small", "fixed_small_log"):
            raise InvalidArgument(
                "DDPMTransitions.from_scheduler: variance_type must be fixed_small or fixed_small_log, the variance of "
                f"the posterior, got {variance!r}"
            )
        chosen = scheduler.config.num_train_timesteps if steps is None else steps
        made = super().from_scheduler(scheduler, chosen, eta=1.0, clip_sample=clip_sample)
        assert isinstance(made, DDPMTransitions)
        return made


@dataclass(frozen=True)
class FlowTransitions:
    r"""Euler steps of a flow, each with Gaussian noise: :math:`x_{i+1} \sim N(x_i + v\,\Delta t, \sigma^2)`.

    The times are D equal steps from noise to data; the network sees them times ``timestep_scale``.

    Source: Zhang et al. (ReinFlow), arXiv 2505.22094.
    """

    steps: int
    """D."""
    std: float = 0.0
    """Standard deviation of every step's noise; ReinFlow learns one instead."""
    noise_at: Literal[0, 1] = 1
    """Which end of time is noise, as in :class:`~minidiff_fast.objectives.imitation.FlowMatching`."""
    timestep_scale: float = 1000.0
    """The network sees t * timestep_scale."""

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise InvalidArgument(f"FlowTransitions: steps must be an int >= 1, got {self.steps!r}")
        if not self.std >= 0.0:
            raise InvalidArgument(f"FlowTransitions: std must be at least 0, got {self.std}")
        if self.noise_at not in (0, 1):
            raise InvalidArgument(f"FlowTransitions: noise_at must be 0 or 1, got {self.noise_at!r}")

    @classmethod
    def from_process(cls, process: FlowMatching, steps: int, *, std: float = 0.0) -> FlowTransitions:
        """The sampler that belongs to how the policy was trained."""
        return cls(steps, std, process.noise_at, process.timestep_scale)

    def times(self, device: torch.device) -> Tensor:
        """[D] float32, as the network sees them."""
        share = torch.arange(self.steps, device=device, dtype=torch.float32) / self.steps  # of the way to the data
        t = 1.0 - share if self.noise_at == 1 else share
        return t * self.timestep_scale

    def deterministic(self) -> FlowTransitions:
        """Without noise."""
        return replace(self, std=0.0)

    def moments(
        self,
        x: Tensor,  # [B, K, T, A]
        prediction: Tensor,  # [B, K, T, A], the velocity dx/dt
        index: Tensor,  # [B, K] int64; every step is the same
    ) -> Moments:
        """See the class. In float32, float64 where x or the prediction is."""
        dtype = _working_dtype(x, prediction)
        towards_data = -1.0 if self.noise_at == 1 else 1.0
        mean = x.to(dtype) + towards_data / self.steps * prediction.to(dtype)
        std = torch.full_like(mean[..., :1, :1], self.std)
        return Moments(mean, std, torch.zeros_like(mean[..., 0, 0]))


def _working_dtype(x: Tensor, prediction: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, prediction.dtype), torch.float32)


def step_moments(
    policy: Policy,
    cache: Any,
    x: Tensor,  # [B, K, T, A]
    index: Tensor,  # [B, K] int64, in [0, D)
    *,
    transitions: Transitions,
    noise_std: NoiseStd | None = None,
) -> Moments:
    """Run the network at ``x`` and the step's own time, and read the Gaussian of the step off its prediction.

    Raises :class:`InvalidArgument` where the network or ``noise_std`` returns a shape that would only broadcast.
    """
    times = transitions.times(x.device)
    prediction = policy.denoise(cache, x.to(_network_dtype(cache, x)), times[index])
    if prediction.shape != x.shape:
        raise InvalidArgument(
            f"policy.denoise must return [B, K, T, A] = {list(x.shape)}, got {list(prediction.shape)}"
        )
    moments = transitions.moments(x, prediction, index)
    if noise_std is None:
        return moments
    std = noise_std(cache, index)
    if std.dim() != x.dim() or any(have not in (1, want) for have, want in zip(std.shape, x.shape, strict=True)):
        raise InvalidArgument(
            f"noise_std must return [B, K, T, A] = {list(x.shape)}, 1 where it is the same, got {list(std.shape)}"
        )
    return moments._replace(std=std)


def _network_dtype(cache: Any, x: Tensor) -> torch.dtype:
    """The dtype of the encoded condition, which is that of the network's weights; autocast sees to it by itself."""
    if torch.is_autocast_enabled(x.device.type):
        return x.dtype
    leaves = pytree.tree_leaves(cache)
    return next((t.dtype for t in leaves if isinstance(t, Tensor) and t.is_floating_point()), x.dtype)


def gaussian_log_prob(
    x: Tensor,  # [B, K, T, A]
    mean: Tensor,  # [B, K, T, A]
    std: Tensor,  # broadcastable to x
    *,
    clamp: tuple[float, float] | None = None,
    act_steps: ActSteps = None,
    reduce: Literal["mean", "sum"] = "mean",
) -> tuple[Tensor, Tensor]:  # [B, K], [B, K]
    r"""Log-density of a diagonal Gaussian per sample, over the executed tokens, and the share of entries at the clamp.

    :math:`-\tfrac12 ((x - \mu) / \sigma)^2 - \log \sigma - \tfrac12 \log 2 \pi`, clamped per entry, then the mean
    (DPPO: ratios do not grow with the chunk) or the sum over tokens and action dimensions. Entries at the clamp have no
    gradient, hence their share.
    """
    if reduce not in ("mean", "sum"):
        raise InvalidArgument(f"gaussian_log_prob: reduce must be 'mean' or 'sum', got {reduce!r}")
    if x.shape != mean.shape:
        raise InvalidArgument(
            f"gaussian_log_prob: x and mean must have one shape, got {list(x.shape)} and {list(mean.shape)}"
        )
    window = slice(None) if act_steps is None else slice(act_steps) if isinstance(act_steps, int) else slice(*act_steps)
    std = std.expand_as(mean)
    entries = -0.5 * ((x - mean) / std).square() - std.log() - 0.5 * math.log(2.0 * math.pi)
    entries = entries[..., window, :]
    clamped = torch.zeros_like(entries[..., 0, 0])
    if clamp is not None:
        low, high = clamp
        clamped = ((entries < low) | (entries > high)).to(entries.dtype).detach().mean((-2, -1))
        entries = entries.clamp(low, high)
    return (entries.mean((-2, -1)) if reduce == "mean" else entries.sum((-2, -1))), clamped


def check_act_steps(where: str, act_steps: ActSteps, tokens: int) -> None:
    """Raise :class:`InvalidArgument` unless the executed tokens lie among the T tokens."""
    if act_steps is None:
        return
    start, stop = (0, act_steps) if isinstance(act_steps, int) else act_steps
    if not 0 <= start < stop <= tokens:
        raise InvalidArgument(f"{where}: act_steps must lie within the T = {tokens} action tokens, got {act_steps}")
