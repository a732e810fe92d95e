import copy
import logging
import warnings

import pytest
import torch
import torch.distributed as dist
from helpers import assert_close, assert_exact
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import sgtriton
from sgtriton import GatedConv1d, GatedConv2d, GatedLinear, patch, unpatch
from sgtriton.layers import GatedModule
from sgtriton.patching import find_layers


def gated_names(model):
    return [name for name, m in model.named_modules() if isinstance(m, GatedModule)]


def reasons(model):
    return {skip.name: skip.reason for skip in find_layers(model)[1]}


def close_gates(layer):
    with torch.no_grad():
        layer.gate.zero_()


def randomise_gates(model):
    for module in model.modules():
        if isinstance(module, GatedModule):
            nn.init.uniform_(module.gate)


def structure(model):
    """All that patch could change, apart from values."""
    return [
        (name, id(m), type(m), sorted(vars(m)), [(k, id(p)) for k, p in m._parameters.items()],
         len(m._load_state_dict_pre_hooks), m.training)
        for name, m in model.named_modules()
    ]  # fmt: skip


def mlp():
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))


def test_patch_is_in_place_and_keeps_identities():
    model = nn.Sequential(
        nn.Linear(8, 8), nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 3, 2), nn.Conv2d(1, 2, 1), nn.ReLU()
    )
    modules = [*model]
    parameters = dict(model.named_parameters())
    assert patch(model) is model
    assert [type(m) for m in model] == [
        GatedLinear,
        nn.Unflatten,
        GatedConv1d,
        GatedConv2d,
        nn.ReLU,
    ]
    assert all(a is b for a, b in zip(model, modules, strict=True))
    after = dict(model.named_parameters())
    assert all(after[name] is p for name, p in parameters.items())
    assert {*after} - {*parameters} == {"0.gate", "2.gate", "3.gate"}


def test_hooks_mode_and_requires_grad_are_kept():
    model = mlp().eval()
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append("forward"))
    model[0].register_forward_pre_hook(lambda *_: calls.append("pre"))
    model[0].weight.register_hook(lambda grad: calls.append("grad"))
    model[2].weight.requires_grad_(False)
    patch(model)
    assert not any(m.training for m in model.modules())
    assert not model[2].weight.requires_grad
    model(torch.randn(2, 8)).sum().backward()
    assert calls == ["pre", "forward", "grad"]
    assert model[2].gate.grad is not None


def test_unpatch_undoes_patch_without_a_trace():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(8, 4))
    before = structure(model)
    values = {name: t.clone() for name, t in model.state_dict().items()}
    patch(model, (4, 4))
    randomise_gates(model)
    assert structure(model) != before
    assert unpatch(model) is model
    assert structure(model) == before
    after = model.state_dict()
    assert [*after] == [*values]
    for name, t in values.items():
        assert_exact(name, after[name], t)


def test_patch_unpatch_patch_leaves_one_of_each_hook():
    model = mlp()
    for _ in range(3):
        patch(model, (2, 2))
        patch(model, (2, 2))
        assert len(model._load_state_dict_pre_hooks) == 1
        unpatch(model)
        assert not model._load_state_dict_pre_hooks


def test_copy_of_a_patched_model_can_be_unpatched():
    model = patch(mlp(), (2, 2))
    twin = unpatch(copy.deepcopy(model))
    assert not gated_names(twin)
    assert not twin._load_state_dict_pre_hooks
    assert len(model._load_state_dict_pre_hooks) == 1


@pytest.mark.parametrize("kind", ["threshold", "bernoulli"])
def test_fold_makes_the_dense_model_compute_what_the_gated_one_did(kind):
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(54, 3))
    patch(model.eval(), (2, 2), kind)
    randomise_gates(model)
    x = torch.randn(2, 4, 5, 5)
    out = model(x)
    unpatch(model, fold=True)
    assert not gated_names(model)
    assert_exact("folded", model(x), out)
    assert (model[0].weight == 0).any()


def test_unpatch_of_a_dense_model_changes_nothing():
    model = mlp()
    before = structure(model)
    assert unpatch(model, fold=True) is model
    assert structure(model) == before


