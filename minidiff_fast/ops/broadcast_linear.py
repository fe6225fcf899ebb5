"""Broadcast linear: a linear layer over [sample, condition] that computes the condition's part once per condition."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from minidiff_fast import backend
from minidiff_fast.errors import InvalidArgument
from minidiff_fast.ops._broadcast_linear_op import broadcast_linear_eager, broadcast_linear_fwd
from minidiff_fast.ops._eager import watched
from minidiff_fast.shapes import check_same, check_shape, describe

NAME = "broadcast_linear"
BACKENDS = backend.register(backend.OpBackends(NAME, {"triton": backend.why_not_triton}))

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {None: lambda x: x, "silu": F.silu, "mish": F.mish}
"""The activations that the op knows, by name."""
COMBINES = ("cat", "sum")


def broadcast_linear(
    x: Tensor,  # [B, K, ..., Cx]
    g: Tensor,  # [B, Cg]
    weight: Tensor,  # [Co, Cx + Cg] ("cat") or [Co, C] ("sum")
    bias: Tensor | None = None,  # [Co]
    *,
    activation: str | None = None,
    combine: str = "cat",
    impl: str | None = None,
) -> Tensor:
    r"""A linear layer whose input is part per sample (x) and part per condition (g).

    .. math::
        y_{bk} = W \, act([x_{bk}, g_b]) + bias = W_x \, act(x_{bk}) + (W_g \, act(g_b) + bias) \quad (cat)

        y_{bk} = W \, act(x_{bk} + g_b) + bias \quad (sum)

    with ``W = [W_x, W_g]``, the columns of x first. The activation works on every element by itself, so in the form
    "cat" the condition's part is one product per condition, added to the K samples' product. In the form "sum" it does
    not split: the addition and the activation are done on the way into the product. Neither form repeats g.

    Args:
        x: per sample, ``[B, K, ..., Cx]`` with any number of middle axes; float32, float16, bfloat16 (float64 on the
            reference).
        g: per condition, ``[B, Cg]``; Cg = Cx for "sum". The dtype and device of x.
        weight: ``[Co, Cx + Cg]`` for "cat": the weight of an ``nn.Linear`` over ``cat([x, g], -1)``; ``[Co, Cx]`` for
            "sum". The dtype and device of x.
        bias: ``[Co]`` or None. The dtype and device of x.
        activation: None, ``"silu"`` or ``"mish"``, before the product.
        combine: ``"cat"`` or ``"sum"``.
        impl: see :mod:`minidiff_fast.backend`. On a CPU ``auto`` is the reference: its products are BLAS's, and there
            is no native kernel to better them.

    Returns:
        ``[B, K, ..., Co]`` in the dtype of x.

    Raises:
        InvalidArgument: a shape, dtype, device or value is wrong; nothing has run.
        BackendUnavailable: the implementation asked for by name cannot run here.

    Under ``torch.autocast`` the inputs are cast to its dtype first, as ``torch.nn.functional.linear`` does. float32
    products follow ``torch.backends.cuda.matmul.fp32_precision``.

    Gradients: those of g, and of the weight's columns that meet g, sum over the K samples before anything else is done,
    in float32 and in a fixed order (bitwise the same from run to run). The kernels save x, g and weight and recompute
    the activation. Differentiable twice with ``impl="reference"`` only.

    Source: the conditional residual block of Diffusion Policy (Chi et al., arXiv 2303.04137; time and condition
    concatenated) and the time-plus-condition embedding of Mini-Diffuser (Hu et al., arXiv 2505.09430; added).

    >>> x, g, layer = torch.randn(2, 5, 8), torch.randn(2, 4), torch.nn.Linear(12, 16)
    >>> y = broadcast_linear(x, g, layer.weight, layer.bias, activation="mish")
    >>> repeated = torch.cat([x, g[:, None].expand(-1, 5, -1)], -1)
    >>> torch.allclose(y, layer(torch.nn.functional.mish(repeated)), atol=1e-5)
    True
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        with torch.autocast(x.device.type, enabled=False):
            return broadcast_linear(
                _lowered(x, dtype), _lowered(g, dtype), _lowered(weight, dtype),
                None if bias is None else _lowered(bias, dtype), activation=activation, combine=combine, impl=impl,
            )  # fmt: skip
    _check(x, g, weight, bias, activation, combine)
    chosen = backend.resolve(BACKENDS, impl, x.device, x.dtype)
    if chosen == "reference":
        return broadcast_linear_reference(x, g, weight, bias, activation=activation, combine=combine)
    run = broadcast_linear_fwd if watched(x, g, weight, bias) else broadcast_linear_eager
    return run(x, g, weight, bias, activation or "", combine, chosen)


