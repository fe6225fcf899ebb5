"""The loader of the native library: found, missing, broken, of another version."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

import minidiff_fast
from minidiff_fast import native
from minidiff_fast.errors import BackendUnavailable

ROOT = Path(__file__).resolve().parents[1]
HEADER = ROOT / "csrc" / "minidiff_fast.h"
COMPILER = next((c for c in (os.environ.get("CC"), "cc", "gcc", "clang") if c and shutil.which(c)), None)

needs_compiler = pytest.mark.skipif(COMPILER is None or sys.platform == "win32", reason="no C compiler here")
Library = Callable[[str], Path]


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process in which nothing native has been asked for yet."""
    monkeypatch.delenv(native.OVERRIDE, raising=False)
    monkeypatch.setattr(native, "_outcome", None)
    monkeypatch.setattr(native, "_warned", False)


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: None) -> Library:
    """Compiles C code and makes the loader take the result."""

    def compile_it(code: str) -> Path:
        source, path = tmp_path / "library.c", tmp_path / "library.so"
        source.write_text(code)
        assert COMPILER is not None
        command = [COMPILER, "-shared", "-fPIC", "-o", str(path), str(source)]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        monkeypatch.setenv(native.OVERRIDE, str(path))
        return path

    return compile_it


def abi(version: int) -> str:
    return f"int minidiff_fast_abi_version(void) {{ return {version}; }}\n"


@needs_compiler
def test_a_good_library_is_loaded_once(library: Library) -> None:
    path = library(
        abi(native.ABI_VERSION) + r'const char* minidiff_fast_build_info(void) { return "{\"compiler\": \"tiny\"}"; }'
    )
    loaded = native.load()
    assert loaded is not None
    assert loaded.path == path
    assert native.load() is loaded
    assert native.available()
    assert native.why_missing() is None
    assert native.build_info() == {"available": True, "reason": None, "path": str(path), "compiler": "tiny"}


@needs_compiler
def test_functions_keep_their_own_signature(library: Library) -> None:
    library(abi(native.ABI_VERSION) + "double half(double x) { return x / 2; }")
    loaded = native.load()
    assert loaded is not None
    half = loaded.function("half", [ctypes.c_double], ctypes.c_double)
    loaded.function("half", [ctypes.c_int])
    assert half(5.0) == 2.5
    with pytest.raises(BackendUnavailable, match="does not export absent"):
        loaded.function("absent", [])


@needs_compiler
@pytest.mark.parametrize("version", [0, native.ABI_VERSION + 1])
def test_another_abi_version_is_named(library: Library, version: int) -> None:
    path = library(abi(version))
    reason = native.why_missing()
    assert reason is not None
    assert f"{path} has ABI version {version}, and this minidiff_fast needs {native.ABI_VERSION}" in reason
    assert "pip install" in reason
    with pytest.warns(RuntimeWarning, match="ABI version"):
        assert native.load() is None


@needs_compiler
def test_a_strange_library_is_refused(library: Library) -> None:
    library("int something_else(void) { return 1; }")
    assert "is not the native library of minidiff_fast" in str(native.why_missing())


@needs_compiler
def test_cuda_devices_without_cuda(library: Library) -> None:
    library(abi(native.ABI_VERSION) + "int minidiff_fast_has_cuda(void) { return 0; }")
    with pytest.raises(BackendUnavailable, match=r"compiled without CUDA.*MINIDIFF_FAST_CUDA=ON"):
        native.cuda_devices()


@needs_compiler
def test_cuda_errors_are_raised_with_the_runtimes_text(library: Library) -> None:
    library(
        abi(native.ABI_VERSION)
        + """
        int minidiff_fast_has_cuda(void) { return 1; }
        int minidiff_fast_cuda_device_count(int* n) { *n = 0; return 35; }
        int minidiff_fast_cuda_device(int i, char* s, unsigned long n, int* a, int* b) { return 0; }
        const char* minidiff_fast_cuda_error(int status) { return "driver too old"; }
        """
    )
    with pytest.raises(BackendUnavailable, match="CUDA error 35: driver too old"):
        native.cuda_devices()


@needs_compiler
def test_cuda_devices_are_listed(library: Library) -> None:
    library(
        abi(native.ABI_VERSION)
        + """
        #include <string.h>
        int minidiff_fast_has_cuda(void) { return 1; }
        int minidiff_fast_cuda_device_count(int* n) { *n = 2; return 0; }
        int minidiff_fast_cuda_device(int i, char* s, unsigned long n, int* a, int* b) {
          strncpy(s, i ? "second" : "first", n); *a = 9; *b = i; return 0;
        }
        """
    )
    first, second = native.cuda_devices()
    assert first == native.CudaDevice(0, "first", (9, 0))
    assert second == native.CudaDevice(1, "second", (9, 1))


