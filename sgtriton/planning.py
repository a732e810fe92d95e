"""In which form a served layer computes, for each bucket of M: as told, looked up, or timed."""

from __future__ import annotations

import itertools
import math
import statistics
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from sgtriton_kernels import BlockSparse, GateLayout, bsr_linear
from sgtriton_kernels.blocks import fits_kernels
from sgtriton_kernels.dense_products import dense_linear
from torch import nn

from .compact import compact
from .cost_model import expected_speedup
from .pruned import shown
from .sparse_layers import (
    BUCKETS,
    FORMS,
    SparseModule,
    blocks_conv,
    compacted_conv,
    compacted_linear,
    dense_type_of,
    possible_forms,
)
from .stored import StoredWeight
from .timing import undisturbed_ms

# M that stand for a bucket: a form is worth its mean there, and nothing if it is slower at one
_ROWS = {
    "1": (1,), "2-8": (2, 8), "9-32": (16, 32), "33-128": (64, 128), "129-4096": (512,),
    ">4096": (),  # as the bucket below, for want of time
}  # fmt: skip
# an image has many output positions
_ROWS_OF_CONV = _ROWS | {"129-4096": (512, 4096), ">4096": (16384,)}
_MOST_WORK = 2e9  # multiply-adds of a product with the dense weight, above which none is timed
_MARGIN = 0.9  # a form must beat dense by more than a timing's noise
# One that reads a large copy in fp32 of 16-bit weights, by more: timed alone, the copy may lie in
# a cache that it does not fit into beside the rest of a model (measured with 16 MiB: 1.2 to 1.7
# alone, 0.73 to 1.1 beside others; with 4 MiB 1.1 in either).
_MARGIN_WIDE, _LARGE = 0.5, 8 << 20
_SECONDS = 0.03  # that a first look at the forms takes, at each M
_CLOSE, _LONGER = 1.15, 0.12  # those so near to the fastest are timed again, for so many seconds

Call = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Plan:
    """In which form a layer computes, and why; see :class:`SparseModule`."""

    forms: dict[str, str]
    reason: str
    expected: dict[str, float] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)

    def apply_to(self, layer: SparseModule, dense_copy: bool) -> None:
        """Have a layer compute so."""
        layer.set_forms(self.forms, self.reason, dense_copy, self.expected, self.measured)


@torch.no_grad()
def plan_forms(
    layer: nn.Module,
    stored: StoredWeight,
    form: str = "auto",
    serve_block: tuple[int, int] | None = None,
    dense_copy: bool = True,
    trainable: bool = False,
) -> Plan:
    """The form for each bucket of M, and why: as told, by the cost model, or the fastest here.

    Args:
        layer: dense, gated or sparse; only read.
        stored: its open weights, on the device and in the dtype in which they will be served.
        form: ``"auto"`` | ``"lookup"`` | one of ``FORMS``.
        serve_block: of the merged form.
        dense_copy: whether the dense form keeps one.
        trainable: whether the layer will be trained.
    """
    dense_type = dense_type_of(layer)
    assert dense_type is not None
    possible = possible_forms(dense_type, stored.layout, serve_block, trainable)
    if form in FORMS:
        return _fixed(form, stored, possible)
    weight = stored.to_dense()
    shares: dict[str, float] = {"dense": 1.0}
    calls: dict[str, Call] = {}
    if "dense_left" in possible and dense_copy and weight.device.type == "cpu":
        shares["dense_left"] = 1.0
        calls["dense_left"] = _dense_left_call(layer, weight)
    if trainable:  # its values are a leaf, as in training
        stored = stored.with_values(stored.tensors()["values"].detach().requires_grad_())
    if "compacted" in possible:
        parts = compact(weight)
        if parts[1] is not None or parts[2] is not None:
            shares["compacted"] = parts[0].numel() / weight.numel()
            calls["compacted"] = _compacted_call(layer, parts)
    if "sparse" in possible:
        assert stored.matrix is not None
        shares["sparse"] = stored.matrix.density
        calls["sparse"] = _block_call(layer, stored.matrix)
    if "merged" in possible:
        assert serve_block is not None
        merged = stored.merged(serve_block).matrix
        assert merged is not None
        shares["merged"] = merged.density
        calls["merged"] = _block_call(layer, merged)
    _drop_unserved(calls, shares, stored.layout.block, weight.device)
    others = {name: calls[name] for name in FORMS if name in calls}
    if not others:
        return Plan(dict.fromkeys(BUCKETS, "dense"), _WHY_DENSE)
    if form == "lookup":
        return _by_lookup(stored.layout, shares, serve_block, weight)
    kept = dense_copy and not trainable
    dense = _dense_call(layer, weight) if kept else _filled_call(layer, stored)
    calls = {"dense": dense, **others}
    if trainable:
        values = stored.tensors()["values"]
        calls = {name: _with_backward(call, values) for name, call in calls.items()}
    return _by_timing(layer, stored.layout, calls, shares, serve_block, weight)


