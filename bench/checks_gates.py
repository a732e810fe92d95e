"""Checks of the ops that apply gates: gated weights and their products."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from sgtriton_kernels import (
    GateLayout,
    expand_gates,
    gate_layout,
    gate_weight,
    gated_linear,
    sum_blocks,
)
from sgtriton_kernels.blocks import Block
from sgtriton_kernels.gated_candidates import why_not_skip
from sgtriton_kernels.kinds import (
    BETA,
    GAMMA,
    ZETA,
    eval_gates,
    gate_bounds,
    open_chance,
    open_gates,
)

from .judge import (
    DTYPES,
    Case,
    Check,
    Place,
    Results,
    WrongError,
    dtype_name,
    judged,
    values,
    with_grads,
)

# kind, and whether its gates are drawn
KINDS = (
    ("threshold", False), ("bernoulli", True), ("hard_concrete", False), ("hard_concrete", True),
)  # fmt: skip
_SIGMAS = 6  # beyond which a share of draws is not chance any more


def gate_weight_checks(place: Place) -> Iterator[Check]:
    """``gate_weight``: all kinds and blocks, linear and convolution, forward and backward."""
    layers: list[tuple[tuple[int, ...], Block, int]] = [
        ((70, 130), (1, 1), 1), ((70, 130), (32, 32), 1), ((70, 130), (4, 4), 1),
        ((300, 280), (128, 128), 1), ((37, 70), (16, 64), 1), ((37, 70), (1, None), 1),
        ((37, 70), (None, 1), 1), ((37, 70), (None, None), 1), ((1, 1), (1, 1), 1),
        ((1, 90), (4, 4), 1), ((0, 16), (4, 4), 1), ((24, 20, 3, 3), (16, 16), 2),
        ((24, 10, 3, 3), (1, 1), 1), ((10, 6, 5), (4, 4), 1),
    ]  # fmt: skip
    if place.quick:
        layers = layers[:2] + layers[10:12]
    elif place.is_card:
        layers.insert(2, ((4096, 3000), (1, 1), 1))
        layers.insert(3, ((4096, 3000), (64, 64), 1))
    dtypes = DTYPES[:1] if place.quick else DTYPES
    for (shape, block, groups), (kind, drawn), dtype in itertools.product(layers, KINDS, dtypes):
        yield Check(
            "gate_weight",
            f"{kind}{' drawn' * drawn} {block_name(block)}",
            dtype_name(dtype),
            "x".join(map(str, shape)) + f" groups {groups}" * (groups > 1),
            functools.partial(judged, _gate_weight, place, shape, block, groups, kind, drawn,
                              dtype),
        )  # fmt: skip


def gated_linear_checks(place: Place) -> Iterator[Check]:
    """``gated_linear``: methods, kinds, blocks; forward and every gradient."""
    blocks: list[Block] = [(32, 32), (1, 1), (64, 64), (4, 4), (16, 64), (128, 128), (None, 1)]
    # rows, outputs, inputs, and whether of whole numbers
    sizes = [(67, 160, 192, False), (33, 130, 203, True), (1, 48, 64, True), (0, 48, 64, True)]
    if place.quick:
        blocks, sizes = blocks[:2], sizes[1::2]
    elif place.is_card:
        sizes.insert(1, (1030, 2048, 1536, False))
    dtypes = DTYPES[:1] if place.quick else DTYPES
    pairs = [(dtype, dtype) for dtype in dtypes]
    pairs += [(torch.bfloat16, torch.float32)] * (not place.quick)
    for (x_dtype, w_dtype), size, block in itertools.product(pairs, sizes, blocks):
        layout = gate_layout(size[1:3], block)
        for method in ("multiply", "fused", "skip"):
            if why_not(method, layout, place.impl):
                continue
            kinds = KINDS if method == "multiply" else KINDS[:2]
            reopens = (True, False) if method == "skip" else (True,)
            for (kind, drawn), reopen in itertools.product(kinds, reopens):
                if not reopen and kind != "threshold":
                    continue
                name = f"{method} {kind}{' drawn' * drawn} {block_name(block)}"
                yield Check(
                    "gated_linear",
                    name + " reopen=False" * (not reopen),
                    dtype_name(x_dtype) + f", w {dtype_name(w_dtype)}" * (x_dtype != w_dtype),
                    size_name(size),
                    functools.partial(judged, _gated_linear, place, size, block, kind, drawn,
                                      x_dtype, w_dtype, method, reopen),
                )  # fmt: skip


def why_not(method: str, layout: GateLayout, impl: str) -> str | None:
    """Why an implementation has no such method for these gates; ``None`` where it has."""
    if method == "skip":
        return (
            "per weight"
            if layout.per_weight
            else why_not_skip(layout)
            if impl == "triton"
            else None
        )
    return "a Triton kernel only" if method == "fused" and impl == "torch" else None


def block_name(block: Block) -> str:
    return "x".join("full" if side is None else str(side) for side in block)


def size_name(size: tuple[int, int, int, bool]) -> str:
    return "x".join(map(str, size[:3])) + " whole" * size[3]


def some_gates(layout: GateLayout, kind: str, device: torch.device) -> torch.Tensor:
    """Gates on both sides of every bound."""
    low, high = gate_bounds(kind)
    return (low + (high - low) * (1.4 * torch.rand(layout.gate_shape) - 0.2)).to(device)


def multipliers(
    layout: GateLayout, gate: torch.Tensor, kind: str, seed: torch.Tensor | None, impl: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the op multiplies weights with, and its slope: both per gate, in fp64.

    Seen in a weight of ones. That they are what the kind says is looked at here.
    """
    ones = torch.ones(layout.weight_shape, device=gate.device)
    leaf = gate.clone().requires_grad_()
    spread = gate_weight(
        ones, leaf, layout.block, groups=layout.groups, kind=kind, seed=seed, impl=impl
    )
    cover = sum_blocks(ones.double(), layout)
    (slope,) = torch.autograd.grad(spread.sum(), leaf)
    z, slope = sum_blocks(spread.detach().double(), layout) / cover, slope.double() / cover
    if not gate.numel():
        return z, slope
    if (spread - expand_gates(z, layout)).abs().max() > 1e-6:
        raise WrongError("weights of one gate are multiplied with different numbers")
    wanted = eval_gates(gate.double(), kind)
    if kind == "bernoulli":
        low, high = gate_bounds(kind)
        wanted = torch.where((gate > low) & (gate < high), z, wanted)
        _plausible("open gates", (z == 1).double(), gate.double().clamp(low, high))
        z_is_bit = bool(((z == 0) | (z == 1)).all())
        if not z_is_bit:
            raise WrongError("drawn gates are neither 0 nor 1")
    elif seed is not None:
        wanted = z.clamp(0, 1)
        _plausible("open gates", (z > 0).double(), open_chance(gate.double(), kind))
    if (z - wanted).abs().max() > 1e-6:
        raise WrongError(f"gates are read as {kind} gates should not be")
    if kind == "hard_concrete":
        s = (z - GAMMA) / (ZETA - GAMMA)
        steep = s * (1 - s) * (ZETA - GAMMA) / (1 if seed is None else BETA)
        steep = torch.where((z > 0) & (z < 1), steep, 0.0)
    else:
        steep = torch.ones_like(z)
    if (slope - steep).abs().max() > 1e-5:
        raise WrongError("gates have another slope than their kind")
    return z, slope


