"""Files that a reader meets whole or not at all."""

from __future__ import annotations

import contextlib
import glob
import os
import platform
import secrets
import time
import zlib
from pathlib import Path

_OLD = 3600.0  # seconds after which a stray temporary file is nobody's


def replace_file(path: Path, data: bytes) -> None:
    """Write beside ``path``, then rename; what writers of this file left behind is removed.

    Raises:
        OSError: the file cannot be written; the old one stays.
    """
    remove_strays(path.parent, path.name)
    beside = path.parent / f".{path.name}.{_machine()}-{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def remove_strays(folder: Path, name: str = "*") -> None:
    """Remove temporary files of a folder that nobody will rename.

    Args:
        name: of the file that they were written for; of any if ``"*"``.
    """
    pattern = name if name == "*" else glob.escape(name)
    for stray in folder.glob(f".{pattern}.*.tmp"):
        with contextlib.suppress(OSError):  # another process was faster
            if _is_abandoned(stray):
                stray.unlink()


def _machine() -> str:
    return f"{zlib.crc32(platform.node().encode()):08x}"


def _is_abandoned(stray: Path) -> bool:
    """Whether nobody will rename a temporary file: it is old, or its writer is dead."""
    if time.time() - stray.stat().st_mtime > _OLD:
        return True
    writer = stray.name.split(".")[-2].split("-")
    known = len(writer) == 3 and writer[0] == _machine() and writer[1].isdecimal()
    if os.name != "posix" or not known:
        return False
    try:
        os.kill(int(writer[1]), 0)  # asks only whether there is such a process
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        pass
    return False
