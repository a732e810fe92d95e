"""The candidate of a convolution: looked up once for each size, or the caller's."""

from __future__ import annotations

import math

import torch

from ._triton import dot_precision, is_native
from .bsr import BlockSparse
from .bsr_choice import longest_row
from .bsr_conv_passes import conv_blocks
from .candidate import Candidate
from .conv_cell import ConvCell
from .conv_geometry import ConvGeometry
from .lookup import choose_and_keep, now
from .pinned import choice_of_name


def conv_choice(
    which: str, w: BlockSparse, geometry: ConvGeometry, impl: str, x: torch.Tensor
) -> Candidate:
    """The candidate of a pass.

    Args:
        which: ``"fwd"`` | ``"dx"`` | ``"dvalues"``.
        w: of which shape, block and index count.
        impl: ``"triton"`` | ``"torch"``.
        x: ``[B, C, H, W]``, of which no value is read.
    """
    # kept where the next call meets it, as :mod:`.bsr_choice` does, and why
    choices = conv_blocks(w, geometry).choices
    precision = dot_precision("conv") if impl == "triton" else ""
    key = which, x.shape, x.dtype, x.stride(1) == 1, impl, precision
    found = choices.of(now.generation).get(key)
    return found or choose_and_keep(
        choices, key, conv_cell_of(which, w, geometry, impl, x), x.device
    )


def conv_cell_of(
    which: str, w: BlockSparse, geometry: ConvGeometry, impl: str, x: torch.Tensor
) -> ConvCell:
    """What is looked up for such a pass; arguments as for :func:`conv_choice`."""
    images, _, height, width = x.shape
    of_result = geometry.out_size((height, width))
    pixels = images * (height * width if which == "dx" else math.prod(of_result))
    by_torch = impl == "torch"
    is_tf32 = not by_torch and x.dtype == torch.float32 and x.device.type != "cpu"
    return ConvCell(
        f"bsr_conv {which}", impl, pixels, *w.shape, w.block, w.nnz, x.dtype,
        longest_row(w.crow),
        dot_precision("conv") if is_tf32 else "ieee",
        by_torch or (geometry.in_per_group % 16 == 0 and geometry.out_per_group % 16 == 0),
        not by_torch and is_native(x.device),
        geometry=geometry,
        images=images,
        size=(height, width),
        channels_last=x.stride(1) == 1,
    )  # fmt: skip


def pinned_choice(which: str, name: str | None, impl: str, x: torch.Tensor) -> Candidate | None:
    """What a caller named, where it says something of a pass.

    A tile is taken by all passes, which a kernel computes; another name is one of forward.
    """
    if name is None:
        return None
    found = choice_of_name("bsr_conv fwd", name, impl, x.device)
    return found if which == "fwd" or found.tile is not None else None
