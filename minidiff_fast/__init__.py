"""minidiff_fast: two-level minibatching for diffusion policies.

A policy's condition (images, point clouds, language) is expensive to encode and its action samples are
cheap to denoise. Encode each of B conditions once and train K noised samples on it: every tensor is
either *per condition* ``[B, ...]`` or *per sample* ``[B, K, ...]``, and nothing that belongs to a
condition is ever copied K times. The letters are explained once, in :mod:`minidiff_fast.shapes`.

======================  ==============================================================================
``ops``                 the operations, each with its definition in plain PyTorch beside its kernels
``nn``, ``models``      modules and denoisers over them
``objectives``          what is learnt: denoising, flow matching, policy gradients
``level2``              one training step: encode once, denoise K, one backward through the encoder
``sampling``            actions from a policy, over a condition encoded once; whole chains with log-probabilities
``transitions``         the denoising steps of samplers as Gaussians
``finetuning``          reinforcement learning: environments, buffer, update, loop
``policy``              the two calls that tie these together: ``encode`` and ``denoise``
======================  ==============================================================================

Importing this module imports nothing else; each part loads when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from minidiff_fast._version import __version__

if TYPE_CHECKING:
    from types import ModuleType

    from minidiff_fast import finetuning, level2, models, nn, objectives, ops, policy, sampling, transitions

__all__ = [
    "__version__",
    "finetuning",
    "level2",
    "models",
    "nn",
    "objectives",
    "ops",
    "policy",
    "sampling",
    "transitions",
]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
