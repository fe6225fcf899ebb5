"""In which order training sees the windows: seeded permutations whose state goes into the checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minidiff_fast.errors import CheckpointError


class DataOrder:
    """Indices of one pass over the windows after the other, each pass a new permutation.

    Every call of :meth:`take` returns the wanted number; a call at the end of a pass goes on with the next
    one. ``generator`` also draws the noise and the timesteps, so that one state holds all of a run's
    sampling.

    Args:
        length: number of windows, >= 1.
        seed: of the generator.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.generator = torch.Generator().manual_seed(seed)
        self._permutation = torch.empty(0, dtype=torch.int64)
        self._next = 0

    def take(self, count: int) -> Tensor:  # [count] int64
        """The next ``count`` indices."""
        parts, missing = [], count
        while missing:
            if self._next == len(self._permutation):
                self._permutation, self._next = torch.randperm(self.length, generator=self.generator), 0
            part = self._permutation[self._next : self._next + missing]
            self._next += len(part)
            missing -= len(part)
            parts.append(part)
        return torch.cat(parts)

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the indices to come."""
        return {
            "length": self.length,
            "generator": self.generator.get_state(),
            "permutation": self._permutation,
            "next": self._next,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken. Raises :class:`CheckpointError` for another number of windows."""
        if state["length"] != self.length:
            raise CheckpointError(
                f"the checkpoint was trained on {state['length']} windows and the data has {self.length}; "
                "resume with the same --data"
            )
        self.generator.set_state(state["generator"])
        self._permutation, self._next = state["permutation"], state["next"]
