"""What was looked up, kept where the next call meets it; any thread may ask."""

from __future__ import annotations

from typing import Any, TypeVar

_K = TypeVar("_K")
_V = TypeVar("_V")


class Choices:
    """What was looked up for a matrix or a layer, as long as nothing is recorded anew."""

    def __init__(self) -> None:
        self._kept: tuple[int, dict[tuple[object, ...], Any]] = (-1, {})

    def of(self, generation: int) -> dict[tuple[object, ...], Any]:
        """Those of a generation; of earlier ones there are none."""
        kept = self._kept
        if kept[0] != generation:
            kept = self._kept = (generation, {})  # at once: another thread meets one or the other
        return kept[1]


def keep(kept: dict[_K, _V], key: _K, value: _V, most: int) -> _V:
    """Keep a value with the others, or in their place where there are ``most`` of them."""
    if len(kept) >= most:
        kept.clear()
    kept[key] = value
    return value
