"""The cached-condition sampler: one encode, the scheduler's own trajectory, reproducible from its generator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.sampling import sample_actions

diffusers = pytest.importorskip("diffusers")

T, A = 4, 2


class Oracle:
    """Knows the clean sample of every condition and predicts accordingly; counts its calls."""

    def __init__(self, x0: Tensor, prediction: str, alphas_cumprod: Tensor | None = None) -> None:
        self.x0, self.prediction, self.ab = x0, prediction, alphas_cumprod
        self.encodes = self.denoises = 0

    def encode(self, obs: Tensor) -> Tensor:
        self.encodes += 1
        return self.x0 + 0 * obs[:, :1, None]

    def denoise(self, cache: Tensor, x: Tensor, t: Tensor) -> Tensor:
        self.denoises += 1
        assert t.shape == x.shape[:2]
        clean = cache[:, None].expand_as(x)
        if self.prediction == "sample":
            return clean
        if self.prediction == "flow":
            return (x - clean) / (t / 1000)[:, :, None, None]
        assert self.ab is not None
        ab = self.ab[t][:, :, None, None]
        return (x - ab.sqrt() * clean) / (1 - ab).sqrt()


def scheduler_of(kind: str, prediction: str):
    if kind == "flow":
        return diffusers.FlowMatchEulerDiscreteScheduler(1000)
    cls = {"ddpm": diffusers.DDPMScheduler, "ddim": diffusers.DDIMScheduler, "dpm": diffusers.DPMSolverMultistepScheduler}[kind]  # fmt: skip
    return cls(100, beta_schedule="squaredcos_cap_v2", prediction_type=prediction)


@pytest.mark.parametrize(
    ("kind", "prediction"),
    [("ddim", "epsilon"), ("ddim", "sample"), ("ddpm", "epsilon"), ("dpm", "epsilon"), ("flow", "flow")],
)
def test_an_oracle_is_sampled_exactly(kind, prediction):
    x0 = torch.rand(3, T, A) * 1.6 - 0.8
    scheduler = scheduler_of(kind, prediction)
    policy = Oracle(x0, prediction, getattr(scheduler, "alphas_cumprod", None))
    out = sample_actions(
        policy, torch.zeros(3, 1), scheduler, num_inference_steps=10, shape=(T, A), k=5,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert out.shape == (3, 5, T, A)
    assert (policy.encodes, policy.denoises) == (1, len(scheduler.timesteps))
    torch.testing.assert_close(out, x0[:, None].expand_as(out), rtol=2e-2, atol=2e-2)


def test_samples_of_one_condition_differ_and_the_generator_decides():
    class Drift(Oracle):
        def denoise(self, cache: Tensor, x: Tensor, t: Tensor) -> Tensor:
            return 0.9 * x

    def run(seed: int) -> Tensor:
        return sample_actions(
            Drift(torch.zeros(2, T, A), "epsilon"), torch.zeros(2, 1), scheduler_of("ddpm", "epsilon"),
            num_inference_steps=5, shape=(T, A), k=3, generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert not torch.equal(run(1)[:, 0], run(1)[:, 1])


@pytest.mark.parametrize("kind", ["ddpm", "ddim"])
def test_a_sample_does_not_depend_on_its_siblings(kind):
    """Dynamic thresholding takes a quantile over what the scheduler sees as one sample."""

    class Wild(Oracle):
        wild = 0.0

        def denoise(self, cache: Tensor, x: Tensor, t: Tensor) -> Tensor:
            return x + 100.0 * torch.arange(x.shape[1])[None, :, None, None] * self.wild

    cls = diffusers.DDPMScheduler if kind == "ddpm" else diffusers.DDIMScheduler

    def run(wild: float) -> Tensor:
        policy = Wild(torch.zeros(2, T, A), "sample")
        policy.wild = wild
        scheduler = cls(100, prediction_type="sample", thresholding=True, clip_sample=False)
        return sample_actions(
            policy, torch.zeros(2, 1), scheduler, num_inference_steps=4, shape=(T, A), k=3,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip

    calm, wild = run(0.0), run(1.0)
    assert torch.equal(calm[:, 0], wild[:, 0]) and not torch.equal(calm[:, 2], wild[:, 2])


def test_bad_input():
    policy, scheduler = Oracle(torch.zeros(2, T, A), "sample"), scheduler_of("ddim", "sample")
    for options, message in [
        ({"k": 0}, "k, the samples per observation, must be at least 1, got 0"),
        ({"num_inference_steps": 0}, r"num_inference_steps must be in \[1, 100\], got 0"),
        ({"num_inference_steps": 101}, r"num_inference_steps must be in \[1, 100\], got 101"),
    ]:
        with pytest.raises(InvalidArgument, match=message):
            sample_actions(
                policy, torch.zeros(2, 1), scheduler, **{"num_inference_steps": 5, "shape": (T, A), **options}
            )
    policy.training = True  # type: ignore[attr-defined]
    with pytest.raises(InvalidArgument, match="policy is in training mode.*call policy.eval"):
        sample_actions(policy, torch.zeros(2, 1), scheduler, num_inference_steps=5, shape=(T, A))
    assert policy.encodes == 0
