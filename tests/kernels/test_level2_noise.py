"""Triton and the native library give the bits of the definition: times, noise, noisy samples, targets."""

from __future__ import annotations

import math

import pytest
import torch

from minidiff_fast import backend, native
from minidiff_fast.ops import Level2Noise, level2_noise
from minidiff_fast.ops import _level2_noise_op as op

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
IMPLS = ["triton", "native"]
PREDICTIONS = ["epsilon", "sample", "v_prediction", "flow"]


def dtypes_of(impl: str) -> list[torch.dtype]:
    """The interpreter cuts bfloat16 off instead of rounding."""
    if impl == "native":
        return [torch.float32, torch.bfloat16]
    return [torch.float32, torch.float16, torch.bfloat16] if CUDA else [torch.float32, torch.float16]


def place(impl: str) -> str:
    """The device that ``impl`` runs on; skips where it cannot."""
    device = "cpu" if impl == "native" else DEVICE
    if impl == "native" and backend.why_not_native(torch.device("cpu"), torch.float32) is not None:
        pytest.skip(str(native.why_missing()))
    return device


def check(impl, B, K, T, A, dtype=torch.float32, steps=100, prediction="epsilon", x0=None, seed=11, **options) -> None:
    device = place(impl)
    if x0 is None:
        x0 = torch.randn(B, T, A, generator=torch.Generator().manual_seed(3)).to(device, dtype)
    schedule = None if prediction == "flow" else torch.linspace(0.999, 0.0, steps, device=device)
    arguments = {
        "schedule": schedule, "prediction": prediction, "seed": torch.tensor([seed], device=device), "return_noise": True,
        **options,
    }  # fmt: skip
    want = level2_noise(x0, K, **arguments, impl="reference")
    got = level2_noise(x0, K, **arguments, impl=impl)
    for name in Level2Noise._fields:
        a, b = getattr(want, name), getattr(got, name)
        assert a.dtype == b.dtype and torch.equal(torch.nan_to_num(a, nan=-77.0), torch.nan_to_num(b, nan=-77.0)), (
            f"{name}: {(a != b).sum().item()} of {a.numel()} differ, at most by {(a.double() - b.double()).abs().max()}"
        )


SIZES = [
    # B, K, T, A: ones, primes, one off every block boundary
    (1, 1, 1, 1),
    (2, 3, 1, 3),
    (3, 1, 5, 1),
    (1, 257, 1, 2),
    (5, 7, 3, 11),
    (2, 5, 16, 2),
    (1, 2, 17, 15),
    (1, 3, 16, 16),
    (2, 1, 37, 7),
    (1, 2, 131, 5),
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(impl, size, prediction):
    check(impl, *size, prediction=prediction, timesteps="stratified", noise="antithetic")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_dtypes(impl, which, prediction):
    place(impl)
    if which >= len(dtypes_of(impl)):
        pytest.skip("another dtype elsewhere")
    check(impl, 3, 5, 4, 7, dtypes_of(impl)[which], prediction=prediction, noise_at=which % 2)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("timesteps", ["iid", "stratified"])
@pytest.mark.parametrize("noise", ["iid", "antithetic"])
@pytest.mark.parametrize("prediction", ["epsilon", "flow"])
def test_draws(impl, timesteps, noise, prediction):
    options = {"timesteps": timesteps, "noise": noise, "prediction": prediction}
    check(impl, 2, 3, 2, 5, sample_offset=4, total_samples=9, **options)
    check(impl, 2, 3, 2, 5, seed=-(2**62) - 5, **options)
    check(impl, 3, 2, 1, 3, sample_offset=2**33, total_samples=2**33 + 7, **options)
    for steps in (1, 7, 1000):
        check(impl, 2, 3, 1, 3, steps=steps, **options)


@pytest.mark.parametrize("impl", IMPLS)
def test_many_bits(impl):
    """Enough words to meet every branch of the logarithm and every quarter of a turn many times over."""
    check(impl, 2, 32, 16, 16, prediction="v_prediction")


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_and_expanded_x0(impl):
    device = place(impl)
    x0 = torch.randn(4, 10, 6, device=device)
    for view in (x0[::2], x0[:, ::3], x0[:, :, 1::2], x0.transpose(1, 2), x0[:1].expand(3, -1, -1), x0.flip(1)):
        check(impl, *(view.shape[0], 5, *view.shape[1:]), x0=view, prediction="v_prediction")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_what_is_not_finite_comes_through(impl, prediction):
    device = place(impl)
    x0 = torch.zeros(2, 3, 4, device=device)
    x0[0, 0, 0], x0[1, 1, 1], x0[1, 2, 3] = math.nan, math.inf, -math.inf
    check(impl, 2, 3, 3, 4, x0=x0, prediction=prediction)
    if impl == "native":
        check(impl, 2, 3, 3, 4, x0=x0.bfloat16(), prediction=prediction)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("size", [(3, 5, 7, 3), (2, 3, 0, 3)], ids=str)
def test_every_output_is_written(impl, prediction, size, monkeypatch):
    place(impl)
    plain = op.empty_outputs

    def poisoned(*args):
        outputs = plain(*args)
        for tensor in outputs:
            tensor.fill_(math.nan if tensor.is_floating_point() else -1)
        return outputs

    monkeypatch.setattr(op, "empty_outputs", poisoned)
    check(impl, *size, prediction=prediction)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_same_bits_twice(impl):
    device = place(impl)
    x0 = torch.randn(3, 5, 7, device=device)
    seed = torch.tensor([9], device=device)
    first, second = (level2_noise(x0, 6, schedule=None, prediction="flow", seed=seed, impl=impl) for _ in range(2))
    assert torch.equal(first.x, second.x) and torch.equal(first.target, second.target)


@pytest.mark.parametrize("simd", ["auto", "portable"])
@pytest.mark.parametrize("threads", [1, 3])
def test_native_bits_depend_neither_on_threads_nor_on_the_processor(simd, threads, monkeypatch):
    place("native")
    monkeypatch.setenv(native.SIMD, simd)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for size in [(7, 301, 5, 11), (11, 1000, 1, 3), (2, 4, 77, 100)]:
            check("native", *size, prediction="v_prediction", timesteps="stratified", noise="antithetic")
    finally:
        torch.set_num_threads(before)
