"""Triton kernels, one op a file; installed as ``minidiff_fast.kernels``.

Each module holds the kernels of one op and the plain functions that launch them. Users call the ops
(:mod:`minidiff_fast.ops`), which import these modules only when a kernel is about to run. This module
imports nothing.
"""

from __future__ import annotations

# Another package is called "kernels" too. Imported under that name from the repository's root, this
# folder would shadow it and load every kernel twice.
if __name__ != "minidiff_fast.kernels":
    raise ImportError(
        f"this folder is minidiff_fast.kernels and was imported as {__name__!r} because the root of the "
        "minidiff_fast repository is on sys.path; install the package (pip install -e .) and import "
        "minidiff_fast.kernels, or run from another folder to import the package named kernels"
    )
