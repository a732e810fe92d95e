"""Gated weight: ``W * b(g)``, cast to the compute dtype in the same pass.

    out = W * expand(b)        b = 1 if g > 0.5 else 0            (threshold)
                               b ~ Bernoulli(clip(g, 0, 1))       (bernoulli)
    dW = D * expand(b)         dg[block] = sum over the block of D * W     (straight-through)

    out = W * expand(z)        z as :mod:`.kinds` draws it, or as in eval  (hard_concrete)
    dW = D * expand(z)         dg[block] = dz/dg * sum over the block of D * W

with ``D = dL/dout``. A closed weight (``z = 0``) gives exactly 0, also where ``W`` holds inf or
NaN. The gradient of a binary gate is the paper's straight-through one (Srinivas, Subramanya, Babu,
arXiv:1611.06694) whatever the gate's value: not the derivative of a clamp. It is formed and summed
in fp32 or wider. A closed weight gets no gradient but its gate does, so that gates can reopen.

Draws come from a counter-based generator (Philox) keyed by the seed and the gate's index: forward
stores no mask, backward draws it again. The ``torch`` implementation draws from a
``torch.Generator`` with the same seed: repeatable, but another stream.

A block larger than one program's share is cut into parts. Each leaves its own sum of ``D * W``, and
a second pass adds these in fixed order: no float atomics, the same bits on every run.

Per weight at the least, ``w`` bytes for the weight, ``o`` for the result, ``b`` weights a gate:

    mode                        bytes                           FLOPs
    forward                     w + o + 4/b                     0; hard_concrete 1
    backward                    o + w + w + (4 + 4)/b           2; hard_concrete 3
    backward, no gate gradient  o + w + 4/b                     0; hard_concrete 1

fp32 weight, per-weight gates, 16-bit result: 10, 18 and 10 bytes. A draw adds about 100 integer
operations a gate and no bytes. The kernels move just these, and where a block has several parts
8 bytes a part more; weights that are not contiguous are copied first. Gate blocks one column wide
share the rows that they lie in; other narrow blocks (rows under 32 bytes) fetch more than they use.
"""

from __future__ import annotations

from dataclasses import asdict, astuple, dataclass
from typing import NamedTuple

import torch
from torch.utils.flop_counter import register_flop_formula

from ._bf16 import round_to_bf16, soft_bf16
from ._impl import resolve_impl
from ._ops import add_op_namespace_prefix, ops
from ._triton import device_of, is_native, tl, triton
from .blocks import Block, GateLayout, gate_layout
from .gate_torch import binarise as binarise
from .gate_torch import draw_hard_concrete as draw_hard_concrete
from .gate_torch import gate_weight_bwd_torch, gate_weight_fwd_torch
from .kinds import check_gate_kind, hard_concrete, is_open


@dataclass(frozen=True)
class GateTile:
    """What one program of the Triton kernels covers: one gate block, or a part of it.

    Args:
        BLOCK_R: rows at a time, a power of two.
        BLOCK_C: columns, a power of two. Weights with a gate each lie in one row.
        STEPS: how many times ``BLOCK_R`` rows, one after the other.
        num_warps: warps per program.
    """

    BLOCK_R: int
    BLOCK_C: int
    STEPS: int
    num_warps: int


DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def gate_weight(
    w: torch.Tensor,
    gate: torch.Tensor,
    block: Block = (1, 1),
    *,
    groups: int = 1,
    kind: str = "threshold",
    seed: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    impl: str | None = None,
    tile: GateTile | None = None,
) -> torch.Tensor:
    """Multiply a weight by its gates as their kind reads them; differentiable in both.

    Args:
        w: ``[N, K]`` or ``[O, I / groups, *taps]`` fp32 | fp16 | bf16 (fp64 in the ``torch``
            implementation), any strides. Weight.
        gate: fp32, shape as :func:`gate_layout` gives it for ``block``. Gates; read as
            ``clip(gate, 0, 1)``, log alpha of ``"hard_concrete"`` as clipped to +-log 100. Numbers:
            what NaN gives depends on the implementation.
        block: ``(bn, bk)`` weights that one gate covers; ``None`` is the whole dimension.
        groups: of the convolution that the weight belongs to.
        kind: ``"threshold"`` | ``"bernoulli"`` | ``"hard_concrete"``.
        seed: ``[1]`` int64 on ``w``'s device. The draw's seed; needed for ``"bernoulli"``. Without
            it ``"hard_concrete"`` gates are those of eval.
        dtype: of the result; that of ``w`` if ``None``.
        impl: ``"triton"`` | ``"torch"``; chosen by the device if ``None``.
        tile: what one program of the Triton kernels covers; default: by size and device.

    Returns:
        Shape of ``w``, ``dtype``, strides of ``w`` where it fills its memory (a transposed or
        channels-last weight stays that). Backward gives contiguous ``dw`` in ``w``'s dtype and
        ``dgate`` in fp32.

    Raises:
        ValueError: shapes, dtypes, devices, block or kind that do not fit.
    """
    layout = gate_layout(tuple(w.shape), block, groups)
    dtype = dtype or w.dtype
    check_gates(w, gate, layout, kind, seed, dtype)
    unsupported = (
        "fp64 is for the torch implementation" if torch.float64 in (w.dtype, dtype) else None
    )
    impl = resolve_impl(impl, w.device, "gate_weight", unsupported)
    seed = None if kind == "threshold" else seed
    numbers = None if tile is None else list(astuple(tile))
    return _gate_weight_op(w, gate, seed, *layout.block, groups, kind, numbers, dtype, impl)


