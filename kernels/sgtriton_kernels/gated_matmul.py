"""Linear layer whose weight is multiplied by gates: ``x @ (W * b)^T + bias``.

    y  = x (W * b)^T + bias          dx = dy (W * b)          D = dy^T x
    dW = D * b                       dg[block] = sum over the block of D * W     (straight-through)

What it gives is ``F.linear(x, gate_weight(W, g), bias)``; what it saves for backward beside its
inputs is one bit per gate at most, and the seed: autograd's own would keep the gated weight and
more. Three methods compute it:

- *multiply*: the gated weight is formed in memory that is used again, and a library multiplies.
- *fused*: the gates are applied inside the product, as bits (Triton).
- *skip*: gates that cover blocks; closed blocks take part in no product. Their gates' gradient is
  exact all the same, which needs the dense ``D``: at most 2.5 times faster at 90 % closed.
  ``reopen=False`` leaves it out, for all but each k-th step; frozen gates need none.

FLOPs at the least, with a share ``d`` of the weights open: ``2 d M N K`` each for y and dx;
``2 M N K`` for dW and dg, ``2 d M N K`` where closed gates need no gradient. *multiply* and *fused*
take ``2 M N K`` for each. Bytes: ``M K + M N`` activations once for each of the three products; the
weight and the gates once in forward, once for dx and once for dg, dW and dg written once.
*multiply* writes the gated weight and reads it back, twice in all; *fused* reads gates as bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from . import gated_torch
from ._autocast import cast_inputs, without_autocast
from ._impl import resolve_impl
from ._operands import is_aligned
from ._ops import grads_with_graph, is_watched, register_op
from ._triton import is_native
from .blocks import Block, GateLayout, expand_gates, gate_layout
from .gate import check_gates, gate_weight, gate_weight_bwd, gate_weight_fwd
from .gate_bits import open_lists, pack_gates
from .gated_candidates import METHODS, by_shape, why_not
from .gated_choice import fuses_long, method_for
from .gated_product import fused_dw, fused_dx, fused_fwd, skip_dw, skip_dx, skip_fwd
from .tiles import GatedTile, tile_for_gated_linear

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def gated_linear(
    x: torch.Tensor,
    w: torch.Tensor,
    gate: torch.Tensor,
    bias: torch.Tensor | None = None,
    block: Block = (1, 1),
    *,
    kind: str = "threshold",
    seed: torch.Tensor | None = None,
    reopen: bool = True,
    method: str | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """Linear layer with a gated weight; differentiable in ``x, w, gate, bias``.

    Under autocast ``x`` and ``bias`` are cast to its dtype as for ``F.linear``; ``w`` is cast on
    the way into the product and its gradient comes in its own dtype.

    Args:
        x: ``[..., K]`` fp32 | fp16 | bf16 (fp64 in the ``torch`` implementation), any strides.
        w: ``[N, K]``, dtype of ``x`` or another (fp64 with fp64 only), any strides. Weight; read as
            rounded to the dtype of ``x``.
        gate: fp32, shape as :func:`.gate_layout` gives it for ``block``. Gates; numbers: what NaN
            gives depends on implementation and method.
        bias: ``[N]``, dtype of ``x``.
        block: ``(bn, bk)`` weights that one gate covers; ``None`` is the whole dimension.
        kind: ``"threshold"`` | ``"bernoulli"`` | ``"hard_concrete"``.
        seed: ``[1]`` int64 on ``x``'s device: the draw's seed. ``hard_concrete`` without one is as
            in eval.
        reopen: whether closed gates get their gradient. ``False``, for ``threshold`` only, leaves
            it 0, and of ``dW`` only open blocks are computed.
        method: ``"multiply"`` | ``"fused"`` | ``"skip"``; looked up if ``None``: what was measured
            of such a layer, else by shape, and on a CPU by the number of open blocks. Backward
            takes what forward took. Calls that are traced look nothing up: their method is by shape
            and open blocks alone, so that backward finds the same again.
        impl: ``"triton"`` | ``"torch"``; chosen by the device if ``None``.

    Returns:
        ``[..., N]``, dtype of ``x``, contiguous.

    Raises:
        ValueError: shapes, dtypes, devices, kind, method or implementation that do not fit.
    """
    layout = gate_layout(tuple(w.shape), block)
    if w.dim() != 2:
        raise ValueError(f"w must be [N, K], got {list(w.shape)}")
    device = x.device
    x, bias = cast_inputs(device, x, bias)
    check_gates(w, gate, layout, kind, seed, w.dtype)
    _check(x, w, bias, kind, reopen)
    unsupported = None
    if torch.float64 in (x.dtype, w.dtype):
        unsupported = "fp64 is for the torch implementation"
    impl = resolve_impl(impl, device, "gated_linear", unsupported)
    if method is not None:
        _check_method(method, impl, kind, layout)
    tensors = (x, w, gate, bias, seed if kind != "threshold" else None)
    watched = is_watched(*tensors)
    if method is None:
        method = "auto" if watched else method_for(x, w, gate, layout, kind, reopen, impl)
    static = (*layout.block, kind, reopen, method, impl)
    if watched:
        return _gated_linear_op(*tensors, *static)[0]
    return _GatedLinear.apply(*tensors, static)


def gated_linear_ref(
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    block: Block = (1, 1),
) -> torch.Tensor:
    """What :func:`gated_linear` computes, from the gates' values ``b``, in fp64."""
    layout = gate_layout(tuple(w.shape), block)
    b = expand_gates(b.double(), layout)
    y = x.double() @ torch.where(b == 0, 0.0, w.double() * b).T
    return (y if bias is None else y + bias.double()).to(x.dtype)


