"""TransformerForDiffusion of diffusion_policy: the arguments that made it, and whether it can share."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.integrations import _weights as weights
from minidiff_fast.integrations._unet_keys import same
from minidiff_fast.models import TransformerForDiffusion

PEER = "TransformerForDiffusion as in diffusion_policy"
LAYERS = {
    "Linear": "in_features out_features",
    "LayerNorm": "normalized_shape eps",
    "MultiheadAttention": "embed_dim num_heads dropout batch_first",
    "TransformerDecoderLayer": "norm_first",
    "Dropout": "p",
    "Mish": "",
}


def from_peer(
    caller: str, peer: nn.Module, *, tie: bool, num_train_timesteps: int | None = None, **options: Any
) -> TransformerForDiffusion:
    """Our transformer with the arguments, the weights and (checked) the outputs of the peer's."""
    peer = weights.unwrapped(peer)
    arguments = infer(caller, peer)
    with torch.device("meta"):
        ours = TransformerForDiffusion(**arguments, **options)
    weights.check_same_tensors(caller, weights.tensors(ours), weights.tensors(peer), same)
    weights.check_same_layers(caller, ours, peer, same, LAYERS)
    weights.take(ours, peer, same, tie=tie)
    _check_activations(caller, peer)
    like = ours.pos_emb
    timestep = weights.made_up_times(num_train_timesteps, like)
    sample = weights.made_up((len(timestep), ours.horizon, ours.input_dim), like)
    cond = weights.made_up((len(timestep), ours.n_obs_steps, ours.cond_dim), like)
    weights.check_same_outputs(caller, ours, peer, same, "head", sample, timestep, cond=cond)
    return ours


def infer(caller: str, peer: nn.Module) -> dict[str, Any]:
    """The constructor's arguments, from modules and shapes; the peer does not keep them."""

    def part(name: str) -> Any:
        return weights.attribute(caller, peer, name, PEER)

    _check_shares(caller, part("cond_obs_emb"), part("decoder"), part("encoder"))
    layers = part("decoder.layers")
    return {
        "input_dim": part("input_emb").in_features,
        "output_dim": part("head").out_features,
        "horizon": part("pos_emb").shape[1],
        "n_obs_steps": part("cond_pos_emb").shape[1] - 1,
        "cond_dim": part("cond_obs_emb").in_features,
        "n_layer": len(layers),
        "n_head": layers[0].self_attn.num_heads,
        "n_emb": part("pos_emb").shape[2],
        "p_drop_emb": part("drop").p,
        "p_drop_attn": layers[0].self_attn.dropout,
        "causal_attn": part("mask") is not None,
        "time_as_cond": True,
        "obs_as_cond": True,
        "n_cond_layers": 0,
    }


def _check_activations(caller: str, peer: Any) -> None:
    """Functions, not layers; fresh weights keep them near zero, where GELU and its tanh form are alike."""
    values = torch.linspace(-4, 4, 81)
    for i, layer in enumerate(peer.decoder.layers):
        if not torch.allclose(layer.activation(values), F.gelu(values), rtol=0, atol=1e-5):
            raise InvalidArgument(f"{caller}: decoder.layers.{i}.activation must be GELU, got {layer.activation}")


def _check_shares(caller: str, observations: Any, decoder: Any, encoder: Any) -> None:
    reason = None
    if decoder is None:
        reason = "with time_as_cond=False it is an encoder without observations: nothing belongs to a condition"
    elif observations is None:
        reason = "with cond_dim = 0 it reads no observations: nothing belongs to a condition"
    elif isinstance(encoder, nn.TransformerEncoder):
        reason = (
            f"with n_cond_layers = {len(encoder.layers)} self-attention mixes each sample's timestep into the "
            "observations: no two samples have the same memory"
        )
    if reason is not None:
        raise InvalidArgument(f"{caller}: TransformerForDiffusion left as is, because {reason}")
