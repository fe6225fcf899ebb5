"""lerobot's vla_jepa head trained on K = 8 noised samples per condition, without the repeat of its tokens.

python examples/repeated_steps.py
"""

from __future__ import annotations

import copy
import statistics
import time
from types import SimpleNamespace

import torch
from lerobot_wheel import policies

from minidiff_fast.integrations.diffusers import apply_broadcast_attention
from minidiff_fast.integrations.repeat import RepeatedSteps
from minidiff_fast.objectives import BetaTimes, FlowMatching

torch.set_num_threads(1)  # as the figures in docs/
B, K, S, C, T = 2, 8, 256, 512, 7  # conditions, samples, their tokens and channels, actions
CONFIG = SimpleNamespace(
    action_model_type="DiT-B", action_num_heads=4, action_attention_head_dim=64, action_hidden_size=256,
    action_num_layers=6, action_dropout=0.0, action_dim=7, state_dim=8, chunk_size=T, num_inference_timesteps=4,
    num_embodied_action_tokens_per_instruction=8, num_action_tokens_per_timestep=8, action_num_timestep_buckets=1000,
    action_noise_beta_alpha=1.5, action_noise_beta_beta=1.0, action_noise_s=0.999,
)  # fmt: skip

with policies() as load:
    peer = load("policies.vla_jepa.action_head").VLAJEPAActionHead(CONFIG, cross_attention_dim=C)
head = copy.deepcopy(peer)
print(apply_broadcast_attention(head.model, layout="kb"))
steps = RepeatedSteps(FlowMatching(noise_at=0, time_quantile=BetaTimes(1.5, start=1.0, stop=-0.001 / 0.999)), k=K)
tokens, state, actions = torch.randn(B, S, C, requires_grad=True), torch.randn(B, 8), torch.randn(B, T, 7)


def repeated() -> torch.Tensor:
    return peer(tokens.repeat(K, 1, 1), actions.repeat(K, 1, 1), state.repeat(K, 1))


def level2() -> torch.Tensor:
    rows = steps.draw(actions)
    t = rows.t.long()
    features = head.action_encoder(rows.x, t) + head.position_embedding.weight[:T]
    future = head.future_tokens.weight.expand(B, -1, -1)
    shared = torch.cat([head.state_encoder(state[:, None]), future], 1)
    out = head.model(hidden_states=steps.prepend(shared, features), encoder_hidden_states=tokens, timestep=t)
    return steps.loss(head.action_decoder(out[:, -T:]), rows)


times: dict[str, list[float]] = {"repeated": [], "level2": []}
for _ in range(5):
    for name, loss in (("repeated", repeated), ("level2", level2)):
        started = time.perf_counter()
        loss().backward()
        times[name].append(time.perf_counter() - started)
slow, fast = (statistics.median(taken[1:]) for taken in times.values())
print(f"K = {K}: {slow * 1e3:.0f} ms repeated, {fast * 1e3:.0f} ms with RepeatedSteps, ratio {slow / fast:.2f}")
