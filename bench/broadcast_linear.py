"""``python bench/run.py linear``: broadcast_linear against its peers.

Verifies every contestant against the float64 definition first (the error budget of CONTRIBUTING.md), then times forward
and forward + backward in turns; medians, in milliseconds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from offline import Launch, recorded_launches
from timing import Clock, tf32
from torch import Tensor
from torch.nn import functional as F

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
EPS = {"bf16": 2.0**-7, "fp16": 2.0**-10, "fp32": 2.0**-23, "tf32": 2.0**-10}
"""Machine epsilon of the arithmetic; tf32 is float32 storage with TF32 products allowed."""


@dataclass(frozen=True)
class LinearCase:
    """One call of broadcast linear."""

    name: str
    B: int
    K: int
    M: int
    """Tokens per sample; 1: x is [B, K, Cx]."""
    Cx: int
    Cg: int
    Co: int
    activation: str | None
    combine: str = "cat"


CASES = (
    # diffusion_policy's U-Net: the embedding of a timestep beside the observation's features, Mish, 2 * channels out.
    LinearCase("unet-512", 64, 32, 1, 256, 132, 512, "mish"),
    LinearCase("unet-1024", 64, 32, 1, 256, 274, 1024, "mish"),
    LinearCase("unet-2048", 64, 32, 1, 256, 1024, 2048, "mish"),
    LinearCase("unet-4096", 64, 32, 1, 256, 1024, 4096, "mish"),
    # DiT: SiLU of timestep + condition, six modulations.
    LinearCase("dit-s", 64, 32, 1, 384, 384, 6 * 384, "silu", "sum"),
    LinearCase("dit-xl", 16, 32, 1, 1152, 1152, 6 * 1152, "silu", "sum"),
    # Tokens joined with a condition.
    LinearCase("tokens", 32, 32, 16, 256, 512, 256, None),
    LinearCase("tokens-odd", 3, 5, 7, 33, 17, 77, "silu"),
)


@dataclass(frozen=True)
class Inputs:
    """The tensors of one call."""

    leaves: tuple[Tensor, ...]
    """x, g, weight, bias."""
    grad_out: Tensor

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same numbers in another dtype, as new leaves."""
        return Inputs(tuple(x.detach().to(dtype).requires_grad_() for x in self.leaves), self.grad_out.to(dtype))


