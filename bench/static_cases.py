"""What ``python bench/run.py static`` compiles: per op the calls of the case table, recorded on meta tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from cases import FULL_CASES, AttentionCase
from offline import Launch, recorded_launches

PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32, "tf32": torch.float32}


@dataclass(frozen=True)
class StaticCase:
    """Calls of one op in one precision."""

    op: str
    name: str
    precision: str
    """A key of PRECISIONS."""
    calls: Callable[[Any, torch.dtype], None]
    """Runs forward and backward passes on meta tensors, given the op's launch module and the dtype."""

    @property
    def identity(self) -> tuple[str, str, str]:
        """Names the case among all."""
        return self.op, self.name, self.precision

    def record(self, hip: bool) -> list[Launch]:
        """The launches that a CUDA or a ROCm device would see."""
        import importlib

        launcher = importlib.import_module(f"minidiff_fast.ops._{self.op}_launch")
        with _precision(self.precision), _platform(launcher, hip), recorded_launches(launcher.kernels) as launches:
            self.calls(launcher, PRECISIONS[self.precision])
        return launches


@contextmanager
def _precision(precision: str) -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    was, matmul.fp32_precision = matmul.fp32_precision, "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = was


@contextmanager
def _platform(launcher: Any, hip: bool) -> Iterator[None]:
    was, launcher.HIP = launcher.HIP, hip
    try:
        yield
    finally:
        launcher.HIP = was


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


# Beside the published table: the peer's dropout, and widths between the published ones with everything on.
_WIDE = AttentionCase(
    "wide", B=8, samples=(32,), T=20, S=200, P=20, H=8, Hkv=8, D=128, min_length=100, memory_mask=True
)
_PUSHT = next(case for case in FULL_CASES if case.name == "pusht-transformer")
ATTENTION_CASES: tuple[tuple[AttentionCase, float], ...] = (
    *((case, 0.0) for case in FULL_CASES),
    (replace(_PUSHT, name="pusht-transformer-dropout"), 0.1),
    (replace(_WIDE, name="dropout-128"), 0.1),
    (replace(_WIDE, name="dropout-200", D=200), 0.1),
)  # fmt: skip


def broadcast_attention() -> list[StaticCase]:
    """The case table of attention, every K of it."""

    def calls(case: AttentionCase, dropout_p: float) -> Callable[[Any, torch.dtype], None]:
        def run(launcher: Any, dtype: torch.dtype) -> None:
            for samples in case.all_samples:
                q = meta(case.B, samples, case.T, case.H, case.D, dtype=dtype)
                k = meta(case.B, case.S, case.Hkv, case.D, dtype=dtype)
                own = meta(case.B, samples, case.P, case.Hkv, case.D, dtype=dtype) if case.P else None
                lengths = meta(case.B, dtype=torch.int32) if case.min_length is not None else None
                mask = meta(1, case.T, case.S, dtype=torch.bool) if case.memory_mask else None
                seed = meta(1, dtype=torch.int64) if dropout_p else None
                rest = (lengths, None, mask, seed, case.own_causal, dropout_p, case.D**-0.5)
                out, lse, correction = launcher.launch_forward(q, k, k, own, own, *rest)
                launcher.launch_backward(out, lse, q, k, k, own, own, out, lse, correction, *rest)

        return run

    return [
        StaticCase("broadcast_attention", case.name, precision, calls(case, dropout_p))
        for case, dropout_p in ATTENTION_CASES
        for precision in PRECISIONS
    ]


OPS: dict[str, Callable[[], list[StaticCase]]] = {"broadcast_attention": broadcast_attention}
"""Op -> its cases."""
