"""FiLM against plain torch with repeated conditions, and against Diffusion Policy's own composition."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.nn import FiLM

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ACT = {None: lambda x: x, "silu": F.silu, "mish": F.mish}
C, T = 8, 3


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.float64, requires_grad=True)


def plain(film: FiLM, x: Tensor, sample: Tensor | None, condition: Tensor | None) -> Tensor:
    """Everything repeated K times, channels first, norms out of torch."""
    B, K = x.shape[:2]
    rows = x.flatten(0, 1) if film.channels_first else x.flatten(0, 1).transpose(1, 2)  # [N, C, T]
    parts = [] if sample is None else [sample.expand(B, K, -1).flatten(0, 1)]
    if condition is not None:
        parts.append(condition.repeat_interleave(K, 0))
    joined = sum(parts) if film.projection.combine == "sum" else torch.cat(parts, -1)
    embed = F.linear(ACT[film.projection.activation](joined), film.projection.weight, film.projection.bias)
    named = dict(zip(film.parameter_order, embed.chunk(len(film.parameter_order), -1), strict=True))
    if film.norm == "group":
        rows = F.group_norm(rows, film.num_groups, film.norm_weight, film.norm_bias, film.eps)
    elif film.norm == "layer":
        rows = F.layer_norm(rows.transpose(1, 2), (C,), film.norm_weight, film.norm_bias, film.eps).transpose(1, 2)
    elif film.norm == "rms":
        rows = F.rms_norm(rows.transpose(1, 2), (C,), film.norm_weight, film.eps).transpose(1, 2)
    scale = named["scale"][:, :, None] if "scale" in named else (0.0 if film.form == "adaln" else 1.0)
    scale = 1.0 + scale if film.form == "adaln" else scale
    shift = named["shift"][:, :, None]
    act = ACT[film.activation]
    y = scale * act(rows) + shift if film.activation_at == "norm" else act(scale * rows + shift)
    return (y if film.channels_first else y.transpose(1, 2)).unflatten(0, (B, K))


CASES = {
    "diffusion policy": dict(sample_features=6, condition_features=5, norm="group", num_groups=4, activation="mish", channels_first=True),
    "condition alone": dict(condition_features=5),
    "sample alone": dict(sample_features=6, parameters="shift_scale", form="adaln", norm="layer"),
    "sum": dict(sample_features=6, condition_features=6, combine="sum", embedding_activation="silu", norm="rms"),
    "shift before the activation": dict(condition_features=5, parameters="shift", norm="group", num_groups=2, norm_affine=False, activation="silu", activation_at="output"),
    "no activation": dict(sample_features=6, condition_features=5, embedding_activation=None),
}  # fmt: skip


def build(name: str, K: int, B: int = 3) -> tuple[FiLM, Tensor, dict[str, Tensor]]:
    torch.manual_seed(1)
    options = CASES[name]
    film = FiLM(C, **options, device=DEVICE, dtype=torch.float64)
    for parameter in (film.norm_weight, film.norm_bias):
        if parameter is not None:
            nn.init.normal_(parameter)
    x = draw(B, K, C, T) if film.channels_first else draw(B, K, T, C)
    embeddings = {}
    if "sample_features" in options:
        embeddings["sample"] = draw(B, K, options["sample_features"])
    if "condition_features" in options:
        embeddings["condition"] = draw(B, options["condition_features"])
    return film, x, embeddings


@pytest.mark.parametrize("K", [1, 5])
@pytest.mark.parametrize("name", CASES)
def test_is_the_plain_composition(name, K):
    film, x, embeddings = build(name, K)
    got = film(x, **embeddings)
    want = plain(film, x, embeddings.get("sample"), embeddings.get("condition"))
    torch.testing.assert_close(got, want)
    leaves = [x, *embeddings.values(), *film.parameters()]
    dy = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, leaves, dy), torch.autograd.grad(want, leaves, dy), strict=True):
        torch.testing.assert_close(a, b)


def test_is_the_film_of_diffusion_policy():
    """Its block reads the linear layer's output as [N, 2, C, 1]: the first half is the scale, the second the bias."""
    film, x, embeddings = build("diffusion policy", 4)
    encoder = nn.Sequential(nn.Mish(), nn.Linear(11, 2 * C, device=DEVICE, dtype=torch.float64))
    encoder[1].load_state_dict(film.projection.state_dict())
    norm = nn.GroupNorm(4, C, device=DEVICE, dtype=torch.float64)
    norm.load_state_dict({"weight": film.norm_weight, "bias": film.norm_bias})
    rows = F.mish(norm(x.flatten(0, 1)))
    joined = torch.cat([embeddings["sample"].flatten(0, 1), embeddings["condition"].repeat_interleave(4, 0)], -1)
    embed = encoder(joined).reshape(-1, 2, C, 1)
    torch.testing.assert_close(film(x, **embeddings).flatten(0, 1), embed[:, 0] * rows + embed[:, 1])


