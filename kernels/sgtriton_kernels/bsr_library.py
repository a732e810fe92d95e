"""A product with a block-sparse matrix in the library's own way.

It takes small blocks well, and it is one call, which counts where weights are few. The library's
matrix refers to the values where they lie, so that it is made once and follows their changes.
"""

from __future__ import annotations

import warnings
import weakref

import torch

from .block_products import BlockIndex

# Measured on two AVX2 cores beside the batched products: 128x128 to 4096x1024, half to 5 % open
_SMALL = 32  # side of a block, below which it is faster
_LARGE = 64  # side of a block, above which it is not
_WEIGHTS = 150_000  # up to which it is in between; half as many for a few rows
_SHARED = 8  # block rows, below which its threads share them unevenly
_FEW = 4  # rows of x
_TINY = 16  # side of a block, below which it is faster for any number of rows, but from
_MANY = 256  # so many on, where blocks are
_DENSE = 0.3  # so dense
_ONE_THREAD = 1 << 16  # weights up to which the product with a vector, in one thread, is faster

_HAS_LIBRARY = torch.backends.mkl.is_available()


def library_serves(shape: tuple[int, int], block: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether the library computes such a product on a CPU."""
    (n, k), (bn, bk) = shape, block
    whole = n % bn == 0 and k % bk == 0
    return _HAS_LIBRARY and bn == bk and bn > 1 and whole and dtype.itemsize >= 4


def library_is_faster(
    m: int, block: tuple[int, int], block_rows: int, nnz: int, density: float
) -> bool:
    """Whether ``m`` rows are multiplied faster by the library than in the other ways."""
    side, weights = block[0], nnz * block[0] * block[1]
    if not nnz or m < 1:
        return False
    if side < _TINY:
        return m < _MANY or density < _DENSE
    if side >= _SMALL and block_rows < _SHARED:
        return False
    if m == 1:
        return side < _SMALL or (side <= _LARGE and weights <= _WEIGHTS)
    return m <= _FEW and side <= _LARGE and (side < _SMALL or 2 * weights <= _WEIGHTS)


def library_matrix(values: torch.Tensor, index: BlockIndex, shape: tuple[int, int]) -> torch.Tensor:
    """The matrix as the library takes it.

    Args:
        values: ``[blocks, bn, bk]``, contiguous, in the order of ``index``, with which the matrix
            is kept.
        index: where they lie.
        shape: ``(N, K)``.
    """
    kept = index.library_matrix
    if kept is None or kept[0]() is not values or kept[1] != values.data_ptr():
        # no reference: values that are computed would keep the graph behind them
        kept = weakref.ref(values), values.data_ptr(), _make(values, index, shape)
        index.library_matrix = kept
    return kept[2]


def library_product(
    x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None, weights: int
) -> torch.Tensor:
    """``x [M, K] @ matrix^T + bias``, ``[M, N]``, contiguous; the matrix holds so many weights."""
    is_row = x.shape[0] == 1
    if is_row and weights <= _ONE_THREAD:
        row = x.reshape(-1)
        out = torch.mv(matrix, row) if bias is None else torch.addmv(bias, matrix, row)
        return out.unsqueeze_(0)  # no view: autograd allows no writing to a function's views
    columns = x.T
    out = torch.mm(matrix, columns) if bias is None else torch.addmm(bias[:, None], matrix, columns)
    return out.t_() if is_row else out.T.clone(memory_format=torch.contiguous_format)


def _make(values: torch.Tensor, index: BlockIndex, shape: tuple[int, int]) -> torch.Tensor:
    starts, columns = index.starts.int(), index.columns.int()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that sparse tensors are in beta
        return torch.sparse_bsr_tensor(
            starts, columns, values.detach(), shape, check_invariants=False
        )
