"""What a summary says of a model, against figures worked out by hand."""

import copy
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_exact
from torch import nn

import sgtriton
from sgtriton.report import LayerSummary, Summary
from sgtriton.sparse_layers import BUCKETS

ROOT = Path(__file__).parents[1]
DENSE = dict.fromkeys(BUCKETS, "dense")


@torch.no_grad()
def two_layers():
    """6x10 in ragged 4x4 blocks, 3 of 6 open (16 + 8 + 4 weights); 2x6 per weight, 3 of 12 open."""
    model = nn.Sequential(nn.Linear(10, 6), nn.LayerNorm(6), nn.Linear(6, 2, bias=False))
    sgtriton.patch(model, block=(4, 4), include="0")
    sgtriton.patch(model, block=(1, 1))
    model[0].gate.copy_(torch.tensor([[0.9, 0.5, 0.1], [0.0, 0.7, 1.0]]))
    model[2].gate.zero_().view(-1)[:3] = 1
    return model


def test_figures_of_a_gated_model():
    summary = sgtriton.summary(two_layers())
    first, second = summary.layers
    assert first == LayerSummary(
        name="0",
        kind="GatedLinear",
        shape=(6, 10),
        block=(4, 4),
        gate_kind="threshold",
        sparsity=pytest.approx(1 - (16 + 8 + 4) / 60, abs=1e-6),
        open_blocks=3,
        blocks=6,
        form="gated",
        reason="gates alone save neither time nor memory; sparsify() does",
        bytes=3 * 16 * 4 + 3 * 4 + 3 * 4,  # values, crow, col
        bytes_dense=60 * 4,
        bytes_copy=0,
    )
    assert (second.name, second.block, second.open_blocks, second.blocks) == ("2", (1, 1), 3, 12)
    assert second.sparsity == pytest.approx(9 / 12, abs=1e-6)
    assert second.bytes == 3 * 4 + 2  # values, bits
    assert summary.sparsity == pytest.approx((32 + 9) / 72, abs=1e-6)
    assert summary.parameters == 60 + 6 + 12 + 12  # weights, bias, layer norm; no gates
    assert summary.sparsity_of_all == pytest.approx((32 + 9) / 90, abs=1e-6)
    assert summary.skipped == ()


@pytest.mark.parametrize("form", ["sparse", "dense"])
def test_figures_survive_sparsify(form):
    model = two_layers()
    gated = sgtriton.summary(model)
    summary = sgtriton.summary(sgtriton.sparsify(model, form=form))
    for before, after in zip(gated.layers, summary.layers, strict=True):
        same = ("name", "shape", "block", "gate_kind", "sparsity", "open_blocks", "blocks", "bytes",
                "bytes_dense")  # fmt: skip
        assert [getattr(before, f) for f in same] == [getattr(after, f) for f in same]
    assert summary.sparsity == gated.sparsity
    assert summary.parameters == gated.parameters
    assert summary.sparsity_of_all == gated.sparsity_of_all
    assert [layer.kind for layer in summary.layers] == ["BlockSparseLinear"] * 2
    assert [layer.form for layer in summary.layers] == [form, "dense"]
    assert [layer.bytes_copy for layer in summary.layers] == [240 if form == "dense" else 0, 48]


def test_groups_and_shared_taps_are_counted():
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
    sgtriton.patch(
        model, block=(None, 1)
    )  # one gate per input channel and group: 2x2 of 27 weights
    model[0].gate.data.view(-1)[:3] = 0
    (layer,) = sgtriton.summary(model).layers
    assert (layer.open_blocks, layer.blocks) == (1, 4)
    assert layer.sparsity == pytest.approx(0.75, abs=1e-6)
    assert "fullx1" in str(sgtriton.summary(model))


def test_half_precision_counts_half_the_bytes():
    (layer,) = sgtriton.summary(sgtriton.patch(nn.Linear(8, 4).half(), block=(4, 4))).layers
    assert layer.bytes_dense == 4 * 8 * 2
    assert layer.bytes == 4 * 8 * 2 + 2 * 4 + 2 * 4
    assert layer.name == "(model)"


