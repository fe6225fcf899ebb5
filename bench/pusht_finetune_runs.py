"""The runs of ``pusht_finetune.py``: what each does, which it waits for, and how they are done two at a time."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

Record = dict[str, Any]
SCRIPT = Path(__file__).with_name("pusht_finetune.py").resolve()
RECIPE = (
    "--demo-episodes", "100", "--mirror", "--obs", "keypoints", "--horizon", "6", "--n-obs-steps", "1",
    "--n-action-steps", "6", "--num-inference-steps", "5", "--encoder-width", "256",
    "--batch-size", "64", "--l2-batch", "8",
)  # fmt: skip
"""Of imitation."""
PRETRAIN_STEPS = 4200
MIN_STD, VARIANT_MIN_STD = 0.04, 0.02
"""Of the stochastic sampler, in fine-tuning and in every evaluation: on stock Push-T, and on the shifted task, whose
short pushes suffer from the 10 pixels that 0.04 is."""


class Failed(Exception):
    """A run ended with an error; the others go on."""


@dataclass(frozen=True)
class Settings:
    """What the figures depend on; a --work folder holds one."""

    seeds: tuple[int, ...] = (0, 1, 2)
    budget_seconds: float = 300.0
    """Of each fine-tuning run."""
    pretrain_steps: int = PRETRAIN_STEPS
    variant: str = "near-goal"
    """The shifted task that DPPO also trains on."""
    transfer: str = "time-limit"
    """The task that what was trained on stock is also evaluated on."""
    test_seed: int = 100_000
    test_episodes: int = 500
    validation_seed: int = 200_000
    validation_episodes: int = 200
    single_share: float = 0.5
    """Of the budget, for the algorithms that run once: AWR, FPO, ReinFlow."""
    curve_points: int = 8
    """Evaluations on the way of the two runs that are drawn."""
    min_std: float = MIN_STD
    variant_min_std: float = VARIANT_MIN_STD
    threads: int = 1
    workers: int = 2
    recipe: tuple[str, ...] = RECIPE

    def noise(self, task: str) -> float:
        """Least standard deviation of the stochastic sampler on a task."""
        return self.variant_min_std if task == self.variant else self.min_std

    def scaled(self, scale: float) -> Settings:
        """The same bench with a share of its time, for a look at whether it runs."""
        values = asdict(self)
        values["budget_seconds"] = max(1.0, self.budget_seconds * scale)
        for name, least in (("pretrain_steps", 20), ("test_episodes", 4), ("validation_episodes", 4)):
            values[name] = max(least, round(values[name] * scale))
        return Settings(**values)


class Unit(NamedTuple):
    """One run or evaluation, done once."""

    name: str
    needs: tuple[str, ...]
    make: Callable[[Bench], Record]
    """Does it and returns its result."""
    after: tuple[str, ...] = ()
    """What it waits for without needing it to succeed."""


class Bench:
    """The units' work: commands that run in their own process, and where their results lie."""

    def __init__(self, settings: Settings, work: Path, source: str = "") -> None:
        self.settings, self.work, self.source = settings, work, source
        self.children: set[subprocess.Popen[bytes]] = set()
        self.lock = threading.Lock()
        self.stopping = False
        for folder in ("runs", "results", "logs"):
            (work / folder).mkdir(parents=True, exist_ok=True)

    def folder(self, run: str) -> Path:
        """Run folder."""
        return self.work / "runs" / run

    def result(self, unit: str) -> Record | None:
        """Of a unit that is done."""
        path = self.work / "results" / f"{unit}.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def need(self, unit: str) -> Record:
        """The result of a unit that has to be done."""
        found = self.result(unit)
        if found is None:
            raise Failed(f"{unit} is not done")
        return found

    def keep(self, unit: str, result: Record) -> None:
        """Store a result with the hash of the code that gave it: whole or not at all."""
        path = self.work / "results" / f"{unit}.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps({**result, "source": self.source}) + "\n")
        temporary.replace(path)

    def call(self, name: str, command: Sequence[str]) -> None:
        """Run a command of the library; its output goes to logs/. Raises :class:`Failed` with its last line."""
        log = self.work / "logs" / f"{name}.log"
        threads = str(self.settings.threads)
        # Unbuffered: both streams go to one file, and a buffer that is written at the end would come after the error.
        environment = {
            **os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1",
        }  # fmt: skip
        with log.open("ab") as output, self.lock:
            if self.stopping:
                raise Failed("interrupted")
            # Not from the repository's root: `python -m` would put its kernels/ before the package of that name.
            child = subprocess.Popen(
                [sys.executable, *command], cwd=self.work, env=environment, stdout=output, stderr=output,
                start_new_session=True,  # of Ctrl-C they hear once, from stop(): a second signal means not to save
            )  # fmt: skip
            self.children.add(child)
        try:
            code = child.wait()
        finally:
            with self.lock:
                self.children.discard(child)
        if code != 0:
            last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["no output"]
            raise Failed(f"exit code {code}: {last[0][:200]} ({log.relative_to(self.work)})")

    def stop(self) -> None:
        """Ask every process to save and end, and start no other."""
        with self.lock:
            self.stopping = True
            for child in self.children:
                child.send_signal(signal.SIGTERM)

    # ---------------------------------------------------------------------------------------------- the runs

    def pretrain(self, run: str, seed: int, *, max_steps: int, flow: bool, resume: bool = False) -> Record:
        """Imitation, begun or gone on with."""
        folder = self.folder(run)
        going = resume or self._started(folder)
        self.call(run, [
            "-m", "minidiff_fast.cli", "train", "pusht", *self.settings.recipe,
            "--prediction", "flow" if flow else "sample", "--seed", str(seed), "--max-steps", str(max_steps),
            "--num-threads", str(self.settings.threads), "--device", "cpu", "--eval-every", "none", "--log", "none",
            "--log-every", "50", "--checkpoint-every", "1m", "--no-progress", "--out", str(folder),
            *(["--resume"] if going else []),
        ])  # fmt: skip
        last = self._rows(folder, "train")[-1]
        return {name: last[name] for name in ("step", "seconds", "cpu_seconds")}

    def control(self, run: str, seed: int, start: str, matched: Sequence[str], *, flow: bool) -> Record:
        """The policy of ``start``, trained on as it was, for the processor time of the longest of ``matched``."""
        begun = self.need(start)
        spent = {name: found["cpu_seconds"] for name in matched if (found := self.result(name)) is not None}
        if not spent:
            raise Failed(f"none of {', '.join(matched)} is done")
        cpu = max(spent.values())
        more = math.ceil(cpu / (begun["cpu_seconds"] / begun["step"]))
        folder = self.folder(run)
        if not folder.exists():
            copy = folder.with_name(f".{run}.tmp")
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(self.folder(start), copy)
            copy.rename(folder)
        done = self.pretrain(run, seed, max_steps=begun["step"] + more, flow=flow, resume=True)
        beyond = {name: done[name] - begun[name] for name in ("step", "seconds", "cpu_seconds")}
        return {**beyond, "matched_cpu_seconds": cpu, "matched": list(spent)}

    def finetune(
        self, run: str, seed: int, start: str, algo: str, *, variant: str = "stock", curve: bool = False,
        iterations_of: str | None = None,
    ) -> Record:  # fmt: skip
        """Reinforcement learning from ``start``; ``iterations_of`` a run: flat pairs for as many iterations."""
        share = 1.0 if algo == "dppo" else self.settings.single_share
        folder, seconds = self.folder(run), share * self.settings.budget_seconds
        every = f"{seconds / self.settings.curve_points:.2f}s" if curve else "none"
        length = ["--budget", f"{seconds:.2f}s"]
        if iterations_of is not None:
            length = ["--max-iterations", str(self.need(iterations_of)["step"]), "--flat-pairs"]
        self.call(run, [
            "-m", "minidiff_fast.cli", "finetune", "pusht", "--checkpoint", str(self.folder(start)), "--algo", algo,
            "--variant", variant, *length, "--min-std", str(self.settings.noise(variant)), "--seed", str(seed),
            "--num-threads", str(self.settings.threads), "--device", "cpu", "--eval-every", every,
            "--eval-sampler", "stochastic", "--eval-episodes", str(self.settings.validation_episodes), "--log", "none",
            "--checkpoint-every", "1m", "--no-progress", "--out", str(folder),
            *(["--resume"] if self._started(folder) else []),
        ])  # fmt: skip
        last = self._rows(folder, "train")[-1]
        total = {name.removeprefix("total_"): value for name, value in last.items() if name.startswith("total_")}
        result: Record = {name: last[name] for name in ("step", "seconds", "cpu_seconds")} | total
        if curve:
            result["curve"] = self._curve(folder)
        return result

    def evaluate(self, run: str, variant: str) -> Record:
        """Both samplers on the validation and the test starts, in a process of its own."""
        key, settings = f"{run}@{variant}", self.settings
        out = self.work / "logs" / f"{key}.evaluation.json"
        self.call(key, [
            str(SCRIPT), "--evaluate", str(self.folder(run)), variant, str(out), json.dumps(asdict(settings)),
        ])  # fmt: skip
        found: Record = json.loads(out.read_text())
        return found

    def _started(self, folder: Path) -> bool:
        """Whether there is a checkpoint to go on from; what is left of a run without one is removed."""
        if (folder / "checkpoints" / "last").is_file():
            return True
        shutil.rmtree(folder, ignore_errors=True)
        return False

    def _rows(self, folder: Path, kind: str) -> list[Record]:
        from minidiff_fast.training.metrics import read_metrics

        rows = [row for row in read_metrics(folder) if row["kind"] == kind]
        if not rows:
            raise Failed(f"{folder}: metrics.jsonl has no row of kind {kind}")
        return rows

    def _curve(self, folder: Path) -> list[Record]:
        steps = {row["step"]: row["total_env_steps"] for row in self._rows(folder, "train")}
        names = ("step", "seconds", "cpu_seconds", "success_rate", "success_interval", "score", "episodes")
        return [
            {**{name: row[name] for name in names}, "env_steps": steps[row["step"]]}
            for row in self._rows(folder, "eval")
        ]


