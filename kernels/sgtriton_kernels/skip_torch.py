"""Products with the open blocks of a weight, in library calls: *skip* of :mod:`.gated_torch`.

Tokens are laid out so that the columns which one block meets lie side by side. Then blocks are
gathered, multiplied by one batched product and added where they belong, some megabytes at a time:
what a call costs is paid seldom, and what it writes is read while it is in a cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ._scratch import scratch, scratch_parts
from .blocks import GateLayout, sum_blocks

# Measured on two AVX2 cores with 32x32 blocks of a 4096x1024 weight: half or twice is no better.
_BAND = 512  # rows of x at a time; bounds the memory that is kept between calls
_GATHERED = 1 << 20  # elements of x that are gathered at a time
_CHUNK = 1 << 20  # elements of dW at a time, where it need not exist as a whole


class _OpenBlocks:
    """The open blocks of a weight, row by row.

    Attributes:
        rows, columns: ``[blocks]`` int64, where each lies in the grid ``[R, C]``.
        lines: ``[blocks * bn]`` int64, where their rows lie in the weight as ``[N * C, bk]``.
    """

    def __init__(self, is_open: torch.Tensor, layout: GateLayout):
        self.layout, (self.r, self.c) = layout, is_open.shape
        self.bn, self.bk = layout.block
        self.rows, self.columns = is_open.nonzero().unbind(1)
        first = self.rows * (self.bn * self.c) + self.columns
        inside = torch.arange(0, self.bn * self.c, self.c, device=is_open.device)
        self.lines = (first[:, None] + inside).flatten()

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, w: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """``[blocks, bn, bk]`` of ``w [N, K]``, zeros in what overhangs."""
        (n, k), (bn, bk) = self.layout.weight_shape, self.layout.block
        if n % bn or k % bk:
            w = F.pad(w, (0, -k % bk, 0, -n % bn))
        lines = w.reshape(-1, bk).index_select(0, self.lines)
        return lines.to(dtype).view(-1, bn, bk)

    def write(self, blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """``[N, K]``, contiguous: the blocks, and 0 elsewhere."""
        n, k = self.layout.weight_shape
        w = torch.zeros(self.r * self.bn, self.c * self.bk, dtype=dtype, device=blocks.device)
        w.view(-1, self.bk).index_copy_(0, self.lines, blocks.reshape(-1, self.bk).to(dtype))
        return w if w.shape == (n, k) else w[:n, :k].contiguous()

    def at_a_time(self, m: int) -> int:
        """How many are gathered at a time, for ``m`` rows of x."""
        side = max(self.bn, self.bk)
        return min(len(self), max(1, _GATHERED // (max(1, m) * side)))

    def parts(self, m: int) -> Iterator[slice]:
        step = self.at_a_time(m)
        for start in range(0, len(self), max(1, step)):
            yield slice(start, min(start + step, len(self)))


def skip_fwd(
    x2: torch.Tensor,
    w: torch.Tensor,
    is_open: torch.Tensor,
    bias: torch.Tensor | None,
    layout: GateLayout,
) -> torch.Tensor:
    """``x2 [M, K] @ (w * b)^T + bias`` by the blocks that are open, bool ``layout.gate_shape``."""
    blocks, wide = _OpenBlocks(is_open, layout), _wide(x2.dtype)
    weight = blocks.read(w.to(x2.dtype), wide).transpose(1, 2)
    (bn, bk), (r, c), n = layout.block, is_open.shape, len(w)
    y = x2.new_empty(len(x2), r * bn)
    by_row = None if bias is None else F.pad(bias, (0, r * bn - n)).view(r, bn)
    for start, m in _bands(len(x2)):
        step = blocks.at_a_time(m)
        x, out, here, product = scratch_parts(
            [(c, m * bk), (r, m * bn), (step, m * bk), (step, m * bn)], wide, x2.device
        )
        _to_blocks(x2[start : start + m], x, bk)
        out.zero_()
        for part in blocks.parts(m):
            a = _gather(x, blocks.columns[part], here, bk)
            _multiply_add(a, weight[part], product, out, blocks.rows[part])
        target, out = y[start : start + m].view(m, r, bn), out.view(r, m, bn).transpose(0, 1)
        target.copy_(out) if by_row is None else torch.add(out, by_row, out=target)
    return y if n == r * bn else y[:, :n].contiguous()


def skip_bwd(
    dy2: torch.Tensor,
    x2: torch.Tensor,
    w: torch.Tensor,
    is_open: torch.Tensor,
    layout: GateLayout,
    need_dx: bool,
    need_dw: bool,
    need_dgate: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """``dx``; ``dw`` and ``dgate`` at open blocks, 0 elsewhere."""
    blocks, wide, need_d = _OpenBlocks(is_open, layout), _wide(x2.dtype), need_dw or need_dgate
    (bn, bk), (r, c), k = layout.block, is_open.shape, w.shape[1]
    weight = blocks.read(w.to(dy2.dtype), wide) if need_dx or need_dgate else w
    dx = dy2.new_empty(len(dy2) if need_dx else 0, c * bk)
    d = torch.zeros(len(blocks) if need_d else 0, bn, bk, dtype=wide, device=w.device)
    for start, m in _bands(len(x2)):
        step = blocks.at_a_time(m)
        x, dy, out, here, product = scratch_parts(
            [(c, m * bk), (r, m * bn), (c, m * bk), (step, m * bn), (step, m * bk)],
            wide, x2.device,
        )  # fmt: skip
        _to_blocks(dy2[start : start + m], dy, bn)
        if need_d:
            _to_blocks(x2[start : start + m], x, bk)
        if need_dx:
            out.zero_()
        for part in blocks.parts(m):
            rows, columns = blocks.rows[part], blocks.columns[part]
            a = _gather(dy, rows, here, bn)
            if need_dx:
                _multiply_add(a, weight[part], product, out, columns)
            if need_d:
                b = _gather(x, columns, product, bk)
                torch.baddbmm(d[part], a.transpose(1, 2), b, out=d[part])
        if need_dx:
            dx[start : start + m].view(m, c, bk).copy_(out.view(c, m, bk).transpose(0, 1))
    dx = None if not need_dx else dx if k == c * bk else dx[:, :k].contiguous()
    dw = blocks.write(d, w.dtype) if need_d else None
    if not need_dgate:
        return dx, dw, None
    exact = weight if w.dtype == dy2.dtype else blocks.read(w, wide)
    dgate = torch.zeros(r, c, dtype=torch.float32, device=w.device)
    dgate[blocks.rows, blocks.columns] = d.mul_(exact).sum((1, 2)).to(dgate.dtype)
    return dx, dw, dgate


def exact_dw(
    dy2: torch.Tensor,
    x2: torch.Tensor,
    w: torch.Tensor,
    gate: torch.Tensor,
    is_open: torch.Tensor,
    layout: GateLayout,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``dw``, 0 where closed, and the gradient of every gate, by the dense product."""
    k, bn, wide = w.shape[1], layout.block[0], _wide(w.dtype)
    dgate, kept = torch.empty_like(gate), []
    rows = max(1, _CHUNK // max(k, 1) // bn)  # block rows at a time
    for first in range(0, len(gate), rows):
        part, gates = slice(first * bn, (first + rows) * bn), slice(first, first + rows)
        size = len(w[part])
        chunk = GateLayout((size, k), tuple(gate[gates].shape), layout.block, 1)
        d = scratch(size * k, dy2.dtype, w.device).view(size, k)
        torch.mm(dy2.T[part], x2, out=d)
        kept.append(_OpenBlocks(is_open[gates], chunk).read(d, w.dtype))
        product = d.mul_(w[part]) if d.dtype == w.dtype == wide else d.to(wide) * w[part]
        dgate[gates] = sum_blocks(product, chunk)
    return _OpenBlocks(is_open, layout).write(torch.cat(kept), w.dtype), dgate


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Sums run in it."""
    return torch.promote_types(dtype, torch.float32)


def _bands(m: int) -> Iterator[tuple[int, int]]:
    for start in range(0, m, _BAND):
        yield start, min(_BAND, m - start)


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


def _multiply_add(a, b, product: torch.Tensor, out: torch.Tensor, where: torch.Tensor) -> None:
    """Add ``a [n, m, i] @ b [n, i, j]`` to ``out [blocks, m * j]`` at ``where``."""
    product = product[: len(a)]
    torch.bmm(a, b, out=product.view(len(a), a.shape[1], b.shape[2]))
    out.index_add_(0, where, product)
