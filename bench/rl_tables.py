"""The Markdown tables of ``bench/run.py rl-update``, out of its JSON."""

from __future__ import annotations

import statistics
from typing import Any

WHAT = {
    "image-mlp": "two 96x96 images a decision, ResNet-18 with group norm; MLP denoiser",
    "image-unet": "two 96x96 images a decision, ResNet-18 with group norm; U-Net denoiser (64, 128, 256 channels)",
    "state-mlp": "keypoints, residual MLP encoder; MLP denoiser",
}


def policy_table(name: str, cells: dict[str, dict[str, Any]]) -> str:
    """One policy: a row per K and side."""
    first = next(iter(cells.values()))
    lines = [
        f"\n**{name}**: {WHAT.get(name, '')}; B = {first['B']} decisions",
        "",
        "| K | side | update ms | min to max | / flat | encoded | rows | saved MB | peak MB | max rel. diff. |",
        "|" + "---|" * 10,
    ]
    for cell in cells.values():
        base = statistics.median(cell["sides"]["flat"]["times_ms"])
        for side, found in cell["sides"].items():
            times = found["times_ms"]
            middle = statistics.median(times)
            encoded = f"{found['images']} images" if found["images"] else f"{found['observations']} obs."
            lines.append(
                f"| {cell['K']} | {side} | {middle:.1f} | {min(times):.1f} to {max(times):.1f} | "
                f"**{middle / base:.3f}** | {encoded} | {found['denoiser_rows']} | {found['saved_bytes'] / 1e6:.1f} | "
                f"{found['peak_bytes'] / 1e6:.1f} | {cell['errors'][side]:.1e} |"
            )
    return "\n".join(lines)


def variance_table(results: dict[str, dict[str, Any]]) -> str:
    """A row per K."""
    first = next(iter(results.values()))
    lines = [
        f"\n**Variance of the actor's gradient at equal pairs**: keypoints policy after {first['imitation_steps']} "
        f"imitation steps, {first['decisions']} stored decisions",
        "",
        "| K | level2 / flat | 95 % interval |",
        "|---|---|---|",
    ]
    for cell in results.values():
        low, high = cell["interval"]
        lines.append(f"| {cell['K']} | **{cell['ratio']:.3f}** | {low:.3f} to {high:.3f} |")
    return "\n".join(lines)


def tables(document: dict[str, Any]) -> str:
    """All of a results file."""
    by_case: dict[str, dict[str, Any]] = {}
    for key, cell in document["cells"].items():
        by_case.setdefault(cell["case"]["name"], {})[key] = cell
    parts = [policy_table(name, cells) for name, cells in by_case.items()]
    return "\n".join([*parts, *([variance_table(document["variance"])] if document.get("variance") else [])])
