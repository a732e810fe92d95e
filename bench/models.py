"""Whole models: patch, close 90 % of the blocks, sparsify, save, load, serve; time and outputs.

The random models of :mod:`.networks`, 32x32 blocks closed at random. Three things must hold, or
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
from sgtriton.patterns import random_pattern
from sgtriton.tables import format_table

from . import timed
from .grids import Sweep, Task
from .networks import MODELS, OUTPUTS, QUICK, QUICK_SIDE, SIDE
from .rows import Timing, measured, paragraphs, rounded, summary, where
from .timed import DTYPES

CLOSED = 0.9
BATCHES = (1, 8)


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


@torch.no_grad()
def close_blocks(model: nn.Module, closed: float) -> None:
    """Close that share of the gates of each layer at random; one at least stays open."""
    for layer in model.modules():
        if isinstance(layer, GatedModule):
            gates = layer.gate.numel()
            is_open = random_pattern(layer.gate.shape, min(gates - 1, math.floor(closed * gates)))
            layer.gate.copy_(torch.where(is_open, 0.9, 0.1))


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
