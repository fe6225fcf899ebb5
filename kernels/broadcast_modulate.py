"""Triton kernels of broadcast modulation: norm, activation, scale and shift, gate and residual in one pass.

Every tensor of x's size is read as ``[B, K, T, C]`` with four strides, so both layouts are the same kernel. A tile is
``[rows, channels]`` in float32. Rows are those of a span: the T tokens of one sample (ONE_SAMPLE; row = token), or
all K * T tokens of a condition (row = sample * T + token). TOKENS is T in the first case. A norm couples the elements of a unit:

- layer, rms: the C channels of one row;
- group: the T rows and ``CHANNELS = C / num_groups`` channels of one sample (always ONE_SAMPLE).

For the other norms CHANNELS is C and there is one group. WHOLE says that one tile holds whole units: x then is read
once. Otherwise the forward reads it three times (mean, centred variance, output), mostly from cache, and the backward
takes the two sums that couple a unit from a kernel of their own. That kernel exists because a program that adds up
the gradients of channels wants few channels and many rows, while those sums want all channels of a row: only where
both fit into one tile is a second pass over x and dy avoided, and that is the usual case.

Backward, with ``xhat`` the normalised x, ``n = xhat * weight + bias`` and ``du = gate * dy``:
at the norm ``ds = du, dm = du * act(n), dn = du * m * act'(n)``; at the output, with ``z = m * n + s``,
``ds = du * act'(z), dm = ds * n, dn = ds * m``. Then ``dgate = dy * u``, ``dweight = dn * xhat``, ``dbias = dn``,
``dxhat = dn * weight`` and ``dx = rstd * (dxhat - mean(dxhat) - xhat * mean(dxhat * xhat))``, means over the unit, the
first of them 0 for rms.

One program adds up the parameter gradients of a block of channels over a chunk of a condition's rows, in registers
and in a fixed order: no atomics, the same bits on every run. The chunks of a condition are added afterwards.
"""

import triton
import triton.language as tl


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    """act(z) and its derivative, from exponentials of -|z| and sums of positive terms: no overflow, no cancellation.

    mish(z) = z tanh(log(1 + e^z)), and tanh(log(1 + e^z)) = (e^2z + 2 e^z) / (e^2z + 2 e^z + 2).
    """
    if ACTIVATION == "":
        return z, tl.full(z.shape, 1.0, tl.float32)
    w = tl.exp(-tl.abs(z))
    positive = z > 0.0
    sigmoid = tl.where(positive, 1.0, w) / (1.0 + w)
    if ACTIVATION == "silu":
        return z * sigmoid, sigmoid * (1.0 + z * (tl.where(positive, w, 1.0) / (1.0 + w)))
    numerator = tl.where(positive, 1.0 + 2.0 * w, w * (w + 2.0))
    missing = tl.where(positive, 2.0 * w * w, 2.0)
    denominator = numerator + missing
    tanh = numerator / denominator
    return z * tanh, tanh + z * ((missing / denominator) * (1.0 + tanh) * sigmoid)


