"""The attention suite: contestants agree with the definition, and the runner keeps its promises."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
BENCH = REPOSITORY / "bench"
NAMES = ("cases", "peers", "merge", "verify", "timing", "broadcast_attention", "report", "run")
HELPERS = ("harness",)
CPU = torch.device("cpu")


class Modules(NamedTuple):
    """The scripts' modules, which import each other by bare names."""

    cases: ModuleType
    peers: ModuleType
    merge: ModuleType
    verify: ModuleType
    timing: ModuleType
    suite: ModuleType
    report: ModuleType
    run: ModuleType


@pytest.fixture(scope="module")
def bench() -> Iterator[Modules]:
    """bench/ on sys.path, as when run.py is a script; taken off again."""
    sys.path.insert(0, str(BENCH))
    try:
        yield Modules(*(importlib.import_module(name) for name in NAMES))
    finally:
        sys.path.remove(str(BENCH))
        for name in NAMES + HELPERS:
            sys.modules.pop(name, None)


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIDIFF_FAST_IMPL", "reference")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


TINY = {
    "plain": dict(P=0, H=3, Hkv=3, D=15),
    "lengths": dict(P=0, H=2, Hkv=2, D=18, min_length=1),
    "grouped": dict(P=0, H=6, Hkv=2, D=8),
    "memory-mask": dict(P=1, H=2, Hkv=2, D=12, memory_mask=True),
    "own": dict(P=7, H=2, Hkv=2, D=15),
    "own-causal-grouped": dict(P=4, H=6, Hkv=2, D=10, own_causal=True),
    "own-one-key-head": dict(P=3, H=4, Hkv=1, D=16, min_length=2),
    "everything": dict(P=4, H=4, Hkv=2, D=9, min_length=4, memory_mask=True, own_causal=True),
}


def tiny_case(bench: Modules, name: str):
    return bench.cases.AttentionCase(name, B=3, samples=(5,), T=4, S=6, **TINY[name])


# ------------------------------------------------------------------------------------------------ contestants


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("peer", ["ours", "ours-reference", "repeat", "expand", "concat", "fold", "merge", "masked"])
def test_contestant_agrees_with_the_definition(bench: Modules, peer: str, name: str) -> None:
    """Output and every gradient; float64 where the contestant's kernel has it, so that the bound is tight."""
    case = tiny_case(bench, name)
    contestant = next(p for p in bench.peers.contestants(CPU) if p.name == peer)
    reason = contestant.supports(case, CPU, torch.float64)
    if case.P and peer in ("repeat", "expand", "fold"):
        assert reason is not None and "own tokens" in reason
        return
    if not case.P and peer in ("concat", "merge", "masked"):
        assert reason is not None and "P = 0" in reason
        return
    assert reason is None
    (inputs,) = bench.cases.make_inputs(case, 5, torch.float64, CPU, seed=1)
    truth = bench.verify.truth_of(inputs, eps=2.0**-52)
    got = bench.verify.results(contestant.prepare(case, inputs), inputs)
    assert got.keys() == truth.tensors.keys() == {"out", *(f"d{leaf}" for leaf in inputs.leaves)}
    for tensor, exact in truth.tensors.items():
        torch.testing.assert_close(got[tensor], exact, rtol=1e-9, atol=1e-11, msg=lambda m, t=tensor: f"{t}: {m}")


@pytest.mark.parametrize("name", TINY)
def test_flex_mask_is_right(bench: Modules, name: str) -> None:
    """FlexAttention has no backward on a CPU: its visibility is checked forward and uncompiled."""
    case = tiny_case(bench, name)
    (inputs,) = bench.cases.make_inputs(case, 5, torch.float32, CPU, seed=2)
    inputs = replace(inputs, **{name: leaf.detach() for name, leaf in inputs.leaves.items()})
    with torch.no_grad():
        run = bench.peers.prepare_flex(case, inputs, compiled=False)
        torch.testing.assert_close(run(inputs), bench.verify.reference(inputs), rtol=1e-4, atol=1e-5)


def test_repeats_rotate_inputs_of_one_structure(bench: Modules) -> None:
    a, b = bench.cases.make_inputs(tiny_case(bench, "lengths"), 5, torch.float32, CPU, sets=2, seed=3)
    again, _ = bench.cases.make_inputs(tiny_case(bench, "lengths"), 5, torch.float32, CPU, sets=2, seed=3)
    assert not torch.equal(a.k, b.k) and torch.equal(a.lengths, b.lengths)
    assert torch.equal(a.k, again.k)
    assert int(a.lengths.min()) >= 1 and int(a.lengths.max()) <= 6


