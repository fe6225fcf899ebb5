"""Push-T demonstrations in memory, and readers of .npz archives and of Diffusion Policy's zarr replay buffer.

A reader returns the arrays as they are stored, by the names ``state``, ``action``, ``episode_ends`` and,
where present, ``keypoint`` and ``image``. What they hold is checked once, by :class:`PushTData`.
"""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from minidiff_fast.errors import DataError, InvalidArgument, require

Arrays = dict[str, np.ndarray]

_IMAGE_NAMES = ("img", "image")
TABLE = 512.0
"""Width and height of the table, pixels."""


@dataclass(frozen=True, eq=False)
class PushTData:
    """Demonstrations, all episodes one after the other. Checked when made; see Raises.

    Raises:
        DataError: in one line with ``source`` and the problem: a wrong shape or kind, lengths that disagree,
            no steps, NaN or infinity, or ``episode_ends`` that do not rise strictly to N.
    """

    state: np.ndarray  # [N, 5]
    """Before the action: agent x, y, block x, y (pixels, 0..512), block angle (radians), float32. The last
    three are NaN if ``has_block`` is False."""

    action: np.ndarray  # [N, 2]
    """Target position of the agent, pixels, float32."""

    episode_ends: np.ndarray  # [E]
    """Index one past the last step of each episode, int64."""

    image: np.ndarray | None = None  # [N, 96, 96, 3]
    """Camera frames, uint8 RGB."""

    keypoint: np.ndarray | None = None  # [N, 9, 2]
    """World positions of the block's keypoints, pixels, float32."""

    source: str = "arrays"
    """Where the data comes from: a path, a hub id, or ``EMBEDDED``."""

    has_block: bool = True
    """Whether the block's pose is known (it is not in ``lerobot/pusht``)."""

    def __post_init__(self) -> None:
        state = self._real("state", self.state, (5,))
        steps = len(state)
        if steps == 0:
            raise DataError(f"{self.source}: holds no steps")
        keypoint = None if self.keypoint is None else self._real("keypoint", self.keypoint, (9, 2))
        values = {"state": state, "action": self._real("action", self.action, (2,)), "keypoint": keypoint}
        if self.image is not None:
            image = np.asarray(self.image)
            if image.dtype != np.uint8 or image.shape[1:] != (96, 96, 3):
                raise DataError(
                    f"{self.source}: image must be uint8 [N, 96, 96, 3], got {image.dtype} {list(image.shape)}"
                )
            values["image"] = image
        for name, value in values.items():
            if value is not None and len(value) != steps:
                raise DataError(f"{self.source}: {name} has {len(value)} steps but state has {steps}")
            if value is not None and name != "image":
                self._check_finite(name, value if self.has_block or name != "state" else value[:, :2])
        values["episode_ends"] = self._ends(steps)
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def n_steps(self) -> int:
        """Number of steps N."""
        return len(self.state)

    @property
    def n_episodes(self) -> int:
        """Number of episodes E."""
        return len(self.episode_ends)

    @property
    def episode_starts(self) -> np.ndarray:
        """Index of the first step of each episode, int64. [E]"""
        return np.concatenate([[0], self.episode_ends[:-1]])

    def episode(self, index: int) -> slice:
        """The steps of episode ``index``, as a slice.

        Raises:
            InvalidArgument: there is no such episode.
        """
        if not 0 <= index < self.n_episodes:
            raise InvalidArgument(f"PushTData.episode: index must be in [0, {self.n_episodes}), got {index}")
        return slice(int(self.episode_starts[index]), int(self.episode_ends[index]))

    def with_mirrored(self) -> PushTData:
        """These episodes, then the mirror image of each: 2 E episodes of the same task.

        The T is symmetric about its stem, which at the goal lies on the diagonal x + y = 512 of the table. Mirrored at
        it, ``(x, y) -> (512 - y, 512 - x)`` and ``angle -> pi/2 - angle``, a demonstration is one from the mirrored
        start. (The walls are at 5 and 506, so that next to them the image is off by a pixel.) Keypoints are computed
        from the mirrored pose: they are points of the block in a fixed order, which mirroring would permute.
        """
        state = self.state.copy()
        state[:, :2], state[:, 2:4] = _mirrored(self.state[:, :2]), _mirrored(self.state[:, 2:4])
        state[:, 4] = np.mod(np.pi / 2 - self.state[:, 4], 2.0 * np.pi)  # as the environment gives it
        keypoint = image = None
        if self.keypoint is not None:
            from minidiff_fast.tasks.pusht.env import keypoints_from_state

            keypoint = np.concatenate([self.keypoint, keypoints_from_state(state)])
        if self.image is not None:
            image = np.concatenate([self.image, self.image[:, ::-1, ::-1].swapaxes(1, 2)])
        return replace(
            self,
            state=np.concatenate([self.state, state]),
            action=np.concatenate([self.action, _mirrored(self.action)]),
            episode_ends=np.concatenate([self.episode_ends, self.episode_ends[-1] + self.episode_ends]),
            image=image,
            keypoint=keypoint,
        )

    def _real(self, name: str, value: np.ndarray, tail: tuple[int, ...]) -> np.ndarray:
        array = np.asarray(value)
        if array.dtype.kind not in "fiu" or array.ndim != 1 + len(tail) or array.shape[1:] != tail:
            shape = ", ".join(map(str, ("N", *tail)))
            raise DataError(f"{self.source}: {name} must be numbers [{shape}], got {array.dtype} {list(array.shape)}")
        with np.errstate(over="ignore"):  # an overflow becomes infinity, which is reported
            converted = np.ascontiguousarray(array, dtype=np.float32)
        return converted if converted.flags.writeable else converted.copy()

    def _check_finite(self, name: str, value: np.ndarray) -> None:
        bad = ~np.isfinite(value.reshape(len(value), -1)).all(axis=1)
        if bad.any():
            raise DataError(
                f"{self.source}: {name} holds NaN or infinity in {int(bad.sum())} of {len(value)} steps, "
                f"first at step {int(bad.argmax())}"
            )

    def _ends(self, steps: int) -> np.ndarray:
        ends = np.asarray(self.episode_ends)
        if ends.dtype.kind not in "iu" or ends.ndim != 1 or ends.size == 0:
            raise DataError(
                f"{self.source}: episode_ends must be integers [E] with E >= 1, got {ends.dtype} {list(ends.shape)}"
            )
        ends = ends.astype(np.int64)
        lengths = np.diff(ends, prepend=0)
        if (lengths <= 0).any():
            index = int((lengths <= 0).argmax())
            raise DataError(
                f"{self.source}: episode_ends must rise strictly from above 0, "
                f"got {ends[index]} after {ends[index - 1] if index else 0} at episode {index}"
            )
        if ends[-1] != steps:
            raise DataError(f"{self.source}: the last of episode_ends is {ends[-1]} but there are {steps} steps")
        return ends


