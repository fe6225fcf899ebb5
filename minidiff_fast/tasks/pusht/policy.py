"""A diffusion policy for Push-T: its configuration, how it is built, and how it acts.

torch and diffusers are imported when something is built, so that a command line can show its options at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args, get_type_hints

import numpy as np

from minidiff_fast.errors import InvalidArgument, MinidiffFastError, require

if TYPE_CHECKING:
    import torch

    from minidiff_fast.models import DiffusionMLP, TransformerForDiffusion
    from minidiff_fast.nn.normalizer import MinMaxNormalizer
    from minidiff_fast.objectives.imitation import DiffusionProcess, FlowMatching
    from minidiff_fast.policy import DiffusionPolicy
    from minidiff_fast.tasks.pusht.encoder import ObservationUnet1D
    from minidiff_fast.transitions import DDIMTransitions, FlowTransitions

Sampler = Literal["scheduler", "deterministic", "stochastic"]
"""How a policy acts: with its scheduler (as after imitation), or with the samplers of fine-tuning."""
LATER_FIELDS = frozenset({"unet_width", "unet_kernel"})
"""Fields of :class:`PolicyConfig` that checkpoints from before they existed lack."""
ACTION_DIM = 2
"""Target position of the agent, x and y, pixels."""

LOW_DIM_ENTRIES: dict[str, dict[str, int]] = {
    "state": {"state": 5},
    "keypoints": {"keypoints": 20},
    "image": {"agent_pos": 2},
}
"""Per observation kind the low-dimensional entries of an observation and their channels."""


class InvalidOption(MinidiffFastError):
    """An option has a wrong value. Not a ValueError, which parsers of command lines take for their own."""


@dataclass(frozen=True)
class PolicyConfig:
    """What decides the shapes and the meaning of a policy's weights; stored with every checkpoint."""

    obs: Literal["state", "keypoints", "image"] = "keypoints"
    """What the policy sees: the state (5 numbers), 9 block keypoints and the agent (20), or the camera."""
    horizon: int = 16
    """Actions T of a predicted sequence, 0.1 s each."""
    n_obs_steps: int = 2
    """Observations To that the policy sees."""
    n_action_steps: int = 8
    """Actions that are executed before the policy looks again."""
    encoder_width: int = 128
    """Channels of an observation token that the encoder of state and keypoints makes."""
    encoder_blocks: int = 3
    """Residual blocks of that encoder; 0 hands the normalised observations to the denoiser as they are."""
    denoiser: Literal["mlp", "transformer", "unet"] = "mlp"
    """DiffusionMLP (quick on a CPU), TransformerForDiffusion or ConditionalUnet1D."""
    hidden_dim: int = 256
    """mlp: width."""
    n_blocks: int = 3
    """mlp: residual blocks."""
    n_layer: int = 3
    """transformer: decoder layers."""
    n_head: int = 4
    """transformer: attention heads; divides n_emb."""
    n_emb: int = 64
    """transformer: width of the tokens."""
    p_drop_emb: float = 0.0
    """transformer: dropout after the embeddings."""
    p_drop_attn: float = 0.0
    """transformer: dropout of attention weights and of residual branches."""
    causal_attn: bool = True
    """transformer: an action attends to itself and to earlier ones only."""
    unet_width: int = 64
    """unet: channels of the first of three resolutions, a multiple of 8; the others have 2 and 4 times as many."""
    unet_kernel: int = 5
    """unet: actions that a convolution sees, odd."""
    prediction: Literal["epsilon", "sample", "v_prediction", "flow"] = "sample"
    """What the network predicts: the noise, the clean actions, v, or the velocity of flow matching."""
    num_train_timesteps: int = 100
    """Diffusion steps in training; the scale of the time input for flow matching."""
    beta_schedule: Literal["squaredcos_cap_v2", "linear", "scaled_linear"] = "squaredcos_cap_v2"
    """Noise schedule of diffusers' schedulers; flow matching has none."""
    num_inference_steps: int = 10
    """Denoising steps per action sequence when the policy acts."""

    def __post_init__(self) -> None:
        for name, annotation in get_type_hints(PolicyConfig).items():
            choices = get_args(annotation)
            if choices and getattr(self, name) not in choices:
                raise InvalidOption(
                    f"--{name.replace('_', '-')} must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )
            least = 0 if name == "encoder_blocks" else 1
            if annotation is int and getattr(self, name) < least:
                raise InvalidOption(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(self, name)}")
        if self.n_obs_steps - 1 + self.n_action_steps > self.horizon:
            raise InvalidOption(
                f"PolicyConfig: n_obs_steps - 1 + n_action_steps must be at most horizon = {self.horizon}, "
                f"got {self.n_obs_steps} - 1 + {self.n_action_steps}"
            )
        if self.n_emb % self.n_head or self.n_emb // self.n_head < 8:
            raise InvalidOption(
                f"PolicyConfig: n_emb must be a multiple of n_head with at least 8 channels a head, "
                f"got n_emb = {self.n_emb}, n_head = {self.n_head}"
            )
        if self.denoiser == "unet" and (self.horizon % 4 or self.unet_width % 8 or self.unet_kernel % 2 == 0):
            raise InvalidOption(
                f"PolicyConfig: the unet needs a horizon that is a multiple of 4, unet_width a multiple of 8 and "
                f"unet_kernel odd, got {self.horizon}, {self.unet_width} and {self.unet_kernel}"
            )
        for name in ("p_drop_emb", "p_drop_attn"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise InvalidOption(f"--{name.replace('_', '-')} must be in [0, 1), got {getattr(self, name)}")
        if self.num_inference_steps > self.num_train_timesteps:
            raise InvalidOption(
                f"PolicyConfig: num_inference_steps must be at most num_train_timesteps = "
                f"{self.num_train_timesteps}, got {self.num_inference_steps}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PolicyConfig:
        """The configuration that ``dataclasses.asdict`` gave, also by an earlier version: the fields that came later
        have their defaults. Raises :class:`InvalidOption` for other keys."""
        known = {field.name for field in fields(cls)}
        missing, unknown = known - LATER_FIELDS - set(values), set(values) - known
        if missing or unknown:
            raise InvalidOption(
                f"PolicyConfig: expected the fields {sorted(known)}, missing {sorted(missing)}, "
                f"unknown {sorted(unknown)}"
            )
        return cls(**values)


def build_policy(
    config: PolicyConfig,
    obs_normalizers: dict[str, MinMaxNormalizer],
    action_normalizer: MinMaxNormalizer,
) -> DiffusionPolicy:
    """A policy with fresh weights from torch's global generator.

    Args:
        config: its shapes.
        obs_normalizers: one for every low-dimensional observation, see :data:`LOW_DIM_ENTRIES`.
        action_normalizer: pixels -> [-1, 1].

    Raises:
        InvalidArgument: a normaliser is missing or has other channels.
        MissingDependency: ``obs="image"`` without transformers.
    """
    from minidiff_fast.policy import DiffusionPolicy

    entries = LOW_DIM_ENTRIES[config.obs]
    found = {name: normalizer.channels for name, normalizer in obs_normalizers.items()}
    if found != entries or action_normalizer.channels != ACTION_DIM:
        raise InvalidArgument(
            f"build_policy: obs={config.obs!r} needs normalisers with the channels {entries} and "
            f"{ACTION_DIM} for the action, got {found} and {action_normalizer.channels}"
        )
    encoder = _encoder(config)
    denoiser = _denoiser(config, int(encoder.output_dim))
    return DiffusionPolicy(encoder, denoiser, obs_normalizers, action_normalizer)


def _encoder(config: PolicyConfig) -> Any:
    from minidiff_fast.models import ImageEncoder, LowDimEncoder
    from minidiff_fast.tasks.pusht.encoder import ResidualEncoder

    entries = LOW_DIM_ENTRIES[config.obs]
    if config.obs == "image":
        return ImageEncoder(entries)
    if config.encoder_blocks == 0:
        return LowDimEncoder(entries)
    return ResidualEncoder(entries, config.n_obs_steps, config.encoder_width, config.encoder_blocks)


def _denoiser(config: PolicyConfig, cond_dim: int) -> DiffusionMLP | TransformerForDiffusion | ObservationUnet1D:
    from minidiff_fast.models import DiffusionMLP, TransformerForDiffusion
    from minidiff_fast.tasks.pusht.encoder import ObservationUnet1D

    if config.denoiser == "unet":
        return ObservationUnet1D(
            ACTION_DIM,
            global_cond_dim=config.n_obs_steps * cond_dim,
            down_dims=[config.unet_width, 2 * config.unet_width, 4 * config.unet_width],
            kernel_size=config.unet_kernel,
            cond_predict_scale=True,
            num_train_timesteps=config.num_train_timesteps,
        )
    sizes = (ACTION_DIM, ACTION_DIM, config.horizon, config.n_obs_steps, cond_dim)
    if config.denoiser == "mlp":
        return DiffusionMLP(*sizes, config.hidden_dim, config.n_blocks)
    transformer = TransformerForDiffusion(
        *sizes,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_emb=config.n_emb,
        p_drop_emb=config.p_drop_emb,
        p_drop_attn=config.p_drop_attn,
        causal_attn=config.causal_attn,
    )
    _scale_to_width(transformer)
    return transformer


def _scale_to_width(transformer: TransformerForDiffusion) -> None:
    """Draw the weights anew with variance 1 / fan-in, the output layer excepted.

    The module's own standard deviation of 0.02 is made for a width of 768. At 64 the condition reaches the
    actions a thousand times too small, and thousands of steps go by before the policy looks at it.
    """
    from torch import nn

    for name, module in transformer.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            nn.init.normal_(module.in_proj_weight, std=module.embed_dim**-0.5)
        elif isinstance(module, nn.Linear) and name != "head":
            ends_branch = name.endswith(("out_proj", "linear2"))
            nn.init.normal_(module.weight, std=(0.5 if ends_branch else 1.0) * module.in_features**-0.5)
    nn.init.normal_(transformer.pos_emb, std=0.2)
    if transformer.cond_pos_emb is not None:
        nn.init.normal_(transformer.cond_pos_emb, std=0.2)


def build_process(config: PolicyConfig) -> DiffusionProcess | FlowMatching:
    """How samples are noised in training; :func:`build_scheduler` gives the sampler that belongs to it."""
    from minidiff_fast.objectives.imitation import DiffusionProcess, FlowMatching

    if config.prediction == "flow":
        return FlowMatching(noise_at=1, timestep_scale=float(config.num_train_timesteps))
    return DiffusionProcess.from_scheduler(build_scheduler(config))


def build_scheduler(config: PolicyConfig) -> Any:
    """The sampler: diffusers' DDIMScheduler, or FlowMatchEulerDiscreteScheduler for ``prediction="flow"``.

    DDIM starts at the last training timestep (``trailing``), except for ``epsilon``: there the clean sample
    is read off as ``(x - sqrt(1 - ab) eps) / sqrt(ab)``, and ab is next to nothing at the last timestep.
    """
    diffusers = require("diffusers", extra="train")
    if config.prediction == "flow":
        return diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=config.num_train_timesteps)
    return diffusers.DDIMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_schedule=config.beta_schedule,
        prediction_type=config.prediction,
        clip_sample=True,
        timestep_spacing="leading" if config.prediction == "epsilon" else "trailing",
    )


def build_transitions(config: PolicyConfig, *, std: float = 0.0) -> DDIMTransitions | FlowTransitions:
    """The sampler of fine-tuning: DDIM with eta = 1, or Euler steps of a flow with noise of ``std``, each of
    ``num_inference_steps`` steps; its ``deterministic()`` acts without noise."""
    from minidiff_fast.transitions import DDIMTransitions, FlowTransitions

    if config.prediction == "flow":
        return FlowTransitions(config.num_inference_steps, std, 1, float(config.num_train_timesteps))
    return DDIMTransitions.from_scheduler(build_scheduler(config), config.num_inference_steps)


class FrozenStart(NamedTuple):
    """What runs the first denoising steps where fine-tuning has trained the last ones alone."""

    policy: DiffusionPolicy
    """The policy that fine-tuning began with."""
    fine_tuned: int
    """K, the last steps, which the fine-tuned policy runs."""


class PushTActor:
    """A policy as :func:`minidiff_fast.tasks.pusht.evaluation.evaluate` calls it: observations in, actions
    out.

    Each call encodes n observations, draws one action sequence for each of them and returns the
    ``n_action_steps`` actions from the last observation on, places ``n_obs_steps - 1`` to
    ``n_obs_steps + n_action_steps - 2`` of the horizon. The randomness comes from ``seed`` alone: an actor
    made anew with it repeats its actions, whatever else has drawn random numbers.

    Args:
        policy: in the mode (train, eval) it is in; ``evaluate`` wants eval.
        scheduler: from :func:`build_scheduler`; its state is reset at every call. None for the samplers of fine-tuning.
        config: the policy's configuration.
        device: where the policy lies.
        seed: of the action samples.
        sampler: ``scheduler``, or a sampler of fine-tuning (:func:`build_transitions`): ``deterministic`` without
            noise after the initial one, ``stochastic`` with noise at every step.
        min_std: lower bound of the stochastic sampler's standard deviation, in normalised actions.
        frozen: what runs the first steps; with the samplers of fine-tuning.
    """

    def __init__(
        self,
        policy: DiffusionPolicy,
        scheduler: Any,
        config: PolicyConfig,
        device: torch.device | str = "cpu",
        seed: int = 0,
        *,
        sampler: Sampler = "scheduler",
        min_std: float = 0.0,
        frozen: FrozenStart | None = None,
    ) -> None:
        import torch

        if sampler not in get_args(Sampler) or (sampler == "scheduler") != (scheduler is not None):
            raise InvalidArgument(
                f"PushTActor: sampler must be one of {', '.join(get_args(Sampler))}, and a scheduler goes with "
                f"'scheduler' alone, got {sampler!r} and {type(scheduler).__name__}"
            )
        if frozen is not None and sampler == "scheduler":
            raise InvalidArgument(
                f"PushTActor: only the last {frozen.fine_tuned} of {config.num_inference_steps} denoising steps were "
                "fine-tuned; sampler must be 'deterministic' or 'stochastic', got 'scheduler'"
            )
        self.sampler, self.min_std, self.frozen = sampler, min_std, frozen
        self.policy, self.scheduler, self.config = policy, scheduler, config
        self.device = torch.device(device)
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(
        self,
        obs: dict[str, np.ndarray],  # name -> [n, To, ...], raw units
    ) -> np.ndarray:  # [n, n_action_steps, 2], pixels
        import torch

        config = self.config
        tensors = {name: torch.from_numpy(value).to(self.device) for name, value in obs.items()}
        with torch.no_grad():
            pixels = self.policy.denormalize_actions(self._sample(tensors))  # [n, T, 2]
        first = config.n_obs_steps - 1
        chosen: np.ndarray = pixels[:, first : first + config.n_action_steps].float().cpu().numpy()
        return chosen

    def _sample(self, obs: dict[str, torch.Tensor]) -> torch.Tensor:  # [n, T, 2], normalised
        from minidiff_fast.sampling import sample_actions, sample_chain

        config, shape = self.config, (self.config.horizon, ACTION_DIM)
        if self.sampler == "scheduler":
            sampled = sample_actions(
                self.policy, obs, self.scheduler, num_inference_steps=config.num_inference_steps, shape=shape,
                generator=self._generator,
            )  # fmt: skip
            return sampled[:, 0]
        transitions: Any = build_transitions(config, std=self.min_std)
        noisy = self.sampler == "stochastic"
        base, fine_tuned = (None, None) if self.frozen is None else self.frozen
        return sample_chain(
            self.policy, obs, transitions if noisy else transitions.deterministic(), shape=shape, base=base,
            fine_tuned=fine_tuned, min_std=self.min_std if noisy else 0.0, generator=self._generator,
        ).actions  # fmt: skip
