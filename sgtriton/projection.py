"""Which gates stay open when a model must land on a density: one exact choice over all layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sgtriton_kernels import coverage, sum_blocks
from sgtriton_kernels.kinds import open_chance

from .layers import GatedModule

TOLERANCE = 0.005  # landing error that is always allowed, as a share of the gated weights


def lowest_density(layers: Sequence[GatedModule], allow_empty: bool) -> float:
    """The lowest density that can be reached: each layer keeps its smallest block, or none."""
    if allow_empty:
        return 0.0
    smallest = sum(coverage(layer.layout).min().item() for layer in layers)
    return smallest / sum(layer.weight.numel() for layer in layers)


def largest_block_share(layers: Sequence[GatedModule]) -> float:
    """Share of the gated weights that the largest gate block covers."""
    largest = max(coverage(layer.layout).max().item() for layer in layers)
    return largest / sum(layer.weight.numel() for layer in layers)


@torch.no_grad()
def choose_open(
    layers: Sequence[GatedModule], density: float, allow_empty: bool
) -> list[torch.Tensor]:
    """Choose the gates that stay open so that the open weights' share is nearest to ``density``.

    The largest gates stay; equal ones by the mean magnitude of their weights. Each layer keeps its
    best gate unless ``allow_empty``; where these alone are too many, layers keep a smaller open one
    instead, and where that is more than the allowed error above ``density``, as few as possible a
    smaller shut one. Where the ranking misses by
    more than :data:`TOLERANCE`, gates that had opened fill the gap.

    Returns:
        A bool mask per layer, in the gate's shape and on its device. The error is at most
        :data:`TOLERANCE` or half the share of the largest block, for any ``density`` of at least
        :func:`lowest_density`.
    """
    gates, opens, sizes, magnitudes = [], [], [], []
    for layer in layers:
        covered = coverage(layer.layout).double().reshape(-1)
        magnitude = sum_blocks(layer.weight.detach().abs().double(), layer.layout).reshape(-1)
        gate = layer.gate.detach().reshape(-1).double()
        gates.append(open_chance(gate, layer.gate_kind).cpu())
        opens.append(layer.open_gates().reshape(-1).cpu())
        sizes.append(covered)
        magnitudes.append(magnitude.cpu() / covered)
    counts = [g.numel() for g in gates]
    gate, was_open = torch.cat(gates), torch.cat(opens)
    size, magnitude = torch.cat(sizes), torch.cat(magnitudes)
    layer_of = torch.repeat_interleave(torch.arange(len(layers)), torch.tensor(counts))

    order = magnitude.argsort(descending=True, stable=True)
    order = order[gate[order].argsort(descending=True, stable=True)]
    budget = density * size.sum()
    chosen = torch.zeros(gate.numel(), dtype=torch.bool)
    if not allow_empty:
        best = _first_of_each_layer(order, layer_of, len(layers))
        is_open = order[was_open[order]]
        best = _shrink(best, is_open, size, layer_of, budget)
        # shut blocks take the place of a learned one only where the landing would miss by too much
        most = budget + max(TOLERANCE * size.sum(), size.max() / 2)
        chosen[_shrink(best, order, size, layer_of, most)] = True
    rest = order[~chosen[order]]
    reached = torch.cat([torch.zeros(1, dtype=torch.float64), size[rest].cumsum(0)])
    reached += size[chosen].sum()
    chosen[rest[: int((reached - budget).abs().argmin())]] = True
    while (gap := budget - size[chosen].sum()) > TOLERANCE * size.sum():
        opened = order[~chosen[order] & was_open[order] & (size[order] < 2 * gap)]
        if not len(opened):
            break
        chosen[opened[(size[opened] - gap).abs().argmin()]] = True
    return [
        mask.reshape(layer.gate.shape).to(layer.gate.device)
        for mask, layer in zip(chosen.split(counts), layers, strict=True)
    ]


def _shrink(
    best: torch.Tensor,
    candidates: torch.Tensor,
    size: torch.Tensor,
    layer_of: torch.Tensor,
    most: torch.Tensor,
) -> torch.Tensor:
    """Exchange the one gate a layer keeps for a smaller one until they all cover ``most`` or less.

    A layer's learned block is often all it has, so few are exchanged: one whose exchange is enough,
    by the smallest step that is; else the one that saves most, and so on.
    """
    best = best.clone()
    while (over := size[best].sum() - most) > 0:
        saving = size[best][layer_of[candidates]] - size[candidates]
        if not (saving > 0).any():
            break
        enough = saving >= over
        if enough.any():
            saving = torch.where(enough, -saving, -torch.inf)
        pick = candidates[saving.argmax()]  # of equal ones the first in rank
        best[layer_of[pick]] = pick
    return best


def _first_of_each_layer(order: torch.Tensor, layer_of: torch.Tensor, layers: int) -> torch.Tensor:
    position = torch.empty_like(order)
    position[order] = torch.arange(order.numel())
    first = torch.full((layers,), order.numel(), dtype=torch.int64)
    first.scatter_reduce_(0, layer_of, position, "amin")
    return order[first]
