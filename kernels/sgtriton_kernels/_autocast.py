"""What autocast does to the inputs of an op, for ops of our own."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch

_NOTHING = nullcontext()  # one for all: making it costs more than entering it
MaybeTensor = TypeVar("MaybeTensor", torch.Tensor, torch.Tensor | None)


def cast_like_autocast(t: MaybeTensor, dtype: torch.dtype) -> MaybeTensor:
    """``t`` in ``dtype``; fp64 and integers stay, as does ``None``."""
    if t is None or t.dtype == torch.float64 or not t.is_floating_point():
        return t
    return t.to(dtype)


def cast_inputs(device: torch.device, *tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """The tensors as :func:`cast_like_autocast` gives them where autocast is on for ``device``."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return tensors
    dtype = torch.get_autocast_dtype(device.type)
    return tuple(cast_like_autocast(t, dtype) for t in tensors)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """For what comes after an op's entry, which has cast: autocast would round the sums."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return _NOTHING
