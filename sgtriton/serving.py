"""Gated model -> served model, and in which form each layer computes."""

from __future__ import annotations

import logging

import torch
from sgtriton_kernels import bsr_linear
from torch import nn

from .layers import named_gated_layers
from .patching import Model, leave_fast_paths
from .sparse_layers import BUCKETS, SparseModule, sparsify_layer
from .state import check_states_of
from .stored import StoredWeight
from .timing import interleaved_ms

log = logging.getLogger(__name__)

_ROWS = {"1": 1, "2-8": 8, "9-32": 32, "33-128": 128, ">128": 512}  # M that stands for a bucket
_MARGIN = 0.9  # sparse must beat dense by more than a timing's noise


def sparsify(model: Model, form: str = "auto", dense_copy: bool = True) -> Model:
    """Throw the closed weights of a gated model away, and serve what is left.

    Each gated layer becomes a :class:`BlockSparseLinear` (``BlockSparseConv1d``, ``-2d``) that
    stores its open blocks only; a gate is open if it is above 0.5. In which form it computes is
    chosen for each bucket of M (rows of x in all): the product over stored blocks, or the dense
    product with zeros filled in. Layers with per-weight gates and convolutions compute dense.

    Args:
        model: patched model; changed in place. Served outputs are the gated model's in eval.
        form: ``"auto"`` times both forms on this machine and takes sparse only where it is faster;
            ``"sparse"`` or ``"dense"`` fixes the form of every layer that has it.
        dense_copy: keep a dense copy of the weight where a form needs it; ``False`` fills the zeros
            in at each call, which is slower and saves the memory.

    Returns:
        ``model``.

    Raises:
        ValueError: a model without gates, a NaN gate (names the layer), another ``form``. The model
            is unchanged then.
    """
    if form not in ("auto", "sparse", "dense"):
        raise ValueError(f"form must be 'auto', 'sparse' or 'dense', got {form!r}")
    layers = dict(named_gated_layers(model))
    if not layers:
        raise ValueError(
            "the model has no gated layer; call sgtriton.patch(model) and train it first"
        )
    stored = {name: stored_part(name, layer) for name, layer in layers.items()}
    for name, layer in layers.items():
        sparse = sparsify_layer(layer, stored[name], layer.gate_block, layer.gate_kind)
        choose_forms(sparse, form, dense_copy)
        log.info("%s: density %.4f, %s", name, stored[name].density, sparse.form)
    leave_fast_paths(model)
    check_states_of(model)
    return model


def stored_part(name: str, layer: nn.Module) -> StoredWeight:
    """What a gated or sparse layer stores.

    Raises:
        ValueError: a NaN gate.
    """
    if isinstance(layer, SparseModule):
        return layer.stored
    if torch.isnan(layer.gate).any():  # pyright: ignore
        raise ValueError(f"{name or 'the model'}: gates must be numbers, got NaN")
    return StoredWeight.from_gated(layer.weight, layer.open_gates(), layer.layout)  # pyright: ignore


@torch.no_grad()
def choose_forms(layer: SparseModule, form: str = "auto", dense_copy: bool = True) -> None:
    """Set the forms of a sparse layer: as told, or the faster one for each bucket of M."""
    if layer.layout.per_weight or not layer.can_multiply_blocks:
        why = "per-weight gates" if layer.layout.per_weight else "convolutions"
        _set_all(layer, "dense", f"{why} are computed dense", dense_copy)
    elif form != "auto":
        _set_all(layer, form, "as asked for", dense_copy)
    else:
        forms, speedups = {}, []
        weight, bias = layer.stored.to_dense(), layer.bias
        if bias is not None:
            bias = bias.to(weight.dtype)  # they may differ in a model for autocast
        random = torch.Generator(weight.device).manual_seed(0)  # the user's generator stays
        for bucket, rows in _ROWS.items():
            x = torch.randn(rows, weight.shape[1], device=weight.device, generator=random)
            x = x.to(weight.dtype)
            sparse_ms, dense_ms = interleaved_ms(
                [
                    lambda x=x: bsr_linear(x, layer.matrix, bias),
                    lambda x=x: nn.functional.linear(x, weight, bias),
                ],
                weight.device,
                seconds=0.05,
            )
            forms[bucket] = "sparse" if sparse_ms < _MARGIN * dense_ms else "dense"
            speedups.append(f"{dense_ms / sparse_ms:.2g}x at M={rows}")
        layer.set_forms(forms, f"sparse against dense: {', '.join(speedups)}", dense_copy)


def _set_all(layer: SparseModule, form: str, reason: str, dense_copy: bool) -> None:
    layer.set_forms(dict.fromkeys(BUCKETS, form), reason, dense_copy)
