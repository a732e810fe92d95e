"""What commands that take timings have in common: options, and taking turns."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sgtriton_kernels._triton import INTERPRETED, why_not_triton

from sgtriton.tables import in_a_line
from sgtriton.timing import samples_ms

from .options import check_count, check_file
from .rows import MEASURED, RESULTS, commit, rounded, significant

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SLOWER = 0.97  # of dense, from which down a result is called slower
SLOW = 8  # times dense, from which a provider is timed by one call and takes no turns
SLOW_MS = 20  # and at least that long

Call = Callable[[], object]


@dataclass(frozen=True)
class Taken:
    """What came of a candidate: milliseconds a call, MiB at its peak, and its row's status."""

    ms: list[float]
    peak_mib: float = math.nan
    status: str = MEASURED

    def fields(self) -> dict[str, Any]:
        """As a row has them."""
        p20, p50, p80 = quantiles(self.ms)
        return {
            "ms_p20": rounded(p20, 4), "ms_p50": rounded(p50, 4), "ms_p80": rounded(p80, 4),
            "peak_mib": rounded(self.peak_mib, 2), "samples": len(self.ms), "status": self.status,
        }  # fmt: skip

    @property
    def median(self) -> float:
        return quantiles(self.ms)[1]


def quantiles(ms: list[float]) -> tuple[float, float, float]:
    """20, 50 and 80 % of the samples; of a single one, thrice that; of none, thrice NaN."""
    if len(ms) < 2:
        only = ms[0] if ms else math.nan
        return only, only, only
    tenths = statistics.quantiles(ms, n=10)
    return tenths[1], tenths[4], tenths[7]


def take_turns(
    candidates: Mapping[str, Call | str],
    check: Callable[[str, Any], str | None],
    device: torch.device,
    seconds: float,
    rounds: int = 7,
    dense: tuple[str, ...] = ("dense",),
) -> dict[str, Taken]:
    """Time candidates in turns, but those whose first result is wrong.

    Args:
        candidates: by name; text instead of a call says why there is none.
        check: given a candidate's name and first result, what is wrong with it.
        device: where it all runs.
        seconds: to take in all, and at least ``rounds`` turns.
        dense: names that take turns however slow they are.
    """
    found: dict[str, Taken] = {}
    calls: dict[str, Call] = {}
    patience = math.inf
    for name, call in candidates.items():
        if isinstance(call, str):
            found[name] = Taken([], status=call)
            continue
        try:
            wrong = check(name, call())
            once, peak = _once(call, device)
        except Exception as error:  # a library's, a compiler's or a card's: the others go on
            found[name] = Taken([], status=f"failed: {in_a_line(error)}")
            continue
        if wrong:
            found[name] = Taken([], status=f"wrong: {wrong}")
            continue
        if name in dense:
            patience = min(patience, max(SLOW * once, SLOW_MS))
        is_slow = name not in dense and once > patience
        found[name] = Taken([once] if is_slow else [], peak)
        if not is_slow:
            calls[name] = call
    if calls:
        taken = samples_ms(list(calls.values()), device, seconds, rounds)
        for name, ms in zip(calls, taken, strict=True):
            found[name] = Taken(ms, found[name].peak_mib)
    return found


def _once(call: Call, device: torch.device) -> tuple[float, float]:
    """Milliseconds of one call, and MiB that it takes on a GPU at its peak."""
    if device.type == "cpu":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start), math.nan
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    call()
    torch.cuda.synchronize(device)
    took = 1e3 * (time.perf_counter() - start)
    return took, (torch.cuda.max_memory_allocated(device) - before) / 2**20


def fastest(taken: Mapping[str, Taken], names: tuple[str, ...]) -> float:
    """The least median of those that were measured; NaN where none was."""
    found = [taken[name].median for name in names if name in taken and taken[name].ms]
    return min(found, default=math.nan)


