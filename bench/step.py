"""Whole training steps of the U-Net: ``python bench/step.py [--device cpu|cuda] [--budget 9m] [--out DIR]``.

One step is encode + denoise, the backward pass of a mean squared error, and AdamW. The contestants have the same
weights, and their outputs and gradients are compared before anything is timed:

repeat      the peer's way: conditions repeated to N = B * K rows, Conv1d -> GroupNorm -> Mish -> FiLM as separate
            modules over [N, C, T]
reference   ours with the definition of broadcast_modulate in plain PyTorch
ours        ours as it runs by default on this device

Prints one table per case and writes DIR/step.json with every repeat.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from minidiff_fast import backend
from minidiff_fast.models import ConditionalUnet1D
from minidiff_fast.models.transformer_for_diffusion import timestep_embedding
from minidiff_fast.ops.broadcast_modulate import BACKENDS

NAME = "step"
PHASES = ("forward", "backward", "optimizer")
TIMESTEPS = 100
ACTION, CONDITION, TOKENS = 2, 132, 16
"""Push-T: actions of 2 numbers, 2 observations of 66, 16 actions a sample."""


@dataclass(frozen=True)
class Case:
    """One cell of the table."""

    key: str
    down_dims: tuple[int, ...]
    kernel_size: int
    K: int
    B: int = 8
    device: str = "any"


def _cases() -> dict[str, Case]:
    small = [Case(f"unet-256-k3/K={k}", (256, 512, 1024), 3, k) for k in (1, 4, 16)]
    large = [Case(f"unet-512-k5/K={k}", (512, 1024, 2048), 5, k, B=64, device="cuda") for k in (1, 4, 16)]
    return {case.key: case for case in small + large}


CASES = _cases()


@dataclass
class Contestant:
    """A model, its optimiser, and how it turns conditions and samples into predictions."""

    model: ConditionalUnet1D
    predict: Callable[[ConditionalUnet1D, Inputs], Tensor]
    optimizer: torch.optim.Optimizer


@dataclass(frozen=True)
class Inputs:
    """One batch."""

    cond: Tensor
    """[B, G]"""
    x: Tensor
    """[B, K, T, Da]"""
    t: Tensor
    """[B, K]"""
    target: Tensor
    """[B, K, T, Da]"""


def shared(model: ConditionalUnet1D, inputs: Inputs) -> Tensor:  # [B, K, T, Da]
    """Ours: encode once, denoise K samples of each condition."""
    return model.denoise(model.encode(inputs.cond), inputs.x, inputs.t)


def repeated(model: ConditionalUnet1D, inputs: Inputs) -> Tensor:  # [B, K, T, Da]
    """The peer's forward, on the same parameters: its modules one after the other over N rows."""
    batch, samples = inputs.t.shape
    cond = inputs.cond.repeat_interleave(samples, 0)
    steps = model.diffusion_step_encoder(timestep_embedding(inputs.t.flatten(), model.step_dim))
    cond = torch.cat([steps, cond], -1)

    def block(module: Any, x: Tensor) -> Tensor:
        film = module.cond_encoder(cond)[:, :, None]
        hidden = module.blocks[0].block(x)
        if model.cond_predict_scale:
            scale, shift = film.chunk(2, dim=1)
            hidden = scale * hidden + shift
        else:
            hidden = hidden + film
        return module.blocks[1].block(hidden) + module.residual_conv(x)

    def resample(module: Any, x: Tensor) -> Tensor:
        return x if isinstance(module, nn.Identity) else module.conv(x)

    x, skips = inputs.x.flatten(0, 1).transpose(1, 2), []
    for first, second, down in cast(Any, model.down_modules):
        x = block(second, block(first, x))
        skips.append(x)
        x = resample(down, x)
    for middle in model.mid_modules:
        x = block(middle, x)
    for first, second, up in cast(Any, model.up_modules):
        x = resample(up, block(second, block(first, torch.cat([x, skips.pop()], 1))))
    last, head = cast(Any, model.final_conv)
    return head(last.block(x)).transpose(1, 2).unflatten(0, (batch, samples))


