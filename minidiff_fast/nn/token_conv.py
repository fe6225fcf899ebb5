"""Convolutions over few tokens as matrix products, channels last: what a CPU runs fast.

Action chunks are short (16, 8, 4 tokens), so gathering the k taps of every token is cheap beside the product with the
weight, and the product runs at the rate of the matrix library; library convolutions over such short rows do not.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.shapes import check_shape, describe


def token_conv1d(
    x: Tensor,  # [N, T, C]
    weight: Tensor,  # [Co, C, k], as nn.Conv1d
    bias: Tensor | None = None,  # [Co]
    stride: int = 1,
    padding: int = 0,
) -> Tensor:  # [N, To, Co], To = (T + 2 padding - k) // stride + 1
    r"""``F.conv1d`` with channels last: :math:`y_{to} = b_o + \sum_{j,c} W_{ocj} \, x_{t s + j - p,\, c}`.

    autograd keeps x and the weight alone; the k-fold taps are gathered again in the backward pass. Under autocast x,
    weight and bias are taken in its dtype, as ``F.conv1d`` does. Differentiable any number of times.

    Raises :class:`InvalidArgument` for shapes that do not fit.

    >>> x, conv = torch.randn(2, 8, 3), torch.nn.Conv1d(3, 5, 3, padding=1)
    >>> token_conv1d(x, conv.weight, conv.bias, padding=1).shape
    torch.Size([2, 8, 5])
    """
    _check("token_conv1d", x, weight, bias, ("Co", x.shape[-1], "k"), "[Co, C, k]", weight.shape[0])
    if stride < 1 or padding < 0:
        raise InvalidArgument(f"token_conv1d: stride >= 1 and padding >= 0 are needed, got {stride} and {padding}")
    if x.shape[1] + 2 * padding < weight.shape[2]:
        raise InvalidArgument(
            f"token_conv1d: x must have T + 2 padding >= k = {weight.shape[2]}, got T = {x.shape[1]}, "
            f"padding = {padding}"
        )
    x, weight, bias = _autocast(x, weight, bias)
    if weight.shape[2] == 1 and stride == 1 and padding == 0:
        return F.linear(x, weight.squeeze(2), bias)
    y: Tensor = _TokenConv.apply(x, weight, bias, stride, padding)
    return y


def token_conv_transpose1d(
    x: Tensor,  # [N, T, C]
    weight: Tensor,  # [C, Co, k], as nn.ConvTranspose1d
    bias: Tensor | None = None,  # [Co]
    stride: int = 1,
    padding: int = 0,
) -> Tensor:  # [N, To, Co], To = (T - 1) stride - 2 padding + k
    """``F.conv_transpose1d`` with channels last: the adjoint of :func:`token_conv1d`, which see."""
    _check("token_conv_transpose1d", x, weight, bias, (x.shape[-1], "Co", "k"), "[C, Co, k]", weight.shape[1])
    if stride < 1 or padding < 0:
        raise InvalidArgument(
            f"token_conv_transpose1d: stride >= 1 and padding >= 0 are needed, got {stride} and {padding}"
        )
    tokens = (x.shape[1] - 1) * stride - 2 * padding + weight.shape[2]
    if tokens < 1:
        raise InvalidArgument(f"token_conv_transpose1d: x must give at least one token, got {tokens} from {x.shape[1]}")
    x, weight, bias = _autocast(x, weight, bias)
    y: Tensor = _TokenConvTranspose.apply(x, weight, bias, stride, padding, tokens)
    return y


def _check(
    function: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    expected: tuple[int | str, ...],
    letters: str,
    outputs: int,
) -> None:
    context = partial(describe, x=x, weight=weight, bias=bias)
    check_shape(function, "x", x, ["N", "T", "C"], "[N, T, C]", context)
    check_shape(function, "weight", weight, list(expected), letters, context)
    if bias is not None:
        check_shape(function, "bias", bias, [outputs], "[Co]", context)


def _autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _taps(x: Tensor, k: int, stride: int, padding: int) -> Tensor:
    """[N, T, C] -> [N, To, C * k], the order of channels and taps that a Conv1d weight has."""
    if padding:
        x = F.pad(x, (0, 0, padding, padding))
    return x.unfold(1, k, stride).flatten(2)


def _scatter(taps: Tensor, shape: tuple[int, int, int], k: int, stride: int, padding: int) -> Tensor:
    """The adjoint of :func:`_taps`: [N, To, C * k] -> ``shape`` = [N, T, C], summed tap by tap in a fixed order."""
    tokens = shape[1]
    taps = taps.unflatten(2, (shape[2], k))
    x = taps.new_zeros(shape)
    for j in range(k):
        offset = j - padding  # output token o reads input token o * stride + offset
        first = max(0, -(offset // stride))
        last = min(taps.shape[1], (tokens - 1 - offset) // stride + 1)
        if first < last:
            begin, end = first * stride + offset, (last - 1) * stride + offset + 1
            x[:, begin:end:stride] += taps[:, first:last, :, j]
    return x


def _products(a: Tensor, b: Tensor) -> Tensor:
    """[N, T, C], [N, T, D] -> [C, D], summed over N and T."""
    return a.flatten(0, 1).t() @ b.flatten(0, 1)


class _TokenConv(torch.autograd.Function):
    """y = taps(x) W^T + bias, [N, To, Co]."""

    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        ctx.geometry = (weight.shape[2], stride, padding)
        return F.linear(_taps(x, *ctx.geometry), weight.flatten(1), bias)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = _scatter(dy @ weight.flatten(1), x.shape, *ctx.geometry)
        if ctx.needs_input_grad[1]:
            dweight = _products(dy, _taps(x, *ctx.geometry)).view(weight.shape)
        if ctx.needs_input_grad[2]:
            dbias = dy.sum((0, 1))
        return dx, dweight, dbias, None, None


class _TokenConvTranspose(torch.autograd.Function):
    """y = scatter(x W) + bias, [N, To, Co]."""

    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding, tokens):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        ctx.geometry = (weight.shape[2], stride, padding)
        shape = (x.shape[0], tokens, weight.shape[1])
        y = _scatter(x @ weight.flatten(1), shape, *ctx.geometry)
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        taps = _taps(dy, *ctx.geometry)
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = taps @ weight.flatten(1).t()
        if ctx.needs_input_grad[1]:
            dweight = _products(x, taps).view(weight.shape)
        if ctx.needs_input_grad[2]:
            dbias = dy.sum((0, 1))
        return dx, dweight, dbias, None, None, None
