"""The suite of ``minidiff_fast.ops.broadcast_attention``: its cells, and what they are made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import harness
import torch
from cases import CASES, AttentionCase, Inputs, Pass, Work, make_inputs, work
from harness import DTYPES, INPUT_SETS, Settings, context_lost, ours_failed
from peers import OP, Peer, contestants
from verify import Truth, truth_of

__all__ = [
    "DTYPES", "NAME", "Bench", "Cell", "Settings", "case_names", "context_lost", "ours_failed", "peer_names", "plan",
    "render", "select_peers",
]  # fmt: skip

NAME = "attention"


@dataclass(frozen=True)
class Cell:
    """One case at one K in one dtype."""

    case: AttentionCase
    K: int
    dtype: str

    @property
    def key(self) -> str:
        """Its name in the JSON."""
        return f"{self.case.name}/K={self.K}/{self.dtype}"


def case_names() -> list[str]:
    """Every case of the table."""
    return list(CASES["full"])


def peer_names(device: torch.device) -> list[str]:
    """Every contestant on this kind of device."""
    return [peer.name for peer in contestants(device)]


def select_peers(names: Sequence[str] | None, device: torch.device) -> tuple[list[str], list[str]]:
    """See :func:`harness.select_peers`."""
    return harness.select_peers(names, contestants(device))


def plan(scale: str, cases: Iterable[str], dtypes: Iterable[str]) -> list[Cell]:
    """Cells in the order of their worth, as a budget may end early: dtype, then table K, then sweep K."""
    chosen = [CASES[scale][name] for name in cases]
    cells = []
    for dtype in dtypes:
        cells += [Cell(case, K, dtype) for case in chosen for K in case.samples]
        cells += [Cell(case, K, dtype) for case in chosen for K in case.all_samples if K not in case.samples]
    return cells


class Bench(harness.Bench):
    """Measures attention cells."""

    op = OP

    def contestants(self) -> list[Peer]:
        return contestants(self.settings.device)

    def inputs(self, cell: Cell, dtype: torch.dtype) -> list[Inputs]:
        return make_inputs(cell.case, cell.K, dtype, self.settings.device, sets=INPUT_SETS)

    def truth(self, inputs: Inputs, eps: float) -> Truth:
        return truth_of(inputs, eps)

    def work(self, cell: Cell, inputs: Inputs, which: Pass) -> Work:
        return work(cell.case, cell.K, inputs, which)

    def facts(self, inputs: Inputs) -> dict[str, Any]:
        return {"lengths": None if inputs.lengths is None else inputs.lengths.tolist()}


def render(key: str, result: dict[str, Any]) -> str:
    """See :func:`harness.rendered`."""
    return harness.rendered(key, result, ("B", "T", "S", "P", "H", "Hkv", "D"))
