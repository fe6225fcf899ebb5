"""ConditionalUnet1D of diffusion_policy and of lerobot: the names of their weights, and their arguments."""

from __future__ import annotations

import re
from typing import Any, cast

import torch
from torch import Tensor, nn

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.integrations import _weights as weights
from minidiff_fast.models import ConditionalUnet1D
from minidiff_fast.models.transformer_for_diffusion import timestep_embedding

LAYERS = {
    "Conv1d": "in_channels out_channels kernel_size stride padding dilation groups padding_mode",
    "ConvTranspose1d": "in_channels out_channels kernel_size stride padding output_padding dilation groups",
    "GroupNorm": "num_groups num_channels eps affine",
    "Linear": "in_features out_features",
    "Mish": "",
}


def same(name: str) -> str:
    """diffusion_policy's names are ours."""
    return name


def lerobot(name: str) -> str:
    """Our name -> lerobot's.

    >>> lerobot("down_modules.0.1.blocks.0.block.1.weight"), lerobot("up_modules.1.2.conv.bias")
    ('down_modules.0.1.conv1.block.1.weight', 'up_modules.1.2.bias')
    """
    name = re.sub(r"\.blocks\.([01])(?=\.|$)", lambda match: f".conv{int(match[1]) + 1}", name)
    return re.sub(r"(modules\.\d+\.2)\.conv(?=\.|$)", r"\1", name)


def from_peer(caller: str, peer: nn.Module, rename: weights.KeyMap, *, tie: bool, **options: Any) -> ConditionalUnet1D:
    """Our U-Net with the arguments, the weights and (checked) the outputs of the peer's."""
    peer = weights.unwrapped(peer)
    arguments = infer(caller, peer, rename)
    with torch.device("meta"):
        ours = ConditionalUnet1D(**arguments, **options)
    weights.check_same_tensors(caller, weights.tensors(ours), weights.tensors(peer), rename)
    weights.check_same_layers(caller, ours, peer, rename, LAYERS)
    weights.take(ours, peer, rename, tie=tie)
    _check_embedding(caller, peer, arguments["diffusion_step_embed_dim"])
    like = cast(nn.Conv1d, ours.final_conv[1]).weight
    timestep = weights.made_up_times(ours.num_train_timesteps, like)
    conditions: dict[str, Tensor] = {}
    if ours.global_cond_dim is not None:
        conditions["global_cond"] = weights.made_up((len(timestep), ours.global_cond_dim), like)
    if ours.local_cond_dim is not None:
        conditions["local_cond"] = weights.made_up((len(timestep), 2 * ours.multiple, ours.local_cond_dim), like)
    sample = weights.made_up((len(timestep), 2 * ours.multiple, ours.input_dim), like)
    weights.check_same_outputs(caller, ours, peer, rename, "final_conv.1", sample, timestep, **conditions)
    return ours


def infer(caller: str, peer: nn.Module, rename: weights.KeyMap) -> dict[str, Any]:
    """The constructor's arguments, from modules and shapes; the peers do not keep them."""
    where = "ConditionalUnet1D as in diffusion_policy or DiffusionConditionalUnet1d as in lerobot 0.6"

    def module(name: str, kind: type[nn.Module]) -> Any:
        try:
            found = peer.get_submodule(rename(name))
        except AttributeError:
            raise InvalidArgument(
                f"{caller}: expected {where}, with module {rename(name)}, got {type(peer).__name__}"
            ) from None
        if not isinstance(found, kind):
            raise InvalidArgument(f"{caller}: {rename(name)} must be {kind.__name__}, got {type(found).__name__}")
        return found

    levels = module("down_modules", nn.ModuleList)
    first = module("down_modules.0.0.blocks.0.block.0", nn.Conv1d)
    film = module("down_modules.0.0.cond_encoder.1", nn.Linear)
    step_dim = module("diffusion_step_encoder.1", nn.Linear).in_features
    local = None
    if getattr(peer, "local_cond_encoder", None) is not None:
        local = module("local_cond_encoder.0.blocks.0.block.0", nn.Conv1d).in_channels
    return {
        "input_dim": first.in_channels,
        "local_cond_dim": local,
        "global_cond_dim": film.in_features - step_dim or None,
        "diffusion_step_embed_dim": step_dim,
        "down_dims": tuple(
            module(f"down_modules.{i}.0.blocks.0.block.0", nn.Conv1d).out_channels for i in range(len(levels))
        ),
        "kernel_size": first.kernel_size[0],
        "n_groups": module("down_modules.0.0.blocks.0.block.1", nn.GroupNorm).num_groups,
        "cond_predict_scale": film.out_features == 2 * first.out_channels,
    }


def _check_embedding(caller: str, peer: nn.Module, step_dim: int) -> None:
    """The layer without weights, before the first Linear."""
    encoder = cast(nn.Sequential, peer.diffusion_step_encoder)
    times = torch.tensor([0.0, 1.0, 50.0], device=next(peer.parameters()).device)
    found = encoder[0](times)
    wanted = timestep_embedding(times, step_dim)
    if found.shape != wanted.shape or not torch.allclose(found.float(), wanted, atol=1e-2):
        raise InvalidArgument(
            f"{caller}: diffusion_step_encoder.0 must be the sinusoidal embedding of {step_dim} channels (sines, then "
            f"cosines, the slowest of wavelength 2 pi 10000), got {type(encoder[0]).__name__}"
        )
