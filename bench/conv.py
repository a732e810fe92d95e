"""Serving pruned convolutions: VGG-16's thirteen, beside the dense ones.

Each has 3x3 taps and a padding of 1; its blocks of 32x32 weights are closed at random. Compared are
``F.conv2d`` on the weight with zeros filled in, the layer that ``sgtriton.sparsify`` makes of it,
and ``bsr_conv2d`` whatever the layer chose, on images that are contiguous and on such that are
channels-last. Candidates take turns in one process. What a layer does that occurs several times
counts as often in the sum.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sgtriton_kernels import BlockSparse, bsr_conv2d, gate_layout
from sgtriton_kernels.blocks import gates_to_pattern, matrix_to_weight, weight_to_matrix
from torch import nn

import sgtriton
from sgtriton.patterns import random_pattern
from sgtriton.tables import format_table

from . import timed
from .grids import Sweep, Task
from .options import check_count
from .rows import Timing, measured, notes, paragraphs, rounded, summary, where
from .timed import DTYPES, SLOWER, Call, Work

# input channels, output channels, height and width, how often in VGG-16
LAYERS = (
    (3, 64, 224, 1), (64, 64, 224, 1), (64, 128, 112, 1), (128, 128, 112, 1), (128, 256, 56, 1),
    (256, 256, 56, 2), (256, 512, 28, 1), (512, 512, 28, 2), (512, 512, 14, 3),
)  # fmt: skip
BATCHES = {"cpu": (1, 8), "cuda": (1, 32)}
QUICK_LAYERS = ((3, 64, 32, 1), (64, 64, 16, 2))
BLOCK = 32
CLOSED = 0.9
CPU = torch.device("cpu")
DENSE = ("dense", "dense, channels-last")  # of which the faster is 1
LAYER = ("sgtriton", "sgtriton, channels-last")  # on the same images as these


_TEXT = """
## VGG-16's convolutions, {closed:.0%} of the {block}x{block} blocks closed{on}

Milliseconds of one layer, {threads} threads of {device}, PyTorch {torch}, commit {commit}; in turns
with `F.conv2d` on the dense weight, images contiguous and channels-last. "Faster" compares
the column before it with the faster dense one{remark} Rerun: `{rerun}`.

