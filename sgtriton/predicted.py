"""Tables of choices for a card that is absent: compiled and ranked for it, marked *predicted*.

Such tables are how a card starts (``kernels/sgtriton_kernels/configs``), until it has measured.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from sgtriton_kernels.bsr_choice import longest_row
from sgtriton_kernels.candidate import ANALYTIC
from sgtriton_kernels.candidates import candidates
from sgtriton_kernels.cards import card
from sgtriton_kernels.cell import OPS, Cell
from sgtriton_kernels.lookup import BELIEVED, analytic

from .choice_table import entry_of, make_table, with_stops
from .compilers import NO_TIME, Compilers
from .cross_compile import COPY_ENGINES
from .offline import Ranked, rank
from .products import Product
from .roofline import at_sparsity
from .schedule import row_lengths

# what ships is ranked for these: usual layers, every bucket of density, and numbers of rows whose
# buckets cover all others within a factor of two
SHAPES = ((1024, 1024), (4096, 4096), (14336, 4096), (4096, 14336))
BLOCKS = (16, 32, 64, 128)
SPARSITIES = (0.5, 0.8, 0.95)
ROWS = (1, 4, 16, 64, 256, 1024, 4096)


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


class PredictInterrupted(KeyboardInterrupt):
    """A ranking was interrupted from the keyboard.

    Attributes:
        found: the products that it had ranked until then.
    """

    def __init__(self, found: list[Predicted]):
        super().__init__("interrupted while ranking")
        self.found = found


def open_at_random(cell: Cell, sparsity: float) -> Cell:
    """The same product with a random pattern, which is what predictions are of.

    At least one block is open: a product of nothing is never looked up. Where rows have few blocks
    the longest is far above the mean, and lookups ask for that.
    """
    cell = at_sparsity(cell, sparsity)
    cell = replace(cell, nnz=max(1, cell.nnz))
    lengths = row_lengths(cell.block_rows, cell.block_cols, cell.nnz)
    return replace(cell, longest=lengths[0])


def passes(cell: Cell, trains: bool) -> Iterator[Cell]:
    """Forward of a product, and the gradients of ``x`` and of the values if it trains.

    Rows are taken to lie one behind the other, so that they are read in wide pieces where their
    length allows it.
    """
    for op in OPS if trains else OPS[:1]:
        read = {"fwd": (cell.K,), "dx": (cell.N,), "dvalues": (cell.N, cell.K)}[pass_of(op)]
        yield replace(cell, op=op, aligned=all(length % 16 == 0 for length in read))


def pass_of(op: str) -> str:
    """``"fwd"`` | ``"dx"`` | ``"dvalues"``."""
    return op.split()[-1]


def usual_cells(dtype: torch.dtype = torch.bfloat16, trains: bool = False) -> Iterator[Cell]:
    """The products of usual layers; those of tables that ship are of forward alone."""
    for (n, k), block, sparsity, rows in itertools.product(SHAPES, BLOCKS, SPARSITIES, ROWS):
        empty = Cell(OPS[0], "triton", rows, n, k, (block, block), 0, dtype)
        yield from passes(open_at_random(empty, sparsity), trains)


def cells_of(product: Product) -> Iterator[Cell]:
    """The passes of a weight with each number of rows, by Triton's kernels.

    Of its pattern the number of blocks counts and, for lookups, the longest block row; predictions
    are of a random one.
    """
    w = product.matrix
    for m in product.rows:
        cell = Cell(
            OPS[0], "triton", m, *w.shape, w.block, w.nnz, w.values.dtype, longest_row(w.crow)
        )
        yield from passes(cell, product.trains)


def predict_cells(
    card_name: str,
    cells: Iterable[Cell],
    seconds: float = float("inf"),
    progress: Callable[[int, int, str], None] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Predicted]:
    """Compile and rank the candidates of some products for a card.

    Args:
        card_name: one of :data:`.CARD_NAMES`.
        cells: the products, as :class:`.Cell` or :class:`.ConvCell` of Triton's kernels.
        seconds: to spend, at the most; products that are not reached are left out, and so is one
            of whose candidates some are not.
        progress: called with how many are done, how many there are, and the next one.
        say: gets a line for each product that is left out though it was reached.

    Raises:
        ValueError: an unknown card; a Triton that cannot compile for it.
        PredictInterrupted: a ``KeyboardInterrupt``; has what was found until then.
    """
    on, end = card(card_name), time.monotonic() + seconds
    work, found = list(cells), []
    try:
        with Compilers() as compilers:
            for done, cell in enumerate(work):
                label = f"M {cell.M}, weight {cell.weight}"
                if (which := pass_of(cell.op)) != "fwd":
                    label += f", {which}"
                if progress is not None:
                    progress(done, len(work), label)
                if time.monotonic() > end:
                    break
                reasoned = analytic(cell).candidate
                others = [c for c in candidates(cell, on.arch in COPY_ENGINES) if c != reasoned]
                ranked = rank(card_name, cell, [reasoned, *others], compilers, end)
                late = sum(r.dropped == NO_TIME for r in ranked)
                if late:  # the fastest may be among those
                    count = f"{late} of {len(ranked)} candidates"
                    say(f"{label} is left out: no time was left to compile {count}")
                    break
                own = next(r for r in ranked if r.candidate == reasoned)
                if own.seconds is None:
                    why = f"{reasoned.name}, which reasoning takes, is refused: {own.dropped}"
                    say(f"{label} is left out: {why}")
                    continue
                best = own if ranked[0].seconds == own.seconds else ranked[0]
                dropped = {r.candidate.name: r.dropped for r in ranked if r.dropped is not None}
                found.append(Predicted(cell, best, own.seconds, dropped))
    except KeyboardInterrupt:
        raise PredictInterrupted(found) from None
    if progress is not None:
        progress(len(work), len(work), "")
    return found


def table_of(card_name: str, found: Sequence[Predicted]) -> dict[str, Any]:
    """The table: entries for the products where something else than reasoning should pay.

    What is predicted of a random pattern is said of even and of uneven ones: it is all there is.
    """
    entries, reasoned = [], []
    for p in found:
        for balance in ("even", "uneven"):
            key = p.cell.key() | {"balance": balance}
            if p.gain >= BELIEVED:
                name = p.best.candidate.name
                entries.append({"key": key, "candidate": name, "gain": round(p.gain, 2)})
            else:
                reasoned.append(key)
    entries = with_stops(entries, reasoned)
    facts = {"ranked": len(found)}
    return make_table(card_name, card(card_name).arch, "predicted", entries, facts)


def shown(
    found: Sequence[Predicted], names: Mapping[str, str] | None = None
) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of a table for a reader.

    Args:
        names: :func:`.entry_of` a product's key -> the layers that it is of.
    """
    headers = [
        "pass", "M", "N, K", "block", "density", "takes", "us", "bound", "untuned, us", "gain",
    ]  # fmt: skip
    if names:
        headers.insert(0, "layer")
    rows = []
    for p in found:
        assert p.best.seconds is not None
        takes = p.best.candidate.name
        if p.best.candidate == analytic(p.cell).candidate:
            takes = f"{takes} ({ANALYTIC})"
        row = [
            pass_of(p.cell.op), str(p.cell.M), f"{p.cell.N}, {p.cell.K}",
            f"{p.cell.block[0]}x{p.cell.block[1]}", f"{p.cell.density:.2f}", takes,
            f"{1e6 * p.best.seconds:.1f}", str(p.best.bound), f"{1e6 * p.reasoned:.1f}",
            f"{p.gain:.2f}x",
        ]  # fmt: skip
        rows.append([names[entry_of(p.cell.key())], *row] if names else row)
    return headers, rows
