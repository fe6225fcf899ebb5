"""Denoisers and observation encoders: the trainable parts of a policy.

``TransformerForDiffusion`` is a drop-in for diffusion_policy's module of that name, ``DiffusionMLP`` the cheap one for
low-dimensional observations; ``LowDimEncoder`` and ``ImageEncoder`` make the condition tokens of both.
"""

from __future__ import annotations

from minidiff_fast.models.diffusion_mlp import ConditionFeatures, DiffusionMLP
from minidiff_fast.models.observation_encoders import ImageEncoder, LowDimEncoder, SpatialSoftmax
from minidiff_fast.models.transformer_for_diffusion import TransformerForDiffusion, timestep_embedding

__all__ = [
    "ConditionFeatures",
    "DiffusionMLP",
    "ImageEncoder",
    "LowDimEncoder",
    "SpatialSoftmax",
    "TransformerForDiffusion",
    "timestep_embedding",
]
