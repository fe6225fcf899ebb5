"""Calls the native CPU kernels of broadcast modulation (``csrc/cpu/broadcast_modulate.cpp``)."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from minidiff_fast import native
from minidiff_fast.errors import BackendUnavailable, NativeError
from minidiff_fast.ops._broadcast_modulate_op import statistics_shapes

NORMS = {"": 0, "layer": 1, "rms": 2, "group": 3}
ACTIVATIONS = {"": 0, "silu": 1, "mish": 2}

LONGEST_RUN = 16
"""Samples whose parameter gradients one unit of work adds up; more would round more."""
ENOUGH_UNITS = 32
"""Units of work wanted for the threads; depends on no thread count, and so neither does a result."""

_SIZES = ("conditions", "samples", "tokens", "channels", "groups", "sample_run")
_FLAGS = (
    "norm", "activation", "at_output", "one_plus_scale", "channels_first", "is_bfloat16", "portable", "threads",
)  # fmt: skip
_PARAMETERS = ("shift", "scale", "gate", "own_shift", "own_scale", "own_gate", "weight", "bias")
_POINTERS = (
    "x", "residual", "dy", *_PARAMETERS, "mean", "rstd", "y", "dx",
    "dshift", "dscale", "dgate", "dweight", "dbias", "down_shift", "down_scale", "down_gate",
)  # fmt: skip


class _Arguments(ctypes.Structure):
    """``minidiff_fast_broadcast_modulate`` of csrc/minidiff_fast.h."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_int32) for name in _FLAGS),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    )


