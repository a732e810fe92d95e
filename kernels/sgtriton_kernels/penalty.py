"""Penalty on gates, its gradient and the gates' statistics, over any number of gate tensors.

    penalty = bimodal * sum c g (1 - g) + l1 * sum c g        g = clip(gate, 0, 1)
    dgate   = c (bimodal (1 - 2 g) + l1) dpenalty

with ``c`` the number of weights that a gate covers. The sums run in fp64. The first term pushes
each gate to 0 or 1, the second closes gates (Srinivas, Subramanya, Babu, arXiv:1611.06694). The
gradient is the straight-through one: it does not vanish at the bounds. Nothing is written to a gate
or to its ``.grad``, and nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ._ops import add_op_namespace_prefix
from .bitmap import pack_bitmap


class GatePenalties(NamedTuple):
    """What :func:`gate_penalties` returns; all on the gates' device.

    Attributes:
        penalty: ``[]`` fp32. Differentiable in the gates.
        density: ``[]`` fp64. Share of covered weights whose gate is above 0.5.
        mean: ``[]`` fp64. Mean gate, weighted by coverage.
        undecided: ``[]`` fp64. Share of gates in (0.1, 0.9), weighted by coverage. NaN gates show
            in ``mean``.
        flips: ``[]`` int64. Gates on the other side of 0.5 than in ``previous``; -1 without it.
        mask: ``[ceil(gates / 8)]`` uint8. Open gates, one bit each, to hand over as ``previous``.
    """

    penalty: torch.Tensor
    density: torch.Tensor
    mean: torch.Tensor
    undecided: torch.Tensor
    flips: torch.Tensor
    mask: torch.Tensor


def gate_penalties(
    gates: Sequence[torch.Tensor],
    coverages: torch.Tensor,
    lambdas: torch.Tensor,
    previous: torch.Tensor | None = None,
) -> GatePenalties:
    """Penalise gates and count them, in one op over all layers.

    Args:
        gates: tensors of any shapes, fp32, one device.
        coverages: ``[gates in all]`` fp32. Weights that each gate covers, the tensors flattened
            one after the other.
        lambdas: ``[2]`` fp32. ``(bimodal, l1)``, on the gates' device; a tensor, so that a new
            value neither recompiles nor synchronises.
        previous: the last call's ``mask``, for ``flips``.

    Raises:
        ValueError: no gates, or sizes, dtypes or devices that do not fit.
    """
    gates = list(gates)
    if not gates:
        raise ValueError("gates must hold at least one tensor, got none")
    count = sum(g.numel() for g in gates)
    if any(g.dtype != torch.float32 for g in gates):
        raise ValueError(
            f"gates must be torch.float32, got {sorted({str(g.dtype) for g in gates})}"
        )
    if coverages.shape != (count,):
        raise ValueError(f"coverages must have shape ({count},), got {tuple(coverages.shape)}")
    if lambdas.shape != (2,) or lambdas.dtype != torch.float32:
        raise ValueError(f"lambdas must be [2] fp32, got {tuple(lambdas.shape)} {lambdas.dtype}")
    if previous is not None and previous.shape != (-(-count // 8),):
        raise ValueError(f"previous must have {-(-count // 8)} bytes, got {tuple(previous.shape)}")
    tensors = [coverages, lambdas, *gates, *([] if previous is None else [previous])]
    if len({t.device for t in tensors}) > 1:
        raise ValueError(f"one device is allowed, got {sorted({str(t.device) for t in tensors})}")
    return GatePenalties(*_gate_penalties_op(gates, coverages, lambdas, previous))


def gate_penalties_ref(
    gates: Sequence[torch.Tensor], coverages: torch.Tensor, bimodal: float, l1: float
) -> torch.Tensor:
    """The penalty alone, gate by gate in fp64."""
    flat = torch.cat([g.reshape(-1) for g in gates]).double()
    total = torch.zeros((), dtype=torch.float64)
    for g, c in zip(flat.clamp(0, 1), coverages.double(), strict=True):
        total += c * (bimodal * g * (1 - g) + l1 * g)
    return total


@torch.library.custom_op(add_op_namespace_prefix("gate_penalties"), mutates_args=())
def _gate_penalties_op(
    gates: list[torch.Tensor],
    coverages: torch.Tensor,
    lambdas: torch.Tensor,
    previous: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    flat = torch.cat([g.reshape(-1) for g in gates])
    is_open = flat > 0.5
    g, c = flat.double().clamp(0, 1), coverages.double()
    total = c.sum()
    cg = (c * g).sum()
    bimodal, l1 = lambdas.double().unbind()
    penalty = bimodal * (cg - (c * g * g).sum()) + l1 * cg
    density = (c * is_open).sum() / total
    undecided = (c * ((flat > 0.1) & (flat < 0.9))).sum() / total
    mask = pack_bitmap(is_open)
    if previous is None:
        flips = torch.full((), -1, dtype=torch.int64, device=flat.device)
    else:
        changed = (mask ^ previous)[:, None] >> torch.arange(8, device=flat.device)
        flips = (changed & 1).sum()
    return penalty.float(), density, cg / total, undecided, flips, mask


@_gate_penalties_op.register_fake
def _(gates, coverages, lambdas, previous):
    def scalar(dtype):
        return torch.empty((), dtype=dtype, device=coverages.device)

    count = sum(g.numel() for g in gates)
    mask = torch.empty((count + 7) // 8, dtype=torch.uint8, device=coverages.device)
    shares = [scalar(torch.float64) for _ in range(3)]
    return scalar(torch.float32), *shares, scalar(torch.int64), mask


@torch.library.custom_op(add_op_namespace_prefix("gate_penalties_bwd"), mutates_args=())
def _gate_penalties_bwd_op(
    dpenalty: torch.Tensor,
    gates: list[torch.Tensor],
    coverages: torch.Tensor,
    lambdas: torch.Tensor,
) -> list[torch.Tensor]:
    bimodal, l1 = (lambdas * dpenalty.float()).unbind()
    parts = coverages.split([g.numel() for g in gates])
    return [
        (c.reshape(g.shape) * (bimodal * (1 - 2 * g.clamp(0, 1)) + l1)).contiguous()
        for g, c in zip(gates, parts, strict=True)
    ]


@_gate_penalties_bwd_op.register_fake
def _(dpenalty, gates, coverages, lambdas):
    return [torch.empty(g.shape, dtype=g.dtype, device=g.device) for g in gates]


def _setup_context(ctx, inputs, output):
    gates, coverages, lambdas, _ = inputs
    ctx.save_for_backward(coverages, lambdas, *gates)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, dpenalty, *_):
    coverages, lambdas, *gates = ctx.saved_tensors
    return _gate_penalties_bwd_op(dpenalty, gates, coverages, lambdas), None, None, None


_gate_penalties_op.register_autograd(_backward, setup_context=_setup_context)
