"""The Push-T fine-tuning bench: intervals, which sampler stands for a policy, the plan, and how it stops and resumes."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(autouse=True)
def bench_folder(monkeypatch):
    """The scripts import each other by their bare names."""
    monkeypatch.syspath_prepend(str(BENCH))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("pusht_finetune"):
            del sys.modules[name]


@pytest.fixture
def runs():
    import pusht_finetune_runs

    return pusht_finetune_runs


@pytest.fixture
def report():
    import pusht_finetune_report

    return pusht_finetune_report


def outcomes(random, rate, shape):
    return (random.random(shape) < rate).astype(float)


# ------------------------------------------------------------------------------------------------ intervals


def test_the_interval_is_that_of_drawing_seeds_and_episodes_by_index(report):
    random = np.random.default_rng(1)
    first, second = outcomes(random, 0.7, (3, 40)), outcomes(random, 0.6, (3, 40))
    gain = report.paired_gain(first, second, draws=400)
    draw, means = np.random.default_rng(0), []
    all_rows, all_columns = draw.integers(3, size=(400, 3)), draw.integers(40, size=(400, 40))
    for rows, columns in zip(all_rows, all_columns, strict=True):
        means.append(np.mean([[first[r, c] - second[r, c] for c in columns] for r in rows]))
    np.testing.assert_allclose((gain.low, gain.high), np.percentile(means, [2.5, 97.5]), atol=1e-12)
    assert gain.mean == pytest.approx((first - second).mean())
    np.testing.assert_allclose(gain.per_seed, (first - second).mean(axis=1))


def test_pairs_cancel_what_both_share(report):
    """Hard starts are hard for both: the same rates unpaired give a far wider interval."""
    random = np.random.default_rng(2)
    hard = random.random((1, 500)) < 0.4
    first = np.where(hard, 0.0, 1.0)
    second = first * (random.random((1, 500)) < 0.95)
    paired = report.paired_gain(first, second, draws=2000)
    unpaired = report.paired_gain(random.permutation(first[0])[None], second, draws=2000)
    assert paired.gains and paired.high - paired.low < 0.5 * (unpaired.high - unpaired.low)


def test_seeds_that_disagree_widen_the_interval(report):
    random = np.random.default_rng(3)
    agree = outcomes(random, 0.1, (3, 500))
    disagree = np.stack([outcomes(random, rate, 500) for rate in (0.0, 0.0, 0.3)])
    zero = np.zeros((3, 500))
    narrow, wide = report.paired_gain(agree, zero, draws=2000), report.paired_gain(disagree, zero, draws=2000)
    assert abs(narrow.mean - wide.mean) < 0.03
    assert narrow.gains and not wide.gains
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)


def test_the_interval_covers_the_truth_about_as_often_as_it_says(report):
    """Episodes alone (one seed), a true gain of 0.1, 100 repeats: 95 % within the noise of 100."""
    random = np.random.default_rng(4)
    hits = 0
    for _ in range(100):
        gain = report.paired_gain(outcomes(random, 0.7, (1, 100)), outcomes(random, 0.6, (1, 100)), draws=300)
        hits += gain.low <= 0.1 <= gain.high
    assert hits >= 86


def test_nothing_gained_is_no_gain(report):
    same = outcomes(np.random.default_rng(5), 0.5, (3, 50))
    assert report.paired_gain(same, same, draws=50) == (0.0, 0.0, 0.0, (0.0, 0.0, 0.0))
    assert not report.paired_gain(same, same, draws=50).gains
    with pytest.raises(ValueError, match=r"\[seeds, episodes\] of one shape, got \(3, 50\) and \(3, 49\)"):
        report.paired_gain(same, same[:, 1:])


# ------------------------------------------------------------------------------------------------- analysis


def evaluation(validation, test, episodes=20):
    """Rates of (deterministic, stochastic) on validation and on test starts."""

    def part(rates):
        made = {}
        for sampler, rate in zip(("deterministic", "stochastic"), rates, strict=True):
            success = [int(i < round(rate * episodes)) for i in range(episodes)]
            made[sampler] = {"success": success, "score": [0.5 + 0.5 * s for s in success]}
        return made

    return {"validation": part(validation), "test": part(test), "wall": 1.0}


def test_the_sampler_is_chosen_on_other_starts_than_it_is_reported_on(report):
    """Chosen on the test starts it would be the stochastic one with 0.9."""
    found = evaluation(validation=(0.6, 0.5), test=(0.5, 0.9))
    assert report.best_sampler(found) == "deterministic"
    assert report.successes({"evaluations": {"bc-0@stock": found}}, "bc-0", "stock").mean() == 0.5
    assert report.best_sampler(evaluation((0.5, 0.5), (0.0, 1.0))) == "deterministic"


@pytest.fixture
def document(runs, report):
    settings = replace(runs.Settings(), seeds=(0, 1))
    rates = {"bc": 0.3, "control": 0.4, "dppo": 0.8, "dppo-variant": 0.9, "flow": 0.3, "fpo": 0.3, "flow-control": 0.6}
    evaluations, trained = {}, {}
    for kind, rate in rates.items():
        for seed in settings.seeds if kind in ("bc", "control", "dppo", "dppo-variant") else (0,):
            run = f"{kind}-{seed}"
            trained[run] = {"cpu_seconds": 100.0, **({"env_steps": 1_250_000} if "dppo" in kind else {})}
            tasks = ("stock", "time-limit", "near-goal")[: 3 if seed else 2]
            for variant in ("near-goal",) if kind == "dppo-variant" else tasks:
                evaluations[f"{run}@{variant}"] = evaluation((rate, 0.1), (rate, 0.05))
    made = {
        "device": {"name": "a processor"}, "versions": {"torch": "2"}, "commit": "0123456789abcdef",
        "settings": runs.asdict(settings), "runs": trained, "evaluations": evaluations,
    }  # fmt: skip
    made["gains"] = report.gains(made)
    return made


def test_the_comparisons_say_who_gains(document):
    found = {row["title"]: row for row in document["gains"]}
    assert found["DPPO against compute-matched BC"]["mean"] == pytest.approx(0.4)
    assert found["DPPO against compute-matched BC"]["gains"]
    assert found["FPO against compute-matched BC (flow)"]["high"] < 0.0
    assert not found["FPO against its start"]["gains"]
    assert "ReinFlow against its start" not in found, "it has not run"
    assert found["stock's DPPO on time-limit against compute-matched BC"]["mean"] == pytest.approx(0.4)
    assert "DPPO on near-goal against its start" not in found, "bc-0 has not been evaluated there"


def test_the_table(report, document):
    text = report.markdown(document)
    assert "| DPPO | stock | 2 | 100 | 1.25 M | 0.800 | 0.050 | **0.800** |" in text
    assert "| DPPO, trained there | near-goal | 2 | 100 | 1.25 M |" in text
    tasks = [line.split(" | ")[1] for line in text.splitlines() if line.startswith(("| BC", "| DPPO |"))]
    assert tasks == sorted(tasks, key=("stock", "near-goal", "time-limit").index)
    assert "| BC (flow), compute-matched | stock | 1 | 100 |  | 0.600 |" in text
    assert "| DPPO against compute-matched BC | stock | 2 | +0.400 | [+0.2" in text and "| gains |" in text
    assert "encodes" not in text, "flat has not run"
    counted = {"step": 9, "env_steps": 2e6, "encoder_passes": 3e6, "seconds": 60.0, "cpu_seconds": 50.0}
    document["runs"]["dppo-0"] |= counted
    document["runs"]["flat-0"] = {**counted, "encoder_passes": 9e6, "seconds": 90.0}
    costs = report.markdown(document)
    assert (
        "| Level-2 | 9 | 2.00 M | 3.00 M | 60 | 50 |" in costs and "| flat | 9 | 2.00 M | 9.00 M | 90 | 50 |" in costs
    )
    assert "| loses (one run) |" in text and "| no difference shown |" in text
    assert "states of the code" not in report.markdown({**document, "sources": ["a"]})
    assert "of 2 different states of the code" in report.markdown({**document, "sources": ["a", "b"]})


def test_the_curves_begin_at_the_common_start(report, document):
    row = {"seconds": 9.0, "env_steps": 5, "success_rate": 0.5, "success_interval": [0.4, 0.6]}
    document["runs"]["dppo-0"]["curve"] = document["runs"].setdefault("flat-0", {})["curve"] = [row]
    level2, flat = report.curves(document).values()
    assert level2 == flat and level2[1] == row
    assert (level2[0]["seconds"], level2[0]["env_steps"], level2[0]["success_rate"]) == (0.0, 0, 0.1)


def test_the_figure(report, tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        {"seconds": 30.0 * i, "env_steps": 10_000 * i, "success_rate": 0.1 * i, "success_interval": [0.1 * i, 0.2 * i]}
        for i in range(1, 4)
    ]
    path = report.draw({"Level-2": rows, "flat": rows}, tmp_path / "figure.png")
    assert path.read_bytes().startswith(b"\x89PNG") and [file.name for file in tmp_path.iterdir()] == ["figure.png"]


# ----------------------------------------------------------------------------------------- plan and execution


def test_every_run_waits_for_what_it_needs_and_has_its_control(runs):
    units = runs.plan(runs.Settings())
    names = [unit.name for unit in units]
    assert len(set(names)) == len(names)
    for place, unit in enumerate(units):
        assert set(unit.needs) | set(unit.after) <= set(names[:place]), unit.name
    needs = {unit.name: (*unit.needs, *unit.after) for unit in units}
    assert needs["control-1"] == ("bc-1", "dppo-1", "dppo-variant-1")
    assert needs["control-0"] == ("bc-0", "dppo-0", "dppo-variant-0")
    assert needs["flow-control-0"] == ("flow-0", "fpo-0", "reinflow-0")
    assert needs["flat-0"] == ("bc-0", "dppo-0")
    for kind in ("bc", "control", "dppo"):
        assert all(f"{kind}-{seed}@stock" in names for seed in range(3))
    for kind in ("bc", "control", "dppo-variant"):
        assert all(f"{kind}-{seed}@near-goal" in names for seed in range(3))
    limited = sorted(name for name in names if name.endswith("@time-limit"))
    assert limited == [f"{kind}-{seed}@time-limit" for kind in ("bc", "control", "dppo") for seed in range(3)]
    same = [unit.name for unit in runs.plan(runs.Settings(variant="time-limit"))]
    assert len(set(same)) == len(same) and "dppo-0@time-limit" in same and "dppo-variant-0@time-limit" in same


def test_a_smaller_scale_is_the_same_bench(runs):
    small = runs.Settings().scaled(0.02)
    assert small.budget_seconds == pytest.approx(6.0) and small.test_episodes == 10 and small.pretrain_steps >= 20
    assert [unit.name for unit in runs.plan(small)] == [unit.name for unit in runs.plan(runs.Settings())]


def unit(runs, name, needs=(), make=lambda bench: {}):
    return runs.Unit(name, tuple(needs), make)


def test_what_is_done_is_not_done_again_and_a_failure_stops_only_what_needs_it(runs, tmp_path):
    bench, calls, said = runs.Bench(runs.Settings(), tmp_path), [], []

    def make(name, error=None):
        def work(_):
            calls.append(name)
            if error:
                raise error
            return {"value": name}

        return work

    def units(error):
        return [
            unit(runs, "a", (), make("a")),
            unit(runs, "b", ("a",), make("b", error)),
            unit(runs, "c", ("b",), make("c")),
            unit(runs, "d", ("a",), make("d"))._replace(after=("b",)),
        ]

    failed = runs.execute(units(runs.Failed("out of luck")), bench, said.append)
    assert failed == {"b": "out of luck", "c": "needs b"}
    assert calls == ["a", "b", "d"], "d waits for b, and does without it"
    assert bench.result("a")["value"] == "a" and bench.result("b") is None
    calls.clear()
    assert runs.execute(units(None), bench, said.append) == {}
    assert calls == ["b", "c"], "a and d were there"
    assert said[0] == "4 runs and evaluations, 0 done" and "4 runs and evaluations, 2 done" in said
    with pytest.raises(runs.Failed, match="e is not done"):
        bench.need("e")


def test_no_more_than_the_workers_run_at_once(runs, tmp_path):
    now, most = [], []

    def work(_):
        now.append(1)
        most.append(len(now))
        time.sleep(0.02)
        now.pop()
        return {}

    bench = runs.Bench(replace(runs.Settings(), workers=2), tmp_path)
    assert runs.execute([unit(runs, f"u{i}", (), work) for i in range(6)], bench, lambda text: None) == {}
    assert max(most) == 2


def test_an_interrupt_ends_the_running_command_and_the_next_call_goes_on(runs, tmp_path):
    """The command hears one SIGTERM, with which the library saves and ends."""
    bench = runs.Bench(replace(runs.Settings(), workers=1), tmp_path)
    script = (
        "import pathlib, signal, sys, time\n"
        "def save(*_):\n    pathlib.Path('saved').touch()\n    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save)\npathlib.Path('begun').touch()\n"
        "time.sleep(0 if pathlib.Path('saved').exists() else 60)\n"
    )

    def work(bench):
        bench.call("sleep", ["-c", script])
        return {"ended": True}

    def interrupt(_):
        while not (tmp_path / "begun").exists():
            time.sleep(0.01)
        raise KeyboardInterrupt

    both = [unit(runs, "sleep", (), work), unit(runs, "stop", (), interrupt)]
    began = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        runs.execute(both, replace_workers(runs, bench, 2), lambda text: None)
    assert time.perf_counter() - began < 30 and (tmp_path / "saved").exists()
    assert bench.result("sleep") is None
    again = runs.Bench(bench.settings, tmp_path)
    assert runs.execute(both[:1], again, lambda text: None) == {}
    assert again.result("sleep")["ended"]


def replace_workers(runs, bench, workers):
    bench.settings = replace(bench.settings, workers=workers)
    return bench


def test_a_command_that_fails_says_its_last_line(runs, tmp_path):
    bench = runs.Bench(runs.Settings(), tmp_path)
    with pytest.raises(runs.Failed, match=r"exit code 3: the reason .*broken.log"):
        bench.call("broken", ["-c", "import sys; print('noise'); print('the reason', file=sys.stderr); sys.exit(3)"])


def test_the_control_trains_on_for_the_processor_time_of_the_longest(runs, tmp_path, monkeypatch):
    bench = runs.Bench(runs.Settings(), tmp_path, "state of the code")
    bench.keep("bc-0", {"step": 100, "seconds": 60.0, "cpu_seconds": 50.0})
    assert bench.need("bc-0")["source"] == "state of the code"
    bench.keep("dppo-0", {"cpu_seconds": 120.2})
    bench.keep("awr-0", {"cpu_seconds": 20.0})
    (bench.folder("bc-0") / "checkpoints").mkdir(parents=True)
    (bench.folder("bc-0") / "checkpoints" / "last").write_text("step_00000100\n")
    asked = []

    def pretrain(run, seed, **options):
        asked.append((run, seed, options))
        return {"step": 341, "seconds": 200.0, "cpu_seconds": 172.0}

    monkeypatch.setattr(bench, "pretrain", pretrain)
    found = bench.control("control-0", 0, "bc-0", ["dppo-0", "awr-0", "dppo-variant-0"], flow=False)
    assert found["matched"] == ["dppo-0", "awr-0"], "what failed took no time"
    assert asked == [("control-0", 0, {"max_steps": 341, "flow": False, "resume": True})]
    assert (bench.folder("control-0") / "checkpoints" / "last").is_file()
    assert found["cpu_seconds"] == 122.0 and found["matched_cpu_seconds"] == 120.2 and found["step"] == 241


def test_the_shifted_task_has_its_own_noise_in_training_and_in_evaluation(runs, tmp_path, monkeypatch):
    commands = {}

    def call(bench, name, command):
        commands[name] = list(command)
        (tmp_path / "logs" / f"{name}.evaluation.json").write_text("{}")

    monkeypatch.setattr(runs.Bench, "call", call)
    monkeypatch.setattr(runs.Bench, "_rows", lambda *_: [{"step": 1, "seconds": 1.0, "cpu_seconds": 1.0}])
    settings = runs.Settings(min_std=0.05, variant_min_std=0.01)
    bench = runs.Bench(settings, tmp_path)
    bench.finetune("dppo-0", 0, "bc-0", "dppo")
    bench.finetune("dppo-variant-0", 0, "bc-0", "dppo", variant="near-goal")
    for name, noise in (("dppo-0", "0.05"), ("dppo-variant-0", "0.01")):
        assert commands[name][commands[name].index("--min-std") + 1] == noise
    assert [settings.noise(task) for task in ("stock", "near-goal", "time-limit")] == [0.05, 0.01, 0.05]

    import pusht_finetune

    from minidiff_fast.training import pusht

    used = []
    monkeypatch.setattr("torch.set_num_threads", lambda threads: None)
    monkeypatch.setattr(
        pusht, "evaluate_checkpoint",
        lambda folder, *, min_std, **_: used.append(min_std) or SimpleNamespace(successes=(True,), scores=(1.0,)),
    )  # fmt: skip
    pusht_finetune.evaluate_run(tmp_path, "near-goal", settings)
    assert set(used) == {0.01}


def test_a_folder_of_other_settings_is_refused(runs, tmp_path):
    import pusht_finetune

    settings = runs.Settings()
    pusht_finetune.open_work(tmp_path / "work", settings)
    pusht_finetune.open_work(tmp_path / "work", replace(settings, workers=1))
    with pytest.raises(pusht_finetune.BadInput, match="begun with another variant"):
        pusht_finetune.open_work(tmp_path / "work", replace(settings, variant="time-limit"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(pusht_finetune.BadInput, match="is not empty"):
        pusht_finetune.open_work(tmp_path / "mine", settings)


def test_the_file_is_the_document(document):
    import pusht_finetune

    text = pusht_finetune.as_text(document)
    assert json.loads(text) == json.loads(json.dumps(document))
    assert '"success": [1, 1, ' in text and len(text.splitlines()) < 1000


def test_bad_input_is_exit_code_2(tmp_path, capsys):
    import pusht_finetune

    assert pusht_finetune.main(["--work", str(tmp_path / "w"), "--seeds", "0"]) == 2
    assert "must be at least 1" in capsys.readouterr().err
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "settings.json").write_text(json.dumps({"seeds": [9]}))
    assert pusht_finetune.main(["--work", str(tmp_path / "w")]) == 2
    assert "begun with another" in capsys.readouterr().err
