"""Gated model -> served model: the same outputs, whole or not at all, in the faster form."""

import copy
import logging
import pickle
import warnings

import pytest
import torch
from helpers import assert_close, assert_exact, assert_within_twice
from sgtriton_kernels import gate_layout
from torch import nn

import sgtriton
from sgtriton import planning
from sgtriton.layers import GatedModule
from sgtriton.sparse_layers import (
    BUCKETS,
    FORMS,
    BlockSparseConv2d,
    BlockSparseLinear,
    SparseModule,
)
from sgtriton.stored import StoredWeight

EXCHANGED = [(lambda: nn.Linear(64, 48), (3, 64)), (lambda: nn.Conv2d(64, 48, 3), (2, 64, 5, 5))]
BLOCKS = [(1, 1), (4, 4), (8, 2), (1, None), (None, 1), (32, 32)]


def randint(low, high):
    return int(torch.randint(low, high + 1, ()))


def pick(choices):
    return choices[randint(0, len(choices) - 1)]


@torch.no_grad()
def open_some(model):
    """Gates as training might leave them: clear and undecided ones, and layers of one kind only."""
    for layer in model.modules():
        if isinstance(layer, GatedModule):
            share = pick([0.0, 0.1, 0.5, 0.9, 1.0])
            layer.gate.copy_(torch.rand_like(layer.gate) * 0.4)
            layer.gate[torch.rand_like(layer.gate) < share] += 0.55
    return model


def random_model():
    """2 to 6 layers, convolutions first; returns the model's maker, an input, and the dtype."""
    dtype = pick([torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64])
    layers: list[nn.Module] = []
    n_conv, n_linear = pick([(0, 2), (0, 4), (1, 1), (1, 2), (2, 1), (3, 3), (2, 0)])
    channels, size = randint(1, 4), 8
    shape = (channels, size, size) if n_conv else (randint(1, 40),)
    for _ in range(n_conv):
        groups = pick([1, 1, channels])
        out = groups * randint(1, 4)
        layers += [nn.Conv2d(channels, out, 3, padding=1, groups=groups, bias=pick([True, False]))]
        layers += [nn.BatchNorm2d(out), nn.ReLU()] if randint(0, 1) else [nn.ReLU()]
        channels = out
    features = channels * size * size if n_conv else shape[0]
    if n_conv:
        layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten()]
        features = channels * 4
    for _ in range(n_linear):
        out = randint(1, 40)
        layers += [nn.Linear(features, out, bias=pick([True, True, False])), nn.Tanh()]
        features = out
    model = nn.Sequential(*layers).to(dtype)
    x = torch.randn(randint(0, 9), *shape).to(dtype)
    return model, x


@pytest.mark.parametrize("seed", range(60))
@torch.no_grad()
def test_random_models_serve_what_they_learned(seed, tmp_path):
    """Gated, sparse, saved and loaded: compared at every step, the reload bit by bit."""
    torch.manual_seed(seed)
    model, x = random_model()
    fresh = copy.deepcopy(model)
    gate = pick(["threshold", "bernoulli"])
    first, *others = [
        name for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))
    ]
    sgtriton.patch(model, block=pick(BLOCKS), gate=gate, include=first)
    sgtriton.patch(model, block=pick(BLOCKS), gate=gate, include=others or None)
    open_some(model).eval()
    out = model(x)

    dense = sgtriton.sparsify(copy.deepcopy(model), form="dense")
    assert_exact("dense", dense(x), out)
    form = "auto" if seed % 20 == 0 else pick(["sparse", "merged", "compacted", "lookup"])
    sgtriton.sparsify(model, form=form, dense_copy=pick([True, False]))
    assert not any(isinstance(m, GatedModule) for m in model.modules())
    served = model(x)
    assert_close("served", served, out)

    sgtriton.save(model, tmp_path / "model.sgt")
    for target in (fresh, sgtriton.patch(copy.deepcopy(fresh), gate=gate)):
        sgtriton.load(target.eval(), tmp_path / "model.sgt")
        assert_exact("reloaded", target(x), served)


def mlp(**kwargs):
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    return open_some(sgtriton.patch(model, **{"block": (16, 16), **kwargs}))


def test_sparsify_works_in_place_and_returns_the_model():
    model = mlp()
    layers, biases = [model[0], model[2]], [model[0].bias, model[2].bias]
    assert sgtriton.sparsify(model, form="sparse") is model
    assert [model[0], model[2]] == layers
    assert all(type(layer) is BlockSparseLinear for layer in layers)
    assert all(layer.bias is bias for layer, bias in zip(layers, biases, strict=True))
    assert {name for name, _ in model.named_parameters()} == {"0.bias", "2.bias"}
    for layer in layers:
        assert layer.gate_block == (16, 16)
        assert layer.gate_kind == "threshold"


def test_values_are_independent_of_the_trained_weight():
    model = mlp(block=(64, 64))
    model[0].gate.data.fill_(1)
    weight = model[0].weight
    kept = weight.detach().clone()
    sgtriton.sparsify(model, form="sparse")
    weight.data.zero_()
    assert_exact("weight", model[0].full_weight(), kept)


def snapshot(model):
    return [(type(m), dict(vars(m))) for m in model.modules()], {
        name: t.clone() for name, t in model.state_dict().items()
    }