@triton.jit
def _place(rows, sample, T, ONE_SAMPLE: tl.constexpr):
    """Rows of a span -> sample (a scalar when there is one), token."""
    if ONE_SAMPLE:
        return sample.to(tl.int64), rows.to(tl.int64)
    else:
        return (rows // T).to(tl.int64), (rows % T).to(tl.int64)


@triton.jit
def _offsets(
    b, sample, token, channels, stride_b, stride_k, stride_t, stride_c, ALIGN: tl.constexpr, ROWS_FIRST: tl.constexpr,
):
    """Offsets [R, C] of a tile; all strides but that of the innermost axis are multiples of ALIGN, which the compiler
    has to know to read neighbours together."""
    start = tl.multiple_of(b * stride_b, ALIGN) + tl.multiple_of(sample * stride_k, ALIGN)
    along_rows, along_channels = token * stride_t, channels.to(tl.int64) * stride_c
    if ROWS_FIRST:
        along_channels = tl.multiple_of(along_channels, ALIGN)
    else:
        along_rows = tl.multiple_of(along_rows, ALIGN)
    return (start + along_rows)[:, None] + along_channels[None, :]


@triton.jit
def _parameter(
    shared, own, b, sample, row_mask, channels, channel_mask, stride_b, own_stride_b, own_stride_k, HAS_SHARED: tl.constexpr,
    HAS_OWN: tl.constexpr, ONE_SAMPLE: tl.constexpr, BASE: tl.constexpr, PARAMETER_ALIGN: tl.constexpr,
):
    """BASE plus the condition's part plus the sample's part: [1, C], or [R, C] where rows differ in it."""
    value = tl.full([1, channels.shape[0]], BASE, tl.float32)
    if HAS_SHARED:
        value += tl.load(shared + tl.multiple_of(b * stride_b, PARAMETER_ALIGN) + channels, mask=channel_mask, other=0.0).to(tl.float32)[None, :]
    if HAS_OWN:
        start = own + tl.multiple_of(b * own_stride_b, PARAMETER_ALIGN)
        if ONE_SAMPLE:
            value += tl.load(start + tl.multiple_of(sample * own_stride_k, PARAMETER_ALIGN) + channels, mask=channel_mask, other=0.0).to(tl.float32)[None, :]
        else:
            pointers = start + tl.multiple_of(sample * own_stride_k, PARAMETER_ALIGN)[:, None] + channels[None, :]
            value = value + tl.load(pointers, mask=row_mask[:, None] & channel_mask[None, :], other=0.0).to(tl.float32)
    return value


@triton.jit
def _affine(xhat, weight, bias, channels, channel_mask, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr):
    """n = xhat * weight + bias."""
    n = xhat
    if HAS_WEIGHT:
        n = n * tl.load(weight + channels, mask=channel_mask, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        n = n + tl.load(bias + channels, mask=channel_mask, other=0.0).to(tl.float32)[None, :]
    return n


@triton.jit
def _modulation(
    shift, scale, gate, own_shift, own_scale, own_gate, b, sample, row_mask, channels, channel_mask,
    stride_shift, stride_scale, stride_gate, own_shift_b, own_shift_k, own_scale_b, own_scale_k, own_gate_b, own_gate_k,
    HAS_SHIFT: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_GATE: tl.constexpr,
    HAS_OWN_SHIFT: tl.constexpr, HAS_OWN_SCALE: tl.constexpr, HAS_OWN_GATE: tl.constexpr,
    ADALN: tl.constexpr, ONE_SAMPLE: tl.constexpr, PARAMETER_ALIGN: tl.constexpr,
):
    """s, m, g of a tile, each [1, C] or [R, C]."""
    s = _parameter(
        shift, own_shift, b, sample, row_mask, channels, channel_mask, stride_shift, own_shift_b, own_shift_k, HAS_SHIFT,
        HAS_OWN_SHIFT, ONE_SAMPLE, 0.0, PARAMETER_ALIGN,
    )
    m = _parameter(
        scale, own_scale, b, sample, row_mask, channels, channel_mask, stride_scale, own_scale_b, own_scale_k, HAS_SCALE,
        HAS_OWN_SCALE, ONE_SAMPLE, 1.0 if ADALN or not (HAS_SCALE or HAS_OWN_SCALE) else 0.0, PARAMETER_ALIGN,
    )
    g = _parameter(
        gate, own_gate, b, sample, row_mask, channels, channel_mask, stride_gate, own_gate_b, own_gate_k, HAS_GATE,
        HAS_OWN_GATE, ONE_SAMPLE, 0.0 if HAS_GATE or HAS_OWN_GATE else 1.0, PARAMETER_ALIGN,
    )
    return s, m, g


@triton.jit
def _unit_sum(tile, GROUPED: tl.constexpr):
    """Sums [R] over the unit that each row belongs to."""
    total = tl.sum(tile, 1)
    if GROUPED:
        total = tl.zeros_like(total) + tl.sum(total, 0)
    return total


@triton.jit
def _statistics_index(b, sample, token, group, K, T, G, GROUPED: tl.constexpr):
    """Where the statistics of rows are, int64 [R]: in [B, K, G] or [B, K, T]."""
    if GROUPED:
        return (b * K + sample) * G + group + token * 0
    else:
        return (b * K + sample) * T + token


@triton.jit
def _broadcast_modulate_fwd_kernel(
    x, shift, scale, gate, own_shift, own_scale, own_gate, residual, weight, bias, y, mean, rstd,
    stride_xb, stride_xk, stride_xt, stride_xc, stride_rb, stride_rk, stride_rt, stride_rc,
    stride_yb, stride_yk, stride_yt, stride_yc,
    stride_shift, stride_scale, stride_gate, own_shift_b, own_shift_k, own_scale_b, own_scale_k, own_gate_b, own_gate_k,
    K, T, G, span_rows, spans, blocks, eps,
    NORM: tl.constexpr, ACTIVATION: tl.constexpr, AT_OUTPUT: tl.constexpr, ADALN: tl.constexpr, ONE_SAMPLE: tl.constexpr,
    ALIGN: tl.constexpr, PARAMETER_ALIGN: tl.constexpr, ROWS_FIRST: tl.constexpr,
    HAS_SHIFT: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_GATE: tl.constexpr,
    HAS_OWN_SHIFT: tl.constexpr, HAS_OWN_SCALE: tl.constexpr, HAS_OWN_GATE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, WHOLE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """y like x, mean and rstd; one program per sample and group, or per block of rows of a span."""
    GROUPED: tl.constexpr = NORM == "group"
    pid = tl.program_id(0)
    block, rest = pid % blocks, pid // blocks
    span, b = rest % spans, (rest // spans).to(tl.int64)
    if GROUPED:
        first_row, last_row, first_channel, group = 0, TOKENS, block * CHANNELS, block
    else:
        first_row, last_row, first_channel, group = block * BLOCK_R, block * BLOCK_R + BLOCK_R, 0, 0
    end_row = TOKENS if ONE_SAMPLE else span_rows
    lane = tl.arange(0, BLOCK_C)
    row_lane = tl.arange(0, BLOCK_R)
    count = TOKENS * CHANNELS if GROUPED else CHANNELS

    row_mean = tl.zeros([BLOCK_R], tl.float32)
    row_rstd = tl.full([BLOCK_R], 1.0, tl.float32)
    tile = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    if WHOLE:
        rows = first_row + row_lane
        sample, token = _place(rows, span, T, ONE_SAMPLE)
        mask = (rows < end_row)[:, None] & (lane < CHANNELS)[None, :]
        tile = tl.load(x + _offsets(b, sample, token, first_channel + lane, stride_xb, stride_xk, stride_xt, stride_xc, ALIGN, ROWS_FIRST), mask=mask, other=0.0).to(tl.float32)
    if NORM != "":
        if NORM != "rms":
            if WHOLE:
                row_mean = _unit_sum(tile, GROUPED) / count
            else:
                total = tl.zeros([BLOCK_R], tl.float32)
                for r in tl.range(first_row, last_row, BLOCK_R):
                    rows = r + row_lane
                    sample, token = _place(rows, span, T, ONE_SAMPLE)
                    for c in tl.range(0, CHANNELS, BLOCK_C):
                        channels = c + lane
                        mask = (rows < end_row)[:, None] & (channels < CHANNELS)[None, :]
                        part = tl.load(x + _offsets(b, sample, token, first_channel + channels, stride_xb, stride_xk, stride_xt, stride_xc, ALIGN, ROWS_FIRST), mask=mask, other=0.0)
                        total += tl.sum(part.to(tl.float32), 1)
                row_mean = (tl.zeros_like(total) + tl.sum(total, 0) if GROUPED else total) / count
        if WHOLE:
            rows = first_row + row_lane
            mask = (rows < end_row)[:, None] & (lane < CHANNELS)[None, :]
            centred = tl.where(mask, tile - row_mean[:, None], 0.0)
            variance = _unit_sum(centred * centred, GROUPED) / count
        else:
            total = tl.zeros([BLOCK_R], tl.float32)
            for r in tl.range(first_row, last_row, BLOCK_R):
                rows = r + row_lane
                sample, token = _place(rows, span, T, ONE_SAMPLE)
                for c in tl.range(0, CHANNELS, BLOCK_C):
                    channels = c + lane
                    mask = (rows < end_row)[:, None] & (channels < CHANNELS)[None, :]
                    part = tl.load(x + _offsets(b, sample, token, first_channel + channels, stride_xb, stride_xk, stride_xt, stride_xc, ALIGN, ROWS_FIRST), mask=mask, other=0.0)
                    centred = tl.where(mask, part.to(tl.float32) - row_mean[:, None], 0.0)
                    total += tl.sum(centred * centred, 1)
            variance = (tl.zeros_like(total) + tl.sum(total, 0) if GROUPED else total) / count
        row_rstd = tl.div_rn(tl.full([BLOCK_R], 1.0, tl.float32), tl.sqrt_rn(variance + eps))
        rows = first_row + row_lane
        sample, token = _place(rows, span, T, ONE_SAMPLE)
        index = _statistics_index(b, sample, token, group, K, T, G, GROUPED)
        stored = row_lane == 0 if GROUPED else rows < end_row
        tl.store(rstd + index, row_rstd, mask=stored)
        if NORM != "rms":
            tl.store(mean + index, row_mean, mask=stored)

    for r in tl.range(first_row, last_row, BLOCK_R):
        rows = r + row_lane
        row_mask = rows < end_row
        sample, token = _place(rows, span, T, ONE_SAMPLE)
        for c in tl.range(0, CHANNELS, BLOCK_C):
            channel_mask = c + lane < CHANNELS
            channels = first_channel + c + lane
            mask = row_mask[:, None] & channel_mask[None, :]
            if WHOLE:
                xhat = (tile - row_mean[:, None]) * row_rstd[:, None]
            else:
                part = tl.load(x + _offsets(b, sample, token, channels, stride_xb, stride_xk, stride_xt, stride_xc, ALIGN, ROWS_FIRST), mask=mask, other=0.0)
                xhat = (part.to(tl.float32) - row_mean[:, None]) * row_rstd[:, None]
            s, m, g = _modulation(
                shift, scale, gate, own_shift, own_scale, own_gate, b, sample, row_mask, channels, channel_mask,
                stride_shift, stride_scale, stride_gate, own_shift_b, own_shift_k, own_scale_b, own_scale_k, own_gate_b, own_gate_k,
                HAS_SHIFT, HAS_SCALE, HAS_GATE, HAS_OWN_SHIFT, HAS_OWN_SCALE, HAS_OWN_GATE, ADALN, ONE_SAMPLE, PARAMETER_ALIGN,
            )
            n = _affine(xhat, weight, bias, channels, channel_mask, HAS_WEIGHT, HAS_BIAS)
            if AT_OUTPUT:
                u, _ = _activate(m * n + s, ACTIVATION)
            else:
                a, _ = _activate(n, ACTIVATION)
                u = m * a + s
            u = u * g
            if HAS_RESIDUAL:
                offsets = _offsets(b, sample, token, channels, stride_rb, stride_rk, stride_rt, stride_rc, ALIGN, ROWS_FIRST)
                u += tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
            offsets = _offsets(b, sample, token, channels, stride_yb, stride_yk, stride_yt, stride_yc, ALIGN, ROWS_FIRST)
            tl.store(y + offsets, u.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _gradients(
    x, dy, shift, scale, gate, own_shift, own_scale, own_gate, weight, bias, mean, rstd,
    b, sample, token, row_mask, group, channels, channel_mask,
    stride_xb, stride_xk, stride_xt, stride_xc, stride_dyb, stride_dyk, stride_dyt, stride_dyc,
    stride_shift, stride_scale, stride_gate, own_shift_b, own_shift_k, own_scale_b, own_scale_k, own_gate_b, own_gate_k,
    K, T, G,
    NORM: tl.constexpr, ACTIVATION: tl.constexpr, AT_OUTPUT: tl.constexpr, ADALN: tl.constexpr, ONE_SAMPLE: tl.constexpr,
    ALIGN: tl.constexpr, PARAMETER_ALIGN: tl.constexpr, ROWS_FIRST: tl.constexpr,
    HAS_SHIFT: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_GATE: tl.constexpr,
    HAS_OWN_SHIFT: tl.constexpr, HAS_OWN_SCALE: tl.constexpr, HAS_OWN_GATE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
):
    """ds, dm, dg, dn, dxhat, xhat [R, C] and rstd [R]; gradients are 0 outside the masks, where dy is read as 0."""
    mask = row_mask[:, None] & channel_mask[None, :]
    xhat = tl.load(x + _offsets(b, sample, token, channels, stride_xb, stride_xk, stride_xt, stride_xc, ALIGN, ROWS_FIRST), mask=mask, other=0.0).to(tl.float32)
    d = tl.load(dy + _offsets(b, sample, token, channels, stride_dyb, stride_dyk, stride_dyt, stride_dyc, ALIGN, ROWS_FIRST), mask=mask, other=0.0).to(tl.float32)
    row_rstd = tl.full(row_mask.shape, 1.0, tl.float32)
    if NORM != "":
        index = _statistics_index(b, sample, token, group, K, T, G, NORM == "group")
        row_rstd = tl.load(rstd + index, mask=row_mask, other=0.0)
        if NORM != "rms":
            xhat = xhat - tl.load(mean + index, mask=row_mask, other=0.0)[:, None]
        xhat = xhat * row_rstd[:, None]
    s, m, g = _modulation(
        shift, scale, gate, own_shift, own_scale, own_gate, b, sample, row_mask, channels, channel_mask,
        stride_shift, stride_scale, stride_gate, own_shift_b, own_shift_k, own_scale_b, own_scale_k, own_gate_b, own_gate_k,
        HAS_SHIFT, HAS_SCALE, HAS_GATE, HAS_OWN_SHIFT, HAS_OWN_SCALE, HAS_OWN_GATE, ADALN, ONE_SAMPLE, PARAMETER_ALIGN,
    )
    n = _affine(xhat, weight, bias, channels, channel_mask, HAS_WEIGHT, HAS_BIAS)
    du = d * g
    if AT_OUTPUT:
        u, slope = _activate(m * n + s, ACTIVATION)
        ds = du * slope
        dm = ds * n
        dn = ds * m
    else:
        a, slope = _activate(n, ACTIVATION)
        u = m * a + s
        ds = du
        dm = du * a
        dn = du * m * slope
    dxhat = dn
    if HAS_WEIGHT:
        dxhat = dn * tl.load(weight + channels, mask=channel_mask, other=0.0).to(tl.float32)[None, :]
    return ds, dm, d * u, dn, dxhat, xhat, row_rstd


@triton.jit
def _broadcast_modulate_bwd_sums_kernel(
    x, dy, shift, scale, gate, own_shift, own_scale, own_gate, weight, bias, mean, rstd, sums,
    stride_xb, stride_xk, stride_xt, stride_xc, stride_dyb, stride_dyk, stride_dyt, stride_dyc,
    stride_shift, stride_scale, stride_gate, own_shift_b, own_shift_k, own_scale_b, own_scale_k, own_gate_b, own_gate_k,
    K, T, G, span_rows, spans, blocks, units,
    NORM: tl.constexpr, ACTIVATION: tl.constexpr, AT_OUTPUT: tl.constexpr, ADALN: tl.constexpr, ONE_SAMPLE: tl.constexpr,
    ALIGN: tl.constexpr, PARAMETER_ALIGN: tl.constexpr, ROWS_FIRST: tl.constexpr,
    HAS_SHIFT: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_GATE: tl.constexpr,
    HAS_OWN_SHIFT: tl.constexpr, HAS_OWN_SCALE: tl.constexpr, HAS_OWN_GATE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """sums [2, units] = sum(dxhat), sum(dxhat * xhat) over each unit; programs as in the forward kernel."""
    GROUPED: tl.constexpr = NORM == "group"
    pid = tl.program_id(0)
    block, rest = pid % blocks, pid // blocks
    span, b = rest % spans, (rest // spans).to(tl.int64)
    if GROUPED:
        first_row, last_row, first_channel, group = 0, TOKENS, block * CHANNELS, block
    else:
        first_row, last_row, first_channel, group = block * BLOCK_R, block * BLOCK_R + BLOCK_R, 0, 0
    end_row = TOKENS if ONE_SAMPLE else span_rows
    lane = tl.arange(0, BLOCK_C)
    row_lane = tl.arange(0, BLOCK_R)
    total = tl.zeros([BLOCK_R], tl.float32)
    total_xhat = tl.zeros([BLOCK_R], tl.float32)
    for r in tl.range(first_row, last_row, BLOCK_R):
        rows = r + row_lane
        sample, token = _place(rows, span, T, ONE_SAMPLE)
        for c in tl.range(0, CHANNELS, BLOCK_C):
            _, _, _, _, dxhat, xhat, _ = _gradients(
                x, dy, shift, scale, gate, own_shift, own_scale, own_gate, weight, bias, mean, rstd,
                b, sample, token, rows < end_row, group, first_channel + c + lane, c + lane < CHANNELS,
                stride_xb, stride_xk, stride_xt, stride_xc, stride_dyb, stride_dyk, stride_dyt, stride_dyc,
                stride_shift, stride_scale, stride_gate, own_shift_b, own_shift_k, own_scale_b, own_scale_k, own_gate_b, own_gate_k,
                K, T, G, NORM, ACTIVATION, AT_OUTPUT, ADALN, ONE_SAMPLE, ALIGN, PARAMETER_ALIGN, ROWS_FIRST,
                HAS_SHIFT, HAS_SCALE, HAS_GATE, HAS_OWN_SHIFT, HAS_OWN_SCALE, HAS_OWN_GATE, HAS_WEIGHT, HAS_BIAS,
            )
            total += tl.sum(dxhat, 1)
            total_xhat += tl.sum(dxhat * xhat, 1)
    if GROUPED:
        total = tl.zeros_like(total) + tl.sum(total, 0)
        total_xhat = tl.zeros_like(total_xhat) + tl.sum(total_xhat, 0)
    rows = first_row + row_lane
    sample, token = _place(rows, span, T, ONE_SAMPLE)
    index = _statistics_index(b, sample, token, group, K, T, G, GROUPED)
    stored = row_lane == 0 if GROUPED else rows < end_row
    tl.store(sums + index, total, mask=stored)
    tl.store(sums + units + index, total_xhat, mask=stored)


@triton.jit
def _broadcast_modulate_bwd_kernel(
    x, dy, shift, scale, gate, own_shift, own_scale, own_gate, weight, bias, mean, rstd, sums,
    dx, dshift, dscale, dgate, down_shift, down_scale, down_gate, dweight, dbias,
    stride_xb, stride_xk, stride_xt, stride_xc, stride_dyb, stride_dyk, stride_dyt, stride_dyc,
    stride_dxb, stride_dxk, stride_dxt, stride_dxc,
    stride_shift, stride_scale, stride_gate, own_shift_b, own_shift_k, own_scale_b, own_scale_k, own_gate_b, own_gate_k,
    K, T, G, items, items_per_chunk, chunks, units,
    NORM: tl.constexpr, ACTIVATION: tl.constexpr, AT_OUTPUT: tl.constexpr, ADALN: tl.constexpr, ONE_SAMPLE: tl.constexpr,
    ALIGN: tl.constexpr, PARAMETER_ALIGN: tl.constexpr, ROWS_FIRST: tl.constexpr,
    HAS_SHIFT: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_GATE: tl.constexpr,
    HAS_OWN_SHIFT: tl.constexpr, HAS_OWN_SCALE: tl.constexpr, HAS_OWN_GATE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    NEED_X: tl.constexpr, NEED_SHIFT: tl.constexpr, NEED_SCALE: tl.constexpr, NEED_GATE: tl.constexpr,
    NEED_OWN_SHIFT: tl.constexpr, NEED_OWN_SCALE: tl.constexpr, NEED_OWN_GATE: tl.constexpr,
    NEED_WEIGHT: tl.constexpr, NEED_BIAS: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, CHANNEL_BLOCKS: tl.constexpr, WHOLE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """dx, the gradients of own parameters [B, K, C], and those of the others per chunk, float32 [B, chunks, C].

    A chunk is a run of a condition's items: samples (ONE_SAMPLE), else rows; a program owns a chunk and a block of
    channels of one group. Without ONE_SAMPLE own gradients need T = 1: then rows are samples.
    """
    GROUPED: tl.constexpr = NORM == "group"
    pid = tl.program_id(0)
    blocks = G * CHANNEL_BLOCKS
    block, rest = pid % blocks, pid // blocks
    chunk, b = rest % chunks, (rest // chunks).to(tl.int64)
    group, C = block // CHANNEL_BLOCKS, G * CHANNELS
    lane = (block % CHANNEL_BLOCKS) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = lane < CHANNELS
    channels = group * CHANNELS + lane
    first_item = chunk * items_per_chunk
    end_item = tl.minimum(first_item + items_per_chunk, items)
    count = TOKENS * CHANNELS if GROUPED else CHANNELS

    sum_s, sum_m, sum_g = tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32)
    sum_weight, sum_bias = tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32)
    spans = end_item - first_item if ONE_SAMPLE else 1
    for span in tl.range(0, spans):
        first_row = 0 if ONE_SAMPLE else first_item
        end_row = TOKENS if ONE_SAMPLE else end_item
        own_s, own_m, own_g = tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32)
        for r in tl.range(first_row, end_row, BLOCK_R):
            rows = r + tl.arange(0, BLOCK_R)
            row_mask = rows < end_row
            sample, token = _place(rows, first_item + span, T, ONE_SAMPLE)
            ds, dm, dg, dn, dxhat, xhat, row_rstd = _gradients(
                x, dy, shift, scale, gate, own_shift, own_scale, own_gate, weight, bias, mean, rstd,
                b, sample, token, row_mask, group, channels, channel_mask,
                stride_xb, stride_xk, stride_xt, stride_xc, stride_dyb, stride_dyk, stride_dyt, stride_dyc,
                stride_shift, stride_scale, stride_gate, own_shift_b, own_shift_k, own_scale_b, own_scale_k, own_gate_b, own_gate_k,
                K, T, G, NORM, ACTIVATION, AT_OUTPUT, ADALN, ONE_SAMPLE, ALIGN, PARAMETER_ALIGN, ROWS_FIRST,
                HAS_SHIFT, HAS_SCALE, HAS_GATE, HAS_OWN_SHIFT, HAS_OWN_SCALE, HAS_OWN_GATE, HAS_WEIGHT, HAS_BIAS,
            )
            if NEED_X:
                if NORM != "":
                    if WHOLE:
                        along = _unit_sum(dxhat * xhat, GROUPED)
                    else:
                        index = _statistics_index(b, sample, token, group, K, T, G, GROUPED)
                        along = tl.load(sums + units + index, mask=row_mask, other=0.0)
                    reduced = dxhat - xhat * (along / count)[:, None]
                    if NORM != "rms":
                        if WHOLE:
                            level = _unit_sum(dxhat, GROUPED)
                        else:
                            index = _statistics_index(b, sample, token, group, K, T, G, GROUPED)
                            level = tl.load(sums + index, mask=row_mask, other=0.0)
                        reduced -= (level / count)[:, None]
                    dxhat_or_dx = reduced * row_rstd[:, None]
                else:
                    dxhat_or_dx = dxhat
                offsets = _offsets(b, sample, token, channels, stride_dxb, stride_dxk, stride_dxt, stride_dxc, ALIGN, ROWS_FIRST)
                tl.store(dx + offsets, dxhat_or_dx.to(dx.dtype.element_ty), mask=row_mask[:, None] & channel_mask[None, :])
            own_s += tl.sum(ds, 0)
            own_m += tl.sum(dm, 0)
            own_g += tl.sum(dg, 0)
            if NEED_WEIGHT:
                sum_weight += tl.sum(dn * xhat, 0)
            if NEED_BIAS:
                sum_bias += tl.sum(dn, 0)
            if not ONE_SAMPLE:
                offsets = ((b * K + sample) * C)[:, None] + channels[None, :]
                mask = row_mask[:, None] & channel_mask[None, :]
                if NEED_OWN_SHIFT:
                    tl.store(down_shift + offsets, ds.to(down_shift.dtype.element_ty), mask=mask)
                if NEED_OWN_SCALE:
                    tl.store(down_scale + offsets, dm.to(down_scale.dtype.element_ty), mask=mask)
                if NEED_OWN_GATE:
                    tl.store(down_gate + offsets, dg.to(down_gate.dtype.element_ty), mask=mask)
        if ONE_SAMPLE:
            offsets = (b * K + first_item + span) * C + channels
            if NEED_OWN_SHIFT:
                tl.store(down_shift + offsets, own_s.to(down_shift.dtype.element_ty), mask=channel_mask)
            if NEED_OWN_SCALE:
                tl.store(down_scale + offsets, own_m.to(down_scale.dtype.element_ty), mask=channel_mask)
            if NEED_OWN_GATE:
                tl.store(down_gate + offsets, own_g.to(down_gate.dtype.element_ty), mask=channel_mask)
        if NEED_SHIFT:
            sum_s += own_s
        if NEED_SCALE:
            sum_m += own_m
        if NEED_GATE:
            sum_g += own_g
    offsets = (b * chunks + chunk) * C + channels
    if NEED_SHIFT:
        tl.store(dshift + offsets, sum_s, mask=channel_mask)
    if NEED_SCALE:
        tl.store(dscale + offsets, sum_m, mask=channel_mask)
    if NEED_GATE:
        tl.store(dgate + offsets, sum_g, mask=channel_mask)
    if NEED_WEIGHT:
        tl.store(dweight + offsets, sum_weight, mask=channel_mask)
    if NEED_BIAS:
        tl.store(dbias + offsets, sum_bias, mask=channel_mask)
