"""Random patterns of blocks, for products that stand for those of a model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def random_pattern(
    grid: Sequence[int], closed: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Which blocks are open, at random places.

    Args:
        grid: block rows and block columns; of a convolution its gates' shape.
        closed: how many are not.
        generator: of the CPU.

    Returns:
        ``grid`` bool, on the CPU.
    """
    # whatever device is PyTorch's default
    order = torch.randperm(math.prod(grid), generator=generator, device="cpu")
    is_open = torch.ones(len(order), dtype=torch.bool, device="cpu")
    is_open[order[:closed]] = False
    return is_open.view(*grid)
