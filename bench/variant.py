"""A launch of a kernel that ships, and what its code must hold."""

from __future__ import annotations

from dataclasses import dataclass

from sgtriton.launches import Launch

SIZE = 4096  # rows and columns of the weight
ROWS = (16, 128, 512, 4096)  # of x


@dataclass(frozen=True)
class Product:
    """What a product of matrices multiplies.

    Args:
        half: whether its values have 16 bits, which takes matrix instructions.
        left_rows: rows of the left operand.
        left_direct: whether it must reach the matrix units without being written to shared memory.
        copies: bytes of each tile that must be copied in pieces of 16 bytes, or of all that there
            is for a thread; none where that is not asked for.
        bulk: whether the copy engine must bring tiles in; cards without one never get it.
        ahead: whether tiles must be brought in ahead of their use, as many steps as the launch
            asks for; none are where single elements are read.
    """

    half: bool
    left_rows: int
    left_direct: bool
    copies: tuple[int, ...] = ()
    bulk: bool = False
    ahead: bool = True


@dataclass(frozen=True)
class Variant:
    """A launch, what it is called in the table, and what its code must hold.

    Args:
        op: the pass that launches it.
        name: dtypes, gates, flags.
        tile: as the table shows it.
        rows: of ``x``, that get this tile; none where there is no ``x``.
        product: ``None`` where no matrices are multiplied.
        wide: accesses of 16 bytes that there are at least on NVIDIA's cards, ``narrow`` the others
            at most; ``None``: not asked for.
        targets: architectures whose cards take it; none: all do.
    """

    op: str
    name: str
    tile: str
    launch: Launch
    rows: tuple[int, ...] = ()
    product: Product | None = None
    wide: int | None = None
    narrow: int = 0
    targets: tuple[str, ...] = ()


def words(*parts: object) -> str:
    """What a variant is called: its parts."""
    return ", ".join(map(str, parts))
