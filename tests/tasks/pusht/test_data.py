"""Push-T data: every kind of source, what is refused, and the training windows."""

from __future__ import annotations

import io
import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from minidiff_fast.errors import DataError, InvalidArgument, MissingDependency
from minidiff_fast.tasks.pusht import data as data_module
from minidiff_fast.tasks.pusht.data import PushTData, PushTWindows, load_pusht, render_states
from minidiff_fast.tasks.pusht.env import keypoints_from_state, make_env
from minidiff_fast.tasks.pusht.hub import BLOCK_CORNERS, block_pose

HUMAN = os.environ.get("MINIDIFF_FAST_PUSHT_HUMAN")
ENDS = np.array([20, 27, 60])  # the middle episode is shorter than the horizon


def make_arrays(ends: np.ndarray = ENDS, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    n = int(ends[-1])
    state = np.concatenate([rng.uniform(50, 450, (n, 4)), rng.uniform(0, 2 * np.pi, (n, 1))], axis=1)
    return {
        "state": state.astype(np.float32),
        "action": rng.uniform(50, 450, (n, 2)).astype(np.float32),
        "keypoint": rng.uniform(50, 450, (n, 9, 2)).astype(np.float32),
        "n_contacts": np.zeros((n, 1), np.float32),
        "episode_ends": ends.astype(np.int64),
    }


def make_frames(n: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (n, 96, 96, 3), dtype=np.uint8)


def make_data(**changes: object) -> PushTData:
    arrays = make_arrays()
    arrays.pop("n_contacts")
    return PushTData(**{**arrays, **changes})  # type: ignore[arg-type]


def save_npz(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    np.savez(path, **arrays)
    return path


def check_equal(data: PushTData, arrays: dict[str, np.ndarray]) -> None:
    for name in ("state", "action", "keypoint"):
        assert np.array_equal(getattr(data, name), arrays[name]), name
        assert getattr(data, name).dtype == np.float32
    assert np.array_equal(data.episode_ends, arrays["episode_ends"])
    assert data.episode_ends.dtype == np.int64


# --- npz ---------------------------------------------------------------------------------------------------


def test_npz(tmp_path: Path) -> None:
    arrays = make_arrays()
    data = load_pusht(str(save_npz(tmp_path / "d.npz", arrays)))
    check_equal(data, arrays)
    assert (data.n_steps, data.n_episodes, data.image) == (60, 3, None)
    assert data.source.endswith("d.npz")
    assert data.episode(1) == slice(20, 27)
    with pytest.raises(InvalidArgument, match=r"\[0, 3\), got 3"):
        data.episode(3)


@pytest.mark.parametrize("name", ["img", "image"])
@pytest.mark.parametrize("beside", [False, True])
def test_npz_images(tmp_path: Path, name: str, beside: bool) -> None:
    arrays, frames = make_arrays(), make_frames(60)
    if beside:
        save_npz(tmp_path / "d_img.npz", {name: frames})
    else:
        arrays[name] = frames
    path = save_npz(tmp_path / "d.npz", arrays)
    loaded = load_pusht(path, images=True).image
    assert loaded is not None and np.array_equal(loaded, frames)
    assert load_pusht(path).image is None


def test_npz_without_images(tmp_path: Path) -> None:
    path = save_npz(tmp_path / "d.npz", make_arrays())
    with pytest.raises(DataError, match=r"d_img\.npz beside it has an array img or image"):
        load_pusht(path, images=True)


def test_float64_and_missing_keypoints(tmp_path: Path) -> None:
    arrays = make_arrays()
    del arrays["keypoint"], arrays["n_contacts"]
    arrays["state"] = arrays["state"].astype(np.float64)
    data = load_pusht(save_npz(tmp_path / "d.npz", arrays))
    assert data.keypoint is None and data.state.dtype == np.float32


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.npz: no such file or folder"):
        load_pusht(tmp_path / "nothing.npz")


@pytest.mark.parametrize("missing", ["state", "action", "episode_ends"])
def test_npz_lacks_an_array(tmp_path: Path, missing: str) -> None:
    arrays = make_arrays()
    del arrays[missing]
    with pytest.raises(DataError, match=rf"d\.npz: lacks {missing}; it holds"):
        load_pusht(save_npz(tmp_path / "d.npz", arrays))


def test_damaged_npz(tmp_path: Path) -> None:
    path = save_npz(tmp_path / "d.npz", make_arrays())
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"text", whole[:300] + b"\0" * 64 + whole[364:]):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=r"d\.npz: .* cannot be read"):
            load_pusht(path)


