"""Tables for terminals and logs: plain text always, rich when it is installed and can be seen."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TextIO

__all__ = ["format_table", "in_a_line", "print_table", "print_text", "terminal_width"]

_GAP = "  "
_LONGEST = 160  # characters of an error
_MIN_WRAP = 12  # a column of text is never wrapped narrower than this
_JOINT = re.compile(r"(?<=[._/])|(?<=[a-z])(?=[A-Z])")  # encoder.layers, BlockSparseLinear
# 12  -1.5  97.8 %  1,024  2.1e-05  36.2 s  0.15x
_NUMBER = re.compile(r"[+-]?[\d,]*\.?\d+(e[+-]?\d+)?( ?(%|x|s|ms|[kKMG]i?B|B))?", re.IGNORECASE)


def format_table(
    headers: Sequence[object],
    rows: Iterable[Sequence[object]],
    title: str | None = None,
    align: str | None = None,
    width: int = 100,
) -> str:
    """Set rows in aligned columns of plain text.

    Columns of text are wrapped between words, the widest first, while the table is wider than
    ``width``, and long names between their parts; numbers are never broken, so a table of many
    numbers may still be wider.

    Args:
        headers: One per column; shown with ``str``.
        rows: Each as long as ``headers``; cells are shown with ``str``, ``None`` as nothing.
        title: A line above the table.
        align: ``l`` or ``r`` per column, such as ``"lrr"``; by default a column that holds only
            numbers (also with a unit) is set right, any other left.
        width: Columns of a terminal to stay within where that is possible.

    Returns:
        The table, its lines without trailing blanks, no newline at its end.

    Raises:
        ValueError: A row or ``align`` of another length than ``headers``, another letter.
    """
    head, body, align = _cells(headers, rows, align)
    widths = [max(_columns(row[i]) for row in [head, *body]) for i in range(len(head))]
    while sum(widths) + len(_GAP) * (len(widths) - 1) > width:
        wide = [i for i, side in enumerate(align) if side == "l" and widths[i] > _MIN_WRAP]
        if not wide:
            break
        widths[max(wide, key=lambda i: widths[i])] -= 1

    lines = [] if title is None else [title]
    lines += _set_row(head, widths, align)
    lines.append(_GAP.join("-" * w for w in widths))
    for row in body:
        lines += _set_row(row, widths, align)
    return "\n".join(line.rstrip() for line in lines)


def print_table(
    headers: Sequence[object],
    rows: Iterable[Sequence[object]],
    title: str | None = None,
    align: str | None = None,
    file: TextIO | None = None,
) -> None:
    """Print a table: through rich on a terminal, as plain text in a pipe, a file or without rich.

    Args:
        headers, rows, title, align: As in :func:`format_table`.
        file: Where to; standard output by default.

    Raises:
        ValueError: As :func:`format_table`.
    """
    stream = sys.stdout if file is None else file
    rows = list(rows)
    # in a pipe rich assumes 80 columns and cuts cells; the plain table keeps every character
    if not (stream.isatty() and _print_rich(headers, rows, title, align, stream)):
        text = format_table(headers, rows, title, align)
        encoding = getattr(stream, "encoding", None) or "utf-8"
        print(text.encode(encoding, errors="replace").decode(encoding), file=stream)


def print_text(text: str, indent: str = "") -> None:
    """Print a sentence within the terminal's width, what follows its first line set in."""
    print(filled(text, indent))


def filled(text: str, indent: str = "") -> str:
    """A sentence within the terminal's width, what follows its first line set in."""
    width = terminal_width()
    return textwrap.fill(
        text, width, initial_indent=indent, subsequent_indent=f"{indent}  ",
        break_long_words=False, break_on_hyphens=False,  # paths stay whole
    )  # fmt: skip


def in_a_line(error: Exception) -> str:
    """An error's kind and the first line of what it says, of a length that a table bears."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}"[:_LONGEST].rstrip(": ")


def terminal_width() -> int:
    """Columns of the terminal; 100 where there is none."""
    return shutil.get_terminal_size((100, 24)).columns


def _print_rich(
    headers: Sequence[object],
    rows: Iterable[Sequence[object]],
    title: str | None,
    align: str | None,
    file: TextIO,
) -> bool:
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return False
    head, body, align = _cells(headers, rows, align)
    # Text, not str: a block such as [32, 32] is no markup
    table = Table(box=box.SIMPLE_HEAD)
    for name, side in zip(head, align, strict=True):
        table.add_column(
            Text(name), justify="right" if side == "r" else "left", no_wrap=side == "r"
        )
    for row in body:
        table.add_row(*map(Text, row))
    console = Console(file=file)
    if title is not None:  # a title of the table's own would be folded to the table's width
        console.print(Text(title))
    console.print(table)
    return True


def _cells(
    headers: Sequence[object], rows: Iterable[Sequence[object]], align: str | None
) -> tuple[list[str], list[list[str]], str]:
    head = [_one_line(h) for h in headers]
    body = [[_one_line(cell) for cell in row] for row in rows]
    for i, row in enumerate(body):
        if len(row) != len(head):
            raise ValueError(f"row {i} has {len(row)} cells, the table {len(head)} columns")
    if align is None:
        columns = [[row[i] for row in body if row[i] not in ("", "-")] for i in range(len(head))]
        align = "".join("r" if c and all(map(_NUMBER.fullmatch, c)) else "l" for c in columns)
    if len(align) != len(head) or set(align) - {"l", "r"}:
        raise ValueError(f"align must be {len(head)} letters l or r, got {align!r}")
    return head, body, align


def _one_line(cell: object) -> str:
    """The cell as text; control characters would break the columns (or the terminal)."""
    text = "" if cell is None else str(cell)
    return "".join(" " if unicodedata.category(c) == "Cc" else c for c in text)


def _columns(text: str) -> int:
    """How many terminal columns a text takes: wide characters two, combining ones none."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def _fold(cell: str, width: int) -> list[str]:
    """The cell in lines; names are broken between their parts where that is possible."""
    if _columns(cell) <= width:
        return [cell]
    words = []
    for word in cell.split():
        line = ""
        for part in _JOINT.split(word) if len(word) > width else [word]:
            if line and len(line + part) > width:
                words.append(line)
                line = ""
            line += part
        words.append(line)
    return textwrap.wrap(" ".join(words), width) or [""]


def _set_row(row: Sequence[str], widths: Sequence[int], align: str) -> list[str]:
    folded = [_fold(cell, w) for cell, w in zip(row, widths, strict=True)]
    lines = []
    for i in range(max((len(cell) for cell in folded), default=0)):
        parts = []
        for cell, w, side in zip(folded, widths, align, strict=True):
            text = cell[i] if i < len(cell) else ""
            blank = " " * max(0, w - _columns(text))
            parts.append(blank + text if side == "r" else text + blank)
        lines.append(_GAP.join(parts))
    return lines
