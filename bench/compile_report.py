"""What the compilers make of every kernel that ships, for every card and without one.

Each launch is compiled for each target and its code is read: registers, shared memory, spills,
matrix instructions, copies, pipeline. What cannot be read there is shown as ``-``. Ends with 1
where the code breaks what the package counts on, with 2 where nothing can be compiled.

How deep a pipeline is shows in the buffers of the tiles that it keeps in shared memory: of S stages
S - 1, since one step's tiles are in registers while it is computed, and S where the matrix units
themselves read the tile there (wgmma, tcgen05). Tiles that wait in registers (AMD's, of a weight
that is multiplied by gates) show in no buffer, nor do elements that are read one by one.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path

from sgtriton_kernels._triton import triton

from sgtriton.compilers import compile_launch
from sgtriton.cross_compile import (
    COPY_ENGINES,
    SHARED_LIMITS,
    TARGETS,
    Compiled,
    shallow_pipeline,
    why_not,
)
from sgtriton.tables import format_table

from .options import check_count
from .variants import Product, Variant, variants

# the widest matrix instruction of 16-bit values, and the one for left operands under 64 rows
INSTRUCTIONS = {
    "sm_80": ("mma.sync", "mma.sync"), "sm_86": ("mma.sync", "mma.sync"),
    "sm_89": ("mma.sync", "mma.sync"), "sm_90": ("wgmma", "mma.sync"),
    "sm_100": ("tcgen05.mma", "mma.sync"), "sm_120": ("mma.sync", "mma.sync"),
    "gfx942": ("v_mfma", "v_mfma"), "gfx1100": ("v_wmma", "v_wmma"),
}  # fmt: skip
LEFT_DIRECT = {"sm_90": "registers", "sm_100": "tensor memory"}
# passes whose weight goes through registers, to be multiplied by its gates
_GATED = ("fused fwd", "fused dx", "skip fwd", "skip dx")


@dataclass(frozen=True)
class Row:
    """One line of the table; ``None`` is what cannot be read from the code.

    ``registers``, ``shared`` and ``spills`` are ``None`` of what does not compile.
    """

    op: str
    variant: str
    rows: str
    tile: str
    target: str
    triton: str
    registers: int | None
    shared: int | None
    spills: int | None
    instruction: str | None
    left: str | None
    copy: str | None
    buffers: str | None
    violations: str


_KEY = ("op", "variant", "rows", "tile", "target", "triton")
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
    parser.add_argument("--csv", type=Path, help="write the rows there too")
    parser.add_argument(
        "--join", type=Path, nargs="+", metavar="CSV", help="compile nothing: join these into --csv"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes; default 2")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.join is not None:
        return _join(arguments.join, arguments.csv)
    if reason := why_not():
        raise ValueError(reason)
    check_count("--jobs", arguments.jobs)
    chosen = variants()
    if arguments.op:
        names = list(dict.fromkeys(v.op for v in chosen))
        if unknown := [op for op in arguments.op if op not in names]:
            raise ValueError(f"--op must be one of {', '.join(names)}; got {', '.join(unknown)}")
        chosen = [v for v in chosen if v.op in arguments.op]
    targets = [t for t in TARGETS if not arguments.target or t in arguments.target]
    rows = report(chosen, targets, arguments.jobs)
    width = shutil.get_terminal_size((150, 24)).columns
    print(format_table(list(COLUMNS.values()), map(_cells, rows), width=width))
    if arguments.csv is not None:
        _write(arguments.csv, map(astuple, rows))
    wrong = [row for row in rows if row.violations]
    by = f"compiled by Triton {triton.__version__}"
    print(f"\n{len(rows)} kernels {by}, {len(wrong)} with violations")
    for row in wrong:
        print(f"{row.op} ({row.variant}), tile {row.tile}, {row.target}: {row.violations}")
    return 1 if wrong else 0


def _join(paths: Sequence[Path], out: Path | None) -> int:
    """Write the rows of several Tritons into one file, in an order that no run changes."""
    if out is None:
        raise ValueError("--join needs --csv, the file to write")
    names, rows = [f.name for f in fields(Row)], {}
    for path in paths:
        try:
            with open(path, newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                if reader.fieldnames != names:
                    raise ValueError(f"{path} is no report: its columns are {reader.fieldnames}")
                rows |= {tuple(line[name] for name in _KEY): line for line in reader}
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    ordered = [rows[key] for key in sorted(rows, key=_order)]
    _write(out, [[line[name] for name in names] for line in ordered])
    versions = sorted({line["triton"] for line in ordered}, key=_numbers)
    wrong = sum(line["violations"] != "" for line in ordered)
    print(f"{len(ordered)} kernels, Triton {', '.join(versions)}: {wrong} with violations")
    return 1 if wrong else 0


def _order(key: tuple[str, ...]) -> tuple[object, ...]:
    *what, target, version = key
    return (*what, list(TARGETS).index(target), _numbers(version))


def _numbers(version: str) -> list[tuple[int, str]]:
    """A version, to be sorted by."""
    return [(int(part) if part.isdigit() else -1, part) for part in version.split(".")]


def report(chosen: Sequence[Variant], targets: Sequence[str], jobs: int) -> list[Row]:
    """Compile each variant for each target; rows in that order, progress on stderr."""
    work = [
        (variant, target)
        for variant in chosen
        for target in targets
        if not (variant.product and variant.product.bulk) or target in COPY_ENGINES
    ]
    rows: list[Row] = []
    start = time.perf_counter()
    for row in _measured(work, jobs):
        rows.append(row)
        if len(rows) % 25 == 0 or len(rows) == len(work):
            seconds = time.perf_counter() - start
            print(f"{len(rows)} of {len(work)} compiled, {seconds:.0f} s", file=sys.stderr)
    return rows


def _measured(work: Sequence[tuple[Variant, str]], jobs: int) -> Iterator[Row]:
    if jobs == 1 or len(work) < 2:
        yield from map(_measure, work)
        return
    # a fresh process: the compilers' threads do not survive a fork
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        yield from pool.map(_measure, work)


def _measure(item: tuple[Variant, str]) -> Row:
    variant, target = item
    row = Row(
        op=variant.op,
        variant=variant.name,
        rows="-".join(map(str, dict.fromkeys(variant.rows[:1] + variant.rows[-1:]))),
        tile=variant.tile,
        target=target,
        triton=triton.__version__,
        registers=None, shared=None, spills=None,
        instruction=None, left=None, copy=None, buffers=None,
        violations="",
    )  # fmt: skip
    try:
        code = compile_launch(target, variant.launch)
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
        violations="; ".join(violations(variant, target, code)),
    )


def _copy(code: Compiled) -> str | None:
    """The async copies' sizes, where there are none the widest load's."""
    if code.bulk_copy:
        return "bulk"
    if code.async_copies:
        return _sizes(code.async_copies)
    return str(max(code.loads)) if code.loads else None


def violations(variant: Variant, target: str, code: Compiled) -> Iterator[str]:
    """What the code of a variant breaks, in words."""
    if code.spills:
        unit = "bytes" if target.startswith("sm_") else "registers"
        yield f"{code.spills} {unit} spilled"
    if code.shared > SHARED_LIMITS[target]:
        yield f"{code.shared} bytes of shared memory, the card has {SHARED_LIMITS[target]}"
    if (product := variant.product) is not None:
        yield from _of_product(product, variant.launch.num_warps, target, code)
    yield from _of_pipeline(variant, target, code)
    if variant.wide is not None and target.startswith("sm_"):
        wide = sum(size == 16 for size in code.accesses)
        narrow = len(code.accesses) - wide
        if wide < variant.wide or narrow > variant.narrow:
            yield (
                f"{wide} accesses of 16 bytes and {narrow} narrower ones instead of at least "
                f"{variant.wide} and at most {variant.narrow}"
            )


def _of_product(product: Product, num_warps: int, target: str, code: Compiled) -> Iterator[str]:
    if product.half:
        widest, other = INSTRUCTIONS[target]
        expected = widest if product.left_rows >= 64 else other
        if code.matrix_instruction not in (expected, widest):
            yield f"{code.matrix_instruction or 'no matrix instruction'} instead of {expected}"
        left = LEFT_DIRECT.get(target)
        if product.left_direct and left and code.left_operand != left:
            yield f"left operand in {code.left_operand or 'an unknown place'} instead of {left}"
    if product.bulk:
        if not code.bulk_copy or code.async_copies:
            yield "tiles that the copy engine does not bring in"
    elif product.copies and target.startswith("sm_") and not code.bulk_copy:
        yield from _narrow_copies(product, num_warps * 32, code)


def _of_pipeline(variant: Variant, target: str, code: Compiled) -> Iterator[str]:
    """A pipeline that holds fewer steps than the launch asked for, where that can be read."""
    num_stages = variant.launch.num_stages
    if num_stages is None or num_stages < 2:
        return
    if not code.buffers:
        must = variant.product and variant.product.ahead and target.startswith("sm_")
        if not must:
            return
    gated = variant.op in _GATED or code.left_operand in ("registers", "tensor memory")
    fault = shallow_pipeline(num_stages, code.matrix_instruction, code.buffers, 1 if gated else 2)
    if fault:
        yield fault


def _narrow_copies(product: Product, threads: int, code: Compiled) -> Iterator[str]:
    expected = {min(16, tile // threads) for tile in product.copies}
    if set(code.async_copies) != expected:
        yield (
            f"tiles copied in pieces of {_sizes(code.async_copies) or 'no'} bytes instead of "
            f"{_sizes(expected)}"
        )


def _sizes(sizes: Iterable[int]) -> str:
    return " ".join(map(str, sorted(set(sizes), reverse=True)))


def _cells(row: Row) -> list[object]:
    values = [getattr(row, name) for name in COLUMNS]
    return ["-" if value in (None, "") else value for value in values]


def _write(path: Path, lines: Iterable[Sequence[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([f.name for f in fields(Row)])
        writer.writerows(["-" if value is None else value for value in line] for line in lines)


if __name__ == "__main__":
    sys.exit(main())
