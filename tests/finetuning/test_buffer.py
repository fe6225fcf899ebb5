"""The rollout buffer: one observation per decision, exact bytes, whole epochs, and nothing that cannot be learned from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.finetuning.buffer import ObsEntry, RewardScaler, RolloutBuffer, RolloutError, obs_entries

S, N, K, T, A = 6, 3, 5, 4, 2
ENTRIES = {"image": ObsEntry((2, 3, 8, 8), torch.uint8), "state": ObsEntry((2, 5), torch.float64)}


def decision(step: int = 0, **changes: Any) -> dict[str, Any]:
    """One decision of every environment; numbers tell where they come from."""
    env = np.arange(N)
    row: dict[str, Any] = {
        "obs": {
            "image": np.full((N, 2, 3, 8, 8), step, dtype=np.uint8),
            "state": np.broadcast_to((10.0 * step + env)[:, None, None], (N, 2, 5)),
        },
        "record": {
            "chain": torch.full((N, K + 1, T, A), float(step)) + torch.arange(N)[:, None, None, None] / 10,
            "log_prob": torch.full((N, K), -float(step), dtype=torch.float64),
        },
        "reward": 1.0 + step + 0.1 * env,
        "terminated": np.zeros(N, dtype=bool),
        "truncated": np.zeros(N, dtype=bool),
        "value": torch.full((N,), 0.5 * step),
    }
    return {**row, **changes}


def add(buffer: RolloutBuffer, row: dict[str, Any]) -> None:
    buffer.add(row.pop("obs"), **row)


def filled(rows: list[dict[str, Any]] | None = None, **options: Any) -> RolloutBuffer:
    rows = [decision(step) for step in range(S)] if rows is None else rows
    buffer = RolloutBuffer(len(rows), N, ENTRIES, **options)
    for row in rows:
        add(buffer, row)
    return buffer


def flags(*env: int) -> np.ndarray:
    out = np.zeros(N, dtype=bool)
    out[list(env)] = True
    return out


def test_rows_give_back_what_was_added() -> None:
    buffer = filled()
    buffer.finish(torch.zeros(N), gamma=0.9, lam=0.8)
    index = torch.tensor([0, 4, 17, 4])
    rows = buffer.rows(index)
    assert rows.obs["image"].dtype == torch.uint8 and rows.obs["state"].dtype == torch.float32
    assert rows.record["log_prob"].dtype == torch.float32
    for row, flat in enumerate(index.tolist()):
        step, env = divmod(flat, N)
        assert torch.equal(rows.obs["image"][row], torch.full((2, 3, 8, 8), step, dtype=torch.uint8))
        assert torch.equal(rows.obs["state"][row], torch.full((2, 5), 10.0 * step + env))
        assert torch.equal(rows.record["chain"][row], torch.full((K + 1, T, A), step + env / 10))
        assert torch.equal(rows.record["log_prob"][row], torch.full((K,), -float(step)))
        assert float(rows.value[row]) == 0.5 * step
    assert rows.valid.all() and rows.features is None and torch.equal(rows.indices, index)


def test_what_the_environment_reuses_is_copied() -> None:
    buffer = RolloutBuffer(1, N, ENTRIES)
    row = decision(3)
    state = row["obs"]["state"] = np.ones((N, 2, 5))
    chain = row["record"]["chain"]
    add(buffer, row)
    state[:] = 7.0
    chain.fill_(7.0)
    assert torch.equal(buffer.obs["state"][0], torch.ones(N, 2, 5)) and float(buffer.record["chain"].max()) < 7.0


def test_bytes_are_exact() -> None:
    buffer = filled(keep_features=True, rows=[decision(s, features=torch.zeros(N, 2, 16)) for s in range(S)])
    rows = S * N
    expected = {
        "obs.image": rows * 2 * 3 * 8 * 8,
        "obs.state": rows * 2 * 5 * 4,
        "record.chain": rows * (K + 1) * T * A * 4,
        "record.log_prob": rows * K * 4,
        "features": rows * 2 * 16 * 4,
        **dict.fromkeys(["reward", "value", "next_value", "advantage", "returns"], rows * 4),
        **dict.fromkeys(["terminated", "truncated", "valid"], rows),
    }
    assert buffer.nbytes == {**expected, "total": sum(expected.values())}
    once = sum(size for name, size in expected.items() if not name.startswith("record."))
    pairs = rows * K * 2 * T * A * 4
    assert buffer.flat_nbytes(K) == K * once + pairs + rows * K * 4


def test_nothing_has_a_denoising_axis_but_the_record() -> None:
    def without_record(k: int) -> int:
        row = decision(0, record={"chain": torch.zeros(N, k + 1, T, A), "log_prob": torch.zeros(N, k)})
        sizes = filled([row]).nbytes
        return sum(size for name, size in sizes.items() if not name.startswith("record.") and name != "total")

    assert without_record(1) == without_record(50)


def test_a_record_of_decisions_is_told_apart_in_the_flat_bytes() -> None:
    record = {"actions": torch.zeros(N, T, A), "noise": torch.zeros(N, K, T, A)}
    buffer = filled([decision(0, record=record)])
    flat_actions = K * N * T * A * 4
    once = sum(size for name, size in buffer.nbytes.items() if "record" not in name and name != "total")
    assert buffer.flat_nbytes(K) == K * once + flat_actions + N * K * T * A * 4
    with pytest.raises(InvalidArgument, match=r"record 'actions' must be \[S, N, K or K \+ 1, ...\]"):
        buffer.flat_nbytes(K, per_decision=())


def test_float64_image_buffers_are_refused() -> None:
    for dtype in (torch.float64, torch.float32):
        with pytest.raises(InvalidArgument, match="images must be uint8.*'image'"):
            RolloutBuffer(S, N, {"image": ObsEntry((2, 3, 8, 8), dtype)})
    buffer = RolloutBuffer(S, N, ENTRIES)
    row = decision()
    row["obs"]["image"] = row["obs"]["image"].astype(np.float64)
    with pytest.raises(InvalidArgument, match=r"obs\['image'\] must be torch.uint8, got torch.float64"):
        add(buffer, row)


@pytest.mark.parametrize(
    ("batch", "sizes"), [(4, [4, 4, 4, 4, 2]), (8, [8, 10]), (6, [6, 6, 6]), (7, [7, 7, 4]), (100, [18]), (17, [18])]
)
def test_every_decision_once_per_epoch_no_leftovers(batch: int, sizes: list[int]) -> None:
    buffer = filled()
    buffer.finish(torch.zeros(N), gamma=0.9, lam=0.8)
    generator = torch.Generator().manual_seed(0)
    epochs = [buffer.minibatches(batch, generator=generator) for _ in range(3)]
    for parts in epochs:
        assert [len(part) for part in parts] == sizes
        assert torch.equal(torch.cat(parts).sort().values, torch.arange(S * N))
    assert not torch.equal(torch.cat(epochs[0]), torch.cat(epochs[1]))
    again = buffer.minibatches(batch, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(epochs[0], again, strict=True))


def test_invalid_rows_are_in_no_minibatch() -> None:
    rows = [decision(step) for step in range(S)]
    rows[2] = decision(2, valid=~flags(1), truncated=flags(1))
    buffer = filled(rows)
    buffer.finish(torch.zeros(N), gamma=0.9, lam=0.8)
    taken = torch.cat(buffer.minibatches(4)).tolist()
    assert sorted(taken) == [i for i in range(S * N) if i != 2 * N + 1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_reward_that_is_not_finite_is_refused_before_anything_is_written(bad: float) -> None:
    buffer = RolloutBuffer(S, N, ENTRIES)
    add(buffer, decision(0))
    before = {name: tensor.clone() for name, tensor in buffer._arrays().items()}
    reward = np.ones(N)
    reward[2] = bad
    with pytest.raises(RolloutError, match=r"environment 2 has reward (nan|inf|-inf) at decision 1 of 6"):
        add(buffer, decision(1, reward=reward))
    assert buffer.position == 1
    assert all(torch.equal(before[name], tensor) for name, tensor in buffer._arrays().items())
    add(buffer, decision(1))


def test_nan_observations_and_values_are_refused() -> None:
    buffer = RolloutBuffer(S, N, ENTRIES)
    row = decision()
    row["obs"]["state"] = row["obs"]["state"].copy()
    row["obs"]["state"][1, 0, 3] = np.nan
    with pytest.raises(RolloutError, match="environment 1 has NaN or infinity in observation 'state'"):
        add(buffer, row)
    with pytest.raises(RolloutError, match="environment 0 has value nan"):
        add(buffer, decision(value=torch.tensor([np.nan, 0.0, 0.0])))
    with pytest.raises(RolloutError, match="environment 1 has final_value inf"):
        add(buffer, decision(truncated=flags(1), final_value=np.array([0.0, np.inf, 0.0])))
    assert buffer.position == 0 and not buffer.record


def test_a_zero_length_episode_is_refused() -> None:
    buffer = RolloutBuffer(S, N, ENTRIES)
    with pytest.raises(RolloutError, match="environment 1 took 0 environment steps.*zero-length episode"):
        add(buffer, decision(terminated=flags(1), env_steps=np.array([8, 0, 8])))
    with pytest.raises(RolloutError, match="a decision takes at least 1"):
        add(buffer, decision(env_steps=np.array([8, 8, 0])))
    add(buffer, decision(valid=~flags(1), env_steps=np.array([8, 0, 8])))


def test_what_an_invalid_row_holds_does_not_spread() -> None:
    nan = np.full(N, np.nan)
    record = {"chain": torch.full((N, K + 1, T, A), np.nan), "log_prob": torch.full((N, K), np.nan)}
    rows = [decision(0), decision(1, reward=nan, record=record, valid=flags(), truncated=flags(0, 1, 2)), decision(2)]
    buffer = filled(rows)
    buffer.finish(torch.zeros(N), gamma=0.9, lam=0.8, scaler=RewardScaler(0.9))
    assert all(tensor.isfinite().all() for tensor in buffer._arrays().values())
    assert (buffer.advantage[1] == 0).all()


def by_hand(
    reward: list[float], value: list[float], following: list[float], carries: list[bool], gamma: float, lam: float
) -> list[float]:
    """A_s = delta_s + gamma lam A_{s+1}, as a sum over the deltas of the same episode."""
    deltas = [r + gamma * f - v for r, v, f in zip(reward, value, following, strict=True)]
    out = []
    for start in range(len(deltas)):
        total, weight = 0.0, 1.0
        for step in range(start, len(deltas)):
            total += weight * deltas[step]
            weight *= gamma * lam
            if not carries[step]:
                break
        out.append(total)
    return out


def test_truncation_is_not_termination() -> None:
    """Environment 0 terminates, 1 is truncated (final_value 40), 2 goes on."""
    rows = [decision(step) for step in range(4)]
    rows[1] = decision(1, terminated=flags(0), truncated=flags(1), final_value=np.array([99.0, 40.0, 99.0]))
    buffer = filled(rows)
    buffer.finish(torch.tensor([7.0, 8.0, 9.0]), gamma=0.9, lam=0.8)
    value = [0.0, 0.5, 1.0, 1.5]
    after = [[0.5, 0.0, 1.5, 7.0], [0.5, 40.0, 1.5, 8.0], [0.5, 1.0, 1.5, 9.0]]
    for env in range(N):
        reward = [1.0 + step + 0.1 * env for step in range(4)]
        carries = [True, env == 2, True, True]
        expected = torch.tensor(by_hand(reward, value, after[env], carries, 0.9, 0.8))
        torch.testing.assert_close(buffer.advantage[:, env], expected)
        torch.testing.assert_close(buffer.returns[:, env], expected + torch.tensor(value))
        torch.testing.assert_close(buffer.next_value[:, env], torch.tensor(after[env]))


def test_the_decision_before_a_death_bootstraps_from_what_it_saw() -> None:
    rows = [decision(step) for step in range(4)]
    rows[2] = decision(2, valid=~flags(1), truncated=flags(1), final_value=np.full(N, 77.0))
    buffer = filled(rows)
    buffer.finish(torch.zeros(N), gamma=0.9, lam=0.8)
    alone = 2.1 + 0.9 * 1.0 - 0.5  # V of the observation in which the dead decision was taken is 1.0
    assert float(buffer.advantage[1, 1]) == pytest.approx(alone)
    assert float(buffer.advantage[2, 1]) == 0.0
    assert float(buffer.advantage[3, 1]) == pytest.approx(4.1 + 0.0 - 1.5)


def test_a_truncated_row_needs_its_final_value() -> None:
    buffer = RolloutBuffer(S, N, ENTRIES)
    with pytest.raises(InvalidArgument, match=r"environments \[2\] were truncated: final_value"):
        add(buffer, decision(truncated=flags(2)))
    add(buffer, decision(truncated=flags(2), valid=~flags(2)))
    add(buffer, decision(truncated=flags(2), terminated=flags(2)))


def test_collection_features_come_back_detached() -> None:
    features = torch.randn(N, 2, 16, requires_grad=True)
    buffer = filled([decision(0, features=features)], keep_features=True)
    buffer.finish(torch.zeros(N), gamma=0.9, lam=0.8)
    found = buffer.rows(torch.tensor([2, 0])).features
    assert found is not None and not found.requires_grad
    assert torch.equal(found, features.detach()[[2, 0]])
    with pytest.raises(InvalidArgument, match="features must be given"):
        add(RolloutBuffer(S, N, ENTRIES, keep_features=True), decision())
    with pytest.raises(InvalidArgument, match="features must not be given"):
        add(RolloutBuffer(S, N, ENTRIES), decision(features=features))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": np.ones(N + 1)}, r"reward must be \[N\] = \[3\], got \[4\]"),
        ({"reward": np.ones((N, N))}, r"reward must be \[N\] = \[3\], got \[3, 3\]"),
        ({"value": torch.zeros(N, 1)}, r"value must be \[N\] = \[3\], got \[3, 1\]"),
        ({"terminated": np.zeros(N)}, "terminated must be boolean, got torch.float64"),
        ({"reward": np.zeros(N, dtype=bool)}, "reward must be numbers"),
        ({"record": {"chain": torch.zeros(N, K + 1, T, A)}}, r"record must hold \['chain', 'log_prob'\]"),
        (
            {"record": {"chain": torch.zeros(N, K, T, A), "log_prob": torch.zeros(N, K)}},
            r"record\['chain'\] must be \[N, ...\] = \[3, 6, 4, 2\], got \[3, 5, 4, 2\]",
        ),
        ({"obs": {"image": np.zeros((N, 2, 3, 8, 8), np.uint8)}}, r"\['state'\] missing"),
        (
            {"obs": {**decision()["obs"], "state": np.zeros((N, 5))}},
            r"obs\['state'\] must be \[N, To, ...\] = \[3, 2, 5\], got \[3, 5\]",
        ),
    ],
)
def test_shapes_are_checked_before_anything_is_written(changes: dict[str, Any], message: str) -> None:
    buffer = RolloutBuffer(S, N, ENTRIES)
    add(buffer, decision(0))
    with pytest.raises(InvalidArgument, match=message):
        add(buffer, decision(1, **changes))
    assert buffer.position == 1


def test_the_order_of_calls() -> None:
    buffer = filled([decision(0), decision(1)])
    with pytest.raises(InvalidArgument, match="2 decisions are in, which is all it holds"):
        add(buffer, decision(2))
    for call in (lambda: buffer.minibatches(4), lambda: buffer.rows(torch.tensor([0]))):
        with pytest.raises(InvalidArgument, match=r"call finish\(\) first"):
            call()
    buffer.finish(torch.zeros(N), gamma=0.9, lam=0.8)
    with pytest.raises(InvalidArgument, match="is finished already"):
        buffer.finish(torch.zeros(N), gamma=0.9, lam=0.8)
    buffer.clear()
    add(buffer, decision(0))
    with pytest.raises(InvalidArgument, match="has 1 of 2 decisions"):
        buffer.finish(torch.zeros(N), gamma=0.9, lam=0.8)


def test_a_second_rollout_leaves_nothing_of_the_first() -> None:
    used = filled([decision(step, truncated=flags(0), final_value=np.full(N, 5.0)) for step in range(4)])
    used.finish(torch.ones(N), gamma=0.9, lam=0.8)
    used.clear()
    rows = [decision(step + 10) for step in range(4)]
    for row in rows:
        add(used, dict(row))
    used.finish(torch.ones(N), gamma=0.9, lam=0.8)
    fresh = filled([dict(row) for row in rows])
    fresh.finish(torch.ones(N), gamma=0.9, lam=0.8)
    for name, tensor in fresh._arrays().items():
        assert torch.equal(tensor, used._arrays()[name]), name


def test_entries_of_a_space() -> None:
    spaces = pytest.importorskip("gymnasium").spaces
    image, state = spaces.Box(0, 255, (2, 3, 8, 8), np.uint8), spaces.Box(-1, 1, (2, 5), np.float64)
    assert obs_entries(spaces.Dict({"image": image, "state": state})) == ENTRIES
    assert obs_entries(state, "x") == {"x": ObsEntry((2, 5), torch.float64)}


def running_std(rollouts: list[tuple[Tensor, Tensor]], gamma: float) -> float:
    """Standard deviation of every discounted sum so far, in one list."""
    sums: list[float] = []
    carry = np.zeros(rollouts[0][0].shape[1])
    for reward, ended in rollouts:
        for r, e in zip(reward.numpy(), ended.numpy(), strict=True):
            carry = gamma * carry + r
            sums.extend(carry.tolist())
            carry = np.where(e, 0.0, carry)
    return float(np.std(sums))


def test_rewards_are_scaled_by_the_running_std() -> None:
    torch.manual_seed(0)
    scaler = RewardScaler(0.9)
    rollouts = [(3.0 + 50.0 * torch.randn(80, N, dtype=torch.float64), torch.rand(80, N) < 0.1) for _ in range(2)]
    scaler(*rollouts[0])
    scaled = scaler(*rollouts[1])
    std = running_std(rollouts, 0.9)
    assert scaler.std == pytest.approx(std, rel=1e-3)
    torch.testing.assert_close(scaled, rollouts[1][0] / scaler.std)  # one unit for the whole rollout


def test_scaled_rewards_are_clipped_and_constant_ones_stay_finite() -> None:
    scaler = RewardScaler(0.0)
    reward = torch.zeros(1000, 1)
    reward[500] = 1e6
    assert float(scaler(reward, torch.zeros_like(reward, dtype=torch.bool)).max()) == 10.0
    zero = RewardScaler(0.99)(torch.zeros(5, 2), torch.zeros(5, 2, dtype=torch.bool))
    assert torch.equal(zero, torch.zeros(5, 2))


def test_the_scaler_continues_where_it_was_saved() -> None:
    torch.manual_seed(1)
    ended = torch.rand(20, N) < 0.2
    first, second = torch.randn(2, 20, N)
    whole, saved, loaded = RewardScaler(0.9), RewardScaler(0.9), RewardScaler(0.9)
    whole(first, ended)
    saved(first, ended)
    loaded.load_state_dict(saved.state_dict())
    assert torch.equal(whole(second, ended), loaded(second, ended))
    with pytest.raises(InvalidArgument, match="state must hold"):
        loaded.load_state_dict({"mean": 0.0})


def test_the_scaler_ignores_invalid_rows() -> None:
    torch.manual_seed(2)
    reward, ended = torch.randn(30, 1), torch.zeros(30, 1, dtype=torch.bool)
    with_hole, hole = reward.clone(), torch.ones(30, 1, dtype=torch.bool)
    with_hole[10], hole[10] = float("nan"), False
    scaler, parts = RewardScaler(0.9), RewardScaler(0.9)
    scaled = scaler(with_hole, ended, hole)
    assert scaled.isfinite().all() and float(scaled[10, 0]) == 0.0
    cut = ended.clone()
    cut[9] = True
    keep = [i for i in range(30) if i != 10]
    torch.testing.assert_close(scaled[keep], parts(reward[keep], cut[keep]))


def test_observation_statistics_are_not_updated_between_collection_and_loss() -> None:
    """The scaler learns rewards alone: observations leave as they came, and raw rewards stay."""
    rows = [decision(step) for step in range(S)]
    seen = torch.stack([torch.as_tensor(row["obs"]["state"].copy()) for row in rows]).float()
    buffer = filled(rows)
    reward = buffer.reward.clone()
    buffer.finish(torch.zeros(N), gamma=0.9, lam=0.8, scaler=RewardScaler(0.9))
    assert torch.equal(buffer.rows(torch.arange(S * N)).obs["state"], seen.flatten(0, 1))
    assert torch.equal(buffer.reward, reward)
