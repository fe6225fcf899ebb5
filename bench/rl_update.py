"""``python bench/run.py rl-update [--device cpu|cuda] [--cases ...] [--k 5,10,20] [--budget 8m] [--out DIR]``.

One DPPO update of a minibatch: B decisions of K denoising steps each (K = D DDIM steps, all of them fine-tuned), the
clipped surrogate and the value loss, their gradients, AdamW (at learning rate 0: the weights stay those that were
verified). All sides have the same weights, stored chains and advantages, some steps on either side of the clip range:

flat     every (decision, denoising step) pair is a row of its own with its own copy of the observation, which is
         encoded per pair; the critic runs on those rows
peer     flat, and as in DPPO's code the frozen base network runs on every row, too, and is overwritten, as no step is
         frozen. (DPPO's critic of images has a third encoder; here all sides' critics read the actor's features.)
level2   one observation, one encode, one value a decision

Loss and gradients of all sides are compared before anything is timed. Then the variance of the gradient at equal
numbers of pairs, see rl_variance.py. Prints Markdown tables; writes DIR/rl_update.json with every repeat;
``--table FILE`` prints the tables of such a file.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from memory import peak_bytes, saved_bytes
from rl_tables import tables
from run import BadInput, device_name, environment, save, seconds_of
from timing import Clock
from torch import Tensor, nn

from minidiff_fast.finetuning.critic import SharedCritic, ValueHead
from minidiff_fast.finetuning.flat import flat_losses
from minidiff_fast.finetuning.learner import level2_losses
from minidiff_fast.nn.normalizer import MinMaxNormalizer
from minidiff_fast.objectives.dppo import DPPO
from minidiff_fast.objectives.policy_gradient import normalize_advantage
from minidiff_fast.policy import DiffusionPolicy
from minidiff_fast.tasks.pusht.policy import LOW_DIM_ENTRIES, PolicyConfig, build_policy, build_scheduler
from minidiff_fast.transitions import DDIMTransitions

NAME = "rl-update"
FILE = "rl_update.json"
TOLERANCE = 1e-5
"""Of the loss, and of every gradient relative to the largest entry of its network: float32 sums in another order."""
VALUE_WEIGHT = 0.5
STORED = 4
"""Minibatches that the stored decisions would make."""
PIXELS = 512.0
"""Width of Push-T's plane."""


@dataclass(frozen=True)
class Case:
    """A policy and its minibatch."""

    name: str
    policy: PolicyConfig
    B: int
    """Decisions of a minibatch on a CPU."""
    cuda_B: int
    """... on a GPU."""
    repeats: int


CASES = {
    case.name: case
    for case in (
        Case("image-mlp", PolicyConfig(obs="image", denoiser="mlp"), 4, 50, 4),
        Case("image-unet", PolicyConfig(obs="image", denoiser="unet"), 4, 50, 3),
        Case("state-mlp", PolicyConfig(obs="keypoints", denoiser="mlp"), 64, 500, 15),
    )
}


@dataclass(frozen=True)
class Update:
    """Networks, stored decisions and one minibatch of them."""

    policy: DiffusionPolicy
    base: DiffusionPolicy
    """Frozen; only the peer runs it."""
    critic: SharedCritic
    algorithm: DPPO
    optimizer: torch.optim.Optimizer
    obs: dict[str, Tensor]
    """name -> [N, To, ...], raw."""
    record: dict[str, Tensor]
    """chain [N, K + 1, T, A], log_prob [N, K]."""
    advantage: Tensor
    """[N]"""
    returns: Tensor
    """[N]"""
    decisions: Tensor
    """[B] int64: the minibatch."""

    @property
    def parameters(self) -> list[Tensor]:
        """The actor's and the critic's."""
        return [*self.policy.parameters(), *self.critic.parameters()]


def fresh_policy(config: PolicyConfig) -> DiffusionPolicy:
    """Random weights, normalisers of Push-T's plane, in eval mode (centre crops)."""
    entries = LOW_DIM_ENTRIES[config.obs]
    plane = torch.tensor([[0.0], [PIXELS]])
    return build_policy(
        config,
        {name: MinMaxNormalizer.fit(plane.expand(2, channels)) for name, channels in entries.items()},
        MinMaxNormalizer.fit(plane.expand(2, 2)),
    ).eval()


def draw_observations(config: PolicyConfig, count: int, device: torch.device) -> dict[str, Tensor]:
    """Random positions in pixels and random images."""
    lead = (count, config.n_obs_steps)
    obs = {name: PIXELS * torch.rand(*lead, c, device=device) for name, c in LOW_DIM_ENTRIES[config.obs].items()}
    if config.obs == "image":
        obs["image"] = torch.randint(256, (*lead, 96, 96, 3), dtype=torch.uint8, device=device)
    return obs


