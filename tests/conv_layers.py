"""Convolutions as products to choose for, without their tensors."""

import math

import torch
from sgtriton_kernels.conv_cell import ConvCell
from sgtriton_kernels.conv_geometry import ConvGeometry

from sgtriton.predicted import open_at_random


def conv_cell(
    which="fwd", channels=(64, 128), size=(28, 28), images=8, block=(32, 32), sparsity=0.9,
    dtype=torch.bfloat16, kernel=(3, 3), padding=1, stride=1, groups=1, **more,
):  # fmt: skip
    """A pass of a layer with a random pattern."""
    around = padding, padding
    geometry = ConvGeometry(
        *channels, kernel, (stride, stride), around, around, groups=groups
    )  # fmt: skip
    pixels = images * math.prod(size if which == "dx" else geometry.out_size(size))
    aligned = geometry.in_per_group % 16 == 0 and geometry.out_per_group % 16 == 0
    cell = ConvCell(
        f"bsr_conv {which}", "triton", pixels, *geometry.matrix_shape(block), block, 0, dtype,
        aligned=aligned, geometry=geometry, images=images, size=size, **more,
    )  # fmt: skip
    return open_at_random(cell, sparsity)
