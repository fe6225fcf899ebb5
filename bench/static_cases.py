"""What ``python bench/run.py static`` compiles: per op the calls of the case table, recorded on meta tensors."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
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
    launches: Callable[[torch.dtype, str], list[Launch]]
    """Forward and backward on meta tensors of a dtype, as a platform (see :func:`platform_of`) would see them."""

    @property
    def identity(self) -> tuple[str, str, str]:
        """Names the case among all."""
        return self.op, self.name, self.precision

    def record(self, platform: str) -> list[Launch]:
        """The launches in this precision."""
        with _precision(self.precision):
            return self.launches(PRECISIONS[self.precision], platform)


def platform_of(target: str) -> str:
    """What the heuristics tell apart: ``hip``, ``blackwell`` (sm_100) or ``cuda``."""
    return "hip" if target.startswith("hip") else "blackwell" if target == "cuda:100" else "cuda"


@contextmanager
def _precision(precision: str) -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    was, matmul.fp32_precision = matmul.fp32_precision, "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = was


@contextmanager
def _platform(launcher: Any, platform: str) -> Iterator[None]:
    was = launcher.HIP, launcher.BLACKWELL
    launcher.HIP, launcher.BLACKWELL = platform == "hip", platform == "blackwell"
    try:
        yield
    finally:
        launcher.HIP, launcher.BLACKWELL = was


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


# What the policies do to queries on their way in, which the kernels do on load; "norm" is a query norm, "packed" keys
# without padding.
TRANSFORMS: dict[str, dict[str, Any]] = {
    "minidiffuser-neck": {"axes": 3, "packed": True},
    "diffuser-actor-cross": {"axes": 3, "full_width": True},
    "diffuser-actor-masked": {"axes": 3, "full_width": True},
    "groot-cross": {"norm": "rms"},
    "smolvla-joint": {"axes": 1, "style": "half"},
    "pi0-joint": {"axes": 1, "style": "half"},
    "vla-jepa-cross": {"axes": 1, "norm": "layer"},
}


def _transform(case: AttentionCase, samples: int, recipe: dict[str, Any]) -> Any:
    """The op's argument for one entry of TRANSFORMS."""
    from minidiff_fast.ops import QueryNorm, Rotary, RotaryPositions
    from minidiff_fast.ops._query_transform import QueryTransform

    rope, norm = None, None
    if "axes" in recipe:
        axes, full = recipe["axes"], recipe.get("full_width", False)
        width = case.H * case.D if full else case.D
        rotary = Rotary(axes, width - width % (2 * axes), style=recipe.get("style", "interleaved"), full_width=full)
        tail = (3,) if axes == 3 else ()
        own = meta(case.B, samples, case.P, *tail, dtype=torch.float32) if case.P else None
        rope = RotaryPositions(rotary, meta(case.B, samples, case.T, *tail, dtype=torch.float32), own)
    if "norm" in recipe:
        weight = meta(case.D, dtype=torch.float32)
        norm = QueryNorm(recipe["norm"], weight, weight if recipe["norm"] == "layer" else None)
    return QueryTransform(rope, norm)


def _attention(
    case: AttentionCase, dropout_p: float, recipe: dict[str, Any] | None
) -> Callable[[torch.dtype, str], list[Launch]]:
    packed = recipe is not None and recipe.get("packed", False)

    def run(launcher: Any, dtype: torch.dtype) -> None:
        for samples in case.all_samples:
            q = meta(case.B, samples, case.T, case.H, case.D, dtype=dtype)
            rows = (case.B * case.S,) if packed else (case.B, case.S)
            k = meta(*rows, case.Hkv, case.D, dtype=dtype)
            own = meta(case.B, samples, case.P, case.Hkv, case.D, dtype=dtype) if case.P else None
            offsets = meta(case.B + 1, dtype=torch.int32) if packed else None
            lengths = meta(case.B, dtype=torch.int32) if case.min_length is not None and not packed else None
            mask = meta(1, case.T, case.S, dtype=torch.bool) if case.memory_mask else None
            seed = meta(1, dtype=torch.int64) if dropout_p else None
            transform = None if recipe is None else _transform(case, samples, recipe)
            rest = (lengths, offsets, mask, seed, case.own_causal, dropout_p, case.D**-0.5, transform)
            out, lse, correction = launcher.launch_forward(q, k, k, own, own, *rest)
            launcher.launch_backward(out, lse, q, k, k, own, own, out, lse, correction, *rest)

    def launches(dtype: torch.dtype, platform: str) -> list[Launch]:
        from minidiff_fast.ops import _broadcast_attention_launch as launcher

        with _platform(launcher, platform), recorded_launches(launcher.kernels) as recorded:
            run(launcher, dtype)
        return recorded

    return launches


def broadcast_attention() -> list[StaticCase]:
    """The case table of attention, every K of it; then with the norms and rotations of the policies."""
    calls = {case.name: _attention(case, dropout_p, None) for case, dropout_p in ATTENTION_CASES}
    calls |= {
        f"{case.name}-transformed": _attention(case, 0.0, TRANSFORMS[case.name])
        for case in FULL_CASES
        if case.name in TRANSFORMS
    }
    published = {case.name for case in FULL_CASES}
    return [
        StaticCase("broadcast_attention", name, precision, call)
        for name, call in calls.items()
        for precision in PRECISIONS
        if precision != "tf32" or name in published
    ]


def of_bench(op: str) -> list[StaticCase]:
    """The cases of an op's bench module, which records its launches."""
    module = importlib.import_module(op)
    known = module.CASES.values() if isinstance(module.CASES, dict) else module.CASES
    return [
        StaticCase(op, case.name, precision, partial(_recorded_by, module, case))
        for case in known
        for precision in ("bf16", "fp32")
    ]


def _recorded_by(module: ModuleType, case: Any, dtype: torch.dtype, platform: str) -> list[Launch]:
    return module.record(case, dtype, hip=platform == "hip")


OPS: dict[str, Callable[[], list[StaticCase]]] = {
    "broadcast_attention": broadcast_attention,
    **{
        op: partial(of_bench, op) for op in ("broadcast_modulate", "broadcast_linear", "level2_noise", "denoising_loss")
    },
}
"""Op -> its cases."""
