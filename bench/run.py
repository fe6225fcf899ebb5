"""Run a suite: ``python bench/run.py attention|modulate [--device cpu|cuda] [--cases a,b] [--budget 9m] [--out DIR]``.

Several suites may be named, one after the other. ``linear``, ``noise``, ``loss`` and ``step`` have options of their own
(``python bench/run.py step --help``); ``static`` compiles the kernels for GPUs that are not there.

Prints one table per cell and keeps DIR/<suite>.json up to date after every cell. Run again with the same
DIR to go on where a budget ended. Exit code 0: done, or stopped at the budget; 1: a contestant of ours was
refused by verification or broke; 2: bad input.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = 1
SUITES = {"attention": "broadcast_attention", "modulate": "broadcast_modulate"}
"""Suite -> module of this folder with ``NAME, DTYPES, Settings, Bench, plan, render, ...``."""
OTHERS = {
    "linear": "broadcast_linear", "noise": "level2_noise", "loss": "denoising_loss", "step": "step", "static": "static",
    "integrations": "integrations", "rl-update": "rl_update",
}  # fmt: skip
"""Suite -> module of this folder with options and a ``main`` of its own."""
IDENTITY = (
    "suite", "schema", "device", "scale", "peers", "repeats", "threads", "versions", "commit", "source",
    "impl_override",
)  # fmt: skip
"""What has to agree before new cells may stand beside old ones."""


class BadInput(Exception):
    """One line for stderr; exit code 2."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadInput(message)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = _Parser(prog="bench/run.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("suite", choices=sorted(SUITES))
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--cases", help="comma-separated; default: all")
    parser.add_argument("--peers", help="comma-separated names or families; default: all")
    parser.add_argument("--scale", choices=("full", "cpu"), help="default: full on cuda, cpu on the CPU")
    parser.add_argument("--dtype", help="out of bf16, tf32, fp32; default: all on cuda, fp32 on the CPU")
    parser.add_argument("--budget", default="9m", help="seconds, or with s, m, h: 90s, 9m; default: 9m")
    parser.add_argument("--repeats", type=int, help="timed rounds; default: 20 on cuda, 7 on the CPU")
    parser.add_argument("--out", type=Path, help="folder of the JSON; default: bench/results/<device>")
    parser.add_argument("--fresh", type=Path, metavar="FOLDER", help="an --out that has to be new or empty")
    return parser.parse_args(argv)


def seconds_of(text: str) -> float:
    """``90`` or ``90s``, ``9m``, ``1.5h`` in seconds.

    >>> seconds_of("9m")
    540.0
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if match is None:
        raise BadInput(f"--budget must be a number of seconds, or like 90s, 9m, 1h, got {text!r}")
    return float(match[1]) * {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}[match[2]]


def chosen(option: str, text: str | None, known: list[str], default: list[str]) -> list[str]:
    """A comma-separated option, checked against what exists; order as given, each once."""
    if text is None:
        return default
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise BadInput(f"{option}: unknown {', '.join(unknown) or '(empty)'}; there are: {', '.join(known)}")
    return names


# ----------------------------------------------------------------------------------------- what was measured


def device_name(device: torch.device) -> str:
    """``NVIDIA H200``, or the processor's model name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    table = Path("/proc/cpuinfo")  # Linux; elsewhere the architecture has to do
    for line in table.read_text().splitlines() if table.is_file() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def slug(name: str) -> str:
    """
    >>> slug("NVIDIA H200")
    'nvidia-h200'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


def _git(*arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(ROOT), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _source_digest() -> str:
    """One hash over the code that the numbers come from, so that an uncommitted edit is noticed, too."""
    digest = hashlib.sha256()
    for folder in ("minidiff_fast", "kernels", "csrc", "bench"):
        for path in sorted((ROOT / folder).rglob("*")):
            measured = path.suffix in (".py", ".cpp", ".cu", ".h") and path.name != "report.py"
            if measured and path.is_file():
                digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else None


def environment(device: torch.device) -> dict[str, Any]:
    """Device, versions, commit, threads."""
    status = _git("status", "--porcelain", "--", ".", ":!bench/results")
    return {
        "device": {"kind": device.type, "name": device_name(device)},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton") or _version("pytorch-triton"),
            "flash-attn": _version("flash-attn"),
            "cuda": torch.version.cuda if device.type == "cuda" else None,
            "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
            "driver": _driver() if device.type == "cuda" else None,
        },
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "source": _source_digest(),
        "threads": torch.get_num_threads(),
        "impl_override": os.environ.get("MINIDIFF_FAST_IMPL"),
    }


# ----------------------------------------------------------------------------------------------- the results


def open_results(path: Path, header: dict[str, Any], *, fresh: bool) -> dict[str, Any]:
    """The document that cells go into: a new one, or the one at ``path`` when it is of the same make."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if fresh and any(path.parent.iterdir()):
            raise BadInput(f"--fresh: {path.parent} is not empty; name a new folder")
        if not path.exists():
            return {**header, "cells": {}}
        document = json.loads(path.read_text())
    except OSError as error:
        raise BadInput(f"--out: cannot write in {path.parent}: {error.strerror or error}") from error
    except ValueError as error:
        raise BadInput(f"--out: {path} is not JSON ({error}); move it away or give --fresh FOLDER") from error
    if not isinstance(document, dict) or not isinstance(document.get("cells"), dict):
        raise BadInput(f"--out: {path} holds no results of this suite; give --fresh FOLDER")
    for field in IDENTITY:
        if document.get(field) != header[field]:
            raise BadInput(
                f"--out: {path} was measured with another {field} ({_short(document.get(field))}, now "
                f"{_short(header[field])}); give --fresh FOLDER to start anew"
            )
    return document


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."


