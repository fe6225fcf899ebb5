"""Packed keys, rotary positions, query norms and flash-attn: definition, checks, schema and what autograd keeps."""

from __future__ import annotations

import math
import sys
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from minidiff_fast.errors import BackendUnavailable, InvalidArgument
from minidiff_fast.ops import QueryNorm, Rotary, RotaryPositions, broadcast_attention, rotate
from minidiff_fast.ops import broadcast_attention as op

KERNEL = "triton"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, K, T, P, H, HKV, D = 2, 3, 2, 2, 4, 2, 12
OFFSETS = torch.tensor([1, 5, 8], dtype=torch.int32, device=DEVICE)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=dtype).to(DEVICE).requires_grad_(grad)


def tensors(*, packed: bool = True, own: bool = True, dtype=torch.float64, grad=False) -> list[Tensor | None]:
    keys = (9, HKV, D) if packed else (B, 5, HKV, D)
    shapes = [(B, K, T, H, D), keys, keys, *[(B, K, P, HKV, D)] * 2]
    made = [draw(*shape, seed=i, dtype=dtype, grad=grad) for i, shape in enumerate(shapes)]
    return made if own else [*made[:3], None, None]


def rope_of(rotary: Rotary, own: bool = True) -> RotaryPositions:
    axes = [3] if rotary.axes == 3 else []
    return RotaryPositions(rotary, draw(B, K, T, *axes, seed=7), draw(B, K, P, *axes, seed=8) if own else None)


def test_packed_reference_is_one_condition_after_the_other():
    q, k, v, own_k, own_v = tensors(grad=True)
    result = broadcast_attention(q, k, v, own_k, own_v, cu_seqlens=OFFSETS, return_lse=True, impl="reference")
    for b, (start, end) in enumerate([(1, 5), (5, 8)]):
        one = broadcast_attention(
            *(x[b : b + 1] for x in (q,)), k[None, start:end], v[None, start:end], own_k[b : b + 1], own_v[b : b + 1],
            return_lse=True, impl="reference",
        )  # fmt: skip
        torch.testing.assert_close(result.out[b], one.out[0])
        torch.testing.assert_close(result.lse[b], one.lse[0])
    for gradient in torch.autograd.grad(result.out.sum(), (k, v)):
        assert (gradient[[0, 8]] == 0).all() and (gradient[1:8] != 0).any(-1).all()


def test_what_packed_tokens_belong_to_nobody_holds_is_never_read():
    q, k, v, _, _ = tensors(own=False)
    clean = broadcast_attention(q, k, v, cu_seqlens=OFFSETS, impl="reference")
    k[[0, 8]], v[[0, 8]] = math.nan, math.inf
    torch.testing.assert_close(broadcast_attention(q, k, v, cu_seqlens=OFFSETS, impl="reference"), clean)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_transform_is_norm_then_rotation_before_the_product(kind):
    q, k, v, own_k, own_v = tensors(packed=False)
    weight, bias, rope = draw(D, seed=3), draw(D, seed=4), rope_of(Rotary(3, D))
    ours = broadcast_attention(
        q, k, v, own_k, own_v, rope=rope, q_norm=QueryNorm(kind, weight, bias, 1e-3), impl="reference"
    )
    if kind == "layer":
        normed = F.layer_norm(q, (D,), weight, bias, 1e-3)
    else:
        normed = F.rms_norm(q, (D,), weight, 1e-3) + bias
    q, own_k = rotate(normed, rope.q_positions, rope.rotary), rotate(own_k, rope.own_positions, rope.rotary)
    torch.testing.assert_close(ours, broadcast_attention(q, k, v, own_k, own_v, impl="reference"))


def test_gradcheck():
    inputs = [x[:, :1, :1] if i == 0 else x[:, :1] if i > 2 else x for i, x in enumerate(tensors())]
    leaves = [x.detach().requires_grad_() for x in (*inputs, draw(D, seed=3), draw(D, seed=4))]
    rope = RotaryPositions(Rotary(3, 6), draw(B, 1, 1, 3), draw(B, 1, P, 3))

    def run(q, k, v, own_k, own_v, weight, bias):
        norm = QueryNorm("layer", weight, bias)
        return broadcast_attention(
            q, k, v, own_k, own_v, cu_seqlens=OFFSETS, rope=rope, q_norm=norm, return_lse=True, impl="reference"
        )

    assert torch.autograd.gradcheck(run, leaves)


