"""The method of a call of ``gated_linear``: looked up once for each size."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch

from ._triton import dot_precision, is_native
from .blocks import GateLayout
from .candidates import candidates
from .choices import Choices, keep
from .gated_cell import FORWARD, STEP, GatedCell, same_density
from .gated_torch import most_open
from .lookup import analytic, choose, now

_MOST = 4096  # sizes that are remembered
_choices = Choices()


@dataclass(frozen=True)
class _Plan:
    """The method by the number of open blocks.

    Args:
        methods: number of open blocks from which on, and method; ``None``: what reasoning gives
            for the number. From many blocks to few.
        most: number of open blocks below which reasoning skips.
    """

    methods: tuple[tuple[int, str | None], ...]
    most: float

    def method(self, count: int) -> str:
        found = next(method for first, method in self.methods if count >= first)
        return found or ("skip" if count < self.most else "multiply")


def method_for(
    x: torch.Tensor,
    w: torch.Tensor,
    gate: torch.Tensor,
    layout: GateLayout,
    kind: str,
    reopen: bool,
    impl: str,
) -> str:
    """The method of a call and its backward.

    Where it depends on how many blocks are open they are counted, on a CPU only; of drawn gates
    those that are to be expected.
    """
    if kind == "hard_concrete" or (impl == "torch" and layout.per_weight):
        return "multiply"  # there is no other; a look would cost as much as it may of a small call
    dgate = gate.requires_grad
    trains = (dgate or w.requires_grad or x.requires_grad) and torch.is_grad_enabled()
    device = x.device
    key = (
        x.shape, layout.weight_shape, layout.block, x.dtype, w.dtype, kind, reopen, trains, dgate,
        impl, device, None if x.is_cpu else _precision(x),
    )  # fmt: skip
    kept = _choices.of(now.generation)  # before looking: what another thread records is not missed
    plan = kept.get(key)
    if plan is None:
        rows = math.prod(x.shape[:-1])
        cell = cell_of(rows, x, w.dtype, layout, kind, reopen, trains, dgate, impl)
        plan = keep(kept, key, _plan(cell, layout, device), _MOST)
    return plan if isinstance(plan, str) else plan.method(count_open(gate, kind))


def cell_of(
    rows: int,
    like: torch.Tensor,
    w_dtype: torch.dtype,
    layout: GateLayout,
    kind: str,
    reopen: bool,
    trains: bool,
    dgate: bool,
    impl: str,
    nnz: int | None = None,
) -> GatedCell:
    """What is looked up for a layer.

    Args:
        rows: of ``x``.
        like: of which dtype and device ``x`` is.
        trains: whether there is a backward pass, and ``dgate`` whether it computes the gates'.
        nnz: number of open blocks; all of them if ``None``.
    """
    by_torch, device, (n, k) = impl == "torch", like.device, layout.weight_shape
    return GatedCell(
        STEP if trains else FORWARD, impl, rows, n, k, layout.block,
        math.prod(layout.gate_shape) if nnz is None else nnz, like.dtype,
        precision=_precision(like),
        # of rows of x backward may meet other strides
        aligned=by_torch or (n % 16 == 0 and k % 16 == 0),
        native=not by_torch and is_native(device),
        w_dtype=w_dtype, kind=kind, reopen=reopen or not trains, dgate=trains and dgate,
        counted=by_torch and device.type == "cpu",
        fuses_long=not by_torch and fuses_long(device),
    )  # fmt: skip


def count_open(gate: torch.Tensor, kind: str) -> int:
    """How many gates are open, of drawn ones how many are to be expected; waits for the device."""
    with torch.no_grad():
        if kind == "bernoulli":
            return round(float(gate.clamp(0, 1).sum(dtype=torch.float64).nan_to_num(0)))
        return int((gate > 0.5).count_nonzero())


@functools.cache
def fuses_long(device: torch.device) -> bool:
    """Whether matrix units read a left operand from registers or tensor memory."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)


def _precision(x: torch.Tensor) -> str:
    return dot_precision() if x.dtype is torch.float32 and not x.is_cpu else "ieee"


def _plan(cell: GatedCell, layout: GateLayout, device: torch.device) -> str | _Plan:
    if not cell.counted or not cell.nnz or len(candidates(cell)) < 2:
        return choose(cell, device).candidate.name
    methods = []
    for first, last in same_density(cell.nnz):
        # what reasoning gives changes once, from few blocks to many; a record is for all of them
        many, few = (replace(cell, nnz=max(count, 1)) for count in (last, first))
        found = choose(many, device)
        other = (analytic(few) if found.source == "analytic" else choose(few, device)).candidate
        methods.append((first, other.name if other == found.candidate else None))
    names = {method for _, method in methods}
    if len(names) == 1 and None not in names:
        return names.pop()
    return _Plan(tuple(methods), most_open(cell.M, layout))
