"""A bandit whose best action depends on the observation: every algorithm finds it, from a broad imitation policy."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from minidiff_fast.models import DiffusionMLP
from minidiff_fast.nn.normalizer import MinMaxNormalizer
from minidiff_fast.objectives import FlowMatching, il_loss
from minidiff_fast.objectives.fpo import FPO, FPOConfig
from minidiff_fast.objectives.policy_gradient import normalize_advantage
from minidiff_fast.objectives.reinflow import ReinFlow, ReinFlowConfig
from minidiff_fast.objectives.weighted import AWR, AWRConfig
from minidiff_fast.policy import DiffusionPolicy
from minidiff_fast.transitions import FlowTransitions

B, T, A = 128, 1, 2
PROCESS = FlowMatching(timestep_scale=100.0)
FLOW = FlowTransitions.from_process(PROCESS, 4)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(A, 8)

    def forward(self, obs):
        return self.linear(obs["target"]).tanh()


def descend(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@pytest.fixture(scope="module")
def broad():
    """Imitates actions that know nothing of the target."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIDIFF_FAST_IMPL", "reference")
        return imitate()


def imitate():
    torch.manual_seed(0)
    draws = torch.Generator().manual_seed(0)
    unit = MinMaxNormalizer(-torch.ones(A), torch.ones(A))
    denoiser = DiffusionMLP(A, A, T, 1, 8, hidden_dim=32, n_blocks=1, time_dim=16)
    policy = DiffusionPolicy(Encoder(), denoiser, {}, unit).eval()
    optimizer = torch.optim.Adam(policy.parameters(), 3e-3)
    for _ in range(80):
        obs = {"target": torch.rand(B, 1, A, generator=draws) - 0.5}
        actions = 0.4 * torch.randn(B, T, A, generator=draws)
        descend(optimizer, il_loss(policy, policy.encode(obs), actions, k=4, process=PROCESS, generator=draws))
    return policy


@pytest.mark.parametrize(
    ("make", "rate"),
    [
        (lambda: FPO(FLOW, PROCESS, (T, A), FPOConfig(samples=16)), 2e-3),
        (lambda: ReinFlow(FLOW, (T, A), 8, ReinFlowConfig(clip=0.1)), 3e-3),
        (lambda: AWR(FLOW, PROCESS, (T, A), AWRConfig(beta=1.0, samples=4)), 3e-3),
    ],
    ids=["fpo", "reinflow", "awr"],
)
def test_reward_rises(make, rate, broad):
    torch.manual_seed(1)
    draws, policy, algorithm, rewards = torch.Generator().manual_seed(1), copy.deepcopy(broad), make(), []
    extra = getattr(algorithm, "module", None)
    parameters = [*policy.parameters(), *([] if extra is None else extra.parameters())]
    optimizer = torch.optim.Adam(parameters, rate)
    for _ in range(18):
        obs = {"target": torch.rand(B, 1, A, generator=draws) - 0.5}

        def encode(obs=obs):
            own = getattr(algorithm, "condition", None)
            return policy.encode(obs) if own is None else own(policy, policy.features(obs))

        with torch.no_grad():
            decision = algorithm.act(policy, encode(), generator=draws)
        reward = -(decision.actions - obs["target"]).square().mean((1, 2))
        rewards.append(float(reward.mean()))
        for _ in range(4):
            batch = algorithm.minibatch(decision.record, generator=draws)
            descend(optimizer, algorithm.loss(policy, encode(), batch, normalize_advantage(reward)).loss)
    first, last = sum(rewards[:3]) / 3, sum(rewards[-3:]) / 3
    assert last > 0.5 * first, f"{first:.3f} -> {last:.3f}"