def _mirrored(
    points: np.ndarray,  # [..., 2]
) -> np.ndarray:
    """``(x, y) -> (512 - y, 512 - x)``. [..., 2]"""
    return TABLE - points[..., ::-1]


def read_npz(path: Path, *, images: bool) -> Arrays:
    """Read ``state``, ``action``, ``episode_ends`` and ``keypoint`` (if there) of an .npz archive.

    Args:
        images: also read the frames: ``img`` or ``image`` of the archive or of ``<name>_img.npz`` beside it.

    Raises:
        DataError: the archive is damaged, pickled, or lacks an array.
    """
    arrays = _members(path, required=("state", "action", "episode_ends"), optional=("keypoint",))
    if not images:
        return arrays
    beside = path.with_name(f"{path.stem}_img.npz")
    for candidate in (path, beside):
        if candidate.is_file():
            found = _members(candidate, required=(), optional=_IMAGE_NAMES)
            for frames in found.values():
                arrays["image"] = to_uint8(frames, str(candidate))
                return arrays
    raise DataError(
        f"{path}: images were asked for, but neither it nor {beside.name} beside it has an array img or image"
    )


def _members(path: Path, *, required: tuple[str, ...], optional: tuple[str, ...]) -> Arrays:
    arrays: Arrays = {}
    name = "the archive"
    try:
        opened = np.load(path, allow_pickle=False)
        if not isinstance(opened, np.lib.npyio.NpzFile):
            raise DataError(f"{path}: not an .npz archive but a single array")
        with opened as archive:
            missing = [key for key in required if key not in archive.files]
            if missing:
                raise DataError(f"{path}: lacks {', '.join(missing)}; it holds {', '.join(archive.files) or 'nothing'}")
            for name in (*required, *optional):
                if name in archive.files:
                    arrays[name] = archive[name]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: {name} cannot be read ({_first_line(error)})") from error
    return arrays


