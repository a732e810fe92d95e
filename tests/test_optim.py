import copy
import gc
import math
import pickle
import warnings

import pytest
import torch
from helpers import assert_exact
from torch import nn

import sgtriton
from sgtriton import clipping
from sgtriton.layers import gated_layers

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 50.0),
    "momentum": lambda p: torch.optim.SGD(p, 50.0, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, 0.7),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.7, weight_decay=0.0),
    "fused AdamW": lambda p: torch.optim.AdamW(p, 0.7, weight_decay=0.0, fused=True),
    "foreach AdamW": lambda p: torch.optim.AdamW(p, 0.7, weight_decay=0.0, foreach=True),
    "foreach SGD": lambda p: torch.optim.SGD(p, 50.0, foreach=True),
    "fused SGD": lambda p: torch.optim.SGD(p, 50.0, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.7),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 5.0),
}


def make_model(block=(2, 2), gate="threshold"):
    return sgtriton.patch(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)), block, gate)


def gates_of(model):
    return [layer.gate for layer in gated_layers(model)]


def step(model, optimizer, sign=1.0):
    optimizer.zero_grad()
    (sign * model(torch.randn(16, 6)).pow(3).sum()).backward()
    optimizer.step()


def assert_in_bounds(gates):
    for gate in gates:
        assert gate.min() >= 0
        assert gate.max() <= 1


def saturated(gates):
    values = {value for gate in gates for value in gate.unique().tolist()}
    return values.issuperset({0.0, 1.0})


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("kind", ["threshold", "bernoulli"])
def test_gates_stay_in_bounds_under(make, kind):
    model = make_model(gate=kind)
    optimizer = make(gates_of(model))
    for _ in range(6):
        step(model, optimizer)
        assert_in_bounds(gates_of(model))
    assert saturated(gates_of(model))  # the steps were long enough to leave them


def test_gates_stay_in_bounds_under_a_closure():
    model = make_model()
    optimizer = torch.optim.LBFGS(gates_of(model), lr=1.0, max_iter=4)

    def closure():
        optimizer.zero_grad()
        loss = sum((gate - goal).square().sum() for gate, goal in zip(gates, (-2, 3), strict=True))
        loss.backward()
        return loss

    gates = gates_of(model)
    optimizer.step(closure)
    assert (gates[0] == 0).all()
    assert (gates[1] == 1).all()


def test_gates_stay_in_bounds_under_a_grad_scaler():
    model = make_model()
    optimizer = torch.optim.SGD(gates_of(model), 50.0)
    scaler = torch.amp.GradScaler("cpu")
    for _ in range(6):
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(16, 6)).pow(3).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert_in_bounds(gates_of(model))
    assert saturated(gates_of(model))


def test_gates_stay_in_bounds_under_a_compiled_step():
    model = make_model()
    optimizer = torch.optim.SGD(gates_of(model), 50.0)
    torch._dynamo.reset()
    compiled = torch.compile(optimizer.step, backend="eager")
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(16, 6)).pow(3).sum().backward()
        compiled()
        assert_in_bounds(gates_of(model))
    assert saturated(gates_of(model))


def test_step_of_another_optimizer_leaves_foreign_gates_alone():
    model, other = make_model(), make_model()
    with torch.no_grad():
        model[0].gate.fill_(1.5)
    step(other, torch.optim.SGD(other.parameters(), 0.1))
    assert (model[0].gate == 1.5).all()
    step(model, torch.optim.SGD([model[2].weight], 0.1))
    assert (model[0].gate == 1.5).all()


@pytest.mark.parametrize(
    "make_copy",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["deepcopy", "pickle"],
)
def test_gates_of_a_copy_are_clipped_too(make_copy):
    model = make_model()
    twin = make_copy(model)
    with torch.no_grad():
        twin[0].gate.fill_(1.5)
        model[0].gate.fill_(1.5)
    optimizer = torch.optim.SGD(twin.parameters(), 1e-6)
    step(twin, optimizer)
    assert_in_bounds(gates_of(twin))
    assert (model[0].gate == 1.5).all()


def test_gate_parameter_that_was_replaced_is_clipped():
    """Sharding and assigning loads put new Parameters in place."""
    model = make_model()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    state["0.gate"].fill_(1.5)
    old = model[0].gate
    model.load_state_dict(state, assign=True)
    assert model[0].gate is not old
    optimizer = torch.optim.SGD(model.parameters(), 1e-6)
    step(model, optimizer)
    assert_in_bounds(gates_of(model))


@pytest.mark.parametrize(("start", "sign"), [(1.0, 1.0), (0.0, -1.0)], ids=["from 1", "from 0"])
def test_gate_that_starts_at_a_bound_moves(start, sign, impl):
    """O14: 5 steps of 0.1 against a straight-through gradient of 1 end at 0.5."""
    from sgtriton_kernels import use_impl

    layer = sgtriton.patch(nn.Linear(3, 3, bias=False), (1, 1))
    nn.init.ones_(layer.weight)
    nn.init.constant_(layer.gate, start)
    optimizer = torch.optim.SGD([layer.gate], 0.1)
    for _ in range(5):
        optimizer.zero_grad()
        with use_impl(impl):
            (sign * layer.gated_weight()).sum().backward()
        assert (layer.gate.grad == sign).all()
        optimizer.step()
    torch.testing.assert_close(layer.gate.detach(), torch.full((3, 3), 0.5))


