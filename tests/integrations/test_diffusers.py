"""diffusers' real Attention with one memory per condition, against itself on repeated memory."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minidiff_fast import native
from minidiff_fast.errors import InvalidArgument
from minidiff_fast.integrations.diffusers import (
    BroadcastAttnProcessor,
    apply_broadcast_attention,
    cached_condition,
)

attention_processor = pytest.importorskip("diffusers.models.attention_processor")
Attention = attention_processor.Attention

B, T, S, C, CM = 3, 4, 6, 32, 20
FAST = "native" if native.why_missing() is None else "reference"


def repeated(x: Tensor, k: int, layout: str) -> Tensor:
    return x.repeat_interleave(k, 0) if layout == "bk" else x.repeat(k, *[1] * (x.dim() - 1))


def attention(seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    torch.manual_seed(seed)
    options = {"query_dim": C, "cross_attention_dim": CM, "heads": 4, "dim_head": 8, **options}
    made = Attention(**options).to(dtype)
    with torch.no_grad():  # no norm at its initial weight 1 and bias 0
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def gradients(module: nn.Module, out: Tensor, *inputs: Tensor) -> dict[str, Tensor]:
    named = dict(module.named_parameters())
    named |= {f"input {i}": x for i, x in enumerate(inputs)}
    torch.manual_seed(5)
    direction = torch.randn(out.shape, dtype=torch.float64).to(out.dtype)
    found = torch.autograd.grad(out, list(named.values()), direction, allow_unused=True)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None}


def assert_same(ours: Any, wanted: Any, tolerance: float) -> None:
    torch.testing.assert_close(ours, wanted, rtol=tolerance, atol=tolerance)


def compare(
    attn: Any,
    k: int,
    layout: str,
    *,
    mask: Tensor | None = None,
    hidden: Tensor | None = None,
    channels: int = CM,
    dtype: torch.dtype = torch.float64,
    tolerance: float | None = None,
    impl: str | None = None,
    **kwargs: Any,
) -> None:
    """Output and every gradient, the memory's too, against the peer's own processor on repeated memory."""
    torch.manual_seed(1)
    hidden = torch.randn(B * k, T, C) if hidden is None else hidden
    hidden = hidden.to(dtype).requires_grad_()
    memory = torch.randn(B, S, channels, dtype=dtype, requires_grad=True)
    own = attn.processor
    mask_rows = None if mask is None else repeated(mask, k, layout)
    wanted = attn(hidden, encoder_hidden_states=repeated(memory, k, layout), attention_mask=mask_rows, **kwargs)
    expected = gradients(attn, wanted, hidden, memory)
    impl = FAST if impl is None and dtype == torch.float32 else impl
    attn.set_processor(BroadcastAttnProcessor(layout=layout, like=type(own).__name__, impl=impl))
    try:
        ours = attn(hidden, encoder_hidden_states=memory, attention_mask=mask, **kwargs)
        found = gradients(attn, ours, hidden, memory)
    finally:
        attn.set_processor(own)
    tolerance = tolerance or (1e-9 if dtype == torch.float64 else 2e-5)
    assert_same(ours, wanted, tolerance)
    assert_same(found, expected, tolerance)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True, "out_bias": False},
    "same width": {"cross_attention_dim": C},
    "residual": {"residual_connection": True, "rescale_output_factor": 1.7},
    "group norm": {"norm_num_groups": 4, "residual_connection": True},
    "layer norm of q and k": {"qk_norm": "layer_norm"},
    "layer norm without weights": {"qk_norm": "layer_norm", "elementwise_affine": False},
    "l2 norm of q and k": {"qk_norm": "l2"},
    "memory layer norm": {"cross_attention_norm": "layer_norm"},
    "memory group norm": {"cross_attention_norm": "group_norm", "cross_attention_norm_num_groups": 5},
    "unscaled": {"scale_qk": False},
    "upcast": {"scale_qk": False, "upcast_attention": True, "upcast_softmax": True},
    "unscaled, norms not applied": {"scale_qk": False, "qk_norm": "layer_norm"},
    "wide out": {"out_dim": 48},
    "head dimension 15": {"heads": 3, "dim_head": 15},
}


@pytest.mark.parametrize("layout", ["bk", "kb"])
@pytest.mark.parametrize("case", CASES)
def test_as_the_peer(case: str, layout: str) -> None:
    attn = attention(**CASES[case])
    # diffusers computes these in float32 whatever comes
    tolerance = 1e-5 if CASES[case].get("upcast_attention") else None
    for k in (1, 5):
        compare(attn, k, layout, channels=CASES[case].get("cross_attention_dim", CM), tolerance=tolerance)


@pytest.mark.parametrize("norm", ["rms_norm", "fp32_layer_norm"])
def test_norms_that_are_float32_in_the_peer(norm: str) -> None:
    compare(attention(qk_norm=norm), 5, "bk", tolerance=1e-5)
    compare(attention(qk_norm=norm, elementwise_affine=False), 5, "kb", tolerance=1e-5)


@pytest.mark.parametrize("case", ["bias", "group norm", "layer norm of q and k", "memory layer norm", "unscaled"])
def test_float32(case: str) -> None:
    attn = attention(dtype=torch.float32, **CASES[case])
    for k, layout in ((1, "bk"), (5, "bk"), (5, "kb")):
        compare(attn, k, layout, dtype=torch.float32)
    compare(attn, 5, "bk", dtype=torch.float32, mask=additive(keep(), torch.float32))


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is chosen where there is no GPU")
def test_triton() -> None:
    """Strided rows ("kb"), a fused norm, a mask, and two segments, through the kernels."""
    pytest.importorskip("triton")
    options = {"impl": "triton", "dtype": torch.float32, "mask": keep()}
    compare(attention(dtype=torch.float32, qk_norm="layer_norm"), 2, "kb", **options)
    added = attention_processor.AttnAddedKVProcessor2_0()
    attn = attention(dtype=torch.float32, **ADDED, processor=added)
    compare(attn, 2, "kb", hidden=torch.randn(B * 2, C, 2, 2), **{**options, "mask": None})


def keep() -> Tensor:  # [B, S] bool
    return torch.arange(S)[None] < torch.tensor([S, 2, 4])[:, None]


def additive(mask: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """As UNet2DConditionModel and Transformer2DModel make it of a boolean mask."""
    return ((1 - mask.to(dtype)) * -10000.0)[:, None]


def per_query() -> Tensor:  # [B, T, S] bool
    return keep()[:, None] & (torch.arange(S)[None] <= torch.arange(T)[:, None])


MASKS: dict[str, Callable[[], Tensor]] = {
    "boolean": keep,
    "boolean, explicit": lambda: keep()[:, None],
    "boolean, two axes": lambda: keep()[:, None, None],
    "additive": lambda: additive(keep()),
    "additive, two-dimensional": lambda: additive(keep())[:, 0],
    "minus infinity": lambda: torch.zeros(B, 1, S, dtype=torch.float64).masked_fill(~keep()[:, None], -torch.inf),
    "soft": lambda: torch.randn(B, 1, S, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
    "per query": per_query,
    "per query, soft": lambda: torch.randn(B, T, S, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
}


@pytest.mark.parametrize("layout", ["bk", "kb"])
@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask: str, layout: str) -> None:
    attn = attention(qk_norm="layer_norm")
    for k in (1, 5):
        compare(attn, k, layout, mask=MASKS[mask]())


def test_masks_that_prepare_attention_mask_made() -> None:
    attn, own, k = attention(), attention(), 5
    attn.set_processor(BroadcastAttnProcessor())
    hidden, memory = torch.randn(B * k, T, C).double(), torch.randn(B, S, CM).double()
    for mask in (keep()[:, None], additive(keep())):
        wanted = own(hidden, memory.repeat_interleave(k, 0), mask.repeat_interleave(k, 0))
        assert_same(attn(hidden, memory, attn.prepare_attention_mask(mask, S, B)), wanted, 1e-9)
    per_head = torch.randn(B * 4, T, S).double()  # really different per head, and per query
    rows = per_head.unflatten(0, (B, 4)).repeat_interleave(k, 0).flatten(0, 1)
    wanted = own(hidden, memory.repeat_interleave(k, 0), rows)
    assert_same(attn(hidden, memory, per_head), wanted, 1e-9)
    boolean = (per_head > 0) | (torch.arange(S) == 0)
    rows = boolean.unflatten(0, (B, 4)).repeat_interleave(k, 0).flatten(0, 1)
    assert_same(attn(hidden, memory, boolean), own(hidden, memory.repeat_interleave(k, 0), rows), 1e-9)


def test_integer_masks_keep() -> None:
    attn = attention()
    attn.set_processor(BroadcastAttnProcessor())
    hidden, memory = torch.randn(B * 2, T, C).double(), torch.randn(B, S, CM).double()
    assert_same(attn(hidden, memory, keep().long()), attn(hidden, memory, keep()), 0.0)


def test_condition_without_visible_token() -> None:
    attn = attention()
    attn.set_processor(BroadcastAttnProcessor())
    mask = keep()
    mask[1] = False
    hidden, memory = torch.randn(B * 2, T, C).double(), torch.randn(B, S, CM).double()
    out = attn(hidden, memory, mask)
    assert_same(out[2:4], attn.to_out[0].bias.expand(2, T, C), 1e-12)
    for explicit in (mask[:, None].expand(B, T, S), mask.repeat_interleave(4, 0)[:, None].expand(-1, T, S)):
        assert_same(attn(hidden, memory, explicit), out, 1e-12)


def test_images_and_spatial_norm() -> None:
    for k, layout in ((1, "bk"), (5, "bk"), (5, "kb")):
        image = torch.randn(B * k, C, 2, 3)
        compare(attention(norm_num_groups=4, residual_connection=True), k, layout, hidden=image)
        temb = torch.randn(B * k, 7, 1, 1, dtype=torch.float64)
        compare(attention(spatial_norm_dim=7), k, layout, hidden=image, temb=temb)


ADDED = {"cross_attention_dim": C, "added_kv_proj_dim": CM, "norm_num_groups": 4, "bias": True}


@pytest.mark.parametrize("layout", ["bk", "kb"])
@pytest.mark.parametrize("processor", ["AttnAddedKVProcessor", "AttnAddedKVProcessor2_0"])
@pytest.mark.parametrize(
    "options",
    [{}, {"only_cross_attention": True}, {"cross_attention_norm": "layer_norm"}, {"scale_qk": False}],
    ids=["both", "only cross", "memory norm", "unscaled"],
)
def test_added_keys_and_values(options: dict[str, Any], processor: str, layout: str) -> None:
    attn = attention(**ADDED, **options, processor=getattr(attention_processor, processor)())
    if "cross_attention_norm" in options:  # its LayerNorm has cross_attention_dim channels, and meets added_kv_proj_dim
        attn.norm_cross = nn.LayerNorm(CM).double()
    for k in (1, 5):
        compare(attn, k, layout, hidden=torch.randn(B * k, C, 2, 2))
        if not options:  # beside only_cross_attention the peer pads its mask for keys that are not there
            compare(attn, k, layout, hidden=torch.randn(B * k, C, 2, 2), mask=additive(keep()))


def test_added_keys_and_values_with_a_boolean_mask() -> None:
    attn = attention(**ADDED, processor=attention_processor.AttnAddedKVProcessor2_0())
    hidden, memory = torch.randn(B * 5, C, 2, 2).double(), torch.randn(B, S, CM).double()
    attn.set_processor(BroadcastAttnProcessor())
    assert_same(attn(hidden, memory, keep()), attn(hidden, memory, additive(keep())), 1e-9)


def test_fewer_key_heads() -> None:
    """diffusers' plain processors cannot run kv_heads: against the same module with its key heads repeated."""
    grouped, plain = attention(kv_heads=2), attention()
    plain.load_state_dict(
        {name: w for name, w in grouped.state_dict().items() if "to_k" not in name and "to_v" not in name}, strict=False
    )
    with torch.no_grad():
        for name in ("to_k", "to_v"):
            weight = getattr(grouped, name).weight.unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1)
            getattr(plain, name).weight.copy_(weight)
    hidden, memory = torch.randn(B * 5, T, C).double(), torch.randn(B, S, CM).double()
    apply_broadcast_attention(grouped)
    for mask in (None, keep(), additive(keep()), torch.randn(B, T, S).double()):
        rows = None if mask is None else mask.repeat_interleave(5, 0)
        wanted = plain(hidden, memory.repeat_interleave(5, 0), rows)
        assert_same(grouped(hidden, memory, mask), wanted, 1e-9)