def test_case_table_is_complete(bench: Modules) -> None:
    """Every row of the table at both scales, with what makes it a case left alone by the scaling."""
    full, small = bench.cases.CASES["full"], bench.cases.CASES["cpu"]
    assert list(full) == list(small) and len(full) == 8
    for name, case in full.items():
        scaled = small[name]
        for field in ("H", "Hkv", "D", "memory_mask", "own_causal", "note"):
            assert getattr(case, field) == getattr(scaled, field), (name, field)
        assert (case.P > 0) == (scaled.P > 0) and (case.min_length is None) == (scaled.min_length is None)
        assert not case.own_causal or (case.P == case.T and scaled.P == scaled.T)
    assert [c.D for c in full.values()] == [18, 64, 15, 15, 48, 64, 256, 64]
    assert sum(len(c.all_samples) for c in full.values()) == 25


def test_work_counts_visible_pairs_only(bench: Modules) -> None:
    case = tiny_case(bench, "everything")
    (inputs,) = bench.cases.make_inputs(case, 5, torch.float32, CPU)
    visible = int(bench.peers.visible_keys(inputs).sum()) + 3 * int(bench.peers.visible_own(inputs).sum())
    work = bench.cases.work(case, 5, inputs, "forward")
    assert work.exponentials == visible * 5 * case.H
    assert work.flops == 4 * case.D * work.exponentials
    assert bench.cases.work(case, 5, inputs, "train").flops == pytest.approx(3.5 * work.flops)


# --------------------------------------------------------------------------------------------- verify, timing


