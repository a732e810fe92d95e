"""Hard concrete gates (log alpha, drawn between 0 and 1) from patch to file."""

import copy
import io
import math

import pytest
import torch
from helpers import assert_close, assert_exact
from sgtriton_kernels import coverage, gated_linear
from sgtriton_kernels.kinds import LOG_ALPHA_LIMIT, eval_gates, gate_bounds, open_chance
from small_training import Training, allowed_error, make_model, problem, sparsity
from torch import nn

import sgtriton
from sgtriton import SparsityController
from sgtriton.control import gate_penalty
from sgtriton.layers import GatedLinear, gated_layers

KIND = "hard_concrete"
LOW, HIGH = gate_bounds(KIND)
MODELS = pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv"])


def hard_model(conv=False, block=(4, 4), spread=True, **options):
    """Gates closed, between 0 and 1, and fully open, if spread."""
    model = sgtriton.patch(make_model(conv), block, KIND, **options)
    if spread:
        for layer in gated_layers(model):
            nn.init.uniform_(layer.gate, -6, 6)
            z = eval_gates(layer.gate, KIND)
            assert layer.gate.numel() < 20 or ((z > 0) & (z < 1)).any()
    return model


def save_load(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("init", [0.7, 0.9, 1])
@MODELS
def test_eval_is_bitwise_the_dense_model_right_after_patch(conv, init, dtype):
    dense = make_model(conv).to(dtype).eval()
    x, _ = problem(conv)
    x = x.to(dtype)
    expected = dense(x)
    model = sgtriton.patch(copy.deepcopy(dense), (4, 4), KIND, init)
    assert_exact("eval", model(x), expected)
    assert all(layer.gate.dtype == torch.float32 for layer in gated_layers(model))
    model.train()
    drawn = model(x)
    assert torch.isfinite(drawn).all()
    if init < 1:
        assert not torch.equal(drawn, expected)
    assert_exact("unpatched", sgtriton.unpatch(model)(x), expected)


@MODELS
def test_training_draws_gates_that_a_seed_repeats(conv):
    model = hard_model(conv)
    x, _ = problem(conv)

    def draw(seed):
        torch.manual_seed(seed)
        return model(x)

    first = draw(1)
    assert_exact("same seed", draw(1), first)
    assert not torch.equal(draw(2), first)
    assert not torch.equal(model(x), first)  # the next draw is another
    model.eval()
    assert_exact("eval draws nothing", draw(1), draw(2))


def test_eval_multiplies_by_the_gates():
    model = hard_model().eval()
    x, _ = problem()
    layer = model[0]
    assert isinstance(layer, GatedLinear)
    z = eval_gates(layer.gate.detach(), KIND).repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert_exact("weight", layer.eval_weight(), layer.weight * z)
    expected = nn.functional.linear(x, layer.weight * z, layer.bias)
    assert_close("layer", layer(x).detach(), expected.detach())


def test_mean_of_the_draws_is_their_expectation():
    layer = sgtriton.GatedLinear(8, 4, bias=False, block=(2, 2), gate=KIND)
    nn.init.uniform_(layer.gate, -3, 3)
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    noise = u.log() - (1 - u).log()
    s = torch.sigmoid((noise + layer.gate.detach().double()[..., None]) / (2 / 3))
    z = (1.2 * s - 0.1).clamp(0, 1)
    mean = z.mean(-1).repeat_interleave(2, 0).repeat_interleave(2, 1)
    samples, x = 2000, torch.eye(8)
    total = torch.zeros(8, 4, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(samples):
            total += layer(x)
    error = (total / samples).T - layer.weight.detach().double() * mean
    assert (error.abs() <= 5 * layer.weight.abs() * 0.5 / samples**0.5).all()


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@MODELS
def test_gates_stay_within_their_bounds(conv, optimizer):
    model = hard_model(conv)
    x, y = problem(conv)
    optimizer = optimizer([layer.gate for layer in gated_layers(model)], lr=50.0)
    sign = 1
    for _ in range(2):
        optimizer.zero_grad()
        ((model(x) - y).square().mean() + sign * gate_penalty(model, l1=1.0)).backward()
        optimizer.step()
        for layer in gated_layers(model):
            assert LOW <= layer.gate.min() <= layer.gate.max() <= HIGH + 1e-6
            if sign == 1:  # the steps are long enough to leave them
                at_bounds = torch.isclose(layer.gate, torch.tensor(LOW))
                assert at_bounds.any()
        sign = -sign


def test_state_dict_writes_gates_clipped_to_their_bounds():
    model = hard_model()
    with torch.no_grad():
        model[0].gate[0, 0], model[0].gate[1, 1] = 9.0, -9.0
    model.eval()
    x, _ = problem()
    before = model(x)
    state = model.state_dict()
    assert state["0.gate"].max().item() == pytest.approx(LOG_ALPHA_LIMIT)
    assert state["0.gate"].min().item() == pytest.approx(-LOG_ALPHA_LIMIT)
    assert_exact("out", model(x), before)


@MODELS
def test_state_loads_bitwise_through_a_file(conv):
    model, again = hard_model(conv), hard_model(conv, spread=False)
    again.load_state_dict(save_load(model.state_dict()))
    for (name, p), (_, q) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert_exact(name, q, p)
    x, _ = problem(conv)
    assert_exact("out", again.eval()(x), model.eval()(x))


@pytest.mark.parametrize("other", ["threshold", "bernoulli"])
def test_state_of_another_kind_is_refused_both_ways(other):
    hard, model = hard_model(), sgtriton.patch(make_model(), (4, 4), other)
    before = {name: t.clone() for name, t in hard.state_dict().items()}
    with pytest.raises(ValueError, match=f"{other}.*{KIND}"):
        hard.load_state_dict(save_load(model.state_dict()))
    with pytest.raises(ValueError, match=f"{KIND}.*{other}"):
        model.load_state_dict(save_load(hard.state_dict()))
    for name, t in hard.state_dict().items():
        assert_exact(name, t, before[name])


def test_dense_checkpoint_loads_with_gates_at_init():
    dense, model = make_model(), hard_model(init=0.8)
    model.load_state_dict(dense.state_dict())
    x, _ = problem()
    assert_exact("eval", model.eval()(x), dense(x))
    chance_of_1 = 1 - open_chance(-model[0].gate.detach(), KIND)
    assert_close("init", chance_of_1, torch.full_like(chance_of_1, 0.8))


LANDINGS = [
    ("Adam", (1, 1), False, 200),
    ("Adam", (4, 4), False, 200),
    ("Adam", (1, None), False, 200),
    ("Adam", (2, 2), True, 300),
    ("SGD momentum", (1, None), True, 100),
    ("SGD momentum", (4, 4), False, 200),
]


@pytest.mark.parametrize(("optimizer", "block", "conv", "steps"), LANDINGS)
def test_training_lands_on_the_target(optimizer, block, conv, steps):
    training = Training(optimizer, block, KIND, conv, steps, target=0.7)
    first = training.step()
    before = training.run_until_freeze()
    last = training.run(steps - int(0.7 * steps))
    model = training.model
    assert abs(sparsity(model) - 0.7) <= allowed_error(model)
    if optimizer == "Adam" or not conv:
        assert abs(before - 0.3) <= 0.05 + allowed_error(model)
    assert math.isfinite(last)
    assert last < first
    for layer in gated_layers(model):
        assert layer.frozen
        assert layer.gate.grad is None
        assert not layer.gate.requires_grad
        assert layer.decided(layer.gate)
        assert layer.open_gates().any()  # every layer keeps a block
        assert_exact("closed weights", layer.gated_weight(), layer.eval_weight())


@pytest.mark.parametrize("scale", [1000.0, 0.001])
def test_scale_of_the_loss_does_not_change_the_landing(scale):
    training = Training(block=(4, 4), gate=KIND, steps=200, target=0.7, scale=scale)
    before = training.run_until_freeze()
    assert abs(before - 0.3) <= 0.05
    assert abs(sparsity(training.model) - 0.7) <= allowed_error(training.model)


@pytest.mark.parametrize("init", [0.7, 1.0])
def test_training_lands_from_any_init(init):
    torch.manual_seed(3)
    x, y = problem()
    model = hard_model(block=(2, 2), spread=False, init=init)
    optimizer = torch.optim.Adam(sgtriton.param_groups(model, 0.03))
    controller = SparsityController(model, 0.7, steps=200)
    density = 1.0
    while not controller.frozen:
        density = controller.density
        ((model(x) - y).square().mean() + controller.penalty()).backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    assert abs(density - 0.3) <= 0.05 + allowed_error(model)
    assert abs(sparsity(model) - 0.7) <= allowed_error(model)


def test_rates_are_those_of_gates_between_0_and_1():
    """Moved as ``(gate - LOW) / (HIGH - LOW)``, at the rate that others have."""
    span = HIGH - LOW
    hard, plain = hard_model(), sgtriton.patch(make_model(), (4, 4), "bernoulli")
    for optimizer, factor in ((torch.optim.Adam, span), (torch.optim.SGD, span**2)):
        groups = sgtriton.param_groups(hard, 0.01, optimizer=optimizer)
        others = sgtriton.param_groups(plain, 0.01, optimizer=optimizer)
        assert groups[0]["lr"] == others[0]["lr"] == 0.01
        for group, other in zip(groups[1:], others[1:], strict=True):
            assert group["lr"] == pytest.approx(other["lr"] * factor)
    assert sgtriton.param_groups(hard, 0.01, gate_lr=0.5)[1]["lr"] == 0.5


def test_unit_of_the_multiplier_balances_penalty_and_loss():
    training = Training(block=(4, 4), gate=KIND, steps=100)
    model = training.model
    training.controller.penalty()
    (model(training.x) - training.y).square().mean().backward()
    layers = [*gated_layers(model)]
    own = sum(layer.gate.grad.abs().sum().item() for layer in layers)
    training.optimizer.step()
    total, samples = training.controller._unit.tolist()
    assert samples == 1
    gates = [layer.gate for layer in layers]
    push = torch.autograd.grad(gate_penalty(model, l1=total), gates)
    assert sum(g.abs().sum().item() for g in push) == pytest.approx(own, rel=1e-4)


def test_penalty_is_the_expected_number_of_weights_and_closes_gates():
    model = hard_model()
    layers = [*gated_layers(model)]
    expected = sum(
        (coverage(layer.layout) * open_chance(layer.gate.detach().double(), KIND)).sum()
        for layer in layers
    )
    penalty = gate_penalty(model, l1=2.0)
    assert_close("penalty", penalty.detach(), (2 * expected).float())
    for layer, grad in zip(
        layers, torch.autograd.grad(penalty, [layer.gate for layer in layers]), strict=True
    ):
        assert (grad > 0).all()
        assert grad[layer.open_gates()].numel()
    bimodal = torch.autograd.grad(gate_penalty(model, bimodal=1.0), layers[0].gate)[0]
    assert not bimodal.any()


@MODELS
def test_freeze_keeps_eval_outputs(conv):
    """Where the projection changes nothing: each layer at its own choice of open gates."""
    model = hard_model(conv).eval()
    x, _ = problem(conv)
    before = model(x).detach()
    for layer in gated_layers(model):
        is_open, kept = layer.open_gates(), layer.eval_weight()
        layer.freeze()
        assert layer.decided(layer.gate)
        assert_exact("open", layer.open_gates(), is_open)
        assert_exact("weight", layer.weight, kept)
    assert_exact("eval", model(x), before)
    assert_exact("training", model.train()(x), before)


def test_gate_that_the_projection_opens_keeps_a_share_of_its_weights():
    layer = next(gated_layers(hard_model()))
    with torch.no_grad():
        layer.gate.fill_(-3.0)  # closed in eval, drawn open in a fifth of the steps
    chance = open_chance(layer.gate.detach(), KIND)[0, 0]
    assert not layer.open_gates().any()
    weight, mask = layer.weight.detach().clone(), torch.zeros_like(layer.gate, dtype=torch.bool)
    mask[1, 2] = True
    layer.freeze(mask)
    assert_close("opened", layer.weight[4:8, 8:12].detach(), weight[4:8, 8:12] * chance)
    assert int((layer.weight != 0).sum()) == 16
    assert_exact("eval", layer.eval_weight(), layer.weight)


def test_controller_freezes_without_changing_outputs_at_its_own_density():
    model = hard_model(block=(1, 1)).eval()
    x, _ = problem()
    before = model(x).detach()
    with torch.no_grad():
        closed = sum((~layer.open_gates()).sum().item() for layer in gated_layers(model))
    total = sum(layer.weight.numel() for layer in gated_layers(model))
    controller = SparsityController(model, target=closed / total, steps=10)
    controller.freeze()
    assert controller.frozen
    assert_exact("eval", model(x), before)


def test_thawed_gates_train_again():
    model = hard_model()
    for layer in gated_layers(model):
        layer.freeze()
        layer.thaw()
    assert gate_penalty(model, l1=1.0).requires_grad
    x, _ = problem()
    model(x).square().sum().backward()
    assert all(layer.gate.grad is not None for layer in gated_layers(model))


@pytest.mark.parametrize("frozen", [False, True], ids=["training", "frozen"])
@pytest.mark.parametrize("block", [(1, 1), (4, 4), (16, 16)])
@MODELS
def test_served_model_computes_what_the_gated_one_does_in_eval(conv, block, frozen, tmp_path):
    model = hard_model(conv, block).eval()
    fresh = make_model(conv).eval()
    if frozen:
        for layer in gated_layers(model):
            layer.freeze()
    x, _ = problem(conv)
    out = model(x).detach()
    dense = sgtriton.sparsify(copy.deepcopy(model), form="dense")
    # the gated layer too multiplies in fp32 and rounds once
    assert_exact("dense", dense(x), out)
    sgtriton.save(model, tmp_path / "gated.sgt")
    sgtriton.sparsify(model, form="sparse")
    served = model(x).detach()
    assert_close("served", served, out)
    sgtriton.save(model, tmp_path / "served.sgt")
    for name in ("gated", "served"):
        loaded = sgtriton.load(copy.deepcopy(fresh), tmp_path / f"{name}.sgt")
        assert_close(name, loaded(x).detach(), out)
    assert_exact("reloaded", loaded(x), served)
    assert all(
        module.gate_kind == KIND for module in loaded.modules() if hasattr(module, "gate_kind")
    )


@MODELS
def test_unpatch_folds_the_gates_in(conv):
    model = hard_model(conv).eval()
    x, _ = problem(conv)
    out = model(x).detach()
    kept = [layer.weight.detach().clone() for layer in gated_layers(model)]
    plain = sgtriton.unpatch(copy.deepcopy(model))
    for weight, module in zip(
        kept, (m for m in plain.modules() if hasattr(m, "weight")), strict=True
    ):
        assert_exact("weight", module.weight, weight)
    sgtriton.unpatch(model, fold=True)
    assert not [*gated_layers(model)]
    assert_exact("folded", model(x), out)


@pytest.mark.parametrize("cut", [3, 40, 75], ids=["start", "ramp", "frozen"])
def test_resumed_training_goes_on_as_it_would_have(cut):
    steps = 100
    whole = Training(block=(4, 4), gate=KIND, steps=steps, target=0.6)
    whole.run(cut)
    parts = whole.model, whole.optimizer, whole.controller
    states = [save_load(part.state_dict()) for part in parts]
    again = Training(block=(4, 4), gate=KIND, steps=steps, target=0.6)
    for part, state in zip((again.model, again.optimizer, again.controller), states, strict=True):
        part.load_state_dict(state)
    for step in range(cut, cut + 10):
        torch.manual_seed(step)
        loss = whole.step()
        torch.manual_seed(step)
        assert again.step() == loss
    assert again.controller.statistics == whole.controller.statistics


def test_nan_gates_are_refused_by_name():
    model = hard_model()
    with torch.no_grad():
        model[2].gate[0, 1] = float("nan")
    for act in (
        lambda: sgtriton.sparsify(model),
        lambda: sgtriton.unpatch(model, fold=True),
        lambda: SparsityController(model, 0.5, steps=10),
    ):
        with pytest.raises(ValueError, match=r"2: .*NaN at gate\[0, 1\]"):
            act()


def test_summary_counts_what_eval_sees():
    model = hard_model()
    total = sum(layer.weight.numel() for layer in gated_layers(model))
    closed = sum(int((layer.eval_weight() == 0).sum()) for layer in gated_layers(model))
    for layer in gated_layers(model):
        nn.init.uniform_(layer.weight, 0.5, 1)
    assert sparsity(model) == pytest.approx(closed / total)
    statistics = SparsityController(model, 0.2, steps=10).statistics
    assert statistics.open_share == pytest.approx(1 - closed / total)
    chances = [
        (open_chance(layer.gate.detach().double(), KIND) * coverage(layer.layout)).sum().item()
        for layer in gated_layers(model)
    ]
    assert statistics.density == pytest.approx(sum(chances) / total, rel=1e-6)


def test_layer_is_the_op_in_training_and_eval():
    layer = sgtriton.GatedLinear(12, 8, block=(2, 3), gate=KIND)
    nn.init.uniform_(layer.gate, -4, 4)
    x = torch.randn(5, 12)
    arguments = x, layer.weight, layer.gate, layer.bias, (2, 3)
    torch.manual_seed(7)
    drawn = layer(x)
    torch.manual_seed(7)
    seed = torch.randint(0, 2**62, (1,))
    assert_exact("drawn", drawn, gated_linear(*arguments, kind=KIND, seed=seed))
    assert_exact("eval", layer.eval()(x), gated_linear(*arguments, kind=KIND))