"""


@dataclass(frozen=True, kw_only=True)
class Row(Timing):
    """One row of the CSV: a provider on a layer, that occurs so many ``times``.

    M, N and K are those of the product that the convolution is: its pixels, output channels, and
    input channels times taps. ``form`` is a layer's, ``-`` of what is none.
    """

    form: str
    batch: int
    channels: int
    out_channels: int
    size: int
    times: int


def pruned_weight(
    channels: int, out_channels: int, closed: float, dtype: torch.dtype
) -> tuple[BlockSparse, torch.Tensor]:
    """The open blocks of a random weight, and the dense weight with zeros in their place."""
    layout = gate_layout((out_channels, channels, 3, 3), (BLOCK, BLOCK))
    is_open = random_pattern(layout.gate_shape, round(closed * math.prod(layout.gate_shape)))
    weight = torch.randn(layout.weight_shape).div_((9 * channels) ** 0.5).to(dtype)
    pattern = gates_to_pattern(is_open, layout)
    matrix = BlockSparse.from_dense(weight_to_matrix(weight, layout), layout.block, pattern)
    return matrix, matrix_to_weight(matrix.to_dense(), layout)


def served_layer(weight: torch.Tensor, bias: torch.Tensor) -> nn.Module:
    """The layer that ``sparsify`` makes of a pruned convolution, timing its forms."""
    out_channels, channels = weight.shape[:2]
    conv = nn.Conv2d(channels, out_channels, 3, padding=1).to(weight).eval()
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
        "sgtriton, product over blocks": lambda: ours(x),
        "sgtriton, product over blocks, channels-last": lambda: ours(last),
    }


@torch.inference_mode()
def measure(
    shape: tuple[int, int, int, int], batch: int, dtype: torch.dtype, seconds: float,
    device: torch.device = CPU,
) -> list[Row]:  # fmt: skip
    """Time the candidates in turns, but those that are wrong."""
    channels, out_channels, size, times = shape
    torch.manual_seed(0)
    matrix, weight = pruned_weight(channels, out_channels, CLOSED, dtype)
    matrix, weight = matrix.to(device), weight.to(device)
    bias = torch.randn(out_channels).to(weight)
    x = torch.randn(batch, channels, size, size).to(weight)
    with torch.inference_mode(False):  # a model is made outside, and called inside
        layer = served_layer(weight.clone(), bias.clone())
    form = layer.form_of(batch * size * size)  # pyright: ignore
    calls = candidates(layer, matrix, weight, bias, x)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    # cuDNN multiplies in TF32 unless it is told not to
    has_tf32 = device.type != "cpu" and torch.backends.cudnn.allow_tf32
    most = 2e-3 if has_tf32 and dtype == torch.float32 else None
    taken = timed.take_turns(
        calls, lambda _, out: timed.difference(out, expected, most), device, seconds,
        rounds=5, dense=DENSE,
    )  # fmt: skip
    dense = timed.fastest(taken, DENSE)
    m, n, k = batch * size * size, out_channels, 9 * channels
    rows = []
    for name, one in taken.items():
        share = 1.0 if name in DENSE else matrix.density
        moved = x.nbytes + x.itemsize * (n * k * share + m * n)  # each pixel is read once
        work = Work(2 * m * n * k * share, moved)
        rows.append(
            Row(
                op="bsr_conv2d", provider=name, pass_="forward", M=m, N=n, K=k,
                dtype=str(dtype).removeprefix("torch."), block=f"{BLOCK}x{BLOCK}",
                density=round(matrix.density, 4), ratio=rounded(one.median / dense, 4),
                form=form if name in LAYER else "-",
                batch=batch, channels=channels, out_channels=out_channels, size=size, times=times,
                **one.fields(), **work.fields(one.median), **where(device),
            )
        )  # fmt: skip
    return rows


def table(rows: list[Row]) -> str:
    """Milliseconds by layer, their sums, and by what factor the faster dense loses.

    The factor is that of the candidate in the column before it.
    """
    headers, cells = _cells(rows)
    return format_table(headers, cells, align="lrlr" + "r" * (len(headers) - 4))


def markdown(rows: list[Row]) -> str:
    """The same as a Markdown table."""
    headers, cells = _cells(rows)
    lines = [headers, ["---"] * len(headers), *cells]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _cells(rows: Iterable[Row]) -> tuple[list[str], list[list[str]]]:
    rows = measured(rows)
    names = list(dict.fromkeys(row.provider for row in rows))
    headers = ["dtype", "batch", "channels", "size"]
    for name in names:
        headers += [name] if name in DENSE else [name, "faster"]
    cells, of_all = [], sums(rows)
    for (dtype, batch), layers in _layers(rows).items():
        for (channels, out_channels, size, _), found in layers.items():
            shown = [dtype, str(batch), f"{channels} to {out_channels}", str(size)]
            cells.append([*shown, *_line(names, found)])
        cells.append([dtype, str(batch), "all", "", *_line(names, of_all[dtype, batch])])
    return headers, cells


def sums(rows: Iterable[Row]) -> dict[tuple[str, int], dict[str, float]]:
    """Milliseconds of all layers by dtype and batch: of each provider, of the faster dense."""
    found = {}
    for key, layers in _layers(measured(rows)).items():
        names = next(iter(layers.values()))
        found[key] = {
            name: sum(times * ms[name] for (*_, times), ms in layers.items()) for name in names
        }
    return found


def _layers(rows: list[Row]) -> dict[tuple[str, int], dict[tuple[int, ...], dict[str, float]]]:
    """Milliseconds by dtype and batch, layer, and provider; NaN of one that has no time there."""
    names = dict.fromkeys(row.provider for row in rows)
    found: dict[tuple[str, int], dict[tuple[int, ...], dict[str, float]]] = {}
    for r in rows:
        layers = found.setdefault((r.dtype, r.batch), {})
        layer = (r.channels, r.out_channels, r.size, r.times)
        layers.setdefault(layer, dict.fromkeys(names, math.nan))[r.provider] = r.ms_p50
    for layers in found.values():
        for ms in layers.values():
            dense = [ms[name] for name in DENSE if name in ms]
            # a NaN is never less: as the first it would stay
            ms["best"] = min((t for t in dense if not math.isnan(t)), default=math.nan)
    return found


def _line(names: list[str], found: dict[str, float]) -> list[str]:
    line = []
    for name in names:
        line.append(_figure(found[name]))
        if name not in DENSE:
            line.append(_figure(found["best"] / found[name]))
    return line


def _figure(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def remark(rows: Iterable[Row]) -> str:
    """What the report says of its table: how the layers compare on the same images."""
    rows = measured(rows)
    speedups, slower = _speedups(rows), slower_layers(rows)
    return (
        '. "sgtriton" is the\nlayer that `sgtriton.sparsify` makes, in the form fastest when it '
        'was made, "product over\nblocks" is `bsr_conv2d` in any case. On the same images '
        f"{len(slower)} of {len(speedups)} layers are\nslower than {SLOWER} of dense"
        f"{': ' * bool(slower)}{'; '.join(slower)}."
    )


def slower_layers(rows: Iterable[Row]) -> list[str]:
    """Layers that take longer than the dense one on the same images, in words."""
    return [
        f"{speedup:.2f} at batch {key[1]}, {key[2]} to {key[3]} channels, size {key[4]}"
        f"{', channels-last' * (key[5] == LAYER[1])} ({form})"
        for key, (speedup, form) in _speedups(measured(rows)).items()
        if speedup < SLOWER
    ]


def _speedups(rows: list[Row]) -> dict[tuple, tuple[float, str]]:
    """By layer and images, over the dense one on the same images; and the layer's form."""
    by_key = {(r.dtype, r.batch, r.channels, r.out_channels, r.size, r.provider): r for r in rows}
    return {
        key: (dense.ms_p50 / r.ms_p50, r.form)
        for key, r in by_key.items()
        if r.provider in LAYER
        and (dense := by_key.get((*key[:5], DENSE[LAYER.index(r.provider)]))) is not None
    }


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add what narrows the grid."""
    command.add_argument("--batch", type=int, nargs="+", metavar="N", help="these only")


def tasks(arguments: argparse.Namespace) -> list[Task]:
    """The cells to measure: each layer at each batch size.

    Raises:
        ValueError: a batch size below 1.
    """
    default = BATCHES[arguments.device][:1] if arguments.quick else BATCHES[arguments.device]
    batches = tuple(dict.fromkeys(arguments.batch or default))
    check_count("--batch", min(batches))
    device = torch.device(arguments.device)
    dtypes = arguments.dtype or (["float32"] if device.type == "cpu" else ["bfloat16"])
    found = []
    for dtype in dict.fromkeys(dtypes):
        for batch in batches:
            for shape in QUICK_LAYERS if arguments.quick else LAYERS:

                def cell(dtype=DTYPES[dtype], batch=batch, shape=shape) -> list[Row]:
                    return measure(shape, batch, dtype, arguments.seconds, device)

                found.append(Task(("bsr_conv2d", dtype, batch, *shape[:3]), cell))
    return found


def section(rows: list[Row], on: str, file: str) -> str:
    """The page's section."""
    found = measured(rows)
    if not found:
        return ""
    text = paragraphs(_TEXT.format(
        on=on, closed=CLOSED, block=BLOCK, remark=remark(found),
        rerun="python -m bench sweep conv" + " --device cuda" * bool(on),
        **summary(found),
    ))  # fmt: skip
    text += markdown(found) + "\n"
    if absent := notes(rows):
        text += "\nNot measured:\n\n" + "".join(f"- {line}\n" for line in absent)
    return text


SWEEP = Sweep(
    help="VGG-16's convolutions pruned, beside the dense ones",
    file="conv",
    seconds=3.0,
    quick_seconds=0.1,
    of="seconds for each layer, and at least 5 turns",
    row=Row,
    key=("op", "dtype", "batch", "channels", "out_channels", "size"),
    tasks=tasks,
    table=table,
    section=section,
    add_arguments=add_arguments,
)
