"""Compile what the library would launch for a GPU that is not there, and read the machine code's facts.

    python bench/offline.py --targets cuda:80,cuda:90,cuda:100,hip:gfx942

The launch code runs on tensors of the meta device with its kernels replaced by recorders, so every kernel is
compiled with exactly the arguments, flags and tile sizes that a real launch has. Prints one JSON object a line:
case, kernel, target, registers, spilled registers, shared memory in bytes, matrix instructions, error (or null).
Must run without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SHARED_MEMORY_LIMIT = {
    "80": 166912, "86": 101376, "89": 101376, "90": 232448, "100": 232448, "120": 101376,
    "gfx90a": 65536, "gfx942": 65536,
}  # fmt: skip
"""Bytes of shared memory that one thread block may use, per architecture (CUDA C++ Programming Guide; CDNA ISA)."""


@dataclass(frozen=True)
class Case:
    """One call of broadcast attention; ``lengths``/``mask`` as in the op."""

    name: str
    B: int
    K: int
    T: int
    S: int
    P: int
    H: int
    Hkv: int
    D: int
    dtype: str = "bfloat16"
    lengths: bool = False
    mask: bool = False
    own_causal: bool = False
    dropout_p: float = 0.0


# The real configurations of the field (head counts and widths as published), one per line.
CASES = (
    Case("minidiffuser-neck", 100, 64, 1, 250, 0, 4, 4, 18, lengths=True),
    Case("pusht-transformer", 64, 32, 16, 2, 1, 4, 4, 64, mask=True),
    Case("pusht-transformer-dropout", 64, 32, 16, 2, 1, 4, 4, 64, mask=True, dropout_p=0.1),
    Case("diffuser-actor-cross", 16, 16, 20, 4096, 0, 8, 8, 15),
    Case("diffuser-actor-masked", 16, 16, 20, 819, 20, 8, 8, 15),
    Case("groot-cross", 16, 32, 41, 300, 0, 32, 32, 48, lengths=True),
    Case("smolvla-joint", 8, 32, 50, 241, 50, 15, 5, 64, own_causal=True),
    Case("pi0-joint", 4, 32, 50, 817, 50, 8, 1, 256),
    Case("vla-jepa-cross", 32, 32, 16, 32, 0, 12, 12, 64),
    # Widths between the published ones, with everything on.
    Case("dropout-128", 8, 32, 20, 200, 20, 8, 8, 128, lengths=True, mask=True, dropout_p=0.1),
    Case("dropout-200", 8, 32, 20, 200, 20, 8, 8, 200, lengths=True, mask=True, dropout_p=0.1),
    Case("smolvla-joint-fp32", 8, 32, 50, 241, 50, 15, 5, 64, dtype="float32", own_causal=True),
    Case("pi0-joint-fp32", 4, 32, 50, 817, 50, 8, 1, 256, dtype="float32"),
)


class _Recorder:
    """Stands for a kernel: keeps what it is launched with."""

    def __init__(self, kernel: Any, launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **flags: Any) -> None:
            self.launches.append((self.kernel, args, flags))

        return launch


@contextmanager
def recorded_launches(module: Any) -> Iterator[list[tuple[Any, tuple[Any, ...], dict[str, Any]]]]:
    """Replace the kernels of a kernel module by recorders for a while; yields the list that fills."""
    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    kernels = {name: value for name, value in vars(module).items() if name.endswith("_kernel")}
    for name, kernel in kernels.items():
        setattr(module, name, _Recorder(kernel, launches))
    try:
        yield launches
    finally:
        for name, kernel in kernels.items():
            setattr(module, name, kernel)


def record(case: Case, *, hip: bool) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """The launches of one forward and one backward pass of ``case``."""
    from minidiff_fast.ops import _broadcast_attention_launch as launcher

    dtype, device = getattr(torch, case.dtype), "meta"
    q = torch.empty(case.B, case.K, case.T, case.H, case.D, dtype=dtype, device=device)
    k = torch.empty(case.B, case.S, case.Hkv, case.D, dtype=dtype, device=device)
    own = torch.empty(case.B, case.K, case.P, case.Hkv, case.D, dtype=dtype, device=device) if case.P else None
    lengths = torch.empty(case.B, dtype=torch.int32, device=device) if case.lengths else None
    mask = torch.empty(1, case.T, case.S, dtype=torch.bool, device=device) if case.mask else None
    seed = torch.empty(1, dtype=torch.int64, device=device) if case.dropout_p else None
    rest = (lengths, None, mask, seed, case.own_causal, case.dropout_p, case.D**-0.5)
    was, launcher.HIP = launcher.HIP, hip
    try:
        with recorded_launches(launcher.kernels) as launches:
            out, lse, correction = launcher.launch_forward(q, k, k, own, own, *rest)
            launcher.launch_backward(out, lse, q, k, k, own, own, out, lse, correction, *rest)
    finally:
        launcher.HIP = was
    return launches


_POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.bool: "*i1",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


def _specialise(kernel: Any, args: tuple[Any, ...], flags: dict[str, Any]) -> tuple[dict, dict, dict]:
    """Signature, constants and alignment attributes as Triton's launcher derives them from real arguments."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, name in enumerate(kernel.arg_names):
        value = args[index] if index < len(args) else flags[name]
        if index >= len(args) or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def compile_launch(kernel: Any, args: tuple[Any, ...], flags: dict[str, Any], target: str) -> dict[str, Any]:
    """Compile one recorded launch for ``cuda:90`` or ``hip:gfx942`` and read its facts."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend, arch = target.split(":")
    gpu = GPUTarget("cuda", int(arch), 32) if backend == "cuda" else GPUTarget("hip", arch, 64)
    options = {name: value for name, value in flags.items() if name not in kernel.arg_names}
    signature, constants, attributes = _specialise(kernel, args, flags)
    compiled = triton.compile(ASTSource(kernel, signature, constants, attributes), target=gpu, options=options)
    facts: dict[str, Any] = {"shared": compiled.metadata.shared, "shared_limit": SHARED_MEMORY_LIMIT[arch]}
    facts.update(
        _cuda_facts(compiled.asm["cubin"], compiled.asm["ptx"])
        if backend == "cuda"
        else _hip_facts(compiled.asm["amdgcn"])
    )
    return facts


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _cuda_facts(cubin: bytes, ptx: str) -> dict[str, Any]:
    """Registers and spills from the cubin's resource usage, matrix instructions from its machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [_tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True
        )
        sass = subprocess.run([_tool("nvdisasm"), "-c", file.name], capture_output=True, text=True, check=True).stdout
    text = usage.stdout + usage.stderr
    registers, stack = re.search(r"REG:(\d+)", text), re.search(r"STACK:(\d+)", text)
    return {
        "registers": int(registers.group(1)) if registers else None,
        "stack": int(stack.group(1)) if stack else None,
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "matrix_instructions": len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA|OMMA|QGMMA|UTC\w*MMA)\b", sass)),
        "wgmma": len(re.findall(r"\bwgmma\.mma_async", ptx)),
    }


