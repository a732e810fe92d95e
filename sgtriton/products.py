"""Which products there are to choose candidates for: those that a model's layers compute."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from sgtriton_kernels import BlockSparse
from sgtriton_kernels._impl import resolve_impl
from sgtriton_kernels._triton import INTERPRETED
from sgtriton_kernels.bsr_checks import why_no_kernel
from sgtriton_kernels.bsr_choice import cell_of
from sgtriton_kernels.cell import Cell
from torch import nn

from .bsr_problem import BsrLinearProblem
from .conv_problem import ConvProblem
from .conv_products import ConvProduct, images_met
from .gated_problem import GatedProduct, gated_products
from .layers import GatedLinear
from .problem import Problem
from .sparse_layers import SparseModule


@dataclass(frozen=True)
class Product:
    """A weight and how many rows it meets, of which choices are to be made.

    Args:
        name: for the table.
        matrix: the weight.
        rows: numbers of rows of x.
        trains: whether gradients are computed as well.
    """

    name: str
    matrix: BlockSparse
    rows: tuple[int, ...]
    trains: bool = False


AnyProduct = Product | ConvProduct | GatedProduct


@torch.no_grad()
def products_of(model: nn.Module, example_input: Any) -> list[AnyProduct]:
    """The block-sparse and gated layers of a model, and what rows or images each is brought."""
    rows: dict[str, list[Any]] = {}
    dtypes: dict[str, torch.dtype] = {}  # in which it computes, which autocast may say
    hooks = []
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, GatedLinear)
        or (isinstance(layer, SparseModule) and not layer.layout.per_weight)
    }

    def note(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            x = inputs[0] if inputs else named["input"]
            if isinstance(layer, nn.Linear):
                m = x.numel() // max(x.shape[-1], 1)
            else:
                m = images_met(layer, x)
            if m and m not in rows.setdefault(name, []):
                rows[name].append(m)
            dtypes[name] = x.dtype
            if torch.is_autocast_enabled(x.device.type):
                dtypes[name] = torch.get_autocast_dtype(x.device.type)

        return hook

    modes = {module: module.training for module in model.modules()}
    try:
        for name, layer in layers.items():
            hooks.append(layer.register_forward_pre_hook(note(name), with_kwargs=True))
        model.eval()
        if isinstance(example_input, dict):
            model(**example_input)
        else:
            arguments = example_input if isinstance(example_input, tuple) else (example_input,)
            model(*arguments)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    found = []
    for name, met in rows.items():
        layer, dtype = layers[name], dtypes[name]
        if isinstance(layer, GatedLinear):
            found.extend(gated_products(name, layer, dtype, tuple(met)))
            continue
        if not layer.matrix.nnz:
            continue
        kind = Product if layer.dense_type is nn.Linear else ConvProduct
        found.append(kind(name, layer.matrix.to(dtype), tuple(met), layer.trainable))
        if "merged" in layer.forms.values():
            found.append(kind(name, layer._matrix_of("merged").to(dtype), tuple(met)))
    return found


@dataclass(frozen=True)
class Work:
    """A pass to search for.

    Args:
        name: of the layer.
        cell: the product.
        device: where it is computed.
        problem: makes its inputs, when its turn comes.
    """

    name: str
    cell: Cell
    device: torch.device
    problem: Callable[[torch.Generator], Problem]

    @property
    def label(self) -> str:
        """What it is called while it is worked on."""
        which = self.cell.op.split()[-1]
        name = self.name or self.cell.weight
        return f"{name}, M {self.cell.M}" + (f", {which}" if which != "fwd" else "")


def work_of(products: Iterable[AnyProduct]) -> Iterator[Work]:
    """The passes that products consist of; of gated layers steps as a whole.

    Raises:
        ValueError: kernels that the interpreter would run.
    """
    for product in products:
        if isinstance(product, GatedProduct):
            yield from _steps_of(product)
            continue
        w = product.matrix
        (n, k), like = w.shape, w.values
        impl = resolve_impl(None, like.device, "tune", why_no_kernel(like.dtype, w.block))
        _check_runs(impl)
        if isinstance(product, ConvProduct):
            for cell in product.cells(impl):
                make = functools.partial(ConvProblem, cell, w)
                yield Work(product.name, cell, like.device, make)
            continue
        passes = ("fwd", "dx", "dvalues") if product.trains and impl == "triton" else ("fwd",)
        for m in product.rows:
            x, dy = like.new_empty(m, k), like.new_empty(m, n)
            for which in passes:
                operands = {"fwd": (x,), "dx": (dy,), "dvalues": (dy, x)}[which]
                cell = cell_of(which, w, impl, *operands)
                make = functools.partial(BsrLinearProblem, cell, w)
                yield Work(product.name, cell, like.device, make)


def _steps_of(product: GatedProduct) -> Iterator[Work]:
    device = product.gate.device
    unsupported = "fp64 is for the torch implementation"
    impl = resolve_impl(
        None, device, "tune", unsupported if torch.float64 in product.dtypes else None
    )
    _check_runs(impl)
    for cell, make in product.problems(impl):
        yield Work(product.name, cell, device, make)


def _check_runs(impl: str) -> None:
    if impl == "triton" and INTERPRETED:
        raise ValueError("interpreted kernels are not tuned: their times say nothing")
