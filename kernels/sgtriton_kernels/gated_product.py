"""Products with a gated weight, the gates applied inside: launchers and their kernels.

    y = x (W * b)^T + bias        dx = dy (W * b)        D = dy^T x
    dW = D * b                    dg[block] = sum over the block of D * W

Binary gates ``b`` come as bits (:mod:`.gate_bits`), one for each weight or for each block of them.
A closed weight gives exactly 0, whatever it holds. Sums run in fp32 and are rounded once. The
weight may be wider than ``x`` (an fp32 master weight): it is cast to ``x``'s dtype in registers.

Two ways to use the gates:

- *fused*: every weight is read, and closed ones are set to 0 on the way to the product. The weight
  is the left operand, ``y^T = (W * b) x^T``, ``dx^T = (W * b)^T dy^T``: Hopper's matrix units read
  a left operand from registers and Blackwell's from tensor memory, so that the gated tile is never
  written back to shared memory.
- *skip*: blocks only, of sides that are powers of two >= 16. The loop runs over the open blocks;
  closed ones are not even read.

What a pass costs, with ``M`` rows, ``e`` bytes an element of ``x``, ``f`` of the weight, ``G``
gates, ``d`` the share of weights that are open. Tiles of ``BLOCK_M`` rows read the weight
``ceil(M / BLOCK_M)`` times and tiles of ``BLOCK_N`` outputs read ``x`` ``ceil(N / BLOCK_N)`` times
(dx: ``K`` and ``BLOCK_K``); what comes from memory, and not from the L2 cache, is near:

| pass | bytes | of these needed | FLOPs | of these needed |
|---|---|---|---|---|
| fused forward, dx | M K e + M N e + N K f + G / 8 | d N K f for the weight | 2 M N K | 2 d M N K |
| fused dW, dg | M K e + M N e + 2 N K f + G / 8 + 4 G | all (dg needs closed W) | 2 M N K | all |
| skip forward, dx | M K e + M N e + d N K f + 4 d G | all | 2 d M N K | all |
| skip dW, dg | M K e + M N e + (1 + d) N K f + G / 8 + 4 G | all | 2 d M N K | all |

Without ``dg`` the weight is not read (N K f less), and a fused dW needs 2 d M N K only.
"""

from __future__ import annotations

import torch

from ._bf16 import round_to_bf16, rounded, soft_bf16
from ._operands import is_aligned, row_strides
from ._triton import device_of, dot_precision, launch_options, tl, triton
from .blocks import fits_kernels, gate_layout, sum_blocks
from .gate_bits import OpenBlocks
from .tiles import GatedTile

Sides = tuple[int, int]


def fused_fwd(
    x2: torch.Tensor,
    w: torch.Tensor,
    bits: torch.Tensor,
    block: Sides,
    bias: torch.Tensor | None,
    tile: GatedTile,
) -> torch.Tensor:
    """Compute ``y = x (W * b)^T + bias``.

    Args:
        x2: ``[M, K]`` fp32 | fp16 | bf16, any strides.
        w: ``[N, K]`` fp32 | fp16 | bf16, any strides.
        bits: ``[ceil(N / bn), ceil(ceil(K / bk) / 32)]`` int32, from :func:`.pack_gates`.
        block: ``(bn, bk)`` weights that one gate covers, any sides.
        bias: ``[N]`` floating, or ``None``.
        tile: what one program computes.

    Returns:
        ``[M, N]``, dtype of ``x2``, contiguous.
    """
    return _product(x2, w, bias, block, tile, transposed=False, bits=bits)


def fused_dx(
    dy2: torch.Tensor, w: torch.Tensor, bits: torch.Tensor, block: Sides, tile: GatedTile
) -> torch.Tensor:
    """Compute ``dx = dy (W * b)``.

    Args:
        dy2: ``[M, N]`` fp32 | fp16 | bf16, any strides.
        w, bits, block, tile: as for :func:`fused_fwd`.

    Returns:
        ``[M, K]``, dtype of ``dy2``, contiguous.
    """
    return _product(dy2, w, None, block, tile, transposed=True, bits=bits)


