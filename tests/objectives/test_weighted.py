"""Weighted regression, IDQL and Diffusion-QL against flat implementations that encode for every sample."""

from __future__ import annotations

import math

import pytest
import torch

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.level2 import Level2Batch
from minidiff_fast.objectives import DenoisingLoss, DiffusionProcess, FlowMatching
from minidiff_fast.objectives.weighted import (
    AWR,
    AWRConfig,
    TwinQ,
    advantage_weights,
    diffusion_ql_loss,
    expectile_value_loss,
    sample_chain_differentiable,
    score_candidates,
    select_candidate,
    weighted_loss,
)
from minidiff_fast.transitions import DDIMTransitions, FlowTransitions

B, K, T, A, D, FEATURES = 4, 3, 4, 2, 4, 12
TABLE = torch.linspace(0.99, 0.02, 12)
STEPS = torch.tensor([10, 7, 4, 1])
PROCESSES = {
    "epsilon": (DiffusionProcess(TABLE), DDIMTransitions(STEPS, torch.cat([TABLE[STEPS], torch.ones(1)]), "epsilon")),
    "flow": (FlowMatching(timestep_scale=12.0), FlowTransitions(D, timestep_scale=12.0)),
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def double(batch):
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


def one(obs, b):
    return {"image": obs["image"][b : b + 1]}


def root(x):
    """Correctly rounded to float32."""
    return x.double().sqrt().float()


def flat_denoising_loss(policy, obs, process, b, action, noise, time, window=slice(None)):
    """The loss of one noised action, whose observation is encoded for it."""
    x0, eps = action.float(), noise.float()
    if isinstance(process, FlowMatching):
        x, target, seen = (1 - time.float()) * x0 + time.float() * eps, eps - x0, time * process.timestep_scale
    else:
        x, target, seen = root(TABLE[time]) * x0 + root(1 - TABLE[time]) * eps, eps, time
    out = policy.denoise(policy.encode(one(obs, b)), x.to(action.dtype)[None, None], seen[None, None])[0, 0]
    return (out - target)[window].square().mean()


# ---------------------------------------------------------------- weights


def test_weights_are_capped_exponentials():
    advantage = torch.tensor([-1.0, 0.0, 0.2, 0.5, 1e4])
    expected = torch.tensor([math.exp(-10.0), 1.0, math.exp(2.0), 100.0, 100.0])
    torch.testing.assert_close(advantage_weights(advantage), expected)
    torch.testing.assert_close(advantage_weights(advantage[None], beta=1.0)[0, 3], torch.tensor(math.exp(0.5)))
    assert advantage_weights(torch.tensor([1e38]), max_weight=7.0).allclose(torch.tensor(7.0))
    assert advantage_weights(torch.tensor([float("nan")])).isnan()
    for arguments, message in [
        ({"advantage": torch.ones(2, requires_grad=True)}, "advantage is a constant; detach it"),
        ({"advantage": torch.ones(2, 1, 1)}, r"must be \[B\] or \[B, K\]"),
        ({"advantage": torch.ones(2), "beta": 0.0}, "must be above 0, got 0.0 and 100.0"),
    ]:
        with pytest.raises(InvalidArgument, match=message):
            advantage_weights(**arguments)


def test_the_weighted_loss_never_broadcasts_over_decisions():
    loss, advantage = torch.rand(B, K), torch.randn(B)
    valid = torch.tensor([True, False, True, True])
    result = weighted_loss(loss, advantage, beta=2.0, max_weight=3.0, valid=valid)
    rows = [min(math.exp(2.0 * advantage[b]), 3.0) * loss[b].mean() for b in range(B) if valid[b]]
    torch.testing.assert_close(result.loss, sum(rows) / 3)
    torch.testing.assert_close(result.stats["weight_capped"], ((2 * advantage >= math.log(3.0)) & valid).sum() / 3)
    for wrong in (advantage[:, None], advantage[:1], torch.randn(B * K), torch.randn(B, K)):
        with pytest.raises(InvalidArgument, match=r"advantage must be \[B\] = \[4\]"):
            weighted_loss(loss, wrong)
    with pytest.raises(InvalidArgument, match=r"loss must be \[B, K\], got \[4\]"):
        weighted_loss(loss[:, 0], advantage)


# ---------------------------------------------------------------- AWR


@pytest.mark.parametrize("kind", PROCESSES)
@pytest.mark.parametrize("act_steps", [None, (1, 3)])
def test_awr_and_its_gradients_are_those_of_flat_pairs(kind, act_steps, make_policy, make_obs, check_same):
    process, transitions = PROCESSES[kind]
    awr = AWR(transitions, process, (T, A), AWRConfig(beta=1.0, max_weight=2.0, samples=K), act_steps=act_steps)
    policy, obs = make_policy(T, A), make_obs(B)
    record = awr.act(policy, policy.encode(obs), generator=generator()).record
    batch, policy = double(awr.minibatch(record, generator=generator(1))), policy.double()
    advantage = torch.tensor([1.5, -0.7, 0.3, -1.0], dtype=torch.float64)
    policy.encoder.seen = 0
    ours = awr.loss(policy, policy.encode(obs), batch, advantage)
    assert policy.encoder.seen == B
    window, total = slice(*(act_steps or (0, T))), 0.0
    for b in range(B):
        for k in range(K):
            loss = flat_denoising_loss(
                policy, obs, process, b, record["awr_actions"][b].double(), batch["noise"][b, k], batch["times"][b, k],
                window,
            )  # fmt: skip
            total = total + min(math.exp(advantage[b]), 2.0) * loss / (B * K)
    check_same(ours.loss, total, policy)
    rows = {"image": obs["image"].repeat_interleave(K, 0)}
    flat = {name: value.flatten(0, 1)[:, None] for name, value in batch.items()}
    check_same(awr.loss(policy, policy.encode(rows), flat, advantage.repeat_interleave(K)).loss, total, policy)


def test_awr_draws_anew_and_reproducibly(make_policy, make_obs):
    process, transitions = PROCESSES["flow"]
    awr, policy = AWR(transitions, process, (T, A)), make_policy(T, A)
    decision = awr.act(policy, policy.encode(make_obs(B)), generator=generator())
    assert decision.actions.abs().max() <= 1.0 and torch.equal(decision.actions, decision.record["awr_actions"])
    draws = generator(2)
    first, second = (awr.minibatch(decision.record, k=5, generator=draws) for _ in range(2))
    again = awr.minibatch(decision.record, k=5, generator=generator(2))
    assert first["noise"].shape == (B, 5, T, A) and first["times"].shape == (B, 5)
    assert torch.equal(first["noise"], again["noise"]) and not torch.equal(first["noise"], second["noise"])
    assert first["actions"].untyped_storage().nbytes() == decision.actions.untyped_storage().nbytes()  # a view


def test_awr_errors(make_policy, make_obs):
    process, transitions = PROCESSES["flow"]
    awr, policy, obs = AWR(transitions, process, (T, A)), make_policy(T, A), make_obs(B)
    with pytest.raises(InvalidArgument, match="got fpo_actions: old log-probabilities.*of another policy class"):
        awr.minibatch({"fpo_actions": torch.zeros(B, T, A)})
    with pytest.raises(InvalidArgument, match=r"awr_actions must be .*= \[4, 4, 2\], got \[4, 3, 2\]"):
        awr.minibatch({"awr_actions": torch.zeros(B, 3, A)})
    with pytest.raises(InvalidArgument, match="must be an int >= 1, got 0"):
        awr.minibatch({"awr_actions": torch.zeros(B, T, A)}, k=0)
    with pytest.raises(InvalidArgument, match="FlowTransitions does not sample what DiffusionProcess trains"):
        AWR(transitions, PROCESSES["epsilon"][0], (T, A))
    with torch.no_grad():
        policy.denoiser.head[1].bias.fill_(float("nan"))
    with pytest.raises(InvalidArgument, match="AWR.act: the policy gave actions that are not finite"):
        awr.act(policy, policy.encode(obs))
    for constants in ({"beta": 0.0}, {"samples": 0}, {"max_weight": -1.0}, {"min_sampling_std": -1.0}):
        with pytest.raises(InvalidArgument, match=next(iter(constants))):
            AWRConfig(**constants)


# ---------------------------------------------------------------- Q functions


@pytest.fixture
def critic():
    torch.manual_seed(5)
    return TwinQ(FEATURES, (T, A), hidden=(8, 8))


def test_ten_candidates_of_twenty_steps_take_one_encode(make_policy, make_obs, critic):
    """The peers encode for every candidate at every step: 200 times."""
    process = PROCESSES["flow"][0]
    policy, obs, projected = make_policy(T, A), make_obs(B), []
    for layer in critic.condition_proj:
        layer.register_forward_hook(lambda _, inputs, __: projected.append(len(inputs[0])))
    with torch.no_grad():
        features = policy.features(obs)
        candidates = sample_chain_differentiable(
            policy, policy.condition(features), FlowTransitions.from_process(process, 20), shape=(T, A), k=10,
            generator=generator(),
        )  # fmt: skip
        action = select_candidate(score_candidates(critic, features, candidates), candidates)
    assert candidates.shape == (B, 10, T, A) and action.shape == (B, T, A)
    assert policy.encoder.seen == B and projected == [B, B]
    assert candidates.abs().max() <= 1.0 and not torch.equal(candidates[:, 0], candidates[:, 1])


def test_scores_and_their_gradients_are_those_of_pairs(make_policy, make_obs, critic, check_same):
    policy, obs, critic = make_policy(T, A).double(), make_obs(B), critic.double()
    candidates = torch.randn(B, K, T, A, dtype=torch.float64, generator=generator())
    ours = critic(policy.features(obs), candidates)
    rows = []
    for e in range(2):
        for b in range(B):
            for k in range(K):
                features = policy.features(one(obs, b)).flatten()
                hidden = critic.condition_proj[e](features) + critic.action_proj[e](candidates[b, k].flatten())
                rows.append(critic.heads[e](hidden)[0])
    expected = torch.stack(rows).view(2, B, K)
    check_same(ours.square().mean(), expected.square().mean(), critic, policy.encoder)
    score = score_candidates(critic, policy.features(obs), candidates)
    torch.testing.assert_close(score, torch.minimum(expected[0], expected[1]), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(
        score_candidates(lambda f, a: critic(f, a)[0], policy.features(obs), candidates), ours[0]
    )


def test_a_critic_reads_the_executed_tokens_alone():
    critic = TwinQ(FEATURES, (T, A), hidden=(8,), act_steps=(1, 3))
    features, actions = torch.randn(B, 2, 6), torch.randn(B, K, T, A)
    other = actions.clone()
    other[:, :, [0, 3]] = 7.0
    assert torch.equal(critic(features, actions), critic(features, other))
    other[:, :, 1] = 7.0
    assert not torch.equal(critic(features, actions), critic(features, other))


def test_the_best_candidate_or_one_by_its_weight():
    score = torch.tensor([[0.1, 0.9, 0.2], [0.5, 0.4, 0.3]])
    candidates = torch.arange(6.0).view(2, 3, 1, 1)
    assert select_candidate(score, candidates).flatten().tolist() == [1.0, 3.0]
    drawn, count = generator(), 4000
    chosen = select_candidate(
        score[:1].expand(count, -1), candidates[:1].expand(count, -1, -1, -1), value=torch.full((count,), 0.15),
        expectile=0.7, generator=drawn,
    )  # fmt: skip
    share = torch.bincount(chosen.flatten().long(), minlength=3) / count
    torch.testing.assert_close(share, torch.tensor([0.3, 0.7, 0.7]) / 1.7, rtol=0, atol=0.025)


def test_rows_that_do_not_count_change_no_gradient():
    loss, value = torch.rand(3, K, requires_grad=True), torch.zeros(3, requires_grad=True)
    valid, wrong = torch.tensor([True, False, True]), torch.tensor([1.0, float("nan"), -2.0])
    weighted_loss(loss, wrong, beta=1.0, valid=valid).loss.backward()
    expected = torch.tensor([math.e, 0.0, math.exp(-2.0)])[:, None].expand(3, K) / (2 * K)
    torch.testing.assert_close(loss.grad, expected)
    expectile_value_loss(value, wrong, expectile=0.5, valid=valid).backward()
    torch.testing.assert_close(value.grad, torch.tensor([-0.5, 0.0, 1.0]))


def test_the_expectile_loss_is_least_at_the_expectile():
    score = torch.randn(500, generator=generator(), dtype=torch.float64)
    value = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    for _ in range(200):
        (gradient,) = torch.autograd.grad(expectile_value_loss(value.expand(500), score, expectile=0.8), value)
        value = (value - gradient).detach().requires_grad_()
    above, below = (score - value).clamp(min=0).sum(), (value - score).clamp(min=0).sum()
    torch.testing.assert_close(0.8 * above, 0.2 * below)
    half = expectile_value_loss(
        torch.zeros(3), torch.tensor([1.0, -2.0, 9.0]), expectile=0.5, valid=torch.tensor([True, True, False])
    )
    torch.testing.assert_close(half, torch.tensor(0.5 * (1.0 + 4.0) / 2))


def test_q_errors(critic):
    candidates, features = torch.zeros(B, K, T, A), torch.zeros(B, 2, 6)
    with pytest.raises(InvalidArgument, match=r"with \[B, K\] = \[4, 3\], got \[2, 4, 3, 1\]"):
        score_candidates(lambda f, a: critic(f, a)[..., None], features, candidates)
    with pytest.raises(InvalidArgument, match=r"features must be .*= \[B, 12\], got \[4, 6\]"):
        critic(features[:, 0], candidates)
    with pytest.raises(InvalidArgument, match=r"actions must be .*= \[4, K, 4, 2\], got \[12, 1, 4, 2\]"):
        critic(features, candidates.flatten(0, 1)[:, None])
    with pytest.raises(InvalidArgument, match="score is a constant"):
        expectile_value_loss(torch.zeros(2), torch.zeros(2, requires_grad=True))
    with pytest.raises(InvalidArgument, match=r"score must be \[B\] = \[2\], got \[2, 1\]"):
        expectile_value_loss(torch.zeros(2), torch.zeros(2, 1))
    with pytest.raises(InvalidArgument, match=r"expectile must be in \(0, 1\), got 1.0"):
        select_candidate(torch.zeros(B, K), candidates, expectile=1.0)
    with pytest.raises(InvalidArgument, match=r"value must be \[B\] = \[4\], got \[4, 3\]"):
        select_candidate(torch.zeros(B, K), candidates, value=torch.zeros(B, K))


# ---------------------------------------------------------------- Diffusion-QL


def flat_step(policy, obs, kind, b, x, step):
    """Mean and standard deviation of one step of one sample, whose observation is encoded for it."""
    if kind == "flow":
        time = torch.tensor(12.0 * (1 - step / D))
        velocity = policy.denoise(policy.encode(one(obs, b)), x[None, None], time[None, None])[0, 0]
        return x - velocity / D, 0.0
    table = torch.cat([TABLE[STEPS], torch.ones(1)]).double()
    ab, after = table[step], table[step + 1]
    eps = policy.denoise(policy.encode(one(obs, b)), x[None, None], STEPS[step][None, None])[0, 0]
    clean = ((x - (1 - ab).sqrt() * eps) / ab.sqrt()).clamp(-1, 1)
    eps = (x - ab.sqrt() * clean) / (1 - ab).sqrt()
    variance = (1 - after) / (1 - ab) * (1 - ab / after)
    return after.sqrt() * clean + (1 - after - variance).clamp(min=0).sqrt() * eps, float(variance.sqrt())


@pytest.mark.parametrize("kind", PROCESSES)
def test_diffusion_ql_and_its_gradients_are_those_of_an_encode_a_sample_and_step(
    kind, make_policy, make_obs, critic, perturb, check_same
):
    process, transitions = PROCESSES[kind]
    policy, obs, critic, eta = make_policy(T, A).double(), make_obs(B), critic.double(), 0.8
    perturb(policy, 0.2)
    actions = torch.rand(B, T, A, generator=generator(1)).double() * 2 - 1
    start = torch.randn(B, K, T, A, generator=generator(2)).double()
    features = policy.features(obs)
    seen = policy.encoder.seen
    ours = diffusion_ql_loss(
        policy, policy.condition(features), critic, features, actions, transitions=transitions, process=process,
        eta=eta, k=K, min_std=0.1, noise=start, generator=generator(3),
    )  # fmt: skip
    assert policy.encoder.seen == seen == B

    draws = generator(3)
    noises = [torch.randn((B, K, T, A), generator=draws, dtype=torch.float64).clamp(-3, 3) for _ in range(D)]
    order = torch.rand(2, generator=draws).argsort()
    drawn = Level2Batch.draw(None, actions, K, DenoisingLoss(process), generator=draws)
    imitation, own = 0.0, []
    for b in range(B):
        for k in range(K):
            x = start[b, k]
            for step in range(D):
                mean, std = flat_step(policy, obs, kind, b, x, step)
                x = mean + max(std, 0.1) * noises[step][b, k]
            own.append(x.clamp(-1, 1))
            imitation = imitation + flat_denoising_loss(
                policy, obs, process, b, actions[b], drawn.noise[b, k], drawn.timesteps[b, k]
            ) / (B * K)  # fmt: skip
    values = critic(features.detach(), torch.stack(own).view(B, K, T, A))
    reference = imitation - eta * values[order[0]].mean() / values[order[1]].detach().abs().mean()
    check_same(ours.loss, reference, policy)

    ours.loss.backward()
    assert all(p.grad is None for p in critic.parameters())  # the actor's loss trains the actor
    assert all(p.requires_grad for p in critic.parameters())


def test_the_critic_does_not_train_the_encoder_through_its_own_input(make_policy, make_obs, critic):
    """Only through the actions: features that please the critic are no better policy."""
    process, transitions = PROCESSES["flow"]
    policy, obs = make_policy(T, A), make_obs(B)
    features = policy.features(obs)
    cache = policy.condition(features.detach())
    result = diffusion_ql_loss(
        policy, cache, critic, features, torch.zeros(B, T, A), transitions=transitions, process=process,
        generator=generator(),
    )  # fmt: skip
    result.loss.backward()
    assert all(p.grad is None for p in policy.encoder.parameters())


def test_diffusion_ql_errors(make_policy, make_obs, critic):
    process, transitions = PROCESSES["flow"]
    policy, obs = make_policy(T, A), make_obs(B)
    features = policy.features(obs)
    cache, actions = policy.condition(features), torch.zeros(B, T, A)
    common = {"transitions": transitions, "process": process}
    for options, message in [
        ({"eta": -1.0}, "eta must be at least 0, got -1.0"),
        ({"k": 0}, "k must be an int >= 1, got 0"),
        ({"noise": torch.zeros(B, 2, T, A)}, r"noise must be .*= \[4, 1, 4, 2\], got \[4, 2, 4, 2\]"),
        ({"process": PROCESSES["epsilon"][0]}, "does not sample what DiffusionProcess trains"),
    ]:
        with pytest.raises(InvalidArgument, match=message):
            diffusion_ql_loss(policy, cache, critic, features, actions, **{**common, **options})
    with pytest.raises(InvalidArgument, match="cache must hold tensors of leading dimension B"):
        sample_chain_differentiable(policy, {}, transitions, shape=(T, A))
