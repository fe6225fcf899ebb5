"""FPO against a flat implementation that encodes every pair; what its ratio must and must not see."""

from __future__ import annotations

import copy

import pytest
import torch

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.objectives import DiffusionProcess, FlowMatching
from minidiff_fast.objectives.fpo import FPO, FPOConfig, fpo_loss
from minidiff_fast.transitions import DDIMTransitions, FlowTransitions

B, N, T, A, D = 4, 5, 4, 2, 3
TABLE = torch.linspace(0.99, 0.02, 12)


def diffusion(kind):
    steps = torch.tensor([10, 6, 2])
    table = torch.cat([TABLE[steps], torch.ones(1)])
    return DiffusionProcess(TABLE, kind), DDIMTransitions(steps, table, kind)


def flow(noise_at=1):
    process = FlowMatching(noise_at=noise_at, timestep_scale=12.0)
    return process, FlowTransitions.from_process(process, D)


def make(process, transitions, act_steps=None, **constants):
    return FPO(transitions, process, (T, A), FPOConfig(samples=N, **constants), act_steps=act_steps)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def collected(fpo, policy, obs, seed=0):
    return fpo.act(policy, policy.encode(obs), generator=generator(seed))


def double(batch):
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


def flat_pair_loss(policy, obs, fpo, action, noise, time, row):
    """One (observation, action, noise, time), with an encode of its own; formulas from the paper."""
    process = fpo.process
    x0, eps = action.float(), noise.float()
    if isinstance(process, FlowMatching):
        level = time.float() if process.noise_at == 1 else 1 - time.float()
        x = (1 - level) * x0 + level * eps
        seen = time * process.timestep_scale
    else:
        signal, spread = (ab.double().sqrt().float() for ab in (TABLE[time], 1 - TABLE[time]))  # rounded correctly
        x, seen = signal * x0 + spread * eps, time
    cache = policy.encode({"image": obs["image"][row : row + 1]})
    out = policy.denoise(cache, x.to(action.dtype)[None, None], seen[None, None])[0, 0]
    if isinstance(process, FlowMatching):
        towards_noise = 1.0 if process.noise_at == 1 else -1.0
        if fpo.config.flow_error == "velocity":
            error = out - towards_noise * (eps - x0)
        else:  # the noise that x and the velocity imply, against the one drawn
            distance = (1 - time) if process.noise_at == 1 else time
            error = distance * (out * towards_noise - (eps - x0))
    else:
        target = {"epsilon": eps, "sample": x0, "v_prediction": signal * eps - spread * x0}[process.prediction_type]
        error = out - target
    window = slice(None) if fpo.act_steps is None else slice(*fpo.act_steps)
    return error[window].square().mean()


def flat_fpo(policy, obs, fpo, batch, advantage, valid):
    config, total, count = fpo.config, 0.0, 0
    for b in range(len(advantage)):
        if not valid[b]:
            continue
        differences = []
        for n in range(batch["times"].shape[1]):
            new = flat_pair_loss(
                policy, obs, fpo, batch["actions"][b, n], batch["noise"][b, n], batch["times"][b, n], b
            )
            differences.append(batch["old_loss"][b, n] - new)
        if config.average_before_exp:
            ratios = [(sum(differences) / len(differences)).exp()]
        else:
            ratios = [d.clamp(-config.clamp, config.clamp).exp() for d in differences]
        for ratio in ratios:
            clipped = ratio.clamp(1 - config.clip, 1 + config.clip)
            total = total - torch.minimum(ratio * advantage[b], clipped * advantage[b])
            count += 1
    return total / count


