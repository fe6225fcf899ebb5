"""What a diffusion policy is to this library: encode a condition once, denoise many samples of it."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.nn.normalizer import MinMaxNormalizer


class Policy(Protocol):
    """The two calls that every objective and sampler makes.

    ``cache`` is whatever ``encode`` returns: a :class:`~minidiff_fast.nn.ConditionCache`, a tensor with leading
    dimension B, or a (named) tuple, list or dict of these. It is computed once per condition and read by every
    sample of it.
    """

    def encode(self, obs: Any) -> Any:
        """Observations, each ``[B, ...]`` -> cache."""

    def denoise(
        self,
        cache: Any,
        x: Tensor,  # [B, K, T, A]
        t: Tensor,  # [B, K]
    ) -> Tensor:  # [B, K, T, A]
        """Predict what the objective asks for (noise, sample, velocity) at noised actions ``x`` and times ``t``."""


class DiffusionPolicy(nn.Module):
    """Observation normalisers, an observation encoder, a denoiser and the action normaliser, in one state dict.

    ``forward`` is :meth:`denoise`, so that a wrapper around ``forward`` (DistributedDataParallel) sees the call
    in which every parameter takes part; :meth:`encode` is called on the bare module.

    Args:
        encoder: normalised observations ``{name: [B, To, ...]}`` -> features ``[B, To, Dc]``.
        denoiser: has ``encode(features) -> cache`` and ``denoise(cache, x, t)``, e.g.
            :class:`minidiff_fast.models.TransformerForDiffusion`.
        obs_normalizers: one per observation to be normalised; the others (images) go to the encoder as they are.
        action_normalizer: maps actions in their units to [-1, 1].
    """

    def __init__(
        self,
        encoder: nn.Module,
        denoiser: nn.Module,
        obs_normalizers: dict[str, MinMaxNormalizer],
        action_normalizer: MinMaxNormalizer,
    ) -> None:
        dotted = sorted(name for name in obs_normalizers if "." in name)
        if dotted:
            raise InvalidArgument(f"DiffusionPolicy: obs_normalizers must have names without a dot, got {dotted}")
        super().__init__()
        self.encoder = encoder
        self.denoiser: Any = denoiser
        self.obs_normalizers = nn.ModuleDict(obs_normalizers)
        self.action_normalizer = action_normalizer

    def encode(self, obs: dict[str, Tensor]) -> Any:
        """Raw observations ``{name: [B, To, ...]}`` in their units -> the denoiser's cache, leading dimension B."""
        return self.condition(self.features(obs))

    def features(
        self,
        obs: dict[str, Tensor],  # name -> [B, To, ...]
    ) -> Tensor:  # [B, To, Dc]
        """Raw observations in their units -> the encoder's features, which a critic may share with the denoiser.

        They are normalised in float32 at least, and go to the encoder in the dtype of the parameters.
        """
        missing = sorted(set(self.obs_normalizers) - set(obs))
        if missing:
            raise InvalidArgument(
                f"DiffusionPolicy.encode: obs must hold {sorted(self.obs_normalizers)}, "
                f"{missing} missing in {sorted(obs)}"
            )
        dtype = next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.float32)
        normalised = {
            name: self.obs_normalizers[name](value).to(dtype) if name in self.obs_normalizers else value
            for name, value in obs.items()
        }
        features: Tensor = self.encoder(normalised)
        return features

    def condition(
        self,
        features: Tensor,  # [B, To, Dc]
    ) -> Any:
        """The encoder's features -> what the denoiser keeps of them, leading dimension B."""
        return self.denoiser.encode(features)

    def denoise(
        self,
        cache: Any,
        x: Tensor,  # [B, K, T, A], normalised
        t: Tensor,  # [B, K]
    ) -> Tensor:  # [B, K, T, A]
        """The denoiser's prediction."""
        prediction: Tensor = self.denoiser.denoise(cache, x, t)
        return prediction

    def forward(
        self,
        cache: Any,
        x: Tensor,  # [B, K, T, A], normalised
        t: Tensor,  # [B, K]
    ) -> Tensor:  # [B, K, T, A]
        """:meth:`denoise`."""
        return self.denoise(cache, x, t)

    def normalize_actions(
        self,
        actions: Tensor,  # [..., A], in the task's units
    ) -> Tensor:
        """Actions in the task's units -> [-1, 1]."""
        normalised: Tensor = self.action_normalizer(actions)
        return normalised

    def denormalize_actions(
        self,
        actions: Tensor,  # [..., A], normalised
    ) -> Tensor:
        """The inverse of :meth:`normalize_actions`."""
        return self.action_normalizer.inverse(actions)