def test_npy_and_pickles_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", np.zeros(3))
    shutil.copy(tmp_path / "d.npy", tmp_path / "d.npz")
    with pytest.raises(DataError, match="a single array"):
        load_pusht(tmp_path / "d.npz")
    with pytest.raises(DataError, match=r"expected an \.npz, a \.zip or a folder"):
        load_pusht(tmp_path / "d.npy")
    arrays = make_arrays()
    arrays["state"] = np.array([{"a": 1}], dtype=object)
    with pytest.raises(DataError, match="state cannot be read"):
        load_pusht(save_npz(tmp_path / "p.npz", arrays))


# --- what PushTData refuses --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("state", np.zeros((60, 4), np.float32), r"state must be numbers \[N, 5\], got float32 \[60, 4\]"),
        ("state", np.zeros((60,), np.float32), r"state must be numbers \[N, 5\]"),
        ("state", np.zeros((60, 5), np.complex64), "complex64"),
        ("state", np.zeros((0, 5), np.float32), "holds no steps"),
        ("action", np.zeros((59, 2), np.float32), "action has 59 steps but state has 60"),
        ("action", np.zeros((60, 3), np.float32), r"action must be numbers \[N, 2\]"),
        ("keypoint", np.zeros((60, 18), np.float32), r"keypoint must be numbers \[N, 9, 2\]"),
        ("keypoint", np.zeros((61, 9, 2), np.float32), "keypoint has 61 steps"),
        ("image", np.zeros((60, 96, 96, 3), np.float32), r"image must be uint8 \[N, 96, 96, 3\]"),
        ("image", np.zeros((60, 3, 96, 96), np.uint8), "image must be uint8"),
        ("image", np.zeros((59, 96, 96, 3), np.uint8), "image has 59 steps"),
        ("episode_ends", np.array([20.0, 60.0]), r"episode_ends must be integers"),
        ("episode_ends", np.array([], np.int64), r"episode_ends must be integers"),
        ("episode_ends", np.array([[60]]), r"episode_ends must be integers"),
        ("episode_ends", np.array([20, 20, 60]), "got 20 after 20 at episode 1"),
        ("episode_ends", np.array([0, 60]), "got 0 after 0 at episode 0"),
        ("episode_ends", np.array([30, 20, 60]), "got 20 after 30"),
        ("episode_ends", np.array([20, 59]), "is 59 but there are 60 steps"),
        ("episode_ends", np.array([20, 61]), "is 61 but there are 60 steps"),
    ],
)
def test_wrong_arrays(name: str, value: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=f"^arrays: .*{message}") as caught:
        make_data(**{name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["state", "action", "keypoint"])
def test_non_finite_values(name: str, bad: float) -> None:
    value = make_arrays()[name]
    value[33, -1] = bad
    value[41, -1] = bad
    with pytest.raises(DataError, match=f"{name} holds NaN or infinity in 2 of 60 steps, first at step 33"):
        make_data(**{name: value})


def test_block_columns_of_nan_are_an_error() -> None:
    state = make_arrays()["state"]
    state[:, 2:] = np.nan
    with pytest.raises(DataError, match="state holds NaN"):
        make_data(state=state)


def test_overflow_to_float32_is_reported() -> None:
    state = make_arrays()["state"].astype(np.float64)
    state[3, 0] = 1e300
    with pytest.raises(DataError, match="first at step 3"):
        make_data(state=state)


# --- zarr --------------------------------------------------------------------------------------------------


def save_zarr(folder: Path, arrays: dict[str, np.ndarray], zarr_format: int, frames: np.ndarray | None = None) -> Path:
    zarr = pytest.importorskip("zarr", minversion="3.0")
    root = zarr.open_group(str(folder), mode="w", zarr_format=zarr_format)
    for name, value in arrays.items():
        group = root.require_group("meta" if name == "episode_ends" else "data")
        chunks = (min(25, len(value)), *value.shape[1:])
        group.create_array(name, shape=value.shape, dtype=value.dtype, chunks=chunks)[:] = value
    if frames is not None:
        array = root["data"].create_array("img", shape=frames.shape, dtype="f4", chunks=(16, 96, 96, 3))
        array[:] = frames.astype(np.float32)
    return folder


def zip_folder(folder: Path, path: Path, top: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, top + str(file.relative_to(folder)))
    return path


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_zarr(tmp_path: Path, zarr_format: int) -> None:
    arrays, frames = make_arrays(), make_frames(60)
    folder = save_zarr(tmp_path / "in" / "pusht_cchi_v7_replay.zarr", arrays, zarr_format, frames)
    check_equal(load_pusht(folder), arrays)
    check_equal(load_pusht(tmp_path / "in"), arrays)  # the folder that holds it
    loaded = load_pusht(folder, images=True).image
    assert loaded is not None and loaded.dtype == np.uint8 and np.array_equal(loaded, frames)
    for top in ("", "pusht_cchi_v7_replay.zarr/", "pusht/pusht_cchi_v7_replay.zarr/"):
        path = zip_folder(folder, tmp_path / "pusht.zip", top)
        check_equal(load_pusht(path), arrays)
    loaded = load_pusht(path, images=True).image
    assert loaded is not None and np.array_equal(loaded, frames)


def chunk_files(array: Path) -> list[Path]:
    files = [f for f in array.rglob("*") if f.is_file() and f.name not in (".zarray", ".zattrs", "zarr.json")]
    return sorted(files)


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("name", ["data/state", "data/action", "data/keypoint", "data/img", "meta/episode_ends"])
def test_zarr_with_a_missing_chunk(tmp_path: Path, zarr_format: int, name: str) -> None:
    folder = save_zarr(tmp_path / "d.zarr", make_arrays(), zarr_format, make_frames(60))
    chunk_files(folder / name)[-1].unlink()
    images = name == "data/img"
    for source in (folder, zip_folder(folder, tmp_path / "d.zip", "d.zarr/")):
        with pytest.raises(DataError, match=rf"{source.name}: {name} is incomplete: \d of \d chunks"):
            load_pusht(source, images=images)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_zarr_with_a_damaged_chunk(tmp_path: Path, zarr_format: int) -> None:
    folder = save_zarr(tmp_path / "d.zarr", make_arrays(), zarr_format)
    file = chunk_files(folder / "data" / "action")[0]
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(DataError, match="data/action cannot be read, a chunk is damaged"):
        load_pusht(folder)


def test_zarr_with_missing_arrays(tmp_path: Path) -> None:
    folder = save_zarr(tmp_path / "d.zarr", make_arrays(), 2)
    with pytest.raises(DataError, match="lacks the array data/img"):
        load_pusht(folder, images=True)
    shutil.rmtree(folder / "data" / "action")
    with pytest.raises(DataError, match="lacks the array data/action"):
        load_pusht(folder)
    shutil.rmtree(folder / "meta")
    with pytest.raises(DataError, match=r"no zarr replay buffer there \(no meta/episode_ends\)"):
        load_pusht(folder)


def test_zarr_whose_lengths_disagree(tmp_path: Path) -> None:
    arrays = make_arrays()
    arrays["episode_ends"] = np.array([20, 27, 80])
    with pytest.raises(DataError, match=r"is 80 but there are 60 steps"):
        load_pusht(save_zarr(tmp_path / "d.zarr", arrays, 3))


def test_zarr_frames_that_are_not_bytes(tmp_path: Path) -> None:
    folder = save_zarr(tmp_path / "d.zarr", make_arrays(), 2)
    zarr = pytest.importorskip("zarr")
    root = zarr.open_group(str(folder), mode="a")
    frames = root["data"].create_array("img", shape=(60, 96, 96, 3), dtype="f4", chunks=(60, 96, 96, 3))
    frames[:] = 0.5
    with pytest.raises(DataError, match=r"data/img: frames of float32 must hold whole numbers from 0 to 255"):
        load_pusht(folder, images=True)


def test_zips_that_are_none_or_hold_none_or_two(tmp_path: Path) -> None:
    path = tmp_path / "d.zip"
    path.write_bytes(b"PK not really")
    with pytest.raises(DataError, match=r"not a readable \.zip"):
        load_pusht(path)
    folder = save_zarr(tmp_path / "d.zarr", make_arrays(), 2)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "nothing")
    with pytest.raises(DataError, match="found 0"):
        load_pusht(path)
    zip_folder(folder, path, "a/")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("b/meta/episode_ends/.zarray", "{}")
    with pytest.raises(DataError, match="found 2"):
        load_pusht(path)