def test_each_replacement_is_logged(caplog):
    model = nn.Sequential(nn.Linear(4, 4), nn.Embedding(3, 4))
    with caplog.at_level(logging.INFO, "sgtriton"):
        patch(model, (2, 2))
        unpatch(model)
    text = caplog.text
    assert "0: gated, block (2, 2), threshold" in text
    assert "1: not gated: unsupported type Embedding" in text
    assert "0: gates removed" in text


# one module or parameter in several places


def test_shared_module_is_gated_once_under_all_its_names():
    """O20."""
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    x = torch.randn(2, 3)
    ref = model(x)
    patch(model, (1, 1))
    assert model[0] is model[2] is layer
    assert isinstance(layer, GatedLinear)
    assert len([p for n, p in model.named_parameters() if n.endswith("gate")]) == 1
    assert_exact("out", model(x), ref)
    assert sgtriton.gate_penalty(model, l1=1.0).item() == pytest.approx(9 * 0.9)


@pytest.mark.parametrize("name", ["0", "2", "[02]"])
def test_shared_module_is_found_by_each_of_its_names(name):
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(3, 3))
    patch(model, (1, 1), include=name)
    assert isinstance(layer, GatedLinear)
    assert type(model[3]) is nn.Linear
    unpatch(model)
    patch(model, (1, 1), exclude=name)
    assert type(layer) is nn.Linear
    assert isinstance(model[3], GatedLinear)


class Tied(nn.Module):
    def __init__(self, tie):
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 10, bias=False)
        tie(self)

    def forward(self, tokens):
        return self.head(self.body(self.embedding(tokens)))


def tie_head(m):
    m.head.weight = m.embedding.weight


def tie_embedding(m):
    m.embedding.weight = m.head.weight


def tie_view(m):
    m.head.weight = nn.Parameter(m.embedding.weight.data.view(10, 4))


def tie_linears(m):
    m.twin = nn.Linear(4, 10, bias=False)
    m.twin.weight = m.head.weight


@pytest.mark.parametrize("tie", [tie_head, tie_embedding, tie_view, tie_linears])
def test_tied_weights_are_left_alone_and_named(tie):
    model = Tied(tie)
    ref = model(torch.arange(10))
    patch(model, (2, 2))
    assert gated_names(model) == ["body"]
    other = "twin.weight" if tie is tie_linears else "embedding.weight"
    assert reasons(model)["head"] == f"its weight is tied to {other}"
    assert_exact("out", model(torch.arange(10)), ref)


def test_tied_weights_on_meta_are_seen_too():
    with torch.device("meta"):
        model = Tied(tie_head)
    patch(model, (2, 2))
    assert gated_names(model) == ["body"]


def test_part_of_another_weight_is_tied_too():
    """Rows of one buffer, as fused projections have them."""
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(model[0].weight.data[4:])
    patch(model, (2, 2))
    assert gated_names(model) == ["2"]
    assert "0.weight" in reasons(model)["1"]


# layers that their parents read


