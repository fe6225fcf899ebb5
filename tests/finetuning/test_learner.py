"""The update: Level-2 and flat pairs are one loss, warm-up leaves the policy alone, KL stops, passes add up."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.finetuning.buffer import ObsEntry, RolloutBuffer
from minidiff_fast.finetuning.counters import CountedCritic, CountedPolicy, Counters
from minidiff_fast.finetuning.critic import OwnCritic, SharedCritic, ValueHead, feature_width
from minidiff_fast.finetuning.flat import flat_losses
from minidiff_fast.finetuning.learner import Learner, StaleRecord, UpdateConfig, level2_losses
from minidiff_fast.models import DiffusionMLP, LowDimEncoder
from minidiff_fast.nn.normalizer import MinMaxNormalizer
from minidiff_fast.objectives.dppo import DPPO, DPPOConfig
from minidiff_fast.policy import DiffusionPolicy
from minidiff_fast.transitions import DDIMTransitions

D, T, A, TO, DC, N, S = 4, 3, 2, 2, 8, 6, 5


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    monkeypatch.setenv("MINIDIFF_FAST_IMPL", "reference")


class Convolution(nn.Module):
    """A camera image and a position -> tokens."""

    output_dim = DC

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2)
        self.out = nn.Linear(4 * 9 + 2, DC)

    def forward(self, obs):
        image = obs["image"].to(self.out.weight.dtype).div(255).flatten(0, 1).permute(0, 3, 1, 2)
        seen = self.conv(image).tanh().flatten(1).unflatten(0, obs["image"].shape[:2])
        return self.out(torch.cat([seen, obs["position"]], -1)).tanh()


def unit(channels):
    return MinMaxNormalizer(-torch.ones(channels), torch.ones(channels))


def make_policy(seed=0):
    torch.manual_seed(seed)
    denoiser = DiffusionMLP(A, A, T, TO, DC, hidden_dim=16, n_blocks=1)
    return DiffusionPolicy(Convolution(), denoiser, {"position": unit(2)}, unit(A)).double().eval()


def make_algorithm(**constants):
    table = torch.tensor([0.05, 0.3, 0.6, 0.9, 1.0])
    transitions = DDIMTransitions(torch.tensor([80, 60, 40, 20]), table, "sample")
    return DPPO(transitions, (T, A), DPPOConfig(clip=0.2, clip_base=0.05, **constants), act_steps=(1, 3))


def observations(rows, seed):
    generator = np.random.default_rng(seed)
    return {
        "image": generator.integers(0, 256, (rows, TO, 8, 8, 3), dtype=np.uint8),
        "position": generator.uniform(-1, 1, (rows, TO, 2)).astype(np.float32),
    }


def tensors(obs):
    return {"image": torch.from_numpy(obs["image"]), "position": torch.from_numpy(obs["position"]).double()}


class DoubleRows:
    """The buffer with float64 observations, as the float64 policies here take them."""

    def __init__(self, buffer):
        self.buffer = buffer

    def minibatches(self, *args, **kwargs):
        return self.buffer.minibatches(*args, **kwargs)

    def rows(self, index):
        rows = self.buffer.rows(index)
        return rows._replace(
            obs={n: v if v.dtype == torch.uint8 else v.double() for n, v in rows.obs.items()},
            record={n: v.double() for n, v in rows.record.items()},
            advantage=rows.advantage.double(), returns=rows.returns.double(), value=rows.value.double(),
        )  # fmt: skip


def filled(policy, critic, algorithm, seed=0):
    entries = {"image": ObsEntry((TO, 8, 8, 3), torch.uint8), "position": ObsEntry((TO, 2), torch.float32)}
    buffer = RolloutBuffer(S, N, entries)
    generator = torch.Generator().manual_seed(seed)
    flags = np.zeros(N, bool)
    with torch.no_grad():
        for step in range(S):
            obs = observations(N, seed * 100 + step)
            seen = tensors(obs)
            features = policy.features(seen)
            decision = algorithm.act(policy, policy.condition(features), obs=seen, generator=generator)
            reward = torch.randn(N, generator=generator)
            buffer.add(obs, record=decision.record, reward=reward, terminated=flags, truncated=flags, value=critic(seen, features))  # fmt: skip
    buffer.finish(torch.zeros(N), gamma=0.9, lam=0.9)
    return DoubleRows(buffer)


def shared(policy):
    torch.manual_seed(1)
    return SharedCritic(ValueHead(TO * DC, 16, 2)).double()


def own(policy):
    torch.manual_seed(1)
    normalizers = copy.deepcopy(dict(policy.obs_normalizers.items()))
    return OwnCritic(Convolution(), ValueHead(TO * DC, 16, 2), normalizers).double()


def gradients(*modules):
    return [p.grad.clone() for m in modules for p in m.parameters()]


@pytest.mark.parametrize("critic", [shared, own])
@pytest.mark.parametrize("train_encoder", [False, True])
def test_flat_pairs_give_the_loss_and_gradients_of_level2(critic, train_encoder):
    policy, algorithm = make_policy(), make_algorithm()
    critic = critic(policy)
    critic.train_encoder = train_encoder
    rows = filled(policy, critic, algorithm).rows(torch.arange(N * S))
    batch = algorithm.minibatch(rows.record)
    batch["old_log_prob"] = batch["old_log_prob"] + 0.1 * torch.randn_like(batch["old_log_prob"])  # ratios other than 1
    found = []
    for losses in (level2_losses, flat_losses):
        policy.zero_grad(), critic.zero_grad()
        actor, value = losses(policy, critic, algorithm, rows.obs, batch, rows.advantage, rows.returns, rows.value)
        (actor.loss + value).backward()
        found.append((actor.loss.detach(), value.detach(), gradients(policy, critic), actor.stats))
    (loss, value, grads, stats), (flat_loss, flat_value, flat_grads, flat_stats) = found
    torch.testing.assert_close(loss, flat_loss, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(value, flat_value, rtol=1e-11, atol=1e-13)
    assert 0 < float(stats["clip_fraction"]) < 1
    for name in stats:
        torch.testing.assert_close(stats[name], flat_stats[name], rtol=1e-9, atol=1e-12)
    for one, other in zip(grads, flat_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-13)
    assert all(bool(g.any()) for g in grads)


def test_encoder_passes_of_an_update_are_counted():
    policy, algorithm = make_policy(), make_algorithm()
    critic = own(policy)
    buffer = filled(policy, critic, algorithm)
    passes = []
    for flat in (False, True):
        counters = Counters()
        counted = CountedPolicy(copy.deepcopy(policy), counters)
        config = UpdateConfig(epochs=3, batch_size=10, flat_pairs=flat)
        Learner(counted, CountedCritic(copy.deepcopy(critic), counters, 1), algorithm, config).update(
            buffer, train_actor=True
        )
        passes.append((counters.encoder_passes, counters.denoiser_rows))
    assert passes == [(3 * N * S * 2, 3 * N * S * D), (3 * N * S * D * 2, 3 * N * S * D)]


def test_warm_up_trains_the_critic_alone():
    policy, algorithm = make_policy(), make_algorithm()
    critic = shared(policy)
    buffer = filled(policy, critic, algorithm)
    before = copy.deepcopy(policy.state_dict()), copy.deepcopy(critic.state_dict())
    counters = Counters()
    learner = Learner(CountedPolicy(policy, counters), critic, algorithm, UpdateConfig(epochs=2, batch_size=10))
    stats = learner.update(buffer, train_actor=False)
    assert all(torch.equal(v, before[0][n]) for n, v in policy.state_dict().items())
    assert any(not torch.equal(v, before[1][n]) for n, v in critic.state_dict().items())
    assert counters.denoiser_rows == 0 and "ratio" not in stats
    assert all(p.grad is None for p in policy.parameters())


def test_more_passes_of_the_critic_leave_the_policy_alone():
    policy, algorithm = make_policy(), make_algorithm()
    critic = own(policy)
    buffer = filled(policy, critic, algorithm)
    after = []
    for more in (None, 5):
        counters = Counters()
        learner = Learner(
            CountedPolicy(copy.deepcopy(policy), counters), CountedCritic(copy.deepcopy(critic), counters, 1), algorithm,
            UpdateConfig(epochs=2, critic_epochs=more, batch_size=10),
        )  # fmt: skip
        stats = learner.update(buffer, train_actor=True, generator=torch.Generator().manual_seed(0))
        steps = [int(part.state[parameters[0]]["step"]) for part, parameters in (
            (learner.actor, learner.actor_parameters), (learner.critic_optimizer, learner.critic_parameters))]  # fmt: skip
        assert steps == [6, 6 if more is None else 15] and stats["epochs"] == 2.0
        assert counters.denoiser_rows == 2 * N * S * D
        assert counters.encoder_passes == (2 + (more or 2)) * N * S
        after.append([p.detach() for p in learner.actor_parameters])
    assert all(torch.equal(one, other) for one, other in zip(*after, strict=True))


def test_passes_of_a_part_of_a_minibatch_add_up_to_its_gradient():
    policy, algorithm = make_policy(), make_algorithm()
    critic = shared(policy)
    buffer = filled(policy, critic, algorithm)
    after = []
    for size in (None, 7):
        learner = Learner(
            copy.deepcopy(policy), copy.deepcopy(critic), algorithm, UpdateConfig(epochs=1, batch_size=30, rows_per_pass=size)
        )  # fmt: skip
        learner.update(buffer, train_actor=True, generator=torch.Generator().manual_seed(0))
        after.append([p.detach() for p in learner.actor_parameters + learner.critic_parameters])
    for one, other in zip(*after, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_kl_stops_the_actor_before_the_step_and_not_the_critic():
    policy, algorithm = make_policy(), make_algorithm()
    critic = shared(policy)
    buffer = filled(policy, critic, algorithm)
    loose = Learner(copy.deepcopy(policy), copy.deepcopy(critic), algorithm, UpdateConfig(epochs=2, batch_size=10, actor_lr=0.05, target_kl=None))  # fmt: skip
    moved = loose.update(buffer, train_actor=True, generator=torch.Generator().manual_seed(0))
    assert moved["approx_kl"] > 1e-4 and "kl_stops" not in moved
    tight = Learner(policy, critic, algorithm, UpdateConfig(epochs=2, batch_size=10, actor_lr=0.05, target_kl=1e-9))
    first = copy.deepcopy(policy.state_dict())
    stats = tight.update(buffer, train_actor=True, generator=torch.Generator().manual_seed(0))
    assert stats["kl_stops"] == 1.0 and stats["epochs"] == 2.0
    assert any(not torch.equal(v, first[n]) for n, v in policy.state_dict().items()), "the first step was taken"
    assert int(tight.critic_optimizer.state[tight.critic_parameters[0]]["step"]) == 6


def test_a_record_of_another_policy_is_refused():
    policy, algorithm = make_policy(), make_algorithm()
    critic = shared(policy)
    buffer = filled(policy, critic, algorithm)
    other = make_policy(seed=5)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(StaleRecord, match="ratio 1"):
        Learner(other, critic, algorithm, UpdateConfig(epochs=1, batch_size=30)).update(buffer, train_actor=True)
    assert all(torch.equal(v, before[n]) for n, v in other.state_dict().items())


def test_a_record_of_nearly_the_same_policy_is_refused_and_leaves_no_gradient():
    """Under any policy the mean ratio is near 1: that alone would let weights pass that differ by a tenth."""
    policy, algorithm = make_policy(), make_algorithm()
    critic = shared(policy)
    buffer = filled(policy, critic, algorithm)
    other = copy.deepcopy(policy)
    torch.manual_seed(3)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1 * p.std(correction=0) * torch.randn_like(p))
    rows = buffer.rows(torch.arange(N * S))
    stats = algorithm.loss(other, other.condition(other.features(rows.obs)), algorithm.minibatch(rows.record), rows.advantage).stats  # fmt: skip
    assert abs(float(stats["ratio"]) - 1.0) < 1e-2 and float(stats["clip_fraction"]) > 0.05
    learner = Learner(other, critic, algorithm, UpdateConfig(epochs=1, batch_size=30))
    with pytest.raises(StaleRecord, match="KL 0"):
        learner.update(buffer, train_actor=True)
    for p in learner.actor_parameters:
        p.grad = torch.full_like(p, 1e3)  # as the refused minibatch may have left
    before = copy.deepcopy(other.state_dict())
    learner.update(buffer, train_actor=False)
    assert all(p.grad is None for p in learner.actor_parameters)
    assert all(torch.equal(v, before[n]) for n, v in other.state_dict().items())


def test_behaviour_cloning_needs_a_base_and_pulls_towards_it():
    policy, algorithm = make_policy(), make_algorithm(bc_weight=1.0)
    critic = shared(policy)
    with pytest.raises(InvalidArgument, match="base"):
        Learner(policy, critic, algorithm, UpdateConfig())
    base = make_policy(seed=3)
    learner = Learner(policy, critic, algorithm, UpdateConfig(epochs=30, batch_size=30, actor_lr=1e-2, target_kl=None), base=base)  # fmt: skip
    buffer = filled(policy, critic, algorithm)
    rows = buffer.rows(torch.arange(N * S))

    def distance():
        with torch.no_grad():
            return float(learner._cloning(rows.obs, torch.Generator().manual_seed(0)))

    before = distance()
    learner.update(buffer, train_actor=True, generator=torch.Generator().manual_seed(0))
    assert distance() < before


def test_feature_width():
    policy = make_policy()
    assert feature_width(policy, tensors(observations(1, 0))) == TO * DC


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"critic_epochs": 9}, {"batch_size": 1.5}, {"actor_lr": 0.0}, {"target_kl": -1.0}, {"weight_decay": -1.0}])  # fmt: skip
def test_update_config_is_checked(wrong):
    with pytest.raises(InvalidArgument, match=next(iter(wrong))):
        UpdateConfig(**wrong)


def test_low_dim_critic():
    critic = OwnCritic(LowDimEncoder({"position": 2}), ValueHead(TO * 2, 8, 1), {"position": unit(2)})
    assert critic({"position": torch.zeros(3, TO, 2)}).shape == (3,)
