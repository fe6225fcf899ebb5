"""What the attention modules share: the parameters of nn.MultiheadAttention, and the way to broadcast_attention."""

from __future__ import annotations

from functools import partial
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff_fast.backend import IMPLS
from minidiff_fast.errors import InvalidArgument
from minidiff_fast.nn.condition_cache import LayerCache
from minidiff_fast.nn.rotary import RotaryModule, rotary_module
from minidiff_fast.ops import QueryNorm, Rotary, RotaryPositions, broadcast_attention
from minidiff_fast.shapes import check_shape, describe

Norm = Literal["layer", "rms"]


class ProjectedAttention(nn.MultiheadAttention):
    """Projections into heads, norm and rotation, attention, projection out; parameters as in the parent class.

    With ``num_kv_heads`` < ``num_heads`` the rows of ``in_proj_weight`` are E of queries, then Hkv * D of keys, then
    Hkv * D of values; with ``kdim`` or ``vdim`` other than E the three weights are apart, as in the parent class.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float,
        bias: bool,
        add_bias_kv: bool,
        add_zero_attn: bool,
        kdim: int | None,
        vdim: int | None,
        batch_first: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        num_kv_heads: int | None,
        qk_norm: Norm | None,
        rotary: RotaryModule | Rotary | None,
        impl: str | None,
    ) -> None:
        name = type(self).__name__
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _check_sizes(name, embed_dim, num_heads, kv_heads, dropout)
        if qk_norm is not None and qk_norm not in get_args(Norm):
            raise InvalidArgument(f"{name}: qk_norm must be None, 'layer' or 'rms', got {qk_norm!r}")
        if impl is not None and impl not in IMPLS:
            raise InvalidArgument(f"{name}: impl must be None or one of {', '.join(IMPLS)}, got {impl!r}")
        turned = rotary_module(name, rotary)
        if turned is not None:
            turned.check_heads(name, num_heads, kv_heads, embed_dim // num_heads)
            if qk_norm is not None and turned.recipe.full_width:
                raise InvalidArgument(f"{name}: qk_norm is per head, and rotary with full_width turns across heads")
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        self.num_kv_heads = kv_heads
        self.impl = impl
        self.rotary = turned
        self.q_norm, self.k_norm = (_norm(qk_norm, self.head_dim, device, dtype) for _ in range(2))
        if kv_heads != num_heads:
            self._narrow(kv_heads * self.head_dim)

    def _narrow(self, width: int) -> None:
        """Fewer rows for keys and values, initialised by the parent's rule."""
        sizes = {"in_proj_weight": self.embed_dim + 2 * width, "k_proj_weight": width, "v_proj_weight": width}
        for name, rows in (*sizes.items(), ("in_proj_bias", sizes["in_proj_weight"])):
            parameter = getattr(self, name)
            if parameter is not None:
                setattr(self, name, nn.Parameter(parameter.new_empty(rows, *parameter.shape[1:])))
        self._reset_parameters()

    # ---------------------------------------------------------------- projections

    def project_condition(
        self,
        memory: Tensor,  # [B, S, C] or packed [N, C]
        positions: Tensor | None = None,  # [B, S, 3] or [N, 3]; without the 3 in one dimension
        *,
        value: Tensor | None = None,  # as memory; memory where None
    ) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, S, Hkv, D]`` (packed ``[N, Hkv, D]``): projected, normalised and rotated.

        The conditions come first whatever ``batch_first`` is. Differentiable; to be kept in a
        :class:`~minidiff_fast.nn.ConditionCache`.
        """
        if memory.dim() not in (2, 3) or memory.shape[-1] != self.kdim:
            raise InvalidArgument(
                f"{type(self).__name__}: memory must be [B, S, C] or packed [N, C] with C = {self.kdim}, "
                f"got {list(memory.shape)}"
            )
        return self._keys_values(memory, memory if value is None else value, positions)

    def _queries(self, x: Tensor) -> Tensor:
        """``[..., E]`` -> ``[..., H, D]``, neither normalised nor rotated: attention does that as it reads them."""
        weight = self.in_proj_weight[: self.embed_dim] if self._qkv_same_embed_dim else self.q_proj_weight
        bias = None if self.in_proj_bias is None else self.in_proj_bias[: self.embed_dim]
        return F.linear(x, weight, bias).unflatten(-1, (self.num_heads, self.head_dim))

    def _keys_values(self, key: Tensor, value: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """``[..., C]`` -> ``[..., Hkv, D]`` each; keys normalised, and rotated where there are positions."""
        k, v = self._heads_of(key, value)
        k = self._normed_keys(k)
        self._check_positions("positions", positions)
        if self.rotary is not None and positions is not None:
            k = self.rotary.rotate(k, positions)
        return k, v

    def _normed_keys(self, k: Tensor) -> Tensor:
        """In the dtype of the norm's parameters (float32 under autocast), and back."""
        norm = self.k_norm
        return k if norm is None else norm(k.to(norm.weight.dtype)).to(k.dtype)

    def _heads_of(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        e, width = self.embed_dim, self.num_kv_heads * self.head_dim
        heads = (self.num_kv_heads, self.head_dim)
        bias = self.in_proj_bias
        if self._qkv_same_embed_dim and key is value:
            both = F.linear(key, self.in_proj_weight[e:], None if bias is None else bias[e:])
            k, v = both.unflatten(-1, (2, *heads)).unbind(-3)
            return k, v
        if self._qkv_same_embed_dim:
            _, k_weight, v_weight = self.in_proj_weight.split((e, width, width))
        else:
            k_weight, v_weight = cast(Tensor, self.k_proj_weight), cast(Tensor, self.v_proj_weight)
        _, k_bias, v_bias = (None,) * 3 if bias is None else bias.split((e, width, width))
        k, v = F.linear(key, k_weight, k_bias), F.linear(value, v_weight, v_bias)
        return k.unflatten(-1, heads), v.unflatten(-1, heads)

    # ---------------------------------------------------------------- attention

    def _attend(
        self,
        q: Tensor,  # [B, K, T, H, D]
        cache: LayerCache,
        own_k: Tensor | None = None,  # [B, K, P, Hkv, D]
        own_v: Tensor | None = None,  # [B, K, P, Hkv, D]
        *,
        mask: Tensor | None = None,  # [B or 1, T or 1, S] bool, True = may be seen
        rope: RotaryPositions | None = None,
        own_causal: bool = False,
    ) -> Tensor:  # [B, K, T, E]
        """Attention and the projection out."""
        if cache.mask is not None:
            seen = cache.mask[:, None]
            mask = seen if mask is None else mask & seen
        out = broadcast_attention(
            q,
            cache.k,
            cache.v,
            own_k,
            own_v,
            lengths=cache.lengths,
            cu_seqlens=cache.cu_seqlens,
            mask=mask,
            own_causal=own_causal,
            rope=rope,
            q_norm=self._query_norm(),
            dropout_p=self.dropout if self.training else 0.0,
            impl=self.impl,
        )
        return self.out_proj(cast(Tensor, out).flatten(-2))

    def _query_norm(self) -> QueryNorm | None:
        norm = self.q_norm
        if norm is None:
            return None
        if isinstance(norm, nn.LayerNorm):
            return QueryNorm("layer", norm.weight, norm.bias, norm.eps)
        return QueryNorm("rms", norm.weight, None, cast(float, norm.eps))

    def _check_positions(self, argument: str, positions: Tensor | None) -> None:
        """Positions are there exactly where the module rotates."""
        if (self.rotary is None) == (positions is None):
            return
        reason = "this module has no rotary" if self.rotary is None else "this module has a rotary and needs them"
        came = "None" if positions is None else str(list(positions.shape))
        raise InvalidArgument(f"{type(self).__name__}: {argument} do not fit: {reason}, got {came}")

    def _one_layer(self, cache: LayerCache | tuple[Tensor, Tensor]) -> LayerCache:
        """What one layer reads, checked against the module's heads."""
        if not isinstance(cache, tuple) or len(cache) not in (2, len(LayerCache._fields)):
            raise InvalidArgument(
                f"{type(self).__name__}: cache must be that of one layer, ConditionCache[layer] or (k, v), "
                f"got {type(cache).__name__}"
            )
        layer = LayerCache(*cache)
        heads: list[int | str] = [self.num_kv_heads, self.head_dim]
        if layer.cu_seqlens is None:
            self._check_tokens("cache keys", layer.k, ["B", "S", *heads], "[B, S, Hkv, D]")
        else:
            self._check_tokens("cache keys", layer.k, ["N", *heads], "[N, Hkv, D]")
        self._check_tokens("cache values", layer.v, list(layer.k.shape), "the shape of the keys")
        return layer

    def _check_tokens(
        self, argument: str, x: Tensor, expected: list[int | str], letters: str, **others: Tensor
    ) -> None:
        check_shape(type(self).__name__, argument, x, expected, letters, partial(describe, **{argument: x}, **others))


def _norm(
    kind: Norm | None, head_dim: int, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.LayerNorm | nn.RMSNorm | None:
    """Over the D channels of a head; the eps of each is that of torch's LayerNorm and of Llama's RMSNorm."""
    if kind == "layer":
        return nn.LayerNorm(head_dim, eps=1e-5, device=device, dtype=dtype)
    return None if kind is None else nn.RMSNorm(head_dim, eps=1e-6, device=device, dtype=dtype)


def _check_sizes(name: str, embed_dim: int, num_heads: int, num_kv_heads: int, dropout: float) -> None:
    sizes = {"embed_dim": embed_dim, "num_heads": num_heads, "num_kv_heads": num_kv_heads}
    for argument, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise InvalidArgument(f"{name}: {argument} must be an int >= 1, got {size!r}")
    if embed_dim % num_heads:
        raise InvalidArgument(f"{name}: embed_dim must be a multiple of num_heads = {num_heads}, got {embed_dim}")
    if not 8 <= embed_dim // num_heads <= 256:
        raise InvalidArgument(
            f"{name}: the head dimension embed_dim / num_heads must be from 8 to 256, "
            f"got {embed_dim} / {num_heads} = {embed_dim // num_heads}"
        )
    if num_heads % num_kv_heads:
        raise InvalidArgument(f"{name}: num_kv_heads must divide num_heads = {num_heads}, got {num_kv_heads}")
    if not 0.0 <= dropout < 1.0:
        raise InvalidArgument(f"{name}: dropout must be in [0, 1), got {dropout!r}")
