"""Gated linear layer in library calls: what the ``torch`` implementation of ``gated_linear`` does.

*multiply* forms the gated weight in a scratch buffer and multiplies by it. One buffer for each
thread is kept between calls and reused by all layers: on a CPU, fresh memory of a weight's size
costs more than the arithmetic on it. Nothing of it is saved for backward, which forms the gated
weight again.

*skip* multiplies block by block what is open. Tokens are laid out so that the columns that one
block meets lie side by side; a product is then one small library call for each open block.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from .bitmap import pack_bitmap, unpack_bitmap
from .blocks import GateLayout, gate_layout, sum_blocks
from .gate_torch import binarise, keep_open

# Measured on two AVX2 cores with 32x32 blocks of a 4096x1024 weight and 512 rows of x.
_CALL = 200_000  # what one more library call costs, in multiply-adds
_RELAYOUT = 50  # the same for an element of x or y that is laid out anew
_GAIN = 0.9  # by how much skipping must win
_SMALLEST = 64  # weights of a block; a library call for fewer never pays
_CHUNK = 1 << 20  # elements of dW at a time, where it need not exist as a whole

_kept = threading.local()


def forward(
    x2: torch.Tensor,
    w: torch.Tensor,
    gate: torch.Tensor,
    seed: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: torch.Tensor,
    layout: GateLayout,
    method: str,
) -> torch.Tensor:
    """``x2 [M, K] @ (w * b)^T + bias``; drawn gates go into ``bits`` as well."""
    is_open = None
    if seed is not None:
        is_open = binarise(gate, "bernoulli", seed)
        bits.copy_(pack_bitmap(is_open))
    if choose(method, gate, is_open, layout, len(x2)) == "skip":
        return _skip_fwd(x2, w, _open_pairs(gate, is_open), bias, layout)
    return F.linear(x2, _gated(w, gate, is_open, layout, x2.dtype), bias)


def backward(
    dy2: torch.Tensor,
    x2: torch.Tensor,
    w: torch.Tensor,
    gate: torch.Tensor,
    bits: torch.Tensor,
    layout: GateLayout,
    method: str,
    needs: tuple[bool, bool, bool],
    reopen: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of ``x2``, ``w`` and ``gate``, those that are needed and perhaps more."""
    is_open = unpack_bitmap(bits, gate.shape) if bits.numel() else None
    need_dx, need_dw, need_dgate = needs
    dx = dw = dgate = None
    if choose(method, gate, is_open, layout, len(x2)) == "skip":
        pairs = _open_pairs(gate, is_open)
        exact = need_dgate and reopen
        sampled = (need_dw or need_dgate) and not exact
        if need_dx or sampled:
            x_blocked, dy_blocked = _two_blocked(x2, layout)
            dy = dy_blocked.read(dy2)
            if need_dx:
                dx = _skip_dx(dy, w, pairs, layout, x_blocked, dy2)
            if sampled:
                x = x_blocked.read(x2)
                dw, dgate = _sampled_dw(dy, x, w, gate, pairs, layout, need_dgate)
        if exact:
            dw, dgate = _exact_dw(dy2, x2, w, pairs, layout)
        return dx, dw, dgate
    if need_dx:
        dx = dy2 @ _gated(w, gate, is_open, layout, dy2.dtype)
    if need_dw or need_dgate:
        dw, dgate = _masked_dw(dy2, x2, w, gate, is_open, layout, need_dgate)
        if dgate is not None and not reopen:
            dgate.masked_fill_(~_open_mask(gate, is_open), 0)
    return dx, dw, dgate


def choose(
    method: str, gate: torch.Tensor, is_open: torch.Tensor | None, layout: GateLayout, m: int
) -> str:
    """``"multiply"`` or ``"skip"``: as told, or whichever should be faster."""
    if method != "auto":
        return method if gate.numel() else "multiply"  # an empty layer has no blocks
    bn, bk = layout.block
    if bn * bk < _SMALLEST or gate.device.type != "cpu":  # counting would wait for the device
        return "multiply"
    n, k = layout.weight_shape
    dense = _GAIN * m * n * k
    fixed = _RELAYOUT * m * (n + k)
    most = (dense - fixed) / (bn * bk * m + _CALL)  # open blocks
    if most < 1:
        return "multiply"
    count = int(_open_mask(gate, is_open).count_nonzero())
    return "skip" if count < most else "multiply"


