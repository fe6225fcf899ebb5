"""lerobot's DiffusionPolicy: one camera, two observation steps of 96 x 96, 16 actions; all at a quarter of its widths.

A quarter of the widths in the ResNet-18 and in the U-Net keeps the ratio of their work. "repeat" is the policy's own
forward on a batch dict repeated K times, "encode once" the policy's networks with the condition's features repeated by
hand, "ours" the adapter. The ResNet is that of transformers, with random weights.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from integrations import Contest, Side
from torch import Tensor, nn

from minidiff_fast.integrations.lerobot import level2

B = 4
WIDTHS, SIZE, STEPS, TOKENS, ACTIONS = (128, 256, 512), 96, 2, 16, 2
EXAMPLES = str(Path(__file__).resolve().parents[1] / "examples")


def resnet(weights: Any = None, width: int = 16) -> nn.Module:
    """A ResNet-18 of ``width`` instead of 64 channels; children as torchvision's: the last two are not the backbone."""
    from transformers import ResNetConfig, ResNetModel

    widths = [width, 2 * width, 4 * width, 8 * width]
    config = ResNetConfig(embedding_size=width, hidden_sizes=widths, depths=[2, 2, 2, 2], layer_type="basic")
    model = ResNetModel(config)
    return nn.Sequential(model.embedder, *model.encoder.stages, nn.Identity(), nn.Identity())


@contextmanager
def feeding(noise: Tensor, times: Tensor) -> Iterator[None]:
    """What a peer draws in its loss."""
    randn, randint = _Gives(noise), _Gives(times)
    with mock.patch.object(torch, "randn", randn), mock.patch.object(torch, "randint", randint):
        yield


class _Gives:
    def __init__(self, value: Tensor) -> None:
        self.value = value

    def __call__(self, *_: Any, **__: Any) -> Tensor:
        return self.value


def side(loss: Callable[[], Tensor], module: nn.Module, *inputs: Tensor) -> Side:
    """Compared and cleared: the gradients of every parameter of ``module``."""
    trained = [p for p in module.parameters() if p.requires_grad]

    def gradients() -> list[Tensor]:
        return [p.grad for p in trained if p.grad is not None]

    return Side(loss, gradients, [*trained, *inputs])


def policy_of(device: torch.device) -> Any:
    """The real policy, with the ResNet above where it asks torchvision for one."""
    sys.path.insert(0, EXAMPLES)
    with importlib.import_module("lerobot_wheel").policies() as load:
        modeling, types = load("policies.diffusion.modeling_diffusion"), load("configs.types")
        kind, feature = types.FeatureType, types.PolicyFeature
        config = load("policies.diffusion.configuration_diffusion").DiffusionConfig(
            input_features={
                "observation.state": feature(type=kind.STATE, shape=(2,)),
                "observation.image": feature(type=kind.VISUAL, shape=(3, SIZE, SIZE)),
            },
            output_features={"action": feature(type=kind.ACTION, shape=(ACTIONS,))},
            device=device.type, n_obs_steps=STEPS, horizon=TOKENS, down_dims=WIDTHS,
            pretrained_backbone_weights=None, use_group_norm=True,
        )  # fmt: skip
        models = SimpleNamespace(models=SimpleNamespace(resnet18=resnet))
        with mock.patch.object(modeling, "torchvision", models):
            policy = modeling.DiffusionPolicy(config)
    return policy.to(device)


def build(k: int, device: torch.device) -> Contest:
    """Repeated batch, repeated features, ours; one policy, whose weights all sides share."""
    torch.manual_seed(0)
    policy = policy_of(device)
    adapter = level2(policy)
    batch = {
        "observation.state": torch.randn(B, STEPS, 2, device=device),
        "observation.image": torch.rand(B, STEPS, 3, SIZE, SIZE, device=device),
        "action": torch.randn(B, TOKENS, ACTIONS, device=device),
        "action_is_pad": torch.zeros(B, TOKENS, dtype=torch.bool, device=device),
    }
    drawn = adapter.draw(batch, k)
    noise, times = drawn.noise.flatten(0, 1), drawn.timesteps.flatten()
    rows = {name: value.repeat_interleave(k, 0) for name, value in batch.items()}
    model = policy.diffusion

    def repeat() -> Tensor:
        with feeding(noise, times):
            loss: Tensor = policy.forward(rows)[0]
        return loss

    def once() -> Tensor:
        images = {**batch, "observation.images": batch["observation.image"].unsqueeze(-4)}
        features = model._prepare_global_conditioning(images).repeat_interleave(k, 0)
        noisy = model.noise_scheduler.add_noise(rows["action"], noise, times)
        return F.mse_loss(model.unet(noisy, times, global_cond=features), noise)

    def ours() -> Tensor:
        return adapter.objective.per_sample(adapter, adapter.encode(drawn.obs), drawn).mean()

    inputs = [*batch.values(), *rows.values(), noise, times]
    return {
        "repeat": side(repeat, policy, *inputs),
        "encode once": side(once, policy, *inputs),
        "ours": side(ours, policy, *inputs),
    }
