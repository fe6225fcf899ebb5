"""nn.TransformerDecoder: 3 layers of 256 channels, 16 action tokens, memory of 256 tokens a condition.

Both sides project the 256 observation tokens to memory once a condition and run the same weights on the same inputs.
"repeat" hands the decoder the memory repeated K times; "ours" is the same model after ``integrations.convert``. The
step is the squared error of B * K samples and its backward pass, down to the observation tokens.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from integrations import Contest, Side
from torch import Tensor, nn

from minidiff_fast.integrations import convert

B, T, S, C, H, LAYERS, ACTIONS = 4, 16, 256, 256, 4, 3, 7


class Denoiser(nn.Module):
    """A diffusion transformer; the time is added to the samples' tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.observe, self.embed, self.time = nn.Linear(C, C), nn.Linear(ACTIONS, C), nn.Linear(1, C)
        layer = nn.TransformerDecoderLayer(C, H, 4 * C, dropout=0.0, norm_first=True, batch_first=True)
        self.decoder, self.head = nn.TransformerDecoder(layer, LAYERS), nn.Linear(C, ACTIONS)

    def forward(
        self,
        x: Tensor,  # [N, T, A]
        t: Tensor,  # [N]
        tokens: Tensor,  # [B, S, C]
        repeats: int,
    ) -> Tensor:  # [N, T, A]
        """``repeats`` copies of the memory; 1 after the conversion."""
        memory = self.observe(tokens)
        if repeats > 1:
            memory = memory.repeat_interleave(repeats, 0)
        return self.head(self.decoder(self.embed(x) + self.time(t[:, None, None]), memory))


def build(k: int, device: torch.device) -> Contest:
    """The two sides, on the same weights, noised actions and times."""
    torch.manual_seed(0)
    model = Denoiser().to(device)
    converted = copy.deepcopy(model)
    convert(converted.decoder)
    x, target = (torch.randn(B * k, T, ACTIONS, device=device) for _ in range(2))
    t, tokens = torch.rand(B * k, device=device), torch.randn(B, S, C, device=device)
    return {
        "repeat": _side(model, x, t, tokens, target, k),
        "ours": _side(converted, x, t, tokens, target, 1),
    }


def _side(model: Denoiser, x: Tensor, t: Tensor, tokens: Tensor, target: Tensor, repeats: int) -> Side:
    leaf = tokens.clone().requires_grad_()
    parameters = [leaf, *model.parameters()]
    loss = partial(_loss, model, x, t, leaf, target, repeats)
    return Side(loss, lambda: [p.grad for p in parameters if p.grad is not None], [*parameters, x, t, target])


def _loss(model: Denoiser, x: Tensor, t: Tensor, tokens: Tensor, target: Tensor, repeats: int) -> Tensor:
    return (model(x, t, tokens, repeats) - target).square().mean()
