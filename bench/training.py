"""What a gated training step costs beside the dense one: time, and memory kept for backward.

One layer, forward and backward (gradients of input, weight, bias and gates). Candidates take turns
in one process. Compared are the dense layer, gating as autograd does it (``F.linear(x, W *
ste(g))``), the same under ``torch.compile``, and this package.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from sgtriton_kernels import gate_weight
from sgtriton_kernels.blocks import expand_gates, sum_blocks
from torch import nn

from sgtriton.layers import GatedLinear
from sgtriton.tables import format_table

from . import peers, timed
from .grids import Sweep, Task
from .rows import Timing, measured, notes, paragraphs, rounded, summary, where
from .timed import DTYPES, Taken, Work

SHAPES = {  # M, N, K
    "cpu": ((512, 4096, 1024), (2048, 1024, 1024), (128, 1024, 4096), (128, 300, 784)),
    "cuda": ((512, 4096, 4096), (2048, 4096, 4096), (8192, 4096, 4096), (2048, 14336, 4096)),
}
QUICK_SHAPES = ((64, 256, 128),)
BLOCK = (32, 32)
CLOSED = 0.9  # of blocks; of gates of single weights, half
CYCLE = 10  # reopen_every, and the steps that one sample of it takes
COMPILED = "eager gating, torch.compile max-autotune"


_TEXT = """
## A gated training step beside the dense one{on}

One linear layer, forward and backward, {dtypes}, {threads} threads of {device}, PyTorch {torch},
commit {commit}; medians of candidates that took turns, the dense layer being 1.
"Eager gating" is `F.linear(x, W * ste(g))`. "Saved" is what is kept for backward beside input and
parameters. Per-weight gates: half are closed; blocks: {closed:.0%}. On a CPU each thread keeps a
scratch buffer between calls (the largest weight's size, or 8 MiB beside inputs and outputs of 512
rows), which is in no column. Gates and their optimizer state come on top: 4 bytes a gate, its
gradient 4, Adam's moments 8. Rerun: `{rerun}`. All rows: `{file}`.

