"""What one program computes: tiles, named candidates, and the tile that a launch uses."""

from __future__ import annotations

from dataclasses import dataclass

import torch

MAX_BLOCK_N = 128  # output columns per program; a taller block is cut into parts

# the smallest per-program limit among the cards (sm_86, sm_89, sm_120), less room for the index
_SHARED_BYTES = 96 * 1024
# AMD cards: 64 KB, but the compiler keeps one stage in registers there
_LDS_BYTES = 64 * 1024


@dataclass(frozen=True)
class Tile:
    """What one program computes, and how; block sides come from the container.

    Args:
        BLOCK_M: rows of ``x`` per program, a power of two >= 16.
        BLOCK_K: depth of one step inside a block, a power of two >= 16; cut to the block's.
        num_stages: depth of the software pipeline.
        num_warps: warps per program.
    """

    BLOCK_M: int
    BLOCK_K: int
    num_stages: int
    num_warps: int


@dataclass(frozen=True)
class Candidate:
    """A named way to compute an op; records hold the name, never the numbers."""

    name: str
    variant: str
    tile: Tile


BSR_LINEAR_CANDIDATES = tuple(
    Candidate(f"carried_m{m}_k{k}_s{stages}_w{warps}", "carried", Tile(m, k, stages, warps))
    for m, k, stages, warps in (
        (16, 32, 4, 2), (16, 64, 4, 4), (32, 32, 4, 4), (32, 64, 3, 4), (64, 32, 4, 4),
        (64, 64, 3, 4), (128, 32, 3, 4), (128, 64, 3, 8),
    )
)  # fmt: skip


def tile_for_bsr_linear(M: int, block: tuple[int, int], dtype: torch.dtype) -> Tile:
    """A tile for ``bsr_linear`` that every card can run; reasoned, not measured.

    What bounds the numbers is the compiler's word that no card spills registers (gfx1100 is the
    first to do so) and shared memory.

    - ``BLOCK_M``: the power of two that covers ``M``, from 16 (the least a matrix instruction
      takes) to 128; for fp32 to 64 and an accumulator of 64 x 64, since its products take
      registers instead of matrix units.
    - ``BLOCK_K``: the block's depth, up to 64 (128 bytes of fp16, one full line); 32 beside the
      largest accumulator; 16 for fp32.
    - ``num_warps``: 8 for an accumulator or a step of values above 64 x 64 (fp32: 32 x 64), 2 for
      an accumulator up to 16 x 32, else 4.
    - ``num_stages``: up to 4, as ``num_stages * (BLOCK_M + bn) * BLOCK_K * bytes`` of shared
      memory stay under 96 KB, and one stage less under AMD's 64 KB.

    Args:
        M: rows of ``x``.
        block: ``(bn, bk)``, powers of two >= 16.
        dtype: fp32 | fp16 | bf16, of ``x``.
    """
    wide = dtype.itemsize > 2
    bn, bk = min(block[0], MAX_BLOCK_N), block[1]
    block_m = max(16, 1 << max(M - 1, 0).bit_length())
    block_m = min(block_m, 64, 64 * 64 // bn) if wide else min(block_m, 128)
    area = block_m * bn
    block_k = min(bk, 16 if wide else 32 if area > 64 * 128 else 64)
    stage = (block_m + bn) * block_k * dtype.itemsize
    stages = min(4, _SHARED_BYTES // stage, _LDS_BYTES // stage + 1)
    if max(area, bn * block_k) > (32 * 64 if wide else 64 * 64):
        warps = 8
    else:
        warps = 4 if area > 16 * 32 else 2
    return Tile(block_m, block_k, stages, warps)
