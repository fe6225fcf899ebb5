"""BroadcastCrossAttention against torch's nn.MultiheadAttention with repeated conditions."""

from __future__ import annotations

import copy
import os
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff_fast.errors import BackendUnavailable, InvalidArgument
from minidiff_fast.nn import BroadcastCrossAttention, ConditionCache, LayerCache, Rotary1D, Rotary3D
from minidiff_fast.ops import rotate_reference

E, H, B, T, S = 24, 2, 3, 4, 5
TOLERANCE = {torch.float64: 1e-11, torch.float32: 5e-6}
FORMS = {
    "plain": {},
    "widths": dict(kdim=13, vdim=7),
    "no bias": dict(bias=False),
    "bias_kv": dict(add_bias_kv=True),
    "zero_attn": dict(add_zero_attn=True),
    "both, widths": dict(add_bias_kv=True, add_zero_attn=True, kdim=13, vdim=13),
}
MASKS = ["none", "padding", "attn", "padding attn"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_kernels = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET", "0") in ("", "0"),
    reason="the kernels need a GPU or TRITON_INTERPRET=1",
)


def pair_of(form: str = "plain", dtype=torch.float64, **ours):
    """Torch's module and ours with the same parameters, none of them zero."""
    torch.manual_seed(len(form))
    options = {**FORMS[form], "dtype": dtype, "batch_first": ours.pop("batch_first", True)}
    theirs = nn.MultiheadAttention(E, H, **options)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.4)
    module = BroadcastCrossAttention(E, H, **options, **{"impl": "reference", **ours})
    module.load_state_dict(theirs.state_dict(), strict=True)
    return module.eval(), theirs.eval()


