"""Triton kernels of broadcast linear: a linear layer whose input is part per sample, part per condition.

Rows. Row ``n = (b * K + k) * M + m`` is position m of sample k of condition b; its condition is ``n // (K * M)``.

Forward: ``y[n] = act(x[n] (+ g[b])) W^T + row[b]``. The activation, and the addition of the condition's part when there
is one, are done on a tile of x on its way into the product; ``row`` is a bias (the same for every condition) or what
the condition's own product with its columns of the weight gave, computed once per condition by the same kernel.

Backward: ``dx = (dy W) * act'(x (+ g[b]))`` with act' recomputed from x; ``dW = dy^T act(x (+ g[b]))`` with act
recomputed, split over chunks of rows whose partial sums are float32 and are added in the order of the chunks; sums over
the samples of a condition in the order of the rows. No atomics: the same bits on every run. Accumulators are float32.
"""

import triton
import triton.language as tl


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    """act(z), float32; act(0) = 0, so what masks fill with 0 stays 0."""
    if ACTIVATION == "silu":
        z = z / (1.0 + tl.exp(-z))
    elif ACTIVATION == "mish":
        # tanh(softplus(z)) = w / (w + 2) with w = e^z (e^z + 2); beyond 20 it is 1 in float32
        e = tl.exp(tl.minimum(z, 20.0))
        w = e * (e + 2.0)
        z = z * (w / (w + 2.0))
    return z


@triton.jit
def _activation_slope(z, ACTIVATION: tl.constexpr):
    """act'(z), float32."""
    if ACTIVATION == "silu":
        s = 1.0 / (1.0 + tl.exp(-z))
        return s * (1.0 + z * (1.0 - s))
    elif ACTIVATION == "mish":
        e = tl.exp(tl.minimum(z, 20.0))
        w = e * (e + 2.0)
        return w / (w + 2.0) + z * (4.0 * e * (1.0 + e) / ((w + 2.0) * (w + 2.0)))
    else:
        return z * 0.0 + 1.0


