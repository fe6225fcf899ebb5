"""The form that published code has: the observation is encoded again at every denoising step. Kept for comparison."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from minidiff_fast.objectives.policy_gradient import ObjectiveLoss, value_loss


class RawCondition(NamedTuple):
    """Observations in place of a cache."""

    obs: Any
    """[B, ...] each."""


class FlatPolicy:
    """A policy without a cache: every call of ``denoise`` encodes the observation of each of its B * K rows.

    Args:
        policy: has features, condition, denoise.
        shadow: a second network that runs beside it on the same rows and whose result is thrown away, as DPPO's code
            runs the frozen network at the steps that are fine-tuned.
    """

    training = False

    def __init__(self, policy: Any, shadow: Any = None) -> None:
        self.policy, self.shadow = policy, shadow

    def encode(self, obs: Any) -> RawCondition:
        """The observations as they are."""
        return RawCondition(obs)

    def denoise(
        self,
        cache: RawCondition,
        x: Tensor,  # [B, K, T, A]
        t: Tensor,  # [B, K]
    ) -> Tensor:  # [B, K, T, A]
        """Encode B * K observations, denoise B * K rows."""
        batch, k = t.shape
        obs, rows, times = repeated(cache.obs, k), x.flatten(0, 1)[:, None], t.flatten()[:, None]
        if self.shadow is not None:
            with torch.no_grad():
                self.shadow.denoise(self.shadow.condition(self.shadow.features(obs)), rows, times)
        prediction = self.policy.denoise(self.policy.condition(self.policy.features(obs)), rows, times)
        return prediction.unflatten(0, (batch, k)).squeeze(2)


def repeated(value: Any, k: int) -> Any:
    """Every tensor's rows k times, row b * k + j is row b."""
    return pytree.tree_map(lambda leaf: leaf.repeat_interleave(k, 0), value)


def flat_losses(
    policy: Any,
    critic: Any,
    algorithm: Any,
    obs: Any,
    batch: dict[str, Tensor],  # [B, K, ...] each
    advantage: Tensor,  # [B]
    returns: Tensor,  # [B]
    old_value: Tensor,  # [B]
    *,
    value_clip: float | None = None,
    shadow: Any = None,
) -> tuple[ObjectiveLoss, Tensor]:
    """Actor and value loss with every (decision, step) pair a row of its own: B * K encoder passes, and as many of a
    critic's own encoder. The losses and gradients are those of the Level-2 form."""
    k = next(iter(batch.values())).shape[1]
    rows, gains, targets, values = (repeated(value, k) for value in (obs, advantage, returns, old_value))
    pairs = {name: tensor.flatten(0, 1)[:, None] for name, tensor in batch.items()}
    if shadow is not None:
        with torch.no_grad():
            samples = next(tensor for tensor in pairs.values() if tensor.dim() == 4)
            times = torch.zeros(samples.shape[:2], dtype=torch.int64, device=samples.device)
            shadow.denoise(shadow.condition(shadow.features(rows)), samples, times)
    features = policy.features(rows)
    actor = algorithm.loss(policy, policy.condition(features), pairs, gains)
    return actor, value_loss(critic(rows, features), targets, values, clip=value_clip)
