"""LowDimEncoder, SpatialSoftmax and ImageEncoder."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from minidiff_fast.errors import InvalidArgument, MissingDependency
from minidiff_fast.models import ImageEncoder, LowDimEncoder, SpatialSoftmax


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def built():
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    return ImageEncoder()


@pytest.fixture
def encoder(built):
    return built.eval()


def make_obs(batch=2, steps=2, size=96):
    torch.manual_seed(1)
    image = torch.randint(0, 256, (batch, steps, size, size, 3), dtype=torch.uint8)
    return {"image": image, "agent_pos": torch.rand(batch, steps, 2) * 2 - 1}


# -------------------------------------------------------------------- low-dimensional


def test_low_dim_concatenates_in_the_order_of_entries():
    encoder = LowDimEncoder({"b": 3, "a": 1})
    obs = {"a": torch.zeros(2, 4, 1), "b": torch.ones(2, 4, 3), "other": torch.zeros(5)}
    assert encoder.output_dim == 4
    assert torch.equal(encoder(obs), torch.tensor([1.0, 1.0, 1.0, 0.0]).expand(2, 4, 4))
    assert not list(encoder.parameters())


@pytest.mark.parametrize(
    ("obs", "text"),
    [
        ({"a": torch.zeros(2, 4, 1)}, "LowDimEncoder: obs must hold 'b', got ['a']"),
        (
            {"a": torch.zeros(2, 4, 2), "b": torch.zeros(2, 4, 3)},
            "a must be [B, To, d] = [B, To, 1], got [2, 4, 2]",
        ),
        (
            {"a": torch.zeros(2, 4, 1), "b": torch.zeros(2, 3, 3)},
            "b must be [B, To, d] = [2, 4, 3], got [2, 3, 3]",
        ),
    ],
)
def test_low_dim_errors(obs, text):
    with pytest.raises(InvalidArgument) as error:
        LowDimEncoder({"a": 1, "b": 3})(obs)
    assert text in str(error.value)


def test_constructor_errors():
    with pytest.raises(InvalidArgument, match="entry 'a' must have an int >= 1 channels, got 0"):
        LowDimEncoder({"a": 0})
    with pytest.raises(InvalidArgument, match="at least one observation"):
        LowDimEncoder({})
    with pytest.raises(InvalidArgument, match=r"at most image_size = \(96, 96\), got \(97, 84\)"):
        ImageEncoder(crop_size=(97, 84))
    with pytest.raises(InvalidArgument, match="keypoints must be >= 1, got 0"):
        ImageEncoder(keypoints=0)


# -------------------------------------------------------------------- spatial softmax


def identity_pool(channels: int) -> SpatialSoftmax:
    """A pool whose heat maps are its input."""
    pool = SpatialSoftmax(channels, channels)
    with torch.no_grad():
        pool.heatmap.weight.copy_(torch.eye(channels)[:, :, None, None])
        pool.heatmap.bias.zero_()
    return pool


def test_a_hot_pixel_gives_its_coordinates():
    features = torch.zeros(1, 2, 4, 5)
    features[0, 0, 3, 1] = 1e4  # row 3 of 0..3, column 1 of 0..4
    features[0, 1, 0, 4] = 1e4
    out = identity_pool(2)(features)
    torch.testing.assert_close(out, torch.tensor([[-0.5, 1.0, 1.0, -1.0]]))


def test_spatial_softmax_is_the_expectation_of_the_coordinates():
    features = torch.log(torch.tensor([[[[1.0, 2.0, 1.0], [0.5, 0.5, 3.0]]]]))  # weights of sum 8
    out = identity_pool(1)(features)
    torch.testing.assert_close(out, torch.tensor([[(4.0 - 1.5) / 8, (4.0 - 4.0) / 8]]))
    even = identity_pool(1)(torch.zeros(3, 1, 1, 6))
    torch.testing.assert_close(even, torch.zeros(3, 2))


# -------------------------------------------------------------------- images


def test_shapes_and_low_dim_channels(encoder):
    obs = make_obs(batch=3)
    out = encoder(obs)
    assert out.shape == (3, 2, 66) and encoder.output_dim == 66
    assert out.dtype == torch.float32 and out.isfinite().all()
    assert torch.equal(out[..., 64:], obs["agent_pos"])
    assert out[..., :64].abs().max() <= 1.0
    assert (out[0, 0, :64] - out[0, 1, :64]).abs().max() > 0  # the images do enter


def test_backbone_is_resnet18_with_group_norm(encoder):
    norms = [m for m in encoder.modules() if isinstance(m, nn.GroupNorm)]
    assert len(norms) == 20
    assert all(norm.num_groups * 16 == norm.num_channels for norm in norms)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in encoder.modules())
    convolutions = sum(isinstance(m, nn.Conv2d) for m in encoder.backbone.modules())
    assert convolutions == 20
    assert sum(p.numel() for p in encoder.backbone.parameters()) == 11_176_512  # ResNet-18 without its classifier
    assert not list(encoder.buffers())


def test_eval_is_deterministic_and_uses_the_centre(encoder):
    obs = make_obs()
    out = encoder(obs)
    assert torch.equal(out, encoder(obs))
    assert torch.equal(encoder.crop(obs["image"][:, 0]), obs["image"][:, 0, 6:90, 6:90])
    border = {**obs, "image": obs["image"].clone()}
    border["image"][:, :, :6] = 0
    border["image"][:, :, :, 90:] = 255
    assert torch.equal(encoder(border), out)
    # A condition's tokens do not depend on the rest of the batch.
    alone = encoder({name: value[:1] for name, value in obs.items()})
    torch.testing.assert_close(alone, out[:1], rtol=1e-4, atol=1e-5)


def test_random_crops_cover_every_position_and_differ_per_image(encoder):
    encoder.train()
    rows, columns = torch.meshgrid(torch.arange(96), torch.arange(96), indexing="ij")
    image = torch.stack([rows, columns, torch.zeros_like(rows)], -1).to(torch.uint8)
    torch.manual_seed(0)
    crops = encoder.crop(image.expand(2000, -1, -1, -1)).long()
    assert crops.shape == (2000, 84, 84, 3) and crops.dtype == torch.int64
    top, left = crops[:, 0, 0, 0], crops[:, 0, 0, 1]
    for corner, axis in ((top, 0), (left, 1)):
        assert set(corner.tolist()) == set(range(13))  # 96 - 84 + 1 positions
        size = torch.arange(84)
        expected = corner[:, None, None] + (size[:, None] if axis == 0 else size[None, :])
        assert torch.equal(crops[..., axis], expected.expand(-1, 84, 84))
    assert (top != left).any()  # the axes are drawn apart
    torch.manual_seed(0)
    assert torch.equal(encoder.crop(image.expand(2000, -1, -1, -1)).long(), crops)


def test_a_crop_of_the_whole_image_is_the_image(encoder):
    pytest.importorskip("transformers")
    whole = ImageEncoder(image_size=(40, 36), crop_size=(40, 36), keypoints=2).train()
    image = torch.randint(0, 256, (3, 40, 36, 3), dtype=torch.uint8)
    assert torch.equal(whole.crop(image), image)
    assert torch.equal(whole.eval().crop(image), image)


def test_gradient_reaches_the_first_convolution(encoder):
    encoder.zero_grad()
    encoder(make_obs(batch=1, steps=1)).square().sum().backward()
    first = next(m for m in encoder.modules() if isinstance(m, nn.Conv2d))
    assert first.weight.shape == (64, 3, 7, 7) and first.weight.grad.abs().max() > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


def test_learns_where_a_square_is():
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    encoder = ImageEncoder({}, image_size=(48, 48), crop_size=(40, 40), keypoints=8)
    head = nn.Linear(16, 2)
    image = torch.zeros(8, 1, 48, 48, 3, dtype=torch.uint8)
    where = torch.randint(8, 32, (8, 2))
    for i, (row, column) in enumerate(where.tolist()):
        image[i, :, row : row + 8, column : column + 8] = 255
    target = (where.float() - 20.0) / 12.0
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=1e-3)
    losses = []
    for _ in range(12):
        loss = (head(encoder({"image": image})[:, 0]) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"image": torch.zeros(2, 2, 96, 96, 3)}, "image must be uint8 in 0..255, got torch.float32"),
        (
            {"image": torch.zeros(2, 2, 3, 96, 96, dtype=torch.uint8)},
            "image must be [B, To, H, W, 3] = [2, 2, 96, 96, 3], got [2, 2, 3, 96, 96]",
        ),
        (
            {"image": torch.zeros(3, 2, 96, 96, 3, dtype=torch.uint8)},
            "[2, 2, 96, 96, 3], got [3, 2, 96, 96, 3]",
        ),
        ({"agent_pos": torch.zeros(2, 2, 3)}, "agent_pos must be [B, To, d] = [B, To, 2], got [2, 2, 3]"),
    ],
)
def test_image_errors(encoder, change, text):
    with pytest.raises(InvalidArgument) as error:
        encoder({**make_obs(), **change})
    assert text in str(error.value)


def test_missing_observation(encoder):
    obs = make_obs()
    del obs["image"]
    with pytest.raises(InvalidArgument, match=r"ImageEncoder: obs must hold 'image', got \['agent_pos'\]"):
        encoder(obs)


def test_missing_transformers_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependency, match=r"pip install 'minidiff_fast\[vision\]'"):
        ImageEncoder()
