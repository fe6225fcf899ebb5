"""torch.export of every policy's denoise: B and K are free, and what was saved and loaded gives the same."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree


def exported(policy: Any, cache: Any, x: Any, t: Any, strict: bool) -> Any:
    conditions, samples = torch.export.Dim("B", min=2, max=4096), torch.export.Dim("K", min=2, max=4096)
    shapes = torch.export.ShapesCollection()
    for leaf in pytree.tree_leaves(cache):
        shapes[leaf] = {0: conditions}
    for tensor in (x, t):
        shapes[tensor] = {0: conditions, 1: samples}
    program = torch.export.export(policy, (cache, x, t), dynamic_shapes=shapes, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def check(case: Any, strict: bool) -> set[str]:
    """The library's ops in the graph."""
    policy = case.build().eval()
    with torch.no_grad():
        program = exported(policy, policy.encode(case.obs()), *case.inputs(4, 6), strict)
        for batch, k in ((3, 9), (4, 2)):
            cache, inputs = policy.encode(case.obs(batch)), case.inputs(batch, k)
            torch.testing.assert_close(program.module()(cache, *inputs), policy.denoise(cache, *inputs))
    names = {str(node.target) for node in program.graph.nodes}
    return {name.split(".")[1] for name in names if name.startswith("minidiff_fast.")}


OPS = {
    "shallow_unet": {"broadcast_modulate_fwd"},
    "unet": {"broadcast_modulate_fwd"},
    "transformer": {"broadcast_attention_fwd"},
    "mlp": set(),
    "cross_attention": {"broadcast_attention_fwd", "broadcast_modulate_fwd"},
    "prefix": {"broadcast_attention_fwd"},
    "diffusers_head": {"broadcast_attention_fwd"},
}


def test_ops_stay_in_the_graph(traced_case, monkeypatch):
    """Where a kernel runs, the export holds the op; its module needs ``import minidiff_fast`` before it is loaded."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert check(traced_case, strict=False) == OPS[traced_case.name]


@pytest.mark.slow
def test_the_reference_exports_as_plain_torch(case, monkeypatch):
    """An export that needs nothing of this library to run but its pytrees."""
    monkeypatch.setenv("MINIDIFF_FAST_IMPL", "reference")
    assert check(case, strict=True) == set()


def test_the_reference_exports_without_strict(cases, monkeypatch):
    monkeypatch.setenv("MINIDIFF_FAST_IMPL", "reference")
    for case in cases:
        if case.name in ("prefix", "mlp"):
            assert check(case, strict=False) == set()
