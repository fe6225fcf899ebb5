"""Layers whose parameters their owner reads itself, past the layer's forward."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from minidiff_fast.errors import InvalidArgument

Layer = TypeVar("Layer", bound=nn.Module)


def bare(layer: nn.Module) -> nn.Module:
    """What torch's activation checkpointing wraps, which computes the same."""
    inner: nn.Module = getattr(layer, "_checkpoint_wrapped_module", layer)
    return inner


def plain(layer: nn.Module, kind: type[Layer], owner: str) -> Layer:
    """``layer``, if all that it does is what torch's ``kind`` does with its parameters; parametrised weights count.

    Raises:
        InvalidArgument: another layer stands in its place, e.g. one with LoRA, which would go unheard.
    """
    layer = bare(layer)
    if isinstance(layer, kind) and layer._forward_pre_hooks:
        raise InvalidArgument(
            f"{owner}: reads the parameters of its {kind.__name__} itself, and the forward pre-hook of one (the old "
            "weight_norm and spectral_norm are such hooks) would not run: use torch.nn.utils.parametrizations"
        )
    if not isinstance(layer, kind) or type(layer).forward is not kind.forward or "forward" in layer.__dict__:
        raise InvalidArgument(
            f"{owner}: reads the parameters of its {kind.__name__} itself, and a {type(layer).__module__}."
            f"{type(layer).__name__} in its place would go unheard: merge it into the weights first (LoRA: "
            "merge_and_unload), or adapt other layers"
        )
    return layer
