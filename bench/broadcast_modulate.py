"""The suite of ``minidiff_fast.ops.broadcast_modulate``: blocks of real policies, and the peers.

``eager`` is how the policies write it: the condition's parameters repeated per sample, then torch's norm, activation
and arithmetic; ``expand`` is the same on broadcast views, without a copy; ``compile`` and ``compile-expand`` are
torch.compile of the two.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import harness
import torch
import torch.nn.functional as F
from cases import Pass, Work
from harness import DTYPES, INPUT_SETS, Reason, Settings, context_lost, ours_failed
from offline import Launch, recorded_launches
from peers import Peer
from timing import Run
from torch import Tensor
from verify import Truth, truth_of

__all__ = [
    "DTYPES", "NAME", "Bench", "Cell", "Settings", "case_names", "context_lost", "ours_failed", "peer_names", "plan",
    "record", "render", "select_peers",
]  # fmt: skip

NAME = "modulate"
OP = "broadcast_modulate"


@dataclass(frozen=True)
class ModulateCase:
    """One modulation of a policy; shared parts are ``[B, C]``, own parts ``[B, K, C]``."""

    name: str
    B: int
    K: int
    T: int
    C: int
    norm: str | None
    shared: tuple[str, ...]
    """Parameters with a part per condition, out of shift, scale, gate."""
    own: tuple[str, ...]
    """Parameters with a part per sample."""
    groups: int | None = None
    affine: bool = False
    """weight and bias ``[C]``."""
    residual: bool = False
    eps: float = 1e-5
    activation: str | None = None
    activation_at: str = "norm"
    form: str = "film"
    channels_first: bool = False
    note: str = ""

    @property
    def options(self) -> dict[str, Any]:
        """What the op takes besides tensors."""
        return {
            "norm": self.norm, "num_groups": self.groups, "eps": self.eps, "activation": self.activation,
            "activation_at": self.activation_at, "form": self.form, "channels_first": self.channels_first,
        }  # fmt: skip

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor of the op, x first."""
        x = (self.B, self.K, self.C, self.T) if self.channels_first else (self.B, self.K, self.T, self.C)
        return {
            "x": x,
            **{name: (self.B, self.C) for name in self.shared},
            **{f"own_{name}": (self.B, self.K, self.C) for name in self.own},
            **({"residual": x} if self.residual else {}),
            **({"weight": (self.C,), "bias": (self.C,)} if self.affine else {}),
        }


def _unet(policy: str, T: int, C: int) -> ModulateCase:
    return ModulateCase(
        f"unet-{policy}-{C}", B=64, K=16, T=T, C=C, norm="group", groups=8, affine=True, activation="mish",
        channels_first=True, shared=("shift", "scale"), own=("shift", "scale"),
        note="group norm, Mish, FiLM; own parts from the timestep, shared ones from the observation",
    )  # fmt: skip


def _dit(T: int, C: int) -> ModulateCase:
    return ModulateCase(
        f"dit-adaln-{C}-T{T}", B=32, K=16, T=T, C=C, norm="layer", eps=1e-6, form="adaln", shared=("shift", "scale"),
        own=("shift", "scale"), note="layer norm without affine, adaLN",
    )  # fmt: skip


CASES: dict[str, ModulateCase] = {
    case.name: case
    for case in (
        *(_unet("lowdim", T, C) for T, C in ((16, 256), (8, 512), (4, 1024))),
        *(_unet("image", T, C) for T, C in ((16, 512), (8, 1024), (4, 2048))),
        *(_dit(T, C) for C in (512, 1536) for T in (16, 41)),
        ModulateCase(
            "dit-gate-1536-T41", B=32, K=16, T=41, C=1536, norm=None, shared=("gate",), own=("gate",), residual=True,
            note="the end of a DiT block: x + gate * f",
        ),
        ModulateCase(
            "minidiffuser-film-72", B=100, K=256, T=1, C=72, norm=None, shared=("shift", "scale"),
            own=("shift", "scale"), activation="silu", activation_at="output", form="adaln",
            note="scale and shift before SiLU; text per condition, noise level per sample",
        ),
    )
}  # fmt: skip
CPU_CONDITIONS = 2
"""B of the cpu scale; the rest of a case stays as it is."""


@dataclass(frozen=True)
class Cell:
    """One case in one dtype."""

    case: ModulateCase
    dtype: str

    @property
    def K(self) -> int:
        """The case's."""
        return self.case.K

    @property
    def key(self) -> str:
        """Its name in the JSON."""
        return f"{self.case.name}/K={self.K}/{self.dtype}"