def launch_forward(
    x: Tensor,  # [B, K, T, C], channels_first: [B, K, C, T]
    shift: Tensor | None,  # [B, C]
    scale: Tensor | None,  # [B, C]
    gate: Tensor | None,  # [B, C]
    own_shift: Tensor | None,  # [B, K, C]
    own_scale: Tensor | None,  # [B, K, C]
    own_gate: Tensor | None,  # [B, K, C]
    residual: Tensor | None,  # like x
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    norm: str,
    num_groups: int,
    eps: float,
    activation: str,
    activation_at: str,
    form: str,
    channels_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y like x; mean and rstd, float32: [B, K, T] (layer, rms), [B, K, num_groups] (group), empty where unused."""
    mean, rstd = (
        torch.empty(shape, dtype=torch.float32)
        for shape in statistics_shapes(x.shape, norm, num_groups, channels_first)
    )
    turned = channels_first and norm in ("layer", "rms")  # one token's channels must lie together
    if turned:
        x, residual = x.transpose(2, 3), None if residual is None else residual.transpose(2, 3)
    x = x.contiguous()
    y = torch.empty_like(x)
    tensors = _parameters((shift, scale, gate, own_shift, own_scale, own_gate, weight, bias))
    tensors.update(x=x, residual=None if residual is None else residual.contiguous(), mean=mean, rstd=rstd, y=y)
    _call(
        "forward", tensors,
        _options(x, norm, num_groups, eps, activation, activation_at, form, channels_first and not turned),
    )  # fmt: skip
    return y.transpose(2, 3).contiguous() if turned else y, mean, rstd


def launch_backward(
    dy: Tensor,  # like x
    x: Tensor,  # [B, K, T, C], channels_first: [B, K, C, T]
    shift: Tensor | None,  # [B, C]
    scale: Tensor | None,  # [B, C]
    gate: Tensor | None,  # [B, C]
    own_shift: Tensor | None,  # [B, K, C]
    own_scale: Tensor | None,  # [B, K, C]
    own_gate: Tensor | None,  # [B, K, C]
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    mean: Tensor,  # [B, K, T], [B, K, num_groups] or empty
    rstd: Tensor,  # [B, K, T], [B, K, num_groups] or empty
    norm: str,
    num_groups: int,
    eps: float,
    activation: str,
    activation_at: str,
    form: str,
    channels_first: bool,
    need: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of x, shift, scale, gate, own_shift, own_scale, own_gate, weight, bias; empty where not needed."""
    turned = channels_first and norm in ("layer", "rms")
    if turned:
        x, dy = x.transpose(2, 3), dy.transpose(2, 3)
    x = x.contiguous()
    parameters = (shift, scale, gate, own_shift, own_scale, own_gate, weight, bias)
    wanted = [tensor is not None and asked for tensor, asked in zip(parameters, need[1:], strict=True)]
    options = _options(x, norm, num_groups, eps, activation, activation_at, form, channels_first and not turned)
    runs = -(-options["samples"] // options["sample_run"])
    batch, samples, channels = options["conditions"], options["samples"], options["channels"]

    tensors = _parameters(parameters)
    dx = torch.empty_like(x) if need[0] else None
    tensors.update(x=x, dy=dy.contiguous(), mean=mean, rstd=rstd, dx=dx)
    made: dict[str, Tensor] = {}
    for name, asked in zip(_PARAMETERS, wanted, strict=True):
        own = name.startswith("own_")
        if asked:
            made[name] = torch.empty((batch, samples if own else runs, channels), dtype=torch.float32)
            tensors[f"d{name}"] = made[name]
    _call("backward", tensors, options)

    gradients = [x.new_empty(0) if dx is None else dx.transpose(2, 3).contiguous() if turned else dx]
    for name, tensor in zip(_PARAMETERS, parameters, strict=True):
        if tensor is None or name not in made:
            gradients.append((x if tensor is None else tensor).new_empty(0))
            continue
        gradient = made[name]
        if not name.startswith("own_"):
            gradient = gradient.sum(1) if runs != 1 else gradient[:, 0]
            gradient = gradient.sum(0) if name in ("weight", "bias") else gradient
        gradients.append(gradient if gradient.dtype == tensor.dtype else gradient.to(tensor.dtype))
    return tuple(gradients)


def _parameters(tensors: tuple[Tensor | None, ...]) -> dict[str, Tensor | None]:
    """By name, as the kernels read them; absent ones are left out."""
    return {
        # Asked first: the calls that would change nothing cost as much as a small kernel.
        name: tensor if tensor.dtype == torch.float32 and tensor.is_contiguous() else tensor.float().contiguous()
        for name, tensor in zip(_PARAMETERS, tensors, strict=True)
        if tensor is not None
    }


def _options(
    x: Tensor, norm: str, num_groups: int, eps: float, activation: str, activation_at: str, form: str, first: bool
) -> dict[str, Any]:
    """The fields of :class:`_Arguments` that are no tensors."""
    batch, samples = x.shape[:2]
    channels, tokens = x.shape[2:] if first else (x.shape[3], x.shape[2])
    independent = batch * (num_groups if norm == "group" else 1)
    runs = max(-(-samples // LONGEST_RUN), min(samples, -(-ENOUGH_UNITS // max(independent, 1))), 1)
    return {
        "conditions": batch,
        "samples": samples,
        "tokens": tokens,
        "channels": channels,
        "groups": num_groups,
        "sample_run": max(-(-samples // runs), 1),
        "norm": NORMS[norm],
        "activation": ACTIVATIONS[activation],
        "at_output": activation_at == "output",
        "one_plus_scale": form == "adaln",
        "channels_first": first,
        "is_bfloat16": x.dtype == torch.bfloat16,
        "portable": native.portable_simd(),
        "threads": torch.get_num_threads(),
        "eps": eps,
    }


@cache
def _function(direction: str) -> Any:
    library = native.load()
    if library is None:
        raise BackendUnavailable(f"broadcast_modulate: {native.why_missing()}")
    return library.function(f"minidiff_fast_broadcast_modulate_{direction}", [ctypes.POINTER(_Arguments)])


def _call(direction: str, tensors: dict[str, Tensor | None], options: dict[str, Any]) -> None:
    """Run the kernel on the tensors' memory; they outlive the call because the caller holds them."""
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items() if tensor is not None}
    arguments = _Arguments(size=ctypes.sizeof(_Arguments), **options, **addresses)
    status = _function(direction)(ctypes.byref(arguments))
    if status != 0:
        raise NativeError(f"broadcast_modulate: the native {direction} kernel returned {status} ({options})")