def _multiply_fwd(x2, w, gate, bias, seed, layout: GateLayout, kind: str, impl: str):
    return F.linear(x2, gate_weight_fwd(w, gate, seed, layout, kind, x2.dtype, impl), bias)


def _multiply_bwd(dy2, x2, w, gate, seed, layout: GateLayout, kind: str, needs, impl: str):
    need_dx, need_dw, need_dgate = needs
    dx = dw = dgate = None
    if need_dx:
        dx = dy2 @ gate_weight_fwd(w, gate, seed, layout, kind, dy2.dtype, impl)
    if need_dw or need_dgate:
        d = dy2.T @ x2
        dw, dgate = gate_weight_bwd(d, w, gate, seed, layout, kind, need_dgate, impl)
    return dx, dw, dgate


def _forward_triton(x2, w, gate, bias, seed, bits, layout: GateLayout, kind: str, method: str):
    """``y``; fills ``bits``, which *fused* and *skip* read."""
    block = layout.block
    method = _choose_triton(method, layout, kind, x2)
    if method == "multiply":
        bits.zero_()  # nothing reads them, but they are an output
        return _multiply_fwd(x2, w, gate, bias, seed, layout, kind, "triton")
    bits.copy_(pack_gates(gate, kind, seed))
    tile = _tile("fwd" if method == "fused" else "skip_fwd", layout, w, x2)
    if method == "fused":
        return fused_fwd(x2, w, bits, block, bias, tile)
    return skip_fwd(x2, w, open_lists(bits, gate.shape[1]), block, bias, tile)


def _backward_triton(dy2, x2, w, gate, seed, bits, layout: GateLayout, kind, method, needs, reopen):
    block = layout.block
    method = _choose_triton(method, layout, kind, x2)
    need_dx, need_dw, need_dgate = needs
    dx = dw = dgate = None
    if method == "multiply":
        dx, dw, dgate = _multiply_bwd(dy2, x2, w, gate, seed, layout, kind, needs, "triton")
    else:
        if need_dx and method == "fused":
            dx = fused_dx(dy2, w, bits, block, _tile("dx", layout, w, dy2))
        elif need_dx:
            lists = open_lists(bits, gate.shape[1])
            dx = skip_dx(dy2, w, lists, block, _tile("skip_dx", layout, w, dy2))
        sampled = method == "skip" and not (need_dgate and reopen)
        if need_dw or need_dgate:
            dw_of = skip_dw if sampled else fused_dw
            tile = _tile("skip_dw" if sampled else "dw", layout, w, dy2, x2)
            dw, dgate = dw_of(dy2, x2, w, bits, block, need_dgate, tile)
    if dgate is not None and need_dgate and not reopen:
        dgate = torch.where(gate > 0.5, dgate, 0.0)
    return dx, dw, dgate


def _tile(which: str, layout: GateLayout, w: torch.Tensor, *rows: torch.Tensor) -> GatedTile:
    """The tile of a pass that multiplies ``rows``, one or two matrices of as many rows."""
    n, k = layout.weight_shape
    like = rows[0]
    aligned = _read_wide(layout, w, *rows)
    native = is_native(like.device)
    return tile_for_gated_linear(
        which, len(like), n, k, w.dtype, like.dtype, layout.block, aligned, native
    )


def _choose_triton(method: str, layout: GateLayout, kind: str, x2: torch.Tensor) -> str:
    """The method: as told, or by shape, which backward meets again."""
    if method != "auto":
        return method
    return by_shape(layout, kind, len(x2), x2.dtype, fuses_long(x2.device))[0]


