"""Training objectives on Level-2 batches, one self-contained file each."""

from minidiff_fast.objectives.dppo import DPPO, DPPOConfig, dppo_loss
from minidiff_fast.objectives.imitation import BetaTimes, DenoisingLoss, DiffusionProcess, FlowMatching
from minidiff_fast.objectives.policy_gradient import (
    ObjectiveLoss,
    chain_logprob,
    clamp_advantage,
    gae,
    normalize_advantage,
    ppo_loss,
    value_loss,
)

__all__ = [
    "DPPO",
    "BetaTimes",
    "DPPOConfig",
    "DenoisingLoss",
    "DiffusionProcess",
    "FlowMatching",
    "ObjectiveLoss",
    "chain_logprob",
    "clamp_advantage",
    "dppo_loss",
    "gae",
    "normalize_advantage",
    "ppo_loss",
    "value_loss",
]
