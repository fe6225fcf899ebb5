"""Launches the Triton kernels of broadcast modulation: strides in, one launch configuration per shape."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.kernels import broadcast_modulate as kernels
from minidiff_fast.ops._broadcast_modulate_op import statistics_shapes

HIP = torch.version.hip is not None
PROGRAMS = 1024
"""Backward programs to aim for, by chunks of K where there are few conditions; the same on every device, so that the
order of every sum is, too."""
TILES_PER_CHUNK = 64
"""Tiles that one program adds up in a row: a longer sum in float32 would lose what a sum of sums keeps."""
ROWS_PER_CHUNK = 16
"""At least so many rows share one row of partial sums, so that these stay small beside x."""


@dataclass(frozen=True)
class LaunchConfig:
    """The tile of one kernel launch."""

    block_r: int
    """Rows of a tile."""
    block_c: int
    """Channels of a tile."""
    whole: bool
    """A tile holds whole units of the norm."""
    num_warps: int


def _power(size: int) -> int:
    """The power of two that holds ``size``."""
    return 1 << max(size - 1, 0).bit_length()


def _alignment(tensors: Iterable[Tensor], innermost: int) -> int:
    """The power of two, up to 8, that divides every stride but that of the innermost axis; an axis of one element has
    no stride."""
    return math.gcd(
        8, *(x.stride(i) for x in tensors for i in range(x.dim()) if i != innermost % x.dim() and x.shape[i] > 1)
    )


def choose_config(
    kernel: str, norm: str, rows: int, channels: int, *, one_sample: bool, rows_first: bool, hip: bool
) -> LaunchConfig:
    """The heuristic launch configuration.

    Args:
        kernel: ``forward``, ``sums``, ``backward``.
        norm: ``""``, ``layer``, ``rms``, ``group``.
        rows: rows of a span; ``group``: the T of a unit.
        channels: channels of a unit.
        one_sample: the rows of a span are the tokens of one sample, and the backward adds them up.
        rows_first: neighbouring rows are neighbours in memory, not neighbouring channels.
        hip: ROCm: warps are twice as wide.
    """
    backward, grouped = kernel == "backward", norm == "group"
    largest = (4096 if grouped and rows_first else 2048) if backward else (8192 if grouped else 4096)
    block_r, block_c = _power(rows), _power(channels)
    if not grouped:
        block_r = min(block_r, max(1, 2048 // block_c))
    whole = norm != "" and kernel != "sums" and block_r * block_c <= largest
    if backward and one_sample and rows > TILES_PER_CHUNK * block_r:
        whole = False
    if not whole:
        block_r = min(_power(rows), 64 if rows_first or grouped or (backward and one_sample) else 16 if backward else 4)
        block_c = min(_power(channels), (128 if backward else 2048) if block_r == 1 else 2048 // block_r)
        block_r = min(_power(rows), max(block_r, (1024 if backward else 2048) // block_c))
    # Loops over the tiles of a unit hold more addresses in registers, and so does adding up rows across threads.
    per_thread = 16 if kernel == "forward" and whole else 4 if backward and grouped and not rows_first else 8
    num_warps = max(1, min(8, block_r * block_c // (32 * per_thread)))
    return LaunchConfig(block_r, block_c, whole, max(1, num_warps // 2) if hip else num_warps)


@dataclass(frozen=True)
class _Problem:
    """One call: sizes, options and parameters as the kernels take them."""

    batch: int
    samples: int
    tokens: int
    channels: int
    groups: int
    norm: str
    activation: str
    at_output: bool
    adaln: bool
    channels_first: bool
    parameters: tuple[Tensor | None, ...]
    """shift, scale, gate, own_shift, own_scale, own_gate, weight, bias; the last stride is 1."""

    @property
    def grouped(self) -> bool:
        return self.norm == "group"

    @property
    def unit_channels(self) -> int:
        return self.channels // self.groups

    @property
    def spanwise(self) -> bool:
        """Programs keep to one sample: its norm or its memory order wants that."""
        return self.grouped or self.rows_first

    def rows(self, one_sample: bool) -> int:
        """Rows of a span."""
        return self.tokens if one_sample else self.samples * self.tokens

    def config(self, kernel: str, one_sample: bool) -> LaunchConfig:
        return choose_config(
            kernel, self.norm, self.rows(one_sample), self.unit_channels,
            one_sample=one_sample, rows_first=self.rows_first, hip=HIP,
        )  # fmt: skip

    def pointers(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The six modulation pointers, and weight and bias; x stands in for what is None, flags say what is read."""
        tensors = [x if tensor is None else tensor for tensor in self.parameters]
        return tensors[:6], tensors[6:]

    def strides(self) -> list[int]:
        """Of [B, C] the first, of [B, K, C] the first two; 0 for None."""
        strides = [0 if tensor is None else tensor.stride(0) for tensor in self.parameters[:3]]
        for own in self.parameters[3:6]:
            strides += [0, 0] if own is None else [own.stride(0), own.stride(1)]
        return strides

    @property
    def rows_first(self) -> bool:
        """Neighbouring tokens are neighbours in memory."""
        return self.channels_first and self.tokens > 1

    def flags(self, one_sample: bool, *tensors: Tensor | None) -> dict[str, object]:
        """``tensors`` of x's size are those that the kernel reads or writes."""
        names = ("SHIFT", "SCALE", "GATE", "OWN_SHIFT", "OWN_SCALE", "OWN_GATE", "WEIGHT", "BIAS")
        present = {f"HAS_{name}": tensor is not None for name, tensor in zip(names, self.parameters, strict=True)}
        return present | {
            "NORM": self.norm,
            "ACTIVATION": self.activation,
            "AT_OUTPUT": self.at_output,
            "ADALN": self.adaln,
            "ONE_SAMPLE": one_sample,
            "TOKENS": self.tokens if one_sample else 0,
            "CHANNELS": self.unit_channels,
            "ROWS_FIRST": self.rows_first,
            "ALIGN": _alignment(
                (self.view(x) for x in tensors if x is not None and x.dim() == 4), 2 if self.rows_first else 3
            ),
            "PARAMETER_ALIGN": _alignment((x for x in self.parameters[:6] if x is not None), -1),
        }

    def view(self, x: Tensor) -> Tensor:
        """[B, K, T, C], whatever the layout."""
        return x.transpose(2, 3) if self.channels_first else x


