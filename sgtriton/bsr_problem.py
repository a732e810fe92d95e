"""A pass of ``bsr_linear`` with inputs, on which candidates are tried."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sgtriton_kernels import BlockSparse, bsr_linear
from sgtriton_kernels.bsr_linear_passes import linear_dvalues, linear_dx
from sgtriton_kernels.candidate import Candidate
from sgtriton_kernels.cell import Cell

from .problem import Problem


class BsrLinearProblem(Problem):
    """A pass of ``bsr_linear``: of ``x`` or ``dy``, or of both, with a weight.

    Args:
        matrix: the weight, on the device; its pattern counts, its values do not.
    """

    def __init__(self, cell: Cell, matrix: BlockSparse, generator: torch.Generator):
        super().__init__(cell, matrix.values.device, generator)
        self.matrix = matrix
        self._has_dy = cell.op != "bsr_linear fwd"

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor | None, BlockSparse]:
        cell = self.cell
        dy = self.random(cell.M, cell.N) if self._has_dy else None
        return self.random(cell.M, cell.K), dy, self.matrix

    def whole_inputs(self) -> tuple[torch.Tensor, torch.Tensor | None, BlockSparse]:
        cell, w = self.cell, self.matrix
        terms = {"fwd": cell.K, "dx": cell.N, "dvalues": cell.M}[cell.op.split()[1]]
        matrix = BlockSparse._from_index(self.signs(*w.values.shape), w.index_tensors, w.shape)
        x = self.signs(cell.M, cell.K, terms=terms)
        return x, self.signs(cell.M, cell.N, terms=terms) if self._has_dy else None, matrix

    def compute(
        self, candidate: Candidate, x: torch.Tensor, dy: torch.Tensor | None, w: BlockSparse
    ) -> torch.Tensor:
        if self.cell.op == "bsr_linear fwd":
            return bsr_linear(x, w, impl=self.cell.impl, tile=candidate.tile or candidate.name)
        assert dy is not None
        if self.cell.op == "bsr_linear dx":
            return linear_dx(dy, w.values, w, candidate)
        return linear_dvalues(dy, x, w.values, w, candidate)

    def expected(
        self, x: torch.Tensor, dy: torch.Tensor | None, w: BlockSparse
    ) -> tuple[tuple[torch.Tensor, torch.dtype], ...]:
        dense = w.to_dense().double()  # of fp32 a card may take fewer bits
        if dy is None:
            right = F.linear(x.double(), dense)
        elif self.cell.op == "bsr_linear dx":
            right = dy.double() @ dense
        else:
            right = taken(dy.double().T @ x.double(), w)
        return ((right, self.cell.dtype),)

    def check_work(self) -> tuple[float, float]:
        dense = self.cell.M * self.cell.N * self.cell.K
        return dense, dense * self.cell.density


def taken(whole: torch.Tensor, w: BlockSparse) -> torch.Tensor:
    """The stored blocks' places in a matrix ``[N, K]``, zeros beyond a ragged edge."""
    (n, k), (bn, bk) = w.shape, w.block
    padded = F.pad(whole, (0, w.block_cols * bk - k, 0, w.block_rows * bn - n))
    blocks = padded.view(w.block_rows, bn, w.block_cols, bk).transpose(1, 2)
    return blocks[w.block_row.long(), w.col[: w.nnz].long()]
