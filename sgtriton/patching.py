"""Gate the layers of a model in place, and take the gates off again.

Layers are chosen by exact type. A layer that cannot be gated without changing what the model
computes, or whose gates would have no effect, is left alone and listed with the reason.
"""

from __future__ import annotations

import fnmatch
import logging
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from sgtriton_kernels.blocks import Block
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedTensorMixin  # pyright: ignore
from torch.nn.utils.parametrize import ParametrizationList

from .block_choice import blocks_of_layers
from .layers import (
    ADDED_NAMES,
    GATED_TYPES,
    GatedModule,
    check_gate_options,
    check_numbers,
    check_reopen_every,
    gate_layer,
    named_gated_layers,
    ungate_layer,
)
from .left_dense import forget_left_dense
from .state import check_states_of, forget_states_of

log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)

Pattern = str | Iterable[str] | Callable[[str, nn.Module], bool] | None


@dataclass(frozen=True)
class Skipped:
    """A layer that ``patch`` leaves alone.

    Attributes:
        name: qualified name in the model.
        reason: why, in words.
        size: number of weights.
    """

    name: str
    reason: str
    size: int


def patch(
    model: Model,
    block: Block | Literal["auto"] = (32, 32),
    gate: str = "threshold",
    init: float = 0.9,
    include: Pattern = None,
    exclude: Pattern = None,
    sync_noise: bool = False,
    reopen_every: int = 1,
    card: str | None = None,
    target: float | None = None,
) -> Model:
    """Put gates on the weights of a model's ``Linear``, ``Conv1d`` and ``Conv2d`` layers.

    Right after it the model computes what it did, bit for bit, in eval mode and (``threshold``) in
    training. Call it before the optimizer is made, so that it holds the gates
    (:func:`sgtriton.param_groups`), and before the model is wrapped for distributed training.
    Layers that are gated already stay as they are: call it again with another ``block`` for the
    rest.

    Args:
        model: changed in place; layers keep their identity, Parameters, hooks and state-dict keys,
            and get one more Parameter, ``gate``.
        block: ``(bn, bk)`` output and input features that one gate covers; ``(1, 1)`` is per
            weight, ``None`` the whole dimension; cut to the layer's size. ``"auto"``: for each
            layer the smallest of 16x16, 32x32, 64x64, 128x64 and 128x128 whose expected speed-up at
            ``target`` is within 10 % of the best one's (:func:`.choose_block`).
        gate: ``"threshold"`` | ``"bernoulli"`` | ``"hard_concrete"``.
        init: first value of the gates, in (0.5, 1]; of ``hard_concrete`` gates the chance that one
            is drawn as exactly 1, in [0.7, 1].
        include: only these layers: glob patterns on qualified names (``"encoder.*"``), one or
            several, or a function ``(name, module) -> bool``. ``None`` is all.
        exclude: not these; as ``include``.
        sync_noise: draw gates alike on all ranks of the default process group; each rank draws its
            own otherwise.
        reopen_every: let closed gates move once in so many optimizer steps (``threshold`` only). On
            the others their blocks cost nothing in backward, for gates that cover blocks.
        card: with ``block="auto"``: where the model will be served, one of
            ``sgtriton_kernels.cards.CARD_NAMES``, in short if that is clear (``"H100"``), or
            ``"cpu"``; default: the device it is on.
        target: with ``block="auto"``: the share of the weights that will be closed.

    Returns:
        ``model``.

    Raises:
        ValueError: a block, kind, ``init`` that is not allowed; a pattern that matches no layer; a
            model that is wrapped for distributed training. The model is unchanged then.
    """
    is_auto = isinstance(block, str)
    if is_auto and block != "auto":
        raise ValueError(f"block must be two sides or 'auto', got {block!r}")
    if not is_auto and (card is not None or target is not None):
        raise ValueError(f"card and target go with block='auto', got block {block}")
    check_gate_options((1, 1) if is_auto else block, gate, init)
    check_reopen_every(reopen_every, gate)
    _check_unwrapped(model)
    targets, skipped = find_layers(model)
    first = [*targets, *(s.name for s in skipped), *(n for n, _ in named_gated_layers(model))]
    names = all_names(model, first)
    wanted = matcher(include, "include", names, default=True)
    unwanted = matcher(exclude, "exclude", names, default=False)
    chosen = {n: m for n, m in targets.items() if wanted(n, m) and not unwanted(n, m)}
    blocks: dict[str, Block] = (
        {name: found.block for name, found in blocks_of_layers(chosen, target, card).items()}
        if is_auto
        else dict.fromkeys(chosen, block)
    )
    for name, layer in chosen.items():
        log.info("%s: gated, block %s, %s", name, blocks[name], gate)
        gate_layer(layer, blocks[name], gate, init, sync_noise, reopen_every)
    for skip in skipped:
        log.info("%s: not gated: %s", skip.name, skip.reason)
    if chosen:
        leave_fast_paths(model)
        check_states_of(model)
    elif not any(True for _ in named_gated_layers(model)):
        reasons = "; ".join(f"{s.name}: {s.reason}" for s in skipped[:5])
        warnings.warn(
            f"patch gated 0 of {len(targets) + len(skipped)} layers"
            + (f" ({reasons})" if reasons else ""),
            stacklevel=2,
        )
    return model


