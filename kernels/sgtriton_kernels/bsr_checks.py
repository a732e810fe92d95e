"""What products with a block-sparse weight check of their inputs."""

from __future__ import annotations

import torch

from .blocks import fits_kernels
from .bsr import BlockSparse

_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_DTYPES = (*_TRITON_DTYPES, torch.float64)


def check_kinds(x: torch.Tensor, w: BlockSparse) -> None:
    """Raise ``ValueError`` unless the operands are what products take."""
    if not isinstance(w, BlockSparse):
        raise ValueError(
            f"w must be a BlockSparse, which BlockSparse.from_dense makes, got {_kind(w)}"
        )
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"x must be a tensor, got {_kind(x)}")


def _kind(given: object) -> str:
    layout = f" of layout {given.layout}" if isinstance(given, torch.Tensor) else ""
    return type(given).__name__ + layout


def check_dtype(x: torch.Tensor) -> None:
    """Raise ``ValueError`` unless products take the dtype of ``x``."""
    if x.dtype not in _DTYPES:
        raise ValueError(f"x must be one of {_DTYPES}, got {x.dtype}")


def check_agrees(name: str, t: torch.Tensor, x: torch.Tensor) -> None:
    """Raise ``ValueError`` unless ``t``, called ``name``, has the dtype and device of ``x``."""
    if t.dtype != x.dtype:
        raise ValueError(f"x and {name} must have one dtype, got x {x.dtype}, {name} {t.dtype}")
    if t.device != x.device:
        raise ValueError(f"x and {name} must be on one device, got x {x.device}, {name} {t.device}")


def why_no_kernel(dtype: torch.dtype, block: tuple[int, int]) -> str | None:
    """Why the Triton kernels cannot serve such a product; ``None`` where they can."""
    if dtype not in _TRITON_DTYPES:
        return f"it serves {_TRITON_DTYPES}, not {dtype}"
    if not fits_kernels(block):
        return f"it serves block sides that are powers of two >= 16, not {block}"
    return None
