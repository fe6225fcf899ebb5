"""Bytes of a step: what autograd keeps, and the most that is allocated."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def saved_bytes(
    loss: Callable[[], Tensor],
    own: Iterable[Tensor],
) -> int:
    """What autograd keeps between forward and backward, ``own`` (weights, inputs) excluded; storages counted once."""
    excluded = {tensor.untyped_storage().data_ptr() for tensor in own}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = loss()
    size = sum(storage.nbytes() for address, storage in kept.items() if address not in excluded)
    del result
    return size


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most that ``run`` adds to what was allocated before it: CUDA's counter, or on a CPU the running sum of the
    profiler's allocations."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    results = profile.profiler.kineto_results  # type: ignore[union-attr]
    held = most = 0
    for event in sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
