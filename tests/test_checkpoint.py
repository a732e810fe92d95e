"""Files: what is saved comes back bit for bit, and nothing else gets in.

Block indices are addresses to a kernel: files with mutated ones are loaded in a child process.
"""

import copy
import itertools
import json
import os
import pickle
import platform
import random
import resource
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from helpers import assert_exact
from torch import nn

import sgtriton
from sgtriton import container, planning
from sgtriton.layers import GatedModule
from sgtriton.sparse_layers import BUCKETS, SparseModule

ROOT = Path(__file__).parents[1]


def net():
    """Two Linear layers, a convolution, buffers of its own; small, so that its file is."""
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1),
        nn.BatchNorm2d(2),
        nn.Flatten(),
        nn.Linear(2 * 4 * 4, 8),
        nn.ReLU(),
        nn.Linear(8, 4),
    )


def parts():
    return list(net())


X = torch.linspace(-1, 1, 3 * 16).reshape(3, 1, 4, 4)


@torch.no_grad()
def patched(model=None, block=(4, 4), share=0.5, gate="threshold"):
    model = sgtriton.patch(net() if model is None else model, block=block, gate=gate)
    for layer in model.modules():
        if isinstance(layer, GatedModule):
            layer.gate.copy_((torch.rand_like(layer.gate) < share).float())
    return model.eval()


def mixed():
    """A gated model: per-weight gates on the last layer, blocks on the others."""
    return patched(sgtriton.patch(net(), block=(1, 1), include="5"))


def served(form="sparse"):
    return sgtriton.sparsify(mixed(), form=form)


TARGETS = {
    "dense": lambda: net().eval(),
    "gated": mixed,
    "gated in other blocks": lambda: patched(block=(2, 8)),
    "sparse": lambda: served("dense"),
    "sparse in other blocks": lambda: sgtriton.sparsify(patched(block=(2, 8)), form="sparse"),
}


def snapshot(model):
    """Everything that a failed load must leave alone."""
    return (
        [(type(m), m, set(vars(m))) for m in model.modules()],
        {name: (p, p.detach().clone()) for name, p in model.named_parameters()},
        {name: t.clone() for name, t in model.named_buffers()},
    )


def assert_unchanged(model, before):
    modules, parameters, buffers = before
    for module, (kind, same, attributes) in zip(model.modules(), modules, strict=True):
        assert module is same
        assert type(module) is kind
        assert set(vars(module)) == attributes
    assert dict(model.named_parameters()).keys() == parameters.keys()
    for name, p in model.named_parameters():
        assert p is parameters[name][0]
        assert_exact(name, p.detach(), parameters[name][1])
    assert dict(model.named_buffers()).keys() == buffers.keys()
    for name, t in model.named_buffers():
        assert_exact(name, t, buffers[name])


def refuse(model, path, message=None):
    """The load raises, names the file, says ``message``, and changes nothing."""
    before = snapshot(model)
    with pytest.raises(ValueError, match=message) as caught:
        sgtriton.load(model, path)
    assert str(caught.value).startswith(str(path))
    assert_unchanged(model, before)


def unpack(path):
    """A file's description and tensors."""
    with safetensors.safe_open(path, "pt") as file:
        # clones: the file is mapped, and will be written to
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        return json.loads(file.metadata()["sgtriton"]), tensors


def pack(path, description, tensors):
    """Write a file with right checksums, whatever it says."""
    if isinstance(description, dict) and isinstance(description.get("checksums"), dict):
        description["checksums"] = {n: container._checksum(t) for n, t in tensors.items()}
    pack_text(path, json.dumps(description), tensors)


def pack_text(path, text, tensors):
    metadata = {"sgtriton": text, "sgtriton_crc32": str(zlib.crc32(text.encode()))}
    path.write_bytes(safetensors.torch.save(tensors, metadata))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.sgt"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("form", ["sparse", "dense"])
@torch.no_grad()
def test_served_model_reloads_bitwise_into_any_state_of_its_architecture(path, target, form):
    model = served(form)
    out = model(X)
    sgtriton.save(model, path)
    other = TARGETS[target]()
    layers = list(other)
    assert sgtriton.load(other, path) is other
    assert list(other) == layers
    assert_exact("out", other(X), out)
    assert other.state_dict().keys() == model.state_dict().keys()
    for name, t in model.state_dict().items():
        assert_exact(name, other.state_dict()[name], t)
    for i in (0, 3, 5):
        assert other[i].forms == model[i].forms
        assert other[i].gate_block == model[i].gate_block
        assert other[i].reason == model[i].reason


@pytest.mark.parametrize("target", TARGETS)
@torch.no_grad()
def test_gated_model_loads_as_a_served_one(path, target):
    model = mixed()
    before = snapshot(model)
    sgtriton.save(model, path)
    assert_unchanged(model, before)
    other = sgtriton.load(TARGETS[target](), path)
    for i in (0, 3, 5):
        assert isinstance(other[i], SparseModule)
        assert_exact(f"{i}", other[i].full_weight(), model[i].eval_weight())
        assert_exact(f"{i}", other[i].stored.open_gates, model[i].open_gates())


@torch.no_grad()
def test_recorded_forms_are_taken_per_bucket(path):
    model = served()
    forms = {**dict.fromkeys(BUCKETS, "dense"), "2-8": "sparse"}
    model[3].set_forms(forms, "a test", False)
    sgtriton.save(model, path)
    again = sgtriton.load(net().eval(), path)
    assert again[3].forms == forms
    assert again[3].dense_weight is None
    for rows in (1, 3, 8, 40, 200):
        x = torch.randn(rows, 1, 4, 4)
        assert_exact(f"{rows} rows", again(x), model(x))


