"""A diffusion transformer of nn.TransformerDecoder layers: one line, and its memory need not be repeated K times.

python examples/torch_modules.py
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from minidiff_fast.integrations import convert, encode_memory

B, K, T, S, C, STEPS = 2, 16, 16, 256, 128, 10
torch.set_num_threads(1)  # as the figures in docs/


def medians_ms(*functions: Callable[[], object], rounds: int = 5) -> list[float]:
    times: list[list[float]] = [[] for _ in functions]
    for round_ in range(rounds + 1):
        for function, taken in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if round_ > 0:
                taken.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(taken) for taken in times]


def main() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(C, 4, 4 * C, dropout=0.0, norm_first=True, batch_first=True)
    peer = nn.TransformerDecoder(layer, 3)
    ours = copy.deepcopy(peer)
    report = convert(ours)
    print(report)

    scene, samples = torch.randn(B, S, C, requires_grad=True), torch.randn(B * K, T, C)
    difference = (peer(samples, scene.repeat_interleave(K, 0)) - ours(samples, scene)).abs().max()
    print(f"\nlargest difference of the outputs at K = {K}: {difference:.1e}")
    before, after = medians_ms(
        lambda: peer(samples, scene.repeat_interleave(K, 0)).square().mean().backward(),
        lambda: ours(samples, scene).square().mean().backward(),
    )
    print(f"a training step, K = {K}: {before:.0f} ms, {after:.0f} ms converted, ratio {before / after:.2f}")
    few, one = samples[:8], scene[:1].detach()
    with torch.no_grad():
        cache = encode_memory(ours, one)
        before, after = medians_ms(
            lambda: [peer(few, one.repeat_interleave(8, 0)) for _ in range(STEPS)],
            lambda: [ours(few, cache) for _ in range(STEPS)],
        )
    print(f"{STEPS} denoising steps of 8: {before:.0f} ms, {after:.0f} ms encoded once, ratio {before / after:.2f}")


if __name__ == "__main__":
    main()
