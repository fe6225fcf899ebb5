"""Training objectives on Level-2 batches, one self-contained file each."""

from minidiff_fast.objectives.imitation import BetaTimes, DenoisingLoss, DiffusionProcess, FlowMatching, il_loss

__all__ = ["BetaTimes", "DenoisingLoss", "DiffusionProcess", "FlowMatching", "il_loss"]
