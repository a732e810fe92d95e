"""Products with blocks of a matrix in library calls, for blocks of any sides.

    out[:, r] = sum over the blocks (r, c) of x[:, c] @ weights[block]

``x`` is cut into columns of blocks, ``out`` likewise. Several ways to compute it, whichever should
cost least:

- *batches*: what the blocks meet is gathered, multiplied by one batched product and added up by
  block row, some megabytes at a time. Few calls, each over many blocks: for few rows of ``x``.
- *layers*: the first block of each block row, then the second, and so on: a batched product adds
  to what is there, so that no products are written. Block rows are sorted by length, so that a
  layer is the beginning of them. For many blocks and rows of ``x``.
- *loop*: a product for each block, straight into ``out``. For large blocks and many rows of ``x``,
  beside which a call costs little.
- *rows*, *columns*: one product for each block row or block column, where there are few, of blocks
  that are narrow or flat.
- *dense*: one product with the whole matrix, where blocks are too small to be worth gathering.

Memory is used again from call to call: on a CPU, fresh pages cost more than the arithmetic.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F

from ._scratch import scratch_parts
from .choices import Choices

# Measured on two AVX2 cores: blocks of 16x16 to 64x64, weights of 1024x1024 to 4096x1024.
ELEMENTS = 1 << 20  # that a batch gathers and writes, or sums of a band that layers add to
AT_ONCE = 2  # times as many are one batch, which costs fewer calls
_BAND = 512  # rows of x at a time, at the most
_LOOP = 1 << 21  # multiply-adds of a block from which a call for each pays
_LAYER = 110_000  # elements of the sums that a layer adds to, from which layers pay
_BAG = 1 << 13  # longest row that the bag kernel adds up: it is compiled for each length
_FEW = 8  # block rows or columns up to which, and rows of x from which on, one product for each
_NARROW = 16  # is faster; and sides of a block for which that holds
_REUSE = 8  # products per element moved, below which (and from 16 rows on) dense is faster
_GATHERED = 1 << 20  # elements of x that backward gathers at a time


class BlockIndex:
    """Where blocks lie in a grid, row by row; what follows from that is kept once it was asked for.

    Args:
        rows, columns: ``[blocks]`` int64. Block row of each block, not falling, and block column.
        grid: block rows and block columns.
        starts: ``[block rows + 1]`` int64, where that is known.
    """

    def __init__(
        self,
        rows: torch.Tensor,
        columns: torch.Tensor,
        grid: tuple[int, int],
        starts: torch.Tensor | None = None,
    ):
        self.rows, self.columns, self.grid = rows, columns, grid
        if starts is not None:
            self.starts = starts
        self._batches: dict[int, list[tuple[int, int, torch.Tensor, torch.Tensor]]] = {}
        # weak reference to values, their address, the matrix made of them; see :mod:`.bsr_library`
        self.library_matrix: tuple[Any, int, torch.Tensor] | None = None
        self.choices = Choices()

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def starts(self) -> torch.Tensor:
        """``[block rows + 1]`` int64. Where each block row begins, and the end of the last."""
        lengths = torch.bincount(self.rows, minlength=self.grid[0])
        return F.pad(lengths.cumsum(0), (1, 0))

    @cached_property
    def bounds(self) -> list[int]:
        """``starts`` as numbers."""
        return self.starts.tolist()

    @cached_property
    def longest(self) -> int:
        """Blocks of the longest block row."""
        return max(b - a for a, b in itertools.pairwise(self.bounds))

    @cached_property
    def counting(self) -> torch.Tensor:
        """0, 1, 2 and so on, to the number of blocks."""
        return torch.arange(len(self), device=self.rows.device)

    @cached_property
    def parts(self) -> list[slice]:
        """The blocks of each block row."""
        return [slice(a, b) for a, b in itertools.pairwise(self.bounds)]

    @cached_property
    def column_list(self) -> list[int]:
        """``columns`` as numbers."""
        return self.columns.tolist()

    @cached_property
    def layers(self) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """Place of each block row in the order of their lengths; blocks and columns by layer."""
        order = torch.argsort(self.starts.diff(), descending=True, stable=True)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=order.device)
        depth = self.counting - self.starts[self.rows]
        blocks = torch.argsort(depth * len(order) + rank[self.rows])
        counts = torch.bincount(depth).tolist()
        split = zip(blocks.split(counts), self.columns[blocks].split(counts), strict=True)
        return rank, list(split)

    def batches(self, most: int) -> list[tuple[int, int, torch.Tensor, torch.Tensor]]:
        """Block rows from and to, their columns and starts: ``most`` blocks at a time, or a row."""
        if most not in self._batches:
            self._batches[most] = list(self._cut(most))
        return self._batches[most]

    def _cut(self, most: int) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
        bounds, first = self.bounds, 0
        while first < self.grid[0]:
            last = first + 1
            while last < self.grid[0] and bounds[last + 1] - bounds[first] <= most:
                last += 1
            begin, end = bounds[first], bounds[last]
            yield first, last, self.columns[begin:end], self.starts[first : last + 1] - begin
            first = last

    def sum_rows(self, blocks: torch.Tensor) -> torch.Tensor:
        """``[block rows, length]``: the sums of ``blocks [blocks, length]`` by block row."""
        return _sum_rows(blocks, self.starts, self.counting, self.rows)


def multiply(
    x: torch.Tensor,
    weights: torch.Tensor,
    index: BlockIndex,
    size: int,
    bias: torch.Tensor | None = None,
    way: str | None = None,
    elements: int | None = None,
) -> torch.Tensor:
    """Compute the product of ``x`` and the blocks, plus ``bias``.

    Args:
        x: ``[M, <= columns * i]``, dtype of ``weights``, any strides; what is missing counts as 0.
        weights: ``[blocks, i, o]`` fp32 | fp64, in the order of ``index``.
        index: where they lie.
        size: columns of the result; it ends in the last block row.
        bias: ``[size]``, dtype of ``weights``, or ``None``.
        way: see above; by size if ``None``.
        elements: that *batches* gather and write at a time, or sums that *layers* add to;
            :data:`ELEMENTS` if ``None``.

    Returns:
        ``[M, size]``, dtype of ``weights``, contiguous.
    """
    m, (count, i, o) = len(x), weights.shape
    if not count or not m:
        out = x.new_zeros(m, size)
        return out if bias is None else out.add_(bias)
    if x.shape[1] < index.grid[1] * i:
        x = F.pad(x, (0, index.grid[1] * i - x.shape[1]))
    way = way or choose_way(m, (o, i), count, index.grid, lambda: index.longest)[0]
    elements = elements or ELEMENTS
    if way == "batches" and count * m * (i + o) <= AT_ONCE * elements:
        return _one_batch(x, weights, index, size, bias)
    out = x.new_empty(m, size)
    step = _BAND
    if way == "layers":
        step = min(step, max(64, elements // (index.grid[0] * o)))
    elif way == "dense":
        step, weights = m, _whole(weights, index)
    for start in range(0, m, step):
        band = slice(start, start + step)
        _WAYS[way](x[band], weights, index, out[band], bias, elements)
    return out


def choose_way(
    m: int, block: tuple[int, int], count: int, grid: tuple[int, int], longest: Callable[[], int]
) -> tuple[str, str]:
    """The way that should be fastest, and why; reasoned from what was measured.

    Args:
        m: rows of ``x``.
        block: ``(o, i)``.
        count: number of blocks.
        grid: block rows and block columns.
        longest: asked for the blocks of the longest block row where that matters.
    """
    o, i = block
    if m > 1:
        rows, columns = grid
        if rows <= _FEW and i <= _NARROW and m > _FEW:
            return "rows", f"up to {_FEW} block rows, of narrow blocks: one product for each"
        if columns <= _FEW and o <= _NARROW and m > _FEW:
            return "columns", f"up to {_FEW} block columns, of flat blocks: one product for each"
        if m >= 16 and i * o < _REUSE * (i + o):
            return "dense", "blocks too small to be worth gathering"
    if min(i, o) >= 64 and m * i * o >= _LOOP:
        return "loop", "blocks so large that a call costs little beside each"
    sums = m * o * count
    if sums >= _LAYER and sums >= _LAYER * longest():
        return "layers", "many blocks and rows of x: no products are written"
    return "batches", "few rows of x: few calls, each over many blocks"


def _one_batch(x, weights, index: BlockIndex, size: int, bias) -> torch.Tensor:
    """All blocks at once. Of small products the calls are what costs, so there are few."""
    m, (count, i, o), (rows, columns) = len(x), weights.shape, index.grid
    if m == 1:
        a = x.reshape(columns, 1, i).index_select(0, index.columns)
        sums = index.sum_rows(torch.bmm(a, weights).view(count, o)).view(1, rows * o)[:, :size]
        # no view: autograd allows no writing to a function's views
        return sums.clone() if bias is None else torch.add(sums, bias)
    x = x.reshape(m, columns, i).transpose(0, 1).reshape(columns, m * i)
    a = x.index_select(0, index.columns).view(count, m, i)
    sums = index.sum_rows(torch.bmm(a, weights).view(count, m * o))
    sums = sums.view(rows, m, o).transpose(0, 1)
    if size < rows * o:
        out = sums.reshape(m, rows * o)[:, :size]
        return out.contiguous() if bias is None else torch.add(out, bias)
    out = x.new_empty(m, size)
    into = out.view(m, rows, o)
    into.copy_(sums) if bias is None else torch.add(sums, bias.view(rows, o), out=into)
    return out


def _batches(x, weights, index: BlockIndex, out, bias, elements: int) -> None:
    m, (_, i, o) = len(out), weights.shape
    parts = index.batches(max(1, elements // (m * (i + o))))
    most = max(len(part[2]) for part in parts)
    blocks, here, product = scratch_parts(
        [(index.grid[1], m * i), (most, m * i), (most, m * o)], weights.dtype, weights.device
    )
    _to_blocks(x, blocks, i)
    begin = 0
    for first, last, which, starts in parts:
        count = len(which)
        if not count:
            _place(out, None, first, last, o, bias)
            continue
        end = begin + count
        a = _gather(blocks, which, here, i)
        p = product[:count]
        torch.bmm(a, weights[begin:end], out=p.view(count, m, o))
        sums = _sum_rows(p, starts, index.counting[:count], index.rows[begin:end] - first)
        _place(out, sums.view(last - first, m, o).transpose(0, 1), first, last, o, bias)
        begin = end


def _sum_rows(blocks: torch.Tensor, starts: torch.Tensor, counting, rows) -> torch.Tensor:
    if blocks.dtype == torch.float32 and blocks.shape[1] <= _BAG and blocks.device.type == "cpu":
        # the bag kernel uses all threads and needs no zeros
        return torch.embedding_bag(blocks, counting, starts, False, 0, False, None, True)[0]
    sums = blocks.new_zeros(len(starts) - 1, blocks.shape[1])
    return sums.index_add_(0, rows, blocks)


def _layers(x, weights, index: BlockIndex, out, bias, elements: int) -> None:
    m, (_, i, o), (rows, columns) = len(out), weights.shape, index.grid
    rank, layers = index.layers
    most = len(layers[0][0])
    blocks, here, values, sums, ordered = scratch_parts(
        [(columns, m * i), (most, m * i), (most, i * o), (rows, m * o), (rows, m * o)],
        weights.dtype, weights.device,
    )  # fmt: skip
    _to_blocks(x, blocks, i)
    sums[most:].zero_()
    for layer, (which, met) in enumerate(layers):
        a = _gather(blocks, met, here, i)
        b = _select(weights, which, values[: len(which)])
        into = sums[: len(which)].view(-1, m, o)
        if layer:
            torch.baddbmm(into, a, b, out=into)
        else:
            torch.bmm(a, b, out=into)
    torch.index_select(sums, 0, rank, out=ordered)
    _place(out, ordered.view(rows, m, o).transpose(0, 1), 0, rows, o, bias)


def _select(weights: torch.Tensor, which: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Some of the blocks, in ``out``: they are copied as they lie in memory."""
    n, i, o = weights.shape
    if weights.is_contiguous():
        return torch.index_select(weights.view(n, i * o), 0, which, out=out).view(-1, i, o)
    lying = weights.transpose(1, 2).reshape(n, o * i)
    return torch.index_select(lying, 0, which, out=out).view(-1, o, i).transpose(1, 2)


