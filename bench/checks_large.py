"""Checks of tensors with more than 2^31 elements, whose offsets fit no 32 bits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from sgtriton_kernels import bsr_conv2d, bsr_linear, gate_weight, gated_linear

from .checks_blocks import sparse
from .judge import Case, Check, Place, Results, SkippedError, judge

_SIDE = 2048
_ROWS = 2**31 // _SIDE + 5  # more elements than 32 bits count
_MIDDLE = 2**31 // _SIDE  # the row of the 2^31st element
_METHOD = "fused"
_SHOWN = 64  # rows that are compared: at the start, at the 2^31st element, at the end
_BF16 = torch.bfloat16


def large_checks(place: Place) -> Iterator[Check]:
    """One for each op that reads or writes so much: forward, and the gradients of as much."""
    # beside it, how many times the bytes of one such tensor there are at once
    tensors: dict[str, tuple[Callable[[Place], Case], int]] = {
        "bsr_linear": (_linear, 5), "gate_weight": (_gate_weight, 8),
        "gated_linear": (_gated_linear, 5), "bsr_conv2d": (_conv, 5),
    }  # fmt: skip
    for op, (make, count) in tensors.items():
        yield Check(
            op, "over 2^31 elements", "bfloat16", f"{_ROWS}x{_SIDE}",
            functools.partial(_judged, make, place, count * 2 * _ROWS * _SIDE),
        )  # fmt: skip


def _judged(make: Callable[[Place], Case], place: Place, needed: int) -> None:
    """Judge a case where ``needed`` bytes are free."""
    if not place.is_card:
        raise SkippedError("for cards: it would take a CPU minutes")
    free, _ = torch.cuda.mem_get_info(place.device)
    free += torch.cuda.memory_reserved(place.device) - torch.cuda.memory_allocated(place.device)
    if free < needed:
        raise SkippedError(f"{free / 2**30:.0f} GiB are free, it takes {needed / 2**30:.0f}")
    try:
        judge(make(place), repeats=2)
    except torch.OutOfMemoryError as error:
        raise SkippedError(f"not enough memory: {str(error).splitlines()[0]}") from error
    finally:
        torch.cuda.empty_cache()


def _large(place: Place) -> torch.Tensor:
    """Small whole numbers, ``[rows, side]``."""
    out = torch.empty(_ROWS, _SIDE, dtype=_BF16, device=place.device)
    return out.random_(-1, 2)


def _ends(t: torch.Tensor) -> torch.Tensor:
    """Rows at the start, around the 2^31st element, and at the end."""
    parts = t[:_SHOWN], t[_MIDDLE - _SHOWN : _MIDDLE + 1], t[-4:]
    return torch.cat(parts).clone()


def _of_rows(
    call: Callable[[torch.Tensor], torch.Tensor],
    dense: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
) -> Case:
    """A call whose rows do not depend on each other, forward and backward from ``dy = x``."""

    def run() -> Results:
        leaf = x.detach().requires_grad_()
        y = call(leaf)
        (dx,) = torch.autograd.grad(y, leaf, x)
        return {"y": _ends(y.detach()), "dx": _ends(dx)}

    def shown(dtype: torch.dtype) -> Results:
        leaf = _ends(x).to(dtype).requires_grad_()
        y = dense(leaf)
        (dx,) = torch.autograd.grad(y, leaf, leaf.detach())
        return {"y": y.detach(), "dx": dx}

    return Case(run, lambda: shown(torch.float64), lambda: shown(_BF16))


def _linear(place: Place) -> Case:
    w = sparse(_SIDE, _SIDE, (64, 64), _BF16, place.device, whole=True)
    dense = w.to_dense()
    return _of_rows(
        lambda x: bsr_linear(x, w, impl=place.impl),
        lambda x: F.linear(x, dense.to(x.dtype)),
        _large(place),
    )


def _gated_linear(place: Place) -> Case:
    w = torch.randint(-1, 2, (_SIDE, _SIDE), device=place.device).to(_BF16)
    gate = torch.rand(_SIDE, _SIDE, device=place.device)
    gated = torch.where(gate > 0.5, w, 0.0)
    return _of_rows(
        lambda x: gated_linear(x, w, gate, method=_METHOD, impl=place.impl),
        lambda x: F.linear(x, gated.to(x.dtype)),
        _large(place),
    )


def _gate_weight(place: Place) -> Case:
    w = _large(place)
    gate = torch.rand(w.shape, device=place.device)

    def run() -> Results:
        leaf, leaf_gate = w.detach().requires_grad_(), gate.detach().requires_grad_()
        out = gate_weight(leaf, leaf_gate, impl=place.impl)
        dw, dgate = torch.autograd.grad(out, (leaf, leaf_gate), w)
        return {"out": _ends(out.detach()), "dw": _ends(dw), "dgate": _ends(dgate)}

    def wanted() -> Results:
        shown, is_open = _ends(w), _ends(gate) > 0.5
        gated = torch.where(is_open, shown, 0.0)
        return {"out": gated, "dw": gated, "dgate": shown.float() ** 2}

    return Case(run, wanted, dict)


def _conv(place: Place) -> Case:
    """One tap of 1: pixels are the rows of a product."""
    w = sparse(_SIDE, _SIDE, (64, 64), _BF16, place.device, whole=True)
    dense = w.to_dense()
    height = 128
    images = -(-_ROWS // height**2)
    x = torch.empty(images * height**2, _SIDE, dtype=_BF16, device=place.device).random_(-1, 2)

    def conv(x: torch.Tensor) -> torch.Tensor:
        lying = x.view(images, height, height, _SIDE).permute(0, 3, 1, 2)
        y = bsr_conv2d(lying, w, out_channels=_SIDE, kernel_size=1, impl=place.impl)
        return y.permute(0, 2, 3, 1).reshape(-1, _SIDE)

    return _of_rows(conv, lambda x: F.linear(x, dense.to(x.dtype)), x)
