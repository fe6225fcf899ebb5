"""The rules of the house: where files are, what they are called, and which way imports run."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "minidiff_fast"

ROOMS = {".ci", "bench", "csrc", "docs", "examples", "kernels", "minidiff_fast", "tests"}
TOP_FILES = {
    ".gitattributes",
    ".gitignore",
    ".pre-commit-config.yaml",
    "CHANGELOG.md",
    "CMakeLists.txt",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "constraints.txt",
    "pyproject.toml",
}
MODULES = {
    "__init__",
    "__main__",
    "_version",
    "backend",
    "cli",
    "errors",
    "level2",
    "native",
    "parallel",
    "policy",
    "sampling",
    "shapes",
    "transitions",
}
PACKAGES = {"finetuning", "integrations", "models", "nn", "objectives", "ops", "tasks", "training"}

# A module may import from its own rank and from those before it.
RANKS = [
    {"_version", "errors", "shapes"},
    {"backend", "native"},
    {"kernels"},
    {"ops"},
    {"nn"},
    {"models"},
    {"objectives", "level2", "parallel", "sampling", "policy", "transitions", "integrations"},
    {"tasks"},
    {"training"},
    {"finetuning"},
    {"cli", "__main__", ""},
]
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}
CORE = {name for names in RANKS[:7] for name in names} - {"integrations"}
CORE_NEEDS = {"torch", "numpy", "einops", "minidiff_fast"}


@dataclass(frozen=True)
class Import:
    """One imported module and where."""

    path: Path
    line: int
    module: str
    deferred: bool
    """Inside a function: happens when that runs."""

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line} imports {self.module}"


def module_name(path: Path) -> str:
    """Dotted name that a source file is installed under."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "kernels":
        parts = ("minidiff_fast", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    """``ops`` for ``minidiff_fast.ops.x``, and the empty string for ``minidiff_fast`` itself."""
    return module.split(".")[1] if "." in module else ""


def children(node: ast.AST) -> list[ast.AST]:
    """Child nodes, without what only a type checker sees."""
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        return list(node.orelse)
    return list(ast.iter_child_nodes(node))


def imports(path: Path) -> Iterator[Import]:
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]

    def visit(node: ast.AST, deferred: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(path, node.lineno, alias.name, deferred)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            yield Import(path, node.lineno, base, deferred)
            for alias in node.names:
                if f"{base}.{alias.name}" in MODULE_NAMES:
                    yield Import(path, node.lineno, f"{base}.{alias.name}", deferred)
        inside = deferred or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in children(node):
            yield from visit(child, inside)

    yield from visit(ast.parse(path.read_text(encoding="utf-8"), str(path)), False)


SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
MODULE_NAMES = {module_name(path) for path in SOURCES}
IMPORTS = [found for path in SOURCES for found in imports(path)]


def test_imports_run_one_way() -> None:
    wrong = []
    for found in IMPORTS:
        if found.module.split(".")[0] != "minidiff_fast":
            continue
        importer, imported = part_of(module_name(found.path)), part_of(found.module)
        if not imported:  # the package itself, which imports nothing
            continue
        assert importer in RANK, f"{found}: {importer!r} has no place in RANKS"
        if RANK.get(imported, len(RANKS)) > RANK[importer]:
            wrong.append(str(found))
    assert not wrong, "\n".join(wrong)


def test_triton_belongs_to_kernels() -> None:
    triton = [found for found in IMPORTS if found.module.split(".")[0] == "triton"]
    outside = [str(f) for f in triton if part_of(module_name(f.path)) != "kernels" and not f.deferred]
    assert not outside, "\n".join(outside)
    assert triton, "the rule has nothing to hold"


def test_kernels_are_imported_when_they_run() -> None:
    edges: dict[str, set[str]] = {}
    for found in IMPORTS:
        if not found.deferred:
            edges.setdefault(module_name(found.path), set()).add(found.module)
    # Private modules may import kernels at their top; nothing public may reach them without a call.
    public = {n for n in MODULE_NAMES if not re.search(r"\._|\.kernels", n)}
    reached, new = set(public), set(public)
    while new:
        new = {target for name in new for target in edges.get(name, set())} - reached
        reached |= new
    eager = {name for name in reached if name.startswith("minidiff_fast.kernels")}
    assert not eager, f"imported with the package: {sorted(eager)}"


def test_the_core_imports_torch_numpy_and_einops_alone() -> None:
    allowed = CORE_NEEDS | set(sys.stdlib_module_names)
    foreign = []
    for found in IMPORTS:
        part = part_of(module_name(found.path))
        top = found.module.split(".")[0]
        if part in CORE and not found.deferred and top not in allowed | ({"triton"} if part == "kernels" else set()):
            foreign.append(str(found))
    assert not foreign, "\n".join(foreign)


def test_nobody_imports_kernels_by_its_folder_name() -> None:
    wrong = [str(found) for found in IMPORTS if found.module.split(".")[0] in {"kernels", "bench", "tests"}]
    assert not wrong, "\n".join(wrong)


def stems(folder: Path, pattern: str) -> set[str]:
    """Stems of the public files: helpers start with an underscore."""
    return {path.stem for path in folder.glob(pattern) if not path.stem.startswith("_")}


def defines(path: Path, name: str) -> bool:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return any(isinstance(node, ast.FunctionDef) and node.name == name for node in tree.body)


def operations() -> set[str]:
    """Every op: a kernel file, a native file, or a module of ops/ with a function of the same name."""
    native = stems(ROOT / "csrc" / "cpu", "*.cpp") | stems(ROOT / "csrc" / "cuda", "*.cu")
    named = {stem for stem in stems(PACKAGE / "ops", "*.py") if defines(PACKAGE / "ops" / f"{stem}.py", stem)}
    native = {stem.removesuffix("_avx2") for stem in native}  # the same op for processors with AVX2
    return named | stems(ROOT / "kernels", "*.py") | (native - {"build_info"})


def test_there_are_operations() -> None:
    assert "broadcast_attention" in operations()


@pytest.mark.parametrize("op", sorted(operations()))
def test_an_op_has_one_stem_everywhere(op: str) -> None:
    wanted = [
        ROOT / "kernels" / f"{op}.py",
        PACKAGE / "ops" / f"{op}.py",
        ROOT / "tests" / "ops" / f"test_{op}.py",
        ROOT / "tests" / "kernels" / f"test_{op}.py",
        ROOT / "bench" / f"{op}.py",
    ]
    missing = [path.relative_to(ROOT).as_posix() for path in wanted if not path.is_file()]
    assert not missing, f"{op} lacks {', '.join(missing)}"
    assert defines(PACKAGE / "ops" / f"{op}.py", op)
    assert defines(PACKAGE / "ops" / f"{op}.py", f"{op}_reference"), "the definition stands beside the op"


def test_the_package_has_no_room_that_nobody_planned() -> None:
    modules = {path.stem for path in PACKAGE.glob("*.py")}
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert modules <= MODULES, f"unplanned: {sorted(modules - MODULES)}"
    assert packages <= PACKAGES, f"unplanned: {sorted(packages - PACKAGES)}"
    bare = [p for p in PACKAGE.glob("**/*.py") if not (p.parent / "__init__.py").is_file()]
    assert not bare, f"no __init__.py beside {bare}"


def test_tests_mirror_the_package() -> None:
    extra = {"bench", "compile", "kernels", "packaging", "peers"}
    folders = {path.parent.relative_to(ROOT / "tests").parts[0] for path in (ROOT / "tests").glob("*/**/*.py")}
    assert folders <= PACKAGES | extra, f"unplanned: {sorted(folders - PACKAGES - extra)}"
    assert not list((ROOT / "tests").rglob("__init__.py")), "an __init__.py puts the root on sys.path"


def tracked() -> list[Path]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    files = [Path(name) for name in listed.stdout.split("\0") if name]
    if listed.returncode != 0 or not files:
        pytest.skip("git lists no files here")
    return files


def test_every_tracked_file_is_in_a_room() -> None:
    outside = [
        str(path)
        for path in tracked()
        if (path.parts[0] not in ROOMS if len(path.parts) > 1 else path.name not in TOP_FILES)
    ]
    assert not outside, f"outside the rooms: {outside}"


SUFFIXES = {
    "docs": r"\w+\.md",
    "examples": r"\w+\.py",
    "csrc": r"cpu/[\w/]+\.(cpp|h)|cuda/[\w/]+\.(cu|cuh|h)|\w+\.h",
    "kernels": r"\w+\.py",
    "minidiff_fast": r"[\w/]+\.(py|npz|json)|py\.typed",
}


@pytest.mark.parametrize("room", sorted(SUFFIXES))
def test_rooms_hold_their_kind_of_file(room: str) -> None:
    wrong = [
        str(path)
        for path in tracked()
        if path.parts[0] == room and not re.fullmatch(SUFFIXES[room], "/".join(path.parts[1:]))
    ]
    assert not wrong
