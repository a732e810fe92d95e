"""What a part of ``python -m bench card`` is, and its first two: correctness and tuning."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from sgtriton_kernels import BlockSparse
from sgtriton_kernels._impl import resolve_impl
from sgtriton_kernels._triton import INTERPRETED
from sgtriton_kernels.cards import card_of
from sgtriton_kernels.records import architecture, device_name

from sgtriton.choice_table import file_name, make_table, measured_entries, write_table
from sgtriton.products import Product
from sgtriton.tune_report import Tuned, TuneInterrupted
from sgtriton.tuning import tune_products

from . import correctness
from .rows import append, circumstances, commit


@dataclass(frozen=True)
class Progress:
    """What a part has done so far.

    Args:
        done, of: checks, products or cells.
        failed: of those that are done.
        missing: other libraries that are not installed here.
        note: what else the summary should say.
    """

    done: int = 0
    of: int = 0
    failed: int = 0
    missing: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Part:
    """A part.

    Args:
        name: for the summary.
        share: of the time, beside those of the other parts.
        run: called with a deadline (of ``time.monotonic()``), the folder to write to and the
            device; yields what is done whenever that grows, writes as it goes, and ends by itself
            when the deadline has passed.
    """

    name: str
    share: float
    run: Callable[[float, Path, torch.device], Iterator[Progress]]


def correctness_part(deadline: float, folder: Path, device: torch.device) -> Iterator[Progress]:
    """Values of every op and variant: ``correctness.csv``."""
    place = correctness.make_place(device)
    chosen = correctness.checks(place)
    rows = []
    for row in correctness.run(chosen, place, deadline, correctness.default_jobs(place)):
        append(folder / "correctness.csv", row)
        rows.append(row)
        done = sum(r.detail != correctness.NO_TIME for r in rows)
        bad = sum(r.status in (correctness.WRONG, correctness.FAILED) for r in rows)
        yield Progress(done, len(chosen), bad, note=correctness.verdict(rows))


@dataclass(frozen=True)
class TunedRow:
    """A line of ``tuning.csv``: a product, what it takes now, and how much that gained."""

    op: str
    dtype: str
    block: str
    density: float
    M: int
    N: int
    K: int
    status: str
    candidate: str
    source: str
    gain: float
    ms: float
    threads: int
    cpu: str
    sgtriton: str
    torch: str
    python: str
    commit: str
    device: str = ""


# N, K of the weights; rows; blocks; shares of the blocks: what is tuned first comes first
_SHAPES = ((4096, 4096), (1024, 4096), (4096, 1024), (11008, 4096), (4096, 11008))
_ROWS = (16, 1, 128, 1024, 4096)
_BLOCKS = (64, 32, 128, 16)
_DENSITIES = (0.1, 0.2, 0.5)
_SECONDS = 4.0  # for a product at the least: a few tuned rather than many not reached


def tuning_part(deadline: float, folder: Path, device: torch.device) -> Iterator[Progress]:
    """Tune the standard shapes: ``tuning.csv``, and ``<card>.json``, the table that may ship.

    The sweeps that follow take what was found.
    """
    grid = list(itertools.product(_DENSITIES, _SHAPES, _BLOCKS, _ROWS))
    grid.sort(key=_importance)
    rows: list[Tuned] = []
    yield (progress := Progress(0, len(grid)))
    if INTERPRETED and resolve_impl(None, device, "tune") == "triton":
        yield Progress(0, len(grid), note="interpreted kernels are not tuned")
        return
    for i, (density, (n, k), block, m) in enumerate(grid):
        left = deadline - time.monotonic()
        if left <= 0:
            return
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        w = _random_blocks(n, k, (block, block), density, dtype, device)
        seconds = max(left / (len(grid) - i), _SECONDS)
        product = Product("standard", w, (m,), trains=device.type != "cpu")
        stopped = None
        try:
            report = tune_products([product], min(seconds, left), again=True)
        except TuneInterrupted as error:
            report, stopped = error.report, error
        for tuned in report.rows:
            append(folder / "tuning.csv", _tuned_row(tuned, device))
        rows += report.rows
        _write_table(folder, device, rows)
        if stopped is not None:
            raise stopped
        progress = Progress(i + 1, len(grid), note="; ".join(report.notes))
        yield progress


def _random_blocks(
    n: int, k: int, block: tuple[int, int], density: float, dtype: torch.dtype, device: torch.device
) -> BlockSparse:
    """A weight with a share of its blocks, at random places."""
    pattern = torch.rand(-(-n // block[0]), -(-k // block[1])) < density
    return BlockSparse.from_dense(
        torch.randn(n, k, dtype=dtype, device=device), block, pattern.to(device)
    )


def _write_table(folder: Path, device: torch.device, rows: list[Tuned]) -> None:
    arch, called = architecture(device), device_name(device)
    name = card_of(called, arch) or called
    facts = {"device": called, "torch": torch.__version__, "commit": commit()}
    table = make_table(name, arch, "measured", measured_entries(rows), facts)
    write_table(folder / file_name(name), table)


def _importance(cell: tuple[float, tuple[int, int], int, int]) -> int:
    """Cells by how far they lie from the first of each list."""
    density, shape, block, m = cell
    return _DENSITIES.index(density) + _SHAPES.index(shape) + _BLOCKS.index(block) + _ROWS.index(m)


def _tuned_row(tuned: Tuned, device: torch.device) -> TunedRow:
    cell, (bn, bk) = tuned.cell, tuned.cell.block
    return TunedRow(
        op=cell.op, dtype=str(cell.dtype).removeprefix("torch."), block=f"{bn}x{bk}",
        density=round(cell.density, 4), M=cell.M, N=cell.N, K=cell.K, status=tuned.status,
        candidate=tuned.choice.candidate.name, source=tuned.choice.source,
        gain=round(tuned.gain, 3), ms=round(tuned.ms, 4), **circumstances(),
        device=device_name(device),
    )  # fmt: skip


CORRECTNESS = Part("correctness", 3, correctness_part)
TUNING = Part("tuning", 3, tuning_part)
