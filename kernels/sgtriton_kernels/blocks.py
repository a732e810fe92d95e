"""Geometry of gate blocks: which weights one gate covers.

A linear weight is ``[N, K]``; a convolution's is ``[O, I', *taps]`` with ``I' = I / groups``.
Blocks restart at each group and never cross a tap. The gate tensor of a linear weight has the shape
``[ceil(N / bn), ceil(K / bk)]``, that of a convolution
``[groups * ceil((O / groups) / bn), ceil(I' / bk), *taps]``; where a block side is ``None`` (the
whole dimension) a convolution's taps share one gate and their axes have size 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

Block = tuple[int | None, int | None]


@dataclass(frozen=True)
class GateLayout:
    """How the gates of one weight lie over it; made by :func:`gate_layout`.

    Attributes:
        weight_shape: ``(O, I', *taps)``; a linear weight has no taps.
        gate_shape: shape of the gate tensor.
        block: ``(bn, bk)``, cut to the layer's size.
        groups: of the convolution; 1 for a linear weight.
    """

    weight_shape: tuple[int, ...]
    gate_shape: tuple[int, ...]
    block: tuple[int, int]
    groups: int

    @property
    def taps(self) -> int:
        """Kernel positions of the convolution; 1 for a linear weight."""
        return math.prod(self.weight_shape[2:])

    @property
    def gate_taps(self) -> int:
        """Kernel positions that have a gate of their own."""
        return math.prod(self.gate_shape[2:])

    @property
    def per_weight(self) -> bool:
        """Whether each weight has its own gate."""
        return self.gate_shape == self.weight_shape


def gate_layout(weight_shape: tuple[int, ...], block: Block, groups: int = 1) -> GateLayout:
    """Lay gates of ``block`` over a weight.

    Args:
        weight_shape: ``(N, K)``, or ``(O, I / groups, *taps)`` of a convolution.
        block: ``(bn, bk)``, sides >= 1 or ``None`` for the whole dimension; larger sides are cut
            to the layer's size.
        groups: of the convolution.

    Raises:
        ValueError: a block side below 1 or not an integer, fewer than two weight dimensions, or
            output channels that ``groups`` does not divide.
    """
    check_block(block)
    weight_shape = tuple(weight_shape)
    if len(weight_shape) < 2:
        raise ValueError(f"a gated weight has at least 2 dimensions, got shape {weight_shape}")
    out, inner, *taps = weight_shape
    if groups < 1 or out % groups:
        raise ValueError(f"groups must divide the {out} output channels, got {groups}")
    per_group = out // groups
    bn = max(1, min(block[0] or per_group, per_group))
    bk = max(1, min(block[1] or inner, inner))
    gate_taps = [1] * len(taps) if None in block else taps
    gate_shape = (groups * math.ceil(per_group / bn), math.ceil(inner / bk), *gate_taps)
    return GateLayout(weight_shape, gate_shape, (bn, bk), groups)


def check_block(block: Block) -> None:
    """Raise ``ValueError`` unless ``block`` is a pair of sides, each ``None`` or an int >= 1."""
    if not isinstance(block, (tuple, list)) or len(block) != 2:
        raise ValueError(f"block must be a pair (bn, bk), got {block!r}")
    for side in block:
        if side is not None and (isinstance(side, bool) or not isinstance(side, int) or side < 1):
            raise ValueError(f"block sides must be integers >= 1 or None (whole), got {block!r}")


def fits_kernels(sides: Iterable[int]) -> bool:
    """Whether the Triton kernels take blocks of these sides: powers of two >= 16."""
    return all(side >= 16 and side & (side - 1) == 0 for side in sides)


def expand_gates(gate: torch.Tensor, layout: GateLayout) -> torch.Tensor:
    """Spread per-gate values over the weights that each gate covers.

    Args:
        gate: ``layout.gate_shape``, any dtype.

    Returns:
        ``layout.weight_shape``, dtype of ``gate``; ``gate`` itself where each weight has its own.
    """
    if layout.per_weight:
        return gate
    out, inner, *taps = layout.weight_shape
    bn, bk = layout.block
    rows_per_group = gate.shape[0] // layout.groups
    # [groups, block rows, block columns, gate taps]
    full = gate.reshape(layout.groups, rows_per_group, gate.shape[1], layout.gate_taps)
    full = full.repeat_interleave(bn, 1)[:, : out // layout.groups]
    full = full.repeat_interleave(bk, 2)[:, :, :inner]
    return full.expand(-1, -1, -1, layout.taps).reshape(out, inner, *taps)


def sum_blocks(values: torch.Tensor, layout: GateLayout) -> torch.Tensor:
    """Sum per-weight values over the weights that each gate covers.

    Args:
        values: ``layout.weight_shape``.

    Returns:
        ``layout.gate_shape``, dtype of ``values``.
    """
    if layout.per_weight:
        return values
    out, inner = layout.weight_shape[:2]
    bn, bk = layout.block
    groups, per_group = layout.groups, out // layout.groups
    block_rows, block_cols = layout.gate_shape[0] // groups, layout.gate_shape[1]
    full = values.reshape(groups, per_group, inner, layout.taps)
    pad = (0, 0, 0, block_cols * bk - inner, 0, block_rows * bn - per_group)
    if any(pad):
        full = torch.nn.functional.pad(full, pad)
    full = full.reshape(groups, block_rows, bn, block_cols, bk, layout.taps)
    dims = (2, 4) if layout.gate_taps == layout.taps else (2, 4, 5)
    return full.sum(dims).reshape(layout.gate_shape)


def coverage(layout: GateLayout, device: torch.device | str | None = None) -> torch.Tensor:
    """Number of weights that each gate covers; a ragged block counts what it covers.

    Returns:
        ``layout.gate_shape`` fp32.
    """
    out, inner = layout.weight_shape[:2]
    bn, bk = layout.block
    groups, per_group = layout.groups, out // layout.groups
    rows = torch.arange(layout.gate_shape[0] // groups, device=device)
    rows = (per_group - rows * bn).clamp(max=bn).repeat(groups)
    cols = (inner - torch.arange(layout.gate_shape[1], device=device) * bk).clamp(max=bk)
    covered = (rows[:, None] * cols).float()
    if layout.gate_taps != layout.taps:
        covered *= layout.taps
    covered = covered.reshape(*covered.shape, *[1] * (len(layout.gate_shape) - 2))
    return covered.expand(layout.gate_shape).contiguous()


def weight_to_matrix(weight: torch.Tensor, layout: GateLayout) -> torch.Tensor:
    """Lay a weight out as the matrix whose blocks are stored.

    Args:
        weight: ``layout.weight_shape``.

    Returns:
        A linear weight as it is, ``[N, K]``. A convolution's as ``[block rows * bn, taps * block
        columns * bk]``: tap-major columns, padded with zeros per tap and per group, so that blocks
        cross neither; a block's input channels lie side by side in channels-last memory.
    """
    if len(layout.weight_shape) == 2:
        return weight
    rows, cols, pad = _padding(layout)
    out, inner = layout.weight_shape[:2]
    full = weight.reshape(layout.groups, out // layout.groups, inner, layout.taps)
    full = torch.nn.functional.pad(full, (0, 0, *pad))  # the last pair pads taps: none
    return full.transpose(2, 3).reshape(rows, layout.taps * cols)


def matrix_to_weight(matrix: torch.Tensor, layout: GateLayout) -> torch.Tensor:
    """Undo :func:`weight_to_matrix`; the result is contiguous."""
    if len(layout.weight_shape) == 2:
        return matrix
    rows, cols, _ = _padding(layout)
    out, inner = layout.weight_shape[:2]
    full = matrix.reshape(layout.groups, rows // layout.groups, layout.taps, cols)
    full = full[:, : out // layout.groups, :, :inner].transpose(2, 3)
    return full.reshape(layout.weight_shape).contiguous()


def matrix_shape(layout: GateLayout) -> tuple[int, int]:
    """Shape of :func:`weight_to_matrix`'s result."""
    if len(layout.weight_shape) == 2:
        return layout.weight_shape[0], layout.weight_shape[1]
    rows, cols, _ = _padding(layout)
    return rows, layout.taps * cols


