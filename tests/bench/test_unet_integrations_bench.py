"""The benches of the U-Net policies: small, their sides agree."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "bench"
CPU = torch.device("cpu")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """bench/ on sys.path, as when run.py is a script; both as they were afterwards."""
    monkeypatch.setenv("MINIDIFF_FAST_IMPL", "reference")
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])
    integrations, lerobot, other = (
        importlib.import_module(name)
        for name in ("integrations", "integration_lerobot_diffusion", "integration_diffusion_policy")
    )
    for module in (lerobot, other):
        monkeypatch.setattr(module, "WIDTHS", (16, 32))
        monkeypatch.setattr(module, "SIZE", 32)
    yield integrations, lerobot, other
    for name in set(sys.modules) - before:
        if str(BENCH) in str(getattr(sys.modules[name], "__file__", "")) or name == "diffusion_policy_plain":
            del sys.modules[name]


@pytest.mark.parametrize("kind", ["images", "lowdim", "transformer"])
def test_sides_of_diffusion_policy_agree(bench: Any, kind: str) -> None:
    integrations, _, module = bench
    errors = integrations.verify(module.build(2, CPU, kind))
    assert list(errors) == ["repeat", "encode once", "ours"] and max(errors.values()) < 1e-4


def test_sides_of_lerobot_agree(bench: Any, lerobot: Any) -> None:
    integrations, module, _ = bench
    errors = integrations.verify(module.build(2, CPU))
    assert list(errors) == ["repeat", "encode once", "ours"] and max(errors.values()) < 1e-4
