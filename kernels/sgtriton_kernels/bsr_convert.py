"""Gated weight to block-sparse matrix, on the device: only open blocks are read.

    values[i] = W[block of the gate] * z        i: how many gates are open before it, row by row

with ``z`` as eval reads the gate (:mod:`.kinds`): 1, or for ``hard_concrete`` a number in (0, 1].

The gates of a block row are cut into pieces. A first kernel counts the open ones of each piece, and
the prefix sum of the counts says where the blocks of a piece go. A second kernel looks at the gates
again: a prefix sum inside the piece gives each open gate its place, where its column and its
weights are written.

Bytes moved per weight of ``w`` bytes, a share ``d`` open, ``b`` weights a gate: ``2 d w + 8 / b``,
and some ten integers a block for the index. Multiplying first and storing then moves ``2 w`` more.
A convolution's weight and gates are first laid out as the matrix that is stored, one copy of each.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from ._bf16 import round_to_bf16, soft_bf16
from ._impl import resolve_impl
from ._triton import device_of, is_native, tl, triton
from .blocks import Block, GateLayout, gate_layout, gates_to_pattern, weight_to_matrix
from .bsr import BlockSparse, take_blocks
from .gate import check_gates
from .kinds import check_gate_kind, eval_gates, hard_concrete, is_open, open_gates


@dataclass(frozen=True)
class ConvertTile:
    """What one program of the Triton kernels covers: blocks side by side, or a part of one.

    Args:
        GATES: gates of a piece, a power of two.
        BLOCK_R: rows of each block at a time, a power of two.
        BLOCK_C: columns of each block at a time, a power of two.
        num_warps: warps per program.
    """

    GATES: int
    BLOCK_R: int
    BLOCK_C: int
    num_warps: int


def gated_to_bsr(
    w: torch.Tensor,
    gate: torch.Tensor,
    block: Block,
    *,
    groups: int = 1,
    kind: str = "threshold",
    impl: str | None = None,
    tile: ConvertTile | None = None,
) -> BlockSparse:
    """Store the open blocks of a gated weight, as eval reads the gates.

    Waits for the device once, for the number of open blocks: memory for them must be allocated.

    Args:
        w: ``[N, K]`` or ``[O, I / groups, *taps]`` fp32 | fp16 | bf16 (fp64 in the ``torch``
            implementation), any strides. Weight; what closed blocks hold does not matter.
        gate: fp32, shape as :func:`.gate_layout` gives it for ``block``, any strides. Gates; NaN is
            closed.
        block: ``(bn, bk)`` weights that one gate covers; ``None`` is the whole dimension.
        groups: of the convolution that the weight belongs to.
        kind: ``"threshold"`` | ``"bernoulli"`` | ``"hard_concrete"``.
        impl: ``"triton"`` | ``"torch"``; chosen by the device if ``None``.
        tile: what one program of the Triton kernels covers; default: by block and device.

    Returns:
        Matrix with values of its own in the dtype of ``w``, detached, zero beyond a ragged edge;
        of a convolution as :func:`.weight_to_matrix` lays it out.

    Raises:
        ValueError: shapes, dtypes, devices, block, groups or kind that do not fit.
    """
    return convert_gated(w, gate, gate_layout(tuple(w.shape), block, groups), kind, impl, tile)


def convert_gated(
    w: torch.Tensor,
    gate: torch.Tensor,
    layout: GateLayout,
    kind: str = "threshold",
    impl: str | None = None,
    tile: ConvertTile | None = None,
) -> BlockSparse:
    """Do what :func:`gated_to_bsr` does, for gates that lie over the weight as ``layout`` says."""
    assert tuple(w.shape) == layout.weight_shape
    if not w.numel():
        raise ValueError(f"w must hold at least one weight, got {tuple(w.shape)}")
    if w.device.type == "meta":
        raise ValueError("w and gate must hold data, got meta tensors")
    check_gate_kind(kind)
    # eval draws nothing: no kind needs a seed
    check_gates(w, gate, layout, "threshold", None, w.dtype)
    blocks = gate.numel() // layout.gate_taps * layout.taps
    if blocks >= 2**31 - 1:
        raise ValueError(f"the number of blocks must be below 2**31 - 1, got {blocks}")
    unsupported = "fp64 is for the torch implementation" if w.dtype == torch.float64 else None
    impl = resolve_impl(impl, w.device, "gated_to_bsr", unsupported)
    w, gate = w.detach(), gate.detach()
    if impl == "torch":
        return _gated_to_bsr_torch(w, gate, layout, kind)
    return _gated_to_bsr(w, gate, layout, kind, tile or tile_for_gated_to_bsr(layout, w.device))


def gated_to_bsr_ref(
    w: torch.Tensor, gate: torch.Tensor, block: Block, kind: str = "threshold", groups: int = 1
) -> BlockSparse:
    """What :func:`gated_to_bsr` computes, gate by gate."""
    layout = gate_layout(tuple(w.shape), block, groups)
    is_open, z = open_gates(gate, kind), eval_gates(gate.detach(), kind)
    is_open, z = (gates_to_pattern(t, layout) for t in (is_open, z))
    w, (bn, bk) = weight_to_matrix(w.detach(), layout), layout.block
    values, col, crow = [], [], [0]
    for r, row in enumerate(is_open.tolist()):
        for c, opened in enumerate(row):
            if opened:
                part = w[r * bn : (r + 1) * bn, c * bk : (c + 1) * bk]
                values.append(w.new_zeros(bn, bk))
                values[-1][: part.shape[0], : part.shape[1]] = part.double() * z[r, c].double()
                col.append(c)
        crow.append(len(col))
    stored = torch.stack(values) if values else w.new_zeros(0, bn, bk)
    crow, col = (torch.tensor(i, dtype=torch.int32, device=w.device) for i in (crow, col))
    return BlockSparse.from_parts(stored, crow, col, w.shape)


@triton.jit(do_not_specialize=["C", "PIECES", "total"])
def _count_open_kernel(
    gate_ptr,  # [R, C] in
    counts_ptr,  # [R, PIECES] out
    C, PIECES, total,
    HARD_CONCRETE: tl.constexpr,
    GATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = piece < total
    offs_c = (piece % PIECES * GATES)[:, None] + tl.arange(0, GATES)[None, :]
    opened, _ = _open_gates(
        gate_ptr + (piece // PIECES * C)[:, None] + offs_c,
        mask[:, None] & (offs_c < C), HARD_CONCRETE,
    )  # fmt: skip
    counts = tl.sum(tl.where(opened, 1, 0), 1)
    tl.store(counts_ptr + piece, counts, mask=mask)


@triton.jit(do_not_specialize=["N", "K", "C", "PIECES", "BN", "BK", "stride_wn", "stride_wk"])
def _copy_open_kernel(
    w_ptr, gate_ptr, starts_ptr,  # [N, K], [R, C], [R * PIECES + 1] in
    values_ptr, col_ptr,  # [nnz, BN, BK], [nnz + 1] out
    N, K, C, PIECES, BN, BK,
    stride_wn, stride_wk,
    UNIT_STEP: tl.constexpr, ALIGNED: tl.constexpr,
    HARD_CONCRETE: tl.constexpr, SOFT_BF16: tl.constexpr,
    GATES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # One program covers BLOCK_R rows and BLOCK_C columns of each block of a piece. Rows and columns
    # are one dimension of the tile, the gates the other: a gate's mask and place are the same for
    # all of its weights, which keeps accesses wide. x // 16 * 16 shows the compiler the multiple.
    if UNIT_STEP:
        stride_wk = 1
    if ALIGNED:
        K = K // 16 * 16
        BK = BK // 16 * 16
        stride_wn = stride_wn // 16 * 16
    if SOFT_BF16:  # the CPU compiler has no code for single bf16 values: their bits
        w_ptr = w_ptr.to(tl.pointer_type(tl.int16), bitcast=True)
        values_ptr = values_ptr.to(tl.pointer_type(tl.int16), bitcast=True)
    parts_c = tl.cdiv(BK, BLOCK_C)
    parts = tl.cdiv(BN, BLOCK_R) * parts_c
    pid = tl.program_id(0).to(tl.int64)
    piece = pid // parts
    part = pid % parts
    r = (piece // PIECES).to(tl.int64)
    gates = (piece % PIECES).to(tl.int64) * GATES + tl.arange(0, GATES)
    opened, z = _open_gates(gate_ptr + r * C + gates, gates < C, HARD_CONCRETE)
    place = tl.load(starts_ptr + piece) + tl.cumsum(tl.where(opened, 1, 0), 0) - 1
    place = place.to(tl.int64)
    tl.store(col_ptr + place, gates.to(tl.int32), mask=opened & (part == 0))

    lanes = tl.arange(0, BLOCK_R * BLOCK_C)
    offs_r = (part // parts_c).to(tl.int64) * BLOCK_R + lanes // BLOCK_C
    offs_c = (part % parts_c).to(tl.int64) * BLOCK_C + lanes % BLOCK_C
    n = (r * BN + offs_r)[None, :]
    k = (gates * BK)[:, None] + offs_c[None, :]
    mask = opened[:, None] & ((offs_r < BN) & (offs_c < BK))[None, :]
    inside = mask & (n < N) & (k < K)
    values = tl.load(w_ptr + n * stride_wn + k * stride_wk, mask=inside, other=0.0)
    if HARD_CONCRETE:
        if SOFT_BF16:
            values = (values.to(tl.int32) << 16).to(tl.float32, bitcast=True)
        values = values.to(tl.float32) * z[:, None]
        if SOFT_BF16:
            values = round_to_bf16(values).to(tl.int16, bitcast=True)
    offs = (place * BN * BK)[:, None] + (offs_r * BK + offs_c)[None, :]
    tl.store(values_ptr + offs, values, mask=mask)


@triton.jit
def _open_gates(gate_ptrs, mask, HARD_CONCRETE: tl.constexpr):
    # which gates of a tile are open, and what they multiply weights with
    gate = tl.load(gate_ptrs, mask=mask, other=0.0)
    if HARD_CONCRETE:
        z, _ = hard_concrete(gate, gate, gate_ptrs, False)
        return mask & (z > 0), z
    else:
        return mask & is_open(gate, gate, gate_ptrs, False), gate


def _gated_to_bsr(
    w: torch.Tensor, gate: torch.Tensor, layout: GateLayout, kind: str, tile: ConvertTile
) -> BlockSparse:
    """Launch both kernels; between them the wait for the number of blocks."""
    w, gate = weight_to_matrix(w, layout), gates_to_pattern(gate, layout).contiguous()
    counts = _count_open(gate, kind, tile)
    starts = F.pad(counts.view(-1).cumsum(0, dtype=torch.int32), (1, 0))
    crow = starts[:: counts.shape[1]].contiguous()
    values, col = _copy_open(w, gate, starts, int(starts[-1]), layout, kind, tile)
    return BlockSparse._from_own_index(values, crow, col, (w.shape[0], w.shape[1]))


def _count_open(gate: torch.Tensor, kind: str, tile: ConvertTile) -> torch.Tensor:
    """``[R, pieces]`` int32. Open gates of each piece of a block row."""
    rows, cols = gate.shape
    pieces = triton.cdiv(cols, tile.GATES)
    counts = torch.empty(rows, pieces, dtype=torch.int32, device=gate.device)
    together = max((64 if is_native(gate.device) else 512) // tile.GATES, 1)
    with device_of(gate):
        _count_open_kernel[(triton.cdiv(counts.numel(), together),)](
            gate,
            counts,
            cols, pieces, counts.numel(),
            HARD_CONCRETE=kind == "hard_concrete",
            GATES=tile.GATES, BLOCK=together,
        )  # fmt: skip
    return counts


def _copy_open(
    w: torch.Tensor,
    gate: torch.Tensor,
    starts: torch.Tensor,
    nnz: int,
    layout: GateLayout,
    kind: str,
    tile: ConvertTile,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[nnz, bn, bk]`` values and ``[nnz + 1]`` int32 columns, the last of them 0."""
    (n, k), (bn, bk), (rows, cols) = w.shape, layout.block, gate.shape
    values = torch.empty(nnz, bn, bk, dtype=w.dtype, device=w.device)
    col = torch.zeros(nnz + 1, dtype=torch.int32, device=w.device)
    if not nnz:
        return values, col
    pieces = triton.cdiv(cols, tile.GATES)
    parts = triton.cdiv(bn, tile.BLOCK_R) * triton.cdiv(bk, tile.BLOCK_C)
    with device_of(w):
        _copy_open_kernel[(rows * pieces * parts,)](
            w, gate, starts,
            values, col,
            n, k, cols, pieces, bn, bk,
            *w.stride(),
            UNIT_STEP=w.stride(1) == 1,
            ALIGNED=k % 16 == bk % 16 == w.stride(0) % 16 == 0,
            HARD_CONCRETE=kind == "hard_concrete",
            SOFT_BF16=soft_bf16(w.dtype, w.device),
            **asdict(tile),
        )  # fmt: skip
    return values, col