def _plausible(name: str, drawn: torch.Tensor, chance: torch.Tensor) -> None:
    """Raise where the share of draws is not what chance gives."""
    off = (drawn - chance).sum().abs().item()
    sigma = (chance * (1 - chance)).sum().sqrt().item()
    if off > _SIGMAS * sigma + 1e-3:
        raise WrongError(f"{name}: {off:.0f} too many or too few, chance gives {sigma:.1f}")


def _is_few(layout: GateLayout) -> bool:
    """Whether gates are so few that the largest error of their gradients is a matter of luck."""
    return math.prod(layout.gate_shape) < 64


def draw_seed(drawn: bool, device: torch.device) -> torch.Tensor | None:
    return torch.randint(2**40, (1,)).to(device) if drawn else None


def _gate_weight(place: Place, shape, block, groups, kind, drawn, dtype) -> Case:
    device, impl = place.device, place.impl
    layout = gate_layout(shape, block, groups)
    make = functools.partial(values, *shape, device=device, whole=_is_few(layout))
    w, dout = make(dtype=torch.float32), make(dtype=dtype)
    gate, seed = some_gates(layout, kind, device), draw_seed(drawn, device)
    z, slope = multipliers(layout, gate, kind, seed, impl)

    def run() -> Results:
        leaves = w.clone().requires_grad_(), gate.clone().requires_grad_()
        out = gate_weight(
            *leaves, block, groups=groups, kind=kind, seed=seed, dtype=dtype, impl=impl
        )
        dw, dgate = torch.autograd.grad(out, leaves, dout)
        return {"out": out.detach(), "dw": dw, "dgate": dgate}

    def by_hand(wide: torch.dtype, low: torch.dtype) -> Results:
        spread = expand_gates(z.to(wide), layout)
        d, weight = dout.to(wide), w.to(wide)
        return {
            "out": torch.where(spread == 0, 0.0, weight * spread).to(low),
            "dw": torch.where(spread == 0, 0.0, d * spread),
            "dgate": slope.to(wide) * sum_blocks(d * weight, layout),
        }

    return Case(
        run,
        lambda: by_hand(torch.float64, torch.float64),
        lambda: by_hand(torch.float32, dtype),
        (w, gate, dout),
    )