def test_a_broken_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    path = tmp_path / "broken.so"
    path.write_text("not a library")
    monkeypatch.setenv(native.OVERRIDE, str(path))
    assert f"{path} could not be loaded" in str(native.why_missing())


def test_an_override_that_names_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    monkeypatch.setenv(native.OVERRIDE, str(tmp_path / "absent.so"))
    reason = str(native.why_missing())
    assert native.OVERRIDE in reason
    assert "absent.so, which is not a file" in reason


def test_a_missing_library_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    monkeypatch.setattr(minidiff_fast, "__path__", [str(tmp_path)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not native.available()
        reason = native.why_missing()
        assert native.build_info() == {"available": False, "reason": reason, "path": None}
        with pytest.raises(BackendUnavailable):
            native.cuda_devices()
    assert f"{native.LIBRARY_NAME} is not in {tmp_path / '_native'}" in str(reason)
    assert "MINIDIFF_FAST_NATIVE=ON pip install" in str(reason)
    with pytest.warns(RuntimeWarning, match="without its native CPU backend") as caught:
        assert native.load() is None
        assert native.load() is None
    assert len(caught) == 1
    assert caught[0].filename == __file__, "the warning points at the caller"


def test_threads_open_the_library_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    opened = []
    barrier = threading.Barrier(8)

    def slow_open(path: Path) -> native.NativeLibrary:
        opened.append(path)
        threading.Event().wait(0.05)
        return native.NativeLibrary(path, ctypes.CDLL(None))

    (tmp_path / "_native").mkdir()
    (tmp_path / "_native" / native.LIBRARY_NAME).touch()
    monkeypatch.setattr(minidiff_fast, "__path__", ["/nonexistent", str(tmp_path)])
    monkeypatch.setattr(native, "_open", slow_open)
    found: list[object] = []

    def ask() -> None:
        barrier.wait()
        found.append(native.load())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert opened == [tmp_path / "_native" / native.LIBRARY_NAME]
    assert len(found) == 8
    assert len({id(each) for each in found}) == 1


@pytest.mark.skipif(not HEADER.is_file(), reason="needs the repository")
def test_both_sides_have_one_abi_version() -> None:
    match = re.search(r"#define MINIDIFF_FAST_ABI_VERSION (\d+)", HEADER.read_text())
    assert match is not None
    assert int(match[1]) == native.ABI_VERSION


@pytest.fixture
def installed(fresh: None) -> native.NativeLibrary:
    if not native.available():
        pytest.skip(f"no native library here: {native.why_missing()}")
    loaded = native.load()
    assert loaded is not None
    return loaded


@pytest.mark.skipif(not HEADER.is_file(), reason="needs the repository")
def test_the_installed_library_exports_its_header(installed: native.NativeLibrary) -> None:
    declared = set(re.findall(r"MINIDIFF_FAST_API [\w *]+?(minidiff_fast_\w+)\(", HEADER.read_text()))
    assert {"minidiff_fast_abi_version", "minidiff_fast_has_cuda"} <= declared
    if not installed.function("minidiff_fast_has_cuda", [])():
        declared = {name for name in declared if "_cuda_" not in name}
    for name in sorted(declared):
        installed.function(name, [])


def test_the_installed_library_describes_itself(installed: native.NativeLibrary) -> None:
    info = native.build_info()
    assert info["abi_version"] == native.ABI_VERSION
    assert re.fullmatch(r"\w+ [\d.]+", info["compiler"])
    assert info["max_threads"] == 1 or info["openmp"]
    cuda = info["cuda"]
    assert cuda["compiled"] == (cuda["compiler"] is not None) == bool(cuda["architectures"])


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not Path("/proc/cpuinfo").is_file(),
    reason="reads Linux's /proc/cpuinfo",
)
def test_cpu_features_agree_with_the_kernel(installed: native.NativeLibrary) -> None:
    known = ["sse4_2", "avx", "avx2", "fma", "f16c"]
    known += ["avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"]
    line = next(x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("flags"))
    cpu = native.build_info()["cpu"]
    assert cpu["architecture"] == "x86_64"
    assert cpu["features"] == [name for name in known if name in line.split()]
