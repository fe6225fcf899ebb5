"""The denoising loss: weighted, masked, reduced per sample, per condition or in all, in float32."""

from __future__ import annotations

import math
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from minidiff_fast import backend
from minidiff_fast.errors import InvalidArgument
from minidiff_fast.ops._denoising_loss_op import denoising_loss_eager, denoising_loss_fwd
from minidiff_fast.ops._eager import watched
from minidiff_fast.shapes import check_shape, describe

NAME = "denoising_loss"
BACKENDS = backend.register(backend.OpBackends(NAME, {"triton": backend.why_not_triton}))

Kind = Literal["mse", "l1", "huber"]
Reduction = Literal["sample", "condition", "mean"]


def denoising_loss(
    pred: Tensor,  # [B, K, T, A]
    target: Tensor,  # [B, K, T, A]
    *,
    weight: Tensor | None = None,  # [B] or [B, K]
    mask: Tensor | None = None,  # [B, T] or [B, K, T] bool
    kind: Kind = "mse",
    delta: float = 1.0,
    reduction: Reduction = "sample",
    impl: str | None = None,
) -> Tensor:
    r"""How far predictions are from their targets: the mean over a sample's counted tokens of the mean over A.

    .. math::
        l_{bk} = w_{bk} \frac{\sum_t m_{bkt} \frac{1}{A} \sum_a e(pred_{bkta} - target_{bkta})}
            {\max(1, \sum_t m_{bkt})}

    with ``mse``: :math:`e(d) = d^2`; ``l1``: :math:`|d|`; ``huber``: :math:`d^2 / 2` where :math:`|d| \le \delta`, else
    :math:`\delta (|d| - \delta / 2)`. A sample none of whose tokens counts has loss 0. Tokens that do not count may
    hold anything, and get gradient 0.

    Args:
        pred: predictions ``[B, K, T, A]``; float32, float16, bfloat16 (float64 on the reference).
        target: ``[B, K, T, A]``, any floating-point dtype; may be a view that broadcasts. Gets no gradient.
        weight: factor on each sample's loss, ``[B]`` or ``[B, K]``; means still divide by the number of samples.
            Differentiable.
        mask: True where a token counts, ``[B, T]`` (per condition) or ``[B, K, T]``; None counts all.
        kind, delta: the error; delta > 0 is that of ``huber``.
        reduction: ``"sample"``: ``[B, K]``; ``"condition"``: ``[B]``, the mean over K; ``"mean"``: ``[]``.
        impl: see :mod:`minidiff_fast.backend`.

    Returns:
        float32 (float64 for float64 predictions).

    Raises:
        InvalidArgument: a shape, dtype, device or value is wrong; nothing has run.
        BackendUnavailable: the implementation asked for by name cannot run here.

    The kernels read pred and target once forward and once backward, and keep nothing of their size. Differentiable
    twice with ``impl="reference"`` only.

    >>> pred, target = torch.zeros(2, 3, 4, 5), torch.ones(2, 3, 4, 5)
    >>> denoising_loss(pred, target, reduction="condition").tolist()
    [1.0, 1.0]
    """
    _check(pred, target, weight, mask, kind, delta, reduction)
    chosen = backend.resolve(BACKENDS, impl, pred.device, pred.dtype)
    if chosen == "reference":
        return denoising_loss_reference(
            pred, target, weight=weight, mask=mask, kind=kind, delta=delta, reduction=reduction
        )
    run = denoising_loss_fwd if watched(pred, target, mask) else denoising_loss_eager
    loss, _ = run(pred, target.detach(), mask, kind, float(delta), chosen)
    return _reduced(loss, weight, reduction)


def denoising_loss_reference(
    pred: Tensor,  # [B, K, T, A]
    target: Tensor,  # [B, K, T, A]
    *,
    weight: Tensor | None = None,  # [B] or [B, K]
    mask: Tensor | None = None,  # [B, T] or [B, K, T] bool
    kind: Kind = "mse",
    delta: float = 1.0,
    reduction: Reduction = "sample",
) -> Tensor:
    """The definition of :func:`denoising_loss`: plain PyTorch, any dtype, differentiable any number of times."""
    accumulate = torch.promote_types(pred.dtype, torch.float32)
    difference = pred.to(accumulate) - target.detach().to(accumulate)
    if mask is not None:
        counted = mask if mask.dim() == 3 else mask[:, None]  # [B, K or 1, T]
        difference = difference.masked_fill(~counted[..., None], 0.0)
        count: Tensor | int = counted.sum(-1).clamp(min=1)
    else:
        count = max(pred.shape[2], 1)
    if kind == "mse":
        error = difference.square()
    elif kind == "l1":
        error = difference.abs()
    else:
        size = difference.abs()
        error = torch.where(size <= delta, 0.5 * difference.square(), delta * (size - 0.5 * delta))
    loss = error.sum((2, 3)) / (count * max(pred.shape[3], 1))
    return _reduced(loss, weight, reduction)


def _reduced(loss: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """Weights applied to ``[B, K]``, then the mean that was asked for; small beside what came before."""
    if weight is not None:
        loss = loss * (weight[:, None] if weight.dim() == 1 else weight).to(loss.dtype)
    if reduction == "sample":
        return loss
    return loss.mean(1) if reduction == "condition" else loss.mean()


def _check(
    pred: Tensor, target: Tensor, weight: Tensor | None, mask: Tensor | None, kind: str, delta: float, reduction: str
) -> None:
    """Every check, from metadata only: nothing here waits for the device."""
    context = partial(describe, pred=pred, target=target, weight=weight, mask=mask)
    check_shape(NAME, "pred", pred, ["B", "K", "T", "A"], "[B, K, T, A]", context)
    batch, samples, tokens, _ = pred.shape
    check_shape(NAME, "target", target, list(pred.shape), "[B, K, T, A]", context)
    for name, tensor in (("pred", pred), ("target", target), ("weight", weight)):
        if tensor is not None and not tensor.is_floating_point():
            raise InvalidArgument(f"{NAME}: {name} must be a floating-point tensor, got {tensor.dtype}")
    if weight is not None and tuple(weight.shape) not in ((batch,), (batch, samples)):
        raise InvalidArgument(
            f"{NAME}: weight must be [B] = [{batch}] or [B, K] = [{batch}, {samples}], got {list(weight.shape)} "
            f"({context()})"
        )
    if mask is not None:
        if mask.dtype != torch.bool:
            raise InvalidArgument(f"{NAME}: mask must be boolean (True = counts), got {mask.dtype}")
        if tuple(mask.shape) not in ((batch, tokens), (batch, samples, tokens)):
            raise InvalidArgument(
                f"{NAME}: mask must be [B, T] = [{batch}, {tokens}] or [B, K, T] = [{batch}, {samples}, {tokens}], "
                f"got {list(mask.shape)} ({context()})"
            )
    for name, tensor in (("target", target), ("weight", weight), ("mask", mask)):
        if tensor is not None and tensor.device != pred.device:
            raise InvalidArgument(f"{NAME}: {name} must be on the device of pred, {pred.device}, got {tensor.device}")
    if kind not in get_args(Kind):
        raise InvalidArgument(f"{NAME}: kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
    if reduction not in get_args(Reduction):
        raise InvalidArgument(f"{NAME}: reduction must be one of {', '.join(get_args(Reduction))}, got {reduction!r}")
    if not (math.isfinite(delta) and delta > 0.0):
        raise InvalidArgument(f"{NAME}: delta must be above 0, got {delta}")
