"""Which gates stay open when a model must land on a density: one exact choice over all layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sgtriton_kernels import coverage, sum_blocks

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
    best gate unless ``allow_empty``; where these alone are too many, its smallest block.

    Returns:
        A bool mask per layer, in the gate's shape and on its device. The error is at most half the
        share of the largest block, for any ``density`` of at least :func:`lowest_density`.
    """
    gates, sizes, magnitudes = [], [], []
    for layer in layers:
        covered = coverage(layer.layout).double().reshape(-1)
        magnitude = sum_blocks(layer.weight.detach().abs().double(), layer.layout).reshape(-1)
        gates.append(layer.gate.detach().reshape(-1).double().clamp(0, 1).cpu())
        sizes.append(covered)
        magnitudes.append(magnitude.cpu() / covered)
    counts = [g.numel() for g in gates]
    gate, size, magnitude = torch.cat(gates), torch.cat(sizes), torch.cat(magnitudes)
    layer_of = torch.repeat_interleave(torch.arange(len(layers)), torch.tensor(counts))

    order = magnitude.argsort(descending=True, stable=True)
    order = order[gate[order].argsort(descending=True, stable=True)]
    budget = density * size.sum()
    chosen = torch.zeros(gate.numel(), dtype=torch.bool)
    if not allow_empty:
        best = _first_of_each_layer(order, layer_of, len(layers))
        if size[best].sum() > budget:
            by_size = order[size[order].argsort(stable=True)]
            best = _first_of_each_layer(by_size, layer_of, len(layers))
        chosen[best] = True
    rest = order[~chosen[order]]
    reached = torch.cat([torch.zeros(1, dtype=torch.float64), size[rest].cumsum(0)])
    reached += size[chosen].sum()
    chosen[rest[: int((reached - budget).abs().argmin())]] = True
    return [
        mask.reshape(layer.gate.shape).to(layer.gate.device)
        for mask, layer in zip(chosen.split(counts), layers, strict=True)
    ]


def _first_of_each_layer(order: torch.Tensor, layer_of: torch.Tensor, layers: int) -> torch.Tensor:
    position = torch.empty_like(order)
    position[order] = torch.arange(order.numel())
    first = torch.full((layers,), order.numel(), dtype=torch.int64)
    first.scatter_reduce_(0, layer_of, position, "amin")
    return order[first]
