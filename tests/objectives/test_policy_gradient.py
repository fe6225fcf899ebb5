"""What policy gradients share: GAE, normalisation, PPO's ratio and clip, the value loss, scores of steps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.objectives.policy_gradient import (
    chain_logprob,
    clamp_advantage,
    denoising_clip,
    denoising_discount,
    gae,
    normalize_advantage,
    ppo_loss,
    score_chain,
    transitions_of,
    value_loss,
)
from minidiff_fast.transitions import FlowTransitions

S, N, B, K = 12, 4, 5, 3


# ---------------------------------------------------------------- gae


def rollout(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    reward, value, next_value = torch.randn(3, S, N, generator=generator, dtype=torch.float64)
    flag = torch.rand(3, S, N, generator=generator)
    return {
        "reward": reward, "value": value, "next_value": next_value, "terminated": flag[0] < 0.15,
        "truncated": flag[1] < 0.15, "valid": flag[2] > 0.1,
    }  # fmt: skip


def by_hand(data: dict[str, Tensor], env: int, gamma: float, lam: float) -> list[float]:
    """The sum of discounted errors of each decision, forwards, until the episode or the rollout ends."""
    found = []
    for start in range(S):
        total, factor = 0.0, 1.0
        for s in range(start, S):
            row = {name: tensor[s, env].item() for name, tensor in data.items()}
            if not row["valid"]:
                break
            ahead = 0.0 if row["terminated"] else row["next_value"]
            total += factor * (row["reward"] + gamma * ahead - row["value"])
            factor *= gamma * lam
            if row["terminated"] or row["truncated"]:
                break
        found.append(total)
    return found


@pytest.mark.parametrize("seed", range(4))
def test_gae_is_that_of_a_loop_over_each_environment(seed):
    data = rollout(seed)
    found = gae(**data, gamma=0.97, lam=0.9)
    for env in range(N):
        wanted = torch.tensor(by_hand(data, env, 0.97, 0.9), dtype=torch.float64)
        torch.testing.assert_close(found.advantage[:, env], wanted, rtol=1e-12, atol=1e-13)
    returns = torch.where(data["valid"], found.advantage + data["value"], 0.0)
    torch.testing.assert_close(found.returns, returns, rtol=1e-12, atol=0.0)
    everything = {**data, "valid": torch.ones(S, N, dtype=torch.bool)}
    without = gae(**{**everything, "valid": None}, gamma=0.97, lam=0.9)
    assert torch.equal(without.advantage, gae(**everything, gamma=0.97, lam=0.9).advantage)


def test_truncation_is_not_termination_and_bootstraps_from_the_final_observation():
    one = dict.fromkeys(("reward", "value"), torch.tensor([[1.0], [1.0]]))
    next_value = torch.tensor([[10.0], [0.0]])  # the value of the final observation, not of the next episode's first
    cut, never = torch.tensor([[True], [False]]), torch.zeros(2, 1, dtype=torch.bool)
    truncated = gae(**one, next_value=next_value, terminated=never, truncated=cut, gamma=0.5, lam=1.0)
    terminated = gae(**one, next_value=next_value, terminated=cut, truncated=never, gamma=0.5, lam=1.0)
    both = gae(**one, next_value=next_value, terminated=cut, truncated=cut, gamma=0.5, lam=1.0)
    assert truncated.advantage[:, 0].tolist() == [5.0, 0.0]
    assert terminated.advantage[:, 0].tolist() == both.advantage[:, 0].tolist() == [0.0, 0.0]


def test_an_inserted_reset_row_separates_episodes_and_may_hold_anything():
    """gymnasium's NEXT_STEP autoreset inserts a row with reward 0 after the end of an episode."""
    data = {name: tensor[:5, :1].clone() for name, tensor in rollout().items()}
    data["terminated"][:], data["truncated"][:], data["valid"][:] = False, False, True
    data["truncated"][1] = True
    data["valid"][2] = False
    for name in ("reward", "value", "next_value"):
        data[name][2] = math.nan
    found = gae(**data, gamma=0.9, lam=0.8)
    assert bool(torch.isfinite(found.advantage).all()) and bool(torch.isfinite(found.returns).all())
    assert float(found.advantage[2]) == float(found.returns[2]) == 0.0
    for part in (slice(0, 2), slice(3, 5)):  # each episode as if alone
        alone = gae(**{name: tensor[part] for name, tensor in data.items()}, gamma=0.9, lam=0.8)
        torch.testing.assert_close(found.advantage[part], alone.advantage, rtol=1e-12, atol=0.0)


