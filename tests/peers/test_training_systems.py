"""lerobot's policies under DDP, FSDP2 and activation checkpointing: the gradients of one process."""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from minidiff_fast.integrations.lerobot import level2

B, K = 2, 4
SEEDS = (3, 4)


@pytest.fixture(autouse=True)
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIDIFF_FAST_IMPL", "reference")


@pytest.fixture(scope="module")
def tiny() -> Iterator[Any]:
    path = Path(__file__).resolve().parents[2] / "bench" / "tiny_vla.py"
    spec = importlib.util.spec_from_file_location("tiny_vla", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tiny_vla"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["tiny_vla"]


def diffusion(lerobot: Any) -> Any:
    modeling, types = lerobot("policies.diffusion.modeling_diffusion"), lerobot("configs.types")
    kind, feature = types.FeatureType, types.PolicyFeature
    config = lerobot("policies.diffusion.configuration_diffusion").DiffusionConfig(
        input_features={
            "observation.state": feature(type=kind.STATE, shape=(3,)),
            "observation.environment_state": feature(type=kind.ENV, shape=(4,)),
        },
        output_features={"action": feature(type=kind.ACTION, shape=(2,))}, device="cpu", n_obs_steps=2, horizon=8,
        n_action_steps=4, down_dims=(16, 32), diffusion_step_embed_dim=16,
    )  # fmt: skip
    return modeling.DiffusionPolicy(config)


@pytest.fixture(params=["diffusion", "smolvla", "pi0"])
def made(request: pytest.FixtureRequest, lerobot: Any, tiny: Any) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """The adapter of a policy, and the batches of two processes."""
    torch.manual_seed(0)
    if request.param == "diffusion":
        policy = diffusion(lerobot)
        shapes = {"observation.state": (2, 3), "observation.environment_state": (2, 4), "action": (8, 2)}
        batches = [{name: torch.randn(B, *shape) for name, shape in shapes.items()} for _ in SEEDS]
        for batch in batches:
            batch["action_is_pad"] = torch.zeros(B, 8, dtype=torch.bool)
    else:
        policy = getattr(tiny, request.param)(lerobot)
        batches = [tiny.batch(conditions=B, seed=seed) for seed in SEEDS]
    return level2(policy.eval()), batches


def gradients(adapter: nn.Module) -> dict[str, Tensor]:
    named = {name: p.grad for name, p in adapter.named_parameters() if p.grad is not None}
    return {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in named.items()}


def both_ranks(adapter: Any, batches: list[Any]) -> dict[str, Tensor]:
    """What data parallelism averages."""
    adapter.zero_grad()
    for batch, seed in zip(batches, SEEDS, strict=True):
        generator = torch.Generator().manual_seed(seed)
        adapter.step(batch, K, generator=generator, loss_scale=lambda loss: loss / len(SEEDS))
    found = {name: x.clone() for name, x in gradients(adapter).items()}
    adapter.zero_grad()
    return found


def worker(rank: int, port: int, adapter: Any, batch: Any, kind: str, results: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    try:
        wrapped = DistributedDataParallel(adapter, find_unused_parameters=True) if kind == "ddp" else None
        if kind == "fsdp":
            fully_shard(adapter)
        generator = torch.Generator().manual_seed(SEEDS[rank])
        adapter.step(batch, K, chunk=3, wrapped=wrapped, generator=generator)
        found = {name: x.tolist() for name, x in gradients(adapter).items()}
        results.put((rank, found if rank == 0 else {}))
        torch.distributed.barrier()
    except Exception:
        results.put((rank, traceback.format_exc()))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes(made: Any, kind: str) -> None:
    adapter, batches = made
    wanted = both_ranks(adapter, batches)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [
        context.Process(target=worker, args=(rank, port, adapter, batches[rank], kind, results)) for rank in range(2)
    ]
    for each in workers:
        each.start()
    try:
        got = dict(results.get(timeout=90) for _ in workers)
    finally:
        for each in workers:
            each.join(timeout=10)
            each.kill()
    for found in got.values():
        assert not isinstance(found, str), found
    assert got[0].keys() >= wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(
            torch.tensor(got[0][name]).reshape(gradient.shape),
            gradient,
            rtol=1e-3,
            atol=1e-5,
            msg=lambda m, n=name: f"{n}: {m}",
        )


class Checkpointed(nn.Module):
    """The adapter with denoise computed twice."""

    def __init__(self, adapter: Any) -> None:
        super().__init__()
        self.adapter = adapter

    def encode(self, obs: Any) -> Any:
        return self.adapter.encode(obs)

    def denoise(self, cache: Any, x: Tensor, t: Tensor) -> Any:
        return checkpoint(self.adapter.denoise, cache, x, t, use_reentrant=False)


def test_checkpointed(made: Any) -> None:
    adapter, batches = made
    wanted = both_ranks(adapter, batches)
    for batch, seed in zip(batches, SEEDS, strict=True):
        generator = torch.Generator().manual_seed(seed)
        adapter.step(
            batch, K, chunk=2, wrapped=Checkpointed(adapter), generator=generator,
            loss_scale=lambda loss: loss / len(SEEDS),
        )  # fmt: skip
    torch.testing.assert_close(gradients(adapter), wanted, rtol=1e-3, atol=1e-5)
