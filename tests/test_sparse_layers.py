"""Served layers: outputs, state, copies, and every door through which an index comes in."""

import copy
import io
import pickle
import weakref

import pytest
import torch
from helpers import DTYPES, assert_close, assert_exact, assert_within_twice
from sgtriton_kernels.bsr_conv_passes import conv_blocks
from sgtriton_kernels.conv_geometry import ConvGeometry
from torch import nn
from torch.nn.utils import prune

import sgtriton
from sgtriton import sparse_layers
from sgtriton.layers import ADDED_NAMES, GatedModule
from sgtriton.sparse_layers import (
    BUCKETS,
    FORMS,
    SPARSE_TYPES,
    BlockSparseConv1d,
    BlockSparseConv2d,
    BlockSparseLinear,
    SparseModule,
    densify_layer,
)

SPARSE, DENSE = dict.fromkeys(BUCKETS, "sparse"), dict.fromkeys(BUCKETS, "dense")

# in, out, block: whole blocks, ragged, larger than the layer, whole dimensions, per weight, 1
LINEAR = [
    (64, 32, (16, 16)),
    (53, 37, (8, 16)),
    (5, 3, (32, 32)),
    (20, 12, (1, None)),
    (20, 12, (None, 1)),
    (20, 12, (1, 1)),
    (1, 1, (4, 4)),
]
CONV = [
    (lambda: nn.Conv2d(5, 8, 3, padding=1), (4, 2), (2, 5, 7, 6)),
    (lambda: nn.Conv2d(4, 6, 3, groups=2, stride=2), (2, 1), (2, 4, 9, 9)),
    (lambda: nn.Conv2d(4, 6, (3, 2), padding="same", padding_mode="circular"), (1, None),
     (2, 4, 8, 8)),
    (lambda: nn.Conv2d(4, 6, 3, dilation=2, bias=False), (1, 1), (4, 9, 9)),
    (lambda: nn.Conv1d(5, 8, 3, padding=1), (4, 2), (2, 5, 11)),
    (lambda: nn.Conv1d(4, 8, 3, groups=4), (None, 1), (2, 4, 11)),
]  # fmt: skip


@torch.no_grad()
def gated(layer, block, share=0.5, kind="threshold"):
    """A model of one gated layer, a share of its gates open, in eval."""
    model = sgtriton.patch(nn.Sequential(layer), block=block, gate=kind)
    gate = model[0].gate
    gate.copy_((torch.rand_like(gate) < share).float())
    return model.eval()


def served(layer, block, share=0.5, form="sparse", **kwargs):
    return sgtriton.sparsify(gated(layer, block, share), form=form, **kwargs)


def snapshot(model):
    """Everything that a failed load must leave alone."""
    state = {name: t.clone() for name, t in model.state_dict().items()}
    hidden = {name: t.clone() for name, t in model.named_buffers()}
    return state, hidden, [type(m) for m in model.modules()]


def assert_unchanged(model, before):
    state, hidden, types = before
    assert [type(m) for m in model.modules()] == types
    now = model.state_dict()
    assert now.keys() == state.keys()
    for name, t in state.items():
        assert_exact(name, now[name], t)
    for name, t in model.named_buffers():
        assert_exact(name, t, hidden[name])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("k", "n", "block"), LINEAR)
@torch.no_grad()
def test_linear_forms_compute_what_the_gated_layer_does(k, n, block, bias, dtype):
    model = gated(nn.Linear(k, n, bias=bias).to(dtype), block)
    x = torch.randn(9, k).to(dtype)
    ref64, out = copy.deepcopy(model).double()(x.double()), model(x)
    dense = sgtriton.sparsify(copy.deepcopy(model), form="dense")
    assert type(dense[0]) is BlockSparseLinear
    assert_exact("dense", dense(x), out)
    sparse = sgtriton.sparsify(model, form="sparse")
    assert sparse[0].form == ("dense" if block == (1, 1) or k == 1 else "sparse")
    if dtype == torch.float64:  # the gated layer is the reference itself
        assert_close("sparse", sparse(x), out)
    else:
        assert_within_twice("sparse", sparse(x), ref64, out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("make", "block", "shape"), CONV)
@torch.no_grad()
def test_conv_computes_what_the_gated_layer_does(make, block, shape, dtype):
    model = gated(make().to(dtype), block)
    x = torch.randn(shape).to(dtype)
    ref64, out = copy.deepcopy(model).double()(x.double()), model(x)
    dense = sgtriton.sparsify(copy.deepcopy(model), form="dense")
    assert_exact("dense", dense(x), out)
    sgtriton.sparsify(model, form="sparse")
    assert type(model[0]) in (BlockSparseConv1d, BlockSparseConv2d)
    assert model[0].form == ("dense" if block == (1, 1) else "sparse")
    assert model(x).shape == out.shape
    assert_within_twice("sparse", model(x), ref64, out)


@pytest.mark.parametrize(
    ("rows", "bucket"),
    [(0, "1"), (1, "1"), (2, "2-8"), (8, "2-8"), (9, "9-32"), (32, "9-32"), (33, "33-128"),
     (128, "33-128"), (129, "129-4096"), (4096, "129-4096"), (4097, ">4096"),
     (10**12, ">4096")],
)  # fmt: skip
def test_bucket_boundaries(rows, bucket):
    layer = served(nn.Linear(16, 8), (4, 4))[0]
    for only in BUCKETS:
        layer.set_forms({b: "sparse" if b == only else "dense" for b in BUCKETS}, "", True)
        assert (layer.form_of(rows) == "sparse") == (only == bucket)