def _drop_unserved(
    calls: dict[str, Call], shares: dict[str, float], block: tuple[int, int], device: torch.device
) -> None:
    """On cards: the kernels do not serve every block of gates, those it is merged into they do."""
    if device.type != "cpu" and "merged" in calls and not fits_kernels(block):
        del calls["sparse"], shares["sparse"]


_WHY_DENSE = "per-weight gates are computed dense"


def _fixed(form: str, stored: StoredWeight, possible: tuple[str, ...]) -> Plan:
    """One form for all buckets, or the nearest that the layer has."""
    layout, reason = stored.layout, "as asked for"
    if form == "compacted" and form in possible:
        _, cols, rows = compact(stored.to_dense())
        if cols is None and rows is None:
            form, reason = "dense", "no row or column is dead"
    elif form == "compacted":
        form, reason = "dense", "grouped convolutions are not compacted"
    elif form == "merged" and form not in possible and "sparse" in possible:
        if fits_kernels(layout.block):
            form, reason = "sparse", f"blocks of {shown(layout.block)} are served as they are"
        else:
            reason = f"no served block is made of whole blocks of {shown(layout.block)}"
            form = "dense"
    elif form == "dense_left" and form not in possible:
        form, reason = "dense", "dense_left is for linear layers"
    elif form not in possible:
        form, reason = "dense", _WHY_DENSE
    return Plan(dict.fromkeys(BUCKETS, form), reason)


def _by_lookup(
    layout: GateLayout,
    shares: Mapping[str, float],
    serve_block: tuple[int, int] | None,
    weight: torch.Tensor,
) -> Plan:
    forms, expected = {}, {}
    most = {bucket: rows[-1] if rows else 8192 for bucket, rows in _ROWS.items()}
    for bucket, rows in most.items():
        forms[bucket], expected[bucket] = lookup_form(
            layout, shares, rows, weight.dtype, weight.device, serve_block
        )
    at = ", ".join(map(str, most.values()))
    return Plan(forms, f"by the cost model, at M={at}", expected)


def lookup_form(
    layout: GateLayout,
    density: Mapping[str, float],
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
    serve_block: tuple[int, int] | None = None,
) -> tuple[str, float]:
    """The form that the cost model expects to be fastest; nothing is timed.

    Args:
        layout: how the gates lie over the weight.
        density: form -> share of the dense weights that it reads, for each form that the layer has.
        rows: of x.
        dtype, device: of the weight.
        serve_block: of the merged form.

    Returns:
        The form, and the speed-up over dense that is expected of it.
    """
    speedups = {
        form: expected_speedup(
            form,
            serve_block if form == "merged" and serve_block else layout.block,
            share,
            layout.weight_shape,
            rows,
            dtype,
            device,
        )
        for form, share in density.items()
    }
    best = _fastest(speedups, dtype, layout.weight_shape)
    return ("dense", 1.0) if best is None else (best, speedups[best])


