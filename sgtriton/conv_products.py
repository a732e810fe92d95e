"""The convolutions of a model as products to choose candidates for: which images they meet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from sgtriton_kernels import BlockSparse
from sgtriton_kernels.conv_arguments import geometry_of
from sgtriton_kernels.conv_cell import ConvCell
from sgtriton_kernels.conv_choice import conv_cell_of
from sgtriton_kernels.conv_geometry import ConvGeometry
from torch import nn

from .sparse_layers import padded_input


@dataclass(frozen=True)
class Images:
    """What a convolution meets.

    Args:
        geometry: of the layer there.
        shape: ``(B, C, H, W)``; of one axis ``H`` is 1.
        channels_last: whether channels lie side by side.
    """

    geometry: ConvGeometry
    shape: tuple[int, int, int, int]
    channels_last: bool


@dataclass(frozen=True)
class ConvProduct:
    """A convolution's weight and the images that it meets, of which choices are to be made.

    Args:
        name: for the table.
        matrix: the weight.
        met: the images.
        trains: whether gradients are computed as well.
    """

    name: str
    matrix: BlockSparse
    met: tuple[Images, ...]
    trains: bool = False

    def cells(self, impl: str) -> Iterator[ConvCell]:
        """The passes that it consists of."""
        for images in self.met:
            values, last = self.matrix.values, torch.channels_last
            x = torch.empty(
                images.shape, dtype=values.dtype, device=values.device,
                memory_format=last if images.channels_last else torch.contiguous_format,
            )  # fmt: skip
            for which in ("fwd", "dx", "dvalues") if self.trains else ("fwd",):
                yield conv_cell_of(which, self.matrix, images.geometry, impl, x)


def images_met(layer: nn.Module, x: torch.Tensor) -> Images | None:
    """What ``bsr_conv1d`` or ``bsr_conv2d`` gets where a layer gets ``x``; ``None`` if nothing."""
    axes = 1 if isinstance(layer, nn.Conv1d) else 2
    x, padding = padded_input(layer, x)
    geometry = geometry_of(
        x.shape[-1 - axes], layer.out_channels, layer.kernel_size, layer.stride,  # pyright: ignore
        padding, layer.dilation, layer.groups, axes,  # pyright: ignore
    )  # fmt: skip
    x = x.unsqueeze(0) if x.dim() == 1 + axes else x
    x = x.unsqueeze(2) if axes == 1 else x
    images, channels, height, width = x.shape
    if not x.numel() or min(geometry.out_size((height, width))) < 1:
        return None
    return Images(geometry, (images, channels, height, width), x.stride(1) == 1)
