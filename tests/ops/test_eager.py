"""The ops past the dispatcher in eager mode, and through it wherever somebody looks at it."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minidiff_fast.ops import broadcast_attention, broadcast_modulate, level2_noise
from minidiff_fast.ops._eager import watched

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Names(TorchDispatchMode):
    """Collects the names of our ops that pass by."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "minidiff_fast":
            self.seen.append(func.name().split("::")[1])
        return func(*args, **(kwargs or {}))


def tensors():
    generator = torch.Generator().manual_seed(1)
    shapes = {"q": (2, 3, 2, 2, 8), "k": (2, 4, 1, 8), "v": (2, 4, 1, 8)}
    return {n: torch.randn(s, generator=generator).to(DEVICE).requires_grad_() for n, s in shapes.items()}


def test_a_dispatch_mode_sees_the_ops_and_the_numbers_are_the_same():
    inputs = tensors()
    direct = broadcast_attention(**inputs, impl="triton")
    gradients = torch.autograd.grad(direct.square().sum(), list(inputs.values()))
    with Names() as names:
        seen = broadcast_attention(**inputs, impl="triton")
        again = torch.autograd.grad(seen.square().sum(), list(inputs.values()))
    assert names.seen == ["broadcast_attention_fwd", "broadcast_attention_bwd"]
    for a, b in zip((direct, *gradients), (seen, *again), strict=True):
        assert torch.equal(a, b)
    x = torch.randn(2, 3, 4, 8, device=DEVICE)
    seed, schedule = torch.tensor([3], device=DEVICE), torch.linspace(0.9, 0.1, 5, device=DEVICE)
    with Names() as names:
        broadcast_modulate(x, shift=x[:, 0, 0], impl="triton")
        level2_noise(x[:, 0], 2, schedule=schedule, seed=seed, impl="triton")
    assert names.seen == ["broadcast_modulate_fwd", "level2_noise_fwd"]


def test_what_counts_as_watched():
    x = torch.randn(3)

    class Subclass(torch.Tensor):
        pass

    assert not watched(x, None, torch.nn.Parameter(x))
    assert watched(x, x.as_subclass(Subclass))
    with Names():
        assert watched(x)
    inside = []
    torch.func.grad(lambda y: inside.append(watched(y)) or y.sum())(x)
    assert inside == [True]


def test_a_second_derivative_is_refused():
    inputs = tensors()
    out = broadcast_attention(**inputs, impl="triton").square().sum()
    (dq,) = torch.autograd.grad(out, inputs["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()
