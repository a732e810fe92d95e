"""Product with a block-sparse weight, with bias and activation in the same pass.

    y = act(x @ W^T + bias + residual)        W: stored blocks only
    dx = dy @ W        dW[block] = dy^T x at stored blocks        dbias = sum of dy over rows

Sums run in fp32, bias, residual and activation are applied to them, and the result is rounded once.
Backward keeps ``x`` and the values. With gradients an activation is applied after the product, by
PyTorch, which keeps what it needs.

FLOPs: ``2 M`` for each stored weight, in forward, for ``dx`` and for ``dW``. Bytes at the least:
``x``, ``y`` and the stored values once each.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula
from torch.utils.weak import WeakIdKeyDictionary

from ._autocast import cast_inputs, without_autocast
from ._impl import resolve_impl
from ._ops import grads_with_graph, is_capturing, is_watched, needs_graph, register_op
from .activations import ACTIVATIONS, check_activation
from .bsr import BlockSparse
from .bsr_checks import check_agrees, check_dtype, check_kinds, why_no_kernel
from .bsr_choice import cell_of, choice_for, name_of_choice
from .bsr_linear_passes import dense_weight, linear_dvalues, linear_dx
from .bsr_product import (
    PairedRows,
    bsr_linear_fwd,
    bsr_linear_fwd_pairs,
    pair_rows,
)
from .bsr_torch import bsr_linear_bwd_torch, bsr_linear_torch
from .lookup import analytic
from .pinned import choice_of_name
from .tiles import BsrTile


def bsr_linear(
    x: torch.Tensor,
    w: BlockSparse,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    *,
    residual: torch.Tensor | None = None,
    impl: str | None = None,
    tile: BsrTile | str | None = None,
) -> torch.Tensor:
    """Linear layer with a block-sparse weight: ``act(x @ W^T + bias + residual)``.

    Differentiable in ``x``, ``w.values``, ``bias`` and ``residual``; the pattern stays. Under
    autocast all of them are cast to its dtype as for ``F.linear``.

    Args:
        x: ``[..., K]`` fp32 | fp16 | bf16 (the ``torch`` implementation: fp64 too), any strides.
        w: ``(N, K)``, dtype and device of ``x``. The Triton kernel serves block sides that are
            powers of two >= 16.
        bias: ``[N]``, dtype and device of ``x``.
        activation: ``"relu"`` | ``"gelu"`` | ``"gelu_tanh"`` | ``"silu"`` | ``None``.
        residual: ``[..., N]``, dtype and device of ``x``, any strides. Added before the activation.
        impl: ``"triton"`` | ``"torch"``; default: see :mod:`._impl`.
        tile: how forward is computed: what one program of the Triton kernel computes, or the name
            of one of :func:`.candidates`; default: what :func:`.choose` finds.

    Returns:
        ``[..., N]``, dtype of ``x``, contiguous.

    Raises:
        ValueError: shapes, dtypes or devices that do not agree; an unknown activation; ``impl``
            asks for what cannot run; a name of no candidate.
    """
    check_kinds(x, w)
    x, values, bias, residual = cast_inputs(x.device, x, w.values, bias, residual)
    n, k = w.shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"x must be [..., {k}] for a weight of shape {w.shape}, got {_shape(x)}")
    check_agrees("w", values, x)
    if bias is not None:
        _check_added("bias", bias, (n,), x)
    if residual is not None:
        _check_added("residual", residual, (*x.shape[:-1], n), x)
    check_dtype(x)
    activation = check_activation(activation)
    impl = resolve_impl(impl, x.device, "bsr_linear", why_no_kernel(x.dtype, w.block))
    tensors = (x, values, bias, residual)
    trains = needs_graph(tensors)
    after = "none"
    if trains:  # its derivative is PyTorch's
        activation, after = after, activation
    chosen = None if tile is None else name_of_choice(tile, w, impl, x)
    if is_watched(*tensors):
        out = _bsr_linear_op(
            x, values, *w.index_tensors, bias, residual, n, activation, impl, chosen
        )
    elif trains:
        out = _BsrLinear.apply(*tensors, w, (activation, impl, chosen))
    else:
        out = _forward(*tensors, w, activation, impl, chosen)
    return out if after == "none" else ACTIVATIONS[after](out)


def bsr_linear_ref(
    x: torch.Tensor,
    w: BlockSparse,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """What :func:`bsr_linear` computes, in plain PyTorch on the dense weight."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = x.to(wide) @ w.to_dense().to(wide).T
    for added in (bias, residual):
        out = out if added is None else out + added.to(wide)
    return ACTIVATIONS[activation or "none"](out).to(x.dtype)


