"""The native CPU kernels against the float64 definition, forward and every gradient, within the error budget.

Every comparison runs twice: with the instructions of this processor, and with those of every processor.
"""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minidiff_fast import native
from minidiff_fast.errors import InvalidArgument
from minidiff_fast.ops import QueryNorm, Rotary, RotaryPositions, broadcast_attention
from minidiff_fast.ops import _broadcast_attention_native as launch

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no native library: {native.why_missing()}")

_spec = importlib.util.spec_from_file_location(
    "broadcast_attention_cases", Path(__file__).with_name("test_broadcast_attention.py")
)
assert _spec is not None
assert _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)
cases.DEVICE = "cpu"  # in this private copy, on a machine with a GPU, too

ONCE = pytest.mark.parametrize("simd", ["auto"], indirect=True)
"""For what the choice of instructions cannot change."""
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True, params=["auto", "portable"])
def simd(request, monkeypatch):
    monkeypatch.setenv(native.SIMD, request.param)
    return request.param


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def inputs_of(*size: int, dtype=torch.float32) -> list[Tensor | None]:
    return [None if x is None else x.to(dtype) for x in cases.leaves_of(*size, dtype)]


def results(leaves, impl="native", **options) -> list[Tensor]:
    """[out, lse, dq, dk, dv, down_k, down_v] under gradients that are all different."""
    q = leaves[0]
    dout = torch.linspace(-1, 1, q.numel(), dtype=torch.float64).reshape(q.shape)
    dlse = torch.linspace(1, -1, q[..., 0].numel(), dtype=torch.float64).reshape(q.shape[:-1])
    leaves = [None if x is None else x.detach() for x in leaves]  # evaluate makes them require gradients
    return cases.evaluate(leaves, q.dtype, impl, dout, dlse, options)


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


BLOCKS = [
    # B, K, T, S, P, H, Hkv, D: one off the blocks of 6, 48 and 96 keys, of 8, 16, 32 and 64 rows, of 8 channels
    (1, 3, 11, 97, 0, 4, 2, 16),
    (2, 13, 5, 49, 0, 1, 1, 17),
    (1, 1, 129, 191, 0, 1, 1, 23),
    (1, 2, 99, 5, 99, 1, 1, 16),
    (1, 3, 16, 2, 1, 4, 4, 64),
    (1, 9, 8, 12, 6, 1, 1, 33),
    (1, 2, 33, 6, 33, 4, 2, 250),
    (1, 40, 1, 0, 3, 1, 1, 31),
]


@DTYPES
@pytest.mark.parametrize("size", [*cases.SIZES, *BLOCKS], ids=str)
def test_sizes(size, dtype):
    cases.check(*size, dtype=dtype, impl="native")


@DTYPES
@pytest.mark.parametrize(
    "options",
    [
        {"lengths": torch.tensor([0, 37, 18], dtype=torch.int32)},
        {"lengths": torch.tensor([40, 1, 36])},
        {"mask": "ts"},
        {"mask": "bs"},
        {"mask": "bts"},
        {"own_causal": True},
        {"scale": -1.3},
        {"dropout_p": 0.35, "seed": torch.tensor([2**40 + 17])},
        {"dropout_p": 0.1, "seed": torch.tensor([9]), "mask": "ts", "lengths": torch.tensor([1, 30, 37]),
         "own_causal": True, "scale": 0.5},
    ],
    ids=lambda options: "-".join(options),
)  # fmt: skip
@pytest.mark.parametrize("shape", [(3, 4, 5, 37, 5, 4, 2, 20), (3, 3, 19, 37, 19, 2, 1, 12)], ids=str)
def test_options(options, shape, dtype):
    B, _, T, S = shape[:4]
    random = torch.Generator().manual_seed(3)
    options = dict(options)
    if "mask" in options:
        sizes = {"ts": (1, T, S), "bs": (B, 1, S), "bts": (B, T, S)}[options["mask"]]
        options["mask"] = torch.rand(sizes, generator=random) > 0.5
    cases.check(*shape, dtype=dtype, impl="native", **options)


def test_strided_masks():
    leaves = inputs_of(2, 3, 5, 11, 0, 2, 1, 16)
    mask = torch.rand(2, 5, 11, generator=torch.Generator().manual_seed(1)) > 0.4
    turned = mask.transpose(0, 2).contiguous().transpose(0, 2)
    assert not turned.is_contiguous()
    assert equal(results(leaves, mask=turned), results(leaves, mask=mask))
    wide = mask[:, :1].expand(2, 5, 11)
    assert equal(results(leaves, mask=wide), results(leaves, mask=wide.contiguous()))
    assert equal(results(leaves, mask=wide), results(leaves, mask=mask[:, :1]))