def gates_to_pattern(is_open: torch.Tensor, layout: GateLayout) -> torch.Tensor:
    """Which blocks of the matrix are open.

    Args:
        is_open: ``layout.gate_shape`` bool.

    Returns:
        ``[block rows, taps * block columns]`` bool; taps that share a gate share its value.
    """
    block_rows, block_cols = layout.gate_shape[:2]
    by_tap = is_open.reshape(block_rows, block_cols, layout.gate_taps)
    by_tap = by_tap.expand(-1, -1, layout.taps)
    return by_tap.transpose(1, 2).reshape(block_rows, layout.taps * block_cols)


def pattern_to_gates(pattern: torch.Tensor, layout: GateLayout) -> torch.Tensor:
    """Undo :func:`gates_to_pattern`; a gate that several taps share is open if one of them is."""
    block_rows, block_cols = layout.gate_shape[:2]
    by_tap = pattern.reshape(block_rows, layout.taps, block_cols).transpose(1, 2)
    if layout.gate_taps != layout.taps:
        by_tap = by_tap.any(2, keepdim=True)
    return by_tap.reshape(layout.gate_shape)


def _padding(layout: GateLayout) -> tuple[int, int, tuple[int, int, int, int]]:
    """Padded rows in all, padded columns of a tap, and the pad of (columns, rows) of a group."""
    out, inner = layout.weight_shape[:2]
    bn, bk = layout.block
    rows, cols = layout.gate_shape[0] * bn, layout.gate_shape[1] * bk
    return rows, cols, (0, cols - inner, 0, (rows - out) // layout.groups)
