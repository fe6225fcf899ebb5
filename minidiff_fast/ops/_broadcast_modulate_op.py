"""Schema, fake and autograd of ``minidiff_fast::broadcast_modulate_fwd`` and ``_bwd``; kernels load when they run."""

from __future__ import annotations

import importlib
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from minidiff_fast.ops._eager import eager_function

LAUNCHERS = {"triton": "launch", "native": "native"}
"""Per implementation the end of the name of the module with its ``launch_forward`` and ``launch_backward``."""


def _launcher(impl: str) -> ModuleType:
    """The module that launches the kernels of ``impl``."""
    return importlib.import_module(f"minidiff_fast.ops._broadcast_modulate_{LAUNCHERS[impl]}")


def _run_forward(
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
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """y like x; mean and rstd, float32: [B, K, T] (layer, rms), [B, K, num_groups] (group), empty where unused."""
    return _launcher(impl).launch_forward(
        x, shift, scale, gate, own_shift, own_scale, own_gate, residual, weight, bias,
        norm, num_groups, eps, activation, activation_at, form, channels_first,
    )  # fmt: skip


broadcast_modulate_fwd = torch.library.custom_op("minidiff_fast::broadcast_modulate_fwd", _run_forward, mutates_args=())


@broadcast_modulate_fwd.register_fake
def _(  # type: ignore[no-untyped-def]
    x, shift, scale, gate, own_shift, own_scale, own_gate, residual, weight, bias,
    norm, num_groups, eps, activation, activation_at, form, channels_first, impl,
):  # fmt: skip
    mean, rstd = statistics_shapes(x.shape, norm, num_groups, channels_first)
    return x.new_empty(x.shape), x.new_empty(mean, dtype=torch.float32), x.new_empty(rstd, dtype=torch.float32)


def statistics_shapes(
    shape: torch.Size, norm: str, num_groups: int, channels_first: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of mean and rstd."""
    if norm == "":
        return (0,), (0,)
    tokens = shape[3] if channels_first else shape[2]
    full = (shape[0], shape[1], num_groups if norm == "group" else tokens)
    return ((0,) if norm == "rms" else full), full


def _run_backward(
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
    impl: str,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, shift, scale, gate, own_shift, own_scale, own_gate, weight, bias, each of its input's shape and
    dtype; those that ``need`` (in this order) does not ask for are empty."""
    return _launcher(impl).launch_backward(
        dy, x, shift, scale, gate, own_shift, own_scale, own_gate, weight, bias, mean, rstd,
        norm, num_groups, eps, activation, activation_at, form, channels_first, need,
    )  # fmt: skip


broadcast_modulate_bwd = torch.library.custom_op(
    "minidiff_fast::broadcast_modulate_bwd", _run_backward, mutates_args=()
)


@broadcast_modulate_bwd.register_fake
def _(  # type: ignore[no-untyped-def]
    dy, x, shift, scale, gate, own_shift, own_scale, own_gate, weight, bias, mean, rstd,
    norm, num_groups, eps, activation, activation_at, form, channels_first, impl, need,
):  # fmt: skip
    inputs = (x, shift, scale, gate, own_shift, own_scale, own_gate, weight, bias)
    return tuple(
        x.new_empty((0,)) if tensor is None or not needed else tensor.new_empty(tensor.shape)
        for tensor, needed in zip(inputs, need, strict=True)
    )


RESIDUAL = 7
"""Place of ``residual`` among the inputs of the forward op; the backward op neither reads it nor its gradient."""


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    tensors, ctx.options = inputs[:10], inputs[10:]
    _, mean, rstd = output
    ctx.save_for_backward(*tensors[:RESIDUAL], *tensors[RESIDUAL + 1 :], mean, rstd)


def _backward(run, ctx, dy, *_):  # type: ignore[no-untyped-def]
    saved, wanted = ctx.saved_tensors, ctx.needs_input_grad[:10]
    need = [*wanted[:RESIDUAL], *wanted[RESIDUAL + 1 :]]
    if dy is None:
        dy = torch.zeros_like(saved[0])
    gradients: list[Tensor | None] = [None] * 9
    if any(need):
        made = run(dy, *saved, *ctx.options, need)
        gradients = [gradient if asked else None for gradient, asked in zip(made, need, strict=True)]
    residual = dy if wanted[RESIDUAL] else None
    return *gradients[:RESIDUAL], residual, *gradients[RESIDUAL:], *[None] * 8


broadcast_modulate_fwd.register_autograd(partial(_backward, broadcast_modulate_bwd), setup_context=_setup_context)
broadcast_modulate_eager = eager_function(
    "BroadcastModulate", _run_forward, _setup_context, partial(_backward, _run_backward)
)
