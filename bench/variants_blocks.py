"""Launches of the kernels of block-sparse weights: products, convolutions, and what makes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from sgtriton_kernels import bsr_convert, candidates, records, tiles
from sgtriton_kernels.blocks import gate_layout
from sgtriton_kernels.conv_candidates import is_small
from sgtriton_kernels.conv_geometry import ConvGeometry

from sgtriton.launches import TYPES, bsr_conv_launches, bsr_linear_launches, empty, launch_of

from .variant import ROWS, SIZE, Product, Variant, words


def bsr_linear() -> Iterator[Variant]:
    bf16, fp32 = torch.bfloat16, torch.float32
    for dtype, sides in ((bf16, (16, 32, 64, 128)), (fp32, (32, 64))):
        for side in sides:
            for m in (1, 8, 32, 48, *ROWS):
                yield from _bsr_product("fwd", dtype, (side, side), m)
            for m in (32, 48, *ROWS):
                yield from _bsr_product("dx", dtype, (side, side), m)
            for m in ROWS[2:]:
                yield from _bsr_product("dvalues", dtype, (side, side), m)
            if side == 128:  # with more block rows tiles are wider
                for m in (16, 32, 64):
                    yield from _bsr_product("fwd", dtype, (side, side), m, size=3 * SIZE)
            for nnz in (8, 64):  # so few that programs share the rows
                yield from _bsr_product("dvalues", dtype, (side, side), SIZE, nnz=nnz)
    for which in ("fwd", "dx", "dvalues"):
        for block in ((16, 64), (128, 32)):
            yield from _bsr_product(which, bf16, block, 512)
        for dtype in (bf16, fp32):
            for m in ROWS[::3]:
                yield from _bsr_product(which, dtype, (64, 64), m, size=SIZE - 1)
    for which in ("fwd", "dx", "dvalues"):
        for candidate in candidates.named(f"bsr_linear {which}", "triton", False).values():
            if (tile := candidate.tile) is not None:
                m = SIZE if which == "dvalues" else tile.BLOCK_M
                yield from _bsr_product(which, bf16, (64, 64), m, tile)
    named = candidates.named("bsr_linear fwd", "triton", False).values()
    forms = {(c.tile.form, c.tile.split > 1): c.tile for c in named if c.tile is not None}
    for tile in forms.values():
        yield from _bsr_product("fwd", torch.float16, (64, 64), tile.BLOCK_M, tile)
    for which in ("dx", "dvalues"):
        yield from _bsr_product(which, torch.float16, (64, 64), 512)
    for (which, block, dtype, tile), (rows, targets) in _named_by_tables().items():
        for variant in _bsr_product(which, dtype, block, rows, tile):
            yield replace(variant, targets=targets)


_Named = tuple[str, tuple[int, int], torch.dtype, tiles.BsrTile]


def _named_by_tables() -> dict[_Named, tuple[int, tuple[str, ...]]]:
    """Tiles of ``bsr_linear`` that tables which ship name: the most rows, and the architectures.

    On others a compiler may refuse them, and no table names them there.
    """
    found: dict[_Named, tuple[int, tuple[str, ...]]] = {}
    for table in records.tables():
        for entry in table.entries.values():
            key = entry["key"]
            op, _, which = key["op"].partition(" ")
            named = candidates.named(key["op"], key["impl"], False).get(entry["candidate"])
            if op == "bsr_linear" and named is not None and named.tile is not None:
                bn, bk = map(int, key["block"].split("x"))
                launch = which, (bn, bk), getattr(torch, key["dtype"]), named.tile
                rows, targets = found.get(launch, (0, ()))
                targets = tuple(dict.fromkeys((*targets, table.architecture)))
                found[launch] = max(key["rows"], rows), targets
    return found


def _bsr_product(
    which: str,
    dtype: torch.dtype,
    block: tuple[int, int],
    m: int,
    tile: tiles.BsrTile | None = None,
    size: int = SIZE,
    nnz: int | None = None,
) -> Iterator[Variant]:
    """The launches of a pass whose weight has ``nnz`` blocks, by default an eighth of them."""
    (rows, cols), aligned = (-(-size // side) for side in block), size % 16 == 0
    nnz = rows * cols // 8 if nnz is None else nnz
    if tile is None:
        tile = tiles.tile_for_bsr_linear(which, m, size, size, block, nnz, dtype, aligned)
    launch, *later = bsr_linear_launches(which, dtype, block, m, size, size, nnz, tile)
    flags = launch.constexprs
    block_m, block_n, block_k = flags["BLOCK_M"], flags["BLOCK_N"], flags["BLOCK_K"]
    if which == "dvalues":
        left, right, depth = block_n, block_k, block_m
    else:
        out, depth = (block_n, block_k) if which == "fwd" else (block_k, block_n)
        left, right = (out, block_m) if tile.form == "weight_left" else (block_m, out)
    product = None
    if tile.form != "vector":
        copies = tuple(side * depth * dtype.itemsize for side in (left, right))
        bulk = flags.get("READ") == "bulk"
        product = Product(
            dtype.itemsize == 2, left, False, copies if aligned else (), bulk, ahead=aligned
        )
    name = words(
        TYPES[dtype],
        "x".join(map(str, block)),
        *([] if which == "dvalues" else [tile.form.replace("_", " ")]),
        *(["bulk"] if product and product.bulk else []),
        *([] if aligned else ["not aligned"]),
    )
    text = f"n{block_n} m{block_m} k{block_k} s{launch.num_stages} w{launch.num_warps}"
    text += f" split {tile.split}" * (tile.split > 1)
    yield Variant(f"bsr_linear {which}", name, text, launch, rows=(m,), product=product)
    for sums in later:  # of programs that share a block row, or the rows of x
        text = f"{sums.constexprs['BLOCK_N']} of {sums.constexprs['SPLIT']}"
        added = ["bias"] if sums.constexprs["HAS_BIAS"] else []
        yield Variant("bsr_linear sums", words(TYPES[dtype], *added), text, sums, rows=(m,))


def bsr_conv() -> Iterator[Variant]:
    for which in ("fwd", "dx", "dvalues"):
        for dtype in (torch.bfloat16, torch.float32):
            for side in (16, 32, 64, 128):
                for size in (2, 14, 112):
                    yield _bsr_convolution(which, dtype, side, size, 256)
            yield _bsr_convolution(which, dtype, 32, 56, 250)
        yield _bsr_convolution(which, torch.float16, 64, 14, 256)
        for candidate in candidates.named(f"bsr_conv {which}", "triton", False).values():
            if (tile := candidate.tile) is not None:
                side = max(64, tile.BLOCK_N, tile.BLOCK_K)
                yield _bsr_convolution(which, torch.bfloat16, side, 56, 256, tile)
                if is_small(f"bsr_conv {which}", tile):
                    yield _bsr_convolution(which, torch.float32, 64, 56, 256, tile)
                    yield _bsr_convolution(which, torch.bfloat16, 64, 56, 250, tile)
                    yield _bsr_convolution(which, torch.float32, 64, 56, 250, tile)


def _bsr_convolution(
    which: str,
    dtype: torch.dtype,
    side: int,
    size: int,
    channels: int,
    tile: tiles.BsrTile | None = None,
) -> Variant:
    images, aligned = 8, channels % 16 == 0
    geometry = ConvGeometry(channels, channels, (3, 3), before=(1, 1), after=(1, 1))
    rows, cols = geometry.blocks((side, side))
    nnz = rows * cols
    pixels = images * size * size
    if tile is None:
        tile = tiles.tile_for_bsr_conv(which, pixels, (side, side), nnz, dtype, aligned)
    (launch,) = bsr_conv_launches(
        which, dtype, (side, side), geometry, images, (size, size), nnz, tile
    )
    flags = launch.constexprs
    block_m, block_n, block_k = flags["BLOCK_M"], flags["BLOCK_N"], flags["BLOCK_K"]
    return Variant(
        "bsr_conv" if which == "fwd" else f"bsr_conv {which}",
        words(TYPES[dtype], f"{side}x{side}", *([] if aligned else ["not aligned"])),
        f"n{block_n} m{block_m} k{block_k} s{launch.num_stages} w{launch.num_warps}"
        + f" split {tile.split}" * (tile.split > 1),
        launch,
        rows=(pixels,),
        product=Product(
            half=dtype.itemsize == 2,
            left_rows=block_n if which == "dvalues" else block_m,
            left_direct=False,
            ahead=aligned,
        ),
    )


def gated_to_bsr() -> Iterator[Variant]:
    bf16, fp32 = torch.bfloat16, torch.float32
    for block in ((16, 16), (64, 64), (128, 128), (32, 1)):
        for kind, dtype in (("threshold", bf16), ("hard_concrete", fp32)):
            yield from _gated_to_bsr(block, kind, dtype)
    yield from _gated_to_bsr((12, 12), "threshold", bf16)
    yield from _gated_to_bsr((64, 64), "threshold", torch.float16)


def _gated_to_bsr(block: tuple[int, int], kind: str, dtype: torch.dtype) -> Iterator[Variant]:
    layout = gate_layout((SIZE, SIZE), block)
    rows, cols = layout.gate_shape
    w, gates = empty(SIZE, SIZE, dtype=dtype), empty(rows, cols)
    tile = bsr_convert.tile_for_gated_to_bsr(layout, w.device)
    starts = empty(rows * -(-cols // tile.GATES) + 1, dtype=torch.int32)
    nnz = rows * cols // 8
    count = launch_of(lambda: bsr_convert._count_open(gates, kind, tile))
    copy = launch_of(lambda: bsr_convert._copy_open(w, gates, starts, nnz, layout, kind, tile))
    pieces = f"{count.constexprs['BLOCK']} of {tile.GATES} gates"
    yield Variant("gated_to_bsr count", kind, pieces, count)
    # a thread's weights, read and written; narrow are gates, starts and columns
    weights = tile.GATES * tile.BLOCK_R * tile.BLOCK_C // (32 * tile.num_warps)
    wide = 2 * weights * dtype.itemsize // 16 if block[1] % 16 == 0 else None
    yield Variant(
        "gated_to_bsr copy",
        words(TYPES[dtype], "x".join(map(str, block)), kind),
        f"{tile.GATES} of {tile.BLOCK_R}x{tile.BLOCK_C} w{tile.num_warps}",
        copy,
        wide=wide,
        narrow=3 + tile.GATES,
    )
