"""Find the fastest candidate of one product: check each, time those that are right, in turns."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from sgtriton_kernels.candidate import Candidate

from .cold import ColdTimer
from .problem import Problem
from .tables import in_a_line

GAIN = 1.03  # of the present choice's speed, that another must reach to take its place
_HOPELESS = 1.5  # times the fastest first call, from which a candidate is timed no more
_ROUNDS = 31  # of calls in turns, after which no more are needed
_FEWEST = 5  # rounds without which nothing is decided


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
        over_reasoned: how much faster it is than what reasoning gives, likewise; infinite where
            that is out of the question, NaN where it was not given.
    """

    candidate: Candidate
    ms: float
    present_ms: float
    gain: float
    timed: int
    skipped: dict[str, str]
    over_reasoned: float = float("nan")


@dataclass(frozen=True)
class NoneRight:
    """What a search found where every candidate, the present one as well, is wrong or fails.

    Args:
        skipped: name -> why.
    """

    skipped: dict[str, str]


def search(
    problem: Problem,
    present: Candidate,
    others: Sequence[Candidate],
    until: float,
    say: Callable[[str], None] = lambda text: None,
    reasoned: Candidate | None = None,
) -> Found | NoneRight | None:
    """Find the fastest of some candidates.

    The present one stays unless another is faster by more than :data:`GAIN` and than what its own
    times scatter.

    Args:
        problem: what they compute.
        present: what is taken without a search.
        others: those to compare it with, most promising first.
        until: when to stop, by ``time.perf_counter``.
        say: gets a line for each candidate that is skipped.
        reasoned: what is taken without a record; compared as well, however slow it is.

    Returns:
        ``None`` where the time did not suffice to decide.
    """
    timer, skipped = ColdTimer(problem.device), {}
    first: dict[Candidate, float] = {}
    always = [present] if reasoned is None else [present, reasoned]
    for candidate in dict.fromkeys([*always, *others]):
        if time.perf_counter() > until:
            return None
        found = _tried(problem, candidate, timer, min(first.values(), default=math.inf))
        if isinstance(found, str):
            skipped[candidate.name] = found
            say(f"{candidate.name} is skipped: {found}")
        else:
            first[candidate] = found
    if present not in first:
        say(f"what is taken now, {present.name}, is skipped: {skipped[present.name]}")
    if not first:
        return NoneRight(skipped)
    best = min(first.values())
    kept = [c for c, ms in first.items() if ms <= _HOPELESS * best or c in always]
    samples = _in_turns(problem, {candidate: first[candidate] for candidate in kept}, timer, until)
    if len(samples[kept[0]]) < _FEWEST:
        return None
    found = _decide(samples, present if present in first else None, len(first), skipped)
    if reasoned is None:
        return found
    over = _ratios(samples, reasoned, found.candidate) if reasoned in first else [float("inf")]
    return replace(found, over_reasoned=statistics.median(over))


def _tried(problem: Problem, candidate: Candidate, timer: ColdTimer, fastest: float) -> float | str:
    """Milliseconds of a first call; or why a candidate is out of the question.

    Args:
        fastest: milliseconds of the fastest candidate until now.
    """
    call = _call(problem, candidate)
    try:
        if (reason := problem.wrong(candidate)) is not None:
            return reason
        once = timer.ms(call)
        # a first call may allocate
        return min(once, timer.ms(call)) if once <= 2 * _HOPELESS * fastest else once
    except Exception as error:
        return f"fails: {in_a_line(error)}"


def _call(problem: Problem, candidate: Candidate) -> Callable[[], object]:
    return lambda: problem.call(candidate)


def _in_turns(
    problem: Problem, before: Mapping[Candidate, float], timer: ColdTimer, until: float
) -> dict[Candidate, list[float]]:
    """Milliseconds by round; those that stay far behind leave after the first rounds.

    Args:
        before: those that race, the first of them to the end; milliseconds of an earlier call.
    """
    samples: dict[Candidate, list[float]] = {candidate: [] for candidate in before}
    first, *_ = racing = list(before)
    for done in range(_ROUNDS):
        for candidate in racing:
            if time.perf_counter() > until:
                return _whole_rounds(samples, racing)
            ms = timer.warmed_ms(_call(problem, candidate), before[candidate])
            samples[candidate].append(ms)
        if done + 1 == _FEWEST and len(racing) > 2:
            medians = {c: statistics.median(samples[c]) for c in racing}
            least = min(medians.values())
            racing = [c for c in racing if medians[c] <= 1.2 * least or c == first]
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
    ratios = _ratios(samples, present, best)
    gain, surely = statistics.median(ratios), ratios[len(ratios) // 4]
    if best == present or gain <= GAIN or surely <= 1:
        best, gain = present, 1.0
    return Found(best, medians[best], medians[present], gain, timed, skipped)


def _ratios(
    samples: Mapping[Candidate, list[float]], before: Candidate, after: Candidate
) -> list[float]:
    """How much faster one is than another, by round, the least first."""
    rounds = zip(samples[before], samples[after], strict=False)
    return sorted(slow / fast for slow, fast in rounds)
