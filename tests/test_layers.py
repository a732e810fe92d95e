import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from helpers import assert_close, assert_exact
from sgtriton_kernels import expand_gates
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import sgtriton
from sgtriton import GatedConv1d, GatedConv2d, GatedLinear

KINDS = ["threshold", "bernoulli"]


def gated(layer: Any, block=(2, 2), gate="threshold", closed=True) -> Any:
    """The layer gated in place, about half of its gates closed at random."""
    sgtriton.patch(layer, block=block, gate=gate)
    if closed:
        with torch.no_grad():
            layer.gate.copy_(torch.rand_like(layer.gate))
    return layer


def masked(layer):
    """The same layer in plain PyTorch: weight times mask, straight-through to the gate.

    Returns:
        (weight, gate, bias, the product), all but the last leaves.
    """
    weight = layer.weight.detach().clone().requires_grad_()
    gate = layer.gate.detach().clone().requires_grad_()
    bias = None if layer.bias is None else layer.bias.detach().clone().requires_grad_()
    through = (gate > 0.5).float() + gate - gate.detach()
    return weight, gate, bias, weight * expand_gates(through, layer.layout)


def save_load(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def snapshot(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def assert_unchanged(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, t in before.items():
        assert_exact(name, after[name], t)


def assert_like_masked_layer(layer, x, functional):
    """Values and all gradients of the gated layer against the dense masked one."""
    x_ref = x.detach().clone().requires_grad_()
    x = x.detach().clone().requires_grad_()
    weight, gate, bias, product = masked(layer)
    out, ref = layer(x), functional(x_ref, product, bias)
    assert_close("out", out, ref)
    dout = torch.randn_like(ref)
    leaves = [p for p in (layer.weight, layer.gate, layer.bias) if p is not None]
    leaves_ref = [p for p in (weight, gate, bias) if p is not None]
    grads = torch.autograd.grad(out, [x, *leaves], dout)
    grads_ref = torch.autograd.grad(ref, [x_ref, *leaves_ref], dout)
    for name, grad, ref in zip(("dx", "dweight", "dgate", "dbias"), grads, grads_ref, strict=False):
        assert_close(name, grad, ref)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("block", [(1, 1), (4, 4), (1, None), (None, 1)])
@pytest.mark.parametrize("x_shape", [(5, 13), (13,), (2, 3, 13), (0, 13), (1, 13)])
def test_gated_linear_matches_the_masked_layer(x_shape, block, bias):
    layer = gated(nn.Linear(13, 7, bias=bias), block)
    assert_like_masked_layer(layer, torch.randn(x_shape), nn.functional.linear)


CONV2D = {
    "plain": {},
    "stride": {"stride": (2, 1)},
    "padding": {"padding": (0, 2)},
    "same": {"padding": "same", "dilation": 2},
    "same dilated grouped": {"padding": "same", "dilation": 2, "groups": 2},
    "valid": {"padding": "valid"},
    "dilation": {"dilation": (1, 2)},
    "groups": {"groups": 2},
    "depthwise": {"groups": 4},
    "no bias": {"bias": False},
    "circular": {"padding": (0, 1), "padding_mode": "circular"},
    "reflect": {"padding": (2, 1), "padding_mode": "reflect"},
    "replicate": {"padding": (2, 1), "padding_mode": "replicate"},
    "zeros same reflect": {"padding": "same", "padding_mode": "reflect", "dilation": (1, 2)},
}


@pytest.mark.parametrize("options", CONV2D.values(), ids=CONV2D)
@pytest.mark.parametrize("batch", [(2,), (), (0,)], ids=["batch", "unbatched", "empty"])
def test_gated_conv2d_matches_the_masked_layer(options, batch):
    layer = gated(nn.Conv2d(4, 8, (3, 2), **options), (3, 2))
    dense = nn.Conv2d(4, 8, (3, 2), **options)
    x = torch.randn(*batch, 4, 9, 8)
    assert_like_masked_layer(layer, x, dense._conv_forward)


CONV1D = {
    "plain": {},
    "stride padding": {"stride": 2, "padding": 1},
    "same dilated": {"padding": "same", "dilation": 2},
    "groups": {"groups": 2},
    "circular": {"padding": 2, "padding_mode": "circular"},
    "reflect": {"padding": 1, "padding_mode": "reflect", "bias": False},
    "replicate": {"padding": 1, "padding_mode": "replicate"},
}


@pytest.mark.parametrize("options", CONV1D.values(), ids=CONV1D)
@pytest.mark.parametrize("batch", [(2,), ()], ids=["batch", "unbatched"])
def test_gated_conv1d_matches_the_masked_layer(options, batch):
    layer = gated(nn.Conv1d(4, 6, 3, **options), (2, 2))
    dense = nn.Conv1d(4, 6, 3, **options)
    assert_like_masked_layer(layer, torch.randn(*batch, 4, 11), dense._conv_forward)


@pytest.mark.parametrize("block", [(1, 1), (1, None), (None, 1), (None, None), (32, 32)])
def test_conv_gates_of_every_block_match_the_masked_layer(block):
    layer = gated(nn.Conv2d(6, 4, 3, groups=2), block)
    dense = nn.Conv2d(6, 4, 3, groups=2)
    assert_like_masked_layer(layer, torch.randn(2, 6, 5, 5), dense._conv_forward)


def test_circular_padding_pads_the_axis_that_was_asked_for():
    """O07: (0, 1) pads the width."""
    layer = nn.Conv2d(6, 1, (3, 3), padding=(0, 1), padding_mode="circular")
    x = torch.randn(1, 6, 20, 10)
    ref = layer(x)
    out = gated(layer, closed=False)(x)
    assert out.shape == (1, 1, 18, 10)
    assert_exact("out", out, ref)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_output_is_bitwise_the_same_right_after_patch(dtype, training):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    model.to(dtype).train(training)
    x = torch.randn(4, 3, 8, 8, dtype=dtype)
    ref = model(x)
    sgtriton.patch(model, block=(4, 4))
    assert_exact("out", model(x), ref)


def test_bernoulli_gates_change_nothing_in_eval_right_after_patch():
    model = nn.Sequential(nn.Linear(16, 16), nn.Conv1d(1, 2, 3)).eval()
    x = torch.randn(4, 1, 16)
    ref = model(x)
    assert_exact("out", sgtriton.patch(model, (2, 2), "bernoulli", init=0.6)(x), ref)


def test_bernoulli_eval_opens_gates_above_one_half_only():
    layer = gated(nn.Linear(4, 1, bias=False), (1, 1), "bernoulli")
    with torch.no_grad():
        layer.weight.fill_(1)
        layer.gate.copy_(torch.tensor([[0.4, 0.5, 0.500001, 1.0]]))
    layer.eval()
    assert layer.gated_weight().tolist() == [[0, 0, 1, 1]]


def test_bernoulli_draws_anew_in_training_and_repeats_under_a_seed():
    layer = gated(nn.Linear(32, 32), (1, 1), "bernoulli")
    torch.manual_seed(7)
    first, second = layer.gated_weight(), layer.gated_weight()
    torch.manual_seed(7)
    assert_exact("redrawn", layer.gated_weight(), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(64, 64), torch.randn(5, 64)),
        (nn.Conv2d(3, 16, 3), torch.randn(2, 3, 8, 8)),
    ],
    ids=["linear", "conv"],
)
def test_layer_whose_gates_are_all_closed_gives_its_bias(layer, x):
    """O06."""
    layer = gated(copy.deepcopy(layer), (32, 32))
    with torch.no_grad():
        layer.gate.zero_()
    out = layer(x.clone().requires_grad_())
    bias = layer.bias if out.dim() == 2 else layer.bias[:, None, None]
    assert_exact("out", out, bias.expand_as(out))
    out.sum().backward()
    assert layer.gate.grad.abs().sum() > 0
    assert not layer.weight.grad.any()
    again = gated(copy.deepcopy(layer))
    again.load_state_dict(save_load(layer.state_dict()))
    assert_exact("reloaded", again(x), out)


def test_closed_nan_weight_does_not_reach_output_or_input_gradient():
    layer = gated(nn.Linear(4, 4), (2, 2), closed=False)
    with torch.no_grad():
        layer.weight[:2, :2] = float("nan")
        layer.gate[0, 0] = 0
    x = torch.randn(3, 4, requires_grad=True)
    out = layer(x)
    out.sum().backward()
    assert out.isfinite().all()
    assert x.grad.isfinite().all()
    assert layer.weight.grad.isfinite().all()


def test_each_update_of_a_weight_is_seen_by_the_next_forward():
    """O17: no derived weight is cached."""
    layer = gated(nn.Linear(6, 4, bias=False), (1, 1), closed=False).eval()
    x = torch.randn(3, 6)

    def step(make, **options):
        optimizer = make([layer.weight], lr=0.1, **options)
        layer(x).square().sum().backward()
        optimizer.step()

    def write_numpy():
        layer.weight.detach().numpy()[0, 0] += 1

    updates = {
        "SGD": lambda: step(torch.optim.SGD),
        "fused AdamW": lambda: step(torch.optim.AdamW, fused=True),
        ".data": lambda: layer.weight.data.add_(1),
        "load": lambda: layer.load_state_dict({k: v + 0.01 for k, v in snapshot(layer).items()}),
        "numpy": write_numpy,
    }
    for name, update in updates.items():
        before = layer(x).detach()
        update()
        out = layer(x).detach()
        assert not torch.equal(out, before), name
        assert_exact(name, out, nn.functional.linear(x, layer.weight.detach()))


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_gives_the_dtypes_of_the_dense_layer(amp, x_dtype, kind):
    """O12."""
    layer = gated(nn.Linear(32, 16), (4, 4), kind)
    x = torch.randn(4, 32, dtype=x_dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=amp):
        out = layer(x)
    out.float().sum().backward()
    assert out.dtype == amp
    assert x.grad.dtype == x_dtype
    assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}


