"""Whether a policy has the interface that its adapter was written for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from minidiff_fast.errors import InvalidArgument

VERSION = "lerobot 0.6"


def check_interface(adapter: str, peer: str, argument: str, root: Any, paths: Iterable[str]) -> None:
    """Raise :class:`InvalidArgument` unless ``root`` has every attribute in ``paths`` ("a.b" is ``root.a.b``).

    >>> from types import SimpleNamespace
    >>> check_interface("Adapter", "Policy", "policy", SimpleNamespace(a=SimpleNamespace(b=1)), ["a.b"])
    >>> check_interface("Adapter", "Policy", "policy", SimpleNamespace(a=SimpleNamespace(b=1)), ["a.c"])
    Traceback (most recent call last):
    ...
    minidiff_fast.errors.InvalidArgument: Adapter: policy must be Policy as in lerobot 0.6, with policy.a.c; got \
types.SimpleNamespace, whose policy.a (SimpleNamespace) has no c
    """
    for path in paths:
        found, where = root, argument
        for name in path.split("."):
            if not hasattr(found, name):
                raise InvalidArgument(
                    f"{adapter}: {argument} must be {peer} as in {VERSION}, with {argument}.{path}; got "
                    f"{type(root).__module__}.{type(root).__name__}, whose {where} ({type(found).__name__}) has no "
                    f"{name}"
                )
            found, where = getattr(found, name), f"{where}.{name}"
