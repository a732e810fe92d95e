"""The products that every card is asked to tune, those that tell most first."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from sgtriton_kernels import BlockSparse, gate_layout
from sgtriton_kernels.blocks import GateLayout, gates_to_pattern, weight_to_matrix
from sgtriton_kernels.conv_geometry import ConvGeometry

from sgtriton.conv_products import ConvProduct, Images
from sgtriton.gated_problem import GatedProduct
from sgtriton.patterns import random_pattern
from sgtriton.products import AnyProduct, Product

# each with what tells most first
SHAPES = ((4096, 4096), (1024, 4096), (4096, 1024), (11008, 4096), (4096, 11008))  # N, K
ROWS = (16, 1, 128, 1024, 4096)
BLOCKS = (64, 32, 128, 16)
DENSITIES = (0.05, 0.2, 0.5)  # of the blocks, one for each bucket of a record
LAYERS = ((256, 256, 28), (512, 512, 14), (128, 128, 56), (64, 64, 56))  # channels, out, side
IMAGES = (8, 1, 32)
STEP_SHAPES = ((4096, 4096), (1024, 4096), (4096, 1024))
STEP_ROWS = (1024, 128, 4096)
STEP_DENSITIES = (0.2, 0.5, 0.05, 0.8)  # likewise of gates, where somebody counts the open ones


@dataclass(frozen=True)
class Standard:
    """A product to tune.

    Args:
        behind: how far, by what it shares with the first.
        make: makes it on a device, in a dtype, when its turn comes.
    """

    behind: int
    make: Callable[[torch.dtype, torch.device], AnyProduct]


def standard_products(trains: bool, counted: bool) -> list[Standard]:
    """All of them in order: a linear layer's forward pass first.

    Args:
        trains: whether the gradients of products over blocks have candidates of their own.
        counted: whether steps with gates have a record for each bucket of density.
    """
    linear, conv = (DENSITIES, SHAPES, BLOCKS, ROWS), (DENSITIES, LAYERS, BLOCKS, IMAGES)
    steps = STEP_DENSITIES if counted else STEP_DENSITIES[:1]
    found = [
        *_every(0, functools.partial(_linear, False), *linear),
        *_every(1, functools.partial(_conv, False), *conv),
        *_every(1, _step, steps, STEP_SHAPES, BLOCKS, STEP_ROWS),
    ]
    if trains:
        found += _every(2, functools.partial(_linear, True), *linear)
        found += _every(3, functools.partial(_conv, True), *conv)
    return sorted(found, key=lambda standard: standard.behind)


def _every(
    behind: int, make: Callable[..., AnyProduct], *choices: tuple[object, ...]
) -> list[Standard]:
    found = []
    for places in itertools.product(*(range(len(some)) for some in choices)):
        chosen = [some[place] for some, place in zip(choices, places, strict=True)]
        found.append(Standard(behind + sum(places), functools.partial(make, *chosen)))
    return found


def _linear(
    trains: bool,
    density: float,
    shape: tuple[int, int],
    block: int,
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Product:
    is_open = _at_random(gate_layout(shape, (block, block)), density, device)
    weight = torch.randn(shape, dtype=dtype, device=device)
    matrix = BlockSparse.from_dense(weight, (block, block), is_open)
    return Product("linear", matrix, (rows,), trains)


def _conv(
    trains: bool,
    density: float,
    layer: tuple[int, int, int],
    block: int,
    images: int,
    dtype: torch.dtype,
    device: torch.device,
) -> ConvProduct:
    channels, out_channels, side = layer
    layout = gate_layout((out_channels, channels, 3, 3), (block, block))
    pattern = gates_to_pattern(_at_random(layout, density, device), layout)
    weight = torch.randn(layout.weight_shape, dtype=dtype, device=device)
    met = Images(
        ConvGeometry(channels, out_channels, (3, 3), before=(1, 1), after=(1, 1)),
        (images, channels, side, side),
        channels_last=True,
    )
    matrix = BlockSparse.from_dense(weight_to_matrix(weight, layout), layout.block, pattern)
    return ConvProduct(f"3x3 on {side}x{side}", matrix, (met,), trains)


def _step(
    density: float,
    shape: tuple[int, int],
    block: int,
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
) -> GatedProduct:
    """A layer in training as ``patch`` makes it, the weight in fp32."""
    layout = gate_layout(shape, (block, block))
    gate = torch.where(_at_random(layout, density, device), 0.9, 0.1)
    return GatedProduct(
        "training step", layout, gate, "threshold", True, (dtype, torch.float32), (rows,),
        trains=True, dgate=True,
    )  # fmt: skip


def _at_random(layout: GateLayout, density: float, device: torch.device) -> torch.Tensor:
    """``layout.gate_shape`` bool. That share of the gates open, one at the least."""
    gates = math.prod(layout.gate_shape)
    closed = gates - max(1, round(density * gates))
    return random_pattern(layout.gate_shape, closed).to(device)
