"""Interleaved timing: candidates take turns, so that a busy machine slows each of them alike.

Each timed call finds the second-level cache cold, as a layer of a model does whose other layers ran
since its last call; larger ones hold what the candidate left there in a call just before.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from .cold import ColdTimer


def interleaved_ms(
    candidates: Sequence[Callable[[], object]],
    device: torch.device,
    seconds: float = 0.1,
    rounds: int = 5,
) -> list[float]:
    """Median milliseconds of one call of each candidate.

    Args:
        candidates: called without arguments.
        device: waited for after each call.
        seconds: about how long to measure in all; at least ``rounds`` calls are timed.
        rounds: fewest timed calls of each candidate.

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
    """Milliseconds of each timed call of each candidate; see :func:`interleaved_ms`."""
    timer, before = ColdTimer(device), []
    for call in candidates:
        call()  # first calls compile and allocate
        before.append(timer.ms(call))
    samples: list[list[float]] = [[] for _ in candidates]
    end = time.perf_counter() + seconds
    while len(samples[0]) < rounds or time.perf_counter() < end:
        for call, once, taken in zip(candidates, before, samples, strict=True):
            taken.append(timer.warmed_ms(call, once))
    return samples
