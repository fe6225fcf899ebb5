"""Triton kernel of Level-2 noise: times, normals, noisy samples and targets in one pass over [B, K, T, A].

The counters of the random stream are those in ``minidiff_fast/ops/level2_noise.py``, the arithmetic of the normals is
that of ``minidiff_fast/ops/box_muller.py``, operation by operation: launched with ``enable_fp_fusion=False``, so that
no product is fused into a sum, the kernel gives the bits of the definition. A program owns a tile of rows (samples) by
blocks of four elements (one Philox call each); the programs of a row's first elements write its time.
"""

import triton
import triton.language as tl

NEAR_ONE = tl.constexpr(1257966796)
SQRT_2 = tl.constexpr(1.41421354)
LN2_HIGH = tl.constexpr(0.693359375)
LN2_LOW = tl.constexpr(-2.12194442e-4)
RADIANS = tl.constexpr(1.46291812e-9)
TWO_TO_MINUS_32 = tl.constexpr(2.0**-32)
TWO_TO_MINUS_24 = tl.constexpr(2.0**-24)
TIMESTEP_TAG = tl.constexpr(1)
NOISE_TAG = tl.constexpr(2)


@triton.jit
def _radius(word):
    """sqrt(-2 ln u), u = 1 - word / 2^32."""
    near_one = word < NEAR_ONE
    bits = ((word ^ 0xFFFFFFFF) + 1).to(tl.float32).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 159
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    high = mantissa > SQRT_2
    mantissa = tl.where(high, mantissa * 0.5, mantissa)
    exponent = tl.where(near_one, 0, exponent + high.to(tl.int32)).to(tl.float32)
    f = tl.where(near_one, word.to(tl.float32) * -TWO_TO_MINUS_32, mantissa - 1.0)
    square = f * f
    p = -0.076344974 * f + 0.12761578
    p = p * f + -0.131601825
    p = p * f + 0.142017573
    p = p * f + -0.16623357
    p = p * f + 0.200012267
    p = p * f + -0.250008196
    p = p * f + 0.333333313
    log = square * f * p
    log = log + exponent * LN2_LOW
    log = log - square * 0.5
    log = log + f
    log = log + exponent * LN2_HIGH
    return tl.sqrt_rn(log * -2.0)


@triton.jit
def _normals(first, second):
    """Two standard normals for two 32-bit words."""
    radius = _radius(first)
    quarter = (second + 0x20000000) >> 30
    g = (second - (quarter << 30)).to(tl.int32, bitcast=True).to(tl.float32) * RADIANS
    square = g * g
    p = -1.9515284e-4 * square + 8.33216e-3
    p = p * square + -0.16666655
    sin = square * g * p + g
    p = 2.4438452e-5 * square + -1.3887368e-3
    p = p * square + 4.1666646e-2
    cos = square * square * p - square * 0.5 + 1.0
    odd = (quarter & 1) == 1
    x = tl.where(odd, sin, cos)
    y = tl.where(odd, cos, sin)
    x = tl.where(((quarter + 1) & 2) == 2, -x, x)
    y = tl.where((quarter & 2) == 2, -y, y)
    return radius * x, radius * y


@triton.jit
def _words(seed, block, sample, TAG: tl.constexpr):
    """The four Philox words of the counter (block, sample low, sample high, TAG)."""
    low = (sample & 0xFFFFFFFF).to(tl.uint32)
    high = ((sample >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(seed, block, low, high, low * 0 + TAG)


@triton.jit
def _level2_noise_fwd_kernel(
    x0, schedule, seed_pointer, x_out, noise_out, target_out, times_out,
    stride_b, stride_t, stride_a, rows_total, K, total, offset, size, A, steps, tiles,
    FLOW: tl.constexpr, NOISE_AT_ONE: tl.constexpr, STRATIFIED: tl.constexpr, ANTITHETIC: tl.constexpr,
    WANT_NOISE: tl.constexpr, WANT_TARGET: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr,
):
    """x, noise and target [rows, size], times [rows] for a tile of rows b * K + k."""
    pid = tl.program_id(0)
    tile = pid % tiles
    rows = (pid // tiles) * BLOCK_R + tl.arange(0, BLOCK_R)
    valid = rows < rows_total
    b = (rows // K).to(tl.int64)  # before this, 32 bits: a wide division costs more than the random words
    k = (rows % K).to(tl.int64) + offset
    sample = b * total + k
    seed = tl.load(seed_pointer)

    word, _, _, _ = _words(seed, tl.zeros([BLOCK_R], tl.uint32), sample, TIMESTEP_TAG)
    index = (word.to(tl.int64) * steps) >> 32
    if STRATIFIED:
        index = (k * steps + index) // total
    if FLOW:
        time = index.to(tl.float32) * TWO_TO_MINUS_24
        spread = time if NOISE_AT_ONE else 1.0 - time
        signal = 1.0 - spread
        tl.store(times_out + rows, time, mask=valid & (tile == 0))
    else:
        share = tl.load(schedule + index, mask=valid, other=0.0)
        signal = tl.sqrt_rn(tl.maximum(share, 0.0))
        spread = tl.sqrt_rn(1.0 - share)
        tl.store(times_out + rows, index, mask=valid & (tile == 0))

    source = sample - (k & 1) if ANTITHETIC else sample
    block = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    blocks = tl.zeros([BLOCK_R, BLOCK_Q], tl.uint32) + block.to(tl.uint32)[None, :]
    w0, w1, w2, w3 = _words(seed, blocks, source[:, None], NOISE_TAG)
    z0, z1 = _normals(w0, w1)
    z2, z3 = _normals(w2, w3)
    eps = tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))  # element 4 q + j is z_j of block q
    if ANTITHETIC:
        eps = tl.where(((k & 1) == 1)[:, None], -eps, eps)

    e = tile * (4 * BLOCK_Q) + tl.arange(0, 4 * BLOCK_Q)
    mask = valid[:, None] & (e < size)[None, :]
    within = (e // A).to(tl.int64) * stride_t + (e % A).to(tl.int64) * stride_a
    clean = tl.load(x0 + (b * stride_b)[:, None] + within[None, :], mask=mask, other=0.0).to(tl.float32)
    out = (rows.to(tl.int64) * size)[:, None] + e[None, :]
    signal = signal[:, None]
    spread = spread[:, None]
    tl.store(x_out + out, (signal * clean + spread * eps).to(x_out.dtype.element_ty), mask=mask)
    if WANT_NOISE:
        tl.store(noise_out + out, eps, mask=mask)
    if WANT_TARGET:
        velocity = eps - clean if NOISE_AT_ONE else clean - eps
        target = velocity if FLOW else signal * eps - spread * clean
        tl.store(target_out + out, target, mask=mask)
