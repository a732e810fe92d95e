"""Gradients of a product with a block-sparse weight, each by a given candidate.

Those of Triton's kernels; the ``torch`` implementation has one way for each.
"""

from __future__ import annotations

import torch

from ._autocast import without_autocast
from .bsr import BlockSparse, take_blocks
from .bsr_product import bsr_linear_dvalues, bsr_linear_dx
from .candidate import Candidate


def dense_weight(values: torch.Tensor, w: BlockSparse) -> torch.Tensor:
    """``[N, K]``, the weight of these values, zeros filled in; ``w`` gives shape and index."""
    return BlockSparse._from_index(values, w.index_tensors, w.shape).to_dense()


def linear_dx(
    dy: torch.Tensor, values: torch.Tensor, w: BlockSparse, candidate: Candidate
) -> torch.Tensor:
    """Compute ``dy @ W``; of ``w`` only shape and index are read.

    Args:
        dy: ``[M, N]`` fp32 | fp16 | bf16.
        values: ``[nnz, bn, bk]``, dtype of ``dy``, contiguous.
        candidate: one of the pass.

    Returns:
        ``[M, K]``, dtype of ``dy``.
    """
    if candidate.tile is not None:
        return bsr_linear_dx(dy, values, w.ccol, w.row, w.perm, w.shape[1], candidate.tile)
    with without_autocast(dy.device):
        return dy @ dense_weight(values, w)


def linear_dvalues(
    dy: torch.Tensor, x: torch.Tensor, values: torch.Tensor, w: BlockSparse, candidate: Candidate
) -> torch.Tensor:
    """Compute ``dy^T x`` at the stored blocks; of ``w`` only shape and index are read.

    Args:
        dy, x: ``[M, N]`` and ``[M, K]`` fp32 | fp16 | bf16.
        values: as for :func:`linear_dx`; only their shape counts.
        candidate: one of the pass.

    Returns:
        ``[nnz, bn, bk]``, dtype of ``dy``, zero beyond a ragged edge.
    """
    if candidate.tile is not None:
        return bsr_linear_dvalues(dy, x, values, w.row, w.col, w.perm, candidate.tile)
    with without_autocast(dy.device):
        return take_blocks(dy.T @ x, w.block_row.long(), w.col[: w.nnz].long(), w.block)
