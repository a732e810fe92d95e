"""Served layers: they hold only the open blocks of their weight, and compute in the faster form.

A sparse layer *is* the gated layer it was made from: same module object, bias and hooks; its class
is exchanged, and buffers take the place of ``weight`` and ``gate``.
"""

from __future__ import annotations

from typing import Any

import torch
from sgtriton_kernels import BlockSparse, GateLayout, bsr_linear, gate_layout
from sgtriton_kernels.blocks import Block
from torch import nn

from .layers import GATED_TYPES, GatedModule, ungate_layer
from .stored import StoredWeight

# Buckets of M, the rows of x in all, by their upper ends; a layer has a form for each.
BUCKETS: dict[str, float] = {
    "1": 1, "2-8": 8, "9-32": 32, "33-128": 128, ">128": float("inf"),
}  # fmt: skip

FORMS = ("sparse", "dense")


class SparseModule(nn.Module):
    """What sparse layers share: the stored weight, its state, and the forms.

    Buffers in the state dict: ``values, crow, col`` of the open blocks, or ``values, bits`` where
    each weight had its gate; the transposed index and the dense copy are rebuilt.

    Attributes:
        weight_shape: of the dense weight.
        gate_block: ``(bn, bk)`` that one gate covered.
        gate_kind: of the gates that chose the pattern.
        forms: bucket of M -> ``"sparse"`` (product over stored blocks) | ``"dense"`` (the weight,
            zeros filled in).
        reason: why these forms, in words.
        dense_weight: dense copy, if a form needs it and it was not forbidden.
    """

    values: torch.Tensor
    bias: nn.Parameter | None
    weight_shape: tuple[int, ...]
    gate_block: Block
    gate_kind: str
    forms: dict[str, str]
    reason: str
    dense_weight: torch.Tensor | None

    dense_type: type[nn.Module]
    can_multiply_blocks = False  # whether there is a product over stored blocks

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            f"{type(self).__name__} is not made by hand: sgtriton.sparsify makes it of a gated "
            "layer, sgtriton.load of a file"
        )

    @property
    def layout(self) -> GateLayout:
        """How the gates lay over the weight."""
        return gate_layout(self.weight_shape, self.gate_block, getattr(self, "groups", 1))

    @property
    def matrix(self) -> BlockSparse:
        """The open blocks; only for layers that are stored in blocks."""
        return BlockSparse._from_validated(
            self.values,
            self.crow,  # pyright: ignore[reportArgumentType]
            self.col,  # pyright: ignore[reportArgumentType]
            self._matrix_shape,
            *(self._buffers[name] for name in _DERIVED),  # pyright: ignore[reportArgumentType]
        )

    @property
    def stored(self) -> StoredWeight:
        """The open part of the weight."""
        if self.layout.per_weight:
            return StoredWeight(self.layout, bits=self._buffers["bits"], kept=self.values)
        return StoredWeight(self.layout, self.matrix)

    def full_weight(self) -> torch.Tensor:
        """The dense weight, zeros where it is closed: ``weight_shape``, dtype of ``values``."""
        dense = self.dense_weight
        return self.stored.to_dense() if dense is None else dense

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

    def _empty_dense(self) -> nn.Module:
        """The dense layer of this one's sizes, on the meta device: nothing is drawn for it."""
        raise NotImplementedError

    def store(self, stored: StoredWeight) -> None:
        """Hold ``stored``, in place of what was held before."""
        self.weight_shape = stored.layout.weight_shape
        _remove_buffers(self)
        matrix = stored.matrix
        if matrix is None:
            self.register_buffer("values", stored.kept)
            self.register_buffer("bits", stored.bits)
        else:
            self._matrix_shape = matrix.shape
            for name in ("values", "crow", "col"):
                self.register_buffer(name, getattr(matrix, name))
            for name in _DERIVED:
                self.register_buffer(name, getattr(matrix, name), persistent=False)
        self.register_buffer("dense_weight", None, persistent=False)

    def set_forms(self, forms: dict[str, str], reason: str, dense_copy: bool) -> None:
        """Compute in these forms from now on.

        Raises:
            ValueError: a bucket is missing, or a form that the layer does not have.
        """
        allowed = FORMS if self.can_multiply_blocks and "crow" in self._buffers else ("dense",)
        if set(forms) != set(BUCKETS) or not set(forms.values()) <= set(allowed):
            raise ValueError(
                f"forms must give one of {allowed} for each of {list(BUCKETS)}, got {forms}"
            )
        self.forms, self.reason, self._dense_copy = dict(forms), reason, dense_copy
        # a look-up must cost little beside a small product: none, or where the form changes only
        self._one_form = next(iter(forms.values())) if len(set(forms.values())) == 1 else None
        steps = list(zip(BUCKETS.values(), (forms[bucket] for bucket in BUCKETS), strict=True))
        self._steps = [
            step
            for step, after in zip(steps, [*steps[1:], (None, None)], strict=True)
            if step[1] != after[1]
        ]
        self._copy_dense()

    def _copy_dense(self) -> None:
        wanted = self._dense_copy and "dense" in self.forms.values()
        self.dense_weight = None
        if wanted:
            self.dense_weight = self.stored.to_dense()

    def form_of(self, rows: int) -> str:
        """The form for ``rows`` rows of x in all."""
        for end, form in self._steps:
            if rows <= end:
                return form
        raise AssertionError("the last bucket has no end")

    @property
    def form(self) -> str:
        """The forms in words: one, or which buckets of M are sparse."""
        kinds = set(self.forms.values())
        if len(kinds) == 1:
            return kinds.pop()
        sparse = ", ".join(bucket for bucket, form in self.forms.items() if form == "sparse")
        return f"sparse at M {sparse}; else dense"

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
        destination.update(
            {f"{prefix}{name}": tensor for name, tensor in self.stored.tensors().items()}
        )

    def _load_from_state_dict(self, state_dict, prefix, *args):
        stored = self._read_state(state_dict, prefix)
        if stored is not None:
            self.store(stored_like(stored, self.values))
            for name, buffer in self._buffers.items():  # what PyTorch copies next is what is held
                if name not in self._non_persistent_buffers_set and buffer is not None:
                    state_dict[prefix + name] = buffer
            self._copy_dense()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn, recurse=True):
        before = {n: b for n in _INDEX if (b := self._buffers.get(n)) is not None}
        super()._apply(fn, recurse)
        if not all(_same_or_meta(old, self._buffers[name]) for name, old in before.items()):
            # to_empty(): what the memory held is no index, and an index is an address to a kernel
            weight = torch.zeros(self.weight_shape, dtype=self.values.dtype)
            nothing = torch.zeros(self.layout.gate_shape, dtype=torch.bool)
            empty = StoredWeight.from_gated(weight, nothing, self.layout)
            self.store(stored_like(empty, self.values))
            self._copy_dense()
        return self

    def __setstate__(self, state):
        super().__setstate__(state)
        # a pickle is a door like any other: the index is checked, and what follows from it rebuilt
        self.store(StoredWeight.from_tensors(self.stored.tensors(), self.layout))
        self._copy_dense()

    def extra_repr(self) -> str:
        block = "x".join("full" if side is None else str(side) for side in self.gate_block)
        return f"{super().extra_repr()}, block={block}, form={self.form}"


