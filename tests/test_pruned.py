"""Models pruned elsewhere: zero blocks are found, masks made permanent, or nothing changes."""

import logging

import pytest
import torch
from helpers import assert_close, assert_exact
from torch import nn
from torch.nn.utils import parametrize, prune

import sgtriton
from sgtriton import planning
from sgtriton.sparse_layers import BlockSparseConv2d, BlockSparseLinear


@torch.no_grad()
def zeroed(layer, block, share=0.5):
    """The layer with a share of its blocks set to 0; the first one is, the last is not."""
    layout = sgtriton.layers.gate_layout(tuple(layer.weight.shape), block, 1)
    is_open = torch.rand(layout.gate_shape) >= share
    is_open.view(-1)[0], is_open.view(-1)[-1] = False, True
    layer.weight.mul_(sgtriton.layers.expand_gates(is_open, layout))
    return layer, is_open


def mlp(block=(8, 8)):
    """A layer with zero blocks, one without, a convolution with zero blocks."""
    first, _ = zeroed(nn.Linear(32, 24), block)
    conv, _ = zeroed(nn.Conv2d(4, 8, 3), (4, 2))
    return nn.ModuleDict({"first": first, "second": nn.Linear(24, 16), "conv": conv})


def snapshot(model):
    state = {name: t.clone() for name, t in model.state_dict().items()}
    return state, [(type(m), set(vars(m)), len(m._forward_pre_hooks)) for m in model.modules()]


def assert_unchanged(model, before):
    state, modules = before
    assert [(type(m), set(vars(m)), len(m._forward_pre_hooks)) for m in model.modules()] == modules
    assert model.state_dict().keys() == state.keys()
    for name, t in model.state_dict().items():
        assert torch.equal(t.nan_to_num(7), state[name].nan_to_num(7)), name


@pytest.mark.parametrize("form", ["dense", "sparse", "merged", "compacted", "lookup"])
@pytest.mark.parametrize("block", [(8, 8), (4, 16), (1, None), (None, 1), (None, None)])
@torch.no_grad()
def test_zero_blocks_are_left_out(block, form):
    layer, is_open = zeroed(nn.Linear(32, 24), block)
    if not is_open.numel() > 1:
        layer.weight.zero_()
    model, x = nn.Sequential(layer), torch.randn(5, 32)
    out = model(x)
    sgtriton.sparsify(model, form=form, block=block)
    assert type(layer) is BlockSparseLinear
    assert (layer.gate_block, layer.gate_kind) == (block, "none")
    assert layer.values.shape[0] == int((layer.stored.open_gates).sum())
    if is_open.numel() > 1:
        assert_exact("pattern", layer.stored.open_gates, is_open)
    assert_close("out", model(x), out)


@torch.no_grad()
def test_zero_weights_alone_are_stored_as_single_weights():
    layer = nn.Linear(32, 24)
    layer.weight[torch.rand(24, 32) < 0.5] = 0
    kept = layer.weight.clone()
    sgtriton.sparsify(nn.Sequential(layer), block=(1, 1), form="dense")
    assert layer.values.shape == (int((kept != 0).sum()),)
    assert_exact("weight", layer.full_weight(), kept)


@torch.no_grad()
def test_convolutions_are_stored_too():
    model = mlp()
    conv, x = model["conv"], torch.randn(2, 4, 9, 9)
    out = conv(x)
    sgtriton.sparsify(model, block=(4, 2), form="dense", include="conv")
    assert type(conv) is BlockSparseConv2d
    assert conv.stored.density < 1
    assert type(model["first"]) is nn.Linear
    assert_exact("out", conv(x), out)


