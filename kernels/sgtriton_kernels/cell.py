"""A product to compute: what the choice of its candidate depends on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

OPS = ("bsr_linear fwd", "bsr_linear dx", "bsr_linear dvalues")

# no usual sparsity lies near an edge: layers that are meant to be alike share a record
_DENSITIES = ((0.35, ">=0.35"), (0.07, "0.07-0.35"), (0.0, "<0.07"))
_UNEVEN = 1.5  # times the mean length, from which the longest block row makes rows uneven
_FAR = 2.0  # factor between numbers of rows, above which a record is not asked


@dataclass(frozen=True)
class Cell:
    """A pass of a product with a block-sparse weight ``[N, K]``, and of how many rows.

    Args:
        op: one of :data:`OPS`.
        impl: ``"triton"`` | ``"torch"``.
        M: rows of ``x``.
        N, K: outputs and inputs.
        block: ``(bn, bk)``.
        nnz: number of stored blocks.
        dtype: of ``x`` and the values.
        longest: blocks of the longest block row; ``None`` where it is not known.
        precision: ``"ieee"`` | ``"tf32"``, of fp32 products of the Triton kernels.
        aligned: whether rows of all operands can be read in wide pieces.
        native: whether Triton's kernels are compiled for a CPU.
    """

    op: str
    impl: str
    M: int
    N: int
    K: int
    block: tuple[int, int]
    nnz: int
    dtype: torch.dtype
    longest: int | None = None
    precision: str = "ieee"
    aligned: bool = True
    native: bool = False

    @property
    def block_rows(self) -> int:
        return -(-self.N // self.block[0])

    @property
    def block_cols(self) -> int:
        return -(-self.K // self.block[1])

    @property
    def density(self) -> float:
        """Share of the blocks that is stored."""
        return self.nnz / max(self.block_rows * self.block_cols, 1)

    @property
    def weight(self) -> str:
        """The dense weight's shape in a word."""
        return f"{self.N}x{self.K}"

    @property
    def rows(self) -> int:
        """The bucket of ``M``: the power of two that covers it."""
        return 1 << max(self.M - 1, 0).bit_length()

    def near_rows(self) -> tuple[int, ...]:
        """Buckets of ``M`` whose records may be asked, the cell's own first."""
        m, rows = max(self.M, 1), self.rows
        others = (rows // 2, 2 * rows)
        return (rows, *(r for r in others if r and max(r / m, m / r) <= _FAR))

    def key(self, rows: int | None = None) -> dict[str, object]:
        """What a record is found by, beside the place: sizes and buckets as JSON holds them.

        Args:
            rows: another bucket of ``M``.
        """
        even = self.longest is None or self.longest * self.block_rows <= _UNEVEN * self.nnz
        return {
            "op": self.op,
            "impl": self.impl,
            "dtype": str(self.dtype).removeprefix("torch."),
            "precision": self.precision,
            "block": f"{self.block[0]}x{self.block[1]}",
            "N": self.N,
            "K": self.K,
            "rows": self.rows if rows is None else rows,
            "density": next(name for least, name in _DENSITIES if self.density >= least),
            "balance": "even" if even else "uneven",
            "aligned": self.aligned,
        }
