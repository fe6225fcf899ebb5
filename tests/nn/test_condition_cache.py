"""ConditionCache: one pytree through level2_step, sampling, torch.compile and DDP; packed is padded."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.level2 import Level2Batch, level2_step
from minidiff_fast.nn import BroadcastCrossAttention, ConditionCache, LayerCache, Rotary3D
from minidiff_fast.nn.condition_cache import held_conditions
from minidiff_fast.objectives import DenoisingLoss, DiffusionProcess
from minidiff_fast.sampling import sample_actions

B, S, C, T, A = 3, 5, 16, 2, 3
SIZES = [5, 0, 3]
OBJECTIVE = DenoisingLoss(DiffusionProcess(torch.linspace(0.99, 0.01, 10)))


def layers(dtype=torch.float64, seed=0, **options) -> nn.ModuleList:
    torch.manual_seed(seed)
    options = {"batch_first": True, "impl": "reference", "dtype": dtype, "num_kv_heads": 1, **options}
    return nn.ModuleList(BroadcastCrossAttention(C, 2, **options) for _ in range(2))


def lengths() -> Tensor:
    return torch.tensor(SIZES)


def offsets() -> Tensor:
    return torch.tensor([0, *torch.tensor(SIZES).cumsum(0).tolist()], dtype=torch.int32)


def pack(padded: Tensor) -> Tensor:
    return torch.cat([x[:n] for x, n in zip(padded, SIZES, strict=True)])


def build(kind: str, memory: Tensor | None = None, positions: Tensor | None = None, of=None) -> ConditionCache:
    memory = torch.randn(B, S, C, dtype=torch.float64) if memory is None else memory
    of = layers() if of is None else of
    if kind == "padded":
        return ConditionCache.build(of, memory, positions=positions)
    if kind == "lengths":
        return ConditionCache.build(of, memory, lengths=lengths(), positions=positions)
    if kind == "mask":
        return ConditionCache.build(of, memory, mask=torch.arange(S) < lengths()[:, None], positions=positions)
    packed = None if positions is None else pack(positions)
    return ConditionCache.build(of, pack(memory), cu_seqlens=offsets(), positions=packed)


KINDS = ["padded", "lengths", "mask", "packed"]


class Scene(nn.Module):
    """A policy over ConditionCache: the observation's tokens, projected for two layers of cross-attention."""

    def __init__(self, kind: str = "packed") -> None:
        super().__init__()
        torch.manual_seed(3)
        self.kind = kind
        self.encoder = nn.Linear(4, C, dtype=torch.float64)
        self.layers = layers(rotary=Rotary3D(6), qk_norm="rms")
        self.inner = nn.Linear(A, C, dtype=torch.float64)
        self.outer = nn.Linear(C, A, dtype=torch.float64)

    def encode(self, obs: dict[str, Tensor]) -> dict[str, object]:
        tokens = torch.tanh(self.encoder(obs["points"]))
        cache = build(self.kind, tokens, obs["points"][..., :3], self.layers)
        return {"scene": cache, "mean": tokens[:, 0]}

    def denoise(self, cache, x: Tensor, t: Tensor) -> Tensor:
        x = x.to(torch.float64)
        hidden = self.inner(x) + cache["mean"][:, None, None] + 0.1 * t[..., None, None]
        for attention, layer in zip(self.layers, cache["scene"], strict=True):
            hidden = hidden + attention(hidden, cache=layer, query_positions=x)[0]
        return self.outer(hidden)

    forward = denoise


def batch_of(k: int = 5) -> Level2Batch:
    generator = torch.Generator().manual_seed(1)
    obs = {"points": torch.randn(B, S, 4, generator=generator, dtype=torch.float64)}
    actions = torch.randn(B, T, A, generator=generator, dtype=torch.float64)
    return Level2Batch.draw(obs, actions, k, OBJECTIVE, generator=generator)


