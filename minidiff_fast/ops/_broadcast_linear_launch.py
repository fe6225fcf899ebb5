"""Launches the Triton kernels of broadcast linear: shapes and strides in, one launch configuration per shape.

Every product is a Triton kernel, those of the conditions' own part too: a matrix product of BLAS would need the
activated input in memory and one more pass over the output for the condition's part. The float32 result of
``act(g) W_g^T + bias`` is read by the samples' product without a rounding in between.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.kernels import broadcast_linear as kernels

HIP = torch.version.hip is not None
PROGRAMS = 256
"""Programs that a launch should have where the sizes allow it: about two for each processor of a large GPU. Fixed, so
that the order of the sums, and with it every bit of the result, does not depend on the device."""
ALIGNMENT = 16
"""Elements that strides have to be multiples of for Triton to load several at once and to copy them asynchronously."""


@dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes of one kernel launch."""

    block_m: int
    """Rows of the output that a tile holds (of dW: output channels)."""
    block_n: int
    """Columns of the output that a tile holds."""
    block_k: int
    """Summands (channels, of dW: rows) that one step of the loop takes."""
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    """CUDA: registers a thread may use; None leaves it to the compiler."""


def _tile(size: int, largest: int) -> int:
    """The power of two that holds ``size``, from 16 (the least a matrix instruction takes) to ``largest``."""
    return max(16, min(largest, 1 << max(size - 1, 0).bit_length()))


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def choose_config(
    kernel: str, rows: int, columns: int, summands: int, element_size: int,
    *, aligned: bool, summed: bool, single: bool, exact: bool, hip: bool,
) -> LaunchConfig:  # fmt: skip
    """The heuristic launch configuration of an output ``[rows, columns]`` and sums of ``summands`` products.

    Args:
        kernel: ``forward``, ``dx``, ``dweight``; ``dweight`` finds its parallelism in chunks of the summands.
        rows, columns: of the output.
        summands: of each element of the output.
        element_size: bytes per element.
        aligned: every operand can be loaded in vectors; without, each element holds an address in a register.
        summed: the input is x + g, two tiles for one.
        single: a condition is one row: few rows in all, so time goes into waiting, which more warps hide.
        exact: float32 products without TF32; they run on the ordinary cores, out of registers.
        hip: ROCm: 64 KiB of shared memory.
    """
    if exact:
        return LaunchConfig(_tile(rows, 32), _tile(columns, 64), 16, num_warps=4, num_stages=1 if hip else 2)
    if not aligned:
        # Without a limit ptxas settles on fewer registers than the addresses need, and spills.
        registers = 255 if kernel == "dweight" and not hip else None
        return LaunchConfig(_tile(rows, 64), _tile(columns, 64), _tile(summands, 32), 4, 2, registers)
    block_m, block_n = _tile(rows, 128), _tile(columns, 128)
    # On ROCm the next tiles of x and g wait in registers: two of them leave room for shorter steps only.
    block_k = _tile(summands, 32 if element_size == 4 or (summed and hip) else 64)
    if kernel != "dweight":
        # Smaller tiles when there would be less than one for each processor.
        while _blocks(rows, block_m) * _blocks(columns, block_n) < PROGRAMS // 2 and max(block_m, block_n) > 64:
            block_m, block_n = (block_m // 2, block_n) if block_m > block_n else (block_m, block_n // 2)
    num_warps = 8 if single or block_m * block_n >= 128 * 128 else 4
    return LaunchConfig(block_m, block_n, block_k, num_warps, num_stages=2 if hip else 3)


def row_chunk(rows: int, tiles: int, block_k: int) -> int:
    """Rows that one chunk of dW sums: enough chunks for ``PROGRAMS`` programs over ``tiles``, none below 8 steps."""
    wanted = max(1, PROGRAMS // max(tiles, 1))
    steps = max(8, _blocks(_blocks(rows, wanted), block_k))
    return steps * block_k


def _precision(x: Tensor) -> str:
    """float32 products follow torch's own switch; the default is exact float32. ROCm: always exact."""
    tf32 = not HIP and x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def _aligned(x: Tensor) -> bool:
    """Rows of x start at multiples of ``ALIGNMENT`` elements and have no gaps."""
    return x.stride(-1) == 1 and all(
        size == 1 or stride % ALIGNMENT == 0 for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)
    )


def _columns(weight: Tensor, first: int, last: int) -> Tensor:
    """``weight[:, first:last]``; a copy where the other columns would put its rows out of alignment."""
    part = weight[:, first:last]
    return part if _aligned(part) or (last - first) % ALIGNMENT else part.contiguous()


def _config(
    kernel: str, rows: int, columns: int, summands: int,
    x: Tensor, g: Tensor | None, weight: Tensor | None = None, dy: Tensor | None = None,
) -> LaunchConfig:  # fmt: skip
    """The configuration for these operands."""
    exact = x.dtype == torch.float32 and _precision(x) == "ieee"
    aligned = all(_aligned(operand) for operand in (x, g, weight, dy) if operand is not None)
    return choose_config(
        kernel, rows, columns, summands, x.element_size(),
        aligned=aligned, summed=g is not None, single=_sizes(x)[1] == 1, exact=exact, hip=HIP,
    )  # fmt: skip


def _meta(config: LaunchConfig, x: Tensor) -> dict[str, object]:
    """The compile-time arguments that every product takes."""
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "PRECISION": _precision(x),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **({} if config.max_registers is None else {"maxnreg": config.max_registers}),
    }


