"""Inputs whose elements lie more than 2^31 elements apart: every kernel counts in 64 bits.

The tensors are views with huge strides into memory that is reserved, and touched only where the view lies.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minidiff_fast import backend, ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ["triton"] if DEVICE == "cuda" else ["triton", "native"]
FAR = 2**31 + 48
"""Elements between two conditions."""


def far_apart(x: Tensor) -> Tensor:
    """A copy of x [2, ...] whose second condition lies FAR elements behind the first."""
    assert x.shape[0] == 2
    room = torch.empty(FAR + x[0].numel(), dtype=x.dtype, device=x.device)
    view = torch.as_strided(room, x.shape, (FAR, *x[0].contiguous().stride()))
    view.copy_(x)
    return view


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def attention(q, k, v, impl):
    return ops.broadcast_attention(q, k, v, q[:, :, :, :1], q[:, :, :, :1] * 0.5, impl=impl)


def modulate(x, shift, own_scale, impl):
    return ops.broadcast_modulate(x, shift=shift, own_scale=own_scale, norm="layer", activation="mish", impl=impl)


def linear(x, g, weight, impl):
    return ops.broadcast_linear(x, g, weight, activation="silu", impl=impl)


CASES = {
    "broadcast_attention": (attention, [(2, 3, 4, 2, 16), (2, 5, 1, 16), (2, 5, 1, 16)], 3),
    "broadcast_modulate": (modulate, [(2, 3, 4, 16), (2, 16), (2, 3, 16)], 3),
    "broadcast_linear": (linear, [(2, 3, 16), (2, 8), (8, 24)], 2),
}
"""Op -> its call, the shapes of its inputs, how many of them have a condition axis."""


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("op", CASES)
def test_conditions_far_apart(op, impl):
    call, shapes, with_conditions = CASES[op]
    dtype = torch.bfloat16 if impl == "native" or DEVICE == "cuda" else torch.float16
    reason = backend.why_not(backend.REGISTRY[op], impl, torch.device(DEVICE), dtype)
    if reason is not None:
        pytest.skip(reason)
    near = [draw(*shape, dtype=dtype).requires_grad_() for shape in shapes]
    want = call(*near, impl)
    gradients = torch.autograd.grad(want.float().square().sum(), near)
    for i in range(with_conditions):  # one at a time: each reserves four gigabytes
        inputs = [x.detach() for x in near]
        inputs[i] = far_apart(inputs[i])
        inputs = [x.requires_grad_() for x in inputs]
        got = call(*inputs, impl)
        assert torch.equal(got, want), f"input {i}"
        for a, b in zip(torch.autograd.grad(got.float().square().sum(), inputs), gradients, strict=True):
            assert torch.equal(a, b), f"gradients with input {i} far apart"
