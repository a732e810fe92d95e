"""Gated weight: ``W * b(g)``, cast to the compute dtype in the same pass.

    out = W * expand(b)        b = 1 if g > 0.5 else 0            (threshold)
                               b ~ Bernoulli(clip(g, 0, 1))       (bernoulli)
    dW = D * expand(b)         dg[block] = sum over the block of D * W     (straight-through)

with ``D = dL/dout``. A closed weight gives exactly 0, also where ``W`` holds inf or NaN. The
gradient of the gate is the paper's straight-through one (Srinivas, Subramanya, Babu,
arXiv:1611.06694) whatever the gate's value: not the derivative of a clamp. It is formed and summed
in fp32 or wider. A closed weight gets no gradient but its gate does, so that gates can reopen.

Bernoulli draws come from a counter-based generator (Philox) keyed by the seed and the gate's index:
forward stores no mask, backward draws it again. The ``torch`` implementation draws from a
``torch.Generator`` with the same seed: repeatable, but another stream.

Bytes moved per weight at the least, fp32 weight and per-weight fp32 gate, 16-bit result: forward
4 + 4 + 2, backward 2 + 4 + 4 + 4 + 4; the kernels move just these.
"""

from __future__ import annotations

import torch

from ._bf16 import round_to_bf16, soft_bf16
from ._impl import resolve_impl
from ._ops import add_op_namespace_prefix
from ._triton import INTERPRETED, device_of, tl, triton
from .blocks import Block, GateLayout, expand_gates, gate_layout, sum_blocks
from .kinds import check_gate_kind, is_open

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
) -> torch.Tensor:
    """Multiply a weight by its binarised gates; differentiable in both (straight-through).

    Args:
        w: ``[N, K]`` or ``[O, I / groups, *taps]`` fp32 | fp16 | bf16 (fp64 in the ``torch``
            implementation), any strides. Weight.
        gate: fp32, shape as :func:`gate_layout` gives it for ``block``. Gates; read as
            ``clip(gate, 0, 1)``.
        block: ``(bn, bk)`` weights that one gate covers; ``None`` is the whole dimension.
        groups: of the convolution that the weight belongs to.
        kind: ``"threshold"`` | ``"bernoulli"``.
        seed: ``[1]`` int64 on ``w``'s device. The draw's seed; needed for ``"bernoulli"``.
        dtype: of the result; that of ``w`` if ``None``.
        impl: ``"triton"`` | ``"torch"``; chosen by the device if ``None``.

    Returns:
        Shape of ``w``, ``dtype``, strides of ``w`` where it fills its memory (a transposed or
        channels-last weight stays that). Backward gives contiguous ``dw`` in ``w``'s dtype and
        ``dgate`` in fp32.

    Raises:
        ValueError: shapes, dtypes, devices, block or kind that do not fit.
    """
    layout = gate_layout(tuple(w.shape), block, groups)
    dtype = dtype or w.dtype
    _check(w, gate, layout, kind, seed, dtype)
    unsupported = (
        "fp64 is for the torch implementation" if torch.float64 in (w.dtype, dtype) else None
    )
    impl = resolve_impl(impl, w.device, "gate_weight", unsupported)
    seed = seed if kind == "bernoulli" else None
    return _gate_weight_op(w, gate, seed, *layout.block, groups, dtype, impl)


