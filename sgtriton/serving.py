"""Gated or pruned model -> served model."""

from __future__ import annotations

import logging
import warnings

import torch
from sgtriton_kernels.blocks import Block, check_block
from torch import nn

from .control import unfinished
from .layers import GatedModule, check_numbers, named_gated_layers
from .left_dense import mark_left_dense
from .patching import Model, Pattern, leave_fast_paths
from .planning import plan_forms
from .pruned import find_pruned, make_permanent, nothing_pruned, why_left_dense
from .sparse_layers import FORMS, NO_GATES, SparseModule, sparsify_layer
from .state import check_states_of
from .stored import StoredWeight, served_block

log = logging.getLogger(__name__)


def sparsify(
    model: Model,
    form: str = "auto",
    dense_copy: bool = True,
    *,
    block: Block | None = None,
    include: Pattern = None,
    exclude: Pattern = None,
    serve_block: Block | None = None,
    trainable: bool = False,
) -> Model:
    """Throw the closed weights of a model away, and serve what is left.

    Each gated layer becomes a :class:`BlockSparseLinear` (``BlockSparseConv1d``, ``-2d``) that
    stores its open blocks only, times the gate where that is a number (``hard_concrete``). A gate
    is open as eval sees it: above 0.5, or a hard concrete one above 0. With ``block``, layers
    without gates whose weights hold zero blocks become sparse layers too; a mask of
    ``torch.nn.utils.prune`` is made permanent then.

    A layer computes in one of five forms, chosen for each bucket of M (rows of x in all):
    ``"dense"``, the zeros filled in; ``"dense_left"``, the same with the weight as the left
    operand, which suits a CPU and few rows; ``"sparse"``, the product over stored blocks;
    ``"merged"``, the product over larger blocks made of them; ``"compacted"``, the dense product
    without the rows and columns that are all zeros. Layers with per-weight gates have no product
    over blocks.

    Args:
        model: patched model, or one pruned elsewhere; changed in place. Served outputs are the
            model's in eval.
        form: ``"auto"`` times the forms on this machine and takes another than dense only where it
            is faster; ``"lookup"`` chooses by a cost model; the name of a form fixes it for every
            layer that has it, others compute dense.
        dense_copy: keep a dense copy of the weight where a form needs it; ``False`` fills the zeros
            in at each call, which is slower and saves the memory.
        block: ``(bn, bk)``, the blocks in which weights of layers without gates are stored;
            ``None`` sides are the whole dimension. Gated layers keep the blocks of their gates.
        include, exclude: of the layers without gates only these, as for :func:`patch`.
        serve_block: blocks of the merged form, made of whole gate blocks and cut to the layer's
            size; by default the smallest whose sides are powers of two >= 16, which is what the
            Triton kernels want, where the gates' own are not.
        trainable: the stored values are Parameters, for training with a fixed pattern: give them to
            the optimizer afterwards. Such layers are ``"dense"`` or ``"sparse"``, and are timed
            with their backward pass.

    Returns:
        ``model``.

    Raises:
        ValueError: a model without gates and zero blocks, a NaN gate (names the layer), an argument
            that is not allowed. The model is unchanged then.
    """
    _check_arguments(form, block, include, exclude, serve_block, trainable)
    # tensors made under inference_mode could not be saved for a backward pass later
    grads = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(grads):
        return _sparsify(model, form, dense_copy, block, include, exclude, serve_block, trainable)


