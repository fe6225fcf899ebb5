"""ConversionReport: what a conversion replaced in a model, what it left, and why; and the way back."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from minidiff_fast.errors import InvalidArgument


class Replaced(NamedTuple):
    """A module or processor that was replaced."""

    name: str
    """Its dotted name in the model; the empty string is the model itself."""
    before: str
    """The class that was there."""
    after: str
    """The class that is there now."""


class Left(NamedTuple):
    """A module that was left as it is."""

    name: str
    """Its dotted name in the model; the empty string is the model itself."""
    kind: str
    """Its class."""
    reason: str
    """Why, as the end of "left as is, because ..."."""


class ConversionReport:
    """What was replaced in a model, what was left as it is and why; :meth:`revert` undoes it.

    Args:
        replaced: in the order of the model.
        left: in the order of the model.
        undo: what puts everything back, called by :meth:`revert`.

    >>> report = ConversionReport([Replaced("block.attn", "AttnProcessor2_0", "BroadcastAttnProcessor")],
    ...                           [Left("block.self_attn", "Attention", "it is self-attention: nothing is shared")])
    >>> print(report)
    replaced 1, left 1
      block.attn: AttnProcessor2_0 -> BroadcastAttnProcessor
      block.self_attn: Attention left as is, because it is self-attention: nothing is shared
    """

    def __init__(
        self,
        replaced: list[Replaced] | tuple[Replaced, ...] = (),
        left: list[Left] | tuple[Left, ...] = (),
        *,
        undo: Callable[[], None] | None = None,
    ) -> None:
        self.replaced = tuple(replaced)
        self.left = tuple(left)
        self._undo = undo

    @property
    def reverted(self) -> bool:
        """True once :meth:`revert` has run, and where there was nothing to undo."""
        return self._undo is None

    def revert(self) -> None:
        """Put back what was there before, weights as they are now.

        Raises:
            InvalidArgument: it has been undone already, or nothing had been replaced.
        """
        if self._undo is None:
            raise InvalidArgument("ConversionReport.revert: there is nothing (or nothing any more) to undo")
        self._undo()
        self._undo = None  # a refused way back can be tried again

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)}, left {len(self.left)}"]
        lines += [f"  {name or '(the model)'}: {before} -> {after}" for name, before, after in self.replaced]
        lines += [f"  {name or '(the model)'}: {kind} left as is, because {why}" for name, kind, why in self.left]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"ConversionReport(replaced={len(self.replaced)}, left={len(self.left)})"
