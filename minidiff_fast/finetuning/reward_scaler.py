"""Rewards in units of the spread of their discounted sum."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from minidiff_fast.errors import InvalidArgument


class RewardScaler:
    r"""Divides rewards by a running standard deviation of the discounted return, and clips them.

    .. math::
        G_s = \gamma G_{s-1} (1 - \mathrm{ended}_{s-1}) + r_s, \qquad
        r'_s = \mathrm{clip}(r_s / \sqrt{\mathrm{Var}[G] + 10^{-8}}, \pm\mathrm{clip})

    ``Var[G]`` runs over all valid decisions so far. A rollout is taken in as a whole before any of its rewards is
    scaled, so all rewards of one update have the same unit. Means are not subtracted: that would change the task.
    (gymnasium's NormalizeReward does the same per step; DPPO, arXiv 2409.00588, with a clip of 10.)

    Args:
        gamma: discount per decision, that of the advantage.
        clip: largest magnitude of a scaled reward.
    """

    def __init__(self, gamma: float, clip: float = 10.0) -> None:
        if not 0.0 <= gamma <= 1.0:
            raise InvalidArgument(f"RewardScaler: gamma must be in [0, 1], got {gamma}")
        if not (clip > 0.0 and math.isfinite(clip)):
            raise InvalidArgument(f"RewardScaler: clip must be above 0 and finite, got {clip}")
        self.gamma, self.clip = gamma, clip
        self.mean, self.variance, self.count = 0.0, 1.0, 1e-4
        self._carry: Tensor | None = None  # [N] float64: discounted sums of the episodes under way

    @property
    def std(self) -> float:
        """What rewards are divided by."""
        return math.sqrt(self.variance + 1e-8)

    def __call__(
        self,
        reward: Tensor,  # [S, N]
        ended: Tensor,  # [S, N] bool
        valid: Tensor | None = None,  # [S, N] bool
    ) -> Tensor:  # [S, N]
        """Learn from one rollout of N environments, then scale it. A new tensor in the dtype of ``reward``.

        Rows that are not valid count nowhere, end their episode's sum, and give 0.

        Raises:
            InvalidArgument: shapes differ, the number of environments changed, or a valid reward is not finite.
        """
        counts = torch.ones_like(ended) if valid is None else valid
        if reward.dim() != 2 or reward.shape != ended.shape or reward.shape != counts.shape:
            raise InvalidArgument(
                f"RewardScaler: reward, ended and valid must be [S, N] alike, got {list(reward.shape)}, "
                f"{list(ended.shape)}, {list(counts.shape)}"
            )
        if self._carry is not None and len(self._carry) != reward.shape[1]:
            raise InvalidArgument(
                f"RewardScaler: expected N = {len(self._carry)} environments as before, got {reward.shape[1]}"
            )
        if not bool((reward.isfinite() | ~counts).all()):
            raise InvalidArgument("RewardScaler: rewards must be finite")
        clean = reward.double().masked_fill(~counts, 0.0)
        carry = torch.zeros(reward.shape[1], dtype=torch.float64) if self._carry is None else self._carry
        sums = torch.zeros_like(clean)
        for step in range(len(clean)):
            sums[step] = self.gamma * carry + clean[step]
            carry = sums[step].masked_fill(ended[step] | ~counts[step], 0.0)
        self._carry = carry.clone()
        self._take_in(sums[counts])
        return (clean / self.std).clamp(-self.clip, self.clip).to(reward.dtype)

    def begin(self) -> None:
        """Forget the episodes under way, of which no further reward will come."""
        self._carry = None

    def _take_in(
        self,
        sums: Tensor,  # [n] float64
    ) -> None:
        """Merge mean and variance of two samples (Chan et al., 1979)."""
        n = len(sums)
        if n == 0:
            return
        mean, variance, total = float(sums.mean()), float(sums.var(correction=0)), self.count + n
        delta = mean - self.mean
        self.variance = (self.variance * self.count + variance * n + delta**2 * self.count * n / total) / total
        self.mean += delta * n / total
        self.count = total

    def state_dict(self) -> dict[str, Any]:
        """Everything that later scaling depends on."""
        carry = None if self._carry is None else self._carry.clone()
        return {"mean": self.mean, "variance": self.variance, "count": self.count, "carry": carry}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The counterpart of :meth:`state_dict`."""
        expected = {"mean", "variance", "count", "carry"}
        if set(state) != expected:
            raise InvalidArgument(f"RewardScaler: state must hold {sorted(expected)}, got {sorted(state)}")
        self.mean, self.variance, self.count = float(state["mean"]), float(state["variance"]), float(state["count"])
        self._carry = None if state["carry"] is None else state["carry"].clone()
