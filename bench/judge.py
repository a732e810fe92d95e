"""Whether an op's results are right: beside fp64 and PyTorch, complete, and the same every time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sgtriton_kernels._triton import INTERPRETED

from sgtriton.problem import nan_filled

DTYPES = (torch.bfloat16, torch.float32, torch.float16)

Results = dict[str, torch.Tensor]


class WrongError(Exception):
    """A result that is not what it should be; says which and how far off."""


class SkippedError(Exception):
    """A check that cannot run here; says why."""


@dataclass(frozen=True)
class Case:
    """A call on inputs of its own, and what it should give.

    Args:
        run: the call; results by name.
        wanted: the same results in fp64. One that ``plain`` lacks must be equal in every bit.
        plain: what PyTorch gives in the dtypes of the call.
        inputs: tensors that the call must leave as they are.
    """

    run: Callable[[], Results]
    wanted: Callable[[], Results]
    plain: Callable[[], Results]
    inputs: tuple[torch.Tensor, ...] = ()


@dataclass(frozen=True)
class Check:
    """A named check of an op.

    Args:
        op: its name.
        variant: kind, block, method, form, tile.
        dtype: of what is multiplied.
        shape: in words.
        run: looks; raises what :func:`judge` raises.
    """

    op: str
    variant: str
    dtype: str
    shape: str
    run: Callable[[], None]

    @property
    def name(self) -> str:
        """All that tells it from other checks."""
        return f"{self.op}, {self.variant}, {self.dtype}, {self.shape}"


@dataclass(frozen=True)
class Place:
    """Where checks run, and how many of them.

    Args:
        device: of the tensors.
        impl: ``"triton"`` | ``"torch"``.
        quick: few checks, small and seldom repeated.
    """

    device: torch.device
    impl: str
    quick: bool = False

    @property
    def is_card(self) -> bool:
        """Whether sizes may be a card's."""
        return self.device.type != "cpu"

    @property
    def repeats(self) -> int:
        """Runs that must give the same bits; the interpreter has no other order to run in."""
        return 2 if self.quick or (INTERPRETED and self.impl == "triton") else 10


def values(*shape: int, dtype: torch.dtype, device: torch.device, whole: bool) -> torch.Tensor:
    """Small whole numbers or normal ones, the same on every device."""
    made = torch.randint(-1, 2, shape) if whole else torch.randn(shape)
    return made.to(device, dtype)


def with_grads(
    y: torch.Tensor, names: Sequence[str], leaves: Sequence[torch.Tensor], dy: torch.Tensor
) -> Results:
    """``y`` and the gradients of ``leaves``, as results of these names."""
    grads = torch.autograd.grad(y, leaves, dy)
    return {"y": y.detach(), **dict(zip(names, grads, strict=True))}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def judged(make: Callable[..., Case], place: Place, *arguments: Any) -> None:
    """Judge the case that ``make(place, *arguments)`` makes."""
    judge(make(place, *arguments), place.repeats)


def judge(case: Case, repeats: int) -> None:
    """Run a case over memory that holds NaN, compare, and run it again: the bits must be the same.

    A first run has every new tensor filled with NaN by PyTorch, under its deterministic mode. That
    mode may choose other ways to compute, so the runs that are compared with each other go without;
    before each, memory of the results' sizes is filled and given back to the allocator.

    Raises:
        WrongError: a result of another shape or dtype, or not within twice PyTorch's own error in
            the same dtype; results of one input that differ in a bit; an input that was changed.
    """
    before = [t.detach().clone() for t in case.inputs]
    wanted, plain = case.wanted(), case.plain()
    with nan_filled():
        outs = case.run()
    _compare(outs, wanted, plain)
    first: Results | None = None
    for number in range(repeats):
        for out in outs.values():
            _leave_nan(out)
        again = case.run()
        if first is None:
            first = again
            _compare(first, wanted, plain)
        for name, out in again.items():
            if not same_bits(out, first[name]):
                raise WrongError(f"{name}: run {number + 1} gives other bits than the first")
    for i, (now, then) in enumerate(zip(case.inputs, before, strict=True)):
        if not same_bits(now, then):
            raise WrongError(f"input {i} was changed")


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal in every bit; NaN is equal to itself, 0 not to -0."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    a, b = (t.detach().contiguous().view(-1) for t in (a, b))
    return a.numel() == 0 or torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _compare(outs: Results, wanted: Results, plain: Results) -> None:
    if outs.keys() != wanted.keys():
        raise WrongError(f"results {', '.join(outs)} instead of {', '.join(wanted)}")
    for name, out in outs.items():
        if problem := difference(out, wanted[name], plain.get(name)):
            raise WrongError(f"{name}: {problem}")


def difference(out: torch.Tensor, wanted: torch.Tensor, plain: torch.Tensor | None) -> str | None:
    """How a result breaks the rule, in words; ``None`` where it keeps it.

    ``max|out - wanted| <= 2 max|plain - wanted| + u max|wanted|``; the rounding unit ``u`` covers a
    result of PyTorch's that is exact by luck. Sums of small whole numbers are exact in every dtype,
    so that for them the rule asks for equal numbers.

    Args:
        wanted: in fp64; in the dtype of ``out`` where ``plain`` is ``None``.
        plain: of the dtype that ``out`` must have, or ``None``: ``out`` must equal ``wanted``.
    """
    dtype = wanted.dtype if plain is None else plain.dtype
    if out.shape != wanted.shape:
        return f"shape {list(out.shape)} instead of {list(wanted.shape)}"
    if out.dtype != dtype:
        return f"{out.dtype} instead of {dtype}"
    if out.numel() == 0:
        return None
    if plain is None:
        wrong = int((out != wanted).sum())
        return f"{wrong} of {out.numel()} elements differ" if wrong else None
    out, plain = out.detach(), plain.detach()
    missing = int((~torch.isfinite(out)).sum())
    if missing:
        return f"{missing} of {out.numel()} elements are not finite"
    error = (out.double() - wanted).abs().max().item()
    torch_error = (plain.double() - wanted).abs().max().item()
    unit = torch.finfo(out.dtype).eps / 2
    bound = 2 * torch_error + unit * wanted.abs().max().item()
    if error <= bound:
        return None
    return f"error {error:.3e}, allowed {bound:.3e} (PyTorch's own {torch_error:.3e})"


def _leave_nan(like: torch.Tensor) -> None:
    """Fill as much memory as a tensor takes and give it back: the next of its size lies there."""
    value = float("nan") if like.is_floating_point() else 1
    torch.full_like(like, value, requires_grad=False)
