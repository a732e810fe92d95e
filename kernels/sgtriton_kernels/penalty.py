"""Penalty on gates, its gradient and the gates' statistics, over any number of gate tensors.

    penalty = bimodal * sum c g (1 - g) + l1 * sum c g        threshold, bernoulli
              l1 * sum c p                                    hard_concrete
    dgate   = c (bimodal (1 - 2 g) + l1) dpenalty             threshold, bernoulli
              c l1 p (1 - p) dpenalty                         hard_concrete

with ``c`` the number of weights that a gate covers, ``g = clip(gate, 0, 1)`` and ``p`` the chance
that a hard concrete gate is not 0 (``kinds``), of the clipped ``log_alpha``. Per gate in fp32, the
sums in fp64. The bi-modal term pushes each gate to 0 or 1, the other closes gates (Srinivas,
Subramanya, Babu, arXiv:1611.06694; Louizos, Welling, Kingma, arXiv:1712.01312). The gradient is the
straight-through one: it does not vanish where a gate lies at its bounds or beyond them. Nothing is
written to a gate or to its ``.grad``, and nothing waits for the device.

Forward is one launch for all tensors, whose addresses it reads from a table. Each program adds up
one piece of one tensor; the last to finish adds up the programs in the order of their numbers, so
that a result is repeatable bit for bit. Forward makes the gradient too, which backward scales and
splits into views.

Bytes moved per gate at the least: forward gate 4 + coverage 4, gradient 4, bits 1/8 and, for the
flips, 1/8; backward 4 + 4. The kernel moves just these, beside 2 x 48 bytes per program: there
are about 2,000 at most, and one per tensor. About 20 operations per gate, half of them in fp64
(conversions, products, five sums), and one exponential for hard concrete gates.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.utils.flop_counter import register_flop_formula

from ._impl import resolve_impl
from ._ops import add_op_namespace_prefix, ops
from ._triton import INTERPRETED, device_of, is_native, tl, triton
from .bitmap import pack_bitmap
from .kinds import (
    CHANCE_SHIFT,
    LOG_ALPHA_LIMIT,
    OPEN_LOG_ALPHA,
    check_gate_kind,
    gate_bounds,
    open_chance,
    open_gates,
)


class GatePenalties(NamedTuple):
    """What :func:`gate_penalties` returns; all on the gates' device.

    Attributes:
        penalty: ``[]`` fp32. Differentiable in the gates, once.
        density: ``[]`` fp64. Share of covered weights whose gate is open in eval.
        mean: ``[]`` fp64. Mean gate, of ``hard_concrete`` mean chance that the gate is not 0,
            weighted by coverage.
        undecided: ``[]`` fp64. Share of gates (chances) in (0.1, 0.9), weighted by coverage. NaN
            gates show in ``mean``.
        flips: ``[]`` int64. Gates that are open here and not in ``previous``, or the other way
            round; -1 without it.
        mask: ``[sum of ceil(n / 8)]`` uint8. Open gates, one bit each, lowest bit first; the ``n``
            gates of each tensor start at a new byte. To hand over as ``previous``.
    """

    penalty: torch.Tensor
    density: torch.Tensor
    mean: torch.Tensor
    undecided: torch.Tensor
    flips: torch.Tensor
    mask: torch.Tensor


def gate_penalties(
    gates: Sequence[torch.Tensor],
    coverages: torch.Tensor,
    lambdas: torch.Tensor,
    previous: torch.Tensor | None = None,
    *,
    kinds: str | Sequence[str] = "threshold",
    hold_closed: bool | Sequence[bool] = False,
    impl: str | None = None,
) -> GatePenalties:
    """Penalise gates and count them, in one op over all layers.

    Args:
        gates: tensors of any shapes and strides, fp32, one device.
        coverages: ``[gates in all]`` fp32. Weights that each gate covers, the tensors flattened
            one after the other.
        lambdas: ``[2]`` fp32. ``(bimodal, l1)``, on the gates' device; a tensor, so that a new
            value neither recompiles nor synchronises.
        previous: the last call's ``mask``, for ``flips``.
        kinds: kind of all the gates, or of each tensor: ``"threshold"`` | ``"bernoulli"`` |
            ``"hard_concrete"``.
        hold_closed: for all tensors or for each: gates that are closed in eval get no gradient
            from the penalty. Value and statistics stay the same.
        impl: ``"triton"`` | ``"torch"``; chosen by the device if ``None``.

    Raises:
        ValueError: no gates, an unknown kind, or sizes, dtypes or devices that do not fit.
    """
    gates = list(gates)
    if not gates:
        raise ValueError("gates must hold at least one tensor, got none")
    if any(g.dtype != torch.float32 for g in gates):
        raise ValueError(
            f"gates must be torch.float32, got {sorted({str(g.dtype) for g in gates})}"
        )
    kinds, holds = _per_tensor(gates, kinds, hold_closed)
    count, size = sum(g.numel() for g in gates), mask_size(gates)
    if coverages.shape != (count,) or coverages.dtype != torch.float32:
        raise ValueError(
            f"coverages must have shape ({count},) and be torch.float32, got "
            f"{tuple(coverages.shape)} {coverages.dtype}"
        )
    if lambdas.shape != (2,) or lambdas.dtype != torch.float32:
        raise ValueError(f"lambdas must be [2] fp32, got {tuple(lambdas.shape)} {lambdas.dtype}")
    if previous is not None and (previous.shape != (size,) or previous.dtype != torch.uint8):
        raise ValueError(
            f"previous must be [{size}] torch.uint8, got {tuple(previous.shape)} {previous.dtype}"
        )
    tensors = [coverages, lambdas, *gates, *([] if previous is None else [previous])]
    if len({t.device for t in tensors}) > 1:
        raise ValueError(f"one device is allowed, got {sorted({str(t.device) for t in tensors})}")
    device = coverages.device
    unsupported = (
        "the interpreter cannot follow the addresses of another device's memory"
        if INTERPRETED and device.type != "cpu"
        else None
    )
    impl = resolve_impl(impl, device, "gate_penalties", unsupported)
    need_grad = torch.is_grad_enabled() and any(g.requires_grad for g in gates)
    hard = [kind == "hard_concrete" for kind in kinds]
    *out, _ = _gate_penalties_op(gates, coverages, lambdas, previous, hard, holds, need_grad, impl)
    return GatePenalties(*out)


def mask_size(gates: Sequence[torch.Tensor]) -> int:
    """Bytes of :attr:`GatePenalties.mask` for these tensors."""
    return sum((g.numel() + 7) // 8 for g in gates)


def gate_penalties_ref(
    gates: Sequence[torch.Tensor],
    coverages: torch.Tensor,
    bimodal: float,
    l1: float,
    previous: torch.Tensor | None = None,
    *,
    kinds: str | Sequence[str] = "threshold",
    hold_closed: bool | Sequence[bool] = False,
) -> GatePenalties:
    """What :func:`gate_penalties` computes, gate by gate in fp64."""
    total, mean, spread, opened, undecided = torch.zeros(5, dtype=torch.float64).unbind()
    covers, data, flips = iter(coverages.double().cpu()), [], 0
    for gate, kind, hold in zip(gates, *_per_tensor(gates, kinds, hold_closed), strict=True):
        bits = [0] * ((gate.numel() + 7) // 8)
        for i, (g, c) in enumerate(zip(gate.reshape(-1).double().cpu(), covers, strict=False)):
            is_open = bool(open_gates(g, kind))
            if hold and not is_open:
                g = g.detach()
            g = g + (g.clamp(*gate_bounds(kind)) - g).detach()  # straight through the clip
            if kind == "hard_concrete":
                g = torch.sigmoid(g - CHANCE_SHIFT)
            else:
                spread = spread + c * g * (1 - g)
            total, mean = total + c, mean + c * g
            opened = opened + c * is_open
            undecided = undecided + c * (0.1 < g < 0.9)
            bits[i // 8] |= is_open << i % 8
        data += bits
    if previous is not None:
        flips = sum((a ^ b).bit_count() for a, b in zip(data, previous.tolist(), strict=True))
    return GatePenalties(
        bimodal * spread + l1 * mean,
        opened / total,
        mean.detach() / total,
        undecided / total,
        torch.tensor(-1 if previous is None else flips),
        torch.tensor(data, dtype=torch.uint8),
    )


_FIELDS = tl.constexpr(7)  # of each tensor in the table
_LIMIT = tl.constexpr(LOG_ALPHA_LIMIT)
_OPEN = tl.constexpr(OPEN_LOG_ALPHA)
_SHIFT = tl.constexpr(CHANCE_SHIFT)


@triton.jit(do_not_specialize=["tensors", "programs", "chunk"])
def _gate_penalties_fwd_kernel(
    table_ptr,  # [1 + tensors * _FIELDS] int64: a counter at 0, which is 0 again at the end
    coverages_ptr, lambdas_ptr, previous_ptr,  # [gates], [2], [bytes] in
    sums_ptr,  # [6, programs] fp64, scratch
    penalty_ptr, density_ptr, mean_ptr, undecided_ptr, flips_ptr,  # [] out
    mask_ptr, dgates_ptr,  # [bytes], [gates] out
    tensors, programs, chunk,  # gates a program, a multiple of BLOCK
    HAS_PREVIOUS: tl.constexpr, NEED_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    # the last tensor that starts no later than this program
    low = pid * 0
    high = pid * 0 + tensors - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(table_ptr + 1 + middle * _FIELDS) <= pid:
            low = middle
        else:
            high = middle - 1
    row_ptr = table_ptr + 1 + low * _FIELDS
    first_program = tl.load(row_ptr)
    gate_ptr = tl.load(row_ptr + 1).to(tl.pointer_type(tl.float32))
    numel = tl.load(row_ptr + 2)
    first_gate = tl.load(row_ptr + 3)
    first_byte = tl.load(row_ptr + 4)
    hard = tl.load(row_ptr + 5) != 0
    hold = tl.load(row_ptr + 6) != 0
    bimodal = tl.where(hard, 0.0, tl.load(lambdas_ptr))
    l1 = tl.load(lambdas_ptr + 1)

    start = (pid - first_program) * chunk
    rows = tl.arange(0, BLOCK // 8)  # a byte of bits each
    lanes = tl.arange(0, 8)
    total = tl.zeros((BLOCK // 8, 8), tl.float64)
    mean = tl.zeros((BLOCK // 8, 8), tl.float64)
    spread = tl.zeros((BLOCK // 8, 8), tl.float64)
    opened = tl.zeros((BLOCK // 8, 8), tl.float64)
    undecided = tl.zeros((BLOCK // 8, 8), tl.float64)
    flips = tl.zeros((BLOCK // 8,), tl.int32)
    for first in range(start, tl.minimum(start + chunk, numel), BLOCK):
        offs = first + rows[:, None] * 8 + lanes[None, :]
        mask = offs < numel
        gate = tl.load(gate_ptr + offs, mask=mask, other=0.0)
        c = tl.load(coverages_ptr + first_gate + offs, mask=mask, other=0.0)
        g, slope, is_open = _read_gate(gate, hard)
        is_open = is_open & mask
        c64 = c.to(tl.float64)
        cg = c64 * g.to(tl.float64)
        total += c64
        mean += cg
        spread += cg * (1 - g).to(tl.float64)
        opened += tl.where(is_open, c64, 0.0)
        undecided += tl.where((g > 0.1) & (g < 0.9), c64, 0.0)
        bits = tl.sum(is_open.to(tl.int32) << lanes[None, :], 1)
        offs_byte = first // 8 + rows
        mask_byte = offs_byte * 8 < numel
        tl.store(mask_ptr + first_byte + offs_byte, bits.to(tl.uint8), mask=mask_byte)
        if HAS_PREVIOUS:
            before = tl.load(previous_ptr + first_byte + offs_byte, mask=mask_byte, other=0)
            flips += _count_bits(bits ^ before.to(tl.int32))
        if NEED_GRAD:
            dgate = c * (bimodal * (1 - 2 * g) + l1 * slope)
            dgate = tl.where(hold & (is_open == 0), 0.0, dgate)
            tl.store(dgates_ptr + first_gate + offs, dgate, mask=mask)

    tl.store(sums_ptr + pid, tl.sum(tl.sum(total, 1), 0))
    tl.store(sums_ptr + programs + pid, tl.sum(tl.sum(mean, 1), 0))
    tl.store(sums_ptr + 2 * programs + pid, tl.where(hard, 0.0, tl.sum(tl.sum(spread, 1), 0)))
    tl.store(sums_ptr + 3 * programs + pid, tl.sum(tl.sum(opened, 1), 0))
    tl.store(sums_ptr + 4 * programs + pid, tl.sum(tl.sum(undecided, 1), 0))
    tl.store(sums_ptr + 5 * programs + pid, tl.sum(flips, 0).to(tl.float64))
    tl.debug_barrier()  # the whole program's stores come before its count
    done = tl.atomic_add(table_ptr, 1, sem="acq_rel")
    if done == programs - 1:
        tl.debug_barrier()  # and the whole program reads after it
        _add_up(
            lambdas_ptr, sums_ptr,
            penalty_ptr, density_ptr, mean_ptr, undecided_ptr, flips_ptr,
            programs, HAS_PREVIOUS, BLOCK,
        )  # fmt: skip
        tl.store(table_ptr, 0)


@triton.jit
def _add_up(
    lambdas_ptr, sums_ptr,
    penalty_ptr, density_ptr, mean_ptr, undecided_ptr, flips_ptr,
    programs,
    HAS_PREVIOUS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # the sums of all programs, in the order of their numbers
    total = tl.zeros((BLOCK,), tl.float64)
    mean = tl.zeros((BLOCK,), tl.float64)
    spread = tl.zeros((BLOCK,), tl.float64)
    opened = tl.zeros((BLOCK,), tl.float64)
    undecided = tl.zeros((BLOCK,), tl.float64)
    flips = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, programs, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        mask = offs < programs
        sum_ptr = sums_ptr + offs
        total += tl.load(sum_ptr, mask=mask, other=0.0)
        mean += tl.load(sum_ptr + programs, mask=mask, other=0.0)
        spread += tl.load(sum_ptr + 2 * programs, mask=mask, other=0.0)
        opened += tl.load(sum_ptr + 3 * programs, mask=mask, other=0.0)
        undecided += tl.load(sum_ptr + 4 * programs, mask=mask, other=0.0)
        flips += tl.load(sum_ptr + 5 * programs, mask=mask, other=0.0)
    bimodal = tl.load(lambdas_ptr).to(tl.float64)
    l1 = tl.load(lambdas_ptr + 1).to(tl.float64)
    cover = tl.sum(total, 0)
    tl.store(penalty_ptr, tl.sum(bimodal * spread + l1 * mean, 0).to(tl.float32))
    tl.store(density_ptr, tl.sum(opened, 0) / cover)  # pyright: ignore
    tl.store(mean_ptr, tl.sum(mean, 0) / cover)  # pyright: ignore
    tl.store(undecided_ptr, tl.sum(undecided, 0) / cover)  # pyright: ignore
    if HAS_PREVIOUS:
        tl.store(flips_ptr, tl.sum(flips, 0).to(tl.int64))
    else:
        tl.store(flips_ptr, -1)


@triton.jit
def _read_gate(gate, hard):
    # the value that is penalised, its slope in the gate, and whether the gate is open in eval
    bound = tl.where(hard, _LIMIT, 1.0)
    g = tl.where(gate > bound, bound, gate)  # comparisons: NaN stays
    bound = tl.where(hard, -_LIMIT, 0.0)
    g = tl.where(g < bound, bound, g)
    slope = tl.zeros_like(g) + 1.0
    is_open = gate > tl.where(hard, _OPEN, 0.5)
    if hard:
        e = tl.exp(-(g - _SHIFT))
        g = 1.0 / (1.0 + e)
        slope = g * (e * g)  # 1 - p = e p, without the cancellation
    return g, slope, is_open


@triton.jit
def _count_bits(x):
    x = x - ((x >> 1) & 0x55)
    x = (x & 0x33) + ((x >> 2) & 0x33)
    return (x + (x >> 4)) & 0x0F


_PROGRAMS = 2048  # about as many at most, beside one a tensor: the last one adds up their sums


def _gate_penalties_fwd(
    gates: list[torch.Tensor],
    coverages: torch.Tensor,
    lambdas: torch.Tensor,
    previous: torch.Tensor | None,
    hard: Sequence[bool],
    hold: Sequence[bool],
    need_grad: bool,
    block: int,
) -> tuple[torch.Tensor, ...]:
    """Launch the Triton kernel, ``block`` gates at a time (a power of two, at least 16)."""
    gates = [g.contiguous() for g in gates]
    count = coverages.numel()
    chunk = block * max(1, triton.cdiv(count, block * _PROGRAMS))
    table, tensors, programs, first_gate, first_byte = [0], 0, 0, 0, 0
    for gate, *flags in zip(gates, hard, hold, strict=True):
        if numel := gate.numel():
            row = [programs, gate.data_ptr(), numel, first_gate, first_byte, *map(int, flags)]
            table.extend(row)
            tensors += 1
        programs += triton.cdiv(numel, chunk)
        first_gate += numel
        first_byte += (numel + 7) // 8
    device = coverages.device
    out = _empty_outputs(gates, coverages, need_grad)
    penalty, density, mean, undecided, flips, mask, dgates = out
    sums = torch.empty(6, programs, dtype=torch.float64, device=device)
    with device_of(coverages):
        _gate_penalties_fwd_kernel[(programs,)](
            _table(tuple(table), device),
            coverages.contiguous(), lambdas.contiguous(),
            None if previous is None else previous.contiguous(),
            sums,
            penalty, density, mean, undecided, flips,
            mask, dgates,
            tensors, programs, chunk,
            HAS_PREVIOUS=previous is not None, NEED_GRAD=need_grad,
            BLOCK=block,
        )  # fmt: skip
    return out


def _block(device: torch.device) -> int:
    """Gates at a time; a CPU's compiler unrolls the tile."""
    return 128 if is_native(device) else 1024 if INTERPRETED else 512


