"""A named way to compute a product."""

from __future__ import annotations

from dataclasses import dataclass

from .tiles import BsrTile


@dataclass(frozen=True)
class Candidate:
    """A named way to compute a pass; records hold the name, never the numbers.

    Args:
        name: in its pass.
        tile: of the Triton kernel; ``None`` if another product computes it.
        way: of the ``torch`` implementation: one of :func:`.block_products.multiply`, or
            ``"library"``, the library's own product of such a matrix; ``"unpack"``: the dense
            weight is filled in, then the library's dense product (both implementations). Of a
            gated layer its method.
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
