"""Which programs a product with a random pattern starts, and when the last of them ends."""

from __future__ import annotations

import functools
import heapq
import random
from collections import Counter
from dataclasses import dataclass, replace

from sgtriton_kernels.cell import Cell
from sgtriton_kernels.tiles import BsrTile


@functools.cache
def _order(block_rows: int, block_cols: int) -> tuple[int, ...]:
    """The block row of each block, in the order in which a random pattern stores more and more."""
    order = [row for row in range(block_rows) for _ in range(block_cols)]
    random.Random(0).shuffle(order)
    return tuple(order)


@functools.cache
def row_lengths(
    block_rows: int, block_cols: int, nnz: int, longest_first: bool = True
) -> tuple[int, ...]:
    """How many of ``nnz`` random blocks each block row has."""
    found = Counter(_order(block_rows, block_cols)[:nnz])
    lengths = [found[row] for row in range(block_rows)]
    return tuple(sorted(lengths, reverse=True) if longest_first else lengths)


@functools.cache
def makespan(
    lengths: tuple[int, ...], parts: int, split: int, tiles_m: int, processors: int
) -> int:
    """When the last program ends, in blocks, as the kernel's order hands them out."""
    free = {0: processors}  # from when on how many are
    times = [0]  # a heap
    for length in lengths:
        share = -(-length // split)
        pieces = [max(min(share, length - i * share), 0) for i in range(split)]
        for piece in pieces * parts:
            left = tiles_m if piece else 0
            while left:  # there are many, all as long
                now = times[0]
                taken = min(left, free[now])
                if taken == free[now]:
                    heapq.heappop(times)
                    del free[now]
                else:
                    free[now] -= taken
                if now + piece not in free:
                    heapq.heappush(times, now + piece)
                free[now + piece] = free.get(now + piece, 0) + taken
                left -= taken
    return max(free)


@dataclass(frozen=True)
class Programs:
    """A launch's programs, with the tile as if it were the forward pass's.

    ``last`` is when the last one ends, in steps of ``depth`` elements; ``even`` and ``waves`` when
    it would if multiprocessors could share a program, and if all were as long.
    """

    tile: BsrTile
    rows: int
    depth: int
    even: float
    waves: float
    last: int
    lists: float  # of programs that read the same of what is read again
    list_programs: float


def programs_of(cell: Cell, tile: BsrTile, processors: int) -> Programs:
    """Programs of a pass of ``bsr_linear`` with a tile that is cut to the block."""
    if cell.op == "bsr_linear dvalues":
        return sampled(cell, tile, processors)
    return multiplied(cell, tile, processors, cell.op == "bsr_linear dx")


def multiplied(cell: Cell, tile: BsrTile, processors: int, transposed: bool) -> Programs:
    """Programs of ``x W^T``, transposed of ``dy W``: one for a part of a block row and rows."""
    (out, red), (bn, bk), size = (cell.block_rows, cell.block_cols), cell.block, cell.N
    if transposed:
        (out, red), (bn, bk), size = (red, out), (bk, bn), cell.K
        tile = replace(tile, BLOCK_N=tile.BLOCK_K, BLOCK_K=tile.BLOCK_N)
    parts, tiles_m = bn // tile.BLOCK_N, -(-cell.M // tile.BLOCK_M)
    lengths = row_lengths(out, red, cell.nnz, not transposed)
    programs = out * parts * tile.split * tiles_m
    return Programs(
        tile,
        rows=cell.M,
        depth=bk,
        even=cell.nnz * parts * tiles_m / processors,
        waves=-(-programs // processors) * cell.nnz / (out * tile.split),
        last=makespan(lengths, parts, tile.split, tiles_m, processors),
        lists=size / tile.BLOCK_N,
        list_programs=tiles_m,
    )


def sampled(cell: Cell, tile: BsrTile, processors: int) -> Programs:
    """Programs of ``dy^T x`` at the stored blocks: one for a part of a block and of the rows."""
    (bn, bk), split = cell.block, tile.split
    parts = (bn // tile.BLOCK_N) * (bk // tile.BLOCK_K)
    steps = -(-cell.M // tile.BLOCK_M)
    rounds = -(-cell.nnz * parts * split // processors)
    last = rounds * -(-steps // split)
    return Programs(
        replace(tile, BLOCK_M=tile.BLOCK_N, BLOCK_N=tile.BLOCK_K, form="x_left"),
        rows=tile.BLOCK_N,
        depth=tile.BLOCK_M,
        even=cell.nnz * parts * steps / processors,
        waves=last,
        last=last,
        lists=cell.block_cols,
        list_programs=parts * cell.nnz / cell.block_cols,
    )
