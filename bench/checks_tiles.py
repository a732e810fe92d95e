"""Checks of the named ways to compute each pass of ``bsr_linear``: what the tuner chooses among."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from sgtriton_kernels import bsr_linear, bsr_linear_ref
from sgtriton_kernels._triton import is_native
from sgtriton_kernels.bsr_library import library_serves
from sgtriton_kernels.bsr_linear_passes import linear_dvalues, linear_dx
from sgtriton_kernels.candidate import Candidate
from sgtriton_kernels.candidates import named
from sgtriton_kernels.tiles import BsrTile

from .checks_blocks import Pair, dense_linear, size_of, sparse, with_values
from .judge import DTYPES, Case, Check, Place, Results, SkippedError, dtype_name, judged, values

_PASSES = ("bsr_linear fwd", "bsr_linear dx", "bsr_linear dvalues")


def bsr_linear_tile_checks(place: Place) -> Iterator[Check]:
    """Every candidate in bf16, and in every dtype the least of each form."""
    native = place.impl == "triton" and is_native(place.device)
    for op in _PASSES:
        found = list(named(op, place.impl, native).values())
        least = _least_of_each_form(found)
        for candidate in found:
            if place.quick and candidate not in least:
                continue
            dtypes = DTYPES if candidate in least and not place.quick else DTYPES[:1]
            for dtype, (size, block) in itertools.product(dtypes, _sizes(candidate, place)):
                whole = size[0] == 1
                yield Check(
                    op,
                    candidate.name,
                    dtype_name(dtype),
                    "x".join(map(str, size)) + " whole" * whole,
                    functools.partial(_run, place, op, size, block, dtype, candidate),
                )


def _sizes(candidate: Candidate, place: Place) -> list[tuple[tuple[int, int, int], Pair]]:
    """Sizes with a block that a candidate fits: whole tiles and a bit, ragged, one row."""
    tile = candidate.tile
    if tile is None:
        block, rows = (32, 32), 40
    elif tile.form == "pairs":
        block, rows = (tile.BLOCK_N // 2, max(64, tile.BLOCK_K)), tile.BLOCK_M
    else:
        side = max(tile.BLOCK_N, tile.BLOCK_K, 64 if place.is_card else 16)
        block, rows = (side, side), tile.BLOCK_M
    sizes = [(2 * rows + 3, False), (rows + 1, True), (1, True)]
    return [(size_of(m, block, ragged), block) for m, ragged in sizes[: 2 if place.quick else None]]


def _least_of_each_form(found: list[Candidate]) -> list[Candidate]:
    """Of each form the candidate that takes the least shared memory; all that have no tile."""
    least: dict[object, Candidate] = {}
    for candidate in found:
        t = candidate.tile
        if t is None:
            least[candidate.name] = candidate
        else:
            key = t.form, t.split > 1, t.bulk
            least[key] = min(least.get(key, candidate), candidate, key=lambda c: _step(c.tile))
    return list(least.values())


def _step(t: BsrTile | None) -> int:
    """Elements of both operands that the pipeline holds."""
    return 0 if t is None else (t.BLOCK_N + t.BLOCK_M) * t.BLOCK_K * t.num_stages


def _run(place: Place, op: str, size, block: Pair, dtype, candidate: Candidate) -> None:
    """Judge a candidate where it can compute."""
    if candidate.name == "library" and not library_serves(size[1:], block, dtype):
        raise SkippedError("the library has no product of such blocks or dtypes")
    try:
        make = _forward if op == "bsr_linear fwd" else _backward
        judged(make, place, op, size, block, dtype, candidate)
    except Exception as error:
        if type(error).__name__ == "OutOfResources":  # Triton's, which may be missing
            raise SkippedError(f"not for this card: {error}") from error
        raise


def _forward(place: Place, op: str, size, block: Pair, dtype, candidate: Candidate) -> Case:
    (m, n, k), whole = size, size[0] == 1
    make = functools.partial(values, dtype=dtype, device=place.device, whole=whole)
    w, x = sparse(n, k, block, dtype, place.device, whole), make(m, k)
    bias, residual, activation = make(n), make(m, n), "relu" if whole else "gelu"
    x64, w64, bias64, residual64 = x.double(), w.to(torch.float64), bias.double(), residual.double()
    how = {"impl": place.impl, "tile": candidate.name}
    return Case(
        lambda: {"y": bsr_linear(x, w, bias, activation, residual=residual, **how)},
        lambda: {"y": bsr_linear_ref(x64, w64, bias64, activation, residual64)},
        lambda: {"y": dense_linear(x, w, bias, residual, activation)},
        (x, w.values, bias, residual),
    )


def _backward(place: Place, op: str, size, block: Pair, dtype, candidate: Candidate) -> Case:
    m, n, k = size
    make = functools.partial(values, dtype=dtype, device=place.device, whole=m == 1)
    w, x, dy = sparse(n, k, block, dtype, place.device, m == 1), make(m, k), make(m, n)
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "bsr_linear dx": lambda: linear_dx(dy, w.values, w, candidate),
        "bsr_linear dvalues": lambda: linear_dvalues(dy, x, w.values, w, candidate),
    }
    leaf = 0 if op == "bsr_linear dx" else 1

    def dense(x: torch.Tensor, stored: torch.Tensor, dy: torch.Tensor) -> Results:
        leaves = [t.clone().requires_grad_() for t in (x, stored)]
        y = F.linear(leaves[0], with_values(w, leaves[1]).to_dense())
        return {"grad": torch.autograd.grad(y, leaves, dy)[leaf]}

    return Case(
        lambda: {"grad": calls[op]()},
        lambda: dense(x.double(), w.values.double(), dy.double()),
        lambda: dense(x, w.values, dy),
        (x, w.values, dy),
    )
