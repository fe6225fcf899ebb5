"""The command line as a user meets it: exit codes, one line an error, nothing overwritten."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from minidiff_fast import cli

for name in ("accelerate", "diffusers", "tyro", "tqdm", "safetensors", "gym_pusht"):
    pytest.importorskip(name)

TINY = ["--encoder-width", "16", "--encoder-blocks", "1", "--hidden-dim", "32", "--n-blocks", "1"]
QUICK = [*TINY, "--batch-size", "8", "--l2-batch", "2", "--num-inference-steps", "2", "--device", "cpu"]
QUIET = ["--no-progress", "--log", "none"]


def environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**kept, "MINIDIFF_FAST_IMPL": "reference", "OMP_NUM_THREADS": "1", **changes}


def command(*arguments: str, cwd: Path, code: str = "") -> subprocess.CompletedProcess[str]:
    """The installed command, in a process of its own."""
    script = f"import sys\n{code}\nfrom minidiff_fast.cli import main\nsys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )


def data(path: Path, **changes: np.ndarray) -> str:
    random = np.random.default_rng(0)
    arrays = {
        "state": random.uniform(50, 450, (60, 5)).astype(np.float32),
        "action": random.uniform(50, 450, (60, 2)).astype(np.float32),
        "episode_ends": np.array([25, 60]),
    }
    np.savez(path, **{**arrays, **changes})  # type: ignore[arg-type]
    return str(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps through the command line."""
    folder = tmp_path_factory.mktemp("cli")
    source = data(folder / "walks.npz")
    done = command(
        "train", "pusht", "--data", source, "--out", "run", "--max-steps", "20", "--eval-every", "20",
        "--eval-episodes", "2", *QUICK, "--no-progress",
        cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "20 steps in" in done.stdout
    assert "best score on the way" in done.stdout
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of an error."""
    assert cli.main([*arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("minidiff-fast: error: ")
    return line


def test_help_and_version_are_quick_and_import_little(tmp_path: Path) -> None:
    check = (
        "import atexit\n"
        "heavy = {'torch', 'diffusers', 'accelerate', 'gymnasium', 'matplotlib'}\n"
        "atexit.register(lambda: print('heavy:', sorted(heavy & set(sys.modules))))"
    )
    for arguments in (["--help"], ["--version"], ["train", "pusht", "--help"], ["demo", "--help"]):
        done = command(*arguments, cwd=tmp_path, code=check)
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("heavy: []\n"), done.stdout
    assert "--l2-batch" in command("train", "pusht", "--help", cwd=tmp_path).stdout
    assert command(cwd=tmp_path).returncode == 2


def test_doctor_needs_no_extras(tmp_path: Path) -> None:
    hide = "for name in 'tyro diffusers accelerate tqdm gymnasium matplotlib'.split(): sys.modules[name] = None"
    done = command("doctor", cwd=tmp_path, code=hide)
    assert done.returncode == 0, done.stderr
    assert "operation broadcast_attention:" in done.stdout
    assert "cpu tensors: reference" in done.stdout
    assert "native library:" in done.stdout
    assert "torch  " in done.stdout


def test_a_missing_extra_is_one_line(tmp_path: Path) -> None:
    for module, extra in (("tyro", "train"), ("diffusers", "train"), ("gym_pusht", "pusht")):
        done = command(
            "train", "pusht", "--out", "x", "--max-steps", "1", cwd=tmp_path, code=f"sys.modules[{module!r}] = None"
        )
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"minidiff-fast: error: {module} is needed")
        assert f"minidiff_fast[{extra}]" in line
    assert not (tmp_path / "x").exists()


def test_a_run_leaves_its_files(trained: Path) -> None:
    names = set(contents(trained / "run"))
    assert {"metrics.jsonl", "checkpoints/last", "checkpoints/best"} <= names
    assert any(name.startswith("logs/pusht/events.out.tfevents") for name in names)
    kinds = [json.loads(line)["kind"] for line in (trained / "run" / "metrics.jsonl").read_text().splitlines()]
    assert kinds == ["train", "train", "eval"]


def test_eval_prints_the_score_and_writes_video_and_result(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINIDIFF_FAST_IMPL", "reference")
    pytest.importorskip("PIL")
    video, result = tmp_path / "out.gif", tmp_path / "new" / "folder" / "out.json"
    arguments = [
        "eval", "pusht", "--checkpoint", str(trained / "run"), "--episodes", "2", "--max-steps", "24",
        "--no-progress", "--device", "cpu",
    ]  # fmt: skip
    assert cli.main([*arguments, "--video", str(video), "--json", str(result), "--record", "1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("mean score ")
    assert "over 2 episodes (seeds 100000 to 100001)" in out
    assert video.read_bytes()[:3] == b"GIF"
    scores = json.loads(result.read_text())
    assert [entry["seed"] for entry in scores["per_seed"]] == [100_000, 100_001]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[0] == out.splitlines()[0], "the same seed, the same score"
    line = refused(capsys, *arguments, "--video", str(video))
    assert "exists already, and nothing is overwritten" in line


def test_eval_runs_variants(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINIDIFF_FAST_IMPL", "reference")
    scores = {}
    for name, options in {
        "stock": ["--max-steps", "8"],
        "near-goal": ["--variant", "near-goal", "--max-steps", "8"],
        "time-limit": ["--variant", "time-limit"],
    }.items():
        result = tmp_path / f"{name}.json"
        arguments = ["eval", "pusht", "--checkpoint", str(trained / "run"), "--episodes", "3", *options]
        assert cli.main([*arguments, "--json", str(result), "--no-progress", "--device", "cpu"]) == 0
        scores[name] = json.loads(result.read_text())
        assert scores[name]["variant"] == name
    assert scores["near-goal"]["mean_score"] > scores["stock"]["mean_score"]  # it starts there
    assert scores["time-limit"]["max_steps"] == 100 and scores["time-limit"]["mean_length"] <= 100


def test_resume_and_report(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    run = tmp_path / "run"
    source = data(tmp_path / "walks.npz")
    arguments = ["train", "pusht", "--data", source, "--out", str(run), "--eval-every", "none", *QUICK, *QUIET]
    assert cli.main([*arguments, "--max-steps", "3"]) == 0
    assert cli.main([*arguments, "--max-steps", "6", "--resume"]) == 0
    assert "6 steps in" in capsys.readouterr().out
    assert cli.main([*arguments, "--resume"]) == 0, "without a length, the run keeps that of its beginning"
    assert "6 steps in" in capsys.readouterr().out
    assert cli.main(["report", str(run)]) == 0
    assert (run / "report.md").is_file()
    assert (run / "report.png").is_file()
    both = tmp_path / "both.png"
    capsys.readouterr()
    assert "no evaluation" in refused(capsys, "report", str(run), str(trained / "run"), "--out", str(both))
    assert not both.exists(), "this run was trained with --eval-every none"
    assert cli.main(["report", str(trained / "run"), str(trained / "run"), "--out", str(both)]) == 0
    assert both.is_file()
    capsys.readouterr()
    assert "exists already" in refused(capsys, "report", str(run), str(run), "--out", str(both))


def test_wrong_inputs_are_one_line_and_change_nothing(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    good = data(tmp_path / "good.npz")
    hole = np.full((60, 2), np.nan, np.float32)
    broken = data(tmp_path / "nan.npz", action=hole)
    cut = tmp_path / "cut.npz"
    cut.write_bytes((tmp_path / "good.npz").read_bytes()[:200])
    before, run = contents(trained), str(trained / "run")
    train = ["train", "pusht", "--max-steps", "2", *QUICK, *QUIET]
    wrong = {
        "the command must be one of train, finetune, eval": ["fly"],
        "the task must be pusht": ["train", "chess"],
        "is not empty and nothing is overwritten": [*train, "--data", good, "--out", run],
        "holds no checkpoint": [*train, "--data", good, "--out", str(tmp_path / "empty"), "--resume"],
        "cannot be written": [*train, "--data", good, "--out", "/proc/nowhere/run"],
        "is a file": [*train, "--data", good, "--out", good],
        "no folder can be made in": [*train, "--data", good, "--out", f"{good}/run"],
        "no such file or folder": [*train, "--data", "missing.npz"],
        "nan.npz": [*train, "--data", broken],
        "cut.npz": [*train, "--data", str(cut)],
        "--l2-batch (K, samples per condition) must be at least 1, got 0": [*train, "--l2-batch", "0"],
        "--budget must be a time": [*train, "--budget", "soon"],
        "n_emb must be a multiple": [*train, "--n-emb", "30"],
        "was trained on --obs keypoints, got --obs state": [
            *train, "--data", good, "--out", run, "--resume", "--obs", "state",
        ],
        "--lr 0.001, got 0.5": [
            *train, "--data", good, "--out", run, "--resume", "--lr", "0.5",
        ],
        "must be [48": [
            "train", "pusht", "--data", good, "--out", run, "--resume", "--max-steps", "30", *QUICK, *QUIET,
            "--hidden-dim", "48",
        ],
        "images were asked for": [*train, "--data", good, "--obs", "image"],
        "no such folder": ["eval", "pusht", "--checkpoint", "nowhere"],
        "was trained on --obs keypoints, got --obs image": [
            "eval", "pusht", "--checkpoint", run, "--obs", "image",
        ],
        "episodes must be an integer >= 1": ["eval", "pusht", "--checkpoint", run, "--episodes", "0"],
        "--video must end in .mp4 or .gif": ["eval", "pusht", "--checkpoint", run, "--video", "x.avi"],
        "exists": ["demos", "pusht", "--out", good, "--no-progress"],
        "episodes must be >= 1": ["demos", "pusht", "--episodes", "0", "--no-progress"],
        "is not empty": ["demo", "--out", run, "--no-progress"],
        "is nowhere a run folder": ["report", "nowhere"],
        "name at least one run folder": ["report"],
        "doctor takes no options": ["doctor", "--fast"],
    }  # fmt: skip
    (tmp_path / "empty").mkdir()
    files = contents(tmp_path)
    for message, arguments in wrong.items():
        assert message in refused(capsys, *arguments), arguments
    assert contents(trained) == before
    assert contents(tmp_path) == files


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_saves_a_checkpoint_and_exits_with_130(tmp_path: Path) -> None:
    source = data(tmp_path / "walks.npz")
    process = subprocess.Popen(
        [
            sys.executable, "-m", "minidiff_fast.cli", "train", "pusht", "--data", source, "--out", "run",
            "--budget", "60s", "--eval-every", "none", *QUICK, *QUIET,
        ],
        cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics = tmp_path / "run" / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 90
        while not (metrics.is_file() and metrics.stat().st_size) and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()[1][-2000:]
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors[-2000:]
    assert errors.splitlines()[-1].startswith("minidiff-fast: interrupted; checkpoint: run/checkpoints/step_")
    last = (tmp_path / "run" / "checkpoints" / "last").read_text().strip()
    assert (tmp_path / "run" / "checkpoints" / last / "state.pt").is_file()


@pytest.mark.parametrize("denoiser", ["mlp", "transformer"])
def test_images_train_and_act(tmp_path: Path, capsys: pytest.CaptureFixture[str], denoiser: str) -> None:
    """A few steps from the camera, the frames in a second file beside the first."""
    pytest.importorskip("transformers")
    source = data(tmp_path / "walks.npz")
    frames = np.random.default_rng(1).integers(0, 256, (60, 96, 96, 3), dtype=np.uint8)
    np.savez(tmp_path / "walks_img.npz", img=frames)
    run = str(tmp_path / "run")
    small = ["--batch-size", "2", "--l2-batch", "3", "--num-inference-steps", "2", "--device", "cpu", *TINY]
    arguments = ["train", "pusht", "--data", source, "--obs", "image", "--denoiser", denoiser, "--out", run]
    assert cli.main([*arguments, "--max-steps", "3", "--eval-every", "none", *small, *QUIET]) == 0
    losses = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(row["loss"]) for row in losses if row["kind"] == "train")
    capsys.readouterr()
    assert cli.main(["eval", "pusht", "--checkpoint", run, "--episodes", "1", "--max-steps", "8", "--no-progress"]) == 0
    assert "mean score" in capsys.readouterr().out


def test_demos_writes_solved_episodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demos.npz"
    assert cli.main(["demos", "pusht", "--episodes", "1", "--seed", "0", "--out", str(out), "--no-progress"]) == 0
    assert "1 episodes" in capsys.readouterr().out
    with np.load(out) as arrays:
        assert len(arrays["episode_ends"]) == 1


def test_the_demo_from_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("matplotlib", "PIL", "imageio_ffmpeg"):
        pytest.importorskip(name)
    monkeypatch.setenv("MINIDIFF_FAST_IMPL", "reference")
    run = tmp_path / "demo"
    assert (
        cli.main(
            ["demo", "--out", str(run), "--max-steps", "3", "--episodes", "2", "--num-threads", "1", "--no-progress"]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "mean score " in out
    wanted = {"report.md", "report.png", "curves.png", "contact_sheet.png", "rollout.mp4", "evaluation.json"}
    assert wanted <= {path.name for path in run.iterdir()}
