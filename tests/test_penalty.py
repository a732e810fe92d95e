import pytest
import torch
from helpers import assert_exact
from sgtriton_kernels import gate_penalties
from sgtriton_kernels.penalty import gate_penalties_ref
from torch.library import opcheck

SHAPES = [(3, 5), (7,), (1, 2, 3, 2)]


def make(device, shapes=SHAPES):
    gates = [torch.rand(shape, device=device).requires_grad_() for shape in shapes]
    count = sum(g.numel() for g in gates)
    return gates, torch.randint(1, 9, (count,), device=device).float()


def lambdas(bimodal, l1, device):
    return torch.tensor([bimodal, l1], dtype=torch.float32, device=device)


def test_penalty_and_gradient_match_fp64(device):
    gates, cover = make(device)
    out = gate_penalties(gates, cover, lambdas(0.3, 0.7, device))
    gates64 = [g.detach().double().requires_grad_() for g in gates]
    ref = gate_penalties_ref(gates64, cover, 0.3, 0.7)
    torch.testing.assert_close(out.penalty.double(), ref, rtol=1e-6, atol=0)
    for grad, grad64 in zip(
        torch.autograd.grad(out.penalty, gates), torch.autograd.grad(ref, gates64), strict=True
    ):
        torch.testing.assert_close(grad.double(), grad64, rtol=1e-6, atol=1e-6)


def test_statistics_count_weights_not_gates(device):
    gate = torch.tensor([0.0, 0.05, 0.2, 0.5, 0.6, 0.95, 1.0, 1.0, 0.8], device=device)
    cover = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8, 9], device=device)
    first = gate_penalties([gate], cover, lambdas(0, 0, device))
    assert first.density.item() == pytest.approx((5 + 6 + 7 + 8 + 9) / 45)
    assert first.undecided.item() == pytest.approx((3 + 4 + 5 + 9) / 45)
    assert first.mean.item() == pytest.approx((gate * cover).sum().item() / 45)
    assert first.flips.item() == -1
    gate[0], gate[8] = 1.0, 0.0
    second = gate_penalties([gate], cover, lambdas(0, 0, device), first.mask)
    assert second.flips.item() == 2


def test_gradient_does_not_vanish_at_or_beyond_the_bounds(device):
    gate = torch.tensor([-1.0, 0.0, 1.0, 2.0], device=device, requires_grad=True)
    gate_penalties([gate], torch.ones(4, device=device), lambdas(0, 1, device)).penalty.backward()
    assert gate.grad is not None
    assert gate.grad.tolist() == [1.0] * 4


def test_sums_of_many_gates_stay_exact(device):
    gate = torch.full((300_000,), 0.5, device=device)
    out = gate_penalties([gate], torch.full_like(gate, 1024.0), lambdas(0, 1, device))
    assert out.penalty.item() == 300_000 * 512.0


def test_inputs_and_grads_are_untouched(device):
    gates, cover = make(device)
    before = [g.detach().clone() for g in gates]
    gate_penalties(gates, cover, lambdas(1, 1, device))
    for g, b in zip(gates, before, strict=True):
        assert_exact("gate", g, b)
        assert g.grad is None


def test_gate_penalties_is_a_sound_custom_op(device):
    gates, cover = make(device)
    mask = gate_penalties(gates, cover, lambdas(1, 1, device)).mask
    op = torch.ops.sgtriton_kernels.gate_penalties.default
    for previous in (None, mask):
        opcheck(op, (gates, cover, lambdas(0.1, 0.2, device), previous))


def test_gate_penalties_compiles_without_graph_breaks(device):
    gates, cover = make(device)

    def step(lams):
        return gate_penalties(gates, cover, lams).penalty

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    lams = lambdas(0.1, 0.2, device)
    assert_exact("penalty", compiled(lams), step(lams))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"gates": []}, "at least one"),
        ({"gates": [torch.rand(3).half()]}, "float32"),
        ({"coverages": torch.ones(4)}, "coverages must have shape"),
        ({"lambdas": torch.ones(3)}, "lambdas"),
        ({"lambdas": torch.ones(2, dtype=torch.float64)}, "lambdas"),
        ({"previous": torch.zeros(3, dtype=torch.uint8)}, "previous"),
        ({"lambdas": torch.ones(2, device="meta")}, "one device"),
    ],
)
def test_gate_penalties_refuses(change, match):
    arguments = {"gates": [torch.rand(3)], "coverages": torch.ones(3), "lambdas": torch.ones(2)}
    with pytest.raises(ValueError, match=match):
        gate_penalties(**(arguments | change))
