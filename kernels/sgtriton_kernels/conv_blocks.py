"""Where the stored blocks of a convolution's weight lie, and what follows from that."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F

from ._ops import is_capturing
from .choices import Choices
from .conv_geometry import ConvGeometry, Pair

Kept = TypeVar("Kept")


class ChannelLists(NamedTuple):
    """The stored blocks of each block of input channels of a group, whatever their tap.

    Args:
        starts: ``[groups * cols + 1]`` int32. Where each list starts, and the end of the last.
        meets: ``[nnz + 1]`` int32. ``block row * taps + tap``; the last is never used.
        which: ``[nnz]`` int32. Index into the values.
    """

    starts: torch.Tensor
    meets: torch.Tensor
    which: torch.Tensor


class ConvBlocks:
    """Where the stored blocks of a weight lie, in a layer of some geometry.

    What follows from that is kept once it was asked for: it does not change with the values.

    Args:
        crow, col: ``[block_rows + 1]``, ``[nnz + 1]``, of :class:`.BlockSparse`.
        block: ``(bn, bk)``.
        geometry: of the layer.

    Attributes:
        rows, cols: block rows of a group, block columns of a tap.
        choices: what was looked up for the layer.
        over_n, over_k: what the last block of a group's output and input channels overhangs.
    """

    def __init__(
        self, crow: torch.Tensor, col: torch.Tensor, block: Pair, geometry: ConvGeometry
    ):  # fmt: skip
        self.crow, self.nnz, self.choices = crow, len(col) - 1, Choices()
        self.col, self.geometry, (self.bn, self.bk) = col[: self.nnz], geometry, block
        self.rows, self.cols = geometry.blocks(block)
        self.over_n = self.rows * self.bn - geometry.out_per_group
        self.over_k = self.cols * self.bk - geometry.in_per_group
        self.grid = geometry.groups * self.rows, geometry.taps * self.cols

    @cached_property
    def starts(self) -> list[int]:
        """Where each block row starts, and the end of the last."""
        return self.crow.tolist()

    @cached_property
    def columns(self) -> list[int]:
        """``col`` as numbers."""
        return self.col.tolist()

    @property
    def row(self) -> torch.Tensor:
        """``[nnz]``, the block row of each block."""
        return self._kept(
            "_row", lambda: torch.repeat_interleave(self.crow.diff(), output_size=self.nnz)
        )

    @property
    def places(self) -> torch.Tensor | None:
        """``[nnz]`` int64, where each block lies in the grid; ``None`` where all are stored."""
        rows, cols = self.grid
        if self.nnz == rows * cols:
            return None
        return self._kept("_places", lambda: self.row.long() * cols + self.col)

    @property
    def by_channels(self) -> ChannelLists:
        """The blocks in the order of the gradient of ``x``."""
        return self._kept("_by_channels", self._sorted_by_channels)

    def _sorted_by_channels(self) -> ChannelLists:
        taps, groups = self.geometry.taps, self.geometry.groups
        tap, column = self.col // self.cols, self.col % self.cols
        row = self.row
        target = row // self.rows * self.cols + column
        order = torch.argsort(target * taps + tap, stable=True)
        lists = torch.arange(groups * self.cols + 1, dtype=torch.int32, device=self.col.device)
        # counted without bincount, which would wait for the device
        starts = torch.searchsorted(target[order].int(), lists, out_int32=True)
        meets = F.pad((row * taps + tap)[order].int(), (0, 1))
        return ChannelLists(starts, meets, order.int())

    def _kept(self, name: str, make: Callable[[], Kept]) -> Kept:
        """What was made once; not what a graph's capture has only recorded."""
        found = self.__dict__.get(name)
        if found is None:
            found = make()
            if not is_capturing(self.col.device):
                self.__dict__[name] = found
        return found

    @cached_property
    def overhanging(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Which blocks overhang the output channels of a group, and which the input channels."""
        last_row = self.row % self.rows == self.rows - 1
        last_col = self.col % self.cols == self.cols - 1
        return last_row.nonzero()[:, 0], last_col.nonzero()[:, 0]

    def inside(self, values: torch.Tensor) -> torch.Tensor:
        """The values with 0 beyond a ragged edge, where anything may be stored."""
        if not self.over_n and not self.over_k:
            return values
        values, (last_row, last_col) = values.clone(), self.overhanging
        if self.over_n:
            values[last_row, self.bn - self.over_n :] = 0
        if self.over_k:
            values[last_col, :, self.bk - self.over_k :] = 0
        return values

    @cached_property
    def _whole(self) -> tuple[int, ...]:
        """Size of the weight with all that overhangs."""
        geometry = self.geometry
        return geometry.groups * self.rows * self.bn, self.cols * self.bk, *geometry.kernel

    @cached_property
    def _views(self) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
        """Sizes and strides: the grid's blocks in the order of the weight, and the other way."""
        geometry, (bn, bk), (rows, cols) = self.geometry, (self.bn, self.bk), (self.rows, self.cols)
        groups, taps, size = geometry.groups, geometry.taps, bn * bk
        line, channels = self.grid[1] * size, cols * bk * taps
        return (
            ((groups, rows, bn, cols, bk, taps), (rows * line, line, bk, size, 1, cols * size)),
            (
                (groups, rows, taps, cols, bn, bk),
                (rows * bn * channels, bn * channels, 1, bk * taps, channels, taps),
            ),
        )

    def to_weight(self, values: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
        """``[O, C / groups, *kernel]``, zeros filled in; ``values`` must be contiguous."""
        if (places := self.places) is not None:
            grid = values.new_zeros(self.grid[0] * self.grid[1], self.bn, self.bk)
            values = grid.index_copy_(0, places, values)
        # few calls: beside a small layer they take most of the time
        weight, whole = values.as_strided(*self._views[0]), self._whole
        if memory_format == torch.channels_last:
            weight = weight.movedim(-1, 3).reshape(whole[0], *whole[2:], whole[1]).movedim(-1, 1)
        else:
            weight = weight.reshape(whole)
        if not self.over_n and not self.over_k:
            # a view of the values where all blocks are stored: with odd strides on axes of one
            return weight.contiguous(memory_format=memory_format)
        geometry = self.geometry
        weight = weight.unflatten(0, (geometry.groups, -1))
        weight = weight[:, : geometry.out_per_group, : geometry.in_per_group].flatten(0, 1)
        return weight.contiguous(memory_format=memory_format)

    def of_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """``[nnz, bn, bk]``, the blocks of ``weight``; 0 beyond a ragged edge."""
        geometry = self.geometry
        if self.over_n or self.over_k:
            weight = weight.reshape(geometry.groups, -1, geometry.in_per_group, geometry.taps)
            weight = F.pad(weight, (0, 0, 0, self.over_k, 0, self.over_n))
        blocks = weight.contiguous().as_strided(*self._views[1])
        blocks = blocks.reshape(self.grid[0] * self.grid[1], self.bn, self.bk)
        places = self.places
        return blocks if places is None else blocks.index_select(0, places)
