"""What every suite shares: settings, one cell's measurement, ours by name, the printed rows."""

from __future__ import annotations

import abc
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from cases import Pass, Work
from timing import PASSES, Ceilings, Clock, Inputs, Run, first_line, interleaved, measure_ceilings, memory_of, tf32
from verify import Truth, refusal, verify

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "tf32": torch.float32}
"""``tf32`` is float32 storage with TF32 products allowed, in every contestant."""
EPS = {"bf16": 2.0**-7, "fp32": 2.0**-23, "tf32": 2.0**-10}
"""Machine epsilon of the arithmetic, for the error budget; tf32 has 10 bits, whatever the storage."""
INPUT_SETS = 3
Reason = str | None


class Contestant(Protocol):
    """One row of a cell's table."""

    @property
    def name(self) -> str: ...
    @property
    def family(self) -> str:
        """What ``--peers`` may name to select it together with its siblings."""
        ...

    @property
    def what(self) -> str:
        """One line for the JSON."""
        ...

    @property
    def supports(self) -> Callable[[Any, torch.device, torch.dtype], Reason]:
        """None, or why it sits this cell out."""
        ...

    @property
    def prepare(self) -> Callable[[Any, Any], Run]:
        """Runs once per cell and outside the clock."""
        ...

    @property
    def implementation(self) -> Callable[[torch.device, torch.dtype], str]:
        """What the name resolves to on this device, for the table."""
        ...

    @property
    def ours(self) -> bool: ...


@dataclass(frozen=True)
class Settings:
    """How a cell is measured."""

    device: torch.device
    peers: tuple[str, ...]
    repeats: int
    warmup: int
    seconds: float
    """Soft limit of one cell's timed rounds; three rounds are always run."""


# ------------------------------------------------------------------------------------------------------ ours


