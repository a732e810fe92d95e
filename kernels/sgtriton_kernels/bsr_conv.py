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
from typing import Any

import torch
import torch.nn.functional as F
from torch._prims_common import suggest_memory_format
from torch.utils.flop_counter import register_flop_formula

from ._autocast import cast_inputs, without_autocast
from ._impl import resolve_impl
from ._ops import grads_with_graph, is_watched, register_op
from ._triton import is_native
from .activations import ACTIVATIONS, check_activation
from .bsr import BlockSparse
from .bsr_checks import check_agrees, check_dtype, why_no_kernel
from .bsr_conv_product import bsr_conv_dvalues, bsr_conv_dx, bsr_conv_fwd
from .bsr_conv_torch import bsr_conv_bwd_torch, bsr_conv_torch
from .conv_geometry import ConvGeometry
from .tiles import BsrTile, tile_for_bsr_conv


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
    tile: BsrTile | None = None,
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
        tile: what one program of the Triton kernels computes; default: by size.

    Returns:
        ``[B, O, H', W']`` or ``[O, H', W']``, dtype of ``x``; channels-last in memory where ``x``
        is, else contiguous.

    Raises:
        ValueError: shapes, sizes, dtypes or devices that do not fit; an unknown activation;
            ``impl`` asks for what cannot run.
    """
    if x.dim() not in (3, 4):
        raise ValueError(f"x must be [B, C, H, W] or [C, H, W], got {list(x.shape)}")
    sizes = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation}
    taps, steps, apart = (_numbers(name, size, 2, 1) for name, size in sizes.items())
    before, after = _padding(padding, taps, steps, apart)
    batched = x if x.dim() == 4 else x.unsqueeze(0)
    geometry = ConvGeometry(
        batched.shape[1], out_channels, _pair(taps), _pair(steps), _pair(before), _pair(after),
        _pair(apart), groups,
    )  # fmt: skip
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
    tile: BsrTile | None = None,
) -> torch.Tensor:
    """1-d convolution with a block-sparse weight: :func:`bsr_conv2d` on images of one line.

    Args:
        x: ``[B, C, L]`` or ``[C, L]``.

    Returns:
        ``[B, O, L']`` or ``[O, L']``; in memory the channels of ``x`` and of the result lie alike.
    """
    if x.dim() not in (2, 3):
        raise ValueError(f"x must be [B, C, L] or [C, L], got {list(x.shape)}")
    sizes = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation}
    taps, steps, apart = (_numbers(name, size, 1, 1) for name, size in sizes.items())
    before, after = _padding(padding, taps, steps, apart)
    batched = (x if x.dim() == 3 else x.unsqueeze(0)).unsqueeze(2)
    geometry = ConvGeometry(
        batched.shape[1], out_channels, (1, *taps), (1, *steps), (0, *before), (0, *after),
        (1, *apart), groups,
    )  # fmt: skip
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
    taps = _numbers("kernel_size", kernel_size, 2, 1)
    geometry = ConvGeometry(x.shape[-3], out_channels, _pair(taps), groups=groups)
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
    tile: BsrTile | None,
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
    index = (w.crow, w.col, w.ccol, w.row, w.perm, w.row_order)
    inputs = (x, values, bias)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    # backward takes what is added up, not what the activation makes of it
    fused = "none" if needs_grad else activation
    static = (geometry.pack(), fused, impl, None if tile is None else tile.pack())
    if is_watched(*inputs):
        out = _bsr_conv_op(*inputs, *index, *static)
    elif needs_grad:
        out = _BsrConv.apply(*inputs, index, static)
    else:
        out = _bsr_conv_fwd(*inputs, *index, *static)
    return out if fused == activation else ACTIVATIONS[activation](out)


def _numbers(name: str, given: Any, count: int, least: int) -> tuple[int, ...]:
    """``given`` as ``count`` ints; one stands for all of them."""
    found = tuple(given) if isinstance(given, Sequence) else (given,)
    if len(found) == 1:
        found *= count
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in found)
    if len(found) != count or not whole or min(found) < least:
        kind = "an int" if count == 1 else f"an int or {count} ints"
        raise ValueError(f"{name} must be {kind} >= {least}, got {given!r}")
    return found


def _pair(numbers: tuple[int, ...]) -> tuple[int, int]:
    first, second = numbers
    return first, second


def _padding(
    padding: Any, taps: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Zeros before and after the image, along each axis."""
    if not isinstance(padding, str):
        numbers = _numbers("padding", padding, len(taps), 0)
        return numbers, numbers
    if padding not in ("same", "valid"):
        raise ValueError(f"padding must be ints, 'same' or 'valid', got {padding!r}")
    if padding == "same" and max(stride) > 1:
        raise ValueError(f"padding 'same' needs a stride of 1, got {stride}")
    reach = [d * (n - 1) if padding == "same" else 0 for n, d in zip(taps, dilation, strict=True)]
    before = tuple(n // 2 for n in reach)
    return before, tuple(n - b for n, b in zip(reach, before, strict=True))


def _check_sizes(geometry: ConvGeometry, w: BlockSparse, x: torch.Tensor) -> None:
    groups, channels, out = geometry.groups, geometry.in_channels, geometry.out_channels
    for name, size in (("groups", groups), ("out_channels", out)):
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name} must be an int >= 1, got {size!r}")
    if channels % groups or out % groups:
        raise ValueError(f"groups must divide the {channels} channels of x and the {out} output "
                         f"channels, got {groups}")  # fmt: skip
    if w.shape != (shape := geometry.matrix_shape(w.block)):
        raise ValueError(
            f"w must be {shape} for {channels} input and {out} output channels, "
            f"{geometry.kernel[0]}x{geometry.kernel[1]} taps, {groups} groups and blocks of "
            f"{w.block}, got {w.shape}"
        )
    if min(geometry.out_size(x.shape[2:])) < 1:
        raise ValueError(
            f"x must be large enough for one output, got {list(x.shape)} for a kernel of "
            f"{geometry.kernel}, dilation {geometry.dilation}, padding {geometry.before}"
        )


