"""The Level-2 step: one encode, chunks that change nothing, one synchronisation under DDP."""

from __future__ import annotations

import dataclasses
import os
import socket

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.level2 import Level2Batch, level2_step
from minidiff_fast.objectives import DenoisingLoss, DiffusionProcess


class TinyPolicy(nn.Module):
    """An encoder with a nested cache and a denoiser that reads all of it."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = nn.Linear(5, 6, dtype=dtype)
        self.denoiser = nn.Linear(2 + 6 + 1, 2, dtype=dtype)
        self.encodes = 0

    def encode(self, obs: dict[str, Tensor]) -> dict[str, object]:
        self.encodes += 1
        features = torch.tanh(self.encoder(obs["state"]))
        return {"features": features, "parts": (features.square(), obs["state"])}

    def denoise(self, cache, x: Tensor, t: Tensor) -> Tensor:
        B, K, T, _ = x.shape
        condition = cache["features"] + 0.1 * cache["parts"][0]
        rows = condition[:, None, None].expand(B, K, T, 6)
        time = (t[:, :, None, None] / 10.0).to(x.dtype).expand(B, K, T, 1)
        return self.denoiser(torch.cat([x, rows, time], -1))

    forward = denoise


PROCESS = DiffusionProcess(torch.linspace(0.99, 0.01, 10))
OBJECTIVE = DenoisingLoss(PROCESS)


def batch_of(B: int = 3, K: int = 6, *, weight: bool = False, mask: bool = False, seed: int = 1) -> Level2Batch:
    generator = torch.Generator().manual_seed(seed)
    obs = {"state": torch.randn(B, 5, generator=generator, dtype=torch.float64)}
    actions = torch.randn(B, 4, 2, generator=generator, dtype=torch.float64)
    return Level2Batch.draw(
        obs, actions, K, OBJECTIVE, generator=generator,
        weight=torch.rand(B, K, generator=generator) if weight else None,
        mask=torch.rand(B, 4, generator=generator) > 0.3 if mask else None,
    )  # fmt: skip


def gradients(policy: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in policy.parameters()]


@pytest.mark.parametrize("chunk", [1, 2, 4, 5, 6, 99])
@pytest.mark.parametrize("extras", [{}, {"weight": True, "mask": True}], ids=str)
def test_chunked_equals_unchunked(chunk, extras):
    batch = batch_of(**extras)
    whole, parts = TinyPolicy(), TinyPolicy()
    expected = level2_step(whole, OBJECTIVE, batch)
    result = level2_step(parts, OBJECTIVE, batch, chunk=chunk)
    assert parts.encodes == 1
    torch.testing.assert_close(result.loss, expected.loss)
    torch.testing.assert_close(result.per_sample, expected.per_sample)
    for a, b in zip(gradients(parts), gradients(whole), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)  # the loss is float32


def test_equals_repeating_every_condition():
    """K samples of B conditions give the gradient of a plain batch of B * K repeated conditions."""
    batch = batch_of()
    level2, flat = TinyPolicy(), TinyPolicy()
    level2_step(level2, OBJECTIVE, batch, chunk=2)
    B, K = batch.timesteps.shape
    repeated = Level2Batch(
        {"state": batch.obs["state"].repeat_interleave(K, 0)},
        batch.actions.repeat_interleave(K, 0),
        batch.timesteps.reshape(B * K, 1),
        batch.noise.flatten(0, 1)[:, None],
    )
    level2_step(flat, OBJECTIVE, repeated)
    for a, b in zip(gradients(level2), gradients(flat), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_gradients_are_added():
    batch, policy = batch_of(), TinyPolicy()
    level2_step(policy, OBJECTIVE, batch, chunk=2)
    once = gradients(policy)
    level2_step(policy, OBJECTIVE, batch, chunk=2)
    for a, b in zip(gradients(policy), once, strict=True):
        torch.testing.assert_close(a, 2 * b)


def test_loss_scale_scales_every_gradient():
    batch, plain, scaled = batch_of(), TinyPolicy(), TinyPolicy()
    level2_step(plain, OBJECTIVE, batch, chunk=4)
    result = level2_step(scaled, OBJECTIVE, batch, chunk=4, loss_scale=lambda loss: 8 * loss)
    torch.testing.assert_close(result.loss, level2_step(TinyPolicy(), OBJECTIVE, batch).loss)
    for a, b in zip(gradients(scaled), gradients(plain), strict=True):
        torch.testing.assert_close(a, 8 * b)


def _float32_batch(K: int) -> Level2Batch:
    drawn = batch_of(B=2, K=K)
    obs = {"state": drawn.obs["state"].float()}
    return Level2Batch(obs, drawn.actions.float(), drawn.timesteps, drawn.noise.float())


def test_sixteen_bit_caches_gather_in_float32():
    """Under autocast the cache is bfloat16; 64 chunks must not cost the condition's gradient its precision."""

    def gradient(chunk: int | None) -> Tensor:
        policy = TinyPolicy(dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            level2_step(policy, OBJECTIVE, _float32_batch(64), chunk=chunk)
        return policy.encoder.weight.grad

    whole = gradient(None)
    for chunk in (1, 8):
        assert (gradient(chunk) - whole).norm() <= 0.01 * whole.norm()


def test_backward_runs_outside_autocast():
    seen = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            seen.append(torch.is_autocast_enabled("cpu"))
            return gradient

    policy = TinyPolicy(dtype=torch.float32)
    inner = policy.denoise
    policy.denoise = lambda cache, x, t: Probe.apply(inner(cache, x, t))  # type: ignore[method-assign]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        level2_step(policy, OBJECTIVE, _float32_batch(6), chunk=3)
    assert seen == [False, False]


def test_a_compiled_policy_runs_compiled():
    frames = CompileCounter()
    plain, inner = TinyPolicy(), TinyPolicy()
    torch._dynamo.reset()
    level2_step(torch.compile(inner, backend=frames), OBJECTIVE, batch_of(), chunk=3)
    assert frames.frame_count >= 1 and inner.encodes == 1
    level2_step(plain, OBJECTIVE, batch_of(), chunk=3)
    for a, b in zip(gradients(inner), gradients(plain), strict=True):
        torch.testing.assert_close(a, b)


def test_frozen_encoder_and_cache_without_gradient():
    batch, policy, whole = batch_of(), TinyPolicy(), TinyPolicy()
    for p in [*policy.encoder.parameters(), *whole.encoder.parameters()]:
        p.requires_grad_(False)
    level2_step(policy, OBJECTIVE, batch, chunk=2)
    level2_step(whole, OBJECTIVE, batch)
    assert policy.encoder.weight.grad is None
    torch.testing.assert_close(policy.denoiser.weight.grad, whole.denoiser.weight.grad, rtol=1e-6, atol=1e-9)


def test_memory_is_that_of_one_chunk():
    """What autograd holds at once does not grow with K when the chunk is fixed."""

    def peak(K: int, chunk: int) -> int:
        held: dict[int, int] = {}
        most = 0

        class Handle:
            def __init__(self, x: Tensor) -> None:
                nonlocal most
                self.x, self.size = x, x.untyped_storage().nbytes()
                held[id(self)] = self.size
                most = max(most, sum(held.values()))

            def __del__(self) -> None:
                held.pop(id(self), None)

        with torch.autograd.graph.saved_tensors_hooks(Handle, lambda handle: handle.x):
            level2_step(TinyPolicy(), OBJECTIVE, batch_of(B=2, K=K), chunk=chunk)
        return most

    assert peak(64, 4) <= 1.1 * peak(8, 4)
    assert peak(64, 64) > 4 * peak(64, 4)


def test_draw_is_a_function_of_the_generator():
    first, second = batch_of(seed=3), batch_of(seed=3)
    assert torch.equal(first.timesteps, second.timesteps) and torch.equal(first.noise, second.noise)
    assert not torch.equal(first.noise, batch_of(seed=4).noise)
    assert first.timesteps.shape == (3, 6) and first.noise.shape == (3, 6, 4, 2)
    assert first.samples == 6


@pytest.mark.parametrize("options", [{}, {"timesteps": "stratified", "noise": "antithetic"}], ids=str)
def test_a_drawn_batch_is_noised_already(options):
    actions = torch.randn(2, 4, 3)
    process = DiffusionProcess(torch.linspace(0.99, 0.01, 10), "v_prediction")
    generator = torch.Generator().manual_seed(5)
    batch = Level2Batch.draw(None, actions, 6, DenoisingLoss(process), generator=generator, **options)
    assert torch.equal(generator.get_state(), _after_one_seed(5))
    for part in (batch, batch.chunk(2, 6), batch.chunk(2, 6).chunk(1, 2)):
        made = part.noised_by(process)
        again = process.noised(part.actions, part.noise, part.timesteps)
        assert made is not None and all(torch.equal(a, b) for a, b in zip(made, again, strict=True))
    assert batch.noised_by(DiffusionProcess(process.alphas_cumprod, "v_prediction")) is None
    other = dataclasses.replace(batch, noise=torch.zeros_like(batch.noise))
    assert other.noised_by(process) is None and other.chunk(0, 2).noised_by(process) is None
    assert dataclasses.replace(batch, actions=actions + 1).noised_by(process) is None
    if options:
        assert torch.equal(batch.noise[:, 0::2], -batch.noise[:, 1::2])
        assert (batch.timesteps.sort(1).values == batch.timesteps).all()
    with pytest.raises(InvalidArgument, match="timesteps must be one of iid, stratified, got 'even'"):
        Level2Batch.draw(None, actions, 6, OBJECTIVE, timesteps="even")  # type: ignore[arg-type]


def _after_one_seed(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    torch.randint(0, 2**62, (1,), generator=generator)
    return generator.get_state()


def test_drawn_samples_of_a_condition_differ():
    batch = batch_of(B=50, K=8)
    assert (batch.timesteps.float().std(dim=1) > 0).all()
    assert batch.timesteps.min() == 0 and batch.timesteps.max() == PROCESS.num_train_timesteps - 1
    flat = batch.noise.flatten(0, 1).flatten(1)
    assert len({tuple(row.tolist()) for row in flat}) == 400


def test_bad_input():
    batch = batch_of()
    with pytest.raises(InvalidArgument, match="K, the samples per condition, must be an int >= 1, got 0"):
        batch_of(K=0)
    with pytest.raises(InvalidArgument, match="chunk must be an int, at least 1 sample per condition, got 0"):
        level2_step(TinyPolicy(), OBJECTIVE, batch, chunk=0)
    with pytest.raises(InvalidArgument, match=r"noise must be \[B, K, T, A\] = \[3, 6, 4, 2\], got \[3, 5, 4, 2\]"):
        Level2Batch(batch.obs, batch.actions, batch.timesteps, batch.noise[:, :5])
    with pytest.raises(InvalidArgument, match=r"timesteps must be \[B, K\] = \[3, K\], got \[2, 6\]"):
        Level2Batch(batch.obs, batch.actions, batch.timesteps[:2], batch.noise)
    with pytest.raises(InvalidArgument, match=r"weight must be \[B, K\] = \[3, 6\], got \[3\]"):
        Level2Batch(batch.obs, batch.actions, batch.timesteps, batch.noise, weight=torch.ones(3))
    with pytest.raises(InvalidArgument, match=r"actions must be \[B, T, A\], got \[3, 8\]"):
        Level2Batch.draw(batch.obs, batch.actions.flatten(1), 2, OBJECTIVE)
    with pytest.raises(InvalidArgument, match="mask must be boolean .True = counts., got torch.float32"):
        Level2Batch(batch.obs, batch.actions, batch.timesteps, batch.noise, mask=torch.ones(3, 4))
    with pytest.raises(InvalidArgument, match="noise must be on the device of actions, cpu, got meta"):
        Level2Batch(batch.obs, batch.actions, batch.timesteps, batch.noise.to("meta"))
    with pytest.raises(InvalidArgument, match="call it with gradients enabled"), torch.no_grad():
        level2_step(TinyPolicy(), OBJECTIVE, batch)
    wrong = TinyPolicy()
    wrong.encode = lambda obs: obs["state"][:2]  # type: ignore[method-assign]
    with pytest.raises(InvalidArgument, match=r"leading dimension B = 3, got a tensor of shape \[2, 5\]"):
        level2_step(wrong, OBJECTIVE, batch)
    wrong.encode = lambda obs: None  # type: ignore[method-assign]
    with pytest.raises(InvalidArgument, match="got no tensor"):
        level2_step(wrong, OBJECTIVE, batch)
    assert all(p.grad is None for p in wrong.parameters())


def _ddp_worker(rank: int, port: int, results) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    whole = batch_of(B=4)
    mine = slice(2 * rank, 2 * rank + 2)
    batch = Level2Batch(
        {"state": whole.obs["state"][mine]}, whole.actions[mine], whole.timesteps[mine], whole.noise[mine]
    )
    wrapped = DistributedDataParallel(TinyPolicy())
    reductions = 0

    def count(state, bucket):
        nonlocal reductions
        reductions += 1
        return allreduce_hook(state, bucket)

    wrapped.register_comm_hook(None, count)
    for _ in range(2):
        wrapped.zero_grad()
        level2_step(wrapped, OBJECTIVE, batch, chunk=2)
    results.put((rank, reductions, [g.tolist() for g in gradients(wrapped.module)]))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_ddp_equals_one_process_and_reduces_once_a_step():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [context.Process(target=_ddp_worker, args=(rank, port, results)) for rank in range(2)]
    for worker in workers:
        worker.start()
    got = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    single = TinyPolicy()
    level2_step(single, OBJECTIVE, batch_of(B=4))
    for _, reductions, theirs in got:
        assert reductions == 2  # one bucket, two steps of three chunks
        for a, b in zip(theirs, gradients(single), strict=True):
            torch.testing.assert_close(torch.tensor(a, dtype=torch.float64), b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("k", [2.5, True])
def test_k_is_a_number_of_samples(k):
    with pytest.raises(InvalidArgument, match=r"K, the samples per condition, must be an int >= 1"):
        Level2Batch.draw({}, torch.zeros(2, 3, 1), k, OBJECTIVE)


def test_a_module_that_is_no_policy():
    batch = Level2Batch.draw({}, torch.zeros(2, 3, 1), 2, OBJECTIVE)
    with pytest.raises(InvalidArgument, match=r"got a Linear without encode and denoise"):
        level2_step(torch.nn.Linear(2, 2), OBJECTIVE, batch)
    with pytest.raises(InvalidArgument, match=r"chunk must be an int"):
        level2_step(torch.nn.Linear(2, 2), OBJECTIVE, batch, chunk=2.0)