@pytest.mark.parametrize("dense_copy", [True, False])
def test_forms_are_chosen_anew_on_another_kind_of_device(path, dense_copy, monkeypatch):
    """The recorded dense copy's prohibition stays."""

    # dense, the first, is the fastest
    monkeypatch.setattr(
        planning, "undisturbed_ms", lambda calls, *a, **k: [1.0, *[2.0] * 4][: len(calls)]
    )
    sgtriton.save(sgtriton.sparsify(mixed(), form="sparse", dense_copy=dense_copy), path)
    description, tensors = unpack(path)
    for entry in description["layers"].values():
        entry["device"] = "cuda"
    pack(path, description, tensors)
    again = sgtriton.load(net(), path)
    assert set(again[3].forms.values()) == {"dense"}
    assert "0.5x at M 1" in str(again[3].reason)
    for i in (0, 3, 5):
        assert (again[i].dense_weight is not None) == dense_copy


def test_buffers_travel(path):
    model = served()
    model[1].running_mean.fill_(3)
    model[1].num_batches_tracked.fill_(77)
    sgtriton.save(model, path)
    again = sgtriton.load(net(), path)
    assert again[1].running_mean.tolist() == [3, 3]
    assert again[1].num_batches_tracked == 77


@torch.no_grad()
def test_model_keeps_its_dtype(path):
    model = served()
    sgtriton.save(model, path)
    half = sgtriton.load(net().to(torch.bfloat16), path)
    assert {t.dtype for t in half.state_dict().values() if t.is_floating_point()} == {
        torch.bfloat16
    }
    assert_exact("weight", half[3].full_weight(), model[3].full_weight().to(torch.bfloat16))
    sgtriton.save(half, path)
    again = sgtriton.load(net().to(torch.bfloat16).eval(), path)
    assert_exact("out", again(X.to(torch.bfloat16)), half.eval()(X.to(torch.bfloat16)))


@torch.no_grad()
def test_layer_that_the_file_holds_dense_loads_into_any_state(path):
    model = patched(sgtriton.patch(net(), block=(4, 4), include="3"), share=1)
    sgtriton.unpatch(model)
    sgtriton.patch(model, block=(4, 4), include="3")
    out = model.eval()(X)
    sgtriton.save(model, path)
    for target in TARGETS.values():
        other = sgtriton.load(target(), path)
        assert [type(other[i]) for i in (0, 5)] == [nn.Conv2d, nn.Linear]
        assert isinstance(other[3], SparseModule)
        other[3].set_forms(dict.fromkeys(BUCKETS, "dense"), "a test", True)
        assert_exact("out", other.eval()(X), out)


def test_loaded_model_refuses_hostile_states(path):
    """The check of all layers ahead of a load comes with ``load`` as well."""
    sgtriton.save(served(), path)
    model = sgtriton.load(net(), path)
    state = {k: t + 1 if t.is_floating_point() else t for k, t in model.state_dict().items()}
    state["3.col"] = state["3.col"] + 100
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^3: col"):
        model.load_state_dict(state)
    assert_unchanged(model, before)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(100, 16)
        self.hidden = nn.Linear(16, 16)
        self.out = nn.Linear(16, 100)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(torch.relu(self.hidden(self.embed(x))))


@torch.no_grad()
def test_tied_tensors_are_stored_once_and_stay_tied(path):
    model = sgtriton.sparsify(patched(Tied(), share=0.5), form="sparse")
    sgtriton.save(model, path)
    description, tensors = unpack(path)
    assert description["same_as"] == {"out.weight": "embed.weight"}
    assert "out.weight" not in tensors
    again = sgtriton.load(Tied(), path)
    assert again.out.weight is again.embed.weight
    x = torch.arange(20)
    assert_exact("out", again(x), model(x))


@torch.no_grad()
def test_tensors_that_are_not_contiguous_are_stored(path):
    model = mixed()
    for i in (3, 5):
        weight = model[i].weight
        weight.data = weight.data.T.contiguous().T
    model[1].bias.data = torch.ones(1).expand(2)
    model[0].bias.data = torch.arange(8.0)[::4]
    assert not any(t.is_contiguous() for t in (model[3].weight, model[1].bias, model[0].bias))
    sgtriton.save(model, path)
    again = sgtriton.load(net().eval(), path)
    for i in (3, 5):
        assert_exact(f"{i}", again[i].full_weight(), model[i].eval_weight())
    assert again[1].bias.tolist() == [1, 1]
    assert again[0].bias.tolist() == [0, 4]


@torch.no_grad()
def test_file_just_loaded_can_be_written_again(path):
    sgtriton.save(served(), path)
    model = sgtriton.load(net().eval(), path)
    model[3].values.mul_(2)
    out = model(X)
    sgtriton.save(model, path)
    assert_exact("memory", model(X), out)
    again = sgtriton.load(net().eval(), path)
    assert_exact("file", again[3].values, model[3].values)
    sgtriton.save(patched(net()), path)  # and by another model
    assert_exact("memory", model(X), out)


def test_same_model_gives_the_same_bytes(path):
    model = served()
    sgtriton.save(model, path)
    first = path.read_bytes()
    sgtriton.save(copy.deepcopy(model), path)
    assert unpack(path)[0]["checksums"]
    assert path.stat().st_size == len(first)


def test_per_weight_layer_takes_a_tenth_of_its_dense_bytes(path):
    model = sgtriton.patch(nn.Sequential(nn.Linear(784, 300)), block=(1, 1))
    gate = model[0].gate.data.flatten().fill_(0)
    gate[torch.randperm(len(gate))[: round(0.05 * len(gate))]] = 1
    model[0].gate.data = gate.view(300, 784)
    sgtriton.save(model, path)
    assert path.stat().st_size <= 0.10 * 300 * 784 * 4


