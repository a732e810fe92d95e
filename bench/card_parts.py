"""What a part of ``python -m bench card`` is, and its first: correctness."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from . import correctness
from .rows import append


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
    if not any(row.status == correctness.OK for row in rows):
        raise RuntimeError(f"nothing is known to be right: {correctness.verdict(rows)}")


CORRECTNESS = Part("correctness", 3, correctness_part)
