"""Layers without gates whose weights hold zero blocks already: models pruned elsewhere.

A weight counts as pruned where it is 0, NaN does not. ``torch.nn.utils.prune`` computes a layer's
weight from another one and a mask before each call; that is read here, and made permanent later.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from sgtriton_kernels import gate_layout
from sgtriton_kernels.blocks import Block
from sgtriton_kernels.bsr import nonzero_blocks
from torch import nn
from torch.nn.utils import prune

from .left_dense import left_dense_of
from .patching import (
    Pattern,
    all_names,
    find_layers,
    matcher,
    read_by_parents,
    tied,
    why_not,
)
from .stored import StoredWeight

_SHOWN_BLOCKS: dict[str, Block] = {
    "4x4 blocks": (4, 4),
    "16x16 blocks": (16, 16),
    "rows": (1, None),
}


@torch.no_grad()
def find_pruned(
    model: nn.Module, block: Block, include: Pattern, exclude: Pattern
) -> tuple[dict[str, StoredWeight], dict[str, nn.Module]]:
    """Look for zero blocks in the layers that have no gates; nothing is changed.

    Args:
        model: any model.
        block: ``(bn, bk)``, cut to the layer's size; ``None`` is the whole dimension.
        include, exclude: as for ``patch``.

    Returns:
        What is stored of the layers that hold a zero block, and the layers that hold none.

    Raises:
        ValueError: a pattern that matches no layer, a layer on the meta device.
    """
    layers, skipped = find_layers(model)
    layers |= _masked_layers(model)
    layers = {name: layers[name] for name, _ in model.named_modules() if name in layers}
    names = all_names(model, [*layers, *(s.name for s in skipped)])
    wanted = matcher(include, "include", names, default=True)
    unwanted = matcher(exclude, "exclude", names, default=False)
    found: dict[str, StoredWeight] = {}
    left: dict[str, nn.Module] = {}
    for name, layer in layers.items():
        if not wanted(name, layer) or unwanted(name, layer):
            continue
        weight = permanent_weight(layer)
        if weight.device.type == "meta":
            raise ValueError(f"{name or 'the model'}: weights must hold data, got a meta tensor")
        layout = gate_layout(tuple(weight.shape), block, getattr(layer, "groups", 1))
        is_open = nonzero_blocks(weight, layout)
        if is_open.all():
            left[name] = layer
        else:
            found[name] = StoredWeight.from_gated(weight, is_open, layout)
    return found, left


def permanent_weight(layer: nn.Module) -> torch.Tensor:
    """The weight that a layer computes with, a mask of ``torch.nn.utils.prune`` applied."""
    masked = layer._parameters.get("weight_orig")
    if masked is None or "weight" in layer._parameters:
        return layer.weight.detach()  # pyright: ignore
    return layer.weight_mask.to(masked.dtype) * masked.detach()  # pyright: ignore


def make_permanent(layer: nn.Module) -> None:
    """Take the masks of ``torch.nn.utils.prune`` off, as ``prune.remove`` does."""
    for hook in [*layer._forward_pre_hooks.values()]:
        if isinstance(hook, prune.BasePruningMethod):
            prune.remove(layer, hook._tensor_name)  # pyright: ignore[reportAttributeAccessIssue]


def why_left_dense(layer: nn.Module) -> str | None:
    """Why ``sparsify`` left a layer dense, if it looked at it and that is still so."""
    block = left_dense_of(layer)
    if block is None or layer.weight.device.type == "meta":  # pyright: ignore
        return None
    return f"no zero block of {shown(block)}: {zero_shares(layer, block)}"


@torch.no_grad()
def zero_shares(layer: nn.Module, block: Block) -> str:
    """Which share of a layer's weights, and of some blocks of them, is all 0: in words."""
    weight = permanent_weight(layer)
    shares = [f"{(weight == 0).float().mean():.2%} of its weights are 0"]
    for name, sides in _SHOWN_BLOCKS.items():
        layout = gate_layout(tuple(weight.shape), sides, getattr(layer, "groups", 1))
        if sides != block and not layout.per_weight:
            zero = ~nonzero_blocks(weight, layout)
            shares.append(f"{zero.float().mean():.2%} of its {name}")
    return ", ".join(shares)


def nothing_pruned(left: Mapping[str, nn.Module], block: Block) -> str:
    """What to say of a model that has no zero block."""
    parts = [f"{name or 'the model'}: {zero_shares(left[name], block)}" for name in [*left][:5]]
    parts += ["..."] if len(left) > 5 else []
    return f"no layer has a zero block of {shown(block)} ({'; '.join(parts) or 'none fits'})"


def shown(block: Block) -> str:
    """A block in words: ``32x32``, ``1xfull``."""
    return "x".join("full" if side is None else str(side) for side in block)


def _masked_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Layers under ``torch.nn.utils.prune`` that could be patched once it is made permanent."""
    ties, layers, readers = None, {}, read_by_parents(model)
    for name, module in model.named_modules():
        if not any(
            isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == "weight"  # pyright: ignore
            for hook in module._forward_pre_hooks.values()
        ):
            continue
        twin = copy.copy(module)
        twin._parameters = dict(module._parameters)
        twin._parameters["weight"] = twin._parameters.pop("weight_orig")
        ties = tied(model) if ties is None else ties
        shared = f"{name}.weight_orig".removeprefix(".") in ties
        if id(module) not in readers and why_not(name, twin, {}, {}) is None and not shared:
            layers[name] = module
    return layers
