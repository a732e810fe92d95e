"""The only import of Triton; where it is missing, a stub whose kernels raise at launch.

What runs a kernel is asked here too: Triton's interpreter, its CPU compiler, or a card.
"""

from __future__ import annotations

import contextlib
import functools
import os
from typing import Any, Literal

import torch

__all__ = [
    "INTERPRETED", "device_of", "dot_precision", "is_native", "launch_options", "tl", "triton",
    "version", "why_not_triton",
]  # fmt: skip

try:
    import triton
    import triton.language as tl

    _MISSING: str | None = None
except Exception as error:  # a broken driver or library must not break the import either
    _MISSING = f"Triton cannot be imported ({type(error).__name__}: {error})"

    class _Unlaunchable:
        """Stands for a kernel; says at launch why there is none."""

        def __init__(self, fn: Any):
            functools.update_wrapper(self, fn)

        def __getitem__(self, grid: Any):
            raise RuntimeError(f"cannot launch {self.__name__}: {_MISSING}")  # pyright: ignore

    class _TritonStub:
        @staticmethod
        def jit(fn: Any = None, **_: Any):
            return _Unlaunchable if fn is None else _Unlaunchable(fn)

        @staticmethod
        def cdiv(a: int, b: int) -> int:
            return -(-a // b)

        @staticmethod
        def next_power_of_2(n: int) -> int:
            return 1 << max(n - 1, 0).bit_length()

    class _LanguageStub:
        constexpr = int

    triton: Any = _TritonStub()
    tl: Any = _LanguageStub()

# The interpreter replaces `jit` when a kernel is decorated, so what counts is the value at import.
INTERPRETED = _MISSING is None and os.environ.get("TRITON_INTERPRET", "0").lower() in (
    "1", "true", "on", "y", "yes",
)  # fmt: skip


@functools.cache
def version() -> str:
    """Triton's major and minor version; ``"none"`` without it."""
    return "none" if _MISSING else ".".join(triton.__version__.split(".")[:2])  # pyright: ignore


@functools.cache
def _compiles_for_cpu() -> bool:
    """Whether Triton's active driver is its CPU back end."""
    try:
        return triton.runtime.driver.active.get_current_target().backend == "cpu"
    except Exception:  # no driver at all
        return False


def is_native(device: torch.device) -> bool:
    """Whether kernels on ``device`` are compiled to CPU code, whose compiler unrolls a tile."""
    return device.type == "cpu" and not INTERPRETED


def launch_options(
    device: torch.device, num_stages: int, num_warps: int, max_registers: int | None = None
) -> dict[str, int]:
    """What a launch on ``device`` says to the compiler beside the kernel's arguments."""
    options = {"num_stages": num_stages, "num_warps": num_warps}
    # meta: a launch that is recorded to be compiled for cards
    if max_registers is not None and device.type in ("cuda", "meta") and not torch.version.hip:
        options["maxnreg"] = max_registers
    return options


def dot_precision(op: Literal["matmul", "conv"] = "matmul") -> str:
    """Precision of fp32 products, as PyTorch's own switch for such ops says.

    ``allow_tf32`` sets the switch too, and one that is not set follows the switches above it.
    """
    backends = torch.backends
    switch = backends.cudnn.conv if op == "conv" else backends.cuda.matmul  # pyright: ignore
    tf32 = switch.fp32_precision == "tf32" and torch.version.hip is None
    return "tf32" if tf32 else "ieee"


def device_of(t: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launch kernels on ``t`` inside this: Triton takes the current device, not the tensor's."""
    if t.device.type == "cuda":
        return torch.cuda.device(t.device)
    if t.device.type == "xpu":
        return torch.xpu.device(t.device)
    return contextlib.nullcontext()


def why_not_triton(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on tensors of ``device``; ``None`` where they can."""
    if _MISSING is not None:
        return _MISSING
    if device.type in ("cuda", "xpu"):
        return None  # interpreted kernels copy their arguments to the CPU and back
    if device.type == "cpu":
        if INTERPRETED or _compiles_for_cpu():
            return None
        return "CPU tensors need TRITON_INTERPRET=1 (set before import) or Triton's CPU compiler"
    if device.type == "meta":
        return None
    return f"no Triton kernels for device type {device.type!r}"