def test_gae_changes_nothing_it_is_given():
    data = rollout()
    before = {name: tensor.clone() for name, tensor in data.items()}
    gae(**data, gamma=0.9, lam=0.8)
    assert all(torch.equal(data[name], tensor) for name, tensor in before.items())


def test_gae_names_what_is_not_finite():
    for name, number in (("reward", math.nan), ("value", math.inf), ("next_value", -math.inf)):
        data = rollout()
        data["valid"][:], data["terminated"][:] = True, False
        data[name][3, 2] = number
        with pytest.raises(
            InvalidArgument, match=f"gae: {name} must be finite, got {number} at decision 3 of environ.* 2"
        ):
            gae(**data, gamma=0.9, lam=0.9)
    data["terminated"][3, 2] = True  # nothing follows an end
    gae(**data, gamma=0.9, lam=0.9)


def test_gae_refuses_shapes_flags_and_discounts():
    data = rollout()
    for change, message in [
        ({"reward": data["reward"][0]}, r"reward must be \[S, N\], got \[4\]"),
        ({"value": data["value"][:, :1]}, r"value must be \[S, N\] = \[12, 4\], got \[12, 1\]"),
        ({"next_value": data["value"][:-1]}, "next_value must be"),
        ({"terminated": data["terminated"].float()}, "terminated must be boolean, got torch.float32"),
        ({"valid": data["valid"].int()}, "valid must be boolean"),
        ({"gamma": 1.5}, r"gamma must be in \[0, 1\], got 1.5"),
        ({"lam": math.nan}, r"lam must be in \[0, 1\], got nan"),
    ]:
        with pytest.raises(InvalidArgument, match=message):
            gae(**{**data, "gamma": 0.9, "lam": 0.9, **change})


# ---------------------------------------------------------------- advantages


def test_advantages_are_normalised_over_decisions_in_a_new_tensor():
    advantage = torch.randn(B, dtype=torch.float64) * 3 + 2
    before = advantage.clone()
    found = normalize_advantage(advantage)
    assert torch.equal(advantage, before)
    torch.testing.assert_close(found, (before - before.mean()) / before.std(correction=0), rtol=1e-7, atol=0.0)
    assert normalize_advantage(torch.tensor([3.0])).tolist() == [0.0]
    with pytest.raises(InvalidArgument, match=r"advantage must be \[B\], one a decision, got \[5, 3\]"):
        normalize_advantage(advantage[:, None].expand(B, K))


def test_only_valid_decisions_count_in_the_normalisation():
    advantage, valid = torch.tensor([1.0, math.nan, 5.0, 9.0]), torch.tensor([True, False, True, True])
    found = normalize_advantage(advantage, valid)
    torch.testing.assert_close(found[valid], normalize_advantage(advantage[valid]))
    assert float(found[1]) == 0.0
    assert normalize_advantage(advantage, torch.zeros(4, dtype=torch.bool)).tolist() == [0.0] * 4
    with pytest.raises(InvalidArgument, match="valid must be boolean"):
        normalize_advantage(advantage, valid.float())


def test_quantile_clamps_do_not_see_how_often_a_decision_is_repeated():
    advantage = torch.randperm(100, generator=torch.Generator().manual_seed(0)).float() + 1.0
    assert torch.equal(clamp_advantage(advantage), advantage)
    held = clamp_advantage(advantage, 0.07, 0.9)
    assert torch.equal(held, advantage.clamp(7.0, 90.0))
    assert torch.equal(clamp_advantage(advantage.repeat_interleave(K), 0.07, 0.9), held.repeat_interleave(K))
    some = advantage <= 50
    assert torch.equal(clamp_advantage(advantage, 0.1, 0.9, some)[some], advantage[some].clamp(5.0, 45.0))
    with pytest.raises(InvalidArgument, match="0 <= low < high <= 1"):
        clamp_advantage(advantage, 0.9, 0.1)


# ---------------------------------------------------------------- ppo