def test_opcheck():
    inputs = tensors(dtype=torch.float32, grad=True)
    weight, bias = (draw(D, seed=i, dtype=torch.float32, grad=True) for i in (3, 4))
    at, own = draw(B, K, T, 3, dtype=torch.float32), draw(B, K, P, 3, dtype=torch.float32)
    arguments = (*inputs, None, OFFSETS, None, None, False, 0.0, 0.3, KERNEL)
    transform = (at, own, weight, bias, [3, 12, False, False], 100.0, "layer", 1e-5)
    torch.library.opcheck(torch.ops.minidiff_fast.broadcast_attention_fwd.default, (*arguments, *transform))


@pytest.mark.parametrize("impl", ["reference", KERNEL])
def test_compiles_without_graph_breaks(impl):
    leaves = [*tensors(dtype=torch.float32, grad=True), draw(D, dtype=torch.float32, grad=True)]
    at, own = draw(B, K, T, dtype=torch.float32), draw(B, K, P, dtype=torch.float32)

    def run(q, k, v, own_k, own_v, weight):
        rope, norm = RotaryPositions(Rotary(1, D), at, own), QueryNorm("rms", weight)
        out = broadcast_attention(q, k, v, own_k, own_v, cu_seqlens=OFFSETS, rope=rope, q_norm=norm, impl=impl)
        return out.square().sum()

    torch._dynamo.reset()
    eager = torch.autograd.grad(run(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(run, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)


def test_autograd_keeps_inputs_positions_and_nothing_rotated():
    inputs = tensors(dtype=torch.float32, grad=True)
    rope, weight = rope_of(Rotary(3, D)), draw(D, dtype=torch.float32, grad=True)
    saved: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.setdefault(x.data_ptr(), x), lambda x: x):
        norm = QueryNorm("layer", weight)
        result = broadcast_attention(*inputs, cu_seqlens=OFFSETS, rope=rope, q_norm=norm, return_lse=True, impl=KERNEL)
    given = {x.data_ptr() for x in (*inputs, OFFSETS, rope.q_positions, rope.own_positions, weight)}
    made = [x for pointer, x in saved.items() if pointer not in given]
    lse = torch.Size([B, K, T, H])
    assert sorted(x.shape for x in made) == sorted([result.out.shape, lse, lse])  # lse and its correction


@pytest.mark.parametrize("wanted", ["q", "weight", "own_k"])
def test_only_the_gradients_that_are_asked_for(wanted):
    names = ("q", "k", "v", "own_k", "own_v", "weight")
    values = [*tensors(dtype=torch.float32), draw(D, dtype=torch.float32)]
    rope = rope_of(Rotary(1, D))

    def gradients(which: set[str]) -> dict[str, Tensor]:
        leaves = {n: x.detach().requires_grad_(n in which) for n, x in zip(names, values, strict=True)}
        norm = QueryNorm("rms", leaves["weight"])
        tensors = [leaves[n] for n in names[:5]]
        out = broadcast_attention(*tensors, cu_seqlens=OFFSETS, rope=rope, q_norm=norm, impl=KERNEL)
        found = torch.autograd.grad(out.square().sum(), [leaves[n] for n in names if n in which])
        return dict(zip([n for n in names if n in which], found, strict=True))

    assert torch.equal(gradients({wanted})[wanted], gradients(set(names))[wanted])


@pytest.mark.parametrize("shape", [{"q": 0}, {"k": 0}], ids=str)
@pytest.mark.parametrize("impl", ["reference", KERNEL])
def test_empty_axes(shape, impl):
    q, k, v, own_k, own_v = tensors(dtype=torch.float32)
    weight = draw(D, dtype=torch.float32, grad=True)
    offsets, rope = OFFSETS, rope_of(Rotary(1, D))
    if "k" in shape:
        k, v, offsets = k[:0], v[:0], torch.zeros_like(OFFSETS)
    else:
        q, own_k, own_v = q[:, :0], own_k[:, :0], own_v[:, :0]
        rope = RotaryPositions(rope.rotary, rope.q_positions[:, :0], rope.own_positions[:, :0])
    leaves = [x.requires_grad_() for x in (q, k, v, own_k, own_v)]
    out = broadcast_attention(*leaves, cu_seqlens=offsets, rope=rope, q_norm=QueryNorm("layer", weight), impl=impl)
    assert out.shape == q.shape
    for leaf, gradient in zip([*leaves, weight], torch.autograd.grad(out.sum(), [*leaves, weight]), strict=True):
        assert gradient.shape == leaf.shape and torch.isfinite(gradient).all()


def test_autocast_leaves_positions_and_norm_alone():
    inputs = tensors(dtype=torch.float32)
    rope, norm = rope_of(Rotary(1, D)), QueryNorm("rms", draw(D, dtype=torch.float32))
    options = {"cu_seqlens": OFFSETS, "rope": rope, "q_norm": norm, "impl": "reference"}
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = broadcast_attention(*inputs, **options)
    assert torch.equal(out, broadcast_attention(*(x.bfloat16() for x in inputs), **options))


class FlashStandIn(ModuleType):
    """flash-attn's two functions by scaled_dot_product_attention; they note which was called."""

    def __init__(self) -> None:
        super().__init__("flash_attn")
        self.called: list[str] = []

    def flash_attn_func(self, q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        self.called.append("equal")
        rows = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*rows, scale=softmax_scale, enable_gqa=True).transpose(1, 2)

    def flash_attn_varlen_func(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False,
    ):  # fmt: skip
        self.called.append("packed")
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        outs = []
        for (q0, q1), (k0, k1) in zip(*(pairwise(x.tolist()) for x in (cu_seqlens_q, cu_seqlens_k)), strict=True):
            assert q1 - q0 <= max_seqlen_q and k1 - k0 <= max_seqlen_k
            outs.append(self.flash_attn_func(q[None, q0:q1], k[None, k0:k1], v[None, k0:k1], 0.0, softmax_scale)[0])
        return torch.cat(outs)


@pytest.fixture
def flash(monkeypatch):
    stand_in = FlashStandIn()
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in)
    backends = sys.modules[op.__module__].BACKENDS
    monkeypatch.setitem(backends.why_not, "flash", lambda device, dtype: None)
    return stand_in


