"""lerobot's policies on a Python or a torch that lerobot itself does not install on.

``with policies() as load: load("policies.diffusion.modeling_diffusion")`` gives the real module of lerobot where that
is installed. Elsewhere it comes from the wheel (1.7 MB), downloaded once into $MINIDIFF_FAST_PEERS (default
~/.cache/minidiff_fast/peers) and never installed: a policy is plain PyTorch, and of the packages around it only the
names are loaded that it asks for. Afterwards sys.modules is as it was before.
"""

from __future__ import annotations

import ast
import importlib
import importlib.machinery
import importlib.util
import os
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

VERSION = "0.6.1"
FOLDER = Path(os.environ.get("MINIDIFF_FAST_PEERS", "~/.cache/minidiff_fast/peers")).expanduser()


class WheelUnavailable(RuntimeError):
    """The wheel is neither in the cache nor to be downloaded; the message says why."""


def unpacked() -> Path:
    """The folder of the unpacked wheel."""
    target = FOLDER / f"lerobot-{VERSION}"
    if (target / "lerobot").is_dir():
        return target
    wheels = list(FOLDER.glob(f"lerobot-{VERSION}-*.whl"))
    if not wheels:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--ignore-requires-python"]
        command += ["--retries", "0", "--timeout", "20", "-d", str(FOLDER), f"lerobot=={VERSION}"]
        try:
            FOLDER.mkdir(parents=True, exist_ok=True)
            done = subprocess.run(command, capture_output=True, text=True, timeout=90)
            reason = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        except (OSError, subprocess.TimeoutExpired) as error:
            reason = [str(error)]
        wheels = list(FOLDER.glob(f"lerobot-{VERSION}-*.whl"))
        if not wheels:
            raise WheelUnavailable(f"lerobot {VERSION} is not in {FOLDER} and could not be downloaded: {reason[0]}")
    unfinished = FOLDER / f"lerobot-{VERSION}.{os.getpid()}"
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(unfinished)
    try:
        unfinished.rename(target)
    except OSError:  # another process was first
        if not (target / "lerobot").is_dir():
            raise
    return target


class _LazyPackage(types.ModuleType):
    """A package whose __init__ is read, not run: a name that it re-exports is imported when somebody asks for it."""

    def __init__(self, name: str, folder: Path) -> None:
        super().__init__(name)
        self.__path__ = [str(folder)]
        self._origin: dict[str, tuple[str, str]] = {}
        for node in ast.walk(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                module = "." * node.level + (node.module or "")
                for alias in node.names:
                    self._origin[alias.asname or alias.name] = (module, alias.name)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name not in self.__dict__.get("_origin", {}):
            raise AttributeError(f"module {self.__name__} has no attribute {name}")
        module, original = self._origin[name]
        if module.strip(".") == "":
            return importlib.import_module(f"{self.__name__}.{original}")
        return getattr(importlib.import_module(module, self.__name__), original)


class _Anything:
    """What an absent package is asked for: an empty class, a registry that takes anything."""

    def __init__(self, *_: Any, **__: Any) -> None:
        if type(self).__bases__ == (_Anything,) and type(self).__module__ == _Absent.__module__:
            raise ImportError(
                f"{type(self).__name__} of a package that is not installed here is needed (lerobot's image encoders "
                "need a torchvision that fits the installed torch)"
            )

    @classmethod
    def register_subclass(cls, *_: Any, **__: Any) -> Callable[[type], type]:
        return lambda subclass: subclass


class _Absent(types.ModuleType):
    """A third-party package that lerobot imports and its policies do not use: every name in it is an empty class."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return sys.modules.get(f"{self.__name__}.{name}") or type(name, (_Anything,), {})


ABSENT = (
    "draccus", "draccus.choice_types", "draccus.parsers", "draccus.utils", "datasets", "deepdiff", "jsonlines", "cv2",
    "torchvision", "torchvision.models", "torchvision.transforms", "torchvision.transforms.v2",
    "torchvision.transforms.functional", "torchvision.transforms.v2.functional",
    "torchvision.models._utils", "torchvision.ops", "torchvision.ops.misc",
    "lerobot.utils.io_utils", "lerobot.processor.pipeline",  # in the syntax of Python 3.12
    "lerobot.configs.train",  # the command line
)  # fmt: skip


@contextmanager
def policies() -> Iterator[Callable[[str], Any]]:
    """Gives ``load(name)`` for the modules of lerobot: ``load("policies.diffusion.modeling_diffusion")``.

    Raises:
        WheelUnavailable: lerobot is neither installed nor to be had.
    """
    if "lerobot" in sys.modules or importlib.util.find_spec("lerobot") is not None:
        yield lambda name: importlib.import_module(f"lerobot.{name}")
        return
    root = unpacked()
    # These look for a torchvision, and take one without contents for a real one.
    for name in ("diffusers.models.attention", "transformers.image_utils", "transformers.utils"):
        if importlib.util.find_spec(name.split(".")[0]) is not None:
            importlib.import_module(name)

    before = dict(sys.modules)
    try:
        for folder in sorted(path.parent for path in (root / "lerobot").rglob("__init__.py")):
            name = ".".join(folder.relative_to(root).parts)
            sys.modules[name] = _LazyPackage(name, folder)
        for name in ABSENT:
            if not _importable(name):
                sys.modules[name] = _Absent(name)
        yield lambda name: importlib.import_module(f"lerobot.{name}")
    finally:
        for name in set(sys.modules) - set(before):
            if name.split(".")[0] == "lerobot" or isinstance(sys.modules[name], _Absent):
                del sys.modules[name]


def _importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except Exception:  # torchvision raises RuntimeError beside a torch that it was not built for
        return False
    return True
