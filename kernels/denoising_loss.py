"""Triton kernels of the denoising loss: pred and target are read once forward and once backward.

``loss = share * sum_{t: mask} sum_a e(pred - target)`` per sample, ``share = 1 / (A max(1, sum_t mask))``; e is d^2
(KIND 0), |d| (1), or the Huber function of d (2). A row is a sample b * K + k; a program owns a few whole rows forward,
a tile of them backward. Sums are float32 in a fixed order.
"""

import triton
import triton.language as tl


@triton.jit
def _offsets(rows, e, K, A, stride_b, stride_k, stride_t, stride_a):
    """Offsets [R, E] of elements e = t * A + a of rows into a tensor [B, K, T, A]."""
    row = (rows // K).to(tl.int64) * stride_b + (rows % K).to(tl.int64) * stride_k
    within = (e // A).to(tl.int64) * stride_t + (e % A).to(tl.int64) * stride_a
    return row[:, None] + within[None, :]


@triton.jit
def _difference(
    pred, target, mask, rows, e, valid, K, A, pred_b, pred_k, pred_t, pred_a, target_b, target_k, target_t, target_a,
    mask_b, mask_k, mask_t, HAS_MASK: tl.constexpr,
):
    """pred - target [R, E], 0 where it does not count, and whether it counts."""
    counted = valid
    if HAS_MASK:
        row = (rows // K).to(tl.int64) * mask_b + (rows % K).to(tl.int64) * mask_k
        token = (e // A).to(tl.int64) * mask_t
        counted = valid & (tl.load(mask + row[:, None] + token[None, :], mask=valid, other=0) != 0)
    p = tl.load(pred + _offsets(rows, e, K, A, pred_b, pred_k, pred_t, pred_a), mask=counted, other=0.0)
    y = tl.load(target + _offsets(rows, e, K, A, target_b, target_k, target_t, target_a), mask=counted, other=0.0)
    return p.to(tl.float32) - y.to(tl.float32), counted


@triton.jit
def _denoising_loss_fwd_kernel(
    pred, target, mask, loss, share_out,
    pred_b, pred_k, pred_t, pred_a, target_b, target_k, target_t, target_a, mask_b, mask_k, mask_t,
    rows_total, K, A, size, delta,
    KIND: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
):
    """loss and share [rows]."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = rows < rows_total
    total = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
    count = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
    for start in range(0, size, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        valid = inside[:, None] & (e < size)[None, :]
        d, counted = _difference(
            pred, target, mask, rows, e, valid, K, A, pred_b, pred_k, pred_t, pred_a, target_b, target_k, target_t,
            target_a, mask_b, mask_k, mask_t, HAS_MASK,
        )
        if KIND == 0:
            total += d * d
        elif KIND == 1:
            total += tl.abs(d)
        else:
            magnitude = tl.abs(d)
            total += tl.where(magnitude <= delta, 0.5 * d * d, delta * (magnitude - 0.5 * delta))
        if HAS_MASK:
            count += counted.to(tl.float32)
    elements = tl.sum(count, 1) if HAS_MASK else tl.zeros([BLOCK_R], tl.float32) + size
    share = 1.0 / tl.maximum(elements, A)
    tl.store(loss + rows, tl.sum(total, 1) * share, mask=inside)
    tl.store(share_out + rows, share, mask=inside)


@triton.jit
def _denoising_loss_bwd_kernel(
    dloss, pred, target, mask, share, dpred,
    pred_b, pred_k, pred_t, pred_a, target_b, target_k, target_t, target_a, mask_b, mask_k, mask_t,
    rows_total, K, A, size, delta, tiles,
    KIND: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
):
    """dpred [rows, size] = dloss * share * e'(pred - target)."""
    pid = tl.program_id(0)
    rows = (pid // tiles) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = rows < rows_total
    e = (pid % tiles) * BLOCK_E + tl.arange(0, BLOCK_E)
    valid = inside[:, None] & (e < size)[None, :]
    d, counted = _difference(
        pred, target, mask, rows, e, valid, K, A, pred_b, pred_k, pred_t, pred_a, target_b, target_k, target_t, target_a,
        mask_b, mask_k, mask_t, HAS_MASK,
    )
    factor = tl.load(dloss + rows, mask=inside, other=0.0) * tl.load(share + rows, mask=inside, other=0.0)
    if KIND == 0:
        slope = 2.0 * d
    else:
        sign = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))  # a NaN stays one
        slope = sign if KIND == 1 else tl.where(tl.abs(d) <= delta, d, delta * sign)
    gradient = tl.where(counted, factor[:, None] * slope, 0.0)
    tl.store(
        dpred + (rows.to(tl.int64) * size)[:, None] + e[None, :], gradient.to(dpred.dtype.element_ty), mask=valid
    )
