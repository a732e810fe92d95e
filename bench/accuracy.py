"""Accuracy against sparsity: LeNet-300-100 with gates beside its dense twin, one row a training.

Both twins start from the same weights and see the same batches. Rows are appended as they finish;
a row that the file has already is not trained again.
"""

from __future__ import annotations

import argparse
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import sgtriton
from sgtriton.demo.data import Digits, load_digits
from sgtriton.demo.models import add_gates, make_model
from sgtriton.demo.training import accuracy, steps_for, train
from sgtriton.options import parse_block

from .options import check_count, check_file
from .rows import RESULTS, append, commit, read


@dataclass(frozen=True)
class Cell:
    """One training: gate kind, block (as on the command line), target sparsity; dense at 0."""

    gate: str
    block: str
    target: float


CELLS = (
    Cell("none", "-", 0.0),
    Cell("threshold", "1x1", 0.95),
    Cell("threshold", "1x1", 0.98),
    Cell("bernoulli", "1x1", 0.95),
    Cell("threshold", "4x4", 0.9),
    Cell("threshold", "16x16", 0.9),
)


_TEXT = """
## Accuracy against sparsity

LeNet-300-100 on MNIST (60,000 training and 10,000 test images), {epochs} epochs, batch 128, Adam
2e-3, {seeds} seed(s), one thread, PyTorch {torch}, Python {python}. Gated and dense twins start
from the same weights and see the same batches; the last layer is gated per weight. Accuracy is
that of the last step; test images chose nothing. Rerun: `python -m bench accuracy --data DIR` with
the four IDX files in `DIR` (rows that the CSV has are not trained again: move it away first).

"""


@dataclass(frozen=True)
class Row:
    """One row of the CSV; ``accuracy`` is on the test images, at the end of the training."""

    model: str
    dataset: str
    images: int
    gate: str
    block: str
    target: float
    seed: int
    epochs: int
    accuracy: float
    sparsity: float
    open_per_layer: str
    seconds: float
    sgtriton: str
    torch: str
    python: str
    commit: str


def markdown(rows: list[Row]) -> str:
    """A Markdown table, one row a training."""
    lines = [
        "| gates | block | target sparsity | reached | test accuracy | open share per layer |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        gates, target, reached = "dense twin", "-", "-"
        if row.gate != "none":
            gates, target, reached = row.gate, f"{row.target:.0%}", f"{row.sparsity:.2%}"
        layers = row.open_per_layer or "-"
        lines.append(
            f"| {gates} | {row.block} | {target} | {reached} | {row.accuracy:.2%} | {layers} |"
        )
    return "\n".join(lines)


def section(rows: list[Row]) -> str:
    """The page's section, of the larger trainings' model."""
    rows = [row for row in rows if row.model == "lenet300"]
    if not rows:
        return ""
    text = _TEXT.format(
        epochs=", ".join(map(str, sorted({r.epochs for r in rows}))),
        seeds=len({r.seed for r in rows}),
        torch=", ".join(sorted({r.torch for r in rows})),
        python=", ".join(sorted({r.python for r in rows})),
    )
    return text + markdown(rows) + "\n"


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``accuracy`` to the command line."""
    command = commands.add_parser("accuracy", help="accuracy against sparsity on MNIST")
    command.add_argument("--data", help="folder with the four IDX files; default: as the demo")
    command.add_argument("--model", default="lenet300", choices=["lenet300", "lenet5"])
    command.add_argument("--epochs", type=int, default=16)
    command.add_argument("--seeds", type=int, default=1, help="how many, from 0 on")
    command.add_argument("--out", type=Path, default=RESULTS / "accuracy.csv")
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    check_count("--epochs", arguments.epochs)
    check_count("--seeds", arguments.seeds)
    check_file("--out", arguments.out)
    digits = load_digits(arguments.data)
    print(f"data    {digits.source}")
    done = read(arguments.out, Row)
    for seed in range(arguments.seeds):
        for cell in CELLS:
            where = (arguments.model, digits.dataset, seed, arguments.epochs)
            if any(
                (r.model, r.dataset, r.seed, r.epochs) == where
                and Cell(r.gate, r.block, r.target) == cell
                for r in done
            ):
                continue
            row = measure(arguments.model, digits, cell, seed, arguments.epochs)
            append(arguments.out, row)
            print(
                f"{row.gate:9} {row.block:5} target {row.target:.2f}: accuracy "
                f"{row.accuracy:.2%}, sparsity {row.sparsity:.2%}, {row.seconds:.0f} s",
                flush=True,
            )
    return 0


def measure(name: str, digits: Digits, cell: Cell, seed: int, epochs: int) -> Row:
    """Train one cell; one thread, so that a seed gives the same figures on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    start = time.perf_counter()
    model, controller = make_model(name, seed), None
    if cell.gate != "none":
        add_gates(model, parse_block(cell.block), cell.gate)
        controller = sgtriton.SparsityController(
            model, target=cell.target, steps=steps_for(digits, epochs)
        )
    try:
        train(model, digits, epochs, seed, controller)
    finally:
        torch.set_num_threads(threads)
    summary = sgtriton.summary(model)
    return Row(
        model=name,
        dataset=digits.dataset,
        images=digits.images,
        gate=cell.gate,
        block=cell.block,
        target=cell.target,
        seed=seed,
        epochs=epochs,
        accuracy=round(accuracy(model, digits.test_x, digits.test_y), 5),
        sparsity=round(summary.sparsity, 5),
        open_per_layer=" ".join(f"{1 - layer.sparsity:.3f}" for layer in summary.layers),
        seconds=round(time.perf_counter() - start, 1),
        sgtriton=sgtriton.__version__,
        torch=torch.__version__,
        python=platform.python_version(),
        commit=commit(),
    )
