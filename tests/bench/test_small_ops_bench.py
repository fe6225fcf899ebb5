"""The benches of Level-2 noise and of the denoising loss: who agrees is timed, who does not is refused."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "bench"
NAMES = ("cases", "timing", "offline", "small_ops", "level2_noise", "denoising_loss")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, ModuleType]]:
    """bench/ on sys.path, as when a bench is a script; taken off again."""
    sys.path.insert(0, str(BENCH))
    try:
        yield {name: importlib.import_module(name) for name in NAMES}
    finally:
        sys.path.remove(str(BENCH))
        for name in NAMES:
            sys.modules.pop(name, None)


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIDIFF_FAST_IMPL", "reference")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize(
    ("op", "case", "passes"),
    [
        ("level2_noise", "pusht-v-both", {"draw_ms"}),
        ("level2_noise", "smolvla-flow", {"draw_ms"}),
        ("denoising_loss", "pusht-masked", {"forward_ms", "train_ms"}),
    ],
)
def test_everyone_agrees_and_is_timed(modules, monkeypatch, op, case, passes, capsys) -> None:
    suite = modules[op]
    small = replace(suite.CASES[case], B=3, K=5, T=7)
    monkeypatch.setitem(suite.CASES, case, small)
    (cell,) = suite.run(CPU, 30.0, cases=[case], repeats=3)
    assert len(cell["contestants"]) >= 3
    for name, record in cell["contestants"].items():
        assert record["status"] == "ok", (name, record)
        assert {key for key in record if key.endswith("_ms")} == passes
        assert all(len(record[key]) == 3 for key in passes)
    assert case in capsys.readouterr().out
    assert suite.run(CPU, 0.0, cases=[case]) == []


def test_what_is_wrong_is_refused(modules) -> None:
    noise, loss = modules["level2_noise"], modules["denoising_loss"]
    p = noise.prepare(replace(noise.CASES["pusht"], B=4), torch.float32, CPU)

    def contestant(function):
        return modules["small_ops"].Contestant("wrong", "", False, {"draw": function, "train": function})

    drawn = noise.eager(False, p)
    assert noise.refusal(contestant(lambda p: drawn), p) is None
    assert "x is off by" in noise.refusal(contestant(lambda p: drawn._replace(x=drawn.x * 1.001)), p)
    assert "variance" in noise.refusal(contestant(lambda p: drawn._replace(noise=drawn.noise * 1.1)), p)
    q = loss.prepare(replace(loss.CASES["pusht"], B=4), torch.float32, CPU)
    assert loss.refusal(contestant(lambda p: loss.train(loss.eager, p)), q) is None
    assert "loss is off by" in loss.refusal(contestant(lambda p: loss.train(lambda r: loss.eager(r) * 1.001, p)), q)
