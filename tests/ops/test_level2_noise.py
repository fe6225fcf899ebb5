"""The definition of Level-2 noise: its stream, its formulas, what stratified and antithetic draws are worth."""

from __future__ import annotations

import math

import pytest
import torch

from minidiff_fast.errors import BackendUnavailable, InvalidArgument
from minidiff_fast.ops import Level2Noise, level2_noise, level2_noise_reference
from minidiff_fast.ops.box_muller import standard_normals
from minidiff_fast.ops.philox import philox_4x32

KERNEL = "triton"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEED = torch.tensor([0x1234_5678_9ABC_DEF], device=DEVICE)
SCHEDULE = torch.linspace(0.99, 0.0, 10, device=DEVICE)
PREDICTIONS = ["epsilon", "sample", "v_prediction", "flow"]


def clean(B=2, T=3, A=5, dtype=torch.float32):
    return torch.randn(B, T, A, generator=torch.Generator().manual_seed(B + 7 * T + 31 * A)).to(DEVICE, dtype)


def schedule_of(prediction):
    return None if prediction == "flow" else SCHEDULE


def draw(x0, K, prediction="epsilon", **options) -> Level2Noise:
    options = {"seed": SEED, "return_noise": True, "impl": "reference", **options}
    return level2_noise(x0, K, schedule=schedule_of(prediction), prediction=prediction, **options)


