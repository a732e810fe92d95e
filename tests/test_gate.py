import re

import pytest
import torch
from helpers import DTYPES, assert_exact, assert_within_twice, integers, layouts
from sgtriton_kernels import gate as gate_module
from sgtriton_kernels import gate_layout, gate_weight, gate_weight_ref
from sgtriton_kernels._triton import INTERPRETED
from sgtriton_kernels.blocks import expand_gates, sum_blocks
from sgtriton_kernels.gate import (
    GateTile,
    binarise,
    draw_hard_concrete,
    tile_for_gate_weight,
)
from sgtriton_kernels.kinds import BETA, CHANCE_SHIFT, eval_gates
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from sgtriton.cross_compile import CARDS, compile_for

# weight shape, block, groups: per weight, ragged, whole dimensions, taps, groups, 1, 0, many tiles
LINEAR = [
    ((7, 33), (1, 1), 1),
    ((13, 30), (4, 4), 1),
    ((37, 53), (32, 32), 1),
    ((5, 70), (1, None), 1),
    ((5, 70), (None, 1), 1),
    ((5, 70), (None, None), 1),
    ((1, 1), (2, 2), 1),
    ((0, 16), (4, 4), 1),
    ((16, 0), (1, 1), 1),
]
CONV = [
    ((6, 4, 3, 2), (1, 1), 1),
    ((6, 5, 3, 3), (4, 2), 2),
    ((6, 4, 3, 2), (1, None), 1),
    ((6, 4, 3, 2), (None, 1), 2),
    ((10, 6, 5), (4, 4), 1),
]
CASES = LINEAR + CONV


def make(shape, block, groups, dtype, device, kind="random"):
    layout = gate_layout(shape, block, groups)
    w = integers(*shape, dtype=dtype, device=device) if kind == "integers" else (
        torch.randn(shape, device=device).to(dtype)
    )  # fmt: skip
    gate = torch.rand(layout.gate_shape, device=device)
    return layout, w.requires_grad_(), gate.requires_grad_()


def ste(w, gate, layout, dtype):
    """The same in eager autograd: what a user would write."""
    b = (gate > 0.5).to(gate.dtype)
    through = b + gate - gate.detach()
    return (w * expand_gates(through, layout).to(w.dtype)).to(dtype)


@pytest.mark.parametrize(("shape", "block", "groups"), CASES)
def test_gate_weight_reference_matches_fp64_pytorch(shape, block, groups):
    layout, w, gate = make(shape, block, groups, torch.float64, "cpu")
    ref = gate_weight_ref(w.detach(), gate > 0.5, block, groups)
    assert_exact("out", ref, w.detach() * expand_gates((gate > 0.5).double(), layout))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "block", "groups"), CASES)
def test_gate_weight_is_exact_on_integers(shape, block, groups, dtype, device, impl):
    layout, w, gate = make(shape, block, groups, dtype, device, "integers")
    dout = integers(*shape, dtype=dtype, device=device)
    out = gate_weight(w, gate, block, groups=groups, impl=impl)
    ref = gate_weight_ref(w.detach().cpu(), (gate > 0.5).cpu(), block, groups)
    assert_exact("out", out.cpu(), ref)
    dw, dgate = torch.autograd.grad(out, (w, gate), dout)
    assert_exact("dw", dw.cpu(), gate_weight_ref(dout.cpu(), (gate > 0.5).cpu(), block, groups))
    assert_exact("dgate", dgate, sum_blocks(dout.double() * w.double(), layout))
    assert dw.dtype == w.dtype
    assert dgate.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "block", "groups"), [CASES[1], CASES[3], CASES[10]])
def test_gate_weight_is_within_twice_pytorchs_error(shape, block, groups, dtype, device, impl):
    layout, w, gate = make(shape, block, groups, torch.float32, device)
    dout = torch.randn(shape, device=device, dtype=dtype)

    out = gate_weight(w, gate, block, groups=groups, dtype=dtype, impl=impl)
    dw, dgate = torch.autograd.grad(out, (w, gate), dout)
    plain = ste(w, gate, layout, dtype)
    plain_dw, plain_dgate = torch.autograd.grad(plain, (w, gate), dout)
    w64, gate64 = w.detach().double().requires_grad_(), gate.detach().double().requires_grad_()
    out64 = ste(w64, gate64, layout, torch.float64)
    dw64, dgate64 = torch.autograd.grad(out64, (w64, gate64), dout.double())

    assert_within_twice("out", out, out64, plain)
    assert_within_twice("dw", dw, dw64, plain_dw)
    assert_within_twice("dgate", dgate, dgate64, plain_dgate)


