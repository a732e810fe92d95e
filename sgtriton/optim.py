"""Parameter groups for the optimizer: gates without decay, at a rate of their own."""

from __future__ import annotations

import math
from typing import Any

import torch
from sgtriton_kernels.kinds import gate_bounds
from torch import nn
from torch.optim.optimizer import Optimizer

from .layers import gated_layers


def param_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    gate_lr: float | None = None,
    optimizer: type[Optimizer] = torch.optim.Adam,
) -> list[dict[str, Any]]:
    """Parameter groups in which gates have no weight decay and a learning rate of their own.

    Args:
        model: patched model.
        lr: learning rate of weights and all other parameters.
        weight_decay: of weights and all other parameters. It reaches closed weights too, until the
            gates are frozen; a decayed weight has a smaller gate gradient, so its gate reopens more
            rarely.
        gate_lr: learning rate of the gates. ``None``: ``lr``, which suits Adam and its relatives;
            under ``optimizer=torch.optim.SGD`` ``10 * lr / sqrt(weights per gate)``, since a gate's
            gradient is a sum over its block. ``hard_concrete`` gates have ``2 log 100`` times as
            far to go as others: times that, under SGD its square, as if they lay in [0, 1] too.
        optimizer: class that the groups are for.

    Returns:
        Groups for the optimizer's first argument. Frozen gates are among them, so that an
        optimizer's state can be loaded before and after they freeze; other parameters that need no
        gradient are left out.

    Raises:
        ValueError: a rate or decay that is no number >= 0, an ``optimizer`` that is no optimizer
            class, or a model without gates.
    """
    for name, value in (("lr", lr), ("weight_decay", weight_decay), ("gate_lr", gate_lr)):
        if value is not None and (isinstance(value, str) or not value >= 0):  # may be a tensor
            raise ValueError(f"{name} must be a number >= 0, got {value!r}")
    if not (isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)):
        raise ValueError(f"optimizer must be a class of optimizers, got {optimizer!r}")
    layers = list(gated_layers(model))
    if not layers:
        raise ValueError("the model has no gated layer; call sgtriton.patch(model) first")
    gates_by_lr: dict[float, list[nn.Parameter]] = {}
    for layer in layers:
        rate = gate_lr
        if rate is None:
            low, high = gate_bounds(layer.gate_kind)
            span = high - low
            rate = lr * span
            if issubclass(optimizer, torch.optim.SGD):
                weights_per_gate = layer.weight.numel() / max(layer.gate.numel(), 1)
                rate = 10 * lr / math.sqrt(max(weights_per_gate, 1)) * span**2
        gates_by_lr.setdefault(rate, []).append(layer.gate)
    gate_ids = {id(layer.gate) for layer in layers}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in gate_ids]
    groups: list[dict[str, Any]] = [{"params": others, "lr": lr, "weight_decay": weight_decay}]
    groups += [
        {"params": gates, "lr": rate, "weight_decay": 0.0} for rate, gates in gates_by_lr.items()
    ]
    return [group for group in groups if group["params"]]
