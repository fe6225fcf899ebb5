"""What algorithms check of the records they are handed back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.objectives.policy_gradient import ActSteps
from minidiff_fast.shapes import check_shape, describe


def check_record(
    where: str,
    record: Mapping[str, Tensor],
    expected: Mapping[str, Sequence[int | str]],  # name -> shape after B
) -> None:
    """Raise :class:`InvalidArgument` unless ``record`` holds what this algorithm's ``act`` gave, with one B."""
    missing = sorted(set(expected) - set(record))
    if missing:
        raise InvalidArgument(
            f"{where}: record must hold {', '.join(sorted(expected))}, got {', '.join(sorted(record)) or 'nothing'}: "
            "old log-probabilities (or losses) of another policy class cannot be used here"
        )
    batch = len(record[next(iter(expected))])
    for name, shape in expected.items():
        letters = f"[B, {', '.join(map(str, shape))}]"
        check_shape(where, name, record[name], [batch, *shape], letters, partial(describe, **record))


def check_finite(
    where: str,
    actions: Tensor,  # [B, ...]
) -> None:
    """Raise :class:`InvalidArgument` where actions are not finite. They leave the device anyway, so this may wait."""
    finite = torch.isfinite(actions).flatten(1).all(1)
    if not bool(finite.all()):
        bad = int((~finite).nonzero()[0])
        raise InvalidArgument(f"{where}: the policy gave actions that are not finite, first for observation {bad}")


def executed_tokens(act_steps: ActSteps) -> slice:
    """The executed action tokens as places."""
    if act_steps is None:
        return slice(None)
    return slice(act_steps) if isinstance(act_steps, int) else slice(*act_steps)


def executed_mask(
    actions: Tensor,  # [B, T, A]
    act_steps: ActSteps,
) -> Tensor | None:  # [B, T] bool
    """True where an action token is executed; None where all are."""
    if act_steps is None:
        return None
    mask = torch.zeros(actions.shape[1], dtype=torch.bool, device=actions.device)
    mask[executed_tokens(act_steps)] = True
    return mask.expand(actions.shape[:2])
