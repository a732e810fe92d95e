"""Write README_BENCH.md from the CSVs in ``bench/results``."""

from __future__ import annotations

import argparse
from pathlib import Path

from .accuracy import RESULTS, Row, read

PAGE = Path(__file__).parents[1] / "README_BENCH.md"

_HEAD = """# Measurements

Written by `python -m bench report` from the CSVs in `bench/results`; edit neither by hand. Every
figure was measured, beside what it is compared with; what is not here was not measured.

**Not measured yet:** anything on a GPU; speed of training and of serving against other libraries.
"""

_ACCURACY = """
## Accuracy against sparsity

LeNet-300-100 on MNIST (60,000 training and 10,000 test images), {epochs} epochs, batch 128, Adam
2e-3, {seeds} seed(s), one thread, PyTorch {torch}, Python {python}. Gated and dense twins start
from the same weights and see the same batches; the last layer is gated per weight. Accuracy is
that of the last step; test images chose nothing. Rerun: `python -m bench accuracy --data DIR` with
the four IDX files in `DIR` (rows that the CSV has are not trained again: move it away first).

"""


def accuracy_table(rows: list[Row]) -> str:
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


def page() -> str:
    """The whole page, from what the results folder holds."""
    text = _HEAD
    rows = [r for r in read(RESULTS / "accuracy.csv") if r.model == "lenet300"]
    if rows:
        epochs = ", ".join(map(str, sorted({r.epochs for r in rows})))
        text += _ACCURACY.format(
            epochs=epochs,
            seeds=len({r.seed for r in rows}),
            torch=", ".join(sorted({r.torch for r in rows})),
            python=", ".join(sorted({r.python for r in rows})),
        )
        text += accuracy_table(rows) + "\n"
    return text


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``report`` to the command line."""
    command = commands.add_parser("report", help="write README_BENCH.md from the CSVs")
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.name}")
    return 0
