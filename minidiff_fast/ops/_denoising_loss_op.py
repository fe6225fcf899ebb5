"""Schema, fake and autograd of ``minidiff_fast::denoising_loss_fwd`` and ``_bwd``; Triton loads when they run."""

from __future__ import annotations

import importlib
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from minidiff_fast.ops._eager import eager_function

LAUNCHERS = {"triton": "launch"}
"""Per implementation the end of the name of the module with its ``launch_forward`` and ``launch_backward``."""


def _run_forward(
    pred: Tensor,  # [B, K, T, A]
    target: Tensor,  # [B, K, T, A]
    mask: Tensor | None,  # [B, T] or [B, K, T]
    kind: str,
    delta: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """The loss of every sample without weights, and what its sum was multiplied with; both [B, K] float32."""
    return _launcher(impl).launch_forward(pred, target, mask, kind, delta)


def _launcher(impl: str) -> ModuleType:
    """The module that launches the kernels of ``impl``."""
    return importlib.import_module(f"minidiff_fast.ops._denoising_loss_{LAUNCHERS[impl]}")


denoising_loss_fwd = torch.library.custom_op("minidiff_fast::denoising_loss_fwd", _run_forward, mutates_args=())


@denoising_loss_fwd.register_fake
def _(pred, target, mask, kind, delta, impl):  # type: ignore[no-untyped-def]
    loss = pred.new_empty(pred.shape[:2], dtype=torch.float32)
    return loss, torch.empty_like(loss)


def _run_backward(
    dloss: Tensor,  # [B, K]
    pred: Tensor,  # [B, K, T, A]
    target: Tensor,  # [B, K, T, A]
    mask: Tensor | None,  # [B, T] or [B, K, T]
    share: Tensor,  # [B, K]
    kind: str,
    delta: float,
    impl: str,
) -> Tensor:
    """dpred, of the shape and dtype of pred."""
    return _launcher(impl).launch_backward(dloss, pred, target, mask, share, kind, delta)


denoising_loss_bwd = torch.library.custom_op("minidiff_fast::denoising_loss_bwd", _run_backward, mutates_args=())


@denoising_loss_bwd.register_fake
def _(dloss, pred, target, mask, share, kind, delta, impl):  # type: ignore[no-untyped-def]
    return pred.new_empty(pred.shape)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    pred, target, mask, ctx.kind, ctx.delta, ctx.impl = inputs
    ctx.save_for_backward(pred, target, mask, output[1])


def _backward(run, ctx, dloss, _):  # type: ignore[no-untyped-def]
    pred, target, mask, share = ctx.saved_tensors
    dpred = None
    if ctx.needs_input_grad[0]:
        dloss = torch.zeros_like(share) if dloss is None else dloss
        dpred = run(dloss, pred, target, mask, share, ctx.kind, ctx.delta, ctx.impl)
    return dpred, None, None, None, None, None


denoising_loss_fwd.register_autograd(partial(_backward, denoising_loss_bwd), setup_context=_setup_context)
denoising_loss_eager = eager_function("DenoisingLoss", _run_forward, _setup_context, partial(_backward, _run_backward))
