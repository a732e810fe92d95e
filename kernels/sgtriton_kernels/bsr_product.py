"""Products with a block-sparse weight: launchers and their kernels.

    out = act(x @ W^T + bias)        W: stored blocks only

Sums run in fp32, bias and activation are applied to them, and the result is rounded once.
"""

from __future__ import annotations

import torch

from ._bf16 import round_to_bf16, soft_bf16
from ._triton import device_of, dot_precision, launch_options, tl, triton
from .tiles import MAX_BLOCK_N, Tile


@triton.jit
def _sigmoid(y):
    e = tl.exp(-tl.abs(y))  # never overflows
    return tl.where(y >= 0, 1.0, e) / (1 + e)


@triton.jit(do_not_specialize=["M", "N", "K", "stride_xm", "stride_xk", "stride_om", "stride_on"])
def _bsr_linear_fwd_kernel(
    x_ptr,  # [M, K]
    values_ptr,  # [nnz, BN, BK], contiguous
    crow_ptr, col_ptr, row_order_ptr,  # [block_rows + 1], [nnz + 1], [block_rows]
    bias_ptr,  # [N] where HAS_BIAS
    out_ptr,  # [M, N] out
    M, N, K,
    stride_xm, stride_xk,
    stride_om, stride_on,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALIGNED_K: tl.constexpr,  # stride_xk is 1; stride_xm and K are multiples of 16
    ALIGNED_N: tl.constexpr,  # stride_on is 1; stride_om and N are multiples of 16
    SOFT_BF16: tl.constexpr,  # bf16 by hand, where the compiler does not do it right
    PRECISION: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,  # sides of a block
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Sizes and strides are not specialised, so a new batch size compiles nothing. What the
    # compiler must know for wide loads comes back as a flag: x // 16 * 16 shows it the multiple.
    if ALIGNED_K:
        K = K // 16 * 16
        stride_xm = stride_xm // 16 * 16
        stride_xk = 1
    if ALIGNED_N:
        N = N // 16 * 16
        stride_om = stride_om // 16 * 16
        stride_on = 1
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
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    if ACTIVATION == "relu":
        acc = tl.where(acc < 0, 0.0, acc)  # NaN stays
    elif ACTIVATION == "gelu":
        acc = 0.5 * acc * (1 + tl.erf(acc * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(u)) = sigmoid(2 u), u = sqrt(2 / pi) * (y + 0.044715 y^3)
        acc = acc * _sigmoid(1.5957691216057308 * (acc + 0.044715 * acc * acc * acc))
    elif ACTIVATION == "silu":
        acc = acc * _sigmoid(acc)
    if SOFT_BF16:
        out = round_to_bf16(acc)
    else:
        out = acc.to(out_ptr.dtype.element_ty)
    tl.store(
        out_ptr + offs_m[:, None] * stride_om + offs_n[None, :] * stride_on,
        out,
        mask=mask_m[:, None] & mask_n[None, :],
    )


def bsr_linear_fwd(
    x2: torch.Tensor,
    values: torch.Tensor,
    crow: torch.Tensor,
    col: torch.Tensor,
    row_order: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    activation: str,
    tile: Tile,
) -> torch.Tensor:
    """Launch the Triton kernel on ``x2 [M, K]``."""
    (m, k), (_, bn, bk) = x2.shape, values.shape
    out = x2.new_empty(m, n)
    if m == 0:
        return out
    stride_xm, stride_xk = x2.stride() if m > 1 else (k, x2.stride(1))
    block_n = min(bn, MAX_BLOCK_N)
    grid = (triton.cdiv(m, tile.BLOCK_M) * len(row_order) * (bn // block_n),)
    with device_of(x2):
        _bsr_linear_fwd_kernel[grid](
            x2,
            values,
            crow, col, row_order,
            None if bias is None else bias.contiguous(),
            out,
            m, n, k,
            stride_xm, stride_xk,
            *out.stride(),
            HAS_BIAS=bias is not None,
            ACTIVATION=activation,
            ALIGNED_K=stride_xk == 1 and stride_xm % 16 == 0 and k % 16 == 0,
            ALIGNED_N=n % 16 == 0,
            SOFT_BF16=soft_bf16(x2.dtype, x2.device),
            PRECISION=dot_precision(),
            BN=bn, BK=bk,
            BLOCK_M=tile.BLOCK_M, BLOCK_N=block_n, BLOCK_K=min(tile.BLOCK_K, bk),
            **launch_options(x2.device, tile.num_stages, tile.num_warps),
        )  # fmt: skip
    return out