@pytest.mark.parametrize(
    ("shape", "block", "groups"),
    [CASES[0], ((7, 33), (4, 16), 1), ((4, 5, 2, 2), (2, 4), 1)],
)
def test_gate_weight_takes_any_layout_of_weight_and_gradient(shape, block, groups, device, impl):
    layout, w, gate = make(shape, block, groups, torch.float32, device, "integers")
    w, douts = w.detach(), layouts(integers(*shape, device=device))
    douts["expanded"] = torch.ones((), device=device).expand(shape)  # what .sum() hands over
    for name, view in layouts(w).items():
        view.requires_grad_()
        out = gate_weight(view, gate, block, groups=groups, impl=impl)
        assert out.stride() == torch.empty_like(view).stride()
        assert_exact(f"out, w {name}", out, w * expand_gates(gate > 0.5, layout))
        for dname, dout in douts.items():
            dw, dgate = torch.autograd.grad(out, (view, gate), dout, retain_graph=True)
            assert_exact(f"dw, {name}, {dname}", dw, dout * expand_gates(gate > 0.5, layout))
            assert_exact(f"dgate, {name}, {dname}", dgate, sum_blocks(dout * w, layout))


def test_gate_gradient_is_straight_through_at_and_outside_the_bounds(device, impl):
    gate = torch.tensor([[-0.5, 0.0, 0.5, 0.500001, 1.0, 1.5]], device=device, requires_grad=True)
    w = torch.ones(1, 6, device=device)
    out = gate_weight(w, gate, impl=impl)
    assert out.tolist() == [[0.0, 0.0, 0.0, 1.0, 1.0, 1.0]]  # 0.5 is closed
    out.sum().backward()
    assert gate.grad is not None
    assert gate.grad.tolist() == [[1.0] * 6]


def test_closed_weight_is_exactly_zero_even_if_it_holds_nan(device, impl):
    w = torch.tensor([[float("nan"), float("inf"), 2.0]], device=device)
    gate = torch.tensor([[0.0, 0.0, 1.0]], device=device)
    assert gate_weight(w, gate, impl=impl).tolist() == [[0.0, 0.0, 2.0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "block", "groups"), [CASES[0], CASES[1], CASES[10]])
def test_cast_rounds_as_pytorch_does(shape, block, groups, dtype, device, impl):
    w = torch.randn(shape, device=device).requires_grad_()
    gate = torch.ones(gate_layout(shape, block, groups).gate_shape, device=device)
    out = gate_weight(w, gate, block, groups=groups, dtype=dtype, impl=impl)
    assert_exact("out", out, w.to(dtype))
    low = torch.randn(shape, device=device).to(dtype).requires_grad_()
    dout = torch.randn(shape, device=device)
    wide = gate_weight(low, gate, block, groups=groups, dtype=torch.float32, impl=impl)
    assert_exact("dw", torch.autograd.grad(wide, low, dout)[0], dout.to(dtype))


def test_bernoulli_gates_at_0_and_1_are_exact_and_others_keep_their_rate(device, impl):
    w = torch.ones(64, 512, device=device)
    for p in (0.0, 0.001, 0.3, 0.5, 0.999, 1.0):
        gate = torch.full((64, 512), p, device=device)
        seed = torch.tensor([17], device=device)
        rate = gate_weight(w, gate, kind="bernoulli", seed=seed, impl=impl).mean().item()
        assert abs(rate - p) <= 4 * (p * (1 - p) / w.numel()) ** 0.5


@pytest.mark.parametrize(("shape", "block", "groups"), [CASES[0], CASES[1], CASES[10]])
def test_bernoulli_backward_sees_the_mask_of_forward(shape, block, groups, device, impl):
    layout, w, gate = make(shape, block, groups, torch.float32, device, "integers")
    seed = torch.tensor([5], device=device)
    out = gate_weight(torch.ones_like(w), gate, block, groups=groups, kind="bernoulli", seed=seed, impl=impl)  # fmt: skip  # noqa: E501
    again = gate_weight(w, gate, block, groups=groups, kind="bernoulli", seed=seed, impl=impl)
    assert_exact("redrawn", again, w.detach() * out)
    assert 0 < out.mean() < 1
    dw, dgate = torch.autograd.grad(again, (w, gate), torch.ones_like(again))
    assert_exact("dw", dw, out)
    assert_exact("dgate", dgate, sum_blocks(w.detach(), layout))


