"""Product with a block-sparse weight in library calls: the ``torch`` implementation."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    "none": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}

# Measured on one AVX2 core at N=4096, K=1024, a tenth of the blocks stored, 1 to 512 rows of x.
_BAND = 64  # rows of x at a time: what they meet stays in the cache
_CHUNK = 1 << 18  # elements of x and of products at a time
_FEW = 8  # block rows or columns up to which one product for each is faster
_REUSE = 8  # products per element moved, below which (and from 16 rows on) dense is faster


def bsr_linear_torch(
    x2: torch.Tensor,
    values: torch.Tensor,
    crow: torch.Tensor,
    col: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    activation: str,
) -> torch.Tensor:
    """The same in library calls, for any block, on ``x2 [M, K]``."""
    (m, k), (nnz, bn, bk) = x2.shape, values.shape
    rows, cols = len(crow) - 1, -(-k // bk)
    wide = torch.float64 if x2.dtype == torch.float64 else torch.float32
    out = x2.new_empty(m, n)
    col = col[:nnz]
    values = values.to(wide)
    if k % bk:  # beyond the edge anything may be stored
        inside = torch.arange(bk, device=col.device) < k - col[:, None] * bk
        values = torch.where(inside[:, None, :], values, 0)
    if rows <= _FEW:
        multiply = _rows_multiplier(values, crow, col)
    else:
        row = torch.repeat_interleave(crow.diff(), output_size=nnz)  # of each block
        if cols <= _FEW:
            make = _cols_multiplier
        elif m >= 16 and bn * bk < _REUSE * (bn + bk):
            make = _dense_multiplier
        else:
            make = _batch_multiplier
        multiply = make(values, row, col, rows, cols)
    for m0 in range(0, m, _BAND):
        band = x2[m0 : m0 + _BAND].to(wide)
        if k % bk:
            band = F.pad(band, (0, cols * bk - k))
        acc = multiply(band)[:, :n]
        if bias is not None:
            acc = acc + bias.to(wide)
        out[m0 : m0 + _BAND] = ACTIVATIONS[activation](acc)
    return out


def _rows_multiplier(values, crow, col):
    """One product per block row, with the columns of ``x`` that it meets."""
    bn, bk = values.shape[1:]
    bounds = crow.tolist()
    parts = [slice(a, b) for a, b in itertools.pairwise(bounds)]
    weights = [values[p].transpose(0, 1).reshape(bn, -1) for p in parts]

    def multiply(band):
        blocks = band.reshape(len(band), -1, bk)
        met = (blocks[:, col[p]].flatten(1) for p in parts)
        return torch.cat([F.linear(x, w) for x, w in zip(met, weights, strict=True)], 1)

    return multiply


def _cols_multiplier(values, row, col, rows, cols):
    """One product per block column, added to the block rows that it meets."""
    bn, bk = values.shape[1:]
    parts = [(col == c).nonzero()[:, 0] for c in range(cols)]
    weights = [values[p].view(-1, bk) for p in parts]

    def multiply(band):
        acc = band.new_zeros(rows, bn, len(band))
        for c, (part, weight) in enumerate(zip(parts, weights, strict=True)):
            product = weight @ band[:, c * bk : (c + 1) * bk].T
            acc.index_add_(0, row[part], product.view(len(part), bn, len(band)))
        return acc.flatten(0, 1).T

    return multiply


def _dense_multiplier(values, row, col, rows, cols):
    """One product with the dense weight."""
    bn, bk = values.shape[1:]
    weight = values.new_zeros(rows, bn, cols, bk)
    weight[row, :, col] = values
    weight = weight.view(rows * bn, cols * bk)
    return lambda band: F.linear(band, weight)


def _batch_multiplier(values, row, col, rows, cols):
    """Batches of one product per block, added up by block row."""
    nnz, bn, bk = values.shape
    values = values.transpose(1, 2)

    def multiply(band):
        size = len(band)
        blocks = band.reshape(size, cols, bk).transpose(0, 1).contiguous()
        acc = band.new_zeros(rows, size, bn)
        step = max(1, _CHUNK // ((bn + bk) * size))
        for b in range(0, nnz, step):
            part = slice(b, b + step)
            acc.index_add_(0, row[part], torch.bmm(blocks[col[part]], values[part]))
        return acc.transpose(0, 1).reshape(size, rows * bn)

    return multiply
