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


def _attention_calls(
    case: AttentionCase, dropout_p: float, recipe: dict[str, Any] | None
) -> Callable[[Any, torch.dtype], None]:
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

    return run


def broadcast_attention() -> list[StaticCase]:
    """The case table of attention, every K of it; then with the norms and rotations of the policies."""
    calls = {case.name: _attention_calls(case, dropout_p, None) for case, dropout_p in ATTENTION_CASES}
    calls |= {
        f"{case.name}-transformed": _attention_calls(case, 0.0, TRANSFORMS[case.name])
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


# name: B, K, T, C, norm, groups, activation, form, channels first, gate and residual
MODULATE_CASES: dict[str, tuple[int, int, int, int, str, int, str, str, bool, bool]] = {
    "unet-256": (64, 16, 16, 256, "group", 8, "mish", "film", True, False),
    "unet-512": (64, 16, 8, 512, "group", 8, "mish", "film", True, False),
    "unet-1024": (64, 16, 4, 1024, "group", 8, "mish", "film", True, False),
    "unet-2048": (64, 16, 4, 2048, "group", 8, "mish", "film", True, False),
    "dit-512": (64, 16, 16, 512, "layer", 0, "", "adaln", False, True),
    "groot-1536": (16, 32, 41, 1536, "layer", 0, "", "adaln", False, True),
    "rms-4096": (8, 8, 50, 4096, "rms", 0, "", "adaln", False, True),
    "minidiffuser-film-72": (100, 256, 1, 72, "", 0, "silu", "film", False, False),
}


def broadcast_modulate() -> list[StaticCase]:
    """U-Net blocks, DiT blocks, FiLM; with per-condition and per-sample parts."""

    def calls(B: int, K: int, T: int, C: int, norm: str, groups: int, activation: str, form: str, first: bool,
              gated: bool) -> Callable[[Any, torch.dtype], None]:  # fmt: skip
        def run(launcher: Any, dtype: torch.dtype) -> None:
            x = meta(B, K, C, T, dtype=dtype) if first else meta(B, K, T, C, dtype=dtype)
            shared, own, affine = (meta(*s, dtype=dtype) for s in ((B, C), (B, K, C), (C,)))
            parts = (shared, shared, shared if gated else None, own, own, own if gated else None)
            weights = (affine, affine) if norm == "group" else (None, None)
            options = (norm, groups, 1e-5, activation, "norm" if norm else "output", form, first)
            y, mean, rstd = launcher.launch_forward(x, *parts, x if gated else None, *weights, *options)
            need = [tensor is not None for tensor in (x, *parts, *weights)]
            launcher.launch_backward(y, x, *parts, *weights, mean, rstd, *options, need)

        return run

    return [
        StaticCase("broadcast_modulate", name, precision, calls(*case))
        for name, case in MODULATE_CASES.items()
        for precision in ("bf16", "fp32")
    ]


def broadcast_linear() -> list[StaticCase]:
    """The cases of bench/broadcast_linear.py."""
    from broadcast_linear import CASES, LinearCase

    def calls(case: LinearCase) -> Callable[[Any, torch.dtype], None]:
        def run(launcher: Any, dtype: torch.dtype) -> None:
            middle = (case.M,) if case.M > 1 else ()
            x = meta(case.B, case.K, *middle, case.Cx, dtype=dtype)
            g, bias = meta(case.B, case.Cg, dtype=dtype), meta(case.Co, dtype=dtype)
            weight = meta(case.Co, case.Cx + (case.Cg if case.combine == "cat" else 0), dtype=dtype)
            options = (case.activation or "", case.combine)
            y = launcher.launch_forward(x, g, weight, bias, *options)
            launcher.launch_backward(
                y, x, g, weight, *options, need_x=True, need_g=True, need_weight=True, need_bias=True
            )

        return run

    return [
        StaticCase("broadcast_linear", case.name, precision, calls(case))
        for case in CASES
        for precision in ("bf16", "fp32")
    ]


# name: B, K, T, A
NOISE_CASES = {
    "pusht": (64, 32, 16, 2),
    "unet-10": (64, 16, 16, 10),
    "minidiffuser": (100, 256, 1, 3),
    "wide": (4, 8, 64, 32),
}


def level2_noise() -> list[StaticCase]:
    """Every prediction and draw, in the sizes of the policies."""

    def calls(B: int, K: int, T: int, A: int) -> Callable[[Any, torch.dtype], None]:
        def run(launcher: Any, dtype: torch.dtype) -> None:
            x0, x = meta(B, T, A, dtype=dtype), meta(B, K, T, A, dtype=dtype)
            filled, empty = meta(B, K, T, A, dtype=torch.float32), meta(0, dtype=torch.float32)
            seed, schedule = meta(1, dtype=torch.int64), meta(100, dtype=torch.float32)
            for prediction in ("epsilon", "sample", "v_prediction", "flow"):
                for drawn in (False, True):
                    flow = prediction == "flow"
                    times = meta(B, K, dtype=torch.float32 if flow else torch.int64)
                    launcher.launch_forward(
                        x0, None if flow else schedule, seed, K, 0, K, prediction, 1, drawn, drawn,
                        x, filled if drawn else empty, filled, times,
                    )  # fmt: skip

        return run

    return [
        StaticCase("level2_noise", name, precision, calls(*case))
        for name, case in NOISE_CASES.items()
        for precision in ("bf16", "fp32")
    ]


def denoising_loss() -> list[StaticCase]:
    """Every kind in the sizes of Push-T, mean squares in the others, with and without a mask."""

    def calls(kinds: tuple[str, ...], B: int, K: int, T: int, A: int) -> Callable[[Any, torch.dtype], None]:
        def run(launcher: Any, dtype: torch.dtype) -> None:
            pred, target = meta(B, K, T, A, dtype=dtype), meta(B, K, T, A, dtype=torch.float32)
            for kind in kinds:
                for mask in (None, meta(B, 1, T, dtype=torch.bool)):
                    loss, share = launcher.launch_forward(pred, target, mask, kind, 1.0)
                    launcher.launch_backward(loss, pred, target, mask, share, kind, 1.0)

        return run

    return [
        StaticCase(
            "denoising_loss", name, precision, calls(("mse", "l1", "huber") if name == "pusht" else ("mse",), *case)
        )
        for name, case in NOISE_CASES.items()
        for precision in ("bf16", "fp32")
    ]


OPS: dict[str, Callable[[], list[StaticCase]]] = {
    "broadcast_attention": broadcast_attention,
    "broadcast_modulate": broadcast_modulate,
    "broadcast_linear": broadcast_linear,
    "level2_noise": level2_noise,
    "denoising_loss": denoising_loss,
}
"""Op -> its cases."""
