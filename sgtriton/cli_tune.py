"""``sgtriton tune``: which products are meant, the search while it is shown, and what it found."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch
from sgtriton_kernels import BlockSparse
from sgtriton_kernels.records import cache_folder

from . import cli_absent
from .file_products import file_products
from .options import (
    BLOCK,
    DTYPES,
    ROWS,
    SPARSITY,
    given,
    number,
    one_of,
    parse_block,
    parse_rows,
    parse_shapes,
    refuse,
    share,
)
from .patterns import random_pattern
from .products import Product
from .progress import Progress
from .tables import print_text, terminal_width
from .tune_cache import why_not
from .tune_report import TuneInterrupted
from .tuning import check_may_search, choices_of, tune_products

_OK, _FAILED, _INTERRUPTED = 0, 1, 130
_SECONDS = "60"
_SEED = 0
_NO_SIZE = "a file says no image size: sgtriton.tune(model, example_input) chooses for convolutions"


def add_command(commands: argparse._SubParsersAction[Any]) -> None:
    """Add ``tune`` to the commands of ``sgtriton``."""
    tune = commands.add_parser(
        "tune",
        help="measure how products are computed fastest on this device",
        description="Check and time the ways to compute block-sparse linear products on this "
        "device. What is found is kept in the user's cache and taken from the next call on; "
        "a product that was tuned before is not timed again.",
    )
    what = tune.add_argument_group("what to tune (one of the two)")
    what.add_argument(
        "--shapes",
        metavar="MxNxK[,...]",
        help="rows of x, outputs and inputs of the weight, whose blocks are open at random",
    )
    what.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="the linear layers that a file stores; it says no "
        "image size, so convolutions take sgtriton.tune(model, example_input)",
    )
    shapes = tune.add_argument_group("of --shapes")
    shapes.add_argument("--block", metavar="BNxBK", help=f"outputs x inputs; default: {BLOCK}")
    shapes.add_argument(
        "--sparsity", help=f"share of the blocks that is closed, in [0, 1); default: {SPARSITY}"
    )
    checkpoint = tune.add_argument_group("of --checkpoint")
    checkpoint.add_argument("--rows", metavar="M[,...]", help=f"rows of x; default: {ROWS}")
    tune.add_argument(
        "--dtype",
        help=f"{', '.join(DTYPES)}; default: float32, of a file its own",
    )
    tune.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    tune.add_argument("--train", action="store_true", help="the products of gradients as well")
    tune.add_argument(
        "--seconds", default=_SECONDS, help=f"to spend, at the most; default: {_SECONDS}"
    )
    how = tune.add_mutually_exclusive_group()
    how.add_argument("--again", action="store_true", help="also what was tuned before")
    how.add_argument(
        "--explain", action="store_true", help="time nothing; print what is taken now, and why"
    )
    cli_absent.add_arguments(tune.add_argument_group("without timing"))
    tune.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; an exit code as :func:`.cli.main` gives it."""
    begin = time.perf_counter()
    seconds = number("seconds", arguments.seconds, float)
    check_may_search(seconds)
    if arguments.blocks or arguments.card is not None:
        return cli_absent.run(arguments, seconds)
    refuse(arguments, "shapes or --checkpoint", cli_absent.ALONE)
    products = _products(arguments)
    if arguments.explain:
        _explain(products)
        return _OK
    if (reason := why_not(cache_folder())) is not None:
        raise ValueError(
            f"what is found could not be kept: {reason}; SGTRITON_CACHE_DIR names another folder"
        )
    left = seconds - (time.perf_counter() - begin)
    return _search(products, max(left, 1e-3), arguments.again)


