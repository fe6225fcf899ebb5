"""AdaLN against a DiT block in plain torch with repeated conditions, and what it evaluates how often."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.nn import AdaLN, Modulation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, T, C = 3, 4, 8
E = 6


class Encoder(nn.Module):
    """Sines of the timestep and a linear layer; counts its calls and rows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, E)
        self.rows: list[int] = []

    def forward(self, timesteps: Tensor) -> Tensor:
        self.rows.append(timesteps.shape[0])
        angles = timesteps[:, None].to(self.linear.weight.dtype) * torch.tensor([1.0, 0.1], device=timesteps.device)
        return self.linear(torch.cat([angles.sin(), angles.cos()], -1))


def build(encoder: bool = False, **options) -> AdaLN:
    torch.manual_seed(2)
    made = Encoder() if encoder else None
    adaln = AdaLN(C, encoder=made, zero_init=False, **options)
    return adaln.to(DEVICE, torch.float64)


def branch(x: Tensor) -> Tensor:
    return torch.tanh(x.cumsum(2))


def block(adaln: AdaLN, x: Tensor, modulations: tuple[Modulation, ...]) -> Tensor:
    for modulation in modulations:
        x = adaln.gate(branch(adaln.modulate(x, modulation)), modulation, residual=x)
    return x


def plain_block(adaln: AdaLN, x: Tensor, sample: Tensor | None, condition: Tensor | None) -> Tensor:
    """Every embedding repeated for every sample, six chunks, F.layer_norm."""
    K = x.shape[1]
    parts = [] if sample is None else [sample.expand(B, K, -1)]
    parts += [] if condition is None else [condition[:, None].expand(-1, K, -1)]
    joined = sum(parts) if adaln.projection.combine == "sum" else torch.cat(parts, -1)
    made = F.linear(F.silu(joined), adaln.projection.weight, adaln.projection.bias)
    for chunk in made.chunk(adaln.branches, -1):
        named = dict(zip(adaln.parameter_order, chunk[:, :, None].chunk(3, -1), strict=True))
        h = F.layer_norm(x, (C,), eps=adaln.eps) if adaln.norm == "layer" else F.rms_norm(x, (C,), eps=adaln.eps)
        x = x + named["gate"] * branch(h * (1 + named["scale"]) + named["shift"])
    return x


CASES = {
    "sum": dict(sample_features=E, condition_features=E),
    "cat": dict(sample_features=E, condition_features=5, combine="cat", order="scale_shift"),
    "sample": dict(sample_features=E, norm="rms"),
    "condition": dict(condition_features=5),
}


def compare(ours: Tensor, theirs: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs)
    dy = torch.randn_like(theirs)
    for a, b in zip(torch.autograd.grad(ours, leaves, dy), torch.autograd.grad(theirs, leaves, dy), strict=True):
        torch.testing.assert_close(a, b)


def inputs_of(case: dict, K: int) -> tuple[Tensor, dict[str, Tensor]]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, device=DEVICE, requires_grad=True)

    embeddings = {}
    if "sample_features" in case:
        embeddings["sample"] = draw(B, K, E)
    if "condition_features" in case:
        embeddings["condition"] = draw(B, case["condition_features"])
    return draw(B, K, T, C), embeddings


@pytest.mark.parametrize("K", [1, 5])
@pytest.mark.parametrize("name", CASES)
def test_is_a_dit_block(name, K):
    adaln = build(branches=2, **CASES[name])
    x, embeddings = inputs_of(CASES[name], K)
    ours = block(adaln, x, adaln(**embeddings))
    theirs = plain_block(adaln, x, embeddings.get("sample"), embeddings.get("condition"))
    compare(ours, theirs, [x, *embeddings.values(), *adaln.parameters()])


@pytest.mark.parametrize("name", ["sum", "cat", "sample"])
@pytest.mark.parametrize(
    ("K", "count", "rows"), [(1, 7, 3), (2, 7, 6), (2, 6, 6), (5, 7, 7), (5, 100, 15), (5, None, 15)]
)
def test_timesteps_are_encoded_once_each(name, K, count, rows):
    """A table of all timesteps where there are more samples than timesteps; the same block either way."""
    adaln = build(encoder=True, branches=2, num_train_timesteps=count, **CASES[name])
    x, embeddings = inputs_of(CASES[name], K)
    timesteps = torch.randint(0, count or 7, (B, K), device=DEVICE)
    condition = embeddings.get("condition")
    modulations = adaln(timesteps, condition=condition)
    assert adaln.encoder.rows == [rows]
    sample = adaln.encoder(timesteps.flatten()).unflatten(0, (B, K))
    leaves = [x, *adaln.parameters(), *([] if condition is None else [condition])]
    compare(block(adaln, x, modulations), plain_block(adaln, x, sample, condition), leaves)


@pytest.mark.parametrize("name", ["cat", "sample"])
def test_the_linear_layer_runs_on_the_table_where_it_splits(name, monkeypatch):
    from minidiff_fast.nn import _modulation

    seen = []
    real = F.linear
    monkeypatch.setattr(
        _modulation.F, "linear", lambda x, *rest: (seen.append(x.shape[:-1].numel()), real(x, *rest))[1]
    )
    adaln = build(encoder=True, num_train_timesteps=7, **CASES[name])
    _, embeddings = inputs_of(CASES[name], 50)
    adaln(torch.randint(0, 7, (B, 50), device=DEVICE), condition=embeddings.get("condition"))
    assert max(seen) == 7


def test_floating_point_timesteps_are_encoded_one_by_one():
    adaln = build(encoder=True, num_train_timesteps=7, **CASES["sample"])
    adaln(torch.rand(B, 5, device=DEVICE, dtype=torch.float64))
    assert adaln.encoder.rows == [15]


