"""Everything that is asked of a card, in minutes: values, tuning, sweeps.

Parts run in order, each for its share of the minutes that are left, and write what they have as
they go: a stop loses nothing. What a part leaves undone and which other libraries are missing
stands in the summary. Charts are drawn afterwards, from the CSVs; nothing is imported here but the
package's core and Triton.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from sgtriton_kernels.records import device_name

from sgtriton.tables import filled, format_table, terminal_width

from . import correctness
from .card_parts import CORRECTNESS, Part, Progress
from .card_sweeps import SWEEP_PARTS
from .card_tuning import TUNING
from .options import check_minutes, device_of
from .rows import commit, write

PARTS = [CORRECTNESS, TUNING, *SWEEP_PARTS]
MOST_FILES = 8
MOST_BYTES = 16 << 20
SUMMARY = "summary.csv"
_EVERY = 5.0  # seconds from one line of progress to the next
_GRACE = 10.0  # seconds that a part has to end once its time is up, before it is made to

DONE, TIME_UP, STOPPED, FAILED, RUNNING, NOT_BEGUN = (
    "done", "time was up", "stopped", "failed", "running", "not begun",
)  # fmt: skip


@dataclass(frozen=True)
class Summary:
    """A line of the summary: what became of a part."""

    part: str
    state: str = NOT_BEGUN
    done: int = 0
    of: int = 0
    failed: int = 0
    seconds: float = 0.0
    missing: str = ""
    note: str = ""
    device: str = ""
    torch: str = ""
    triton: str = ""
    commit: str = ""


class StoppedError(BaseException):
    """The process was told to end; like ``KeyboardInterrupt``, no part may swallow it."""


class _OverTimeError(BaseException):
    """A part went on after its time."""


def run(
    parts: Sequence[Part],
    minutes: float,
    folder: Path,
    device: torch.device,
    say: Callable[[str], None],
) -> tuple[list[Summary], int]:
    """Run parts one after the other.

    Args:
        parts: in order; what one leaves of its share goes to those after it.
        minutes: for all of them.
        folder: empty or not there yet.
        device: what is measured.
        say: gets lines of progress, one every few seconds at most.

    Returns:
        A line for each part, and the exit status: 0; 1 where a part failed or something is wrong;
        130 after Ctrl-C, 143 where the process was told to end.

    Raises:
        ValueError: no time or one without end, or a folder that holds something.
    """
    check_minutes(minutes)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--out must be an empty folder or none yet, got {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    here = {
        "device": device_name(device), "torch": torch.__version__,
        "triton": correctness.triton_version(), "commit": commit(),
    }  # fmt: skip
    lines = [Summary(part.name, **here) for part in parts]
    end, status = time.monotonic() + 60 * minutes, 0
    with _told_to_end():
        for i, part in enumerate(parts):
            now = time.monotonic()
            share = part.share / sum(p.share for p in parts[i:])
            try:
                for line in _run_part(part, now + (end - now) * share, folder, device, say):
                    lines[i] = replace(line, **here)
                    write(folder / SUMMARY, lines)
            except (KeyboardInterrupt, StoppedError) as error:
                status = 130 if isinstance(error, KeyboardInterrupt) else 143
                lines[i] = replace(lines[i], state=STOPPED, seconds=_since(now))
            problem = _too_much(folder)
            if problem:
                lines[i] = replace(lines[i], state=FAILED, note=problem)
            write(folder / SUMMARY, lines)
            if status:
                break
    bad = any(line.state == FAILED or line.failed for line in lines)
    return lines, status or int(bad)


def _run_part(
    part: Part, deadline: float, folder: Path, device: torch.device, say: Callable[[str], None]
) -> Iterator[Summary]:
    """A part's line whenever there is something to say, the last one as it ended."""
    start = said = time.monotonic()
    line = Summary(part.name, RUNNING)
    say(f"{part.name}: up to {max(deadline - start, 0):.0f} s")
    state, note = DONE, ""
    steps = part.run(deadline, folder, device)
    try:
        while True:
            with _made_to_end(deadline + _GRACE):  # the part, not who reads what it yields
                progress = next(steps, None)
            if progress is None:
                break
            line = _line(part, RUNNING, progress, start)
            if time.monotonic() - said >= _EVERY:
                said = time.monotonic()
                say(_words(line))
                yield line
    except _OverTimeError:
        note = "was made to end: it went on after its time"
    except (KeyboardInterrupt, StoppedError):
        yield line
        raise
    except Exception as error:
        state, note = FAILED, traceback.format_exception_only(error)[-1].strip()
    if state == DONE and line.done < line.of:
        state = TIME_UP
    note = note or line.note
    yield (line := replace(line, state=state, note=note[:500], seconds=_since(start)))
    say(_words(line))


