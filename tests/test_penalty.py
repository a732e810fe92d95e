import functools

import pytest
import torch
from helpers import assert_exact, poisoned
from sgtriton_kernels import gate_penalties, kinds, penalty
from sgtriton_kernels._triton import INTERPRETED
from sgtriton_kernels.penalty import GatePenalties, gate_penalties_ref, mask_size
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from sgtriton.cross_compile import CARDS, compile_for

OP = torch.ops.sgtriton_kernels.gate_penalties.default

# within a byte, a byte, one more; several programs and a ragged last one; no gate at all
SHAPES = [(3, 5), (7,), (0,), (1,), (1, 2, 3, 2), (8,), (9,), (1025,), (0, 3), (2, 650)]
KINDS = ["threshold", "hard_concrete", "bernoulli", "hard_concrete", "threshold"] * 2
HOLDS = [False, True, True, False, True, False, True, False, False, True]


def make(device, shapes=SHAPES, kind="threshold"):
    """Gates on both sides of every bound, and their coverages."""
    of = [kind] * len(shapes) if isinstance(kind, str) else kind
    gates = []
    for shape, k in zip(shapes, of, strict=True):
        low, high = kinds.gate_bounds(k)
        gate = low + (high - low) * (1.4 * torch.rand(shape, device=device) - 0.2)
        gates.append(gate.requires_grad_())
    count = sum(g.numel() for g in gates)
    return gates, torch.randint(1, 9, (count,), device=device).float()


def lambdas(bimodal, l1, device):
    return torch.tensor([bimodal, l1], dtype=torch.float32, device=device)


def assert_matches(out: GatePenalties, ref: GatePenalties) -> None:
    torch.testing.assert_close(out.penalty.double().cpu(), ref.penalty, rtol=1e-6, atol=0)
    torch.testing.assert_close(out.mean.cpu(), ref.mean, rtol=1e-6, atol=0)
    for name in ("density", "undecided"):
        torch.testing.assert_close(
            getattr(out, name).cpu(), getattr(ref, name), rtol=1e-12, atol=0, msg=name
        )
    assert_exact("flips", out.flips.cpu(), ref.flips)
    assert_exact("mask", out.mask.cpu(), ref.mask)


def check(gates, cover, device, previous=None, impl=None, **of_tensors):
    """Everything against the reference, gate by gate."""
    out = gate_penalties(gates, cover, lambdas(0.3, 0.7, device), previous, impl=impl, **of_tensors)
    gates64 = [g.detach().cpu().double().requires_grad_() for g in gates]
    lams = lambdas(0.3, 0.7, device).tolist()
    ref = gate_penalties_ref(gates64, cover, *lams, previous, **of_tensors)
    assert_matches(out, ref)
    grads = torch.autograd.grad(out.penalty, gates)
    grads64 = torch.autograd.grad(ref.penalty, gates64, allow_unused=True)
    for gate, grad, grad64 in zip(gates, grads, grads64, strict=True):
        assert (grad.dtype, grad.shape) == (torch.float32, gate.shape)
        wanted = torch.zeros(gate.shape, dtype=torch.float64) if grad64 is None else grad64
        torch.testing.assert_close(grad.double().cpu(), wanted, rtol=1e-6, atol=1e-6)
    return out


@pytest.mark.parametrize("kind", kinds.GATE_KINDS)
def test_one_kind_matches_fp64(device, impl, kind):
    gates, cover = make(device, kind=kind)
    check(gates, cover, device, impl=impl, kinds=kind)


def test_mixed_kinds_and_flips_match_fp64(device, impl):
    gates, cover = make(device, kind=KINDS)
    others, _ = make(device, kind=KINDS)
    lams = lambdas(0, 0, device)
    previous = gate_penalties(others, cover, lams, kinds=KINDS, impl=impl).mask
    out = check(gates, cover, device, previous, impl, kinds=KINDS, hold_closed=HOLDS)
    assert 0 < out.flips < cover.numel()


def test_a_program_with_several_pieces_matches_fp64(device, impl, monkeypatch):
    monkeypatch.setattr(penalty, "_PROGRAMS", 2)
    shapes = [(5000,), (1,), (2049,)]
    gates, cover = make(device, shapes)
    others, _ = make(device, shapes)
    previous = gate_penalties(others, cover, lambdas(0, 0, device), impl=impl).mask
    check(gates, cover, device, previous, impl)