@pytest.mark.parametrize("norm", ["layer_norm_across_heads", "rms_norm_across_heads"])
def test_norms_across_heads(norm: str) -> None:
    """As in Lumina and LTX: on the projections, before they are split into heads."""
    attn, plain = attention(qk_norm=norm, kv_heads=4), attention()
    plain.load_state_dict({name: w for name, w in attn.state_dict().items() if "norm" not in name})

    class Normed(nn.Module):
        def __init__(self, linear: nn.Module, norm: nn.Module) -> None:
            super().__init__()
            self.linear, self.norm = linear, norm

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.linear(x))

    plain.to_q, plain.to_k = Normed(plain.to_q, attn.norm_q), Normed(plain.to_k, attn.norm_k)
    hidden, memory = torch.randn(B * 5, T, C).double(), torch.randn(B, S, CM).double()
    apply_broadcast_attention(attn)
    assert_same(attn(hidden, memory), plain(hidden, memory.repeat_interleave(5, 0)), 1e-9)


def test_self_attention_is_per_sample() -> None:
    """A converted module that is called without a memory, as vla_jepa's self-attention blocks are."""
    cases: list[dict[str, Any]] = [
        {"qk_norm": "layer_norm"},
        {"scale_qk": False},
        {"cross_attention_norm": "layer_norm"},
    ]
    for options in (*cases, {"norm_num_groups": 4}):
        own, attn = attention(cross_attention_dim=C, **options), attention(cross_attention_dim=C, **options)
        apply_broadcast_attention(attn)
        hidden = torch.randn(B * 2, T, C).double()
        for mask in (None, torch.zeros(B * 2, 1, T).double().masked_fill(torch.rand(B * 2, 1, T) < 0.3, -10000.0)):
            assert_same(attn(hidden, attention_mask=mask), own(hidden, attention_mask=mask), 1e-9)
    own = attention(**{**ADDED, "added_kv_proj_dim": C}, processor=attention_processor.AttnAddedKVProcessor2_0())
    attn = copy.deepcopy(own)
    apply_broadcast_attention(attn)
    image = torch.randn(B, C, 2, 2).double()
    assert_same(attn(image), own(image), 1e-9)


