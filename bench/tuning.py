"""What the tuner chooses beside what an exhaustive search finds, on a CPU.

For each cell the tuner searches as a user would have it, from nothing; then every candidate is
timed in turns, the second-level cache cold, and the tuned and the reasoned choice are compared with
the fastest. A choice that is the fastest has the ratio 1.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import textwrap
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from sgtriton_kernels import BlockSparse
from sgtriton_kernels.bsr_choice import cell_of
from sgtriton_kernels.candidates import candidates
from sgtriton_kernels.lookup import analytic

from sgtriton.bsr_problem import BsrLinearProblem
from sgtriton.cold import ColdTimer
from sgtriton.search import Found, search
from sgtriton.tables import format_table

from . import timed
from .options import check_count
from .rows import circumstances, paragraphs, write

# N, K, block, share of the blocks that is stored; each at two numbers of rows. What is taken
# without tuning was fitted to these ...
FITTED = (
    (1024, 1024, 16, 0.2), (4096, 1024, 64, 0.1), (1024, 4096, 32, 0.1), (512, 512, 32, 0.5),
    (300, 784, 4, 0.1), (2048, 512, 16, 0.05), (768, 3072, 64, 0.2), (1024, 1024, 128, 0.3),
    (128, 4096, 32, 0.2), (1000, 1000, 8, 0.1),
)  # fmt: skip
# ... and not to these
HELD_OUT = (
    (1536, 512, 32, 0.15), (640, 2560, 64, 0.25), (2048, 2048, 64, 0.05), (896, 896, 16, 0.3),
    (3072, 768, 128, 0.15), (512, 2048, 8, 0.2), (1024, 256, 32, 0.05), (2000, 500, 4, 0.1),
    (256, 4096, 64, 0.5), (1280, 1280, 32, 0.3),
)  # fmt: skip
ROWS = (1, 64)
SECONDS, ROUNDS = 4.0, 61  # for the tuner, in each cell, and of all candidates: of the kept CSV
TUNED_WITHIN, REASONED_WITHIN = 1.03, 1.15  # of the fastest, that is aimed at


@dataclass(frozen=True)
class Row:
    """One row of the CSV: a candidate in a cell.

    Args:
        tuned, analytic: 1 of the choice that the tuner makes, and of the one without it.
        fitted: 1 in cells that the latter was fitted to.
        ratio: of its median to the fastest's.
        samples: of the candidate.
        seconds, rounds: for the tuner, and of the candidates, as asked for.
    """

    candidate: str
    tuned: int
    analytic: int
    fitted: int
    M: int
    N: int
    K: int
    block: int
    density: float
    ms_p20: float
    ms_p50: float
    ms_p80: float
    ratio: float
    samples: int
    seconds: float
    rounds: int
    threads: int
    cpu: str
    sgtriton: str
    torch: str
    python: str
    commit: str


@torch.no_grad()
def measure(
    n: int, k: int, block: int, share: float, m: int, seconds: float, rounds: int, fitted: bool
) -> list[Row]:
    """Search one cell, then time all that is right in it."""
    is_open = torch.rand(-(-n // block), -(-k // block)) < share
    w = BlockSparse.from_dense(torch.randn(n, k), (block, block), open=is_open)
    cell = cell_of("fwd", w, "torch", torch.empty(m, k))
    problem = BsrLinearProblem(cell, w, torch.Generator().manual_seed(0))
    reasoned, all_of_them = analytic(cell).candidate, candidates(cell)
    found = search(problem, reasoned, all_of_them, time.perf_counter() + seconds)
    tuned = found.candidate if isinstance(found, Found) else reasoned
    right = [c for c in all_of_them if problem.wrong(c) is None]
    timer = ColdTimer(problem.device)
    samples: dict[str, list[float]] = {c.name: [] for c in right}
    for done in range(rounds):
        for candidate in right:
            taken = samples[candidate.name]
            far = done >= 3 and min(taken) > 3 * min(map(min, samples.values()))
            if not far:  # what is thrice as slow needs no more
                call = functools.partial(problem.call, candidate)
                taken.append(timer.warmed_ms(call, min(taken, default=0.0)))
    fastest = min(map(statistics.median, samples.values()))
    rows = []
    for name, ms in samples.items():
        p20, p50, p80 = timed.quantiles(ms)
        rows.append(
            Row(
                candidate=name, tuned=int(name == tuned.name), analytic=int(name == reasoned.name),
                fitted=int(fitted), M=m, N=n, K=k, block=block, density=round(cell.density, 4),
                ms_p20=round(p20, 4), ms_p50=round(p50, 4), ms_p80=round(p80, 4),
                ratio=round(statistics.median(ms) / fastest, 4), samples=len(ms),
                seconds=seconds, rounds=rounds, **circumstances(),
            )
        )  # fmt: skip
    return rows


@dataclass(frozen=True)
class Cell:
    """What the rows of one cell say."""

    M: int
    N: int
    K: int
    block: int
    density: float
    fitted: int
    fastest: str
    fastest_ms: float
    tuned: str
    tuned_ratio: float
    analytic: str
    analytic_ratio: float


def cells(rows: Iterable[Row]) -> list[Cell]:
    """The rows by cell."""
    found = []
    for key, group in itertools.groupby(
        rows, lambda r: (r.M, r.N, r.K, r.block, r.density, r.fitted)
    ):
        group = list(group)
        best = min(group, key=lambda r: r.ratio)
        tuned = next(r for r in group if r.tuned)
        reasoned = next(r for r in group if r.analytic)
        found.append(
            Cell(
                *key, best.candidate, best.ms_p50, tuned.candidate, tuned.ratio,
                reasoned.candidate, reasoned.ratio,
            )
        )  # fmt: skip
    return found


HEADERS = ["N, K", "block", "density", "M", "fastest", "ms", "tuned", "", "reasoned", ""]


def lines(found: Iterable[Cell]) -> list[list[str]]:
    """The cells as a table's rows."""
    return [
        [
            f"{c.N}, {c.K}", f"{c.block}x{c.block}", f"{c.density:.2f}", str(c.M), c.fastest,
            f"{c.fastest_ms:.3f}", c.tuned, f"{c.tuned_ratio:.2f}", c.analytic,
            f"{c.analytic_ratio:.2f}",
        ]
        for c in found
    ]  # fmt: skip


