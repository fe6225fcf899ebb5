"""Checkpoints: folders that are complete or not there.

A run folder holds ``checkpoints/step_00001000/`` with

* ``model.safetensors``  the weights, normalisers included,
* ``ema.safetensors``    the averaged weights under the same names: what acts,
* ``config.json``        format, version of the library, step, the policy's and the run's configuration,
* ``state.pt``           optimiser, averaging, data order, random generators: what resuming needs,

and the files ``checkpoints/last`` and ``checkpoints/best`` with a folder's name in each. A checkpoint is
written under a temporary name, synchronised to disk and moved; then ``last`` is replaced. Nothing is
unpickled: ``state.pt`` is read with ``weights_only=True``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from minidiff_fast._version import __version__
from minidiff_fast.errors import CheckpointError, RunFolderError, require
from minidiff_fast.tasks.pusht.policy import LOW_DIM_ENTRIES, FrozenStart, InvalidOption, PolicyConfig, build_policy

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from minidiff_fast.policy import DiffusionPolicy

FORMAT = 1
"""Of the folder; raised when an older library could not read it."""
FOLDER = "checkpoints"
MODEL, EMA, CONFIG, STATE = "model.safetensors", "ema.safetensors", "config.json", "state.pt"
FILES = (MODEL, EMA, CONFIG, STATE)
_NAME = re.compile(r"step_\d{8,}")


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says about itself."""

    path: Path
    """Its folder."""
    step: int
    """Optimiser steps."""
    task: str
    """``pusht``."""
    policy: PolicyConfig
    """The policy's shapes."""
    train: dict[str, Any]
    """The run's options."""