def test_block_layer_takes_what_its_open_blocks_take(path):
    model = sgtriton.patch(nn.Sequential(nn.Linear(1024, 1024)), block=(32, 32))
    gate = torch.zeros(32 * 32)
    gate[torch.randperm(len(gate))[:102]] = 1  # 90 % closed
    model[0].gate.data = gate.view(32, 32)
    sgtriton.save(model, path)
    gated_size = path.stat().st_size
    sgtriton.save(sgtriton.sparsify(model, form="dense"), path)
    assert max(gated_size, path.stat().st_size) <= 0.15 * 1024 * 1024 * 4


@pytest.mark.parametrize("target", ["dense", "gated", "sparse"])
def test_every_truncation_is_refused(path, target):
    sgtriton.save(served(), path)
    data, model = path.read_bytes(), TARGETS[target]()
    before = snapshot(model)
    for length in reversed(range(len(data))):
        os.truncate(path, length)
        with pytest.raises(ValueError, match=r"model\.sgt: "):
            sgtriton.load(model, path)
    assert_unchanged(model, before)
    path.write_bytes(data + b"\0")
    refuse(model, path, "truncated or damaged")
    path.write_bytes(data)
    sgtriton.load(model, path)


def flip(path, data, byte, bits):
    """Change one byte of a file of ``data`` in place."""
    with open(path, "r+b") as file:
        file.seek(byte)
        file.write(bytes([data[byte] ^ bits]))


