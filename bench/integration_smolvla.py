"""SmolVLA of lerobot, scaled down, as it trains by default: the expert, with the language model frozen.

4 layers, widths 128 and 96, 177 prefix tokens, 50 actions.

"repeat" is the policy's own forward on a batch whose conditions and actions are repeated K times.
"""

from __future__ import annotations

from functools import partial

import tiny_vla
import torch
from integrations import Contest, Side
from torch import Tensor

from minidiff_fast.integrations.lerobot.smolvla import Level2SmolVLA
from minidiff_fast.level2 import Level2Batch

B = 2
SIZE = tiny_vla.Size(
    width=128, layers=4, heads=4, kv_heads=2, head_dim=32, mlp=320, vision_layers=3, image=128, vocabulary=1000,
    chunk=50, action=7, max_action=32, state=7, max_state=32,
)  # fmt: skip
WORDS = 48


def build(k: int, device: torch.device) -> Contest:
    """Both sides on one policy."""
    torch.manual_seed(0)
    policy = tiny_vla.smolvla(tiny_vla.lerobot(), SIZE, device=str(device))
    adapter = Level2SmolVLA(policy)
    batch = {name: x.to(device) for name, x in tiny_vla.batch(SIZE, B, WORDS).items()}
    drawn = adapter.draw(batch, k, generator=torch.Generator().manual_seed(0))
    rows = {name: x.repeat_interleave(k, 0) for name, x in batch.items()}
    noise, times = drawn.noise.flatten(0, 1), drawn.timesteps.flatten()
    inputs = [*batch.values(), *rows.values(), noise, times, drawn.noise]
    return tiny_vla.contest(
        {
            "repeat": partial(_repeated, policy, rows, noise, times),
            "ours": partial(_level2, adapter, drawn),
        },
        policy,
        inputs,
        Side,
    )


def _repeated(policy: torch.nn.Module, rows: dict[str, Tensor], noise: Tensor, times: Tensor) -> Tensor:
    loss: Tensor = policy(rows, noise=noise, time=times)[0]
    return loss


def _level2(adapter: Level2SmolVLA, drawn: Level2Batch) -> Tensor:
    return adapter.objective.per_sample(adapter, adapter.encode(drawn.obs), drawn).mean()
