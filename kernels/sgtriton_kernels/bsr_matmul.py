"""Product with a block-sparse weight, with bias and activation in the same pass.

    out = act(x @ W^T + bias)        W: stored blocks only

Sums run in fp32, bias and activation are applied to them, and the result is rounded once.
Forward only: a backward pass raises.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from ._autocast import cast_like_autocast
from ._bf16 import round_to_bf16, soft_bf16
from ._impl import resolve_impl
from ._ops import add_op_namespace_prefix, ops
from ._triton import device_of, dot_precision, launch_options, tl, triton
from .bsr import BlockSparse
from .tiles import MAX_BLOCK_N, Tile, tile_for_bsr_linear

_ACTIVATIONS = {
    "none": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}
_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_DTYPES = (*_TRITON_DTYPES, torch.float64)


def bsr_linear(
    x: torch.Tensor,
    w: BlockSparse,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    *,
    impl: str | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """Linear layer with a block-sparse weight: ``act(x @ W^T + bias)``.

    Under autocast, ``x``, the values and ``bias`` are cast to its dtype as for ``F.linear``.

    Args:
        x: ``[..., K]`` fp32 | fp16 | bf16 (the ``torch`` implementation: fp64 too), any strides.
        w: ``(N, K)``, dtype and device of ``x``. The Triton kernel serves block sides that are
            powers of two >= 16.
        bias: ``[N]``, dtype and device of ``x``.
        activation: ``"relu"`` | ``"gelu"`` | ``"gelu_tanh"`` | ``"silu"`` | ``None``.
        impl: ``"triton"`` | ``"torch"``; default: see :mod:`._impl`.
        tile: what one program of the Triton kernel computes; default: by size.

    Returns:
        ``[..., N]``, dtype of ``x``, contiguous. Not differentiable yet: backward raises
        ``NotImplementedError``.

    Raises:
        ValueError: shapes, dtypes or devices that do not agree; an unknown activation; ``impl``
            asks for what cannot run.
    """
    values, device = w.values, x.device
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        x, values = cast_like_autocast(x, dtype), cast_like_autocast(values, dtype)
        bias = cast_like_autocast(bias, dtype)
    n, k = w.shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"x must be [..., {k}] for a weight of shape {w.shape}, got {_shape(x)}")
    _check_agrees("w", values, x)
    if bias is not None:
        if bias.shape != (n,):
            raise ValueError(f"bias must be [{n}] for a weight of shape {w.shape}, got "
                             f"{_shape(bias)}")  # fmt: skip
        _check_agrees("bias", bias, x)
    if x.dtype not in _DTYPES:
        raise ValueError(f"x must be one of {_DTYPES}, got {x.dtype}")
    activation = "none" if activation is None else activation
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be None or one of {tuple(_ACTIVATIONS)[1:]}, got "
                         f"{activation!r}")  # fmt: skip
    impl = resolve_impl(impl, device, "bsr_linear", _why_unsupported(x.dtype, w.block))
    return _bsr_linear_op(
        x, values, w.crow, w.col, w.ccol, w.row, w.perm, w.row_order, bias, n, activation, impl,
        None if tile is None else [tile.BLOCK_M, tile.BLOCK_K, tile.num_stages, tile.num_warps],
    )  # fmt: skip


def bsr_linear_ref(
    x: torch.Tensor,
    w: BlockSparse,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """What :func:`bsr_linear` computes, in plain PyTorch on the dense weight."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = x.to(wide) @ w.to_dense().to(wide).T
    if bias is not None:
        out = out + bias.to(wide)
    return _ACTIVATIONS[activation or "none"](out).to(x.dtype)


def _check_agrees(name: str, t: torch.Tensor, x: torch.Tensor) -> None:
    if t.dtype != x.dtype:
        raise ValueError(f"x and {name} must have one dtype, got x {x.dtype}, {name} {t.dtype}")
    if t.device != x.device:
        raise ValueError(f"x and {name} must be on one device, got x {x.device}, {name} {t.device}")


def _shape(t: torch.Tensor) -> list[int]:
    return list(t.shape)


def _why_unsupported(dtype: torch.dtype, block: tuple[int, int]) -> str | None:
    if dtype not in _TRITON_DTYPES:
        return f"it serves {_TRITON_DTYPES}, not {dtype}"
    if any(side < 16 or side & (side - 1) for side in block):
        return f"it serves block sides that are powers of two >= 16, not {block}"
    return None


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