def plan(settings: Settings) -> list[Unit]:
    """Every unit, those that others wait for first."""
    steps, variant, one = settings.pretrain_steps, settings.variant, settings.seeds[0]
    units: list[Unit] = []

    def add(name: str, needs: Sequence[str], make: Callable[[Bench], Record], after: Sequence[str] = ()) -> None:
        units.append(Unit(name, tuple(needs), make, tuple(after)))

    def pretrain(kind: str, seed: int) -> None:
        run = f"{kind}-{seed}"
        add(run, [], lambda bench: bench.pretrain(run, seed, max_steps=steps, flow=kind == "flow"))

    def finetune(kind: str, seed: int, start: str, algo: str, **options: Any) -> None:
        run, needs = f"{kind}-{seed}", [start]
        if "iterations_of" in options:
            needs.append(options["iterations_of"])
        add(run, needs, lambda bench: bench.finetune(run, seed, start, algo, **options))

    def control(kind: str, seed: int, start: str, matched: Sequence[str]) -> None:
        run, flow = f"{kind}-{seed}", kind.startswith("flow")
        add(run, [start], lambda bench: bench.control(run, seed, start, matched, flow=flow), matched)

    def evaluate(run: str, task: str) -> None:
        add(f"{run}@{task}", [run], lambda bench: bench.evaluate(run, task))

    for seed in settings.seeds:
        pretrain("bc", seed)
    pretrain("flow", one)
    for seed in settings.seeds:
        finetune("dppo", seed, f"bc-{seed}", "dppo", curve=seed == one)
    for seed in settings.seeds:
        finetune("dppo-variant", seed, f"bc-{seed}", "dppo", variant=variant)
    finetune("flat", one, f"bc-{one}", "dppo", curve=True, iterations_of=f"dppo-{one}")
    finetune("awr", one, f"bc-{one}", "awr")
    finetune("fpo", one, f"flow-{one}", "fpo")
    finetune("reinflow", one, f"flow-{one}", "reinflow")
    for seed in settings.seeds:
        control("control", seed, f"bc-{seed}", [f"dppo-{seed}", f"dppo-variant-{seed}"])
    control("flow-control", one, f"flow-{one}", [f"fpo-{one}", f"reinflow-{one}"])
    tasks = {
        "bc": ("stock", variant, settings.transfer), "control": ("stock", variant, settings.transfer),
        "dppo": ("stock", settings.transfer), "dppo-variant": (variant,),
    }  # fmt: skip
    for unit in list(units):
        for task in dict.fromkeys(tasks.get(unit.name.rsplit("-", 1)[0], ("stock",))):  # the two may be one
            evaluate(unit.name, task)
    return units


