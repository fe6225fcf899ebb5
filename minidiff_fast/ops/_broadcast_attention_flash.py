"""Broadcast attention by flash-attn, samples folded into the query axis: a peer, exact for plain cross-attention.

With neither own tokens nor a mask, K samples of T queries are K * T queries of one condition, and one call of
``flash_attn_func`` (packed keys: ``flash_attn_varlen_func``) reads the condition's tokens once for all of them. It
needs a GPU. Its backward sums the gradient of q with atomics: the last bits of it differ from run to run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minidiff_fast import backend
from minidiff_fast.errors import BackendUnavailable, require

DTYPES = (torch.float16, torch.bfloat16)


def why_not_flash(device: torch.device, dtype: torch.dtype) -> str | None:
    """None when flash-attn can run on tensors of this device and dtype, else the reason and the cure."""
    if not backend._installed("flash_attn"):
        return "the package flash_attn is not installed; pip install --no-build-isolation 'minidiff_fast[flash]'"
    if device.type != "cuda":
        return f"flash-attn runs on GPUs, and the tensors are on {device}"
    if dtype not in DTYPES:
        return f"flash-attn takes float16 and bfloat16, not {dtype}; use impl='triton'"
    return None


def check_exact(
    q: Tensor,  # [B, K, T, H, D]
    k: Tensor,  # [B, S, Hkv, D], or packed [N, Hkv, D]
    own_k: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    dropout_p: float,
    return_lse: bool,
) -> None:
    """Raise :class:`BackendUnavailable` for a call that flash-attn does not compute as the definition says."""
    reasons = {
        "own_k: it has no second segment of keys": own_k is not None,
        "a mask: it has none": mask is not None,
        "lengths: it takes lengths of packed keys; pack them and give cu_seqlens": lengths is not None,
        f"dropout_p = {dropout_p}: its random numbers are not those of the definition": dropout_p > 0.0,
        "return_lse: its log-sum-exp has no gradient": return_lse,
        f"D = {q.shape[-1]}: it takes multiples of 8": q.shape[-1] % 8 != 0,
        "an empty axis": q.numel() == 0 or k.numel() == 0,
    }
    for reason, applies in reasons.items():
        if applies:
            raise BackendUnavailable(
                f"broadcast_attention: impl='flash' cannot run with {reason} (impl='triton' computes this call)"
            )


def attend(
    q: Tensor,  # [B, K, T, H, D]
    k: Tensor,  # [B, S, Hkv, D], or packed [N, Hkv, D]
    v: Tensor,
    cu_seqlens: Tensor | None,  # [B + 1]
    scale: float,
) -> Tensor:  # [B, K, T, H, D]
    """One call of flash-attn on folded queries; differentiable by its own autograd."""
    flash_attn = require("flash_attn", extra="flash")
    batch, samples, tokens = q.shape[:3]
    if cu_seqlens is None:
        out = flash_attn.flash_attn_func(q.flatten(1, 2), k, v, dropout_p=0.0, softmax_scale=scale, causal=False)
        return out.unflatten(1, (samples, tokens))
    folded = samples * tokens
    cu_queries = torch.arange(0, (batch + 1) * folded, folded, dtype=torch.int32, device=q.device)
    # N bounds every length without asking the device; blocks past a condition's end return at once.
    out = flash_attn.flash_attn_varlen_func(
        q.flatten(0, 2), k, v, cu_queries, cu_seqlens, folded, k.shape[0], dropout_p=0.0, softmax_scale=scale,
        causal=False,
    )  # fmt: skip
    return out.unflatten(0, (batch, samples, tokens))
