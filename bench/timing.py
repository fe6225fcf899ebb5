"""Clocks, memory and ceilings.

Repeats are interleaved: every contestant runs once per round, in an order that rotates from round to
round, so that drift of the clocks and load from others hits all of them alike.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from cases import Pass, Work
from torch import Tensor

PASSES: tuple[Pass, ...] = ("forward", "train")
MIN_ROUNDS = 3


class Inputs(Protocol):
    """One set of inputs of a cell, of any suite."""

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The differentiable inputs by name."""
        ...

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor, for byte counts."""
        ...

    @property
    def grad_out(self) -> Tensor:
        """The gradient of the output."""
        ...


Run = Callable[[Any], Tensor]
"""One set of inputs, of the suite at hand -> the output."""


class Clock:
    """Times one call in milliseconds: CUDA events after an L2 flush, or ``perf_counter``."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush: Tensor | None = None
        if device.type == "cuda":
            l2 = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
            self._flush = torch.empty(max(4 * l2, 256 << 20), dtype=torch.uint8, device=device)

    def __call__(self, function: Callable[[], object]) -> float:
        """Milliseconds of one call."""
        if self._flush is None:
            start = time.perf_counter()
            function()
            return 1e3 * (time.perf_counter() - start)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def one_pass(run: Run, inputs: Inputs, which: Pass) -> None:
    """``forward``: without a graph, as in sampling. ``train``: forward and the gradients of every input."""
    if which == "forward":
        with torch.no_grad():
            run(inputs)
        return
    out = run(inputs)
    torch.autograd.grad(out, list(inputs.leaves.values()), inputs.grad_out)


def interleaved(
    runs: dict[str, Run],
    inputs: Sequence[Inputs],
    clock: Clock,
    *,
    repeats: int,
    warmup: int,
    seconds: float,
) -> tuple[dict[str, dict[Pass, list[float]]], dict[str, str]]:
    """Milliseconds per contestant, pass and round; and the error of each contestant that dropped out.

    Stops early, but never before three rounds, once ``seconds`` have gone by.
    """
    times: dict[str, dict[Pass, list[float]]] = {name: {which: [] for which in PASSES} for name in runs}
    errors: dict[str, str] = {}
    names = list(runs)
    started = time.perf_counter()
    for round_ in range(-warmup, repeats):
        if round_ >= MIN_ROUNDS and time.perf_counter() - started > seconds:
            break
        shift = round_ % len(names) if names else 0
        for name in names[shift:] + names[:shift]:
            if name in errors:
                continue
            run, sample = runs[name], inputs[round_ % len(inputs)]
            try:
                for which in PASSES:
                    elapsed = clock(lambda r=run, s=sample, w=which: one_pass(r, s, w))  # type: ignore[misc]
                    if round_ >= 0:
                        times[name][which].append(elapsed)
            except Exception as error:
                errors[name] = first_line(error)
    return {name: t for name, t in times.items() if name not in errors}, errors


def first_line(error: BaseException) -> str:
    """``Type: message`` on one line, for a table."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"


@dataclass(frozen=True)
class Memory:
    """Bytes of one forward + backward."""

    saved: int
    """What autograd keeps between forward and backward, inputs excluded; storages counted once."""
    saved_inputs: int
    """The inputs among what autograd keeps."""
    peak: int | None
    """CUDA: ``max_memory_allocated`` minus what was allocated before (the inputs); includes the gradients."""


def memory_of(run: Run, inputs: Inputs) -> Memory:
    """Saved bytes from ``saved_tensors_hooks`` in one run; the CUDA peak from another, without hooks."""
    own = {t.untyped_storage().data_ptr() for t in inputs.tensors}
    storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run(inputs)
    sizes = {address: storage.nbytes() for address, storage in storages.items()}
    saved = sum(size for address, size in sizes.items() if address not in own)
    saved_inputs = sum(size for address, size in sizes.items() if address in own)
    del out
    storages.clear()
    peak = None
    if inputs.grad_out.is_cuda:
        device = inputs.grad_out.device
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        one_pass(run, inputs, "train")
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    return Memory(saved, saved_inputs, peak)


# -------------------------------------------------------------------------------------------------- ceilings


@dataclass(frozen=True)
class Ceilings:
    """What this device reached in this run."""

    flops_per_second: float
    """Square matrix product on random data, in the dtype (and TF32 setting) of the cell."""
    bytes_per_second: float
    """Copy, counting bytes read and written."""
    exponentials_per_second: float | None
    """NVIDIA: 16 per SM and clock at the highest SM clock (arithmetic, not a measurement). Else unknown."""

    def best(self, before: Ceilings | None) -> Ceilings:
        """The higher of two measurements: others' load can only lower one."""
        if before is None:
            return self
        return replace(
            self,
            flops_per_second=max(self.flops_per_second, before.flops_per_second),
            bytes_per_second=max(self.bytes_per_second, before.bytes_per_second),
        )

    def floor_ms(self, work: Work) -> float:
        """The time below which no implementation can get on these ceilings."""
        seconds = [work.flops / self.flops_per_second, work.bytes / self.bytes_per_second]
        if self.exponentials_per_second is not None:
            seconds.append(work.exponentials / self.exponentials_per_second)
        return 1e3 * max(seconds)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Best of a few runs each; well under a second."""
    clock = Clock(device)
    cuda = device.type == "cuda"
    if cuda:
        flops = _matrix_rate(clock, dtype, 8192 if dtype != torch.float32 else 4096)
    else:
        # Without instructions for it, a CPU's half-precision product is slower than its float32 one.
        flops = _matrix_rate(clock, torch.float32, 1024)
        if dtype != torch.float32:
            flops = max(flops, _matrix_rate(clock, dtype, 256))
    source = torch.randn((1 << 28) if cuda else (1 << 24), device=device)
    target = torch.empty_like(source)
    copy = min(clock(lambda: target.copy_(source)) for _ in range(4))
    return Ceilings(
        flops_per_second=flops,
        bytes_per_second=2.0 * source.numel() * source.element_size() / (copy * 1e-3),
        exponentials_per_second=_exponential_rate(device) if cuda and torch.version.hip is None else None,
    )


def _matrix_rate(clock: Clock, dtype: torch.dtype, n: int) -> float:
    """FLOP/s of an n-cubed product on random data."""
    a, b = (torch.randn(n, n, device=clock.device).to(dtype) for _ in range(2))
    return 2.0 * n**3 / (1e-3 * min(clock(lambda: a @ b) for _ in range(4)))


def _exponential_rate(device: torch.device) -> float | None:
    properties = torch.cuda.get_device_properties(device)
    kilohertz = float(getattr(properties, "clock_rate", 0) or 0)
    if not kilohertz:
        command = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
            kilohertz = 1e3 * float(answer.splitlines()[0])
        except (OSError, subprocess.SubprocessError, ValueError, IndexError):
            return None  # the floor then goes without this term, and the JSON says null
    return 16.0 * properties.multi_processor_count * kilohertz * 1e3


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """TF32 products on or off inside the block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