def _loop(x, weights, index: BlockIndex, out, bias, elements: int) -> None:
    (m, size), (_, i, o) = out.shape, weights.shape
    (blocks,) = scratch_parts([(index.grid[1], m * i)], weights.dtype, weights.device)
    _to_blocks(x, blocks, i)
    met, factors, columns = blocks.view(-1, m, i).unbind(0), weights.unbind(0), index.column_list
    for row, part in enumerate(index.parts):
        begin, end = row * o, min(size, row * o + o)
        target = out[:, begin:end]
        added = None if bias is None else bias[begin:end]
        if part.start == part.stop:
            target.zero_() if added is None else target.copy_(added)
        for block in range(part.start, part.stop):
            factor = factors[block] if end - begin == o else factors[block][:, : end - begin]
            a = met[columns[block]]
            if block > part.start:
                torch.addmm(target, a, factor, out=target)
            elif added is not None:
                torch.addmm(added, a, factor, out=target)
            else:
                torch.mm(a, factor, out=target)


def _rows(x, weights, index: BlockIndex, out, bias, elements: int) -> None:
    size, (_, i, o) = out.shape[1], weights.shape
    blocks = x.unflatten(1, (index.grid[1], i))
    for row, part in enumerate(index.parts):
        begin, end = row * o, min(size, row * o + o)
        met = blocks[:, index.columns[part]].flatten(1)
        product = met @ weights[part].flatten(0, 1)[:, : end - begin]
        out[:, begin:end] = product if bias is None else product.add_(bias[begin:end])