@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 8), lambda: nn.Conv1d(8, 8, 1)])
def test_autocast_gives_the_values_of_the_dense_layer(make):
    layer = make()
    dense = copy.deepcopy(layer)
    gated(layer, (4, 4))
    with torch.no_grad():
        dense.weight.copy_(layer.eval_weight())
    x = torch.randn(8, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_exact("out", layer(x), dense(x))


def test_autocast_leaves_fp64_layers_alone():
    layer = gated(nn.Linear(8, 4, dtype=torch.float64), (2, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.gated_weight().dtype == torch.float64


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 4), lambda: nn.Conv1d(6, 4, 1)])
def test_mix_of_dtypes_outside_autocast_names_the_layer_and_both(make):
    """O12."""
    layer = gated(make())
    with pytest.raises(ValueError, match=r"Gated.*torch\.float16.*torch\.float32"):
        layer(torch.randn(6, 6).half())


CASTS = {
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "type": lambda m: m.type(torch.float16),
    "device and dtype": lambda m: m.to("cpu", torch.bfloat16),
    "channels_last": lambda m: m.to(memory_format=torch.channels_last, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_gates_and_their_grads_stay_fp32_when_the_model_is_cast(cast):
    """O13."""
    model = gated_model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Flatten(), nn.Linear(16, 3))
    sgtriton.patch(model, block=(2, 2))
    model(torch.randn(2, 2, 2, 2)).sum().backward()
    gates = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("gate")}
    assert cast(model) is gated_model
    for name, parameter in model.named_parameters():
        is_gate = name in gates
        assert (parameter.dtype == torch.float32) == is_gate, name
        assert (parameter.grad.dtype == torch.float32) == is_gate, name
        if is_gate:
            assert_exact(name, parameter, gates[name])
    dtype = model[2].weight.dtype
    model.zero_grad()
    out = model(torch.randn(2, 2, 2, 2, dtype=dtype))
    out.sum().backward()
    assert out.dtype == dtype
    assert model[2].gate.grad.dtype == torch.float32