@torch.no_grad()
def test_form_follows_the_rows_of_x_in_all(monkeypatch):
    """Leading dimensions multiply: ``[2, 3, 5, K]`` has 30 rows."""
    model = served(nn.Linear(16, 8), (4, 4))
    layer, used = model[0], []
    real = sparse_layers.bsr_linear
    monkeypatch.setattr(sparse_layers, "bsr_linear", lambda *a: used.append(1) or real(*a))
    layer.set_forms({**DENSE, "9-32": "sparse"}, "a test", True)
    assert layer.form == "sparse at M 9-32; else dense"
    for shape, sparse in [
        ((16,), False), ((0, 16), False), ((8, 16), False), ((9, 16), True), ((2, 3, 5, 16), True),
        ((32, 16), True), ((33, 16), False), ((129, 16), False),
    ]:  # fmt: skip
        used.clear()
        layer(torch.randn(shape))
        assert bool(used) == sparse, shape


@pytest.mark.parametrize("form", ["sparse", "dense"])
@pytest.mark.parametrize("shape", [(53,), (0, 53), (1, 53), (2, 0, 53), (2, 3, 53)], ids=str)
@torch.no_grad()
def test_any_leading_shape_comes_back(shape, form):
    model = gated(nn.Linear(53, 37), (8, 16))
    x = torch.randn(shape)
    out = model(x)
    sgtriton.sparsify(model, form=form)
    assert model(x).shape == (*shape[:-1], 37)
    assert_close(form, model(x), out)


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    """Layers of all tests share the code that is compiled, and there is a limit to recompiling."""
    torch._dynamo.reset()


@pytest.mark.parametrize("form", ["sparse", "dense"])
@torch.no_grad()
def test_strided_input_is_read_right_and_left_alone(form):
    model = gated(nn.Linear(20, 12), (4, 4))
    x = torch.randn(20, 18).T[::2]
    kept, out = x.clone(), model(x)
    assert_close("out", sgtriton.sparsify(model, form=form)(x), out)
    assert_exact("x", x, kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["sparse", "dense", "dense_left"])
@torch.no_grad()
def test_autocast_gives_its_dtype_in_every_form(form, dtype):
    model = gated(nn.Linear(48, 20), (4, 4))
    x = torch.randn(5, 48)
    ref64 = copy.deepcopy(model).double()(x.double())
    sparse = sgtriton.sparsify(copy.deepcopy(model), form=form)
    with torch.autocast("cpu", dtype):
        out, plain = sparse(x), model(x)
    assert out.dtype == dtype
    assert_within_twice(form, out, ref64, plain)


@pytest.mark.parametrize("form", ["sparse", "dense"])
@pytest.mark.parametrize("bias", [True, False])
def test_fully_pruned_linear_gives_the_bias(form, bias, tmp_path):
    model = served(nn.Linear(64, 64, bias=bias), (32, 32), share=0, form=form)
    assert model[0].values.shape == (0, 32, 32)
    expected = model[0].bias.detach().expand(5, 64) if bias else torch.zeros(5, 64)
    with torch.no_grad():
        assert_exact("out", model(torch.randn(5, 64)), expected)
    sgtriton.save(model, tmp_path / "empty.sgt")
    again = sgtriton.load(nn.Sequential(nn.Linear(64, 64, bias=bias)), tmp_path / "empty.sgt")
    with torch.no_grad():
        assert_exact("loaded", again(torch.randn(5, 64)), expected)
    assert "fully pruned" in str(sgtriton.summary(again))


@pytest.mark.parametrize("block", [(1, 1), (8, 8), (1, None)])
def test_fully_pruned_conv_gives_the_bias(block):
    model = served(nn.Conv2d(3, 16, 3), block, share=0)
    with torch.no_grad():
        out = model(torch.randn(2, 3, 8, 8))
    assert_exact("out", out, model[0].bias.detach()[:, None, None].expand(2, 16, 6, 6))


def test_fully_pruned_gated_layer_trains_its_bias():
    model = gated(nn.Linear(64, 64), (32, 32), share=0).train()
    model(torch.randn(5, 64)).sum().backward()
    assert_exact("bias", model[0].bias.grad, torch.full((64,), 5.0))


@torch.no_grad()
def test_dense_form_trains_its_bias_and_passes_the_gradient_on():
    model = gated(nn.Linear(12, 8), (4, 4))
    weight = model[0].eval_weight()
    sgtriton.sparsify(model, form="dense")
    with torch.enable_grad():
        x = torch.randn(3, 12, requires_grad=True)
        model(x).sum().backward()
    assert_close("dx", x.grad, weight.sum(0).expand(3, 12))
    assert_exact("bias", model[0].bias.grad, torch.full((8,), 3.0))