@pytest.mark.parametrize("target", ["dense", "gated", "sparse"])
def test_every_single_bit_flip_is_noticed(path, target):
    model = served()
    sgtriton.save(model, path)
    data = path.read_bytes()
    model = TARGETS[target]()
    before = snapshot(model)
    draw = random.Random(target)
    header = 8 + int.from_bytes(data[:8], "little")
    for i in range(1000):
        # half of them in the header, whose text has more ways to be right
        bit = draw.randrange(8 * header) if i % 2 else draw.randrange(8 * len(data))
        flip(path, data, bit // 8, 1 << bit % 8)
        with pytest.raises(ValueError, match=r"model\.sgt: "):
            sgtriton.load(model, path)
        flip(path, data, bit // 8, 0)
    assert path.read_bytes() == data
    assert_unchanged(model, before)


def test_names_that_are_no_ascii_are_guarded_by_the_checksum_too(path):
    """Flipping the case of a hexadecimal escape gives the same text."""
    model = nn.ModuleDict({"größe\u0001": nn.Linear(4, 4)})
    sgtriton.save(sgtriton.patch(model, block=(2, 2)), path)
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for byte in range(8, header):
        flip(path, data, byte, ord("a") ^ ord("A"))
        with pytest.raises(ValueError, match=r"model\.sgt"):
            sgtriton.load(model, path)
        flip(path, data, byte, 0)
    sgtriton.load(model, path)


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


# changes of the tensors of layer "3" (an 8x32 weight in 4x4 blocks), checksums right again
TENSOR_CHANGES = {
    "missing values": ("3.values", None),
    "missing crow": ("3.crow", None),
    "missing col": ("3.col", None),
    "missing bits": ("5.bits", None),
    "bits beside blocks": ("3.bits", torch.zeros(32, dtype=torch.uint8)),
    "dense weight beside blocks": ("3.weight", torch.zeros(8, 32)),
    "gate beside blocks": ("3.gate", torch.zeros(2, 8)),
    "no crow": ("3.crow", ints()),
    "short crow": ("3.crow", ints(0, 2)),
    "long crow": ("3.crow", ints(0, 2, 4, 4)),
    "falling crow": ("3.crow", ints(0, 3, 2)),
    "negative crow": ("3.crow", ints(5, 0, -1)),
    "crow past the blocks": ("3.crow", ints(0, 1, 3)),
    "crow of a huge count": ("3.crow", ints(0, 0, 2**31 - 1)),
    "crow of a huger count": ("3.crow", ints(0, 0, 2**62, dtype=torch.int64)),
    "crow as floats": ("3.crow", torch.tensor([0.0, 1.0, 2.0])),
    "crow of int16": ("3.crow", ints(0, 1, 2, dtype=torch.int16)),
    "crow in two dimensions": ("3.crow", ints(0, 1, 2)[None]),
    "column 999": ("3.col", ints(0, 999)),
    "column -1": ("3.col", ints(-1, 0)),
    "column 2**31 - 1": ("3.col", ints(0, 2**31 - 1)),
    "column -2**31": ("3.col", ints(0, -(2**31))),
    "column 2**40": ("3.col", ints(0, 2**40, dtype=torch.int64)),
    "too few columns": ("3.col", ints(0)),
    "too many columns": ("3.col", ints(0, 1, 2)),
    "columns as bytes": ("3.col", torch.zeros(2, dtype=torch.uint8)),
    "one block too few": ("3.values", torch.zeros(1, 4, 4)),
    "one block too many": ("3.values", torch.zeros(3, 4, 4)),
    "no block": ("3.values", torch.zeros(0, 4, 4)),
    "blocks of another size": ("3.values", torch.zeros(2, 8, 2)),
    "blocks laid flat": ("3.values", torch.zeros(2, 16)),
    "values as integers": ("3.values", torch.zeros(2, 4, 4, dtype=torch.int64)),
    "values as truths": ("3.values", torch.zeros(2, 4, 4, dtype=torch.bool)),
    "bits too long": ("5.bits", torch.zeros(5, dtype=torch.uint8)),
    "bits too many": ("5.bits", torch.full((4,), 255, dtype=torch.uint8)),
    "bits as integers": ("5.bits", torch.zeros(4, dtype=torch.int32)),
    "kept too few": ("5.values", torch.zeros(1)),
    "kept in two dimensions": ("5.values", torch.zeros(2, 1)),
    "missing bias": ("3.bias", None),
    "bias of another shape": ("3.bias", torch.zeros(9)),
    "bias as integers": ("3.bias", torch.zeros(8, dtype=torch.int64)),
    "missing buffer": ("1.running_mean", None),
    "counter as float": ("1.num_batches_tracked", torch.tensor(1.5)),
    "counter in one dimension": ("1.num_batches_tracked", torch.zeros(1, dtype=torch.int64)),
    "extra array": ("7.weight", torch.zeros(3)),
    "array of no name": ("", torch.zeros(3)),
}  # fmt: skip


def two_blocks():
    """The model of TENSOR_CHANGES: layer "3" has one open block in each block row."""
    model = mixed()
    gate = torch.zeros(2, 8)
    gate[0, 0] = gate[1, 3] = 1
    model[3].gate.data = gate
    model[5].gate.data = torch.zeros(4, 8)
    model[5].gate.data[1, :2] = 1
    return sgtriton.sparsify(model, form="sparse")


def load_changed_tensors(folder):
    """Run in a child process: try each change on each target; prints what happened, and memory."""
    torch.set_num_threads(1)
    path = Path(folder) / "model.sgt"
    sgtriton.save(two_blocks(), path)
    description, tensors = unpack(path)
    models = {target: TARGETS[target]() for target in ("dense", "gated", "sparse")}
    # a change is one only if what is changed is right
    for target in models:
        sgtriton.load(TARGETS[target](), path)
    before = {target: snapshot(model) for target, model in models.items()}
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = {}
    for (change, (key, value)), target in zip(TENSOR_CHANGES.items(), itertools.cycle(models)):
        model = models[target]
        changed = {**tensors, key: value}
        pack(path, dict(description), {k: t for k, t in changed.items() if t is not None})
        began = time.monotonic()
        try:
            sgtriton.load(model, path)
            outcomes[f"{change}, {target}"] = "loaded"
        except ValueError as error:
            outcomes[f"{change}, {target}"] = str(error)
        assert time.monotonic() - began < 5
        assert_unchanged(model, before[target])
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start
    result = {"outcomes": outcomes, "grown_kib": grown, "path": str(path)}
    print(json.dumps({"arrays": result}), flush=True)


@pytest.fixture(scope="module")
def child(tmp_path_factory):
    """What ``kill_saves`` and ``load_changed_tensors`` print in a process of their own."""
    folders = [tmp_path_factory.mktemp(name) for name in ("kills", "arrays")]
    places = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"}
    code = (
        "import sys, test_checkpoint as t; t.kill_saves(sys.argv[1], 30); "
        "t.load_changed_tensors(sys.argv[2])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *folders], env=env, capture_output=True, text=True, timeout=200
    )
    printed = {}
    for line in done.stdout.splitlines():
        printed |= json.loads(line)
    return printed, f"exit code {done.returncode}\n{done.stderr[-2000:]}"


def test_arrays_that_do_not_fit_are_refused_without_a_crash(child):
    printed, ended = child
    assert "arrays" in printed, ended
    result = printed["arrays"]
    assert len(result["outcomes"]) == len(TENSOR_CHANGES)
    for case, said in result["outcomes"].items():
        assert said.startswith(result["path"]), f"{case}: {said}"
        key, _ = TENSOR_CHANGES[case.rsplit(", ", 1)[0]]
        assert key.split(".")[0] in said.removeprefix(result["path"]), f"{case}: {said}"
    assert result["grown_kib"] < 200 << 10


NOTHING = object()
WRONG = [NOTHING, None, True, 0, -1, 1.5, 10**30, "", "x", [], [[]], {}, {"x": 1}, float("nan")]

# per field of a layer's entry, the values of WRONG (and others) that are right for it
RIGHT = {
    "type": [], "shape": [], "groups": [], "gate_block": [], "gate_kind": [],
    "forms": [None], "dense_copy": [True], "device": ["", "x"],
}  # fmt: skip
MORE = {
    "shape": [
        [8], [8, 0], [8, -32], [8, 32.0], [8, True], [8, 32, 1], [32, 8], [2**60, 2**60], "8x32",
    ],
    "groups": [2, 8, 2**70, "1"],
    "gate_block": [
        [4], [4, 4, 4], [0, 4], [4, -4], [4, 4.0], [True, 4], [2, 8], [1, 1], [None, 4], "44",
    ],
    "gate_kind": ["Threshold", "soft", ["threshold"], {"threshold": 1}],
    "type": ["Conv2d", "linear", "BlockSparseLinear", "Module", ["Linear"]],
    "forms": [
        dict.fromkeys(BUCKETS, "fast"), dict.fromkeys(BUCKETS), {b: ["sparse"] for b in BUCKETS},
        {"1": "sparse"}, {**dict.fromkeys(BUCKETS, "sparse"), "x": "sparse"}, [*BUCKETS],
    ],
    "dense_copy": [1, "yes"],
    "device": [["cpu"], 0],
}  # fmt: skip


@pytest.mark.parametrize("field", RIGHT)
def test_layer_fields_of_a_wrong_type_or_value_are_refused(path, field):
    sgtriton.save(two_blocks(), path)
    description, tensors = unpack(path)
    model = net()
    for value in WRONG + MORE[field]:
        if any(value == right and type(value) is type(right) for right in RIGHT[field]):
            continue
        changed = copy.deepcopy(description)
        changed["layers"]["3"][field] = value
        if value is NOTHING:
            del changed["layers"]["3"][field]
        pack(path, changed, tensors)
        refuse(model, path, "3: ")


def test_fields_that_a_layer_does_not_have_are_refused(path):
    sgtriton.save(two_blocks(), path)
    description, tensors = unpack(path)
    description["layers"]["3"]["code"] = "print()"
    pack(path, description, tensors)
    refuse(net(), path, "3: damaged: its description must have fields")


def test_sparse_form_of_a_layer_that_has_none_is_refused(path):
    sgtriton.save(two_blocks(), path)
    description, tensors = unpack(path)
    for name in ("5",):
        changed = copy.deepcopy(description)
        changed["layers"][name]["forms"] = dict.fromkeys(BUCKETS, "sparse")
        pack(path, changed, tensors)
        refuse(net(), path, rf"{name}: the layer has the forms \(.*\), the file says 'sparse'")


@pytest.mark.parametrize("field", ["format", "layers", "same_as", "checksums"])
def test_description_fields_of_a_wrong_type_are_refused(path, field):
    sgtriton.save(two_blocks(), path)
    description, tensors = unpack(path)
    for value in WRONG:
        if value == {} and field == "same_as":
            continue
        changed = {**description, field: value}
        if value is NOTHING:
            del changed[field]
        pack_text(path, json.dumps(changed), tensors)
        refuse(net(), path)


@pytest.mark.parametrize("value", [2, 0, -1, "1", 1.0, True, [1], None])
def test_unknown_versions_are_refused_with_both_numbers(path, value):
    sgtriton.save(two_blocks(), path)
    description, tensors = unpack(path)
    pack(path, {**description, "format": value}, tensors)
    refuse(net(), path, r"format .*, this version of sgtriton reads 1")


@pytest.mark.parametrize(
    "same_as",
    [{"3.bias": "x"}, {"3.bias": 5}, {"3.bias": ["0.bias"]}, {"3.bias": {}}, {"9.bias": "0.bias"},
     {"3.bias": None}, {"x": "y", "y": "0.bias"}],
)  # fmt: skip
def test_ties_to_what_is_not_there_are_refused(path, same_as):
    sgtriton.save(two_blocks(), path)
    description, tensors = unpack(path)
    if "9.bias" not in same_as:
        tensors.pop("3.bias")
    pack(path, {**description, "same_as": same_as}, tensors)
    refuse(net(), path, "damaged|lacks|no .*'9.bias'")


@pytest.mark.parametrize("checksum", [0, "0", None, [], {}, 1e30, True])
def test_wrong_checksums_are_refused_with_the_arrays_name(path, checksum):
    sgtriton.save(two_blocks(), path)
    description, tensors = unpack(path)
    description["checksums"]["3.bias"] = checksum
    pack_text(path, json.dumps(description), tensors)
    refuse(net(), path, r"3\.bias has another checksum")


@pytest.mark.parametrize("depth", [100, 400, 900, 990, 2_000, 200_000])
@pytest.mark.parametrize("where", ["text", "field", "layer", "header"])
def test_deep_nesting_is_refused(path, depth, where):
    bomb = "[" * depth + "]" * depth
    if where == "header":
        header = f'{{"__metadata__": {bomb}}}'.encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header)
    else:
        sgtriton.save(two_blocks(), path)
        description, tensors = unpack(path)
        text = bomb
        if where != "text":
            entry = description["layers"]["3"]
            entry["shape" if where == "field" else "code"] = "BOMB"
            text = json.dumps(description).replace('"BOMB"', bomb)
        pack_text(path, text, tensors)
    refuse(net(), path, "not a file written by|damaged")


def foreign_files(path):
    """Writers of files that are not ours, or hardly."""
    state = net().state_dict()
    save = safetensors.torch.save_file
    return {
        "empty": lambda: path.write_bytes(b""),
        "seven bytes": lambda: path.write_bytes(b"\0" * 7),
        "zeros": lambda: path.write_bytes(b"\0" * 4096),
        "text": lambda: path.write_text("weights\n" * 100),
        "random": lambda: path.write_bytes(random.Random(0).randbytes(4096)),
        "huge header": lambda: path.write_bytes((2**63).to_bytes(8, "little") + b"{}"),
        "header of a gigabyte": lambda: path.write_bytes((2**30).to_bytes(8, "little") + b"{}"),
        "no object": lambda: path.write_bytes((2).to_bytes(8, "little") + b"[]"),
        "torch.save": lambda: torch.save(state, path),
        "pickle": lambda: path.write_bytes(pickle.dumps({"weight": [1, 2]})),
        "safetensors": lambda: save(state, path),
        "safetensors of others": lambda: save(state, path, {"format": "pt"}),
        "no checksum": lambda: save(state, path, {"sgtriton": "{}"}),
        "wrong checksum": lambda: save(state, path, {"sgtriton": "{}", "sgtriton_crc32": "0"}),
        "no JSON": lambda: pack_text(path, "{,}", state),
        "no description": lambda: pack_text(path, "[]", state),
        "empty description": lambda: pack_text(path, "{}", state),
        "version alone": lambda: pack_text(path, '{"format": 1}', state),
    }


@pytest.mark.parametrize("kind", foreign_files(Path()))
def test_files_that_are_not_ours_are_refused(path, kind):
    foreign_files(path)[kind]()
    for target in ("dense", "gated", "sparse"):
        refuse(TARGETS[target](), path, "not a file written by sgtriton.save|damaged")


def test_missing_files_and_folders_are_refused(tmp_path):
    model = net()
    for path in (
        tmp_path / "none.sgt",
        tmp_path,
        tmp_path / "no" / "x.sgt",
        tmp_path / ("x" * 300),
    ):
        refuse(model, path, "no such file|not a file|cannot be read")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(32, 8)), "0: the file holds a Conv2d, the model a Linear"),
        (lambda: nn.Sequential(*parts(), nn.Linear(4, 4)), r"lacks \['6.bias', '6.weight'\]"),
        (lambda: net()[:5], "5: the model has no such layer"),
        (lambda: nn.ModuleDict({"body": net()}), "0: the model has no such layer"),
        (lambda: nn.Sequential(*parts()[:3], nn.Linear(32, 9), nn.ReLU(), nn.Linear(9, 4)),
         r"3: the file's weight has shape \(8, 32\) in 1 groups, the model's \(9, 32\)"),
        (lambda: nn.Sequential(nn.Conv2d(2, 2, 3, groups=2), *parts()[1:]),
         "0: .* in 1 groups, the model's .* in 2$"),
        (lambda: nn.Sequential(nn.Conv1d(1, 2, 3), *parts()[1:]), "0: the file holds a Conv2d"),
        (lambda: nn.Sequential(*parts()[:5], nn.Linear(8, 4, bias=False)), r"no \['5.bias'\]"),
        (lambda: nn.Sequential(net()[0], nn.Identity(), *parts()[2:]), r"the model has no \['1\."),
        (lambda: nn.Sequential(net()[0], nn.BatchNorm2d(2, affine=False), *parts()[2:]),
         "the model has no .*'1.bias'"),
        (lambda: nn.ReLU(), "0: the model has no such layer"),
        (lambda: nn.Sequential(*parts()[:5], nn.Bilinear(8, 4, 4)), "5: the file holds a Linear"),
    ],
)  # fmt: skip
def test_files_of_another_model_are_refused(path, other, message):
    sgtriton.save(served(), path)
    refuse(other(), path, message)


