"""Training with a fixed pattern: stored values are Parameters, closed weights do not exist."""

import copy
import io
import pickle

import pytest
import torch
from helpers import assert_close, assert_exact
from torch import nn
from torch.nn.utils import prune

import sgtriton
from sgtriton import planning
from sgtriton.layers import GatedModule
from sgtriton.sparse_layers import BUCKETS, SparseModule

FORMS = ["dense", "sparse"]
# layer, block, input
CASES = [
    (lambda: nn.Linear(13, 9), (4, 4), (5, 13)),
    (lambda: nn.Linear(13, 9, bias=False), (4, None), (2, 3, 13)),
    (lambda: nn.Linear(13, 9), (1, 1), (5, 13)),
    (lambda: nn.Conv2d(5, 8, 3, padding=1), (4, 2), (2, 5, 7, 6)),
    (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 1), (2, 4, 9, 9)),
    (lambda: nn.Conv1d(4, 8, 3), (1, 1), (2, 4, 11)),
]


@torch.no_grad()
def gated(make, block, share=0.5):
    model = sgtriton.patch(nn.Sequential(make()), block=block)
    gate = model[0].gate
    gate.copy_((torch.rand_like(gate) < share).float())
    return model.eval()


def trainable(make=lambda: nn.Linear(13, 9), block=(4, 4), form="dense", share=0.5):
    return sgtriton.sparsify(gated(make, block, share), form=form, trainable=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("make", "block", "shape"), CASES)
def test_gradients_are_those_of_the_masked_dense_layer(make, block, shape, form):
    model = gated(make, block).double()
    dense = make().double()
    mask = sgtriton.layers.expand_gates(model[0].open_gates(), model[0].layout)
    with torch.no_grad():
        dense.weight.copy_(model[0].eval_weight())
        if dense.bias is not None:
            dense.bias.copy_(model[0].bias)
    sgtriton.sparsify(model, form=form, trainable=True)
    layer = model[0]
    assert isinstance(layer.values, nn.Parameter)
    assert layer.trainable
    x = torch.randn(shape).double()
    xs = [x.clone().requires_grad_() for _ in range(2)]
    out, ref = model(xs[0]), dense(xs[1])
    assert_close("out", out.detach(), ref.detach())
    dy = torch.randn_like(ref)
    out.backward(dy)
    ref.backward(dy)
    assert_close("dx", xs[0].grad, xs[1].grad)
    expected = layer.stored.with_values(layer.values.grad).to_dense()
    assert_close("dvalues", expected, dense.weight.grad * mask)
    if dense.bias is not None:
        assert_close("dbias", layer.bias.grad, dense.bias.grad)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("block", [(4, 4), (1, 1)])
def test_steps_of_an_optimizer_show_at_once_and_decay_reaches_no_closed_weight(form, block):
    model = trainable(block=block, form=form)
    layer, x = model[0], torch.randn(6, 13)
    assert {name for name, _ in model.named_parameters()} == {"0.values", "0.bias"}
    assert layer.dense_weight is None
    is_open = sgtriton.layers.expand_gates(layer.stored.open_gates, layer.layout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        expected = nn.functional.linear(x, layer.full_weight(), layer.bias)
        assert_close("out", model(x).detach(), expected.detach())
    assert losses[-1] < 0.5 * losses[0]
    assert not layer.full_weight()[~is_open].any()
    outside = layer.values.detach()[:, :, 1:] if block == (4, 4) else None
    if outside is not None:  # what overhangs a ragged edge stays 0
        last = layer.col[: len(layer.values)] == 3
        assert not outside[last].any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("block", [(4, 4), (1, 1)])
def test_trained_model_saves_and_loads(form, block, tmp_path):
    model = trainable(block=block, form=form)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(6, 13)).square().sum().backward()
    optimizer.step()
    sgtriton.save(model, tmp_path / "model.sgt")
    again = sgtriton.load(nn.Sequential(nn.Linear(13, 9)).eval(), tmp_path / "model.sgt")
    x = torch.randn(4, 13)
    assert not again[0].trainable
    assert {name for name, _ in again.named_parameters()} == {"0.bias"}
    assert again[0].forms == model[0].forms
    assert_exact("out", again(x).detach(), model(x).detach())
    served = sgtriton.load(model, tmp_path / "model.sgt")  # a trainable model serves again
    assert {name for name, _ in served.named_parameters()} == {"0.bias"}
    assert_exact("served", served(x).detach(), again(x).detach())


@pytest.mark.parametrize("block", [(4, 4), (1, 1)])
def test_state_has_the_same_keys_and_loads_into_the_same_parameter(block):
    model, other = trainable(block=block), trainable(block=block, share=0.9)
    serving = sgtriton.sparsify(gated(lambda: nn.Linear(13, 9), block), form="dense")
    assert set(model.state_dict()) == set(serving.state_dict())
    assert not any(t.requires_grad for t in model.state_dict().values())
    assert model.state_dict(keep_vars=True)["0.values"] is model[0].values
    parameter = model[0].values
    model(torch.randn(3, 13)).sum().backward()
    assert parameter.grad is not None
    for state in (other.state_dict(), serving.state_dict()):
        model.load_state_dict(state)
        assert model[0].values is parameter  # an optimizer may hold it
        assert parameter.requires_grad
        assert parameter.grad is None  # it had another shape
        assert_exact("values", parameter.detach(), state["0.values"])
        model(torch.randn(3, 13)).sum().backward()
        assert parameter.grad.shape == parameter.shape
    serving.load_state_dict(model.state_dict())
    x = torch.randn(4, 13)
    assert_exact("out", serving(x).detach(), model(x).detach())


