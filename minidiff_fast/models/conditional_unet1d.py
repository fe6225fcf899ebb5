"""ConditionalUnet1D: diffusion_policy's convolutional denoiser, with the condition's share of FiLM computed once.

Source of the architecture: Chi et al., "Diffusion Policy: Visuomotor Policy Learning via Action Diffusion",
arXiv 2303.04137; FiLM: Perez et al., arXiv 1709.07871. Constructor, forward, state-dict keys and numerics are those
of the module of this name in diffusion_policy, so its checkpoints load strictly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from minidiff_fast.models import _unet_checks as checks
from minidiff_fast.models._unet_blocks import (
    ConvBlock,
    Downsample,
    Modulation,
    ResidualBlock,
    Upsample,
    channel_axis,
    convolve,
)
from minidiff_fast.models.transformer_for_diffusion import timestep_embedding
from minidiff_fast.ops import broadcast_modulate
from minidiff_fast.shapes import Layout, merge_samples, more_samples, split_samples


class ConditionModulation(NamedTuple):
    """What :meth:`ConditionalUnet1D.encode` keeps of a condition; every tensor has leading dimension B.

    A NamedTuple of tuples of tensors, hence a pytree without a None in it.
    """

    film: tuple[Tensor, ...]
    """Per residual block W_g Mish(g) + bias, [B, C] or, with cond_predict_scale, [B, 2 C] = (scale, shift). Empty
    without global_cond_dim."""
    local: tuple[Tensor, ...]
    """With a local condition: its first convolution, normalised and activated, and its residual, each
    [B, 1, T, C] (on the CPU) or [B, 1, C, T]."""


pytree._register_namedtuple(ConditionModulation, serialized_type_name="minidiff_fast.models.ConditionModulation")
torch.serialization.add_safe_globals([ConditionModulation])  # saved exports hold one as their example


class ConditionalUnet1D(nn.Module):
    r"""U-Net over T action tokens; FiLM in every residual block from the timestep and a global condition.

    A residual block with input x, condition c = cat(e(t), g) and norm = GroupNorm:

    .. math::
        (r, s) = W \, \mathrm{Mish}(c) + b, \quad
        h = r \odot \mathrm{Mish}(\mathrm{norm}(\mathrm{conv}_1 x)) + s, \quad
        y = \mathrm{Mish}(\mathrm{norm}(\mathrm{conv}_2 h)) + R x

    (without cond_predict_scale only s, added). Mish acts elementwise, so :math:`W \mathrm{Mish}(c) = W_t
    \mathrm{Mish}(e(t)) + W_g \mathrm{Mish}(g)` exactly: :meth:`encode` computes the second term once per condition,
    :meth:`denoise` the first per sample, or per distinct timestep where num_train_timesteps says how many there are.

    Args:
        input_dim: channels Da of an action.
        local_cond_dim: channels of a condition per token, or None. As in the peer's published checkpoints it acts
            on the way down only: the second half of ``local_cond_encoder`` has parameters and no effect.
        global_cond_dim: channels G of the condition, or None for none.
        diffusion_step_embed_dim: width of the timestep embedding, even and at least 4.
        down_dims: channels per resolution, multiples of n_groups, the first one of 8, too; each resolution after
            the first halves the tokens, so T is a multiple of 2 ** (len(down_dims) - 1).
        kernel_size: of the convolutions, odd.
        n_groups: of the group norms; the last block has 8, as in the peer.
        cond_predict_scale: FiLM multiplies (by ``scale``, not ``1 + scale``), too.
        layout: how :meth:`forward` orders its N = B * K rows, "bk" (row b*K + k) or "kb" (row k*B + b).
        impl: implementation of ``broadcast_modulate``; None or "auto" chooses by device.
        num_train_timesteps: where integer timesteps are from 0 to num_train_timesteps - 1, their part is computed
            once per timestep and looked up, as soon as there are more samples than timesteps (never in an export).
            A timestep outside is an IndexError on the CPU and an assertion on a GPU.

    On the CPU convolutions run as matrix products over channels-last tokens
    (:mod:`minidiff_fast.nn.token_conv`), elsewhere as those of torch.

    Raises :class:`InvalidArgument` for argument values that make no model.
    """

    reads_parts: ClassVar[bool] = True
    """FSDP2 shards this module as a whole: it reads parameters of its parts itself."""

    def __init__(
        self,
        input_dim: int,
        local_cond_dim: int | None = None,
        global_cond_dim: int | None = None,
        diffusion_step_embed_dim: int = 256,
        down_dims: Sequence[int] = (256, 512, 1024),
        kernel_size: int = 3,
        n_groups: int = 8,
        cond_predict_scale: bool = False,
        *,
        layout: Layout = "bk",
        impl: str | None = None,
        num_train_timesteps: int | None = None,
    ) -> None:
        super().__init__()
        dims = tuple(down_dims)
        checks.check_constructor(
            dims, kernel_size, n_groups, diffusion_step_embed_dim, layout, impl, input_dim=input_dim,
            local_cond_dim=local_cond_dim, global_cond_dim=global_cond_dim, num_train_timesteps=num_train_timesteps,
        )  # fmt: skip
        self.input_dim, self.local_cond_dim, self.global_cond_dim = input_dim, local_cond_dim, global_cond_dim
        self.step_dim, self.cond_predict_scale = diffusion_step_embed_dim, cond_predict_scale
        self.num_train_timesteps = num_train_timesteps
        self.multiple = 2 ** (len(dims) - 1)
        """T is a multiple of this."""
        self.layout: Layout = layout
        self.impl = impl

        def block(inputs: int, outputs: int) -> ResidualBlock:
            cond_dim = diffusion_step_embed_dim + (global_cond_dim or 0)
            return ResidualBlock(inputs, outputs, cond_dim, kernel_size, n_groups, cond_predict_scale)

        # The order of creation is that of the draws from the random generator, the order of assignment that of
        # the state dict.
        steps = nn.Sequential(
            nn.Identity(),  # the place of the sinusoidal embedding
            nn.Linear(diffusion_step_embed_dim, 4 * diffusion_step_embed_dim),
            nn.Mish(),
            nn.Linear(4 * diffusion_step_embed_dim, diffusion_step_embed_dim),
        )
        local = None
        if local_cond_dim is not None:
            local = nn.ModuleList([block(local_cond_dim, dims[0]), block(local_cond_dim, dims[0])])
        self.mid_modules = nn.ModuleList([block(dims[-1], dims[-1]), block(dims[-1], dims[-1])])
        down, up = nn.ModuleList(), nn.ModuleList()
        for i, (before, after) in enumerate(zip((input_dim, *dims[:-1]), dims, strict=True)):
            last = nn.Identity() if i == len(dims) - 1 else Downsample(after)
            down.append(nn.ModuleList([block(before, after), block(after, after), last]))
        for inner, outer in zip(dims[:0:-1], dims[-2::-1], strict=True):
            up.append(nn.ModuleList([block(2 * inner, outer), block(outer, outer), Upsample(outer)]))
        final = nn.Sequential(ConvBlock(dims[0], dims[0], kernel_size, 8), nn.Conv1d(dims[0], input_dim, 1))
        self.diffusion_step_encoder = steps
        self.local_cond_encoder = local
        self.up_modules = up
        self.down_modules = down
        self.final_conv = final

    # ---------------------------------------------------------------- public

    def forward(
        self,
        sample: Tensor,  # [N, T, Da]
        timestep: Tensor | float | int,  # scalar, [1] or [N]: the diffusion step
        local_cond: Tensor | None = None,  # [B, T, Dl] or [N, T, Dl]
        global_cond: Tensor | None = None,  # [B, G], N = B * K; B = N is the ordinary case
    ) -> Tensor:  # [N, T, Da]
        """Predict from flattened rows: the peer's forward, plus conditions given once for their K rows.

        ``global_cond`` with N rows pairs row by row (K = 1). With B < N rows, N = B * K, rows are assigned to
        conditions by ``layout``, and the result equals that of ``global_cond`` repeated to N rows. ``local_cond``
        has as many rows as ``global_cond`` or as ``sample``.

        Raises :class:`InvalidArgument` for shapes, dtypes and devices that do not fit.
        """
        batch, per_sample = checks.check_rows(sample, local_cond, global_cond, self.input_dim)
        times = checks.row_timesteps(timestep, sample, checks.NAME)
        cache = self.encode(global_cond, None if per_sample else local_cond)
        own = split_samples(local_cond, batch, self.layout) if local_cond is not None and per_sample else None
        x, t = split_samples(sample, batch, self.layout), split_samples(times, batch, self.layout)
        return merge_samples(self.denoise(cache, x, t, own), self.layout)

    def encode(
        self,
        global_cond: Tensor | None = None,  # [B, G]; None where global_cond_dim is None
        local_cond: Tensor | None = None,  # [B, T, Dl]: a local condition that the K samples share
    ) -> ConditionModulation:
        """Everything that depends on the condition alone, computed once for its K samples."""
        checks.check_global(global_cond, self.global_cond_dim, self._parameter)
        film: tuple[Tensor, ...] = ()
        if global_cond is not None:
            activated = F.mish(global_cond)
            linears = [block.linear for block in self._blocks()]
            film = tuple(F.linear(activated, each.weight[:, self.step_dim :], each.bias) for each in linears)
        if local_cond is None:
            return ConditionModulation(film, ())
        batch = None if global_cond is None else global_cond.shape[0]
        checks.check_local(local_cond, self.local_cond_dim, [batch], self._parameter)
        x = self._inward(local_cond[:, None])
        block = self._local_block()
        return ConditionModulation(film, (block.first(x, impl=self.impl), block.residual(x)))

    def denoise(
        self,
        cache: ConditionModulation,  # leading dim B
        sample: Tensor,  # [B, K, T, Da]
        timestep: Tensor,  # [B, K]
        local_cond: Tensor | None = None,  # [B, K, T, Dl]: a sample's own local condition
    ) -> Tensor:  # [B, K, T, Da]
        """Predict for K samples of each condition, each with its own timestep.

        ``sample`` has the dtype of the parameters unless autocast is on. Raises :class:`InvalidArgument` for
        shapes, dtypes and devices that do not fit.
        """
        checks.check_sample(sample, timestep, self.input_dim, self.multiple, self._parameter)
        self._check_cache(cache, sample, local_cond)
        film = self._film(cache, timestep)
        local = self._local(cache, local_cond, sample.shape[1], film)
        x, skips = self._inward(sample), []
        for i, (first, second, down) in enumerate(self._levels(self.down_modules)):
            x = first(x, next(film), self.impl)
            if i == 0 and local is not None:
                x = x + local
            x = second(x, next(film), self.impl)
            skips.append(x)
            x = down(x)
        for middle in self.mid_modules:
            x = middle(x, next(film), self.impl)
        channels = channel_axis(x)
        for first, second, up in self._levels(self.up_modules):
            x = torch.cat([x, skips.pop()], dim=channels)
            x = first(x, next(film), self.impl)
            x = up(second(x, next(film), self.impl))
        last, head = cast("tuple[ConvBlock, nn.Conv1d]", tuple(self.final_conv))
        x = convolve(head, last(x, impl=self.impl))
        return x if channels == 3 else x.transpose(2, 3)

    def get_optim_groups(self, weight_decay: float = 1e-3) -> list[dict[str, object]]:
        """Two groups: weights of Linear and convolution layers decay; biases and norms do not."""
        decay = [p for p in self.parameters() if p.dim() >= 2]
        rest = [p for p in self.parameters() if p.dim() < 2]
        return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]

    # ---------------------------------------------------------------- the parts

    def _film(self, cache: ConditionModulation, timestep: Tensor) -> Iterator[Modulation]:
        """Of every block, in the order in which they run."""
        count = self.num_train_timesteps
        times, lookup = timestep, None
        if count is not None and not timestep.is_floating_point() and more_samples(timestep, count):
            times, lookup = torch.arange(count, device=timestep.device), timestep.long()
        embedded = timestep_embedding(times, self.step_dim).to(self._parameter.dtype)
        steps = F.mish(self.diffusion_step_encoder(embedded))  # [S, E] or [B, K, E]
        for i, block in enumerate(self._blocks()):
            bias = None if cache.film else block.linear.bias
            own = F.linear(steps, block.linear.weight[:, : self.step_dim], bias)
            if lookup is not None:
                own = F.embedding(lookup, own)
            yield block.modulation(own, cache.film[i] if cache.film else None)

    def _local(
        self, cache: ConditionModulation, local_cond: Tensor | None, samples: int, film: Iterator[Modulation]
    ) -> Tensor | None:
        """The local condition's features [B, K, ...], added once on the way down; None without one."""
        if self.local_cond_encoder is None:
            return None
        modulation, block = next(film), self._local_block()
        if local_cond is not None:
            features: Tensor = block(self._inward(local_cond), modulation, self.impl)
            return features
        if not cache.local:
            return None
        hidden, residual = (part.expand(-1, samples, -1, -1) for part in cache.local)
        first = channel_axis(hidden) == 2
        hidden = broadcast_modulate(hidden, channels_first=first, impl=self.impl, **modulation._asdict())
        features = block.second(hidden, residual=residual, impl=self.impl)
        return features

    def _local_block(self) -> ResidualBlock:
        return cast(ResidualBlock, cast(nn.ModuleList, self.local_cond_encoder)[0])

    def _blocks(self) -> list[ResidualBlock]:
        """In the order in which they run."""
        local = [] if self.local_cond_encoder is None else [self._local_block()]
        down = [block for level in self._levels(self.down_modules) for block in level[:2]]
        up = [block for level in self._levels(self.up_modules) for block in level[:2]]
        return [*local, *down, *cast("list[ResidualBlock]", list(self.mid_modules)), *up]

    def _levels(self, levels: nn.ModuleList) -> list[tuple[ResidualBlock, ResidualBlock, nn.Module]]:
        return [cast(Any, tuple(cast(nn.ModuleList, level))) for level in levels]

    def _inward(self, x: Tensor) -> Tensor:
        """[B, K, T, C] as the convolutions of this device take it."""
        return x if channel_axis(x) == 3 else x.transpose(2, 3)

    @property
    def _parameter(self) -> Tensor:
        return cast(nn.Conv1d, self.final_conv[1]).weight

    def _check_cache(self, cache: ConditionModulation, sample: Tensor, local_cond: Tensor | None) -> None:
        blocks = 0 if self.global_cond_dim is None else len(self._blocks())
        tokens = cache.local[0].shape[5 - channel_axis(sample)] if cache.local else None
        checks.check_cache(cache.film, cache.local, blocks, tokens, sample, local_cond)
        if local_cond is not None:
            checks.check_local(local_cond, self.local_cond_dim, list(sample.shape[:2]), self._parameter, sample)