class CheckpointStore:
    """The checkpoints of one run folder.

    Args:
        run: the run folder.
        keep: how many of the latest to keep; the best is kept, too.
    """

    def __init__(self, run: Path, keep: int = 2) -> None:
        self.root, self.keep = run / FOLDER, keep

    def save(
        self,
        step: int,
        *,
        policy: PolicyConfig,
        train: Mapping[str, Any],
        model: Mapping[str, Tensor],
        ema: Mapping[str, Tensor],
        state: Mapping[str, Any],
        best: bool = False,
    ) -> Path:
        """Write a checkpoint, point ``last`` (and ``best``) to it, remove what need not be kept.

        Raises :class:`RunFolderError` if it cannot be written; earlier checkpoints are then as they were.
        """
        import torch

        save_file = require("safetensors.torch", extra="train").save_file
        name = self.path(step).name
        temporary = self.root / f".{name}.{os.getpid()}.tmp"
        config = {
            "format": FORMAT, "library": __version__, "task": "pusht", "step": step,
            "policy": asdict(policy), "train": dict(train),
        }  # fmt: skip
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            save_file(_for_file(model), temporary / MODEL)
            save_file(_for_file(ema), temporary / EMA)
            (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            torch.save(dict(state), temporary / STATE)
            for file in FILES:
                _sync(temporary / file)
            self._move(temporary, self.root / name)
            _sync(self.root)
            if best:
                self._point("best", name)
            self._point("last", name)
            self._prune()
        except (OSError, RuntimeError, require("safetensors", extra="train").SafetensorError) as error:
            # A full disk comes as any of these, depending on which library meets it.
            shutil.rmtree(temporary, ignore_errors=True)
            why = getattr(error, "strerror", None) or error
            raise RunFolderError(f"{self.root / name}: the checkpoint cannot be written ({why})") from error
        return self.root / name

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self.root / f"step_{step:08d}"

    def _move(self, temporary: Path, target: Path) -> None:
        # A checkpoint of this step can be there when a run died before `last` named it and was resumed from
        # before.
        stale = self.root / f".{target.name}.{os.getpid()}.stale"
        if target.exists():
            os.replace(target, stale)
        try:
            os.replace(temporary, target)
        except OSError:
            if stale.exists():
                os.replace(stale, target)
            raise
        shutil.rmtree(stale, ignore_errors=True)

    def _point(self, pointer: str, name: str) -> None:
        temporary = self.root / f".{pointer}.{os.getpid()}.tmp"
        temporary.write_text(name + "\n", encoding="utf-8")
        _sync(temporary)
        os.replace(temporary, self.root / pointer)

    def _prune(self) -> None:
        names = sorted(path.name for path in self.root.iterdir() if _NAME.fullmatch(path.name))
        pointed = {_read_pointer(self.root / pointer) for pointer in ("last", "best")}
        for name in names[: -self.keep]:
            if name not in pointed:
                shutil.rmtree(self.root / name)
        for left in self.root.glob(".step_*.tmp"):
            shutil.rmtree(left, ignore_errors=True)


def find_checkpoint(path: str | Path, which: Literal["last", "best"] = "last") -> Path:
    """The checkpoint folder that ``path`` means: itself, or the last (or best) of a run folder.

    Raises:
        CheckpointError: there is none, or files of it are missing.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"{path}: no such folder; a run folder or a checkpoint folder is expected")
    if _NAME.fullmatch(folder.name) is None and not (folder / CONFIG).is_file():
        root = folder if folder.name == FOLDER else folder / FOLDER
        name = _read_pointer(root / which)
        if name is None:
            kind = "best checkpoint, which evaluations choose" if which == "best" else "checkpoint"
            raise CheckpointError(f"{path}: holds no {kind} ({root / which} is not there)")
        if not _NAME.fullmatch(name):
            raise CheckpointError(
                f"{root / which}: must hold the name of a checkpoint such as step_00001000, got {name[:40]!r}"
            )
        folder = root / name
    missing = [file for file in FILES if not (folder / file).is_file()]
    if missing:
        raise CheckpointError(f"{folder}: the checkpoint is incomplete, {', '.join(missing)} missing")
    return folder


def read_info(checkpoint: Path) -> CheckpointInfo:
    """The configuration of a checkpoint. Raises :class:`CheckpointError` if it cannot be used here."""
    path = checkpoint / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    keys = {"format", "library", "task", "step", "policy", "train"}
    if not isinstance(values, dict) or not keys <= set(values):
        raise CheckpointError(f"{path}: is not the configuration of a checkpoint; it must hold {sorted(keys)}")
    if values["format"] != FORMAT:
        raise CheckpointError(
            f"{path}: has format {values['format']}, written by minidiff_fast {values['library']}; this is "
            f"minidiff_fast {__version__}, which reads format {FORMAT}"
        )
    if values["task"] != "pusht":
        raise CheckpointError(f"{path}: is a policy for {values['task']!r}, expected 'pusht'")
    try:
        policy = PolicyConfig.from_dict(values["policy"])
    except (InvalidOption, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return CheckpointInfo(checkpoint, int(values["step"]), values["task"], policy, values["train"])


def load_policy(
    path: str | Path,
    *,
    which: Literal["last", "best"] = "last",
    weights: Literal["ema", "model"] = "ema",
    device: torch.device | str = "cpu",
) -> tuple[DiffusionPolicy, CheckpointInfo]:
    """The policy of a checkpoint, in eval mode.

    Args:
        path: a checkpoint folder or a run folder.
        which: of a run folder.
        weights: the averaged weights, or those of the last step.
        device: where to put it.

    Raises:
        CheckpointError: missing, half written, damaged, or of another architecture.
    """
    import torch

    from minidiff_fast.nn.normalizer import MinMaxNormalizer

    checkpoint = find_checkpoint(path, which)
    info = read_info(checkpoint)

    def unfitted(channels: int) -> MinMaxNormalizer:
        return MinMaxNormalizer(torch.zeros(channels), torch.ones(channels))

    state = torch.get_rng_state()  # building draws weights that are then replaced: leave no trace of it
    obs = {name: unfitted(channels) for name, channels in LOW_DIM_ENTRIES[info.policy.obs].items()}
    policy = build_policy(info.policy, obs, unfitted(2))
    torch.set_rng_state(state)
    load_weights(policy, checkpoint / (EMA if weights == "ema" else MODEL))
    return policy.to(device).eval(), info


def fine_tuned_steps(info: CheckpointInfo) -> int | None:
    """K where fine-tuning has trained the last K denoising steps alone; None where all of them or none."""
    steps = info.train.get("fine_tuned_steps")
    return None if steps is None or steps == info.policy.num_inference_steps else int(steps)


def load_frozen(info: CheckpointInfo, *, device: torch.device | str = "cpu") -> FrozenStart | None:
    """What runs the first denoising steps of a fine-tuned policy, in eval mode; None where it runs all of them itself.

    Raises :class:`CheckpointError` if its weights are not in the checkpoint.
    """
    steps = fine_tuned_steps(info)
    if steps is None:
        return None
    policy, _ = load_policy(info.path)  # for its shapes
    state = load_state(info.path)
    try:
        policy.load_state_dict(state["finetuner"]["base"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"{info.path / STATE}: holds no weights of the first denoising steps ({first_line(error)})"
        ) from error
    return FrozenStart(policy.to(device).eval(), steps)


def load_weights(module: nn.Module, path: Path) -> None:
    """Fill ``module`` from a safetensors file with exactly its names and shapes.

    Raises:
        CheckpointError: the file is damaged, or a name or shape differs; ``module`` is then as it was.
    """
    safetensors = require("safetensors.torch", extra="train")
    try:
        tensors = safetensors.load_file(str(path))
    except Exception as error:  # safetensors raises its own class and, for short files, others
        raise CheckpointError(f"{path}: cannot be read, half written or damaged ({first_line(error)})") from error
    problem = _difference(module.state_dict(), tensors)
    if problem:
        raise CheckpointError(f"{path}: belongs to another architecture: {problem}")
    module.load_state_dict(tensors, strict=True)


def load_state(checkpoint: Path) -> dict[str, Any]:
    """What resuming needs. Raises :class:`CheckpointError` if it cannot be read."""
    import torch

    path = checkpoint / STATE
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no class for a damaged file
        raise CheckpointError(f"{path}: cannot be read, half written or damaged ({first_line(error)})") from error
    return state


def first_line(error: BaseException) -> str:
    """What an exception says, in one line; its class where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _difference(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str | None:
    for name, tensor in wanted.items():
        if name not in found:
            return f"{name} {list(tensor.shape)} is missing"
        if found[name].shape != tensor.shape:
            return f"{name} must be {list(tensor.shape)}, got {list(found[name].shape)}"
    extra = sorted(set(found) - set(wanted))
    return f"{extra[0]} {list(found[extra[0]].shape)} is not part of this policy" if extra else None


def _for_file(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _read_pointer(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