def test_shared_layer_is_counted_once():
    shared = nn.Linear(8, 8)
    summary = sgtriton.summary(sgtriton.patch(nn.Sequential(shared, shared), block=(4, 4)))
    assert len(summary.layers) == 1
    assert summary.parameters == 72


def test_skipped_layers_are_listed_with_a_reason():
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(10, 8),
            "attention": nn.MultiheadAttention(8, 2),
            "left": nn.Linear(8, 8),
            "lazy": nn.LazyLinear(4),
            "gated": nn.Linear(8, 8),
        }
    )
    sgtriton.patch(model, include="gated")
    summary = sgtriton.summary(model)
    reasons = {skip.name: skip.reason for skip in summary.skipped}
    assert "unsupported type Embedding" in reasons["embedding"]
    assert "reads its weight" in reasons["attention.out_proj"]
    assert "not initialised yet" in reasons["lazy"]
    assert reasons["left"] == "patch() was not asked to"
    assert "gated" not in reasons
    text = " ".join(str(summary).split())
    for name, reason in reasons.items():
        assert f"not gated: {name}: {reason}" in text


def test_dense_model_says_that_nothing_is_gated():
    summary = sgtriton.summary(nn.Sequential(nn.Linear(4, 3)))
    assert summary.layers == ()
    assert (summary.sparsity, summary.sparsity_of_all, summary.parameters) == (0, 0, 15)
    text = str(summary)
    assert text.startswith("no gated layer")
    assert "not gated: 0: patch() was not asked to" in text
    assert "%" not in text


def test_model_without_parameters_gives_no_nan():
    summary = sgtriton.summary(nn.ReLU())
    assert (summary.sparsity, summary.sparsity_of_all, summary.parameters) == (0, 0, 0)
    assert str(summary) == "no gated layer"


def test_layer_without_weights_gives_no_nan():
    summary = sgtriton.summary(sgtriton.GatedLinear(4, 0, block=(1, 1)))
    assert summary.layers[0].sparsity == 0
    assert "nan" not in str(summary)
    assert "fully pruned" not in str(summary)


@pytest.mark.parametrize("block", [(4, 4), (1, 1)])
@pytest.mark.parametrize("share", [0.0, 1.0])
@torch.no_grad()
def test_percentages_are_exact_at_the_ends(block, share):
    model = sgtriton.patch(nn.Sequential(nn.Linear(33, 17), nn.Linear(17, 5)), block=block)
    for layer in model:
        layer.gate.fill_(share)
    for summary in (sgtriton.summary(model), sgtriton.summary(sgtriton.sparsify(model, "dense"))):
        assert summary.sparsity == 1 - share
        assert [layer.sparsity for layer in summary.layers] == [1 - share] * 2
        assert not any(math.isnan(x) for x in (summary.sparsity, summary.sparsity_of_all))
        assert f"{1 - share:.2%} of the gated weights" in str(summary)


def test_fully_pruned_layer_is_flagged():
    model = sgtriton.patch(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), block=(4, 4))
    model[1].gate.data.zero_()
    for summary in (sgtriton.summary(model), sgtriton.summary(sgtriton.sparsify(model, "dense"))):
        flagged = [line for line in str(summary).splitlines() if "fully pruned" in line]
        assert len(flagged) == 1
        assert flagged[0].startswith("1: fully pruned, ")


@pytest.mark.parametrize("block", [(4, 4), (1, 1)])
def test_nan_gate_raises_with_the_layers_name(block):
    model = sgtriton.patch(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), block=block)
    model[1].gate.data.view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match=r"^1: gates must be numbers, got NaN"):
        sgtriton.summary(model)


def test_summary_leaves_the_model_alone():
    model = two_layers()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    str(sgtriton.summary(model))
    for name, t in model.state_dict().items():
        assert_exact(name, t, before[name])


