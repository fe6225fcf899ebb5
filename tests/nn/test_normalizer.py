"""MinMaxNormalizer: the map, its inverse, constant channels, saving, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from minidiff_fast.errors import CheckpointError, DataError, InvalidArgument
from minidiff_fast.nn.normalizer import MinMaxNormalizer


@pytest.fixture
def data() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(7, 5, 4, generator=generator) * torch.tensor([512.0, 6.28, 0.01, 1e4]) - 3.0
    values[..., 2] = 7.25  # constant
    return values


def test_range_maps_to_plus_minus_one(data: torch.Tensor) -> None:
    y = MinMaxNormalizer.fit(data)(data).reshape(-1, 4)
    for channel in (0, 1, 3):
        assert y[:, channel].min() == pytest.approx(-1.0, abs=1e-6)
        assert y[:, channel].max() == pytest.approx(1.0, abs=1e-6)
    assert torch.equal(y[:, 2], torch.zeros(35))


def test_formula_matches_scale_and_offset(data: torch.Tensor) -> None:
    x = data.reshape(-1, 4).double()
    lo, hi = x.amin(0), x.amax(0)
    extent = torch.where(hi - lo < 1e-4, torch.full_like(lo, 2.0), hi - lo)
    scale = 2.0 / extent
    offset = torch.where(hi - lo < 1e-4, -lo, -1.0 - scale * lo)
    torch.testing.assert_close(MinMaxNormalizer.fit(data)(x), x * scale + offset, rtol=1e-6, atol=1e-6)


def test_inverse(data: torch.Tensor) -> None:
    normalizer = MinMaxNormalizer.fit(data)
    torch.testing.assert_close(normalizer.inverse(normalizer(data)), data, rtol=1e-6, atol=1e-3)
    outside = torch.tensor([9999.0, -20.0, 8.0, 0.0])
    assert normalizer(outside)[0] > 1.0  # not clipped
    torch.testing.assert_close(normalizer.inverse(normalizer(outside)), outside, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("extent", [0.0, 0.9e-4])
def test_constant_channel_is_shifted_not_scaled(extent: float) -> None:
    normalizer = MinMaxNormalizer(torch.tensor([0.5]), torch.tensor([0.5 + extent]))
    assert normalizer(torch.tensor([0.5])).item() == 0.0
    assert normalizer(torch.tensor([2.5])).item() == pytest.approx(2.0)
    assert normalizer.inverse(torch.tensor([0.0])).item() == 0.5


def test_numpy_and_dtypes() -> None:
    normalizer = MinMaxNormalizer.fit(np.array([[0, 10], [512, 20]], dtype=np.int64))
    assert normalizer.minimum.tolist() == [0.0, 10.0]
    assert normalizer(torch.tensor([[256, 15]])).dtype == torch.float32
    assert normalizer(torch.tensor([[256.0, 15.0]], dtype=torch.bfloat16)).dtype == torch.float32
    assert normalizer(torch.tensor([[256.0, 15.0]], dtype=torch.float64)).dtype == torch.float64


def test_fit_does_not_hold_on_to_the_data(data: torch.Tensor) -> None:
    row = data[0, 0].clone()
    normalizer = MinMaxNormalizer(row, row)
    row.fill_(float("nan"))
    assert torch.isfinite(normalizer.minimum).all()


def test_state_dict_round_trip(data: torch.Tensor) -> None:
    source = MinMaxNormalizer.fit(data)
    assert set(source.state_dict()) == {"minimum", "maximum"}
    target = MinMaxNormalizer.identity(4)
    assert torch.equal(target(data), data)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(data), source(data))


def test_state_dict_of_another_width_is_refused_before_anything_changes(data: torch.Tensor) -> None:
    target = torch.nn.ModuleDict({"action": MinMaxNormalizer.identity(2)})
    state = {f"action.{k}": v for k, v in MinMaxNormalizer.fit(data).state_dict().items()}
    with pytest.raises(CheckpointError, match=r"action\.minimum must be \[2\].*got \[4\]"):
        target.load_state_dict(state)
    assert target["action"].minimum.tolist() == [-1.0, -1.0]


def test_state_dict_with_nan_is_refused() -> None:
    state = {"minimum": torch.tensor([float("nan")]), "maximum": torch.tensor([1.0])}
    with pytest.raises(CheckpointError, match="finite"):
        MinMaxNormalizer.identity(1).load_state_dict(state)


def test_missing_key_is_still_reported() -> None:
    with pytest.raises(RuntimeError, match="maximum"):
        MinMaxNormalizer.identity(1).load_state_dict({"minimum": torch.zeros(1)})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_data_names_the_channel(data: torch.Tensor, bad: float) -> None:
    data[3, 2, 1] = bad
    with pytest.raises(DataError, match=r"channels \[1\] of 4"):
        MinMaxNormalizer.fit(data)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0,)])
def test_empty_data(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="empty"):
        MinMaxNormalizer.fit(torch.empty(shape))


@pytest.mark.parametrize("value", [torch.tensor(1.0), torch.ones(2, 2, dtype=torch.bool), torch.ones(2) * 1j])
def test_data_of_another_kind(value: torch.Tensor) -> None:
    with pytest.raises(InvalidArgument, match="real numbers"):
        MinMaxNormalizer.fit(value)


def test_wrong_channel_count(data: torch.Tensor) -> None:
    normalizer = MinMaxNormalizer.fit(data)
    for call in (normalizer, normalizer.inverse):
        for x in (torch.zeros(3, 5), torch.tensor(1.0)):
            with pytest.raises(InvalidArgument, match="A = 4"):
                call(x)


def test_bad_ranges() -> None:
    with pytest.raises(InvalidArgument, match=r"\[2\] and \[3\]"):
        MinMaxNormalizer(torch.zeros(2), torch.ones(3))
    with pytest.raises(InvalidArgument, match="minimum must be <="):
        MinMaxNormalizer(torch.ones(2), torch.zeros(2))
    with pytest.raises(InvalidArgument, match="channels must be >= 1"):
        MinMaxNormalizer.identity(0)


def test_compiles_without_graph_breaks(data: torch.Tensor) -> None:
    normalizer = MinMaxNormalizer.fit(data)
    explanation = torch._dynamo.explain(normalizer)(data)
    assert explanation.graph_break_count == 0
