"""The kernels as they would be launched, compiled for GPUs that are not there: registers, spills, shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

BENCH = Path(__file__).resolve().parents[2] / "bench"
COMPILE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
from broadcast_modulate import CASES, ModulateCase, record_launches
from dataclasses import replace
from offline import compile_launch

dit, unet = CASES["dit-adaln-1536-T41"], CASES["unet-image-512"]
both = ("shift", "scale", "gate")
cases = [dit, unet, replace(dit, name="wide", C=8192, affine=True, shared=both, own=both, residual=True)]
for case in cases:
    for dtype in (torch.bfloat16, torch.float32) if case.name != "wide" else (torch.float32,):
        for kernel, args, flags in record_launches(case, dtype, hip=sys.argv[2].startswith("hip")):
            facts = compile_launch(kernel, args, flags, sys.argv[2])
            print(json.dumps({"case": case.name, "dtype": str(dtype), "kernel": kernel.__name__, **facts}), flush=True)
"""


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "hip:gfx942"])
def test_compiles_within_the_device(target):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(BENCH), target],
        env=environment, capture_output=True, text=True, cwd=BENCH,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    # forward and backward; the wide norm takes the two sums of a row from a kernel of their own
    count = {name: sum(row["case"] == name for row in rows) for name in {row["case"] for row in rows}}
    assert count == {"dit-adaln-1536-T41": 4, "unet-image-512": 4, "wide": 3}
    for row in rows:
        assert row["spills"] == 0 and row["shared"] <= row["shared_limit"], row