def _check_added(name: str, t: torch.Tensor, shape: tuple[int, ...], x: torch.Tensor) -> None:
    if t.shape != shape:
        raise ValueError(f"{name} must be {list(shape)} for x {_shape(x)}, got {_shape(t)}")
    check_agrees(name, t, x)


def _shape(t: torch.Tensor) -> list[int]:
    return list(t.shape)


def _forward(
    x: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    w: BlockSparse,
    activation: str,
    impl: str,
    tile: str | None,
) -> torch.Tensor:
    """Compute the product; of ``w`` only shape and index are read."""
    n, k = w.shape
    x2 = x if x.dim() == 2 else x.reshape(-1, k)
    residual2 = residual
    if residual is not None and residual.dim() != 2:
        residual2 = residual.reshape(-1, n)
    values = values.contiguous()
    if tile is None:
        chosen = choice_for("fwd", w, impl, x2)
    else:
        chosen = choice_of_name("bsr_linear fwd", tile, impl, x2.device)
    is_paired = chosen.tile is not None and chosen.tile.form == "pairs"
    if is_paired and tile is None and is_capturing(x2.device) and _kept_pairs(w) is None:
        chosen = analytic(cell_of("fwd", w, impl, x2)).candidate  # listing pairs would wait
    if chosen.way == "unpack":
        out = _unpacked(x2, values, bias, residual2, w, activation)
    elif impl == "triton":
        assert chosen.tile is not None
        added = (bias, residual2, n, activation, chosen.tile)
        if chosen.tile.form == "pairs":
            out = bsr_linear_fwd_pairs(x2, values, _pairs(w), *added)
        else:
            out = bsr_linear_fwd(x2, values, w.crow, w.col, w.row_order, *added)
    else:
        with without_autocast(x.device):
            out = bsr_linear_torch(x2, values, w.index, bias, residual2, n, activation, chosen)
    # no view: autograd allows no writing to a function's views
    return out if x.dim() == 2 else torch.ops.aten._unsafe_view(out, (*x.shape[:-1], n))


def _unpacked(x2, values, bias, residual2, w: BlockSparse, activation: str) -> torch.Tensor:
    """The zeros filled in, then the library's dense product."""
    with without_autocast(x2.device):
        out = F.linear(x2, dense_weight(values, w), bias)
        out = out if residual2 is None else out.add_(residual2)
        return out if activation == "none" else ACTIVATIONS[activation](out)