def _sparsify(
    model: Model,
    form: str,
    dense_copy: bool,
    block: Block | None,
    include: Pattern,
    exclude: Pattern,
    serve_block: Block | None,
    trainable: bool,
) -> Model:
    gated = dict(named_gated_layers(model))
    pruned, left = ({}, {}) if block is None else find_pruned(model, block, include, exclude)
    if not gated and not pruned:
        sparse = [n for n, m in model.named_modules() if isinstance(m, SparseModule)]
        if sparse:
            shown = ", ".join(name or "the model" for name in sparse[:5])
            raise ValueError(
                f"the model has no gated layer; sparse already: {shown}"
                f"{', ...' if len(sparse) > 5 else ''}; to choose forms anew, sgtriton.unpatch "
                "first and name the block: sgtriton.sparsify(model, block=(32, 32))"
            )
        if block is not None:
            raise ValueError(nothing_pruned(left, block))
        raise ValueError(
            "the model has no gated layer; call sgtriton.patch(model) and train it first; if its "
            "weights hold zero blocks already, say of which size: "
            "sgtriton.sparsify(model, block=(32, 32))"
        )
    controller = unfinished(gated.values())
    # all that can fail comes before the first layer changes
    layers = {n: m for n, m in model.named_modules() if n in gated or n in pruned}
    stored = {n: pruned[n] if n in pruned else stored_part(n, m) for n, m in layers.items()}
    serve = {name: _served(name, part, serve_block) for name, part in stored.items()}
    plans = {
        name: plan_forms(layer, stored[name], form, serve[name], dense_copy, trainable)
        for name, layer in layers.items()
    }
    for name, layer in layers.items():
        part, kind = stored[name], NO_GATES
        if isinstance(layer, GatedModule):
            gate_block, kind = layer.gate_block, layer.gate_kind
        else:
            assert block is not None
            gate_block = (block[0], block[1])
            make_permanent(layer)
        sparse = sparsify_layer(layer, part, gate_block, kind, serve[name], trainable)
        plans[name].apply_to(sparse, dense_copy)
        origin = "pruned elsewhere, " if kind == NO_GATES else ""
        log.info("%s: %sdensity %.4f, %s", name, origin, part.density, sparse.form)
    for name, layer in left.items():
        assert block is not None
        mark_left_dense(layer, block)
        log.info("%s: left dense: %s", name, why_left_dense(layer))
    if controller is not None:
        parts = [stored[name] for name in gated]
        now = 1 - sum(p.density * p.weights for p in parts) / sum(p.weights for p in parts)
        warnings.warn(
            f"the gates were not frozen yet: the model is served at sparsity {now:.4f}, the target "
            f"of its controller is {controller.target}",
            stacklevel=3,
        )
    if empty := [name for name, part in stored.items() if part.density == 0]:
        warnings.warn(
            f"all weights of {', '.join(empty)} are closed: they give their bias whatever comes in",
            stacklevel=3,
        )
    leave_fast_paths(model)
    check_states_of(model)
    return model


def _check_arguments(form, block, include, exclude, serve_block, trainable) -> None:
    if form not in (known := ("auto", "lookup", *FORMS)):
        raise ValueError(f"form must be one of {known}, got {form!r}")
    if block is not None:
        check_block(block)
    elif include is not None or exclude is not None:
        raise ValueError(
            "include and exclude choose among layers without gates, which are stored in blocks of "
            "the size given by block; got no block"
        )
    if serve_block is not None:
        try:
            check_block(serve_block)
        except ValueError as error:
            raise ValueError(f"serve_{error}") from None
    if trainable and (serve_block is not None or form in ("dense_left", "merged", "compacted")):
        raise ValueError(
            "trainable layers compute from their stored blocks: form must be 'auto', 'lookup', "
            f"'dense' or 'sparse' and serve_block None, got {form!r} and {serve_block}"
        )


def _served(name: str, stored: StoredWeight, asked: Block | None) -> tuple[int, int] | None:
    try:
        return served_block(stored.layout, asked)
    except ValueError as error:
        raise ValueError(f"{name or 'the model'}: {error}") from None


def stored_part(name: str, layer: nn.Module) -> StoredWeight:
    """What a gated or sparse layer stores.

    Raises:
        ValueError: a NaN gate.
    """
    if isinstance(layer, SparseModule):
        return layer.stored
    assert isinstance(layer, GatedModule)
    check_numbers(name, layer)
    return StoredWeight.from_gated(layer.weight, layer.gate, layer.layout, layer.gate_kind)
