"""lerobot's DiffusionPolicy on Level-2 batches: one line before the training loop, one in it.

``python examples/lerobot_policy.py`` uses the lerobot that is installed, or its wheel (see lerobot_wheel.py). The
policy below reads the state of the environment; with cameras the encoder's share comes on top, see docs/lerobot.md.
"""

import statistics
import time

import torch
from lerobot_wheel import policies

from minidiff_fast.integrations.lerobot import level2

B, K, TO, T = 4, 8, 2, 16
torch.set_num_threads(1)  # as the figures in docs/

with policies() as load:
    types = load("configs.types")
    kind, feature = types.FeatureType, types.PolicyFeature
    config = load("policies.diffusion.configuration_diffusion").DiffusionConfig(
        input_features={
            "observation.state": feature(type=kind.STATE, shape=(2,)),
            "observation.environment_state": feature(type=kind.ENV, shape=(16,)),
        },
        output_features={"action": feature(type=kind.ACTION, shape=(2,))},
        device="cpu", n_obs_steps=TO, horizon=T, down_dims=(64, 128, 256), num_inference_steps=4,
    )  # fmt: skip
    policy = load("policies.diffusion.modeling_diffusion").DiffusionPolicy(config)

adapter = level2(policy)  # the one line; `policy` stays what it was, its weights are shared
optimizer = torch.optim.Adam(policy.get_optim_params(), lr=1e-4)
print(f"{type(policy).__name__} -> {type(adapter).__name__}, {sum(p.numel() for p in adapter.parameters()):,} weights")

batch = {
    "observation.state": torch.randn(B, TO, 2), "observation.environment_state": torch.randn(B, TO, 16),
    "action": torch.rand(B, T, 2) * 2 - 1, "action_is_pad": torch.zeros(B, T, dtype=torch.bool),
}  # fmt: skip
repeated = {name: value.repeat_interleave(K, 0) for name, value in batch.items()}


def theirs() -> None:
    policy.forward(repeated)[0].backward()


def ours() -> None:
    adapter.loss(batch, K).backward()  # was: policy.forward(batch)[0].backward()


times: dict[str, list[float]] = {"theirs": [], "ours": []}
for _ in range(10):
    for step in (theirs, ours):
        optimizer.zero_grad()
        started = time.perf_counter()
        step()
        times[step.__name__].append(1e3 * (time.perf_counter() - started))
    optimizer.step()
before, after = (statistics.median(times[name][2:]) for name in ("theirs", "ours"))
print(f"{B} x {K} samples: repeated batch {before:.0f} ms, Level-2 {after:.0f} ms, ratio {before / after:.2f}")
print(policy.select_action({name: value[:, -1] for name, value in batch.items() if name.startswith("obs")}).shape)
