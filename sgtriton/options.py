"""What options of the command say, as values; what cannot be read is a ``ValueError``."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch

__all__ = [
    "BLOCK", "DTYPES", "ROWS", "SPARSITY", "check_memory", "given", "number", "one_of",
    "parse_block", "parse_rows", "parse_shapes", "refuse", "share",
]  # fmt: skip

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
BLOCK, SPARSITY = "32x32", "0.9"  # defaults of products that options describe
ROWS = "1,16,128"  # of x, of the layers of a file

_MOST = 1 << 31  # elements of a weight, and of what is multiplied with it

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


def given(text: str | None, default: str) -> str:
    """What an option says, or its default where it is not there."""
    return default if text is None else text


def share(name: str, text: str) -> float:
    """Read the share in [0, 1) that option ``name`` gives."""
    found = number(name, text, float)
    if not 0 <= found < 1:
        raise ValueError(f"{name} must be in [0, 1), got {found}")
    return found


def parse_shapes(text: str) -> list[tuple[int, int, int]]:
    """Read sizes of products such as ``16x1024x4096,1x64x64``: rows of x, outputs, inputs."""
    shapes = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,18})x(\d{1,18})x(\d{1,18})", part.strip().lower(), re.ASCII)
        m, n, k = map(int, match.groups()) if match else (0, 0, 0)
        if not m * n * k:
            raise ValueError(
                "shapes must be MxNxK, sizes of 1 or more, with commas between several, such as "
                f"16x1024x4096; got {part!r}"
            )
        check_memory("shapes", m, n, k, part)
        shapes.append((m, n, k))
    return shapes


def parse_rows(text: str) -> tuple[int, ...]:
    """Read numbers of rows of x such as ``1,16,128``, each once."""
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"\d{1,18}", part.strip(), re.ASCII)
        if not match or not int(part):
            raise ValueError(
                "rows must be whole numbers of 1 or more with commas between them, such as "
                f"{ROWS}; got {part!r}"
            )
        found.append(int(part))
    return tuple(dict.fromkeys(found))


def check_memory(name: str, m: int, n: int, k: int, given: object) -> None:
    """Raise ``ValueError`` where a product of these sizes is too large to be made."""
    if max(n * k, m * n, m * k) > _MOST:
        raise ValueError(
            f"{name} must be of matrices of up to {_MOST} elements each; got {given}, where M x N, "
            f"M x K and N x K are {m * n}, {m * k} and {n * k}"
        )


def refuse(arguments: argparse.Namespace, given: str, others: Mapping[str, str]) -> None:
    """Raise ``ValueError`` where options are given that do not go with ``--given``.

    Args:
        others: option -> why it does not.
    """
    for name, reason in others.items():
        if (value := getattr(arguments, name)) not in (None, False):
            came = "" if value is True else f"; got {value!r}"
            raise ValueError(f"{name} does not go with --{given}: {reason}{came}")