def _right_ones(calls: Mapping[str, Call], x: torch.Tensor) -> dict[str, Call]:
    """The calls without those that give other results than dense, of which a warning is given."""
    outs = {form: call(x) for form, call in calls.items()}
    dense = outs["dense"]
    bound = (2e-2 if dense.dtype.itemsize < 4 else 1e-3) * dense.abs().max()
    right = dict(calls)
    for form, out in outs.items():
        if dense.isfinite().all() and not (out - dense).abs().max() <= bound:
            warnings.warn(
                f"the {form} form gives other results than the dense one for an input of shape "
                f"{list(x.shape)}: it is not taken; please report it",
                stacklevel=2,
            )
            del right[form]
    return right


def _by_timing(
    layer: nn.Module,
    layout: GateLayout,
    calls: Mapping[str, Call],
    shares: Mapping[str, float],
    serve_block: tuple[int, int] | None,
    weight: torch.Tensor,
) -> Plan:
    forms, expected, measured, beside = {}, {}, {}, {}
    random = torch.Generator(weight.device).manual_seed(0)  # the user's generator stays
    table = _ROWS if weight.dim() == 2 else _ROWS_OF_CONV
    inputs = {
        bucket: [_example_input(layer, m, weight, random) for m in rows if _is_quick(m, weight)]
        for bucket, rows in table.items()
    }
    for x in itertools.chain.from_iterable(inputs.values()):
        calls = _right_ones(calls, x)
    if len(calls) == 1:
        return Plan(dict.fromkeys(BUCKETS, "dense"), "the other forms give other results")
    for bucket, xs in inputs.items():
        if not xs:
            forms[bucket] = [*forms.values()][-1]
            continue
        speedups: dict[str, list[float]] = {form: [] for form in calls}
        for x in xs:
            times = _times(calls, x)
            for form, ms in times.items():
                speedups[form].append(times["dense"] / ms)
        worth = {form: _worth(found) for form, found in speedups.items() if form != "dense"}
        other = _fastest(worth, weight.dtype, layout.weight_shape)
        forms[bucket] = other or "dense"
        if other is None:  # how near the sparse ones came is what one wants to know
            sparse = [form for form in worth if form != "dense_left"]
            other = max(sparse or worth, key=lambda form: worth[form])
        beside[bucket], measured[bucket] = other, worth[other]
        block = serve_block if other == "merged" and serve_block else layout.block
        expected[bucket] = expected_speedup(
            other, block, shares[other], layout.weight_shape, table[bucket][-1],
            weight.dtype, weight.device,
        )  # fmt: skip
    return Plan(forms, _speedups_in_words(beside, measured), expected, measured)


def _fastest(
    speedups: Mapping[str, float], dtype: torch.dtype, weight_shape: tuple[int, ...]
) -> str | None:
    """The form that is fastest of those that beat dense by more than their margin."""
    has_large_copy = dtype.itemsize < 4 and 4 * math.prod(weight_shape) > _LARGE
    margins = {"dense_left": _MARGIN_WIDE} if has_large_copy else {}
    surely = {form: margins.get(form, _MARGIN) * speedups[form] for form in speedups}
    best = max(surely, key=lambda form: surely[form])
    return best if surely[best] > 1 else None


def _is_quick(rows: int, weight: torch.Tensor) -> bool:
    """Whether a product of so many rows is short enough to be timed; of up to 4096 it always is."""
    return rows <= BUCKETS["129-4096"] or rows * weight.numel() <= _MOST_WORK


def _worth(speedups: list[float]) -> float:
    """The mean speed-up of a form in a bucket, or the least where that is below 1."""
    if len(speedups) == 1 or min(speedups) < 1:
        return min(speedups)
    return statistics.geometric_mean(speedups)


