"""Bandwidth of ``gate_weight`` compiled to native CPU code, beside that of a copy.

Needs Triton's CPU compiler (``make bench-train`` sets it up). One weight with per-weight gates;
bytes are those that the result needs (:mod:`sgtriton_kernels.gate`). Both are compared with
``clone``, which allocates its result as they do.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass

import torch
from sgtriton_kernels import gate_layout, gate_weight
from sgtriton_kernels._triton import triton
from sgtriton_kernels.gate import _gate_weight_bwd, tile_for_gate_weight

from sgtriton.tables import format_table
from sgtriton.timing import samples_ms

from . import timed
from .rows import circumstances, paragraphs, write

SHAPE = (4096, 4096)


_TEXT = """
## Bandwidth of `gate_weight` in native CPU code

Per-weight threshold gates on a {N}x{K} fp32 weight, Triton {triton} compiled for {cpu}, {threads}
threads, commit {commit}; bytes that the result needs per second, beside `clone` in the same turns.
Rerun: `make bench-train`.

"""


@dataclass(frozen=True)
class Row:
    """One row of the CSV; ``ratio`` is to the copy's bandwidth in the same turns."""

    pass_: str
    dtype: str
    N: int
    K: int
    ms_p50: float
    gb_per_s: float
    copy_gb_per_s: float
    ratio: float
    threads: int
    samples: int
    cpu: str
    sgtriton: str
    torch: str
    triton: str
    python: str
    commit: str


def measure(dtype: torch.dtype, seconds: float) -> list[Row]:
    """Forward with a result in ``dtype`` and backward from a gradient in it."""
    w, gate = torch.randn(SHAPE), torch.rand(SHAPE)
    dout, layout = torch.randn(SHAPE).to(dtype), gate_layout(SHAPE, (1, 1))
    tile, count, size = tile_for_gate_weight(layout, w.device), w.numel(), dtype.itemsize
    passes = {
        "forward": (
            lambda: gate_weight(w, gate, dtype=dtype, impl="triton"),
            (4 + 4 + size) * count,
        ),
        "backward": (
            lambda: _gate_weight_bwd(dout, w, gate, None, layout, "threshold", True, tile),
            (size + 4 + 4 + 4 + 4) * count,
        ),
    }
    calls = [lambda: w.clone(), *(call for call, _ in passes.values())]
    with torch.no_grad():
        copy, *taken = samples_ms(calls, w.device, seconds, rounds=11)
    copy_rate = 8 * count / statistics.median(copy) / 1e6
    rows = []
    for (name, (_, moved)), samples in zip(passes.items(), taken, strict=True):
        ms = statistics.median(samples)
        rows.append(
            Row(
                pass_=name,
                dtype=str(dtype).removeprefix("torch."),
                N=SHAPE[0], K=SHAPE[1],
                ms_p50=round(ms, 3),
                gb_per_s=round(moved / ms / 1e6, 2),
                copy_gb_per_s=round(copy_rate, 2),
                ratio=round(moved / ms / 1e6 / copy_rate, 3),
                samples=len(samples),
                triton=triton.__version__,
                **circumstances(),
            )
        )  # fmt: skip
    return rows


def markdown(rows: list[Row]) -> str:
    """A Markdown table, one row a pass and dtype."""
    lines = ["| pass | result or gradient | GB/s | copy, GB/s | share |", "|---|---|---|---|---|"]
    lines += [
        f"| {r.pass_} | {r.dtype} | {r.gb_per_s:.1f} | {r.copy_gb_per_s:.1f} | {r.ratio:.0%} |"
        for r in rows
    ]
    return "\n".join(lines)


def section(rows: list[Row]) -> str:
    """The page's section."""
    return paragraphs(_TEXT.format(**vars(rows[0]))) + markdown(rows) + "\n"


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``bandwidth`` to the command line."""
    command = commands.add_parser("bandwidth", help="gate_weight in native code beside a copy")
    timed.add_arguments(command, "bandwidth", 10.0, "for each dtype")
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    timed.require_native()
    timed.prepare(arguments)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        rows += measure(dtype, arguments.seconds)
    write(arguments.out, rows)
    headers = ["pass", "dtype", "ms", "GB/s", "copy GB/s", "share of copy"]
    cells = [
        [r.pass_, r.dtype, f"{r.ms_p50:.2f}", f"{r.gb_per_s:.1f}", f"{r.copy_gb_per_s:.1f}",
         f"{r.ratio:.0%}"]
        for r in rows
    ]  # fmt: skip
    print(format_table(headers, cells, align="llrrrr"))
    return 0
