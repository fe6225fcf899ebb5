"""starVLA's flow-matching head, 256 vision-language tokens read by every second layer: a repeated batch, and ours.

The peer's side is a head in the interface of starVLA's (see repeated_heads.py) on rows repeated K times; ours is
Level2StarVLA of the same head.
"""

from __future__ import annotations

import copy

import torch
from integrations import Contest, Side
from repeated_heads import Drawn, FlowHead
from torch import Tensor

from minidiff_fast.integrations.starvla import Level2StarVLA
from minidiff_fast.shapes import merge_samples

B, S, T, A, MEMORY = 2, 256, 16, 7, 640


def build(k: int, device: torch.device) -> Contest:
    """The sides for K samples of each of B conditions."""
    torch.manual_seed(0)
    peer = FlowHead(actions=A, width=256, depth=4, heads=8, memory=MEMORY, future=32, horizon=T).to(device)
    adapter = Level2StarVLA(copy.deepcopy(peer))
    tokens = torch.randn(B, S, MEMORY, device=device, requires_grad=True)
    state = torch.randn(B, 1, 8, device=device, requires_grad=True)
    actions = torch.randn(B, T, A, device=device)
    batch = adapter.draw({"vl_embs": tokens, "actions": actions, "state": state}, k)
    drawn = Drawn(merge_samples(batch.noise, "kb"), merge_samples(batch.timesteps, "kb"))

    def repeat() -> Tensor:
        return peer(tokens.repeat(k, 1, 1), actions.repeat(k, 1, 1), state.repeat(k, 1, 1), drawn=drawn)

    def ours() -> Tensor:
        return adapter.objective.per_sample(adapter, adapter.encode(batch.obs), batch).mean()

    def side(run: torch.nn.Module, loss: object) -> Side:
        own = [*run.parameters(), tokens, state]
        return Side(loss, lambda: [p.grad for p in own if p.grad is not None], own)  # type: ignore[arg-type]

    return {"repeat": side(peer, repeat), "ours": side(adapter, ours)}