def skip_fwd(
    x2: torch.Tensor,
    w: torch.Tensor,
    open_blocks: OpenBlocks,
    block: Sides,
    bias: torch.Tensor | None,
    tile: GatedTile,
) -> torch.Tensor:
    """Compute what :func:`fused_fwd` does, from the open blocks only.

    Args:
        open_blocks: from :func:`.open_lists`.
        block: ``(bn, bk)``, powers of two >= 16, or a side as long as the layer's; the tile's
            sides are cut to them.
        x2, w, bias, tile: as for :func:`fused_fwd`.
    """
    return _product(x2, w, bias, block, tile, transposed=False, blocks=open_blocks)


def skip_dx(
    dy2: torch.Tensor, w: torch.Tensor, open_blocks: OpenBlocks, block: Sides, tile: GatedTile
) -> torch.Tensor:
    """Compute what :func:`fused_dx` does, from the open blocks only; see :func:`skip_fwd`."""
    return _product(dy2, w, None, block, tile, transposed=True, blocks=open_blocks)


def fused_dw(
    dy2: torch.Tensor,
    x2: torch.Tensor,
    w: torch.Tensor,
    bits: torch.Tensor,
    block: Sides,
    need_dgate: bool,
    tile: GatedTile,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the gradients of the weight and of its gates from one accumulator.

    Args:
        dy2: ``[M, N]``, dtype of ``x2``, any strides.
        need_dgate: whether the gates' gradient is wanted.
        x2, w, bits, block, tile: as for :func:`fused_fwd`.

    Returns:
        dw: ``[N, K]``, dtype of ``w``, contiguous; 0 where the gate is closed.
        dgate: ``[ceil(N / bn), ceil(K / bk)]`` fp32, of closed gates too; ``[0]`` if not wanted.
    """
    return _dw(dy2, x2, w, bits, block, need_dgate, tile, skip=False)


def skip_dw(
    dy2: torch.Tensor,
    x2: torch.Tensor,
    w: torch.Tensor,
    bits: torch.Tensor,
    block: Sides,
    need_dgate: bool,
    tile: GatedTile,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the gradients at the open blocks only.

    Args:
        block: ``(bn, bk)``, powers of two >= 16, or a side as long as the layer's; the tile's
            sides are cut to them.
        dy2, x2, w, bits, need_dgate, tile: as for :func:`fused_dw`.

    Returns:
        As :func:`fused_dw`, but a closed gate's gradient is 0.
    """
    return _dw(dy2, x2, w, bits, block, need_dgate, tile, skip=True)


@triton.jit
def _gate_of(first, offs, SIDE: tl.constexpr, TILE: tl.constexpr):
    # index of each element's gate along one dimension; a scalar where the tile lies in one block
    if SIDE % TILE == 0:
        return first // SIDE
    else:
        return offs // SIDE


@triton.jit
def _read_bits(bits_ptr, row, mask_row, col, first_col, stride_b, WORDS: tl.constexpr):
    # row, col: gate indices that broadcast against each other. The columns lie in WORDS words at
    # most, the first of which holds first_col: a word is read once for each row.
    row_ptr = bits_ptr + row * stride_b
    first = first_col // 32
    word = tl.load(row_ptr + first, mask=mask_row, other=0)
    for j in tl.static_range(1, WORDS):  # pyright: ignore
        later = tl.load(row_ptr + (first + j), mask=mask_row & (first + j < stride_b), other=0)
        word = tl.where(col // 32 - first == j, later, word)
    return ((word >> (col % 32).to(tl.int32)) & 1) != 0


@triton.jit
def _to_operand(w, DTYPE: tl.constexpr, SOFT_BF16: tl.constexpr):
    # the interpreter multiplies the bit patterns of bf16: there it becomes fp32 again
    if SOFT_BF16:
        return round_to_bf16(w.to(tl.float32)).to(tl.float32)
    else:
        return w.to(DTYPE)


@triton.jit(do_not_specialize=["M", "N", "K", "stride_xm", "stride_xr", "stride_wn", "stride_wk",
                               "stride_b", "stride_i"])  # fmt: skip
def _gated_product_kernel(
    x_ptr,  # [M, RED]; RED is K, where TRANSPOSED N
    w_ptr,  # [N, K]
    bits_ptr,  # [gate rows, stride_b] where not SKIP
    count_ptr, index_ptr,  # [blocks along OUT], [blocks along OUT, stride_i] where SKIP
    bias_ptr,  # [OUT] where HAS_BIAS; OUT is N, where TRANSPOSED K
    out_ptr,  # [M, OUT] out, contiguous
    M, N, K,
    stride_xm, stride_xr,
    stride_wn, stride_wk,
    stride_b, stride_i,
    TRANSPOSED: tl.constexpr,  # x W instead of x W^T
    SKIP: tl.constexpr,
    WEIGHT_LEFT: tl.constexpr,  # out^T = W x^T instead of out = x W^T
    HAS_BIAS: tl.constexpr,
    ALIGNED_X: tl.constexpr,  # stride_xr is 1; stride_xm and RED are multiples of 16
    ALIGNED_W: tl.constexpr,  # stride_wk is 1; stride_wn and K are multiples of 16
    ALIGNED_OUT: tl.constexpr,  # OUT is a multiple of 16
    SOFT_BF16: tl.constexpr,  # x is bf16, by hand
    PRECISION: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,  # weights that a gate covers
    WORDS: tl.constexpr,  # words of bits that a tile's columns can touch
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Sizes and strides are not specialised; x // 16 * 16 shows the compiler the multiple.
    if ALIGNED_W:
        K = K // 16 * 16
        stride_wn = stride_wn // 16 * 16
        stride_wk = 1
    if TRANSPOSED:
        OUT, RED = K, N
        stride_wo, stride_wr = stride_wk, stride_wn
        SIDE_OUT: tl.constexpr = BK
        SIDE_RED: tl.constexpr = BN
        BLOCK_OUT: tl.constexpr = BLOCK_K
        BLOCK_RED: tl.constexpr = BLOCK_N
    else:
        OUT, RED = N, K
        stride_wo, stride_wr = stride_wn, stride_wk
        SIDE_OUT: tl.constexpr = BN
        SIDE_RED: tl.constexpr = BK
        BLOCK_OUT: tl.constexpr = BLOCK_N
        BLOCK_RED: tl.constexpr = BLOCK_K
    if ALIGNED_X:
        RED = RED // 16 * 16
        stride_xm = stride_xm // 16 * 16
        stride_xr = 1
    if ALIGNED_OUT:
        OUT = OUT // 16 * 16

    # neighbours share a strip of the weight
    pid = tl.program_id(0).to(tl.int64)
    num_m = tl.cdiv(M, BLOCK_M)
    first_o = pid // num_m * BLOCK_OUT
    offs_m = pid % num_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_o = first_o + tl.arange(0, BLOCK_OUT)
    mask_m = offs_m < M
    mask_o = offs_o < OUT

    x_row_ptrs = x_ptr + offs_m[:, None] * stride_xm
    w_row_ptrs = w_ptr + offs_o[:, None] * stride_wo
    if SKIP:
        STEPS: tl.constexpr = SIDE_RED // BLOCK_RED
        block_o = first_o // SIDE_OUT
        steps = tl.load(count_ptr + block_o) * STEPS
        index_row_ptr = index_ptr + block_o * stride_i
        index = tl.load(index_row_ptr)
    else:
        steps = tl.cdiv(RED, BLOCK_RED)
    gate_o = _gate_of(first_o, offs_o[:, None], SIDE_OUT, BLOCK_OUT)
    if WEIGHT_LEFT:
        acc = tl.zeros((BLOCK_OUT, BLOCK_M), dtype=tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_OUT), dtype=tl.float32)
    for i in range(0, steps):
        if SKIP:
            # carried one step ahead: loaded inside its own step it would cost half of the
            # pipeline's depth; the last step reads the entry after its list
            next_index = tl.load(index_row_ptr + (i + 1) // STEPS)  # pyright: ignore
            first_r = index.to(tl.int64) * SIDE_RED + (i % STEPS) * BLOCK_RED  # pyright: ignore
            index = next_index
        else:
            first_r = tl.cast(i, tl.int64) * BLOCK_RED
        offs_r = first_r + tl.arange(0, BLOCK_RED)
        mask_r = offs_r < RED
        x = tl.load(
            x_row_ptrs + offs_r[None, :] * stride_xr,
            mask=mask_m[:, None] & mask_r[None, :], other=0.0,
        )  # fmt: skip
        w = tl.load(
            w_row_ptrs + offs_r[None, :] * stride_wr,
            mask=mask_o[:, None] & mask_r[None, :], other=0.0,
        )  # fmt: skip
        w = _to_operand(w, x.dtype, SOFT_BF16)
        if not SKIP:
            gate_r = _gate_of(first_r, offs_r[None, :], SIDE_RED, BLOCK_RED)
            if TRANSPOSED:
                mask_gate = first_r < RED if SIDE_RED % BLOCK_RED == 0 else mask_r[None, :]
                open_ = _read_bits(
                    bits_ptr, gate_r, mask_gate, gate_o, first_o // BK, stride_b, WORDS
                )
            else:
                mask_gate = first_o < OUT if SIDE_OUT % BLOCK_OUT == 0 else mask_o[:, None]
                open_ = _read_bits(
                    bits_ptr, gate_o, mask_gate, gate_r, first_r // BK, stride_b, WORDS
                )
            w = tl.where(open_, w, 0.0)
        if SOFT_BF16:
            x = x.to(tl.float32)
        if WEIGHT_LEFT:
            acc = tl.dot(w, tl.trans(x), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)

    if WEIGHT_LEFT:
        acc = tl.trans(acc)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_o, mask=mask_o, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    out = rounded(acc, out_ptr.dtype.element_ty, SOFT_BF16)
    tl.store(
        out_ptr + offs_m[:, None] * OUT + offs_o[None, :],
        out,
        mask=mask_m[:, None] & mask_o[None, :],
    )


@triton.jit(do_not_specialize=["M", "N", "K", "stride_dm", "stride_dn", "stride_xm", "stride_xk",
                               "stride_wn", "stride_wk", "stride_b", "stride_p"])  # fmt: skip
def _gated_dw_kernel(
    dy_ptr, x_ptr,  # [M, N], [M, K]
    w_ptr,  # [N, K], read where NEED_DGATE
    bits_ptr,  # [gate rows, stride_b]
    dw_ptr,  # [N, K] out, contiguous
    dgate_ptr,  # [ceil(N / SUM_N), stride_p] out where NEED_DGATE
    M, N, K,
    stride_dm, stride_dn,
    stride_xm, stride_xk,
    stride_wn, stride_wk,
    stride_b, stride_p,
    NEED_DGATE: tl.constexpr,
    SKIP: tl.constexpr,  # a tile lies in one block; if that is closed nothing is computed
    ALIGNED_DY: tl.constexpr,  # stride_dn is 1; stride_dm and N are multiples of 16
    ALIGNED_X: tl.constexpr,  # stride_xk is 1; stride_xm and K are multiples of 16
    ALIGNED_W: tl.constexpr,  # stride_wk is 1; stride_wn and K are multiples of 16
    ALIGNED_OUT: tl.constexpr,  # K is a multiple of 16
    SOFT_BF16: tl.constexpr, SOFT_DW: tl.constexpr,  # x, w is bf16, by hand
    PRECISION: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,  # weights that a gate covers
    SUM_N: tl.constexpr, SUM_K: tl.constexpr,  # weights that one stored sum covers
    WORDS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    if ALIGNED_DY:
        N = N // 16 * 16
        stride_dm = stride_dm // 16 * 16
        stride_dn = 1
    if ALIGNED_X:
        stride_xm = stride_xm // 16 * 16
        stride_xk = 1
    if ALIGNED_W:
        stride_wn = stride_wn // 16 * 16
        stride_wk = 1
    if ALIGNED_OUT:
        K = K // 16 * 16

    # neighbours share a strip of dy
    pid = tl.program_id(0).to(tl.int64)
    num_k = tl.cdiv(K, BLOCK_K)
    first_n = pid // num_k * BLOCK_N
    first_k = pid % num_k * BLOCK_K
    offs_n = first_n + tl.arange(0, BLOCK_N)
    offs_k = first_k + tl.arange(0, BLOCK_K)
    mask_n = offs_n < N
    mask_k = offs_k < K
    mask = mask_n[:, None] & mask_k[None, :]

    steps = tl.cdiv(M, BLOCK_M)
    if SKIP:
        gate_k = first_k // BK
        word = tl.load(bits_ptr + first_n // BN * stride_b + gate_k // 32)
        is_open = (word >> (gate_k % 32).to(tl.int32)) & 1
        steps *= is_open
        mask &= is_open != 0  # for loads: a closed block is not read

    # dy is read transposed: as a left operand mma.sync's loop pipelines it in no other way
    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for i in range(0, steps):
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

    if NEED_DGATE:
        w = tl.load(
            w_ptr + offs_n[:, None] * stride_wn + offs_k[None, :] * stride_wk,
            mask=mask, other=0.0,
        )  # fmt: skip
        dgate = acc * w.to(tl.float32)
        SUMS_N: tl.constexpr = BLOCK_N // SUM_N
        SUMS_K: tl.constexpr = BLOCK_K // SUM_K
        if SUM_K > 1:
            dgate = tl.sum(tl.reshape(dgate, (BLOCK_N, SUMS_K, SUM_K)), 2)
        if SUM_N > 1:
            dgate = tl.sum(tl.reshape(dgate, (SUMS_N, SUM_N, SUMS_K)), 1)
        sums_n = first_n // SUM_N + tl.arange(0, SUMS_N)
        sums_k = first_k // SUM_K + tl.arange(0, SUMS_K)
        tl.store(
            dgate_ptr + sums_n[:, None] * stride_p + sums_k[None, :],
            dgate,
            mask=(sums_n * SUM_N < N)[:, None] & (sums_k * SUM_K < K)[None, :],
        )
    if not SKIP:  # there acc is 0 where the gate is closed
        gate_n = _gate_of(first_n, offs_n[:, None], BN, BLOCK_N)
        gate_k = _gate_of(first_k, offs_k[None, :], BK, BLOCK_K)
        mask_gate = first_n < N if BN % BLOCK_N == 0 else mask_n[:, None]
        open_ = _read_bits(bits_ptr, gate_n, mask_gate, gate_k, first_k // BK, stride_b, WORDS)
        acc = tl.where(open_, acc, 0.0)
    dw = rounded(acc, dw_ptr.dtype.element_ty, SOFT_DW)
    tl.store(
        dw_ptr + offs_n[:, None] * K + offs_k[None, :],
        dw,
        mask=mask_n[:, None] & mask_k[None, :],
    )


def _product(
    x2: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    block: Sides,
    tile: GatedTile,
    transposed: bool,
    bits: torch.Tensor | None = None,
    blocks: OpenBlocks | None = None,
) -> torch.Tensor:
    """Launch the product kernel; ``blocks`` asks for skipping."""
    (n, k), m = w.shape, len(x2)
    size = k if transposed else n
    out = x2.new_empty(m, size)
    if not out.numel():
        return out
    skip = blocks is not None
    block, (block_n, block_k) = _sides(tile, block, (n, k), skip)
    block_out = block_k if transposed else block_n
    count = index = None
    if blocks is not None:
        count = blocks.row_count if transposed else blocks.count
        index = blocks.row_index if transposed else blocks.index
    grid = (triton.cdiv(m, tile.BLOCK_M) * triton.cdiv(size, block_out),)
    with device_of(x2):
        _gated_product_kernel[grid](
            x2,
            w,
            bits,
            count, index,
            None if bias is None else bias.contiguous(),
            out,
            m, n, k,
            *row_strides(x2),
            *row_strides(w),
            0 if bits is None else bits.shape[1], 0 if index is None else index.shape[1],
            TRANSPOSED=transposed,
            SKIP=skip,
            WEIGHT_LEFT=_weight_left(skip, transposed, block_out),
            HAS_BIAS=bias is not None,
            ALIGNED_X=is_aligned(x2), ALIGNED_W=is_aligned(w), ALIGNED_OUT=size % 16 == 0,
            SOFT_BF16=soft_bf16(x2.dtype, x2.device),
            PRECISION=dot_precision(),
            BN=block[0], BK=block[1],
            WORDS=_words(block[1], block_k),
            BLOCK_M=tile.BLOCK_M, BLOCK_N=block_n, BLOCK_K=block_k,
            **launch_options(x2.device, tile.num_stages, tile.num_warps, tile.max_registers),
        )  # fmt: skip
    return out


def _dw(
    dy2: torch.Tensor,
    x2: torch.Tensor,
    w: torch.Tensor,
    bits: torch.Tensor,
    block: Sides,
    need_dgate: bool,
    tile: GatedTile,
    skip: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the gradients' kernel, and add up the sums of blocks that span several tiles."""
    (n, k), m = w.shape, len(x2)
    dw = torch.empty(n, k, dtype=w.dtype, device=w.device)
    block, (block_n, block_k) = _sides(tile, block, (n, k), skip)
    sum_n, sum_k = _summed(block[0], n, block_n), _summed(block[1], k, block_k)
    shape = (triton.cdiv(n, sum_n), triton.cdiv(k, sum_k)) if need_dgate else (0,)
    sums = torch.empty(shape, dtype=torch.float32, device=w.device)
    if not dw.numel():
        gates = (triton.cdiv(n, block[0]), triton.cdiv(k, block[1])) if need_dgate else (0,)
        return dw, sums.new_empty(gates)
    grid = (triton.cdiv(n, block_n) * triton.cdiv(k, block_k),)
    with device_of(x2):
        _gated_dw_kernel[grid](
            dy2, x2,
            w,
            bits,
            dw,
            sums,
            m, n, k,
            *row_strides(dy2),
            *row_strides(x2),
            *row_strides(w),
            bits.shape[1], shape[-1],
            NEED_DGATE=need_dgate,
            SKIP=skip,
            ALIGNED_DY=is_aligned(dy2), ALIGNED_X=is_aligned(x2), ALIGNED_W=is_aligned(w),
            ALIGNED_OUT=k % 16 == 0,
            SOFT_BF16=soft_bf16(x2.dtype, x2.device), SOFT_DW=soft_bf16(w.dtype, w.device),
            PRECISION=dot_precision(),
            BN=block[0], BK=block[1],
            SUM_N=sum_n, SUM_K=sum_k,
            WORDS=_words(block[1], block_k),
            BLOCK_M=tile.BLOCK_M, BLOCK_N=block_n, BLOCK_K=block_k,
            **launch_options(x2.device, tile.num_stages, tile.num_warps, tile.max_registers),
        )  # fmt: skip
    if not need_dgate:
        return dw, sums
    rest = (triton.cdiv(block[0], sum_n), triton.cdiv(block[1], sum_k))
    return dw, sum_blocks(sums, gate_layout(shape, rest)).contiguous()


def _sides(tile: GatedTile, block: Sides, size: Sides, skip: bool) -> tuple[Sides, Sides]:
    """Sides of a block, and of the tile; where blocks are skipped a tile lies in one of them."""
    sides = (tile.BLOCK_N, tile.BLOCK_K)
    if not skip:
        return block, sides
    # one block may have been cut to the layer's size
    bn, bk = (
        max(16, triton.next_power_of_2(side)) if side >= whole else side
        for side, whole in zip(block, size, strict=True)
    )
    assert fits_kernels((bn, bk)), block
    return (bn, bk), (min(sides[0], bn), min(sides[1], bk))


def _weight_left(skip: bool, transposed: bool, block_out: int) -> bool:
    """Which operand the weight is: matrix units that read a left one take 64 rows at the least.

    A transposed weight is always the left one: mma.sync's loop does not pipeline it as the right.
    """
    return not skip or transposed or block_out >= 64


def _words(side: int, tile: int) -> int:
    """Words of bits that the gates of ``tile`` neighbouring weights can touch."""
    if side % tile == 0:
        return 1
    if tile % side == 0:  # powers of two, so words and tiles begin together
        return max(1, tile // side // 32)
    gates = (tile - 2) // side + 2
    return (gates - 2) // 32 + 2


def _summed(side: int, size: int, tile: int) -> int:
    """Neighbours that a program adds up: what divides both the block's side and the tile's."""
    return tile if side >= size else min(tile, side & -side)
