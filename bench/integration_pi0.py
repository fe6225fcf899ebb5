"""pi0 of lerobot, scaled down, as it trains by default: everything.

3 layers, widths 128 and 64, 176 prefix tokens, 50 actions.

"repeat" is the policy's own forward on a batch whose conditions and actions are repeated K times.
"""

from __future__ import annotations

from functools import partial

import tiny_vla
import torch
from integrations import Contest, Side
from torch import Tensor

from minidiff_fast.integrations.lerobot.pi0 import Level2PI0
from minidiff_fast.level2 import Level2Batch

B = 2
SIZE = tiny_vla.Size(
    width=128, expert_width=64, layers=3, kv_heads=1, head_dim=32, mlp=512, vision_layers=2, image=64,
    vocabulary=1000, chunk=50, action=7, max_action=32, state=7, max_state=32,
)  # fmt: skip
WORDS = 48


def build(k: int, device: torch.device) -> Contest:
    """Both sides on one policy."""
    torch.manual_seed(0)
    policy = tiny_vla.pi0(tiny_vla.lerobot(), SIZE, device=str(device))
    adapter = Level2PI0(policy)
    batch = {name: x.to(device) for name, x in tiny_vla.batch(SIZE, B, WORDS).items()}
    drawn = adapter.draw(batch, k, generator=torch.Generator().manual_seed(0))
    rows = {name: x.repeat_interleave(k, 0) for name, x in batch.items()}
    noise, times = drawn.noise.flatten(0, 1), drawn.timesteps.flatten()
    # The policy's forward takes neither noise nor times; it asks its model for them.
    policy.model.sample_noise = partial(_given, noise)
    policy.model.sample_time = partial(_given, times)
    inputs = [*batch.values(), *rows.values(), noise, times, drawn.noise]
    return tiny_vla.contest(
        {"repeat": partial(_repeated, policy, rows), "ours": partial(_level2, adapter, drawn)}, policy, inputs, Side
    )


def _given(tensor: Tensor, *_: object) -> Tensor:
    return tensor


def _repeated(policy: torch.nn.Module, rows: dict[str, Tensor]) -> Tensor:
    loss: Tensor = policy(rows)[0]
    return loss


def _level2(adapter: Level2PI0, drawn: Level2Batch) -> Tensor:
    return adapter.objective.per_sample(adapter, adapter.encode(drawn.obs), drawn).mean()
