"""Gate kinds: what a gate's value means.

    threshold      b = 1 if g > 0.5 else 0
    bernoulli      b ~ Bernoulli(clip(g, 0, 1)) in training; g > 0.5 in eval
    hard_concrete  z = clip(1.2 s - 0.1, 0, 1)                                    with g = log_alpha
                   s = sigmoid((log u - log(1 - u) + g) / beta), u ~ U(0, 1), in training
                   s = sigmoid(g) in eval; the gate is open if z > 0

Hard concrete gates are those of Louizos, Welling, Kingma (arXiv:1712.01312), with their constants.
"""

from __future__ import annotations

import math

import torch

from ._triton import tl, triton

GATE_KINDS = ("threshold", "bernoulli", "hard_concrete")

BETA = 2 / 3  # temperature
GAMMA, ZETA = -0.1, 1.1  # ends of the stretched sigmoid
LOG_ALPHA_LIMIT = math.log(100)
# sigmoid(g) lies above -GAMMA / (ZETA - GAMMA) from here on: the eval gate is open
OPEN_LOG_ALPHA = math.log(-GAMMA / ZETA)
# P(z != 0) = sigmoid(g - CHANCE_SHIFT), P(z = 1) = sigmoid(g + CHANCE_SHIFT)
CHANCE_SHIFT = BETA * OPEN_LOG_ALPHA
# draws are kept this far from 0 and 1, where the logistic noise would be infinite
DRAW_MARGIN = 2.0**-24


def check_gate_kind(kind: str) -> None:
    """Raise ``ValueError`` unless ``kind`` names a gate kind."""
    if kind not in GATE_KINDS:
        raise ValueError(f"gate kind must be one of {GATE_KINDS}, got {kind!r}")


def gate_bounds(kind: str) -> tuple[float, float]:
    """Between which values gates of ``kind`` are kept."""
    return (-LOG_ALPHA_LIMIT, LOG_ALPHA_LIMIT) if kind == "hard_concrete" else (0.0, 1.0)


def initial_gate(init: float, kind: str) -> float:
    """The gate value with which a layer starts.

    Args:
        init: the gate itself, in (0.5, 1]; for ``hard_concrete`` the chance that a drawn gate is
            exactly 1, in [0.7, 1), cut to what the bounds of ``log_alpha`` allow.

    Raises:
        ValueError: ``init`` would not give the original layer's numbers in eval.
    """
    if isinstance(init, bool) or not isinstance(init, (int, float)) or not 0.5 < init <= 1:
        raise ValueError(f"init must be in (0.5, 1], so that every gate starts open, got {init}")
    if kind != "hard_concrete":
        return float(init)
    if init < 0.7:
        raise ValueError(
            f"init of hard_concrete gates must be >= 0.7, so that every gate is 1 in eval, got "
            f"{init}"
        )
    if init == 1:
        return LOG_ALPHA_LIMIT
    return min(math.log(init / (1 - init)) - CHANCE_SHIFT, LOG_ALPHA_LIMIT)


def open_gates(gate: torch.Tensor, kind: str) -> torch.Tensor:
    """Which gates are open in eval: bool in the shape of ``gate``; NaN is closed."""
    return gate > (OPEN_LOG_ALPHA if kind == "hard_concrete" else 0.5)


def eval_gates(gate: torch.Tensor, kind: str) -> torch.Tensor:
    """What eval multiplies weights with: 0, 1, or for ``hard_concrete`` a number in [0, 1].

    Above 0 just where :func:`open_gates` says open, however ``sigmoid`` rounds.
    """
    is_open = open_gates(gate, kind)
    if kind != "hard_concrete":
        return is_open.to(gate.dtype)
    tiny = torch.finfo(gate.dtype).tiny
    z = (torch.sigmoid(gate) * (ZETA - GAMMA) + GAMMA).clamp(tiny, 1)
    return torch.where(is_open, z, 0.0)


def open_chance(gate: torch.Tensor, kind: str) -> torch.Tensor:
    """The chance that a gate is not 0, in ``gate``'s dtype; of ``threshold`` gates ``clip(g)``."""
    low, high = gate_bounds(kind)
    gate = gate.clamp(low, high)
    return torch.sigmoid(gate - CHANCE_SHIFT) if kind == "hard_concrete" else gate


@triton.jit
def is_open(gate, gate_offs, seed_ptr, BERNOULLI: tl.constexpr):
    # gate_offs: index of each gate in its tensor, the counter of its draw
    if BERNOULLI:
        return tl.rand(tl.load(seed_ptr), gate_offs) < gate  # draws lie in [0, 1)
    else:
        return gate > 0.5


_STRETCH, _GAMMA = tl.constexpr(ZETA - GAMMA), tl.constexpr(GAMMA)
_INVERSE_BETA, _LIMIT = tl.constexpr(1 / BETA), tl.constexpr(LOG_ALPHA_LIMIT)
_OPEN, _MARGIN = tl.constexpr(OPEN_LOG_ALPHA), tl.constexpr(DRAW_MARGIN)
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def hard_concrete(gate, gate_offs, seed_ptr, DRAW: tl.constexpr):
    # z and dz / dgate, drawn or as in eval; a NaN gate is closed in both
    log_alpha = tl.where(gate > _LIMIT, _LIMIT, gate)
    log_alpha = tl.where(log_alpha < -_LIMIT, -_LIMIT, log_alpha)
    if DRAW:
        u = tl.rand(tl.load(seed_ptr), gate_offs)
        u = tl.minimum(tl.maximum(u, _MARGIN), 1 - _MARGIN)
        s = tl.sigmoid((tl.log(u) - tl.log(1 - u) + log_alpha) * _INVERSE_BETA)
        slope = s * (1 - s) * (_STRETCH * _INVERSE_BETA)
        stretched = s * _STRETCH + _GAMMA
        opened = stretched > 0
    else:
        s = tl.sigmoid(log_alpha)
        slope = s * (1 - s) * _STRETCH
        stretched = tl.maximum(s * _STRETCH + _GAMMA, _TINY)
        opened = gate > _OPEN
    z = tl.where(opened, tl.minimum(stretched, 1.0), 0.0)
    dz = tl.where(opened & (stretched < 1), slope, 0.0)
    return z, dz
