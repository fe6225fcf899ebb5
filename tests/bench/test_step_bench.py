"""The step suite: its contestants agree, a case runs, bad input is refused."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).resolve().parents[2] / "bench" / "step.py"
CPU = torch.device("cpu")


@pytest.fixture
def step(monkeypatch):
    monkeypatch.setenv("MINIDIFF_FAST_IMPL", "reference")
    spec = importlib.util.spec_from_file_location("bench_step", PATH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_step", module)
    spec.loader.exec_module(module)
    tiny = module.Case("tiny", (8, 16, 16), 3, K=3, B=2)
    monkeypatch.setattr(module, "CASES", {"tiny": tiny})
    return module


def test_contestants_agree_and_a_difference_is_refused(step):
    case = step.CASES["tiny"]
    group, inputs = step.contestants(case, CPU), step.draw(case, CPU)
    errors = step.verify(group, inputs)
    assert set(errors) == {"repeat", "reference", "ours"} and max(errors.values()) < 1e-4
    with torch.no_grad():
        group["ours"].model.final_conv[1].weight.add_(0.1)
    with pytest.raises(SystemExit, match="ours differs from repeat by .* nothing is timed"):
        step.verify(group, inputs)


def test_a_run_prints_a_table_and_writes_every_repeat(step, tmp_path, capsys):
    assert step.main(["--device", "cpu", "--repeats", "3", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "tiny   B = 2" in printed and "repeat" in printed and "1.00x" in printed
    cell = json.loads((tmp_path / "step.json").read_text())["cells"]["tiny"]
    assert all(len(rounds) == 3 and set(rounds[0]) == set(step.PHASES) for rounds in cell["times_ms"].values())
    assert cell["saved_bytes"]["ours"] > 0


def test_bad_input_and_an_empty_budget(step, capsys):
    assert step.main(["--cases", "none"]) == 2
    assert "unknown none; there are: tiny" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        step.main(["--budget", "soon"])
    assert [step.seconds_of(text) for text in ("90", "90s", "9m")] == [90.0, 90.0, 540.0]
    assert step.main(["--device", "cpu", "--budget", "0s"]) == 0
    assert "stopped at the budget of 0 s: 1 cells left" in capsys.readouterr().out
