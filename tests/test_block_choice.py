"""Which block of gates a device asks for, and that ``patch`` gives each layer its own."""

import math
import statistics
import warnings

import pytest
import torch
from helpers import assert_exact
from sgtriton_kernels.cards import CARD_NAMES, card
from sgtriton_kernels.cell import Cell
from torch import nn

import sgtriton
from sgtriton import block_choice
from sgtriton.block_choice import BLOCKS, ROWS, blocks_of_layers, choose_block, where_of
from sgtriton.cost_model import expected_speedup
from sgtriton.layers import GatedModule
from sgtriton.roofline import at_sparsity, predicted_speedup

BIG = (1024, 2048)


@pytest.fixture
def told(monkeypatch):
    """Has every device be as fast as a function says; collects what was asked of which."""

    def tell(speedup):
        asked = []

        def on(where, weight_shape, dtype):
            asked.append((where, tuple(weight_shape), dtype))
            return lambda block, sparsity, rows: speedup(tuple(weight_shape), block, sparsity, rows)

        monkeypatch.setattr(block_choice, "_on_card", on)
        monkeypatch.setattr(block_choice, "_on_cpu", lambda *a: on("cpu", *a))
        return asked

    return tell


def by_block(speedups):
    return lambda shape, block, sparsity, rows: speedups.get(block, 1.0)


@pytest.mark.parametrize(
    ("speedups", "block"),
    [
        ({}, (16, 16)),
        ({(128, 128): 1.2}, (128, 128)),
        ({(128, 64): 1.2}, (128, 64)),
        ({(64, 64): 1.2}, (64, 64)),
        ({(128, 64): 1.2, (128, 128): 1.2}, (128, 64)),
        ({(128, 64): 1.2, (128, 128): 1.3}, (128, 64)),
        ({(128, 64): 1.2, (128, 128): 1.4}, (128, 128)),
        ({(32, 32): 1.1}, (16, 16)),
        ({(32, 32): 1.12}, (32, 32)),
        ({(32, 32): 1.3, (64, 64): 1.4, (128, 128): 1.5}, (64, 64)),
        ({(16, 16): 1.5}, (16, 16)),
        # the best one counts where all are slower than dense, too
        (dict.fromkeys(BLOCKS, 0.1) | {(64, 64): 0.2}, (64, 64)),
    ],
)
@pytest.mark.parametrize("where", ["cpu", "H200"])
def test_the_smallest_block_within_a_tenth_of_the_best_is_taken(speedups, block, where, told):
    told(by_block(speedups))
    found = choose_block(BIG, 0.5, where)
    assert (found.block, found.where) == (block, where)
    assert found.speedups == pytest.approx({b: speedups.get(b, 1.0) for b in BLOCKS})


def test_speedups_are_geometric_means_over_the_rows_at_the_target(told):
    told(lambda shape, block, sparsity, rows: rows * sparsity)
    found = choose_block(BIG, 0.5, rows=(2, 4, 16))
    assert found.speedups == pytest.approx(dict.fromkeys(BLOCKS, 0.5 * 128 ** (1 / 3)))
    found = choose_block(BIG, 0.25)
    assert found.speedups == pytest.approx(dict.fromkeys(BLOCKS, 0.25 * math.prod(ROWS) ** 0.25))


@pytest.mark.parametrize(
    ("shape", "target", "fitting"),
    [
        ((128, 128), 0.0, BLOCKS),
        ((128, 127), 0.0, BLOCKS[:4]),
        ((127, 128), 0.0, BLOCKS[:3]),
        ((64, 1024), 0.0, BLOCKS[:3]),
        ((20, 1024), 0.0, BLOCKS[:1]),
        # of 128x128 weights as many blocks as 64, 16, 4, 2 and 1
        ((128, 128), 0.5, BLOCKS[:4]),
        ((128, 128), 0.51, BLOCKS[:3]),
        ((128, 128), 0.75, BLOCKS[:3]),
        ((128, 128), 0.76, BLOCKS[:2]),
        ((128, 128), 0.95, BLOCKS[:1]),
        # ragged edges have blocks too
        ((129, 128), 0.5, BLOCKS),
        # one of ten blocks stays: (1 - 0.9) * 10 is below 1 in floating point
        ((640, 64), 0.9, BLOCKS[:3]),
        # each position of a convolution has blocks of its own
        ((128, 128, 3, 3), 0.8, BLOCKS),
        ((128, 128, 3), 0.8, BLOCKS[:4]),
        # too small for any
        ((64, 3, 7, 7), 0.5, ()),
        ((8, 6), 0.0, ()),
        ((16, 16), 0.9, ()),
        ((1, 1), 0.99, ()),
    ],
)
def test_blocks_that_a_weight_is_too_small_for_are_left_out(shape, target, fitting, told):
    told(lambda shape, block, sparsity, rows: float(block[0] * block[1]))  # larger is better
    found = choose_block(shape, target)
    assert [*found.speedups] == [*found.break_even] == [*fitting]
    assert found.block == (fitting[-1] if fitting else BLOCKS[0])