def test_out_proj_of_attention_is_never_gated_without_effect():
    """O22."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    model = nn.ModuleDict({"attention": attention, "head": nn.Linear(8, 8)})
    x = torch.randn(1, 3, 8)
    ref = attention(x, x, x)[0]
    patch(model, (2, 2))
    assert gated_names(model) == ["head"]
    assert reasons(model) == {
        "attention": "its input projections are Parameters, not layers",
        "attention.out_proj": "MultiheadAttention attention reads its weight instead of calling it",
    }
    assert_exact("out", attention(x, x, x)[0], ref)


def test_plain_linear_as_out_proj_is_left_alone_too():
    attention = nn.MultiheadAttention(8, 2)
    attention.out_proj = nn.Linear(8, 8)
    with pytest.warns(UserWarning, match="gated 0 of 2"):
        patch(attention)


@pytest.mark.parametrize("grad_off", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_encoder_layer_uses_its_gates_in_the_eval_fast_path(activation, grad_off):
    """O23."""
    layer = nn.TransformerEncoderLayer(
        8, 2, 16, batch_first=True, dropout=0.0, activation=activation
    )
    switch = layer.activation_relu_or_gelu
    assert switch > 0
    x = torch.randn(2, 3, 8)
    patch(layer, (2, 2))
    assert gated_names(layer) == ["linear1", "linear2"]
    close_gates(layer.linear1)
    trained = layer.train()(x).detach()
    with grad_off():
        out = layer.eval()(x)
    assert (out - trained).abs().max() <= 1e-6
    unpatch(layer)
    assert layer.activation_relu_or_gelu == switch
    with grad_off():
        assert (layer(x) - trained).abs().max() > 1e-3  # the gates did something


@pytest.mark.parametrize("grad_off", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_encoder_uses_its_gates_in_eval(padded, grad_off):
    """O23, with the nested tensors that a padding mask would bring."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2)
    assert model.use_nested_tensor
    x = torch.randn(2, 4, 8)
    mask = torch.tensor([[False] * 4, [False, False, True, True]]) if padded else None
    patch(model, (4, 4))
    for encoder in model.layers:
        close_gates(encoder.linear1)
    real = slice(None) if mask is None else ~mask
    trained = model.train()(x, src_key_padding_mask=mask)[real].detach()
    with grad_off():
        out = model.eval()(x, src_key_padding_mask=mask)[real]
    assert (out - trained).abs().max() <= 1e-6
    assert model.use_nested_tensor is False
    unpatch(model)
    assert model.use_nested_tensor is True
    assert [m.activation_relu_or_gelu for m in model.layers] == [1, 1]


def test_copy_of_a_patched_encoder_layer_leaves_the_fast_path_too():
    layer = patch(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), (4, 4))
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    for encoder in model.layers:
        close_gates(encoder.linear1)
    x = torch.randn(2, 3, 8)
    trained = model.train()(x).detach()
    with torch.no_grad():
        assert (model.eval()(x) - trained).abs().max() <= 1e-6


def test_encoder_without_gates_keeps_its_fast_path():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 1), nn.Linear(8, 8))
    patch(model, (2, 2), include="1")
    assert model[0].use_nested_tensor
    assert model[0].layers[0].activation_relu_or_gelu


class Wrapper(nn.Module):
    """An adapter library's wrapper: picks a layer, and falls through to the original one."""

    def __init__(self):
        super().__init__()
        self.original_module = nn.Linear(8, 8)
        self.modules_to_save = nn.ModuleDict({"default": nn.Linear(8, 8)})
        self.active = True

    def forward(self, x):
        return (self.modules_to_save["default"] if self.active else self.original_module)(x)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("original_module"), name)


def test_wrapper_that_falls_through_to_a_layer_is_not_touched():
    """O24."""
    model = nn.Sequential(Wrapper())
    patch(model, (2, 2))
    assert type(model[0]) is Wrapper
    assert "forward" not in vars(model[0])
    assert gated_names(model) == ["0.original_module", "0.modules_to_save.default"]
    x = torch.randn(2, 8)
    active = model(x)
    model[0].active = False
    assert not torch.equal(model(x), active)
    unpatch(model)
    assert not gated_names(model)


def test_bare_wrapper_as_the_model_can_be_patched_and_loaded():
    model = patch(Wrapper(), (2, 2))
    model.load_state_dict(model.state_dict())
    assert not gated_names(unpatch(model))


# layers that cannot be gated


class Conv1D(nn.Module):
    """As GPT-2 has it: the weight is stored transposed."""

    def __init__(self, inner, out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inner, out))
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, x):
        return x @ self.weight + self.bias


class MyLinear(nn.Linear):
    pass


def test_transposed_layers_are_reported_never_misread():
    """O21."""
    model = nn.Sequential(Conv1D(8, 24), Conv1D(24, 8))
    x = torch.randn(4, 8)
    ref = model(x)
    with pytest.warns(UserWarning, match=r"gated 0 of 2 layers.*unsupported type Conv1D"):
        patch(model)
    assert_exact("out", model(x), ref)
    assert {*reasons(model)} == {"0", "1"}


def test_subclass_is_left_alone():
    model = nn.Sequential(MyLinear(4, 4), nn.Linear(4, 4))
    patch(model, (2, 2))
    assert type(model[0]) is MyLinear
    assert gated_names(model) == ["1"]
    assert "exact types Linear, Conv1d, Conv2d" in reasons(model)["0"]


