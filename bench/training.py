"""What a gated training step costs beside the dense one: time, and memory kept for backward.

One layer, forward and backward (gradients of input, weight, bias and gates), on the CPU with the
``torch`` implementation. Candidates take turns in one process. Compared are the dense layer, gating
as autograd does it (``F.linear(x, W * ste(g))``), the same under ``torch.compile``, and this
package.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from sgtriton.layers import GatedLinear
from sgtriton.tables import format_table
from sgtriton.timing import samples_ms

from . import timed
from .rows import circumstances, write

SHAPES = ((512, 4096, 1024), (2048, 1024, 1024), (128, 1024, 4096), (128, 300, 784))
BLOCK_SHAPE = (512, 4096, 1024)
CLOSED = 0.9
CYCLE = 10  # reopen_every, and the steps that one sample of it takes


@dataclass(frozen=True)
class Row:
    """One row of the CSV: a candidate at a shape; ``ratio`` is to the dense layer's median."""

    candidate: str
    gate: str
    block: str
    closed: float
    M: int
    N: int
    K: int
    ms_p20: float
    ms_p50: float
    ms_p80: float
    ratio: float
    saved_bytes: int
    threads: int
    samples: int
    cpu: str
    sgtriton: str
    torch: str
    python: str
    commit: str


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
        return F.linear(input, self.weight * _Straight.apply(self.gate), self.bias)


def make_gated(n: int, k: int, block: tuple[int, int], gate: str, closed: float) -> GatedLinear:
    """A gated layer of which a share of the gates is closed, at random."""
    layer = GatedLinear(k, n, block=block, gate=gate)
    with torch.no_grad():
        layer.gate.copy_(torch.where(torch.rand_like(layer.gate) < closed, 0.1, 0.9))
    return layer


def make_step(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> Callable[[], None]:
    """Forward and backward of a layer, as training does it: old gradients are dropped."""

    def step() -> None:
        x.grad = None
        for parameter in layer.parameters():
            parameter.grad = None
        layer(x).backward(dy)

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


def per_weight(shape: tuple[int, int, int], kind: str) -> dict[str, nn.Module]:
    """The candidates for per-weight gates, by name; half of the gates are closed."""
    _, n, k = shape
    gated = make_gated(n, k, (1, 1), kind, 0.5)
    dense = nn.Linear(k, n)
    candidates: dict[str, nn.Module] = {"dense": dense, "sgtriton": gated}
    if kind == "threshold":
        candidates["eager gating"] = EagerGating(gated)
        compiled = EagerGating(gated)
        compiled.compile()
        candidates["eager gating, torch.compile"] = compiled
    return candidates


def per_block(shape: tuple[int, int, int]) -> dict[str, nn.Module]:
    """The candidates for gates over blocks, by name."""
    _, n, k = shape
    unfrozen, frozen, reopening = (
        make_gated(n, k, (32, 32), "threshold", CLOSED) for _ in range(3)
    )
    frozen.freeze()
    reopening.reopen_every = CYCLE
    return {
        "dense": nn.Linear(k, n),
        "sgtriton": unfrozen,
        f"sgtriton, reopen_every={CYCLE}": reopening,
        "sgtriton, frozen": frozen,
    }


def measure(
    layers: dict[str, nn.Module],
    shape: tuple[int, int, int],
    kind: str,
    block: tuple[int, int],
    closed: float,
    seconds: float,
) -> list[Row]:
    """Time the candidates in turns."""
    m, n, k = shape
    x, dy = torch.randn(m, k, requires_grad=True), torch.randn(m, n)
    steps, per_call = [], []
    for layer in layers.values():
        step = make_step(layer, x, dy)
        reopening = isinstance(layer, GatedLinear) and layer.reopen_every > 1
        per_call.append(CYCLE if reopening else 1)
        steps.append(_whole_cycle(layer, step) if reopening else step)
    samples = samples_ms(steps, torch.device("cpu"), seconds, rounds=11)
    samples = [[ms / n for ms in taken] for taken, n in zip(samples, per_call, strict=True)]
    dense = statistics.median(samples[0])
    rows = []
    for (name, layer), taken in zip(layers.items(), samples, strict=True):
        p20, p50, p80 = timed.quantiles(taken)
        rows.append(
            Row(
                candidate=name,
                gate="none" if name == "dense" else kind,
                block="-" if name == "dense" else f"{block[0]}x{block[1]}",
                closed=0.0 if name == "dense" else closed,
                M=m, N=n, K=k,
                ms_p20=round(p20, 3), ms_p50=round(p50, 3), ms_p80=round(p80, 3),
                ratio=round(p50 / dense, 3),
                saved_bytes=saved_bytes(layer, x),
                samples=len(taken),
                **circumstances(),
            )
        )  # fmt: skip
    return rows


def _whole_cycle(layer: nn.Module, step: Callable[[], None]) -> Callable[[], None]:
    """One step in which closed gates may reopen, and those in which they may not."""

    def cycle() -> None:
        for _ in range(CYCLE):
            step()
            with torch.no_grad():
                layer.optimizer_stepped()  # pyright: ignore

    return cycle


def table(rows: list[Row]) -> str:
    """The rows for a terminal."""
    headers = ["M, N, K", "gates", "block", "candidate", "ms", "dense = 1", "saved bytes"]
    cells = [
        [
            f"{r.M}, {r.N}, {r.K}", r.gate, r.block, r.candidate, f"{r.ms_p50:.2f}",
            f"{r.ratio:.2f}", f"{r.saved_bytes:,}",
        ]
        for r in rows
    ]  # fmt: skip
    return format_table(headers, cells, align="llllrrr")


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``training`` to the command line."""
    command = commands.add_parser("training", help="a gated training step beside the dense one")
    timed.add_arguments(command, "training", 12.0, "for each shape, and at least 11 turns")
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    timed.prepare(arguments)
    rows = []
    for kind, shapes in (("threshold", SHAPES), ("bernoulli", SHAPES[:1])):
        for shape in shapes:
            rows += measure(per_weight(shape, kind), shape, kind, (1, 1), 0.5, arguments.seconds)
    blocks = per_block(BLOCK_SHAPE)
    rows += measure(blocks, BLOCK_SHAPE, "threshold", (32, 32), CLOSED, 2 * arguments.seconds)
    write(arguments.out, rows)
    print(table(rows))
    return 0
