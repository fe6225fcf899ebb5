"""The ``merge`` contestant: two fused attention calls joined by their log-sum-exp.

One call attends to the condition's tokens with K in the query axis, one per sample to its own tokens:

    lse = log(exp(lse_s) + exp(lse_o)),   out = exp(lse_s - lse) out_s + exp(lse_o - lse) out_o

The backward gives each fused kernel the *joint* out and lse. Then the probabilities it recomputes,
``exp(scale q k^T - lse)``, and its ``rowsum(grad_out * out)`` are those of the one softmax over both
segments, so its gradients are exact, although none of these kernels differentiates through its own lse.
This is what ring attention does across devices, and the best that stock kernels allow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


class SegmentKernel(Protocol):
    """A fused attention over one segment of keys that hands out, and takes back, its log-sum-exp."""

    grouped: bool
    """Takes Hkv < H as it is."""
    multiple: int
    """Head dimensions it takes are multiples of this."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        """``[N, H, Lq, D], [N, Hkv, Lk, D] x 2 -> out [N, H, Lq, D], lse [N, H, Lq] float32, state``."""
        ...

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor,
        state: tuple[Any, ...], causal: bool, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of q, k, v for the given (joint) out and lse."""
        ...


class CpuKernel:
    """PyTorch's flash attention for CPUs."""

    grouped = False
    multiple = 1

    def forward(self, q, k, v, bias, causal, scale):
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
        return out, lse, ()

    def backward(self, grad, q, k, v, bias, out, lse, state, causal, scale):
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=scale
        )


class FlashKernel:
    """PyTorch's flash attention for CUDA: half precision, no bias, grouped heads."""

    grouped = True
    multiple = 8

    def forward(self, q, k, v, bias, causal, scale):
        assert bias is None
        out, lse, *state = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
        return out, lse, tuple(state[:6])

    def backward(self, grad, q, k, v, bias, out, lse, state, causal, scale):
        starts_q, starts_k, max_q, max_k, seed, offset = state
        return aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, starts_q, starts_k, max_q, max_k, 0.0, causal, seed, offset, scale=scale
        )


class EfficientKernel:
    """PyTorch's memory-efficient attention for CUDA; its rows of lse are padded to a multiple of 32."""

    grouped = False
    multiple = 8

    def forward(self, q, k, v, bias, causal, scale):
        bias = self._full(bias, q, k)
        out, lse, seed, offset = aten._scaled_dot_product_efficient_attention(
            q, k, v, bias, True, 0.0, causal, scale=scale
        )
        return out, lse[..., : q.shape[2]], (seed, offset)

    def backward(self, grad, q, k, v, bias, out, lse, state, causal, scale):
        bias = self._full(bias, q, k)
        lse = F.pad(lse, (0, -lse.shape[2] % 32), value=float("inf"))
        dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
            grad, q, k, v, bias, out, lse, *state, 0.0, [True, True, True, False], causal, scale=scale
        )
        return dq, dk, dv

    @staticmethod
    def _full(bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        return None if bias is None else bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])


SEGMENT_KERNELS: dict[str, SegmentKernel] = {
    "cpu": CpuKernel(),
    "flash": FlashKernel(),
    "efficient": EfficientKernel(),
}


