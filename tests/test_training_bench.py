import argparse
import math

import pytest
import torch
from torch import nn

from bench import rows, training, training_steps
from sgtriton import GatedLinear


def test_rows_of_every_candidate_survive_the_csv(tmp_path):
    shape, path = (8, 64, 96), tmp_path / "training.csv"
    layers: dict[str, nn.Linear] = {
        "dense": nn.Linear(96, 64),
        "sgtriton": training_steps.make_gated(64, 96, (1, 1), "threshold", 0.5),
    }
    layers["eager gating"] = training_steps.EagerGating(layers["sgtriton"])
    measured = training.measure(layers, shape, "threshold", (1, 1), 0.5, seconds=0.01)
    rows.write(path, measured)
    assert rows.read(path, training.Row) == measured
    assert [row.provider for row in measured] == list(layers)
    assert measured[0].ratio == 1
    assert "eager gating" in training.table(measured)


def test_a_gated_layer_keeps_a_bit_per_gate_at_most():
    x = torch.randn(8, 96, requires_grad=True)
    threshold = training_steps.make_gated(64, 96, (1, 1), "threshold", 0.5)
    bernoulli = training_steps.make_gated(64, 96, (1, 1), "bernoulli", 0.5)
    assert training_steps.saved_bytes(nn.Linear(96, 64), x) == 0
    assert training_steps.saved_bytes(threshold, x) == 0
    assert training_steps.saved_bytes(bernoulli, x) == 64 * 96 / 8 + 8
    # autograd keeps the binarised gates and the gated weight
    assert training_steps.saved_bytes(training_steps.EagerGating(threshold), x) == 2 * 64 * 96 * 4


def test_all_candidates_of_a_shape_compute_what_their_gates_say():
    shape = (8, 64, 96)
    x = torch.randn(8, 96)
    for name, layer in training_steps.per_block(shape).items():
        gated = layer.weight if name == "dense" else layer.eval_weight()
        torch.testing.assert_close(layer(x), nn.functional.linear(x, gated, layer.bias))


def test_a_cycle_of_steps_lets_gates_reopen_once():
    layer = training_steps.per_block((8, 64, 96))[f"sgtriton, reopen_every={training_steps.CYCLE}"]
    x, dy = torch.randn(8, 96, requires_grad=True), torch.randn(8, 64)
    assert isinstance(layer, GatedLinear)
    gate, moved = layer.gate, []
    step = training_steps.make_step(layer, x, dy)

    def watched():
        step()
        assert gate.grad is not None
        moved.append(bool(gate.grad[gate <= 0.5].any()))

    training_steps.whole_cycle(layer, watched)()
    assert moved == [True] + [False] * (training_steps.CYCLE - 1)


def cell(kind="threshold", block=(1, 1)):
    layers = {
        "dense": nn.Linear(96, 64),
        "sgtriton": training_steps.make_gated(64, 96, block, kind, 0.5),
    }
    return {r.provider: r for r in training.measure(layers, (8, 64, 96), kind, block, 0.5, 0.0)}


@pytest.mark.parametrize("kind", ["threshold", "bernoulli"])
@pytest.mark.parametrize("wrong", ["y", "dx", "dW", "dbias", "dgate"])
def test_a_wrong_step_is_listed_and_not_timed(kind, wrong, monkeypatch):
    assert cell(kind)["sgtriton"].is_measured
    step = training_steps.make_step

    def planted(layer, x, dy):
        def call():
            y = step(layer, x, dy)()
            if isinstance(layer, GatedLinear):
                tensors = {
                    "y": y, "dx": x.grad, "dW": layer.weight.grad, "dbias": layer.bias.grad,
                    "dgate": layer.gate.grad,
                }  # fmt: skip
                tensors[wrong].view(-1)[0] += 0.01 * tensors[wrong].abs().max()
            return y

        return call

    monkeypatch.setattr(training_steps, "make_step", planted)
    found = cell(kind)
    assert found["sgtriton"].status.startswith(f"wrong: {wrong}, relative error")
    assert math.isnan(found["sgtriton"].ms_p50)
    assert found["dense"].is_measured


def test_every_candidate_for_blocks_is_right(tmp_path):
    shape = (8, 64, 96)
    layers = training_steps.per_block(shape)
    measured = training.measure(
        layers, shape, "threshold", training_steps.BLOCK, training_steps.CLOSED, 0.0
    )
    assert {r.provider: r.status for r in measured} == dict.fromkeys(layers, rows.MEASURED)
    section = training.SWEEP.section(measured, "", "training.csv")
    assert "| 8, 64, 96 | threshold | 32x32 | sgtriton, frozen |" in section
    assert "peak" not in section


def test_what_cannot_be_compiled_is_named(monkeypatch):
    monkeypatch.setattr(training_steps.peers.shutil, "which", lambda _: None)
    (row,) = training.missing(argparse.Namespace(device="cpu", dtype=None))
    assert row.status.startswith("missing: no C++ compiler")
    assert training_steps.COMPILED not in training_steps.per_weight((8, 64, 96), "threshold")
    assert "no C++ compiler" in "".join(rows.notes([row]))
