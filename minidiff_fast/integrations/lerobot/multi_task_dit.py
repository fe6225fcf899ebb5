"""lerobot's multi_task_dit on Level-2 batches: one pass of the vision and text encoders for K noised samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.integrations.adapter import Level2Adapter
from minidiff_fast.integrations.lerobot._interface import check_interface
from minidiff_fast.level2 import Drawn, Noised
from minidiff_fast.models._plain import plain
from minidiff_fast.objectives.imitation import BetaTimes, DenoisingLoss, DiffusionProcess, FlowMatching
from minidiff_fast.ops.broadcast_linear import broadcast_linear
from minidiff_fast.ops.broadcast_modulate import broadcast_modulate
from minidiff_fast.ops.level2_noise import NoiseDraw, TimestepDraw, level2_noise
from minidiff_fast.shapes import check_shape

NAME = "Level2MultiTaskDiT"


@dataclass(frozen=True)
class NarrowingFlow(FlowMatching):
    r"""Flow matching that ends in noise of width ``sigma_min`` around the data, which is at t = 1.

    .. math::
        x_t = t x_0 + (1 - (1 - \sigma_{min}) t) \epsilon, \qquad target = x_0 - (1 - \sigma_{min}) \epsilon

    With ``sigma_min = 0`` it is :class:`FlowMatching` with ``noise_at = 0``.

    Source: the optimal-transport path of Lipman et al., arXiv 2210.02747.
    """

    noise_at: Literal[0, 1] = 0
    timestep_scale: float = 1.0
    sigma_min: float = 0.0
    """The standard deviation of the noise that is left at t = 1."""

    def __post_init__(self) -> None:
        if self.noise_at != 0 or not 0.0 <= self.sigma_min <= 1.0:
            raise InvalidArgument(
                f"NarrowingFlow: noise_at must be 0 and sigma_min in [0, 1], got {self.noise_at}, {self.sigma_min}"
            )

    def draw(
        self,
        x0: Tensor,  # [B, T, A]
        k: int,
        *,
        seed: Tensor,  # [1] int64
        timesteps: TimestepDraw = "iid",
        noise: NoiseDraw = "iid",
    ) -> Drawn:
        """Draw K times and noises for every condition and noise with them."""
        drawn = level2_noise(
            x0, k, schedule=None, prediction="flow", noise_at=0, timesteps=timesteps, noise=noise, seed=seed,
            return_noise=True,
        )  # fmt: skip
        assert drawn.noise is not None
        times = drawn.timesteps if self.time_quantile is None else self.time_quantile(drawn.timesteps)
        return Drawn(x0, times, drawn.noise, self.noised(x0, drawn.noise, times), self)

    def noised(
        self,
        x0: Tensor,  # [B, T, A]
        noise: Tensor,  # [B, K, T, A]
        t: Tensor,  # [B, K] float, in [0, 1]
    ) -> Noised:
        """Noise every condition's clean sample K times with noise at hand, in float32."""
        if not t.is_floating_point():
            raise InvalidArgument(f"NarrowingFlow: times must be floats in [0, 1], got {t.dtype}")
        time, kept = t.float()[:, :, None, None], 1.0 - self.sigma_min
        clean, eps = x0[:, None].float(), noise.float()
        x = time * clean + (1.0 - kept * time) * eps
        return Noised(x.to(x0.dtype), t * self.timestep_scale, clean - kept * eps)


class Level2MultiTaskDiT(Level2Adapter):
    r"""lerobot's ``MultiTaskDiTPolicy`` on Level-2 batches. The policy is held, not changed.

    Once per condition: the observation encoder (CLIP) and, of every block's adaLN, the condition's part
    (:func:`~minidiff_fast.ops.broadcast_linear`),

    .. math::
        W \, \mathrm{SiLU}([e_{bk}, g_b]) + bias = W_e \mathrm{SiLU}(e_{bk}) + (W_g \mathrm{SiLU}(g_b) + bias)

    with e the timestep's embedding and g the observation: SiLU works elementwise, so the linear layer splits exactly.
    Per sample: W_e, attention and the feed-forward layers, which are nearly all of the network behind the encoder.

    Noise schedule, prediction type, time distribution, ``sigma_min`` and the padding mask are those of
    ``policy.objective``. Batches are the dicts that ``policy.forward`` takes. Dropout and random crops follow
    ``policy.training``; a crop is drawn once per condition.

    Args:
        policy: lerobot's (interface of lerobot 0.6).

    Raises:
        InvalidArgument: the policy's interface is another one, or its times are of a Beta distribution of which
            neither parameter is 1; in :meth:`denoise`: another layer stands in the place of an adaLN's Linear (LoRA).

    Example::

        adapter = Level2MultiTaskDiT(policy)
        loss = adapter.loss(batch, k=8)         # in place of policy.forward(batch)[0]
    """

    padding: ClassVar[Literal["valid", "all"]] = "valid"

    def __init__(self, policy: nn.Module) -> None:
        _check_policy(policy)
        objective = DenoisingLoss(_process(policy))
        super().__init__()
        self.policy: Any = policy
        self.objective = objective
        self.training = policy.training
        self.masks_padding = bool(getattr(self.policy.objective, "do_mask_loss_for_padding", False))

    def encode(self, obs: dict[str, Any]) -> Tensor:  # [B, Cg]
        """The peer's batch -> its conditioning vector."""
        condition: Tensor = self.policy.observation_encoder.encode(self.policy._prepare_batch(obs))
        width = self.policy.noise_predictor.conditioning_dim
        check_shape(NAME, "the encoded observation", condition, ["B", width], "[B, Cg]", "see n_obs_steps")
        return condition

    def denoise(
        self,
        cache: Tensor,  # [B, Cg]
        x: Tensor,  # [B, K, T, A]
        t: Tensor,  # [B, K]
    ) -> Tensor:  # [B, K, T, A]
        """The peer's prediction at noised actions ``x`` and times ``t`` (integers, or in [0, 1])."""
        network = self.policy.noise_predictor
        embedded = network.time_mlp(t.reshape(-1)).unflatten(0, t.shape)
        hidden = network.input_proj(x)
        if network.pos_embedding is not None:
            hidden = hidden + network.pos_embedding[:, : x.shape[2]]
        for block in network.transformer_blocks:
            linear = plain(block.adaLN_modulation[1], nn.Linear, NAME)
            parameters = broadcast_linear(embedded, cache, linear.weight, linear.bias, activation="silu")
            hidden = _block(block, hidden, parameters)
        predicted: Tensor = network.output_proj(hidden)
        return predicted

    def actions(self, batch: dict[str, Any]) -> Tensor:  # [B, T, A]
        """``batch["action"]``."""
        if "action" not in batch:
            raise InvalidArgument(f"{NAME}: batch must hold 'action', got {sorted(batch)}")
        actions: Tensor = batch["action"]
        return actions

    def mask(self, batch: dict[str, Any]) -> Tensor | None:  # [B, T] bool
        """Not ``batch["action_is_pad"]``, where the policy masks padding."""
        if not self.masks_padding or "action_is_pad" not in batch:
            return None
        return ~batch["action_is_pad"]


