"""Videos of episodes (.mp4, .gif) and a contact sheet (.png) of several."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minidiff_fast.errors import InvalidArgument, RunFolderError, require


def write_video(
    frames: np.ndarray | Sequence[np.ndarray],  # [T, H, W, 3]
    path: str | Path,
    *,
    fps: float = 10.0,
    overwrite: bool = False,
) -> Path:
    """Write frames as a video; the suffix of ``path`` says which kind.

    ``.mp4`` is H.264 and needs imageio-ffmpeg; an odd height or width is made even by repeating the last row
    or column. ``.gif`` needs Pillow only and has at most 256 colours a frame. The folder is made if it is not
    there. The file appears under its name once it is complete.

    Args:
        frames: uint8 RGB, all of one size. [T, H, W, 3]
        path: ends in .mp4 or .gif.
        fps: frames per second; Push-T runs at 10. A .gif rounds the time of a frame to 0.01 s.
        overwrite: replace a file that is there.

    Raises:
        InvalidArgument: other frames, suffix or ``fps``.
        RunFolderError: the file is there and ``overwrite`` is False, or it cannot be written.
        MissingDependency: the package that the suffix needs is not installed.
    """
    target = Path(path)
    video = _checked_frames(frames, "write_video", "frames")
    if not 0 < fps <= 100:
        raise InvalidArgument(f"write_video: fps must be in (0, 100], got {fps}")
    writers = {".mp4": _write_mp4, ".gif": _write_gif}
    if target.suffix not in writers:
        raise InvalidArgument(f"write_video: path must end in .mp4 or .gif, got {target.name!r}")
    write = writers[target.suffix]
    require("imageio_ffmpeg" if target.suffix == ".mp4" else "PIL.Image", extra="pusht")
    _write_then_move(target, overwrite, lambda temporary: write(video, temporary, fps))
    return target


def contact_sheet(
    frames_per_episode: Sequence[np.ndarray],  # each [T_i, H, W, 3]
    scores: Sequence[float],
    path: str | Path,
    *,
    columns: int = 8,
    labels: Sequence[str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a .png with one row per episode, its frames at ``columns`` even times from first to last.

    Each row is labelled with its score, each frame with its step.

    Args:
        frames_per_episode: uint8 RGB, all of one size. Episodes may differ in length.
        scores: one per episode, in [0, 1].
        path: ends in .png.
        columns: frames of a row; an episode with fewer frames shows each of them once.
        labels: a short text per episode in place of ``episode 0``, ``episode 1``, ...
        overwrite: replace a file that is there.

    Raises:
        InvalidArgument: no episodes, other frames or suffix, or lengths that disagree.
        RunFolderError: the file is there and ``overwrite`` is False, or it cannot be written.
        MissingDependency: Pillow is not installed.
    """
    target = Path(path)
    if target.suffix != ".png":
        raise InvalidArgument(f"contact_sheet: path must end in .png, got {target.name!r}")
    if columns < 1:
        raise InvalidArgument(f"contact_sheet: columns must be >= 1, got {columns}")
    names = [f"episode {index}" for index in range(len(frames_per_episode))] if labels is None else list(labels)
    if not len(frames_per_episode) == len(scores) == len(names) or not names:
        raise InvalidArgument(
            "contact_sheet: frames_per_episode, scores and labels must have one equal length >= 1, "
            f"got {len(frames_per_episode)}, {len(scores)} and {len(names)}"
        )
    videos = [
        _checked_frames(frames, "contact_sheet", f"frames_per_episode[{index}]")
        for index, frames in enumerate(frames_per_episode)
    ]
    sizes = {video.shape[1:3] for video in videos}
    if len(sizes) > 1:
        raise InvalidArgument(f"contact_sheet: all frames must be of one size, got {sorted(sizes)}")
    texts = [f"{name}\nscore {score:.2f}" for name, score in zip(names, scores, strict=True)]
    sheet = _draw_sheet(videos, texts, columns)
    _write_then_move(target, overwrite, lambda temporary: sheet.save(temporary, format="PNG"))
    return target


