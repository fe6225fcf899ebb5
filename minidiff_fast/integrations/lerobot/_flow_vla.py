"""What lerobot's SmolVLA and pi0 have in common: a flow-matching head whose action tokens read a shared prefix."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.integrations.adapter import Level2Adapter
from minidiff_fast.level2 import Level2Batch
from minidiff_fast.nn.condition_cache import LayerCache
from minidiff_fast.objectives.imitation import BetaTimes, DenoisingLoss, FlowMatching
from minidiff_fast.ops.broadcast_attention import broadcast_attention
from minidiff_fast.ops.denoising_loss import denoising_loss
from minidiff_fast.ops.rotary import Rotary, RotaryPositions, rotate
from minidiff_fast.shapes import check_shape, describe

ACTION, STATE = "action", "observation.state"
TOKENS, TOKEN_MASK = "observation.language.tokens", "observation.language.attention_mask"


def has(owner: str, thing: Any, **attributes: str) -> None:
    """Raise :class:`InvalidArgument` unless ``thing`` has the attributes; the values say what each is for."""
    for name, purpose in attributes.items():
        if getattr(thing, name, None) is None:
            raise InvalidArgument(
                f"{owner}: expected {type(thing).__name__} with {name} ({purpose}) as in lerobot 0.6, got none"
            )


@dataclass(frozen=True, eq=False)
class PaddedActionLoss(DenoisingLoss):
    r"""The mean squared error over the first ``width`` of A action channels: the others are padding.

    Noise is drawn, and the network is run, at the padded width A, as the peers do.
    """

    width: int = 0
    """The robot's own action dimension."""

    def per_sample(
        self, denoise: Callable[[Any, Tensor, Tensor], Tensor], cache: Any, batch: Level2Batch
    ) -> Tensor:  # [B, K] float32
        """The loss of every sample of ``batch``, weights applied.

        Raises:
            InvalidArgument: the prediction is not of the noise's shape.
        """
        noised = batch.noised(self.process)
        prediction = denoise(cache, noised.x, noised.t)
        wanted = list(noised.target.shape)
        check_shape("PaddedActionLoss", "prediction", prediction, wanted, "[B, K, T, A]", describe(x=noised.x))
        cut, target = prediction[..., : self.width], noised.target[..., : self.width]
        return denoising_loss(cut, target, weight=batch.weight, mask=batch.mask).float()


