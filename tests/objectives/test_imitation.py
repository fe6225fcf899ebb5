"""Noising, targets and losses against diffusers' schedulers and against the formulas."""

from __future__ import annotations

import pytest
import torch

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.level2 import Level2Batch
from minidiff_fast.objectives import DenoisingLoss, DiffusionProcess, FlowMatching, il_loss

diffusers = pytest.importorskip("diffusers")

B, K, T, A = 3, 5, 4, 2


def drawn(process, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randn(B, T, A, generator=generator)
    t = process.draw_timesteps((B, K), device=torch.device("cpu"), generator=generator)
    return x0, torch.randn(B, K, T, A, generator=generator), t


@pytest.mark.parametrize("schedule", ["squaredcos_cap_v2", "linear", "scaled_linear"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_diffusion_is_that_of_diffusers(schedule, prediction):
    scheduler = diffusers.DDPMScheduler(100, beta_schedule=schedule, prediction_type=prediction)
    process = DiffusionProcess.from_scheduler(scheduler)
    x0, noise, t = drawn(process)
    noised = process.noised(x0, noise, t)
    rows, eps, times = x0.repeat_interleave(K, 0), noise.flatten(0, 1), t.flatten()
    torch.testing.assert_close(noised.x.flatten(0, 1), scheduler.add_noise(rows, eps, times))
    target = {"epsilon": eps, "sample": rows, "v_prediction": scheduler.get_velocity(rows, eps, times)}[prediction]
    torch.testing.assert_close(noised.target.flatten(0, 1), target)
    assert torch.equal(noised.t, t)


def test_a_perfect_prediction_brings_the_sampler_back():
    """Predicting the target exactly, one deterministic DDIM step to t = 0 returns x0 (with alpha-bar 1 at the end)."""
    for prediction in ("epsilon", "sample", "v_prediction"):
        scheduler = diffusers.DDIMScheduler(
            100,
            beta_schedule="squaredcos_cap_v2",
            prediction_type=prediction,
            clip_sample=False,
            set_alpha_to_one=True,
        )
        process = DiffusionProcess.from_scheduler(scheduler)
        x0, noise, _ = drawn(process)
        t = torch.full((B, K), 60)
        noised = process.noised(x0, noise, t)
        scheduler.set_timesteps(1)
        scheduler.num_inference_steps = 1  # a step of 100: the previous timestep is below 0, alpha-bar is 1
        back = scheduler.step(noised.target, 60, noised.x).prev_sample
        torch.testing.assert_close(back, x0[:, None].expand_as(back), rtol=1e-4, atol=1e-4)


def test_flow_matching_is_that_of_diffusers():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(1000)
    process = FlowMatching()
    x0, noise, _ = drawn(process)
    steps = scheduler.timesteps[torch.arange(B * K) * 37].view(B, K)
    noised = process.noised(x0, noise, steps / 1000)
    scaled = scheduler.scale_noise(x0.repeat_interleave(K, 0), steps.flatten(), noise.flatten(0, 1))
    torch.testing.assert_close(noised.x.flatten(0, 1), scaled)
    torch.testing.assert_close(noised.t, steps)
    torch.testing.assert_close(
        noised.x - (steps / 1000)[:, :, None, None] * noised.target, x0[:, None].expand_as(noise)
    )


def test_the_two_time_conventions_are_mirror_images():
    x0, noise, t = drawn(FlowMatching())
    one, zero = (
        FlowMatching(noise_at=1).noised(x0, noise, t),
        FlowMatching(noise_at=0).noised(x0, noise, 1 - t),
    )
    torch.testing.assert_close(one.x, zero.x)
    torch.testing.assert_close(one.target, -zero.target)


@pytest.mark.parametrize(
    "process",
    [
        *(DiffusionProcess(torch.linspace(0.99, 0.0, 10), kind) for kind in ("epsilon", "sample", "v_prediction")),
        FlowMatching(),
        FlowMatching(noise_at=0, timestep_scale=1.0),
    ],
    ids=["epsilon", "sample", "v", "flow", "flow0"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_what_is_drawn_in_one_pass_is_what_noised_gives(process, dtype):
    x0 = torch.randn(B, T, A).to(dtype)
    drawn = process.draw(x0, K, seed=torch.tensor([3]), timesteps="stratified", noise="antithetic")
    again = process.noised(x0, drawn.noise, drawn.timesteps)
    assert drawn.by is process and drawn.noised.x.dtype == dtype
    for a, b in zip(drawn.noised, again, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_timesteps_cover_their_range():
    process = DiffusionProcess(torch.linspace(0.9, 0.1, 7))
    t = process.draw_timesteps((500, 8), device=torch.device("cpu"), generator=torch.Generator().manual_seed(0))
    assert t.dtype == torch.int64
    counts = torch.bincount(t.flatten(), minlength=7)
    assert counts.shape == (7,) and (counts > 4000 / 7 * 0.8).all()
    times = FlowMatching().draw_timesteps((500, 8), device=torch.device("cpu"))
    assert times.min() >= 0 and times.max() < 1


@pytest.mark.parametrize(
    "process", [DiffusionProcess(torch.linspace(0.99, 0.01, 10)), FlowMatching()], ids=["ddpm", "flow"]
)
def test_loss_is_the_masked_weighted_mean(process):
    x0, noise, t = drawn(process)
    weight, mask = torch.rand(B, K), torch.rand(B, T) > 0.4
    mask[0] = False  # a condition whose actions are all padding
    batch = Level2Batch(None, x0, t, noise, weight=weight, mask=mask)
    prediction = torch.randn_like(noise)
    loss = DenoisingLoss(process).per_sample(lambda cache, x, time: prediction, None, batch)
    target = process.noised(x0, noise, t).target
    for b in range(B):
        for k in range(K):
            kept = [(prediction[b, k, i] - target[b, k, i]).square().mean() for i in range(T) if mask[b, i]]
            expected = weight[b, k] * torch.stack(kept).mean() if kept else torch.tensor(0.0)
            torch.testing.assert_close(loss[b, k], expected)


def test_loss_is_float32_under_low_precision():
    process = DiffusionProcess(torch.linspace(0.99, 0.01, 10))
    x0, noise, t = drawn(process)
    batch = Level2Batch(None, x0.bfloat16(), t, noise.bfloat16())
    seen = {}

    def denoise(cache, x, time):
        seen["dtype"] = x.dtype
        return torch.zeros_like(x)

    loss = DenoisingLoss(process).per_sample(denoise, None, batch)
    assert seen["dtype"] == torch.bfloat16 and loss.dtype == torch.float32


def test_bad_input():
    process = DiffusionProcess(torch.linspace(0.99, 0.01, 10))
    x0, noise, t = drawn(process)
    with pytest.raises(InvalidArgument, match="timesteps must be integers, got torch.float32"):
        process.noised(x0, noise, t.float())
    with pytest.raises(InvalidArgument, match="times must be floats"):
        FlowMatching().noised(x0, noise, t)
    with pytest.raises(InvalidArgument, match="noise_at must be 0 or 1, got 2"):
        FlowMatching(noise_at=2)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="prediction_type must be one of epsilon, sample, v_prediction, got 'x0'"):
        DiffusionProcess(torch.ones(3), "x0")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match=r"alphas_cumprod must be \[steps\]"):
        DiffusionProcess(torch.ones(3) * 2)
    with pytest.raises(InvalidArgument, match="FlowMatchEulerDiscreteScheduler has no alphas_cumprod"):
        DiffusionProcess.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(10))
    with pytest.raises(
        InvalidArgument, match=r"denoise must return \[B, K, T, A\] = \[3, 5, 4, 2\], got \[3, 5, 4, 1\]"
    ):
        DenoisingLoss(process).per_sample(lambda c, x, s: x[..., :1], None, Level2Batch(None, x0, t, noise))


@pytest.mark.parametrize(
    "process", [DiffusionProcess(torch.linspace(0.99, 0.01, 10)), FlowMatching()], ids=["ddpm", "flow"]
)
def test_il_loss_is_that_of_a_level2_batch(process):
    class Net:
        def denoise(self, cache, x, t):
            return cache[:, None] * x + t.to(x.dtype)[..., None, None] / 10

    x0, noise, t = drawn(process)
    cache, weight, mask = torch.randn(B, T, A), torch.rand(B), torch.rand(B, T) > 0.3
    batch = Level2Batch(None, x0, t, noise, weight=weight[:, None].expand(B, K), mask=mask)
    expected = DenoisingLoss(process).per_sample(Net().denoise, cache, batch)
    options = {"process": process, "t": t, "noise": noise, "weight": weight, "mask": mask}
    torch.testing.assert_close(il_loss(Net(), cache, x0, reduction="none", **options), expected)
    torch.testing.assert_close(il_loss(Net(), cache, x0, k=K, **options), expected.mean())
    double = il_loss(Net(), cache.double(), x0.double(), reduction="none", **{**options, "noise": noise.double()})
    assert double.dtype == torch.float64

    def draw(seed):
        return il_loss(
            Net(), cache, x0, k=6, process=process, reduction="none", generator=torch.Generator().manual_seed(seed)
        )

    assert draw(1).shape == (B, 6) and torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


def test_il_loss_errors():
    process = FlowMatching()
    x0, noise, t = drawn(process)
    for options, message in [
        ({"k": 2, "t": t}, "t and noise belong together"),
        ({}, "k, the samples per condition, must be given without t, got None"),
        ({"k": 2, "t": t, "noise": noise}, "k, the samples per condition, must be 5, got 2"),
        ({"k": 2, "reduction": "sum"}, "reduction must be 'mean' or 'none', got 'sum'"),
        ({"t": t, "noise": noise, "weight": torch.ones(B + 1)}, r"weight must be \[B, K\] = \[3, 5\], got \[4, 5\]"),
    ]:
        with pytest.raises(InvalidArgument, match=message):
            il_loss(None, None, x0, process=process, **options)
