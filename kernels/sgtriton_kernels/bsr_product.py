"""Products with a block-sparse weight: launchers and their kernels.

    y = act(x W^T + bias + residual)        dx = dy W        D = dy^T x at the stored blocks

Sums run in fp32, what is added and the activation are applied to them, and the result is rounded
once. Beyond a ragged edge a stored block may hold anything: it never reaches a result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ._bf16 import rounded, soft_bf16
from ._operands import is_aligned, row_strides
from ._triton import device_of, dot_precision, is_native, launch_options, tl, triton
from .activations import activate
from .tiles import BsrTile


def bsr_linear_fwd(
    x2: torch.Tensor,
    values: torch.Tensor,
    crow: torch.Tensor,
    col: torch.Tensor,
    row_order: torch.Tensor,
    bias: torch.Tensor | None,
    residual2: torch.Tensor | None,
    n: int,
    activation: str,
    tile: BsrTile,
) -> torch.Tensor:
    """Compute ``y = act(x W^T + bias + residual)``.

    Args:
        x2: ``[M, K]`` fp32 | fp16 | bf16, any strides.
        values: ``[nnz, bn, bk]``, dtype of ``x2``, contiguous; sides are powers of two >= 16.
        crow, col: ``[block_rows + 1]``, ``[nnz + 1]`` int32, of :class:`.BlockSparse`.
        row_order: ``[block_rows]`` int32. Block rows, in the order in which they start.
        bias: ``[N]``, dtype of ``x2``, or ``None``.
        residual2: ``[M, N]``, dtype of ``x2``, any strides, or ``None``. Added before the
            activation.
        n: ``N``.
        activation: ``"none"`` | ``"relu"`` | ``"gelu"`` | ``"gelu_tanh"`` | ``"silu"``.
        tile: what one program computes.

    Returns:
        ``[M, N]``, dtype of ``x2``, contiguous.
    """
    assert tile.form != "pairs", tile
    if tile.form == "vector":
        return _vector(x2, values, crow, col, row_order, bias, residual2, n, activation, tile)
    return _product(
        x2, values, crow, col, None, row_order, bias, residual2, n, activation, tile
    )  # fmt: skip


@dataclass(frozen=True)
class PairedRows:
    """Neighbouring block rows two by two, with the block columns that one of them has at least.

    Args:
        starts: ``[pairs + 1]`` int32. Where each pair starts in ``col``.
        col: ``[steps + 1]`` int32. Block columns, rising within a pair; the last entry is 0.
        which: ``[steps + 1, 2]`` int32. The blocks of both rows there; -1 for none.
        order: ``[pairs]`` int32. Pairs, longest first.
    """

    starts: torch.Tensor
    col: torch.Tensor
    which: torch.Tensor
    order: torch.Tensor

    @property
    def steps(self) -> int:
        """Number of columns of ``x`` that are read: half the blocks at best, all at worst."""
        return len(self.col) - 1


def pair_rows(crow: torch.Tensor, col: torch.Tensor) -> PairedRows:
    """Pair the block rows of an index ``crow [block_rows + 1]``, ``col [nnz + 1]``."""
    pad = torch.nn.functional.pad
    block_rows, nnz, device = len(crow) - 1, len(col) - 1, col.device
    pairs, cols = -(-block_rows // 2), int(col.max()) + 1
    row = torch.repeat_interleave(crow.diff(), output_size=nnz)
    steps, step = torch.unique(row.long() // 2 * cols + col[:nnz], return_inverse=True)
    which = col.new_full((len(steps) + 1, 2), -1)
    which[step, row % 2] = torch.arange(nnz, dtype=col.dtype, device=device)
    lengths = torch.bincount(steps // cols, minlength=pairs)
    return PairedRows(
        pad(lengths.cumsum(0), (1, 0)).to(col.dtype),
        pad(steps % cols, (0, 1)).to(col.dtype),
        which,
        lengths.argsort(descending=True, stable=True).to(col.dtype),
    )


def bsr_linear_fwd_pairs(
    x2: torch.Tensor,
    values: torch.Tensor,
    pairs: PairedRows,
    bias: torch.Tensor | None,
    residual2: torch.Tensor | None,
    n: int,
    activation: str,
    tile: BsrTile,
) -> torch.Tensor:
    """Compute what :func:`bsr_linear_fwd` does, two block rows in one program.

    A tile of ``x`` is read once for both, and a block that one of them lacks is not read but
    multiplied as zeros. It pays where rows share most of their columns: with a share ``d`` of the
    blocks in random places ``1 - d / 2`` of the columns are left to read, and ``2 - d`` times the
    products.

    Args:
        pairs: from :func:`pair_rows`.
        tile: of the form ``"pairs"``; its ``BLOCK_N`` is twice the block's side.
        x2, values, bias, residual2, n, activation: as for :func:`bsr_linear_fwd`.
    """
    return _product(
        x2, values, pairs.starts, pairs.col, pairs.which, pairs.order, bias, residual2, n,
        activation, tile,
    )  # fmt: skip


def bsr_linear_dx(
    dy2: torch.Tensor,
    values: torch.Tensor,
    ccol: torch.Tensor,
    row: torch.Tensor,
    perm: torch.Tensor,
    k: int,
    tile: BsrTile,
) -> torch.Tensor:
    """Compute ``dx = dy W`` through the transposed index: the values stay where they are.

    Args:
        dy2: ``[M, N]`` fp32 | fp16 | bf16, any strides.
        values: ``[nnz, bn, bk]``, dtype of ``dy2``, contiguous; sides are powers of two >= 16.
        ccol, row, perm: ``[block_cols + 1]``, ``[nnz + 1]``, ``[nnz]`` int32, of
            :class:`.BlockSparse`.
        k: ``K``.
        tile: what one program computes.

    Returns:
        ``[M, K]``, dtype of ``dy2``, contiguous.
    """
    return _product(
        dy2, values, ccol, row, perm, None, None, None, k, "none", tile, transposed=True
    )  # fmt: skip


def bsr_linear_dvalues(
    dy2: torch.Tensor,
    x2: torch.Tensor,
    values: torch.Tensor,
    row: torch.Tensor,
    col: torch.Tensor,
    perm: torch.Tensor,
    tile: BsrTile,
) -> torch.Tensor:
    """Compute ``D = dy^T x`` at the stored blocks.

    Args:
        dy2: ``[M, N]``, dtype of ``x2``, any strides.
        x2: ``[M, K]`` fp32 | fp16 | bf16, any strides.
        values: ``[nnz, bn, bk]``; its shape, dtype and device only. Sides are powers of two >= 16.
        row, col, perm: ``[nnz + 1]``, ``[nnz + 1]``, ``[nnz]`` int32, of :class:`.BlockSparse`:
            block ``perm[j]`` lies in block row ``row[j]``, block column ``col[perm[j]]``.
        tile: what one program computes; ``split`` programs share the rows, and their sums are
            added in a fixed order.

    Returns:
        ``[nnz, bn, bk]``, dtype of ``values``, contiguous; 0 beyond a ragged edge.
    """
    (m, n), k, (nnz, bn, bk) = dy2.shape, x2.shape[1], values.shape
    out = values.new_empty(values.shape)
    if nnz == 0:
        return out
    block_n, block_k, split = min(tile.BLOCK_N, bn), min(tile.BLOCK_K, bk), tile.split
    sums = out
    if split > 1:
        sums = torch.empty((split, *out.shape), dtype=torch.float32, device=x2.device)
    grid = (nnz * (bn // block_n) * (bk // block_k) * split,)
    with device_of(x2):
        _bsr_dvalues_kernel[grid](
            dy2, x2,
            row, col, perm,
            sums,
            nnz, m, n, k,
            *row_strides(dy2),
            *row_strides(x2),
            ALIGNED_DY=is_aligned(dy2), ALIGNED_X=is_aligned(x2),
            RAGGED=n % bn > 0 or k % bk > 0,
            SOFT_BF16=soft_bf16(x2.dtype, x2.device),
            PRECISION=dot_precision(),
            BN=bn, BK=bk, SPLIT=split,
            BLOCK_M=tile.BLOCK_M, BLOCK_N=block_n, BLOCK_K=block_k,
            **launch_options(x2.device, tile.num_stages, tile.num_warps),
        )  # fmt: skip
    if split > 1:
        _add_up(sums.view(split, 1, -1), None, None, "none", out.view(1, -1))
    return out


def _product(
    x2: torch.Tensor,
    values: torch.Tensor,
    starts: torch.Tensor,
    index: torch.Tensor,
    perm: torch.Tensor | None,
    order: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual2: torch.Tensor | None,
    size: int,
    activation: str,
    tile: BsrTile,
    transposed: bool = False,
) -> torch.Tensor:
    """Launch the product: ``x2 W^T``, transposed ``x2 W``, of ``size`` columns."""
    (m, red), (_, bn, bk) = x2.shape, values.shape
    out = x2.new_empty(m, size)
    if not out.numel():
        return out
    added = (
        None if bias is None else bias.contiguous(),
        None if residual2 is None else residual2.contiguous(),
    )
    pairs, split = tile.form == "pairs", tile.split
    block_n, block_k = 2 * bn if pairs else min(tile.BLOCK_N, bn), min(tile.BLOCK_K, bk)
    parts = bk // block_k if transposed else 1 if pairs else bn // block_n
    sums = out
    if split > 1:
        sums = torch.empty(split, m, size, dtype=torch.float32, device=x2.device)
    tiles_m = -(-m // tile.BLOCK_M)
    grid = (tiles_m * (len(starts) - 1) * parts * split,)
    even = red % (bn if transposed else bk) == 0
    x, stored, strides = x2, values, row_strides(x2)
    read, whole, threads = "rows" if is_aligned(x2) else "any", False, 1
    if is_native(x2.device):
        # its compiler makes vectors of columns, and a mask costs more than a copy or a variant
        if tile.form == "weight_left" and not transposed:
            x, read = _tiled_columns(x2, tile.BLOCK_M, bk), "columns"
            strides = (x.shape[-2], 1)
        whole = m == tiles_m * tile.BLOCK_M and size % (block_k if transposed else block_n) == 0
        threads = torch.get_num_threads()
    elif (
        tile.bulk and not pairs and even and read == "rows" and len(values)
        and _has_copy_engine(x2) and _has_copy_engine(values)
    ):  # fmt: skip
        read = "bulk"
        x = _descriptor(x2, strides, (tile.BLOCK_M, block_n if transposed else block_k))
        stored = _descriptor(values, values.stride(), (1, block_n, block_k))
    with device_of(x2):
        _bsr_product_kernel[grid](
            x,
            stored,
            starts, index, perm, order,
            *(added if split == 1 else (None, None)),
            sums,
            m, size, red,
            *strides,
            TRANSPOSED=transposed,
            WEIGHT_LEFT=tile.form == "weight_left",
            PAIRS=pairs,
            SPLIT=split,
            HAS_BIAS=bias is not None and split == 1,
            HAS_RESIDUAL=residual2 is not None and split == 1,
            ACTIVATION=activation if split == 1 else "none",
            EVEN_RED=even,
            READ=read,
            ALIGNED_OUT=size % 16 == 0,
            WHOLE_OUT=whole,
            SOFT_BF16=soft_bf16(x2.dtype, x2.device),
            PRECISION=dot_precision(),
            THREADS=threads,
            BN=bn, BK=bk,
            BLOCK_M=tile.BLOCK_M, BLOCK_N=block_n, BLOCK_K=block_k,
            **launch_options(x2.device, tile.num_stages, tile.num_warps),
        )  # fmt: skip
    return out if split == 1 else _add_up(sums, *added, activation, out)


def _vector(
    x2: torch.Tensor,
    values: torch.Tensor,
    crow: torch.Tensor,
    col: torch.Tensor,
    row_order: torch.Tensor,
    bias: torch.Tensor | None,
    residual2: torch.Tensor | None,
    n: int,
    activation: str,
    tile: BsrTile,
) -> torch.Tensor:
    """Launch the product without matrix instructions."""
    (m, k), (_, bn, bk) = x2.shape, values.shape
    out = x2.new_empty(m, n)
    if m == 0:
        return out
    block_n, block_k = min(tile.BLOCK_N, bn), min(tile.BLOCK_K, bk)
    grid = (-(-m // tile.BLOCK_M) * len(row_order) * (bn // block_n),)
    with device_of(x2):
        _bsr_vector_kernel[grid](
            x2.contiguous(),
            values,
            crow, col, row_order,
            None if bias is None else bias.contiguous(),
            None if residual2 is None else residual2.contiguous(),
            out,
            m, n, k,
            HAS_BIAS=bias is not None, HAS_RESIDUAL=residual2 is not None,
            ACTIVATION=activation,
            ALIGNED_X=k % 16 == 0,
            SOFT_BF16=soft_bf16(x2.dtype, x2.device),
            THREADS=torch.get_num_threads() if is_native(x2.device) else 1,
            BN=bn, BK=bk,
            BLOCK_M=tile.BLOCK_M, BLOCK_N=block_n, BLOCK_K=block_k,
            STAGES=tile.num_stages,
            **launch_options(x2.device, tile.num_stages, tile.num_warps),
        )  # fmt: skip
    return out


def _add_up(
    sums: torch.Tensor,
    bias: torch.Tensor | None,
    residual2: torch.Tensor | None,
    activation: str,
    out: torch.Tensor,
) -> torch.Tensor:
    """Fill ``out [M, N]`` from ``sums [split, M, N]``, added in their order."""
    split, m, n = sums.shape
    block_n = 64 if is_native(out.device) else 512  # four elements a thread
    with device_of(out):
        _bsr_add_up_kernel[(m * triton.cdiv(n, block_n),)](
            sums,
            bias,
            residual2,
            out,
            m, n,
            SPLIT=split,
            HAS_BIAS=bias is not None, HAS_RESIDUAL=residual2 is not None,
            ACTIVATION=activation,
            ALIGNED_OUT=n % 16 == 0,
            SOFT_BF16=soft_bf16(out.dtype, out.device),
            BLOCK_N=block_n,
            **launch_options(out.device, 1, 4),
        )  # fmt: skip
    return out


def _has_copy_engine(t: torch.Tensor) -> bool:
    """Whether the copy engine can read ``t``; without it descriptors would lose the pipeline."""
    if t.device.type == "cuda" and (
        torch.version.hip is not None or torch.cuda.get_device_capability(t.device) < (9, 0)
    ):
        return False
    return t.data_ptr() % 16 == 0


def _descriptor(t: torch.Tensor, strides: Sequence[int], tile: Sequence[int]) -> Any:
    """What the copy engine is told of ``t``."""
    make = triton.tools.tensor_descriptor.TensorDescriptor  # pyright: ignore
    return make(t, list(t.shape), list(strides), list(tile))


def _tiled_columns(x2: torch.Tensor, block_m: int, side: int) -> torch.Tensor:
    """``x2 [M, K]`` as ``[tiles, K, BLOCK_M]``, padded with zeros to whole tiles and blocks."""
    (m, k), tiles = x2.shape, -(-len(x2) // block_m)
    rows, cols = tiles * block_m, -(-k // side) * side
    if (m, k) != (rows, cols):
        x2 = F.pad(x2, (0, cols - k, 0, rows - m))
    if tiles == 1:  # PyTorch transposes a matrix in less time
        return x2.T.contiguous()
    return x2.unflatten(0, (tiles, block_m)).transpose(1, 2).contiguous()


@triton.jit
def _dealt(place, places, THREADS: tl.constexpr):
    # Triton's CPU compiler gives each thread one run of neighbouring programs, and the longest
    # block rows start first: as if dealt out, each gets long ones and short ones.
    if THREADS > 1:
        each = places // THREADS
        turn = place % tl.maximum(each, 1)
        thread = place // tl.maximum(each, 1)
        back = THREADS - 1 - thread
        dealt = turn * THREADS + tl.where(turn % 2 == 0, thread, back)
        place = tl.where(place < each * THREADS, dealt, place)
    return place


@triton.jit
def _add_and_activate(
    acc, bias_ptr, residual_ptr, offs_n, mask_n, offs, mask,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    # acc [..., N tile]; offs_n, mask_n broadcast to it, offs and mask have its shape
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        acc += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    return activate(acc, ACTIVATION)


@triton.jit(do_not_specialize=["M", "OUT", "RED", "stride_xm", "stride_xr"])
def _bsr_product_kernel(
    x_ptr,  # [M, RED]; OUT, RED are N, K; where TRANSPOSED K, N
    values_ptr,  # [nnz, BN, BK], contiguous
    starts_ptr,  # [blocks along OUT + 1]; where PAIRS a block is a pair of them
    index_ptr,  # [nnz + 1]: where blocks lie along RED
    perm_ptr,  # where in values they are: [nnz] where TRANSPOSED, [nnz + 1, 2] where PAIRS
    order_ptr,  # [blocks along OUT] where not TRANSPOSED
    bias_ptr,  # [OUT] where HAS_BIAS
    residual_ptr,  # [M, OUT] where HAS_RESIDUAL, contiguous
    out_ptr,  # [M, OUT] out, contiguous; where SPLIT > 1 [SPLIT, M, OUT] fp32
    M, OUT, RED,
    stride_xm, stride_xr,
    TRANSPOSED: tl.constexpr,  # x W instead of x W^T
    WEIGHT_LEFT: tl.constexpr,  # out^T = W x^T instead of out = x W^T
    PAIRS: tl.constexpr,  # two block rows share what is read of x; -1 for a block that one lacks
    SPLIT: tl.constexpr,  # programs that share a list of blocks
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVEN_RED: tl.constexpr,  # RED is a multiple of the block's side
    # How x is stored: "rows": stride_xr is 1; stride_xm and RED are multiples of 16; "columns":
    # tile by tile, each by columns and whole, stride_xm is a column's number of them; "any".
    # "bulk": x and values are descriptors of tiles
    READ: tl.constexpr,
    ALIGNED_OUT: tl.constexpr,  # OUT is a multiple of 16
    WHOLE_OUT: tl.constexpr,  # no tile of out overhangs
    SOFT_BF16: tl.constexpr,  # bf16 by hand, where the compiler does not do it right
    PRECISION: tl.constexpr,
    THREADS: tl.constexpr,  # 1 on cards
    BN: tl.constexpr, BK: tl.constexpr,  # sides of a block
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Sizes and strides are not specialised, so a new batch size compiles nothing. What the
    # compiler must know for wide loads comes back as a flag: x // 16 * 16 shows it the multiple.
    if READ == "rows":
        RED = RED // 16 * 16
        stride_xm = stride_xm // 16 * 16
        stride_xr = 1
    if ALIGNED_OUT:
        OUT = OUT // 16 * 16
    if TRANSPOSED:
        SIDE_OUT: tl.constexpr = BK
        SIDE_RED: tl.constexpr = BN
        BLOCK_OUT: tl.constexpr = BLOCK_K
        BLOCK_RED: tl.constexpr = BLOCK_N
    else:
        SIDE_OUT: tl.constexpr = 2 * BN if PAIRS else BN
        SIDE_RED: tl.constexpr = BK
        BLOCK_OUT: tl.constexpr = BLOCK_N
        BLOCK_RED: tl.constexpr = BLOCK_K
    PARTS: tl.constexpr = SIDE_OUT // BLOCK_OUT
    STEPS: tl.constexpr = SIDE_RED // BLOCK_RED

    # the longest block rows start first; neighbours share a list's values
    pid = tl.program_id(0).to(tl.int64)
    num_m = tl.cdiv(M, BLOCK_M)
    pid_o = pid // num_m // SPLIT
    share = pid // num_m % SPLIT
    if TRANSPOSED:
        block_o = pid_o // PARTS
    else:
        places = tl.num_programs(0) // (num_m * SPLIT * PARTS)
        block_o = tl.load(order_ptr + _dealt(pid_o // PARTS, places, THREADS)).to(tl.int64)
    first_m = (pid % num_m).to(tl.int32) * BLOCK_M
    first_bo = (pid_o % PARTS).to(tl.int32) * BLOCK_OUT  # inside the block
    offs_m = first_m.to(tl.int64) + tl.arange(0, BLOCK_M)
    offs_bo = first_bo + tl.arange(0, BLOCK_OUT)
    mask_m = offs_m < M

    start = tl.load(starts_ptr + block_o)
    end = tl.load(starts_ptr + block_o + 1)
    if SPLIT > 1:
        length = tl.cdiv(end - start, SPLIT)
        start = tl.minimum(start + share.to(tl.int32) * length, end)
        end = tl.minimum(start + length, end)
    if WEIGHT_LEFT:
        acc = tl.zeros((BLOCK_OUT, BLOCK_M), dtype=tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_OUT), dtype=tl.float32)
    # Indices are carried one step ahead: loaded inside their own step they would cost half of the
    # pipeline's depth. The last step reads the entry after its list; index has one to spare.
    index = tl.load(index_ptr + start)
    if TRANSPOSED:
        which = tl.load(perm_ptr + start, mask=start < end, other=0)
    if PAIRS:
        offs_2 = offs_bo // BN
        offs_bo = offs_bo % BN
        which = tl.load(perm_ptr + 2 * start)
        which_2 = tl.load(perm_ptr + 2 * start + 1)
    for i in range(start * STEPS, end * STEPS):
        next_index = tl.load(index_ptr + (i + 1) // STEPS)
        if TRANSPOSED:
            next_which = tl.load(perm_ptr + tl.minimum((i + 1) // STEPS, end - 1))
            block = which  # pyright: ignore
            which = next_which
        elif PAIRS:
            next_which = tl.load(perm_ptr + (i + 1) // STEPS * 2)
            next_which_2 = tl.load(perm_ptr + (i + 1) // STEPS * 2 + 1)
            block = tl.where(offs_2 == 0, which, which_2)[:, None]  # pyright: ignore
            which = next_which
            which_2 = next_which_2
        else:
            block = tl.cast(i // STEPS, tl.int32)
        first_br = tl.cast(i % STEPS, tl.int32) * BLOCK_RED  # inside the block  # pyright: ignore
        if READ == "bulk":
            # such tiles come as they are stored
            x = x_ptr.load([first_m, index * SIDE_RED + first_br])
            if TRANSPOSED:
                values = values_ptr.load([block, first_br, first_bo])
            else:
                values = values_ptr.load([block, first_bo, first_br])
            values = tl.reshape(values, (BLOCK_N, BLOCK_K))
            if WEIGHT_LEFT:
                x = tl.trans(x)
                if TRANSPOSED:
                    values = tl.trans(values)
        else:
            # others as the product takes them, which mma.sync's pipeline wants
            offs_br = first_br + tl.arange(0, BLOCK_RED)
            offs_r = index.to(tl.int64) * SIDE_RED + offs_br
            mask_r = offs_r < RED
            block_ptr = values_ptr + block.to(tl.int64) * (BN * BK)
            if TRANSPOSED:
                stride_r: tl.constexpr = BK
                stride_o: tl.constexpr = 1  # pyright: ignore
            else:
                stride_r: tl.constexpr = 1  # pyright: ignore
                stride_o: tl.constexpr = BK
            if READ == "columns":
                # offsets that the compiler knows
                first_r = index.to(tl.int64) * SIDE_RED + first_br
                x_tile_ptr = x_ptr + first_m.to(tl.int64) * stride_xm + first_r * BLOCK_M
                lanes_r, lanes_m = tl.arange(0, BLOCK_RED), tl.arange(0, BLOCK_M)
                x_ptrs = x_tile_ptr + lanes_r[:, None] * BLOCK_M + lanes_m[None, :]
            elif WEIGHT_LEFT:
                x_ptrs = x_ptr + offs_r[:, None] * stride_xr + offs_m[None, :] * stride_xm
                mask_x = mask_r[:, None] & mask_m[None, :]
            else:
                x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_r[None, :] * stride_xr
                mask_x = mask_m[:, None] & mask_r[None, :]
            if WEIGHT_LEFT or not TRANSPOSED:
                values_ptrs = block_ptr + offs_bo[:, None] * stride_o + offs_br[None, :] * stride_r
                mask_v = mask_r[None, :]
            else:
                values_ptrs = block_ptr + offs_br[:, None] * stride_r + offs_bo[None, :] * stride_o
                mask_v = mask_r[:, None]
            if READ == "columns":
                x = tl.load(x_ptrs)
            else:
                x = tl.load(x_ptrs, mask=mask_x, other=0.0)  # pyright: ignore
            if PAIRS:
                values = tl.load(values_ptrs, mask=mask_v & (block >= 0), other=0.0)
            elif EVEN_RED:
                values = tl.load(values_ptrs)
            else:  # beyond a ragged edge anything may be stored
                values = tl.load(values_ptrs, mask=mask_v, other=0.0)
        index = next_index
        if SOFT_BF16:  # the interpreter multiplies the bit patterns of bf16
            x = x.to(tl.float32)
            values = values.to(tl.float32)
        if WEIGHT_LEFT:
            acc = tl.dot(values, x, acc, input_precision=PRECISION)
        elif not TRANSPOSED:
            acc = tl.dot(x, tl.trans(values), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(x, values, acc, input_precision=PRECISION)

    if WEIGHT_LEFT:
        acc = tl.trans(acc)
    offs_o = (block_o * SIDE_OUT + first_bo + tl.arange(0, BLOCK_OUT))[None, :]
    mask_o = offs_o < OUT
    mask = mask_m[:, None] & mask_o
    offs = offs_m[:, None] * OUT + offs_o
    acc = _add_and_activate(
        acc, bias_ptr, residual_ptr, offs_o, mask_o, offs, mask, HAS_BIAS, HAS_RESIDUAL, ACTIVATION
    )
    if SPLIT > 1:
        out_ptr += share * M * OUT
        out = acc
    else:
        out = rounded(acc, out_ptr.dtype.element_ty, SOFT_BF16)
    if WHOLE_OUT:
        tl.store(out_ptr + offs, out)
    else:
        tl.store(out_ptr + offs, out, mask=mask)


# A kernel of its own: for few rows of x it is all loads of values, and a matrix instruction would
# multiply mostly padding.
@triton.jit(do_not_specialize=["M", "N", "K"])
def _bsr_vector_kernel(
    x_ptr,  # [M, K], contiguous
    values_ptr,  # [nnz, BN, BK], contiguous
    crow_ptr, col_ptr, row_order_ptr,  # [block_rows + 1], [nnz + 1], [block_rows]
    bias_ptr,  # [N] where HAS_BIAS
    residual_ptr,  # [M, N] where HAS_RESIDUAL, contiguous
    out_ptr,  # [M, N] out, contiguous
    M, N, K,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALIGNED_X: tl.constexpr,  # K is a multiple of 16
    SOFT_BF16: tl.constexpr,
    THREADS: tl.constexpr,  # 1 on cards
    BN: tl.constexpr, BK: tl.constexpr,  # sides of a block
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,  # the pipeline's, which without a tl.dot the loop itself must ask for
):  # fmt: skip
    if ALIGNED_X:
        K = K // 16 * 16
    PARTS: tl.constexpr = BN // BLOCK_N
    STEPS: tl.constexpr = BK // BLOCK_K

    pid = tl.program_id(0).to(tl.int64)
    num_m = tl.cdiv(M, BLOCK_M)
    pid_n = pid // num_m
    places = tl.num_programs(0) // (num_m * PARTS)
    row = tl.load(row_order_ptr + _dealt(pid_n // PARTS, places, THREADS)).to(tl.int64)
    first_m = pid % num_m * BLOCK_M
    lanes_m = tl.arange(0, BLOCK_M)
    offs_bn = pid_n % PARTS * BLOCK_N + tl.arange(0, BLOCK_N)  # inside the block

    start = tl.load(crow_ptr + row)
    end = tl.load(crow_ptr + row + 1)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    col = tl.load(col_ptr + start)  # carried one step ahead
    for i in tl.range(start * STEPS, end * STEPS, num_stages=STAGES):  # pyright: ignore
        next_col = tl.load(col_ptr + (i + 1) // STEPS)
        offs_bk = (i % STEPS) * BLOCK_K + tl.arange(0, BLOCK_K)  # inside the block  # pyright: ignore
        offs_k = col.to(tl.int64) * BK + offs_bk
        mask_k = offs_k < K
        # beyond a ragged edge anything may be stored, so it is masked too
        values = tl.load(
            values_ptr + tl.cast(i // STEPS, tl.int64) * (BN * BK)
            + offs_bn[:, None] * BK + offs_bk[None, :],
            mask=mask_k[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        # Row by row: each row's sums lie where the values do, which takes the fewest exchanges
        # between threads.
        for m in tl.static_range(BLOCK_M):  # pyright: ignore
            x_row_ptr = x_ptr + (first_m + m) * K
            x = tl.load(
                x_row_ptr + offs_k[None, :],
                mask=mask_k[None, :] & (first_m + m < M), other=0.0,
            )  # fmt: skip
            sums = tl.sum(values * x.to(tl.float32), 1)
            acc = tl.where((lanes_m == m)[None, :], acc + sums[:, None], acc)
        col = next_col

    acc = tl.trans(acc)  # rows of out are stored whole
    offs_m = (first_m + lanes_m)[:, None]
    offs_n = (row * BN + offs_bn)[None, :]
    mask_n = offs_n < N
    mask = mask_n & (offs_m < M)
    offs = offs_m * N + offs_n
    acc = _add_and_activate(
        acc, bias_ptr, residual_ptr, offs_n, mask_n, offs, mask, HAS_BIAS, HAS_RESIDUAL, ACTIVATION
    )
    tl.store(out_ptr + offs, rounded(acc, out_ptr.dtype.element_ty, SOFT_BF16), mask=mask)


# A kernel of its own: it starts when all sums are there.
@triton.jit(do_not_specialize=["M", "N"])
def _bsr_add_up_kernel(
    sums_ptr,  # [SPLIT, M, N] fp32
    bias_ptr,  # [N] where HAS_BIAS
    residual_ptr,  # [M, N] where HAS_RESIDUAL, contiguous
    out_ptr,  # [M, N] out, contiguous
    M, N,
    SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALIGNED_OUT: tl.constexpr,  # N is a multiple of 16
    SOFT_BF16: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    if ALIGNED_OUT:
        N = N // 16 * 16
    pid = tl.program_id(0).to(tl.int64)
    num_n = tl.cdiv(N, BLOCK_N)
    offs_n = pid % num_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    offs = pid // num_n * N + offs_n
    acc = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for share in tl.static_range(SPLIT):  # pyright: ignore
        part_ptr = sums_ptr + tl.cast(share, tl.int64) * M * N
        acc += tl.load(part_ptr + offs, mask=mask_n, other=0.0)
    acc = _add_and_activate(
        acc, bias_ptr, residual_ptr, offs_n, mask_n, offs, mask_n, HAS_BIAS, HAS_RESIDUAL,
        ACTIVATION,
    )  # fmt: skip
    out = rounded(acc, out_ptr.dtype.element_ty, SOFT_BF16)
    tl.store(out_ptr + offs, out, mask=mask_n)


@triton.jit(do_not_specialize=["NNZ", "M", "N", "K",
                               "stride_dm", "stride_dn", "stride_xm", "stride_xk"])  # fmt: skip
def _bsr_dvalues_kernel(
    dy_ptr, x_ptr,  # [M, N], [M, K]
    row_ptr, col_ptr, perm_ptr,  # [nnz + 1], [nnz + 1], [nnz]
    dvalues_ptr,  # [NNZ, BN, BK] out, contiguous; where SPLIT > 1 [SPLIT, NNZ, BN, BK] fp32
    NNZ, M, N, K,
    stride_dm, stride_dn,
    stride_xm, stride_xk,
    ALIGNED_DY: tl.constexpr,  # stride_dn is 1; stride_dm and N are multiples of 16
    ALIGNED_X: tl.constexpr,  # stride_xk is 1; stride_xm and K are multiples of 16
    RAGGED: tl.constexpr,  # blocks overhang N or K
    SOFT_BF16: tl.constexpr,
    PRECISION: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,  # sides of a block
    SPLIT: tl.constexpr,  # programs that share the rows
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    if ALIGNED_DY:
        N = N // 16 * 16
        stride_dm = stride_dm // 16 * 16
        stride_dn = 1
    if ALIGNED_X:
        K = K // 16 * 16
        stride_xm = stride_xm // 16 * 16
        stride_xk = 1
    PARTS_N: tl.constexpr = BN // BLOCK_N
    PARTS_K: tl.constexpr = BK // BLOCK_K

    # in transposed order: neighbours share a strip of x
    pid = tl.program_id(0).to(tl.int64)
    start, end = 0, tl.cdiv(M, BLOCK_M)
    if SPLIT > 1:
        programs = NNZ * (PARTS_N * PARTS_K)
        share, pid = pid // programs, pid % programs
        length = tl.cdiv(end, SPLIT)
        start = share.to(tl.int32) * length
        end = tl.minimum(start + length, end)
    j = pid // (PARTS_N * PARTS_K)
    which = tl.load(perm_ptr + j).to(tl.int64)
    row = tl.load(row_ptr + j).to(tl.int64)
    col = tl.load(col_ptr + which).to(tl.int64)
    offs_bn = pid // PARTS_K % PARTS_N * BLOCK_N + tl.arange(0, BLOCK_N)  # inside the block
    offs_bk = pid % PARTS_K * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_n = row * BN + offs_bn
    offs_k = col * BK + offs_bk
    mask_n = offs_n < N
    mask_k = offs_k < K

    # dy is read transposed: as a left operand mma.sync's loop pipelines it in no other way.
    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for i in range(start, end):
        offs_m = tl.cast(i, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        dy = tl.load(
            dy_ptr + offs_n[:, None] * stride_dn + offs_m[None, :] * stride_dm,
            mask=mask_n[:, None] & mask_m[None, :], other=0.0,
        )  # fmt: skip
        x = tl.load(
            x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk,
            mask=mask_m[:, None] & mask_k[None, :], other=0.0,
        )  # fmt: skip
        if SOFT_BF16:
            dy = dy.to(tl.float32)
            x = x.to(tl.float32)
        acc = tl.dot(dy, x, acc, input_precision=PRECISION)

    if RAGGED:  # beyond an edge the gradient is 0, whatever 0 was multiplied with
        acc = tl.where(mask_n[:, None] & mask_k[None, :], acc, 0.0)
    offs = which * (BN * BK) + offs_bn[:, None] * BK + offs_bk[None, :]
    if SPLIT > 1:
        tl.store(dvalues_ptr + share * NNZ * (BN * BK) + offs, acc)  # pyright: ignore
    else:
        tl.store(dvalues_ptr + offs, rounded(acc, dvalues_ptr.dtype.element_ty, SOFT_BF16))
