"""A linear layer over [sample, condition] that computes the condition's part once per condition."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.ops.broadcast_linear import ACTIVATIONS, COMBINES, broadcast_linear


class BroadcastLinear(nn.Module):
    """``y = W act([x_bk, g_b]) + bias`` ("cat") or ``y = W act(x_bk + g_b) + bias`` ("sum"), g never repeated.

    See :func:`minidiff_fast.ops.broadcast_linear` for the exact formula. ``weight [Co, Cx + Cg]`` (``[Co, C]`` for
    "sum") and ``bias [Co]`` are those of an ``nn.Linear`` over the concatenation with the sample's channels first: its
    state dict loads here and the other way round. They are initialised as ``nn.Linear`` initialises them.

    >>> layer = BroadcastLinear(8, 4, 16, activation="mish")
    >>> layer(torch.randn(2, 5, 8), torch.randn(2, 4)).shape
    torch.Size([2, 5, 16])
    """

    def __init__(
        self,
        in_features_sample: int,
        in_features_condition: int,
        out_features: int,
        bias: bool = True,
        *,
        activation: str | None = None,
        combine: str = "cat",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        impl: str | None = None,
    ) -> None:
        """Make the parameters.

        Args:
            in_features_sample, in_features_condition: Cx and Cg, at least 1; equal for "sum".
            out_features: Co, at least 1.
            bias: whether there is one.
            activation: None, ``"silu"`` or ``"mish"``, before the product.
            combine: ``"cat"`` or ``"sum"``.
            impl: see :mod:`minidiff_fast.backend`.

        Raises:
            InvalidArgument: a width or a name is wrong.
        """
        super().__init__()
        check_choices("BroadcastLinear", activation, combine)
        check_widths(
            "BroadcastLinear",
            in_features_sample=in_features_sample,
            in_features_condition=in_features_condition,
            out_features=out_features,
        )
        if combine == "sum" and in_features_sample != in_features_condition:
            raise InvalidArgument(
                f"BroadcastLinear: combine='sum' needs in_features_condition = in_features_sample = "
                f"{in_features_sample}, got {in_features_condition}"
            )
        self.in_features_sample = in_features_sample
        self.in_features_condition = in_features_condition
        self.out_features = out_features
        self.activation, self.combine, self.impl = activation, combine, impl
        width = in_features_sample + (in_features_condition if combine == "cat" else 0)
        self.weight = nn.Parameter(torch.empty(out_features, width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As ``nn.Linear.reset_parameters``: uniform in ±1 / sqrt(number of inputs)."""
        reset_linear(self.weight, self.bias)

    def forward(
        self,
        x: Tensor,  # [B, K, ..., Cx]
        g: Tensor,  # [B, Cg]
    ) -> Tensor:  # [B, K, ..., Co]
        """y. Raises :class:`InvalidArgument` for shapes, dtypes and devices that do not fit."""
        return broadcast_linear(
            x, g, self.weight, self.bias, activation=self.activation, combine=self.combine, impl=self.impl
        )

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return (
            f"in_features_sample={self.in_features_sample}, in_features_condition={self.in_features_condition}, "
            f"out_features={self.out_features}, bias={self.bias is not None}, activation={self.activation!r}, "
            f"combine={self.combine!r}"
        )


def reset_linear(weight: Tensor, bias: Tensor | None) -> None:
    """Initialise as ``nn.Linear`` does, with the same draws from torch's generator."""
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    if bias is not None:
        bound = 1 / math.sqrt(weight.shape[1])
        nn.init.uniform_(bias, -bound, bound)


def check_choices(name: str, activation: str | None, combine: str) -> None:
    """Raise :class:`InvalidArgument` unless both are known to :func:`minidiff_fast.ops.broadcast_linear`."""
    if activation not in ACTIVATIONS:
        raise InvalidArgument(f"{name}: activation must be None, 'silu' or 'mish', got {activation!r}")
    if combine not in COMBINES:
        raise InvalidArgument(f"{name}: combine must be 'cat' or 'sum', got {combine!r}")


def check_widths(name: str, **widths: int) -> None:
    """Raise :class:`InvalidArgument` unless every width is an integer of at least 1."""
    for argument, width in widths.items():
        if not isinstance(width, int) or isinstance(width, bool) or width < 1:
            raise InvalidArgument(f"{name}: {argument} must be an integer of at least 1, got {width!r}")
