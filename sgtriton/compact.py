"""A weight without its dead rows and columns, and the output with them filled in again.

    W [rows, cols] -> W[alive rows][:, alive cols]        dead: all zeros

A convolution's rows are its output channels, its columns the input channels.
"""

from __future__ import annotations

import torch


def compact(
    weight: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Drop the dead rows and columns of a weight.

    Args:
        weight: ``[O, I, *taps]``. A NaN is no 0.

    Returns:
        weight: ``[alive rows, alive columns, *taps]``; where a row is dead one row more, of zeros.
        cols: ``[alive columns]`` int64, or ``None`` where none is dead.
        rows: ``[O]`` int64, where each row of the output lies in the product's; or ``None``.
    """
    alive = (weight != 0).flatten(2).any(2) if weight.dim() > 2 else weight != 0
    row_alive, col_alive = alive.any(1), alive.any(0)
    cols = rows = None
    if not col_alive.all():
        cols = col_alive.nonzero()[:, 0]
        cols = cols if len(cols) else cols.new_zeros(1)  # a product of something, if only of zeros
        weight = weight.index_select(1, cols)
    if not row_alive.all():
        count = int(row_alive.sum())
        rows = torch.where(row_alive, row_alive.cumsum(0) - 1, count)
        kept = weight.index_select(0, row_alive.nonzero()[:, 0])
        weight = torch.cat([kept, weight.new_zeros(1, *weight.shape[1:])])
    return weight.contiguous(), cols, rows


def spread(
    out: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor | None, dim: int
) -> torch.Tensor:
    """Put a product's rows (along ``dim``, negative) where they belong, and add the bias.

    Measured on two AVX2 cores at 1,024 outputs: gathering takes 0.5 of the time of scattering into
    what holds the bias for one row of x, 0.6 to 1.9 at 32 and 128, 1.2 to 3.3 (0.16 ms) at 512. The
    bias is added in place: a second fresh output was never faster, and in some runs 1.8 ms slower.
    """
    out = out.index_select(dim, rows)
    if bias is not None:
        out += bias.to(out.dtype).view(-1, *[1] * (-1 - dim))
    return out
