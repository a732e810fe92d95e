"""Serving a pruned linear layer: this package beside the dense layer and other libraries.

A layer whose weight holds zero blocks at random is made sparse by ``sgtriton.sparsify``, which
chooses a form for each bucket of M, and called as a model would call it. Beside it run, in turns in
one process: ``F.linear`` on the dense weight (on a CPU for 16 bits also on a copy of the weight in
fp32), this package's product over blocks whatever the layer chose, and :mod:`.peers`.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from sgtriton_kernels import BlockSparse, bsr_linear
from torch import nn

import sgtriton
from sgtriton.patterns import random_pattern

from . import peers, roofs, timed
from .grids import Sweep, Task
from .options import check_count
from .rows import rounded, where
from .serving_tables import Row, section, table
from .timed import DTYPES, Call, Taken

DENSE = ("dense", "dense, fp32 copy")  # of which the faster is 1
OURS, BLOCKS_ONLY = "sgtriton", "sgtriton, product over blocks"
_MADE = 0  # of the random numbers


@dataclass(frozen=True)
class Grid:
    """What is measured, every combination of it; shapes are (N, K)."""

    dtypes: tuple[str, ...]
    blocks: tuple[int, ...]
    sparsities: tuple[float, ...]
    shapes: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]


SPARSITIES = (0.5, 0.8, 0.9, 0.95)
GRIDS = {
    "cpu": Grid(
        ("float32", "bfloat16"), (16, 32, 64), SPARSITIES,
        ((1024, 1024), (4096, 1024), (1024, 4096)), (1, 16, 64, 512),
    ),
    "cuda": Grid(
        ("bfloat16", "float32"), (16, 32, 64, 128), SPARSITIES,
        ((4096, 4096), (14336, 4096)), (1, 16, 64, 512, 4096),
    ),
}  # fmt: skip
QUICK = Grid(("float32",), (32,), (0.5, 0.9), ((256, 256),), (1, 64))


def pruned_layer(n: int, k: int, block: int, sparsity: float, dtype: torch.dtype) -> nn.Linear:
    """A dense layer without bias, of whose blocks that share is 0, at random."""
    layer = nn.Linear(k, n, bias=False)
    grid = (n // block, k // block)
    is_open = random_pattern(grid, round(sparsity * math.prod(grid)))
    with torch.no_grad():
        mask = is_open.repeat_interleave(block, 0).repeat_interleave(block, 1)
        layer.weight.mul_(mask)
    return layer.to(dtype).eval()


@dataclass(frozen=True)
class Served:
    """A pruned layer: as ``sparsify`` makes it, its dense weight, and the blocks of that."""

    layer: nn.Module
    weight: torch.Tensor
    matrix: BlockSparse


@functools.lru_cache(maxsize=1)  # the cells that differ in M only come one after the other
def served(
    n: int, k: int, block: int, sparsity: float, dtype: torch.dtype, device: torch.device
) -> Served:
    """A layer as it is measured, the same in every run."""
    torch.manual_seed(_MADE)
    dense = pruned_layer(n, k, block, sparsity, dtype).to(device)
    weight = dense.weight.detach()
    matrix = BlockSparse.from_dense(weight, (block, block))
    model = sgtriton.sparsify(nn.Sequential(dense), block=(block, block))
    return Served(model[0], weight, matrix)


@dataclass(frozen=True)
class Candidate:
    """A provider's call, or why there is none; the share of the weights that it keeps."""

    call: Call | str
    share: float = 1.0
    keeps: Callable[[torch.Tensor], torch.Tensor] = lambda weight: weight


def candidates(of: Served, x: torch.Tensor, threads: int) -> dict[str, Candidate]:
    """What is compared in a cell, by name; the dense products come first."""
    weight, density = of.weight, of.matrix.density
    found = {"dense": Candidate(lambda: F.linear(x, weight))}
    if x.device.type == "cpu" and x.dtype != torch.float32:
        wide = weight.float()
        found["dense, fp32 copy"] = Candidate(lambda: F.linear(x.float(), wide).to(x.dtype))
    found[OURS] = Candidate(lambda: of.layer(x), density)
    found[BLOCKS_ONLY] = Candidate(lambda: bsr_linear(x, of.matrix), density)
    problem = peers.Problem(weight, of.matrix.block[0], x, threads)
    for peer, call in peers.candidates(problem):
        share = density if peer.share is None else peer.share
        found[peer.name] = Candidate(call, share, peer.keeps)
    return found