def prepare(case: Case, k: int, device: torch.device) -> Update:
    """Draw decisions with one policy, then move its weights a little, as updates before this one would have."""
    torch.manual_seed(0)
    config = case.policy
    policy = fresh_policy(config).to(device)
    base = copy.deepcopy(policy).requires_grad_(False)
    transitions = DDIMTransitions.from_scheduler(build_scheduler(config), k)
    algorithm = DPPO(transitions, (config.horizon, 2), act_steps=(1, 1 + config.n_action_steps))
    batch = case.cuda_B if device.type == "cuda" else case.B
    obs = draw_observations(config, STORED * batch, device)
    with torch.no_grad():
        features = policy.features(obs)
        record = algorithm.act(policy, policy.condition(features)).record
        for parameter in policy.parameters():
            parameter.mul_(1.0 + 0.1 * torch.randn_like(parameter))
    critic = SharedCritic(ValueHead(features.shape[1] * features.shape[2])).to(device)
    optimizer = torch.optim.AdamW([*policy.parameters(), *critic.parameters()], lr=0.0, fused=True)
    rows = STORED * batch
    return Update(
        policy, base, critic, algorithm, optimizer, obs, record,
        torch.randn(rows, device=device), torch.randn(rows, device=device), torch.randperm(rows, device=device)[:batch],
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------- sides


class Minibatch(NamedTuple):
    """Of B decisions."""

    obs: dict[str, Tensor]
    batch: dict[str, Tensor]
    """[B, K, ...] each."""
    rest: tuple[Tensor, Tensor, Tensor]
    """Advantages, returns, values at collection: [B] each."""


def minibatch(update: Update) -> Minibatch:
    """Gathered from the store."""
    rows = update.decisions
    returns = update.returns[rows]
    return Minibatch(
        {name: value[rows] for name, value in update.obs.items()},
        update.algorithm.minibatch({name: value[rows] for name, value in update.record.items()}),
        (normalize_advantage(update.advantage[rows]), returns, returns),
    )


def level2(update: Update) -> Tensor:
    """B rows of observations and values, [B, K] steps."""
    obs, batch, rest = minibatch(update)
    actor, value = level2_losses(update.policy, update.critic, update.algorithm, obs, batch, *rest)
    return actor.loss + VALUE_WEIGHT * value


def flat(update: Update, shadow: DiffusionPolicy | None = None) -> Tensor:
    """B * K rows of everything."""
    obs, batch, rest = minibatch(update)
    actor, value = flat_losses(update.policy, update.critic, update.algorithm, obs, batch, *rest, shadow=shadow)
    return actor.loss + VALUE_WEIGHT * value


def peer(update: Update) -> Tensor:
    """Flat, and the frozen base on all rows, whose predictions nothing keeps."""
    return flat(update, update.base)


Side = Callable[[Update], Tensor]
SIDES: dict[str, Side] = {"flat": flat, "peer": peer, "level2": level2}


# --------------------------------------------------------------------------------------------------- measures


def cleared(update: Update) -> None:
    for parameter in update.parameters:
        parameter.grad = None


def verify(update: Update) -> dict[str, float]:
    """Largest relative difference of loss and gradients from ``flat``; refuses above TOLERANCE."""
    found: dict[str, float] = {}
    wanted: list[Tensor] = []
    for name, side in SIDES.items():
        cleared(update)
        loss = side(update)
        loss.backward()
        networks = (update.policy, update.critic)
        parts = [loss.detach()]
        parts += [torch.cat([p.grad.flatten() for p in n.parameters() if p.grad is not None]) for n in networks]
        wanted = wanted or parts
        found[name] = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(parts, wanted, strict=True))
        if not found[name] <= TOLERANCE:
            raise SystemExit(f"bench/rl_update.py: {name} differs from flat by {found[name]:.1e}: nothing is timed")
    cleared(update)
    return found


