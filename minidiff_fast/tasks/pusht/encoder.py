"""The low-dimensional observation encoder of Push-T policies, a residual network over all To steps at once, and the
U-Net over its tokens."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from minidiff_fast.models import ConditionalUnet1D, ConditionModulation, LowDimEncoder


class ResidualEncoder(nn.Module):
    """h = W_in o;  h += W_2 SiLU(W_1 LN(h)) per block;  out = LN(h), split into To tokens of ``width`` channels.

    ``o`` is the concatenation of all To observations. It runs once per condition, so that with K samples a
    condition its cost is small beside the denoiser's, even at several times its width.

    Args:
        entries: name -> channels, see :class:`~minidiff_fast.models.LowDimEncoder`.
        n_obs_steps: To.
        width: channels of a token.
        blocks: residual blocks, at width ``To * width``.
    """

    def __init__(self, entries: Mapping[str, int], n_obs_steps: int, width: int, blocks: int) -> None:
        super().__init__()
        self.join = LowDimEncoder(entries)
        hidden = n_obs_steps * width
        self.n_obs_steps, self.output_dim = n_obs_steps, width
        self.inp = nn.Linear(n_obs_steps * self.join.output_dim, hidden)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
            for _ in range(blocks)
        )
        self.norm = nn.LayerNorm(hidden)

    def forward(
        self,
        obs: Mapping[str, Tensor],  # name -> [B, To, d_name], normalised
    ) -> Tensor:  # [B, To, width]
        """Raises :class:`~minidiff_fast.errors.InvalidArgument` for a wrong name or shape."""
        hidden = self.inp(self.join(obs).flatten(1))
        for block in self.blocks:
            hidden = hidden + block(hidden)
        tokens: Tensor = self.norm(hidden).unflatten(1, (self.n_obs_steps, self.output_dim))
        return tokens


class ObservationUnet1D(ConditionalUnet1D):
    """ConditionalUnet1D whose global condition is the flattened tokens of all observation steps, G = To * Dc."""

    def encode(
        self,
        global_cond: Tensor | None = None,  # [B, To, Dc]
        local_cond: Tensor | None = None,  # [B, T, Dl]
    ) -> ConditionModulation:
        """See :meth:`ConditionalUnet1D.encode`."""
        return super().encode(None if global_cond is None else global_cond.flatten(1), local_cond)