@torch.inference_mode()
def measure(of: Served, m: int, sparsity: float, seconds: float) -> list[Row]:
    """Time the candidates of one cell in turns, but those that are wrong."""
    weight, (n, k) = of.weight, of.weight.shape
    device, block = weight.device, of.matrix.block
    torch.manual_seed(m)
    x = torch.randn(m, k).to(weight)
    found = candidates(of, x, torch.get_num_threads())
    expected = F.linear(x.double(), weight.double())

    def check(name: str, out: Any) -> str | None:
        kept = found[name].keeps(weight)
        wanted = expected if kept is weight else F.linear(x.double(), kept.double())
        return timed.difference(out, wanted)

    calls = {name: candidate.call for name, candidate in found.items()}
    taken = timed.take_turns(calls, check, device, seconds, dense=DENSE)
    dense = timed.fastest(taken, DENSE)
    form = of.layer.form_of(m)  # pyright: ignore[reportCallIssue]
    return [
        Row(
            op="bsr_linear", provider=name, pass_="forward", M=m, N=n, K=k,
            dtype=str(weight.dtype).removeprefix("torch."), block=f"{block[0]}x{block[1]}",
            density=round(of.matrix.density, 4), sparsity=sparsity,
            ratio=rounded(taken[name].median / dense, 4),
            form=form if name == OURS else "-",
            **taken[name].fields(),
            **timed.product(m, n, k, candidate.share, x.itemsize).fields(taken[name].median),
            **where(device),
        )
        for name, candidate in found.items()
    ]  # fmt: skip


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add what narrows the grid."""
    command.add_argument("--rows", type=int, nargs="+", metavar="M", help="these only")
    command.add_argument("--blocks", type=int, nargs="+", metavar="SIDE", help="these only")
    command.add_argument("--sparsities", type=float, nargs="+", metavar="S", help="these only")


def tasks(arguments: argparse.Namespace) -> list[Task]:
    """The cells to measure, and before them how fast the device copies and multiplies.

    Raises:
        ValueError: M below 1, a block that does not divide the weights, a sparsity that closes no
            block or all.
    """
    grid, device = _grid(arguments), torch.device(arguments.device)
    found = [task for dtype in grid.dtypes for task in _roofs(dtype, arguments)]
    for dtype, block, sparsity, (n, k), m in itertools.product(
        grid.dtypes, grid.blocks, grid.sparsities, grid.shapes, grid.rows
    ):
        key = ("bsr_linear", dtype, f"{block}x{block}", sparsity, n, k, m)

        def cell(made=(n, k, block, sparsity, DTYPES[dtype], device), m=m) -> list[Row]:
            return measure(served(*made), m, made[3], arguments.seconds)

        found.append(Task(key, cell))
    return found


def _grid(arguments: argparse.Namespace) -> Grid:
    grid = QUICK if arguments.quick else GRIDS[arguments.device]
    asked = {
        "dtypes": arguments.dtype, "blocks": arguments.blocks,
        "sparsities": arguments.sparsities, "rows": arguments.rows,
    }  # fmt: skip
    # in the order given, each once: a cell that is there twice would be measured once
    given = {name: tuple(dict.fromkeys(values)) for name, values in asked.items() if values}
    grid = replace(grid, **given)
    check_count("--rows", min(grid.rows))
    for block in grid.blocks:
        if block < 1 or any(side % block for shape in grid.shapes for side in shape):
            raise ValueError(f"--blocks must divide the sides of {grid.shapes}, got {block}")
    for sparsity, block, (n, k) in itertools.product(grid.sparsities, grid.blocks, grid.shapes):
        blocks = (n // block) * (k // block)
        if not 0 < sparsity < 1 or not 0 < round(sparsity * blocks) < blocks:
            raise ValueError(
                f"--sparsities must close a block of each weight and leave one, got {sparsity} "
                f"for the {blocks} blocks of side {block} of {n}x{k}"
            )
    return grid


def _roofs(dtype: str, arguments: argparse.Namespace) -> list[Task]:
    device, quick = torch.device(arguments.device), arguments.quick
    found = []
    for op, (m, n, k) in roofs.sizes(device, quick).items():

        def cell(op=op, size=(m, n, k)) -> list[Row]:
            fields = roofs.measure(op, size, DTYPES[dtype], device, arguments.seconds)
            return [Row(form="-", sparsity=0.0, **fields)]

        found.append(Task((op, dtype, "-", 0.0, n, k, m), cell))
    return found


def missing(arguments: argparse.Namespace) -> list[Row]:
    """A row for each peer that cannot run here at all."""
    device = torch.device(arguments.device)
    return [
        Row(
            op="bsr_linear", provider=name, pass_="forward", M=0, N=0, K=0, dtype=dtype,
            block="-", density=math.nan, ratio=math.nan, tflops=math.nan, gb_s=math.nan,
            form="-", sparsity=math.nan, **Taken([], status=status).fields(), **where(device),
        )
        for dtype in _grid(arguments).dtypes
        for name, status in peers.missing(device, DTYPES[dtype]).items()
    ]  # fmt: skip


SWEEP = Sweep(
    help="a pruned linear layer served, beside dense and other libraries",
    file="serving",
    seconds=0.6,
    quick_seconds=0.1,
    of="seconds for each cell",
    row=Row,
    key=("op", "dtype", "block", "sparsity", "N", "K", "M"),
    tasks=tasks,
    table=table,
    section=section,
    add_arguments=add_arguments,
    missing=missing,
)