@torch.no_grad()
def test_layer_without_a_zero_block_stays_dense_and_says_why(caplog):
    model = mlp()
    with caplog.at_level(logging.INFO, logger="sgtriton.serving"):
        sgtriton.sparsify(model, block=(8, 8), form="dense", exclude="conv")
    assert type(model["second"]) is nn.Linear
    said = "no zero block of 8x8: 0.00% of its weights are 0"
    assert any(f"second: left dense: {said}" in r.getMessage() for r in caplog.records)
    assert any(r.getMessage().startswith("first: pruned elsewhere, ") for r in caplog.records)
    text = " ".join(str(sgtriton.summary(model)).split())
    assert f"not gated: second: {said}" in text
    assert "not gated: conv: patch() was not asked to" in text
    assert "first: pruned elsewhere, dense: as asked for" in text
    assert "of the pruned weights are closed" in text
    model["second"].weight.zero_()  # what is said is what is so
    assert "100.00% of its weights are 0" in str(sgtriton.summary(model)).replace("\n  ", " ")


@torch.no_grad()
def test_gated_layers_keep_their_own_blocks():
    model = mlp()
    sgtriton.patch(model, block=(4, 4), include="second")
    model["second"].gate[0] = 0
    sgtriton.sparsify(model, block=(8, 8), form="dense", exclude="conv")
    assert (model["first"].gate_block, model["first"].gate_kind) == ((8, 8), "none")
    assert (model["second"].gate_block, model["second"].gate_kind) == ((4, 4), "threshold")
    assert "of the gated and pruned weights" in str(sgtriton.summary(model))


@torch.no_grad()
def test_gated_model_is_served_where_nothing_else_is_pruned():
    model = sgtriton.patch(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), (4, 4), include="0")
    sgtriton.sparsify(model, block=(4, 4), form="dense")
    assert [type(m) for m in model] == [BlockSparseLinear, nn.Linear]
    assert "not gated: 1: no zero block of 4x4" in str(sgtriton.summary(model))


@torch.no_grad()
def test_unpatching_forgets_which_layers_were_left_dense():
    model = sgtriton.patch(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), (4, 4), include="0")
    sgtriton.sparsify(model, block=(4, 4), form="dense")
    assert vars(model[1]).keys() > vars(nn.Linear(8, 8)).keys()
    sgtriton.unpatch(model)
    assert vars(model[1]).keys() == vars(nn.Linear(8, 8)).keys()
    assert "no zero block" not in str(sgtriton.summary(model))


METHODS = {
    "structured": lambda m: prune.ln_structured(m, "weight", amount=8, n=2, dim=0),
    "unstructured": lambda m: prune.l1_unstructured(m, "weight", amount=0.9),
    "custom": lambda m: prune.custom_from_mask(
        m, "weight", (torch.arange(24) < 9)[:, None].expand(24, 32)
    ),
    "twice": lambda m: prune.random_structured(
        prune.ln_structured(m, "weight", amount=8, n=2, dim=0), "weight", amount=4, dim=0
    ),
    "bias too": lambda m: prune.random_unstructured(
        prune.ln_structured(m, "weight", amount=8, n=2, dim=0), "bias", amount=5
    ),
}


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_pruning_masks_are_made_permanent(method):
    plain = {name for name, _ in nn.Linear(1, 1).named_parameters()} | set(vars(nn.Linear(1, 1)))
    model, x = nn.Sequential(METHODS[method](nn.Linear(32, 24))), torch.randn(5, 32)
    with torch.enable_grad():  # as after training: weight and bias are no leaves now
        out = model(x)
    weight = model[0].weight.detach().clone()
    sgtriton.sparsify(model, block=(1, 4), form="dense")
    layer = model[0]
    assert not layer._forward_pre_hooks
    assert set(layer.state_dict()) == {"values", "crow", "col", "bias"}
    assert not [name for name in vars(layer) if "weight" in name and name != "weight_shape"]
    assert not [name for name in dir(layer) if name.endswith(("_orig", "_mask"))]
    assert_exact("weight", layer.full_weight(), weight)
    assert_exact("out", model(x), out.detach())
    sgtriton.unpatch(model)
    assert type(model[0]) is nn.Linear
    assert set(vars(model[0])) <= plain
    assert_exact("dense again", model(x), out.detach())


