"""How fast a card does what products are made of, by its documents and by assumption."""

from __future__ import annotations

import torch
from sgtriton_kernels.cards import Card
from sgtriton_kernels.tiles import BsrTile

# Bytes a clock that a multiprocessor reads from the second-level cache where no document has it,
# assumed. sm_90: A100's published figure is 47; what arXiv:2402.13499 is cited for, of the same
# die, comes to 39. sm_100: a guess, about what dense products near the peak take. Cards with GDDR:
# a guess; 3.6 TB/s is reported of an RTX 4090, which is 11.
_ASSUMED_FILL = {"sm_90": 40, "sm_100": 64}
_ASSUMED_FILL_GDDR = 16

# mma.sync's share of the peak where there are larger matrix instructions: as arXiv:2501.12084 is
# cited for Hopper; assumed to do as much a clock on Blackwell, whose peak is twice as high.
_MMA_SYNC = {"sm_90": 0.63, "sm_100": 0.31}


def peak(card: Card, dtype: torch.dtype, precision: str = "ieee") -> float:
    """Operations a second of products, as the card's documents have it.

    Args:
        dtype: fp32 | fp16 | bf16.
        precision: ``"ieee"`` | ``"tf32"``, of fp32 products.
    """
    if dtype in (torch.float16, torch.bfloat16):
        return card.tflops_16bit * 1e12
    if dtype != torch.float32:
        raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    # Triton's and PyTorch's products on AMD's cards are exact ones
    if precision == "tf32" and card.tflops_tf32 is not None and card.arch.startswith("sm_"):
        return card.tflops_tf32 * 1e12
    return _fp32(card)


def _fp32(card: Card) -> float:
    if card.tflops_fp32 is not None:
        return card.tflops_fp32 * 1e12
    return 2 * 128 * card.multiprocessors * card.boost_mhz * 1e6  # NVIDIA's lanes since Ampere


def fill_bandwidth(card: Card) -> tuple[float, str]:
    """Bytes a second from the second-level cache to all multiprocessors, and where that is from.

    The latter is ``"published"`` | ``"assumed"``.
    """
    clock = card.boost_mhz * 1e6
    if card.l2_bytes_per_clock is not None:
        return card.l2_bytes_per_clock * clock, "published"
    each = _ASSUMED_FILL.get(card.arch, _ASSUMED_FILL_GDDR)
    return each * card.multiprocessors * clock, "assumed"


def matrix_rate(card: Card, tile: BsrTile) -> float:
    """The share of the matrix units' peak that products of a tile's shape can have.

    - Hopper's ``wgmma`` takes a left operand of 64 rows and reads both from shared memory at 128
      bytes a clock: ``max(n / 2, 16 + n / 4)`` clocks for ``n`` columns, of which ``n / 2`` are
      products (what arXiv:2501.12084 is cited for).
    - Blackwell's ``tcgen05.mma`` takes one of 64 rows at half of its rate, as is reported, one of
      128 at all of it.
    - Narrower ones go to ``mma.sync``.
    """
    left, right = tile.BLOCK_M, tile.BLOCK_N
    if tile.form == "weight_left":
        left, right = right, left
    if card.arch not in _MMA_SYNC:
        return 1.0
    if left < 64:
        return _MMA_SYNC[card.arch]
    if card.arch == "sm_90":
        return (right / 2) / max(right / 2, 16 + right / 4)
    return 0.5 if left < 128 else 1.0


def step_seconds(
    card: Card,
    tile: BsrTile,
    M: int,
    depth: int,
    dtype: torch.dtype = torch.bfloat16,
    precision: str = "ieee",
) -> tuple[float, float]:
    """What a multiprocessor takes to multiply ``depth`` elements of a tile, and to fill them in.

    Args:
        tile: of the forward pass, or as if it were.
        M: rows of ``x``.
        depth: elements that are added up.
        dtype, precision: as for :func:`peak`.
    """
    rows, operations = min(tile.BLOCK_M, M), peak(card, dtype, precision)
    if tile.form == "vector":
        conversion = 1 if dtype.itemsize < 4 else 0
        flops = 2 * (rows + conversion) * tile.BLOCK_N * depth
        operations = _fp32(card)
    else:
        flops = 2 * tile.BLOCK_M * tile.BLOCK_N * depth
        if dtype.itemsize < 4 or precision == "tf32":
            operations *= matrix_rate(card, tile)
    filled = dtype.itemsize * (rows + tile.BLOCK_N) * depth
    bandwidth, _ = fill_bandwidth(card)
    return flops * card.multiprocessors / operations, filled * card.multiprocessors / bandwidth


def tile_reach(card: Card, tile: BsrTile) -> float:
    """The share of the matrix units' peak that a tile can reach with full rows of ``x``."""
    multiply, fill = step_seconds(card, tile, tile.BLOCK_M, 1)
    return multiply * matrix_rate(card, tile) / max(multiply, fill)
