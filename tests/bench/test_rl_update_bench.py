"""The rl-update suite: its sides agree, count what they say, refuse what is wrong; the variance is that of minibatches."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "bench"
NAMES = ("run", "rl_update", "rl_variance", "rl_tables", "memory", "timing", "cases")
CPU = torch.device("cpu")


@pytest.fixture
def suite(monkeypatch):
    """The module, with a tiny policy."""
    monkeypatch.setenv("MINIDIFF_FAST_IMPL", "reference")
    monkeypatch.syspath_prepend(str(BENCH))
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    import rl_update

    small = rl_update.PolicyConfig(encoder_width=8, encoder_blocks=1, hidden_dim=16, n_blocks=1)
    monkeypatch.setattr(rl_update, "CASES", {"tiny": rl_update.Case("tiny", small, 3, 3, 3)})
    yield rl_update
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture
def variance(suite, monkeypatch):
    """The module of the variance, with a tiny policy."""
    import rl_variance

    small = rl_variance.PolicyConfig(encoder_width=8, encoder_blocks=1, hidden_dim=16, n_blocks=1)
    monkeypatch.setattr(rl_variance, "CONFIG", small)
    rl_variance.imitated.cache_clear()
    return rl_variance


def test_a_run_writes_every_repeat_and_its_table(suite, capsys, tmp_path) -> None:
    options = ["--cases", "tiny", "--k", "2,4", "--device", "cpu", "--repeats", "3", "--out", str(tmp_path)]
    assert suite.main(options) == 0
    document = json.loads((tmp_path / suite.FILE).read_text())
    assert document["commit"] and document["device"]["kind"] == "cpu" and document["versions"]["torch"]
    assert set(document["cells"]) == {"tiny/K=2", "tiny/K=4"}
    cell = document["cells"]["tiny/K=4"]
    assert {name: len(side["times_ms"]) for name, side in cell["sides"].items()} == dict.fromkeys(suite.SIDES, 3)
    seen = {name: (side["observations"], side["denoiser_rows"]) for name, side in cell["sides"].items()}
    assert seen == {"flat": (12, 12), "peer": (24, 24), "level2": (3, 12)}
    assert all(0 < side["saved_bytes"] <= side["peak_bytes"] for side in cell["sides"].values())
    assert cell["sides"]["level2"]["saved_bytes"] < cell["sides"]["flat"]["saved_bytes"]
    assert max(cell["errors"].values()) <= suite.TOLERANCE
    printed = capsys.readouterr().out
    assert suite.main(["--table", str(tmp_path / suite.FILE)]) == 0
    again = capsys.readouterr().out.strip()
    assert "| 4 | level2 |" in again and again in printed


def test_steps_lie_on_both_sides_of_the_clip_range(suite) -> None:
    cell = suite.measure(suite.CASES["tiny"], 4, CPU, 1, 0.0)
    assert 0.0 < cell["clip_fraction"] < 1.0


@pytest.mark.parametrize("wrong", ["surrogate", "value"])
def test_a_side_with_another_gradient_is_refused(suite, monkeypatch, wrong) -> None:
    def side(update):
        obs, batch, rest = suite.minibatch(update)
        actor, value = suite.level2_losses(update.policy, update.critic, update.algorithm, obs, batch, *rest)
        more = {"surrogate": actor.loss, "value": value}[wrong]
        return actor.loss + suite.VALUE_WEIGHT * value + 1e-3 * (more - more.detach())

    monkeypatch.setitem(suite.SIDES, "level2", side)
    with pytest.raises(SystemExit, match="level2 differs from flat by .*: nothing is timed"):
        suite.measure(suite.CASES["tiny"], 3, CPU, 1, 0.0)


def test_bad_input_is_refused(suite, capsys) -> None:
    assert suite.main(["--cases", "other"]) == 2
    assert "unknown other; there are: tiny, variance" in capsys.readouterr().err


def test_the_suite_is_registered(suite) -> None:
    import run

    assert run.OTHERS["rl-update"] == "rl_update"


def test_norms_are_those_of_single_gradients(variance) -> None:
    store = variance.decide(3, 6, 2, CPU)
    norms = variance.gradient_norms(store)
    pair_loss = variance.PairLoss(store)
    gradients = torch.stack(
        [torch.stack([flat_gradient(pair_loss, store, b, k) for k in range(3)]) for b in range(6)]
    )  # [N, K, P]
    torch.testing.assert_close(norms.pair, gradients.square().sum(2).mean(1), rtol=1e-4, atol=0.0)
    torch.testing.assert_close(norms.decision, gradients.mean(1).square().sum(1), rtol=1e-4, atol=0.0)
    torch.testing.assert_close(norms.full, gradients.mean((0, 1)).square().sum(), rtol=1e-4, atol=0.0)


def flat_gradient(pair_loss, store, b, k):
    obs = {name: value[b] for name, value in store.obs.items()}
    step = {name: value[b, k] for name, value in store.steps.items()}
    loss = pair_loss(obs, step, store.advantage[b])
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(store.policy.parameters()))])


def test_the_ratio_is_that_of_drawn_minibatches(variance) -> None:
    """Minibatches of both kinds drawn without replacement from made-up gradients with a known ratio."""
    torch.manual_seed(0)
    n, k, b, draws = 40, 4, 10, 20_000
    gradients = torch.randn(n, 1, 5) + torch.randn(n, k, 5)  # steps of a decision are correlated
    norms = variance.Norms(
        gradients.square().sum(2).mean(1), gradients.mean(1).square().sum(1), gradients.mean((0, 1)).square().sum()
    )
    decisions, pairs = gradients.mean(1), gradients.flatten(0, 1)
    level2 = decisions[torch.rand(draws, n).argsort(1)[:, :b]].mean(1)
    flat = pairs[torch.rand(draws, n * k).argsort(1)[:, : b * k]].mean(1)
    measured = level2.var(0).sum() / flat.var(0).sum()
    assert variance.variance_ratio(norms, k) == pytest.approx(float(measured), rel=0.03)
    assert measured > 1.5


def test_variance_runs(variance, capsys) -> None:
    found = variance.estimate(2, CPU, decisions=8, imitation_steps=2)
    low, high = found["interval"]
    assert low <= high and found["ratio"] > 0.0 and len(found["squared_norms"]["pair"]) == 8
