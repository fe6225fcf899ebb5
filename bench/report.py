"""Tables and figures of a results folder: ``python bench/report.py DIR [--no-figures]``.

Reads DIR/attention.json; writes DIR/table.md (and prints it) and, with matplotlib, DIR/attention_*.png.
Every cell is in the table, the losing ones too, and again in a list of their own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]
BASELINES = ("fold", "merge", "masked")
ORDINARY = ("repeat", "concat")


def median(record: Record, which: str) -> float:
    """Milliseconds."""
    return statistics.median(record[f"{which}_ms"])


def timed(cell: Record) -> dict[str, Record]:
    """The contestants that have a number."""
    return {name: record for name, record in cell["contestants"].items() if record["status"] == "ok"}


def best(cell: Record, which: str, families: tuple[str, ...] | None = None) -> tuple[str, Record] | None:
    """The fastest contestant that is not ours; ``families`` are the names before a backend's."""
    peers = {
        name: record
        for name, record in timed(cell).items()
        if not record["ours"] and (families is None or name.split("-")[0] in families)
    }
    return min(peers.items(), key=lambda item: median(item[1], which)) if peers else None


def memory_mb(record: Record) -> str:
    """Peak on a GPU, what autograd saves on a CPU."""
    memory = record["memory"]
    bytes_ = memory["saved"] if memory["peak"] is None else memory["peak"]
    return f"{bytes_ / 1e6:.1f}"


def _ratio(peer: tuple[str, Record] | None, ours: Record, which: str) -> str:
    return "-" if peer is None else f"{median(peer[1], which) / median(ours, which):.2f}"


def rows(document: Record, dtype: str) -> Iterator[list[str]]:
    """One table row per cell of a dtype."""
    for cell in ordered(document, dtype):
        head = [cell["case"]["name"], str(cell["K"])]
        ours, rival = timed(cell).get("ours"), best(cell, "train")
        name, time, memory = ("-", "-", "-")
        if rival is not None:
            name, time, memory = rival[0], f"{median(rival[1], 'train'):.3f}", memory_mb(rival[1])
        if ours is None:
            reason = cell["contestants"].get("ours", {}).get("status", "not run")
            yield [*head, reason, name, time, "-", "-", "-", "-", memory, "-", "-"]
            continue
        yield [
            *head,
            f"{median(ours, 'train'):.3f}",
            name,
            time,
            _ratio(rival, ours, "train"),
            _ratio(best(cell, "train", BASELINES), ours, "train"),
            _ratio(best(cell, "train", ORDINARY), ours, "train"),
            memory_mb(ours),
            memory,
            f"{100 * cell['floor_ms']['train'] / median(ours, 'train'):.0f} %",
            _ratio(best(cell, "forward"), ours, "forward"),
        ]


def ordered(document: Record, dtype: str) -> list[Record]:
    """Cells of a dtype by case, in the order they came, then by K."""
    cells = [cell for cell in document["cells"].values() if cell["dtype"] == dtype]
    names = list(dict.fromkeys(cell["case"]["name"] for cell in cells))
    return sorted(cells, key=lambda cell: (names.index(cell["case"]["name"]), cell["K"]))


def dtypes(document: Record) -> list[str]:
    """In the order they were measured."""
    return list(dict.fromkeys(cell["dtype"] for cell in document["cells"].values()))


def losses(document: Record) -> list[str]:
    """Every cell and pass in which a peer was faster than ours."""
    lines = []
    for key, cell in document["cells"].items():
        ours = timed(cell).get("ours")
        for which, label in (("train", "forward + backward"), ("forward", "forward")):
            rival = best(cell, which)
            if ours is None or rival is None:
                continue
            a, b = median(ours, which), median(rival[1], which)
            if b < a:
                lines.append(f"- {key}, {label}: ours {a:.3f} ms, {rival[0]} {b:.3f} ms, {a / b:.2f} times as long")
    return lines


def without_number(document: Record) -> list[str]:
    """Contestants that were refused by verification or broke, with the figures."""
    return [
        f"- {key}, {name}: {record['status']}: {record['reason']}"
        for key, cell in document["cells"].items()
        for name, record in cell["contestants"].items()
        if record["status"] in ("refused", "error")
    ]


def markdown(document: Record) -> str:
    """The whole of table.md."""
    memory = "peak" if document["device"]["kind"] == "cuda" else "saved by autograd"
    versions = ", ".join(f"{name} {value}" for name, value in document["versions"].items() if value)
    commit = f"{(document['commit'] or 'unknown')[:12]}{' with local changes' if document['dirty'] else ''}"
    lines = [
        f"# broadcast_attention on {document['device']['name']}",
        "",
        f"{versions}; {document['threads']} CPU thread(s); commit {commit}, source {document['source']};",
        f"`{document['scale']}` sizes. Medians of up to {document['repeats']} interleaved repeats.",
        f"Times are forward + backward in ms; memory is MB, {memory}, inputs excluded.",
        "Ratios above 1: ours is faster.",
    ]
    header = [
        "case", "K", "ours ms", "best peer", "its ms", "best peer / ours", "fold or merge / ours",
        "repeat or concat / ours", "ours MB", "its MB", "of floor", "forward: best peer / ours",
    ]  # fmt: skip
    for dtype in dtypes(document):
        implementations = {
            record["implementation"]
            for cell in ordered(document, dtype)
            if (record := cell["contestants"].get("ours")) and record["implementation"]
        }
        lines += ["", f"## {dtype} (ours runs as {', '.join(sorted(implementations)) or 'nothing'})", ""]
        lines += [_line(header), _line(["---"] * len(header))]
        lines += [_line(row) for row in rows(document, dtype)]
    lines += ["", "## Where ours loses", ""]
    lines += losses(document) or ["In no cell measured."]
    lines += ["", "## Without a number", ""]
    lines += without_number(document) or ["Every contestant that could run agreed with float64."]
    return "\n".join(lines) + "\n"