def test_views_between_nans_give_the_same(device, impl):
    gates, cover = make(device, kind=KINDS)
    strided = [poisoned(g.detach()) for g in gates]
    strided[0] = poisoned(gates[0].detach().T.contiguous()).T
    buffers = [(g._base, g._base.clone()) for g in strided if g._base is not None]
    lams = lambdas(0.3, 0.7, device)
    strided = [g.requires_grad_() for g in strided]
    out = gate_penalties(strided, poisoned(cover), poisoned(lams), kinds=KINDS, impl=impl)
    ref = gate_penalties(gates, cover, lams, kinds=KINDS, impl=impl)
    for name, a, b in zip(out._fields, out, ref, strict=True):
        assert_exact(name, a.detach(), b.detach())
    grads = torch.autograd.grad(out.penalty, strided)
    for a, b in zip(grads, torch.autograd.grad(ref.penalty, gates), strict=True):
        assert_exact("gradient", a, b)
    assert len(buffers) == len(SHAPES)
    for buffer, before in buffers:
        torch.testing.assert_close(buffer, before, rtol=0, atol=0, equal_nan=True)


def test_held_gates_get_no_gradient_while_they_are_closed(device, impl):
    gate = torch.tensor([-1.0, 0.2, 0.5, 0.6, 2.0], device=device, requires_grad=True)
    log_alpha = torch.tensor([-9.0, -2.5, -2.3, 9.0], device=device, requires_grad=True)
    gates, of = [gate, log_alpha, gate], ["threshold", "hard_concrete", "threshold"]
    cover, lams = torch.ones(14, device=device), lambdas(0, 1, device)
    free = gate_penalties(gates, cover, lams, kinds=of, impl=impl)
    held = gate_penalties(gates, cover, lams, kinds=of, hold_closed=[True, True, False], impl=impl)
    for name, a, b in zip(held._fields, held, free, strict=True):
        assert_exact(name, a.detach(), b.detach())
    dgate, dlog_alpha = torch.autograd.grad(held.penalty, (gate, log_alpha))
    assert dgate.tolist() == [1, 1, 1, 2, 2]
    assert (dlog_alpha != 0).tolist() == [False, False, True, True]


def test_statistics_count_weights_not_gates(device, impl):
    gate = torch.tensor([0.0, 0.05, 0.2, 0.5, 0.6, 0.95, 1.0, 1.0, 0.8], device=device)
    cover = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8, 9], device=device)
    first = gate_penalties([gate], cover, lambdas(0, 0, device), impl=impl)
    assert first.density.item() == pytest.approx((5 + 6 + 7 + 8 + 9) / 45)
    assert first.undecided.item() == pytest.approx((3 + 4 + 5 + 9) / 45)
    assert first.mean.item() == pytest.approx((gate * cover).sum().item() / 45)
    assert first.flips.item() == -1
    gate[0], gate[8] = 1.0, 0.0
    second = gate_penalties([gate], cover, lambdas(0, 0, device), first.mask, impl=impl)
    assert second.flips.item() == 2


def test_bits_of_each_tensor_start_at_a_byte(device, impl):
    gates = [torch.ones(n, device=device) for n in (3, 0, 9, 8)]
    mask = gate_penalties(gates, torch.ones(20, device=device), lambdas(0, 0, device), impl=impl)[5]
    assert mask.tolist() == [0b111, 0xFF, 1, 0xFF]
    assert mask_size(gates) == 4


@pytest.mark.parametrize("kind", kinds.GATE_KINDS)
def test_gradient_does_not_vanish_at_or_beyond_the_bounds(device, impl, kind):
    low, high = kinds.gate_bounds(kind)
    gate = torch.tensor([low - 1, low, high, high + 1], device=device, requires_grad=True)
    cover, lams = torch.ones(4, device=device), lambdas(0, 1, device)
    gate_penalties([gate], cover, lams, kinds=kind, impl=impl).penalty.backward()
    assert gate.grad is not None
    if kind == "hard_concrete":
        chance = kinds.open_chance(gate.detach().double(), kind)
        wanted = chance * (1 - chance)
    else:
        wanted = torch.ones(4, dtype=torch.float64, device=device)
    torch.testing.assert_close(gate.grad.double(), wanted, rtol=1e-6, atol=0)


def test_a_nan_gate_is_closed_and_shows_in_the_mean(device, impl):
    gates = [torch.tensor([1.0, float("nan"), 0.0, 1.0], device=device), torch.ones(4).to(device)]
    out = gate_penalties(gates, torch.ones(8, device=device), lambdas(1, 1, device), impl=impl)
    assert out.mean.isnan()
    assert out.penalty.isnan()
    assert out.density.item() == 6 / 8
    assert out.mask.tolist() == [0b1001, 0b1111]


