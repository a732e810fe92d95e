"""Whole models: patch, close 90 % of the blocks, sparsify, save, load, serve; time and outputs.

Random models of the sizes of VGG-16 (Simonyan, Zisserman, arXiv:1409.1556) and MLP-Mixer-B/16
(Tolstikhin et al., arXiv:2105.01601), 32x32 blocks closed at random. Three things must hold, or
nothing is reported: the served model computes what the gated one does, the loaded one the same
bits as the served one, and no layer keeps gates.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import sgtriton
from sgtriton.layers import GatedModule
from sgtriton.tables import format_table
from sgtriton.timing import samples_ms

from . import timed
from .rows import circumstances, write

CLOSED = 0.9
BATCHES = (1, 8)


@dataclass(frozen=True)
class Row:
    """One row of the CSV: a model served at a batch size."""

    model: str
    batch: int
    parameters: int
    sparsity: float
    dense_ms: float
    served_ms: float
    speedup: float
    sparse_layers: int
    layers: int
    dense_bytes: int
    file_bytes: int
    sparsify_s: float
    samples: int
    threads: int
    cpu: str
    sgtriton: str
    torch: str
    python: str
    commit: str


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
        nn.ReLU(), nn.Linear(hidden, 1000),
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
        self.norm, self.head = nn.LayerNorm(channels), nn.Linear(channels, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.stem(x).flatten(2).transpose(1, 2))
        return self.head(self.norm(x).mean(1))


MODELS: dict[str, Callable[[], nn.Module]] = {"VGG-16": vgg16, "MLP-Mixer-B/16": Mixer}


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


@torch.no_grad()
def measure(
    name: str,
    make: Callable[[], nn.Module],
    side: int,
    seconds: float,
    block: tuple[int, int] = (32, 32),
    batches: tuple[int, ...] = BATCHES,
) -> list[Row]:
    """Take a model through everything, and time the served one beside the dense one."""
    dense = make().eval()
    images = torch.randn(max(batches), 3, side, side)
    model = make().eval()
    model.load_state_dict(dense.state_dict())
    sgtriton.patch(model, block=block)
    close_blocks(model, CLOSED)
    gated = model(images)
    start = time.perf_counter()
    sgtriton.sparsify(model)
    took = time.perf_counter() - start
    summary = sgtriton.summary(model)
    _check("served and gated outputs differ", model(images), gated, 1e-3)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        sgtriton.save(model, path)
        file_bytes = path.stat().st_size
        loaded = sgtriton.load(make().eval(), path)
    _check("loaded and served outputs differ", loaded(images), model(images), 0.0)
    if any(isinstance(layer, GatedModule) for layer in loaded.modules()):
        raise ValueError(f"{name}: the loaded model still has gates")
    rows = []
    for batch in batches:
        x = images[:batch]
        taken = samples_ms([lambda x=x: dense(x), lambda x=x: loaded(x)], x.device, seconds, 5)
        dense_ms, served_ms = map(statistics.median, taken)
        rows.append(
            Row(
                model=name, batch=batch, parameters=summary.parameters,
                sparsity=round(summary.sparsity, 4),
                dense_ms=round(dense_ms, 2), served_ms=round(served_ms, 2),
                speedup=round(dense_ms / served_ms, 3),
                sparse_layers=sum(layer.form != "dense" for layer in summary.layers),
                layers=len(summary.layers),
                dense_bytes=sum(p.nbytes for p in dense.parameters()), file_bytes=file_bytes,
                sparsify_s=round(took, 1), samples=len(taken[0]), **circumstances(),
            )
        )  # fmt: skip
    return rows


def _check(what: str, out: torch.Tensor, expected: torch.Tensor, most: float) -> None:
    error = ((out - expected).abs().max() / expected.abs().max()).item()
    if not error <= most:
        raise ValueError(f"{what}: relative error {error:.1e}")


def markdown(rows: list[Row]) -> str:
    """A Markdown table, one row a model and batch."""
    lines = [
        "| model | batch | sparsity | dense, ms | served, ms | speed-up | file, of dense |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.model} | {r.batch} | {r.sparsity:.1%} | {r.dense_ms:.1f} | {r.served_ms:.1f} | "
        f"{r.speedup:.2f} | {r.file_bytes / r.dense_bytes:.1%} |"
        for r in rows
    ]
    return "\n".join(lines)


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``models`` to the command line."""
    command = commands.add_parser("models", help="whole models from patch to serving")
    timed.add_arguments(command, "models", 10.0, "for each model and batch")
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    timed.prepare(arguments)
    rows = []
    for name, make in MODELS.items():
        rows += measure(name, make, 224, arguments.seconds)
    write(arguments.out, rows)
    headers = ["model", "batch", "sparsity", "dense ms", "served ms", "speed-up", "not dense",
               "file of dense", "sparsify s"]  # fmt: skip
    cells = [
        [r.model, str(r.batch), f"{r.sparsity:.1%}", f"{r.dense_ms:.1f}", f"{r.served_ms:.1f}",
         f"{r.speedup:.2f}", f"{r.sparse_layers} of {r.layers}",
         f"{r.file_bytes / r.dense_bytes:.1%}", f"{r.sparsify_s:.0f}"]
        for r in rows
    ]  # fmt: skip
    print(format_table(headers, cells, align="lrrrrrrrr"))
    return 0
