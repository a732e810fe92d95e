"""What products with a block-sparse weight check of their inputs."""

from __future__ import annotations

import functools

import torch

from .blocks import fits_kernels

_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_DTYPES = (*_TRITON_DTYPES, torch.float64)


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


@functools.cache
def why_no_kernel(dtype: torch.dtype, block: tuple[int, int]) -> str | None:
    """Why the Triton kernels cannot serve such a product; ``None`` where they can."""
    if dtype not in _TRITON_DTYPES:
        return f"it serves {_TRITON_DTYPES}, not {dtype}"
    if not fits_kernels(block):
        return f"it serves block sides that are powers of two >= 16, not {block}"
    return None
