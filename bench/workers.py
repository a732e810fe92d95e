"""Work in processes of its own: what crashes, hangs or breaks a device takes nothing with it."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_IMPORTS = 120.0  # seconds that a process may take to import, on a busy machine
_CONTEXT = multiprocessing.get_context("spawn")  # a device does not survive a fork


@dataclass(frozen=True)
class Lost:
    """In a result's place: what became of the process that had the item."""

    reason: str


@dataclass
class _Worker(Generic[Item]):
    process: BaseProcess
    connection: Connection
    item: Item
    began: float | None = None  # when it got its item; it has none while it imports
    started: float = field(default_factory=time.monotonic)

    def give(self, item: Item) -> None:
        self.item, self.began = item, time.monotonic()
        with contextlib.suppress(OSError):  # it has ended: what it says next is that
            self.connection.send(item)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def in_processes(
    task: Callable[[Item], Result],
    items: Iterable[Item],
    jobs: int,
    until: float = float("inf"),
    limit: float = float("inf"),
    is_last: Callable[[Result], bool] = lambda result: False,
) -> Iterator[tuple[Item, Result | Lost]]:
    """Call ``task(item)`` for each item in one of ``jobs`` processes, in the order of finishing.

    A process that dies with an item is replaced.

    Args:
        task: picklable; keeps what is expensive between calls of its process.
        until: of ``time.monotonic()``. Then processes are ended; what they had, and what had not
            begun, is left out.
        limit: seconds for one item, after which its process is ended.
        is_last: whether a process should be replaced after this result: its device may be broken.

    Returns:
        Items with their results, or with :class:`Lost`.
    """
    waiting, workers = deque(items), []
    try:
        while (waiting or workers) and time.monotonic() < until:
            while waiting and len(workers) < jobs:
                workers.append(_start(task, waiting.popleft()))
            ends = [until, *(_end(worker, limit) for worker in workers)]
            timeout = max(0.0, min(ends) - time.monotonic())
            ready = wait([worker.connection for worker in workers], min(timeout, 1.0))
            for worker in list(workers):
                if worker.connection in ready:
                    result = _received(worker)
                    if worker.began is None and not isinstance(result, Lost):
                        worker.give(worker.item)  # it has imported what it needs
                        continue
                elif time.monotonic() > _end(worker, limit):
                    result = Lost(f"not finished after {limit:.0f} s")
                else:
                    continue
                item = worker.item
                if isinstance(result, Lost) or is_last(result) or not waiting:
                    worker.end()
                    workers.remove(worker)
                else:
                    worker.give(waiting.popleft())
                yield item, result
    finally:
        for worker in workers:
            worker.end()


def _start(task: Callable[[Item], object], item: Item) -> _Worker[Item]:
    ours, theirs = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=_serve, args=(task, theirs), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours, item)


def _end(worker: _Worker, limit: float) -> float:
    """When a worker has had its time."""
    if worker.began is None:
        return worker.started + max(limit, _IMPORTS)
    return worker.began + limit


def _received(worker: _Worker):
    try:
        return worker.connection.recv()
    except (EOFError, OSError):
        worker.process.join()
        return Lost(f"its process ended with {worker.process.exitcode}")


def _serve(task: Callable[[Item], object], connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its processes
    connection.send(None)
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        connection.send(task(item))
