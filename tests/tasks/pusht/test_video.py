"""Videos and contact sheets: what is written reads back, nothing is overwritten or left half-written."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from minidiff_fast.errors import InvalidArgument, MissingDependency, RunFolderError
from minidiff_fast.tasks.pusht import video as video_module
from minidiff_fast.tasks.pusht.video import contact_sheet, write_video


def ramp(n: int = 12, height: int = 96, width: int = 96) -> np.ndarray:
    frames = np.zeros((n, height, width, 3), np.uint8)
    frames[:] = (np.arange(n) * 20).astype(np.uint8)[:, None, None, None]
    frames[:, : height // 2, :, 0] = 255
    return frames


@pytest.mark.parametrize(("height", "width"), [(96, 96), (95, 97), (64, 130)])
def test_mp4_round_trip(tmp_path: Path, height: int, width: int) -> None:
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    frames = ramp(height=height, width=width)
    path = write_video(frames, tmp_path / "new" / "a.mp4", fps=10)
    reader = ffmpeg.read_frames(str(path))
    meta = next(reader)
    size = (width + width % 2, height + height % 2)
    assert tuple(meta["size"]) == size and meta["fps"] == 10
    read = np.stack([np.frombuffer(raw, np.uint8).reshape(size[1], size[0], 3) for raw in reader])
    assert len(read) == len(frames)
    off = np.abs(read[:, :height, :width].astype(int) - frames)
    assert off[:, height * 3 // 4 :].mean() < 4  # away from the colour edge that 4:2:0 blurs
    assert [p.name for p in path.parent.iterdir()] == ["a.mp4"]


def test_gif_round_trip(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    frames = ramp()
    path = write_video(list(frames), str(tmp_path / "a.gif"), fps=20)
    with image.open(path) as gif:
        assert gif.n_frames == 12 and gif.size == (96, 96) and gif.info["duration"] == 50
        gif.seek(7)
        assert np.abs(np.asarray(gif.convert("RGB")).astype(int) - frames[7]).max() <= 8


def test_nothing_is_overwritten_in_silence(tmp_path: Path) -> None:
    path = tmp_path / "a.gif"
    path.write_text("mine")
    with pytest.raises(RunFolderError, match=r"a\.gif: exists already"):
        write_video(ramp(), path)
    assert path.read_text() == "mine"
    write_video(ramp(), path, overwrite=True)
    assert path.read_bytes()[:3] == b"GIF"


def test_unwritable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    for write in (
        lambda p: write_video(ramp(), p / "a.gif"),
        lambda p: contact_sheet([ramp()], [1.0], p / "a.png"),
    ):
        with pytest.raises(RunFolderError, match="cannot be written"):
            write(file)
        with monkeypatch.context() as patch:
            patch.setattr(os, "access", lambda *_: False)
            with pytest.raises(RunFolderError, match="no write permission"):
                write(tmp_path)
    (tmp_path / "b.gif").mkdir()
    with pytest.raises(RunFolderError, match="is a folder"):
        write_video(ramp(), tmp_path / "b.gif", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.gif", "file"]


def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(ramp(), tmp_path / "a.gif")
    before = path.read_bytes()

    def fail(video: np.ndarray, temporary: Path, fps: float) -> None:
        temporary.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(video_module, "_write_gif", fail)
    with pytest.raises(RunFolderError, match="disk full"):
        write_video(ramp(), path, overwrite=True)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_mp4_without_ffmpeg_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(MissingDependency, match=r"minidiff_fast\[pusht\]"):
        write_video(ramp(), tmp_path / "a.mp4")
    write_video(ramp(), tmp_path / "a.gif")


@pytest.mark.parametrize(
    "frames",
    [ramp().astype(np.float32), ramp()[0], ramp()[..., :2], ramp()[:0], [ramp()[0], ramp(height=90)[0]]],
)
def test_bad_frames(tmp_path: Path, frames: np.ndarray) -> None:
    with pytest.raises(InvalidArgument, match="write_video: frames must"):
        write_video(frames, tmp_path / "a.gif")
    assert not list(tmp_path.iterdir())


def test_bad_suffix_and_fps(tmp_path: Path) -> None:
    for name in ("a.avi", "a", "a.png"):
        with pytest.raises(InvalidArgument, match=r"must end in \.mp4 or \.gif"):
            write_video(ramp(), tmp_path / name)
    for fps in (0, -1, float("nan"), 1000):
        with pytest.raises(InvalidArgument, match="fps"):
            write_video(ramp(), tmp_path / "a.gif", fps=fps)


def test_contact_sheet(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    path = contact_sheet([ramp(12), ramp(3)], [1.0, 0.25], tmp_path / "s.png", columns=4)
    pixels = np.asarray(image.open(path).convert("RGB"))
    left = pixels.shape[1] - 4 * 100
    assert left > 40
    # Row 0 shows the first and the last frame; row 1 has three frames, so its fourth place is white.
    assert np.array_equal(pixels[4:100, left : left + 96], ramp()[0])
    assert np.array_equal(pixels[4:100, left + 300 : left + 396], ramp()[11])
    row = pixels.shape[0] - pixels.shape[0] // 2 + 2
    assert np.array_equal(pixels[row : row + 96, left + 200 : left + 296], ramp()[2])
    assert (pixels[row : row + 96, left + 300 : left + 396] == 255).all()
    labels = pixels[4:100, :left]
    assert (labels < 128).any() and (labels[:, -4:] == 255).all()  # text, and not cut off


def test_contact_sheet_arguments(tmp_path: Path) -> None:
    path = tmp_path / "s.png"
    for frames, scores in (([], []), ([ramp()], [1.0, 0.5])):
        with pytest.raises(InvalidArgument, match="one equal length >= 1"):
            contact_sheet(frames, scores, path)
    with pytest.raises(InvalidArgument, match="one equal length"):
        contact_sheet([ramp()], [1.0], path, labels=["a", "b"])
    with pytest.raises(InvalidArgument, match="one size"):
        contact_sheet([ramp(), ramp(height=64)], [1.0, 1.0], path)
    with pytest.raises(InvalidArgument, match="columns"):
        contact_sheet([ramp()], [1.0], path, columns=0)
    with pytest.raises(InvalidArgument, match=r"\.png"):
        contact_sheet([ramp()], [1.0], tmp_path / "s.jpg")
    with pytest.raises(InvalidArgument, match=r"frames_per_episode\[0\]"):
        contact_sheet([ramp()[0]], [1.0], path)