def test_files_of_another_model_are_refused_by_gated_and_served_models(path):
    sgtriton.save(served(), path)
    wider = nn.Sequential(*parts()[:3], nn.Linear(32, 9), nn.ReLU(), nn.Linear(9, 4))
    for model in (patched(copy.deepcopy(wider)), sgtriton.sparsify(patched(wider), form="dense")):
        refuse(model, path, r"3: the file's weight has shape \(8, 32\)")


def test_gates_of_another_kind_are_refused(path):
    sgtriton.save(patched(gate="bernoulli"), path)
    refuse(patched(), path, "0: the file was written from gates of kind 'bernoulli', .*'threshold'")
    sgtriton.load(net(), path)  # a dense model has no kind yet
    sgtriton.save(served(), path)
    refuse(patched(gate="bernoulli"), path, "0: .*'threshold', the model's are 'bernoulli'")


def test_model_on_the_meta_device_is_refused(path):
    sgtriton.save(served(), path)
    for model in (net().to("meta"), patched().to("meta")):
        types = [type(m) for m in model]
        with pytest.raises(ValueError, match=r"0\.\w+: the model is on the meta device"):
            sgtriton.load(model, path)
        assert [type(m) for m in model] == types
    partly = net()
    partly[1].to("meta")
    with pytest.raises(ValueError, match=r"1\.weight: the model is on the meta device"):
        sgtriton.load(partly, path)


