"""The glossary of minidiff_fast, the two row layouts, and the checks every public function shares.

Every tensor belongs to one of two kinds: *per condition* ``[B, ...]`` or *per sample* ``[B, K, ...]``.

======  =====================================================================================
letter  meaning
======  =====================================================================================
B       conditions in the Level-1 batch
K       samples per condition, the Level-2 batch
N       flattened rows, N = B * K
T, A    action tokens per sample; action dimension
To      observation steps
S       condition tokens (may differ per condition: ``lengths [B]``)
P       a sample's own ("private") key/value tokens: its timestep token, its action tokens
H, Hkv  query heads; key/value heads (Hkv divides H)
D       head dimension
C       channels
======  =====================================================================================

Modules whose peers see flattened rows take ``[N, ...]`` and a ``layout``: ``"bk"`` is row ``b * K + k``
(what ``repeat_interleave(K, 0)`` makes), ``"kb"`` is row ``k * B + b`` (what ``repeat(K, 1, ...)`` makes).
Both are in use, and mixing them silently pairs samples with the conditions of other scenes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from minidiff_fast.errors import InvalidArgument

Layout = Literal["bk", "kb"]


def check_layout(name: str, layout: str) -> None:
    """Raise :class:`InvalidArgument` unless ``layout`` is ``"bk"`` or ``"kb"``."""
    if layout not in get_args(Layout):
        raise InvalidArgument(f"{name}: layout must be 'bk' (row b*K + k) or 'kb' (row k*B + b), got {layout!r}")


def samples_per_condition(name: str, rows: int, batch: int) -> int:
    """K = N / B, or :class:`InvalidArgument` when N is not a positive multiple of B.

    >>> samples_per_condition("denoise", rows=12, batch=4)
    3
    """
    if batch < 1 or rows < 1 or rows % batch:
        raise InvalidArgument(
            f"{name}: the number of rows N must be B * K with K >= 1, got N = {rows} rows for B = {batch} conditions"
        )
    return rows // batch


def split_samples(
    x: Tensor,  # [N, ...]
    batch: int,
    layout: Layout = "bk",
) -> Tensor:  # [B, K, ...]
    """View flattened rows as ``[B, K, ...]``; no copy.

    >>> import torch
    >>> rows = torch.arange(6)                         # B = 2 conditions, K = 3 samples each
    >>> split_samples(rows, 2, "bk").tolist()
    [[0, 1, 2], [3, 4, 5]]
    >>> split_samples(rows, 2, "kb").tolist()
    [[0, 2, 4], [1, 3, 5]]
    """
    check_layout("split_samples", layout)
    k = samples_per_condition("split_samples", x.shape[0], batch)
    if layout == "bk":
        return x.unflatten(0, (batch, k))
    return x.unflatten(0, (k, batch)).transpose(0, 1)


def merge_samples(
    x: Tensor,  # [B, K, ...]
    layout: Layout = "bk",
) -> Tensor:  # [N, ...]
    """The inverse of :func:`split_samples`.

    >>> import torch
    >>> merge_samples(torch.tensor([[0, 2, 4], [1, 3, 5]]), "kb").tolist()
    [0, 1, 2, 3, 4, 5]
    """
    check_layout("merge_samples", layout)
    if layout == "kb":
        x = x.transpose(0, 1)
    return x.flatten(0, 1)


def describe(**tensors: Tensor | None) -> str:
    """``"q: [4, 16, 8, 8, 64], k: [4, 100, 8, 64]"``: the context that every shape error ends with."""
    return ", ".join(f"{name}: {list(t.shape)}" for name, t in tensors.items() if t is not None)


def check_shape(
    function: str,
    argument: str,
    tensor: Tensor,
    expected: Sequence[int | str],
    letters: str,
    context: str | Callable[[], str],
) -> None:
    """Raise :class:`InvalidArgument` unless ``tensor`` has the expected shape.

    ``expected`` holds numbers for sizes that are fixed by other arguments and letters for free ones. ``context``
    ends the message; as a function it is called for a message only (which keeps dynamic shapes traceable).

    >>> import torch
    >>> check_shape("f", "k", torch.zeros(2, 3), [2, "S"], "[B, S]", "q: [2, 5]")
    >>> check_shape("f", "k", torch.zeros(3, 3), [2, "S"], "[B, S]", "q: [2, 5]")
    Traceback (most recent call last):
    ...
    minidiff_fast.errors.InvalidArgument: f: k must be [B, S] = [2, S], got [3, 3] (q: [2, 5])
    """
    shape = tensor.shape
    fits = len(shape) == len(expected) and all(
        isinstance(want, str) or have == want for have, want in zip(shape, expected, strict=True)
    )
    if not fits:
        sizes = ", ".join(str(size) for size in expected)
        context = context() if callable(context) else context
        raise InvalidArgument(f"{function}: {argument} must be {letters} = [{sizes}], got {list(shape)} ({context})")


def check_same(function: str, first: str, reference: Tensor, **others: Tensor | None) -> None:
    """Raise :class:`InvalidArgument` unless all tensors share the dtype and the device of ``reference``."""
    for name, tensor in others.items():
        if tensor is None:
            continue
        if tensor.dtype != reference.dtype:
            raise InvalidArgument(
                f"{function}: {name} must have the dtype of {first}, {reference.dtype}, got {tensor.dtype}"
            )
        if tensor.device != reference.device:
            raise InvalidArgument(
                f"{function}: {name} must be on the device of {first}, {reference.device}, got {tensor.device}"
            )


def more_samples(
    timesteps: Tensor,  # [B or 1, K or 1]
    count: int,
) -> bool:
    """Whether a table of ``count`` timesteps is less work than all samples; False in an export, which has no sizes."""
    return not torch.compiler.is_exporting() and timesteps.numel() > count
