"""What options of the command say, as values; what cannot be read is a ``ValueError``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TypeVar

__all__ = ["number", "one_of", "parse_block"]

_T = TypeVar("_T")


def parse_block(text: str) -> tuple[int | None, int | None]:
    """Read a gate block such as ``4x4``, ``1x1``, ``1xfull``.

    Args:
        text: Two sides, outputs then inputs, with an ``x`` between; ``full`` is the whole
            dimension.

    Returns:
        The sides; ``full`` is None.

    Raises:
        ValueError: Anything else, with what is allowed.
    """
    match = re.fullmatch(r"(\d+|full)x(\d+|full)", text.strip().lower(), re.ASCII)
    sides = [None if side == "full" else int(side) for side in match.groups()] if match else [0]
    if 0 in sides:
        raise ValueError(
            f"block must be two sides of 1 or more or 'full', such as 4x4, 1x1 or 1xfull, "
            f"got {text!r}"
        )
    return sides[0], sides[1]


def number(name: str, text: str, kind: Callable[[str], _T]) -> _T:
    """Read the number that option ``name`` gives; ``kind`` is ``int`` or ``float``."""
    try:
        return kind(text)
    except ValueError:
        allowed = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name} must be {allowed}, got {text!r}") from None


def one_of(name: str, text: str, allowed: Iterable[str]) -> str:
    """Read the word that option ``name`` gives, one of those ``allowed``."""
    allowed = list(allowed)
    if text not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {text!r}")
    return text