"""


@dataclass(frozen=True, kw_only=True)
class Row(Timing):
    """One row of the CSV; ``saved_bytes`` are kept for backward beside input and parameters."""

    gate: str
    saved_bytes: int


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


def measure(
    layers: dict[str, nn.Linear],
    shape: tuple[int, int, int],
    kind: str,
    block: tuple[int, int],
    closed: float,
    seconds: float,
) -> list[Row]:
    """Time the candidates in turns, but those whose outputs or gradients are wrong."""
    m, n, k = shape
    weight = next(iter(layers.values())).weight
    x, dy = torch.randn(m, k).to(weight).requires_grad_(), torch.randn(m, n).to(weight)
    steps, per_call = {}, {}
    for name, layer in layers.items():
        step = make_step(layer, x, dy)
        reopening = isinstance(layer, GatedLinear) and layer.reopen_every > 1
        per_call[name] = CYCLE if reopening else 1
        steps[name] = _whole_cycle(layer, step) if reopening else step
    taken = timed.take_turns(
        steps, lambda name, _: difference(layers[name], x, dy), x.device, seconds,
        rounds=11, dense=tuple(layers),
    )  # fmt: skip
    taken = {
        name: replace(one, ms=[ms / per_call[name] for ms in one.ms]) for name, one in taken.items()
    }
    dense = taken["dense"].median
    rows = []
    for name, layer in layers.items():
        one = taken[name]
        share = 1 - closed if block != (1, 1) and name != "dense" else 1.0
        rows.append(
            Row(
                op="gated_linear", provider=name, pass_="forward+backward",
                M=m, N=n, K=k, dtype=str(weight.dtype).removeprefix("torch."),
                block=f"{block[0]}x{block[1]}", density=round(1 - closed, 4),
                ratio=rounded(one.median / dense, 4), gate=kind,
                saved_bytes=saved_bytes(layer, x) if one.ms else 0,
                **one.fields(),
                **Work(3 * 2 * m * n * k * share, math.nan).fields(one.median),
                **where(x.device),
            )
        )  # fmt: skip
    return rows


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


def _whole_cycle(layer: nn.Module, step: Callable[[], object]) -> Callable[[], None]:
    """One step in which closed gates may reopen, and those in which they may not."""

    def cycle() -> None:
        for _ in range(CYCLE):
            step()
            with torch.no_grad():
                layer.optimizer_stepped()  # pyright: ignore

    return cycle


def table(rows: list[Row]) -> str:
    """The rows for a terminal."""
    headers = [
        "dtype", "M, N, K", "gates", "block", "candidate", "ms", "dense = 1", "saved bytes",
        "peak MiB",
    ]  # fmt: skip
    cells = [
        [
            r.dtype, f"{r.M}, {r.N}, {r.K}", *_gates(r), r.provider, f"{r.ms_p50:.2f}",
            f"{r.ratio:.2f}", f"{r.saved_bytes:,}",
            "-" if math.isnan(r.peak_mib) else f"{r.peak_mib:.1f}",
        ]
        for r in measured(rows)
    ]  # fmt: skip
    return format_table(headers, cells, align="lllllrrrr")


def _gates(row: Row) -> tuple[str, str]:
    return ("none", "-") if row.provider == "dense" else (row.gate, row.block)


def tasks(arguments: argparse.Namespace) -> list[Task]:
    """The cells to measure: gates of single weights, at the first shape also drawn, and blocks."""
    shapes = QUICK_SHAPES if arguments.quick else SHAPES[arguments.device]
    kinds = [("threshold", (1, 1), shape) for shape in shapes]
    kinds += [("bernoulli", (1, 1), shapes[0]), ("threshold", BLOCK, shapes[0])]
    found = []
    for dtype in _dtypes(arguments):
        for kind, block, shape in kinds:

            def cell(dtype=dtype, kind=kind, block=block, shape=shape) -> list[Row]:
                torch.manual_seed(0)
                torch.compiler.reset()  # each cell compiles anew, whatever was before
                place = {"dtype": DTYPES[dtype], "device": arguments.device}
                seconds = arguments.seconds
                if block == (1, 1):
                    layers = per_weight(shape, kind, **place)
                    return measure(layers, shape, kind, block, 0.5, seconds)
                return measure(per_block(shape, **place), shape, kind, block, CLOSED, 2 * seconds)

            found.append(
                Task(("gated_linear", dtype, kind, f"{block[0]}x{block[1]}", *shape), cell)
            )
    return found


def _dtypes(arguments: argparse.Namespace) -> tuple[str, ...]:
    default = ("float32",) if arguments.device == "cpu" else ("bfloat16",)
    return tuple(dict.fromkeys(arguments.dtype or default))


def missing(arguments: argparse.Namespace) -> list[Row]:
    """A row for compiled gating by hand where nothing can be compiled."""
    device = torch.device(arguments.device)
    reason = peers.why_not_compile(device)
    return [
        Row(
            op="gated_linear", provider=COMPILED, pass_="forward+backward", M=0, N=0, K=0,
            dtype=dtype, block="-", density=math.nan, ratio=math.nan, tflops=math.nan,
            gb_s=math.nan, gate="-", saved_bytes=0,
            **Taken([], status=f"missing: {reason}").fields(), **where(device),
        )
        for dtype in _dtypes(arguments)
        if reason
    ]  # fmt: skip


def section(rows: list[Row], on: str, file: str) -> str:
    """The page's section."""
    found = measured(rows)
    if not found:
        return ""
    has_peak = not all(math.isnan(r.peak_mib) for r in found)
    text = paragraphs(_TEXT.format(
        on=on, file=file, closed=CLOSED, dtypes=", ".join(dict.fromkeys(r.dtype for r in found)),
        rerun="python -m bench sweep train" + " --device cuda" * bool(on),
        **summary(found),
    ))  # fmt: skip
    headers = ["M, N, K", "gates", "block", "candidate", "ms", "dense = 1", "saved, bytes"]
    headers += ["peak, MiB"] * has_peak
    lines = [f"| {' | '.join(headers)} |", "|---" * len(headers) + "|"]
    for r in found:
        cells = [f"{r.M}, {r.N}, {r.K}", *_gates(r), r.provider, f"{r.ms_p50:.2f}"]
        cells += [f"{r.ratio:.2f}", f"{r.saved_bytes:,}"] + [f"{r.peak_mib:.1f}"] * has_peak
        lines.append(f"| {' | '.join(cells)} |")
    text += "\n".join(lines) + "\n"
    if absent := notes(rows):
        text += "\nNot measured:\n\n" + "".join(f"- {line}\n" for line in absent)
    return text


SWEEP = Sweep(
    help="a gated training step beside the dense one and gating by hand",
    file="training",
    seconds=12.0,
    quick_seconds=0.5,
    of="seconds for each shape, and at least 11 turns",
    row=Row,
    key=("op", "dtype", "gate", "block", "M", "N", "K"),
    tasks=tasks,
    table=table,
    section=section,
    missing=missing,
)