def test_residual_is_added():
    film, x, embeddings = build("sum", 2)
    residual = draw(*x.shape)
    torch.testing.assert_close(film(x, **embeddings, residual=residual), film(x, **embeddings) + residual)


def test_one_embedding_for_all_samples():
    film, x, embeddings = build("no activation", 4)
    one = embeddings["sample"][:1, :1]
    torch.testing.assert_close(
        film(x, sample=one, condition=embeddings["condition"]),
        film(x, sample=one.expand(3, 4, -1), condition=embeddings["condition"]),
    )


def test_state_dict_copies_and_pickles():
    film, x, embeddings = build("diffusion policy", 2)
    assert list(film.state_dict()) == ["norm_weight", "norm_bias", "projection.weight", "projection.bias"]
    assert film.projection.weight.shape == (2 * C, 11)
    for twin in (copy.deepcopy(film), pickle.loads(pickle.dumps(film))):
        assert torch.equal(twin(x, **embeddings), film(x, **embeddings))
    assert "parameters='scale_shift'" in repr(film) and "condition_features=5" in repr(film)


@pytest.mark.parametrize("name", ["diffusion policy", "condition alone"])
def test_compiles_without_graph_breaks(name):
    film, x, embeddings = build(name, 2)
    torch._dynamo.reset()
    compiled = torch.compile(film, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, **embeddings), film(x, **embeddings))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "FiLM: give sample_features, condition_features or both"),
        ({"sample_features": 0}, "sample_features must be an integer of at least 1, got 0"),
        ({"sample_features": 3, "condition_features": 4, "combine": "sum"}, "needs condition_features = sample_features = 3, got 4"),
        ({"condition_features": 4, "parameters": "scale"}, "parameters must be 'scale_shift', 'shift_scale' or 'shift', got 'scale'"),
        ({"condition_features": 4, "norm": "group"}, "num_groups belongs to norm='group', got None"),
        ({"condition_features": 4, "norm": "group", "num_groups": 3}, "num_groups must divide channels = 8, got 3"),
        ({"condition_features": 4, "form": "dit"}, "form must be one of 'film', 'adaln', got 'dit'"),
        ({"condition_features": 4, "embedding_activation": "gelu"}, "activation must be None, 'silu' or 'mish', got 'gelu'"),
    ],
)  # fmt: skip
def test_bad_construction(options, message):
    with pytest.raises(InvalidArgument, match=message):
        FiLM(C, **options)


def test_bad_input():
    film, x, embeddings = build("diffusion policy", 2)
    sample, condition = embeddings["sample"], embeddings["condition"]
    with pytest.raises(InvalidArgument, match=r"FiLM: condition is missing \(the module has condition_features = 5\)"):
        film(x, sample=sample)
    with pytest.raises(InvalidArgument, match=r"sample must be \[B, K, Ce\] = \[B, K, 6\], got \[3, 2, 5\]"):
        film(x, sample=sample[..., 1:], condition=condition)
    with pytest.raises(InvalidArgument, match=r"condition must be \[B, Cg\] = \[3, 5\], got \[6, 5\]"):
        film(x, sample=sample, condition=condition.repeat_interleave(2, 0))
    with pytest.raises(InvalidArgument, match="sample came, and the module was made without sample_features"):
        FiLM(C, condition_features=5)(x, sample=sample, condition=condition)
