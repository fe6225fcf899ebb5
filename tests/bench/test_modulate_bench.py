"""The modulation suite: contestants agree with the definition, and the runner measures it."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "bench"
NAMES = ("timing", "verify", "harness", "broadcast_modulate", "run")
HELPERS = ("cases", "peers", "merge", "broadcast_attention")
CPU = torch.device("cpu")


class Modules(NamedTuple):
    """The scripts' modules, which import each other by bare names."""

    timing: ModuleType
    verify: ModuleType
    harness: ModuleType
    suite: ModuleType
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


CASES = ["unet-image-512", "dit-adaln-512-T16", "dit-gate-1536-T41", "minidiffuser-film-72"]


def tiny(bench: Modules, name: str):
    """Three conditions, odd sizes."""
    case = bench.suite.CASES[name]
    return replace(case, B=3, K=4, T=min(case.T, 3), C=16, groups=4 if case.groups else None)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("peer", ["ours", "ours-reference", "eager", "expand"])
def test_contestant_agrees_with_the_definition(bench: Modules, peer: str, name: str) -> None:
    """Output and every gradient in float64, those that all conditions share included."""
    case = tiny(bench, name)
    contestant = next(p for p in bench.suite.contestants(CPU) if p.name == peer)
    assert contestant.supports(case, CPU, torch.float64) is None
    (inputs,) = bench.suite.make_inputs(case, torch.float64, CPU, seed=1)
    runner = bench.suite.Bench(bench.suite.Settings(CPU, (peer,), repeats=1, warmup=0, seconds=1.0))
    truth = runner.truth(inputs, 2.0**-52)
    got = bench.verify.results(contestant.prepare(case, inputs), inputs)
    assert got.keys() == truth.tensors.keys() == {"out", *(f"d{leaf}" for leaf in inputs.leaves)}
    for tensor, exact in truth.tensors.items():
        torch.testing.assert_close(got[tensor], exact, rtol=1e-9, atol=1e-11, msg=lambda m, t=tensor: f"{t}: {m}")


def test_the_table_has_the_blocks_of_the_policies(bench: Modules) -> None:
    cases = bench.suite.CASES
    unet = [(c.C, c.T) for name, c in cases.items() if name.startswith("unet")]
    assert unet == [(256, 16), (512, 8), (1024, 4), (512, 16), (1024, 8), (2048, 4)]
    assert {(c.C, c.T) for name, c in cases.items() if "adaln" in name} == {
        (512, 16),
        (512, 41),
        (1536, 16),
        (1536, 41),
    }
    assert cases["minidiffuser-film-72"].K == 256
    small = bench.suite.plan("cpu", cases, ["fp32", "tf32"])
    assert [cell.key for cell in small] == [f"{name}/K={case.K}/fp32" for name, case in cases.items()]


def test_work_counts_bytes(bench: Modules) -> None:
    case = tiny(bench, "dit-gate-1536-T41")
    (inputs,) = bench.suite.make_inputs(case, torch.float32, CPU)
    x, shared, own = 3 * 4 * 3 * 16 * 4, 3 * 16 * 4, 3 * 4 * 16 * 4
    assert bench.suite.work(case, inputs, "forward").bytes == 3 * x + shared + own
    assert bench.suite.work(case, inputs, "train").bytes == 6 * x + 3 * (shared + own)


def test_run_end_to_end(bench: Modules, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(bench.suite, "CASES", {name: tiny(bench, name) for name in CASES})
    monkeypatch.setattr(bench.run, "environment", lambda device: dict.fromkeys(
        ("versions", "commit", "dirty", "source", "threads", "impl_override")) | {
        "device": {"kind": "cpu", "name": "X"}, "versions": {"torch": "2"}})  # fmt: skip
    arguments = ["modulate", "--device", "cpu", "--peers", "ours,eager", "--repeats", "3", "--out", str(tmp_path)]
    assert bench.run.main([*arguments, "--cases", f"{CASES[0]},{CASES[3]}"]) == 0
    printed = capsys.readouterr().out
    assert "unet-image-512/K=4/fp32  [B=2 K=4 T=3 C=16]" in printed and "fwd+bwd ms" in printed
    document = json.loads((tmp_path / "modulate.json").read_text())
    record = document["cells"]["unet-image-512/K=4/fp32"]["contestants"]["eager"]
    assert record["status"] == "ok" and len(record["train_ms"]) == 3 and record["memory"]["saved"] > 0
    assert record["verify"].keys() == {
        "out", "dx", "dshift", "dscale", "down_shift", "down_scale", "dweight", "dbias",
    }  # fmt: skip
    assert bench.run.main([*arguments, "--cases", "nope"]) == 2
    assert "--cases: unknown nope" in capsys.readouterr().err


def test_launches_are_recorded_without_a_device(bench: Modules) -> None:
    """What the offline compilation reads: names of kernels and whole sets of arguments, and no state left behind."""
    launcher = importlib.import_module("minidiff_fast.ops._broadcast_modulate_launch")
    before = launcher.kernels._broadcast_modulate_fwd_kernel, launcher.HIP
    for name, kernels in [("unet-image-2048", ["fwd", "bwd"]), ("minidiffuser-film-72", ["fwd", "bwd"])]:
        launches = bench.suite.record(bench.suite.CASES[name], torch.bfloat16, hip=True)
        assert [kernel.__name__ for kernel, _, _ in launches] == [f"_broadcast_modulate_{k}_kernel" for k in kernels]
        for kernel, args, flags in launches:
            assert set(kernel.arg_names) == {*kernel.arg_names[: len(args)], *flags} - {"num_warps"}
    wide = replace(bench.suite.CASES["dit-adaln-1536-T16"], C=8192)
    launches = bench.suite.record(wide, torch.float32, hip=False)
    assert [kernel.__name__.split("modulate_")[1] for kernel, _, _ in launches] == ["fwd_kernel", "bwd_sums_kernel", "bwd_kernel"]  # fmt: skip
    assert before == (launcher.kernels._broadcast_modulate_fwd_kernel, launcher.HIP)
