import io
import warnings

import pytest
import torch
from helpers import assert_close, assert_exact
from sgtriton_kernels import coverage
from small_training import Training, make_model, problem, sparsity
from torch import nn

import sgtriton
from sgtriton import SparsityController, control, gate_penalty
from sgtriton.layers import gated_layers


def save_load(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("target", [0.0, 0.5, 0.95])
def test_targets_from_none_to_nearly_all_are_met(target):
    training = Training(target=target)
    training.run(100)
    assert abs(sparsity(training.model) - target) <= 0.005


def test_target_0_keeps_every_gate_and_pushes_none_down():
    training = Training(target=0.0)
    while not training.controller.frozen:
        training.step()
        assert training.controller.statistics.multiplier <= 0
    assert all((layer.gate == 1).all() for layer in gated_layers(training.model))


def test_one_step_is_a_training():
    training = Training(steps=1, target=0.6)
    training.step()
    assert training.controller.frozen
    assert abs(sparsity(training.model) - 0.6) <= 0.005


def test_steps_beyond_the_plan_change_no_gate():
    training = Training(steps=10)
    training.run(10)
    gates = [layer.gate.clone() for layer in gated_layers(training.model)]
    training.run(10)
    for layer, gate in zip(gated_layers(training.model), gates, strict=True):
        assert_exact("gate", layer.gate, gate)
    assert sparsity(training.model) == pytest.approx(0.8, abs=0.005)


def test_frozen_penalty_is_0_and_has_no_gradient():
    training = Training(steps=2)
    training.run(2)
    penalty = training.controller.penalty()
    assert penalty.item() == 0
    assert not penalty.requires_grad


def test_default_dtype_fp64_can_be_controlled():
    torch.set_default_dtype(torch.float64)
    try:
        training = Training(steps=20, target=0.5)
        training.x, training.y = (t.double() for t in problem())
        training.run(10)
        resumed = Training(steps=20, target=0.5)
        resumed.controller.load_state_dict(training.controller.state_dict())
        resumed.run(10)
        assert abs(sparsity(resumed.model) - 0.5) <= 0.005
    finally:
        torch.set_default_dtype(torch.float32)


# phases


def test_schedule_is_a_cubic_ramp_between_its_ends():
    controller = Training(steps=100, ramp=(0.1, 0.5), target=0.8).controller
    seen = []
    for count in (0, 10, 30, 50, 70):
        controller._count = count
        seen.append(controller.target_density)
    assert seen == pytest.approx([1.0, 1.0, 0.2 + 0.8 / 8, 0.2, 0.2])


def bimodal_weight(training):
    """Weight of the bi-modal term: half the slope of the penalty's gradient over the gates."""
    layers = [*gated_layers(training.model)]
    with torch.no_grad():
        saved = [layer.gate.clone() for layer in layers]
        for layer in layers:
            layer.gate.fill_(0.0)
            layer.gate[0, 0] = 1.0
    grads = torch.autograd.grad(training.controller.penalty(), [layer.gate for layer in layers])
    with torch.no_grad():
        for layer, gate in zip(layers, saved, strict=True):
            layer.gate.copy_(gate)
    return (grads[0].max() - grads[0].min()).item() / 2


def test_no_gate_is_penalised_before_the_ramp_and_bimodality_comes_after_it():
    training = Training(steps=200, ramp=(0.1, 0.5), freeze_at=0.9)
    for count in range(1, 180):
        training.step()
        if count <= 20:
            assert training.controller.statistics.multiplier == 0
        if count in (1, 20, 100):
            assert bimodal_weight(training) == 0
    assert bimodal_weight(training) > 0
    training.step()
    assert training.controller.frozen


def test_statistics_describe_the_gates_of_the_last_penalty():
    training = Training(steps=50)
    first = training.controller.statistics
    assert (first.density, first.open_share, first.undecided_share) == (1.0, 1.0, 0.0)
    assert first.flips == -1
    training.step()
    layer = next(iter(gated_layers(training.model)))
    with torch.no_grad():
        layer.gate[0, :4] = 0.3
    training.controller.penalty()
    then = training.controller.statistics
    total = sum(m.weight.numel() for m in gated_layers(training.model))
    assert then.flips == 4
    assert then.open_share == pytest.approx(1 - 4 / total)
    assert then.undecided_share >= 4 / total


def test_penalty_touches_neither_gates_nor_grads():
    training = Training()
    training.run(20)
    before = [layer.gate.detach().clone() for layer in gated_layers(training.model)]
    training.controller.penalty()
    for layer, gate in zip(gated_layers(training.model), before, strict=True):
        assert_exact("gate", layer.gate, gate)
        assert layer.gate.grad is None


def test_freeze_by_hand_lands_at_once():
    training = Training(target=0.6)
    training.run(3)
    training.controller.freeze()
    assert training.controller.frozen
    assert abs(sparsity(training.model) - 0.6) <= 0.005
    training.run(3)
    assert abs(sparsity(training.model) - 0.6) <= 0.005


def test_thaw_lets_gates_move_until_freeze_is_called():
    training = Training()
    training.run(80)
    assert training.controller.frozen
    training.controller.thaw()
    assert not training.controller.frozen
    before = [layer.gate.detach().clone() for layer in gated_layers(training.model)]
    training.run(5)
    after = [layer.gate for layer in gated_layers(training.model)]
    assert any((a != b).any() for a, b in zip(after, before, strict=True))
    assert not training.controller.frozen
    training.controller.freeze()
    assert abs(sparsity(training.model) - 0.8) <= 0.005


# resume


def states(training):
    parts = training.model, training.optimizer, training.controller
    return save_load([part.state_dict() for part in parts])


def load(training, saved):
    for part, state in zip(
        (training.model, training.optimizer, training.controller), saved, strict=True
    ):
        part.load_state_dict(state)


@pytest.mark.parametrize("at", [1, 9, 40, 70])
@pytest.mark.parametrize(
    ("optimizer", "gate"), [("Adam", "threshold"), ("SGD momentum", "bernoulli")]
)
def test_resumed_training_goes_on_bitwise_like_an_uninterrupted_one(optimizer, gate, at):
    """Before, in and after the ramp, and after the freeze (at 70)."""
    options = {"block": (2, 2), "gate": gate, "steps": 100}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no false alarm after a resume
        straight = Training(optimizer, **options)
        straight.run(at)
        saved, rng = states(straight), torch.get_rng_state()
        losses = [straight.step() for _ in range(100 - at)]
        resumed = Training(optimizer, **options)
        load(resumed, saved)
        torch.set_rng_state(rng)
        again = [resumed.step() for _ in range(100 - at)]
    assert again == losses
    state, ref = resumed.model.state_dict(), straight.model.state_dict()
    for name, t in ref.items():
        assert_exact(name, state[name], t)
    assert resumed.controller.frozen
    assert resumed.controller.statistics == straight.controller.statistics


def test_controller_state_refreezes_a_model_loaded_from_plain_tensors():
    training = Training(steps=20)
    training.run(20)
    saved = states(training)
    resumed = Training(steps=20)
    resumed.model.load_state_dict(dict(saved[0].items()))
    assert not resumed.controller.frozen
    resumed.controller.load_state_dict(saved[2])
    assert resumed.controller.frozen
    assert all(not layer.gate.requires_grad for layer in gated_layers(resumed.model))


@pytest.mark.parametrize(
    "options",
    [
        {"target": 0.7},
        {"steps": 99},
        {"ramp": (0.1, 0.5)},
        {"freeze_at": 0.9},
        {"allow_empty": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_state_of_another_schedule_is_refused_and_changes_nothing(options):
    state = Training(steps=100).controller.state_dict()
    controller = Training(**({"steps": 100} | options)).controller
    before = controller.state_dict()
    with pytest.raises(ValueError, match=f"the state was written for {next(iter(options))}="):
        controller.load_state_dict(state)
    assert controller.state_dict() == before


def test_state_of_another_model_or_with_missing_fields_is_refused():
    training = Training(steps=20)
    training.run(2)
    state = training.controller.state_dict()
    other = Training(steps=20, block=(4, 4)).controller
    with pytest.raises(ValueError, match="mask has shape"):
        other.load_state_dict(state)
    del state["multiplier"], state["count"]
    with pytest.raises(ValueError, match=r"lacks \['count', 'multiplier'\]"):
        training.controller.load_state_dict(state)


# what goes wrong


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"target": 1.0}, r"target must be a sparsity in \[0, 1\), got 1\.0"),
        ({"target": -0.1}, "target must be"),
        ({"target": 90}, "target must be"),
        ({"target": float("nan")}, "target must be"),
        ({"steps": 0}, "steps must be"),
        ({"steps": -5}, "steps must be"),
        ({"steps": 2.5}, r"steps must be .*got 2\.5"),
        ({"steps": True}, "steps must be"),
        ({"ramp": (0.5, 0.5)}, "must hold"),
        ({"ramp": (-0.1, 0.5)}, "must hold"),
        ({"ramp": (0.1, 0.8)}, "must hold"),
        ({"ramp": (0.1,)}, "must hold"),
        ({"ramp": (0.1, 0.2, 0.3)}, "must hold"),
        ({"freeze_at": 1.1}, "must hold"),
        ({"freeze_at": float("nan")}, "must hold"),
    ],
)
def test_bad_arguments_are_refused(options, match):
    model = sgtriton.patch(make_model(), (1, 1))
    with pytest.raises(ValueError, match=match):
        SparsityController(model, **({"steps": 10} | options))


