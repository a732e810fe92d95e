"""Served layers: they hold only the open blocks of their weight, and compute in the faster form.

A sparse layer *is* the layer it was made from: same module object, bias and hooks; its class is
exchanged, and buffers take the place of ``weight`` and ``gate``. Of a trainable one the stored
values are a Parameter, and everything is computed from them anew at each call.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from sgtriton_kernels import (
    BlockSparse,
    GateLayout,
    bsr_conv1d,
    bsr_conv2d,
    bsr_linear,
    gate_layout,
)
from sgtriton_kernels.blocks import Block
from sgtriton_kernels.dense_products import dense_linear
from torch import nn

from .compact import compact, spread
from .layers import GATED_TYPES, GatedModule, ungate_layer
from .stored import StoredWeight

# Buckets of M, the rows of x in all, by their upper ends; a layer has a form for each.
BUCKETS: dict[str, float] = {
    "1": 1, "2-8": 8, "9-32": 32, "33-128": 128, "129-4096": 4096, ">4096": float("inf"),
}  # fmt: skip

# the weight with zeros filled in; the same as the left operand of a product, for few rows on a CPU;
# the product over stored blocks; over blocks merged into larger ones; the dense product without
# dead rows and columns
FORMS = ("dense", "dense_left", "sparse", "merged", "compacted")

NO_GATES = "none"  # gate kind of a layer that was pruned elsewhere


class SparseModule(nn.Module):
    """What sparse layers share: the stored weight, its state, and the forms.

    In the state dict: ``values, crow, col`` of the open blocks, or ``values, bits`` where each
    weight had its gate; the transposed index and what a form keeps beside are rebuilt.

    Attributes:
        weight_shape: of the dense weight.
        gate_block: ``(bn, bk)`` that one gate covered.
        gate_kind: of the gates that chose the pattern; ``"none"`` if it was pruned elsewhere.
        serve_block: block of the merged form; ``None`` if there is none.
        forms: bucket of M -> one of ``FORMS``.
        reason: why these forms, in words.
        expected, measured: bucket of M -> speed-up over the dense form of the fastest other one, by
            the cost model and on this machine; empty where none was asked for.
        trainable: whether ``values`` is a Parameter.
        dense_weight: dense copy, if a form needs it and it was not forbidden.
        wide_weight: dense copy in fp32 of 16-bit values, likewise, for ``"dense_left"`` on a CPU.
    """

    values: torch.Tensor
    bias: nn.Parameter | None
    weight_shape: tuple[int, ...]
    gate_block: Block
    gate_kind: str
    serve_block: tuple[int, int] | None = None
    forms: dict[str, str]
    reason: str
    expected: dict[str, float]
    measured: dict[str, float]
    trainable: bool = False
    dense_weight: torch.Tensor | None
    wide_weight: torch.Tensor | None

    dense_type: type[nn.Module]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            f"{type(self).__name__} is not made by hand: sgtriton.sparsify makes it of a gated "
            "or pruned layer, sgtriton.load of a file"
        )

    @property
    def layout(self) -> GateLayout:
        """How the gates lay over the weight."""
        return gate_layout(self.weight_shape, self.gate_block, getattr(self, "groups", 1))

    @property
    def matrix(self) -> BlockSparse:
        """The open blocks; only for layers that are stored in blocks."""
        return self._matrix_of("sparse")

    def _matrix_of(self, form: str) -> BlockSparse:
        """What the forms ``"sparse"`` and ``"merged"`` multiply with."""
        if torch.compiler.is_compiling():
            return self._wrap(form)
        matrix = self._matrices.get(form)
        # whoever exchanged the values (functional_call, a load that assigns) did not say so
        if matrix is None or matrix.values is not self._held(_PREFIX[form] + "values"):
            matrix = self._matrices[form] = self._wrap(form)
        return matrix

    def _wrap(self, form: str) -> BlockSparse:
        prefix = _PREFIX[form]
        values, crow, col, *derived = (self._held(prefix + name) for name in _MATRIX)
        return BlockSparse._from_validated(values, crow, col, self._shapes[form], *derived)

    def _held(self, name: str) -> torch.Tensor:
        """A buffer, or the Parameter of a trainable layer; faster than an attribute."""
        tensor = self._parameters.get(name) if self.trainable else None
        tensor = self._buffers.get(name) if tensor is None else tensor
        # replicas, masks and flattened parameters are plain attributes
        return getattr(self, name) if tensor is None else tensor

    def _compacted(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        held = self._buffers
        return held["compact_weight"], held["compact_cols"], held["compact_rows"]  # pyright: ignore

    @property
    def stored(self) -> StoredWeight:
        """The open part of the weight."""
        if self.layout.per_weight:
            return StoredWeight(self.layout, bits=self._buffers["bits"], kept=self.values)
        return StoredWeight(self.layout, self.matrix)

    def full_weight(self) -> torch.Tensor:
        """The dense weight, zeros where it is closed: ``weight_shape``, dtype of ``values``."""
        dense = self.dense_weight
        return self.stored.to_dense() if dense is None or self._exchanged() else dense

    def _exchanged(self) -> bool:
        """Whether other values are held (``functional_call``) than those that forms have copied."""
        return (
            self._buffers.get("values") is not self._matrices.get(_COPIED)
            and not torch.compiler.is_exporting()  # which holds stand-ins for all tensors
        )

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """A plain ``Linear``, ``Conv1d`` or ``Conv2d`` with the closed weights filled in as 0.

        Weight and bias are copies, on the device and in the dtypes of this layer. Hooks stay here.
        """
        layer, bias = self._empty_dense(), self.bias
        layer.weight = nn.Parameter(self.full_weight().detach().clone())
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
        return layer.train(self.training)

    def _check_width(self, input: torch.Tensor, dim: int, width: int) -> None:
        """Raise where gathering columns or broadcasting would take an input of another width."""
        if input.dim() < -dim or input.shape[dim] != width:
            shape = f"[..., {width}{', *' * (-1 - dim)}]"
            raise ValueError(f"the input must be {shape} for {self!r}, got {list(input.shape)}")

    def _empty_dense(self) -> nn.Module:
        """The dense layer of this one's sizes, on the meta device: nothing is drawn for it."""
        raise NotImplementedError

    def store(self, stored: StoredWeight) -> None:
        """Hold ``stored``, in place of what was held before; :meth:`prepare` has to follow."""
        self.weight_shape = stored.layout.weight_shape
        parameter = self._parameters.pop("values", None)
        _remove_buffers(self)
        matrix = stored.matrix
        self._matrices: dict[str, Any] = {}  # form -> its matrix, and the values in the copies
        self._shapes = {} if matrix is None else {"sparse": matrix.shape}
        values = stored.kept if matrix is None else matrix.values
        assert values is not None
        if self.trainable:
            # an optimizer may hold the Parameter, so that it stays the same object
            if parameter is None:
                parameter = nn.Parameter(values)
            elif not torch._has_compatible_shallow_copy_type(parameter, values):  # pyright: ignore
                # it was on meta
                parameter = nn.Parameter(values, parameter.requires_grad)
            if parameter.shape != values.shape:
                parameter.grad = None
            parameter.data = values
            self.register_parameter("values", parameter)
        else:
            self.register_buffer("values", values)
        if matrix is None:
            self.register_buffer("bits", stored.bits)
        else:
            for name in ("crow", "col"):
                self.register_buffer(name, getattr(matrix, name))
            for name in _DERIVED:
                self.register_buffer(name, getattr(matrix, name), persistent=False)
        self.register_buffer("dense_weight", None, persistent=False)
        self.register_buffer("wide_weight", None, persistent=False)

    @property
    def possible_forms(self) -> tuple[str, ...]:
        """The forms that this layer has."""
        return possible_forms(self.dense_type, self.layout, self.serve_block, self.trainable)

    def set_forms(
        self,
        forms: dict[str, str],
        reason: str,
        dense_copy: bool,
        expected: dict[str, float] | None = None,
        measured: dict[str, float] | None = None,
    ) -> None:
        """Compute in these forms from now on.

        Raises:
            ValueError: a bucket is missing, or a form that the layer does not have.
        """
        allowed = self.possible_forms
        if set(forms) != set(BUCKETS) or not set(forms.values()) <= set(allowed):
            raise ValueError(
                f"forms must give one of {allowed} for each of {list(BUCKETS)}, got {forms}"
            )
        self.forms = {bucket: forms[bucket] for bucket in BUCKETS}  # in their order
        self.reason, self._dense_copy = reason, dense_copy
        expected, measured = expected or {}, measured or {}
        self.expected = {bucket: expected[bucket] for bucket in BUCKETS if bucket in expected}
        self.measured = {bucket: measured[bucket] for bucket in BUCKETS if bucket in measured}
        # a look-up must cost little beside a small product: none, or where the form changes only
        self._one_form = next(iter(forms.values())) if len(set(forms.values())) == 1 else None
        steps = list(zip(BUCKETS.values(), (forms[bucket] for bucket in BUCKETS), strict=True))
        self._steps = [
            step
            for step, after in zip(steps, [*steps[1:], (None, None)], strict=True)
            if step[1] != after[1]
        ]
        self.prepare()

    @torch.inference_mode(False)
    @torch.no_grad()
    def prepare(self) -> None:
        """Build what the forms keep beside the stored weight."""
        for name in (*_MERGED, *_COMPACT):
            self._buffers.pop(name, None)
        self._matrices.pop("merged", None)
        self._copy_dense()
        self._matrices[_COPIED] = self._buffers.get("values")
        forms = set(self.forms.values())
        if "merged" in forms:
            assert self.serve_block is not None
            matrix = self.stored.merged(self.serve_block).matrix
            assert matrix is not None
            self._shapes["merged"] = matrix.shape
            for name, own in zip(_MATRIX, _MERGED, strict=True):
                self.register_buffer(own, getattr(matrix, name), persistent=False)
        if "compacted" in forms:
            for name, part in zip(_COMPACT, compact(self.stored.to_dense()), strict=True):
                self.register_buffer(name, part, persistent=False)

    def _copy_dense(self) -> None:
        forms, values = set(self.forms.values()), self.values
        self.dense_weight = self.wide_weight = None
        if not self._dense_copy or self.trainable or not forms & {"dense", "dense_left"}:
            return
        weight = self.stored.to_dense()
        wide = "dense_left" in forms and values.dtype.itemsize < 4 and values.device.type == "cpu"
        if wide:
            self.wide_weight = weight.float()
        if "dense" in forms or not wide:
            self.dense_weight = weight

    @property
    def bytes_beside(self) -> int:
        """Bytes of weights that forms keep beside the stored one."""
        names = ("dense_weight", "wide_weight", "merged_values", "compact_weight")
        return sum(t.nbytes for name in names if (t := self._buffers.get(name)) is not None)

    def form_of(self, rows: int) -> str:
        """The form for ``rows`` rows of x in all; exported for any number, that of the most."""
        if torch.compiler.is_exporting():
            from torch.fx.experimental.symbolic_shapes import statically_known_true  # takes 0.3 s

            for end, form in self._steps[:-1]:
                if statically_known_true(rows <= end):  # a plain comparison would fix the bucket
                    return form
            return self._steps[-1][1]
        for end, form in self._steps:
            if rows <= end:
                return form
        raise AssertionError("the last bucket has no end")

    @property
    def form(self) -> str:
        """The forms in words: one, or which buckets of M have which."""
        kinds = dict.fromkeys(self.forms.values())
        if len(kinds) == 1:
            return next(iter(kinds))
        parts = [
            f"{kind} at M {', '.join(b for b, form in self.forms.items() if form == kind)}"
            for kind in kinds
            if kind != "dense"
        ]
        return "; ".join([*parts, "else dense"] if "dense" in kinds else parts)

    def check_state(
        self, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any]
    ) -> None:
        """Raise ``ValueError`` where the layer's part of a state dict is no valid stored weight."""
        stored = self._read_state(state_dict, prefix)
        if stored is None and f"{prefix}weight" in state_dict:
            raise ValueError(
                f"{prefix[:-1] or 'the model'}: the state is that of a dense or gated layer, the "
                "layer is sparse; load it before sgtriton.sparsify"
            )

    def _read_state(self, state_dict: dict[str, Any], prefix: str) -> StoredWeight | None:
        names = ("values", "bits") if self.layout.per_weight else ("values", "crow", "col")
        found = {n: state_dict[prefix + n] for n in names if prefix + n in state_dict}
        if not found:
            return None  # PyTorch reports what is missing
        try:
            return StoredWeight.from_tensors(found, self.layout)
        except ValueError as error:
            raise ValueError(f"{prefix[:-1] or 'the model'}: {error}") from None

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self.stored.tensors().items():
            destination[prefix + name] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        # what is made under inference_mode could not be saved for a backward pass later
        with torch.inference_mode(False), torch.no_grad():
            stored = self._read_state(state_dict, prefix)
            if stored is not None:
                # what is assigned keeps the state's device and dtype, as the bias does
                assigned = local_metadata.get("assign_to_params_buffers", False)
                self.store(stored if assigned else stored_like(stored, self.values))
                for name in _STATE:  # what PyTorch copies next is what is held
                    if name in self._buffers or name in self._parameters:
                        state_dict[prefix + name] = self._held(name)
                self.prepare()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def _apply(self, fn, recurse=True):
        before = {n: b for n in _INDEX if (b := self._buffers.get(n)) is not None}
        kind = self.values.dtype, self.values.device.type
        if self._exchanged():
            self.prepare()
        super()._apply(fn, recurse)
        kept = kind == (self.values.dtype, self.values.device.type)
        if not all(_same_or_meta(old, self._buffers[name]) for name, old in before.items()):
            # to_empty(): what the memory held is no index, and an index is an address to a kernel
            weight = self.values.new_zeros(self.weight_shape)
            nothing = weight.new_zeros(self.layout.gate_shape, dtype=torch.bool)
            empty = StoredWeight.from_gated(weight, nothing, self.layout)
            self.store(stored_like(empty, self.values))
            self.prepare()
        elif "dense_left" in self.forms.values() and self.values.device.type != "meta":
            wide = self._buffers["wide_weight"]
            if not kept or (wide is not None and wide.dtype != torch.float32):  # it was cast too
                self._copy_dense()
        if any(self._buffers.get(name) is not old for name, old in before.items()):
            self._matrices.clear()  # else a captured graph may read what was kept of the index
        self._matrices[_COPIED] = self._buffers.get("values")
        return self

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "_matrices"}

    def __setstate__(self, state):
        super().__setstate__(state)
        # a pickle is a door like any other: the index is checked, and what follows from it rebuilt
        self._matrices = {}
        self.store(StoredWeight.from_tensors(self.stored.tensors(), self.layout))
        self.prepare()

    def extra_repr(self) -> str:
        block = "x".join("full" if side is None else str(side) for side in self.gate_block)
        trains = ", trainable" if self.trainable else ""
        return f"{super().extra_repr()}, block={block}, form={self.form}{trains}"


