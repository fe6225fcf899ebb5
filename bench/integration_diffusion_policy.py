"""diffusion_policy's U-Net policy: one camera, two observation steps of 96 x 96, 16 actions; a quarter of the widths.

A quarter of the widths in the ResNet-18 and in the U-Net keeps the ratio of their work. "repeat" is the policy's own
``compute_loss`` on a batch dict repeated K times, "encode once" the policy's networks with the condition's features
repeated by hand, "ours" the adapter. diffusion_policy is not on PyPI: the policy is the plain construction of its
interface in examples/diffusion_policy_plain.py, the ResNet that of transformers, with random weights.

``python bench/integration_diffusion_policy.py`` measures what shares less: the low-dimensional U-Net (256 to 1024
channels, halved) and the low-dimensional transformer (8 layers of 256).
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from integration_lerobot_diffusion import EXAMPLES, SIZE, STEPS, TOKENS, WIDTHS, feeding, resnet, side
from integrations import Contest, measure, render
from torch import Tensor, nn

from minidiff_fast.integrations.diffusion_policy import level2

B = 4
ACTIONS, OBSERVED = 2, 20


class Encoder(nn.Module):
    """{"image": [rows, 3, 96, 96], "state": [rows, 2]} -> [rows, 130]."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = resnet()
        for module in list(self.backbone.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.BatchNorm2d):
                    setattr(module, name, nn.GroupNorm(child.num_features // 16, child.num_features))

    def forward(self, obs: dict[str, Tensor]) -> Tensor:
        return torch.cat([self.backbone(obs["image"]).mean((2, 3)), obs["state"]], -1)


def policy_of(kind: str) -> nn.Module:
    """The policy of one row of the documentation."""
    sys.path.insert(0, EXAMPLES)
    peer = importlib.import_module("diffusion_policy_plain")
    same = peer.Field(torch.ones(()), torch.zeros(()))
    normalizer = peer.LinearNormalizer({name: same for name in ("obs", "action", "image", "state")})
    options: dict[str, Any] = {"horizon": TOKENS, "action_dim": ACTIONS, "n_obs_steps": STEPS}
    if kind == "transformer":
        model: nn.Module = peer.TransformerForDiffusion(
            ACTIONS, TOKENS, STEPS, OBSERVED, n_layer=8, n_head=4, n_emb=256, causal_attn=True
        )
        options |= {"obs_as_cond": True, "obs_dim": OBSERVED}
    else:
        lowdim = kind == "lowdim"
        model = peer.ConditionalUnet1D(
            ACTIONS, global_cond_dim=STEPS * (OBSERVED if lowdim else 8 * 16 + 2), kernel_size=5,
            diffusion_step_embed_dim=256 if lowdim else 128, cond_predict_scale=True, down_dims=WIDTHS,
        )  # fmt: skip
        options |= {"obs_as_global_cond": True, **({"obs_dim": OBSERVED} if lowdim else {"obs_encoder": Encoder()})}
    scheduler = DDPMScheduler(100, beta_schedule="squaredcos_cap_v2")
    policy: nn.Module = peer.Policy(model, scheduler, normalizer, **options)
    return policy


def repeated(value: Any, k: int) -> Any:
    if isinstance(value, dict):
        return {name: repeated(each, k) for name, each in value.items()}
    return value.repeat_interleave(k, 0)


def build(k: int, device: torch.device, kind: str = "images") -> Contest:
    """Repeated batch, repeated features, ours; one policy, whose weights all sides share."""
    torch.manual_seed(0)
    policy: Any = policy_of(kind).to(device)
    adapter = level2(policy)
    obs: Any = torch.randn(B, STEPS, OBSERVED, device=device)
    if kind == "images":
        images = torch.rand(B, STEPS, 3, SIZE, SIZE, device=device)
        obs = {"image": images, "state": torch.randn(B, STEPS, 2, device=device)}
    batch = {"obs": obs, "action": torch.randn(B, TOKENS, ACTIONS, device=device)}
    drawn = adapter.draw(batch, k)
    noise, times = drawn.noise.flatten(0, 1), drawn.timesteps.flatten()
    rows = repeated(batch, k)

    def repeat() -> Tensor:
        with feeding(noise, times):
            loss: Tensor = policy.compute_loss(rows)
        return loss

    def once() -> Tensor:
        condition = repeated(policy.condition(batch["obs"], B), k)
        noisy = policy.noise_scheduler.add_noise(rows["action"], noise, times)
        return F.mse_loss(policy.model(noisy, times, **condition), noise)

    def ours() -> Tensor:
        return adapter.objective.per_sample(adapter, adapter.encode(drawn.obs), drawn).mean()

    inputs = [noise, times, rows["action"], *(obs.values() if isinstance(obs, dict) else [obs])]
    inputs += rows["obs"].values() if isinstance(obs, dict) else [rows["obs"]]
    sides = {"repeat": repeat, "encode once": once, "ours": ours}
    return {name: side(loss, policy, *inputs) for name, loss in sides.items()}


if __name__ == "__main__":
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for kind in ("lowdim", "transformer"):
        results = {k: measure(build(k, here, kind), here, 7, 20.0) for k in (1, 4, 16)}
        print(render(kind, B, results), flush=True)