def from_on(sparsity):
    return lambda s: 1.0 if s >= sparsity else 0.99


@pytest.mark.parametrize(
    ("by_rows", "even"),
    [
        ({1: from_on(0.3), 16: from_on(0.72)}, 0.72),
        ({1: from_on(0.72), 16: from_on(0.3)}, 0.72),
        ({1: from_on(0.99), 16: from_on(0)}, 0.99),
        # faster for a while, then slower again
        ({1: lambda s: 0.9 if 0.4 < s < 0.605 else 1.1, 16: from_on(0)}, 0.61),
        ({1: from_on(0), 16: from_on(0)}, 0.01),
        ({1: from_on(1), 16: from_on(0)}, 1),
        ({1: lambda s: 1.5 if s < 0.985 else 0.5, 16: from_on(0)}, 1),
    ],
)
def test_break_even_is_the_least_hundredth_from_which_no_rows_are_slower(by_rows, even, told):
    told(lambda shape, block, sparsity, rows: by_rows[rows](sparsity))
    found = choose_block(BIG, 0.5, rows=(1, 16))
    assert found.break_even == dict.fromkeys(BLOCKS, even)


def test_each_block_has_a_break_even_of_its_own(told):
    told(lambda shape, block, sparsity, rows: from_on(1 - block[0] / 200)(sparsity))
    assert choose_block(BIG, 0.5).break_even == {
        (16, 16): 0.92, (32, 32): 0.84, (64, 64): 0.68, (128, 64): 0.36, (128, 128): 0.36,
    }  # fmt: skip