def _problem(
    x: Tensor, parameters: Sequence[Tensor | None], norm: str, num_groups: int, activation: str, activation_at: str,
    form: str, channels_first: bool,
) -> _Problem:  # fmt: skip
    batch, samples, tokens, channels = (x.transpose(2, 3) if channels_first else x).shape
    groups = num_groups if norm == "group" else 1
    rows = samples * tokens
    programs = batch * max(samples * groups, rows * max(1, channels // 64))
    if max(rows, tokens * channels, programs) >= 2**31:
        raise InvalidArgument(
            f"broadcast_modulate: K * T = {rows} rows of a condition, T * C = {tokens * channels} elements of a sample "
            f"and {programs} blocks in all must stay below 2^31; run K in chunks"
        )
    dense = tuple(t if t is None or t.stride(-1) == 1 else t.contiguous() for t in parameters)
    return _Problem(
        batch, samples, tokens, channels, groups, norm, activation, activation_at == "output", form == "adaln",
        channels_first, dense,
    )  # fmt: skip


def launch_forward(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, gate: Tensor | None, own_shift: Tensor | None,
    own_scale: Tensor | None, own_gate: Tensor | None, residual: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, norm: str, num_groups: int, eps: float, activation: str, activation_at: str, form: str,
    channels_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y like x; mean and rstd as the schema says."""
    problem = _problem(
        x, (shift, scale, gate, own_shift, own_scale, own_gate, weight, bias), norm, num_groups, activation,
        activation_at, form, channels_first,
    )  # fmt: skip
    shapes = statistics_shapes(x.shape, norm, num_groups, channels_first)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty(shape, dtype=torch.float32, device=x.device) for shape in shapes)
    if x.numel() == 0:
        return y, mean, rstd
    one_sample = problem.spanwise
    config = problem.config("forward", one_sample)
    rows, spans = problem.rows(one_sample), problem.samples if one_sample else 1
    blocks = problem.groups if problem.grouped else -(-rows // config.block_r)
    modulation, affine = problem.pointers(x)
    x_strides, y_strides = problem.view(x).stride(), problem.view(y).stride()
    residual_strides = (0, 0, 0, 0) if residual is None else problem.view(residual).stride()
    with torch.cuda.device_of(x):
        kernels._broadcast_modulate_fwd_kernel[(blocks * spans * problem.batch,)](
            x, *modulation, x if residual is None else residual, *affine, y, mean, rstd,
            *x_strides, *residual_strides, *y_strides, *problem.strides(),
            problem.samples, problem.tokens, problem.groups, rows, spans, blocks, eps,
            **problem.flags(one_sample, x, residual, y), HAS_RESIDUAL=residual is not None, WHOLE=config.whole,
            BLOCK_R=config.block_r, BLOCK_C=config.block_c, num_warps=config.num_warps,
        )  # fmt: skip
    return y, mean, rstd


def launch_backward(
    dy: Tensor, x: Tensor, shift: Tensor | None, scale: Tensor | None, gate: Tensor | None, own_shift: Tensor | None,
    own_scale: Tensor | None, own_gate: Tensor | None, weight: Tensor | None, bias: Tensor | None, mean: Tensor,
    rstd: Tensor, norm: str, num_groups: int, eps: float, activation: str, activation_at: str, form: str,
    channels_first: bool, need: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x, shift, scale, gate, own_shift, own_scale, own_gate, weight, bias; empty where not needed."""
    parameters = (shift, scale, gate, own_shift, own_scale, own_gate, weight, bias)
    wanted = [asked and tensor is not None for asked, tensor in zip(need, (x, *parameters), strict=True)]
    if x.numel() == 0 or not any(wanted):
        return tuple(
            x.new_empty((0,)) if tensor is None or not asked else torch.zeros_like(tensor).contiguous()
            for tensor, asked in zip((x, *parameters), wanted, strict=True)
        )
    problem = _problem(x, parameters, norm, num_groups, activation, activation_at, form, channels_first)
    one_sample = problem.spanwise or (problem.tokens > 1 and any(wanted[4:7]))
    config = problem.config("backward", one_sample)
    chunk = _Chunks.of(problem, config, one_sample)
    dx = torch.empty(x.shape if wanted[0] else (0,), dtype=x.dtype, device=x.device)

    def partial(asked: bool) -> Tensor:
        shape = (problem.batch, chunk.chunks, problem.channels) if asked else (0,)
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    shared = [partial(asked) for asked in wanted[1:4]]
    affine = [partial(asked) for asked in wanted[7:9]]
    own = [
        torch.empty(
            tensor.shape if asked and tensor is not None else (0,),
            dtype=x.dtype if tensor is None else tensor.dtype,
            device=x.device,
        )
        for tensor, asked in zip(parameters[3:6], wanted[4:7], strict=True)
    ]
    with torch.cuda.device_of(x):
        sums = _launch_sums(problem, config, dy, x, mean, rstd) if wanted[0] and norm != "" else mean
        _launch_gradients(problem, config, chunk, dy, x, mean, rstd, sums, dx, [*shared, *own, *affine], wanted)
    return (
        dx,
        *(_added(part, tensor, (1,)) for part, tensor in zip(shared, parameters[:3], strict=True)),
        *own,
        *(_added(part, tensor, (0, 1)) for part, tensor in zip(affine, parameters[6:], strict=True)),
    )


def _added(partial: Tensor, parameter: Tensor | None, axes: tuple[int, ...]) -> Tensor:
    """The chunks' sums [B, chunks, C] added up, in the dtype of the parameter."""
    if parameter is None or partial.dim() == 1:
        return partial
    total = partial[:, 0] if axes == (1,) and partial.shape[1] == 1 else partial.sum(axes)
    return total.to(parameter.dtype)


@dataclass(frozen=True)
class _Chunks:
    """How the backward cuts the items of a condition: its samples (one_sample), or its rows."""

    one_sample: bool
    items: int
    per_chunk: int
    chunks: int
    channel_blocks: int
    """Blocks of channels in a group."""

    @staticmethod
    def of(problem: _Problem, config: LaunchConfig, one_sample: bool) -> _Chunks:
        items = problem.samples if one_sample else problem.samples * problem.tokens
        channel_blocks = -(-problem.unit_channels // config.block_c)
        if one_sample:
            most = max(1, TILES_PER_CHUNK // -(-problem.tokens // config.block_r))
            least = -(-ROWS_PER_CHUNK // problem.tokens)
        else:
            most, least = TILES_PER_CHUNK * config.block_r, max(ROWS_PER_CHUNK, config.block_r)
        wanted = max(1, PROGRAMS // (problem.batch * problem.groups * channel_blocks))
        per_chunk = min(items, most, max(least, -(-items // wanted)))
        return _Chunks(one_sample, items, per_chunk, -(-items // per_chunk), channel_blocks)


def _launch_sums(
    problem: _Problem, config: LaunchConfig, dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor
) -> Tensor:  # [2, units], or a stand-in where the other kernel needs none
    if config.whole:
        return rstd
    one_sample = problem.spanwise
    tile = problem.config("sums", one_sample)
    rows, spans = problem.rows(one_sample), problem.samples if one_sample else 1
    blocks = problem.groups if problem.grouped else -(-rows // tile.block_r)
    units = rstd.numel()
    sums = torch.empty((2, units), dtype=torch.float32, device=x.device)
    modulation, affine = problem.pointers(x)
    kernels._broadcast_modulate_bwd_sums_kernel[(blocks * spans * problem.batch,)](
        x, dy, *modulation, *affine, mean, rstd, sums,
        *problem.view(x).stride(), *problem.view(dy).stride(), *problem.strides(),
        problem.samples, problem.tokens, problem.groups, rows, spans, blocks, units,
        **problem.flags(one_sample, x, dy), BLOCK_R=tile.block_r, BLOCK_C=tile.block_c, num_warps=tile.num_warps,
    )  # fmt: skip
    return sums


def _launch_gradients(
    problem: _Problem, config: LaunchConfig, chunk: _Chunks, dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor,
    sums: Tensor, dx: Tensor, parameters: list[Tensor], wanted: list[bool],
) -> None:  # fmt: skip
    names = ("X", "SHIFT", "SCALE", "GATE", "OWN_SHIFT", "OWN_SCALE", "OWN_GATE", "WEIGHT", "BIAS")
    needs = {f"NEED_{name}": asked for name, asked in zip(names, wanted, strict=True)}
    modulation, affine = problem.pointers(x)
    dx_strides = problem.view(dx).stride() if wanted[0] else (0, 0, 0, 0)
    programs = problem.groups * chunk.channel_blocks * chunk.chunks * problem.batch
    kernels._broadcast_modulate_bwd_kernel[(programs,)](
        x, dy, *modulation, *affine, mean, rstd, sums, dx, *parameters,
        *problem.view(x).stride(), *problem.view(dy).stride(), *dx_strides, *problem.strides(),
        problem.samples, problem.tokens, problem.groups, chunk.items, chunk.per_chunk, chunk.chunks, rstd.numel(),
        **problem.flags(chunk.one_sample, x, dy, dx), **needs, CHANNEL_BLOCKS=chunk.channel_blocks, WHOLE=config.whole,
        BLOCK_R=config.block_r, BLOCK_C=config.block_c, num_warps=config.num_warps,
    )  # fmt: skip
