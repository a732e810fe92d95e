"""What commands that take timings have in common."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sgtriton_kernels._triton import INTERPRETED, why_not_triton

from .rows import RESULTS


def add_arguments(command: argparse.ArgumentParser, name: str, seconds: float, of: str) -> None:
    """Add ``--seconds``, ``--threads`` and ``--out``, by default ``results/<name>.csv``.

    Args:
        seconds: the default.
        of: for what so many seconds are taken, in words.
    """
    command.add_argument("--seconds", type=float, default=seconds, help=of)
    command.add_argument("--threads", type=int, default=2)
    command.add_argument("--out", type=Path, default=RESULTS / f"{name}.csv")


def prepare(arguments: argparse.Namespace) -> None:
    """Fix the random numbers and the threads.

    Raises:
        ValueError: fewer threads than one.
    """
    if arguments.threads < 1:
        raise ValueError(f"--threads must be at least 1, got {arguments.threads}")
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)


def require_native() -> None:
    """Raise ``ValueError`` unless kernels run as native code on this CPU."""
    reason = why_not_triton(torch.device("cpu"))
    if reason or INTERPRETED:
        raise ValueError(f"native code is needed: {reason or 'Triton is interpreted here'}")
