r"""starVLA's flow-matching heads on Level-2 batches: vision-language tokens of B conditions, K noised samples of each.

starVLA repeats the tokens ``[B, S, C]`` of its vision-language model ``repeated_diffusion_steps`` times before every
cross-attention layer of the head projects them. :class:`Level2StarVLA` gives the head's attention layers the B rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.integrations.adapter import Level2Adapter
from minidiff_fast.integrations.diffusers import BroadcastAttnProcessor, apply_broadcast_attention
from minidiff_fast.integrations.repeat import ClampedTimes, RepeatedSteps
from minidiff_fast.integrations.report import ConversionReport
from minidiff_fast.level2 import Level2Batch
from minidiff_fast.objectives.imitation import BetaTimes, DenoisingLoss, FlowMatching
from minidiff_fast.shapes import check_shape, describe, merge_samples, split_samples

NAME = "Level2StarVLA"
PARTS = (
    "model", "action_encoder", "state_encoder", "action_decoder", "future_tokens", "beta_dist", "sample_time",
    "num_timestep_buckets", "action_horizon", "action_dim", "config",
)  # fmt: skip


class Level2StarVLA(Level2Adapter):
    r"""starVLA's ``FlowmatchingActionHead`` or its layer-wise variant, with K samples for every condition.

    .. math::
        x_{bk} = t_{bk} a_b + (1 - t_{bk}) \epsilon_{bk}, \quad t = (s - u) / s,\; u \sim Beta(\alpha, \beta), \qquad
        L = mean (v(x_{bk}, \lfloor 1000\, t_{bk} \rfloor, c_b) - (a_b - \epsilon_{bk}))^2

    Keys and values of the vision-language tokens are projected once per condition, attention layers read them for all K
    samples, and the state is encoded once per condition. Times and noise are float32 also for actions in 16 bits (the
    head draws them in the dtype of the actions).

    The batch is a mapping with the arguments of the head's ``forward`` before they are repeated: ``"actions"``
    ``[B, T, A]``, ``"vl_embs"`` ``[B, S, C]`` (for the layer-wise head a list of them, one per layer) and, where there
    are any, ``"state"`` ``[B, 1, Ds]`` and ``"encoder_attention_mask"`` ``[B, S]``.

    Args:
        head: becomes a submodule, its weights are not copied. The processors of its cross-attention layers are replaced
            in place (see :attr:`report`); its own ``forward`` goes on working, on repeated rows too. That forward is
            run once on two small rows, to see that this class computes the same.

    Raises:
        InvalidArgument: an interface that differs, nothing to replace, a Beta distribution without a closed-form
            quantile function, or another loss than the head's own. The head is then as it was.

    >>> head = Level2StarVLA(framework.action_model)                                            # doctest: +SKIP
    >>> batch = {"actions": actions, "vl_embs": last_hidden, "state": state}                    # doctest: +SKIP
    >>> head.loss(batch, k=8).backward()                                                        # doctest: +SKIP
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.layerwise = _check_head(head)
        self.head = head
        peer = cast(Any, head)
        self.process = FlowMatching(0, float(peer.num_timestep_buckets), _times(peer))
        self.objective = DenoisingLoss(self.process)
        self.report = self._convert()
        """What was replaced and what was left; without a way back, so that the adapter can be copied and pickled."""

    def actions(self, batch: Mapping[str, Any]) -> Tensor:  # [B, T, A]
        """``batch["actions"]``."""
        actions = cast(Tensor, batch["actions"])
        expected = ["B", "T", self._peer.action_dim]
        check_shape(NAME, "actions", actions, expected, "[B, T, A]", describe(actions=actions))
        return actions

    def encode(self, obs: Mapping[str, Any]) -> dict[str, Any]:
        """The vision-language tokens, the encoded state and the mask, a row per condition."""
        tokens, state, mask = obs["vl_embs"], obs.get("state"), obs.get("encoder_attention_mask")
        layers = tuple(tokens) if self.layerwise else (tokens,)
        count = len(self._peer.model.transformer_blocks)
        if self.layerwise and (isinstance(tokens, Tensor) or len(layers) < count):
            raise InvalidArgument(f"{NAME}: vl_embs must be a list of {count} tensors, one per layer of the head")
        rows: int | str = obs["actions"].shape[0] if "actions" in obs else layers[0].shape[0]
        given = {"vl_embs": layers[0], "state": state, "encoder_attention_mask": mask}
        for name, tensor in [*(("vl_embs", layer) for layer in layers[1:]), *given.items()]:
            if tensor is not None and tensor.shape[0] != rows:
                raise InvalidArgument(
                    f"{NAME}: {name} must have a row per condition, B = {rows}, not repeated, got {list(tensor.shape)}"
                )
        encodes = state is not None and self._peer.state_encoder is not None
        cache = {"vl_embs": layers, "state": self._peer.state_encoder(state) if encodes else None, "mask": mask}
        return {name: value for name, value in cache.items() if value is not None}

    def denoise(
        self,
        cache: dict[str, Any],
        x: Tensor,  # [B, K, T, A]
        t: Tensor,  # [B, K]: times in [0, num_timestep_buckets]
    ) -> Tensor:  # [B, K, T, A]
        """The predicted velocity."""
        head, steps = self._peer, RepeatedSteps(self.process, x.shape[1])
        buckets = merge_samples(t, "kb").long()
        features = head.action_encoder(merge_samples(x, "kb"), buckets)
        if head.config.add_pos_embed:
            features = features + head.position_embedding.weight[: features.shape[1]]
        shared = head.future_tokens.weight.expand(x.shape[0], -1, -1)
        if "state" in cache:
            shared = torch.cat([cache["state"], shared], 1)
        layers = cache["vl_embs"]
        out = head.model(
            hidden_states=steps.prepend(shared, features),
            encoder_hidden_states=list(layers) if self.layerwise else layers[0],
            encoder_attention_mask=cache.get("mask"),
            timestep=buckets,
            **({"return_pre_output": True} if self.layerwise else {}),
        )
        return split_samples(head.action_decoder(out)[:, -x.shape[2] :], x.shape[0], "kb")

    @property
    def _peer(self) -> Any:
        return self.head

    def _convert(self) -> ConversionReport:
        """Replace the processors; put them back if nothing is replaced or if the loss is not the head's own."""
        modes = [(module, module.training) for module in self.head.modules()]
        self.head.eval()
        report = None
        try:
            with torch.no_grad(), torch.random.fork_rng():
                batch = self._two_rows()
                arguments = (batch["vl_embs"], batch["actions"], batch["state"], batch["encoder_attention_mask"])
                torch.manual_seed(0)
                wanted = self.head(*arguments)
                report = apply_broadcast_attention(self._peer.model, layout="kb")
                got = self._own_loss(batch)
            tolerance = 1e-4 if batch["actions"].dtype in (torch.float32, torch.float64) else 3e-2
            if not report.replaced:
                raise InvalidArgument(f"{NAME}: there is nothing to replace in head.model: {report}")
            if not bool((got - wanted).abs() <= tolerance * wanted.abs()):
                kind = type(self.head).__name__
                raise InvalidArgument(
                    f"{NAME}: head.forward must be that of starVLA's FlowmatchingActionHead, {kind}'s computes another "
                    f"loss ({float(wanted):.6g}; here {float(got):.6g})"
                )
        except Exception:
            if report is not None and not report.reverted:
                report.revert()
            raise
        finally:
            for module, mode in modes:
                module.training = mode
        return ConversionReport(report.replaced, report.left)

    def _own_loss(self, batch: dict[str, Any]) -> Tensor:
        """Ours with K = 1, noise and times as the head draws them: torch.randn, then sample_time."""
        actions = batch["actions"]
        torch.manual_seed(0)
        noise = torch.randn(actions.shape, device=actions.device, dtype=actions.dtype)
        t = self._peer.sample_time(actions.shape[0], device=actions.device, dtype=actions.dtype)
        drawn = Level2Batch(batch, actions, t[:, None].float(), noise[:, None])
        return self.objective.per_sample(self, self.encode(batch), drawn).mean()

    def _two_rows(self) -> dict[str, Any]:
        head = self._peer
        like, generator = head.future_tokens.weight, torch.Generator().manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(2, *shape, generator=generator).to(like)

        blocks = list(head.model.transformer_blocks)
        widths = [block.attn1.to_k.in_features for block in blocks]
        tokens = [draw(3, width) for width in widths]
        encoder = head.state_encoder
        states = next(m.in_features for m in encoder.modules() if isinstance(m, nn.Linear)) if encoder else None
        return {
            "vl_embs": tokens if self.layerwise else tokens[0],
            "actions": draw(head.action_horizon, head.action_dim),
            "state": None if states is None else draw(1, states),
            "encoder_attention_mask": torch.tensor([[True, True, True], [True, True, False]], device=like.device),
        }


