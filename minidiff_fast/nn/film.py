"""Feature-wise linear modulation of K samples per condition."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.nn._modulation import ModulationLinear, check_modulate_options, over_samples
from minidiff_fast.nn.broadcast_linear import check_widths
from minidiff_fast.ops.broadcast_modulate import broadcast_modulate

PARAMETERS = {"scale_shift": ("scale", "shift"), "shift_scale": ("shift", "scale"), "shift": ("shift",)}


class FiLM(nn.Module):
    r"""``y = scale * act(norm(x)) + shift``, scale and shift predicted from embeddings of sample and condition.

    .. math::
        [scale, shift] = W \, act_e([e_{bk}, g_b]) + bias, \quad y = scale \cdot act(norm(x)) + shift \, (+ residual)

    ``e [B, K, Ce]`` belongs to the sample (its timestep), ``g [B, Cg]`` to the condition; either may be all there is,
    and neither is repeated. ``projection.weight`` and ``projection.bias`` are those of an ``nn.Linear`` over
    ``cat([e, g])``.

    With the defaults this is the FiLM of Diffusion Policy's ``ConditionalResidualBlock1D`` (Chi et al., arXiv
    2303.04137), which reads its linear layer's output as ``[N, 2, C]``: scale first, then shift, and multiplies by
    scale, not by 1 + scale. Original: FiLM (Perez et al., arXiv 1709.07871).

    >>> film = FiLM(16, sample_features=8, condition_features=4, norm="group", num_groups=4, activation="mish")
    >>> film(torch.randn(2, 5, 3, 16), sample=torch.randn(2, 5, 8), condition=torch.randn(2, 4)).shape
    torch.Size([2, 5, 3, 16])
    """

    def __init__(
        self,
        channels: int,
        *,
        sample_features: int | None = None,
        condition_features: int | None = None,
        combine: str = "cat",
        embedding_activation: str | None = "mish",
        parameters: str = "scale_shift",
        form: str = "film",
        norm: str | None = None,
        num_groups: int | None = None,
        eps: float = 1e-5,
        norm_affine: bool = True,
        activation: str | None = None,
        activation_at: str = "norm",
        channels_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        impl: str | None = None,
    ) -> None:
        """Make the parameters.

        Args:
            channels: C of x.
            sample_features, condition_features: Ce and Cg; None where there is no such embedding.
            combine: ``"cat"``, or ``"sum"`` of the two before the activation (Ce = Cg).
            embedding_activation: before the linear layer: None, ``"silu"``, ``"mish"``.
            parameters: what the linear layer predicts, in this order: ``"scale_shift"`` (Diffusion Policy),
                ``"shift_scale"``, or ``"shift"`` alone (its ``cond_predict_scale=False``).
            form: ``"film"`` multiplies by scale, ``"adaln"`` by 1 + scale.
            norm, num_groups, eps: a norm before everything else: None, ``"group"``, ``"layer"``, ``"rms"``.
            norm_affine: whether the norm has ``norm_weight [C]`` and (not ``"rms"``) ``norm_bias [C]``.
            activation, activation_at: None, ``"silu"`` or ``"mish"``, after the norm or at the output.
            channels_first: x is ``[B, K, C, T]`` instead of ``[B, K, T, C]``.
            impl: see :mod:`minidiff_fast.backend`.

        Raises:
            InvalidArgument: a width or a name is wrong.
        """
        super().__init__()
        check_widths("FiLM", channels=channels)
        check_modulate_options("FiLM", form=form, norm=norm, activation=activation, activation_at=activation_at)
        if parameters not in PARAMETERS:
            raise InvalidArgument(
                f"FiLM: parameters must be 'scale_shift', 'shift_scale' or 'shift', got {parameters!r}"
            )
        if (norm == "group") != (num_groups is not None):
            raise InvalidArgument(f"FiLM: num_groups belongs to norm='group', got {num_groups!r} with norm={norm!r}")
        if num_groups is not None and (num_groups < 1 or channels % num_groups):
            raise InvalidArgument(f"FiLM: num_groups must divide channels = {channels}, got {num_groups}")
        self.channels, self.form, self.norm, self.num_groups, self.eps = channels, form, norm, num_groups, eps
        self.parameter_order = PARAMETERS[parameters]
        self.activation, self.activation_at, self.channels_first = activation, activation_at, channels_first
        self.impl = impl
        affine = norm is not None and norm_affine
        self.norm_weight = nn.Parameter(torch.ones(channels, device=device, dtype=dtype)) if affine else None
        with_bias = affine and norm != "rms"
        self.norm_bias = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype)) if with_bias else None
        self.projection = ModulationLinear(
            "FiLM", sample_features, condition_features, len(self.parameter_order) * channels,
            activation=embedding_activation, combine=combine, device=device, dtype=dtype, impl=impl,
        )  # fmt: skip

    def forward(
        self,
        x: Tensor,  # [B, K, T, C], channels_first: [B, K, C, T]
        *,
        sample: Tensor | None = None,  # [B, K, Ce]
        condition: Tensor | None = None,  # [B, Cg]
        residual: Tensor | None = None,  # like x
    ) -> Tensor:  # like x
        """y. Raises :class:`InvalidArgument` when an embedding is missing, unexpected, or of another shape."""
        m = self.projection(sample, condition).split(self.parameter_order, self.channels)
        return broadcast_modulate(
            x, shift=m.shift, scale=m.scale, own_shift=over_samples(m.own_shift, x),
            own_scale=over_samples(m.own_scale, x), residual=residual,
            norm=self.norm, weight=self.norm_weight, bias=self.norm_bias, num_groups=self.num_groups, eps=self.eps,
            activation=self.activation, activation_at=self.activation_at, form=self.form,
            channels_first=self.channels_first, impl=self.impl,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return (
            f"channels={self.channels}, parameters={'_'.join(self.parameter_order)!r}, form={self.form!r}, "
            f"norm={self.norm!r}, num_groups={self.num_groups}, activation={self.activation!r}, "
            f"activation_at={self.activation_at!r}, channels_first={self.channels_first}"
        )
