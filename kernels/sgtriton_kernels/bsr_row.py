"""One row of ``x`` by a block-sparse matrix, in the library's own product of such a matrix.

Where weights are few a call costs as much as the arithmetic, and this is one call. The library's
matrix refers to the values where they lie, so that it is made once and follows their changes.
"""

from __future__ import annotations

import warnings

import torch

from .block_products import BlockIndex

# Measured on two AVX2 cores beside the batched products: 128x128 to 4096x1024, half to 5 % open
_SMALL = 32  # side of a block, below which it is faster
_LARGE = 64  # side of a block, above which it is not
_WEIGHTS = 150_000  # up to which it is in between
_ONE_THREAD = 1 << 16  # weights up to which the product with a vector, in one thread, is faster

_HAS_LIBRARY = torch.backends.mkl.is_available()


def library_matrix(
    values: torch.Tensor, index: BlockIndex, shape: tuple[int, int]
) -> torch.Tensor | None:
    """The matrix as the library takes it; ``None`` where that is not faster, or not served.

    Args:
        values: ``[blocks, bn, bk]``, in the order of ``index``, with which the matrix is kept.
        index: where they lie.
        shape: ``(N, K)``.
    """
    kept = index.library_matrix
    if kept is not None and kept[0] is values and kept[1] == values.data_ptr():
        return kept[2]
    matrix = _make(values, index, shape) if _is_faster(values, index, shape) else None
    index.library_matrix = values, values.data_ptr(), matrix
    return matrix


def multiply_row(
    x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None, weights: int
) -> torch.Tensor:
    """``x [1, K] @ matrix^T + bias``, ``[1, N]``; of a matrix that holds so many weights."""
    if weights <= _ONE_THREAD:
        row = x.reshape(-1)
        out = torch.mv(matrix, row) if bias is None else torch.addmv(bias, matrix, row)
        return out.unsqueeze_(0)  # no view: autograd allows no writing to a function's views
    column = x.T
    out = torch.mm(matrix, column) if bias is None else torch.addmm(bias[:, None], matrix, column)
    return out.t_()


def _is_faster(values: torch.Tensor, index: BlockIndex, shape: tuple[int, int]) -> bool:
    (rows, columns), (count, bn, bk) = index.grid, values.shape
    return (
        _HAS_LIBRARY
        and values.is_cpu
        and values.is_contiguous()
        and bn == bk
        and 1 < bn <= _LARGE
        and count > 0
        and shape == (rows * bn, columns * bk)
        and (bn < _SMALL or count * bn * bk <= _WEIGHTS)
    )


def _make(values: torch.Tensor, index: BlockIndex, shape: tuple[int, int]) -> torch.Tensor:
    starts, columns = index.starts.int(), index.columns.int()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that sparse tensors are in beta
        return torch.sparse_bsr_tensor(
            starts, columns, values.detach(), shape, check_invariants=False
        )