def contestants(case: Case, device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Contestant]:
    """Of one case, with the same weights."""
    torch.manual_seed(0)
    ours = ConditionalUnet1D(
        ACTION,
        global_cond_dim=CONDITION,
        down_dims=case.down_dims,
        kernel_size=case.kernel_size,
        cond_predict_scale=True,
        num_train_timesteps=TIMESTEPS,
    ).to(device, dtype)
    models = {"repeat": (repeated, None), "reference": (shared, "reference"), "ours": (shared, None)}
    made = {}
    for name, (predict, impl) in models.items():
        model = copy.deepcopy(ours)
        model.impl = impl
        optimizer = torch.optim.AdamW(model.get_optim_groups(1e-3), lr=1e-4, fused=True)
        made[name] = Contestant(model, predict, optimizer)
    return made


def draw(case: Case, device: torch.device) -> Inputs:
    """Random, never zeros."""
    shape = (case.B, case.K, TOKENS, ACTION)
    return Inputs(
        torch.randn(case.B, CONDITION, device=device),
        torch.randn(shape, device=device),
        torch.randint(0, TIMESTEPS, shape[:2], device=device),
        torch.randn(shape, device=device),
    )


def loss_of(contestant: Contestant, inputs: Inputs) -> Tensor:
    """Mean squared error."""
    return nn.functional.mse_loss(contestant.predict(contestant.model, inputs), inputs.target)


def verify(group: dict[str, Contestant], inputs: Inputs) -> dict[str, float]:
    """Largest relative difference from ``repeat``, of the outputs and of all gradients; refuses above 1e-3.

    float32 sums over thousands of terms in another order (and TF32 convolutions, where they are on) differ.
    """
    found = {}
    wanted: list[Tensor] = []
    for name, contestant in group.items():
        out = contestant.predict(contestant.model, inputs)
        grads = torch.autograd.grad((out - inputs.target).square().mean(), list(contestant.model.parameters()))
        parts = [out.detach().flatten(), torch.cat([g.flatten() for g in grads])]
        wanted = wanted or parts
        errors = [(a - b).abs().max() / b.abs().max() for a, b in zip(parts, wanted, strict=True)]
        found[name] = max(float(e) for e in errors)
        if not found[name] <= 1e-3:
            raise SystemExit(f"bench/step.py: {name} differs from repeat by {found[name]:.1e}: nothing is timed")
    return found


