"""The sweeps as parts of ``python -m bench card``: as many cells as there is time for."""

from __future__ import annotations

import argparse
import functools
import importlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from .card_parts import Part, Progress
from .rows import append

Item = TypeVar("Item")

# of ``python -m bench sweep``, with their shares of the time
_SHARES = {"serve": 3.0, "train": 1.5, "conv": 1.0, "model": 1.0}
_MISSING = "missing: "  # how the status of such a provider begins


def sweep_part(
    name: str, deadline: float, folder: Path, device: torch.device
) -> Iterator[Progress]:
    """Measure cells of a sweep, each with all its providers, into its CSV."""
    sweep = _sweeps().get(name)
    if sweep is None:
        yield Progress(note=f"there is no sweep {name}")
        return
    arguments = _arguments(sweep, device)
    tasks, path = sweep.tasks(arguments), folder / f"{sweep.file}.csv"
    rows = [replace(row, seconds=arguments.seconds) for row in sweep.missing(arguments)]
    for row in rows:
        append(path, row)
    missing, failed, notes, longest = _missing(rows), 0, [], 0.0
    yield Progress(0, len(tasks), missing=tuple(sorted(missing)))
    for done, task in enumerate(_spread(tasks), 1):
        start = time.monotonic()
        if start + longest > deadline:  # what would not end leaves its time to the next part
            return
        try:
            rows = [replace(row, seconds=arguments.seconds) for row in task.measure()]
        except Exception as error:  # one cell's trouble is no other's
            failed += 1
            notes.append(f"{task.key}: {type(error).__name__}: {error}")
            rows = []
        for row in rows:
            append(path, row)
        missing |= _missing(rows)
        longest = max(longest, time.monotonic() - start)
        failed += any(row.is_ours and not row.is_measured for row in rows)
        yield Progress(done, len(tasks), failed, tuple(sorted(missing)), "; ".join(notes[:2]))


def _missing(rows: Sequence[Any]) -> set[str]:
    """Who could not be measured, and why."""
    return {
        f"{row.provider} ({row.status.removeprefix(_MISSING)})"
        for row in rows
        if row.status.startswith(_MISSING)
    }


def _sweeps() -> dict[str, Any]:
    """The sweeps by name; none where this clone has no such command."""
    try:
        return importlib.import_module("bench.sweep").SWEEPS
    except ModuleNotFoundError as error:
        if error.name != "bench.sweep":
            raise
        return {}


def _arguments(sweep: Any, device: torch.device) -> argparse.Namespace:
    """What the command would be called with: all of a card's grid, a CPU's small one."""
    parser = argparse.ArgumentParser()
    sweep.add_arguments(parser)
    arguments = parser.parse_args([])
    quick = device.type == "cpu"
    arguments.device, arguments.dtype, arguments.quick = device.type, None, quick
    arguments.seconds = sweep.quick_seconds if quick else sweep.seconds
    arguments.threads = torch.get_num_threads()
    return arguments


def _spread(items: Sequence[Item]) -> list[Item]:
    """In an order of which every beginning covers the whole: halves, then quarters, and so on."""
    bits = max(len(items) - 1, 0).bit_length()
    places = [int(f"{i:0{bits}b}"[::-1], 2) if bits else 0 for i in range(1 << bits)]
    return [items[i] for i in places if i < len(items)]


SWEEP_PARTS = [
    Part(f"sweep {name}", share, functools.partial(sweep_part, name))
    for name, share in _SHARES.items()
]
