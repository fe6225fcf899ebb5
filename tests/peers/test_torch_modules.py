"""convert on lerobot's ACT decoder: attention in a class of its own, named by the user, called with torch's defaults."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from minidiff_fast.integrations import convert


class Config:
    dim_model, n_heads, dim_feedforward, dropout = 32, 4, 48, 0.0
    feedforward_activation, n_decoder_layers = "relu", 2
    pre_norm = False


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("layout", ["bk", "kb"])
def test_act_decoder(lerobot: Callable[[str], Any], k: int, layout: Any) -> None:
    act = lerobot("policies.act.modeling_act")
    ours = act.ACTDecoder(Config()).double()
    peer = copy.deepcopy(ours)
    report = convert(ours, names="*.multihead_attn", layout=layout)
    assert len(report.replaced) == 2 and len(report.left) == 2
    x = torch.randn(3, 2 * k, 32, dtype=torch.float64, requires_grad=True)
    memory = torch.randn(7, 2, 32, dtype=torch.float64, requires_grad=True)
    places, queries = torch.randn(7, 1, 32, dtype=torch.float64), torch.randn(3, 1, 32, dtype=torch.float64)
    copied = memory.repeat_interleave(k, 1) if layout == "bk" else memory.repeat(1, k, 1)
    found = []
    for model, shared in ((peer, copied), (ours, memory)):
        out = model(x, shared, decoder_pos_embed=queries, encoder_pos_embed=places)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        gradients = torch.autograd.grad((out * weights).sum(), [x, memory, *model.parameters()], allow_unused=True)
        found.append([out, *gradients])
    for wanted, got in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