def _backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    values: torch.Tensor,
    w: BlockSparse,
    impl: str,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of ``x``, the values and the bias; empty ones where nobody needs them."""
    n, k = w.shape
    dy2, x2, values = dy.reshape(-1, n), x.reshape(-1, k), values.contiguous()
    need_dx, need_dvalues, need_dbias = needs
    dx = dvalues = None
    if impl == "triton":
        if need_dx:
            dx = linear_dx(dy2, values, w, choice_for("dx", w, impl, dy2))
        if need_dvalues:
            by_dvalues = choice_for("dvalues", w, impl, dy2, x2)
            dvalues = linear_dvalues(dy2, x2, values, w, by_dvalues)
    elif need_dx or need_dvalues:
        with without_autocast(x.device):
            dx, dvalues = bsr_linear_bwd_torch(dy2, x2, values, w.index, need_dx, need_dvalues)
    return (
        dy.new_empty(0) if dx is None else torch.ops.aten._unsafe_view(dx, x.shape),
        values.new_empty(0) if dvalues is None else dvalues,
        dy2.sum(0) if need_dbias else dy.new_empty(0),
    )


_paired = WeakIdKeyDictionary()  # crow -> the col and versions that were read, and the pairs


def _pairs(w: BlockSparse) -> PairedRows:
    """Block rows by twos; kept beside the index, since an op gets no container."""
    pairs = _kept_pairs(w)
    if pairs is None:
        pairs = pair_rows(w.crow, w.col)
        if _is_counted(w.crow, w.col):
            _paired[w.crow] = weakref.ref(w.col), (w.crow._version, w.col._version), pairs
        else:
            object.__setattr__(w, "_listed_pairs", pairs)
    return pairs


def _kept_pairs(w: BlockSparse) -> PairedRows | None:
    if not _is_counted(w.crow, w.col):
        return w.__dict__.get("_listed_pairs")
    kept = _paired.get(w.crow)
    if kept is None or kept[0]() is not w.col or kept[1] != (w.crow._version, w.col._version):
        return None
    return kept[2]


def _is_counted(crow: torch.Tensor, col: torch.Tensor) -> bool:
    """Whether changes are counted; those of tensors made under inference_mode are not."""
    return not (crow.is_inference() or col.is_inference())


class _BsrLinear(torch.autograd.Function):
    """The function behind the op, where nobody looks at ops."""

    @staticmethod
    def forward(ctx, x, values, bias, residual, w, static):
        # of an x that only dx needs no more than the shape is kept
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, values)
        ctx.w, ctx.impl = w, static[1]
        return _forward(x, values, bias, residual, w, *static)

    @staticmethod
    def backward(ctx, dy):
        x, values = ctx.saved_tensors
        x = _stand_in(dy, ctx.w.shape[1], values) if x is None else x
        grads_of = _grads_with_graph if torch.is_grad_enabled() else _grads
        return (*grads_of(dy, x, values, ctx.w, ctx.impl, ctx.needs_input_grad[:4]), None, None)


class _BsrLinearOp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, values, bias, residual, index, static):
        with torch._C._AutoDispatchBelowAutograd():
            out = _bsr_linear_op(x, values, *index, bias, residual, *static)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, values, *index)
        ctx.shape, ctx.impl = (static[0], x.shape[-1]), static[2]
        return out

    @staticmethod
    def backward(ctx, dy):
        x, values, *index = ctx.saved_tensors
        w = BlockSparse._from_index(values, index, ctx.shape)
        x = _stand_in(dy, ctx.shape[1], values) if x is None else x
        grads_of = _grads_with_graph if torch.is_grad_enabled() else _grads
        return (*grads_of(dy, x, values, w, ctx.impl, ctx.needs_input_grad[:4]), None, None)


def _stand_in(dy: torch.Tensor, k: int, values: torch.Tensor) -> torch.Tensor:
    """In place of an ``x [..., K]`` that was not kept: ``dx`` depends on no value of it."""
    return values.new_zeros(()).expand(*dy.shape[:-1], k).requires_grad_(torch.is_grad_enabled())


_indices = WeakIdKeyDictionary()  # crow -> the col and versions that were read, and the index


def _container(
    values: torch.Tensor, index: Sequence[torch.Tensor], shape: tuple[int, int], impl: str
) -> BlockSparse:
    """The matrix of an op's arguments, with what library calls made of its index before."""
    w, (crow, col, *_) = BlockSparse._from_index(values, index, shape), index
    if impl != "torch" or not _is_counted(crow, col):
        return w
    versions = crow._version, col._version
    kept = _indices.get(crow)
    if kept is None or kept[0]() is not col or kept[1] != versions:
        kept = _indices[crow] = weakref.ref(col), versions, w.index
    object.__setattr__(w, "_index", kept[2])
    return w