def test_repeated_memory_is_each_rows_own() -> None:
    own, attn = attention(), attention()
    apply_broadcast_attention(attn)
    hidden, memory = torch.randn(6, T, C).double(), torch.randn(6, S, CM).double()
    assert_same(attn(hidden, memory), own(hidden, memory), 1e-9)


# -------------------------------------------------------------------- models


def block(**options: Any) -> nn.Module:
    from diffusers.models.attention import BasicTransformerBlock

    torch.manual_seed(0)
    options = {"cross_attention_dim": CM, "attention_bias": True, **options}
    return BasicTransformerBlock(C, 4, 8, **options).double().eval()


@pytest.mark.parametrize("layout", ["bk", "kb"])
@pytest.mark.parametrize("norm_type", ["layer_norm", "ada_norm"])
def test_a_transformer_block(norm_type: str, layout: str) -> None:
    options = {"norm_type": norm_type, "num_embeds_ada_norm": 10 if norm_type == "ada_norm" else None}
    made, k = block(**options), 5
    hidden = torch.randn(B * k, T, C, dtype=torch.float64, requires_grad=True)
    memory = torch.randn(B, S, CM, dtype=torch.float64, requires_grad=True)
    rest = {"timestep": torch.tensor(3)}
    rows = {"encoder_hidden_states": repeated(memory, k, layout), "encoder_attention_mask": repeated(keep(), k, layout)}
    wanted = made(hidden, **rows, **rest)
    expected = gradients(made, wanted, hidden, memory)
    report = apply_broadcast_attention(made, layout=layout)
    assert [entry.name for entry in report.replaced] == ["attn2"]
    ours = made(hidden, encoder_hidden_states=memory, encoder_attention_mask=keep(), **rest)
    assert_same(ours, wanted, 1e-9)
    assert_same(gradients(made, ours, hidden, memory), expected, 1e-9)


