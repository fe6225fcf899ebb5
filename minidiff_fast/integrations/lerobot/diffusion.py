"""lerobot's DiffusionPolicy on Level-2 batches; known by its interface in lerobot 0.6.

The images of a condition are encoded once for its K samples. The U-Net itself shares next to nothing: FiLM's share of
the condition is one or two percent of a step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.integrations import _unet_keys as keys
from minidiff_fast.integrations import _weights as weights
from minidiff_fast.integrations._diffusers_process import process_of
from minidiff_fast.integrations.adapter import Level2Adapter
from minidiff_fast.models import ConditionalUnet1D
from minidiff_fast.models.conditional_unet1d import ConditionModulation
from minidiff_fast.objectives import DenoisingLoss
from minidiff_fast.shapes import Layout

__all__ = ["Level2Diffusion", "from_unet", "to_unet"]

STATE, IMAGES, ENVIRONMENT, ACTION, PADDED = (
    "observation.state", "observation.images", "observation.environment_state", "action", "action_is_pad",
)  # fmt: skip


def from_unet(
    peer: nn.Module,
    *,
    tie: bool = False,
    num_train_timesteps: int | None = None,
    layout: Layout = "bk",
    impl: str | None = None,
) -> ConditionalUnet1D:
    """Our U-Net with the weights of lerobot's DiffusionConditionalUnet1d, which may be inside ``torch.compile``.

    Args:
        peer: lerobot's U-Net; it is not changed.
        tie: use the peer's own Parameters, so that training one trains the other; otherwise copies.
        num_train_timesteps, layout, impl: see :class:`~minidiff_fast.models.ConditionalUnet1D`.

    Gradient checkpointing (``config.gradient_checkpointing``) is not carried over: chunks of K bound the memory.

    Raises:
        InvalidArgument: the peer's modules, settings or outputs are not those of that network; says which.
    """
    return keys.from_peer(
        "from_unet", peer, keys.lerobot, tie=tie, num_train_timesteps=num_train_timesteps, layout=layout, impl=impl
    )  # fmt: skip


def to_unet(ours: ConditionalUnet1D, peer: nn.Module) -> None:
    """Write our weights into lerobot's U-Net, bit for bit.

    Raises:
        InvalidArgument: names, shapes or dtypes differ; nothing is written then.
    """
    weights.give("to_unet", ours, weights.unwrapped(peer), keys.lerobot)


class Level2Diffusion(Level2Adapter):
    """lerobot's DiffusionPolicy: state, environment state and images encoded once, K samples of each chunk of actions.

    The batch is that of the policy's ``forward``, normalised by its processors: ``observation.state`` [B, To, Ds],
    ``observation.environment_state`` [B, To, De] and image keys [B, To, C, H, W] in [0, 1] as the configuration has
    them, ``action`` [B, T, A], ``action_is_pad`` [B, T] boolean. Times, noise, prediction type and padding mask are
    the policy's, so K = 1 is the policy's own loss. A random crop is drawn once per forward pass, as in the policy.

    The policy is not changed. Parameters are its own (tied), so an optimizer over ``policy.get_optim_params()`` trains
    them, and ``select_action`` and ``save_pretrained`` see them. They come apart with ``fully_shard(adapter)`` (and
    with ``load_state_dict(assign=True)`` on the adapter): the policy keeps the old tensors, an optimizer is made from
    ``adapter.parameters()``, and :meth:`to_peer`, called on every rank, writes the trained weights back. Training and
    eval mode follow the policy's.

    Args:
        policy: lerobot's DiffusionPolicy, ``compile_model`` or not.
        impl: of the U-Net's ops.

    Raises:
        InvalidArgument: the policy's interface, network, noise schedule or prediction type is not that of lerobot 0.6;
            in :meth:`encode`, where the policy's U-Net or encoder was replaced since.

    Example::

        adapter = Level2Diffusion(policy)
        loss = adapter.loss(batch, k=8)         # was: loss, _ = policy.forward(batch)
    """

    def __init__(self, policy: nn.Module, *, impl: str | None = None) -> None:
        super().__init__()
        name = "Level2Diffusion"
        peer = "DiffusionPolicy as in lerobot 0.6"
        model = weights.attribute(name, policy, "diffusion", peer)
        weights.attribute(name, model, "_prepare_global_conditioning", peer)
        for option in ("image_features", "n_obs_steps", "horizon", "prediction_type", "do_mask_loss_for_padding"):
            weights.attribute(name, policy, f"config.{option}", peer)
        process = process_of(name, weights.attribute(name, model, "noise_scheduler", peer))
        # Outside the module tree: the U-Net's parameters stand in it once, under ``denoiser``.
        object.__setattr__(self, "policy", policy)
        self.denoiser = from_unet(
            weights.attribute(name, model, "unet", peer), tie=True, impl=impl,
            num_train_timesteps=process.num_train_timesteps,
        )  # fmt: skip
        if hasattr(model, "rgb_encoder"):
            self.rgb_encoder = model.rgb_encoder
        self.objective = DenoisingLoss(process)
        self._tied = weights.parameters(model.unet)
        self._follow()

    policy: Any

    def _follow(self) -> None:
        """The policy's modes now; an error where its network or encoder was replaced."""
        model = self.policy.diffusion
        weights.check_still_tied("Level2Diffusion", "policy.diffusion.unet", self._tied, model.unet)
        if hasattr(self, "rgb_encoder"):
            weights.check_same_part("Level2Diffusion", "policy.diffusion.rgb_encoder", model, self.rgb_encoder)
        self.training = self.policy.training
        weights.match_mode(self.denoiser, model.unet)

    def encode(self, obs: dict[str, Tensor]) -> ConditionModulation:
        """Batch -> the U-Net's modulations, computed once per condition."""
        self._follow()
        model, config = self.policy.diffusion, self.policy.config
        self._check(obs, STATE, *config.image_features, *([ENVIRONMENT] if config.env_state_feature else []))
        if obs[STATE].shape[1] != config.n_obs_steps:
            raise InvalidArgument(
                f"Level2Diffusion: {STATE} must have n_obs_steps = {config.n_obs_steps} steps, "
                f"got {list(obs[STATE].shape)}"
            )
        batch = dict(obs)
        if config.image_features:
            images = [batch[key] for key in config.image_features]
            if config.n_obs_steps == 1:
                images = [image.unsqueeze(1) if image.dim() == 4 else image for image in images]
            batch[IMAGES] = torch.stack(images, dim=-4)
        return self.denoiser.encode(model._prepare_global_conditioning(batch))

    def denoise(
        self,
        cache: ConditionModulation,
        x: Tensor,  # [B, K, T, A]
        t: Tensor,  # [B, K]
    ) -> Tensor:  # [B, K, T, A]
        """The U-Net's prediction."""
        return self.denoiser.denoise(cache, x, t)

    def actions(self, batch: dict[str, Tensor]) -> Tensor:  # [B, T, A]
        """``batch["action"]``, T = config.horizon."""
        self._check(batch, ACTION)
        horizon = self.policy.config.horizon
        if batch[ACTION].shape[1] != horizon:
            raise InvalidArgument(
                f"Level2Diffusion: {ACTION} must have horizon = {horizon} steps, got {list(batch[ACTION].shape)}"
            )
        return batch[ACTION]

    def mask(self, batch: dict[str, Tensor]) -> Tensor | None:  # [B, T] bool
        """The tokens that are not padding, where the policy masks its loss."""
        self._check(batch, PADDED)
        return ~batch[PADDED] if self.policy.config.do_mask_loss_for_padding else None

    def to_peer(self) -> nn.Module:
        """The policy, with the weights of this adapter, bit for bit; sharded ones are gathered: every rank calls
        this."""
        to_unet(self.denoiser, self.policy.diffusion.unet)
        if hasattr(self, "rgb_encoder"):
            weights.give("to_peer", self.rgb_encoder, self.policy.diffusion.rgb_encoder, keys.same)
        return self.policy  # type: ignore[no-any-return]

    def train(self, mode: bool = True) -> Level2Diffusion:
        """Of this adapter and of the policy; the U-Net's mode is that of ``policy.diffusion.unet`` at every
        :meth:`encode`."""
        super().train(mode)
        self.policy.train(mode)
        return self

    def _check(self, batch: dict[str, Tensor], *wanted: str) -> None:
        missing = sorted(set(wanted) - set(batch))
        if missing:
            raise InvalidArgument(f"Level2Diffusion: batch must hold {sorted(wanted)}, {missing} missing")