@pytest.mark.parametrize(
    ("block", "keys"), [((4, 4), {"values", "crow", "col"}), ((1, 1), {"values", "bits"})]
)
def test_state_holds_the_open_part_and_the_bias_only(block, keys):
    model = served(nn.Linear(12, 8), block, form="dense")
    state = model.state_dict()
    assert set(state) == {f"0.{key}" for key in keys | {"bias"}}
    if "crow" in keys:
        assert state["0.col"].shape == state["0.values"].shape[:1]  # without the container's last 0
    assert not any(t.requires_grad for t in state.values())


@pytest.mark.parametrize("block", [(1, 1), (4, 4), (8, 5)])
@pytest.mark.parametrize("form", ["sparse", "dense"])
@torch.no_grad()
def test_state_with_another_pattern_loads_bitwise(block, form):
    source, target = (served(nn.Linear(13, 9), block, share, form=form) for share in (0.3, 0.9))
    assert source[0].values.shape != target[0].values.shape
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    buffer.seek(0)
    target.load_state_dict(torch.load(buffer, weights_only=True))
    x = torch.randn(4, 13)
    assert_exact("out", target(x), source(x))
    assert_exact("weight", target[0].full_weight(), source[0].full_weight())
    assert_exact("gates", target[0].stored.open_gates, source[0].stored.open_gates)


@pytest.mark.parametrize("block", [(1, 1), (4, 4)])
def test_loaded_state_shares_no_memory_with_its_source(block):
    source, target = (served(nn.Linear(12, 8), block) for _ in range(2))
    state = source.state_dict()
    target.load_state_dict(state)
    kept = target[0].full_weight().clone()
    for t in state.values():
        t.zero_()
    assert_exact("weight", target[0].stored.to_dense(), kept)


def test_loading_keeps_the_layers_dtype():
    source = served(nn.Linear(12, 8).double(), (4, 4))
    target = served(nn.Linear(12, 8).to(torch.bfloat16), (4, 4), form="dense")
    target.load_state_dict(source.state_dict())
    assert target[0].values.dtype == target[0].dense_weight.dtype == torch.bfloat16
    assert_exact("weight", target[0].full_weight(), source[0].full_weight().to(torch.bfloat16))


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("form", ["dense", "sparse"])
@pytest.mark.parametrize("block", [(4, 4), (1, 1)])
@torch.no_grad()
def test_state_assigned_to_a_model_on_meta_is_computed_with(block, form, trainable):
    model = served(nn.Linear(12, 8), block, form=form, trainable=trainable)
    state, x = copy.deepcopy(model.state_dict()), torch.randn(3, 12)
    empty = copy.deepcopy(model).to("meta")
    empty.load_state_dict(state, assign=True)
    assert not any(t.is_meta for t in (*empty.parameters(), *empty.buffers()))
    assert isinstance(empty[0].values, nn.Parameter) == trainable
    assert_exact("out", empty(x), model(x))


@pytest.mark.parametrize("trainable", [False, True])
def test_assigned_state_keeps_its_dtype_in_values_and_bias_alike(trainable):
    model = served(nn.Linear(12, 8), (4, 4), trainable=trainable)
    state = copy.deepcopy(model).double().state_dict()
    model.load_state_dict(state, assign=True)
    assert model[0].values.dtype == model[0].bias.dtype == torch.float64
    x = torch.randn(3, 12).double()
    assert_close("out", model(x), nn.functional.linear(x, model[0].full_weight(), model[0].bias))


def test_index_of_int64_loads():
    model = served(nn.Linear(12, 8), (4, 4))
    state = {k: t.long() if t.dtype == torch.int32 else t for k, t in model.state_dict().items()}
    weight = model[0].full_weight().clone()
    model.load_state_dict(state)
    assert model[0].col.dtype == torch.int32
    assert_exact("weight", model[0].full_weight(), weight)