def test_state_that_is_assigned_is_computed_with():
    model, other = (trainable(form="sparse") for _ in range(2))
    state = copy.deepcopy(other.state_dict())
    model.load_state_dict(state, assign=True)
    x = torch.randn(4, 13)
    assert_exact("out", model(x).detach(), other(x).detach())
    with torch.no_grad():
        model[0].values.zero_()
        assert_exact("written", model(x), model[0].bias.expand(4, 9))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_copies_train_on_their_own_with_their_optimizer(form, copy_of):
    model = trainable(form=form)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model[0].values.detach().clone()
    twin, twins = copy_of((model, optimizer))
    x = torch.randn(4, 13)
    assert_exact("out", twin(x).detach(), model(x).detach())
    twin(x).square().sum().backward()
    twins.step()
    assert not torch.equal(twin[0].values, before)
    assert_exact("original", model[0].values.detach(), before)
    assert_close(
        "trained", twin(x).detach(),
        nn.functional.linear(x, twin[0].full_weight(), twin[0].bias).detach(),
    )  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_casts_keep_the_parameter(form):
    model = trainable(form=form)
    parameter = model[0].values
    model.to(torch.bfloat16)
    assert model[0].values is parameter
    assert parameter.dtype == torch.bfloat16
    x = torch.randn(4, 13, dtype=torch.bfloat16)
    out = model(x)
    out.sum().backward()
    assert parameter.grad.dtype == torch.bfloat16
    reference = nn.functional.linear(x, model[0].full_weight(), model[0].bias)
    assert_close("out", out.detach(), reference.detach())


@pytest.mark.parametrize("through_meta", [False, True])
def test_to_empty_leaves_no_uninitialised_index(through_meta):
    model = trainable(form="sparse")
    state, x = copy.deepcopy(model.state_dict()), torch.randn(4, 13)
    out, parameter = model(x).detach(), model[0].values
    if through_meta:
        model.to("meta")
        parameter = model[0].values
    model.to_empty(device="cpu")
    assert model[0].stored.density == 0
    model.load_state_dict(state)
    assert_exact("out", model(x).detach(), out)
    assert through_meta or model[0].values is parameter


@pytest.mark.parametrize("form", FORMS)
def test_values_that_are_exchanged_for_a_call_are_used(form):
    model = trainable(form=form)
    x, other = torch.randn(4, 13), torch.randn_like(model[0].values)
    out = model(x)
    changed = torch.func.functional_call(model, {"0.values": other}, x)
    weight = model[0].stored.with_values(other).to_dense()
    assert_close(
        "changed", changed.detach(), nn.functional.linear(x, weight, model[0].bias).detach()
    )
    assert_exact("back", model(x).detach(), out.detach())


def replica(layer):
    """What torch.nn.parallel.replicate makes for another device."""
    copied = layer._replicate_for_data_parallel()
    for name, parameter in layer._parameters.items():
        setattr(copied, name, parameter * 1)
    return copied


def flattened(layer):
    """As a wrapper leaves it that keeps the Parameters of several layers in one."""
    layer.values = layer._parameters.pop("values") * 1
    return layer


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("block", [(4, 4), (1, 1)])
@pytest.mark.parametrize("change", [replica, flattened, lambda m: prune.identity(m, "values")])
def test_values_that_are_no_parameter_of_the_layer_are_used_and_trained(change, block, form):
    layer = trainable(form=form, block=block)[0]
    x = torch.randn(4, 13)
    out, values = layer(x), layer.values
    changed = change(layer)
    assert "values" not in changed._parameters
    assert_exact("out", changed(x), out)
    changed(x).sum().backward()
    assert values.grad is not None


@pytest.mark.parametrize("train", [True, False])
def test_values_that_do_not_train_give_a_weight_that_does_not(train):
    model = trainable()
    model[0].values.requires_grad_(train)
    sgtriton.unpatch(model)
    assert model[0].weight.requires_grad == train
    assert model[0].bias.requires_grad


@pytest.mark.parametrize("form", FORMS)
def test_trainable_layer_compiles_without_graph_breaks(form):
    model = trainable(form=form)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 13)
    out = compiled(x)
    assert_close("out", out.detach(), model(x).detach())
    out.sum().backward()
    expected = torch.autograd.grad(model(x).sum(), model[0].values)[0]
    assert_close("values", model[0].values.grad, expected)


