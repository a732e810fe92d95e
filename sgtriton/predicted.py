"""Tables of choices for a card that is absent: compiled and ranked for it, marked *predicted*.

Such tables are how a card starts (``kernels/sgtriton_kernels/configs``), until it has measured.
"""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sgtriton_kernels._triton import version
from sgtriton_kernels.candidates import ANALYTIC, candidates
from sgtriton_kernels.cards import card
from sgtriton_kernels.cell import Cell
from sgtriton_kernels.lookup import analytic
from sgtriton_kernels.records import source

from .compilers import Compilers
from .cross_compile import COPY_ENGINES
from .files import replace_file
from .offline import Ranked, rank
from .roofline import at_sparsity

# what ships is ranked for these: usual layers, every bucket of density, and numbers of rows whose
# buckets cover all others within a factor of two
SHAPES = ((1024, 1024), (4096, 4096), (14336, 4096), (4096, 14336))
BLOCKS = (16, 32, 64, 128)
SPARSITIES = (0.5, 0.8, 0.95)
ROWS = (1, 4, 16, 64, 256, 1024, 4096)
KEPT = 1.1  # times as fast as reasoning, from which on an entry is worth its place in a table


@dataclass(frozen=True)
class Predicted:
    """What is predicted of a product on a card.

    Attributes:
        cell: the product.
        best: the candidate that should be fastest.
        reasoned: seconds of what is taken without a table.
        dropped: candidates that the card's compiler refuses, and why.
    """

    cell: Cell
    best: Ranked
    reasoned: float
    dropped: dict[str, str]

    @property
    def gain(self) -> float:
        """How much faster the best one should be than what is taken without a table."""
        assert self.best.seconds is not None
        return self.reasoned / self.best.seconds


def usual_cells(dtype: torch.dtype = torch.bfloat16) -> Iterator[Cell]:
    """The products of tables that ship, of forward."""
    for (n, k), block, sparsity, rows in itertools.product(SHAPES, BLOCKS, SPARSITIES, ROWS):
        empty = Cell("bsr_linear fwd", "triton", rows, n, k, (block, block), 0, dtype)
        yield at_sparsity(empty, sparsity)


def predict_cells(
    card_name: str,
    cells: Iterable[Cell],
    seconds: float = float("inf"),
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Predicted]:
    """Compile and rank the candidates of some products for a card.

    Args:
        card_name: one of :data:`.CARD_NAMES`.
        cells: the products, as :class:`.Cell` of Triton's kernels.
        seconds: to spend, at the most; products that are not reached are left out.
        progress: called with how many are done, how many there are, and the next one.

    Raises:
        ValueError: an unknown card; a Triton that cannot compile for it.
    """
    on, end = card(card_name), time.monotonic() + seconds
    work, found = list(cells), []
    with Compilers() as compilers:
        for done, cell in enumerate(work):
            if progress is not None:
                progress(done, len(work), f"M {cell.M}, weight {cell.N}x{cell.K}")
            if time.monotonic() > end:
                break
            reasoned = analytic(cell).candidate
            others = [c for c in candidates(cell, on.arch in COPY_ENGINES) if c != reasoned]
            ranked = rank(card_name, cell, [reasoned, *others], compilers, _finite(end))
            dropped = {r.candidate.name: r.dropped for r in ranked if r.dropped is not None}
            own = next(r for r in ranked if r.candidate == reasoned)
            if own.seconds is None:  # it ran out of time, or the card cannot run it
                if time.monotonic() > end:
                    break
                raise ValueError(f"{card_name}: {reasoned.name} cannot be taken: {own.dropped}")
            best = ranked[0]
            if best.seconds == own.seconds:
                best = own
            found.append(Predicted(cell, best, own.seconds, dropped))
    if progress is not None:
        progress(len(work), len(work), "")
    return found


def _finite(end: float) -> float | None:
    return end if end < float("inf") else None


def table_of(card_name: str, found: Sequence[Predicted]) -> dict[str, Any]:
    """The table: entries for the products where something else than reasoning should pay."""
    entries = [
        {"key": p.cell.key(), "candidate": p.best.candidate.name, "gain": round(p.gain, 2)}
        for p in found
        if p.gain >= KEPT
    ]
    return {
        "card": card_name,
        "architecture": card(card_name).arch,
        "status": "predicted",
        "ranked": len(found),
        "triton": version(),
        "source": source("triton"),
        "entries": entries,
    }


def write_table(path: Path, table: dict[str, Any]) -> None:
    """Write a table, an entry a line.

    Raises:
        OSError: it cannot be written.
    """
    head = {name: value for name, value in table.items() if name != "entries"}
    lines = [f" {json.dumps(name)}: {json.dumps(value)}," for name, value in head.items()]
    entries = ",\n".join(f"  {json.dumps(entry)}" for entry in table["entries"])
    text = "\n".join(["{", *lines, ' "entries": [', entries, " ]", "}"]) + "\n"
    replace_file(path, text.encode())


def file_name(card_name: str) -> str:
    """The name of a card's table: ``"H100 SXM"`` is ``h100_sxm.json``."""
    return re.sub(r"[^a-z0-9]+", "_", card_name.lower()) + ".json"


def shown(found: Sequence[Predicted]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of a table for a reader."""
    headers = ["M", "N, K", "block", "density", "takes", "us", "bound", "by reasoning, us", "gain"]
    rows = []
    for p in found:
        assert p.best.seconds is not None
        takes = p.best.candidate.name
        if p.best.candidate == analytic(p.cell).candidate:
            takes = f"{takes} ({ANALYTIC})"
        rows.append(
            [
                str(p.cell.M), f"{p.cell.N}, {p.cell.K}", f"{p.cell.block[0]}x{p.cell.block[1]}",
                f"{p.cell.density:.2f}", takes, f"{1e6 * p.best.seconds:.1f}", str(p.best.bound),
                f"{1e6 * p.reasoned:.1f}", f"{p.gain:.2f}x",
            ]
        )  # fmt: skip
    return headers, rows
