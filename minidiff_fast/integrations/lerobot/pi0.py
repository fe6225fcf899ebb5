"""pi0 of lerobot on Level-2 batches: PaliGemma and the state token are run once, K action chunks read their keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.integrations.lerobot._flow_vla import (
    TOKEN_MASK,
    TOKENS,
    Decoder,
    FlowVLA,
    Turns,
    has,
    maybe_checkpoint,
    normed,
    places,
    rotary_of,
    suffix_places,
)
from minidiff_fast.nn.condition_cache import ConditionCache, LayerCache
from minidiff_fast.objectives.imitation import BetaTimes
from minidiff_fast.ops.rotary import Rotary

NAME = "Level2PI0"


class Level2PI0(FlowVLA):
    r"""lerobot's ``PI0Policy``: the prefix runs once per condition, the action expert once per sample.

    The prefix (images, language) goes through PaliGemma once. So does the state token through the expert: it never sees
    the actions, so that its keys and values belong to the condition too. The K chunks of action tokens read both, and
    all of themselves, in one softmax. The loss with K = 1 is the peer's own:

    .. math::
        x_t = t \epsilon + (1 - t) a, \quad L = \| v(x_t, t) - (\epsilon - a) \|^2, \quad t \sim offset + scale \cdot
        \mathrm{Beta}(\alpha, \beta)

    over the robot's own action channels; like the peer's it counts padded actions (``action_is_pad`` is not read).

    ``freeze_vision_encoder``, ``train_expert_only``, ``dtype="bfloat16"`` and gradient checkpointing work as in the
    peer. (Cast to bfloat16 the peer has rounded rotary frequencies: the layers turn by those, as in the peer.)
    ``compile_model`` compiles the peer's ``forward``, which is not called here: compile this module.

    Args:
        policy: the ``PI0Policy``; kept as ``policy``, weights shared, not changed.
        impl: implementation of ``broadcast_attention``; None chooses by device.

    Raises:
        InvalidArgument: not a PI0Policy as in lerobot 0.6; adaptive norms (pi0.5); rotary embeddings other than
            Gemma's; a distribution of times that :class:`~minidiff_fast.objectives.BetaTimes` does not have.

    Source: Black et al., pi0, arXiv 2410.24164.
    """

    def __init__(self, policy: nn.Module, *, impl: str | None = None) -> None:
        has(NAME, policy, model="PI0Pytorch", config="PI0Config", _preprocess_images="preprocessing",
            prepare_state="padding", prepare_action="padding")  # fmt: skip
        model: Any = policy.model
        has(NAME, model, paligemma_with_expert="the language model and the expert", embed_prefix="embeds the condition",
            state_proj="of the state", action_in_proj="of actions", action_time_mlp_in="of times",
            action_time_mlp_out="of times", action_out_proj="of actions",
            gradient_checkpointing_enabled="a flag")  # fmt: skip
        has(NAME, model.paligemma_with_expert, paligemma="the language model", gemma_expert="the expert")
        config: Any = policy.config
        offset = config.time_sampling_offset
        times = BetaTimes(
            config.time_sampling_beta_alpha, config.time_sampling_beta_beta, offset, offset + config.time_sampling_scale
        )
        super().__init__(policy, times, config.output_features["action"].shape[0], impl=impl)
        layers = self._layers()
        adaptive = [i for i, (_, expert) in enumerate(layers) if getattr(expert.input_layernorm, "cond_dim", None)]
        if adaptive:
            raise InvalidArgument(f"{NAME}: the expert has adaptive norms (pi0.5) in layers {adaptive}, pi0 has none")
        attention = layers[0][0].self_attn
        rotary, self._exact_turns = _rotary(self._embedding, attention.head_dim)
        self._decoder = Decoder(rotary, float(attention.scaling), wide_residual=True, impl=impl)

    def encode(self, obs: dict[str, Tensor]) -> ConditionCache:
        """The peer's batch dict -> per layer of the expert the keys and values of the prefix and the state token."""
        policy, model = self.policy, self.policy.model
        images, image_masks = policy._preprocess_images(obs)
        tokens, seen, _ = model.embed_prefix(images, image_masks, obs[TOKENS], obs[TOKEN_MASK])
        state = policy.prepare_state(obs)
        if model.state_proj.weight.dtype == torch.float32:
            state = state.to(torch.float32)
        prefix = self._prefix(self._narrowed(tokens)[:, None], seen)
        own = self._state(self._narrowed(model.state_proj(state))[:, None, None], prefix, seen)
        pairs = [
            (torch.cat([k, own_k], 1), torch.cat([v, own_v], 1))
            for (k, v), (own_k, own_v) in zip(prefix, own, strict=True)
        ]
        return ConditionCache.of(pairs, mask=torch.cat([seen, torch.ones_like(seen[:, :1])], 1))

    def denoise(
        self,
        cache: ConditionCache,
        x: Tensor,  # [B, K, T, A]
        t: Tensor,  # [B, K]
    ) -> Tensor:  # [B, K, T, A] float32
        """The velocity at noised actions ``x`` and times ``t`` in [0, 1], at the padded action width."""
        assert cache.mask is not None
        model = self.policy.model
        h = self._narrowed(self._action_tokens(x, t, t.dtype))
        positions = self._turns(suffix_places(cache.mask, x.shape[2]))
        for (_, layer), shared in zip(self._layers(), cache, strict=True):
            h = maybe_checkpoint(self._saves, self._sample_layer, layer, h, shared, positions)
        h = normed(model.paligemma_with_expert.gemma_expert.model.norm, h)
        velocity: Tensor = model.action_out_proj(h.to(torch.float32))
        return velocity

    def actions(self, batch: dict[str, Tensor]) -> Tensor:  # [B, T, A]
        """The batch's actions, padded to the peer's ``max_action_dim``."""
        return self._checked(self.policy.prepare_action(batch))

    @property
    def _steps(self) -> int:
        return int(self.policy.config.num_inference_steps)

    @property
    def _saves(self) -> bool:
        """Whether layers run again in the backward pass."""
        return bool(self.policy.model.gradient_checkpointing_enabled and self.policy.model.training)

    @property
    def _embedding(self) -> Any:
        """The rotary embedding of both the language model and the expert."""
        return self.policy.model.paligemma_with_expert.paligemma.model.language_model.rotary_emb

    def _turns(self, positions: Tensor) -> Tensor | Turns:  # [B, 1, T]
        """The positions, or the peer's own table where its frequencies are not the exact ones."""
        embedding = self._embedding
        if self._exact_turns and torch.finfo(embedding.inv_freq.dtype).bits >= 32:
            return positions
        wide = torch.empty(0, dtype=torch.float32, device=positions.device)  # the table's dtype and device
        cos, sin = embedding(wide, positions.squeeze(1))
        return Turns(cos[:, None, :, None], sin[:, None, :, None])

    def _layers(self) -> list[tuple[Any, Any]]:
        """Pairs of layers: the language model's and the expert's."""
        both = self.policy.model.paligemma_with_expert
        return list(zip(both.paligemma.model.language_model.layers, both.gemma_expert.model.layers, strict=True))

    def _narrowed(self, h: Tensor) -> Tensor:
        """bfloat16 where the language model's weights are."""
        narrow = self._layers()[0][0].self_attn.q_proj.weight.dtype == torch.bfloat16
        return h.to(torch.bfloat16) if narrow else h

    def _prefix(
        self,
        h: Tensor,  # [B, 1, S, C]
        seen: Tensor,  # [B, S] bool
    ) -> list[tuple[Tensor, Tensor]]:  # [B, S, Hkv, D] each
        """The prefix through the language model up to the last layer's keys; its tokens see each other."""
        layers, positions, pairs = self._layers(), self._turns(places(seen)), []
        for i, (layer, _) in enumerate(layers):
            last = i == len(layers) - 1
            h, k, v = maybe_checkpoint(self._saves, self._prefix_layer, layer, h, seen, positions, last)
            pairs.append((k, v))
        return pairs

    def _prefix_layer(
        self, layer: Any, h: Tensor, seen: Tensor, positions: Tensor | Turns, last: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        decoder = self._decoder
        q, k, v = decoder.project(layer, h)
        k, v = decoder.rotated(k, positions).squeeze(1), v.squeeze(1)
        if not last:
            h = decoder.finish(layer, h, decoder.attend(q, LayerCache(k, v, mask=seen), None, positions))
        return h, k, v

    def _state(
        self,
        h: Tensor,  # [B, 1, 1, C]
        prefix: list[tuple[Tensor, Tensor]],
        seen: Tensor,  # [B, S] bool
    ) -> list[tuple[Tensor, Tensor]]:  # [B, 1, Hkv, D] each
        """The state token through the expert up to the last layer's keys; it sees the prefix and itself."""
        decoder, layers, pairs = self._decoder, self._layers(), []
        positions = self._turns(suffix_places(seen, 1))
        for i, ((_, layer), (k, v)) in enumerate(zip(layers, prefix, strict=True)):
            q, own_k, own_v = decoder.project(layer, h)
            pairs.append((decoder.rotated(own_k, positions).squeeze(1), own_v.squeeze(1)))
            if i < len(layers) - 1:
                attended = decoder.attend(q, LayerCache(k, v, mask=seen), (own_k, own_v), positions)
                h = decoder.finish(layer, h, attended)
        return pairs

    def _sample_layer(self, layer: Any, h: Tensor, shared: LayerCache, positions: Tensor | Turns) -> Tensor:
        q, k, v = self._decoder.project(layer, h)
        return self._decoder.finish(layer, h, self._decoder.attend(q, shared, (k, v), positions))


def _rotary(embedding: Any, width: int) -> tuple[Rotary, bool]:
    """Gemma's rotation, and whether the peer's frequencies are exactly those: bfloat16 weights have rounded ones."""
    parameters = getattr(embedding.config, "rope_parameters", None) or {}
    base = parameters.get("rope_theta", getattr(embedding.config, "rope_theta", None))
    has(NAME, embedding, inv_freq="frequencies", attention_scaling="factor on the rotation")
    found = embedding.inv_freq.detach().double().cpu()
    if base is not None and embedding.attention_scaling == 1.0 and found.numel() == width // 2:
        wanted = float(base) ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
        if torch.allclose(found, wanted, rtol=1e-2, atol=0.0):
            exact = torch.allclose(found, wanted, rtol=1e-5, atol=0.0)
            return rotary_of(NAME, width, float(base)), exact
    raise InvalidArgument(
        f"{NAME}: the language model's rotary embedding must turn all {width} channels of a head by "
        f"position * base ** (-2 i / {width}), got {type(embedding).__name__} with {parameters or base}"
    )
