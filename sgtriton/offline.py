"""Candidates for a card, which may be absent: what its compiler refuses, and what is predicted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from sgtriton_kernels.candidate import Candidate
from sgtriton_kernels.cards import Card, card
from sgtriton_kernels.cell import OPS, Cell
from sgtriton_kernels.conv_cell import CONV_OPS, ConvCell
from sgtriton_kernels.tiles import BsrTile

from . import conv_roofline, roofline
from .compilers import Built, Compilers
from .cross_compile import COPY_ENGINES, SHARED_LIMITS, shallow_pipeline, why_not
from .launches import Launch, bsr_conv_launches, bsr_linear_launches


@dataclass(frozen=True)
class Ranked:
    """A candidate and what is said of it: how long it should take, or why it is dropped.

    Args:
        candidate: the one that was given.
        seconds: predicted, not measured; ``None`` of one that is dropped.
        bound: one of ``roofline.BOUNDS``, or ``"library"``; likewise.
        dropped: in words; ``None`` of one that is kept.
    """

    candidate: Candidate
    seconds: float | None = None
    bound: str | None = None
    dropped: str | None = None


def rank(
    card_name: str,
    cell: Cell,
    candidates: Sequence[Candidate],
    compilers: Compilers | None = None,
    deadline: float | None = None,
    on_built: Callable[[int, int], object] | None = None,
) -> list[Ranked]:
    """Compile candidates for a card and order them by how long they should take there.

    Args:
        card_name: one of ``CARD_NAMES``.
        cell: what is to be computed, by Triton's kernels: a pass of ``bsr_linear`` or, as a
            :class:`.ConvCell`, of a convolution.
        candidates: of the cell's pass; those without a tile are not compiled.
        compilers: processes to compile in; of this call's own if ``None``.
        deadline: by ``time.monotonic``; what is not compiled by then is dropped.
        on_built: called with how many launches are compiled, and of how many.

    Returns:
        All of them: the fastest first, as given where the prediction sees no difference, and those
        that are dropped last.

    Raises:
        ValueError: an unknown card, a product or candidate of another implementation, or a Triton
            that cannot compile for cards.
    """
    on = card(card_name)
    if cell.impl != "triton" or cell.native:
        raise ValueError(f"cell must be a product by Triton's kernels on a card, got {cell}")
    _check_op(cell)
    if unknown := [c.name for c in candidates if c.tile is None and c.way != "unpack"]:
        raise ValueError(f"candidates must have a tile or be 'unpack', got {', '.join(unknown)}")
    limit = on.shared_program_kib * 1024
    reasons = faults(on.arch, cell, candidates, limit, compilers, deadline, on_built)
    kept, dropped = [], []
    for candidate, reason in zip(candidates, reasons, strict=True):
        if reason is None:
            try:
                kept.append(Ranked(candidate, *expected(on, cell, candidate)))
                continue
            except ValueError as error:
                reason = str(error)
        dropped.append(Ranked(candidate, dropped=reason))
    return sorted(kept, key=lambda ranked: ranked.seconds or 0.0) + dropped


def expected(on: Card, cell: Cell, candidate: Candidate) -> tuple[float, str]:
    """How many seconds a candidate should take on a card, and what bounds it.

    Args:
        cell: as for :func:`rank`.
        candidate: one with a tile, or ``"unpack"``.

    Returns:
        As :class:`Ranked` has them.

    Raises:
        ValueError: there is no prediction of it.
    """
    if candidate.tile is not None:
        found = prediction(on, cell, candidate.tile)
        return found.seconds, found.bound
    if isinstance(cell, ConvCell):
        return conv_roofline.unpack_seconds(on, cell), "library"
    return roofline.unpack_seconds(on, cell), "library"


def prediction(on: Card, cell: Cell, tile: BsrTile) -> roofline.Prediction:
    """What the model of a card says of a tile; as :func:`expected`."""
    if isinstance(cell, ConvCell):
        return conv_roofline.predict(on, cell, tile)
    return roofline.predict(on, cell, tile)


def faults(
    arch: str,
    cell: Cell,
    candidates: Sequence[Candidate],
    shared_limit: int | None = None,
    compilers: Compilers | None = None,
    deadline: float | None = None,
    on_built: Callable[[int, int], object] | None = None,
    ahead: bool = False,
) -> list[str | None]:
    """Why candidates should not run on cards of an architecture, as the compiler has it.

    They fail to compile, spill registers, need more shared memory than a program can have, or get a
    shallower pipeline than they ask for.

    Args:
        arch: one of ``TARGETS``.
        shared_limit: bytes of shared memory that a program can have; the architecture's if
            ``None``.
        cell, candidates, compilers, deadline, on_built: as for :func:`rank`.
        ahead: whether what a search calls, forward that multiplies only, is compiled as well as
            forward with all that it can add; the search then finds it in Triton's cache.

    Returns:
        Of each the reason in words; ``None`` where there is none, or no kernel.
    """
    _check_op(cell)
    if reason := why_not():
        raise ValueError(f"candidates cannot be compiled: {reason}")
    if arch not in SHARED_LIMITS:
        raise ValueError(f"arch must be one of {', '.join(SHARED_LIMITS)}; got {arch!r}")
    limit = SHARED_LIMITS[arch] if shared_limit is None else shared_limit
    launches: list[list[Launch]] = []
    for tile in (candidate.tile for candidate in candidates):
        some = [] if tile is None else _launches(arch, cell, tile)
        if tile is not None and ahead:
            called = _launches(arch, cell, tile, plain=True)
            some += [launch for launch in called if launch not in some]
        launches.append(some)
    work = [(arch, launch) for some in launches for launch in some]
    if compilers is None:
        with Compilers() as compilers:
            built = iter(compilers.build(work, deadline, on_built))
    else:
        built = iter(compilers.build(work, deadline, on_built))
    return [_fault(arch, cell, some, [next(built) for _ in some], limit) for some in launches]


def _check_op(cell: Cell) -> None:
    kinds = {**dict.fromkeys(OPS, Cell), **dict.fromkeys(CONV_OPS, ConvCell)}
    if type(cell) is not kinds.get(cell.op):
        raise ValueError(
            "cell must be a Cell of a pass of bsr_linear or a ConvCell of one of bsr_conv, got a "
            f"{type(cell).__name__} of {cell.op}"
        )


def _launches(arch: str, cell: Cell, tile: BsrTile, plain: bool = False) -> list[Launch]:
    """What a candidate launches on a card of that architecture."""
    if arch not in COPY_ENGINES:
        tile = replace(tile, bulk=False)
    which = cell.op.split()[1]
    if isinstance(cell, ConvCell):
        launches = bsr_conv_launches(
            which, cell.dtype, cell.block, cell.geometry, cell.images, cell.size, cell.nnz, tile,
            cell.channels_last, plain,
        )  # fmt: skip
    else:
        launches = bsr_linear_launches(
            which, cell.dtype, cell.block, cell.M, cell.N, cell.K, cell.nnz, tile, cell.aligned,
            plain,
        )  # fmt: skip
    return [
        replace(launch, constexprs=launch.constexprs | {"PRECISION": cell.precision})
        if "PRECISION" in launch.constexprs
        else launch
        for launch in launches
    ]


def _fault(
    arch: str, cell: Cell, launches: list[Launch], built: list[Built | str], limit: int
) -> str | None:
    for launch, found in zip(launches, built, strict=True):
        if isinstance(found, str):
            return found
        if found.spills:
            return f"{found.spills} {'bytes' if arch.startswith('sm_') else 'registers'} spilled"
        if found.shared > limit:
            return f"{found.shared} bytes of shared memory, a program can have {limit}"
        if launch is launches[0] and (fault := _pipeline_fault(arch, cell, launch, found)):
            return fault
    return None


def _pipeline_fault(arch: str, cell: Cell, launch: Launch, found: Built) -> str | None:
    """Whether tiles get fewer buffers than stages; AMD's compiler may keep some in registers.

    Rows that are not aligned are read by the element, which no copy does in the background; so are
    pixels whose channels are not.
    """
    wide = cell.aligned and cell.N % 16 == 0 and cell.K % 16 == 0
    if not wide or not arch.startswith("sm_") or launch.num_stages in (None, 1):
        return None
    return shallow_pipeline(launch.num_stages, found.instruction, found.buffers)
