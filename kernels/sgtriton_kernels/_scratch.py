"""Memory that calls of one thread use again: on a CPU, fresh pages cost more than the arithmetic.

It keeps as much as the largest call asked for, once for each dtype.
"""

from __future__ import annotations

import math
import threading

import torch

_kept = threading.local()


def scratch(count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``[count]`` elements, valid until the next call in this thread; on a CPU they are kept."""
    if device.type != "cpu":
        return torch.empty(count, dtype=dtype, device=device)
    buffer = _kept.__dict__.get(dtype)
    if buffer is None or buffer.numel() < count:
        with torch.inference_mode(False):  # training writes to what inference leaves behind
            buffer = _kept.__dict__[dtype] = torch.empty(count, dtype=dtype)
    return buffer if buffer.numel() == count else buffer[:count]


def scratch_parts(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, device: torch.device
) -> list[torch.Tensor]:
    """Several tensors side by side, as :func:`scratch` gives one."""
    counts = [math.prod(shape) for shape in shapes]
    parts = scratch(sum(counts), dtype, device).split(counts)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def fill_scratch(value: float) -> None:
    """Overwrite what this thread keeps: for checks that a call reads nothing of the one before."""
    for buffer in _kept.__dict__.values():
        buffer.fill_(value)
