"""Push-T demonstrations by the look-ahead expert, made in parallel worker processes."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from minidiff_fast.errors import InvalidArgument, RunFolderError, require
from minidiff_fast.tasks.pusht.env import BLOCK_CENTER, SUCCESS_COVERAGE, PushTEnv
from minidiff_fast.tasks.pusht.expert import Expert

EMBEDDED = Path(__file__).with_name("demonstrations.npz")
"""The demonstrations that are part of the package."""


@dataclass(frozen=True)
class DemoEpisode:
    """One episode of the expert."""

    seed: int
    """Seed of ``PushTEnv.reset``."""
    disturbed: bool
    """Whether random pushes moved the block first; the episode then starts from ``set_state(state[0])``."""
    state: NDArray[np.float32]
    """Observation before each action: agent x, y, block x, y (pixels), block angle (radians). [T, 5]"""
    action: NDArray[np.float32]
    """Target position of the agent, pixels. [T, 2]"""
    coverage: float
    """Largest share of the goal covered in the episode."""

    @property
    def solved(self) -> bool:
        """Whether coverage went over 0.95, which ended the episode."""
        return self.coverage > SUCCESS_COVERAGE


@dataclass(frozen=True)
class DemoReport:
    """What ``generate_demos`` wrote."""

    path: Path
    """The file."""
    episodes: int
    """Episodes written; all are solved."""
    attempted: int
    """Episodes run: seeds ``seed`` to ``seed + attempted - 1``."""
    solved: int
    """Attempted episodes that the expert solved."""
    steps: int
    """Rows written."""


def run_episode(seed: int, max_steps: int = 300, disturbed: bool = False) -> DemoEpisode:
    """The expert on one start, until it is solved or ``max_steps`` environment steps are over.

    A policy's mistakes lead where the expert never goes by itself: the block at a wall, the agent in its way.
    ``disturbed`` episodes start there, so that the demonstrations show the way back (the idea of DART, Laskey
    et al., 2017, without its noise in the recorded actions). They replay from ``set_state(state[0])``, the
    others from ``reset(seed=seed)``.
    """
    env = PushTEnv(render_mode=None)
    expert = Expert()
    observation, info = env.reset(seed=seed)
    if disturbed:
        _disturb(env, np.random.default_rng([seed, 1]))
        observation = env.set_state(env.get_obs().astype(np.float32))  # as it will be stored
        info = {"coverage": env.coverage()}
    states, actions, coverage = [], [], float(info["coverage"])
    for _ in range(max_steps):
        try:
            action = expert.act(env)
        except InvalidArgument:  # no contact point can be reached: an unsolved episode, not the end of the others
            break
        states.append(observation)
        actions.append(action)
        observation, _, done, _, info = env.step(action)
        coverage = max(coverage, float(info["coverage"]))
        if done:
            break
    return DemoEpisode(
        seed=seed,
        disturbed=disturbed,
        state=np.array(states, dtype=np.float32).reshape(-1, 5),
        action=np.array(actions, dtype=np.float32).reshape(-1, 2),
        coverage=coverage,
    )


def _disturb(env: PushTEnv, rng: np.random.Generator) -> None:
    """One to three straight runs of the agent through the block."""
    for _ in range(int(rng.integers(1, 4))):
        x, y = env.agent.position
        center = env.block.local_to_world(BLOCK_CENTER)
        goal = np.array((center.x, center.y)) + rng.normal(0.0, 30.0, 2)
        along = goal - (x, y)
        distance = float(np.hypot(*along))
        along /= max(distance, 1.0)
        end = np.clip((x, y) + along * (distance + rng.uniform(0.0, 120.0)), 20.0, 492.0)
        for _ in range(60):
            agent = np.array(env.agent.position)
            rest = end - agent
            left = float(np.hypot(*rest))
            if left < 8.0:
                break
            env.advance(*(agent + rest * min(1.0, 28.0 / left)).tolist())


def generate_demos(
    episodes: int,
    seed: int = 0,
    out: str | os.PathLike[str] = "pusht_demos.npz",
    workers: int = 1,
    progress: bool = True,
    *,
    disturbed: int = 0,
    max_steps: int = 300,
    overwrite: bool = False,
) -> DemoReport:
    """Write solved episodes of the expert as a compressed .npz file.

    Seeds are tried in order from ``seed`` on, first for ``episodes`` episodes from the environment's own
    starts, then for ``disturbed`` ones, and unsolved episodes are left out: the file depends on those three
    numbers and ``max_steps``, not on the number of workers. Arrays: ``state`` [N, 5] float32 (before the
    action of its row), ``action`` [N, 2] float32 (pixels), ``episode_ends`` [E] int64 (exclusive),
    ``coverage`` [E] float32, ``seed`` [E] int64, ``disturbed`` [E] bool, ``attempted`` int64, ``command``.

    Args:
        episodes: solved episodes to write, >= 1.
        seed: first seed; evaluation uses 100000 and up.
        out: the file, with the suffix .npz.
        workers: processes; 1 works in this one.
        progress: show a progress bar (needs tqdm).
        disturbed: further episodes, from disturbed starts (see :func:`run_episode`).
        max_steps: environment steps an episode may take.
        overwrite: replace an existing file.

    Raises:
        InvalidArgument: an argument is out of range.
        RunFolderError: ``out`` exists and ``overwrite`` is False, its folder is missing, or fewer than
            half of the starts were solved.
    """
    for name, value in (("episodes", episodes), ("workers", workers), ("max_steps", max_steps)):
        if value < 1:
            raise InvalidArgument(f"generate_demos: {name} must be >= 1, got {value}")
    for name, value in (("seed", seed), ("disturbed", disturbed)):
        if value < 0:
            raise InvalidArgument(f"generate_demos: {name} must be >= 0, got {value}")
    path = Path(out)
    if path.suffix != ".npz":
        raise InvalidArgument(f"generate_demos: out must end in .npz, got {path}")
    if path.exists() and not overwrite:
        raise RunFolderError(f"generate_demos: {path} exists; choose another out or pass overwrite=True")
    if not path.parent.is_dir():
        raise RunFolderError(f"generate_demos: the folder {path.parent} of out does not exist")

    total = episodes + disturbed
    bar = require("tqdm", extra="train").tqdm(total=total, desc="demos", unit="ep") if progress else None
    kept: list[DemoEpisode] = []
    attempted = 0
    for wanted, flag in ((episodes, False), (total, True)):
        for episode in _episodes(seed + attempted, wanted - len(kept), workers, max_steps, flag):
            attempted += 1
            if episode.solved:
                kept.append(episode)
            if bar is not None:
                bar.update(int(episode.solved))
                bar.set_postfix(solved=f"{len(kept)}/{attempted}", refresh=False)
            if len(kept) == wanted:
                break
        if len(kept) < wanted:
            break
    if bar is not None:
        bar.close()
    if len(kept) < total:
        raise RunFolderError(
            f"generate_demos: {len(kept)} of {attempted} starts solved within {max_steps} steps, "
            f"{total} wanted; allow more max_steps. Nothing was written"
        )
    command = f"generate_demos(episodes={episodes}, seed={seed}, disturbed={disturbed}, max_steps={max_steps})"
    _write(path, kept, attempted, command, overwrite)
    return DemoReport(path, len(kept), attempted, len(kept), sum(len(episode.state) for episode in kept))


def _run(task: tuple[int, int, bool]) -> DemoEpisode:
    return run_episode(*task)


def _episodes(seed: int, wanted: int, workers: int, max_steps: int, disturbed: bool) -> Iterator[DemoEpisode]:
    """Episodes in the order of their seeds, twice as many as are wanted and two more."""
    if wanted == 0:
        return
    count = 2 * wanted + 2
    if workers == 1:
        for index in range(count):
            yield run_episode(seed + index, max_steps, disturbed)
        return
    # spawn: a forked copy of a process with running threads (torch, a progress bar) can hang
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        window = min(4 * workers, wanted)  # what is begun ahead is in vain once enough are solved
        futures = [pool.submit(_run, (seed + index, max_steps, disturbed)) for index in range(window)]
        try:
            for index in range(count):
                if index == len(futures):  # the last one begun was not solved, and nothing is under way
                    futures.append(pool.submit(_run, (seed + index, max_steps, disturbed)))
                episode = futures[index].result()
                yield episode
                following = len(futures)
                if following < wanted or (not episode.solved and following < count):
                    futures.append(pool.submit(_run, (seed + following, max_steps, disturbed)))
        finally:
            for future in futures:
                future.cancel()


def _write(path: Path, episodes: list[DemoEpisode], attempted: int, command: str, overwrite: bool) -> None:
    arrays = {
        "state": np.concatenate([episode.state for episode in episodes]),
        "action": np.concatenate([episode.action for episode in episodes]),
        "episode_ends": np.cumsum([len(episode.state) for episode in episodes]).astype(np.int64),
        "coverage": np.array([episode.coverage for episode in episodes], dtype=np.float32),
        "seed": np.array([episode.seed for episode in episodes], dtype=np.int64),
        "disturbed": np.array([episode.disturbed for episode in episodes], dtype=bool),
        "attempted": np.int64(attempted),
        "command": np.str_(command),
    }
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez_compressed(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp makes files that only their owner can read
        if path.exists() and not overwrite:
            raise RunFolderError(f"generate_demos: {path} appeared meanwhile and was left as it is")
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
