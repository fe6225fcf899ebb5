"""One selector: auto looks at device and availability, a name runs or raises, the environment replaces auto only."""

from __future__ import annotations

import pytest
import torch

from minidiff_fast import backend
from minidiff_fast.backend import OpBackends, resolve
from minidiff_fast.errors import BackendUnavailable, InvalidArgument

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
F32, F64 = torch.float32, torch.float64


def yes(device: torch.device, dtype: torch.dtype) -> None:
    return None


def no(device: torch.device, dtype: torch.dtype) -> str:
    return "it is broken; install a new one"


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    monkeypatch.delenv("MINIDIFF_FAST_IMPL", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")


def test_auto_on_the_cpu():
    assert resolve(OpBackends("op", {"triton": yes}), "auto", CPU, F32) == "reference"
    assert resolve(OpBackends("op", {"triton": yes, "native": yes}), None, CPU, F32) == "native"
    assert resolve(OpBackends("op", {"native": no}), "auto", CPU, F32) == "reference"
    assert resolve(OpBackends("op", {"native": yes}), "auto", CPU, F64) == "reference"


def test_auto_in_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve(OpBackends("op", {"triton": yes, "native": yes}), "auto", CPU, F32) == "triton"


def test_auto_on_a_gpu_never_falls_back():
    assert resolve(OpBackends("op", {"triton": yes}), "auto", CUDA, F32) == "triton"
    assert resolve(OpBackends("op", {"triton": yes}), "auto", CUDA, F64) == "reference"
    with pytest.raises(BackendUnavailable, match="it is broken; install a new one"):
        resolve(OpBackends("op", {"triton": no}), "auto", CUDA, F32)


@pytest.mark.parametrize("impl", ["triton", "native", "flash"])
def test_a_name_runs_or_raises(impl):
    assert resolve(OpBackends("op", {impl: yes}), impl, CPU, F32) == impl
    with pytest.raises(BackendUnavailable, match=f"op: impl='{impl}' cannot run: it is broken; install a new one"):
        resolve(OpBackends("op", {impl: no}), impl, CPU, F32)
    with pytest.raises(BackendUnavailable, match=f"op has no {impl} implementation .it has: reference"):
        resolve(OpBackends("op"), impl, CPU, F32)


def test_the_environment_replaces_auto_only(monkeypatch):
    op = OpBackends("op", {"native": yes, "triton": yes})
    monkeypatch.setenv("MINIDIFF_FAST_IMPL", "reference")
    assert resolve(op, None, CPU, F32) == "reference"
    assert resolve(op, "native", CPU, F32) == "native"
    monkeypatch.setenv("MINIDIFF_FAST_IMPL", "fastest")
    with pytest.raises(InvalidArgument, match="MINIDIFF_FAST_IMPL must be one of .*got 'fastest'"):
        resolve(op, None, CPU, F32)


def test_unknown_name():
    with pytest.raises(
        InvalidArgument, match="op: impl must be one of auto, reference, triton, native, flash, got 'x'"
    ):
        resolve(OpBackends("op"), "x", CPU, F32)


def test_why_not_triton_says_the_reason_and_the_cure(monkeypatch):
    assert "TRITON_INTERPRET=1" in backend.why_not_triton(CPU, F32)
    assert "float64" in backend.why_not_triton(CUDA, F64)
    assert "xpu" in backend.why_not_triton(torch.device("xpu"), F32)
    monkeypatch.setattr(backend, "_installed", lambda package: False)
    assert "pip install triton" in backend.why_not_triton(CUDA, F32)


def test_why_not_native_says_the_reason(monkeypatch):
    assert "not on 'cuda'" in backend.why_not_native(CUDA, F32)
    assert "torch.float16" in backend.why_not_native(CPU, torch.float16)
    monkeypatch.setattr(backend.native, "why_missing", lambda: "it was not built")
    assert backend.why_not_native(CPU, F32) == "it was not built"
    assert "it was not built" in backend.why_not_native(CPU, torch.bfloat16)
