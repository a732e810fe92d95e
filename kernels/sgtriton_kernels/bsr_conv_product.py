"""Convolutions with a block-sparse weight: launchers and their kernels.

    out = act(W * x + bias)        dx = W^T * dout        D = dout * x at the stored blocks

Pixels are the rows of the products. A program reads of an image what a tap meets, where it lies:
channels side by side, a mask for the zeros around the image. Sums run in fp32, bias and activation
are applied to them, and the result is rounded once. What is stored beyond a ragged edge is never
used.
"""

from __future__ import annotations

import torch

from ._bf16 import rounded, soft_bf16
from ._triton import device_of, dot_precision, launch_options, tl, triton
from .activations import activate
from .conv_blocks import ChannelLists
from .conv_geometry import ConvGeometry, Pair
from .tiles import BsrTile


def bsr_conv_fwd(
    x: torch.Tensor,
    values: torch.Tensor,
    crow: torch.Tensor,
    col: torch.Tensor,
    row_order: torch.Tensor,
    bias: torch.Tensor | None,
    geometry: ConvGeometry,
    activation: str,
    out: torch.Tensor,
    tile: BsrTile,
) -> None:
    """Fill ``out`` with ``act(W * x + bias)``.

    Args:
        x: ``[B, C, H, W]`` fp32 | fp16 | bf16, any strides; copied unless channels lie side by
            side.
        values: ``[nnz, bn, bk]``, dtype of ``x``, contiguous; sides are powers of two >= 16.
        crow, col: ``[block_rows + 1]``, ``[nnz + 1]`` int32, of :class:`.BlockSparse`.
        row_order: ``[block_rows]`` int32. Block rows, in the order in which they start.
        bias: ``[O]``, dtype of ``x``, or ``None``.
        geometry: of the convolution.
        activation: ``"none"`` | ``"relu"`` | ``"gelu"`` | ``"gelu_tanh"`` | ``"silu"``.
        out: ``[B, O, H', W']``, dtype of ``x``, contiguous or channels-last.
        tile: what one program computes.
    """
    if not out.numel():
        return
    x, (_, bn, bk) = _channels_last(x), values.shape
    images, out_size = len(out), _size(out)
    rows, cols = geometry.blocks((bn, bk))
    block_n, block_k = min(tile.BLOCK_N, bn), min(tile.BLOCK_K, bk)
    pixels = images * out_size[0] * out_size[1]
    grid = (triton.cdiv(pixels, tile.BLOCK_M) * geometry.groups * rows * (bn // block_n),)
    with device_of(x):
        _bsr_conv_fwd_kernel[grid](
            x,
            values,
            crow, col, row_order,
            None if bias is None else bias.contiguous(),
            out,
            pixels, *_size(x), *out_size,
            geometry.in_per_group, geometry.out_per_group, geometry.out_channels, rows, cols,
            geometry.kernel[1], *geometry.stride, *geometry.before, *geometry.dilation,
            *_pixel_strides(x),
            HAS_BIAS=bias is not None,
            ACTIVATION=activation,
            CHANNELS_LAST=_is_channels_last(out),
            ALIGNED=_is_aligned(x, geometry.in_per_group),
            ALIGNED_OUT=geometry.out_per_group % 16 == 0,
            SOFT_BF16=soft_bf16(x.dtype, x.device),
            PRECISION=dot_precision("conv"),
            BN=bn, BK=bk,
            BLOCK_M=tile.BLOCK_M, BLOCK_N=block_n, BLOCK_K=block_k,
            **launch_options(x.device, tile.num_stages, tile.num_warps),
        )  # fmt: skip


def bsr_conv_dx(
    dout: torch.Tensor,
    values: torch.Tensor,
    lists: ChannelLists,
    geometry: ConvGeometry,
    dx: torch.Tensor,
    tile: BsrTile,
) -> None:
    """Fill ``dx`` with ``W^T * dout``: each input pixel gathers from the outputs that met it.

    Args:
        dout: ``[B, O, H', W']`` fp32 | fp16 | bf16, any strides; copied unless channels lie side
            by side.
        values: ``[nnz, bn, bk]``, dtype of ``dout``, contiguous; sides are powers of two >= 16.
        lists: of the blocks, by input channels.
        geometry: of the convolution.
        dx: ``[B, C, H, W]``, dtype of ``dout``, contiguous or channels-last.
        tile: what one program computes.
    """
    if not dx.numel():
        return
    dout, (_, bn, bk) = _channels_last(dout), values.shape
    images, size = len(dx), _size(dx)
    rows, cols = geometry.blocks((bn, bk))
    block_n, block_k = min(tile.BLOCK_N, bn), min(tile.BLOCK_K, bk)
    pixels = images * size[0] * size[1]
    grid = (triton.cdiv(pixels, tile.BLOCK_M) * geometry.groups * cols * (bk // block_k),)
    with device_of(dx):
        _bsr_conv_dx_kernel[grid](
            dout,
            values,
            *lists,
            dx,
            pixels, *size, *_size(dout),
            geometry.in_per_group, geometry.out_per_group, geometry.in_channels, rows, cols,
            geometry.taps, geometry.kernel[1], *geometry.stride, *geometry.before,
            *geometry.dilation,
            *_pixel_strides(dout),
            CHANNELS_LAST=_is_channels_last(dx),
            ALIGNED=_is_aligned(dout, geometry.out_per_group),
            ALIGNED_OUT=geometry.in_per_group % 16 == 0,
            SOFT_BF16=soft_bf16(dx.dtype, dx.device),
            PRECISION=dot_precision("conv"),
            BN=bn, BK=bk,
            BLOCK_M=tile.BLOCK_M, BLOCK_N=block_n, BLOCK_K=block_k,
            **launch_options(dx.device, tile.num_stages, tile.num_warps),
        )  # fmt: skip


def bsr_conv_dvalues(
    dout: torch.Tensor,
    x: torch.Tensor,
    row: torch.Tensor,
    col: torch.Tensor,
    perm: torch.Tensor,
    geometry: ConvGeometry,
    dvalues: torch.Tensor,
    tile: BsrTile,
) -> None:
    """Fill ``dvalues`` with the gradient at the stored blocks.

    Args:
        dout: ``[B, O, H', W']``, dtype of ``x``, any strides; copied as ``x``.
        x: ``[B, C, H, W]`` fp32 | fp16 | bf16, any strides; copied unless channels lie side by
            side.
        row, col, perm: ``[nnz + 1]``, ``[nnz + 1]``, ``[nnz]`` int32, of :class:`.BlockSparse`.
        geometry: of the convolution.
        dvalues: ``[nnz, bn, bk]``, dtype of ``x``, contiguous; 0 beyond a ragged edge.
        tile: what one program computes; ``split`` programs share the pixels, and their sums are
            added in a fixed order.
    """
    nnz, bn, bk = dvalues.shape
    if not nnz:
        return
    x, dout = _channels_last(x), _channels_last(dout)
    images, out_size = len(dout), _size(dout)
    rows, cols = geometry.blocks((bn, bk))
    block_n, block_k = min(tile.BLOCK_N, bn), min(tile.BLOCK_K, bk)
    pixels, split = images * out_size[0] * out_size[1], tile.split
    sums = dvalues
    if split > 1:
        sums = torch.empty((split, *dvalues.shape), dtype=torch.float32, device=x.device)
    grid = (nnz * (bn // block_n) * (bk // block_k) * split,)
    with device_of(x):
        _bsr_conv_dvalues_kernel[grid](
            dout, x,
            row, col, perm,
            sums,
            nnz, pixels, *_size(x), *out_size,
            geometry.in_per_group, geometry.out_per_group, rows, cols,
            geometry.kernel[1], *geometry.stride, *geometry.before, *geometry.dilation,
            *_pixel_strides(dout),
            *_pixel_strides(x),
            ALIGNED_DOUT=_is_aligned(dout, geometry.out_per_group),
            ALIGNED_X=_is_aligned(x, geometry.in_per_group),
            SOFT_BF16=soft_bf16(x.dtype, x.device),
            PRECISION=dot_precision("conv"),
            BN=bn, BK=bk, SPLIT=split,
            BLOCK_M=tile.BLOCK_M, BLOCK_N=block_n, BLOCK_K=block_k,
            **launch_options(x.device, tile.num_stages, tile.num_warps),
        )  # fmt: skip
    if split > 1:
        dvalues.copy_(sums.sum(0))


def _channels_last(t: torch.Tensor) -> torch.Tensor:
    """``t``, or a copy, with its channels side by side."""
    return t if t.stride(1) == 1 else t.contiguous(memory_format=torch.channels_last)


def _size(t: torch.Tensor) -> Pair:
    return t.shape[2], t.shape[3]


def _is_channels_last(t: torch.Tensor) -> bool:
    """Whether a result, contiguous either way, has its channels side by side."""
    return t.is_contiguous(memory_format=torch.channels_last)


def _pixel_strides(t: torch.Tensor) -> tuple[int, int, int]:
    """Between images, lines and pixels; free where there is one only."""
    images, channels, height, width = t.shape
    pixel = t.stride(3) if width > 1 else channels
    line = t.stride(2) if height > 1 else width * pixel
    return (t.stride(0) if images > 1 else height * line), line, pixel


def _is_aligned(t: torch.Tensor, per_group: int) -> bool:
    """Whether channels can be read in wide pieces."""
    return per_group % 16 == 0 and all(stride % 16 == 0 for stride in _pixel_strides(t))


@triton.jit
def _pixels(pid_m, PIXELS, HEIGHT, WIDTH, BLOCK_M: tl.constexpr):
    # image, line, place and mask of a tile's pixels; 32 bits suffice within an image
    first = pid_m * BLOCK_M
    left = tl.minimum(PIXELS - first, BLOCK_M).to(tl.int32)
    area = HEIGHT * WIDTH
    inside = tl.arange(0, BLOCK_M)
    offs = (first % area).to(tl.int32) + inside
    image = first // area + (offs // area).to(tl.int64)
    offs = (offs % area).to(tl.int32)
    return image, offs // WIDTH, offs % WIDTH, inside < left


@triton.jit
def _out_offsets(image, line, place, offs_c, HEIGHT, WIDTH, C, CHANNELS_LAST: tl.constexpr):
    # in a result [B, C, HEIGHT, WIDTH] that is contiguous or channels-last
    area = (HEIGHT * WIDTH).to(tl.int64)
    pixel = (line * WIDTH + place).to(tl.int64)
    if CHANNELS_LAST:
        return ((image * area + pixel) * C)[:, None] + offs_c[None, :]
    else:
        return (image * area * C + pixel)[:, None] + (offs_c * area)[None, :]


@triton.jit
def _store(ptr, offs, y, mask, SOFT_BF16: tl.constexpr):
    y = rounded(y, ptr.dtype.element_ty, SOFT_BF16)
    if SOFT_BF16:  # the CPU compiler has no code for single bf16 values: their bits
        bits_ptr = ptr.to(tl.pointer_type(tl.int16), bitcast=True)
        tl.store(bits_ptr + offs, y.to(tl.int16, bitcast=True), mask=mask)
    else:
        tl.store(ptr + offs, y, mask=mask)


@triton.jit(
    do_not_specialize=[
        "PIXELS", "H", "W", "HO", "WO", "C_GROUP", "O_GROUP", "O", "ROWS", "COLS",
        "KW", "stride_h", "stride_w", "top", "left", "apart_h", "apart_w",
        "stride_xb", "stride_xh", "stride_xw",
    ]
)  # fmt: skip
def _bsr_conv_fwd_kernel(
    x_ptr,  # [B, C, H, W], channels side by side
    values_ptr,  # [nnz, BN, BK], contiguous
    crow_ptr, col_ptr, order_ptr,  # [groups * ROWS + 1], [nnz + 1], [groups * ROWS]
    bias_ptr,  # [O] where HAS_BIAS
    out_ptr,  # [B, O, HO, WO] out
    PIXELS, H, W, HO, WO,  # PIXELS of out
    C_GROUP, O_GROUP, O, ROWS, COLS,  # of a group; block rows of a group, block columns of a tap
    KW, stride_h, stride_w, top, left, apart_h, apart_w,
    stride_xb, stride_xh, stride_xw,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,  # of out; else it is contiguous
    ALIGNED: tl.constexpr,  # strides of x and C_GROUP are multiples of 16
    ALIGNED_OUT: tl.constexpr,  # O_GROUP is
    SOFT_BF16: tl.constexpr,  # bf16 by hand, where the compiler does not do it right
    PRECISION: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,  # sides of a block
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Sizes and strides are not specialised, so a new image size compiles nothing. What the
    # compiler must know for wide loads comes back as a flag: x // 16 * 16 shows it the multiple.
    if ALIGNED:
        C_GROUP = C_GROUP // 16 * 16
        stride_xb = stride_xb // 16 * 16
        stride_xh = stride_xh // 16 * 16
        stride_xw = stride_xw // 16 * 16
    if ALIGNED_OUT:
        O_GROUP = O_GROUP // 16 * 16
        O = O // 16 * 16
    PARTS: tl.constexpr = BN // BLOCK_N
    STEPS: tl.constexpr = BK // BLOCK_K

    # the longest block rows start first; neighbours share a list's values
    pid = tl.program_id(0).to(tl.int64)
    num_m = tl.cdiv(PIXELS, BLOCK_M)
    pid_n = pid // num_m
    row = tl.load(order_ptr + pid_n // PARTS)
    group = row // ROWS
    image, line, place, mask_m = _pixels(pid % num_m, PIXELS, HO, WO, BLOCK_M)
    offs_bn = (pid_n % PARTS).to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)  # inside the block
    line_x, place_x = line * stride_h - top, place * stride_w - left
    x_row_ptrs = (
        x_ptr + group.to(tl.int64) * C_GROUP + image * stride_xb
        + line_x.to(tl.int64) * stride_xh + place_x.to(tl.int64) * stride_xw
    )  # fmt: skip

    start = tl.load(crow_ptr + row)
    end = tl.load(crow_ptr + row + 1)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    # The index is carried one step ahead: loaded inside its own step it would cost half of the
    # pipeline's depth. The last step reads the entry after its list; col has one to spare.
    index = tl.load(col_ptr + start)
    for i in range(start * STEPS, end * STEPS):
        next_index = tl.load(col_ptr + (i + 1) // STEPS)
        tap = index // COLS
        down, right = tap // KW * apart_h, tap % KW * apart_w
        offs_bk = (i % STEPS) * BLOCK_K + tl.arange(0, BLOCK_K)  # pyright: ignore
        offs_c = index % COLS * BK + offs_bk
        mask_c = offs_c < C_GROUP
        y, z = line_x + down, place_x + right
        mask_x = mask_m & (y >= 0) & (y < H) & (z >= 0) & (z < W)
        shift = tl.cast(down, tl.int64) * stride_xh + tl.cast(right, tl.int64) * stride_xw
        x = tl.load(
            (x_row_ptrs + shift)[:, None] + offs_c[None, :],
            mask=mask_x[:, None] & mask_c[None, :], other=0.0,
        )  # fmt: skip
        # beyond a ragged edge anything may be stored
        values = tl.load(
            values_ptr + tl.cast(i // STEPS, tl.int64) * (BN * BK)
            + offs_bn[:, None] * BK + offs_bk[None, :],
            mask=mask_c[None, :], other=0.0,
        )  # fmt: skip
        index = next_index
        if SOFT_BF16:  # the interpreter multiplies the bit patterns of bf16
            x = x.to(tl.float32)
            values = values.to(tl.float32)
        acc = tl.dot(x, tl.trans(values), acc, input_precision=PRECISION)

    offs_n = row % ROWS * BN + offs_bn  # inside the group
    mask_n = offs_n < O_GROUP
    offs_o = group.to(tl.int64) * O_GROUP + offs_n
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_o, mask=mask_n, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    acc = activate(acc, ACTIVATION)
    offs = _out_offsets(image, line, place, offs_o, HO, WO, O, CHANNELS_LAST)
    _store(out_ptr, offs, acc, mask_m[:, None] & mask_n[None, :], SOFT_BF16)


# A kernel of its own: what an input pixel meets is found by division, and blocks are listed by
# their channels.
@triton.jit(
    do_not_specialize=[
        "PIXELS", "H", "W", "HO", "WO", "C_GROUP", "O_GROUP", "C", "ROWS", "COLS",
        "TAPS", "KW", "stride_h", "stride_w", "top", "left", "apart_h", "apart_w",
        "stride_db", "stride_dh", "stride_dw",
    ]
)  # fmt: skip
def _bsr_conv_dx_kernel(
    dout_ptr,  # [B, O, HO, WO], channels side by side
    values_ptr,  # [nnz, BN, BK], contiguous
    starts_ptr,  # [groups * COLS + 1]
    meets_ptr,  # [nnz + 1]: block row * TAPS + tap
    which_ptr,  # [nnz]: where in values the blocks are
    dx_ptr,  # [B, C, H, W] out
    PIXELS, H, W, HO, WO,  # PIXELS of dx
    C_GROUP, O_GROUP, C, ROWS, COLS,  # of a group; block rows of a group, block columns of a tap
    TAPS, KW, stride_h, stride_w, top, left, apart_h, apart_w,
    stride_db, stride_dh, stride_dw,
    CHANNELS_LAST: tl.constexpr,  # of dx; else it is contiguous
    ALIGNED: tl.constexpr,  # strides of dout and O_GROUP are multiples of 16
    ALIGNED_OUT: tl.constexpr,  # C_GROUP is
    SOFT_BF16: tl.constexpr,
    PRECISION: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,  # sides of a block
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    if ALIGNED:
        O_GROUP = O_GROUP // 16 * 16
        stride_db = stride_db // 16 * 16
        stride_dh = stride_dh // 16 * 16
        stride_dw = stride_dw // 16 * 16
    if ALIGNED_OUT:
        C_GROUP = C_GROUP // 16 * 16
        C = C // 16 * 16
    PARTS: tl.constexpr = BK // BLOCK_K
    STEPS: tl.constexpr = BN // BLOCK_N

    pid = tl.program_id(0).to(tl.int64)
    num_m = tl.cdiv(PIXELS, BLOCK_M)
    pid_k = pid // num_m
    target = (pid_k // PARTS).to(tl.int32)  # group * COLS + block of channels
    group = target // COLS
    image, line, place, mask_m = _pixels(pid % num_m, PIXELS, H, W, BLOCK_M)
    offs_bk = (pid_k % PARTS).to(tl.int32) * BLOCK_K + tl.arange(0, BLOCK_K)  # inside the block
    offs_k = target % COLS * BK + offs_bk  # inside the group
    mask_k = offs_k < C_GROUP
    dout_row_ptrs = dout_ptr + group.to(tl.int64) * O_GROUP + image * stride_db

    start = tl.load(starts_ptr + target)
    end = tl.load(starts_ptr + target + 1)
    acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    meets = tl.load(meets_ptr + start)
    which = tl.load(which_ptr + start, mask=start < end, other=0)
    for i in range(start * STEPS, end * STEPS):
        next_meets = tl.load(meets_ptr + (i + 1) // STEPS)
        next_which = tl.load(which_ptr + tl.minimum((i + 1) // STEPS, end - 1))
        tap = meets % TAPS
        # output o met input o * stride - before + tap * apart
        y = line + top - tap // KW * apart_h
        z = place + left - tap % KW * apart_w
        line_o, place_o = y // stride_h, z // stride_w
        mask_o = mask_m & (y >= 0) & (z >= 0) & (line_o < HO) & (place_o < WO)
        mask_o = mask_o & (line_o * stride_h == y) & (place_o * stride_w == z)
        offs_bn = (i % STEPS) * BLOCK_N + tl.arange(0, BLOCK_N)  # pyright: ignore
        offs_n = meets // TAPS % ROWS * BN + offs_bn
        mask_n = offs_n < O_GROUP
        offs_d = line_o.to(tl.int64) * stride_dh + place_o.to(tl.int64) * stride_dw
        dout = tl.load(
            (dout_row_ptrs + offs_d)[:, None] + offs_n[None, :],
            mask=mask_o[:, None] & mask_n[None, :], other=0.0,
        )  # fmt: skip
        values = tl.load(
            values_ptr + which.to(tl.int64) * (BN * BK)
            + offs_bn[:, None] * BK + offs_bk[None, :],
            mask=mask_n[:, None], other=0.0,
        )  # fmt: skip
        meets = next_meets
        which = next_which
        if SOFT_BF16:
            dout = dout.to(tl.float32)
            values = values.to(tl.float32)
        acc = tl.dot(dout, values, acc, input_precision=PRECISION)

    offs_c = group.to(tl.int64) * C_GROUP + offs_k
    offs = _out_offsets(image, line, place, offs_c, H, W, C, CHANNELS_LAST)
    _store(dx_ptr, offs, acc, mask_m[:, None] & mask_k[None, :], SOFT_BF16)


@triton.jit(
    do_not_specialize=[
        "NNZ", "PIXELS", "H", "W", "HO", "WO", "C_GROUP", "O_GROUP", "ROWS", "COLS",
        "KW", "stride_h", "stride_w", "top", "left", "apart_h", "apart_w",
        "stride_db", "stride_dh", "stride_dw", "stride_xb", "stride_xh", "stride_xw",
    ]
)  # fmt: skip
def _bsr_conv_dvalues_kernel(
    dout_ptr, x_ptr,  # [B, O, HO, WO], [B, C, H, W], channels side by side
    row_ptr, col_ptr, perm_ptr,  # [nnz + 1], [nnz + 1], [nnz]
    dvalues_ptr,  # [nnz, BN, BK] out, contiguous; where SPLIT > 1 [SPLIT, nnz, BN, BK] fp32
    NNZ, PIXELS, H, W, HO, WO,  # PIXELS of dout
    C_GROUP, O_GROUP, ROWS, COLS,  # of a group; block rows of a group, block columns of a tap
    KW, stride_h, stride_w, top, left, apart_h, apart_w,
    stride_db, stride_dh, stride_dw,
    stride_xb, stride_xh, stride_xw,
    ALIGNED_DOUT: tl.constexpr,  # strides of dout and O_GROUP are multiples of 16
    ALIGNED_X: tl.constexpr,  # strides of x and C_GROUP are multiples of 16
    SOFT_BF16: tl.constexpr,
    PRECISION: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,  # sides of a block
    SPLIT: tl.constexpr,  # programs that share the pixels
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    if ALIGNED_DOUT:
        O_GROUP = O_GROUP // 16 * 16
        stride_db = stride_db // 16 * 16
        stride_dh = stride_dh // 16 * 16
        stride_dw = stride_dw // 16 * 16
    if ALIGNED_X:
        C_GROUP = C_GROUP // 16 * 16
        stride_xb = stride_xb // 16 * 16
        stride_xh = stride_xh // 16 * 16
        stride_xw = stride_xw // 16 * 16
    PARTS_N: tl.constexpr = BN // BLOCK_N
    PARTS_K: tl.constexpr = BK // BLOCK_K

    # in transposed order: neighbours share what a tap meets of x
    pid = tl.program_id(0).to(tl.int64)
    share, pid = pid % SPLIT, pid // SPLIT
    j = pid // (PARTS_N * PARTS_K)
    which = tl.load(perm_ptr + j).to(tl.int64)
    row = tl.load(row_ptr + j)
    col = tl.load(col_ptr + which)
    group, tap = (row // ROWS).to(tl.int64), col // COLS
    down, right = tap // KW * apart_h - top, tap % KW * apart_w - left
    offs_bn = (pid // PARTS_K % PARTS_N).to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_bk = (pid % PARTS_K).to(tl.int32) * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_n, offs_k = row % ROWS * BN + offs_bn, col % COLS * BK + offs_bk  # inside the group
    mask_n, mask_k = offs_n < O_GROUP, offs_k < C_GROUP
    dout_col_ptrs = dout_ptr + group * O_GROUP + offs_n
    x_col_ptrs = x_ptr + group * C_GROUP + offs_k

    # Where a tap meets no pixel dout is read as 0 too: infinity times 0 would be NaN. dout is read
    # transposed: as a left operand mma.sync's loop pipelines it in no other way.
    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    length = tl.cdiv(tl.cdiv(PIXELS, BLOCK_M), SPLIT)
    for i in range(0, length):
        pid_m = share * length + i
        image, line, place, mask_m = _pixels(pid_m, PIXELS, HO, WO, BLOCK_M)
        y, z = line * stride_h + down, place * stride_w + right
        mask_x = mask_m & (y >= 0) & (y < H) & (z >= 0) & (z < W)
        offs_d = image * stride_db + line.to(tl.int64) * stride_dh + place.to(tl.int64) * stride_dw
        dout = tl.load(
            dout_col_ptrs[:, None] + offs_d[None, :],
            mask=mask_n[:, None] & mask_x[None, :], other=0.0,
        )  # fmt: skip
        offs_x = image * stride_xb + y.to(tl.int64) * stride_xh + z.to(tl.int64) * stride_xw
        x = tl.load(
            x_col_ptrs[None, :] + offs_x[:, None],
            mask=mask_x[:, None] & mask_k[None, :], other=0.0,
        )  # fmt: skip
        if SOFT_BF16:
            dout = dout.to(tl.float32)
            x = x.to(tl.float32)
        acc = tl.dot(dout, x, acc, input_precision=PRECISION)

    # beyond a ragged edge the gradient is 0, whatever 0 was multiplied with
    acc = tl.where(mask_n[:, None] & mask_k[None, :], acc, 0.0)
    offs = which * (BN * BK) + offs_bn[:, None] * BK + offs_bk[None, :]
    if SPLIT > 1:
        tl.store(dvalues_ptr + share * NNZ * (BN * BK) + offs, acc)
    else:
        dvalues = rounded(acc, dvalues_ptr.dtype.element_ty, SOFT_BF16)
        tl.store(dvalues_ptr + offs, dvalues)
