import math

import pytest
import torch
from helpers import assert_exact
from sgtriton_kernels.kinds import (
    GATE_KINDS,
    LOG_ALPHA_LIMIT,
    OPEN_LOG_ALPHA,
    check_gate_kind,
    eval_gates,
    gate_bounds,
    initial_gate,
    open_chance,
    open_gates,
)


def around(value, steps=8):
    """fp32 neighbours of a value, from below to above."""
    out = [torch.tensor(value, dtype=torch.float32)]
    for _ in range(steps):
        out.append(torch.nextafter(out[-1], torch.tensor(math.inf)))
        out.insert(0, torch.nextafter(out[0], torch.tensor(-math.inf)))
    return torch.stack(out)


@pytest.mark.parametrize("kind", GATE_KINDS)
def test_a_gate_is_open_just_where_eval_multiplies_by_more_than_0(kind):
    special = torch.tensor([-9.0, -1.0, 0.0, 0.5, 1.0, 9.0, math.nan, math.inf, -math.inf])
    gate = torch.cat([around(0.5), around(OPEN_LOG_ALPHA), special])
    z = eval_gates(gate, kind)
    assert_exact("open", z > 0, open_gates(gate, kind))
    assert ((z >= 0) & (z <= 1)).all()
    assert not open_gates(torch.tensor(math.nan), kind)


def test_eval_gates_are_the_stretched_sigmoid():
    gate = torch.linspace(-5, 5, 101)
    expected = (torch.sigmoid(gate.double()) * 1.2 - 0.1).clamp(0, 1)
    torch.testing.assert_close(
        eval_gates(gate, "hard_concrete").double(), expected, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("kind", GATE_KINDS)
def test_gates_start_open_within_their_bounds_and_eval_multiplies_by_1(kind):
    low, high = gate_bounds(kind)
    for init in (0.7, 0.9, 0.999, 1):
        gate = torch.tensor(initial_gate(init, kind))
        assert low <= gate.item() <= high + 1e-6
        assert eval_gates(gate, kind) == 1


def test_initial_hard_concrete_gate_is_drawn_1_with_the_given_chance():
    # z = 1 where s > 11/12: the chance mirrors that of z != 0
    gate = torch.tensor(initial_gate(0.9, "hard_concrete"), dtype=torch.float64)
    assert 1 - open_chance(-gate, "hard_concrete").item() == pytest.approx(0.9)
    assert initial_gate(1, "hard_concrete") == LOG_ALPHA_LIMIT


@pytest.mark.parametrize("kind", GATE_KINDS)
def test_chance_reads_gates_as_clipped(kind):
    low, high = gate_bounds(kind)
    gate = torch.tensor([low - 1, high + 1])
    assert_exact("clipped", open_chance(gate, kind), open_chance(torch.tensor([low, high]), kind))


@pytest.mark.parametrize(
    ("init", "kind", "match"),
    [
        (0.5, "threshold", "init"),
        (1.1, "bernoulli", "init"),
        (math.nan, "threshold", "init"),
        (True, "threshold", "init"),
        ("1", "threshold", "init"),
        (0.6, "hard_concrete", "0.7"),
    ],
)
def test_initial_gate_refuses(init, kind, match):
    with pytest.raises(ValueError, match=match):
        initial_gate(init, kind)


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="sigmoid"):
        check_gate_kind("sigmoid")
    for kind in GATE_KINDS:
        check_gate_kind(kind)