def _lowered(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What autocast does to an input: 16 and 32-bit floats take its dtype, the others stay."""
    return x.to(dtype) if x.dtype in (torch.float32, torch.float16, torch.bfloat16) else x


def broadcast_linear_reference(
    x: Tensor,  # [B, K, ..., Cx]
    g: Tensor,  # [B, Cg]
    weight: Tensor,  # [Co, Cx + Cg] ("cat") or [Co, C] ("sum")
    bias: Tensor | None = None,  # [Co]
    *,
    activation: str | None = None,
    combine: str = "cat",
) -> Tensor:
    """The definition of :func:`broadcast_linear`: plain PyTorch, any dtype, differentiable any number of times.

    g is never repeated.
    """
    act = ACTIVATIONS[activation]
    if combine == "sum":
        return F.linear(act(x + _over_samples(g, x)), weight, bias)
    of_sample, of_condition = weight.split([x.shape[-1], g.shape[-1]], 1)
    own, shared = _product(act(x), of_sample), _product(act(g), of_condition)
    return own + _over_samples(shared if bias is None else shared + bias, x)


def _product(
    x: Tensor,  # [..., Ci]
    weight: Tensor,  # [Co, Ci]
) -> Tensor:  # [..., Co]
    """``linear`` in the order in which torch gives columns of a larger weight a gradient by rows, as the weight is."""
    rows = (weight @ x.flatten(0, -2).T).T
    return rows.reshape(*x.shape[:-1], weight.shape[0]).contiguous()


def _over_samples(per_condition: Tensor, x: Tensor) -> Tensor:
    """``[B, C]`` -> ``[B, 1, ..., 1, C]`` with as many axes as x; a view."""
    return per_condition.reshape(per_condition.shape[0], *[1] * (x.dim() - 2), per_condition.shape[1])


def _check(
    x: Tensor, g: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, combine: str
) -> None:  # fmt: skip
    """Every check, from metadata only: nothing here waits for the device."""
    context = partial(describe, x=x, g=g, weight=weight, bias=bias)
    if activation not in ACTIVATIONS:
        raise InvalidArgument(f"{NAME}: activation must be None, 'silu' or 'mish', got {activation!r}")
    if combine not in COMBINES:
        raise InvalidArgument(f"{NAME}: combine must be 'cat' or 'sum', got {combine!r}")
    if x.dim() < 3:
        raise InvalidArgument(f"{NAME}: x must be [B, K, ..., Cx], got {list(x.shape)} ({context()})")
    if not x.is_floating_point():
        raise InvalidArgument(f"{NAME}: x must be a floating-point tensor, got {x.dtype}")
    batch, width = x.shape[0], x.shape[-1]
    if combine == "sum":
        check_shape(NAME, "g", g, [batch, width], "[B, C]", context)
        check_shape(NAME, "weight", weight, ["Co", width], "[Co, C]", context)
    else:
        check_shape(NAME, "g", g, [batch, "Cg"], "[B, Cg]", context)
        check_shape(NAME, "weight", weight, ["Co", width + g.shape[1]], "[Co, Cx + Cg]", context)
    if bias is not None:
        check_shape(NAME, "bias", bias, [weight.shape[0]], "[Co]", context)
    check_same(NAME, "x", x, g=g, weight=weight, bias=bias)