def parametrized():
    return parametrizations.orthogonal(nn.Linear(4, 4))


def pruned():
    return prune.random_unstructured(nn.Linear(4, 4), "weight", 0.5)


def weight_normed():
    return parametrizations.weight_norm(nn.Conv2d(2, 4, 1))


def weight_normed_by_hook():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still in many models
        return nn.utils.weight_norm(nn.Linear(4, 4))


def spectral_normed():
    return nn.utils.spectral_norm(nn.Linear(4, 4))


@pytest.mark.parametrize(
    "make", [parametrized, pruned, weight_normed, weight_normed_by_hook, spectral_normed]
)
def test_computed_weight_is_left_alone_with_the_remedy(make):
    layer = make()
    model = nn.Sequential(layer, nn.Linear(4, 4)).eval()
    x = torch.randn(2, 2, 2, 2) if isinstance(layer, nn.Conv2d) else torch.randn(2, 4)
    ref = layer(x)
    patch(model, (2, 2))
    assert gated_names(model) == ["1"]
    assert_exact("out", layer(x), ref)
    assert reasons(model) == {
        "0": "its weight is computed (a parametrization or pruning hook); make it permanent first: "
        "parametrize.remove_parametrizations or prune.remove"
    }


def test_layer_made_permanent_can_be_gated():
    layer = parametrized()
    parametrize.remove_parametrizations(layer, "weight")
    model = nn.Sequential(layer, prune.remove(pruned(), "weight"))
    patch(model, (2, 2))
    assert gated_names(model) == ["0", "1"]
    assert model(torch.randn(2, 4)).shape == (2, 4)


def test_parametrized_bias_does_not_hide_the_weight():
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "bias", nn.Identity())
    model = nn.Sequential(layer, nn.Linear(4, 4))
    patch(model, (2, 2))
    assert "0" in reasons(model) or "0" in gated_names(model)
    assert model(torch.randn(2, 4)).shape == (2, 4)


def test_lazy_layers_are_left_alone_until_a_batch_went_through():
    model = nn.Sequential(nn.LazyLinear(6), nn.Unflatten(1, (2, 3)), nn.LazyConv1d(2, 2))
    with pytest.warns(UserWarning, match="run one batch"):
        patch(model, (2, 2))
    assert {s.name: s.size for s in find_layers(model)[1]} == {"0": 0, "2": 0}
    model(torch.randn(3, 5))
    patch(model, (2, 2))
    assert gated_names(model) == ["0", "2"]


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64], ids=str)
def test_weights_that_no_gate_can_multiply_are_left_alone(dtype):
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=dtype), requires_grad=False)
    model = nn.Sequential(layer, nn.Linear(4, 4))
    patch(model, (2, 2))
    assert gated_names(model) == ["1"]
    assert reasons(model) == {"0": f"unsupported dtype {dtype}"}


def test_weight_of_a_foreign_tensor_type_is_left_alone():
    class Packed(torch.Tensor):
        pass

    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4).as_subclass(Packed))
    model = nn.Sequential(layer, nn.Linear(4, 4))
    patch(model, (2, 2))
    assert gated_names(model) == ["1"]
    assert reasons(model) == {"0": "its weight is a Packed"}


def test_strangers_are_listed_with_their_size():
    model = nn.ModuleDict(
        {
            "lstm": nn.LSTM(4, 3),
            "bilinear": nn.Bilinear(2, 3, 4),
            "embedding": nn.Embedding(5, 4),
            "conv3d": nn.Conv3d(1, 2, 3),
            "transposed": nn.ConvTranspose2d(2, 3, 2),
            "norm": nn.LayerNorm(4),
            "linear": nn.Linear(4, 4),
        }
    )
    targets, skipped = find_layers(model)
    assert {*targets} == {"linear"}
    sizes = {skip.name: skip.size for skip in skipped}
    assert sizes == {
        "lstm": 4 * 3 * (4 + 3),
        "bilinear": 2 * 3 * 4,
        "embedding": 20,
        "conv3d": 54,
        "transposed": 24,
    }
    assert all("unsupported type" in skip.reason for skip in skipped)
    patch(model, (2, 2))
    assert gated_names(model) == ["linear"]


