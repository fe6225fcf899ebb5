from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gym_pusht")

from minidiff_fast.errors import InvalidArgument, RunFolderError
from minidiff_fast.tasks.pusht.demos import EMBEDDED, generate_demos
from minidiff_fast.tasks.pusht.env import make_env


@pytest.fixture(scope="module")
def embedded() -> dict[str, np.ndarray]:
    with np.load(EMBEDDED, allow_pickle=False) as data:
        return {name: data[name] for name in data.files}


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demos") / "one.npz"
    report = generate_demos(1, 60_000, path, workers=1, progress=False, disturbed=1)
    assert report.path == path and report.episodes == report.solved == 2 <= report.attempted
    return path


def test_the_number_of_workers_changes_nothing(generated: Path, tmp_path: Path) -> None:
    other = tmp_path / "two.npz"
    report = generate_demos(1, 60_000, other, workers=2, progress=True, disturbed=1)
    with np.load(generated, allow_pickle=False) as one, np.load(other, allow_pickle=False) as two:
        assert sorted(one.files) == sorted(two.files)
        for name in one.files:
            assert np.array_equal(one[name], two[name]), name
        assert report.steps == len(one["state"]) == int(one["episode_ends"][-1])
        assert "seed=60000" in str(one["command"])
        assert one["disturbed"].tolist() == [False, True]
    assert [file.name for file in tmp_path.iterdir()] == ["two.npz"]


def test_nothing_is_overwritten(generated: Path) -> None:
    before = generated.read_bytes()
    with pytest.raises(RunFolderError, match="exists; choose another out or pass overwrite=True"):
        generate_demos(1, 0, generated, progress=False)
    assert generated.read_bytes() == before


def test_too_few_solved_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="0 of 4 starts solved within 1 steps, 1 wanted"):
        generate_demos(1, 0, tmp_path / "short.npz", progress=False, max_steps=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"episodes": 0}, "episodes must be >= 1, got 0"),
        ({"workers": 0}, "workers must be >= 1, got 0"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"disturbed": -1}, "disturbed must be >= 0, got -1"),
        ({"out": "demos.zip"}, "out must end in .npz"),
    ],
)
def test_arguments_are_checked(change: dict[str, object], message: str, tmp_path: Path) -> None:
    arguments = {"episodes": 1, "seed": 0, "out": tmp_path / "demos.npz", "progress": False, **change}
    with pytest.raises(InvalidArgument, match=message):
        generate_demos(**arguments)  # type: ignore[arg-type]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="absent"):
        generate_demos(1, 0, tmp_path / "absent" / "demos.npz", progress=False)


def test_embedded_facts(embedded: dict[str, np.ndarray]) -> None:
    state, action, ends = embedded["state"], embedded["action"], embedded["episode_ends"]
    assert EMBEDDED.stat().st_size <= 2_000_000
    assert state.dtype == action.dtype == np.float32
    assert ends.dtype == embedded["seed"].dtype == np.int64
    assert state.shape == (ends[-1], 5) and action.shape == (ends[-1], 2)
    assert len(ends) == len(embedded["seed"]) == len(embedded["coverage"]) == len(embedded["disturbed"])
    assert np.sum(~embedded["disturbed"]) >= 250
    assert np.all(np.diff(ends, prepend=0) > 0)
    assert np.isfinite(state).all() and np.isfinite(action).all()
    assert np.mean(embedded["coverage"] > 0.95) >= 0.95
    assert len(set(embedded["seed"].tolist())) == len(ends)
    assert embedded["seed"].max() < 50_000, "evaluation starts at 100000, the tests' episodes at 50000"
    assert str(embedded["command"]).startswith("generate_demos(")


@pytest.mark.parametrize("disturbed", [False, True])
def test_embedded_episodes_replay(embedded: dict[str, np.ndarray], disturbed: bool) -> None:
    """From their seed, disturbed ones from their first state, by their actions alone."""
    ends = embedded["episode_ends"]
    chosen = np.flatnonzero(embedded["disturbed"] == disturbed)
    env = make_env()
    for index in chosen[[0, len(chosen) // 2, -1]]:
        begin = 0 if index == 0 else int(ends[index - 1])
        observation, _ = env.reset(seed=int(embedded["seed"][index]))
        if disturbed:
            observation = env.set_state(embedded["state"][begin])
        coverage = 0.0
        for row in range(begin, int(ends[index])):
            # bit for bit where they were made; sines of other processors may differ in the last place
            assert np.abs(observation - embedded["state"][row]).max() < 1e-3
            observation, _, done, _, info = env.step(embedded["action"][row])
            coverage = max(coverage, info["coverage"])
        assert coverage == pytest.approx(float(embedded["coverage"][index]), abs=1e-4)
        assert done == (coverage > 0.95)
