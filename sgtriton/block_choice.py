"""Which block of gates pays on a device: the smallest that is nearly as fast as any, at a target.

Small blocks cost less accuracy, large ones reach more of a device's speed. Nothing is timed: a card
is asked by the roofline model, a CPU by the cost model that was fitted to measurements.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from sgtriton_kernels.cards import CARD_NAMES, card, card_of, named_card
from sgtriton_kernels.cell import Cell
from sgtriton_kernels.records import architecture, device_name
from torch import nn

from .cost_model import expected_speedup
from .roofline import at_sparsity, break_even, predicted_speedup

Sides = tuple[int, int]

BLOCKS: tuple[Sides, ...] = ((16, 16), (32, 32), (64, 64), (128, 64), (128, 128))
ROWS = (1, 16, 128, 2048)  # of x, over which speed-ups are averaged unless a caller says which
WITHIN = 0.9  # of the best block's speed-up, from which on a smaller one is taken


@dataclass(frozen=True)
class BlockChoice:
    """A block, and what others would give.

    Args:
        block: the one to take; the smallest where the weight is too small for all.
        speedups: block -> expected speed-up over dense at the target, the geometric mean over the
            rows; blocks that the weight is too small for are missing.
        break_even: block -> least sparsity, in hundredths, from which on none of these rows is
            expected to be slower than dense, as long as a block is left; 1 where there is none.
        where: the card, or ``"cpu"``.
    """

    block: Sides
    speedups: dict[Sides, float]
    break_even: dict[Sides, float]
    where: str


def choose_block(
    weight_shape: Sequence[int],
    target: float,
    where: str = "cpu",
    rows: Sequence[int] = ROWS,
    dtype: torch.dtype = torch.bfloat16,
) -> BlockChoice:
    """The smallest block whose expected speed-up is within 10 % of the best one's.

    Args:
        weight_shape: of a linear layer, or of a convolution, which is taken as the product with its
            weight as a matrix.
        target: share of the weights that will be closed, in [0, 1).
        where: one of :data:`.CARD_NAMES`, or ``"cpu"``: like the ones that the cost model knows.
        rows: of x.
        dtype: in which the model will be served.

    Raises:
        ValueError: a target or a card that is not allowed.
    """
    check_target(target)
    speedup = (
        _on_cpu(weight_shape, dtype) if where == "cpu" else _on_card(where, weight_shape, dtype)
    )
    fitting = [b for b in BLOCKS if _fits(b, weight_shape, target)]
    speedups = {b: _mean(speedup, b, target, rows) for b in fitting}
    best = max(speedups.values(), default=0.0)
    block = next((b for b in fitting if speedups[b] >= WITHIN * best), BLOCKS[0])
    even = {b: _break_even(speedup, b, weight_shape, rows) for b in fitting}
    return BlockChoice(block, speedups, even, where)


def check_target(target: float) -> None:
    """Raise ``ValueError`` unless a target is a share of weights."""
    is_number = isinstance(target, (int, float)) and not isinstance(target, bool)
    if not is_number or not 0 <= target < 1:
        raise ValueError(f"target must be a share in [0, 1), got {target!r}")


def where_of(name: str | None, device: torch.device) -> str:
    """The name of the card that is meant; of ``device`` if none is named.

    Raises:
        ValueError: an unknown name, or a device whose card is not known.
    """
    if name is not None:
        return named_card(name, "cpu")
    if device.type == "cpu":
        return "cpu"
    found, called = None, f"a model on {device}"
    if device.type == "cuda":
        called = device_name(device)
        found = card_of(called, architecture(device))
    if found is None:
        raise ValueError(
            f"card must be given for {called}, which is not known: one of "
            f"{', '.join(('cpu', *CARD_NAMES))}"
        )
    return found


def matrix_shape(weight_shape: Sequence[int]) -> Sides:
    """``(N, K)`` of a weight as a matrix."""
    return weight_shape[0], math.prod(weight_shape[1:])


def _fits(block: Sides, weight_shape: Sequence[int], target: float) -> bool:
    """Whether the weight has so many blocks that one may stay and the target be met."""
    (bn, bk), (outputs, inputs, *_) = block, weight_shape
    return bn <= outputs and bk <= inputs and _most_sparsity(block, weight_shape) >= target


def _most_sparsity(block: Sides, weight_shape: Sequence[int]) -> float:
    """The sparsity at which a single block is left."""
    (bn, bk), (outputs, inputs, *taps) = block, weight_shape
    blocks = -(-outputs // bn) * -(-inputs // bk) * math.prod(taps)
    return (blocks - 1) / blocks


Speedup = Callable[[Sides, float, int], float]


def _on_card(name: str, weight_shape: Sequence[int], dtype: torch.dtype) -> Speedup:
    on, (n, k) = card(name), matrix_shape(weight_shape)

    def speedup(block: Sides, sparsity: float, rows: int) -> float:
        cell = Cell("bsr_linear fwd", "triton", rows, n, k, block, 0, dtype)
        cell = at_sparsity(cell, sparsity)
        return predicted_speedup(on, replace(cell, nnz=max(1, cell.nnz)))

    return speedup


def _on_cpu(weight_shape: Sequence[int], dtype: torch.dtype) -> Speedup:
    shape, cpu = matrix_shape(weight_shape), torch.device("cpu")

    def speedup(block: Sides, sparsity: float, rows: int) -> float:
        return expected_speedup("sparse", block, 1 - sparsity, shape, rows, dtype, cpu)

    return speedup


def _mean(speedup: Speedup, block: Sides, sparsity: float, rows: Sequence[int]) -> float:
    return statistics.geometric_mean(speedup(block, sparsity, m) for m in rows)


def _break_even(
    speedup: Speedup, block: Sides, weight_shape: Sequence[int], rows: Sequence[int]
) -> float:
    most = _most_sparsity(block, weight_shape)
    return break_even(lambda s: min(speedup(block, s, m) for m in rows), most)


def blocks_of_layers(
    layers: dict[str, nn.Module], target: float | None, card_name: str | None
) -> dict[str, BlockChoice]:
    """What to take for each layer of a model, by its weight's shape, device and dtype.

    On a card fp32 weights are taken to be served in bf16.

    Raises:
        ValueError: no target, or one that is not allowed; an unknown card.
    """
    if target is None:
        raise ValueError("block 'auto' needs target: the share of the weights that will be closed")
    check_target(target)
    where_of(card_name, torch.device("cpu"))
    found: dict[tuple[object, ...], BlockChoice] = {}
    chosen = {}
    for name, layer in layers.items():
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        where = where_of(card_name, weight.device)
        # cards serve in 16 bits what is trained in fp32
        dtype = weight.dtype if where == "cpu" or weight.dtype.itemsize == 2 else torch.bfloat16
        key = tuple(weight.shape), where, dtype
        if key not in found:
            found[key] = choose_block(weight.shape, target, where, dtype=dtype)
        chosen[name] = found[key]
    return chosen
