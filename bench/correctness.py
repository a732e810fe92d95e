"""Correctness of every op and variant on a device: what runs before anything is timed there.

Each check compares an op with its slow reference in fp64 (within twice PyTorch's own error in the
same dtype), over memory that held NaN, and asks for the same bits from every repeat. Sizes are
ragged, of one row and of none. One check that fails stops no other.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from sgtriton_kernels import _triton
from sgtriton_kernels._impl import resolve_impl
from sgtriton_kernels.records import device_name

import sgtriton
from sgtriton.tables import format_table

from . import (
    checks_blocks,
    checks_conv,
    checks_conv_tiles,
    checks_gates,
    checks_large,
    checks_penalties,
    checks_tiles,
)
from .judge import Check, Place, SkippedError, WrongError
from .options import check_count, check_file, check_minutes, device_of
from .rows import append, commit
from .workers import Lost, in_processes

OK, WRONG, FAILED, SKIPPED = "ok", "wrong", "failed", "skipped"
NO_TIME = "no time left"


@dataclass(frozen=True)
class Row:
    """One check's result; ``detail`` is the error, or why it was skipped."""

    op: str
    variant: str
    dtype: str
    shape: str
    status: str
    detail: str
    seconds: float
    impl: str
    device: str
    sgtriton: str
    torch: str
    triton: str
    commit: str


def checks(place: Place) -> list[Check]:
    """All checks; ops take turns, and what matters most of each comes first."""
    lists = [
        checks_gates.gate_weight_checks(place),
        checks_gates.gated_linear_checks(place),
        checks_tiles.bsr_linear_tile_checks(place),
        checks_blocks.bsr_linear_checks(place),
        checks_conv.bsr_conv_checks(place),
        checks_conv_tiles.bsr_conv_tile_checks(place),
        checks_penalties.gate_penalties_checks(place),
        checks_penalties.pack_gates_checks(place),
        checks_conv.bsr_convert_checks(place),
        checks_large.large_checks(place),
    ]
    return [check for turn in itertools.zip_longest(*lists) for check in turn if check is not None]


def make_place(device: torch.device, impl: str | None = None, quick: bool = False) -> Place:
    """The place that these name; the implementation is chosen as an op would.

    Raises:
        ValueError: an implementation that cannot run on the device.
    """
    return Place(device, resolve_impl(impl, device, "correctness"), quick)


def run(
    chosen: Sequence[Check],
    place: Place,
    until: float = float("inf"),
    jobs: int = 1,
    limit: float = 120,
) -> Iterator[Row]:
    """Run checks, in this process or in several.

    Args:
        until: of ``time.monotonic()``; checks that have not ended (of one job: begun) by then are
            skipped.
        jobs: processes. From two on a check that crashes, hangs or breaks the device costs itself
            alone, and kernels are compiled side by side.
        limit: seconds for a check in a process of its own.
    """
    if jobs < 2:
        for check in chosen:
            yield run_one(check, place) if time.monotonic() < until else row(check, place)
        return
    left = {check.name: check for check in chosen}
    task = functools.partial(_in_process, place)
    found = in_processes(
        task, list(left), jobs, until, limit, is_last=lambda result: result.status == FAILED
    )
    for name, result in found:
        check = left.pop(name)
        if isinstance(result, Lost):
            yield row(check, place, FAILED, result.reason)
        else:
            yield result
    for check in left.values():
        yield row(check, place)


def _in_process(place: Place, name: str) -> Row:
    return run_one(_by_name(place)[name], place)


@functools.cache
def _by_name(place: Place) -> dict[str, Check]:
    return {check.name: check for check in checks(place)}


def run_one(check: Check, place: Place) -> Row:
    """Run one check; its random numbers depend on its name alone."""
    torch.manual_seed(zlib.crc32(check.name.encode()))
    start, status, detail = time.monotonic(), OK, ""
    try:
        check.run()
        if place.is_card:  # what a kernel did wrong shows when it is waited for
            torch.accelerator.synchronize(place.device)
    except WrongError as error:
        status, detail = WRONG, str(error)
    except SkippedError as error:
        status, detail = SKIPPED, str(error)
    except Exception as error:
        status, detail = FAILED, _one_line(error)
    return row(check, place, status, detail, time.monotonic() - start)