def test_missing_zarr_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_zarr(tmp_path / "d.zarr", make_arrays(), 2)
    monkeypatch.setitem(__import__("sys").modules, "zarr", None)
    with pytest.raises(MissingDependency, match=r"minidiff_fast\[pusht\]"):
        load_pusht(folder)


# --- LeRobot's layout --------------------------------------------------------------------------------------


def corners_of(state: np.ndarray) -> np.ndarray:
    angle = state[:, 4].astype(np.float64)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    x, y = BLOCK_CORNERS.T
    return np.stack([cos * x - sin * y, sin * x + cos * y], axis=-1) + state[:, None, 2:4]


def save_lerobot(
    folder: Path, arrays: dict[str, np.ndarray], *, corners: bool, version: int = 3, frames: str | None = None
) -> Path:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    n, ends = len(arrays["state"]), arrays["episode_ends"]
    starts = np.concatenate([[0], ends[:-1]])
    columns: dict[str, list[object]] = {
        "observation.state": arrays["state"][:, :2].tolist(),
        "action": arrays["action"].tolist(),
        "episode_index": np.repeat(np.arange(len(ends)), ends - starts).tolist(),
        "frame_index": (np.arange(n) - np.repeat(starts, ends - starts)).tolist(),
        "index": list(range(n)),
    }
    features: dict[str, object] = {
        "observation.state": {"dtype": "float32", "shape": [2]},
        "action": {"dtype": "float32", "shape": [2]},
    }
    types = {"observation.state": arrow.list_(arrow.float32()), "action": arrow.list_(arrow.float32(), 2)}
    if corners:
        columns["observation.environment_state"] = corners_of(arrays["state"]).reshape(n, 16).tolist()
        types["observation.environment_state"] = arrow.list_(arrow.float32(), 16)
        features["observation.environment_state"] = {"dtype": "float32", "shape": [16]}
    if frames:
        features["observation.image"] = {
            "dtype": frames,
            "shape": [96, 96, 3],
            "video_info": {"video.codec": "av1"},
        }
    if frames == "image":
        columns["observation.image"] = [{"bytes": png(f), "path": None} for f in make_frames(n)]
    table = arrow.table({k: arrow.array(v, types.get(k)) for k, v in columns.items()})
    (folder / "meta").mkdir(parents=True)
    (folder / "data" / "chunk-000").mkdir(parents=True)
    info = {
        "total_frames": n,
        "total_episodes": len(ends),
        "codebase_version": f"v{version}.0",
        "features": features,
    }
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    if version == 3:
        parquet.write_table(table, folder / "data/chunk-000/file-000.parquet")
    else:
        for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
            part = table.slice(int(start), int(end - start))
            parquet.write_table(part, folder / f"data/chunk-000/episode_{index:06d}.parquet")
    return folder


