"""Convolution with a block-sparse weight, with bias and activation in the same pass.

    out[b, o, p] = act(sum of W[o, c, t] x[b, c, stride p + dilation t - padding] + bias[o])
    dx = the transposed sum         dW = dout x at the stored blocks         dbias = sum of dout

The weight is the matrix of :mod:`.blocks`: a block covers output channels of a group and input
channels of one tap. Pixels are the rows of the product: nothing of the size of taps times pixels is
ever stored. Sums run in fp32, bias and activation are applied to them, and the result is rounded
once. FLOPs: two per stored weight and output pixel; backward as many for each of dx and dW.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch._prims_common import suggest_memory_format
from torch.utils.flop_counter import register_flop_formula

from ._autocast import cast_inputs
from ._impl import resolve_impl
from ._ops import grads_with_graph, is_watched, needs_graph, register_op
from .activations import ACTIVATIONS, check_activation
from .bsr import BlockSparse
from .bsr_checks import check_agrees, check_dtype, check_kinds, why_no_kernel
from .bsr_conv_passes import conv_bwd, conv_fwd, kept_conv_blocks
from .bsr_conv_torch import result_format
from .conv_arguments import geometry_of
from .conv_choice import conv_choice, pinned_choice
from .conv_geometry import ConvGeometry
from .pinned import name_of_choice
from .tiles import BsrTile


def bsr_conv2d(
    x: torch.Tensor,
    w: BlockSparse,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    out_channels: int,
    kernel_size: int | Sequence[int],
    activation: str | None = None,
    impl: str | None = None,
    tile: BsrTile | str | None = None,
) -> torch.Tensor:
    """2-d convolution with a block-sparse weight; differentiable in ``x, w.values, bias``.

    Arguments are those of ``F.conv2d``, and the two sizes that a matrix does not tell. Under
    autocast ``x``, the values and ``bias`` are cast to its dtype as for ``F.conv2d``.

    Args:
        x: ``[B, C, H, W]`` or ``[C, H, W]`` fp32 | fp16 | bf16 (the ``torch`` implementation: fp64
            too), any strides.
        w: dtype and device of ``x``. The weight ``[O, C / groups, *kernel_size]`` as
            :func:`.weight_to_matrix` lays it out: ``[groups * rows, taps * columns]``, each group
            and each tap padded to whole blocks. The Triton kernels serve block sides that are
            powers of two >= 16.
        bias: ``[O]``, dtype and device of ``x``.
        stride, padding, dilation, groups: as for ``F.conv2d``; ``padding`` may be ``"same"`` |
            ``"valid"``.
        out_channels: ``O``.
        kernel_size: taps, vertical and horizontal.
        activation: ``"relu"`` | ``"gelu"`` | ``"gelu_tanh"`` | ``"silu"`` | ``None``.
        impl: ``"triton"`` | ``"torch"``; default: see :mod:`._impl`.
        tile: how it is computed: what one program of the Triton kernels computes, backward too, or
            the name of one of :func:`.candidates` of forward, of which a tile counts in backward
            too; default: what :func:`.choose` finds.

    Returns:
        ``[B, O, H', W']`` or ``[O, H', W']``, dtype of ``x``; channels-last in memory where ``x``
        is, else contiguous.

    Raises:
        ValueError: shapes, sizes, dtypes or devices that do not fit; an unknown activation;
            ``impl`` asks for what cannot run; a name of no candidate.
    """
    check_kinds(x, w)
    if x.dim() not in (3, 4):
        raise ValueError(f"x must be [B, C, H, W] or [C, H, W], got {list(x.shape)}")
    geometry = geometry_of(
        x.shape[-3], out_channels, kernel_size, stride, padding, dilation, groups, 2
    )  # fmt: skip
    batched = x if x.dim() == 4 else x.unsqueeze(0)
    out = _bsr_conv(batched, w, bias, geometry, activation, impl, tile, "bsr_conv2d")
    return out if x.dim() == 4 else out.squeeze(0)


def bsr_conv1d(
    x: torch.Tensor,
    w: BlockSparse,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    out_channels: int,
    kernel_size: int | Sequence[int],
    activation: str | None = None,
    impl: str | None = None,
    tile: BsrTile | str | None = None,
) -> torch.Tensor:
    """1-d convolution with a block-sparse weight: :func:`bsr_conv2d` on images of one line.

    Args:
        x: ``[B, C, L]`` or ``[C, L]``.

    Returns:
        ``[B, O, L']`` or ``[O, L']``; in memory the channels of ``x`` and of the result lie alike.
    """
    check_kinds(x, w)
    if x.dim() not in (2, 3):
        raise ValueError(f"x must be [B, C, L] or [C, L], got {list(x.shape)}")
    geometry = geometry_of(
        x.shape[-2], out_channels, kernel_size, stride, padding, dilation, groups, 1
    )  # fmt: skip
    batched = (x if x.dim() == 3 else x.unsqueeze(0)).unsqueeze(2)
    out = _bsr_conv(batched, w, bias, geometry, activation, impl, tile, "bsr_conv1d").squeeze(2)
    return out if x.dim() == 3 else out.squeeze(0)


def bsr_conv2d_ref(
    x: torch.Tensor,
    w: BlockSparse,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    out_channels: int,
    kernel_size: int | Sequence[int],
    activation: str | None = None,
) -> torch.Tensor:
    """What :func:`bsr_conv2d` computes, in plain PyTorch with the dense weight."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    geometry = geometry_of(x.shape[-3], out_channels, kernel_size, 1, 0, 1, groups, 2)
    weight = _dense_weight(w.to_dense(), geometry, w.block).to(wide)
    bias = None if bias is None else bias.to(wide)
    out = F.conv2d(x.to(wide), weight, bias, stride, padding, dilation, groups)  # pyright: ignore
    return ACTIVATIONS[activation or "none"](out).to(x.dtype)


