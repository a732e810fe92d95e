"""What gates ask of an optimizer: clipped after each step, no weight decay, a rate of their own.

Gates are found through a weak set of gated modules at step time, not by the identity that a
parameter had when the layer was made: sharding replaces Parameters.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

if TYPE_CHECKING:
    from .layers import GatedModule

_gated_modules: weakref.WeakSet[GatedModule] = weakref.WeakSet()
_warned_of_decay: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def track(module: GatedModule) -> None:
    """Have the gates of ``module`` clipped after each optimizer step."""
    _gated_modules.add(module)


def untrack(module: GatedModule) -> None:
    """Forget ``module``: it has no gates any more."""
    _gated_modules.discard(module)


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
            gradient is a sum over its block.
        optimizer: class that the groups are for.

    Returns:
        Groups for the optimizer's first argument; parameters that need no gradient are left out.

    Raises:
        ValueError: a negative rate or decay, or a model without gates.
    """
    for name, value in (("lr", lr), ("weight_decay", weight_decay), ("gate_lr", gate_lr)):
        if value is not None and not value >= 0:
            raise ValueError(f"{name} must be >= 0, got {value}")
    layers = list(gated_layers(model))
    if not layers:
        raise ValueError("the model has no gated layer; call sgtriton.patch(model) first")
    gates_by_lr: dict[float, list[nn.Parameter]] = {}
    for layer in layers:
        if layer.gate.requires_grad:
            rate = gate_lr
            if rate is None:
                rate = lr
                if issubclass(optimizer, torch.optim.SGD):
                    weights_per_gate = layer.weight.numel() / max(layer.gate.numel(), 1)
                    rate = 10 * lr / math.sqrt(max(weights_per_gate, 1))
            gates_by_lr.setdefault(rate, []).append(layer.gate)
    gate_ids = {id(layer.gate) for layer in layers}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in gate_ids]
    groups: list[dict[str, Any]] = [{"params": others, "lr": lr, "weight_decay": weight_decay}]
    groups += [
        {"params": gates, "lr": rate, "weight_decay": 0.0} for rate, gates in gates_by_lr.items()
    ]
    return [group for group in groups if group["params"]]


def gated_layers(model: nn.Module) -> Iterator[GatedModule]:
    """The gated layers of ``model``, each once."""
    for _, layer in named_gated_layers(model):
        yield layer


def named_gated_layers(model: nn.Module) -> Iterator[tuple[str, GatedModule]]:
    """``(qualified name, layer)`` of the gated layers of ``model``, each once."""
    from .layers import GatedModule

    for name, module in model.named_modules():
        if isinstance(module, GatedModule):
            yield name, module


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not _gated_modules:
        return
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    gates = [m.gate for m in list(_gated_modules) if not m.frozen and id(m.gate) in own]
    if not gates:
        return
    with torch.no_grad():
        for gate in gates:
            gate.clamp_(0, 1)
    _warn_of_decay(optimizer, {id(gate) for gate in gates})


def _warn_of_decay(optimizer: Optimizer, gate_ids: set[int]) -> None:
    if optimizer in _warned_of_decay:
        return
    for group in optimizer.param_groups:
        if group.get("weight_decay") and any(id(p) in gate_ids for p in group["params"]):
            _warned_of_decay.add(optimizer)
            warnings.warn(
                f"weight_decay={group['weight_decay']} acts on gates and closes them whatever they "
                "are worth; build the optimizer from sgtriton.param_groups(model, lr, "
                "weight_decay), which keeps gates out of it",
                stacklevel=5,  # the caller of `optimizer.step()`
            )
            return


# the mark of torch.compiler.disable, which would import the compiler
setattr(_after_step, "_torchdynamo_disable", True)  # noqa: B010
register_optimizer_step_post_hook(_after_step)  # pyright: ignore[reportArgumentType]
