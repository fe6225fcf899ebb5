"""Observation encoders: a dictionary of normalised observations in, condition tokens [B, To, Dc] out.

They run once per condition, never per sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff_fast.errors import InvalidArgument, require
from minidiff_fast.shapes import check_shape

Observation = Mapping[str, Tensor]


class LowDimEncoder(nn.Module):
    """Concatenate named low-dimensional entries on the last axis; no parameters.

    >>> encoder = LowDimEncoder({"keypoints": 18, "agent_pos": 2})
    >>> encoder.output_dim
    20
    >>> encoder({"keypoints": torch.zeros(4, 2, 18), "agent_pos": torch.ones(4, 2, 2)}).shape
    torch.Size([4, 2, 20])

    Args:
        entries: name -> number of channels, in the order of concatenation.
    """

    def __init__(self, entries: Mapping[str, int]) -> None:
        super().__init__()
        _check_entries("LowDimEncoder", entries)
        if not entries:
            raise InvalidArgument("LowDimEncoder: entries must name at least one observation, got {}")
        self.entries = dict(entries)
        self.output_dim = sum(entries.values())

    def forward(
        self,
        obs: Observation,  # name -> [B, To, d_name], normalised, one floating dtype
    ) -> Tensor:  # [B, To, output_dim]
        """Other entries of ``obs`` are ignored. Raises :class:`InvalidArgument` for a wrong name or shape."""
        return torch.cat(_low_dim("LowDimEncoder", obs, self.entries), dim=-1)


class SpatialSoftmax(nn.Module):
    """Expected image coordinates of learned heat maps, one per keypoint n.

    z = Conv1x1(features) [M, n, h, w];  p = softmax of z over its h * w pixels;
    out_n = (sum_ij p_ij x_j, sum_ij p_ij y_i) with x_j = -1 + 2 j / (w - 1), y_i = -1 + 2 i / (h - 1)
    (0 along an axis of one pixel). Softmax and expectation are computed in float32 at least; the result has
    the dtype of the parameters, also under autocast. Source: Levine et al., "End-to-End Training of Deep
    Visuomotor Policies", arXiv 1504.00702.
    """

    def __init__(self, channels: int, keypoints: int) -> None:
        super().__init__()
        self.keypoints = keypoints
        self.heatmap = nn.Conv2d(channels, keypoints, kernel_size=1)

    def forward(
        self,
        features: Tensor,  # [M, C, h, w]
    ) -> Tensor:  # [M, 2 * keypoints], (x, y) pairs in [-1, 1]
        heat = self.heatmap(features)
        height, width = heat.shape[-2:]
        dtype = torch.promote_types(heat.dtype, torch.float32)
        probability = F.softmax(heat.flatten(2), dim=-1, dtype=dtype).unflatten(-1, (height, width))
        x = (probability.sum(-2) * _axis(width, dtype, heat.device)).sum(-1)
        y = (probability.sum(-1) * _axis(height, dtype, heat.device)).sum(-1)
        return torch.stack([x, y], dim=-1).flatten(1).to(self.heatmap.weight.dtype)


class ImageEncoder(nn.Module):
    """Camera image -> crop -> ResNet-18 with GroupNorm -> spatial softmax, beside low-dimensional entries.

    Per observation step: image / 255 in [0, 1]; a random crop of ``crop_size`` in training, the centre crop
    in eval; ResNet-18 from random weights, every batch norm replaced by GroupNorm (C / 16 groups of 16
    channels); ``keypoints`` expected coordinates (x, y); then the low-dimensional entries. With the defaults
    [B, To, 96, 96, 3] -> [B, To, 84, 84, 3] -> [B, To, 512, 3, 3] -> [B, To, 64], and 64 + 2 = 66 channels.

    Every image, hence each of a condition's To steps, is cropped on its own, with (top, left) uniform over
    all (H - h + 1)(W - w + 1) positions, drawn from torch's generator of the images' device.
    Source: Chi et al., "Diffusion Policy", arXiv 2303.04137. The backbone is built from transformers' ResNet
    classes; without them the constructor raises :class:`MissingDependency`.

    Args:
        low_dim: name -> channels of the entries that are appended, normalised.
        image_key: the image's name in the observation dictionary.
        image_size: (H, W) of the camera image.
        crop_size: (h, w) of the crop, at least 32 and at most the image.
        keypoints: number of spatial-softmax keypoints.
    """

    def __init__(
        self,
        low_dim: Mapping[str, int] | None = None,
        *,
        image_key: str = "image",
        image_size: Sequence[int] = (96, 96),
        crop_size: Sequence[int] = (84, 84),
        keypoints: int = 32,
    ) -> None:
        super().__init__()
        low_dim = {"agent_pos": 2} if low_dim is None else dict(low_dim)
        _check_entries("ImageEncoder", low_dim)
        height, width = image_size
        crop_height, crop_width = crop_size
        if not (32 <= crop_height <= height and 32 <= crop_width <= width):
            raise InvalidArgument(
                f"ImageEncoder: crop_size must be at least (32, 32) and at most image_size = "
                f"{(height, width)}, got {(crop_height, crop_width)}"
            )
        if keypoints < 1:
            raise InvalidArgument(f"ImageEncoder: keypoints must be >= 1, got {keypoints}")
        self.entries = low_dim
        self.image_key = image_key
        self.image_size = (height, width)
        self.crop_size = (crop_height, crop_width)
        self.backbone = _resnet18_group_norm()
        self.pool = SpatialSoftmax(512, keypoints)
        self.output_dim = 2 * keypoints + sum(low_dim.values())

    def forward(
        self,
        obs: Observation,  # image_key -> uint8 [B, To, H, W, 3]; low_dim name -> [B, To, d_name]
    ) -> Tensor:  # [B, To, output_dim]
        """Raises :class:`InvalidArgument` for a missing name, a wrong shape, an image that is not uint8."""
        low_dim = _low_dim("ImageEncoder", obs, self.entries)
        image = _entry("ImageEncoder", obs, self.image_key)
        lead = low_dim[0].shape[:2] if low_dim else ("B", "To")
        expected: list[int | str] = [*lead, *self.image_size, 3]
        check_shape("ImageEncoder", self.image_key, image, expected, "[B, To, H, W, 3]", "channels last")
        if image.dtype != torch.uint8:
            raise InvalidArgument(f"ImageEncoder: {self.image_key} must be uint8 in 0..255, got {image.dtype}")
        crops = self.crop(image.flatten(0, 1))
        pixels = crops.permute(0, 3, 1, 2).to(self.pool.heatmap.weight.dtype) / 255.0  # [M, 3, h, w]
        features = self.backbone(pixels).last_hidden_state  # [M, 512, h / 32, w / 32]
        keypoints = self.pool(features).unflatten(0, image.shape[:2])
        return torch.cat([keypoints, *low_dim], dim=-1)

    def crop(
        self,
        image: Tensor,  # [M, H, W, 3]
    ) -> Tensor:  # [M, h, w, 3]
        """A crop per image: random in training; in eval the centre, its top and left rounded down."""
        free = [full - part for full, part in zip(self.image_size, self.crop_size, strict=True)]
        if not self.training:
            (top, left), (height, width) = (free[0] // 2, free[1] // 2), self.crop_size
            return image[:, top : top + height, left : left + width]
        device, count = image.device, image.shape[0]
        row, column = (
            torch.randint(gap + 1, (count, 1), device=device) + torch.arange(size, device=device)
            for gap, size in zip(free, self.crop_size, strict=True)
        )  # [M, h], [M, w]
        which = torch.arange(count, device=device)[:, None, None]
        return image[which, row[:, :, None], column[:, None, :]]


def _resnet18_group_norm() -> nn.Module:
    """ResNet-18 without its classifier; last_hidden_state [M, 512, ceil(h / 32), ceil(w / 32)]."""
    transformers = require("transformers", extra="vision")
    config = transformers.ResNetConfig(
        num_channels=3,
        embedding_size=64,
        hidden_sizes=[64, 128, 256, 512],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        hidden_act="relu",
    )
    backbone = cast(nn.Module, transformers.ResNetModel(config))
    for parent in list(backbone.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                # Batch statistics tie the samples of a batch together and lag behind an EMA of the weights.
                setattr(parent, name, nn.GroupNorm(child.num_features // 16, child.num_features))
    return backbone


def _axis(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Pixel centres of an axis from -1 to 1; 0 for a single pixel."""
    if size == 1:
        return torch.zeros(1, dtype=dtype, device=device)
    return torch.linspace(-1.0, 1.0, size, dtype=dtype, device=device)


def _entry(function: str, obs: Observation, name: str) -> Tensor:
    if name not in obs:
        raise InvalidArgument(f"{function}: obs must hold {name!r}, got {sorted(obs)}")
    return obs[name]


def _low_dim(function: str, obs: Observation, entries: Mapping[str, int]) -> list[Tensor]:
    """The named entries of ``obs``, each checked to be [B, To, channels] with one B and To."""
    found = []
    lead: list[int | str] = ["B", "To"]
    for name, channels in entries.items():
        value = _entry(function, obs, name)
        check_shape(function, name, value, [*lead, channels], "[B, To, d]", f"entries: {dict(entries)}")
        lead = list(value.shape[:2])
        found.append(value)
    return found


def _check_entries(function: str, entries: Mapping[str, int]) -> None:
    for name, channels in entries.items():
        if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
            raise InvalidArgument(f"{function}: entry {name!r} must have an int >= 1 channels, got {channels!r}")
