"""What a search compares on a device, the most promising first.

On a card there are dozens of candidates for a product of ``bsr_linear`` or a convolution, and a
launch of each is compiled before it can be timed. So they are ordered by the model of the card,
compiled in this order, several at a time, and those that the compiler takes are kept until there
are enough. Elsewhere, and of other ops, all of them are compared.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from sgtriton_kernels.candidate import Candidate, cut
from sgtriton_kernels.cards import Card, card, card_of
from sgtriton_kernels.cell import OPS, Cell
from sgtriton_kernels.conv_cell import CONV_OPS
from sgtriton_kernels.lookup import analytic, recordable
from sgtriton_kernels.records import architecture, device_name

from .compilers import NO_TIME, Compilers
from .cross_compile import COPY_ENGINES, SHARED_LIMITS, why_not
from .offline import expected, faults, prediction

MOST = 12  # tiles that are compared, beside those that are anyway
_START, _LEAST_START = 0.2, 4.0  # share of all seconds to start compilers in; how many it must be
_SOFT, _HARD = 0.25, 0.5  # share of a product's seconds, after which no more are begun, and ended


@dataclass(frozen=True)
class Promising:
    """What a search is to compare.

    Args:
        candidates: the most promising first.
        refused: name -> why the card's compiler does not take a candidate.
    """

    candidates: tuple[Candidate, ...]
    refused: dict[str, str]


def contenders(cell: Cell, device: torch.device) -> list[Candidate]:
    """What reasoning gives for a product, and what a record can name there that differs from it."""
    reasoned, engine = analytic(cell).candidate, architecture(device) in COPY_ENGINES
    own = reasoned.tile and cut(reasoned.tile, cell)
    found = [reasoned]
    for candidate in recordable(cell, device).values():
        tile = candidate.tile
        if candidate == reasoned or (tile and tile.bulk and not engine):
            continue
        if tile and cut(tile, cell) == own:
            continue
        found.append(candidate)
    return found


@contextlib.contextmanager
def compilers_for(
    products: Iterable[tuple[Cell, torch.device]], seconds: float
) -> Iterator[Compilers | None]:
    """Processes that compile for the cards of some products, started.

    Args:
        products: and where they are computed.
        seconds: of the whole search.

    Yields:
        ``None`` where nothing is to be compiled, nothing can be, or time does not suffice.
    """
    start = _START * seconds
    if start < _LEAST_START or why_not() or not any(_target(*product) for product in products):
        yield None
        return
    with Compilers() as compilers:
        try:
            ready = compilers.start(time.monotonic() + start)
        except OSError:  # no memory or no process is left for them
            ready = 0
        yield compilers if ready else None


def promising(
    cell: Cell,
    device: torch.device,
    present: Candidate,
    compilers: Compilers | None = None,
    seconds: float = 0.0,
) -> Promising:
    """What to compare: what is taken now, what reasoning gives, and others that promise something.

    On a card that the compiler knows, what it refuses is left out; on one whose figures are known,
    all but :data:`MOST` tiles. What the library computes stays in.

    Args:
        cell: the product.
        device: where it is computed.
        present: what is taken now.
        compilers: ready to compile; nothing is compiled without.
        seconds: of the product's search, of which a share is spent. What is not compiled by then
            comes behind what is.
    """
    found = contenders(cell, device)
    first = (present,) if found[0] == present else (present, found[0])
    given = [candidate for candidate in found if candidate not in first]
    arch = _target(cell, device)
    if arch is None:
        return Promising((*first, *given), {})
    name = card_of(device_name(device), arch)
    most, limit = len(given), SHARED_LIMITS[arch]
    if name is not None:
        on = card(name)
        most, limit = MOST, on.shared_program_kib * 1024
        given.sort(key=lambda candidate: _order(on, cell, candidate))
    begin = time.monotonic()
    kept, late, refused = [], [], {}
    while given and len(kept) < most and time.monotonic() < begin + _SOFT * seconds:
        if compilers is None or not (together := compilers.ready):
            break
        part, given = given[:together], given[together:]
        until = begin + _HARD * seconds
        reasons = faults(arch, cell, part, limit, compilers, until, ahead=True)
        for candidate, reason in zip(part, reasons, strict=True):
            if reason is None:
                kept.append(candidate)
            elif reason == NO_TIME:
                late.append(candidate)
            else:
                refused[candidate.name] = reason
        if late:  # their processes were ended; to start others takes more than a product has
            compilers.close()
    rest = [*kept, *late, *given]
    tiles = [candidate for candidate in rest if candidate.tile is not None][:most]
    rest = [candidate for candidate in rest if candidate.tile is None or candidate in tiles]
    return Promising((*first, *rest), refused)


def _target(cell: Cell, device: torch.device) -> str | None:
    """What a product's kernels are compiled for; ``None`` where nothing is compiled ahead."""
    if cell.impl != "triton" or cell.native or cell.op not in (*OPS, *CONV_OPS):
        return None
    arch = architecture(device) if device.type == "cuda" else ""
    return arch if arch in SHARED_LIMITS else None


def _order(on: Card, cell: Cell, candidate: Candidate) -> tuple[float, float]:
    """What is predicted; of tiles that memory bounds alike, those whose programs end first."""
    try:
        if candidate.tile is None:
            return expected(on, cell, candidate)[0], 0.0
        found = prediction(on, cell, candidate.tile)
    except ValueError:  # there is no prediction of it
        return math.inf, math.inf
    return found.seconds, found.programs