def assert_unchanged(model, before):
    modules, state = before
    for module, (kind, attributes) in zip(model.modules(), modules, strict=True):
        assert type(module) is kind
        assert vars(module).keys() == attributes.keys()
    assert model.state_dict().keys() == state.keys()
    for name, t in model.state_dict().items():
        assert torch.equal(t.nan_to_num(7), state[name].nan_to_num(7)), name


@pytest.mark.parametrize("block", [(16, 16), (1, 1)])
def test_nan_gate_is_refused_with_the_layers_name_and_changes_nothing(block):
    model = mlp(block=block)
    model[2].gate.data[0, 0] = float("nan")  # the layers before it are fine
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^2: gates must be numbers, got NaN"):
        sgtriton.sparsify(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize("form", ["fast", "", None, "Sparse", 1, ["sparse"]])
def test_unknown_form_is_refused_and_changes_nothing(form):
    model = mlp()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"form must be one of \('auto', 'lookup', 'dense', .*got"):
        sgtriton.sparsify(model, form=form)
    assert_unchanged(model, before)


def test_model_without_gates_is_refused():
    for model in (
        nn.Sequential(nn.Linear(4, 4)),
        nn.ReLU(),
        sgtriton.sparsify(mlp(), form="dense"),
    ):
        with pytest.raises(ValueError, match="no gated layer"):
            sgtriton.sparsify(model)


def test_model_that_is_sparse_already_is_told_the_way_to_choose_anew():
    """It was told to patch and train."""
    model = sgtriton.sparsify(mlp(), form="dense")
    for block in (None, (16, 16)):
        with pytest.raises(ValueError, match=r"sparse already: 0, 2; .* sgtriton\.unpatch first"):
            sgtriton.sparsify(model, block=block)
    sgtriton.sparsify(sgtriton.unpatch(model), form="sparse", block=(16, 16))
    assert BlockSparseLinear in map(type, model)


class FakeTimes:
    """In place of the timer: says how much slower dense is than the other forms at each M."""

    def __init__(self, monkeypatch, speedups):
        self.speedups, self.asked, self.again = speedups, [], []
        monkeypatch.setattr(planning, "undisturbed_ms", self)

    def __call__(self, candidates, device, seconds):
        dense, *others = (call() for call in candidates)  # all must work
        for other in others:
            assert_close("candidates", other, dense)
        rows = dense.shape[0]
        (self.asked if seconds == planning._SECONDS else self.again).append(rows)
        # dense, and dense with the weight to the left; then the others
        again = seconds == planning._LONGER
        left = [] if again and self.speedups[rows] > planning._CLOSE else [self.speedups[rows]]
        times = [self.speedups[rows], *left, 1.0, *[1.01] * len(others)]
        return times[: len(candidates)]


def test_faster_form_is_taken_for_each_bucket(monkeypatch):
    """The table says dense is faster at batch 1: dense is taken there, and the summary says so."""
    times = FakeTimes(
        monkeypatch, {1: 0.5, 2: 2, 8: 0.96, 16: 1.5, 32: 1.5, 64: 3.0, 128: 3.0, 512: 0.1}
    )
    model = sgtriton.sparsify(mlp().eval(), dense_copy=True)
    assert times.asked == [1, 2, 8, 16, 32, 64, 128, 512] * 2
    for layer in (model[0], model[2]):
        assert layer.forms == {
            "1": "dense", "2-8": "dense", "9-32": "sparse", "33-128": "sparse", "129-4096": "dense",
            ">4096": "dense",
        }  # fmt: skip
        assert layer.dense_weight is not None
        for said in ("0.5x at M 1", "3x at M 33-128", "0.1x at M 129-4096"):
            assert said in layer.reason
        assert layer.measured == pytest.approx(
            {"1": 0.5, "2-8": 0.96, "9-32": 1.5, "33-128": 3.0, "129-4096": 0.1}
        )
        assert layer.expected.keys() == layer.measured.keys()
    text = " ".join(str(sgtriton.summary(model)).split())
    assert "sparse at M 9-32, 33-128; else dense" in text
    assert "0.5x at M 1" in text


@pytest.mark.parametrize(
    ("dense_ms", "form"),
    [(1 / 0.9 + 1e-6, "sparse"), (1 / 0.9 - 1e-6, "dense"), (1.0, "dense"), (1.02, "dense")],
)
def test_sparse_must_win_by_more_than_the_noise(monkeypatch, dense_ms, form):
    FakeTimes(monkeypatch, dict.fromkeys((1, 2, 8, 16, 32, 64, 128, 512), dense_ms))
    layer = sgtriton.sparsify(mlp())[0]
    assert set(layer.forms.values()) == {form}
    assert (layer.dense_weight is None) == (form == "sparse")


@pytest.mark.parametrize(
    ("dtype", "gain", "form"),
    [(torch.float32, 1.2, "dense_left"), (torch.bfloat16, 1.2, "dense"),
     (torch.bfloat16, 1.9, "dense"), (torch.bfloat16, 2.1, "dense_left")],
)  # fmt: skip
def test_copy_of_twice_the_bytes_must_win_by_more(monkeypatch, dtype, gain, form):
    """Timed alone it was 1.7 times as fast as bf16, beside other work 0.86 times."""
    monkeypatch.setattr(
        planning,
        "undisturbed_ms",
        lambda calls, *a: [gain, 1.0, *[5.0] * (len(calls) - 2)],  # dense, dense_left, others
    )
    monkeypatch.setattr(planning, "_LARGE", 4 * 64 * 48 - 1)
    layer = sgtriton.sparsify(mlp().to(dtype))[0]
    assert layer.form == form
    small = sgtriton.sparsify(nn.Sequential(mlp()[2]).to(dtype))[0]
    assert small.form == "dense_left"
    assert layer.measured["1"] == pytest.approx(gain if form == "dense_left" else gain / 5)