def test_layer_without_weights_is_left_alone():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # initialising nothing
        model = nn.Sequential(nn.Linear(0, 4), nn.Linear(4, 0), nn.Linear(4, 4))
    patch(model, (2, 2))
    assert gated_names(model) == ["2"]
    assert reasons(model) == {"0": "it has no weights", "1": "it has no weights"}


# kinds of models


def test_meta_model_is_patched_on_meta():
    with torch.device("meta"):
        model = patch(mlp(), (2, 2))
    assert gated_names(model) == ["0", "2"]
    assert all(p.is_meta for p in model.parameters())
    assert model(torch.randn(2, 8, device="meta")).shape == (2, 4)


@pytest.mark.parametrize("make", [nn.Sequential, nn.ReLU, lambda: nn.LayerNorm(3)])
def test_model_without_layers_warns(make):
    model = make()
    with pytest.warns(UserWarning, match="patch gated 0 of 0 layers"):
        assert patch(model) is model


def test_bare_layer_is_a_model():
    layer = nn.Linear(4, 4)
    x = torch.randn(2, 4)
    ref = layer(x)
    assert patch(layer, (2, 2)) is layer
    assert_exact("out", layer(x), ref)
    layer.load_state_dict(layer.state_dict())
    bad = layer.state_dict()
    bad["gate"] = torch.ones(3, 3)
    with pytest.raises(ValueError, match="the model"):
        layer.load_state_dict(bad)
    assert type(unpatch(layer)) is nn.Linear


def test_nested_containers_are_searched():
    model = nn.ModuleList(
        [
            nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))}),
            nn.Sequential(nn.Conv2d(1, 1, 1)),
        ]
    )
    patch(model, (1, 1))
    assert gated_names(model) == ["0.a.0", "0.a.1.0", "1.0"]


@pytest.mark.parametrize("warm", [False, True], ids=["new", "compiled before"])
def test_compiled_model_sees_the_gates(warm):
    model = mlp()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(3, 8)
    ref = compiled(x) if warm else model(x)
    assert patch(compiled, (2, 2)) is compiled
    assert gated_names(model) == ["0", "2"]
    assert_exact("open", compiled(x), ref)
    close_gates(model[2])
    assert_exact("closed", compiled(x), model[2].bias.expand(3, 4))
    unpatch(compiled)
    assert_exact("unpatched", compiled(x), ref)


@pytest.fixture
def process_group():
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_model_wrapped_for_distribution_is_refused_and_unchanged():
    model = mlp()
    wrapped = nn.parallel.DistributedDataParallel(model)
    for outer in (wrapped, nn.Sequential(wrapped)):
        with pytest.raises(ValueError, match=r"DistributedDataParallel.*patch the model first"):
            patch(outer, (2, 2))
    assert not gated_names(model)
    outer = nn.parallel.DistributedDataParallel(patch(model, (2, 2)))
    outer(torch.randn(2, 8)).sum().backward()
    assert model[0].gate.grad is not None


# which layers


def test_include_and_exclude_take_globs():
    def model():
        return nn.ModuleDict({"encoder": mlp(), "decoder": mlp(), "head": nn.Linear(4, 2)})

    def names(**options):
        return gated_names(patch(model(), (2, 2), **options))

    assert names(include="encoder.*") == ["encoder.0", "encoder.2"]
    assert names(include=["*.0", "head"]) == ["encoder.0", "decoder.0", "head"]
    assert names(exclude="*coder*") == ["head"]
    assert names(include="*coder.*", exclude=("*.2",)) == ["encoder.0", "decoder.0"]
    assert names(include=iter(["head"])) == ["head"]
    assert names(exclude=[]) == names()
    assert len(names()) == 5


def test_include_and_exclude_take_functions():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2), nn.Conv1d(2, 2, 1))
    patch(
        model,
        (2, 2),
        include=lambda name, m: isinstance(m, nn.Linear),
        exclude=lambda name, m: name == "1",
    )
    assert gated_names(model) == ["0"]