def _products(arguments: argparse.Namespace) -> list[Product]:
    """What the options name; everything about them is checked here."""
    if (arguments.shapes is None) == (arguments.checkpoint is None):
        came = "neither" if arguments.shapes is None else "both"
        raise ValueError(f"one of --shapes and --checkpoint is needed, got {came}")
    device = _device(arguments.device)
    name = arguments.dtype
    dtype = None if name is None else DTYPES[one_of("dtype", name, DTYPES)]
    if arguments.shapes is not None:
        refuse(arguments, "shapes", {"rows": "the first size of each shape says them"})
        return _random_products(
            parse_shapes(arguments.shapes),
            parse_block(given(arguments.block, BLOCK)),
            share("sparsity", given(arguments.sparsity, SPARSITY)),
            dtype or torch.float32,
            device,
            arguments.train,
        )
    refuse(arguments, "checkpoint", dict.fromkeys(("block", "sparsity"), "the file says them"))
    rows = parse_rows(given(arguments.rows, ROWS))
    products, lines = file_products(
        arguments.checkpoint, rows, dtype, device, arguments.train, _NO_SIZE
    )
    for line in lines:
        print_text(line)
    return products


def _device(text: str | None) -> torch.device:
    if text is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(one_of("device", text, ("cpu", "cuda")))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be cpu, since PyTorch sees no card here; got 'cuda'")
    return device


def _random_products(
    shapes: list[tuple[int, int, int]],
    sides: tuple[int | None, int | None],
    sparsity: float,
    dtype: torch.dtype,
    device: torch.device,
    trains: bool,
) -> list[Product]:
    """Weights whose blocks are open at random, the same in each run."""
    rows: dict[tuple[int, int], list[int]] = {}
    for m, n, k in shapes:
        bn, bk = sides[0] or n, sides[1] or k
        if bn > n or bk > k:
            raise ValueError(f"block must fit into the weight {n}x{k}, got {bn}x{bk}")
        rows.setdefault((n, k), []).append(m)
    products = []
    for (n, k), several in rows.items():
        block = sides[0] or n, sides[1] or k
        matrix = _random_matrix(n, k, block, sparsity, dtype, device)
        products.append(Product("", matrix, tuple(dict.fromkeys(several)), trains))
    return products


def _random_matrix(
    n: int,
    k: int,
    block: tuple[int, int],
    sparsity: float,
    dtype: torch.dtype,
    device: torch.device,
) -> BlockSparse:
    grid = -(-n // block[0]), -(-k // block[1])
    blocks = grid[0] * grid[1]
    closed = blocks - max(1, round((1 - sparsity) * blocks))
    is_open = random_pattern(grid, closed, torch.Generator().manual_seed(_SEED))
    random = torch.Generator(device).manual_seed(_SEED)
    weight = torch.randn(n, k, generator=random, device=device).to(dtype)
    return BlockSparse.from_dense(weight, block, is_open)


class _Shown:
    """Shows how far a search has come, and what it says; a context manager."""

    def __init__(self) -> None:
        self._bar: Progress | None = None

    def progress(self, done: int, count: int, label: str) -> None:
        if self._bar is None:
            self._bar = Progress("tune", count)
        self._bar.show(done, label or "done")

    def say(self, text: str) -> None:
        assert self._bar is not None, "a search first says how much there is"
        self._bar.write(text)

    def __enter__(self) -> _Shown:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.__exit__(*exc)


def _search(products: list[Product], seconds: float, again: bool) -> int:
    code = _OK
    with _Shown() as shown:
        try:
            report = tune_products(
                products, seconds, again=again, progress=shown.progress, say=shown.say
            )
        except TuneInterrupted as stop:
            report, code = stop.report, _INTERRUPTED
    if code == _INTERRUPTED:
        print("sgtriton: interrupted", file=sys.stderr)
    print(report.text(terminal_width()))
    passes = {row.cell.op for row in report.rows}
    if any(product.trains for product in products) and passes == {"bsr_linear fwd"}:
        print_text("gradients are computed in one way on this device: nothing to choose")
    print(f"records: {cache_folder()}")
    if report.timed:
        print_text(
            "calls take these from now on; sgtriton.sparsify chooses layers' forms anew by them"
        )
    return _FAILED if code == _OK and report.wrong else code


def _explain(products: list[Product]) -> None:
    for row in choices_of(products):
        cell, choice = row.cell, row.choice
        parts = [row.name] if row.name else []
        parts += [cell.op, f"M {cell.M}", f"weight {cell.weight}"]
        parts += [f"blocks {cell.block[0]}x{cell.block[1]}", f"density {cell.density:.3f}"]
        print_text(", ".join(parts))
        text = f"takes {choice.candidate.name} ({choice.source}): {choice.reasons}"
        print_text(text, "  ")
