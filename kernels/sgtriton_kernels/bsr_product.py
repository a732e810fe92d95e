"""Products with a block-sparse weight: launchers and their kernels.

    y = act(x W^T + bias + residual)        dx = dy W        D = dy^T x at the stored blocks

Sums run in fp32, what is added and the activation are applied to them, and the result is rounded
once. Beyond a ragged edge a stored block may hold anything: it never reaches a result.
"""

from __future__ import annotations

import torch

from ._bf16 import round_to_bf16, soft_bf16
from ._triton import device_of, dot_precision, launch_options, tl, triton
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
    (m, k), (_, bn, bk) = x2.shape, values.shape
    out = x2.new_empty(m, n)
    if m == 0:
        return out
    block_n, block_k = min(tile.BLOCK_N, bn), min(tile.BLOCK_K, bk)
    grid = (triton.cdiv(m, tile.BLOCK_M) * len(row_order) * (bn // block_n),)
    with device_of(x2):
        _bsr_product_kernel[grid](
            x2,
            values,
            crow, col, row_order,
            None if bias is None else bias.contiguous(),
            None if residual2 is None else residual2.contiguous(),
            out,
            m, n, k,
            *_strides(x2),
            HAS_BIAS=bias is not None, HAS_RESIDUAL=residual2 is not None,
            ACTIVATION=activation,
            ALIGNED_X=is_aligned(x2), ALIGNED_OUT=n % 16 == 0,
            SOFT_BF16=soft_bf16(x2.dtype, x2.device),
            PRECISION=dot_precision(),
            BN=bn, BK=bk,
            BLOCK_M=tile.BLOCK_M, BLOCK_N=block_n, BLOCK_K=block_k,
            **launch_options(x2.device, tile.num_stages, tile.num_warps),
        )  # fmt: skip
    return out


def _strides(t: torch.Tensor) -> tuple[int, int]:
    """Of a matrix; the one between rows is free where there is one row only."""
    return (t.stride(0) if len(t) > 1 else t.shape[1]), t.stride(1)


def is_aligned(t: torch.Tensor) -> bool:
    """Whether the rows of a matrix can be read in wide pieces."""
    between, inside = _strides(t)
    return inside == 1 and between % 16 == 0 and t.shape[1] % 16 == 0


@triton.jit
def _sigmoid(y):
    e = tl.exp(-tl.abs(y))  # never overflows
    return tl.where(y >= 0, 1.0, e) / (1 + e)


@triton.jit
def _activate(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        y = tl.where(y < 0, 0.0, y)  # NaN stays
    elif ACTIVATION == "gelu":
        y = 0.5 * y * (1 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(u)) = sigmoid(2 u), u = sqrt(2 / pi) * (y + 0.044715 y^3)
        y = y * _sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    elif ACTIVATION == "silu":
        y = y * _sigmoid(y)
    return y


@triton.jit
def _rounded(y, DTYPE: tl.constexpr, SOFT_BF16: tl.constexpr):
    if SOFT_BF16:
        return round_to_bf16(y)
    else:
        return y.to(DTYPE)


@triton.jit(do_not_specialize=["M", "N", "K", "stride_xm", "stride_xk"])
def _bsr_product_kernel(
    x_ptr,  # [M, K]
    values_ptr,  # [nnz, BN, BK], contiguous
    crow_ptr, col_ptr, row_order_ptr,  # [block_rows + 1], [nnz + 1], [block_rows]
    bias_ptr,  # [N] where HAS_BIAS
    residual_ptr,  # [M, N] where HAS_RESIDUAL, contiguous
    out_ptr,  # [M, N] out, contiguous
    M, N, K,
    stride_xm, stride_xk,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALIGNED_X: tl.constexpr,  # stride_xk is 1; stride_xm and K are multiples of 16
    ALIGNED_OUT: tl.constexpr,  # N is a multiple of 16
    SOFT_BF16: tl.constexpr,  # bf16 by hand, where the compiler does not do it right
    PRECISION: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,  # sides of a block
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Sizes and strides are not specialised, so a new batch size compiles nothing. What the
    # compiler must know for wide loads comes back as a flag: x // 16 * 16 shows it the multiple.
    if ALIGNED_X:
        K = K // 16 * 16
        stride_xm = stride_xm // 16 * 16
        stride_xk = 1
    if ALIGNED_OUT:
        N = N // 16 * 16
    PARTS: tl.constexpr = BN // BLOCK_N
    STEPS: tl.constexpr = BK // BLOCK_K

    # the longest block rows start first; neighbours share a block row's values
    pid = tl.program_id(0).to(tl.int64)
    num_m = tl.cdiv(M, BLOCK_M)
    pid_m = pid % num_m
    pid_n = pid // num_m
    row = tl.load(row_order_ptr + pid_n // PARTS).to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_bn = pid_n % PARTS * BLOCK_N + tl.arange(0, BLOCK_N)  # inside the block
    mask_m = offs_m < M

    start = tl.load(crow_ptr + row)
    end = tl.load(crow_ptr + row + 1)
    x_row_ptrs = x_ptr + offs_m[:, None] * stride_xm
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    # The column index is carried one step ahead: loaded inside its own step it would cost half
    # of the pipeline's depth. The last step reads the entry after its row; col has one to spare.
    col = tl.load(col_ptr + start)
    for i in range(start * STEPS, end * STEPS):
        next_col = tl.load(col_ptr + (i + 1) // STEPS)
        offs_bk = (i % STEPS) * BLOCK_K + tl.arange(0, BLOCK_K)  # inside the block  # pyright: ignore
        offs_k = col.to(tl.int64) * BK + offs_bk
        mask_k = offs_k < K
        x = tl.load(
            x_row_ptrs + offs_k[None, :] * stride_xk,
            mask=mask_m[:, None] & mask_k[None, :], other=0.0,
        )  # fmt: skip
        # beyond a ragged edge anything may be stored, so it is masked too
        block_ptr = values_ptr + tl.cast(i // STEPS, tl.int64) * (BN * BK)
        values = tl.load(
            block_ptr + offs_bn[:, None] * BK + offs_bk[None, :],
            mask=mask_k[None, :], other=0.0,
        )  # fmt: skip
        if SOFT_BF16:  # the interpreter multiplies the bit patterns of bf16
            x = x.to(tl.float32)
            values = values.to(tl.float32)
        acc = tl.dot(x, tl.trans(values), acc, input_precision=PRECISION)
        col = next_col

    offs_n = row * BN + offs_bn
    mask_n = offs_n < N
    mask = mask_m[:, None] & mask_n[None, :]
    offs = offs_m[:, None] * N + offs_n[None, :]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + offs, mask=mask, other=0.0)
        acc += residual.to(tl.float32)
    out = _rounded(_activate(acc, ACTIVATION), out_ptr.dtype.element_ty, SOFT_BF16)
    tl.store(out_ptr + offs, out, mask=mask)