def _dense_weight(
    matrix: torch.Tensor, geometry: ConvGeometry, block: tuple[int, int]
) -> torch.Tensor:
    """``[O, C / groups, *kernel]`` of the matrix; differentiable."""
    rows, cols = (count * side for count, side in zip(geometry.blocks(block), block, strict=True))
    weight = matrix.view(geometry.groups, rows, *geometry.kernel, cols)
    weight = weight[:, : geometry.out_per_group, ..., : geometry.in_per_group]
    return weight.flatten(0, 1).movedim(-1, 1)


def _bsr_conv(
    x: torch.Tensor,
    w: BlockSparse,
    bias: torch.Tensor | None,
    geometry: ConvGeometry,
    activation: str | None,
    impl: str | None,
    tile: BsrTile | str | None,
    name: str,
) -> torch.Tensor:
    """Both convolutions, on ``x [B, C, H, W]``."""
    x, values, bias = cast_inputs(x.device, x, w.values, bias)
    _check_sizes(geometry, w, x)
    check_agrees("w", values, x)
    if bias is not None:
        if bias.shape != (geometry.out_channels,):
            raise ValueError(f"bias must be [{geometry.out_channels}], got {list(bias.shape)}")
        check_agrees("bias", bias, x)
    check_dtype(x)
    activation = check_activation(activation)
    impl = resolve_impl(impl, x.device, name, why_no_kernel(x.dtype, w.block))
    inputs = (x, values, bias)
    needs_grad = needs_graph(inputs)
    # backward takes what is added up, not what the activation makes of it
    fused = "none" if needs_grad else activation
    named = None if tile is None else name_of_choice("bsr_conv fwd", tile, impl, x.device)
    if is_watched(*inputs):
        out = _bsr_conv_op(*inputs, *w.index_tensors, geometry.pack(), fused, impl, named)
    elif needs_grad:
        out = _BsrConv.apply(*inputs, w, (geometry, fused, impl, named))
    else:
        out = _forward(*inputs, w, geometry, fused, impl, named)
    return out if fused == activation else ACTIVATIONS[activation](out)


def _check_sizes(geometry: ConvGeometry, w: BlockSparse, x: torch.Tensor) -> None:
    _, channels, height, width = x.shape
    if channels < 1 or height < 1 or width < 1:
        raise ValueError(f"x must be empty in no way but without images, got {list(x.shape)}")
    if min(geometry.out_size((height, width))) < 1:
        raise ValueError(
            f"x must be large enough for one output, got {list(x.shape)} for a kernel of "
            f"{geometry.kernel}, dilation {geometry.dilation}, padding {geometry.before}"
        )
    if not torch.compiler.is_compiling() and kept_conv_blocks(w, geometry) is not None:
        return  # it was found to fit
    groups, out = geometry.groups, geometry.out_channels
    if channels % groups or out % groups:
        raise ValueError(f"groups must divide the {channels} channels of x and the {out} output "
                         f"channels, got {groups}")  # fmt: skip
    if w.shape != (shape := geometry.matrix_shape(w.block)):
        raise ValueError(
            f"w must be {shape} for {channels} input and {out} output channels, "
            f"{geometry.kernel[0]}x{geometry.kernel[1]} taps, {groups} groups and blocks of "
            f"{w.block}, got {w.shape}"
        )