def png(frame: np.ndarray) -> bytes:
    image = pytest.importorskip("PIL.Image")
    buffer = io.BytesIO()
    image.fromarray(frame).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("version", [2, 3])
def test_lerobot_keypoints(tmp_path: Path, version: int) -> None:
    arrays = make_arrays()
    data = load_pusht(save_lerobot(tmp_path / "d", arrays, corners=True, version=version))
    np.testing.assert_allclose(data.state, arrays["state"], atol=1e-3)
    assert np.array_equal(data.action, arrays["action"])
    assert np.array_equal(data.episode_ends, ENDS)
    assert data.has_block and data.keypoint is None
    assert PushTWindows(data, obs="keypoints").batch([0])["obs"]["keypoints"].shape == (1, 2, 20)


def test_block_corners_are_the_environments() -> None:
    from gym_pusht.envs.pusht import PushTEnv as Stock

    from minidiff_fast.tasks.pusht.env import make_env

    env = make_env()
    state, _ = env.reset(seed=3)
    corners = Stock.get_keypoints(env._block_shapes)
    env.close()
    np.testing.assert_allclose(corners_of(state[None])[0], corners, atol=1e-9)
    np.testing.assert_allclose(block_pose(corners[None], "x")[0], state[2:], atol=1e-9)


def test_lerobot_without_block_pose(tmp_path: Path) -> None:
    folder = save_lerobot(tmp_path / "d", make_arrays(), corners=False, frames="image")
    with pytest.raises(DataError, match=r"agent's position only.*use lerobot/pusht_keypoints"):
        load_pusht(folder)
    data = load_pusht(folder, images=True)
    assert not data.has_block and data.image is not None and np.array_equal(data.image, make_frames(60))
    batch = PushTWindows(data, obs="image").batch([0, 5])
    assert torch.isfinite(batch["obs"]["agent_pos"]).all()
    for obs in ("state", "keypoints"):
        with pytest.raises(DataError, match="has no block pose"):
            PushTWindows(data, obs=obs)  # type: ignore[arg-type]