@dataclass(frozen=True)
class Inputs:
    """One set of inputs of a cell."""

    case: ModulateCase
    leaves: dict[str, Tensor]
    grad_out: Tensor  # like x

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor, for byte counts."""
        return [*self.leaves.values(), self.grad_out]

    def condition_slice(self, b: int, dtype: torch.dtype) -> Inputs:
        """Condition ``b`` alone, as fresh leaves of another dtype; weight and bias belong to all."""
        leaves = {
            name: (x if name in SUMMED else x[b : b + 1]).detach().to(dtype).requires_grad_()
            for name, x in self.leaves.items()
        }
        return replace(self, leaves=leaves, grad_out=self.grad_out[b : b + 1].to(dtype))


SUMMED = frozenset({"weight", "bias"})


def make_inputs(
    case: ModulateCase, dtype: torch.dtype, device: torch.device, *, sets: int = 1, seed: int = 0
) -> list[Inputs]:
    """``sets`` sets of standard-normal inputs from one seed."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    shapes = case.shapes()
    return [
        Inputs(case, {name: draw(shape).requires_grad_() for name, shape in shapes.items()}, draw(shapes["x"]))
        for _ in range(sets)
    ]


def work(case: ModulateCase, inputs: Inputs, which: Pass) -> Work:
    """Bytes: every input in and the output out; the backward reads x, its gradient and the parameters and writes every
    gradient (that of the residual is the output's). FLOPs are nominal: the op is bound by its bytes."""
    x = inputs.grad_out.numel()
    size = inputs.grad_out.element_size()
    parameters = sum(t.numel() for name, t in inputs.leaves.items() if name not in ("x", "residual")) * size
    exponentials = float(x if case.activation else 0)
    forward = Work(12.0 * x, (3 if case.residual else 2) * x * size + parameters, exponentials)
    if which == "forward":
        return forward
    return Work(36.0 * x, forward.bytes + 3 * x * size + 2 * parameters, 2 * exponentials)


# -------------------------------------------------------------------------------------------------- the peers


def definition(inputs: Inputs) -> Tensor:
    """The library's."""
    from minidiff_fast.ops import broadcast_modulate_reference

    arguments: dict[str, Any] = {**inputs.leaves, **inputs.case.options}
    return broadcast_modulate_reference(**arguments)


def _composed(case: ModulateCase, leaves: dict[str, Tensor], repeat: bool) -> Tensor:
    """torch's own modules on rows ``[N, ...]``; parameters repeated to N rows, or broadcast against ``[B, K, ...]``."""
    x, tokens = leaves["x"], -1 if case.channels_first else -2
    n = x.flatten(0, 1)
    weight, bias = leaves.get("weight"), leaves.get("bias")
    if case.norm == "group":
        assert case.groups is not None and case.channels_first
        n = F.group_norm(n, case.groups, weight, bias, case.eps)
    elif case.norm == "layer":
        n = F.layer_norm(n, (case.C,), weight, bias, case.eps)
    act = {None: lambda z: z, "silu": F.silu, "mish": F.mish}[case.activation]

    def parameter(name: str) -> Tensor | None:
        shared, own = leaves.get(name), leaves.get(f"own_{name}")
        if repeat:
            parts = [] if shared is None else [shared.repeat_interleave(case.K, 0)]
            parts += [] if own is None else [own.flatten(0, 1)]
        else:
            parts = [] if shared is None else [shared[:, None]]
            parts += [] if own is None else [own]
        if not parts:
            return None
        return (parts[0] if len(parts) == 1 else parts[0] + parts[1]).unsqueeze(tokens)

    u = act(n) if case.activation_at == "norm" else n
    u = u if repeat else u.view_as(x)
    scale, shift, gate = (parameter(name) for name in ("scale", "shift", "gate"))
    if scale is not None:
        u = u * (scale if case.form == "film" else 1 + scale)
    u = u if shift is None else u + shift
    u = act(u) if case.activation_at == "output" else u
    u = u if gate is None else u * gate
    u = u.view_as(x)
    return leaves["residual"] + u if case.residual else u


def _prepare_ours(impl: str | None, case: ModulateCase, inputs: Inputs) -> Run:
    from minidiff_fast.ops import broadcast_modulate

    return lambda inputs: broadcast_modulate(**inputs.leaves, **case.options, impl=impl)


def _prepare_eager(repeat: bool, case: ModulateCase, inputs: Inputs) -> Run:
    return lambda inputs: _composed(case, inputs.leaves, repeat)


def _prepare_compiled(repeat: bool, case: ModulateCase, inputs: Inputs) -> Run:
    torch._dynamo.reset()  # every cell is a new static shape: stay clear of the recompile limit
    function = torch.compile(partial(_composed, case, repeat=repeat), dynamic=False)
    return lambda inputs: function(inputs.leaves)