def test_bernoulli_mask_depends_on_the_seed(device, impl):
    w, gate = torch.ones(8, 64, device=device), torch.full((8, 64), 0.5, device=device)
    first, same, other = (
        gate_weight(w, gate, kind="bernoulli", seed=torch.tensor([s], device=device), impl=impl)
        for s in (1, 1, 2)
    )
    assert_exact("same seed", first, same)
    assert not torch.equal(first, other)


def philox_uniform(seed: int, counter: int) -> float:
    """First output of Philox4x32-10 (Salmon et al. 2011) as a number in [0, 1)."""
    word = 0xFFFFFFFF
    c, k = [counter & word, counter >> 32, 0, 0], [seed & word, seed >> 32]
    for _ in range(10):
        high, low = 0xCD9E8D57 * c[2], 0xD2511F53 * c[0]
        c = [(high >> 32) ^ c[1] ^ k[0], high & word, (low >> 32) ^ c[3] ^ k[1], low & word]
        k = [(k[0] + 0x9E3779B9) & word, (k[1] + 0xBB67AE85) & word]
    magnitude = c[0] if c[0] < 1 << 31 else c[0] ^ word
    return magnitude * 4.6566127342e-10


def test_triton_draws_the_same_mask_wherever_it_runs(device):
    """Philox keyed by (seed, gate index): interpreter, native CPU code and cards agree."""
    from sgtriton_kernels._triton import why_not_triton

    if reason := why_not_triton(device):
        pytest.skip(reason)
    seed = (3 << 40) + 17  # both words of the key count
    w, gate = torch.ones(3, 32, device=device), torch.full((3, 32), 0.5, device=device)
    out = gate_weight(
        w, gate, kind="bernoulli", seed=torch.tensor([seed], device=device), impl="triton"
    )
    expected = [float(philox_uniform(seed, i) < 0.5) for i in range(96)]
    assert out.flatten().tolist() == expected


def hard_concrete(log_alpha, u):
    """z of a draw, as the paper writes it."""
    s = torch.sigmoid((u.log() - (1 - u).log() + log_alpha) / BETA)
    return (s * 1.2 - 0.1).clamp(0, 1)


def test_triton_draws_the_same_hard_concrete_gates_wherever_it_runs(device):
    from sgtriton_kernels._triton import why_not_triton

    if reason := why_not_triton(device):
        pytest.skip(reason)
    seed = (3 << 40) + 17
    w, gate = torch.ones(3, 32, device=device), torch.linspace(-3, 3, 96, device=device)
    out = gate_weight(
        w, gate.view(3, 32), kind="hard_concrete", seed=torch.tensor([seed], device=device),
        impl="triton",
    )  # fmt: skip
    u = torch.tensor([philox_uniform(seed, i) for i in range(96)], dtype=torch.float64)
    expected = hard_concrete(gate.cpu().double(), u)
    torch.testing.assert_close(out.flatten().cpu().double(), expected, rtol=0, atol=1e-5)


def test_hard_concrete_gates_are_0_and_1_at_their_rates(device, impl):
    w = torch.ones(64, 512, device=device)
    for log_alpha in (-3.0, 0.0, 2.0, 9.0):  # the last reads as log 100
        gate = torch.full((64, 512), log_alpha, device=device)
        seed = torch.tensor([17], device=device)
        z = gate_weight(w, gate, kind="hard_concrete", seed=seed, impl=impl)
        assert 0 <= z.min() <= z.max() <= 1
        clipped = torch.tensor(min(log_alpha, 4.605170185988092))
        for share, p in (
            ((z == 0).double().mean().item(), torch.sigmoid(CHANCE_SHIFT - clipped).item()),
            ((z == 1).double().mean().item(), torch.sigmoid(CHANCE_SHIFT + clipped).item()),
        ):
            assert abs(share - p) <= 4 * (p * (1 - p) / w.numel()) ** 0.5