def _block(
    block: Any,
    x: Tensor,  # [B, K, T, C]
    parameters: Tensor,  # [B, K, 6 C]: shift, scale, gate of attention, then of the MLP
) -> Tensor:  # [B, K, T, C]
    """The peer's block behind its ``adaLN_modulation``."""
    parts = parameters.chunk(6, -1)
    for (shift, scale, gate), norm, branch in ((parts[:3], block.norm1, _attention), (parts[3:], block.norm2, _mlp)):
        modulated = broadcast_modulate(x, own_shift=shift, own_scale=scale, norm="layer", eps=norm.eps, form="adaln")
        x = broadcast_modulate(branch(block, modulated).to(x.dtype), own_gate=gate, residual=x)
    return x


def _attention(
    block: Any,
    x: Tensor,  # [B, K, T, C]
) -> Tensor:  # [B, K, T, C]
    rows = x.flatten(0, 1)
    attended = block.attn(rows) if block.use_rope else block.multihead_attn(rows, rows, rows, need_weights=False)[0]
    unflattened: Tensor = attended.unflatten(0, x.shape[:2])
    return unflattened


def _mlp(
    block: Any,
    x: Tensor,  # [B, K, T, C]
) -> Tensor:  # [B, K, T, C]
    out: Tensor = block.mlp(x)
    return out


def _process(policy: Any) -> DiffusionProcess | FlowMatching:
    """What ``policy.objective`` does to actions."""
    scheduler = getattr(policy.objective, "noise_scheduler", None)
    if scheduler is not None:
        return DiffusionProcess.from_scheduler(scheduler)
    config = policy.objective.config
    strategy = config.timestep_sampling_strategy
    if strategy not in ("uniform", "beta"):
        raise InvalidArgument(f"{NAME}: timestep_sampling_strategy must be 'uniform' or 'beta', got {strategy!r}")
    times = None
    if strategy == "beta":
        times = BetaTimes(
            config.timestep_sampling_alpha, config.timestep_sampling_beta, start=config.timestep_sampling_s, stop=0.0
        )
    return NarrowingFlow(time_quantile=times, sigma_min=config.sigma_min)


_POLICY = (
    "observation_encoder.encode", "_prepare_batch", "objective", "noise_predictor.time_mlp",
    "noise_predictor.input_proj", "noise_predictor.pos_embedding", "noise_predictor.transformer_blocks",
    "noise_predictor.output_proj", "noise_predictor.conditioning_dim",
)  # fmt: skip
_FLOW = tuple(
    f"objective.config.{name}"
    for name in ("sigma_min", "timestep_sampling_strategy", "timestep_sampling_alpha", "timestep_sampling_beta")
)
_BLOCK = ("use_rope", "norm1.eps", "norm2.eps", "mlp", "adaLN_modulation")


def _check_policy(policy: nn.Module) -> None:
    """The interface of lerobot 0.6, or an error that names what differs."""
    peer: Any = policy
    check_interface(NAME, "MultiTaskDiTPolicy", "policy", peer, _POLICY)
    if not hasattr(peer.objective, "noise_scheduler"):
        check_interface(NAME, "MultiTaskDiTPolicy", "policy", peer, _FLOW)
    for index, block in enumerate(peer.noise_predictor.transformer_blocks):
        where = f"policy.noise_predictor.transformer_blocks[{index}]"
        check_interface(NAME, "TransformerBlock", where, block, _BLOCK)
        check_interface(NAME, "TransformerBlock", where, block, ["attn" if block.use_rope else "multihead_attn"])
        kinds = [type(layer) for layer in block.adaLN_modulation]
        if kinds != [nn.SiLU, nn.Linear]:
            raise InvalidArgument(
                f"{NAME}: {where}.adaLN_modulation must be SiLU and Linear, got {[kind.__name__ for kind in kinds]}"
            )
        if any(not isinstance(n, nn.LayerNorm) or n.elementwise_affine for n in (block.norm1, block.norm2)):
            raise InvalidArgument(f"{NAME}: {where}.norm1 and .norm2 must be LayerNorm without affine parameters")
