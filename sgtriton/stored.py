"""The open part of a weight, as state dicts and files hold it.

Block gates: the open blocks with their index (:class:`sgtriton_kernels.BlockSparse`). Per-weight
gates: one bit per weight and the weights that are kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from sgtriton_kernels import BlockSparse, GateLayout, coverage
from sgtriton_kernels.bitmap import compress, expand, unpack_bitmap
from sgtriton_kernels.blocks import (
    gates_to_pattern,
    matrix_shape,
    matrix_to_weight,
    pattern_to_gates,
    weight_to_matrix,
)


@dataclass(frozen=True)
class StoredWeight:
    """The open part of one layer's weight; its index is valid.

    Attributes:
        layout: how the gates lay over the weight.
        matrix: the open blocks; ``None`` for per-weight gates.
        bits: ``[ceil(weights / 8)]`` uint8 for per-weight gates: which weights are kept.
        kept: ``[kept]``, the weights' dtype, for per-weight gates.
    """

    layout: GateLayout
    matrix: BlockSparse | None = None
    bits: torch.Tensor | None = None
    kept: torch.Tensor | None = None

    @classmethod
    def from_gated(
        cls, weight: torch.Tensor, is_open: torch.Tensor, layout: GateLayout
    ) -> StoredWeight:
        """Take the open part of a dense weight.

        Args:
            weight: ``layout.weight_shape``; only its open part is read.
            is_open: ``layout.gate_shape`` bool.
        """
        weight = weight.detach()
        if layout.per_weight:
            bits, kept = compress(weight, is_open)
            return cls(layout, bits=bits, kept=kept)
        pattern = gates_to_pattern(is_open, layout)
        matrix = weight_to_matrix(weight, layout)
        return cls(layout, BlockSparse.from_dense(matrix, layout.block, pattern))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], layout: GateLayout) -> StoredWeight:
        """Make it of copies of what :meth:`tensors` gave, checking every index.

        Raises:
            ValueError: tensors that are missing, too many, or break a rule of their container.
        """
        names = ("values", "bits") if layout.per_weight else ("values", "crow", "col")
        if set(tensors) != set(names):
            raise ValueError(f"tensors {sorted(names)} are needed, got {sorted(tensors)}")
        for name in names:
            if not isinstance(tensors[name], torch.Tensor):
                raise ValueError(f"{name} must be a tensor, got {type(tensors[name]).__name__}")
        values = tensors["values"].detach().clone()  # whoever gave it may write to it later
        if not values.is_floating_point():
            raise ValueError(f"values must be floating point, got {values.dtype}")
        if layout.per_weight:
            bits = tensors["bits"].clone()
            expand(bits, values, layout.weight_shape)  # raises unless the two agree
            return cls(layout, bits=bits, kept=values)
        if tuple(values.shape[1:]) != layout.block:
            raise ValueError(
                f"values must hold blocks {layout.block}, got shape {tuple(values.shape)}"
            )
        matrix = BlockSparse.from_parts(
            values, tensors["crow"], tensors["col"], matrix_shape(layout)
        )
        return cls(layout, matrix)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What state dicts and files hold: ``values, crow, col``, or ``values, bits``."""
        if self.matrix is None:
            assert self.bits is not None
            assert self.kept is not None
            return {"values": self.kept, "bits": self.bits}
        matrix = self.matrix
        return {"values": matrix.values, "crow": matrix.crow, "col": matrix.col[: matrix.nnz]}

    def to_dense(self) -> torch.Tensor:
        """The whole weight, zeros where it is closed."""
        if self.matrix is None:
            assert self.bits is not None
            assert self.kept is not None
            return expand(self.bits, self.kept, self.layout.weight_shape)
        return matrix_to_weight(self.matrix.to_dense(), self.layout)

    @property
    def open_gates(self) -> torch.Tensor:
        """``layout.gate_shape`` bool. Which gates are open."""
        if self.matrix is None:
            assert self.bits is not None
            return unpack_bitmap(self.bits, self.layout.weight_shape)
        matrix = self.matrix
        pattern = torch.zeros(
            matrix.block_rows, matrix.block_cols, dtype=torch.bool, device=matrix.col.device
        )
        row, col = matrix.row[: matrix.nnz], matrix.col[matrix.perm]
        pattern[row, col] = True
        return pattern_to_gates(pattern, self.layout)

    @property
    def weights(self) -> int:
        """Number of weights of the layer, closed ones included."""
        return math.prod(self.layout.weight_shape)

    @property
    def density(self) -> float:
        """Share of the weights that are open; 1 where there are none to close."""
        cover = coverage(self.layout, self.tensors()["values"].device)
        if not cover.numel():
            return 1.0
        return ((cover * self.open_gates).sum() / cover.sum()).item()

    @property
    def nbytes(self) -> int:
        """Bytes of :meth:`tensors`."""
        return sum(t.nbytes for t in self.tensors().values())
