"""Choose by measurement how products are computed on this device, and remember it.

Nothing here runs by itself: who calls :func:`tune` gives the seconds. What it finds lies in the
user's cache, where products look before they reason (:mod:`sgtriton_kernels.lookup`).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sgtriton_kernels._autocast import without_autocast
from sgtriton_kernels.candidate import ANALYTIC
from sgtriton_kernels.cell import Cell
from sgtriton_kernels.lookup import Choice, analytic, choose, full_key, recordable, recorded, tell
from sgtriton_kernels.records import cache_folder, key_text
from torch import nn

from .compilers import Compilers
from .products import AnyProduct, Work, products_of, work_of
from .promising import compilers_for, contenders, promising
from .search import Found, NoneRight, search
from .tables import in_a_line
from .tune_cache import sweep, write_record
from .tune_ranks import agreed, in_group, receive_outcomes, send_outcomes
from .tune_report import Tuned, TuneInterrupted, TuneReport

_RESERVE = 0.03  # of the seconds, for what comes after the last search
_FOUND = ("kept", "changed")  # of products that a search decided
_TRIES = 2  # of a search for whose product the time did not suffice


def tune(
    model: nn.Module,
    example_input: Any,
    seconds: float = 60.0,
    *,
    again: bool = False,
    distributed: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> TuneReport:
    """Measure, for the products of a model's sparse and gated layers, which candidate is fastest.

    The model runs once, in eval mode and without gradients, to see how many rows its linear layers
    meet and which images its convolutions. Then the candidates of each product are checked against
    a dense product and timed in turns; the present choice stays unless another is faster by more
    than the noise. What is found is kept in the user's cache and taken from the next call on; the
    layers' forms stay as they are. Of linear products and convolutions on a card whose figures are
    known, the dozen tiles are compared that its model promises most of; where there is time for it,
    all that are compared are compiled before, side by side, and what the compiler refuses is left
    out.

    Of gated linear layers in training mode a whole step is measured, forward and backward, with
    their gates as they are now; of those in eval mode the forward pass under ``no_grad``. On a CPU
    what is found holds for about this share of open blocks. On a card nobody counts them during
    training and it holds for any: tune with gates near the target there.

    Args:
        model: with layers made by :func:`.sparsify` or :func:`.patch`; not changed.
        example_input: what the model is called with: a tensor, a tuple of arguments, or a dict of
            keyword arguments.
        seconds: to spend, at the most.
        again: whether products that a record of before serves are timed anew.
        distributed: whether to go on where a process group exists: rank 0 searches, the others
            wait for what it found, so that ``seconds`` must be below the group's timeout.
        progress: called with how many products are done, how many there are, and the next one.

    Raises:
        ValueError: nothing to tune; no time; a process group without ``distributed``, or whose
            ranks do not tune the same products on the same kind of device (on all of them); inside
            a graph capture or a trace.
        TuneInterrupted: a ``KeyboardInterrupt`` during the search; what was found until then is
            kept, and is its ``report``.
    """
    found = _met_by(model, example_input)
    return tune_products(found, seconds, again=again, distributed=distributed, progress=progress)


def _met_by(model: nn.Module, example_input: Any) -> Iterator[AnyProduct]:
    found = products_of(model, example_input)
    if not found:
        raise ValueError(
            "the model has no block-sparse layer and no gated linear one that the input reaches: "
            "sgtriton.sparsify and sgtriton.patch make them"
        )
    yield from found


def check_may_search(seconds: float, distributed: bool = False) -> None:
    """Raise ``ValueError`` where no search may run."""
    if not isinstance(seconds, (int, float)) or not seconds > 0:
        raise ValueError(f"seconds must be positive, got {seconds!r}")
    if torch.compiler.is_compiling() or (
        torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    ):
        raise ValueError("nothing is tuned while a graph is captured or traced: tune before")
    if in_group() and not distributed:
        raise ValueError(
            "a process group exists: tune before it is made, or pass distributed=True on all "
            "ranks, and rank 0 searches"
        )


def tune_products(
    products: Iterable[AnyProduct],
    seconds: float,
    *,
    again: bool = False,
    distributed: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
    say: Callable[[str], None] = lambda text: None,
    compilers: Compilers | None = None,
) -> TuneReport:
    """Tune products; arguments as for :func:`tune`.

    Args:
        products: on one device.
        say: gets a line for each candidate that is skipped.
        compilers: processes to compile in that stay for more; of this call's own if ``None``, where
            there is time to start some.
    """
    begin = time.perf_counter()
    shared = distributed and in_group()

    def collect() -> list[Work]:
        check_may_search(seconds, distributed)
        return list(work_of(products))

    work = agreed(collect) if shared else collect()
    if shared and torch.distributed.get_rank() != 0:
        return _told_by_rank_0(work, begin)
    until = begin + (1 - _RESERVE) * seconds
    rows: dict[int, Tuned] = {}
    notes: list[str] = []

    def report() -> TuneReport:
        seconds = time.perf_counter() - begin
        found = tuple(rows[i] for i in sorted(rows))
        return TuneReport(found, seconds, tuple(dict.fromkeys(notes)))

    try:
        _search_all(work, rows, notes, until, again, progress, say, compilers)
    except KeyboardInterrupt:
        notes.append(f"interrupted: {len(work) - len(rows)} of {len(work)} products not looked at")
        raise TuneInterrupted(report()) from None
    finally:
        if shared:
            send_outcomes([_outcome(rows.get(i)) for i in range(len(work))])
    return report()


def choices_of(products: Iterable[AnyProduct]) -> list[Tuned]:
    """What products take without a search, and by whose word; nothing is timed."""
    return [
        Tuned(item.name, item.cell, "not reached", choose(item.cell, item.device))
        for item in work_of(products)
    ]


def _search_all(
    work: Sequence[Work],
    rows: dict[int, Tuned],
    notes: list[str],
    until: float,
    again: bool,
    progress: Callable[[int, int, str], None] | None,
    say: Callable[[str], None],
    compilers: Compilers | None,
) -> None:
    """Fill ``rows``, by index into ``work``; what a stop leaves is what was found.

    Of products that share a record one is searched. Each search may take an equal part of the time
    that is left. Those that it did not suffice for get another chance with what others did not
    need.
    """
    folder = cache_folder()
    if folder is None:
        notes.append("no home: what is found is kept in this process only")
    else:
        sweep(folder)
    generators: dict[torch.device, torch.Generator] = {}
    done: dict[tuple[Cell, torch.device], Tuned] = {}
    waiting = list(range(len(work)))
    keys = [key_text(full_key(item.cell, item.device)) for item in work]

    def unknown() -> set[str]:
        found = {keys[i] for i, row in rows.items() if row.status in _FOUND}
        left = {keys[i] for i in waiting if again or not _is_recorded(work[i], folder)}
        return left - found

    new, left = unknown(), until - time.perf_counter()
    to_search = {(work[i].cell, work[i].device) for i in waiting if keys[i] in new}
    given = contextlib.nullcontext(compilers)
    with compilers_for(to_search, left) if compilers is None else given as compilers:
        for _ in range(_TRIES):
            to_come = Counter(keys[i] for i in waiting)
            for i in waiting:
                item, cell, device = work[i], work[i].cell, work[i].device
                if progress is not None:
                    decided = sum(row.status != "not reached" for row in rows.values())
                    progress(decided, len(work), item.label)
                is_known = keys[i] not in new and _is_recorded(item, folder)
                if (cell, device) not in done and is_known:
                    done[cell, device] = Tuned(item.name, cell, "cached", choose(cell, device))
                elif (cell, device) not in done:
                    random = generators.setdefault(device, torch.Generator(device).manual_seed(0))
                    now = time.perf_counter()
                    ends = now + (until - now) / max(1, len(new))
                    done[cell, device] = _tune_one(
                        item, random, ends, folder, notes, say, compilers
                    )
                rows[i] = replace(done[cell, device], name=item.name)
                to_come[keys[i]] -= 1
                if rows[i].status in _FOUND or not to_come[keys[i]]:
                    new.discard(keys[i])
            waiting = [i for i in waiting if rows[i].status == "not reached"]
            done = {key: row for key, row in done.items() if row.status != "not reached"}
            if not waiting or time.perf_counter() > until:
                break
            new = unknown()
    if progress is not None:
        progress(len(work), len(work), "")


def _tune_one(
    item: Work,
    random: torch.Generator,
    until: float,
    folder: Path | None,
    notes: list[str],
    say: Callable[[str], None],
    compilers: Compilers | None,
) -> Tuned:
    cell, device = item.cell, item.device
    present, left = choose(cell, device), until - time.perf_counter()
    if contenders(cell, device) == [present.candidate]:
        return Tuned(item.name, cell, "no choice", present)
    if left < 0:
        return Tuned(item.name, cell, "not reached", present)

    def tell_of(text: str) -> None:
        say(f"{item.label}: {text}")

    chosen = promising(cell, device, present.candidate, compilers, left)
    for name, reason in chosen.refused.items():
        tell_of(f"{name} is skipped: {reason}")
    try:
        with without_autocast(device):  # products are searched in their own dtype
            problem = item.problem(random)
            if time.perf_counter() + problem.least_seconds(len(chosen.candidates)) > until:
                return Tuned(item.name, cell, "not reached", present)
            problem.prepare()
            found = search(
                problem, present.candidate, chosen.candidates, until, tell_of,
                analytic(cell).candidate,
            )  # fmt: skip
    except (MemoryError, RuntimeError) as error:  # memory, say; it may suffice for other products
        notes.append(f"{item.label}: nothing could be compared: {in_a_line(error)}")
        return Tuned(item.name, cell, "not compared", present)
    if found is None:
        return Tuned(item.name, cell, "not reached", present)
    skipped = chosen.refused | found.skipped
    if isinstance(found, NoneRight):
        name = present.candidate.name
        notes.append(
            f"{item.label}: none of {len(skipped)} candidates computes it rightly; of "
            f"{name}, which is taken all the same: {skipped[name]}"
        )
        return Tuned(item.name, cell, "none right", present, skipped=skipped)
    return _keep(item, present, replace(found, skipped=skipped), folder, notes)


def _is_recorded(item: Work, folder: Path | None) -> bool:
    """Whether there is a record for a product that names what can serve it."""
    name = recorded(folder, full_key(item.cell, item.device))
    return name == ANALYTIC or name in recordable(item.cell, item.device)


def _keep(
    item: Work, present: Choice, found: Found, folder: Path | None, notes: list[str]
) -> Tuned:
    """Record what was found, and have it taken from here on."""
    cell, device = item.cell, item.device
    key = full_key(cell, device)
    by_reason = analytic(cell).candidate
    name = ANALYTIC if found.candidate == by_reason else found.candidate.name
    facts = {
        "M": cell.M, "density_measured": round(cell.density, 4), "timed": found.timed,
        "ms": found.ms, "gain": found.gain if math.isfinite(found.gain) else None,
        "before": present.candidate.name,
    }  # fmt: skip
    if folder is not None and (reason := write_record(folder, key, name, facts)):
        notes.append(_kept_here(reason))
    tell(key, name)
    status = "kept" if found.candidate == present.candidate else "changed"
    return Tuned(
        item.name, cell, status, choose(cell, device), found.gain, found.ms, found.skipped,
        found.over_reasoned,
    )  # fmt: skip


def _outcome(row: Tuned | None) -> tuple[str, str | None]:
    """What the other ranks are told of a product: its status, and what a record of it names."""
    if row is None:
        return "not reached", None
    if row.status not in ("cached", "kept", "changed"):
        return row.status, None
    candidate = row.choice.candidate
    name = ANALYTIC if candidate == analytic(row.cell).candidate else candidate.name
    return "cached", name


def _told_by_rank_0(work: Sequence[Work], begin: float) -> TuneReport:
    """Wait for what rank 0 found, and take it."""
    folder, notes, rows = cache_folder(), [], []
    for item, (status, name) in zip(work, receive_outcomes(), strict=True):
        cell, device = item.cell, item.device
        if name is not None:
            key = full_key(cell, device)
            # a rank that shares its home with rank 0 finds the record there
            if folder is not None and recorded(folder, key) != name:
                reason = write_record(folder, key, name, {"from": "rank 0"})
                notes += [] if reason is None else [_kept_here(reason)]
            tell(key, name)
        rows.append(Tuned(item.name, cell, status, choose(cell, device)))
    return TuneReport(tuple(rows), time.perf_counter() - begin, tuple(dict.fromkeys(notes)))


def _kept_here(reason: str) -> str:
    return f"{reason}; what is found is kept in this process only"