def test_slower_winner_with_a_smaller_margin_is_taken(monkeypatch):
    monkeypatch.setattr(
        planning, "undisturbed_ms", lambda calls, *a: [1.3, 1.0, 1.1, *[9.0] * (len(calls) - 3)]
    )
    monkeypatch.setattr(planning, "_LARGE", 0)
    layer = sgtriton.sparsify(mlp().bfloat16())[0]
    assert layer.form == "sparse"
    assert layer.measured["1"] == pytest.approx(1.3 / 1.1)


def test_form_that_gives_wrong_results_is_refused_however_fast_it_is(monkeypatch):
    model = mlp().eval()
    outs = model(x := torch.randn(5, model[0].in_features))
    real = planning._block_call

    def wrong(layer, matrix):
        call = real(layer, matrix)
        return lambda x: call(x) * (1.0 if len(x) < 64 else 1.01)  # not at every M

    monkeypatch.setattr(planning, "_block_call", wrong)
    monkeypatch.setattr(
        planning, "undisturbed_ms", lambda calls, *a: [9.0] * (len(calls) - 1) + [1.0]
    )
    with pytest.warns(UserWarning, match=r"sparse form gives other results .* \[64, "):
        sgtriton.sparsify(model)
    for layer in (model[0], model[2]):
        assert "sparse" not in layer.forms.values()
    assert_close("outs", model(x), outs)


def test_weights_that_are_no_numbers_are_timed_all_the_same():
    model = mlp().eval()
    with torch.no_grad():
        model[0].weight[0, 0] = float("inf")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*gives other results")
        sgtriton.sparsify(model)
    assert model[0].measured


@pytest.mark.parametrize(
    ("device", "block", "forms"),
    [("cuda", (4, 4), {"merged"}), ("cuda", (16, 16), {"sparse", "merged"}),
     ("cpu", (4, 4), {"sparse", "merged"})],
)  # fmt: skip
def test_cards_take_no_blocks_that_their_kernels_do_not_serve(device, block, forms):
    """By look-up they did: 4x4 blocks, which fall back to library calls there."""
    calls = dict.fromkeys(("sparse", "merged"), torch.relu)
    shares = dict.fromkeys(calls, 0.1)
    planning._drop_unserved(calls, shares, block, torch.device(device))
    assert calls.keys() == shares.keys() == forms
    alone = {"sparse": torch.relu}
    planning._drop_unserved(alone, {"sparse": 0.1}, (4, 4), torch.device(device))
    assert alone


def test_look_up_asks_as_much_of_a_copy_of_twice_the_bytes():
    layout = gate_layout((4096, 1024), (16, 16))
    shares = {"dense": 1.0, "dense_left": 1.0}
    bf16 = planning.lookup_form(layout, shares, 1, torch.bfloat16, torch.device("cpu"))
    assert bf16 == ("dense", 1.0)
    fp32, _ = planning.lookup_form(layout, shares, 1, torch.float32, torch.device("cpu"))
    assert fp32 == "dense_left"


def test_rows_that_are_timed_lie_in_their_bucket():
    lower = 0
    for bucket, end in BUCKETS.items():
        assert all(lower < rows <= end for rows in planning._ROWS[bucket])
        lower = end


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str
)
def test_every_dtype_is_timed(monkeypatch, dtype):
    times = FakeTimes(monkeypatch, dict.fromkeys((1, 2, 8, 16, 32, 64, 128, 512), 2.0))
    model = sgtriton.sparsify(mlp().to(dtype))
    assert len(times.asked) == 2 * sum(map(len, planning._ROWS.values()))
    assert model[0].form == "sparse"


