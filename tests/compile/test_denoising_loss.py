"""The kernels as they would be launched, compiled for GPUs that are not there: registers, spills, shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

BENCH = Path(__file__).resolve().parents[2] / "bench" / "denoising_loss.py"


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "hip:gfx942"])
def test_compiles_within_the_device(target):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(BENCH), "offline", "--targets", target, "--cases", "minidiffuser,smolvla"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 2 * 2 * 2  # cases, dtypes, forward and backward
    for row in rows:
        assert row["error"] is None and row["spills"] == 0 and row["shared"] <= row["shared_limit"], row


def test_refuses_the_interpreter_and_unknown_cases():
    for environment, arguments, message in [
        ({"TRITON_INTERPRET": "1"}, [], "TRITON_INTERPRET is set"),
        ({"TRITON_INTERPRET": "0"}, ["--cases", "nonsense"], "unknown 'nonsense'"),
    ]:
        done = subprocess.run(
            [sys.executable, str(BENCH), "offline", *arguments],
            env={**os.environ, **environment}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 2 and message in done.stderr