class FlowVLA(Level2Adapter):
    """The part of SmolVLA's and pi0's adapters that they share; not for use by itself.

    The peer's policy is the submodule ``policy``: nothing of it is copied or changed, and it goes on working.
    """

    def __init__(self, policy: nn.Module, times: BetaTimes, width: int, *, impl: str | None) -> None:
        super().__init__()
        self.policy: Any = policy
        self.training = policy.training
        self.impl = impl
        self.objective: PaddedActionLoss = PaddedActionLoss(
            FlowMatching(noise_at=1, timestep_scale=1.0, time_quantile=times), width
        )

    @torch.no_grad()
    def sample(
        self,
        batch: dict[str, Tensor],
        k: int = 1,
        *,
        num_steps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:  # [B, K, T, A]
        """K action chunks for every observation, by the peer's Euler steps from t = 1 to t = 0; the prefix runs once.

        Actions are normalised and cut to the robot's own dimension, as from the peer's ``predict_action_chunk``.
        ``num_steps`` is the peer's own number where it is None.

        Raises:
            InvalidArgument: k or num_steps is below 1, or the policy is in training mode.
        """
        steps = self._steps if num_steps is None else num_steps
        name = type(self).__name__
        if k < 1 or steps < 1:
            raise InvalidArgument(f"{name}.sample: k and num_steps must be at least 1, got k = {k}, {steps} steps")
        if self.policy.training:
            raise InvalidArgument(f"{name}.sample: the policy is in training mode; call eval() first")
        cache = self.encode(batch)
        config = self.policy.config
        shape = (cache.batch, k, config.chunk_size, config.max_action_dim)
        x = torch.randn(shape, generator=generator, device=cache.device if generator is None else generator.device)
        x = x.to(cache.device)
        for step in range(steps):
            t = torch.full((1, 1), 1.0 - step / steps, device=x.device).expand(shape[:2])
            x = x - self.denoise(cache, x, t) / steps
        return self._restored(x[..., : self.objective.width])

    def _restored(self, actions: Tensor) -> Tensor:  # [B, K, T, A]
        """Sampled actions as the peer's ``predict_action_chunk`` returns them."""
        return actions

    @property
    def _steps(self) -> int:
        """The peer's number of denoising steps."""
        raise NotImplementedError

    def _checked(self, actions: Tensor) -> Tensor:  # [B, T, A]
        config = self.policy.config
        wanted = ["B", config.chunk_size, config.max_action_dim]
        check_shape(
            type(self).__name__, "actions", actions, wanted, "[B, chunk_size, max_action_dim]", describe(padded=actions)
        )
        return actions

    def _action_tokens(
        self,
        x: Tensor,  # [B, K, T, A]
        t: Tensor,  # [B, K]
        dtype: torch.dtype | None = None,
    ) -> Tensor:  # [B, K, T, C]
        """Noised actions and their times, fused by the peer's MLP; ``dtype`` is that of the time embedding."""
        model, config = self.policy.model, self.policy.config
        actions = model.action_in_proj(x)
        times = time_embedding(t, actions.shape[-1], config.min_period, config.max_period)
        times = times.to(actions.dtype if dtype is None else dtype)[:, :, None].expand_as(actions)
        fused: Tensor = model.action_time_mlp_out(F.silu(model.action_time_mlp_in(torch.cat([actions, times], -1))))
        return fused


def time_embedding(
    t: Tensor,  # [...], in [0, 1]
    width: int,
    shortest: float,
    longest: float,
) -> Tensor:  # [..., width], float64 (float32 on mps)
    r"""Sines, then cosines, of :math:`2 \pi t / period` with width / 2 periods from shortest to longest, geometric."""
    dtype = torch.float32 if t.device.type == "mps" else torch.float64
    fraction = torch.linspace(0.0, 1.0, width // 2, dtype=dtype, device=t.device)
    period = shortest * (longest / shortest) ** fraction
    angles = t[..., None] * (1.0 / period * 2 * math.pi)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


# -------------------------------------------------------------------- decoder layers


class Turns(NamedTuple):
    """A peer's own table of cosines and sines, in place of positions where it does not turn by exact frequencies."""

    cos: Tensor
    """[B, 1, T, 1, D] float32, the frequencies twice."""
    sin: Tensor
    """[B, 1, T, 1, D] float32."""

    def applied(self, x: Tensor) -> Tensor:  # [B, K, T, H, D]
        """``x`` turned as the peers turn it: all in its dtype."""
        first, second = x.chunk(2, -1)
        return x * self.cos.to(x.dtype) + torch.cat([-second, first], -1) * self.sin.to(x.dtype)


@dataclass(frozen=True)
class Decoder:
    """How a peer runs the layers of a Llama or Gemma decoder; the layers themselves are the peer's.

    Tokens are ``[B, K, T, C]``: those of the K samples of B conditions, or with K = 1 those of the conditions.
    """

    rotary: Rotary
    scale: float
    """Factor on the logits."""
    wide_residual: bool
    """Sums of a 32-bit stream and a 16-bit branch are 32-bit (pi0); else they are 16-bit (SmolVLA)."""
    impl: str | None = None

    def project(self, layer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[B, K, T, H, D]``, keys and values ``[B, K, T, Hkv, D]``; not rotated."""
        h, attention = self._input(layer, x)
        return tuple(  # type: ignore[return-value]
            each(h).unflatten(-1, (-1, attention.head_dim))
            for each in (attention.q_proj, attention.k_proj, attention.v_proj)
        )

    def queries(self, layer: Any, x: Tensor) -> Tensor:
        """``[B, K, T, H, D]``."""
        h, attention = self._input(layer, x)
        out: Tensor = attention.q_proj(h).unflatten(-1, (-1, attention.head_dim))
        return out

    def rotated(self, k: Tensor, positions: Tensor | Turns) -> Tensor:
        """Keys ``[B, K, T, Hkv, D]``, turned by their positions ``[B, 1, T]``."""
        if isinstance(positions, Turns):
            return positions.applied(k)
        return rotate(k, positions.expand(k.shape[:3]), self.rotary)

    def attend(
        self,
        q: Tensor,  # [B, K, T, H, D]
        shared: LayerCache,
        own: tuple[Tensor, Tensor] | None,  # [B, K, T, Hkv, D] each
        positions: Tensor | Turns,  # [B or 1, 1, T]
        *,
        causal: bool = False,
    ) -> Tensor:  # [B, K, T, H * D]
        """One softmax over the condition's tokens and the sample's own; queries and own keys are rotated on the way."""
        own_k, own_v = (None, None) if own is None else own
        rope = None
        if isinstance(positions, Turns):
            q, own_k = positions.applied(q), None if own_k is None else positions.applied(own_k)
        else:
            places = positions.expand(q.shape[:3])
            rope = RotaryPositions(self.rotary, places, None if own is None else places)
        dtype = torch.promote_types(q.dtype, shared.v.dtype)
        q, k, v = q.to(dtype), shared.k.to(dtype), shared.v.to(dtype)
        if own_k is not None and own_v is not None:
            own_k, own_v = own_k.to(dtype), own_v.to(dtype)
        mask = shared.mask if shared.mask is None or shared.mask.dim() == 3 else shared.mask[:, None]
        out = broadcast_attention(
            q, k, v, own_k, own_v, mask=mask, own_causal=causal, scale=self.scale, impl=self.impl, rope=rope
        )
        assert isinstance(out, Tensor)
        return out.flatten(-2)

    def finish(self, layer: Any, x: Tensor, attended: Tensor) -> Tensor:  # [B, K, T, C]
        """What follows the attention in a layer: its projection, the MLP, both residuals."""
        x = self._sum(x, layer.self_attn.o_proj(attended.to(layer.self_attn.o_proj.weight.dtype)))
        h = normed(layer.post_attention_layernorm, x)
        if self.wide_residual and layer.mlp.up_proj.weight.dtype == torch.bfloat16:
            h = h.to(torch.bfloat16)
        return self._sum(x, layer.mlp(h))

    def _input(self, layer: Any, x: Tensor) -> tuple[Tensor, Any]:
        return normed(layer.input_layernorm, x).to(layer.self_attn.q_proj.weight.dtype), layer.self_attn

    def _sum(self, x: Tensor, branch: Tensor) -> Tensor:
        out = x + branch
        return out if self.wide_residual else out.to(branch.dtype)


def normed(norm: nn.Module, x: Tensor) -> Tensor:
    """Norms of pi's Gemma give their output and a gate; the gate is None without adaptive norms."""
    out = norm(x)
    hidden: Tensor = out[0] if isinstance(out, tuple) else out
    return hidden


def rotary_of(owner: str, width: int, base: float) -> Rotary:
    """The peers' rotation: all channels of a head, pair i is channels i and i + D / 2."""
    if width % 2 or not 8 <= width <= 256:
        raise InvalidArgument(f"{owner}: heads must have an even number of 8 to 256 channels, got {width}")
    return Rotary(axes=1, rotary_dim=width, base=base, style="half")


def maybe_checkpoint(active: bool, function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)``, run again in the backward pass where ``active``."""
    if active:
        return checkpoint(function, *arguments, use_reentrant=False)
    return function(*arguments)


def places(mask: Tensor) -> Tensor:  # [B, S] bool -> [B, 1, S]
    """Positions of prefix tokens: those that count are numbered from 0, across the padding between them."""
    return (mask.cumsum(1) - 1)[:, None]


def suffix_places(mask: Tensor, tokens: int) -> Tensor:  # [B, S] bool -> [B, 1, T]
    """Positions of the tokens that follow a condition's counted ones."""
    return mask.sum(1)[:, None, None] + torch.arange(tokens, device=mask.device)