class BlockSparseLinear(SparseModule, nn.Linear):
    """``x @ W^T + bias`` with only the open blocks of ``W`` stored.

    x ``[..., K]`` -> ``[..., N]``. Made by ``sparsify`` or ``load``.
    """

    dense_type = nn.Linear

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        form = self._one_form
        if form is None:
            form = self.form_of(input.numel() // self.in_features)
        # tensors are taken where a module keeps them: by attribute each would cost a microsecond
        held = self._parameters
        bias = held["bias"] if "bias" in held else self.bias  # noqa: SIM401 (it would look it up)
        if form != "sparse" and self._exchanged():
            return nn.functional.linear(input, self.full_weight(), bias)
        if form == "dense":
            weight = self._buffers["dense_weight"]
            weight = self.full_weight() if weight is None else weight
            return nn.functional.linear(input, weight, bias)
        if form == "dense_left":
            self._check_width(input, -1, self.in_features)
            return self._dense_left(input, bias)
        if form == "compacted":
            self._check_width(input, -1, self.in_features)
            return compacted_linear(input, bias, *self._compacted())
        return bsr_linear(input, self._matrix_of(form), bias)

    def _dense_left(self, input: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        weight, dtype = self._buffers["wide_weight"], self._buffers["values"].dtype  # pyright: ignore
        weight = self.full_weight() if weight is None else weight
        kind = input.device.type
        if kind != "cpu" or torch.compiler.is_compiling() or torch.is_autocast_enabled(kind):
            return nn.functional.linear(input, weight.to(dtype), bias)
        if input.dtype != dtype:
            raise ValueError(
                f"{self!r}: the input is {input.dtype}, the weight {dtype}; cast one of them, or "
                "use torch.autocast"
            )
        if weight.dtype.itemsize < 4:  # no copy was allowed
            weight = weight.float()
        return dense_linear(input, weight, bias)

    def _empty_dense(self) -> nn.Module:
        return nn.Linear(self.in_features, self.out_features, self.bias is not None, "meta")


class _SparseConv(SparseModule):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        form = self._one_form
        if form is None:
            form = self.form_of(conv_rows(self, input))
        # a last block of channels may reach beyond the weight, so that blocks fit other widths too
        self._check_width(input, 1 - len(self.weight_shape), self.in_channels)  # pyright: ignore
        if form != "sparse" and self._exchanged():
            form = "dense"
        if form in _PREFIX:
            return blocks_conv(self, input, self._matrix_of(form), self.bias)
        if form == "compacted":
            return compacted_conv(self, input, self.bias, *self._compacted())
        return self._conv_forward(input, self.full_weight(), self.bias)  # pyright: ignore

    def _empty_dense(self) -> nn.Module:
        return self.dense_type(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias is not None,
            self.padding_mode,
            "meta",
        )


class BlockSparseConv1d(_SparseConv, nn.Conv1d):
    """``torch.nn.Conv1d`` with only the open blocks of its weight stored."""

    dense_type = nn.Conv1d


class BlockSparseConv2d(_SparseConv, nn.Conv2d):
    """``torch.nn.Conv2d`` with only the open blocks of its weight stored."""

    dense_type = nn.Conv2d


SPARSE_TYPES: dict[type[nn.Module], type[SparseModule]] = {
    sparse.dense_type: sparse
    for sparse in (BlockSparseLinear, BlockSparseConv1d, BlockSparseConv2d)
}

_DERIVED = ("ccol", "row", "perm", "row_order")
_MATRIX = ("values", "crow", "col", *_DERIVED)
_COPIED = "values"
_PREFIX = {"sparse": "", "merged": "merged_"}
_MERGED = tuple(_PREFIX["merged"] + name for name in _MATRIX)
_COMPACT = ("compact_weight", "compact_cols", "compact_rows")
_STATE = ("values", "crow", "col", "bits")
_INDEX = ("crow", "col", "bits", *_DERIVED, *_MERGED[1:], *_COMPACT[1:])

_ATTRIBUTES = (
    "weight_shape", "gate_block", "gate_kind", "serve_block", "trainable",
    "forms", "reason", "expected", "measured", "_dense_copy", "_steps", "_one_form",
    "_matrices", "_shapes",
)  # fmt: skip
_OWN_BUFFERS = (*_MATRIX, "bits", *_MERGED, *_COMPACT, "dense_weight", "wide_weight")


def _remove_buffers(layer: SparseModule) -> None:
    """Drop what :meth:`SparseModule.store` registered; the user's own buffers stay."""
    for name in _OWN_BUFFERS:
        layer._buffers.pop(name, None)
    layer._non_persistent_buffers_set.difference_update(_OWN_BUFFERS)


def _same_or_meta(old: torch.Tensor, new: torch.Tensor | None) -> bool:
    """Whether a move kept an index; nothing is read of what has no memory."""
    if new is None or new.device.type == "meta":
        return True
    return old.device.type != "meta" and torch.equal(old.cpu(), new.cpu())


def possible_forms(
    dense_type: type[nn.Module],
    layout: GateLayout,
    serve_block: tuple[int, int] | None = None,
    trainable: bool = False,
) -> tuple[str, ...]:
    """The forms of a layer of ``dense_type`` that is stored as ``layout`` says."""
    has = {
        "dense": True,
        "dense_left": dense_type is nn.Linear and not trainable,
        "sparse": not layout.per_weight,
        "merged": serve_block is not None and not trainable,
        "compacted": layout.groups == 1 and not trainable,
    }
    return tuple(form for form in FORMS if has[form])


def sparsify_layer(
    layer: nn.Module,
    stored: StoredWeight,
    gate_block: Block,
    gate_kind: str,
    serve_block: tuple[int, int] | None = None,
    trainable: bool = False,
) -> SparseModule:
    """Turn a layer into the sparse layer that holds ``stored``, in place; forms have to follow."""
    if isinstance(layer, GatedModule):
        ungate_layer(layer, fold=False)
    if not isinstance(layer, SparseModule):
        del layer._parameters["weight"]
        layer.__class__ = SPARSE_TYPES[type(layer)]  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(layer, SparseModule)
    layer.gate_block, layer.gate_kind = gate_block, gate_kind
    layer.serve_block, layer.trainable = serve_block, trainable
    layer.store(stored)
    return layer


def densify_layer(layer: nn.Module) -> None:
    """Turn a gated or sparse layer into the dense layer of its type, in place."""
    if isinstance(layer, GatedModule):
        ungate_layer(layer, fold=True)
    elif isinstance(layer, SparseModule):
        trains = layer.values.requires_grad if layer.trainable else True
        weight = nn.Parameter(layer.full_weight().detach(), trains)
        # the stored values go when nothing can fail any more
        layer.register_parameter("weight", weight)
        if "bias" in layer._parameters:  # after the weight, as in other layers; a mask has moved it
            layer._parameters["bias"] = layer._parameters.pop("bias")
        layer._parameters.pop("values", None)
        _remove_buffers(layer)
        for name in _ATTRIBUTES:
            layer.__dict__.pop(name, None)
        layer.__class__ = layer.dense_type  # pyright: ignore[reportAttributeAccessIssue]


def compacted_linear(
    input: torch.Tensor,
    bias: torch.Tensor | None,
    weight: torch.Tensor,
    cols: torch.Tensor | None,
    rows: torch.Tensor | None,
) -> torch.Tensor:
    """``torch.nn.functional.linear`` by a weight of which :func:`compact` dropped parts."""
    if cols is not None:
        input = input.index_select(-1, cols)
    if rows is None:
        return nn.functional.linear(input, weight, bias)
    return spread(nn.functional.linear(input, weight), rows, bias, -1)


def blocks_conv(
    layer: nn.Module, input: torch.Tensor, matrix: BlockSparse, bias: torch.Tensor | None
) -> torch.Tensor:
    """The convolution of ``layer`` by the blocks of its weight."""
    input, padding = padded_input(layer, input)
    conv = bsr_conv1d if isinstance(layer, nn.Conv1d) else bsr_conv2d
    return conv(
        input, matrix, bias, layer.stride, padding, layer.dilation, layer.groups,  # pyright: ignore
        out_channels=layer.out_channels, kernel_size=layer.kernel_size,  # pyright: ignore
    )  # fmt: skip


def padded_input(layer: nn.Module, input: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """What a convolution takes in place of ``input``, and the zeros that it adds itself."""
    if layer.padding_mode == "zeros":
        return input, layer.padding
    sides = layer._reversed_padding_repeated_twice  # pyright: ignore
    return nn.functional.pad(input, sides, mode=layer.padding_mode), 0  # pyright: ignore


def compacted_conv(
    layer: nn.Module,
    input: torch.Tensor,
    bias: torch.Tensor | None,
    weight: torch.Tensor,
    cols: torch.Tensor | None,
    rows: torch.Tensor | None,
) -> torch.Tensor:
    """``layer``'s convolution by a weight of which :func:`compact` dropped parts."""
    channels = 1 - weight.dim()  # counted from the end, as the batch may be missing
    if cols is not None:
        input = input.index_select(channels, cols)
    out = layer._conv_forward(input, weight, bias if rows is None else None)  # pyright: ignore
    return out if rows is None else spread(out, rows, bias, channels)


def conv_rows(layer: nn.Module, input: torch.Tensor) -> int:
    """About how many output positions a convolution computes, which are its rows of x."""
    return input.numel() // (layer.in_channels * math.prod(layer.stride))  # pyright: ignore


def stored_like(stored: StoredWeight, like: torch.Tensor) -> StoredWeight:
    """``stored`` on the device and in the dtype of ``like``."""
    if stored.matrix is not None:
        return StoredWeight(stored.layout, stored.matrix.to(like.device, like.dtype))
    assert stored.bits is not None
    assert stored.kept is not None
    kept = stored.kept.to(like.device, like.dtype)
    return StoredWeight(stored.layout, bits=stored.bits.to(like.device), kept=kept)


def dense_type_of(layer: nn.Module) -> type[nn.Module] | None:
    """The dense type behind a dense, gated or sparse layer; ``None`` for other modules."""
    if isinstance(layer, (GatedModule, SparseModule)):
        return layer.dense_type
    return type(layer) if type(layer) in GATED_TYPES else None


def weight_shape_of(layer: nn.Module) -> tuple[int, ...]:
    """Shape of the dense weight behind a dense, gated or sparse layer."""
    if isinstance(layer, SparseModule):
        return layer.weight_shape
    return tuple(layer.weight.shape)  # pyright: ignore