def counts(update: Update, side: Side) -> dict[str, int]:
    """Observations that encoders see, images among them, and rows that denoisers see, by hooks on all networks."""
    seen = {"observations": 0, "images": 0, "denoiser_rows": 0}
    handles = []

    def encoded(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
        lead = next(iter(arguments[0].values())).shape
        seen["observations"] += lead[0]
        seen["images"] += lead[0] * lead[1] * ("image" in arguments[0])

    def counting(denoise: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(cache: Any, x: Tensor, t: Tensor) -> Tensor:
            seen["denoiser_rows"] += x.shape[0] * x.shape[1]
            return denoise(cache, x, t)

        return counted

    networks = (update.policy, update.base)
    for network in networks:
        handles.append(network.encoder.register_forward_pre_hook(encoded))
        network.denoiser.denoise = counting(network.denoiser.denoise)
    try:
        side(update)
    finally:
        for handle in handles:
            handle.remove()
        for network in networks:
            del network.denoiser.denoise
    return seen


def backward(update: Update, side: Side) -> None:
    side(update).backward()
    cleared(update)


def step(update: Update, side: Side) -> None:
    """What is timed."""
    side(update).backward()
    update.optimizer.step()
    update.optimizer.zero_grad(set_to_none=True)


def measure(case: Case, k: int, device: torch.device, repeats: int | None, seconds: float) -> dict[str, Any]:
    """Verify, count, then interleaved rounds, the order rotating; at least three."""
    started = time.perf_counter()
    update = prepare(case, k, device)
    errors = verify(update)
    with torch.no_grad():
        obs, batch, rest = minibatch(update)
        actor, _ = level2_losses(update.policy, update.critic, update.algorithm, obs, batch, *rest)
    own = (*update.parameters, *update.obs.values(), *update.record.values())
    sides = {
        name: {
            **counts(update, side),
            "saved_bytes": saved_bytes(partial(side, update), own),
            "peak_bytes": peak_bytes(partial(backward, update, side), device),
        }
        for name, side in SIDES.items()
    }
    clock, names = Clock(device), list(SIDES)
    times: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(-1, repeats or case.repeats):
        if round_ >= 3 and time.perf_counter() - started > seconds:
            break
        shift = round_ % len(names)
        for name in names[shift:] + names[:shift]:
            taken = clock(lambda s=SIDES[name]: step(update, s))  # type: ignore[misc]
            if round_ >= 0:
                times[name].append(taken)
    return {
        "case": asdict(case), "B": len(update.decisions), "K": k, "errors": errors,
        "clip_fraction": float(actor.stats["clip_fraction"]),
        "sides": {name: {**sides[name], "times_ms": times[name]} for name in names},
        "seconds": time.perf_counter() - started,
    }  # fmt: skip


def integers(text: str) -> list[int]:
    """
    >>> integers("5,10")
    [5, 10]
    """
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"denoising steps must be at least 1, got {text}")
    return numbers


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench/run.py rl-update")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", help=f"comma-separated, out of {', '.join(CASES)}, variance; default: all")
    parser.add_argument("--k", type=integers, default=[5, 10, 20], help="denoising steps a decision; default: 5,10,20")
    parser.add_argument("--repeats", type=int, help="timed rounds; default: 3 to 15, by case")
    parser.add_argument("--seconds", type=float, default=40.0, help="per cell, after three rounds; default: 40")
    parser.add_argument("--budget", default="8m", help="seconds, or with s, m, h; default: 8m")
    parser.add_argument("--out", type=Path, help=f"folder for {FILE}; default: nothing is written")
    parser.add_argument("--table", type=Path, help="print the tables of this file, measure nothing")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run; the exit code: 0, or 2 for bad input."""
    import rl_variance

    arguments = parse(argv)
    if arguments.table is not None:
        print(tables(json.loads(arguments.table.read_text(encoding="utf-8"))))
        return 0
    known = [*CASES, "variance"]
    # The slowest last: the budget may end before it.
    names = arguments.cases.split(",") if arguments.cases else sorted(known, key=lambda name: name == "image-unet")
    unknown = [name for name in names if name not in known]
    try:
        if unknown:
            raise BadInput(f"--cases: unknown {', '.join(unknown)}; there are: {', '.join(known)}")
        budget = seconds_of(arguments.budget)
    except BadInput as error:
        print(f"bench/run.py: {error}", file=sys.stderr)
        return 2
    device = torch.device(arguments.device)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    document: dict[str, Any] = {"suite": NAME, "schema": 1, **environment(device), "cells": {}, "variance": {}}
    print(f"{NAME} on {device_name(device)}, torch {torch.__version__}, {torch.get_num_threads()} thread(s)")
    started = time.perf_counter()
    jobs = [(name, k) for name in names for k in arguments.k]
    for done, (name, k) in enumerate(jobs):
        if time.perf_counter() - started > budget:
            print(f"stopped at the budget of {arguments.budget}: {len(jobs) - done} cells left", file=sys.stderr)
            break
        if name == "variance":
            document["variance"][str(k)] = rl_variance.estimate(k, device)
        else:
            document["cells"][f"{name}/K={k}"] = measure(CASES[name], k, device, arguments.repeats, arguments.seconds)
        gc.collect()
        if arguments.out is not None:
            arguments.out.mkdir(parents=True, exist_ok=True)
            save(arguments.out / FILE, document)
        print(f"[{done + 1}/{len(jobs)}] {name}, K = {k}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    print(tables(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
