"""ConditionCache: the keys and values of every attention layer, projected once per condition."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.shapes import check_same, check_shape, describe

NAME = "ConditionCache"


class LayerCache(NamedTuple):
    """What one attention layer reads of the conditions; ``LayerCache(k, v)`` where every token counts."""

    k: Tensor
    """[B, S, Hkv, D], or packed [N, Hkv, D]; normalised and rotated already."""
    v: Tensor
    """The shape of k."""
    lengths: Tensor | None = None
    """[B] integers: condition b has the tokens 0 .. lengths[b] - 1."""
    cu_seqlens: Tensor | None = None
    """[B + 1] int32, of packed tokens: condition b has the tokens cu_seqlens[b] .. cu_seqlens[b + 1] - 1."""
    mask: Tensor | None = None
    """[B, S] boolean: True where the token may be seen."""

    @property
    def batch(self) -> int:
        """B."""
        return self.k.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1


class ProjectsCondition(Protocol):
    """An attention layer that can be run ahead over the condition's tokens."""

    def project_condition(
        self,
        memory: Tensor,  # [B, S, C] or [N, C]
        positions: Tensor | None = None,  # [B, S, 3] or [N, 3]
    ) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, S, Hkv, D]`` or ``[N, Hkv, D]``, as the layer's attention reads them."""


