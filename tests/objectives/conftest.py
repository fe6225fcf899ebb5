"""A small policy with a vision encoder that counts, and how losses and gradients are compared."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from minidiff_fast.models import DiffusionMLP
from minidiff_fast.nn.normalizer import MinMaxNormalizer
from minidiff_fast.policy import DiffusionPolicy


class VisionEncoder(nn.Module):
    """Images [B, To, 8, 8, 3] uint8 -> features [B, To, 6]; counts the observations that it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2)
        self.out = nn.Linear(4 * 9, 6)
        self.seen = 0

    def forward(self, obs: dict[str, Tensor]) -> Tensor:
        image = obs["image"]
        self.seen += len(image)
        pixels = image.flatten(0, 1).permute(0, 3, 1, 2).to(self.out.weight.dtype) / 255
        return self.out(self.conv(pixels).tanh().flatten(1)).unflatten(0, image.shape[:2])


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter is for the tests of its kernels."""
    monkeypatch.setenv("MINIDIFF_FAST_IMPL", "reference")


@pytest.fixture
def make_policy() -> Callable[..., DiffusionPolicy]:
    """make_policy(T, A, seed=0) -> a policy in evaluation mode, float32."""

    def make(tokens: int, width: int, seed: int = 0) -> DiffusionPolicy:
        torch.manual_seed(seed)
        denoiser = DiffusionMLP(width, width, tokens, 2, 6, hidden_dim=16, n_blocks=1, time_dim=8)
        unit = MinMaxNormalizer(-torch.ones(width), torch.ones(width))
        return DiffusionPolicy(VisionEncoder(), denoiser, {}, unit).eval()

    return make


@pytest.fixture
def make_obs() -> Callable[..., dict[str, Tensor]]:
    """make_obs(B, seed=0) -> observations."""

    def make(batch: int, seed: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {"image": torch.randint(0, 256, (batch, 2, 8, 8, 3), dtype=torch.uint8, generator=generator)}

    return make


@pytest.fixture
def perturb() -> Callable[[nn.Module, float], None]:
    """perturb(module, size): other weights, near the old ones."""

    def change(module: nn.Module, size: float) -> None:
        generator = torch.Generator().manual_seed(99)
        with torch.no_grad():
            for parameter in module.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(size * noise.to(parameter.dtype))

    return change


@pytest.fixture
def check_same() -> Callable[..., None]:
    """check_same(ours, reference, *modules): the losses, and every parameter's gradient, to 1e-10."""

    def check(ours: Tensor, reference: Tensor, *modules: nn.Module) -> None:
        assert ours.dtype == reference.dtype == torch.float64
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=0.0)
        named = [(name, p) for module in modules for name, p in module.named_parameters()]
        gradients = [torch.autograd.grad(loss, [p for _, p in named], retain_graph=True) for loss in (ours, reference)]
        for (name, _), a, b in zip(named, *gradients, strict=True):
            scale = b.abs().max()
            assert scale > 0, f"{name}: the comparison would see nothing"
            assert (a - b).abs().max() <= 1e-10 * scale, name

    return check
