"""lerobot's vla_jepa on Level-2 batches: one pass of the vision-language model, and its tokens never repeated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.integrations.adapter import Level2Adapter
from minidiff_fast.integrations.diffusers import apply_broadcast_attention
from minidiff_fast.integrations.lerobot._interface import check_interface
from minidiff_fast.level2 import Level2Batch
from minidiff_fast.objectives.imitation import BetaTimes, DenoisingLoss, FlowMatching

HEAD = (
    "config.action_noise_s", "config.action_noise_beta_alpha", "config.action_noise_beta_beta",
    "config.action_num_timestep_buckets", "model.transformer_blocks", "action_encoder", "action_decoder",
    "state_encoder", "future_tokens.weight", "position_embedding.weight",
)  # fmt: skip
POLICY = (
    "_prepare_model_inputs", "model.action_model", "model._encode_qwen", "model._world_model_loss",
    "model.config.enable_world_model", "model.config.world_model_loss_weight", "model.config.chunk_size",
    "model.config.resize_images_to",
)  # fmt: skip


class HeadCache(NamedTuple):
    """What all samples of a condition read."""

    tokens: Tensor
    """[B, S, C]: the memory of the cross-attention layers."""
    state: Tensor | None = None
    """[B, 1, Ci]: the encoded state, a token of every sample; None where there is none."""
    added_loss: Tensor | None = None
    """[B]: a loss of the condition itself, which counts once whatever K is."""


@dataclass(frozen=True, eq=False)
class DenoisingAndConditionLoss(DenoisingLoss):
    r"""The denoising loss plus what ``encode`` has left in ``cache.added_loss``: ``l_bk + a_b``.

    Its mean over B * K is that of l plus that of a, also where the K samples run in chunks: the gradient of a is
    gathered over the chunks, as that of all of the cache.
    """

    def per_sample(
        self, denoise: Callable[[Any, Tensor, Tensor], Tensor], cache: Any, batch: Level2Batch
    ) -> Tensor:  # [B, K] float32
        """The loss of every sample of ``batch``, and its condition's."""
        loss = super().per_sample(denoise, cache, batch)
        return loss if cache.added_loss is None else loss + cache.added_loss[:, None].float()


class Level2ActionHead(Level2Adapter):
    r"""vla_jepa's ``VLAJEPAActionHead`` on Level-2 batches, without the vision-language model before it.

    Once per condition: the state encoder, and the keys and values that the cross-attention layers make of the
    conditioning tokens. Per sample: the action encoder, the rest of the transformer, the action decoder.

    Batches are dicts with what ``head.forward`` takes: ``conditioning_tokens [B, S, C]``, ``actions [B, T, A]`` and,
    where there are such, ``state [B, Ds]`` or ``[B, 1, Ds]`` and ``action_is_pad [B, T]`` (True = does not count).
    Times are distributed as ``head.sample_time`` draws them (noise at t = 0), and the network gets them in
    ``action_num_timestep_buckets`` steps, as in the peer.

    The head's transformer gets un-repeated memory by :func:`apply_broadcast_attention`, in place: with as many tokens
    rows as samples it computes what it did before, so that ``head.forward`` and ``head.predict_action`` go on working.
    ``adapter.revert()`` puts the processors back that were there.

    Args:
        head: lerobot's (interface of lerobot 0.6), in its dtype and on its device.
        impl: implementation of ``broadcast_attention``; None chooses by device.

    Raises:
        InvalidArgument: the head's interface is another one, its times are of a Beta distribution of which neither
            parameter is 1, or nothing in it could be replaced.
    """

    padding: ClassVar[Literal["valid", "all"]] = "valid"

    def __init__(self, head: nn.Module, *, impl: str | None = None) -> None:
        check_interface(type(self).__name__, "VLAJEPAActionHead", "head", head, HEAD)
        peer: Any = head
        objective = DenoisingLoss(_process(peer))
        super().__init__()
        self.head: Any = head
        self.training = head.training
        self.objective = objective
        self.report = apply_broadcast_attention(peer.model, impl=impl)

    def revert(self) -> None:
        """Put the attention processors back that the head had; the adapter is of no use afterwards."""
        self.report.revert()

    def encode(self, obs: dict[str, Any]) -> HeadCache:
        """The tokens as they are, and the encoded state."""
        return HeadCache(obs["conditioning_tokens"], encoded_state(self.head, obs.get("state")))

    def denoise(
        self,
        cache: HeadCache,
        x: Tensor,  # [B, K, T, A]
        t: Tensor,  # [B, K]
    ) -> Tensor:  # [B, K, T, A]
        """The velocity at noised actions ``x`` and times ``t``, in steps: [0, action_num_timestep_buckets)."""
        return velocity(self.head, cache, x, t)

    def actions(self, batch: dict[str, Any]) -> Tensor:  # [B, T, A]
        """``batch["actions"]``."""
        actions: Tensor = batch["actions"]
        return actions

    def mask(self, batch: dict[str, Any]) -> Tensor | None:  # [B, T] bool
        """Not ``batch["action_is_pad"]``."""
        padded = batch.get("action_is_pad")
        return None if padded is None else ~padded