@dataclass(frozen=True, eq=False)
class ConditionCache:
    """What a policy keeps of B conditions: per layer the projected, normalised, rotated keys and values.

    ``policy.encode`` builds it once; every sample and every denoising step reads it. It is a pytree, so that
    :func:`~minidiff_fast.level2.level2_step` gathers the gradient of its tensors over the chunks of K and runs the
    encoder's backward once. It may stand in a tuple or dict beside other tensors ``[B, ...]``; layers that read
    different tokens (the resolutions of a point cloud) take one cache each, in a tuple.

    Conditions of different sizes are padded to S with ``lengths`` or a ``mask``, or packed with ``cu_seqlens``.

    Raises :class:`InvalidArgument` for shapes, dtypes and devices that do not fit together.

    >>> k = torch.zeros(2, 7, 4, 16)
    >>> cache = ConditionCache((k, k), (k, k), lengths=torch.tensor([7, 3]))
    >>> cache.batch, len(cache), cache[1].k.shape, cache.nbytes
    (2, 2, torch.Size([2, 7, 4, 16]), 14352)
    """

    keys: tuple[Tensor, ...]
    """Per layer [B, S, Hkv, D], or packed [N, Hkv, D]."""
    values: tuple[Tensor, ...]
    """Per layer, the shape of its keys."""
    tokens: tuple[Tensor, ...] = ()
    """[B, ...] each: what the model needs of the condition and no layer could project ahead."""
    lengths: Tensor | None = None
    """[B] int32 or int64: condition b has the tokens 0 .. lengths[b] - 1."""
    cu_seqlens: Tensor | None = None
    """[B + 1] int32: condition b has the packed tokens cu_seqlens[b] .. cu_seqlens[b + 1] - 1."""
    mask: Tensor | None = None
    """[B, S] boolean: True where the token may be seen."""

    def __post_init__(self) -> None:
        for name in _TUPLES:
            object.__setattr__(self, name, tuple(getattr(self, name)))
        _check(self)

    @classmethod
    def build(
        cls,
        layers: Iterable[ProjectsCondition],
        memory: Tensor,  # [B, S, C], or packed [N, C]
        *,
        lengths: Tensor | None = None,  # [B] integer
        cu_seqlens: Tensor | None = None,  # [B + 1] int32
        mask: Tensor | None = None,  # [B, S] bool, True = may be seen
        positions: Tensor | None = None,  # [B, S, 3], packed [N, 3]; without the 3 for token indices
    ) -> ConditionCache:
        """``layer.project_condition(memory, positions)`` of every layer; differentiable.

        ``memory`` has the conditions first whatever ``batch_first`` of the layers is.
        """
        wanted = "[B, S, C]" if cu_seqlens is None else "[N, C] with cu_seqlens"
        if memory.dim() != (3 if cu_seqlens is None else 2):
            raise InvalidArgument(f"{NAME}.build: memory must be {wanted}, got {list(memory.shape)}")
        return cls.of(
            [layer.project_condition(memory, positions) for layer in layers],
            lengths=lengths,
            cu_seqlens=cu_seqlens,
            mask=mask,
        )

    @classmethod
    def of(
        cls,
        pairs: Sequence[tuple[Tensor, Tensor]],  # per layer k, v
        *,
        lengths: Tensor | None = None,  # [B] integer
        cu_seqlens: Tensor | None = None,  # [B + 1] int32
        mask: Tensor | None = None,  # [B, S] bool
    ) -> ConditionCache:
        """From (k, v) of every layer."""
        keys, values = tuple(k for k, _ in pairs), tuple(v for _, v in pairs)
        return cls(keys, values, lengths=lengths, cu_seqlens=cu_seqlens, mask=mask)

    # ---------------------------------------------------------------- layers

    def __len__(self) -> int:
        """The number of layers."""
        return len(self.keys)

    def __getitem__(self, layer: int) -> LayerCache:
        if not -len(self) <= layer < len(self):
            raise IndexError(f"{NAME}: layer must be in [0, {len(self)}), got {layer}")
        return LayerCache(self.keys[layer], self.values[layer], self.lengths, self.cu_seqlens, self.mask)

    def __iter__(self) -> Iterator[LayerCache]:
        return (self[layer] for layer in range(len(self)))

    # ---------------------------------------------------------------- sizes

    @property
    def empty(self) -> bool:
        """True where there is neither a layer nor a token tensor, hence no B either."""
        return len(self.keys) + len(self.tokens) == 0

    @property
    def packed(self) -> bool:
        """True where the tokens of all conditions lie one after the other."""
        return self.cu_seqlens is not None

    @property
    def batch(self) -> int:
        """B, the number of conditions."""
        if self.cu_seqlens is not None:
            return self.cu_seqlens.shape[0] - 1
        if self.empty:
            raise InvalidArgument(f"{NAME}: an empty cache has no number of conditions")
        return (*self.keys, *self.tokens)[0].shape[0]

    @property
    def device(self) -> torch.device:
        """The device of every tensor."""
        if self.empty:
            raise InvalidArgument(f"{NAME}: an empty cache has no device")
        return (*self.keys, *self.tokens)[0].device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(x.numel() * x.element_size() for x in pytree.tree_leaves(self) if isinstance(x, Tensor))

    def __repr__(self) -> str:
        shapes = ", ".join(str(list(k.shape)) for k in self.keys)
        told = [name for name in ("lengths", "cu_seqlens", "mask") if getattr(self, name) is not None]
        return f"{NAME}(keys: {shapes or 'none'}, tokens: {len(self.tokens)}, with: {', '.join(told) or 'nothing'})"

    # ---------------------------------------------------------------- copies

    def detach(self) -> ConditionCache:
        """The same tensors without history."""
        return self._mapped(Tensor.detach)

    def to(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = False,
    ) -> ConditionCache:
        """On another device, or keys, values and tokens in another floating dtype (the rest keeps its dtype)."""
        if dtype is not None and not dtype.is_floating_point:
            raise InvalidArgument(f"{NAME}.to: dtype must be a floating-point dtype, got {dtype}")

        def move(x: Tensor) -> Tensor:
            return x.to(device=device, dtype=dtype if x.is_floating_point() else None, non_blocking=non_blocking)

        return self._mapped(move)

    def select(
        self,
        conditions: slice | Tensor,  # a slice, or [B'] integer indices
        *,
        total: int | None = None,
    ) -> ConditionCache:
        """The cache of some conditions, in the order given; a slice of a padded cache is a view.

        ``total`` is the number of tokens of a packed selection: without it the host waits for the device.
        """
        if isinstance(conditions, slice):
            if not self.packed:
                return self._mapped(lambda x: x[conditions])
            conditions = torch.arange(self.batch, device=self.device)[conditions]
        if conditions.dim() != 1 or conditions.dtype not in (torch.int32, torch.int64):
            raise InvalidArgument(
                f"{NAME}.select: conditions must be a slice or integer indices [B'], "
                f"got {conditions.dtype} {list(conditions.shape)}"
            )
        index = conditions
        if self.cu_seqlens is None:
            return self._mapped(lambda x: x.index_select(0, index))
        sizes = self.cu_seqlens.diff().index_select(0, index)
        offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0, dtype=sizes.dtype)])
        shift = self.cu_seqlens.index_select(0, index) - offsets[:-1]
        rows = torch.repeat_interleave(shift, sizes, output_size=total)
        rows = rows + torch.arange(rows.shape[0], dtype=rows.dtype, device=rows.device)
        keys, values = (tuple(x.index_select(0, rows) for x in layers) for layers in (self.keys, self.values))
        return ConditionCache(keys, values, tuple(x.index_select(0, index) for x in self.tokens), cu_seqlens=offsets)

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> ConditionCache:
        mapped: ConditionCache = pytree.tree_map(function, self)
        return mapped


def held_conditions(cache: Any) -> list[tuple[str, int | None]]:
    """Every cache and every other tensor in what ``policy.encode`` returned: its description and its B.

    None is the B of a tensor without axes; packed tokens count as the cache they belong to.
    """
    held: list[tuple[str, int | None]] = []
    for node in pytree.tree_leaves(cache, is_leaf=lambda node: isinstance(node, ConditionCache)):
        if isinstance(node, ConditionCache):
            if not node.empty:
                held.append((f"a {NAME} of {node.batch} conditions", node.batch))
        elif isinstance(node, Tensor):
            held.append((f"a tensor of shape {list(node.shape)}", node.shape[0] if node.dim() else None))
    return held


# -------------------------------------------------------------------- checks


