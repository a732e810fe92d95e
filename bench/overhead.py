"""What a call costs beside the arithmetic: a product so small that only the call is left.

A weight of 64x64 with half of its 16x16 blocks closed, one row of ``x``; a convolution of 32
channels by 3x3 on 4x4 pixels. This package's ops and layers take turns with the dense ones, under
``torch.inference_mode``, under ``torch.no_grad``, and with gradients (forward only).
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sgtriton_kernels import BlockSparse, bsr_conv2d, bsr_linear
from torch import nn

import sgtriton
from sgtriton.tables import format_table

from . import timed
from .conv import pruned_weight
from .rows import circumstances, paragraphs, write
from .serving import pruned_layer

SIDE, BLOCK, CLOSED = 64, 16, 0.5
CHANNELS = 32
_ROUNDS, _IN_A_ROW = 11, 30
MODES = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "gradients": contextlib.nullcontext,
}


_TEXT = """
## What a call costs

Microseconds of one of 30 calls in a row, with next to no arithmetic (in brackets: over the dense
call in its group, in the same turns): one row by a 64x64 weight, half of its 16x16 blocks closed;
3x3 convolution of 32 channels on 4x4 pixels, no block closed. Forward only, nothing is cold;
{threads} threads of {cpu}, PyTorch {torch}, commit {commit}. Rerun: `make bench-serve`.

"""


@dataclass(frozen=True)
class Row:
    """One row of the CSV: a call in a mode; ``over`` is the time over the dense call's."""

    call: str
    mode: str
    us_p50: float
    dense_us: float
    over: float
    samples: int
    threads: int
    cpu: str
    sgtriton: str
    torch: str
    python: str
    commit: str


def candidates(requires_grad: bool) -> dict[str, dict[str, Callable[[], object]]]:
    """The calls by name, in groups of which the first is the dense one."""
    dense = pruned_layer(SIDE, SIDE, BLOCK, CLOSED, torch.float32)
    bias = torch.randn(SIDE, requires_grad=requires_grad)
    x = torch.randn(1, SIDE, requires_grad=requires_grad)
    weight = dense.weight.detach().clone().requires_grad_(requires_grad)
    matrix = BlockSparse.from_dense(weight.detach(), (BLOCK, BLOCK))
    matrix.values.requires_grad_(requires_grad)
    layers = {
        form: sgtriton.sparsify(
            nn.Sequential(pruned_layer(SIDE, SIDE, BLOCK, CLOSED, torch.float32)),
            block=(BLOCK, BLOCK),
            form=form,
        )[0]
        for form in ("dense", "sparse")
    }
    conv_matrix, conv_weight = pruned_weight(CHANNELS, CHANNELS, 0.0, torch.float32)
    image = torch.randn(1, CHANNELS, 4, 4, requires_grad=requires_grad)
    conv_weight.requires_grad_(requires_grad)
    conv_matrix.values.requires_grad_(requires_grad)

    def blocks_conv() -> torch.Tensor:
        return bsr_conv2d(image, conv_matrix, padding=1, out_channels=CHANNELS, kernel_size=3)

    return {
        "linear": {
            "F.linear": lambda: F.linear(x, weight, bias),
            "bsr_linear": lambda: bsr_linear(x, matrix, bias),
        },
        "linear layer": {
            "nn.Linear": lambda: dense(x),
            "served layer, dense": lambda: layers["dense"](x),
            "served layer, sparse": lambda: layers["sparse"](x),
        },
        "convolution": {
            "F.conv2d": lambda: F.conv2d(image, conv_weight, padding=1),
            "bsr_conv2d": blocks_conv,
        },
    }


def back_to_back_ms(calls: Sequence[Callable[[], object]], seconds: float) -> list[list[float]]:
    """Milliseconds of one of many calls in a row, turn by turn; nothing is cold."""
    samples: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    while len(samples[0]) < _ROUNDS or time.perf_counter() < end:
        for call, taken in zip(calls, samples, strict=True):
            call()
            begin = time.perf_counter()
            for _ in range(_IN_A_ROW):
                call()
            taken.append(1e3 * (time.perf_counter() - begin) / _IN_A_ROW)
    return samples


def measure(mode: str, seconds: float) -> list[Row]:
    """Time the calls of each group in turns."""
    rows = []
    for group in candidates(mode == "gradients").values():
        with MODES[mode]():
            taken = back_to_back_ms(list(group.values()), seconds)
        medians = [1e3 * statistics.median(ms) for ms in taken]
        rows += [
            Row(
                call=name, mode=mode, us_p50=round(us, 1), dense_us=round(medians[0], 1),
                over=round(us - medians[0], 1), samples=len(ms), **circumstances(),
            )
            for name, us, ms in zip(group, medians, taken, strict=True)
        ]  # fmt: skip
    return rows


def markdown(rows: list[Row]) -> str:
    """A Markdown table, one row a call."""
    lines = [f"| call | {' | '.join(MODES)} |", "|---" * (len(MODES) + 1) + "|"]
    for name in dict.fromkeys(r.call for r in rows):
        of = {r.mode: r for r in rows if r.call == name}
        cells = [
            f"{of[mode].us_p50:.1f}" + (f" (+{over:.1f})" if (over := of[mode].over) > 0 else "")
            for mode in MODES
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def section(rows: list[Row]) -> str:
    """The page's section."""
    return paragraphs(_TEXT.format(**vars(rows[0]))) + markdown(rows) + "\n"


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``overhead`` to the command line."""
    command = commands.add_parser("overhead", help="what a call costs beside the arithmetic")
    timed.add_arguments(command, "overhead", 2.0, "for each group of calls in a mode")
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    timed.prepare(arguments)
    rows = [row for mode in MODES for row in measure(mode, arguments.seconds)]
    write(arguments.out, rows)
    cells = [[r.call, r.mode, f"{r.us_p50:.1f}", f"{r.over:.1f}"] for r in rows]
    print(format_table(["call", "mode", "us", "over dense"], cells, align="llrr"))
    return 0