def two_layers(block=(32, 32)):
    """Layer "0" comes before the damaged "2": it must not be loaded when "2" is refused."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.BatchNorm1d(64))
    sgtriton.patch(model, block=block)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.gate.copy_(torch.eye(len(layer.gate)))
    return sgtriton.sparsify(model.eval(), form="dense")


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("col", ints(0, 999), "999"),
        ("col", ints(0, -1), "-1"),
        ("col", ints(0, 2**31 - 1), "2147483647"),
        ("col", ints(0), "col must have nnz"),
        ("col", torch.zeros(2), "col must be"),
        ("crow", ints(0, 3, 2), "crow must rise"),
        ("crow", ints(5, 0, -1), "crow must start with 0"),
        ("crow", ints(0, 1, 3), "crow must end"),
        ("crow", ints(0, 2), "crow must have"),
        ("crow", None, "are needed"),
        ("col", None, "are needed"),
        ("values", None, "are needed"),
        ("values", torch.zeros(1, 32, 32), "col must have nnz"),
        ("values", torch.zeros(0, 32, 32), "col must have nnz"),
        ("values", torch.zeros(2, 16, 32), "values must hold blocks"),
        ("values", torch.zeros(2, 32, 32, dtype=torch.int32), "floating point"),
        ("values", "2 blocks", "values must be a tensor"),
        ("values", torch.zeros(2, 32, 32, device="meta"), "meta|one device"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("strict", [True, False])
def test_hostile_state_is_refused_and_changes_nothing(key, value, message, strict):
    model = two_layers()
    state = {name: t + 1 if t.is_floating_point() else t for name, t in model.state_dict().items()}
    state[f"2.{key}"] = value
    if value is None:
        del state[f"2.{key}"]
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"^2: .*({message})"):
        model.load_state_dict(state, strict=strict)
    assert_unchanged(model, before)


def test_hostile_bitmap_is_refused_and_changes_nothing():
    model = two_layers(block=(1, 1))
    state = {name: t + 1 if t.is_floating_point() else t for name, t in model.state_dict().items()}
    state["2.bits"] = state["2.bits"] | 1 << 3
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^2: bits must have one set bit per nonzero"):
        model.load_state_dict(state)
    assert_unchanged(model, before)


def test_hostile_state_is_refused_by_copies_and_inside_wrappers():
    for model in (copy.deepcopy(two_layers()), pickle.loads(pickle.dumps(two_layers()))):
        state = {k: t + 1 if t.is_floating_point() else t for k, t in model.state_dict().items()}
        state["2.col"] = ints(0, 999)
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"^2: .*999"):
            model.load_state_dict(state)
        assert_unchanged(model, before)
        wrapped = nn.ModuleDict({"inner": model})
        with pytest.raises(ValueError, match=r"^inner\.2: .*999"):
            wrapped.load_state_dict({f"inner.{name}": t for name, t in state.items()})
        assert_unchanged(model, before)


def test_second_name_of_a_shared_layer_is_checked_too():
    shared = nn.Linear(64, 64)
    model = nn.ModuleDict({"a": shared, "m": nn.Linear(64, 64), "z": shared})
    sgtriton.sparsify(sgtriton.patch(model, block=(32, 32)), form="dense")
    state = {k: t + 1 if t.is_floating_point() else t for k, t in model.state_dict().items()}
    state["z.col"] = state["z.col"] + 7
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^z: col"):
        model.load_state_dict(state)
    assert_unchanged(model, before)


def test_state_of_another_gate_block_is_refused():
    model, other = two_layers(), two_layers(block=(16, 16))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^0: values must hold blocks \(32, 32\)"):
        model.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match=r"^0: .*are needed"):
        model.load_state_dict(two_layers(block=(1, 1)).state_dict())
    assert_unchanged(model, before)


@pytest.mark.parametrize("block", [(1, 1), (4, 4)])
@torch.no_grad()
def test_state_of_another_form_is_refused_and_changes_nothing(block):
    """PyTorch would load the biases and only then name the keys that are missing."""
    forms = {
        "dense": nn.Sequential(nn.Linear(13, 9)),
        "gated": gated(nn.Linear(13, 9), block),
        "sparse": served(nn.Linear(13, 9), block),
    }
    for holder, source in (("gated", "sparse"), ("sparse", "gated"), ("sparse", "dense")):
        model, state = forms[holder], forms[source].state_dict()
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"^0: the state is that of"):
            model.load_state_dict(state)
        assert_unchanged(model, before)


@pytest.mark.parametrize("block", [(1, 1), (4, 4)])
@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@torch.no_grad()
def test_copies_compute_the_same_and_are_independent(block, copy_of):
    for form in ("sparse", "dense"):
        model = served(nn.Linear(13, 9), block, form=form)
        twin, x = copy_of(model), torch.randn(4, 13)
        out = model(x)
        assert_exact("copy", twin(x), out)
        assert twin[0].forms == model[0].forms
        assert (twin[0].dense_weight is None) == (model[0].dense_weight is None)
        assert twin.state_dict().keys() == model.state_dict().keys()
        for buffer in twin.buffers():
            buffer.zero_()
        assert_exact("original", model(x), out)


@pytest.mark.parametrize(
    ("buffer", "value"), [("col", 999), ("col", -1), ("crow", 2**31 - 1), ("crow", -3)]
)
def test_tampered_pickle_is_refused(buffer, value):
    model = served(nn.Linear(64, 64), (32, 32), share=1)
    getattr(model[0], buffer)[1] = value
    data = pickle.dumps(model)
    with pytest.raises(ValueError, match=buffer):
        pickle.loads(data)


@pytest.mark.parametrize("buffer", ["ccol", "row", "perm", "row_order"])
def test_derived_index_of_a_pickle_is_rebuilt(buffer):
    """What follows from the index is an address as well, and no part of what is checked."""
    model = served(nn.Linear(64, 64), (32, 32), share=1)
    whole = getattr(model[0], buffer).clone()
    getattr(model[0], buffer).fill_(999)
    again = pickle.loads(pickle.dumps(model))
    assert_exact(buffer, getattr(again[0], buffer), whole)


def test_read_ahead_entry_of_a_pickle_is_rebuilt():
    model = served(nn.Linear(64, 64), (32, 32), share=1)
    model[0].col[-1] = 999
    assert pickle.loads(pickle.dumps(model))[0].col[-1] == 0


@pytest.mark.parametrize("trainable", [False, True])
@torch.no_grad()  # a graph of autograd holds it too
def test_what_follows_from_an_index_stays_as_long_as_the_index(trainable):
    """A captured graph reads its memory, which a move to where the model is gave free."""
    model = served(nn.Conv2d(32, 32, 3, padding=1), (16, 16), trainable=trainable)
    layer, x = model[0], torch.randn(1, 32, 4, 4)
    model(x)
    geometry = ConvGeometry(32, 32, (3, 3), before=(1, 1), after=(1, 1))
    lists = weakref.ref(conv_blocks(layer.matrix, geometry).by_channels.starts)
    expected = model(x)
    model.to("cpu").float()
    assert lists() is not None
    assert_exact("out", model(x), expected)
    model.to_empty(device="cpu")  # which has another index
    assert lists() is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("block", [(1, 1), (4, 4)])
@torch.no_grad()
def test_casts_leave_the_index_alone(block, dtype):
    for form in ("sparse", "dense"):
        model = served(nn.Linear(13, 9), block, form=form)
        weight, x = model[0].full_weight().clone(), torch.randn(4, 13)
        reference = nn.functional.linear(x.to(dtype), weight.to(dtype), model[0].bias.to(dtype))
        model.to(dtype)
        assert model[0].values.dtype == dtype
        for name, index in model[0].named_buffers():
            if name in ("crow", "col", "ccol", "row", "perm", "row_order"):
                assert index.dtype == torch.int32
        assert_exact("weight", model[0].stored.to_dense(), weight.to(dtype))
        assert_close(form, model(x.to(dtype)), reference)


@pytest.mark.parametrize("block", [(1, 1), (4, 4)])
@torch.no_grad()
def test_without_a_dense_copy_the_dense_form_computes_the_same(block):
    model = gated(nn.Linear(13, 9), block)
    x = torch.randn(4, 13)
    out = model(x)
    sgtriton.sparsify(model, form="dense", dense_copy=False)
    assert model[0].dense_weight is None
    assert_exact("out", model(x), out)
    model.load_state_dict(model.state_dict())
    assert model[0].dense_weight is None


def test_dense_copy_is_kept_only_where_a_bucket_needs_it():
    layer = served(nn.Linear(12, 8), (4, 4), form="sparse")[0]
    assert layer.dense_weight is None
    layer.set_forms({**SPARSE, "129-4096": "dense", ">4096": "dense"}, "a test", True)
    assert_exact("copy", layer.dense_weight, layer.stored.to_dense())
    layer.set_forms(SPARSE, "a test", True)
    assert layer.dense_weight is None


@pytest.mark.parametrize("write", ["values", "load"])
@torch.no_grad()
def test_dense_copy_follows_a_load(write):
    source, target = (served(nn.Linear(12, 8), (4, 4), 0.9, form="dense") for _ in range(2))
    state = source.state_dict()
    if write == "values":  # the same pattern, other values
        target.load_state_dict(state)
        state = {k: t * 2 if k.endswith("values") else t for k, t in state.items()}
    target.load_state_dict(state)
    x = torch.randn(3, 12)
    factor = 2 if write == "values" else 1
    expected = nn.functional.linear(x, source[0].full_weight() * factor, source[0].bias)
    assert_exact("out", target(x), expected)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("block", [(1, 1), (4, 4)])
@torch.no_grad()
def test_densified_layer_is_the_dense_layer_again(block, share):
    dense = nn.Linear(13, 9)
    keys, attributes = list(dense.state_dict()), set(vars(dense))
    model = gated(dense, block, share)
    weight, bias = model[0].eval_weight(), model[0].bias
    sgtriton.sparsify(model)
    densify_layer(model[0])
    assert type(model[0]) is nn.Linear
    assert list(model[0].state_dict()) == keys
    assert set(vars(model[0])) == attributes
    assert_exact("weight", model[0].weight, weight)
    assert isinstance(model[0].weight, nn.Parameter)
    assert model[0].bias is bias
    sgtriton.patch(model, block=block)  # and can be gated again
    assert isinstance(model[0], GatedModule)


@torch.no_grad()
def test_users_buffers_and_hooks_stay():
    model = gated(nn.Linear(12, 8), (4, 4))
    layer, seen = model[0], []
    layer.register_buffer("scale", torch.ones(3))
    layer.register_buffer("scratch", torch.ones(2), persistent=False)
    layer.register_forward_hook(lambda *_: seen.append("after"))
    layer.register_forward_pre_hook(lambda *_: seen.append("before"))
    sgtriton.sparsify(model)
    model(torch.randn(2, 12))
    assert seen == ["before", "after"]
    assert "0.scale" in model.state_dict()
    assert "0.scratch" not in model.state_dict()
    densify_layer(layer)
    model(torch.randn(2, 12))
    assert seen == ["before", "after"] * 2
    assert set(model.state_dict()) == {"0.weight", "0.bias", "0.scale"}
    assert dict(layer.named_buffers()).keys() == {"scale", "scratch"}


@pytest.mark.parametrize(
    "forms",
    [
        {}, {"1": "sparse"}, {**SPARSE, "256": "sparse"}, {**SPARSE, "1": "fast"},
        {**SPARSE, ">4096": None}, {k: v for k, v in SPARSE.items() if k != "1"},
    ],
)  # fmt: skip
def test_forms_that_do_not_exist_are_refused(forms):
    layer = served(nn.Linear(12, 8), (4, 4))[0]
    with pytest.raises(
        ValueError, match=r"forms must give one of \('dense', 'dense_left', 'sparse', 'compacted'\)"
    ):
        layer.set_forms(forms, "a test", True)
    assert layer.forms == SPARSE


@pytest.mark.parametrize(
    ("make", "block"),
    [(lambda: nn.Linear(12, 8), (1, 1)), (lambda: nn.Conv2d(4, 4, 3), (1, 1))],
)
def test_sparse_form_is_refused_where_there_is_none(make, block):
    layer = served(make(), block)[0]
    with pytest.raises(
        ValueError, match=r"one of \('dense', ('dense_left', )?'compacted'\) for each"
    ):
        layer.set_forms(SPARSE, "a test", True)
    assert layer.forms == DENSE


@pytest.mark.parametrize("form", ["sparse", "dense"])
def test_served_layer_compiles_without_graph_breaks(form):
    model = served(nn.Linear(53, 37), (8, 16), form=form).requires_grad_(False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for rows in (1, 5):
        x = torch.randn(rows, 53)
        assert_close(f"{rows} rows", compiled(x), model(x))


def test_served_conv_compiles_without_graph_breaks():
    model = served(nn.Conv2d(3, 4, 3), (2, 2)).requires_grad_(False)
    x = torch.randn(2, 3, 8, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close("out", compiled(x), model(x))


@pytest.mark.parametrize("form", ["sparse", "dense"])
@torch.no_grad()
def test_transformer_layer_serves_the_same_in_eval_and_train(form):
    """Its eval fast path would read weights past the served layers."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    model = sgtriton.patch(nn.TransformerEncoder(layer, 2), block=(8, 8))
    for module in model.modules():
        if isinstance(module, GatedModule):
            module.gate.copy_(torch.rand_like(module.gate))
    x = torch.randn(2, 7, 32)
    gated_out = model.train()(x)
    sgtriton.sparsify(model, form=form)
    served_layers = [m for m in model.modules() if isinstance(m, SparseModule)]
    assert len(served_layers) == 4
    assert_close("train", model.train()(x), gated_out)
    with torch.inference_mode():
        assert_close("eval", model.eval()(x), gated_out)
        assert_close("padded", model(x, src_key_padding_mask=torch.zeros(2, 7) > 0), gated_out)