def _four(x: Tensor) -> Tensor:
    """``[B, K, ..., C]`` -> ``[B, K, M, C]``, a view where the strides of the middle axes allow one."""
    batch, samples, *middle, channels = x.shape
    tokens = 1
    for size in middle:
        tokens *= size
    return x.reshape(batch, samples, tokens, channels)


def _of_conditions(x: Tensor) -> Tensor:
    """``[B, C]`` -> ``[B, 1, 1, C]``: the conditions are rows of their own."""
    return x[:, None, None]


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """All rows of ``[B, K, M, C]``, those of a condition, M."""
    batch, samples, tokens, _ = x.shape
    return batch * samples * tokens, max(1, samples * tokens), max(1, tokens)


def _condition_input(g: Tensor | None, x: Tensor) -> tuple[Tensor, int, int]:
    """A pointer and two strides to pass for g, also when there is none."""
    return (x, 0, 0) if g is None else (g, g.stride(0), g.stride(1))


def _check_sizes(x: Tensor, outputs: int) -> None:
    rows = x.numel() // max(1, x.shape[-1])
    tiles = _blocks(rows, 16) * _blocks(max(outputs, x.shape[-1]), 16)
    if rows + 1024 >= 2**31 or tiles >= 2**31:
        raise InvalidArgument(
            f"broadcast_linear: B * K * ... = {rows} rows and {tiles} tiles of 16 by 16 of the output must stay below "
            "2^31 (rows: 2^31 - 1024); run K in chunks"
        )


def _linear(
    x: Tensor,  # [B, K, M, Cx]
    g: Tensor | None,  # [B, Cx]
    weight: Tensor,  # [Co, Cx]
    row: Tensor | None,  # [B, Co], or [1, Co] for all
    y: Tensor,  # [B, K, M, Co], contiguous
    activation: str,
) -> None:
    """y = act(x (+ g)) W^T (+ row)."""
    rows, per_condition, tokens = _sizes(x)
    outputs, channels = weight.shape
    if rows * outputs == 0:
        return
    config = _config("forward", rows, outputs, channels, x, g, weight)
    row_blocks, column_blocks = _blocks(rows, config.block_m), _blocks(outputs, config.block_n)
    condition, *condition_strides = _condition_input(g, x)
    row_strides = (0, 0) if row is None else (row.stride(0) if row.shape[0] > 1 else 0, row.stride(1))
    kernels._broadcast_linear_fwd_kernel[(row_blocks * column_blocks,)](
        x, condition, weight, x if row is None else row, y,
        *x.stride(), *condition_strides, *weight.stride(), *row_strides,
        rows, per_condition, tokens, outputs, channels, row_blocks, column_blocks,
        ACTIVATION=activation, HAS_G=g is not None, HAS_ROW=row is not None, **_meta(config, x),
    )  # fmt: skip


def _input_gradient(
    dy: Tensor,  # [B, K, M, Co]
    x: Tensor,  # [B, K, M, Cx]
    g: Tensor | None,  # [B, Cx]
    weight: Tensor,  # [Co, Cx]
    dx: Tensor,  # [B, K, M, Cx], contiguous
    activation: str,
) -> None:
    """dx = (dy W) * act'(x (+ g))."""
    rows, per_condition, tokens = _sizes(x)
    outputs, channels = weight.shape
    if rows * channels == 0:
        return
    config = _config("dx", rows, channels, outputs, x, g, weight, dy)
    row_blocks, column_blocks = _blocks(rows, config.block_m), _blocks(channels, config.block_n)
    condition, *condition_strides = _condition_input(g, x)
    kernels._broadcast_linear_bwd_dx_kernel[(row_blocks * column_blocks,)](
        dy, x, condition, weight, dx,
        *dy.stride(), *x.stride(), *condition_strides, *weight.stride(),
        rows, per_condition, tokens, outputs, channels, row_blocks, column_blocks,
        ACTIVATION=activation, HAS_G=g is not None, **_meta(config, x),
    )  # fmt: skip


