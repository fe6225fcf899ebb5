"""TransformerForDiffusion: diffusion_policy's transformer denoiser, with the observations encoded once.

Source of the architecture: Chi et al., "Diffusion Policy: Visuomotor Policy Learning via Action Diffusion",
arXiv 2303.04137. Constructor, forward, state-dict keys and eval-mode numerics are those of the module of this
name in diffusion_policy, so its checkpoints load strictly and its configurations work unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.models import _transformer_checks as checks
from minidiff_fast.models._plain import plain
from minidiff_fast.nn.condition_cache import ConditionCache
from minidiff_fast.ops import broadcast_attention
from minidiff_fast.shapes import Layout, merge_samples, samples_per_condition, split_samples


def timestep_embedding(
    timestep: Tensor,  # [...], integer or floating
    dim: int,
) -> Tensor:  # [..., dim]
    """Sinusoidal embedding of the diffusion timestep (an index, not [0, 1]).

    With h = dim / 2 and w_i = 10000 ** (-i / (h - 1)):  out = [sin(t w_0..h-1), cos(t w_0..h-1)].
    ``dim`` is even and at least 4. float64 for float64 timesteps, float32 for every other dtype.
    """
    half = dim // 2
    frequency = torch.exp(
        torch.arange(half, device=timestep.device, dtype=torch.float32) * -(math.log(10000.0) / (half - 1))
    )
    angle = timestep.to(torch.promote_types(timestep.dtype, torch.float32)).unsqueeze(-1) * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class TransformerForDiffusion(nn.Module):
    """Transformer denoiser over T action tokens with cross-attention to [timestep token, observation tokens].

    Pre-norm decoder, per layer:

        x += SelfAttention(LN(x));  x += CrossAttention(LN(x), memory);  x += W_2 GELU(W_1 LN(x))

    and, for n_cond_layers = 0, memory = W_b Mish(W_a (token + position)), token by token. As that MLP never
    mixes tokens, the observation tokens and their keys and values depend on the condition alone:
    :meth:`encode` computes them once, and :meth:`denoise` attends from all K samples of a condition to them
    plus each sample's own timestep token, in one softmax (``broadcast_attention``).

    ========================  ==========================================  ==================================
    form                      arguments                                   sharing
    ========================  ==========================================  ==================================
    observation tokens        cond_dim > 0, n_cond_layers = 0             exact, nothing is copied
    mixing encoder            cond_dim > 0, n_cond_layers > 0             none: see ``unshared``
    no condition              cond_dim = 0 (time_as_cond True or False)   nothing to share, any K
    ========================  ==========================================  ==================================

    Args:
        input_dim, output_dim: channels of the sample and of the prediction.
        horizon: largest number of action tokens.
        n_obs_steps: largest number of observation steps To; None means ``horizon``.
        cond_dim: channels of one observation step; 0 for no observations.
        n_layer, n_head, n_emb: decoder depth, heads, width E (even, >= 4, a multiple of n_head).
        p_drop_emb, p_drop_attn: dropout after the embeddings; in attention weights and residual branches.
        causal_attn: action t attends to actions <= t, to its timestep token, and to observations <= t.
        time_as_cond: False puts the timestep token before the actions of an encoder-only model.
        obs_as_cond: implied by cond_dim > 0, as in the peer; True with cond_dim = 0 is an error here.
        n_cond_layers: self-attention layers over [timestep token, observation tokens]; 0 for the MLP.
        layout: how ``forward`` orders its N = B * K rows, "bk" (row b*K + k) or "kb" (row k*B + b).
        impl: implementation of ``broadcast_attention``; None or "auto" chooses by device.
        unshared: with n_cond_layers > 0 the encoder mixes each sample's timestep into the observations, so
            every sample has its own memory. "error" refuses K > 1; "repeat" computes K memories per condition
            from the one set of observation embeddings, with K times the memory and the time of that encoder.

    Dropout in training differs from the peer in one way: with shared observations, ``p_drop_emb`` on the
    observation tokens is drawn once per condition, for all its K samples. The rest is drawn per sample.
    ``_dummy_variable`` is empty and frozen; it exists for the peer's checkpoints.

    Raises :class:`InvalidArgument` for argument values that make no model.
    """

    mask: Tensor | None
    memory_mask: Tensor | None

    reads_parts: ClassVar[bool] = True
    """FSDP2 shards this module as a whole: it reads parameters of its parts itself."""

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        horizon: int,
        n_obs_steps: int | None = None,
        cond_dim: int = 0,
        n_layer: int = 12,
        n_head: int = 12,
        n_emb: int = 768,
        p_drop_emb: float = 0.1,
        p_drop_attn: float = 0.1,
        causal_attn: bool = False,
        time_as_cond: bool = True,
        obs_as_cond: bool = False,
        n_cond_layers: int = 0,
        *,
        layout: Layout = "bk",
        impl: str | None = None,
        unshared: checks.Unshared = "error",
    ) -> None:
        super().__init__()
        n_obs_steps = horizon if n_obs_steps is None else n_obs_steps
        checks.check_sizes(1, input_dim=input_dim, output_dim=output_dim, horizon=horizon)
        checks.check_sizes(1, n_obs_steps=n_obs_steps, n_layer=n_layer, n_head=n_head, n_emb=n_emb)
        checks.check_sizes(0, cond_dim=cond_dim, n_cond_layers=n_cond_layers)
        checks.check_form(cond_dim, time_as_cond, obs_as_cond, n_cond_layers)
        checks.check_width(n_emb, n_head, shares=cond_dim > 0 and n_cond_layers == 0)
        checks.check_options(layout, impl, unshared, p_drop_emb=p_drop_emb, p_drop_attn=p_drop_attn)

        self.horizon = horizon
        self.n_obs_steps = n_obs_steps
        self.input_dim = input_dim
        self.output_dim = output_dim
        self.cond_dim = cond_dim
        self.n_emb = n_emb
        self.n_head = n_head
        self.time_as_cond = time_as_cond
        self.obs_as_cond = cond_dim > 0
        self.encoder_only = not time_as_cond
        self.shares = cond_dim > 0 and n_cond_layers == 0
        """Whether the samples of a condition read the same keys and values."""
        self.T = horizon + (0 if time_as_cond else 1)
        self.T_cond = (1 if time_as_cond else 0) + (n_obs_steps if self.obs_as_cond else 0)
        self.layout: Layout = layout
        self.impl = impl
        self.unshared: checks.Unshared = unshared

        # The order of creation fixes the order of the state dict and of the draws from the random generator.
        self._dummy_variable = nn.Parameter(torch.empty(0), requires_grad=False)
        self.input_emb = nn.Linear(input_dim, n_emb)
        self.pos_emb = nn.Parameter(torch.zeros(1, self.T, n_emb))
        self.drop = nn.Dropout(p_drop_emb)
        self.cond_obs_emb = nn.Linear(cond_dim, n_emb) if self.obs_as_cond else None
        self.cond_pos_emb: nn.Parameter | None = None
        self.encoder: nn.Sequential | nn.TransformerEncoder
        self.decoder: nn.TransformerDecoder | None = None
        layer_args: dict[str, Any] = dict(
            d_model=n_emb,
            nhead=n_head,
            dim_feedforward=4 * n_emb,
            dropout=p_drop_attn,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        if self.encoder_only:
            self.encoder = _transformer_encoder(n_layer, layer_args)
        else:
            self.cond_pos_emb = nn.Parameter(torch.zeros(1, self.T_cond, n_emb))
            if n_cond_layers > 0:
                self.encoder = _transformer_encoder(n_cond_layers, layer_args)
            else:
                self.encoder = nn.Sequential(nn.Linear(n_emb, 4 * n_emb), nn.Mish(), nn.Linear(4 * n_emb, n_emb))
            self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**layer_args), n_layer)
        self._register_masks(causal_attn)
        self.ln_f = nn.LayerNorm(n_emb)
        self.head = nn.Linear(n_emb, output_dim)
        self._init_weights()

    # ---------------------------------------------------------------- public

    def forward(
        self,
        sample: Tensor,  # [N, T, Da]
        timestep: Tensor | float | int,  # scalar, [1] or [N]: the diffusion step
        cond: Tensor | None = None,  # [B, To, Dc], N = B * K; B = N is the ordinary case
    ) -> Tensor:  # [N, T, out]
        """Predict from flattened rows: the peer's forward, plus conditions given once for their K rows.

        ``cond`` with N rows pairs row by row (K = 1). With B < N rows, N = B * K, rows are assigned to
        conditions by ``layout``, and the result equals that of ``cond`` repeated to N rows.
        A timestep that is one number holds for all rows; a tensor may be integer or floating.

        Raises :class:`InvalidArgument` for shapes, dtypes and devices that do not fit, and for K > 1 where
        the model cannot share (``n_cond_layers > 0`` with ``unshared="error"``).
        """
        if sample.ndim != 3:
            raise InvalidArgument(
                f"TransformerForDiffusion: sample must be [N, T, Da] = [N, T, {self.input_dim}], "
                f"got {list(sample.shape)}"
            )
        times = checks.row_timesteps(timestep, sample)
        memory = self.encode(cond)
        rows = batch = sample.shape[0]
        if cond is not None and cond.shape[0] != rows:
            batch = cond.shape[0]
            samples_per_condition(checks.NAME, rows, batch)
        out = self.denoise(memory, split_samples(sample, batch, self.layout), split_samples(times, batch, self.layout))
        return merge_samples(out, self.layout)

    def encode(
        self,
        cond: Tensor | None = None,  # [B, To, Dc]; None where cond_dim = 0
    ) -> ConditionCache:
        """Everything that depends on the condition alone, computed once for its K samples.

        Observation tokens o_j = MLP(W cond_j + b + position_j), and per decoder layer l the keys W_k^l o_j
        and values W_v^l o_j. Models without a condition return an empty memory; models with
        ``n_cond_layers > 0`` return the observation embeddings, as their keys differ from sample to sample.
        """
        if not self.obs_as_cond:
            if cond is not None:
                raise InvalidArgument(
                    f"TransformerForDiffusion: cond must be None for a model with cond_dim = 0, got {list(cond.shape)}"
                )
            return ConditionCache((), ())
        cond = checks.check_cond(cond, self.cond_dim, self.n_obs_steps, self.pos_emb)
        embed = cast(nn.Linear, self.cond_obs_emb)
        position = cast(Tensor, self.cond_pos_emb)[:, 1 : 1 + cond.shape[1]]
        tokens = self.drop(embed(cond) + position)  # [B, To, E]
        if not self.shares:
            return ConditionCache((), (), (tokens,))
        tokens = self.encoder(tokens)
        return ConditionCache.of([self._project_memory(layer, tokens) for layer in self._layers()])

    def denoise(
        self,
        memory: ConditionCache,  # leading dim B
        sample: Tensor,  # [B, K, T, Da]
        timestep: Tensor,  # [B, K]
    ) -> Tensor:  # [B, K, T, out]
        """Predict for K samples of each condition, each with its own timestep.

        ``sample`` has the dtype of the parameters unless autocast is on. Raises :class:`InvalidArgument` for
        shapes, dtypes and devices that do not fit, and for K > 1 where the model cannot share.
        """
        checks.check_sample(sample, timestep, self.input_dim, self.horizon, self.pos_emb)
        self._check_memory(memory, *sample.shape[:2])
        x = self.input_emb(sample)  # [B, K, T, E]
        time = timestep_embedding(timestep, self.n_emb).to(self.pos_emb.dtype)  # [B, K, E]
        if self.encoder_only:
            x = self._encode_actions(x, time)
        elif memory.keys:
            x = self._decode_shared(memory, x, time)
        else:
            x = self._decode_unshared(memory, x, time)
        return self.head(self.ln_f(x))

    def get_optim_groups(self, weight_decay: float = 1e-3) -> list[dict[str, Any]]:
        """Two groups: weights of Linear and attention layers decay; biases, norms and positions do not."""
        parameters = dict(self.named_parameters())
        decay = {
            f"{prefix}.{name}"
            for prefix, module in self.named_modules()
            if isinstance(module, (nn.Linear, nn.MultiheadAttention))
            for name, _ in module.named_parameters(recurse=False)
            if name.endswith("weight")
        }
        return [
            {"params": [parameters[name] for name in sorted(decay)], "weight_decay": weight_decay},
            {"params": [parameters[n] for n in sorted(parameters.keys() - decay)], "weight_decay": 0.0},
        ]

    def configure_optimizers(
        self,
        learning_rate: float = 1e-4,
        weight_decay: float = 1e-3,
        betas: Sequence[float] = (0.9, 0.95),
    ) -> torch.optim.AdamW:
        """AdamW over :meth:`get_optim_groups`."""
        first, second = betas
        groups = self.get_optim_groups(weight_decay=weight_decay)
        return torch.optim.AdamW(groups, lr=learning_rate, betas=(first, second))

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.pos_emb.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return self.pos_emb.dtype

    # ---------------------------------------------------------------- the three forms

    def _decode_shared(self, memory: ConditionCache, x: Tensor, time: Tensor) -> Tensor:
        own = self.encoder(self.drop(time + cast(Tensor, self.cond_pos_emb)[:, 0]))  # [B, K, E]
        steps, observed = x.shape[2], memory.keys[0].shape[1]
        visible = None
        if self.memory_mask is not None:
            visible = (self.memory_mask[:steps, 1 : 1 + observed] == 0)[None]  # [1, T, To]
        x = self.drop(x + self.pos_emb[:, :steps])
        for layer, keys, values in zip(self._layers(), memory.keys, memory.values, strict=True):
            x = x + _self_attention(layer, x, causal=self.mask is not None)
            attention = plain(layer.multihead_attn, nn.MultiheadAttention, checks.NAME)
            query = F.linear(
                layer.norm2(x), attention.in_proj_weight[: self.n_emb], attention.in_proj_bias[: self.n_emb]
            )
            own_k, own_v = self._project_memory(layer, own.unsqueeze(2))  # [B, K, 1, H, D]
            crossed = broadcast_attention(
                query.unflatten(-1, (self.n_head, -1)),
                keys,
                values,
                own_k,
                own_v,
                mask=visible,
                dropout_p=attention.dropout if self.training else 0.0,
                impl=self.impl,
            )
            x = x + layer.dropout2(attention.out_proj(cast(Tensor, crossed).flatten(-2)))
            x = x + _feed_forward(layer, x)
        return x

    def _decode_unshared(self, memory: ConditionCache, x: Tensor, time: Tensor) -> Tensor:
        """Every sample has a memory of its own: the stock decoder over B * K rows."""
        batch, samples, steps = x.shape[:3]
        own = self.drop(time + cast(Tensor, self.cond_pos_emb)[:, 0]).unsqueeze(2)  # [B, K, 1, E]
        if memory.tokens:
            shared = memory.tokens[0].unsqueeze(1).expand(-1, samples, -1, -1)
            own = torch.cat([own, shared], dim=2)
        memory_rows = self.encoder(own.flatten(0, 1))  # [B * K, 1 + To, E]
        tgt_mask, memory_mask = self.mask, self.memory_mask
        decoded = cast(nn.TransformerDecoder, self.decoder)(
            tgt=self.drop(x + self.pos_emb[:, :steps]).flatten(0, 1),
            memory=memory_rows,
            tgt_mask=None if tgt_mask is None else tgt_mask[:steps, :steps],
            memory_mask=None if memory_mask is None else memory_mask[:steps, : memory_rows.shape[1]],
            tgt_is_causal=tgt_mask is not None,
        )
        return decoded.unflatten(0, (batch, samples))

    def _encode_actions(self, x: Tensor, time: Tensor) -> Tensor:
        """Encoder-only form: the timestep token goes before the actions."""
        batch, samples, steps = x.shape[:3]
        tokens = torch.cat([time.unsqueeze(2), x], dim=2) + self.pos_emb[:, : steps + 1]
        encoded = self.encoder(
            self.drop(tokens).flatten(0, 1),
            mask=None if self.mask is None else self.mask[: steps + 1, : steps + 1],
            is_causal=self.mask is not None,
        )
        return encoded[:, 1:].unflatten(0, (batch, samples))

    def _project_memory(self, layer: nn.TransformerDecoderLayer, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-attention keys and values of memory tokens [..., E], each [..., H, D]."""
        attention = plain(layer.multihead_attn, nn.MultiheadAttention, checks.NAME)
        kv = F.linear(tokens, attention.in_proj_weight[self.n_emb :], attention.in_proj_bias[self.n_emb :])
        k, v = kv.unflatten(-1, (2, self.n_head, -1)).unbind(-3)
        return k, v

    def _layers(self) -> list[nn.TransformerDecoderLayer]:
        return cast("list[nn.TransformerDecoderLayer]", cast(nn.TransformerDecoder, self.decoder).layers)

    def _check_memory(self, memory: ConditionCache, batch: int, samples: int) -> None:
        if not self.obs_as_cond:
            return
        expected = (len(self._layers()),) * 2 + (0,) if self.shares else (0, 0, 1)
        found = (len(memory.keys), len(memory.values), len(memory.tokens))
        if found != expected:
            raise InvalidArgument(
                "TransformerForDiffusion: memory must come from encode() of this model and hold "
                f"{expected} keys, values, tokens, got {found}"
            )
        if memory.batch != batch:
            raise InvalidArgument(
                f"TransformerForDiffusion: memory must hold B = {batch} conditions, as sample, got {memory.batch}"
            )
        if not (memory.lengths is memory.cu_seqlens is memory.mask is None):
            raise InvalidArgument(
                f"TransformerForDiffusion: memory must hold equally many tokens a condition, got {memory}"
            )
        if not self.shares and samples > 1 and self.unshared == "error":
            raise InvalidArgument(
                "TransformerForDiffusion: with n_cond_layers > 0 the encoder mixes each sample's timestep "
                f"into the observations, so K = {samples} samples cannot share a condition: pass cond "
                "repeated to N = B * K rows, or construct the model with unshared='repeat'"
            )

    # ---------------------------------------------------------------- construction

    def _register_masks(self, causal: bool) -> None:
        """Additive masks (0 visible, -inf hidden); buffers, because the peer's checkpoints hold them."""
        mask = memory_mask = None
        if causal:
            mask = torch.full((self.T, self.T), float("-inf")).triu(1)
            if self.obs_as_cond:
                # Column s = 0 is the timestep, column s the observation s - 1: row t sees s - 1 <= t.
                memory_mask = torch.full((self.T, self.T_cond), float("-inf")).triu(2)
        self.register_buffer("mask", mask)
        self.register_buffer("memory_mask", memory_mask)

    @torch.no_grad()
    def _init_weights(self) -> None:
        """Weights and positions normal(0, 0.02), biases 0, norms 1; cond_pos_emb 0 without observations."""
        for module in _children_first(self):
            if isinstance(module, (nn.Linear, nn.MultiheadAttention)):
                for name, parameter in module.named_parameters(recurse=False):
                    if name.endswith("weight"):
                        nn.init.normal_(parameter, mean=0.0, std=0.02)
                    else:
                        nn.init.zeros_(parameter)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        nn.init.normal_(self.pos_emb, mean=0.0, std=0.02)
        if self.obs_as_cond:
            nn.init.normal_(cast(Tensor, self.cond_pos_emb), mean=0.0, std=0.02)


