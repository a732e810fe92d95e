"""Which candidate a call takes: what the user's cache, a table that ships, or reasoning names.

In this order; a candidate that the caller gives comes before them all and is not looked up. Nothing
is timed here and no device is waited for.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ._triton import is_native
from .candidate import ANALYTIC, Candidate
from .candidates import candidates, named, reasoned
from .cell import Cell
from .choices import Choices, keep
from .records import cache_folder, file_name, place, read_record, table_entries
from .shared_memory import fits

_MOST = 4096  # choices that are remembered
_MOST_KEPT = 256  # with a matrix or a layer
# what is predicted of a candidate must be so much better than reasoning to be believed, and to be
# worth an entry of a table
BELIEVED = 1.1


@dataclass(frozen=True)
class Choice:
    """What a call takes, and why.

    Args:
        candidate: what computes.
        source: ``"cache"`` | ``"table"`` | ``"predicted"`` | ``"analytic"``: a record of this
            user's, one that ships and was measured, one that ships and was not, or reasoning.
        reasons: in words.
    """

    candidate: Candidate
    source: str
    reasons: str


@dataclass
class _Now:
    """What is remembered in this process.

    Attributes:
        generation: grows when earlier choices may have become others; who keeps one compares it.
    """

    generation: int = 0


now = _Now()
_chosen: dict[tuple[Cell, torch.device, int, int], Choice] = {}
_told: dict[str, str] = {}  # file name of a key -> candidate, of this process


def forget() -> None:
    """Look everything up anew from here on."""
    now.generation += 1
    _chosen.clear()


def tell(key: Mapping[str, object], candidate: str) -> None:
    """Have a record of the user's in this process, whether or not a file holds it."""
    _told[file_name(key)] = candidate
    forget()


def recorded(folder: Path | None, key: Mapping[str, object]) -> str | None:
    """The name that a record of the user's gives for a key, or ``None``; it may name nothing."""
    if (name := _told.get(file_name(key))) is not None:
        return name
    record = None if folder is None else read_record(folder, key)
    return None if record is None else record["candidate"]


def choose(cell: Cell, device: torch.device) -> Choice:
    """The candidate that a product takes on a device.

    The first call for a product reads a small file; after that the choice is remembered.
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    key = cell, device, threads, now.generation
    found = _chosen.get(key)
    if found is None:
        found = keep(_chosen, key, _look_up(cell, device), _MOST)
    return found


def choose_and_keep(
    choices: Choices, key: tuple[object, ...], cell: Cell, device: torch.device
) -> Candidate:
    """The candidate that a product takes; kept under a key of the caller's."""
    kept = choices.of(now.generation)  # before looking: what another thread records is not missed
    found = choose(cell, device).candidate
    if cell.longest is not None:  # else a capture forbade to count, which the next call may
        keep(kept, key, found, _MOST_KEPT)
    return found


def full_key(cell: Cell, device: torch.device, rows: int | None = None) -> dict[str, object]:
    """What a record of this user's is found by: product, place, and the space of candidates."""
    names = ",".join(named(cell.op, cell.impl, cell.native))
    space = hashlib.sha256(names.encode()).hexdigest()[:16]
    return cell.key(rows) | place(device, cell.op, cell.impl) | {"space": space}


def recordable(cell: Cell, device: torch.device) -> dict[str, Candidate]:
    """By name, what a record can name: what cannot serve the product here is as unknown as what
    does not exist.
    """
    return {
        candidate.name: candidate
        for candidate in candidates(cell, copy_engine=True)
        if candidate.tile is None or fits(candidate.tile, cell, device)
    }


def _look_up(cell: Cell, device: torch.device) -> Choice:
    if not cell.M or not cell.nnz:  # nothing is multiplied
        return analytic(cell)
    known = recordable(cell, device)
    folder = cache_folder()
    for rows in cell.near_rows():
        name = recorded(folder, full_key(cell, device, rows))
        if name in known:
            return Choice(known[name], "cache", _record_of(cell, rows))
        if name == ANALYTIC:
            found = analytic(cell)
            why = f"{_record_of(cell, rows)}: nothing else was faster; {found.reasons}"
            return Choice(found.candidate, "cache", why)
    if cell.impl == "triton" and not is_native(device):
        for entry in table_entries(device, [cell.key(rows) for rows in cell.near_rows()]):
            if (found := _from_table(*entry, cell, known)) is not None:
                return found
    return analytic(cell)


def _record_of(cell: Cell, rows: int) -> str:
    """A record of so many rows in words."""
    bucket = f"M {rows // 2 + 1} to {rows}" if rows > 2 else f"M {rows}"
    return f"this user's record of {bucket}" + ", the nearest" * (rows != cell.rows)


def _from_table(card: str, entry: dict, cell: Cell, known: dict[str, Candidate]) -> Choice | None:
    status, gain = entry["status"], entry["gain"]
    source = "table" if status == "measured" else "predicted"
    if entry["candidate"] == ANALYTIC:
        found = analytic(cell)
        why = f"{status} for {card}: nothing else is faster; {found.reasons}"
        return Choice(found.candidate, source, why)
    if entry["candidate"] not in known or (status == "predicted" and gain < BELIEVED):
        return None
    reasons = f"{status} for {card}: {gain:.2f} times as fast as by reasoning"
    return Choice(known[entry["candidate"]], source, reasons)


@functools.lru_cache(_MOST)
def analytic(cell: Cell) -> Choice:
    """What reasoning gives: legal on every card, and never looked up."""
    candidate, reasons = reasoned(cell)
    return Choice(candidate, "analytic", reasons)
