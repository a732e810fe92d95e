"""What gates and stored weights a model has: a table to print, and the figures behind it."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass

import torch
from sgtriton_kernels.blocks import Block
from torch import nn
from torch.nn.parameter import UninitializedParameter

from .layers import GatedModule, check_numbers
from .patching import Skipped, find_layers
from .sparse_layers import SparseModule
from .stored import StoredWeight
from .tables import format_table


@dataclass(frozen=True)
class LayerSummary:
    """One gated or sparse layer.

    Attributes:
        name: qualified name in the model.
        kind: class name of the layer.
        shape: of its dense weight.
        block: ``(bn, bk)`` that one gate covers; ``None`` is the whole dimension.
        gate_kind: ``"threshold"`` | ``"bernoulli"`` | ``"hard_concrete"``.
        sparsity: share of the weights that is closed.
        open_blocks, blocks: gates that are open, and all.
        form: how it computes: ``"gated"``, ``"sparse"``, ``"dense"``, or which of them when.
        reason: why.
        bytes: of what a file stores of the weight.
        bytes_dense: of the dense weight.
        bytes_copy: of the dense copy that a sparse layer keeps beside.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    block: Block
    gate_kind: str
    sparsity: float
    open_blocks: int
    blocks: int
    form: str
    reason: str
    bytes: int
    bytes_dense: int
    bytes_copy: int


@dataclass(frozen=True)
class Summary:
    """What :func:`summary` returns; ``print`` it for the table.

    Attributes:
        layers: gated and sparse layers.
        skipped: layers that hold weights and are neither, with the reason.
        sparsity: share of the gated layers' weights that is closed.
        parameters: of the whole model, closed weights included, gates not.
        sparsity_of_all: share of all parameters that is closed.
    """

    layers: tuple[LayerSummary, ...]
    skipped: tuple[Skipped, ...]
    sparsity: float
    parameters: int
    sparsity_of_all: float

    def __str__(self) -> str:
        rows = [
            (
                layer.name,
                layer.kind,
                "x".join(map(str, layer.shape)),
                "x".join("full" if side is None else str(side) for side in layer.block),
                f"{layer.sparsity:.2%}",
                f"{layer.open_blocks:,} of {layer.blocks:,}",
                "mixed" if " at M " in layer.form else layer.form,  # in full below the table
                _size(layer.bytes),
                _size(layer.bytes_dense),
            )
            for layer in self.layers
        ]
        headers = (
            "layer", "type", "weight", "block",
            "sparsity", "open blocks", "form", "stored", "dense",
        )  # fmt: skip
        lines = [format_table(headers, rows, align="llllrrlrr")] if rows else ["no gated layer"]
        if rows:
            closed = f"{self.sparsity:.2%} of the gated weights are closed"
            lines.append(
                f"\n{closed}, {self.sparsity_of_all:.2%} of all {self.parameters:,} parameters"
            )
        said: dict[str, list[str]] = {}
        for layer in self.layers:
            said.setdefault(f"{_dead(layer)}{layer.form}: {layer.reason}", []).append(layer.name)
        lines += [_wrap(f"{', '.join(names)}: {text}") for text, names in said.items()]
        copies = sum(layer.bytes_copy for layer in self.layers)
        if copies:
            lines.append(f"dense copies kept for the dense form: {_size(copies)}")
        lines += [_wrap(f"not gated: {skip.name}: {skip.reason}") for skip in self.skipped]
        return "\n".join(lines)


@torch.no_grad()
def summary(model: nn.Module) -> Summary:
    """Summarise the gates and stored weights of a model.

    Args:
        model: dense, gated or sparse model.

    Returns:
        Figures per layer and in all; ``str`` of it is a table of plain text.

    Raises:
        ValueError: a NaN gate (names the layer).
    """
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, GatedModule):
            check_numbers(name, module)
            stored = StoredWeight.from_gated(module.weight, module.open_gates(), module.layout)
            form = "gated, frozen" if module.frozen else "gated"
            reason = "gates alone save neither time nor memory; sparsify() does"
            layers.append(_layer(name, module, stored, form, reason, 0))
        elif isinstance(module, SparseModule):
            copy = 0 if module.dense_weight is None else module.dense_weight.nbytes
            layers.append(_layer(name, module, module.stored, module.form, module.reason, copy))
    targets, skipped = find_layers(model)
    untouched = [Skipped(name, "patch() was not asked to", 0) for name in targets]
    weights = sum(math.prod(layer.shape) for layer in layers)
    closed = sum(layer.sparsity * math.prod(layer.shape) for layer in layers)
    parameters = weights + _others(model)
    return Summary(
        tuple(layers),
        (*skipped, *untouched),
        closed / weights if weights else 0.0,
        parameters,
        closed / parameters if parameters else 0.0,
    )


def _layer(
    name: str,
    module: GatedModule | SparseModule,
    stored: StoredWeight,
    form: str,
    reason: str,
    copy: int,
) -> LayerSummary:
    is_open = stored.open_gates
    values = stored.tensors()["values"]
    shape = stored.layout.weight_shape
    return LayerSummary(
        name or "(model)",
        type(module).__name__,
        shape,
        module.gate_block,
        module.gate_kind,
        1 - stored.density,
        int(is_open.sum()),
        is_open.numel(),
        form,
        reason,
        stored.nbytes,
        math.prod(shape) * values.element_size(),
        copy,
    )


def _others(model: nn.Module) -> int:
    """Parameters that are neither gates nor weights of gated and sparse layers."""
    own = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, GatedModule)
        for parameter in (module.weight, module.gate)
    }
    return sum(
        parameter.numel()
        for parameter in model.parameters()
        if id(parameter) not in own and not isinstance(parameter, UninitializedParameter)
    )


def _wrap(line: str) -> str:
    return textwrap.fill(line, 100, subsequent_indent="  ", break_long_words=False)


def _dead(layer: LayerSummary) -> str:
    return "" if layer.open_blocks or not layer.blocks else "fully pruned, "


def _size(count: int) -> str:
    if count < 10_000:
        return f"{count:,} B"
    kib = count / 1024
    return f"{kib:.1f} KiB" if kib < 1000 else f"{kib / 1024:,.1f} MiB"
