"""What :mod:`.gate` computes, in library calls."""

from __future__ import annotations

import torch

from .blocks import GateLayout, expand_gates, sum_blocks
from .kinds import (
    BETA,
    DRAW_MARGIN,
    GAMMA,
    LOG_ALPHA_LIMIT,
    ZETA,
    eval_gates,
)

_THRESHOLD = torch.ops.aten.threshold_backward.grad_input


def binarise(gate: torch.Tensor, kind: str, seed: torch.Tensor | None = None) -> torch.Tensor:
    """The open gates as a bool mask, as the ``torch`` implementation reads or draws them.

    Args:
        gate: any shape fp32.
        kind: ``"threshold"`` | ``"bernoulli"``.
        seed: ``[1]`` int64, for ``"bernoulli"``.
    """
    if kind == "threshold":
        return gate > 0.5
    assert kind == "bernoulli"
    assert seed is not None
    return _draws(gate, seed) < gate  # draws lie in [0, 1): exact at gates of 0 and 1, and beyond


def draw_hard_concrete(gate: torch.Tensor, seed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Hard concrete gates as the ``torch`` implementation draws them.

    Args:
        gate: any shape fp32. log alpha; read as clipped. NaN is closed.
        seed: ``[1]`` int64.

    Returns:
        ``z`` in [0, 1] and ``dz / dgate`` (of the clipped value), in the shape of ``gate``, fp32.
    """
    u = _draws(gate, seed).clamp(DRAW_MARGIN, 1 - DRAW_MARGIN)
    noise = u.log() - (1 - u).log()
    s = torch.sigmoid((noise + gate.clamp(-LOG_ALPHA_LIMIT, LOG_ALPHA_LIMIT)) / BETA)
    z = s * (ZETA - GAMMA) + GAMMA
    z = torch.where(z > 0, z.clamp(max=1), 0.0)
    return z, _slope(z, s, BETA)


def keep_open(
    values: torch.Tensor,
    gate: torch.Tensor,
    is_open: torch.Tensor | None,
    layout: GateLayout,
    out: torch.Tensor,
) -> None:
    """Set ``out`` to ``values`` where gates are open, else to 0; ``out`` may be ``values``.

    Args:
        values: ``layout.weight_shape``, dtype of ``out``, any strides.
        gate: ``layout.gate_shape`` fp32.
        is_open: bool, or 0 and 1 in the dtype of ``values``, like ``gate``; what lies above 0.5 if
            ``None``, and NaN then: whoever reads gates in bulk looks for NaN first.
    """
    if is_open is not None or values.dtype != gate.dtype:
        is_open = gate > 0.5 if is_open is None else is_open
        gate = is_open.to(values.dtype)
    # grad where input > threshold, else 0: a vectorised pass that PyTorch has for ReLU; `where` and
    # `masked_fill` take three times as long
    values, gate, out = _aligned(values, gate, out, layout)
    _THRESHOLD(values, gate, 0.5, grad_input=out)


def _aligned(values, gate, out, layout: GateLayout) -> tuple[torch.Tensor, ...]:
    """Views in which a gate meets the weights that it covers by broadcasting."""
    if layout.per_weight:
        return values, gate, out
    (n, k, *taps), (bn, bk) = layout.weight_shape, layout.block
    if taps or n % bn or k % bk:
        return values, expand_gates(gate, layout), out
    blocked = (n // bn, bn, k // bk, bk)
    if out.stride() != values.stride():
        values = values.contiguous()
    return values.reshape(blocked), gate[:, None, :, None], out.view(blocked)


def gate_weight_fwd_torch(
    w, gate, seed, layout: GateLayout, kind: str, dtype: torch.dtype
) -> torch.Tensor:
    out = torch.empty_like(w, dtype=dtype)
    if kind == "hard_concrete":
        z = expand_gates(_hard_concrete(gate, seed)[0], layout)
        return out.copy_(_product(w, z)).masked_fill_(z == 0, 0)
    is_open = None if kind == "threshold" else binarise(gate, kind, seed)
    keep_open(w if w.dtype == dtype else out.copy_(w), gate, is_open, layout, out)
    return out


def gate_weight_bwd_torch(
    dout, w, gate, seed, layout: GateLayout, kind: str, need_dgate: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    slope, dw = None, torch.empty(w.shape, dtype=w.dtype, device=w.device)
    if kind == "hard_concrete":
        z, slope = _hard_concrete(gate, seed)
        z = expand_gates(z, layout)
        dw.copy_(_product(dout, z)).masked_fill_(z == 0, 0)
    else:
        is_open = None if kind == "threshold" else binarise(gate, kind, seed)
        keep_open(dout if dout.dtype == w.dtype else dw.copy_(dout), gate, is_open, layout, dw)
    if not need_dgate:
        return dw, gate.new_empty(0)
    dgate = sum_blocks(_product(dout, w), layout)
    if slope is not None:  # a closed gate's is 0 also where the weight is not finite
        dgate = torch.where(slope == 0, 0.0, dgate * slope)
    return dw, dgate.to(gate.dtype).contiguous()


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return a.to(wide) * b.to(wide)


def _hard_concrete(
    gate: torch.Tensor, seed: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if seed is not None:
        return draw_hard_concrete(gate, seed)
    z = eval_gates(gate, "hard_concrete")
    return z, _slope(z, torch.sigmoid(gate), 1.0)


def _slope(z: torch.Tensor, s: torch.Tensor, temperature: float) -> torch.Tensor:
    slope = s * (1 - s) * ((ZETA - GAMMA) / temperature)
    return torch.where((z > 0) & (z < 1), slope, 0.0)


def _draws(gate: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator(gate.device).manual_seed(int(seed))
    return torch.rand(gate.shape, generator=generator, dtype=gate.dtype, device=gate.device)
