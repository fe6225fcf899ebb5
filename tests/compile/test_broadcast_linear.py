"""The kernels as they would be launched, compiled for GPUs that are not there: registers, spills, shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

BENCH = Path(__file__).resolve().parents[2] / "bench" / "broadcast_linear.py"


@pytest.mark.parametrize("target", ["cuda:90", "hip:gfx942"])
def test_compiles_within_the_device(target):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(BENCH), "offline", "--targets", target, "--cases", "unet-512,dit-s", "--dtype", "bf16"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    products = {
        case: [row for row in rows if row["case"] == case and row["matrix_instructions"]]
        for case in ("unet-512", "dit-s")
    }
    # forward, dx and dW; in the form "cat" for the samples and for the conditions
    assert [len(products[case]) for case in ("unet-512", "dit-s")] == [6, 3]
    for row in rows:
        assert row["error"] is None and row["shared"] <= row["shared_limit"] and row["spills"] == 0, row
        if row["matrix_instructions"] and target == "cuda:90":
            assert row["wgmma"] > 0, row


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
