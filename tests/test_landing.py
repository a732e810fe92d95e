import math

import pytest
import torch
from helpers import assert_exact
from small_training import Training, allowed_error, sparsity

import sgtriton
from sgtriton.layers import gated_layers

LANDINGS = [
    ("Adam", (1, 1), "threshold", False, 200),
    ("Adam", (4, 4), "threshold", False, 200),
    ("Adam", (1, 1), "bernoulli", False, 200),
    ("Adam", (1, None), "bernoulli", False, 200),
    ("Adam", (2, 2), "threshold", True, 300),
    ("SGD momentum", (1, None), "threshold", True, 100),
    ("SGD momentum", (4, 4), "bernoulli", False, 200),
]


@pytest.mark.parametrize(("optimizer", "block", "gate", "conv", "steps"), LANDINGS)
def test_training_lands_on_the_target(optimizer, block, gate, conv, steps):
    training = Training(optimizer, block, gate, conv, steps, target=0.7)
    first = training.step()
    before = training.run_until_freeze()
    last = training.run(steps - int(0.7 * steps))
    model = training.model
    assert abs(sparsity(model) - 0.7) <= allowed_error(model)
    assert training.controller.density == pytest.approx(1 - sparsity(model), abs=1e-6)
    if optimizer == "Adam":  # SGD has its own test below
        assert abs(before - 0.3) <= 0.05 + allowed_error(model)
    assert math.isfinite(last)
    assert last < first
    for layer in gated_layers(model):
        assert layer.frozen
        assert layer.gate.grad is None
        assert not layer.gate.requires_grad
        assert {*layer.gate.unique().tolist()} <= {0.0, 1.0}
        assert layer.gate.any()  # every layer keeps a block
        assert_exact("closed weights", layer.gated_weight(), layer.eval_weight())


@pytest.mark.parametrize("scale", [1000.0, 0.001])
def test_scale_of_the_loss_does_not_change_the_landing(scale):
    training = Training(steps=200, target=0.7, scale=scale)
    before = training.run_until_freeze()
    assert abs(before - 0.3) <= 0.05
    assert abs(sparsity(training.model) - 0.7) <= 0.005


def test_scale_of_the_loss_does_not_change_the_landing_under_sgd():
    before = []
    for scale in (1.0, 1000.0, 0.001):
        training = Training("SGD momentum", steps=150, target=0.7, scale=scale)
        before.append(training.run_until_freeze())
        assert abs(sparsity(training.model) - 0.7) <= 0.005
    assert max(before) - min(before) <= 0.05


def test_density_follows_the_schedule_in_a_short_training_with_momentum():
    training = Training("SGD momentum", steps=200, target=0.7)
    assert abs(training.run_until_freeze() - 0.3) <= 0.05


def test_gradient_accumulation_lands_like_whole_batches():
    training = Training(steps=200, target=0.7)
    before = 1.0
    for _ in range(200):
        if not training.controller.frozen:
            before = training.controller.density
        for part in (slice(0, 128), slice(128, 256)):
            loss = (training.model(training.x[part]) - training.y[part]).square().mean()
            ((loss + training.controller.penalty()) / 2).backward()
        training.optimizer.step()
        training.controller.step()
        training.optimizer.zero_grad()
    assert abs(before - 0.3) <= 0.05
    assert abs(sparsity(training.model) - 0.7) <= 0.005


def test_steps_that_a_grad_scaler_skips_do_not_spoil_the_control():
    """Overflowing gradients of a skipped step are no measurement."""
    training = Training(steps=200, target=0.7)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, backoff_factor=2.0**-40)
    skipped, before = 0, 1.0
    for _ in range(200):
        if not training.controller.frozen:
            before = training.controller.density
        loss = (training.model(training.x) - training.y).square().mean() * 1000
        scaler.scale(loss + training.controller.penalty()).backward()
        scaler.step(training.optimizer)
        scale = scaler.get_scale()
        scaler.update()
        skipped += scaler.get_scale() < scale
        training.controller.step()
        training.optimizer.zero_grad()
        assert math.isfinite(training.controller.statistics.multiplier)
    assert skipped >= 1
    assert abs(before - 0.3) <= 0.05
    assert abs(sparsity(training.model) - 0.7) <= 0.005


def test_layers_of_two_kinds_are_driven_together():
    torch.manual_seed(3)
    training = Training(block=(2, 2), gate="bernoulli", steps=60, target=0.7)
    first = next(iter(gated_layers(training.model)))
    first.gate_kind = "threshold"
    training.run(60)
    assert abs(sparsity(training.model) - 0.7) <= allowed_error(training.model)


def test_zero_grad_before_step_leaves_the_control_working():
    """The controller looks at gradients inside the optimizer's step, not after it."""
    training = Training(steps=200, target=0.7)
    before = 1.0
    while not training.controller.frozen:
        before = training.controller.density
        loss = (training.model(training.x) - training.y).square().mean()
        (loss + training.controller.penalty()).backward()
        training.optimizer.step()
        training.optimizer.zero_grad()
        training.controller.step()
    assert abs(before - 0.3) <= 0.05


def test_serving_before_the_gates_are_frozen_is_said():
    training = Training(steps=100, target=0.7)
    training.run(20)
    with pytest.warns(UserWarning, match=r"not frozen yet.* target of its controller is 0\.7"):
        sgtriton.sparsify(training.model)


def test_freeze_says_a_miss_and_what_it_changed():
    training = Training(block=(16, 16), steps=100, target=0.6)
    with pytest.warns(UserWarning, match=r"frozen at sparsity 0\.\d+, target 0\.6: \d+ that were"):
        training.controller.freeze()