@pytest.mark.parametrize("version", [2, 3])
def test_lerobot_video(tmp_path: Path, version: int) -> None:
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    folder = save_lerobot(tmp_path / "d", make_arrays(), corners=False, version=version, frames="video")
    shades = np.arange(60, dtype=np.uint8) * 4
    if version == 3:
        parts = {"videos/observation.image/chunk-000/file-000.mp4": shades}
    else:
        name = "videos/chunk-000/observation.image/episode_{:06d}.mp4"
        parts = {name.format(i): part for i, part in enumerate(np.split(shades, ENDS[:-1]))}
    for path, part in parts.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        writer = ffmpeg.write_frames(str(folder / path), (96, 96), fps=10, macro_block_size=1)
        writer.send(None)
        for shade in part:
            writer.send(np.full((96, 96, 3), shade, np.uint8))
        writer.close()
    image = load_pusht(folder, images=True).image
    assert image is not None
    assert np.abs(image.mean(axis=(1, 2, 3)) - shades).max() < 3.0
    (folder / path).write_bytes(b"not a video")
    with pytest.raises(DataError, match=r"\(av1\) does not decode.*use lerobot/pusht_image"):
        load_pusht(folder, images=True)
    shutil.rmtree(folder / "videos")
    with pytest.raises(DataError, match=r"no video of observation\.image"):
        load_pusht(folder, images=True)


def test_lerobot_incomplete(tmp_path: Path) -> None:
    folder = save_lerobot(tmp_path / "d", make_arrays(), corners=True, version=2)
    (folder / "data/chunk-000/episode_000001.parquet").unlink()
    with pytest.raises(DataError, match=r"is incomplete: meta/info\.json says total_frames = 60, found 53"):
        load_pusht(folder)
    shutil.rmtree(folder / "data")
    with pytest.raises(DataError, match="no data/"):
        load_pusht(folder)
    (folder / "meta/info.json").write_text("{")
    with pytest.raises(DataError, match=r"meta/info\.json of LeRobot's layout cannot be read"):
        load_pusht(folder)


def test_lerobot_damaged_or_doubled(tmp_path: Path) -> None:
    folder = save_lerobot(tmp_path / "d", make_arrays(), corners=True, version=2)
    first = folder / "data/chunk-000/episode_000000.parquet"
    shutil.copy(first, folder / "data/chunk-000/episode_000009.parquet")
    with pytest.raises(DataError, match="rows are missing or double"):
        load_pusht(folder)
    first.write_bytes(first.read_bytes()[:500])
    with pytest.raises(DataError, match=r"episode_000000\.parquet cannot be read"):
        load_pusht(folder)


def test_lerobot_columns_of_another_kind(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = save_lerobot(tmp_path / "d", make_arrays(), corners=True, version=2)
    first = folder / "data/chunk-000/episode_000000.parquet"
    table = parquet.read_table(first)
    place = table.schema.get_field_index("action")
    parquet.write_table(table.set_column(place, "action", arrow.array(["text"] * 20)), first)
    with pytest.raises(DataError, match="its parquet files differ in their columns"):
        load_pusht(folder)
    parquet.write_table(table.remove_column(place), first)
    with pytest.raises(DataError, match=r"episode_000000\.parquet lacks the columns action"):
        load_pusht(folder)
    folder = save_lerobot(tmp_path / "e", make_arrays(), corners=True)
    path = folder / "data/chunk-000/file-000.parquet"
    table = parquet.read_table(path)
    parquet.write_table(table.set_column(place, "action", arrow.array([[1.0, None]] * 60)), path)
    with pytest.raises(DataError, match="action must hold 2 numbers a row, row 0 is"):
        load_pusht(folder)
    parquet.write_table(table.set_column(place, "action", arrow.array(["ab"] * 60)), path)
    with pytest.raises(DataError, match="action must hold 2 numbers a row, row 0 is"):
        load_pusht(folder)


def test_corners_of_another_shape_are_refused() -> None:
    corners = corners_of(make_arrays()["state"])
    with pytest.raises(DataError, match=r"row 7 is .* px off"):
        block_pose(np.where(np.arange(60)[:, None, None] == 7, corners * 1.1, corners), "d")
    corners[3, 0, 0] = np.nan
    with pytest.raises(DataError, match="NaN or infinity at row 3"):
        block_pose(corners, "d")


def test_hub_id_downloads_then_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    folder = save_lerobot(tmp_path / "d", make_arrays(), corners=True)
    asked: list[tuple[str, str, list[str]]] = []

    def download(repo_id: str, *, repo_type: str, allow_patterns: list[str]) -> str:
        asked.append((repo_id, repo_type, allow_patterns))
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    data = load_pusht("lerobot/pusht_keypoints")
    assert data.source == "lerobot/pusht_keypoints" and data.n_steps == 60
    load_pusht("hf://someone/pusht")
    assert [row[0] for row in asked] == ["lerobot/pusht_keypoints", "someone/pusht"]
    assert asked[0][1] == "dataset" and "videos/**" not in asked[0][2]
    with pytest.raises(DataError, match="no such file or folder"):
        load_pusht("someone/pusht")
    assert len(asked) == 2


def test_failed_download_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def download(*_: object, **__: object) -> str:
        raise OSError("no route\nto host")

    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"^lerobot/pusht: cannot be downloaded .* \(no route\)$"):
        load_pusht("lerobot/pusht")


