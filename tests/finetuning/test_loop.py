"""The loop on a small task: what is encoded when, the pass formulas, warm-up, resume, bad numbers."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

gymnasium = pytest.importorskip("gymnasium", minversion="1.1")

from minidiff_fast.errors import InvalidArgument  # noqa: E402
from minidiff_fast.finetuning.buffer import RolloutError  # noqa: E402
from minidiff_fast.finetuning.chunk import ActionChunk  # noqa: E402
from minidiff_fast.finetuning.counters import flat_encoder_passes, level2_encoder_passes  # noqa: E402
from minidiff_fast.finetuning.critic import OwnCritic, SharedCritic, ValueHead  # noqa: E402
from minidiff_fast.finetuning.learner import UpdateConfig  # noqa: E402
from minidiff_fast.finetuning.loop import Finetuner, LoopConfig, NonFinite, finetune  # noqa: E402
from minidiff_fast.finetuning.vector import make_vector  # noqa: E402
from minidiff_fast.models import DiffusionMLP, LowDimEncoder  # noqa: E402
from minidiff_fast.nn.normalizer import MinMaxNormalizer  # noqa: E402
from minidiff_fast.objectives.dppo import DPPO, DPPOConfig  # noqa: E402
from minidiff_fast.policy import DiffusionPolicy  # noqa: E402
from minidiff_fast.training.config import Interval  # noqa: E402
from minidiff_fast.transitions import DDIMTransitions  # noqa: E402

D, T, A, L = 5, 3, 2, 2


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    monkeypatch.setenv("MINIDIFF_FAST_IMPL", "reference")


class Point(gymnasium.Env):
    """A point that an action moves; the reward is progress towards 0. Truncated after ``limit`` steps."""

    observation_space = gymnasium.spaces.Box(-10.0, 10.0, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (A,), np.float32)

    def __init__(self, limit=7, broken=None):
        self.limit, self.broken, self.steps = limit, broken, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at, self.steps = self.np_random.uniform(-1, 1, 2).astype(np.float32), 0
        return self.at.copy(), {}

    def step(self, action):
        before = np.linalg.norm(self.at)
        self.at = (self.at + 0.2 * np.clip(action, -1, 1)).astype(np.float32)
        self.steps += 1
        reward = float(before - np.linalg.norm(self.at))
        if self.broken == self.steps:
            reward = float("nan")
        solved = bool(np.linalg.norm(self.at) < 0.15)
        return self.at.copy(), reward, solved, self.steps >= self.limit, {"is_success": solved}


def make_policy(seed=0):
    torch.manual_seed(seed)
    unit = MinMaxNormalizer(-torch.ones(2), torch.ones(2))
    denoiser = DiffusionMLP(A, A, T, 1, 2, hidden_dim=32, n_blocks=1)
    return DiffusionPolicy(LowDimEncoder({"observation": 2}), denoiser, {"observation": unit}, copy.deepcopy(unit))


def make_algorithm(steps=D, **constants):
    table = torch.linspace(0.05, 1.0, D + 1)
    transitions = DDIMTransitions(torch.arange(D - 1, -1, -1) * 20, table, "sample")
    config = DPPOConfig(**{"clip": 0.2, "clip_base": 0.05, **constants})
    return DPPO(transitions, (T, A), config, fine_tuned=steps, act_steps=(0, L))


def envs(count=4, kind="sync", **options):
    return make_vector([lambda: ActionChunk(Point(**options), L)] * count, kind)


def own_critic(policy):
    torch.manual_seed(1)
    return OwnCritic(
        LowDimEncoder({"observation": 2}), ValueHead(2, 32, 2), copy.deepcopy(dict(policy.obs_normalizers))
    )


def loop_config(**options):
    update = {"epochs": 2, "batch_size": 16, "actor_lr": 1e-3} | options.pop("update", {})
    values = {"max_iterations": 2, "chunk_steps": 6, "critic_warmup": 0, "executed": (0, L)} | options
    return LoopConfig(update=UpdateConfig(**update), **values)


def make(config, steps=D, base=False, critic=own_critic, env=None, **constants):
    policy = make_policy()
    return Finetuner(
        policy, critic(policy), make_algorithm(steps, **constants), env or envs(limit=1000), config,
        base=copy.deepcopy(policy) if base else None,
    )  # fmt: skip


S, N, E = 6, 4, 2


@pytest.mark.parametrize("steps", [D, 3])
def test_encoder_passes_are_those_of_the_formulas(steps):
    """No episode ends here; a cut one costs one more pass for its last value."""
    level2 = make(loop_config(), steps, base=steps < D).iterate().counters
    rescored = make(loop_config(rescore=True), steps, base=steps < D).iterate().counters
    peer = (
        make(loop_config(update={"flat_pairs": True}, rescore=True, peer_passes=True), steps, base=True)
        .iterate()
        .counters
    )
    lean = make(loop_config(update={"flat_pairs": True}), steps, base=steps < D).iterate().counters
    arguments = (S * N, D, steps, E, 1, N)
    assert level2.encoder_passes == level2_encoder_passes(*arguments, rescoring=False)
    assert rescored.encoder_passes == level2_encoder_passes(*arguments)
    assert peer.encoder_passes == flat_encoder_passes(*arguments)
    assert lean.encoder_passes == S * N * (D + 1 + 2 * E * steps) + N
    assert level2.env_steps == S * N * L and level2.chunk_steps == S * N
    assert level2.denoiser_rows == lean.denoiser_rows == S * N * (D + E * steps)


def test_more_passes_of_the_critic_are_in_the_formulas():
    arguments, more = (S * N, D, D, E, 1, N), {"critic_epochs": 5}
    level2 = make(loop_config(update=more)).iterate().counters
    peer = make(loop_config(update={"flat_pairs": True, **more}, rescore=True, peer_passes=True), base=True).iterate()
    assert level2.encoder_passes == level2_encoder_passes(*arguments, rescoring=False, **more)
    assert peer.counters.encoder_passes == flat_encoder_passes(*arguments, **more)
    assert level2.encoder_passes - level2_encoder_passes(*arguments, rescoring=False) == S * N * (5 - E)


def test_seven_times_fewer_passes():
    assert flat_encoder_passes(1000, 5, 5, 10, 1, 0) / level2_encoder_passes(1000, 5, 5, 10, 1, 0) == pytest.approx(
        7.43, abs=0.01
    )


def test_a_shared_critic_has_no_pass_of_its_own():
    counters = make(loop_config(), critic=lambda policy: SharedCritic(ValueHead(2, 16, 1))).iterate().counters
    assert counters.encoder_passes == S * N * (1 + E) + N and counters.critic_encoder_passes == 0


def test_cloning_costs_the_passes_of_the_base_alone():
    counters = make(loop_config(), base=True, bc_weight=0.1).iterate().counters
    assert counters.base_encoder_passes == S * N * E
    assert counters.encoder_passes == level2_encoder_passes(S * N, D, D, E, 1, N, rescoring=False) + S * N * E


def test_one_more_pass_for_each_episode_that_was_cut():
    tuner = make(loop_config(), env=envs(limit=5))
    done = tuner.iterate()
    cut = int((tuner.buffer.truncated & ~tuner.buffer.terminated).sum())
    assert cut > 0
    assert done.counters.encoder_passes == level2_encoder_passes(S * N, D, D, E, 1, N, rescoring=False) + cut


def test_the_value_after_a_cut_is_that_of_the_last_observation():
    tuner = make(loop_config(), env=envs(limit=4))
    seen = []
    step = tuner.runner.step
    tuner.runner.step = lambda actions: seen.append(step(actions)) or seen[-1]
    tuner._collect()
    found = 0
    for s, result in enumerate(seen):
        for n in np.flatnonzero(result.truncated & ~result.terminated):
            last = {"observation": torch.from_numpy(result.final_obs["observation"][n : n + 1])}
            with torch.no_grad():
                torch.testing.assert_close(tuner.buffer.next_value[s, n], tuner.critic_module(last)[0])
            assert not np.allclose(result.final_obs["observation"][n], result.obs["observation"][n])
            found += 1
    assert found > 0


def test_level2_and_flat_learn_the_same():
    after = []
    for flat in (False, True):
        tuner = make(loop_config(update={"flat_pairs": flat, "target_kl": None}), env=envs(limit=5))
        for _ in range(2):
            tuner.iterate()
        after.append(torch.cat([p.detach().flatten() for p in tuner.module.parameters()]))
    begun = torch.cat([p.detach().flatten() for p in make_policy().parameters()])
    moved = float((after[0] - begun).abs().max())
    assert moved > 1e-3
    torch.testing.assert_close(after[0], after[1], rtol=0, atol=0.02 * moved)


def test_rescoring_changes_no_log_probability():
    tuner = make(loop_config())
    tuner._collect()
    before = tuner.buffer.record["log_prob"].clone()
    tuner._rescore()
    torch.testing.assert_close(tuner.buffer.record["log_prob"], before, rtol=1e-4, atol=1e-5)


def test_it_learns():
    """The point comes home: the mean reward of a decision rises well above what the untrained policy gets."""
    config = loop_config(max_iterations=25, chunk_steps=20, critic_warmup=1, update={"batch_size": 80, "epochs": 5, "actor_lr": 3e-3}, gamma=0.9)  # fmt: skip
    policy = make_policy()
    done = finetune(
        policy,
        own_critic(policy),
        make_algorithm(clip=0.2, min_sampling_std=0.2, min_logprob_std=0.2),
        envs(16),
        config,
    )
    rewards = [report.reward for report in done.reports]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:3]) + 0.08, rewards


def test_a_resumed_run_has_the_state_of_the_first(tmp_path):
    first = make(loop_config(reward_scaling=True), env=envs(limit=5))
    first.iterate()
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = make(loop_config(reward_scaling=True), env=envs(limit=5))
    second.module.load_state_dict(first.module.state_dict())
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert second.counters == first.counters and second.iteration == 1
    first._obs = None  # new episodes, as a resumed run begins them
    one, other = first.iterate(), second.iterate()
    assert one.reward == other.reward and one.stats == other.stats
    for p, q in zip(first.module.parameters(), second.module.parameters(), strict=True):
        assert torch.equal(p, q)


def test_nan_rewards_leave_everything_as_it_was():
    tuner = make(loop_config(), env=envs(limit=50, broken=3))
    before = copy.deepcopy(tuner.module.state_dict())
    with pytest.raises(RolloutError, match="reward nan"):
        tuner.iterate()
    assert all(torch.equal(v, before[n]) for n, v in tuner.module.state_dict().items())
    assert tuner.iteration == 0


def test_after_an_error_new_episodes_begin():
    """The observations of a rollout that was given up are not those of the environments any more."""
    faults = [True]

    class Once(Point):
        def step(self, action):
            seen, reward, *rest = super().step(action)
            return (seen, float("nan") if self.steps == 3 and faults and faults.pop() else reward, *rest)

    env = make_vector([lambda: ActionChunk(Once(limit=1000), L)] * N)
    tuner = make(loop_config(reward_scaling=True), env=env)
    with pytest.raises(RolloutError, match="reward nan"):
        tuner.iterate()
    tuner._collect()
    fresh = make(loop_config(reward_scaling=True))
    fresh.generator.set_state(torch.Generator().manual_seed(0).get_state())
    at = np.stack([each.unwrapped.at for each in env.envs])
    np.testing.assert_array_equal(tuner._obs["observation"][:, 0], at)
    assert (tuner.buffer.obs["observation"][0, :, 0].numpy() == fresh.runner.reset(seed=0)["observation"][:, 0]).all()


def test_a_resumed_run_begins_on_no_start_of_an_evaluation():
    tuner, seeds = make(loop_config()), []
    tuner.runner.reset = lambda seed: seeds.append(seed)
    for tuner.iteration in range(2000):
        tuner._begin()
    assert seeds[0] == 0 and all(seed > 300_000 for seed in seeds[1:]) and len(set(seeds)) == 2000


def test_the_sum_of_an_abandoned_episode_is_forgotten():
    tuner = make(loop_config(reward_scaling=True))
    tuner._collect()
    assert bool(tuner.scaler._carry.any()) and bool(tuner._return.any())
    tuner._begin()
    assert tuner.scaler._carry is None and not tuner._return.any()


@pytest.mark.parametrize("flat", [False, True])
def test_observations_in_float64_are_those_of_the_buffer(flat):
    class Double(Point):
        observation_space = gymnasium.spaces.Box(-10.0, 10.0, (2,), np.float64)

        def reset(self, **options):
            seen, info = super().reset(**options)
            return seen.astype(np.float64) + 1e-9, info

        def step(self, action):
            seen, *rest = super().step(action)
            return (seen.astype(np.float64) + 1e-9, *rest)

    env = make_vector([lambda: ActionChunk(Double(limit=1000), L)] * N)
    tuner = make(loop_config(update={"flat_pairs": flat}), env=env)
    assert tuner.iterate().iteration == 1
    assert all(value.dtype == torch.float32 for value in tuner._tensors(tuner._obs).values())


@pytest.mark.parametrize(
    "diverges",
    [{"actor_lr": 1e30, "target_kl": None}, {"epochs": 1, "batch_size": 1000, "critic_epochs": 2, "critic_lr": 1e30}],
)
def test_a_diverged_run_saves_nothing(diverges):
    saved = []
    tuner = make(loop_config(save=Interval(1, None), update=diverges))
    with pytest.raises(NonFinite, match="iteration"):
        tuner.run(save=lambda t: saved.append(t.iteration))
    assert not saved


def test_an_interrupted_run_is_saved_between_iterations():
    saved = []

    def stop(report):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="after 1 iterations"):
        make(loop_config()).run(save=lambda t: saved.append(t.iteration), report=stop)
    assert saved == [1]


def test_policy_and_critic_act_and_learn_in_eval_mode():
    tuner = make(loop_config(), critic=lambda policy: SharedCritic(nn.Sequential(nn.Dropout(0.5), ValueHead(2, 8, 1))))
    tuner.iterate()
    assert not tuner.module.training and not tuner.critic_module.training
    obs = tuner._tensors(tuner._obs)
    assert torch.equal(tuner._value(obs), tuner._value(obs))


def test_options_that_do_not_go_together():
    with pytest.raises(InvalidArgument, match="max_iterations or max_seconds"):
        LoopConfig()
    for name, value in {"gamma": 1.5, "gae_lambda": -0.1, "chunk_steps": 0, "critic_warmup": -1}.items():
        with pytest.raises(InvalidArgument, match=f"LoopConfig: {name} must be"):
            loop_config(**{name: value})
    with pytest.raises(InvalidArgument, match="peer_passes"):
        make(loop_config(peer_passes=True))
    with pytest.raises(InvalidArgument, match=r"tokens \[0, 2\) that are scored, got \[1, 3\)"):
        make(loop_config(executed=(1, 3)))
    with pytest.raises(InvalidArgument, match=r"must take actions \[2, 2\].*got Box"):
        make(loop_config(), env=make_vector([lambda: ActionChunk(Point(), 3)]))


def test_environments_in_processes_give_the_same_rollout():
    rollouts = []
    for kind in ("sync", "async"):
        env = envs(2, kind, limit=5)
        try:
            tuner = make(loop_config(), env=env)
            tuner._collect()
        finally:
            env.close()
        rollouts.append((tuner.buffer.reward.clone(), tuner.buffer.returns.clone()))
    assert torch.equal(rollouts[0][0], rollouts[1][0]) and torch.equal(rollouts[0][1], rollouts[1][1])


def test_bytes_are_reported():
    """A decision: observation 2, chain (K + 1) T A, K log-probabilities, 5 numbers of 4 bytes and 3 flags."""
    done = make(loop_config()).iterate()
    assert done.buffer_bytes == S * N * (4 * (2 + (D + 1) * T * A + D + 5) + 3)
    assert done.flat_buffer_bytes == S * N * D * (4 * (2 + 2 * T * A + 1 + 5) + 3)
