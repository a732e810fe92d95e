"""Product with a block-sparse weight, with bias and activation in the same pass.

    out = act(x @ W^T + bias)        W: stored blocks only

Sums run in fp32, bias and activation are applied to them, and the result is rounded once.
Forward only: a backward pass raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch.utils.flop_counter import register_flop_formula

from ._autocast import cast_like_autocast
from ._impl import resolve_impl
from ._ops import add_op_namespace_prefix, ops
from ._triton import is_native
from .bsr import BlockSparse
from .bsr_product import bsr_linear_fwd, is_aligned
from .bsr_torch import ACTIVATIONS, bsr_linear_torch
from .tiles import BsrTile, tile_for_bsr_linear

_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_DTYPES = (*_TRITON_DTYPES, torch.float64)


def bsr_linear(
    x: torch.Tensor,
    w: BlockSparse,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    *,
    impl: str | None = None,
    tile: BsrTile | None = None,
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
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be None or one of {tuple(ACTIVATIONS)[1:]}, got "
                         f"{activation!r}")  # fmt: skip
    impl = resolve_impl(impl, device, "bsr_linear", _why_unsupported(x.dtype, w.block))
    return _bsr_linear_op(
        x, values, w.crow, w.col, w.ccol, w.row, w.perm, w.row_order, bias, n, activation, impl,
        None if tile is None else tile.pack(),
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
    return ACTIVATIONS[activation or "none"](out).to(x.dtype)


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
        if tile:
            chosen = BsrTile.unpack(tile)
        else:
            chosen = tile_for_bsr_linear(
                "fwd", len(x2), n, x2.shape[1], block, len(values), x2.dtype,
                is_aligned(x2), is_native(x2.device),
            )  # fmt: skip
        out = bsr_linear_fwd(x2, values, crow, col, row_order, bias, None, n, activation, chosen)
    else:
        autocast = torch.is_autocast_enabled(x.device.type)
        # the entry has cast already; in here autocast would round the sums
        off = torch.autocast(x.device.type, enabled=False) if autocast else nullcontext()
        with off:
            out = bsr_linear_torch(x2, values, crow, col, bias, n, activation)
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