# --- the demonstrations of the package ---------------------------------------------------------------------


def test_embedded_demonstrations() -> None:
    data = load_pusht(None)
    assert data.source == data_module.EMBEDDED
    assert data.n_episodes >= 10 and data.n_steps >= 1000
    # Disturbed starts reach the walls, and the agent, which is kinematic, a little beyond them.
    assert data.state[:, :4].min() > -20 and data.state[:, :4].max() < 532
    for obs in ("state", "keypoints"):
        assert len(PushTWindows(data, obs=obs)) > 0  # type: ignore[arg-type]


# --- mirror images -----------------------------------------------------------------------------------------


def test_mirrored_episodes_follow_the_recorded_ones() -> None:
    data = make_data(image=make_frames(60))
    both = data.with_mirrored()
    assert both.episode_ends.tolist() == [20, 27, 60, 80, 87, 120] and both.source == data.source
    assert data.keypoint is not None and both.keypoint is not None and both.image is not None
    for name in ("state", "action", "keypoint", "image"):
        assert np.array_equal(getattr(both, name)[:60], getattr(data, name)), name
    x, y = data.action[:, 0], data.action[:, 1]
    assert np.array_equal(both.action[60:], np.stack([512 - y, 512 - x], axis=1))
    assert np.array_equal(both.keypoint[60:], keypoints_from_state(both.state[60:]))
    again = both.with_mirrored()
    assert np.allclose(again.state[180:], data.state, atol=1e-4)
    assert np.allclose(again.action[180:], data.action, atol=1e-4)
    assert again.image is not None and np.array_equal(again.image[180:], data.image)


def test_without_keypoints_frames_or_block_there_is_nothing_to_mirror_of_them() -> None:
    state = make_arrays()["state"]
    state[:, 2:] = np.nan
    both = make_data(state=state, keypoint=None, has_block=False).with_mirrored()
    assert both.keypoint is both.image is None and not both.has_block
    assert np.isnan(both.state[:, 2:]).all() and np.isfinite(both.state[:, :2]).all()


def test_a_mirrored_demonstration_is_one() -> None:
    """From the mirrored start the mirrored actions lead through the mirrored states, pushes and all."""
    data = load_pusht(None)
    both, env = data.with_mirrored(), make_env()
    env.reset(seed=0)
    for index in (0, 3, 8):
        steps = both.episode(data.n_episodes + index)
        env.set_state(both.state[steps][0])
        moved = 0.0
        for action, expected in zip(both.action[steps][:-1], both.state[steps][1:], strict=True):
            found, *_, info = env.step(action)
            turn = np.remainder(found[4] - expected[4] + np.pi, 2 * np.pi) - np.pi
            assert np.abs(found[:4] - expected[:4]).max() < 0.02 and abs(turn) < 4e-4
            moved = max(moved, float(np.abs(found[2:4] - both.state[steps][0, 2:4]).max()))
        assert moved > 20.0, "the block was pushed"
    env.close()


def test_a_mirrored_frame_is_the_frame_of_the_mirrored_state() -> None:
    pytest.importorskip("gym_pusht")
    state = load_pusht(None).state[:200:50]
    ends = np.array([len(state)])
    data = PushTData(state=state, action=state[:, :2], episode_ends=ends, image=render_states(state)).with_mirrored()
    assert data.image is not None
    drawn, mirrored = render_states(data.state[len(state) :]).astype(int), data.image[len(state) :].astype(int)
    plain = data.image[: len(state)].astype(int)
    assert np.abs(drawn - mirrored).mean() < 0.25 * np.abs(drawn - plain).mean()