@pytest.mark.parametrize("name", ["sum", "cat", "sample"])
def test_one_timestep_for_all_is_encoded_once(name):
    """Sampling: every sample is at the same step."""
    adaln = build(encoder=True, branches=2, num_train_timesteps=7, **CASES[name])
    x, embeddings = inputs_of(CASES[name], 5)
    condition = embeddings.get("condition")
    one = torch.full((1, 1), 3, device=DEVICE)
    ours = block(adaln, x, adaln(one, condition=condition))
    assert adaln.encoder.rows == [1]
    torch.testing.assert_close(ours, block(adaln, x, adaln(one.expand(B, 5), condition=condition)))


def test_starts_as_the_identity():
    adaln = AdaLN(C, condition_features=5, branches=2)
    x = torch.randn(B, 2, T, C)
    assert torch.equal(block(adaln, x, adaln(condition=torch.randn(B, 5))), x)


def test_without_a_gate():
    """The last layer of DiT: shift and scale alone."""
    adaln = build(condition_features=5, gated=False)
    (modulation,) = adaln(condition=torch.randn(B, 5, dtype=torch.float64, device=DEVICE))
    assert modulation.gate is None and adaln.projection.weight.shape == (2 * C, 5)
    with pytest.raises(InvalidArgument, match="this modulation has no gate"):
        adaln.gate(torch.randn(B, 2, T, C, dtype=torch.float64, device=DEVICE), modulation)


def test_state_dict_copies_and_pickles():
    adaln = build(encoder=True, branches=2, num_train_timesteps=4, **CASES["sum"])
    assert list(adaln.state_dict()) == [
        "encoder.linear.weight", "encoder.linear.bias", "projection.weight", "projection.bias",
    ]  # fmt: skip
    assert adaln.projection.weight.shape == (6 * C, E)
    x, embeddings = inputs_of(CASES["sum"], 5)
    timesteps, condition = torch.randint(0, 4, (B, 5), device=DEVICE), embeddings["condition"]
    expected = block(adaln, x, adaln(timesteps, condition=condition))
    for twin in (copy.deepcopy(adaln), pickle.loads(pickle.dumps(adaln))):
        assert torch.equal(block(twin, x, twin(timesteps, condition=condition)), expected)
    assert "branches=2" in repr(adaln) and "num_train_timesteps=4" in repr(adaln)


@pytest.mark.parametrize("integers", [True, False])
@pytest.mark.parametrize("name", ["sum", "cat"])
def test_compiles_without_graph_breaks(name, integers):
    class Quiet(Encoder):
        def forward(self, timesteps: Tensor) -> Tensor:
            return self.linear(timesteps[:, None].to(torch.float32).expand(-1, 4).sin())

    adaln = AdaLN(C, encoder=Quiet(), num_train_timesteps=4, zero_init=False, **CASES[name]).to(DEVICE)
    condition = torch.randn(B, CASES[name]["condition_features"], device=DEVICE)
    x = torch.randn(B, 5, T, C, device=DEVICE)
    timesteps = torch.randint(0, 4, (B, 5), device=DEVICE) if integers else torch.rand(B, 5, device=DEVICE)

    def run(x, timesteps, condition):
        return block(adaln, x, adaln(timesteps, condition=condition))

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, timesteps, condition), run(x, timesteps, condition))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "AdaLN: give sample_features, condition_features or both"),
        ({"condition_features": 5, "norm": "group"}, "norm must be 'layer', 'rms' or None, got 'group'"),
        ({"condition_features": 5, "norm": "batch"}, "norm must be one of"),
        ({"condition_features": 5, "order": "gate"}, "order must be 'shift_scale' or 'scale_shift', got 'gate'"),
        ({"condition_features": 5, "branches": 0}, "branches must be an integer of at least 1, got 0"),
        ({"condition_features": 5, "encoder": nn.Identity()}, "encoder needs sample_features"),
        ({"sample_features": 5, "num_train_timesteps": 9}, "encoder is None"),
        ({"sample_features": 5, "condition_features": 4}, "needs condition_features = sample_features = 5, got 4"),
    ],
)
def test_bad_construction(options, message):
    with pytest.raises(InvalidArgument, match=message):
        AdaLN(C, **options)


def test_bad_input():
    adaln = build(encoder=True, num_train_timesteps=4, **CASES["sum"])
    _, embeddings = inputs_of(CASES["sum"], 5)
    condition, timesteps = embeddings["condition"], torch.zeros(B, 5, dtype=torch.int64, device=DEVICE)
    with pytest.raises(InvalidArgument, match="takes timesteps, which its encoder needs"):
        adaln(condition=condition, sample=embeddings["sample"])
    with pytest.raises(InvalidArgument, match="sample came"):
        adaln(timesteps, condition=condition, sample=embeddings["sample"])
    with pytest.raises(InvalidArgument, match="condition is missing"):
        adaln(timesteps)
    for wrong in (timesteps[0], timesteps[:2], timesteps[0, 0]):
        with pytest.raises(InvalidArgument, match=r"timesteps must be \[B or 1, K or 1\] = \[3, K\]"):
            adaln(wrong, condition=condition)
    with pytest.raises(InvalidArgument, match="timesteps must be int32, int64 or floating-point, got torch.bool"):
        adaln(timesteps.bool(), condition=condition)
    with pytest.raises(InvalidArgument, match=r"encoder\(timesteps\) must be \[R, Ce\] = \[4, 6\], got \[4\]"):
        wrong_encoder = AdaLN(C, sample_features=6, encoder=nn.Identity(), num_train_timesteps=4)
        wrong_encoder(timesteps)
    with pytest.raises(InvalidArgument, match="this module takes sample; it has no encoder"):
        build(sample_features=E)(timesteps)
