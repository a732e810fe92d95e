"""Named ways to compute a pass of a convolution, and which of them can serve one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod

from .bsr_conv_torch import GATHERED, PLACES, batch, images_at_once, outputs_at_once
from .candidate import UNPACK, Candidate, cut, each_launch_once, of_tiles
from .conv_cell import ConvCell
from .tiles import BsrTile, tile_for_bsr_conv

_LOOP = 512  # outputs from which a call for each block pays
# What costs time beside the products, in multiply-adds of the dense layer.
_CALL = 12_000_000  # a call
_COPY = 12  # an element that is copied to the line or from it
_VISIT = 600  # an output that a block meets
_FEW = 8  # channels of which, unless they lie side by side, the dense layer makes a quarter as many

# Sides that are stored, then pixels, then depth of a step. What is wide, or read by the element,
# takes registers: of the sides at most 32 x 32.
_SMALL = 32
_SIDES = (
    (16, 64, 32, 3, 4), (32, 16, 16, 2, 4), (32, 32, 16, 2, 4), (32, 32, 32, 2, 4),
    (32, 64, 32, 3, 4), (32, 128, 32, 3, 4), (64, 16, 32, 3, 4), (64, 32, 32, 3, 4),
    (64, 64, 32, 3, 4), (64, 64, 32, 4, 4), (64, 64, 64, 3, 4), (64, 128, 32, 3, 4),
    (64, 128, 32, 3, 8), (64, 128, 32, 4, 8), (128, 64, 32, 3, 8), (128, 128, 32, 3, 8),
)  # fmt: skip
_FWD = tuple(BsrTile(n, m, k, stages, warps) for n, m, k, stages, warps in _SIDES)
# of steps that are 64 deep gfx1100 spills 3 registers
_DX = tuple(BsrTile(n, m, k, stages, warps) for k, m, n, stages, warps in _SIDES if n <= 32)
_DVALUES = tuple(
    BsrTile(n, m, k, stages, warps, split=split)
    for n, k, m, stages, warps in (
        (32, 32, 16, 2, 4), (32, 32, 32, 3, 4), (64, 64, 32, 3, 4), (64, 64, 32, 3, 8),
        (128, 64, 32, 3, 8),
    )
    for split in (1, 4, 16)
)  # fmt: skip

_CARDS = {
    "bsr_conv fwd": of_tiles(*_FWD),
    "bsr_conv dx": of_tiles(*_DX),
    "bsr_conv dvalues": of_tiles(*_DVALUES),
}
# for Triton's CPU compiler, which unrolls a tile
_NATIVE = {
    "bsr_conv fwd": of_tiles(*(BsrTile(n, m, k, 1, 1) for n, m, k in
                               ((16, 16, 16), (16, 4, 16), (32, 4, 16), (16, 4, 64)))),
    "bsr_conv dx": of_tiles(*(BsrTile(n, m, k, 1, 1) for k, m, n in
                              ((16, 16, 16), (16, 4, 16), (32, 4, 16)))),
    "bsr_conv dvalues": of_tiles(*(BsrTile(n, m, k, 1, 1) for n, k, m in
                                   ((16, 16, 16), (4, 16, 16), (4, 32, 8)))),
}  # fmt: skip

_PLACES = {"_4k": PLACES >> 2, "": PLACES, "_64k": PLACES << 2}
_ELEMENTS = {"_256k": GATHERED >> 2, "": GATHERED, "_4m": GATHERED << 2}
_DENSE, _LINES = (Candidate(way, way=way) for way in ("dense", "lines"))
_WAYS = {
    "bsr_conv fwd": (
        _DENSE,
        *(Candidate(f"loop{suffix}", None, "loop", n) for suffix, n in _PLACES.items()),
        *(Candidate(f"batches{suffix}", None, "batches", n) for suffix, n in _ELEMENTS.items()),
        UNPACK,
    ),
    "bsr_conv dx": (_DENSE, _LINES),
    "bsr_conv dvalues": (_DENSE, _LINES),
}


def named(op: str, impl: str, native: bool) -> tuple[Candidate, ...]:
    """Every candidate of a pass; see :func:`.candidates.named`."""
    if impl == "torch":
        return _WAYS[op]
    return (*(_NATIVE if native else _CARDS)[op], UNPACK)


def serving(cell: ConvCell, found: Iterable[Candidate], copy_engine: bool) -> Iterator[Candidate]:
    """Those of ``found`` that can serve a convolution and differ there."""
    if cell.impl == "torch":
        yield from _ways(cell, found)
        return
    yield from each_launch_once(found, cell, lambda tile: cell.native or _serves(tile, cell))


def reasoned(cell: ConvCell) -> tuple[Candidate, str]:
    """What is legal on every card, and why it is taken."""
    if cell.impl == "torch":
        return _reasoned_way(cell)
    why: list[str] = []
    tile = tile_for_bsr_conv(
        cell.op.removeprefix("bsr_conv "), cell.M, cell.block, cell.nnz, cell.dtype, cell.aligned,
        cell.native, why,
    )  # fmt: skip
    return Candidate(tile.name, tile), "; ".join(why)


def _reasoned_way(cell: ConvCell) -> tuple[Candidate, str]:
    ways = {candidate.name: candidate for candidate in _WAYS[cell.op]}
    if _is_dense_faster(cell):
        return ways["dense"], "beside so few products that are left out, copies and calls cost more"
    if cell.op != "bsr_conv fwd":
        return ways["lines"], "a product for each block, most of which are closed"
    outputs = outputs_at_once(cell.geometry, cell.size, cell.images)
    if outputs < _LOOP:
        return ways["batches"], f"{outputs} outputs are too few for a call for each block"
    return ways["loop"], f"{outputs} outputs at a time pay for a call for each block"


def _is_dense_faster(cell: ConvCell) -> bool:
    """Whether the dense layer is: measured on two AVX2 cores, with 1x1 to 64x64 blocks."""
    geometry, images, (bn, bk) = cell.geometry, cell.images, cell.block
    outputs, channels = images * prod(cell.out_size), geometry.in_channels
    dense = outputs * geometry.in_per_group * geometry.taps * geometry.out_channels
    if geometry.in_per_group < _FEW and not cell.channels_last:
        dense *= 4
    copied = images * channels * prod(cell.size) + outputs * geometry.out_channels
    return _CALL + _COPY * copied + cell.nnz * outputs * (bn * bk + _VISIT) > dense


def is_small(op: str, tile: BsrTile) -> bool:
    """Whether no card spills a tile of fp32 values, or of channels that 16 does not divide."""
    sides = {
        "bsr_conv fwd": (tile.BLOCK_N, tile.BLOCK_M),
        "bsr_conv dx": (tile.BLOCK_K, tile.BLOCK_M),
        "bsr_conv dvalues": (tile.BLOCK_N, tile.BLOCK_K),
    }[op]
    return max(sides) <= _SMALL and tile.num_stages <= 2


def _serves(tile: BsrTile, cell: ConvCell) -> bool:
    small = is_small(cell.op, cut(tile, cell))
    if (cell.dtype.itemsize > 2 or not cell.aligned) and not small:
        return False
    if cell.op == "bsr_conv dvalues":
        return tile.split == 1 or 4 * tile.split * tile.BLOCK_M <= cell.M
    return max(cell.rows, 16) >= tile.BLOCK_M


def _ways(cell: ConvCell, found: Iterable[Candidate]) -> Iterator[Candidate]:
    """Those that differ: images that fit are one band, and blocks that fit one batch."""
    outputs = outputs_at_once(cell.geometry, cell.size, cell.images)
    kept: dict[tuple[str | None, int], Candidate] = {}
    # of those that are the same the one of the usual size stays, which reasoning names
    for candidate in sorted(found, key=lambda c: c.elements not in (None, PLACES, GATHERED)):
        way, elements = candidate.way, candidate.elements
        size = 0
        if way == "unpack" and cell.dtype.itemsize > 2:
            continue  # dense computes in fp32
        if way == "loop" and elements:
            size = images_at_once(cell.geometry, cell.size, cell.images, elements)
        if way == "batches" and elements:
            size = batch(cell.nnz, outputs, cell.block, elements)
            if size == 1 and outputs >= _LOOP:
                continue  # a loop that copies what it reads
        kept.setdefault((way, size), candidate)
    yield from kept.values()
