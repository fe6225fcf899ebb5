r"""The denoising steps of a sampler as Gaussians: what a policy gradient through the chain needs.

A sampler with D steps takes the initial noise :math:`x_0` to the actions :math:`x_D`; step i (0 is the noisiest) draws
:math:`x_{i+1} \sim N(\mu_i, \sigma_i^2)` around the mean that the network's prediction at :math:`(x_i, t_i)` gives.
Sampling and scoring read times and moments from one object, so that they cannot differ.

Sources: DDPM, Ho et al., arXiv 2006.11239; DDIM, Song et al., arXiv 2010.02502; as policies, Ren et al. (DPPO),
arXiv 2409.00588; flows with injected noise, Zhang et al. (ReinFlow), arXiv 2505.22094.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from minidiff_fast.errors import InvalidArgument

if TYPE_CHECKING:
    from minidiff_fast.objectives.imitation import FlowMatching

PredictionType = Literal["epsilon", "sample", "v_prediction"]


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
    sampler; it changes the mean, too.
    """

    timesteps: Tensor
    """[D] int64, decreasing: the network's time input."""
    alphas_cumprod: Tensor
    """[D + 1] float32: ab at each timestep and after the last step."""
    prediction_type: PredictionType
    """What the network predicts."""
    eta: float = 1.0
    """Share of the posterior's standard deviation that is drawn, in [0, 1]."""
    clip_sample: float | None = 1.0
    """The clean sample is clamped to [-clip_sample, clip_sample]; None does not clamp."""
    _on: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

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
        steps = self.timesteps.numel()
        if self.timesteps.dim() != 1 or steps < 1 or self.alphas_cumprod.shape != (steps + 1,):
            raise InvalidArgument(
                "DDIMTransitions: timesteps must be [D] and alphas_cumprod [D + 1] with D >= 1, got "
                f"{list(self.timesteps.shape)} and {list(self.alphas_cumprod.shape)}"
            )
        if not bool((self.alphas_cumprod.diff() > 0).all()):
            raise InvalidArgument("DDIMTransitions: alphas_cumprod must increase from the noisiest step to the last")

    @classmethod
    def from_scheduler(
        cls, scheduler: Any, steps: int, *, eta: float = 1.0, clip_sample: float | None = 1.0
    ) -> DDIMTransitions:
        """The ``steps`` timesteps that a diffusers scheduler (DDIMScheduler, DDPMScheduler) would visit.

        Raises :class:`InvalidArgument` for a scheduler without ``alphas_cumprod`` and for more steps than it has.
        """
        ab = getattr(scheduler, "alphas_cumprod", None)
        if not isinstance(ab, Tensor):
            raise InvalidArgument(
                f"DDIMTransitions.from_scheduler: {type(scheduler).__name__} has no alphas_cumprod; flow-matching "
                "schedulers go with FlowTransitions"
            )
        trained = scheduler.config.num_train_timesteps
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= trained:
            raise InvalidArgument(f"DDIMTransitions.from_scheduler: steps must be in [1, {trained}], got {steps!r}")
        scheduler.set_timesteps(steps)
        timesteps = scheduler.timesteps.detach().cpu().long()
        last = torch.as_tensor(getattr(scheduler, "final_alpha_cumprod", 1.0)).reshape(1).float()
        return cls(
            timesteps,
            torch.cat([ab.detach().cpu().float()[timesteps], last]),
            scheduler.config.prediction_type,
            eta,
            clip_sample,
        )

    @property
    def steps(self) -> int:
        """D."""
        return self.timesteps.numel()

    def times(self, device: torch.device) -> Tensor:
        """[D] int64."""
        return self._at(device)[0]

    def deterministic(self) -> DDIMTransitions:
        """eta = 0, in the noise and in the mean."""
        return replace(self, eta=0.0)

    def moments(
        self,
        x: Tensor,  # [B, K, T, A]
        prediction: Tensor,  # [B, K, T, A]
        index: Tensor,  # [B, K] int64, in [0, D)
    ) -> Moments:
        """See the class. In float32, float64 where x is."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        x, prediction = x.to(dtype), prediction.to(dtype)
        table = self._at(x.device)[1].to(dtype)
        ab, ab_next = table[index][..., None, None], table[index + 1][..., None, None]
        signal, spread = ab.clamp(min=0.0).sqrt(), (1.0 - ab).sqrt()
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
        variance = self.eta**2 * (1.0 - ab_next) / (1.0 - ab) * (1.0 - ab / ab_next)
        mean = ab_next.sqrt() * clean + (1.0 - ab_next - variance).clamp(min=0.0).sqrt() * epsilon
        return Moments(mean, variance.sqrt(), saturated)

    def _at(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._on:
            self._on[device] = self.timesteps.to(device), self.alphas_cumprod.to(device)
        return self._on[device]


class DDPMTransitions(DDIMTransitions):
    """Ancestral sampling: the posterior of DDPM, which is DDIM with eta = 1."""

    @classmethod
    def from_scheduler(  # type: ignore[override]
        cls, scheduler: Any, steps: int | None = None, *, clip_sample: float | None = 1.0
    ) -> DDPMTransitions:
        """All training timesteps of a diffusers scheduler, or ``steps`` of them."""
        trained = scheduler.config.num_train_timesteps
        chosen = trained if steps is None else steps
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
        """See the class. In float32, float64 where x is."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        towards_data = -1.0 if self.noise_at == 1 else 1.0
        mean = x.to(dtype) + towards_data / self.steps * prediction.to(dtype)
        std = torch.full_like(mean[..., :1, :1], self.std)
        return Moments(mean, std, torch.zeros_like(mean[..., 0, 0]))