def transformer() -> nn.Module:
    from diffusers import Transformer2DModel

    torch.manual_seed(0)
    return Transformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=32, num_layers=2, cross_attention_dim=CM
    )


def unet(**options: Any) -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=4, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 16),
        norm_num_groups=4, cross_attention_dim=CM, **options,
    )  # fmt: skip


MODELS: dict[str, Callable[[], nn.Module]] = {
    "Transformer2DModel": transformer,
    "UNet2DConditionModel": lambda: unet(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
    ),
    "UNet2DConditionModel, added keys and values": lambda: unet(
        down_block_types=("SimpleCrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=8,
        up_block_types=("UpBlock2D", "SimpleCrossAttnUpBlock2D"), mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    ),
}  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
def test_whole_models_pass_memory_through(model: str) -> None:
    made, k = MODELS[model]().double().eval(), 4
    hidden = torch.randn(B * k, 32 if "Trans" in model else 4, 4, 4).double()
    memory, time = torch.randn(B, S, CM).double(), torch.arange(B * k) * 7
    arguments = (hidden,) if "Trans" in model else (hidden, time)
    report = apply_broadcast_attention(made)
    processors = dict(made.named_modules())
    for mask in (None, keep()):
        ours = made(*arguments, encoder_hidden_states=memory, encoder_attention_mask=mask).sample
        report.revert()
        rows = None if mask is None else mask.repeat_interleave(k, 0)
        repeated_memory = memory.repeat_interleave(k, 0)
        wanted = made(*arguments, encoder_hidden_states=repeated_memory, encoder_attention_mask=rows).sample
        assert_same(ours, wanted, 1e-9)
        report = apply_broadcast_attention(made)
    assert processors.keys() == dict(made.named_modules()).keys()


def test_models_that_reshape_their_memory_are_left() -> None:
    from diffusers import PixArtTransformer2DModel

    made = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=1, cross_attention_dim=32,
        sample_size=8, caption_channels=16, use_additional_conditions=False,
    )  # fmt: skip
    with pytest.raises(
        InvalidArgument, match="attn2: Attention: PixArtTransformer2DModel around it reshapes the memory"
    ):
        apply_broadcast_attention(made)


