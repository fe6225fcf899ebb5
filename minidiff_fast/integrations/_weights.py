"""Weights between a peer's module and ours of the same architecture: taken, tied, written back, and checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from minidiff_fast.errors import InvalidArgument

KeyMap = Callable[[str], str]
"""Our name of a weight or a module -> the peer's."""

AGREEMENT = 0.02
"""Largest difference of the outputs, relative to the largest output: above what TF32 and float16 lose."""


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``."""
    inner: nn.Module = getattr(module, "_orig_mod", module)
    return inner


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, themselves and not copies."""
    state: dict[str, Tensor] = module.state_dict(keep_vars=True)
    return state


def attribute(caller: str, module: Any, name: str, peer: str) -> Any:
    """``module.name`` (dotted), or :class:`InvalidArgument` that says what the peer has there."""
    found = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise InvalidArgument(f"{caller}: expected {peer}, with attribute {name}, got {type(module).__name__}")
        found = getattr(found, part)
    return found


def check_same_tensors(
    caller: str, ours: dict[str, Tensor], theirs: dict[str, Tensor], rename: KeyMap, dtypes: bool = False
) -> None:
    """The same names, shapes and, where asked for, dtypes on both sides."""
    renamed = {rename(name): tensor for name, tensor in ours.items()}
    missing, more = sorted(renamed.keys() - theirs.keys()), sorted(theirs.keys() - renamed.keys())
    if missing or more:
        raise InvalidArgument(
            f"{caller}: the peer's weights must have our names; it lacks {_few(missing)} and has {_few(more)} besides"
        )
    for name, tensor in renamed.items():
        if tensor.shape != theirs[name].shape:
            raise InvalidArgument(
                f"{caller}: {name} must be {list(tensor.shape)}, as its neighbours say, got {list(theirs[name].shape)}"
            )
        if dtypes and tensor.dtype != theirs[name].dtype:
            raise InvalidArgument(
                f"{caller}: {name} must have the peer's dtype, {theirs[name].dtype}, to stay bit for bit, "
                f"got {tensor.dtype}"
            )


def take(ours: nn.Module, peer: nn.Module, rename: KeyMap, *, tie: bool) -> None:
    """Give ``ours`` (made on the meta device) copies of the peer's tensors, or the very same ones."""
    theirs = tensors(peer)
    for name in tensors(ours):
        value = theirs[rename(name)]
        owner, _, leaf = name.rpartition(".")
        if not tie:
            copied = value.detach().clone()
            value = nn.Parameter(copied, value.requires_grad) if isinstance(value, nn.Parameter) else copied
        setattr(ours.get_submodule(owner), leaf, value)
    ours.train(peer.training)


@torch.no_grad()
def give(caller: str, ours: nn.Module, peer: nn.Module, rename: KeyMap) -> None:
    """Write our tensors into the peer's, in place and bit for bit; tied ones are there already."""
    mine, theirs = tensors(ours), tensors(peer)
    check_same_tensors(caller, mine, theirs, rename, dtypes=True)
    for name, tensor in mine.items():
        target = theirs[rename(name)]
        if target is not tensor:
            target.copy_(tensor)


def check_same_layers(
    caller: str, ours: nn.Module, peer: nn.Module, rename: KeyMap, attributes: dict[str, str]
) -> None:
    """Every layer of ours has one of its class and settings in the peer.

    ``attributes`` has the settings to compare by class name, separated by blanks.
    """
    for name, layer in ours.named_modules():
        kind = type(layer).__name__
        if kind not in attributes:
            continue
        try:
            theirs = peer.get_submodule(rename(name))
        except AttributeError:
            raise InvalidArgument(f"{caller}: the peer must have a {kind} as {rename(name)}, it has nothing") from None
        if type(theirs).__name__ != kind:
            raise InvalidArgument(f"{caller}: {rename(name)} must be {kind}, got {type(theirs).__name__}")
        for setting in attributes[kind].split():
            wanted, found = getattr(layer, setting), getattr(theirs, setting)
            if wanted != found:
                raise InvalidArgument(f"{caller}: {rename(name)} must have {setting} = {wanted}, got {found}")


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """All submodules in eval mode; afterwards each is in the mode that it was in."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    for part, _ in modes:
        part.training = False
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@torch.no_grad()
def check_same_outputs(
    caller: str, ours: nn.Module, peer: nn.Module, sample: Tensor, timestep: Tensor, **conditions: Tensor
) -> None:
    """Both give the same on one made-up input: what the comparison of layers cannot see is in ``forward``."""
    # Under autocast, the peers' float32 embedding of the timestep passes into 16-bit layers.
    half = sample.dtype in (torch.float16, torch.bfloat16)
    with evaluating(ours, peer), torch.autocast(sample.device.type, sample.dtype if half else None, enabled=half):
        mine, theirs = (model(sample, timestep, **conditions) for model in (ours, peer))
    if mine.shape != theirs.shape:
        raise InvalidArgument(f"{caller}: the peer's output must be {list(mine.shape)}, got {list(theirs.shape)}")
    difference = (mine - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)
    if difference > AGREEMENT:
        raise InvalidArgument(
            f"{caller}: with the same weights the peer's forward gives other numbers (relative difference "
            f"{float(difference):.1e}): left as is, because it is not the network that {type(ours).__name__} is"
        )


def made_up(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Numbers of the size of normal ones, without touching the random generator."""
    count = torch.Size(shape).numel()
    values = torch.arange(1, count + 1, dtype=torch.float64).mul(0.754877666).frac().sub(0.5).mul(3.0)
    return values.view(shape).to(like.device, like.dtype)


def _few(names: list[str]) -> str:
    return "nothing" if not names else ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
