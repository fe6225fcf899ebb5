"""Push-T in LeRobot's layout, from a folder or from the Hugging Face hub.

What the public data sets hold: ``lerobot/pusht`` has the agent's position, actions and video, and no block
pose. ``lerobot/pusht_keypoints`` has the agent's position, actions and the 8 corners of the block, from which
the block pose follows exactly. ``lerobot/pusht_image`` is ``lerobot/pusht`` with PNG frames instead of video.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from minidiff_fast.errors import DataError, require
from minidiff_fast.tasks.pusht.sources import Arrays, _first_line

BLOCK_CORNERS: np.ndarray = np.array(
    [[-60, 0], [60, 0], [60, 30], [-60, 30], [-15, 30], [15, 30], [15, 120], [-15, 120]], dtype=np.float64
)
"""Corners of the T's bar, then of its stem, in the block frame and in gym-pusht's order, pixels. [8, 2]"""

_CORNER_TOLERANCE = 0.05  # pixels; float32 storage leaves about 1e-4
_IMAGE = "observation.image"
_CORNERS = "observation.environment_state"


def download_dataset(repo_id: str, *, images: bool) -> Path:
    """Download a data set of the Hugging Face hub (or find it in the local cache) and return its folder.

    Raises:
        DataError: it cannot be had: no connection, no such data set, or one that needs a log-in.
        MissingDependency: huggingface_hub is not installed.
    """
    hub = require("huggingface_hub", extra="pusht")
    patterns = ["meta/**", "data/**"] + (["videos/**"] if images else [])
    try:
        return Path(hub.snapshot_download(repo_id, repo_type="dataset", allow_patterns=patterns))
    except Exception as error:  # the hub client raises its own, httpx's and requests' classes
        raise DataError(f"{repo_id}: cannot be downloaded from the Hugging Face hub ({_first_line(error)})") from error


def read_lerobot(folder: Path, *, images: bool, source: str) -> Arrays:
    """Read Push-T from LeRobot's layout (version 2 or 3): ``meta/info.json``, ``data/**/*.parquet``, videos.

    ``state`` [N, 5] is rebuilt from the agent's position and the block's corners. Without corners it is the
    agent's position alone, [N, 2], and only image observations can be made of it.

    Args:
        images: also read the frames, from the parquet files (PNG) or from the videos.
        source: how messages name the data set.

    Raises:
        DataError: another layout or other columns, rows or files missing, frames that do not decode, or, with
            ``images=False``, no block pose.
        MissingDependency: pyarrow, or for frames Pillow or imageio-ffmpeg, is not installed.
    """
    info = _read_info(folder, source)
    features = info["features"]
    has_corners = _CORNERS in features
    if not has_corners and not images:
        raise DataError(
            f"{source}: its observation.state is the agent's position only and it has no {_CORNERS} (the "
            "block), so obs='state' and obs='keypoints' cannot be made; use lerobot/pusht_keypoints or "
            "pusht_cchi_v7_replay.zarr, or obs='image'"
        )
    if images and _IMAGE not in features:
        raise DataError(f"{source}: has no {_IMAGE}; use lerobot/pusht or pusht_cchi_v7_replay.zarr for obs='image'")
    columns = ["observation.state", "action", "episode_index", "frame_index"]
    columns += [_CORNERS] if has_corners else []
    in_parquet = images and features[_IMAGE].get("dtype") == "image"
    columns += [_IMAGE] if in_parquet else []
    table = _read_table(folder, columns, source)

    episode = _numbers(table, "episode_index", 1, source)[:, 0].astype(np.int64)
    frame = _numbers(table, "frame_index", 1, source)[:, 0].astype(np.int64)
    order = np.lexsort((frame, episode))
    episode, frame = episode[order], frame[order]
    ends = np.flatnonzero(np.diff(episode, append=episode[-1] + 1)) + 1
    _check_complete(info, episode, frame, ends, source)

    agent = _numbers(table, "observation.state", 2, source)[order]
    state = agent
    if has_corners:
        corners = _numbers(table, _CORNERS, 16, source)[order].reshape(-1, 8, 2)
        state = np.concatenate([agent, block_pose(corners, source)], axis=1)
    arrays: Arrays = {
        "state": state,
        "action": _numbers(table, "action", 2, source)[order],
        "episode_ends": ends.astype(np.int64),
    }
    if in_parquet:
        cells = table.column(_IMAGE).to_pylist()
        arrays["image"] = _decode_cells([cells[i] for i in order], source)
    elif images:
        codec = _codec(features[_IMAGE])
        arrays["image"] = _decode_videos(folder, ends, codec, source)
    return arrays


def block_pose(
    corners: np.ndarray,  # [N, 8, 2]
    source: str,
) -> np.ndarray:
    """Block x, y (pixels) and angle (radians, in [0, 2 pi)) from the world positions of its corners. [N, 3]

    The least-squares rigid fit: with centred corners ``p`` (block frame) and ``q`` (world),
    ``angle = atan2(sum p x q, sum p . q)`` and ``xy = mean(world) - R(angle) mean(local)``.

    Raises:
        DataError: the corners of a row are more than 0.05 px off a Push-T block, or not finite.
    """
    world = np.asarray(corners, dtype=np.float64)
    if not np.isfinite(world).all():
        row = int(np.flatnonzero(~np.isfinite(world).all(axis=(1, 2)))[0])
        raise DataError(f"{source}: {_CORNERS} holds NaN or infinity at row {row}")
    p = BLOCK_CORNERS - BLOCK_CORNERS.mean(axis=0)
    middle = world.mean(axis=1)
    q = world - middle[:, None]
    cross = (p[:, 0] * q[..., 1] - p[:, 1] * q[..., 0]).sum(axis=1)
    angle = np.arctan2(cross, (p * q).sum(axis=(1, 2)))
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)
    xy = middle - turn @ BLOCK_CORNERS.mean(axis=0)
    off = np.abs(BLOCK_CORNERS @ turn.transpose(0, 2, 1) + xy[:, None] - world).max(axis=(1, 2))
    if off.max() > _CORNER_TOLERANCE:
        raise DataError(
            f"{source}: {_CORNERS} must be the 8 corners of the Push-T block in gym-pusht's order, "
            f"row {int(off.argmax())} is {off.max():.3g} px off"
        )
    return np.concatenate([xy, (angle % (2 * np.pi))[:, None]], axis=1)


def _read_info(folder: Path, source: str) -> dict[str, Any]:
    path = folder / "meta" / "info.json"
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{source}: meta/info.json of LeRobot's layout cannot be read ({_first_line(error)})"
        ) from error
    if not isinstance(info, dict) or not isinstance(info.get("features"), dict):
        raise DataError(f"{source}: meta/info.json lists no features; LeRobot's layout of version 2 or 3 is expected")
    missing = [name for name in ("observation.state", "action") if name not in info["features"]]
    if missing:
        raise DataError(f"{source}: lacks {', '.join(missing)}; its features are {', '.join(info['features'])}")
    return info


def _read_table(folder: Path, columns: list[str], source: str) -> Any:
    arrow = require("pyarrow", extra="pusht")
    parquet = require("pyarrow.parquet", extra="pusht")
    files = sorted((folder / "data").glob("**/*.parquet"))
    if not files:
        raise DataError(f"{source}: no data/**/*.parquet in {folder}")
    tables = []
    for file in files:
        try:
            reader = parquet.ParquetFile(file)
            missing = [name for name in columns if name not in reader.schema_arrow.names]
            if missing:
                raise DataError(f"{source}: {file.name} lacks the columns {', '.join(missing)}")
            tables.append(reader.read(columns=columns))
        except (OSError, arrow.ArrowException) as error:
            raise DataError(f"{source}: {file.name} cannot be read ({_first_line(error)})") from error
    try:
        table = arrow.concat_tables(tables, promote_options="permissive")
    except arrow.ArrowException as error:
        raise DataError(f"{source}: its parquet files differ in their columns ({_first_line(error)})") from error
    if table.num_rows == 0:
        raise DataError(f"{source}: holds no rows")
    return table


def _numbers(table: Any, name: str, width: int, source: str) -> np.ndarray:
    """A column of numbers or of lists of ``width`` numbers as float64. [N, width]"""
    rows = [row if isinstance(row, list) else [row] for row in table.column(name).to_pylist()]
    bad = next((i for i, row in enumerate(rows) if len(row) != width or None in row), None)
    if bad is not None:
        raise DataError(f"{source}: {name} must hold {width} numbers a row, row {bad} is {str(rows[bad])[:80]}")
    try:
        return np.array(rows, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{source}: {name} must hold numbers ({_first_line(error)})") from error


def _check_complete(
    info: dict[str, Any], episode: np.ndarray, frame: np.ndarray, ends: np.ndarray, source: str
) -> None:
    starts = np.concatenate([[0], ends[:-1]])
    expected = np.arange(len(frame)) - np.repeat(starts, np.diff(ends, prepend=0))
    if not np.array_equal(frame, expected):
        row = int(np.flatnonzero(frame != expected)[0])
        raise DataError(
            f"{source}: frame_index of episode {episode[row]} must count from 0 by ones, got {frame[row]} "
            f"for {expected[row]}: rows are missing or double"
        )
    for key, count in (("total_frames", len(frame)), ("total_episodes", len(ends))):
        if info.get(key, count) != count:
            raise DataError(f"{source}: is incomplete: meta/info.json says {key} = {info[key]}, found {count}")


def _codec(feature: dict[str, Any]) -> str:
    described = feature.get("info") or feature.get("video_info") or {}
    return str(described.get("video.codec", "unknown codec"))


def _decode_cells(cells: list[Any], source: str) -> np.ndarray:
    image = require("PIL.Image", extra="pusht")
    frames = np.empty((len(cells), 96, 96, 3), np.uint8)
    for row, cell in enumerate(cells):
        try:
            pixels = np.asarray(image.open(io.BytesIO(cell["bytes"])).convert("RGB"))
        except (TypeError, KeyError, OSError, ValueError) as error:
            raise DataError(f"{source}: {_IMAGE} of row {row} does not decode ({_first_line(error)})") from error
        if pixels.shape != (96, 96, 3):
            raise DataError(f"{source}: {_IMAGE} must be 96 x 96, row {row} is {list(pixels.shape)}")
        frames[row] = pixels
    return frames


def _decode_videos(folder: Path, ends: np.ndarray, codec: str, source: str) -> np.ndarray:
    """All frames of the videos in the order of their names, which is the order of the episodes."""
    ffmpeg = require("imageio_ffmpeg", extra="pusht")
    files = sorted(file for file in (folder / "videos").glob("**/*.mp4") if _IMAGE in file.parts)
    if not files:
        raise DataError(f"{source}: no video of {_IMAGE} in {folder / 'videos'}")
    total = int(ends[-1])
    frames = np.empty((total, 96, 96, 3), np.uint8)
    lengths = np.diff(ends, prepend=0)
    per_episode = len(files) == len(ends)
    count = 0
    for index, file in enumerate(files):
        before = count
        try:
            reader = ffmpeg.read_frames(str(file), output_params=["-fps_mode", "passthrough"])
            size = tuple(next(reader)["size"])
            if size != (96, 96):
                raise DataError(f"{source}: {file.name} must be 96 x 96, is {size[0]} x {size[1]}")
            for raw in reader:
                if count < total:
                    frames[count] = np.frombuffer(raw, np.uint8).reshape(96, 96, 3)
                count += 1
        except (OSError, RuntimeError, StopIteration) as error:
            raise DataError(
                f"{source}: {file.name} ({codec}) does not decode with the ffmpeg at hand "
                f"({_first_line(error)}); use lerobot/pusht_image or pusht_cchi_v7_replay.zarr"
            ) from error
        if per_episode and count - before != lengths[index]:
            raise DataError(f"{source}: {file.name} holds {count - before} frames, its episode {lengths[index]} rows")
    if count != total:
        raise DataError(f"{source}: the videos hold {count} frames, the tables {total} rows")
    return frames