@pytest.mark.parametrize("seed", [5, None], ids=["drawn", "eval"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "block", "groups"), [CASES[0], CASES[1], CASES[3], CASES[10]])
def test_hard_concrete_multiplies_and_rounds_once(shape, block, groups, dtype, seed, device, impl):
    layout, w, _ = make(shape, block, groups, torch.float32, device)
    gate = (3 * torch.randn(layout.gate_shape, device=device)).requires_grad_()
    seed = None if seed is None else torch.tensor([seed], device=device)
    options = {"groups": groups, "kind": "hard_concrete", "seed": seed, "impl": impl}

    ones = torch.ones(shape, device=device)
    spread = gate_weight(ones, gate, block, **options)  # z of each weight
    z = (sum_blocks(spread.double(), layout) / sum_blocks(ones.double(), layout)).detach()
    if seed is None:
        torch.testing.assert_close(z.float(), eval_gates(gate.detach(), "hard_concrete"))
    out = gate_weight(w, gate, block, dtype=dtype, **options)
    wide = gate_weight_ref(w.detach().cpu(), z.cpu().float(), block, groups)
    assert_within_twice("out", out.cpu(), wide.double(), wide.to(dtype))
    assert not out[spread == 0].any()

    dout = torch.randn(shape, device=device).to(dtype)
    dw, dgate = torch.autograd.grad(out, (w, gate), dout)
    dw_ref = gate_weight_ref(dout.cpu().float(), z.cpu().float(), block, groups)
    assert_within_twice("dw", dw.cpu(), dw_ref.double(), dw_ref)
    # slope of z in log alpha, from z itself
    s = (z + 0.1) / 1.2
    slope = torch.where((z > 0) & (z < 1), 1.2 * s * (1 - s) / (1 if seed is None else BETA), 0.0)
    dgate64 = slope * sum_blocks(dout.double() * w.detach().double(), layout)
    torch.testing.assert_close(dgate.double(), dgate64, rtol=1e-4, atol=1e-5)
    assert dgate.dtype == torch.float32


def test_slope_of_a_draw_is_its_finite_difference():
    gate, seed, h = torch.linspace(-4, 4, 256), torch.tensor([3]), 1e-6
    z, slope = draw_hard_concrete(gate, seed)
    u = torch.rand(256, generator=torch.Generator().manual_seed(3)).double()
    ends = [hard_concrete(gate.double() + side, u) for side in (-h, h)]
    torch.testing.assert_close(z.double(), hard_concrete(gate.double(), u), rtol=0, atol=1e-5)
    inside = (ends[0] > 0) & (ends[1] < 1)
    assert inside.any()
    expected = (ends[1] - ends[0]) / (2 * h)
    torch.testing.assert_close(slope.double()[inside], expected[inside], rtol=1e-4, atol=1e-5)
    assert not slope[(z == 0) | (z == 1)].any()


@pytest.mark.parametrize("seed", [5, None], ids=["drawn", "eval"])
def test_closed_hard_concrete_weight_is_exactly_zero_even_if_it_holds_nan(seed, device, impl):
    w = torch.tensor([[float("nan"), float("inf"), 2.0, 2.0]], device=device, requires_grad=True)
    # 0 in nearly every draw, 1 in nearly every draw, not a number
    gate = torch.tensor([[-4.6, -4.6, 4.6, float("nan")]], device=device, requires_grad=True)
    seed = None if seed is None else torch.tensor([seed], device=device)
    out = gate_weight(w, gate, kind="hard_concrete", seed=seed, impl=impl)
    assert out.tolist() == [[0.0, 0.0, 2.0, 0.0]]
    dgate = torch.autograd.grad(out.sum(), gate)[0]
    assert dgate.tolist() == [[0.0] * 4]


@pytest.mark.parametrize("kind", ["threshold", "hard_concrete"])
@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((64, 700), (None, None)),
        ((16, 700), (1, None)),
        ((64, 700), (None, 1)),
        ((70, 9, 3), (None, None)),
        ((70, 9, 3), (None, 1)),
        ((70, 9, 3), (64, 1)),
        ((70, 9, 3), (64, 8)),
    ],
)
def test_large_blocks_are_summed_in_parts(shape, block, kind, device):
    from sgtriton_kernels._triton import why_not_triton

    if reason := why_not_triton(device):
        pytest.skip(reason)
    layout, w, gate = make(shape, block, 1, torch.float32, device, "integers")
    gate = (gate.detach() - (0 if kind == "threshold" else 0.5)).requires_grad_()
    dout = integers(*shape, device=device)
    # the interpreter is slow by the program, the CPU's compiler by the size of a tile
    tile = GateTile(16, 256, 2, 1) if INTERPRETED else GateTile(4, 16, 2, 1)
    out = gate_weight(w, gate, block, kind=kind, impl="triton", tile=tile)
    plain = gate_weight(w, gate, block, kind=kind, impl="torch")
    torch.testing.assert_close(out, plain, rtol=1e-6, atol=0)
    grads = torch.autograd.grad(out, (w, gate), dout, retain_graph=True)
    again = torch.autograd.grad(out, (w, gate), dout)
    for name, grad, same, ref in zip(
        ("dw", "dgate"), grads, again, torch.autograd.grad(plain, (w, gate), dout), strict=True
    ):
        assert_exact(f"{name}, repeated", grad, same)
        torch.testing.assert_close(grad, ref, rtol=1e-5, atol=1e-5)
    if kind == "threshold":
        assert_exact("dgate", grads[1], sum_blocks(dout * w.detach(), layout))


