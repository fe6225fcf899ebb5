"""Launches the Triton kernels of broadcast attention: shapes and strides in, one launch configuration per shape."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.kernels import broadcast_attention as kernels
from minidiff_fast.ops._broadcast_attention_config import LaunchConfig, choose_config, tile
from minidiff_fast.ops._query_transform import QueryTransform
from minidiff_fast.ops.philox import dropout_threshold
from minidiff_fast.ops.rotary import Rotary

LOG2_E = math.log2(math.e)
HIP = torch.version.hip is not None
BLACKWELL = False
"""Set by who compiles for sm_100 without one; on a GPU its capability says so."""
WIDEST_TURN_ON_LOAD = 64
"""Own keys of wider heads are turned in a pass before: a tile of them, of partners, sines and cosines does not fit into
registers beside the accumulators."""
MOST_PARTIALS = 1024
"""Programs that the pass over dq is shared by: enough for every device, few enough to sum their partials quickly."""


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


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
    transform: QueryTransform

    @property
    def rope(self) -> tuple[object, ...] | None:
        return None if self.transform.rope is None else _recipe(self.transform.rope.rotary)

    @property
    def turns_own(self) -> bool:
        return self.transform.rope is not None and self.transform.rope.own_positions is not None

    @property
    def own_rope(self) -> tuple[object, ...] | None:
        """The recipe for own keys that are turned when they are loaded."""
        return self.rope if self.turns_own and self.block_d <= WIDEST_TURN_ON_LOAD else None

    @property
    def norm(self) -> tuple[object, ...] | None:
        norm = self.transform.q_norm
        return None if norm is None else (norm.kind, norm.weight is not None, norm.bias is not None)

    @property
    def norm_eps(self) -> float:
        return 0.0 if self.transform.q_norm is None else self.transform.q_norm.eps

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
        return tile(self.width, 256)

    @property
    def keep_scale(self) -> float:
        return 1.0 / (1.0 - self.dropout_p)

    def own_span(self, block_m: int) -> int:
        """Own keys that a tile of ``block_m`` rows can touch: its samples, one more for a ragged start."""
        return min(self.samples, (block_m - 1) // (self.tokens * self.group) + 2) * self.own

    def config(self, kernel: str, q: Tensor, keys: int, *, own: bool = True) -> LaunchConfig:
        """The configuration of a launch that reads own keys too (``own``; dkdv: of a launch that reads no others)."""
        return choose_config(
            kernel,
            self.rows,
            keys,
            self.own_span(64),
            self.block_d,
            q.element_size(),
            dropout=self.dropout_p > 0.0,
            hip=HIP,
            transform=kernel == "forward" and (self.rope or self.norm) is not None,
            own_rope=own and self.own_rope is not None,
            turned=self.rope is not None,
            blackwell=BLACKWELL or (q.is_cuda and _capability(q.device)[0] == 10),
        )

    def shared_keys(self, packed: bool) -> int:
        """Shared keys of a condition; packed, of the average one: counting them would wait for the device."""
        return -(-self.shared // self.batch) if packed else self.shared


def _recipe(rotary: Rotary) -> tuple[object, ...]:
    """What the kernels call ROPE; the first part of the rate has 12 bits, so that its product with a pair is exact."""
    rate = 2.0 * math.log2(rotary.base) / rotary.block
    step = 2.0 ** (math.frexp(rate)[1] - 12)
    high = math.floor(rate / step) * step
    return rotary.axes, rotary.rotary_dim, rotary.style == "half", rotary.full_width, high, rate - high


def _problem(
    q: Tensor, k: Tensor, own_k: Tensor | None, dropout_p: float, scale: float, transform: QueryTransform | None
) -> _Problem:
    batch, samples, tokens, heads, width = q.shape
    own = 0 if own_k is None else own_k.shape[2]
    problem = _Problem(
        batch, samples, tokens, heads, k.shape[-2], width, k.shape[-3], own, dropout_p, scale, q.dtype == torch.float32,
        transform or QueryTransform(),
    )  # fmt: skip
    blocks = problem.batch * problem.kv_heads * -(-max(problem.rows, problem.shared, samples * own) // 16)
    if max(problem.rows, problem.shared, samples * own, blocks) >= 2**31:
        raise InvalidArgument(
            f"broadcast_attention: K * T * H / Hkv = {problem.rows} rows, S = {problem.shared} and K * P = "
            f"{samples * own} keys per condition and head, and their {blocks} blocks of 16 in all, must stay below "
            "2^31; run K in chunks"
        )
    return problem


def _precision(q: Tensor) -> str:
    """float32 products follow torch's own switch; the default is exact float32. ROCm: always exact."""
    tf32 = not HIP and q.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def _mask_strides(mask: Tensor | None) -> tuple[int, int, int]:
    """Strides of [B or 1, T or 1, S], 0 along the axes that broadcast."""
    if mask is None:
        return 0, 0, 0
    return tuple(0 if mask.shape[i] == 1 and i < 2 else mask.stride(i) for i in range(3))  # type: ignore[return-value]


