r"""Level-2 noise: K noisy samples of every condition's clean sample, in one pass and from one seed.

The random stream
-----------------
Sample k of condition b (k counts over all chunks: ``sample_offset`` + the place in this call) has the number
``n = b * total_samples + k``. Philox-4x32-10 (:mod:`minidiff_fast.ops.philox`) under the 64-bit seed gives four 32-bit
words for each of these counters:

- ``(0, n mod 2^32, n div 2^32, 1)``: word 0 is the sample's time;
- ``(q, m mod 2^32, m div 2^32, 2)``: words 0, 1 and words 2, 3 are two pairs for Box-Muller
  (:mod:`minidiff_fast.ops.box_muller`), which make the normals of the sample's elements ``4 q .. 4 q + 3``; element
  ``t * A + a`` is component a of token t. m is n, or with antithetic noise n without the lowest bit of k, and odd k
  then take the negative.

So every number depends on the seed, b, k and total_samples alone: chunks draw what the whole draws, and even samples
have the same noise with ``"iid"`` and ``"antithetic"``. (Dropout of broadcast attention ends its counters with 0.)

Times, with the word w, ``steps`` of the schedule (2^24 for flow) and integers only:

- ``"iid"``: ``floor(w steps / 2^32)``;
- ``"stratified"``: ``floor((k + w / 2^32) steps / total_samples)``: one sample in each K-th of the schedule. A sample
  drawn at random from the K has every timestep with probability 1 / steps.

Either probability is off by at most a relative ``steps / 2^32``, from the width of the words. Flow's time is the
integer times 2^-24, below 1.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from minidiff_fast import backend
from minidiff_fast.errors import InvalidArgument
from minidiff_fast.ops._eager import watched
from minidiff_fast.ops._level2_noise_op import level2_noise_eager, level2_noise_fwd
from minidiff_fast.ops.box_muller import rounded_sqrt, standard_normals
from minidiff_fast.ops.philox import philox_4x32
from minidiff_fast.shapes import check_shape, describe

NAME = "level2_noise"
BACKENDS = backend.register(
    backend.OpBackends(NAME, {"triton": backend.why_not_triton, "native": backend.why_not_native})
)

Prediction = Literal["epsilon", "sample", "v_prediction", "flow"]
TimestepDraw = Literal["iid", "stratified"]
NoiseDraw = Literal["iid", "antithetic"]

TIMESTEP_TAG, NOISE_TAG = 1, 2
FLOW_STEPS = 2**24


class Level2Noise(NamedTuple):
    """K noisy samples of every condition and what the network should say about them; nothing requires grad."""

    x: Tensor
    """[B, K, T, A], the dtype of x0: the noisy samples."""
    target: Tensor
    """[B, K, T, A] float32: for ``"sample"`` a view of x0 in float32, never K copies; for ``"epsilon"`` the noise."""
    timesteps: Tensor
    """[B, K]: int64 in [0, steps), or for ``"flow"`` float32 in [0, 1)."""
    noise: Tensor | None
    """[B, K, T, A] float32, standard normal, where asked for."""


def level2_noise(
    x0: Tensor,  # [B, T, A]
    num_samples: int,
    *,
    schedule: Tensor | None,  # [steps] float32
    prediction: Prediction = "epsilon",
    noise_at: Literal[0, 1] = 1,
    timesteps: TimestepDraw = "iid",
    noise: NoiseDraw = "iid",
    seed: Tensor,  # [1] int64
    sample_offset: int = 0,
    total_samples: int | None = None,
    return_noise: bool = False,
    impl: str | None = None,
) -> Level2Noise:
    r"""Draw K times and K noises for every condition, and noise its clean sample with them.

    With the signal's share ``ab = schedule[t]`` of the variance:

    .. math::
        x_{bk} = \sqrt{ab_t}\, x0_b + \sqrt{1 - ab_t}\, \epsilon_{bk}

    and the targets ``epsilon``: :math:`\epsilon`; ``sample``: x0; ``v_prediction``:
    :math:`\sqrt{ab_t}\, \epsilon - \sqrt{1 - ab_t}\, x0`. For ``flow``, with the noise at time 1,
    :math:`x = (1 - t)\, x0 + t\, \epsilon` and the target :math:`\epsilon - x0`; with the noise at time 0,
    :math:`x = t\, x0 + (1 - t)\, \epsilon` and the target :math:`x0 - \epsilon`.

    Every implementation gives the same bits: float32 arithmetic in a fixed order, nothing fused (see the module).

    Args:
        x0: clean samples ``[B, T, A]``, one per condition; float32, float16, bfloat16 (float64 on the reference, which
            computes in float32 all the same). Values that are not finite come out as they went in.
        num_samples: K, samples per condition in this call.
        schedule: ``alphas_cumprod [steps]`` float32, in [0, 1], on the device of x0; None for ``flow``.
        prediction: what the target is.
        noise_at: for ``flow``, the end of time that is noise.
        timesteps: ``"iid"``, or ``"stratified"``: the K samples of a condition cover the schedule evenly.
        noise: ``"iid"``, or ``"antithetic"``: samples 2 i and 2 i + 1 of a condition have opposite noise (the last of
            an odd K is alone). Both ``"stratified"`` and ``"antithetic"`` leave the expected loss and gradient what
            they are and lower the variance of their mean over K.
        seed: ``[1]`` int64 on the device of x0; every random number is a function of it.
        sample_offset, total_samples: this call draws the samples ``sample_offset .. sample_offset + K - 1`` out of
            total_samples per condition (default: sample_offset + K), the same numbers as one call for all of them.
        return_noise: return the noise also where it is not the target.
        impl: see :mod:`minidiff_fast.backend`.

    Raises:
        InvalidArgument: a shape, dtype, device or value is wrong, or x0 requires grad (noisy actions are data: there is
            no gradient to give; detach it). Nothing has run.
        BackendUnavailable: the implementation asked for by name cannot run here.

    Sources: Ho et al., arXiv 2006.11239; v: Salimans and Ho, arXiv 2202.00512; flow: Lipman et al., arXiv 2210.02747;
    K samples per condition: Mini-Diffuser (Hu et al., arXiv 2505.09430).

    >>> drawn = level2_noise(torch.zeros(2, 3, 4), 5, schedule=torch.tensor([0.9, 0.1]), seed=torch.tensor([7]))
    >>> drawn.x.shape, drawn.timesteps.shape
    (torch.Size([2, 5, 3, 4]), torch.Size([2, 5]))
    """
    total = sample_offset + num_samples if total_samples is None else total_samples
    _check(x0, num_samples, schedule, prediction, noise_at, timesteps, noise, seed, sample_offset, total)
    chosen = backend.resolve(BACKENDS, impl, x0.device, x0.dtype)
    if chosen == "reference":
        return level2_noise_reference(
            x0, num_samples, schedule=schedule, prediction=prediction, noise_at=noise_at, timesteps=timesteps,
            noise=noise, seed=seed, sample_offset=sample_offset, total_samples=total, return_noise=return_noise,
        )  # fmt: skip
    run = level2_noise_fwd if watched(x0, schedule, seed) else level2_noise_eager
    x, eps, target, times = run(
        x0, schedule, seed, num_samples, sample_offset, total, prediction, noise_at, timesteps == "stratified",
        noise == "antithetic", return_noise or prediction == "epsilon", chosen,
    )  # fmt: skip
    if prediction == "epsilon":
        target = eps
    elif prediction == "sample":
        target = x0.float()[:, None].expand(x.shape)
    return Level2Noise(x, target, times, eps if return_noise else None)


def level2_noise_reference(
    x0: Tensor,  # [B, T, A]
    num_samples: int,
    *,
    schedule: Tensor | None,  # [steps] float32
    prediction: Prediction = "epsilon",
    noise_at: Literal[0, 1] = 1,
    timesteps: TimestepDraw = "iid",
    noise: NoiseDraw = "iid",
    seed: Tensor,  # [1] int64
    sample_offset: int = 0,
    total_samples: int | None = None,
    return_noise: bool = False,
) -> Level2Noise:
    """The definition of :func:`level2_noise`: plain PyTorch, every random word and every rounding as documented."""
    total = sample_offset + num_samples if total_samples is None else total_samples
    steps = FLOW_STEPS if schedule is None else schedule.numel()
    k = torch.arange(sample_offset, sample_offset + num_samples, device=x0.device)
    sample = torch.arange(x0.shape[0], device=x0.device)[:, None] * total + k  # [B, K]
    index = _indices(seed, sample, k, steps, total, timesteps)
    eps = _noise(seed, sample, k, x0.shape[1] * x0.shape[2], noise).unflatten(2, x0.shape[1:])
    clean = x0[:, None].float()

    if schedule is None:
        times = index.to(torch.float32) * (1.0 / FLOW_STEPS)
        level = (times if noise_at == 1 else 1.0 - times)[:, :, None, None]
        x = (1.0 - level) * clean + level * eps
        target = eps - clean if noise_at == 1 else clean - eps
    else:
        times = index
        ab = schedule[index][:, :, None, None]
        signal, spread = rounded_sqrt(ab.clamp(min=0.0)), rounded_sqrt(1.0 - ab)
        x = signal * clean + spread * eps
        if prediction == "epsilon":
            target = eps
        elif prediction == "sample":
            target = clean.expand_as(eps)
        else:
            target = signal * eps - spread * clean
    return Level2Noise(x.to(x0.dtype), target, times, eps if return_noise else None)


def _indices(seed: Tensor, sample: Tensor, k: Tensor, steps: int, total: int, draw: str) -> Tensor:
    """Integer times ``[B, K]`` in [0, steps)."""
    zero = torch.zeros_like(sample)
    word = philox_4x32(seed, (zero, sample & 0xFFFFFFFF, sample >> 32, zero + TIMESTEP_TAG))[0]
    scaled = (word * steps) >> 32
    return (k * steps + scaled) // total if draw == "stratified" else scaled


def _noise(seed: Tensor, sample: Tensor, k: Tensor, size: int, draw: str) -> Tensor:
    """Standard normals ``[B, K, size]`` float32."""
    source = (sample - (k & 1) if draw == "antithetic" else sample)[:, :, None]
    block = torch.arange(-(-size // 4), device=k.device)
    tag = torch.full((), NOISE_TAG, dtype=torch.int64, device=k.device)
    w = philox_4x32(seed, (block, source & 0xFFFFFFFF, source >> 32, tag))
    eps = torch.stack([*standard_normals(w[0], w[1]), *standard_normals(w[2], w[3])], dim=-1)
    eps = eps.flatten(2)[:, :, :size]
    return torch.where((k & 1 == 1)[:, None], -eps, eps) if draw == "antithetic" else eps


def _check(
    x0: Tensor, num_samples: int, schedule: Tensor | None, prediction: str, noise_at: int, timesteps: str, noise: str,
    seed: Tensor, sample_offset: int, total: int,
) -> None:  # fmt: skip
    """Every check, from metadata only: nothing here waits for the device."""
    context = partial(describe, x0=x0, schedule=schedule, seed=seed)
    check_shape(NAME, "x0", x0, ["B", "T", "A"], "[B, T, A]", context)
    if not x0.is_floating_point():
        raise InvalidArgument(f"{NAME}: x0 must be a floating-point tensor, got {x0.dtype}")
    if x0.requires_grad and torch.is_grad_enabled():
        raise InvalidArgument(f"{NAME}: x0 must not require grad: noisy samples are data; give x0.detach()")
    for name, value, known in (
        ("prediction", prediction, get_args(Prediction)),
        ("timesteps", timesteps, get_args(TimestepDraw)),
        ("noise", noise, get_args(NoiseDraw)),
        ("noise_at", noise_at, (0, 1)),
    ):
        if value not in known:
            raise InvalidArgument(f"{NAME}: {name} must be one of {', '.join(map(str, known))}, got {value!r}")
    if num_samples < 0 or sample_offset < 0 or total < sample_offset + num_samples:
        raise InvalidArgument(
            f"{NAME}: the samples sample_offset .. sample_offset + num_samples - 1 must lie in 0 .. total_samples - 1, "
            f"got sample_offset = {sample_offset}, num_samples = {num_samples}, total_samples = {total}"
        )
    if (schedule is None) != (prediction == "flow"):
        raise InvalidArgument(
            f"{NAME}: schedule must be alphas_cumprod [steps] for epsilon, sample and v_prediction and None for flow, "
            f"got prediction = {prediction!r} with schedule {'None' if schedule is None else list(schedule.shape)}"
        )
    if schedule is not None:
        check_shape(NAME, "schedule", schedule, ["steps"], "[steps]", context)
        if schedule.dtype != torch.float32 or schedule.device != x0.device or not 1 <= schedule.numel() < 2**31:
            raise InvalidArgument(
                f"{NAME}: schedule must be float32 on {x0.device} with 1 to 2^31 - 1 steps, "
                f"got {schedule.dtype} on {schedule.device} with {schedule.numel()}"
            )
    check_shape(NAME, "seed", seed, [1], "[1]", context)
    if seed.dtype != torch.int64 or seed.device != x0.device:
        raise InvalidArgument(f"{NAME}: seed must be int64 on {x0.device}, got {seed.dtype} on {seed.device}")