def test_gates_of_a_bf16_model_move_by_small_steps():
    """O13: in bf16 0.9 - 0.001 rounds to 0.9 again."""
    layer = gated(nn.Linear(8, 8), (1, 1), closed=False).to(torch.bfloat16)
    optimizer = torch.optim.SGD([layer.gate], lr=1e-3)
    for _ in range(100):
        layer.gate.grad = torch.ones_like(layer.gate)
        optimizer.step()
    assert (layer.gate - 0.8).abs().max() <= 0.001


def test_meta_layer_gets_real_gates_by_to_empty_and_load():
    with torch.device("meta"):
        model = sgtriton.patch(nn.Sequential(nn.Linear(6, 4), nn.Conv1d(2, 2, 1)), (2, 2))
    assert model[0].gate.is_meta
    assert model.to(torch.bfloat16)[0].gate.dtype == torch.float32
    model = model.float().to_empty(device="cpu")
    assert model[0].gate.dtype == torch.float32
    source = gated(nn.Linear(6, 4))
    model[0].load_state_dict(source.state_dict())
    x = torch.randn(3, 6)
    assert_exact("out", model[0](x), source(x))
    model[1].reset_parameters()
    assert (model[1].gate == 0.9).all()


def test_dense_checkpoint_assigned_to_a_meta_model_leaves_no_gate_on_meta():
    dense = nn.Sequential(nn.Linear(6, 4))
    with torch.device("meta"):
        model = sgtriton.patch(nn.Sequential(nn.Linear(6, 4)), (2, 2))
    model.load_state_dict(dense.state_dict(), assign=True)
    x = torch.randn(3, 6)
    assert_exact("out", model(x), dense(x))


