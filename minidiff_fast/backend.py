"""Which implementation of an op runs: one selector everywhere, and no silent fallback.

``impl`` is one of

- ``"auto"``: decided by the device and by what is installed, never by sizes: CUDA and ROCm tensors run
  ``"triton"``; CPU tensors run ``"native"`` where the op has a native kernel, else ``"reference"``.
  With ``TRITON_INTERPRET=1`` CPU tensors run ``"triton"``. float64 tensors run ``"reference"``.
- ``"reference"``: the definition in plain PyTorch, any device, any dtype, differentiable twice.
- ``"triton"``, ``"native"``, ``"flash"``: that one, or :class:`BackendUnavailable` saying why not and what to do.

The environment variable ``MINIDIFF_FAST_IMPL`` replaces ``"auto"`` (and only ``"auto"``) for A/B runs.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch

from minidiff_fast import native
from minidiff_fast.errors import BackendUnavailable, InvalidArgument

Impl = Literal["auto", "reference", "triton", "native", "flash"]
IMPLS: tuple[str, ...] = get_args(Impl)
ENVIRONMENT_VARIABLE = "MINIDIFF_FAST_IMPL"

Availability = Callable[[torch.device, torch.dtype], "str | None"]


@dataclass(frozen=True)
class OpBackends:
    """The implementations of one op, and what keeps each of them from running."""

    name: str
    """The op's name, ``broadcast_attention``."""
    why_not: Mapping[str, Availability] = field(default_factory=dict)
    """Per implementation a function of (device, dtype) that returns None when it can run, else the reason
    and the cure. An implementation that is not in the mapping does not exist for this op."""


REGISTRY: dict[str, OpBackends] = {}


def register(op: OpBackends) -> OpBackends:
    """Enter an op; ``minidiff-fast doctor`` lists what is entered here."""
    REGISTRY[op.name] = op
    return op


def triton_interpreted() -> bool:
    """True when Triton kernels run in Triton's interpreter, on CPU tensors (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


_FOUND: dict[str, bool] = {}


def _installed(package: str) -> bool:
    if package not in _FOUND:
        _FOUND[package] = importlib.util.find_spec(package) is not None
    return _FOUND[package]


def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """None when a Triton kernel can run on tensors of this device and dtype, else the reason and the cure."""
    if not _installed("triton"):
        return "the package triton is not installed; pip install triton (Linux only)"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels take float32, float16 and bfloat16, not {dtype}; use impl='reference'"
    if device.type == "cpu" and not triton_interpreted():
        return (
            "the tensors are on the CPU, where Triton kernels run in its interpreter only; move them to a "
            "GPU, or set TRITON_INTERPRET=1 before Python starts (for tests: slow)"
        )
    if device.type not in ("cuda", "cpu"):
        return f"the kernels run on CUDA and ROCm devices, not on {device.type!r}; use impl='reference'"
    return None


def why_not_native(device: torch.device, dtype: torch.dtype) -> str | None:
    """None when a native CPU kernel can run on tensors of this device and dtype, else the reason and the cure."""
    if device.type != "cpu":
        return f"the native kernels run on the CPU, not on {device.type!r}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"the native kernels take float32 and bfloat16, not {dtype}; use impl='reference'"
    return _native_missing()


def _native_missing() -> str | None:
    """Loads the library, which torch.compile cannot trace, while it traces: the answer holds for the process."""
    return native.why_missing()


# What torch.compiler.assume_constant_result sets; that imports the compiler, and with it Triton.
_native_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def resolve(op: OpBackends, impl: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """The implementation that runs: a name out of ``reference | triton | native | flash``.

    Raises :class:`InvalidArgument` for an unknown name and :class:`BackendUnavailable` for a named
    implementation that cannot run on tensors of this device and dtype.
    """
    asked = impl or "auto"
    if asked not in IMPLS:
        raise InvalidArgument(f"{op.name}: impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    if asked == "auto":
        asked = os.environ.get(ENVIRONMENT_VARIABLE, "auto") or "auto"
        if asked not in IMPLS:
            raise InvalidArgument(
                f"{ENVIRONMENT_VARIABLE} must be one of {', '.join(IMPLS)}, got {asked!r} (while running {op.name})"
            )
    if asked == "auto":
        return _automatic(op, device, dtype)
    reason = why_not(op, asked, device, dtype)
    if reason is not None:
        raise BackendUnavailable(f"{op.name}: impl={asked!r} cannot run: {reason}")
    return asked


def why_not(op: OpBackends, impl: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None when ``impl`` can run ``op`` on tensors of this device and dtype, else the reason."""
    if impl == "reference":
        return None
    probe = op.why_not.get(impl)
    if probe is None:
        have = ", ".join(["reference", *op.why_not])
        return f"{op.name} has no {impl} implementation (it has: {have})"
    return probe(device, dtype)


def _automatic(op: OpBackends, device: torch.device, dtype: torch.dtype) -> str:
    if dtype == torch.float64:
        return "reference"
    if device.type == "cuda":
        # A GPU without its kernels is a broken install: say so instead of running many times slower.
        reason = why_not(op, "triton", device, dtype)
        if reason is not None:
            raise BackendUnavailable(
                f"{op.name}: no kernel for {device} tensors: {reason}; or ask for impl='reference' by name"
            )
        return "triton"
    order = ("triton", "native") if triton_interpreted() else ("native",)
    for candidate in order:
        if why_not(op, candidate, device, dtype) is None:
            return candidate
    return "reference"


def version(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