CASES = {
    "epsilon": (diffusion("epsilon"), {}, None),
    "sample": (diffusion("sample"), {"average_before_exp": False}, (1, 3)),
    "v": (diffusion("v_prediction"), {}, (0, 2)),
    "flow": (flow(), {}, (1, 3)),
    "flow-single-ratios": (flow(), {"average_before_exp": False, "times": "process"}, None),
    "flow-noise-at-0": (flow(0), {}, None),
    "flow-velocity": (flow(0), {"flow_error": "velocity"}, (1, 4)),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_flat_pairs(case, make_policy, make_obs, perturb, check_same):
    (process, transitions), constants, act_steps = CASES[case]
    fpo = make(process, transitions, act_steps, clip=0.5, **constants)
    policy, obs = make_policy(T, A), make_obs(B)
    batch = double(fpo.minibatch(collected(fpo, policy, obs).record))
    policy = policy.double()
    perturb(policy, 0.03)
    advantage = torch.tensor([1.5, -0.7, 9.0, -1.0], dtype=torch.float64)
    valid = torch.tensor([True, True, False, True])
    ours = fpo.loss(policy, policy.encode(obs), batch, advantage, valid=valid)
    assert 0.0 < float(ours.stats["approx_kl"]) < 1.0
    check_same(ours.loss, flat_fpo(policy, obs, fpo, batch, advantage, valid), policy)


def test_single_ratios_in_the_flat_form_are_the_same_loss(make_policy, make_obs, perturb, check_same):
    """Every pair a condition of its own, through the same method."""
    fpo = make(*flow(), average_before_exp=False)
    policy, obs = make_policy(T, A), make_obs(B)
    batch = double(fpo.minibatch(collected(fpo, policy, obs).record))
    policy = policy.double()
    perturb(policy, 0.02)
    advantage = torch.randn(B, dtype=torch.float64, generator=generator(3))
    rows = {"image": obs["image"].repeat_interleave(N, 0)}
    flat = fpo.loss(
        policy, policy.encode(rows), {name: value.flatten(0, 1)[:, None] for name, value in batch.items()},
        advantage.repeat_interleave(N),
    )  # fmt: skip
    check_same(fpo.loss(policy, policy.encode(obs), batch, advantage).loss, flat.loss, policy)


def test_the_mean_ratio_of_a_peer_with_flat_pairs_is_the_same_loss(make_policy, make_obs, perturb, check_same):
    """A ratio of the mean needs its N pairs together: the peer encodes and denoises N rows, then views them [B, N]."""

    class FlatPairs:
        def __init__(self, policy):
            self.policy = policy

        def denoise(self, cache, x, t):
            return self.policy.denoise(cache, x.flatten(0, 1)[:, None], t.flatten()[:, None]).view_as(x)

    fpo = make(*diffusion("epsilon"))
    policy, obs = make_policy(T, A), make_obs(B)
    batch = double(fpo.minibatch(collected(fpo, policy, obs).record))
    policy = policy.double()
    perturb(policy, 0.02)
    advantage = torch.randn(B, dtype=torch.float64, generator=generator(3))
    rows = {"image": obs["image"].repeat_interleave(N, 0)}
    flat = fpo.loss(FlatPairs(policy), policy.encode(rows), batch, advantage)
    check_same(fpo.loss(policy, policy.encode(obs), batch, advantage).loss, flat.loss, policy)


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("k", [None, 2])
def test_the_ratio_is_1_with_unchanged_weights(average, k, make_policy, make_obs):
    """Also for a random subset of the pairs, whose old losses must be those of the same pairs."""
    fpo = make(*flow(), average_before_exp=average)
    policy, obs = make_policy(T, A), make_obs(B)
    batch = fpo.minibatch(collected(fpo, policy, obs).record, k=k, generator=generator(5))
    assert batch["noise"].shape == (B, k or N, T, A) and batch["times"].shape == batch["old_loss"].shape == (B, k or N)
    result = fpo.loss(policy, policy.encode(obs), batch, torch.ones(B))
    torch.testing.assert_close(result.stats["ratio_max"], torch.tensor(1.0), rtol=1e-6, atol=0)
    torch.testing.assert_close(result.stats["ratio"], torch.tensor(1.0), rtol=1e-6, atol=0)
    result.loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in policy.parameters())


def test_a_subset_is_without_replacement_and_fair(make_policy, make_obs):
    fpo = make(*flow())
    record = collected(fpo, make_policy(T, A), make_obs(B)).record
    record["fpo_loss"] = torch.arange(N).float().expand(B, N)
    counts, draws = torch.zeros(N), generator(1)
    for _ in range(300):
        old = fpo.minibatch(record, k=3, generator=draws)["old_loss"]
        assert all(len(set(row.tolist())) == 3 for row in old)
        counts += torch.bincount(old.flatten().long(), minlength=N)
    assert (counts / (300 * B) - 3 / N).abs().max() < 0.06