def _empty(
    x: torch.Tensor, geometry: ConvGeometry, memory_format: torch.memory_format
) -> torch.Tensor:
    shape = (x.shape[0], geometry.out_channels, *geometry.out_size(x.shape[2:]))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)


def _forward(
    x: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    w: BlockSparse,
    geometry: ConvGeometry,
    activation: str,
    impl: str,
    tile: str | None,
) -> torch.Tensor:
    """Compute the convolution; of ``w`` only shape and index are read."""
    if not x.shape[0] * math.prod(geometry.out_size(x.shape[2:])):
        return _empty(x, geometry, result_format(x))
    chosen = pinned_choice("fwd", tile, impl, x) or conv_choice("fwd", w, geometry, impl, x)
    return conv_fwd(x, values.contiguous(), bias, w, geometry, activation, impl, chosen)


def _backward(
    dout: torch.Tensor,
    x: torch.Tensor,
    values: torch.Tensor,
    w: BlockSparse,
    geometry: ConvGeometry,
    impl: str,
    tile: str | None,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of ``x``, the values and the bias; empty ones where nobody needs them."""
    values = values.contiguous()
    need_dx, need_dvalues, need_dbias = needs
    dx = dvalues = None
    if not dout.numel():
        dx, dvalues = (
            torch.empty_like(x, memory_format=result_format(x)),
            values.new_zeros(values.shape),
        )
    elif need_dx or need_dvalues:
        by_dx, by_dvalues = (
            (pinned_choice(which, tile, impl, x) or conv_choice(which, w, geometry, impl, x))
            if needed
            else None
            for which, needed in (("dx", need_dx), ("dvalues", need_dvalues))
        )
        dx, dvalues = conv_bwd(dout, x, values, w, geometry, impl, by_dx, by_dvalues)
    return (
        dx if need_dx and dx is not None else x.new_empty(0),
        dvalues if need_dvalues and dvalues is not None else values.new_empty(0),
        dout.sum((0, 2, 3)) if need_dbias else dout.new_empty(0),
    )


def _container(
    values: torch.Tensor, index: Sequence[torch.Tensor], geometry: ConvGeometry
) -> BlockSparse:
    shape = geometry.matrix_shape((values.shape[1], values.shape[2]))
    return BlockSparse._from_index(values, index, shape)


def _keep(ctx, x: torch.Tensor, values: torch.Tensor, *index: torch.Tensor) -> None:
    """Save what gradients are made of: each of two factors for the other's."""
    need_dx, need_dvalues, *_ = ctx.needs_input_grad
    ctx.save_for_backward(x if need_dvalues else None, values if need_dx else None, *index)
    ctx.x_like, ctx.values_shape = (x.shape, result_format(x)), values.shape


def _kept(ctx, dout: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """What :func:`_keep` was given, with memory that nobody reads for what it did not save."""
    x, values, *index = ctx.saved_tensors
    # with a graph gradients are asked of them
    like = {"dtype": dout.dtype, "device": dout.device, "requires_grad": torch.is_grad_enabled()}
    if x is None:
        shape, memory_format = ctx.x_like
        x = torch.empty(shape, memory_format=memory_format, **like)
    if values is None:
        values = torch.empty(ctx.values_shape, **like)
    return x, values, index


class _BsrConv(torch.autograd.Function):
    """The function behind the op, where nobody looks at ops."""

    @staticmethod
    def forward(ctx, x, values, bias, w, static):
        _keep(ctx, x, values)
        ctx.w, ctx.static = w, static
        return _forward(x, values, bias, w, *static)

    @staticmethod
    def backward(ctx, dout):
        x, values, _ = _kept(ctx, dout)
        geometry, _, impl, tile = ctx.static
        return (
            *_grads(dout, x, values, ctx.w, geometry, impl, tile, ctx.needs_input_grad),
            None,
            None,
        )


class _BsrConvOp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, values, bias, index, static):
        with torch._C._AutoDispatchBelowAutograd():
            out = _bsr_conv_op(x, values, bias, *index, *static)
        _keep(ctx, x, values, *index)
        ctx.static = static
        return out

    @staticmethod
    def backward(ctx, dout):
        x, values, index = _kept(ctx, dout)
        packed, _, impl, tile = ctx.static
        geometry = ConvGeometry.unpack(packed)
        w = _container(values, index, geometry)
        return *_grads(dout, x, values, w, geometry, impl, tile, ctx.needs_input_grad), None, None


def _grads(dout, x, values, w: BlockSparse, geometry: ConvGeometry, impl: str, tile, needs):
    """Of ``x``, the values and the bias; ``None`` where nobody needs them."""
    needs = needs[:3]
    if torch.is_grad_enabled():
        return _grads_with_graph(dout, x, values, w.index_tensors, geometry, needs)
    if is_watched(dout, x, values):
        grads = _bsr_conv_bwd_op(
            dout, x, values, *w.index_tensors, geometry.pack(), impl, tile, needs
        )
    else:
        grads = _backward(dout, x, values, w, geometry, impl, tile, needs)
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


def _grads_with_graph(dout, x, values, index, geometry: ConvGeometry, needs):
    """The same through differentiable ops, with the dense weight."""

    def out() -> torch.Tensor:
        w = _container(values, index, geometry)
        weight = _dense_weight(w.to_dense(), geometry, w.block)
        (top, left), (bottom, right) = geometry.before, geometry.after
        padded = F.pad(x, (left, right, top, bottom))
        stride, dilation, groups = geometry.stride, geometry.dilation, geometry.groups
        return F.conv2d(padded, weight, None, stride, 0, dilation, groups)

    dx, dvalues = grads_with_graph(out, (x, values), needs[:2], dout)
    return dx, dvalues, dout.sum((0, 2, 3)) if needs[2] else None


def _bsr_conv_fwd(
    x: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    crow: torch.Tensor,
    col: torch.Tensor,
    ccol: torch.Tensor,
    row: torch.Tensor,
    perm: torch.Tensor,
    row_order: torch.Tensor,
    geometry: Sequence[int],
    activation: str,
    impl: str,
    tile: str | None,
) -> torch.Tensor:
    shape = ConvGeometry.unpack(geometry)
    w = _container(values, (crow, col, ccol, row, perm, row_order), shape)
    return _forward(x, values, bias, w, shape, activation, impl, tile)


def _bsr_conv_fake(
    x, values, bias, crow, col, ccol, row, perm, row_order, geometry, activation, impl, tile
):  # fmt: skip
    return _empty(x, ConvGeometry.unpack(geometry), suggest_memory_format(x))


def _bsr_conv_bwd(
    dout: torch.Tensor,
    x: torch.Tensor,
    values: torch.Tensor,
    crow: torch.Tensor,
    col: torch.Tensor,
    ccol: torch.Tensor,
    row: torch.Tensor,
    perm: torch.Tensor,
    row_order: torch.Tensor,
    geometry: Sequence[int],
    impl: str,
    tile: str | None,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = ConvGeometry.unpack(geometry)
    w = _container(values, (crow, col, ccol, row, perm, row_order), shape)
    return _backward(dout, x, values, w, shape, impl, tile, needs)


def _bsr_conv_bwd_fake(
    dout, x, values, crow, col, ccol, row, perm, row_order, geometry, impl, tile, needs
):  # fmt: skip
    need_dx, need_dvalues, need_dbias = needs
    return (
        torch.empty_like(x, memory_format=suggest_memory_format(x)) if need_dx else x.new_empty(0),
        values.new_empty(values.shape if need_dvalues else (0,)),
        dout.new_empty(dout.shape[1]) if need_dbias else dout.new_empty(0),
    )


def _bsr_conv_autograd(*inputs):
    return _BsrConvOp.apply(*inputs[:3], inputs[3:9], inputs[9:])


_bsr_conv_op = register_op("bsr_conv", _bsr_conv_fwd, _bsr_conv_fake, _bsr_conv_autograd)
_bsr_conv_bwd_op = register_op("bsr_conv_bwd", _bsr_conv_bwd, _bsr_conv_bwd_fake)


@register_flop_formula(_bsr_conv_op.overloadpacket)
def _bsr_conv_flops(x_shape, values_shape, *args, out_shape, **kwargs) -> int:
    """Two per stored weight and output pixel."""
    pixels = math.prod(out_shape) // out_shape[1]
    return 2 * pixels * math.prod(values_shape)


@register_flop_formula(_bsr_conv_bwd_op.overloadpacket)
def _bsr_conv_bwd_flops(
    dout_shape, x_shape, values_shape, *args, out_shape=None, **kwargs
) -> int:  # fmt: skip
    """As forward, once for ``dx`` and once for ``dvalues``."""
    need_dx, need_dvalues, _ = args[-1]
    pixels = math.prod(dout_shape) // dout_shape[1]
    return 2 * (need_dx + need_dvalues) * pixels * math.prod(values_shape)
