"""What ``pusht_finetune.py`` measured, as gains with intervals, a table and a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

Record = dict[str, Any]
Sampler = Literal["deterministic", "stochastic"]
SAMPLERS: tuple[Sampler, ...] = ("deterministic", "stochastic")
DRAWS = 10_000
NAMES = {
    "bc": "BC", "control": "BC, compute-matched", "dppo": "DPPO", "flow": "BC (flow)",
    "flow-control": "BC (flow), compute-matched", "fpo": "FPO", "reinflow": "ReinFlow", "awr": "AWR",
    "flat": "DPPO, flat pairs",
}  # fmt: skip


class Gain(NamedTuple):
    """A difference of two success rates, and what it is known to."""

    mean: float
    """First minus second."""
    low: float
    """2.5 % quantile."""
    high: float
    """97.5 % quantile."""
    per_seed: tuple[float, ...]
    """The difference of each training seed."""

    @property
    def gains(self) -> bool:
        """Whether the whole interval is above 0."""
        return self.low > 0.0


class Comparison(NamedTuple):
    """Which runs are set against which, on what."""

    title: str
    first: tuple[str, ...]
    """Runs, one per training seed."""
    second: tuple[str, ...]
    """Runs of the same seeds."""
    variant: str
    """Task of the evaluation."""


def paired_gain(
    first: np.ndarray,  # [seeds, episodes]
    second: np.ndarray,  # [seeds, episodes]
    draws: int = DRAWS,
) -> Gain:
    """Mean of ``first - second`` and its 95 % interval: a percentile bootstrap over seeds and episodes.

    Both runs of a row began as the same policy, and a column is the same start in all rows: so differences are taken
    first, and a draw takes rows and columns with replacement, each once for the whole table (crossed, not nested). With
    one row only the episodes are drawn, and the interval says nothing about other training seeds; with three rows it is
    still somewhat narrow, as drawing n of n gives (n - 1) / n of the variance between them.

    Raises ValueError for tables that are not [seeds, episodes] of one shape with at least one entry.
    """
    one, two = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if one.shape != two.shape or one.ndim != 2 or one.size == 0:
        raise ValueError(f"paired_gain: both must be [seeds, episodes] of one shape, got {one.shape} and {two.shape}")
    difference = one - two
    seeds, episodes = difference.shape
    random = np.random.default_rng(0)
    rows = random.integers(seeds, size=(draws, seeds))
    columns = random.integers(episodes, size=(draws, episodes))
    of_episodes = difference[rows].mean(axis=1)  # [draws, episodes]
    means = np.take_along_axis(of_episodes, columns, axis=1).mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Gain(float(difference.mean()), float(low), float(high), tuple(difference.mean(axis=1).tolist()))


def best_sampler(evaluation: Record) -> Sampler:
    """The sampler with more successes on the validation starts, then the higher score, then the deterministic one."""

    def merit(sampler: Sampler) -> tuple[float, float]:
        found = evaluation["validation"][sampler]
        return float(np.mean(found["success"])), float(np.mean(found["score"]))

    return max(SAMPLERS, key=merit)


def successes(document: Record, run: str, variant: str) -> np.ndarray:  # [episodes]
    """Of a run on the test starts, with its best sampler."""
    evaluation = document["evaluations"][f"{run}@{variant}"]
    return np.asarray(evaluation["test"][best_sampler(evaluation)]["success"], np.float64)


def comparisons(seeds: Sequence[int], variant: str, transfer: str) -> list[Comparison]:
    """What the bench is about; those whose runs are missing are left out by :func:`gains`."""

    def runs(kind: str) -> tuple[str, ...]:
        return tuple(f"{kind}-{seed}" for seed in seeds)

    one = seeds[0]
    return [
        Comparison("DPPO against compute-matched BC", runs("dppo"), runs("control"), "stock"),
        Comparison("DPPO against its start", runs("dppo"), runs("bc"), "stock"),
        Comparison("compute-matched BC against its start", runs("control"), runs("bc"), "stock"),
        Comparison(f"DPPO on {variant} against compute-matched BC", runs("dppo-variant"), runs("control"), variant),
        Comparison(f"DPPO on {variant} against its start", runs("dppo-variant"), runs("bc"), variant),
        Comparison(f"stock's DPPO on {transfer} against compute-matched BC", runs("dppo"), runs("control"), transfer),
        Comparison(f"stock's DPPO on {transfer} against its start", runs("dppo"), runs("bc"), transfer),
        Comparison("AWR against compute-matched BC", (f"awr-{one}",), (f"control-{one}",), "stock"),
        Comparison("AWR against its start", (f"awr-{one}",), (f"bc-{one}",), "stock"),
        *(
            Comparison(f"{NAMES[kind]} against {what}", (f"{kind}-{one}",), (f"{other}-{one}",), "stock")
            for kind in ("fpo", "reinflow")
            for other, what in (("flow-control", "compute-matched BC (flow)"), ("flow", "its start"))
        ),
    ]


def gains(document: Record) -> list[Record]:
    """Every comparison whose runs are all there."""
    found = []
    settings = document["settings"]
    for comparison in comparisons(settings["seeds"], settings["variant"], settings["transfer"]):
        keys = [f"{run}@{comparison.variant}" for run in (*comparison.first, *comparison.second)]
        if any(key not in document["evaluations"] for key in keys):
            continue
        first, second = (
            np.stack([successes(document, run, comparison.variant) for run in side])
            for side in (comparison.first, comparison.second)
        )
        gain = paired_gain(first, second)
        found.append({**comparison._asdict(), **gain._asdict(), "gains": gain.gains})
    return found


def markdown(document: Record) -> str:
    """Two tables: the policies, and the comparisons."""
    settings = document["settings"]
    lines = [
        f"Push-T, {document['device']['name']}, torch {document['versions']['torch']}, commit "
        f"{str(document['commit'])[:10]}; {settings['threads']} thread a run, {settings['workers']} runs side by side.",
        "",
        f"Success on {settings['test_episodes']} unseen starts (seeds {settings['test_seed']}..). The best sampler is "
        f"the one that did better on {settings['validation_episodes']} others (seeds {settings['validation_seed']}..). "
        "CPU s: processor time of training and collecting, beyond the start where there is one. Noise of the "
        f"stochastic sampler: {settings['min_std']} of the normalised action, {settings['variant_min_std']} on "
        f"{settings['variant']}.",
        "",
        "| policy | task | seeds | CPU s | env steps | deterministic | stochastic | best sampler |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (kind, variant), runs in _grouped(document).items():
        lines.append(_policy_row(document, kind, variant, runs))
    lines += [
        "",
        "Gain of success, best sampler against best sampler, 95 % bootstrap interval over seeds and episodes, paired:",
        "",
        "| comparison | task | seeds | gain | 95 % interval | each seed | |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in document["gains"]:
        each = ", ".join(f"{value:+.3f}" for value in row["per_seed"])
        verdict = "gains" if row["gains"] else ("loses" if row["high"] < 0.0 else "no difference shown")
        verdict += "" if len(row["first"]) > 1 else " (one run)"
        lines.append(
            f"| {row['title']} | {row['variant']} | {len(row['first'])} | {row['mean']:+.3f} | "
            f"[{row['low']:+.3f}, {row['high']:+.3f}] | {each} | {verdict} |"
        )
    lines += [
        "",
        "An interval of one run speaks of its episodes alone, not of other training seeds. The control goes on from "
        "the same checkpoint, its cosine schedule stretched over the longer run, so that its learning rate rises again "
        f"to where that schedule is. On {settings['variant']} DPPO trains on the task itself; the demonstrations that "
        f"the control imitates begin at stock starts. On {settings['transfer']} nothing trained but where it says so.",
    ]
    if len(document.get("sources", ())) > 1:
        lines += ["", f"**The runs are of {len(document['sources'])} different states of the code.**"]
    return "\n".join([*lines, *_cost_lines(document)]) + "\n"


def _cost_lines(document: Record) -> list[str]:
    """What the same iterations cost with one encode a decision, and with one for every denoising step."""
    seed = document["settings"]["seeds"][0]
    both = [document["runs"].get(f"{kind}-{seed}") for kind in ("dppo", "flat")]
    if None in both:
        return []
    lines = [
        "",
        f"DPPO of seed {seed} over the same environment steps, one encode a decision against one a denoising step:",
        "",
        "| encodes | iterations | env steps | encoder passes | wall-clock s | CPU s |",
        "|---|---|---|---|---|---|",
    ]
    for name, run in zip(("Level-2", "flat"), both, strict=True):
        assert run is not None
        lines.append(
            f"| {name} | {run['step']} | {run['env_steps'] / 1e6:.2f} M | {run['encoder_passes'] / 1e6:.2f} M | "
            f"{run['seconds']:.0f} | {run['cpu_seconds']:.0f} |"
        )
    return lines


def kind_of(run: str) -> str:
    """
    >>> kind_of("flow-control-0")
    'flow-control'
    """
    return run.rsplit("-", 1)[0]


def _grouped(document: Record) -> dict[tuple[str, str], list[str]]:
    groups: dict[tuple[str, str], list[str]] = {}
    for key in document["evaluations"]:
        run, variant = key.split("@")
        groups.setdefault((kind_of(run), variant), []).append(run)
    order = list(NAMES)
    return dict(
        sorted(groups.items(), key=lambda item: (item[0][1] != "stock", item[0][1], order.index(_plain(item[0][0]))))
    )


def _plain(kind: str) -> str:
    return kind.removesuffix("-variant")


def _policy_row(document: Record, kind: str, variant: str, runs: list[str]) -> str:
    evaluations = [document["evaluations"][f"{run}@{variant}"] for run in runs]
    trained = [document["runs"][run] for run in runs]
    rates = [float(np.mean([np.mean(found["test"][name]["success"]) for found in evaluations])) for name in SAMPLERS]
    best = float(np.mean([successes(document, run, variant).mean() for run in runs]))
    cpu = float(np.mean([run["cpu_seconds"] for run in trained]))
    steps = [run.get("env_steps") for run in trained]
    env_steps = "" if None in steps else f"{np.mean(steps) / 1e6:.2f} M"
    return (
        f"| {NAMES[_plain(kind)]}{', trained there' if kind != _plain(kind) else ''} | {variant} | {len(runs)} | "
        f"{cpu:.0f} | {env_steps} | {rates[0]:.3f} | {rates[1]:.3f} | **{best:.3f}** |"
    )


def curves(document: Record) -> dict[str, list[Record]]:
    """Label -> evaluations on the way of the two DPPO runs that encode differently, their common start first."""
    from minidiff_fast.tasks.pusht.evaluation import wilson_interval

    seed, found = document["settings"]["seeds"][0], {}
    start = document["evaluations"].get(f"bc-{seed}@stock")
    for kind, label in (("dppo", "Level-2: one encode a decision"), ("flat", "flat: one encode a denoising step")):
        run = document["runs"].get(f"{kind}-{seed}")
        if run is None or start is None:
            continue
        outcomes = start["validation"]["stochastic"]["success"]  # what the runs evaluate themselves on
        first = {
            "seconds": 0.0, "env_steps": 0, "success_rate": float(np.mean(outcomes)),
            "success_interval": wilson_interval(sum(outcomes), len(outcomes)),
        }  # fmt: skip
        found[label] = [first, *run["curve"]]
    return found


def draw(curves: Mapping[str, Sequence[Record]], path: Path) -> Path:
    """Success over training time and over environment steps, of runs that differ in how they encode.

    Args:
        curves: label -> rows of kind ``eval``, each with seconds, env_steps, success_rate, success_interval.
        path: the .png.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 3.8), layout="constrained")
    for axes, (key, scale, label) in zip(
        figure.subplots(1, 2, sharey=True),
        (
            ("seconds", 60.0, "wall-clock of collecting and training, minutes"),
            ("env_steps", 1e6, "environment steps, M"),
        ),
        strict=True,
    ):
        for name, rows in curves.items():
            places = [row[key] / scale for row in rows]
            lines = axes.plot(places, [row["success_rate"] for row in rows], marker="o", markersize=3, label=name)
            low, high = zip(*(row["success_interval"] for row in rows), strict=True)
            axes.fill_between(places, low, high, alpha=0.15, color=lines[0].get_color())
        axes.set(xlabel=label, ylabel="success (95 % interval)")
        axes.set_xlim(left=0.0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=120)
    temporary.replace(path)
    return path
