"""Heads in the interfaces of CogACT and starVLA, which are not on PyPI: what tests, benches and examples run.

:class:`ActionModel` has the parts and the forward pass of CogACT's (in-context condition token, classifier-free
dropout per row, epsilon prediction); :class:`FlowHead` those of starVLA's ``FlowmatchingActionHead`` (a transformer of
diffusers' ``Attention`` layers, every second one reading the vision-language tokens). Both were written for this file.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Diffusion:
    """The part of a Gaussian diffusion that training needs; cosine schedule, tables in float64."""

    def __init__(self, num_timesteps: int = 100) -> None:
        def level(i: int) -> float:
            return math.cos((i / num_timesteps + 0.008) / 1.008 * math.pi / 2) ** 2

        betas = torch.tensor(
            [min(1 - level(i + 1) / level(i), 0.999) for i in range(num_timesteps)], dtype=torch.float64
        )
        self.num_timesteps = num_timesteps
        self.alphas_cumprod = torch.cumprod(1 - betas, 0).numpy()

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:  # [N, T, A], [N], [N, T, A]
        ab = torch.from_numpy(self.alphas_cumprod).to(t.device)[t][:, None, None]
        return ab.sqrt().float() * x_start + (1 - ab).sqrt().float() * noise


class ActionEmbedder(nn.Module):
    def __init__(self, actions: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(actions, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class TimestepEmbedder(nn.Module):
    def __init__(self, width: int, frequencies: int = 64) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))
        self.frequencies = frequencies

    def forward(self, t: Tensor) -> Tensor:  # [N]
        return self.mlp(sinusoids(t, self.frequencies).to(next(self.parameters()).dtype))


class LabelEmbedder(nn.Module):
    def __init__(self, width_in: int, width: int, dropout_prob: float, tokens: int = 1) -> None:
        super().__init__()
        self.linear = nn.Linear(width_in, width)
        self.dropout_prob = dropout_prob
        if dropout_prob > 0:
            self.uncondition = nn.Parameter(torch.randn(tokens, width_in))

    def forward(self, conditions: Tensor, train: bool) -> Tensor:  # [N, S, C]
        if train and self.dropout_prob > 0:
            dropped = torch.rand(conditions.shape[0], device=conditions.device) < self.dropout_prob
            conditions = torch.where(dropped[:, None, None], self.uncondition, conditions)
        return self.linear(conditions)


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # [N, T, D]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:  # [N, T, D]
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class FinalLayer(nn.Module):
    def __init__(self, width: int, actions: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, actions)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm_final(x))


class InContextDiT(nn.Module):
    """CogACT's DiT: [condition + time, actions] in one sequence."""

    def __init__(
        self,
        actions: int,
        width: int,
        depth: int,
        heads: int,
        token_size: int,
        horizon: int,
        dropout: float,
        tokens: int,
    ) -> None:
        super().__init__()
        self.learn_sigma, self.in_channels, self.past_action_window_size = False, actions, 0
        self.num_cond_tokens = tokens
        self.x_embedder = ActionEmbedder(actions, width)
        self.t_embedder = TimestepEmbedder(width)
        self.z_embedder = LabelEmbedder(token_size, width, dropout, tokens)
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(horizon + tokens, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.final_layer = FinalLayer(width, actions)

    def forward(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:  # [N, T, A], [N], [N, S, C]
        condition = self.t_embedder(t)[:, None] + self.z_embedder(z, self.training)
        h = torch.cat([condition, self.x_embedder(x)], 1) + self.positional_embedding
        for block in self.blocks:
            h = block(h)
        return self.final_layer(h)[:, condition.shape[1] :]


class ActionModel(nn.Module):
    """CogACT's: a diffusion and a network."""

    def __init__(
        self, actions: int = 7, width: int = 32, depth: int = 2, heads: int = 4, token_size: int = 48,
        horizon: int = 16, dropout: float = 0.1, tokens: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.diffusion = Diffusion()
        self.net = InContextDiT(actions, width, depth, heads, token_size, horizon, dropout, tokens)

    def loss(self, x: Tensor, z: Tensor, noise: Tensor | None = None, timestep: Tensor | None = None) -> Tensor:
        """CogACT's ``loss(x, z)`` on repeated rows; noise and times may be given, for comparisons."""
        noise = torch.randn_like(x) if noise is None else noise
        if timestep is None:
            timestep = torch.randint(0, self.diffusion.num_timesteps, (x.shape[0],), device=x.device)
        return (self.net(self.diffusion.q_sample(x, timestep, noise), timestep, z) - noise).square().mean()


# ------------------------------------------------------------------------------------------- starVLA's flow head


class FlowBlock(nn.Module):
    """adaLN of the time, attention to the memory or to itself, MLP."""

    def __init__(self, width: int, heads: int, memory: int | None) -> None:
        super().__init__()
        from diffusers.models.attention_processor import Attention

        self.modulation = nn.Linear(width, 2 * width)
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.attn1 = Attention(
            query_dim=width, heads=heads, dim_head=width // heads, bias=True, cross_attention_dim=memory
        )
        self.norm3 = nn.LayerNorm(width)
        self.ff = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, memory: Tensor | None, mask: Tensor | None, temb: Tensor) -> Tensor:
        scale, shift = self.modulation(F.silu(temb))[:, None].chunk(2, -1)
        x = x + self.attn1(self.norm1(x) * (1 + scale) + shift, encoder_hidden_states=memory, attention_mask=mask)
        return x + self.ff(self.norm3(x))


class FlowDiT(nn.Module):
    """Every second block reads the memory, which may be a list with one tensor for each block."""

    def __init__(self, width: int, depth: int, heads: int, memory: int) -> None:
        super().__init__()
        self.timestep_encoder = TimestepEmbedder(width)
        self.transformer_blocks = nn.ModuleList(
            FlowBlock(width, heads, memory if i % 2 == 0 else None) for i in range(depth)
        )
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Any, timestep: Tensor,
        encoder_attention_mask: Tensor | None = None, return_pre_output: bool = False,
    ) -> Tensor:  # fmt: skip
        temb = self.timestep_encoder(timestep)
        for i, block in enumerate(self.transformer_blocks):
            memory = encoder_hidden_states[i] if isinstance(encoder_hidden_states, list) else encoder_hidden_states
            own = i % 2 == 1
            hidden_states = block(hidden_states, None if own else memory, None if own else encoder_attention_mask, temb)
        return hidden_states if return_pre_output else self.norm_out(hidden_states)


class Drawn(NamedTuple):
    """Noise and times that a comparison gives to both sides."""

    noise: Tensor
    t: Tensor


class FlowHead(nn.Module):
    """State token, future tokens and action tokens, denoised under cross-attention to the vision-language tokens."""

    layerwise = False

    def __init__(
        self, actions: int = 7, width: int = 32, depth: int = 2, heads: int = 4, memory: int = 48, states: int = 8,
        future: int = 4, horizon: int = 16, add_pos_embed: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config = SimpleNamespace(noise_s=0.999, add_pos_embed=add_pos_embed)
        self.num_timestep_buckets, self.action_horizon, self.action_dim = 1000, horizon, actions
        self.beta_dist = torch.distributions.Beta(1.5, 1.0)
        self.model = FlowDiT(width, depth, heads, memory)
        self.state_encoder = None
        if states:
            self.state_encoder = nn.Sequential(nn.Linear(states, width), nn.ReLU(), nn.Linear(width, width))
        self.action_encoder = ActionAndTime(actions, width)
        self.action_decoder = nn.Linear(width, actions)
        self.future_tokens = nn.Embedding(future, width)
        if add_pos_embed:
            self.position_embedding = nn.Embedding(64, width)

    def sample_time(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        u = self.beta_dist.sample(torch.Size([batch_size])).to(device, dtype)
        return (0.999 - u.clamp(max=0.999)) / 0.999

    def forward(
        self, vl_embs: Any, actions: Tensor, state: Tensor | None = None, encoder_attention_mask: Tensor | None = None,
        drawn: Drawn | None = None,
    ) -> Tensor:  # fmt: skip
        """starVLA's loss on repeated rows; noise and times may be given, for comparisons."""
        if drawn is None:
            noise = torch.randn(actions.shape, device=actions.device, dtype=actions.dtype)
            drawn = Drawn(noise, self.sample_time(actions.shape[0], actions.device, actions.dtype))
        t = drawn.t[:, None, None].to(actions.dtype)
        steps = (drawn.t * self.num_timestep_buckets).long()
        features = self.action_encoder((1 - t) * drawn.noise + t * actions, steps)
        if self.config.add_pos_embed:
            features = features + self.position_embedding(torch.arange(actions.shape[1], device=actions.device))
        tokens = torch.cat([self.future_tokens.weight[None].expand(actions.shape[0], -1, -1), features], 1)
        if state is not None and self.state_encoder is not None:
            tokens = torch.cat([self.state_encoder(state), tokens], 1)
        out = self.model(tokens, vl_embs, steps, encoder_attention_mask, return_pre_output=self.layerwise)
        velocity = self.action_decoder(out)[:, -actions.shape[1] :]
        return (velocity - (actions - drawn.noise)).square().mean()


class LayerwiseFlowHead(FlowHead):
    """Each layer of the head reads its own layer of the vision-language model."""

    layerwise = True

    def sample_time(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        return (0.999 - self.beta_dist.sample(torch.Size([batch_size])).to(device, dtype)) / 0.999

    def forward(
        self, vl_embs_list: Any, actions: Tensor, state: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None, drawn: Drawn | None = None,
    ) -> Tensor:  # fmt: skip
        return super().forward(vl_embs_list, actions, state, encoder_attention_mask, drawn)


class ActionAndTime(nn.Module):
    def __init__(self, actions: int, width: int) -> None:
        super().__init__()
        self.W1, self.W2 = nn.Linear(actions, width), nn.Linear(2 * width, width)

    def forward(self, actions: Tensor, timesteps: Tensor) -> Tensor:  # [N, T, A], [N]
        x = self.W1(actions)
        t = sinusoids(timesteps, x.shape[-1]).to(x.dtype)[:, None].expand(-1, x.shape[1], -1)
        return F.silu(self.W2(torch.cat([x, t], -1)))


def sinusoids(t: Tensor, width: int) -> Tensor:  # [N] -> [N, width]
    angles = t[:, None].float() * torch.exp(
        -math.log(10000.0) * torch.arange(width // 2, device=t.device) / (width // 2)
    )
    return torch.cat([angles.cos(), angles.sin()], -1)
