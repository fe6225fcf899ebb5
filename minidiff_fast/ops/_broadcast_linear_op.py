"""Schema, fake and autograd of ``minidiff_fast::broadcast_linear_fwd`` and ``_bwd``; Triton loads when they run."""

from __future__ import annotations

import importlib
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from minidiff_fast.ops._eager import eager_function

LAUNCHERS = {"triton": "launch"}
"""Per implementation the end of the name of the module with its ``launch_forward`` and ``launch_backward``."""


def _launcher(impl: str) -> ModuleType:
    """The module that launches the kernels of ``impl``."""
    return importlib.import_module(f"minidiff_fast.ops._broadcast_linear_{LAUNCHERS[impl]}")


def _run_forward(
    x: Tensor,  # [B, K, ..., Cx]
    g: Tensor,  # [B, Cg]
    weight: Tensor,  # [Co, Cx + Cg] or [Co, C]
    bias: Tensor | None,  # [Co]
    activation: str,
    combine: str,
    impl: str,
) -> Tensor:
    """y [B, K, ..., Co]; activation is "" for none."""
    return _launcher(impl).launch_forward(x, g, weight, bias, activation, combine)


broadcast_linear_fwd = torch.library.custom_op("minidiff_fast::broadcast_linear_fwd", _run_forward, mutates_args=())


@broadcast_linear_fwd.register_fake
def _(x, g, weight, bias, activation, combine, impl):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _run_backward(
    dy: Tensor,  # [B, K, ..., Co]
    x: Tensor,
    g: Tensor,
    weight: Tensor,
    activation: str,
    combine: str,
    impl: str,
    need_x: bool,
    need_g: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dg, dweight, dbias, each of its input's shape and dtype; those that are not needed are empty."""
    return _launcher(impl).launch_backward(
        dy, x, g, weight, activation, combine,
        need_x=need_x, need_g=need_g, need_weight=need_weight, need_bias=need_bias,
    )  # fmt: skip


broadcast_linear_bwd = torch.library.custom_op("minidiff_fast::broadcast_linear_bwd", _run_backward, mutates_args=())


@broadcast_linear_bwd.register_fake
def _(dy, x, g, weight, activation, combine, impl, need_x, need_g, need_weight, need_bias):  # type: ignore[no-untyped-def]
    def like(shape, needed):  # type: ignore[no-untyped-def]
        return x.new_empty(shape if needed else (0,))

    return like(x.shape, need_x), like(g.shape, need_g), like(weight.shape, need_weight), like(
        (weight.shape[0],), need_bias
    )  # fmt: skip


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, g, weight, _, ctx.activation, ctx.combine, ctx.impl = inputs
    ctx.save_for_backward(x, g, weight)


def _backward(run, ctx, dy):  # type: ignore[no-untyped-def]
    needs = ctx.needs_input_grad[:4]
    gradients = run(dy, *ctx.saved_tensors, ctx.activation, ctx.combine, ctx.impl, *needs)
    return *(x if needed else None for x, needed in zip(gradients, needs, strict=True)), None, None, None


broadcast_linear_fwd.register_autograd(partial(_backward, broadcast_linear_bwd), setup_context=_setup_context)
broadcast_linear_eager = eager_function(
    "BroadcastLinear", _run_forward, _setup_context, partial(_backward, _run_backward)
)