def _columns(x, weights, index: BlockIndex, out, bias, elements: int) -> None:
    m, (_, i, o), (rows, columns) = len(out), weights.shape, index.grid
    sums = x.new_zeros(rows, o, m)
    for column in range(columns):
        which = (index.columns == column).nonzero()[:, 0]
        met = x[:, column * i : (column + 1) * i]
        product = weights[which].transpose(1, 2).flatten(0, 1) @ met.T
        sums.index_add_(0, index.rows[which], product.view(-1, o, m))
    _place(out, sums.permute(2, 0, 1), 0, rows, o, bias)


def _whole(weights: torch.Tensor, index: BlockIndex) -> torch.Tensor:
    """The matrix, ``[columns * i, rows * o]``."""
    (_, i, o), (rows, columns) = weights.shape, index.grid
    whole = weights.new_zeros(rows, o, columns, i)
    whole[index.rows, :, index.columns] = weights.transpose(1, 2)
    return whole.view(rows * o, columns * i).T


def _dense(x, weights, index: BlockIndex, out, bias, elements: int) -> None:
    weights = weights[:, : out.shape[1]]
    torch.mm(x, weights, out=out) if bias is None else torch.addmm(bias, x, weights, out=out)


_WAYS = {
    "batches": _batches, "layers": _layers, "loop": _loop,
    "rows": _rows, "columns": _columns, "dense": _dense,
}  # fmt: skip


