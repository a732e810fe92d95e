"""A note on layers that ``sparsify`` looked at and left dense: of which block none was zero."""

from __future__ import annotations

from sgtriton_kernels.blocks import Block
from torch import nn

_NOTE = "_sgtriton_left_dense"


def mark_left_dense(layer: nn.Module, block: Block) -> None:
    """Note on a layer that it has no zero block of that size."""
    setattr(layer, _NOTE, block)


def forget_left_dense(layer: nn.Module) -> None:
    """Take that note off again."""
    vars(layer).pop(_NOTE, None)


def left_dense_of(layer: nn.Module) -> Block | None:
    """The block of the note on a layer; ``None`` without one."""
    return vars(layer).get(_NOTE)
