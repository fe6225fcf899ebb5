"""GR00T N1.7's action head at a fraction of its size (8 layers of 4 x 48 for 32 of 32 x 48), rows repeated or shared.

300 random tokens stand for the backbone's output, which both have once. ``repeat`` is the peer's head on K copies of
its inputs, as the ``repeated_diffusion_steps`` of its relatives make them: its norm and self-attention of the tokens,
too, run for every copy, and the weights of the row's embodiment are gathered for every copy.
"""

from __future__ import annotations

from typing import Any

import torch
from integrations import Contest
from lerobot_heads import copied, drawn_by, given, ours, policies, side
from torch import Tensor

from minidiff_fast.integrations.lerobot.groot import Level2GR00THead

B = 2
WIDTH, TOKENS, CHANNELS, HORIZON, ACTION, STATE = 4 * 48, 300, 256, 40, 32, 64


def build(k: int, device: torch.device) -> Contest:
    """The contest at K samples per condition."""
    torch.manual_seed(0)
    with policies() as load:
        module = load("policies.groot.groot_n1_7")
        head = module.GR00TN17ActionHead(module.GR00TN17Config(**_sizes())).to(device)
    seen = torch.arange(TOKENS, device=device)[None]
    values = {
        "backbone_features": torch.randn(B, TOKENS, CHANNELS, device=device),
        "backbone_attention_mask": seen < torch.tensor([[TOKENS], [TOKENS - 20]], device=device),
        "image_mask": (seen < 256).expand(B, -1),
        "state": torch.randn(B, 1, STATE, device=device),
        "embodiment_id": torch.arange(B, device=device),
        "action": torch.randn(B, HORIZON, ACTION, device=device),
        "action_mask": (torch.arange(ACTION, device=device) < 7).float().expand(B, HORIZON, -1),
    }
    converted, ours_values, ours_inputs = copied(head, values, "backbone_features")
    adapter = Level2GR00THead(converted)
    drawn = drawn_by(adapter, ours_values, k)
    peer, peer_values, peer_inputs = copied(head, values, "backbone_features")
    noise, sample = drawn.noise.flatten(0, 1), 1 - drawn.timesteps.flatten() / head.config.noise_s

    def repeat() -> Tensor:
        from transformers.feature_extraction_utils import BatchFeature

        rows = {name: x.repeat_interleave(k, 0) for name, x in peer_values.items()}
        with given(randn=noise, sample=sample):
            loss: Tensor = peer(BatchFeature(dict(rows)), BatchFeature(dict(rows)))["loss"]
        return loss

    return {"repeat": side(peer, repeat, peer_inputs), "ours": ours(adapter, drawn, ours_inputs)}


def _sizes() -> dict[str, Any]:
    attention = {"positional_embeddings": None, "dropout": 0.0, "final_dropout": True, "num_attention_heads": 4}
    return {
        "backbone_embedding_dim": CHANNELS, "input_embedding_dim": WIDTH, "hidden_size": 128, "max_state_dim": STATE,
        "max_action_dim": ACTION, "action_horizon": HORIZON, "state_dropout_prob": 0.0,
        "diffusion_model_cfg": {
            **attention, "num_layers": 8, "attention_head_dim": 48, "norm_type": "ada_norm", "output_dim": 128,
            "interleave_self_attention": True,
        },
        "vl_self_attention_cfg": {**attention, "num_layers": 1, "attention_head_dim": 64},
    }  # fmt: skip
