"""State-value functions: on the policy's own features, or with an encoder of their own."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.nn.normalizer import MinMaxNormalizer


class ValueHead(nn.Module):
    """MLP of a flattened condition to one number: Linear, (Mish, Linear) x layers.

    Args:
        input_dim: To * Dc.
        hidden_dim: width.
        layers: hidden layers.
    """

    def __init__(self, input_dim: int, hidden_dim: int = 256, layers: int = 3) -> None:
        super().__init__()
        if min(input_dim, hidden_dim, layers) < 1:
            raise InvalidArgument(
                f"ValueHead: input_dim, hidden_dim and layers must be at least 1, got {input_dim}, {hidden_dim} and "
                f"{layers}"
            )
        widths = [input_dim, *[hidden_dim] * layers]
        blocks: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            blocks += [nn.Linear(before, after), nn.LayerNorm(after), nn.Mish()]
        self.net = nn.Sequential(*blocks, nn.Linear(hidden_dim, 1))

    def forward(
        self,
        features: Tensor,  # [B, To, Dc]
    ) -> Tensor:  # [B]
        value: Tensor = self.net(features.flatten(1)).squeeze(-1)
        return value


class SharedCritic(nn.Module):
    """V on the features that the policy's encoder made: no encoder pass of its own.

    Args:
        head: features ``[B, To, Dc]`` -> ``[B]``.
        train_encoder: let the value loss reach the encoder; else the features are detached.
    """

    own_encoder = False

    def __init__(self, head: nn.Module, *, train_encoder: bool = False) -> None:
        super().__init__()
        self.head, self.train_encoder = head, train_encoder

    def forward(
        self,
        obs: Any,
        features: Tensor,  # [B, To, Dc]
    ) -> Tensor:  # [B]
        """Reads the features alone."""
        value: Tensor = self.head(features if self.train_encoder else features.detach())
        return value


class OwnCritic(nn.Module):
    """V with normalisers and an encoder of its own; one more encoder pass a decision.

    Args:
        encoder: normalised observations ``{name: [B, To, ...]}`` -> features ``[B, To, Dc]``.
        head: features -> ``[B]``.
        obs_normalizers: the policy's, shared and never changed.
    """

    own_encoder = True

    def __init__(self, encoder: nn.Module, head: nn.Module, obs_normalizers: Mapping[str, MinMaxNormalizer]) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head
        self.obs_normalizers = nn.ModuleDict(dict(obs_normalizers))

    def forward(
        self,
        obs: Mapping[str, Tensor],  # name -> [B, To, ...]
        features: Any = None,
    ) -> Tensor:  # [B]
        """Reads the observations alone."""
        dtype = next(p.dtype for p in self.head.parameters())
        normalised = {
            name: self.obs_normalizers[name](value).to(dtype) if name in self.obs_normalizers else value
            for name, value in obs.items()
        }
        value: Tensor = self.head(self.encoder(normalised))
        return value


def feature_width(policy: Any, obs: Any) -> int:
    """To * Dc of the policy's features, from one pass over ``obs`` (a single row is enough)."""
    with torch.no_grad():
        return int(policy.features(obs).flatten(1).shape[1])
