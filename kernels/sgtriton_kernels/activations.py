"""Activations that products apply to their sums: by name, in PyTorch and inside a kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ._triton import tl, triton

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}


def check_activation(activation: str | None) -> str:
    """The name of an activation, ``"none"`` for ``None``.

    Raises:
        ValueError: there is none of that name.
    """
    name = "none" if activation is None else activation
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be None or one of {tuple(ACTIVATIONS)[1:]}, got "
                         f"{name!r}")  # fmt: skip
    return name


@triton.jit
def _sigmoid(y):
    e = tl.exp(-tl.abs(y))  # never overflows
    return tl.where(y >= 0, 1.0, e) / (1 + e)


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        y = tl.where(y < 0, 0.0, y)  # NaN stays
    elif ACTIVATION == "gelu":
        y = 0.5 * y * (1 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(u)) = sigmoid(2 u), u = sqrt(2 / pi) * (y + 0.044715 y^3)
        y = y * _sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    elif ACTIVATION == "silu":
        y = y * _sigmoid(y)
    return y
