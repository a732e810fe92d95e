"""The Triton kernel of ``bsr_linear`` in native CPU code, beside the dense layer of PyTorch.

It says how much of the sparsity a kernel turns into speed on a processor where both can run; the
code is what a card gets, the tiles are the CPU's.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sgtriton_kernels import BlockSparse, bsr_linear
from sgtriton_kernels._triton import triton

from sgtriton.tables import format_table
from sgtriton.timing import samples_ms

from . import timed
from .rows import circumstances, paragraphs, write
from .serving import pruned_layer

SHAPE = (4096, 1024)  # N, K
BLOCK = 64
ROWS = (1, 16, 64)
SPARSITIES = (0.8, 0.9)


_TEXT = """
## The kernel of `bsr_linear` in native CPU code

Blocks of {block}x{block}, weight {N}x{K}, fp32, Triton {triton} compiled for {cpu}, {threads}
threads, commit {commit}; beside `F.linear` on the dense weight in the same turns. The ideal is
1 / density. Rerun: `make bench-serve`.

"""


@dataclass(frozen=True)
class Row:
    """One row of the CSV: the kernel at a size; ``share`` of the ideal, which is 1 / density."""

    M: int
    N: int
    K: int
    block: int
    sparsity: float
    ms_p50: float
    dense_ms: float
    speedup: float
    share: float
    samples: int
    triton: str
    threads: int
    cpu: str
    sgtriton: str
    torch: str
    python: str
    commit: str


@torch.no_grad()
def measure(m: int, sparsity: float, seconds: float, shape: tuple[int, int] = SHAPE) -> Row:
    """Time the kernel and the dense layer in turns, after a look at the values."""
    weight = pruned_layer(*shape, BLOCK, sparsity, torch.float32).weight.detach()
    matrix, x = BlockSparse.from_dense(weight, (BLOCK, BLOCK)), torch.randn(m, shape[1])

    def kernel() -> torch.Tensor:
        return bsr_linear(x, matrix, impl="triton")

    torch.testing.assert_close(kernel(), F.linear(x, weight), rtol=1e-4, atol=1e-4)
    calls = [lambda: F.linear(x, weight), kernel]
    dense, taken = samples_ms(calls, x.device, seconds, rounds=11)
    dense_ms, ms = statistics.median(dense), statistics.median(taken)
    return Row(
        M=m, N=shape[0], K=shape[1], block=BLOCK, sparsity=sparsity,
        ms_p50=round(ms, 3), dense_ms=round(dense_ms, 3),
        speedup=round(dense_ms / ms, 3), share=round(matrix.density * dense_ms / ms, 3),
        samples=len(taken), triton=triton.__version__, **circumstances(),
    )  # fmt: skip


def markdown(rows: list[Row]) -> str:
    """A Markdown table, one row a size."""
    lines = [
        "| M | sparsity | ms | dense, ms | speed-up | of the ideal |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.M} | {r.sparsity:.0%} | {r.ms_p50:.2f} | {r.dense_ms:.2f} | {r.speedup:.2f} | "
        f"{r.share:.2f} |"
        for r in rows
    ]
    return "\n".join(lines)


def section(rows: list[Row]) -> str:
    """The page's section."""
    return paragraphs(_TEXT.format(**vars(rows[0]))) + markdown(rows) + "\n"


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``native`` to the command line."""
    command = commands.add_parser("native", help="bsr_linear's kernel in native code beside dense")
    timed.add_arguments(command, "native", 3.0, "for each size")
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    timed.require_native()
    timed.prepare(arguments)
    rows = [measure(m, sparsity, arguments.seconds) for m in ROWS for sparsity in SPARSITIES]
    write(arguments.out, rows)
    headers = ["M", "sparsity", "ms", "dense ms", "speed-up", "of ideal"]
    cells = [
        [str(r.M), f"{r.sparsity:.0%}", f"{r.ms_p50:.2f}", f"{r.dense_ms:.2f}",
         f"{r.speedup:.2f}", f"{r.share:.2f}"]
        for r in rows
    ]  # fmt: skip
    print(format_table(headers, cells, align="rrrrrr"))
    return 0