def step(contestant: Contestant, inputs: Inputs, device: torch.device) -> dict[str, float]:
    """Milliseconds of the phases of one step."""
    marks = [_now(device)]
    loss = loss_of(contestant, inputs)
    marks.append(_now(device))
    loss.backward()
    marks.append(_now(device))
    contestant.optimizer.step()
    contestant.optimizer.zero_grad(set_to_none=True)
    marks.append(_now(device))
    return {phase: 1e3 * (b - a) for phase, a, b in zip(PHASES, marks, marks[1:], strict=False)}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def saved_bytes(contestant: Contestant, inputs: Inputs) -> int:
    """What autograd keeps between forward and backward, parameters excluded; storages counted once."""
    own = {p.untyped_storage().data_ptr() for p in contestant.model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(contestant, inputs)
    size = sum(storage.nbytes() for address, storage in kept.items() if address not in own)
    del loss
    return size


def measure(case: Case, device: torch.device, repeats: int, seconds: float) -> dict[str, Any]:
    """Interleaved rounds, the order rotating; at least three."""
    started = time.perf_counter()
    inputs = draw(case, device)
    group = contestants(case, device)
    errors = verify(group, inputs)
    saved = {name: saved_bytes(contestant, inputs) for name, contestant in group.items()}
    names = list(group)
    times: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for round_ in range(-1, repeats):
        if round_ >= 3 and time.perf_counter() - started > seconds:
            break
        shift = round_ % len(names)
        for name in names[shift:] + names[:shift]:
            taken = step(group[name], inputs, device)
            if round_ >= 0:
                times[name].append(taken)
    return {"case": asdict(case), "errors": errors, "saved_bytes": saved, "times_ms": times,
            "impl": backend.resolve(BACKENDS, None, device, torch.float32)}  # fmt: skip


def render(key: str, result: dict[str, Any]) -> str:
    """A table of medians; [least, most] of the whole step."""
    lines = [f"\n{key}   B = {result['case']['B']}, fp32, broadcast_modulate: {result['impl']}",
             f"{'':12}{'step ms':>10}{'[min, max]':>20}{'forward':>10}{'backward':>10}{'AdamW':>9}"
             f"{'saved MB':>10}{'ratio':>8}{'error':>10}"]  # fmt: skip
    totals = {name: [sum(t.values()) for t in rounds] for name, rounds in result["times_ms"].items()}
    peer = statistics.median(totals["repeat"])
    for name, total in totals.items():
        phases = [statistics.median(t[phase] for t in result["times_ms"][name]) for phase in PHASES]
        middle = statistics.median(total)
        spread = f"[{min(total):.1f}, {max(total):.1f}]"
        lines.append(
            f"{name:12}{middle:10.1f}{spread:>20}{phases[0]:10.1f}{phases[1]:10.1f}{phases[2]:9.1f}"
            f"{result['saved_bytes'][name] / 1e6:10.1f}{peer / middle:7.2f}x{result['errors'][name]:10.1e}"
        )
    return "\n".join(lines)


def seconds_of(text: str) -> float:
    """``90``, ``90s``, ``9m`` or ``1h`` in seconds.

    >>> seconds_of("9m")
    540.0
    """
    unit = {"s": 1.0, "m": 60.0, "h": 3600.0}.get(text[-1:])
    return float(text) if unit is None else unit * float(text[:-1])


def main(argv: list[str] | None = None) -> int:
    """Run; the exit code: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(prog="bench/step.py", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", help=f"comma-separated, out of {', '.join(CASES)}; default: those of the device")
    parser.add_argument("--budget", type=seconds_of, default=540.0, help="seconds, or with s, m, h; default: 9m")
    parser.add_argument("--repeats", type=int, help="timed rounds; default: 20 on cuda, 5 on the CPU")
    parser.add_argument("--out", type=Path, help="folder for step.json; default: nothing is written")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    names = arguments.cases.split(",") if arguments.cases else [
        key for key, case in CASES.items() if case.device in ("any", arguments.device)
    ]  # fmt: skip
    unknown = [name for name in names if name not in CASES]
    if unknown:
        print(f"bench/step.py: --cases: unknown {', '.join(unknown)}; there are: {', '.join(CASES)}", file=sys.stderr)
        return 2
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    cells: dict[str, Any] = {}
    header = {"suite": NAME, "device": machine, "threads": torch.get_num_threads(), "torch": torch.__version__,
              "triton": importlib.metadata.version("triton"), "cells": cells}  # fmt: skip
    print(f"step on {machine}, torch {torch.__version__}, {torch.get_num_threads()} thread(s)")
    started = time.perf_counter()
    for i, name in enumerate(names):
        left = arguments.budget - (time.perf_counter() - started)
        if left <= 0:
            print(f"stopped at the budget of {arguments.budget:g} s: {len(names) - i} cells left")
            break
        result = measure(CASES[name], device, arguments.repeats or (20 if device.type == "cuda" else 5), left)
        cells[name] = result
        print(render(name, result), flush=True)
        if arguments.out is not None:
            arguments.out.mkdir(parents=True, exist_ok=True)
            (arguments.out / "step.json").write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
