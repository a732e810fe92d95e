"""Gated model -> served model, and in which form each layer computes."""

from __future__ import annotations

import logging
import warnings

import torch
from sgtriton_kernels import bsr_linear
from torch import nn

from .control import unfinished
from .layers import GatedModule, check_numbers, named_gated_layers
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
    stores its open blocks only, times the gate where that is a number (``hard_concrete``). A gate
    is open as eval sees it: above 0.5, or a hard concrete one above 0. In which form it computes is
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
    controller = unfinished(layers.values())
    # all that can fail comes before the first layer changes
    stored = {name: stored_part(name, layer) for name, layer in layers.items()}
    plans = {name: plan_forms(stored[name], layer.bias, form) for name, layer in layers.items()}
    for name, layer in layers.items():
        sparse = sparsify_layer(layer, stored[name], layer.gate_block, layer.gate_kind)
        sparse.set_forms(*plans[name], dense_copy)
        log.info("%s: density %.4f, %s", name, stored[name].density, sparse.form)
    if controller is not None:
        now = 1 - sum(p.density * p.weights for p in stored.values()) / sum(
            p.weights for p in stored.values()
        )
        warnings.warn(
            f"the gates were not frozen yet: the model is served at sparsity {now:.4f}, the target "
            f"of its controller is {controller.target}",
            stacklevel=2,
        )
    if empty := [name for name, part in stored.items() if part.density == 0]:
        warnings.warn(
            f"all gates of {', '.join(empty)} are closed: they give their bias whatever comes in",
            stacklevel=2,
        )
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
    assert isinstance(layer, GatedModule)
    check_numbers(name, layer)
    return StoredWeight.from_gated(layer.eval_weight(), layer.open_gates(), layer.layout)


@torch.no_grad()
def plan_forms(
    stored: StoredWeight, bias: torch.Tensor | None, form: str = "auto"
) -> tuple[dict[str, str], str]:
    """The form for each bucket of M, and why: as told, or the faster one on this machine.

    Args:
        stored: the open weights, on the device and in the dtype in which they will be served.
        bias: of the layer.
        form: ``"auto"`` | ``"sparse"`` | ``"dense"``.
    """
    if stored.matrix is None or len(stored.layout.weight_shape) != 2:
        what = "convolutions" if len(stored.layout.weight_shape) > 2 else "per-weight gates"
        return dict.fromkeys(BUCKETS, "dense"), f"{what} are computed dense"
    if form != "auto":
        return dict.fromkeys(BUCKETS, form), "as asked for"
    forms, speedups = {}, []
    weight, matrix = stored.to_dense(), stored.matrix
    if bias is not None:
        bias = bias.to(weight.dtype)  # they may differ in a model for autocast
    random = torch.Generator(weight.device).manual_seed(0)  # the user's generator stays
    for bucket, rows in _ROWS.items():
        x = torch.randn(rows, weight.shape[1], device=weight.device, generator=random)
        x = x.to(weight.dtype)
        sparse_ms, dense_ms = interleaved_ms(
            [
                lambda x=x: bsr_linear(x, matrix, bias),
                lambda x=x: nn.functional.linear(x, weight, bias),
            ],
            weight.device,
            seconds=0.05,
        )
        forms[bucket] = "sparse" if sparse_ms < _MARGIN * dense_ms else "dense"
        speedups.append(f"{dense_ms / sparse_ms:.2g}x at M={rows}")
    return forms, f"sparse against dense: {', '.join(speedups)}"
