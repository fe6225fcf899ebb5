"""Triton kernels of broadcast attention: K samples of a condition read one copy of its keys and values.

Rows. Everything that shares a key/value head is folded into one row axis: for a condition b and a
key/value head h, row ``r = (k * T + t) * G + g`` is query token t of sample k under query head
``h * G + g``, G = H / Hkv. A program owns a tile of rows and streams two segments of keys through one
online softmax:

- shared: the condition's S keys, the same for every row;
- own: key ``j = k * P + p`` is own token p of sample k. A tile of rows touches the samples
  ``first .. last``, hence the contiguous keys ``first * P .. (last + 1) * P``, masked to the row's sample.

Accumulators are float32. A row that sees no key gives output 0 and log-sum-exp -inf.

EXACT, set for float32 inputs. 16-bit inputs keep logits in base 2 (``logit_scale = scale * log2(e)``), so that a
logit and its exponential cost one multiply-add and one exp2. That rounds a logit of magnitude 8 by 5e-7, which
float32 inputs would notice: EXACT keeps logits in natural units and multiplies the small difference to the
maximum instead, and stores per row in ``lse_correction`` what the rounded log-sum-exp lacks, because the backward
recomputes p from it.

Backward, with ``delta = rowsum(dout * out) - dlse`` and ``p = exp(scale * q k^T - lse)``:
``dv = p^T dout``, ``ds = p * (dout v^T - delta)``, ``dq = scale * ds k``, ``dk = scale * ds^T q``.
One program per block of keys sums dk and dv over every row that sees the block, in float32 and in a fixed
order: no atomics, the same bits on every run. Nothing of shape ``[B, K, S, ...]`` is ever written.

Dropout keeps the pair (row, key) when the first Philox-4x32-10 word of the counter
``(row mod 2^32, key, row div 2^32, 0)`` under the 64-bit seed is at least ``dropout_p * 2^32``, with ``row`` the
linear index into ``[B, K, T, H]`` and ``key`` s for shared, S + p for own keys: recomputed, never stored.

Packed keys (HAS_PACKED): S is N, the tokens of all conditions, and a condition streams those from ``cu_seqlens[b]`` to
``cu_seqlens[b + 1]``; what is said of s holds for the place in N.

ROPE and NORM (see _query_transform): the forward transforms a tile of queries when it loads it, and all kernels turn
own keys when they load them. The backward writes the transformed queries once, to where dq will be: the kernels of dk
and dv read them there, the one of dq replaces each of its rows by their gradient, and a last pass takes that back
through rotation and norm.
"""

import triton
import triton.language as tl

from minidiff_fast.kernels._query_transform import (
    _broadcast_attention_bwd_transform_kernel,
    _broadcast_attention_transform_kernel,
    _transformed_tile,
)

__all__ = [
    "_broadcast_attention_bwd_delta_kernel",
    "_broadcast_attention_bwd_dkdv_kernel",
    "_broadcast_attention_bwd_dq_kernel",
    "_broadcast_attention_bwd_transform_kernel",
    "_broadcast_attention_fwd_kernel",
    "_broadcast_attention_transform_kernel",
]

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _exponential(x, EXACT: tl.constexpr):
    """e to the power of x, a difference of logits in the units that EXACT says."""
    return tl.exp2(x * LOG2_E) if EXACT else tl.exp2(x)


