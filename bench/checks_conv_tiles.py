"""Checks of the named ways to compute each pass of a block-sparse convolution."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from sgtriton_kernels import BlockSparse
from sgtriton_kernels._triton import is_native
from sgtriton_kernels.candidate import Candidate
from sgtriton_kernels.candidates import candidates, named
from sgtriton_kernels.conv_cell import CONV_OPS
from sgtriton_kernels.conv_choice import conv_cell_of
from sgtriton_kernels.conv_geometry import ConvGeometry

from sgtriton.conv_problem import ConvProblem
from sgtriton.problem import Problem

from .judge import DTYPES, Check, Place, SkippedError, WrongError, dtype_name, same_bits

_IMAGES, _SIZE, _LARGE = 2, (9, 11), (33, 47)


def bsr_conv_tile_checks(place: Place) -> Iterator[Check]:
    """Every candidate in bf16 with whole numbers, and repeats of what it computes."""
    native = place.impl == "triton" and is_native(place.device)
    for op in CONV_OPS:
        found = named(op, place.impl, native).values()
        for candidate in list(found)[: 2 if place.quick else None]:
            yield Check(
                op,
                candidate.name,
                dtype_name(DTYPES[0]),
                f"{_IMAGES} images",
                functools.partial(_run, place, op, candidate),
            )


def _run(place: Place, op: str, candidate: Candidate) -> None:
    tile, cell_side = candidate.tile, 64 if place.is_card else 16
    side = cell_side if tile is None else max(tile.BLOCK_N, tile.BLOCK_K, cell_side)
    geometry = ConvGeometry(2 * side, side + 16, (3, 3), before=(1, 1), after=(1, 1))
    matrix = _matrix(geometry, side, place.device)
    size = _LARGE if place.is_card else _SIZE  # enough pixels for several programs to share
    x = matrix.values.new_empty(_IMAGES, geometry.in_channels, *size)
    cell = conv_cell_of(
        op.split()[1], matrix, geometry, place.impl, x.contiguous(memory_format=torch.channels_last)
    )
    if candidate not in candidates(cell, copy_engine=True):
        raise SkippedError("it does not serve such a convolution")
    problem = ConvProblem(cell, matrix, torch.Generator(place.device).manual_seed(0))
    if reason := problem.wrong(candidate):
        raise WrongError(reason)
    if candidate.tile is not None or not place.is_card:  # a library may add up in any order
        _repeat(problem, candidate, place.repeats)


def _matrix(geometry: ConvGeometry, side: int, device: torch.device) -> BlockSparse:
    """A weight with a part of its blocks, of which only the pattern counts."""
    n, k = geometry.matrix_shape((side, side))
    is_open = torch.rand(n // side, k // side) < 0.6
    is_open[-1, -1] = True
    weight = torch.randn(n, k).to(device, DTYPES[0])
    return BlockSparse.from_dense(weight, (side, side), is_open.to(device))


def _repeat(problem: Problem, candidate: Candidate, times: int) -> None:
    first = problem.call(candidate)
    assert isinstance(first, torch.Tensor)
    for number in range(2, times + 1):
        again = problem.call(candidate)
        assert isinstance(again, torch.Tensor)
        if not same_bits(again, first):
            raise WrongError(f"run {number} gives other bits than the first")
