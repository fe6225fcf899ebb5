"""SmolVLA of lerobot on Level-2 batches: the language model reads a condition once, K action chunks read its keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.integrations.lerobot._flow_vla import (
    ACTION,
    STATE,
    TOKEN_MASK,
    TOKENS,
    Decoder,
    FlowVLA,
    has,
    normed,
    places,
    rotary_of,
    suffix_places,
)
from minidiff_fast.nn.condition_cache import ConditionCache, LayerCache
from minidiff_fast.objectives.imitation import BetaTimes

NAME = "Level2SmolVLA"


class Level2SmolVLA(FlowVLA):
    r"""lerobot's ``SmolVLAPolicy``: the prefix runs once per condition, the action expert once per sample.

    The prefix (images, language, state) goes through the language model once. Where the expert's layers attend jointly,
    the cache has the language model's keys and values; where they cross-attend, what the expert's projections make of
    them. The K chunks of action tokens read these, and themselves causally, in one softmax. The peer's prefix never
    sees actions, so that the loss with K = 1 is the peer's own:

    .. math::
        x_t = t \epsilon + (1 - t) a, \quad L = \| v(x_t, t) - (\epsilon - a) \|^2, \quad t \sim 0.001 + 0.999\,
        \mathrm{Beta}(1.5, 1)

    over the robot's own action channels and the actions that ``action_is_pad`` does not mark.

    ``freeze_vision_encoder``, ``train_expert_only`` and ``adapt_to_pi_aloha`` work as in the peer (the batch is not
    changed in place). ``compile_model`` compiles the peer's ``forward``, which is not called here: compile this module.

    Args:
        policy: the ``SmolVLAPolicy``; kept as ``policy``, weights shared, not changed.
        impl: implementation of ``broadcast_attention``; None chooses by device.

    Raises:
        InvalidArgument: not a SmolVLAPolicy as in lerobot 0.6, or one whose layers do not fit together.

    Source: Shukor et al., SmolVLA, arXiv 2506.01844.
    """

    def __init__(self, policy: nn.Module, *, impl: str | None = None) -> None:
        has(NAME, policy, model="VLAFlowMatching", config="SmolVLAConfig", prepare_images="preprocessing",
            prepare_state="preprocessing", prepare_action="padding")  # fmt: skip
        model: Any = policy.model
        has(NAME, model, vlm_with_expert="the language model and the expert", embed_prefix="embeds the condition",
            action_in_proj="of actions", action_time_mlp_in="of times", action_time_mlp_out="of times",
            action_out_proj="of actions")  # fmt: skip
        has(NAME, model.vlm_with_expert, get_vlm_model="the language model", get_model_layers="pairs of layers",
            lm_expert="the expert", attention_mode="self_attn or cross_attn",
            self_attn_every_n_layers="which layers attend jointly")  # fmt: skip
        config: Any = policy.config
        super().__init__(policy, BetaTimes(1.5, start=0.001, stop=1.0), config.action_feature.shape[0], impl=impl)
        head = int(model.vlm_with_expert.vlm.config.text_config.head_dim)
        self._decoder = Decoder(rotary_of(NAME, head, 10_000.0), head**-0.5, wide_residual=False, impl=impl)
        self._check_projections()

    def encode(self, obs: dict[str, Tensor]) -> ConditionCache:
        """The peer's batch dict -> per layer of the expert the keys and values of the prefix, S tokens."""
        policy = self.policy
        if policy.config.adapt_to_pi_aloha:
            obs = {**obs, STATE: policy._pi_aloha_decode_state(obs[STATE].clone())}
        images, image_masks = policy.prepare_images(obs)
        tokens, seen, order = policy.model.embed_prefix(
            images, image_masks, obs[TOKENS], obs[TOKEN_MASK], state=policy.prepare_state(obs)
        )
        rank = order.cumsum(1)
        visible = (rank[:, None, :] <= rank[:, :, None]) & seen[:, None, :]  # [B, S, S]
        return ConditionCache.of(self._prefix(tokens[:, None], visible, places(seen)), mask=seen)

    def denoise(
        self,
        cache: ConditionCache,
        x: Tensor,  # [B, K, T, A]
        t: Tensor,  # [B, K]
    ) -> Tensor:  # [B, K, T, A] float32
        """The velocity at noised actions ``x`` and times ``t`` in [0, 1], at the padded action width."""
        assert cache.mask is not None
        decoder, h = self._decoder, self._action_tokens(x, t)
        after = suffix_places(cache.mask, x.shape[2])
        alone = torch.arange(x.shape[2], device=x.device)[None, None]
        layers = [(expert, joint) for _, expert, joint in self._layers() if expert is not None]
        for (layer, joint), shared in zip(layers, cache, strict=True):
            if joint:
                q, k, v = decoder.project(layer, h)
                attended = decoder.attend(q, shared, (k, v), after, causal=True)
            else:
                attended = decoder.attend(decoder.queries(layer, h), shared, None, alone)
            h = decoder.finish(layer, h, attended)
        h = normed(self.policy.model.vlm_with_expert.lm_expert.norm, h)
        velocity: Tensor = self.policy.model.action_out_proj(h.to(torch.float32))
        return velocity

    def actions(self, batch: dict[str, Tensor]) -> Tensor:  # [B, T, A]
        """The batch's actions, padded to the peer's ``max_action_dim``."""
        if self.policy.config.adapt_to_pi_aloha:
            batch = {**batch, ACTION: self.policy._pi_aloha_encode_actions_inv(batch[ACTION].clone())}
        return self._checked(self.policy.prepare_action(batch))

    def mask(self, batch: dict[str, Tensor]) -> Tensor | None:  # [B, T] bool
        """Where ``action_is_pad`` is False; None without it."""
        padded = batch.get("action_is_pad")
        return None if padded is None else ~padded

    def _restored(self, actions: Tensor) -> Tensor:  # [B, K, T, A]
        if not self.policy.config.adapt_to_pi_aloha:
            return actions
        rows: Tensor = self.policy._pi_aloha_encode_actions(actions.flatten(0, 1))
        return rows.unflatten(0, actions.shape[:2])

    @property
    def _steps(self) -> int:
        return int(self.policy.config.num_steps)

    def _layers(self) -> list[tuple[Any, Any, bool]]:
        """Per layer of the language model: the layer, the expert's or None, and whether the two attend jointly."""
        both = self.policy.model.vlm_with_expert
        cross, every = "cross" in both.attention_mode, both.self_attn_every_n_layers
        pairs = zip(*both.get_model_layers([both.get_vlm_model().text_model, both.lm_expert]), strict=True)
        return [(layer, expert, not cross or (every > 0 and i % every == 0)) for i, (layer, expert) in enumerate(pairs)]

    def _prefix(
        self,
        h: Tensor,  # [B, 1, S, C]
        visible: Tensor,  # [B, S, S] bool
        positions: Tensor,  # [B, 1, S]
    ) -> list[tuple[Tensor, Tensor]]:  # [B, S, Hkv, D] each
        """The condition's tokens through the language model, as far as the expert reads it."""
        decoder, layers, pairs = self._decoder, self._layers(), []
        last = max(i for i, (_, expert, _) in enumerate(layers) if expert is not None)
        for i, (layer, expert, joint) in enumerate(layers[: last + 1]):
            q, k, v = decoder.project(layer, h)
            k, v = decoder.rotated(k, positions).squeeze(1), v.squeeze(1)
            if expert is not None:
                pairs.append((k, v) if joint else _reprojected(expert.self_attn, k, v))
            if i < last:
                h = decoder.finish(layer, h, decoder.attend(q, LayerCache(k, v, mask=visible), None, positions))
        return pairs

    def _check_projections(self) -> None:
        """A cross-attention layer of the expert reads the language model's keys, a joint one the expert's tokens."""
        for i, (layer, expert, joint) in enumerate(self._layers()):
            if expert is None:
                continue
            projection = expert.self_attn.k_proj
            wanted = expert.self_attn.q_proj.in_features if joint else layer.self_attn.k_proj.out_features
            if projection.in_features != wanted:
                raise InvalidArgument(
                    f"{NAME}: layer {i} of the expert {'attends jointly' if joint else 'cross-attends'}, so its k_proj "
                    f"must take {wanted} channels, got {projection.in_features}: the peer's own forward fails too "
                    "(num_expert_layers and self_attn_every_n_layers do not go together)"
                )


def _reprojected(attention: Any, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What the expert makes of the language model's keys and values, ``[B, S, Hkv, D]`` each; not rotated again."""
    keys = attention.k_proj(k.flatten(-2).to(attention.k_proj.weight.dtype))
    values = attention.v_proj(v.flatten(-2).to(attention.v_proj.weight.dtype))
    return keys.unflatten(-1, (-1, attention.head_dim)), values.unflatten(-1, (-1, attention.head_dim))
