"""Records of what was tuned, in the user's cache: one small file for each product and place."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sgtriton_kernels.records import FORMAT, file_name

from .files import remove_strays, replace_file

_MOST_FILES = 4096  # above which the ones that were written first go
_TRIES = 3  # of writing, where somebody removes the folder meanwhile


def write_record(
    folder: Path, key: Mapping[str, object], candidate: str, facts: Mapping[str, Any]
) -> str | None:
    """Keep that a candidate is the one to take.

    Args:
        folder: where records lie; made where it is missing.
        key: what the record is found by.
        candidate: its name.
        facts: what was measured, for a reader; nothing that is looked up.

    Returns:
        Why nothing could be written, or ``None``.
    """
    record = {"format": FORMAT, "key": dict(key), "candidate": candidate, **facts}
    record["written"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    data = (json.dumps(record, indent=1, sort_keys=True) + "\n").encode()
    reason = None
    for _ in range(_TRIES):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(folder / file_name(key), data)
            return None
        except OSError as error:
            reason = _cannot(folder, error)
    return reason


def why_not(folder: Path | None) -> str | None:
    """Why no record can be kept, or ``None``; the folder is made where it is missing."""
    if folder is None:
        return "there is no home"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return _cannot(folder, error)


def _cannot(folder: Path, error: OSError) -> str:
    return f"{folder}: cannot be written: {error.strerror or error}"


def sweep(folder: Path) -> None:
    """Remove what writers left behind, and the oldest records where there are too many."""
    with contextlib.suppress(OSError):
        remove_strays(folder)
        files = [(path.stat().st_mtime, path) for path in folder.glob("*.json")]
        for _, path in sorted(files)[: max(0, len(files) - _MOST_FILES)]:
            path.unlink(missing_ok=True)