def test_bias_of_another_dtype_does_not_stop_the_timing():
    """Such a layer works under autocast."""
    model = mlp().eval()
    model[0].half()
    model[0].bias.data = model[0].bias.data.float()
    x = torch.randn(3, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    sgtriton.sparsify(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert_close("served", model(x), out)


def test_fixed_forms_are_not_timed(monkeypatch):
    monkeypatch.setattr(planning, "undisturbed_ms", None)
    for form in ("sparse", "dense"):
        layer = sgtriton.sparsify(mlp(), form=form)[0]
        assert set(layer.forms.values()) == {form}
        assert layer.reason == "as asked for"
        assert layer.measured == layer.expected == {}


def test_layers_without_a_choice_are_not_timed(monkeypatch):
    monkeypatch.setattr(planning, "undisturbed_ms", None)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(16, 4))
    sgtriton.patch(model, block=(1, 1))
    served = sgtriton.sparsify(copy.deepcopy(model), form="sparse")
    assert served[0].form == served[2].form == "dense"
    assert served[0].reason == served[2].reason == "per-weight gates are computed dense"
    unpatched = sgtriton.unpatch(model, fold=True)
    conv = sgtriton.sparsify(sgtriton.patch(unpatched, block=(1, 1), include="0"))
    assert conv[0].reason == "per-weight gates are computed dense"


def test_per_weight_layers_choose_between_two_dense_products(monkeypatch):
    def times(calls, device, seconds):
        outs = [call() for call in calls]
        assert_close("candidates", outs[1], outs[0])
        return [1.0, 0.5]

    monkeypatch.setattr(planning, "undisturbed_ms", times)
    model = open_some(sgtriton.patch(nn.Sequential(nn.Linear(16, 4)), block=(1, 1)))
    layer = sgtriton.sparsify(model)[0]
    assert layer.form == "dense_left"
    assert layer.reason.startswith("dense_left against dense: 2x at M 1")


@pytest.mark.parametrize(
    ("speedups", "form", "worth"),
    [((0.99, 5.0), "dense", 0.99), ((1.0, 1.44), "sparse", 1.2), ((1.0, 1.1), "dense", 1.05)],
)
def test_a_form_must_be_slower_nowhere_in_its_bucket(monkeypatch, speedups, form, worth):
    def times(candidates, device, seconds):
        rows = candidates[0]().shape[0]
        dense = {16: speedups[0], 32: speedups[1]}.get(rows, 1.0)
        return [dense, 9.0, *[1.0] * (len(candidates) - 2)]

    monkeypatch.setattr(planning, "undisturbed_ms", times)
    monkeypatch.setattr(planning, "_CLOSE", 0.0)  # no second look
    layer = sgtriton.sparsify(mlp())[0]
    assert layer.forms == {**dict.fromkeys(BUCKETS, "dense"), "9-32": form}
    assert layer.measured["9-32"] == pytest.approx(worth, abs=2e-3)


def test_sparsify_leaves_the_random_stream_alone():
    model = mlp()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    sgtriton.sparsify(model)
    assert_exact("next draw", torch.rand(3), expected)


@torch.no_grad()
def test_bernoulli_model_serves_its_eval_numbers_in_training_too():
    model = mlp(gate="bernoulli")
    x = torch.randn(5, 64)
    out = model.eval()(x)
    sgtriton.sparsify(model.train(), form="dense")
    assert_exact("served", model(x), out)
    assert model[0].gate_kind == "bernoulli"


@torch.no_grad()
def test_frozen_model_is_served():
    model = mlp()
    for layer in (model[0], model[2]):
        layer.freeze()
    x = torch.randn(5, 64)
    out = model(x)
    sgtriton.sparsify(model, form="dense")
    assert_exact("served", model(x), out)


@pytest.mark.parametrize("form", ["sparse", "dense"])
@torch.no_grad()
def test_shared_layer_is_served_under_both_names(form, tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(32, 32)
            self.head = nn.Linear(32, 4)
            self.b = self.a

        def forward(self, x):
            return self.head(self.b(torch.relu(self.a(x))))

    model = open_some(sgtriton.patch(Twice(), block=(8, 8))).eval()
    x = torch.randn(5, 32)
    out = model(x)
    sgtriton.save(model, tmp_path / "gated.sgt")
    sgtriton.sparsify(model, form=form)
    assert model.a is model.b
    served = model(x)
    assert_close("served", served, out)
    sgtriton.save(model, tmp_path / "served.sgt")
    for target in (Twice(), sgtriton.patch(Twice(), block=(4, 4)), copy.deepcopy(model)):
        again = sgtriton.load(target, tmp_path / "served.sgt")
        assert again.a is again.b
        assert_exact("reloaded", again(x), served)
        assert_close("from gates", sgtriton.load(target, tmp_path / "gated.sgt")(x), out)


@torch.no_grad()
def test_partly_patched_model_keeps_its_other_layers():
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    open_some(sgtriton.patch(model, block=(8, 8), include="0"))
    other, x = model[2], torch.randn(5, 32)
    out = model(x)
    sgtriton.sparsify(model, form="dense")
    assert model[2] is other
    assert type(other) is nn.Linear
    assert_exact("served", model(x), out)


@torch.no_grad()
def test_second_sparsify_turns_the_layers_gated_since():
    model = nn.Sequential(nn.Linear(32, 32), nn.Conv2d(1, 2, 3))
    sgtriton.sparsify(sgtriton.patch(model, include="0"), form="sparse")
    sgtriton.sparsify(sgtriton.patch(model), form="dense")
    assert type(model[0]) is BlockSparseLinear
    assert model[0].form == "sparse"
    assert type(model[1]) is BlockSparseConv2d


@torch.no_grad()
def test_single_layer_model_is_served():
    layer = open_some(sgtriton.patch(nn.Linear(20, 12), block=(4, 4)))
    x = torch.randn(3, 20)
    out = layer(x)
    assert sgtriton.sparsify(layer, form="dense") is layer
    assert isinstance(layer, SparseModule)
    assert_exact("served", layer(x), out)


def test_each_layers_form_is_logged(caplog):
    with caplog.at_level(logging.INFO, logger="sgtriton.serving"):
        sgtriton.sparsify(mlp(), form="sparse")
    assert [r.getMessage().split(":")[0] for r in caplog.records] == ["0", "2"]
    assert all("density" in r.getMessage() and "sparse" in r.getMessage() for r in caplog.records)


@torch.no_grad()
def test_no_gate_is_tracked_after_serving():
    """An optimizer's step would still look for it."""
    from sgtriton import clipping

    model = mlp()
    layers = [model[0], model[2]]
    sgtriton.sparsify(model, form="dense")
    assert not any(layer in clipping._gated_modules for layer in layers)


def test_failure_while_forms_are_chosen_leaves_the_model_whole(monkeypatch):
    model = sgtriton.patch(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), (4, 4))
    x = torch.randn(3, 8)
    out = model(x)
    monkeypatch.setenv("SGTRITON_IMPL", "foo")
    with pytest.raises(ValueError, match="foo"):
        sgtriton.sparsify(model)
    monkeypatch.delenv("SGTRITON_IMPL")
    assert all(type(layer) is sgtriton.GatedLinear for layer in model)
    assert torch.equal(model(x), out)


def test_served_model_gives_its_dense_layers_back():
    model = sgtriton.patch(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)), (4, 4))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.gate.uniform_()
    x = torch.randn(3, 8)
    out = sgtriton.sparsify(model.eval(), form="dense")(x)
    sgtriton.unpatch(model)
    assert [type(layer) for layer in model] == [nn.Linear, nn.ReLU, nn.Linear]
    assert torch.equal(model(x), out)