def multiply_bwd(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    weights: torch.Tensor | None,
    index: BlockIndex,
    sides: tuple[int, int],
    size: int,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Compute the gradients of :func:`multiply`, those for which there is what they need.

    Args:
        dy: ``[M, <= rows * o]``, any dtype and strides; what is missing counts as 0.
        x: ``[M, <= columns * i]`` likewise, for the gradient of ``weights``, or ``None``.
        weights: ``[blocks, i, o]`` fp32 | fp64, for the gradient of ``x``, or ``None``.
        index: where blocks lie.
        sides: ``(i, o)``.
        size: columns of ``dx``; it ends in the last block column.

    Returns:
        ``dx [M, size]`` in ``dy``'s dtype and ``d [blocks, o, i]``, which is ``dy^T x``, in fp32 or
        wider; both contiguous.
    """
    (i, o), (rows, columns), wide = sides, index.grid, torch.promote_types(dy.dtype, torch.float32)
    m, count, device = len(dy), len(index), dy.device
    dx = None if weights is None else dy.new_empty(m, columns * i)
    d = None if x is None else torch.zeros(count, o, i, dtype=wide, device=device)
    for start in range(0, m, _BAND):
        band = slice(start, min(m, start + _BAND))
        rows_here = band.stop - start
        step = min(count, max(1, _GATHERED // (rows_here * max(i, o))))
        need_x = columns if d is not None else 0
        need_out = columns if dx is not None else 0
        x_blocks, dy_blocks, out, here, product = scratch_parts(
            [(need_x, rows_here * i), (rows, rows_here * o), (need_out, rows_here * i),
             (step, rows_here * o), (step, rows_here * i)],
            wide, device,
        )  # fmt: skip
        _to_blocks(dy[band], dy_blocks, o)
        if x is not None:
            _to_blocks(x[band], x_blocks, i)
        out.zero_()
        for first in range(0, count, max(1, step)):
            part = slice(first, min(count, first + step))
            which = index.columns[part]
            a = _gather(dy_blocks, index.rows[part], here, o)
            p = product[: len(which)]
            if weights is not None:
                torch.bmm(a, weights[part].transpose(1, 2), out=p.view(-1, rows_here, i))
                out.index_add_(0, which, p)
            if d is not None:
                b = _gather(x_blocks, which, p, i)
                torch.baddbmm(d[part], a.transpose(1, 2), b, out=d[part])
        if dx is not None:
            into = dx[band].view(rows_here, columns, i)
            into.copy_(out.view(columns, rows_here, i).transpose(0, 1))
    if dx is not None and size < columns * i:
        dx = dx[:, :size].contiguous()
    return dx, d


def _to_blocks(t: torch.Tensor, out: torch.Tensor, side: int) -> None:
    """``t [m, size]`` into ``out [blocks, m * side]``, with zeros in what overhangs."""
    m, size = t.shape
    blocks = len(out)
    t = F.pad(t, (0, blocks * side - size)) if size < blocks * side else t
    out.view(blocks, m, side).copy_(t.unflatten(1, (blocks, side)).transpose(0, 1))


def _gather(blocks: torch.Tensor, which: torch.Tensor, out: torch.Tensor, side: int):
    """``[which, m, side]``, in ``out``."""
    out = torch.index_select(blocks, 0, which, out=out[: len(which)])
    return out.view(len(which), -1, side)


def _place(out: torch.Tensor, sums, first: int, last: int, side: int, bias) -> None:
    """``sums [m, last - first, side]`` (none: 0) plus ``bias`` into their columns of ``out``."""
    size = out.shape[1]
    whole = min(last, size // side)
    pieces = [(first, whole, side)] if whole > first else []
    if whole < last:  # the last block row overhangs
        pieces.append((whole, last, size - whole * side))
    for begin, end, width in pieces:
        columns = slice(begin * side, begin * side + (end - begin) * width)
        target = out[:, columns].unflatten(1, (end - begin, width))
        added = None if bias is None else bias[columns].view(end - begin, width)
        if sums is None:
            target.zero_() if added is None else target.copy_(added)
            continue
        part = sums[:, begin - first : end - first, :width]
        target.copy_(part) if added is None else torch.add(part, added, out=target)
