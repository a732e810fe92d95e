"""A pass of a block-sparse convolution with inputs, on which candidates are tried."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from sgtriton_kernels import BlockSparse
from sgtriton_kernels.blocks import gate_layout, matrix_to_weight, weight_to_matrix
from sgtriton_kernels.bsr_conv_passes import conv_bwd, conv_fwd
from sgtriton_kernels.candidate import Candidate
from sgtriton_kernels.conv_cell import ConvCell

from .bsr_problem import taken
from .problem import Problem, least_time


class ConvProblem(Problem):
    """A pass of a convolution: of images, or of them and the gradient of the result.

    Args:
        matrix: the weight, on the device; its pattern counts, its values do not.
    """

    cell: ConvCell

    def __init__(self, cell: ConvCell, matrix: BlockSparse, generator: torch.Generator):
        super().__init__(cell, matrix.values.device, generator)
        self.matrix, self._which = matrix, cell.op.split()[1]
        geometry, (height, width) = cell.geometry, cell.size
        self._x_shape = cell.images, geometry.in_channels, height, width
        self._out_shape = cell.images, geometry.out_channels, *cell.out_size
        shape = geometry.out_channels, geometry.in_per_group, *geometry.kernel
        self._layout = gate_layout(shape, matrix.block, geometry.groups)

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor | None, BlockSparse, bool]:
        x = self._laid(self.random(*self._x_shape))
        dout = None if self._which == "fwd" else self._laid(self.random(*self._out_shape))
        return x, dout, self.matrix, False

    def whole_inputs(self) -> tuple[torch.Tensor, torch.Tensor | None, BlockSparse, bool]:
        w, g = self.matrix, self.cell.geometry
        terms = {
            "fwd": g.in_per_group * g.taps, "dx": g.out_per_group * g.taps, "dvalues": self.cell.M
        }[self._which]  # fmt: skip
        matrix = BlockSparse._from_index(self.signs(*w.values.shape), w.index_tensors, w.shape)
        x = self._laid(self.signs(*self._x_shape, terms=terms))
        dout = None
        if self._which != "fwd":
            dout = self._laid(self.signs(*self._out_shape, terms=terms))
        return x, dout, matrix, True

    def compute(
        self,
        candidate: Candidate,
        x: torch.Tensor,
        dout: torch.Tensor | None,
        w: BlockSparse,
        whole: bool,
    ) -> torch.Tensor:
        """The pass of some inputs.

        Of whole numbers the library's own convolution is rounded to such on a card: it may take
        fractions of them (Winograd's transforms), by design and not by mistake.
        """
        given = w, self.cell.geometry
        if dout is None:
            found = conv_fwd(x, w.values, None, *given, "none", self.cell.impl, candidate)
        else:
            by = (candidate, None) if self._which == "dx" else (None, candidate)
            grads = conv_bwd(dout, x, w.values, *given, self.cell.impl, *by)
            found = grads[0] if self._which == "dx" else grads[1]
        assert found is not None
        is_library = candidate.tile is None and self.device.type != "cpu"
        return found.round() if whole and is_library else found

    def expected(
        self, x: torch.Tensor, dout: torch.Tensor | None, w: BlockSparse, whole: bool
    ) -> tuple[tuple[torch.Tensor, torch.dtype], ...]:
        g, (height, width) = self.cell.geometry, self.cell.size
        weight = matrix_to_weight(w.to_dense(), self._layout).double()
        (top, left), (below, beside) = g.before, g.after
        padded = F.pad(x.double(), (left, beside, top, below))
        if dout is None:
            right = F.conv2d(padded, weight, None, g.stride, 0, g.dilation, g.groups)
        else:
            needs = self._which == "dx", self._which == "dvalues", False
            dx, dw, _ = torch.ops.aten.convolution_backward.default(
                dout.double(), padded, weight, None, g.stride, (0, 0), g.dilation, False, (0, 0),
                g.groups, needs,
            )  # fmt: skip
            if self._which == "dx":
                right = dx[:, :, top : top + height, left : left + width]
            else:
                right = taken(weight_to_matrix(dw, self._layout), w)
        return ((right, self.cell.dtype),)

    def check_work(self) -> tuple[float, float]:
        g = self.cell.geometry
        outputs = self.cell.images * math.prod(self.cell.out_size)
        dense = outputs * g.out_channels * g.in_per_group * g.taps
        return dense, dense * self.cell.density

    def check_rate(self) -> float:
        return _fp64_rate(self.device)

    def _laid(self, t: torch.Tensor) -> torch.Tensor:
        """With channels side by side, if those of ``x`` are."""
        if not self.cell.channels_last:
            return t
        # not contiguous(): of one channel both orders are, with other strides
        return torch.empty_like(t, memory_format=torch.channels_last).copy_(t)


@functools.cache
def _fp64_rate(device: torch.device) -> float:
    """Multiply-adds a second of a convolution in fp64, about; far fewer than a product's."""
    x = torch.ones(1, 64, 18, 18, dtype=torch.float64, device=device)
    w = torch.ones(64, 64, 3, 3, dtype=torch.float64, device=device)
    return w.numel() * 16 * 16 / least_time(device, lambda: F.conv2d(x, w))