def save(path: Path, document: dict[str, Any]) -> None:
    """Write to a temporary name, then move: a killed run leaves the last whole document."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(document, indent=1) + "\n")
    temporary.replace(path)


# ------------------------------------------------------------------------------------------------------ main


def setup(arguments: argparse.Namespace) -> tuple[ModuleType, Any, list[Any], Path, dict[str, Any]]:
    """Check every option; suite module, bench, cells, JSON path and document."""
    suite = importlib.import_module(SUITES[arguments.suite])
    budget = seconds_of(arguments.budget)
    kind = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: torch sees no CUDA device here; use --device cpu")
    if arguments.out and arguments.fresh:
        raise BadInput("--out and --fresh name two folders; give one")
    cuda = kind == "cuda"
    device = torch.device(kind)
    repeats = arguments.repeats if arguments.repeats is not None else (20 if cuda else 7)
    if repeats < 1:
        raise BadInput(f"--repeats must be 1 or more, got {repeats}")
    scale = arguments.scale or ("full" if cuda else "cpu")
    cases = chosen("--cases", arguments.cases, suite.case_names(), suite.case_names())
    default = ["bf16", "tf32", "fp32"] if cuda else ["fp32"]
    dtypes = chosen("--dtype", arguments.dtype, list(suite.DTYPES), default)
    if "tf32" in dtypes and not cuda:
        raise BadInput("--dtype tf32 needs --device cuda")
    named = None if arguments.peers is None else [p.strip() for p in arguments.peers.split(",") if p.strip()]
    peers, unknown = suite.select_peers(named, device)
    if unknown or not peers:
        there = ", ".join(suite.peer_names(device))
        raise BadInput(f"--peers: unknown {', '.join(unknown) or '(empty)'}; there are: {there}")
    settings = suite.Settings(device, tuple(peers), repeats, warmup=3 if cuda else 1, seconds=10.0)
    header = {
        "suite": arguments.suite, "schema": SCHEMA, "scale": scale, "peers": peers, "repeats": repeats,
        "budget_seconds": budget, **environment(device),
    }  # fmt: skip
    folder = arguments.fresh or arguments.out or ROOT / "bench" / "results" / slug(header["device"]["name"])
    path = folder / f"{arguments.suite}.json"
    document = open_results(path, header, fresh=arguments.fresh is not None)
    return suite, suite.Bench(settings), suite.plan(scale, cases, dtypes), path, document


def main(argv: list[str] | None = None) -> int:
    """Run; the exit code."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] and words[0] in OTHERS:
        return importlib.import_module(OTHERS[words[0]]).main(words[1:])
    several = list(itertools.takewhile(SUITES.__contains__, words))
    if len(several) > 1:  # one after the other, each with the options that follow
        return max(main([suite, *words[len(several) :]]) for suite in several)
    started = time.perf_counter()
    try:
        arguments = parse(argv)
        suite, bench, cells, path, document = setup(arguments)
    except BadInput as error:
        print(f"bench/run.py: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"bench/run.py: {error}; install the package: pip install -e .", file=sys.stderr)
        return 2
    budget = seconds_of(arguments.budget)
    known = document["cells"]
    todo = [cell for cell in cells if cell.key not in known]
    print(f"{arguments.suite} on {document['device']['name']}, torch {document['versions']['torch']}, "
          f"{document['threads']} thread(s), commit {document['commit']}"
          f"{' (dirty)' if document['dirty'] else ''}: {len(todo)} of {len(cells)} cells to run")  # fmt: skip
    longest, measured = 0.0, 0
    try:
        for cell in todo:
            elapsed = time.perf_counter() - started
            if elapsed + longest > budget:
                left = len(todo) - measured
                print(f"stopped at the budget of {arguments.budget}: {left} cells left; run again to go on")
                break
            result = bench.run(cell)
            print(suite.render(cell.key, result), flush=True)
            lost = suite.context_lost(result)
            if lost is not None:
                print(f"bench/run.py: the device is lost, this cell is not kept: {lost}", file=sys.stderr)
                return 1
            known[cell.key] = result
            save(path, document)
            measured += 1
            longest = max(longest, result["seconds"])
            elapsed = time.perf_counter() - started
            print(f"[{measured}/{len(todo)}] {elapsed:.0f} s", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print(f"bench/run.py: interrupted; {path} holds {len(known)} cells", file=sys.stderr)
        return 130
    save(path, document)
    failures = [f"{cell.key}: {', '.join(bad)}" for cell in cells
                if cell.key in known and (bad := suite.ours_failed(known[cell.key]))]  # fmt: skip
    print(f"{path}: {len(known)} cells")
    for failure in failures:
        print(f"bench/run.py: ours failed in {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
