"""What a file says of its sparse layers, checked before anything is made of it."""

from __future__ import annotations

import math
import os
import reprlib
from pathlib import Path
from typing import Any

import torch
from sgtriton_kernels import gate_layout
from sgtriton_kernels.blocks import GateLayout, matrix_shape
from sgtriton_kernels.kinds import GATE_KINDS
from torch import nn

from .container import printable, read_file
from .layers import GATED_TYPES
from .sparse_layers import BUCKETS, FORMS, NO_GATES, possible_forms
from .stored import StoredWeight, served_block

LONGEST_REASON = 500  # characters
_MOST_SPEEDUP = 1e6
_TYPES: dict[str, type[nn.Module]] = {kind.__name__: kind for kind in GATED_TYPES}
_DIMS = {"Linear": 2, "Conv1d": 3, "Conv2d": 4}  # of a weight
# a side of a weight's matrix; what an index takes grows with it, and nothing else bounds it
_LONGEST_SIDE = 1 << 24


def stored_layers(
    path: str | os.PathLike[str],
) -> dict[str, tuple[StoredWeight, tuple[int, int] | None]]:
    """The open weights of the layers that a file stores, without a model to load them into.

    Args:
        path: file written by :func:`.save`.

    Returns:
        By layer: its weights, on the CPU, in the file's dtypes, and its :func:`serve_block`.

    Raises:
        ValueError: a file that is missing, truncated, damaged, not ours, or of an unknown version;
            names the file, the layer and the rule.
    """
    path = Path(path)
    description, tensors = read_file(path)
    stored = {}
    try:
        for name, entry in description["layers"].items():
            shown = shown_name(name)
            check_entry(shown, entry)
            _check_shape(shown, entry)
            part = take_stored(name, entry, tensors)
            stored[name] = part, serve_block(entry, part.layout)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return stored


def shown_name(name: str) -> str:
    """The name that a file gives a layer, as errors show it."""
    return printable(name) or "the model"


def _check_shape(shown: str, entry: dict[str, Any]) -> None:
    """What a model's layer says of its entry elsewhere."""
    kind, shape = entry["type"], tuple(entry["shape"])
    if kind not in _TYPES:
        raise ValueError(f"{shown}: damaged: type cannot be {reprlib.repr(kind)}")
    if len(shape) != _DIMS[kind] or (kind == "Linear" and entry["groups"] != 1):
        raise ValueError(
            f"{shown}: damaged: a {kind} has no weight of shape {entry['shape']} in "
            f"{entry['groups']} groups"
        )
    try:
        layout = gate_layout(shape, tuple(entry["gate_block"]), entry["groups"])
    except ValueError as error:
        raise ValueError(f"{shown}: {error}") from None
    if max(matrix_shape(layout)) > _LONGEST_SIDE:
        raise ValueError(f"{shown}: damaged: shape {entry['shape']} is too large")


def take_stored(name: str, entry: dict[str, Any], tensors: dict[str, torch.Tensor]) -> StoredWeight:
    """Take a layer's arrays out of a file's.

    Args:
        name: of the layer.
        entry: that :func:`check_entry` has passed; of a type and a shape that exist.
        tensors: of the file; those of the layer are removed.

    Raises:
        ValueError: arrays, a block or forms that are not those of such a layer; names it.
    """
    shown, prefix = shown_name(name), f"{name}." if name else ""
    try:
        layout = gate_layout(tuple(entry["shape"]), tuple(entry["gate_block"]), entry["groups"])
        names = ("values", "bits") if layout.per_weight else ("values", "crow", "col")
        held = {key: tensors.pop(prefix + key) for key in names if prefix + key in tensors}
        stored = StoredWeight.from_tensors(held, layout)
        serve = serve_block(entry, layout)
    except ValueError as error:
        raise ValueError(f"{shown}: {error}") from None
    possible = possible_forms(_TYPES[entry["type"]], layout, serve)
    if entry["forms"] and (wrong := set(entry["forms"].values()) - set(possible)):
        raise ValueError(
            f"{shown}: the layer has the forms {possible}, the file says {sorted(wrong)[0]!r}"
        )
    return stored


def serve_block(entry: dict[str, Any], layout: GateLayout) -> tuple[int, int] | None:
    """The block of a layer's form ``"merged"``; ``None`` where it has none.

    Args:
        entry: that :func:`check_entry` has passed.
        layout: of its gates.

    Raises:
        ValueError: a block that is not made of whole gate blocks.
    """
    if entry["forms"] is not None and "serve_block" not in entry:
        return None  # the layer that was saved had none
    return served_block(layout, entry.get("serve_block"))


def check_entry(shown: str, entry: Any) -> None:
    """Raise unless a layer's entry has the right fields; the file may come from anywhere."""

    def is_size(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 1

    def is_forms(value: Any) -> bool:
        return value is None or (
            isinstance(value, dict)
            and set(value) == set(BUCKETS)
            and all(form in FORMS for form in value.values())
        )

    def is_block(value: Any) -> bool:
        return (
            isinstance(value, list)
            and len(value) == 2
            and all(side is None or is_size(side) for side in value)
        )

    def is_speedups(value: Any) -> bool:
        return isinstance(value, dict) and all(
            bucket in BUCKETS
            and isinstance(speedup, (int, float))
            and not isinstance(speedup, bool)
            and 0 < speedup <= _MOST_SPEEDUP
            for bucket, speedup in value.items()
        )

    rules: dict[str, Any] = {
        "type": lambda v: isinstance(v, str),
        "shape": lambda v: isinstance(v, list) and 2 <= len(v) <= 5 and all(map(is_size, v)),
        "groups": is_size,
        "gate_block": is_block,
        "gate_kind": lambda v: v in (*GATE_KINDS, NO_GATES),
        "forms": is_forms,
        "reason": lambda v: isinstance(v, str) and len(v) <= LONGEST_REASON and v.isprintable(),
        "dense_copy": lambda v: isinstance(v, bool),
        "device": lambda v: isinstance(v, str),
    }
    optional = {"serve_block": is_block, "expected": is_speedups, "measured": is_speedups}
    if not isinstance(entry, dict) or not set(rules) <= set(entry) <= {*rules, *optional}:
        raise ValueError(f"{shown}: damaged: its description must have fields {sorted(rules)}")
    for field, rule in (rules | optional).items():
        if field in entry and not rule(entry[field]):
            raise ValueError(f"{shown}: damaged: {field} cannot be {reprlib.repr(entry[field])}")
    if math.prod(entry["shape"]) >= 2**48:
        raise ValueError(f"{shown}: damaged: shape {entry['shape']} is too large")
