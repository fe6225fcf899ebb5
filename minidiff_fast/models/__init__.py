"""Denoisers and observation encoders: the trainable parts of a policy.

``ConditionalUnet1D`` and ``TransformerForDiffusion`` are drop-ins for diffusion_policy's modules of these names,
``DiffusionMLP`` is the cheap one for low-dimensional observations; ``LowDimEncoder`` and ``ImageEncoder`` make the
condition tokens.
"""

from __future__ import annotations

from minidiff_fast.models.conditional_unet1d import ConditionalUnet1D, ConditionModulation
from minidiff_fast.models.diffusion_mlp import ConditionFeatures, DiffusionMLP
from minidiff_fast.models.observation_encoders import ImageEncoder, LowDimEncoder, SpatialSoftmax
from minidiff_fast.models.transformer_for_diffusion import TransformerForDiffusion, timestep_embedding

__all__ = [
    "ConditionFeatures",
    "ConditionModulation",
    "ConditionalUnet1D",
    "DiffusionMLP",
    "ImageEncoder",
    "LowDimEncoder",
    "SpatialSoftmax",
    "TransformerForDiffusion",
    "timestep_embedding",
]
