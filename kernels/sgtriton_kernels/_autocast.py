"""What autocast does to the inputs of an op, for ops of our own."""

from __future__ import annotations

from typing import TypeVar

import torch

MaybeTensor = TypeVar("MaybeTensor", torch.Tensor, torch.Tensor | None)


def cast_like_autocast(t: MaybeTensor, dtype: torch.dtype) -> MaybeTensor:
    """``t`` in ``dtype``; fp64 and integers stay, as does ``None``."""
    if t is None or t.dtype == torch.float64 or not t.is_floating_point():
        return t
    return t.to(dtype)