def _table(content: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """The kernel's table on ``device``, uploaded where its content is new.

    The counter in it belongs to one launch at a time: each stream has its own table, each launch
    on a CPU too, and a captured graph uploads it whenever it runs.
    """
    if device.type == "cpu":
        return torch.tensor(content, dtype=torch.int64, device="cpu")
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured.append(_upload(content, device))
        return _captured[-1][1]
    return _cached_upload(content, device, torch.accelerator.current_stream(device).stream_id)[1]


# a graph reads these whenever it runs, and does not say when it is gone
_captured: list[tuple[torch.Tensor, torch.Tensor]] = []


@functools.lru_cache(maxsize=64)
def _cached_upload(
    content: tuple[int, ...], device: torch.device, stream: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return _upload(content, device)


def _upload(content: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The table on the host and on ``device``; the copy waits for nothing."""
    pin = device.type == "cuda"
    host = torch.tensor(content, dtype=torch.int64, device="cpu", pin_memory=pin)
    return host, host.to(device, non_blocking=pin)


def _empty_outputs(
    gates: Sequence[torch.Tensor], coverages: torch.Tensor, need_grad: bool
) -> tuple[torch.Tensor, ...]:
    """Penalty, density, mean, undecided, flips, mask, dgates."""

    def empty(dtype, *shape):
        return torch.empty(shape, dtype=dtype, device=coverages.device)

    return (
        empty(torch.float32),
        *(empty(torch.float64) for _ in range(3)),
        empty(torch.int64),
        empty(torch.uint8, mask_size(gates)),
        empty(torch.float32, coverages.numel() if need_grad else 0),
    )


def _gate_penalties_torch(
    gates: list[torch.Tensor],
    coverages: torch.Tensor,
    lambdas: torch.Tensor,
    previous: torch.Tensor | None,
    hard: Sequence[bool],
    hold: Sequence[bool],
    need_grad: bool,
) -> tuple[torch.Tensor, ...]:
    """The same in library calls: the tensors of one kind side by side."""
    flats, covers = [g.reshape(-1) for g in gates], coverages.split([g.numel() for g in gates])
    flags = list(zip(hard, hold, strict=True))
    groups = [[i for i, f in enumerate(flags) if f == flag] for flag in sorted(set(flags))]
    masks, dgates, sums = list(covers), list(covers), []
    for members in groups:
        flat = torch.cat([flats[i] for i in members])
        c = torch.cat([covers[i] for i in members]) if len(groups) > 1 else coverages
        *parts, group_sums = _one_kind(flat, c, lambdas, *flags[members[0]], need_grad)
        sizes = [flats[i].numel() for i in members]
        for whole, part in zip((masks, dgates), parts, strict=True):
            for i, piece in zip(members, part.split(sizes), strict=True):
                whole[i] = piece
        sums.append(group_sums)
    total, mean, spread, opened, undecided = torch.stack(sums).sum(0).unbind()
    fill = masks[0].new_zeros(7)
    mask = pack_bitmap(torch.cat([t for m in masks for t in (m, fill[: -len(m) % 8])]))
    flips = torch.full((), -1, dtype=torch.int64, device=coverages.device)
    if previous is not None:
        changed = (mask ^ previous)[:, None] >> torch.arange(8, device=coverages.device)
        flips = (changed & 1).sum()
    bimodal, l1 = lambdas.double().unbind()
    penalty = (bimodal * spread + l1 * mean).float()
    dgate = torch.cat(dgates) if need_grad else coverages.new_empty(0)
    return penalty, opened / total, mean / total, undecided / total, flips, mask, dgate


def _one_kind(flat, c, lambdas, hard: bool, hold: bool, need_grad: bool):
    """Open gates, gradient, and the sums of coverage, mean, bi-modal term, open, undecided."""
    kind = "hard_concrete" if hard else "threshold"
    is_open, g, c64 = open_gates(flat, kind), open_chance(flat, kind), c.double()
    cg = c64 * g
    spread = cg.new_zeros(()) if hard else (cg * (1 - g)).sum()
    undecided = (c64 * ((g > 0.1) & (g < 0.9))).sum()
    sums = torch.stack([c64.sum(), cg.sum(), spread, (c64 * is_open).sum(), undecided])
    if not need_grad:
        return is_open, c, sums
    bimodal, l1 = lambdas.unbind()
    if hard:
        low, high = gate_bounds(kind)
        dgate = c * (l1 * g * torch.sigmoid(CHANCE_SHIFT - flat.clamp(low, high)))
    else:
        dgate = c * (bimodal * (1 - 2 * g) + l1)
    if hold:
        dgate = dgate.masked_fill_(~is_open, 0)
    return is_open, dgate, sums


@torch.library.custom_op(add_op_namespace_prefix("gate_penalties"), mutates_args=())
def _gate_penalties_op(
    gates: Sequence[torch.Tensor],
    coverages: torch.Tensor,
    lambdas: torch.Tensor,
    previous: torch.Tensor | None,
    hard: Sequence[bool],
    hold: Sequence[bool],
    need_grad: bool,
    impl: str,
) -> tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
]:
    arguments = list(gates), coverages, lambdas, previous, hard, hold, need_grad
    if impl == "triton" and coverages.numel():
        return _gate_penalties_fwd(*arguments, block=_block(coverages.device))  # pyright: ignore
    return _gate_penalties_torch(*arguments)  # pyright: ignore


@_gate_penalties_op.register_fake
def _(gates, coverages, lambdas, previous, hard, hold, need_grad, impl):
    return _empty_outputs(gates, coverages, need_grad)


def _setup_context(ctx, inputs, output):
    ctx.shapes, ctx.need_grad = [g.shape for g in inputs[0]], inputs[6]
    ctx.save_for_backward(output[-1])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, dpenalty, *_):
    (dgates,) = ctx.saved_tensors
    if not ctx.need_grad:  # something else than a gate requires grad
        return [None] * len(ctx.shapes), None, None, None, None, None, None, None
    parts = (dgates * dpenalty).split([shape.numel() for shape in ctx.shapes])
    grads = [part.view(shape) for part, shape in zip(parts, ctx.shapes, strict=True)]
    return grads, None, None, None, None, None, None, None


_gate_penalties_op.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(ops.gate_penalties)
def _gate_penalties_flops(*args, out_shape=None, **kwargs) -> int:
    """None: PyTorch counts products of matrices only, and no element-wise work."""
    return 0


def _per_tensor(
    gates: Sequence[torch.Tensor], kinds: str | Sequence[str], hold: bool | Sequence[bool]
) -> tuple[list[str], list[bool]]:
    """Kind and hold of each tensor."""
    kinds = [kinds] * len(gates) if isinstance(kinds, str) else list(kinds)
    holds = [hold] * len(gates) if isinstance(hold, bool) else list(hold)
    for name, given in (("kinds", kinds), ("hold_closed", holds)):
        if len(given) != len(gates):
            raise ValueError(
                f"{name} must be one for all or one for each of {len(gates)} tensors, got "
                f"{len(given)}"
            )
    for kind in kinds:
        check_gate_kind(kind)
    return kinds, holds