@DTYPES
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_packed_keys(dropout_p, dtype):
    """Of unequal conditions, one of them empty, with tokens before and after that are nobody's and hold NaN."""
    B, K, T, P, H, Hkv, D = 4, 3, 5, 2, 4, 2, 18
    q, _, _, own_k, own_v = cases.leaves_of(B, K, T, 1, P, H, Hkv, D, dtype)
    shared = cases.leaves_of(1, 1, 1, 70, 0, H, Hkv, D, dtype)
    k, v = (x[0].clone() for x in shared[1:3])
    offsets = torch.tensor([3, 10, 10, 61, 68], dtype=torch.int32)
    leaves = [q, k, v, own_k, own_v]
    dout, dlse = torch.ones_like(q), torch.ones_like(q[..., 0])
    options = {"cu_seqlens": offsets, "dropout_p": dropout_p, "seed": torch.tensor([5])}
    exact = cases.evaluate(leaves, torch.float64, "reference", dout, dlse, options)
    same = cases.evaluate(leaves, dtype, "reference", dout, dlse, options)
    leaves = [x.detach() for x in leaves]
    for x in leaves[1:3]:
        x[:3] = x[68:] = math.nan
    ours = cases.evaluate(leaves, dtype, "native", dout, dlse, options)
    for want, reference, got in zip(exact, same, ours, strict=True):
        budget = (reference.double() - want).abs().max() + torch.finfo(dtype).eps * want.abs().max()
        assert (got.double() - want).abs().max() <= 2 * budget


def test_rotary_and_norm_are_applied_before():
    B, K, T, S, P, H, Hkv, D = 2, 3, 4, 5, 2, 4, 2, 16
    leaves = cases.leaves_of(B, K, T, S, P, H, Hkv, D, torch.float32)
    positions = RotaryPositions(
        Rotary(1, 8), torch.arange(B * K * T).reshape(B, K, T), torch.arange(B * K * P).reshape(B, K, P)
    )
    options = {"rope": positions, "q_norm": QueryNorm("rms", torch.linspace(0.5, 1.5, D))}
    dout, dlse = torch.ones_like(leaves[0]), torch.ones_like(leaves[0][..., 0])
    exact = cases.evaluate(leaves, torch.float64, "reference", dout, dlse, options)
    ours = cases.evaluate(leaves, torch.float32, "native", dout, dlse, options)
    for want, got in zip(exact, ours, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-5)


def test_queries_that_see_nothing():
    mask = torch.zeros(1, 3, 6, dtype=torch.bool)
    mask[:, 1, 2] = True
    cases.check(2, 3, 3, 6, 0, 2, 2, 16, impl="native", mask=mask)
    cases.check(2, 3, 3, 6, 0, 2, 2, 16, impl="native", lengths=torch.zeros(2, dtype=torch.int64))
    leaves = inputs_of(2, 3, 3, 6, 0, 2, 2, 16)
    out, lse, *gradients = results(leaves, mask=torch.zeros(1, 3, 6, dtype=torch.bool))
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.isneginf(lse).all()
    assert all(torch.equal(x, torch.zeros_like(x)) for x in gradients)


def test_gradient_of_a_log_sum_exp_of_minus_infinity_is_not_read():
    q, k, v, _, _ = (None if x is None else x.requires_grad_() for x in inputs_of(1, 2, 3, 4, 0, 1, 1, 8))
    mask = torch.ones(1, 3, 4, dtype=torch.bool)
    mask[:, 1] = False
    out, lse = broadcast_attention(q, k, v, mask=mask, return_lse=True, impl="native")
    dlse = torch.where(torch.isinf(lse), math.nan, 1.0)
    gradients = torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), dlse))
    assert all(torch.isfinite(x).all() for x in gradients)


def test_a_single_key():
    """The softmax of one key is 1 whatever q and k are: out is v."""
    leaves = inputs_of(2, 3, 5, 1, 0, 1, 1, 8)
    out, lse, dq, dk, dv = results(leaves)
    q, k, v = leaves[:3]
    torch.testing.assert_close(out, v[:, None].expand_as(out), rtol=0, atol=0)
    torch.testing.assert_close(lse, (q * k[:, None]).sum(-1) * 8**-0.5)