def scratch(count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``[count]`` elements that the next call of this thread uses again; on a CPU they are kept.

    What is kept is as large as the largest weight that this thread has met, once for each dtype.
    """
    if device.type != "cpu":
        return torch.empty(count, dtype=dtype, device=device)
    buffer = _kept.__dict__.get(dtype)
    if buffer is None or buffer.numel() < count:
        with torch.inference_mode(False):  # training writes to what inference leaves behind
            buffer = _kept.__dict__[dtype] = torch.empty(count, dtype=dtype)
    return buffer if buffer.numel() == count else buffer[:count]


def _gated(w, gate, is_open, layout: GateLayout, dtype: torch.dtype) -> torch.Tensor:
    """The gated weight in the scratch buffer."""
    n, k = layout.weight_shape
    if w.is_contiguous() or not w.T.is_contiguous():
        out = scratch(n * k, dtype, w.device).view(n, k)
    else:  # laid out as the weight, so that the library takes the path of the dense layer
        out = scratch(n * k, dtype, w.device).view(k, n).T
    if w.dtype == dtype:
        keep_open(w, gate, is_open, layout, out)
    else:
        out.copy_(w)
        keep_open(out, gate, is_open, layout, out)
    return out


def _masked_dw(dy2, x2, w, gate, is_open, layout: GateLayout, need_dgate: bool):
    """``dW`` and ``dgate`` from the dense product."""
    d = dy2.T @ x2
    wide = _wide(w.dtype)
    dgate = None
    if need_dgate and layout.per_weight:
        dgate = torch.mul(d, w) if d.dtype == w.dtype == wide else d.to(wide) * w.to(wide)
        dgate = dgate.to(gate.dtype)
    elif need_dgate:
        product = scratch(w.numel(), wide, w.device).view(w.shape)
        torch.mul(d, w, out=product) if d.dtype == w.dtype else product.copy_(d).mul_(w)
        dgate = sum_blocks(product, layout).to(gate.dtype)
    dw = d if d.dtype == w.dtype else d.to(w.dtype)
    keep_open(dw, gate, is_open, layout, dw)
    return dw, dgate


Pairs = list[tuple[int, int]]  # (block row, block column) of each open block


def _open_mask(gate: torch.Tensor, is_open: torch.Tensor | None) -> torch.Tensor:
    """The gates that were drawn open, or lie above 0.5 where nothing was drawn."""
    return gate > 0.5 if is_open is None else is_open


def _open_pairs(gate: torch.Tensor, is_open: torch.Tensor | None) -> Pairs:
    return [(r, c) for r, c in _open_mask(gate, is_open).nonzero().tolist()]


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Sums run in it: a block's product is added to what is there."""
    return torch.promote_types(dtype, torch.float32)


class _Blocked:
    """Tokens ``[M, size]`` cut into columns of ``side``, each lying contiguously."""

    def __init__(self, m: int, size: int, side: int, buffer: torch.Tensor):
        self.full, self.side, tail = size // side, side, size % side
        end = m * self.full * side
        self.head = buffer[:end].view(self.full, m, side)
        self.tail = buffer[end : end + m * tail].view(m, tail)
        self.blocks = list(self.head.unbind())
        if tail:
            self.blocks.append(self.tail)

    def read(self, t: torch.Tensor) -> list[torch.Tensor]:
        end = self.full * self.side
        self.head.copy_(t[:, :end].unflatten(1, (self.full, self.side)).transpose(0, 1))
        self.tail.copy_(t[:, end:])
        return self.blocks

    def write(self, t: torch.Tensor) -> torch.Tensor:
        end = self.full * self.side
        t[:, :end].unflatten(1, (self.full, self.side)).copy_(self.head.transpose(0, 1))
        t[:, end:].copy_(self.tail)
        return t


def _two_blocked(x2, layout: GateLayout) -> tuple[_Blocked, _Blocked]:
    """Room for ``[M, K]`` and for ``[M, N]`` in the scratch buffer."""
    (n, k), (bn, bk), m = layout.weight_shape, layout.block, len(x2)
    buffer = scratch(m * (k + n), _wide(x2.dtype), x2.device)
    return _Blocked(m, k, bk, buffer[: m * k]), _Blocked(m, n, bn, buffer[m * k :])


class _Blocks:
    """The blocks of a matrix, as views: made when asked for, since most are closed."""

    def __init__(self, matrix: torch.Tensor, layout: GateLayout):
        bn, self.bk = layout.block
        self.rows, self.k = matrix.split(bn), matrix.shape[1]

    def at(self, r: int, c: int) -> torch.Tensor:
        start = c * self.bk
        return self.rows[r].narrow(1, start, min(self.bk, self.k - start))


def _open_blocks(w: torch.Tensor, pairs: Pairs, layout: GateLayout) -> list[torch.Tensor]:
    """The open blocks, each contiguous: rows of a weight often lie a power of two apart, where a
    cache holds few of them.
    """
    n, k = layout.weight_shape
    if not pairs or n % layout.block[0] or k % layout.block[1]:
        blocks = _Blocks(w, layout)
        return [blocks.at(r, c).contiguous() for r, c in pairs]
    return list(_by_block(w, layout)[_indices(pairs)].unbind())


def _by_block(matrix: torch.Tensor, layout: GateLayout) -> torch.Tensor:
    """``[block rows, block columns, bn, bk]``, a view; for blocks that cut evenly."""
    bn, bk = layout.block
    return matrix.unflatten(0, (-1, bn)).unflatten(2, (-1, bk)).transpose(1, 2)


def _indices(pairs: Pairs) -> tuple[list[int], list[int]]:
    return [r for r, _ in pairs], [c for _, c in pairs]


def _skip_fwd(x2, w, pairs: Pairs, bias, layout: GateLayout) -> torch.Tensor:
    x_blocked, y_blocked = _two_blocked(x2, layout)
    x, y = x_blocked.read(x2), y_blocked.blocks
    weight = _open_blocks(w.to(x2.dtype), pairs, layout)
    if bias is None:
        y_blocked.head.zero_()
        y_blocked.tail.zero_()
    else:
        for part, b in zip(y, bias.split(layout.block[0]), strict=True):
            part.copy_(b)
    for (r, c), block in zip(pairs, weight, strict=True):
        y[r].addmm_(x[c], block.t().to(y[r].dtype))
    return y_blocked.write(x2.new_empty(len(x2), layout.weight_shape[0]))


def _skip_dx(
    dy: list[torch.Tensor], w, pairs: Pairs, layout: GateLayout, dx_blocked: _Blocked, dy2
) -> torch.Tensor:
    dx = dx_blocked.blocks
    weight = _open_blocks(w.to(dy2.dtype), pairs, layout)
    dx_blocked.head.zero_()
    dx_blocked.tail.zero_()
    for (r, c), block in zip(pairs, weight, strict=True):
        dx[c].addmm_(dy[r], block.to(dy[r].dtype))
    return dx_blocked.write(dy2.new_empty(len(dy2), layout.weight_shape[1]))


def _exact_dw(dy2, x2, w, pairs: Pairs, layout: GateLayout):
    """The gradient of every gate, by the dense product; of ``dW`` the open blocks are kept."""
    (n, k), (bn, bk) = layout.weight_shape, layout.block
    wide = _wide(w.dtype)
    dw = torch.zeros_like(w, memory_format=torch.contiguous_format)
    kept, dgates = _Blocks(dw, layout), []
    rows = max(1, _CHUNK // max(k, 1) // bn) * bn
    for start, size, here in _by_chunk(pairs, n, rows, bn):
        part = slice(start, start + size)
        d = scratch(size * k, dy2.dtype, w.device).view(size, k)
        torch.mm(dy2.T[part], x2, out=d)
        for r, c in here:
            row = r * bn - start
            kept.at(r, c).copy_(d[row : row + bn, c * bk : (c + 1) * bk])
        product = d.mul_(w[part]) if d.dtype == w.dtype == wide else d.to(wide) * w[part]
        dgates.append(sum_blocks(product, gate_layout((size, k), (bn, bk))))
    return dw, torch.cat(dgates).to(torch.float32)


def _by_chunk(pairs: Pairs, n: int, rows: int, bn: int) -> Iterator[tuple[int, int, Pairs]]:
    i = 0
    for start in range(0, n, rows):
        first = i
        while i < len(pairs) and pairs[i][0] * bn < start + rows:
            i += 1
        yield start, min(rows, n - start), pairs[first:i]


def _sampled_dw(dy, x, w, gate, pairs: Pairs, layout: GateLayout, need_dgate: bool):
    """Gradients at open blocks only, from tokens in blocks; 0 elsewhere."""
    wide = _wide(w.dtype)
    dw = torch.zeros_like(w, memory_format=torch.contiguous_format)
    n, k = layout.weight_shape
    if n % layout.block[0] or k % layout.block[1]:
        kept = _Blocks(dw, layout)
        products = [dy[r].t() @ x[c] for r, c in pairs]
        for (r, c), d in zip(pairs, products, strict=True):
            kept.at(r, c).copy_(d)
    else:
        d = torch.empty(len(pairs), *layout.block, dtype=x[0].dtype, device=w.device)
        products = list(d.unbind())
        for (r, c), out in zip(pairs, products, strict=True):
            torch.mm(dy[r].t(), x[c], out=out)
        if pairs:
            _by_block(dw, layout)[_indices(pairs)] = d.to(dw.dtype)
    if not need_dgate:
        return dw, None
    dgate = torch.zeros_like(gate)
    weight = _open_blocks(w, pairs, layout)
    sums = [
        torch.dot(d.to(wide).flatten(), block.to(wide).flatten())
        for d, block in zip(products, weight, strict=True)
    ]
    if sums:
        dgate[_indices(pairs)] = torch.stack(sums).to(gate.dtype)
    return dw, dgate
