"""This package's ops: their namespace (a Hub build swaps in a unique one), and how they are called.

A call through PyTorch's dispatcher of an op that is written in Python costs about 25 us (measured),
as much as a small layer's arithmetic. Whoever looks at the ops that a program calls does so with a
mode, a transform, a tracer or a tensor class of its own; where none is there, the function behind
an op may be called in its place. The profiler then shows the autograd function instead of the op,
and a kernel that someone else registers for the op is not reached.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

_NAMESPACE = "sgtriton_kernels"
_PLAIN = (torch.Tensor, torch.nn.Parameter, type(None))

ops = getattr(torch.ops, _NAMESPACE)
_library = torch.library.Library(_NAMESPACE, "FRAGMENT")


def add_op_namespace_prefix(name: str) -> str:
    return f"{_NAMESPACE}::{name}"


def register_op(
    name: str, function: Callable, fake: Callable, autograd: Callable | None = None
) -> Any:
    """Register an op with the parts that ``torch.library.custom_op`` is made of.

    Its own checks and wrappers cost as much as a small layer (measured: 160 of 470 us, forward and
    backward).

    Args:
        name: of the op.
        function: computes it; changes nothing; its annotations give the schema.
        fake: makes results without data.
        autograd: called with the op's arguments where autograd is active.

    Returns:
        The op.
    """
    _library.define(name + torch.library.infer_schema(function, mutates_args=()))
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(add_op_namespace_prefix(name), fake, lib=_library)
    if autograd is not None:
        _library.impl(name, autograd, "Autograd")
    return getattr(ops, name).default


def is_watched(*tensors: torch.Tensor | None) -> bool:
    """Whether a call with these tensors, the first of them no ``None``, must be seen as an op's."""
    if torch.compiler.is_compiling():
        return True
    for t in tensors:
        if type(t) not in _PLAIN:
            return True
    return bool(
        tensors[0].is_meta
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
        or forward_ad._current_level >= 0
    )


def needs_graph(tensors: Sequence[torch.Tensor | None]) -> bool:
    """Whether autograd has to see what is computed of these tensors, in either direction."""
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def grads_with_graph(
    out: Callable[[], torch.Tensor],
    inputs: Sequence[torch.Tensor],
    needs: Sequence[bool],
    dout: torch.Tensor,
) -> list[torch.Tensor | None]:
    """Gradients of ``inputs``, those that are needed, that can be differentiated again.

    Args:
        out: computes the op's result by differentiable ops; not called where nothing is needed.
        inputs, needs: of what, and whether.
        dout: the result's gradient.
    """
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    grads = iter(torch.autograd.grad(out(), wanted, dout, create_graph=True) if wanted else ())
    return [next(grads) if need else None for need in needs]


def is_capturing(device: torch.device) -> bool:
    """Whether a graph is captured on a card, which nothing may wait for then."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
