"""The kernel as it would be launched, compiled for GPUs that are not there: resources, and that nothing is fused."""

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
import json, re, sys
from dataclasses import asdict
sys.path.insert(0, sys.argv[1])
import torch, triton
from level2_noise import CASES, record
from offline import compile_launch

kept, compile_ = [], triton.compile
triton.compile = lambda *args, **options: kept.append(compile_(*args, **options)) or kept[-1]
target = sys.argv[2]
for name in ("pusht", "pusht-v-both", "smolvla-flow"):
    for dtype in (torch.bfloat16, torch.float32):
        for kernel, args, flags in record(CASES[name], dtype, hip=target.startswith("hip")):
            row = asdict(compile_launch((kernel, args, flags), target))
            code = kept[-1].asm["ptx" if target.startswith("cuda") else "amdgcn"]
            def count(pattern):
                return len(re.findall(pattern, code))
            if target.startswith("cuda"):
                row |= {"fused": count(r"\\b(?:fma|mad)\\S*\\.f32"), "roots": count(r"sqrt\\.rn\\.f32"),
                        "other_roots": count(r"sqrt\\.approx"), "flushed": count(r"\\.ftz")}
            else:
                # A root is refined with two fused operations; wide integer division uses powers of two.
                fused = count(r"\\bv_(?:pk_)?(?:fma|fmac|mac|mad)(?:ak|mk)?_f32\\b(?!.*0x[4c]f800000)")
                row |= {"roots": count(r"v_sqrt_f32"), "other_roots": 0, "fused": fused - 2 * count(r"v_sqrt_f32"),
                        "flushed": int("denorm_mode_32 3" not in code)}
            print(json.dumps({"case": name, "dtype": str(dtype), "target": target, **row}), flush=True)
"""


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "hip:gfx942"])
def test_compiles_within_the_device_and_fuses_nothing(target):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(BENCH), target], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 6
    for row in rows:
        assert row["spills"] == 0 and row["shared"] <= row["shared_limit"], row
        assert row["fused"] == 0 and row["other_roots"] == 0 and row["roots"] > 0 and row["flushed"] == 0, row
