"""Interleaved timing: candidates take turns, so that a busy machine slows each of them alike.

Before each sample a candidate is called once unmeasured: otherwise it would pay for what the one
before it left in the caches, and short calls more than long ones.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from .cold import wait_for

_SAMPLE = 1e-3  # seconds that a sample lasts, or one call
_LONG = 0.05  # seconds from which what the caches hold makes no difference to a call


def interleaved_ms(
    candidates: Sequence[Callable[[], object]],
    device: torch.device,
    seconds: float = 0.1,
    rounds: int = 5,
) -> list[float]:
    """Median milliseconds of one call of each candidate.

    Args:
        candidates: called without arguments.
        device: waited for after each sample.
        seconds: about how long to measure in all; at least ``rounds`` samples are taken.
        rounds: fewest samples per candidate.

    Returns:
        One median per candidate.
    """
    return [statistics.median(taken) for taken in samples_ms(candidates, device, seconds, rounds)]


def undisturbed_ms(
    candidates: Sequence[Callable[[], object]], device: torch.device, seconds: float = 0.1
) -> list[float]:
    """Lower quartile of each candidate's milliseconds: for choosing one while other work runs.

    Other work only ever delays a call, and one of many short parallel parts much more than one long
    part: with two cores half taken, ratios of medians were off by up to 2.4, those of lower
    quartiles by up to 1.1 (eight trials; but for one of 512 rows).
    """
    taken = samples_ms(candidates, device, seconds, rounds=7)
    return [sorted(ms)[len(ms) // 4] for ms in taken]


def samples_ms(
    candidates: Sequence[Callable[[], object]],
    device: torch.device,
    seconds: float = 0.1,
    rounds: int = 5,
) -> list[list[float]]:
    """Milliseconds of one call of each candidate, sample by sample; see :func:`interleaved_ms`."""
    repeats = []
    long = []
    for call in candidates:
        call()  # first calls compile and allocate
        once = _sample(call, 1, device)
        repeats.append(max(1, int(_SAMPLE / max(once, 1e-7))))
        long.append(once > _LONG)
    samples: list[list[float]] = [[] for _ in candidates]
    end = time.perf_counter() + seconds
    while len(samples[0]) < rounds or time.perf_counter() < end:
        turns = zip(candidates, repeats, long, samples, strict=True)
        for call, repeat, is_long, taken in turns:
            if not is_long:
                call()
            taken.append(1e3 * _sample(call, repeat, device) / repeat)
    return samples


def _sample(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    wait_for(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    wait_for(device)
    return time.perf_counter() - start