def _check(cache: ConditionCache) -> None:
    tensors = [*cache.keys, *cache.values, *cache.tokens]
    if len(cache.keys) != len(cache.values):
        raise InvalidArgument(
            f"{NAME}: keys and values must have one tensor a layer, got {len(cache.keys)} and {len(cache.values)}"
        )
    for name in ("lengths", "cu_seqlens", "mask"):
        if getattr(cache, name) is not None and len(cache.keys) == 0:
            raise InvalidArgument(f"{NAME}: {name} is about keys, and there are none")
    if cache.cu_seqlens is not None:
        _check_packed(cache)
    elif not cache.empty:
        _check_padded(cache)
    for layer, (k, v) in enumerate(zip(cache.keys, cache.values, strict=True)):
        check_same(NAME, f"keys[{layer}]", k, **{f"values[{layer}]": v})
    for x in (*tensors, cache.lengths, cache.cu_seqlens, cache.mask):
        if x is not None and x.device != tensors[0].device:
            raise InvalidArgument(f"{NAME}: every tensor must be on one device, {tensors[0].device}, got {x.device}")


def _check_packed(cache: ConditionCache) -> None:
    offsets = cache.cu_seqlens
    assert offsets is not None
    if cache.lengths is not None or cache.mask is not None:
        raise InvalidArgument(f"{NAME}: packed tokens (cu_seqlens) take neither lengths nor a mask")
    if offsets.dim() != 1 or offsets.shape[0] < 1 or offsets.dtype != torch.int32:
        raise InvalidArgument(f"{NAME}: cu_seqlens must be [B + 1] int32, got {list(offsets.shape)} of {offsets.dtype}")
    _check_layers(cache, ["N", "Hkv", "D"], "[N, Hkv, D]", shared=1)
    _check_tokens(cache, offsets.shape[0] - 1)


def _check_padded(cache: ConditionCache) -> None:
    _check_layers(cache, ["B", "S", "Hkv", "D"], "[B, S, Hkv, D]", shared=2)
    batch = cache.batch
    _check_tokens(cache, batch)
    context = partial(describe, **{f"keys[{layer}]": k for layer, k in enumerate(cache.keys[:1])})
    if cache.lengths is not None:
        check_shape(NAME, "lengths", cache.lengths, [batch], "[B]", context)
        if cache.lengths.dtype not in (torch.int32, torch.int64):
            raise InvalidArgument(f"{NAME}: lengths must be int32 or int64, got {cache.lengths.dtype}")
    if cache.mask is not None:
        check_shape(NAME, "mask", cache.mask, [batch, cache.keys[0].shape[1]], "[B, S]", context)
        if cache.mask.dtype != torch.bool:
            raise InvalidArgument(f"{NAME}: mask must be boolean (True = may be seen), got {cache.mask.dtype}")


def _check_layers(cache: ConditionCache, expected: list[int | str], letters: str, shared: int) -> None:
    """The first ``shared`` axes (conditions and tokens) are those of the first layer in every layer."""
    for layer, (k, v) in enumerate(zip(cache.keys, cache.values, strict=True)):
        context = partial(describe, **{"keys[0]": cache.keys[0], f"values[{layer}]": v})
        check_shape(NAME, f"keys[{layer}]", k, expected, letters, context)
        expected = [*k.shape[:shared], *expected[shared:]]
        check_shape(NAME, f"values[{layer}]", v, list(k.shape), letters, context)


def _check_tokens(cache: ConditionCache, batch: int) -> None:
    for i, x in enumerate(cache.tokens):
        if x.dim() < 1 or x.shape[0] != batch:
            raise InvalidArgument(f"{NAME}: tokens[{i}] must be [B, ...] = [{batch}, ...], got {list(x.shape)}")


# -------------------------------------------------------------------- pytree

_TUPLES = ("keys", "values", "tokens")
_OPTIONAL = ("lengths", "cu_seqlens", "mask")


def _flatten(cache: ConditionCache) -> tuple[list[Any], str]:
    """What is None is no child, so that every leaf is a tensor. The names are one string, which JSON gives back as it
    was: saved exports compare it."""
    names = (*_TUPLES, *(name for name in _OPTIONAL if getattr(cache, name) is not None))
    return [getattr(cache, name) for name in names], " ".join(names)


def _flatten_with_keys(cache: ConditionCache) -> tuple[list[tuple[Any, Any]], str]:
    children, names = _flatten(cache)
    return [(pytree.GetAttrKey(name), child) for name, child in zip(names.split(), children, strict=True)], names


def _unflatten(children: Iterable[Any], names: str) -> ConditionCache:
    """Without checks: transformations put other things than tensors, and tensors of other shapes, into a tree."""
    cache: ConditionCache = object.__new__(ConditionCache)
    for name in _OPTIONAL:
        object.__setattr__(cache, name, None)
    for name, child in zip(names.split(), children, strict=True):
        object.__setattr__(cache, name, child)
    return cache


pytree.register_pytree_node(
    ConditionCache,
    _flatten,
    _unflatten,
    serialized_type_name="minidiff_fast.nn.ConditionCache",
    flatten_with_keys_fn=_flatten_with_keys,
)
pytree._register_namedtuple(LayerCache, serialized_type_name="minidiff_fast.nn.LayerCache")
torch.serialization.add_safe_globals([ConditionCache, LayerCache])  # saved exports hold one as their example