def gate_weight_ref(
    w: torch.Tensor, b: torch.Tensor, block: Block = (1, 1), groups: int = 1
) -> torch.Tensor:
    """What :func:`gate_weight` computes from binary gates ``b``, element by element."""
    layout = gate_layout(tuple(w.shape), block, groups)
    out, index = torch.zeros_like(w), layout.gate_shape
    per_group, block_rows = w.shape[0] // groups, index[0] // groups
    for position in torch.cartesian_prod(*[torch.arange(n) for n in w.shape]).tolist():
        n, k, *taps = position
        row = n // per_group * block_rows + n % per_group // layout.block[0]
        taps = [t if size > 1 else 0 for t, size in zip(taps, index[2:], strict=True)]
        if b[(row, k // layout.block[1], *taps)]:
            out[tuple(position)] = w[tuple(position)]
    return out


def binarise(gate: torch.Tensor, kind: str, seed: torch.Tensor | None = None) -> torch.Tensor:
    """The open gates as a bool mask, as the ``torch`` implementation reads or draws them.

    Args:
        gate: any shape fp32.
        kind: ``"threshold"`` | ``"bernoulli"``.
        seed: ``[1]`` int64, for ``"bernoulli"``.
    """
    if kind == "threshold":
        return gate > 0.5
    assert seed is not None
    generator = torch.Generator(gate.device).manual_seed(int(seed))
    draw = torch.rand(gate.shape, generator=generator, device=gate.device)
    return draw < gate  # draws lie in [0, 1): exact at gates of 0 and 1, and beyond


@triton.jit(do_not_specialize=["numel"])
def _gate_weight_fwd_kernel(
    w_ptr, gate_ptr, seed_ptr,  # [numel], [numel], [1] in
    out_ptr,  # [numel] out
    numel,
    BERNOULLI: tl.constexpr, SOFT_BF16: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # each weight has its own gate
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    w = tl.load(w_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + offs, mask=mask, other=0.0)
    open_ = is_open(gate, offs, seed_ptr, BERNOULLI)
    out = tl.where(open_, w, 0.0)
    if SOFT_BF16:
        out = round_to_bf16(out)
    tl.store(out_ptr + offs, out, mask=mask)


@triton.jit(do_not_specialize=["numel"])
def _gate_weight_bwd_kernel(
    dout_ptr, w_ptr, gate_ptr, seed_ptr,  # [numel], [numel], [numel], [1] in
    dw_ptr, dgate_ptr,  # [numel] out
    numel,
    BERNOULLI: tl.constexpr, SOFT_BF16: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    dout = tl.load(dout_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + offs, mask=mask, other=0.0)
    open_ = is_open(gate, offs, seed_ptr, BERNOULLI)
    dw = tl.where(open_, dout, 0.0)
    if SOFT_BF16:
        dw = round_to_bf16(dw)
    tl.store(dw_ptr + offs, dw, mask=mask)
    tl.store(dgate_ptr + offs, dout * w, mask=mask)


@triton.jit(do_not_specialize=["K", "ROWS", "GATE_ROWS", "GATE_COLS", "BN", "BK", "T", "TG"])
def _gate_weight_fwd_block_kernel(
    w_ptr, gate_ptr, seed_ptr,  # [N, K, T], [gates], [1] in
    out_ptr,  # [N, K, T] out
    K, ROWS, GATE_ROWS, GATE_COLS,  # input channels; output channels and gate rows of a group
    BN, BK, T, TG,  # block; taps of the weight and of the gate
    BERNOULLI: tl.constexpr, SOFT_BF16: tl.constexpr, UNIT_STEP: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # One program a gate: its value is a scalar and its weights lie in rows, so that nothing is
    # gathered; the element-wise kernel's flat grid has no such structure.
    gate_id = tl.program_id(0).to(tl.int64)
    start, rows, cols, step = _gate_block(
        gate_id, K, ROWS, GATE_ROWS, GATE_COLS, BN, BK, T, TG, UNIT_STEP
    )
    open_ = is_open(tl.load(gate_ptr + gate_id), gate_id, seed_ptr, BERNOULLI)
    for r in range(0, rows, BLOCK_R):
        offs_r = r + tl.arange(0, BLOCK_R)
        for c in range(0, cols, BLOCK_C):
            offs_c = c + tl.arange(0, BLOCK_C)
            mask = (offs_r < rows)[:, None] & (offs_c < cols)[None, :]
            offs = start + offs_r.to(tl.int64)[:, None] * K * T + (offs_c * step)[None, :]
            w = tl.load(w_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            out = tl.where(open_, w, 0.0)
            if SOFT_BF16:
                out = round_to_bf16(out)
            tl.store(out_ptr + offs, out, mask=mask)


@triton.jit(do_not_specialize=["K", "ROWS", "GATE_ROWS", "GATE_COLS", "BN", "BK", "T", "TG"])
def _gate_weight_bwd_block_kernel(
    dout_ptr, w_ptr, gate_ptr, seed_ptr,  # [N, K, T], [N, K, T], [gates], [1] in
    dw_ptr, dgate_ptr,  # [N, K, T], [gates] out
    K, ROWS, GATE_ROWS, GATE_COLS,
    BN, BK, T, TG,
    BERNOULLI: tl.constexpr, SOFT_BF16: tl.constexpr, UNIT_STEP: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # one program a gate: the block's sum needs neither atomics nor a second pass
    gate_id = tl.program_id(0).to(tl.int64)
    start, rows, cols, step = _gate_block(
        gate_id, K, ROWS, GATE_ROWS, GATE_COLS, BN, BK, T, TG, UNIT_STEP
    )
    open_ = is_open(tl.load(gate_ptr + gate_id), gate_id, seed_ptr, BERNOULLI)
    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for r in range(0, rows, BLOCK_R):
        offs_r = r + tl.arange(0, BLOCK_R)
        for c in range(0, cols, BLOCK_C):
            offs_c = c + tl.arange(0, BLOCK_C)
            mask = (offs_r < rows)[:, None] & (offs_c < cols)[None, :]
            offs = start + offs_r.to(tl.int64)[:, None] * K * T + (offs_c * step)[None, :]
            dout = tl.load(dout_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            w = tl.load(w_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            acc += dout * w
            dw = tl.where(open_, dout, 0.0)
            if SOFT_BF16:
                dw = round_to_bf16(dw)
            tl.store(dw_ptr + offs, dw, mask=mask)
    tl.store(dgate_ptr + gate_id, tl.sum(tl.sum(acc, 1), 0))


@triton.jit
def _gate_block(
    gate_id, K, ROWS, GATE_ROWS, GATE_COLS, BN, BK, T, TG, UNIT_STEP: tl.constexpr
):  # fmt: skip
    # offset of the block's first weight, its rows, its columns and the step between these
    tap = gate_id % TG
    gate_col = gate_id // TG % GATE_COLS
    gate_row = gate_id // TG // GATE_COLS
    first_row = gate_row % GATE_ROWS * BN
    row = gate_row // GATE_ROWS * ROWS + first_row
    rows = tl.minimum(ROWS - first_row, BN)
    cols = tl.minimum(K - gate_col * BK, BK)
    start = (row * K + gate_col * BK) * T + tap
    if UNIT_STEP:  # no taps, or taps that share the gate: they lie side by side
        return start, rows.to(tl.int32), (cols * T).to(tl.int32), 1
    else:
        return start, rows.to(tl.int32), cols.to(tl.int32), T


def _fwd_triton(w, gate, seed, layout: GateLayout, dtype) -> torch.Tensor:
    like = torch.empty_like(w, dtype=dtype)
    w, gate = _for_kernel(w, layout).contiguous(), gate.contiguous()
    out = torch.empty(w.shape, dtype=_kernel_dtype(dtype, layout, w.device), device=w.device)
    if not w.numel():
        return like
    seed_ptr, bernoulli = (gate, False) if seed is None else (seed, True)
    with device_of(w):
        if layout.per_weight:
            block = _flat_block(w.device)
            _gate_weight_fwd_kernel[(triton.cdiv(w.numel(), block),)](
                w, gate, seed_ptr, out, w.numel(),
                BERNOULLI=bernoulli, SOFT_BF16=soft_bf16(out.dtype, w.device), BLOCK=block,
            )  # fmt: skip
        else:
            _gate_weight_fwd_block_kernel[(gate.numel(),)](
                w, gate, seed_ptr, out, *_block_sizes(layout),
                BERNOULLI=bernoulli, SOFT_BF16=soft_bf16(out.dtype, w.device),
                **_block_tile(layout, w.device),
            )  # fmt: skip
    same = out.dtype == dtype and out.stride() == like.stride()
    return out if same else like.copy_(out)


def _bwd_triton(dout, w, gate, seed, layout: GateLayout, need_dgate: bool):
    if not need_dgate:  # then dW = D * b is the forward product
        dw = _fwd_triton(dout.contiguous(), gate, seed, layout, w.dtype)
        return dw, gate.new_empty(0)
    dtype = w.dtype
    dout, w = _for_kernel(dout, layout).contiguous(), _for_kernel(w, layout).contiguous()
    gate = gate.contiguous()
    dw, dgate = torch.empty_like(w), torch.empty_like(gate)
    if not w.numel():
        return dw.to(dtype), dgate.zero_()
    seed_ptr, bernoulli = (gate, False) if seed is None else (seed, True)
    with device_of(w):
        if layout.per_weight:
            block = _flat_block(w.device)
            _gate_weight_bwd_kernel[(triton.cdiv(w.numel(), block),)](
                dout, w, gate, seed_ptr, dw, dgate, w.numel(),
                BERNOULLI=bernoulli, SOFT_BF16=soft_bf16(dw.dtype, w.device), BLOCK=block,
            )  # fmt: skip
        else:
            _gate_weight_bwd_block_kernel[(gate.numel(),)](
                dout, w, gate, seed_ptr, dw, dgate, *_block_sizes(layout),
                BERNOULLI=bernoulli, SOFT_BF16=soft_bf16(dw.dtype, w.device),
                **_block_tile(layout, w.device),
            )  # fmt: skip
    return dw.to(dtype), dgate


def _block_sizes(layout: GateLayout) -> tuple[int, ...]:
    """``K, ROWS, GATE_ROWS, GATE_COLS, BN, BK, T, TG`` of the block kernels."""
    rows, gate_rows = layout.weight_shape[0], layout.gate_shape[0]
    return (
        layout.weight_shape[1], rows // layout.groups, gate_rows // layout.groups,
        layout.gate_shape[1], *layout.block, layout.taps, layout.gate_taps,
    )  # fmt: skip


def _flat_block(device: torch.device) -> int:
    """Elements a program: 16 bytes a lane on a card; a CPU's compiler unrolls the tile."""
    return 256 if _native(device) else 1024


def _block_tile(layout: GateLayout, device: torch.device) -> dict[str, int | bool]:
    rows, cols = (4, 16) if _native(device) else (16, 32)
    return {"UNIT_STEP": _unit_step(layout), "BLOCK_R": rows, "BLOCK_C": cols}


def _unit_step(layout: GateLayout) -> bool:
    return layout.taps == 1 or layout.gate_taps == 1


def _kernel_dtype(dtype: torch.dtype, layout: GateLayout, device: torch.device) -> torch.dtype:
    """What the kernels read and store: strided bf16 needs what gcc before 13 lacks on the CPU."""
    strided = not layout.per_weight and not _unit_step(layout)
    return torch.float32 if strided and _native(device) and dtype == torch.bfloat16 else dtype


def _for_kernel(t: torch.Tensor, layout: GateLayout) -> torch.Tensor:
    return t.to(_kernel_dtype(t.dtype, layout, t.device))


def _native(device: torch.device) -> bool:
    return device.type == "cpu" and not INTERPRETED


def _fwd_torch(w, gate, seed, layout: GateLayout, dtype) -> torch.Tensor:
    is_open = expand_gates(_mask(gate, seed), layout)
    return torch.empty_like(w, dtype=dtype).copy_(w).masked_fill_(~is_open, 0)


def _bwd_torch(dout, w, gate, seed, layout: GateLayout, need_dgate: bool):
    is_open = expand_gates(_mask(gate, seed), layout)
    dw = torch.where(is_open, dout, dout.new_zeros(())).to(w.dtype).contiguous()
    if not need_dgate:
        return dw, gate.new_empty(0)
    wide = torch.promote_types(w.dtype, torch.float32)
    dgate = sum_blocks(dout.to(wide) * w.to(wide), layout)
    return dw, dgate.to(gate.dtype).contiguous()


def _mask(gate: torch.Tensor, seed: torch.Tensor | None) -> torch.Tensor:
    return binarise(gate, "threshold" if seed is None else "bernoulli", seed)


@torch.library.custom_op(add_op_namespace_prefix("gate_weight"), mutates_args=())
def _gate_weight_op(
    w: torch.Tensor,
    gate: torch.Tensor,
    seed: torch.Tensor | None,
    bn: int,
    bk: int,
    groups: int,
    dtype: torch.dtype,
    impl: str,
) -> torch.Tensor:
    layout = GateLayout(tuple(w.shape), tuple(gate.shape), (bn, bk), groups)
    forward = _fwd_triton if impl == "triton" else _fwd_torch
    return forward(w, gate, seed, layout, dtype)


@_gate_weight_op.register_fake
def _(w, gate, seed, bn, bk, groups, dtype, impl):
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
    impl: str,
    need_dgate: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    layout = GateLayout(tuple(w.shape), tuple(gate.shape), (bn, bk), groups)
    backward = _bwd_triton if impl == "triton" else _bwd_torch
    return backward(dout, w, gate, seed, layout, need_dgate)


@_gate_weight_bwd_op.register_fake
def _(dout, w, gate, seed, bn, bk, groups, impl, need_dgate):
    dw = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    return dw, torch.empty(gate.shape if need_dgate else 0, dtype=gate.dtype, device=gate.device)


def _setup_context(ctx, inputs, output):
    w, gate, seed, *ctx.static, _, ctx.impl = inputs
    ctx.save_for_backward(w, gate, seed)


def _backward(ctx, dout):
    need_dgate = ctx.needs_input_grad[1]
    dw, dgate = _gate_weight_bwd_op(dout, *ctx.saved_tensors, *ctx.static, ctx.impl, need_dgate)
    return dw, dgate if need_dgate else None, None, None, None, None, None, None


_gate_weight_op.register_autograd(_backward, setup_context=_setup_context)


def _check(w, gate, layout: GateLayout, kind: str, seed, dtype: torch.dtype) -> None:
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
    if kind == "bernoulli":
        if seed is None:
            raise ValueError("kind 'bernoulli' needs a seed, got None")
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != w.device:
            raise ValueError(
                f"seed must be one int64 on {w.device}, got {tuple(seed.shape)} {seed.dtype} "
                f"on {seed.device}"
            )
