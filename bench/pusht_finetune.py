"""Does fine-tuning by reinforcement learning gain on Push-T, and over the same processor time of more imitation?

    python bench/pusht_finetune.py [--work DIR] [--out DIR] [--seeds 3] [--budget 5m] [--variant near-goal] ...

For each seed: imitation of 100 demonstrations and their mirror images (``bc``); DPPO from it on stock Push-T
(``dppo``) and on a shifted task (``dppo-variant``); and the control: the same policy imitates on for the processor time
that DPPO took (``control``). For the first seed also AWR, a flow policy with FPO, ReinFlow and its own control, and
DPPO with an encode for every denoising step (``flat``) over the same environment steps. What was trained on stock is
also evaluated with a limit of 100 steps. Every policy is evaluated with its deterministic and its stochastic sampler on
500 unseen starts; which of the two stands for it is decided on 200 others.

Each run is a folder under --work and is done once; run again to go on. Results: pusht_finetune.json, .md and .png in
--out (with another --variant pusht_finetune_<variant>.json, ...). Exit code 0: done; 1: a run failed, the rest is
there; 2: bad input; 130: interrupted.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pusht_finetune_report as report
from pusht_finetune_runs import PRETRAIN_STEPS, Bench, Settings, Unit, execute, plan

Record = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
NAME = "pusht_finetune"


class BadInput(Exception):
    """One line for stderr; exit code 2."""


def document(settings: Settings, bench: Bench, units: Sequence[Unit], failed: dict[str, str]) -> Record:
    """Everything that was measured, every episode's outcome included, and what follows from it."""
    import run as suites
    import torch

    results = {unit.name: found for unit in units if (found := bench.result(unit.name)) is not None}
    made: Record = {
        "suite": NAME, "schema": 1, **suites.environment(torch.device("cpu")), "threads": settings.threads,
        "settings": asdict(settings),
        "runs": {name: found for name, found in results.items() if "@" not in name},
        "evaluations": {name: found for name, found in results.items() if "@" in name},
        "failed": failed, "sources": sorted({found.get("source", "") for found in results.values()}),
    }  # fmt: skip
    for package in ("gymnasium", "gym-pusht", "pymunk", "diffusers"):
        made["versions"][package] = suites._version(package)
    made["gains"] = report.gains(made)
    return made


def evaluate_run(folder: Path, variant: str, settings: Settings) -> Record:
    """Success and score of every episode, by both samplers, on the validation and the test starts."""
    import torch

    from minidiff_fast.training.pusht import evaluate_checkpoint

    torch.set_num_threads(settings.threads)
    found: Record = {}
    for part, seed, episodes in (
        ("validation", settings.validation_seed, settings.validation_episodes),
        ("test", settings.test_seed, settings.test_episodes),
    ):
        found[part] = {}
        for sampler in report.SAMPLERS:
            result = evaluate_checkpoint(
                folder, sampler=sampler, min_std=settings.noise(variant), variant=variant, episodes=episodes, seed=seed,
            )  # fmt: skip
            found[part][sampler] = {
                "success": [int(value) for value in result.successes],
                "score": [round(value, 4) for value in result.scores],
            }
    return found


def open_work(work: Path, settings: Settings) -> None:
    """Make the folder, or check that it holds runs of these settings."""
    path = work / "settings.json"
    mine = json.loads(json.dumps(asdict(settings)))
    if path.is_file():
        there = json.loads(path.read_text())
        wrong = [name for name in mine if name != "workers" and mine[name] != there.get(name)]
        if wrong:
            raise BadInput(
                f"--work {work}: was begun with another {wrong[0]} ({there.get(wrong[0])}, now {mine[wrong[0]]}); "
                "name another folder"
            )
        return
    if work.is_dir() and any(work.iterdir()):
        raise BadInput(f"--work {work}: is not empty and holds no runs of this bench; name another folder")
    work.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(mine, indent=1) + "\n")


def as_text(made: Record) -> str:
    """JSON with each list of numbers on one line: thousands of episodes, readable in a diff.

    >>> print(as_text({"a": [1, 2.5], "b": {"c": []}}), end="")
    {
     "a": [1, 2.5],
     "b": {
      "c": []
     }
    }
    """
    text = json.dumps(made, indent=1)
    return re.sub(r"\[\s+([-+\d.eE,\s]+?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    import run as suites

    parser = argparse.ArgumentParser(
        prog="bench/pusht_finetune.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / NAME, help="runs; default: runs/pusht_finetune")
    parser.add_argument("--out", type=Path, help="folder of the results; default: bench/results/<device>")
    parser.add_argument("--seeds", type=int, default=3, help="training seeds; default: 3")
    parser.add_argument(
        "--budget",
        type=suites.seconds_of,
        default=300.0,
        help="of a DPPO run; default: 5m; half for AWR, FPO, ReinFlow",
    )
    parser.add_argument("--pretrain-steps", type=int, default=PRETRAIN_STEPS)
    parser.add_argument(
        "--variant", choices=("near-goal", "time-limit"), default=Settings.variant, help="the shifted task"
    )
    parser.add_argument("--workers", type=int, default=2, help="runs side by side, one thread each; default: 2")
    parser.add_argument("--budget-scale", type=float, default=1.0, help="a share of steps, time and episodes: 0.02")
    parser.add_argument("--evaluate", nargs=4, metavar=("RUN", "TASK", "FILE", "SETTINGS"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run; the exit code."""
    import run as suites
    import torch

    arguments = parse(argv)
    if arguments.evaluate is not None:  # one evaluation, in a process of its own
        folder, task, file, settings_text = arguments.evaluate
        found = evaluate_run(Path(folder), task, Settings(**json.loads(settings_text)))
        Path(file).write_text(json.dumps(found) + "\n")
        return 0
    try:
        if min(arguments.seeds, arguments.workers, arguments.pretrain_steps) < 1 or not arguments.budget_scale > 0.0:
            raise BadInput("--seeds, --workers and --pretrain-steps must be at least 1, --budget-scale above 0")
        settings = Settings(
            seeds=tuple(range(arguments.seeds)), budget_seconds=arguments.budget, workers=arguments.workers,
            pretrain_steps=arguments.pretrain_steps, variant=arguments.variant,
        ).scaled(arguments.budget_scale)  # fmt: skip
        work = arguments.work.resolve()
        open_work(work, settings)
        device = suites.slug(suites.device_name(torch.device("cpu")))
        out = (arguments.out or ROOT / "bench" / "results" / device).resolve()
        out.mkdir(parents=True, exist_ok=True)
    except (BadInput, OSError) as error:
        print(f"bench/pusht_finetune.py: {error}", file=sys.stderr)
        return 2
    bench, units, began = Bench(settings, work, suites._source_digest()), plan(settings), time.perf_counter()

    def say(text: str) -> None:
        print(f"[{(time.perf_counter() - began) / 60.0:5.1f} min] {text}", flush=True)

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        failed = execute(units, bench, say)
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on from {work}", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    made = document(settings, bench, units, failed)
    name = NAME if settings.variant == Settings.variant else f"{NAME}_{settings.variant.replace('-', '_')}"
    temporary = out / f"{name}.json.tmp"
    temporary.write_text(as_text(made), encoding="utf-8")
    temporary.replace(out / f"{name}.json")
    text = report.markdown(made)
    (out / f"{name}.md").write_text(text, encoding="utf-8")
    print(text, end="")
    curves = report.curves(made)
    if curves:
        report.draw(curves, out / f"{name}.png")
    for unit, why in failed.items():
        print(f"FAILED {unit}: {why}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
