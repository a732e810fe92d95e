"""What a card should do with a block-sparse product, on paper: *predicted, not measured*.

For ``y[M, N] = x[M, K] W[N, K]^T`` with values of ``b`` bytes and a share ``d`` of blocks stored.

**Ideal.** With ``F`` floating point operations and ``B`` bytes of memory a second, a product takes
at least ``max(FLOPs / F, bytes / B)``:

    dense    2 M N K             b (N K + M K + M N)
    sparse   2 M N K d           b (d N K + M K + M N) + 4 bytes an index

The ideal speed-up is the ratio of both times. ``F`` is the matrix units' peak for 16 bits and, if
asked for, TF32, which AMD's cards are taken not to have; else that of fp32 units.

**Predicted.** The same dense time, against what the kernel's tile lets it reach:

- *memory*: the bytes above. An ``x`` that the last cache does not hold is read again, once for all
  programs in flight.
- *compute*: a program multiplies whole tiles, ``BLOCK_M`` rows where there may be fewer. Matrix
  units have a rate for each shape of tile (:func:`.matrix_rate`). The form ``"vector"`` uses fp32
  units, a conversion of 16-bit values and ``M`` multiply-adds a value.
- *shared-memory fill*: a program reads ``b (rows + BLOCK_N)`` bytes for each of the elements that
  it adds up, from the second-level cache (:func:`.fill_bandwidth`).
- *waves*: a multiprocessor works on one program at a time, as fast as on several; the last of
  ``programs / multiprocessors`` rounds leaves some idle.
- *imbalance*: block rows of a random pattern differ in length. Programs start in the kernel's
  order, longest rows first, each on the multiprocessor that is free next.
- *sums*: ``split`` programs write sums in fp32, which a second kernel reads.
- *start*: 2 microseconds a kernel, dense or sparse, assumed.

The gradient ``dx = dy W`` is the same with N and K exchanged, in the index's own order. That of the
values, ``dy^T x`` at the stored blocks, has a program for each part of a block, all as long; they
start by block columns, and ``dy`` is what is read again.

The dense product is taken at its ideal, which none reaches; a measured speed-up gains by what it
falls short. Left out: latency of memory beyond the start, reads of shared memory by ``mma.sync``
and fp32 units, the epilogue, stages and warps, clocks that sink under load, and that MI300X's dies
do not share their caches. Nothing is calibrated: what is published of another kernel on an A100
(bf16, blocks of 64, 90 %, many rows: 4.8x, worked out from torchao's results) is half of the
prediction.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from sgtriton_kernels.candidate import cut
from sgtriton_kernels.cards import Card
from sgtriton_kernels.cell import Cell
from sgtriton_kernels.tiles import BsrTile, tile_for_bsr_linear

from .card_rates import fill_bandwidth, peak, step_seconds
from .schedule import Programs, programs_of

BOUNDS = ("memory", "compute", "shared-memory fill", "waves", "imbalance", "sums", "start")

START = 2e-6
INDEX = 4  # bytes
# What evenness costs is named as the bound from here on.
_UNEVEN = 1.25


@dataclass(frozen=True)
class Prediction:
    """How long a sparse product takes in seconds, and what bounds it.

    ``programs`` is what a tile's programs take where memory keeps up with them.
    """

    seconds: float
    bound: str
    tile: BsrTile
    programs: float


def at_sparsity(cell: Cell, sparsity: float) -> Cell:
    """The same product with another share of blocks not stored, as near as whole blocks come."""
    return replace(cell, nnz=round((1 - sparsity) * cell.block_rows * cell.block_cols))


def ideal_seconds(card: Card, cell: Cell, density: float | None = None) -> float:
    """The least time of a product.

    Args:
        density: share of the blocks that is stored, if not the cell's.
    """
    density = cell.density if density is None else density
    flops = 2 * cell.M * cell.N * cell.K * density
    busy = flops / peak(card, cell.dtype, cell.precision)
    return max(busy, _memory_seconds(card, cell, density))


def _memory_seconds(card: Card, cell: Cell, density: float, readings: float = 1.0) -> float:
    """What memory takes if what programs share is read so many times."""
    N, K, (bn, bk) = cell.N, cell.K, cell.block
    x, dy, w = cell.M * K, cell.M * N, density * N * K
    blocks = w / (bn * bk)
    again, indices = {
        "bsr_linear fwd": (x, blocks + N / bn),
        "bsr_linear dx": (dy, 2 * blocks + K / bk),
        "bsr_linear dvalues": (dy, 3 * blocks),
    }[cell.op]
    moved = cell.dtype.itemsize * (w + x + dy + (readings - 1) * again) + INDEX * indices
    return moved / (card.bandwidth_gbs * 1e9)


def ideal_dense_seconds(card: Card, cell: Cell) -> float:
    """The least time of the dense product in a product's place."""
    M, N, K = cell.M, cell.N, cell.K
    moved = cell.dtype.itemsize * (N * K + M * K + M * N)
    busy = 2 * M * N * K / peak(card, cell.dtype, cell.precision)
    return max(busy, moved / (card.bandwidth_gbs * 1e9))


def ideal_speedup(card: Card, cell: Cell, sparsity: float) -> float:
    """The dense product's least time by the sparse one's."""
    return ideal_dense_seconds(card, cell) / ideal_seconds(card, cell, 1 - sparsity)


