"""Broadcast attention: K samples of a condition attend to one copy of its tokens, and to their own."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from minidiff_fast import backend
from minidiff_fast.errors import InvalidArgument
from minidiff_fast.ops import _broadcast_attention_flash as flash
from minidiff_fast.ops._broadcast_attention_op import broadcast_attention_eager, broadcast_attention_fwd
from minidiff_fast.ops._eager import watched
from minidiff_fast.ops._query_transform import QueryNorm, check_transform, transformed_reference
from minidiff_fast.ops.philox import dropout_threshold, philox_4x32
from minidiff_fast.ops.rotary import RotaryPositions
from minidiff_fast.shapes import check_same, check_shape, describe

NAME = "broadcast_attention"
BACKENDS = backend.register(
    backend.OpBackends(
        NAME,
        {"triton": backend.why_not_triton, "native": backend.why_not_native, "flash": flash.why_not_flash},
    )
)
FUSES_TRANSFORM = {"triton"}
"""Implementations that norm and rotate inside their kernels; the others get q and own_k as they meet the keys."""


class AttentionOutput(NamedTuple):
    """What :func:`broadcast_attention` returns with ``return_lse=True``."""

    out: Tensor
    """[B, K, T, H, D], the dtype of q."""
    lse: Tensor
    """[B, K, T, H] float32 (float64 for float64 inputs), natural logarithm; -inf where a query sees no key."""


def draw_dropout_seed(device: torch.device | str | None = None, generator: torch.Generator | None = None) -> Tensor:
    """A fresh 64-bit dropout seed, ``[1]`` int64 on ``device``, from torch's generator; no host synchronisation."""
    return torch.randint(0, 2**62, (1,), dtype=torch.int64, device=device, generator=generator)


