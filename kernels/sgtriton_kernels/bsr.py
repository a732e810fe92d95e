"""Block-sparse matrix: the stored blocks of a weight and where they are.

    W[r*bn:(r+1)*bn, c*bk:(c+1)*bk] = values[i]    for crow[r] <= i < crow[r+1], c = col[i]

A block index is an address to a kernel, so an index that someone hands over is checked when a
matrix is made; only one that this package listed itself is taken as it is. Blocks at a ragged edge
are stored whole; what lies outside the matrix is never used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from .block_products import BlockIndex
from .blocks import GateLayout, gate_layout, sum_blocks

_INDEX_DTYPES = (torch.int32, torch.int64)


@dataclass(frozen=True, eq=False, repr=False)
class BlockSparse:
    """A block-sparse matrix as plain tensors, validated when made.

    The indices are copied, so later writes to the caller's tensors do not reach them; the values
    are not. The transposed index and the row order are rebuilt here, never taken from outside.

    Args:
        values: ``[nnz, bn, bk]`` floating point. Stored blocks, row by row; kept contiguous.
        crow: ``[block_rows + 1]`` int32 | int64. Where each block row starts in ``values``.
        col: ``[nnz + 1]`` int32 | int64. Block column of each block, rising within a row; the last
            entry is 0, so that a kernel may read one ahead.
        shape: ``(N, K)`` of the whole matrix.

    Attributes:
        ccol: ``[block_cols + 1]`` int32. Where each block column starts in ``row`` and ``perm``.
        row: ``[nnz + 1]`` int32. Block row of each block in transposed order; the last entry is 0.
        perm: ``[nnz]`` int32. Transposed order -> index into ``values``.
        row_order: ``[block_rows]`` int32. Block rows, longest first.

    Raises:
        ValueError: a size, dtype, device or index that breaks a rule; names rule and value.
    """

    values: torch.Tensor
    crow: torch.Tensor
    col: torch.Tensor
    shape: tuple[int, int]
    ccol: torch.Tensor = field(init=False)
    row: torch.Tensor = field(init=False)
    perm: torch.Tensor = field(init=False)
    row_order: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        values = self.values
        if values.dim() != 3 or values.layout != torch.strided or not values.is_floating_point():
            raise ValueError(
                "values must be a dense floating-point [nnz, bn, bk] tensor, got "
                f"{values.dtype} {values.layout} {tuple(values.shape)}"
            )
        nnz, *block = values.shape
        shape, block = checked_sizes(self.shape, block)
        for name, index in (("crow", self.crow), ("col", self.col)):
            if index.device != values.device:
                raise ValueError(
                    f"values and {name} must be on one device, got {values.device} and "
                    f"{index.device}"
                )
            _check_index_array(name, index)
        if values.device.type == "meta":
            raise ValueError("crow and col must hold data to be checked, got meta tensors")
        if len(self.col) != nnz + 1:
            raise ValueError(f"col must have nnz + 1 = {nnz + 1} entries, got {len(self.col)}")
        rows, cols = _grid(shape, block)
        # the copy is what is checked and what is used
        crow = self.crow.detach().to("cpu", copy=True)
        col = self.col.detach().to("cpu", copy=True)
        validate_index(crow, col[:nnz], nnz=nnz, block_rows=rows, block_cols=cols)
        if col[nnz] != 0:
            raise ValueError(f"the last entry of col must be 0, got {int(col[nnz])}")

        index = {"crow": crow, "col": col, **_derived(crow, col, cols)}
        index = {name: t.to(values.device, torch.int32) for name, t in index.items()}
        for name, value in {"values": values.contiguous(), "shape": shape, **index}.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_dense(
        cls,
        weight: torch.Tensor,
        block: tuple[int, int],
        open: torch.Tensor | None = None,
    ) -> BlockSparse:
        """Take the open blocks of a dense matrix.

        Waits for the device once, for the number of open blocks: memory for them must be allocated.

        Args:
            weight: ``[N, K]`` floating point.
            block: ``(bn, bk)``, from 1 to the matrix's sizes; need not divide them.
            open: ``[block_rows, block_cols]`` bool. Blocks to store; default: every block that
                holds a value other than 0.

        Returns:
            Matrix with values of its own, detached, zero beyond a ragged edge.

        Raises:
            ValueError: a shape, dtype or block that does not fit.
        """
        plain = weight.layout == torch.strided and weight.is_floating_point()
        if weight.dim() != 2 or not plain:
            raise ValueError(
                "weight must be a dense floating-point [N, K] tensor (weight_to_matrix makes one "
                f"of a convolution's), got {weight.layout} {weight.dtype} {tuple(weight.shape)}"
            )
        shape, block = checked_sizes(weight.shape, block)
        weight, layout = weight.detach(), gate_layout(shape, block)
        if open is None:
            open = nonzero_blocks(weight, layout)
        elif open.shape != layout.gate_shape or open.dtype != torch.bool:
            raise ValueError(
                f"open must be bool of shape {layout.gate_shape}, got {open.dtype} "
                f"{tuple(open.shape)}"
            )
        row, col = open.to(weight.device).nonzero(as_tuple=True)
        return cls._from_list(take_blocks(weight, row, col, block), row, col, shape)

    @classmethod
    def from_parts(
        cls, values: torch.Tensor, crow: torch.Tensor, col: torch.Tensor, shape: Sequence[int]
    ) -> BlockSparse:
        """Make a matrix from what a file holds: ``col`` is ``[nnz]``, without the last 0.

        Raises:
            ValueError: as the constructor.
        """
        _check_index_array("col", col)
        if len(col) != len(values):
            raise ValueError(f"col must have nnz = {len(values)} entries, got {len(col)}")
        return cls(values, crow, F.pad(col, (0, 1)), tuple(shape))  # pyright: ignore

    @classmethod
    def _from_list(
        cls, values: torch.Tensor, row: torch.Tensor, col: torch.Tensor, shape: tuple[int, int]
    ) -> BlockSparse:
        """Wrap blocks that this package listed, as ``nonzero`` does; no wait for a device.

        Args:
            values: ``[nnz, bn, bk]``, contiguous, in the order of the list.
            row, col: ``[nnz]`` int64, row by row. Block row and column of each block.
            shape: ``(N, K)``.

        Raises:
            ValueError: more blocks than an index can count.
        """
        _check_count(len(row))
        rows, _ = _grid(shape, (values.shape[1], values.shape[2]))
        crow = torch.searchsorted(row.contiguous(), torch.arange(rows + 1, device=row.device))
        return cls._from_own_index(values, crow.int(), F.pad(col.int(), (0, 1)), shape)

    @classmethod
    def _from_own_index(
        cls, values: torch.Tensor, crow: torch.Tensor, col: torch.Tensor, shape: tuple[int, int]
    ) -> BlockSparse:
        """Wrap blocks whose index this package made itself: no check, no wait for a device.

        Args:
            values: ``[nnz, bn, bk]``, contiguous.
            crow: ``[block_rows + 1]`` int32.
            col: ``[nnz + 1]`` int32, the last entry 0.
            shape: ``(N, K)``.
        """
        _, cols = _grid(shape, (values.shape[1], values.shape[2]))
        derived = {name: t.int() for name, t in _derived(crow, col, cols).items()}
        return cls._from_validated(values, crow, col, shape, **derived)

    @classmethod
    def _from_validated(
        cls,
        values: torch.Tensor,
        crow: torch.Tensor,
        col: torch.Tensor,
        shape: tuple[int, int],
        ccol: torch.Tensor,
        row: torch.Tensor,
        perm: torch.Tensor,
        row_order: torch.Tensor,
    ) -> BlockSparse:
        """Wrap the tensors of a matrix that was validated before, with no check and no copy."""
        self = object.__new__(cls)
        for name, value in (
            ("values", values), ("crow", crow), ("col", col), ("shape", shape),
            ("ccol", ccol), ("row", row), ("perm", perm), ("row_order", row_order),
        ):  # fmt: skip
            object.__setattr__(self, name, value)
        return self

    @classmethod
    def _from_index(
        cls, values: torch.Tensor, index: Sequence[torch.Tensor], shape: tuple[int, int]
    ) -> BlockSparse:
        """Wrap values and the :attr:`index_tensors` of a matrix that was validated before."""
        crow, col, *derived = index
        return cls._from_validated(values, crow, col, shape, *derived)

    @property
    def block(self) -> tuple[int, int]:
        """``(bn, bk)``, the sides of a block."""
        return self.values.shape[1], self.values.shape[2]

    @property
    def nnz(self) -> int:
        """Number of stored blocks."""
        return self.values.shape[0]

    @property
    def index_tensors(self) -> tuple[torch.Tensor, ...]:
        """``crow, col, ccol, row, perm, row_order``: what ops take in a container's place."""
        return self.crow, self.col, self.ccol, self.row, self.perm, self.row_order

    @property
    def block_rows(self) -> int:
        return self.crow.shape[0] - 1

    @property
    def block_cols(self) -> int:
        return self.ccol.shape[0] - 1

    @property
    def block_row(self) -> torch.Tensor:
        """``[nnz]``, dtype of ``crow``. Block row of each block, in the order of ``values``."""
        return torch.repeat_interleave(self.crow.diff(), output_size=self.nnz)

    @property
    def index(self) -> BlockIndex:
        """Where the blocks lie, as library calls want it; kept with what follows from it."""
        index = self.__dict__.get("_index")
        if index is None:
            grid = (self.block_rows, self.block_cols)
            rows, columns = self.block_row.long(), self.col[: self.nnz].long()
            index = BlockIndex(rows, columns, grid, self.crow.long())
            object.__setattr__(self, "_index", index)
        return index

    @property
    def density(self) -> float:
        """Share of the ``N * K`` weights that stored blocks cover, whatever their values."""
        (n, k), (bn, bk) = self.shape, self.block
        cut_n, cut_k = self.block_rows * bn - n, self.block_cols * bk - k
        crow, ccol = self.crow[-2:].tolist(), self.ccol[-2:].tolist()
        in_last_row, in_last_col = crow[1] - crow[0], ccol[1] - ccol[0]
        corner = int(in_last_row > 0 and int(self.col[self.nnz - 1]) == self.block_cols - 1)
        covered = self.nnz * bn * bk - in_last_row * cut_n * bk - in_last_col * cut_k * bn
        return (covered + corner * cut_n * cut_k) / (n * k)

    @property
    def nbytes(self) -> int:
        """Bytes of what a file holds: values, ``crow`` and ``col``."""
        return self.values.nbytes + self.crow.nbytes + self.nnz * self.col.element_size()

    def to_dense(self) -> torch.Tensor:
        """The whole matrix, ``[N, K]`` in the dtype of ``values``; differentiable in ``values``.

        Zeros are written, then the blocks over them: per weight ``1 + 2 density`` values are moved,
        of which a kernel of its own could save ``density``. A ragged matrix is copied once more.
        """
        (n, k), (bn, bk) = self.shape, self.block
        rows, cols = self.block_rows, self.block_cols
        dense = self.values.new_zeros(rows * bn, cols * bk)
        blocks = dense.view(rows, bn, cols, bk).transpose(1, 2)
        blocks.index_put_((self.block_row, self.col[: self.nnz].long()), self.values)
        return dense[:n, :k].contiguous()

    def to(
        self,
        device: torch.device | str | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
    ) -> BlockSparse:
        """The same matrix on another device or with values of another dtype.

        Args:
            device: or the dtype, as tensors take it.

        Raises:
            ValueError: ``dtype`` is not floating point.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype must be floating point, got {dtype}")
        return self._from_validated(
            self.values.to(device=device, dtype=dtype),
            shape=self.shape,
            **{
                name: getattr(self, name).to(device=device)
                for name in ("crow", "col", "ccol", "row", "perm", "row_order")
            },
        )

    def __reduce__(self):
        # copies and pickles pass through the checks again
        return type(self), (self.values, self.crow, self.col, self.shape)

    def __repr__(self) -> str:
        return (
            f"BlockSparse(shape={self.shape}, block={self.block}, nnz={self.nnz}, "
            f"dtype={self.values.dtype}, device={str(self.values.device)!r})"
        )


def validate_index(
    crow: torch.Tensor, col: torch.Tensor, *, nnz: int, block_rows: int, block_cols: int
) -> None:
    """Check a block index; nothing is sliced by a number that was not checked before.

    Args:
        crow: ``[block_rows + 1]`` int32 | int64.
        col: ``[nnz]`` int32 | int64, without the container's last 0.
        nnz: number of blocks.
        block_rows: number of block rows.
        block_cols: number of block columns.

    Raises:
        ValueError: the first rule that is broken, with the value that breaks it.
    """
    _check_index_array("crow", crow)
    _check_index_array("col", col)
    _check_count(nnz)
    if len(crow) != block_rows + 1:
        raise ValueError(
            f"crow must have block rows + 1 = {block_rows + 1} entries, got {len(crow)}"
        )
    crow, col = crow.detach().to("cpu", torch.int64), col.detach().to("cpu", torch.int64)
    if crow[0] != 0:
        raise ValueError(f"crow must start with 0, got {int(crow[0])}")
    if crow[-1] != nnz:
        raise ValueError(f"crow must end with the number of blocks, {nnz}, got {int(crow[-1])}")
    steps = crow.diff()
    if (wrong := _first((steps < 0) | (steps > block_cols))) is not None:
        raise ValueError(
            f"crow must rise by 0 to {block_cols} (the block columns) from row to row, got "
            f"{int(crow[wrong])} then {int(crow[wrong + 1])} at block row {wrong}"
        )
    if len(col) != nnz:
        raise ValueError(f"col must have one entry per block, {nnz}, got {len(col)}")
    if (wrong := _first((col < 0) | (col >= block_cols))) is not None:
        raise ValueError(
            f"col must lie in [0, {block_cols}), got {int(col[wrong])} at block {wrong}"
        )
    starts = torch.zeros(nnz + 1, dtype=torch.bool)
    starts[crow] = True
    if (wrong := _first((col.diff() <= 0) & ~starts[1:nnz])) is not None:
        raise ValueError(
            f"col must rise strictly within a block row, got {int(col[wrong])} then "
            f"{int(col[wrong + 1])} at blocks {wrong} and {wrong + 1}"
        )


def checked_sizes(
    shape: Sequence[int], block: Sequence[int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """``(N, K)`` and ``(bn, bk)``; ``ValueError`` unless they are ints that fit each other."""
    for name, sizes in (("shape", shape), ("block", block)):
        if (
            not isinstance(sizes, Sequence)
            or len(sizes) != 2
            or any(not isinstance(s, int) or isinstance(s, bool) for s in sizes)
        ):
            raise ValueError(f"{name} must be two ints, got {sizes!r}")
    (n, k), (bn, bk) = shape, block
    if n < 1 or k < 1:
        raise ValueError(f"shape must be at least (1, 1), got {(n, k)}")
    if not (1 <= bn <= n and 1 <= bk <= k):
        raise ValueError(f"block sides must lie in 1 to {n} and 1 to {k}, got {(bn, bk)}")
    return (n, k), (bn, bk)


def nonzero_blocks(weight: torch.Tensor, layout: GateLayout) -> torch.Tensor:
    """Which blocks of a weight hold a value other than 0, NaN too: ``layout.gate_shape`` bool."""
    return sum_blocks((weight != 0).float(), layout) > 0


def take_blocks(
    weight: torch.Tensor, row: torch.Tensor, col: torch.Tensor, block: tuple[int, int]
) -> torch.Tensor:
    """Copy blocks of a dense matrix, in library calls.

    Args:
        weight: ``[N, K]``.
        row, col: ``[nnz]`` int64. Which blocks.
        block: ``(bn, bk)``.

    Returns:
        ``[nnz, bn, bk]``, contiguous, zero beyond a ragged edge.
    """
    bn, bk = block
    pad = (0, -weight.shape[1] % bk, 0, -weight.shape[0] % bn)
    weight = F.pad(weight, pad) if any(pad) else weight
    n, k = weight.shape
    if not weight.is_contiguous():
        blocks = weight.view(n // bn, bn, k // bk, bk).transpose(1, 2)
        return blocks[row, col].contiguous()
    # rows of blocks are whole pieces of memory: 2 to 4 times faster on a CPU (measured)
    step = k // bk
    first = row * (bn * step) + col
    pieces = first[:, None] + torch.arange(0, bn * step, step, device=weight.device)
    return weight.view(-1, bk).index_select(0, pieces.view(-1)).view(-1, bn, bk)


def _derived(crow: torch.Tensor, col: torch.Tensor, block_cols: int) -> dict[str, torch.Tensor]:
    """The transposed index and the row order, in library calls that wait for no device.

    Args:
        crow: ``[block_rows + 1]`` int32 | int64.
        col: ``[nnz + 1]`` int32 | int64, with the container's last 0.
        block_cols: number of block columns.
    """
    nnz, lengths = len(col) - 1, crow.diff()
    by_col, perm = torch.sort(col[:nnz], stable=True)
    rows = torch.arange(len(lengths), device=crow.device)
    row = torch.repeat_interleave(rows, lengths, output_size=nnz)[perm]
    starts = torch.arange(block_cols + 1, dtype=col.dtype, device=col.device)
    return {
        "ccol": torch.searchsorted(by_col, starts),
        "row": F.pad(row, (0, 1)),
        "perm": perm,
        "row_order": torch.argsort(lengths, descending=True, stable=True),
    }


def _first(wrong: torch.Tensor) -> int | None:
    """Index of the first true element."""
    return int(wrong.int().argmax()) if wrong.any() else None


def _check_count(nnz: int) -> None:
    if not 0 <= nnz < 2**31 - 1:
        raise ValueError(f"the number of blocks must be below 2**31 - 1, got {nnz}")


def _check_index_array(name: str, index: torch.Tensor) -> None:
    if index.dim() != 1 or index.layout != torch.strided or index.dtype not in _INDEX_DTYPES:
        raise ValueError(
            f"{name} must be a 1-d int32 or int64 tensor, got "
            f"{index.dtype} {index.layout} {tuple(index.shape)}"
        )


def _grid(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """Block rows and block columns."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])
