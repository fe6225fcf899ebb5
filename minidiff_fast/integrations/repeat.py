r"""Training code that repeats its batch, as CogACT, starVLA and lerobot's vla_jepa do (``repeated_diffusion_steps``).

They write ``actions.repeat(K, 1, 1)`` and ``features.repeat(K, 1, 1)``, draw a noise and a time for each of the K * B
rows (row k * B + b: layout "kb") and run their head on all of them. Here the samples are drawn from the B clean
actions, and the conditions stay B rows:

* :class:`RepeatedSteps`: the pieces of such a training step, for a loop or a head of one's own;
* :class:`Level2CogACT`: CogACT's ``ActionModel`` as a whole.

A head that reads its condition by cross-attention (starVLA, vla_jepa) also needs attention layers that take B memories
for N rows. Sources: Li et al. (CogACT), arXiv 2411.19650; classifier-free guidance: Ho and Salimans, arXiv 2207.12598.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.integrations.adapter import Level2Adapter
from minidiff_fast.level2 import Level2Batch, Noised
from minidiff_fast.objectives.imitation import DenoisingLoss, DiffusionProcess, FlowMatching
from minidiff_fast.ops.denoising_loss import denoising_loss
from minidiff_fast.ops.level2_noise import NoiseDraw, TimestepDraw
from minidiff_fast.shapes import Layout, check_layout, check_shape, describe, merge_samples, split_samples

COGACT = "Level2CogACT"


class RepeatedRows(NamedTuple):
    """Noised samples as the rows that a head sees."""

    x: Tensor
    """[N, T, A]: noised actions, in the dtype of the actions."""
    t: Tensor
    """[N]: the head's time input."""
    samples: Noised
    """The same as [B, K, ...], with the targets."""
    layout: Layout
    """How rows belong to conditions."""

    @property
    def target(self) -> Tensor:
        """[N, T, A] float32: what the head should predict, for a loss of one's own."""
        return merge_samples(self.samples.target, self.layout)


@dataclass(frozen=True)
class ClampedTimes:
    """A quantile function kept within [low, high].

    starVLA's ``FlowmatchingActionHead`` has ``t = (s - min(u, s)) / s`` with s = 0.999 and u of a Beta(1.5, 1):

    >>> from minidiff_fast.objectives import BetaTimes
    >>> times = ClampedTimes(BetaTimes(1.5, start=1.0, stop=(0.999 - 1.0) / 0.999))
    >>> times(torch.tensor([0.0, 0.125, 1.0]))
    tensor([1.0000, 0.7497, 0.0000])
    """

    quantile: Callable[[Tensor], Tensor]
    """Probabilities in [0, 1) -> times."""
    low: float = 0.0
    high: float = 1.0

    def __call__(self, p: Tensor) -> Tensor:
        """Probabilities -> times."""
        return self.quantile(p).clamp(self.low, self.high)


