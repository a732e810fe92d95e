"""Product with a block-sparse weight in library calls: the ``torch`` implementation."""

from __future__ import annotations

import torch

from .activations import ACTIVATIONS
from .block_products import BlockIndex, multiply, multiply_bwd
from .bsr_library import library_matrix, library_product
from .candidate import Candidate


def bsr_linear_torch(
    x2: torch.Tensor,
    values: torch.Tensor,
    index: BlockIndex,
    bias: torch.Tensor | None,
    residual2: torch.Tensor | None,
    n: int,
    activation: str,
    candidate: Candidate,
) -> torch.Tensor:
    """``act(x2 [M, K] @ W^T + bias + residual2)`` in the dtype of ``x2``, contiguous."""
    k, dtype = x2.shape[1], x2.dtype
    wide = dtype
    if dtype.itemsize < 4:
        wide = torch.float32
        x2, values = x2.to(wide), values.to(wide)
        bias = None if bias is None else bias.to(wide)
    if candidate.way == "library":
        matrix = library_matrix(values, index, (n, k))
        out = library_product(x2, matrix, bias, values.numel())
    else:
        weights = _inside(values, index, n, k).transpose(1, 2)
        out = multiply(x2, weights, index, n, bias, candidate.way, candidate.elements)
    if residual2 is not None:
        out += residual2
    if activation != "none":
        out = ACTIVATIONS[activation](out)
    return out if dtype == wide else out.to(dtype)


def bsr_linear_bwd_torch(
    dy2: torch.Tensor,
    x2: torch.Tensor,
    values: torch.Tensor,
    index: BlockIndex,
    need_dx: bool,
    need_dvalues: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """``dx`` and ``dvalues`` of a product without activation; 0 beyond a ragged edge."""
    wide = torch.promote_types(dy2.dtype, torch.float32)
    weights = None
    if need_dx:
        values_wide = _inside(values.to(wide), index, dy2.shape[1], x2.shape[1])
        weights = values_wide.transpose(1, 2)
    _, bn, bk = values.shape
    x = x2 if need_dvalues else None
    dx, d = multiply_bwd(dy2, x, weights, index, (bk, bn), x2.shape[1])
    return dx, None if d is None else d.to(values.dtype)


def _inside(values: torch.Tensor, index: BlockIndex, n: int, k: int) -> torch.Tensor:
    """The values with 0 beyond a ragged edge, where anything may be stored."""
    (rows, columns), (_, bn, bk) = index.grid, values.shape
    over_n, over_k = rows * bn - n, columns * bk - k
    if not over_n and not over_k:
        return values
    values = values.clone()
    if over_n:
        values[index.rows == rows - 1, bn - over_n :] = 0
    if over_k:
        values[index.columns == columns - 1, :, bk - over_k :] = 0
    return values
