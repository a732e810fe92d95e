"""Options that several commands have: checked before anything is measured or written."""

from __future__ import annotations

import math
from pathlib import Path

import torch


def device_of(text: str) -> torch.device:
    """The device that ``--device`` names.

    Raises:
        ValueError: neither a CPU nor the GPU that PyTorch sees first.
    """
    if text not in ("cpu", "cuda"):
        raise ValueError(
            f"--device must be cpu or cuda, got {text!r}; of several GPUs CUDA_VISIBLE_DEVICES "
            "chooses one"
        )
    if text == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a GPU, PyTorch sees none here")
    return torch.device(text)


def check_count(option: str, value: int) -> None:
    """Raise ``ValueError`` unless an option's value is 1 or more."""
    if value < 1:
        raise ValueError(f"{option} must be at least 1, got {value}")


def check_minutes(minutes: float) -> None:
    """Raise ``ValueError`` unless ``--minutes`` is a time that ends."""
    if not 0 < minutes < math.inf:
        raise ValueError(f"--minutes must be positive and finite, got {minutes:g}")


def check_file(option: str, path: Path) -> None:
    """Raise ``ValueError`` unless a file can lie there."""
    if path.is_dir():
        raise ValueError(f"{option} must be a file, {path} is a folder")
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir():
        raise ValueError(f"{option} must lie in a folder, {parent} is a file")
