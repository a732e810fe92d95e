"""Find the fastest candidate of one product: check each, time those that are right, in turns."""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sgtriton_kernels import BlockSparse, bsr_linear
from sgtriton_kernels._scratch import fill_scratch
from sgtriton_kernels.bsr_product import bsr_linear_dvalues, bsr_linear_dx
from sgtriton_kernels.candidates import Candidate
from sgtriton_kernels.cell import Cell

from .cold import ColdTimer, wait_for

GAIN = 1.03  # of the present choice's speed, that another must reach to take its place
_EXACT = 900  # products in a sum of whole numbers, so that each dtype holds it exactly
_CHECKS = 2  # inputs that a candidate must multiply rightly
_HOPELESS = 1.5  # times the fastest first call, from which a candidate is timed no more
_ROUNDS = 31  # of calls in turns, after which no more are needed
_FEWEST = 5  # rounds without which nothing is decided
_LONGEST = 200  # characters of a reason


@dataclass(frozen=True)
class Found:
    """What a search found.

    Args:
        candidate: the one to take.
        ms: median milliseconds of its calls.
        present_ms: likewise of the one that was taken before.
        gain: how much faster it is, by the median of its ratios in each round.
        timed: how many candidates were.
        skipped: name -> why a candidate is out of the question.
    """

    candidate: Candidate
    ms: float
    present_ms: float
    gain: float
    timed: int
    skipped: dict[str, str]


class Problem:
    """A product with inputs, on which candidates are tried.

    Args:
        cell: the product.
        matrix: the weight, on the device; its pattern counts, its values do not.
        generator: of the inputs, on the device.
    """

    def __init__(self, cell: Cell, matrix: BlockSparse, generator: torch.Generator):
        self.cell, self.matrix, self._generator = cell, matrix, generator
        self.device = matrix.values.device
        self.x = self._random(cell.M, cell.K)
        self.dy = self._random(cell.M, cell.N) if cell.op != "bsr_linear fwd" else None

    def _random(self, *shape: int) -> torch.Tensor:
        t = torch.randn(shape, device=self.device, generator=self._generator)
        return t.to(self.cell.dtype)

    def call(self, candidate: Candidate) -> torch.Tensor:
        """The product, as a candidate computes it."""
        return self._compute(candidate, self.x, self.dy, self.matrix)

    def _compute(
        self, candidate: Candidate, x: torch.Tensor, dy: torch.Tensor | None, w: BlockSparse
    ) -> torch.Tensor:
        if self.cell.op == "bsr_linear fwd":
            return bsr_linear(x, w, impl=self.cell.impl, tile=candidate.tile or candidate.name)
        assert dy is not None
        tile, k = candidate.tile, self.cell.K
        if self.cell.op == "bsr_linear dx":
            if tile is None:
                return dy @ w.to_dense()
            return bsr_linear_dx(dy, w.values, w.ccol, w.row, w.perm, k, tile)
        assert tile is not None
        return bsr_linear_dvalues(dy, x, w.values, w.row, w.col, w.perm, tile)

    def least_seconds(self, count: int) -> float:
        """About what a search among ``count`` candidates takes at least.

        The products that results are compared with, and each candidate over the stored blocks.
        """
        cell = self.cell
        products = _CHECKS * (1 + count * cell.density)
        return products * cell.M * cell.N * cell.K / _fp64_rate(self.device)

    def wrong(self, candidate: Candidate) -> str | None:
        """Why a candidate's results are wrong, or ``None``.

        Whole numbers are multiplied, few enough that no dtype rounds a sum: what is not equal is
        wrong. Memory that a call takes is full of NaN, so that what it leaves out shows.
        """
        for x, dy, w, expected in self._checks:
            with _nan_filled():
                out = self._compute(candidate, x, dy, w)
            wait_for(self.device)
            if out.shape != expected.shape or out.dtype != self.cell.dtype:
                return f"gives {out.dtype} {list(out.shape)} for {list(expected.shape)}"
            differ = int((out.double() != expected).sum())  # NaN differs from everything
            if differ:
                return f"wrong in {differ} of {out.numel()} elements"
        return None

    @functools.cached_property
    def _checks(self) -> list[tuple[torch.Tensor, torch.Tensor | None, BlockSparse, torch.Tensor]]:
        """Inputs of whole numbers, and what comes out."""
        inputs = [self._whole_numbers() for _ in range(_CHECKS)]
        return [(x, dy, w, self._expected(x, dy, w)) for x, dy, w in inputs]

    def _whole_numbers(self) -> tuple[torch.Tensor, torch.Tensor | None, BlockSparse]:
        cell, w = self.cell, self.matrix
        terms = {"fwd": cell.K, "dx": cell.N, "dvalues": cell.M}[cell.op.split()[1]]
        share = min(1.0, _EXACT / max(terms, 1))

        def signs(*shape: int, share: float = 1.0) -> torch.Tensor:
            u = torch.rand(shape, device=self.device, generator=self._generator)
            return (torch.where(u < share / 2, -1.0, 0.0) + (u > 1 - share / 2)).to(cell.dtype)

        values = signs(*w.values.shape)
        matrix = BlockSparse._from_index(values, w.index_tensors, w.shape)
        x = signs(cell.M, cell.K, share=share)
        return x, None if self.dy is None else signs(cell.M, cell.N, share=share), matrix

    def _expected(self, x: torch.Tensor, dy: torch.Tensor | None, w: BlockSparse) -> torch.Tensor:
        dense = w.to_dense().double()  # of fp32 a card may take fewer bits
        if dy is None:
            return F.linear(x.double(), dense)
        if self.cell.op == "bsr_linear dx":
            return dy.double() @ dense
        return _taken(dy.double().T @ x.double(), w)