# -------------------------------------------------------------------- torch around it


def test_compiles_without_breaks() -> None:
    native.why_missing()  # the library is looked for outside the graph
    attn = attention(dtype=torch.float32, qk_norm="layer_norm")
    apply_broadcast_attention(attn, impl=FAST)
    compiled = torch.compile(attn, fullgraph=True, backend="aot_eager")
    hidden, memory = torch.randn(B * 2, T, C, requires_grad=True), torch.randn(B, S, CM, requires_grad=True)
    for mask in (None, keep(), additive(keep(), torch.float32)):
        wanted, ours = attn(hidden, memory, mask), compiled(hidden, memory, mask)
        assert_same(ours, wanted, 1e-5)
        assert_same(gradients(attn, ours, hidden, memory), gradients(attn, wanted, hidden, memory), 1e-5)
    with torch.no_grad(), cached_condition(attn):
        assert_same(compiled(hidden, memory), attn(hidden, memory), 1e-5)


def test_autocast() -> None:
    own = attention(dtype=torch.float32, qk_norm="layer_norm", bias=True)
    attn = copy.deepcopy(own)
    apply_broadcast_attention(attn, impl=FAST)
    hidden, memory = torch.randn(B * 5, T, C), torch.randn(B, S, CM)
    for mask in (None, keep(), additive(keep(), torch.float32)):
        rows = None if mask is None else mask.repeat_interleave(5, 0)
        exact = own(hidden, memory.repeat_interleave(5, 0), rows)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            wanted = own(hidden, memory.repeat_interleave(5, 0), rows)
            ours = attn(hidden, memory, mask)
        assert ours.dtype == wanted.dtype == torch.bfloat16
        budget = 2 * (wanted - exact).abs().max() + 0.01 * exact.abs().max()
        assert (ours - exact).abs().max() <= budget
        ours.float().sum().backward()
        assert attn.to_k.weight.grad is not None and attn.to_k.weight.grad.isfinite().all()


def test_bfloat16_weights() -> None:
    attn = attention(dtype=torch.bfloat16, qk_norm="rms_norm")
    apply_broadcast_attention(attn, impl=FAST)
    out = attn(torch.randn(B * 2, T, C, dtype=torch.bfloat16), torch.randn(B, S, CM, dtype=torch.bfloat16), keep())
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


def test_copies_pickles_and_state_dicts() -> None:
    made = block()
    keys, weights = list(made.state_dict()), copy.deepcopy(made.state_dict())
    report = apply_broadcast_attention(made, layout="kb")
    assert list(made.state_dict()) == keys
    hidden, memory = torch.randn(B * 2, T, C).double(), torch.randn(B, S, CM).double()
    with torch.no_grad(), cached_condition(made):
        out = made(hidden, encoder_hidden_states=memory)
        copied = copy.deepcopy(made)  # without what is kept
        stored = pickle.loads(pickle.dumps(made.attn2.processor))
        saved = io.BytesIO()
        torch.save(made, saved)
    saved.seek(0)
    for other in (copied, torch.load(saved, weights_only=False)):
        assert other.attn2.processor is not made.attn2.processor
        assert other.attn2.processor._kept is None and other.attn2.processor.layout == "kb"
        assert_same(other(hidden, encoder_hidden_states=memory), out, 0.0)
    assert (stored.layout, stored.impl, stored.like, stored._kept) == ("kb", None, "AttnProcessor2_0", None)
    report.revert()
    plain = block()
    plain.load_state_dict(copied.state_dict())
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, weights[name]), name


def test_gradient_checkpointing() -> None:
    made = block()
    apply_broadcast_attention(made)
    hidden = torch.randn(B * 5, T, C, dtype=torch.float64, requires_grad=True)
    memory = torch.randn(B, S, CM, dtype=torch.float64, requires_grad=True)
    wanted = made(hidden, encoder_hidden_states=memory)
    ours = checkpoint(made, hidden, None, memory, use_reentrant=False)
    assert_same(gradients(made, ours, hidden, memory), gradients(made, wanted, hidden, memory), 1e-12)


def test_dropout_is_that_of_the_peer() -> None:
    attn = attention(dropout=0.5).train()
    apply_broadcast_attention(attn)
    out = attn(torch.randn(B * 5, T, C).double(), torch.randn(B, S, CM).double())
    assert 0.3 < (out == 0).double().mean() < 0.7


