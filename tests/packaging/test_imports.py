"""What importing costs and needs: nothing for the package, torch, numpy and einops for its core."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

CORE = ["ops", "nn", "models", "objectives", "level2", "sampling", "transitions", "policy", "native", "backend"]
OPTIONAL = (
    "triton diffusers accelerate tyro tqdm rich safetensors tensorboard matplotlib gymnasium gym_pusht "
    "pymunk pygame zarr imageio imageio_ffmpeg PIL pyarrow transformers flash_attn"
)


def run(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)


def output(code: str, cwd: Path) -> str:
    done = run(code, cwd)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.strip()


def test_importing_the_package_imports_nothing_else(tmp_path: Path) -> None:
    code = (
        "import sys; before = set(sys.modules); import minidiff_fast, json\n"
        "print(json.dumps(sorted({n.split('.')[0] for n in set(sys.modules) - before})))\n"
    )
    added = set(json.loads(output(code, tmp_path)))
    foreign = added - set(sys.stdlib_module_names) - {"minidiff_fast"}
    assert not foreign, f"import minidiff_fast loads {sorted(foreign)}"


def test_attributes_load_when_they_are_used(tmp_path: Path) -> None:
    code = (
        "import sys, minidiff_fast as m\n"
        "assert 'minidiff_fast.ops' not in sys.modules and 'ops' in dir(m)\n"
        "assert m.ops is sys.modules['minidiff_fast.ops']\n"
        "assert m.__version__.count('.') == 2\n"
        "try: m.nonsense\n"
        "except AttributeError as error: print(error)\n"
    )
    assert output(code, tmp_path) == "module 'minidiff_fast' has no attribute 'nonsense'"


def test_the_core_needs_torch_numpy_and_einops_alone(tmp_path: Path) -> None:
    # None in sys.modules is what Python takes for "not installed", find_spec included.
    code = (
        "import sys, json, importlib, traceback\n"
        f"for name in {OPTIONAL!r}.split(): sys.modules[name] = None\n"
        "failed = {}\n"
        f"for name in {CORE!r}:\n"
        "    try: importlib.import_module('minidiff_fast.' + name)\n"
        "    except Exception: failed[name] = traceback.format_exc(limit=-3)\n"
        "print(json.dumps(failed))\n"
    )
    failed = json.loads(output(code, tmp_path))
    assert not failed, "\n".join(f"minidiff_fast.{name}: {text}" for name, text in failed.items())


def test_the_core_does_not_load_triton(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    code = (
        "import sys, torch; before = 'triton' in sys.modules\n"
        f"import importlib; [importlib.import_module('minidiff_fast.' + n) for n in {CORE!r}]\n"
        "print(before or 'triton' not in sys.modules)\n"
    )
    assert output(code, tmp_path) == "True"


def test_kernels_is_not_importable_under_another_name() -> None:
    done = run("import kernels", ROOT)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError:")
    assert "minidiff_fast.kernels" in last
    assert "pip install -e ." in last


def test_kernels_is_a_package_of_minidiff_fast(tmp_path: Path) -> None:
    code = "import sys, minidiff_fast.kernels as k; print(k.__name__, {'triton', 'kernels'} & set(sys.modules))"
    assert output(code, tmp_path) == "minidiff_fast.kernels set()"


def test_the_root_is_not_on_the_path_of_the_tests() -> None:
    assert ROOT not in [Path(entry).resolve() for entry in sys.path]


def test_nor_is_it_with_python_m_pytest() -> None:
    here = f"{Path(__file__).relative_to(ROOT)}::test_the_root_is_not_on_the_path_of_the_tests"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", here]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "1 passed" in done.stdout
