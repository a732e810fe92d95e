"""What a card should do with block-sparse serving, on paper: *predicted, not measured*.

For ``y[M, N] = x[M, K] W[N, K]^T`` with values of ``b`` bytes and a share ``d`` of blocks stored.

**Ideal.** With ``F`` floating point operations and ``B`` bytes of memory a second, a product takes
at least ``max(FLOPs / F, bytes / B)``:

    dense    2 M N K             b (N K + M K + M N)
    sparse   2 M N K d           b (d N K + M K + M N) + 4 bytes a block and a block row

The ideal speed-up is the ratio of both times.

**Predicted.** The same dense time, against what the kernel's tile lets it reach:

- *memory*: the bytes above. An ``x`` that the last cache does not hold is read again, once for all
  programs in flight.
- *compute*: a program multiplies whole tiles, ``BLOCK_M`` rows where there may be fewer. Matrix
  units have a rate for each shape of tile (:func:`matrix_rate`). The form ``"vector"`` uses fp32
  units, a conversion and ``M`` multiply-adds a value.
- *shared-memory fill*: a program reads ``b (rows + BLOCK_N)`` bytes for each of the elements that
  it adds up, from the second-level cache (:func:`fill_bandwidth`).
- *waves*: a multiprocessor works on one program at a time, as fast as on several; the last of
  ``programs / multiprocessors`` rounds leaves some idle.
- *imbalance*: block rows of a random pattern differ in length. Programs start in the kernel's
  order, longest rows first, each on the multiprocessor that is free next.
- *sums*: ``split`` programs write sums in fp32, which a second kernel reads.
- *start*: 2 microseconds a kernel, dense or sparse, assumed.

The dense product is taken at its ideal, which none reaches; a measured speed-up gains by what it
falls short. Left out: latency of memory beyond the start, reads of shared memory by ``mma.sync``,
the epilogue, clocks that sink under load, and that MI300X's dies do not share their caches.
Nothing is calibrated: what is published of another kernel on an A100 (bf16, blocks of 64, 90 %,
many rows: 4.8x, worked out from torchao's results) is half of the prediction.
"""

from __future__ import annotations

import functools
import heapq
import random
from collections import Counter
from dataclasses import dataclass, replace

import torch
from sgtriton_kernels.cards import Card
from sgtriton_kernels.tiles import BsrTile, tile_for_bsr_linear

BOUNDS = ("memory", "compute", "shared-memory fill", "waves", "imbalance", "sums", "start")

_BYTES = 2  # of a value: bf16
_INDEX = 4
START = 2e-6
# What evenness costs is named as the bound from here on.
_UNEVEN = 1.25

# Bytes a clock that a multiprocessor reads from the second-level cache where no document has it,
# assumed. sm_90: A100's published figure is 47; what arXiv:2402.13499 is cited for, of the same
# die, comes to 39. sm_100: a guess, about what dense products near the peak take. Cards with GDDR:
# a guess; 3.6 TB/s is reported of an RTX 4090, which is 11.
_ASSUMED_FILL = {"sm_90": 40, "sm_100": 64}
_ASSUMED_FILL_GDDR = 16

# mma.sync's share of the peak where there are larger matrix instructions: as arXiv:2501.12084 is
# cited for Hopper; assumed to do as much a clock on Blackwell, whose peak is twice as high.
_MMA_SYNC = {"sm_90": 0.63, "sm_100": 0.31}


@dataclass(frozen=True)
class Prediction:
    """How long a sparse product takes in seconds, and what bounds it."""

    seconds: float
    bound: str
    tile: BsrTile


def ideal_seconds(
    card: Card, M: int, N: int, K: int, density: float = 1.0, block: int | None = None
) -> float:
    """The least time of a product in bf16; of a dense one without ``block``."""
    flops = 2 * M * N * K * density
    return max(flops / (card.tflops_16bit * 1e12), _memory_seconds(card, M, N, K, density, block))


