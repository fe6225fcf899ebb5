"""vla_jepa's action head (DiT-B with 2 of its 16 layers): the peer's ``repeat(K, 1, 1)`` against Level-2.

32 conditioning tokens of 2048 channels stand for the output of the vision-language model, which both run once: the
peer repeats its output (``repeated_diffusion_steps``), not the model.
"""

from __future__ import annotations

import torch
from integrations import Contest
from lerobot_heads import copied, drawn_by, given, ours, policies, side
from torch import Tensor

from minidiff_fast.integrations.lerobot.vla_jepa import Level2ActionHead

B = 2
ACTIONS, TOKENS, CHANNELS = 7, 32, 2048


def build(k: int, device: torch.device) -> Contest:
    """The contest at K samples per condition."""
    torch.manual_seed(0)
    with policies() as load:
        config = load("policies.vla_jepa.configuration_vla_jepa").VLAJEPAConfig(
            device=str(device), action_num_layers=2, action_dropout=0.0
        )
        head = load("policies.vla_jepa.action_head").VLAJEPAActionHead(config, cross_attention_dim=CHANNELS).to(device)
    values = {
        "conditioning_tokens": torch.randn(B, TOKENS, CHANNELS, device=device),
        "actions": torch.randn(B, ACTIONS, config.action_dim, device=device),
        "state": torch.randn(B, 1, config.state_dim, device=device),
    }
    converted, ours_values, ours_inputs = copied(head, values, "conditioning_tokens")
    adapter = Level2ActionHead(converted)
    drawn = drawn_by(adapter, ours_values, k)
    peer, peer_values, peer_inputs = copied(head, values, "conditioning_tokens")
    noise = drawn.noise.transpose(0, 1).flatten(0, 1)
    sample = config.action_noise_s * (1 - drawn.timesteps.T.flatten())

    def repeat() -> Tensor:
        with given(randn_like=noise, sample=sample):
            loss: Tensor = peer(*(x.repeat(k, 1, 1) for x in peer_values.values()))
        return loss

    return {"repeat": side(peer, repeat, peer_inputs), "ours": ours(adapter, drawn, ours_inputs)}