@torch.no_grad()
def test_model_loads_after_to_empty(path):
    model = served()
    sgtriton.save(model, path)
    again = sgtriton.load(net().to("meta").to_empty(device="cpu").eval(), path)
    assert_exact("out", again(X), model(X))


def test_state_that_is_no_tensor_is_refused(path):
    class Stateful(nn.Linear):
        def get_extra_state(self):
            return {"step": 3}

    model = nn.Sequential(*parts()[:5], Stateful(8, 4))
    with pytest.raises(ValueError, match=r"5\._extra_state: the state must consist of tensors"):
        sgtriton.save(patched(model), path)
    assert not path.exists()
    sgtriton.save(patched(net()[:5]), path)
    refuse(
        nn.Sequential(*parts()[:5], Stateful(8, 4)), path, "5._extra_state: the state must consist"
    )


@pytest.mark.parametrize("block", [(4, 4), (1, 1)])
def test_nan_gate_is_not_saved(path, block):
    model = patched(block=block)
    path.write_bytes(b"old")
    model[3].gate.data.view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match=r"^3: gates must be numbers, got NaN"):
        sgtriton.save(model, path)
    assert path.read_bytes() == b"old"


def test_nan_weights_are_the_users(path):
    model = patched(share=1)
    model[3].weight.data[0, 0] = float("nan")
    sgtriton.save(model, path)
    assert sgtriton.load(net(), path)[3].full_weight().isnan().sum() == 1


def test_dense_model_is_not_saved(path):
    with pytest.raises(ValueError, match="no gated or sparse layer"):
        sgtriton.save(net(), path)
    assert not path.exists()


