"""Push-T data: loading and checking demonstrations, and cutting them into training windows."""

from __future__ import annotations

import copy
import importlib.resources
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypedDict, get_args

import numpy as np
import torch
from torch import Tensor

from minidiff_fast.errors import DataError, InvalidArgument
from minidiff_fast.nn.normalizer import MinMaxNormalizer
from minidiff_fast.tasks.pusht.hub import download_dataset, read_lerobot
from minidiff_fast.tasks.pusht.sources import Arrays, PushTData, read_npz, read_zarr

ObservationKind = Literal["state", "keypoints", "image"]
"""``state`` [5]; ``keypoints`` [20]; ``image`` [96, 96, 3] with ``agent_pos`` [2]."""

EMBEDDED = "embedded demonstrations"
"""``PushTData.source`` of the demonstrations that come with the package."""


def load_pusht(source: str | Path | None = None, *, images: bool = False) -> PushTData:
    """Load Push-T demonstrations.

    Args:
        source: None for the demonstrations that come with the package, or

            * a ``.npz`` with ``state``, ``action``, ``episode_ends`` and optionally ``keypoint``, ``img``;
            * Diffusion Policy's replay buffer ``pusht_cchi_v7_replay.zarr`` (zarr format 2 or 3): the folder,
              a folder that holds it, or a ``.zip`` of either;
            * a folder in LeRobot's layout (``meta/info.json``, ``data/**/*.parquet``);
            * ``lerobot/<name>`` or ``hf://<owner>/<name>``, a data set of the Hugging Face hub in that
              layout. A local path of that name goes first.
        images: also load the camera frames (about 0.7 GB for 25,650 steps). For an .npz they may lie in
            ``<name>_img.npz`` beside it. Those of the embedded demonstrations are rendered from their states.

    Raises:
        DataError: the source is missing, incomplete, damaged, of another format, or fails the checks of
            :class:`PushTData`; or frames are asked for and it has none.
        MissingDependency: a package that this source needs is not installed.

    Source: Chi et al., Diffusion Policy, RSS 2023 (data, zarr form); Cadene et al., LeRobot, 2024 (layout).
    """
    if source is None:
        return _embedded(images)
    name = str(source)
    path = Path(source).expanduser()
    if path.is_dir():
        if (path / "meta" / "info.json").is_file():
            return _build_lerobot(path, name, images)
        return _build(read_zarr(path, images=images), name)
    if path.is_file():
        if path.suffix == ".npz":
            return _build(read_npz(path, images=images), name)
        if path.suffix == ".zip":
            return _build(read_zarr(path, images=images), name)
        raise DataError(f"{name}: expected an .npz, a .zip or a folder, got a {path.suffix or 'suffix-less'} file")
    repo_id = name.removeprefix("hf://")
    if name.startswith(("hf://", "lerobot/")) and repo_id.count("/") == 1:
        return _build_lerobot(download_dataset(repo_id, images=images), name, images)
    raise DataError(
        f"{name}: no such file or folder (a data set of the hub is named lerobot/<name> or hf://<owner>/<name>)"
    )


def _embedded(images: bool) -> PushTData:
    resource = importlib.resources.files("minidiff_fast.tasks.pusht") / "demonstrations.npz"
    if not resource.is_file():
        raise DataError(f"{EMBEDDED}: demonstrations.npz is missing from the installed package; reinstall it")
    with importlib.resources.as_file(resource) as path:
        arrays = read_npz(path, images=False)
    if images:
        arrays["image"] = render_states(arrays["state"])
    return _build(arrays, EMBEDDED)


def _build(arrays: Arrays, source: str, *, has_block: bool = True) -> PushTData:
    return PushTData(
        state=arrays["state"],
        action=arrays["action"],
        episode_ends=arrays["episode_ends"],
        image=arrays.get("image"),
        keypoint=arrays.get("keypoint"),
        source=source,
        has_block=has_block,
    )


def _build_lerobot(folder: Path, name: str, images: bool) -> PushTData:
    arrays = read_lerobot(folder, images=images, source=name)
    has_block = arrays["state"].shape[1] == 5
    if not has_block:
        unknown = np.full((len(arrays["state"]), 3), np.nan)
        arrays["state"] = np.concatenate([arrays["state"], unknown], axis=1)
    return _build(arrays, name, has_block=has_block)


def render_states(
    states: np.ndarray,  # [N, 5]
) -> np.ndarray:
    """The camera frames of recorded states, uint8. [N, 96, 96, 3]

    Raises:
        InvalidArgument: ``states`` is not [N, 5] of finite numbers.
        MissingDependency: gym-pusht is not installed.
    """
    from minidiff_fast.tasks.pusht.env import make_env

    rows = np.asarray(states)
    if rows.ndim != 2 or rows.shape[1] != 5:
        raise InvalidArgument(f"render_states: states must be [N, 5], got {list(rows.shape)}")
    env = make_env(render=True)
    frames = np.empty((len(rows), 96, 96, 3), np.uint8)
    try:
        for index, row in enumerate(rows):
            if index == 0:
                env.reset(seed=0)
            env.set_state(row)
            frames[index] = env.render_rgb(96)
    finally:
        env.close()
    return frames


