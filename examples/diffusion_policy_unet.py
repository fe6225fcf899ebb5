"""A policy of your own around diffusion_policy's U-Net, its image encoder run once for K samples.

``python examples/diffusion_policy_unet.py`` takes the U-Net of diffusion_policy where that is installed, elsewhere the
plain construction of it in diffusion_policy_plain.py.
"""

import statistics
import time

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from minidiff_fast.integrations.diffusion_policy import from_unet
from minidiff_fast.level2 import Level2Batch, level2_step
from minidiff_fast.objectives import DenoisingLoss, DiffusionProcess

try:
    from diffusion_policy.model.diffusion.conditional_unet1d import ConditionalUnet1D
except ImportError:
    from diffusion_policy_plain import ConditionalUnet1D

B, K, T, A = 4, 8, 16, 2
torch.set_num_threads(1)  # as the figures in docs/
layers = [layer for i, o in ((3, 32), (32, 64), (64, 64)) for layer in (nn.Conv2d(i, o, 3, 2, 1), nn.ReLU())]
encoder = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(1024, 128))
unet = ConditionalUnet1D(A, global_cond_dim=128, down_dims=[64, 128, 256], kernel_size=5, cond_predict_scale=True)
scheduler = DDPMScheduler(100, beta_schedule="squaredcos_cap_v2")


class Policy(nn.Module):
    """What the Level-2 step asks for: encode once per condition, denoise K samples of it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.denoiser = encoder, from_unet(unet, tie=True, num_train_timesteps=100)

    def encode(self, obs: Tensor) -> tuple:
        return self.denoiser.encode(self.encoder(obs))

    def denoise(self, cache: tuple, x: Tensor, t: Tensor) -> Tensor:
        return self.denoiser.denoise(cache, x, t)


policy, objective = Policy(), DenoisingLoss(DiffusionProcess.from_scheduler(scheduler))
images, actions = torch.rand(B, 3, 96, 96), torch.rand(B, T, A) * 2 - 1
rows = images.repeat_interleave(K, 0), actions.repeat_interleave(K, 0)
times: dict[str, list[float]] = {"repeated": [], "Level-2": []}
for _ in range(12):
    started = time.perf_counter()
    noise, t = torch.randn(B * K, T, A), torch.randint(100, (B * K,))
    predicted = unet(scheduler.add_noise(rows[1], noise, t), t, global_cond=encoder(rows[0]))
    nn.functional.mse_loss(predicted, noise).backward()
    middle = time.perf_counter()
    level2_step(policy, objective, Level2Batch.draw(images, actions, K, objective))
    times["repeated"].append(1e3 * (middle - started))
    times["Level-2"].append(1e3 * (time.perf_counter() - middle))
before, after = (statistics.median(taken[2:]) for taken in times.values())
print(f"{type(unet).__module__}.{type(unet).__name__} -> {type(policy.denoiser).__name__}, weights shared")
print(f"{B} x {K} samples: repeated {before:.0f} ms, Level-2 {after:.0f} ms, ratio {before / after:.2f}")