def test_rendered_frames_are_the_environments() -> None:
    env = make_env(render=True)
    state, _ = env.reset(seed=5)
    states, frames = [], []
    for _ in range(3):
        states.append(state)
        frames.append(env.render_rgb(96))
        state, *_ = env.step(np.array([256.0, 256.0]))
    env.close()
    assert np.array_equal(render_states(np.array(states)), np.array(frames))
    with pytest.raises(InvalidArgument, match=r"\[N, 5\]"):
        render_states(np.zeros((3, 4)))


# --- windows -----------------------------------------------------------------------------------------------


def slow_windows(data: PushTData, horizon: int, before: int, after: int) -> list[list[int]]:
    """Step indices of every window, one place at a time."""
    windows = []
    for start, end in zip(data.episode_starts, data.episode_ends, strict=True):
        length = end - start
        for first in range(-before, length - horizon + after + 1):
            row = []
            for place in range(first, first + horizon):
                if place < 0:
                    row.append(int(start))
                elif place >= length:
                    row.append(int(end) - 1)
                else:
                    row.append(int(start) + place)
            windows.append(row)
    return windows


@pytest.mark.parametrize(("horizon", "to", "ta"), [(16, 2, 8), (16, 1, 1), (8, 3, 6), (1, 1, 1), (5, 2, 2), (7, 5, 3)])
def test_windows_against_a_slow_loop(horizon: int, to: int, ta: int) -> None:
    data = make_data()
    windows = PushTWindows(data, "keypoints", horizon, to, ta)
    expected = slow_windows(data, horizon, to - 1, ta - 1)
    assert windows.rows.tolist() == expected
    assert len(windows) == len(expected)
    batch = windows.batch(torch.arange(len(windows)))
    assert batch["obs"]["keypoints"].shape == (len(windows), to, 20)
    for index in range(0, len(expected), 7):
        row = expected[index]
        assert np.array_equal(batch["action"][index].numpy(), data.action[row])
        assert data.keypoint is not None
        points = np.concatenate([data.keypoint[row[:to]].reshape(to, 18), data.state[row[:to], :2]], axis=1)
        assert np.array_equal(batch["obs"]["keypoints"][index].numpy(), points)


def test_a_short_episode_is_padded_at_its_edges() -> None:
    arrays = make_arrays(np.array([7, 19]))
    data = PushTData(arrays["state"], arrays["action"], arrays["episode_ends"])
    windows = PushTWindows(data)
    # 7 steps with 1 before and 7 after are 15 places, one short of the horizon; 12 steps give 20 - 15 = 5.
    assert len(windows) == 5
    assert windows.rows[0].tolist() == [7, *range(7, 19), 18, 18, 18]
    assert windows.rows[4].tolist() == [*range(10, 19), *[18] * 7]


def test_no_window_fits() -> None:
    arrays = make_arrays(np.array([5, 9]))
    data = PushTData(arrays["state"], arrays["action"], arrays["episode_ends"])
    with pytest.raises(DataError, match="the longest of 2 episodes has 5 steps, horizon 16 needs 8"):
        PushTWindows(data)
    arrays = make_arrays(np.array([8]))
    assert len(PushTWindows(PushTData(arrays["state"], arrays["action"], arrays["episode_ends"]))) == 1


def test_image_windows() -> None:
    frames = make_frames(60)
    windows = PushTWindows(make_data(image=frames), "image")
    batch = windows.batch(np.array([3, 0, 3]))
    assert batch["obs"]["image"].shape == (3, 2, 96, 96, 3) and batch["obs"]["image"].dtype == torch.uint8
    assert np.array_equal(batch["obs"]["image"][0].numpy(), frames[windows.rows[3, :2].numpy()])
    assert set(windows.normalizers().obs) == {"agent_pos"}
    with pytest.raises(InvalidArgument, match="images=True"):
        PushTWindows(make_data(), "image")


def test_keypoints_are_computed_where_none_are_recorded() -> None:
    from minidiff_fast.tasks.pusht.env import keypoints_from_state

    data = make_data(keypoint=None)
    got = PushTWindows(data, "keypoints").batch([4])["obs"]["keypoints"][0].numpy()
    row = PushTWindows(data, "keypoints").rows[4, :2].numpy()
    np.testing.assert_allclose(got[:, :18].reshape(2, 9, 2), keypoints_from_state(data.state[row]), rtol=1e-6)


