"""DiffusionMLP: a residual MLP denoiser over flattened action chunks, with the condition projected once.

The denoiser of low-dimensional policies (Ren et al., "Diffusion Policy Policy Optimization", arXiv 2409.00588, use an
MLP of this kind): on a CPU a sample costs a tenth of what it costs a transformer over the same actions.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.models.transformer_for_diffusion import timestep_embedding
from minidiff_fast.shapes import Layout, check_layout, check_shape, describe, merge_samples, split_samples

NAME = "DiffusionMLP"


class ConditionFeatures(NamedTuple):
    """What :meth:`DiffusionMLP.encode` keeps of the observations."""

    hidden: Tensor
    """[B, hidden_dim]: the condition's share of the first layer."""


pytree._register_namedtuple(ConditionFeatures, serialized_type_name="minidiff_fast.models.ConditionFeatures")
torch.serialization.add_safe_globals([ConditionFeatures])  # saved exports hold one as their example


class DiffusionMLP(nn.Module):
    r"""Residual MLP over a sample's flattened actions and its timestep, plus the condition's projection.

    .. math::
        h_0 = W_x \, \mathrm{cat}(x_{bk}, e(t_{bk})) + W_2 \, \mathrm{SiLU}(W_1 o_b), \quad
        h_{i+1} = h_i + V_i \, \mathrm{SiLU}(U_i \, \mathrm{SiLU}(\mathrm{LN}(h_i))), \quad
        \mathrm{out} = W_o \, \mathrm{SiLU}(h_n)

    The term of the observation o_b is computed once per condition and added to the rows of its K samples; it is
    never copied. ``e`` is :func:`~minidiff_fast.models.transformer_for_diffusion.timestep_embedding`.

    Args:
        input_dim, output_dim: channels of an action and of its prediction.
        horizon: action tokens T, fixed.
        n_obs_steps, cond_dim: observation steps To and channels of one; the condition is flattened.
        hidden_dim: width of the residual stream.
        n_blocks: residual blocks.
        time_dim: width of the timestep embedding (even, at least 4).
        layout: how :meth:`forward` orders its N = B * K rows, "bk" or "kb".

    Raises :class:`InvalidArgument` for sizes that make no model.
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        horizon: int,
        n_obs_steps: int,
        cond_dim: int,
        hidden_dim: int = 256,
        n_blocks: int = 3,
        time_dim: int = 64,
        *,
        layout: Layout = "bk",
    ) -> None:
        super().__init__()
        sizes = {
            "input_dim": input_dim, "output_dim": output_dim, "horizon": horizon, "n_obs_steps": n_obs_steps,
            "cond_dim": cond_dim, "hidden_dim": hidden_dim, "n_blocks": n_blocks,
        }  # fmt: skip
        for name, size in sizes.items():
            if size < 1:
                raise InvalidArgument(f"{NAME}: {name} must be at least 1, got {size}")
        if time_dim < 4 or time_dim % 2:
            raise InvalidArgument(f"{NAME}: time_dim must be even and at least 4, got {time_dim}")
        check_layout(NAME, layout)
        self.input_dim, self.output_dim, self.horizon = input_dim, output_dim, horizon
        self.n_obs_steps, self.cond_dim, self.time_dim = n_obs_steps, cond_dim, time_dim
        self.layout: Layout = layout
        self.cond_encoder = nn.Sequential(
            nn.Linear(n_obs_steps * cond_dim, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, hidden_dim)
        )
        self.input_proj = nn.Linear(horizon * input_dim + time_dim, hidden_dim)
        self.blocks = nn.ModuleList(_ResidualBlock(hidden_dim) for _ in range(n_blocks))
        self.head = nn.Sequential(nn.SiLU(), nn.Linear(hidden_dim, horizon * output_dim))

    def forward(
        self,
        sample: Tensor,  # [N, T, Da]
        timestep: Tensor,  # [] or [N]
        cond: Tensor,  # [B, To, Dc], N = B * K
    ) -> Tensor:  # [N, T, out]
        """Predict from flattened rows; B = N is the ordinary case, K > 1 shares each condition by ``layout``."""
        if sample.dim() != 3:
            raise InvalidArgument(f"{NAME}: sample must be [N, T, Da], got {list(sample.shape)}")
        times = timestep.to(sample.device).expand(sample.shape[0])
        batch = cond.shape[0]
        out = self.denoise(
            self.encode(cond), split_samples(sample, batch, self.layout), split_samples(times, batch, self.layout)
        )
        return merge_samples(out, self.layout)

    def encode(
        self,
        cond: Tensor,  # [B, To, Dc]
    ) -> ConditionFeatures:
        """The condition's share of the first layer, once for all its samples."""
        expected: list[int | str] = ["B", self.n_obs_steps, self.cond_dim]
        check_shape(NAME, "cond", cond, expected, "[B, To, Dc]", partial(describe, cond=cond))
        return ConditionFeatures(self.cond_encoder(cond.flatten(1)))

    def denoise(
        self,
        memory: ConditionFeatures,  # leading dim B
        sample: Tensor,  # [B, K, T, Da]
        timestep: Tensor,  # [B, K]
    ) -> Tensor:  # [B, K, T, out]
        """Predict for K samples of each condition, each with its own timestep."""
        context = partial(describe, sample=sample, timestep=timestep, memory=memory.hidden)
        batch = memory.hidden.shape[0]
        expected: list[int | str] = [batch, "K", self.horizon, self.input_dim]
        check_shape(NAME, "sample", sample, expected, "[B, K, T, Da]", context)
        check_shape(NAME, "timestep", timestep, list(sample.shape[:2]), "[B, K]", context)
        time = timestep_embedding(timestep, self.time_dim).to(sample.dtype)
        hidden = self.input_proj(torch.cat([sample.flatten(2), time], dim=-1)) + memory.hidden[:, None]
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden).unflatten(-1, (self.horizon, self.output_dim))

    def get_optim_groups(self, weight_decay: float = 1e-3) -> list[dict[str, object]]:
        """Two groups: weights of Linear layers decay; biases and norms do not."""
        decay = [p for p in self.parameters() if p.dim() >= 2]
        rest = [p for p in self.parameters() if p.dim() < 2]
        return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


class _ResidualBlock(nn.Module):
    """h + V SiLU(U SiLU(LN(h)))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, width)
        self.linear2 = nn.Linear(width, width)

    def forward(
        self,
        hidden: Tensor,  # [..., C]
    ) -> Tensor:  # [..., C]
        inner = self.linear1(nn.functional.silu(self.norm(hidden)))
        return hidden + self.linear2(nn.functional.silu(inner))