def gate_weight_ref(
    w: torch.Tensor, b: torch.Tensor, block: Block = (1, 1), groups: int = 1
) -> torch.Tensor:
    """What :func:`gate_weight` computes from multipliers ``b``, element by element.

    Args:
        b: shape as :func:`gate_layout` gives it; bool, or numbers: 0 gives 0 whatever ``w`` holds.
    """
    layout = gate_layout(tuple(w.shape), block, groups)
    out, index = torch.zeros_like(w), layout.gate_shape
    per_group, block_rows = w.shape[0] // groups, index[0] // groups
    for position in torch.cartesian_prod(*[torch.arange(n) for n in w.shape]).tolist():
        n, k, *taps = position
        row = n // per_group * block_rows + n % per_group // layout.block[0]
        taps = [t if size > 1 else 0 for t, size in zip(taps, index[2:], strict=True)]
        multiplier = b[(row, k // layout.block[1], *taps)].item()
        if multiplier:
            out[tuple(position)] = w[tuple(position)].double() * multiplier
    return out


@triton.jit(do_not_specialize=["K", "ROWS", "GATE_ROWS", "GATE_COLS", "BN", "BK", "T"])
def _gate_weight_fwd_kernel(
    w_ptr, gate_ptr, seed_ptr,  # [N, K, T], [gates], [1] in
    out_ptr,  # [N, K, T] out
    K, ROWS, GATE_ROWS, GATE_COLS, BN, BK, T,
    PER_COLUMN: tl.constexpr, UNIT_STEP: tl.constexpr, ALIGNED: tl.constexpr, EVEN: tl.constexpr,
    HARD_CONCRETE: tl.constexpr, DRAW: tl.constexpr, SOFT_BF16: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    # One program covers BLOCK_R * STEPS rows and BLOCK_C columns of one block. PER_COLUMN: the
    # block's columns have a gate each (and the block is a whole strip); else it has one gate.
    # Sizes are not specialised, so a new layer compiles nothing; what wide accesses need comes as
    # a flag, and x // 16 * 16 shows the compiler the multiple.
    if ALIGNED:
        K = K // 16 * 16
        BK = BK // 16 * 16
    block, _, r, c, rows, cols, start, step = _program_share(
        K, ROWS, GATE_ROWS, GATE_COLS, BN, BK, T, UNIT_STEP, BLOCK_R * STEPS, BLOCK_C
    )
    offs_c = c + tl.arange(0, BLOCK_C)
    mask_c = _inside(offs_c, cols, EVEN)
    z, _ = _multipliers(
        gate_ptr, seed_ptr, block, offs_c, mask_c, BK, PER_COLUMN, HARD_CONCRETE, DRAW
    )
    for i in range(STEPS):
        offs_r = r + i * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = _inside(offs_r, rows, EVEN)[:, None] & mask_c[None, :]
        offs = start + (offs_r * K)[:, None] * step + (offs_c * step)[None, :]
        w = tl.load(w_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        out = _gated(w, z, HARD_CONCRETE)
        if SOFT_BF16:
            out = round_to_bf16(out)
        tl.store(out_ptr + offs, out, mask=mask)


@triton.jit(do_not_specialize=["GATES", "K", "ROWS", "GATE_ROWS", "GATE_COLS", "BN", "BK", "T"])
def _gate_weight_bwd_kernel(
    dout_ptr, w_ptr, gate_ptr, seed_ptr,  # [N, K, T], [N, K, T], [gates], [1] in
    dw_ptr, dgate_ptr,  # [N, K, T], [parts, gates] out
    GATES, K, ROWS, GATE_ROWS, GATE_COLS, BN, BK, T,
    PER_COLUMN: tl.constexpr, UNIT_STEP: tl.constexpr, ALIGNED: tl.constexpr, EVEN: tl.constexpr,
    HARD_CONCRETE: tl.constexpr, DRAW: tl.constexpr, SOFT_BF16: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    # as above; each part of a block leaves its own sum, so that no atomics are needed
    if ALIGNED:
        K = K // 16 * 16
        BK = BK // 16 * 16
        if PER_COLUMN:
            GATES = GATES // 16 * 16
    block, part, r, c, rows, cols, start, step = _program_share(
        K, ROWS, GATE_ROWS, GATE_COLS, BN, BK, T, UNIT_STEP, BLOCK_R * STEPS, BLOCK_C
    )
    offs_c = c + tl.arange(0, BLOCK_C)
    mask_c = _inside(offs_c, cols, EVEN)
    z, dz = _multipliers(
        gate_ptr, seed_ptr, block, offs_c, mask_c, BK, PER_COLUMN, HARD_CONCRETE, DRAW
    )
    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for i in range(STEPS):
        offs_r = r + i * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = _inside(offs_r, rows, EVEN)[:, None] & mask_c[None, :]
        offs = start + (offs_r * K)[:, None] * step + (offs_c * step)[None, :]
        dout = tl.load(dout_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        acc += dout * w
        dw = _gated(dout, z, HARD_CONCRETE)
        if SOFT_BF16:
            dw = round_to_bf16(dw)
        tl.store(dw_ptr + offs, dw, mask=mask)
    if PER_COLUMN:
        part = part // tl.cdiv(BK, BLOCK_C)  # parts side by side have other gates
        dgate = tl.sum(acc, 0)
        dgate_ptrs = dgate_ptr + part * GATES + block * BK + offs_c
        if HARD_CONCRETE:  # a closed gate's is 0 also where the weight is not finite
            dgate = tl.where(dz == 0, 0.0, dgate * dz)
        tl.store(dgate_ptrs, dgate, mask=mask_c)
    else:
        dgate = tl.sum(tl.sum(acc, 1), 0)
        if HARD_CONCRETE:
            dgate = tl.where(dz == 0, 0.0, dgate * dz)
        tl.store(dgate_ptr + part * GATES + block, dgate)


@triton.jit
def _inside(offs, size, EVEN: tl.constexpr):
    # a constant mask leaves no trace: cards mask for free, code for the CPU takes 3 times longer
    if EVEN:
        return tl.full(offs.shape, True, tl.int1)
    else:
        return offs < size


@triton.jit
def _program_share(
    K, ROWS, GATE_ROWS, GATE_COLS, BN, BK, T,
    UNIT_STEP: tl.constexpr, SHARE_R: tl.constexpr, SHARE_C: tl.constexpr,
):  # fmt: skip
    # block and part of it; first row and column of the part; the block's rows and columns, the
    # offset of its first weight, and the step between columns
    pid = tl.program_id(0).to(tl.int64)
    parts_c = tl.cdiv(BK, SHARE_C)
    parts = tl.cdiv(BN, SHARE_R) * parts_c
    # cards divide 32 bits several times faster, and a program's index fits
    block = pid.to(tl.int32) // parts
    part = pid.to(tl.int32) % parts
    tap = block % T
    gate_col = block // T % GATE_COLS
    gate_row = block // T // GATE_COLS
    first_row = gate_row % GATE_ROWS * BN
    row = gate_row // GATE_ROWS * ROWS + first_row
    rows = tl.minimum(ROWS - first_row, BN)
    first_col = gate_col.to(tl.int64) * BK
    cols = tl.minimum(K - first_col, BK)
    r = (part // parts_c).to(tl.int64) * SHARE_R
    c = (part % parts_c).to(tl.int64) * SHARE_C
    start = row.to(tl.int64) * K + first_col
    block, part = block.to(tl.int64), part.to(tl.int64)
    if UNIT_STEP:
        return block, part, r, c, rows, cols, start, 1
    else:
        return block, part, r, c, rows, cols, start * T + tap, T


@triton.jit
def _multipliers(
    gate_ptr, seed_ptr, block, offs_c, mask_c, BK,
    PER_COLUMN: tl.constexpr, HARD_CONCRETE: tl.constexpr, DRAW: tl.constexpr,
):  # fmt: skip
    # [BLOCK_C] or scalar: whether the gate is open or z, and dz / dgate
    if PER_COLUMN:
        gate_offs = block * BK + offs_c
        gate = tl.load(gate_ptr + gate_offs, mask=mask_c, other=0.0)
    else:
        gate_offs = block
        gate = tl.load(gate_ptr + gate_offs)
    if HARD_CONCRETE:
        return hard_concrete(gate, gate_offs, seed_ptr, DRAW)
    else:
        return is_open(gate, gate_offs, seed_ptr, DRAW), 1.0


@triton.jit
def _gated(t, z, HARD_CONCRETE: tl.constexpr):
    if HARD_CONCRETE:
        return tl.where(z > 0, t * z, 0.0)
    else:
        return tl.where(z, t, 0.0)


def _gate_weight_fwd(
    w, gate, seed, layout: GateLayout, kind: str, dtype: torch.dtype, tile: GateTile
) -> torch.Tensor:
    """Launch the forward kernel; a result in the strides of ``w``."""
    like = torch.empty_like(w, dtype=dtype)
    if not w.numel():
        return like
    w, gate = _for_kernel(w, layout).contiguous(), gate.contiguous()
    out = torch.empty(w.shape, dtype=_kernel_dtype(dtype, layout, w.device), device=w.device)
    sizes, flags, grid, _ = _launch(layout, kind, seed, tile, w.device)
    with device_of(w):
        _gate_weight_fwd_kernel[grid](
            w, gate, gate if seed is None else seed, out, *sizes,
            **flags, SOFT_BF16=soft_bf16(out.dtype, w.device),
        )  # fmt: skip
    same = out.dtype == dtype and out.stride() == like.stride()
    return out if same else like.copy_(out)


def _gate_weight_bwd(
    dout, w, gate, seed, layout: GateLayout, kind: str, need_dgate: bool, tile: GateTile
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the backward kernel, and add the sums of a block's parts."""
    if not need_dgate:  # then dW = D * b is the forward product
        dw = _gate_weight_fwd(dout.contiguous(), gate, seed, layout, kind, w.dtype, tile)
        return dw, gate.new_empty(0)
    dtype = w.dtype
    if not w.numel():
        return torch.empty(w.shape, dtype=dtype, device=w.device), gate.new_zeros(gate.shape)
    dout, w = _for_kernel(dout, layout).contiguous(), _for_kernel(w, layout).contiguous()
    gate = gate.contiguous()
    sizes, flags, grid, parts = _launch(layout, kind, seed, tile, w.device)
    dw, sums = torch.empty_like(w), gate.new_empty(parts, *gate.shape)
    with device_of(w):
        _gate_weight_bwd_kernel[grid](
            dout, w, gate, gate if seed is None else seed, dw, sums, gate.numel(), *sizes,
            **flags, SOFT_BF16=soft_bf16(dw.dtype, w.device),
        )  # fmt: skip
    return dw.to(dtype), sums.sum(0) if parts > 1 else sums[0]


class _Sizes(NamedTuple):
    """What the kernels are told of a layout: blocks of ``BN`` rows and ``BK`` columns."""

    K: int  # columns; in memory a row is K * T weights long
    ROWS: int  # of a group, as GATE_ROWS
    GATE_ROWS: int
    GATE_COLS: int
    BN: int
    BK: int
    T: int  # taps that have gates of their own: neighbouring columns lie T weights apart


def _sizes(layout: GateLayout) -> tuple[_Sizes, bool]:
    """The kernels' sizes, and whether each column of their blocks has its own gate."""
    rows, gate_rows = layout.weight_shape[0], layout.gate_shape[0]
    rows, gate_rows = rows // layout.groups, gate_rows // layout.groups
    (bn, bk), k, taps = layout.block, layout.weight_shape[1], layout.taps
    if layout.per_weight:  # one long row
        numel = layout.weight_shape[0] * k * taps
        return _Sizes(numel, 1, 1, 1, 1, numel, 1), True
    if bk == 1 and layout.gate_taps == taps:  # gates side by side, as the columns are
        return _Sizes(k * taps, rows, gate_rows, 1, bn, k * taps, 1), True
    if layout.gate_taps == 1:  # taps that share a gate are columns
        return _Sizes(k * taps, rows, gate_rows, layout.gate_shape[1], bn, bk * taps, 1), False
    return _Sizes(k, rows, gate_rows, layout.gate_shape[1], bn, bk, taps), False


def tile_for_gate_weight(layout: GateLayout, device: torch.device) -> GateTile:
    """A tile that every card can run; reasoned, not measured, but for the CPU compiler's.

    A card: 8 weights a thread (16 bytes of a 16-bit dtype), 16 from 2048 weights on. A block of
    up to 4 tiles is one program's, so that its sum takes no second stage; beside gates that lie
    in one row a tile has as many rows as it can, since each part leaves a row of sums. The CPU's
    compiler unrolls the tile.
    """
    sizes, per_column = _sizes(layout)
    rows, cols = triton.next_power_of_2(sizes.BN), triton.next_power_of_2(sizes.BK)
    if is_native(device):
        if layout.per_weight:
            return GateTile(1, 32, 1, 1)  # wider tiles outgrow the registers
        return GateTile(4, 16, min(-(-sizes.BN // 4), 16), 1)
    if per_column:
        cols = min(cols, max(64, 1024 // rows))
    cols = min(max(cols, 1), 4096)
    rows = min(rows, 4096 // cols)
    steps = -(-sizes.BN // rows)
    warps = min(max(rows * cols // 256, 1), 8)
    return GateTile(rows, cols, steps if steps <= 4 else 1, warps)


def _launch(
    layout: GateLayout, kind: str, seed: torch.Tensor | None, tile: GateTile, device: torch.device
):
    """Sizes, flags and grid of a launch, and the parts in which a gate is summed."""
    sizes, per_column = _sizes(layout)
    blocks = layout.groups * sizes.GATE_ROWS * sizes.GATE_COLS * sizes.T
    blocks = 1 if layout.per_weight else blocks
    parts = triton.cdiv(sizes.BN, tile.BLOCK_R * tile.STEPS)
    parts_c = triton.cdiv(sizes.BK, tile.BLOCK_C)
    flags = {
        "PER_COLUMN": per_column,
        "UNIT_STEP": sizes.T == 1,
        "ALIGNED": sizes.T == 1 and sizes.K % 16 == 0 and sizes.BK % 16 == 0,
        "EVEN": is_native(device)
        and sizes.BK % tile.BLOCK_C == sizes.BN % (tile.BLOCK_R * tile.STEPS) == 0
        and sizes.K % sizes.BK == sizes.ROWS % sizes.BN == 0,
        "HARD_CONCRETE": kind == "hard_concrete",
        "DRAW": seed is not None,
        **asdict(tile),
    }
    return sizes, flags, (blocks * parts * parts_c,), parts if per_column else parts * parts_c


def _kernel_dtype(dtype: torch.dtype, layout: GateLayout, device: torch.device) -> torch.dtype:
    """What the kernels read and store: strided bf16 needs what gcc before 13 lacks on the CPU."""
    strided = _sizes(layout)[0].T > 1
    return torch.float32 if strided and is_native(device) and dtype == torch.bfloat16 else dtype


def _for_kernel(t: torch.Tensor, layout: GateLayout) -> torch.Tensor:
    return t.to(_kernel_dtype(t.dtype, layout, t.device))


def gate_weight_fwd(
    w, gate, seed, layout: GateLayout, kind: str, dtype: torch.dtype, impl: str, tile=None
) -> torch.Tensor:
    """The gated weight by either implementation, outside of autograd."""
    if impl == "torch":
        return gate_weight_fwd_torch(w, gate, seed, layout, kind, dtype)
    return _gate_weight_fwd(w, gate, seed, layout, kind, dtype, _tile(tile, layout, w.device))


def gate_weight_bwd(
    dout, w, gate, seed, layout: GateLayout, kind: str, need_dgate: bool, impl: str, tile=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of weight and gates by either implementation, outside of autograd."""
    if impl == "torch":
        return gate_weight_bwd_torch(dout, w, gate, seed, layout, kind, need_dgate)
    numbers = _tile(tile, layout, w.device)
    return _gate_weight_bwd(dout, w, gate, seed, layout, kind, need_dgate, numbers)


@torch.library.custom_op(add_op_namespace_prefix("gate_weight"), mutates_args=())
def _gate_weight_op(
    w: torch.Tensor,
    gate: torch.Tensor,
    seed: torch.Tensor | None,
    bn: int,
    bk: int,
    groups: int,
    kind: str,
    tile: list[int] | None,
    dtype: torch.dtype,
    impl: str,
) -> torch.Tensor:
    layout = GateLayout(tuple(w.shape), tuple(gate.shape), (bn, bk), groups)
    return gate_weight_fwd(w, gate, seed, layout, kind, dtype, impl, tile)


@_gate_weight_op.register_fake
def _(w, gate, seed, bn, bk, groups, kind, tile, dtype, impl):
    return torch.empty_like(w, dtype=dtype)


@torch.library.custom_op(add_op_namespace_prefix("gate_weight_bwd"), mutates_args=())
def _gate_weight_bwd_op(
    dout: torch.Tensor,
    w: torch.Tensor,
    gate: torch.Tensor,
    seed: torch.Tensor | None,
    bn: int,
    bk: int,
    groups: int,
    kind: str,
    tile: list[int] | None,
    impl: str,
    need_dgate: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    layout = GateLayout(tuple(w.shape), tuple(gate.shape), (bn, bk), groups)
    return gate_weight_bwd(dout, w, gate, seed, layout, kind, need_dgate, impl, tile)


@_gate_weight_bwd_op.register_fake
def _(dout, w, gate, seed, bn, bk, groups, kind, tile, impl, need_dgate):
    dw = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    return dw, torch.empty(gate.shape if need_dgate else 0, dtype=gate.dtype, device=gate.device)


def _setup_context(ctx, inputs, output):
    w, gate, seed, *ctx.static, _, ctx.impl = inputs
    ctx.save_for_backward(w, gate, seed)


def _backward(ctx, dout):
    need_dgate = ctx.needs_input_grad[1]
    dw, dgate = _gate_weight_bwd_op(dout, *ctx.saved_tensors, *ctx.static, ctx.impl, need_dgate)
    return dw, dgate if need_dgate else None, *[None] * 8


_gate_weight_op.register_autograd(_backward, setup_context=_setup_context)


def _tile(numbers: list[int] | None, layout: GateLayout, device: torch.device) -> GateTile:
    return GateTile(*numbers) if numbers else tile_for_gate_weight(layout, device)


@register_flop_formula([ops.gate_weight, ops.gate_weight_bwd])
def _gate_weight_flops(*shapes, out_shape=None, **kwargs) -> int:
    """None: PyTorch's counter leaves out element-wise work."""
    return 0


def check_gates(w, gate, layout: GateLayout, kind: str, seed, dtype: torch.dtype) -> None:
    """Raise ``ValueError`` where weight, gates and seed do not fit each other."""
    check_gate_kind(kind)
    for name, given in (("w", w.dtype), ("dtype", dtype)):
        if given not in DTYPES:
            raise ValueError(f"{name} must be one of {DTYPES}, got {given}")
    if gate.dtype != torch.float32:
        raise ValueError(f"gate must be torch.float32, got {gate.dtype}")
    if tuple(gate.shape) != layout.gate_shape:
        raise ValueError(
            f"gate of a weight {layout.weight_shape} in blocks {layout.block} must have shape "
            f"{layout.gate_shape}, got {tuple(gate.shape)}"
        )
    if gate.device != w.device:
        raise ValueError(f"w and gate must share a device, got {w.device} and {gate.device}")
    if kind == "bernoulli" and seed is None:
        raise ValueError("kind 'bernoulli' needs a seed, got None")
    if seed is None or kind == "threshold":
        return
    if not isinstance(seed, torch.Tensor):
        raise ValueError(f"seed must be one int64 on {w.device}, got {type(seed).__name__} {seed}")
    if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != w.device:
        raise ValueError(
            f"seed must be one int64 on {w.device}, got {tuple(seed.shape)} {seed.dtype} "
            f"on {seed.device}"
        )
