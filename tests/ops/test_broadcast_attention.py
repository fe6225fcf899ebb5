"""The definition of broadcast attention, its checks, its schema and what autograd keeps of it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from minidiff_fast.errors import BackendUnavailable, InvalidArgument
from minidiff_fast.ops import AttentionOutput, broadcast_attention, broadcast_attention_reference

KERNEL = "triton"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tensors(
    B=2, K=3, T=4, S=5, P=2, H=4, Hkv=2, D=16, dtype=torch.float64, grad=False
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    generator = torch.Generator().manual_seed(B + 10 * K + 100 * T + 1000 * S + P)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype).to(DEVICE).requires_grad_(grad)

    own = (draw(B, K, P, Hkv, D), draw(B, K, P, Hkv, D)) if P else (None, None)
    return draw(B, K, T, H, D), draw(B, S, Hkv, D), draw(B, S, Hkv, D), *own


def by_hand(q, k, v, own_k, own_v, *, lengths=None, mask=None, own_causal=False, scale=None):
    """One query at a time, straight from the formula; mask is [B or 1, T or 1, S]."""
    B, K, T, H, D = q.shape
    G = H // k.shape[2]
    out = torch.zeros_like(q)
    lse = q.new_full(q.shape[:-1], -math.inf)
    for b in range(B):
        for i in range(K):
            for t in range(T):
                for h in range(H):
                    keys, values = [], []
                    for s in range(k.shape[1] if lengths is None else min(int(lengths[b]), k.shape[1])):
                        if mask is None or bool(mask[b % mask.shape[0], t % mask.shape[1], s]):
                            keys.append(k[b, s, h // G])
                            values.append(v[b, s, h // G])
                    for p in range(0 if own_k is None else own_k.shape[2]):
                        if not own_causal or p <= t:
                            keys.append(own_k[b, i, p, h // G])
                            values.append(own_v[b, i, p, h // G])
                    if keys:
                        logits = torch.stack(keys) @ q[b, i, t, h] * (D**-0.5 if scale is None else scale)
                        out[b, i, t, h] = torch.softmax(logits, 0) @ torch.stack(values)
                        lse[b, i, t, h] = torch.logsumexp(logits, 0)
    return out, lse


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"P": 0},
        {"S": 0},
        {"H": 6, "Hkv": 1, "D": 9},
        {"T": 4, "P": 4, "options": {"own_causal": True}},
        {"options": {"lengths": torch.tensor([0, 3])}},
        {"P": 0, "options": {"lengths": torch.tensor([0, 9])}},
        {"options": {"scale": -0.7}},
        {"options": {"mask": torch.rand(1, 4, 5, generator=torch.Generator().manual_seed(1)) > 0.5}},
        {"P": 0, "options": {"mask": torch.rand(2, 1, 5, generator=torch.Generator().manual_seed(2)) > 0.7}},
    ],
    ids=str,
)
def test_reference_is_the_formula(case):
    case = dict(case)
    options = {n: x.to(DEVICE) if isinstance(x, Tensor) else x for n, x in case.pop("options", {}).items()}
    inputs = tensors(**case)
    result = broadcast_attention_reference(*inputs, **options, return_lse=True)
    out, lse = by_hand(*inputs, **options)
    torch.testing.assert_close(result.out, out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result.lse, lse, rtol=1e-12, atol=1e-12)


def test_reference_is_attention_over_repeated_and_concatenated_tokens():
    q, k, v, own_k, own_v = tensors(H=4, Hkv=4, grad=True)
    B, K, T, H, D = q.shape

    def rows(x: Tensor) -> Tensor:
        return x.flatten(0, 1).transpose(1, 2)

    keys, values = (
        torch.cat([shared[:, None].expand(-1, K, -1, -1, -1), own], dim=2) for shared, own in ((k, own_k), (v, own_v))
    )
    expected = F.scaled_dot_product_attention(rows(q), rows(keys), rows(values)).transpose(1, 2).unflatten(0, (B, K))
    ours = broadcast_attention(q, k, v, own_k, own_v, impl="reference")
    torch.testing.assert_close(ours, expected)
    leaves = (q, k, v, own_k, own_v)
    weight = torch.linspace(-1, 1, ours.numel(), dtype=ours.dtype, device=DEVICE).view_as(ours)
    for a, b in zip(
        torch.autograd.grad((ours * weight).sum(), leaves, retain_graph=True),
        torch.autograd.grad((expected * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", [{}, {"own_causal": True}, {"dropout_p": 0.4}], ids=str)
def test_gradcheck(options):
    inputs = tensors(B=1, K=2, T=2, S=3, P=2, H=2, Hkv=1, D=8, grad=True)
    seed = torch.tensor([5], device=DEVICE)

    def run(*leaves: Tensor):
        return tuple(broadcast_attention(*leaves, seed=seed, return_lse=True, impl="reference", **options))

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(lambda *x: run(*x)[0], inputs, atol=1e-4)


def test_blind_queries_give_zero_and_finite_gradients():
    q, k, v, _, _ = tensors(P=0, grad=True)
    result = broadcast_attention(
        q, k, v, lengths=torch.tensor([0, 2], device=DEVICE), return_lse=True, impl="reference"
    )
    assert isinstance(result, AttentionOutput)
    assert (result.out[0] == 0).all() and torch.isneginf(result.lse[0]).all()
    for gradient in torch.autograd.grad(result.out.sum(), (q, k, v)):
        assert torch.isfinite(gradient).all()
        assert (gradient[0] == 0).all()


def test_dropout_is_a_function_of_the_seed():
    q, k, v, own_k, own_v = tensors(S=64, D=16)

    def run(seed: int) -> Tensor:
        return broadcast_attention(
            q, k, v, own_k, own_v, dropout_p=0.25, seed=torch.tensor([seed], device=DEVICE), impl="reference"
        )

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    torch.manual_seed(0)
    first = broadcast_attention(q, k, v, dropout_p=0.25, impl="reference")
    torch.manual_seed(0)
    assert torch.equal(first, broadcast_attention(q, k, v, dropout_p=0.25, impl="reference"))


def test_dropout_keeps_the_mean():
    """With v = 1 the output is the sum of the kept weights / (1 - p): its mean is 1, its share of zeros is p."""
    q = torch.zeros(1, 400, 5, 2, 8, device=DEVICE)
    k = torch.zeros(1, 1, 2, 8, device=DEVICE)
    out = broadcast_attention(
        q, k, torch.ones_like(k), dropout_p=0.3, seed=torch.tensor([11], device=DEVICE), impl="reference"
    )
    dropped = (out[..., 0] == 0).float().mean().item()
    assert abs(dropped - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 4000)
    assert out.max().item() == pytest.approx(1 / 0.7)


@pytest.mark.parametrize("shape", [{"B": 0}, {"K": 0}, {"T": 0}, {"S": 0}, {"S": 0, "P": 0}], ids=str)
@pytest.mark.parametrize("impl", ["reference", KERNEL])
def test_empty_axes(shape, impl):
    inputs = tensors(**shape, dtype=torch.float32, grad=True)
    out = broadcast_attention(*inputs, impl=impl)
    assert out.shape == inputs[0].shape
    leaves = [x for x in inputs if x is not None]
    for leaf, gradient in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert gradient.shape == leaf.shape and torch.isfinite(gradient).all()


@pytest.mark.parametrize("options", [{}, {"lengths": torch.tensor([3, 5]), "dropout_p": 0.1, "seed": torch.tensor([3])}], ids=["plain", "all"])  # fmt: skip
@pytest.mark.parametrize("own", [0, 2])
def test_opcheck(options, own):
    inputs = tensors(P=own, dtype=torch.float32, grad=True)
    options = {n: x.to(DEVICE) if isinstance(x, Tensor) else x for n, x in options.items()}
    mask = torch.rand(1, 4, 5, device=DEVICE) > 0.2 if options else None
    arguments = (
        *inputs,
        options.get("lengths"),
        None,
        mask,
        options.get("seed"),
        False,
        options.get("dropout_p", 0.0),
        0.25,
        KERNEL,
    )
    torch.library.opcheck(torch.ops.minidiff_fast.broadcast_attention_fwd.default, arguments)


@pytest.mark.parametrize("impl", ["reference", KERNEL])
def test_compiles_without_graph_breaks(impl):
    inputs = tensors(dtype=torch.float32, grad=True)

    def run(q, k, v, own_k, own_v):
        return broadcast_attention(q, k, v, own_k, own_v, impl=impl).square().sum()

    torch._dynamo.reset()
    eager = torch.autograd.grad(run(*inputs), inputs)
    compiled = torch.autograd.grad(torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", ["reference", KERNEL])
def test_compiles_once_for_changing_shapes(impl):
    frames = CompileCounter()

    def run(q, k, v, own_k, own_v):
        return broadcast_attention(q, k, v, own_k, own_v, impl=impl)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=frames)
    for B, K, S in [(2, 3, 5), (3, 4, 6), (5, 2, 9), (4, 7, 11)]:
        inputs = tensors(B=B, K=K, S=S, dtype=torch.float32)
        torch.testing.assert_close(compiled(*inputs), run(*inputs))
    assert frames.frame_count <= 2


@pytest.mark.parametrize("impl", ["reference", KERNEL])
def test_autocast_lowers_every_input(impl):
    """As scaled_dot_product_attention does: a 16-bit q may meet a float32 k, when only q went through a Linear."""
    q, k, v, own_k, own_v = tensors(dtype=torch.float32)
    low = torch.float16 if DEVICE == "cuda" else torch.bfloat16
    with torch.autocast(DEVICE, dtype=low):
        mixed = broadcast_attention(q.to(low), k, v, own_k, own_v, impl="reference")
        out = broadcast_attention(q, k, v, own_k, own_v, impl=impl)
        assert broadcast_attention(q.double(), k.double(), v.double(), impl="reference").dtype == torch.float64
    assert out.dtype == mixed.dtype == low
    expected = broadcast_attention(*(x.to(low) for x in (q, k, v, own_k, own_v)), impl=impl)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("impl", ["reference", KERNEL])
def test_what_lies_beyond_the_lengths_is_never_read(impl):
    q, k, v, own_k, own_v = tensors(dtype=torch.float32)
    lengths = torch.tensor([2, 4], device=DEVICE)
    clean = broadcast_attention(q, k, v, own_k, own_v, lengths=lengths, impl=impl)
    dirty_k, dirty_v = k.clone(), v.clone()
    for b, length in enumerate(lengths.tolist()):
        dirty_k[b, length:], dirty_v[b, length:] = math.nan, math.inf
    leaves = [x.requires_grad_() for x in (q, dirty_k, dirty_v, own_k, own_v)]
    out = broadcast_attention(*leaves, lengths=lengths, impl=impl)
    torch.testing.assert_close(out, clean)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize("impl", ["reference", KERNEL])
def test_a_nan_gradient_of_a_blind_lse_stays_where_it_is(impl):
    """logaddexp of two log-sum-exps that are both -inf has a NaN gradient; the tokens must not get it."""
    q, k, v, _, _ = tensors(P=0, dtype=torch.float32, grad=True)
    lengths = torch.tensor([0, 3], device=DEVICE)
    result = broadcast_attention(q, k, v, lengths=lengths, return_lse=True, impl=impl)
    upstream = torch.where(torch.isinf(result.lse), math.nan, 1.0)
    gradients = torch.autograd.grad([result.out, result.lse], (q, k, v), [torch.ones_like(result.out), upstream])
    assert all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("impl", ["reference", KERNEL])
def test_float16_logits_do_not_overflow_into_blindness(impl):
    q = torch.full((1, 1, 1, 1, 64), 40.0, dtype=torch.float16, device=DEVICE)
    k = torch.full((1, 1, 1, 64), -40.0, dtype=torch.float16, device=DEVICE)  # q . k = -102,400, over float16
    out = broadcast_attention(q, k, torch.ones_like(k), impl=impl)
    assert torch.equal(out, torch.ones_like(out))


@pytest.mark.parametrize("wanted", [(0,), (1, 2), (3, 4), (2,)], ids=str)
def test_only_the_gradients_that_are_asked_for(wanted, monkeypatch):
    from minidiff_fast.ops import _broadcast_attention_launch as launcher

    launched = []
    for name in ("_launch_dq", "_launch_dkdv"):
        real = getattr(launcher, name)

        def spy(*args, _name=name, _real=real, **kwargs):
            launched.append((_name, kwargs.get("own")))
            return _real(*args, **kwargs)

        monkeypatch.setattr(launcher, name, spy)
    inputs = tensors(dtype=torch.float32, grad=True)
    every = torch.autograd.grad(broadcast_attention(*inputs, impl=KERNEL).sum(), inputs)
    assert sorted(launched, key=str) == [("_launch_dkdv", False), ("_launch_dkdv", True), ("_launch_dq", None)]
    launched.clear()
    some = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
    got = torch.autograd.grad(broadcast_attention(*some, impl=KERNEL).sum(), [some[i] for i in wanted])
    assert all(torch.equal(every[i], g) for i, g in zip(wanted, got, strict=True))
    kind = {0: ("_launch_dq", None), 1: ("_launch_dkdv", False), 2: ("_launch_dkdv", False), 3: ("_launch_dkdv", True)}
    assert launched == [kind[wanted[0]]]


def test_float32_products_follow_every_switch_of_torch():
    from minidiff_fast.ops._broadcast_attention_launch import _precision

    x = torch.zeros(1)
    matmul, before = torch.backends.cuda.matmul, torch.get_float32_matmul_precision()
    try:
        for switch, expected in [("highest", "ieee"), ("high", "tf32")]:
            torch.set_float32_matmul_precision(switch)
            assert _precision(x) == expected and _precision(x.half()) == "ieee"
        matmul.fp32_precision = "ieee"
        assert _precision(x) == "ieee"
        matmul.fp32_precision = "tf32"
        assert _precision(x) == "tf32"
    finally:
        matmul.fp32_precision = "none"
        torch.set_float32_matmul_precision(before)


def saved_bytes(run, *leaves: Tensor) -> dict[int, int]:
    """Bytes that autograd saves during ``run``, by storage; the storages of the inputs are told apart by the caller."""
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run(*leaves)
    return saved


def condition_and_sample_bytes(K: int, impl: str) -> tuple[int, int]:
    q, k, v, own_k, own_v = tensors(B=2, K=K, T=3, S=40, P=1, H=4, Hkv=4, D=16, dtype=torch.float32, grad=True)
    saved = saved_bytes(lambda *x: broadcast_attention(*x, impl=impl), q, k, v, own_k, own_v)
    condition = {x.untyped_storage().data_ptr() for x in (k, v)}
    of_condition = sum(size for storage, size in saved.items() if storage in condition)
    return of_condition, sum(saved.values()) - of_condition


def test_what_autograd_saves_for_the_condition_does_not_depend_on_k():
    one, many = condition_and_sample_bytes(1, KERNEL), condition_and_sample_bytes(64, KERNEL)
    assert one[0] == many[0] == 2 * (2 * 40 * 4 * 16) * 4  # k and v themselves, once
    per_sample = (
        2 * 3 * 4 * (16 + 16 + 1 + 1) * 4 + 2 * (2 * 1 * 4 * 16) * 4
    )  # q, out, lse and its correction; own_k, own_v
    assert one[1] == per_sample
    assert many[1] == 64 * per_sample  # nothing of shape [B, K, S, ...]: that would be 40 times lse


BAD = {
    "q rank": (lambda q, k, v, ok, ov: (q[0], k, v), {}, r"q must be \[B, K, T, H, D\]"),
    "k batch": (lambda q, k, v, ok, ov: (q, k[:1], v), {}, r"k must be \[B, S, Hkv, D\] = \[2, S, Hkv, 16\], got \[1, 5, 2, 16\]"),
    "k width": (lambda q, k, v, ok, ov: (q, k[..., :8], v), {}, r"k must be .* = \[2, S, Hkv, 16\]"),
    "v length": (lambda q, k, v, ok, ov: (q, k, v[:, :3]), {}, r"v must be \[B, S, Hkv, D\] = \[2, 5, 2, 16\]"),
    "heads": (lambda q, k, v, ok, ov: (q[..., :3, :], k, v), {}, r"Hkv must divide H = 3, got Hkv = 2"),
    "width": (lambda q, k, v, ok, ov: (q[..., :4], k[..., :4], v[..., :4]), {}, "from 8 to 256, got 4"),
    "dtype": (lambda q, k, v, ok, ov: (q, k.half(), v), {}, "k must have the dtype of q, torch.float32, got torch.float16"),
    "integers": (lambda q, k, v, ok, ov: (q.long(), k.long(), v.long()), {}, "floating-point"),
    "own alone": (lambda q, k, v, ok, ov: (q, k, v, ok), {}, "own_k came without own_v"),
    "own samples": (lambda q, k, v, ok, ov: (q, k, v, ok[:, :2], ov[:, :2]), {}, r"own_k must be \[B, K, P, Hkv, D\] = \[2, 3, P, 2, 16\]"),
    "own causal": (lambda q, k, v, ok, ov: (q, k, v, ok, ov), {"own_causal": True}, "own_causal needs P = T = 4, got P = 2"),
    "own causal without own": (lambda q, k, v, ok, ov: (q, k, v), {"own_causal": True}, "own_k is None"),
    "lengths shape": (lambda q, k, v, ok, ov: (q, k, v), {"lengths": torch.ones(3, dtype=torch.int64)}, r"lengths must be \[B\] = \[2\]"),
    "lengths dtype": (lambda q, k, v, ok, ov: (q, k, v), {"lengths": torch.ones(2)}, "lengths must be int32 or int64"),
    "mask dtype": (lambda q, k, v, ok, ov: (q, k, v), {"mask": torch.ones(4, 5)}, "mask must be boolean"),
    "mask shape": (lambda q, k, v, ok, ov: (q, k, v), {"mask": torch.ones(5, 4, dtype=torch.bool)}, r"mask must be \[T, S\] = \[4, 5\]"),
    "dropout": (lambda q, k, v, ok, ov: (q, k, v), {"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1.0"),
    "seed": (lambda q, k, v, ok, ov: (q, k, v), {"dropout_p": 0.1, "seed": torch.ones(2)}, r"seed must be \[1\] int64"),
    "learned scale": (lambda q, k, v, ok, ov: (q, k, v), {"scale": torch.tensor(0.5)}, "scale must be a number, got Tensor .a learned scale goes into q"),
    "scale": (lambda q, k, v, ok, ov: (q, k, v), {"scale": math.nan}, "scale must be a finite number"),
    "impl": (lambda q, k, v, ok, ov: (q, k, v), {"impl": "cuda"}, "impl must be one of"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    build, options, message = BAD[name]
    options = {n: x.to(DEVICE) if isinstance(x, Tensor) else x for n, x in options.items()}
    with pytest.raises(InvalidArgument, match=message) as caught:
        broadcast_attention(*build(*tensors(dtype=torch.float32)), **options)
    assert "\n" not in str(caught.value)


def test_device_mismatch_is_named():
    q, k, v, _, _ = tensors(dtype=torch.float32)
    with pytest.raises(InvalidArgument, match=r"k must be on the device of q, .*, got meta"):
        broadcast_attention(q, k.to("meta"), v)


def test_ambiguous_mask_is_refused():
    q, k, v, _, _ = tensors(B=4, T=4, S=5, dtype=torch.float32)
    mask = torch.ones(4, 5, dtype=torch.bool, device=DEVICE)
    with pytest.raises(InvalidArgument, match="ambiguous when B = T = 4"):
        broadcast_attention(q, k, v, mask=mask)
    assert broadcast_attention(q, k, v, mask=mask[None], impl="reference").shape == q.shape


def test_a_named_implementation_never_falls_back():
    q, k, v, _, _ = tensors(dtype=torch.float32)
    with pytest.raises(BackendUnavailable, match="float64"):
        broadcast_attention(q.cpu().double(), k.cpu().double(), v.cpu().double(), impl="native")
    with pytest.raises(BackendUnavailable, match="float64"):
        broadcast_attention(q.double(), k.double(), v.double(), impl=KERNEL)
