"""Level2Adapter: a peer's policy with the two calls that the Level-2 step and the samplers make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.level2 import Level2Batch, Level2Result, Objective, level2_step
from minidiff_fast.ops.level2_noise import NoiseDraw, TimestepDraw
from minidiff_fast.parallel import check_times, unwrap
from minidiff_fast.shapes import check_shape, describe


class Level2Adapter(nn.Module):
    r"""A peer's policy on Level-2 batches, from the peer's own batch dict.

    The peer encodes its B observations once; every one is paired with K noised copies of its actions:

    .. math::
        L = \sum_{b,k,t} m_{bt} \ell_{bkt} / (K \sum_{b,t} m_{bt}) \quad \text{(padding = "valid")}, \qquad
        L = \sum_{b,k,t} m_{bt} \ell_{bkt} / (B K T) \quad \text{(padding = "all")}

    which with K = 1 is the peer's own loss; the mask m says which action tokens are not padding.

    :meth:`loss` is the drop-in for the peer's ``compute_loss`` or ``forward``: a scalar with one graph for all K
    samples. :meth:`step` also runs the backward passes, in chunks of K, with the memory of one chunk. ``forward`` is
    :meth:`denoise`, the call that DistributedDataParallel watches.

    Subclasses give :attr:`objective`, :meth:`encode`, :meth:`denoise`, :meth:`actions` and, where the peer pads,
    :meth:`mask`.
    """

    objective: Objective
    """How actions are noised and what the network predicts: the peer's own schedule and time distribution."""
    padding: ClassVar[Literal["valid", "all"]] = "valid"
    """What the peer divides its masked loss by: the tokens that count, or all of them."""

    def encode(self, obs: Any) -> Any:
        """The peer's batch -> what every sample reads, each tensor with leading dimension B."""
        raise NotImplementedError

    def denoise(
        self,
        cache: Any,
        x: Tensor,  # [B, K, T, A]
        t: Tensor,  # [B, K]
    ) -> Tensor:  # [B, K, T, A]
        """The peer's prediction at noised actions ``x`` and times ``t``."""
        raise NotImplementedError

    def actions(self, batch: Any) -> Tensor:  # [B, T, A]
        """The clean actions in the peer's batch, normalised as the peer trains on them."""
        raise NotImplementedError

    def mask(self, batch: Any) -> Tensor | None:  # [B, T] bool
        """True where an action token counts; None where all do."""
        return None

    def forward(
        self,
        cache: Any,
        x: Tensor,  # [B, K, T, A]
        t: Tensor,  # [B, K]
    ) -> Tensor:  # [B, K, T, A]
        """:meth:`denoise`."""
        return self.denoise(cache, x, t)

    def draw(
        self,
        batch: Any,
        k: int,
        *,
        generator: torch.Generator | None = None,
        timesteps: TimestepDraw = "iid",
        noise: NoiseDraw = "iid",
    ) -> Level2Batch:
        """K noised samples for every observation of the peer's batch; see :meth:`Level2Batch.draw`."""
        actions, mask = self.actions(batch), self.mask(batch)
        return Level2Batch.draw(
            batch, actions, k, self.objective, generator=generator, weight=self._weight(actions, mask, k), mask=mask,
            timesteps=timesteps, noise=noise,
        )  # fmt: skip

    def loss(
        self,
        batch: Any,
        k: int,
        *,
        wrapped: nn.Module | None = None,
        generator: torch.Generator | None = None,
        timesteps: TimestepDraw = "iid",
        noise: NoiseDraw = "iid",
    ) -> Tensor:  # []
        """The loss over B * K samples, to be called in place of the peer's; the encoder runs once.

        ``wrapped`` is this adapter inside DistributedDataParallel or ``torch.compile``, where it is: without it the
        backward pass of a replicated adapter would leave the gradients on each rank.

        Raises:
            InvalidArgument: ``wrapped`` is something else, or FSDP that :func:`~minidiff_fast.level2.level2_step`
                refuses.
        """
        name = f"{type(self).__name__}.loss"
        units = self._inside(wrapped, name)
        drawn = self.draw(batch, k, generator=generator, timesteps=timesteps, noise=noise)
        check_times(units, drawn.timesteps, name)
        denoise = self if wrapped is None else wrapped
        return self.objective.per_sample(denoise, self.encode(drawn.obs), drawn).mean()

    def step(
        self,
        batch: Any,
        k: int,
        *,
        chunk: int | None = None,
        wrapped: nn.Module | None = None,
        loss_scale: Callable[[Tensor], Tensor] | None = None,
        generator: torch.Generator | None = None,
        timesteps: TimestepDraw = "iid",
        noise: NoiseDraw = "iid",
    ) -> Level2Result:
        """Forward and backward, ``chunk`` samples per condition at once (it need not divide ``k``).

        See :func:`~minidiff_fast.level2.level2_step`.

        ``wrapped`` is this adapter inside DistributedDataParallel or ``torch.compile``, where it is.
        """
        self._inside(wrapped, f"{type(self).__name__}.step")
        drawn = self.draw(batch, k, generator=generator, timesteps=timesteps, noise=noise)
        return level2_step(
            self if wrapped is None else wrapped, self.objective, drawn, chunk=chunk, loss_scale=loss_scale
        )

    def _inside(self, wrapped: nn.Module | None, caller: str) -> list[Any]:
        """What FSDP2 has sharded, prepared for our calls; ``wrapped`` or a part of it is this adapter."""
        inner = unwrap(self if wrapped is None else wrapped, caller)
        if all(module is not self for module in inner.policy.modules()):
            raise InvalidArgument(
                f"{caller}: wrapped must be this adapter inside DistributedDataParallel or torch.compile, "
                f"got a wrapped {type(inner.policy).__name__}"
            )
        return inner.units

    def _weight(self, actions: Tensor, mask: Tensor | None, k: int) -> Tensor | None:  # [B, K]
        """What turns the mean over a sample's counted tokens into the peer's mean over all conditions."""
        if mask is None:
            return None
        name = type(self).__name__
        check_shape(name, "mask", mask, list(actions.shape[:2]), "[B, T]", describe(actions=actions))
        if mask.dtype != torch.bool:
            raise InvalidArgument(f"{name}: mask must be boolean (True = counts), got {mask.dtype}")
        counted = mask.sum(1, dtype=torch.float32)
        whole = counted.mean().clamp_min(1.0 / len(counted)) if self.padding == "valid" else actions.shape[1]
        return (counted / whole)[:, None].expand(-1, k)