def test_default_dtype_does_not_reach_the_gates():
    torch.set_default_dtype(torch.float64)
    try:
        layer = GatedLinear(4, 3, block=(1, 1))
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.weight.dtype == torch.float64
    assert layer.gate.dtype == torch.float32


def test_state_dict_keeps_the_keys_and_adds_the_gates():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Conv2d(2, 2, 1, bias=False))
    before = [*model.state_dict()]
    sgtriton.patch(model, (2, 2))
    assert {*model.state_dict()} == {*before, "0.gate", "2.gate"}


def test_state_dict_writes_clipped_gates_that_still_alias_the_layers():
    layer = gated(nn.Linear(4, 1), (1, 1))
    with torch.no_grad():
        layer.gate.copy_(torch.tensor([[-3.0, 0.25, 1.5, 1.0]]))
    before = layer(torch.ones(4))
    state = layer.state_dict()
    assert state["gate"].tolist() == [[0, 0.25, 1, 1]]
    assert_exact("out", layer(torch.ones(4)), before)
    state["gate"].mul_(0.5)  # an in-place EMA through the state dict
    assert layer.gate.tolist() == [[0, 0.125, 0.5, 0.5]]


def test_state_dict_between_forward_and_backward_does_not_break_backward():
    layer = gated(nn.Linear(4, 4))
    with torch.no_grad():
        layer.gate[0, 0] = 2.0
    out = layer(torch.randn(2, 4))
    layer.state_dict()
    out.sum().backward()
    assert layer.gate.grad is not None


@pytest.mark.parametrize("kind", KINDS)
def test_gated_state_loads_bitwise_through_a_file(kind):
    model = sgtriton.patch(nn.Sequential(nn.Linear(9, 6), nn.Linear(6, 3)), (2, 2), kind)
    for layer in model:
        nn.init.uniform_(layer.gate)
    again = sgtriton.patch(nn.Sequential(nn.Linear(9, 6), nn.Linear(6, 3)), (2, 2), kind)
    again.load_state_dict(save_load(model.state_dict()))
    assert_unchanged(again, snapshot(model))
    x = torch.randn(4, 9)
    assert_exact("out", again.eval()(x), model.eval()(x))


def test_dense_checkpoint_loads_into_a_gated_model_with_gates_at_init():
    """O18."""
    dense = nn.Sequential(nn.Linear(9, 6), nn.Conv1d(3, 4, 1))
    model = copy.deepcopy(dense)
    sgtriton.patch(model, (2, 2), init=0.75)
    for layer in model:
        nn.init.zeros_(layer.gate)
        nn.init.zeros_(layer.weight)
    given = dense.state_dict()
    model.load_state_dict(given)
    assert [*given] == [*dense.state_dict()]  # the caller's dict is as it was
    for layer, ref in zip(model, dense, strict=True):
        assert (layer.gate == 0.75).all()
        assert_exact("weight", layer.weight, ref.weight)


def test_dense_checkpoint_thaws_frozen_gates():
    layer = gated(nn.Linear(4, 4))
    layer.freeze()
    layer.load_state_dict(nn.Linear(4, 4).state_dict())
    assert not layer.frozen
    assert layer.gate.requires_grad
    assert (layer.gate == 0.9).all()