@functools.cache
def _fp64_rate(device: torch.device) -> float:
    """Multiply-adds a second of a product in fp64, about."""
    x, w = (torch.ones(n, 1024, dtype=torch.float64, device=device) for n in (64, 1024))
    seconds = []
    for _ in range(3):
        wait_for(device)
        begin = time.perf_counter()
        torch.matmul(x, w)
        wait_for(device)
        seconds.append(time.perf_counter() - begin)
    return x.numel() * len(w) / max(min(seconds), 1e-9)


def _taken(whole: torch.Tensor, w: BlockSparse) -> torch.Tensor:
    """The stored blocks' places in a matrix ``[N, K]``, zeros beyond a ragged edge."""
    (n, k), (bn, bk) = w.shape, w.block
    padded = F.pad(whole, (0, w.block_cols * bk - k, 0, w.block_rows * bn - n))
    blocks = padded.view(w.block_rows, bn, w.block_cols, bk).transpose(1, 2)
    return blocks[w.block_row.long(), w.col[: w.nnz].long()]


def search(
    problem: Problem,
    present: Candidate,
    others: Sequence[Candidate],
    until: float,
    say: Callable[[str], None] = lambda text: None,
) -> Found | None:
    """Find the fastest of some candidates.

    The present one stays unless another is faster by more than :data:`GAIN` and than what its own
    times scatter.

    Args:
        problem: what they compute.
        present: what is taken without a search.
        others: those to compare it with, most promising first.
        until: when to stop, by ``time.perf_counter``.
        say: gets a line for each candidate that is skipped.

    Returns:
        ``None`` where the time did not suffice to decide.
    """
    timer, skipped = ColdTimer(problem.device), {}
    first: dict[Candidate, float] = {}
    for candidate in [present, *(c for c in others if c != present)]:
        if time.perf_counter() > until:
            return None
        reason = _why_not(problem, candidate)
        if reason is not None:
            skipped[candidate.name] = reason
            say(f"{candidate.name} is skipped: {reason}")
            continue
        call = _call(problem, candidate)
        once = timer.ms(call)
        if once <= 2 * _HOPELESS * min(first.values(), default=once):
            once = min(once, timer.ms(call))  # a first call may allocate
        first[candidate] = once
    if present not in first:
        say(f"what is taken now, {present.name}, is skipped: {skipped[present.name]}")
    if not first:
        return None
    best = min(first.values())
    kept = [c for c, ms in first.items() if ms <= _HOPELESS * best or c == present]
    samples = _in_turns(problem, kept, timer, until)
    if len(samples[kept[0]]) < _FEWEST:
        return None
    return _decide(samples, present if present in first else None, len(first), skipped)


def _why_not(problem: Problem, candidate: Candidate) -> str | None:
    try:
        return problem.wrong(candidate)
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        return f"fails: {type(error).__name__}: {first[:_LONGEST]}"


def _call(problem: Problem, candidate: Candidate) -> Callable[[], object]:
    return lambda: problem.call(candidate)


def _in_turns(
    problem: Problem, kept: Sequence[Candidate], timer: ColdTimer, until: float
) -> dict[Candidate, list[float]]:
    """Milliseconds by round; those that stay far behind leave after the first rounds."""
    samples: dict[Candidate, list[float]] = {candidate: [] for candidate in kept}
    racing = list(kept)
    for done in range(_ROUNDS):
        for candidate in racing:
            if time.perf_counter() > until:
                return _whole_rounds(samples, racing)
            samples[candidate].append(timer.ms(_call(problem, candidate)))
        if done + 1 == _FEWEST and len(racing) > 2:
            medians = {c: statistics.median(samples[c]) for c in racing}
            least = min(medians.values())
            racing = [c for c in racing if medians[c] <= 1.2 * least or c == kept[0]]
    return samples


def _whole_rounds(
    samples: dict[Candidate, list[float]], racing: Sequence[Candidate]
) -> dict[Candidate, list[float]]:
    rounds = min(len(samples[candidate]) for candidate in racing)
    return {candidate: taken[:rounds] for candidate, taken in samples.items()}


def _decide(
    samples: Mapping[Candidate, list[float]],
    present: Candidate | None,
    timed: int,
    skipped: dict[str, str],
) -> Found:
    medians = {candidate: statistics.median(taken) for candidate, taken in samples.items()}
    best = min(medians, key=lambda candidate: medians[candidate])
    if present is None:
        return Found(best, medians[best], float("nan"), float("inf"), timed, skipped)
    ratios = sorted(
        before / after for before, after in zip(samples[present], samples[best], strict=False)
    )
    gain, surely = statistics.median(ratios), ratios[len(ratios) // 4]
    if best == present or gain <= GAIN or surely <= 1:
        best, gain = present, 1.0
    return Found(best, medians[best], medians[present], gain, timed, skipped)


@contextlib.contextmanager
def _nan_filled() -> Iterator[None]:
    """Memory that is allocated, and what calls keep of it, is full of NaN."""
    fill_scratch(float("nan"))
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of ops that are not deterministic
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fills  # pyright: ignore
