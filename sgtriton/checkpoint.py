"""Save and load models of which only the open weights are stored.

What a file holds of each sparse layer: type, shape, gate block and kind, forms, and the arrays of
its open weights; of everything else, the state dict. Everything is checked on the CPU before the
model is touched: a block index is an address to a kernel.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .container import printable, read_file, write_file
from .file_layers import LONGEST_REASON, check_entry, serve_block, shown_name, take_stored
from .layers import GatedModule
from .patching import Model, leave_fast_paths
from .planning import Plan, plan_forms
from .serving import stored_part
from .sparse_layers import (
    NO_GATES,
    SparseModule,
    dense_type_of,
    densify_layer,
    sparsify_layer,
    stored_like,
    weight_shape_of,
)
from .state import check_states_of
from .stored import StoredWeight

log = logging.getLogger(__name__)


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model's state, of its gated and sparse layers the open weights only.

    The file is written beside ``path`` and renamed, so that ``path`` always holds a whole file, the
    old or the new. The model is unchanged.

    Args:
        model: gated model (a gate is open if it is above 0.5) or sparse model; of a trainable one
            the file says nothing of that.
        path: file to write.

    Raises:
        ValueError: a model without gated or sparse layers, a NaN gate (names the layer), a folder
            that does not exist or cannot be written to.
    """
    path = Path(path)
    if not os.path.isdir(path.parent) or os.path.isdir(path):
        raise ValueError(f"{path}: a file in a folder that exists is needed")
    layers = _our_layers(model)
    if not layers:
        raise ValueError(
            "the model has no gated or sparse layer, so that there is nothing to leave out; use "
            "safetensors or torch.save for a dense model"
        )
    tensors, described = {}, {}
    for name, layer in layers.items():
        stored = stored_part(name, layer)
        described[name] = _describe(layer)
        tensors |= {_join(name, key): t for key, t in stored.tensors().items()}
    tensors |= _other_state(model, layers)
    write_file(path, described, tensors)


def load(model: Model, path: str | os.PathLike[str]) -> Model:
    """Load a file written by :func:`save` into a model of the same architecture.

    Layers of which the file stores open weights become sparse layers. They compute in the forms
    that the file records, so that a reload gives the same bits; forms are timed anew on another
    kind of device, in another dtype, and where those of the file were timed for training.

    Args:
        model: the dense, gated or sparse model; changed in place, stays on its device and in its
            dtypes.
        path: file written by :func:`save`.

    Returns:
        ``model``.

    Raises:
        ValueError: a file that is missing, truncated, damaged, not ours, of an unknown version, or
            for another model; names the file, the layer and the rule. The model is unchanged then.
    """
    grads = torch.is_grad_enabled()
    # tensors made under inference_mode could not be saved for a backward pass later
    with torch.inference_mode(False), torch.set_grad_enabled(grads):
        others = _load_layers(model, Path(path))
    # everything was checked, so that nothing is missing but what the sparse layers hold already
    model.load_state_dict(others, strict=False)
    leave_fast_paths(model)
    check_states_of(model)
    return model


def _load_layers(model: nn.Module, path: Path) -> dict[str, torch.Tensor]:
    """Make the layers of a file sparse ones; returns the rest of its state, checked."""
    description, tensors = read_file(path)
    try:
        _check_device(model)
        stored, forms = _check_layers(model, description, tensors)
        others = _check_others(model, stored, tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    modules = dict(model.named_modules())
    plans: dict[str, Plan] = {}
    serve: dict[str, tuple[int, int] | None] = {}
    for name, part in stored.items():  # all that can fail comes before the first layer changes
        layer, entry = modules[name], description["layers"][name]
        like = layer.values if isinstance(layer, SparseModule) else layer.weight
        saved_as = part.tensors()["values"].dtype
        stored[name] = part = stored_like(part, like.detach())  # pyright: ignore
        recorded = forms[name]
        serve[name] = serve_block(entry, part.layout)
        if recorded is None or (entry["device"], saved_as) != (like.device.type, like.dtype):
            plans[name] = plan_forms(
                layer, part, serve_block=serve[name], dense_copy=entry["dense_copy"]
            )
        else:
            speedups = entry.get("expected", {}), entry.get("measured", {})
            plans[name] = Plan(recorded, entry["reason"], *speedups)
    for name, layer in _our_layers(model).items():
        if name not in stored:
            densify_layer(layer)
    for name, part in stored.items():
        entry = description["layers"][name]
        block = (entry["gate_block"][0], entry["gate_block"][1])
        sparse = sparsify_layer(modules[name], part, block, entry["gate_kind"], serve[name])
        plans[name].apply_to(sparse, entry["dense_copy"])
        log.info("%s: density %.4f, %s", name, part.density, sparse.form)
    return others


def _our_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (GatedModule, SparseModule))
    }


def _join(layer: str, key: str) -> str:
    return f"{layer}.{key}" if layer else key


def _weight_keys(model: nn.Module, layers: Iterable[nn.Module]) -> set[str]:
    """State-dict keys that can stand for the weights of ``layers``, under all names of each."""
    ids = set(map(id, layers))
    return {
        _join(name, key)
        for name, module in model.named_modules(remove_duplicate=False)
        if id(module) in ids
        for key in ("weight", "gate", "values", "crow", "col", "bits")
    }


