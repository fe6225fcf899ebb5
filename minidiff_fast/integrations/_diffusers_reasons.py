"""Which of diffusers' attention modules can take memory of B rows, and why not the others."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

from torch import nn

from minidiff_fast.integrations._diffusers_attention import norm_width
from minidiff_fast.integrations.report import Left

PEER = "diffusers 0.42"
"""Whose ``Attention`` this was written and tested against."""


class Arithmetic(NamedTuple):
    """In what diffusers' processors differ from each other."""

    added: bool
    """Keys and values of the memory come from ``add_k_proj`` and ``add_v_proj``, beside the samples' own."""
    own_scale: bool
    """The logits are scaled by ``attn.scale``; else by 1 / sqrt(D) whatever that says."""
    qk_norm: bool
    """``norm_q`` and ``norm_k`` are applied."""


LIKE = {
    "AttnProcessor": Arithmetic(added=False, own_scale=True, qk_norm=False),
    "AttnProcessor2_0": Arithmetic(added=False, own_scale=False, qk_norm=True),
    "SlicedAttnProcessor": Arithmetic(added=False, own_scale=True, qk_norm=False),
    "AttnAddedKVProcessor": Arithmetic(added=True, own_scale=True, qk_norm=False),
    "AttnAddedKVProcessor2_0": Arithmetic(added=True, own_scale=False, qk_norm=False),
}


_NEEDED = (
    "to_q", "to_k", "to_v", "to_out", "heads", "inner_dim", "inner_kv_dim", "scale", "norm_q", "norm_k", "norm_cross",
    "group_norm", "spatial_norm", "residual_connection", "rescale_output_factor", "is_cross_attention", "add_k_proj",
    "add_v_proj", "added_kv_proj_dim", "only_cross_attention", "norm_encoder_hidden_states", "set_processor",
)  # fmt: skip
_PER_SAMPLE = ("TransformerSpatioTemporalModel",)
"""Models that view the memory of B conditions as rows of B * K samples, tokens shared out among them."""


def why_not(module: nn.Module, processor: Any) -> str | None:
    """Why an attention module keeps its processor; None if there is no reason."""
    attn: Any = module
    kind = type(module)
    if kind.__name__ != "Attention" or not kind.__module__.startswith("diffusers.models.attention"):
        inherits = any(base.__name__ == "Attention" for base in kind.__mro__)
        return (
            f"it is {'a subclass' if inherits else 'not an instance'} of diffusers' Attention, its forward is its own"
        )
    missing = [name for name in _NEEDED if not hasattr(attn, name)]
    if missing:
        return f"its Attention has no attribute {', '.join(missing)}, which that of {PEER} has"
    origin = type(processor)
    if origin.__name__ not in LIKE or not origin.__module__.startswith("diffusers."):
        return f"its processor is {origin.__name__}, which is not one of diffusers' plain ones ({', '.join(LIKE)})"
    arithmetic = LIKE[origin.__name__]
    if not attn.is_cross_attention and not arithmetic.added:
        return "it is self-attention (built without cross_attention_dim): nothing is shared"
    if arithmetic.added and attn.added_kv_proj_dim is None:
        return f"{origin.__name__} needs added_kv_proj_dim, and it has none"
    if not arithmetic.added and attn.only_cross_attention:
        return f"it has no to_k and to_v (only_cross_attention), which {origin.__name__} needs"
    if getattr(attn, "fused_projections", False):
        return "its projections are fused (unfuse_qkv_projections gives them back)"
    if attn.to_out is None:
        return "it has no output projection (pre_only)"
    return _why_not_heads(attn, arithmetic)


def _why_not_heads(attn: Any, arithmetic: Arithmetic) -> str | None:
    width, rest = divmod(attn.inner_dim, attn.heads)
    if rest or not 8 <= width <= 256:
        have = attn.inner_dim / attn.heads
        return f"its head dimension is {attn.inner_dim} / {attn.heads} = {have:g}, not from 8 to 256"
    kv_heads, rest = divmod(attn.inner_kv_dim, width)
    if rest or kv_heads < 1 or attn.heads % kv_heads:
        return f"its {attn.heads} query heads of {width} do not share keys of {attn.inner_kv_dim} channels evenly"
    for name, all_heads in (("norm_q", attn.heads), ("norm_k", kv_heads)):
        norm = getattr(attn, name) if arithmetic.qk_norm else None
        fits = norm is None or norm_width(norm) in (None, width, width * all_heads)
        if not fits:
            return f"its {name} is over {norm_width(cast(nn.Module, norm))} channels, and a head has {width}"
    return None


def reshaped_around(model: nn.Module, name: str) -> str | None:
    """Which module around ``name`` turns memory of B rows into rows of the samples before it gets there."""
    parts = name.split(".")
    for depth in range(len(parts)):
        around = model.get_submodule(".".join(parts[:depth]))
        if getattr(around, "caption_projection", None) is not None or type(around).__name__ in _PER_SAMPLE:
            return f"{type(around).__name__} around it reshapes the memory to the rows of the samples"
    return None


def summary(left: list[Left]) -> str:
    """Every reason once, with the first name and how many more."""
    if not left:
        return f"it has no Attention of diffusers (expected as in {PEER})"
    reasons: dict[str, list[str]] = {}
    for name, kind, reason in left:
        reasons.setdefault(f"{kind}: {reason}", []).append(name or "the model")
    return "; ".join(
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {reason}"
        for reason, names in reasons.items()
    )
