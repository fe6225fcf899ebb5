"""BroadcastLinear against a linear layer over repeated conditions."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.nn import BroadcastLinear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ACT = {None: lambda x: x, "silu": F.silu, "mish": F.mish}


def repeated(layer: nn.Linear, x, g, activation, combine):
    g = g[:, None].expand(-1, x.shape[1], -1)
    return layer(ACT[activation](x + g if combine == "sum" else torch.cat([x, g], -1)))


@pytest.mark.parametrize("K", [1, 5])
@pytest.mark.parametrize("activation", [None, "silu", "mish"])
@pytest.mark.parametrize("combine", ["cat", "sum"])
def test_is_a_linear_over_repeated_conditions(combine, activation, K):
    torch.manual_seed(0)
    plain = nn.Linear(6 if combine == "sum" else 10, 7, device=DEVICE, dtype=torch.float64)
    ours = BroadcastLinear(
        6, 6 if combine == "sum" else 4, 7, activation=activation, combine=combine, device=DEVICE, dtype=torch.float64
    )
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(3, K, 6, device=DEVICE, dtype=torch.float64, requires_grad=True)
    g = torch.randn(3, ours.in_features_condition, device=DEVICE, dtype=torch.float64, requires_grad=True)
    got, want = ours(x, g), repeated(plain, x, g, activation, combine)
    torch.testing.assert_close(got, want)
    dy = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad(got, (x, g, ours.weight, ours.bias), dy),
        torch.autograd.grad(want, (x, g, plain.weight, plain.bias), dy),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("bias", [True, False])
def test_parameters_are_those_of_a_linear_layer(bias):
    torch.manual_seed(3)
    plain = nn.Linear(10, 7, bias=bias)
    torch.manual_seed(3)
    ours = BroadcastLinear(6, 4, 7, bias=bias)
    assert list(ours.state_dict()) == list(plain.state_dict())
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
    plain.load_state_dict(ours.state_dict())


def test_copies_and_pickles():
    layer = BroadcastLinear(6, 4, 7, activation="silu", device=DEVICE)
    x, g = torch.randn(2, 3, 6, device=DEVICE), torch.randn(2, 4, device=DEVICE)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x, g), layer(x, g))
    assert "activation='silu', combine='cat'" in repr(layer)


def test_compiles_without_graph_breaks():
    layer = BroadcastLinear(6, 4, 7, activation="mish", device=DEVICE)
    x, g = torch.randn(2, 3, 6, device=DEVICE), torch.randn(2, 4, device=DEVICE)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, g), layer(x, g))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((6, 4, 0), {}, "BroadcastLinear: out_features must be an integer of at least 1, got 0"),
        ((6, 4.0, 7), {}, "in_features_condition must be an integer"),
        ((6, 4, 7), {"combine": "sum"}, "needs in_features_condition = in_features_sample = 6, got 4"),
        ((6, 4, 7), {"combine": "add"}, "combine must be 'cat' or 'sum'"),
        ((6, 4, 7), {"activation": "relu"}, "activation must be None, 'silu' or 'mish'"),
    ],
)
def test_bad_construction(arguments, options, message):
    with pytest.raises(InvalidArgument, match=message):
        BroadcastLinear(*arguments, **options)


def test_bad_input_names_the_argument():
    layer = BroadcastLinear(6, 4, 7)
    with pytest.raises(InvalidArgument, match=r"g must be \[B, Cg\] = \[2, Cg\], got \[6, 4\]"):
        layer(torch.randn(2, 3, 6), torch.randn(6, 4))
