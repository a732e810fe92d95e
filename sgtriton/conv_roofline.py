"""What a card should do with a block-sparse convolution, on paper: *predicted, not measured*.

A convolution is a product of ``M`` pixels with a matrix: N output channels, and K input channels
times taps. :mod:`.roofline` says what takes time in such a product; of a convolution it is:

- *ideal*: in every pass each pixel of the result meets each weight once, of the sparse layer each
  that is stored. Memory is asked once for the weight, the result and the pixels of ``x`` that taps
  meet: for ``x``, not for ``x`` as often as there are taps.
- *shared-memory fill*: a program reads ``x`` anew for each tap of a block, from the second-level
  cache, where programs of the same pixels have it.
- *memory*: an ``x`` that the last cache does not hold is read again, once for all programs in
  flight, which need more of it than a block of a linear product would: any tap of a block.
- *dx*: a program gathers for each pixel of ``x``, blocks of all taps in one list. With a stride it
  multiplies pixels that no output met, as zeros, which the ideal does not.
- *dvalues*: blocks are handed out tap by tap, so that ``x`` is read again for each tap, and the
  gradient of the result for those in flight. Programs that share the pixels are in flight
  together. Their sums are added in fp32, then rounded: two more kernels.
- Images whose channels do not lie side by side are copied before, at the memory's speed.

The dense convolution, and the one whose weight is filled in first, are taken at the ideal of direct
products; a library may do with fewer of them (Winograd's transforms), and falls short of the ideal
otherwise. Left out, beside what :mod:`.roofline` leaves out: the addresses and masks of pixels,
which take integer units and registers; what the first-level cache keeps for the next tap; and
zeros around the image, multiplied as pixels are.
"""

from __future__ import annotations

import math
from dataclasses import replace

from sgtriton_kernels.candidate import cut
from sgtriton_kernels.cards import Card
from sgtriton_kernels.cell import Cell
from sgtriton_kernels.conv_cell import ConvCell
from sgtriton_kernels.tiles import BsrTile, tile_for_bsr_conv

from .card_rates import peak
from .roofline import (
    INDEX,
    START,
    Prediction,
    bounded,
    is_held,
    lists_in_flight,
    readings,
    sums_seconds,
)
from .schedule import Programs, programs_of


def ideal_seconds(card: Card, cell: ConvCell, density: float | None = None) -> float:
    """The least time of a pass.

    Args:
        density: share of the blocks that is stored, if not the cell's.
    """
    density = cell.density if density is None else density
    return max(density * _multiply_seconds(card, cell), _memory_seconds(card, cell, density))


def ideal_dense_seconds(card: Card, cell: ConvCell) -> float:
    """The least time of the dense layer's pass, by direct products."""
    x, out = _images(cell)
    memory = (_weights(cell) + x + out) * cell.dtype.itemsize / (card.bandwidth_gbs * 1e9)
    return max(_multiply_seconds(card, cell), memory)


def dense_seconds(card: Card, cell: ConvCell) -> float:
    """The library's convolution with a weight that is there, at its ideal."""
    return ideal_dense_seconds(card, cell) + START


def unpack_seconds(card: Card, cell: ConvCell) -> float:
    """The library's convolution with a weight that is filled in first.

    Zeros are written, blocks read and written over them, and the matrix is laid out as a weight:
    three more kernels, whose bytes go through memory. Of the gradient of the values the dense one
    is laid out as a matrix, and blocks are read and written: by two.
    """
    whole, kernels = (2, 2) if cell.op == "bsr_conv dvalues" else (3, 3)
    moved = (whole + 2 * cell.density) * _weights(cell) * cell.dtype.itemsize + INDEX * cell.nnz
    return moved / (card.bandwidth_gbs * 1e9) + kernels * START + dense_seconds(card, cell)


