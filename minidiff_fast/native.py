"""The native library: found, checked and loaded once, with ctypes, when something first needs it.

The library (``csrc/``) has a plain C interface and no torch in it. It is optional: where no compiler was
present at installation, or the library cannot be loaded, :func:`load` returns None, says so in one
warning a process, and :func:`why_missing` tells the reason and the cure.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minidiff_fast.errors import BackendUnavailable, InvalidArgument

ABI_VERSION = 1
"""The interface this Python code speaks; the twin of MINIDIFF_FAST_ABI_VERSION in csrc/minidiff_fast.h."""

OVERRIDE = "MINIDIFF_FAST_NATIVE_LIB"
"""Environment variable: path of the library to load instead of the installed one."""

SIMD = "MINIDIFF_FAST_NATIVE_SIMD"
"""Environment variable: ``portable`` keeps the CPU kernels from using what only some processors have; ``auto``."""

LIBRARY_NAME = "libminidiff_fast_native" + (".dll" if sys.platform == "win32" else ".so")

_REINSTALL = "pip install --force-reinstall --no-deps --no-cache-dir minidiff_fast"


@dataclass(frozen=True)
class CudaDevice:
    """One CUDA device as the native library's runtime sees it."""

    index: int
    name: str
    capability: tuple[int, int]
    """Compute capability (major, minor), for example (9, 0)."""


@dataclass(frozen=True)
class NativeLibrary:
    """A loaded library whose ABI version has been checked."""

    path: Path
    handle: ctypes.CDLL

    def function(self, name: str, argtypes: Sequence[Any], restype: Any = ctypes.c_int) -> Any:
        """The exported C function ``name`` with its signature set.

        Every call gives an object of its own, so that two signatures cannot overwrite each other; keep
        the result. Raises :class:`BackendUnavailable` if the library does not export ``name``.
        """
        try:
            function = self.handle[name]
        except AttributeError as error:
            raise BackendUnavailable(
                f"native: {self.path} does not export {name}; rebuild it with: {_REINSTALL}"
            ) from error
        function.argtypes = list(argtypes)
        function.restype = restype
        return function


class _Unusable(Exception):
    """Why the library cannot be used, in one sentence."""


_lock = threading.Lock()
_outcome: NativeLibrary | str | None = None  # None until the first look; a str says why it is missing
_warned = False


def load() -> NativeLibrary | None:
    """The native library, or None where there is none; the first None of a process comes with a warning.

    Call this when a native kernel is about to be used. :func:`available` asks without the warning.
    """
    global _warned
    outcome = _look()
    if isinstance(outcome, NativeLibrary):
        return outcome
    with _lock:
        first, _warned = not _warned, True
    if first:
        warnings.warn(f"minidiff_fast runs without its native CPU backend: {outcome}", RuntimeWarning, stacklevel=2)
    return None


def available() -> bool:
    """Whether the native library can be used here. Never warns."""
    return isinstance(_look(), NativeLibrary)


def why_missing() -> str | None:
    """None where the library works; else one sentence with the reason and one with the cure."""
    outcome = _look()
    return None if isinstance(outcome, NativeLibrary) else outcome


def portable_simd() -> bool:
    """Whether :data:`SIMD` asks for the kernels that run on every processor. Read at every call."""
    chosen = os.environ.get(SIMD) or "auto"
    if chosen not in ("auto", "portable"):
        raise InvalidArgument(f"{SIMD} must be auto or portable, got {chosen!r}")
    return chosen == "portable"


def build_info() -> dict[str, Any]:
    """How the library was built and what this processor can do.

    Always has ``available`` (bool), ``reason`` (str or None, as :func:`why_missing`) and ``path`` (str or
    None). With the library, also ``abi_version``, ``compiler``, ``openmp``, ``max_threads``, ``cpu``
    (architecture, features) and ``cuda`` (compiled, compiler, architectures), described in
    ``csrc/minidiff_fast.h``. Touches no CUDA driver.
    """
    outcome = _look()
    if not isinstance(outcome, NativeLibrary):
        return {"available": False, "reason": outcome, "path": None}
    text = outcome.function("minidiff_fast_build_info", [], ctypes.c_char_p)()
    return {"available": True, "reason": None, "path": str(outcome.path), **json.loads(text)}


