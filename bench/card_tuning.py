"""The part of ``python -m bench card`` that tunes: standard products, and a table of choices."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from sgtriton_kernels._impl import resolve_impl
from sgtriton_kernels._triton import INTERPRETED
from sgtriton_kernels.cards import card_of
from sgtriton_kernels.records import architecture, device_name

from sgtriton.choice_table import file_name, make_table, measured_entries, write_table
from sgtriton.products import work_of
from sgtriton.promising import compilers_for
from sgtriton.tune_report import Tuned, TuneInterrupted
from sgtriton.tuning import tune_products

from .card_parts import Part, Progress
from .rows import append, circumstances, commit
from .standard_products import standard_products


@dataclass(frozen=True)
class TunedRow:
    """A line of ``tuning.csv``: a product, what it takes now, and how much that gained."""

    name: str
    op: str
    dtype: str
    block: str
    density: float
    M: int
    N: int
    K: int
    status: str
    candidate: str
    source: str
    gain: float
    ms: float
    threads: int
    cpu: str
    sgtriton: str
    torch: str
    python: str
    commit: str
    device: str = ""


# for a product at the least: a few tuned rather than many not reached. On a card each of a dozen
# tiles is compiled.
_SECONDS = {"cpu": 4.0, "cuda": 8.0}
_RESTART = 15.0  # seconds for compilers to start again after one took too long


def tuning_part(deadline: float, folder: Path, device: torch.device) -> Iterator[Progress]:
    """Tune the standard products: ``tuning.csv``, and ``<card>.json``, the table that may ship.

    The sweeps that follow take what was found.
    """
    uses_triton = resolve_impl(None, device, "tune") == "triton"
    chosen = standard_products(trains=uses_triton, counted=device.type == "cpu")
    yield Progress(0, len(chosen))
    if INTERPRETED and uses_triton:
        yield Progress(0, len(chosen), note="interpreted kernels are not tuned")
        return
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    rows: list[Tuned] = []
    first = [(work.cell, device) for work in work_of([chosen[0].make(dtype, device)])]
    with compilers_for(first, deadline - time.monotonic()) as compilers:
        for i, standard in enumerate(chosen):
            if compilers is not None and not compilers.ready:
                compilers.start(min(time.monotonic() + _RESTART, deadline))
            left = deadline - time.monotonic()
            if left <= 0:
                return
            seconds = max(left / (len(chosen) - i), _SECONDS[device.type])
            stopped = None
            try:
                report = tune_products(
                    [standard.make(dtype, device)], min(seconds, left), compilers=compilers
                )
            except TuneInterrupted as error:
                report, stopped = error.report, error
            found = [row for row in report.rows if row.status != "cached"]
            for tuned in found:
                append(folder / "tuning.csv", _tuned_row(tuned, device))
            rows += found
            _write_table(folder, device, rows)
            if stopped is not None:
                raise stopped
            yield Progress(i + 1, len(chosen), note="; ".join(report.notes))


def _write_table(folder: Path, device: torch.device, rows: list[Tuned]) -> None:
    arch, called = architecture(device), device_name(device)
    name = card_of(called, arch) or called
    facts = {"device": called, "torch": torch.__version__, "commit": commit()}
    table = make_table(name, arch, "measured", measured_entries(rows), facts)
    write_table(folder / file_name(name), table)


def _tuned_row(tuned: Tuned, device: torch.device) -> TunedRow:
    cell, (bn, bk) = tuned.cell, tuned.cell.block
    return TunedRow(
        name=tuned.name, op=cell.op, dtype=str(cell.dtype).removeprefix("torch."),
        block=f"{bn}x{bk}", density=round(cell.density, 4),
        M=cell.M, N=cell.N, K=cell.K, status=tuned.status,
        candidate=tuned.choice.candidate.name, source=tuned.choice.source,
        gain=round(tuned.gain, 3), ms=round(tuned.ms, 4), **circumstances(),
        device=device_name(device),
    )  # fmt: skip


TUNING = Part("tuning", 3, tuning_part)
