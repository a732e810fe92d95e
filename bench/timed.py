"""What commands that take timings have in common."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from sgtriton_kernels._triton import INTERPRETED, why_not_triton

from .rows import RESULTS, commit

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SLOWER = 0.97  # of dense, from which down a result is called slower

Call = Callable[[], object]


def quantiles(ms: list[float]) -> tuple[float, float, float]:
    """20, 50 and 80 % of the samples; of a single one, thrice that."""
    if len(ms) == 1:
        return ms[0], ms[0], ms[0]
    tenths = statistics.quantiles(ms, n=10)
    return tenths[1], tenths[4], tenths[7]


def add_arguments(command: argparse.ArgumentParser, name: str, seconds: float, of: str) -> None:
    """Add ``--seconds``, ``--threads`` and ``--out``, by default ``results/<name>.csv``.

    The default holds for the whole grid only, see :func:`prepare`.

    Args:
        seconds: the default.
        of: for what so many seconds are taken, in words.
    """
    command.add_argument("--seconds", type=float, default=seconds, help=of)
    command.add_argument("--threads", type=int, default=2)
    add_out(command, name)


def add_out(command: argparse.ArgumentParser, name: str) -> None:
    """Add ``--out`` alone."""
    command.add_argument("--out", type=Path, help=f"default results/{name}.csv")
    command.set_defaults(kept=RESULTS / f"{name}.csv")


def settle_out(arguments: argparse.Namespace, is_whole: bool = True) -> None:
    """Give ``--out`` its default, unless a part of a grid would take the place of the whole.

    Raises:
        ValueError: a part of the grid without ``--out``.
    """
    if arguments.out is None and not is_whole:
        raise ValueError(f"a part of the grid needs --out: {arguments.kept.name} holds all of it")
    arguments.out = arguments.out or arguments.kept


def prepare(arguments: argparse.Namespace, is_whole: bool = True) -> None:
    """Fix the random numbers, the threads, the commit and the file to write.

    Args:
        is_whole: whether all of the grid is to be measured.

    Raises:
        ValueError: fewer threads than one; a part of the grid without ``--out``.
    """
    settle_out(arguments, is_whole)
    if arguments.threads < 1:
        raise ValueError(f"--threads must be at least 1, got {arguments.threads}")
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    commit()


def require_native() -> None:
    """Raise ``ValueError`` unless kernels run as native code on this CPU."""
    reason = why_not_triton(torch.device("cpu"))
    if reason or INTERPRETED:
        raise ValueError(f"native code is needed: {reason or 'Triton is interpreted here'}")
