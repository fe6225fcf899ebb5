"""Two processes give the losses and gradients of one: DDP and FSDP2, by themselves and through Accelerate."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.level2 import Level2Batch, level2_step
from minidiff_fast.objectives import DenoisingLoss, FlowMatching
from minidiff_fast.parallel import prepare_fsdp

K = 6


def ddp(policy: nn.Module) -> nn.Module:
    return DistributedDataParallel(policy)


def ddp_unused(policy: nn.Module) -> nn.Module:
    return DistributedDataParallel(policy, find_unused_parameters=True)


def fsdp(policy: nn.Module) -> nn.Module:
    fully_shard(policy)
    return policy


def fsdp_parts(policy: nn.Module) -> nn.Module:
    """A unit for each part, and everything made to come and go."""
    fully_shard(policy.encoder, reshard_after_forward=True)
    fully_shard(policy.denoiser, reshard_after_forward=True)
    fully_shard(policy, reshard_after_forward=True)
    return policy


def fsdp_without_root(policy: nn.Module) -> nn.Module:
    fully_shard(policy.encoder)
    fully_shard(policy.denoiser)
    return policy


def fsdp_compiled(policy: nn.Module) -> Any:
    fully_shard(policy)
    return torch.compile(policy, backend="eager")


def ddp_compiled(policy: nn.Module) -> Any:
    return DistributedDataParallel(torch.compile(policy, backend="eager"))


def accelerate_ddp(policy: nn.Module) -> Any:
    return accelerator().prepare(policy)


def accelerate_fsdp(policy: nn.Module) -> nn.Module:
    """What ``Accelerator.prepare`` calls on a GPU: on a CPU it knows DDP alone."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
    prepared: nn.Module = fsdp2_prepare_model(
        SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no", is_main_process=False), policy
    )
    assert isinstance(prepared, FSDPModule)
    return prepared


def accelerator(**options: Any) -> Any:
    import accelerate

    accelerate.state.AcceleratorState._reset_state()
    accelerate.state.GradientState._reset_state()
    return accelerate.Accelerator(cpu=True, **options)


WRAPPERS: list[Callable[..., Any]] = [
    ddp, ddp_unused, fsdp, fsdp_parts, fsdp_without_root, accelerate_ddp, accelerate_fsdp,
]  # fmt: skip
COMPILED: list[Callable[..., Any]] = [ddp_compiled, fsdp_compiled]


def shard(batch: Level2Batch, rank: int) -> Level2Batch:
    """The conditions of this rank."""
    half = batch.actions.shape[0] // 2
    mine = slice(rank * half, (rank + 1) * half)
    return Level2Batch(
        {name: value[mine] for name, value in batch.obs.items()}, batch.actions[mine], batch.timesteps[mine],
        batch.noise[mine],
    )  # fmt: skip


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def gradients(policy: nn.Module) -> dict[str, list[float]]:
    found = {}
    for name, parameter in policy.named_parameters():
        name = name.replace("module.", "").replace("_orig_mod.", "")
        found[name] = None if parameter.grad is None else whole(parameter.grad).tolist()
    return found


# -------------------------------------------------------------------- what the workers run


def one_step(case: Any, objective: Any, rank: int, wrap: Callable[..., Any], chunk: int) -> Any:
    policy = wrap(case.build())
    result = level2_step(policy, objective, shard(case.batch(k=K), rank), chunk=chunk)
    return result.per_sample.tolist(), gradients(policy)


def two_steps_of_training(case: Any, objective: Any, rank: int, wrap: Callable[..., Any]) -> Any:
    policy = wrap(case.build())
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1, momentum=0.9)
    for seed in (1, 2):
        optimizer.zero_grad()
        level2_step(policy, objective, shard(case.batch(k=K, seed=seed), rank), chunk=2)
        optimizer.step()
    return [], {name: whole(p.detach()).tolist() for name, p in policy.named_parameters()}


def accumulated(case: Any, objective: Any, rank: int, wrap: Callable[..., Any]) -> Any:
    """The second of two steps exchanges the gradients of both; the caller's switch is as it was afterwards."""
    policy = wrap(case.build())
    for seed in (1, 2):
        last = seed == 2
        if isinstance(policy, FSDPModule):
            policy.set_requires_gradient_sync(last)
        with nullcontext() if last or isinstance(policy, FSDPModule) else policy.no_sync():
            level2_step(policy, objective, shard(case.batch(k=K, seed=seed), rank), chunk=4)
    return [], gradients(policy)


def accumulated_with_accelerate(case: Any, objective: Any, rank: int, wrap: Any) -> Any:
    """What ``accelerator.backward`` does to a loss, as ``loss_scale``."""
    made = accelerator(gradient_accumulation_steps=2)
    policy, optimizer = made.prepare(case.build(), torch.optim.SGD(case.build().parameters(), lr=0.0))
    counted = []
    for seed in (1, 2):
        with made.accumulate(policy):
            level2_step(
                policy, objective, shard(case.batch(k=K, seed=seed), rank), chunk=4,
                loss_scale=lambda loss: loss / made.gradient_accumulation_steps,
            )  # fmt: skip
            counted.append(made.sync_gradients)
    assert counted == [False, True]
    return [], gradients(policy)