def test_mask_without_a_zero_block_stays():
    model = nn.Sequential(
        prune.random_unstructured(nn.Linear(32, 24), "weight", amount=3),
        zeroed(nn.Linear(24, 8), (4, 4))[0],
    )
    sgtriton.sparsify(model, block=(4, 4), form="dense")
    assert set(model[0].state_dict()) == {"weight_orig", "weight_mask", "bias"}
    assert len(model[0]._forward_pre_hooks) == 1
    assert "not gated: 0: no zero block of 4x4" in str(sgtriton.summary(model))


def test_weights_that_are_computed_otherwise_are_named_with_the_remedy():
    class Mask(nn.Module):
        def forward(self, weight):
            return weight * (torch.arange(8) < 4)[:, None]

    model = nn.Sequential(nn.Linear(8, 8), zeroed(nn.Linear(8, 8), (4, 4))[0])
    parametrize.register_parametrization(model[0], "weight", Mask())
    sgtriton.sparsify(model, block=(4, 4), form="dense")
    text = " ".join(str(sgtriton.summary(model)).split())
    assert "not gated: 0: its weight is computed" in text
    assert "make it permanent first" in text


@torch.no_grad()
def test_tied_masked_weight_is_left_alone():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    prune.ln_structured(model["a"], "weight", amount=4, n=2, dim=0)
    model["b"].weight = model["a"].weight_orig
    with pytest.raises(ValueError, match="no layer has a zero block of 1xfull"):
        sgtriton.sparsify(model, block=(1, None))
    assert type(model["a"]) is nn.Linear


@torch.no_grad()
def test_nan_is_no_zero():
    layer, is_open = zeroed(nn.Linear(16, 16), (4, 4))
    layer.weight[0, 0] = float("nan")
    sgtriton.sparsify(nn.Sequential(layer), block=(4, 4), form="dense")
    is_open[0, 0] = True
    assert_exact("pattern", layer.stored.open_gates, is_open)
    assert layer.full_weight().isnan().sum() == 1


@torch.no_grad()
def test_negative_zero_is_zero():
    layer = nn.Linear(8, 8)
    layer.weight[:4, :4] = -0.0
    sgtriton.sparsify(nn.Sequential(layer), block=(4, 4), form="dense")
    assert layer.values.shape[0] == 3


@torch.no_grad()
def test_layer_of_zeros_gives_its_bias():
    layer = nn.Linear(8, 8)
    layer.weight.zero_()
    with pytest.warns(UserWarning, match="all weights of 0 are closed"):
        sgtriton.sparsify(nn.Sequential(layer), block=(4, 4))
    assert_exact("out", layer(torch.randn(3, 8)), layer.bias.expand(3, 8))


def test_model_without_zero_blocks_is_refused_with_its_sparsity():
    model = mlp()
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"no layer has a zero block of 24x32 \(first: \d\d\.\d\d%"
    ):
        sgtriton.sparsify(model, block=(24, 32))
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match=r"zero block of 4x4 \(none fits\)"):
        sgtriton.sparsify(nn.Sequential(nn.Embedding(4, 4)), block=(4, 4))


def test_error_without_a_block_says_how_to_give_one():
    with pytest.raises(ValueError, match=r"no gated layer; .*sparsify\(model, block=\(32, 32\)\)"):
        sgtriton.sparsify(mlp())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block": (0, 4)}, r"block sides must be integers >= 1"),
        ({"block": 4}, r"block must be a pair"),
        ({"block": (4, 4, 4)}, r"block must be a pair"),
        ({"include": "first"}, r"include and exclude .* got no block"),
        ({"exclude": "first"}, r"include and exclude"),
        ({"block": (8, 8), "include": "third"}, r"include='third' matches no layer"),
        ({"block": (8, 8), "serve_block": 16}, r"serve_block must be a pair"),
        ({"block": (8, 8), "serve_block": (16, 0)}, r"serve_block sides must be"),
        ({"block": (8, 8), "serve_block": (12, 8)}, r"first: serve_block .* whole gate blocks"),
        ({"block": (8, 8), "form": "fast"}, r"form must be one of"),
    ],
)
def test_arguments_that_are_not_allowed_are_refused_and_change_nothing(arguments, message):
    model = mlp()
    prune.ln_structured(model["second"], "weight", amount=8, n=2, dim=0)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        sgtriton.sparsify(model, **arguments)
    assert_unchanged(model, before)


