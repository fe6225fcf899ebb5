"""Without a GPU the Triton kernels run in Triton's interpreter; that has to be chosen before Triton is imported."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

# `python -m pytest` puts the repository's root on the path, where kernels/ hides another package of that name, which
# transformers looks for.
ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != ROOT]

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(int(os.environ.get("MINIDIFF_FAST_TEST_THREADS", "1")))


@pytest.fixture(scope="module")
def lerobot() -> Iterator[Callable[[str], Any]]:
    """``load(name)`` for modules of the real lerobot, from its wheel where it is not installed; a skip says why not."""
    path = ROOT / "examples" / "lerobot_wheel.py"
    spec = importlib.util.spec_from_file_location("lerobot_wheel", path)
    assert spec is not None and spec.loader is not None
    wheel = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(wheel)
    with ExitStack() as stack:
        try:
            load = stack.enter_context(wheel.policies())
        except wheel.WheelUnavailable as error:
            pytest.skip(str(error))
        yield load
