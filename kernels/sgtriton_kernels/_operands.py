"""How a launcher describes a matrix to its kernel."""

from __future__ import annotations

import torch


def row_strides(t: torch.Tensor) -> tuple[int, int]:
    """Of a matrix; the one between rows is free where there is one row only."""
    return (t.stride(0) if len(t) > 1 else t.shape[1]), t.stride(1)


def is_aligned(t: torch.Tensor) -> bool:
    """Whether the rows of a matrix can be read in wide pieces."""
    between, inside = row_strides(t)
    return inside == 1 and between % 16 == 0 and t.shape[1] % 16 == 0
