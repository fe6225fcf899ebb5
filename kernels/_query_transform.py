"""Triton code between a query in memory and its product with a key: norm over a head's channels, then rotary.

``ROPE`` is None or the tuple (axes, rotary_dim, half, full_width, rate_high, rate_low): pair i of a block of channels
turns by ``position * 2 ** -(i * (rate_high + rate_low))``, with ``rate_high`` short enough for an exact product with i.
``NORM`` is None or the tuple (kind, has_weight, has_bias).

A tile [M, BLOCK_D] on its way to a product keeps its channels in order, so each channel's partner is loaded beside it.
The passes over whole tensors hold a tile of first and a tile of second channels of each pair instead: every element
then belongs to one thread, which makes them safe in place.
"""

import triton
import triton.language as tl

TWO_OVER_PI = tl.constexpr(0.6366197723675814)
# pi / 2 in three pieces; a count of quarter turns up to 2^13 has an exact product with each of the first two.
HALF_PI_1 = tl.constexpr(1.5703125)
HALF_PI_2 = tl.constexpr(0.0004837512969970703)
HALF_PI_3 = tl.constexpr(7.549789954891882e-08)


@triton.jit
def _sin_cos(angle):
    """Sine and cosine, float32, for magnitudes up to 10,000. The library's own reduce larger angles through an array in
    local memory, which every call pays for."""
    turns = tl.floor(angle * TWO_OVER_PI + 0.5)
    r = ((angle - turns * HALF_PI_1) - turns * HALF_PI_2) - turns * HALF_PI_3
    square = r * r
    # Taylor: what is left out is below 2e-9 on |r| <= pi / 4.
    sine = r + r * square * (
        -1.6666666666666666e-1 + square * (8.333333333333333e-3 + square * (-1.984126984126984e-4 + square * 2.755731922398589e-6))
    )
    cosine = 1.0 - 0.5 * square + square * square * (
        4.1666666666666664e-2 + square * (-1.388888888888889e-3 + square * (2.48015873015873e-5 - square * 2.755731922398589e-7))
    )
    quarter = turns.to(tl.int32)
    odd = (quarter & 1) != 0
    sin, cos = tl.where(odd, cosine, sine), tl.where(odd, sine, cosine)
    return tl.where((quarter & 2) != 0, -sin, sin), tl.where(((quarter + 1) & 2) != 0, -cos, cos)


