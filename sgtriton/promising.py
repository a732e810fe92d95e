"""What a search compares on a device."""

from __future__ import annotations

import torch
from sgtriton_kernels.bsr_candidates import cut
from sgtriton_kernels.candidate import Candidate
from sgtriton_kernels.cell import Cell
from sgtriton_kernels.lookup import analytic, recordable
from sgtriton_kernels.records import architecture

from .cross_compile import COPY_ENGINES


def contenders(cell: Cell, device: torch.device) -> list[Candidate]:
    """What reasoning gives for a product, and what a record can name there that differs from it."""
    reasoned, engine = analytic(cell).candidate, architecture(device) in COPY_ENGINES
    own = reasoned.tile and cut(reasoned.tile, cell)
    found = [reasoned]
    for candidate in recordable(cell, device).values():
        tile = candidate.tile
        if candidate == reasoned or (tile and tile.bulk and not engine):
            continue
        if tile and cut(tile, cell) == own:
            continue
        found.append(candidate)
    return found
