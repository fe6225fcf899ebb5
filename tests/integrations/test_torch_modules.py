"""convert: torch's own decoders with memory of B rows, against themselves with the memory repeated K times."""

from __future__ import annotations

import copy
import doctest
import importlib
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.integrations import convert, encode_memory
from minidiff_fast.integrations.torch_modules import SELF, UNCLEAR, UNNAMED, TorchCrossAttention
from minidiff_fast.level2 import Level2Batch, level2_step
from minidiff_fast.nn import BroadcastCrossAttention, ConditionCache
from minidiff_fast.objectives import DenoisingLoss, FlowMatching
from minidiff_fast.shapes import Layout

B, T, S, C, H = 2, 3, 7, 32, 4
TOLERANCES = {torch.float64: {"rtol": 1e-9, "atol": 1e-9}, torch.float32: {"rtol": 1e-5, "atol": 1e-5}}
CAUSAL = nn.Transformer.generate_square_subsequent_mask(S)[:T]  # 0 and -inf
PADDING = torch.arange(S)[None] >= torch.tensor([S, 4])[:, None]  # [B, S]


def repeated(x: Tensor, k: int, layout: Layout, axis: int = 0) -> Tensor:
    return x.repeat_interleave(k, axis) if layout == "bk" else torch.cat([x] * k, axis)


def decoder(**options: Any) -> nn.TransformerDecoder:
    settings: dict[str, Any] = {"dropout": 0.0, "batch_first": True, "dtype": torch.float64, **options}
    layer = nn.TransformerDecoderLayer(C, H, 48, **settings)
    norm = nn.LayerNorm(C, dtype=settings["dtype"])
    model = nn.TransformerDecoder(layer, 2, norm=norm)
    for parameter in model.parameters():  # biases start at 0, and so do their differences
        nn.init.normal_(parameter, std=0.2)
    return model


def inputs(k: int, batch_first: bool = True, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x, memory = torch.randn(B * k, T, C, dtype=dtype), torch.randn(B, S, C, dtype=dtype)
    if not batch_first:
        x, memory = x.transpose(0, 1).contiguous(), memory.transpose(0, 1).contiguous()
    return x.requires_grad_(), memory.requires_grad_()


def same(
    peer: nn.Module,
    ours: nn.Module,
    x: Tensor,  # [N, T, C]
    memory: Tensor,  # [B, S, C]
    k: int,
    layout: Layout = "bk",
    axis: int = 0,
    of_peer: dict[str, Any] | None = None,
    of_ours: dict[str, Any] | None = None,
) -> None:
    """Outputs and every gradient."""
    found = []
    for model, shared, options in ((peer, repeated(memory, k, layout, axis), of_peer), (ours, memory, of_ours)):
        out = model(x, shared, **(options or {}))
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        gradients = torch.autograd.grad((out * weights).sum(), [x, memory, *model.parameters()], allow_unused=True)
        found.append([out, *gradients])
    for wanted, got in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, **TOLERANCES[x.dtype])