@pytest.mark.parametrize("bad", [[60], [-1], [0.5], [[1]], 3, [True]])
def test_bad_indices(bad: object) -> None:
    windows = PushTWindows(make_data())
    with pytest.raises(InvalidArgument, match="indices must be"):
        windows.batch(bad)  # type: ignore[arg-type]


def test_empty_batch() -> None:
    batch = PushTWindows(make_data()).batch([])
    assert batch["action"].shape == (0, 16, 2) and batch["obs"]["state"].shape == (0, 2, 5)


@pytest.mark.parametrize(
    "changes",
    [
        {"horizon": 0},
        {"n_obs_steps": 0},
        {"n_action_steps": 0},
        {"horizon": 8},
        {"obs": "pixels"},
        {"episodes": [3]},
    ]
    + [{"episodes": e} for e in ([], [0, 0], [-1], [0.5])],
)
def test_bad_window_arguments(changes: dict[str, object]) -> None:
    with pytest.raises(InvalidArgument, match="PushTWindows: "):
        PushTWindows(make_data(), **changes)  # type: ignore[arg-type]


def test_normalizers_use_the_steps_of_their_episodes_only() -> None:
    data = make_data()
    used = PushTWindows(data, "state", episodes=[2]).normalizers()
    assert np.array_equal(used.action.minimum.numpy(), data.action[27:].min(axis=0))
    assert np.array_equal(used.obs["state"].maximum.numpy(), data.state[27:].max(axis=0))
    assert not np.array_equal(used.action.minimum.numpy(), data.action.min(axis=0))


def test_split_by_episode() -> None:
    ends = np.arange(1, 11) * 20
    arrays = make_arrays(ends)
    windows = PushTWindows(PushTData(arrays["state"], arrays["action"], ends))
    train, val = windows.split(0.3, seed=42)
    assert val is not None
    assert len(val.episodes) == 3 and sorted([*train.episodes, *val.episodes]) == list(range(10))
    held = np.zeros(10, bool)
    held[np.random.default_rng(42).choice(10, size=3, replace=False)] = True
    assert val.episodes.tolist() == np.flatnonzero(held).tolist()
    assert len(train) + len(val) == len(windows) == 10 * (20 - 16 + 9)
    assert not set(train.rows.flatten().tolist()) & set(val.rows.flatten().tolist())
    assert windows.split(0.3, seed=43)[1].episodes.tolist() != val.episodes.tolist()  # type: ignore[union-attr]
    assert train._action is windows._action  # shared, not copied
    whole, none = windows.split(0.0)
    assert none is None and len(whole) == len(windows)
    assert len(windows.split(0.001)[1]) == 13  # type: ignore[arg-type]
    assert len(windows.split(0.999)[0]) == 13
    for bad in (-0.1, 1.0):
        with pytest.raises(InvalidArgument, match="val_ratio"):
            windows.split(bad)
    with pytest.raises(InvalidArgument, match="2 or more episodes, got 1"):
        PushTWindows(make_data(), episodes=[0]).split(0.1)


def test_to_moves_everything() -> None:
    windows = PushTWindows(make_data())
    moved = windows.to("meta")
    assert moved.device.type == "meta" and windows.device.type == "cpu"
    assert moved.batch(torch.zeros(3, dtype=torch.long, device="meta"))["action"].device.type == "meta"


@pytest.mark.skipif(not HUMAN, reason="MINIDIFF_FAST_PUSHT_HUMAN is not set")
def test_human_demonstrations() -> None:
    data = load_pusht(HUMAN)
    assert (data.n_steps, data.n_episodes) == (25650, 206)
    windows = PushTWindows(data, "keypoints")
    assert windows.rows.tolist() == slow_windows(data, 16, 1, 7)
    normalizers = windows.normalizers()
    assert normalizers.action.minimum.tolist() == [12.0, 25.0]
    assert normalizers.action.maximum.tolist() == [511.0, 511.0]
    # Recorded and computed keypoints are the same observation.
    computed = PushTWindows(PushTData(data.state, data.action, data.episode_ends, source="human"), "keypoints").batch(
        range(0, len(windows), 50)
    )["obs"]["keypoints"]
    recorded = windows.batch(range(0, len(windows), 50))["obs"]["keypoints"]
    assert (computed - recorded).abs().max() < 3.0
    assert (computed - recorded).abs().median() < 1e-3
