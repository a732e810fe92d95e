"""A progress bar on standard error: tqdm's where it is installed, a plain one elsewhere."""

from __future__ import annotations

import sys
from typing import Any, TextIO

__all__ = ["Progress"]

_BAR = 24


class Progress:
    """Shows how far a loop has come; a context manager.

    On a terminal a bar that redraws itself; elsewhere (a log, a pipe) one line at each quarter.

    Args:
        title: Stands before the bar.
        total: Steps in all, at least 1.
        stream: Where to; standard error by default.
    """

    def __init__(self, title: str, total: int, stream: TextIO | None = None):
        self.title, self.total = title, total
        self.done = 0
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream is not None and self._stream.isatty()
        self._shown = -1
        self._bar: Any = _tqdm(title, total, self._stream) if self._terminal else None

    def step(self, note: str = "") -> None:
        """Count one step; ``note`` stands behind the bar."""
        self.show(self.done + 1, note)

    def show(self, done: int, note: str = "") -> None:
        """Say that ``done`` steps are done; ``note`` stands behind the bar."""
        more, self.done = done - self.done, done
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            if more:
                self._bar.update(more)
            else:  # another note only
                self._bar.refresh()
            return
        percent = 100 * self.done // self.total
        mark = percent if self._terminal else percent // 25
        if self._stream is None or mark == self._shown or (not self._terminal and mark == 0):
            return
        self._shown = mark
        if self._terminal:
            bar = "#" * (_BAR * self.done // self.total)
            self._stream.write(f"\r{self.title} [{bar:.<{_BAR}}] {percent:3d} %  {note:<40.40}")
        else:
            self._stream.write(f"{self.title} {percent:3d} %  {note}".rstrip() + "\n")
        self._stream.flush()

    def write(self, text: str) -> None:
        """Print a line above the bar, which stays whole."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        elif self._stream is not None:
            if self._terminal:  # over the bar, which is drawn again below the line
                text, self._shown = f"\r\x1b[K{text}", -1
            self._stream.write(f"{text}\n")
            self._stream.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._terminal and self._stream is not None:
            self._stream.write("\n")


def _tqdm(title: str, total: int, stream: TextIO | None) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(desc=title, total=total, file=stream, dynamic_ncols=True, leave=True)