@torch.no_grad()
def columns_dead(model, block=(4, 4)):
    """Gates of which whole block rows and columns are closed, others at random."""
    sgtriton.patch(model, block=block)
    for layer in model.modules():
        if isinstance(layer, GatedModule):
            gate = layer.gate.copy_((torch.rand_like(layer.gate) < 0.5).float())
            gate[0], gate[:, -1], gate[-1, 0] = 0, 0, 1
    return model.eval()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("k", "n"), [(64, 48), (37, 53)])
@torch.no_grad()
def test_every_form_computes_the_same_and_survives_copies_and_moves(form, k, n, tmp_path):
    model = columns_dead(nn.Sequential(nn.Linear(k, n)))
    x = torch.randn(9, k)
    ref64, out = copy.deepcopy(model).double()(x.double()), model(x)
    sgtriton.sparsify(model, form=form)
    layer = model[0]
    assert layer.form == form
    assert layer.serve_block == (16, 16)
    assert_within_twice("out", model(x), ref64, out)
    served = model(x)
    assert_exact("deepcopy", copy.deepcopy(model)(x), served)
    assert_exact("pickle", pickle.loads(pickle.dumps(model))(x), served)
    assert_close("double", copy.deepcopy(model).double()(x.double()), ref64)
    half = copy.deepcopy(model).to(torch.bfloat16)
    expected = nn.functional.linear(
        x.to(torch.bfloat16), half[0].stored.to_dense(), half[0].bias
    )  # fmt: skip
    assert_close("bfloat16", half(x.to(torch.bfloat16)), expected)
    sgtriton.save(model, tmp_path / "model.sgt")
    again = sgtriton.load(nn.Sequential(nn.Linear(k, n)), tmp_path / "model.sgt")
    assert again[0].forms == layer.forms
    assert_exact("reloaded", again(x), served)
    state = {name: t * 2 if name.endswith(("values", "bias")) else t for name, t in
             model.state_dict().items()}  # fmt: skip
    assert set(state) == {"0.values", "0.crow", "0.col", "0.bias"}
    model.load_state_dict(state)
    assert_close("twice", model(x), 2 * served)
    model.to_empty(device="cpu")
    assert layer.stored.density == 0
    model.load_state_dict(state)
    assert_close("after to_empty", model(x), 2 * served)
    sgtriton.unpatch(model)
    assert not dict(model.named_buffers())


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_every_form_compiles_without_graph_breaks(form):
    model = columns_dead(nn.Sequential(nn.Linear(37, 53)))
    sgtriton.sparsify(model, form=form).requires_grad_(False)
    compiled, x = torch.compile(model, fullgraph=True, backend="aot_eager"), torch.randn(5, 37)
    assert_close("out", compiled(x), model(x))


@torch.no_grad()
def test_served_blocks_are_those_asked_for():
    for asked, served in [((8, 4), (8, 4)), ((None, 8), (48, 8)), ((64, 64), (48, 64))]:
        model = columns_dead(nn.Sequential(nn.Linear(64, 48)))
        x = torch.randn(3, 64)
        out = model(x)
        sgtriton.sparsify(model, form="merged", serve_block=asked)
        assert model[0].serve_block == served
        assert model[0]._matrix_of("merged").block == served
        assert model[0].gate_block == (4, 4)
        assert_close("out", model(x), out)


@torch.no_grad()
def test_state_holds_gate_blocks_whatever_is_served():
    model = columns_dead(nn.Sequential(nn.Linear(64, 48)))
    values = sgtriton.sparsify(copy.deepcopy(model), form="sparse").state_dict()["0.values"]
    merged = sgtriton.sparsify(model, form="merged")
    assert_exact("values", merged.state_dict()["0.values"], values)
    assert {name for name, _ in merged.named_buffers()} > set(merged.state_dict()) - {"0.bias"}


@pytest.mark.parametrize(
    ("make", "block", "form", "taken", "reason"),
    [
        (lambda: nn.Linear(64, 64), (16, 16), "merged", "sparse", "blocks of 16x16 are served as"),
        (lambda: nn.Linear(64, 64), (3, 4), "merged", "dense", "no served block is made of whole"),
        (lambda: nn.Linear(64, 64), (1, 1), "merged", "dense", "per-weight gates are computed"),
        (lambda: nn.Linear(64, 64), (1, 1), "sparse", "dense", "per-weight gates are computed"),
        (lambda: nn.Linear(64, 64), (16, 16), "compacted", "dense", "no row or column is dead"),
        (lambda: nn.Conv2d(4, 4, 3, groups=2), (2, 2), "compacted", "dense", "grouped conv"),
        (lambda: nn.Conv2d(16, 16, 3), (4, 4), "merged", "merged", "as asked for"),
        (lambda: nn.Conv2d(4, 4, 3), (2, 2), "dense_left", "dense", "dense_left is for linear"),
    ],
)
def test_form_that_a_layer_lacks_is_replaced_with_a_reason(make, block, form, taken, reason):
    model = sgtriton.patch(nn.Sequential(make()), block=block)
    layer = sgtriton.sparsify(model, form=form)[0]
    assert layer.form == taken
    assert layer.reason.startswith(reason)


