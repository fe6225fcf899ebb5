"""Make Push-T known to ``gymnasium.make``. Importing this module imports nothing heavy."""

from __future__ import annotations

from minidiff_fast.errors import require

ENV_ID = "minidiff_fast/PushT-v0"
"""``gymnasium.make(ENV_ID, obs="keypoints", variant="near-goal")``, once ``register()`` ran."""


def register() -> str:
    """Register :class:`~minidiff_fast.tasks.pusht.task.PushTTask`; a second call changes nothing.

    The task truncates by itself, at the ``max_steps`` of its variant: gymnasium adds no time limit.

    Returns:
        The id, ``minidiff_fast/PushT-v0``.

    Raises:
        MissingDependency: gymnasium is not installed.
    """
    gymnasium = require("gymnasium", extra="pusht")
    if ENV_ID not in gymnasium.registry:
        gymnasium.register(id=ENV_ID, entry_point="minidiff_fast.tasks.pusht.task:PushTTask")
    return ENV_ID
