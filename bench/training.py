"""What a gated training step costs beside the dense one: time, and memory kept for backward.

One layer, forward and backward (gradients of input, weight, bias and gates). Candidates take turns
in one process. Compared are the dense layer, gating as autograd does it (``F.linear(x, W *
ste(g))``), the same under ``torch.compile``, and this package.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, replace

import torch
from torch import nn

from sgtriton.layers import GatedLinear
from sgtriton.tables import format_table

from . import peers, timed
from .grids import Sweep, Task
from .rows import Timing, measured, notes, paragraphs, rounded, summary, where
from .timed import DTYPES, Taken, Work
from .training_steps import (
    BLOCK,
    CLOSED,
    COMPILED,
    CYCLE,
    difference,
    make_step,
    per_block,
    per_weight,
    saved_bytes,
    whole_cycle,
)

SHAPES = {  # M, N, K
    "cpu": ((512, 4096, 1024), (2048, 1024, 1024), (128, 1024, 4096), (128, 300, 784)),
    "cuda": ((512, 4096, 4096), (2048, 4096, 4096), (8192, 4096, 4096), (2048, 14336, 4096)),
}
QUICK_SHAPES = ((64, 256, 128),)


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
        steps[name] = whole_cycle(layer, step) if reopening else step
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
