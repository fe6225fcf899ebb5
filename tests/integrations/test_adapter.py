"""Level2Adapter on a small peer: the loss, its masks, chunks, and one encoder pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.integrations import Level2Adapter
from minidiff_fast.objectives import BetaTimes, DenoisingLoss, FlowMatching

B, K, T, A, C = 3, 4, 5, 2, 6


class Adapter(Level2Adapter):
    def __init__(self, padding: str = "valid") -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(C, 8), nn.Linear(8 + A + 1, A)
        self.padding = padding  # type: ignore[misc]
        self.objective = DenoisingLoss(FlowMatching(time_quantile=BetaTimes(1.5, start=0.001, stop=1.0)))
        self.encoded = 0

    def encode(self, obs: dict[str, Tensor]) -> Tensor:
        self.encoded += 1
        return self.encoder(obs["obs"])

    def denoise(self, cache: Any, x: Tensor, t: Tensor) -> Tensor:
        k = x.shape[1]
        shared = cache[:, None, None].expand(-1, k, T, -1)
        return self.head(torch.cat([shared, x, t[..., None, None].expand(-1, -1, T, 1) / 1000], -1))

    def actions(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["action"]

    def mask(self, batch: dict[str, Tensor]) -> Tensor | None:
        return batch.get("mask")


def batch(masked: bool = False) -> dict[str, Tensor]:
    made = {"obs": torch.randn(B, C), "action": torch.randn(B, T, A)}
    if masked:
        made["mask"] = torch.arange(T)[None] < torch.tensor([5, 2, 0])[:, None]
    return made


def elementwise(adapter: Adapter, drawn: Any, noised: Any) -> Tensor:  # [B, K, T, A]
    return (adapter.denoise(adapter.encode(drawn.obs), noised.x, noised.t) - noised.target).square()


@pytest.mark.parametrize("padding", ["valid", "all"])
def test_masked_losses_are_those_of_peers(padding: str) -> None:
    adapter, inputs = Adapter(padding), batch(masked=True)
    drawn = adapter.draw(inputs, K, generator=torch.Generator().manual_seed(1))
    process = adapter.objective.process
    flat = elementwise(adapter, drawn, drawn.noised_by(process)) * inputs["mask"][:, None, :, None]
    wanted = flat.sum() / (inputs["mask"].sum() * A * K) if padding == "valid" else flat.mean()
    torch.testing.assert_close(adapter.loss(inputs, K, generator=torch.Generator().manual_seed(1)), wanted)


def test_nothing_counts() -> None:
    inputs = batch(masked=True)
    inputs["mask"][:] = False
    assert Adapter().loss(inputs, K).item() == 0.0


def test_chunked_steps_encode_once_and_give_the_same_gradient() -> None:
    adapter, inputs = Adapter(), batch(masked=True)
    adapter.loss(inputs, K, generator=torch.Generator().manual_seed(2)).backward()
    wanted = [p.grad for p in adapter.parameters()]
    adapter.zero_grad()
    adapter.encoded = 0
    adapter.step(inputs, K, chunk=3, generator=torch.Generator().manual_seed(2))
    assert adapter.encoded == 1
    for p, gradient in zip(adapter.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, gradient)


def test_times_follow_the_quantile_function() -> None:
    process = FlowMatching(time_quantile=BetaTimes(1.5, start=0.001, stop=1.0), timestep_scale=1.0)
    drawn = process.draw(torch.randn(50, T, A), 64, seed=torch.tensor([3]), timesteps="stratified")
    times = drawn.timesteps
    below = [(times <= 0.001 + 0.999 * p ** (1 / 1.5)).float().mean().item() for p in (0.25, 0.5, 0.75)]
    assert below == pytest.approx([0.25, 0.5, 0.75], abs=0.01)
    assert drawn.noised is not None
    wanted = (1 - times)[..., None, None] * drawn.actions[:, None] + times[..., None, None] * drawn.noise
    torch.testing.assert_close(drawn.noised.x, wanted)


def test_beta_without_closed_form() -> None:
    with pytest.raises(InvalidArgument, match=r"one of them 1.*alpha = 2.0, beta = 3.0"):
        BetaTimes(2.0, 3.0)
    torch.testing.assert_close(BetaTimes(1.0, 2.0)(torch.tensor([0.75])), torch.tensor([0.5]))


def test_masks_are_checked() -> None:
    inputs = batch(masked=True)
    with pytest.raises(InvalidArgument, match=r"mask must be \[B, T\] = \[3, 5\]"):
        Adapter().loss({**inputs, "mask": inputs["mask"][:, 1:]}, K)
    with pytest.raises(InvalidArgument, match="must be boolean"):
        Adapter().loss({**inputs, "mask": inputs["mask"].float()}, K)


def test_the_loss_of_a_replicated_adapter_is_exchanged(tmp_path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        adapter, exchanged = Adapter(), []

        def hook(state, bucket):
            exchanged.append(bucket.index())
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        wrapped = nn.parallel.DistributedDataParallel(adapter, find_unused_parameters=False)
        wrapped.register_comm_hook(None, hook)
        seeds = [torch.Generator().manual_seed(1) for _ in range(2)]
        inputs = batch()
        adapter.loss(inputs, K, generator=seeds[0], wrapped=wrapped).backward()
        assert exchanged
        gradients = [p.grad.clone() for p in adapter.parameters()]
        adapter.zero_grad()
        adapter.step(inputs, K, generator=seeds[1], wrapped=wrapped, chunk=2)
        for p, gradient in zip(adapter.parameters(), gradients, strict=True):
            torch.testing.assert_close(p.grad, gradient)
        for call in (adapter.loss, adapter.step):
            with pytest.raises(InvalidArgument, match="wrapped must be this adapter inside .* got a wrapped Linear"):
                call(inputs, K, wrapped=nn.parallel.DistributedDataParallel(nn.Linear(2, 2)))
    finally:
        torch.distributed.destroy_process_group()