def _ready(unit: Unit, done: set[str], failed: dict[str, str]) -> bool:
    return done.issuperset(unit.needs) and all(name in done or name in failed for name in unit.after)


def execute(units: Sequence[Unit], bench: Bench, say: Callable[[str], None]) -> dict[str, str]:
    """Do what is not done, ``workers`` at a time, each unit after those it needs; {unit: why it failed}.

    A unit that needs a failed one fails with it. On Ctrl-C or SIGTERM the running commands save and end.
    """
    done = {unit.name for unit in units if bench.result(unit.name) is not None}
    failed: dict[str, str] = {}
    waiting = [unit for unit in units if unit.name not in done]
    running: dict[Future[Record], tuple[Unit, float]] = {}
    say(f"{len(units)} runs and evaluations, {len(done)} done")
    with ThreadPoolExecutor(bench.settings.workers) as pool:
        try:
            while waiting or running:
                for unit in list(waiting):
                    broken = [name for name in unit.needs if name in failed]
                    if broken:
                        failed[unit.name] = f"needs {', '.join(broken)}"
                        waiting.remove(unit)
                    elif len(running) < bench.settings.workers and _ready(unit, done, failed):
                        running[pool.submit(unit.make, bench)] = (unit, time.perf_counter())
                        waiting.remove(unit)
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    unit, began = running.pop(future)
                    took = time.perf_counter() - began
                    try:
                        bench.keep(unit.name, {**future.result(), "wall": took})
                    except Exception as error:  # whatever one run meets, the others go on, and all are listed
                        failed[unit.name] = str(error) or type(error).__name__
                        say(f"{unit.name}: FAILED after {took:.0f} s: {failed[unit.name]}")
                    else:
                        done.add(unit.name)
                        say(f"{unit.name}: {took:.0f} s; {len(units) - len(done) - len(failed)} to go")
        except KeyboardInterrupt:
            bench.stop()
            raise
    return failed
