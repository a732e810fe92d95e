"""What the compilers make of every kernel that ships, for every card and without one.

Each launch is compiled for each target and its code is read: registers, shared memory, spills,
matrix instructions, copies, pipeline. What cannot be read there is shown as ``-``. Ends with 1
where the code breaks what the package counts on, with 2 where nothing can be compiled.

Each is compiled in a process of its own, for a compiler may crash or hang: that is a line of the
report. Rows are in ``--csv`` as they come, and a report that was stopped goes on: what its kernel,
launch and rules have not changed since is not compiled again.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import shutil
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import astuple, replace
from pathlib import Path

from sgtriton_kernels._triton import triton

from sgtriton import cross_compile
from sgtriton.compilers import compile_launch
from sgtriton.cross_compile import COPY_ENGINES, TARGETS, Compiled, why_not
from sgtriton.tables import format_table

from . import compile_rules
from .compile_rows import Row, append_row, join, known_rows, write_rows
from .compile_rules import sizes, violations
from .options import check_count, check_file
from .variant import Variant
from .variants import variants
from .workers import Lost, in_processes

_SECONDS = 300.0  # for one kernel


COLUMNS = {
    "op": "op", "variant": "variant", "rows": "rows", "tile": "tile", "target": "target",
    "registers": "regs", "shared": "shared", "spills": "spills", "instruction": "matrix unit",
    "left": "left operand", "copy": "copies", "buffers": "buffers",
}  # fmt: skip


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``compile_report`` to the command line."""
    command = commands.add_parser(
        "compile_report", help="what the compilers make of every kernel, for every card"
    )
    _add_arguments(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the report as a program of its own."""
    parser = argparse.ArgumentParser(prog="python -m bench.compile_report", description=__doc__)
    _add_arguments(parser)
    parsed = parser.parse_args(arguments)
    try:
        return parsed.run(parsed)
    except ValueError as error:
        print(f"bench: error: {error}", file=sys.stderr)
        return 2


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--target", action="append", choices=list(TARGETS), help="this card only; repeatable"
    )
    parser.add_argument("--op", action="append", help="this op only; repeatable")
    parser.add_argument("--csv", type=Path, help="write the rows there too, and go on with them")
    parser.add_argument(
        "--join", type=Path, nargs="+", metavar="CSV", help="compile nothing: join these into --csv"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes; default 2")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.join is not None:
        return join(arguments.join, arguments.csv)
    if reason := why_not():
        raise ValueError(reason)
    check_count("--jobs", arguments.jobs)
    if arguments.csv is not None:
        check_file("--csv", arguments.csv)
    every = chosen = variants()
    if arguments.op:
        names = list(dict.fromkeys(v.op for v in chosen))
        if unknown := [op for op in arguments.op if op not in names]:
            raise ValueError(f"--op must be one of {', '.join(names)}; got {', '.join(unknown)}")
        chosen = [v for v in chosen if v.op in arguments.op]
    targets = [t for t in TARGETS if not arguments.target or t in arguments.target]
    work, found = work_of(chosen, targets), {}
    order = {row.key: row for _, row in work_of(every, list(TARGETS))}
    if arguments.csv is not None:
        found = known_rows(arguments.csv, order)
        write_rows(arguments.csv, map(astuple, found.values()))
    try:
        for row in report(work, arguments.jobs, found):
            found[row.key] = row
            if arguments.csv is not None:
                append_row(arguments.csv, row)
    except KeyboardInterrupt:
        kept = f"; {arguments.csv} has what was compiled, the same command goes on"
        print("\nstopped" + kept * (arguments.csv is not None), file=sys.stderr)
        return 130
    if arguments.csv is not None:
        write_rows(arguments.csv, [astuple(found[key]) for key in order if key in found])
    return _show([found[row.key] for _, row in work])


def _show(rows: Sequence[Row]) -> int:
    """Print the rows; 1 where there are violations."""
    width = shutil.get_terminal_size((150, 24)).columns
    print(format_table(list(COLUMNS.values()), map(_cells, rows), width=width))
    wrong = [row for row in rows if row.violations]
    by = f"compiled by Triton {triton.__version__}"
    print(f"\n{len(rows)} kernels {by}, {len(wrong)} with violations")
    for row in wrong:
        print(f"{row.op} ({row.variant}), tile {row.tile}, {row.target}: {row.violations}")
    return 1 if wrong else 0


def work_of(chosen: Sequence[Variant], targets: Sequence[str]) -> list[tuple[Variant, Row]]:
    """Variants for targets in turn, each with its row as far as that is known before."""
    return [
        (variant, _empty(variant, target))
        for variant in chosen
        for target in targets
        if not (variant.product and variant.product.bulk) or target in COPY_ENGINES
        if not variant.targets or target in variant.targets
    ]


def report(
    work: Sequence[tuple[Variant, Row]], jobs: int, known: Collection[tuple[str, ...]] = ()
) -> Iterator[Row]:
    """Compile variants for targets, rows as they finish; progress on stderr.

    Args:
        work: what :func:`work_of` gives.
        jobs: processes.
        known: keys of rows that are there already.
    """
    left = [item for item in work if item[1].key not in known]
    if before := len(work) - len(left):
        print(f"{before} of {len(work)} are known", file=sys.stderr)
    start = time.perf_counter()
    for done, ((_, empty), row) in enumerate(in_processes(_measure, left, jobs, limit=_SECONDS), 1):
        if isinstance(row, Lost):
            row = replace(empty, violations=f"does not compile: {row.reason}")
        yield row
        if done % 25 == 0 or done == len(left):
            seconds = time.perf_counter() - start
            print(f"{before + done} of {len(work)} compiled, {seconds:.0f} s", file=sys.stderr)


def _empty(variant: Variant, target: str) -> Row:
    """The row of what is not compiled."""
    return Row(
        op=variant.op,
        variant=variant.name,
        rows="-".join(map(str, dict.fromkeys(variant.rows[:1] + variant.rows[-1:]))),
        tile=variant.tile,
        target=target,
        triton=triton.__version__,
        registers=None, shared=None, spills=None,
        instruction=None, left=None, copy=None, buffers=None,
        violations="",
        source=source_of(variant),
    )  # fmt: skip


def source_of(variant: Variant) -> str:
    """A hash of a variant's kernel, with what it calls, of its launch, and of the rules."""
    found = hashlib.sha256(_rules())
    found.update(variant.launch.function().cache_key.encode())
    found.update(repr(variant).encode())
    return found.hexdigest()[:16]


@functools.cache
def _rules() -> bytes:
    """What reads and judges the code."""
    return b"".join(Path(str(m.__file__)).read_bytes() for m in (compile_rules, cross_compile))


def _measure(item: tuple[Variant, Row]) -> Row:
    variant, row = item
    try:
        code = compile_launch(row.target, variant.launch)
    except Exception as error:  # one compiler's trouble with one kernel is a line of the report
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return replace(row, violations=f"does not compile: {text[:200]}")
    return replace(
        row,
        registers=code.registers,
        shared=code.shared,
        spills=code.spills,
        instruction=code.matrix_instruction,
        left=code.left_operand,
        copy=_copy(code),
        buffers=" ".join(map(str, code.buffers)) or None,
        violations="; ".join(violations(variant, row.target, code)),
    )


def _copy(code: Compiled) -> str | None:
    """The async copies' sizes, where there are none the widest load's."""
    if code.bulk_copy:
        return "bulk"
    if code.async_copies:
        return sizes(code.async_copies)
    return str(max(code.loads)) if code.loads else None


def _cells(row: Row) -> list[object]:
    values = [getattr(row, name) for name in COLUMNS]
    return ["-" if value in (None, "") else value for value in values]


if __name__ == "__main__":
    sys.exit(main())