def in_words(found: Iterable[Cell]) -> str:
    """How near to the fastest both choices are: a paragraph for each set of cells."""
    sets: dict[int, list[Cell]] = {}
    for cell in found:
        sets.setdefault(cell.fitted, []).append(cell)
    return "\n\n".join(textwrap.fill(_of_set(sets[fitted]), 100) for fitted in sorted(sets)[::-1])


def _of_set(found: list[Cell]) -> str:
    which = f"that the reasoned choice was {'' if found[0].fitted else 'not '}fitted to"
    tuned = [c.tuned_ratio for c in found]
    reasoned = [c.analytic_ratio for c in found]
    return (
        f"Of {len(found)} cells {which}, the tuned one is within {TUNED_WITHIN - 1:.0%} of the "
        f"fastest in {sum(r <= TUNED_WITHIN for r in tuned)} (at most {max(tuned):.2f} of its "
        f"time), the reasoned one within {REASONED_WITHIN - 1:.0%} in "
        f"{sum(r <= REASONED_WITHIN for r in reasoned)} (at most {max(reasoned):.2f}); the tuned "
        f"one takes longer than the reasoned one in "
        f"{sum(t > TUNED_WITHIN * r for t, r in zip(tuned, reasoned, strict=True))}."
    )


_SECTION = """
## What the tuner chooses

{count} products on {threads} threads of {cpu}, PyTorch {torch}, commit {commit}: the choice that
`sgtriton tune` makes in {seconds:g} seconds for each, and the one that is taken without it, beside
the fastest of all candidates, each timed in turns with a cold second-level cache. A choice's figure
is its time by the fastest's. Rerun: `python -m bench tuning`.

"""


def section(rows: list[Row]) -> str:
    """The part of the page."""
    found = cells(rows)
    head = [
        "N, K", "block", "density", "M", "fastest", "ms", "tuned", "by the fastest", "reasoned",
        "by the fastest",
    ]  # fmt: skip
    table = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    table += [f"| {' | '.join(line)} |" for line in lines(found)]
    text = "\n".join(table) + "\n\n" + in_words(found) + "\n"
    return paragraphs(_SECTION.format(**vars(rows[0]), count=len(found))) + text


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``tuning`` to the command line."""
    command = commands.add_parser("tuning", help="the tuner's choices beside an exhaustive search")
    timed.add_arguments(command, "tuning", SECONDS, "for the tuner, in each cell")
    command.add_argument("--rounds", type=int, default=ROUNDS, help="of all candidates, in turns")
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    check_count("--rounds", arguments.rounds)
    timed.prepare(arguments, asked={"--rounds": (arguments.rounds, ROUNDS)})
    found = cells(write(arguments.out, _measured(arguments)))
    print(format_table(HEADERS, lines(found), align="lrrrlrlrlr"))
    print(in_words(found))
    return 0


def _measured(arguments: argparse.Namespace) -> Iterator[Row]:
    for fitted, weights in ((True, FITTED), (False, HELD_OUT)):
        for weight, m in itertools.product(weights, ROWS):
            yield from measure(*weight, m, arguments.seconds, arguments.rounds, fitted)