@torch.no_grad()
def test_written_bias_and_values_show_at_once():
    """Values written in place reach the sparse form; the others keep copies of them."""
    model = served(nn.Linear(12, 8), (4, 4), share=1, form="sparse")
    x = torch.randn(3, 12)
    model[0].bias.data.add_(1)
    model[0].values.data.mul_(2)
    expected = nn.functional.linear(x, model[0].stored.to_dense(), model[0].bias)
    assert_close("out", model(x), expected)


def test_repr_says_block_and_form():
    layer = served(nn.Linear(12, 8), (4, None), form="sparse")[0]
    assert repr(layer) == (
        "BlockSparseLinear(in_features=12, out_features=8, bias=True, block=4xfull, form=sparse)"
    )
    assert set(SPARSE_TYPES) == {nn.Linear, nn.Conv1d, nn.Conv2d}


@pytest.mark.parametrize("block", [(4, 4), (1, 1)])
@pytest.mark.parametrize("through_meta", [False, True])
def test_to_empty_leaves_no_uninitialised_index(block, through_meta):
    """An index is an address to a kernel; a state loaded afterwards restores the layer."""
    model = sgtriton.patch(nn.Sequential(nn.Linear(32, 24)), block)
    with torch.no_grad():
        model[0].gate.uniform_()
    sgtriton.sparsify(model.eval(), form="dense")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(3, 32)
    out = model(x)
    if through_meta:
        model.to("meta")
    model.to_empty(device="cpu")
    assert model[0].stored.density == 0
    model.load_state_dict(state)
    assert_exact("out", model(x), out)