def test_decay_on_gates_warns_once_per_optimizer_with_the_remedy():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.1)
    with pytest.warns(UserWarning, match=r"weight_decay=0\.1 acts on gates.*param_groups"):
        step(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, optimizer)
    second = torch.optim.SGD(model.parameters(), 1e-3, weight_decay=0.2)
    with pytest.warns(UserWarning, match=r"weight_decay=0\.2"):
        step(model, second)


def test_decay_warning_points_at_the_callers_line():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, weight_decay=0.2)
    with pytest.warns(UserWarning, match="acts on gates") as caught:
        step(model, optimizer)
    assert caught[0].filename == __file__


def test_no_decay_warning_where_gates_have_none():
    model = make_model()
    groups = sgtriton.param_groups(model, 1e-3, weight_decay=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, torch.optim.AdamW(groups, weight_decay=0.3))
        step(model, torch.optim.AdamW([model[0].weight], 1e-3, weight_decay=0.1))


def test_decay_does_not_move_gates_in_param_groups():
    model = make_model()
    before = [gate.detach().clone() for gate in gates_of(model)]
    optimizer = torch.optim.SGD(sgtriton.param_groups(model, 0.1, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    weight = model[0].weight.detach().clone()
    optimizer.step()
    for gate, ref in zip(gates_of(model), before, strict=True):
        assert_exact("gate", gate, ref)
    torch.testing.assert_close(model[0].weight.detach(), weight * (1 - 0.1 * 0.5))


def test_param_groups_hold_each_trainable_parameter_once():
    model = make_model()
    model[2].bias.requires_grad_(False)
    model.append(model[0])  # shared
    groups = sgtriton.param_groups(model, 0.1)
    held = [id(p) for group in groups for p in group["params"]]
    assert len(held) == len({*held})
    assert {*held} == {id(p) for p in model.parameters() if p.requires_grad}


def test_rates_under_adam_are_the_same_for_gates():
    model = make_model()
    weights, gates = sgtriton.param_groups(model, 0.02, weight_decay=0.1)
    assert (weights["lr"], weights["weight_decay"]) == (0.02, 0.1)
    assert (gates["lr"], gates["weight_decay"]) == (0.02, 0.0)
    assert {id(p) for p in gates["params"]} == {id(gate) for gate in gates_of(model)}
    assert sgtriton.param_groups(model, 0.02, gate_lr=0.3)[1]["lr"] == 0.3


def test_rates_under_sgd_follow_the_weights_per_gate():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(6, 6))
    sgtriton.patch(model, (4, 4), include="[01]")
    sgtriton.patch(model, (1, 1))
    rates = {
        id(p): group["lr"]
        for group in sgtriton.param_groups(model, 0.01, optimizer=torch.optim.SGD)
        for p in group["params"]
    }
    assert rates[id(model[0].weight)] == 0.01
    assert rates[id(model[0].gate)] == pytest.approx(0.1 / math.sqrt(16))
    assert rates[id(model[1].gate)] == pytest.approx(0.1 / math.sqrt(12))  # ragged
    assert rates[id(model[2].gate)] == pytest.approx(0.1)
    fixed = sgtriton.param_groups(model, 0.01, gate_lr=0.5, optimizer=torch.optim.SGD)
    assert [group["lr"] for group in fixed] == [0.01, 0.5]


def test_optimizer_state_saved_after_the_freeze_loads_into_a_new_optimizer():
    model = make_model()
    optimizer = torch.optim.Adam(sgtriton.param_groups(model, 0.1))
    for layer in gated_layers(model):
        layer.freeze()
    saved = optimizer.state_dict()
    resumed = torch.optim.Adam(sgtriton.param_groups(model, 0.1))
    resumed.load_state_dict(saved)
    groups = [{id(p) for p in group["params"]} for group in resumed.param_groups]
    assert groups[1] == {id(gate) for gate in gates_of(model)}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"lr": -0.1}, r"lr must be a number >= 0, got -0\.1"),
        ({"weight_decay": -1.0}, "weight_decay must be a number >= 0"),
        ({"gate_lr": -1.0}, "gate_lr must be a number >= 0"),
        ({"lr": float("nan")}, "lr must be a number >= 0, got nan"),
        ({"lr": "1e-2"}, "lr must be a number >= 0, got '1e-2'"),
        ({"optimizer": "sgd"}, "optimizer must be a class of optimizers, got 'sgd'"),
        ({"model": nn.Linear(2, 2)}, "no gated layer"),
    ],
)
def test_param_groups_refuses(change, match):
    arguments = {"model": make_model(), "lr": 0.1} | change
    with pytest.raises(ValueError, match=match):
        sgtriton.param_groups(**arguments)


def test_dropped_models_and_optimizers_leave_nothing_behind():
    gc.collect()
    before = len(clipping._gated_modules), len(clipping._warned_of_decay)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Module()
        for cycle in range(300):
            model = sgtriton.patch(nn.Sequential(nn.Linear(3, 2)), (1, 1))
            if cycle % 50 == 0:
                model(torch.ones(1, 3)).sum().backward()
                torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1).step()
                copy.deepcopy(model)
            if cycle % 2:
                sgtriton.unpatch(model)
    del model
    gc.collect()
    assert (len(clipping._gated_modules), len(clipping._warned_of_decay)) == before


def test_unpatched_layer_is_forgotten_at_once():
    model = make_model()
    layers = [*gated_layers(model)]
    assert all(layer in clipping._gated_modules for layer in layers)
    sgtriton.unpatch(model)
    assert not any(layer in clipping._gated_modules for layer in layers)
    step(model, torch.optim.SGD(model.parameters(), 0.1))