def step_losses(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    new, noise = torch.randn(2, B, K, generator=generator, dtype=torch.float64)
    return new.requires_grad_(), new.detach() + 0.3 * noise, torch.randn(B, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("per_step", [True, False])
def test_ppo_loss_is_that_of_a_loop(per_step):
    new, old, advantage = step_losses()
    generator = torch.Generator().manual_seed(3)
    discount, weight, eps = torch.rand(3, B, K, generator=generator, dtype=torch.float64) * 0.5 + 0.1
    clip = eps if per_step else 0.2
    valid = torch.tensor([True, True, False, True, True])
    result = ppo_loss(new, old, advantage, clip=clip, discount=discount, weight=weight, valid=valid)
    total = kl = clipped = 0.0
    for b in [0, 1, 3, 4]:
        for k in range(K):
            ratio = torch.exp(new[b, k] - old[b, k])
            limit = float(eps[b, k]) if per_step else 0.2
            gain = advantage[b] * discount[b, k]
            total = total + weight[b, k] * torch.max(-gain * ratio, -gain * ratio.clamp(1 - limit, 1 + limit)) / (4 * K)
            kl += float(ratio.detach() - 1 - (new[b, k] - old[b, k]).detach()) / (4 * K)
            clipped += float(abs(ratio.detach() - 1) > limit) / (4 * K)
    torch.testing.assert_close(result.loss, total, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, new)[0] for loss in (result.loss, total)), rtol=1e-12, atol=0.0
    )
    assert float(result.stats["approx_kl"]) == pytest.approx(kl) and float(
        result.stats["clip_fraction"]
    ) == pytest.approx(clipped)
    ratios = (new - old).exp()[valid].detach()
    torch.testing.assert_close(result.stats["ratio"], ratios.mean())
    torch.testing.assert_close(result.stats["ratio_max"], ratios.max())
    assert not any(stat.requires_grad or stat.dim() for stat in result.stats.values())


def test_one_ratio_a_decision():
    new, old, advantage = step_losses()
    result = ppo_loss(new, old, advantage, clip=0.1, joint="chain")
    ratio = (new - old).mean(1).exp()
    wanted = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.9, 1.1)).mean()
    torch.testing.assert_close(result.loss, wanted, rtol=1e-12, atol=0.0)
    for options in ({"discount": old}, {"weight": old}, {"clip": old}):
        with pytest.raises(InvalidArgument, match='joint="chain" has one ratio a decision'):
            ppo_loss(new, old, advantage, **{"clip": 0.1, "joint": "chain", **options})


def test_an_advantage_is_never_replicated_or_broadcast_silently():
    new, old, advantage = step_losses()
    for wrong in (advantage[:, None], advantage[:, None].expand(B, K), advantage.repeat_interleave(K), advantage[:1]):
        with pytest.raises(InvalidArgument, match=r"advantage must be \[B\] = \[5\]"):
            ppo_loss(new, old, wrong, clip=0.1)
    for options, message in [
        ({"old_log_prob": old[:, :1]}, r"old_log_prob must be \[B, K\] = \[5, 3\], got \[5, 1\]"),
        ({"discount": old[0]}, r"discount must be \[B, K\]"),
        ({"weight": old[:, 0]}, r"weight must be \[B, K\]"),
        ({"clip": old[0].abs()}, r"clip must be \[B, K\]"),
        ({"valid": torch.ones(B, K, dtype=torch.bool)}, r"valid must be \[B\]"),
        ({"valid": torch.ones(B)}, "valid must be boolean"),
        ({"log_prob": new[:, 0]}, r"log_prob must be \[B, K\], got \[5\]"),
        ({"clip": -0.1}, "clip must be at least 0, got -0.1"),
        ({"joint": "both"}, "joint must be 'step' or 'chain', got 'both'"),
        ({"old_log_prob": new}, "old_log_prob is a constant; detach it"),
        ({"advantage": new.mean(1)}, "advantage is a constant; detach it"),
    ]:
        with pytest.raises(InvalidArgument, match=message):
            ppo_loss(**{"log_prob": new, "old_log_prob": old, "advantage": advantage, "clip": 0.1, **options})


def test_ppo_loss_changes_nothing_it_is_given():
    new, old, advantage = step_losses()
    before = [tensor.detach().clone() for tensor in (new, old, advantage)]
    valid = torch.tensor([True, False, True, True, True])
    ppo_loss(new, old, advantage, clip=0.1, discount=torch.ones_like(old), valid=valid).loss.backward()
    assert all(torch.equal(a.detach(), b) for a, b in zip((new, old, advantage), before, strict=True))