def _read_wide(layout: GateLayout, *operands: torch.Tensor) -> bool:
    """Whether rows of the operands, and of what comes out, can be read in wide pieces."""
    return layout.weight_shape[0] % 16 == 0 and all(map(is_aligned, operands))


def _check_method(method: str, impl: str, kind: str, layout: GateLayout) -> None:
    if method not in METHODS:
        raise ValueError(f"method must be None or one of {METHODS}, got {method!r}")
    reason = why_not(method, impl, kind, layout)
    if reason:
        raise ValueError(f"method {method!r} cannot be taken: {reason}")


def _check(x, w, bias, kind: str, reopen: bool) -> None:
    n, k = w.shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"x must be [..., {k}] for a weight of shape {(n, k)}, got "
                         f"{list(x.shape)}")  # fmt: skip
    if x.dtype not in _DTYPES:
        raise ValueError(f"x must be one of {_DTYPES}, got {x.dtype}")
    if (w.dtype == torch.float64) != (x.dtype == torch.float64):
        raise ValueError(f"x and w must both be fp64 or neither, got x {x.dtype}, w {w.dtype}")
    if x.device != w.device:
        raise ValueError(f"x and w must share a device, got {x.device} and {w.device}")
    if bias is not None and (
        bias.shape != (n,) or bias.dtype != x.dtype or bias.device != x.device
    ):
        raise ValueError(f"bias must be [{n}] {x.dtype} on {x.device}, got {list(bias.shape)} "
                         f"{bias.dtype} on {bias.device}")  # fmt: skip
    if not reopen and kind != "threshold":
        raise ValueError(f"reopen=False is for threshold gates, got kind {kind!r}")


