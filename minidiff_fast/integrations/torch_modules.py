"""Cross-attention of plain PyTorch models, in place: nn.MultiheadAttention that takes un-repeated memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minidiff_fast.backend import IMPLS
from minidiff_fast.errors import InvalidArgument
from minidiff_fast.integrations.report import ConversionReport, Left, Replaced
from minidiff_fast.nn import BroadcastCrossAttention, ConditionCache
from minidiff_fast.nn.condition_cache import LayerCache
from minidiff_fast.shapes import Layout, check_layout

Names = str | Iterable[str] | Callable[[str, nn.Module], bool]

SELF = "it is self-attention: every sample has keys of its own, and nothing is shared"
UNCLEAR = "it may be self- or cross-attention, and nothing tells which: name it in names=... if it is cross-attention"
UNNAMED = "names does not name it"
REFUSES = "its forward wants as many rows of src as of tgt: call .encoder(src) and then .decoder(tgt, memory)"
EXTRA = ("num_kv_heads", "impl", "rotary", "q_norm", "k_norm", "layout", "layer")
"""What an nn.MultiheadAttention has to have beside its own attributes."""


class TorchCrossAttention(BroadcastCrossAttention):
    """:class:`~minidiff_fast.nn.BroadcastCrossAttention`, called the way ``nn.MultiheadAttention`` is.

    What :func:`convert` makes of an ``nn.MultiheadAttention``. On top of its parent it takes

    * masks of floats with the values 0 and -inf, as ``nn.Transformer.generate_square_subsequent_mask`` makes them;
    * the :class:`~minidiff_fast.nn.ConditionCache` of :func:`encode_memory` in place of ``key`` and ``value``.

    Who does not ask for attention weights gets ``(out, None)``; asking with ``need_weights=True`` raises.
    """

    layer: int = 0
    """Which layer of the cache of :func:`encode_memory` it reads."""

    def forward(  # type: ignore[override]
        self,
        query: Tensor,  # [T, N, E], batch_first [N, T, E]
        key: Tensor | ConditionCache | None = None,  # [S, B, kdim], batch_first [B, S, kdim]
        value: Tensor | ConditionCache | None = None,  # [S, B, vdim], batch_first [B, S, vdim]
        key_padding_mask: Tensor | None = None,  # [B, S] bool, True = ignore; or 0 and -inf
        need_weights: bool = False,
        attn_mask: Tensor | None = None,  # [T, S] bool, True = not allowed; or 0 and -inf
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        cache: LayerCache | tuple[Tensor, Tensor] | None = None,  # [B, S, Hkv, D] each
        lengths: Tensor | None = None,  # [B] integer
        query_positions: Tensor | None = None,  # the leading axes of query, and 3
        key_positions: Tensor | None = None,  # the leading axes of key, and 3
    ) -> tuple[Tensor, None]:
        """Attend; the result has the shape of ``query``. See :class:`~minidiff_fast.nn.BroadcastCrossAttention`.

        Raises:
            InvalidArgument: ``need_weights=True``; N is no multiple of B; a mask per head; a mask with values other
                than 0 and -inf, or one that is learned. Where looking at the values would wait for the device (a GPU,
                ``torch.compile``), the check is ``torch._assert_async``, and its failure a RuntimeError.
        """
        if isinstance(key, ConditionCache) or isinstance(value, ConditionCache):
            cache, key, value = self._cached(key, value, cache), None, None
        return super().forward(
            query, key, value, _boolean("key_padding_mask", key_padding_mask), need_weights,
            _boolean("attn_mask", attn_mask), average_attn_weights, is_causal, cache=cache, lengths=lengths,
            query_positions=query_positions, key_positions=key_positions,
        )  # fmt: skip

    def _cached(self, key: Any, value: Any, cache: Any) -> LayerCache:
        name = type(self).__name__
        if cache is not None or not isinstance(key, ConditionCache) or (value is not None and value is not key):
            raise InvalidArgument(f"{name}: a ConditionCache takes the place of both key and value, and of cache")
        if self.layer >= len(key):
            raise InvalidArgument(
                f"{name}: this is layer {self.layer} of the converted model, and the cache has {len(key)} layers"
            )
        return key[self.layer]


def convert(
    module: nn.Module,
    *,
    names: Names | None = None,
    layout: Layout = "bk",
    impl: str | None = None,
) -> ConversionReport:
    """Let the cross-attention of a plain PyTorch model take memory that is not repeated.

    Every ``nn.MultiheadAttention`` that is cross-attention gets another class, in place:
    :class:`TorchCrossAttention`. It is the same object as before with the same parameters, buffers, hooks and mode, so
    optimizers, averaged weights, tied weights and ``state_dict`` know nothing of it. From then on memory has B rows
    where queries have N = B * K; with as many rows of both, K is 1 and the result what it was.

    Cross-attention is, unless ``names`` says more: ``multihead_attn`` of ``nn.TransformerDecoderLayer`` and its
    subclasses; an attention whose ``kdim`` is not ``embed_dim`` (it cannot attend to its own queries); ``module``
    where it is an attention itself. ``self_attn`` of torch's encoder and decoder layers is never replaced.

    Args:
        module: the model; it may be inside ``DistributedDataParallel``.
        names: which attentions to replace instead: a pattern or patterns of dotted names, as in ``fnmatch``
            (``"*.cross_attn"``), or a function of name and module. Every pattern must match an attention.
        layout: "bk" (row b * K + k, as ``repeat_interleave`` makes them) or "kb" (row k * B + b) of the queries.
        impl: implementation of ``broadcast_attention``; None chooses by device.

    Returns:
        What was replaced, what was left and why; its ``revert()`` puts the classes back, weights as they are then.

    Raises:
        InvalidArgument: there is nothing to replace; a pattern matches nothing; an argument is not one of the above.
            The model is as it was.

    >>> layer = nn.TransformerDecoderLayer(64, 4, batch_first=True)
    >>> decoder = nn.TransformerDecoder(layer, num_layers=2)
    >>> report = convert(decoder)
    >>> scene, samples = torch.randn(2, 100, 64), torch.randn(2 * 16, 8, 64)    # B = 2, K = 16
    >>> decoder(samples, scene).shape
    torch.Size([32, 8, 64])
    """
    if not isinstance(module, nn.Module):
        raise InvalidArgument(f"convert: module must be an nn.Module, got {type(module).__name__}")
    check_layout("convert", layout)
    if impl is not None and impl not in IMPLS:
        raise InvalidArgument(f"convert: impl must be None or one of {', '.join(IMPLS)}, got {impl!r}")
    found = _attentions(module)
    named = None if names is None else _named(found, names)
    chosen, left = [], _other(module)
    for attention, known_as in found.items():
        reason = _unchosen(module, attention, named) or _unfit(attention)
        if reason is None:
            chosen.append(attention)
        else:
            left.append(Left(known_as[0], type(attention).__name__, reason))
    if not chosen:
        raise InvalidArgument(f"convert: nothing to replace in {type(module).__name__}: {_why(left)}")
    for index, attention in enumerate(chosen):
        _swap(attention, layout, impl, index)
    after = TorchCrossAttention.__name__
    replaced = [Replaced(found[attention][0], nn.MultiheadAttention.__name__, after) for attention in chosen]
    return ConversionReport(replaced, left, undo=partial(_undo, chosen))


def encode_memory(
    module: nn.Module,
    memory: Tensor,  # [S, B, C], batch_first [B, S, C]
) -> ConditionCache:
    """Keys and values of ``memory`` in every layer of a converted model, projected once for all denoising steps.

    The result is handed over in place of the memory, ``decoder(samples, encode_memory(decoder, scene))``; masks are
    given as before. It is differentiable and a pytree, so that it may be what ``policy.encode`` returns. For models
    that hand the memory on to their attention as it is, as ``nn.TransformerDecoder`` does.

    Raises:
        InvalidArgument: ``module`` is not what was converted, or a whole model that contains it; ``memory`` has another
            width than the layers read.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, TorchCrossAttention)]
    indices = [layer.layer for layer in layers]
    if not layers or indices != list(range(len(layers))):
        raise InvalidArgument(
            f"encode_memory: module must be the one that convert was called with, with layers 0 .. n - 1; "
            f"{type(module).__name__} has {f'layers {indices}' if layers else 'none'}"
        )
    if len({layer.batch_first for layer in layers}) > 1:
        raise InvalidArgument("encode_memory: some of the layers are batch_first and some are not: convert them apart")
    if memory.dim() != 3:
        letters = "[B, S, C]" if layers[0].batch_first else "[S, B, C]"
        raise InvalidArgument(f"encode_memory: memory must be {letters}, got {list(memory.shape)}")
    return ConditionCache.build(layers, memory if layers[0].batch_first else memory.transpose(0, 1))


