"""Without a GPU the Triton kernels run in Triton's interpreter; that has to be chosen before Triton is imported."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(int(os.environ.get("MINIDIFF_FAST_TEST_THREADS", "1")))