def test_a_row_that_does_not_count_gives_no_nan_gradient():
    new, old, advantage = step_losses()
    old[1], advantage[1] = -1e5, math.nan
    valid = torch.tensor([True, False, True, True, True])
    result = ppo_loss(new, old, advantage, clip=0.1, valid=valid)
    (gradient,) = torch.autograd.grad(result.loss, new)
    assert bool(torch.isfinite(gradient).all()) and float(gradient[1].abs().max()) == 0.0
    none = ppo_loss(new, old, advantage, clip=0.1, valid=torch.zeros(B, dtype=torch.bool))
    assert float(none.loss.detach()) == 0.0


def test_small_divergences_are_not_lost_in_rounding():
    new = torch.full((2, 2), 1e-4)
    result = ppo_loss(new, torch.zeros(2, 2), torch.ones(2), clip=0.1)
    assert float(result.stats["approx_kl"]) == pytest.approx(5e-9, rel=1e-2)


# ---------------------------------------------------------------- schedules over denoising steps


def test_the_clip_range_grows_over_the_chain_and_k_1_has_one():
    position = torch.arange(5).expand(2, 5)
    found = denoising_clip(position, 5, clip=0.01, base=0.001, rate=3.0)
    wanted = [0.001 + 0.009 * (math.exp(3 * k / 4) - 1) / (math.exp(3) - 1) for k in range(5)]
    assert found.shape == (2, 5) and found.dtype == torch.float32
    torch.testing.assert_close(found[0], torch.tensor(wanted))
    double = denoising_clip(position, 5, clip=0.01, base=0.001, rate=3.0, dtype=torch.float64)
    torch.testing.assert_close(double[1], torch.tensor(wanted, dtype=torch.float64), rtol=1e-14, atol=0.0)
    straight = denoising_clip(position, 5, clip=0.5, base=0.1, rate=0.0)[0]
    torch.testing.assert_close(straight, torch.linspace(0.1, 0.5, 5))
    assert (
        denoising_clip(torch.zeros(2, 1, dtype=torch.long), 1, clip=0.01, base=0.001, rate=3.0).tolist()
        == [[pytest.approx(0.01)]] * 2
    )


def test_the_discount_falls_towards_noise():
    found = denoising_discount(torch.tensor([[0, 1, 2], [2, 2, 0]]), 3, 0.9)
    torch.testing.assert_close(found, torch.tensor([[0.81, 0.9, 1.0], [1.0, 1.0, 0.81]]))
    assert denoising_discount(torch.tensor([[0, 2]]), 3, 0.0).tolist() == [[0.0, 1.0]]


# ---------------------------------------------------------------- value


def test_value_loss_is_one_a_decision():
    value = torch.randn(B, dtype=torch.float64, requires_grad=True)
    returns, old = torch.randn(2, B, dtype=torch.float64)
    torch.testing.assert_close(value_loss(value, returns), 0.5 * ((value - returns) ** 2).mean())
    near = torch.stack([old[b] + (value[b] - old[b]).clamp(-0.2, 0.2) for b in range(B)])
    wanted = 0.5 * torch.stack([(value - returns) ** 2, (near - returns) ** 2]).max(0).values.mean()
    torch.testing.assert_close(value_loss(value, returns, old, clip=0.2), wanted)
    valid = torch.tensor([True, True, False, True, False])
    broken = torch.where(valid, returns, math.nan)
    loss = value_loss(value, broken, torch.where(valid, old, math.nan), clip=0.2, valid=valid)
    torch.testing.assert_close(loss, value_loss(value[valid], returns[valid], old[valid], clip=0.2))
    (gradient,) = torch.autograd.grad(loss, value)
    assert bool(torch.isfinite(gradient).all()) and gradient[~valid].tolist() == [0.0, 0.0]


def test_value_loss_never_takes_replicated_or_broadcast_rows():
    value, returns = torch.randn(2, B)
    for wrong, message in [
        ((value[:, None].expand(B, K), returns), r"value must be \[B\], one a decision, got \[5, 3\]"),
        ((value[:, None], returns), r"value must be \[B\], one a decision, got \[5, 1\]"),
        ((value, returns[:, None]), r"returns must be \[B\] = \[5\], got \[5, 1\]"),
        ((value, returns.repeat_interleave(K)), r"returns must be \[B\] = \[5\], got \[15\]"),
        ((value, returns, value[:1]), r"old_value must be \[B\]"),
        ((value, returns.clone().requires_grad_()), "returns is a constant; detach it"),
    ]:
        with pytest.raises(InvalidArgument, match=message):
            value_loss(*wrong)
    for options in ({"clip": 0.1}, {"clip": 0.0, "old_value": value}):
        with pytest.raises(InvalidArgument, match="clip must be above 0 and needs old_value"):
            value_loss(value, returns, **options)