# -------------------------------------------------------------------- masks


def _boolean(argument: str, mask: Tensor | None) -> Tensor | None:
    """A mask of 0 and -inf -> True where it hides; any other is handed on as it came."""
    if mask is None or not mask.is_floating_point():
        return mask
    wanted = f"{TorchCrossAttention.__name__}: {argument} must be boolean (True = hidden) or hold 0 and -inf only"
    if mask.requires_grad:
        raise InvalidArgument(f"{wanted}, got one that requires grad: a learned bias")
    hidden = mask == -math.inf
    fits = (hidden | (mask == 0)).all()
    if torch.compiler.is_compiling() or not mask.is_cpu:
        torch._assert_async(fits, f"{wanted}, got other values")
    elif not fits:
        strange = mask[~hidden & (mask != 0)]
        raise InvalidArgument(f"{wanted}, got {strange.numel()} other values, the first {strange[0]:g}")
    return hidden


# -------------------------------------------------------------------- what to replace


def _attentions(module: nn.Module) -> dict[nn.MultiheadAttention, list[str]]:
    """Every attention once, in the order of the model, with all its names."""
    found: dict[nn.MultiheadAttention, list[str]] = {}
    for name, child in module.named_modules(remove_duplicate=False):
        if isinstance(child, nn.MultiheadAttention):
            found.setdefault(child, []).append(name)
    return found