def _memory_seconds(
    card: Card, M: int, N: int, K: int, density: float, block: int | None, readings: float = 1.0
) -> float:
    """What memory takes if ``x`` is read so many times."""
    moved = _BYTES * (density * N * K + readings * M * K + M * N)
    if block is not None:
        moved += _INDEX * (density * N * K / block**2 + N / block)
    return moved / (card.bandwidth_gbs * 1e9)


def ideal_speedup(card: Card, M: int, N: int, K: int, block: int, sparsity: float) -> float:
    """The dense product's least time by the sparse one's."""
    return ideal_seconds(card, M, N, K) / ideal_seconds(card, M, N, K, 1 - sparsity, block)


def fill_bandwidth(card: Card) -> tuple[float, str]:
    """Bytes a second from the second-level cache to all multiprocessors, and where that is from.

    The latter is ``"published"`` | ``"assumed"``.
    """
    clock = card.boost_mhz * 1e6
    if card.l2_bytes_per_clock is not None:
        return card.l2_bytes_per_clock * clock, "published"
    each = _ASSUMED_FILL.get(card.arch, _ASSUMED_FILL_GDDR)
    return each * card.multiprocessors * clock, "assumed"


def matrix_rate(card: Card, tile: BsrTile) -> float:
    """The share of the matrix units' peak that products of a tile's shape can have.

    - Hopper's ``wgmma`` takes a left operand of 64 rows and reads both from shared memory at 128
      bytes a clock: ``max(n / 2, 16 + n / 4)`` clocks for ``n`` columns, of which ``n / 2`` are
      products (what arXiv:2501.12084 is cited for).
    - Blackwell's ``tcgen05.mma`` takes one of 64 rows at half of its rate, as is reported, one of
      128 at all of it.
    - Narrower ones go to ``mma.sync``.
    """
    left, right = tile.BLOCK_M, tile.BLOCK_N
    if tile.form == "weight_left":
        left, right = right, left
    if card.arch not in _MMA_SYNC:
        return 1.0
    if left < 64:
        return _MMA_SYNC[card.arch]
    if card.arch == "sm_90":
        return (right / 2) / max(right / 2, 16 + right / 4)
    return 0.5 if left < 128 else 1.0


def step_seconds(card: Card, tile: BsrTile, M: int, depth: int) -> tuple[float, float]:
    """What a multiprocessor takes to multiply ``depth`` elements of a tile, and to fill them in."""
    if tile.form == "vector":
        flops = 2 * (min(tile.BLOCK_M, M) + 1) * tile.BLOCK_N * depth
        peak = _fp32(card)
    else:
        flops = 2 * tile.BLOCK_M * tile.BLOCK_N * depth
        peak = card.tflops_16bit * 1e12 * matrix_rate(card, tile)
    filled = _BYTES * (min(tile.BLOCK_M, M) + tile.BLOCK_N) * depth
    bandwidth, _ = fill_bandwidth(card)
    return flops * card.multiprocessors / peak, filled * card.multiprocessors / bandwidth


def _fp32(card: Card) -> float:
    if card.tflops_fp32 is not None:
        return card.tflops_fp32 * 1e12
    return 2 * 128 * card.multiprocessors * card.boost_mhz * 1e6  # NVIDIA's lanes since Ampere


def tile_reach(card: Card, tile: BsrTile) -> float:
    """The share of the matrix units' peak that a tile can reach with full rows of ``x``."""
    multiply, fill = step_seconds(card, tile, tile.BLOCK_M, 1)
    return multiply * matrix_rate(card, tile) / max(multiply, fill)


@functools.cache
def _order(block_rows: int, block_cols: int) -> tuple[int, ...]:
    """The block row of each block, in the order in which a random pattern stores more and more."""
    order = [row for row in range(block_rows) for _ in range(block_cols)]
    random.Random(0).shuffle(order)
    return tuple(order)


@functools.cache
def row_lengths(block_rows: int, block_cols: int, nnz: int) -> tuple[int, ...]:
    """How many of ``nnz`` random blocks each block row has, longest first."""
    found = Counter(_order(block_rows, block_cols)[:nnz])
    return tuple(sorted((found[row] for row in range(block_rows)), reverse=True))


