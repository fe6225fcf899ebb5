"""Denoising steps as Gaussians, against diffusers' schedulers in float64 and against oracles."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.objectives import FlowMatching
from minidiff_fast.transitions import (
    DDIMTransitions,
    DDPMTransitions,
    FlowTransitions,
    gaussian_log_prob,
    step_moments,
)

diffusers = pytest.importorskip("diffusers")

B, K, T, A = 2, 3, 4, 2
CPU = torch.device("cpu")


def scheduler_of(cls: str, trained: int = 100, **options):
    return getattr(diffusers, cls)(trained, beta_schedule="squaredcos_cap_v2", **options)


def drawn(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Samples and predictions, some of them beyond the clamp."""
    x, prediction = torch.randn(2, B, K, T, A, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(dtype), prediction.to(dtype)


def at(step: int) -> Tensor:
    return torch.full((B, K), step)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_ddim_is_that_of_diffusers(prediction, spacing, eta):
    scheduler = scheduler_of("DDIMScheduler", prediction_type=prediction, timestep_spacing=spacing)
    transitions = DDIMTransitions.from_scheduler(scheduler, 5, eta=eta)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()  # the float32 values, computed with in float64
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    scheduler.set_timesteps(5)
    assert transitions.steps == 5 and torch.equal(transitions.times(CPU), scheduler.timesteps)
    x, output = drawn()
    for step, t in enumerate(scheduler.timesteps):
        options = {"eta": eta, "use_clipped_model_output": True}
        mean = scheduler.step(output, t, x, variance_noise=torch.zeros_like(x), **options).prev_sample
        moved = scheduler.step(output, t, x, variance_noise=torch.ones_like(x), **options).prev_sample
        moments = transitions.moments(x, output, at(step))
        assert moments.mean.dtype == torch.float64
        torch.testing.assert_close(moments.mean, mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(moments.std.expand_as(x), moved - mean, rtol=1e-9, atol=1e-12)
    assert float(moments.std.max()) == 0.0  # the last step has alpha 1 behind it


@pytest.mark.parametrize("steps", [None, 5])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_ddpm_is_the_posterior_of_diffusers(prediction, steps):
    scheduler = scheduler_of("DDPMScheduler", 20, prediction_type=prediction, variance_type="fixed_small")
    transitions = DDPMTransitions.from_scheduler(scheduler, steps)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.one = scheduler.one.double()
    scheduler.set_timesteps(20 if steps is None else steps)
    assert torch.equal(transitions.times(CPU), scheduler.timesteps)
    x, output = drawn()
    for step, t in enumerate(scheduler.timesteps):
        moments = transitions.moments(x, output, at(step))
        generator = torch.Generator().manual_seed(1)
        sample = scheduler.step(output, t, x, generator=generator).prev_sample
        variance = scheduler._get_variance(t) if t > 0 else torch.zeros((), dtype=torch.float64)
        noise = torch.randn(x.shape, generator=generator.manual_seed(1), dtype=torch.float64)
        torch.testing.assert_close(moments.std[0, 0, 0, 0], variance.sqrt(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(moments.mean, sample - variance.sqrt() * noise, rtol=1e-11, atol=1e-12)


def test_eta_0_evaluation_changes_the_mean_too():
    """Removing the noise but keeping sigma inside the mean is another sampler."""
    stochastic = DDIMTransitions.from_scheduler(scheduler_of("DDIMScheduler"), 5, eta=1.0)
    quiet, made = stochastic.deterministic(), DDIMTransitions.from_scheduler(scheduler_of("DDIMScheduler"), 5, eta=0.0)
    x, output = drawn()
    for step in range(4):
        with_noise, without = (each.moments(x, output, at(step)) for each in (stochastic, quiet))
        assert float(without.std.abs().max()) == 0.0 < float(with_noise.std.min())
        assert float((with_noise.mean - without.mean).abs().max()) > 1e-2
        assert torch.equal(without.mean, made.moments(x, output, at(step)).mean)
    ddpm = DDPMTransitions.from_scheduler(scheduler_of("DDPMScheduler", 10)).deterministic()
    assert float(ddpm.moments(x, output, at(3)).std.max()) == 0.0


@pytest.mark.parametrize("clip", [None, 0.5, 1.0])
def test_the_clamp_and_its_share(clip):
    transitions = DDIMTransitions.from_scheduler(
        scheduler_of("DDIMScheduler", prediction_type="sample"), 5, clip_sample=clip
    )  # fmt: skip
    x, output = drawn()
    output.requires_grad_()
    moments = transitions.moments(x, output, at(2))
    beyond = torch.zeros_like(output, dtype=torch.bool) if clip is None else output.detach().abs() > clip
    assert torch.equal(moments.saturated, beyond.double().mean((-2, -1))) and not moments.saturated.requires_grad
    moments.mean.sum().backward()
    assert torch.equal(output.grad == 0.0, beyond)


def test_every_step_of_a_batch_has_its_own_moments_and_float32_stays():
    transitions = DDIMTransitions.from_scheduler(scheduler_of("DDIMScheduler"), 5)
    x, output = drawn()
    index = torch.tensor([[0, 3, 1], [4, 2, 0]])
    together = transitions.moments(x, output, index)
    for b in range(B):
        for k in range(K):
            one = slice(b, b + 1), slice(k, k + 1)
            alone = transitions.moments(x[one], output[one], index[one])
            assert torch.equal(alone.mean, together.mean[one]) and torch.equal(alone.std, together.std[one])
    single = transitions.moments(x.float(), output.float(), index)
    assert single.mean.dtype == single.std.dtype == torch.float32
    torch.testing.assert_close(single.mean.double(), together.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(single.std.double(), together.std, rtol=1e-6, atol=1e-8)
    half = transitions.moments(x.bfloat16(), output.bfloat16(), index)
    assert half.mean.dtype == torch.float32


def test_the_scheduler_is_not_changed():
    scheduler = scheduler_of("DDIMScheduler")
    scheduler.set_timesteps(50)
    DDIMTransitions.from_scheduler(scheduler, 5)
    assert len(scheduler.timesteps) == 50 and scheduler.num_inference_steps == 50


@pytest.mark.parametrize("std", [0.0, 0.2])
@pytest.mark.parametrize("noise_at", [0, 1])
def test_flow_steps(noise_at, std):
    process = FlowMatching(noise_at=noise_at, timestep_scale=10.0)
    transitions = FlowTransitions.from_process(process, 4, std=std)
    assert transitions == FlowTransitions(4, std, noise_at, 10.0)
    times = [10.0, 7.5, 5.0, 2.5] if noise_at == 1 else [0.0, 2.5, 5.0, 7.5]
    assert transitions.times(CPU).tolist() == times
    x, output = drawn()
    moments = transitions.moments(x, output, at(1))
    torch.testing.assert_close(moments.mean, x + (0.25 if noise_at == 0 else -0.25) * output, rtol=0.0, atol=1e-15)
    assert moments.mean.dtype == torch.float64 and moments.std.unique().tolist() == [std]
    assert float(transitions.deterministic().moments(x, output, at(1)).std.max()) == 0.0


class Oracle:
    """Knows the clean sample."""

    def __init__(self, clean: Tensor, kind: str, alphas: Tensor | None = None) -> None:
        self.clean, self.kind, self.alphas = clean, kind, alphas

    def encode(self, obs):
        return obs

    def denoise(self, cache, x: Tensor, t: Tensor) -> Tensor:
        clean = self.clean.expand_as(x)
        if self.kind == "sample":
            return clean
        if self.kind == "epsilon":
            ab = self.alphas[t].double()[..., None, None]
            return (x - ab.sqrt() * clean) / (1.0 - ab).sqrt()
        level = (t.double() / 1000.0)[..., None, None]
        return (x - clean) / level if self.kind == "flow1" else (clean - x) / (1.0 - level)


@pytest.mark.parametrize("kind", ["sample", "epsilon", "flow0", "flow1"])
def test_an_oracles_chain_ends_at_the_data(kind):
    scheduler = scheduler_of("DDIMScheduler", prediction_type=kind if kind in ("sample", "epsilon") else "epsilon")
    transitions = FlowTransitions(7, 0.3, int(kind[-1])) if "flow" in kind else DDIMTransitions.from_scheduler(scheduler, 7)  # type: ignore[arg-type]  # fmt: skip
    x, _ = drawn()
    clean = 0.9 * torch.tanh(drawn(1)[0])
    policy = Oracle(clean, kind, scheduler.alphas_cumprod)
    for step in range(7):
        moments = step_moments(policy, None, x, at(step), transitions=transitions)
        noise = torch.randn(x.shape, dtype=torch.float64) if step < 6 else 0.0
        x = moments.mean + moments.std * noise
    torch.testing.assert_close(x, clean, rtol=0.0, atol=1e-6)


def test_zero_terminal_snr_goes_with_v_prediction():
    scheduler = scheduler_of(
        "DDIMScheduler", prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )  # fmt: skip
    scheduler.alphas_cumprod[-1] = 0.0
    x, output = drawn()
    assert bool(torch.isfinite(DDIMTransitions.from_scheduler(scheduler, 5).moments(x, output, at(0)).mean).all())
    scheduler.register_to_config(prediction_type="epsilon")
    with pytest.raises(InvalidArgument, match="alphas_cumprod is 0 at the first step"):
        DDIMTransitions.from_scheduler(scheduler, 5)


def test_gaussian_log_prob_is_that_of_torch():
    x, mean = drawn()
    std = torch.rand(B, K, 1, 1, dtype=torch.float64) + 0.1
    entries = torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(x)
    for act_steps, window in ((None, slice(None)), (2, slice(0, 2)), ((1, 3), slice(1, 3))):
        for reduce in ("mean", "sum"):
            found, clamped = gaussian_log_prob(x, mean, std, act_steps=act_steps, reduce=reduce)  # type: ignore[arg-type]
            torch.testing.assert_close(found, getattr(entries[..., window, :], reduce)((-2, -1)), rtol=1e-12, atol=0.0)
            assert float(clamped.max()) == 0.0
    found, clamped = gaussian_log_prob(x, mean, std, clamp=(-1.0, 0.0))
    torch.testing.assert_close(found, entries.clamp(-1.0, 0.0).mean((-2, -1)), rtol=1e-12, atol=0.0)
    outside = (entries < -1.0) | (entries > 0.0)
    assert torch.equal(clamped, outside.double().mean((-2, -1))) and 0.0 < float(clamped.mean()) < 1.0


def test_shapes_that_would_broadcast_are_refused():
    class Narrow(Oracle):
        def denoise(self, cache, x, t):
            return x[:, :1]

    x, _ = drawn()
    transitions = FlowTransitions(4)
    with pytest.raises(
        InvalidArgument, match=r"denoise must return \[B, K, T, A\] = \[2, 3, 4, 2\], got \[2, 1, 4, 2\]"
    ):
        step_moments(Narrow(x, "sample"), None, x, at(0), transitions=transitions)
    for std in (torch.ones(A), torch.ones(B, K), torch.ones(B, K, T, 3)):
        with pytest.raises(InvalidArgument, match=r"noise_std must return \[B, K, T, A\] = \[2, 3, 4, 2\]"):
            step_moments(
                Oracle(x, "sample"), None, x, at(0), transitions=transitions, noise_std=lambda *_, std=std: std
            )  # fmt: skip
    with pytest.raises(InvalidArgument, match="x and mean must have one shape"):
        gaussian_log_prob(x, x[:, :1], torch.ones(()))
    with pytest.raises(InvalidArgument, match="reduce must be 'mean' or 'sum', got 'none'"):
        gaussian_log_prob(x, x, torch.ones(()), reduce="none")  # type: ignore[arg-type]


def test_bad_input():
    scheduler = scheduler_of("DDIMScheduler")
    for steps in (0, 101, 2.0, True):
        with pytest.raises(
            InvalidArgument, match=r"DDIMTransitions.from_scheduler: steps must be an int in \[1, 100\]"
        ):
            DDIMTransitions.from_scheduler(scheduler, steps)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="FlowMatchEulerDiscreteScheduler has no alphas_cumprod"):
        DDIMTransitions.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(1000), 5)
    with pytest.raises(InvalidArgument, match="thresholding is not a step of these"):
        DDIMTransitions.from_scheduler(scheduler_of("DDIMScheduler", thresholding=True), 5)
    with pytest.raises(InvalidArgument, match="ends with a step that does nothing"):
        DDIMTransitions.from_scheduler(scheduler_of("DDIMScheduler", set_alpha_to_one=False), 5)
    with pytest.raises(InvalidArgument, match="variance_type must be fixed_small.*got 'fixed_large'"):
        DDPMTransitions.from_scheduler(scheduler_of("DDPMScheduler", variance_type="fixed_large"))
    times, table = torch.tensor([60, 20]), torch.tensor([0.1, 0.5, 1.0])
    for options, message in [
        ({"eta": 1.1}, r"eta must be in \[0, 1\], got 1.1"),
        ({"eta": math.nan}, r"eta must be in \[0, 1\], got nan"),
        ({"clip_sample": 0.0}, "clip_sample must be above 0 or None, got 0.0"),
        ({"prediction_type": "noise"}, "prediction_type must be one of epsilon, sample, v_prediction, got 'noise'"),
        ({"alphas_cumprod": table[:2]}, r"timesteps must be \[D\] and alphas_cumprod \[D \+ 1\]"),
        ({"alphas_cumprod": table.flip(0)}, r"must increase within \[0, 1\]"),
        ({"alphas_cumprod": table * 1.5}, r"must increase within \[0, 1\]"),
        ({"alphas_cumprod": table * math.nan}, r"must increase within \[0, 1\]"),
    ]:
        with pytest.raises(InvalidArgument, match=message):
            DDIMTransitions(
                **{"timesteps": times, "alphas_cumprod": table, "prediction_type": "epsilon", **options}  # type: ignore[arg-type]
            )
    for options, message in [
        ({"steps": 0}, "steps must be an int >= 1"),
        ({"steps": 4, "std": -0.1}, "std must be at least 0"),
        ({"steps": 4, "std": math.nan}, "std must be at least 0"),
        ({"steps": 4, "noise_at": 2}, "noise_at must be 0 or 1"),
    ]:
        with pytest.raises(InvalidArgument, match=message):
            FlowTransitions(**options)  # type: ignore[arg-type]
