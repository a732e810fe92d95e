"""A step of a gated linear layer with inputs, on which its methods are tried."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from sgtriton_kernels import GateLayout, expand_gates, gated_linear, sum_blocks
from sgtriton_kernels.candidate import Candidate
from sgtriton_kernels.gated_cell import STEP, GatedCell
from sgtriton_kernels.gated_choice import cell_of, count_open
from sgtriton_kernels.kinds import open_gates

from .layers import GatedLinear
from .problem import Problem

_OTHERWISE = 0.25  # share of the gates that a check flips, so that some are open and some closed


@dataclass(frozen=True)
class GatedProduct:
    """A gated layer and how many rows it meets, for which methods are to be chosen.

    Args:
        name: of the layer, for the table.
        layout: of its gates.
        gate: ``layout.gate_shape`` fp32. Its gates as they are now.
        kind: of its gates, as the next forward pass reads them.
        reopen: whether closed gates get their gradient.
        dtypes: of ``x`` and of the weight.
        rows: numbers of rows of x.
        trains: whether there is a backward pass.
        dgate: whether that computes the gates' gradient.
    """

    name: str
    layout: GateLayout
    gate: torch.Tensor = field(repr=False)
    kind: str
    reopen: bool
    dtypes: tuple[torch.dtype, torch.dtype]
    rows: tuple[int, ...]
    trains: bool
    dgate: bool

    def problems(
        self, impl: str
    ) -> Iterator[tuple[GatedCell, Callable[[torch.Generator], GatedProblem]]]:
        """What is to be searched, and what makes its inputs when its turn comes."""
        x_dtype, w_dtype = self.dtypes
        like = self.gate.new_empty(0, dtype=x_dtype)
        if self.kind == "hard_concrete":
            count = int(open_gates(self.gate, self.kind).count_nonzero())
        else:
            count = count_open(self.gate, self.kind)
        count = max(count, 1)  # a layer that is closed as a whole takes the record of the fewest
        for m in self.rows:
            cell = cell_of(
                m, like, w_dtype, self.layout, self.kind, self.reopen, self.trains, self.dgate,
                impl, count,
            )  # fmt: skip
            yield cell, functools.partial(GatedProblem, cell, self.layout, self.gate)


def gated_products(
    name: str, layer: GatedLinear, dtype: torch.dtype, rows: tuple[int, ...]
) -> Iterator[GatedProduct]:
    """The steps of a layer in the mode that it is in; two, where gates reopen now and then.

    Args:
        dtype: of what it computes with.
        rows: numbers of rows of its input.
    """
    trains, dgate = layer.training, layer.gate.requires_grad and not layer.frozen
    kind = layer.gate_kind
    if layer.frozen or (kind == "bernoulli" and not trains):
        kind = "threshold"
    reopens = [True, False] if trains and layer.reopen_every > 1 else [layer.reopens]
    for reopen in reopens:
        yield GatedProduct(
            name, layer.layout, layer.gate.detach().clone(), kind, reopen,
            (dtype, layer.weight.dtype), rows, trains, dgate,
        )  # fmt: skip


class GatedProblem(Problem):
    """A step of ``gated_linear``: ``y``, ``dx``, ``dw`` and ``dgate``; or ``y`` alone.

    Args:
        layout: of the gates.
        gate: ``layout.gate_shape`` fp32, on the device; its values count when methods are timed.
    """

    cell: GatedCell

    def __init__(
        self,
        cell: GatedCell,
        layout: GateLayout,
        gate: torch.Tensor,
        generator: torch.Generator,
    ):
        super().__init__(cell, gate.device, generator)
        self.layout, self._gate = layout, gate

    def inputs(self) -> tuple[torch.Tensor, ...]:
        cell = self.cell
        x, dy = self.random(cell.M, cell.K), self.random(cell.M, cell.N)
        return self._leaves(x, self.random(cell.N, cell.K, dtype=cell.w_dtype), self._gate, dy)

    def whole_inputs(self) -> tuple[torch.Tensor, ...]:
        cell = self.cell
        x = self.signs(cell.M, cell.K, terms=max(cell.M, cell.K))
        dy = self.signs(cell.M, cell.N, terms=cell.N)
        w = self.signs(cell.N, cell.K, dtype=cell.w_dtype)
        # 0 or 1, which a draw leaves as they are
        u = torch.rand(self._gate.shape, device=self.device, generator=self._generator)
        return self._leaves(x, w, ((self._gate > 0.5) ^ (u < _OTHERWISE)).float(), dy)

    def compute(
        self,
        candidate: Candidate,
        x: torch.Tensor,
        w: torch.Tensor,
        gate: torch.Tensor,
        seed: torch.Tensor | None,
        dy: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        cell = self.cell
        with torch.inference_mode(False), torch.set_grad_enabled(self._trains):
            y = gated_linear(
                x, w, gate, None, cell.block,
                kind=cell.kind, seed=seed, reopen=cell.reopen,
                method=candidate.name, impl=cell.impl,
            )  # fmt: skip
            if not self._trains:
                return (y,)
            leaves = (x, w, gate) if cell.dgate else (x, w)
            return y.detach(), *torch.autograd.grad(y, leaves, dy)

    def expected(
        self,
        x: torch.Tensor,
        w: torch.Tensor,
        gate: torch.Tensor,
        seed: torch.Tensor | None,
        dy: torch.Tensor,
    ) -> tuple[tuple[torch.Tensor, torch.dtype], ...]:
        cell = self.cell
        x, w, dy = (t.detach().double() for t in (x, w, dy))
        b = (gate.detach() > 0.5).double()
        weights = expand_gates(b, self.layout)
        y = x @ (w * weights).T, cell.dtype
        if not self._trains:
            return (y,)
        d = dy.T @ x
        step = y, (dy @ (w * weights), cell.dtype), (d * weights, cell.w_dtype)
        if not cell.dgate:
            return step
        dgate = sum_blocks(d * w, self.layout)
        return *step, (dgate if cell.reopen else dgate * b, torch.float32)

    def check_work(self) -> tuple[float, float]:
        cell = self.cell
        products = (3.0 if self._trains else 1.0) * cell.M * cell.N * cell.K
        return products, products

    @property
    def _trains(self) -> bool:
        return self.cell.op == STEP

    def _leaves(
        self, x: torch.Tensor, w: torch.Tensor, gate: torch.Tensor, dy: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """What :meth:`compute` takes."""
        seed = None
        if self.cell.kind != "threshold":
            seed = torch.randint(1 << 62, (1,), device=self.device, generator=self._generator)
        with torch.inference_mode(False):
            leaves = [t.clone().requires_grad_(self._trains) for t in (x, w)]
            gate = gate.clone().requires_grad_(self._trains and self.cell.dgate)
            return *leaves, gate, seed, dy.clone()  # pyright: ignore[reportReturnType]
