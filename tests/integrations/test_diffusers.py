"""diffusers' real Attention with one memory per condition, against itself on repeated memory."""

from __future__ import annotations

import copy
import io
import pickle
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
    like: str | None = None,
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
    like = type(own).__name__ if like is None else like
    attn.set_processor(BroadcastAttnProcessor(layout=layout, like=like, impl=FAST if dtype == torch.float32 else None))
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
    for options in ({"qk_norm": "layer_norm"}, {"scale_qk": False}, {"cross_attention_norm": "layer_norm"}):
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
