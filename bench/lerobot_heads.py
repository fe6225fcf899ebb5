"""What the benches of lerobot's action heads share: the real classes, and a side with the draws of the other."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from integrations import Contest, Side
from torch import Tensor, nn

from minidiff_fast.level2 import Level2Batch


def policies() -> AbstractContextManager[Callable[[str], Any]]:
    """``load(name)`` for lerobot's modules; see examples/lerobot_wheel.py."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
    try:
        wheel: Any = importlib.import_module("lerobot_wheel")
    finally:
        sys.path.pop(0)
    found: AbstractContextManager[Callable[[str], Any]] = wheel.policies()
    return found


def given(**draws: Tensor) -> ExitStack:
    """While open, ``torch.randn``, ``torch.randn_like``, ``torch.randint`` or Beta's ``sample`` give these."""
    stack = ExitStack()
    for name, tensor in draws.items():
        owner = torch.distributions.Beta if name == "sample" else torch
        stack.enter_context(patch.object(owner, name, lambda *_, _drawn=tensor, **__: _drawn))
    return stack


def drawn_by(adapter: Any, values: dict[str, Tensor], k: int) -> Level2Batch:
    """Noise and times for both sides; each side noises with them by itself."""
    device = adapter.actions(values).device
    drawn = adapter.draw(values, k, generator=torch.Generator(device).manual_seed(1))
    times = drawn.timesteps
    if times.is_floating_point():  # in the middle of the network's 1000 steps, whose borders rounding may cross
        times = ((times * 1000).floor() + 0.5) / 1000
    return replace(drawn, timesteps=times, drawn=None)


def ours(adapter: Any, drawn: Level2Batch, inputs: list[Tensor]) -> Side:
    """The adapter's loss of drawn samples."""

    def loss() -> Tensor:
        mean: Tensor = adapter.objective.per_sample(adapter, adapter.encode(drawn.obs), drawn).mean()
        return mean

    return side(adapter, loss, inputs)


def side(module: nn.Module, loss: Callable[[], Tensor], inputs: list[Tensor]) -> Side:
    """A side whose gradients are those of the module's parameters that get one, and of inputs."""
    parameters = [*module.parameters(), *inputs]
    return Side(loss, lambda: [p.grad for p in parameters if p.grad is not None], parameters)


def copied(module: nn.Module, values: dict[str, Tensor], *names: str) -> tuple[Any, dict[str, Tensor], list[Tensor]]:
    """The same weights and inputs once more; the inputs in ``names`` get gradients, as an encoder before them needs."""
    inputs = {name: values[name].clone().requires_grad_() for name in names}
    return copy.deepcopy(module), {**values, **inputs}, list(inputs.values())


__all__ = ["Contest", "copied", "drawn_by", "given", "ours", "policies", "side"]
