import torch
from torch import nn

from bench import rows, training
from sgtriton import GatedLinear


def test_rows_of_every_candidate_survive_the_csv(tmp_path):
    shape, path = (8, 64, 96), tmp_path / "training.csv"
    layers: dict[str, nn.Module] = {
        "dense": nn.Linear(96, 64),
        "sgtriton": training.make_gated(64, 96, (1, 1), "threshold", 0.5),
    }
    layers["eager gating"] = training.EagerGating(layers["sgtriton"])
    measured = training.measure(layers, shape, "threshold", (1, 1), 0.5, seconds=0.01)
    rows.write(path, measured)
    assert rows.read(path, training.Row) == measured
    assert [row.candidate for row in measured] == list(layers)
    assert measured[0].ratio == 1
    assert "eager gating" in training.table(measured)


def test_a_gated_layer_keeps_a_bit_per_gate_at_most():
    x = torch.randn(8, 96, requires_grad=True)
    threshold = training.make_gated(64, 96, (1, 1), "threshold", 0.5)
    bernoulli = training.make_gated(64, 96, (1, 1), "bernoulli", 0.5)
    assert training.saved_bytes(nn.Linear(96, 64), x) == 0
    assert training.saved_bytes(threshold, x) == 0
    assert training.saved_bytes(bernoulli, x) == 64 * 96 / 8 + 8
    # autograd keeps the binarised gates and the gated weight
    assert training.saved_bytes(training.EagerGating(threshold), x) == 2 * 64 * 96 * 4


def test_all_candidates_of_a_shape_compute_what_their_gates_say():
    shape = (8, 64, 96)
    x = torch.randn(8, 96)
    for name, layer in training.per_block(shape).items():
        gated = layer.weight if name == "dense" else layer.eval_weight()
        torch.testing.assert_close(layer(x), nn.functional.linear(x, gated, layer.bias))


def test_a_cycle_of_steps_lets_gates_reopen_once():
    layer = training.per_block((8, 64, 96))[f"sgtriton, reopen_every={training.CYCLE}"]
    x, dy = torch.randn(8, 96, requires_grad=True), torch.randn(8, 64)
    assert isinstance(layer, GatedLinear)
    gate, moved = layer.gate, []
    step = training.make_step(layer, x, dy)

    def watched():
        step()
        assert gate.grad is not None
        moved.append(bool(gate.grad[gate <= 0.5].any()))

    training._whole_cycle(layer, watched)()
    assert moved == [True] + [False] * (training.CYCLE - 1)
