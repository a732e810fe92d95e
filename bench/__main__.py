"""``python -m bench NAME``: run one measurement."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator

from . import (
    accuracy,
    bandwidth,
    card,
    compile_report,
    correctness,
    native,
    overhead,
    report,
    roofline,
    sweep,
    tuning,
)

_CACHE = "SGTRITON_CACHE_DIR"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="NAME")
    accuracy.add_command(commands)
    bandwidth.add_command(commands)
    card.add_command(commands)
    correctness.add_command(commands)
    native.add_command(commands)
    overhead.add_command(commands)
    report.add_command(commands)
    compile_report.add_command(commands)
    roofline.add_command(commands)
    sweep.add_command(commands)
    tuning.add_command(commands)
    arguments = parser.parse_args()
    try:
        with _own_records():
            return arguments.run(arguments)
    except (OSError, ValueError) as error:
        print(f"bench: error: {error}", file=sys.stderr)
        return 2


@contextlib.contextmanager
def _own_records() -> Iterator[None]:
    """Figures must not depend on what this user tuned before, nor may measuring tune for them."""
    before = os.environ.get(_CACHE)
    with tempfile.TemporaryDirectory(prefix="sgtriton-bench-") as folder:
        os.environ[_CACHE] = folder
        try:
            yield
        finally:
            del os.environ[_CACHE]
            if before is not None:
                os.environ[_CACHE] = before


if __name__ == "__main__":
    sys.exit(main())
