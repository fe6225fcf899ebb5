"""SharedPrefixAttention against one masked attention over [scene, all samples] and against K repeated calls."""

from __future__ import annotations

import copy
import math
import os
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.nn import ConditionCache, LayerCache, Rotary1D, Rotary3D, SharedPrefixAttention
from minidiff_fast.ops import rotate_reference

C, H, B, K, P, S = 24, 2, 3, 4, 3, 5
OPTIONS = {
    "plain": {},
    "causal": dict(own_causal=True),
    "no bias": dict(bias=False, own_causal=True),
    "grouped norm": dict(num_kv_heads=1, qk_norm="layer"),
    "3d": dict(rotary=Rotary3D.for_heads(C // H), qk_norm="rms"),
    "3d full width": dict(rotary=Rotary3D.across_heads(H, C // H), own_causal=True),
    "1d": dict(rotary=Rotary1D(8, style="half"), num_kv_heads=1),
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_kernels = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET", "0") in ("", "0"),
    reason="the kernels need a GPU or TRITON_INTERPRET=1",
)


def module_of(name: str = "plain", dtype=torch.float64, **options) -> SharedPrefixAttention:
    torch.manual_seed(2)
    module = SharedPrefixAttention(C, H, dtype=dtype, **{"impl": "reference", **OPTIONS[name], **options})
    for parameter in module.parameters():
        nn.init.normal_(parameter, mean=0.1, std=0.4)
    return module


def inputs_of(module, k: int = K, dtype=torch.float64) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    torch.manual_seed(4)
    scene, own = torch.randn(B, S, C, dtype=dtype), torch.randn(B, K, P, C, dtype=dtype)[:, :k]
    if module.rotary is None:
        return scene, own, {}
    tail = (3,) if module.rotary.recipe.axes == 3 else ()
    where = torch.randn(B, S + K * P, *tail, dtype=dtype)
    own_positions = where[:, S:].unflatten(1, (K, P))[:, :k]
    return scene, own, {"scene_positions": where[:, :S], "own_positions": own_positions}


def masked(module, x: Tensor, visible: Tensor, positions: Tensor | None) -> Tensor:
    """Plain self-attention over the tokens x [B, L, C] under the mask visible [B or 1, L, L], in textbook steps."""
    width = module.num_kv_heads * module.head_dim
    sizes = (C, width, width)
    biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.split(sizes)
    weights = module.in_proj_weight.split(sizes)
    q, k, v = (F.linear(x, w, b).unflatten(-1, (-1, module.head_dim)) for w, b in zip(weights, biases, strict=True))
    if module.q_norm is not None:
        q, k = module.q_norm(q), module.k_norm(k)
    if positions is not None:
        q, k = (rotate_reference(y, positions, module.rotary.recipe) for y in (q, k))
    k, v = (y.repeat_interleave(module.num_heads // module.num_kv_heads, -2) for y in (k, v))
    logits = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(module.head_dim)
    weights = logits.masked_fill(~visible[:, None], -math.inf).softmax(-1)
    return module.out_proj(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(-2))


def block_mask(k: int, seen: Tensor, causal: bool) -> Tensor:
    """[B, S + k P, S + k P]: everyone sees the scene's tokens in ``seen`` [B, S], a sample sees itself besides."""
    mask = torch.zeros(B, S + k * P, S + k * P, dtype=torch.bool, device=seen.device)
    mask[:, :, :S] = seen[:, None]
    for sample in range(k):
        rows = slice(S + sample * P, S + (sample + 1) * P)
        mask[:, rows, rows] = torch.ones(P, P, dtype=torch.bool).tril(0 if causal else P)
    return mask


def one_attention(module, scene, own, where, seen) -> tuple[Tensor, Tensor]:
    k = own.shape[1]
    positions = None
    if where:
        positions = torch.cat([where["scene_positions"], where["own_positions"].flatten(1, 2)], 1)
    x = torch.cat([scene, own.flatten(1, 2)], 1)
    out = masked(module, x, block_mask(k, seen, module.own_causal), positions)
    return out[:, :S], out[:, S:].unflatten(1, (k, P))


def repeated_calls(module, scene, own, where, seen) -> tuple[Tensor, Tensor]:
    """Prefix and suffix, once per sample."""
    outs = []
    for sample in range(own.shape[1]):
        some = {n: x if n == "scene_positions" else x[:, sample : sample + 1] for n, x in where.items()}
        outs.append(one_attention(module, scene, own[:, sample : sample + 1], some, seen))
    return outs[0][0], torch.cat([o for _, o in outs], 1)


def run(function, module, scene, own, weights) -> list[Tensor]:
    """Outputs and every gradient."""
    module.zero_grad()
    scene, own = scene.clone().requires_grad_(), own.clone().requires_grad_()
    outs = function(scene, own)
    sum((out * weight).sum() for out, weight in zip(outs, weights, strict=True)).backward()
    return [*outs, scene.grad, own.grad, *(p.grad.clone() for p in module.parameters())]


def close(got: Tensor, want: Tensor, atol: float = 1e-11) -> None:
    torch.testing.assert_close(got, want, rtol=0.0, atol=atol * max(1.0, want.abs().max().item()))


@pytest.mark.parametrize("oracle", [one_attention, repeated_calls])
@pytest.mark.parametrize("bounds", ["all", "lengths", "mask"])
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_one_masked_attention(name, bounds, oracle):
    module = module_of(name)
    scene, own, where = inputs_of(module)
    lengths = torch.tensor([5, 2, 1])
    seen = torch.ones(B, S, dtype=torch.bool) if bounds == "all" else torch.arange(S) < lengths[:, None]
    options = {"all": {}, "lengths": {"lengths": lengths}, "mask": {"mask": seen}}[bounds]
    weights = [torch.randn_like(scene), torch.randn_like(own)]
    got = run(lambda s, o: module(s, o, **options, **where), module, scene, own, weights)
    want = run(lambda s, o: oracle(module, s, o, where, seen), module, scene, own, weights)
    for a, b in zip(got, want, strict=True):
        close(a, b)


@pytest.mark.parametrize("impl", ["reference", pytest.param("triton", marks=needs_kernels)])
@pytest.mark.parametrize("name", ["causal", "3d"])
def test_float32(name, impl):
    device = DEVICE if impl == "triton" else "cpu"
    module = module_of(name, torch.float32, impl=impl).to(device)
    scene, own, where = inputs_of(module, dtype=torch.float32)
    scene, own, where = scene.to(device), own.to(device), {n: x.to(device) for n, x in where.items()}
    lengths = torch.tensor([5, 2, 1], device=device)
    seen = torch.arange(S, device=device) < lengths[:, None]
    weights = [torch.randn_like(scene), torch.randn_like(own)]
    got = run(lambda s, o: module(s, o, lengths=lengths, **where), module, scene, own, weights)
    want = run(lambda s, o: one_attention(module, s, o, where, seen), module, scene, own, weights)
    for a, b in zip(got, want, strict=True):
        close(a, b, 1e-5)


def test_samples_do_not_see_each_other_and_the_scene_sees_none():
    module = module_of("causal")
    scene, own, _ = inputs_of(module)
    want = module(scene, own)
    other = own.clone()
    other[:, 2] += 1.0
    got = module(scene, other)
    assert torch.equal(got.scene, want.scene)
    same = [0, 1, 3]
    assert torch.equal(got.own[:, same], want.own[:, same]) and not torch.allclose(got.own[:, 2], want.own[:, 2])
    other = own.clone()
    other[:, 2, -1] += 1.0  # causal: the last own token is seen by itself alone
    got = module(scene, other).own[:, 2]
    assert torch.equal(got[:, :-1], want.own[:, 2, :-1]) and not torch.allclose(got[:, -1], want.own[:, 2, -1])


class Block(nn.Module):
    def __init__(self, name: str, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.norm = nn.LayerNorm(C, dtype=torch.float64)
        self.attention = module_of(name)
        self.mlp = nn.Linear(C, C, dtype=torch.float64)

    def rest(self, x: Tensor, out: Tensor) -> Tensor:
        return x + out + torch.tanh(self.mlp(x + out))


@pytest.mark.parametrize("name", ["causal", "3d"])
def test_several_layers_run_ahead_into_a_cache(name):
    """encode, then denoise from the cache, is every layer over both parts."""
    blocks = nn.ModuleList(Block(name, seed) for seed in range(3))
    scene, own, where = inputs_of(blocks[0].attention)
    lengths = torch.tensor([5, 2, 1])

    def layer_by_layer(scene, own):
        for block in blocks:
            out = block.attention(block.norm(scene), block.norm(own), lengths=lengths, **where)
            scene, own = block.rest(scene, out.scene), block.rest(own, out.own)
        return scene, own

    def ahead(scene, own):
        pairs = []
        for block in blocks:
            out, pair = block.attention.encode(
                block.norm(scene), lengths=lengths, positions=where.get("scene_positions")
            )
            scene, pairs = block.rest(scene, out), [*pairs, pair]
        for block, layer in zip(blocks, ConditionCache.of(pairs, lengths=lengths), strict=True):
            out = block.attention.denoise(block.norm(own), layer, positions=where.get("own_positions"))
            own = block.rest(own, out)
        return scene, own

    weights = [torch.randn_like(scene), torch.randn_like(own)]
    got, want = (run(f, blocks, scene, own, weights) for f in (ahead, layer_by_layer))
    for a, b in zip(got, want, strict=True):
        close(a, b)


@pytest.mark.parametrize("name", ["causal", "3d"])
def test_a_packed_scene_is_a_padded_one(name):
    module = module_of(name)
    scene, own, where = inputs_of(module)
    sizes, positions, own_positions = [5, 2, 0], where.get("scene_positions"), where.get("own_positions")
    cache = LayerCache(*module.project_condition(scene, positions), lengths=torch.tensor(sizes))
    want = module.denoise(own, cache, positions=own_positions)
    packed, places = (
        None if x is None else torch.cat([row[:n] for row, n in zip(x, sizes, strict=True)]) for x in (scene, positions)
    )
    offsets = torch.tensor([0, 5, 7, 7], dtype=torch.int32)
    cache = ConditionCache.build([module], packed, cu_seqlens=offsets, positions=places)
    close(module.denoise(own, cache[0], positions=own_positions), want)


def test_parameters_are_those_of_torch():
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(C, H)
    torch.manual_seed(0)
    ours = SharedPrefixAttention(C, H)
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    for module in (module_of("3d"), module_of("grouped norm")):
        scene, own, where = inputs_of(module)
        want = module(scene, own, **where)
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(other(scene, own, **where).own, want.own)


@pytest.mark.parametrize("name", ["causal", "3d"])
def test_compiles_without_graph_breaks(name):
    module = module_of(name, torch.float32)
    scene, own, where = inputs_of(module, dtype=torch.float32)

    def both(scene, own):
        return module(scene, own, lengths=torch.tensor([5, 2, 1]), **where)

    got, want = torch.compile(both, fullgraph=True, backend="aot_eager")(scene, own), both(scene, own)
    close(got.scene, want.scene, 1e-5)
    close(got.own, want.own, 1e-5)


@pytest.mark.parametrize("name", ["causal", "grouped norm", "3d"])
def test_autocast(name):
    module = module_of(name, torch.float32)
    scene, own, where = inputs_of(module, dtype=torch.float32)
    want = module(scene, own, **where)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = module(scene, own, **where)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.bfloat16 and (a.float() - b).norm() < 0.05 * b.norm()


def test_dropout_is_drawn_per_sample():
    module = module_of("plain", dropout=0.4)
    scene, own, _ = inputs_of(module)
    own = own[:, :1].expand(-1, K, -1, -1)
    outs = []
    for _ in range(2):
        torch.manual_seed(0)
        outs.append(module(scene, own))
    assert torch.equal(outs[0].own, outs[1].own) and torch.equal(outs[0].scene, outs[1].scene)
    assert not torch.allclose(outs[0].own[:, 0], outs[0].own[:, 1])
    close(module.eval()(scene, own).own[:, 0], module(scene, own).own[:, 1])


def saved_of_the_scene(name: str, k: int) -> list[tuple[int, ...]]:
    """Shapes with the scene's 53 tokens in them that autograd keeps."""
    module = module_of(name, torch.float32, impl="triton").to(DEVICE)
    torch.manual_seed(0)
    scene, own = torch.randn(2, 53, C, device=DEVICE, requires_grad=True), torch.randn(2, k, 1, C, device=DEVICE)
    where = {}
    if module.rotary is not None:
        where = {
            "scene_positions": torch.randn(2, 53, 3, device=DEVICE),
            "own_positions": torch.randn(2, k, 1, 3, device=DEVICE),
        }
    saved: list[Tensor] = []

    def hold(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda x: x):
        module(scene, own, **where)
    return sorted(tuple(x.shape) for x in saved if x.shape.numel() % 53 == 0)


@needs_kernels
@pytest.mark.parametrize("name", ["plain", "3d"])
def test_what_is_saved_of_the_scene_does_not_depend_on_k(name):
    few = saved_of_the_scene(name, 1)
    assert few == saved_of_the_scene(name, 3) and few


def sized(*shape):
    return torch.zeros(*shape)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda m: m(sized(5, C), sized(2, 4, 3, C)), "scene must be [B, S, C] = [B, S, 24], got [5, 24]"),
        (lambda m: m(sized(2, 5, C), sized(2, 4, C)), "own must be [B, K, P, C] = [2, K, P, 24], got [2, 4, 24]"),
        (lambda m: m(sized(2, 5, C), sized(3, 4, 3, C)), "own must be [B, K, P, C] = [2, K, P, 24], got [3, 4, 3, 24]"),
        (lambda m: m(sized(2, 5, C), sized(2, 4, 3, C), own_positions=sized(2, 4, 3, 3)), "own positions do not fit: this module has no rotary"),
        (lambda m: m(sized(2, 5, C), sized(2, 4, 3, C), lengths=sized(3).int()), "lengths must be [B] = [2], got [3]"),
        (lambda m: m.denoise(sized(2, 4, 3, C), (sized(2, 5, 1, 12),) * 2), "cache keys must be [B, S, Hkv, D] = [B, S, 2, 12], got [2, 5, 1, 12]"),
        (lambda m: m.project_condition(sized(2, 5, 23)), "memory must be [B, S, C] or packed [N, C] with C = 24"),
        (lambda m: SharedPrefixAttention(C, 5), "SharedPrefixAttention: embed_dim must be a multiple of num_heads = 5, got 24"),
        (lambda m: module_of("3d", torch.float32)(sized(2, 5, C), sized(2, 4, 3, C)), "positions do not fit: this module has a rotary and needs them, got None"),
    ],
)  # fmt: skip
def test_errors(function, text):
    with pytest.raises(InvalidArgument) as error:
        function(SharedPrefixAttention(C, H, impl="reference"))
    assert text in str(error.value) and "\n" not in str(error.value)
