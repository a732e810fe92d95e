"""A product with inputs, on which candidates are tried, and what is right of it."""

from __future__ import annotations

import contextlib
import functools
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from sgtriton_kernels._scratch import fill_scratch
from sgtriton_kernels.candidate import Candidate
from sgtriton_kernels.cell import Cell

from .cold import wait_for

_EXACT = 900  # products in a sum of whole numbers, so that each dtype holds it exactly
_CHECKS = 2  # inputs that a candidate must multiply rightly


class Problem:
    """A product with inputs; each op has a class of its own.

    Args:
        cell: the product.
        device: where it is computed.
        generator: of the inputs, on the device.
    """

    def __init__(self, cell: Cell, device: torch.device, generator: torch.Generator):
        self.cell, self.device, self._generator = cell, device, generator

    def inputs(self) -> tuple[Any, ...]:
        """Random ones, to be timed with."""
        raise NotImplementedError

    def whole_inputs(self) -> tuple[Any, ...]:
        """Whole numbers, few enough that no dtype rounds a sum; :meth:`signs` makes them."""
        raise NotImplementedError

    def compute(
        self, candidate: Candidate, *inputs: Any
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """The product of some inputs, as a candidate computes it."""
        raise NotImplementedError

    def expected(self, *inputs: Any) -> tuple[tuple[torch.Tensor, torch.dtype], ...]:
        """What :meth:`compute` must give: in fp64, by plain dense products; and in which dtypes."""
        raise NotImplementedError

    def check_work(self) -> tuple[float, float]:
        """Multiply-adds of :meth:`expected`, and of what a candidate computes."""
        raise NotImplementedError

    def check_rate(self) -> float:
        """Multiply-adds a second of :meth:`expected`, about."""
        return _fp64_rate(self.device)

    def prepare(self) -> None:
        """Make the inputs and what must come of them: what fails here is no candidate's fault."""
        _ = self._checks, self._inputs

    def call(self, candidate: Candidate) -> object:
        """Compute the product, to be timed."""
        return self.compute(candidate, *self._inputs)

    def least_seconds(self, count: int) -> float:
        """About what a search among ``count`` candidates takes at least.

        The products that results are compared with, and those of each candidate.
        """
        dense, each = self.check_work()
        return _CHECKS * (dense / self.check_rate() + count * each / _fp64_rate(self.device))

    def wrong(self, candidate: Candidate) -> str | None:
        """Why a candidate's results are wrong, or ``None``.

        Whole numbers are multiplied, few enough that no dtype rounds a sum: what is not equal is
        wrong. Memory that a call takes is full of NaN, so that what it leaves out shows.
        """
        for inputs, expected in self._checks:
            with nan_filled():
                found = self.compute(candidate, *inputs)
            wait_for(self.device)
            outs = (found,) if isinstance(found, torch.Tensor) else found
            for out, (right, dtype) in zip(outs, expected, strict=True):
                if out.shape != right.shape or out.dtype != dtype:
                    return f"gives {out.dtype} {list(out.shape)} for {dtype} {list(right.shape)}"
                differ = int((out.double() != right).sum())  # NaN differs from everything
                if differ:
                    return f"wrong in {differ} of {out.numel()} elements"
        return None

    @functools.cached_property
    def _inputs(self) -> tuple[Any, ...]:
        return self.inputs()

    @functools.cached_property
    def _checks(self) -> list[tuple[tuple[Any, ...], tuple[tuple[torch.Tensor, torch.dtype], ...]]]:
        """Inputs of whole numbers, and what comes out."""
        several = [self.whole_inputs() for _ in range(_CHECKS)]
        return [(inputs, self.expected(*inputs)) for inputs in several]

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Normally distributed numbers."""
        t = torch.randn(shape, device=self.device, generator=self._generator)
        return t.to(dtype or self.cell.dtype)

    def signs(self, *shape: int, terms: int = 0, dtype: torch.dtype | None = None) -> torch.Tensor:
        """-1 and 1, and zeros between them, so many that sums of ``terms`` stay exact."""
        share = min(1.0, _EXACT / max(terms, 1))
        u = torch.rand(shape, device=self.device, generator=self._generator)
        t = torch.where(u < share / 2, -1.0, 0.0) + (u > 1 - share / 2)
        return t.to(dtype or self.cell.dtype)


@functools.cache
def _fp64_rate(device: torch.device) -> float:
    """Multiply-adds a second of a product in fp64, about."""
    x, w = (torch.ones(n, 1024, dtype=torch.float64, device=device) for n in (64, 1024))
    return x.numel() * len(w) / least_time(device, lambda: torch.matmul(x, w))


def least_time(device: torch.device, call: Callable[[], object]) -> float:
    """Seconds of a call, the least of a few."""
    seconds = []
    for _ in range(3):
        wait_for(device)
        begin = time.perf_counter()
        call()
        wait_for(device)
        seconds.append(time.perf_counter() - begin)
    return max(min(seconds), 1e-9)


@contextlib.contextmanager
def nan_filled() -> Iterator[None]:
    """Memory that is allocated, and what calls keep of it, is full of NaN."""
    fill_scratch(float("nan"))
    before = torch.get_deterministic_debug_mode()
    fills = torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore
    # use_deterministic_algorithms would do as well, but first imports a compiler, for seconds
    torch.set_deterministic_debug_mode("warn")
    torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of ops that are not deterministic
            yield
    finally:
        torch.set_deterministic_debug_mode(before)
        torch.utils.deterministic.fill_uninitialized_memory = fills  # pyright: ignore
