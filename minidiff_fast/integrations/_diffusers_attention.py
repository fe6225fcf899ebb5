"""What the processor for diffusers computes between its projections: masks in diffusers' forms, and the attention."""

from __future__ import annotations

from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.ops import QueryNorm, broadcast_attention

NAME = "BroadcastAttnProcessor"
_NORMS: dict[str, Literal["layer", "rms"]] = {"LayerNorm": "layer", "FP32LayerNorm": "layer", "RMSNorm": "rms"}


class Heads(NamedTuple):
    """Queries, the shared keys and values, and the sample's own."""

    q: Tensor
    """[B, K, T, H, D]"""
    k: Tensor
    """[B, S, Hkv, D]"""
    v: Tensor
    """[B, S, Hkv, D]"""
    own_k: Tensor | None = None
    """[B, K, P, Hkv, D]"""
    own_v: Tensor | None = None
    """[B, K, P, Hkv, D]"""


def norm_width(norm: nn.Module) -> int | None:
    """How many channels at the end a norm is over; None for one that takes any number (``LpNorm``)."""
    shape = getattr(norm, "normalized_shape", None) or getattr(norm, "dim", None)
    return int(shape[-1]) if isinstance(shape, (tuple, torch.Size)) else None


def normed(
    x: Tensor,  # [..., H, D]
    norm: nn.Module | None,
) -> Tensor:  # [..., H, D]
    """The norm over D, or over H * D where it is that wide; in the dtype that came."""
    if norm is None:
        return x
    if norm_width(norm) in (None, x.shape[-1]):
        return cast(Tensor, norm(x)).to(x.dtype)
    return cast(Tensor, norm(x.flatten(-2))).to(x.dtype).view_as(x)


def fused_norm(norm: nn.Module | None, width: int) -> QueryNorm | None:
    """The norm as ``broadcast_attention`` runs it on its way to the product; None where it cannot."""
    kind, eps = _NORMS.get(type(norm).__name__), getattr(norm, "eps", None)
    known = type(norm).__module__.split(".")[0] in ("diffusers", "torch")
    if norm is None or kind is None or eps is None or not known or norm_width(norm) != width:
        return None
    weight, bias = (cast("Tensor | None", getattr(norm, name, None)) for name in ("weight", "bias"))
    return QueryNorm(kind, weight, bias, float(eps))


def readable_mask(
    mask: Tensor,  # [B, S], [B, 1 or T, S], [B, 1, 1 or T, S] or [B * heads, 1 or T, S]
    batch: int,
    samples: int,
    tokens: int,
    shared: int,
    heads: int,
) -> Tensor:  # [B, 1 or heads, 1 or T, S]
    """A mask as diffusers passes it on, with explicit axes; integers become booleans (not 0 = keep)."""
    rows = mask.shape[0] if mask.dim() else 0
    if mask.dim() == 2:
        mask = mask[:, None]
    elif mask.dim() == 4 and mask.shape[1] == 1:
        mask = mask[:, 0]
    got = f"got {list(mask.shape)} (B: {batch}, K: {samples}, T: {tokens}, S: {shared}, heads: {heads})"
    if mask.dim() != 3 or mask.shape[1] not in (1, tokens) or mask.shape[2] != shared:
        raise InvalidArgument(f"{NAME}: attention_mask must be [B, S], [B, 1, S] or [B, T, S], {got}")
    per_head = heads > 1 and rows == batch * heads
    if samples > 1 and rows == batch * samples:
        also = ", or one per head: K = heads, and it cannot be told" if per_head else ""
        raise InvalidArgument(
            f"{NAME}: attention_mask has a row per sample{also}; the samples of a condition share its tokens and their "
            f"mask: give one row per condition, [B, 1, S]; {got}"
        )
    if rows != batch and not per_head:
        raise InvalidArgument(f"{NAME}: attention_mask must have one row per condition, B = {batch}, {got}")
    if not mask.is_floating_point():
        mask = mask != 0
    return mask.unflatten(0, (batch, heads if per_head else 1))


def attend(
    heads: Heads,
    mask: Tensor | None,  # [B, 1 or H, 1 or T, S] bool (True = may be seen) or an additive bias
    norm_q: nn.Module | None,
    scale: float,
    impl: str | None,
    per_sample: bool,
) -> Tensor:  # [B, K, T, H, D]
    """Softmax over the condition's tokens and the sample's own; no tensor of the condition is copied per sample.

    ``broadcast_attention`` for everything that it expresses; what remains (biases, masks per head, and ``per_sample``,
    where nothing is shared) goes to torch's attention, the samples folded into its query axis, or is written out.
    """
    q, k, v, own_k, own_v = heads
    boolean = mask is None or (mask.dtype == torch.bool and mask.shape[1] == 1)
    if boolean and not (per_sample and own_k is None):
        q_norm = fused_norm(norm_q, q.shape[-1])
        q = q if q_norm is not None else normed(q, norm_q)
        seen = None if mask is None else mask[:, 0]
        out = broadcast_attention(q, k, v, own_k, own_v, mask=seen, q_norm=q_norm, scale=scale, impl=impl)
        return cast(Tensor, out)
    heads = heads._replace(q=normed(q, norm_q))
    if own_k is None and (mask is None or mask.shape[2] == 1 or q.shape[1] == 1):
        return _folded(heads, mask, scale)
    assert mask is not None  # without one, own tokens are boolean's
    return _written_out(heads, mask, scale)


def _folded(heads: Heads, mask: Tensor | None, scale: float) -> Tensor:
    """Torch's attention, K and T one axis of queries."""
    q, k, v = heads.q, heads.k, heads.v
    samples = q.shape[1]
    if mask is not None and mask.is_floating_point():
        mask = mask.to(q.dtype)
    out = F.scaled_dot_product_attention(
        q.flatten(1, 2).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        attn_mask=mask, scale=scale, enable_gqa=q.shape[3] != k.shape[2],
    )  # fmt: skip
    return out.transpose(1, 2).unflatten(1, (samples, -1))


def _written_out(heads: Heads, mask: Tensor, scale: float) -> Tensor:
    """The formula; autograd keeps the weights, [B, K, T, H, S + P]."""
    with torch.autocast(heads.q.device.type, enabled=False):
        wide = torch.promote_types(heads.q.dtype, torch.float32)
        q, k, v, own_k, own_v = (None if x is None else x.to(wide) for x in heads)
        assert q is not None and k is not None and v is not None
        groups = (k.shape[2], q.shape[3] // k.shape[2])
        grouped = q.unflatten(3, groups) * scale  # [B, K, T, Hkv, G, D]
        by_query = mask.transpose(1, 2)  # [B, 1 or T, 1 or H, S]
        by_query = by_query.unflatten(2, groups if by_query.shape[2] > 1 else (1, 1))[:, None]
        logits = torch.einsum("bkthgd,bshd->bkthgs", grouped, k)
        boolean = mask.dtype == torch.bool
        logits = logits.masked_fill(~by_query, torch.finfo(wide).min) if boolean else logits + by_query.to(wide)
        if own_k is not None:
            logits = torch.cat([logits, torch.einsum("bkthgd,bkphd->bkthgp", grouped, own_k)], -1)
        weights = torch.softmax(logits, -1)
        seen = weights[..., : k.shape[1]]
        seen = seen.masked_fill(~by_query, 0.0) if boolean else seen
        out = torch.einsum("bkthgs,bshd->bkthgd", seen, v)
        if own_v is not None:
            out = out + torch.einsum("bkthgp,bkphd->bkthgd", weights[..., k.shape[1] :], own_v)
        return out.flatten(3, 4).to(heads.q.dtype)