def _empty(x: torch.Tensor, geometry: ConvGeometry) -> torch.Tensor:
    shape = (x.shape[0], geometry.out_channels, *geometry.out_size(x.shape[2:]))
    return torch.empty(
        shape, dtype=x.dtype, device=x.device, memory_format=suggest_memory_format(x)
    )


def _tile(
    which: str, packed: Sequence[int] | None, geometry: ConvGeometry, values: torch.Tensor,
    pixels: int,
) -> BsrTile:  # fmt: skip
    if packed:
        return BsrTile.unpack(packed)
    nnz, bn, bk = values.shape
    return tile_for_bsr_conv(
        which, pixels, (bn, bk), nnz, values.dtype,
        geometry.in_per_group % 16 == 0 and geometry.out_per_group % 16 == 0,
        is_native(values.device),
    )  # fmt: skip


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
    tile: Sequence[int] | None,
) -> torch.Tensor:
    shape = ConvGeometry.unpack(geometry)
    if not x.numel():
        return _empty(x, shape)
    if impl == "torch":
        with without_autocast(x.device):
            return bsr_conv_torch(
                x, values, crow, col, bias, shape, activation, suggest_memory_format(x)
            )  # fmt: skip
    out = _empty(x, shape)
    pixels = out.numel() // shape.out_channels
    bsr_conv_fwd(
        x, values.contiguous(), crow, col, row_order, bias, shape, activation, out,
        _tile("fwd", tile, shape, values, pixels),
    )  # fmt: skip
    return out