def test_layer_that_is_left_out_is_not_a_reason_to_warn():
    model = mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch(model, (2, 2), include="0")


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize(
    ("pattern", "match"),
    [
        ("encoder.*", "matches no layer; the layers are: 0, 2"),
        (["0", "7"], "'7' matches no layer"),
        ("Linear", "matches no layer"),
        ([nn.Linear], "must hold glob patterns"),
        (3, "must hold glob patterns, got 3"),
    ],
)
def test_pattern_that_matches_nothing_is_refused(argument, pattern, match):
    model = mlp()
    before = structure(model)
    with pytest.raises(ValueError, match=f"{argument}.*{match}"):
        patch(model, (2, 2), **{argument: pattern})
    assert structure(model) == before


def test_second_patch_gates_the_rest_in_another_block():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    patch(model, (4, 4), include="0")
    gate = model[0].gate
    close_gates(model[0])
    patch(model, (1, 1), "bernoulli")
    assert model[0].gate is gate
    assert model[0].gate.shape == (2, 2)
    assert (gate == 0).all()
    assert model[1].gate.shape == (8, 8)
    assert [layer.gate_kind for layer in model] == ["threshold", "bernoulli"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch(model)  # nothing left to do is no reason to warn


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"block": (0, 4)}, r"block sides.*\(0, 4\)"),
        ({"block": (4, -1)}, "block sides"),
        ({"block": 4}, "pair"),
        ({"block": (2.0, 2)}, "block sides"),
        ({"gate": "sigmoid"}, r"gate kind must be one of .*'sigmoid'"),
        ({"gate": None}, "gate kind"),
        ({"init": 0.5}, r"init must be in \(0.5, 1\]"),
        ({"init": 1.5}, "init"),
        ({"init": float("nan")}, "init"),
    ],
)
def test_bad_options_leave_the_model_unchanged(options, match):
    model = mlp()
    before = structure(model)
    with pytest.raises(ValueError, match=match):
        patch(model, **options)
    assert structure(model) == before


def test_include_that_raises_leaves_the_model_unchanged():
    model = mlp()
    before = structure(model)

    def include(name, module):
        return {"0": True}[name]

    with pytest.raises(KeyError):
        patch(model, (2, 2), include=include)
    assert structure(model) == before


def test_no_layer_is_too_small():
    model = nn.Sequential(nn.Linear(1, 1), nn.Conv2d(1, 1, 1))
    patch(model)
    assert gated_names(model) == ["0", "1"]


def test_exporting_the_effective_weight_does_not_change_the_model():
    model = patch(mlp(), (2, 2))
    randomise_gates(model)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    weight = model[0].eval_weight()
    weight.zero_()
    for name, t in model.state_dict().items():
        assert_close(name, t, before[name])


@pytest.mark.parametrize("batch", [1, 5])
def test_patching_a_transposed_weight_changes_no_bit(batch):
    model = nn.Linear(96, 64)
    model.weight = nn.Parameter(torch.randn(96, 64).t())
    x = torch.randn(batch, 96)
    out = model(x)
    assert torch.equal(sgtriton.patch(model, (4, 4))(x), out)


def test_patching_keeps_a_channels_last_weight_channels_last():
    model = nn.Conv2d(8, 16, 3).to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 9, 9).to(memory_format=torch.channels_last)
    out = model(x)
    sgtriton.patch(model, (4, 4))
    assert model.gated_weight().is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(model(x), out)


def test_layer_with_a_name_that_ours_would_take_is_left_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].gate = 3
    model[0].register_buffer("bits", torch.zeros(2))
    with pytest.warns(UserWarning, match="'bits' of its own.*'gate' of its own"):
        sgtriton.patch(model)
    assert model[1].gate == 3
    assert all(type(layer) is nn.Linear for layer in model)


def test_folding_nan_gates_is_refused_before_anything_changes():
    model = sgtriton.patch(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), (2, 2))
    with torch.no_grad():
        model[1].gate[0, 1] = float("nan")
    with pytest.raises(ValueError, match=r"^1: gates must be numbers, got NaN at gate\[0, 1\]"):
        sgtriton.unpatch(model, fold=True)
    assert all(type(layer) is sgtriton.GatedLinear for layer in model)


def test_what_is_no_module_is_refused():
    with pytest.raises(ValueError, match=r"model must be a torch\.nn\.Module, got str"):
        sgtriton.patch("x")  # pyright: ignore
