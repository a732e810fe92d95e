"""The layers that a file stores, read without a model; the file may come from anywhere."""

import json

import pytest
import torch
from helpers import assert_exact
from test_checkpoint import mixed, pack, pack_text, served, unpack

import sgtriton
from sgtriton.file_layers import stored_layers
from sgtriton.stored import served_block


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.sgt"


@pytest.mark.parametrize("make", [served, mixed], ids=["sparse", "gated"])
@torch.no_grad()
def test_layers_are_those_of_the_model(path, make):
    model = make()
    sgtriton.save(model, path)
    loaded = sgtriton.load(make(), path)
    found = stored_layers(path)
    assert list(found) == ["0", "3", "5"]
    for name, (part, serve) in found.items():
        layer = loaded[int(name)]
        assert serve == (layer.serve_block if make == served else served_block(part.layout))
        assert part.layout == layer.layout
        assert_exact(name, part.to_dense(), layer.full_weight())
        assert_exact(f"{name}: gates", part.open_gates, layer.stored.open_gates)


def test_a_model_that_is_one_layer_has_no_name(path):
    model = sgtriton.patch(torch.nn.Linear(12, 8), block=(4, 4))
    sgtriton.save(model, path)
    assert list(stored_layers(path)) == [""]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "Bilinear"}, "3: damaged: type cannot be 'Bilinear'"),
        ({"type": "Conv2d"}, "3: damaged: a Conv2d has no weight of shape"),
        ({"shape": [8, 32, 1]}, "3: damaged: a Linear has no weight of shape"),
        ({"groups": 2}, "3: damaged: a Linear has no weight of shape .* in 2 groups"),
        ({"gate_block": [4, 2]}, r"3: values must hold blocks \(4, 2\)"),
        ({"shape": [8, 16]}, "3: "),
        ({"shape": [8, 1 << 40]}, r"3: damaged: shape .* is too large"),
        ({"shape": [8, 1 << 46]}, r"3: damaged: shape .* is too large"),
        ({"extra": 1}, "3: damaged: its description must have fields"),
    ],
)
def test_an_entry_that_no_layer_has_is_refused(path, change, message):
    sgtriton.save(served(), path)
    description, tensors = unpack(path)
    description["layers"]["3"] |= change
    pack(path, description, tensors)
    with pytest.raises(ValueError, match=message) as caught:
        stored_layers(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("key", ["crow", "col"])
def test_an_index_that_points_elsewhere_is_refused(path, key):
    sgtriton.save(served(), path)
    description, tensors = unpack(path)
    tensors[f"3.{key}"] += 100
    pack(path, description, tensors)
    with pytest.raises(ValueError, match=f"3: {key}"):
        stored_layers(path)


def test_a_file_of_something_else_is_refused(path):
    with pytest.raises(ValueError, match="no such file"):
        stored_layers(path)
    path.write_bytes(b"PK\x03\x04 a pickle")
    with pytest.raises(ValueError, match=r"sgtriton\.save"):
        stored_layers(path)


NAME = "\x1b]0;title\x07\x1b[2J\nlayer\u202e"


def renamed(path, change):
    """A file whose layer has a hostile name, and an entry that is changed."""
    sgtriton.save(served(), path)
    description, tensors = unpack(path)
    entry = description["layers"].pop("3")
    description["layers"][NAME] = entry | change
    for key in ("values", "crow", "col", "bits"):
        for held in (tensors, description["checksums"]):
            if f"3.{key}" in held:
                held[f"{NAME}.{key}"] = held.pop(f"3.{key}")
    return description, tensors


def refused(read, path):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        read(path)
    text = str(caught.value)
    assert text.isprintable(), text
    return text


@pytest.mark.parametrize(
    "change",
    [
        {}, {"type": "Bilinear\x1b[2J"}, {"shape": [8, 16]}, {"gate_block": [4, 2]},
        {"forms": {}}, {"extra\x1b": 1}, {"shape": [8, 1 << 40]},
    ],
    ids=str,
)  # fmt: skip
def test_names_in_a_file_reach_no_terminal_through_errors(path, change):
    """A layer was named as the file names it, escape codes and all."""
    pack(path, *renamed(path, change))
    refused(lambda p: sgtriton.load(served(), p), path)
    if change:
        assert r"\x1b]0;title\x07\x1b[2J\nlayer\u202e" in refused(stored_layers, path)
    else:
        assert NAME in stored_layers(path)


def test_a_type_in_a_file_reaches_no_terminal_through_errors(path):
    sgtriton.save(served(), path)
    description, tensors = unpack(path)
    description["layers"]["3"]["type"] = "Linear\x1b[2J" + "x" * 9999
    pack(path, description, tensors)
    text = refused(lambda p: sgtriton.load(served(), p), path)
    assert r"Linear\x1b[2Jxxx" in text
    assert len(text) < 1000 + len(str(path))


@pytest.mark.parametrize("field", ["checksums", "same_as"])
def test_names_of_arrays_in_a_file_reach_no_terminal_through_errors(path, field):
    sgtriton.save(served(), path)
    description, tensors = unpack(path)
    if field == "same_as":
        description[field][NAME] = "nothing"
    else:
        tensors[NAME] = torch.zeros(2)
        description[field][NAME] = 1
    pack_text(path, json.dumps(description), tensors)
    assert r"\x1b]0;title" in refused(stored_layers, path)