def dense_seconds(card: Card, cell: Cell) -> float:
    """The dense product with a weight that is there, at its ideal."""
    return ideal_dense_seconds(card, cell) + START


def unpack_seconds(card: Card, cell: Cell) -> float:
    """The dense product with a weight that is filled in first.

    Zeros are written, then blocks read and written over them: two more kernels, whose bytes go
    through memory. Of the gradient of the values blocks are read and written afterwards, by one.
    """
    whole, kernels = (0, 1) if cell.op == "bsr_linear dvalues" else (1, 2)
    written = (whole + 2 * cell.density) * cell.N * cell.K * cell.dtype.itemsize
    indices = cell.nnz + cell.block_rows
    seconds = (written + INDEX * indices) / (card.bandwidth_gbs * 1e9)
    return seconds + kernels * START + dense_seconds(card, cell)


def predict(card: Card, cell: Cell, tile: BsrTile | None = None) -> Prediction:
    """How long a product should take with a random pattern.

    Args:
        tile: not of the form ``"pairs"``; cut to the block. The kernel's own choice if ``None``.
    """
    which, (bn, bk) = cell.op.removeprefix("bsr_linear "), cell.block
    if tile is None:
        tile = tile_for_bsr_linear(
            which, cell.M, cell.N, cell.K, cell.block, cell.nnz, cell.dtype, cell.aligned
        )
    if tile.form == "pairs":
        raise ValueError("what pairs of rows share depends on the pattern: no prediction")
    tile = cut(tile, cell)
    programs = programs_of(cell, tile, card.multiprocessors)
    # x, in backward dy; of the values' gradient the first share of the rows is multiplied first
    size = cell.dtype.itemsize * cell.M * (cell.K if which == "fwd" else cell.N)
    if which == "dvalues":
        size /= tile.split
    again = readings(card, size, programs, cell.density)
    memory = _memory_seconds(card, cell, cell.density, again)
    starts, sums = START, 0.0
    if tile.split > 1:
        result = {"fwd": cell.M * cell.N, "dx": cell.M * cell.K}.get(which, cell.nnz * bn * bk)
        starts, sums = 2 * START, sums_seconds(card, tile.split * result)
    return bounded(card, cell, tile, programs, memory, sums, starts)


def bounded(
    card: Card,
    cell: Cell,
    tile: BsrTile,
    programs: Programs,
    memory: float,
    sums: float,
    starts: float,
) -> Prediction:
    """What the programs of a tile take beside memory, sums and starts, and which is the most.

    Args:
        memory, sums, starts: seconds.
    """
    multiply, fill = step_seconds(
        card, programs.tile, programs.rows, programs.depth, cell.dtype, cell.precision
    )
    last = programs.last * max(multiply, fill)
    busy = max(memory, last)
    if starts > busy + sums:
        bound = "start"
    elif sums > busy:
        bound = "sums"
    elif memory >= last:
        bound = "memory"
    elif programs.last > _UNEVEN * programs.even:
        by_waves = programs.waves / programs.even >= programs.last / programs.waves
        bound = "waves" if by_waves else "imbalance"
    else:
        bound = "compute" if multiply >= fill else "shared-memory fill"
    return Prediction(busy + sums + starts, bound, tile, last)


def sums_seconds(card: Card, count: int) -> float:
    """What it takes to write sums in fp32 and to read them, in the second-level cache if it can."""
    size = 4 * count
    inside = size <= card.l2_mb * 2**20
    return 2 * size / (fill_bandwidth(card)[0] if inside else card.bandwidth_gbs * 1e9)


def readings(card: Card, size: float, programs: Programs, density: float) -> float:
    """How many times memory is asked for what programs share.

    Once if the last cache holds it. Else what any of the programs in flight, one a multiprocessor,
    needs of it is read once for them all.

    Args:
        size: bytes of it.
        density: the share of it that a list needs.
    """
    if is_held(card, size):
        return 1.0
    together = lists_in_flight(card, programs)
    return max(1.0, programs.lists / together * (1 - (1 - density) ** together))


def is_held(card: Card, size: float) -> bool:
    """Whether the card's last cache holds so many bytes."""
    return size <= (card.last_level_mb or card.l2_mb) * 2**20


def lists_in_flight(card: Card, programs: Programs) -> float:
    """How many lists the programs in flight have between them."""
    of_a_list = programs.list_programs
    return max(1.0, card.multiprocessors / of_a_list) if of_a_list else 1.0


def predicted_speedup(card: Card, cell: Cell) -> float:
    """The dense product's ideal time, and its start, by what is predicted of the sparse one."""
    return dense_seconds(card, cell) / predict(card, cell).seconds


def break_even(speedup: Callable[[float], float], most: float = 1.0) -> float:
    """The least sparsity, in hundredths, from which on nothing is slower than dense; or 1.

    Args:
        speedup: over dense, at a sparsity.
        most: the highest sparsity that is looked at.
    """
    first = least = min(99, math.floor(100 * most + 1e-9)) + 1
    while least > 1 and speedup((least - 1) / 100) >= 1:
        least -= 1
    return 1.0 if least == first else least / 100
