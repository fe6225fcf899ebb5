"""diffusion_policy's interface in plain PyTorch, for machines where diffusion_policy itself is not installed.

Networks and policies have the names of weights, the attributes and the loss that minidiff_fast looks for, and nothing
else of the original (https://github.com/real-stanford/diffusion_policy).
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SinusoidalPosEmb(nn.Module):
    """Sines, then cosines, of the timestep."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        half = self.dim // 2
        frequency = torch.exp(torch.arange(half, device=x.device) * (-math.log(10000) / (half - 1)))
        angle = x[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], -1)


class Conv1dBlock(nn.Module):
    """Convolution, group norm, Mish."""

    def __init__(self, inputs: int, outputs: int, kernel: int, groups: int = 8) -> None:
        super().__init__()
        conv = nn.Conv1d(inputs, outputs, kernel, padding=kernel // 2)
        self.block = nn.Sequential(conv, nn.GroupNorm(groups, outputs), nn.Mish())

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class ConditionalResidualBlock1D(nn.Module):
    """Two blocks with FiLM between them, and a residual."""

    def __init__(self, inputs: int, outputs: int, cond: int, kernel: int, groups: int, scale: bool) -> None:
        super().__init__()
        blocks = [Conv1dBlock(inputs, outputs, kernel, groups), Conv1dBlock(outputs, outputs, kernel, groups)]
        self.blocks = nn.ModuleList(blocks)
        self.cond_encoder = nn.Sequential(nn.Mish(), nn.Linear(cond, outputs * (2 if scale else 1)))
        self.residual_conv = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.scale = scale

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        hidden, film = self.blocks[0](x), self.cond_encoder(cond)[:, :, None]
        if self.scale:
            factor, shift = film.chunk(2, 1)
            hidden = factor * hidden + shift
        else:
            hidden = hidden + film
        return self.blocks[1](hidden) + self.residual_conv(x)


class Resample(nn.Module):
    """A convolution called ``conv``."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class ConditionalUnet1D(nn.Module):
    """forward(sample [N, T, A], timestep [N], local_cond [N, T, Dl], global_cond [N, G]) -> [N, T, A]."""

    def __init__(
        self, input_dim: int, local_cond_dim: int | None = None, global_cond_dim: int | None = None,
        diffusion_step_embed_dim: int = 256, down_dims: tuple[int, ...] = (256, 512, 1024), kernel_size: int = 3,
        n_groups: int = 8, cond_predict_scale: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        width, dims = diffusion_step_embed_dim, [input_dim, *down_dims]
        rest = (width + (global_cond_dim or 0), kernel_size, n_groups, cond_predict_scale)

        def block(inputs: int, outputs: int) -> nn.Module:
            return ConditionalResidualBlock1D(inputs, outputs, *rest)

        steps = [SinusoidalPosEmb(width), nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width)]
        self.diffusion_step_encoder = nn.Sequential(*steps)
        self.local_cond_encoder = None
        if local_cond_dim is not None:
            self.local_cond_encoder = nn.ModuleList([block(local_cond_dim, dims[1]), block(local_cond_dim, dims[1])])
        self.mid_modules = nn.ModuleList([block(dims[-1], dims[-1]), block(dims[-1], dims[-1])])
        self.down_modules, self.up_modules = nn.ModuleList(), nn.ModuleList()
        pairs = list(itertools.pairwise(dims))
        for level, (a, b) in enumerate(pairs, 1):
            down = Resample(nn.Conv1d(b, b, 3, 2, 1)) if level < len(pairs) else nn.Identity()
            self.down_modules.append(nn.ModuleList([block(a, b), block(b, b), down]))
        for a, b in reversed(pairs[1:]):
            up = Resample(nn.ConvTranspose1d(a, a, 4, 2, 1))
            self.up_modules.append(nn.ModuleList([block(2 * b, a), block(a, a), up]))
        self.final_conv = nn.Sequential(Conv1dBlock(dims[1], dims[1], kernel_size), nn.Conv1d(dims[1], input_dim, 1))

    def forward(
        self, sample: Tensor, timestep: Tensor, local_cond: Tensor | None = None, global_cond: Tensor | None = None
    ) -> Tensor:
        cond = self.diffusion_step_encoder(timestep)
        if global_cond is not None:
            cond = torch.cat([cond, global_cond], -1)
        x, skips = sample.transpose(1, 2), []
        for level, (first, second, down) in enumerate(self.down_modules):
            x = first(x, cond)
            if level == 0 and local_cond is not None and self.local_cond_encoder is not None:
                x = x + self.local_cond_encoder[0](local_cond.transpose(1, 2), cond)
            skips.append(second(x, cond))
            x = down(skips[-1])
        for middle in self.mid_modules:
            x = middle(x, cond)
        for first, second, up in self.up_modules:
            x = up(second(first(torch.cat([x, skips.pop()], 1), cond), cond))
        return self.final_conv(x).transpose(1, 2)


class TransformerForDiffusion(nn.Module):
    """forward(sample [N, T, A], timestep [N], cond [N, To, D]) -> [N, T, A]."""

    def __init__(
        self, input_dim: int, horizon: int, n_obs_steps: int, cond_dim: int, n_layer: int, n_head: int, n_emb: int,
        causal_attn: bool = False, n_cond_layers: int = 0, dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        options = {"dim_feedforward": 4 * n_emb, "dropout": dropout, "activation": "gelu", "batch_first": True}
        self._dummy_variable = nn.Parameter(torch.empty(0))
        self.input_emb, self.time_emb = nn.Linear(input_dim, n_emb), SinusoidalPosEmb(n_emb)
        self.pos_emb = nn.Parameter(0.02 * torch.randn(1, horizon, n_emb))
        self.cond_pos_emb = nn.Parameter(0.02 * torch.randn(1, 1 + (n_obs_steps if cond_dim else 0), n_emb))
        self.cond_obs_emb = nn.Linear(cond_dim, n_emb) if cond_dim else None
        self.drop = nn.Dropout(dropout)
        self.encoder: nn.Module = nn.Sequential(nn.Linear(n_emb, 4 * n_emb), nn.Mish(), nn.Linear(4 * n_emb, n_emb))
        if n_cond_layers:
            layer = nn.TransformerEncoderLayer(n_emb, n_head, norm_first=True, **options)
            self.encoder = nn.TransformerEncoder(layer, n_cond_layers, enable_nested_tensor=False)
        decoder = nn.TransformerDecoderLayer(n_emb, n_head, norm_first=True, **options)
        self.decoder = nn.TransformerDecoder(decoder, n_layer)
        rows, columns = torch.arange(horizon)[:, None], torch.arange(max(horizon, 1 + n_obs_steps))[None]
        hidden = torch.full((horizon, columns.shape[1]), -torch.inf)
        mask = hidden.masked_fill(columns <= rows, 0)[:, :horizon]
        memory_mask = hidden.masked_fill(columns - 1 <= rows, 0)[:, : 1 + n_obs_steps]
        self.register_buffer("mask", mask if causal_attn else None)
        self.register_buffer("memory_mask", memory_mask if causal_attn and cond_dim else None)
        self.ln_f, self.head = nn.LayerNorm(n_emb), nn.Linear(n_emb, input_dim)

    def forward(self, sample: Tensor, timestep: Tensor, cond: Tensor | None = None) -> Tensor:
        memory = self.time_emb(timestep)[:, None].to(sample.dtype)
        if cond is not None and self.cond_obs_emb is not None:
            memory = torch.cat([memory, self.cond_obs_emb(cond)], 1)
        memory = self.encoder(self.drop(memory + self.cond_pos_emb[:, : memory.shape[1]]))
        x = self.drop(self.input_emb(sample) + self.pos_emb[:, : sample.shape[1]])
        x = self.decoder(x, memory, tgt_mask=self.mask, memory_mask=self.memory_mask)
        return self.head(self.ln_f(x))


class Field(nn.Module):
    """x -> scale * x + offset."""

    def __init__(self, scale: Tensor, offset: Tensor) -> None:
        super().__init__()
        self.scale, self.offset = nn.Parameter(scale, False), nn.Parameter(offset, False)

    def normalize(self, x: Tensor) -> Tensor:
        return x * self.scale + self.offset


class LinearNormalizer(nn.ModuleDict):
    """``normalizer[name].normalize(x)`` and ``normalizer.normalize({name: x})``."""

    def normalize(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self[name].normalize(value) for name, value in batch.items()}


class LowdimMaskGenerator(nn.Module):
    """Which parts of a trajectory are given: of actions none."""

    def __init__(self, action_visible: bool = False, obs_dim: int = 0) -> None:
        super().__init__()
        self.action_visible, self.obs_dim = action_visible, obs_dim

    def forward(self, shape: torch.Size) -> Tensor:
        return torch.zeros(shape, dtype=torch.bool)


class Policy(nn.Module):
    """The low-dimensional policies (``obs_dim``) and, with ``obs_encoder``, those of images; U-Net or transformer."""

    def __init__(self, model: nn.Module, noise_scheduler: Any, normalizer: nn.Module, **options: Any) -> None:
        super().__init__()
        self.model, self.noise_scheduler, self.normalizer = model, noise_scheduler, normalizer
        self.mask_generator = LowdimMaskGenerator()
        self.pred_action_steps_only = self.oa_step_convention = False
        for name, value in options.items():
            setattr(self, name, value)

    def condition(self, obs: Any, batch: int) -> dict[str, Tensor]:
        """Observations -> keyword arguments of the network."""
        steps: Any = self.n_obs_steps
        if hasattr(self, "obs_encoder"):
            rows = {name: x[:, :steps].flatten(0, 1) for name, x in self.normalizer.normalize(obs).items()}
            obs = self.obs_encoder(rows).unflatten(0, (batch, -1))
        else:
            obs = self.normalizer["obs"].normalize(obs)
        if getattr(self, "obs_as_local_cond", False):
            return {"local_cond": torch.cat([obs[:, :steps], torch.zeros_like(obs[:, steps:])], 1)}
        if hasattr(self, "obs_as_cond"):
            return {"cond": obs[:, :steps]}
        return {"global_cond": obs[:, :steps].flatten(1)}

    def compute_loss(self, batch: dict[str, Any]) -> Tensor:
        """The mean squared error at one timestep per row."""
        actions = self.normalizer["action"].normalize(batch["action"])
        condition = self.condition(batch["obs"], len(actions))
        if self.pred_action_steps_only:
            start = self.n_obs_steps - int(self.oa_step_convention or hasattr(self, "obs_as_cond"))
            actions = actions[:, start : start + self.n_action_steps]
        noise = torch.randn(actions.shape, device=actions.device)
        times = torch.randint(0, self.noise_scheduler.config.num_train_timesteps, (len(actions),), device=noise.device)
        predicted = self.model(self.noise_scheduler.add_noise(actions, noise, times), times, **condition)
        target = noise if self.noise_scheduler.config.prediction_type == "epsilon" else actions
        return F.mse_loss(predicted, target)