def _gated_linear_fwd(
    x: torch.Tensor,
    w: torch.Tensor,
    gate: torch.Tensor,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    bn: int,
    bk: int,
    kind: str,
    reopen: bool,
    method: str,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    layout = GateLayout(tuple(w.shape), tuple(gate.shape), (bn, bk), 1)
    x2 = _rows(x)
    bits = _empty_bits(gate, kind, seed, impl)
    if impl == "triton":
        y = _forward_triton(x2, w, gate, bias, seed, bits, layout, kind, method)
    elif kind == "hard_concrete":
        y = _multiply_fwd(x2, w, gate, bias, seed, layout, kind, impl)
    else:
        with without_autocast(x.device):
            y = gated_torch.forward(x2, w, gate, seed, bias, bits, layout, method)
    return _shaped(y, (*x.shape[:-1], w.shape[0])), bits


def _gated_linear_fake(x, w, gate, bias, seed, bn, bk, kind, reopen, method, impl):
    return x.new_empty(*x.shape[:-1], w.shape[0]), _empty_bits(gate, kind, seed, impl)


def _rows(t: torch.Tensor) -> torch.Tensor:
    """``[..., K]`` as ``[M, K]``; -1 would not do where ``K`` is 0."""
    return t if t.dim() == 2 else t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def _shaped(t: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """A new matrix in another shape. No view: autograd allows no writing to a function's views."""
    return t if len(shape) == 2 else torch.ops.aten._unsafe_view(t, shape)


def _empty_bits(gate, kind: str, seed, impl: str) -> torch.Tensor:
    """Room for what the implementation keeps of the gates for backward."""
    if kind == "hard_concrete" or (impl == "torch" and seed is None):
        return gate.new_empty(0, dtype=torch.uint8)
    if impl == "torch":
        return gate.new_empty((gate.numel() + 7) // 8, dtype=torch.uint8)
    return gate.new_empty(gate.shape[0], (gate.shape[1] + 31) // 32, dtype=torch.int32)


def _gated_linear_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    gate: torch.Tensor,
    seed: torch.Tensor | None,
    bits: torch.Tensor,
    bn: int,
    bk: int,
    kind: str,
    reopen: bool,
    method: str,
    impl: str,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    layout = GateLayout(tuple(w.shape), tuple(gate.shape), (bn, bk), 1)
    x2, dy2 = _rows(x), _rows(dy)
    need_dx, need_dw, need_dgate, need_dbias = needs
    wanted = (need_dx, need_dw, need_dgate)
    if impl == "triton":
        dx, dw, dgate = _backward_triton(
            dy2, x2, w, gate, seed, bits, layout, kind, method, wanted, reopen
        )
    elif kind == "hard_concrete":
        dx, dw, dgate = _multiply_bwd(dy2, x2, w, gate, seed, layout, kind, wanted, impl)
    else:
        with without_autocast(x.device):
            dx, dw, dgate = gated_torch.backward(
                dy2, x2, w, gate, bits, layout, method, wanted, reopen
            )
    dx = None if dx is None else _shaped(dx, x.shape)
    # an op gives tensors: empty ones for what nobody needs
    return (
        dy2.new_empty(0) if dx is None else dx,
        dw if need_dw and dw is not None else w.new_empty(0),
        dgate if need_dgate and dgate is not None else gate.new_empty(0),
        dy2.sum(0) if need_dbias else dy2.new_empty(0),
    )


def _gated_linear_bwd_fake(
    dy, x, w, gate, seed, bits, bn, bk, kind, reopen, method, impl, needs
):  # fmt: skip
    shapes = (x.shape, w.shape, gate.shape, w.shape[:1])
    types = (dy, w, gate, dy)
    return tuple(
        like.new_empty(shape if need else (0,))
        for like, shape, need in zip(types, shapes, needs, strict=True)
    )


class _GatedLinear(torch.autograd.Function):
    """The function behind the op, where nobody looks at ops."""

    @staticmethod
    def forward(ctx, x, w, gate, bias, seed, static):
        y, bits = _gated_linear_fwd(x, w, gate, bias, seed, *static)
        ctx.save_for_backward(x, w, gate, seed, bits)
        ctx.static = static
        return y

    @staticmethod
    def backward(ctx, dy):
        return (_grads_with_graph if torch.is_grad_enabled() else _grads)(ctx, dy)


class _GatedLinearOp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, gate, bias, seed, static):
        with torch._C._AutoDispatchBelowAutograd():
            y, bits = _gated_linear_op(x, w, gate, bias, seed, *static)
        ctx.save_for_backward(x, w, gate, seed, bits)
        ctx.mark_non_differentiable(bits)
        ctx.set_materialize_grads(False)  # else there are zeros for bits, each time
        ctx.static = static
        return y, bits

    @staticmethod
    def backward(ctx, dy, _):
        if dy is None:
            return (None,) * 6
        return (_grads_with_graph if torch.is_grad_enabled() else _grads)(ctx, dy)


def _grads(ctx, dy):
    *needs, _, _ = ctx.needs_input_grad
    saved = ctx.saved_tensors
    compute: Any = _gated_linear_bwd_op if is_watched(dy, *saved) else _gated_linear_bwd
    grads = compute(dy, *saved, *ctx.static, needs)
    dx, dw, dgate, dbias = (g if need else None for g, need in zip(grads, needs, strict=True))
    return dx, dw, dgate, dbias, None, None


def _grads_with_graph(ctx, dy):
    """The same through differentiable ops: ``dx`` can be differentiated again, ``dW`` cannot."""
    x, w, gate, seed, _ = ctx.saved_tensors
    bn, bk, kind, reopen, _, impl = ctx.static
    *needs, need_dbias, _, _ = ctx.needs_input_grad
    trained = gate if reopen else torch.where(gate > 0.5, gate, gate.detach())
    gated = gate_weight(w, trained, (bn, bk), kind=kind, seed=seed, dtype=x.dtype, impl=impl)
    dx, dw, dgate = grads_with_graph(lambda: F.linear(x, gated), (x, w, gate), needs, dy)
    dbias = dy.sum(tuple(range(dy.dim() - 1))) if need_dbias else None
    return dx, dw, dgate, dbias, None, None


def _gated_linear_autograd(*inputs):
    return _GatedLinearOp.apply(*inputs[:5], inputs[5:])


_gated_linear_op = register_op(
    "gated_linear", _gated_linear_fwd, _gated_linear_fake, _gated_linear_autograd
)
_gated_linear_bwd_op = register_op("gated_linear_bwd", _gated_linear_bwd, _gated_linear_bwd_fake)


@register_flop_formula(_gated_linear_op.overloadpacket)
def _gated_linear_flops(x_shape, w_shape, *args, out_shape=None, **kwargs) -> int:
    """Two per weight and row of ``x``: what is skipped depends on values, which nobody counts."""
    return 2 * math.prod(x_shape[:-1]) * math.prod(w_shape)


@register_flop_formula(_gated_linear_bwd_op.overloadpacket)
def _gated_linear_bwd_flops(dy_shape, x_shape, w_shape, *args, out_shape=None, **kwargs) -> int:
    """As forward, once for ``dx`` and once for ``dw`` and ``dgate``."""
    need_dx, need_dw, need_dgate, _ = args[-1]
    products = need_dx + (need_dw or need_dgate)
    return 2 * products * math.prod(x_shape[:-1]) * math.prod(w_shape)
