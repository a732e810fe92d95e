"""Products with the open blocks of a weight, in library calls: *skip* of :mod:`.gated_torch`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ._scratch import scratch
from .block_products import BlockIndex, multiply, multiply_bwd
from .blocks import GateLayout, sum_blocks

_CHUNK = 1 << 20  # elements of dW at a time, where it need not exist as a whole


class _OpenBlocks(BlockIndex):
    """The open blocks of a weight, row by row.

    Attributes:
        lines: ``[blocks * bn]`` int64, where their rows lie in the weight as ``[N * C, bk]``.
    """

    def __init__(self, is_open: torch.Tensor, layout: GateLayout):
        r, c = is_open.shape
        super().__init__(*is_open.nonzero().unbind(1), grid=(r, c))
        self.layout, (self.bn, self.bk) = layout, layout.block
        first = self.rows * (self.bn * c) + self.columns
        inside = torch.arange(0, self.bn * c, c, device=is_open.device)
        self.lines = (first[:, None] + inside).flatten()

    def read(self, w: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """``[blocks, bn, bk]`` of ``w [N, K]``, zeros in what overhangs."""
        (n, k), (bn, bk) = self.layout.weight_shape, self.layout.block
        if n % bn or k % bk:
            w = F.pad(w, (0, -k % bk, 0, -n % bn))
        lines = w.reshape(-1, bk).index_select(0, self.lines)
        return lines.to(dtype).view(-1, bn, bk)

    def write(self, blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """``[N, K]``, contiguous: the blocks, and 0 elsewhere."""
        (n, k), (r, c) = self.layout.weight_shape, self.grid
        w = torch.zeros(r * self.bn, c * self.bk, dtype=dtype, device=blocks.device)
        w.view(-1, self.bk).index_copy_(0, self.lines, blocks.reshape(-1, self.bk).to(dtype))
        return w if w.shape == (n, k) else w[:n, :k].contiguous()


def skip_fwd(
    x2: torch.Tensor,
    w: torch.Tensor,
    is_open: torch.Tensor,
    bias: torch.Tensor | None,
    layout: GateLayout,
) -> torch.Tensor:
    """``x2 [M, K] @ (w * b)^T + bias`` by the blocks that are open, bool ``layout.gate_shape``."""
    blocks, wide = _OpenBlocks(is_open, layout), _wide(x2.dtype)
    weights = blocks.read(w.to(x2.dtype), wide).transpose(1, 2)
    bias = None if bias is None else bias.to(wide)
    return multiply(x2.to(wide), weights, blocks, len(w), bias).to(x2.dtype)


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
    bn, bk = layout.block
    weight = blocks.read(w.to(dy2.dtype), wide) if need_dx or need_dgate else w
    dx, d = multiply_bwd(
        dy2,
        x2 if need_d else None,
        weight.transpose(1, 2) if need_dx else None,
        blocks,
        (bk, bn),
        w.shape[1],
    )
    if d is None:
        return dx, None, None
    dw = blocks.write(d, w.dtype)
    if not need_dgate:
        return dx, dw, None
    exact = weight if w.dtype == dy2.dtype else blocks.read(w, wide)
    dgate = torch.zeros(is_open.shape, dtype=torch.float32, device=w.device)
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
