"""What one program computes: tiles, and by reasoning which one a launch takes."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

# the smallest per-program limit among the cards (sm_86, sm_89, sm_120), less room for the index
_SHARED_BYTES = 96 * 1024
# AMD cards: 64 KB, but the compiler keeps one stage in registers there
_LDS_BYTES = 64 * 1024


BSR_FORMS = ("x_left", "weight_left", "vector", "pairs")
# the sides of a tile, its stages, warps and split: no name holds more digits
_NAME = re.compile(
    rf"({'|'.join(BSR_FORMS)})_n(\d{{1,5}})_m(\d{{1,5}})_k(\d{{1,5}})_s(\d{{1,2}})_w(\d{{1,2}})"
    r"(?:_split(\d{1,5}))?(_bulk)?",
    re.ASCII,
)


@dataclass(frozen=True)
class BsrTile:
    """What one program of a product with a block-sparse weight computes, and how.

    Sides are named for the dimension that they cut: forward adds up over ``K``, the gradient of
    ``x`` over ``N``, that of the values over ``M``. Powers of two, on cards >= 16; those along
    ``N`` and ``K`` are cut to the block's.

    Args:
        BLOCK_N: outputs (rows of the weight).
        BLOCK_M: rows of ``x``; from 1 in the form ``"vector"``.
        BLOCK_K: inputs (columns of the weight).
        num_stages: depth of the software pipeline.
        num_warps: warps per program.
        form: ``"x_left"``: x is the left operand; ``"weight_left"``: the weight is,
            ``y^T = W x^T``; ``"vector"``: no matrix instructions; ``"pairs"``: two block rows
            share what they read of ``x``, and ``BLOCK_N`` is twice the block's side.
        split: programs that share a block row's blocks, for the gradient of the values the rows
            of ``x``; their sums are added in a fixed order.
        bulk: whether the copy engine brings tiles in, on cards that have one and where rows are
            aligned and blocks fill the dimension that is added up.
    """

    BLOCK_N: int
    BLOCK_M: int
    BLOCK_K: int
    num_stages: int
    num_warps: int
    form: str = "x_left"
    split: int = 1
    bulk: bool = False

    @property
    def name(self) -> str:
        """All of it in one word, as candidates are named."""
        text = f"{self.form}_n{self.BLOCK_N}_m{self.BLOCK_M}_k{self.BLOCK_K}"
        text += f"_s{self.num_stages}_w{self.num_warps}"
        return text + f"_split{self.split}" * (self.split > 1) + "_bulk" * self.bulk

    @classmethod
    def of_name(cls, name: str) -> BsrTile:
        """The tile that is named so.

        Raises:
            ValueError: no tile has that name.
        """
        found = _NAME.fullmatch(name)
        if found is None:
            raise ValueError(f"tile must be named as BsrTile.name does, got {name!r}")
        form, n, m, k, stages, warps, split, bulk = found.groups()
        return cls(
            int(n), int(m), int(k), int(stages), int(warps), form, int(split or 1), bulk is not None
        )


_PROGRAMS = 264  # two for each multiprocessor of an H100


def tile_for_bsr_linear(
    which: str,
    M: int,
    N: int,
    K: int,
    block: tuple[int, int],
    nnz: int,
    dtype: torch.dtype,
    aligned: bool = True,
    native: bool = False,
    reasons: list[str] | None = None,
) -> BsrTile:
    """A tile for a pass of ``bsr_linear`` that every card can run; reasoned, not measured.

    What bounds the numbers is the compiler's word that no card spills registers (gfx1100 is the
    first to do so) and shared memory.

    - Forward of up to 8 rows: ``"vector"``, 16 outputs a program, so that there are enough of them.
    - Never ``"pairs"``, which pays only where block rows share most of their columns; who knows
      that they do asks for it.
    - ``form``: ``"weight_left"`` under 64 rows where a tile has 64 outputs: Hopper's and
      Blackwell's matrix units take a left operand of 64 rows at the least. Else ``"x_left"``.
    - Rows (``BLOCK_M``): the power of two that covers ``M``, from 16 (the least a matrix
      instruction takes) to 128; for fp32 to 64 and an accumulator of 64 x 64, since its products
      take registers instead of matrix units.
    - Outputs: the block's side, up to 128. Forward of up to 64 rows halves 128 down to 32 while
      there are fewer than two programs a multiprocessor: 32 block rows of 128 would occupy a
      quarter of an H100, which the roofline model predicts to cost up to half of the speed.
    - Depth of a step: the block's side, up to 64 (128 bytes of fp16, one full line); 32 beside the
      largest accumulator; 16 for fp32.
    - dvalues: up to 128 x 64 values, 64 x 64 where that leaves fewer than one program a
      multiprocessor, for fp32 64 x 32; rows in steps of 32 and 16.
    - Rows that are not aligned: 32 on each side, in two stages. Reading by the element takes
      registers, and a size that 16 does not divide should be rare.
    - ``split``: up to 8 where there are fewer than two programs a multiprocessor, while each keeps
      8 steps; dvalues: up to 16, and 16 steps, since each program leaves sums of a whole tile.
    - ``num_warps``: 8 for an accumulator or a step of values above 64 x 64 (fp32: from 32 x 64), 2
      for an accumulator up to 16 x 32, else 4.
    - ``num_stages``: up to 4, as both operands' tiles stay under 96 KB of shared memory, and one
      stage less under AMD's 64 KB.

    Args:
        which: ``"fwd"`` | ``"dx"`` | ``"dvalues"``.
        M, N, K: rows of ``x``, outputs, inputs.
        block: ``(bn, bk)``, powers of two >= 16.
        nnz: number of stored blocks.
        dtype: fp32 | fp16 | bf16, of ``x``.
        aligned: whether rows of all operands can be read in wide pieces.
        native: for Triton's CPU compiler, which unrolls a tile.
        reasons: gets why, in words.
    """
    why = [] if reasons is None else reasons
    if native:
        why.append("sums that fit the registers of AVX2")
        return _native_bsr_tile(which, M)
    (bn, bk), wide = block, dtype.itemsize > 2
    most = 128 if aligned else 32
    if not aligned:
        why.append("rows are not aligned: reading by the element takes registers")
    rows = 1 << max(M - 1, 0).bit_length()  # cover M
    if which == "fwd" and M <= 8:
        why.append(
            f"{M} rows are too few for matrix instructions: fp32 units, 16 outputs a program"
        )
        return BsrTile(16, rows, min(bk, 64), 4 if rows < 8 else 3, 4 if bk > 32 else 2, "vector")
    form, split = "x_left", 1
    if which == "dvalues":
        block_k = min(bk, 32 if wide else 64, most)
        few = 2 * max(nnz, 1) * bn * bk <= _PROGRAMS * 128 * 64
        block_n = min(bn, 64 if wide or few else 128, most)
        block_m = 16 if wide else 32
        area, values = block_n * block_k, 0
        step = (block_n + block_k) * block_m
        programs = max(nnz, 1) * (bn // block_n) * (bk // block_k)
        while split < 16 and 2 * split * programs <= _PROGRAMS and 2 * split * 16 * block_m <= M:
            split *= 2
        why.append(f"{block_n}x{block_k} values a program, {programs} programs over all rows of x")
    else:
        side, inner = (bn, bk) if which == "fwd" else (bk, bn)
        out = min(side, 64 if wide and which == "dx" else 128, most)
        block_m = max(16, rows)
        block_m = min(block_m, 64, 64 * 64 // out, most) if wide else min(block_m, most)
        lists = -(-(N if which == "fwd" else K) // side)
        if which == "fwd" and not wide and M <= 64 and out == 128:
            while out > 32 and 2 * lists * (side // out) <= _PROGRAMS:
                out //= 2
                why.append(f"{out} outputs a program, so that there are {lists * (side // out)}")
        area = block_m * out
        depth = min(inner, 16 if wide else 32 if area > 64 * 128 else 64, most)
        values, step = out * depth, (block_m + out) * depth
        why.append(f"{block_m} rows a program cover {M}" if block_m >= M else f"{block_m} rows")
        if not wide and out >= 64 and M < 64:
            form = "weight_left"
            why.append(f"matrix units take a left operand of 64 rows: the weight's {out} outputs")
        programs = lists * (side // out) * -(-M // block_m)
        steps = nnz * (inner // depth) // max(lists, 1)
        while split < 8 and 2 * split * programs <= _PROGRAMS and steps >= 2 * split * 8:
            split *= 2
        why.append(f"{programs} programs, {steps} steps of {depth} in each")
        block_n, block_k = (out, depth) if which == "fwd" else (depth, out)
    if split > 1:
        why.append(f"split by {split}: fewer than two programs a multiprocessor of a large card")
    step *= dtype.itemsize
    stages = min(4 if aligned else 2, _SHARED_BYTES // step, _LDS_BYTES // step + 1)
    if form == "weight_left" and block_m == 32:
        stages = min(stages, 3)  # with four ptxas spills 8 bytes for sm_120
    why.append(f"{stages} stages of {step} bytes: what fits the shared memory of every card")
    if max(area, values) > 64 * 64 or (wide and max(area, values) >= 32 * 64):
        warps = 8
    else:
        warps = 4 if area > 16 * 32 or not aligned else 2
    return BsrTile(block_n, block_m, block_k, stages, warps, form, split)


def _native_bsr_tile(which: str, M: int) -> BsrTile:
    """Sums that fit the registers of AVX2, 4 x 16; measured on two cores with blocks of 64."""
    if which == "dvalues":
        return BsrTile(4, 8, 32, 1, 1)
    if which == "dx":
        return BsrTile(32, 4, 16, 1, 1)
    if M == 1:
        return BsrTile(16, 1, 64, 1, 1, "vector")
    if M <= 8:
        return BsrTile(8, 1 << (M - 1).bit_length(), 64, 1, 1, "weight_left")
    return BsrTile(4, 16, 64, 1, 1, "weight_left")


@dataclass(frozen=True)
class GatedTile:
    """What one program of a product with a gated weight computes, and how.

    Sides are named for the dimension that they cut: forward adds up over ``K``, the gradient of
    ``x`` over ``N``, that of the weight over ``M``. Powers of two >= 16.

    Args:
        BLOCK_N: outputs (rows of the weight).
        BLOCK_M: rows of ``x``.
        BLOCK_K: inputs (columns of the weight).
        num_stages: depth of the software pipeline.
        num_warps: warps per program.
        max_registers: of a thread, on NVIDIA's cards; the compiler's own choice if ``None``.
    """

    BLOCK_N: int
    BLOCK_M: int
    BLOCK_K: int
    num_stages: int
    num_warps: int
    max_registers: int | None = None


def tile_for_gated_linear(
    which: str,
    M: int,
    N: int,
    K: int,
    w_dtype: torch.dtype,
    x_dtype: torch.dtype,
    block: tuple[int, int],
    aligned: bool = True,
    native: bool = False,
) -> GatedTile:
    """A tile for a pass of ``gated_linear`` that every card can run; reasoned, not measured.

    Bounds as for :func:`tile_for_bsr_linear`: no card spills registers, shared memory suffices.

    - Forward and dx: 16, 64 or 128 rows, what covers them (dx: up to 64, gfx1100's registers; also
      where indices of gates are divided, for block sides above 1 that 64 does not divide). 64
      outputs while there are up to 64 rows, so that more programs share the weight's bytes, else
      128: Hopper's and Blackwell's matrix units take a left operand of 64 rows at the least. A step
      is 32 deep, one word of bits a row; 64 for skipping forward with a 16-bit weight. Skipping
      takes up to 64 rows beside 128 outputs.
    - dW: 128 x 64 weights (64 x 64 for such blocks), rows in steps of 32: beside the sums a tile of
      the weight and the gates' gradients lie in registers.
    - fp32 rows: products take registers instead of matrix units, so sums of 64 x 64, for dW
      64 x 32, in steps of 16 (skipping forward 32 where the weight is fp32 too).
    - Rows that are not aligned: 32 x 32 x 32, for fp32 in steps of 16, in two stages. Reading by
      the element takes registers, and a size that 16 does not divide should be rare.
    - Skipping cuts ``BLOCK_N`` and ``BLOCK_K`` to the block.
    - ``num_warps``: 8 above 64 x 64 sums (fp32: from 32 x 32), 2 up to 16 x 32 (fp32:
      below), else 4.
    - ``num_stages``: up to 4 (fused dW: 3), as both operands fit.
    - ``max_registers``: for fp32 rows (skipping: beside a 16-bit weight), skipping dW, and rows
      that are not aligned.

    Args:
        which: ``"fwd"`` | ``"dx"`` | ``"dw"``; ``"skip_fwd"`` | ``"skip_dx"`` | ``"skip_dw"``.
        M, N, K: rows of ``x``, outputs, inputs.
        w_dtype, x_dtype: fp32 | fp16 | bf16.
        block: ``(bn, bk)`` weights that a gate covers.
        aligned: whether rows of all operands can be read in wide pieces.
        native: for Triton's CPU compiler, which unrolls a tile.
    """
    if native:
        return GatedTile(4, 16, 32, 1, 1) if which == "dw" else GatedTile(16, 16, 16, 1, 1)
    wide = x_dtype.itemsize > 2
    if not aligned:
        return _small_tile(which, M, block, wide)
    skip, which = which.startswith("skip_"), which.removeprefix("skip_")
    odd = any(side > 1 and side % 64 for side in block) and not skip
    bn, bk = (max(16, 1 << (side - 1).bit_length()) if skip else 128 for side in block)
    if which == "dw":
        block_n, block_k = min(bn, 64 if wide or odd else 128), min(bk, 32 if wide else 64)
        block_m = 16 if wide else 32
        area, step = block_n * block_k, (block_n + block_k) * block_m * x_dtype.itemsize
        most = 4 if skip else 3
    else:
        (side, inner) = (bn, bk) if which == "fwd" else (bk, bn)
        few = M <= 64 or which == "dx" or wide or odd
        block_m = 16 if M <= 16 else 64 if few else 128
        out = min(side, 64 if wide or M <= 64 else 128)
        if skip and out == 128:
            block_m = min(block_m, 64)
        area = out * block_m
        deep = skip and which == "fwd" and not wide and w_dtype.itemsize == 2
        depth = min(inner, 64 if deep else 32)
        if wide and not (skip and which == "fwd" and w_dtype.itemsize > 2):
            depth = 16
        block_n, block_k = (out, depth) if which == "fwd" else (depth, out)
        step = (out * w_dtype.itemsize + block_m * x_dtype.itemsize) * depth
        most = 4
    stages = max(2, min(most, _SHARED_BYTES // step, _LDS_BYTES // step + 1))
    if area > 64 * 64 or (wide and area >= 32 * 32):
        warps = 8
    else:
        warps = 4 if area > 16 * 32 or (area == 16 * 32 and (wide or which == "dw")) else 2
    capped = which == "dw" or (wide and w_dtype.itemsize == 2) if skip else wide
    cap = _most_registers(warps) if capped else None
    return GatedTile(block_n, block_m, block_k, stages, warps, cap)


def _small_tile(which: str, M: int, block: tuple[int, int], wide: bool) -> GatedTile:
    """32 on each side, of what is added up 16 if values are wide."""
    skip, which = which.startswith("skip_"), which.removeprefix("skip_")
    most = [max(16, 1 << (side - 1).bit_length()) if skip else 32 for side in block]
    rows = 16 if M <= 16 and which != "dw" else 32
    sides = {"N": min(32, most[0]), "M": rows, "K": min(32, most[1])}
    inner = {"fwd": "K", "dx": "N", "dw": "M"}[which]  # what is added up
    sides[inner] = min(sides[inner], 16 if wide else 32)
    warps = 8 if wide else 4
    return GatedTile(sides["N"], sides["M"], sides["K"], 2, warps, _most_registers(warps))


def _most_registers(warps: int) -> int:
    """Three programs of four warps a multiprocessor, two of eight.

    Left alone, ptxas now and then gives a kernel a few registers less than it needs, for one
    program more, and spills 8 or 16 bytes.
    """
    return 168 if warps <= 4 else 128


def tile_for_bsr_conv(
    which: str,
    pixels: int,
    block: tuple[int, int],
    nnz: int,
    dtype: torch.dtype,
    aligned: bool = True,
    native: bool = False,
    reasons: list[str] | None = None,
) -> BsrTile:
    """A tile for a pass of ``bsr_conv2d`` that every card can run; reasoned, not measured.

    Bounds as for :func:`tile_for_bsr_linear`: no card spills registers, shared memory suffices.

    - Pixels: 64 or 128, 16 where there are no more; for fp32, and where channels are not aligned,
      up to 32: addresses of pixels take registers beside the products.
    - The side that is stored: up to 64 (fp32: 32). Depth of a step: the block's, up to 32 (fp32:
      16).
    - dvalues: pixels are what is added up, in steps of 32 (fp32: 16). ``split``: up to 16 while
      there are fewer than two programs a multiprocessor of a large card, and each keeps 16 steps.
      8 warps for blocks above 64, of which four spill 8 bytes on sm_86 and sm_89.

    Args:
        which: ``"fwd"`` | ``"dx"`` | ``"dvalues"``.
        pixels: of the pass's result; of the output for ``"dvalues"``.
        block: ``(bn, bk)``, powers of two >= 16.
        nnz: number of stored blocks.
        dtype: fp32 | fp16 | bf16, of ``x``.
        aligned: whether channels of all operands can be read in wide pieces.
        native: for Triton's CPU compiler, which unrolls a tile.
        reasons: gets why, in words.
    """
    why = [] if reasons is None else reasons
    if native:
        why.append("the smallest tile: Triton's CPU compiler unrolls it")
        return BsrTile(BLOCK_N=16, BLOCK_M=16, BLOCK_K=16, num_stages=1, num_warps=1)
    wide = dtype.itemsize > 2
    small = wide or not aligned
    if small:
        found = "fp32 values" if wide else "channels that 16 does not divide"
        why.append(f"{found}: addresses of pixels take registers beside the products")
    most, depth = 32 if small else 64, 16 if wide else 32
    if which == "dvalues":
        block_n, block_k, block_m = min(block[0], most), min(block[1], most), depth
        programs = nnz * (block[0] // block_n) * (block[1] // block_k)
        split = 1
        while split < 16 and 2 * split * programs <= 264 and pixels >= 2 * split * 16 * block_m:
            split *= 2
        stages = 2 if small else 3
        warps = 8 if max(block) > 64 else 4
        why.append(f"{block_n}x{block_k} values a program, {programs} programs over all pixels")
        if split > 1:
            why.append(f"split by {split}: fewer than two programs a multiprocessor")
        return BsrTile(block_n, block_m, block_k, stages, warps, split=split)
    block_m = 16 if pixels <= 16 else 32 if small else 64 if pixels <= 4096 else 128
    if which == "fwd":
        block_n, block_k = min(block[0], most), min(block[1], depth)
    else:
        block_n, block_k = min(block[0], depth), min(block[1], most)
    why.append(f"{block_m} pixels a program of {pixels}, the block's side up to {most}")
    return BsrTile(block_n, block_m, block_k, 2 if small else 3, 4)