def _describe(layer: nn.Module) -> dict[str, Any]:
    dense_type = dense_type_of(layer)
    assert dense_type is not None
    sparse = isinstance(layer, SparseModule)
    device = (layer.values if sparse else layer.weight).device  # pyright: ignore
    described = {
        "type": dense_type.__name__,
        "shape": list(weight_shape_of(layer)),
        "groups": getattr(layer, "groups", 1),
        "gate_block": list(layer.gate_block),  # pyright: ignore
        "gate_kind": layer.gate_kind,
        # forms that were timed with a backward pass are none for serving: they are chosen anew
        "forms": layer.forms if sparse and not (layer.trainable and layer.measured) else None,
        "reason": _printable(layer.reason) if sparse else "",
        "dense_copy": layer._dense_copy if sparse else True,
        "device": device.type,  # pyright: ignore
    }
    if sparse:  # the fields that a file may lack, where they say something
        optional = ("serve_block", "expected", "measured")
        described |= {field: value for field in optional if (value := getattr(layer, field))}
    return described


def _printable(reason: str) -> str:
    """A reason as files hold it: what a terminal would obey, or is too long, is left out."""
    return "".join(filter(str.isprintable, reason))[:LONGEST_REASON]


def _other_state(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    """The state dict without what stands for our layers' weights."""
    own = _weight_keys(model, layers.values())
    state = {key: value for key, value in model.state_dict().items() if key not in own}
    for key, value in state.items():
        _check_is_tensor(key, value)
    return state


def _check_device(model: nn.Module) -> None:
    for key, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.device.type == "meta":
            raise ValueError(f"{key}: the model is on the meta device; call model.to_empty first")


def _check_layers(
    model: nn.Module, description: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> tuple[dict[str, StoredWeight], dict[str, dict[str, str] | None]]:
    """The stored weights of the file's sparse layers; takes their tensors out of ``tensors``."""
    modules = dict(model.named_modules())
    stored: dict[str, StoredWeight] = {}
    forms: dict[str, dict[str, str] | None] = {}
    for name, entry in description["layers"].items():
        shown = shown_name(name)
        check_entry(shown, entry)
        if name not in modules:
            raise ValueError(
                f"{shown}: the model has no such layer; is the file for another model?"
            )
        layer = modules[name]
        dense_type = dense_type_of(layer)
        if dense_type is None or dense_type.__name__ != entry["type"]:
            raise ValueError(
                f"{shown}: the file holds a {printable(entry['type'])}, the model a "
                f"{type(layer).__name__}"
            )
        shape, groups = tuple(entry["shape"]), entry["groups"]
        if shape != weight_shape_of(layer) or groups != getattr(layer, "groups", 1):
            raise ValueError(
                f"{shown}: the file's weight has shape {shape} in {groups} groups, the model's "
                f"{weight_shape_of(layer)} in {getattr(layer, 'groups', 1)}"
            )
        if isinstance(layer, GatedModule) and entry["gate_kind"] == NO_GATES:
            raise ValueError(
                f"{shown}: the file's layer was pruned without gates, the model's is gated; load "
                "it into a model without gates"
            )
        if isinstance(layer, GatedModule) and layer.gate_kind != entry["gate_kind"]:
            raise ValueError(
                f"{shown}: the file was written from gates of kind {entry['gate_kind']!r}, the "
                f"model's are {layer.gate_kind!r}"
            )
        stored[name] = take_stored(name, entry, tensors)
        forms[name] = entry["forms"]
    return stored, forms


def _check_others(
    model: nn.Module, stored: dict[str, StoredWeight], tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What is left of the file, checked against the rest of the model's state."""
    modules = dict(model.named_modules())
    sparse = {id(modules[name]) for name in stored}
    ours = [*_our_layers(model).values(), *(modules[name] for name in stored)]
    skip = _weight_keys(model, ours)
    wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for key, value in model.state_dict().items():
        if key not in skip:
            _check_is_tensor(key, value)
            wanted[key] = tuple(value.shape), value.dtype
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, (GatedModule, SparseModule)) and id(layer) not in sparse:
            # the file holds it dense
            like = layer.values if isinstance(layer, SparseModule) else layer.weight
            wanted[_join(name, "weight")] = weight_shape_of(layer), like.dtype
    if missing := sorted(wanted.keys() - tensors.keys()):
        raise ValueError(f"the file lacks {missing[:5]}; is it for another model?")
    if extra := sorted(tensors.keys() - wanted.keys()):
        raise ValueError(f"the model has no {extra[:5]}; is the file for another model?")
    for key, (shape, dtype) in wanted.items():
        tensor = tensors[key]
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{key}: the file's shape is {tuple(tensor.shape)}, the model's {shape}"
            )
        if tensor.dtype != dtype and not (tensor.is_floating_point() and dtype.is_floating_point):
            raise ValueError(f"{key}: the file's dtype is {tensor.dtype}, the model's {dtype}")
    return tensors


def _check_is_tensor(key: str, value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{key}: the state must consist of tensors, got {type(value).__name__}")