def test_nothing_of_a_condition_is_saved_per_sample() -> None:
    """What autograd keeps grows with K by the samples alone."""
    attn = attention(dtype=torch.float32, qk_norm="layer_norm", added_kv_proj_dim=None)
    apply_broadcast_attention(attn, impl=FAST)
    tokens, wide = 2, 400
    memory = torch.randn(B, wide, CM, requires_grad=True)
    for mask in (None, torch.rand(B, wide) < 0.9, torch.randn(B, 1, wide)):
        for k in (1, 16):
            sizes: dict[int, int] = {}

            def pack(x: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
                sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
                return x

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                out = attn(torch.randn(B * k, tokens, C), memory, mask)
            biggest = max(sizes.values())
            assert biggest <= 4 * B * max(wide * C, k * tokens * C), (k, biggest)
            del out


# -------------------------------------------------------------------- keys and values kept


def counted(module: nn.Module) -> list[int]:
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_denoising_steps_project_once() -> None:
    made = MODELS["UNet2DConditionModel"]().eval()
    report = apply_broadcast_attention(made, impl=FAST)
    attentions = [made.get_submodule(entry.name) for entry in report.replaced]
    calls = [counted(projection) for attn in attentions for projection in (attn.to_k, attn.to_v)]
    hidden, memory = torch.randn(B * 2, 4, 4, 4), torch.randn(B, S, CM)
    with torch.no_grad():
        wanted = [made(hidden, t, memory).sample for t in range(3)]
        assert [len(c) for c in calls] == [3] * len(calls)
        with cached_condition(made):
            for t in range(3):
                assert_same(made(hidden, t, memory).sample, wanted[t], 0.0)
        assert [len(c) for c in calls] == [4] * len(calls)
        assert all(attn.processor._kept is None for attn in attentions)
        made(hidden, 0, memory)
    assert [len(c) for c in calls] == [5] * len(calls)


def test_nothing_stale_is_served() -> None:
    attn = attention(qk_norm="layer_norm")
    apply_broadcast_attention(attn)
    hidden, memory = torch.randn(B * 2, T, C).double(), torch.randn(B, S, CM).double()
    calls = counted(attn.to_k)

    def same_as_fresh() -> None:
        ours = attn(hidden, memory)
        assert_same(ours, copy.deepcopy(attn)(hidden, memory), 0.0)

    with torch.no_grad(), cached_condition(attn):
        attn(hidden, memory)
        attn(hidden, memory[:].detach())  # a view of the same tokens
        assert len(calls) == 1
        changes: list[Callable[[], object]] = [
            lambda: memory.add_(1.0),
            lambda: memory[:, 0].zero_(),
            lambda: attn.to_k.weight.mul_(2.0),
            lambda: attn.to_v.load_state_dict({"weight": torch.randn(C, CM)}),
            lambda: attn.norm_k.bias.add_(1.0),
        ]
        for change in changes:
            change()
            before = len(calls)
            same_as_fresh()
            assert len(calls) == before + 2  # one of them the copy's
        memory = torch.randn(B, S, CM).double()
        same_as_fresh()
        memory = memory[:1]
        same_as_fresh()
        assert len(attn.processor._kept) == 1


class Scaled(nn.Module):
    """As a LoRA layer: a number beside the weights decides what it does."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.scaling = base, 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) * self.scaling


def test_layers_with_switches_are_projected_at_every_call() -> None:
    attn = attention()
    attn.to_k = Scaled(attn.to_k)
    apply_broadcast_attention(attn)
    hidden, memory = torch.randn(B * 2, T, C).double(), torch.randn(B, S, CM).double()
    with torch.no_grad(), cached_condition(attn):
        attn(hidden, memory)
        attn.to_k.scaling = 0.0
        assert_same(attn(hidden, memory), copy.deepcopy(attn)(hidden, memory), 0.0)
        assert not attn.processor._kept


def test_self_attention_is_not_kept() -> None:
    attn = attention(cross_attention_dim=C)
    apply_broadcast_attention(attn)
    with torch.no_grad(), cached_condition(attn):
        attn(torch.randn(B, T, C).double())
        assert not attn.processor._kept


def test_one_processor_for_many_modules() -> None:
    made = transformer().double().eval()
    apply_broadcast_attention(made)
    first, second = (b.attn2 for b in made.transformer_blocks)
    second.set_processor(first.processor)
    hidden, memory = torch.randn(B * 2, 32, 4, 4).double(), torch.randn(B, S, CM).double()
    with torch.no_grad():
        wanted = made(hidden, memory).sample
        with cached_condition(made):
            for _ in range(2):
                assert_same(made(hidden, memory).sample, wanted, 0.0)


def test_where_nothing_can_be_kept() -> None:
    attn = attention()
    with pytest.raises(
        InvalidArgument, match="Attention has no BroadcastAttnProcessor: apply_broadcast_attention first"
    ):
        cached_condition(attn).__enter__()
    apply_broadcast_attention(attn)
    hidden, memory = torch.randn(B, T, C).double(), torch.randn(B, S, CM).double()
    with cached_condition(attn):
        with pytest.raises(InvalidArgument, match=r"run under torch.no_grad\(\)"):
            attn(hidden, memory)
        with pytest.raises(InvalidArgument, match="a context is open for Attention already"), cached_condition(attn):
            pass
        with torch.inference_mode(), pytest.raises(InvalidArgument, match=r"made under torch.inference_mode\(\)"):
            attn(hidden, memory + 1)
        with torch.inference_mode():
            attn(hidden, memory)
    assert attn.processor._kept is None


# -------------------------------------------------------------------- conversion


def test_report_and_revert() -> None:
    made = transformer()
    before = {name: m.processor for name, m in made.named_modules() if hasattr(m, "processor")}
    report = apply_broadcast_attention(made, layout="kb", impl="reference")
    assert [entry.name for entry in report.replaced] == [f"transformer_blocks.{i}.attn2" for i in range(2)]
    assert [entry.name for entry in report.left] == [f"transformer_blocks.{i}.attn1" for i in range(2)]
    assert "transformer_blocks.0.attn2: AttnProcessor2_0 -> BroadcastAttnProcessor" in str(report)
    assert "attn1: Attention left as is, because it is self-attention" in str(report)
    assert repr(made.transformer_blocks[0].attn2.processor) == (
        "BroadcastAttnProcessor(layout='kb', impl='reference', like='AttnProcessor2_0')"
    )
    again = apply_broadcast_attention(made, layout="kb", impl="reference")
    assert not again.replaced and again.reverted and "it is replaced already" in str(again)
    with pytest.raises(
        InvalidArgument, match=r"attn2 has BroadcastAttnProcessor\(layout='kb'.*asked for layout = 'bk'"
    ):
        apply_broadcast_attention(made)
    report.revert()
    after = {name: m.processor for name, m in made.named_modules() if hasattr(m, "processor")}
    assert all(after[name] is before[name] for name in before)


def test_the_rest_of_a_model_that_was_converted_in_part() -> None:
    made = transformer()
    apply_broadcast_attention(made.transformer_blocks[0])
    report = apply_broadcast_attention(made)
    assert [entry.name for entry in report.replaced] == ["transformer_blocks.1.attn2"]


class Custom(nn.Module):
    def __call__(self, attn: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return hidden_states


class Subclass(Attention):
    pass


def old_version() -> nn.Module:
    made = attention()
    del made.is_cross_attention, made.spatial_norm
    return made


def fused() -> nn.Module:
    made = attention()
    made.fuse_projections()
    return made


def odd_norm() -> nn.Module:
    made = attention()
    made.norm_k = nn.LayerNorm(16)
    return made


def in_a_list(made: nn.Module) -> nn.Module:
    return nn.ModuleList([made])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Linear(2, 2), r"nothing in Linear could be replaced: it has no Attention of diffusers \(expected as in diffusers 0.42\)"),
        (lambda: attention(cross_attention_dim=None), "the model: Attention: it is self-attention"),
        (lambda: in_a_list(attention(processor=Custom())), "0: Attention: its processor is Custom, which is not one of diffusers' plain ones"),
        (lambda: attention(processor=attention_processor.JointAttnProcessor2_0()), "its processor is JointAttnProcessor2_0"),
        (lambda: attention(heads=4, dim_head=4), r"its head dimension is 16 / 4 = 4, not from 8 to 256"),
        (lambda: attention(heads=1, dim_head=264), r"264 / 1 = 264"),
        (lambda: attention(kv_heads=3), "its 4 query heads of 8 do not share keys of 24 channels evenly"),
        (lambda: Subclass(C, CM, 4, 4), "the model: Subclass: it is a subclass of diffusers' Attention"),
        (old_version, "its Attention has no attribute spatial_norm, is_cross_attention, which that of diffusers 0.42 has"),
        (fused, "its projections are fused"),
        (odd_norm, "its norm_k is over 16 channels, and a head has 8"),
        (lambda: attention(pre_only=True), "it has no output projection"),
        (lambda: attention(processor=attention_processor.AttnAddedKVProcessor()), "AttnAddedKVProcessor needs added_kv_proj_dim"),
        (lambda: attention(**ADDED, only_cross_attention=True), "it has no to_k and to_v"),
    ],
)  # fmt: skip
def test_what_is_left(make: Callable[[], nn.Module], reason: str) -> None:
    made = make()
    before = [getattr(module, "processor", None) for module in made.modules()]
    with pytest.raises(InvalidArgument, match=reason) as caught:
        apply_broadcast_attention(made)
    assert "\n" not in str(caught.value)
    assert all(a is b for a, b in zip(before, [getattr(m, "processor", None) for m in made.modules()], strict=True))


def test_attention_of_single_models_is_left() -> None:
    from diffusers.models.transformers.transformer_flux import FluxAttention

    both = nn.ModuleList([attention(), FluxAttention(query_dim=C, heads=4, dim_head=8)])
    report = apply_broadcast_attention(both)
    assert len(report.replaced) == 1
    assert "1: FluxAttention left as is, because it is not an instance of diffusers' Attention" in str(report)


def test_sliced_attention_is_replaced() -> None:
    attn = attention(scale_qk=False)
    attn.set_attention_slice(1)
    compare(attn, 5, "bk")
    assert apply_broadcast_attention(attn).replaced[0].before == "SlicedAttnProcessor"


def test_imports_without_diffusers() -> None:
    code = "import sys; sys.modules['diffusers'] = None; import minidiff_fast.integrations as i; i.BroadcastAttnProcessor()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


# -------------------------------------------------------------------- errors


def refused(message: str, hidden: Tensor, *args: Any, **kwargs: Any) -> None:
    attn = attention()
    attn.set_processor(BroadcastAttnProcessor())
    with pytest.raises(InvalidArgument, match=message):
        attn(hidden, *args, **kwargs)


def test_rows_that_do_not_divide() -> None:
    memory = torch.randn(B, S, CM).double()
    refused(r"N must be B \* K with K >= 1, got N = 7 rows for B = 3", torch.randn(7, T, C).double(), memory)
    refused(r"encoder_hidden_states must be \[B, S, C\], got \[6, 20\]", torch.randn(6, T, C).double(), memory[0])
    refused(
        r"hidden_states must be \[N, T, C\] or \[N, C, height, width\], got \[6, 32\]",
        torch.randn(6, C).double(),
        memory,
    )


def test_masks_that_cannot_be() -> None:
    hidden, memory = torch.randn(B * 2, T, C).double(), torch.randn(B, S, CM).double()
    refused("has a row per sample; the samples of a condition share", hidden, memory, torch.ones(B * 2, S).bool())
    refused(r"one row per condition, B = 3, got \[5, 1, 6\]", hidden, memory, torch.ones(5, 1, S).bool())
    refused(
        r"must be \[B, S\], \[B, 1, S\] or \[B, T, S\], got \[3, 1, 5\]", hidden, memory, torch.ones(B, S - 1).bool()
    )
    refused(
        r"or \[B, T, S\], got \[3, 2, 6\] \(B: 3, K: 2, T: 4, S: 6, heads: 4\)", hidden, memory, torch.ones(B, 2, S)
    )
    refused(r"or \[B, T, S\], got \[6\]", hidden, memory, torch.ones(S).bool())
    hidden = torch.randn(B * 4, T, C).double()  # K = heads
    refused("a row per sample, or one per head: K = heads", hidden, memory, torch.ones(B * 4, 1, S).bool())


def test_what_plain_attention_has_not() -> None:
    hidden, memory = torch.randn(B * 2, T, C).double(), torch.randn(B, S, CM).double()
    refused("cross_attention_kwargs: plain attention has no scale", hidden, memory, scale=0.5)
    refused("has no ip_adapter_masks", hidden, memory, ip_adapter_masks=[memory])
    refused("has no image_rotary_emb", hidden, memory, image_rotary_emb=memory)
    attn = attention()
    attn.set_processor(BroadcastAttnProcessor())
    attn(hidden, memory, scale=1.0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'gligen'"):
        attn.processor(attn, hidden, memory, gligen=1)


def test_arguments_of_the_processor() -> None:
    with pytest.raises(InvalidArgument, match="layout must be 'bk'"):
        BroadcastAttnProcessor(layout="BK")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="impl must be one of auto, reference.*got 'fast'"):
        apply_broadcast_attention(attention(), impl="fast")
    with pytest.raises(InvalidArgument, match="like must be None or one of AttnProcessor, .*got 'Flux'"):
        BroadcastAttnProcessor(like="Flux")


def test_without_a_conversion_the_processor_reads_the_module() -> None:
    assert BroadcastAttnProcessor()._arithmetic(attention(scale_qk=False)) == (False, True, True)
    module: Any = SimpleNamespace(added_kv_proj_dim=7)
    assert BroadcastAttnProcessor()._arithmetic(module) == (True, True, False)
    for options in ({"qk_norm": "layer_norm"}, {"scale_qk": False}):
        attn = attention(**options)
        like = BroadcastAttnProcessor(like=type(attn.processor).__name__)
        hidden, memory = torch.randn(B * 2, T, C).double(), torch.randn(B, S, CM).double()
        attn.set_processor(BroadcastAttnProcessor())
        out = attn(hidden, memory)
        attn.set_processor(like)
        assert_same(attn(hidden, memory), out, 1e-12)
