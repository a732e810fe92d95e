"""Gates stay in [0, 1] under any optimizer: one post-step hook clips them, and warns of decay.

Gates are found through a weak set of gated modules at step time, not by the identity that a
parameter had when the layer was made: sharding replaces Parameters.
"""

from __future__ import annotations

import warnings
import weakref
from typing import Any, Protocol

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook


class HasGates(Protocol):
    """What is clipped: a gated layer, as far as this file knows it."""

    gate: torch.nn.Parameter
    frozen: bool


_gated_modules: weakref.WeakSet[HasGates] = weakref.WeakSet()
_warned_of_decay: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def track(module: HasGates) -> None:
    """Have the gates of ``module`` clipped after each optimizer step."""
    _gated_modules.add(module)


def untrack(module: HasGates) -> None:
    """Forget ``module``: it has no gates any more."""
    _gated_modules.discard(module)


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