@pytest.mark.parametrize("timesteps", ["iid", "stratified"])
@pytest.mark.parametrize("noise", ["iid", "antithetic"])
def test_stream_is_the_documented_one(timesteps, noise):
    B, K, T, A = 2, 3, 3, 5
    offset, total = 4, 9
    drawn = draw(clean(B, T, A), K, timesteps=timesteps, noise=noise, sample_offset=offset, total_samples=total)
    seed = SEED.cpu()
    for b in range(B):
        for i in range(K):
            k = offset + i
            number = b * total + k
            word = int(philox_4x32(seed, tuple(torch.tensor(c) for c in (0, number, 0, 1)))[0])
            exact = (k * 2**32 + word) * 10 // (total * 2**32) if timesteps == "stratified" else word * 10 // 2**32
            assert drawn.timesteps[b, i].item() == exact
            source, sign = (b * total + k // 2 * 2, (-1) ** k) if noise == "antithetic" else (number, 1)
            for e in range(T * A):
                w = philox_4x32(seed, tuple(torch.tensor(c) for c in (e // 4, source, 0, 2)))
                pair = standard_normals(w[0], w[1]) if e % 4 < 2 else standard_normals(w[2], w[3])
                assert drawn.noise[b, i, e // A, e % A].item() == sign * pair[e % 2].item()


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("noise_at", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_formulas(prediction, noise_at, dtype):
    x0 = clean(dtype=dtype)
    drawn = draw(x0, 7, prediction, noise_at=noise_at)
    eps, x = drawn.noise.double(), x0[:, None].double()
    t = drawn.timesteps[:, :, None, None]
    if prediction == "flow":
        assert drawn.timesteps.dtype == torch.float32
        level = t.double() if noise_at == 1 else 1 - t.double()
        expected, target = (1 - level) * x + level * eps, (eps - x) * (1 if noise_at == 1 else -1)
    else:
        assert drawn.timesteps.dtype == torch.int64
        ab = SCHEDULE.double()[t]
        expected = ab.sqrt() * x + (1 - ab).sqrt() * eps
        v = ab.sqrt() * eps - (1 - ab).sqrt() * x
        target = {"epsilon": eps, "sample": x.expand_as(eps), "v_prediction": v}[prediction]
    assert drawn.x.dtype == dtype and drawn.target.dtype == torch.float32
    rounding = torch.finfo(dtype).eps if dtype == torch.float16 else 0.0
    torch.testing.assert_close(drawn.x.double(), expected, rtol=1e-6 + rounding, atol=1e-6)
    torch.testing.assert_close(drawn.target.double(), target, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", ["reference", KERNEL])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_chunks_draw_what_the_whole_draws(impl, prediction):
    x0 = clean()
    options = {"timesteps": "stratified", "noise": "antithetic", "impl": impl}
    whole = draw(x0, 7, prediction, **options)
    parts = [
        draw(x0, stop - start, prediction, sample_offset=start, total_samples=7, **options)
        for start, stop in [(0, 3), (3, 4), (4, 7)]
    ]
    for name, tensor in whole._asdict().items():
        assert torch.equal(torch.cat([getattr(part, name) for part in parts], 1), tensor), name


def test_antithetic_pairs_and_the_lone_last():
    x0 = clean()
    plain, paired = draw(x0, 7), draw(x0, 7, noise="antithetic")
    assert torch.equal(paired.noise[:, 0::2], plain.noise[:, 0::2])
    assert torch.equal(paired.noise[:, 1::2], -paired.noise[:, 0:6:2])
    assert torch.equal(paired.timesteps, plain.timesteps)
    assert not torch.equal(plain.noise[:, 1], -plain.noise[:, 0])


def test_conditions_and_samples_differ_and_the_seed_decides():
    x0 = clean(B=8)
    drawn = draw(x0, 16)
    rows = drawn.noise.flatten(2).flatten(0, 1)
    assert len({tuple(row.tolist()) for row in rows}) == 128
    assert torch.equal(draw(x0, 16).x, drawn.x)
    assert not torch.equal(draw(x0, 16, seed=SEED + 1).noise, drawn.noise)
    assert not torch.equal(draw(x0, 16, seed=SEED + 2**40).noise, drawn.noise)


@pytest.mark.parametrize("timesteps", ["iid", "stratified"])
def test_every_timestep_is_as_likely(timesteps):
    """Chi-square with 6 and 999 degrees of freedom, at 1 in 10^5; and every sample's own stratum is kept."""
    for steps, bound in [(7, 33.0), (1000, 1205.0)]:
        x0 = torch.zeros(4000, 1, 0, device=DEVICE)
        t = level2_noise_reference(x0, 25, schedule=torch.ones(steps, device=DEVICE), timesteps=timesteps, seed=SEED)
        counts = torch.bincount(t.timesteps.flatten(), minlength=steps).double()
        assert counts.numel() == steps
        expected = 4000 * 25 / steps
        assert ((counts - expected).square() / expected).sum().item() < bound
        if timesteps == "stratified":
            k = torch.arange(25, device=DEVICE)
            assert (t.timesteps >= k * steps // 25).all() and (t.timesteps <= ((k + 1) * steps - 1) // 25).all()


@pytest.mark.parametrize("timesteps", ["iid", "stratified"])
def test_flow_times_are_uniform_in_the_unit_interval(timesteps):
    x0 = torch.zeros(4000, 1, 0, device=DEVICE)
    t = draw(x0, 25, "flow", timesteps=timesteps).timesteps
    assert t.min() >= 0 and t.max() < 1
    n = t.numel()
    grid = (torch.arange(n, device=DEVICE, dtype=torch.float64) + 0.5) / n
    assert (t.flatten().double().sort().values - grid).abs().max() < 1.95 / math.sqrt(n)
    if timesteps == "stratified":
        k = torch.arange(25, device=DEVICE)
        assert (t * 25 >= k - 1e-4).all() and (t * 25 <= k + 1 + 1e-4).all()


def test_stratified_and_antithetic_draws_lower_the_variance():
    """Mean over K of l = (a t + b . eps)^2, with t in [0, 1]: same expectation, less variance with each option."""
    B, K = 4000, 8
    x0 = torch.zeros(B, 1, 2, device=DEVICE)
    slope = torch.tensor([0.3, -0.2], device=DEVICE)

    def mean_losses(**options) -> torch.Tensor:
        drawn = draw(x0, K, "flow", **options)
        return (2 * drawn.timesteps + drawn.noise[:, :, 0] @ slope).square().mean(1).double()

    expected = 4 / 3 + 0.13
    variance = {}
    for name, options in {
        "iid": {}, "stratified": {"timesteps": "stratified"}, "antithetic": {"noise": "antithetic"},
        "both": {"timesteps": "stratified", "noise": "antithetic"},
    }.items():  # fmt: skip
        losses = mean_losses(**options)
        variance[name] = losses.var().item()
        assert abs(losses.mean().item() - expected) < 5 * losses.std().item() / math.sqrt(B), name
    assert variance["stratified"] < 0.6 * variance["iid"]
    assert variance["antithetic"] < 0.99 * variance["iid"]
    assert variance["both"] < 0.2 * variance["iid"] and variance["both"] < 0.5 * variance["stratified"]


@pytest.mark.parametrize("impl", ["reference", KERNEL])
@pytest.mark.parametrize("shape", [{"B": 0}, {"T": 0}, {"A": 0}, {}], ids=str)
@pytest.mark.parametrize("K", [0, 3])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_empty_axes(impl, shape, K, prediction):
    x0 = clean(**shape)
    drawn = draw(x0, K, prediction, impl=impl)
    assert drawn.x.shape == drawn.target.shape == drawn.noise.shape == (x0.shape[0], K, *x0.shape[1:])
    assert torch.equal(drawn.timesteps, draw(x0, K, prediction).timesteps)


def test_the_target_of_sample_is_a_view():
    drawn = level2_noise(clean(), 50, schedule=SCHEDULE, prediction="sample", seed=SEED)
    assert drawn.target.stride(1) == 0 and drawn.noise is None


def arguments(**changes):
    values = {
        "x0": clean(), "schedule": SCHEDULE, "seed": SEED, "num_samples": 3, "sample_offset": 1, "total_samples": 5,
        "prediction": "epsilon", "noise_at": 1, "stratified": True, "antithetic": True, "want_noise": True,
        "impl": KERNEL, **changes,
    }  # fmt: skip
    return tuple(values.values())


@pytest.mark.parametrize("changes", [{}, {"prediction": "v_prediction"}, {"prediction": "flow", "schedule": None, "want_noise": False}], ids=str)  # fmt: skip
def test_opcheck(changes):
    torch.library.opcheck(torch.ops.minidiff_fast.level2_noise_fwd.default, arguments(**changes))


@pytest.mark.parametrize(("impl", "prediction"), [("reference", "flow"), (KERNEL, "flow"), (KERNEL, "sample")])
def test_compiles_without_graph_breaks(impl, prediction):
    def run(x0, seed):
        return tuple(draw(x0, 3, prediction, seed=seed, impl=impl, timesteps="stratified", noise="antithetic"))

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(clean(), SEED)
    for a, b in zip(compiled, run(clean(), SEED), strict=True):
        assert torch.equal(a, b)


def test_there_is_no_gradient():
    x0 = clean().requires_grad_()
    with pytest.raises(InvalidArgument, match="x0 must not require grad: noisy samples are data"):
        draw(x0, 2)
    with torch.no_grad():
        assert not draw(x0, 2, impl=KERNEL).x.requires_grad


def test_error_texts():
    x0 = clean()
    for message, change in [
        (r"x0 must be \[B, T, A\] = \[B, T, A\], got \[2, 15\]", {"x0": x0.flatten(1)}),
        ("x0 must be a floating-point tensor, got torch.int64", {"x0": x0.long()}),
        ("prediction must be one of epsilon, sample, v_prediction, flow, got 'x0'", {"prediction": "x0"}),
        ("timesteps must be one of iid, stratified, got 'even'", {"timesteps": "even"}),
        ("noise must be one of iid, antithetic, got 'white'", {"noise": "white"}),
        ("noise_at must be one of 0, 1, got 2", {"noise_at": 2}),
        (r"got sample_offset = 2, num_samples = 3, total_samples = 4", {"sample_offset": 2, "total_samples": 4}),
        (r"got sample_offset = -1, num_samples = 3", {"sample_offset": -1}),
        (r"None for flow, got prediction = 'flow' with schedule \[10\]", {"prediction": "flow"}),
        (r"got prediction = 'epsilon' with schedule None", {"schedule": None}),
        (r"schedule must be float32 on .* got torch.float64", {"schedule": SCHEDULE.double()}),
        (r"schedule must be float32 on .* with 0", {"schedule": SCHEDULE[:0]}),
        (r"schedule must be \[steps\] = \[steps\], got \[1, 10\]", {"schedule": SCHEDULE[None]}),
        (r"seed must be \[1\] = \[1\], got \[\]", {"seed": SEED[0]}),
        ("seed must be int64 on .*, got torch.int32", {"seed": SEED.int()}),
    ]:
        values = {"x0": x0, "num_samples": 3, "schedule": SCHEDULE, "seed": SEED, **change}
        with pytest.raises(InvalidArgument, match="level2_noise: .*" + message) as caught:
            level2_noise(**values)
        assert "\n" not in str(caught.value)
    with pytest.raises(BackendUnavailable, match="level2_noise has no flash implementation"):
        draw(x0, 3, impl="flash")
    with pytest.raises(BackendUnavailable, match="not torch.float64; use impl='reference'"):
        draw(x0.double(), 3, impl=KERNEL)
