"""``sgtriton tune --card`` and ``--blocks``: what is predicted of a device that is absent."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from sgtriton_kernels import BlockSparse
from sgtriton_kernels.bsr_checks import why_no_kernel
from sgtriton_kernels.cards import CARD_NAMES, named_card
from sgtriton_kernels.cell import Cell
from sgtriton_kernels.lookup import BELIEVED

from .block_choice import BLOCKS, BlockChoice, choose_block, where_of
from .choice_table import Held, entry_of, file_name, products_held, write_table
from .file_products import file_products
from .options import (
    BLOCK,
    DTYPES,
    ROWS,
    SPARSITY,
    given,
    one_of,
    parse_block,
    parse_rows,
    parse_shapes,
    refuse,
    share,
)
from .predicted import (
    Predicted,
    PredictInterrupted,
    cells_of,
    open_at_random,
    pass_of,
    passes,
    predict_cells,
    shown,
    table_of,
    usual_cells,
)
from .progress import Progress
from .tables import format_table, print_text, terminal_width

_OK, _INTERRUPTED = 0, 130
_DTYPE = "bfloat16"
_NO_SIZE = "a file says no image size, on which the choice for a convolution depends"

# options that mean nothing where something is timed
ALONE = {"out": "only --card writes a table", "target": "it is of --blocks"}


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the options."""
    group.add_argument(
        "--card",
        metavar="NAME",
        help="compile and rank for a card that need not be here, and write a table marked "
        "predicted, of --shapes, of a --checkpoint, or else of usual layers; one of "
        f"{', '.join(CARD_NAMES)}, in short if that is clear (h100); with --blocks cpu, too",
    )
    group.add_argument(
        "--out",
        metavar="FILE",
        help="of --card; calls on that card take the tables that lie in the folder configs of "
        "sgtriton_kernels; default: its name with .json",
    )
    group.add_argument(
        "--blocks",
        action="store_true",
        help="which gate block pays at --target for the weights of --shapes, on --card or a CPU",
    )
    group.add_argument("--target", metavar="S", help="share of the weights that will be closed")


def run(arguments: argparse.Namespace, seconds: float) -> int:
    """Run what the options ask for."""
    asked = "blocks" if arguments.blocks else "card"
    refuse(arguments, asked, dict.fromkeys(("explain", "again"), "nothing is timed"))
    if arguments.blocks:
        refuse(arguments, asked, dict.fromkeys(("checkpoint", "rows"), "give --shapes"))
        refuse(arguments, asked, {"train": "it is asked of forward", "device": "--card names it"})
        return _blocks(arguments, where_of(arguments.card, torch.device("cpu")))
    refuse(arguments, "card", {"target": ALONE["target"], "device": "it names the device"})
    return _table(arguments, named_card(arguments.card), seconds)


def _dtype(arguments: argparse.Namespace, default: str) -> torch.dtype:
    return DTYPES[one_of("dtype", given(arguments.dtype, default), DTYPES)]


def _table(arguments: argparse.Namespace, where: str, seconds: float) -> int:
    """Rank candidates for a card and write its table."""
    cells, names, lines = _cells(arguments)
    out = Path(arguments.out or file_name(where))
    if not out.parent.is_dir() or out.is_dir():
        raise ValueError(f"out must be a file in a folder that exists, got {str(out)!r}")
    held = products_held(out, where)
    _check_loses_nothing(out, held, cells)
    left_out: list[str] = []
    code = _OK
    with Progress(f"compile for {where}", len(cells)) as bar:
        try:
            found = predict_cells(
                where, cells, seconds, lambda done, _, note: bar.show(done, note), left_out.append
            )
        except PredictInterrupted as stop:
            found, code = stop.found, _INTERRUPTED
    if code == _INTERRUPTED:
        print("sgtriton: interrupted", file=sys.stderr)
    if found:
        print(f"{where}: predicted, not measured\n")
        headers, rows = shown(found, names)
        print(format_table(headers, rows, width=terminal_width()))
    for text in (*lines, *left_out, *_skipped(found)):
        print_text(text)
    if not found:
        if code == _INTERRUPTED:
            return code
        raise ValueError(
            f"none of {len(cells)} products was ranked in {seconds:g} s, so that nothing is "
            "written" + ("" if left_out else "; give more --seconds")
        )
    if len(found) < len(cells) and code == _OK:
        print_text(f"{len(found)} of {len(cells)} products were ranked in {seconds:g} s")
    try:
        _check_loses_nothing(out, held, [product.cell for product in found])
    except ValueError as error:
        if code != _INTERRUPTED:
            raise
        print_text(str(error))
        return code
    write_table(out, table_of(where, found))
    gaining = sum(product.gain >= BELIEVED for product in found)
    print_text(f"wrote {out}: {gaining} of {len(found)} products gain {BELIEVED - 1:.0%} or more")
    print_text("calls on that card take the tables that lie in sgtriton_kernels/configs")
    return code


def _skipped(found: Sequence[Predicted]) -> Iterator[str]:
    """What the card's compiler refuses, each candidate of a pass once."""
    dropped = {(p.cell.op, name): why for p in found for name, why in p.dropped.items()}
    for (op, name), why in dropped.items():
        of_pass = "" if pass_of(op) == "fwd" else f" for {pass_of(op)}"
        yield f"{name} is skipped{of_pass}: {why}"