def _line(part: Part, state: str, progress: Progress, start: float) -> Summary:
    return Summary(
        part.name, state, progress.done, progress.of, progress.failed, _since(start),
        ", ".join(progress.missing), progress.note,
    )  # fmt: skip


def _since(start: float) -> float:
    return round(time.monotonic() - start, 1)


def _words(line: Summary) -> str:
    text = f"{line.part}: {line.done} of {line.of}, {line.seconds:.0f} s"
    text += f", {line.failed} failed" * bool(line.failed)
    return text if line.state == RUNNING else f"{text}, {line.state}"


def _too_much(folder: Path) -> str | None:
    """What there is in a folder beyond what may come back from a card, or ``None``."""
    found = sorted(folder.iterdir())
    folders = [path.name for path in found if path.is_dir()]
    large = [path.name for path in found if path.is_file() and path.stat().st_size > MOST_BYTES]
    # the summary is there from the first line on
    count = len({path.name for path in found} | {SUMMARY})
    problems = [
        *([f"{count} files, {MOST_FILES} are allowed"] if count > MOST_FILES else []),
        *([f"folders: {', '.join(folders)}"] if folders else []),
        *([f"over {MOST_BYTES >> 20} MiB: {', '.join(large)}"] if large else []),
    ]
    return "; ".join(problems) or None


@contextlib.contextmanager
def _told_to_end() -> Iterator[None]:
    """A ``kill`` ends this as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number, frame):
        raise StoppedError

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _made_to_end(deadline: float) -> Iterator[None]:
    """Raise in the body at a time, where the system has such an alarm."""
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number, frame):
        raise _OverTimeError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(deadline - time.monotonic(), 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def table(lines: Sequence[Summary], folder: Path) -> str:
    """The summary for a terminal, and the files."""
    text = format_table(
        ["part", "", "done", "of", "failed", "seconds", "missing here"],
        [
            [line.part, line.state, line.done, line.of, line.failed, f"{line.seconds:.0f}",
             line.missing or "-"]
            for line in lines
        ],
        width=terminal_width(),
    )  # fmt: skip
    notes = [f"{line.part}: {line.note}" for line in lines if line.note]
    files = [f"{path.name} {path.stat().st_size:,} B" for path in sorted(folder.iterdir())]
    head = lines[0]
    where = f"{head.device}, PyTorch {head.torch}, Triton {head.triton}, commit {head.commit}"
    below = [*notes, where, f"{folder}: {', '.join(files)}"]
    return "\n".join([text, *map(filled, below)])


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``card`` to the command line."""
    command = commands.add_parser(
        "card", help="correctness, tuning and sweeps on a card, in minutes"
    )
    command.add_argument("--minutes", type=float, default=9.0, help="for all of it; default 9")
    command.add_argument("--out", type=Path, required=True, help="an empty folder")
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    command.add_argument(
        "--part", action="append", choices=[part.name for part in PARTS], help="repeatable"
    )
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    device = device_of(arguments.device)
    parts = [part for part in PARTS if not arguments.part or part.name in arguments.part]

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    lines, status = run(parts, arguments.minutes, arguments.out, device, say)
    print(table(lines, arguments.out), flush=True)
    return status
