"""Calls of an op's kernels past the dispatcher, in eager mode.

A custom op costs several times what a short kernel takes: the dispatcher wraps, checks and hands on every argument,
forward and backward. Where nobody looks at the dispatcher, the same functions run in a plain autograd.Function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def watched(*tensors: Tensor | None) -> bool:
    """Whether the op itself has to be called: under compilation, tracing, export, a dispatch mode, a transform, or
    with a tensor subclass."""
    return (
        torch.compiler.is_compiling()
        or is_in_torch_dispatch_mode()
        or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or any(tensor is not None and type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in tensors)
    )


def eager_function(
    name: str,
    forward: Callable[..., Any],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """What a custom op does in eager mode, given the functions it is registered with; differentiable once.

    ``backward`` is called as ``backward(ctx, *gradients)``; gradients that nobody asked for come as None.
    """

    def run(ctx: Any, *inputs: Any) -> Any:  # with a separate setup_context torch reads the signature at every call
        output = forward(*inputs)
        ctx.set_materialize_grads(False)
        setup_context(ctx, inputs, output)
        return output

    members = {"forward": staticmethod(run), "backward": staticmethod(once_differentiable(backward))}
    function: Any = type(name, (torch.autograd.Function,), members)
    return function.apply