def _times(calls: Mapping[str, Call], x: torch.Tensor) -> dict[str, float]:
    """Milliseconds of each form; those that are near to the fastest are looked at twice."""
    times = _timed(calls, x, _SECONDS)
    fastest = min(times.values())
    close = {form for form, ms in times.items() if ms <= _CLOSE * fastest}
    if len(close) < 2:
        return times
    again = {form: call for form, call in calls.items() if form in close or form == "dense"}
    return times | _timed(again, x, _LONGER)


def _timed(calls: Mapping[str, Call], x: torch.Tensor, seconds: float) -> dict[str, float]:
    candidates = [lambda call=call: call(x) for call in calls.values()]
    return dict(zip(calls, undisturbed_ms(candidates, x.device, seconds), strict=True))


def _speedups_in_words(beside: Mapping[str, str], measured: Mapping[str, float]) -> str:
    """``sparse against dense: 0.5x at M 1, 0.9x at M 2-8``, for each form that came in question."""
    parts = []
    for form in dict.fromkeys(beside.values()):
        said = [
            f"{measured[bucket]:.2g}x at M {bucket}"
            for bucket, name in beside.items()
            if name == form
        ]
        parts.append(f"{form} against dense: {', '.join(said)}")
    return "; ".join(parts)


def _example_input(
    layer: nn.Module, rows: int, weight: torch.Tensor, random: torch.Generator
) -> torch.Tensor:
    """An input of so many rows: of a convolution, about so many output positions."""
    shape = [rows, weight.shape[1]]
    if weight.dim() > 2:
        side = max(1, round(rows ** (1 / (weight.dim() - 2))))
        pads = layer.padding if isinstance(layer.padding, tuple) else None  # pyright: ignore
        shape = [1, layer.in_channels]  # pyright: ignore[reportAttributeAccessIssue]
        for i, kernel in enumerate(weight.shape[2:]):
            reach = layer.dilation[i] * (kernel - 1)  # pyright: ignore
            pad = pads[i] if pads else reach if layer.padding == "same" else 0
            size = (side - 1) * layer.stride[i] + reach + 1 - 2 * pad  # pyright: ignore
            shape.append(max(size, pad + 1))  # padding by reflection needs as much
    x = torch.randn(shape, device=weight.device, generator=random)
    return x.to(weight.dtype)


def _bias_like(layer: nn.Module, weight: torch.Tensor) -> torch.Tensor | None:
    bias = layer.bias  # pyright: ignore[reportAttributeAccessIssue]
    # they may differ in a model for autocast
    return None if bias is None else bias.detach().to(weight.dtype)  # pyright: ignore


def _dense_call(layer: nn.Module, weight: torch.Tensor) -> Call:
    bias = _bias_like(layer, weight)
    if weight.dim() == 2:
        return lambda x: nn.functional.linear(x, weight, bias)
    return lambda x: layer._conv_forward(x, weight, bias)  # pyright: ignore


def _dense_left_call(layer: nn.Module, weight: torch.Tensor) -> Call:
    bias = _bias_like(layer, weight)
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return lambda x: dense_linear(x, wide, bias)


def _filled_call(layer: nn.Module, stored: StoredWeight) -> Call:
    return lambda x: _dense_call(layer, stored.to_dense())(x)


def _block_call(layer: nn.Module, matrix: BlockSparse) -> Call:
    bias = _bias_like(layer, matrix.values)
    if dense_type_of(layer) is nn.Linear:
        return lambda x: bsr_linear(x, matrix, bias)
    return lambda x: blocks_conv(layer, x, matrix, bias)


def _compacted_call(layer: nn.Module, parts) -> Call:
    bias = _bias_like(layer, parts[0])
    if parts[0].dim() == 2:
        return lambda x: compacted_linear(x, bias, *parts)
    return lambda x: compacted_conv(layer, x, bias, *parts)


def _with_backward(call: Call, values: torch.Tensor) -> Call:
    def step(x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            out = call(x)
            torch.autograd.grad(out, (x, values), torch.ones_like(out))
        return out.detach()

    return step