KINDS = [("threshold", None), ("bernoulli", 3), ("hard_concrete", 3), ("hard_concrete", None)]


@pytest.mark.parametrize(("kind", "seed"), KINDS)
def test_gate_weight_passes_gradcheck_in_the_weight(kind, seed):
    gate, seed = torch.rand(3, 2), None if seed is None else torch.tensor([seed])
    w = torch.randn(9, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda w: gate_weight(w, gate, (4, 4), kind=kind, seed=seed, impl="torch"), (w,)
    )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"block": (0, 1)}, "block sides"),
        ({"block": (1, -4)}, "block sides"),
        ({"block": 4}, "pair"),
        ({"kind": "sigmoid"}, "threshold"),
        ({"gate": torch.rand(2, 2)}, "shape"),
        ({"gate": torch.rand(4, 6).half()}, "float32"),
        ({"gate": torch.rand(4, 6, device="meta")}, "device"),
        ({"w": torch.ones(4, 6, dtype=torch.int32)}, "w must be one of"),
        ({"w": torch.ones(4)}, "2 dimensions"),
        ({"groups": 3}, "groups"),
        ({"kind": "bernoulli"}, "seed"),
        ({"kind": "bernoulli", "seed": torch.rand(1)}, "int64"),
        ({"kind": "hard_concrete", "seed": torch.rand(1)}, "int64"),
        ({"impl": "cuda"}, "implementation"),
    ],
)
def test_gate_weight_refuses(change, match):
    arguments = {"w": torch.rand(4, 6), "gate": torch.rand(4, 6)} | change
    with pytest.raises(ValueError, match=match):
        gate_weight(arguments.pop("w"), arguments.pop("gate"), **arguments)


@pytest.mark.parametrize(("kind", "seed"), KINDS)
def test_gate_weight_is_a_sound_custom_op(kind, seed, device, impl):
    _, w, gate = make((9, 10), (4, 4), 1, torch.float32, device)
    seed = None if seed is None else torch.tensor([seed], device=device)
    ops = torch.ops.sgtriton_kernels
    opcheck(ops.gate_weight.default, (w, gate, seed, 4, 4, 1, kind, None, torch.bfloat16, impl))
    dout = torch.randn(9, 10, device=device)
    args = (dout, w.detach(), gate.detach(), seed, 4, 4, 1, kind, None, impl, True)
    opcheck(ops.gate_weight_bwd.default, args)


def test_gate_weight_compiles_without_graph_breaks(device, impl):
    _, w, gate = make((9, 10), (4, 4), 1, torch.float32, device)

    def step(w, gate):
        return gate_weight(w, gate, (4, 4), impl=impl).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for out, ref in zip(
        torch.autograd.grad(compiled(w, gate), (w, gate)),
        torch.autograd.grad(step(w, gate), (w, gate)),
        strict=True,
    ):
        assert_exact("gradient", out, ref)


