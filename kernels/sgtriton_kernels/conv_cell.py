"""A pass of a convolution to compute: what the choice of its candidate depends on."""

from __future__ import annotations

from dataclasses import dataclass

from .cell import Cell
from .conv_geometry import ConvGeometry, Pair

CONV_OPS = ("bsr_conv fwd", "bsr_conv dx", "bsr_conv dvalues")


@dataclass(frozen=True, kw_only=True)
class ConvCell(Cell):
    """A pass of a convolution with a block-sparse weight.

    Of a :class:`.Cell`, ``op`` is one of :data:`CONV_OPS`, ``M`` counts pixels (those of ``x`` for
    ``"bsr_conv dx"``, else those of the result), ``N`` and ``K`` are the sides of the matrix whose
    blocks are stored, and ``aligned`` says whether channels can be read in wide pieces.

    Args:
        geometry: of the layer.
        images: how many.
        size: height and width of each.
        channels_last: whether the channels of ``x`` lie side by side.
    """

    geometry: ConvGeometry
    images: int
    size: Pair
    channels_last: bool = True

    @property
    def out_size(self) -> Pair:
        """Height and width of an image of the result."""
        return self.geometry.out_size(self.size)

    @property
    def weight(self) -> str:
        g = self.geometry
        return f"{g.out_channels}x{g.in_per_group}x{g.kernel[0]}x{g.kernel[1]}"

    def key(self, rows: int | None = None) -> dict[str, object]:
        """As of a :class:`.Cell`, and what the layer is.

        Padding is left out, which changes little beside the border; of an image's size there is
        the power of two that covers its pixels, since it says how they lie, not how many there are.
        """
        g = self.geometry
        pairs = {"kernel": g.kernel, "stride": g.stride, "dilation": g.dilation}
        return super().key(rows) | {
            **{name: f"{down}x{right}" for name, (down, right) in pairs.items()},
            "channels": f"{g.in_channels}>{g.out_channels}",
            "groups": g.groups,
            "image": 1 << (self.size[0] * self.size[1] - 1).bit_length(),
            "channels_last": self.channels_last,
        }
