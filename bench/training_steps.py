"""Training steps that are compared: the layers, what a step keeps, and whether it is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from sgtriton_kernels import gate_weight
from sgtriton_kernels.blocks import expand_gates, sum_blocks
from torch import nn

from sgtriton.layers import GatedLinear

from . import peers, timed

BLOCK = (32, 32)
CLOSED = 0.9  # of blocks; of gates of single weights, half
CYCLE = 10  # reopen_every, and the steps that one sample of it takes
COMPILED = "eager gating, torch.compile max-autotune"


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate):
        return (gate > 0.5).to(gate.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad


class EagerGating(nn.Linear):
    """What one writes without this package; per-weight gates."""

    def __init__(self, layer: GatedLinear):
        super().__init__(layer.in_features, layer.out_features)
        self.weight, self.bias = layer.weight, layer.bias
        self.gate = nn.Parameter(layer.gate.detach().clone())

    def forward(self, input):
        gate = _Straight.apply(self.gate).to(self.weight.dtype)
        return F.linear(input, self.weight * gate, self.bias)


def make_gated(
    n: int, k: int, block: tuple[int, int], gate: str, closed: float, **where: Any
) -> GatedLinear:
    """A gated layer of which a share of the gates is closed, at random."""
    layer = GatedLinear(k, n, block=block, gate=gate, **where)
    with torch.no_grad():
        layer.gate.copy_(torch.where(torch.rand_like(layer.gate) < closed, 0.1, 0.9))
    return layer


def make_step(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Forward and backward of a layer, as training does it: old gradients are dropped."""

    def step() -> torch.Tensor:
        x.grad = None
        for parameter in layer.parameters():
            parameter.grad = None
        y = layer(x)
        y.backward(dy)
        return y.detach()

    return step


def saved_bytes(layer: nn.Module, x: torch.Tensor) -> int:
    """Bytes kept for backward beside the input and the parameters, each storage once."""
    known = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters())}
    found = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = layer(x)
    del kept
    return sum(found.values())


def per_weight(shape: tuple[int, int, int], kind: str, **where: Any) -> dict[str, nn.Linear]:
    """The candidates for per-weight gates, by name; half of the gates are closed.

    Args:
        shape: M, N, K.
        kind: of gates.
        where: dtype and device of the layers.
    """
    _, n, k = shape
    gated = make_gated(n, k, (1, 1), kind, 0.5, **where)
    candidates: dict[str, nn.Linear] = {"dense": nn.Linear(k, n, **where), "sgtriton": gated}
    if kind == "threshold":
        candidates["eager gating"] = EagerGating(gated)
        if peers.why_not_compile(gated.weight.device) is None:
            compiled = EagerGating(gated)
            compiled.compile(mode="max-autotune")
            candidates[COMPILED] = compiled
    return candidates


def per_block(shape: tuple[int, int, int], **where: Any) -> dict[str, nn.Linear]:
    """The candidates for gates over blocks, by name; arguments as in :func:`per_weight`."""
    _, n, k = shape
    unfrozen, frozen, reopening = (
        make_gated(n, k, BLOCK, "threshold", CLOSED, **where) for _ in range(3)
    )
    frozen.freeze()
    reopening.reopen_every = CYCLE
    return {
        "dense": nn.Linear(k, n, **where),
        "sgtriton": unfrozen,
        f"sgtriton, reopen_every={CYCLE}": reopening,
        "sgtriton, frozen": frozen,
    }


def difference(layer: nn.Linear, x: torch.Tensor, dy: torch.Tensor) -> str | None:
    """What is wrong with a step's output or gradients, against products in fp64."""
    torch.manual_seed(0)
    y = make_step(layer, x, dy)()
    w, gate, bias = layer.weight, getattr(layer, "gate", None), layer.bias
    open_ = torch.ones_like(w, dtype=torch.float64)
    if isinstance(layer, GatedLinear):
        open_ = expand_gates(_drawn(layer).double(), layer.layout)
    elif gate is not None:
        open_ = (gate > 0.5).double()
    gated = w.double() * open_
    dense_grad = dy.double().T @ x.double()
    expected = {
        "y": (y, F.linear(x.double(), gated, bias.double())),
        "dx": (x.grad, dy.double() @ gated),
        "dW": (w.grad, dense_grad * open_),
        "dbias": (bias.grad, dy.double().sum(0)),
    }
    if gate is not None and gate.grad is not None:
        by_weight = dense_grad * w.double()
        if isinstance(layer, GatedLinear):
            kept = by_weight if layer.reopens else by_weight * open_
            by_weight = sum_blocks(kept, layer.layout)  # in fp64, as its values are
        expected["dgate"] = (gate.grad, by_weight)
    most = 2e-2 if w.dtype.itemsize == 2 else 1e-4  # the gates' gradient is fp32 in any case
    for name, (found, wanted) in expected.items():
        if found is None:
            return f"no {name}"
        if wrong := timed.difference(found.detach(), wanted.detach(), most):
            return f"{name}, {wrong}"
    return None


def _drawn(layer: GatedLinear) -> torch.Tensor:
    """The gates' values in the first step after ``torch.manual_seed(0)``."""
    if layer.frozen or layer.gate_kind == "threshold":
        return layer.gate > 0.5
    torch.manual_seed(0)
    seed = torch.randint(0, 2**62, (1,), device=layer.weight.device)
    ones, gate = torch.ones_like(layer.gate), layer.gate.detach()  # per weight: shapes agree
    return gate_weight(ones, gate, layer.gate_block, kind=layer.gate_kind, seed=seed)


def whole_cycle(layer: nn.Module, step: Callable[[], object]) -> Callable[[], None]:
    """One step in which closed gates may reopen, and those in which they may not."""

    def cycle() -> None:
        for _ in range(CYCLE):
            step()
            with torch.no_grad():
                layer.optimizer_stepped()  # pyright: ignore

    return cycle