def cuda_devices() -> list[CudaDevice]:
    """The CUDA devices that the library's own runtime sees. Initialises the CUDA driver.

    Raises :class:`BackendUnavailable` if the library is missing, was compiled without CUDA, or the
    runtime reports an error (no driver, a driver older than the runtime).
    """
    library = _look()
    if not isinstance(library, NativeLibrary):
        raise BackendUnavailable(f"native: {library}")
    if not library.function("minidiff_fast_has_cuda", [])():
        raise BackendUnavailable(
            f"native: {library.path} was compiled without CUDA; with nvcc on PATH run: "
            f"MINIDIFF_FAST_CUDA=ON {_REINSTALL}"
        )
    integer = ctypes.POINTER(ctypes.c_int)
    count_devices = library.function("minidiff_fast_cuda_device_count", [integer])
    describe = library.function(
        "minidiff_fast_cuda_device", [ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, integer, integer]
    )
    count = ctypes.c_int()
    _check_cuda(library, count_devices(ctypes.byref(count)))
    devices = []
    for index in range(count.value):
        name, major, minor = ctypes.create_string_buffer(256), ctypes.c_int(), ctypes.c_int()
        status = describe(index, name, len(name), ctypes.byref(major), ctypes.byref(minor))
        _check_cuda(library, status)
        devices.append(CudaDevice(index, name.value.decode(), (major.value, minor.value)))
    return devices


def _check_cuda(library: NativeLibrary, status: int) -> None:
    if status != 0:
        text = library.function("minidiff_fast_cuda_error", [ctypes.c_int], ctypes.c_char_p)(status)
        raise BackendUnavailable(f"native: CUDA error {status}: {text.decode()}")


def _look() -> NativeLibrary | str:
    global _outcome
    if _outcome is None:
        with _lock:
            if _outcome is None:
                try:
                    _outcome = _open(_find())
                except _Unusable as reason:
                    _outcome = str(reason)
    return _outcome


def _find() -> Path:
    """Path of the library to load, or _Unusable."""
    override = os.environ.get(OVERRIDE)
    if override:
        path = Path(override)
        if not path.is_file():
            raise _Unusable(f"{OVERRIDE} names {override}, which is not a file; correct it or unset it.")
        return path.absolute()
    # An editable installation has two folders: the sources, and site-packages with what CMake made.
    folders = [Path(folder) / "_native" for folder in sys.modules["minidiff_fast"].__path__]
    for folder in folders:
        if (folder / LIBRARY_NAME).is_file():
            return folder / LIBRARY_NAME
    looked = " or ".join(str(folder) for folder in folders)
    raise _Unusable(
        f"{LIBRARY_NAME} is not in {looked}: minidiff_fast was installed without a working C++ compiler, "
        f"or is run from its sources without being installed. Install a C++17 compiler (g++ or clang) and "
        f"run: MINIDIFF_FAST_NATIVE=ON {_REINSTALL} (in a clone: MINIDIFF_FAST_NATIVE=ON pip install .)"
    )


def _open(path: Path) -> NativeLibrary:
    """Load ``path`` and check its ABI version, or _Unusable."""
    try:
        handle = ctypes.CDLL(str(path))
    except OSError as error:
        raise _Unusable(f"{path} could not be loaded ({error}); rebuild it with: {_REINSTALL}") from error
    try:
        abi_version = handle.minidiff_fast_abi_version
    except AttributeError as error:
        raise _Unusable(
            f"{path} is not the native library of minidiff_fast (it does not export "
            f"minidiff_fast_abi_version); rebuild it with: {_REINSTALL}"
        ) from error
    abi_version.argtypes = []
    abi_version.restype = ctypes.c_int
    found = abi_version()
    if found != ABI_VERSION:
        raise _Unusable(
            f"{path} has ABI version {found}, and this minidiff_fast needs {ABI_VERSION}: the two come from "
            f"different versions. Rebuild it with: {_REINSTALL}"
        )
    return NativeLibrary(path, handle)
