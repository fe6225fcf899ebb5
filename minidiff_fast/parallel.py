"""Policies inside DistributedDataParallel, FSDP2 and torch.compile: what to call, and when gradients are exchanged.

A policy has two calls, ``encode`` and ``denoise``, and a step runs several backward passes. Wrappers know one call,
``forward``, and exchange gradients in every backward pass; this module tells them otherwise.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from minidiff_fast.errors import InvalidArgument

METHODS = ("encode", "denoise", "project_condition", "actions", "mask")
"""What is called on a module beside its forward, and reads its parameters."""


class Unwrapped(NamedTuple):
    """A policy without its wrappers, and how they are to be used."""

    policy: Any
    """The object with ``encode`` and ``denoise``."""
    without_sync: Callable[[], AbstractContextManager[Any]]
    """Backward passes in this context leave gradients on their rank."""
    units: list[Any]
    """The modules that FSDP2 has sharded."""


def unwrap(policy: Any, caller: str) -> Unwrapped:
    """The object that has ``encode``, inside torch.compile and DistributedDataParallel; FSDP2 modules are prepared.

    Raises:
        InvalidArgument: FSDP1, or FSDP2 units that cannot work, see :func:`prepare_fsdp`.
    """
    without_sync: Callable[[], AbstractContextManager[Any]] = nullcontext
    while True:
        if isinstance(policy, DistributedDataParallel):
            without_sync, policy = policy.no_sync, policy.module
        elif hasattr(policy, "_orig_mod"):
            policy = policy._orig_mod
        else:
            break
    wrapped, units = _sharded(policy)
    if wrapped:
        raise InvalidArgument(
            f"{caller}: policy must not be wrapped in FullyShardedDataParallel (FSDP1), whose parameters encode() "
            "cannot reach: use FSDP2, torch.distributed.fsdp.fully_shard(policy), or DistributedDataParallel"
        )
    if units:
        prepare_fsdp(policy)
        without_sync = _Units(list(units.values())).without_sync
    return Unwrapped(policy, without_sync, list(units.values()))


def _sharded(policy: Any) -> tuple[list[Any], dict[str, Any]]:
    """The modules of FSDP1 in ``policy``, and those of FSDP2 by name. Both need a process group, and
    torch.distributed.fsdp, which is slow to import: without them there is nothing to look for."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not isinstance(policy, nn.Module) or not torch.distributed.is_initialized():
        return [], {}
    modules = dict(policy.named_modules())
    first = [module for module in modules.values() if isinstance(module, fsdp.FullyShardedDataParallel)]
    return first, {name: module for name, module in modules.items() if isinstance(module, fsdp.FSDPModule)}


def prepare_fsdp(policy: nn.Module) -> nn.Module:
    """Make ``encode`` and ``denoise`` of a policy under FSDP2 gather their parameters as ``forward`` does; in place.

    ``fully_shard`` makes parameters whole around ``forward`` only. This registers ``encode``, ``denoise`` and
    ``project_condition`` of every sharded module in ``policy``, too. :func:`~minidiff_fast.level2.level2_step` calls
    it; call it yourself before sampling from a policy that was sharded and not trained. Calling it again changes
    nothing.

    Raises:
        InvalidArgument: ``policy`` holds nothing that ``fully_shard`` has sharded; or a part of a denoiser that reads
            its parts' parameters itself is a unit of its own: shard that denoiser as a whole.
    """
    units = _sharded(policy)[1]
    if not units:
        raise InvalidArgument("prepare_fsdp: policy must hold modules that fully_shard has sharded, got none")
    for name, whole in policy.named_modules():
        if not getattr(whole, "reads_parts", False):
            continue
        part = next((inner for inner in _sharded(whole)[1] if inner), None)
        if part is not None:
            raise InvalidArgument(
                f"prepare_fsdp: {type(whole).__name__} reads the parameters of its parts itself, so that none of them "
                f"may be sharded alone, got {name + '.' if name else ''}{part}: call fully_shard on the "
                f"{type(whole).__name__} as a whole"
            )
    from torch.distributed.fsdp import register_fsdp_forward_method

    for module in units.values():
        registered: set[str] = vars(module).setdefault("_gathered_methods", set())
        for method in METHODS:
            if method not in registered and callable(getattr(module, method, None)):
                register_fsdp_forward_method(module, method)
                registered.add(method)
    return policy


class _Units:
    """The FSDP2 modules of a policy."""

    def __init__(self, units: list[Any]) -> None:
        self._units = units

    @contextmanager
    def without_sync(self) -> Iterator[None]:
        """Backward passes accumulate whole gradients; afterwards gradients are exchanged as they were before."""
        states = [unit._get_fsdp_state() for unit in self._units]
        groups = [group for state in states for group in _groups(state)]
        before = [(group.reduce_grads, group.all_reduce_grads) for group in groups]
        last = [state._state_ctx.is_last_backward for state in states]
        for unit in self._units:
            unit.set_requires_gradient_sync(False, recurse=False)
            unit.set_is_last_backward(False)
        try:
            yield
        finally:
            for group, (reduce, all_reduce) in zip(groups, before, strict=True):
                group.reduce_grads, group.all_reduce_grads = reduce, all_reduce
            for unit, was_last in zip(self._units, last, strict=True):
                unit.set_is_last_backward(was_last)


def _groups(state: Any) -> list[Any]:
    """The parameter groups of a sharded module, whose switches torch sets and does not show."""
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def check_times(units: list[Any], timesteps: torch.Tensor, caller: str) -> None:
    """Raise where FSDP2, with these sharded modules, would round continuous times [B, K] to 16 bits on their way."""
    if not timesteps.is_floating_point():
        return
    for module in units:
        if callable(getattr(module, "denoise", None)):
            mixed = module._get_fsdp_state()._mp_policy
            if mixed.cast_forward_inputs and mixed.param_dtype in (torch.bfloat16, torch.float16):
                raise InvalidArgument(
                    f"{caller}: the MixedPrecisionPolicy of FSDP would round the times of the samples to "
                    f"{mixed.param_dtype}; make it with cast_forward_inputs=False and run the step under torch.autocast"
                )