def make_inputs(case: LinearCase, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Random inputs of a case."""
    generator = torch.Generator().manual_seed(len(case.name) + case.Co)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)

    middle = () if case.M == 1 else (case.M,)
    summands = case.Cx + (case.Cg if case.combine == "cat" else 0)
    weight = draw(case.Co, summands) * summands**-0.5
    leaves = (draw(case.B, case.K, *middle, case.Cx), draw(case.B, case.Cg), weight, draw(case.Co))
    return Inputs(tuple(x.requires_grad_() for x in leaves), draw(case.B, case.K, *middle, case.Co))


Run = Callable[[LinearCase, Inputs], Tensor]


def ours(case: LinearCase, inputs: Inputs) -> Tensor:
    """What ``impl="auto"`` picks."""
    from minidiff_fast.ops import broadcast_linear

    return broadcast_linear(*inputs.leaves, activation=case.activation, combine=case.combine)


def split(case: LinearCase, inputs: Inputs) -> Tensor:
    """The definition: one product per condition, one per sample, out of BLAS."""
    from minidiff_fast.ops import broadcast_linear_reference

    return broadcast_linear_reference(*inputs.leaves, activation=case.activation, combine=case.combine)


def repeat(case: LinearCase, inputs: Inputs) -> Tensor:
    """The ordinary practice: the condition beside (or added to) every sample, activation, linear."""
    x, g, weight, bias = inputs.leaves
    g = g.reshape(g.shape[0], *[1] * (x.dim() - 2), g.shape[1])
    joined = x + g if case.combine == "sum" else torch.cat([x, g.expand(*x.shape[:-1], -1)], -1)
    act = {None: lambda z: z, "silu": F.silu, "mish": F.mish}[case.activation]
    return F.linear(act(joined), weight, bias)


CONTESTANTS: dict[str, Run] = {"ours": ours, "split": split, "repeat": repeat}


def results(run: Run, case: LinearCase, inputs: Inputs) -> list[Tensor]:
    """Output and the gradients of x, g, weight, bias."""
    out = run(case, inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs.leaves, inputs.grad_out)]


def verified(case: LinearCase, inputs: Inputs, eps: float) -> Iterator[tuple[str, str | None]]:
    """Per contestant None, or by how much it is off."""
    exact = results(split, case, inputs.to(torch.float64))
    same = results(split, case, inputs)
    for name, run in CONTESTANTS.items():
        off = []
        for label, truth, near, got in zip(
            ("y", "dx", "dg", "dweight", "dbias"), exact, same, results(run, case, inputs), strict=True
        ):
            budget = 2 * (float((near.double() - truth).abs().max()) + eps * float(truth.abs().max()))
            error = float((got.double() - truth).abs().max())
            if not error <= budget:
                off.append(f"{label} off by {error:.2e} (budget {budget:.2e})")
        yield name, "; ".join(off) or None


def time_case(case: LinearCase, dtype: str, device: torch.device, repeats: int) -> bool:
    """Print one line per contestant; False when ours is not within its budget."""
    inputs = make_inputs(case, DTYPES[dtype], device)
    clock = Clock(device)
    with tf32(dtype == "tf32"):
        refused = dict(verified(case, inputs, EPS[dtype]))
        running = [name for name, reason in refused.items() if reason is None]
        times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in running}
        for turn in range(-2, repeats):
            for name in running[turn % len(running) :] + running[: turn % len(running)]:
                run = CONTESTANTS[name]
                with torch.no_grad():
                    forward = clock(lambda r=run: r(case, inputs))  # type: ignore[misc]
                train = clock(lambda r=run: results(r, case, inputs))  # type: ignore[misc]
                if turn >= 0:
                    times[name][0].append(forward)
                    times[name][1].append(train)
    print(
        f"{case.name} {dtype} [B={case.B} K={case.K} M={case.M} Cx={case.Cx} Cg={case.Cg} Co={case.Co} {case.combine}]"
    )
    for name, reason in refused.items():
        if reason is not None:
            print(f"  {name:<8} refused: {reason}")
            continue
        forward, train = (statistics.median(values) for values in times[name])
        print(f"  {name:<8} forward {forward:9.3f} ms   forward + backward {train:9.3f} ms")
    return refused["ours"] is None


def record(case: LinearCase, dtype: torch.dtype, *, hip: bool) -> list[Launch]:
    """The launches of one forward and one backward pass of ``case``, on meta tensors."""
    from minidiff_fast.ops import _broadcast_linear_launch as launcher

    x, g, weight, bias = (
        torch.empty(x.shape, dtype=dtype, device="meta") for x in make_inputs(case, dtype, torch.device("meta")).leaves
    )
    dy = torch.empty(*x.shape[:-1], case.Co, dtype=dtype, device="meta")
    was, launcher.HIP = launcher.HIP, hip
    try:
        with recorded_launches(launcher.kernels) as launches:
            launcher.launch_forward(x, g, weight, bias, case.activation or "", case.combine)
            launcher.launch_backward(
                dy, x, g, weight, case.activation or "", case.combine,
                need_x=True, need_g=True, need_weight=True, need_bias=True,
            )  # fmt: skip
    finally:
        launcher.HIP = was
    return launches


def main(argv: list[str] | None = None) -> int:
    """0; 1 when ours is wrong or a launch does not fit; 2 for a wrong option."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", default=",".join(case.name for case in CASES))
    parser.add_argument("--dtype", help="out of bf16, fp16, fp32, tf32; default: bf16,fp32 (on a CPU: fp32)")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args(argv)
    cuda = torch.cuda.is_available()
    dtypes = (options.dtype or ("bf16,fp32" if cuda else "fp32")).split(",")
    names = options.cases.split(",")
    known = {case.name: case for case in CASES}
    for option, given, there in (("--cases", names, known), ("--dtype", dtypes, DTYPES)):
        unknown = [name for name in given if name not in there]
        if unknown:
            parser.error(f"{option}: unknown {unknown[0]!r}; there are: {', '.join(there)}")
    cases = [known[name] for name in names]
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: the interpreter has no machine code and is never timed; unset it")
    device = torch.device("cuda" if cuda else "cpu")
    return int(not all([time_case(case, dtype, device, options.repeats) for dtype in dtypes for case in cases]))


if __name__ == "__main__":
    sys.exit(main())
