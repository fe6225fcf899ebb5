"""ConditionalUnet1D against lerobot's DiffusionConditionalUnet1d, the real one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from minidiff_fast.integrations import _unet_keys
from minidiff_fast.models import ConditionalUnet1D


@pytest.fixture(scope="module")
def peer(lerobot):
    """The module lerobot.policies.diffusion.modeling_diffusion."""
    return lerobot("policies.diffusion.modeling_diffusion")


def lerobot_keys(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our (and diffusion_policy's) names -> lerobot's."""
    return {_unet_keys.lerobot(name): value for name, value in state.items()}


def build(peer, scale, dims=(16, 32, 24), kernel=5, dtype=torch.float64):
    torch.manual_seed(0)
    ours = ConditionalUnet1D(
        3, global_cond_dim=9, diffusion_step_embed_dim=16, down_dims=dims, kernel_size=kernel, n_groups=8,
        cond_predict_scale=scale, impl="reference",
    )  # fmt: skip
    config = SimpleNamespace(
        diffusion_step_embed_dim=16, down_dims=dims, kernel_size=kernel, n_groups=8, use_film_scale_modulation=scale,
        action_feature=SimpleNamespace(shape=(3,)), gradient_checkpointing=False,
    )  # fmt: skip
    theirs = peer.DiffusionConditionalUnet1d(config, global_cond_dim=9)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    theirs.load_state_dict(lerobot_keys(ours.state_dict()), strict=True)
    return ours.to(dtype), theirs.to(dtype)


def run(model, sample, timestep, cond, dtype):
    # Their embedding of the timestep is float32 for integers, and their layers take their own dtype.
    if dtype == torch.float64:
        timestep = timestep.double()
    return model(sample.to(dtype), timestep, global_cond=cond.to(dtype))


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize(("dims", "kernel"), [((16, 32, 24), 5), ((8, 16), 3), ((32,), 3)])
def test_outputs_and_every_gradient(peer, scale, k, dims, kernel):
    ours, theirs = build(peer, scale, dims, kernel)
    torch.manual_seed(1)
    sample, timestep, cond = torch.randn(2 * k, 8, 3), torch.randint(0, 100, (2 * k,)), torch.randn(2, 9)
    mine = run(ours, sample, timestep, cond, torch.float64)
    peers = run(theirs, sample, timestep, cond.repeat_interleave(k, 0), torch.float64)
    print(f"largest difference of the outputs: {(mine - peers).abs().max():.1e}")
    torch.testing.assert_close(mine, peers, rtol=1e-10, atol=1e-11)
    cotangent = torch.randn(mine.shape, dtype=mine.dtype)
    mine.backward(cotangent)
    peers.backward(cotangent)
    gradients = lerobot_keys({name: p.grad for name, p in ours.named_parameters()})
    wanted = {name: p.grad for name, p in theirs.named_parameters()}
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("scale", [False, True])
def test_float32(peer, scale):
    ours, theirs = build(peer, scale, dtype=torch.float32)
    torch.manual_seed(1)
    sample, timestep, cond = torch.randn(10, 16, 3), torch.randint(0, 100, (10,)), torch.randn(2, 9)
    with torch.no_grad():
        mine = run(ours, sample, timestep, cond, torch.float32)
        peers = run(theirs, sample, timestep, cond.repeat_interleave(5, 0), torch.float32)
        true = run(ours.double(), sample, timestep.float(), cond, torch.float64)
    print(f"largest difference: {(mine - peers).abs().max():.1e}; from float64: {(mine - true).abs().max():.1e} "
          f"(theirs {(peers - true).abs().max():.1e})")  # fmt: skip
    assert (mine - peers).abs().max() <= 1e-5 * true.abs().max()


def test_key_names_map_both_ways(peer):
    ours, theirs = build(peer, True)
    assert lerobot_keys(ours.state_dict()).keys() == theirs.state_dict().keys()