@dataclass(frozen=True)
class RepeatedSteps:
    """The pieces of a training step with K noised samples of each of B actions, in rows.

    .. code-block:: python

        steps = RepeatedSteps(FlowMatching(noise_at=0), k=8)                  # layout "kb"
        rows = steps.draw(actions)                                            # actions [B, T, A], not repeated
        tokens = steps.prepend(state_tokens, embed_actions(rows.x, rows.t))   # state_tokens [B, S, C]
        loss = steps.loss(head(tokens, rows.t), rows)

    Raises :class:`InvalidArgument` for fields out of range; the methods do where a tensor's rows are not the B or
    N = B * K that they should be.
    """

    process: DiffusionProcess | FlowMatching
    """How actions are noised, and what is predicted."""
    k: int
    """``repeated_diffusion_steps``: samples of every condition."""
    layout: Layout = "kb"
    """Row k * B + b ("kb", what ``repeat(K, 1, 1)`` makes) or b * K + k ("bk", ``repeat_interleave``)."""
    timesteps: TimestepDraw = "iid"
    """"stratified": the K times of a condition cover the schedule evenly."""
    noise: NoiseDraw = "iid"
    """"antithetic": the samples 2 i and 2 i + 1 of a condition have opposite noise."""

    def __post_init__(self) -> None:
        check_layout("RepeatedSteps", self.layout)
        if self.k < 1:
            raise InvalidArgument(f"RepeatedSteps: k, the samples per condition, must be at least 1, got {self.k}")
        for name, value, kind in (("timesteps", self.timesteps, TimestepDraw), ("noise", self.noise, NoiseDraw)):
            if value not in get_args(kind):
                raise InvalidArgument(f"RepeatedSteps: {name} must be one of {get_args(kind)}, got {value!r}")

    def draw(
        self,
        actions: Tensor,  # [B, T, A]
        *,
        generator: torch.Generator | None = None,
    ) -> RepeatedRows:
        """Times and noise for the K samples of every action, and the noised samples; see :meth:`Level2Batch.draw`.

        ``actions`` has a row per condition: repeated actions are K * B conditions to this method.
        """
        drawn = Level2Batch.draw(
            None, actions, self.k, DenoisingLoss(self.process), generator=generator, timesteps=self.timesteps,
            noise=self.noise,
        )  # fmt: skip
        return self.rows(drawn)

    def rows(self, batch: Level2Batch) -> RepeatedRows:
        """The rows of a batch drawn elsewhere, with noise and times at hand."""
        if batch.samples != self.k:
            raise InvalidArgument(f"RepeatedSteps.rows: batch must have K = {self.k} samples, got {batch.samples}")
        noised = batch.noised(self.process)
        x, t = (merge_samples(tensor, self.layout) for tensor in (noised.x, noised.t))
        return RepeatedRows(x, t, noised, self.layout)

    def prepend(
        self,
        shared: Tensor,  # [B, S, C]
        own: Tensor,  # [N, T, C]
    ) -> Tensor:  # [N, S + T, C]
        """``cat([shared.repeat(K, 1, 1), own], 1)`` in one copy; what made ``shared`` runs on B rows.

        For a condition's tokens that join the sample's own sequence (a state token, an in-context token); tokens that
        are only attended to stay as they are.
        """
        if shared.dim() != 3 or own.dim() != 3 or shared.shape[-1] != own.shape[-1]:
            found = describe(shared=shared, own=own)
            raise InvalidArgument(f"RepeatedSteps.prepend: shared must be [B, S, C] and own [N, T, C], got {found}")
        batch = shared.shape[0]
        self._check_rows("prepend", "own", own, batch)
        expanded = shared.unsqueeze(self._axis).expand(*self._grid(batch), *shared.shape[1:])
        return torch.cat([expanded, own.unflatten(0, self._grid(batch))], dim=2).flatten(0, 1)

    def condition_dropout(
        self,
        embedded: Tensor,  # [B, S, D]
        unconditional: Tensor,  # [S, D] or [1, D]
        p: float,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:  # [N, S, D]
        """Classifier-free dropout, drawn per row: the embedded condition, or with probability p the unconditional one.

        ``where(dropped, u, z.repeat(K, 1, 1))`` followed by a layer that works on every token by itself (a Linear) is
        the layer on B conditions and on u, followed by the choice. The N numbers are drawn in the order of the rows.
        For tokens that join the sample's own sequence, which are N rows there anyway.

        Raises:
            InvalidArgument: shapes that do not fit, or p outside [0, 1].
        """
        if not 0.0 <= p <= 1.0:
            raise InvalidArgument(f"RepeatedSteps.condition_dropout: p must be in [0, 1], got {p}")
        batch = embedded.shape[0]
        device = embedded.device if generator is None else generator.device
        dropped = (torch.rand(batch * self.k, device=device, generator=generator) < p).to(embedded.device)
        return self.choose(dropped, embedded, unconditional)

    def choose(
        self,
        dropped: Tensor,  # [N] bool
        embedded: Tensor,  # [B, S, D]
        unconditional: Tensor,  # [S, D] or [1, D]
    ) -> Tensor:  # [N, S, D]
        """``unconditional`` where a row is dropped, else the embedded condition of the row."""
        context = describe(dropped=dropped, embedded=embedded, unconditional=unconditional)
        check_shape("RepeatedSteps.choose", "embedded", embedded, ["B", "S", "D"], "[B, S, D]", context)
        batch, tokens, width = embedded.shape
        if list(unconditional.shape) not in ([tokens, width], [1, width]):
            raise InvalidArgument(
                f"RepeatedSteps.choose: unconditional must be [S, D] = [{tokens}, {width}] or [1, {width}], "
                f"got {list(unconditional.shape)} ({context})"
            )
        self._check_rows("choose", "dropped", dropped, batch)
        by_row = dropped.unflatten(0, self._grid(batch))[:, :, None, None]
        return torch.where(by_row, unconditional, embedded.unsqueeze(self._axis)).flatten(0, 1)

    def loss(
        self,
        prediction: Tensor,  # [N, T, A]
        rows: RepeatedRows,
        *,
        mask: Tensor | None = None,  # [B, T] bool
    ) -> Tensor:  # []
        """The mean squared error over all rows; with a mask, over the action tokens of all rows that it marks."""
        if rows.layout != self.layout:
            raise InvalidArgument(
                f"RepeatedSteps.loss: rows are in layout {rows.layout!r}, these steps in {self.layout!r}"
            )
        target = rows.samples.target
        batch, k, *sizes = target.shape
        check_shape(
            "RepeatedSteps.loss", "prediction", prediction, [batch * k, *sizes], "[N, T, A]", describe(x=rows.x)
        )
        weight = None
        if mask is not None:
            check_shape("RepeatedSteps.loss", "mask", mask, [batch, sizes[0]], "[B, T]", describe(x=rows.x))
            counted = mask.sum(1, dtype=torch.float32)
            weight = counted / counted.mean().clamp_min(1.0 / batch)
        by_sample = split_samples(prediction, batch, self.layout)
        return denoising_loss(by_sample, target, weight=weight, mask=mask, reduction="mean")

    @property
    def _axis(self) -> int:
        """Where the K samples stand, of the two axes that rows unflatten to."""
        return 0 if self.layout == "kb" else 1

    def _grid(self, batch: int) -> tuple[int, int]:
        return (self.k, batch) if self.layout == "kb" else (batch, self.k)

    def _check_rows(self, method: str, argument: str, tensor: Tensor, batch: int) -> None:
        if tensor.shape[0] != batch * self.k:
            raise InvalidArgument(
                f"RepeatedSteps.{method}: {argument} must have N = B * K = {batch} * {self.k} = {batch * self.k} rows, "
                f"got {tensor.shape[0]}; conditions must come with their B rows, not repeated"
            )


class Level2CogACT(Level2Adapter):
    r"""CogACT's ``ActionModel`` with K noised samples of every action, none of them a repeated row.

    .. math::
        c_{bk} = \mathrm{MLP}(t_{bk}) + \mathrm{where}(d_{bk}, W u + w, W z_b + w), \qquad
        \hat\epsilon_{bk} = \mathrm{DiT}([c_{bk}, x_{bk}])

    W z_b is computed once per condition; the classifier-free dropout d is drawn for every sample, as in CogACT. From
    the condition token on everything belongs to a sample: what is shared in this head is that one product, and the
    model that made z. The gain is therefore in that model, which CogACT runs once per condition as well, and in
    ``timesteps="stratified"``, ``noise="antithetic"`` and chunks of K (:meth:`step`).

    The batch is a mapping with ``"actions"`` ``[B, T, A]`` and ``"cognition_features"`` ``[B, S, C]`` (S = 1 in CogACT,
    64 in starVLA's variant of it): the arguments x and z of ``ActionModel.loss`` before they are repeated.

    Args:
        action_model: has ``net`` and ``diffusion``, as in microsoft/CogACT or starVLA's ``DiTActionHeader``. It becomes
            a submodule, its weights are not copied. Its forward pass is run once on two small rows, to see that this
            class computes the same.

    Raises:
        InvalidArgument: an interface that differs, a learned variance, a past action window, FSDP (whose shards only
            ``net.forward`` gathers), or another result than that of ``net.forward``.

    >>> head = Level2CogACT(vla.action_model)                                                   # doctest: +SKIP
    >>> head.loss({"actions": actions, "cognition_features": features}, k=8).backward()         # doctest: +SKIP
    """

    def __init__(self, action_model: nn.Module) -> None:
        super().__init__()
        _check_action_model(action_model)
        self.action_model = action_model
        ab = torch.as_tensor(cast(Any, action_model).diffusion.alphas_cumprod, dtype=torch.float32)
        self.process = DiffusionProcess(ab, "epsilon")
        self.objective = DenoisingLoss(self.process)
        self._check_result()

    @property
    def net(self) -> Any:
        """CogACT's DiT."""
        return self.action_model.net

    @property
    def condition_tokens(self) -> int:
        """S: 1 in CogACT."""
        return int(getattr(self.net, "num_cond_tokens", 1))

    def actions(self, batch: Mapping[str, Tensor]) -> Tensor:  # [B, T, A]
        """``batch["actions"]``."""
        tokens = self.net.positional_embedding.shape[0] - self.condition_tokens
        expected = ["B", tokens, self.net.in_channels]
        actions = batch["actions"]
        check_shape(COGACT, "actions", actions, expected, "[B, T, A]", describe(actions=actions))
        return actions

    def encode(self, obs: Mapping[str, Tensor]) -> Tensor:  # [B, S, D]
        """The embedded condition, before any dropout: W z + w."""
        z, embedder = obs["cognition_features"], self.net.z_embedder
        rows = obs["actions"].shape[0] if "actions" in obs else "B"
        expected = [rows, self.condition_tokens, embedder.linear.in_features]
        letters = "[B, S, C], a row per condition, not repeated,"
        check_shape(COGACT, "cognition_features", z, expected, letters, describe(cognition_features=z))
        if self._drops:  # the peer chooses between z and a parameter before the product: where() promotes
            z = z.to(torch.promote_types(z.dtype, embedder.uncondition.dtype))
        return cast(Tensor, embedder.linear(z))

    def denoise(
        self,
        cache: Tensor,  # [B, S, D]
        x: Tensor,  # [B, K, T, A]
        t: Tensor,  # [B, K]
    ) -> Tensor:  # [B, K, T, A]
        """The predicted noise; in training mode with classifier-free dropout per sample."""
        net, batch = self.net, cache.shape[0]
        steps = RepeatedSteps(self.process, x.shape[1])
        action_tokens, times = net.x_embedder(merge_samples(x, "kb")), net.t_embedder(merge_samples(t, "kb"))
        if self._drops:
            embedder = net.z_embedder
            condition = steps.condition_dropout(cache, embedder.linear(embedder.uncondition), embedder.dropout_prob)
            condition = times[:, None] + condition
        else:
            condition = (times.unflatten(0, (-1, batch))[:, :, None] + cache).flatten(0, 1)
        tokens = torch.cat([condition, action_tokens], dim=1)
        tokens = tokens + net.positional_embedding
        for block in net.blocks:
            tokens = block(tokens)
        prediction = net.final_layer(tokens)[:, cache.shape[1] :]
        return split_samples(prediction, batch, "kb")

    @property
    def _drops(self) -> bool:
        return bool(self.net.training and self.net.z_embedder.dropout_prob > 0)

    @torch.no_grad()
    def _check_result(self) -> None:
        """This class against ``net.forward`` on two rows, before the final layer, which CogACT initialises to zero."""
        net, process = self.net, self.process
        weight, generator = net.positional_embedding, torch.Generator().manual_seed(0)
        tokens = weight.shape[0] - self.condition_tokens
        x0, noise = (torch.randn(1, 1, tokens, net.in_channels, generator=generator) for _ in range(2))
        t = torch.tensor([[process.num_train_timesteps // 2]])
        wanted = cast(Any, self.action_model).diffusion.q_sample(x0[0], t[0], noise[0])
        if not torch.allclose(process.noised(x0[0], noise, t).x[0], wanted, atol=1e-5):
            raise InvalidArgument(f"{COGACT}: diffusion.q_sample must noise with its alphas_cumprod, and does not")
        z = torch.randn(2, self.condition_tokens, net.z_embedder.linear.in_features, generator=generator).to(weight)
        x, times = x0.expand(2, 1, -1, -1).to(weight), t.expand(2, 1).to(weight.device)
        seen: list[Tensor] = []
        hook = net.final_layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        modes = [(module, module.training) for module in net.modules()]
        try:
            net.eval()
            net(x[:, 0], times[:, 0], z)
            self.denoise(self.encode({"cognition_features": z}), x, times)
        finally:
            hook.remove()
            for module, mode in modes:
                module.training = mode
        tolerance = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 3e-2
        error = (seen[0] - seen[1]).abs().max() if len(seen) == 2 and seen[0].shape == seen[1].shape else None
        if error is None or not bool(error <= tolerance * seen[0].abs().max()):
            raise InvalidArgument(
                f"{COGACT}: net.forward must be that of CogACT's DiT; {type(net).__name__}'s computes something else"
                + ("" if error is None else f" (difference {float(error):.1e})")
            )


NET = ("x_embedder", "t_embedder", "z_embedder", "positional_embedding", "blocks", "final_layer", "in_channels")


def _check_action_model(model: Any) -> None:
    """The interface of CogACT's ActionModel, or InvalidArgument naming what differs."""

    def refuse(what: str) -> InvalidArgument:
        return InvalidArgument(f"{COGACT}: action_model must be CogACT's ActionModel: {what}")

    kind = type(model).__name__
    for owner, where, names in (
        (model, kind, ("net", "diffusion")),
        (getattr(model, "net", None), f"{kind}.net", NET),
        (getattr(model, "diffusion", None), f"{kind}.diffusion", ("alphas_cumprod", "num_timesteps", "q_sample")),
        (
            getattr(getattr(model, "net", None), "z_embedder", None),
            f"{kind}.net.z_embedder",
            ("linear", "dropout_prob"),
        ),
    ):
        missing = [name for name in names if not hasattr(owner, name)]
        if missing:
            raise refuse(f"expected {where} with {', '.join(missing)}, got {type(owner).__name__}")
    net, embedder = model.net, model.net.z_embedder
    sharded = [type(module).__name__ for module in model.modules() if _is_sharded(module)]
    if sharded:
        raise refuse(f"not sharded ({sharded[0]}); with FSDP use RepeatedSteps around net's own forward")
    arguments = list(inspect.signature(net.forward).parameters)
    if arguments != ["x", "t", "z"]:
        raise refuse(f"expected net.forward(x, t, z), got ({', '.join(arguments)})")
    if getattr(net, "learn_sigma", False):
        raise refuse("expected learn_sigma = False, got a network that predicts its variance too")
    if getattr(net, "past_action_window_size", 0):
        raise refuse(f"expected past_action_window_size = 0, got {net.past_action_window_size}")
    if len(model.diffusion.alphas_cumprod) != model.diffusion.num_timesteps:
        raise refuse(
            f"expected {model.diffusion.num_timesteps} alphas_cumprod, got {len(model.diffusion.alphas_cumprod)}"
        )
    if embedder.dropout_prob > 0:
        width = embedder.linear.in_features
        if not hasattr(embedder, "uncondition") or embedder.uncondition.shape[-1] != width:
            shape = list(getattr(embedder, "uncondition", torch.empty(0)).shape)
            raise refuse(f"expected net.z_embedder.uncondition [S, {width}], got {shape}")
    if net.positional_embedding.is_meta:
        raise refuse("expected weights on a device, got meta tensors")


def _is_sharded(module: nn.Module) -> bool:
    return any(base.__name__ in ("FullyShardedDataParallel", "FSDPModule") for base in type(module).__mro__)
