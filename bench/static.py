"""``python bench/run.py static``: every kernel the library can launch, compiled for GPUs that are not there.

For every case of the suite, in every precision, forward and backward, with every launch configuration that the
heuristics choose for its numbers of samples: registers, spills, shared memory, matrix instructions, and the bytes
that one turn of the inner loop moves. Exit code 1 if a kernel does not compile, spills, needs more shared memory
than the device has, or is worse than ``bench/static_budget.json`` says (same version of Triton only: another
compiler gives other registers).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from offline import Facts, Launch, compile_launch
from static_cases import OPS, StaticCase, platform_of

BUDGET = Path(__file__).resolve().parent / "static_budget.json"
TARGETS = ("cuda:80", "cuda:86", "cuda:89", "cuda:90", "cuda:100", "cuda:120", "hip:gfx90a", "hip:gfx942")
BUDGETED = ("registers", "shared", "loop_loads", "loop_stores", "matrix_instructions", "wgmma")
"""What the budget file keeps per kernel; more is worse, except for the last two, where fewer is."""


class Task(NamedTuple):
    """One kernel to compile; small enough to send to another process."""

    key: str
    """Names the kernel in the table and in the budget file."""
    case: tuple[str, str, str]
    """Op, case, precision."""
    target: str
    launch: int
    """Which of the case's recorded launches."""


@dataclass(frozen=True)
class Row:
    """What came of a task."""

    task: Task
    facts: Facts | None
    error: str | None
    """Why it does not compile."""


def cases(ops: list[str] | None = None, names: list[str] | None = None) -> list[StaticCase]:
    """The cases of the ops, in the order of the table."""
    return [
        case
        for op, make in OPS.items()
        if ops is None or op in ops
        for case in make()
        if names is None or case.name in names
    ]


@cache
def _cases_by_name() -> dict[tuple[str, str, str], StaticCase]:
    return {case.identity: case for case in cases()}


@cache
def _recorded(identity: tuple[str, str, str], platform: str) -> tuple[Launch, ...]:
    return tuple(_cases_by_name()[identity].record(platform))


def _configuration(launch: Launch) -> tuple[Any, ...]:
    """What tells two compilations apart: kernel, types, compile-time arguments, launch options. Strides and sizes only
    decide whether Triton may assume multiples of 16; the first case to use a configuration stands for them."""
    kernel, args, flags = launch
    types = tuple(str(value.dtype) if hasattr(value, "dtype") else "" for value in args)
    return kernel.__name__, types, tuple(sorted((name, str(value)) for name, value in flags.items()))


def _label(op: str, launch: Launch) -> str:
    kernel, _, flags = launch
    name = kernel.__name__.removeprefix(f"_{op}_").removesuffix("_kernel")
    tiles = "x".join(str(value) for flag, value in flags.items() if flag.startswith("BLOCK"))
    own = " own" if flags.get("OWN") else ""
    return f"{name}{own} {tiles} warps={flags.get('num_warps', 4)} stages={flags.get('num_stages', '-')}"


def plan(chosen: list[StaticCase], targets: list[str]) -> list[Task]:
    """Every configuration once per target."""
    tasks: list[Task] = []
    for target in targets:
        seen: set[tuple[Any, ...]] = set()
        labels: dict[str, int] = {}
        for case in chosen:
            for index, launch in enumerate(_recorded(case.identity, platform_of(target))):
                configuration = _configuration(launch)
                if configuration in seen:
                    continue
                seen.add(configuration)
                label = f"{case.op} {case.name} {case.precision} {_label(case.op, launch)}"
                labels[label] = labels.get(label, 0) + 1
                number = f" #{labels[label]}" if labels[label] > 1 else ""
                tasks.append(Task(f"{label}{number} @ {target}", case.identity, target, index))
    return tasks


def run_task(task: Task) -> Row:
    """Compile one kernel; a compiler's failure is a result."""
    launch = _recorded(task.case, platform_of(task.target))[task.launch]
    try:
        return Row(task, compile_launch(launch, task.target), None)
    except Exception as problem:
        return Row(task, None, f"does not compile: {type(problem).__name__}: {problem}".splitlines()[0])


def verdict(row: Row, budget: dict[str, list[int]] | None) -> str | None:
    """Why a row fails, or None. Without a budget (another Triton) only the device's limits count."""
    facts = row.facts
    if facts is None:
        return row.error
    if facts.spills:
        return f"{facts.spills} spills"
    if facts.shared > facts.shared_limit:
        return f"{facts.shared} bytes of shared memory, the device has {facts.shared_limit}"
    if budget is None:
        return None
    allowed = budget.get(row.task.key)
    if allowed is None:
        return f"not in {BUDGET.name}: run with --update-budget and commit the file"
    for name, limit in zip(BUDGETED, allowed, strict=True):
        value = getattr(facts, name)
        if value < limit if name in ("matrix_instructions", "wgmma") else value > limit:
            return f"{name} {value}, the budget says {limit}"
    return None