def inputs_of(module, k: int, dtype=torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Batch first: query [N, T, E], key [B, S, kdim], value [B, S, vdim]; every condition differs."""
    torch.manual_seed(k)
    key = torch.randn(B, S, module.kdim, dtype=dtype)
    value = key if module.kdim == module.vdim else torch.randn(B, S, module.vdim, dtype=dtype)
    return torch.randn(B * k, T, E, dtype=dtype), key, value


def repeat(x: Tensor, k: int, layout: str) -> Tensor:
    return x.repeat_interleave(k, 0) if layout == "bk" else x.repeat(k, *[1] * (x.dim() - 1))


def masks_of(kind: str) -> dict[str, Tensor]:
    masks = {}
    if "padding" in kind:
        masks["key_padding_mask"] = torch.arange(S) >= torch.tensor([[S], [2], [1]])
    if "attn" in kind:
        masks["attn_mask"] = torch.arange(S) > torch.arange(T)[:, None]
    return masks


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0.0, atol=TOLERANCE[want.dtype] * max(1.0, want.abs().max().item()))


def compare(module, theirs, k, layout, masks, dtype, axis=0):
    """Outputs and every gradient; ``axis`` is that of the rows."""
    query, key, value = inputs_of(module, k, dtype)
    weight = torch.randn(B * k, T, E, dtype=dtype)
    grads = []
    for attention, repeats in ((module, 1), (theirs, k)):
        leaves = [x.clone().requires_grad_() for x in (query, key, value)]
        if value is key:
            leaves[2] = leaves[1]
        rows = [x if repeats == 1 else repeat(x, k, layout) for x in leaves[1:]]
        if value is key:
            rows[1] = rows[0]
        some = dict(masks)
        if repeats > 1 and "key_padding_mask" in some:
            some["key_padding_mask"] = repeat(some["key_padding_mask"], k, layout)
        args = [x.transpose(0, axis) for x in (leaves[0], rows[0])]
        args.append(args[1] if value is key else rows[1].transpose(0, axis))
        out, weights = attention(*args, need_weights=False, **some)
        assert weights is None
        out = out.transpose(0, axis)
        (out * weight).sum().backward()
        grads.append([out, *(x.grad for x in leaves), *(p.grad for p in attention.parameters())])
        attention.zero_grad()
    for got, want in zip(*grads, strict=True):
        close(got, want)


# -------------------------------------------------------------------- drop-in


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("form", FORMS)
def test_equals_torch_with_repeated_conditions(form, masks, k, dtype):
    module, theirs = pair_of(form, dtype)
    compare(module, theirs, k, "bk", masks_of(masks), dtype)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("layout", ["bk", "kb"])
@pytest.mark.parametrize("form", ["plain", "both, widths"])
def test_layouts_and_axes(form, layout, batch_first):
    module, theirs = pair_of(form, layout=layout, batch_first=batch_first)
    compare(module, theirs, 5, layout, masks_of("padding attn"), torch.float64, axis=0 if batch_first else 1)
    query, key, value = (x.transpose(0, 0 if batch_first else 1) for x in inputs_of(module, 5))
    other, _ = pair_of(form, layout="kb" if layout == "bk" else "bk", batch_first=batch_first)
    assert (module(query, key, value)[0] - other(query, key, value)[0]).abs().max() > 1e-2  # the conditions do differ


@pytest.mark.parametrize("form", FORMS)
def test_state_dict_initialisation_and_class(form):
    modules = []
    for cls in (nn.MultiheadAttention, BroadcastCrossAttention):
        torch.manual_seed(0)
        modules.append(cls(E, H, 0.1, **FORMS[form]))
    theirs, ours = modules
    assert isinstance(ours, nn.MultiheadAttention) and ours.dropout == 0.1 and not ours.batch_first
    for (name, a), (other, b) in zip(theirs.state_dict().items(), ours.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b)
    theirs.load_state_dict(ours.state_dict(), strict=True)


def test_without_batch_axis():
    for batch_first in (True, False):
        module, theirs = pair_of("plain", batch_first=batch_first)
        query, key, _ = inputs_of(module, 1)
        masks = {name: mask[0] if "key" in name else mask for name, mask in masks_of("padding attn").items()}
        close(
            module(query[0], key[0], key[0], **masks)[0],
            theirs(query[0], key[0], key[0], need_weights=False, **masks)[0],
        )
        module, theirs = pair_of("widths", batch_first=batch_first)
        query, key, value = inputs_of(module, 1)
        close(module(query[0], key[0], value[0])[0], theirs(query[0], key[0], value[0])[0])


def test_explicit_axes_and_value_that_is_key():
    module, _ = pair_of("plain", layout="kb")
    query, key, value = inputs_of(module, 5)
    want = module(query, key, value)[0].unflatten(0, (5, B)).transpose(0, 1)
    close(module(query.unflatten(0, (5, B)).transpose(0, 1), key)[0], want)


def test_inside_torchs_decoder_layer():
    torch.manual_seed(0)
    theirs = nn.TransformerDecoderLayer(E, H, 48, 0.0, batch_first=True, dtype=torch.float64).eval()
    ours = copy.deepcopy(theirs)
    ours.multihead_attn = BroadcastCrossAttention(E, H, batch_first=True, dtype=torch.float64, impl="reference")
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x, memory = torch.randn(B * 5, T, E, dtype=torch.float64), torch.randn(B, S, E, dtype=torch.float64)
    masks = masks_of("padding attn")
    got = ours.eval()(x, memory, memory_mask=masks["attn_mask"], memory_key_padding_mask=masks["key_padding_mask"])
    padding = masks["key_padding_mask"].repeat_interleave(5, 0)
    want = theirs(x, memory.repeat_interleave(5, 0), memory_mask=masks["attn_mask"], memory_key_padding_mask=padding)
    close(got, want)


def test_a_query_that_sees_nothing_gives_the_bias():
    module, _ = pair_of("plain")
    query, key, _ = inputs_of(module, 2)
    key.requires_grad_()
    out, _ = module(query, key, key, key_padding_mask=torch.arange(S) >= torch.tensor([[S], [0], [2]]))
    torch.testing.assert_close(out[2:4], module.out_proj.bias.expand(2, T, E))
    out.sum().backward()
    assert key.grad.isfinite().all() and not key.grad[1].any()


# -------------------------------------------------------------------- cache, lengths, packing


@pytest.mark.parametrize("form", ["plain", "bias_kv"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_cached_padded_and_packed_are_one(dtype, form):
    module, _ = pair_of(form, dtype)
    query, key, _ = inputs_of(module, 5, dtype)
    sizes = [5, 2, 0]
    lengths = torch.tensor(sizes)
    want, _ = module(query, key, key, key_padding_mask=torch.arange(S) >= lengths[:, None])
    close(module(query, key, key, lengths=lengths)[0], want)
    close(module(query, cache=module.project_condition(key), lengths=lengths)[0], want)
    close(module(query, cache=ConditionCache.build([module], key, lengths=lengths)[0])[0], want)
    packed = torch.cat([row[:n] for row, n in zip(key, sizes, strict=True)])
    offsets = torch.tensor([0, 5, 7, 7], dtype=torch.int32)
    close(module(query, cache=ConditionCache.build([module], packed, cu_seqlens=offsets)[0])[0], want)
    poisoned = key.masked_fill((torch.arange(S) >= lengths[:, None])[..., None], float("nan"))
    close(module(query, poisoned, poisoned, lengths=lengths)[0], want)


def test_a_cache_of_other_values():
    module, theirs = pair_of("widths")
    query, key, value = inputs_of(module, 1)
    want, _ = theirs(query, key, value)
    close(module(query, cache=module.project_condition(key, value=value))[0], want)


# -------------------------------------------------------------------- options of ours


def explicit(module, query, key, positions=None, key_positions=None) -> Tensor:
    """[B, K, T, E] with repeated keys, head by head, in steps that share no code with the module."""
    k_rows = module.num_kv_heads * module.head_dim
    w_q, w_k, w_v = module.in_proj_weight.split((E, k_rows, k_rows))
    b_q, b_k, b_v = module.in_proj_bias.split((E, k_rows, k_rows))
    rows = key[:, None].expand(-1, query.shape[1], -1, -1)
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (-1, module.head_dim))
        for x, w, b in ((query, w_q, b_q), (rows, w_k, b_k), (rows, w_v, b_v))
    )
    if module.q_norm is not None:
        q, k = module.q_norm(q), module.k_norm(k)
    if positions is not None:
        recipe = module.rotary.recipe
        q = rotate_reference(q, positions, recipe)
        k = rotate_reference(
            k, key_positions[:, None].expand(-1, query.shape[1], *[-1] * (key_positions.dim() - 1)), recipe
        )
    k, v = (x.repeat_interleave(module.num_heads // module.num_kv_heads, -2) for x in (k, v))
    out = F.scaled_dot_product_attention(*(x.transpose(-3, -2) for x in (q, k, v))).transpose(-3, -2)
    return module.out_proj(out.flatten(-2))


OPTIONS = {
    "grouped": dict(num_kv_heads=1),
    "layer norm": dict(qk_norm="layer"),
    "rms norm": dict(qk_norm="rms", num_kv_heads=1),
    "3d": dict(rotary=Rotary3D.for_heads(E // H)),
    "3d norm": dict(rotary=Rotary3D(6, style="half"), qk_norm="rms"),
    "3d full width": dict(rotary=Rotary3D.across_heads(H, E // H)),
    "1d": dict(rotary=Rotary1D(8, style="half"), num_kv_heads=1, qk_norm="layer"),
}


def optional(name: str, dtype=torch.float64, **options):
    torch.manual_seed(1)
    module = BroadcastCrossAttention(
        E, H, dtype=dtype, **{"batch_first": True, "impl": "reference", **OPTIONS[name], **options}
    )
    for parameter in module.parameters():
        nn.init.normal_(parameter, mean=0.1, std=0.4)
    return module


def placed(module, k: int, dtype=torch.float64) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    query, key, _ = inputs_of(module, k, dtype)
    if module.rotary is None:
        return query, key, {}
    tail = (3,) if module.rotary.recipe.axes == 3 else ()
    where = {
        "query_positions": torch.randn(B * k, T, *tail, dtype=dtype),
        "key_positions": torch.randn(B, S, *tail, dtype=dtype),
    }
    return query, key, where


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("name", OPTIONS)
def test_norms_rotations_and_grouped_heads(name, k):
    module = optional(name)
    query, key, where = placed(module, k)
    grads = []
    for ours in (True, False):
        module.zero_grad()
        q, m = query.clone().requires_grad_(), key.clone().requires_grad_()
        if ours:
            out, _ = module(q, m, m, **where)
        else:
            places = where.get("query_positions")
            out = explicit(
                module,
                q.unflatten(0, (B, k)),
                m,
                None if places is None else places.unflatten(0, (B, k)),
                where.get("key_positions"),
            ).flatten(0, 1)
        out.square().sum().backward()
        grads.append([out, q.grad, m.grad, *(p.grad.clone() for p in module.parameters())])
    for got, want in zip(*grads, strict=True):
        close(got, want)


@pytest.mark.parametrize("name", ["3d", "1d"])
def test_positions_follow_the_axes_of_query_and_key(name):
    want_module = optional(name)
    query, key, where = placed(want_module, 5)
    want = want_module(query, key, key, **where)[0]
    other = optional(name, batch_first=False)
    swapped = {n: x.transpose(0, 1) for n, x in where.items()}
    close(other(query.transpose(0, 1), key.transpose(0, 1), **swapped)[0].transpose(0, 1), want)
    cache = want_module.project_condition(key, where["key_positions"])
    close(want_module(query, cache=cache, query_positions=where["query_positions"])[0], want)
    explicit_axes = want_module(
        query.unflatten(0, (B, 5)), cache=cache, query_positions=where["query_positions"].unflatten(0, (B, 5))
    )[0]
    close(explicit_axes.flatten(0, 1), want)


# -------------------------------------------------------------------- how it runs


@pytest.mark.parametrize("name", ["3d norm", "1d"])  # the second compilation sees eps change
def test_compiles_without_graph_breaks(name):
    module = optional(name, torch.float32)
    query, key, where = placed(module, 5, torch.float32)
    padding = masks_of("padding")["key_padding_mask"]

    def run(query, key):
        return module(query, key, key, padding, **where)[0]

    want = run(query, key)
    close(torch.compile(run, fullgraph=True, backend="aot_eager")(query, key), want)
    q = query.clone().requires_grad_()
    torch.compile(run, fullgraph=True, backend="aot_eager")(q, key).sum().backward()
    assert q.grad.isfinite().all()


@pytest.mark.parametrize("name", ["grouped", "layer norm", "3d norm"])
def test_autocast_and_bfloat16(name):
    module = optional(name, torch.float32)
    query, key, where = placed(module, 5, torch.float32)
    want = module(query, key, key, **where)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        k, v = module.project_condition(key, where.get("key_positions"))
        got = module(query, key, key, **where)[0]
    assert got.dtype == k.dtype == v.dtype == torch.bfloat16
    assert (got.float() - want).norm() < 0.05 * want.norm()
    half = module.bfloat16()(query.bfloat16(), key.bfloat16(), **where)[0]
    assert half.dtype == torch.bfloat16 and (half.float() - want).norm() < 0.05 * want.norm()


def test_copies():
    module = optional("3d norm")
    query, key, where = placed(module, 2)
    want = module(query, key, **where)[0]
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(query, key, **where)[0], want)
    assert set(module.state_dict()) - set(nn.MultiheadAttention(E, H).state_dict()) == {
        "q_norm.weight",
        "k_norm.weight",
    }


def test_dropout_acts_in_training_only():
    module, _ = pair_of("plain")
    module.dropout = 0.5
    query, key, _ = inputs_of(module, 2)
    query[1] = query[0]  # two samples of condition 0
    assert torch.equal(module(query, key)[0], module(query, key)[0])
    module.train()
    torch.manual_seed(0)
    first = module(query, key)[0]
    torch.manual_seed(0)
    assert torch.equal(first, module(query, key)[0])
    assert not torch.allclose(first, module(query, key)[0]) and not torch.allclose(first[0], first[1])


@needs_kernels
@pytest.mark.parametrize("name", ["grouped", "3d norm"])
def test_kernels_equal_the_reference(name):
    module = optional(name, torch.float32).to(DEVICE)
    query, key, where = placed(module, 2, torch.float32)
    query, key, where = query.to(DEVICE), key.to(DEVICE), {n: x.to(DEVICE) for n, x in where.items()}
    lengths = torch.tensor([5, 1, 3], device=DEVICE)
    packed = torch.cat([row[:n] for row, n in zip(key, [5, 1, 3], strict=True)])
    offsets = torch.tensor([0, 5, 6, 9], dtype=torch.int32, device=DEVICE)
    places = where.get("key_positions")
    places = None if places is None else torch.cat([row[:n] for row, n in zip(places, [5, 1, 3], strict=True)])
    results = []
    for impl in ("reference", "triton"):
        module.impl = impl
        module.zero_grad()
        leaf = key.clone().requires_grad_()
        out = module(query, leaf, lengths=lengths, **where)[0]
        out.square().sum().backward()
        cache = ConditionCache.build([module], packed, cu_seqlens=offsets, positions=places)
        again = module(query, cache=cache[0], query_positions=where.get("query_positions"))[0]
        close(again, out)
        results.append([out, leaf.grad, *(p.grad.clone() for p in module.parameters())])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * max(1.0, want.abs().max().item()))
    with pytest.raises(BackendUnavailable):
        module.double()(query.double(), key.double(), **where)


def saved_sizes(module, k: int) -> dict[int, int]:
    """Elements of every storage that autograd keeps, S = 53 tokens a condition."""
    torch.manual_seed(0)
    query, key = torch.randn(B * k, 2, E, device=DEVICE), torch.randn(B, 53, E, device=DEVICE, requires_grad=True)
    where = {}
    if module.rotary is not None:
        where = {
            "query_positions": torch.randn(B * k, 2, 3, device=DEVICE),
            "key_positions": torch.randn(B, 53, 3, device=DEVICE),
        }
    saved: dict[int, Tensor] = {}

    def hold(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda x: x):
        module(query, key, key, **where)
    return {x.untyped_storage().nbytes() // 4: x.shape for x in saved.values() if x.shape.numel() % 53 == 0}


@needs_kernels
@pytest.mark.parametrize("name", ["grouped", "3d norm"])
def test_nothing_of_the_condition_is_saved_k_times(name):
    module = optional(name, torch.float32, impl="triton").to(DEVICE)
    few, many = saved_sizes(module, 1), saved_sizes(module, 7)
    assert few.keys() == many.keys() and few  # whatever has S in it does not depend on K


# -------------------------------------------------------------------- errors


def sized(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (dict(embed_dim=25), "embed_dim must be a multiple of num_heads = 2, got 25"),
        (dict(embed_dim=8), "the head dimension embed_dim / num_heads must be from 8 to 256, got 8 / 2 = 4"),
        (dict(num_heads=0), "num_heads must be an int >= 1, got 0"),
        (dict(num_kv_heads=3), "num_kv_heads must divide num_heads = 2, got 3"),
        (dict(dropout=1.0), "dropout must be in [0, 1), got 1.0"),
        (dict(layout="nk"), "layout must be 'bk' (row b*K + k) or 'kb' (row k*B + b), got 'nk'"),
        (dict(qk_norm="group"), "qk_norm must be None, 'layer' or 'rms', got 'group'"),
        (dict(impl="cuda"), "impl must be None or one of auto, reference"),
        (dict(add_bias_kv=True, qk_norm="rms"), "add_bias_kv=True is not defined together with qk_norm"),
        (dict(add_zero_attn=True, num_kv_heads=1), "add_zero_attn=True is not defined together with num_kv_heads"),
    ],
)
def test_constructor_errors(arguments, text):
    with pytest.raises(InvalidArgument) as error:
        BroadcastCrossAttention(**{"embed_dim": E, "num_heads": H, **arguments})
    assert text in str(error.value) and "\n" not in str(error.value)


Q, M = sized(6, T, E), sized(B, S, E)
KV = (sized(B, S, H, 12), sized(B, S, H, 12))


@pytest.mark.parametrize(
    ("args", "options", "text"),
    [
        ((Q, M, M, None, True), {}, "need_weights must be False: the attention weights [N, T, S] are never stored"),
        ((Q, M, M), dict(is_causal=True), "is_causal=True needs attn_mask"),
        ((Q, M, M), dict(attn_mask=sized(4, 5)), "attn_mask must be boolean (True = not allowed), got torch.float32; of a mask of 0 and -inf give attn_mask == -inf"),
        ((Q, M, M), dict(attn_mask=sized(12, 4, 5).bool()), "attn_mask must be [T, S] = [4, 5], the same for every row and head; masks per head are not supported, got [12, 4, 5]"),
        ((Q, M, M), dict(attn_mask=sized(5, 4).bool()), "attn_mask must be [T, S] = [4, 5], got [5, 4]"),
        ((Q, M, M, sized(6, 5).bool()), {}, "key_padding_mask must be [B, S] = [3, 5], got [6, 5]"),
        ((Q, M, M, sized(3, 5)), {}, "key_padding_mask must be boolean (True = ignore), got torch.float32"),
        ((sized(7, T, E), M, M), {}, "got N = 7 rows for B = 3 conditions"),
        ((sized(6, T, 20), M, M), {}, "query must be [N, T, E] or [B, K, T, E] with E = 24, got [6, 4, 20]"),
        ((sized(2, 3, T, E), M, M), {}, "query must be [B, K, T, E] with B = 3, got [2, 3, 4, 24]"),
        ((Q, sized(3, 5, 20), M), {}, "key must be [B, S, kdim] = [B, S, 24], got [3, 5, 20]"),
        ((Q, M, sized(3, 4, E)), {}, "value must be [B, S, vdim] = [3, 5, 24], got [3, 4, 24]"),
        ((Q,), {}, "key must be given, or a cache in its place"),
        ((Q, M), dict(cache=KV), "cache takes the place of key, value and key_positions"),
        ((Q,), dict(cache=(KV[0][..., :6], KV[1])), "cache keys must be [B, S, Hkv, D] = [B, S, 2, 12], got [3, 5, 2, 6]"),
        ((Q,), dict(cache=(KV[0], KV[1][:1])), "cache values must be the shape of the keys = [3, 5, 2, 12], got [1, 5, 2, 12]"),
        ((Q,), dict(cache=LayerCache(*KV, lengths=sized(3).int()), lengths=sized(3).int()), "lengths came beside a cache that knows its own"),
        ((Q,), dict(cache=LayerCache(KV[0][0], KV[1][0], cu_seqlens=sized(4).int()), attn_mask=sized(4, 5).bool()), "packed conditions (cu_seqlens) take no mask"),
        ((Q, M), dict(query_positions=sized(6, T, 3)), "query_positions do not fit: this module has no rotary, got [6, 4, 3]"),
        ((Q,), dict(cache=ConditionCache.of([KV])), "cache must be that of one layer, ConditionCache[layer] or (k, v), got ConditionCache"),
        ((Q[0], M), {}, "query [T, E] without a batch axis takes key [S, kdim] and value [S, vdim] alone, got [3, 5, 24]"),
        ((Q[0],), dict(cache=KV), "alone, got a cache"),
    ],
)  # fmt: skip
def test_forward_errors(args, options, text):
    module = BroadcastCrossAttention(E, H, batch_first=True, impl="reference")
    with pytest.raises(InvalidArgument) as error:
        module(*args, **options)
    assert text in str(error.value) and "\n" not in str(error.value)


def test_rotary_needs_positions():
    module = BroadcastCrossAttention(E, H, batch_first=True, impl="reference", rotary=Rotary3D(6))
    with pytest.raises(
        InvalidArgument, match="key_positions do not fit: this module has a rotary and needs them, got None"
    ):
        module(Q, M)
    with pytest.raises(InvalidArgument, match="query_positions do not fit: this module has a rotary"):
        module(Q, M, key_positions=sized(3, S, 3))
