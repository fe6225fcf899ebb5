"""lerobot's GR00T N1.7 on Level-2 batches: the backbone and its tokens once per condition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.integrations.adapter import Level2Adapter
from minidiff_fast.integrations.diffusers import apply_broadcast_attention
from minidiff_fast.integrations.lerobot._interface import check_interface
from minidiff_fast.level2 import Drawn, Level2Batch
from minidiff_fast.objectives.imitation import BetaTimes, FlowMatching
from minidiff_fast.ops.level2_noise import NoiseDraw, TimestepDraw

HEAD = (
    "config.noise_s", "config.noise_beta_alpha", "config.noise_beta_beta", "config.use_alternate_vl_dit",
    "config.add_pos_embed", "config.state_history_length", "num_timestep_buckets", "state_dropout_prob",
    "process_backbone_output", "set_frozen_modules_to_eval_mode", "model.transformer_blocks", "state_encoder.layer1.W",
    "action_encoder.W1.W", "action_encoder.W2.b", "action_encoder.W3.W", "action_encoder.pos_encoding",
    "action_decoder.layer1.W", "action_decoder.layer2.b",
)  # fmt: skip
POLICY = (
    "_filter_groot_inputs", "config.use_bf16", "_groot_model.prepare_input", "_groot_model.backbone",
    "_groot_model.action_head", "_groot_model.dtype",
)  # fmt: skip


class GR00TCache(NamedTuple):
    """What all samples of a condition read."""

    tokens: Tensor
    """[B, S, C]: the backbone's tokens, normed and through their own self-attention."""
    state: Tensor
    """[B, 1, Ci]: the encoded state, a token of every sample."""
    embodiment: Tensor
    """[B] integer: whose weights the encoders and the decoder use."""
    attention_mask: Tensor
    """[B, S] bool: True where there is a token."""
    image_mask: Tensor | None = None
    """[B, S] bool: True for tokens of images; read by ``AlternateVLDiT`` only."""


@dataclass(frozen=True, eq=False)
class EntrywiseMaskedLoss:
    r"""The mean squared error over the action entries that count: GR00T pads action dimensions as well as steps.

    .. math::
        L = \sum_{bkta} m_{bta} (\hat v_{bkta} - v_{bkta})^2 / (K (\sum_{bta} m_{bta} + 10^{-6}))

    with the mask m ``batch.obs["action_mask"] [B, T, A]``.
    """

    process: FlowMatching
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
    ) -> Tensor:  # [B, K] float32
        """The loss of every sample of ``batch``, so that the mean over B * K is L; weights applied."""
        mask = batch.obs.get("action_mask")
        if mask is None or mask.shape != batch.actions.shape:
            raise InvalidArgument(
                f"EntrywiseMaskedLoss: action_mask must be [B, T, A] = {list(batch.actions.shape)}, got "
                f"{None if mask is None else list(mask.shape)}"
            )
        noised = batch.noised(self.process)
        mask = mask.to(batch.actions.device, torch.float32)
        error = (denoise(cache, noised.x, noised.t).float() - noised.target).square() * mask[:, None]
        loss = error.sum((2, 3)) * (mask.shape[0] / (mask.sum() + 1e-6))
        return loss if batch.weight is None else loss * batch.weight