def compiled(tasks: list[Task], jobs: int) -> Iterator[Row]:
    """The rows as they come; Triton compiles on one core, so several processes."""
    if jobs == 1:
        yield from map(run_task, tasks)
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process with torch's threads may hang
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        for future in as_completed([pool.submit(run_task, task) for task in tasks]):
            yield future.result()


def render(row: Row, failure: str | None) -> str:
    """One line of the table."""
    if row.facts is None:
        return f"{row.task.key:<100} {failure}"
    f = row.facts
    counts = f"{f.registers:>5}{f.spills:>7}{f.shared:>9}{f.matrix_instructions:>8}{f.wgmma:>7}"
    loop = f"{f.loop_loads:>10}{f.loop_stores:>8}"
    return f"{row.task.key:<100}{counts}{loop}" + (f"  {failure}" if failure else "")


HEADER = f"{'kernel':<100}{'regs':>5}{'spills':>7}{'shared':>9}{'matrix':>8}{'wgmma':>7}{'loop ld B':>10}{'loop st':>8}"


def read_budget(path: Path, triton_version: str) -> dict[str, list[int]] | None:
    """The committed numbers, or None where they were made with another Triton."""
    document = json.loads(path.read_text())
    return document["kernels"] if document["triton"] == triton_version else None


def write_budget(path: Path, rows: list[Row], triton_version: str) -> None:
    """One line a kernel; rows of this run replace or join those of the same Triton that are there."""
    kernels = (read_budget(path, triton_version) or {}) if path.is_file() else {}
    kernels |= {row.task.key: [getattr(row.facts, name) for name in BUDGETED] for row in rows}
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(values)}" for key, values in sorted(kernels.items()))
    head = f'{{\n "triton": {json.dumps(triton_version)},\n "columns": {json.dumps(BUDGETED)},\n "kernels": {{\n'
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(f"{head}{lines}\n }}\n}}\n")
    temporary.replace(path)


def _subset(option: str, text: str | None, known: list[str], parser: argparse.ArgumentParser) -> list[str] | None:
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        parser.error(f"{option}: unknown {', '.join(unknown) or '(empty)'}; there are: {', '.join(known)}")
    return names


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[Task]]:
    """The command line and the kernels it asks for."""
    parser = argparse.ArgumentParser(
        prog="bench/run.py static", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--targets", help=f"comma-separated; default: {','.join(TARGETS)}")
    parser.add_argument("--ops", help="comma-separated; default: all")
    parser.add_argument("--cases", help="comma-separated; default: all")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="compile every N-th kernel only (a sample)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; default: one a core")
    parser.add_argument("--update-budget", action="store_true", help=f"write what is found to {BUDGET.name}")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write every fact as JSON")
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set, and the interpreter has no machine code; unset it")
    for name in ("every", "jobs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be 1 or more, got {getattr(options, name)}")
    targets = _subset("--targets", options.targets, list(TARGETS), parser) or list(TARGETS)
    ops = _subset("--ops", options.ops, list(OPS), parser)
    names = _subset("--cases", options.cases, list(dict.fromkeys(case.name for case in cases(ops))), parser)
    return options, plan(cases(ops, names), targets)[:: options.every]


def main(argv: list[str]) -> int:
    """Compile, print the table, compare with the budget; the exit code."""
    options, tasks = parse(argv)
    version = importlib.metadata.version("triton")
    budget = read_budget(BUDGET, version) if BUDGET.is_file() and not options.update_budget else None
    if budget is None and not options.update_budget:
        print(f"{BUDGET.name} is of another Triton than {version}: spills and the devices' limits are checked only")
    started = time.perf_counter()
    print(f"{len(tasks)} kernels, triton {version}\n{HEADER}", flush=True)
    rows, failures = [], []
    for row in compiled(tasks, options.jobs):
        failure = verdict(row, budget)
        rows.append(row)
        if failure is not None:
            failures.append(f"{row.task.key}: {failure}")
        print(render(row, failure), flush=True)
    whole = [row for row in rows if row.facts is not None]
    spills = sum(row.facts.spills for row in whole if row.facts is not None)
    if options.out is not None:
        facts = {row.task.key: {"error": row.error, **(asdict(row.facts) if row.facts else {})} for row in rows}
        options.out.write_text(json.dumps({"triton": version, "kernels": facts}, indent=1) + "\n")
    if options.update_budget:
        write_budget(BUDGET, whole, version)
    print(f"{len(rows)} kernels in {time.perf_counter() - started:.0f} s: {spills} spills, {len(failures)} failures")
    for failure in failures:
        print(f"bench/run.py static: {failure}", file=sys.stderr)
    return 1 if failures else 0