def test_model_without_gates_is_refused():
    with pytest.raises(ValueError, match=r"no gated layer; call sgtriton\.patch"):
        SparsityController(make_model(), 0.5, steps=10)
    with pytest.raises(ValueError, match="no gated layer"):
        gate_penalty(make_model(), l1=1.0)


def test_target_out_of_reach_names_the_nearest_which_then_works():
    model = nn.Sequential(nn.Linear(37, 53), nn.Linear(53, 53), nn.Linear(53, 11))
    sgtriton.patch(model, (32, 32))
    with pytest.raises(ValueError, match=r"target=0\.9\d* cannot be reached") as error:
        SparsityController(model, 0.95, steps=10)
    nearest = float(
        str(error.value).split("nearest sparsity that can be reached is ")[1].split(";")[0]
    )
    with pytest.warns(UserWarning, match="largest gate block"):
        controller = SparsityController(model, nearest, steps=10)
    controller.freeze()
    assert abs(sparsity(model) - nearest) <= 0.005
    with pytest.warns(UserWarning, match="largest gate block"):
        SparsityController(model, 0.95, steps=10, allow_empty=True)


def test_coarse_blocks_are_said_when_the_controller_is_made():
    model = sgtriton.patch(make_model(), (16, 16))
    with pytest.warns(UserWarning, match=r"largest gate block covers 18\.9% .*by up to 9\.5") as w:
        SparsityController(model, 0.5, steps=10)
    assert w[0].filename == __file__
    fine = sgtriton.patch(make_model(), (1, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SparsityController(fine, 0.5, steps=10)


def test_empty_layers_only_where_they_are_allowed():
    for allow_empty in (False, True):
        training = Training(steps=10, target=0.9, allow_empty=allow_empty)
        last = [*gated_layers(training.model)][-1]
        nn.init.constant_(last.gate, 0.0)
        training.controller.freeze()
        assert last.gate.any() != allow_empty
        assert abs(sparsity(training.model) - 0.9) <= 0.005


def test_penalty_that_no_step_follows_warns_once():
    controller = Training().controller
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(control._CHECK_EVERY):
            controller.penalty()
    with pytest.warns(UserWarning, match=r"without step\(\).*controller\.step\(\)") as caught:
        controller.penalty()
    assert [w.filename for w in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        controller.penalty()


@pytest.mark.parametrize(("steps", "noticed"), [(100, 10), (10, 7)])
def test_gates_that_no_optimizer_holds_are_noticed(steps, noticed):
    """In a short training before they are frozen as they are."""
    training = Training(steps=steps)
    held = {id(layer.gate) for layer in gated_layers(training.model)}
    weights = [p for p in training.model.parameters() if id(p) not in held]
    training.optimizer = torch.optim.Adam(weights, 0.01)
    with pytest.warns(
        UserWarning, match=f"no gate has moved in {noticed} steps.*param_groups"
    ) as caught:
        training.run(12)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Training().run(12)


def test_nan_gate_is_named_at_the_next_check():
    training = Training(steps=1000)
    layer = [*gated_layers(training.model)][1]
    with torch.no_grad():
        layer.gate[0, 0] = float("nan")
    name = next(n for n, m in training.model.named_modules() if m is layer)
    with pytest.raises(ValueError, match=f"^{name}: gates must be numbers, got NaN"):
        training.run(control._CHECK_EVERY)
    with pytest.raises(ValueError, match=f"^{name}: "):
        training.controller.freeze()
    assert not training.controller.frozen


def test_unpatch_during_control_is_an_error_that_says_so():
    training = Training()
    training.run(2)
    sgtriton.unpatch(training.model)
    controller = training.controller
    for call in (
        controller.penalty,
        controller.step,
        controller.freeze,
        controller.thaw,
        controller.state_dict,
        lambda: controller.frozen,
    ):
        with pytest.raises(ValueError, match="gates are gone"):
            call()


# fixed lambdas


def test_gate_penalty_is_the_papers_and_counts_weights():
    model = sgtriton.patch(nn.Sequential(nn.Linear(5, 3), nn.Conv1d(2, 3, 2)), (2, 2))
    layers = [*gated_layers(model)]
    for layer in layers:
        nn.init.uniform_(layer.gate)
    penalty = gate_penalty(model, bimodal=0.25, l1=2.0)
    grads = torch.autograd.grad(penalty, [layer.gate for layer in layers])
    expected = torch.zeros(())
    for layer, grad in zip(layers, grads, strict=True):
        gate, covered = layer.gate.detach(), coverage(layer.layout)
        expected = expected + (covered * (0.25 * gate * (1 - gate) + 2 * gate)).sum()
        assert_close("gradient", grad, covered * (0.25 * (1 - 2 * gate) + 2))
    assert_close("penalty", penalty.detach(), expected)


def test_gate_penalty_alone_closes_gates():
    model = sgtriton.patch(make_model(), (2, 2))
    optimizer = torch.optim.Adam(sgtriton.param_groups(model, 0.05))
    for _ in range(40):
        optimizer.zero_grad()
        gate_penalty(model, bimodal=0.1, l1=1.0).backward()
        optimizer.step()
    assert all((layer.gate == 0).all() for layer in gated_layers(model))


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["bimodal", "l1"])
def test_gate_penalty_refuses_lambdas_that_are_no_weights(name, value):
    with pytest.raises(ValueError, match=f"{name} must be finite and >= 0"):
        gate_penalty(sgtriton.patch(make_model()), **{name: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("count", "x"), ("count", -1), ("frozen", 1), ("multiplier", "x"),
        ("multiplier", float("nan")), ("unit", [1.0]), ("mask", [1]), ("first_mean", "x"),
    ],
)  # fmt: skip
def test_damaged_state_is_refused_whole(field, value):
    training = Training(steps=50)
    training.run(10)
    before = training.controller.state_dict()
    with pytest.raises(ValueError, match=field):
        training.controller.load_state_dict(before | {"count": 3, field: value})
    after = training.controller.state_dict()
    assert {k: v for k, v in after.items() if k != "mask"} == {
        k: v for k, v in before.items() if k != "mask"
    }


def test_frozen_state_before_the_models_is_refused():
    training = Training(steps=20)
    training.run(20)
    state = training.controller.state_dict()
    with pytest.raises(ValueError, match="load the model's state first"):
        Training(steps=20).controller.load_state_dict(state)


@pytest.mark.parametrize(
    "options", [{"ramp": 0.5}, {"ramp": ("a", "b")}, {"ramp": (0.5, 0.1)}, {"freeze_at": "a"}]
)
def test_shares_that_are_no_numbers_in_order_are_refused(options):
    with pytest.raises(ValueError, match=r"0 <= ramp\[0\] < ramp\[1\] <= freeze_at <= 1"):
        SparsityController(make_model(), target=0.5, steps=10, **options)
