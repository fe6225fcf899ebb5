"""multi_task_dit's transformer at its default size (6 layers, 512 channels, 16 actions), behind its encoder.

A random vector stands for the output of CLIP and of the state, 2 steps of 768 + 14 + 512 numbers. ``repeat`` is the
peer's objective on K copies of vector and actions; running CLIP for every copy, as a repeated batch does, is not timed.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from integrations import Contest
from lerobot_heads import copied, drawn_by, given, ours, policies, side
from torch import Tensor, nn

from minidiff_fast.integrations.lerobot.multi_task_dit import Level2MultiTaskDiT

B = 2
ACTIONS, ACTION, CONDITION = 16, 14, 2 * (768 + 14 + 512)


class Encoded(nn.Module):
    """Stands for the observation encoder: its output is in the batch."""

    def encode(self, batch: dict[str, Tensor]) -> Tensor:
        """The vector."""
        return batch["condition"]


class Policy(nn.Module):
    """The policy without its cameras."""

    def __init__(self, network: nn.Module, objective: nn.Module) -> None:
        super().__init__()
        self.observation_encoder, self.noise_predictor, self.objective = Encoded(), network, objective

    def _prepare_batch(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return batch


def build(k: int, device: torch.device) -> Contest:
    """The contest at K samples per condition."""
    torch.manual_seed(0)
    with policies() as load:
        module = load("policies.multi_task_dit.modeling_multi_task_dit")
        config: Any = load("policies.multi_task_dit.configuration_multi_task_dit").MultiTaskDiTConfig(
            device=str(device), horizon=ACTIONS, n_action_steps=8, dropout=0.0
        )
    sizes = SimpleNamespace(**{**vars(config), "action_feature": SimpleNamespace(shape=(ACTION,))})
    network = module.DiffusionTransformer(sizes, conditioning_dim=CONDITION)
    for block in network.transformer_blocks:  # they start as zeros, through which nothing passes
        nn.init.normal_(block.adaLN_modulation[1].weight, std=0.02)
    policy = Policy(network, module.DiffusionObjective(sizes, ACTION, ACTIONS)).to(device)
    values = {
        "condition": torch.randn(B, CONDITION, device=device),
        "action": torch.randn(B, ACTIONS, ACTION, device=device),
    }
    held, ours_values, ours_inputs = copied(policy, values, "condition")
    adapter = Level2MultiTaskDiT(held)
    drawn = drawn_by(adapter, ours_values, k)
    peer, peer_values, peer_inputs = copied(policy, values, "condition")
    noise, times = drawn.noise.flatten(0, 1), drawn.timesteps.flatten()

    def repeat() -> Tensor:
        rows = {name: x.repeat_interleave(k, 0) for name, x in peer_values.items()}
        with given(randn_like=noise, randint=times):
            loss: Tensor = peer.objective.compute_loss(peer.noise_predictor, rows, rows["condition"])
        return loss

    return {"repeat": side(peer, repeat, peer_inputs), "ours": ours(adapter, drawn, ours_inputs)}