def test_forms_are_timed_with_their_backward_pass(monkeypatch):
    from sgtriton import planning

    seen = []

    def times(candidates, device, seconds):
        for call in candidates:
            with monkeypatch.context() as patch:
                patch.setattr(torch.autograd, "grad", lambda *a, **k: seen.append(a[1]))
                call()
        return [1.0, 0.5][: len(candidates)]

    monkeypatch.setattr(planning, "undisturbed_ms", times)
    model = sgtriton.sparsify(gated(lambda: nn.Linear(64, 64), (4, 4)), trainable=True)
    assert model[0].form == "sparse"
    assert len(seen) == 2 * sum(map(len, planning._ROWS.values()))
    assert all(t.requires_grad for inputs in seen for t in inputs)
    assert model[0].values.grad is None


@torch.no_grad()
def test_trainable_model_of_several_layers_goes_back_to_dense_layers():
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    keys = [set(vars(m)) for m in model]
    sgtriton.patch(model, (2, 2))
    for layer in model.modules():
        if isinstance(layer, GatedModule):
            layer.gate.copy_(torch.rand_like(layer.gate))
    sgtriton.sparsify(model.eval(), form="dense", trainable=True)
    assert all(isinstance(model[i], SparseModule) for i in (0, 2))
    x = torch.randn(3, 8)
    out, dense = model(x), model[0].to_dense()
    assert type(dense) is nn.Linear
    assert dense.weight.is_leaf
    sgtriton.unpatch(model)
    assert [set(vars(m)) for m in model] == keys
    assert all(p.is_leaf for p in model.parameters())
    assert {name for name, _ in model.named_parameters()} == {
        "0.weight", "0.bias", "2.weight", "2.bias",
    }  # fmt: skip
    assert_exact("out", model(x), out)


@pytest.mark.parametrize(
    "arguments",
    [{"form": "merged"}, {"form": "compacted"}, {"form": "dense_left"}, {"serve_block": (16, 16)}],
)
def test_forms_with_copies_of_the_values_are_refused(arguments):
    model = gated(lambda: nn.Linear(64, 64), (4, 4))
    with pytest.raises(ValueError, match="trainable layers compute from their stored blocks"):
        sgtriton.sparsify(model, trainable=True, **arguments)
    assert isinstance(model[0], GatedModule)
    layer = sgtriton.sparsify(model, form="dense", trainable=True)[0]
    for form in ("merged", "compacted", "dense_left"):
        with pytest.raises(ValueError, match=r"forms must give one of \('dense', 'sparse'\)"):
            layer.set_forms(dict.fromkeys(BUCKETS, form), "a test", True)


def test_summary_counts_the_same_parameters():
    models = [gated(lambda: nn.Linear(13, 9), (4, 4)) for _ in range(2)]
    torch.manual_seed(1)
    gates = (torch.rand_like(models[0][0].gate) < 0.5).float()
    for model in models:
        model[0].gate.data.copy_(gates)
    plain, trains = (
        sgtriton.summary(sgtriton.sparsify(model, form="dense", trainable=flag))
        for model, flag in zip(models, (False, True), strict=True)
    )
    assert plain.parameters == trains.parameters == 13 * 9 + 9
    assert plain.sparsity_of_all == trains.sparsity_of_all
    assert trains.layers[0].bytes == plain.layers[0].bytes
    assert trains.layers[0].bytes_copy == 0


def test_state_of_a_trainable_model_travels_through_torch_save():
    model, other = trainable(), trainable(share=0.9)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert_exact("values", other[0].values.detach(), model[0].values.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_every_pattern_can_be_timed(share, dtype, monkeypatch):
    from sgtriton import planning

    monkeypatch.setattr(planning, "_SECONDS", 0.0)
    monkeypatch.setattr(planning, "_LONGER", 0.0)
    model = gated(lambda: nn.Linear(21, 18), (8, 8), share).to(dtype)
    layer = sgtriton.sparsify(model, trainable=True)[0]
    assert layer.measured.keys() == layer.expected.keys() == BUCKETS.keys() - {">4096"}
    assert layer.values.grad is None


def test_forms_that_were_timed_for_training_are_chosen_anew_for_serving(tmp_path, monkeypatch):
    """The loaded model kept what was faster with a backward pass: 0.7 of dense at one row."""
    monkeypatch.setattr(
        planning, "undisturbed_ms", lambda calls, *a: [2.0, *[1.0] * (len(calls) - 1)]
    )
    path = tmp_path / "trained.sgt"
    model = sgtriton.patch(nn.Sequential(nn.Linear(32, 32)), block=(8, 8))
    sgtriton.sparsify(model, trainable=True)
    assert model[0].measured
    sgtriton.save(model, path)
    monkeypatch.setattr(
        planning, "undisturbed_ms", lambda calls, *a: [1.0, *[2.0] * (len(calls) - 1)]
    )
    again = sgtriton.load(nn.Sequential(nn.Linear(32, 32)), path)
    assert again[0].form == "dense"
    fixed = sgtriton.sparsify(
        sgtriton.patch(nn.Sequential(nn.Linear(32, 32)), block=(8, 8)), "sparse", trainable=True
    )
    sgtriton.save(fixed, path)
    assert sgtriton.load(nn.Sequential(nn.Linear(32, 32)), path)[0].form == "sparse"
