"""torch.autocast, activation checkpointing and what steps make of them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from minidiff_fast.level2 import level2_step
from minidiff_fast.nn import BroadcastCrossAttention


def gradients(policy: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    return found


def relative(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The error of all gradients together over their norm."""
    assert found.keys() == wanted.keys()
    error = sum((found[name] - wanted[name]).square().sum() for name in wanted)
    return float((error / sum(x.square().sum() for x in wanted.values())).sqrt())


@pytest.mark.parametrize("chunk", [6, 2])
def test_autocast(case, impl, chunk, objective):
    policy, batch = case.build(), case.batch()
    wanted = level2_step(policy, objective, batch)
    exact = gradients(policy)
    with torch.autocast("cpu", torch.bfloat16):
        found = level2_step(policy, objective, batch, chunk=chunk)
    rounded = gradients(policy)
    assert found.loss.dtype == torch.float32
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in rounded.values())
    torch.testing.assert_close(found.loss, wanted.loss, rtol=0.03, atol=0)
    assert relative(rounded, exact) < 0.05


def test_autocast_gives_the_dtypes_of_torch(impl):
    """A linear layer at the end gives bfloat16 there, as nn.MultiheadAttention's does; parameters stay float32."""
    ours = BroadcastCrossAttention(16, 2, batch_first=True)
    theirs = nn.MultiheadAttention(16, 2, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    x, memory = torch.randn(4, 3, 16), torch.randn(4, 5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out, wanted = ours(x, memory, memory)[0], theirs(x, memory, memory, need_weights=False)[0]
    assert out.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(out, wanted, rtol=0.05, atol=0.02)


def test_autocast_of_every_denoiser_ends_in_bfloat16(case, impl):
    policy = case.build()
    with torch.autocast("cpu", torch.bfloat16):
        out = policy.denoise(policy.encode(case.obs()), *case.inputs())
    assert out.dtype == torch.bfloat16


class Checkpointed(nn.Module):
    """A policy that keeps of denoise only what goes in."""

    def __init__(self, policy: nn.Module, **options: Any) -> None:
        super().__init__()
        self.policy, self.options = policy, options
        self.runs = 0

    def encode(self, obs: Any) -> Any:
        return self.policy.encode(obs)

    def denoise(self, cache: Any, x: Tensor, t: Tensor) -> Tensor:
        leaves, structure = torch.utils._pytree.tree_flatten(cache)
        return checkpoint(self._run, structure, x, t, *leaves, **self.options)

    def _run(self, structure: Any, x: Tensor, t: Tensor, *leaves: Tensor) -> Tensor:
        self.runs += 1
        return self.policy.denoise(torch.utils._pytree.tree_unflatten(list(leaves), structure), x, t)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("chunk", [6, 2])
def test_checkpointing_changes_nothing(case, impl, use_reentrant, chunk, objective):
    policy, batch = case.build(), case.batch()
    wanted = level2_step(policy, objective, batch, chunk=chunk)
    exact = gradients(policy)
    wrapped = Checkpointed(policy, use_reentrant=use_reentrant)
    found = level2_step(wrapped, objective, batch, chunk=chunk)
    assert wrapped.runs == 2 * (6 // chunk)
    torch.testing.assert_close(found.per_sample, wanted.per_sample, rtol=0, atol=0)
    torch.testing.assert_close(gradients(policy), exact)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_dropout_is_drawn_once(dropout_case, impl, use_reentrant, objective):
    """The recomputation sees the random numbers of the first run: the gradient is that of the loss reported."""
    policy, batch = dropout_case.build(0.5), dropout_case.batch()
    plain, wrapped = policy, Checkpointed(policy, use_reentrant=use_reentrant)
    losses, found = [], []
    for each in (plain, wrapped, plain):
        torch.manual_seed(3 if len(losses) < 2 else 4)
        losses.append(level2_step(each, objective, batch, chunk=4).per_sample)
        found.append(gradients(policy))
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=0)
    torch.testing.assert_close(found[1], found[0])
    assert not torch.equal(losses[2], losses[0])


def test_selective_checkpointing(dropout_case, impl, objective):
    """Products with weights are kept, attention is computed again; its dropout is the same."""
    kept = [torch.ops.aten.addmm.default, torch.ops.aten.mm.default]

    def choose(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE

    policy, batch = dropout_case.build(0.5), dropout_case.batch()
    torch.manual_seed(3)
    wanted = level2_step(policy, objective, batch, chunk=4)
    exact = gradients(policy)
    torch.manual_seed(3)
    contexts = partial(create_selective_checkpoint_contexts, choose)
    wrapped = Checkpointed(policy, use_reentrant=False, context_fn=contexts)
    torch.testing.assert_close(level2_step(wrapped, objective, batch, chunk=4).per_sample, wanted.per_sample)
    torch.testing.assert_close(gradients(policy), exact)


def test_checkpointed_blocks(case, impl, objective):
    """Every block whose forward is called, through Accelerate's and torch's wrapper."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        CheckpointWrapper,
        apply_activation_checkpointing,
    )

    policy, batch = case.build(), case.batch()
    level2_step(policy, objective, batch)
    exact = gradients(policy)
    modules = (nn.TransformerDecoderLayer, nn.MultiheadAttention)  # whose parameters are read without their forward
    apply_activation_checkpointing(
        policy,
        check_fn=lambda module: isinstance(module, (nn.Linear, nn.Sequential)) and not isinstance(module, modules),
    )
    assert any(isinstance(module, CheckpointWrapper) for module in policy.modules())
    level2_step(policy, objective, batch, chunk=4)
    found = {name.replace("_checkpoint_wrapped_module.", ""): x for name, x in gradients(policy).items()}
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-6)


def test_checkpointing_under_autocast(case, impl, objective):
    policy, batch = case.build(), case.batch()
    found = []
    for each in (policy, Checkpointed(policy, use_reentrant=False)):
        with torch.autocast("cpu", torch.bfloat16):
            level2_step(each, objective, batch, chunk=2)
        found.append(gradients(policy))
    torch.testing.assert_close(found[0], found[1])