class Level2VLAJEPA(Level2Adapter):
    r"""lerobot's ``VLAJEPAPolicy`` on Level-2 batches, the dicts that ``policy.forward`` takes.

    Once per condition: the vision-language model, the world model's loss (added once, times its weight, as in the
    peer) and what :class:`Level2ActionHead` shares. ``adapter.loss(batch, k=policy.config.repeated_diffusion_steps)``
    is the loss of ``policy.forward``, which repeats tokens, states and actions that often.

    The head runs in the dtype of its weights with autocast off; the peer asks autocast for float32 there. Without
    ``"action"`` in the batch, :meth:`encode` prepares the images as ``policy.predict_action_chunk`` does and leaves
    the world model out.

    Args and errors: see :class:`Level2ActionHead`.

    Example::

        adapter = Level2VLAJEPA(policy)
        loss = adapter.loss(batch, k=16)        # in place of policy.forward(batch)[0]
    """

    padding: ClassVar[Literal["valid", "all"]] = "valid"

    def __init__(self, policy: nn.Module, *, impl: str | None = None) -> None:
        name = type(self).__name__
        check_interface(name, "VLAJEPAPolicy", "policy", policy, POLICY)
        peer: Any = policy
        check_interface(name, "VLAJEPAActionHead", "policy.model.action_model", peer.model.action_model, HEAD)
        objective = DenoisingAndConditionLoss(_process(peer.model.action_model))
        super().__init__()
        self.policy: Any = policy
        self.training = policy.training
        self.objective = objective
        self.report = apply_broadcast_attention(peer.model.action_model.model, impl=impl)

    def revert(self) -> None:
        """Put the attention processors back that the policy had; the adapter is of no use afterwards."""
        self.report.revert()

    def encode(self, obs: dict[str, Any]) -> HeadCache:
        """One pass of the vision-language model and, with actions in ``obs``, of the world model."""
        model = self.policy.model
        training = "action" in obs
        inputs = self.policy._prepare_model_inputs(obs, training=training)
        images, size = inputs["images"], model.config.resize_images_to
        if size is not None and not training:
            images = [[F.interpolate(image[None], size=tuple(size), mode="area")[0] for image in v] for v in images]
        world = bool(model.config.enable_world_model) and inputs.get("videos") is not None
        tokens, action_tokens = model._encode_qwen(images, inputs["instructions"], need_action_tokens=world)
        added = None
        if world:
            loss = model._world_model_loss(inputs["videos"], action_tokens) * model.config.world_model_loss_weight
            added = loss.expand(tokens.shape[0])
        head, state = model.action_model, inputs.get("state")
        with torch.autocast(tokens.device.type, enabled=False):
            tokens = tokens.to(head.future_tokens.weight.dtype)
            return HeadCache(tokens, encoded_state(head, None if state is None else state.to(tokens.dtype)), added)

    def denoise(
        self,
        cache: HeadCache,
        x: Tensor,  # [B, K, T, A]
        t: Tensor,  # [B, K]
    ) -> Tensor:  # [B, K, T, A]
        """The velocity at noised actions ``x`` and times ``t``, in steps: [0, action_num_timestep_buckets)."""
        with torch.autocast(x.device.type, enabled=False):
            predicted = velocity(self.policy.model.action_model, cache, x.to(cache.tokens.dtype), t)
        return predicted if cache.added_loss is None else _Tied.apply(predicted, cache.added_loss)

    def actions(self, batch: dict[str, Any]) -> Tensor:  # [B, T, A]
        """The last ``chunk_size`` of ``batch["action"]``, float32."""
        if "action" not in batch:
            raise InvalidArgument(f"{type(self).__name__}: batch must hold 'action', got {sorted(batch)}")
        actions: Tensor = batch["action"]
        actions = actions[:, None] if actions.dim() == 2 else actions
        return actions[:, -self.policy.model.config.chunk_size :].float()

    def mask(self, batch: dict[str, Any]) -> Tensor | None:  # [B, T] bool
        """Not ``batch["action_is_pad"]``."""
        padded = batch.get("action_is_pad")
        return None if padded is None else ~padded[:, -self.policy.model.config.chunk_size :]


class _Tied(torch.autograd.Function):
    """The prediction as it is, with the condition's loss in its graph but no gradient to it from here.

    DistributedDataParallel takes the parameters behind ``forward``'s output for those that get a gradient; the loss is
    added after it.
    """

    @staticmethod
    def forward(ctx: Any, prediction: Tensor, loss: Tensor) -> Tensor:
        return prediction.view_as(prediction)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


def encoded_state(
    head: Any,
    state: Tensor | None,  # [B, Ds] or [B, 1, Ds]
) -> Tensor | None:  # [B, 1, Ci]
    """The state's token, once per condition; None where the head reads no state."""
    if state is None or head.state_encoder is None:
        return None
    token: Tensor = head.state_encoder(state[:, None] if state.dim() == 2 else state)
    return token


def velocity(
    head: Any,
    cache: HeadCache,
    x: Tensor,  # [B, K, T, A]
    t: Tensor,  # [B, K]
) -> Tensor:  # [B, K, T, A]
    """The head on rows of B * K samples, its memory of B conditions."""
    batch, k, tokens = x.shape[:3]
    times = t.reshape(-1).long()
    actions = head.action_encoder(x.flatten(0, 1), times) + head.position_embedding.weight[:tokens]
    parts = [head.future_tokens.weight.expand(batch * k, -1, -1), actions]
    if cache.state is not None:
        parts.insert(0, cache.state[:, None].expand(-1, k, -1, -1).flatten(0, 1))
    out = head.model(hidden_states=torch.cat(parts, 1), encoder_hidden_states=cache.tokens, timestep=times)
    predicted: Tensor = head.action_decoder(out[:, -tokens:])
    return predicted.unflatten(0, (batch, k))


def _process(head: Any) -> FlowMatching:
    """Noise at t = 0, t = (s - u) / s with u of a Beta distribution, times in steps."""
    config = head.config
    s = config.action_noise_s
    times = BetaTimes(config.action_noise_beta_alpha, config.action_noise_beta_beta, start=1.0, stop=(s - 1.0) / s)
    return FlowMatching(noise_at=0, timestep_scale=config.action_num_timestep_buckets, time_quantile=times)
