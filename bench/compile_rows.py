"""The rows of the compile report, and its files: written as rows come, gone on with, joined."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from sgtriton.cross_compile import TARGETS


@dataclass(frozen=True)
class Row:
    """One line of the table; ``None`` is what cannot be read from the code.

    ``registers``, ``shared`` and ``spills`` are ``None`` of what does not compile; ``source`` is a
    hash of all that the line depends on beside target and Triton.
    """

    op: str
    variant: str
    rows: str
    tile: str
    target: str
    triton: str
    registers: int | None
    shared: int | None
    spills: int | None
    instruction: str | None
    left: str | None
    copy: str | None
    buffers: str | None
    violations: str
    source: str

    @property
    def key(self) -> tuple[str, ...]:
        return tuple(getattr(self, name) for name in KEY)


KEY = ("op", "variant", "rows", "tile", "target", "triton")


def known_rows(path: Path, current: Mapping[tuple[str, ...], Row]) -> dict[tuple[str, ...], Row]:
    """The rows of a report that were compiled and would be the same again, in its order.

    Args:
        path: where the report is, if there is one.
        current: rows of what can be compiled now, by key; their sources count.

    Raises:
        ValueError: the file is something else.
    """
    if not path.exists():
        return {}
    found = {}
    for line in _lines(path):
        row = _row(line)
        then = None if row is None else current.get(row.key)
        if row is not None and then is not None and then.source == row.source:
            found[row.key] = row
    return found


def _lines(path: Path) -> list[dict[str, str]]:
    names = [f.name for f in fields(Row)]
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames != names:
                raise ValueError(f"{path} is no report: its columns are {reader.fieldnames}")
            # a stop cuts the last line
            return [line for line in reader if None not in (*line, *line.values())]
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def _row(line: Mapping[str, str]) -> Row | None:
    """A line's row; ``None`` of what did not compile."""
    values: dict[str, Any] = dict(line)
    for f in fields(Row):
        if "None" in str(f.type) and values[f.name] == "-":
            values[f.name] = None
    try:
        for name in ("registers", "shared", "spills"):
            values[name] = int(line[name])
    except ValueError:
        return None
    return Row(**values)


def write_rows(path: Path, lines: Iterable[Sequence[object]]) -> None:
    """Write a whole file beside, then put it in place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    with open(new, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([f.name for f in fields(Row)])
        writer.writerows(map(_texts, lines))
    new.replace(path)


def append_row(path: Path, row: Row) -> None:
    """Add a row to a file that is there."""
    with open(path, "a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerow(_texts(astuple(row)))


def _texts(line: Sequence[object]) -> list[object]:
    return ["-" if value is None else value for value in line]


def join(paths: Sequence[Path], out: Path | None) -> int:
    """Write the rows of several Tritons into one file, in an order that no run changes."""
    if out is None:
        raise ValueError("--join needs --csv, the file to write")
    names, rows = [f.name for f in fields(Row)], {}
    for path in paths:
        rows |= {tuple(line[name] for name in KEY): line for line in _lines(path)}
    ordered = [rows[key] for key in sorted(rows, key=_order)]
    write_rows(out, [[line[name] for name in names] for line in ordered])
    versions = sorted({line["triton"] for line in ordered}, key=_numbers)
    wrong = sum(line["violations"] != "" for line in ordered)
    print(f"{len(ordered)} kernels, Triton {', '.join(versions)}: {wrong} with violations")
    return 1 if wrong else 0


def _order(key: tuple[str, ...]) -> tuple[object, ...]:
    *what, target, version = key
    return (*what, list(TARGETS).index(target), _numbers(version))


def _numbers(version: str) -> list[tuple[int, str]]:
    """A version, to be sorted by."""
    return [(int(part) if part.isdigit() else -1, part) for part in version.split(".")]
