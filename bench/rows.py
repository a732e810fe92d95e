"""Rows of the CSVs in ``bench/results``: dataclasses, written and read by their fields."""

from __future__ import annotations

import csv
import functools
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

import torch

import sgtriton

RESULTS = Path(__file__).parent / "results"

Row = TypeVar("Row")


def read(path: Path, row_type: type[Row]) -> list[Row]:
    """Rows of a CSV that this module wrote; none if there is no file.

    A column that the file lacks has its field's default.
    """
    if not path.exists():
        return []
    kinds = {"float": float, "int": int, "str": str}
    own: tuple[Any, ...] = fields(row_type)  # pyright: ignore[reportArgumentType]
    with open(path, newline="", encoding="utf-8") as file:
        return [
            row_type(
                **{
                    f.name: kinds[str(f.type)](line[f.name])
                    for f in own
                    if f.name in line or f.default is MISSING
                }
            )
            for line in csv.DictReader(file)
        ]


def append(path: Path, row: Any) -> None:
    """Add a row at once: a stop loses nothing that was measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [f.name for f in fields(row)]
    is_new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        if is_new:
            writer.writeheader()
        writer.writerow({name: getattr(row, name) for name in names})


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
        "cpu": cpu(),
        "sgtriton": sgtriton.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
    }


def cpu() -> str:
    """The processor's name, as the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown"
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown"
