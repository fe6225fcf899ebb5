"""torch.compile of every policy: one graph, the same values and gradients, and K changes without compiling again."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from minidiff_fast import native
from minidiff_fast.level2 import level2_step
from minidiff_fast.ops import broadcast_attention


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(case: Any, run: Any, policy: Any, k: int, mark: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    policy.zero_grad()
    batch = case.batch(4, k)
    for tensor in (batch.noise, batch.timesteps) if mark else ():
        torch._dynamo.mark_dynamic(tensor, 1)
    out = run(policy.encode(batch.obs), batch.noise, batch.timesteps)
    out.square().mean().backward()
    return out.detach(), {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def test_one_graph_for_every_k(traced_case):
    policy = traced_case.build()
    compiled = torch.compile(policy.denoise, fullgraph=True, backend="aot_eager")
    for k in (6, 9, 3):
        with torch._dynamo.config.patch(error_on_recompile=k != 6):
            out, gradients = step(traced_case, compiled, policy, k, mark=k == 6)
        wanted, wanted_gradients = step(traced_case, policy.denoise, policy, k)
        torch.testing.assert_close(out, wanted)
        torch.testing.assert_close(gradients, wanted_gradients)


def test_steps_of_a_compiled_policy(shallow_case, objective):
    """``torch.compile(policy)`` compiles denoise; chunks of one size share its graph, also in the encoder's chunk."""
    policy, plain, batch = shallow_case.build(), shallow_case.build(), shallow_case.batch()
    compiled = torch.compile(policy, fullgraph=True, backend="eager")
    level2_step(compiled, objective, batch, chunk=2)
    level2_step(plain, objective, batch)
    for ours, theirs in zip(policy.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_encoders_compile_too(case):
    policy = case.build()
    compiled = torch.compile(policy.encode, fullgraph=True, backend="eager")
    torch.testing.assert_close(list(leaves(compiled(case.obs()))), list(leaves(policy.encode(case.obs()))))


def leaves(cache: Any) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(cache)


def test_a_library_that_was_not_loaded_yet(monkeypatch):
    """The first op of a process may run under torch.compile: the library loads while it traces."""
    monkeypatch.setattr(native, "_outcome", None)
    q, k = torch.randn(2, 5, 3, 4, 16), torch.randn(2, 7, 2, 16)
    compiled = torch.compile(lambda: broadcast_attention(q, k, k), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(), broadcast_attention(q, k, k))
    assert native._outcome is not None


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor(cases):
    case = next(case for case in cases if case.name == "prefix")
    policy = case.build()
    compiled = torch.compile(policy.denoise, fullgraph=True)
    out, gradients = step(case, compiled, policy, 6)
    wanted, wanted_gradients = step(case, policy.denoise, policy, 6)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(gradients, wanted_gradients, rtol=1e-4, atol=1e-6)
