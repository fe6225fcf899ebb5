"""The kernels as they would be launched, compiled for GPUs that are not there: a sample of the static suite, every time
another compiler, heuristic or kernel could have changed them. ``python bench/run.py static`` compiles all."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

BENCH = Path(__file__).resolve().parents[2] / "bench"
RUN = [sys.executable, str(BENCH / "run.py"), "static"]
TARGETS = ["cuda:80", "cuda:86", "cuda:89", "cuda:90", "cuda:100", "cuda:120", "hip:gfx90a", "hip:gfx942"]
SAMPLE = 17
"""CI compiles every 17th kernel."""


def run(*arguments: str, interpret: str = "0") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": interpret}
    return subprocess.run([*RUN, *arguments], env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def suite():
    """bench/static.py, imported as the scripts of bench/ import each other."""
    sys.path.insert(0, str(BENCH))
    try:
        import static

        yield static
    finally:
        sys.path.remove(str(BENCH))


@pytest.mark.parametrize("target", TARGETS)
def test_a_sample_compiles_within_device_and_budget(target, tmp_path):
    out = tmp_path / "facts.json"
    done = run("--targets", target, "--every", str(SAMPLE), "--jobs", "1", "--out", str(out))
    assert done.returncode == 0, done.stderr[-3000:]
    assert ": 0 spills, 0 failures" in done.stdout.splitlines()[-1]
    # Tiles of queries, keys and values are spread over the whole tensor, and their offsets pass 2^31 elements.
    kernels = json.loads(out.read_text())["kernels"]
    narrow = {
        key: facts["narrow_addresses"]
        for key, facts in kernels.items()
        if key.startswith("broadcast_attention ") and "-transformed" not in key and "delta" not in key
    }
    assert narrow and not any(narrow.values()), narrow


def test_the_budget_has_every_kernel_and_no_other(suite):
    document = json.loads(suite.BUDGET.read_text())
    if document["triton"] != importlib.metadata.version("triton"):
        pytest.skip(f"the budget was made with triton {document['triton']}")
    planned = {task.key for task in suite.plan(suite.cases(), list(suite.TARGETS))}
    assert planned == set(document["kernels"])
    assert set(suite.TARGETS) == set(TARGETS)


def test_hopper_kernels_use_warp_group_products(suite):
    """Every 16-bit product of tiles of 64 rows and more on sm_90."""
    document = json.loads(suite.BUDGET.read_text())
    wgmma = document["columns"].index("wgmma")
    for task in suite.plan([case for case in suite.cases() if case.precision == "bf16"], ["cuda:90"]):
        kernel, _, flags = suite._recorded(task.case, "cuda")[task.launch]
        if flags.get("BLOCK_M", 0) >= 64 and flags.get("BLOCK_N", 0) >= 64 and "PRECISION" in flags:
            assert document["kernels"][task.key][wgmma] > 0, task.key


def test_a_worse_kernel_fails(suite):
    facts = suite.Facts(100, 0, 1000, 2000, 8, 4, 512, 0, 0)
    task = suite.Task("kernel @ cuda:90", ("op", "case", "bf16"), "cuda:90", 0)

    def verdict(allowed=(100, 1000, 512, 0, 8, 4), **changed):
        return suite.verdict(suite.Row(task, replace(facts, **changed), None), {task.key: list(allowed)})

    assert verdict() is None
    assert verdict(spills=3) == "3 spills"
    assert "the device has 2000" in verdict(shared=2001)
    assert verdict(registers=101) == "registers 101, the budget says 100"
    assert verdict(matrix_instructions=7) == "matrix_instructions 7, the budget says 8"
    assert verdict(loop_loads=1024) == "loop_loads 1024, the budget says 512"
    assert "--update-budget" in suite.verdict(suite.Row(task, facts, None), {})
    assert suite.verdict(suite.Row(task, facts, None), None) is None
    assert suite.verdict(suite.Row(task, None, "does not compile: no"), None) == "does not compile: no"


def test_bytes_of_the_inner_loop(suite):
    sass = """
.L_x_1:
        /*0000*/ LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_2:
        /*0010*/ @P0 LDGSTS.E.BYPASS.128 [R51], desc[UR16][R40.64], P3 ;
        /*0020*/ LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*0030*/ STG.E.64 desc[UR4][R2.64], R4 ;
        /*0040*/ @!P3 BRA `(.L_x_2) ;
        /*0050*/ @!P3 BRA `(.L_x_1) ;
.L_x_3:
        /*0060*/ BRA `(.L_x_3);
"""
    offline = sys.modules["offline"]
    assert offline._cuda_loop_bytes(sass) == (18, 8)
    gcn = """
.LBB0_1:                                ; =>This Loop Header: Depth=1
	global_load_dwordx4 v[0:3], v[4:5], off
.LBB0_2:                                ; Parent Loop BB0_1 Depth=1
                                        ; =>This Inner Loop Header: Depth=2
	global_load_dwordx2 v[0:1], v[4:5], off
.LBB0_3:                                ; in Loop: Header=BB0_2 Depth=2
	global_load_ushort v0, v[4:5], off
	buffer_store_dword v0, v1, s[0:3], 0 offen
; %bb.4:
	global_store_dwordx4 v[0:1], v[2:5], off
"""
    assert offline._hip_loop_bytes(gcn) == (10, 4)


@pytest.mark.parametrize(
    ("arguments", "interpret", "message"),
    [
        ([], "1", "TRITON_INTERPRET is set"),
        (["--cases", "nonsense"], "0", "unknown nonsense"),
        (["--targets", "cuda:70"], "0", "unknown cuda:70"),
        (["--every", "0"], "0", "--every must be 1 or more, got 0"),
    ],
)
def test_refuses_bad_input(arguments, interpret, message):
    done = run(*arguments, interpret=interpret)
    assert done.returncode == 2 and message in done.stderr
