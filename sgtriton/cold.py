"""Timing single calls that find the second-level cache cold, as a layer of a large model does."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

_LONG = 50.0  # milliseconds from which what the caches hold makes no difference to a call
_UNKNOWN_CPU, _UNKNOWN_CARD = 2 << 20, 128 << 20  # bytes of a second-level cache that is not known
_TIMES = 2  # as much is written as the cache holds,
_CARD_TIMES, _CARD_LEAST = 4, 1 << 28  # on a card more, and so many bytes at the least
# clock cycles that a card is kept busy: about 0.5 ms, longer than a launch takes the processor
_BUSY = 1_000_000


class ColdTimer:
    """Times one call at a time on a device, the second-level cache filled with other data before.

    On a card a call is timed by events on the card, which is still busy when the call is launched:
    else what the launch takes the processor would be part of the time. It is kept busy by the
    filling, and by waiting, since filling alone may be the shorter. On a CPU the clock times it.

    Args:
        device: of the calls.
    """

    def __init__(self, device: torch.device):
        self.device = device
        size = _TIMES * _second_level(device)
        if device.type == "cuda":
            size = max(_CARD_TIMES * _second_level(device), _CARD_LEAST)
        self._filler = torch.empty(size // 4, dtype=torch.float32, device=device)
        self._value = 0.0
        self._events = None
        if device.type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in "ab"]

    def ms(self, call: Callable[[], object]) -> float:
        """Milliseconds of one call."""
        self._value = 1.0 - self._value
        self._filler.fill_(self._value)
        if self._events is not None:
            start, end = self._events
            with torch.cuda.device(self.device):
                _keep_busy()
                start.record()
                call()
                end.record()
            end.synchronize()
            return start.elapsed_time(end)
        wait_for(self.device)
        begin = time.perf_counter()
        call()
        wait_for(self.device)
        return 1e3 * (time.perf_counter() - begin)

    def warmed_ms(self, call: Callable[[], object], before: float) -> float:
        """Milliseconds of one call after another one, which is not measured.

        Without that one a call would pay for what another candidate's left in larger caches, and
        who comes after a relative would gain.

        Args:
            before: milliseconds that a call took before; a long one needs no other.
        """
        if before <= _LONG:
            call()
        return self.ms(call)


def _keep_busy() -> None:
    """Have the current card wait on its own for a while; nothing where PyTorch has no such call."""
    if (sleep := getattr(torch.cuda, "_sleep", None)) is not None:
        sleep(_BUSY)


def wait_for(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _second_level(device: torch.device) -> int:
    """Bytes of the second-level cache: all of a card's, of a CPU that of the cores in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size or _UNKNOWN_CARD
    if device.type != "cpu":
        return _UNKNOWN_CARD
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip()
        size = int(text.removesuffix("K").removesuffix("M")) << (20 if text.endswith("M") else 10)
    except (OSError, ValueError):
        size = _UNKNOWN_CPU
    return size * torch.get_num_threads()