def test_extreme_logits():
    """Far apart, weights are exactly 0 and 1; far from 0, nothing overflows."""
    q = torch.zeros(1, 1, 1, 1, 8)
    q[..., 0] = 1.0
    k = torch.zeros(1, 3, 1, 8)
    k[0, :, 0, 0] = torch.tensor([3e4, -3e4, 3e4 - 200])
    v = torch.randn(1, 3, 1, 8, generator=torch.Generator().manual_seed(0))
    out, lse = broadcast_attention(q, k, v, scale=1.0, return_lse=True, impl="native")
    assert torch.equal(out[0, 0, 0, 0], v[0, 0, 0])
    assert lse.item() == 3e4


@DTYPES
def test_strided_and_expanded_inputs(dtype):
    leaves = inputs_of(2, 3, 4, 9, 2, 2, 2, 20, dtype=dtype)
    expected = results(leaves)
    for which in range(5):
        for variant in cases._variants(leaves[which]):
            assert not variant.is_contiguous()
            assert equal(results([variant if i == which else x for i, x in enumerate(leaves)]), expected)
    leaves[1] = leaves[2] = leaves[1][:1].expand(2, -1, -1, -1)
    dense = [x.contiguous() for x in leaves]
    assert equal(results(leaves), results(dense))


def test_expanded_gradient_is_read_with_its_strides():
    leaves = [x.requires_grad_() for x in inputs_of(2, 3, 4, 9, 2, 2, 2, 16)]
    out = broadcast_attention(*leaves, impl="native")
    expanded = torch.autograd.grad(out, leaves, torch.ones(1, 1, 1, 1, 1).expand_as(out), retain_graph=True)
    assert equal(list(expanded), list(torch.autograd.grad(out, leaves, torch.ones_like(out))))


def test_samples_do_not_see_each_other():
    leaves = inputs_of(2, 4, 3, 5, 3, 2, 1, 16)
    before = broadcast_attention(*leaves, impl="native")
    changed = [x.clone() for x in leaves]
    for i in (0, 3, 4):
        changed[i][:, 1] *= 50
    after = broadcast_attention(*changed, impl="native")
    others = [0, 2, 3]
    assert torch.equal(before[:, others], after[:, others])
    assert not torch.equal(before[:, 1], after[:, 1])


@DTYPES
def test_what_lies_beyond_the_lengths_is_not_read(dtype):
    leaves = inputs_of(3, 3, 4, 50, 2, 2, 2, 20, dtype=dtype)
    lengths = torch.tensor([0, 49, 7])
    expected = results(leaves, lengths=lengths)
    for x in leaves[1:3]:
        for b, length in enumerate(lengths):
            x[b, length:] = math.nan
    assert equal(results(leaves, lengths=lengths), expected)


def test_every_element_of_every_output_is_written(monkeypatch):
    """Outputs start as NaN instead of whatever memory held; nothing may be left of it."""
    real = torch.empty

    def poisoned(*args, **kwargs):
        made = real(*args, **kwargs)
        return made.fill_(math.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", lambda x, **kwargs: poisoned(x.shape, dtype=x.dtype))
    leaves = inputs_of(2, 3, 5, 37, 3, 4, 2, 20)
    for options in ({"lengths": torch.tensor([5, 0])}, {"mask": torch.arange(37)[None, None] % 3 == 0}):
        assert not any(torch.isnan(x).any() for x in results(leaves, **options))


@pytest.mark.parametrize("size", [(3, 7, 5, 53, 0, 4, 2, 24), (1, 5, 20, 60, 3, 2, 2, 15)], ids=str)
def test_threads(size, threads):
    """Within the budget for every number of threads, and the same bits from run to run; out is the same for all."""
    leaves = inputs_of(*size)
    options = {"lengths": torch.arange(53, 53 - size[0], -1)}
    alone = results(leaves, **options)
    for count in (1, 2, 3):
        threads(count)
        cases.check(*size, impl="native", **options)
        first = results(leaves, **options)
        assert equal(first, results(leaves, **options))
        assert torch.equal(first[0], alone[0])


@pytest.mark.parametrize(
    "size", [(0, 3, 4, 5, 2, 2, 1, 8), (2, 0, 4, 5, 2, 2, 1, 8), (2, 3, 0, 5, 2, 2, 1, 8)], ids=str
)
def test_empty_axes(size):
    for got, want in zip(results(inputs_of(*size)), results(inputs_of(*size), "reference"), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3, 4), (0, 3), (1, 2, 4)], ids=str)
