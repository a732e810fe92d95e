"""Write README_BENCH.md from the CSVs in ``bench/results``."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import bandwidth, conv, models, native, overhead, roofline, serving, training
from .accuracy import Row
from .rows import RESULTS, read

PAGE = Path(__file__).parents[1] / "README_BENCH.md"
README = Path(__file__).parents[1] / "README.md"
_MARKS = "<!-- serving: written by `python -m bench report` -->\n", "<!-- end of serving -->\n"

_HEAD = """# Measurements

Written by `python -m bench report` from the CSVs in `bench/results`; edit neither by hand. Every
figure was measured, beside what it is compared with; what is not here was not measured.

**Not measured yet:** anything on a GPU.
"""

_ACCURACY = """
## Accuracy against sparsity

LeNet-300-100 on MNIST (60,000 training and 10,000 test images), {epochs} epochs, batch 128, Adam
2e-3, {seeds} seed(s), one thread, PyTorch {torch}, Python {python}. Gated and dense twins start
from the same weights and see the same batches; the last layer is gated per weight. Accuracy is
that of the last step; test images chose nothing. Rerun: `python -m bench accuracy --data DIR` with
the four IDX files in `DIR` (rows that the CSV has are not trained again: move it away first).

"""

_TRAINING = """
## A gated training step beside the dense one

One linear layer, forward and backward, fp32, `torch` implementation, {threads} threads of {cpu},
PyTorch {torch}, commit {commit}; medians of candidates that took turns, the dense layer being 1.
"Eager gating" is `F.linear(x, W * ste(g))`. "Saved" is what is kept for backward beside input and
parameters. Per-weight gates: half are closed; blocks: {closed:.0%}. Each thread keeps a scratch
buffer between calls (the largest weight's size, or 8 MiB beside inputs and outputs of 512 rows),
which is in no column. Gates and their optimizer state come on top: 4 bytes a gate, its gradient 4,
Adam's moments 8. Rerun: `make bench-train`.

"""

_SERVING = """
## Serving a pruned linear layer

A layer without bias, blocks of its weight 0 at random, made sparse by `sgtriton.sparsify` (which
chooses a form for each bucket of M by timing) and called under `torch.inference_mode`; {threads}
threads of {cpu}, PyTorch {torch}, commit {commit}. Speed-up over the dense layer: `F.linear`, for
bf16 the faster of bf16 and of a copy of the weight in fp32. Geometric means over (N, K) =
{shapes}, of cells whose dense time is {counted} ms or more; the ideal is 1 / density. Peers, in the
same turns: PyTorch's BSR product, scipy's, onnxruntime's dense one (fp32 only; its threads do not
spin between calls). Rerun: `make bench-serve`. All cells: `bench/results/serving.csv`.

"""

_OVERHEAD = """
## What a call costs

Microseconds of one call with next to no arithmetic (in brackets: over the dense call in its group,
in the same turns): one row by a 64x64 weight, half of its 16x16 blocks closed; 3x3 convolution of
32 channels on 4x4 pixels, no block closed. Forward only; {threads} threads of {cpu}, PyTorch
{torch}, commit {commit}. Rerun: `make bench-serve`.

"""

_CONV = """
## VGG-16's convolutions, {closed:.0%} of the {block}x{block} blocks closed

Milliseconds of one layer, {dtype}, {threads} threads of {cpu}, PyTorch {torch}, commit {commit}; in
turns with `F.conv2d` on the dense weight, images contiguous and channels-last. "Faster" compares
the column before it with the faster dense one{remark} Rerun: `make bench-serve`.

"""

_MODELS = """
## Whole models

Random models, 32x32 blocks closed at random, taken through patch, sparsify, save and load; the
loaded model gives the served one's bits, and the gated one's outputs up to rounding. The loaded
model beside the dense one in the same turns, {threads} threads of {cpu}, PyTorch {torch}, commit
{commit}. Rerun: `make bench-serve`.

"""

_NATIVE = """
## The kernel of `bsr_linear` in native CPU code

Blocks of {block}x{block}, weight {N}x{K}, fp32, Triton {triton} compiled for {cpu}, {threads}
threads, commit {commit}; beside `F.linear` on the dense weight in the same turns. The ideal is
1 / density. Rerun: `make bench-serve`.

"""

_ROOFLINE = """
## Serving on cards: predicted, not measured

From data sheets, assumptions and the tiles that the package takes, by the formulas of
`sgtriton/roofline.py`; bf16, N = K = 4096, 90 % of the blocks closed: speed-up over the dense
product for blocks of 32 / 64 / 128, in brackets the sparsity from which the product over blocks is
faster. A first run on a card will show what the model leaves out. Rerun:
`python -m bench roofline`.

"""

_BANDWIDTH = """
## Bandwidth of `gate_weight` in native CPU code

Per-weight threshold gates on a {N}x{K} fp32 weight, Triton {triton} compiled for {cpu}, {threads}
threads, commit {commit}; bytes that the result needs per second, beside `clone` in the same turns.
Rerun: `make bench-train`.