def test_pruned_checkpoint_keeps_its_pattern_through_load_and_decayed_steps():
    """O18."""
    layer = gated(nn.Linear(64, 64), (16, 16))
    with torch.no_grad():
        layer.gate.copy_((torch.randperm(16) >= 11).reshape(4, 4))
    layer.freeze()
    again = gated(nn.Linear(64, 64), (16, 16), closed=False)
    again.load_state_dict(save_load(layer.state_dict()))
    optimizer = torch.optim.SGD(again.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(10):
        optimizer.zero_grad()
        again(torch.randn(8, 64)).square().sum().backward()
        optimizer.step()
    assert_exact("gate", again.gate, layer.gate)
    assert int((again.gate == 0).sum()) == 11
    closed = expand_gates(layer.gate == 0, layer.layout)
    assert not again.gated_weight()[closed].any()


def test_gates_without_a_weight_in_the_state_stay_as_they_are():
    layer = gated(nn.Linear(4, 4))
    layer.freeze()
    before = snapshot(layer)
    layer.load_state_dict({}, strict=False)
    assert layer.frozen
    assert_unchanged(layer, before)


def test_state_as_a_plain_dict_keeps_frozen_gates_frozen():
    layer = gated(nn.Linear(4, 4))
    layer.freeze()
    again = gated(nn.Linear(4, 4))
    again.freeze()
    again.load_state_dict(dict(layer.state_dict()))
    assert again.frozen
    undecided = {**layer.state_dict(), "gate": torch.full((2, 2), 0.7)}
    again.load_state_dict(undecided)
    assert not again.frozen


def hostile_states():
    def another_kind(state):
        state._metadata["layer.1"]["gate_kind"] = "bernoulli"

    def nan_gate(state):
        state["layer.1.gate"] = state["layer.1.gate"].clone()
        state["layer.1.gate"][1, 1] = float("nan")

    def other_shape(state):
        state["layer.1.gate"] = torch.full((6, 6), 0.9)

    def other_block(state):
        state._metadata["layer.1"]["gate_block"] = (5, 4)

    return {f.__name__: f for f in (another_kind, nan_gate, other_shape, other_block)}


HOSTILE = hostile_states()


def model_of_three():
    """An ungated layer first, then a gated one, then the one that a hostile state is for."""
    body = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model = nn.ModuleDict({"norm": nn.LayerNorm(6), "layer": body})
    return sgtriton.patch(model, block=(4, 4))


@pytest.mark.parametrize("spoil", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("copied", [False, True], ids=["model", "deepcopy"])
def test_state_that_does_not_fit_is_refused_and_changes_nothing(spoil, copied):
    model = model_of_three()
    if copied:
        model = copy.deepcopy(model)
    before = snapshot(model)
    other = model_of_three()
    for parameter in other.parameters():
        nn.init.uniform_(parameter)
    state = other.state_dict()
    model_copy = copy.deepcopy(model)
    model_copy.load_state_dict(state)  # it would fit
    spoil(state)
    with pytest.raises(ValueError, match=r"^layer\.1: "):
        model.load_state_dict(state)
    assert_unchanged(model, before)


def test_state_of_another_block_with_gates_of_the_same_shape_is_refused():
    four, five = gated(nn.Linear(6, 6), (4, 4)), gated(nn.Linear(6, 6), (5, 5))
    assert four.gate.shape == five.gate.shape
    before = snapshot(four)
    with pytest.raises(ValueError, match=r"block \(5, 5\).*\(4, 4\)"):
        four.load_state_dict(save_load(five.state_dict()))
    assert_unchanged(four, before)


def test_block_cut_to_the_layer_is_the_same_block():
    whole, large = gated(nn.Linear(6, 6), (None, None)), gated(nn.Linear(6, 6), (32, 32))
    large.load_state_dict(save_load(whole.state_dict()))
    assert_exact("gate", large.gate, whole.gate)


def test_half_gates_in_a_file_load_as_fp32():
    layer = gated(nn.Linear(4, 4))
    state = {**layer.state_dict(), "gate": torch.full((2, 2), 0.25).half()}
    layer.load_state_dict(state)
    assert layer.gate.dtype == torch.float32
    assert (layer.gate == 0.25).all()


@pytest.mark.parametrize(
    "make_copy",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["deepcopy", "pickle"],
)
@pytest.mark.parametrize("frozen", [False, True], ids=["training", "frozen"])
def test_copy_works_after_a_step_and_is_independent(make_copy, frozen):
    """O19."""
    model = sgtriton.patch(nn.Sequential(nn.Linear(4, 4), nn.Conv1d(1, 2, 1)), (2, 2))
    if frozen:
        for layer in model:
            layer.freeze()
    x = torch.randn(2, 1, 4)
    model(x).sum().backward()
    twin = make_copy(model)
    out = model(x)
    assert_exact("copy", twin(x), out)
    assert twin[0].frozen == frozen
    assert twin[0].gate.requires_grad != frozen
    with torch.no_grad():
        twin[0].gate.zero_()
    assert_exact("original", model(x), out)
    assert not torch.equal(twin(x), out)
    twin(x).sum().backward()


def test_averaged_model_averages_weights_and_gates():
    """O19."""
    model = sgtriton.patch(nn.Sequential(nn.Linear(4, 4)), (2, 2))
    average = AveragedModel(model)
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for _ in range(3):
        for name, parameter in model.named_parameters():
            nn.init.uniform_(parameter)
            sums[name] += parameter.detach()
        average.update_parameters(model)
    for name, parameter in average.module.named_parameters():
        assert_close(name, parameter.detach(), sums[name] / 3)
    assert average(torch.randn(2, 4)).shape == (2, 4)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_recomputes_the_same_mask(kind, reentrant):
    """O15."""
    layer = gated(nn.Linear(8, 4), (1, 1), kind)
    nn.init.constant_(layer.gate, 0.6)
    x = torch.randn(5, 8, requires_grad=True)

    def step(run):
        torch.manual_seed(0)
        out = run(x)
        torch.rand(3)  # somebody else draws in between
        grads = torch.autograd.grad if not reentrant else backward
        return out.detach(), grads(out.square().sum(), [x, *layer.parameters()])

    def backward(loss, tensors):  # reentrant checkpoints know .backward() only
        for t in tensors:
            t.grad = None
        loss.backward()
        return [t.grad.clone() for t in tensors]

    out, grads = step(lambda x: checkpoint(layer, x, use_reentrant=reentrant))
    ref, grads_ref = step(layer)
    assert_exact("out", out, ref)
    for grad, grad_ref in zip(grads, grads_ref, strict=True):
        assert_exact("gradient", grad, grad_ref)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_model_gives_eager_values_and_gradients(kind):
    """O25, with ``aot_eager``."""
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Unflatten(1, (4, 4)), nn.Conv1d(4, 2, 3))
    sgtriton.patch(model, (4, 4), kind)
    x = torch.randn(8, 16, requires_grad=True)
    if kind == "bernoulli":
        model.eval()
    inputs = [x, *model.parameters()]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out, ref = compiled(x), model(x)
    assert_exact("out", out, ref)
    dout = torch.randn_like(ref)
    for grad, grad_ref in zip(
        torch.autograd.grad(out, inputs, dout), torch.autograd.grad(ref, inputs, dout), strict=True
    ):
        assert_exact("gradient", grad, grad_ref)


def test_compiled_bernoulli_training_draws_anew():
    layer = gated(nn.Linear(16, 16, bias=False), (1, 1), "bernoulli")
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.eye(16)
    first, second = compiled(x), compiled(x)
    assert not torch.equal(first, second)
    allowed = (first == layer.weight.T) | (first == 0)
    assert allowed.all()


def test_batch_sizes_do_not_recompile():
    """O27, of the layers: once dynamic, always the same graph."""
    model = sgtriton.patch(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), (4, 4))
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    for batch in (2, 3, 16, 17, 64):
        compiled(torch.randn(batch, 8)).sum().backward()
    assert counter.frame_count == 1