def test_sums_of_many_gates_stay_exact(device, impl):
    # beyond 2**24 a sum in fp32 would lose each gate's last bit
    gate = torch.full((40_001,), 0.5, device=device)
    out = gate_penalties([gate], torch.full_like(gate, 1025.0), lambdas(0, 1, device), impl=impl)
    assert out.penalty.item() == torch.tensor(40_001 * 512.5).item()
    assert out.mean.item() == 0.5


def test_no_gate_in_any_tensor(device, impl):
    gate = torch.zeros(0, 3, device=device, requires_grad=True)
    cover, lams = torch.zeros(0, device=device), lambdas(1, 1, device)
    previous = torch.zeros(0, dtype=torch.uint8, device=device)
    out = gate_penalties([gate], cover, lams, previous, impl=impl)
    assert (out.penalty.item(), out.flips.item(), len(out.mask)) == (0, 0, 0)
    assert torch.autograd.grad(out.penalty, gate)[0].shape == (0, 3)


def test_inputs_and_grads_are_untouched(device, impl):
    gates, cover = make(device, kind=KINDS)
    inputs = [*gates, cover, lambdas(1, 1, device)]
    before = [t.detach().clone() for t in inputs]
    out = gate_penalties(gates, cover, inputs[-1], kinds=KINDS, impl=impl)
    assert all(g.grad is None for g in gates)
    gates[3].grad = torch.full_like(gates[3], 2.0)
    torch.autograd.grad(out.penalty, gates)
    assert_exact("grad", gates[3].grad, torch.full_like(gates[3], 2.0))
    for t, b in zip(inputs, before, strict=True):
        assert_exact("input", t.detach(), b)


def test_a_penalty_may_be_used_twice(device, impl):
    gates, cover = make(device)
    out = gate_penalties(gates, cover, lambdas(0.3, 0.7, device), impl=impl).penalty
    once = torch.autograd.grad(out, gates, retain_graph=True)
    thrice = torch.autograd.grad(out + 2 * out, gates, retain_graph=True)
    out.backward()
    for gate, a, b in zip(gates, once, thrice, strict=True):
        torch.testing.assert_close(b, 3 * a, rtol=1e-6, atol=0)
        assert gate.grad is not None
        assert_exact("again", gate.grad, a)


def test_no_gradient_is_made_where_none_is_asked_for(device, impl):
    gates, cover = make(device)
    lams = lambdas(0.3, 0.7, device).requires_grad_()
    with torch.no_grad():
        assert not gate_penalties(gates, cover, lams, impl=impl).penalty.requires_grad
    frozen = [g.detach() for g in gates]
    penalty_of_frozen = gate_penalties(frozen, cover, lams, impl=impl).penalty
    assert torch.autograd.grad(penalty_of_frozen, lams, allow_unused=True) == (None,)
    flags = [False] * len(gates)
    assert OP(frozen, cover, lams.detach(), None, flags, flags, False, impl)[-1].numel() == 0


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid):
        self.launches += 1
        return self.kernel[grid]