def _draw_sheet(videos: list[np.ndarray], texts: list[str], columns: int) -> Any:
    image = require("PIL.Image", extra="pusht")
    draw_module = require("PIL.ImageDraw", extra="pusht")
    font = require("PIL.ImageFont", extra="pusht").load_default(size=13)
    height, width = videos[0].shape[1:3]
    gap, caption = 4, 18
    canvas = image.new("RGB", (1, 1))
    boxes = [draw_module.Draw(canvas).multiline_textbbox((0, 0), text, font=font) for text in texts]
    left = int(max(box[2] for box in boxes)) + 3 * gap
    row_height = max(height, int(max(box[3] for box in boxes))) + caption + gap
    canvas = image.new("RGB", (left + columns * (width + gap), gap + len(videos) * row_height), "white")
    draw = draw_module.Draw(canvas)
    for row, (video, text) in enumerate(zip(videos, texts, strict=True)):
        top = gap + row * row_height
        draw.multiline_text((gap, top + height // 2), text, fill="black", font=font, anchor="lm")
        steps = np.unique(np.linspace(0, len(video) - 1, columns).round().astype(int))
        for column, step in enumerate(steps):
            x = left + column * (width + gap)
            canvas.paste(image.fromarray(video[step]), (x, top))
            draw.text((x + width // 2, top + height + 1), f"{step}", fill="black", font=font, anchor="ma")
    return canvas


def _checked_frames(frames: np.ndarray | Sequence[np.ndarray], function: str, name: str) -> np.ndarray:
    try:
        video = np.asarray(frames)
    except ValueError as error:
        raise InvalidArgument(f"{function}: {name} must all be of one size ({error})") from error
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8 or 0 in video.shape:
        raise InvalidArgument(
            f"{function}: {name} must be uint8 [T, H, W, 3] with no empty axis, got {video.dtype} {list(video.shape)}"
        )
    return video


def _write_mp4(video: np.ndarray, path: Path, fps: float) -> None:
    ffmpeg = require("imageio_ffmpeg", extra="pusht")
    height, width = video.shape[1:3]
    even = np.pad(video, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    size = (even.shape[2], even.shape[1])
    writer = ffmpeg.write_frames(
        str(path),
        size,
        fps=fps,
        codec="libx264",
        macro_block_size=1,
        quality=8,
        ffmpeg_log_level="error",
        output_params=["-movflags", "+faststart"],
    )
    writer.send(None)
    try:
        for frame in even:
            writer.send(np.ascontiguousarray(frame))
    finally:
        writer.close()


def _write_gif(video: np.ndarray, path: Path, fps: float) -> None:
    image = require("PIL.Image", extra="pusht")
    pages = [image.fromarray(frame) for frame in video]
    duration = max(10, round(100 / fps) * 10)  # milliseconds, in the format's unit of 0.01 s
    pages[0].save(path, format="GIF", save_all=True, append_images=pages[1:], duration=duration, loop=0)


def _write_then_move(target: Path, overwrite: bool, write: Callable[[Path], None]) -> None:
    """Write a temporary file beside ``target``, then move it: no half-written file ever has the name."""
    if target.is_dir():
        raise RunFolderError(f"{target}: is a folder, a file is to be written there")
    if target.exists() and not overwrite:
        raise RunFolderError(f"{target}: exists already; pass overwrite=True to replace it")
    temporary = target.with_name(f".{target.stem}.{os.getpid()}.tmp{target.suffix}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(target.parent, os.W_OK):
            raise PermissionError(f"no write permission in {target.parent}")
        write(temporary)
        if not temporary.is_file() or temporary.stat().st_size == 0:
            raise OSError("the encoder wrote nothing")
        os.replace(temporary, target)
    except OSError as error:
        raise RunFolderError(f"{target}: cannot be written ({str(error).splitlines()[0]})") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