class BlockSparseLinear(SparseModule, nn.Linear):
    """``x @ W^T + bias`` with only the open blocks of ``W`` stored.

    x ``[..., K]`` -> ``[..., N]``. Made by ``sparsify`` or ``load``.
    """

    dense_type = nn.Linear
    can_multiply_blocks = True

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        form = self._one_form
        if form is None:
            form = self.form_of(input.numel() // self.in_features)
        if form == "dense":
            weight = self.dense_weight
            if weight is None:
                weight = self.full_weight()
            return nn.functional.linear(input, weight, self.bias)
        return bsr_linear(input, self.matrix, self.bias)

    def _empty_dense(self) -> nn.Module:
        return nn.Linear(self.in_features, self.out_features, self.bias is not None, "meta")


class _SparseConv(SparseModule):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
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
    """``torch.nn.Conv1d`` with only the open blocks of its weight stored; computed dense."""

    dense_type = nn.Conv1d


class BlockSparseConv2d(_SparseConv, nn.Conv2d):
    """``torch.nn.Conv2d`` with only the open blocks of its weight stored; computed dense."""

    dense_type = nn.Conv2d


SPARSE_TYPES: dict[type[nn.Module], type[SparseModule]] = {
    sparse.dense_type: sparse
    for sparse in (BlockSparseLinear, BlockSparseConv1d, BlockSparseConv2d)
}

_DERIVED = ("ccol", "row", "perm", "row_order")
_INDEX = ("crow", "col", "bits", *_DERIVED)

_ATTRIBUTES = (
    "weight_shape", "gate_block", "gate_kind",
    "forms", "reason", "_dense_copy", "_steps", "_one_form",
)  # fmt: skip
_OWN_BUFFERS = ("values", "crow", "col", "bits", *_DERIVED, "dense_weight")


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


def sparsify_layer(
    layer: nn.Module, stored: StoredWeight, gate_block: Block, gate_kind: str
) -> SparseModule:
    """Turn a dense, gated or sparse layer into the sparse layer that holds ``stored``, in place."""
    if isinstance(layer, GatedModule):
        ungate_layer(layer, fold=False)
    if not isinstance(layer, SparseModule):
        del layer._parameters["weight"]
        layer.__class__ = SPARSE_TYPES[type(layer)]  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(layer, SparseModule)
    layer.gate_block, layer.gate_kind = gate_block, gate_kind
    layer.store(stored)
    return layer


def densify_layer(layer: nn.Module) -> None:
    """Turn a gated or sparse layer into the dense layer of its type, in place."""
    if isinstance(layer, GatedModule):
        ungate_layer(layer, fold=True)
    elif isinstance(layer, SparseModule):
        weight = layer.full_weight()
        _remove_buffers(layer)
        for name in _ATTRIBUTES:
            delattr(layer, name)
        layer.__dict__.pop("_matrix_shape", None)
        layer.__class__ = layer.dense_type  # pyright: ignore[reportAttributeAccessIssue]
        bias = layer._parameters.pop("bias")
        layer.register_parameter("weight", nn.Parameter(weight))
        layer.register_parameter("bias", bias)


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
