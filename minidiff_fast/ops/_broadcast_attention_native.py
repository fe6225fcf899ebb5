"""Launches the native CPU kernels of broadcast attention: addresses, sizes and strides into one C structure."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from minidiff_fast import native
from minidiff_fast.errors import BackendUnavailable, NativeError
from minidiff_fast.ops.philox import dropout_threshold

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_NUMBERS = (
    "size", "dtype", "threads", "portable", "batch", "samples", "tokens", "heads", "kv_heads", "width", "shared",
    "own", "own_causal", "own_column", "dropout_threshold",
)  # fmt: skip
_STRIDES = {"q": 5, "k": 4, "v": 4, "own_k": 5, "own_v": 5, "mask": 3}


class _Call(ctypes.Structure):
    """``minidiff_fast_broadcast_attention`` of csrc/minidiff_fast.h, member by member."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _NUMBERS),
        *((name, ctypes.c_double) for name in ("scale", "keep_scale")),
        *((name, ctypes.c_void_p) for name in ("seed", "q", "k", "v", "own_k", "own_v", "lengths")),
        ("lengths_size", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("cu_seqlens", "mask")),
        *((f"{name}_strides", ctypes.c_int64 * axes) for name, axes in _STRIDES.items()),
        *((name, ctypes.c_void_p) for name in ("out", "lse", "lse_correction", "dout")),
        ("dout_strides", ctypes.c_int64 * 5),
        *((name, ctypes.c_void_p) for name in ("dlse", "dq", "dk", "dv", "down_k", "down_v")),
    ]


@functools.cache
def _function(direction: str) -> Any:
    """The C function ``forward`` or ``backward``."""
    library = native.load()
    if library is None:
        raise BackendUnavailable(f"broadcast_attention: impl='native' cannot run: {native.why_missing()}")
    return library.function(f"minidiff_fast_broadcast_attention_{direction}", [ctypes.POINTER(_Call)])


def _address(tensor: Tensor | None) -> int | None:
    """Null for no tensor and for an empty one: neither is read or written."""
    return None if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def _mask_strides(mask: Tensor) -> tuple[int, ...]:
    """Strides of [B or 1, T or 1, S], 0 along the axes that broadcast."""
    return tuple(0 if mask.shape[i] == 1 and i < 2 else mask.stride(i) for i in range(3))


def _call(
    q: Tensor, k: Tensor, v: Tensor, own_k: Tensor | None, own_v: Tensor | None, lengths: Tensor | None,
    cu_seqlens: Tensor | None, mask: Tensor | None, seed: Tensor | None, own_causal: bool, dropout_p: float,
    scale: float,
) -> _Call:  # fmt: skip
    batch, samples, tokens, heads, width = q.shape
    packed = cu_seqlens is not None
    shared = k.shape[0] if packed else k.shape[1]
    own = 0 if own_k is None else own_k.shape[2]
    call = _Call(
        ctypes.sizeof(_Call), _DTYPES[q.dtype], torch.get_num_threads(), native.portable_simd(),
        batch, samples, tokens, heads, k.shape[-2], width, shared, own, own_causal, shared,
        dropout_threshold(dropout_p), scale, 1.0 / (1.0 - dropout_p), _address(seed),
        _address(q), _address(k), _address(v), _address(own_k), _address(own_v),
        _address(lengths), 0 if lengths is None else lengths.element_size(), _address(cu_seqlens), _address(mask),
    )  # fmt: skip
    call.q_strides[:] = q.stride()
    call.k_strides[:], call.v_strides[:] = (((0, *x.stride()) if packed else x.stride()) for x in (k, v))
    if own_k is not None and own_v is not None:
        call.own_k_strides[:], call.own_v_strides[:] = own_k.stride(), own_v.stride()
    if mask is not None:
        call.mask_strides[:] = _mask_strides(mask)
    return call


def _run(direction: str, call: _Call) -> None:
    status = _function(direction)(ctypes.byref(call))
    if status != 0:
        raise NativeError(
            f"broadcast_attention: the native {direction} kernel returned {status} "
            "(csrc/minidiff_fast.h: -1 an argument it refuses, -2 no memory for its work space)"
        )


def _plain(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """Contiguous, in ``dtype`` when given."""
    return None if tensor is None else tensor.to(dtype or tensor.dtype).contiguous()


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, own_k: Tensor | None, own_v: Tensor | None, lengths: Tensor | None,
    cu_seqlens: Tensor | None, mask: Tensor | None, seed: Tensor | None, own_causal: bool, dropout_p: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """out [B, K, T, H, D]; lse [B, K, T, H] float32; lse_correction, of the shape of lse or empty."""
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32)
    lse_correction = torch.empty_like(lse) if q.dtype == torch.float32 else lse.new_empty(0)
    lengths, cu_seqlens = _plain(lengths), _plain(cu_seqlens, torch.int32)
    call = _call(q, k, v, own_k, own_v, lengths, cu_seqlens, mask, seed, own_causal, dropout_p, scale)
    call.out, call.lse, call.lse_correction = _address(out), _address(lse), _address(lse_correction)
    _run("forward", call)
    return out, lse, lse_correction


def launch_backward(
    dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, own_k: Tensor | None, own_v: Tensor | None,
    out: Tensor, lse: Tensor, lse_correction: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None,
    mask: Tensor | None, seed: Tensor | None, own_causal: bool, dropout_p: float, scale: float,
    *, need_q: bool = True, need_shared: bool = True, need_own: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, down_k, down_v; empty where not needed."""
    lengths, cu_seqlens, dlse = _plain(lengths), _plain(cu_seqlens, torch.int32), dlse.contiguous()
    # Without rows no kernel runs, and packed tokens may belong to no condition: their gradients are 0.
    zeros = q.numel() == 0 or cu_seqlens is not None

    def like(x: Tensor | None, needed: bool) -> Tensor:
        return (torch.zeros if zeros else torch.empty)(x.shape if needed and x is not None else (0,), dtype=q.dtype)

    dq, dk, dv = like(q, need_q), like(k, need_shared), like(v, need_shared)
    down_k, down_v = like(own_k, need_own), like(own_v, need_own)
    call = _call(q, k, v, own_k, own_v, lengths, cu_seqlens, mask, seed, own_causal, dropout_p, scale)
    call.out, call.lse, call.lse_correction = _address(out), _address(lse), _address(lse_correction)
    call.dout, call.dlse, call.dout_strides[:] = _address(dout), _address(dlse), dout.stride()
    call.dq, call.dk, call.dv = _address(dq), _address(dk), _address(dv)
    call.down_k, call.down_v = _address(down_k), _address(down_v)
    _run("backward", call)
    return dq, dk, dv, down_k, down_v
