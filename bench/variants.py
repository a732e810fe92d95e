"""Every kernel that ships, as its launcher launches it: what the compile report compiles."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from sgtriton_kernels import bsr_convert, candidates, gate, gate_bits, penalty, records, tiles
from sgtriton_kernels.blocks import Block, gate_layout
from sgtriton_kernels.conv_candidates import is_small
from sgtriton_kernels.conv_geometry import ConvGeometry

from sgtriton.launches import (
    TYPES,
    Launch,
    bsr_conv_launches,
    bsr_linear_launches,
    empty,
    gated_linear_launches,
    launch_of,
)

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


def variants() -> list[Variant]:
    """All of them, each once; ``rows`` says for which batches a tile is taken."""
    found: dict[str, Variant] = {}
    for variant in (
        *_elementwise(),
        *_gated_linear(),
        *_bsr_linear(),
        *_bsr_conv(),
        *_bsr_convert(),
    ):
        key = repr((variant.op, variant.launch))
        if (first := found.get(key)) is not None:
            both = first.targets + variant.targets if first.targets and variant.targets else ()
            variant = replace(first, rows=first.rows + variant.rows, targets=both)
        found[key] = variant
    return list(found.values())


def _name(*parts: object) -> str:
    return ", ".join(map(str, parts))


def _elementwise() -> Iterator[Variant]:
    kinds = (("threshold", False), ("bernoulli", True), ("hard_concrete", True))
    for shape, block, some in (
        ((SIZE, SIZE), (1, 1), kinds),
        ((SIZE, SIZE), (32, 32), kinds),
        ((SIZE, SIZE), (128, 128), kinds[:1]),
        ((SIZE, SIZE), (None, 1), kinds[:1]),
        ((64, 64, 3, 3), (16, 16), kinds[:1]),
    ):
        for kind, drawn in some:
            yield from _gate_weight(shape, block, kind, drawn)
    yield from _gate_weight((SIZE, SIZE), (1, 1), "threshold", False, torch.float16)
    for gradient in (True, False):
        yield _gate_penalties(gradient)
    for kind in ("threshold", "bernoulli"):
        run = functools.partial(
            gate_bits.pack_gates, empty(SIZE, SIZE), kind, empty(1, dtype=torch.int64)
        )
        launch = launch_of(run)
        yield Variant("pack_gates", kind, f"{launch.constexprs['BLOCK']} words", launch)


def _gate_weight(
    shape: tuple[int, ...],
    block: Block,
    kind: str,
    drawn: bool,
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[Variant]:
    layout = gate_layout(shape, block)
    w, gates = empty(*shape), empty(*layout.gate_shape)
    out = w.to(dtype)
    seed = empty(1, dtype=torch.int64) if drawn else None
    tile = gate.tile_for_gate_weight(layout, w.device)
    text = f"{tile.BLOCK_R}x{tile.BLOCK_C} w{tile.num_warps}"
    sides = "x".join("N" if side is None else str(side) for side in block)
    half = [] if dtype == torch.bfloat16 else [TYPES[dtype]]
    name = _name(sides + (" conv" if len(shape) > 2 else ""), kind, *half)
    # narrow are the seed, and the gate and its sum where several weights share one
    narrow = 1 + 2 * (block != (1, 1))
    forward = functools.partial(
        gate._gate_weight_fwd, w, gates, seed, layout, kind, out.dtype, tile
    )
    backward = functools.partial(
        gate._gate_weight_bwd, out, w, gates, seed, layout, kind, True, tile
    )
    for op, run, tensors in (("gate_weight", forward, 2), ("gate_weight bwd", backward, 3)):
        wide = tensors if len(shape) == 2 else None
        yield Variant(op, name, text, launch_of(run), wide=wide, narrow=narrow)


def _gate_penalties(gradient: bool) -> Variant:
    # this launcher reads addresses, so its tensors are real ones
    gates, n = [torch.zeros(SIZE)], SIZE
    previous = torch.zeros(n // 8, dtype=torch.uint8) if gradient else None
    block = penalty._block(torch.device("cuda"))
    launch = launch_of(
        lambda: penalty._gate_penalties_fwd(
            gates, torch.ones(n), torch.ones(2), previous, [False], [False], gradient, block
        )
    )
    name = "gradient, flips" if gradient else "value"
    return Variant("gate_penalties", name, f"{block} gates", launch)


def _gated_linear() -> Iterator[Variant]:
    bf16, fp32 = torch.bfloat16, torch.float32
    for which in ("fwd", "dx", "dw"):
        for x_dtype, w_dtype in ((bf16, fp32), (bf16, bf16), (fp32, fp32), (fp32, bf16)):
            mixed = x_dtype != w_dtype  # the main case: of the others fewer blocks
            fused, skip = [(1, 1)], [(64, 64)]
            if mixed:
                # closed gates of a block may reopen, for which dw needs closed weights too
                fused.append((32, 32) if which == "dw" else (4, 4))
                skip += [(16, 16), (32, 32), (128, 128), (16, 64), (32, 16), (64, 32)]
            for m in ROWS:
                for block in fused:
                    yield _gated_product(which, False, block, m, x_dtype, w_dtype)
                for block in skip:
                    yield _gated_product(which, True, block, m, x_dtype, w_dtype)
            if w_dtype == fp32:  # not taken by itself where x is fp32 too
                yield _gated_product(which, False, (32, 32), 128, x_dtype, w_dtype)
            for m in ROWS[::3]:
                yield _gated_product(which, False, (1, 1), m, x_dtype, w_dtype, SIZE - 1)
                yield _gated_product(which, True, (64, 64), m, x_dtype, w_dtype, SIZE - 1)
        for skip, block in ((False, (1, 1)), (True, (64, 64))):
            yield _gated_product(which, skip, block, 512, torch.float16, fp32)


def _gated_product(
    which: str,
    skip: bool,
    block: tuple[int, int],
    m: int,
    x_dtype: torch.dtype,
    w_dtype: torch.dtype,
    size: int = SIZE,
) -> Variant:
    aligned = size % 16 == 0
    tile = tiles.tile_for_gated_linear(
        f"skip_{which}" if skip else which, m, size, size, w_dtype, x_dtype, block, aligned
    )
    (launch,) = gated_linear_launches(which, skip, x_dtype, w_dtype, block, m, size, size, tile)
    flags = launch.constexprs
    block_m, block_n, block_k = flags["BLOCK_M"], flags["BLOCK_N"], flags["BLOCK_K"]
    if which == "dw":
        left = block_n
    elif flags["WEIGHT_LEFT"]:
        left = block_n if which == "fwd" else block_k
    else:
        left = block_m
    return Variant(
        ("skip " if skip else "fused ") + which,
        _name(
            TYPES[x_dtype],
            f"w {TYPES[w_dtype]}",
            "x".join(map(str, block)),
            *([] if aligned else ["not aligned"]),
        ),
        f"n{block_n} m{block_m} k{block_k} s{launch.num_stages} w{launch.num_warps}",
        launch,
        rows=(m,),
        product=Product(
            half=x_dtype.itemsize == 2,
            left_rows=left,
            left_direct=which != "dw" and not skip and aligned,
            ahead=aligned,
        ),
    )


def _bsr_linear() -> Iterator[Variant]:
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
    name = _name(
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
        yield Variant("bsr_linear sums", _name(TYPES[dtype], *added), text, sums, rows=(m,))


def _bsr_conv() -> Iterator[Variant]:
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
        _name(TYPES[dtype], f"{side}x{side}", *([] if aligned else ["not aligned"])),
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


def _bsr_convert() -> Iterator[Variant]:
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
        _name(TYPES[dtype], "x".join(map(str, block)), kind),
        f"{tile.GATES} of {tile.BLOCK_R}x{tile.BLOCK_C} w{tile.num_warps}",
        copy,
        wide=wide,
        narrow=3 + tile.GATES,
    )
