"""What a search for the fastest candidates came to: a table, and the figures behind it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from sgtriton_kernels.cell import Cell
from sgtriton_kernels.lookup import Choice

from .tables import format_table


@dataclass(frozen=True)
class Tuned:
    """What became of one product: a line of the table.

    Attributes:
        name: of the layer; may be empty.
        cell: the product.
        status: ``"cached"``: a record of before was read, or that of a product before it, nothing
            timed; ``"kept"``: what was taken is the fastest; ``"changed"``; ``"not reached"``: the
            seconds did not suffice; ``"no choice"``: there is one candidate; ``"none right"``:
            every candidate is wrong or fails, what is taken now as well; ``"not compared"``: there
            was nothing to compare them with, or to time them on, as a note says.
        choice: what is taken now, and by whose word.
        gain: how much faster than what was taken before; 1 where nothing changed, infinite where
            that was wrong.
        ms: median of a call, of what is taken now; NaN where nothing was timed.
        skipped: candidate -> why it was out of the question.
        over_reasoned: how much faster than what reasoning gives; infinite where that is out of the
            question, NaN where nothing was timed.
    """

    name: str
    cell: Cell
    status: str
    choice: Choice
    gain: float = 1.0
    ms: float = float("nan")
    skipped: dict[str, str] = field(default_factory=dict)
    over_reasoned: float = float("nan")

    @property
    def result(self) -> str:
        """The status as the table shows it: of a change what it gained."""
        if self.status != "changed":
            return self.status
        return f"{self.gain:.2f}x faster" if math.isfinite(self.gain) else "was wrong"


@dataclass(frozen=True)
class TuneReport:
    """What :func:`tune` did; ``str`` gives a table.

    Attributes:
        rows: one for each product.
        seconds: that it took.
        notes: what else there is to say, such as why nothing could be kept.
    """

    rows: tuple[Tuned, ...]
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def timed(self) -> int:
        """Products whose candidates were timed."""
        return sum(row.status in ("kept", "changed") for row in self.rows)

    @property
    def wrong(self) -> int:
        """Products that no candidate computes rightly."""
        return sum(row.status == "none right" for row in self.rows)

    def __str__(self) -> str:
        return self.text()

    def text(self, width: int = 100) -> str:
        """The table for a terminal of so many columns, a line that counts, and the notes."""
        columns = {
            "layer": [row.name for row in self.rows],
            "pass": [row.cell.op.split()[-1] for row in self.rows],
            "M": [row.cell.M for row in self.rows],
            "weight": [row.cell.weight for row in self.rows],
            "block": ["{}x{}".format(*row.cell.block) for row in self.rows],
            "density": [f"{row.cell.density:.3f}" for row in self.rows],
            "takes": [row.choice.candidate.name for row in self.rows],
            "result": [row.result for row in self.rows],
            "ms": [f"{row.ms:.3f}" if row.ms == row.ms else "-" for row in self.rows],
        }
        if not any(columns["layer"]):
            del columns["layer"]
        if set(columns["pass"]) <= {"fwd"}:
            del columns["pass"]
        lines = list(zip(*columns.values(), strict=True))
        table = [format_table([*columns], lines, width=width), ""] if lines else []
        return "\n".join([*table, self._count(), *self.notes])

    def _count(self) -> str:
        text = f"{self.timed} of {len(self.rows)} products timed, {self.seconds:.1f} s"
        missed = sum(row.status == "not reached" for row in self.rows)
        if missed:
            text += f"; {missed} not reached: run again, or with more seconds"
        return text + (f"; {self.wrong} that nothing computes rightly" if self.wrong else "")


class TuneInterrupted(KeyboardInterrupt):
    """A search was interrupted from the keyboard.

    Attributes:
        report: what it had found until then, which is kept.
    """

    def __init__(self, report: TuneReport):
        super().__init__("interrupted while tuning")
        self.report = report
