"""Packed keys, rotary and query norm compiled for GPUs that are not there: no spilled register, no overfull device."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton")

OFFLINE = Path(__file__).resolve().parents[2] / "bench" / "offline.py"
KERNELS = {
    "_broadcast_attention_fwd_kernel": 1,
    "_broadcast_attention_transform_kernel": 1,
    "_broadcast_attention_bwd_delta_kernel": 1,
    "_broadcast_attention_bwd_dkdv_kernel": 2,  # shared and own tokens
    "_broadcast_attention_bwd_dq_kernel": 1,
    "_broadcast_attention_bwd_transform_kernel": 2,  # of own keys and of queries
}


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "hip:gfx942"])
def test_compiles_within_the_device(target):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__, target], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {name: sum(row["kernel"] == name for row in rows) for name in KERNELS} == KERNELS
    for row in rows:
        assert row["spills"] == 0 and row["stack"] == 0 and row["shared"] <= row["shared_limit"], row


def _offline() -> ModuleType:
    spec = importlib.util.spec_from_file_location("offline", OFFLINE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["offline"] = module
    spec.loader.exec_module(module)
    return module


def main(target: str) -> None:
    """SmolVLA's heads with packed shared tokens; prints one JSON object for each kernel that a call launches."""
    import torch

    from minidiff_fast.ops import QueryNorm, Rotary, RotaryPositions
    from minidiff_fast.ops import _broadcast_attention_launch as launcher
    from minidiff_fast.ops._query_transform import QueryTransform

    offline, launcher.HIP = _offline(), target.startswith("hip")
    B, K, T, N, P, H, Hkv, D = 8, 32, 50, 1928, 50, 15, 5, 64

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    q, k, own = meta(B, K, T, H, D), meta(N, Hkv, D), meta(B, K, P, Hkv, D)
    places = (meta(B, K, n, dtype=torch.float32) for n in (T, P))
    norm = QueryNorm("rms", meta(D, dtype=torch.float32), meta(D, dtype=torch.float32))
    transform = QueryTransform(RotaryPositions(Rotary(1, D, style="half"), *places), norm)
    rest = (None, meta(B + 1, dtype=torch.int32), None, None, True, 0.0, D**-0.5, transform)
    with offline.recorded_launches(launcher.kernels) as launches:
        out, lse, correction = launcher.launch_forward(q, k, k, own, own, *rest)
        launcher.launch_backward(out, lse, q, k, k, own, own, out, lse, correction, *rest)
    for kernel, args, flags in launches:
        print(json.dumps({"kernel": kernel.__name__, **offline.compile_launch(kernel, args, flags, target)}))


if __name__ == "__main__":
    main(sys.argv[1])
