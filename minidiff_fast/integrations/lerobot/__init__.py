"""lerobot's policies on Level-2 batches: ``level2(policy)`` gives the adapter that belongs to a policy."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.integrations.adapter import Level2Adapter

__all__ = ["ADAPTERS", "level2"]

ADAPTERS = {
    "DiffusionPolicy": ("diffusion", "Level2Diffusion"),
    "MultiTaskDiTPolicy": ("multi_task_dit", "Level2MultiTaskDiT"),
    "VLAJEPAPolicy": ("vla_jepa", "Level2VLAJEPA"),
    "GrootPolicy": ("groot", "Level2GR00T"),
    "SmolVLAPolicy": ("smolvla", "Level2SmolVLA"),
    "PI0Policy": ("pi0", "Level2PI0"),
}
"""lerobot's class -> the module in this package and the adapter in it, imported when it is asked for."""


def level2(policy: nn.Module, **options: Any) -> Level2Adapter:
    """The adapter of a lerobot policy, which takes the policy's own batch dict.

    ``options`` go to the adapter's constructor, which says what they are. A subclass of a policy below has the adapter
    of that policy: it must not change how the policy encodes, denoises or computes its loss.

    Raises:
        InvalidArgument: no adapter is known for the policy's class, or the adapter refuses the policy.

    Example::

        adapter = level2(policy)                # policy: lerobot's DiffusionPolicy, SmolVLAPolicy, ...
        loss = adapter.loss(batch, k=8)         # in place of policy.forward(batch)
        loss.backward()
    """
    for kind in type(policy).__mro__:
        if kind.__name__ in ADAPTERS:
            module, name = ADAPTERS[kind.__name__]
            adapter = getattr(importlib.import_module(f"{__name__}.{module}"), name)
            built: Level2Adapter = adapter(policy, **options)
            return built
    raise InvalidArgument(
        f"level2: policy must be one of lerobot's {', '.join(ADAPTERS)}, got {type(policy).__module__}."
        f"{type(policy).__name__}"
    )
