"""CogACT's DiT-S on one condition token of 4,096 channels: a repeated batch, and Level2CogACT.

Only the projection of the condition token is shared; nothing else in this head is. The encoder, which CogACT runs once
per condition too, is not part of the measurement.
"""

from __future__ import annotations

import copy

import torch
from integrations import Contest, Side
from repeated_heads import ActionModel
from torch import Tensor

from minidiff_fast.integrations.repeat import Level2CogACT
from minidiff_fast.shapes import merge_samples

B, T, A, TOKEN = 2, 16, 7, 4096


def build(k: int, device: torch.device) -> Contest:
    """The sides for K samples of each of B conditions."""
    torch.manual_seed(0)
    peer = ActionModel(actions=A, width=384, depth=6, heads=4, token_size=TOKEN, horizon=T).to(device)
    adapter = Level2CogACT(copy.deepcopy(peer))
    z = torch.randn(B, 1, TOKEN, device=device, requires_grad=True)
    actions = torch.randn(B, T, A, device=device)
    batch = adapter.draw({"actions": actions, "cognition_features": z}, k)
    noise, t = merge_samples(batch.noise, "kb"), merge_samples(batch.timesteps, "kb")

    def repeat() -> Tensor:
        torch.manual_seed(1)  # the dropout of the condition
        return peer.loss(actions.repeat(k, 1, 1), z.repeat(k, 1, 1), noise, t)

    def ours() -> Tensor:
        torch.manual_seed(1)
        return adapter.objective.per_sample(adapter, adapter.encode(batch.obs), batch).mean()

    def side(run: torch.nn.Module, loss: object) -> Side:
        own = [*run.parameters(), z]
        return Side(loss, lambda: [p.grad for p in own if p.grad is not None], own)  # type: ignore[arg-type]

    return {"repeat": side(peer, repeat), "ours": side(adapter, ours)}
