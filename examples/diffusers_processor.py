"""diffusers' attention on conditions that are not repeated: one line converts a model. python diffusers_processor.py"""

import copy
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import nn

from minidiff_fast.integrations.diffusers import apply_broadcast_attention, cached_condition

B, K, T, S = 2, 16, 16, 300  # conditions, noised samples of each, action tokens, condition tokens


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(BasicTransformerBlock(192, 4, 48, cross_attention_dim=256) for _ in range(2))

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, encoder_hidden_states=memory)
        return x


def compare(what: str, before: Callable[[], None], after: Callable[[], None]) -> None:
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(6):  # interleaved; the first round warms up
        for run, taken in zip((before, after), times, strict=True):
            start = time.perf_counter()
            run()
            taken.append(1e3 * (time.perf_counter() - start))
    old, new = (statistics.median(taken[1:]) for taken in times)
    print(f"{what}: {old:.0f} ms -> {new:.0f} ms, {old / new:.2f} times as fast")


def sample(keep: bool) -> None:
    x = samples[:B]
    with torch.no_grad(), cached_condition(converted) if keep else nullcontext():
        for _ in range(10):
            x = x - 0.1 * converted(x, memory)


torch.manual_seed(0)
torch.set_num_threads(1)
repeating = Head()
converted = copy.deepcopy(repeating)
print(apply_broadcast_attention(converted))
samples, memory = torch.randn(B * K, T, 192), torch.randn(B, S, 256)
difference = converted(samples, memory) - repeating(samples, memory.repeat_interleave(K, 0))
print(f"largest difference: {difference.abs().max().item():.1e}")
compare(
    f"a training step, K = {K}",
    lambda: repeating(samples, memory.repeat_interleave(K, 0)).square().mean().backward(),
    lambda: converted(samples, memory).square().mean().backward(),
)
compare("10 denoising steps, keys and values kept", lambda: sample(False), lambda: sample(True))
