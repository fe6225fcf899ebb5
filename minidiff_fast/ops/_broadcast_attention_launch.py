"""Launches the Triton kernels of broadcast attention: shapes and strides in, one launch configuration per shape."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.kernels import broadcast_attention as kernels
from minidiff_fast.ops.philox import dropout_threshold

LOG2_E = math.log2(math.e)
HIP = torch.version.hip is not None


@dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes of one kernel launch."""

    block_m: int
    """Rows (samples x tokens x grouped heads) a tile holds."""
    block_n: int
    """Shared keys a tile holds."""
    block_p: int
    """Own keys a tile holds."""
    num_warps: int
    num_stages: int


def _tile(size: int, largest: int) -> int:
    """The power of two that holds ``size``, from 16 (the least a matrix instruction takes) to ``largest``."""
    return max(16, min(largest, 1 << max(size - 1, 0).bit_length()))


def choose_config(
    kernel: str, rows: int, keys: int, own_span: int, block_d: int, element_size: int, *, dropout: bool, hip: bool
) -> LaunchConfig:
    """The heuristic launch configuration.

    Args:
        kernel: ``forward``, ``dq``, ``dkdv``.
        rows: rows of one (condition, key/value head), K * T * H / Hkv.
        keys: keys of the shared segment (``dkdv``: of the segment at hand).
        own_span: own keys that a tile of rows can see at most.
        block_d: head dimension, rounded up to a power of two.
        element_size: bytes per element.
        dropout: the random words and the weights live side by side: smaller tiles for wide heads.
        hip: ROCm: 64 KiB of shared memory, so no software pipelining of large tiles.
    """
    forward = kernel == "forward"
    if element_size == 4:  # exact float32 products run on the ordinary cores, out of registers
        largest_m, largest_n = (32, 32) if block_d <= 64 else (16, 32) if block_d <= 128 else (16, 16)
    elif block_d <= 64:
        largest_m, largest_n = (128 if forward else 64), 64
    elif block_d <= 128:
        largest_m, largest_n = 64, (64 if forward and not dropout else 32)
    else:
        largest_m, largest_n = (64 if forward and not dropout else 32), 32
    block_m, block_n = _tile(rows, largest_m), _tile(keys, largest_n)
    block_p = _tile(own_span, largest_n)
    # Four warps cannot hold these tiles of logits and their accumulators without spilling registers.
    crowded = block_m >= 128 if forward else block_m * block_n >= 64 * 64
    num_warps = 8 if crowded or block_m * block_d >= 64 * 128 or (element_size == 4 and block_d >= 64) else 4
    # Pipelining holds the next tiles' addresses in registers: too many in these.
    unpipelined = hip or kernel == "dkdv" or element_size == 4 or (kernel == "dq" and dropout)
    num_stages = 1 if unpipelined else 2
    return LaunchConfig(block_m, block_n, block_p, num_warps, num_stages)


