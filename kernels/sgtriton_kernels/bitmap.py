"""Per-weight sparsity in files: one bit per weight, and the weights that are kept.

    bits[j] = sum over i of mask[8 j + i] << i        nonzeros = weight[mask]

The mask is read in row-major order, lowest bit first; unused bits of the last byte are 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F


def pack_bitmap(mask: torch.Tensor) -> torch.Tensor:
    """Pack a mask, eight elements to a byte.

    Args:
        mask: bool, any shape.

    Returns:
        ``[ceil(n / 8)]`` uint8 for ``n`` elements, lowest bit first.

    Raises:
        ValueError: ``mask`` is not bool.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, got {mask.dtype}")
    flat = mask.flatten().to(torch.uint8)
    lanes = F.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    bits = lanes[:, 0].clone()
    for i in range(1, 8):
        bits |= lanes[:, i] << i
    return bits


def unpack_bitmap(bits: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Undo :func:`pack_bitmap`.

    Args:
        bits: ``[ceil(n / 8)]`` uint8 for the ``n`` elements of ``shape``.
        shape: the mask's shape.

    Returns:
        bool of ``shape``, contiguous.

    Raises:
        ValueError: a shape with negative sizes; bits of another dtype or length; an unused bit
            that is set.
    """
    shape = tuple(shape)
    if any(not isinstance(s, int) or isinstance(s, bool) or s < 0 for s in shape):
        raise ValueError(f"shape must be ints >= 0, got {shape}")
    n = math.prod(shape)
    if bits.dtype != torch.uint8 or bits.dim() != 1 or len(bits) != -(-n // 8):
        raise ValueError(
            f"bits must be uint8 [{-(-n // 8)}] for shape {shape}, got "
            f"{bits.dtype} {tuple(bits.shape)}"
        )
    if n % 8 and (last := int(bits[-1])) >> n % 8:
        raise ValueError(f"unused bits of the last byte must be 0, got {last:#04x}, {n % 8} used")
    lanes = torch.empty(len(bits), 8, dtype=torch.bool, device=bits.device)
    for i in range(8):
        lanes[:, i] = bits & (1 << i)
    return lanes.view(-1)[:n].view(shape)


def compress(weight: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep the weights under a mask.

    Args:
        weight: any shape and dtype.
        mask: bool, shape and device of ``weight``. Weights to keep, zeros among them too.

    Returns:
        bits: ``[ceil(n / 8)]`` uint8, see :func:`pack_bitmap`.
        nonzeros: ``[kept]``, dtype of ``weight``. Kept weights in row-major order.

    Raises:
        ValueError: ``mask`` differs from ``weight`` in shape or device, or is not bool.
    """
    if mask.shape != weight.shape or mask.device != weight.device:
        raise ValueError(
            f"mask must agree with weight {tuple(weight.shape)} on {weight.device}, got "
            f"{tuple(mask.shape)} on {mask.device}"
        )
    return pack_bitmap(mask), weight[mask]


def expand(
    bits: torch.Tensor,
    nonzeros: torch.Tensor,
    shape: Sequence[int],
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Undo :func:`compress`; weights that were not kept are 0.

    Args:
        bits: ``[ceil(n / 8)]`` uint8.
        nonzeros: ``[kept]`` any dtype, device of ``bits``.
        shape: the weight's shape.
        dtype: of the result; default: that of ``nonzeros``.

    Returns:
        ``shape``, ``dtype``, contiguous.

    Raises:
        ValueError: as :func:`unpack_bitmap`; as many set bits as nonzeros are required.
    """
    if nonzeros.dim() != 1 or nonzeros.device != bits.device:
        raise ValueError(
            f"nonzeros must be 1-d on {bits.device}, got {tuple(nonzeros.shape)} on "
            f"{nonzeros.device}"
        )
    mask = unpack_bitmap(bits, shape)
    kept = int(mask.sum())
    if kept != len(nonzeros):
        raise ValueError(f"bits must have one set bit per nonzero, {len(nonzeros)}, got {kept}")
    dtype = dtype or nonzeros.dtype
    dense = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return dense.masked_scatter_(mask, nonzeros.to(dtype))
