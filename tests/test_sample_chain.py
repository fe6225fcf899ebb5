"""Chains: one encode, the base only where steps are frozen, log-probabilities that a later score repeats."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.models import DiffusionMLP
from minidiff_fast.objectives.policy_gradient import chain_logprob, transitions_of
from minidiff_fast.sampling import sample_actions, sample_chain
from minidiff_fast.transitions import DDIMTransitions, DDPMTransitions, FlowTransitions

diffusers = pytest.importorskip("diffusers")

B, T, A = 3, 4, 2


class Policy(nn.Module):
    """A small denoiser that counts; ``out`` scales its predictions."""

    def __init__(self, seed: int = 0, out: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = DiffusionMLP(A, A, T, 1, 5, hidden_dim=16, n_blocks=1, time_dim=8)
        self.out, self.encodes, self.times = out, 0, []
        self.eval()

    def encode(self, obs: Tensor):
        self.encodes += 1
        return self.net.encode(obs)

    def denoise(self, cache, x: Tensor, t: Tensor) -> Tensor:
        assert x.shape[:2] == t.shape and x.dtype == torch.float32
        self.times.append(t[0, 0].item())
        return self.out * self.net.denoise(cache, x, t)


def scheduler_of(cls: str = "DDIMScheduler", trained: int = 100, **options):
    return getattr(diffusers, cls)(trained, beta_schedule="squaredcos_cap_v2", **options)


def ddim(steps: int = 5, **options) -> DDIMTransitions:
    return DDIMTransitions.from_scheduler(scheduler_of(), steps, **options)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def observations() -> Tensor:
    return torch.randn(B, 1, 5, generator=seeded(7))


@pytest.mark.parametrize("fine_tuned", [None, 2])
def test_one_encode_and_the_base_runs_its_own_steps_only(fine_tuned):
    policy, base = Policy(0), Policy(1)
    chain = sample_chain(
        policy, observations(), ddim(), shape=(T, A), fine_tuned=fine_tuned, base=base, generator=seeded()
    )
    k = 5 if fine_tuned is None else fine_tuned
    assert chain.samples.shape == (B, k + 1, T, A) and chain.log_prob.shape == (B, k)
    assert chain.samples.dtype == chain.log_prob.dtype == torch.float32
    assert (policy.encodes, base.encodes) == ((1, 0) if k == 5 else (1, 1))
    assert (base.times, policy.times) == ([80, 60, 40, 20, 0][: 5 - k], [80, 60, 40, 20, 0][5 - k :])
    again = sample_chain(
        policy, observations(), ddim(), shape=(T, A), fine_tuned=fine_tuned, base=base, generator=seeded(),
        cache=policy.encode(observations()),
    )  # fmt: skip
    assert policy.encodes == 2  # the cache was taken
    assert torch.equal(again.samples, chain.samples)


def test_entry_0_is_where_the_fine_tuned_steps_begin():
    policy = Policy(0)
    whole = sample_chain(policy, observations(), ddim(), shape=(T, A), generator=seeded())
    assert torch.equal(whole.samples[:, 0], torch.randn(B, 1, T, A, generator=seeded())[:, 0])  # the initial noise
    part = sample_chain(policy, observations(), ddim(), shape=(T, A), fine_tuned=2, base=policy, generator=seeded())
    assert torch.equal(part.samples, whole.samples[:, 3:]) and torch.equal(part.log_prob, whole.log_prob[:, 3:])


@pytest.mark.parametrize("name", ["ddim", "ddpm", "flow", "learned"])
@pytest.mark.parametrize("fine_tuned", [None, 3])
def test_log_probabilities_are_those_of_a_later_score(name, fine_tuned):
    transitions = {
        "ddim": ddim(), "ddpm": DDPMTransitions.from_scheduler(scheduler_of("DDPMScheduler", 8)),
        "flow": FlowTransitions(4, 0.2), "learned": FlowTransitions(4),
    }[name]  # fmt: skip

    def noise_std(cache, index: Tensor) -> Tensor:
        return 0.1 + 0.02 * index[..., None, None] + 0.05 * torch.arange(A)

    options = {"act_steps": (1, 3), "noise_std": noise_std if name == "learned" else None}
    policy, base = Policy(0), Policy(1)
    chain = sample_chain(
        policy, observations(), transitions, shape=(T, A), fine_tuned=fine_tuned, base=base, min_std=0.05,
        min_logprob_std=0.07, generator=seeded(), **options,
    )  # fmt: skip
    x, x_next, position = transitions_of(chain.samples)
    index = position + (transitions.steps - chain.log_prob.shape[1])
    later = chain_logprob(policy, chain.cache, x, x_next, index, transitions=transitions, min_std=0.07, **options)
    torch.testing.assert_close(later, chain.log_prob, rtol=0.0, atol=1e-6)
    shifted = chain_logprob(
        policy, chain.cache, x, x_next, (index + 1) % transitions.steps, transitions=transitions, min_std=0.07, **options
    )  # fmt: skip
    assert float((shifted - chain.log_prob).detach().abs().max()) > 1e-3  # at other times it is another density


def test_the_final_sample_is_stored_unclamped_and_so_scored_while_actions_are_clamped():
    policy = Policy(0, out=3.0)
    transitions = FlowTransitions(4, std=0.5)
    chain = sample_chain(policy, observations(), transitions, shape=(T, A), generator=seeded(), log_prob_clamp=None)
    last = chain.samples[:, -1]
    assert float(last.abs().max()) > 1.5 and torch.equal(chain.actions, last.clamp(-1.0, 1.0))
    x, x_next, index = transitions_of(chain.samples)
    options = {"transitions": transitions, "min_std": 0.1, "clamp": None}
    torch.testing.assert_close(
        chain_logprob(policy, chain.cache, x, x_next, index, **options), chain.log_prob, rtol=0.0, atol=1e-5
    )
    held = chain_logprob(policy, chain.cache, x, x_next.clamp(-1.0, 1.0), index, **options)
    assert float((held - chain.log_prob).detach().abs().max()) > 0.1


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_without_noise_it_is_the_schedulers_sampler(prediction):
    scheduler = scheduler_of(prediction_type=prediction, clip_sample=False)
    policy = Policy(0, out=0.3)
    transitions = DDIMTransitions.from_scheduler(scheduler, 5, clip_sample=None).deterministic()
    chain = sample_chain(policy, observations(), transitions, shape=(T, A), min_std=0.0, generator=seeded())
    wanted = sample_actions(
        policy, observations(), scheduler, num_inference_steps=5, shape=(T, A), generator=seeded()
    )  # fmt: skip
    torch.testing.assert_close(chain.samples[:, -1:], wanted, rtol=1e-4, atol=1e-5)
    other = sample_chain(policy, observations(), transitions, shape=(T, A), min_std=0.1, generator=seeded())
    assert not torch.allclose(other.samples[:, -1:], wanted, atol=1e-2)  # a least std is noise


def test_the_generator_decides_and_noise_is_clipped():
    def run(seed: int, **options) -> Tensor:
        return sample_chain(Policy(0), observations(), FlowTransitions(4, 0.3), shape=(T, A), generator=seeded(seed), **options).samples  # fmt: skip

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    still = Policy(0, out=0.0)
    chain = sample_chain(
        still, observations(), FlowTransitions(4, 0.3), shape=(T, A), noise_clip=0.5, generator=seeded()
    )  # fmt: skip
    moved = chain.samples.diff(dim=1).abs()
    assert float(moved.max()) == pytest.approx(0.15, rel=1e-5) and float(moved.min()) < 0.1
    assert float(run(1, noise_clip=None).diff(dim=1).abs().max()) > 0.6


def test_bad_input():
    policy, base, obs = Policy(0), Policy(1), observations()
    for options, message in [
        ({"fine_tuned": 0}, r"fine_tuned must be an int in \[1, 5\], got 0"),
        ({"fine_tuned": 6}, r"fine_tuned must be an int in \[1, 5\], got 6"),
        ({"fine_tuned": True}, "fine_tuned must be an int"),
        ({"fine_tuned": 3}, "2 of 5 steps are frozen: base, the policy of those, is needed"),
        ({"act_steps": 5}, "act_steps must lie within the T = 4 action tokens, got 5"),
        ({"fine_tuned": 3, "base": Policy(1).train()}, "base is in training mode"),
        ({"fine_tuned": 3, "base": base, "cache": policy.encode(obs[:2])}, "obs has 3 observations, cache has B = 2"),
    ]:
        with pytest.raises(InvalidArgument, match=f"sample_chain: {message}"):
            sample_chain(policy, obs, ddim(), shape=(T, A), **options)
    sample_chain(policy, obs, ddim(), shape=(T, A), base=Policy(1).train())  # takes no part
    assert policy.times != []
    policy.train()
    with pytest.raises(InvalidArgument, match="policy is in training mode.*call policy.eval"):
        sample_chain(policy, obs, ddim(), shape=(T, A))
