r"""The Level-2 step: encode B conditions once, pair each with K noised samples, one encoder backward.

.. math::
    L = \frac{1}{B K} \sum_{b,k} w_{bk} \, \ell(\mathrm{denoise}(\mathrm{encode}(o_b), x_{bk}, t_{bk}), \cdot)

The K samples run in chunks. Every chunk but the last adds its gradient into a detached copy of the cache; the
backward of the last chunk carries that sum on into the encoder. The memory is that of one chunk whatever K is, the
gradient is that of the unchunked step, and every parameter gets its gradient in that last backward, which is the
only one that DistributedDataParallel synchronises.

Source: two-level minibatching, Mini-Diffuser (Hu et al., arXiv 2505.09430).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.policy import Policy
from minidiff_fast.shapes import check_shape, describe


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

    def __post_init__(self) -> None:
        context = describe(actions=self.actions, timesteps=self.timesteps, noise=self.noise)
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
    ) -> Level2Batch:
        """Independent timesteps and noise for the K samples of every condition.

        Drawn on the generator's device (that of ``actions`` without a generator) and moved to that of ``actions``,
        so that one CPU generator gives one stream on every device.
        """
        if k < 1:
            raise InvalidArgument(f"Level2Batch.draw: K, the samples per condition, must be at least 1, got {k}")
        if actions.dim() != 3:
            raise InvalidArgument(f"Level2Batch.draw: actions must be [B, T, A], got {list(actions.shape)}")
        device = actions.device if generator is None else generator.device
        timesteps = objective.draw_timesteps((actions.shape[0], k), device=device, generator=generator)
        shape = (actions.shape[0], k, *actions.shape[1:])
        noise = torch.randn(shape, dtype=actions.dtype, device=device, generator=generator)
        return cls(obs, actions, timesteps.to(actions.device), noise.to(actions.device), weight, mask)

    @property
    def samples(self) -> int:
        """K, the samples per condition."""
        return self.timesteps.shape[1]

    def chunk(self, start: int, stop: int) -> Level2Batch:
        """Samples ``start .. stop - 1`` of every condition; views, no copies."""
        weight = None if self.weight is None else self.weight[:, start:stop]
        return replace(self, timesteps=self.timesteps[:, start:stop], noise=self.noise[:, start:stop], weight=weight)


class Objective(Protocol):
    """What :func:`level2_step` needs of an objective."""

    def draw_timesteps(
        self, shape: tuple[int, int], *, device: torch.device, generator: torch.Generator | None = None
    ) -> Tensor:
        """Times ``[B, K]``."""

    def per_sample(self, denoise: Callable[[Any, Tensor, Tensor], Tensor], cache: Any, batch: Level2Batch) -> Tensor:
        """The loss of every sample, ``[B, K]`` float32, weights applied."""


class Level2Result(NamedTuple):
    """What a step reports; everything is detached."""

    loss: Tensor
    """[] float32: the mean over B * K."""
    per_sample: Tensor
    """[B, K] float32."""


def level2_step(
    policy: Policy | DistributedDataParallel,
    objective: Objective,
    batch: Level2Batch,
    *,
    chunk: int | None = None,
    loss_scale: Callable[[Tensor], Tensor] | None = None,
) -> Level2Result:
    """One forward and backward pass: gradients are *added* to ``.grad`` of the policy's parameters.

    Args:
        policy: a :class:`~minidiff_fast.policy.Policy`, or one wrapped in ``DistributedDataParallel`` whose
            ``forward`` is ``denoise``; then only the last backward synchronises.
        objective: gives the loss per sample.
        batch: see :class:`Level2Batch`.
        chunk: samples per condition that run at once; None runs all K at once. The memory is that of one chunk.
        loss_scale: applied to every chunk's loss before its backward (``GradScaler.scale``).

    The encoder runs once forward and once backward. With dropout or other randomness in ``denoise``, chunked and
    unchunked steps draw different random numbers; the encoder's are drawn once in either case.

    Raises:
        InvalidArgument: chunk < 1, a cache without tensors of leading dimension B, or an encoder whose features
            need a gradient inside ``torch.no_grad()``.

    Example::

        batch = Level2Batch.draw(obs, policy.normalize_actions(actions), k=8, objective=objective)
        loss = level2_step(policy, objective, batch, chunk=4).loss
        optimizer.step()
    """
    k = batch.samples
    chunk = k if chunk is None else chunk
    if chunk < 1:
        raise InvalidArgument(f"level2_step: chunk must be at least 1 sample per condition, got {chunk}")
    scale = loss_scale if loss_scale is not None else _identity
    bare = policy.module if isinstance(policy, DistributedDataParallel) else policy
    denoise = policy if isinstance(policy, DistributedDataParallel) else policy.denoise
    total = batch.timesteps.numel()

    cache = bare.encode(batch.obs)
    leaves, structure = pytree.tree_flatten(cache)
    _check_cache(leaves, batch.actions.shape[0])
    starts = range(0, k, chunk)
    detached = [_detach(leaf) for leaf in leaves] if len(starts) > 1 else leaves
    losses = []
    for start in starts[:-1]:
        with _no_sync(policy):
            part = objective.per_sample(
                denoise, pytree.tree_unflatten(detached, structure), batch.chunk(start, start + chunk)
            )
            scale(part.sum() / total).backward()
        losses.append(part.detach())
    # The last chunk reads the cache itself; its backward takes the gradient that the others have gathered along.
    part = objective.per_sample(denoise, cache, batch.chunk(starts[-1], k))
    losses.append(part.detach())
    gathered = [
        (leaf, copy.grad)
        for leaf, copy in zip(leaves, detached, strict=True)
        if copy is not leaf and copy.grad is not None
    ]
    roots = [scale(part.sum() / total), *(leaf for leaf, _ in gathered)]
    torch.autograd.backward(roots, [None, *(grad for _, grad in gathered)])
    per_sample = torch.cat(losses, dim=1)
    return Level2Result(per_sample.sum() / total, per_sample)


def _identity(loss: Tensor) -> Tensor:
    return loss


def _detach(leaf: Any) -> Any:
    """A copy without history that gathers a gradient; anything that needs none passes as it is."""
    if isinstance(leaf, Tensor) and leaf.requires_grad:
        return leaf.detach().requires_grad_()
    return leaf


def _no_sync(policy: Any) -> AbstractContextManager[Any]:
    return policy.no_sync() if isinstance(policy, DistributedDataParallel) else nullcontext()


def _check_cache(leaves: list[Any], batch: int) -> None:
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    wrong = [list(leaf.shape) for leaf in tensors if leaf.dim() < 1 or leaf.shape[0] != batch]
    if not tensors or wrong:
        found = f"a tensor of shape {wrong[0]}" if wrong else "no tensor"
        raise InvalidArgument(
            f"level2_step: every tensor in the cache that policy.encode returns must have leading dimension "
            f"B = {batch}, got {found}"
        )
