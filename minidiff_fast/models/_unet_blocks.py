"""The blocks of ConditionalUnet1D, in the layout that the device's convolutions like: see :func:`channel_axis`."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from minidiff_fast.models._plain import bare, plain
from minidiff_fast.nn.token_conv import token_conv1d, token_conv_transpose1d
from minidiff_fast.ops import broadcast_modulate

NAME = "ConditionalUnet1D"


class Modulation(NamedTuple):
    """FiLM of one block, as ``broadcast_modulate`` takes it; what is absent is None."""

    shift: Tensor | None
    """[B, C], the condition's part."""
    own_shift: Tensor
    """[B, K, C], the timestep's part."""
    scale: Tensor | None
    """[B, C]"""
    own_scale: Tensor | None
    """[B, K, C]"""


def channel_axis(x: Tensor) -> int:
    """3 on a CPU: hidden tensors are [B, K, T, C]; 2 elsewhere: [B, K, C, T]."""
    return 3 if x.device.type == "cpu" else 2


def convolve(
    conv: nn.Conv1d | nn.ConvTranspose1d,
    x: Tensor,  # [B, K, T, C] or [B, K, C, T]
) -> Tensor:  # [B, K, To, Co] or [B, K, Co, To]
    """``conv`` over T, for each sample."""
    rows = x.flatten(0, 1)
    if channel_axis(x) == 2:
        out = conv(rows)
    else:
        transposed = isinstance(bare(conv), nn.ConvTranspose1d)
        function = token_conv_transpose1d if transposed else token_conv1d
        read: Any = plain(conv, nn.ConvTranspose1d if transposed else nn.Conv1d, NAME)
        out = function(rows, read.weight, read.bias, read.stride[0], read.padding[0])
    return out.unflatten(0, x.shape[:2])


class ConvBlock(nn.Module):
    """Conv1d -> GroupNorm -> Mish -> FiLM -> + residual; all after the convolution is one pass."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int, n_groups: int) -> None:
        super().__init__()
        conv = nn.Conv1d(inputs, outputs, kernel_size, padding=kernel_size // 2)
        self.block = nn.Sequential(conv, nn.GroupNorm(n_groups, outputs), nn.Mish())

    def forward(
        self,
        x: Tensor,  # [B, K, T, C] or [B, K, C, T]
        film: Modulation | None = None,
        *,
        residual: Tensor | None = None,  # like the output
        impl: str | None = None,
    ) -> Tensor:
        conv, norm = cast(nn.Conv1d, self.block[0]), plain(self.block[1], nn.GroupNorm, NAME)
        hidden = convolve(conv, x)
        return broadcast_modulate(
            hidden,
            residual=None if residual is None else residual.to(hidden.dtype),
            norm="group",
            weight=norm.weight,
            bias=norm.bias,
            num_groups=norm.num_groups,
            eps=norm.eps,
            activation="mish",
            channels_first=channel_axis(x) == 2,
            impl=impl,
            **({} if film is None else film._asdict()),
        )


class ResidualBlock(nn.Module):
    """Two :class:`ConvBlock`, FiLM after the first, plus the input or its 1x1 convolution."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        cond_dim: int,
        kernel_size: int,
        n_groups: int,
        cond_predict_scale: bool,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [ConvBlock(inputs, outputs, kernel_size, n_groups), ConvBlock(outputs, outputs, kernel_size, n_groups)]
        )
        self.cond_encoder = nn.Sequential(nn.Mish(), nn.Linear(cond_dim, (2 if cond_predict_scale else 1) * outputs))
        self.residual_conv = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    @property
    def first(self) -> ConvBlock:
        """The block that FiLM modulates."""
        return cast(ConvBlock, self.blocks[0])

    @property
    def second(self) -> ConvBlock:
        """The block that the residual is added to."""
        return cast(ConvBlock, self.blocks[1])

    @property
    def linear(self) -> nn.Linear:
        """From the activated condition, timestep first, to (scale, shift) or shift."""
        return plain(self.cond_encoder[1], nn.Linear, NAME)

    def forward(
        self,
        x: Tensor,  # [B, K, T, C] or [B, K, C, T]
        film: Modulation,
        impl: str | None,
    ) -> Tensor:
        hidden = self.first(x, film, impl=impl)
        return self.second(hidden, residual=self.residual(x), impl=impl)

    def residual(self, x: Tensor) -> Tensor:
        """x in the width of the output."""
        conv: Any = self.residual_conv
        return x if isinstance(bare(conv), nn.Identity) else convolve(conv, x)

    def modulation(
        self,
        own: Tensor,  # [B, K, C or 2 C]
        shared: Tensor | None,  # [B, C or 2 C]
    ) -> Modulation:
        """Both parts of what ``linear`` gives, apart; with a scale the first half of the channels is the scale."""
        if self.linear.out_features == self.second.block[0].out_channels:
            return Modulation(shared, own, None, None)
        own_scale, own_shift = own.chunk(2, dim=-1)
        scale, shift = (None, None) if shared is None else shared.chunk(2, dim=-1)
        return Modulation(shift, own_shift, scale, own_scale)


class Downsample(nn.Module):
    """Half the tokens: a convolution of 3 with stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return convolve(self.conv, x)


class Upsample(nn.Module):
    """Twice the tokens: a transposed convolution of 4 with stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose1d(channels, channels, 4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return convolve(self.conv, x)
