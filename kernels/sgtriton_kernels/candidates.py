"""The candidates of every op: which names there are, and which of them can serve a product.

Each op lists its own; a record can name one of them and nothing else.
"""

from __future__ import annotations

import functools

from . import bsr_candidates, conv_candidates, gated_candidates
from .candidate import Candidate
from .cell import Cell

_OPS = {
    "bsr_linear": bsr_candidates,
    "bsr_conv": conv_candidates,
    "gated_linear": gated_candidates,
}


@functools.cache
def named(op: str, impl: str, native: bool) -> dict[str, Candidate]:
    """Every candidate of a pass by its name; nothing else can be recorded.

    Args:
        op: as in :class:`.Cell`.
        impl: ``"triton"`` | ``"torch"``.
        native: whether kernels are compiled for a CPU.
    """
    return {candidate.name: candidate for candidate in _of(op).named(op, impl, native)}


def candidates(cell: Cell, copy_engine: bool = False) -> tuple[Candidate, ...]:
    """Those that can serve a product and differ from one another there.

    Args:
        cell: the product.
        copy_engine: whether the card has one; without, tiles that want it are as the others.
    """
    found = named(cell.op, cell.impl, cell.native).values()
    return tuple(_of(cell.op).serving(cell, found, copy_engine))


def reasoned(cell: Cell) -> tuple[Candidate, str]:
    """What is taken without a record, legal on every card, and why."""
    return _of(cell.op).reasoned(cell)


def _of(op: str):
    return _OPS[op.split(" ")[0]]
