"""The benches of lerobot's DiT heads: both sides are one loss with the same gradients."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, lerobot: Any) -> Iterator[Any]:
    """``import_module`` with bench/ on the path; skipped where lerobot is not to be had."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "bench"))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if name.startswith("integration") or name in ("lerobot_heads", "lerobot_wheel", "timing"):
            del sys.modules[name]


@pytest.mark.parametrize("name", ["multi_task_dit", "vla_jepa", "groot"])
def test_sides_agree(bench: Any, name: str) -> None:
    contest = bench(f"integration_{name}").build(2, torch.device("cpu"))
    assert list(contest) == ["repeat", "ours"]
    errors = bench("integrations").verify(contest)
    assert errors["ours"] < 1e-4
