"""ReinFlow against a flat implementation that encodes every step; one ratio a chain, one set of times."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.models.transformer_for_diffusion import timestep_embedding
from minidiff_fast.objectives.reinflow import ExplorationNoise, ReinFlow, ReinFlowCache, ReinFlowConfig
from minidiff_fast.sampling import sample_chain
from minidiff_fast.transitions import DDIMTransitions, FlowTransitions

B, K, T, A, FEATURES = 4, 4, 4, 2, 12  # K a power of 2: times without rounding, in any dtype
SCALE = 10.0


def make(noise_at=1, act_steps=None, seed=0, transitions=None, **constants):
    torch.manual_seed(seed)
    flow = FlowTransitions(K, noise_at=noise_at, timestep_scale=SCALE) if transitions is None else transitions
    return ReinFlow(flow, (T, A), FEATURES, ReinFlowConfig(noise_hidden=(8, 8), **constants), act_steps=act_steps)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def encoded(reinflow, policy, obs):
    return reinflow.condition(policy, policy.features(obs))


def collected(reinflow, policy, obs, seed=0):
    with torch.no_grad():
        return reinflow.act(policy, encoded(reinflow, policy, obs), generator=generator(seed))


def double(batch):
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


def flat_reinflow(reinflow, policy, obs, batch, advantage, valid):
    """Every step of every chain encodes its observation; formulas from the paper."""
    config, net = reinflow.config, reinflow.module
    noise_at, window = reinflow.transitions.noise_at, slice(*(reinflow.act_steps or (0, T)))
    total, entropies, count = 0.0, 0.0, 0
    for b in range(len(advantage)):
        if not valid[b]:
            continue
        log_ratio = 0.0
        for i in range(K):
            time = torch.tensor((1.0 - i / K if noise_at == 1 else i / K) * SCALE)
            features = policy.features({"image": obs["image"][b : b + 1]})
            x, x_next = batch["x"][b, i], batch["x_next"][b, i]
            velocity = policy.denoise(policy.condition(features), x[None, None], time[None, None])[0, 0]
            mean = x + (-velocity if noise_at == 1 else velocity) / K
            hidden = net.condition_proj(features.flatten()) + net.time_proj(timestep_embedding(time, 16).double())
            for layer in net.layers:
                hidden = layer(hidden.tanh())
            log_variance = math.log(0.1**2) + (math.log(0.24**2) - math.log(0.1**2)) * (hidden.tanh() + 1) / 2
            std = (0.5 * log_variance).exp().view(T, A)
            step = torch.distributions.Normal(mean[window], std[window])
            log_ratio = log_ratio + step.log_prob(x_next[window]).sum()
            entropies = entropies + step.entropy().mean() / K
        log_ratio = log_ratio / K / std[window].numel() - batch["old_log_prob"][b].mean()
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - config.clip, 1 + config.clip)
        total = total - torch.minimum(ratio * advantage[b], clipped * advantage[b])
        count += 1
    return total / count - config.entropy_weight * entropies / count


@pytest.mark.parametrize(("noise_at", "act_steps"), [(1, None), (0, (1, 3))])
def test_loss_and_gradients_are_those_of_flat_steps(noise_at, act_steps, make_policy, make_obs, perturb, check_same):
    reinflow, policy, obs = make(noise_at, act_steps, clip=0.3), make_policy(T, A), make_obs(B)
    batch = double(reinflow.minibatch(collected(reinflow, policy, obs).record))
    policy, net = policy.double(), reinflow.module.double()
    perturb(policy, 0.02)
    perturb(net, 0.05)
    advantage = torch.tensor([1.5, -0.7, 9.0, -1.0], dtype=torch.float64)
    valid = torch.tensor([True, True, False, True])
    ours = reinflow.loss(policy, encoded(reinflow, policy, obs), batch, advantage, valid=valid)
    assert float(ours.stats["approx_kl"]) > 1e-6
    check_same(ours.loss, flat_reinflow(reinflow, policy, obs, batch, advantage, valid), policy, net)


def test_the_ratio_is_1_with_unchanged_weights(make_policy, make_obs):
    reinflow, policy, obs = make(), make_policy(T, A), make_obs(B)
    batch = reinflow.minibatch(collected(reinflow, policy, obs).record)
    result = reinflow.loss(policy, encoded(reinflow, policy, obs), batch, torch.ones(B))
    torch.testing.assert_close(result.stats["ratio_max"], torch.tensor(1.0), rtol=1e-5, atol=0)
    assert result.stats["clip_fraction"] == 0
    result.loss.backward()
    assert all(p.grad.abs().max() > 0 for p in [*policy.parameters(), *reinflow.module.parameters()])


def test_sampling_at_other_times_than_scoring_would_not_give_ratio_1(make_policy, make_obs, perturb):
    """Times of linspace(0, 1, K) when sampling and of i / K when scoring: the ratio tells."""

    @dataclass(frozen=True)
    class OtherTimes(FlowTransitions):
        def times(self, device):
            return (1.0 - torch.linspace(0, 1, self.steps, device=device)) * self.timestep_scale

    policy, obs = make_policy(T, A), make_obs(B)
    perturb(policy, 0.3)
    other = make(transitions=OtherTimes(K, timestep_scale=SCALE))
    record = collected(other, policy, obs).record
    same = other.loss(policy, encoded(other, policy, obs), other.minibatch(record), torch.ones(B))
    assert abs(float(same.stats["ratio"]) - 1.0) < 1e-5
    ours = make()
    scored = ours.loss(policy, encoded(ours, policy, obs), ours.minibatch(record), torch.ones(B))
    assert abs(float(scored.stats["ratio"]) - 1.0) > 1e-3


def test_a_decision_has_one_ratio(make_policy, make_obs):
    """The sum over the chain decides: opposite changes of two steps cancel."""
    reinflow, policy, obs = make(), make_policy(T, A), make_obs(B)
    batch = reinflow.minibatch(collected(reinflow, policy, obs).record)
    cache, advantage = encoded(reinflow, policy, obs), torch.randn(B)
    shifted = {**batch, "old_log_prob": batch["old_log_prob"] + torch.tensor([0.5, -0.5, 0.0, 0.0])}
    torch.testing.assert_close(
        reinflow.loss(policy, cache, batch, advantage).loss, reinflow.loss(policy, cache, shifted, advantage).loss
    )


def test_acting_and_an_update_take_one_encode_each(make_policy, make_obs):
    reinflow, policy, obs = make(), make_policy(T, A), make_obs(B)
    projected = []
    reinflow.module.condition_proj.register_forward_hook(lambda _, inputs, __: projected.append(len(inputs[0])))
    decision = collected(reinflow, policy, obs)
    assert policy.encoder.seen == B
    reinflow.loss(policy, encoded(reinflow, policy, obs), reinflow.minibatch(decision.record), torch.ones(B))
    assert policy.encoder.seen == 2 * B
    assert projected == [B] * (K + 1)  # the noise network reads a decision's features, never K copies of them


def test_the_record_holds_the_chain_as_drawn(make_policy, make_obs):
    reinflow, policy, obs = make(), make_policy(T, A), make_obs(16)
    decision = collected(reinflow, policy, obs)
    last = decision.record["reinflow_chain"][:, -1]
    assert last.abs().max() > 1.0 and torch.equal(decision.actions, last.clamp(-1, 1))


def test_the_noise_stays_in_its_range_and_is_drawn():
    net = ExplorationNoise(FEATURES, (T, A), low=0.08, high=0.14)
    std = net(1e3 * torch.randn(50, 2, 6, generator=generator()), torch.rand(50, 3) * SCALE)
    assert std.shape == (50, 3, T, A) and std.min() >= 0.08 - 1e-6 and std.max() <= 0.14 + 1e-6
    middle = ExplorationNoise(FEATURES, (T, A))(torch.zeros(1, 2, 6), torch.zeros(1, 1))
    assert middle.min() > 0.10 and middle.max() < 0.24


def test_sampled_steps_have_the_learned_spread(make_policy, make_obs):
    reinflow, policy = make(), make_policy(T, A)
    obs = {"image": make_obs(1)["image"].expand(4000, -1, -1, -1, -1)}
    chain = collected(reinflow, policy, obs).record["reinflow_chain"]
    cache = encoded(reinflow, policy, obs)
    with torch.no_grad():
        times = reinflow.transitions.times(chain.device).expand(4000, K)
        mean = chain[:, :-1] - policy.denoise(cache.policy, chain[:, :-1], times) / K
        std = reinflow.module(cache.features[:1], times[:1])[0]
    noise = chain[:, 1:] - mean
    torch.testing.assert_close(noise.std(0), std, rtol=0.06, atol=0.0)
    assert (noise.abs() <= 3.0 * std + 1e-5).all()


def test_evaluation_is_the_plain_euler_flow(make_policy, make_obs):
    reinflow, policy, obs = make(), make_policy(T, A), make_obs(B)
    chain = sample_chain(
        policy, obs, reinflow.transitions.deterministic(), shape=(T, A), min_std=0.0, generator=generator(4)
    )
    x, cache = torch.randn((B, 1, T, A), generator=generator(4)), policy.encode(obs)
    with torch.no_grad():
        for step in range(K):
            x = x - policy.denoise(cache, x, torch.full((B, 1), SCALE * (1 - step / K))) / K
    torch.testing.assert_close(chain.actions, x[:, 0].clamp(-1, 1))


def test_entropy_is_rewarded(make_policy, make_obs):
    """With no advantage, a step down the gradient widens the noise."""
    reinflow, policy, obs = make(entropy_weight=0.03), make_policy(T, A), make_obs(B)
    batch, cache = reinflow.minibatch(collected(reinflow, policy, obs).record), encoded(reinflow, policy, obs)
    before = reinflow.loss(policy, cache, batch, torch.zeros(B))
    before.loss.backward(retain_graph=True)
    with torch.no_grad():
        for parameter in reinflow.module.parameters():
            parameter.sub_(parameter.grad)
    after = reinflow.loss(policy, cache, batch, torch.zeros(B))
    assert after.stats["entropy"] > before.stats["entropy"] and after.stats["noise_std"] > before.stats["noise_std"]


def test_behaviour_cloning_is_the_distance_of_the_two_flows(make_policy, make_obs, perturb, check_same):
    reinflow, obs = make(), make_obs(B)
    policy, base = make_policy(T, A).double(), make_policy(T, A).double()
    perturb(policy, 0.05)
    ours = reinflow.behaviour_cloning(policy, encoded(reinflow, policy, obs), base, obs, generator=generator(7))
    assert (policy.encoder.seen, base.encoder.seen) == (B, B)
    noise = torch.randn((B, 1, T, A), generator=generator(7)).double()

    def flow(network, b):
        x = noise[b : b + 1]
        for step in range(K):
            cache = network.encode({"image": obs["image"][b : b + 1]})
            x = x - network.denoise(cache, x, torch.full((1, 1), SCALE * (1 - step / K))) / K
        return x.clamp(-1, 1)

    check_same(ours, sum((flow(policy, b) - flow(base, b).detach()).square().mean() for b in range(B)) / B, policy)
    ours.backward()
    assert all(p.grad is None for p in base.parameters())
    same = reinflow.behaviour_cloning(base, encoded(reinflow, base, obs), base, obs, generator=generator(7))
    assert same.detach() == 0


def test_only_flows_and_only_whole_chains(make_policy, make_obs):
    ddim = DDIMTransitions(torch.tensor([8, 4, 1]), torch.tensor([0.1, 0.4, 0.8, 1.0]), "epsilon")
    with pytest.raises(InvalidArgument, match="must be FlowTransitions.*got DDIMTransitions; DPPO fine-tunes"):
        make(transitions=ddim)
    with pytest.raises(InvalidArgument, match="the noise is learned, so transitions.std must be 0, got 0.1"):
        make(transitions=FlowTransitions(K, std=0.1))
    reinflow, policy, obs = make(), make_policy(T, A), make_obs(B)
    record = collected(reinflow, policy, obs).record
    with pytest.raises(InvalidArgument, match="whole chain: k must be 4 or None, got 2"):
        reinflow.minibatch(record, k=2)
    assert reinflow.minibatch(record, k=K)["x"].shape == (B, K, T, A)
    part = {name: value[:, :2] for name, value in reinflow.minibatch(record).items()}
    with pytest.raises(InvalidArgument, match="a chain has 4 steps, got 2 in the batch"):
        reinflow.loss(policy, encoded(reinflow, policy, obs), part, torch.ones(B))


def test_bad_records_and_caches(make_policy, make_obs):
    reinflow, policy, obs = make(), make_policy(T, A), make_obs(B)
    record = collected(reinflow, policy, obs).record
    with pytest.raises(InvalidArgument, match="got chain, log_prob: old log-probabilities.*of another policy class"):
        reinflow.minibatch({"chain": torch.zeros(B, K + 1, T, A), "log_prob": torch.zeros(B, K)})
    with pytest.raises(InvalidArgument, match=r"reinflow_chain must be .*= \[4, 5, 4, 2\], got \[4, 4, 4, 2\]"):
        reinflow.minibatch({**record, "reinflow_chain": record["reinflow_chain"][:, 1:]})
    for call in (
        lambda cache: reinflow.act(policy, cache),
        lambda cache: reinflow.loss(policy, cache, reinflow.minibatch(record), torch.ones(B)),
    ):
        with pytest.raises(InvalidArgument, match="must be what ReinFlow.condition.* gives, got ConditionFeatures"):
            call(policy.encode(obs))
    cache, batch = encoded(reinflow, policy, obs), reinflow.minibatch(record)
    with pytest.raises(InvalidArgument, match="advantage is a constant; detach it"):
        reinflow.loss(policy, cache, batch, torch.ones(B, requires_grad=True))
    with pytest.raises(InvalidArgument, match=r"advantage must be \[B\] = \[4\], got \[16\]"):
        reinflow.loss(policy, cache, batch, torch.ones(B * K))
    with pytest.raises(InvalidArgument, match=r"features must be \[B, To \* Dc\] = \[B, 12\], got \[4, 6\]"):
        reinflow.module(cache.features[:, 0], torch.zeros(B, K))
    with torch.no_grad():
        policy.denoiser.head[1].bias.fill_(float("inf"))
    with pytest.raises(InvalidArgument, match="ReinFlow.act: the policy gave actions that are not finite"):
        collected(reinflow, policy, obs)
    for constants in ({"clip": 0.0}, {"noise_low": 0.3}, {"entropy_weight": -1.0}, {"bc_weight": float("nan")}):
        with pytest.raises(InvalidArgument, match=next(iter(constants))):
            ReinFlowConfig(**constants)


def test_the_cache_is_a_pytree_of_leading_dimension_b(make_policy, make_obs):
    reinflow, policy = make(), make_policy(T, A)
    cache = encoded(reinflow, policy, make_obs(B))
    half = torch.utils._pytree.tree_map(lambda leaf: leaf[:2], cache)
    assert isinstance(half, ReinFlowCache) and half.features.shape[0] == 2