def test_many_tensors_take_one_launch(device, impl, monkeypatch):
    if impl != "triton":
        pytest.skip("no kernel to launch")
    tensors = 40 if INTERPRETED else 200  # the interpreter takes a tenth of a second for each
    counted = Counted(penalty._gate_penalties_fwd_kernel)
    monkeypatch.setattr(penalty, "_gate_penalties_fwd_kernel", counted)
    gates, cover = make(device, [(1 + i % 13, 3) for i in range(tensors)])
    out = gate_penalties(gates, cover, lambdas(0.3, 0.7, device), impl=impl)
    grads = torch.autograd.grad(out.penalty, gates)
    assert counted.launches == 1
    ref = gate_penalties(gates, cover, lambdas(0.3, 0.7, device), impl="torch")
    torch.testing.assert_close(out.penalty, ref.penalty, rtol=1e-6, atol=0)
    assert_exact("mask", out.mask, ref.mask)
    for a, b in zip(grads, torch.autograd.grad(ref.penalty, gates), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_results_are_the_same_bit_for_bit(device, impl):
    gates, cover = make(device, kind=KINDS)
    cover = cover * torch.rand_like(cover)
    run = functools.partial(gate_penalties, gates, cover, lambdas(0.3, 0.7, device), impl=impl)
    first, second = run(kinds=KINDS), run(kinds=KINDS)
    for name, a, b in zip(first._fields, first, second, strict=True):
        assert torch.equal(a, b), name
    for a, b in zip(
        torch.autograd.grad(first.penalty, gates),
        torch.autograd.grad(second.penalty, gates),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_a_table_is_uploaded_once():
    device, content = torch.device("cpu"), (0, 0, 1 << 40, 8, 0, 0, 0, 0)
    host, table = penalty._cached_upload(content, device, 3)
    assert table.dtype == torch.int64
    assert table.tolist() == list(content)
    assert penalty._cached_upload(content, device, 3)[0] is host
    assert penalty._cached_upload(content, device, 4)[0] is not host, "one a stream"
    assert penalty._cached_upload.cache_info().maxsize is not None


def test_gate_penalties_is_a_sound_custom_op(device, impl):
    gates, cover = make(device, [(3, 5), (7,), (9,)])
    hard, hold = [False, True, False], [True, False, False]
    lams = lambdas(0.1, 0.2, device)
    mask = gate_penalties(gates, cover, lams, impl=impl).mask
    for previous in (None, mask):
        opcheck(OP, (gates, cover, lams, previous, hard, hold, True, impl))
    frozen = [g.detach() for g in gates]
    opcheck(OP, (frozen[:1], cover[:15], lams, None, hard[:1], hold[:1], False, impl))


def test_gate_penalties_compiles_without_graph_breaks(device, impl):
    gates, cover = make(device, kind=KINDS)

    def step(lams, previous):
        out = gate_penalties(
            gates, cover, lams, previous, kinds=KINDS, hold_closed=HOLDS, impl=impl
        )
        return out.penalty * 2, out.mean, out.flips, out.mask

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    lams = lambdas(0.1, 0.2, device)
    previous = torch.zeros(mask_size(gates), dtype=torch.uint8, device=device)
    out, ref = compiled(lams, previous), step(lams, previous)
    for a, b in zip(out, ref, strict=True):
        assert_exact("output", a.detach(), b.detach())
    for a, b in zip(
        torch.autograd.grad(out[0], gates), torch.autograd.grad(ref[0], gates), strict=True
    ):
        assert_exact("gradient", a, b)


def test_element_wise_work_counts_as_no_flops(device, impl):
    gates, cover = make(device)
    with FlopCounterMode(display=False) as counter:
        gate_penalties(gates, cover, lambdas(1, 1, device), impl=impl).penalty.backward()
    assert counter.get_total_flops() == 0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"gates": []}, "at least one"),
        ({"gates": [torch.rand(3).half()]}, "float32"),
        ({"coverages": torch.ones(4)}, "coverages must have shape"),
        ({"coverages": torch.ones(3, dtype=torch.float64)}, "coverages must .*float64"),
        ({"lambdas": torch.ones(3)}, "lambdas"),
        ({"lambdas": torch.ones(2, dtype=torch.float64)}, "lambdas"),
        ({"previous": torch.zeros(3, dtype=torch.uint8)}, "previous"),
        ({"previous": torch.zeros(1, dtype=torch.int32)}, "previous"),
        ({"lambdas": torch.ones(2, device="meta")}, "one device"),
        ({"kinds": "hard"}, "kind must be one of"),
        ({"kinds": ["threshold", "bernoulli"]}, "kinds must be one for all"),
        ({"hold_closed": []}, "hold_closed must be one for all"),
        ({"impl": "cuda"}, "implementation must be one of"),
    ],
)
def test_gate_penalties_refuses(change, match):
    arguments = {"gates": [torch.rand(3)], "coverages": torch.ones(3), "lambdas": torch.ones(2)}
    with pytest.raises(ValueError, match=match):
        gate_penalties(**(arguments | change))


SIGNATURE = {
    "table_ptr": "*i64", "coverages_ptr": "*fp32", "lambdas_ptr": "*fp32", "previous_ptr": "*u8",
    "sums_ptr": "*fp64", "penalty_ptr": "*fp32", "density_ptr": "*fp64", "mean_ptr": "*fp64",
    "undecided_ptr": "*fp64", "flips_ptr": "*i64", "mask_ptr": "*u8", "dgates_ptr": "*fp32",
    "tensors": "i32", "programs": "i32", "chunk": "i32",
}  # fmt: skip


@pytest.mark.compiles
@pytest.mark.parametrize("card", CARDS, ids=lambda card: str(card[1]))
@pytest.mark.parametrize("full", [True, False], ids=["gradient+flips", "value"])
def test_gate_penalties_kernel_compiles_for(card, full):
    flags = {"HAS_PREVIOUS": full, "NEED_GRAD": full}
    block = penalty._block(torch.device("cuda"))
    kernel = penalty._gate_penalties_fwd_kernel
    compiled = compile_for(card, kernel, SIGNATURE, flags | {"BLOCK": block})
    assert compiled.spills == 0