def test_failure_while_forms_are_chosen_changes_nothing(monkeypatch):
    model = mlp()
    prune.ln_structured(model["second"], "weight", amount=8, n=2, dim=0)
    before = snapshot(model)

    def fail(*args, **kwargs):
        raise ValueError("no time")

    monkeypatch.setattr(planning, "undisturbed_ms", fail)
    with pytest.raises(ValueError, match="no time"):
        sgtriton.sparsify(model, block=(1, None))
    assert_unchanged(model, before)


def test_model_on_the_meta_device_is_refused():
    with pytest.raises(ValueError, match="0: weights must hold data, got a meta tensor"):
        sgtriton.sparsify(nn.Sequential(nn.Linear(8, 8, device="meta")), block=(4, 4))


@torch.no_grad()
def test_pruned_model_saves_and_loads(tmp_path):
    model, fresh = mlp().eval(), mlp()
    x = torch.randn(3, 32)
    sgtriton.sparsify(model, block=(8, 8), form="sparse", exclude="conv")
    out = model["first"](x)
    sgtriton.save(model, tmp_path / "model.sgt")
    sgtriton.load(fresh, tmp_path / "model.sgt")
    assert fresh["first"].gate_kind == "none"
    assert_exact("out", fresh["first"](x), out)
    again = sgtriton.load(model, tmp_path / "model.sgt")  # into the served model itself
    assert_exact("again", again["first"](x), out)
    gated = sgtriton.patch(mlp(), block=(8, 8))
    before = snapshot(gated)
    with pytest.raises(ValueError, match=r"first: the file's layer was pruned without gates"):
        sgtriton.load(gated, tmp_path / "model.sgt")
    assert_unchanged(gated, before)


def test_second_call_turns_what_was_pruned_since():
    model = nn.Sequential(zeroed(nn.Linear(16, 16), (4, 4))[0], nn.Linear(16, 16))
    sgtriton.sparsify(model, block=(4, 4), form="dense")
    with torch.no_grad():
        model[1].weight[:4] = 0
    sgtriton.sparsify(model, block=(4, 4), form="dense")
    assert [type(m) for m in model] == [BlockSparseLinear] * 2


def test_shared_layer_is_turned_once():
    shared, _ = zeroed(nn.Linear(16, 16), (4, 4))
    model = nn.ModuleDict({"a": shared, "b": shared})
    sgtriton.sparsify(model, block=(4, 4), form="dense", include="b")
    assert type(model["a"]) is BlockSparseLinear
    assert model["a"] is model["b"]


def test_masked_projection_of_attention_stays_a_layer_that_it_can_read():
    """Attention reads the weight of ``out_proj``; with a mask on it the layer was made sparse."""
    attention = nn.MultiheadAttention(16, 2)
    attention.out_proj = nn.Linear(16, 16)
    prune.ln_structured(attention.out_proj, "weight", 0.5, n=2, dim=0)
    model, x = (
        nn.ModuleDict({"attention": attention, "first": nn.Linear(16, 8)}),
        torch.ones(3, 1, 16),
    )
    zeroed(model["first"], (1, 16))
    out = attention(x, x, x)[0]
    sgtriton.sparsify(model, block=(1, None))
    assert type(model["first"]) is BlockSparseLinear
    assert_exact("out", attention(x, x, x)[0], out)
