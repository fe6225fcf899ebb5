"""SharedPrefixAttention: samples see the scene and themselves, never each other; the scene never sees samples."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from minidiff_fast.nn._projected_attention import Norm, ProjectedAttention
from minidiff_fast.nn.condition_cache import LayerCache
from minidiff_fast.nn.rotary import RotaryModule
from minidiff_fast.ops import Rotary

NAME = "SharedPrefixAttention"


class SharedPrefixOutput(NamedTuple):
    """What :class:`SharedPrefixAttention` returns."""

    scene: Tensor
    """[B, S, C]."""
    own: Tensor
    """[B, K, P, C]."""


class SharedPrefixAttention(ProjectedAttention):
    r"""Self-attention over [scene, samples] with the mask of two-level minibatching.

    .. math::
        scene_b &= \mathrm{Attn}(x_b \to x_b) \\
        own_{bk} &= \mathrm{Attn}(y_{bk} \to [x_b, y_{bk}])

    with one set of projections. This is one attention over the S + K * P tokens of a condition under a block mask
    (S x S and, for each sample, P x (S + P)), and it is K attentions over [scene, own tokens] whose scene rows do not
    see the own ones; but the scene's projections and its self-attention run once per condition, and no score between
    two samples is computed. Mini-Diffuser's masked global attention; the prefix and suffix of pi0 and SmolVLA.

    :meth:`forward` runs both parts. :meth:`encode` and :meth:`denoise` run them apart: the scene's layers first, whose
    keys and values go into a :class:`~minidiff_fast.nn.ConditionCache`, then the samples, at every denoising step::

        pairs = []
        for block in blocks:                                   # encode: once per condition
            out, pair = block.attention.encode(block.norm(scene), lengths=lengths)
            scene, pairs = block.rest(scene, out), [*pairs, pair]
        cache = ConditionCache.of(pairs, lengths=lengths)
        for block, layer in zip(blocks, cache):                # denoise: every step
            own = block.rest(own, block.attention.denoise(block.norm(own), layer))

    Args:
        embed_dim, num_heads, dropout, bias, device, dtype: as in ``nn.MultiheadAttention``, whose parameter names and
            initialisation these are (its state dict loads strictly). Head dimension 8 to 256. Dropout is on attention
            weights, drawn per sample, and once per condition for the scene.
        num_kv_heads: fewer heads for keys and values; it divides ``num_heads``.
        qk_norm: "layer" or "rms": norm of queries and keys over the D channels of a head, before the rotation.
        rotary: :class:`~minidiff_fast.nn.Rotary3D`, :class:`~minidiff_fast.nn.Rotary1D` or a bare recipe; then every
            call needs positions.
        own_causal: own token t sees own tokens p <= t only (and all of the scene).
        impl: implementation of ``broadcast_attention``; None chooses by device.

    Raises :class:`InvalidArgument` for arguments that make no module.

    Source: Mini-Diffuser (Hu et al., arXiv 2505.09430).

    >>> attention = SharedPrefixAttention(64, 4)
    >>> out = attention(torch.randn(2, 100, 64), torch.randn(2, 16, 8, 64))
    >>> out.scene.shape, out.own.shape
    (torch.Size([2, 100, 64]), torch.Size([2, 16, 8, 64]))
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        *,
        num_kv_heads: int | None = None,
        qk_norm: Norm | None = None,
        rotary: RotaryModule | Rotary | None = None,
        own_causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        impl: str | None = None,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, dropout, bias, False, False, None, None, True, device, dtype,
            num_kv_heads, qk_norm, rotary, impl,
        )  # fmt: skip
        self.own_causal = own_causal

    def forward(  # type: ignore[override]
        self,
        scene: Tensor,  # [B, S, C]
        own: Tensor,  # [B, K, P, C]
        *,
        lengths: Tensor | None = None,  # [B] integer
        mask: Tensor | None = None,  # [B, S] bool, True = may be seen
        scene_positions: Tensor | None = None,  # [B, S, 3]
        own_positions: Tensor | None = None,  # [B, K, P, 3]
    ) -> SharedPrefixOutput:
        """Both parts. Positions are metres (indices with Rotary1D, without the 3), and get no gradient.

        Scene tokens beyond ``lengths`` or outside ``mask`` are seen by nobody, but are queries all the same: they must
        be finite, and their rows of the result mean nothing.
        """
        scene_out, pair = self.encode(scene, lengths=lengths, mask=mask, positions=scene_positions)
        layer = LayerCache(*pair, lengths=lengths, mask=mask)
        return SharedPrefixOutput(scene_out, self.denoise(own, layer, positions=own_positions))

    def encode(
        self,
        scene: Tensor,  # [B, S, C]
        *,
        lengths: Tensor | None = None,  # [B] integer
        mask: Tensor | None = None,  # [B, S] bool, True = may be seen
        positions: Tensor | None = None,  # [B, S, 3]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # [B, S, C]; [B, S, Hkv, D] each
        """The scene's self-attention, and the keys and values that its samples will read."""
        self._check_tokens("scene", scene, ["B", "S", self.embed_dim], "[B, S, C]")
        k, v = self._keys_values(scene, scene, positions)
        rope = None
        if self.rotary is not None and positions is not None:
            rope = self.rotary(positions.unsqueeze(1))
        layer = LayerCache(k, v, lengths=lengths, mask=mask)
        out = self._attend(self._queries(scene).unsqueeze(1), layer, rope=rope)
        return out.squeeze(1), (k, v)

    def denoise(
        self,
        own: Tensor,  # [B, K, P, C]
        cache: LayerCache | tuple[Tensor, Tensor],  # [B, S, Hkv, D] each, or packed [N, Hkv, D]
        *,
        positions: Tensor | None = None,  # [B, K, P, 3]
    ) -> Tensor:  # [B, K, P, C]
        """The samples' attention to the scene and to themselves.

        ``cache`` is ``ConditionCache[layer]`` or (k, v) of :meth:`encode` or :meth:`project_condition`; the scene may
        be padded or packed.
        """
        layer = self._one_layer(cache)
        self._check_tokens("own", own, [layer.batch, "K", "P", self.embed_dim], "[B, K, P, C]", k=layer.k)
        own_k, own_v = self._heads_of(own, own)
        own_k = self._normed_keys(own_k)
        self._check_positions("own positions", positions)
        rope = None
        if self.rotary is not None and positions is not None:
            rope = self.rotary(positions, positions)
        return self._attend(self._queries(own), layer, own_k, own_v, rope=rope, own_causal=self.own_causal)

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, own_causal={self.own_causal}"
