"""The passes of a convolution with a block-sparse weight, each by a given candidate."""

from __future__ import annotations

import math

import torch

from ._autocast import without_autocast
from .bsr import BlockSparse
from .bsr_conv_product import bsr_conv_dvalues, bsr_conv_dx, bsr_conv_fwd
from .bsr_conv_torch import (
    bsr_conv_bwd_torch,
    bsr_conv_torch,
    conv_dense,
    conv_dense_bwd,
    result_format,
)
from .candidate import Candidate
from .conv_blocks import ConvBlocks
from .conv_geometry import ConvGeometry

# The kernels count the pixels of an image in 32 bits, those of a tile that begins in it included.
_MOST_PIXELS = 2**31 - 2**16


def conv_blocks(w: BlockSparse, geometry: ConvGeometry) -> ConvBlocks:
    """What follows from pattern and geometry, as it is kept with the container, or made now."""
    blocks = kept_conv_blocks(w, geometry)
    if blocks is None:
        # of every geometry, which are few: a captured graph may read the memory of any
        every = w.__dict__.setdefault("_every_conv_blocks", {})
        blocks = every.get(geometry)
        if blocks is None:
            blocks = every[geometry] = ConvBlocks(w.crow, w.col, w.block, geometry)
        object.__setattr__(w, "_conv_blocks", blocks)
    return blocks


def kept_conv_blocks(w: BlockSparse, geometry: ConvGeometry) -> ConvBlocks | None:
    """The last that :func:`conv_blocks` gave for ``w``, whose index does not change, if it fits."""
    blocks = w.__dict__.get("_conv_blocks")
    if blocks is None or (blocks.geometry is not geometry and blocks.geometry != geometry):
        return None
    return blocks


def conv_fwd(
    x: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    w: BlockSparse,
    geometry: ConvGeometry,
    activation: str,
    impl: str,
    candidate: Candidate,
) -> torch.Tensor:
    """Compute ``act(W * x + bias)``; of ``w`` only shape and index are read.

    Args:
        x: ``[B, C, H, W]`` fp32 | fp16 | bf16 (``torch``: fp64 too), any strides; not empty.
        values: ``[nnz, bn, bk]``, dtype of ``x``, contiguous.
        bias: ``[O]``, dtype of ``x``, or ``None``.
        activation: ``"none"`` | ``"relu"`` | ``"gelu"`` | ``"gelu_tanh"`` | ``"silu"``.
        impl: ``"triton"`` | ``"torch"``.
        candidate: one of the pass and the implementation.

    Returns:
        ``[B, O, H', W']``, dtype of ``x``; in memory as PyTorch lays out such a result.

    Raises:
        ValueError: more pixels an image than the Triton kernels can count.
    """
    memory_format = result_format(x)
    if candidate.way == "unpack":
        with without_autocast(x.device):
            blocks = conv_blocks(w, geometry)
            return conv_dense(x, values, blocks, bias, activation, memory_format)
    if impl == "torch":
        with without_autocast(x.device):
            blocks = conv_blocks(w, geometry)
            return bsr_conv_torch(x, values, blocks, bias, activation, candidate)
    out_size = geometry.out_size(x.shape[2:])
    most = max(map(math.prod, (x.shape[2:], out_size)))
    if most > _MOST_PIXELS:
        raise ValueError(
            f"x and the result must have at most {_MOST_PIXELS} pixels an image for the Triton "
            f"kernels, got {most}"
        )
    out = torch.empty(
        (x.shape[0], geometry.out_channels, *out_size),
        dtype=x.dtype, device=x.device, memory_format=memory_format,
    )  # fmt: skip
    assert candidate.tile is not None
    bsr_conv_fwd(
        x, values, w.crow, w.col, w.row_order, bias, geometry, activation, out, candidate.tile
    )
    return out


def conv_bwd(
    dout: torch.Tensor,
    x: torch.Tensor,
    values: torch.Tensor,
    w: BlockSparse,
    geometry: ConvGeometry,
    impl: str,
    by_dx: Candidate | None,
    by_dvalues: Candidate | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Compute the gradients of ``x`` and of the values.

    Args:
        dout: ``[B, O, H', W']``, dtype of ``x``, any strides; not empty.
        x, values, w, geometry, impl: as for :func:`conv_fwd`.
        by_dx, by_dvalues: what computes each; ``None`` where nobody needs it.

    Returns:
        ``[B, C, H, W]`` in memory as a result of ``x`` and ``[nnz, bn, bk]``, dtype of ``x``.
    """
    if impl == "torch":
        ways = (None if by is None else by.way for by in (by_dx, by_dvalues))
        with without_autocast(x.device):
            return bsr_conv_bwd_torch(dout, x, values, conv_blocks(w, geometry), *ways)
    dx = dvalues = None
    by_library = tuple(by is not None and by.tile is None for by in (by_dx, by_dvalues))
    if any(by_library):
        with without_autocast(x.device):
            dx, dvalues = conv_dense_bwd(dout, x, values, conv_blocks(w, geometry), by_library)
        dx = None if dx is None else dx.contiguous(memory_format=result_format(x))
    if by_dx is not None and by_dx.tile is not None:
        dx = torch.empty_like(x, memory_format=result_format(x))
        bsr_conv_dx(dout, values, conv_blocks(w, geometry).by_channels, geometry, dx, by_dx.tile)
    if by_dvalues is not None and by_dvalues.tile is not None:
        dvalues = torch.empty_like(values)
        bsr_conv_dvalues(dout, x, w.row, w.col, w.perm, geometry, dvalues, by_dvalues.tile)
    return dx, dvalues
