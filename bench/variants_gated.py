"""Launches of the kernels of gates: by themselves, and inside products."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from sgtriton_kernels import gate, gate_bits, penalty, tiles
from sgtriton_kernels.blocks import Block, gate_layout

from sgtriton.launches import TYPES, empty, gated_linear_launches, launch_of

from .variant import ROWS, SIZE, Product, Variant, words


def elementwise() -> Iterator[Variant]:
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
    name = words(sides + (" conv" if len(shape) > 2 else ""), kind, *half)
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


def gated_linear() -> Iterator[Variant]:
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
        words(
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