def test_layers_made_by_hand_are_refused():
    """They would have nothing stored, and fail at the first look at them."""
    for make in (
        lambda: sgtriton.BlockSparseLinear(4, 4),
        lambda: sgtriton.BlockSparseConv1d(4, 4, 3),
        lambda: sgtriton.BlockSparseConv2d(4, 4, 3),
    ):
        with pytest.raises(ValueError, match=r"BlockSparse\w+ is not made by hand.*sparsify"):
            make()


@pytest.mark.parametrize(
    ("make", "block", "shape"),
    [*CONV, (lambda: nn.Linear(13, 9), (4, 4), (3, 13)),
     (lambda: nn.Linear(13, 9, bias=False), (1, 1), (3, 13))],
)  # fmt: skip
@torch.no_grad()
def test_dense_layer_comes_back_as_a_copy(make, block, shape):
    """A new plain layer: sizes, options, dtype, mode; nothing is drawn for it."""
    model = gated(make().to(torch.float64), block)
    kind, x = model[0].dense_type, torch.randn(shape).double()
    out = model(x)
    sparse = sgtriton.sparsify(model, form="dense")[0]
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    dense = sparse.to_dense()
    assert_exact("next draw", torch.rand(3), expected)
    assert type(dense) is kind
    assert repr(dense) == repr(make())
    assert vars(dense).keys() == vars(make()).keys()
    assert not dense.training
    assert_exact("out", dense(x), out)
    for p in dense.parameters():
        assert p.requires_grad
        p.fill_(7)
    assert_exact("original", sparse(x), out)
    assert sparse.train().to_dense().training


