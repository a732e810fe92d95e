"""Shared memory: what a tile's program takes of it, and what a device gives one program.

A launch that asks for more fails. What is reasoned fits every card; what a record names need not.
"""

from __future__ import annotations

import torch

from .candidate import cut
from .cell import Cell
from .records import architecture
from .tiles import BsrTile

# their matrix units read operands of 16 bits and tf32 from shared memory, so that the step that is
# multiplied has a buffer as well; elsewhere it lies in registers
_FROM_BUFFERS = ("sm_90", "sm_100")
_BESIDES = 256  # bytes of barriers; up to 48 were seen


def fits(tile: BsrTile, cell: Cell, device: torch.device) -> bool:
    """Whether a program gets the shared memory that its tile takes.

    Args:
        tile: of the program.
        cell: what it computes: a pass of ``bsr_linear``, or of ``bsr_conv``, whose programs keep
            pixels where the former keep rows.
        device: that it runs on.
    """
    if device.type != "cuda":  # a CPU has none, and others are not asked
        return True
    return bytes_of(tile, cell, architecture(device)) <= _most(device)


def bytes_of(tile: BsrTile, cell: Cell, arch: str) -> int:
    """Bytes that a program takes: buffers of the pipeline, which sums go through afterwards.

    Args:
        cell: what it computes.
        arch: ``"sm_90"``, ``"gfx942"``, ...
    """
    part = cut(tile, cell)
    n, m, k = part.BLOCK_N, part.BLOCK_M, part.BLOCK_K
    step = {"fwd": (n + m) * k, "dx": (k + m) * n, "dvalues": (n + k) * m}[cell.op.split()[1]]
    wide = cell.dtype.itemsize > 2
    all_of_them = arch in _FROM_BUFFERS and (not wide or cell.precision == "tf32")
    if tile.bulk and wide:  # a tile that the copy engine brought is laid out anew, through another
        all_of_them = True
    buffers = tile.num_stages if all_of_them else max(tile.num_stages - 1, 1)
    return buffers * step * cell.dtype.itemsize + _BESIDES


def _most(device: torch.device) -> int:
    """Bytes that a program can have, as the driver says."""
    found = torch.cuda.get_device_properties(device)
    # AMD's cards have no more than is there unasked
    return getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block)
