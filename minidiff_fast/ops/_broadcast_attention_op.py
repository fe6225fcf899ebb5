"""Schema, fake and autograd of ``minidiff_fast::broadcast_attention_fwd`` and ``_bwd``; Triton loads when they run."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from minidiff_fast.ops._eager import eager_function
from minidiff_fast.ops._query_transform import QueryNorm, QueryTransform
from minidiff_fast.ops.rotary import Rotary, RotaryPositions

LAUNCHERS = {"triton": "launch", "native": "native"}
"""Per implementation the end of the name of the module with its ``launch_forward`` and ``launch_backward``."""


def _run_forward(
    q: Tensor,  # [B, K, T, H, D]
    k: Tensor,  # [B, S, Hkv, D], or packed [N, Hkv, D]
    v: Tensor,  # [B, S, Hkv, D], or packed [N, Hkv, D]
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
    q_positions: Tensor | None = None,  # [B, K, T] or [B, K, T, 3]
    own_positions: Tensor | None = None,  # [B, K, P] or [B, K, P, 3]
    norm_weight: Tensor | None = None,  # [D]
    norm_bias: Tensor | None = None,  # [D]
    rotary: Sequence[int] | None = None,  # axes, rotary_dim, half, full_width
    rotary_base: float = 0.0,
    norm: str = "",
    norm_eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, K, T, H, D]; lse [B, K, T, H] float32; what its rounding lost (float32 inputs; else empty)."""
    transform = _transform(q_positions, own_positions, norm_weight, norm_bias, rotary, rotary_base, norm, norm_eps)
    return _launcher(impl).launch_forward(
        q, k, v, own_k, own_v, lengths, cu_seqlens, mask, seed, own_causal, dropout_p, scale, *transform
    )


def _transform(
    q_positions: Tensor | None,
    own_positions: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    rotary: Sequence[int] | None,
    rotary_base: float,
    norm: str,
    norm_eps: float,
) -> tuple[QueryTransform, ...]:
    """The launcher's last argument, or nothing: launchers without a transform of their own are never asked for one."""
    if not rotary and not norm:
        return ()
    rope = None
    if rotary and q_positions is not None:
        axes, rotary_dim, half, full_width = rotary
        recipe = Rotary(axes, rotary_dim, rotary_base, "half" if half else "interleaved", bool(full_width))  # type: ignore[arg-type]
        rope = RotaryPositions(recipe, q_positions, own_positions)
    return (QueryTransform(rope, QueryNorm(norm, norm_weight, norm_bias, norm_eps) if norm else None),)  # type: ignore[arg-type]


def _launcher(impl: str) -> ModuleType:
    """The module that launches the kernels of ``impl``."""
    return importlib.import_module(f"minidiff_fast.ops._broadcast_attention_{LAUNCHERS[impl]}")


broadcast_attention_fwd = torch.library.custom_op(
    "minidiff_fast::broadcast_attention_fwd", _run_forward, mutates_args=()
)


@broadcast_attention_fwd.register_fake
def _(q, k, v, own_k, own_v, lengths, cu_seqlens, mask, seed, own_causal, dropout_p, scale, impl, *transform):  # type: ignore[no-untyped-def]
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    correction = torch.empty_like(lse) if q.dtype == torch.float32 else lse.new_empty(0)
    return q.new_empty(q.shape), lse, correction


def _run_backward(
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
    q_positions: Tensor | None = None,
    own_positions: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    rotary: Sequence[int] | None = None,
    rotary_base: float = 0.0,
    norm: str = "",
    norm_eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, down_k, down_v, dnorm_weight, dnorm_bias, each of its input's shape and dtype; those that are not
    needed are empty."""
    transform = _transform(q_positions, own_positions, norm_weight, norm_bias, rotary, rotary_base, norm, norm_eps)
    gradients = _launcher(impl).launch_backward(
        dout, dlse, q, k, v, own_k, own_v, out, lse, lse_correction, lengths, cu_seqlens, mask, seed, own_causal,
        dropout_p, scale, *transform,
        need_q=need_q, need_shared=need_shared, need_own=need_own and own_k is not None,
    )  # fmt: skip
    return gradients if transform else (*gradients, q.new_empty(0), q.new_empty(0))


broadcast_attention_bwd = torch.library.custom_op(
    "minidiff_fast::broadcast_attention_bwd", _run_backward, mutates_args=()
)


@broadcast_attention_bwd.register_fake
def _(  # type: ignore[no-untyped-def]
    dout, dlse, q, k, v, own_k, own_v, out, lse, lse_correction, lengths, cu_seqlens, mask, seed, own_causal, dropout_p,
    scale, impl, need_q, need_shared, need_own, q_positions=None, own_positions=None, norm_weight=None, norm_bias=None,
    *recipe,
):  # fmt: skip
    def like(x, needed):  # type: ignore[no-untyped-def]
        return q.new_empty(0) if not needed or x is None else torch.empty_like(x, memory_format=torch.contiguous_format)

    return (
        like(q, need_q), like(k, need_shared), like(v, need_shared), like(own_k, need_own), like(own_v, need_own),
        like(norm_weight, need_q), like(norm_bias, need_q),
    )  # fmt: skip


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, own_k, own_v, lengths, cu_seqlens, mask, seed, *ctx.numbers = inputs[:13]
    positions_and_norm, ctx.recipe = inputs[13:17], inputs[17:]
    ctx.save_for_backward(q, k, v, own_k, own_v, *output, lengths, cu_seqlens, mask, seed, *positions_and_norm)


def _backward(run, ctx, dout, dlse, _):  # type: ignore[no-untyped-def]
    q, k, v, own_k, own_v, out, lse, lse_correction, lengths, cu_seqlens, mask, seed, *rest = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    dlse = torch.zeros_like(lse) if dlse is None else dlse
    needs = (*ctx.needs_input_grad, *[False] * 17)[:17]  # the dispatcher drops trailing defaults
    need_shared, need_own = needs[1] or needs[2], needs[3] or needs[4]
    need_q = needs[0] or needs[15] or needs[16]  # the norm's parameters get theirs in the pass over dq
    gradients = run(
        dout, dlse, q, k, v, own_k, own_v, out, lse, lse_correction, lengths, cu_seqlens, mask, seed,
        *ctx.numbers, need_q, need_shared, need_own, *rest, *ctx.recipe,
    )  # fmt: skip
    dq, dk, dv, down_k, down_v, dweight, dbias = (
        x if needs[i] else None for i, x in zip((0, 1, 2, 3, 4, 15, 16), gradients, strict=True)
    )
    return dq, dk, dv, down_k, down_v, *[None] * 10, dweight, dbias, *[None] * 4


broadcast_attention_fwd.register_autograd(partial(_backward, broadcast_attention_bwd), setup_context=_setup_context)
broadcast_attention_eager = eager_function(
    "BroadcastAttention", _run_forward, _setup_context, partial(_backward, _run_backward)
)
