"""The distributions: what is in them, that they install, and that they do so without a compiler, too.

Everything is built once, from the unpacked source distribution, with the build tools of this environment.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = "minidiff_fast/_native/libminidiff_fast_native.so"
NO_COMPILER = {"CC": "/bin/false", "CXX": "/bin/false", "CUDACXX": "/bin/false"}

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="the distributions are tested on Linux and macOS"),
    pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs the repository"),
]


def has_compiler() -> bool:
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["c++", "g++", "clang++"]
    return any(shutil.which(name) for name in names)


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler on this machine")


def build(kind: str, source: Path, out: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("build", reason="needs the extra dev")
    pytest.importorskip("scikit_build_core", reason="needs the extra dev")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MINIDIFF_FAST_", "SKBUILD_", "PYTHONPATH"))}
    return subprocess.run(
        [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(out), str(source)],
        env={**kept, **variables},
        cwd=out.parent,
        capture_output=True,
        text=True,
        timeout=240,
    )


def build_one(kind: str, source: Path, out: Path, **variables: str) -> Path:
    done = build(kind, source, out, **variables)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_one("sdist", ROOT, tmp_path_factory.mktemp("sdist") / "out")


@pytest.fixture(scope="session")
def source(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution, which every wheel below is built from."""
    folder = tmp_path_factory.mktemp("source")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (unpacked,) = folder.iterdir()
    return unpacked


@pytest.fixture(scope="session")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_one("wheel", source, tmp_path_factory.mktemp("wheel") / "out")