def unpatch(model: Model, fold: bool = False) -> Model:
    """Take the gates off a model again; sparse layers become dense ones, closed weights 0.

    Args:
        model: patched or served model; changed in place.
        fold: multiply the gates into the weights, so that the dense model computes what the gated
            one does in eval. ``False`` keeps the weights as they are, closed ones too; those of
            frozen layers are 0.

    Returns:
        ``model``; without gates it is left as it is.

    Raises:
        ValueError: a NaN gate that would be folded in. The model is unchanged then.
    """
    from .sparse_layers import SparseModule, densify_layer

    layers = list(named_gated_layers(model))
    for name, layer in layers:
        if fold:
            check_numbers(name, layer)
    for name, module in model.named_modules():
        if isinstance(module, SparseModule):
            densify_layer(module)
            log.info("%s: dense again", name)
    for name, layer in layers:
        ungate_layer(layer, fold)
        log.info("%s: gates %s", name, "folded into the weight" if fold else "removed")
    restore_fast_paths(model)
    for module in model.modules():
        forget_left_dense(module)
        if not _holds_our_layers(module):
            forget_states_of(module)
    return model


def find_layers(model: nn.Module) -> tuple[dict[str, nn.Module], list[Skipped]]:
    """Which layers of ``model`` can be gated, and which cannot and why.

    Returns:
        ``{qualified name: layer}`` of the layers that ``patch`` would gate, and the others that
        hold weights. Layers that are gated or sparse already are in neither.
    """
    from .sparse_layers import SparseModule

    read_by = read_by_parents(model)
    ties = tied(model)
    targets: dict[str, nn.Module] = {}
    skipped: list[Skipped] = []
    for name, module in model.named_modules():
        if isinstance(module, (GatedModule, SparseModule, ParametrizationList)):
            continue
        weights = [p for p in module.parameters(recurse=False) if _is_matrix(p)]
        is_layer = isinstance(module, (nn.Linear, _ConvNd))
        if not weights and not is_layer:
            continue
        reason = why_not(name, module, read_by, ties)
        if reason is None:
            targets[name] = module
        else:
            size = 0 if _is_lazy(module) else sum(p.numel() for p in weights)
            skipped.append(Skipped(name or type(module).__name__, reason, size))
    return targets, skipped


def leave_fast_paths(model: nn.Module) -> None:
    """Switch off the code of stock transformer layers that reads weights of layers itself."""
    for module in model.modules():
        attribute = _fast_path_switch(module)
        if attribute and _holds_our_layers(module) and not hasattr(module, _FAST_PATH):
            setattr(module, _FAST_PATH, getattr(module, attribute))
            setattr(module, attribute, 0 if attribute == "activation_relu_or_gelu" else False)


def restore_fast_paths(model: nn.Module) -> None:
    """Undo :func:`leave_fast_paths` where no gated or sparse layer is left."""
    for module in model.modules():
        attribute = _fast_path_switch(module)
        if attribute and hasattr(module, _FAST_PATH) and not _holds_our_layers(module):
            setattr(module, attribute, getattr(module, _FAST_PATH))
            delattr(module, _FAST_PATH)


_FAST_PATH = "_sgtriton_fast_path"  # what the switch was before


def _fast_path_switch(module: nn.Module) -> str | None:
    if isinstance(module, nn.TransformerEncoderLayer):
        return "activation_relu_or_gelu"
    if isinstance(module, nn.TransformerEncoder):
        return "use_nested_tensor"
    return None


def _holds_our_layers(module: nn.Module) -> bool:
    from .sparse_layers import SparseModule

    return any(isinstance(m, (GatedModule, SparseModule)) for m in module.modules())


