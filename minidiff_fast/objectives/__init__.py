"""Training objectives on Level-2 batches, one self-contained file each."""

from minidiff_fast.objectives.dppo import DPPO, DPPOConfig, dppo_loss
from minidiff_fast.objectives.fpo import FPO, FPOConfig, fpo_loss
from minidiff_fast.objectives.imitation import BetaTimes, DenoisingLoss, DiffusionProcess, FlowMatching, il_loss
from minidiff_fast.objectives.policy_gradient import (
    ObjectiveLoss,
    chain_logprob,
    clamp_advantage,
    gae,
    normalize_advantage,
    ppo_loss,
    value_loss,
)
from minidiff_fast.objectives.reinflow import ReinFlow, ReinFlowConfig
from minidiff_fast.objectives.weighted import AWR, AWRConfig, weighted_loss

__all__ = [
    "AWR",
    "DPPO",
    "FPO",
    "AWRConfig",
    "BetaTimes",
    "DPPOConfig",
    "DenoisingLoss",
    "DiffusionProcess",
    "FPOConfig",
    "FlowMatching",
    "ObjectiveLoss",
    "ReinFlow",
    "ReinFlowConfig",
    "chain_logprob",
    "clamp_advantage",
    "dppo_loss",
    "fpo_loss",
    "gae",
    "il_loss",
    "normalize_advantage",
    "ppo_loss",
    "value_loss",
    "weighted_loss",
]