def test_compiled_model_sees_a_freeze():
    layer = gated(nn.Linear(8, 8), (4, 4), "bernoulli")
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 8)
    compiled(x)
    layer.freeze()
    assert_exact("frozen", compiled(x), nn.functional.linear(x, layer.eval_weight(), layer.bias))


@pytest.mark.parametrize("kind", KINDS)
def test_freeze_makes_gates_binary_and_closed_weights_zero(kind):
    layer = gated(nn.Linear(8, 6), (2, 4), kind)
    layer(torch.randn(3, 8)).sum().backward()
    is_open = layer.gate > 0.5
    kept = layer.eval_weight()
    layer.freeze()
    assert layer.frozen
    assert_exact("gate", layer.gate, is_open.float())
    assert_exact("weight", layer.weight, kept)
    assert not layer.gate.requires_grad
    assert layer.gate.grad is None
    out = layer(torch.randn(3, 8))
    out.sum().backward()
    assert layer.gate.grad is None
    assert_exact("training", layer.gated_weight(), kept)  # nothing is drawn any more


def test_thaw_lets_gates_train_again():
    layer = gated(nn.Linear(4, 4))
    layer.freeze()
    layer.thaw()
    layer(torch.randn(3, 4)).sum().backward()
    assert not layer.frozen
    assert layer.gate.grad.abs().sum() > 0


