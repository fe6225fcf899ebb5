"""Counts come from the tensors that pass through; the formulas are those of the flat and the Level-2 iteration."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.finetuning.counters import (
    CountedCritic,
    CountedPolicy,
    Counters,
    flat_encoder_passes,
    level2_encoder_passes,
)


class PlainPolicy(nn.Module):
    """encode and denoise alone."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def encode(self, obs: dict[str, Tensor]) -> Tensor:
        return self.linear(obs["state"][:, -1])

    def denoise(self, cache: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return x + cache[:, None, None, :2]


class SplitPolicy(PlainPolicy):
    """encode in two halves."""

    def features(self, obs: dict[str, Tensor]) -> Tensor:
        return self.linear(obs["state"][:, -1])

    def condition(self, features: Tensor) -> Tensor:
        return features

    def encode(self, obs: dict[str, Tensor]) -> Tensor:
        return self.condition(self.features(obs))


def observations(batch: int) -> dict[str, Tensor]:
    return {"state": torch.ones(batch, 2, 3), "image": torch.zeros(batch, 2, 3, 4, 4, dtype=torch.uint8)}


def test_a_plain_policy_is_counted_by_its_tensors() -> None:
    counters = Counters()
    policy = CountedPolicy(PlainPolicy(), counters, cameras=2)
    cache = policy.encode(observations(5))
    policy.denoise(cache, torch.zeros(5, 4, 6, 2), torch.zeros(5, 4))
    policy(cache[:3], torch.zeros(3, 1, 6, 2), torch.zeros(3, 1))
    assert counters == Counters(encoder_passes=10, denoiser_rows=23)


def test_features_count_once_and_condition_not_at_all() -> None:
    counters = Counters()
    policy = CountedPolicy(SplitPolicy(), counters)
    policy.condition(policy.features(observations(4)))
    assert counters.encoder_passes == 4
    policy.encode(observations(4))  # goes through features inside
    assert counters.encoder_passes == 8


def test_the_counted_results_are_the_policys() -> None:
    policy = SplitPolicy()
    counted = CountedPolicy(policy, Counters())
    obs = observations(3)
    assert torch.equal(counted.encode(obs), policy.encode(obs))
    assert torch.equal(counted.features(obs), policy.features(obs))
    x, t = torch.randn(3, 2, 6, 2), torch.zeros(3, 2)
    assert torch.equal(counted.denoise(policy.encode(obs), x, t), policy.denoise(policy.encode(obs), x, t))


def test_the_base_counts_in_both_fields() -> None:
    counters = Counters()
    actor, base = (CountedPolicy(PlainPolicy(), counters, cameras=3, kind=kind) for kind in ("actor", "base"))
    cache = actor.encode(observations(2))
    base.encode(observations(2))
    base.denoise(cache, torch.zeros(2, 1, 6, 2), torch.zeros(2, 1))
    assert counters == Counters(encoder_passes=12, base_encoder_passes=6, denoiser_rows=2, base_denoiser_rows=2)


def test_everything_else_is_the_policys_own() -> None:
    policy = PlainPolicy()
    counted = CountedPolicy(policy, Counters())
    assert {id(p) for p in counted.parameters()} == {id(p) for p in policy.parameters()}
    counted.eval()
    assert not policy.training
    assert not hasattr(counted, "features") and not hasattr(counted, "condition")
    twin = copy.deepcopy(counted)
    assert twin.linear is not policy.linear and torch.equal(twin.linear.weight, policy.linear.weight)


def test_a_critic_counts_rows_and_its_own_encoder() -> None:
    counters = Counters()

    def value(obs: Any, features: Any = None) -> Tensor:
        return obs["state"].sum((1, 2))

    CountedCritic(value, counters)(observations(4), None)
    CountedCritic(value, counters, cameras=2)(observations(3))
    assert counters == Counters(critic_rows=7, encoder_passes=6, critic_encoder_passes=6)


def test_add_reset_and_what_one_update_did() -> None:
    counters = Counters()
    counters.add(env_steps=8, chunk_steps=1)
    before = counters.snapshot()
    counters.add(env_steps=16, restarts=1)
    assert counters.since(before).to_dict() == {**Counters().to_dict(), "env_steps": 16, "restarts": 1}
    assert Counters(**counters.to_dict()) == counters
    counters.reset()
    assert counters == Counters()


@pytest.mark.parametrize(
    "amounts", [{"env_steps": 1, "steps": 1}, {"env_steps": 1, "chunk_steps": -1}, {"env_steps": 1.0}]
)
def test_wrong_amounts_add_nothing(amounts: dict[str, Any]) -> None:
    counters = Counters()
    with pytest.raises(InvalidArgument, match="Counters.add"):
        counters.add(**amounts)
    assert counters == Counters()


def test_arguments_are_checked() -> None:
    with pytest.raises(InvalidArgument, match="cameras must be an int >= 1, got 0"):
        CountedPolicy(PlainPolicy(), Counters(), cameras=0)
    with pytest.raises(InvalidArgument, match="kind must be 'actor' or 'base'"):
        CountedPolicy(PlainPolicy(), Counters(), kind="frozen")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="without encode and denoise"):
        CountedPolicy(object(), Counters())
    counted = CountedPolicy(PlainPolicy(), Counters())
    with pytest.raises(InvalidArgument, match=r"leading dimensions \[2, 3\]"):
        counted.encode({"a": torch.zeros(2), "b": torch.zeros(3)})


def walk_flat(decisions: int, steps: int, fine_tuned: int, epochs: int, cameras: int, envs: int) -> int:
    """The flat iteration counted call by call."""
    count = 0
    for _ in range(decisions):
        for step in range(steps):
            count += 1  # base
            count += step >= steps - fine_tuned  # actor
        for _ in range(fine_tuned):
            count += 2  # old log-probability: base and actor
        count += 1  # value
    for _ in range(epochs):
        for _ in range(decisions * fine_tuned):
            count += 3  # base, actor, critic
    return cameras * (count + envs)


@pytest.mark.parametrize("case", [(7, 5, 5, 10, 1, 3), (4, 20, 10, 2, 2, 4), (1, 1, 1, 0, 1, 0)])
def test_the_flat_formula_is_the_flat_iteration(case: tuple[int, ...]) -> None:
    assert flat_encoder_passes(*case) == walk_flat(*case)


def test_figures_of_dppo() -> None:
    robomimic = (50 * 300, 5, 5, 10, 1, 50)
    assert flat_encoder_passes(*robomimic) == 15_000 * 171 + 50 == 2_565_050
    assert level2_encoder_passes(*robomimic) == 15_000 * 23 + 50 == 345_050
    assert flat_encoder_passes(*robomimic) / level2_encoder_passes(*robomimic) == pytest.approx(7.43, abs=0.005)
    ddpm = (15_000, 20, 10, 10, 1, 50)
    assert flat_encoder_passes(*ddpm) / level2_encoder_passes(*ddpm) == pytest.approx(14.6, abs=0.05)
    assert level2_encoder_passes(*robomimic, rescoring=False) == 15_000 * 22 + 50
    with pytest.raises(InvalidArgument, match="fine_tuned = 6"):
        flat_encoder_passes(10, 5, 6, 1, 1, 1)
    for formula in (flat_encoder_passes, level2_encoder_passes):
        with pytest.raises(InvalidArgument, match="critic_epochs must be at least epochs = 4, got 3"):
            formula(10, 5, 5, 4, 1, 1, critic_epochs=3)