@torch.no_grad()
def test_summary_says_that_masking_alone_saves_nothing(tmp_path):
    """Both figures, before and after; and the promise of the second is what a file takes."""
    model = sgtriton.patch(nn.Sequential(nn.Linear(1024, 1024)), block=(32, 32))
    model[0].gate.view(-1)[torch.randperm(1024)[:922]] = 0  # 90 % of the blocks
    text = str(sgtriton.summary(model))
    assert "gates alone save neither time nor memory; sparsify() does" in text
    sgtriton.sparsify(model, form="sparse")
    summary = sgtriton.summary(model)
    (layer,) = summary.layers
    assert layer.bytes <= 0.15 * layer.bytes_dense
    assert "save neither" not in str(summary)
    sgtriton.save(model, tmp_path / "model.sgt")
    bias, headers = 4096, 3000
    assert 0 <= (tmp_path / "model.sgt").stat().st_size - layer.bytes - bias < headers
    row = next(line for line in str(summary).splitlines() if line.startswith("0 "))
    assert f"{layer.bytes / 1024:,.1f} KiB" in row
    assert "4.0 MiB" in row


def test_dense_copies_are_shown():
    model = sgtriton.sparsify(two_layers(), form="dense")
    assert "copies kept for forms other than sparse: 288 B" in str(sgtriton.summary(model))
    model = sgtriton.sparsify(two_layers(), form="dense", dense_copy=False)
    assert "copies kept" not in str(sgtriton.summary(model))


def test_frozen_gates_are_shown():
    model = two_layers()
    model[0].freeze()
    assert [layer.form for layer in sgtriton.summary(model).layers] == ["gated, frozen", "gated"]


def test_mixed_forms_are_told_with_their_reason():
    model = sgtriton.sparsify(two_layers(), form="dense")
    forms = {**dict.fromkeys(BUCKETS, "dense"), "33-128": "sparse", "129-4096": "sparse"}
    reason = (
        "sparse against dense: 0.5x at M=1, 0.7x at M=8, 0.97x at M=32, 1.3x at M=128, 2x at M=512"
    )
    model[0].set_forms(forms, reason, True)
    text = " ".join(str(sgtriton.summary(model)).split())
    assert " 3 of 6 mixed " in text
    assert f"0: sparse at M 33-128, 129-4096; else dense: {reason}" in text


def test_lines_stay_within_a_hundred_columns():
    encoder = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    model = nn.ModuleDict(
        {
            "encoder": nn.TransformerEncoder(encoder, 2),
            "features": nn.Sequential(nn.Conv2d(128, 256, 3), nn.Conv2d(256, 256, 3)),
            "classifier": nn.Linear(1000, 10),
            "embedding": nn.Embedding(10, 64),
        }
    )
    sgtriton.patch(model, block=(None, 8), exclude="classifier")
    reason = (
        "sparse against dense: 0.5x at M=1, 0.7x at M=8, 0.97x at M=32, 1.3x at M=128, 2x at M=512"
    )
    model["features"][0].gate.data.zero_()
    for text in (
        str(sgtriton.summary(model)),
        str(sgtriton.summary(sgtriton.sparsify(model, form="sparse"))),
    ):
        assert max(map(len, text.splitlines())) <= 100
    layer = model["encoder"].layers[0].linear1
    layer.set_forms({**dict.fromkeys(BUCKETS, "sparse"), "1": "dense"}, reason, True)
    text = str(sgtriton.summary(model))
    assert max(map(len, text.splitlines())) <= 100
    assert reason in " ".join(text.split())


def test_columns_line_up():
    text = str(sgtriton.summary(two_layers()))
    header, rule, *rows = text.splitlines()[:4]
    assert re.fullmatch("[- ]+", rule)
    for name in ("weight", "block"):  # columns of text, set left
        start = header.index(name)
        assert all(row[start] != " " and row[start - 1] == " " for row in rows)
    end = header.index("sparsity") + len("sparsity")  # of figures, set right
    assert all(row[end - 1] == "%" for row in rows)