@triton.jit
def _tile_coordinates(row_blocks, column_blocks, GROUP: tl.constexpr):
    """Program id -> (row block, column block); GROUP row blocks run side by side, so that tiles stay in cache."""
    pid = tl.program_id(0)
    per_group = GROUP * column_blocks
    first = (pid // per_group) * GROUP
    size = tl.minimum(row_blocks - first, GROUP)
    inside = pid % per_group
    return first + inside % size, inside // size


@triton.jit
def _row_offsets(rows, rows_per_condition, M, stride_b, stride_k, stride_m):
    """Offsets of rows [BLOCK] into a strided [B, K, M, C], int64."""
    b = rows // rows_per_condition
    inside = rows - b * rows_per_condition
    k = inside // M
    return b.to(tl.int64) * stride_b + k.to(tl.int64) * stride_k + (inside - k * M).to(tl.int64) * stride_m


@triton.jit
def _load_input(
    x, g, x_rows, g_rows, row_mask, channels, channel_mask, stride_xc, stride_gc, HAS_G: tl.constexpr,
):
    """Rows x channels of ``x (+ g[b])``, float32, 0 outside."""
    mask = row_mask[:, None] & channel_mask[None, :]
    wide = channels.to(tl.int64)[None, :]
    z = tl.load(x + x_rows[:, None] + wide * stride_xc, mask=mask, other=0.0).to(tl.float32)
    if HAS_G:
        z += tl.load(g + g_rows[:, None] + wide * stride_gc, mask=mask, other=0.0).to(tl.float32)
    return z


@triton.jit
def _broadcast_linear_fwd_kernel(
    x, g, weight, row, y,
    stride_xb, stride_xk, stride_xm, stride_xc, stride_gb, stride_gc, stride_wo, stride_wc, stride_rb, stride_ro,
    rows_total, rows_per_condition, M, Co, Cx, row_blocks, column_blocks,
    ACTIVATION: tl.constexpr, HAS_G: tl.constexpr, HAS_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):
    """y [B,K,M,Co], contiguous; one program per tile of rows and output channels."""
    row_block, column_block = _tile_coordinates(row_blocks, column_blocks, 8)
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < rows_total
    outputs = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    output_mask = outputs < Co
    x_rows = _row_offsets(rows, rows_per_condition, M, stride_xb, stride_xk, stride_xm)
    condition = (rows // rows_per_condition).to(tl.int64)
    weight_columns = outputs.to(tl.int64) * stride_wo
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in tl.range(0, Cx, BLOCK_K):
        channels = start + tl.arange(0, BLOCK_K)
        channel_mask = channels < Cx
        z = _load_input(
            x, g, x_rows, condition * stride_gb, row_mask, channels, channel_mask, stride_xc, stride_gc, HAS_G,
        )
        w_tile = tl.load(
            weight + channels.to(tl.int64)[:, None] * stride_wc + weight_columns[None, :],
            mask=channel_mask[:, None] & output_mask[None, :], other=0.0,
        )
        acc = tl.dot(_activate(z, ACTIVATION).to(w_tile.dtype), w_tile, acc, input_precision=PRECISION)
    mask = row_mask[:, None] & output_mask[None, :]
    if HAS_ROW:
        offsets = condition[:, None] * stride_rb + outputs.to(tl.int64)[None, :] * stride_ro
        acc += tl.load(row + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + rows.to(tl.int64)[:, None] * Co + outputs[None, :], acc.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _broadcast_linear_bwd_dx_kernel(
    dy, x, g, weight, dx,
    stride_db, stride_dk, stride_dm, stride_dc, stride_xb, stride_xk, stride_xm, stride_xc, stride_gb, stride_gc,
    stride_wo, stride_wc,
    rows_total, rows_per_condition, M, Co, Cx, row_blocks, column_blocks,
    ACTIVATION: tl.constexpr, HAS_G: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):
    """dx [B,K,M,Cx], contiguous; one program per tile of rows and input channels."""
    row_block, column_block = _tile_coordinates(row_blocks, column_blocks, 8)
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < rows_total
    channels = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    channel_mask = channels < Cx
    dy_rows = _row_offsets(rows, rows_per_condition, M, stride_db, stride_dk, stride_dm)
    weight_columns = channels.to(tl.int64) * stride_wc
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in tl.range(0, Co, BLOCK_K):
        outputs = start + tl.arange(0, BLOCK_K)
        output_mask = outputs < Co
        wide = outputs.to(tl.int64)
        dy_tile = tl.load(
            dy + dy_rows[:, None] + wide[None, :] * stride_dc, mask=row_mask[:, None] & output_mask[None, :], other=0.0
        )
        w_tile = tl.load(
            weight + wide[:, None] * stride_wo + weight_columns[None, :],
            mask=output_mask[:, None] & channel_mask[None, :], other=0.0,
        )
        acc = tl.dot(dy_tile.to(w_tile.dtype), w_tile, acc, input_precision=PRECISION)
    if ACTIVATION != "":
        x_rows = _row_offsets(rows, rows_per_condition, M, stride_xb, stride_xk, stride_xm)
        condition = (rows // rows_per_condition).to(tl.int64)
        z = _load_input(
            x, g, x_rows, condition * stride_gb, row_mask, channels, channel_mask, stride_xc, stride_gc, HAS_G,
        )
        acc *= _activation_slope(z, ACTIVATION)
    tl.store(
        dx + rows.to(tl.int64)[:, None] * Cx + channels[None, :], acc.to(dx.dtype.element_ty),
        mask=row_mask[:, None] & channel_mask[None, :],
    )


@triton.jit
def _broadcast_linear_bwd_dweight_kernel(
    dy, x, g, out,
    stride_db, stride_dk, stride_dm, stride_dc, stride_xb, stride_xk, stride_xm, stride_xc, stride_gb, stride_gc,
    stride_os, stride_oo, stride_oc,
    rows_total, rows_per_condition, M, Co, Cx, chunk, row_blocks, column_blocks,
    ACTIVATION: tl.constexpr, HAS_G: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):
    """One program per tile of dW [Co,Cx] and chunk of rows; chunk s writes to ``out [s, Co, Cx]``."""
    output_block, channel_block = _tile_coordinates(row_blocks, column_blocks, 8)
    split = tl.program_id(1)
    outputs = output_block * BLOCK_M + tl.arange(0, BLOCK_M)
    output_mask = outputs < Co
    channels = channel_block * BLOCK_N + tl.arange(0, BLOCK_N)
    channel_mask = channels < Cx
    dy_columns = outputs.to(tl.int64)[:, None] * stride_dc
    first = split * chunk
    last = tl.minimum(first + chunk, rows_total)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in tl.range(first, last, BLOCK_K):
        rows = start + tl.arange(0, BLOCK_K)
        row_mask = rows < last
        dy_rows = _row_offsets(rows, rows_per_condition, M, stride_db, stride_dk, stride_dm)
        dy_tile = tl.load(
            dy + dy_columns + dy_rows[None, :], mask=output_mask[:, None] & row_mask[None, :], other=0.0
        )
        x_rows = _row_offsets(rows, rows_per_condition, M, stride_xb, stride_xk, stride_xm)
        condition = (rows // rows_per_condition).to(tl.int64)
        z = _load_input(
            x, g, x_rows, condition * stride_gb, row_mask, channels, channel_mask, stride_xc, stride_gc, HAS_G,
        )
        kind = x.dtype.element_ty
        acc = tl.dot(dy_tile.to(kind), _activate(z, ACTIVATION).to(kind), acc, input_precision=PRECISION)
    offsets = outputs.to(tl.int64)[:, None] * stride_oo + channels.to(tl.int64)[None, :] * stride_oc
    tl.store(
        out + split.to(tl.int64) * stride_os + offsets, acc.to(out.dtype.element_ty),
        mask=output_mask[:, None] & channel_mask[None, :],
    )


@triton.jit
def _broadcast_linear_bwd_condition_kernel(
    values, out, stride_b, stride_k, stride_m, stride_c, rows_per_condition, M, C, column_blocks,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """out [B,C] = the sum of values [B,K,M,C] over K and M; one program per condition and block of channels."""
    pid = tl.program_id(0)
    b = (pid // column_blocks).to(tl.int64)
    channels = (pid % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    channel_mask = channels < C
    columns = b * stride_b + channels.to(tl.int64) * stride_c
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in tl.range(0, rows_per_condition, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        offsets = _row_offsets(rows, rows_per_condition, M, 0, stride_k, stride_m)
        mask = (rows < rows_per_condition)[:, None] & channel_mask[None, :]
        acc += tl.load(values + columns[None, :] + offsets[:, None], mask=mask, other=0.0).to(tl.float32)
    tl.store(out + b * C + channels, tl.sum(acc, 0).to(out.dtype.element_ty), mask=channel_mask)


@triton.jit
def _broadcast_linear_bwd_sum_kernel(
    partials, out, count, size, C, stride_or, stride_oc, BLOCK: tl.constexpr,
):
    """out [R,C], strided, = the sum of the contiguous partials [count,R,C], in their order; size is R * C."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    position = index
    for _ in tl.range(0, count):
        acc += tl.load(partials + position, mask=mask, other=0.0)
        position += size
    tl.store(out + (index // C) * stride_or + (index % C) * stride_oc, acc.to(out.dtype.element_ty), mask=mask)