@functools.cache
def makespan(
    lengths: tuple[int, ...], parts: int, split: int, tiles_m: int, processors: int
) -> int:
    """When the last program ends, in blocks, as the kernel's order hands them out."""
    free = [0] * processors
    for length in lengths:
        share = -(-length // split)
        pieces = [max(min(share, length - i * share), 0) for i in range(split)]
        for piece in pieces * parts:
            for _ in range(tiles_m if piece else 0):
                heapq.heapreplace(free, free[0] + piece)
    return max(free)


def predict(
    card: Card,
    M: int,
    N: int,
    K: int,
    block: int,
    sparsity: float,
    tile: BsrTile | None = None,
) -> Prediction:
    """How long ``bsr_linear`` should take with square blocks, a random pattern, and bf16.

    Args:
        tile: not of the form ``"pairs"``; cut to the block. The kernel's own choice if ``None``.
    """
    rows, cols = -(-N // block), -(-K // block)
    nnz = round((1 - sparsity) * rows * cols)
    if tile is None:
        tile = tile_for_bsr_linear("fwd", M, N, K, (block, block), nnz, torch.bfloat16)
    if tile.form == "pairs":
        raise ValueError("what pairs of rows share depends on the pattern: no prediction")
    tile = replace(tile, BLOCK_N=min(tile.BLOCK_N, block), BLOCK_K=min(tile.BLOCK_K, block))
    parts, tiles_m = block // tile.BLOCK_N, -(-M // tile.BLOCK_M)
    multiply, fill = step_seconds(card, tile, M, block)
    step = max(multiply, fill)

    lengths = row_lengths(rows, cols, nnz)
    programs = rows * parts * tile.split * tiles_m
    even = nnz * parts * tiles_m / card.multiprocessors
    waves = -(-programs // card.multiprocessors) * nnz / (rows * tile.split)
    last = makespan(lengths, parts, tile.split, tiles_m, card.multiprocessors)

    density = nnz / (rows * cols)
    memory = _memory_seconds(card, M, N, K, density, block, _readings(card, M, N, K, density, tile))
    starts, sums = START, 0.0
    if tile.split > 1:
        starts, size = 2 * START, 4 * tile.split * M * N
        inside = size <= card.l2_mb * 2**20
        sums = 2 * size / (fill_bandwidth(card)[0] if inside else card.bandwidth_gbs * 1e9)
    busy = max(memory, last * step)
    if starts > busy + sums:
        bound = "start"
    elif sums > busy:
        bound = "sums"
    elif memory >= last * step:
        bound = "memory"
    elif last > _UNEVEN * even:
        bound = "waves" if waves / even >= last / waves else "imbalance"
    else:
        bound = "compute" if multiply >= fill else "shared-memory fill"
    return Prediction(busy + sums + starts, bound, tile)


def _readings(card: Card, M: int, N: int, K: int, density: float, tile: BsrTile) -> float:
    """How many times memory is asked for ``x``.

    Once if the last cache holds it. Else what any of the programs in flight, one a multiprocessor,
    needs of it is read once for them all.
    """
    size = _BYTES * M * K
    if size <= (card.last_level_mb or card.l2_mb) * 2**20:
        return 1.0
    together = max(1.0, card.multiprocessors / -(-M // tile.BLOCK_M))  # tiles of outputs
    return max(1.0, N / tile.BLOCK_N / together * (1 - (1 - density) ** together))


def predicted_speedup(card: Card, M: int, N: int, K: int, block: int, sparsity: float) -> float:
    """The dense product's ideal time, and its start, by what is predicted of the sparse one."""
    dense = ideal_seconds(card, M, N, K) + START
    return dense / predict(card, M, N, K, block, sparsity).seconds


def break_even(card: Card, M: int, N: int, K: int, block: int) -> float:
    """The least sparsity, in hundredths, from which on the prediction is not below dense; or 1."""
    least = 100
    while least > 1 and predicted_speedup(card, M, N, K, block, (least - 1) / 100) >= 1:
        least -= 1
    return least / 100
