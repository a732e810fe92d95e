"""Whole models: patch, close 90 % of the blocks, sparsify, save, load, serve; time and outputs.

Random models of the sizes of VGG-16 (Simonyan, Zisserman, arXiv:1409.1556) and MLP-Mixer-B/16
(Tolstikhin et al., arXiv:2105.01601), 32x32 blocks closed at random. Three things must hold, or
the served model is not timed: it computes what the gated one does, the loaded one has the same
bits as it, and no layer keeps gates.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sgtriton
from sgtriton.layers import GatedModule
from sgtriton.tables import format_table

from . import timed
from .grids import Sweep, Task
from .rows import Timing, measured, paragraphs, rounded, summary, where
from .timed import DTYPES

CLOSED = 0.9
BATCHES = (1, 8)
SIDE, QUICK_SIDE = 224, 32  # of images
OUTPUTS = 1000


_TEXT = """
## Whole models{on}

Random models, 32x32 blocks closed at random, taken through patch, sparsify, save and load; the
loaded model gives the served one's bits, and the gated one's outputs up to rounding. The loaded
model beside the dense one in the same turns, {threads} threads of {device}, PyTorch {torch}, commit
{commit}. Rerun: `{rerun}`.

"""


@dataclass(frozen=True, kw_only=True)
class Row(Timing):
    """One row of the CSV: a model at a batch size, dense or as loaded after ``sparsify``.

    M is the batch size, N and K are outputs and inputs of the whole model.
    """

    model: str
    batch: int
    parameters: int
    sparse_layers: int
    layers: int
    dense_bytes: int
    file_bytes: int
    sparsify_s: float


def vgg16(width: int = 64, side: int = 224, hidden: int = 4096) -> nn.Module:
    """VGG-16; ``width`` channels in the first stage."""
    layers: list[nn.Module] = []
    channels = 3
    for stage, count in enumerate((2, 2, 3, 3, 3)):
        out = width * min(2**stage, 8)
        for _ in range(count):
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.ReLU()]
            channels = out
        layers.append(nn.MaxPool2d(2))
    flat = channels * (side // 32) ** 2
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(flat, hidden), nn.ReLU(), nn.Linear(hidden, hidden),
        nn.ReLU(), nn.Linear(hidden, OUTPUTS),
    )  # fmt: skip


class MixerBlock(nn.Module):
    """One layer of MLP-Mixer: tokens are mixed, then channels."""

    def __init__(self, tokens: int, channels: int, token_hidden: int, channel_hidden: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(channels) for _ in range(2)])
        self.mix_tokens = _mlp(tokens, token_hidden)
        self.mix_channels = _mlp(channels, channel_hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mix_tokens(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        return x + self.mix_channels(self.norms[1](x))


def _mlp(size: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(size, hidden), nn.GELU(), nn.Linear(hidden, size))


class Mixer(nn.Module):
    """MLP-Mixer; the sizes of B/16 by default."""

    def __init__(
        self, depth: int = 12, channels: int = 768, side: int = 224, patch: int = 16,
        token_hidden: int = 384, channel_hidden: int = 3072,
    ) -> None:  # fmt: skip
        super().__init__()
        tokens = (side // patch) ** 2
        self.stem = nn.Conv2d(3, channels, patch, stride=patch)
        self.blocks = nn.Sequential(
            *(MixerBlock(tokens, channels, token_hidden, channel_hidden) for _ in range(depth))
        )
        self.norm, self.head = nn.LayerNorm(channels), nn.Linear(channels, OUTPUTS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.stem(x).flatten(2).transpose(1, 2))
        return self.head(self.norm(x).mean(1))


MODELS: dict[str, Callable[[], nn.Module]] = {"VGG-16": vgg16, "MLP-Mixer-B/16": Mixer}
QUICK: dict[str, Callable[[], nn.Module]] = {
    "VGG-16, small": functools.partial(vgg16, width=16, side=QUICK_SIDE, hidden=128),
    "MLP-Mixer, small": functools.partial(
        Mixer, depth=2, channels=128, side=QUICK_SIDE, patch=8, token_hidden=32, channel_hidden=256
    ),
}


@torch.no_grad()
def close_blocks(model: nn.Module, closed: float) -> None:
    """Close that share of the gates of each layer at random; one at least stays open."""
    for layer in model.modules():
        if isinstance(layer, GatedModule):
            gates = layer.gate.numel()
            order = torch.randperm(gates)
            flat = torch.full((gates,), 0.9)
            flat[order[: min(gates - 1, math.floor(closed * gates))]] = 0.1
            layer.gate.copy_(flat.view_as(layer.gate))


@dataclass(frozen=True)
class Served:
    """A model that went through everything, beside the dense one; or what is wrong with it."""

    dense: nn.Module
    loaded: nn.Module
    images: torch.Tensor
    wrong: str | None
    fields: dict[str, Any]  # of a row


@torch.no_grad()
def serve(
    make: Callable[[], nn.Module],
    images: torch.Tensor,
    block: tuple[int, int] = (32, 32),
    form: str = "auto",
) -> Served:
    """Take a model through patch, sparsify, save and load.

    Args:
        make: the dense model.
        images: dtype and device of the models are theirs.
        block: of the gates.
        form: as ``sparsify`` takes it.
    """
    dense, model = make().to(images).eval(), make().to(images).eval()
    model.load_state_dict(dense.state_dict())
    sgtriton.patch(model, block=block)
    close_blocks(model, CLOSED)
    gated = model(images)
    start = time.perf_counter()
    sgtriton.sparsify(model, form=form)
    took = time.perf_counter() - start
    summary = sgtriton.summary(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        sgtriton.save(model, path)
        file_bytes = path.stat().st_size
        loaded = sgtriton.load(make().to(images).eval(), path)
    served, most = model(images), 1e-3 if images.itemsize > 2 else 3e-2
    wrong = None
    if reason := timed.difference(served, gated.double(), most):
        wrong = f"served and gated outputs differ, {reason}"
    elif reason := timed.difference(loaded(images), served.double(), 0.0):
        wrong = f"loaded and served outputs differ, {reason}"
    elif any(isinstance(layer, GatedModule) for layer in loaded.modules()):
        wrong = "the loaded model still has gates"
    fields = {
        "parameters": summary.parameters,
        "density": round(1 - summary.sparsity, 4),
        "sparse_layers": sum(layer.form != "dense" for layer in summary.layers),
        "layers": len(summary.layers),
        "dense_bytes": sum(p.nbytes for p in dense.parameters()),
        "file_bytes": file_bytes,
        "sparsify_s": round(took, 1),
    }
    return Served(dense, loaded, images, wrong, fields)


@torch.no_grad()
def measure(
    name: str, of: Served, batch: int, seconds: float, block: tuple[int, int] = (32, 32)
) -> list[Row]:
    """Time a served model beside the dense one, unless it is wrong."""
    x = of.images[:batch]
    calls = {"dense": lambda: of.dense(x), "sgtriton": lambda: of.loaded(x)}
    taken = timed.take_turns(
        calls, lambda provider, _: of.wrong if provider == "sgtriton" else None,
        x.device, seconds, rounds=5, dense=tuple(calls),
    )  # fmt: skip
    return [
        Row(
            op="model", provider=provider, pass_="forward", M=batch, N=OUTPUTS, K=x[0].numel(),
            dtype=str(x.dtype).removeprefix("torch."), block=f"{block[0]}x{block[1]}",
            ratio=rounded(one.median / taken["dense"].median, 4),
            tflops=math.nan, gb_s=math.nan, model=name, batch=batch,
            **of.fields, **one.fields(), **where(x.device),
        )
        for provider, one in taken.items()
    ]  # fmt: skip


def pairs(rows: Iterable[Row]) -> list[tuple[Row, Row]]:
    """The dense model's row and the served one's, where both have times."""
    rows = measured(rows)
    dense = {(r.dtype, r.model, r.batch): r for r in rows if r.provider == "dense"}
    return [
        (dense[key], r) for r in rows if r.is_ours and (key := (r.dtype, r.model, r.batch)) in dense
    ]


def markdown(rows: Iterable[Row]) -> str:
    """A Markdown table, one row a model and batch."""
    lines = [
        "| model | batch | sparsity | dense, ms | served, ms | speed-up | file, of dense |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.model} | {r.batch} | {1 - r.density:.1%} | {dense.ms_p50:.1f} | {r.ms_p50:.1f} | "
        f"{1 / r.ratio:.2f} | {r.file_bytes / r.dense_bytes:.1%} |"
        for dense, r in pairs(rows)
    ]
    return "\n".join(lines)


def table(rows: list[Row]) -> str:
    """The models for a terminal."""
    headers = [
        "model", "dtype", "batch", "sparsity", "dense ms", "served ms", "speed-up", "not dense",
        "file of dense", "sparsify s",
    ]  # fmt: skip
    cells = [
        [
            r.model, r.dtype, str(r.batch), f"{1 - r.density:.1%}", f"{dense.ms_p50:.1f}",
            f"{r.ms_p50:.1f}", f"{1 / r.ratio:.2f}", f"{r.sparse_layers} of {r.layers}",
            f"{r.file_bytes / r.dense_bytes:.1%}", f"{r.sparsify_s:.0f}",
        ]
        for dense, r in pairs(rows)
    ]  # fmt: skip
    return format_table(headers, cells, align="llrrrrrrrr")


def tasks(arguments: argparse.Namespace) -> list[Task]:
    """The cells to measure: each model at each batch size; a model is made once for all of its."""
    models, side = (QUICK, QUICK_SIDE) if arguments.quick else (MODELS, SIDE)
    dtypes = arguments.dtype or (["float32"] if arguments.device == "cpu" else ["bfloat16"])

    @functools.lru_cache(maxsize=1)
    def made(name: str, dtype: str) -> Served:
        torch.manual_seed(0)
        images = torch.randn(max(BATCHES), 3, side, side, dtype=DTYPES[dtype])
        form = "lookup" if arguments.quick else "auto"  # timing all forms takes a minute
        return serve(models[name], images.to(arguments.device), form=form)

    found = []
    for dtype, name, batch in itertools.product(dict.fromkeys(dtypes), models, BATCHES):

        def cell(dtype=dtype, name=name, batch=batch) -> list[Row]:
            return measure(name, made(name, dtype), batch, arguments.seconds)

        found.append(Task(("model", dtype, name, batch), cell))
    return found


def section(rows: list[Row], on: str, file: str) -> str:
    """The page's section."""
    if not pairs(rows):
        return ""
    text = paragraphs(
        _TEXT.format(
            on=on,
            rerun="python -m bench sweep model" + " --device cuda" * bool(on),
            **summary(rows),
        )
    )
    return text + markdown(rows) + "\n"


SWEEP = Sweep(
    help="whole models from patch to serving, beside the dense ones",
    file="models",
    seconds=10.0,
    quick_seconds=0.2,
    of="seconds for each model and batch, and at least 5 turns",
    row=Row,
    key=("op", "dtype", "model", "batch"),
    tasks=tasks,
    table=table,
    section=section,
)