class WindowBatch(TypedDict):
    """Raw units; B windows, To observation steps, T actions."""

    obs: dict[str, Tensor]  # name -> [B, To, ...]
    action: Tensor  # [B, T, 2]


class Normalizers(NamedTuple):
    """Normalisers fitted over training steps."""

    obs: dict[str, MinMaxNormalizer]
    """One for each observation but ``image``, whose uint8 range is fixed."""

    action: MinMaxNormalizer


class PushTWindows:
    """Every training window of the demonstrations: To observations and T actions from the same first step.

    A window starts ``n_obs_steps - 1`` steps before its episode at the earliest and ends
    ``n_action_steps - 1`` steps after it at the latest; steps outside the episode repeat its first or last
    step. So an episode of L steps gives ``L - horizon + n_obs_steps + n_action_steps - 1`` windows, if that
    is positive. Action ``n_obs_steps - 1`` of a window is the one taken on its last observation.

    Args:
        data: demonstrations.
        obs: ``"state"`` gives ``state`` [To, 5]; ``"keypoints"`` gives ``keypoints`` [To, 20], the 9 recorded
            (else computed) block keypoints x0, y0, ..., x8, y8 and agent x, y; ``"image"`` gives ``image``
            uint8 [To, 96, 96, 3] and ``agent_pos`` [To, 2]. Pixels and radians, float32.
        horizon: actions T of a window.
        n_obs_steps: observations To.
        n_action_steps: actions that a policy executes before it looks again.
        episodes: indices of the episodes to use; None for all.

    Raises:
        InvalidArgument: an argument is out of range, or ``obs="image"`` and the data has no frames.
        DataError: the data lacks the block pose that ``obs`` needs, or no episode is long enough.

    Source: the sequence sampler of Diffusion Policy (Chi et al., 2023).
    """

    def __init__(
        self,
        data: PushTData,
        obs: ObservationKind = "state",
        horizon: int = 16,
        n_obs_steps: int = 2,
        n_action_steps: int = 8,
        *,
        episodes: Sequence[int] | np.ndarray | None = None,
    ) -> None:
        for name, value in (
            ("horizon", horizon),
            ("n_obs_steps", n_obs_steps),
            ("n_action_steps", n_action_steps),
        ):
            if value < 1:
                raise InvalidArgument(f"PushTWindows: {name} must be >= 1, got {value}")
        if n_obs_steps - 1 + n_action_steps > horizon:
            raise InvalidArgument(
                f"PushTWindows: n_obs_steps - 1 + n_action_steps must be <= horizon = {horizon}, "
                f"got {n_obs_steps} - 1 + {n_action_steps}"
            )
        self.data = data
        self.obs: ObservationKind = obs
        self.horizon, self.n_obs_steps, self.n_action_steps = horizon, n_obs_steps, n_action_steps
        self._steps = _observation_steps(data, obs)
        self._action = torch.from_numpy(data.action)
        self._set_episodes(np.arange(data.n_episodes) if episodes is None else np.asarray(episodes))

    def __len__(self) -> int:
        return self._rows.shape[0]

    @property
    def rows(self) -> Tensor:
        """Index of the step at each place of each window, int64. [len, T]"""
        return self._rows

    @property
    def device(self) -> torch.device:
        """Where the data lies and where :meth:`batch` puts its tensors."""
        return self._action.device

    def to(self, device: torch.device | str) -> PushTWindows:
        """The same windows with data and index on ``device``: batches are then gathered there."""
        moved = copy.copy(self)
        moved._steps = {name: steps.to(device) for name, steps in self._steps.items()}
        moved._action, moved._rows = self._action.to(device), self._rows.to(device)
        return moved

    def batch(
        self,
        indices: Tensor | np.ndarray | Sequence[int],  # [B]
    ) -> WindowBatch:
        """The windows ``indices``, in raw units: ``{"obs": {name: [B, To, ...]}, "action": [B, T, 2]}``.

        Raises:
            InvalidArgument: ``indices`` is not a list of integers in [0, len). Indices on an accelerator are
                not read back to be checked; there the gather itself fails.
        """
        index = torch.as_tensor(indices)
        if index.ndim != 1 or index.dtype.is_floating_point or index.dtype == torch.bool:
            if index.numel() or index.ndim != 1:
                raise InvalidArgument(
                    f"PushTWindows.batch: indices must be integers [B], got {index.dtype} {list(index.shape)}"
                )
            index = index.long()
        if index.device.type == "cpu" and index.numel():
            low, high = int(index.min()), int(index.max())
            if low < 0 or high >= len(self):
                raise InvalidArgument(
                    f"PushTWindows.batch: indices must be in [0, {len(self)}), got {low if low < 0 else high}"
                )
        rows = self._rows[index.to(self.device)]
        seen = rows[:, : self.n_obs_steps]
        return {
            "obs": {name: steps[seen] for name, steps in self._steps.items()},
            "action": self._action[rows],
        }

    def normalizers(self) -> Normalizers:
        """Fit a normaliser to each observation but ``image``, and one to the actions, over every step of the
        episodes used (each step once)."""
        used = np.concatenate([np.arange(s, e) for s, e in self._bounds()])
        index = torch.from_numpy(used).to(self.device)
        obs = {name: MinMaxNormalizer.fit(v[index]) for name, v in self._steps.items() if name != "image"}
        return Normalizers(obs, MinMaxNormalizer.fit(self._action[index]))

    def split(self, val_ratio: float, seed: int = 0) -> tuple[PushTWindows, PushTWindows | None]:
        """Training and validation windows of disjoint episodes; they share the data.

        Args:
            val_ratio: share of the episodes for validation, in [0, 1): at least one, not all; 0 gives None.
            seed: of ``numpy.random.default_rng``; the same ratio and seed give Diffusion Policy's choice.

        Raises:
            InvalidArgument: the ratio is out of range, or there is only one episode.
            DataError: a part has no episode that is long enough.
        """
        if not 0.0 <= val_ratio < 1.0:
            raise InvalidArgument(f"PushTWindows.split: val_ratio must be in [0, 1), got {val_ratio}")
        if val_ratio == 0.0:
            return self._view(self.episodes), None
        total = len(self.episodes)
        if total < 2:
            raise InvalidArgument(f"PushTWindows.split: val_ratio = {val_ratio} needs 2 or more episodes, got {total}")
        held = np.zeros(total, dtype=bool)
        count = min(max(1, round(total * val_ratio)), total - 1)
        held[np.random.default_rng(seed).choice(total, size=count, replace=False)] = True
        return self._view(self.episodes[~held]), self._view(self.episodes[held])

    def _view(self, episodes: np.ndarray) -> PushTWindows:
        view = copy.copy(self)
        view._set_episodes(episodes)
        return view

    def _bounds(self) -> list[tuple[int, int]]:
        starts, ends = self.data.episode_starts, self.data.episode_ends
        return [(int(starts[i]), int(ends[i])) for i in self.episodes]

    def _set_episodes(self, episodes: np.ndarray) -> None:
        total = self.data.n_episodes
        known = episodes.ndim == 1 and episodes.size > 0 and episodes.dtype.kind in "iu"
        if not known or episodes.min() < 0 or episodes.max() >= total or len(np.unique(episodes)) != len(episodes):
            raise InvalidArgument(
                f"PushTWindows: episodes must be distinct integers in [0, {total}), got {str(episodes.tolist())[:80]}"
            )
        self.episodes = episodes.astype(np.int64)
        place = np.arange(self.horizon)
        windows = [np.empty((0, self.horizon), np.int64)]
        for start, end in self._bounds():
            first = np.arange(1 - self.n_obs_steps, end - start - self.horizon + self.n_action_steps)
            windows.append(start + np.clip(first[:, None] + place, 0, end - start - 1))
        rows = np.concatenate(windows)
        if len(rows) == 0:
            longest = max(end - start for start, end in self._bounds())
            needed = self.horizon - self.n_obs_steps - self.n_action_steps + 2
            raise DataError(
                f"{self.data.source}: no window fits: the longest of {len(episodes)} episodes has {longest} "
                f"steps, horizon {self.horizon} needs {needed}"
            )
        self._rows = torch.from_numpy(rows).to(self._action.device)


def _observation_steps(data: PushTData, obs: str) -> dict[str, Tensor]:
    """Each observation at every step. {name: [N, ...]}"""
    if obs not in get_args(ObservationKind):
        raise InvalidArgument(f"PushTWindows: obs must be one of {', '.join(get_args(ObservationKind))}, got {obs!r}")
    agent = data.state[:, :2]
    if obs == "image":
        if data.image is None:
            raise InvalidArgument("PushTWindows: obs='image' needs frames; load them: load_pusht(source, images=True)")
        return {"image": torch.from_numpy(data.image), "agent_pos": torch.from_numpy(agent.copy())}
    if not data.has_block:
        raise DataError(f"{data.source}: has no block pose, which obs={obs!r} needs; use obs='image'")
    if obs == "state":
        return {"state": torch.from_numpy(data.state)}
    keypoint = data.keypoint
    if keypoint is None:
        from minidiff_fast.tasks.pusht.env import keypoints_from_state

        keypoint = keypoints_from_state(data.state)
    return {"keypoints": torch.from_numpy(np.concatenate([keypoint.reshape(-1, 18), agent], axis=1))}