def row(
    check: Check, place: Place, status: str = SKIPPED, detail: str = NO_TIME, seconds: float = 0.0
) -> Row:
    """A check's row; by default of one that there was no time for."""
    return Row(
        check.op, check.variant, check.dtype, check.shape, status, detail, round(seconds, 3),
        place.impl, device_name(place.device), sgtriton.__version__, torch.__version__,
        triton_version(), commit(),
    )  # fmt: skip


def default_jobs(place: Place) -> int:
    """Processes that compile side by side for a card; a CPU is busy with one."""
    return min(8, os.cpu_count() or 1) if place.is_card else 1


def triton_version() -> str:
    """Triton's version, ``-`` without one."""
    return "-" if _triton._MISSING else str(_triton.triton.__version__)


def table(rows: Iterable[Row], width: int = 120) -> str:
    """Counts by op, then every check that went wrong."""
    rows = list(rows)
    counts: dict[str, Counter[str]] = {}
    for r in rows:
        counts.setdefault(r.op, Counter())[r.status] += 1
    statuses = (OK, WRONG, FAILED, SKIPPED)
    text = format_table(
        ["op", *statuses, "seconds"],
        [
            [op, *(of[s] for s in statuses), f"{sum(r.seconds for r in rows if r.op == op):.1f}"]
            for op, of in counts.items()
        ],
        width=width,
    )
    bad = [r for r in rows if r.status in (WRONG, FAILED)]
    lines = [f"{r.status}: {r.op}, {r.variant}, {r.dtype}, {r.shape}: {r.detail}" for r in bad]
    reasons = Counter(r.detail for r in rows if r.status == SKIPPED)
    lines += [f"skipped {count}: {reason}" for reason, count in reasons.items()]
    return "\n".join([text, "", *lines, *([""] if lines else []), verdict(rows)])


def verdict(rows: Sequence[Row]) -> str:
    """One line: how many checks are ok."""
    late = sum(r.detail == NO_TIME for r in rows)
    of = Counter(r.status for r in rows if r.detail != NO_TIME)
    text = f"{of[OK]} of {len(rows)} checks ok, " + ", ".join(
        f"{of[s]} {s}" for s in (WRONG, FAILED, SKIPPED)
    )
    return f"{text}, {late} not reached" if late else text


def is_bad(rows: Iterable[Row]) -> bool:
    """Whether a check is wrong or failed."""
    return any(r.status in (WRONG, FAILED) for r in rows)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``correctness`` to the command line."""
    command = commands.add_parser("correctness", help="values of every op and variant on a device")
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    command.add_argument("--impl", choices=("triton", "torch"), help="default: by the device")
    command.add_argument("--quick", action="store_true", help="few checks, two repeats")
    command.add_argument("--minutes", type=float, help="stop then; default: when all is checked")
    command.add_argument("--jobs", type=int, help="processes; default 1 on a CPU, 8 on a card")
    command.add_argument("--op", action="append", help="this op only; repeatable")
    command.add_argument("--out", type=Path, help="write the rows there too, as a new CSV")
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    place = make_place(device_of(arguments.device), arguments.impl, arguments.quick)
    jobs = default_jobs(place) if arguments.jobs is None else arguments.jobs
    check_count("--jobs", jobs)
    until = float("inf")
    if arguments.minutes is not None:
        check_minutes(arguments.minutes)
        until = time.monotonic() + 60 * arguments.minutes
    if arguments.out is not None:
        check_file("--out", arguments.out)
        if arguments.out.exists():
            raise ValueError(f"--out must not be there yet, got {arguments.out}")
    chosen = checks(place)
    names = list(dict.fromkeys(check.op for check in chosen))
    if unknown := [op for op in arguments.op or () if op not in names]:
        raise ValueError(f"--op must be one of {', '.join(names)}; got {', '.join(unknown)}")
    chosen = [check for check in chosen if not arguments.op or check.op in arguments.op]
    rows, told = [], time.monotonic()
    for result in run(chosen, place, until, jobs):
        rows.append(result)
        if arguments.out is not None:
            append(arguments.out, result)
        if time.monotonic() > told + 5 or len(rows) == len(chosen):
            print(f"{len(rows)} of {len(chosen)} checks", file=sys.stderr, flush=True)
            told = time.monotonic()
    print(table(rows))
    return 0 if any(r.status == OK for r in rows) and not is_bad(rows) else 1