def test_sampling_and_all_pairs_take_one_encode(make_policy, make_obs):
    """Per observation, 10 sampler steps, 8 pairs, 16 epochs: 1 + 16 encodes instead of 10 + 8 + 16 * 8 = 146."""
    process, _ = flow()
    fpo = FPO(FlowTransitions.from_process(process, 10), process, (T, A), FPOConfig(samples=8))
    policy, obs = make_policy(T, A), make_obs(B)
    decision = collected(fpo, policy, obs)
    assert policy.encoder.seen == B
    for _ in range(16):
        fpo.loss(policy, policy.encode(obs), fpo.minibatch(decision.record), torch.ones(B)).loss.backward()
    assert policy.encoder.seen == 17 * B


def test_the_action_scored_is_the_one_drawn_not_the_clamped_one(make_policy, make_obs):
    fpo = make(*flow())
    policy, obs = make_policy(T, A), make_obs(16)
    decision = collected(fpo, policy, obs)
    drawn = decision.record["fpo_actions"]
    assert drawn.abs().max() > 1.0 and decision.actions.abs().max() == 1.0
    torch.testing.assert_close(decision.actions, drawn.clamp(-1, 1))


def test_actions_are_those_of_the_plain_euler_flow(make_policy, make_obs):
    fpo = make(*flow())
    policy, obs = make_policy(T, A), make_obs(B)
    decision = collected(fpo, policy, obs)
    x = torch.randn((B, 1, T, A), generator=generator(0))
    cache = policy.encode(obs)
    with torch.no_grad():
        for step in range(D):
            x = x - policy.denoise(cache, x, torch.full((B, 1), 12.0 * (1 - step / D))) / D
    torch.testing.assert_close(decision.record["fpo_actions"], x[:, 0])


def test_both_time_conventions_are_one_objective(make_policy, make_obs):
    """A velocity field seen from the other end of time gives the same losses and ratios."""
    policy, obs = make_policy(T, A), make_obs(B)

    class Mirrored:
        def denoise(self, cache, x, t):
            return -policy.denoise(cache, x, 12.0 - t)

    one, zero = make(*flow(1)), make(*flow(0))
    batch = one.minibatch(collected(one, policy, obs).record)
    batch["old_loss"] = batch["old_loss"] + 0.1
    mirrored = {**batch, "times": 1.0 - batch["times"]}
    cache, advantage = policy.encode(obs), torch.randn(B)
    ours, theirs = one.loss(policy, cache, batch, advantage), zero.loss(Mirrored(), cache, mirrored, advantage)
    torch.testing.assert_close(ours.loss, theirs.loss)
    torch.testing.assert_close(ours.stats["loss_new"], theirs.stats["loss_new"])


def test_times_are_those_that_the_sampler_visits(make_policy, make_obs):
    for (process, transitions), visited in [
        (flow(1), {1.0, 0.6667, 0.3333}), (flow(0), {0.0, 0.3333, 0.6667}), (diffusion("epsilon"), {10, 6, 2}),
    ]:  # fmt: skip
        fpo = FPO(transitions, process, (T, A), FPOConfig(samples=32))
        times = collected(fpo, make_policy(T, A), make_obs(2)).record["fpo_times"]
        assert {round(t, 4) for t in times.flatten().tolist()} == visited
        assert times.is_floating_point() == isinstance(process, FlowMatching)


def test_the_share_of_ratios_at_the_clamp_is_logged():
    """Beyond the clamp there is no gradient: that must not be silent."""
    new = torch.tensor([[5.0, 0.0], [0.0, 0.0]], requires_grad=True)
    result = fpo_loss(new, torch.zeros(2, 2), torch.tensor([1.0, 1.0]), average_before_exp=False)
    assert result.stats["log_ratio_clamped"] == 0.25
    result.loss.backward()
    assert new.grad[0, 0] == 0 and new.grad[1, 0] != 0
    huge = fpo_loss(torch.full((1, 2), -1e4), torch.zeros(1, 2), torch.tensor([-1.0]), average_before_exp=False)
    assert torch.isfinite(huge.loss)


