"""The kernels as they would be launched, compiled for GPUs that are not there: registers, spills, shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

OFFLINE = Path(__file__).resolve().parents[2] / "bench" / "offline.py"
CASES = ["minidiffuser-neck", "dropout-128", "smolvla-joint", "pi0-joint"]


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "cuda:100", "hip:gfx942"])
def test_compiles_within_the_device(target):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(OFFLINE), "--targets", target, "--cases", ",".join(CASES)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    # forward, delta, dq, dk and dv of the shared tokens; and of own tokens in the cases that have some
    assert [sum(row["case"] == case for row in rows) for case in CASES] == [4, 5, 5, 5]
    for row in rows:
        where = f"{row['case']} {row['kernel']} own={row['own']} {row['config']}: {row}"
        assert row["error"] is None and row["shared"] <= row["shared_limit"], where
        if "delta" in row["kernel"]:
            continue
        assert row["matrix_instructions"] > 0, where
        if target.startswith("cuda"):
            assert row["spills"] == 0, where
        if target == "cuda:90" and row["config"]["BLOCK_M"] >= 64 and row["config"]["BLOCK_N"] >= 64:
            assert row["wgmma"] > 0, where


def test_refuses_the_interpreter_and_unknown_cases():
    for environment, arguments, message in [
        ({"TRITON_INTERPRET": "1"}, [], "TRITON_INTERPRET is set"),
        ({"TRITON_INTERPRET": "0"}, ["--cases", "nonsense"], "unknown case 'nonsense'"),
    ]:
        done = subprocess.run(
            [sys.executable, str(OFFLINE), *arguments],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2 and message in done.stderr
