"""Checks of convolutions with block-sparse weights, and of how such weights are made."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from sgtriton_kernels import (
    BlockSparse,
    bsr_conv1d,
    bsr_conv2d,
    bsr_conv2d_ref,
    gate_layout,
    gated_to_bsr,
    gated_to_bsr_ref,
    matrix_to_weight,
    weight_to_matrix,
)
from sgtriton_kernels.activations import ACTIVATIONS
from sgtriton_kernels.blocks import gates_to_pattern
from sgtriton_kernels.bsr_merge import merge_blocks
from sgtriton_kernels.kinds import gate_bounds

from .checks_blocks import Pair, sparse, with_values
from .judge import (
    DTYPES,
    Case,
    Check,
    Place,
    Results,
    dtype_name,
    judged,
    values,
    with_grads,
)


def bsr_conv_checks(place: Place) -> Iterator[Check]:
    """``bsr_conv2d`` and ``bsr_conv1d``: forward and every gradient."""
    geometries = [
        {"kernel": (3, 3), "padding": 1},
        {"kernel": (3, 3), "padding": (2, 1), "stride": 2, "dilation": (1, 2)},
        {"kernel": (1, 1), "stride": 2, "padding": 1},
        {"kernel": (2, 4), "padding": "same"},
        {"kernel": (3, 3), "padding": 1, "stride": (3, 2), "groups": 2},
        {"kernel": (3,), "padding": 1, "dilation": 2},
        {"kernel": (5,), "stride": 2},
    ]
    blocks, dtypes, formats = [(32, 32), (16, 16), (64, 64), (16, 32)], DTYPES, (True, False)
    images = [(2, False), (1, True), (0, True)]
    if place.quick:
        geometries, blocks, dtypes = geometries[:1] + geometries[-1:], blocks[:1], DTYPES[:1]
        formats, images = formats[:1], images[:1]
    chosen = [
        (geometry, block, dtype, last, count)
        for geometry, block, dtype, last, count in itertools.product(
            geometries, blocks, dtypes, formats, images
        )
        # one geometry in everything, one block and layout in every geometry
        if geometry is geometries[0] or (block == blocks[0] and last and count[0] == 2)
    ]
    for geometry, block, dtype, last, (count, whole) in chosen:
        named = {name: given for name, given in geometry.items() if name != "kernel"}
        kernel = "x".join(map(str, geometry["kernel"]))
        yield Check(
            f"bsr_conv{len(geometry['kernel'])}d",
            f"{block[0]}x{block[1]} taps {kernel} {_words(named)}"
            + (" channels last" if last and len(geometry["kernel"]) == 2 else ""),
            dtype_name(dtype),
            f"{count} images" + " whole" * whole,
            functools.partial(judged, _conv, place, geometry, block, dtype, last, count, whole),
        )


def bsr_convert_checks(place: Place) -> Iterator[Check]:
    """``gated_to_bsr`` and ``merge_blocks``."""
    layers = [((130, 200), (32, 32), 1), ((130, 200), (16, 64), 1), ((50, 70), (12, 12), 1),
              ((1, 40), (1, 8), 1), ((64, 40, 3, 3), (16, 16), 2), ((70, 90), (32, 1), 1),
              ((40, 60), (None, 1), 1)]  # fmt: skip
    dtypes = DTYPES[:1] if place.quick else DTYPES
    kinds = ("threshold", "hard_concrete")
    for (shape, block, groups), kind, dtype in itertools.product(
        layers[: 1 if place.quick else None], kinds, dtypes
    ):
        sides = "x".join("full" if side is None else str(side) for side in block)
        yield Check(
            "gated_to_bsr",
            f"{kind} {sides}",
            dtype_name(dtype),
            "x".join(map(str, shape)),
            functools.partial(judged, _gated_to_bsr, place, shape, block, groups, kind, dtype),
        )
    for old, new in (((16, 16), (32, 64)), ((8, 4), (16, 16)), ((32, 32), (64, 32))):
        for dtype in dtypes:
            yield Check(
                "merge_blocks",
                f"{old[0]}x{old[1]} to {new[0]}x{new[1]}",
                dtype_name(dtype),
                "100x150",
                functools.partial(judged, _merge, place, old, new, dtype),
            )


def _words(options: dict[str, object]) -> str:
    return " ".join(f"{name} {given}".replace(", ", "x").strip() for name, given in options.items())


def _conv(place: Place, geometry, block: Pair, dtype, last: bool, count: int, whole: bool) -> Case:
    options: dict[str, Any] = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1} | geometry
    kernel, groups = options.pop("kernel"), options["groups"]
    channels, out_channels, device = 2 * block[1] + 8 * groups, block[0] + 12 * groups, place.device
    make = functools.partial(values, dtype=dtype, device=device, whole=whole)
    layout = gate_layout((out_channels, channels // groups, *kernel), block, groups)
    opened = torch.rand(layout.gate_shape) < 0.6
    opened.view(-1)[-1] = True
    pattern = gates_to_pattern(opened, layout).to(device)
    matrix = weight_to_matrix(make(*layout.weight_shape), layout)
    w = BlockSparse.from_dense(matrix, layout.block, pattern)
    x = make(count, channels, *((9, 11) if len(kernel) == 2 else (31,)))
    if last and len(kernel) == 2:
        x = x.contiguous(memory_format=torch.channels_last)
    bias = make(out_channels)
    sizes: dict[str, Any] = {"out_channels": out_channels, "kernel_size": kernel}
    tensors, names = (x, w.values, bias), ("dx", "dvalues", "dbias")
    activation = "relu" if whole else "silu"

    def op(x, w, bias, activation):
        call = bsr_conv2d if len(kernel) == 2 else bsr_conv1d
        given = options | sizes | {"activation": activation, "impl": place.impl}
        return call(x, w, bias, **given)

    def reference(x, w, bias, activation):
        if len(kernel) == 2:
            return bsr_conv2d_ref(x, w, bias, **options, **sizes, activation=activation)
        # an image of one line, padded and strided along it
        line: dict[str, Any] = {
            name: (given if name == "groups" else (0 if name == "padding" else 1, given))
            for name, given in options.items()
        }
        sizes_2d: dict[str, Any] = sizes | {"kernel_size": (1, *kernel)}
        out = bsr_conv2d_ref(x.unsqueeze(2), w, bias, **line, **sizes_2d, activation=activation)
        return out.squeeze(2)

    def dense(x, w, bias, activation):
        call = F.conv2d if len(kernel) == 2 else F.conv1d
        weight = matrix_to_weight(w.to_dense(), layout)
        return ACTIVATIONS[activation or "none"](call(x, weight, bias, **options))

    def of(call: Callable[..., torch.Tensor], *given: torch.Tensor) -> Results:
        with torch.no_grad():
            active = call(given[0], with_values(w, given[1]), given[2], activation)
        leaves = [t.clone().requires_grad_() for t in given]
        y = call(leaves[0], with_values(w, leaves[1]), leaves[2], None)
        return {"act": active, **with_grads(y, names, leaves, dy.to(y.dtype))}

    dy = torch.empty(0)
    with torch.no_grad():
        dy = make(*reference(x, w, bias, None).shape)
    return Case(
        lambda: of(op, *tensors),
        lambda: of(reference, *(t.double() for t in tensors)),
        lambda: of(dense, *tensors),
        (*tensors, dy),
    )


def _gated_to_bsr(place: Place, shape, block, groups: int, kind: str, dtype) -> Case:
    layout = gate_layout(shape, block, groups)
    low, high = gate_bounds(kind)
    gate = (low + (high - low) * torch.rand(layout.gate_shape)).to(place.device)
    w = values(*shape, dtype=dtype, device=place.device, whole=False)

    def parts(stored: BlockSparse) -> Results:
        return {"values": stored.values, "crow": stored.crow, "col": stored.col}

    def plain() -> Results:
        return {"values": gated_to_bsr_ref(w, gate, block, kind, groups).values}

    def wanted() -> Results:
        return parts(gated_to_bsr_ref(w.double(), gate.double(), block, kind, groups))

    return Case(
        lambda: parts(gated_to_bsr(w, gate, block, groups=groups, kind=kind, impl=place.impl)),
        wanted,
        plain,
        (w, gate),
    )


def _merge(place: Place, old: Pair, new: Pair, dtype) -> Case:
    w = sparse(100, 150, old, dtype, place.device, False)
    dy = values(100, 150, dtype=dtype, device=place.device, whole=False)

    def of(merged: bool) -> Results:
        leaf = w.values.clone().requires_grad_()
        matrix = with_values(w, leaf)
        dense = (merge_blocks(matrix, new) if merged else matrix).to_dense()
        (grad,) = torch.autograd.grad(dense, leaf, dy)
        return {"dense": dense.detach(), "dvalues": grad}

    return Case(lambda: of(True), lambda: of(False), dict, (w.values, dy))