class Level2GR00THead(Level2Adapter):
    r"""GR00T's ``GR00TN17ActionHead`` on Level-2 batches, without the backbone before it.

    Once per condition: norm and self-attention of the backbone's tokens, and the state encoder. Once per condition in
    every call of ``denoise``, that is per chunk of samples: the keys and values that the cross-attention layers make of
    the tokens, and the weights of the condition's embodiment, which the peer gathers for every row (the second layer of
    its action encoder alone is 3072 x 1536 numbers). Per sample: the rest of the transformer.

    Batches are dicts with what ``head.forward`` reads: ``backbone_features [B, S, C]``, ``backbone_attention_mask``
    and ``image_mask [B, S]`` (True = a token, an image's token), ``state [B, history, Ds]``, ``embodiment_id [B]``,
    ``action [B, T, A]`` and ``action_mask [B, T, A]``. Times are distributed as ``head.sample_time`` draws them (noise
    at t = 0), and the network gets them in ``num_timestep_buckets`` steps.

    In training the state's token is dropped with ``state_dropout_prob``, drawn for every sample: the peer draws it for
    every row. Adaptive layer norms depend on the timestep alone and run per sample, as in the peer.

    The head's transformer gets un-repeated memory by :func:`apply_broadcast_attention`, in place: with as many rows of
    tokens as samples it computes what it did before, so that ``head.forward`` and ``head.get_action`` go on working.
    ``adapter.revert()`` puts the processors back that were there.

    Args:
        head: lerobot's (interface of lerobot 0.6), in its dtype and on its device.
        impl: implementation of ``broadcast_attention``; None chooses by device.

    Raises:
        InvalidArgument: the head's interface is another one, its times are of a Beta distribution of which neither
            parameter is 1, or nothing in it could be replaced.
    """

    def __init__(self, head: nn.Module, *, impl: str | None = None) -> None:
        check_interface(type(self).__name__, "GR00TN17ActionHead", "head", head, HEAD)
        peer: Any = head
        objective = EntrywiseMaskedLoss(_process(peer))
        super().__init__()
        self.head: Any = head
        self.training = head.training
        self.objective = objective
        self.report = apply_broadcast_attention(peer.model, impl=impl)

    def revert(self) -> None:
        """Put the attention processors back that the head had; the adapter is of no use afterwards."""
        self.report.revert()

    def encode(self, obs: Any) -> GR00TCache:
        """The backbone's output and the state -> what all samples read."""
        return encoded(self.head, obs, obs)

    def denoise(
        self,
        cache: GR00TCache,
        x: Tensor,  # [B, K, T, A]
        t: Tensor,  # [B, K]
    ) -> Tensor:  # [B, K, T, A]
        """The velocity at noised actions ``x`` and times ``t``, in steps: [0, num_timestep_buckets)."""
        return velocity(self.head, cache, x, t)

    def actions(self, batch: Any) -> Tensor:  # [B, T, A]
        """``batch["action"]``."""
        actions: Tensor = batch["action"]
        return actions


class Level2GR00T(Level2Adapter):
    """lerobot's ``GrootPolicy`` (GR00T N1.7) on Level-2 batches, the dicts that ``policy.forward`` takes.

    Once per condition: the vision-language backbone and what :class:`Level2GR00THead` shares. Runs under bfloat16
    autocast where ``policy.config.use_bf16`` says so, as ``policy.forward`` does.

    Args and errors: see :class:`Level2GR00THead`.

    Example::

        adapter = Level2GR00T(policy)
        loss = adapter.loss(batch, k=8)         # in place of policy.forward(batch)[0]
    """

    def __init__(self, policy: nn.Module, *, impl: str | None = None) -> None:
        name = type(self).__name__
        check_interface(name, "GrootPolicy", "policy", policy, POLICY)
        peer: Any = policy
        head = peer._groot_model.action_head
        check_interface(name, "GR00TN17ActionHead", "policy._groot_model.action_head", head, HEAD)
        objective = EntrywiseMaskedLoss(_process(head))
        super().__init__()
        self.policy: Any = policy
        self.training = policy.training
        self.objective = objective
        self.report = apply_broadcast_attention(head.model, impl=impl)

    def revert(self) -> None:
        """Put the attention processors back that the policy had; the adapter is of no use afterwards."""
        self.report.revert()

    def encode(self, obs: dict[str, Any]) -> GR00TCache:
        """One pass of the backbone."""
        model = self.policy._groot_model
        inputs = self.policy._filter_groot_inputs(obs, include_action="action" in obs)
        with self._autocast():
            backbone_inputs, action_inputs = model.prepare_input(inputs)
            return encoded(model.action_head, model.backbone(backbone_inputs), action_inputs)

    def denoise(
        self,
        cache: GR00TCache,
        x: Tensor,  # [B, K, T, A]
        t: Tensor,  # [B, K]
    ) -> Tensor:  # [B, K, T, A]
        """The velocity at noised actions ``x`` and times ``t``, in steps: [0, num_timestep_buckets)."""
        with self._autocast():
            return velocity(self.policy._groot_model.action_head, cache, x, t)

    def actions(self, batch: dict[str, Any]) -> Tensor:  # [B, T, A]
        """``batch["action"]`` on the model's device and in its dtype."""
        if "action" not in batch:
            raise InvalidArgument(f"{type(self).__name__}: batch must hold 'action', got {sorted(batch)}")
        model = self.policy._groot_model
        actions: Tensor = batch["action"].to(model.device, model.dtype)
        return actions

    def _autocast(self) -> torch.autocast:
        device = self.policy._groot_model.device.type
        return torch.autocast(device, dtype=torch.bfloat16, enabled=self.policy.config.use_bf16)


