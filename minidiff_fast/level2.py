r"""The Level-2 step: encode B conditions once, pair each with K noised samples, one encoder backward.

.. math::
    L = \frac{1}{B K} \sum_{b,k} w_{bk} \, \ell(\mathrm{denoise}(\mathrm{encode}(o_b), x_{bk}, t_{bk}), \cdot)

The K samples run in chunks. Every chunk but the last adds its gradient into a detached copy of the cache; the
backward of the last chunk carries that sum on into the encoder. The memory is that of one chunk whatever K is, the
gradient is that of the unchunked step, and every parameter gets its gradient in that last backward, which is the
only one that DistributedDataParallel and FSDP2 synchronise.

Source: two-level minibatching, Mini-Diffuser (Hu et al., arXiv 2505.09430).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.nn.condition_cache import held_conditions
from minidiff_fast.ops.level2_noise import NoiseDraw, TimestepDraw
from minidiff_fast.parallel import check_times, unwrap
from minidiff_fast.policy import Policy
from minidiff_fast.shapes import check_shape, describe


class Noised(NamedTuple):
    """Noised samples and what the network should say about them."""

    x: Tensor
    """[B, K, T, A]: the network's input."""
    t: Tensor
    """[B, K]: the network's time input."""
    target: Tensor
    """[B, K, T, A] float32."""


class Drawn(NamedTuple):
    """What an objective draws for K samples of every condition."""

    actions: Tensor
    """[B, T, A]: the clean samples."""
    timesteps: Tensor
    """[B, K], see :class:`Level2Batch`."""
    noise: Tensor
    """[B, K, T, A] float32, standard normal."""
    noised: Noised | None = None
    """The samples noised with these, where that was done in the same pass."""
    by: Any = None
    """The process that noised them."""


