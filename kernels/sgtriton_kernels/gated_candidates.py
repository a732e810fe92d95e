"""The methods of ``gated_linear``, and which of them can serve a layer.

One method computes a step's forward and backward: they hand each other what it keeps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from .blocks import GateLayout, fits_kernels, gate_layout
from .candidate import Candidate
from .cell import Cell
from .gated_cell import GatedCell
from .gated_torch import most_open

METHODS = ("multiply", "fused", "skip")

_METHODS = {name: Candidate(name, way=name) for name in METHODS}
_FUSED, _FUSED_LONG = 2048, 4096  # rows, above which fusing saves less than a library is faster


def named(op: str, impl: str, native: bool) -> tuple[Candidate, ...]:
    """Every method of an implementation; see :func:`.candidates.named`."""
    return tuple(_METHODS[name] for name in METHODS if impl == "triton" or name != "fused")


def serving(cell: Cell, found: Iterable[Candidate], copy_engine: bool) -> Iterator[Candidate]:
    """Those of ``found`` that can serve a layer."""
    assert isinstance(cell, GatedCell)
    layout = gate_layout((cell.N, cell.K), cell.block)
    for candidate in found:
        # blocks to skip are listed by waiting for the device, where no kernel of ours lists them
        waits = candidate.name == "skip" and cell.impl == "torch" and not cell.counted
        if not waits and why_not(candidate.name, cell.impl, cell.kind, layout) is None:
            yield candidate


def reasoned(cell: Cell) -> tuple[Candidate, str]:
    """What is taken without a record, and why."""
    assert isinstance(cell, GatedCell)
    layout = gate_layout((cell.N, cell.K), cell.block)
    if cell.impl == "triton":
        name, why = by_shape(layout, cell.kind, cell.M, cell.dtype, cell.fuses_long)
    else:
        name, why = _by_open_blocks(cell, layout)
    return _METHODS[name], why


def by_shape(
    layout: GateLayout, kind: str, rows: int, dtype: torch.dtype, fuses_long: bool
) -> tuple[str, str]:
    """The method of the Triton implementation, and why; reasoned, not measured.

    By what backward is sure to meet again: strides may change on the way (offloaded activations).
    """
    if kind == "hard_concrete":
        return "multiply", "hard_concrete gates are no bits"
    if why_not_skip(layout) is None:
        return "skip", "closed blocks are not even read"
    if rows > (_FUSED_LONG if fuses_long else _FUSED):
        return "multiply", "for many rows fusing saves less than a library's product is faster"
    if dtype == torch.float32:
        return "multiply", "fp32 products take registers that fusing needs"
    if any(size % 16 for size in layout.weight_shape):
        return "multiply", "rows are not aligned"
    return "fused", "few rows: the gated weight is neither written nor read"


def why_not_skip(layout: GateLayout) -> str | None:
    """Why the Triton kernels cannot skip blocks of ``layout``; ``None`` where they can."""
    sides = zip(layout.block, layout.weight_shape, strict=True)
    if not fits_kernels(side for side, whole in sides if side < whole):
        return f"it skips blocks whose sides are powers of two >= 16, not {layout.block}"
    return "each weight has its own gate" if layout.per_weight else None


def why_not(method: str, impl: str, kind: str, layout: GateLayout) -> str | None:
    """Why a method cannot be taken; ``None`` where it can."""
    if kind == "hard_concrete" and method != "multiply":
        return "hard_concrete gates are no bits"
    if method == "fused" and impl == "torch":
        return "the torch implementation has no such product"
    if method != "skip":
        return None
    if impl == "triton":
        return why_not_skip(layout)
    return "each weight has its own gate" if layout.per_weight else None


def _by_open_blocks(cell: GatedCell, layout: GateLayout) -> tuple[str, str]:
    if cell.kind == "hard_concrete":
        return "multiply", "hard_concrete gates are no bits"
    if layout.per_weight:
        return "multiply", "each weight has its own gate"
    if not cell.counted:
        return "multiply", "counting open blocks would wait for the device"
    most = most_open(cell.M, layout)
    if not most:
        return "multiply", "skipping does not pay for so small a product, or such blocks"
    if cell.nnz < most:
        return "skip", f"{cell.nnz} open blocks: skipping pays below {most:.0f}"
    return "multiply", f"{cell.nnz} open blocks: skipping pays below {most:.0f}"