def predict(card: Card, cell: ConvCell, tile: BsrTile | None = None) -> Prediction:
    """How long a pass should take with a random pattern.

    Args:
        tile: cut to the block. The kernel's own choice if ``None``.
    """
    which, (bn, bk) = cell.op.split()[1], cell.block
    if tile is None:
        tile = tile_for_bsr_conv(which, cell.M, cell.block, cell.nnz, cell.dtype, cell.aligned)
    tile = cut(tile, cell)
    programs = programs_of(as_product(cell), tile, card.multiprocessors)
    memory = _memory_seconds(card, cell, cell.density, *_readings(card, cell, programs))
    starts, sums = 1, 0.0
    if tile.split > 1:
        values = cell.nnz * bn * bk
        starts += 2
        sums = sums_seconds(card, tile.split * values) + sums_seconds(card, values)
    if not cell.channels_last:
        x, out = _images(cell)
        read = {"fwd": (x,), "dx": (out,), "dvalues": (x, out)}[which]
        starts += len(read)
        memory += 2 * sum(read) * cell.dtype.itemsize / (card.bandwidth_gbs * 1e9)
    return bounded(card, cell, tile, programs, memory, sums, starts * START)


def predicted_speedup(card: Card, cell: ConvCell) -> float:
    """The dense layer's ideal time, and its start, by what is predicted of the sparse one."""
    return dense_seconds(card, cell) / predict(card, cell).seconds


def as_product(cell: ConvCell) -> Cell:
    """The linear product whose programs are those of a convolution.

    Of dx the blocks of a block of input channels are one list, whatever their tap.
    """
    which, (bn, bk), g = cell.op.split()[1], cell.block, cell.geometry
    sides = cell.N, cell.K
    if which == "dx":
        rows, cols = g.blocks(cell.block)
        sides = rows * g.taps * bn, g.groups * cols * bk
    return Cell(
        f"bsr_linear {which}", cell.impl, cell.M, *sides, cell.block, cell.nnz, cell.dtype,
        cell.longest, cell.precision, cell.aligned,
    )  # fmt: skip


def _weights(cell: ConvCell) -> int:
    """Of the dense layer."""
    g = cell.geometry
    return g.out_channels * g.in_per_group * g.taps


def _images(cell: ConvCell) -> tuple[int, int]:
    """Elements of ``x`` that taps meet, and of the result."""
    g, pixels = cell.geometry, cell.images * math.prod(cell.out_size)
    met = min(cell.images * math.prod(cell.size), pixels * g.taps)
    return met * g.in_channels, pixels * g.out_channels


def _multiply_seconds(card: Card, cell: ConvCell) -> float:
    """Of the dense layer's products."""
    pixels = cell.images * math.prod(cell.out_size)
    return 2 * pixels * _weights(cell) / peak(card, cell.dtype, cell.precision)


def _memory_seconds(
    card: Card, cell: ConvCell, density: float, x_times: float = 1.0, out_times: float = 1.0
) -> float:
    """What memory takes if ``x`` and the result, or its gradient, are moved so many times."""
    (x, out), g, nnz = _images(cell), cell.geometry, density * cell.block_rows * cell.block_cols
    rows, cols = g.blocks(cell.block)
    indices = {
        "bsr_conv fwd": nnz + g.groups * rows,
        "bsr_conv dx": 2 * nnz + g.groups * cols,
        "bsr_conv dvalues": 3 * nnz,
    }[cell.op]
    elements = density * _weights(cell) + x_times * x + out_times * out
    moved = cell.dtype.itemsize * elements + INDEX * indices
    return moved / (card.bandwidth_gbs * 1e9)


def _readings(card: Card, cell: ConvCell, programs: Programs) -> tuple[float, float]:
    """How many times memory is asked for ``x``, and for the result or its gradient."""
    x, out = (size * cell.dtype.itemsize for size in _images(cell))
    g = cell.geometry
    if cell.op == "bsr_conv dvalues":
        side_by_side = replace(programs, list_programs=programs.tile.split * programs.list_programs)
        in_flight = lists_in_flight(card, side_by_side)
        columns = g.blocks(cell.block)[1]  # of a tap
        again = 1.0 if is_held(card, x) else g.taps / max(1.0, in_flight / columns)
        return max(1.0, again), readings(card, out, side_by_side, cell.density)
    own = replace(programs, lists=programs.lists / g.groups)  # a list meets its group's channels
    met = 1 - (1 - cell.density) ** g.taps  # share of the channels of which a list has a block
    if cell.op == "bsr_conv fwd":
        return readings(card, x, own, met), 1.0
    return 1.0, readings(card, out, own, met)