@triton.jit
def _frequency(i, ROPE: tl.constexpr):
    """base ** (-2 i / w) for the pairs i, to about one unit in the last place."""
    pair = i.to(tl.float32)
    exponent = pair * ROPE[4]
    whole = tl.floor(exponent + 0.5)
    x = -((exponent - whole) + pair * ROPE[5]) * 0.6931471805599453
    power = 1.0 + x * (1.0 + x * (0.5 + x * (1.6666666666666666e-1 + x * (4.1666666666666664e-2 + x * (
        8.333333333333333e-3 + x * (1.388888888888889e-3 + x * 1.984126984126984e-4))))))
    return power * ((127 - whole.to(tl.int32)) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _channels(c, ROPE: tl.constexpr):
    """Channels c -> axis, frequency, sign of the sine (0 where nothing turns), partner."""
    BLOCK: tl.constexpr = ROPE[1] // ROPE[0]
    within = c % BLOCK
    if ROPE[2]:
        i = within % (BLOCK // 2)
        is_first = within < BLOCK // 2
        partner = tl.where(is_first, c + BLOCK // 2, c - BLOCK // 2)
    else:
        i = within // 2
        is_first = within % 2 == 0
        partner = c ^ 1
    turns = c < ROPE[1]
    sign = tl.where(turns, tl.where(is_first, -1.0, 1.0), 0.0)
    return c // BLOCK, tl.where(turns, _frequency(i, ROPE), 0.0), sign, tl.where(turns, partner, c)


@triton.jit
def _place(positions, token, token_mask, axis, ROPE: tl.constexpr):
    """The coordinate of tokens [M] that channels (or pairs) [C] turn by: [M, C], or [M, 1] for one axis."""
    if ROPE[0] == 1:
        place = tl.load(positions + token, mask=token_mask, other=0).to(tl.float32)[:, None]
    else:
        x = tl.load(positions + token * 3, mask=token_mask, other=0).to(tl.float32)[:, None]
        y = tl.load(positions + token * 3 + 1, mask=token_mask, other=0).to(tl.float32)[:, None]
        z = tl.load(positions + token * 3 + 2, mask=token_mask, other=0).to(tl.float32)[:, None]
        place = tl.where((axis == 0)[None, :], x, tl.where((axis == 1)[None, :], y, z))
    return place


@triton.jit
def _affine(x, channel, channel_mask, weight, bias, NORM: tl.constexpr):
    """x [M, C] times the weight plus the bias of its channels."""
    if NORM[1]:
        x = x * tl.load(weight + channel, mask=channel_mask, other=0.0).to(tl.float32)[None, :]
    if NORM[2]:
        x = x + tl.load(bias + channel, mask=channel_mask, other=0.0).to(tl.float32)[None, :]
    return x


@triton.jit
def _transformed_tile(
    base, offset, row_mask, token, h, positions, weight, bias, eps, stride_h, stride_d,
    ROPE: tl.constexpr, NORM: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Heads at ``base + offset`` [M] -> [M, BLOCK_D] in their dtype, normed, then turned to the place of ``token``."""
    d = tl.arange(0, BLOCK_D)
    mask = row_mask[:, None] & (d < D)[None, :]
    tile = tl.load(base + offset[:, None] + d.to(tl.int64)[None, :] * stride_d, mask=mask, other=0.0)
    x = tile.to(tl.float32)
    mean = tl.zeros_like(offset).to(tl.float32)
    rstd = mean
    if NORM is not None:
        if NORM[0] == "layer":
            mean = tl.sum(x, 1) / D
        centred = tl.where((d < D)[None, :], x - mean[:, None], 0.0)
        rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 1) / D + eps)
        x = _affine(centred * rstd[:, None], d, d < D, weight, bias, NORM)
    if ROPE is not None:
        first_channel = h * D if ROPE[3] else 0
        axis, frequency, sign, partner = _channels(first_channel + d, ROPE)
        if ROPE[3]:
            partner_offset = (partner // D - h).to(tl.int64) * stride_h + (partner % D).to(tl.int64) * stride_d
        else:
            partner_offset = partner.to(tl.int64) * stride_d
        other = tl.load(base + offset[:, None] + partner_offset[None, :], mask=mask, other=0.0).to(tl.float32)
        if NORM is not None:
            other = _affine((other - mean[:, None]) * rstd[:, None], partner, d < D, weight, bias, NORM)
        sin, cos = _sin_cos(_place(positions, token, row_mask, axis, ROPE) * frequency[None, :])
        x = x * cos + other * (sin * sign[None, :])
    return x.to(tile.dtype)


@triton.jit
def _pairs(j, ROPE: tl.constexpr):
    """Pairs j -> first channel, second channel, axis, frequency. Channels that do not turn pair up with a neighbour."""
    if ROPE is None:
        first, second = 2 * j, 2 * j + 1
        axis, frequency = j * 0, j.to(tl.float32) * 0.0
    else:
        HALF: tl.constexpr = ROPE[1] // ROPE[0] // 2
        turns = j < ROPE[1] // 2
        axis = j // HALF
        i = j % HALF
        frequency = tl.where(turns, _frequency(i, ROPE), 0.0)
        if ROPE[2]:
            first = tl.where(turns, axis * (2 * HALF) + i, 2 * j)
            second = tl.where(turns, first + HALF, 2 * j + 1)
        else:
            first, second = 2 * j, 2 * j + 1
    return first, second, axis, frequency


@triton.jit
def _head_offset(
    row, K, T, stride_b, stride_k, stride_t, stride_h, ROWS_PER_TOKEN: tl.constexpr,
):
    """Offset of rows int64 [M], a row being a head, or a token where ROWS_PER_TOKEN is 1; and their tokens."""
    token = row // ROWS_PER_TOKEN
    offset = (token // T // K) * stride_b + (token // T % K) * stride_k + (token % T) * stride_t
    return offset + (row % ROWS_PER_TOKEN) * stride_h, token


@triton.jit
def _norm_pair(first, second, mask_first, mask_second, eps, D: tl.constexpr, NORM: tl.constexpr):
    """The two halves of rows, normed without weight and bias; and 1 / deviation [M]."""
    mean = tl.sum(first + second, 1) / D if NORM[0] == "layer" else tl.sum(first * 0.0, 1)
    first = tl.where(mask_first, first - mean[:, None], 0.0)
    second = tl.where(mask_second, second - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(first * first + second * second, 1) / D + eps)
    # Rows outside are 0 / 0 without an eps, and must not reach the sums over rows.
    return tl.where(mask_first, first * rstd[:, None], 0.0), tl.where(mask_second, second * rstd[:, None], 0.0), rstd


@triton.jit
def _broadcast_attention_transform_kernel(
    x, positions, weight, bias, y,
    stride_b, stride_k, stride_t, stride_h, stride_d,
    K, T, row_count, eps,
    ROPE: tl.constexpr, NORM: tl.constexpr, H: tl.constexpr, D: tl.constexpr, ROWS_PER_TOKEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_PAIRS: tl.constexpr,
):
    """y [B,K,T,H,D] = x normed, then turned; contiguous."""
    WIDTH: tl.constexpr = H * D // ROWS_PER_TOKEN
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = row < row_count
    first, second, axis, frequency = _pairs(tl.arange(0, BLOCK_PAIRS), ROPE)
    offset, token = _head_offset(row, K, T, stride_b, stride_k, stride_t, stride_h, ROWS_PER_TOKEN)
    mask_a = row_mask[:, None] & (first < WIDTH)[None, :]
    mask_b = row_mask[:, None] & (second < WIDTH)[None, :]
    # With a row for each head, channel // D is 0.
    offset_a = (first // D).to(tl.int64) * stride_h + (first % D).to(tl.int64) * stride_d
    offset_b = (second // D).to(tl.int64) * stride_h + (second % D).to(tl.int64) * stride_d
    a = tl.load(x + offset[:, None] + offset_a[None, :], mask=mask_a, other=0.0).to(tl.float32)
    b = tl.load(x + offset[:, None] + offset_b[None, :], mask=mask_b, other=0.0).to(tl.float32)
    if NORM is not None:
        a, b, _ = _norm_pair(a, b, mask_a, mask_b, eps, D, NORM)
        a = _affine(a, first, first < D, weight, bias, NORM)
        b = _affine(b, second, second < D, weight, bias, NORM)
    if ROPE is not None:
        sin, cos = _sin_cos(_place(positions, token, row_mask, axis, ROPE) * frequency[None, :])
        a, b = a * cos - b * sin, a * sin + b * cos
    out = row[:, None] * WIDTH
    tl.store(y + out + first[None, :], a.to(y.dtype.element_ty), mask=mask_a)
    tl.store(y + out + second[None, :], b.to(y.dtype.element_ty), mask=mask_b)


@triton.jit
def _broadcast_attention_bwd_transform_kernel(
    x, positions, weight, gradient, partials,
    stride_b, stride_k, stride_t, stride_h, stride_d,
    K, T, row_count, blocks, eps,
    ROPE: tl.constexpr, NORM: tl.constexpr, H: tl.constexpr, D: tl.constexpr, ROWS_PER_TOKEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_PAIRS: tl.constexpr,
):
    """From the gradient of the transformed x [B,K,T,H,D] to that of x, in place; contiguous.

    ``partials`` [programs, 2, D]: each program's sums of the gradients of weight and bias over its blocks of rows.
    """
    WIDTH: tl.constexpr = H * D // ROWS_PER_TOKEN
    first, second, axis, frequency = _pairs(tl.arange(0, BLOCK_PAIRS), ROPE)
    weight_a = tl.zeros([BLOCK_PAIRS], dtype=tl.float32)
    weight_b, bias_a, bias_b = weight_a, weight_a, weight_a
    for block in tl.range(tl.program_id(0), blocks, tl.num_programs(0)):
        row = (tl.zeros([BLOCK_ROWS], dtype=tl.int64) + block) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        row_mask = row < row_count
        mask_a = row_mask[:, None] & (first < WIDTH)[None, :]
        mask_b = row_mask[:, None] & (second < WIDTH)[None, :]
        place_a = gradient + row[:, None] * WIDTH + first[None, :]
        place_b = gradient + row[:, None] * WIDTH + second[None, :]
        da = tl.load(place_a, mask=mask_a, other=0.0).to(tl.float32)
        db = tl.load(place_b, mask=mask_b, other=0.0).to(tl.float32)
        offset, token = _head_offset(row, K, T, stride_b, stride_k, stride_t, stride_h, ROWS_PER_TOKEN)
        if ROPE is not None:
            sin, cos = _sin_cos(_place(positions, token, row_mask, axis, ROPE) * frequency[None, :])
            da, db = da * cos + db * sin, db * cos - da * sin
        if NORM is not None:
            a = tl.load(x + offset[:, None] + first[None, :] * stride_d, mask=mask_a, other=0.0).to(tl.float32)
            b = tl.load(x + offset[:, None] + second[None, :] * stride_d, mask=mask_b, other=0.0).to(tl.float32)
            a, b, rstd = _norm_pair(a, b, mask_a, mask_b, eps, D, NORM)
            weight_a += tl.sum(da * a, 0)
            weight_b += tl.sum(db * b, 0)
            bias_a += tl.sum(da, 0)
            bias_b += tl.sum(db, 0)
            if NORM[1]:
                da = da * tl.load(weight + first, mask=first < D, other=0.0).to(tl.float32)[None, :]
                db = db * tl.load(weight + second, mask=second < D, other=0.0).to(tl.float32)[None, :]
            along = tl.sum(da * a + db * b, 1) / D
            mean = tl.sum(da + db, 1) / D if NORM[0] == "layer" else along * 0.0
            da = (da - mean[:, None] - a * along[:, None]) * rstd[:, None]
            db = (db - mean[:, None] - b * along[:, None]) * rstd[:, None]
        tl.store(place_a, da.to(gradient.dtype.element_ty), mask=mask_a)
        tl.store(place_b, db.to(gradient.dtype.element_ty), mask=mask_b)
    if NORM is not None:
        part = partials + tl.program_id(0).to(tl.int64) * (2 * D)
        tl.store(part + first, weight_a, mask=first < D)
        tl.store(part + second, weight_b, mask=second < D)
        tl.store(part + D + first, bias_a, mask=first < D)
        tl.store(part + D + second, bias_b, mask=second < D)
