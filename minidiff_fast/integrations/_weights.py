"""Weights between a peer's module and ours of the same architecture: taken, tied, written back, and checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from minidiff_fast.errors import InvalidArgument

KeyMap = Callable[[str], str]
"""Our name of a weight or a module -> the peer's."""

AGREEMENT = 1e-4
"""Largest difference of the outputs, relative to the largest output, in float32 without TF32."""


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
    """Write our tensors into the peer's, in place and bit for bit; tied ones are there already.

    Where ours are sharded (FSDP2) they are gathered, in which every rank takes part.
    """
    mine, theirs = tensors(ours), tensors(peer)
    check_same_tensors(caller, mine, theirs, rename, dtypes=True)
    for name, tensor in mine.items():
        target = theirs[rename(name)]
        if target is not tensor:
            gather = getattr(tensor, "full_tensor", None)
            target.copy_(tensor if gather is None else gather())


def match_mode(ours: nn.Module, peer: nn.Module) -> None:
    """Training or eval mode as the network has it whose parameters ``ours`` uses: its own tree does not reach ours."""
    mode = unwrapped(peer).training
    if ours.training != mode:
        ours.train(mode)


def parameters(peer: nn.Module) -> dict[str, nn.Parameter]:
    """By name, themselves: what :func:`check_still_tied` compares with."""
    return dict(unwrapped(peer).named_parameters())


def check_still_tied(caller: str, where: str, tied: dict[str, nn.Parameter], peer: nn.Module) -> None:
    """The network has the very parameters that it had when they were tied; ``where`` names it in the policy.

    What became of ours does not count: FSDP2 replaces them on purpose, and ``to_peer`` writes them back.
    """
    now = parameters(peer)
    for name in sorted(tied.keys() | now.keys()):
        if now.get(name) is not tied.get(name):
            change = "is gone" if name not in now else "is new" if name not in tied else "is another tensor"
            raise InvalidArgument(
                f"{caller}: {where} must be as it was when the adapter was made, but its parameter {name} {change}: "
                "call level2(policy) again"
            )


def check_same_part(caller: str, where: str, policy: Any, mine: Any) -> None:
    """The policy still has, as ``where``, the module that the adapter runs."""
    found = getattr(policy, where.rpartition(".")[2], None)
    if found is not mine:
        raise InvalidArgument(
            f"{caller}: {where} must be as it was when the adapter was made, but it is another {type(found).__name__}: "
            "call level2(policy) again"
        )


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


@contextmanager
def full_float32() -> Iterator[None]:
    """Without TF32 and its like, which lose more than another forward may differ by."""
    backends: Any = torch.backends
    parts = [backends.cudnn.conv, backends.cuda.matmul, backends.mkldnn.conv, backends.mkldnn.matmul]
    before = [part.fp32_precision for part in parts]
    for part in parts:
        part.fp32_precision = "ieee"
    try:
        yield
    finally:
        for part, precision in zip(parts, before, strict=True):
            part.fp32_precision = precision


@torch.no_grad()
def check_same_outputs(
    caller: str,
    ours: nn.Module,
    peer: nn.Module,
    rename: KeyMap,
    head: str,
    sample: Tensor,
    timestep: Tensor,
    **conditions: Tensor,
) -> None:
    """Both give the same on made-up input: what the comparison of layers cannot see is in ``forward``.

    With the weights as they are, then with made-up ones in the last layer, our ``head``: a fresh one may be zero, or
    its bias large, and hide what comes before. ``sample`` has the dtype of :func:`made_up`; 16-bit weights are
    compared in float32.
    """
    state = {name: tensor.detach() for name, tensor in tensors(ours).items()}
    if sample.dtype == torch.float32:
        state = {name: x.float() if x.is_floating_point() else x for name, x in state.items()}
    weight, bias = state[f"{head}.weight"], state[f"{head}.bias"]
    probe = made_up(tuple(weight.shape), weight) / weight[0].numel() ** 0.5
    for head_weight, head_bias in ((weight, bias), (probe, torch.zeros_like(bias))):
        state |= {f"{head}.weight": head_weight, f"{head}.bias": head_bias}
        with evaluating(ours, peer), full_float32(), torch.autocast(sample.device.type, enabled=False):
            mine = functional_call(ours, state, (sample, timestep), conditions)
            theirs = functional_call(
                peer, {rename(name): x for name, x in state.items()}, (sample, timestep), conditions
            )
        _compare(caller, type(ours).__name__, mine, theirs)


def _compare(caller: str, kind: str, mine: Tensor, theirs: Tensor) -> None:
    if mine.shape != theirs.shape:
        raise InvalidArgument(f"{caller}: the peer's output must be {list(mine.shape)}, got {list(theirs.shape)}")
    if not theirs.isfinite().all():
        raise InvalidArgument(f"{caller}: the peer's output must be finite, got inf or nan on made-up input")
    difference = (mine - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)
    if not difference <= AGREEMENT:
        raise InvalidArgument(
            f"{caller}: with the same weights the peer's forward gives other numbers (relative difference "
            f"{float(difference):.1e}): left as is, because it is not the network that {kind} is"
        )


def made_up(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Numbers up to 4.5, most of them below 1, without touching the random generator; float64 where ``like`` is,
    else float32."""
    count = torch.Size(shape).numel()
    values = torch.arange(1, count + 1, dtype=torch.float64).mul(0.754877666).frac().sub(0.5).mul(2.0)
    return (values + 3.5 * values**3).view(shape).to(like.device, _dtype(like))


def made_up_times(count: int | None, like: Tensor) -> Tensor:  # [5]
    """From the first to the last of ``count`` training timesteps, 100 where it is not known.

    Of the dtype of :func:`made_up`, because lerobot hands the embedding on in the dtype that it comes in.
    """
    last = (count or 100) - 1
    return torch.tensor([0, min(1, last), min(3, last), last // 2, last], device=like.device, dtype=_dtype(like))


def _dtype(like: Tensor) -> torch.dtype:
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def _few(names: list[str]) -> str:
    return "nothing" if not names else ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
