"""What the benches of the small ops share: interleaved medians, a table, a command line.

A bench module has ``CASES`` (name -> case with ``name``), ``contestants(device)``, ``prepare(case, dtype, device)``,
``refusal(contestant, prepared)``, ``record(case, dtype, hip=...)``; see bench/level2_noise.py.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import torch
from timing import Clock, first_line

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7}
MIN_ROUNDS = 3


@dataclass(frozen=True)
class Contestant:
    """One row of a cell's table."""

    name: str
    what: str
    ours: bool
    passes: Mapping[str, Callable[[Any], object]]
    """Name of a pass -> one run of it on what ``prepare`` made."""
    why_not: Callable[[torch.device, torch.dtype], str | None] = lambda device, dtype: None


def why_not_ours(op: str, impl: str | None) -> Callable[[torch.device, torch.dtype], str | None]:
    """Why ``impl`` of ours gets no number: it cannot run here, or the interpreter's time would mean nothing."""

    def reason(device: torch.device, dtype: torch.dtype) -> str | None:
        import minidiff_fast.ops  # noqa: F401  (registers the op)
        from minidiff_fast.backend import REGISTRY, resolve, triton_interpreted
        from minidiff_fast.errors import MinidiffFastError

        try:
            resolved = resolve(REGISTRY[op], impl, device, dtype)
        except MinidiffFastError as error:
            return str(error)
        if resolved == "triton" and triton_interpreted():
            return "TRITON_INTERPRET is set: the interpreter's time is meaningless"
        return None

    return reason


def interleaved(
    runs: Mapping[tuple[str, str], Callable[[], object]], clock: Clock, *, repeats: int, seconds: float
) -> dict[tuple[str, str], list[float]]:
    """Milliseconds per run and round, everyone once a round in rotating order, after two rounds of warm-up.

    Stops early, but never before three rounds, once ``seconds`` have gone by.
    """
    names = list(runs)
    times: dict[tuple[str, str], list[float]] = {name: [] for name in names}
    started = time.perf_counter()
    for turn in range(-2, repeats):
        if turn >= MIN_ROUNDS and time.perf_counter() - started > seconds:
            break
        shift = turn % len(names) if names else 0
        for name in names[shift:] + names[:shift]:
            elapsed = clock(runs[name])
            if turn >= 0:
                times[name].append(elapsed)
    return times


def run_cell(suite: ModuleType, case: Any, dtype: str, device: torch.device, repeats: int, seconds: float) -> dict:
    """Verify everyone, then time those that agree; ready for JSON."""
    prepared = suite.prepare(case, DTYPES[dtype], device)
    records: dict[str, dict[str, Any]] = {}
    runs: dict[tuple[str, str], Callable[[], object]] = {}
    for contestant in suite.contestants(device):
        record: dict[str, Any] = {"what": contestant.what, "ours": contestant.ours, "status": "ok", "reason": None}
        records[contestant.name] = record
        try:
            reason = contestant.why_not(device, DTYPES[dtype])
            if reason is not None:
                record |= {"status": "unsupported", "reason": reason}
                continue
            reason = suite.refusal(contestant, prepared)
            if reason is not None:
                record |= {"status": "refused", "reason": reason}
                continue
        except Exception as error:  # a contestant that cannot run is a row of the table, not the end of the run
            record |= {"status": "error", "reason": first_line(error)}
            continue
        for name, function in contestant.passes.items():
            runs[contestant.name, name] = lambda f=function: f(prepared)  # type: ignore[misc]
    for (contestant_name, which), values in interleaved(runs, Clock(device), repeats=repeats, seconds=seconds).items():
        records[contestant_name][f"{which}_ms"] = values
    return {"case": asdict(case), "dtype": dtype, "contestants": records}


def render(cell: dict) -> str:
    """The printed rows of one cell."""
    shape = " ".join(f"{name}={value}" for name, value in cell["case"].items() if name != "name")
    lines = [f"{cell['case']['name']} {cell['dtype']}  [{shape}]"]
    for name, record in cell["contestants"].items():
        if record["status"] != "ok":
            lines.append(f"  {name:<16}{record['status']}: {record['reason']}")
            continue
        passes = [
            f"{key[:-3]} {statistics.median(values):.3f} ms ({min(values):.3f} to {max(values):.3f})"
            for key, values in record.items()
            if key.endswith("_ms")
        ]
        lines.append(f"  {name:<16}{'   '.join(passes)}")
    return "\n".join(lines)


def run(
    suite: ModuleType,
    device: torch.device,
    budget: float,
    *,
    cases: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    repeats: int = 30,
) -> list[dict]:
    """Every cell that ``budget`` seconds allow, printed as they come."""
    started = time.perf_counter()
    cells: list[dict] = []
    for dtype in dtypes or (("bf16", "fp32") if device.type == "cuda" else ("fp32",)):
        for name in cases or suite.CASES:
            left = budget - (time.perf_counter() - started)
            if left <= 0:
                print(f"stopped at the budget of {budget:.0f} s")
                return cells
            cells.append(run_cell(suite, suite.CASES[name], dtype, device, repeats, min(10.0, left)))
            print(render(cells[-1]), flush=True)
    return cells


def main(suite: ModuleType, argv: Sequence[str] | None = None) -> int:
    """Time; 0, or 1 when ours was refused or broke, 2 for a wrong option."""
    parser = argparse.ArgumentParser(description=(suite.__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", default=",".join(suite.CASES))
    parser.add_argument("--dtype", help="out of fp32, bf16; default: both (on a CPU: fp32)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--budget", type=float, default=540.0, help="seconds")
    options = parser.parse_args(argv)
    cases = options.cases.split(",")
    dtypes = options.dtype.split(",") if options.dtype else None
    for option, given, known in (("--cases", cases, suite.CASES), ("--dtype", dtypes or (), DTYPES)):
        unknown = [name for name in given if name not in known]
        if unknown:
            parser.error(f"{option}: unknown {unknown[0]!r}; there are: {', '.join(known)}")
    device = torch.device(options.device)
    cells = run(suite, device, options.budget, cases=cases, dtypes=dtypes, repeats=options.repeats)
    failed = [r for c in cells for r in c["contestants"].values() if r["ours"] and r["status"] in ("refused", "error")]
    return int(bool(failed))
