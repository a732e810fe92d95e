"""Merge the blocks of a block-sparse matrix into larger ones, zeros where a part is not stored.

A kernel that wants larger blocks than the gates covered is served by the merged matrix: the same
weights, stored with some of the zeros between them.
"""

from __future__ import annotations

import torch

from .bsr import BlockSparse, checked_sizes


def merge_blocks(
    w: BlockSparse,
    block: tuple[int, int],
    *,
    groups: int = 1,
    taps: int = 1,
    shape: tuple[int, int] | None = None,
) -> BlockSparse:
    """Store a matrix in larger blocks, each made of whole blocks of ``w``.

    Waits for the device once, for the number of merged blocks: memory for them must be allocated.

    Args:
        w: the matrix.
        block: sides of the merged blocks: multiples of ``w.block``, or such that one block covers
            all rows of a group (all columns of a tap).
        groups: parts of equal size into which the rows fall; no merged block crosses them.
        taps: likewise of the columns.
        shape: of the merged matrix, whose groups and taps may be padded otherwise; default: that of
            ``w``.

    Returns:
        The same weights, differentiable in ``w.values``. What ``w`` stores beyond a ragged edge is
        stored beyond it.

    Raises:
        ValueError: a block that is not made of whole blocks; groups or taps that cut one; a shape
            that does not hold them.
    """
    shape = shape or w.shape
    rows = _Side("rows", w.block_rows, groups, w.block[0], block[0], shape[0])
    cols = _Side("columns", w.block_cols, taps, w.block[1], block[1], shape[1])
    shape, block = checked_sizes(shape, block)
    to_row, in_row = rows.place(w.block_row.long())
    to_col, in_col = cols.place(w.col[: w.nnz].long())
    taken = torch.zeros(rows.merged, cols.merged, dtype=torch.bool, device=w.values.device)
    taken[to_row, to_col] = True
    index = taken.view(-1).cumsum(0).view_as(taken) - 1
    row, col = taken.nonzero(as_tuple=True)
    (m, bn), (n, bk) = (rows.whole, w.block[0]), (cols.whole, w.block[1])
    values = w.values.new_zeros(len(row), m, bn, n, bk)
    values.transpose(2, 3).index_put_((index[to_row, to_col], in_row, in_col), w.values)
    # a block that covers all of a group or tap ends where the weights do
    values = values.view(len(row), m * bn, n * bk)[:, : block[0], : block[1]].contiguous()
    return BlockSparse._from_list(values, row, col, shape)


class _Side:
    """How blocks are merged along rows or columns."""

    def __init__(self, name: str, blocks: int, parts: int, old: int, new: int, size: int) -> None:
        if parts < 1 or blocks % parts:
            raise ValueError(f"{blocks} block {name} cannot fall into {parts} equal parts")
        self.per_part = blocks // parts
        self.whole = -(-new // old)  # blocks that a merged one holds
        if new < 1 or (new % old and self.whole != self.per_part):
            raise ValueError(f"merged blocks must hold whole blocks, got {new} {name} of {old}")
        self.merged_per_part = -(-self.per_part // self.whole)
        self.merged = parts * self.merged_per_part
        needed = self.merged * new  # parts are padded to whole blocks; a single one may be ragged
        if size > needed or size <= needed - new or (parts > 1 and size < needed):
            raise ValueError(f"the shape must hold {needed} {name} in {parts} parts, got {size}")

    def place(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of blocks the merged block, and the place in it."""
        part, inside = index // self.per_part, index % self.per_part
        to = part * self.merged_per_part + inside // self.whole
        return to, inside % self.whole