@pytest.mark.parametrize("fault", ["output", "gradient", "nan"])
def test_a_wrong_contestant_gets_no_number(bench: Modules, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """One part in a thousand, a gradient of half its size, or NaN: refused, with figures."""
    peers = bench.peers.contestants(CPU)

    def wrong(case, inputs):
        def run(inputs):
            out = bench.verify.reference(inputs)
            if fault == "output":
                return out * 1.001
            if fault == "nan":
                return out * float("nan")
            return 0.5 * out + 0.5 * out.detach()

        return run

    liar = bench.peers.Peer("ours-liar", "ours", "wrong", lambda *_: None, wrong, lambda *_: "liar", ours=True)
    monkeypatch.setattr(bench.suite, "contestants", lambda device: [*peers, liar])
    settings = bench.suite.Settings(CPU, ("ours", "fold", "ours-liar"), repeats=3, warmup=0, seconds=5.0)
    runner = bench.suite.Bench(settings)
    cell = bench.suite.Cell(tiny_case(bench, "lengths"), 5, "fp32")
    result = runner.run(cell)
    record = result["contestants"]["ours-liar"]
    assert record["status"] == "refused" and "train_ms" not in record
    assert "budget" in record["reason"] and ("dq off by" if fault == "gradient" else "out off by") in record["reason"]
    assert bench.suite.ours_failed(result) == ["ours-liar"]
    assert len(result["contestants"]["fold"]["train_ms"]) == 3
    assert "refused: " in bench.suite.render(cell.key, result)


def test_a_contestant_that_breaks_is_a_row(bench: Modules, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(case, inputs):
        raise RuntimeError("no kernel for this shape\nlong trace")

    peer = bench.peers.Peer("bad", "bad", "breaks", lambda *_: None, broken, lambda *_: "bad")
    monkeypatch.setattr(bench.suite, "contestants", lambda device: [*bench.peers.contestants(device), peer])
    settings = bench.suite.Settings(CPU, ("fold", "bad"), repeats=1, warmup=0, seconds=1.0)
    runner = bench.suite.Bench(settings)
    cell = bench.suite.Cell(tiny_case(bench, "plain"), 5, "fp32")
    result = runner.run(cell)
    assert result["contestants"]["bad"]["status"] == "error"
    assert "bad              bad            error: RuntimeError: no kernel" in bench.suite.render(cell.key, result)
    assert bench.suite.ours_failed(result) == [] and bench.suite.context_lost(result) is None


def test_rounds_are_interleaved_and_rotated(bench: Modules) -> None:
    order: list[str] = []

    def contestant(name: str):
        def run(inputs):
            if torch.is_grad_enabled():
                order.append(name)
            return inputs.q * 1.0 + sum(leaf.sum() for leaf in inputs.leaves.values())

        return run

    inputs = bench.cases.make_inputs(tiny_case(bench, "plain"), 5, torch.float32, CPU, sets=2)
    times, errors = bench.timing.interleaved(
        {name: contestant(name) for name in "abc"},
        inputs,
        bench.timing.Clock(CPU),
        repeats=3,
        warmup=0,
        seconds=9,
    )
    assert order == list("abcbcacab") and not errors
    assert all(len(times[name][which]) == 3 for name in "abc" for which in ("forward", "train"))


def test_saved_bytes_count_storages_once_and_inputs_apart(bench: Modules) -> None:
    case = bench.cases.AttentionCase("x", B=1, samples=(2,), T=1, S=1, P=0, H=1, Hkv=1, D=8)
    (inputs,) = bench.cases.make_inputs(case, 2, torch.float32, CPU)

    def run(inputs):
        y = inputs.q.exp()  # saves its result, 64 bytes, which the product saves again
        return (y * y.view(-1).view_as(y)) * inputs.k  # saves the first product and k, an input

    memory = bench.timing.memory_of(run, inputs)
    assert (memory.saved, memory.saved_inputs, memory.peak) == (128, 32, None)


def test_floor_is_the_larger_term_of_the_best_ceilings(bench: Modules) -> None:
    loaded, idle = bench.timing.Ceilings(1e9, 4e9, None), bench.timing.Ceilings(2e9, 1e9, None)
    best = loaded.best(idle)
    assert (best.flops_per_second, best.bytes_per_second) == (2e9, 4e9) and loaded.best(None) is loaded
    assert best.floor_ms(bench.cases.Work(flops=2e6, bytes=1e6, exponentials=1e9)) == pytest.approx(1.0)
    assert best.floor_ms(bench.cases.Work(flops=0.0, bytes=8e6, exponentials=0.0)) == pytest.approx(2.0)
    with_exponentials = bench.timing.Ceilings(2e9, 4e9, 1e9)
    assert with_exponentials.floor_ms(bench.cases.Work(2e6, 1e6, 3e6)) == pytest.approx(3.0)


def test_the_interpreter_is_never_timed(bench: Modules, monkeypatch: pytest.MonkeyPatch) -> None:
    case = tiny_case(bench, "plain")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for impl, override in (("triton", "reference"), (None, "triton")):
        monkeypatch.setenv("MINIDIFF_FAST_IMPL", override)
        reason = bench.peers.why_not_ours(impl, case, CPU, torch.float32)
        assert reason is not None and "interpreter" in reason
    monkeypatch.setenv("MINIDIFF_FAST_IMPL", "reference")
    assert bench.peers.why_not_ours(None, case, CPU, torch.float32) is None


# ----------------------------------------------------------------------------------------------------- runner


def test_run_report_resume_and_refuse(
    bench: Modules, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One case end to end; the same command again runs nothing; another configuration is refused."""
    out = tmp_path / "results"
    common = ["attention", "--device", "cpu", "--cases", "pi0-joint", "--out", str(out)]
    same = [*common, "--peers", "ours,merge,fold", "--repeats", "3", "--budget", "100s"]
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    variables |= {"MINIDIFF_FAST_IMPL": "reference", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    first = subprocess.run(
        [sys.executable, str(BENCH / "run.py"), *same],
        cwd=REPOSITORY, env=variables, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert first.returncode == 0, first.stderr
    assert "pi0-joint/K=2/fp32" in first.stdout and "fwd+bwd ms" in first.stdout
    assert "not run: fold: has no place for own tokens (P = 26)" in first.stdout
    document = json.loads((out / "attention.json").read_text())
    assert document["device"]["kind"] == "cpu" and document["threads"] == torch.get_num_threads()
    assert {"python", "torch", "triton", "driver"} <= document["versions"].keys()
    assert {"commit", "dirty", "source"} <= document.keys() and len(document["cells"]) == 2
    record = document["cells"]["pi0-joint/K=2/fp32"]["contestants"]["merge"]
    assert len(record["train_ms"]) == len(record["forward_ms"]) == 3 and record["memory"]["saved"] > 0
    assert record["verify"].keys() == {"out", "dq", "dk", "dv", "down_k", "down_v"}

    here = bench.run.environment(CPU)
    assert all(here[field] == document[field] for field in ("device", "versions", "threads", "impl_override"))
    monkeypatch.setattr(bench.run, "environment", lambda device: {field: document[field] for field in here})
    assert bench.run.main(same) == 0
    assert "0 of 2 cells to run" in capsys.readouterr().out
    assert json.loads((out / "attention.json").read_text())["cells"] == document["cells"]

    assert bench.run.main([*common, "--peers", "ours,merge", "--repeats", "3"]) == 2
    error = capsys.readouterr().err
    assert "measured with another peers" in error and error.count("\n") == 1
    monkeypatch.setattr(bench.run, "environment", lambda device: {**here, "source": "edited"})
    assert bench.run.main(same) == 2
    error = capsys.readouterr().err
    assert "measured with another " in error and error.count("\n") == 1

    assert bench.report.main([str(out), "--no-figures"]) == 0
    table = capsys.readouterr().out
    assert "| pi0-joint | 2 |" in table and "## Where ours loses" in table
    assert (out / "table.md").read_text() == table
    assert sorted(path.name for path in out.iterdir()) == ["attention.json", "table.md"]


def test_budget_stops_between_cells(
    bench: Modules, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cell that would not fit is left for the next run, which starts there."""
    ran: list[str] = []

    def fake(self: object, cell) -> dict:
        ran.append(cell.key)
        return {"case": {}, "contestants": {}, "seconds": 40.0, "K": cell.K, "dtype": cell.dtype}

    monkeypatch.setattr(bench.suite.Bench, "run", fake)
    monkeypatch.setattr(bench.suite, "render", lambda key, result: key)
    clock = iter(range(0, 10_000, 40))
    monkeypatch.setattr(bench.run.time, "perf_counter", lambda: float(next(clock)) / 2)
    arguments = ["attention", "--device", "cpu", "--out", str(tmp_path), "--cases", "pusht-transformer"]
    assert bench.run.main([*arguments, "--budget", "0s"]) == 0
    assert ran == [] and "stopped at the budget of 0s: 3 cells left" in capsys.readouterr().out
    assert bench.run.main([*arguments, "--budget", "100s"]) == 0
    assert len(ran) == 2 and "1 cells left" in capsys.readouterr().out
    assert bench.run.main([*arguments, "--budget", "100s"]) == 0
    assert ran == [f"pusht-transformer/K={K}/fp32" for K in (8, 32, 128)]
    assert len(json.loads((tmp_path / "attention.json").read_text())["cells"]) == 3


BAD = {
    "case": (["--cases", "nope"], "--cases: unknown nope; there are: minidiffuser-neck"),
    "peer": (["--peers", "ours,nope"], "--peers: unknown nope; there are: ours"),
    "dtype": (["--dtype", "fp8"], "--dtype: unknown fp8"),
    "budget": (["--budget", "soon"], "--budget must be"),
    "repeats": (["--repeats", "0"], "--repeats must be 1 or more, got 0"),
    "option": (["--nope"], "unrecognized arguments: --nope"),
    "two folders": (["--fresh", "x"], "give one"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2(
    bench: Modules, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message = BAD[name]
    code = bench.run.main(["attention", "--device", "cpu", "--out", str(tmp_path / "results"), *arguments])
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "results").exists()


def test_folders_that_cannot_be_used(bench: Modules, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file in the way, a used folder for --fresh, a JSON that is none: exit code 2, nothing touched."""
    file = tmp_path / "file"
    file.write_text("mine")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "attention.json").write_text("{")
    for option, folder, message in (
        ("--out", file / "below", "cannot write"),
        ("--fresh", broken, "is not empty"),
        ("--out", broken, "is not JSON"),
    ):
        code = bench.run.main(["attention", "--device", "cpu", "--budget", "0", option, str(folder)])
        error = capsys.readouterr().err
        assert code == 2 and message in error and error.count("\n") == 1
    assert file.read_text() == "mine" and (broken / "attention.json").read_text() == "{"


def test_report_lists_losses_and_refusals(bench: Modules) -> None:
    def record(ms: float, **rest) -> dict:
        memory = {"saved": 2_000_000, "saved_inputs": 0, "peak": None}
        base = {"status": "ok", "reason": None, "ours": False, "implementation": "sdpa", "memory": memory}
        return base | {"train_ms": [ms] * 3, "forward_ms": [ms / 2] * 3} | rest

    cell = {
        "case": {"name": "c"}, "K": 4, "dtype": "fp32", "floor_ms": {"train": 1.0, "forward": 0.5},
        "contestants": {
            "ours": record(4.0, ours=True, implementation="reference"), "fold-flash": record(2.0),
            "repeat": record(8.0), "merge": record(0.0, status="refused", reason="dq off by 1"),
        },
    }  # fmt: skip
    document = {
        "suite": "attention", "device": {"kind": "cpu", "name": "X"}, "versions": {"torch": "2"},
        "commit": "0" * 40, "dirty": False, "source": "s", "scale": "cpu", "repeats": 3, "threads": 1,
        "cells": {"c/K=4/fp32": cell},
    }  # fmt: skip
    text = bench.report.markdown(document)
    assert "| c | 4 | 4.000 | fold-flash | 2.000 | 0.50 | 0.50 | 2.00 | 2.0 | 2.0 | 25 % | 0.50 |" in text
    assert "- c/K=4/fp32, forward + backward: ours 4.000 ms, fold-flash 2.000 ms, 2.00 times as long" in text
    assert "- c/K=4/fp32, merge: refused: dq off by 1" in text


def test_gpu_script_refuses_a_machine_without_a_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = subprocess.run(
        ["bash", str(BENCH / "gpu.sh"), "--out", str(tmp_path / "o")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and not (tmp_path / "o").exists()
    bad = subprocess.run(["bash", str(BENCH / "gpu.sh"), "--budget", "x"], capture_output=True, text=True, timeout=60)
    assert bad.returncode == 2 and "--budget must be" in bad.stderr