def _weight_gradient(
    dy: Tensor,  # [B, K, M, Co]
    x: Tensor,  # [B, K, M, Cx]
    g: Tensor | None,  # [B, Cx]
    dweight: Tensor,  # [Co, Cx], strided
    activation: str,
) -> None:
    """dW = dy^T act(x (+ g)): float32 partial sums of chunks of rows, added in their order."""
    rows, per_condition, tokens = _sizes(x)
    outputs, channels = dweight.shape
    if outputs * channels == 0:
        return
    config = _config("dweight", outputs, channels, rows, x, g, dy=dy)
    row_blocks, column_blocks = _blocks(outputs, config.block_m), _blocks(channels, config.block_n)
    chunk = row_chunk(rows, row_blocks * column_blocks, config.block_k)
    chunks = max(1, _blocks(rows, chunk))
    whole = chunks == 1
    out = dweight if whole else torch.empty(chunks, outputs, channels, dtype=torch.float32, device=x.device)
    condition, *condition_strides = _condition_input(g, x)
    kernels._broadcast_linear_bwd_dweight_kernel[(row_blocks * column_blocks, chunks)](
        dy, x, condition, out,
        *dy.stride(), *x.stride(), *condition_strides, 0 if whole else out.stride(0), *out.stride()[-2:],
        rows, per_condition, tokens, outputs, channels, chunk, row_blocks, column_blocks,
        ACTIVATION=activation, HAS_G=g is not None, **_meta(config, x),
    )  # fmt: skip
    if not whole:
        _sum_leading(out, dweight)


def _sum_conditions(values: Tensor, out: Tensor) -> None:
    """out [B, C] = the sum of values [B, K, M, C] over K and M."""
    batch, channels = out.shape
    if out.numel() == 0:
        return
    _, per_condition, tokens = _sizes(values)
    per_condition = per_condition if values.numel() else 0
    block_n = _tile(channels, 64)
    column_blocks = _blocks(channels, block_n)
    kernels._broadcast_linear_bwd_condition_kernel[(batch * column_blocks,)](
        values, out, *values.stride(), per_condition, tokens, channels, column_blocks,
        BLOCK_M=_tile(per_condition, 64), BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip


def _sum_leading(partials: Tensor, out: Tensor) -> None:
    """out [R, C], strided, = the sum of partials [count, R, C], contiguous float32."""
    block = 1024 if out.numel() >= 1024 * PROGRAMS else 256
    kernels._broadcast_linear_bwd_sum_kernel[(_blocks(out.numel(), block),)](
        partials, out, partials.shape[0], out.numel(), out.shape[1], *out.stride(), BLOCK=block, num_warps=4
    )


def launch_forward(
    x: Tensor,  # [B, K, ..., Cx]
    g: Tensor,  # [B, Cg]
    weight: Tensor,  # [Co, Cx + Cg] or [Co, C]
    bias: Tensor | None,  # [Co]
    activation: str,
    combine: str,
) -> Tensor:
    """y [B, K, ..., Co]."""
    _check_sizes(x, weight.shape[0])
    four = _four(x)
    y = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)
    row = None if bias is None else bias[None]
    with torch.cuda.device_of(x):
        if combine == "sum":
            _linear(four, g, weight, row, _four(y), activation)
            return y
        split = x.shape[-1]
        of_condition = torch.empty(g.shape[0], weight.shape[0], dtype=torch.float32, device=x.device)
        if y.numel():
            _linear(
                _of_conditions(g),
                None,
                _columns(weight, split, weight.shape[1]),
                row,
                _of_conditions(of_condition),
                activation,
            )
        _linear(four, None, _columns(weight, 0, split), of_condition, _four(y), activation)
    return y


def launch_backward(
    dy: Tensor,  # [B, K, ..., Co]
    x: Tensor,  # [B, K, ..., Cx]
    g: Tensor,  # [B, Cg]
    weight: Tensor,  # [Co, Cx + Cg] or [Co, C]
    activation: str,
    combine: str,
    *,
    need_x: bool,
    need_g: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dg, dweight, dbias; empty where not needed."""
    _check_sizes(x, weight.shape[0])
    outputs, split = weight.shape[0], x.shape[-1]
    summed = combine == "sum"

    def empty(needed: bool, *shape: int) -> Tensor:
        return torch.empty(shape if needed else (0,), dtype=x.dtype, device=x.device)

    dx = empty(need_x or (summed and need_g), *x.shape)
    dg, dweight, dbias = empty(need_g, *g.shape), empty(need_weight, *weight.shape), empty(need_bias, outputs)
    four, dy = _four(x), _four(dy)
    with torch.cuda.device_of(x):
        if need_x or (summed and need_g):
            _input_gradient(dy, four, g if summed else None, _columns(weight, 0, split), _four(dx), activation)
        if need_weight:
            _weight_gradient(dy, four, g if summed else None, dweight[:, :split], activation)
        if summed and need_g:
            _sum_conditions(_four(dx), dg)
        if need_bias or (not summed and (need_g or need_weight)):
            dy_b = torch.empty(g.shape[0], outputs, dtype=torch.float32, device=x.device)
            _sum_conditions(dy, dy_b)
            if need_bias:
                _sum_conditions(dy_b[None, None], dbias[None])
            if not summed and (need_g or need_weight):
                own, of_conditions = _of_conditions(g), _of_conditions(dy_b.to(x.dtype))
                if need_g:
                    part = _columns(weight, split, weight.shape[1])
                    _input_gradient(of_conditions, own, None, part, _of_conditions(dg), activation)
                if need_weight:
                    _weight_gradient(of_conditions, own, None, dweight[:, split:], activation)
    return (dx if need_x else dx.new_empty(0)), dg, dweight, dbias