@pytest.mark.parametrize(("kind", "seed"), KINDS[1:])
def test_gate_weight_compiles_once_for_many_shapes(kind, seed, device, impl):
    seed = None if seed is None else torch.tensor([seed], device=device)

    def step(w, gate):
        return gate_weight(w, gate, (8, 8), kind=kind, seed=seed, impl=impl)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    # sides that are equal in the first call would be taken for one
    for shape in ((9, 22), (12, 41), (24, 15), (33, 9), (17, 17)):
        _, w, gate = make(shape, (8, 8), 1, torch.float32, device)
        out, ref = compiled(w, gate), step(w, gate)
        assert_exact("out", out, ref)
        for grad, expected in zip(
            torch.autograd.grad(out.square().sum(), (w, gate)),
            torch.autograd.grad(ref.square().sum(), (w, gate)),
            strict=True,
        ):
            assert_exact("gradient", grad, expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize(("kind", "seed"), KINDS[1:3])
def test_checkpointing_draws_the_same_gates_again(kind, seed, device, impl):
    _, w, gate = make((9, 10), (4, 4), 1, torch.float32, device)

    def step(w, gate):
        seed = torch.randint(0, 2**62, (1,), device=device)
        return gate_weight(w, gate, (4, 4), kind=kind, seed=seed, impl=impl).square()

    torch.manual_seed(3)
    plain = torch.autograd.grad(step(w, gate).sum(), (w, gate))
    torch.manual_seed(3)
    again = checkpoint(step, w, gate, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(again.sum(), (w, gate)), plain, strict=True):
        assert_exact("gradient", a, b)


def test_element_wise_work_counts_no_flops(device):
    _, w, gate = make((9, 10), (4, 4), 1, torch.float32, device)
    with FlopCounterMode(display=False) as counter:
        gate_weight(w, gate, (4, 4)).sum().backward()
    assert counter.get_total_flops() == 0


POINTERS = {
    "w_ptr": "*fp32", "gate_ptr": "*fp32", "seed_ptr": "*i64", "dout_ptr": "*bf16",
    "out_ptr": "*bf16", "dw_ptr": "*fp32", "dgate_ptr": "*fp32",
}  # fmt: skip
SIZES = dict.fromkeys(("GATES", "K", "ROWS", "GATE_ROWS", "GATE_COLS", "BN", "BK", "T"), "i32")


@pytest.mark.compiles
@pytest.mark.parametrize("card", CARDS, ids=lambda card: str(card[1]))
@pytest.mark.parametrize(("kind", "seed"), KINDS)
def test_gate_weight_kernels_compile_for(card, kind, seed):
    seed = None if seed is None else torch.tensor([seed])
    device = torch.device("cuda")
    cases = [
        ((4096, 4096), (1, 1)),
        ((4096, 4096), (32, 32)),
        ((4096, 4096), (None, 1)),
        ((4096, 4096), (128, 128)),
        ((64, 64, 3, 3), (16, 16)),
    ]
    for shape, block in cases if kind == "threshold" else cases[:2]:  # draws touch no layout
        layout = gate_layout(shape, block)
        tile = tile_for_gate_weight(layout, device)
        _, flags, _, _ = gate_module._launch(layout, kind, seed, tile, device)
        warps = flags.pop("num_warps")
        for kernel, tensors in (
            (gate_module._gate_weight_fwd_kernel, 2),  # w, out
            (gate_module._gate_weight_bwd_kernel, 3),  # dout, w, dw
        ):
            compiled = compile_for(
                card, kernel, POINTERS | SIZES, flags | {"SOFT_BF16": False}, warps
            )
            assert compiled.spills == 0
            if card[0] == "cuda" and len(shape) == 2:
                accesses = re.findall(r"(?:ld|st)\.global\.\S+", compiled.assembly)
                narrow = [a for a in accesses if "v4.b32" not in a]
                assert len(accesses) - len(narrow) >= tensors
                # narrow is the seed, and the gate and its sum where several weights share one
                assert len(narrow) <= 1 + 2 * (block != (1, 1)), narrow


def test_draws_of_the_torch_implementation_never_reach_1():
    gate = torch.ones(1 << 16)
    assert binarise(gate, "bernoulli", torch.tensor([1])).all()


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_launches_take_the_tensors_device_not_the_current_one(kind, monkeypatch):
    from types import SimpleNamespace

    from sgtriton_kernels import _triton

    entered = []
    monkeypatch.setattr(getattr(torch, kind), "device", lambda device: entered.append(device))
    _triton.device_of(SimpleNamespace(device=torch.device(kind, 1)))
    assert entered == [torch.device(kind, 1)]


def test_every_launch_lies_inside_the_guard():
    import ast
    from pathlib import Path

    for path in Path(gate_module.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        guarded = {
            id(call)
            for block in ast.walk(tree)
            if isinstance(block, ast.With) and "device_of(" in ast.unparse(block.items[0])
            for call in ast.walk(block)
        }
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Subscript):
                name = ast.unparse(call.func.value)
                if name.endswith("_kernel"):
                    assert id(call) in guarded, f"{path.name}:{call.lineno}"


def test_seed_that_is_a_number_is_refused_with_a_clear_error():
    with pytest.raises(ValueError, match="seed must be one int64 on cpu, got int 1"):
        gate_weight(torch.ones(2, 2), torch.ones(2, 2), kind="bernoulli", seed=1)