def _self_attention(layer: nn.TransformerDecoderLayer, x: Tensor, causal: bool) -> Tensor:
    """dropout(SelfAttention(LN(x))) of each sample's action tokens, x [B, K, T, E]."""
    attention = plain(layer.self_attn, nn.MultiheadAttention, checks.NAME)
    qkv = F.linear(layer.norm1(x), attention.in_proj_weight, attention.in_proj_bias)
    qkv = qkv.flatten(0, 1).unflatten(-1, (3, attention.num_heads, -1))  # [N, T, 3, H, D]
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # [N, H, T, D]
    dropout_p = attention.dropout if layer.training else 0.0
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=causal)
    return layer.dropout1(attention.out_proj(out.transpose(1, 2).reshape(x.shape)))


def _feed_forward(layer: nn.TransformerDecoderLayer, x: Tensor) -> Tensor:
    """dropout(W2 dropout(GELU(W1 LN(x))))."""
    hidden = layer.dropout(F.gelu(layer.linear1(layer.norm3(x))))
    return layer.dropout3(layer.linear2(hidden))


def _transformer_encoder(depth: int, layer_args: dict[str, Any]) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(**layer_args)
    return nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)


def _children_first(module: nn.Module) -> list[nn.Module]:
    return [m for child in module.children() for m in _children_first(child)] + [module]
