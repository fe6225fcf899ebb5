"""Layers put in the place of those whose parameters a model reads itself: refused, never ignored."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.models import ConditionalUnet1D, TransformerForDiffusion


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIDIFF_FAST_IMPL", "reference")


class Adapted(nn.Module):
    """As peft's layers: it has the base layer's weight and does more than it."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def forward(self, *args, **kwargs):
        return 2 * self.base_layer(*args, **kwargs)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def unet() -> ConditionalUnet1D:
    return ConditionalUnet1D(2, global_cond_dim=4, down_dims=(8, 16), diffusion_step_embed_dim=8)


def predict(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x, cond = torch.randn(2, 3, 4, 2, generator=generator), torch.randn(2, 4, generator=generator)
    if isinstance(model, TransformerForDiffusion):
        cond = cond[:, None]
    return model.denoise(model.encode(cond), x, torch.arange(6).view(2, 3))


@pytest.mark.parametrize(
    "path",
    [
        "down_modules.0.0.cond_encoder.1",
        "down_modules.0.0.blocks.0.block.0",
        "down_modules.0.0.blocks.0.block.1",
        "down_modules.0.0.residual_conv",
        "down_modules.0.2.conv",
        "up_modules.0.2.conv",
    ],
)
def test_the_unet_refuses(path: str) -> None:
    model = unet()
    model.set_submodule(path, Adapted(model.get_submodule(path)))
    with pytest.raises(InvalidArgument, match=r"ConditionalUnet1D: reads the parameters .*Adapted.*merge_and_unload"):
        predict(model)


@pytest.mark.parametrize("path", ["decoder.layers.0.self_attn", "decoder.layers.0.multihead_attn"])
def test_the_transformer_refuses(path: str) -> None:
    model = TransformerForDiffusion(2, 2, 4, n_obs_steps=1, cond_dim=4, n_layer=1, n_head=2, n_emb=16)
    model.set_submodule(path, Adapted(model.get_submodule(path)))
    with pytest.raises(
        InvalidArgument, match=r"TransformerForDiffusion: reads the parameters of its MultiheadAttention"
    ):
        predict(model)


def test_layers_that_are_called_may_be_anything() -> None:
    model = unet()
    before = predict(model)
    model.diffusion_step_encoder[3] = Adapted(model.diffusion_step_encoder[3])
    assert not torch.equal(predict(model), before)


def test_parametrised_weights_count() -> None:
    model = unet()
    linear = model.down_modules[0][0].cond_encoder[1]
    with torch.no_grad():
        linear.weight.mul_(2)
    wanted = predict(model)
    with torch.no_grad():
        linear.weight.div_(2)
    parametrize.register_parametrization(linear, "weight", Doubled())
    torch.testing.assert_close(predict(model), wanted)


def test_hooks_that_make_a_weight_are_refused() -> None:
    model = unet()
    with pytest.warns(FutureWarning, match="weight_norm"):
        torch.nn.utils.weight_norm(model.down_modules[0][0].blocks[0].block[0])
    with pytest.raises(InvalidArgument, match=r"pre-hook of one .*parametrizations"):
        predict(model)


def test_a_patched_forward_is_refused() -> None:
    model = unet()
    linear = model.down_modules[0][0].cond_encoder[1]
    linear.forward = lambda x: 2 * x
    with pytest.raises(InvalidArgument, match="would go unheard"):
        predict(model)
