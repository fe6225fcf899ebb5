"""Copies, checkpoints, devices, dtypes, averages and optimisers: what programs do to the weights of a policy."""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from minidiff_fast.level2 import level2_step


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    monkeypatch.setenv("MINIDIFF_FAST_IMPL", "reference")


def output(case: Any, policy: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    x, t = case.inputs()
    obs = {name: value.to(dtype) for name, value in case.obs().items()}
    with torch.no_grad():
        return policy.denoise(policy.encode(obs), x.to(dtype), t)


def gradients(case: Any, policy: Any, objective: Any) -> dict[str, Tensor]:
    policy.zero_grad()
    level2_step(policy, objective, case.batch(), chunk=4)
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def same(case: Any, one: Any, other: Any) -> None:
    assert torch.equal(output(case, one), output(case, other))


def test_copies(case, objective):
    policy = case.build()
    wanted = gradients(case, policy, objective)  # copies of a policy that has trained
    for made in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        same(case, made, policy)
        torch.testing.assert_close(gradients(case, made, objective), wanted, rtol=0, atol=0)
        assert not {id(p) for p in made.parameters()} & {id(p) for p in policy.parameters()}


def test_whole_policies_in_a_file(case):
    file, policy = io.BytesIO(), case.build()
    torch.save(policy, file)
    file.seek(0)
    same(case, torch.load(file, weights_only=False), policy)


@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts(case, assign, tmp_path):
    policy, path = case.build(), tmp_path / "state.pt"
    torch.save(policy.state_dict(), path)
    for state in (torch.load(path, weights_only=True), torch.load(path, weights_only=True, mmap=True)):
        other = case.build(seed=1)
        assert not torch.equal(output(case, other), output(case, policy))
        other.load_state_dict(state, assign=assign)
        same(case, other, policy)


def test_safetensors(case, tmp_path):
    policy, other = case.build(), case.build(seed=1)
    safetensors.torch.save_model(policy, str(tmp_path / "model.safetensors"))
    assert safetensors.torch.load_model(other, str(tmp_path / "model.safetensors")) == (set(), [])
    same(case, other, policy)


def test_hooks_of_state_dicts(case):
    policy = case.build()
    called = []
    policy.denoiser.register_state_dict_pre_hook(lambda module, prefix, keep_vars: called.append(prefix))
    policy.denoiser.register_state_dict_post_hook(
        lambda module, state, prefix, local: state.update({prefix + "extra": torch.ones(1)})
    )
    policy.denoiser.register_load_state_dict_pre_hook(
        lambda module, state, prefix, *rest: called.append(state.pop(prefix + "extra"))
    )
    other = copy.deepcopy(policy)
    other.load_state_dict(policy.state_dict())
    assert called[0] == "denoiser." and torch.equal(called[-1], torch.ones(1))


def test_meta_device(case):
    policy = case.build()
    with torch.device("meta"):
        empty = case.build()
    assert all(p.is_meta for p in empty.parameters())
    assigned = copy.deepcopy(empty)
    assigned.load_state_dict(policy.state_dict(), assign=True)
    same(case, assigned, policy)
    empty = empty.to_empty(device="cpu")
    empty.load_state_dict(policy.state_dict())
    same(case, empty, policy)


def test_parametrised_linear_layers(case, objective):
    """Weight norm of every nn.Linear: the same values, and both of its parameters get gradients."""
    policy = case.build()
    wanted = output(case, policy)
    before = gradients(case, policy, objective)
    linears = {name: m for name, m in policy.named_modules() if isinstance(m, nn.Linear)}
    for linear in linears.values():
        parametrizations.weight_norm(linear)
    torch.testing.assert_close(output(case, policy), wanted)
    found = gradients(case, policy, objective)
    for name in linears:
        had = f"{name}.weight" in before
        assert had == (f"{name}.parametrizations.weight.original0" in found), name
        assert had == (f"{name}.parametrizations.weight.original1" in found), name
    for linear in linears.values():
        parametrize.remove_parametrizations(linear, "weight")
    torch.testing.assert_close(output(case, policy), wanted)


def test_functional_call(case):
    policy, other = case.build(), case.build(seed=1)
    x, t = case.inputs()
    cache = other.encode(case.obs())
    called = torch.func.functional_call(policy, dict(other.named_parameters()), (cache, x, t))
    torch.testing.assert_close(called, other.denoise(cache, x, t), rtol=0, atol=0)


def test_averages(case, objective):
    """EMA of diffusers and of torch: the average acts, and a copy of it holds its weights."""
    from diffusers.training_utils import EMAModel

    policy = case.build()
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    diffusers = EMAModel(policy.parameters(), decay=0.5, min_decay=0.5)
    torchs = AveragedModel(policy, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    weights = []
    for _ in range(2):  # the first step of both takes the weights as they are
        gradients(case, policy, objective)
        optimizer.step()
        diffusers.step(policy.parameters())
        torchs.update_parameters(policy)
        weights.append([p.detach().clone() for p in policy.parameters()])
    averaged = copy.deepcopy(policy)
    diffusers.copy_to(averaged.parameters())
    for mean, first, second in zip(averaged.parameters(), *weights, strict=True):
        torch.testing.assert_close(mean, 0.5 * (first + second))
    torch.testing.assert_close(output(case, averaged), output(case, torchs.module))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(case, dtype, objective):
    """The whole policy in another dtype, on observations as they come; ranges of normalisers stay float32."""
    policy = case.build()
    wanted = output(case, policy)
    ranges = policy.action_normalizer.maximum.clone()
    cast = copy.deepcopy(policy).to(dtype)
    x, t = case.inputs()
    out = cast.denoise(cast.encode(case.obs()), x.to(dtype), t)
    assert out.dtype == dtype and cast.action_normalizer.maximum.dtype == torch.float32
    assert torch.equal(cast.action_normalizer.maximum, ranges)
    out.float().square().mean().backward()
    assert all(p.grad is None or (p.grad.dtype == dtype and p.grad.isfinite().all()) for p in cast.parameters())
    tolerance = 1e-4 if dtype == torch.float64 else 0.1
    torch.testing.assert_close(out.float(), wanted, rtol=tolerance, atol=tolerance)


def test_frozen_parts(case, objective):
    policy = case.build()
    wanted = gradients(case, policy, objective)
    for part, other in (("encoder", "denoiser"), ("denoiser", "encoder")):
        frozen = case.build()
        getattr(frozen, part).requires_grad_(False)
        found = gradients(case, frozen, objective)
        assert found.keys() == {name for name in wanted if name.startswith(other)}
        torch.testing.assert_close(found, {name: wanted[name] for name in found}, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [partial(torch.optim.AdamW, eps=0.1), torch.optim.SGD], ids=["adamw", "sgd"])
def test_fused_optimizers(case, kind, objective):
    trained = []
    for fused in (False, True):
        policy = case.build()
        optimizer = kind(policy.parameters(), lr=0.01, fused=fused)
        for _ in range(2):
            gradients(case, policy, objective)
            optimizer.step()
        trained.append(list(policy.parameters()))
    torch.testing.assert_close(trained[0], trained[1], rtol=1e-4, atol=1e-5)
