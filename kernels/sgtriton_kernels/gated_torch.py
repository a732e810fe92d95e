"""Gated linear layer in library calls: what the ``torch`` implementation of ``gated_linear`` does.

*multiply* forms the gated weight in a scratch buffer and multiplies by it. One buffer for each
thread and dtype is kept between calls and reused by all layers: on a CPU, fresh memory of a
weight's size costs more than the arithmetic on it. Nothing of it is saved for backward, which forms
the gated weight again.

*skip* multiplies what is open: :mod:`.skip_torch`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ._scratch import scratch
from .bitmap import pack_bitmap, unpack_bitmap
from .blocks import GateLayout, sum_blocks
from .gate_torch import binarise, keep_open
from .skip_torch import exact_dw, skip_bwd, skip_fwd

# What skipping costs, in multiply-adds of the dense product; fitted to measurements on two AVX2
# cores, blocks of 16x16 to 128x128, weights of 300x784 to 4096x1024.
_CALLS = 10_000_000  # library calls that do not depend on the sizes
_LAID_OUT = 100  # an element of x or y that is laid out in blocks
_MULTIPLIED = 1.05  # a weight of an open block, for each row of x
_GATHERED = 12.5  # a row and a column of an open block, likewise
_GAIN = 0.9  # by how much skipping must win
_SHORTEST = 16  # side of a block; batched products of shorter ones never pay


def forward(
    x2: torch.Tensor,
    w: torch.Tensor,
    gate: torch.Tensor,
    seed: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: torch.Tensor,
    layout: GateLayout,
    method: str,
) -> torch.Tensor:
    """``x2 [M, K] @ (w * b)^T + bias``; drawn gates go into ``bits`` as well."""
    is_open = None
    if seed is not None:
        is_open = binarise(gate, "bernoulli", seed)
        bits.copy_(pack_bitmap(is_open))
    if choose(method, gate, is_open, layout, len(x2)) == "skip":
        return skip_fwd(x2, w, _open_mask(gate, is_open), bias, layout)
    is_open = None if is_open is None else is_open.to(x2.dtype)
    return F.linear(x2, _gated(w, gate, is_open, layout, x2.dtype), bias)


def backward(
    dy2: torch.Tensor,
    x2: torch.Tensor,
    w: torch.Tensor,
    gate: torch.Tensor,
    bits: torch.Tensor,
    layout: GateLayout,
    method: str,
    needs: tuple[bool, bool, bool],
    reopen: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of ``x2``, ``w`` and ``gate``, those that are needed and perhaps more."""
    is_open = unpack_bitmap(bits, gate.shape) if bits.numel() else None
    need_dx, need_dw, need_dgate = needs
    dx = dw = dgate = None
    if choose(method, gate, is_open, layout, len(x2)) == "skip":
        mask = _open_mask(gate, is_open)
        exact = need_dgate and reopen
        if need_dx or not exact:
            sampled = (need_dw and not exact, need_dgate and not exact)
            dx, dw, dgate = skip_bwd(dy2, x2, w, mask, layout, need_dx, *sampled)
        if exact:
            dw, dgate = exact_dw(dy2, x2, w, gate, mask, layout)
        return dx, dw, dgate
    is_open = None if is_open is None else is_open.to(x2.dtype)  # once for dx and dW
    if need_dx:
        dx = dy2 @ _gated(w, gate, is_open, layout, dy2.dtype)
    if need_dw or need_dgate:
        dw, dgate = _masked_dw(dy2, x2, w, gate, is_open, layout, need_dgate)
        if dgate is not None and not reopen:
            dgate.masked_fill_(~_open_mask(gate, is_open), 0)
    return dx, dw, dgate


def choose(
    method: str, gate: torch.Tensor, is_open: torch.Tensor | None, layout: GateLayout, m: int
) -> str:
    """``"multiply"`` or ``"skip"``: as told, or whichever should be faster."""
    if method != "auto":
        return method if gate.numel() else "multiply"  # an empty layer has no blocks
    most = most_open(m, layout) if gate.device.type == "cpu" else 0  # counting would wait for it
    if not most:
        return "multiply"
    count = int(_open_mask(gate, is_open).count_nonzero())
    return "skip" if count < most else "multiply"


def most_open(m: int, layout: GateLayout) -> float:
    """The number of open blocks below which skipping should be faster, for ``m`` rows of ``x``.

    0 where it never is.
    """
    (n, k), (bn, bk) = layout.weight_shape, layout.block
    if min(bn, bk) < _SHORTEST:
        return 0
    left = _GAIN * m * n * k - _LAID_OUT * m * (n + k) - _CALLS
    most = left / (m * (_MULTIPLIED * bn * bk + _GATHERED * (bn + bk)) + 1)
    return most if most >= 1 else 0


def _gated(w, gate, is_open, layout: GateLayout, dtype: torch.dtype) -> torch.Tensor:
    """The gated weight in the scratch buffer."""
    n, k = layout.weight_shape
    if w.is_contiguous() or not w.T.is_contiguous():
        out = scratch(n * k, dtype, w.device).view(n, k)
    else:  # laid out as the weight, so that the library takes the path of the dense layer
        out = scratch(n * k, dtype, w.device).view(k, n).T
    if w.dtype == dtype:
        keep_open(w, gate, is_open, layout, out)
    else:
        out.copy_(w)
        keep_open(out, gate, is_open, layout, out)
    return out


def _masked_dw(dy2, x2, w, gate, is_open, layout: GateLayout, need_dgate: bool):
    """``dW`` and ``dgate`` from the dense product."""
    d = dy2.t() @ x2
    wide = torch.promote_types(w.dtype, torch.float32)
    dgate = None
    if need_dgate and layout.per_weight:
        dgate = torch.mul(d, w) if d.dtype == w.dtype == wide else d.to(wide) * w.to(wide)
        dgate = dgate.to(gate.dtype)
    elif need_dgate:
        product = scratch(w.numel(), wide, w.device).view(w.shape)
        torch.mul(d, w, out=product) if d.dtype == w.dtype == wide else product.copy_(d).mul_(w)
        dgate = sum_blocks(product, layout).to(gate.dtype)
    dw = d if d.dtype == w.dtype else d.to(w.dtype)
    keep_open(dw, gate, is_open, layout, dw)
    return dw, dgate


def _open_mask(gate: torch.Tensor, is_open: torch.Tensor | None) -> torch.Tensor:
    """The gates that were drawn open, or lie above 0.5 where nothing was drawn."""
    return gate > 0.5 if is_open is None else is_open