def encoded(head: Any, backbone: Any, action: Any) -> GR00TCache:
    """The backbone's output and the state -> what all samples of a condition read."""
    head.set_frozen_modules_to_eval_mode()
    tokens = head.process_backbone_output({"backbone_features": backbone["backbone_features"]})["backbone_features"]
    state, embodiment = action["state"], action["embodiment_id"]
    history = head.config.state_history_length
    if state.dim() != 3 or state.shape[1] != history:
        raise InvalidArgument(f"GR00T: state must be [B, history, Ds] = [B, {history}, Ds], got {list(state.shape)}")
    images = None
    if head.config.use_alternate_vl_dit:
        if backbone["image_mask"] is None:
            raise InvalidArgument("GR00T: AlternateVLDiT needs image_mask [B, S], got None")
        images = backbone["image_mask"]
    token = head.state_encoder(state.reshape(state.shape[0], 1, -1), embodiment)
    return GR00TCache(tokens, token, embodiment, backbone["backbone_attention_mask"], images)


def velocity(
    head: Any,
    cache: GR00TCache,
    x: Tensor,  # [B, K, T, A]
    t: Tensor,  # [B, K]
) -> Tensor:  # [B, K, T, A]
    """The head on rows of B * K samples, its memory of B conditions."""
    batch, k, tokens = x.shape[:3]
    times = t.long()
    actions = _encoded_actions(head.action_encoder, x, times, cache.embodiment)
    if head.config.add_pos_embed:
        actions = actions + head.position_embedding.weight[:tokens]
    state = cache.state[:, None].expand(-1, k, -1, -1)
    if head.training and head.state_dropout_prob > 0:
        kept = torch.rand(batch, k, 1, 1, device=state.device) >= head.state_dropout_prob
        state = state * kept.to(state.dtype)
    rows = torch.cat([state.to(actions.dtype), actions], 2).flatten(0, 1)
    masks = {"encoder_attention_mask": cache.attention_mask}
    if cache.image_mask is not None:
        masks |= {"image_mask": cache.image_mask, "backbone_attention_mask": cache.attention_mask}
    out = head.model(hidden_states=rows, encoder_hidden_states=cache.tokens, timestep=times.flatten(), **masks)
    decoder = head.action_decoder
    hidden = _linear(decoder.layer1, out[:, -tokens:].unflatten(0, (batch, k)), cache.embodiment)
    return _linear(decoder.layer2, torch.relu(hidden), cache.embodiment)


def _encoded_actions(
    encoder: Any,
    x: Tensor,  # [B, K, T, A]
    t: Tensor,  # [B, K] int64
    embodiment: Tensor,  # [B]
) -> Tensor:  # [B, K, T, Ci]
    """The peer's action encoder; its second layer in two parts, as all tokens of a sample have one timestep."""
    embedded = _linear(encoder.W1, x, embodiment)
    time = encoder.pos_encoding(t).to(embedded.dtype)[:, :, None]
    weight, bias = encoder.W2.W[embodiment], encoder.W2.b[embodiment]
    width = embedded.shape[-1]
    hidden = _product(embedded, weight[:, :width]) + (_product(time, weight[:, width:]) + bias[:, None, None])
    return _linear(encoder.W3, torch.nn.functional.silu(hidden), embodiment)


def _linear(
    layer: Any,
    x: Tensor,  # [B, K, T, Ci]
    embodiment: Tensor,  # [B]
) -> Tensor:  # [B, K, T, Co]
    """``CategorySpecificLinear``, the weights of an embodiment gathered for every condition, not for every sample."""
    return _product(x, layer.W[embodiment]) + layer.b[embodiment][:, None, None]


def _product(
    x: Tensor,  # [B, K, T, Ci]
    weight: Tensor,  # [B, Ci, Co]
) -> Tensor:  # [B, K, T, Co]
    return torch.bmm(x.flatten(1, 2), weight).unflatten(1, x.shape[1:3])


def _process(head: Any) -> FlowMatching:
    """Noise at t = 0, t = s (1 - u) with u of a Beta distribution, times in steps."""
    config = head.config
    times = BetaTimes(config.noise_beta_alpha, config.noise_beta_beta, start=config.noise_s, stop=0.0)
    return FlowMatching(noise_at=0, timestep_scale=head.num_timestep_buckets, time_quantile=times)