"""


def training_table(rows: list[training.Row]) -> str:
    """A Markdown table, one row a candidate at a shape."""
    lines = [
        "| M, N, K | gates | block | candidate | ms | dense = 1 | saved, bytes |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.M}, {r.N}, {r.K} | {r.gate} | {r.block} | {r.candidate} | {r.ms_p50:.2f} | "
        f"{r.ratio:.2f} | {r.saved_bytes:,} |"
        for r in rows
    ]
    return "\n".join(lines)


def bandwidth_table(rows: list[bandwidth.Row]) -> str:
    """A Markdown table, one row a pass and dtype."""
    lines = ["| pass | result or gradient | GB/s | copy, GB/s | share |", "|---|---|---|---|---|"]
    lines += [
        f"| {r.pass_} | {r.dtype} | {r.gb_per_s:.1f} | {r.copy_gb_per_s:.1f} | {r.ratio:.0%} |"
        for r in rows
    ]
    return "\n".join(lines)


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


def serving_cells() -> list[serving.Cell]:
    """What was measured of serving."""
    return serving.cells(read(RESULTS / "serving.csv", serving.Row))


def _serving(found: list[serving.Cell]) -> str:
    rows = read(RESULTS / "serving.csv", serving.Row)
    commits = ", ".join(dict.fromkeys(row.commit for row in rows))
    text = _SERVING.format(
        **vars(rows[0]) | {"commit": commits},
        shapes=", ".join(map(str, serving.SHAPES)),
        counted=serving.COUNTED_MS,
    )
    for dtype in dict.fromkeys(c.dtype for c in found):
        text += f"{dtype}:\n\n{serving.speedups_table(found, dtype)}\n\n"
        for block in serving.BLOCKS:
            group = [c for c in found if (c.dtype, c.block) == (dtype, block)]
            if group:
                worst = min(c.speedup for c in group)
                text += (
                    f"Block {block}: {serving.mean_share(group):.2f} of the ideal; "
                    f"slowest cell {worst:.2f} of dense.\n"
                )
        text += "\n"
    return (
        text
        + f"Cells behind dense, or behind a peer by more than 5 %:\n\n{serving.losses(found)}\n"
    )


def readme_with_tables(text: str) -> str:
    """README.md with its table of serving, and what is lost, as the results give it."""
    begin, end = _MARKS
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError("README.md must hold the marks of its serving table once")
    before, rest = text.split(begin)
    found = serving_cells()
    table = serving.speedups_table(found, "float32")
    lost = serving.losses_in_short(found)
    return f"{before}{begin}{table}\n\n{lost}\n{end}{rest.split(end)[1]}"


def page() -> str:
    """The whole page, from what the results folder holds."""
    text = _HEAD
    rows = [r for r in read(RESULTS / "accuracy.csv", Row) if r.model == "lenet300"]
    if rows:
        epochs = ", ".join(map(str, sorted({r.epochs for r in rows})))
        text += _ACCURACY.format(
            epochs=epochs,
            seeds=len({r.seed for r in rows}),
            torch=", ".join(sorted({r.torch for r in rows})),
            python=", ".join(sorted({r.python for r in rows})),
        )
        text += accuracy_table(rows) + "\n"
    if steps := read(RESULTS / "training.csv", training.Row):
        text += _TRAINING.format(**vars(steps[0]) | {"closed": training.CLOSED})
        text += training_table(steps) + "\n"
    if cells := serving_cells():
        text += _serving(cells)
    if calls := read(RESULTS / "overhead.csv", overhead.Row):
        text += _OVERHEAD.format(**vars(calls[0])) + overhead.markdown(calls) + "\n"
    if convs := read(RESULTS / "conv.csv", conv.Row):
        text += (
            _CONV.format(**vars(convs[0]), remark=conv.remark(convs)) + conv.markdown(convs) + "\n"
        )
    if whole := read(RESULTS / "models.csv", models.Row):
        text += _MODELS.format(**vars(whole[0])) + models.markdown(whole) + "\n"
    if kernels := read(RESULTS / "native.csv", native.Row):
        text += _NATIVE.format(**vars(kernels[0])) + native.markdown(kernels) + "\n"
    if predicted := read(RESULTS / "roofline.csv", roofline.Row):
        text += _ROOFLINE + roofline.roofline_table(predicted) + "\n"
    if rates := read(RESULTS / "bandwidth.csv", bandwidth.Row):
        text += _BANDWIDTH.format(**vars(rates[0])) + bandwidth_table(rates) + "\n"
    return text


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``report`` to the command line."""
    command = commands.add_parser(
        "report", help="write README_BENCH.md, and README.md's table, from the CSVs"
    )
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    readme = readme_with_tables(README.read_text(encoding="utf-8"))
    PAGE.write_text(page(), encoding="utf-8")
    README.write_text(readme, encoding="utf-8")
    print(f"wrote {PAGE.name} and the serving table of {README.name}")
    return 0