@pytest.fixture(scope="session")
def wheel_without_compiler(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_one("wheel", source, tmp_path_factory.mktemp("pure") / "out", **NO_COMPILER)


@dataclass(frozen=True)
class Environment:
    """A virtual environment with one wheel in it, and this environment's packages behind it."""

    folder: Path

    def run(self, code: str) -> str:
        done = subprocess.run(
            [str(self.folder / "bin" / "python"), "-I", "-c", code],
            cwd=self.folder,
            env={k: v for k, v in os.environ.items() if k != "MINIDIFF_FAST_NATIVE_LIB"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout.strip()


def install(what: Path, folder: Path, *options: str) -> Environment:
    venv.create(folder, with_pip=False)
    (site_packages,) = (folder / "lib").glob("python*/site-packages")
    # A folder named in a .pth comes last on sys.path, and its own .pth files (an editable copy) are not read.
    (site_packages / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]
    done = subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", "--ignore-installed", *options, str(what)],
        env={**os.environ, "MINIDIFF_FAST_CUDA": "OFF"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return Environment(folder)


@pytest.fixture(scope="session")
def editable(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An editable installation of a copy of the unpacked source distribution."""
    folder = tmp_path_factory.mktemp("editable")
    shutil.copytree(source, folder / "clone")
    return install(folder / "clone", folder / "venv", "--no-build-isolation", "-e")


@pytest.fixture(scope="session")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return install(wheel, tmp_path_factory.mktemp("installed") / "venv")


@pytest.fixture(scope="session")
def environment_without_compiler(wheel_without_compiler: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return install(wheel_without_compiler, tmp_path_factory.mktemp("installed_pure") / "venv")


def package_sources() -> set[str]:
    """The names in a wheel of every Python file of the package."""
    inside = {path.relative_to(ROOT).as_posix() for path in (ROOT / "minidiff_fast").rglob("*.py")}
    return inside | {f"minidiff_fast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}


def metadata(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [n for n in archive.namelist() if n.endswith(f".dist-info/{name}")]
        return archive.read(member).decode()


def test_sdist_has_what_a_build_needs_and_no_more(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    native = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    kernels = {path.relative_to(ROOT).as_posix() for path in (ROOT / "kernels").glob("*.py")}
    top = {"pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md", "PKG-INFO", "constraints.txt"}
    wanted = native | kernels | top | {"minidiff_fast/py.typed", "minidiff_fast/_version.py"}
    wanted |= {"minidiff_fast/tasks/pusht/demonstrations.npz", "tests/packaging/test_wheel.py"}
    assert wanted <= names, f"missing: {sorted(wanted - names)}"
    stray = [n for n in names if n.split("/")[0] in {"runs", "build", ".venv", ".git"} or "__pycache__" in n]
    assert not stray


@needs_compiler
def test_wheel_holds_the_whole_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    wanted = package_sources() | {LIBRARY, "minidiff_fast/py.typed"}
    wanted |= {"minidiff_fast/tasks/pusht/demonstrations.npz"}
    assert wanted <= names, f"missing: {sorted(wanted - names)}"
    outside = [n for n in names if not re.match(r"minidiff_fast(-[0-9.]+\.dist-info)?/", n)]
    assert not outside, "tests, bench, csrc and kernels stay out of site-packages"
    assert not [n for n in names if n.endswith((".cpp", ".cu", ".h", ".pyc"))]


@needs_compiler
def test_one_wheel_serves_every_python(wheel: Path) -> None:
    assert re.fullmatch(r"minidiff_fast-[0-9.]+-py3-none-(linux|macosx)_\w+\.whl", wheel.name)
    assert "Root-Is-Purelib: false" in metadata(wheel, "WHEEL")


@needs_compiler
def test_metadata(wheel: Path) -> None:
    text = metadata(wheel, "METADATA")
    version = re.search(r'"(.+)"', (ROOT / "minidiff_fast" / "_version.py").read_text().split("=")[1])
    assert version is not None
    lines = text.split("\n\n")[0].splitlines()
    assert f"Version: {version[1]}" in lines
    assert "License-Expression: MIT" in lines
    assert "Requires-Python: >=3.10" in lines
    requires = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    core = {re.split(r"[^\w-]", r)[0] for r in requires if "extra ==" not in r}
    assert core == {"torch", "triton", "numpy", "einops"}
    assert not [r for r in requires if "@" in r], "a package index refuses direct addresses"
    extras = {line.removeprefix("Provides-Extra: ") for line in lines if line.startswith("Provides-Extra: ")}
    assert extras == {"train", "pusht", "rl", "vision", "flash", "rlbench", "dev", "all"}
    assert "minidiff-fast = minidiff_fast.cli:main" in metadata(wheel, "entry_points.txt")


@needs_compiler
def test_installed_wheel_works_from_another_folder(environment: Environment) -> None:
    out = environment.run(
        "import minidiff_fast, minidiff_fast.kernels, minidiff_fast.native as native, minidiff_fast.ops\n"
        "print(minidiff_fast.__file__, minidiff_fast.kernels.__file__, minidiff_fast.ops.__file__, sep='|')\n"
        "info = native.build_info()\n"
        "print(info['available'], info['abi_version'] == native.ABI_VERSION, info['max_threads'] >= 1)\n"
        "print(native.load() is native.load(), native.why_missing())\n"
    ).splitlines()
    assert all(str(environment.folder) in path for path in out[0].split("|")), out[0]
    assert out[1:] == ["True True True", "True None"]
    assert (environment.folder / "bin" / "minidiff-fast").is_file()


@needs_compiler
@pytest.mark.skipif(
    shutil.which("nvcc") is None or "MINIDIFF_FAST_CUDA" in os.environ, reason="no nvcc on this machine"
)
def test_library_with_cuda_loads_with_and_without_a_driver(environment: Environment) -> None:
    out = environment.run(
        "import minidiff_fast.native as native\n"
        "from minidiff_fast.errors import BackendUnavailable\n"
        "cuda = native.build_info()['cuda']\n"
        "print(cuda['compiled'], len(cuda['architectures']) > 0)\n"
        "try:\n"
        "    print(all(d.capability >= (3, 0) and d.name for d in native.cuda_devices()))\n"
        "except BackendUnavailable as error:\n"
        "    print('CUDA error' in str(error))\n"
    )
    assert out.splitlines() == ["True True", "True"]


@needs_compiler
def test_an_editable_install_serves_the_sources(editable: Environment) -> None:
    clone = editable.folder.parent / "clone"
    (clone / "kernels" / "arrived_later.py").touch()
    (clone / "minidiff_fast" / "ops" / "arrived_later.py").touch()
    out = editable.run(
        "import importlib.util, sys\n"
        "import minidiff_fast.kernels.arrived_later as kernel, minidiff_fast.ops.arrived_later as op\n"
        "import minidiff_fast.native as native\n"
        "print(kernel.__file__, op.__file__, native.__file__, sep='|')\n"
        "print(native.why_missing())\n"
        "found = importlib.util.find_spec('kernels')\n"
        "print(sys.path, found and found.origin)\n"
        "import importlib.resources as resources\n"
        "print(resources.files('minidiff_fast.tasks.pusht') / 'demonstrations.npz')\n"
    ).splitlines()
    wanted = ["kernels/arrived_later.py", "minidiff_fast/ops/arrived_later.py", "minidiff_fast/native.py"]
    assert out[0].split("|") == [str(clone / name) for name in wanted]
    assert out[1] == "None"
    assert str(clone) not in out[2], "the root on sys.path shadows the package named kernels"
    assert out[3] == str(clone / "minidiff_fast" / "tasks" / "pusht" / "demonstrations.npz")


def test_without_a_compiler_the_wheel_installs_and_says_what_is_missing(
    wheel_without_compiler: Path, environment_without_compiler: Environment
) -> None:
    assert wheel_without_compiler.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel_without_compiler) as archive:
        assert package_sources() <= set(archive.namelist())
    out = environment_without_compiler.run(
        "import warnings\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import minidiff_fast, minidiff_fast.ops, minidiff_fast.native as native\n"
        "    print(native.available(), [w for w in caught if 'native' in str(w.message)])\n"
        "    print(native.load(), native.load(), sum('native' in str(w.message) for w in caught))\n"
        "print(native.why_missing())\n"
    ).splitlines()
    assert out[:2] == ["False []", "None None 1"]
    assert "C++ compiler" in out[2]
    assert "pip install" in out[2]


@pytest.mark.parametrize("variable", ["MINIDIFF_FAST_NATIVE", "MINIDIFF_FAST_CUDA"])
def test_who_asks_for_the_native_part_gets_the_compilers_error(source: Path, tmp_path: Path, variable: str) -> None:
    done = build("wheel", source, tmp_path / "out", **NO_COMPILER, **{variable: "ON"})
    assert done.returncode != 0
    assert "CMake Error" in done.stdout + done.stderr