def test_dense_layer_keeps_a_bias_of_another_dtype_that_does_not_train():
    sparse = served(nn.Linear(12, 8), (4, 4))[0].to(torch.bfloat16)
    sparse.bias = nn.Parameter(torch.ones(8), requires_grad=False)
    dense = sparse.to_dense()
    assert dense.weight.dtype == torch.bfloat16
    assert dense.bias.dtype == torch.float32
    assert not dense.bias.requires_grad


LEFT = dict.fromkeys(BUCKETS, "dense_left")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("block", [(8, 16), (1, 1)])
@torch.no_grad()
def test_weight_to_the_left_computes_what_the_gated_layer_does(block, bias, dtype):
    model = gated(nn.Linear(53, 37, bias=bias).to(dtype), block)
    reference = copy.deepcopy(model).double()
    inputs = [torch.randn(shape).to(dtype) for shape in ((53,), (0, 53), (1, 53), (2, 3, 53))]
    outs = [model(x) for x in inputs]
    sgtriton.sparsify(model, form="dense_left")
    layer = model[0]
    assert layer.form == "dense_left"
    wide = dtype.itemsize < 4
    assert (layer.wide_weight is not None) == wide
    assert (layer.dense_weight is None) == wide
    assert layer.bytes_beside == 37 * 53 * max(4, dtype.itemsize)
    for x, out in zip(inputs, outs, strict=True):
        assert model(x).shape == out.shape
        if dtype == torch.float64:
            assert_close("out", model(x), out)
        else:
            assert_within_twice("out", model(x), reference(x.double()), out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_wide_copy_follows_the_layer(dtype, tmp_path):
    """Copies, casts, states and files: the fp32 copy is there for 16-bit values, and right."""
    model = served(nn.Linear(24, 16).to(dtype), (4, 4), form="dense_left")
    x = torch.randn(3, 24)
    for name, other in {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "half": copy.deepcopy(model).half(),
        "float": copy.deepcopy(model).float(),
        "bfloat16": copy.deepcopy(model).bfloat16(),
        "bfloat16 again": copy.deepcopy(model).bfloat16().bfloat16(),
        "there and back": copy.deepcopy(model).double().to(dtype),
    }.items():
        layer = other[0]
        wide = layer.values.dtype.itemsize < 4
        assert (layer.wide_weight is not None) == wide, name
        copied = layer.wide_weight if wide else layer.dense_weight
        assert copied.dtype == torch.float32, name
        assert_exact(name, copied, layer.stored.to_dense())
        assert other(x.to(layer.values.dtype)).dtype == layer.values.dtype
    pattern = served(nn.Linear(24, 16).to(dtype), (4, 4), share=0.9, form="dense_left")
    model.load_state_dict(pattern.state_dict())
    assert_exact("loaded", model(x.to(dtype)), pattern(x.to(dtype)))
    sgtriton.save(model, tmp_path / "left.sgt")
    again = sgtriton.load(nn.Sequential(nn.Linear(24, 16)).to(dtype), tmp_path / "left.sgt")
    assert again[0].forms == LEFT
    assert_exact("reloaded", again(x.to(dtype)), model(x.to(dtype)))
    densify_layer(model[0])
    assert "wide_weight" not in model[0]._buffers
    assert type(model[0]) is nn.Linear


@torch.no_grad()
def test_wide_layers_keep_no_wide_copy():
    model = served(nn.Linear(24, 16).half(), (4, 4), form="dense_left").double()
    assert model[0].wide_weight is None
    assert_exact("double", model[0].dense_weight, model[0].stored.to_dense())
    assert model(torch.randn(3, 24).double()).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("through_meta", [False, True])
@torch.no_grad()
def test_weight_to_the_left_is_emptied_and_loaded(through_meta, dtype):
    model = served(nn.Linear(24, 16).to(dtype), (4, 4), form="dense_left")
    state = {key: t.clone() for key, t in model.state_dict().items()}
    x = torch.randn(3, 24).to(dtype)
    out = model(x)
    if through_meta:
        model.to("meta")
        assert model(x.to("meta")).shape == out.shape
    model.to_empty(device="cpu")
    assert model[0].stored.density == 0
    assert (model[0].wide_weight is not None) == (dtype == torch.bfloat16)
    model.load_state_dict(state)
    assert_exact("out", model(x), out)


@torch.no_grad()
def test_weight_to_the_left_is_filled_in_at_each_call_where_no_copy_is_kept():
    for dtype in (torch.float32, torch.bfloat16):
        model = gated(nn.Linear(24, 16).to(dtype), (4, 4))
        kept = sgtriton.sparsify(copy.deepcopy(model), form="dense_left")
        sgtriton.sparsify(model, form="dense_left", dense_copy=False)
        assert model[0].form == "dense_left"
        for other in (model, copy.deepcopy(model).half().to(dtype)):
            assert other[0].dense_weight is other[0].wide_weight is None
            assert other[0].bytes_beside == 0
        x = torch.randn(3, 24).to(dtype)
        assert_exact("out", model(x), kept(x))


@torch.no_grad()
def test_layer_of_16_bits_may_keep_both_copies():
    layer = served(nn.Linear(24, 16).half(), (4, 4), form="dense")[0]
    layer.set_forms({**DENSE, "1": "dense_left"}, "a test", True)
    assert layer.dense_weight.dtype == torch.float16
    assert layer.wide_weight.dtype == torch.float32
    assert layer.bytes_beside == 24 * 16 * (2 + 4)
    text = str(sgtriton.summary(layer))
    assert f"copies kept for forms other than sparse: {24 * 16 * 6:,} B" in text
    assert "dense_left at M 1; else dense: a test; copies take 3x the dense weight" in text
    wide = copy.deepcopy(layer).float()  # one copy serves both
    assert wide.bytes_beside == 24 * 16 * 4
    for rows in (1, 3):
        x = torch.randn(rows, 24).half()
        weight, bias = layer.stored.to_dense(), layer.bias
        expected = nn.functional.linear(x, weight, bias)
        assert_close(f"{rows} rows", layer(x), expected)
        expected = nn.functional.linear(x.float(), weight.float(), bias.float())
        assert_close(f"{rows} rows, wide", wide(x.float()), expected)
    layer.set_forms(LEFT, "a test", False)  # without a copy it is filled in at each call
    assert layer.dense_weight is layer.wide_weight is None
    x = torch.randn(3, 24).half()
    assert_close("out", layer(x), nn.functional.linear(x, layer.full_weight(), layer.bias))


@torch.no_grad()
def test_weight_to_the_left_compiles_and_exports_and_checks_its_input():
    for dtype in (torch.float32, torch.bfloat16):
        model = served(nn.Linear(24, 16).to(dtype), (4, 4), form="dense_left")
        x = torch.randn(3, 24).to(dtype)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert_close("compiled", compiled(x), model(x))
        assert_close("exported", torch.export.export(model, (x,)).module()(x), model(x))
        with pytest.raises(ValueError, match=r"the input is torch\.float64"):
            model(x.double())


def test_weight_to_the_left_trains_its_bias_and_passes_the_gradient_on():
    model = served(nn.Linear(12, 8), (4, 4), form="dense_left")
    weight = model[0].full_weight()
    x = torch.randn(3, 12, requires_grad=True)
    model(x).sum().backward()
    assert_close("dx", x.grad, weight.sum(0).expand(3, 12))
    assert_exact("bias", model[0].bias.grad, torch.full((8,), 3.0))


def test_unpatched_layer_keeps_no_copy():
    for dtype in (torch.float32, torch.bfloat16):
        model = served(nn.Linear(12, 8).to(dtype), (4, 4), form="dense_left")
        weight = model[0].stored.to_dense()
        sgtriton.unpatch(model)
        assert type(model[0]) is nn.Linear
        assert not dict(model.named_buffers())
        assert vars(model[0]).keys() == vars(nn.Linear(12, 8)).keys()
        assert_exact("weight", model[0].weight.detach(), weight)


@pytest.mark.parametrize("trainable", [False, True])
@torch.no_grad()
def test_unpatching_a_layer_with_a_masked_bias_keeps_its_weight(trainable):
    model = served(nn.Linear(12, 8), (4, 4), trainable=trainable)
    prune.random_unstructured(model[0], "bias", amount=5)
    x = torch.randn(3, 12)
    out = model(x)
    sgtriton.unpatch(model)
    assert type(model[0]) is nn.Linear
    assert {name for name, _ in model[0].named_parameters()} == {"weight", "bias_orig"}
    assert_close("out", model(x), out)


def test_layers_with_attributes_that_would_be_overwritten_are_left_alone():
    assert {*sparse_layers._ATTRIBUTES, *sparse_layers._OWN_BUFFERS} <= set(ADDED_NAMES)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].reason = "the user's"
    model[1].register_buffer("wide_weight", torch.ones(2))
    sgtriton.patch(model, (4, 4))
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear, sgtriton.GatedLinear]
    reasons = [skip.reason for skip in sgtriton.summary(model).skipped]
    names = ("reason", "wide_weight")
    assert reasons == [f"it has an attribute {name!r} of its own" for name in names]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "shape", [(5, 40), (5, 20), (1, 1), (1, 40), (2, 3, 40), (1,), ()], ids=str
)
@torch.no_grad()
def test_input_of_another_width_is_refused_in_every_form(form, shape):
    model = nn.Sequential(nn.Linear(32, 24))
    model[0].weight[:4], model[0].weight[:, -16:] = 0, 0
    sgtriton.sparsify(model, form=form, block=(4, 4))
    assert model[0].form == form
    with pytest.raises((ValueError, RuntimeError)):
        model(torch.randn(shape))


@pytest.mark.parametrize("form", ["dense", "sparse", "merged", "compacted"])
@pytest.mark.parametrize("shape", [(1, 40, 5, 5), (1, 31, 5, 5), (1, 5, 5), (5, 5)], ids=str)
@torch.no_grad()
def test_image_of_other_channels_is_refused_in_every_form(form, shape):
    model = nn.Sequential(nn.Conv2d(32, 24, 3, padding=1))
    model[0].weight[:4], model[0].weight[:, -16:] = 0, 0
    sgtriton.sparsify(model, form=form, block=(4, 4))
    assert model[0].form == form
    with pytest.raises((ValueError, RuntimeError)):
        model(torch.randn(shape))
