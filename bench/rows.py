"""Rows of the CSVs in ``bench/results``: dataclasses, written and read by their fields.

A field whose name is a word of Python's ends in an underscore, its column does not. What was not
measured is NaN in a row and ``-`` in a file.
"""

from __future__ import annotations

import csv
import functools
import io
import math
import platform
import subprocess
import textwrap
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from sgtriton_kernels._triton import triton
from sgtriton_kernels.records import device_name

import sgtriton

RESULTS = Path(__file__).parent / "results"

MEASURED = "measured"

Row = TypeVar("Row")


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What the rows of every sweep have: a provider in a cell of the grid.

    Args:
        op: what is computed, by this package's op that can.
        provider: who computes it; of this package's ways, the names start with ``sgtriton``.
        pass_: ``"forward"`` | ``"forward+backward"``.
        M, N, K: rows of the input, and the weight's sides as a matrix.
        block: of the gates or of the weight's zeros, ``"32x32"``; ``"-"`` for none.
        density: share of the weights that is open, whoever makes use of it or not.
        ms_p20, ms_p50, ms_p80: quantiles of the samples, milliseconds.
        ratio: of the median to that of the faster dense provider.
        tflops: operations on the weights that the provider keeps, in a second.
        gb_s: bytes of these weights, of input and of output, each once, in a second.
        peak_mib: on a GPU: memory that a call takes at its peak, beside what was there before.
        samples: how many; 1 for what is too slow to take turns.
        status: ``"measured"``, or why not: ``"missing: ..."``, ``"failed: ..."``, ``"wrong: ..."``.
        device: name of the GPU or CPU.
        threads: of PyTorch.
        sgtriton, torch, triton, python: versions.
        commit: what was measured.
        seconds: for its cell, as ``--seconds`` asked; NaN in files of before.
    """

    op: str
    provider: str
    pass_: str
    M: int
    N: int
    K: int
    dtype: str
    block: str
    density: float
    ms_p20: float
    ms_p50: float
    ms_p80: float
    ratio: float
    tflops: float
    gb_s: float
    peak_mib: float
    samples: int
    status: str
    device: str
    threads: int
    sgtriton: str
    torch: str
    triton: str
    python: str
    commit: str
    seconds: float = math.nan

    @property
    def is_measured(self) -> bool:
        return self.status == MEASURED

    @property
    def is_ours(self) -> bool:
        return self.provider.startswith("sgtriton")


def measured(rows: Iterable[Row]) -> list[Row]:
    """The rows that have times."""
    return [row for row in rows if row.is_measured]  # pyright: ignore[reportAttributeAccessIssue]


def summary(rows: Iterable[Any]) -> dict[str, str]:
    """What all rows say of where they were measured; where they differ, each once."""
    rows = list(rows)
    names = ("device", "threads", "sgtriton", "torch", "triton", "python", "commit")
    return {
        name: ", ".join(dict.fromkeys(str(getattr(row, name)) for row in rows)) for name in names
    }


def notes(rows: Iterable[Any]) -> list[str]:
    """What was not measured and why, a line each, alike ones together."""
    found: dict[tuple[str, str], list[Any]] = {}
    for row in rows:
        if not row.is_measured:
            found.setdefault((row.provider, row.status), []).append(row)
    lines = []
    for (provider, status), alike in found.items():
        dtypes = ", ".join(dict.fromkeys(row.dtype for row in alike))
        cells = sum(row.M > 0 for row in alike)
        of = f" ({cells} cells)" if cells > 1 else ""
        lines.append(f"{provider} ({dtypes}): {status}{of}")
    return lines


def paragraphs(text: str) -> str:
    """Markdown whose paragraphs, headings apart, are filled anew to lines of 100."""
    parts = text.split("\n\n")
    filled = [
        part
        if part.lstrip().startswith("#")
        else textwrap.fill(part, 100, break_long_words=False, break_on_hyphens=False)
        for part in parts
    ]
    return "\n\n".join(filled)


def details(head: str, text: str) -> str:
    """Markdown that is folded away under a line."""
    return f"<details><summary>{head}</summary>\n\n{text}\n\n</details>\n"


def rounded(value: float, digits: int) -> float:
    """The value rounded; the one NaN that equals itself in rows where there is none."""
    return math.nan if math.isnan(value) else round(value, digits)


def significant(value: float) -> float:
    """The value to four significant digits; likewise."""
    return math.nan if math.isnan(value) else float(f"{value:.4g}")


def read(path: Path, row_type: type[Row]) -> list[Row]:
    """Rows of a CSV that this module wrote; none if there is no file.

    A column that the file lacks has its field's default.
    """
    if not path.exists():
        return []
    kinds = {"float": _number, "int": int, "str": str}
    own: tuple[Any, ...] = fields(row_type)  # pyright: ignore[reportArgumentType]
    with open(path, newline="", encoding="utf-8") as file:
        return [
            row_type(
                **{
                    f.name: kinds[str(f.type)](line[_column(f.name)])
                    for f in own
                    if _column(f.name) in line or f.default is MISSING
                }
            )
            for line in csv.DictReader(file)
        ]


def append(path: Path, *rows: Any) -> None:
    """Add rows at once, in one piece: a stop loses nothing that was measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [f.name for f in fields(rows[0])]
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    if not path.exists():
        writer.writerow(map(_column, names))
    for row in rows:
        values = [getattr(row, name) for name in names]
        writer.writerow(["-" if value != value else value for value in values])
    with open(path, "a", newline="", encoding="utf-8") as file:
        file.write(text.getvalue())


def _column(name: str) -> str:
    return name.rstrip("_")


def _number(text: str) -> float:
    return math.nan if text == "-" else float(text)


def write(path: Path, rows: Iterable[Row]) -> list[Row]:
    """Write a whole file; the one before stays until the last row is there.

    Args:
        rows: taken one by one. Each is at once in ``<name>.csv.part`` beside the file: a stop loses
            neither what was measured nor what was kept.

    Returns:
        The rows.
    """
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)
    written = []
    for row in rows:
        append(part, row)
        written.append(row)
    if not written:
        raise ValueError(f"no rows for {path}")
    part.replace(path)
    return written


@functools.cache
def commit() -> str:
    """The commit that was measured, marked where tracked files differ from it.

    What measurements and their report write is no difference.
    """
    head = _git("rev-parse", "--short", "HEAD")
    if head.returncode:
        return "unknown"
    written = [
        f":(top,exclude){path}" for path in ("bench/results", "README.md", "README_BENCH.md")
    ]
    is_dirty = _git("diff", "--quiet", "HEAD", "--", ":/", *written).returncode
    return head.stdout.strip() + "-dirty" * bool(is_dirty)


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["git", *arguments],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    )  # fmt: skip


def circumstances() -> dict[str, Any]:
    """The fields that say where and with what a row of timings was measured."""
    return {
        "threads": torch.get_num_threads(),
        "cpu": device_name(torch.device("cpu")),
        "sgtriton": sgtriton.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
    }


def where(device: torch.device) -> dict[str, Any]:
    """The fields of :class:`Timing` that say where and with what it was measured."""
    here = circumstances()
    del here["cpu"]
    return here | {"device": device_name(device), "triton": getattr(triton, "__version__", "-")}
