"""Broadcast modulation: FiLM and adaptive layer norm, parameters per condition plus parameters per sample."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from minidiff_fast import backend
from minidiff_fast.errors import InvalidArgument
from minidiff_fast.ops._broadcast_modulate_op import broadcast_modulate_eager, broadcast_modulate_fwd
from minidiff_fast.ops._eager import watched
from minidiff_fast.shapes import check_same, check_shape, describe

NAME = "broadcast_modulate"
BACKENDS = backend.register(
    backend.OpBackends(NAME, {"triton": backend.why_not_triton, "native": backend.why_not_native})
)

CHOICES = {
    "norm": (None, "layer", "rms", "group"),
    "activation": (None, "silu", "mish"),
    "activation_at": ("norm", "output"),
    "form": ("film", "adaln"),
}
ACTIVATIONS = {"silu": F.silu, "mish": F.mish}


def broadcast_modulate(
    x: Tensor,  # [B, K, T, C], channels_first: [B, K, C, T]
    *,
    shift: Tensor | None = None,  # [B, C]
    scale: Tensor | None = None,  # [B, C]
    gate: Tensor | None = None,  # [B, C]
    own_shift: Tensor | None = None,  # [B, K, C]
    own_scale: Tensor | None = None,  # [B, K, C]
    own_gate: Tensor | None = None,  # [B, K, C]
    residual: Tensor | None = None,  # like x
    norm: str | None = None,
    weight: Tensor | None = None,  # [C]
    bias: Tensor | None = None,  # [C]
    num_groups: int | None = None,
    eps: float = 1e-5,
    activation: str | None = None,
    activation_at: str = "norm",
    form: str = "film",
    channels_first: bool = False,
    impl: str | None = None,
) -> Tensor:  # like x
    r"""Normalise, activate, scale, shift, gate and add, with the condition's part of the parameters shared by its K
    samples.

    .. math::
        n &= \mathrm{norm}(x) \cdot weight + bias \\
        s &= shift_b + own\_shift_{bk}, \quad r = scale_b + own\_scale_{bk}, \quad g = gate_b + own\_gate_{bk} \\
        m &= r \text{ (film)} \quad\text{or}\quad 1 + r \text{ (adaln)} \\
        u &= m \cdot act(n) + s \text{ (norm)} \quad\text{or}\quad act(m \cdot n + s) \text{ (output)} \\
        y &= g \cdot u + residual

    What is None is left out: of two parts the absent one counts as 0; with neither scale m is 1, with neither gate g
    is 1, weight is 1 and the rest is 0. The condition's parts are read where they are: no copy per sample is made in
    the forward pass, in the backward pass or for autograd, which keeps x, the statistics and the parameters alone.

    Args:
        x: ``[B, K, T, C]``, with ``channels_first`` ``[B, K, C, T]``; float32, float16, bfloat16 (float64 on the
            reference); C at least 1, the other sizes may be 0. Any strides.
        shift, scale, gate: ``[B, C]``, per condition. This and every other parameter has any floating dtype of its
            own, and its gradient has that dtype.
        own_shift, own_scale, own_gate: ``[B, K, C]``, per sample.
        residual: added at the end; shape and dtype of x. Its gradient is that of the output.
        norm: ``None``; ``"layer"``: over C for every token; ``"rms"``: ``x / sqrt(mean_C(x^2) + eps)``; ``"group"``:
            over C / num_groups channels and the T tokens of one sample, as :class:`torch.nn.GroupNorm` does.
        weight, bias: ``[C]``, affine parameters after the norm (without a norm: of x itself).
        num_groups: with ``norm="group"`` only; divides C.
        eps: added to the variance (rms: to the mean square) under the root; at least 0.
        activation: ``None``, ``"silu"`` or ``"mish"``.
        activation_at: ``"norm"``: straight after the norm (the U-Net of Diffusion Policy: group norm, Mish, FiLM);
            ``"output"``: after scale and shift (a condition that is added before the activation).
        form: ``"film"`` multiplies by the scale, ``"adaln"`` by 1 + scale.
        channels_first: where C is; see x.
        impl: see :mod:`minidiff_fast.backend`.

    Returns:
        y of the shape and dtype of x. All arithmetic is float32 (float64 for float64 x); the variance is that of
        centred values.

    Raises:
        InvalidArgument: a shape, dtype, device or value is wrong; nothing has run.
        BackendUnavailable: the implementation asked for by name cannot run here.

    Gradients: those of per-condition parameters sum over K and T in float32 in a fixed order (bitwise the same from
    run to run). Differentiable twice with ``impl="reference"`` only.

    Sources: FiLM (Perez et al., arXiv 1709.07871); adaptive layer norm with a gate, DiT (Peebles and Xie, arXiv
    2212.09748); Diffusion Policy (Chi et al., arXiv 2303.04137).

    >>> x, shift, own_scale = torch.randn(2, 5, 3, 16), torch.randn(2, 16), torch.randn(2, 5, 16)
    >>> broadcast_modulate(x, shift=shift, own_scale=own_scale, norm="layer", form="adaln", impl="reference").shape
    torch.Size([2, 5, 3, 16])
    """
    _check_options(norm, num_groups, eps, activation, activation_at, form)
    _check_tensors(
        x, shift, scale, gate, own_shift, own_scale, own_gate, residual, weight, bias, num_groups, channels_first
    )
    chosen = backend.resolve(BACKENDS, impl, x.device, x.dtype)
    if chosen == "reference":
        return broadcast_modulate_reference(
            x, shift=shift, scale=scale, gate=gate, own_shift=own_shift, own_scale=own_scale, own_gate=own_gate,
            residual=residual, norm=norm, weight=weight, bias=bias, num_groups=num_groups, eps=eps,
            activation=activation, activation_at=activation_at, form=form, channels_first=channels_first,
        )  # fmt: skip
    unwatched = not watched(x, shift, scale, gate, own_shift, own_scale, own_gate, residual, weight, bias)
    run = broadcast_modulate_eager if unwatched else broadcast_modulate_fwd
    y, _, _ = run(
        x, shift, scale, gate, own_shift, own_scale, own_gate, residual, weight, bias,
        norm or "", num_groups or 0, float(eps), activation or "", activation_at, form, channels_first, chosen,
    )  # fmt: skip
    return y


def broadcast_modulate_reference(
    x: Tensor,  # [B, K, T, C], channels_first: [B, K, C, T]
    *,
    shift: Tensor | None = None,  # [B, C]
    scale: Tensor | None = None,  # [B, C]
    gate: Tensor | None = None,  # [B, C]
    own_shift: Tensor | None = None,  # [B, K, C]
    own_scale: Tensor | None = None,  # [B, K, C]
    own_gate: Tensor | None = None,  # [B, K, C]
    residual: Tensor | None = None,  # like x
    norm: str | None = None,
    weight: Tensor | None = None,  # [C]
    bias: Tensor | None = None,  # [C]
    num_groups: int | None = None,
    eps: float = 1e-5,
    activation: str | None = None,
    activation_at: str = "norm",
    form: str = "film",
    channels_first: bool = False,
) -> Tensor:  # like x
    """The definition of :func:`broadcast_modulate`: plain PyTorch, any dtype, differentiable any number of times."""
    accumulate = torch.promote_types(x.dtype, torch.float32)
    tokens = -1 if channels_first else -2  # the axis that parameters lack

    def both(shared: Tensor | None, own: Tensor | None) -> Tensor | None:  # [B, 1 or K, ...] against x
        parts = [] if shared is None else [shared[:, None]]
        parts += [] if own is None else [own]
        return sum(part.to(accumulate).unsqueeze(tokens) for part in parts) if parts else None  # type: ignore[return-value]

    def act(z: Tensor) -> Tensor:
        return z if activation is None else ACTIVATIONS[activation](z)

    n = _normalised(x.to(accumulate), norm, num_groups, eps, channels_first)
    if weight is not None:
        n = n * weight.to(accumulate).unsqueeze(tokens)
    if bias is not None:
        n = n + bias.to(accumulate).unsqueeze(tokens)
    u = act(n) if activation_at == "norm" else n
    r, s, g = both(scale, own_scale), both(shift, own_shift), both(gate, own_gate)
    if r is not None:
        u = u * (r if form == "film" else 1.0 + r)
    if s is not None:
        u = u + s
    if activation_at == "output":
        u = act(u)
    if g is not None:
        u = u * g
    if residual is not None:
        u = u + residual.to(accumulate)
    return u.to(x.dtype)


def _normalised(
    x: Tensor,  # [B, K, T, C] or [B, K, C, T]
    norm: str | None,
    num_groups: int | None,
    eps: float,
    channels_first: bool,
) -> Tensor:  # like x
    """norm(x) without its affine part; the variance is the mean square of centred values."""
    channels = 2 if channels_first else 3
    if norm is None:
        return x
    if norm == "rms":
        return x * torch.rsqrt(x.square().mean(channels, keepdim=True) + eps)
    over: tuple[int, ...] = (channels,)
    shape = x.shape
    if norm == "group":
        assert num_groups is not None
        x = x.unflatten(channels, (num_groups, shape[channels] // num_groups))
        over = (3, 4) if channels_first else (2, 4)
    centred = x - x.mean(over, keepdim=True)
    n = centred * torch.rsqrt(centred.square().mean(over, keepdim=True) + eps)
    return n.reshape(shape)


def _check_options(
    norm: str | None, num_groups: int | None, eps: float, activation: str | None, activation_at: str, form: str
) -> None:
    given = {"norm": norm, "activation": activation, "activation_at": activation_at, "form": form}
    for name, value in given.items():
        if value not in CHOICES[name]:
            known = ", ".join(repr(choice) for choice in CHOICES[name])
            raise InvalidArgument(f"{NAME}: {name} must be one of {known}, got {value!r}")
    if (norm == "group") != (num_groups is not None):
        raise InvalidArgument(f"{NAME}: num_groups belongs to norm='group', got {num_groups!r} with norm={norm!r}")
    if num_groups is not None and (not isinstance(num_groups, int) or num_groups < 1):
        raise InvalidArgument(f"{NAME}: num_groups must be a positive integer, got {num_groups!r}")
    if not isinstance(eps, (int, float)) or not 0 <= eps < math.inf:
        raise InvalidArgument(f"{NAME}: eps must be a finite number, at least 0, got {eps!r}")


def _check_tensors(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, gate: Tensor | None, own_shift: Tensor | None,
    own_scale: Tensor | None, own_gate: Tensor | None, residual: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, num_groups: int | None, channels_first: bool,
) -> None:  # fmt: skip
    """Every check of a tensor, from metadata only: nothing here waits for the device."""
    letters = "[B, K, C, T]" if channels_first else "[B, K, T, C]"
    context = partial(describe, x=x)
    check_shape(NAME, "x", x, letters.strip("[]").split(", "), letters, context)
    batch, samples = x.shape[:2]
    channels = x.shape[2 if channels_first else 3]
    if not x.is_floating_point():
        raise InvalidArgument(f"{NAME}: x must be a floating-point tensor, got {x.dtype}")
    if channels < 1:
        raise InvalidArgument(f"{NAME}: C must be at least 1, got x {letters} = {list(x.shape)}")
    if num_groups is not None and channels % num_groups:
        raise InvalidArgument(f"{NAME}: num_groups must divide C = {channels}, got {num_groups} ({context()})")
    parameters: list[tuple[str, Tensor | None, list[int | str], str]] = [
        ("shift", shift, [batch, channels], "[B, C]"),
        ("scale", scale, [batch, channels], "[B, C]"),
        ("gate", gate, [batch, channels], "[B, C]"),
        ("own_shift", own_shift, [batch, samples, channels], "[B, K, C]"),
        ("own_scale", own_scale, [batch, samples, channels], "[B, K, C]"),
        ("own_gate", own_gate, [batch, samples, channels], "[B, K, C]"),
        ("weight", weight, [channels], "[C]"),
        ("bias", bias, [channels], "[C]"),
    ]
    for name, tensor, shape, axes in parameters:
        if tensor is None:
            continue
        check_shape(NAME, name, tensor, shape, axes, context)
        if not tensor.is_floating_point():
            raise InvalidArgument(f"{NAME}: {name} must be a floating-point tensor, got {tensor.dtype}")
        if tensor.device != x.device:
            raise InvalidArgument(f"{NAME}: {name} must be on the device of x, {x.device}, got {tensor.device}")
    if residual is not None:
        check_shape(NAME, "residual", residual, list(x.shape), letters, context)
        check_same(NAME, "x", x, residual=residual)