def encodes_and_samples_after_sharding(case: Any, objective: Any, rank: int, wrap: Any) -> Any:
    policy = prepare_fsdp(prepare_fsdp(wrap(case.build())))
    with torch.no_grad():
        batch = case.batch(k=K)
        out = policy.denoise(policy.encode(batch.obs), batch.noise, batch.timesteps)
    return out.tolist(), {}


def mixed_precision(case: Any, objective: Any, rank: int, wrap: Any) -> Any:
    policy, mixed = case.build(), MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for part in (policy.encoder, policy.denoiser, policy) if wrap is fsdp_parts else (policy,):
        fully_shard(part, mp_policy=mixed)
    result = level2_step(policy, objective, shard(case.batch(k=K), rank), chunk=2)
    return result.per_sample.tolist(), gradients(policy)


def rounded_times(case: Any, objective: Any, rank: int, wrap: Any) -> Any:
    """Continuous times: refused where they would be rounded, and the advice in the message works."""
    flow, batch = DenoisingLoss(FlowMatching()), shard(case.batch(k=K), rank)
    drawn = Level2Batch.draw(batch.obs, batch.actions, K, flow)
    policy = case.build()
    fully_shard(policy, mp_policy=MixedPrecisionPolicy(torch.bfloat16))
    with pytest.raises(InvalidArgument, match="round the times of the samples to torch.bfloat16"):
        level2_step(policy, flow, drawn)
    policy = case.build()
    fully_shard(policy, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False))
    with torch.autocast("cpu", torch.bfloat16):
        result = level2_step(policy, flow, drawn, chunk=4)
    plain = level2_step(case.build(), flow, drawn)
    torch.testing.assert_close(result.loss, plain.loss, rtol=0.02, atol=0.02)
    return [], {}


def parts_that_cannot_be_units(case: Any, objective: Any, rank: int, wrap: Any) -> Any:
    policy = case.build()
    fully_shard(policy.denoiser.decoder.layers[0])
    fully_shard(policy)
    with pytest.raises(InvalidArgument, match=r"none of them may be sharded alone, got denoiser.decoder.layers.0"):
        level2_step(policy, objective, shard(case.batch(k=K), rank))
    return [], {}


def fsdp1_is_refused(case: Any, objective: Any, rank: int, wrap: Any) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel

    old = FullyShardedDataParallel(case.build(), device_id=torch.device("cpu"), use_orig_params=True)
    with pytest.raises(InvalidArgument, match="FSDP1.*use FSDP2, torch.distributed.fsdp.fully_shard"):
        level2_step(old, objective, shard(case.batch(k=K), rank))
    return [], {}


# -------------------------------------------------------------------- two processes


@dataclass
class Job:
    run: Callable[..., Any]
    case: Any
    arguments: tuple[Any, ...] = ()

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.run.__name__, self.case.name, *(getattr(a, "__name__", a) for a in self.arguments))


def jobs_of(cases: list[Any]) -> list[Job]:
    jobs = [Job(one_step, case, (wrap, chunk)) for case in cases for wrap in WRAPPERS for chunk in (2, K)]
    by_name = {case.name: case for case in cases}
    first = by_name["transformer"]
    jobs += [Job(one_step, by_name["mlp"], (wrap, 2)) for wrap in COMPILED]
    for wrap in (ddp, fsdp, fsdp_parts):
        jobs += [Job(two_steps_of_training, case, (wrap,)) for case in cases if wrap is not fsdp]
        jobs += [Job(accumulated, case, (wrap,)) for case in cases]
    jobs += [Job(accumulated_with_accelerate, case, (None,)) for case in cases]
    jobs += [Job(encodes_and_samples_after_sharding, case, (wrap,)) for case in cases for wrap in (fsdp, fsdp_parts)]
    jobs += [Job(mixed_precision, case, (wrap,)) for case in cases for wrap in (fsdp, fsdp_parts)]
    alone = (rounded_times, parts_that_cannot_be_units, fsdp1_is_refused)
    return jobs + [Job(run, first, (None,)) for run in alone]


def worker(rank: int, port: int, jobs: list[Job], objective: Any, results: Any) -> None:
    names = ("RANK", "LOCAL_RANK")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", MINIDIFF_FAST_IMPL="reference")
    os.environ.update(dict.fromkeys(names, str(rank)))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=30))
    for job in jobs:
        torch._dynamo.reset()
        try:
            result = job.run(job.case, objective, rank, *job.arguments)
        except BaseException:  # the other process waits for this one in vain: end here, and say why
            results.put((job.key, rank, f"{job.key} on rank {rank}: {traceback.format_exc()}"))
            return
        results.put((job.key, rank, result))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def got(cases: list[Any], objective: Any) -> dict[Any, dict[int, Any]]:
    """The results of every job on both ranks; one pair of processes runs them all."""
    jobs = jobs_of(cases)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [context.Process(target=worker, args=(rank, port, jobs, objective, results)) for rank in range(2)]
    for each in workers:
        each.start()
    found: dict[Any, dict[int, Any]] = {}
    try:
        for _ in range(2 * len(jobs)):
            key, rank, result = results.get(timeout=60)
            assert not isinstance(result, str), result
            found.setdefault(key, {})[rank] = result
        for each in workers:
            each.join(timeout=30)
            assert each.exitcode == 0
    finally:
        for each in workers:
            each.kill()
    return found