def _check_head(head: Any) -> bool:
    """Whether it is the layer-wise head; InvalidArgument naming what differs from both."""
    expected = f"{NAME}: head must be starVLA's FlowmatchingActionHead"
    missing = [name for name in PARTS if not hasattr(head, name)]
    if missing:
        raise InvalidArgument(f"{expected}: expected {', '.join(missing)}, got {type(head).__name__}")
    arguments = list(inspect.signature(head.forward).parameters)[:4]
    known = [[first, "actions", "state", "encoder_attention_mask"] for first in ("vl_embs", "vl_embs_list")]
    if arguments not in known:
        raise InvalidArgument(f"{expected}: expected forward({', '.join(known[0])}), got ({', '.join(arguments)})")
    blocks = getattr(head.model, "transformer_blocks", [])
    if not len(blocks) or not all(hasattr(getattr(block, "attn1", None), "to_k") for block in blocks):
        raise InvalidArgument(f"{expected}: expected model.transformer_blocks with an attn1 of diffusers each")
    if any(isinstance(block.attn1.processor, BroadcastAttnProcessor) for block in blocks):
        raise InvalidArgument(f"{expected} as it was built: its attention has been converted before")
    return arguments[0] == "vl_embs_list"


class _Fixed:
    """A Beta distribution that always draws one value."""

    def __init__(self, value: float) -> None:
        self.value = value

    def sample(self, shape: Any) -> Tensor:
        return torch.full(tuple(shape), self.value)


def _times(head: Any) -> BetaTimes | ClampedTimes:
    """The quantile function of the head's times, and whether it keeps them from going below 0."""
    s, distribution = float(head.config.noise_s), head.beta_dist

    def sampled(u: float) -> float:
        head.beta_dist = _Fixed(u)
        try:
            return float(head.sample_time(1, device=torch.device("cpu"), dtype=torch.float32))
        finally:
            head.beta_dist = distribution

    alpha, beta = float(distribution.concentration1), float(distribution.concentration0)
    times = BetaTimes(alpha, beta, start=1.0, stop=(s - 1.0) / s)
    lowest = sampled(1.0)
    fits = abs(sampled(0.3) - (s - 0.3) / s) < 1e-5 and min(abs(lowest), abs(lowest - times.stop)) < 1e-6
    if not fits:
        raise InvalidArgument(f"{NAME}: head.sample_time must give (noise_s - u) / noise_s for a draw u, and does not")
    return times if abs(lowest - times.stop) < 1e-6 else ClampedTimes(times)
