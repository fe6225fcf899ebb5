"""Min-max normalisation of observations and actions, one linear map per channel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minidiff_fast.errors import CheckpointError, DataError, InvalidArgument

CONSTANT_RANGE = 1e-4
"""A channel whose maximum - minimum is below this (in its own unit) counts as constant."""


class MinMaxNormalizer(nn.Module):
    """Map each channel of the last axis from its range in the data to [-1, 1].

    With ``lo = minimum[a]`` and ``hi = maximum[a]`` of channel ``a``:

    * ``hi - lo >= 1e-4``: ``y = (x - (hi + lo) / 2) / ((hi - lo) / 2)``, so ``lo -> -1`` and ``hi -> 1``;
    * ``hi - lo < 1e-4`` (constant channel): ``y = x - lo``, so the constant maps to 0.

    This is the "limits" mode of Diffusion Policy (Chi et al., 2023). Values outside the range are mapped by
    the same line and are not clipped. The buffers ``minimum`` [A] and ``maximum`` [A] are saved in the state
    dict.

    >>> normalizer = MinMaxNormalizer.fit(torch.tensor([[0.0, 7.0], [512.0, 7.0]]))
    >>> normalizer(torch.tensor([256.0, 7.0]))
    tensor([0., 0.])
    >>> normalizer.inverse(torch.tensor([1.0, 0.0]))
    tensor([512.,   7.])
    """

    minimum: Tensor
    maximum: Tensor

    def __init__(
        self,
        minimum: Tensor,  # [A]
        maximum: Tensor,  # [A]
    ) -> None:
        """Use the given ranges, float, in the unit of the data.

        Raises:
            InvalidArgument: the shapes are not one equal [A] with A >= 1, a value is not finite, or a minimum
                is above its maximum.
        """
        super().__init__()
        if minimum.ndim != 1 or minimum.shape != maximum.shape or minimum.numel() == 0:
            raise InvalidArgument(
                "MinMaxNormalizer: minimum and maximum must both be [A] with A >= 1, "
                f"got {list(minimum.shape)} and {list(maximum.shape)}"
            )
        lo, hi = minimum.detach().to(torch.float32), maximum.detach().to(torch.float32)
        problem = _range_problem(lo, hi)
        if problem:
            raise InvalidArgument(f"MinMaxNormalizer: {problem}")
        self.register_buffer("minimum", lo.clone())
        self.register_buffer("maximum", hi.clone())

    @classmethod
    def fit(
        cls,
        data: Tensor | np.ndarray,  # [..., A]
    ) -> MinMaxNormalizer:
        """The normaliser whose ranges are those of ``data`` over every axis but the last.

        Args:
            data: real numbers of any dtype; the ranges are kept in float32. [..., A]

        Raises:
            DataError: ``data`` holds no value, or NaN or infinity (the message names the channels).
            InvalidArgument: ``data`` has no axis, or is boolean or complex.
        """
        values = torch.as_tensor(data)
        if values.ndim == 0 or values.dtype == torch.bool or values.is_complex():
            raise InvalidArgument(
                f"MinMaxNormalizer.fit: data must be real numbers [..., A], got {list(values.shape)} of {values.dtype}"
            )
        if values.numel() == 0:
            raise DataError(f"MinMaxNormalizer.fit: data is empty, got {list(values.shape)}")
        rows = values.detach().reshape(-1, values.shape[-1]).to(torch.float32)
        finite = torch.isfinite(rows).all(dim=0)
        if not bool(finite.all()):
            bad = (~finite).nonzero().flatten().tolist()
            raise DataError(f"MinMaxNormalizer.fit: data holds NaN or infinity in channels {bad} of {len(finite)}")
        return cls(rows.amin(dim=0), rows.amax(dim=0))

    @classmethod
    def identity(cls, channels: int) -> MinMaxNormalizer:
        """The normaliser with ranges [-1, 1] (``y = x``): a place to load a state dict into.

        Raises:
            InvalidArgument: ``channels`` is below 1.
        """
        if channels < 1:
            raise InvalidArgument(f"MinMaxNormalizer.identity: channels must be >= 1, got {channels}")
        return cls(-torch.ones(channels), torch.ones(channels))

    @property
    def channels(self) -> int:
        """Number of channels A."""
        return self.minimum.shape[0]

    def forward(
        self,
        x: Tensor,  # [..., A]
    ) -> Tensor:
        """Normalise. Float32 and lower precision and integers give float32, float64 gives float64. [..., A]

        Raises:
            InvalidArgument: the last axis is not A.
        """
        center, half = self._center_and_half(x, "x")
        return (x - center) / half

    def inverse(
        self,
        x: Tensor,  # [..., A]
    ) -> Tensor:
        """Undo :meth:`forward`: normalised values to the unit of the data. [..., A]

        Raises:
            InvalidArgument: the last axis is not A.
        """
        center, half = self._center_and_half(x, "x")
        return x * half + center

    def extra_repr(self) -> str:
        return f"channels={self.channels}"

    def _center_and_half(self, x: Tensor, name: str) -> tuple[Tensor, Tensor]:
        if x.ndim == 0 or x.shape[-1] != self.channels:
            raise InvalidArgument(
                f"MinMaxNormalizer: {name} must be [..., A] with A = {self.channels}, got {list(x.shape)}"
            )
        extent = self.maximum - self.minimum
        constant = extent < CONSTANT_RANGE
        center = torch.where(constant, self.minimum, self.minimum + extent / 2)
        return center, torch.where(constant, torch.ones_like(extent), extent / 2)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MinMaxNormalizer:
        """The ranges stay float32 when a policy is cast: 16 bits would move them."""
        before = {"minimum": self.minimum, "maximum": self.maximum}
        super()._apply(fn, recurse)
        for name, ranges in before.items():
            if getattr(self, name).dtype != torch.float32:
                setattr(self, name, ranges.to(getattr(self, name).device))
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        lo, hi = state_dict.get(f"{prefix}minimum"), state_dict.get(f"{prefix}maximum")
        for key, value in (("minimum", lo), ("maximum", hi)):
            if value is not None and tuple(value.shape) != (self.channels,):
                raise CheckpointError(
                    f"MinMaxNormalizer: {prefix}{key} must be [{self.channels}] as this model has "
                    f"{self.channels} channels, got {list(value.shape)} from the state dict"
                )
        if lo is not None and hi is not None and (problem := _range_problem(lo, hi)):
            raise CheckpointError(f"MinMaxNormalizer: in the state dict at '{prefix}': {problem}")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _range_problem(lo: Tensor, hi: Tensor) -> str | None:
    if lo.is_meta or hi.is_meta:  # no values yet
        return None
    if not bool(torch.isfinite(lo).all() & torch.isfinite(hi).all()):
        return f"the ranges must be finite, got {lo.tolist()} to {hi.tolist()}"
    if bool((lo > hi).any()):
        return f"every minimum must be <= its maximum, got {lo.tolist()} to {hi.tolist()}"
    return None
