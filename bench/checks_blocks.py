"""Checks of ``bsr_linear`` as it chooses tiles itself, and the sparse weights of all checks."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from sgtriton_kernels import (
    BlockSparse,
    bsr_linear,
    bsr_linear_ref,
)
from sgtriton_kernels.activations import ACTIVATIONS

from .judge import (
    DTYPES,
    Case,
    Check,
    Place,
    Results,
    dtype_name,
    judged,
    values,
    with_grads,
)

Pair = tuple[int, int]


def bsr_linear_checks(place: Place) -> Iterator[Check]:
    """Forward and every gradient."""
    blocks = [(64, 64), (32, 32), (16, 16), (128, 128), (16, 64), (128, 32)]
    # rows, and whether of whole numbers
    rows = [(75, False), (1, True), (0, True), (16, False), (5, False), (200, False)]
    activations = itertools.cycle([name for name in ACTIVATIONS if name != "none"])
    dtypes = DTYPES
    if place.quick:
        blocks, rows, dtypes = blocks[1:2], rows[:3], DTYPES[:1]
    elif place.is_card:
        rows.insert(1, (4100, False))
    for dtype, block, (m, whole) in itertools.product(dtypes, blocks, rows):
        for ragged in (False, True) if m == 75 else (not m % 2,):
            activation = "relu" if whole else next(activations)
            size = size_of(m, block, ragged)
            yield Check(
                "bsr_linear",
                f"{block[0]}x{block[1]} {activation}",
                dtype_name(dtype),
                "x".join(map(str, size)) + " whole" * whole,
                functools.partial(judged, _linear, place, size, block, dtype, whole, activation),
            )


def size_of(m: int, block: Pair, ragged: bool) -> tuple[int, int, int]:
    """Rows, outputs, inputs: four block rows and three block columns, ragged or whole."""
    n, k = 4 * block[0], 3 * block[1]
    return (m, n - block[0] // 2 - 3, k - block[1] // 2 + 1) if ragged else (m, n, k)


def sparse(
    n: int, k: int, block: Pair, dtype: torch.dtype, device: torch.device, whole: bool
) -> BlockSparse:
    """A weight with an empty block row, a full one, and about half of the others' blocks."""
    pattern = torch.rand(-(-n // block[0]), -(-k // block[1])) < 0.5
    pattern[0], pattern[-1] = False, True
    weight = values(n, k, dtype=dtype, device=device, whole=whole)
    return BlockSparse.from_dense(weight, block, pattern.to(device))


def with_values(w: BlockSparse, stored: torch.Tensor) -> BlockSparse:
    """The same pattern with other values."""
    return BlockSparse._from_index(stored, w.index_tensors, w.shape)


def dense_linear(x, w: BlockSparse, bias, residual, activation: str | None = None):
    y = F.linear(x, w.to_dense(), bias) + residual
    return ACTIVATIONS[activation or "none"](y)


def _linear(place: Place, size, block: Pair, dtype, whole: bool, activation: str) -> Case:
    (m, n, k), impl = size, place.impl
    make = functools.partial(values, dtype=dtype, device=place.device, whole=whole)
    w, x, dy = sparse(n, k, block, dtype, place.device, whole), make(m, k), make(m, n)
    bias, residual = make(n), make(m, n)
    tensors = (x, w.values, bias, residual)
    names = ("dx", "dvalues", "dbias", "dresidual")

    def of(call: Callable[..., torch.Tensor], *given: torch.Tensor, dout: torch.Tensor) -> Results:
        with torch.no_grad():
            active = call(given[0], with_values(w, given[1]), *given[2:], activation)
        leaves = [t.clone().requires_grad_() for t in given]
        y = call(leaves[0], with_values(w, leaves[1]), *leaves[2:], None)
        return {"act": active, **with_grads(y, names, leaves, dout)}

    def op(x, w, bias, residual, activation):
        return bsr_linear(x, w, bias, activation, residual=residual, impl=impl)

    def reference(x, w, bias, residual, activation):
        return bsr_linear_ref(x, w, bias, activation, residual)

    return Case(
        lambda: of(op, *tensors, dout=dy),
        lambda: of(reference, *(t.double() for t in tensors), dout=dy.double()),
        lambda: of(dense_linear, *tensors, dout=dy),
        (*tensors, dy),
    )
