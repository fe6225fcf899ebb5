"""Two of diffusers' BasicTransformerBlocks that read 300 tokens of a condition: a quarter-width GR00T action head.

repeat: the peer on memory repeated K times. fold: its AttnProcessor2_0 on memory as it is, K and T one axis of queries
(the most that plain PyTorch can do). ours: apply_broadcast_attention. Self-attention and feed-forward are per sample
and the same code on all sides.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0
from integrations import Contest, Side
from torch import Tensor, nn

from minidiff_fast.integrations.diffusers import apply_broadcast_attention

B, TOKENS, SHARED, HEADS, WIDTH, MEMORY, BLOCKS = 4, 41, 300, 4, 48, 256, 2


class Stack(nn.Module):
    """Blocks one after the other, each with its self-attention, its cross-attention and its feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            BasicTransformerBlock(HEADS * WIDTH, HEADS, WIDTH, cross_attention_dim=MEMORY, attention_bias=True)
            for _ in range(BLOCKS)
        )

    def forward(
        self,
        x: Tensor,  # [N, T, C]
        memory: Tensor,  # [B, S, Cm] or [N, S, Cm]
    ) -> Tensor:  # [N, T, C]
        for block in self.blocks:
            x = block(x, encoder_hidden_states=memory)
        return x


class Fold:
    """AttnProcessor2_0 with the samples of a condition in its query axis; rows in the order "bk"."""

    def __init__(self) -> None:
        self.peer = AttnProcessor2_0()

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        folded = hidden_states.reshape(encoder_hidden_states.shape[0], -1, hidden_states.shape[-1])
        out: Tensor = self.peer(attn, folded, encoder_hidden_states, attention_mask)
        return out.view_as(hidden_states)


def side(stack: nn.Module, x: Tensor, memory: Tensor, target: Tensor, repeats: int) -> Side:
    """The mean square error of all samples."""

    def loss() -> Tensor:
        seen = memory if repeats == 1 else memory.repeat_interleave(repeats, 0)
        return (stack(x, seen) - target).square().mean()

    leaves = [*stack.parameters(), memory]
    return Side(loss, lambda: [leaf.grad for leaf in leaves if leaf.grad is not None], [*leaves, x, target])


def build(k: int, device: torch.device) -> Contest:
    """All sides with one set of weights and inputs; layer norms, no dropout."""
    torch.manual_seed(0)
    peer = Stack().to(device)
    x, target = torch.randn(2, B * k, TOKENS, HEADS * WIDTH, device=device)
    memory = torch.randn(B, SHARED, MEMORY, device=device, requires_grad=True)
    fold, ours = copy.deepcopy(peer), copy.deepcopy(peer)
    for block in fold.blocks:
        attn: Any = block.attn2
        attn.set_processor(Fold())
    apply_broadcast_attention(ours)
    return {
        "repeat": side(peer, x, memory, target, k),
        "fold": side(fold, x, memory, target, 1),
        "ours": side(ours, x, memory, target, 1),
    }
