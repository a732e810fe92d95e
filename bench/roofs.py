"""Measured roofs: what a device reaches where nothing but memory, or arithmetic, is asked of it."""

from __future__ import annotations

import math
from typing import Any

import torch

from . import timed
from .rows import where
from .timed import Work

ROOF = "roof"  # the provider
COPY, MATMUL = "copy", "matmul"


def sizes(device: torch.device, quick: bool = False) -> dict[str, tuple[int, int, int]]:
    """(M, N, K) of what is measured: a copy of ``[N, K]``, far beyond a cache, and a product."""
    if quick:
        return {COPY: (1, 1024, 1024), MATMUL: (512, 512, 512)}
    if device.type == "cpu":
        return {COPY: (1, 8192, 8192), MATMUL: (2048, 2048, 2048)}
    return {COPY: (1, 16384, 32768), MATMUL: (8192, 8192, 8192)}


@torch.inference_mode()
def measure(
    op: str, size: tuple[int, int, int], dtype: torch.dtype, device: torch.device, seconds: float
) -> dict[str, Any]:
    """The fields of a row: the library's copy, or its dense product."""
    m, n, k = size
    torch.manual_seed(0)
    weight = torch.randn(n, k, device=device, dtype=dtype)
    if op == COPY:
        out = torch.empty_like(weight)
        call, work = (lambda: out.copy_(weight)), Work(math.nan, 2 * weight.nbytes)
    else:
        x = torch.randn(m, k, device=device, dtype=dtype)
        call, work = (lambda: x @ weight.T), timed.product(m, n, k, 1.0, weight.itemsize)
    taken = timed.take_turns({ROOF: call}, lambda *_: None, device, seconds, dense=(ROOF,))[ROOF]
    return {
        "op": op, "provider": ROOF, "pass_": "forward", "M": m, "N": n, "K": k,
        "dtype": str(dtype).removeprefix("torch."), "block": "-", "density": 1.0,
        "ratio": math.nan,
    } | taken.fields() | work.fields(taken.median) | where(device)  # fmt: skip