@dataclass(frozen=True)
class _Problem:
    """The sizes of one call, and the arguments that every kernel shares."""

    batch: int
    samples: int
    tokens: int
    heads: int
    kv_heads: int
    width: int
    shared: int
    own: int
    dropout_p: float
    scale: float
    exact: bool

    @property
    def logit_scale(self) -> float:
        """The kernels' docstring says which units logits have."""
        return self.scale if self.exact else self.scale * LOG2_E

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def rows(self) -> int:
        return self.samples * self.tokens * self.group

    @property
    def block_d(self) -> int:
        return _tile(self.width, 256)

    @property
    def keep_scale(self) -> float:
        return 1.0 / (1.0 - self.dropout_p)

    def own_span(self, block_m: int) -> int:
        """Own keys that a tile of ``block_m`` rows can touch: its samples, one more for a ragged start."""
        return min(self.samples, (block_m - 1) // (self.tokens * self.group) + 2) * self.own

    def config(self, kernel: str, q: Tensor, keys: int) -> LaunchConfig:
        return choose_config(
            kernel,
            self.rows,
            keys,
            self.own_span(64),
            self.block_d,
            q.element_size(),
            dropout=self.dropout_p > 0.0,
            hip=HIP,
        )


def _problem(q: Tensor, k: Tensor, own_k: Tensor | None, dropout_p: float, scale: float) -> _Problem:
    batch, samples, tokens, heads, width = q.shape
    own = 0 if own_k is None else own_k.shape[2]
    problem = _Problem(
        batch,
        samples,
        tokens,
        heads,
        k.shape[2],
        width,
        k.shape[1],
        own,
        dropout_p,
        scale,
        q.dtype == torch.float32,
    )
    blocks = problem.batch * problem.kv_heads * -(-max(problem.rows, problem.shared, samples * own) // 16)
    if max(problem.rows, problem.shared, samples * own, blocks) >= 2**31:
        raise InvalidArgument(
            f"broadcast_attention: K * T * H / Hkv = {problem.rows} rows, S = {problem.shared} and K * P = "
            f"{samples * own} keys per condition and head, and their {blocks} blocks of 16 in all, must stay below "
            "2^31; run K in chunks"
        )
    return problem


def _precision(q: Tensor) -> str:
    """float32 products follow torch's own switch; the default is exact float32."""
    tf32 = q.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def _mask_strides(mask: Tensor | None) -> tuple[int, int, int]:
    """Strides of [B or 1, T or 1, S], 0 along the axes that broadcast."""
    if mask is None:
        return 0, 0, 0
    return tuple(0 if mask.shape[i] == 1 and i < 2 else mask.stride(i) for i in range(3))  # type: ignore[return-value]


def _own_or(own: Tensor | None, other: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """A tensor and five strides to pass for own_k or own_v, also when there are none."""
    return (other, (0, 0, 0, 0, 0)) if own is None else (own, own.stride())


def _flags(problem: _Problem, lengths: Tensor | None, mask: Tensor | None, own_causal: bool) -> dict[str, object]:
    return {
        "HAS_LENGTHS": lengths is not None,
        "HAS_MASK": mask is not None,
        "OWN_CAUSAL": own_causal,
        "HAS_DROPOUT": problem.dropout_p > 0.0,
        "EXACT": problem.exact,
        "HEADS": problem.kv_heads,
        "G": problem.group,
        "D": problem.width,
        "BLOCK_D": problem.block_d,
    }


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, own_k: Tensor | None, own_v: Tensor | None, lengths: Tensor | None,
    cu_seqlens: Tensor | None, mask: Tensor | None, seed: Tensor | None, own_causal: bool, dropout_p: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """out [B, K, T, H, D]; lse [B, K, T, H] float32; lse_correction, of the shape of lse or empty."""
    problem = _problem(q, k, own_k, dropout_p, scale)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    lse_correction = torch.empty_like(lse) if problem.exact else lse.new_empty(0)
    if out.numel() == 0:
        return out, lse, lse_correction
    lengths = None if lengths is None else lengths.contiguous()
    config = problem.config("forward", q, problem.shared)
    row_blocks = -(-problem.rows // config.block_m)
    own_key, own_key_strides = _own_or(own_k, k)
    own_value, own_value_strides = _own_or(own_v, v)
    with torch.cuda.device_of(q):
        kernels._broadcast_attention_fwd_kernel[(row_blocks * problem.kv_heads * problem.batch,)](
            q, k, v, own_key, own_value, _pointer(lengths, q), _pointer(mask, q), _pointer(seed, q),
            out, lse, lse_correction,
            *q.stride(), *k.stride(), *v.stride(), *own_key_strides, *own_value_strides, *_mask_strides(mask),
            problem.samples, problem.tokens, problem.shared, problem.own, row_blocks,
            problem.logit_scale, problem.keep_scale, dropout_threshold(problem.dropout_p),
            **_flags(problem, lengths, mask, own_causal), HAS_OWN=problem.own > 0,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_P=config.block_p, PRECISION=_precision(q),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out, lse, lse_correction


def _pointer(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """Kernels take a pointer for every argument; flags say which are read."""
    return stand_in if tensor is None else tensor


def launch_backward(
    dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, own_k: Tensor | None, own_v: Tensor | None,
    out: Tensor, lse: Tensor, lse_correction: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None,
    mask: Tensor | None, seed: Tensor | None, own_causal: bool, dropout_p: float, scale: float,
    *, need_q: bool = True, need_shared: bool = True, need_own: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, down_k, down_v; empty where not needed."""
    problem = _problem(q, k, own_k, dropout_p, scale)
    lengths = None if lengths is None else lengths.contiguous()
    # Without rows no kernel runs, and the gradients are 0.
    make = torch.zeros if q.numel() == 0 else torch.empty

    def like(x: Tensor | None, needed: bool) -> Tensor:
        return make(x.shape if needed and x is not None else (0,), dtype=q.dtype, device=q.device)

    dq, dk, dv = like(q, need_q), like(k, need_shared), like(v, need_shared)
    down_k, down_v = like(own_k, need_own), like(own_v, need_own)
    if q.numel() == 0:
        return dq, dk, dv, down_k, down_v
    with torch.cuda.device_of(q):
        delta = _launch_delta(problem, out, dout, dlse.contiguous())
        statistics = (dout, lse, lse_correction, delta)
        if need_q:
            _launch_dq(problem, q, k, v, own_k, own_v, lengths, mask, seed, *statistics, dq, own_causal)
        if need_shared and k.numel() > 0:
            _launch_dkdv(problem, q, k, v, lengths, mask, seed, *statistics, dk, dv, own=False, own_causal=False)
        if need_own and own_k is not None and own_v is not None and own_k.numel() > 0:
            _launch_dkdv(
                problem, q, own_k, own_v, None, None, seed, *statistics, down_k, down_v, own=True, own_causal=own_causal
            )
    return dq, dk, dv, down_k, down_v


def _launch_delta(problem: _Problem, out: Tensor, dout: Tensor, dlse: Tensor) -> Tensor:
    delta = torch.empty_like(dlse)
    block_m = _tile(problem.rows, 32 if problem.block_d > 64 else 64)
    row_blocks = -(-problem.rows // block_m)
    kernels._broadcast_attention_bwd_delta_kernel[(row_blocks * problem.kv_heads * problem.batch,)](
        out, dout, dlse, delta, *dout.stride(), problem.samples, problem.tokens, row_blocks,
        HEADS=problem.kv_heads, G=problem.group, D=problem.width, BLOCK_D=problem.block_d, BLOCK_M=block_m,
    )  # fmt: skip
    return delta


def _launch_dq(
    problem: _Problem, q: Tensor, k: Tensor, v: Tensor, own_k: Tensor | None, own_v: Tensor | None,
    lengths: Tensor | None, mask: Tensor | None, seed: Tensor | None,
    dout: Tensor, lse: Tensor, lse_correction: Tensor, delta: Tensor, dq: Tensor, own_causal: bool,
) -> None:  # fmt: skip
    config = problem.config("dq", q, problem.shared)
    row_blocks = -(-problem.rows // config.block_m)
    own_key, own_key_strides = _own_or(own_k, k)
    own_value, own_value_strides = _own_or(own_v, v)
    kernels._broadcast_attention_bwd_dq_kernel[(row_blocks * problem.kv_heads * problem.batch,)](
        q, k, v, own_key, own_value, _pointer(lengths, q), _pointer(mask, q), _pointer(seed, q),
        dout, lse, lse_correction, delta, dq,
        *q.stride(), *k.stride(), *v.stride(), *own_key_strides, *own_value_strides, *dout.stride(),
        *_mask_strides(mask),
        problem.samples, problem.tokens, problem.shared, problem.own, row_blocks,
        problem.scale, problem.logit_scale, problem.keep_scale, dropout_threshold(problem.dropout_p),
        **_flags(problem, lengths, mask, own_causal), HAS_OWN=problem.own > 0,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_P=config.block_p, PRECISION=_precision(q),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def _launch_dkdv(
    problem: _Problem, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, mask: Tensor | None,
    seed: Tensor | None, dout: Tensor, lse: Tensor, lse_correction: Tensor, delta: Tensor, dk: Tensor, dv: Tensor,
    *, own: bool, own_causal: bool,
) -> None:  # fmt: skip
    key_count = problem.samples * problem.own if own else problem.shared
    config = problem.config("dkdv", q, key_count)
    key_blocks = -(-key_count // config.block_n)
    # One signature for both segments: shared keys have no sample axis.
    key_strides, value_strides = (x.stride() if own else (x.stride(0), 0, *x.stride()[1:]) for x in (k, v))
    kernels._broadcast_attention_bwd_dkdv_kernel[(key_blocks * problem.kv_heads * problem.batch,)](
        q, k, v, _pointer(lengths, q), _pointer(mask, q), _pointer(seed, q), dout, lse, lse_correction, delta, dk, dv,
        *q.stride(), *key_strides, *value_strides, *dout.stride(), *_mask_strides(mask),
        problem.samples, problem.tokens, problem.shared, problem.own, key_count, key_blocks,
        problem.scale, problem.logit_scale, problem.keep_scale, dropout_threshold(problem.dropout_p),
        OWN=own, **_flags(problem, lengths, mask, own_causal),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, PRECISION=_precision(q),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