def _own_or(own: Tensor | None, other: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """A tensor and five strides to pass for own_k or own_v, also when there are none."""
    return (other, (0, 0, 0, 0, 0)) if own is None else (own, own.stride())


def _shared_strides(x: Tensor) -> tuple[int, ...]:
    """Strides of [B, S, Hkv, D]; packed keys [N, Hkv, D] have none along B."""
    return (0, *x.stride()) if x.dim() == 3 else x.stride()


def _positions(transform: QueryTransform) -> tuple[Tensor | None, Tensor | None]:
    """Positions of queries and own keys, dense: three numbers a token."""
    if transform.rope is None:
        return None, None
    own = transform.rope.own_positions
    return transform.rope.q_positions.contiguous(), None if own is None else own.contiguous()


def _norm_parameters(transform: QueryTransform) -> tuple[Tensor | None, Tensor | None]:
    if transform.q_norm is None:
        return None, None
    return tuple(None if x is None else x.contiguous() for x in transform.q_norm[1:3])  # type: ignore[return-value]


def _flags(
    problem: _Problem, lengths: Tensor | None, cu_seqlens: Tensor | None, mask: Tensor | None, own_causal: bool
) -> dict[str, object]:
    return {
        "HAS_LENGTHS": lengths is not None,
        "HAS_PACKED": cu_seqlens is not None,
        "OWN_ROPE": problem.own_rope,
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
    scale: float, transform: QueryTransform | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """out [B, K, T, H, D]; lse [B, K, T, H] float32; lse_correction, of the shape of lse or empty."""
    problem = _problem(q, k, own_k, dropout_p, scale, transform)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    lse_correction = torch.empty_like(lse) if problem.exact else lse.new_empty(0)
    if out.numel() == 0:
        return out, lse, lse_correction
    lengths, cu_seqlens = _dense(lengths), _dense(cu_seqlens)
    q_positions, own_positions = _positions(problem.transform)
    weight, bias = _norm_parameters(problem.transform)
    config = problem.config("forward", q, problem.shared_keys(cu_seqlens is not None))
    row_blocks = -(-problem.rows // config.block_m)
    with torch.cuda.device_of(q):
        own_key, own_key_strides = _own_or(_turned_before(problem, own_k), k)
        own_value, own_value_strides = _own_or(own_v, v)
        kernels._broadcast_attention_fwd_kernel[(row_blocks * problem.kv_heads * problem.batch,)](
            q, k, v, own_key, own_value, *(_pointer(x, q) for x in (lengths, cu_seqlens, mask, seed)),
            *(_pointer(x, q) for x in (q_positions, own_positions, weight, bias)), problem.norm_eps,
            out, lse, lse_correction,
            *q.stride(), *_shared_strides(k), *_shared_strides(v), *own_key_strides, *own_value_strides,
            *_mask_strides(mask),
            problem.samples, problem.tokens, problem.shared, problem.own, row_blocks,
            problem.logit_scale, problem.keep_scale, dropout_threshold(problem.dropout_p),
            **_flags(problem, lengths, cu_seqlens, mask, own_causal), HAS_OWN=problem.own > 0,
            ROPE=problem.rope, NORM=problem.norm,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_P=config.block_p, PRECISION=_precision(q),
            **config.options,
        )  # fmt: skip
    return out, lse, lse_correction


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _pointer(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """Kernels take a pointer for every argument; flags say which are read."""
    return stand_in if tensor is None else tensor


def launch_backward(
    dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, own_k: Tensor | None, own_v: Tensor | None,
    out: Tensor, lse: Tensor, lse_correction: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None,
    mask: Tensor | None, seed: Tensor | None, own_causal: bool, dropout_p: float, scale: float,
    transform: QueryTransform | None = None, *, need_q: bool = True, need_shared: bool = True, need_own: bool = True,
) -> tuple[Tensor, ...]:  # fmt: skip
    """dq, dk, dv, down_k, down_v; with a transform also dnorm_weight, dnorm_bias. Empty where not needed."""
    problem = _problem(q, k, own_k, dropout_p, scale, transform)
    lengths, cu_seqlens = _dense(lengths), _dense(cu_seqlens)

    def like(x: Tensor | None, needed: bool, *, zeros: bool = False) -> Tensor:
        # Without rows no kernel runs, and the gradients are 0.
        make = torch.zeros if zeros or q.numel() == 0 else torch.empty
        x = x if needed and x is not None else q.new_empty(0)
        return make(x.shape, dtype=x.dtype, device=q.device)

    # Packed tokens that are nobody's have no program.
    dk, dv = (like(x, need_shared, zeros=cu_seqlens is not None) for x in (k, v))
    dq, down_k, down_v = like(q, need_q), like(own_k, need_own), like(own_v, need_own)
    dnorm = tuple(like(x, need_q, zeros=True) for x in _norm_parameters(problem.transform))
    if q.numel() > 0:
        with torch.cuda.device_of(q):
            delta = _launch_delta(problem, out, dout, dlse.contiguous())
            statistics = (dout, lse, lse_correction, delta)
            ready, own_ready = q, _turned_before(problem, own_k)
            if problem.rope is not None or problem.norm is not None:
                ready = dq if need_q else torch.empty(q.shape, dtype=q.dtype, device=q.device)
                _launch_transform(problem, q, ready, own=False)
            if need_shared and k.numel() > 0:
                _launch_dkdv(
                    problem, ready, k, v, lengths, cu_seqlens, mask, seed, *statistics, dk, dv, own=False,
                    own_causal=False,
                )  # fmt: skip
            if need_own and own_ready is not None and own_v is not None and own_ready.numel() > 0:
                _launch_dkdv(
                    problem, ready, own_ready, own_v, None, None, None, seed, *statistics, down_k, down_v, own=True,
                    own_causal=own_causal,
                )  # fmt: skip
                if problem.turns_own:
                    _launch_transform_backward(problem, down_k, down_k, own=True)
            if need_q:  # last: it writes over the transformed queries
                _launch_dq(
                    problem, ready, k, v, own_ready, own_v, lengths, cu_seqlens, mask, seed, *statistics, dq, own_causal
                )
                if ready is dq:
                    dnorm = _launch_transform_backward(problem, q, dq, own=False)
    gradients = (dq, dk, dv, down_k, down_v)
    return gradients if transform is None else (*gradients, *dnorm)


@dataclass(frozen=True)
class _TransformTiles:
    """Rows of the passes that transform a whole tensor: heads, or tokens where pairs straddle heads."""

    rows: int
    rows_per_token: int
    block_rows: int
    block_pairs: int

    @property
    def blocks(self) -> int:
        return -(-self.rows // self.block_rows)


def _transform_tiles(problem: _Problem, x: Tensor) -> _TransformTiles:
    heads, width = x.shape[3:]
    full_width = problem.transform.rope is not None and problem.transform.rope.rotary.full_width
    pairs = -(-heads * width // 2) if full_width else -(-width // 2)
    block_pairs = 1 << max(pairs - 1, 1).bit_length()
    rows = math.prod(x.shape[:3]) * (1 if full_width else heads)
    return _TransformTiles(rows, 1 if full_width else heads, max(1, min(16, 512 // block_pairs)), block_pairs)


def _transform_flags(problem: _Problem, x: Tensor, tiles: _TransformTiles, *, own: bool) -> dict[str, object]:
    return {
        "ROPE": problem.rope,
        "NORM": None if own else problem.norm,
        "H": x.shape[3],
        "D": x.shape[4],
        "ROWS_PER_TOKEN": tiles.rows_per_token,
        "BLOCK_ROWS": tiles.block_rows,
        "BLOCK_PAIRS": tiles.block_pairs,
        **({} if HIP else {"maxnreg": 255}),
    }


def _launch_transform(problem: _Problem, x: Tensor, ready: Tensor, *, own: bool) -> None:
    """Queries (or own keys) transformed and rounded as the forward does it."""
    tiles = _transform_tiles(problem, x)
    weight, bias = _norm_parameters(problem.transform)
    kernels._broadcast_attention_transform_kernel[(tiles.blocks,)](
        x, _pointer(_positions(problem.transform)[own], x), _pointer(weight, x), _pointer(bias, x), ready,
        *x.stride(), x.shape[1], x.shape[2], tiles.rows, problem.norm_eps,
        **_transform_flags(problem, x, tiles, own=own),
    )  # fmt: skip


def _turned_before(problem: _Problem, own_k: Tensor | None) -> Tensor | None:
    """Own keys as the kernels take them: as they came, or turned where the kernels do not do so themselves."""
    if own_k is None or not problem.turns_own or problem.own_rope is not None or own_k.numel() == 0:
        return own_k
    turned = torch.empty(own_k.shape, dtype=own_k.dtype, device=own_k.device)
    _launch_transform(problem, own_k, turned, own=True)
    return turned


def _launch_transform_backward(problem: _Problem, x: Tensor, gradient: Tensor, *, own: bool) -> tuple[Tensor, Tensor]:
    """Turns the gradient of transformed queries (or own keys) into that of x, in place; dnorm_weight and dnorm_bias."""
    tiles = _transform_tiles(problem, x)
    weight, bias = (None, None) if own else _norm_parameters(problem.transform)
    programs = min(tiles.blocks, MOST_PARTIALS)
    partials = torch.empty(
        (programs, 2, problem.width) if problem.norm is not None and not own else (0,),
        dtype=torch.float32, device=x.device,
    )  # fmt: skip
    kernels._broadcast_attention_bwd_transform_kernel[(programs,)](
        x, _pointer(_positions(problem.transform)[own], x), _pointer(weight, x), gradient, partials,
        *x.stride(), x.shape[1], x.shape[2], tiles.rows, tiles.blocks, problem.norm_eps,
        **_transform_flags(problem, x, tiles, own=own),
    )  # fmt: skip
    return tuple(  # type: ignore[return-value]
        x.new_empty(0) if parameter is None else partials[:, i].sum(0).to(parameter.dtype)
        for i, parameter in enumerate((weight, bias))
    )


def _launch_delta(problem: _Problem, out: Tensor, dout: Tensor, dlse: Tensor) -> Tensor:
    delta = torch.empty_like(dlse)
    block_m = tile(problem.rows, 32 if problem.block_d * out.element_size() > 128 else 64)
    row_blocks = -(-problem.rows // block_m)
    kernels._broadcast_attention_bwd_delta_kernel[(row_blocks * problem.kv_heads * problem.batch,)](
        out, dout, dlse, delta, *dout.stride(), problem.samples, problem.tokens, row_blocks,
        HEADS=problem.kv_heads, G=problem.group, D=problem.width, BLOCK_D=problem.block_d, BLOCK_M=block_m,
    )  # fmt: skip
    return delta


def _launch_dq(
    problem: _Problem, q: Tensor, k: Tensor, v: Tensor, own_k: Tensor | None, own_v: Tensor | None,
    lengths: Tensor | None, cu_seqlens: Tensor | None, mask: Tensor | None, seed: Tensor | None,
    dout: Tensor, lse: Tensor, lse_correction: Tensor, delta: Tensor, dq: Tensor, own_causal: bool,
) -> None:  # fmt: skip
    config = problem.config("dq", q, problem.shared_keys(cu_seqlens is not None))
    row_blocks = -(-problem.rows // config.block_m)
    own_key, own_key_strides = _own_or(own_k, k)
    own_value, own_value_strides = _own_or(own_v, v)
    kernels._broadcast_attention_bwd_dq_kernel[(row_blocks * problem.kv_heads * problem.batch,)](
        q, k, v, own_key, own_value, *(_pointer(x, q) for x in (lengths, cu_seqlens, mask, seed)),
        _pointer(_positions(problem.transform)[1], q), dout, lse, lse_correction, delta, dq,
        *q.stride(), *_shared_strides(k), *_shared_strides(v), *own_key_strides, *own_value_strides, *dout.stride(),
        *_mask_strides(mask),
        problem.samples, problem.tokens, problem.shared, problem.own, row_blocks,
        problem.scale, problem.logit_scale, problem.keep_scale, dropout_threshold(problem.dropout_p),
        **_flags(problem, lengths, cu_seqlens, mask, own_causal), HAS_OWN=problem.own > 0,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_P=config.block_p, PRECISION=_precision(q),
        **config.options,
    )  # fmt: skip


def _launch_dkdv(
    problem: _Problem, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None,
    mask: Tensor | None, seed: Tensor | None, dout: Tensor, lse: Tensor, lse_correction: Tensor, delta: Tensor,
    dk: Tensor, dv: Tensor, *, own: bool, own_causal: bool,
) -> None:  # fmt: skip
    key_count = problem.samples * problem.own if own else problem.shared
    packed = cu_seqlens is not None
    config = problem.config("dkdv", q, problem.shared_keys(True) if packed else key_count, own=own)
    key_blocks = key_count // config.block_n + problem.batch if packed else -(-key_count // config.block_n)
    # One signature for both segments: shared keys have no sample axis.
    key_strides, value_strides = (
        x.stride() if own else (y[0], 0, *y[1:]) for x, y in ((x, _shared_strides(x)) for x in (k, v))
    )
    kernels._broadcast_attention_bwd_dkdv_kernel[(key_blocks * problem.kv_heads * (1 if packed else problem.batch),)](
        q, k, v, *(_pointer(x, q) for x in (lengths, cu_seqlens, mask, seed)),
        _pointer(_positions(problem.transform)[1], q), dout, lse, lse_correction, delta, dk, dv,
        *q.stride(), *key_strides, *value_strides, *dout.stride(), *_mask_strides(mask),
        problem.batch, problem.samples, problem.tokens, problem.shared, problem.own, key_count, key_blocks,
        problem.batch.bit_length(),
        problem.scale, problem.logit_scale, problem.keep_scale, dropout_threshold(problem.dropout_p),
        OWN=own, **_flags(problem, lengths, cu_seqlens, mask, own_causal),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, PRECISION=_precision(q),
        **config.options,
    )  # fmt: skip