@torch.no_grad()
def test_dead_filters_and_channels_are_dropped(tmp_path):
    for block, side in [((1, None), 0), ((None, 1), 1)]:
        model = sgtriton.patch(nn.Sequential(nn.Conv2d(6, 8, 3, padding=1)), block=block)
        model[0].gate.copy_((torch.arange(model[0].gate.numel()) % 2).view_as(model[0].gate))
        x = torch.randn(2, 6, 7, 7)
        out = model(x)
        sgtriton.sparsify(model, form="compacted")
        assert model[0].form == "compacted"
        assert model[0]._buffers["compact_weight"].shape[side] < (8, 6)[side]
        assert_close("out", model(x), out)
        sgtriton.save(model, tmp_path / "model.sgt")
        again = sgtriton.load(nn.Sequential(nn.Conv2d(6, 8, 3, padding=1)), tmp_path / "model.sgt")
        assert_exact("reloaded", again(x), model(x))


@pytest.mark.parametrize("kind", ["linear", "conv", "grouped"])
@torch.no_grad()
def test_convolutions_choose_their_form_too(monkeypatch, kind):
    make = {
        "linear": lambda: nn.Linear(12, 12),
        "conv": lambda: nn.Conv2d(12, 12, 3, 2, 1, 2),
        "grouped": lambda: nn.Conv2d(12, 12, 3, groups=2),
    }[kind]
    model = columns_dead(nn.Sequential(make()))
    shape = (3, 12) if kind == "linear" else (1, 12, 30, 30)
    x = torch.randn(shape)
    out, seen = model(x), []

    def times(candidates, device, seconds):
        dense, *others = (call() for call in candidates)
        for other in others:
            assert_close("candidates", other, dense)
        seen.append(dense.numel() // 12)
        return [2.0, *[1.5] * (len(others) - 1), 1.0]

    monkeypatch.setattr(planning, "undisturbed_ms", times)
    layer = sgtriton.sparsify(model)[0]
    assert layer.form == ("sparse" if kind == "grouped" else "compacted")
    if kind == "conv":
        assert seen == [1, 1, 9, 16, 36, 64, 121, 529, 4096, 16384]  # about the rows of each bucket
    assert_close("out", model(x), out)


@pytest.mark.parametrize(("channels", "form"), [(64, "compacted"), (256, "dense")])
@torch.no_grad()
def test_large_images_have_a_choice_of_their_own_where_it_takes_no_seconds(
    channels, form, monkeypatch
):
    """A layer of VGG-16 at 224x224 stayed dense, which at 23x23 is faster: 1/2.6 of the speed."""

    def times(calls, *a):
        rows = calls[0]().numel() // channels
        return [9.0 if rows > 4096 else 1.0, *[1.0] * (len(calls) - 1)]

    monkeypatch.setattr(planning, "undisturbed_ms", times)
    monkeypatch.setattr(planning, "_ROWS_OF_CONV", {**planning._ROWS, ">4096": (4489,)})
    layer = columns_dead(nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1)))[0]
    monkeypatch.setattr(planning, "_MOST_WORK", 1e9)
    model = sgtriton.sparsify(nn.Sequential(layer))
    assert model[0].forms["129-4096"] == "dense"
    assert (model[0].forms[">4096"] == "dense") == (form == "dense")


@pytest.mark.parametrize("bucket", BUCKETS)
@torch.no_grad()
def test_convolutions_count_their_output_positions(bucket):
    model = columns_dead(nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, stride=2)))
    layer = sgtriton.sparsify(model, form="dense")[0]
    layer.set_forms(
        {b: "compacted" if b == bucket else "dense" for b in BUCKETS}, "a test", False
    )  # fmt: skip
    seen = []
    layer._buffers["compact_weight"].fill_(7)  # tells the forms apart
    for rows, size in [
        ("1", 2),
        ("2-8", 4),
        ("9-32", 8),
        ("33-128", 16),
        ("129-4096", 40),
        (">4096", 130),
    ]:
        x = torch.randn(1, 12, size, size)
        dense = layer._conv_forward(x, layer.full_weight(), layer.bias)
        if not torch.equal(layer(x), dense):
            seen.append(rows)
    assert seen == [bucket]


def test_forms_that_are_close_are_timed_again(monkeypatch):
    asked = []

    def times(candidates, device, seconds):
        asked.append((len(candidates), seconds))
        if seconds == planning._SECONDS:
            return [2.0, 1.9, 1.0, 1.1, 1.5]  # dense, dense_left, sparse, merged, compacted
        return [2.0, 1.1, 1.0]

    monkeypatch.setattr(planning, "undisturbed_ms", times)
    looks = sum(map(len, planning._ROWS.values()))
    model = columns_dead(nn.Sequential(nn.Linear(64, 48)))
    layer = sgtriton.sparsify(model)[0]
    assert layer.form == "merged"
    assert asked == [(5, planning._SECONDS), (3, planning._LONGER)] * looks
    asked.clear()
    monkeypatch.setattr(planning, "_CLOSE", 1.05)
    layer = sgtriton.sparsify(columns_dead(nn.Sequential(nn.Linear(64, 48))))[0]
    assert layer.form == "sparse"
    assert asked == [(5, planning._SECONDS)] * looks