def _hip_facts(assembly: str) -> dict[str, Any]:
    def number(key: str) -> int | None:
        found = re.search(rf"{re.escape(key)}:?\s+(\d+)", assembly)
        return int(found.group(1)) if found else None

    return {
        "registers": number(".vgpr_count"),
        "stack": number(".private_segment_fixed_size"),
        "spills": number(".vgpr_spill_count"),
        "matrix_instructions": len(re.findall(r"\bv_mfma_", assembly)),
    }


def main(argv: list[str] | None = None) -> int:
    """Compile the chosen cases for the chosen targets; exit 1 when one fails to compile or exceeds its device."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--targets", default="cuda:80,cuda:90,cuda:100,hip:gfx942")
    parser.add_argument("--cases", default=",".join(case.name for case in CASES))
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: the interpreter has no machine code; unset it")
    wanted = options.cases.split(",")
    unknown = sorted(set(wanted) - {case.name for case in CASES})
    if unknown:
        parser.error(f"unknown case {unknown[0]!r}; known: {', '.join(case.name for case in CASES)}")
    failed = False
    for case in (case for case in CASES if case.name in wanted):
        for target in options.targets.split(","):
            for kernel, args, flags in record(case, hip=target.startswith("hip")):
                row: dict[str, Any] = {
                    "case": case.name,
                    "kernel": kernel.__name__,
                    "own": flags.get("OWN"),
                    "target": target,
                }
                row["config"] = {
                    n: flags[n] for n in ("BLOCK_M", "BLOCK_N", "BLOCK_P", "num_warps", "num_stages") if n in flags
                }
                try:
                    row.update(compile_launch(kernel, args, flags, target), error=None)
                except Exception as problem:  # a compiler's failure is a result here, not the end of the run
                    row.update(shared=0, shared_limit=0, error=f"does not compile: {problem!r}")
                if row["shared"] > row["shared_limit"]:
                    row["error"] = f"shared memory {row['shared']} bytes over the limit of {row['shared_limit']}"
                failed = failed or row["error"] is not None
                print(json.dumps(row), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