def why_not(
    name: str, module: nn.Module, read_by: dict[int, str], ties: dict[str, str]
) -> str | None:
    """Why a layer that holds weights cannot be gated; ``None`` if it can.

    Args:
        name: qualified name of the layer.
        module: the layer.
        read_by: ``{id of a layer: the parent that reads its weight}``.
        ties: as :func:`tied` returns it.
    """
    kind = type(module).__name__
    if id(module) in read_by:
        return f"{read_by[id(module)]} reads its weight instead of calling it"
    if isinstance(module, nn.MultiheadAttention):
        return "its input projections are Parameters, not layers"
    if _is_lazy(module):
        return "not initialised yet; run one batch through the model first"
    weight = module._parameters.get("weight")
    if weight is None and isinstance(module, (nn.Linear, _ConvNd)):
        return (
            "its weight is computed (a parametrization or pruning hook); make it permanent first: "
            "parametrize.remove_parametrizations or prune.remove"
        )
    if type(module) not in GATED_TYPES:
        allowed = ", ".join(t.__name__ for t in GATED_TYPES)
        return f"unsupported type {kind} (exact types {allowed} are gated)"
    assert weight is not None
    if not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
        return f"unsupported dtype {weight.dtype}"
    if type(weight.data) is not torch.Tensor and type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}"
    if weight.numel() == 0:
        return "it has no weights"
    if own := [name for name in ADDED_NAMES if hasattr(module, name)]:
        return f"it has an attribute {own[0]!r} of its own"
    if other := ties.get(f"{name}.weight".removeprefix(".")):
        return f"its weight is tied to {other}"
    return None


def read_by_parents(model: nn.Module) -> dict[int, str]:
    """``{id of a layer: the parent that reads its weight}``."""
    return {
        id(module.out_proj): f"{type(module).__name__} {name}".strip()
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    }


def tied(model: nn.Module) -> dict[str, str]:
    """``{name of a parameter: names of the others that share memory with it}``."""
    spans: list[tuple[str, int, int, str]] = []  # device, first byte, end, name
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(prefix=name, recurse=False):
            if _is_lazy(module) or not _is_matrix(parameter):
                continue
            start, end = id(parameter), id(parameter) + 1
            if parameter.device.type != "meta" and parameter.numel():
                start = parameter.data_ptr()
                last = sum(
                    (n - 1) * s for n, s in zip(parameter.shape, parameter.stride(), strict=True)
                )
                end = start + (last + 1) * parameter.element_size()
            spans.append((str(parameter.device), start, end, key))
    groups: list[list[str]] = []
    reached: tuple[str, int] = ("", 0)
    for device, start, end, name in sorted(spans):
        if device == reached[0] and start < reached[1]:
            groups[-1].append(name)
            reached = (device, max(end, reached[1]))
        else:
            groups.append([name])
            reached = (device, end)
    return {
        name: ", ".join(other for other in group if other != name)
        for group in groups
        if len(group) > 1
        for name in group
    }


def _is_matrix(parameter: torch.Tensor) -> bool:
    return isinstance(parameter, UninitializedTensorMixin) or parameter.dim() >= 2


def _is_lazy(module: nn.Module) -> bool:
    return isinstance(module, LazyModuleMixin)


def _check_unwrapped(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError(
                f"{name or 'the model'} is wrapped in DistributedDataParallel, which would not see "
                "the gates; patch the model first, then wrap it"
            )
        if any(hasattr(p, "full_tensor") for p in module.parameters(recurse=False)):
            raise ValueError(
                f"{name or 'the model'} holds sharded parameters; patch the model first, then shard"
            )


def all_names(model: nn.Module, first: list[str]) -> dict[str, list[str]]:
    """``{name: every name}`` of the layers named; a shared one has several."""
    by_module: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        by_module.setdefault(id(module), []).append(name)
    every = {names[0]: names for names in by_module.values()}
    return {name: every.get(name, [name]) for name in first}


def matcher(
    pattern: Pattern, argument: str, names: dict[str, list[str]], default: bool
) -> Callable[[str, nn.Module], bool]:
    """Whether a layer, given by name, is one that ``pattern`` means.

    Args:
        pattern: as for :func:`patch`.
        argument: what the user calls it.
        names: as :func:`all_names` returns it.
        default: what ``None`` means.

    Raises:
        ValueError: a glob that matches no layer.
    """
    if pattern is None:
        return lambda name, module: default
    if callable(pattern):
        return pattern
    globs = (
        [pattern] if isinstance(pattern, str) or not isinstance(pattern, Iterable) else [*pattern]
    )
    for glob in globs:
        if not isinstance(glob, str):
            raise ValueError(f"{argument} must hold glob patterns, got {glob!r}")
        if not any(_matches(known, glob) for known in names.values()):
            shown = ", ".join([*names][:8]) + (", ..." if len(names) > 8 else "")
            raise ValueError(f"{argument}={glob!r} matches no layer; the layers are: {shown}")
    return lambda name, module: any(_matches(names[name], glob) for glob in globs)


def _matches(names: list[str], glob: str) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for name in names)