# ---------------------------------------------------------------- steps and scores


def test_steps_of_a_chain():
    chain = torch.arange(2 * 4 * 3 * 1.0).view(2, 4, 3, 1)
    x, x_next, position = transitions_of(chain)
    assert torch.equal(x, chain[:, :-1]) and torch.equal(x_next, chain[:, 1:])
    assert x.data_ptr() == chain.data_ptr() and position.tolist() == [[0, 1, 2]] * 2  # a view
    pick = torch.tensor([[2, 0], [1, 2]])
    x, x_next, position = transitions_of(chain, pick)
    for b in range(2):
        for j in range(2):
            assert torch.equal(x[b, j], chain[b, pick[b, j]]) and torch.equal(x_next[b, j], chain[b, pick[b, j] + 1])
    assert torch.equal(position, pick)
    for wrong in (chain[0], chain[:, :1]):
        with pytest.raises(InvalidArgument, match="chain must be"):
            transitions_of(wrong)
    for wrong in (pick[:1], pick.float(), pick[0]):
        with pytest.raises(InvalidArgument, match="pick must be"):
            transitions_of(chain, wrong)


class Still:
    """Predicts no velocity."""

    def encode(self, obs):
        return obs

    def denoise(self, cache, x, t):
        return torch.zeros_like(x)


def test_a_score_is_the_log_density_with_a_least_width():
    x, x_next = torch.randn(2, B, K, 4, 2, dtype=torch.float64)
    index = torch.zeros(B, K, dtype=torch.long)
    for std, least in ((0.3, 0.1), (0.05, 0.1)):
        score = score_chain(
            Still(), None, x, x_next, index, transitions=FlowTransitions(4, std), min_std=least, clamp=None, reduce="sum"
        )  # fmt: skip
        wanted = torch.distributions.Normal(x, max(std, least)).log_prob(x_next).sum((-2, -1))
        torch.testing.assert_close(score.log_prob, wanted, rtol=1e-6, atol=0.0)
    assert bool(
        (score_chain(Still(), None, x, x, index, transitions=FlowTransitions(4), min_std=0.01).clamped == 1).all()
    )


def test_scores_refuse_what_does_not_fit():
    x, index = torch.zeros(B, K, 4, 2), torch.zeros(B, K, dtype=torch.long)
    options = {"transitions": FlowTransitions(4)}
    for arguments, extra, message in [
        ((x[0], x[0], index), {}, r"x and x_next must be \[B, K, T, A\]"),
        ((x, x[:, :1], index), {}, r"x and x_next must be \[B, K, T, A\]"),
        ((x, x, index[:, :1]), {}, r"index \[B, K\] integers"),
        ((x, x, index.float()), {}, r"index \[B, K\] integers"),
        ((x, x, index), {"min_std": 0.0}, "min_std must be above 0"),
        ((x, x, index), {"act_steps": 5}, "act_steps must lie within the T = 4 action tokens, got 5"),
        ((x, x, index), {"act_steps": (3, 3)}, "act_steps must lie within"),
    ]:
        with pytest.raises(InvalidArgument, match=f"chain_logprob: .*{message}"):
            chain_logprob(Still(), None, *arguments, **options, **extra)


def test_losses_do_not_wait_for_the_device():
    """No .item(), no branch on a value: they trace into one graph."""

    def losses(new, old, advantage, valid, value, position):
        gain = clamp_advantage(normalize_advantage(advantage, valid), 0.1, 0.9, valid)
        clip = denoising_clip(position, K, clip=0.1, base=0.01, rate=3.0, dtype=torch.float64)
        actor = ppo_loss(new, old, gain, clip=clip, discount=denoising_discount(position, K, 0.9), valid=valid)
        return actor, value_loss(value, advantage, value.detach(), clip=0.2, valid=valid)

    new, old, advantage = step_losses()
    arguments = (new, old, advantage, torch.ones(B, dtype=torch.bool), new.mean(1), torch.arange(K).expand(B, K))
    torch._dynamo.reset()
    found = torch.compile(losses, fullgraph=True, backend="eager")(*arguments)
    torch.testing.assert_close(found[0].loss, losses(*arguments)[0].loss)