def _line(values: list[str]) -> str:
    return "| " + " | ".join(values) + " |"


def draw(document: Record, folder: Path) -> list[Path]:
    """Time and memory against K, one panel a case, and the ratio of every cell; one set per dtype."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    written = []
    for dtype in dtypes(document):
        cells = ordered(document, dtype)
        title = f"broadcast_attention, {dtype}, {document['device']['name']}"
        figures = {
            "time": _panels(plt, cells, "forward + backward, ms", lambda record: median(record, "train")),
            "memory": _panels(plt, cells, "memory, MB", lambda record: float(memory_mb(record))),
            "ratio": _ratios(plt, cells),
        }
        for name, figure in figures.items():
            figure.suptitle(title)
            written.append(_store(figure, folder / f"{document['suite']}_{name}_{dtype}.png"))
            plt.close(figure)
    return written


def _panels(plt: Any, cells: list[Record], label: str, value: Callable[[Record], float]) -> Any:
    """One panel a case, one line a contestant, K on the horizontal axis."""
    cases = list(dict.fromkeys(cell["case"]["name"] for cell in cells))
    contestants = list(dict.fromkeys(name for cell in cells for name in timed(cell)))
    colors = {name: plt.get_cmap("tab20")(i % 20) for i, name in enumerate(contestants)}
    columns = min(4, len(cases))
    lines = -(-len(cases) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4 * columns, 1 + 3.2 * lines), squeeze=False)
    for axis in axes.flat[len(cases) :]:
        axis.set_axis_off()
    for axis, case in zip(axes.flat, cases, strict=False):
        of_case = [cell for cell in cells if cell["case"]["name"] == case]
        for name in contestants:
            points = [(cell["K"], value(timed(cell)[name])) for cell in of_case if name in timed(cell)]
            style = {"color": colors[name], "linewidth": 2.5 if name == "ours" else 1, "markersize": 3}
            axis.plot([K for K, _ in points], [y for _, y in points], marker="o", **style)
        axis.set(title=case, xscale="log", yscale="log", xlabel="K, samples per condition", ylabel=label)
        ticks = [cell["K"] for cell in of_case]
        axis.set_xticks(ticks, [str(K) for K in ticks])
        axis.minorticks_off()
    handles = [plt.Line2D([], [], color=colors[name], label=name) for name in contestants]
    figure.legend(handles=handles, loc="lower center", ncols=min(8, max(1, len(contestants))))
    figure.tight_layout(rect=(0, 0.08, 1, 0.97))
    return figure


def _ratios(plt: Any, cells: list[Record]) -> Any:
    """One bar a cell: time of ours over the time of the best peer; left of the line ours wins."""
    bars = []
    for cell in cells:
        ours, rival = timed(cell).get("ours"), best(cell, "train")
        if ours is not None and rival is not None:
            ratio = median(ours, "train") / median(rival[1], "train")
            bars.append((f"{cell['case']['name']}, K = {cell['K']} ({rival[0]})", ratio))
    figure, axis = plt.subplots(figsize=(9, 1.2 + 0.28 * len(bars)))
    bars.reverse()
    colors = ["tab:green" if ratio <= 1 else "tab:red" for _, ratio in bars]
    axis.barh([name for name, _ in bars], [ratio - 1 for _, ratio in bars], left=1.0, color=colors)
    axis.axvline(1.0, color="black", linewidth=1)
    axis.set(xscale="log", xlabel="time of ours / time of the best peer, forward + backward")
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    return figure


def _store(figure: Any, path: Path) -> Path:
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png", dpi=130)
    temporary.replace(path)
    return path


def main(argv: list[str] | None = None) -> int:
    """Write and print; the exit code."""
    parser = argparse.ArgumentParser(prog="bench/report.py", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--no-figures", action="store_true", help="the table alone; needs no matplotlib")
    arguments = parser.parse_args(argv)
    path = arguments.folder / "attention.json"
    try:
        document = json.loads(path.read_text())
        text = markdown(document)
        table = arguments.folder / "table.md"
        temporary = table.with_name(table.name + ".tmp")
        temporary.write_text(text)
        temporary.replace(table)
    except OSError as error:
        print(f"bench/report.py: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except (ValueError, KeyError, TypeError) as error:
        print(f"bench/report.py: {path} holds no results of this suite ({error!r})", file=sys.stderr)
        return 2
    print(text, end="")
    if arguments.no_figures:
        return 0
    try:
        for figure in draw(document, arguments.folder):
            print(figure, file=sys.stderr)
    except ImportError as error:
        print(f"bench/report.py: {error}; pip install matplotlib, or give --no-figures", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
