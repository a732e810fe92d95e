"""The candidate of a call of ``bsr_linear``: looked up once for each size, or the caller's."""

from __future__ import annotations

import torch
from torch.utils.weak import WeakIdKeyDictionary

from . import pinned
from ._operands import is_aligned
from ._ops import is_capturing
from ._triton import dot_precision, is_native
from .bsr import BlockSparse
from .bsr_library import library_serves
from .candidate import Candidate
from .cell import Cell
from .choices import Choices
from .lookup import choose_and_keep, now
from .tiles import BsrTile

_longest = WeakIdKeyDictionary()  # crow -> its version, and the blocks of the longest block row


def choice_for(which: str, w: BlockSparse, impl: str, *rows: torch.Tensor) -> Candidate:
    """The candidate of a pass that multiplies ``rows``, one or two matrices of as many rows.

    Args:
        which: ``"fwd"`` | ``"dx"`` | ``"dvalues"``.
        w: of which shape, block and index count.
        impl: ``"triton"`` | ``"torch"``.
    """
    like = rows[0]
    # Calls by the library cost little: the choice lies where the next one meets it. One that was
    # made for another number of threads stays, which costs speed at worst.
    if impl == "torch":
        choices, key = w.index.choices, (which, like.shape[0], like.dtype)
    else:
        choices = w.__dict__.setdefault("_choices", Choices())
        key = which, like.shape[0], like.dtype, all(map(is_aligned, rows)), dot_precision()
    found = choices.of(now.generation).get(key)
    return found or choose_and_keep(choices, key, cell_of(which, w, impl, *rows), like.device)


def cell_of(which: str, w: BlockSparse, impl: str, *rows: torch.Tensor) -> Cell:
    """What is looked up for such a pass."""
    like, (n, k) = rows[0], w.shape
    by_torch = impl == "torch"
    is_tf32 = not by_torch and like.dtype == torch.float32 and like.device.type != "cpu"
    return Cell(
        f"bsr_linear {which}", impl, len(like), n, k, w.block, w.nnz, like.dtype,
        w.index.longest if by_torch else longest_row(w.crow),
        dot_precision() if is_tf32 else "ieee",
        by_torch or all(map(is_aligned, rows)),
        not by_torch and is_native(like.device),
    )  # fmt: skip


def longest_row(crow: torch.Tensor) -> int | None:
    """Blocks of the longest block row; waits for the device, once, and never in a capture."""
    kept = None if crow.is_inference() else _longest.get(crow)
    if kept is not None and kept[0] == crow._version:
        return kept[1]
    if is_capturing(crow.device):
        return None
    longest = int(crow.diff().max()) if crow.device.type != "meta" else 0
    if not crow.is_inference():
        _longest[crow] = crow._version, longest
    return longest


def name_of_choice(choice: BsrTile | str, w: BlockSparse, impl: str, x: torch.Tensor) -> str | None:
    """A caller's choice as a name; see :func:`.pinned.name_of_choice`.

    Raises:
        ValueError: a name of no candidate, or of one that cannot serve the product.
    """
    name = pinned.name_of_choice("bsr_linear fwd", choice, impl, x.device)
    if name == "library" and not library_serves(w.shape, w.block, x.dtype):
        raise ValueError(
            "tile 'library' takes square blocks that divide the weight, in fp32 or fp64, and a "
            f"PyTorch with MKL; got blocks of {w.block} in {w.shape}, {x.dtype}"
        )
    return name
