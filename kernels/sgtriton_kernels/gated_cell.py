"""A gated linear layer's step: what the choice of its method depends on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .cell import Cell

STEP, FORWARD = "gated_linear step", "gated_linear fwd"  # forward and backward; forward alone

# training passes through all of them: a record of closed gates says nothing of open ones; usual
# targets lie far from the edges
_DENSITIES = ((0.65, ">=0.65"), (0.35, "0.35-0.65"), (0.14, "0.14-0.35"), (0.0, "<0.14"))


@dataclass(frozen=True)
class GatedCell(Cell):
    """Products with a gated weight ``[N, K]``: forward and backward together, or forward alone.

    As in :class:`.Cell`; ``op`` is :data:`STEP` or :data:`FORWARD`, ``block`` what a gate covers,
    ``nnz`` the number of open blocks, ``dtype`` that of ``x``.

    Args:
        w_dtype: of the weight.
        kind: ``"threshold"`` | ``"bernoulli"`` | ``"hard_concrete"``.
        reopen: whether closed gates get their gradient.
        dgate: whether gates get one at all.
        counted: whether calls know ``nnz``; who counts on a card waits for it.
        fuses_long: whether the card's matrix units read a left operand from registers or tensor
            memory, so that fusing pays for more rows.
    """

    w_dtype: torch.dtype = torch.float32
    kind: str = "threshold"
    reopen: bool = True
    dgate: bool = True
    counted: bool = True
    fuses_long: bool = False

    def key(self, rows: int | None = None) -> dict[str, object]:
        names = (name for least, name in _DENSITIES if self.density >= least)
        return super().key(rows) | {
            "w_dtype": str(self.w_dtype).removeprefix("torch."),
            "kind": self.kind,
            "reopen": self.reopen,
            "dgate": self.dgate,
            "density": next(names) if self.counted else "unknown",
        }


def same_density(blocks: int) -> list[tuple[int, int]]:
    """Numbers of open blocks, from and to, that share a record, out of so many; from many to few.

    Args:
        blocks: at least 1.
    """
    found, end = [], blocks
    for least, _ in _DENSITIES:
        first = math.floor(least * blocks)
        first += first / blocks < least
        if first <= end:
            found.append((first, end))
            end = first - 1
    return found
