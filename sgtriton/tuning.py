"""Choose by measurement how products are computed on this device, and remember it.

Nothing here runs by itself: who calls :func:`tune` gives the seconds. What it finds lies in the
user's cache, where products look before they reason (:mod:`sgtriton_kernels.lookup`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from sgtriton_kernels import BlockSparse
from sgtriton_kernels._impl import resolve_impl
from sgtriton_kernels._triton import INTERPRETED
from sgtriton_kernels.bsr_checks import why_no_kernel
from sgtriton_kernels.bsr_choice import cell_of
from sgtriton_kernels.candidates import ANALYTIC, candidates
from sgtriton_kernels.cell import Cell
from sgtriton_kernels.lookup import Choice, analytic, choose, full_key, recorded, tell
from sgtriton_kernels.records import architecture, cache_folder
from torch import nn

from .search import Found, Problem, search
from .sparse_layers import SparseModule
from .tables import format_table
from .tune_cache import sweep, write_record

_RESERVE = 0.03  # of the seconds, for what comes after the last search
_COPY_ENGINES = ("sm_90", "sm_100", "sm_120")


@dataclass(frozen=True)
class Product:
    """A weight and how many rows it meets, of which choices are to be made.

    Args:
        name: for the table.
        matrix: the weight.
        rows: numbers of rows of x.
        trains: whether gradients are computed as well.
    """

    name: str
    matrix: BlockSparse
    rows: tuple[int, ...]
    trains: bool = False


@dataclass(frozen=True)
class Tuned:
    """What became of one product: a line of the table.

    Attributes:
        name: of the layer, or the sizes.
        cell: the product.
        status: ``"cached"``: a record of before was read, nothing timed; ``"kept"``: what was taken
            is the fastest; ``"changed"``; ``"not reached"``: the seconds did not suffice;
            ``"no choice"``: there is one candidate.
        choice: what is taken now, and by whose word.
        gain: how much faster than what was taken before; 1 where nothing changed.
        ms: median of a call, of what is taken now; NaN where nothing was timed.
        skipped: candidate -> why it was out of the question.
    """

    name: str
    cell: Cell
    status: str
    choice: Choice
    gain: float = 1.0
    ms: float = float("nan")
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TuneReport:
    """What :func:`tune` did; ``str`` gives a table.

    Attributes:
        rows: one for each product.
        seconds: that it took.
        notes: what else there is to say, such as why nothing could be kept.
    """

    rows: tuple[Tuned, ...]
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def timed(self) -> int:
        """Products whose candidates were timed."""
        return sum(row.status in ("kept", "changed") for row in self.rows)

    def __str__(self) -> str:
        headers = ["product", "pass", "M", "N, K", "block", "density", "takes", "", "gain", "ms"]
        lines = [
            [
                row.name, row.cell.op, row.cell.M, f"{row.cell.N}, {row.cell.K}",
                f"{row.cell.block[0]}x{row.cell.block[1]}", f"{row.cell.density:.2f}",
                row.choice.candidate.name, row.status,
                f"{row.gain:.2f}x" if row.status in ("kept", "changed") else "-",
                f"{row.ms:.3f}" if row.ms == row.ms else "-",
            ]
            for row in self.rows
        ]  # fmt: skip
        text = format_table(headers, lines) + "\n" if lines else ""
        text += f"{self.timed} of {len(self.rows)} products timed, {self.seconds:.1f} s"
        return "\n".join([text, *self.notes])


def tune(
    model: nn.Module,
    example_input: Any,
    seconds: float = 60.0,
    *,
    again: bool = False,
    distributed: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> TuneReport:
    """Measure, for the products of a model's sparse layers, which candidate is the fastest.

    The model runs once, in eval mode and without gradients, to see how many rows its layers meet.
    Then the candidates of each product are checked against a dense product and timed in turns; the
    present choice stays unless another is faster by more than the noise. What is found is kept in
    the user's cache and taken from the next call on; the layers' forms stay as they are.

    Args:
        model: with layers made by :func:`.sparsify`; not changed.
        example_input: what the model is called with: a tensor, a tuple of arguments, or a dict of
            keyword arguments.
        seconds: to spend, at the most.
        again: whether products that a record of before serves are timed anew.
        distributed: whether to go on where a process group exists: rank 0 searches, the others
            wait for what it found.
        progress: called with how many products are done, how many there are, and the next one.

    Raises:
        ValueError: nothing to tune; no time; a process group without ``distributed``; inside a
            graph capture or a trace.
    """
    check_may_search(seconds, distributed)
    found = products_of(model, example_input)
    if not found:
        raise ValueError(
            "the model has no block-sparse linear layer that the input reaches: "
            "sgtriton.sparsify makes them"
        )
    return tune_products(found, seconds, again=again, distributed=distributed, progress=progress)


def check_may_search(seconds: float, distributed: bool = False) -> None:
    """Raise ``ValueError`` where no search may run."""
    if not seconds > 0:
        raise ValueError(f"seconds must be positive, got {seconds}")
    if torch.compiler.is_compiling() or (
        torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    ):
        raise ValueError("nothing is tuned while a graph is captured or traced: tune before")
    if _in_group() and not distributed:
        raise ValueError(
            "a process group exists: tune before it is made, or pass distributed=True on all "
            "ranks, and rank 0 searches"
        )


def _in_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


@torch.no_grad()
def products_of(model: nn.Module, example_input: Any) -> list[Product]:
    """The block-sparse linear layers of a model, and how many rows an input brings to each."""
    rows: dict[str, list[int]] = {}
    hooks = []
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, SparseModule)
        and layer.dense_type is nn.Linear
        and not layer.layout.per_weight
    }

    def note(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            m = inputs[0].numel() // max(inputs[0].shape[-1], 1)
            if m not in rows.setdefault(name, []):
                rows[name].append(m)

        return hook

    modes = {module: module.training for module in model.modules()}
    try:
        for name, layer in layers.items():
            hooks.append(layer.register_forward_pre_hook(note(name)))
        model.eval()
        if isinstance(example_input, dict):
            model(**example_input)
        else:
            arguments = example_input if isinstance(example_input, tuple) else (example_input,)
            model(*arguments)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    return [
        Product(name, layers[name].matrix, tuple(found), layers[name].trainable)
        for name, found in rows.items()
    ]


def tune_products(
    products: Iterable[Product],
    seconds: float,
    *,
    again: bool = False,
    distributed: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> TuneReport:
    """Tune products; arguments as for :func:`tune`.

    Args:
        products: on one device.
        say: gets a line for each candidate that is skipped.
    """
    check_may_search(seconds, distributed)
    begin = time.perf_counter()
    work = list(_work(products))
    shared = distributed and _in_group()
    if shared and torch.distributed.get_rank() != 0:
        return _told_by_others(work, begin)
    until = begin + (1 - _RESERVE) * seconds
    rows: list[Tuned] = []
    notes: list[str] = []
    try:
        _search_all(work, rows, notes, until, again, progress, say)
    finally:
        if shared:
            torch.distributed.broadcast_object_list([_names(rows, len(work))], src=0)
    return TuneReport(tuple(rows), time.perf_counter() - begin, tuple(dict.fromkeys(notes)))


@dataclass(frozen=True)
class _Work:
    """A product to search for; inputs are made when its turn comes."""

    name: str
    cell: Cell
    matrix: BlockSparse

    @property
    def device(self) -> torch.device:
        return self.matrix.values.device


def _work(products: Iterable[Product]) -> Iterator[_Work]:
    for product in products:
        w = product.matrix
        (n, k), like = w.shape, w.values
        impl = resolve_impl(None, like.device, "tune", why_no_kernel(like.dtype, w.block))
        if impl == "triton" and INTERPRETED:
            raise ValueError("interpreted kernels are not tuned: their times say nothing")
        passes = ("fwd", "dx", "dvalues") if product.trains and impl == "triton" else ("fwd",)
        for m in product.rows:
            x, dy = like.new_empty(m, k), like.new_empty(m, n)
            for which in passes:
                operands = {"fwd": (x,), "dx": (dy,), "dvalues": (dy, x)}[which]
                yield _Work(product.name, cell_of(which, w, impl, *operands), w)


def _search_all(
    work: Sequence[_Work],
    rows: list[Tuned],
    notes: list[str],
    until: float,
    again: bool,
    progress: Callable[[int, int, str], None] | None,
    say: Callable[[str], None],
) -> None:
    """Fill ``rows``, one for each piece of work; what a stop leaves is what was found."""
    folder = cache_folder()
    if folder is None:
        notes.append("no home: what is found is kept in this process only")
    else:
        sweep(folder)
    generators: dict[torch.device, torch.Generator] = {}
    done: dict[tuple[Cell, torch.device], Tuned] = {}
    for i, item in enumerate(work):
        cell, device = item.cell, item.device
        if progress is not None:
            progress(i, len(work), f"{item.name}, M {cell.M}")
        if (cell, device) in done:
            rows.append(replace(done[cell, device], name=item.name))
            continue
        random = generators.setdefault(device, torch.Generator(device).manual_seed(0))
        now = time.perf_counter()
        ends = now + (until - now) / (len(work) - i)
        tuned = _tune_one(item, random, ends, again, folder, notes, say)
        rows.append(tuned)
        done[cell, device] = tuned
    if progress is not None:
        progress(len(work), len(work), "")


def _tune_one(
    item: _Work,
    random: torch.Generator,
    until: float,
    again: bool,
    folder: Path | None,
    notes: list[str],
    say: Callable[[str], None],
) -> Tuned:
    cell, device = item.cell, item.device
    present = choose(cell, device)
    key = full_key(cell, device)
    if not again and recorded(folder, key):
        return Tuned(item.name, cell, "cached", present)
    others = candidates(cell, architecture(device) in _COPY_ENGINES)
    if len(others) < 2:
        return Tuned(item.name, cell, "no choice", present)
    if time.perf_counter() > until:
        return Tuned(item.name, cell, "not reached", present)
    problem = Problem(cell, item.matrix, random)
    found = search(
        problem, present.candidate, others, until, lambda text: say(f"{item.name}: {text}")
    )
    if found is None:
        return Tuned(item.name, cell, "not reached", present)
    return _keep(item, present, found, key, folder, notes)


def _keep(
    item: _Work,
    present: Choice,
    found: Found,
    key: dict[str, object],
    folder: Path | None,
    notes: list[str],
) -> Tuned:
    """Record what was found, and have it taken from here on."""
    cell, device = item.cell, item.device
    by_reason = analytic(cell).candidate
    name = ANALYTIC if found.candidate == by_reason else found.candidate.name
    facts = {
        "M": cell.M, "density_measured": round(cell.density, 4), "timed": found.timed,
        "ms": found.ms, "gain": found.gain if math.isfinite(found.gain) else None,
        "before": present.candidate.name,
    }  # fmt: skip
    if folder is not None and (reason := write_record(folder, key, name, facts)):
        notes.append(f"{reason}; what is found is kept in this process only")
    tell(key, name)
    status = "kept" if found.candidate == present.candidate else "changed"
    return Tuned(item.name, cell, status, choose(cell, device), found.gain, found.ms, found.skipped)


def _names(rows: Sequence[Tuned], count: int) -> list[str | None]:
    """What rank 0 takes, for the other ranks; ``None`` where it decided nothing."""
    names: list[str | None] = [
        None if row.status in ("not reached", "no choice") else _recorded_name(row) for row in rows
    ]
    return names + [None] * (count - len(names))


def _recorded_name(row: Tuned) -> str:
    name = row.choice.candidate.name
    return ANALYTIC if row.choice.candidate == analytic(row.cell).candidate else name


def _told_by_others(work: Sequence[_Work], begin: float) -> TuneReport:
    """Wait for what rank 0 found, and take it."""
    box: list[Any] = [None]
    torch.distributed.broadcast_object_list(box, src=0)
    names = box[0]
    if len(names) != len(work):
        raise ValueError(
            f"rank 0 tuned {len(names)} products, this rank has {len(work)}: all ranks must tune "
            "the same model with the same input"
        )
    folder, notes = cache_folder(), []
    for item, name in zip(work, names, strict=True):
        if name is not None:
            key = full_key(item.cell, item.device)
            tell(key, name)
            if folder is not None and (
                reason := write_record(folder, key, name, {"from": "rank 0"})
            ):
                notes.append(reason)
    rows = tuple(
        Tuned(item.name, item.cell, "cached", choose(item.cell, item.device)) for item in work
    )
    return TuneReport(rows, time.perf_counter() - begin, tuple(dict.fromkeys(notes)))