def test_places_that_cannot_be_written_are_refused(tmp_path, monkeypatch):
    model = served()
    before = snapshot(model)
    (tmp_path / "file").write_text("")
    for path in (
        tmp_path / "no" / "model.sgt", tmp_path, tmp_path / "file" / "model.sgt",
        tmp_path / ("x" * 300), Path("/proc/model.sgt"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"in a folder that exists|cannot be written") as e:
            sgtriton.save(model, path)
        assert str(e.value).startswith(str(path))
    assert_unchanged(model, before)
    assert sorted(os.listdir(tmp_path)) == ["file"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failed_write_leaves_the_old_file_and_no_other(path, monkeypatch, step):
    """As on a full disk."""
    old = served()
    sgtriton.save(old, path)
    data = path.read_bytes()

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(container.os, step, fail)
    with pytest.raises(ValueError, match=r"model\.sgt: cannot be written: .*No space left"):
        sgtriton.save(served(), path)
    assert path.read_bytes() == data
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("name", ["model.sgt", "größe [1] *.sgt", ".hidden"])
def test_strays_of_dead_writers_and_old_ones_are_swept(tmp_path, name):
    """Those of writers that may be alive stay, and so do other files' strays."""
    path = tmp_path / name
    child = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
                           capture_output=True, text=True)  # fmt: skip
    machine = f"{zlib.crc32(platform.node().encode()):08x}"

    def stray(middle, age=0.0):
        file = tmp_path / f".{middle}.tmp"
        file.write_bytes(b"half")
        os.utime(file, (time.time() - age,) * 2)
        return file

    old = [
        stray(f"{name}.{machine}-{child.stdout.strip()}-0a0b"),
        stray(f"{name}.{machine}-{os.getpid()}-0c0d", age=3700),
        stray(f"{name}.ffffffff-1-0e0f", age=3700),
        stray(f"{name}.1-0e0f", age=3700),
    ]
    young = [
        stray(f"{name}.{machine}-{os.getpid()}-0a0c", age=3500),  # another thread's
        stray(f"{name}.ffffffff-{child.stdout.strip()}-0a0d"),  # another machine's
        stray(f"{name}.{machine}-x-0a0e"),
        stray(f"x{name}.{machine}-{child.stdout.strip()}-0a0f", age=3700),
    ]
    sgtriton.save(served(), path)
    assert [f.name for f in old if f.exists()] == []
    assert [f.name for f in young if not f.exists()] == []
    assert path.is_file()


def kill_saves(folder, kills):
    """Run in a child process: kill a saving process at random moments; prints what was left."""
    draw = random.Random(0)
    path = Path(folder) / "model.sgt"

    def fresh():
        return nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 64))

    model = sgtriton.sparsify(sgtriton.patch(fresh(), block=(16, 16)), form="dense")
    for layer in model:
        layer.values.fill_(-1)
    sgtriton.save(model, path)
    mixed_versions, strays, versions = 0, [], set()  # mixed: the two layers' differ
    for _ in range(kills):
        pid = os.fork()
        if pid == 0:
            try:
                for version in itertools.count(draw.randrange(1 << 20)):
                    for layer in model:
                        layer.values.fill_(version)
                    sgtriton.save(model, path)
            finally:
                os._exit(1)
        first, deadline = path.stat().st_ino, time.monotonic() + 20
        while path.stat().st_ino == first and time.monotonic() < deadline:
            time.sleep(0.001)  # until it has saved once
        time.sleep(draw.uniform(0, 0.02))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        again = sgtriton.load(fresh(), path)  # raises unless the file is whole
        held = {v for layer in again for v in layer.values.unique().tolist()}
        versions |= held
        mixed_versions += len(held) != 1
        strays.append(len(list(path.parent.iterdir())) - 1)
    sgtriton.save(model, path)
    after = len(list(path.parent.iterdir())) - 1
    result = {
        "mixed": mixed_versions, "strays": strays, "after": after, "versions": len(versions)
    }  # fmt: skip
    print(json.dumps({"kills": result}), flush=True)


def test_killed_saves_leave_a_whole_file_and_at_most_one_stray(child):
    printed, ended = child
    assert "kills" in printed, ended
    result = printed["kills"]
    assert result["mixed"] == 0
    assert max(result["strays"]) <= 1
    assert sum(result["strays"]) > 0  # some kill hit a write
    assert result["after"] == 0
    assert result["versions"] > 10  # the children did save


