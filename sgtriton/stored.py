"""The open part of a weight, as state dicts and files hold it.

Block gates: the open blocks with their index (:class:`sgtriton_kernels.BlockSparse`). Per-weight
gates: one bit per weight and the weights that are kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from sgtriton_kernels import BlockSparse, GateLayout, coverage, gate_layout, gate_weight
from sgtriton_kernels.bitmap import compress, expand, unpack_bitmap
from sgtriton_kernels.blocks import Block, matrix_shape, matrix_to_weight, pattern_to_gates
from sgtriton_kernels.bsr_convert import convert_gated
from sgtriton_kernels.bsr_merge import merge_blocks
from sgtriton_kernels.kinds import open_gates


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
        cls,
        weight: torch.Tensor,
        gate: torch.Tensor,
        layout: GateLayout,
        kind: str = "threshold",
    ) -> StoredWeight:
        """Take the open part of a gated weight, times its gates as eval reads them.

        Args:
            weight: ``layout.weight_shape``; only its open part matters.
            gate: ``layout.gate_shape`` fp32, or bool: which gates are open.
            layout: how the gates lie over the weight.
            kind: of the gates.
        """
        weight = weight.detach()
        if not layout.per_weight:
            return cls(layout, convert_gated(weight, gate.float(), layout, kind))
        if kind == "hard_concrete":  # other kinds are 0 or 1
            block, groups = layout.block, layout.groups
            weight = gate_weight(weight, gate.detach(), block, groups=groups, kind=kind)
        bits, kept = compress(weight, open_gates(gate, kind))
        return cls(layout, bits=bits, kept=kept)

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

    def with_values(self, values: torch.Tensor) -> StoredWeight:
        """The same pattern with other values, of the same shape."""
        if self.matrix is None:
            return StoredWeight(self.layout, bits=self.bits, kept=values)
        m = self.matrix
        return StoredWeight(
            self.layout,
            BlockSparse._from_validated(
                values, m.crow, m.col, m.shape, m.ccol, m.row, m.perm, m.row_order
            ),
        )

    def merged(self, block: tuple[int, int]) -> StoredWeight:
        """The same weight in larger blocks, zeros where a part of one is closed.

        Raises:
            ValueError: a block that is not made of whole ones; weights that have a gate each.
        """
        if self.matrix is None:
            raise ValueError("weights that have a gate each are not stored in blocks")
        layout = self.layout
        wide = gate_layout(layout.weight_shape, block, layout.groups)
        matrix = merge_blocks(
            self.matrix,
            wide.block,
            groups=layout.groups,
            taps=layout.taps,
            shape=matrix_shape(wide),
        )
        return StoredWeight(wide, matrix)

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


def served_block(layout: GateLayout, asked: Block | None = None) -> tuple[int, int] | None:
    """The block into which gate blocks are merged to be served.

    Args:
        layout: how the gates lie over the weight.
        asked: the block, cut to the layer's size, ``None`` sides the whole of it; by default the
            smallest that kernels serve (sides that are powers of two >= 16).

    Returns:
        Its sides; ``None`` where the gate blocks are served as they are, or there is no such block.

    Raises:
        ValueError: ``asked`` is not made of whole gate blocks.
    """
    if layout.per_weight:
        return None
    sizes = layout.weight_shape[0] // layout.groups, layout.weight_shape[1]
    if asked is None:
        sides = [_served_side(s, size) for s, size in zip(layout.block, sizes, strict=True)]
        found = None if sides[0] is None or sides[1] is None else (sides[0], sides[1])
    else:
        found = gate_layout(layout.weight_shape, asked, layout.groups).block
        for side, gate, size in zip(found, layout.block, sizes, strict=True):
            if side % gate and side < size:
                raise ValueError(
                    f"serve_block must be made of whole gate blocks {layout.block}, got {asked}"
                )
    return None if found == layout.block else found


def _served_side(side: int, size: int) -> int | None:
    served = 16
    while served % side and served <= size:
        served *= 2
    return served if served <= size else None