def _check_loses_nothing(out: Path, held: Held, ranked: Sequence[Cell]) -> None:
    """Raise ``ValueError`` where a table would be replaced by one that lacks products of it."""
    lost = held.entries - {entry_of(cell.key()) for cell in ranked}
    if lost or held.products > len(ranked):
        lacking = " and lack some of them" if lost else ""
        raise ValueError(
            f"out must be another file: the table {str(out)!r} is of {held.products} products, "
            f"these are {len(ranked)}{lacking}"
        )


def _cells(arguments: argparse.Namespace) -> tuple[list[Cell], dict[str, str], list[str]]:
    """The products that the options name, or the usual ones.

    Returns:
        Each product once, as tables tell them apart; of a file the layers that it is of, by
        :func:`.entry_of`; and lines that say which layers are left out.
    """
    if arguments.checkpoint is None:
        return _described_cells(arguments), {}, []
    if arguments.shapes is not None:
        raise ValueError("one of --shapes and --checkpoint is needed, got both")
    refuse(arguments, "checkpoint", dict.fromkeys(("block", "sparsity"), "the file says them"))
    products, lines = file_products(
        arguments.checkpoint, parse_rows(given(arguments.rows, ROWS)),
        None if arguments.dtype is None else _dtype(arguments, _DTYPE), torch.device("cpu"),
        arguments.train, _NO_SIZE, _why_no_kernel,
    )  # fmt: skip
    cells: dict[str, Cell] = {}
    layers: dict[str, list[str]] = {}
    for product in products:
        for cell in cells_of(product):
            cells.setdefault(entry_of(cell.key()), cell)
            layers.setdefault(entry_of(cell.key()), []).append(product.name)
    names = {entry: ", ".join(dict.fromkeys(found)) for entry, found in layers.items()}
    return [*cells.values()], names, lines


def _why_no_kernel(matrix: BlockSparse) -> str | None:
    """Why no kernel of a card serves a weight."""
    if not why_no_kernel(matrix.values.dtype, matrix.block):
        return None
    dtype, (bn, bk) = matrix.values.dtype, matrix.block
    return f"blocks of {bn}x{bk} in {str(dtype).removeprefix('torch.')}, which no kernel takes"


def _described_cells(arguments: argparse.Namespace) -> list[Cell]:
    """The products of ``--shapes``, or the usual ones."""
    refuse(arguments, "card", {"rows": "it is of --checkpoint"})
    dtype = _dtype(arguments, _DTYPE)
    if arguments.shapes is None:
        refuse(arguments, "card", dict.fromkeys(("block", "sparsity"), "give --shapes"))
        return list(usual_cells(dtype, arguments.train))
    block = given(arguments.block, BLOCK)
    bn, bk = parse_block(block)
    sparsity = share("sparsity", given(arguments.sparsity, SPARSITY))
    if bn is None or bk is None or any(side < 16 or side & (side - 1) for side in (bn, bk)):
        raise ValueError(f"block must have sides that are powers of two >= 16, got {block!r}")
    cells = []
    for m, n, k in parse_shapes(arguments.shapes):
        if bn > n or bk > k:
            raise ValueError(f"block must fit into the weight {n}x{k}, got {bn}x{bk}")
        empty = Cell("bsr_linear fwd", "triton", m, n, k, (bn, bk), 0, dtype)
        cells += passes(open_at_random(empty, sparsity), arguments.train)
    return cells


def _blocks(arguments: argparse.Namespace, where: str) -> int:
    """Print which block pays for each weight, and where each breaks even."""
    refuse(
        arguments,
        "blocks",
        {"block": "it is what is asked", "sparsity": "--target says it", "out": ALONE["out"]},
    )
    if arguments.shapes is None:
        raise ValueError("--blocks needs --shapes, such as 16x4096x4096")
    shapes = parse_shapes(arguments.shapes)
    if arguments.target is None:
        raise ValueError("--blocks needs --target: the share of the weights that will be closed")
    target = share("target", arguments.target)
    dtype = _dtype(arguments, "float32" if where == "cpu" else _DTYPE)
    weights: dict[tuple[int, int], list[int]] = {}
    for m, n, k in shapes:
        weights.setdefault((n, k), []).append(m)
    chosen = {
        (n, k): choose_block((n, k), target, where, rows, dtype) for (n, k), rows in weights.items()
    }
    said = "expected by the cost model" if where == "cpu" else "predicted, not measured"
    print(f"{where}: {said}; {target:.0%} closed; in brackets the break-even sparsity\n")
    headers = ["N, K", "M", *(f"{bn}x{bk}" for bn, bk in BLOCKS), "takes"]
    rows = [
        [
            f"{n}, {k}", ", ".join(map(str, weights[n, k])),
            *(_cell(found, block) for block in BLOCKS), "x".join(map(str, found.block)),
        ]
        for (n, k), found in chosen.items()
    ]  # fmt: skip
    print(format_table(headers, rows, width=terminal_width()))
    losing = [f"{n}, {k}" for (n, k), found in chosen.items() if _loses(found)]
    notes = [f"{weight}: no block pays at {target:.0%}, dense is faster" for weight in losing]
    if any(len(found.speedups) < len(BLOCKS) for found in chosen.values()):
        notes.append("-: blocks too large for the weight")
    if notes:
        print()
    for note in notes:
        print_text(note)
    return _OK


def _loses(found: BlockChoice) -> bool:
    """Whether dense is faster than any block."""
    return bool(found.speedups) and max(found.speedups.values()) < 1


def _cell(found: BlockChoice, block: tuple[int, int]) -> str:
    if block not in found.speedups:
        return "-"
    even = found.break_even[block]
    return f"{found.speedups[block]:.2f}x ({'never' if even == 1 else f'{even:.0%}'})"