# -------------------------------------------------------------------- torch's decoders


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("layout", ["bk", "kb"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_decoder_equals_itself_on_repeated_memory(k: int, layout: Layout, batch_first: bool, norm_first: bool) -> None:
    ours = decoder(norm_first=norm_first, batch_first=batch_first, activation="gelu")
    peer = copy.deepcopy(ours)
    report = convert(ours, layout=layout)
    assert [name for name, *_ in report.replaced] == ["layers.0.multihead_attn", "layers.1.multihead_attn"]
    assert {left.reason for left in report.left} == {SELF}
    same(peer, ours, *inputs(k, batch_first), k, layout, 0 if batch_first else 1)


@pytest.mark.parametrize("layout", ["bk", "kb"])
def test_decoder_in_float32(layout: Layout) -> None:
    ours = decoder(norm_first=True, dtype=torch.float32)
    peer = copy.deepcopy(ours)
    convert(ours, layout=layout)
    same(peer, ours, *inputs(3, dtype=torch.float32), 3, layout)


@pytest.mark.parametrize("layout", ["bk", "kb"])
@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("batch_first", [True, False])
def test_masks(layout: Layout, additive: bool, batch_first: bool) -> None:
    k = 5
    ours = decoder(batch_first=batch_first)
    peer = copy.deepcopy(ours)
    convert(ours, layout=layout)
    hidden = torch.zeros(PADDING.shape, dtype=torch.float64).masked_fill(PADDING, -torch.inf) if additive else PADDING
    causal = CAUSAL.double() if additive else torch.isinf(CAUSAL)
    own = nn.Transformer.generate_square_subsequent_mask(T, dtype=torch.float64)
    masks = {"memory_mask": causal, "tgt_mask": own if additive else torch.isinf(own)}
    padded = [{**masks, "memory_key_padding_mask": mask} for mask in (repeated(hidden, k, layout), hidden)]
    axis = 0 if batch_first else 1
    same(peer, ours, *inputs(k, batch_first), k, layout, axis, *padded)
    causally = {"memory_mask": CAUSAL.double(), "memory_is_causal": False, "tgt_mask": own, "tgt_is_causal": True}
    same(peer, ours, *inputs(k, batch_first), k, layout, axis, causally, causally)


def test_a_hint_of_causality_hides_what_the_mask_hides() -> None:
    ours = decoder()
    peer = copy.deepcopy(ours)
    convert(ours)
    square = nn.Transformer.generate_square_subsequent_mask(S, dtype=torch.float64)
    x, memory = torch.randn(B * 5, S, C, dtype=torch.float64, requires_grad=True), inputs(1)[1]
    options = {"memory_mask": square, "memory_is_causal": True}
    same(peer, ours, x, memory, 5, of_peer=options, of_ours=options)


class Crossed(nn.Module):
    """One attention between other layers, called with torch's defaults."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.cross = nn.MultiheadAttention(C, H, **options)
        self.own = nn.MultiheadAttention(C, H, batch_first=True, dtype=torch.float64)

    def forward(self, x: Tensor, memory: Tensor, values: Tensor | None = None, **options: Any) -> Tensor:
        out, weights = self.cross(x, memory, memory if values is None else values, **options)
        return out


@pytest.mark.parametrize("layout", ["bk", "kb"])
@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("options", [
    {}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"add_bias_kv": True, "add_zero_attn": True},
    {"kdim": 24, "vdim": 24}, {"bias": False}, {"batch_first": False}, {"kdim": 24, "vdim": 24, "add_bias_kv": True},
], ids=str)  # fmt: skip
def test_forms_of_attention(options: dict[str, Any], k: int, layout: Layout) -> None:
    settings = {"batch_first": True, "dtype": torch.float64, **options}
    ours = Crossed(**settings)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.3)
    peer = copy.deepcopy(ours)
    convert(ours, names="cross", layout=layout)
    x, memory = inputs(k, settings["batch_first"])
    memory = memory[..., : settings.get("kdim", C)].detach().requires_grad_()
    masks = [{"key_padding_mask": mask} for mask in (repeated(PADDING, k, layout), PADDING)]
    same(peer, ours, x, memory, k, layout, 0 if settings["batch_first"] else 1, *masks)


def test_values_of_their_own() -> None:
    ours = Crossed(batch_first=True, dtype=torch.float64, kdim=24, vdim=20)
    peer = copy.deepcopy(ours)
    assert [r.name for r in convert(ours).replaced] == ["cross"]  # kdim tells that it is cross-attention
    x, memory = inputs(5)
    keys, values = memory[..., :24], memory[..., 4:24]
    wanted = peer(x, keys.repeat_interleave(5, 0), values.repeat_interleave(5, 0))
    torch.testing.assert_close(ours(x, keys, values), wanted, rtol=1e-9, atol=1e-9)


def test_one_condition_and_no_batch_axis() -> None:
    ours = Crossed(batch_first=True, dtype=torch.float64)
    peer = copy.deepcopy(ours)
    convert(ours, names="cross")
    x, memory = inputs(5)
    torch.testing.assert_close(ours(x[0], memory[0]), peer(x[0], memory[0]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours(x, memory[:1]), peer(x, memory[:1].repeat(10, 1, 1)), rtol=1e-9, atol=1e-9)


class Named(nn.TransformerDecoderLayer):
    """A subclass with another block, as users write them."""

    def _mha_block(self, x: Tensor, mem: Tensor, *masks: Any, **others: Any) -> Tensor:
        return 0.5 * self.dropout2(self.multihead_attn(query=x, key=mem, value=mem)[0])


def test_subclasses_of_the_layer() -> None:
    layer = Named(C, H, 48, dropout=0.0, batch_first=True, dtype=torch.float64)
    peer = nn.TransformerDecoder(layer, 2)
    ours = copy.deepcopy(peer)
    assert len(convert(ours).replaced) == 2
    same(peer, ours, *inputs(5), 5)


def test_self_attention_named_by_mistake_is_right() -> None:
    ours = Crossed(batch_first=True, dtype=torch.float64)
    peer = copy.deepcopy(ours)
    report = convert(ours, names=["own"])
    assert report.left[0].reason == UNNAMED
    x, mask = inputs(5)[0], torch.ones(T, T).tril() == 0
    for options in ({}, {"attn_mask": mask}, {"key_padding_mask": torch.arange(T)[None].expand(10, T) > 1}):
        wanted = peer.own(x, x, x, need_weights=False, **options)[0]
        torch.testing.assert_close(ours.own(x, x, x, **options)[0], wanted, rtol=1e-9, atol=1e-9)


def test_torchs_transformer_by_its_two_halves() -> None:
    model = nn.Transformer(C, H, 1, 1, 48, dropout=0.0, batch_first=True, dtype=torch.float64)
    peer = copy.deepcopy(model)
    report = convert(model)
    assert [left.kind for left in report.left if "decoder(tgt, memory)" in left.reason] == ["Transformer"]
    x, source = inputs(5)
    wanted = peer(source.repeat_interleave(5, 0), x)
    torch.testing.assert_close(model.decoder(x, model.encoder(source)), wanted, rtol=1e-9, atol=1e-9)
    with pytest.raises(RuntimeError, match="batch number"):
        model(source, x)


# -------------------------------------------------------------------- memory projected once


@pytest.mark.parametrize("batch_first", [True, False])
def test_encoded_memory(batch_first: bool) -> None:
    ours = decoder(batch_first=batch_first)
    peer = copy.deepcopy(ours)
    convert(ours)
    x, memory = inputs(5, batch_first)
    axis = 0 if batch_first else 1
    masks = [{"memory_mask": CAUSAL.double(), "memory_key_padding_mask": mask.double().masked_fill(mask, -torch.inf)}
             for mask in (PADDING.repeat_interleave(5, 0), PADDING)]  # fmt: skip
    wanted = peer(x, memory.repeat_interleave(5, axis), **masks[0])
    cache = encode_memory(ours, memory)
    assert isinstance(cache, ConditionCache) and cache.batch == B and len(cache) == 2
    for _ in range(2):
        torch.testing.assert_close(ours(x, cache, **masks[1]), wanted, rtol=1e-9, atol=1e-9)


class Policy(nn.Module):
    """A diffusion transformer as they are written with torch's decoder; the time is added to the samples' tokens."""

    def __init__(self, repeat: bool) -> None:
        super().__init__()
        self.repeat = repeat
        self.observe, self.embed, self.time = nn.Linear(6, C), nn.Linear(2, C), nn.Linear(1, C)
        layer = nn.TransformerDecoderLayer(C, H, 48, dropout=0.0, norm_first=True, batch_first=True)
        self.decoder, self.head = nn.TransformerDecoder(layer, 2), nn.Linear(C, 2)
        self.register_buffer("memory_mask", CAUSAL.clone())

    def encode(self, obs: Tensor) -> Any:
        memory = self.observe(obs)
        return memory if self.repeat else encode_memory(self.decoder, memory)

    def denoise(self, cache: Any, x: Tensor, t: Tensor) -> Tensor:
        memory = cache.repeat_interleave(x.shape[1], 0) if self.repeat else cache
        tokens = self.embed(x.flatten(0, 1)) + self.time(t.flatten()[:, None, None].to(x.dtype))
        return self.head(self.decoder(tokens, memory, memory_mask=self.memory_mask)).view(x.shape)

    forward = denoise


@pytest.mark.parametrize("chunk", [None, 2])
def test_a_whole_policy_in_the_level2_step(chunk: int | None) -> None:
    peer, ours = Policy(repeat=True).double(), Policy(repeat=False).double()
    ours.load_state_dict(peer.state_dict())
    convert(ours.decoder)
    objective = DenoisingLoss(FlowMatching(timestep_scale=1.0))
    drawn = Level2Batch.draw(
        torch.randn(B, S, 6, dtype=torch.float64), torch.randn(B, T, 2, dtype=torch.float64), 4, objective
    )
    results = [level2_step(peer, objective, drawn).loss, level2_step(ours, objective, drawn, chunk=chunk).loss]
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)
    for wanted, got in zip(peer.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-9, atol=1e-9)


# -------------------------------------------------------------------- what goes on working


def test_parameters_optimizers_and_averages_stay() -> None:
    from diffusers.training_utils import EMAModel

    model = decoder(dtype=torch.float32)
    parameters, state = list(model.parameters()), copy.deepcopy(model.state_dict())
    optimizer, average = torch.optim.AdamW(model.parameters(), lr=0.1), EMAModel(model.parameters())
    model.layers[0].multihead_attn.in_proj_weight.requires_grad_(False)
    report = convert(model, impl="reference")
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))
    x, memory = inputs(5, dtype=torch.float32)
    model(x, memory).square().sum().backward()
    optimizer.step()
    average.step(model.parameters())
    changed = model.layers[1].multihead_attn.in_proj_weight
    assert not torch.equal(changed, state["layers.1.multihead_attn.in_proj_weight"])
    frozen = model.layers[0].multihead_attn.in_proj_weight
    assert torch.equal(frozen, state["layers.0.multihead_attn.in_proj_weight"])
    average.copy_to(model.parameters())
    kept = model(x, memory[:1]).detach()
    report.revert()
    assert type(model.layers[0].multihead_attn) is nn.MultiheadAttention and report.reverted
    torch.testing.assert_close(model(x, memory[:1].repeat(10, 1, 1)), kept, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError):
        model(x, memory)
    assert vars(model.layers[0].multihead_attn).keys() == vars(decoder().layers[0].multihead_attn).keys()
    assert len(convert(model).replaced) == 2


def test_mode_hooks_and_shared_modules_stay() -> None:
    model = decoder(dropout=0.25)
    first, second = model.layers
    second.multihead_attn = first.multihead_attn
    second.eval()
    calls: list[tuple[int, ...]] = []
    first.multihead_attn.register_forward_hook(lambda module, args, out: calls.append(tuple(out[0].shape)))
    first.multihead_attn.register_forward_pre_hook(lambda module, args: calls.append(tuple(args[1].shape)))
    report = convert(model)
    assert [r.name for r in report.replaced] == ["layers.0.multihead_attn"]
    assert first.multihead_attn.training is False and first.training is True
    assert first.multihead_attn.dropout == 0.25 and first.multihead_attn.batch_first is True
    x, memory = inputs(5)
    model(x, memory)
    assert calls == [(B, S, C), (B * 5, T, C)] * 2


def test_deepcopy_pickle_and_state_dict() -> None:
    model = decoder()
    plain = copy.deepcopy(model)
    convert(model, layout="kb")
    x, memory = inputs(5)
    wanted = model(x, memory)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    whole = torch.load(stream, weights_only=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), whole):
        assert isinstance(other.layers[0].multihead_attn, BroadcastCrossAttention)
        assert torch.equal(other(x, memory), wanted)
        assert len(encode_memory(other, memory)) == 2
    other = decoder()
    convert(other, layout="kb")
    other.load_state_dict(plain.state_dict())
    assert torch.equal(other(x, memory), wanted)
    plain.load_state_dict(model.state_dict())


def test_dropout_acts_in_training_only() -> None:
    model = decoder(dropout=0.5)
    convert(model)
    x, memory = inputs(5)
    assert not torch.equal(model(x, memory), model(x, memory))
    model.eval()
    assert torch.equal(model(x, memory), model(x, memory))


def test_compiles_without_graph_breaks() -> None:
    model = decoder(batch_first=False).layers[1]
    peer = copy.deepcopy(model)
    convert(model)
    x, memory = inputs(5, batch_first=False)
    options = {"memory_mask": CAUSAL.double()}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    same(peer, compiled, x, memory, 5, axis=1, of_peer=options, of_ours=options)
    cached = compiled(x, encode_memory(model, memory), **options)
    torch.testing.assert_close(cached, model(x, memory, **options), rtol=1e-9, atol=1e-9)
    with pytest.raises(RuntimeError, match="0 and -inf only"):
        compiled(x, memory, memory_mask=CAUSAL.double() + 1)


def test_autocast_and_checkpointing() -> None:
    model = decoder(dtype=torch.float32)
    peer = copy.deepcopy(model)
    convert(model, impl="reference")  # Triton's interpreter multiplies bfloat16 wrongly
    x, memory = inputs(5, dtype=torch.float32)
    true, copied = model(x, memory), memory.repeat_interleave(5, 0)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = (peer(x, copied) - true).abs().max()
        for given in (memory, encode_memory(model, memory)):
            assert (model(x, given) - true).abs().max() <= 2 * theirs + 2**-8 * true.abs().max()
    wanted = torch.autograd.grad(model(x, memory).sum(), [x, memory])
    again = torch.autograd.grad(checkpoint(model, x, memory, use_reentrant=False).sum(), [x, memory])
    torch.testing.assert_close(again, wanted)


# -------------------------------------------------------------------- what is left, and errors


class Quantizable(nn.MultiheadAttention):
    pass


class Adapted(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


def patched(attention: nn.MultiheadAttention) -> nn.MultiheadAttention:
    attention.forward = attention.forward  # type: ignore[method-assign]
    return attention


def adapted(attention: nn.MultiheadAttention) -> nn.MultiheadAttention:
    attention.out_proj = Adapted(C, C)  # type: ignore[assignment]
    return attention


def parametrized(attention: nn.MultiheadAttention) -> nn.MultiheadAttention:
    nn.utils.parametrizations.weight_norm(attention, "in_proj_weight")
    return attention


def tagged(attention: nn.MultiheadAttention) -> nn.MultiheadAttention:
    attention.layer = 3  # type: ignore[assignment]
    return attention


@pytest.mark.parametrize("make, reason", [
    (lambda: Quantizable(C, H), "Quantizable derives from nn.MultiheadAttention"),
    (lambda: torch.ao.nn.quantizable.MultiheadAttention(C, H), "derives from nn.MultiheadAttention"),
    (lambda: parametrized(nn.MultiheadAttention(C, H)), "parametrize and shard its weights after"),
    (lambda: patched(nn.MultiheadAttention(C, H)), "its forward has been patched"),
    (lambda: adapted(nn.MultiheadAttention(C, H)), "out_proj is a Adapted"),
    (lambda: tagged(nn.MultiheadAttention(C, H)), "it has an attribute 'layer' already"),
    (lambda: nn.MultiheadAttention(C, 8), "its head dimension is 4, and only 8 to 256"),
    (lambda: nn.MultiheadAttention(512, 1), "its head dimension is 512"),
    (lambda: nn.MultiheadAttention(C, H, dropout=1.0), "its dropout is 1.0"),
    (lambda: BroadcastCrossAttention(C, H), "takes memory that is not repeated already"),
])  # fmt: skip
def test_left_with_a_reason(make: Callable[[], nn.MultiheadAttention], reason: str) -> None:
    attention = make()
    before = dict(vars(attention))
    with pytest.raises(InvalidArgument, match=rf"nothing to replace in \w+: \(the model\) .*{reason}"):
        convert(attention)
    assert vars(attention) == before
    both = nn.ModuleList([attention, nn.MultiheadAttention(C, H)])
    report = convert(both, names="*")
    assert [r.name for r in report.replaced] == ["1"] and reason in report.left[0].reason


def test_parametrized_after_the_conversion() -> None:
    model = nn.MultiheadAttention(C, H, batch_first=True)
    report = convert(model)
    x, memory = inputs(5, dtype=torch.float32)
    wanted = model(x, memory)[0]
    parametrized(model)
    torch.testing.assert_close(model(x, memory)[0], wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(InvalidArgument, match="has become a ParametrizedTorchCrossAttention since.*nothing was revert"):
        report.revert()


def test_what_is_not_said_is_left() -> None:
    model = nn.ModuleDict({"a": nn.MultiheadAttention(C, H), "b": nn.MultiheadAttention(C, H)})
    with pytest.raises(
        InvalidArgument, match=r"in ModuleDict: a \(MultiheadAttention\), b .*nothing tells which: name"
    ):
        convert(model)
    report = convert(model, names=lambda name, module: name == "b" and module.num_heads == H)
    assert str(report).splitlines() == [
        "replaced 1, left 1",
        "  b: MultiheadAttention -> TorchCrossAttention",
        f"  a: MultiheadAttention left as is, because {UNNAMED}",
    ]
    report.revert()
    assert convert(nn.ModuleList([model["a"], decoder()])).left[0].reason == UNCLEAR
    layer = nn.TransformerDecoderLayer(C, H)
    layer.multihead_attn = nn.Identity()  # type: ignore[assignment]
    with pytest.raises(InvalidArgument, match="its multihead_attn is a Identity.*self_attn.*self-attention"):
        convert(layer, names="*attn")


def test_self_attention_of_torchs_layers_is_never_replaced() -> None:
    model = nn.ModuleList([decoder(), nn.TransformerEncoderLayer(C, H)])
    report = convert(model, names="*attn")
    assert [r.name for r in report.replaced] == ["0.layers.0.multihead_attn", "0.layers.1.multihead_attn"]
    assert [left.reason for left in report.left] == [SELF] * 3


def test_models_of_other_attention_are_refused() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 10}
    with pytest.raises(InvalidArgument, match="nothing to replace in BartModel: it has no nn.MultiheadAttention"):
        convert(transformers.BartModel(transformers.BartConfig(**sizes, **heads)))


@pytest.mark.parametrize("arguments, text", [
    ({"layout": "b"}, "convert: layout must be 'bk'"),
    ({"impl": "fast"}, "convert: impl must be None or one of .*'fast'"),
    ({"names": "*.cross"}, r"'\*.cross' matches no nn.MultiheadAttention; there are: layers.0.self_attn, layers.0.mult"),
    ({"names": []}, r"names must be patterns of dotted names or a function, got \[\]"),
    ({"names": [1]}, r"names must be patterns .* got \[1\]"),
    ({"names": "*.self_attn"}, "nothing to replace .*multihead_attn.*: names does not name it"),
], ids=str)  # fmt: skip
def test_errors_of_convert(arguments: dict[str, Any], text: str) -> None:
    model = decoder()
    with pytest.raises(InvalidArgument, match=text):
        convert(model, **arguments)
    assert all(type(layer.multihead_attn) is nn.MultiheadAttention for layer in model.layers)


def test_a_model_is_a_module() -> None:
    with pytest.raises(InvalidArgument, match="module must be an nn.Module, got function"):
        convert(decoder)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="nothing to replace in Linear: it has no nn.MultiheadAttention"):
        convert(nn.Linear(2, 2))


def test_errors_of_forward() -> None:
    model = decoder()
    convert(model)
    attention, (x, memory) = model.layers[1].multihead_attn, inputs(5)
    bias = torch.zeros(T, S, dtype=torch.float64)
    for options, text in (
        ({"need_weights": True}, "need_weights must be False"),
        ({"attn_mask": bias + 0.5}, "attn_mask must be boolean .* 0 and -inf only, got 21 other values, the first 0.5"),
        ({"attn_mask": bias.requires_grad_()}, "attn_mask must be .*requires grad: a learned bias"),
        ({"attn_mask": torch.zeros(10 * H, T, S)}, "masks per head are not supported"),
        ({"attn_mask": torch.zeros(T, S, dtype=torch.int32)}, "attn_mask must be boolean"),
        ({"key_padding_mask": torch.full((B, S), -1e9)}, "key_padding_mask must be .* the first -1e[+]09"),
        ({"key_padding_mask": PADDING.repeat_interleave(5, 0)}, r"key_padding_mask must be \[B, S\] = \[2, 7\]"),
        ({"is_causal": True}, "is_causal=True needs attn_mask"),
    ):
        with pytest.raises(InvalidArgument, match=text):
            attention(x, memory, memory, **options)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="got N = 9 rows for B = 2 conditions"):
        model(x[:9], memory)


def test_errors_of_encoded_memory() -> None:
    model = decoder()
    x, memory = inputs(5)
    with pytest.raises(InvalidArgument, match="convert was called with.*TransformerDecoder has none"):
        encode_memory(model, memory)
    convert(model)
    with pytest.raises(InvalidArgument, match=r"TransformerDecoderLayer has layers \[1\]"):
        encode_memory(model.layers[1], memory)
    with pytest.raises(InvalidArgument, match=r"memory must be \[B, S, C\], got \[7, 32\]"):
        encode_memory(model, memory[0])
    with pytest.raises(InvalidArgument, match="with C = 32"):
        encode_memory(model, memory[..., :8])
    cache = encode_memory(model, memory)
    short = ConditionCache(cache.keys[:1], cache.values[:1])
    with pytest.raises(InvalidArgument, match="layer 1 of the converted model, and the cache has 1 layers"):
        model(x, short)
    attention = model.layers[0].multihead_attn
    assert isinstance(attention, TorchCrossAttention)
    for arguments in ((x, cache, memory), (x, memory, cache)):
        with pytest.raises(InvalidArgument, match="takes the place of both key and value"):
            attention(*arguments)
    model.layers[1].multihead_attn.batch_first = False
    with pytest.raises(InvalidArgument, match="some of the layers are batch_first"):
        encode_memory(model, memory)


def test_docstring_examples() -> None:
    result = doctest.testmod(importlib.import_module("minidiff_fast.integrations.torch_modules"))
    assert result.attempted > 0 and result.failed == 0