def test_summary_prints_without_rich():
    code = (
        "import sys; sys.modules['rich'] = None; import torch, sgtriton; "
        "m = sgtriton.patch(torch.nn.Sequential(torch.nn.Linear(8, 8)), block=(4, 4)); "
        "print(sgtriton.summary(m))"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("layer")
    assert "4 of 4" in done.stdout
    assert "\x1b" not in done.stdout


def test_summary_is_plain_text():
    text = str(sgtriton.summary(two_layers()))
    assert text.isascii()
    assert isinstance(sgtriton.summary(two_layers()), Summary)
    assert all(line == line.rstrip() for line in text.splitlines())


def test_served_blocks_are_shown_beside_the_gates_own():
    """Both densities: that of the gates and that of the blocks they are merged into."""
    model = sgtriton.patch(nn.Sequential(nn.Linear(32, 32)), block=(4, 4))
    gate = model[0].gate.data.zero_()
    gate[0, 0] = gate[1, 1] = gate[7, 7] = 1
    for form in ("merged", "sparse"):
        served = sgtriton.sparsify(copy.deepcopy(model), form=form)
        summary = sgtriton.summary(served)
        (layer,) = summary.layers
        assert layer.sparsity == pytest.approx(1 - 3 / 64, abs=1e-6)
        assert layer.serve_block == (16, 16)
        assert layer.served_sparsity == pytest.approx(0.5, abs=1e-6)
        assert layer.bytes_copy == (2 * 256 * 4 if form == "merged" else 0)
        text = " ".join(str(summary).split())
        assert ("merged blocks of 16x16 leave out 50.00%" in text) == (form == "merged")
        assert "95.31% 3 of 64" in text


def test_expected_and_measured_speedups_are_shown():
    model = sgtriton.sparsify(two_layers(), form="dense")
    expected = dict(zip(BUCKETS, (0.5, 1.0, 1.5, 2.0, 2.5, 3.0), strict=True))
    reason = "sparse against dense: 0.4x at M=1, 2x at M=512"
    model[0].set_forms(
        {**DENSE, "129-4096": "sparse"}, reason, True, expected, {"1": 0.4, "129-4096": 2.0}
    )
    summary = sgtriton.summary(model)
    assert summary.layers[0].expected == expected
    assert summary.layers[0].measured == {"1": 0.4, "129-4096": 2.0}
    said = f"{reason} (expected 0.5x, 1x, 1.5x, 2x, 2.5x, 3x)"
    assert said in " ".join(str(summary).split())
    assert max(map(len, str(summary).splitlines())) <= 100


def test_each_reason_has_a_line_where_one_is_too_short():
    model = sgtriton.sparsify(two_layers(), form="dense")
    reasons = [
        "sparse against dense: 0.5x at M 1, 0.7x at M 2-8, 0.97x at M 9-32",
        "dense_left against dense: 1.3x at M 33-128, 2x at M 129-4096",
    ]
    forms = {**DENSE, "33-128": "dense_left", "129-4096": "dense_left"}
    model[0].set_forms(forms, "; ".join(reasons), True, dict.fromkeys(BUCKETS, 1.5))
    lines = str(sgtriton.summary(model)).splitlines()
    start = lines.index("0: dense_left at M 33-128, 129-4096; else dense:")
    assert lines[start + 1 : start + 5] == [
        f"  {reasons[0]};",
        f"  {reasons[1]}",
        "  (expected 1.5x, 1.5x, 1.5x, 1.5x, 1.5x, 1.5x)",
        "2: dense: as asked for",
    ]


def test_copies_that_take_more_than_the_dense_weight_are_told():
    model = sgtriton.sparsify(two_layers().half(), form="dense_left")
    said = "copies take 2x the dense weight"  # in fp32, of weights of 16 bits
    assert f"0, 2: dense_left: as asked for; {said}" in str(sgtriton.summary(model))
    assert said not in str(sgtriton.summary(model.float()))