def test_two_models_saved_at_once_leave_one_of_them(path):
    """Each writer has a temporary file of its own."""
    from concurrent.futures import ThreadPoolExecutor

    models = [served() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            list(pool.map(lambda model: sgtriton.save(model, path), models))
    again = sgtriton.load(net(), path)
    assert any(torch.equal(again[3].values, m[3].values) for m in models)
    assert os.listdir(path.parent) == [path.name]


def test_paths_may_be_text_relative_and_have_any_letters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = served()
    for name in ("model", "größe 1.sgt", "a.b.c", "./x.sgt"):
        sgtriton.save(model, name)
        sgtriton.load(net(), name)
    assert len(os.listdir(tmp_path)) == 4


OPTIONAL = {
    "serve_block": [[4], [4, 6], [0, 4], [True, 4], "44", [2, 2]],
    "expected": [[], "fast", {"1": 0}, {"1": -1.0}, {"1": True}, {"1": "2"}, {"7": 2.0},
                 {"1": float("inf")}, {"1": float("nan")}, {"1": 10**400}],
    "measured": [{"1": None}, {">4096": [1.0]}],
}  # fmt: skip


def merged():
    """A served model whose layer "3" (8x32, 4x4 gates) has a merged form and speed-ups."""
    model = sgtriton.sparsify(patched(), form="merged", serve_block=(8, 16))
    assert model[3].form == "merged"
    forms = dict.fromkeys(BUCKETS, "merged")
    model[3].set_forms(forms, "a test", True, dict.fromkeys(BUCKETS, 2.0), {"1": 1.5, ">4096": 3})
    return model


@pytest.mark.parametrize("target", TARGETS)
@torch.no_grad()
def test_forms_blocks_and_speedups_are_recorded(path, target):
    model = merged()
    sgtriton.save(model, path)
    again = sgtriton.load(TARGETS[target](), path)
    for i in (0, 3, 5):
        for name in ("forms", "reason", "serve_block", "expected", "measured"):
            assert getattr(again[i], name) == getattr(model[i], name)
    assert list(again[3].forms) == list(BUCKETS)
    assert_exact("out", again(X), model(X))
    assert str(sgtriton.summary(again)) == str(sgtriton.summary(model))


@pytest.mark.parametrize("reason", ["\x1b[2J\x1b]0;title\x07", "two\nlines", "x" * 501])
def test_file_says_nothing_that_a_terminal_would_obey(path, reason):
    """A reason is printed by ``summary``: escape codes in it came through."""
    sgtriton.save(two_blocks(), path)
    description, tensors = unpack(path)
    description["layers"]["3"]["reason"] = reason
    pack(path, description, tensors)
    refuse(net(), path, "3: damaged: reason")


def test_reason_that_a_file_would_refuse_is_saved_without_what_it_refuses(path):
    model = two_blocks()
    model[3].set_forms(dict.fromkeys(BUCKETS, "dense"), "\x1b" + "y" * 600, True)
    sgtriton.save(model, path)
    assert sgtriton.load(net(), path)[3].reason == "y" * 500


def test_layer_without_a_merged_form_has_none_after_a_load(path):
    """Its 4x4 blocks were asked to be served as they are; the load gave it blocks of 16x16."""
    model = sgtriton.sparsify(patched(), form="sparse", serve_block=(4, 4))
    assert model[3].serve_block is None
    sgtriton.save(model, path)
    assert sgtriton.load(net(), path)[3].serve_block is None


@torch.no_grad()
def test_files_of_before_there_were_merged_forms_load(path):
    """A description as the first writers of this format made it, by hand."""
    weight, bias = torch.arange(1.0, 33).view(4, 8), torch.ones(4)
    entry = {
        "type": "Linear", "shape": [4, 8], "groups": 1, "gate_block": [2, 4],
        "gate_kind": "threshold", "forms": {**dict.fromkeys(BUCKETS, "sparse"), "1": "dense"},
        "reason": "sparse against dense: 0.5x at M=1", "dense_copy": True, "device": "cpu",
    }  # fmt: skip
    tensors = {
        "0.values": torch.stack([weight[:2, 4:], weight[2:, :4]]), "0.crow": ints(0, 1, 2),
        "0.col": ints(1, 0), "0.bias": bias,
    }  # fmt: skip
    description = {"format": 1, "layers": {"0": entry}, "same_as": {}, "checksums": {}}
    pack(path, description, tensors)
    model = sgtriton.load(nn.Sequential(nn.Linear(8, 4)), path)
    weight[:2, :4] = weight[2:, 4:] = 0
    assert_exact("weight", model[0].full_weight(), weight)
    assert model[0].forms == entry["forms"]
    assert model[0].reason == entry["reason"]
    assert model[0].serve_block is None
    assert model[0].expected == model[0].measured == {}
    sgtriton.save(model, path)  # and what says nothing new is written as it was
    assert unpack(path)[0]["layers"] == {"0": entry}


@pytest.mark.parametrize("field", OPTIONAL)
def test_optional_fields_of_a_wrong_type_or_value_are_refused(path, field):
    sgtriton.save(merged(), path)
    description, tensors = unpack(path)
    for value in (None, True, 0, 1.5, "x", [[]], *OPTIONAL[field]):
        changed = copy.deepcopy(description)
        changed["layers"]["3"][field] = value
        pack(path, changed, tensors)
        refuse(net(), path, "3: ")


def test_form_without_its_served_block_is_refused(path):
    sgtriton.save(merged(), path)
    description, tensors = unpack(path)
    del description["layers"]["3"]["serve_block"]
    pack(path, description, tensors)
    refuse(net(), path, r"3: the layer has the forms .*, the file says 'merged'")


def test_form_without_its_served_block_is_refused_where_one_would_be_taken_unasked(path):
    model = nn.Sequential(nn.Linear(64, 64))
    sgtriton.patch(model, block=(4, 4))
    sgtriton.save(sgtriton.sparsify(model.eval(), form="merged"), path)
    description, tensors = unpack(path)
    assert description["layers"]["0"].pop("serve_block") == [16, 16]
    pack(path, description, tensors)
    refuse(nn.Sequential(nn.Linear(64, 64)), path, "0: the layer has the forms .*, the file says")


def test_gate_kind_of_no_gates_is_for_models_without(path):
    sgtriton.save(served(), path)
    description, tensors = unpack(path)
    for entry in description["layers"].values():
        entry["gate_kind"] = "none"
    pack(path, description, tensors)
    refuse(mixed(), path, "0: the file's layer was pruned without gates, the model's is gated")
    assert sgtriton.load(net(), path)[3].gate_kind == "none"
    assert sgtriton.load(served(), path)[3].gate_kind == "none"


@torch.no_grad()
def test_served_block_is_kept_where_forms_are_chosen_anew(path, monkeypatch):

    monkeypatch.setattr(
        planning, "undisturbed_ms", lambda calls, *a, **k: [9.0, 9.0, 9.0, 1.0, 9.0][: len(calls)]
    )
    sgtriton.save(merged(), path)
    description, tensors = unpack(path)
    for entry in description["layers"].values():
        entry["device"] = "cuda"
    pack(path, description, tensors)
    again = sgtriton.load(net(), path)
    assert again[3].serve_block == (8, 16)
    assert again[3].form == "merged"
    assert again[3].measured["1"] == 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forms_are_chosen_anew_in_another_dtype(path, dtype, monkeypatch):
    """Those of an fp32 file were kept in a bf16 model, where dense takes ten times as long."""
    sgtriton.save(sgtriton.sparsify(net_of_linear(), form="dense"), path)
    monkeypatch.setattr(
        planning, "undisturbed_ms", lambda calls, *a: [9.0, *[1.0] * (len(calls) - 1)]
    )
    model = sgtriton.load(nn.Sequential(nn.Linear(32, 32)).to(dtype), path)
    assert (model[0].form == "dense") == (dtype == torch.float32)


def net_of_linear():
    return sgtriton.patch(nn.Sequential(nn.Linear(32, 32)), block=(8, 8))


def test_model_loaded_under_inference_mode_gives_gradients_later(path):
    sgtriton.save(two_blocks(), path)
    model = net()
    with torch.inference_mode():
        sgtriton.load(model, path)
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None
