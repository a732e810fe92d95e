"""Named ways to compute a pass of ``bsr_linear``, and which of them can serve a product."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from .block_products import AT_ONCE, ELEMENTS
from .bsr_library import library_serves
from .cell import Cell
from .tiles import BsrTile

_FEW_ROWS = 8  # of x, up to which the form "vector" computes


@dataclass(frozen=True)
class Candidate:
    """A named way to compute a pass; records hold the name, never the numbers.

    Args:
        name: in its pass.
        tile: of the Triton kernel; ``None`` if another product computes it.
        way: of the ``torch`` implementation: one of :func:`.block_products.multiply`, or
            ``"library"``, the library's own product of such a matrix; ``"unpack"``: the dense
            weight is filled in, then the library's dense product (both implementations).
        elements: that such a way handles at a time.
    """

    name: str
    tile: BsrTile | None = None
    way: str | None = None
    elements: int | None = None


ANALYTIC = "analytic"  # names what reasoning gives, in a record
UNPACK = Candidate("unpack", way="unpack")


def _named(*tiles: BsrTile) -> tuple[Candidate, ...]:
    return tuple(Candidate(tile.name, tile) for tile in tiles)


BSR_LINEAR_CANDIDATES = _named(
    *(
        BsrTile(128, m, k, stages, warps)
        for m, k, stages, warps in (
            (16, 32, 4, 2), (16, 64, 4, 4), (32, 32, 4, 4), (32, 64, 3, 4),
            (64, 32, 4, 4), (64, 64, 3, 4), (128, 32, 3, 4), (128, 64, 3, 8),
        )
    ),
    # parts of large blocks, for few rows
    *(
        BsrTile(n, m, 64, 4, warps)
        for n, m, warps in (
            (16, 16, 2), (16, 32, 2), (16, 64, 4), (32, 16, 2), (32, 32, 4), (32, 64, 4),
        )
    ),
    *(
        BsrTile(128, m, k, stages, warps, "weight_left", split)
        for m, k, stages, warps in ((16, 64, 4, 4), (16, 128, 3, 4), (32, 64, 3, 4), (64, 64, 3, 4))
        for split in (1, 2, 4, 8)
    ),
    *(
        BsrTile(128, m, k, stages, warps, form, 1, bulk=True)
        for m, k, stages, warps, form in (
            (16, 64, 4, 4, "weight_left"), (64, 64, 4, 4, "x_left"), (128, 32, 4, 4, "x_left"),
            (128, 64, 3, 4, "x_left"), (128, 64, 4, 8, "x_left"),
        )
    ),
    *(
        BsrTile(n, m, 64, stages, warps, "vector")
        for n, stages, warps in ((16, 4, 4), (32, 4, 4), (16, 2, 2))
        for m in (1, 2, 4)
    ),
    BsrTile(16, 8, 64, 3, 4, "vector"),
    BsrTile(128, 64, 32, 4, 8, "pairs"), BsrTile(128, 128, 32, 4, 8, "pairs"),
)  # fmt: skip

DX_CANDIDATES = _named(
    *(
        BsrTile(depth, m, out, stages, warps, form, split)
        for m, out, depth, stages, warps, form, splits in (
            (16, 128, 64, 3, 4, "weight_left", (1, 2, 4, 8)),
            (32, 128, 32, 3, 4, "weight_left", (1, 2, 4)),
            (16, 64, 64, 4, 2, "x_left", (1, 2, 4)), (64, 64, 32, 4, 4, "x_left", (1, 2)),
            (64, 128, 32, 3, 4, "x_left", (1,)), (128, 64, 32, 3, 4, "x_left", (1,)),
            (128, 128, 32, 3, 8, "x_left", (1,)),
        )
        for split in splits
    )
)  # fmt: skip

DVALUES_CANDIDATES = _named(
    *(
        BsrTile(n, m, k, stages, warps, split=split)
        for n, k, m, stages, warps in (
            (32, 32, 64, 4, 4), (64, 32, 32, 4, 4), (64, 64, 32, 4, 4), (64, 64, 64, 3, 4),
            (128, 64, 32, 3, 8),
        )
        for split in (1, 4, 16)
    )
)  # fmt: skip

# for Triton's CPU compiler: sums that fit the registers of AVX2, or twice as many
_NATIVE = {
    "bsr_linear fwd": _named(
        *(
            BsrTile(n, m, k, 1, 1, form)
            for form in ("weight_left", "x_left")
            for n, m, k in (
                (4, 16, 64), (8, 8, 64), (16, 4, 64), (4, 32, 32), (8, 16, 32), (16, 16, 16),
            )
        ),
        *(BsrTile(n, m, 64, 1, 1, "vector") for n in (8, 16, 32) for m in (1, 2, 4)),
    ),
    "bsr_linear dx": _named(
        *(
            BsrTile(n, m, k, 1, 1)
            for n, m, k in ((32, 4, 16), (16, 4, 16), (64, 4, 16), (32, 8, 8), (16, 16, 16))
        )
    ),
    "bsr_linear dvalues": _named(
        *(
            BsrTile(n, m, k, 1, 1)
            for n, m, k in ((4, 8, 32), (4, 16, 16), (8, 8, 16), (4, 32, 32), (16, 16, 16))
        )
    ),
}  # fmt: skip

_CARDS = {
    "bsr_linear fwd": BSR_LINEAR_CANDIDATES,
    "bsr_linear dx": DX_CANDIDATES,
    "bsr_linear dvalues": DVALUES_CANDIDATES,
}

_ELEMENTS = {"_256k": ELEMENTS >> 2, "": ELEMENTS, "_4m": ELEMENTS << 2}
_WAYS = (
    *(
        Candidate(f"{way}{suffix}", None, way, elements)
        for way in ("batches", "layers")
        for suffix, elements in _ELEMENTS.items()
    ),
    *(Candidate(way, None, way) for way in ("loop", "rows", "columns", "dense", "library")),
)


@functools.cache
def named(op: str, impl: str, native: bool) -> dict[str, Candidate]:
    """Every candidate of a pass by its name; nothing else can be recorded.

    Args:
        op: as in :class:`.Cell`.
        impl: ``"triton"`` | ``"torch"``.
        native: whether kernels are compiled for a CPU.
    """
    if impl == "torch":
        found = (*_WAYS, UNPACK) if op == "bsr_linear fwd" else ()
    else:
        tiles = (_NATIVE if native else _CARDS).get(op, ())
        found = (*tiles, UNPACK) if op in ("bsr_linear fwd", "bsr_linear dx") else tiles
    return {candidate.name: candidate for candidate in found}


def candidates(cell: Cell, copy_engine: bool = False) -> tuple[Candidate, ...]:
    """Those that can serve a product and differ from one another there.

    Args:
        cell: the product.
        copy_engine: whether the card has one; without, tiles that want it are as the others.
    """
    found = named(cell.op, cell.impl, cell.native).values()
    if cell.impl == "torch":
        return tuple(_ways(cell, found))
    kept: dict[BsrTile | None, Candidate] = {}
    for candidate in found:
        tile = candidate.tile
        if tile is None:
            kept[None] = candidate
        elif _serves(tile, cell, copy_engine):
            kept.setdefault(_cut(tile, cell), candidate)
    return tuple(kept.values())


def _cut(tile: BsrTile, cell: Cell) -> BsrTile:
    bn, bk = cell.block
    n = tile.BLOCK_N if tile.form == "pairs" else min(tile.BLOCK_N, bn)
    return replace(tile, BLOCK_N=n, BLOCK_K=min(tile.BLOCK_K, bk))


def _serves(tile: BsrTile, cell: Cell, copy_engine: bool) -> bool:
    if tile.form == "vector":
        return cell.M <= _FEW_ROWS and cell.rows >= tile.BLOCK_M
    if tile.form == "pairs" and 2 * cell.block[0] != tile.BLOCK_N:
        return False
    if tile.bulk and not (copy_engine and cell.aligned):
        return False
    if cell.op == "bsr_linear dvalues":
        return tile.split == 1 or 4 * tile.split * tile.BLOCK_M <= cell.M
    lists = cell.block_rows if cell.op == "bsr_linear fwd" else cell.block_cols
    few = tile.split == 1 or cell.nnz >= 2 * tile.split * max(lists, 1)
    return few and max(cell.rows, 4 if cell.native else 16) >= tile.BLOCK_M


def _ways(cell: Cell, found) -> Iterator[Candidate]:
    bn, bk = cell.block
    gathered = cell.nnz * min(cell.M, 512) * (bn + bk)
    for candidate in found:
        way, elements = candidate.way, candidate.elements or ELEMENTS
        if way == "library" and not library_serves((cell.N, cell.K), cell.block, cell.dtype):
            continue
        # one batch is one batch, and up to 64 rows of sums are one band
        if way == "batches" and elements > ELEMENTS and gathered <= AT_ONCE * ELEMENTS:
            continue
        if way == "batches" and elements < ELEMENTS and gathered <= AT_ONCE * elements:
            continue
        if way == "layers" and elements != ELEMENTS and cell.M <= 64:
            continue
        yield candidate