def _named(found: dict[nn.MultiheadAttention, list[str]], names: Names) -> set[nn.MultiheadAttention]:
    """The attentions that the user names."""
    if callable(names):
        return {attention for attention, known_as in found.items() if any(names(name, attention) for name in known_as)}
    patterns = (names,) if isinstance(names, str) else tuple(names)
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise InvalidArgument(f"convert: names must be patterns of dotted names or a function, got {names!r}")
    named: set[nn.MultiheadAttention] = set()
    for pattern in patterns:
        matched = {a for a, known_as in found.items() if any(fnmatchcase(name, pattern) for name in known_as)}
        if not matched:
            there = ", ".join(known_as[0] or "(the model)" for known_as in found.values()) or "none"
            raise InvalidArgument(f"convert: names: {pattern!r} matches no nn.MultiheadAttention; there are: {there}")
        named |= matched
    return named


def _unchosen(
    module: nn.Module, attention: nn.MultiheadAttention, named: set[nn.MultiheadAttention] | None
) -> str | None:
    """Why it is not to be replaced, by its place or by the user's choice."""
    decoders = [m for m in module.modules() if isinstance(m, nn.TransformerDecoderLayer)]
    encoders = [m for m in module.modules() if isinstance(m, nn.TransformerEncoderLayer)]
    crosses = any(layer.multihead_attn is attention for layer in decoders)
    if not crosses and any(layer.self_attn is attention for layer in (*decoders, *encoders)):
        return SELF
    if named is not None:
        return None if attention in named else UNNAMED
    known = crosses or attention is module or attention.kdim != attention.embed_dim
    return None if known else UNCLEAR


def _unfit(attention: nn.MultiheadAttention) -> str | None:
    """Why it cannot be replaced."""
    kind = type(attention).__name__
    if isinstance(attention, BroadcastCrossAttention):
        return "it takes memory that is not repeated already"
    if type(attention) is not nn.MultiheadAttention:
        return (
            f"{kind} derives from nn.MultiheadAttention and may compute something else (parametrize and shard its "
            "weights after the conversion)"
        )
    if "forward" in vars(attention):
        return "its forward has been patched"
    if type(attention.out_proj).forward is not nn.Linear.forward:
        return f"its out_proj is a {type(attention.out_proj).__name__}, and nn.MultiheadAttention reads the weight only"
    if not 8 <= attention.head_dim <= 256:
        return f"its head dimension is {attention.head_dim}, and only 8 to 256 are implemented"
    if not 0.0 <= attention.dropout < 1.0:
        return f"its dropout is {attention.dropout}, and only [0, 1) is implemented"
    taken = [name for name in EXTRA if hasattr(attention, name)]
    return f"it has an attribute {taken[0]!r} already" if taken else None


def _other(module: nn.Module) -> list[Left]:
    """What has cross-attention and is no attention itself."""
    left = []
    for name, child in module.named_modules():
        kind = type(child).__name__
        if isinstance(child, nn.Transformer):
            left.append(Left(name, kind, REFUSES))
        if isinstance(child, nn.TransformerDecoderLayer):
            attention = child.multihead_attn
            if not isinstance(attention, nn.MultiheadAttention):
                reason = f"its multihead_attn is a {type(attention).__name__} and no nn.MultiheadAttention"
                left.append(Left(name, kind, reason))
    return left


def _why(left: list[Left]) -> str:
    """One line: reasons, each with the first of its modules."""
    if not left:
        return "it has no nn.MultiheadAttention"
    names: dict[str, list[str]] = {}
    for name, kind, reason in left:
        names.setdefault(reason, []).append(f"{name or '(the model)'} ({kind})")
    return "; ".join(
        f"{', '.join(some[:2])}{f' and {len(some) - 2} more' if len(some) > 2 else ''}: {reason}"
        for reason, some in names.items()
    )


# -------------------------------------------------------------------- there and back


def _swap(attention: nn.MultiheadAttention, layout: Layout, impl: str | None, index: int) -> None:
    """The class alone changes: whoever holds the module or its parameters goes on holding them."""
    values = (attention.num_heads, impl, None, None, None, layout, index)
    for name, value in zip(EXTRA, values, strict=True):
        setattr(attention, name, value)
    attention.__class__ = TorchCrossAttention


def _undo(attentions: list[nn.MultiheadAttention]) -> None:
    for attention in attentions:
        if type(attention) is not TorchCrossAttention:
            raise InvalidArgument(
                f"ConversionReport.revert: a {TorchCrossAttention.__name__} has become a {type(attention).__name__} "
                "since (parametrized or sharded?); nothing was reverted"
            )
    for attention in attentions:
        for name in EXTRA:
            delattr(attention, name)
        attention.__class__ = nn.MultiheadAttention
