"""Compile what the library would launch for a GPU that is not there, and read the machine code's facts.

The launch code of an op runs on tensors of the meta device with its kernels replaced by recorders, so every kernel
is compiled with exactly the arguments, flags and tile sizes that a real launch has. Needs no driver; must run
without TRITON_INTERPRET, because the interpreter has no machine code.
"""

from __future__ import annotations

import re
import subprocess
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


Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""A kernel, its arguments, and its flags and launch options."""


class _Recorder:
    """Stands for a kernel: keeps what it is launched with."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **flags: Any) -> None:
            self.launches.append((self.kernel, args, flags))

        return launch


@contextmanager
def recorded_launches(module: Any) -> Iterator[list[Launch]]:
    """Replace the kernels of a kernel module by recorders for a while; yields the list that fills."""
    launches: list[Launch] = []
    kernels = {name: value for name, value in vars(module).items() if name.endswith("_kernel")}
    for name, kernel in kernels.items():
        setattr(module, name, _Recorder(kernel, launches))
    try:
        yield launches
    finally:
        for name, kernel in kernels.items():
            setattr(module, name, kernel)


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


@dataclass(frozen=True)
class Facts:
    """What the machine code of one kernel says."""

    registers: int
    """Per thread (vector registers on ROCm)."""
    spills: int
    """Instructions that move a register to or from local memory; on ROCm registers that were spilled."""
    shared: int
    """Bytes of shared memory per thread block."""
    shared_limit: int
    """Bytes that the device allows."""
    matrix_instructions: int
    """Matrix (tensor core) instructions in the code."""
    wgmma: int
    """Of these, Hopper's warp-group instructions."""
    loop_loads: int
    """Bytes that one thread block loads from global memory in one turn of its innermost loop."""
    loop_stores: int
    """Bytes that it stores to global memory there."""
    narrow_addresses: int
    """Address computations of whole tiles that are made in 32 bits."""


def gpu_target(target: str) -> Any:
    """``cuda:90`` or ``hip:gfx942`` as Triton names it."""
    from triton.backends.compiler import GPUTarget

    backend, arch = target.split(":")
    return GPUTarget("cuda", int(arch), 32) if backend == "cuda" else GPUTarget("hip", arch, 64)


def compile_launch(launch: Launch, target: str) -> Facts:
    """Compile one recorded launch and read its facts."""
    import triton
    from triton.compiler import ASTSource

    kernel, args, flags = launch
    options = {name: value for name, value in flags.items() if name not in kernel.arg_names}
    signature, constants, attributes = _specialise(kernel, args, flags)
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=gpu_target(target), options=options)
    backend, arch = target.split(":")
    if backend == "cuda":
        facts = _cuda_facts(compiled.asm["cubin"], compiled.asm["ptx"], compiled.metadata.num_warps)
    else:
        facts = _hip_facts(compiled.asm["amdgcn"], compiled.metadata.num_warps)
    narrow = re.findall(r"tt\.addptr .*tensor<[^>]*xi32>", compiled.asm["ttir"])
    return Facts(
        shared=compiled.metadata.shared, shared_limit=SHARED_MEMORY_LIMIT[arch], narrow_addresses=len(narrow), **facts
    )


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _cuda_facts(cubin: bytes, ptx: str, warps: int) -> dict[str, int]:
    """Registers from the cubin's resource usage, the rest from its machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [_tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True
        )
        sass = subprocess.run([_tool("nvdisasm"), "-c", file.name], capture_output=True, text=True, check=True).stdout
    registers = re.search(r"REG:(\d+)", usage.stdout + usage.stderr)
    if registers is None:
        raise RuntimeError(f"cuobjdump reports no registers: {usage.stdout + usage.stderr}")
    loads, stores = _cuda_loop_bytes(sass)
    return {
        "registers": int(registers.group(1)),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "matrix_instructions": len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA|OMMA|QGMMA|UTC\w*MMA)\b", sass)),
        "wgmma": len(re.findall(r"\bwgmma\.mma_async", ptx)),
        "loop_loads": loads * 32 * warps,
        "loop_stores": stores * 32 * warps,
    }


_CUDA_WIDTHS = {".128": 16, ".64": 8, ".U16": 2, ".S16": 2, ".U8": 1, ".S8": 1}


def _cuda_loop_bytes(sass: str) -> tuple[int, int]:
    """Bytes that a thread loads and stores in the heaviest innermost loop: a loop ends in a branch to a label before
    it, and is innermost when no other loop lies inside."""
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    lines = sass.splitlines()
    for number, line in enumerate(lines):
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label.group(1)] = number
        elif branch := re.search(r"\bBRA\S*\s.*?`\((\.L_x_\d+)\)", line):
            start = labels.get(branch.group(1))
            if start is not None and number - start > 1:  # the code ends in a branch to itself
                loops.append((start, number))
    innermost = [
        (a, b) for a, b in loops if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)
    ]  # fmt: skip
    found = []
    for start, end in innermost:
        loads = stores = 0
        for line in lines[start:end]:
            if access := re.search(r"\b(LDG|LDGSTS|STG)\b(\.[\w.]*)?", line):
                modifiers = access.group(2) or ""
                width = next((size for suffix, size in _CUDA_WIDTHS.items() if suffix in modifiers), 4)
                loads, stores = (loads, stores + width) if access.group(1) == "STG" else (loads + width, stores)
        found.append((loads, stores))
    return max(found, key=sum, default=(0, 0))


_HIP_WIDTHS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "byte": 1}


def _hip_facts(assembly: str, warps: int) -> dict[str, int]:
    def number(key: str) -> int:
        found = re.search(rf"{re.escape(key)}:?\s+(\d+)", assembly)
        if found is None:
            raise RuntimeError(f"the assembly does not say {key}")
        return int(found.group(1))

    loads, stores = _hip_loop_bytes(assembly)
    return {
        "registers": number(".vgpr_count"),
        "spills": number(".vgpr_spill_count"),  # scalar registers spill into vector registers, not to memory
        "matrix_instructions": len(re.findall(r"\bv_mfma_", assembly)),
        "wgmma": 0,
        "loop_loads": loads * 64 * warps,
        "loop_stores": stores * 64 * warps,
    }


def _hip_loop_bytes(assembly: str) -> tuple[int, int]:
    """Bytes that a lane loads and stores in the heaviest of the deepest loops, which the compiler's comments mark."""
    per_loop: dict[tuple[int, str], list[int]] = {}
    label, loop = "", None
    for line in assembly.splitlines():
        if block := re.match(r"\.LBB(\d+_\d+):|; %bb\.\d+:", line):
            label, loop = block.group(1) or "", None
        if header := re.search(r";.*=>\s*This Inner Loop Header: Depth=(\d+)", line):
            loop = (int(header.group(1)), label)
        elif inside := re.search(r";\s*in Loop: Header=BB(\d+_\d+) Depth=(\d+)", line):
            loop = (int(inside.group(2)), inside.group(1))
        access = re.match(r"\s*(?:global|buffer|flat)_(load|store)_\w*?(dwordx[234]|dword|short|byte)", line)
        if loop is not None and access:
            totals = per_loop.setdefault(loop, [0, 0])
            totals[access.group(1) == "store"] += _HIP_WIDTHS[access.group(2)]
    if not per_loop:
        return 0, 0
    deepest = max(depth for depth, _ in per_loop)
    loads, stores = max((v for (depth, _), v in per_loop.items() if depth == deepest), key=sum)
    return loads, stores