def _bsr_conv_fake(
    x, values, bias, crow, col, ccol, row, perm, row_order, geometry, activation, impl, tile
):  # fmt: skip
    return _empty(x, ConvGeometry.unpack(geometry))


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
    tile: Sequence[int] | None,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = ConvGeometry.unpack(geometry)
    need_dx, need_dvalues, need_dbias = needs
    # an op gives tensors: empty ones for what nobody needs
    dx = torch.empty_like(x, memory_format=suggest_memory_format(x)) if need_dx else x.new_empty(0)
    dvalues = torch.empty_like(values) if need_dvalues else values.new_empty(0)
    if not dout.numel():
        dvalues.zero_()
    elif impl == "torch":
        with without_autocast(x.device):
            bsr_conv_bwd_torch(
                dout, x, values, crow, col, shape, dx if need_dx else None,
                dvalues if need_dvalues else None,
            )  # fmt: skip
    else:
        pixels = dout.numel() // shape.out_channels
        if need_dx:
            chosen = _tile("dx", tile, shape, values, x.numel() // shape.in_channels)
            bsr_conv_dx(dout, values.contiguous(), col, row, perm, shape, dx, chosen)
        if need_dvalues:
            chosen = _tile("dvalues", tile, shape, values, pixels)
            bsr_conv_dvalues(dout, x, row, col, perm, shape, dvalues, chosen)
    dbias = dout.sum((0, 2, 3)) if need_dbias else dout.new_empty(0)
    return dx, dvalues, dbias


def _bsr_conv_bwd_fake(
    dout, x, values, crow, col, ccol, row, perm, row_order, geometry, impl, tile, needs
):  # fmt: skip
    need_dx, need_dvalues, need_dbias = needs
    return (
        torch.empty_like(x, memory_format=suggest_memory_format(x)) if need_dx else x.new_empty(0),
        torch.empty_like(values) if need_dvalues else values.new_empty(0),
        dout.new_empty(dout.shape[1]) if need_dbias else dout.new_empty(0),
    )


class _BsrConv(torch.autograd.Function):
    """The function behind the op, where nobody looks at ops."""

    @staticmethod
    def forward(ctx, x, values, bias, index, static):
        ctx.save_for_backward(x, values, *index)
        ctx.static = static
        return _bsr_conv_fwd(x, values, bias, *index, *static)

    @staticmethod
    def backward(ctx, dout):
        return *_grads(ctx, dout), None, None


class _BsrConvOp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, values, bias, index, static):
        with torch._C._AutoDispatchBelowAutograd():
            out = _bsr_conv_op(x, values, bias, *index, *static)
        ctx.save_for_backward(x, values, *index)
        ctx.static = static
        return out

    @staticmethod
    def backward(ctx, dout):
        return *_grads(ctx, dout), None, None


def _grads(ctx, dout):
    *needs, _, _ = ctx.needs_input_grad
    geometry, _, impl, tile = ctx.static
    if torch.is_grad_enabled():
        return _grads_with_graph(ctx, dout, needs)
    saved = ctx.saved_tensors
    compute: Any = _bsr_conv_bwd_op if is_watched(dout, *saved) else _bsr_conv_bwd
    grads = compute(dout, *saved, geometry, impl, tile, needs)
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


def _grads_with_graph(ctx, dout, needs):
    """The same through differentiable ops, with the dense weight."""
    x, values, *index = ctx.saved_tensors
    geometry, block = ConvGeometry.unpack(ctx.static[0]), (values.shape[1], values.shape[2])

    def out() -> torch.Tensor:
        crow, col, *derived = index
        shape = geometry.matrix_shape(block)
        matrix = BlockSparse._from_validated(values, crow, col, shape, *derived).to_dense()
        weight = _dense_weight(matrix, geometry, block)
        (top, left), (bottom, right) = geometry.before, geometry.after
        padded = F.pad(x, (left, right, top, bottom))
        stride, dilation, groups = geometry.stride, geometry.dilation, geometry.groups
        return F.conv2d(padded, weight, None, stride, 0, dilation, groups)

    dx, dvalues = grads_with_graph(out, (x, values), needs[:2], dout)
    return dx, dvalues, dout.sum((0, 2, 3)) if needs[2] else None


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