def test_weights_of_pairs():
    new, old, advantage = torch.rand(3, 4), torch.rand(3, 4), torch.randn(3)
    weight = torch.rand(3, 4)
    ratio = (weight * (old - new)).mean(1).exp()
    expected = -torch.minimum(ratio * advantage, ratio.clamp(0.95, 1.05) * advantage).mean()
    torch.testing.assert_close(fpo_loss(new, old, advantage, weight=weight).loss, expected)
    ratio = (old - new).exp()
    expected = torch.maximum(-advantage[:, None] * ratio, -advantage[:, None] * ratio.clamp(0.95, 1.05))
    single = fpo_loss(new, old, advantage, weight=weight, average_before_exp=False)
    torch.testing.assert_close(single.loss, (weight * expected).mean())


def test_bad_records(make_policy, make_obs):
    fpo = make(*flow())
    record = collected(fpo, make_policy(T, A), make_obs(B)).record
    foreign = {"chain": torch.zeros(B, D + 1, T, A), "log_prob": torch.zeros(B, D)}
    with pytest.raises(InvalidArgument, match="got chain, log_prob: old log-probabilities.*of another policy class"):
        fpo.minibatch(foreign)
    with pytest.raises(InvalidArgument, match=r"fpo_noise must be \[B, 8, 4, 2\] = \[4, 8, 4, 2\], got \[4, 5, 4, 2\]"):
        FPO(fpo.transitions, fpo.process, (T, A)).minibatch(record)
    with pytest.raises(InvalidArgument, match=r"fpo_loss must be .*= \[4, 5\], got \[3, 5\]"):
        fpo.minibatch({**record, "fpo_loss": record["fpo_loss"][:3]})
    for k in (0, N + 1, 2.0):
        with pytest.raises(InvalidArgument, match=rf"must be in \[1, 5\], got {k}"):
            fpo.minibatch(record, k=k)


def test_bad_policies(make_policy, make_obs):
    fpo, policy, obs = make(*flow()), make_policy(T, A), make_obs(B)
    with pytest.raises(InvalidArgument, match="training mode"):
        collected(fpo, copy.deepcopy(policy).train(), obs)
    with torch.no_grad():
        policy.denoiser.head[1].bias.fill_(float("nan"))
    with pytest.raises(
        InvalidArgument, match="FPO.act: the policy gave actions that are not finite, first for observation 0"
    ):
        collected(fpo, policy, obs)


def test_bad_losses():
    new, old, advantage = torch.rand(3, 4), torch.rand(3, 4), torch.randn(3)
    for arguments, message in [
        ((new[0], old, advantage), r"loss_new must be \[B, N\], got \[4\]"),
        ((new, old[:, :1], advantage), r"loss_old must be \[B, N\] = \[3, 4\], got \[3, 1\]"),
        ((new, old, torch.randn(12)), r"advantage must be \[B\] = \[3\], got \[12\]"),
        ((new, old, advantage[:, None]), r"advantage must be \[B\] = \[3\], got \[3, 1\]"),
        ((new, old.clone().requires_grad_(), advantage), "loss_old is a constant"),
        ((new, torch.rand(3, 4), torch.randn(3, requires_grad=True)), "advantage is a constant; detach it"),
    ]:
        with pytest.raises(InvalidArgument, match=message):
            fpo_loss(*arguments)


def test_sampler_and_process_must_speak_of_the_same_times():
    (one, _), (_, zero) = flow(1), flow(0)
    with pytest.raises(InvalidArgument, match=r"share \(noise_at, timestep_scale\), got \(0, 12.0\) and \(1, 12.0\)"):
        FPO(zero, one, (T, A))
    with pytest.raises(InvalidArgument, match="share prediction_type, got 'sample' and 'epsilon'"):
        FPO(diffusion("sample")[1], diffusion("epsilon")[0], (T, A))
    with pytest.raises(InvalidArgument, match="DDIMTransitions does not sample what FlowMatching trains"):
        FPO(diffusion("sample")[1], one, (T, A))
    with pytest.raises(InvalidArgument, match=r"act_steps must lie within the T = 4"):
        make(*flow(), act_steps=(2, 9))
    for constants in ({"clip": 0.0}, {"samples": 0}, {"times": "x"}, {"flow_error": "x"}, {"min_sampling_std": -1.0}):
        with pytest.raises(InvalidArgument, match=next(iter(constants))):
            FPOConfig(**constants)
