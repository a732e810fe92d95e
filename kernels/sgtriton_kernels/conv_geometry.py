"""Geometry of a 2-d convolution whose weight is stored in blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Pair = tuple[int, int]


@dataclass(frozen=True)
class ConvGeometry:
    """A 2-d convolution with a weight in blocks, whatever the size of the image.

    Pairs are (vertical, horizontal).

    Args:
        in_channels, out_channels: of the layer.
        kernel: taps.
        stride, dilation: sides >= 1.
        before, after: zeros around the image: top and left, bottom and right.
        groups: divides both numbers of channels.
    """

    in_channels: int
    out_channels: int
    kernel: Pair
    stride: Pair = (1, 1)
    before: Pair = (0, 0)
    after: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def in_per_group(self) -> int:
        return self.in_channels // self.groups

    @property
    def out_per_group(self) -> int:
        return self.out_channels // self.groups

    def blocks(self, block: Pair) -> Pair:
        """Block rows of a group, and block columns of a tap."""
        return -(-self.out_per_group // block[0]), -(-self.in_per_group // block[1])

    def matrix_shape(self, block: Pair) -> Pair:
        """Shape of the weight as the matrix whose blocks are stored; see :mod:`.blocks`."""
        rows, cols = self.blocks(block)
        return self.groups * rows * block[0], self.taps * cols * block[1]

    def out_size(self, size: Sequence[int]) -> Pair:
        """Size of the output for an image of this size; below 1 where the taps do not fit."""
        (height, width), (kernel_h, kernel_w) = size, self.kernel
        (stride_h, stride_w), (apart_h, apart_w) = self.stride, self.dilation
        (top, left), (bottom, right) = self.before, self.after
        return (
            (height + top + bottom - (kernel_h - 1) * apart_h - 1) // stride_h + 1,
            (width + left + right - (kernel_w - 1) * apart_w - 1) // stride_w + 1,
        )

    def pack(self) -> list[int]:
        """As numbers, which is what an op of PyTorch takes."""
        return [
            self.in_channels, self.out_channels, *self.kernel, *self.stride, *self.before,
            *self.after, *self.dilation, self.groups,
        ]  # fmt: skip

    @classmethod
    def unpack(cls, numbers: Sequence[int]) -> ConvGeometry:
        """The geometry that :meth:`pack` made ``numbers`` of."""
        c, o, kh, kw, sh, sw, bh, bw, ah, aw, dh, dw, groups = numbers
        return cls(c, o, (kh, kw), (sh, sw), (bh, bw), (ah, aw), (dh, dw), groups)