def test_gradients_that_are_asked_for_alone(wanted):
    leaves = inputs_of(2, 3, 4, 9, 2, 2, 1, 16)

    def gradients(which):
        mine = [x.detach().requires_grad_(i in which) for i, x in enumerate(leaves)]
        return torch.autograd.grad(broadcast_attention(*mine, impl="native").square().sum(), [mine[i] for i in which])

    everything = gradients(range(5))
    assert equal(list(gradients(wanted)), [everything[i] for i in wanted])


@ONCE
@pytest.mark.slow
def test_offsets_beyond_two_to_the_31():
    """Views of 4.3 GB of address space, of which a few pages are ever touched."""
    storage = torch.empty(2**31 + 2**20, dtype=torch.bfloat16)
    far = 2**30
    dense = inputs_of(1, 3, 2, 3, 2, 2, 1, 16, dtype=torch.bfloat16)
    views = [
        storage[:].as_strided(dense[0].shape, (0, far, 32, 16, 1)),
        storage[1000:].as_strided(dense[1].shape, (0, far, 16, 1)),
        storage[2000:].as_strided(dense[2].shape, (0, far, 16, 1)),
        storage[3000:].as_strided(dense[3].shape, (0, far, 16, 16, 1)),
        storage[4000:].as_strided(dense[4].shape, (0, far, 16, 16, 1)),
    ]
    for view, x in zip(views, dense, strict=True):
        view.copy_(x)
    assert equal(results(views), results(dense))


@ONCE
@pytest.mark.parametrize("own", [0, 2])
def test_opcheck(own):
    inputs = [None if x is None else x.requires_grad_() for x in inputs_of(2, 3, 4, 5, own, 4, 2, 16)]
    mask = torch.rand(1, 4, 5, generator=torch.Generator().manual_seed(0)) > 0.2
    arguments = (*inputs, torch.tensor([5, 3]), None, mask, torch.tensor([7]), False, 0.2, 0.25, "native")
    torch.library.opcheck(torch.ops.minidiff_fast.broadcast_attention_fwd.default, arguments)


@ONCE
def test_compiles_without_graph_breaks():
    inputs = [x.requires_grad_() for x in inputs_of(2, 3, 4, 5, 2, 4, 2, 16)]

    def run(*leaves):
        return broadcast_attention(*leaves, impl="native").square().sum()

    torch._dynamo.reset()
    eager = torch.autograd.grad(run(*inputs), inputs)
    compiled = torch.autograd.grad(torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    assert equal(list(eager), list(compiled))


def test_the_paths_differ_in_speed_and_not_in_meaning(monkeypatch):
    leaves = inputs_of(2, 5, 7, 30, 3, 2, 1, 24)
    first = results(leaves)
    monkeypatch.setenv(native.SIMD, "auto")
    for a, b in zip(first, results(leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_an_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv(native.SIMD, "avx1024")
    with pytest.raises(InvalidArgument, match="MINIDIFF_FAST_NATIVE_SIMD must be auto or portable, got 'avx1024'"):
        broadcast_attention(*inputs_of(1, 1, 1, 1, 0, 1, 1, 8), impl="native")


@ONCE
def test_the_structure_is_that_of_the_header():
    """The library compares the size; the header says that every member has 8 bytes."""
    members = sum(getattr(kind, "_length_", 1) for _, kind in launch._Call._fields_)
    assert 8 * members == launch.ctypes.sizeof(launch._Call)
    run = launch._function("forward")
    assert run(launch.ctypes.byref(launch._Call(8 * members - 8))) == -1


@ONCE
def test_auto_runs_native_on_the_cpu(tmp_path):
    """In a process of its own: Triton's interpreter is chosen for this one."""
    code = (
        "import torch; from minidiff_fast.ops import broadcast_attention as f; from minidiff_fast import backend\n"
        "import minidiff_fast.ops\n"
        "names = [backend.resolve(backend.REGISTRY['broadcast_attention'], None, torch.device('cpu'), d)\n"
        "         for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64)]\n"
        "q, k = torch.randn(2, 3, 4, 2, 8), torch.randn(2, 5, 1, 8)\n"
        "assert torch.equal(f(q, k, k), f(q, k, k, impl='native'))\n"
        "print(*names)"
    )
    environment = {k: v for k, v in native.os.environ.items() if k not in ("TRITON_INTERPRET", "MINIDIFF_FAST_IMPL")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["native", "native", "reference", "reference"]
