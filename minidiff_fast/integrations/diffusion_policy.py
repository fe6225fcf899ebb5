"""diffusion_policy's networks and policies on Level-2 batches; known by their interface, never imported.

What is shared: the observation encoder runs once per condition (the peer's ``compute_loss`` on repeated batches runs it
K times), and the transformer's memory of observations. The U-Net itself shares next to nothing: FiLM's share of the
condition is one or two percent of a step.

Source of the peers: Chi et al., "Diffusion Policy", arXiv 2303.04137.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.integrations import _transformer_keys as transformer_keys
from minidiff_fast.integrations import _unet_keys as unet_keys
from minidiff_fast.integrations import _weights as weights
from minidiff_fast.integrations._diffusers_process import process_of
from minidiff_fast.integrations.adapter import Level2Adapter
from minidiff_fast.models import ConditionalUnet1D, TransformerForDiffusion
from minidiff_fast.models.conditional_unet1d import ConditionModulation
from minidiff_fast.nn import ConditionCache
from minidiff_fast.objectives import DenoisingLoss
from minidiff_fast.shapes import Layout

__all__ = [
    "Level2DiffusionTransformer",
    "Level2DiffusionUnet",
    "from_transformer",
    "from_unet",
    "level2",
    "to_transformer",
    "to_unet",
]

PEER = "a policy as in diffusion_policy"


def from_unet(
    peer: nn.Module,
    *,
    tie: bool = False,
    num_train_timesteps: int | None = None,
    layout: Layout = "bk",
    impl: str | None = None,
) -> ConditionalUnet1D:
    """Our U-Net with the weights of diffusion_policy's ConditionalUnet1D, which may be inside ``torch.compile``.

    Its constructor's arguments are read off its modules and weights.

    Args:
        peer: diffusion_policy's U-Net; it is not changed.
        tie: use the peer's own Parameters, so that training one trains the other; otherwise copies.
        num_train_timesteps, layout, impl: see :class:`~minidiff_fast.models.ConditionalUnet1D`.

    Raises:
        InvalidArgument: the peer's modules, settings or outputs are not those of that network; says which.
    """
    return unet_keys.from_peer(
        "from_unet", peer, unet_keys.same, tie=tie, num_train_timesteps=num_train_timesteps, layout=layout, impl=impl
    )


def to_unet(ours: ConditionalUnet1D, peer: nn.Module) -> None:
    """Write our weights into diffusion_policy's U-Net, bit for bit.

    Raises:
        InvalidArgument: names, shapes or dtypes differ; nothing is written then.
    """
    weights.give("to_unet", ours, weights.unwrapped(peer), unet_keys.same)


def from_transformer(
    peer: nn.Module, *, tie: bool = False, layout: Layout = "bk", impl: str | None = None
) -> TransformerForDiffusion:
    """Our transformer with the weights of diffusion_policy's TransformerForDiffusion.

    Args:
        peer: diffusion_policy's transformer, with observations as condition; it is not changed.
        tie: use the peer's own Parameters, so that training one trains the other; otherwise copies.
        layout, impl: see :class:`~minidiff_fast.models.TransformerForDiffusion`.

    Raises:
        InvalidArgument: nothing can be shared (n_cond_layers > 0, time_as_cond=False, no observations), or the peer's
            modules, settings or outputs are not those of that network; says which.
    """
    return transformer_keys.from_peer("from_transformer", peer, tie=tie, layout=layout, impl=impl)


def to_transformer(ours: TransformerForDiffusion, peer: nn.Module) -> None:
    """Write our weights into diffusion_policy's transformer, bit for bit.

    Raises:
        InvalidArgument: names, shapes or dtypes differ; nothing is written then.
    """
    weights.give("to_transformer", ours, weights.unwrapped(peer), unet_keys.same)


class _Level2DiffusionPolicy(Level2Adapter):
    """What the policies have in common: normaliser, observation encoder, schedule and the cut of the actions.

    The network's parameters are the policy's until ``fully_shard(adapter)`` or ``adapter.load_state_dict(assign=True)``
    replaces those of the adapter: the policy keeps the old ones, an optimizer is made from ``adapter.parameters()``,
    and :meth:`to_peer`, called on every rank, writes them back. A policy whose network, normaliser or encoder was
    replaced is an :class:`InvalidArgument` in :meth:`encode`, which also takes over its training or eval mode.

    Observations are ``batch["obs"]``: a tensor [B, To', Do] for low-dimensional policies, else a dict of
    [B, To', ...], To' at least ``n_obs_steps``. ``batch["action"]`` is [B, T, A], in its own units.
    """

    policy: Any
    denoiser: Any
    _tied: dict[str, nn.Parameter]
    normalizer: Any
    obs_encoder: Any

    def __init__(self, policy: nn.Module, denoiser: nn.Module, **shapes: bool) -> None:
        super().__init__()
        name = type(self).__name__
        if not any(shapes.values()):
            raise InvalidArgument(
                f"{name}: one of {', '.join(shapes)} must be True: left as is, because with observations inside the "
                "trajectory (inpainting) every sample noises its own copy, and nothing is shared"
            )
        self.objective = DenoisingLoss(process_of(name, policy.noise_scheduler))
        _check_nothing_inpainted(name, policy)
        # Outside the module tree: the network's parameters stand in it once, under ``denoiser``.
        object.__setattr__(self, "policy", policy)
        self._tied = weights.parameters(policy.model)  # type: ignore[arg-type]
        self.denoiser = denoiser
        self.normalizer = policy.normalizer
        self.obs_encoder = getattr(policy, "obs_encoder", None)
        self._follow()

    def _follow(self) -> None:
        """The policy's modes now; an error where its network or another part was replaced."""
        name, policy = type(self).__name__, self.policy
        weights.check_still_tied(name, "policy.model", self._tied, policy.model)
        weights.check_same_part(name, "policy.normalizer", policy, self.normalizer)
        if self.obs_encoder is not None:
            weights.check_same_part(name, "policy.obs_encoder", policy, self.obs_encoder)
        self.training = policy.training
        weights.match_mode(self.denoiser, policy.model)

    def features(self, batch: dict[str, Any], steps: int | None) -> Tensor:  # [B, steps, D]
        """Normalised observations, encoded where the policy has an encoder; ``steps=None`` for all of them."""
        obs = self._part(batch, "obs")
        if self.obs_encoder is None:
            normalised: Tensor = self.normalizer["obs"].normalize(obs)
            return normalised[:, :steps]
        normalised_obs = self.normalizer.normalize(obs)
        rows = {name: value[:, :steps].flatten(0, 1) for name, value in normalised_obs.items()}
        batch_size = next(iter(normalised_obs.values())).shape[0]
        encoded: Tensor = self.obs_encoder(rows)
        return encoded.unflatten(0, (batch_size, -1))

    def denoise(
        self,
        cache: Any,
        x: Tensor,  # [B, K, T, A]
        t: Tensor,  # [B, K]
    ) -> Tensor:  # [B, K, T, A]
        """The network's prediction."""
        predicted: Tensor = self.denoiser.denoise(cache, x, t)
        return predicted

    def actions(self, batch: dict[str, Any]) -> Tensor:  # [B, T, A]
        """Normalised; with ``pred_action_steps_only`` the n_action_steps that are predicted."""
        normalised: Tensor = self.normalizer["action"].normalize(self._part(batch, "action"))
        if not getattr(self.policy, "pred_action_steps_only", False):
            return normalised
        start = self._first_action()
        return normalised[:, start : start + self.policy.n_action_steps]

    def to_peer(self) -> nn.Module:
        """The policy, with the weights of this adapter, bit for bit.

        They are tied, so that is so unless they came apart (``fully_shard``, ``load_state_dict(assign=True)`` on the
        adapter). Sharded weights are gathered: every rank calls this.
        """
        weights.give("to_peer", self.denoiser, weights.unwrapped(self.policy.model), unet_keys.same)
        if self.obs_encoder is not None:
            weights.give("to_peer", self.obs_encoder, self.policy.obs_encoder, unet_keys.same)
        return cast(nn.Module, self.policy)

    def train(self, mode: bool = True) -> _Level2DiffusionPolicy:
        """Of this adapter and of the policy, whichever of the two is asked: the network's mode is that of
        ``policy.model`` at every :meth:`encode`."""
        super().train(mode)
        self.policy.train(mode)
        return self

    def _first_action(self) -> int:
        return int(self.policy.n_obs_steps) - 1

    def _part(self, batch: dict[str, Any], name: str) -> Any:
        if "valid_mask" in batch or name not in batch:
            raise InvalidArgument(
                f"{type(self).__name__}: batch must hold {name}, and no valid_mask, as in diffusion_policy; "
                f"got {sorted(batch)}"
            )
        return batch[name]


class Level2DiffusionUnet(_Level2DiffusionPolicy):
    """DiffusionUnetLowdimPolicy, DiffusionUnetImagePolicy or DiffusionUnetHybridImagePolicy on Level-2 batches.

    Normalisation, schedule, prediction type and the loss over all action tokens are the policy's: K = 1 is its own
    ``compute_loss``. Observations are encoded once per condition; what is random in the encoder (crops, dropout) is
    drawn once for its K samples. Parameters are the policy's own (tied): its optimizer, its EMA copy and
    ``predict_action`` go on as before.

    Args:
        policy: has ``obs_as_global_cond`` or, low-dimensional, ``obs_as_local_cond``.
        impl: of the U-Net's ops.

    Raises:
        InvalidArgument: observations or actions are inpainted, or the policy's interface, network or noise schedule
            is another one.

    Example::

        adapter = Level2DiffusionUnet(policy)
        loss = adapter.loss(batch, k=8)         # was: loss = policy.compute_loss(batch)
    """

    def __init__(self, policy: nn.Module, *, impl: str | None = None) -> None:
        _check_interface("Level2DiffusionUnet", policy, "obs_as_global_cond")
        steps = weights.attribute("Level2DiffusionUnet", policy, "noise_scheduler.config.num_train_timesteps", PEER)
        denoiser = from_unet(cast(nn.Module, policy.model), tie=True, num_train_timesteps=steps, impl=impl)
        super().__init__(
            policy, denoiser, obs_as_global_cond=bool(policy.obs_as_global_cond),
            obs_as_local_cond=bool(getattr(policy, "obs_as_local_cond", False)),
        )  # fmt: skip

    def encode(self, obs: dict[str, Any]) -> ConditionModulation:
        """Batch -> the U-Net's modulations (and local features), computed once per condition."""
        self._follow()
        steps = int(self.policy.n_obs_steps)
        if self.policy.obs_as_global_cond:
            modulation: ConditionModulation = self.denoiser.encode(self.features(obs, steps).flatten(1))
            return modulation
        seen = self.features(obs, None)
        seen = torch.cat([seen[:, :steps], torch.zeros_like(seen[:, steps:])], dim=1)
        modulation = self.denoiser.encode(None, seen)
        return modulation

    def _first_action(self) -> int:
        return int(self.policy.n_obs_steps) - (1 if getattr(self.policy, "oa_step_convention", False) else 0)


class Level2DiffusionTransformer(_Level2DiffusionPolicy):
    """DiffusionTransformerLowdimPolicy or DiffusionTransformerHybridImagePolicy on Level-2 batches.

    As :class:`Level2DiffusionUnet`; the observations' tokens, keys and values are computed once per condition, too.

    Args:
        policy: has ``obs_as_cond``; its network has ``n_cond_layers = 0``.
        impl: of the transformer's ops.

    Raises:
        InvalidArgument: as for :class:`Level2DiffusionUnet`, and for networks that mix the timestep into the
            observations.
    """

    def __init__(self, policy: nn.Module, *, impl: str | None = None) -> None:
        _check_interface("Level2DiffusionTransformer", policy, "obs_as_cond")
        denoiser = None
        if policy.obs_as_cond:
            steps = weights.attribute(
                "Level2DiffusionTransformer", policy, "noise_scheduler.config.num_train_timesteps", PEER
            )
            denoiser = transformer_keys.from_peer(
                "from_transformer", cast(nn.Module, policy.model), tie=True, num_train_timesteps=steps, impl=impl
            )
        super().__init__(policy, cast(nn.Module, denoiser), obs_as_cond=bool(policy.obs_as_cond))

    def encode(self, obs: dict[str, Any]) -> ConditionCache:
        """Batch -> keys and values of the observation tokens, computed once per condition."""
        self._follow()
        cache: ConditionCache = self.denoiser.encode(self.features(obs, int(self.policy.n_obs_steps)))
        return cache


def level2(policy: nn.Module, *, impl: str | None = None) -> _Level2DiffusionPolicy:
    """The adapter of a policy of diffusion_policy, recognised by its interface, so that subclasses and copies count.

    Raises:
        InvalidArgument: the policy's interface is another one, or it cannot share; says why.

    Example::

        adapter = level2(policy)
        loss = adapter.loss(batch, k=8)         # was: loss = policy.compute_loss(batch)
    """
    model = weights.attribute("level2", policy, "model", PEER)
    inner = weights.unwrapped(model)
    if hasattr(inner, "down_modules"):
        return Level2DiffusionUnet(policy, impl=impl)
    if hasattr(inner, "cond_obs_emb"):
        return Level2DiffusionTransformer(policy, impl=impl)
    raise InvalidArgument(
        "level2: policy.model must be ConditionalUnet1D (with down_modules) or TransformerForDiffusion (with "
        f"cond_obs_emb) as in diffusion_policy, got {type(inner).__name__}"
    )


def _check_interface(name: str, policy: nn.Module, shared: str) -> None:
    """The attributes that the peer's compute_loss reads, and one of its two kinds of observations."""
    for wanted in ("model", "normalizer", "noise_scheduler", "mask_generator", "n_obs_steps", "horizon", "action_dim"):
        weights.attribute(name, policy, wanted, PEER)
    weights.attribute(name, policy, shared, PEER)
    if not (hasattr(policy, "obs_encoder") or hasattr(policy, "obs_dim")):
        raise InvalidArgument(
            f"{name}: expected {PEER}, with obs_dim (low-dimensional observations) or obs_encoder (images), "
            f"got {type(policy).__name__}"
        )


def _check_nothing_inpainted(name: str, policy: Any) -> None:
    """No action is given: the mask that the generator makes for trajectories of actions alone is empty."""
    generator = policy.mask_generator
    shape = (2, int(policy.horizon), int(policy.action_dim))
    visible = getattr(generator, "action_visible", False) or getattr(generator, "obs_dim", 0)
    if visible or bool(generator(torch.Size(shape)).any()):
        raise InvalidArgument(
            f"{name}: left as is, because {type(generator).__name__} gives parts of the trajectory as known "
            "(action_visible, or obs_dim > 0): samples would be inpainted"
        )