def resolved_implementation(op: str, impl: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """The implementation that ``impl`` runs as; raises what the library raises when it cannot run."""
    import minidiff_fast.ops  # noqa: F401  (registers the op)
    from minidiff_fast.backend import REGISTRY, resolve

    return resolve(REGISTRY[op], impl, device, dtype)


def why_not_ours(op: str, impl: str | None, device: torch.device, dtype: torch.dtype) -> Reason:
    """Why ``impl`` gets no number: it cannot run here, or a time of it would mean nothing."""
    from minidiff_fast.backend import triton_interpreted
    from minidiff_fast.errors import MinidiffFastError

    if triton_interpreted() and impl == "triton":
        return "TRITON_INTERPRET is set: the interpreter's time is meaningless"
    try:
        resolved = resolved_implementation(op, impl, device, dtype)
    except MinidiffFastError as error:
        return str(error)
    if triton_interpreted() and resolved == "triton":
        return "resolves to triton, and TRITON_INTERPRET is set: the interpreter's time is meaningless"
    return None


def select_peers(names: Sequence[str] | None, everyone: Sequence[Contestant]) -> tuple[list[str], list[str]]:
    """Contestants by name or family, and the names that mean nothing here. None: everyone.

    ``ours`` is the automatic choice alone; ``fold`` on a GPU is every backend of it.
    """
    if names is None:
        return [peer.name for peer in everyone], []
    chosen: list[str] = []
    unknown: list[str] = []
    for name in names:
        exact = [peer.name for peer in everyone if peer.name == name]
        found = exact or [peer.name for peer in everyone if peer.family == name]
        chosen += [peer for peer in found if peer not in chosen]
        if not found:
            unknown.append(name)
    return chosen, unknown


# ------------------------------------------------------------------------------------------------- one cell


class Bench(abc.ABC):
    """Measures cells on one device; a dtype's ceilings are the best so far in this run. A suite says what its cells
    are made of: ``op``, and the four abstract methods."""

    op: str

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.clock = Clock(settings.device)
        self.ceilings: dict[str, Ceilings] = {}

    @abc.abstractmethod
    def contestants(self) -> Sequence[Contestant]:
        """Everyone who may run on this device, ours first."""

    @abc.abstractmethod
    def inputs(self, cell: Any, dtype: torch.dtype) -> Sequence[Inputs]:
        """``INPUT_SETS`` sets, equal in structure."""

    @abc.abstractmethod
    def truth(self, inputs: Any, eps: float) -> Truth:
        """Float64 results and budgets."""

    @abc.abstractmethod
    def work(self, cell: Any, inputs: Any, which: Pass) -> Work:
        """The numerators of the floor."""

    def facts(self, inputs: Any) -> dict[str, Any]:
        """More of the inputs for the JSON."""
        return {}

    def run(self, cell: Any) -> dict[str, Any]:
        """Everything about one cell, ready for JSON."""
        started = time.perf_counter()
        with tf32(cell.dtype == "tf32"):
            measured = measure_ceilings(self.settings.device, DTYPES[cell.dtype])
            self.ceilings[cell.dtype] = measured.best(self.ceilings.get(cell.dtype))
            result = self._measure(cell)
        gc.collect()
        if self.settings.device.type == "cuda":
            torch.cuda.empty_cache()
        result["seconds"] = time.perf_counter() - started
        return result

    def _measure(self, cell: Any) -> dict[str, Any]:
        settings, case, dtype = self.settings, cell.case, DTYPES[cell.dtype]
        inputs = self.inputs(cell, dtype)
        truth = self.truth(inputs[0], EPS[cell.dtype])
        records: dict[str, dict[str, Any]] = {}
        runs: dict[str, Run] = {}
        for peer in self.contestants():
            if peer.name in settings.peers:
                record, run = self._admit(peer, case, dtype, inputs[0], truth)
                records[peer.name] = record
                if run is not None:
                    runs[peer.name] = run
        del truth
        times, errors = interleaved(
            runs, inputs, self.clock,
            repeats=settings.repeats, warmup=settings.warmup, seconds=settings.seconds,
        )  # fmt: skip
        for name, passes in times.items():
            records[name] |= {f"{which}_ms": passes[which] for which in PASSES}
        for name, error in errors.items():
            records[name] |= {"status": "error", "reason": error}
        works = {which: self.work(cell, inputs[0], which) for which in PASSES}
        ceilings = self.ceilings[cell.dtype]
        return {
            "case": asdict(case),
            "K": cell.K,
            "dtype": cell.dtype,
            **self.facts(inputs[0]),
            "input_bytes": sum(t.numel() * t.element_size() for t in inputs[0].tensors),
            "work": {which: asdict(w) for which, w in works.items()},
            "ceilings": asdict(ceilings),
            "floor_ms": {which: ceilings.floor_ms(w) for which, w in works.items()},
            "contestants": records,
        }

    def _admit(
        self, peer: Contestant, case: Any, dtype: torch.dtype, inputs: Inputs, truth: Truth
    ) -> tuple[dict[str, Any], Run | None]:
        """Verify one contestant and weigh its memory; no run comes back unless it may be timed."""
        device = self.settings.device
        record: dict[str, Any] = {"what": peer.what, "ours": peer.ours, "implementation": None}
        reason = peer.supports(case, device, dtype) or self._duplicate(peer, device, dtype)
        if reason is not None:
            return record | {"status": "unsupported", "reason": reason}, None
        record["implementation"] = peer.implementation(device, dtype)
        try:
            run = peer.prepare(case, inputs)
            checks = verify(run, inputs, truth)
            record["verify"] = {name: asdict(check) for name, check in checks.items()}
            refused = refusal(checks)
            if refused is not None:
                return record | {"status": "refused", "reason": refused}, None
            record["memory"] = asdict(memory_of(run, inputs))
        except Exception as error:  # a peer that cannot run is a row of the table, not the end of the run
            return record | {"status": "error", "reason": first_line(error)}, None
        return record | {"status": "ok", "reason": None}, run

    def _duplicate(self, peer: Contestant, device: torch.device, dtype: torch.dtype) -> Reason:
        """``ours-x`` is not timed beside an ``ours`` that is x."""
        if not peer.ours or peer.name == "ours" or "ours" not in self.settings.peers:
            return None
        automatic = resolved_implementation(self.op, None, device, dtype)
        return f"the same run as ours, which is {automatic}" if peer.name == f"ours-{automatic}" else None


def ours_failed(result: dict[str, Any]) -> list[str]:
    """The contestants of ours that ran and were refused or broke."""
    return [
        name
        for name, record in result["contestants"].items()
        if record["ours"] and record["status"] in ("refused", "error")
    ]


def context_lost(result: dict[str, Any]) -> str | None:
    """The message after which nothing more can run on this device in this process."""
    for name, record in result["contestants"].items():
        if record["status"] == "error" and "CUDA error" in (record["reason"] or ""):
            return f"{name}: {record['reason']}"
    return None


HEADER = (
    f"  {'contestant':<17}{'runs as':<15}{'fwd ms':>10}{'fwd+bwd ms':>12}{'min':>10}{'max':>10}"
    f"{'vs ours':>9}{'saved MB':>10}{'peak MB':>10}{'of floor':>10}"
)


def rendered(key: str, result: dict[str, Any], letters: Sequence[str]) -> str:
    """The printed rows of one cell; ``vs ours`` is the contestant's fwd+bwd median over that of ours."""
    case = result["case"]
    shape = " ".join(f"{letter}={case[letter]}" for letter in letters)
    lines = [f"{key}  [{shape}]" + (f"  ({case['note']})" if case["note"] else ""), HEADER]
    ours = result["contestants"].get("ours", {})
    base = statistics.median(ours["train_ms"]) if ours.get("train_ms") else None
    sitting_out: dict[str, list[str]] = {}
    for name, record in result["contestants"].items():
        implementation = record["implementation"] or "-"
        if record["status"] == "unsupported":
            sitting_out.setdefault(record["reason"], []).append(name)
            continue
        if record["status"] != "ok":
            lines.append(f"  {name:<17}{implementation:<15}{record['status']}: {record['reason']}")
            continue
        train, forward = record["train_ms"], record["forward_ms"]
        median = statistics.median(train)
        memory = record["memory"]
        ratio, saved = f"{median / base:.2f}" if base else "-", f"{memory['saved'] / 1e6:.2f}"
        peak = "-" if memory["peak"] is None else f"{memory['peak'] / 1e6:.1f}"
        floor = f"{100 * result['floor_ms']['train'] / median:.1f} %"
        lines.append(
            f"  {name:<17}{implementation:<15}{statistics.median(forward):>10.3f}{median:>12.3f}"
            f"{min(train):>10.3f}{max(train):>10.3f}{ratio:>9}{saved:>10}{peak:>10}{floor:>10}"
        )
    lines += [f"  not run: {', '.join(names)}: {reason}" for reason, names in sitting_out.items()]
    return "\n".join(lines)