def _bsr_linear_fwd(
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


# Measured on one AVX2 core at N=4096, K=1024, a tenth of the blocks stored, 1 to 512 rows of x.
_BAND = 64  # rows of x at a time: what they meet stays in the cache
_CHUNK = 1 << 18  # elements of x and of products at a time
_FEW = 8  # block rows or columns up to which one product for each is faster
_REUSE = 8  # products per element moved, below which (and from 16 rows on) dense is faster


def _bsr_linear_torch(
    x2: torch.Tensor,
    values: torch.Tensor,
    crow: torch.Tensor,
    col: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    activation: str,
) -> torch.Tensor:
    """The same in library calls, for any block, on ``x2 [M, K]``."""
    (m, k), (nnz, bn, bk) = x2.shape, values.shape
    rows, cols = len(crow) - 1, -(-k // bk)
    wide = torch.float64 if x2.dtype == torch.float64 else torch.float32
    out = x2.new_empty(m, n)
    col = col[:nnz]
    values = values.to(wide)
    if k % bk:  # beyond the edge anything may be stored
        inside = torch.arange(bk, device=col.device) < k - col[:, None] * bk
        values = torch.where(inside[:, None, :], values, 0)
    if rows <= _FEW:
        multiply = _rows_multiplier(values, crow, col)
    else:
        row = torch.repeat_interleave(crow.diff(), output_size=nnz)  # of each block
        if cols <= _FEW:
            make = _cols_multiplier
        elif m >= 16 and bn * bk < _REUSE * (bn + bk):
            make = _dense_multiplier
        else:
            make = _batch_multiplier
        multiply = make(values, row, col, rows, cols)
    for m0 in range(0, m, _BAND):
        band = x2[m0 : m0 + _BAND].to(wide)
        if k % bk:
            band = F.pad(band, (0, cols * bk - k))
        acc = multiply(band)[:, :n]
        if bias is not None:
            acc = acc + bias.to(wide)
        out[m0 : m0 + _BAND] = _ACTIVATIONS[activation](acc)
    return out


def _rows_multiplier(values, crow, col):
    """One product per block row, with the columns of ``x`` that it meets."""
    bn, bk = values.shape[1:]
    bounds = crow.tolist()
    parts = [slice(a, b) for a, b in itertools.pairwise(bounds)]
    weights = [values[p].transpose(0, 1).reshape(bn, -1) for p in parts]

    def multiply(band):
        blocks = band.reshape(len(band), -1, bk)
        met = (blocks[:, col[p]].flatten(1) for p in parts)
        return torch.cat([F.linear(x, w) for x, w in zip(met, weights, strict=True)], 1)

    return multiply


def _cols_multiplier(values, row, col, rows, cols):
    """One product per block column, added to the block rows that it meets."""
    bn, bk = values.shape[1:]
    parts = [(col == c).nonzero()[:, 0] for c in range(cols)]
    weights = [values[p].view(-1, bk) for p in parts]

    def multiply(band):
        acc = band.new_zeros(rows, bn, len(band))
        for c, (part, weight) in enumerate(zip(parts, weights, strict=True)):
            product = weight @ band[:, c * bk : (c + 1) * bk].T
            acc.index_add_(0, row[part], product.view(len(part), bn, len(band)))
        return acc.flatten(0, 1).T

    return multiply


def _dense_multiplier(values, row, col, rows, cols):
    """One product with the dense weight."""
    bn, bk = values.shape[1:]
    weight = values.new_zeros(rows, bn, cols, bk)
    weight[row, :, col] = values
    weight = weight.view(rows * bn, cols * bk)
    return lambda band: F.linear(band, weight)


def _batch_multiplier(values, row, col, rows, cols):
    """Batches of one product per block, added up by block row."""
    nnz, bn, bk = values.shape
    values = values.transpose(1, 2)

    def multiply(band):
        size = len(band)
        blocks = band.reshape(size, cols, bk).transpose(0, 1).contiguous()
        acc = band.new_zeros(rows, size, bn)
        step = max(1, _CHUNK // ((bn + bk) * size))
        for b in range(0, nnz, step):
            part = slice(b, b + step)
            acc.index_add_(0, row[part], torch.bmm(blocks[col[part]], values[part]))
        return acc.transpose(0, 1).reshape(size, rows * bn)

    return multiply


@torch.library.custom_op(add_op_namespace_prefix("bsr_linear"), mutates_args=())
def _bsr_linear_op(
    x: torch.Tensor,
    values: torch.Tensor,
    crow: torch.Tensor,
    col: torch.Tensor,
    ccol: torch.Tensor,
    row: torch.Tensor,
    perm: torch.Tensor,
    row_order: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    activation: str,
    impl: str,
    tile: Sequence[int] | None,
) -> torch.Tensor:
    x2 = x.reshape(-1, x.shape[-1])
    values = values.contiguous()
    if impl == "triton":
        block = (values.shape[1], values.shape[2])
        chosen = Tile(*tile) if tile else tile_for_bsr_linear(len(x2), block, x.dtype)
        out = _bsr_linear_fwd(x2, values, crow, col, row_order, bias, n, activation, chosen)
    else:
        autocast = torch.is_autocast_enabled(x.device.type)
        # the entry has cast already; in here autocast would round the sums
        off = torch.autocast(x.device.type, enabled=False) if autocast else nullcontext()
        with off:
            out = _bsr_linear_torch(x2, values, crow, col, bias, n, activation)
    return out.view(*x.shape[:-1], n)


@_bsr_linear_op.register_fake
def _(x, values, crow, col, ccol, row, perm, row_order, bias, n, activation, impl, tile):
    return x.new_empty(*x.shape[:-1], n)


def _backward(ctx, dout):
    raise NotImplementedError(
        "bsr_linear has no backward yet: call it under torch.no_grad(), or with x, values and bias "
        "that do not require grad"
    )


_bsr_linear_op.register_autograd(_backward)


@register_flop_formula(ops.bsr_linear)
def _bsr_linear_flops(x_shape, values_shape, *args, out_shape=None, **kwargs) -> int:
    """Two per stored weight and row of ``x``."""
    nnz, bn, bk = values_shape
    rows = 1
    for size in x_shape[:-1]:
        rows *= size
    return 2 * rows * nnz * bn * bk