@triton.jit
def _program_coordinates(blocks, heads):
    """Program id -> (block, head, batch); blocks of one (batch, head) are neighbours and share its keys in cache."""
    pid = tl.program_id(0)
    block = pid % blocks
    rest = pid // blocks
    return block, rest % heads, (rest // heads).to(tl.int64)


@triton.jit
def _load_rows(
    base, rows, row_mask, T, stride_k, stride_t, stride_h, stride_d, G: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows [M] of a per-sample tensor -> [M, BLOCK_D], zero outside."""
    d = tl.arange(0, BLOCK_D)
    sample = (rows // (T * G)).to(tl.int64)
    t = ((rows // G) % T).to(tl.int64)
    g = (rows % G).to(tl.int64)
    offsets = (sample * stride_k + t * stride_t + g * stride_h)[:, None] + d.to(tl.int64)[None, :] * stride_d
    return tl.load(base + offsets, mask=row_mask[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _load_queries(
    base, rows, row_mask, b, h, K, T, positions, weight, bias, eps, stride_k, stride_t, stride_h, stride_d,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROPE: tl.constexpr, NORM: tl.constexpr,
):
    """Rows [M] of the queries, transformed."""
    if ROPE is None and NORM is None:
        return _load_rows(base, rows, row_mask, T, stride_k, stride_t, stride_h, stride_d, G, D, BLOCK_D)
    else:
        offset = (rows // (T * G)).to(tl.int64) * stride_k + ((rows // G) % T).to(tl.int64) * stride_t
        offset += (rows % G).to(tl.int64) * stride_h
        return _transformed_tile(
            base, offset, row_mask, b * K * T + rows // G, h, positions, weight, bias, eps, stride_h, stride_d, ROPE,
            NORM, D, BLOCK_D,
        )


@triton.jit
def _load_keys(
    base, keys, key_mask, P, stride_k, stride_s, stride_d, OWN: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Keys (or values) [N] of one segment -> [N, BLOCK_D], zero outside."""
    d = tl.arange(0, BLOCK_D)
    if OWN:
        offset = (keys // P).to(tl.int64) * stride_k + (keys % P).to(tl.int64) * stride_s
    else:
        offset = keys.to(tl.int64) * stride_s
    return tl.load(
        base + offset[:, None] + d.to(tl.int64)[None, :] * stride_d, mask=key_mask[:, None] & (d < D)[None, :],
        other=0.0,
    )


@triton.jit
def _load_turned_keys(
    base, keys, key_mask, b, h, K, P, positions, stride_k, stride_s, stride_h, stride_d, OWN: tl.constexpr,
    ROPE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Keys [N] of one segment; own keys turned to their places."""
    if OWN and ROPE is not None:
        offset = (keys // P).to(tl.int64) * stride_k + (keys % P).to(tl.int64) * stride_s
        return _transformed_tile(
            base, offset, key_mask, b * K * P + keys, h, positions, base, base, 0.0, stride_h, stride_d, ROPE, None,
            D, BLOCK_D,
        )
    else:
        return _load_keys(base, keys, key_mask, P, stride_k, stride_s, stride_d, OWN, D, BLOCK_D)


@triton.jit
def _shared_range(lengths, cu_seqlens, b, S, HAS_LENGTHS: tl.constexpr, HAS_PACKED: tl.constexpr):
    """The condition's first key and the one after its last."""
    start = 0
    end = S
    if HAS_PACKED:
        start = tl.maximum(tl.load(cu_seqlens + b), 0)
        end = tl.minimum(tl.load(cu_seqlens + b + 1), S)
    elif HAS_LENGTHS:
        end = tl.minimum(tl.load(lengths + b), S).to(tl.int32)
    return start, end


@triton.jit
def _packed_block(slot, cu_seqlens, B, search_steps, BLOCK_N: tl.constexpr):
    """Slot -> (condition, its block of keys; negative or past the end for an idle slot).

    Condition b owns the slots from ``cu_seqlens[b] // BLOCK_N + b`` on: at least as many as it has blocks.
    """
    low = slot * 0
    high = low + B
    for _ in tl.range(0, search_steps):
        middle = (low + high) // 2
        before = tl.load(cu_seqlens + middle) // BLOCK_N + middle <= slot
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low, slot - (tl.load(cu_seqlens + low) // BLOCK_N + low)


@triton.jit
def _visible(
    rows, row_mask, keys, key_mask, T, P, mask, stride_mask_t, stride_mask_s, OWN: tl.constexpr,
    OWN_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, G: tl.constexpr,
):
    """Which row sees which key, bool [M, N]."""
    visible = row_mask[:, None] & key_mask[None, :]
    t = (rows // G) % T
    if OWN:
        visible = visible & ((rows // (T * G))[:, None] == (keys // P)[None, :])
        if OWN_CAUSAL:
            visible = visible & ((keys % P)[None, :] <= t[:, None])
    else:
        if HAS_MASK:
            offsets = t.to(tl.int64)[:, None] * stride_mask_t + keys.to(tl.int64)[None, :] * stride_mask_s
            visible = visible & (tl.load(mask + offsets, mask=visible, other=0) != 0)
    return visible


@triton.jit
def _kept(
    seed, dropout_threshold, b, h, rows, keys, K, T, S, P, OWN: tl.constexpr, G: tl.constexpr, HEADS: tl.constexpr,
):
    """Which (row, key) pairs survive dropout, bool [M, N]; the counters are in the module's docstring."""
    token = b * K * T + rows // G
    row = token * (HEADS * G) + h * G + rows % G
    column = keys % P + S if OWN else keys
    low = row.to(tl.uint32)[:, None]
    high = (row >> 32).to(tl.uint32)[:, None]
    word, _, _, _ = tl.philox(seed, low, column.to(tl.uint32)[None, :], high, low * 0)
    return word.to(tl.int64) >= dropout_threshold


@triton.jit
def _own_key_range(first_row, last_row, T, P, G: tl.constexpr):
    """The own keys that a tile of rows can see: those of its first to its last sample."""
    return (first_row // (T * G)) * P, (last_row // (T * G) + 1) * P


@triton.jit
def _attend(
    acc, row_max, row_sum, q_tile, rows, row_mask, b, h, k_base, v_base, key_start, key_end,
    stride_kk, stride_ks, stride_kh, stride_kd, stride_vk, stride_vs, stride_vd, mask, stride_mask_t, stride_mask_s,
    K, T, S, P, logit_scale, seed, dropout_threshold, positions,
    OWN: tl.constexpr, ROPE: tl.constexpr, OWN_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr, EXACT: tl.constexpr, HEADS: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):
    """Stream the keys ``key_start .. key_end`` of one segment through the online softmax of a tile of rows."""
    for start in tl.range(key_start, key_end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        key_mask = keys < key_end
        k_tile = _load_turned_keys(
            k_base, keys, key_mask, b, h, K, P, positions, stride_kk, stride_ks, stride_kh, stride_kd, OWN, ROPE, D, BLOCK_D,
        )
        logits = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * logit_scale
        visible = _visible(
            rows, row_mask, keys, key_mask, T, P, mask, stride_mask_t, stride_mask_s, OWN, OWN_CAUSAL, HAS_MASK, G,
        )
        logits = tl.where(visible, logits, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(logits, 1))
        # A row that has seen no key yet keeps -inf; subtracting 0 instead keeps exp2(-inf) = 0 free of NaN.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = _exponential(logits - shift[:, None], EXACT)
        decay = _exponential(row_max - shift, EXACT)
        row_sum = row_sum * decay + tl.sum(p, 1)
        if HAS_DROPOUT:
            p = tl.where(_kept(seed, dropout_threshold, b, h, rows, keys, K, T, S, P, OWN, G, HEADS), p, 0.0)
        v_tile = _load_keys(v_base, keys, key_mask, P, stride_vk, stride_vs, stride_vd, OWN, D, BLOCK_D)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * decay[:, None], input_precision=PRECISION)
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit
def _broadcast_attention_fwd_kernel(
    q, k, v, own_k, own_v, lengths, cu_seqlens, mask, seed_pointer, q_positions,
    own_positions, norm_weight, norm_bias, norm_eps, out, lse, lse_correction,
    stride_qb, stride_qk, stride_qt, stride_qh, stride_qd,
    stride_kb, stride_ks, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vh, stride_vd,
    stride_okb, stride_okk, stride_okp, stride_okh, stride_okd,
    stride_ovb, stride_ovk, stride_ovp, stride_ovh, stride_ovd,
    stride_mask_b, stride_mask_t, stride_mask_s,
    K, T, S, P, row_blocks, logit_scale, keep_scale, dropout_threshold,
    HAS_LENGTHS: tl.constexpr, HAS_PACKED: tl.constexpr, HAS_MASK: tl.constexpr, OWN_CAUSAL: tl.constexpr, HAS_OWN: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    EXACT: tl.constexpr, HEADS: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
    ROPE: tl.constexpr, OWN_ROPE: tl.constexpr, NORM: tl.constexpr,
):
    """out [B,K,T,H,D] and lse [B,K,T,H] (natural logarithm), both contiguous; one program per tile of rows."""
    block, h, b = _program_coordinates(row_blocks, HEADS)
    row_count = K * T * G
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < row_count
    q_tile = _load_queries(
        q + b * stride_qb + h.to(tl.int64) * G * stride_qh, rows, row_mask, b, h, K, T, q_positions, norm_weight,
        norm_bias, norm_eps, stride_qk, stride_qt, stride_qh, stride_qd, G, D, BLOCK_D, ROPE, NORM,
    )
    seed = tl.load(seed_pointer) if HAS_DROPOUT else 0
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    key_start, key_end = _shared_range(lengths, cu_seqlens, b, S, HAS_LENGTHS, HAS_PACKED)
    acc, row_max, row_sum = _attend(
        acc, row_max, row_sum, q_tile, rows, row_mask, b, h,
        k + b * stride_kb + h.to(tl.int64) * stride_kh, v + b * stride_vb + h.to(tl.int64) * stride_vh, key_start, key_end,
        0, stride_ks, stride_kh, stride_kd, 0, stride_vs, stride_vd, mask + b * stride_mask_b, stride_mask_t, stride_mask_s,
        K, T, S, P, logit_scale, seed, dropout_threshold, q,
        False, None, False, HAS_MASK, HAS_DROPOUT, EXACT, HEADS, G, D, BLOCK_D, BLOCK_N, PRECISION,
    )
    if HAS_OWN:
        own_start, own_end = _own_key_range(
            block * BLOCK_M, tl.minimum(block * BLOCK_M + BLOCK_M, row_count) - 1, T, P, G
        )
        acc, row_max, row_sum = _attend(
            acc, row_max, row_sum, q_tile, rows, row_mask, b, h,
            own_k + b * stride_okb + h.to(tl.int64) * stride_okh, own_v + b * stride_ovb + h.to(tl.int64) * stride_ovh, own_start, own_end,
            stride_okk, stride_okp, stride_okh, stride_okd, stride_ovk, stride_ovp, stride_ovd, mask, 0, 0,
            K, T, S, P, logit_scale, seed, dropout_threshold, own_positions,
            True, OWN_ROPE, OWN_CAUSAL, False, HAS_DROPOUT, EXACT, HEADS, G, D, BLOCK_D, BLOCK_P, PRECISION,
        )
    seen = row_sum != 0.0
    normaliser = tl.where(seen, row_sum, 1.0)
    acc = acc * (keep_scale / normaliser)[:, None]
    log_sum = tl.log2(normaliser) * (LN_2 if EXACT else 1.0)
    row_lse = tl.where(seen, (row_max + log_sum) * (1.0 if EXACT else LN_2), float("-inf"))
    _store_rows(out, acc, b, h, rows, row_mask, K, T, HEADS, G, D, BLOCK_D)
    index = _row_index(b, h, rows, K, T, HEADS, G)
    tl.store(lse + index, row_lse, mask=row_mask)
    if EXACT:
        lacking = tl.where(seen, (tl.where(seen, row_max, 0.0) - row_lse) + log_sum, 0.0)
        tl.store(lse_correction + index, lacking, mask=row_mask)


@triton.jit
def _row_index(b, h, rows, K, T, HEADS: tl.constexpr, G: tl.constexpr):
    """The linear index of rows into a contiguous [B, K, T, H], int64 [M]."""
    return (b * K * T + rows // G) * (HEADS * G) + h * G + rows % G


@triton.jit
def _store_rows(
    out, tile, b, h, rows, row_mask, K, T, HEADS: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Store a tile [M, BLOCK_D] of rows into a contiguous [B, K, T, H, D]."""
    d = tl.arange(0, BLOCK_D)
    offsets = _row_index(b, h, rows, K, T, HEADS, G)[:, None] * D + d[None, :]
    tl.store(out + offsets, tile.to(out.dtype.element_ty), mask=row_mask[:, None] & (d < D)[None, :])


@triton.jit
def _broadcast_attention_bwd_delta_kernel(
    out, dout, dlse, delta,
    stride_dob, stride_dok, stride_dot, stride_doh, stride_dod,
    K, T, row_blocks,
    HEADS: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):
    """delta [B,K,T,H] = rowsum(dout * out) - dlse, float32."""
    block, h, b = _program_coordinates(row_blocks, HEADS)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < K * T * G
    d = tl.arange(0, BLOCK_D)
    index = _row_index(b, h, rows, K, T, HEADS, G)
    out_tile = tl.load(out + index[:, None] * D + d[None, :], mask=row_mask[:, None] & (d < D)[None, :], other=0.0)
    dout_tile = _load_rows(
        dout + b * stride_dob + h.to(tl.int64) * G * stride_doh, rows, row_mask, T, stride_dok, stride_dot,
        stride_doh, stride_dod, G, D, BLOCK_D,
    )
    row_delta = tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), 1)
    row_delta -= tl.load(dlse + index, mask=row_mask, other=0.0)
    tl.store(delta + index, row_delta, mask=row_mask)


@triton.jit
def _row_statistics(lse, lse_correction, delta, index, row_mask, EXACT: tl.constexpr):
    """Per row: lse in the units of the logits, what it lacks, delta; all 0 for a row that saw nothing (its p are
    exp(-inf) = 0, and a NaN in the gradient of its lse must not reach the keys)."""
    row_lse = tl.load(lse + index, mask=row_mask, other=float("-inf"))
    seen = row_lse != float("-inf")
    row_lse = tl.where(seen, row_lse * (1.0 if EXACT else LOG2_E), 0.0)
    correction = tl.load(lse_correction + index, mask=row_mask, other=0.0) if EXACT else tl.zeros_like(row_lse)
    return row_lse, correction, tl.where(seen, tl.load(delta + index, mask=row_mask, other=0.0), 0.0)


@triton.jit
def _accumulate_dq(
    dq_acc, q_tile, dout_tile, row_lse, correction, row_delta, rows, row_mask, b, h, k_base, v_base, key_start, key_end,
    stride_kk, stride_ks, stride_kh, stride_kd, stride_vk, stride_vs, stride_vd, mask, stride_mask_t, stride_mask_s,
    K, T, S, P, logit_scale, keep_scale, seed, dropout_threshold, positions,
    OWN: tl.constexpr, ROPE: tl.constexpr, OWN_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr, EXACT: tl.constexpr, HEADS: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):
    """dq of a tile of rows, over the keys ``key_start .. key_end`` of one segment."""
    for start in tl.range(key_start, key_end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        key_mask = keys < key_end
        k_tile = _load_turned_keys(
            k_base, keys, key_mask, b, h, K, P, positions, stride_kk, stride_ks, stride_kh, stride_kd, OWN, ROPE, D, BLOCK_D,
        )
        v_tile = _load_keys(v_base, keys, key_mask, P, stride_vk, stride_vs, stride_vd, OWN, D, BLOCK_D)
        logits = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * logit_scale
        visible = _visible(
            rows, row_mask, keys, key_mask, T, P, mask, stride_mask_t, stride_mask_s, OWN, OWN_CAUSAL, HAS_MASK, G,
        )
        p = _exponential(tl.where(visible, logits, float("-inf")) - row_lse[:, None] - correction[:, None], EXACT)
        dp = tl.dot(dout_tile, tl.trans(v_tile), input_precision=PRECISION) * keep_scale
        if HAS_DROPOUT:
            dp = tl.where(_kept(seed, dropout_threshold, b, h, rows, keys, K, T, S, P, OWN, G, HEADS), dp, 0.0)
        ds = p * (dp - row_delta[:, None])
        dq_acc = tl.dot(ds.to(k_tile.dtype), k_tile, dq_acc, input_precision=PRECISION)
    return dq_acc


@triton.jit
def _broadcast_attention_bwd_dq_kernel(
    q, k, v, own_k, own_v, lengths, cu_seqlens, mask, seed_pointer, own_positions, dout, lse, lse_correction, delta, dq,
    stride_qb, stride_qk, stride_qt, stride_qh, stride_qd,
    stride_kb, stride_ks, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vh, stride_vd,
    stride_okb, stride_okk, stride_okp, stride_okh, stride_okd,
    stride_ovb, stride_ovk, stride_ovp, stride_ovh, stride_ovd,
    stride_dob, stride_dok, stride_dot, stride_doh, stride_dod,
    stride_mask_b, stride_mask_t, stride_mask_s,
    K, T, S, P, row_blocks, scale, logit_scale, keep_scale, dropout_threshold,
    HAS_LENGTHS: tl.constexpr, HAS_PACKED: tl.constexpr, HAS_MASK: tl.constexpr, OWN_CAUSAL: tl.constexpr, HAS_OWN: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    EXACT: tl.constexpr, HEADS: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
    OWN_ROPE: tl.constexpr,
):
    """dq [B,K,T,H,D], contiguous; one program per tile of rows."""
    block, h, b = _program_coordinates(row_blocks, HEADS)
    row_count = K * T * G
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < row_count
    h64 = h.to(tl.int64)
    q_tile = _load_rows(
        q + b * stride_qb + h64 * G * stride_qh, rows, row_mask, T, stride_qk, stride_qt, stride_qh, stride_qd, G, D,
        BLOCK_D,
    )
    dout_tile = _load_rows(
        dout + b * stride_dob + h64 * G * stride_doh, rows, row_mask, T, stride_dok, stride_dot, stride_doh,
        stride_dod, G, D, BLOCK_D,
    )
    index = _row_index(b, h, rows, K, T, HEADS, G)
    row_lse, correction, row_delta = _row_statistics(lse, lse_correction, delta, index, row_mask, EXACT)
    seed = tl.load(seed_pointer) if HAS_DROPOUT else 0
    dq_acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    key_start, key_end = _shared_range(lengths, cu_seqlens, b, S, HAS_LENGTHS, HAS_PACKED)
    dq_acc = _accumulate_dq(
        dq_acc, q_tile, dout_tile, row_lse, correction, row_delta, rows, row_mask, b, h,
        k + b * stride_kb + h64 * stride_kh, v + b * stride_vb + h64 * stride_vh, key_start, key_end,
        0, stride_ks, stride_kh, stride_kd, 0, stride_vs, stride_vd, mask + b * stride_mask_b, stride_mask_t, stride_mask_s,
        K, T, S, P, logit_scale, keep_scale, seed, dropout_threshold, q,
        False, None, False, HAS_MASK, HAS_DROPOUT, EXACT, HEADS, G, D, BLOCK_D, BLOCK_N, PRECISION,
    )
    if HAS_OWN:
        own_start, own_end = _own_key_range(
            block * BLOCK_M, tl.minimum(block * BLOCK_M + BLOCK_M, row_count) - 1, T, P, G
        )
        dq_acc = _accumulate_dq(
            dq_acc, q_tile, dout_tile, row_lse, correction, row_delta, rows, row_mask, b, h,
            own_k + b * stride_okb + h64 * stride_okh, own_v + b * stride_ovb + h64 * stride_ovh, own_start, own_end,
            stride_okk, stride_okp, stride_okh, stride_okd, stride_ovk, stride_ovp, stride_ovd, mask, 0, 0,
            K, T, S, P, logit_scale, keep_scale, seed, dropout_threshold, own_positions,
            True, OWN_ROPE, OWN_CAUSAL, False, HAS_DROPOUT, EXACT, HEADS, G, D, BLOCK_D, BLOCK_P, PRECISION,
        )
    _store_rows(dq, dq_acc * scale, b, h, rows, row_mask, K, T, HEADS, G, D, BLOCK_D)


@triton.jit
def _broadcast_attention_bwd_dkdv_kernel(
    q, k, v, lengths, cu_seqlens, mask, seed_pointer, own_positions, dout, lse, lse_correction, delta, dk, dv,
    stride_qb, stride_qk, stride_qt, stride_qh, stride_qd,
    stride_kb, stride_kk, stride_ks, stride_kh, stride_kd,
    stride_vb, stride_vk, stride_vs, stride_vh, stride_vd,
    stride_dob, stride_dok, stride_dot, stride_doh, stride_dod,
    stride_mask_b, stride_mask_t, stride_mask_s,
    B, K, T, S, P, key_count, key_blocks, search_steps, scale, logit_scale, keep_scale, dropout_threshold,
    OWN: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_PACKED: tl.constexpr, HAS_MASK: tl.constexpr, OWN_CAUSAL: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    EXACT: tl.constexpr, HEADS: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, OWN_ROPE: tl.constexpr,
):
    """dk, dv of one segment, contiguous ([B,S,Hkv,D], or [B,K,P,Hkv,D] with OWN); one program per block of keys. Packed:
    [N,Hkv,D], and what belongs to no condition is left alone."""
    block, h, b = _program_coordinates(key_blocks, HEADS)
    if HAS_PACKED:
        condition, block = _packed_block(block, cu_seqlens, B, search_steps, BLOCK_N)
        b = condition.to(tl.int64)
    key_start, key_end = _shared_range(lengths, cu_seqlens, b, key_count, HAS_LENGTHS, HAS_PACKED)
    first_key = key_start + block * BLOCK_N
    h64 = h.to(tl.int64)
    row_count = K * T * G
    keys = first_key + tl.arange(0, BLOCK_N)
    key_mask = (keys >= key_start) & (keys < key_end) if HAS_PACKED else keys < key_end
    k_tile = _load_turned_keys(
        k + b * stride_kb + h64 * stride_kh, keys, key_mask, b, h, K, P, own_positions, stride_kk, stride_ks, stride_kh,
        stride_kd, OWN, OWN_ROPE, D, BLOCK_D,
    )
    v_tile = _load_keys(
        v + b * stride_vb + h64 * stride_vh, keys, key_mask, P, stride_vk, stride_vs, stride_vd, OWN, D, BLOCK_D,
    )
    seed = tl.load(seed_pointer) if HAS_DROPOUT else 0
    if OWN:
        last_key = tl.minimum(block * BLOCK_N + BLOCK_N, key_count) - 1
        row_start = ((block * BLOCK_N) // P) * (T * G)
        row_end = (last_key // P + 1) * (T * G)
    else:
        row_start = 0
        if HAS_PACKED:
            row_end = tl.where((block >= 0) & (first_key < key_end), row_count, 0)
        else:
            row_end = tl.where(block * BLOCK_N < key_end, row_count, 0)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    q_base = q + b * stride_qb + h64 * G * stride_qh
    dout_base = dout + b * stride_dob + h64 * G * stride_doh
    for start in tl.range(row_start, row_end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        row_mask = rows < row_end
        q_tile = _load_rows(q_base, rows, row_mask, T, stride_qk, stride_qt, stride_qh, stride_qd, G, D, BLOCK_D)
        dout_tile = _load_rows(
            dout_base, rows, row_mask, T, stride_dok, stride_dot, stride_doh, stride_dod, G, D, BLOCK_D
        )
        index = _row_index(b, h, rows, K, T, HEADS, G)
        row_lse, correction, row_delta = _row_statistics(lse, lse_correction, delta, index, row_mask, EXACT)
        logits = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * logit_scale
        visible = _visible(
            rows, row_mask, keys, key_mask, T, P, mask + b * stride_mask_b, stride_mask_t, stride_mask_s, OWN,
            OWN_CAUSAL, HAS_MASK, G,
        )
        p = _exponential(tl.where(visible, logits, float("-inf")) - row_lse[:, None] - correction[:, None], EXACT)
        dp = tl.dot(dout_tile, tl.trans(v_tile), input_precision=PRECISION) * keep_scale
        p_kept = p
        if HAS_DROPOUT:
            kept = _kept(seed, dropout_threshold, b, h, rows, keys, K, T, S, P, OWN, G, HEADS)
            p_kept = tl.where(kept, p, 0.0)
            dp = tl.where(kept, dp, 0.0)
        dv_acc = tl.dot(tl.trans(p_kept.to(dout_tile.dtype)), dout_tile, dv_acc, input_precision=PRECISION)
        ds = p * (dp - row_delta[:, None])
        dk_acc = tl.dot(tl.trans(ds.to(q_tile.dtype)), q_tile, dk_acc, input_precision=PRECISION)
    d = tl.arange(0, BLOCK_D)
    if HAS_PACKED:
        offsets = (keys.to(tl.int64) * HEADS + h)[:, None] * D + d[None, :]
        store_mask = key_mask[:, None] & (d < D)[None, :]
    else:
        offsets = ((b * key_count + keys) * HEADS + h)[:, None] * D + d[None, :]
        store_mask = (keys < key_count)[:, None] & (d < D)[None, :]
    tl.store(dk + offsets, (dk_acc * scale).to(dk.dtype.element_ty), mask=store_mask)
    tl.store(dv + offsets, (dv_acc * keep_scale).to(dv.dtype.element_ty), mask=store_mask)