def read_zarr(path: Path, *, images: bool) -> Arrays:
    """Read Diffusion Policy's replay buffer, zarr format 2 or 3, from a folder or a .zip.

    The buffer is the group with ``data/{state, action, keypoint, img}`` and ``meta/episode_ends``; it may be
    the folder or archive itself or lie deeper in it. Every chunk of every array that is read must be there:
    zarr would give the fill value, zeros, for one that is not.

    Args:
        images: also read ``data/img``.

    Raises:
        DataError: no replay buffer there, an array or a chunk is missing, or a chunk is damaged.
        MissingDependency: zarr is not installed.
    """
    zarr = require("zarr", extra="pusht")
    store: Any
    if path.is_dir():
        root = _folder_root(path)
        store, prefix = str(root), ""
    else:
        prefix = _zip_root(path)
        store = zarr.storage.ZipStore(str(path), mode="r")
    try:
        try:
            group = zarr.open_group(store, mode="r", path=prefix)
        except Exception as error:  # the exception classes of zarr 2 and 3 share no base
            raise DataError(
                f"{path}: zarr {zarr.__version__} cannot open it ({_first_line(error)}); zarr format 3 needs zarr >= 3"
            ) from error
        arrays = {
            "state": _read_array(group, "data/state", path),
            "action": _read_array(group, "data/action", path),
            "episode_ends": _read_array(group, "meta/episode_ends", path),
        }
        if "data/keypoint" in group:
            arrays["keypoint"] = _read_array(group, "data/keypoint", path)
        if images:
            arrays["image"] = _read_array(group, "data/img", path, as_uint8=True)
        return arrays
    finally:
        if not path.is_dir():
            store.close()


def _folder_root(path: Path) -> Path:
    for pattern in ("meta/episode_ends", "*/meta/episode_ends", "*/*/meta/episode_ends"):
        found = sorted(path.glob(pattern))
        if len(found) > 1:
            raise DataError(f"{path}: holds {len(found)} replay buffers; name one of them")
        if found:
            return found[0].parent.parent
    raise DataError(f"{path}: no zarr replay buffer there (no meta/episode_ends)")


def _zip_root(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not a readable .zip archive ({_first_line(error)})") from error
    ends = ("meta/episode_ends/.zarray", "meta/episode_ends/zarr.json")
    found = {
        name[: -len(end)].rstrip("/")
        for name in names
        for end in ends
        if (name == end or name.endswith("/" + end)) and not name.startswith("__MACOSX/")
    }
    if len(found) != 1:
        raise DataError(f"{path}: expected one zarr replay buffer (meta/episode_ends) in it, found {len(found)}")
    return found.pop()


def _read_array(group: Any, name: str, path: Path, *, as_uint8: bool = False) -> np.ndarray:
    if name not in group:
        raise DataError(f"{path}: lacks the array {name}")
    array = group[name]
    if not hasattr(array, "nchunks_initialized"):
        raise DataError(f"{path}: {name} must be an array, found a group")
    stored, expected = array.nchunks_initialized, array.nchunks
    if stored != expected:
        raise DataError(
            f"{path}: {name} is incomplete: {stored} of {expected} chunks are there; copy or download the data again"
        )
    try:
        if not as_uint8:
            return np.asarray(array[:])
        # The published frames are float32, four times the size of what they hold.
        out = np.empty(array.shape, np.uint8)
        step = max(1, array.chunks[0] if array.chunks else 1)
        for start in range(0, array.shape[0], step):
            out[start : start + step] = to_uint8(np.asarray(array[start : start + step]), f"{path}: {name}")
        return out
    except DataError:
        raise
    except Exception as error:  # every codec raises its own class on a damaged chunk
        raise DataError(f"{path}: {name} cannot be read, a chunk is damaged ({_first_line(error)})") from error


def to_uint8(
    frames: np.ndarray,  # [N, H, W, 3]
    where: str,
) -> np.ndarray:
    """``frames`` as uint8; other dtypes must hold whole numbers from 0 to 255.

    Raises:
        DataError: they do not.
    """
    if frames.dtype == np.uint8:
        return frames
    if frames.dtype.kind not in "fiu":
        raise DataError(f"{where}: frames must be numbers from 0 to 255, got {frames.dtype}")
    with np.errstate(invalid="ignore"):
        converted = frames.astype(np.uint8)
    if not np.array_equal(converted, frames):
        raise DataError(
            f"{where}: frames of {frames.dtype} must hold whole numbers from 0 to 255, "
            f"got {np.nanmin(frames):g} to {np.nanmax(frames):g}"
        )
    return converted


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
