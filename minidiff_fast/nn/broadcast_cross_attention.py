"""BroadcastCrossAttention: nn.MultiheadAttention whose keys and values exist once per condition."""

from __future__ import annotations

import torch
from torch import Tensor

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.nn._projected_attention import Norm, ProjectedAttention
from minidiff_fast.nn.condition_cache import LayerCache
from minidiff_fast.nn.rotary import RotaryModule
from minidiff_fast.ops import Rotary
from minidiff_fast.shapes import Layout, check_layout, merge_samples, samples_per_condition, split_samples

NAME = "BroadcastCrossAttention"


class BroadcastCrossAttention(ProjectedAttention):
    r"""Cross-attention of N = B * K queries to the tokens of B conditions, in place of ``nn.MultiheadAttention``.

    .. math::
        out_{bk} = W_o \, \mathrm{concat}_h \, \mathrm{softmax}(q_{bkh} k_{bh}^T / \sqrt{D}) v_{bh} + b_o, \quad
        q = W_q x_{bk} + b_q,\; k = W_k m_b + b_k,\; v = W_v m_b + b_v

    Constructor arguments, parameter names, initialisation and results are those of ``nn.MultiheadAttention`` with the
    conditions repeated K times; they are projected once and never repeated. What differs:

    * ``key`` and ``value`` have B rows for the N rows of ``query``; ``layout`` says how rows belong to conditions;
    * the attention weights are not returned (None), as they are never stored: ``need_weights=True`` raises;
    * masks are boolean; a query that sees no token gives the bias of ``out_proj`` (the parent class gives NaN where it
      returns weights);
    * the keys and values can be projected ahead (:meth:`project_condition`,
      :meth:`ConditionCache.build <minidiff_fast.nn.ConditionCache.build>`) and handed over as ``cache``.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as in
            ``nn.MultiheadAttention``. The two extra tokens of ``add_bias_kv`` and ``add_zero_attn`` are visible to
            every query, whatever the masks say. Head dimension 8 to 256.
        layout: "bk" (row b * K + k) or "kb" (row k * B + b) of ``query``.
        num_kv_heads: fewer heads for keys and values (grouped queries); it divides ``num_heads``.
        qk_norm: "layer" or "rms": norm of queries and keys over the D channels of a head, before the rotation.
        rotary: :class:`~minidiff_fast.nn.Rotary3D`, :class:`~minidiff_fast.nn.Rotary1D` or a bare recipe; then
            :meth:`forward` needs positions.
        impl: implementation of ``broadcast_attention``; None chooses by device.

    Raises:
        InvalidArgument: arguments that make no module; ``add_bias_kv`` or ``add_zero_attn`` together with
            ``num_kv_heads``, ``qk_norm`` or ``rotary``, for which torch defines nothing.

    >>> attention = BroadcastCrossAttention(64, 4, batch_first=True)
    >>> scene = torch.randn(2, 100, 64)                # B = 2 conditions
    >>> samples = torch.randn(2 * 16, 8, 64)           # K = 16 samples of each
    >>> attention(samples, scene, scene)[0].shape
    torch.Size([32, 8, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        layout: Layout = "bk",
        num_kv_heads: int | None = None,
        qk_norm: Norm | None = None,
        rotary: RotaryModule | Rotary | None = None,
        impl: str | None = None,
    ) -> None:
        check_layout(NAME, layout)
        ours = {"num_kv_heads": num_kv_heads, "qk_norm": qk_norm, "rotary": rotary}
        for extra, given in (("add_bias_kv", add_bias_kv), ("add_zero_attn", add_zero_attn)):
            beside = [name for name, value in ours.items() if value is not None]
            if given and beside:
                raise InvalidArgument(f"{NAME}: {extra}=True is not defined together with {', '.join(beside)}")
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype,
            num_kv_heads, qk_norm, rotary, impl,
        )  # fmt: skip
        self.layout = layout

    def forward(  # type: ignore[override]
        self,
        query: Tensor,  # [T, N, E], batch_first [N, T, E]; or [B, K, T, E]
        key: Tensor | None = None,  # [S, B, kdim], batch_first [B, S, kdim]
        value: Tensor | None = None,  # [S, B, vdim], batch_first [B, S, vdim]
        key_padding_mask: Tensor | None = None,  # [B, S] bool, True = ignore
        need_weights: bool = False,
        attn_mask: Tensor | None = None,  # [T, S] bool, True = not allowed
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        cache: LayerCache | tuple[Tensor, Tensor] | None = None,  # [B, S, Hkv, D] each
        lengths: Tensor | None = None,  # [B] integer
        query_positions: Tensor | None = None,  # the leading axes of query, and 3
        key_positions: Tensor | None = None,  # the leading axes of key, and 3
    ) -> tuple[Tensor, None]:
        """Attend; the result has the shape of ``query``.

        Args:
            query: N = B * K rows in the order of ``layout``, or explicit ``[B, K, T, E]``. Without a batch axis in
                query, key and value (``[T, E]``, ``[S, kdim]``) B = K = 1.
            key, value: one row per condition; ``value`` is ``key`` where None.
            key_padding_mask: as in the parent class, for the B conditions.
            need_weights, average_attn_weights: the first must be False, the second says nothing then.
            attn_mask: as in the parent class, boolean, the same for every row and head.
            is_causal: a hint in the parent class; here it says that ``attn_mask`` is there, and no more.
            cache: keys and values from :meth:`project_condition`, in place of ``key`` and ``value``; conditions first
                whatever ``batch_first`` is. A :class:`~minidiff_fast.nn.LayerCache` (``ConditionCache[layer]``) brings
                its own lengths or packing.
            lengths: condition b has the tokens 0 .. lengths[b] - 1: a ``key_padding_mask`` that the kernels skip by.
            query_positions, key_positions: where the tokens are, for modules with ``rotary``; the keys of a cache
                are rotated already. No gradient.

        Raises:
            InvalidArgument: shapes, dtypes, devices or combinations that do not fit; nothing has run.
        """
        if need_weights:
            raise InvalidArgument(
                f"{NAME}: need_weights must be False: the attention weights [N, T, S] are never stored, which is where "
                "the memory goes; use nn.MultiheadAttention to look at them"
            )
        if is_causal and attn_mask is None:
            raise InvalidArgument(f"{NAME}: is_causal=True needs attn_mask, as in nn.MultiheadAttention")
        if query.dim() == 2:
            return self._without_batch(
                query, key, value, key_padding_mask, attn_mask, cache, lengths, query_positions, key_positions
            )
        self._check_query(query)
        layer = self._layer(key, value, cache, lengths, key_positions)
        batch = layer.batch
        x = self._by_sample(query, batch, explicit=query.dim() == 4)  # [B, K, T, E]
        if x.shape[0] != batch:
            raise InvalidArgument(f"{NAME}: query must be [B, K, T, E] with B = {batch}, got {list(query.shape)}")
        self._check_positions("query_positions", query_positions)
        rope = None
        if self.rotary is not None and query_positions is not None:
            rope = self.rotary(self._by_sample(query_positions, batch, explicit=query.dim() == 4))
        mask = self._mask(key_padding_mask, attn_mask, layer, x.shape[2])
        own_k, own_v = self._extra_tokens(x, layer)
        out = self._attend(self._queries(x), layer, own_k, own_v, mask=mask, rope=rope)
        if query.dim() == 4:
            return out, None
        rows = merge_samples(out, self.layout)
        return rows if self.batch_first else rows.transpose(0, 1), None

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, layout={self.layout!r}"

    # ---------------------------------------------------------------- rows and conditions

    def _by_sample(self, x: Tensor, batch: int, explicit: bool) -> Tensor:
        """Rows ``[T, N, ...]`` or ``[N, T, ...]`` -> ``[B, K, T, ...]``, a view."""
        if explicit:
            return x
        x = x if self.batch_first else x.transpose(0, 1)
        samples_per_condition(NAME, x.shape[0], batch)
        return split_samples(x, batch, self.layout)

    def _layer(
        self,
        key: Tensor | None,
        value: Tensor | None,
        cache: LayerCache | tuple[Tensor, Tensor] | None,
        lengths: Tensor | None,
        key_positions: Tensor | None,
    ) -> LayerCache:
        """Keys and values of the conditions: those of the cache, or projected now."""
        if cache is not None:
            if key is not None or value is not None or key_positions is not None:
                raise InvalidArgument(
                    f"{NAME}: cache takes the place of key, value and key_positions; give one or the other"
                )
            layer = self._one_layer(cache)
            if lengths is not None and (layer.lengths is not None or layer.cu_seqlens is not None):
                raise InvalidArgument(f"{NAME}: lengths came beside a cache that knows its own")
            return layer if lengths is None else layer._replace(lengths=lengths)
        if key is None:
            raise InvalidArgument(f"{NAME}: key must be given, or a cache in its place")
        value = key if value is None else value
        letters = "[B, S, kdim]" if self.batch_first else "[S, B, kdim]"
        self._check_tokens("key", key, ["B", "S", self.kdim], letters)
        self._check_tokens("value", value, [*key.shape[:2], self.vdim], letters.replace("k", "v"), key=key)
        same = value is key
        if not self.batch_first:
            key = key.transpose(0, 1)
            value = key if same else value.transpose(0, 1)
            key_positions = None if key_positions is None else key_positions.transpose(0, 1)
        self._check_positions("key_positions", key_positions)
        return LayerCache(*self._keys_values(key, value, key_positions), lengths)

    def _extra_tokens(self, x: Tensor, layer: LayerCache) -> tuple[Tensor | None, Tensor | None]:
        """bias_k, bias_v and the zeros of add_zero_attn, as own tokens of every sample: no mask reaches them."""
        heads = (self.num_heads, self.head_dim)
        keys, values = [], []
        if self.bias_k is not None and self.bias_v is not None:
            keys, values = [self.bias_k.view(1, *heads)], [self.bias_v.view(1, *heads)]
        if self.add_zero_attn:
            keys, values = ([*some, layer.k.new_zeros(1, *heads)] for some in (keys, values))
        if not keys:
            return None, None
        k, v = (
            torch.cat([y.to(layer.k.dtype) for y in some]).expand(*x.shape[:2], -1, -1, -1) for some in (keys, values)
        )
        return k, v

    def _mask(
        self, key_padding_mask: Tensor | None, attn_mask: Tensor | None, layer: LayerCache, tokens: int
    ) -> Tensor | None:
        """torch's masks (True = hidden) -> ``[B or 1, T or 1, S]``, True = visible."""
        if layer.cu_seqlens is not None and (key_padding_mask is not None or attn_mask is not None):
            raise InvalidArgument(f"{NAME}: packed conditions (cu_seqlens) take no mask")
        batch, s = layer.k.shape[0], layer.k.shape[1]
        hidden = None
        if attn_mask is not None:
            if attn_mask.dim() == 3:
                raise InvalidArgument(
                    f"{NAME}: attn_mask must be [T, S] = [{tokens}, {s}], the same for every row and head; "
                    f"masks per head are not supported, got {list(attn_mask.shape)}"
                )
            self._check_mask("attn_mask", attn_mask, [tokens, s], "[T, S]", "not allowed")
            hidden = attn_mask[None]
        if key_padding_mask is not None:
            self._check_mask("key_padding_mask", key_padding_mask, [batch, s], "[B, S]", "ignore")
            hidden = key_padding_mask[:, None] if hidden is None else hidden | key_padding_mask[:, None]
        return None if hidden is None else ~hidden

    # ---------------------------------------------------------------- checks

    def _check_query(self, query: Tensor) -> None:
        letters = "[N, T, E]" if self.batch_first else "[T, N, E]"
        if query.dim() not in (3, 4) or query.shape[-1] != self.embed_dim:
            raise InvalidArgument(
                f"{NAME}: query must be {letters} or [B, K, T, E] with E = {self.embed_dim}, got {list(query.shape)}"
            )

    def _check_mask(self, argument: str, mask: Tensor, shape: list[int | str], letters: str, meaning: str) -> None:
        self._check_tokens(argument, mask, shape, letters)
        if mask.dtype != torch.bool:
            raise InvalidArgument(
                f"{NAME}: {argument} must be boolean (True = {meaning}), got {mask.dtype}; of a mask of 0 and -inf "
                f"give {argument} == -inf"
            )

    def _without_batch(
        self, query: Tensor, key: Tensor | None, value: Tensor | None, key_padding_mask: Tensor | None,
        attn_mask: Tensor | None, cache: LayerCache | tuple[Tensor, Tensor] | None, lengths: Tensor | None,
        query_positions: Tensor | None, key_positions: Tensor | None,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """``[T, E]`` and ``[S, C]``: one condition, one sample."""
        axis = 0 if self.batch_first else 1
        wrong = [list(x.shape) for x in (key, value) if x is not None and x.dim() != 2]
        if wrong or cache is not None:
            raise InvalidArgument(
                f"{NAME}: query [T, E] without a batch axis takes key [S, kdim] and value [S, vdim] alone, "
                f"got {wrong[0] if wrong else 'a cache'} (query: {list(query.shape)})"
            )

        def batched(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.unsqueeze(axis)

        same = value is key
        key = batched(key)
        padding = None if key_padding_mask is None else key_padding_mask[None]
        out, _ = self.forward(
            query.unsqueeze(axis), key, key if same else batched(value), padding, False, attn_mask, lengths=lengths,
            query_positions=batched(query_positions), key_positions=batched(key_positions),
        )  # fmt: skip
        return out.squeeze(axis), None