def wide(*shape: int, seed: int) -> Tensor:
    return draw(*shape, 16, seed=seed, dtype=torch.float32, grad=True)


@pytest.mark.parametrize("packed", [False, True])
def test_flash_is_the_definition_on_folded_queries(flash, packed):
    leaves = [wide(B, K, T, H, seed=0), *(wide(*((9,) if packed else (B, 5)), HKV, seed=i) for i in (1, 2))]
    rope = RotaryPositions(Rotary(1, 16), draw(B, K, T))
    options = {"rope": rope, "q_norm": QueryNorm("rms"), "cu_seqlens": OFFSETS if packed else None}
    weight = draw(B, K, T, H, 16, seed=5, dtype=torch.float32)
    got, expected = (broadcast_attention(*leaves, **options, impl=impl) for impl in ("flash", "reference"))
    torch.testing.assert_close(got, expected)
    assert flash.called[0] == ("packed" if packed else "equal")
    for a, b in zip(
        torch.autograd.grad((got * weight).sum(), leaves),
        torch.autograd.grad((expected * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


REFUSED = {
    "own": ({"own": True}, "own_k: it has no second segment"),
    "mask": ({"mask": torch.ones(1, T, 5, dtype=torch.bool, device=DEVICE)}, "a mask: it has none"),
    "lengths": ({"lengths": torch.ones(B, dtype=torch.int32, device=DEVICE)}, "pack them and give cu_seqlens"),
    "dropout": ({"dropout_p": 0.1}, "dropout_p = 0.1: its random numbers"),
    "lse": ({"return_lse": True}, "log-sum-exp has no gradient"),
    "width": ({"D": 15}, "D = 15: it takes multiples of 8"),
    "empty": ({"S": 0}, "an empty axis"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_flash_refuses_what_it_does_not_compute(flash, name):
    options, message = REFUSED[name]
    options = dict(options)
    D, S = options.pop("D", 16), options.pop("S", 5)
    own = [draw(B, K, P, HKV, D)] * 2 if options.pop("own", False) else []
    with pytest.raises(BackendUnavailable, match=message):
        broadcast_attention(draw(B, K, T, H, D), *[draw(B, S, HKV, D)] * 2, *own, **options, impl="flash")
    assert not flash.called


def test_flash_says_what_it_lacks(monkeypatch):
    from minidiff_fast import backend
    from minidiff_fast.ops._broadcast_attention_flash import why_not_flash

    monkeypatch.setattr(backend, "_installed", lambda package: False)
    assert "flash_attn is not installed; pip install" in why_not_flash(torch.device("cuda"), torch.float16)
    monkeypatch.setattr(backend, "_installed", lambda package: True)
    assert "runs on GPUs" in why_not_flash(torch.device("cpu"), torch.float16)
    assert "not torch.float32" in why_not_flash(torch.device("cuda"), torch.float32)
    assert why_not_flash(torch.device("cuda"), torch.bfloat16) is None


FULL = Rotary(1, H * D, full_width=True)
BAD = {
    "packed rank": ({"packed": False, "cu_seqlens": OFFSETS}, r"k must be \[N, Hkv, D\] with cu_seqlens = \[N, Hkv, 12\], got \[2, 5, 2, 12\]"),
    "offsets missing": ({"cu_seqlens": None}, r"k must be \[B, S, Hkv, D\] = \[2, S, Hkv, 12\], got \[9, 2, 12\]"),
    "offsets shape": ({"cu_seqlens": OFFSETS[:2]}, r"cu_seqlens must be \[B \+ 1\] = \[3\], got \[2\]"),
    "offsets dtype": ({"cu_seqlens": OFFSETS.long()}, "cu_seqlens must be int32 on .*, got torch.int64"),
    "lengths too": ({"lengths": OFFSETS[:2]}, r"lengths is for keys \[B, S, Hkv, D\]"),
    "mask too": ({"mask": torch.ones(1, 1, 9, dtype=torch.bool, device=DEVICE)}, r"mask is for keys \[B, S, Hkv, D\]"),
    "rope type": ({"rope": Rotary(1, 12)}, "rope must be a RotaryPositions, got Rotary"),
    "rope width": ({"rope": rope_of(Rotary(1, 14))}, "rotary_dim must be at most D = 12, got 14"),
    "rope positions": ({"rope": RotaryPositions(Rotary(3, 12), draw(B, K, T))}, r"rope.q_positions must be \[B, K, T, 3\] = \[2, 3, 2, 3\] for axes = 3"),
    "own positions": ({"rope": RotaryPositions(Rotary(1, 12), draw(B, K, T), draw(B, K, 5))}, r"rope.own_positions must be \[B, K, P\] = \[2, 3, 2\]"),
    "own positions alone": ({"own": False, "rope": rope_of(Rotary(1, 12))}, "rope.own_positions came without own_k"),
    "full width": ({"rope": rope_of(FULL)}, "full_width rotates across heads and needs Hkv = H = 4, got Hkv = 2"),
    "norm type": ({"q_norm": "rms"}, "q_norm must be a QueryNorm, got str"),
    "norm kind": ({"q_norm": QueryNorm("batch")}, "q_norm.kind must be 'layer' or 'rms', got 'batch'"),
    "norm eps": ({"q_norm": QueryNorm("rms", eps=-1.0)}, "q_norm.eps must be a finite number of at least 0"),
    "norm weight": ({"q_norm": QueryNorm("rms", draw(5))}, r"q_norm.weight must be \[D\] = \[12\], got \[5\]"),
    "norm bias": ({"q_norm": QueryNorm("rms", None, draw(12).to("meta"))}, "q_norm.bias must be .* got torch.float64 on meta"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    options, message = BAD[name]
    options = {"cu_seqlens": OFFSETS, **options}
    inputs = tensors(packed=options.pop("packed", True), own=options.pop("own", True))
    with pytest.raises(InvalidArgument, match=message) as caught:
        broadcast_attention(*inputs, **options)
    assert "\n" not in str(caught.value)


def test_norm_and_full_width_exclude_each_other():
    q, k = draw(B, K, T, H, D), draw(B, 5, H, D)
    rope = RotaryPositions(FULL, draw(B, K, T))
    with pytest.raises(InvalidArgument, match="q_norm is per head, and full_width rotates across heads"):
        broadcast_attention(q, k, k, rope=rope, q_norm=QueryNorm("rms"))