def test_forms_are_looked_up_without_timing(monkeypatch):
    monkeypatch.setattr(planning, "undisturbed_ms", None)
    monkeypatch.setattr(
        planning, "lookup_form", lambda layout, density, rows, *a: ("sparse", 2.0 + rows)
    )
    layer = sgtriton.sparsify(columns_dead(nn.Sequential(nn.Linear(64, 48))), form="lookup")[0]
    assert layer.form == "sparse"
    assert layer.reason == "by the cost model, at M=1, 8, 32, 128, 512, 8192"
    assert layer.expected == {
        "1": 3,
        "2-8": 10,
        "9-32": 34,
        "33-128": 130,
        "129-4096": 514,
        ">4096": 8194,
    }
    assert layer.measured == {}
    text = " ".join(str(sgtriton.summary(layer)).split())
    assert "(expected 3x, 10x, 34x, 1.3e+02x, 5.1e+02x, 8.2e+03x)" in text


def test_cost_model_prefers_what_reads_little_and_dense_where_nothing_is_gained():
    layout, cpu = gate_layout((4096, 1024), (64, 64)), torch.device("cpu")

    def look(**density):
        return planning.lookup_form(layout, {"dense": 1.0, **density}, 512, torch.float32, cpu)

    assert look() == ("dense", 1.0)
    assert look(sparse=1.0) == ("dense", 1.0)
    form, speedup = look(sparse=0.1)
    assert form == "sparse"
    assert 1 < speedup <= 10
    assert look(sparse=0.05)[1] > speedup
    assert look(sparse=0.1, compacted=0.01)[0] == "compacted"
    small = gate_layout((16, 16), (4, 4))
    assert planning.lookup_form(small, {"dense": 1.0, "sparse": 0.1}, 1, torch.float32, cpu) == (
        "dense", 1.0,
    )  # fmt: skip


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_cost_model_knows_what_the_library_is_slow_at(monkeypatch, capability):
    """It packs the weight for each product of few rows, and may lack instructions for 16 bits."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)

    def expected(form, rows, dtype=torch.float32, share=1.0):
        return planning.expected_speedup(
            form, (64, 64), share, (4096, 1024), rows, dtype, torch.device("cpu")
        )

    left = [expected("dense_left", rows) for rows in (1, 4, 8, 32, 128)]
    assert all(1.2 < speedup < 2 for speedup in left)
    assert expected("dense_left", 129) == pytest.approx(1, abs=0.01)
    for rows in (16, 512):
        assert expected("dense", rows) == 1
        for dtype in (torch.float16, torch.bfloat16):
            assert (expected("dense_left", rows, dtype) > 3) == (capability == "AVX2")
            gain = expected("sparse", rows, dtype, 0.1) / expected("sparse", rows, share=0.1)
            assert (gain > 2.5) == (capability == "AVX2")
            # half of the weights take half of the time, but for what a call costs
            assert 1.97 < expected("compacted", rows, dtype, 0.5) < 2


def test_cost_model_expects_nothing_of_a_card_that_is_known_of_cpus():
    card, shape = torch.device("cuda"), (8192, 8192)

    def expected(form, rows, share=1.0, dtype=torch.bfloat16):
        return planning.expected_speedup(form, (64, 64), share, shape, rows, dtype, card)

    for rows in (1, 16, 512):
        for dtype in (torch.float32, torch.bfloat16):
            assert expected("dense_left", rows, dtype=dtype) <= 1
    sparse = [expected("sparse", 4096, share) for share in (1.0, 0.5, 0.1)]
    assert sparse == sorted(sparse)
    assert sparse[0] < 1 < sparse[-1] < 10


@torch.no_grad()
def test_written_values_show_in_the_sparse_form():
    model = columns_dead(nn.Sequential(nn.Linear(64, 48)))
    sgtriton.sparsify(model, form="sparse")
    x, layer = torch.randn(3, 64), model[0]
    out = model(x) - layer.bias
    layer.values.mul_(2)
    assert_close("written", model(x) - layer.bias, 2 * out)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("make", "shape"), EXCHANGED)
@torch.no_grad()
def test_exchanged_values_show_in_every_form(make, shape, form):
    model = columns_dead(nn.Sequential(make()))
    sgtriton.sparsify(model, form=form)
    x, layer = torch.randn(shape), model[0]
    bias = layer.bias.view(-1, *[1] * (len(layer.weight_shape) - 2))
    layer.bias.requires_grad_(False)
    out = model(x) - bias
    called = torch.func.functional_call(model, {"0.values": layer.values * 3}, x)
    assert_close("for a call", called - bias, 3 * out)
    assert_close("back", model(x) - bias, out)
    values = layer.values * 2
    layer.values = values
    assert_close("exchanged", model(x) - bias, 2 * out)
    assert_close("copied", copy.deepcopy(model)(x) - bias, 2 * out)
    assert_close("cast", copy.deepcopy(model).double()(x.double()).float() - bias, 2 * out)
    model.double()
    assert_close("cast in place", model(x.double()).float() - bias, 2 * out)
    weight = layer.full_weight()
    sgtriton.unpatch(model)
    assert_close("dense again", model(x.double()).float() - bias, 2 * out)
    assert_exact("weight", model[0].weight.detach(), weight)


@pytest.mark.parametrize("form", FORMS)
def test_gradient_reaches_values_exchanged_for_a_call_in_every_form(form):
    model = columns_dead(nn.Sequential(nn.Linear(64, 48)))
    sgtriton.sparsify(model, form=form)
    values = model[0].values.clone().requires_grad_()
    x = torch.randn(3, 64)
    torch.func.functional_call(model, {"0.values": values}, x).sum().backward()
    grad = model[0].stored.with_values(values.grad).to_dense()
    assert_close("dvalues", grad, x.sum(0).expand(48, 64) * (model[0].full_weight() != 0))


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_usual_call_makes_no_weight_anew(form, monkeypatch):
    model = columns_dead(nn.Sequential(nn.Linear(64, 48)))
    sgtriton.sparsify(model, form=form)
    models = [model, copy.deepcopy(model), copy.deepcopy(model).double().float()]
    other = copy.deepcopy(model)
    other.load_state_dict(model.state_dict())
    assigned = copy.deepcopy(model)
    assigned.load_state_dict(model.state_dict(), assign=True)
    x = torch.randn(3, 64)
    out = model(x)
    monkeypatch.setattr(StoredWeight, "to_dense", None)
    for each in (*models, other, assigned):
        assert_close("out", each(x), out)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_exchanged_values_show_in_a_compiled_model(form):
    torch._dynamo.reset()
    model = columns_dead(nn.Sequential(nn.Linear(64, 48)))
    sgtriton.sparsify(model, form=form).requires_grad_(False)
    x, layer = torch.randn(3, 64), model[0]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    out = model(x) - layer.bias
    assert_close("compiled", compiled(x) - layer.bias, out)
    layer.values = layer.values * 2
    assert_close("exchanged", compiled(x) - layer.bias, 2 * out)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("made_inside", [False, True])
@pytest.mark.parametrize("pruned", [False, True])
def test_model_sparsified_in_inference_mode_passes_gradients_on(
    pruned, made_inside, form, trainable
):
    if trainable and form not in ("dense", "sparse"):
        pytest.skip("has copies of the values")
    with torch.inference_mode(made_inside):
        model = columns_dead(nn.Sequential(nn.Linear(64, 48)))
        if pruned:
            sgtriton.unpatch(model, fold=True)
    with torch.inference_mode():
        sgtriton.sparsify(model, form=form, block=(4, 4) if pruned else None, trainable=trainable)
    assert not any(t.is_inference() for t in model.buffers())
    x = torch.randn(3, 64, requires_grad=True)
    model(x).sum().backward()
    assert_close("dx", x.grad, model[0].full_weight().detach().sum(0).expand(3, 64))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_state_loaded_and_forms_set_in_inference_mode_pass_gradients_on(form, assign):
    model = columns_dead(nn.Sequential(nn.Linear(64, 48)))
    sgtriton.sparsify(model, form="sparse")
    x = torch.randn(3, 64)
    out = model(x).detach()
    with torch.inference_mode():
        model[0].set_forms(dict.fromkeys(BUCKETS, form), "for the test", True)
        assert not any(t.is_inference() for t in model.buffers())
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=assign)
    assert not any(t.is_inference() for t in model.buffers())
    assert_close("out", model(x.requires_grad_()).detach(), out)
    model[0].bias.requires_grad_(False)
    model(x).sum().backward()


def test_matrix_is_made_once():
    layer = sgtriton.sparsify(columns_dead(nn.Sequential(nn.Linear(64, 48))), form="sparse")[0]
    first = layer.matrix
    layer(torch.randn(2, 64))
    assert layer.matrix is first
    layer.to(torch.bfloat16)
    assert layer.matrix is not first
    assert layer.matrix.values.dtype == torch.bfloat16


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_every_form_is_exported(form):
    model = sgtriton.sparsify(columns_dead(nn.Sequential(nn.Linear(37, 53))), form=form)
    model.requires_grad_(False)
    x = torch.randn(5, 37)
    assert_close("out", torch.export.export(model, (x,)).module()(x), model(x))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("make", "shape"), [(lambda: nn.Linear(64, 48), (64,)), (lambda: nn.Conv2d(8, 8, 3), (8, 5, 5))]
)
@torch.no_grad()
def test_layer_of_mixed_forms_is_exported_for_batches_of_any_size(make, shape, strict):
    model = sgtriton.sparsify(columns_dead(nn.Sequential(make())), form="dense")
    model.requires_grad_(False)
    forms = {**dict.fromkeys(BUCKETS, "compacted"), "9-32": "sparse", ">4096": "dense"}
    model[0].set_forms(forms, "for the test", True)
    x = torch.randn(5, *shape)
    batch = {0: torch.export.Dim("b", min=1, max=4096)}
    exported = torch.export.export(model, (x,), dynamic_shapes=(batch,), strict=strict).module()
    for rows in (1, 20, 200):
        x = torch.randn(rows, *shape)
        assert_close("out", exported(x), model(x))


@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_layer_exported_for_one_batch_size_has_the_form_of_its_bucket(strict):
    model = sgtriton.sparsify(columns_dead(nn.Sequential(nn.Linear(64, 48))), form="dense")
    model.requires_grad_(False)
    model[0].set_forms({**dict.fromkeys(BUCKETS, "dense"), "2-8": "compacted"}, "test", True)
    for rows, gathers in ((5, True), (20, False)):
        exported = torch.export.export(model, (torch.randn(rows, 64),), strict=strict)
        assert ("index_select" in exported.graph_module.code) == gathers
