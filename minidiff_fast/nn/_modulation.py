"""What FiLM and AdaLN share: the linear layer that predicts modulation parameters from embeddings."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.nn.broadcast_linear import check_choices, check_widths, reset_linear
from minidiff_fast.ops.broadcast_linear import ACTIVATIONS, broadcast_linear
from minidiff_fast.ops.broadcast_modulate import CHOICES
from minidiff_fast.shapes import check_shape, describe


class Modulation(NamedTuple):
    """The parameters of one modulation; what is None does not exist. Per condition and per sample parts add up."""

    shift: Tensor | None = None
    """[B, C]"""
    scale: Tensor | None = None
    """[B, C]"""
    gate: Tensor | None = None
    """[B, C]"""
    own_shift: Tensor | None = None
    """[B or 1, K or 1, C]"""
    own_scale: Tensor | None = None
    """[B or 1, K or 1, C]"""
    own_gate: Tensor | None = None
    """[B or 1, K or 1, C]"""


class Predicted(NamedTuple):
    """Predicted parameters; the parts add up, and at least one is there."""

    shared: Tensor | None
    """[B, Co]"""
    own: Tensor | None
    """[B or 1, K or 1, Co]"""

    def split(self, names: tuple[str, ...], channels: int) -> Modulation:
        """Cut Co = len(names) * C into named parameters, in their order."""
        parts: dict[str, Tensor] = {}
        for prefix, part in (("", self.shared), ("own_", self.own)):
            if part is not None:
                parts |= {prefix + name: x for name, x in zip(names, part.split(channels, -1), strict=True)}
        return Modulation(**parts)


class ModulationLinear(nn.Module):
    """``W act([e_bk, g_b]) + bias`` or ``W act(e_bk + g_b) + bias``, or with one of e and g alone.

    ``weight`` and ``bias`` are those of the ``nn.Linear`` over the concatenation, the sample's channels first.
    """

    def __init__(
        self,
        owner: str,
        sample_features: int | None,
        condition_features: int | None,
        out_features: int,
        *,
        activation: str | None,
        combine: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        impl: str | None,
    ) -> None:
        """``owner`` is the class that messages name; features of None: that input does not exist."""
        super().__init__()
        check_choices(owner, activation, combine)
        given = {"sample_features": sample_features, "condition_features": condition_features}
        widths = {name: width for name, width in given.items() if width is not None}
        if not widths:
            raise InvalidArgument(f"{owner}: give sample_features, condition_features or both")
        check_widths(owner, **widths)
        if combine == "sum" and len(set(widths.values())) > 1:
            raise InvalidArgument(
                f"{owner}: combine='sum' needs condition_features = sample_features = {sample_features}, "
                f"got {condition_features}"
            )
        self.owner, self.sample_features, self.condition_features = owner, sample_features, condition_features
        self.activation, self.combine, self.impl = activation, combine, impl
        width = sum(widths.values()) if combine == "cat" else max(widths.values())
        self.weight = nn.Parameter(torch.empty(out_features, width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        reset_linear(self.weight, self.bias)

    def check(self, sample: Tensor | None, condition: Tensor | None) -> None:
        """Raise :class:`InvalidArgument` unless exactly what the module was made for is there, of the right shape."""
        for name, given, width in (
            ("sample", sample, self.sample_features),
            ("condition", condition, self.condition_features),
        ):
            if given is None and width is not None:
                raise InvalidArgument(f"{self.owner}: {name} is missing (the module has {name}_features = {width})")
            if given is not None and width is None:
                raise InvalidArgument(f"{self.owner}: {name} came, and the module was made without {name}_features")
        if sample is not None:
            check_shape(
                self.owner, "sample", sample, ["B", "K", self.sample_features or 0], "[B, K, Ce]",
                lambda: describe(condition=condition),
            )  # fmt: skip
        if condition is not None:
            batch = "B" if sample is None or sample.shape[0] == 1 else sample.shape[0]
            check_shape(
                self.owner, "condition", condition, [batch, self.condition_features or 0], "[B, Cg]",
                lambda: describe(sample=sample),
            )  # fmt: skip

    def forward(
        self,
        sample: Tensor | None,  # [B, K, Ce]
        condition: Tensor | None,  # [B, Cg]
    ) -> Predicted:
        """The parameters of every sample, or of every condition when there is no sample."""
        self.check(sample, condition)
        if sample is not None and condition is not None:
            if sample.shape[0] != condition.shape[0]:  # one embedding for all conditions
                sample = sample.expand(condition.shape[0], -1, -1)
            own = broadcast_linear(
                sample, condition, self.weight, self.bias,
                activation=self.activation, combine=self.combine, impl=self.impl,
            )  # fmt: skip
            return Predicted(None, own)
        act = ACTIVATIONS[self.activation]
        if sample is not None:
            return Predicted(None, F.linear(act(sample), self.weight, self.bias))
        assert condition is not None
        return Predicted(F.linear(act(condition), self.weight, self.bias), None)

    @property
    def splits(self) -> bool:
        """Whether the sample's part does not depend on the condition."""
        return self.condition_features is None or self.combine == "cat"

    def from_table(
        self,
        table: Tensor,  # [R, Ce]
        index: Tensor,  # [B or 1, K or 1] integer in [0, R)
        condition: Tensor | None,  # [B, Cg]
    ) -> Predicted:
        """As ``forward(table[index], condition)``, with the table's part of the product done once per row."""
        self.check(table[None], condition)
        if not self.splits:
            return self(F.embedding(index, table), condition)
        act = ACTIVATIONS[self.activation]
        if condition is None:
            return Predicted(None, F.embedding(index, F.linear(act(table), self.weight, self.bias)))
        width = table.shape[1]
        own = F.embedding(index, F.linear(act(table), self.weight[:, :width]))
        return Predicted(F.linear(act(condition), self.weight[:, width:], self.bias), own)

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return (
            f"sample_features={self.sample_features}, condition_features={self.condition_features}, "
            f"out_features={self.weight.shape[0]}, activation={self.activation!r}, combine={self.combine!r}"
        )


def check_modulate_options(owner: str, **options: str | None) -> None:
    """Raise :class:`InvalidArgument` unless :func:`minidiff_fast.ops.broadcast_modulate` knows every option."""
    for name, value in options.items():
        if value not in CHOICES[name]:
            known = ", ".join(repr(choice) for choice in CHOICES[name])
            raise InvalidArgument(f"{owner}: {name} must be one of {known}, got {value!r}")


def over_samples(
    part: Tensor | None,  # [B or 1, K or 1, C]
    x: Tensor,  # [B, K, ...]
) -> Tensor | None:  # [B, K, C]
    """A view for every sample of x, where one part serves many."""
    if part is None or part.shape[:2] == x.shape[:2]:
        return part
    return part.expand(x.shape[0], x.shape[1], -1)
