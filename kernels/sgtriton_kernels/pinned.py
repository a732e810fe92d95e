"""A candidate that the caller names for a forward pass, as an op of PyTorch takes it: by its name.

An exported program keeps what its ops are given: a name, which another version of this package
reads as the same candidate, or refuses.
"""

from __future__ import annotations

import functools

import torch

from ._triton import is_native
from .candidate import Candidate
from .candidates import named
from .tiles import BsrTile

_MOST = 256  # names whose candidates are remembered
# by op, implementation, and whether kernels are compiled for a CPU; no cache: tracers warn of one
_NAMES = {
    (op, impl, native): tuple(named(op, impl, native))
    for op in ("bsr_linear fwd", "bsr_conv fwd")
    for impl, native in (("torch", False), ("triton", False), ("triton", True))
}


def name_of_choice(op: str, choice: BsrTile | str, impl: str, device: torch.device) -> str | None:
    """A caller's choice as a name.

    Args:
        op: ``"bsr_linear fwd"`` | ``"bsr_conv fwd"``.
        choice: any tile, or a candidate's name.
        impl: ``"triton"`` | ``"torch"``.

    Returns:
        ``None`` of a tile where no kernel of Triton computes: there it says nothing.

    Raises:
        ValueError: a name of no candidate.
    """
    if isinstance(choice, BsrTile):
        return choice.name if impl == "triton" else None
    known = _NAMES[op, impl, impl == "triton" and is_native(device)]
    if choice not in known:
        raise ValueError(f"tile must be a BsrTile or one of {', '.join(known)}; got {choice!r}")
    return choice


def choice_of_name(op: str, name: str, impl: str, device: torch.device) -> Candidate:
    """The candidate, or else the tile, of a name that :func:`name_of_choice` gave.

    Raises:
        ValueError: there is none, since another version of this package gave the name.
    """
    return _choice_of_name(op, name, impl, impl == "triton" and is_native(device))


@functools.lru_cache(_MOST)
def _choice_of_name(op: str, name: str, impl: str, native: bool) -> Candidate:
    known = named(op, impl, native).get(name)
    if known is None and impl == "triton":
        return Candidate(name, BsrTile.of_name(name))
    if known is None:
        names = ", ".join(_NAMES[op, impl, native])
        raise ValueError(f"tile must be one of {names}; got {name!r}")
    return known