def difference(out: Any, expected: torch.Tensor, most: float | None = None) -> str | None:
    """What is wrong with a result: how far it is from what is expected, relative to the largest.

    Args:
        out: a tensor or an array.
        expected: fp64.
        most: allowed; by default 1e-4, and 2e-2 in 16 bits.
    """
    out = torch.as_tensor(out)
    if out.shape != expected.shape:
        return f"shape {list(out.shape)} instead of {list(expected.shape)}"
    if most is None:
        most = 2e-2 if out.dtype.itemsize == 2 else 1e-4
    largest = expected.abs().max()
    error = (out.double() - expected.to(out.device)).abs().max()
    error = error / largest if largest else error
    return None if error <= most else f"relative error {error:.1e}"


@dataclass(frozen=True)
class Work:
    """What a product takes at least: operations, and bytes in and out."""

    operations: float
    bytes: float

    def fields(self, ms: float) -> dict[str, float]:
        """The rates of a row, of a provider that took so long."""
        return {
            "tflops": significant(self.operations / ms / 1e9),
            "gb_s": significant(self.bytes / ms / 1e6),
        }


def product(m: int, n: int, k: int, density: float, itemsize: int) -> Work:
    """The work of ``[M, K] @ [N, K]^T`` with that share of the weights."""
    weights = n * k * density
    return Work(2 * m * weights, itemsize * (weights + m * k + m * n))


def add_arguments(command: argparse.ArgumentParser, name: str, seconds: float, of: str) -> None:
    """Add ``--seconds``, ``--threads`` and ``--out``, by default ``results/<name>.csv``.

    The default holds for the whole grid only, see :func:`prepare`.

    Args:
        seconds: the default.
        of: for what so many seconds are taken, in words.
    """
    command.add_argument(
        "--seconds", type=float, default=seconds, help=f"{of}; default {seconds:g}"
    )
    command.set_defaults(usual_seconds=seconds)
    command.add_argument("--threads", type=int, default=2, help="of PyTorch; default 2")
    add_out(command, name)


def add_out(command: argparse.ArgumentParser, name: str) -> None:
    """Add ``--out`` alone."""
    command.add_argument("--out", type=Path, help=f"default results/{name}.csv")
    command.set_defaults(kept=RESULTS / f"{name}.csv")


def settle_out(arguments: argparse.Namespace, is_whole: bool = True) -> None:
    """Give ``--out`` its default, unless a part of a grid would take the place of the whole.

    Raises:
        ValueError: a part of the grid without ``--out``, or a folder as that.
    """
    if arguments.out is None and not is_whole:
        raise ValueError(f"a part of the grid needs --out: {arguments.kept.name} holds all of it")
    arguments.out = arguments.out or arguments.kept
    check_file("--out", arguments.out)


def prepare(
    arguments: argparse.Namespace,
    is_whole: bool = True,
    asked: Mapping[str, tuple[float, float]] | None = None,
) -> None:
    """Fix the random numbers, the threads, the commit and the file to write.

    Args:
        is_whole: whether all of the grid is to be measured.
        asked: options that results depend on, beside ``--seconds``: what was asked for, and what
            the kept results are of.

    Raises:
        ValueError: fewer threads than one, no number of seconds; without ``--out`` a part of the
            grid, or options that the kept results are not of.
    """
    has_out = arguments.out is not None
    settle_out(arguments, is_whole)
    if not has_out:
        usual = {"--seconds": (arguments.seconds, arguments.usual_seconds), **(asked or {})}
        for option, (now, then) in usual.items():
            if now != then:
                raise ValueError(
                    f"{option} {now:g} needs --out: {arguments.kept.name} is of {then:g}"
                )
    if not 0 <= arguments.seconds < math.inf:
        raise ValueError(f"--seconds must be 0 or more, got {arguments.seconds}")
    check_count("--threads", arguments.threads)
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    commit()


def require_native() -> None:
    """Raise ``ValueError`` unless kernels run as native code on this CPU."""
    reason = why_not_triton(torch.device("cpu"))
    if reason or INTERPRETED:
        raise ValueError(f"native code is needed: {reason or 'Triton is interpreted here'}")
