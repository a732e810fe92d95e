"""Processes that compile launches for cards that may be absent, several at a time.

A compiler may hang or take its process down with it, so each runs in one of its own: a fresh one,
which neither shares threads with this process nor runs the user's script again.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from .cross_compile import TARGETS, Compiled, compile_for
from .launches import Launch

_START_SECONDS = 120.0  # to import PyTorch and Triton on a busy machine
_SERVE = (
    "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); "
    "from sgtriton.compilers import _serve; _serve()"
)
NO_TIME = "no time was left to compile it"


@dataclass(frozen=True)
class Built:
    """What the compiler made of a launch.

    Args:
        registers: per thread.
        shared: bytes of shared memory.
        spills: bytes of registers spilled per thread; AMD: registers.
        instruction: the matrix instruction, if there is one.
        buffers: stages of each tile that the pipeline keeps in shared memory.
    """

    registers: int
    shared: int
    spills: int
    instruction: str | None
    buffers: tuple[int, ...]

    @classmethod
    def of(cls, code: Compiled) -> Built:
        return cls(code.registers, code.shared, code.spills, code.matrix_instruction, code.buffers)


_built: dict[tuple[str, str], Built | str] = {}  # target, launch -> what came of it


class Compilers:
    """Processes that compile, started when they are needed and kept until :meth:`close`.

    Args:
        jobs: how many at most; as many as there are cores if ``None``.
        timeout: seconds that a launch may take.
    """

    def __init__(self, jobs: int | None = None, timeout: float = 120.0):
        if jobs is not None and jobs < 1:
            raise ValueError(f"jobs must be at least 1, got {jobs}")
        if not timeout > 0:
            raise ValueError(f"timeout must be above 0 seconds, got {timeout}")
        self.jobs = jobs or _cores()
        self.timeout = timeout
        self._lock = threading.Lock()
        self._idle: list[_Compiler] = []
        self._busy: set[_Compiler] = set()

    def __enter__(self) -> Compilers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def ready(self) -> int:
        """How many have started and wait for something to compile."""
        return len(self._idle)

    def start(self, deadline: float) -> int:
        """Start them all at once, which takes seconds, so that what is built next finds them ready.

        Args:
            deadline: by ``time.monotonic``; those that have not started by then are ended, and
                from here on there are no more than have.

        Returns:
            How many are ready.
        """
        with self._lock:
            while len(self._idle) < self.jobs:
                self._idle.append(_Compiler())
            started = [*self._idle]
        late = [c for c in started if not c.wait(deadline - time.monotonic()) or c.was_late]
        for compiler in late:
            compiler.end()
        with self._lock:
            self._idle = [compiler for compiler in started if compiler not in late]
        self.jobs = max(1, self.ready)
        return self.ready

    def close(self) -> None:
        """End the processes; what they were compiling fails."""
        with self._lock:
            found, self._idle = [*self._idle, *self._busy], []
        for compiler in found:
            compiler.end()

    def build(
        self,
        work: Sequence[tuple[str, Launch]],
        deadline: float | None = None,
        on_built: Callable[[int, int], object] | None = None,
    ) -> list[Built | str]:
        """Compile each launch for its target; what was compiled before is remembered.

        Args:
            work: target, as in ``TARGETS``, and launch.
            deadline: by ``time.monotonic``; what is not compiled by then is not.
            on_built: called with how many are done, and of how many.

        Returns:
            For each what came of it, or in words why nothing did.
        """
        keys = [(target, repr(launch)) for target, launch in work]
        wanted = {k: w for k, w in zip(keys, work, strict=True) if k not in _built}
        found: dict[tuple[str, str], Built | str] = {}
        done = len(keys) - sum(key in wanted for key in keys)
        pool = ThreadPoolExecutor(max(1, min(self.jobs, len(wanted))))
        try:
            futures = {pool.submit(self._build, *w, deadline): k for k, w in wanted.items()}
            for future in as_completed(futures):
                key = futures[future]
                found[key], lasting = future.result()
                if lasting:
                    _built[key] = found[key]
                done += keys.count(key)
                if on_built is not None:
                    on_built(done, len(keys))
        except BaseException:  # also an interrupt: threads wait for processes that then have ended
            pool.shutdown(wait=False, cancel_futures=True)
            self.close()
            raise
        pool.shutdown()
        return [found[key] if key in found else _built[key] for key in keys]

    def _build(self, target: str, launch: Launch, deadline: float | None) -> tuple[Any, bool]:
        """What came of it, and whether the same would come of it again."""
        left = self.timeout if deadline is None else deadline - time.monotonic()
        if left <= 0:
            return NO_TIME, False
        with self._lock:
            compiler = self._idle.pop() if self._idle else None
        try:
            compiler = compiler or _Compiler()
        except OSError as error:  # no memory or no process is left for it
            return f"its compiler did not start: {error.strerror or error}", False
        with self._lock:
            self._busy.add(compiler)
        try:
            if not compiler.wait(min(left, _START_SECONDS) if deadline else _START_SECONDS):
                return (NO_TIME if deadline else "its compiler did not start"), False
            left = self.timeout if deadline is None else deadline - time.monotonic()
            answer = compiler.ask((target, launch), min(self.timeout, left))
        finally:
            with self._lock:
                self._busy.discard(compiler)
        if answer is not None:
            with self._lock:
                self._idle.append(compiler)
            return answer, True
        status = compiler.end(patience=1.0)
        if not compiler.was_late:
            with self._lock:  # another one would first have to start, while the others are ready
                self.jobs = max(1, self.jobs - 1)
            return f"its compiler ended with status {status}", True
        if left < self.timeout:
            return NO_TIME, False
        return f"compiling took longer than {self.timeout:g} s", False


class _Compiler:
    """One process; it is asked by one thread at a time."""

    def __init__(self):
        self.was_late = False
        self._is_ready = False
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        with contextlib.suppress(OSError):
            pickle.dump(sys.path, self._stdin)
            self._stdin.flush()

    @property
    def _stdin(self) -> Any:
        return self._process.stdin

    def wait(self, seconds: float) -> bool:
        """Whether the process has started, after so many seconds at most."""
        if not self._is_ready:
            self._is_ready = self._read(seconds) is not None
            if not self._is_ready:
                self.end()
        return self._is_ready

    def ask(self, item: tuple[str, Launch], seconds: float) -> Built | str | None:
        """What came of a launch; ``None`` if the process did not say so in time, or ended."""
        try:
            pickle.dump(item, self._stdin)
            self._stdin.flush()
        except OSError:
            return None
        return self._read(seconds)

    def _read(self, seconds: float) -> Any:
        def late() -> None:
            self.was_late = True
            self._process.kill()

        timer = threading.Timer(min(max(seconds, 0.0), threading.TIMEOUT_MAX), late)
        timer.daemon = True
        timer.start()
        try:
            return pickle.load(self._process.stdout)  # pyright: ignore[reportArgumentType]
        except (EOFError, OSError, pickle.UnpicklingError):
            return None
        finally:
            timer.cancel()

    def end(self, patience: float = 0.0) -> int:
        """End the process, if it has not ended after so many seconds; its exit status."""
        try:
            status = self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # pyright: ignore[reportOptionalMemberAccess]
        return status


def _serve() -> None:
    """Compile what comes until nothing does; the process of a :class:`_Compiler` runs this."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what compilers print is no answer
    _send(answers, True)
    with contextlib.suppress(EOFError):
        while True:
            target, launch = pickle.load(sys.stdin.buffer)
            try:
                answer = Built.of(compile_launch(target, launch))
            except Exception as error:
                text = str(error).strip() or type(error).__name__
                answer = f"it does not compile: {text.splitlines()[-1].strip()}"
            _send(answers, answer)


def _send(answers: Any, answer: object) -> None:
    pickle.dump(answer, answers)
    answers.flush()


def compile_launch(target: str, launch: Launch) -> Compiled:
    """Compile a launch for a target, here and now."""
    return compile_for(
        TARGETS[target], launch.function(), launch.signature, launch.constexprs,
        launch.num_warps, launch.num_stages, launch.max_registers,
    )  # fmt: skip


def _cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1
