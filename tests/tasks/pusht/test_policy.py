"""The U-Net as a Push-T policy's denoiser: it trains, acts, and its options are checked."""

from __future__ import annotations

import pytest
import torch

from minidiff_fast.level2 import Level2Batch, level2_step
from minidiff_fast.nn.normalizer import MinMaxNormalizer
from minidiff_fast.objectives.imitation import DenoisingLoss
from minidiff_fast.tasks.pusht.policy import (
    InvalidOption,
    PolicyConfig,
    PushTActor,
    build_policy,
    build_process,
    build_scheduler,
)


def config(**changes):
    options = dict(obs="state", denoiser="unet", unet_width=8, encoder_width=8, encoder_blocks=1, num_inference_steps=2)
    return PolicyConfig(**{**options, **changes})


def make(config):
    torch.manual_seed(0)
    return build_policy(
        config,
        {"state": MinMaxNormalizer(torch.zeros(5), torch.full((5,), 512.0))},
        MinMaxNormalizer(torch.zeros(2), torch.full((2,), 512.0)),
    )


@pytest.mark.parametrize("prediction", ["sample", "flow"])
def test_the_unet_trains_and_acts(prediction, monkeypatch):
    monkeypatch.setenv("MINIDIFF_FAST_IMPL", "reference")
    settings = config(prediction=prediction)
    policy, objective = make(settings), DenoisingLoss(build_process(settings))
    obs = {"state": 512 * torch.rand(2, 2, 5)}
    batch = Level2Batch.draw(obs, torch.rand(2, 16, 2), 60, objective)  # more samples than timesteps: the table is used
    loss = level2_step(policy, objective, batch, chunk=55).loss
    assert torch.isfinite(loss)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in policy.parameters() if p.requires_grad)
    actor = PushTActor(policy.eval(), build_scheduler(settings), settings)
    assert actor({"state": obs["state"].numpy()}).shape == (2, 8, 2)


@pytest.mark.parametrize("changes", [dict(horizon=18), dict(unet_width=12), dict(unet_kernel=4)])
def test_sizes_that_make_no_unet(changes):
    with pytest.raises(InvalidOption, match="the unet needs a horizon that is a multiple of 4"):
        config(**changes)
    config(denoiser="mlp", **changes)