def _gated_linear(place: Place, size, block, kind, drawn, x_dtype, w_dtype, method, reopen) -> Case:
    (m, n, k, whole), device, impl = size, place.device, place.impl
    layout = gate_layout((n, k), block)
    whole = whole or _is_few(layout)
    make = functools.partial(values, device=device, whole=whole)
    x, dy = make(m, k, dtype=x_dtype), make(m, n, dtype=x_dtype)
    w, bias = make(n, k, dtype=w_dtype), make(n, dtype=x_dtype)
    gate, seed = some_gates(layout, kind, device), draw_seed(drawn, device)
    z, slope = multipliers(layout, gate, kind, seed, impl)
    names = ("dx", "dw", "dgate", "dbias")

    def run() -> Results:
        leaves = [t.clone().requires_grad_() for t in (x, w, gate, bias)]
        options = {"kind": kind, "seed": seed, "reopen": reopen, "method": method, "impl": impl}
        y = gated_linear(*leaves, block=block, **options)
        return with_grads(y, names, leaves, dy)

    def wanted() -> Results:
        x64, dy64, spread = x.double(), dy.double(), expand_gates(z, layout)
        read = w.to(x_dtype) if x_dtype.itemsize < w_dtype.itemsize else w  # as rounded to x
        gated = torch.where(spread == 0, 0.0, read.double() * spread)
        d = dy64.T @ x64
        dgate = slope * sum_blocks(d * w.double(), layout)
        return {
            "y": x64 @ gated.T + bias.double(),
            "dx": dy64 @ gated,
            "dw": torch.where(spread == 0, 0.0, d * spread),
            "dgate": dgate if reopen else torch.where(open_gates(gate, kind), dgate, 0.0),
            "dbias": dy64.sum(0),
        }

    def plain() -> Results:
        leaves = [t.clone().requires_grad_() for t in (x, w, gate, bias)]
        through = z.float() + slope.float() * (leaves[2] - gate)
        gated = (leaves[1] * expand_gates(through, layout).to(w_dtype)).to(x_dtype)
        out = with_grads(F.linear(leaves[0], gated, leaves[3]), names, leaves, dy)
        if not reopen:
            out["dgate"] = torch.where(open_gates(gate, kind), out["dgate"], 0.0)
        return out

    return Case(run, wanted, plain, (x, w, gate, bias, dy))