@pytest.mark.parametrize("set_to_none", [True, False])
def test_momentum_and_decay_do_not_reach_the_output_through_frozen_gates(set_to_none):
    layer = gated(nn.Linear(8, 8, bias=False), (2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # decay on gates, on purpose
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5)
        for _ in range(3):
            layer(torch.randn(4, 8)).square().sum().backward()
            optimizer.step()
        layer.freeze()
        gate = layer.gate.detach().clone()
        assert 0 < gate.mean() < 1
        for _ in range(5):
            optimizer.zero_grad(set_to_none=set_to_none)
            layer(torch.randn(4, 8)).square().sum().backward()
            optimizer.step()
    assert_exact("gate", layer.gate, gate)
    closed = expand_gates(gate == 0, layer.layout)
    assert not layer.gated_weight()[closed].any()
    assert layer.gated_weight()[~closed].all()


def test_frozen_gates_survive_a_file():
    model = sgtriton.patch(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), (2, 2), "bernoulli")
    nn.init.uniform_(model[0].gate)
    model[0].freeze()
    again = sgtriton.patch(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), (2, 2), "bernoulli")
    again.load_state_dict(save_load(model.state_dict()))
    assert [layer.frozen for layer in again] == [True, False]
    assert [layer.gate.requires_grad for layer in again] == [False, True]
    assert_unchanged(again, snapshot(model))
    model[0].thaw()
    again.load_state_dict(save_load(model.state_dict()))
    assert not again[0].frozen


@pytest.mark.parametrize(
    ("make", "dense", "x"),
    [
        (lambda: GatedLinear(6, 4, block=(2, 2)), nn.Linear, (3, 6)),
        (lambda: GatedConv1d(6, 4, 3, padding=1, block=(2, 2)), nn.Conv1d, (2, 6, 5)),
        (lambda: GatedConv2d(6, 4, 3, groups=2, block=(1, None)), nn.Conv2d, (2, 6, 5, 5)),
    ],
    ids=["linear", "conv1d", "conv2d"],
)
def test_layers_made_by_hand_compute_what_their_dense_layer_does(make, dense, x):
    layer = make()
    assert isinstance(layer, dense)
    assert (layer.gate == 0.9).all()
    x = torch.randn(x)
    out = layer(x)
    sgtriton.unpatch(layer)
    assert type(layer) is dense
    assert_exact("out", layer(x), out)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"block": (0, 4)}, "block sides"),
        ({"block": 4}, "pair"),
        ({"gate": "sigmoid"}, r"gate kind.*'sigmoid'"),
        ({"init": 0.5}, r"init must be in \(0.5, 1\]"),
        ({"init": 1.01}, "init"),
        ({"init": float("nan")}, "init"),
    ],
)
def test_layers_refuse_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        GatedLinear(4, 4, **options)
    with pytest.raises(ValueError, match=match):
        GatedConv2d(4, 4, 3, **options)


def test_repr_shows_block_kind_and_freeze():
    layer = GatedConv2d(4, 6, 3, block=(1, None), gate="bernoulli")
    assert "block=1xfull, gate=bernoulli" in repr(layer)
    layer.freeze()
    assert "frozen" in repr(layer)