def _grads(dy, x, values, w: BlockSparse, impl: str, needs):
    need_dx, need_dvalues, need_dbias, need_dresidual = needs
    wanted = (need_dx, need_dvalues, need_dbias)
    if is_watched(dy, x, values):
        grads = _bsr_linear_bwd_op(dy, x, values, *w.index_tensors, w.shape[0], impl, wanted)
    else:
        grads = _backward(dy, x, values, w, impl, wanted)
    dx, dvalues, dbias = (g if need else None for g, need in zip(grads, wanted, strict=True))
    return dx, dvalues, dbias, dy if need_dresidual else None


def _grads_with_graph(dy, x, values, w: BlockSparse, impl: str, needs):
    """The same on the dense weight, which can be differentiated again."""
    need_dx, need_dvalues, need_dbias, need_dresidual = needs
    dx, dvalues = grads_with_graph(
        lambda: F.linear(x, dense_weight(values, w)),
        (x, values), (need_dx, need_dvalues), dy,
    )  # fmt: skip
    dbias = dy.sum(tuple(range(dy.dim() - 1))) if need_dbias else None
    return dx, dvalues, dbias, dy if need_dresidual else None


def _bsr_linear_fwd(
    x: torch.Tensor,
    values: torch.Tensor,
    crow: torch.Tensor,
    col: torch.Tensor,
    ccol: torch.Tensor,
    row: torch.Tensor,
    perm: torch.Tensor,
    row_order: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    n: int,
    activation: str,
    impl: str,
    tile: str | None,
) -> torch.Tensor:
    index = crow, col, ccol, row, perm, row_order
    w = _container(values, index, (n, x.shape[-1]), impl)
    return _forward(x, values, bias, residual, w, activation, impl, tile)


def _bsr_linear_fake(
    x, values, crow, col, ccol, row, perm, row_order, bias, residual, n, activation, impl, tile
):  # fmt: skip
    return x.new_empty(*x.shape[:-1], n)


def _bsr_linear_autograd(x, values, *rest):
    *index, bias, residual, n, activation, impl, tile = rest
    if not needs_graph((x, values, bias, residual)):
        with torch._C._AutoDispatchBelowAutograd():
            return _bsr_linear_op(x, values, *rest)
    return _BsrLinearOp.apply(
        x, values, bias, residual, tuple(index), (n, activation, impl, tile)
    )  # fmt: skip


def _bsr_linear_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    values: torch.Tensor,
    crow: torch.Tensor,
    col: torch.Tensor,
    ccol: torch.Tensor,
    row: torch.Tensor,
    perm: torch.Tensor,
    row_order: torch.Tensor,
    n: int,
    impl: str,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    index = crow, col, ccol, row, perm, row_order
    w = _container(values, index, (n, x.shape[-1]), impl)
    return _backward(dy, x, values, w, impl, needs)


def _bsr_linear_bwd_fake(
    dy, x, values, crow, col, ccol, row, perm, row_order, n, impl, needs
):  # fmt: skip
    shapes = (x.shape, values.shape, (n,))
    return tuple(
        like.new_empty(shape if need else (0,))
        for like, shape, need in zip((dy, values, dy), shapes, needs, strict=True)
    )


_bsr_linear_op = register_op("bsr_linear", _bsr_linear_fwd, _bsr_linear_fake, _bsr_linear_autograd)
_bsr_linear_bwd_op = register_op("bsr_linear_bwd", _bsr_linear_bwd, _bsr_linear_bwd_fake)


@register_flop_formula(_bsr_linear_op.overloadpacket)
def _bsr_linear_flops(x_shape, values_shape, *args, out_shape=None, **kwargs) -> int:
    """Two per stored weight and row of ``x``."""
    return 2 * math.prod(x_shape[:-1]) * math.prod(values_shape)


@register_flop_formula(_bsr_linear_bwd_op.overloadpacket)
def _bsr_linear_bwd_flops(dy_shape, x_shape, values_shape, *args, out_shape=None, **kwargs) -> int:
    """As forward, once for ``dx`` and once for ``dvalues``."""
    need_dx, need_dvalues, _ = args[-1]
    return 2 * (need_dx + need_dvalues) * math.prod(x_shape[:-1]) * math.prod(values_shape)
