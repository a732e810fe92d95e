"""A named way to compute a product."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from .cell import Cell
from .tiles import BsrTile


@dataclass(frozen=True)
class Candidate:
    """A named way to compute a pass; records hold the name, never the numbers.

    Args:
        name: in its pass.
        tile: of the Triton kernel; ``None`` if another product computes it.
        way: of the ``torch`` implementation: one of :func:`.block_products.multiply`, or
            ``"library"``, the library's own product of such a matrix; ``"unpack"``: the dense
            weight is filled in, then the library's dense product (both implementations); of the
            gradient of the values that product, of which the stored blocks are taken. Of a gated
            layer its method.
        elements: that such a way handles at a time.
    """

    name: str
    tile: BsrTile | None = None
    way: str | None = None
    elements: int | None = None


ANALYTIC = "analytic"  # names what reasoning gives, in a record
UNPACK = Candidate("unpack", way="unpack")


def of_tiles(*tiles: BsrTile) -> tuple[Candidate, ...]:
    """Each of some tiles as a candidate."""
    return tuple(Candidate(tile.name, tile) for tile in tiles)


def cut(tile: BsrTile, cell: Cell) -> BsrTile:
    """What a tile is of a product's blocks: tiles that are equal then are the same launch."""
    bn, bk = cell.block
    n = tile.BLOCK_N if tile.form == "pairs" else min(tile.BLOCK_N, bn)
    return replace(tile, BLOCK_N=n, BLOCK_K=min(tile.BLOCK_K, bk))


def each_launch_once(
    found: Iterable[Candidate], cell: Cell, serves: Callable[[BsrTile], bool]
) -> Iterator[Candidate]:
    """Of some candidates those whose tiles serve a product, and those without a tile.

    Args:
        found: of tiles that are the same launch the first is taken.
        serves: whether a tile can, as it was given.
    """
    launches: set[BsrTile] = set()
    for candidate in found:
        if candidate.tile is None:
            yield candidate
        elif serves(candidate.tile) and (launch := cut(candidate.tile, cell)) not in launches:
            launches.add(launch)
            yield candidate