def tile_for_gated_to_bsr(layout: GateLayout, device: torch.device) -> ConvertTile:
    """A tile that every card can run; reasoned, not measured.

    A card: 16 weights a thread, of one block or of small ones side by side. The CPU's compiler
    unrolls the tile.
    """
    size = 64 if is_native(device) else 2048
    (bn, bk), gates = layout.block, layout.gate_shape[1] * layout.taps
    cols = min(triton.next_power_of_2(bk), size)
    rows = min(triton.next_power_of_2(bn), size // cols)
    gates = min(triton.next_power_of_2(gates), size // (rows * cols))
    warps = 1 if is_native(device) else max(gates * rows * cols // 512, 1)
    return ConvertTile(gates, rows, cols, warps)


def _gated_to_bsr_torch(
    w: torch.Tensor, gate: torch.Tensor, layout: GateLayout, kind: str
) -> BlockSparse:
    row, col = gates_to_pattern(open_gates(gate, kind), layout).nonzero(as_tuple=True)
    w = weight_to_matrix(w, layout)
    values = take_blocks(w, row, col, layout.block)
    if kind == "hard_concrete":
        # as `gate_weight` reads them: sigmoid rounds otherwise where gates lie otherwise
        z = gates_to_pattern(eval_gates(gate.contiguous(), kind), layout)
        values = (values * z[row, col][:, None, None]).to(w.dtype)  # fp32 or wider, rounded once
    return BlockSparse._from_list(values, row, col, (w.shape[0], w.shape[1]))
