"""The error classes of minidiff_fast.

Every message names the argument, what was expected (with its numbers), what came, and the context
that a reader needs to act on it. Checks run before anything is changed.
"""

from __future__ import annotations

import importlib
from types import ModuleType


class MinidiffFastError(Exception):
    """Base class: ``except MinidiffFastError`` catches everything this library raises on purpose."""


class InvalidArgument(MinidiffFastError, ValueError):
    """An argument has the wrong shape, dtype, device or value."""


class BackendUnavailable(MinidiffFastError, RuntimeError):
    """The implementation asked for by name cannot run here; the message says why and what to do."""


class NativeError(MinidiffFastError, RuntimeError):
    """A function of the native library failed; the message gives its status."""


class DataError(MinidiffFastError, ValueError):
    """A data set is missing, half written, of another format, empty, or holds NaN."""


class CheckpointError(MinidiffFastError, RuntimeError):
    """A checkpoint is missing, half written, or belongs to another architecture."""


class RunFolderError(MinidiffFastError, OSError):
    """An output folder cannot be written, or holds a run that would be overwritten."""


class MissingDependency(MinidiffFastError, ImportError):
    """An optional package is needed for what was asked; the message names the extra that brings it."""


def require(module: str, extra: str) -> ModuleType:
    """Import ``module``, or raise :class:`MissingDependency` that names the extra to install.

    >>> require("math", extra="train").pi > 3
    True
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependency(
            f"{module} is needed here and could not be imported ({error}); "
            f"install it with: pip install 'minidiff_fast[{extra}]'"
        ) from error
