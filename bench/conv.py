"""Serving pruned convolutions: VGG-16's thirteen, beside the dense ones, on a CPU.

Each has 3x3 taps and a padding of 1; its blocks of 32x32 weights are closed at random. Compared are
``F.conv2d`` on the weight with zeros filled in, the layer that ``sgtriton.sparsify`` makes of it,
and ``bsr_conv2d`` whatever the layer chose, on images that are contiguous and on such that are
channels-last. Candidates take turns in one process. What a layer does that occurs several times
counts as often in the sum.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from sgtriton_kernels import BlockSparse, bsr_conv2d, gate_layout
from sgtriton_kernels.blocks import gates_to_pattern, matrix_to_weight, weight_to_matrix
from torch import nn

import sgtriton
from sgtriton.tables import format_table
from sgtriton.timing import samples_ms

from . import timed
from .rows import circumstances, write
from .timed import DTYPES, SLOWER, Call, quantiles

# input channels, output channels, height and width, how often in VGG-16
LAYERS = (
    (3, 64, 224, 1), (64, 64, 224, 1), (64, 128, 112, 1), (128, 128, 112, 1), (128, 256, 56, 1),
    (256, 256, 56, 2), (256, 512, 28, 1), (512, 512, 28, 2), (512, 512, 14, 3),
)  # fmt: skip
BATCHES = (1, 8)
BLOCK = 32
CLOSED = 0.9
DTYPE = "float32"  # of the results that are kept
DENSE = ("dense", "dense, channels-last")  # of which the faster is 1
LAYER = ("sgtriton", "sgtriton, channels-last")  # on the same images as these


@dataclass(frozen=True)
class Row:
    """One row of the CSV: a candidate on a layer; ``ratio`` is to the faster dense one.

    Rows of before there were layers have no ``form``: their "sgtriton" is the product over blocks.
    """

    candidate: str
    form: str = field(default="", kw_only=True)
    dtype: str
    block: int
    closed: float
    batch: int
    channels: int
    out_channels: int
    size: int
    times: int
    ms_p20: float
    ms_p50: float
    ms_p80: float
    ratio: float
    threads: int
    samples: int
    cpu: str
    sgtriton: str
    torch: str
    python: str
    commit: str


def pruned_weight(
    channels: int, out_channels: int, closed: float, dtype: torch.dtype
) -> tuple[BlockSparse, torch.Tensor]:
    """The open blocks of a random weight, and the dense weight with zeros in their place."""
    layout = gate_layout((out_channels, channels, 3, 3), (BLOCK, BLOCK))
    is_open = torch.ones(layout.gate_shape, dtype=torch.bool)
    order = torch.randperm(is_open.numel())
    is_open.view(-1)[order[: round(closed * len(order))]] = False
    weight = torch.randn(layout.weight_shape).div_((9 * channels) ** 0.5).to(dtype)
    pattern = gates_to_pattern(is_open, layout)
    matrix = BlockSparse.from_dense(weight_to_matrix(weight, layout), layout.block, pattern)
    return matrix, matrix_to_weight(matrix.to_dense(), layout)


def served_layer(weight: torch.Tensor, bias: torch.Tensor) -> nn.Module:
    """The layer that ``sparsify`` makes of a pruned convolution, timing its forms."""
    out_channels, channels = weight.shape[:2]
    conv = nn.Conv2d(channels, out_channels, 3, padding=1, dtype=weight.dtype).eval()
    with torch.no_grad():
        conv.weight.copy_(weight)
        conv.bias.copy_(bias)  # pyright: ignore[reportOptionalMemberAccess]
    return sgtriton.sparsify(nn.Sequential(conv), block=(BLOCK, BLOCK))[0]


def candidates(
    layer: nn.Module,
    matrix: BlockSparse,
    weight: torch.Tensor,
    bias: torch.Tensor,
    x: torch.Tensor,
) -> dict[str, Call]:
    """What is compared on a layer, by name; the dense ones come first."""

    def ours(x):
        return bsr_conv2d(x, matrix, bias, padding=1, out_channels=len(weight), kernel_size=3)

    last, weight_last = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    return {
        "dense": lambda: F.conv2d(x, weight, bias, padding=1),
        "dense, channels-last": lambda: F.conv2d(last, weight_last, bias, padding=1),
        "sgtriton": lambda: layer(x),
        "sgtriton, channels-last": lambda: layer(last),
        "product over blocks": lambda: ours(x),
        "product over blocks, channels-last": lambda: ours(last),
    }


@torch.inference_mode()
def measure(
    shape: tuple[int, int, int, int], batch: int, dtype: torch.dtype, seconds: float
) -> list[Row]:
    """Time the candidates in turns."""
    channels, out_channels, size, times = shape
    matrix, weight = pruned_weight(channels, out_channels, CLOSED, dtype)
    bias = torch.randn(out_channels).to(dtype)
    x = torch.randn(batch, channels, size, size).to(dtype)
    with torch.inference_mode(False):  # a model is made outside, and called inside
        layer = served_layer(weight.clone(), bias.clone())
    form = layer.form_of(batch * size * size)  # pyright: ignore
    calls = candidates(layer, matrix, weight, bias, x)
    samples = samples_ms(list(calls.values()), torch.device("cpu"), seconds, rounds=5)
    found = [quantiles(taken) for taken in samples]
    dense = min(p50 for name, (_, p50, _) in zip(calls, found, strict=True) if name in DENSE)
    return [
        Row(
            candidate=name,
            form=form if name in LAYER else "-",
            dtype=str(dtype).removeprefix("torch."),
            block=BLOCK,
            closed=CLOSED,
            batch=batch, channels=channels, out_channels=out_channels, size=size, times=times,
            ms_p20=round(p20, 3), ms_p50=round(p50, 3), ms_p80=round(p80, 3),
            ratio=round(p50 / dense, 3),
            samples=len(taken),
            **circumstances(),
        )
        for name, taken, (p20, p50, p80) in zip(calls, samples, found, strict=True)
    ]  # fmt: skip


def table(rows: list[Row]) -> str:
    """Milliseconds by layer, the sums of the thirteen, and by what factor the faster dense loses.

    The factor is that of the candidate in the column before it.
    """
    headers, cells = _cells(rows)
    return format_table(headers, cells, align="rlr" + "r" * (len(headers) - 3))


def markdown(rows: list[Row]) -> str:
    """The same as a Markdown table."""
    headers, cells = _cells(rows)
    lines = [headers, ["---"] * len(headers), *cells]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _cells(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    names = list(dict.fromkeys(row.candidate for row in rows))
    headers = ["batch", "channels", "size"]
    for name in names:
        headers += [name] if name in DENSE else [name, "faster"]
    cells = []
    for batch in dict.fromkeys(row.batch for row in rows):
        sums = dict.fromkeys((*names, "best"), 0.0)
        ours = [row for row in rows if row.batch == batch]
        for key in dict.fromkeys((r.channels, r.out_channels, r.size, r.times) for r in ours):
            channels, out_channels, size, times = key
            found = {
                r.candidate: r.ms_p50
                for r in ours
                if (r.channels, r.out_channels, r.size) == key[:3]
            }
            found["best"] = min(found[name] for name in DENSE)
            for name, ms in found.items():
                sums[name] += times * ms
            shown = [str(batch), f"{channels} to {out_channels}", str(size)]
            cells.append([*shown, *_line(names, found)])
        cells.append([str(batch), "all thirteen", "", *_line(names, sums)])
    return headers, cells


def _line(names: list[str], found: dict[str, float]) -> list[str]:
    line = []
    for name in names:
        line.append(f"{found[name]:.2f}")
        if name not in DENSE:
            line.append(f"{found['best'] / found[name]:.2f}")
    return line


def remark(rows: list[Row]) -> str:
    """What the report says of its table: how the layers compare on the same images."""
    if not any(row.form for row in rows):
        return "; where that is below 1, layers that\n`sgtriton.sparsify` makes compute dense."
    by_key = {(r.batch, r.channels, r.out_channels, r.size, r.candidate): r for r in rows}
    speedups = {
        key: by_key[(*key[:4], DENSE[LAYER.index(r.candidate)])].ms_p50 / r.ms_p50
        for key, r in by_key.items()
        if r.candidate in LAYER
    }
    slower = [
        f"{speedup:.2f} at batch {key[0]}, {key[1]} to {key[2]} channels, size {key[3]}"
        f"{', channels-last' * (key[4] == LAYER[1])} ({by_key[key].form})"
        for key, speedup in speedups.items()
        if speedup < SLOWER
    ]
    return (
        '. "sgtriton" is the\nlayer that `sgtriton.sparsify` makes, in the form fastest when it '
        'was made, "product over\nblocks" is `bsr_conv2d` in any case. On the same images '
        f"{len(slower)} of {len(speedups)} layers are\nslower than {SLOWER} of dense"
        f"{': ' * bool(slower)}{'; '.join(slower)}."
    )


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``conv`` to the command line."""
    command = commands.add_parser("conv", help="pruned convolutions beside the dense ones")
    command.add_argument("--batch", type=int, action="append", help="repeatable; default 1 and 8")
    command.add_argument("--dtype", choices=list(DTYPES), default=DTYPE)
    timed.add_arguments(command, "conv", 3.0, "for each layer, and at least 5 turns")
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    batches = arguments.batch or BATCHES
    if min(batches) < 1:
        raise ValueError(f"--batch must be at least 1, got {batches}")
    is_whole = tuple(batches) == BATCHES and arguments.dtype == DTYPE
    timed.prepare(arguments, is_whole)
    measured = (
        row
        for batch in batches
        for shape in LAYERS
        for row in measure(shape, batch, DTYPES[arguments.dtype], arguments.seconds)
    )
    print(table(write(arguments.out, measured)))
    return 0
