"""Gates stay within their bounds under any optimizer: one post-step hook clips them, and warns of
decay.

Gates are found through a weak set of gated modules at step time, not by the identity that a
parameter had when the layer was made: sharding replaces Parameters.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from typing import Any, Protocol

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook


class HasGates(Protocol):
    """What is clipped: a gated layer, as far as this file knows it."""

    gate: torch.nn.Parameter
    frozen: bool

    def optimizer_stepped(self) -> None:
        """Clip the gates in place."""


class Observer(Protocol):
    """Who looks at gradients of gates while they are there: before a user sets them to zero."""

    def optimizer_stepped(self, parameters: set[int]) -> None:
        """Called after each optimizer step with the ids of the optimizer's parameters."""


_gated_modules: weakref.WeakSet[HasGates] = weakref.WeakSet()
_observers: weakref.WeakSet[Observer] = weakref.WeakSet()
_lock = threading.Lock()  # of the two: models are patched in one thread and trained in another
_warned_of_decay: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def track(module: HasGates) -> None:
    """Have the gates of ``module`` clipped after each optimizer step."""
    with _lock:
        _gated_modules.add(module)


def untrack(module: HasGates) -> None:
    """Forget ``module``: it has no gates any more."""
    with _lock:
        _gated_modules.discard(module)


def watch(observer: Observer) -> None:
    """Tell ``observer`` of each optimizer step, as long as it lives."""
    with _lock:
        _observers.add(observer)


def observers() -> list[Observer]:
    """Those that watch."""
    with _lock:
        return list(_observers)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not _gated_modules:
        return
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    with _lock:
        modules, observers = list(_gated_modules), list(_observers)
    modules = [m for m in modules if id(getattr(m, "gate", None)) in own and not m.frozen]
    if not modules:
        return
    with torch.no_grad():
        for module in modules:
            module.optimizer_stepped()
    for observer in observers:
        observer.optimizer_stepped(own)
    _warn_of_decay(optimizer, {id(m.gate) for m in modules})


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
                stacklevel=4,  # the caller of `optimizer.step()`
            )
            return


# the mark of torch.compiler.disable, which would import the compiler
setattr(_after_step, "_torchdynamo_disable", True)  # noqa: B010
register_optimizer_step_post_hook(_after_step)  # pyright: ignore[reportArgumentType]
