"""What gates and stored weights a model has: a table to print, and the figures behind it."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from sgtriton_kernels.blocks import Block
from torch import nn
from torch.nn.parameter import UninitializedParameter

from .layers import GatedModule, check_numbers
from .patching import Skipped, find_layers
from .pruned import shown, why_left_dense
from .sparse_layers import NO_GATES, SparseModule
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
        gate_kind: ``"threshold"`` | ``"bernoulli"`` | ``"hard_concrete"``, or ``"none"`` of a layer
            that was pruned elsewhere.
        sparsity: share of the weights that is closed.
        open_blocks, blocks: gates that are open, and all.
        form: how it computes: ``"gated"``, ``"dense"``, ``"sparse"``, ``"merged"``,
            ``"compacted"``, or which of them when.
        reason: why.
        bytes: of what a file stores of the weight.
        bytes_dense: of the dense weight.
        bytes_copy: of what a sparse layer keeps beside for forms other than ``"sparse"``.
        serve_block: block of the merged form, ``None`` if there is none.
        served_sparsity: share of the weights that blocks of that size leave out.
        expected, measured: rows of x (``"1"``, ``"2-8"``, ...) -> speed-up over dense of the
            fastest other form, by the cost model and on this machine.
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
    serve_block: tuple[int, int] | None = None
    served_sparsity: float | None = None
    expected: Mapping[str, float] = field(default_factory=dict)
    measured: Mapping[str, float] = field(default_factory=dict)


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
                shown(layer.block),
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
            gated = {layer.gate_kind != NO_GATES for layer in self.layers}
            what = "gated and pruned" if len(gated) > 1 else "gated" if True in gated else "pruned"
            closed = f"{self.sparsity:.2%} of the {what} weights are closed"
            lines.append(
                f"\n{closed}, {self.sparsity_of_all:.2%} of all {self.parameters:,} parameters"
            )
        said: dict[tuple[str, ...], list[str]] = {}
        for layer in self.layers:
            said.setdefault(_in_words(layer), []).append(layer.name)
        lines += [_statement(", ".join(names), *parts) for parts, names in said.items()]
        copies = sum(layer.bytes_copy for layer in self.layers)
        if copies:
            lines.append(f"copies kept for forms other than sparse: {_size(copies)}")
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
            stored, copy = module.stored, module.bytes_beside
            layers.append(_layer(name, module, stored, module.form, module.reason, copy))
    targets, skipped = find_layers(model)
    modules = dict(model.named_modules())
    untouched = [Skipped(name, "patch() was not asked to", 0) for name in targets]
    others = tuple(
        replace(skip, reason=why_left_dense(modules[skip.name]) or skip.reason)
        if skip.name in modules
        else skip
        for skip in (*skipped, *untouched)
    )
    weights = sum(math.prod(layer.shape) for layer in layers)
    closed = sum(layer.sparsity * math.prod(layer.shape) for layer in layers)
    parameters = weights + _others(model)
    return Summary(
        tuple(layers),
        others,
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
    serve, speedups = None, ()
    if isinstance(module, SparseModule):
        serve, speedups = module.serve_block, (module.expected, module.measured)
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
        serve,
        None if serve is None else 1 - stored.merged(serve).density,
        *speedups,
    )


def _others(model: nn.Module) -> int:
    """Parameters that are neither gates nor weights of gated and sparse layers."""
    own = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, (GatedModule, SparseModule))
        for name in ("weight", "gate", "values")
        if (parameter := module._parameters.get(name)) is not None
    }
    return sum(
        parameter.numel()
        for parameter in model.parameters()
        if id(parameter) not in own and not isinstance(parameter, UninitializedParameter)
    )


def _wrap(line: str, indent: str = "") -> str:
    after = indent + "  "
    return textwrap.fill(
        line, 100, initial_indent=indent, subsequent_indent=after, break_long_words=False
    )


def _statement(names: str, form: str, *reasons: str) -> str:
    """What is said of some layers: in one line, or each reason in its own."""
    line = " ".join([f"{names}: {form}", *reasons])
    if len(line) <= 100:
        return line
    return "\n".join([_wrap(f"{names}: {form}"), *(_wrap(reason, "  ") for reason in reasons)])


def _in_words(layer: LayerSummary) -> tuple[str, ...]:
    """In which form a layer computes, and why, with what the table has no column for."""
    form = "" if layer.open_blocks or not layer.blocks else "fully pruned, "
    form += "pruned elsewhere, " if layer.gate_kind == NO_GATES else ""
    reasons = [f"{reason};" for reason in layer.reason.split("; ")]
    if layer.expected:
        speedups = ", ".join(f"{speedup:.2g}x" for speedup in layer.expected.values())
        reasons[-1] = reasons[-1][:-1]
        reasons.append(f"(expected {speedups});")
    if layer.serve_block is not None and "merged" in layer.form:
        block, closed = shown(layer.serve_block), layer.served_sparsity
        reasons.append(f"merged blocks of {block} leave out {closed:.2%};")
    if layer.bytes_copy > layer.bytes_dense:
        reasons.append(f"copies take {layer.bytes_copy / layer.bytes_dense:.2g}x the dense weight;")
    reasons[-1] = reasons[-1][:-1]
    return f"{form}{layer.form}:", *reasons


def _size(count: int) -> str:
    if count < 10_000:
        return f"{count:,} B"
    kib = count / 1024
    return f"{kib:.1f} KiB" if kib < 1000 else f"{kib / 1024:,.1f} MiB"
