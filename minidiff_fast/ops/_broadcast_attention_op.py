"""Schema, fake and autograd of ``minidiff_fast::broadcast_attention_fwd`` and ``_bwd``; Triton loads when they run."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

LAUNCHERS = {"triton": "launch", "native": "native"}
"""Per implementation the end of the name of the module with its ``launch_forward`` and ``launch_backward``."""


@torch.library.custom_op("minidiff_fast::broadcast_attention_fwd", mutates_args=())
def broadcast_attention_fwd(
    q: Tensor,  # [B, K, T, H, D]
    k: Tensor,  # [B, S, Hkv, D]
    v: Tensor,  # [B, S, Hkv, D]
    own_k: Tensor | None,  # [B, K, P, Hkv, D]
    own_v: Tensor | None,  # [B, K, P, Hkv, D]
    lengths: Tensor | None,  # [B]
    cu_seqlens: Tensor | None,  # [B + 1]
    mask: Tensor | None,  # [B or 1, T or 1, S]
    seed: Tensor | None,  # [1]
    own_causal: bool,
    dropout_p: float,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, K, T, H, D]; lse [B, K, T, H] float32; what its rounding lost (float32 inputs; else empty)."""
    return _launcher(impl).launch_forward(
        q, k, v, own_k, own_v, lengths, cu_seqlens, mask, seed, own_causal, dropout_p, scale
    )


def _launcher(impl: str) -> ModuleType:
    """The module that launches the kernels of ``impl``."""
    return importlib.import_module(f"minidiff_fast.ops._broadcast_attention_{LAUNCHERS[impl]}")


@broadcast_attention_fwd.register_fake
def _(q, k, v, own_k, own_v, lengths, cu_seqlens, mask, seed, own_causal, dropout_p, scale, impl):  # type: ignore[no-untyped-def]
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    correction = torch.empty_like(lse) if q.dtype == torch.float32 else lse.new_empty(0)
    return q.new_empty(q.shape), lse, correction


@torch.library.custom_op("minidiff_fast::broadcast_attention_bwd", mutates_args=())
def broadcast_attention_bwd(
    dout: Tensor,  # [B, K, T, H, D]
    dlse: Tensor,  # [B, K, T, H]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    own_k: Tensor | None,
    own_v: Tensor | None,
    out: Tensor,  # [B, K, T, H, D]
    lse: Tensor,  # [B, K, T, H]
    lse_correction: Tensor,  # [B, K, T, H] or empty
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    own_causal: bool,
    dropout_p: float,
    scale: float,
    impl: str,
    need_q: bool,
    need_shared: bool,
    need_own: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, down_k, down_v, each of its input's shape and dtype; those that are not needed are empty."""
    return _launcher(impl).launch_backward(
        dout, dlse, q, k, v, own_k, own_v, out, lse, lse_correction, lengths, cu_seqlens, mask, seed, own_causal,
        dropout_p, scale,
        need_q=need_q, need_shared=need_shared, need_own=need_own and own_k is not None,
    )  # fmt: skip


@broadcast_attention_bwd.register_fake
def _(  # type: ignore[no-untyped-def]
    dout, dlse, q, k, v, own_k, own_v, out, lse, lse_correction, lengths, cu_seqlens, mask, seed, own_causal, dropout_p,
    scale, impl, need_q, need_shared, need_own,
):  # fmt: skip
    def like(x, needed):  # type: ignore[no-untyped-def]
        return q.new_empty(x.shape if needed and x is not None else (0,))

    return like(q, need_q), like(k, need_shared), like(v, need_shared), like(own_k, need_own), like(own_v, need_own)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, own_k, own_v, lengths, cu_seqlens, mask, seed, ctx.own_causal, ctx.dropout_p, ctx.scale, ctx.impl = inputs
    ctx.save_for_backward(q, k, v, own_k, own_v, *output, lengths, cu_seqlens, mask, seed)


def _backward(ctx, dout, dlse, _):  # type: ignore[no-untyped-def]
    q, k, v, own_k, own_v, out, lse, lse_correction, lengths, cu_seqlens, mask, seed = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    dlse = torch.zeros_like(lse) if dlse is None else dlse
    needs = ctx.needs_input_grad
    need_q, need_shared, need_own = needs[0], needs[1] or needs[2], needs[3] or needs[4]
    gradients = broadcast_attention_bwd(
        dout, dlse, q, k, v, own_k, own_v, out, lse, lse_correction, lengths, cu_seqlens, mask, seed,
        ctx.own_causal, ctx.dropout_p, ctx.scale, ctx.impl, need_q, need_shared, need_own,
    )  # fmt: skip
    asked = (need_q, need_shared, need_shared, need_own, need_own)
    return *(x if wanted else None for x, wanted in zip(gradients, asked, strict=True)), *[None] * 8


broadcast_attention_fwd.register_autograd(_backward, setup_context=_setup_context)