@pytest.mark.parametrize("shape", [(256, 320), (1024, 4096), (192, 64, 3, 3)])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("H100 SXM", torch.bfloat16), ("RTX 4090", torch.float32), ("MI300X", torch.float16)],
    ids=str,
)
def test_a_card_is_asked_by_the_roofline_model(name, dtype, shape):
    found = choose_block(shape, 0.8, name, dtype=dtype)
    n, k = shape[0], math.prod(shape[1:])

    def speedups(block, sparsity):
        cells = [
            at_sparsity(Cell("bsr_linear fwd", "triton", m, n, k, block, 0, dtype), sparsity)
            for m in (1, 16, 128, 2048)
        ]
        return [predicted_speedup(card(name), cell) for cell in cells]

    assert found.where == name
    for block, speedup in found.speedups.items():
        assert speedup == pytest.approx(statistics.geometric_mean(speedups(block, 0.8)))
        even = found.break_even[block]
        assert even == 1 or min(speedups(block, even)) >= 1
        # up to where a single block is left
        blocks = -(-n // block[0]) * -(-shape[1] // block[1]) * math.prod(shape[2:])
        most = min(0.99, math.floor(100 * (blocks - 1) / blocks) / 100)
        assert min(speedups(block, round(even - 0.01, 2) if even < 1 else most)) < 1
    enough = [b for b in BLOCKS if found.speedups.get(b, 0) >= 0.9 * max(found.speedups.values())]
    assert found.block == enough[0]


def test_a_cpu_is_asked_by_the_cost_model():
    found = choose_block((512, 96, 3, 3), 0.75, "cpu", (8,), torch.float32)
    assert found.where == "cpu"
    assert [*found.speedups] == [*BLOCKS[:4]]
    for block, speedup in found.speedups.items():
        shape, cpu = (512, 96 * 9), torch.device("cpu")
        expected = expected_speedup("sparse", block, 0.25, shape, 8, torch.float32, cpu)
        assert speedup == pytest.approx(expected)


@pytest.mark.parametrize("where", [*CARD_NAMES, "cpu"])
@pytest.mark.parametrize("shape", [(1, 1), (8, 6), (4, 1, 3, 3), (15, 4096)])
def test_weights_too_small_for_a_choice_get_the_smallest_block(where, shape):
    """Rounded to no block at all they were shown as 1.00x, break-even at 50 %."""
    for target in (0, 0.4, 0.99):
        found = choose_block(shape, target, where)
        assert (found.block, found.speedups, found.break_even) == ((16, 16), {}, {})


BAD_TARGETS = [1, False, 1.0, -0.1, float("nan"), float("inf"), True, "0.5"]


def test_what_cannot_be_chosen_for_is_refused():
    for target in [*BAD_TARGETS, None]:
        with pytest.raises(ValueError, match=r"target must be a share in \[0, 1\), got "):
            choose_block(BIG, target)
    with pytest.raises(ValueError, match="no card is named 'H300'"):
        choose_block(BIG, 0.5, "H300")


def test_where_a_model_is_served_is_known_from_its_device(monkeypatch):
    cpu, cuda, meta = map(torch.device, ("cpu", "cuda", "meta"))
    assert (where_of(None, cpu), where_of("H200", cpu), where_of("cpu", cuda)) == (
        "cpu", "H200", "cpu",
    )  # fmt: skip
    monkeypatch.setattr(block_choice, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(block_choice, "architecture", lambda device: "sm_90")
    assert where_of(None, cuda) == "H100 SXM"
    assert (where_of("A10", cuda), where_of("h100", cuda)) == ("A10", "H100 SXM")
    monkeypatch.setattr(block_choice, "architecture", lambda device: "sm_80")
    with pytest.raises(ValueError, match="card must be given for NVIDIA H100 80GB HBM3"):
        where_of(None, cuda)
    with pytest.raises(ValueError, match="card must be given for a model on meta"):
        where_of(None, meta)


class Mixed(nn.Module):
    """Two linear layers of one shape, a narrow one, and convolutions."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv1d(4, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.first = nn.Linear(256, 128)
        self.second = nn.Linear(128, 256)
        self.third = nn.Linear(256, 128)
        self.head = nn.Linear(128, 10)

    def forward(self, x):  # [B, 4, 64]
        x = self.conv1(x).relu().unflatten(2, (8, 8))
        x = self.conv2(x).relu().flatten(2).mean(1).repeat(1, 4)
        return self.head(self.third(self.second(self.first(x).relu())))


def blocks(model):
    return {layer.name: layer.block for layer in sgtriton.summary(model).layers}


# the shapes of Mixed's layers -> the block that is far better there
BEST = {
    (32, 4, 3): (16, 16),
    (64, 32, 3, 3): (32, 32),
    (128, 256): (128, 64),
    (256, 128): (64, 64),
}
EXPECTED = {
    "conv1": (16, 16), "conv2": (32, 32), "first": (128, 64), "second": (64, 64),
    "third": (128, 64), "head": (16, 16),
}  # fmt: skip


def mixed(shape, block, sparsity, rows):
    return 2.0 if block == BEST.get(shape) else 1.0


def test_layers_get_blocks_of_their_own(told):
    asked = told(mixed)
    model, x = Mixed().eval(), torch.randn(3, 4, 64)
    before, training = model(x), model.train()(x)
    assert sgtriton.patch(model, block="auto", target=0.5) is model
    assert blocks(model) == EXPECTED
    assert {name: tuple(getattr(model, name).gate.shape) for name in EXPECTED} == {
        "conv1": (2, 1, 3), "conv2": (2, 1, 3, 3), "first": (1, 4), "second": (4, 2),
        "third": (1, 4), "head": (1, 8),
    }  # fmt: skip
    # layers of one shape are asked for once
    cases = [*BEST, (10, 128)]
    assert sorted(asked, key=str) == sorted((("cpu", s, torch.float32) for s in cases), key=str)
    assert_exact("in training", model(x), training)
    assert_exact("in eval", model.eval()(x), before)


def test_only_layers_that_are_wanted_are_gated(told):
    asked = told(mixed)
    model = Mixed()
    sgtriton.patch(model, block="auto", target=0.5, include=["*ir*", "conv?"], exclude="conv1")
    expected = {name: EXPECTED[name] for name in ("conv2", "first", "third")}
    gated = {name for name, m in model.named_modules() if isinstance(m, GatedModule)}
    assert gated == {*expected}
    assert {name: blocks(model)[name] for name in gated} == expected
    assert {shape for _, shape, _ in asked} == {(64, 32, 3, 3), (128, 256)}
    # the others can follow, and what is gated stays
    sgtriton.patch(model, block="auto", target=0.9, card="A10")
    assert {name: blocks(model)[name] for name in gated} == expected
    assert len(blocks(model)) == 6


@pytest.mark.parametrize(
    ("name", "dtype", "where", "served"),
    [
        (None, torch.float32, "cpu", torch.float32),
        (None, torch.bfloat16, "cpu", torch.bfloat16),
        ("cpu", torch.float32, "cpu", torch.float32),
        ("L40S", torch.float32, "L40S", torch.bfloat16),
        ("L40S", torch.float64, "L40S", torch.bfloat16),
        ("MI300X", torch.float16, "MI300X", torch.float16),
    ],
)
def test_the_card_that_is_named_is_asked_in_the_dtype_it_serves(name, dtype, where, served, told):
    asked = told(by_block({}))
    model = nn.Sequential(nn.Linear(32, 48, dtype=dtype))
    sgtriton.patch(model, block="auto", card=name, target=0.5)
    assert asked == [(where, (48, 32), served)]


def test_what_is_chosen_for_each_layer_is_said_with_the_others():
    layers = dict(nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 64)).named_children())
    found = blocks_of_layers(layers, 0.8, "H200")
    assert found["0"] == choose_block((512, 256), 0.8, "H200")
    assert found["1"] == choose_block((64, 512), 0.8, "H200")
    model = nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 64))
    sgtriton.patch(model, block="auto", card="H200", target=0.8)
    assert blocks(model) == {name: choice.block for name, choice in found.items()}


def test_a_model_without_layers_has_nothing_to_choose():
    with pytest.warns(UserWarning, match="patch gated 0 of 0 layers"):
        sgtriton.patch(nn.Sequential(nn.ReLU()), block="auto", target=0.5)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        *(({"block": "auto", "target": t}, "target must be a share in") for t in BAD_TARGETS),
        ({"block": "auto"}, "block 'auto' needs target"),
        ({"block": "auto", "card": "H200"}, "block 'auto' needs target"),
        ({"block": "auto", "card": "RTX", "target": 0.5}, "card must be one of RTX 4090, RTX 5090"),
        ({"block": "auto", "card": "H300", "target": 0.5}, "card must be one of cpu, A100.*'H300'"),
        ({"block": "auto", "card": "", "target": 0.5}, "card must be one of cpu"),
        ({"block": "auto", "card": ["H200"], "target": 0.5}, "card must be one of cpu"),
        ({"block": "Auto", "target": 0.5}, "block must be two sides or 'auto', got 'Auto'"),
        ({"block": "", "target": 0.5}, "block must be two sides or 'auto', got ''"),
        ({"block": (32, 32), "target": 0.5}, "card and target go with block='auto'"),
        ({"block": None, "card": "H200"}, "card and target go with block='auto'"),
        ({"card": "H200"}, "card and target go with block='auto'"),
        ({"block": "auto", "target": 0.5, "init": 0.2}, "init"),
        ({"block": "auto", "target": 0.5, "gate": "soft"}, "gate"),
        ({"block": "auto", "target": 0.5, "include": "x*"}, "include='x.*matches no layer"),
    ],
    ids=str,
)
def test_a_refused_choice_leaves_the_model_as_it_was(arguments, text):
    model = Mixed()
    types, keys = [type(m) for m in model.modules()], [*model.state_dict()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=text):
            sgtriton.patch(model, **arguments)
    assert [type(m) for m in model.modules()] == types
    assert [*model.state_dict()] == keys


def test_a_device_that_is_not_known_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64, device="meta"))
    with pytest.raises(ValueError, match="card must be given for a model on meta"):
        sgtriton.patch(model, block="auto", target=0.5)
    assert [type(m) for m in model] == [nn.Linear, nn.Linear]
    sgtriton.patch(model, block="auto", target=0.5, card="H200")
    assert all(isinstance(m, GatedModule) for m in model)
