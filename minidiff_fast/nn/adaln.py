"""Adaptive layer norm of K samples per condition, with the modulation of a timestep computed once per timestep."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.nn._modulation import (
    Modulation,
    ModulationLinear,
    Predicted,
    check_modulate_options,
    over_samples,
)
from minidiff_fast.nn.broadcast_linear import check_widths
from minidiff_fast.ops.broadcast_modulate import broadcast_modulate
from minidiff_fast.shapes import check_shape, describe, more_samples

ORDERS = {"shift_scale": ("shift", "scale"), "scale_shift": ("scale", "shift")}


class AdaLN(nn.Module):
    r"""Shift, scale and gate of a transformer block's branches, predicted from timestep and condition.

    .. math::
        [shift, scale, gate]_{1..n} = W \, act([e_{bk}, g_b]) + bias, \qquad
        x \leftarrow x + gate \cdot f(norm(x) (1 + scale) + shift)

    for the branches f (attention, feed-forward) of a block; the norm has no parameters of its own. ``e [B, K, Ce]``
    belongs to the sample, ``g [B, Cg]`` to the condition; either may be all there is, and neither is repeated.
    ``projection.weight`` and ``projection.bias`` are those of the ``nn.Linear`` that DiT calls ``adaLN_modulation.1``,
    its outputs in the order shift, scale, gate of the first branch, then of the next.

    With an ``encoder`` (timesteps ``[R]`` -> embeddings ``[R, Ce]``) the module takes timesteps. When they are integers
    and ``num_train_timesteps`` is less than the number of samples, encoder and linear layer run on the table of all
    ``num_train_timesteps`` timesteps instead of on every sample, and samples look their row up. Which of the two runs
    depends on shapes alone: nothing waits for the device; an export, whose sizes may vary, has no
    table. The linear layer is part of the table unless the form is
    "sum" with a condition, which does not split. The encoder has to treat every row by itself, as every sinusoidal
    embedding with an MLP does; dropout inside of it would be drawn once per timestep. Floating-point timesteps (flow
    matching) are encoded one by one.

    Source: adaLN-Zero, DiT (Peebles and Xie, arXiv 2212.09748).

    >>> adaln = AdaLN(16, condition_features=8, branches=2)
    >>> attention, mlp = adaln(condition=torch.randn(2, 8))
    >>> x = torch.randn(2, 5, 3, 16)
    >>> x = adaln.gate(torch.tanh(adaln.modulate(x, attention)), attention, residual=x)
    >>> x.shape
    torch.Size([2, 5, 3, 16])
    """

    def __init__(
        self,
        channels: int,
        *,
        sample_features: int | None = None,
        condition_features: int | None = None,
        encoder: nn.Module | None = None,
        num_train_timesteps: int | None = None,
        branches: int = 1,
        gated: bool = True,
        order: str = "shift_scale",
        combine: str = "sum",
        embedding_activation: str | None = "silu",
        norm: str | None = "layer",
        eps: float = 1e-6,
        zero_init: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        impl: str | None = None,
    ) -> None:
        """Make the parameters.

        Args:
            channels: C of x.
            sample_features, condition_features: Ce and Cg; None where there is no such embedding.
            encoder: makes embeddings ``[R, Ce]`` of timesteps ``[R]``; needs sample_features.
            num_train_timesteps: integer timesteps are in ``[0, num_train_timesteps)``; None: never use a table.
            branches: how many shift, scale (and gate) there are; DiT's block has 2, its last layer 1.
            gated: whether a branch has a gate.
            order: ``"shift_scale"`` (DiT) or ``"scale_shift"`` (``AdaLayerNorm`` of diffusers); the gate comes last.
            combine: ``"sum"`` of the embeddings before the activation (Ce = Cg; DiT) or ``"cat"``.
            embedding_activation: before the linear layer: None, ``"silu"``, ``"mish"``.
            norm, eps: ``"layer"``, ``"rms"`` or None, without affine parameters.
            zero_init: weight and bias start as 0, so that a gated block starts as the identity.
            impl: see :mod:`minidiff_fast.backend`.

        Raises:
            InvalidArgument: a width, a number or a name is wrong.
        """
        super().__init__()
        check_widths("AdaLN", channels=channels, branches=branches)
        check_modulate_options("AdaLN", norm=norm)
        if norm == "group":
            raise InvalidArgument("AdaLN: norm must be 'layer', 'rms' or None, got 'group'; FiLM has group norm")
        if order not in ORDERS:
            raise InvalidArgument(f"AdaLN: order must be 'shift_scale' or 'scale_shift', got {order!r}")
        if encoder is not None and sample_features is None:
            raise InvalidArgument("AdaLN: encoder needs sample_features, the width Ce of what it returns")
        if num_train_timesteps is not None:
            check_widths("AdaLN", num_train_timesteps=num_train_timesteps)
            if encoder is None:
                raise InvalidArgument("AdaLN: num_train_timesteps is about the encoder's timesteps; encoder is None")
        self.channels, self.branches, self.norm, self.eps, self.impl = channels, branches, norm, eps, impl
        self.num_train_timesteps = num_train_timesteps
        self.parameter_order = (*ORDERS[order], *(("gate",) if gated else ()))
        self.encoder = encoder
        self.projection = ModulationLinear(
            "AdaLN", sample_features, condition_features, branches * len(self.parameter_order) * channels,
            activation=embedding_activation, combine=combine, device=device, dtype=dtype, impl=impl,
        )  # fmt: skip
        if zero_init:
            nn.init.zeros_(self.projection.weight)
            nn.init.zeros_(self.projection.bias)

    def forward(
        self,
        timesteps: Tensor | None = None,  # [B or 1, K or 1]
        *,
        sample: Tensor | None = None,  # [B, K, Ce]
        condition: Tensor | None = None,  # [B, Cg]
    ) -> tuple[Modulation, ...]:
        """One :class:`Modulation` per branch, for :meth:`modulate` and :meth:`gate`.

        Args:
            timesteps: with an encoder: ``[B, K]``, or an axis of 1 where all have the same. Integers in
                ``[0, num_train_timesteps)`` (not checked on a GPU, that would synchronise), or floating-point.
            sample: without an encoder: the samples' embeddings.
            condition: the conditions' embeddings.

        Raises:
            InvalidArgument: an input is missing, unexpected, or of another shape.
        """
        if (timesteps is not None) != (self.encoder is not None):
            wanted = "timesteps, which its encoder needs" if self.encoder is not None else "sample; it has no encoder"
            raise InvalidArgument(f"AdaLN: this module takes {wanted}")
        if timesteps is None:
            predicted = self.projection(sample, condition)
        else:
            if sample is not None:
                raise InvalidArgument("AdaLN: sample came, and the module's encoder makes it out of timesteps")
            predicted = self._of_timesteps(timesteps, condition)
        width = len(self.parameter_order) * self.channels
        parts = zip(*([None] * self.branches if x is None else x.split(width, -1) for x in predicted), strict=True)
        return tuple(Predicted(*part).split(self.parameter_order, self.channels) for part in parts)

    def _of_timesteps(self, timesteps: Tensor, condition: Tensor | None) -> Predicted:
        free = condition is None or (timesteps.dim() > 0 and timesteps.shape[0] == 1)
        batch = "B" if free or condition is None else condition.shape[0]
        check_shape(
            "AdaLN", "timesteps", timesteps, [batch, "K"], "[B or 1, K or 1]", lambda: describe(condition=condition)
        )
        if timesteps.dtype not in (torch.int32, torch.int64) and not timesteps.is_floating_point():
            raise InvalidArgument(f"AdaLN: timesteps must be int32, int64 or floating-point, got {timesteps.dtype}")
        count = self.num_train_timesteps
        assert self.encoder is not None
        if count is None or timesteps.is_floating_point() or not more_samples(timesteps, count):
            encoded = self._encoded(timesteps.reshape(-1))
            return self.projection(encoded.unflatten(0, tuple(timesteps.shape)), condition)
        table = self._encoded(torch.arange(count, device=timesteps.device, dtype=timesteps.dtype))
        return self.projection.from_table(table, timesteps, condition)

    def _encoded(self, timesteps: Tensor) -> Tensor:
        """Timesteps [R] -> embeddings [R, Ce]."""
        assert self.encoder is not None
        encoded = self.encoder(timesteps)
        rows, width = timesteps.shape[0], self.projection.sample_features or 0
        check_shape(
            "AdaLN", "encoder(timesteps)", encoded, [rows, width], "[R, Ce]", lambda: describe(timesteps=timesteps)
        )
        return encoded

    def modulate(
        self,
        x: Tensor,  # [B, K, T, C]
        modulation: Modulation,
    ) -> Tensor:  # [B, K, T, C]
        """``norm(x) * (1 + scale) + shift``: what a branch reads."""
        return broadcast_modulate(
            x, shift=modulation.shift, scale=modulation.scale, own_shift=over_samples(modulation.own_shift, x),
            own_scale=over_samples(modulation.own_scale, x), norm=self.norm, eps=self.eps, form="adaln", impl=self.impl,
        )  # fmt: skip

    def gate(
        self,
        y: Tensor,  # [B, K, T, C]
        modulation: Modulation,
        residual: Tensor | None = None,  # [B, K, T, C]
    ) -> Tensor:  # [B, K, T, C]
        """``residual + gate * y``: what becomes of a branch's output y."""
        if modulation.gate is None and modulation.own_gate is None:
            raise InvalidArgument("AdaLN: this modulation has no gate; make the module with gated=True")
        return broadcast_modulate(
            y, gate=modulation.gate, own_gate=over_samples(modulation.own_gate, y), residual=residual, impl=self.impl
        )

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return (
            f"channels={self.channels}, branches={self.branches}, parameters={'_'.join(self.parameter_order)!r}, "
            f"norm={self.norm!r}, eps={self.eps}, num_train_timesteps={self.num_train_timesteps}"
        )