def gradients(policy: nn.Module) -> list[Tensor]:
    return [p.grad for p in policy.parameters()]


# -------------------------------------------------------------------- training and sampling


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_gather_the_gradient_of_the_cache(kind):
    whole, parts = Scene(kind), Scene(kind)
    a = level2_step(whole, OBJECTIVE, batch_of())
    b = level2_step(parts, OBJECTIVE, batch_of(), chunk=2)
    torch.testing.assert_close(a.per_sample, b.per_sample)
    for one, other in zip(gradients(whole), gradients(parts), strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["mask", "packed"])
def test_masked_packed_and_padded_train_alike(kind):
    one, other = Scene("lengths"), Scene(kind)
    level2_step(one, OBJECTIVE, batch_of(), chunk=3)
    level2_step(other, OBJECTIVE, batch_of(), chunk=3)
    for a, b in zip(gradients(one), gradients(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_wrong_number_of_conditions_is_named():
    policy = Scene()
    whole = policy.encode(batch_of().obs)
    policy.encode = lambda obs: whole["scene"].select(slice(2))  # type: ignore[method-assign]
    with pytest.raises(InvalidArgument, match="leading dimension B = 3, got a ConditionCache of 2 conditions"):
        level2_step(policy, OBJECTIVE, batch_of())
    policy.encode = lambda obs: ConditionCache((), ())  # type: ignore[method-assign]
    with pytest.raises(InvalidArgument, match="got no tensor"):
        level2_step(policy, OBJECTIVE, batch_of())


@pytest.mark.parametrize("kind", ["lengths", "packed"])
def test_sampling_reads_b_from_the_cache(kind):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(100, beta_schedule="squaredcos_cap_v2")
    policy = Scene(kind).eval()
    out = sample_actions(
        policy, batch_of().obs, scheduler, num_inference_steps=3, shape=(T, A), k=4,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert out.shape == (B, 4, T, A)
    whole = policy.encode(batch_of().obs)
    policy.encode = lambda obs: {"a": whole["scene"], "b": whole["mean"][:2]}  # type: ignore[method-assign]
    with pytest.raises(InvalidArgument, match=r"got a ConditionCache of 3 conditions and a tensor of shape \[2, 16\]"):
        sample_actions(policy, batch_of().obs, scheduler, num_inference_steps=3, shape=(T, A))


# -------------------------------------------------------------------- pytree


@pytest.mark.parametrize("kind", KINDS)
def test_pytree_of_tensors(kind):
    cache = build(kind)
    leaves, structure = pytree.tree_flatten(cache)
    assert len(leaves) == 4 + (kind != "padded") and all(isinstance(leaf, Tensor) for leaf in leaves)
    again = pytree.tree_unflatten(leaves, structure)
    assert type(again) is ConditionCache and all(a is b for a, b in zip(again.keys, cache.keys, strict=True))
    placeholders = pytree.tree_map(lambda x: x.dtype, cache)  # anything may stand in a tree
    assert placeholders.keys == (torch.float64,) * 2
    assert held_conditions({"a": (cache, torch.zeros(2, 1)), "b": torch.tensor(1), "c": "text"}) == [
        ("a ConditionCache of 3 conditions", 3),
        ("a tensor of shape [2, 1]", 2),
        ("a tensor of shape []", None),
    ]
    paths = [pytree.keystr(path) for path, _ in pytree.tree_leaves_with_path(cache)]
    assert paths[:2] == [".keys[0]", ".keys[1]"]


def test_distributed_data_parallel(tmp_path):
    """One process: DistributedDataParallel walks the cache on its way in, and reduces every gradient."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        plain, inner = Scene("packed"), Scene("packed")
        level2_step(plain, OBJECTIVE, batch_of(), chunk=2)
        level2_step(nn.parallel.DistributedDataParallel(inner), OBJECTIVE, batch_of(), chunk=2)
    finally:
        torch.distributed.destroy_process_group()
    for one, other in zip(gradients(plain), gradients(inner), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", ["lengths", "packed"])
def test_compiles_across_the_border_of_a_graph(kind):
    """A cache made in one graph and read in another."""
    policy = Scene(kind)
    points, x, t = batch_of().obs["points"], torch.randn(B, 4, T, A, dtype=torch.float64), torch.zeros(B, 4)
    known = {"cu_seqlens": offsets()} if kind == "packed" else {"lengths": lengths()}
    tokens = pack(points) if kind == "packed" else points

    def encode(tokens):
        memory = torch.tanh(policy.encoder(tokens))
        return ConditionCache.build(policy.layers, memory, positions=tokens[..., :3], **known)

    scene = torch.compile(encode, fullgraph=True, backend="aot_eager")(tokens)
    assert type(scene) is ConditionCache and scene.keys[0].requires_grad
    want = policy.encode({"points": points})
    backend = "aot_eager" if kind == "packed" else "eager"
    out = torch.compile(policy.denoise, fullgraph=True, backend=backend)({**want, "scene": scene}, x, t)
    torch.testing.assert_close(out, policy.denoise(want, x, t))


# -------------------------------------------------------------------- methods


def test_layers_sizes_and_repr():
    cache = build("lengths")
    assert len(cache) == 2 and cache.batch == B and not cache.packed and not cache.empty
    assert isinstance(cache[0], LayerCache) and cache[-1].k is cache.keys[1] and cache[0].lengths is cache.lengths
    assert [layer.batch for layer in cache] == [B, B]
    with pytest.raises(IndexError, match=r"layer must be in \[0, 2\), got 2"):
        cache[2]
    assert cache.nbytes == 4 * B * S * 1 * 8 * 8 + 3 * 8
    assert repr(cache) == "ConditionCache(keys: [3, 5, 1, 8], [3, 5, 1, 8], tokens: 0, with: lengths)"
    packed = build("packed")
    assert packed.packed and packed.batch == B == packed[1].batch and packed.keys[0].shape == (8, 1, 8)
    assert packed.nbytes < cache.nbytes


@pytest.mark.parametrize("kind", KINDS)
def test_detach_to_copy_and_pickle(kind):
    cache = build(kind)
    assert cache.keys[0].requires_grad
    plain = cache.detach()
    assert not any(leaf.requires_grad for leaf in pytree.tree_leaves(plain))
    half = plain.to(dtype=torch.bfloat16)
    assert half.keys[0].dtype == half.values[1].dtype == torch.bfloat16
    for name in ("lengths", "cu_seqlens", "mask"):
        kept = getattr(plain, name)
        assert kept is None or getattr(half, name).dtype == kept.dtype
    assert plain.to("meta").device.type == "meta"
    with pytest.raises(InvalidArgument, match="floating-point dtype, got torch.int64"):
        plain.to(dtype=torch.int64)
    for other in (copy.deepcopy(plain), pickle.loads(pickle.dumps(plain))):
        leaves = zip(pytree.tree_leaves(other), pytree.tree_leaves(plain), strict=True)
        assert all(torch.equal(a, b) for a, b in leaves)
    with pytest.raises(AttributeError):
        cache.keys = ()  # frozen


@pytest.mark.parametrize("kind", KINDS)
def test_select(kind):
    cache = build(kind)
    of = layers()
    query = torch.randn(B, 4, T, C, dtype=torch.float64)
    want = of[1](query, cache=cache[1])[0]
    for conditions in (slice(1, 3), torch.tensor([2, 0, 2, 1]), slice(None, None, 2), slice(3, 3)):
        some = cache.select(conditions)
        picked = query[conditions]
        assert some.batch == len(picked)
        if len(picked):
            torch.testing.assert_close(of[1](picked, cache=some[1])[0], want[conditions])
    if kind == "packed":
        again = cache.select(torch.tensor([2, 0]), total=8)
        assert torch.equal(again.keys[0], torch.cat([cache.keys[0][5:8], cache.keys[0][:5]]))
        assert again.cu_seqlens.tolist() == [0, 3, 8] and again.cu_seqlens.dtype == torch.int32
    else:
        assert cache.select(slice(1, 3)).keys[0]._base is not None  # a view
    with pytest.raises(InvalidArgument, match="slice or integer indices"):
        cache.select(torch.tensor([True, False, True]))


def sized(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype)


K = sized(2, 5, 1, 8)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (dict(keys=(K,), values=()), "keys and values must have one tensor a layer, got 1 and 0"),
        (dict(keys=(K[0],), values=(K[0],)), "keys[0] must be [B, S, Hkv, D] = [B, S, Hkv, D], got [5, 1, 8]"),
        (dict(keys=(K,), values=(K[:1],)), "values[0] must be [B, S, Hkv, D] = [2, 5, 1, 8], got [1, 5, 1, 8]"),
        (dict(keys=(K, K[:, :3]), values=(K, K)), "keys[1] must be [B, S, Hkv, D] = [2, 5, Hkv, D], got [2, 3, 1, 8]"),
        (dict(keys=(K,), values=(K.half(),)), "values[0] must have the dtype of keys[0], torch.float32, got torch.float16"),
        (dict(keys=(K,), values=(K,), tokens=(sized(3, 1),)), "tokens[0] must be [B, ...] = [2, ...], got [3, 1]"),
        (dict(keys=(K,), values=(K,), lengths=sized(3).int()), "lengths must be [B] = [2], got [3]"),
        (dict(keys=(K,), values=(K,), lengths=sized(2)), "lengths must be int32 or int64, got torch.float32"),
        (dict(keys=(K,), values=(K,), mask=sized(2, 4).bool()), "mask must be [B, S] = [2, 5], got [2, 4]"),
        (dict(keys=(K,), values=(K,), mask=sized(2, 5)), "mask must be boolean (True = may be seen), got torch.float32"),
        (dict(keys=(K[0],), values=(K[0],), cu_seqlens=sized(3)), "cu_seqlens must be [B + 1] int32, got [3] of torch.float32"),
        (dict(keys=(K,), values=(K,), cu_seqlens=sized(3).int()), "keys[0] must be [N, Hkv, D] = [N, Hkv, D], got [2, 5, 1, 8]"),
        (
            dict(keys=(K[0],), values=(K[0],), cu_seqlens=sized(3).int(), lengths=sized(2).int()),
            "packed tokens (cu_seqlens) take neither lengths nor a mask",
        ),
        (dict(keys=(), values=(), lengths=sized(2).int()), "lengths is about keys, and there are none"),
        (dict(keys=(K,), values=(K,), lengths=sized(2).int().to("meta")), "every tensor must be on one device, cpu, got meta"),
    ],
)  # fmt: skip
def test_errors(arguments, text):
    with pytest.raises(InvalidArgument) as error:
        ConditionCache(**arguments)
    assert text in str(error.value) and "\n" not in str(error.value)


def test_build_errors():
    of = layers()
    with pytest.raises(InvalidArgument, match=r"memory must be \[B, S, C\], got \[8, 16\]"):
        ConditionCache.build(of, sized(8, C))
    with pytest.raises(InvalidArgument, match=r"memory must be \[N, C\] with cu_seqlens, got \[2, 8, 16\]"):
        ConditionCache.build(of, sized(2, 8, C), cu_seqlens=offsets())
    with pytest.raises(InvalidArgument, match=r"packed \[N, C\] with C = 16, got \[2, 8, 15\]"):
        ConditionCache.build(of, sized(2, 8, 15))
    with pytest.raises(InvalidArgument, match="an empty cache has no number of conditions"):
        _ = ConditionCache((), ()).batch
    with pytest.raises(InvalidArgument, match="an empty cache has no device"):
        _ = ConditionCache((), ()).device
