"""``load_state_dict`` of a gated or sparse model: refuse what does not fit before anything changes.

Each of our layers checks its own part when PyTorch comes to it, but layers before it are loaded by
then. A hook on the model checks all of them first.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .layers import GatedModule
from .sparse_layers import SparseModule


def check_states_of(model: nn.Module) -> None:
    """Have ``model.load_state_dict`` check gates and stored blocks of all layers first."""
    if not hasattr(model, _HANDLE):
        setattr(model, _HANDLE, model.register_load_state_dict_pre_hook(_check))


def forget_states_of(model: nn.Module) -> None:
    """Undo :func:`check_states_of`."""
    if handle := vars(model).pop(_HANDLE, None):
        handle.remove()


_HANDLE = "_sgtriton_state_check"  # of the hook


def _check(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    metadata = getattr(state_dict, "_metadata", {})
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, (GatedModule, SparseModule)):
            own = f"{prefix}{name}." if name else prefix
            layer.check_state(state_dict, own, metadata.get(own[:-1], {}))
