"""Other people's policies: ``python bench/run.py integrations [--only NAME,...] [--k 1,4,16] [--out DIR]``.

A step is the loss over B conditions with K samples each and its backward pass. The peer's side is the peer's own code
on conditions (or a whole batch) repeated K times; where the peer offers something better, that stands beside it. All
sides have the same weights, noise and times, and their losses and gradients are compared before anything is timed.

``bench/integration_<name>.py`` has one ecosystem: ``B``, ``build(k, device) -> Contest`` and a docstring that says what
is measured. Prints a Markdown table per ecosystem; writes DIR/integrations.json with every repeat.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timing import Clock
from torch import Tensor

NAMES = (
    "diffusers", "torch_modules", "lerobot_diffusion", "diffusion_policy", "multi_task_dit", "vla_jepa", "groot",
    "smolvla", "pi0", "repeat", "cogact",
)  # fmt: skip
TOLERANCE = 1e-3
"""Of losses and gradients, relative to the largest: float32 sums in another order."""


@dataclass(frozen=True)
class Side:
    """One way of computing the loss of B * K samples."""

    loss: Callable[[], Tensor]
    """Forward; the same number on every side."""
    gradients: Callable[[], list[Tensor]]
    """After ``loss().backward()``: gradients to compare, in one order on all sides."""
    parameters: list[Tensor]
    """Weights and inputs: not counted as saved, and their gradients are cleared between steps."""


Contest = dict[str, Side]
"""The sides by name; the first is the peer as it is, the last is ours."""


def saved_bytes(side: Side) -> int:
    """What autograd keeps between forward and backward, weights and inputs excluded; storages counted once."""
    own = {p.untyped_storage().data_ptr() for p in side.parameters}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = side.loss()
    size = sum(storage.nbytes() for address, storage in kept.items() if address not in own)
    del loss
    return size


def cleared(side: Side) -> None:
    for parameter in side.parameters:
        parameter.grad = None


def verify(contest: Contest) -> dict[str, float]:
    """Largest relative difference from the first side, of the loss and of every gradient; refuses above TOLERANCE."""
    found: dict[str, float] = {}
    wanted: list[Tensor] = []
    for name, side in contest.items():
        cleared(side)
        loss = side.loss()
        loss.backward()
        parts = [loss.detach().reshape(1), *(g.detach().clone() for g in side.gradients())]
        cleared(side)
        wanted = wanted or parts
        if len(parts) != len(wanted):
            raise SystemExit(f"bench/integrations.py: {name} compares {len(parts)} tensors, the peer {len(wanted)}")
        largest = max(float(w.abs().max()) for w in wanted[1:])
        errors = [abs(float(parts[0] - wanted[0])) / abs(float(wanted[0]))]
        errors += [float((a - b).abs().max()) / largest for a, b in zip(parts[1:], wanted[1:], strict=True)]
        found[name] = max(errors)
        if not found[name] <= TOLERANCE:
            raise SystemExit(f"bench/integrations.py: {name} differs by {found[name]:.1e}: nothing is timed")
    return found


def measure(contest: Contest, device: torch.device, repeats: int, seconds: float) -> dict[str, Any]:
    """Interleaved rounds, the order rotating; at least three."""
    errors = verify(contest)
    saved = {name: saved_bytes(side) for name, side in contest.items()}
    clock, names = Clock(device), list(contest)
    times: dict[str, list[float]] = {name: [] for name in names}
    started = time.perf_counter()
    for round_ in range(-1, repeats):
        if round_ >= 3 and time.perf_counter() - started > seconds:
            break
        shift = round_ % len(names)
        for name in names[shift:] + names[:shift]:
            side = contest[name]
            taken = clock(lambda s=side: s.loss().backward())  # type: ignore[misc]
            cleared(side)
            if round_ >= 0:
                times[name].append(taken)
    return {"errors": errors, "saved_bytes": saved, "times_ms": times}


def render(name: str, batch: int, results: dict[int, dict[str, Any]]) -> str:
    """A Markdown table: a row per K, medians."""
    sides = list(next(iter(results.values()))["times_ms"])
    head = ["K", *(f"{side} ms" for side in sides), *(f"{side} MB" for side in sides), f"{sides[0]} / {sides[-1]}"]
    lines = [f"\n{name}, B = {batch}", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for k, result in results.items():
        medians = [statistics.median(result["times_ms"][side]) for side in sides]
        row = [str(k), *(f"{m:.1f}" for m in medians)]
        row += [f"{result['saved_bytes'][side] / 1e6:.1f}" for side in sides]
        lines.append("| " + " | ".join([*row, f"**{medians[0] / medians[-1]:.2f}**"]) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run; the exit code: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(prog="bench/run.py integrations")
    parser.add_argument("--only", help=f"comma-separated, out of {', '.join(NAMES)}; default: all")
    parser.add_argument("--k", default="1,4,16", help="samples per condition; default: 1,4,16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds; default: 7")
    parser.add_argument("--seconds", type=float, default=20.0, help="per table row, after three rounds; default: 20")
    parser.add_argument("--out", type=Path, help="folder for integrations.json; default: nothing is written")
    arguments = parser.parse_args(argv)
    names = arguments.only.split(",") if arguments.only else list(NAMES)
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        print(f"bench/run.py: --only: unknown {', '.join(unknown)}; there are: {', '.join(NAMES)}", file=sys.stderr)
        return 2
    device = torch.device(arguments.device)
    cells: dict[str, Any] = {}
    for name in names:
        module = importlib.import_module(f"integration_{name}")
        results = {}
        for k in map(int, arguments.k.split(",")):
            contest = module.build(k, device)
            results[k] = measure(contest, device, arguments.repeats, arguments.seconds)
            del contest
            gc.collect()
        cells[name] = {"B": module.B, "what": (module.__doc__ or "").strip().splitlines()[0], "K": results}
        print(render(name, module.B, results), flush=True)
        if arguments.out is not None:
            arguments.out.mkdir(parents=True, exist_ok=True)
            head = {"suite": "integrations", "threads": torch.get_num_threads(), "torch": torch.__version__}
            text = json.dumps({**head, "cells": cells}, indent=1)
            (arguments.out / "integrations.json").write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
