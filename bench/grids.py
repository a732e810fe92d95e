"""What a sweep consists of: cells of a grid, and how to measure, name and show them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Task:
    """A cell of a grid: the values of its key's columns, and what measures its rows."""

    key: tuple[Any, ...]
    measure: Callable[[], list[Any]]


def nothing_missing(arguments: argparse.Namespace) -> list[Any]:
    """For a sweep without other libraries."""
    return []


def no_arguments(command: argparse.ArgumentParser) -> None:
    """For a grid that nothing but dtypes narrows."""


@dataclass(frozen=True)
class Sweep:
    """A sweep.

    Args:
        help: in a line.
        file: in ``bench/results``, without its ending.
        seconds: by default; ``quick_seconds`` for the small grid.
        of: for what so many seconds are taken.
        row: the rows' class, a :class:`.rows.Timing`.
        key: columns that name a cell.
        tasks: the cells that some arguments ask for.
        table: measured rows for a terminal.
        section: of the page: rows, ``" on <GPU>"`` or nothing, the CSV's name.
        add_arguments: adds what narrows the grid.
        missing: rows without times for providers that no cell can have here.
    """

    help: str
    file: str
    seconds: float
    quick_seconds: float
    of: str
    row: type[Any]
    key: tuple[str, ...]
    tasks: Callable[[argparse.Namespace], list[Task]]
    table: Callable[[list[Any]], str]
    section: Callable[[list[Any], str, str], str]
    add_arguments: Callable[[argparse.ArgumentParser], None] = no_arguments
    missing: Callable[[argparse.Namespace], list[Any]] = nothing_missing