def results_of(got: dict[Any, dict[int, Any]], *key: Any) -> list[Any]:
    """Of both ranks."""
    ranks = got[tuple(getattr(part, "__name__", part) for part in key)]
    return [ranks[0], ranks[1]]


def close(found: dict[str, Any], wanted: dict[str, Any], **tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if value is None:
            assert found[name] is None, name
            continue
        options = {"rtol": 1e-4, "atol": 1e-6, **tolerance}
        torch.testing.assert_close(
            torch.tensor(found[name]), torch.tensor(value), **options, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIDIFF_FAST_IMPL", "reference")


@pytest.mark.parametrize("chunk", [2, K])
@pytest.mark.parametrize("wrap", WRAPPERS, ids=lambda wrap: wrap.__name__)
def test_two_processes_equal_one(got, case, wrap, chunk, objective, reference):
    single = case.build()
    wanted = level2_step(single, objective, case.batch(k=K))
    for rank, (losses, found) in enumerate(results_of(got, one_step, case.name, wrap, chunk)):
        torch.testing.assert_close(torch.tensor(losses), wanted.per_sample[2 * rank : 2 * rank + 2])
        close(found, gradients(single))


@pytest.mark.parametrize("wrap", COMPILED, ids=lambda wrap: wrap.__name__)
def test_compiled_too(got, cases, wrap, objective, reference):
    case = next(case for case in cases if case.name == "mlp")
    test_two_processes_equal_one(got, case, wrap, 2, objective, None)


@pytest.mark.parametrize("wrap", [ddp, fsdp_parts], ids=lambda wrap: wrap.__name__)
def test_training_equals_one_process(got, case, wrap, objective, reference):
    single = case.build()
    optimizer = torch.optim.SGD(single.parameters(), lr=0.1, momentum=0.9)
    for seed in (1, 2):
        optimizer.zero_grad()
        level2_step(single, objective, case.batch(k=K, seed=seed))
        optimizer.step()
    wanted = {name: p.tolist() for name, p in single.named_parameters()}
    for _, found in results_of(got, two_steps_of_training, case.name, wrap):
        close({name.removeprefix("module."): value for name, value in found.items()}, wanted)


@pytest.mark.parametrize("wrap", [ddp, fsdp, fsdp_parts], ids=lambda wrap: wrap.__name__)
def test_gradients_accumulate_over_steps(got, case, wrap, objective, reference):
    single = case.build()
    for seed in (1, 2):
        level2_step(single, objective, case.batch(k=K, seed=seed))
    for _, found in results_of(got, accumulated, case.name, wrap):
        close(found, gradients(single))


def test_accelerate_accumulates(got, case, objective, reference):
    single = case.build()
    for seed in (1, 2):
        level2_step(single, objective, case.batch(k=K, seed=seed), loss_scale=lambda loss: loss / 2)
    for _, found in results_of(got, accumulated_with_accelerate, case.name, None):
        close(found, gradients(single))


@pytest.mark.parametrize("wrap", [fsdp, fsdp_parts], ids=lambda wrap: wrap.__name__)
def test_sharded_policies_encode_and_denoise(got, case, wrap, reference):
    policy, batch = case.build(), case.batch(k=K)
    wanted = policy.denoise(policy.encode(batch.obs), batch.noise, batch.timesteps)
    for out, _ in results_of(got, encodes_and_samples_after_sharding, case.name, wrap):
        torch.testing.assert_close(torch.tensor(out), wanted)


@pytest.mark.parametrize("wrap", [fsdp, fsdp_parts], ids=lambda wrap: wrap.__name__)
def test_mixed_precision_of_fsdp(got, case, wrap, objective, reference):
    single = case.build()
    level2_step(single, objective, case.batch(k=K))
    norm = sum(p.grad.norm() ** 2 for p in single.parameters() if p.grad is not None) ** 0.5
    for _, found in results_of(got, mixed_precision, case.name, wrap):
        for name, parameter in single.named_parameters():
            if parameter.grad is not None:
                assert (torch.tensor(found[name]) - parameter.grad).norm() < 0.05 * norm, name


@pytest.mark.parametrize(
    "job", [rounded_times, parts_that_cannot_be_units, fsdp1_is_refused], ids=lambda job: job.__name__
)
def test_what_cannot_work_says_so(got, job):
    results_of(got, job, "transformer", None)


def test_preparing_what_is_not_sharded(case):
    with pytest.raises(InvalidArgument, match="must hold modules that fully_shard has sharded, got none"):
        prepare_fsdp(case.build())
