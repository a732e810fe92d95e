"""Named ways to compute a pass of ``bsr_linear``, and which of them can serve a product."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .block_products import AT_ONCE, ELEMENTS, choose_way
from .bsr_library import library_is_faster, library_serves
from .candidate import UNPACK, Candidate, each_launch_once, of_tiles
from .cell import Cell
from .tiles import BsrTile, tile_for_bsr_linear

_FEW_ROWS = 8  # of x, up to which the form "vector" computes

BSR_LINEAR_CANDIDATES = of_tiles(
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

DX_CANDIDATES = of_tiles(
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

DVALUES_CANDIDATES = of_tiles(
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
    "bsr_linear fwd": of_tiles(
        *(
            BsrTile(n, m, k, 1, 1, form)
            for form in ("weight_left", "x_left")
            for n, m, k in (
                (4, 16, 64), (8, 8, 64), (16, 4, 64), (4, 32, 32), (8, 16, 32), (16, 16, 16),
            )
        ),
        *(BsrTile(n, m, 64, 1, 1, "vector") for n in (8, 16, 32) for m in (1, 2, 4)),
    ),
    "bsr_linear dx": of_tiles(
        *(
            BsrTile(n, m, k, 1, 1)
            for n, m, k in ((32, 4, 16), (16, 4, 16), (64, 4, 16), (32, 8, 8), (16, 16, 16))
        )
    ),
    "bsr_linear dvalues": of_tiles(
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


def named(op: str, impl: str, native: bool) -> tuple[Candidate, ...]:
    """Every candidate of a pass; see :func:`.candidates.named`."""
    if impl == "torch":
        return (*_WAYS, UNPACK) if op == "bsr_linear fwd" else ()
    return (*(_NATIVE if native else _CARDS)[op], UNPACK)


def serving(cell: Cell, found: Iterable[Candidate], copy_engine: bool) -> Iterator[Candidate]:
    """Those of ``found`` that can serve a product and differ there."""
    if cell.impl == "torch":
        yield from _ways(cell, found)
        return
    yield from each_launch_once(found, cell, lambda tile: _serves(tile, cell, copy_engine))


def reasoned(cell: Cell) -> tuple[Candidate, str]:
    """What is legal on every card, and why it is taken."""
    if cell.impl == "torch":
        return _reasoned_way(cell)
    why: list[str] = []
    tile = tile_for_bsr_linear(
        cell.op.removeprefix("bsr_linear "), cell.M, cell.N, cell.K, cell.block, cell.nnz,
        cell.dtype, cell.aligned, cell.native, why,
    )  # fmt: skip
    return Candidate(tile.name, tile), "; ".join(why)


def _reasoned_way(cell: Cell) -> tuple[Candidate, str]:
    ways = {candidate.name: candidate for candidate in _WAYS}
    serves = library_serves((cell.N, cell.K), cell.block, cell.dtype)
    if serves and library_is_faster(cell.M, cell.block, cell.block_rows, cell.nnz, cell.density):
        return ways["library"], "few rows, or small blocks: the library's product is one call"
    longest = cell.longest if cell.longest is not None else -(-cell.nnz // cell.block_rows)
    way, reasons = choose_way(
        cell.M, cell.block, cell.nnz, (cell.block_rows, cell.block_cols), lambda: longest
    )
    candidate = ways[way]
    assert candidate.elements in (None, ELEMENTS), candidate
    return candidate, reasons


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


def _ways(cell: Cell, found: Iterable[Candidate]) -> Iterator[Candidate]:
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