@dataclass(frozen=True)
class _Layout:
    """Rows ``[B, K, T, H, X]`` to the shared and the own call's ``[N, heads, rows, X]``, and back."""

    B: int
    K: int
    T: int
    H: int
    group: int
    """Query heads folded into the shared call's rows: H / Hkv, or 1 where the kernel groups by itself."""

    def to_shared(self, x: Tensor) -> Tensor:  # [B, H/group, K*T*group, X]
        x = x.unflatten(3, (self.H // self.group, self.group))
        return x.permute(0, 3, 1, 2, 4, 5).flatten(2, 4)

    def from_shared(self, x: Tensor) -> Tensor:
        x = x.unflatten(2, (self.K, self.T, self.group))
        return x.permute(0, 2, 3, 1, 4, 5).flatten(3, 4)

    def to_own(self, x: Tensor) -> Tensor:  # [B*K, H, T, X]
        return x.flatten(0, 1).transpose(1, 2)

    def from_own(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).unflatten(0, (self.B, self.K))


class _MergedAttention(torch.autograd.Function):
    """q ``[B,K,T,H,D]``; k, v ``[B,Hkv,S,D]``; own_k, own_v ``[B*K,H or Hkv,P,D]``."""

    @staticmethod
    def forward(ctx, q, k, v, own_k, own_v, bias, own_causal, scale, kernel, layout):  # type: ignore[override]
        shared = kernel.forward(layout.to_shared(q), k, v, bias, False, scale)
        own = kernel.forward(layout.to_own(q), own_k, own_v, None, own_causal, scale)
        lse_s = layout.from_shared(shared[1].unsqueeze(-1))
        lse_o = layout.from_own(own[1].unsqueeze(-1))
        lse = torch.logaddexp(lse_s, lse_o)
        out_s, out_o = layout.from_shared(shared[0]), layout.from_own(own[0])
        out = (out_s * (lse_s - lse).exp() + out_o * (lse_o - lse).exp()).to(q.dtype)
        ctx.save_for_backward(q, k, v, own_k, own_v, bias, out, lse)
        ctx.states = shared[2], own[2]
        ctx.rest = own_causal, scale, kernel, layout
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        q, k, v, own_k, own_v, bias, out, lse = ctx.saved_tensors
        own_causal, scale, kernel, layout = ctx.rest

        def lse_rows(x: Tensor) -> Tensor:
            return x.squeeze(-1).contiguous()

        dq_s, dk, dv = kernel.backward(
            layout.to_shared(grad), layout.to_shared(q), k, v, bias, layout.to_shared(out),
            lse_rows(layout.to_shared(lse)), ctx.states[0], False, scale,
        )  # fmt: skip
        dq_o, own_dk, own_dv = kernel.backward(
            layout.to_own(grad), layout.to_own(q), own_k, own_v, None, layout.to_own(out),
            lse_rows(layout.to_own(lse)), ctx.states[1], own_causal, scale,
        )  # fmt: skip
        dq = layout.from_shared(dq_s) + layout.from_own(dq_o)
        return dq, dk, dv, own_dk, own_dv, None, None, None, None, None


def merged_attention(
    q: Tensor,  # [B, K, T, H, D]
    k: Tensor,  # [B, S, Hkv, D]
    v: Tensor,  # [B, S, Hkv, D]
    own_k: Tensor,  # [B, K, P, Hkv, D]
    own_v: Tensor,  # [B, K, P, Hkv, D]
    *,
    bias: Tensor | None,  # [B or 1, 1, rows or 1, S], from segment_bias
    own_causal: bool,
    kernel: str,
) -> Tensor:  # [B, K, T, H, D]
    """One softmax over shared and own tokens out of two calls of a fused kernel."""
    chosen = SEGMENT_KERNELS[kernel]
    B, K, T, H, width = q.shape
    heads_per_key = H // k.shape[2]
    layout = _Layout(B, K, T, H, 1 if chosen.grouped else heads_per_key)
    pad = -width % chosen.multiple
    if pad:
        q, k, v, own_k, own_v = (F.pad(x, (0, pad)) for x in (q, k, v, own_k, own_v))
    own_k, own_v = (x.flatten(0, 1).transpose(1, 2) for x in (own_k, own_v))
    if not chosen.grouped and heads_per_key > 1:
        own_k, own_v = (x.repeat_interleave(heads_per_key, dim=1) for x in (own_k, own_v))
    out = _MergedAttention.apply(
        q, k.transpose(1, 2), v.transpose(1, 2), own_k, own_v, bias, own_causal, width**-0.5, chosen, layout
    )
    return out[..., :width] if pad else out


def segment_bias(
    visible: Tensor | None,  # [B or 1, 1, K*T or 1, S] bool
    group: int,
    kernel: str,
    dtype: torch.dtype,
) -> Tensor | None:  # [B or 1, 1, rows or 1, S]
    """0 where visible, -inf elsewhere; rows padded to 16 elements in memory, as CUDA wants them."""
    if visible is None:
        return None
    if visible.shape[2] > 1 and not SEGMENT_KERNELS[kernel].grouped:
        visible = visible.repeat_interleave(group, dim=2)
    keys = visible.shape[3]
    bias = torch.zeros(*visible.shape[:3], keys + -keys % 16, dtype=dtype, device=visible.device)
    return bias[..., :keys].masked_fill_(~visible, float("-inf"))