def broadcast_attention(
    q: Tensor,  # [B, K, T, H, D]
    k: Tensor,  # [B, S, Hkv, D], or packed [N, Hkv, D]
    v: Tensor,  # [B, S, Hkv, D], or packed [N, Hkv, D]
    own_k: Tensor | None = None,  # [B, K, P, Hkv, D]
    own_v: Tensor | None = None,  # [B, K, P, Hkv, D]
    *,
    lengths: Tensor | None = None,  # [B] integer
    cu_seqlens: Tensor | None = None,  # [B + 1] int32
    mask: Tensor | None = None,  # [T, S], [B, S] or [B or 1, T or 1, S] bool
    own_causal: bool = False,
    rope: RotaryPositions | None = None,
    q_norm: QueryNorm | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,  # [1] int64
    scale: float | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> Tensor | AttentionOutput:
    r"""One softmax over the condition's S shared tokens and the sample's own P tokens.

    .. math::
        out_{bkth} = \sum_s p_s v_{bs} + \sum_p p_p v'_{bkp}, \quad
        p = \mathrm{softmax}(scale \cdot q_{bkth} \cdot [k_{b1} .. k_{bS}, k'_{bk1} .. k'_{bkP}])

    with q normed (``q_norm``) and rotated (``rope``) first, and k' rotated, on the way to the product.
    Query head h reads key/value head ``h // (H / Hkv)``. The condition's tokens are read where they are: no copy
    per sample is made in the forward pass, in the backward pass or for autograd. Samples never see each other.

    Args:
        q: queries ``[B, K, T, H, D]``, float32, float16, bfloat16 (float64 on the reference), D from 8 to 256.
        k, v: shared keys and values ``[B, S, Hkv, D]``; Hkv divides H; the dtype and device of q; S may be 0. With
            ``cu_seqlens`` packed one condition after the other, ``[N, Hkv, D]``. Already normed and rotated.
        own_k, own_v: the sample's own keys and values ``[B, K, P, Hkv, D]``; both or neither.
        lengths: ``[B]``, integers in [0, S]: condition b has the tokens ``0 .. lengths[b] - 1``. Not
            checked against S (that would synchronise with the device); larger values act as S.
        cu_seqlens: ``[B + 1]`` int32, ascending in [0, N]: condition b has the packed tokens ``cu_seqlens[b] ..
            cu_seqlens[b + 1] - 1``; the values are not checked. Tokens before the first and after the last are
            nobody's: their gradient is 0. Neither with lengths nor with a mask.
        mask: boolean, True where the query may see the shared token: ``[T, S]``, ``[B, S]``, or with explicit
            axes ``[B or 1, T or 1, S]``. A 2-D mask when B = T > 1 fits both readings and is refused.
        own_causal: query t sees own token p only if p <= t; needs P = T.
        rope: rotates q, and own_k where it has ``own_positions``, by :func:`rotate`'s rule. Shared keys must come
            rotated: once per condition. Angles are accurate up to 10,000 radians.
        q_norm: a norm of every query head over D, before rope.
        dropout_p: probability in [0, 1) of dropping an attention weight; survivors are scaled by 1 / (1 - dropout_p).
        seed: ``[1]`` int64 on the device of q: the dropout mask is a function of it and of nothing else, the same in
            every implementation. Drawn from torch's generator when None.
        scale: factor on the logits; 1 / sqrt(D) when None.
        return_lse: also return the log-sum-exp of the logits; it is differentiable.
        impl: see :mod:`minidiff_fast.backend`. ``"flash"`` is flash-attn (a GPU, 16 bits) with the samples folded into
            the query axis, for the calls that it computes exactly and for no others: no own tokens, mask, lengths,
            dropout or log-sum-exp.

    Returns:
        ``out [B, K, T, H, D]`` in the dtype of q, or :class:`AttentionOutput`. A query that sees no token gives 0
        and a log-sum-exp of -inf.

    Raises:
        InvalidArgument: a shape, dtype, device or value is wrong; nothing has run.
        BackendUnavailable: the implementation asked for by name cannot run here, or not with these arguments.

    Under ``torch.autocast`` the inputs are cast to its dtype first, as ``scaled_dot_product_attention`` does.
    Tokens at and beyond ``lengths`` are never read: they may hold anything.

    Gradients: dk and dv sum over K and T in float32, in a fixed order (bitwise the same from run to run). Autograd
    keeps q as it came and the positions: no rotated or normed copy. Differentiable twice with ``impl="reference"``
    only.

    Source: Mini-Diffuser (Hu et al., arXiv 2505.09430), for samples that see the scene and themselves, never each
    other; the online softmax is that of FlashAttention-2 (Dao, arXiv 2307.08691).

    >>> q, k, v = torch.randn(2, 5, 3, 4, 16), torch.randn(2, 7, 2, 16), torch.randn(2, 7, 2, 16)
    >>> broadcast_attention(q, k, v, impl="reference").shape
    torch.Size([2, 5, 3, 4, 16])
    """
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        with torch.autocast(q.device.type, enabled=False):
            return broadcast_attention(
                _lowered(q, dtype), _lowered(k, dtype), _lowered(v, dtype),
                None if own_k is None else _lowered(own_k, dtype), None if own_v is None else _lowered(own_v, dtype),
                lengths=lengths, cu_seqlens=cu_seqlens, mask=mask, own_causal=own_causal, rope=rope, q_norm=q_norm,
                dropout_p=dropout_p, seed=seed, scale=scale, return_lse=return_lse, impl=impl,
            )  # fmt: skip
    _check(q, k, v, own_k, own_v, lengths, cu_seqlens, mask, own_causal, rope, q_norm, dropout_p, seed, scale)
    chosen = backend.resolve(BACKENDS, impl, q.device, q.dtype)
    if dropout_p > 0.0 and seed is None:
        seed = draw_dropout_seed(q.device)
    if chosen == "reference":
        return broadcast_attention_reference(
            q, k, v, own_k, own_v, lengths=lengths, cu_seqlens=cu_seqlens, mask=mask, own_causal=own_causal,
            rope=rope, q_norm=q_norm, dropout_p=dropout_p, seed=seed, scale=scale, return_lse=return_lse,
        )  # fmt: skip
    if chosen == "flash":
        flash.check_exact(q, k, own_k, lengths, mask, dropout_p, return_lse)
    if chosen not in FUSES_TRANSFORM:
        q, own_k = transformed_reference(q, own_k, rope, q_norm, lean=True)
        rope = q_norm = None
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    if chosen == "flash":
        return flash.attend(q, k, v, cu_seqlens, scale)
    mask = None if mask is None else _explicit_mask(mask, q.shape[0], q.shape[2])
    rotary = None if rope is None else rope.rotary
    run = broadcast_attention_fwd if watched(q, k, v, own_k, own_v) else broadcast_attention_eager
    out, lse, _ = run(
        q, k, v, own_k, own_v, lengths, cu_seqlens, mask, seed if dropout_p > 0.0 else None,
        own_causal, float(dropout_p), scale, chosen,
        None if rope is None else rope.q_positions,
        None if rope is None else rope.own_positions,
        None if q_norm is None else q_norm.weight,
        None if q_norm is None else q_norm.bias,
        None if rotary is None else [rotary.axes, rotary.rotary_dim, rotary.style == "half", rotary.full_width],
        0.0 if rotary is None else float(rotary.base),
        "" if q_norm is None else q_norm.kind,
        0.0 if q_norm is None else float(q_norm.eps),
    )  # fmt: skip
    return AttentionOutput(out, lse) if return_lse else out


def _lowered(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What autocast does to an input: 16 and 32-bit floats take its dtype, the others stay."""
    return x.to(dtype) if x.dtype in (torch.float32, torch.float16, torch.bfloat16) else x


def broadcast_attention_reference(
    q: Tensor,  # [B, K, T, H, D]
    k: Tensor,  # [B, S, Hkv, D], or packed [N, Hkv, D]
    v: Tensor,  # [B, S, Hkv, D], or packed [N, Hkv, D]
    own_k: Tensor | None = None,  # [B, K, P, Hkv, D]
    own_v: Tensor | None = None,  # [B, K, P, Hkv, D]
    *,
    lengths: Tensor | None = None,  # [B] integer
    cu_seqlens: Tensor | None = None,  # [B + 1] int32
    mask: Tensor | None = None,  # [T, S], [B, S] or [B or 1, T or 1, S] bool
    own_causal: bool = False,
    rope: RotaryPositions | None = None,
    q_norm: QueryNorm | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,  # [1] int64
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | AttentionOutput:
    """The definition of :func:`broadcast_attention`: plain PyTorch, any dtype, differentiable any number of times.

    Logits, softmax and log-sum-exp are float32 (float64 for float64 inputs); the weights are rounded to the dtype of q
    before they meet v. Every query is compared with all packed tokens, those of other conditions masked out: B times
    the work of a kernel. Dropout counts packed tokens by their place in N, and own tokens from N on.
    """
    samples, tokens, heads, width = q.shape[1:]
    q, own_k = transformed_reference(q, own_k, rope, q_norm)
    if cu_seqlens is not None:  # every condition sees all N packed tokens, through a mask that leaves it its own
        place = torch.arange(k.shape[0], device=q.device)
        somebodys = (place >= cu_seqlens[0]) & (place < cu_seqlens[-1])
        k, v = (x.masked_fill(~somebodys[:, None, None], 0.0).expand(q.shape[0], -1, -1, -1) for x in (k, v))
        mask = ((place >= cu_seqlens[:-1, None]) & (place < cu_seqlens[1:, None]))[:, None]  # [B, 1, N]
    s, kv_heads = k.shape[1], k.shape[2]
    p = 0 if own_k is None else own_k.shape[2]
    accumulate = torch.promote_types(q.dtype, torch.float32)
    scale = 1.0 / math.sqrt(width) if scale is None else scale

    visible, blind = _visible_shared(q, s, p, lengths, mask)
    if lengths is not None:  # 0 * NaN is NaN: what lies beyond the lengths must not reach a product
        within = torch.arange(s, device=q.device) < lengths[:, None]
        k, v = (x.masked_fill(~within[:, :, None, None], 0.0) for x in (k, v))

    grouped = q.to(accumulate).unflatten(3, (kv_heads, heads // kv_heads)) * scale  # [B, K, T, Hkv, G, D]
    logits = torch.einsum("bkthgd,bshd->bkthgs", grouped, k.to(accumulate))
    if visible is not None:
        logits = logits.masked_fill(~visible[:, None, :, None, None, :], -math.inf)
    if own_k is not None:
        own_logits = torch.einsum("bkthgd,bkphd->bkthgp", grouped, own_k.to(accumulate))
        if own_causal:
            future = torch.ones(tokens, p, dtype=torch.bool, device=q.device).triu(1)
            own_logits = own_logits.masked_fill(future[:, None, None, :], -math.inf)
        logits = torch.cat([logits, own_logits], dim=-1)  # [B, K, T, Hkv, G, S + P]

    if blind is not None:  # finite logits and no weight: no NaN, neither here nor in a gradient
        blind = blind[:, None, :, None, None]  # [B or 1, 1, T or 1, 1, 1]
        logits = logits.masked_fill(blind[..., None], 0.0)
    weights = torch.softmax(logits, dim=-1)
    if blind is not None:
        weights = weights.masked_fill(blind[..., None], 0.0)
    if dropout_p > 0.0:
        if seed is None:
            seed = draw_dropout_seed(q.device)
        kept = _dropout_kept(seed, dropout_p, (q.shape[0], samples, tokens, kv_heads, heads // kv_heads, s + p))
        weights = weights * kept / (1.0 - dropout_p)
    weights = weights.to(q.dtype)
    out = torch.einsum("bkthgs,bshd->bkthgd", weights[..., :s], v)
    if own_v is not None:
        out = out + torch.einsum("bkthgp,bkphd->bkthgd", weights[..., s:], own_v)
    out = out.flatten(3, 4)
    if not return_lse:
        return out
    lse = torch.logsumexp(logits, dim=-1)
    if blind is not None:
        lse = lse.masked_fill(blind, -math.inf)
    return AttentionOutput(out, lse.flatten(3, 4))


def _visible_shared(
    q: Tensor, s: int, p: int, lengths: Tensor | None, mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Which shared token which query may see, bool ``[B or 1, T or 1, S]``, and which queries see no token at all, bool
    ``[B or 1, T or 1]``; None for all and for none."""
    visible = None if mask is None else _explicit_mask(mask, q.shape[0], q.shape[2])
    if lengths is not None:
        within = (torch.arange(s, device=q.device) < lengths[:, None])[:, None, :]
        visible = within if visible is None else visible & within
    if p > 0:  # own token 0 is visible to every query
        return visible, None
    if s == 0:
        return visible, torch.ones(1, 1, dtype=torch.bool, device=q.device)
    return visible, None if visible is None else ~visible.any(-1)


def _dropout_kept(seed: Tensor, dropout_p: float, shape: tuple[int, ...]) -> Tensor:
    """Which weights survive, bool ``[B, K, T, Hkv, G, S + P]``; the counters are those of the kernels."""
    rows = torch.arange(math.prod(shape[:-1]), device=seed.device).reshape(*shape[:-1], 1)
    columns = torch.arange(shape[-1], device=seed.device)
    words = philox_4x32(seed, (rows & 0xFFFFFFFF, columns, rows >> 32, torch.zeros_like(rows)))
    return words[0] >= dropout_threshold(dropout_p)


def _explicit_mask(mask: Tensor, batch: int, tokens: int) -> Tensor:
    """``[T, S]`` or ``[B, S]`` -> ``[B or 1, T or 1, S]``, a view; checked before by :func:`_check_mask`."""
    if mask.dim() == 3:
        return mask
    return mask[None] if mask.shape[0] == tokens else mask[:, None]


def _check_mask(mask: Tensor, q: Tensor, s: int, context: Callable[[], str]) -> None:
    batch, tokens = q.shape[0], q.shape[2]
    if mask.dtype != torch.bool:
        raise InvalidArgument(f"{NAME}: mask must be boolean (True = may be seen), got {mask.dtype} ({context()})")
    if mask.device != q.device:
        raise InvalidArgument(f"{NAME}: mask must be on the device of q, {q.device}, got {mask.device}")
    shape = tuple(mask.shape)
    fits_2d = shape in ((tokens, s), (batch, s))
    fits_3d = len(shape) == 3 and shape[0] in (1, batch) and shape[1] in (1, tokens) and shape[2] == s
    if not (fits_2d or fits_3d):
        raise InvalidArgument(
            f"{NAME}: mask must be [T, S] = [{tokens}, {s}], [B, S] = [{batch}, {s}] or [B or 1, T or 1, S], "
            f"got {list(shape)} ({context()})"
        )
    if fits_2d and batch == tokens and batch > 1:
        raise InvalidArgument(
            f"{NAME}: a mask {list(shape)} is ambiguous when B = T = {batch}; give it as [1, T, S] (mask[None]) or "
            f"[B, 1, S] (mask[:, None])"
        )


def _check_packed(
    cu_seqlens: Tensor, q: Tensor, lengths: Tensor | None, mask: Tensor | None, context: Callable[[], str]
) -> None:
    check_shape(NAME, "cu_seqlens", cu_seqlens, [q.shape[0] + 1], "[B + 1]", context)
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.device != q.device:
        raise InvalidArgument(
            f"{NAME}: cu_seqlens must be int32 on {q.device}, got {cu_seqlens.dtype} on {cu_seqlens.device}"
        )
    for name, other in (("lengths", lengths), ("mask", mask)):
        if other is not None:
            raise InvalidArgument(f"{NAME}: {name} is for keys [B, S, Hkv, D]; packed keys have cu_seqlens alone")


def _check(
    q: Tensor, k: Tensor, v: Tensor, own_k: Tensor | None, own_v: Tensor | None, lengths: Tensor | None,
    cu_seqlens: Tensor | None, mask: Tensor | None, own_causal: bool, rope: RotaryPositions | None,
    q_norm: QueryNorm | None, dropout_p: float, seed: Tensor | None, scale: float | None,
) -> None:  # fmt: skip
    """Every check, from metadata only: nothing here waits for the device."""
    context = partial(describe, q=q, k=k, v=v, own_k=own_k, own_v=own_v)
    check_shape(NAME, "q", q, ["B", "K", "T", "H", "D"], "[B, K, T, H, D]", context)
    batch, samples, tokens, heads, width = q.shape
    if cu_seqlens is None:
        check_shape(NAME, "k", k, [batch, "S", "Hkv", width], "[B, S, Hkv, D]", context)
        check_shape(NAME, "v", v, list(k.shape), "[B, S, Hkv, D]", context)
    else:
        check_shape(NAME, "k", k, ["N", "Hkv", width], "[N, Hkv, D] with cu_seqlens", context)
        check_shape(NAME, "v", v, list(k.shape), "[N, Hkv, D] with cu_seqlens", context)
        _check_packed(cu_seqlens, q, lengths, mask, context)
    s, kv_heads = k.shape[-3], k.shape[-2]
    if not q.is_floating_point():
        raise InvalidArgument(f"{NAME}: q must be a floating-point tensor, got {q.dtype}")
    check_same(NAME, "q", q, k=k, v=v, own_k=own_k, own_v=own_v)
    if not 8 <= width <= 256:
        raise InvalidArgument(f"{NAME}: the head dimension D must be from 8 to 256, got {width} ({context()})")
    if kv_heads < 1 or heads % kv_heads:
        raise InvalidArgument(f"{NAME}: Hkv must divide H = {heads}, got Hkv = {kv_heads} ({context()})")
    if (own_k is None) != (own_v is None):
        given, missing = ("own_k", "own_v") if own_v is None else ("own_v", "own_k")
        raise InvalidArgument(f"{NAME}: {given} came without {missing}; give both or neither")
    if own_k is not None and own_v is not None:
        check_shape(NAME, "own_k", own_k, [batch, samples, "P", kv_heads, width], "[B, K, P, Hkv, D]", context)
        check_shape(NAME, "own_v", own_v, list(own_k.shape), "[B, K, P, Hkv, D]", context)
        if own_causal and own_k.shape[2] != tokens:
            raise InvalidArgument(f"{NAME}: own_causal needs P = T = {tokens}, got P = {own_k.shape[2]} ({context()})")
    elif own_causal:
        raise InvalidArgument(f"{NAME}: own_causal is about own tokens, and own_k is None")
    if lengths is not None:
        check_shape(NAME, "lengths", lengths, [batch], "[B]", context)
        if lengths.dtype not in (torch.int32, torch.int64) or lengths.device != q.device:
            raise InvalidArgument(
                f"{NAME}: lengths must be int32 or int64 on {q.device}, got {lengths.dtype} on {lengths.device}"
            )
    if mask is not None:
        _check_mask(mask, q, s, context)
    check_transform(NAME, q, own_k, kv_heads, rope, q_norm, context)
    for name, number in (("dropout_p", dropout_p), ("scale", scale)):
        if number is not None and not isinstance(number, (int, float)):
            raise InvalidArgument(
                f"{NAME}: {name} must be a number, got {type(number).__name__} (a learned scale goes into q)"
            )
    if not 0.0 <= dropout_p < 1.0:
        raise InvalidArgument(f"{NAME}: dropout_p must be in [0, 1), got {dropout_p}")
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != q.device):
        raise InvalidArgument(
            f"{NAME}: seed must be [1] int64 on {q.device}, got {list(seed.shape)} {seed.dtype} on {seed.device}"
        )
    if scale is not None and not -math.inf < scale < math.inf:
        raise InvalidArgument(f"{NAME}: scale must be a finite number, got {scale}")