def _always(case: ModulateCase, device: torch.device, dtype: torch.dtype) -> Reason:
    return None


def _why_not_compiled(case: ModulateCase, device: torch.device, dtype: torch.dtype) -> Reason:
    if device.type == "cpu" and not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
        return "torch.compile needs a C++ compiler on a CPU"
    return None


def _ours(impl: str | None) -> Peer:
    return Peer(
        name="ours" if impl is None else f"ours-{impl}",
        family="ours",
        what=f"minidiff_fast.ops.broadcast_modulate(impl={impl or 'auto'!r})",
        supports=lambda case, device, dtype: harness.why_not_ours(OP, impl, device, dtype),
        prepare=partial(_prepare_ours, impl),
        implementation=lambda device, dtype: harness.resolved_implementation(OP, impl, device, dtype),
        ours=True,
    )


def contestants(device: torch.device) -> list[Peer]:
    """Everyone who may run on this kind of device, ours first."""
    peers = [_ours(impl) for impl in (None, "native", "triton", "reference")]
    for name, what, repeat in (("eager", "repeated per sample", True), ("expand", "broadcast", False)):
        prepare, compiled = partial(_prepare_eager, repeat), partial(_prepare_compiled, repeat)
        suffix = "" if repeat else "-expand"
        peers.append(Peer(name, name, f"torch, parameters {what}", _always, prepare, lambda *_: "torch"))
        peers.append(Peer(f"compile{suffix}", "compile", f"torch.compile of {name}", _why_not_compiled, compiled,
                          lambda *_: "inductor"))  # fmt: skip
    return peers


# -------------------------------------------------------------------------------------------------- the suite


def case_names() -> list[str]:
    """Every case of the table."""
    return list(CASES)


def peer_names(device: torch.device) -> list[str]:
    """Every contestant on this kind of device."""
    return [peer.name for peer in contestants(device)]


def select_peers(names: Sequence[str] | None, device: torch.device) -> tuple[list[str], list[str]]:
    """See :func:`harness.select_peers`."""
    return harness.select_peers(names, contestants(device))


def plan(scale: str, cases: Iterable[str], dtypes: Iterable[str]) -> list[Cell]:
    """Cells by dtype, then in the order of the table. Nothing here is a matrix product: tf32 is fp32."""
    chosen = [CASES[name] if scale == "full" else replace(CASES[name], B=CPU_CONDITIONS) for name in cases]
    return [Cell(case, dtype) for dtype in dtypes if dtype != "tf32" for case in chosen]


class Bench(harness.Bench):
    """Measures modulation cells."""

    op = OP

    def contestants(self) -> list[Peer]:
        return contestants(self.settings.device)

    def inputs(self, cell: Cell, dtype: torch.dtype) -> list[Inputs]:
        return make_inputs(cell.case, dtype, self.settings.device, sets=INPUT_SETS)

    def truth(self, inputs: Inputs, eps: float) -> Truth:
        return truth_of(inputs, eps, definition, frozenset(f"d{name}" for name in SUMMED))

    def work(self, cell: Cell, inputs: Inputs, which: Pass) -> Work:
        return work(cell.case, inputs, which)


def render(key: str, result: dict[str, Any]) -> str:
    """See :func:`harness.rendered`."""
    return harness.rendered(key, result, ("B", "K", "T", "C"))


# ---------------------------------------------------------------------------------------- offline compilation


def record(case: ModulateCase, dtype: torch.dtype, *, hip: bool) -> list[Launch]:
    """The launches (kernel, arguments, flags) of one forward and one backward pass of ``case``, on meta tensors."""
    from minidiff_fast.ops import _broadcast_modulate_launch as launcher

    made = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in case.shapes().items()}
    names = ("shift", "scale", "gate", "own_shift", "own_scale", "own_gate", "residual", "weight", "bias")
    x = made["x"]
    tensors: dict[str, Any] = {name: made.get(name) for name in names}
    options: tuple[Any, ...] = (
        case.norm or "", case.groups or 0, case.eps, case.activation or "", case.activation_at, case.form,
        case.channels_first,
    )  # fmt: skip
    was, launcher.HIP = launcher.HIP, hip
    try:
        with recorded_launches(launcher.kernels) as launches:
            y, mean, rstd = launcher.launch_forward(x, *tensors.values(), *options)
            tensors.pop("residual")
            backward: list[Any] = [y, x, *tensors.values(), mean, rstd, *options, [True] * 9]
            launcher.launch_backward(*backward)
    finally:
        launcher.HIP = was
    return launches
