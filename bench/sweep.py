"""``python -m bench sweep NAME``: measure a grid of cells into a CSV, one row a provider and cell.

Rows of a cell are in ``<out>.part`` as soon as it is measured; the file of before stays until the
grid is whole. A sweep that was stopped goes on where it was. Nothing is timed whose first result
differs from the reference in fp64.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sgtriton.progress import Progress

from . import conv, models, serving, timed, training
from .grids import Sweep, Task
from .options import device_of
from .rows import Timing, append, notes, read, where
from .timed import DTYPES

SWEEPS = {
    "train": training.SWEEP, "serve": serving.SWEEP, "conv": conv.SWEEP, "model": models.SWEEP,
}  # fmt: skip


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``sweep`` to the command line."""
    command = commands.add_parser("sweep", help="measure a grid of cells, beside other libraries")
    names = command.add_subparsers(required=True, metavar="NAME")
    for name, sweep in SWEEPS.items():
        one = names.add_parser(name, help=sweep.help)
        one.add_argument("--device", default="cpu", help="cpu or cuda; default cpu")
        one.add_argument("--dtype", nargs="+", choices=list(DTYPES), help="these only")
        one.add_argument("--quick", action="store_true", help="a small grid, under a minute")
        sweep.add_arguments(one)
        timed.add_arguments(one, sweep.file, sweep.seconds, sweep.of)
        one.add_argument(
            "--fresh", action="store_true", help="do not go on with what a stop has left"
        )
        one.set_defaults(sweep=sweep, seconds=None, run=_run)


def prepare(sweep: Sweep, arguments: argparse.Namespace) -> list[Task]:
    """Settle the arguments, and give the cells to measure.

    Raises:
        ValueError: no such device; arguments that no grid has; a part of the grid without
            ``--out``.
    """
    device_of(arguments.device)
    if arguments.seconds is None:
        arguments.seconds = sweep.quick_seconds if arguments.quick else sweep.seconds
    if arguments.device != "cpu":  # a GPU's results have a folder of their own
        name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
        arguments.kept = arguments.kept.parent / name / arguments.kept.name
    tasks = sweep.tasks(arguments)
    timed.prepare(arguments, [t.key for t in tasks] == _whole_grid(sweep, arguments.device))
    return tasks


def _whole_grid(sweep: Sweep, device: str) -> list[tuple[Any, ...]]:
    parser = argparse.ArgumentParser()
    sweep.add_arguments(parser)
    whole = parser.parse_args([])
    whole.__dict__ |= {"device": device, "dtype": None, "quick": False, "seconds": 0.0}
    return [task.key for task in sweep.tasks(whole)]


def measure(
    sweep: Sweep, tasks: Sequence[Task], head: list[Any], path: Path, here: dict[str, Any],
    fresh: bool = False,
) -> list[Any]:  # fmt: skip
    """Measure the cells that ``<path>.part`` lacks.

    Args:
        tasks: all cells of the grid.
        head: rows that belong to no cell.
        path: replaced when each of this package's results was right.
        here: what :func:`.rows.where` says, and the ``seconds``.
        fresh: measure what the part has as well.

    Returns:
        The rows of the grid, in its order.

    Raises:
        ValueError: a part that cannot be gone on with.
    """
    part = path.with_name(path.name + ".part")
    head = [replace(row, seconds=here["seconds"]) for row in head]
    done = {} if fresh else _done(sweep, tasks, part, here)
    if done:
        print(
            f"going on: {len(done)} of {len(tasks)} cells are in {part} (--fresh measures all)",
            file=sys.stderr,
        )
    if kept := head + [row for rows in done.values() for row in rows]:
        _replace(part, kept)
    else:
        part.unlink(missing_ok=True)
    with Progress("cells", len(tasks)) as bar:
        if done:
            bar.show(len(done))
        for task in tasks:
            if task.key not in done:
                done[task.key] = [replace(r, seconds=here["seconds"]) for r in task.measure()]
                append(part, *done[task.key])
                bar.step()
    rows = head + [row for task in tasks for row in done[task.key]]
    if not any(map(is_bad, rows)):
        _replace(path, rows)
        part.unlink()
    return rows


def is_bad(row: Timing) -> bool:
    """Whether this package's own result was wrong, or there was none."""
    return row.is_ours and not row.is_measured


def _done(
    sweep: Sweep, tasks: Sequence[Task], part: Path, here: dict[str, Any]
) -> dict[tuple[Any, ...], list[Any]]:
    """The cells that a part has, in the grid's order; those with bad results are left out."""
    remedy = f"remove {part}, or start anew with --fresh"
    try:
        rows = read(part, sweep.row)
        if rows and not part.read_bytes().endswith(b"\n"):
            raise ValueError("its last line is cut")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"what a stop has left is damaged ({error}): {remedy}") from error
    for name, now in here.items():
        then = next((str(getattr(r, name)) for r in rows if getattr(r, name) != now), None)
        if name != "commit" and then is not None:
            raise ValueError(f"what a stop has left is of {name} {then}, here is {now}: {remedy}")
    cells: dict[tuple[Any, ...], list[Any]] = {}
    for row in rows:
        if not row.status.startswith("missing"):
            cells.setdefault(tuple(getattr(row, name) for name in sweep.key), []).append(row)
    grid = {task.key for task in tasks}
    if foreign := [key for key in cells if key not in grid]:
        named = ", ".join(f"{n} {v}" for n, v in zip(sweep.key, foreign[0], strict=True))
        raise ValueError(f"what a stop has left has cells beside this grid ({named}): {remedy}")
    return {
        task.key: cells[task.key]
        for task in tasks
        if task.key in cells and not any(map(is_bad, cells[task.key]))
    }


def _replace(path: Path, rows: Sequence[Any]) -> None:
    """Write a whole file beside, then put it in place."""
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)
    append(new, *rows)
    new.replace(path)


def _run(arguments: argparse.Namespace) -> int:
    sweep = arguments.sweep
    tasks = prepare(sweep, arguments)
    here = where(torch.device(arguments.device)) | {"seconds": arguments.seconds}
    try:
        rows = measure(sweep, tasks, sweep.missing(arguments), arguments.out, here, arguments.fresh)
    except KeyboardInterrupt:
        part = f"{arguments.out}.part"
        print(f"\nstopped: {part} has what was measured; the same command goes on", file=sys.stderr)
        return 130
    print(sweep.table(rows))
    for line in notes(rows):
        print(line)
    bad = [row for row in rows if is_bad(row)]
    for row in bad:
        cell = ", ".join(f"{name} {getattr(row, name)}" for name in sweep.key if name != "op")
        print(f"bench: error: {row.op}, {row.provider} ({cell}): {row.status}", file=sys.stderr)
    if bad:
        print(f"bench: error: not timed; {arguments.out} is as it was", file=sys.stderr)
        return 1
    print(f"wrote {arguments.out}")
    return 0