@dataclass(frozen=True)
class Level2Batch:
    """B conditions, K noised samples of each. Draw one with :meth:`draw`."""

    obs: Any
    """What ``policy.encode`` takes; every tensor in it has leading dimension B."""
    actions: Tensor
    """[B, T, A], normalised: the clean sample x0, one per condition."""
    timesteps: Tensor
    """[B, K]: integer training timesteps, or times in [0, 1] for flow matching."""
    noise: Tensor
    """[B, K, T, A], standard normal."""
    weight: Tensor | None = None
    """[B, K] or None: factor on each sample's loss (the mean still divides by B * K)."""
    mask: Tensor | None = None
    """[B, T] boolean or None: True where an action counts."""
    drawn: Drawn | None = None
    """What :meth:`draw` got from the objective; read it through :meth:`noised_by`."""

    def __post_init__(self) -> None:
        context = partial(describe, actions=self.actions, timesteps=self.timesteps, noise=self.noise)
        check_shape("Level2Batch", "actions", self.actions, ["B", "T", "A"], "[B, T, A]", context)
        batch, tokens, width = self.actions.shape
        check_shape("Level2Batch", "timesteps", self.timesteps, [batch, "K"], "[B, K]", context)
        k = self.timesteps.shape[1]
        check_shape("Level2Batch", "noise", self.noise, [batch, k, tokens, width], "[B, K, T, A]", context)
        if batch < 1 or k < 1:
            raise InvalidArgument(f"Level2Batch: B and K must be at least 1, got B = {batch}, K = {k}")
        if self.weight is not None:
            check_shape("Level2Batch", "weight", self.weight, [batch, k], "[B, K]", context)
        if self.mask is not None:
            check_shape("Level2Batch", "mask", self.mask, [batch, tokens], "[B, T]", context)
            if self.mask.dtype != torch.bool:
                raise InvalidArgument(f"Level2Batch: mask must be boolean (True = counts), got {self.mask.dtype}")
        for name in ("timesteps", "noise", "weight", "mask"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.device != self.actions.device:
                raise InvalidArgument(
                    f"Level2Batch: {name} must be on the device of actions, {self.actions.device}, got {tensor.device}"
                )

    @classmethod
    def draw(
        cls,
        obs: Any,
        actions: Tensor,  # [B, T, A], normalised
        k: int,
        objective: Objective,
        *,
        generator: torch.Generator | None = None,
        weight: Tensor | None = None,  # [B, K]
        mask: Tensor | None = None,  # [B, T] bool
        timesteps: TimestepDraw = "iid",
        noise: NoiseDraw = "iid",
    ) -> Level2Batch:
        """Timesteps and noise for the K samples of every condition, and the noised samples, in one pass.

        ``timesteps="stratified"`` spreads the K timesteps of a condition evenly over the schedule,
        ``noise="antithetic"`` gives samples 2 i and 2 i + 1 opposite noise: neither changes the expected loss, both
        lower the variance of its mean over K. See :func:`~minidiff_fast.ops.level2_noise.level2_noise`.

        All of it is a function of one 64-bit seed, drawn from ``generator`` (without one, from torch's of the device of
        ``actions``): one CPU generator gives one stream on every device, and the host never waits.
        """
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise InvalidArgument(f"Level2Batch.draw: K, the samples per condition, must be an int >= 1, got {k!r}")
        if actions.dim() != 3:
            raise InvalidArgument(f"Level2Batch.draw: actions must be [B, T, A], got {list(actions.shape)}")
        device = actions.device if generator is None else generator.device
        seed = torch.randint(0, 2**62, (1,), dtype=torch.int64, device=device, generator=generator)
        drawn = objective.draw(actions, k, seed=_move(seed, actions.device), timesteps=timesteps, noise=noise)
        return cls(obs, actions, drawn.timesteps, drawn.noise, weight, mask, drawn)

    @property
    def samples(self) -> int:
        """K, the samples per condition."""
        return self.timesteps.shape[1]

    def noised_by(self, process: Any) -> Noised | None:
        """The samples as ``process`` noised them when this batch was drawn; None if it did not, or if actions, noise or
        timesteps have been replaced since. (Do not change those tensors in place.)"""
        drawn = self.drawn
        if drawn is None or drawn.by is not process:
            return None
        same = drawn.actions is self.actions and drawn.timesteps is self.timesteps and drawn.noise is self.noise
        return drawn.noised if same else None

    def noised(self, process: Any) -> Noised:
        """:meth:`noised_by`, or noised with this batch's times and noise now."""
        found = self.noised_by(process)
        return found if found is not None else process.noised(self.actions, self.noise, self.timesteps)

    def chunk(self, start: int, stop: int) -> Level2Batch:
        """Samples ``start .. stop - 1`` of every condition; views, no copies."""
        weight = None if self.weight is None else self.weight[:, start:stop]
        timesteps, noise = self.timesteps[:, start:stop], self.noise[:, start:stop]
        drawn, noised = None, None if self.drawn is None else self.noised_by(self.drawn.by)
        if self.drawn is not None and noised is not None:
            part = Noised(*(tensor[:, start:stop] for tensor in noised))
            drawn = Drawn(self.actions, timesteps, noise, part, self.drawn.by)
        return replace(self, timesteps=timesteps, noise=noise, weight=weight, drawn=drawn)


def _move(drawn: Tensor, device: torch.device) -> Tensor:
    """To ``device`` without making the host wait: pageable memory would."""
    if drawn.device == device:
        return drawn
    if drawn.device.type == "cpu" and device.type == "cuda":
        drawn = drawn.pin_memory()
    return drawn.to(device, non_blocking=True)


class Objective(Protocol):
    """What :meth:`Level2Batch.draw` (``draw``) and :func:`level2_step` (``per_sample``) need of an objective."""

    def draw(
        self, actions: Tensor, k: int, *, seed: Tensor, timesteps: TimestepDraw = "iid", noise: NoiseDraw = "iid"
    ) -> Drawn:
        """Times and noise for K samples of every condition, functions of ``seed`` (``[1]`` int64) alone."""

    def per_sample(self, denoise: Callable[[Any, Tensor, Tensor], Tensor], cache: Any, batch: Level2Batch) -> Tensor:
        """The loss of every sample, ``[B, K]`` float32, weights applied."""


class Level2Result(NamedTuple):
    """What a step reports; everything is detached."""

    loss: Tensor
    """[] float32: the mean over B * K."""
    per_sample: Tensor
    """[B, K] float32."""


def level2_step(
    policy: Policy | nn.Module,
    objective: Objective,
    batch: Level2Batch,
    *,
    chunk: int | None = None,
    loss_scale: Callable[[Tensor], Tensor] | None = None,
) -> Level2Result:
    """One forward and backward pass: gradients are *added* to ``.grad`` of the policy's parameters.

    Args:
        policy: a :class:`~minidiff_fast.policy.Policy`, or one whose ``forward`` is ``denoise``, wrapped in
            ``DistributedDataParallel``, in ``torch.compile`` or in both, or sharded by FSDP2 (``fully_shard``, see
            :func:`~minidiff_fast.parallel.prepare_fsdp`); ``encode`` is called on the module inside. Only the last
            backward synchronises. FSDP1 is refused.
        objective: gives the loss per sample.
        batch: see :class:`Level2Batch`.
        chunk: samples per condition that run at once; None runs all K at once. The memory is that of one chunk.
        loss_scale: applied to every chunk's loss before its backward (``GradScaler.scale``).

    The encoder runs once forward and once backward. With dropout or other randomness in ``denoise``, chunked and
    unchunked steps draw different random numbers; the encoder's are drawn once in either case. May run under
    ``torch.autocast``: backward passes leave it, and a 16-bit cache gathers its gradient in float32.

    Raises:
        InvalidArgument: chunk < 1, gradients switched off (``torch.no_grad()``), FSDP1, FSDP2 that would round
            continuous times to 16 bits, or a cache without tensors of leading dimension B (a
            :class:`~minidiff_fast.nn.ConditionCache` knows its B, packed or not).

    Example::

        batch = Level2Batch.draw(obs, policy.normalize_actions(actions), k=8, objective=objective)
        loss = level2_step(policy, objective, batch, chunk=4).loss
        optimizer.step()
    """
    k = batch.samples
    chunk = k if chunk is None else chunk
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise InvalidArgument(f"level2_step: chunk must be an int, at least 1 sample per condition, got {chunk!r}")
    if not torch.is_grad_enabled():
        raise InvalidArgument("level2_step runs a backward pass: call it with gradients enabled")
    scale = loss_scale if loss_scale is not None else _identity
    bare, without_sync, units = unwrap(policy, "level2_step")
    missing = [name for name in ("encode", "denoise") if not callable(getattr(bare, name, None))]
    if missing:
        raise InvalidArgument(
            f"level2_step: policy must have encode(obs) and denoise(cache, x, t), got a {type(bare).__name__} without "
            f"{' and '.join(missing)}"
        )
    check_times(units, batch.timesteps, "level2_step")
    denoise: Any = bare.denoise if policy is bare else policy
    total = batch.timesteps.numel()

    cache = bare.encode(batch.obs)
    _check_cache(cache, batch.actions.shape[0])
    leaves, structure = pytree.tree_flatten(cache)
    starts = range(0, k, chunk)
    gatherers = [_gatherer(leaf) for leaf in leaves] if len(starts) > 1 else []
    losses = []
    for start in starts[:-1]:
        with without_sync():
            detached = [
                leaf if gatherer is None else gatherer.to(leaf.dtype)
                for leaf, gatherer in zip(leaves, gatherers, strict=True)
            ]
            part = objective.per_sample(
                denoise, pytree.tree_unflatten(detached, structure), batch.chunk(start, start + chunk)
            )
            _backward([scale(part.sum() / total)], [None])
        losses.append(part.detach())
    # The last chunk reads the cache itself; its backward takes the gradient that the others have gathered along.
    part = objective.per_sample(denoise, cache, batch.chunk(starts[-1], k))
    losses.append(part.detach())
    gathered = [
        (leaf, gatherer.grad.to(leaf.dtype))
        for leaf, gatherer in zip(leaves, gatherers, strict=False)
        if gatherer is not None and gatherer.grad is not None
    ]
    _backward(
        [scale(part.sum() / total), *(leaf for leaf, _ in gathered)], [None, *(gradient for _, gradient in gathered)]
    )
    per_sample = torch.cat(losses, dim=1)
    return Level2Result(per_sample.sum() / total, per_sample)


def _backward(roots: list[Tensor], gradients: list[Tensor | None]) -> None:
    """Backward outside autocast, as torch asks for."""
    with torch.autocast(roots[0].device.type, enabled=False):
        torch.autograd.backward(roots, gradients)


def _identity(loss: Tensor) -> Tensor:
    return loss


def _gatherer(leaf: Any) -> Tensor | None:
    """A copy without history, float32 at least, that gathers the chunks' gradients; None for what needs none."""
    if not (isinstance(leaf, Tensor) and leaf.requires_grad):
        return None
    return leaf.detach().to(torch.promote_types(leaf.dtype, torch.float32)).requires_grad_()


def _check_cache(cache: Any, batch: int) -> None:
    held = held_conditions(cache)
    wrong = [found for found, conditions in held if conditions != batch]
    if not held or wrong:
        raise InvalidArgument(
            f"level2_step: every tensor in the cache that policy.encode returns must have leading dimension "
            f"B = {batch}, got {wrong[0] if wrong else 'no tensor'}"
        )
