import itertools
import threading
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, assert_exact, assert_within_twice, integers, layouts
from sgtriton_kernels import (
    block_products,
    gate_layout,
    gate_weight,
    gated_candidates,
    gated_linear,
    gated_linear_ref,
    gated_matmul,
    gated_torch,
    skip_torch,
)
from sgtriton_kernels._ops import is_watched
from sgtriton_kernels._triton import INTERPRETED, why_not_triton
from sgtriton_kernels.blocks import expand_gates, sum_blocks
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import sgtriton
from sgtriton import GatedLinear, SparsityController
from sgtriton.control import gate_penalty

# M, N, K: one tile, ragged, many tiles, exact tiles, 1, 0
SHAPES = [(7, 13, 30), (33, 50, 70), (64, 96, 64), (300, 40, 50), (1, 1, 1)]
EMPTY = [(0, 8, 16), (5, 0, 7), (5, 8, 0)]
BLOCKS = [(1, 1), (4, 4), (16, 32), (32, 32), (1, None), (None, 1), (None, None)]
KINDS = ["threshold", "bernoulli", "hard_concrete"]
NAMES = ("dx", "dw", "dgate", "dbias")


def methods(impl, layout, kind="threshold"):
    """Those that can compute it, and do so in seconds."""
    out = ["multiply"]
    if kind == "hard_concrete":
        return out
    if impl == "triton":
        out.append("fused")
        many = max(layout.gate_shape, default=0) > 3 and min(layout.block) > 1
        if INTERPRETED and many:  # it takes a program for each gate
            out.remove("multiply")
    if not layout.per_weight and (impl == "torch" or gated_candidates.why_not_skip(layout) is None):
        out.append("skip")
    return out


def make(shape, block, dtype, device, values=integers, w_dtype=None):
    """Leaves ``x, w, gate, bias``, and ``dy``."""
    (m, n, k), w_dtype = shape, w_dtype or dtype
    layout = gate_layout((n, k), block)
    x, dy = values(m, k, device=device).to(dtype), values(m, n, device=device).to(dtype)
    w, bias = values(n, k, device=device).to(w_dtype), values(n, device=device).to(dtype)
    gate = torch.rand(layout.gate_shape, device=device)
    return layout, [t.requires_grad_() for t in (x, w, gate, bias)], dy


def reference(x, w, b, bias, dy, layout):
    """``y, dx, dw, dgate, dbias`` in fp64, straight-through; ``b`` of each gate."""
    x, w, dy = x.detach().double(), w.detach().double(), dy.double()
    b = expand_gates(b.double(), layout)
    gated, d = torch.where(b == 0, 0.0, w), dy.T @ x
    y = x @ gated.T + bias.detach().double()
    return y, dy @ gated, torch.where(b == 0, 0.0, d), sum_blocks(d * w, layout), dy.sum(0)


def eager(x, w, gate, bias, layout):
    """What a user would write."""
    through = (gate > 0.5).to(gate.dtype) + gate - gate.detach()
    gated = w * expand_gates(through, layout).to(w.dtype)
    return F.linear(
        x, gated if torch.is_autocast_enabled(x.device.type) else gated.to(x.dtype), bias
    )


def nothing_runs(monkeypatch):
    """Whatever would compute fails: what is refused is refused before."""
    for name in ("_gated_linear_op", "_gated_linear_fwd"):
        monkeypatch.setattr(gated_matmul, name, None)


def one_seed(value, device):
    return torch.tensor([value], device=device)


def assert_all_exact(name, outs, refs):
    for part, out, ref in zip(("y", *NAMES), outs, refs, strict=True):
        assert_exact(f"{name}, {part}", out, ref)


def value_and_grads(y, inputs, dy):
    return y.detach(), *torch.autograd.grad(y, inputs, dy)


def exact_cases():
    """Each shape with each block, the dtypes in turn; one shape with every dtype."""
    cases = [(*c, DTYPES[i % 3]) for i, c in enumerate(itertools.product(SHAPES, BLOCKS))]
    more = itertools.product([SHAPES[1]], [(1, 1), (4, 4), (16, 32)], DTYPES)
    empty = itertools.product(EMPTY, [(1, 1), (4, 4), (16, 32), (None, None)], DTYPES[:1])
    return list(dict.fromkeys([*cases, *more, *empty]))


def check_exact(shape, block, dtype, device, impl, chosen):
    layout, inputs, dy = make(shape, block, dtype, device)
    x, w, gate, bias = inputs
    before = [t.detach().clone() for t in (*inputs, dy)]
    refs = reference(x, w, gate > 0.5, bias, dy, layout)
    for method in (*methods(impl, layout), *chosen):
        y = gated_linear(*inputs, block, method=method, impl=impl)
        outs = value_and_grads(y, inputs, dy)
        assert_all_exact(method, outs, refs)
        assert [t.dtype for t in outs] == [dtype, dtype, dtype, torch.float32, dtype]
        assert all(t.is_contiguous() for t in outs)
    for t, kept in zip((*inputs, dy), before, strict=True):
        assert_exact("input", t, kept)


@pytest.mark.parametrize(("shape", "block", "dtype"), exact_cases())
def test_gated_linear_is_exact_on_integers(shape, block, dtype, device):
    check_exact(shape, block, dtype, device, "torch", [None])


# fewer: kernels are interpreted or compiled here, and have a test file of their own
TRITON_CASES = [
    ((7, 13, 30), (1, 1), torch.float32),
    ((33, 50, 70), (1, 1), torch.bfloat16),
    ((33, 50, 70), (4, 4), torch.float16),
    ((33, 50, 70), (16, 32), torch.float32),
    ((64, 96, 64), (32, 32), torch.bfloat16),
    ((33, 50, 70), (None, 1), torch.float32),
    ((7, 13, 30), (1, None), torch.float32),
    ((300, 40, 50), (None, None), torch.float32),
    ((1, 1, 1), (4, 4), torch.float32),
    *((shape, block, torch.float32) for shape in EMPTY for block in ((1, 1), (16, 32))),
]


@pytest.mark.parametrize(("shape", "block", "dtype"), TRITON_CASES)
def test_kernels_of_gated_linear_are_exact_on_integers(shape, block, dtype, device):
    if reason := why_not_triton(device):
        pytest.skip(reason)
    check_exact(shape, block, dtype, device, "triton", [None] if max(shape) < 35 else [])


def test_reference_is_the_masked_layer():
    layout, inputs, dy = make((7, 13, 30), (4, 4), torch.float64, "cpu", torch.randn)
    x, w, gate, bias = inputs
    expected = reference(x, w, gate > 0.5, bias, dy, layout)[0]
    assert_exact("y", gated_linear_ref(x, w, (gate > 0.5).float(), bias, (4, 4)), expected)


@pytest.mark.parametrize("block", [(1, 1), (4, 4), (16, 32)])
def test_fp64_is_for_the_torch_implementation(block, device):
    layout, inputs, dy = make((7, 13, 30), block, torch.float64, device)
    x, w, gate, bias = inputs
    refs = reference(x, w, gate > 0.5, bias, dy, layout)
    for method in methods("torch", layout):
        y = gated_linear(*inputs, block, method=method, impl="torch")
        assert_all_exact(method, value_and_grads(y, inputs, dy), refs)


DRAWS = [((6, 40), (1, 1)), ((9, 12), (4, 4)), ((40, 70), (16, 32)), ((6, 40), (1, None))]


@pytest.mark.parametrize(("shape", "block"), DRAWS)
def test_bernoulli_backward_sees_the_mask_of_forward(shape, block, device, impl):
    """x or dy the identity shows the mask."""
    n, k = shape
    layout = gate_layout(shape, block)
    gate = torch.rand(layout.gate_shape, device=device).requires_grad_()
    w = integers(n, k, device=device).requires_grad_()
    drawn = {"kind": "bernoulli", "seed": one_seed(5, device), "impl": impl}
    mask = gate_weight(torch.ones(n, k, device=device), gate.detach(), block, **drawn)
    assert 0 < mask.mean() < 1
    eye_k, eye_n = torch.eye(k, device=device), torch.eye(n, device=device)
    for method in (*methods(impl, layout), None):
        op = partial(gated_linear, block=block, method=method, **drawn)
        assert_exact(f"forward, {method}", op(eye_k, torch.ones_like(w), gate).T, mask)
        x = torch.zeros(n, k, device=device, requires_grad=True)
        dx, dw = torch.autograd.grad(op(x, w, gate), (x, w), eye_n)
        assert_exact(f"dx, {method}", dx, w * mask)
        assert not dw.any()
        y = op(torch.ones(1, k, device=device), w, gate)
        dw, dgate = torch.autograd.grad(y.sum(), (w, gate))
        assert_exact(f"dw, {method}", dw, mask)
        assert_exact(f"dgate, {method}", dgate, sum_blocks(w.detach(), layout))


@pytest.mark.parametrize("block", [(1, 1), (16, 32)])
def test_draw_depends_on_the_seed_and_not_on_the_method(block, device, impl):
    layout, inputs, _ = make((9, 32, 64), block, torch.float32, device)
    nn.init.constant_(inputs[2], 0.5)

    def draw(seed, method):
        return gated_linear(
            *inputs, block, kind="bernoulli", seed=one_seed(seed, device), method=method, impl=impl
        )

    first = draw(1 << 40, "multiply")
    for method in methods(impl, layout):
        assert_exact(method, draw(1 << 40, method), first)
    # of four blocks a draw may come twice
    assert any(not torch.equal(draw(seed, "multiply"), first) for seed in range(4))


def test_bernoulli_gates_at_and_beyond_their_bounds_are_certain(device, impl):
    gate = torch.tensor([[-1.0, 0.0, 1.0, 2.0]], device=device)
    y = gated_linear(
        torch.eye(4, device=device), torch.ones(1, 4, device=device), gate,
        kind="bernoulli", seed=one_seed(3, device), impl=impl,
    )  # fmt: skip
    assert y.flatten().tolist() == [0.0, 0.0, 1.0, 1.0]


def test_gate_at_a_half_is_closed(device, impl):
    gate = torch.tensor([[0.5, 0.500001, -1.0, 1.5]], device=device)
    x, w = torch.eye(4, device=device), torch.ones(1, 4, device=device)
    for method in methods(impl, gate_layout((1, 4), (1, 1))):
        y = gated_linear(x, w, gate, method=method, impl=impl)
        assert y.flatten().tolist() == [0.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("shape", "block", "dtype"),
    [
        ((17, 20, 40), (1, 1), torch.float32),
        ((17, 20, 40), (4, 4), torch.bfloat16),
        ((17, 50, 70), (16, 32), torch.float32),
        ((17, 64, 64), (32, 32), torch.float16),
    ],
)
def test_closed_gates_get_nothing_without_reopening(shape, block, dtype, device, impl):
    layout, inputs, dy = make(shape, block, dtype, device)
    x, w, gate, bias = inputs
    y, dx, dw, dgate, dbias = reference(x, w, gate > 0.5, bias, dy, layout)
    refs = y, dx, dw, torch.where(gate > 0.5, dgate, 0.0), dbias
    for method in (*methods(impl, layout), None):
        out = gated_linear(*inputs, block, reopen=False, method=method, impl=impl)
        assert_all_exact(method, value_and_grads(out, inputs, dy), refs)


@pytest.mark.parametrize("block", [(1, 1), (4, 4), (16, 32)])
def test_gradients_are_the_same_whichever_are_needed(block, device, impl):
    layout, inputs, dy = make((17, 20, 40), block, torch.float32, device)
    x, w, gate, bias = inputs
    refs = reference(x, w, gate > 0.5, bias, dy, layout)[1:]
    for method in methods(impl, layout):
        # frozen gates, a first layer, a frozen weight, and two alone
        for needed in ([0, 1, 3], [1, 2], [0, 2], [1], [3]):
            given = [t if i in needed else t.detach() for i, t in enumerate(inputs)]
            y = gated_linear(*given, block, method=method, impl=impl)
            grads = torch.autograd.grad(y, [given[i] for i in needed], dy)
            for i, grad in zip(needed, grads, strict=True):
                assert_exact(f"{NAMES[i]} of {needed}, {method}", grad, refs[i])


def test_layer_without_bias(device, impl):
    layout, (x, w, gate, bias), dy = make((7, 13, 30), (4, 4), torch.float32, device)
    refs = reference(x, w, gate > 0.5, torch.zeros_like(bias), dy, layout)[:4]
    for method in methods(impl, layout):
        y = gated_linear(x, w, gate, None, (4, 4), method=method, impl=impl)
        for name, out, ref in zip(
            ("y", *NAMES), value_and_grads(y, (x, w, gate), dy), refs, strict=False
        ):
            assert_exact(f"{name}, {method}", out, ref)


LOW = [torch.bfloat16, torch.float16]
DTYPE_PAIRS = [*((d, d) for d in DTYPES), *((d, torch.float32) for d in LOW), (DTYPES[0], LOW[0])]
ERRORS = [
    *(((33, 40, 70), (1, 1), *pair) for pair in DTYPE_PAIRS),
    *(((33, 24, 48), (4, 4), *pair) for pair in DTYPE_PAIRS[::3]),
    *(((33, 48, 64), (16, 32), *pair) for pair in DTYPE_PAIRS[::3]),
]


@pytest.mark.parametrize(("shape", "block", "x_dtype", "w_dtype"), ERRORS)
def test_gated_linear_is_within_twice_pytorchs_error(shape, block, x_dtype, w_dtype, device, impl):
    layout, inputs, dy = make(shape, block, x_dtype, device, torch.randn, w_dtype)
    x, w, gate, bias = inputs
    # a weight is read as rounded to the dtype of x
    rounded = w.detach().to(x_dtype) if x_dtype.itemsize < w_dtype.itemsize else w
    y64, dx64, *_ = reference(x, rounded, gate > 0.5, bias, dy, layout)
    refs = y64, dx64, *reference(x, w, gate > 0.5, bias, dy, layout)[2:]
    plain = value_and_grads(eager(*inputs, layout), inputs, dy)
    for method in methods(impl, layout):
        y = gated_linear(*inputs, block, method=method, impl=impl)
        outs = value_and_grads(y, inputs, dy)
        for name, out, ref, torch_out in zip(("y", *NAMES), outs, refs, plain, strict=True):
            assert_within_twice(f"{name}, {method}", out, ref, torch_out)


@pytest.mark.parametrize("block", [(16, 32), (16, 16), (64, 8), (8, 64)])
def test_autocast_rounds_no_sums_of_open_blocks(block, device):
    """Products in fp32 were cast to 16 bits, or failed to be added to sums in fp32."""
    if device.type != "cpu":
        pytest.skip("for the torch implementation")
    _, (x, w, gate, bias), _ = make((40, 96, 96), block, torch.float32, device, torch.randn)
    low = x.detach().bfloat16().requires_grad_(), w, gate, bias.detach().bfloat16()
    dy = torch.randn(40, 96, dtype=torch.bfloat16)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = gated_linear(*low, block, method="skip", impl="torch")
            found.append((y.detach(), *torch.autograd.grad(y, (low[0], w, gate), dy)))
    for name, plain, cast in zip(("y", "dx", "dW", "dg"), *found, strict=True):
        assert torch.equal(plain, cast), name


@pytest.mark.parametrize("block", [(1, 1), (4, 4), (16, 32)])
def test_autocast_casts_x_and_keeps_the_weights_gradient_wide(block, device, impl):
    layout, inputs, _ = make((17, 24, 48), block, torch.float32, device, torch.randn)
    x, w, gate, bias = inputs
    dy = torch.randn(17, 24, device=device, dtype=torch.bfloat16)
    low = [t.detach().bfloat16() for t in (x, w, bias)]
    y64, dx64, *_ = reference(low[0], low[1], gate > 0.5, low[2], dy, layout)
    refs = y64, dx64, *reference(low[0], w, gate > 0.5, low[2], dy, layout)[2:]
    with torch.autocast(device.type, torch.bfloat16):
        plain = eager(*inputs, layout)
    plain = value_and_grads(plain, inputs, dy)
    for method in methods(impl, layout):
        with torch.autocast(device.type, torch.bfloat16):
            y = gated_linear(*inputs, block, method=method, impl=impl)
        assert y.dtype == torch.bfloat16
        outs = value_and_grads(y, inputs, dy)
        assert all(grad.dtype == torch.float32 for grad in outs[1:])
        for name, out, ref, torch_out in zip(("y", *NAMES), outs, refs, plain, strict=True):
            assert_within_twice(f"{name}, {method}", out, ref, torch_out)


@pytest.mark.parametrize("seed", [5, None], ids=["drawn", "eval"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [(1, 1), (4, 4)])
def test_hard_concrete_layer_multiplies_by_the_gates(block, dtype, seed, device, impl):
    layout, inputs, dy = make((17, 10, 12), block, dtype, device, torch.randn)
    x, w, gate, bias = inputs
    with torch.no_grad():
        gate.copy_(3 * torch.randn_like(gate))
    seed = None if seed is None else one_seed(seed, device)
    options = {"kind": "hard_concrete", "seed": seed, "impl": impl}

    ones = torch.ones(w.shape, device=device)  # shows z, and its slope
    spread = gate_weight(ones, gate, block, **options)
    cover = sum_blocks(ones, layout)
    slope = torch.autograd.grad(spread.sum(), gate)[0].double() / cover
    z = spread.detach().double()
    x64, w64, dy64 = x.detach().double(), w.detach().double(), dy.double()
    d = dy64.T @ x64
    refs = (
        x64 @ (w64 * z).T + bias.detach().double(), dy64 @ (w64 * z), d * z,
        slope * sum_blocks(d * w64, layout), dy64.sum(0),
    )  # fmt: skip
    plain = F.linear(x, w * expand_gates(sum_blocks(z, layout) / cover, layout).to(dtype), bias)
    plain = *value_and_grads(plain, (x, w), dy), dy.sum(0)
    through = expand_gates(gate * (slope / cover).float(), layout) * 0 + gate_weight(
        w.detach(), gate, block, dtype=dtype, **options
    )
    plain_dgate = torch.autograd.grad(F.linear(x.detach(), through.to(dtype)), gate, dy)[0]
    y = gated_linear(*inputs, block, **options)
    outs = value_and_grads(y, inputs, dy)
    plain = (*plain[:3], plain_dgate, plain[3])
    for name, out, ref, torch_out in zip(("y", *NAMES), outs, refs, plain, strict=True):
        assert_within_twice(name, out, ref, torch_out)


@pytest.mark.parametrize("block", [(1, 1), (4, 4), (16, 32)])
def test_gated_linear_takes_any_layout(block, device, impl):
    """Around each view lies NaN."""
    layout, inputs, dy = make((9, 20, 24), block, torch.float32, device)
    x, w, gate, bias = (t.detach() for t in inputs)
    refs = reference(x, w, gate > 0.5, bias, dy, layout)
    views = [(i, v) for i, t in enumerate((x, w, gate, bias, dy)) for v in layouts(t).items()]
    for method in methods(impl, layout):
        for i, (name, view) in views:
            given = [x, w, gate, bias, dy]
            given[i] = view
            *given, gradient = given
            given = [t.detach().requires_grad_() for t in given]
            y = gated_linear(*given, block, method=method, impl=impl)
            assert_all_exact(f"{method}, {i} {name}", value_and_grads(y, given, gradient), refs)


@pytest.mark.parametrize("block", [(1, 1), (16, 32)])
def test_gradient_of_a_sum_is_taken(block, device, impl):
    """It comes expanded: all its strides are 0."""
    layout, inputs, dy = make((9, 20, 24), block, torch.float32, device)
    x, w, gate, bias = inputs
    refs = reference(x, w, gate > 0.5, bias, torch.ones_like(dy), layout)[1:]
    for method in methods(impl, layout):
        y = gated_linear(*inputs, block, method=method, impl=impl)
        for name, grad, ref in zip(NAMES, torch.autograd.grad(y.sum(), inputs), refs, strict=True):
            assert_exact(f"{name}, {method}", grad, ref)


@pytest.mark.parametrize("x_shape", [(30,), (1, 30), (2, 3, 30), (2, 0, 30), (2, 1, 2, 30)])
def test_x_of_any_number_of_dimensions(x_shape, device, impl):
    _, (_, w, gate, bias), _ = make((1, 13, 30), (4, 4), torch.float32, device)
    layout = gate_layout((13, 30), (4, 4))
    x = integers(*x_shape, device=device).requires_grad_()
    dy = integers(*x_shape[:-1], 13, device=device)
    y, dx, dw, dgate, dbias = reference(
        x.reshape(-1, 30), w, gate > 0.5, bias, dy.reshape(-1, 13), layout
    )
    refs = y.view(dy.shape), dx.view(x_shape), dw, dgate, dbias
    for method in methods(impl, layout):
        out = gated_linear(x, w, gate, bias, (4, 4), method=method, impl=impl)
        assert_all_exact(method, value_and_grads(out, (x, w, gate, bias), dy), refs)


@pytest.mark.parametrize("block", [(1, 1), (4, 4), (16, 32), (None, 1)])
def test_nan_in_closed_weights_does_not_come_out(block, device, impl):
    layout, inputs, dy = make((9, 32, 64), block, torch.float32, device)
    x, w, gate, bias = inputs
    refs = reference(x, w, gate > 0.5, bias, dy, layout)
    is_open = gate > 0.5
    assert 0 < is_open.float().mean() < 1
    with torch.no_grad():
        w[~expand_gates(is_open, layout)] = float("nan")
    for method in methods(impl, layout):
        y = gated_linear(*inputs, block, method=method, impl=impl)
        y, dx, dw, dgate, dbias = value_and_grads(y, inputs, dy)
        assert_all_exact(
            method,
            (y, dx, dw, torch.where(is_open, dgate, 0.0), dbias),
            (*refs[:3], torch.where(is_open, refs[3], 0.0), refs[4]),
        )


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("n", "k"), [(0, 7), (4, 0)])
def test_empty_layers_take_any_number_of_dimensions(n, k, bias, device, impl):
    w, bias = torch.ones(n, k, device=device), torch.ones(n, device=device) if bias else None
    gate = torch.ones(gate_layout((n, k), (4, 4)).gate_shape, device=device)
    x = torch.ones(2, 3, k, device=device, requires_grad=True)
    y = gated_linear(x, w, gate, bias, (4, 4), impl=impl)
    assert_exact("y", y, F.linear(x, w, bias))
    assert_exact("dx", torch.autograd.grad(y.sum(), x)[0], torch.zeros_like(x))


@pytest.mark.parametrize("closed", [True, False], ids=["all closed", "all open"])
@pytest.mark.parametrize("block", [(1, 1), (16, 32)])
def test_all_gates_alike(block, closed, device, impl):
    layout, inputs, dy = make((9, 40, 70), block, torch.float32, device)
    x, w, gate, bias = inputs
    nn.init.constant_(gate, 0.2 if closed else 0.9)
    refs = reference(x, w, gate > 0.5, bias, dy, layout)
    for method in methods(impl, layout):
        y = gated_linear(*inputs, block, method=method, impl=impl)
        assert_all_exact(method, value_and_grads(y, inputs, dy), refs)


@pytest.mark.parametrize("block", [(1, 1), (16, 32)])
def test_second_derivatives_are_right_or_refused_and_first_ones_stay_right(block, device, impl):
    layout, inputs, dy = make((9, 20, 40), block, torch.float32, device)
    x, w, gate, bias = inputs
    refs = reference(x, w, gate > 0.5, bias, dy, layout)
    for method in methods(impl, layout):
        y = gated_linear(*inputs, block, method=method, impl=impl)
        outside = dy.clone().requires_grad_()
        grads = torch.autograd.grad(y, inputs, outside, create_graph=True)
        assert_all_exact(method, (y, *grads), refs)
        (second,) = torch.autograd.grad(grads[0].sum(), outside, retain_graph=True)
        ones = torch.ones_like(x)
        assert_exact(f"{method} twice", second, gated_linear(ones, w, gate, None, block, impl=impl))
        with pytest.raises(RuntimeError, match="gate_weight_bwd"):
            grads[1].sum().backward()
        again = gated_linear(*inputs, block, method=method, impl=impl)
        assert_all_exact(f"{method}, after it", value_and_grads(again, inputs, dy), refs)


@pytest.mark.parametrize("method", ["multiply", "skip"])
def test_gated_linear_passes_gradcheck(method):
    layout, (x, w, gate, bias), _ = make((3, 9, 8), (4, 4), torch.float64, "cpu", torch.randn)
    assert layout.gate_shape == (3, 2)
    gate = gate.detach()
    assert torch.autograd.gradcheck(
        lambda x, w, bias: gated_linear(x, w, gate, bias, (4, 4), method=method, impl="torch"),
        (x, w, bias),
    )


@pytest.mark.parametrize(("shape", "block"), [((7, 40, 70), (16, 16)), ((8, 6, 9), (2, 3))])
@pytest.mark.parametrize("reopen", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_skipping_in_bands_and_parts_gives_the_same(monkeypatch, shape, block, reopen, share):
    """More rows than a band has, more blocks than are gathered at a time; the sums are exact."""
    monkeypatch.setattr(block_products, "_BAND", 3)
    monkeypatch.setattr(block_products, "ELEMENTS", 2 * 3 * sum(block))  # two blocks
    monkeypatch.setattr(block_products, "_GATHERED", 2 * 3 * max(block))
    monkeypatch.setattr(skip_torch, "_CHUNK", shape[2] * block[0])  # a block row of dW
    layout, inputs, dy = make(shape, block, torch.float32, "cpu")
    x, w, gate, bias = inputs
    with torch.no_grad():
        gate.copy_(torch.where(torch.rand_like(gate) < share, 0.9, 0.2))
    y = gated_linear(*inputs, block, reopen=reopen, method="skip", impl="torch")
    *refs, dgate, dbias = reference(x, w, gate > 0.5, bias, dy, layout)
    dgate = dgate if reopen else torch.where(gate > 0.5, dgate, 0.0)
    assert_all_exact("skip", value_and_grads(y, inputs, dy), (*refs, dgate, dbias))


def test_few_open_blocks_are_skipped_to_by_the_torch_implementation():
    layout, inputs, dy = make((128, 512, 512), (32, 32), torch.float32, "cpu")
    x, w, gate, bias = inputs
    for open_blocks, expected in ((3, "skip"), (160, "multiply")):
        with torch.no_grad():
            gate.fill_(0.2).view(-1)[torch.randperm(256)[:open_blocks]] = 0.9
        assert gated_torch.choose("auto", gate, None, layout, 128) == expected
        refs = reference(x, w, gate > 0.5, bias, dy, layout)
        y = gated_linear(*inputs, (32, 32), impl="torch")
        assert_all_exact(expected, value_and_grads(y, inputs, dy), refs)


OP_CASES = [
    ("threshold", None, (4, 4), True), ("threshold", None, (16, 16), False),
    ("bernoulli", 3, (1, 1), True), ("bernoulli", 3, (16, 16), True),
    ("hard_concrete", 3, (9, 10), True), ("hard_concrete", None, (9, 10), True),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "seed", "block", "reopen"), OP_CASES)
def test_gated_linear_is_a_sound_custom_op(kind, seed, block, reopen, device, impl):
    layout, inputs, dy = make((5, 18, 20), block, torch.float32, device, torch.randn)
    seed = None if seed is None else one_seed(seed, device)
    ops = torch.ops.sgtriton_kernels
    for method in methods(impl, layout, kind):
        static = (*layout.block, kind, reopen, method, impl)
        opcheck(ops.gated_linear.default, (*inputs, seed, *static))
        x, w, gate, _ = (t.detach() for t in inputs)
        _, bits = ops.gated_linear(*inputs, seed, *static)
        needs = [True, True, reopen, False] if method == "skip" else [True] * 4
        opcheck(ops.gated_linear_bwd.default, (dy, x, w, gate, seed, bits, *static, needs))


@pytest.mark.parametrize("kind", KINDS)
def test_gated_linear_compiles_without_graph_breaks(kind, device, impl):
    _, inputs, dy = make((5, 18, 20), (9, 10), torch.float32, device, torch.randn)
    seed = None if kind == "threshold" else one_seed(3, device)

    def step(*inputs):
        return gated_linear(*inputs, (9, 10), kind=kind, seed=seed, impl=impl)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    outs = value_and_grads(compiled(*inputs), inputs, dy)
    assert_all_exact(kind, outs, value_and_grads(step(*inputs), inputs, dy))


@pytest.mark.parametrize("mark", [True, False], ids=["marked", "dynamic"])
def test_batch_sizes_do_not_recompile(mark, device, impl):
    _, (_, *rest), _ = make((1, 18, 20), (9, 10), torch.float32, device)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda x: gated_linear(x, *rest, (9, 10), impl=impl),
        fullgraph=True, backend=counter, dynamic=None if mark else True,
    )  # fmt: skip
    for batch in (3, 5, 16, 33, 64):
        x = integers(batch, 20, device=device)
        if mark:
            torch._dynamo.mark_dynamic(x, 0)
        y = compiled(x)
        assert_exact("y", y, gated_linear(x, *rest, (9, 10), impl=impl))
        torch.autograd.grad(y.sum(), rest)
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", ["bernoulli", "hard_concrete"])
@pytest.mark.parametrize("block", [(1, 1), (9, 10)])
def test_checkpoint_recomputes_the_same_draw(kind, block):
    layer = GatedLinear(20, 18, block=block, gate=kind, init=0.7)
    x = torch.randn(5, 20, requires_grad=True)
    inputs = [x, *layer.parameters()]

    def step(run):
        torch.manual_seed(11)
        y = run(x)
        torch.rand(5)
        return value_and_grads(y, inputs, torch.ones_like(y))

    plain = step(layer)
    again = step(lambda x: checkpoint(layer, x, use_reentrant=False))
    for out, ref in zip(again, plain, strict=True):
        assert_exact("checkpointed", out, ref)
    torch.manual_seed(12)
    assert not torch.equal(layer(x), plain[0])


def bytes_saved(function, known):
    """Bytes kept for backward in memory that is not the inputs'."""
    own, kept = {t.untyped_storage().data_ptr() for t in known}, {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function()
    assert y.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [(1, 1), (8, 16), (32, 32)])
def test_forward_saves_a_bit_a_gate_at_most(block, kind, device, impl):
    dtype = torch.bfloat16 if block == (1, 1) else torch.float32
    layout, inputs, _ = make((5, 16, 40), block, dtype, device, w_dtype=torch.float32)
    _, w, gate, _ = inputs
    seed = None if kind == "threshold" else one_seed(3, device)
    rows, cols = gate.shape
    bits = rows * -(-cols // 32) * 4 if impl == "triton" else -(-gate.numel() // 8)
    for method in (*methods(impl, layout, kind), None):
        op = partial(gated_linear, block=block, kind=kind, seed=seed, method=method, impl=impl)
        saved = bytes_saved(lambda op=op: op(*inputs), inputs)
        assert saved <= bits + (0 if seed is None else 8), method
    plain = bytes_saved(lambda: eager(*inputs, layout), inputs)
    assert plain >= w.numel() * dtype.itemsize


@pytest.mark.parametrize("kind", KINDS)
def test_layer_saves_a_bit_a_gate_at_most(kind):
    """Under autocast too, which keeps a copy of a plain layer's weight."""
    layer = GatedLinear(96, 64, block=(1, 1), gate=kind, init=0.7)
    x = torch.randn(5, 96, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        saved = bytes_saved(lambda: layer(x), [x, *layer.parameters()])
    assert saved <= 64 * 96 // 8 + 8


@pytest.mark.parametrize("block", [(1, 1), (16, 32)])
def test_flops_are_those_of_the_dense_layer(block, device, impl):
    m, n, k = 6, 40, 70
    layout, inputs, dy = make((m, n, k), block, torch.float32, device)
    for method in methods(impl, layout):
        with FlopCounterMode(display=False) as counter:
            y = gated_linear(*inputs, block, method=method, impl=impl)
        assert counter.get_total_flops() == 2 * m * n * k
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(y, inputs, dy)
        assert counter.get_total_flops() == 4 * m * n * k
        first = gated_linear(inputs[0].detach(), *inputs[1:], block, method=method, impl=impl)
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(first, inputs[1:], dy)
        assert counter.get_total_flops() == 2 * m * n * k


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"block": (0, 1)}, "block sides.*0"),
        ({"block": 4}, "pair.*4"),
        ({"kind": "sigmoid"}, "'sigmoid'"),
        ({"w": torch.rand(4)}, r"2 dimensions.*\(4,\)"),
        ({"w": torch.rand(4, 6, 3), "gate": torch.rand(4, 6, 3)}, r"w must be \[N, K\].*4, 6, 3"),
        ({"w": torch.ones(4, 6, dtype=torch.int32)}, "w must be one of.*int32"),
        ({"gate": torch.rand(2, 2)}, r"shape.*\(2, 2\)"),
        ({"gate": torch.rand(4, 6).half()}, "float32.*float16"),
        ({"gate": torch.rand(4, 6, device="meta")}, "device.*meta"),
        ({"x": torch.rand(3, 5)}, r"x must be.*\[3, 5\]"),
        ({"x": torch.tensor(1.0)}, r"x must be.*\[\]"),
        ({"x": torch.ones(3, 6, dtype=torch.int64)}, "x must be one of.*int64"),
        ({"x": torch.rand(3, 6).double()}, "fp64.*float64.*float32"),
        ({"w": torch.rand(4, 6).double()}, "fp64.*float32.*float64"),
        ({"x": torch.rand(3, 6, device="meta")}, "device.*meta.*cpu"),
        ({"bias": torch.rand(6)}, r"bias must be \[4\].*\[6\]"),
        ({"bias": torch.rand(4).half()}, "bias must be.*float16"),
        ({"bias": torch.rand(4, device="meta")}, "bias must be.*meta"),
        ({"kind": "bernoulli"}, "needs a seed"),
        ({"kind": "bernoulli", "seed": torch.rand(1)}, "int64.*float32"),
        ({"kind": "hard_concrete", "seed": torch.zeros(2, dtype=torch.int64)}, r"\(2,\)"),
        ({"kind": "bernoulli", "seed": torch.tensor([1]), "reopen": False}, "reopen.*'bernoulli'"),
        ({"kind": "hard_concrete", "reopen": False}, "reopen.*'hard_concrete'"),
        ({"method": "dense"}, "method must be.*'dense'"),
        ({"method": "skip"}, "'skip' cannot be taken: each weight"),
        ({"method": "fused", "impl": "torch"}, "'fused' cannot be taken: the torch"),
        ({"method": "skip", "kind": "hard_concrete", "block": (2, 2), "gate": torch.rand(2, 3)},
         "'skip' cannot be taken: hard_concrete"),
        ({"impl": "cuda"}, "implementation.*'cuda'"),
    ],
)  # fmt: skip
def test_gated_linear_refuses(change, match, monkeypatch):
    nothing_runs(monkeypatch)
    arguments = {"x": torch.rand(3, 6), "w": torch.rand(4, 6), "gate": torch.rand(4, 6)} | change
    with pytest.raises(ValueError, match=match):
        gated_linear(**arguments)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"x": torch.rand(3, 40).double(), "w": torch.rand(20, 40).double()}, "fp64"),
        (
            {"method": "skip", "block": (4, 4), "gate": torch.rand(5, 10)},
            r"powers of two.*\(4, 4\)",
        ),
        ({"method": "skip"}, r"powers of two.*\(1, 1\)"),
        ({"method": "fused", "kind": "hard_concrete"}, "no bits"),
    ],
)
def test_triton_implementation_refuses(change, match, device, monkeypatch):
    if reason := why_not_triton(device):
        pytest.skip(reason)
    nothing_runs(monkeypatch)
    arguments = {"x": torch.rand(3, 40), "w": torch.rand(20, 40), "gate": torch.rand(20, 40)}
    arguments = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in (arguments | change).items()
    }
    with pytest.raises(ValueError, match=match):
        gated_linear(**arguments, impl="triton")


def packed_contiguously(t):
    return t.detach().clone(memory_format=torch.contiguous_format)


def test_strides_that_change_before_backward_change_no_gradient(device, impl):
    """As offloaded activations do: rows of x were not aligned in forward, and are in backward."""
    torch.manual_seed(0)
    x = integers(32, 72, device=device).to(torch.bfloat16)[:, :64]
    w, gate = integers(48, 64, device=device), torch.rand(48, 64, device=device)
    w.requires_grad_()
    for kind in ("threshold", "bernoulli"):
        found = []
        for hook in (lambda t: t, packed_contiguously):
            x_leaf = x.detach().requires_grad_()
            with torch.autograd.graph.saved_tensors_hooks(hook, lambda t: t):
                seed = one_seed(5, device)
                y = gated_linear(x_leaf, w, gate, kind=kind, seed=seed, impl=impl)
            found.append(torch.autograd.grad(y, (x_leaf, w), torch.ones_like(y)))
        assert found[0][0].abs().sum() > 0
        for name, plain, packed in zip(("dx", "dw"), *found, strict=True):
            assert_exact(f"{kind} {name}", packed, plain)


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 5, 6)])
def test_results_may_be_written_to_in_place(shape, device, impl):
    w = torch.rand(4, 6, device=device, requires_grad=True)
    gate = torch.rand(4, 6, device=device)
    x = torch.rand(shape, device=device, requires_grad=True)
    y = gated_linear(x * 1, w, gate, impl=impl)
    y += 1
    y.relu_()
    (dx,) = torch.autograd.grad(y.sum(), x)
    dx *= 2
    assert dx.shape == x.shape


def test_autocast_leaves_an_fp64_layer_its_bias():
    x, w = torch.rand(3, 6).double(), torch.rand(4, 6).double()
    bias, gate = torch.rand(4).double(), torch.ones(4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = gated_linear(x, w, gate, bias)
    assert_exact("y", y, F.linear(x, w, bias))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", ["multiply", "skip"])
def test_gates_of_blocks_get_sums_of_wide_products(dtype, method):
    """300 * 300 is beyond fp16, 1e-4 * 1e-4 below it."""
    for value in (300.0, 1e-4):
        x, w = torch.ones(1, 16).to(dtype), torch.full((16, 16), value).to(dtype)
        gate = torch.ones(1, 1, requires_grad=True)
        y = gated_linear(x, w, gate, block=(16, 16), method=method, impl="torch")
        y.backward(torch.full_like(y, value))
        expected = 256 * w[0, 0].double() ** 2
        torch.testing.assert_close(gate.grad.double()[0, 0], expected, rtol=1e-6, atol=0)  # pyright: ignore


def test_a_gradient_penalty_through_a_gradient_without_graph_is_right(device, impl):
    """`y.sum()` hands over a gradient that needs none itself: nothing may be dropped for it."""
    _, (x, w, gate, _), _ = make((5, 20, 40), (1, 1), torch.float32, device)
    x, gate = x.detach().requires_grad_(), gate.detach()
    found = []
    for compute in (
        lambda: gated_linear(x, w, gate, impl=impl),
        lambda: F.linear(x, w * (gate > 0.5)),
    ):
        y = compute()
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        found.append(torch.autograd.grad((dx**2).sum() + y.sum(), (x, w)))
    for name, ours, plain in zip(("dx", "dw"), *found, strict=True):
        assert_exact(name, ours, plain)


@pytest.mark.parametrize("kind", ["threshold", "bernoulli", "hard_concrete"])
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_layers_without_data_give_shapes(kind, implementation):
    if implementation == "triton" and (reason := why_not_triton(torch.device("meta"))):
        pytest.skip(reason)
    x, w, gate, bias = (
        torch.empty(shape, device="meta", requires_grad=True)
        for shape in ((2, 5, 32), (48, 32), (48, 32), (48,))
    )
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    y = gated_linear(x, w, gate, bias, kind=kind, seed=seed, impl=implementation)
    grads = torch.autograd.grad(y, (x, w, gate, bias), torch.empty_like(y))
    assert y.shape == (2, 5, 48)
    assert [g.shape for g in grads] == [t.shape for t in (x, w, gate, bias)]


def test_another_default_dtype_changes_nothing():
    _, inputs, dy = make((9, 64, 64), (16, 16), torch.float32, "cpu", torch.randn)
    found = []
    for default in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(default)
        try:
            for kind, reopen in (("threshold", False), ("bernoulli", True)):
                y = gated_linear(
                    *inputs, (16, 16), kind=kind, seed=one_seed(3, "cpu"), reopen=reopen,
                    method="skip", impl="torch",
                )  # fmt: skip
                found.append(value_and_grads(y, inputs, dy))
        finally:
            torch.set_default_dtype(torch.float32)
    for plain, other in zip(found[:2], found[2:], strict=True):
        for name, a, b in zip(["y", "dx", "dw", "dgate", "dbias"], plain, other, strict=True):
            assert a.dtype == b.dtype == torch.float32
            assert_exact(name, b, a)


class OpNames(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_who_looks_at_ops_sees_them_in_forward_and_in_backward(device, impl):
    _, inputs, dy = make((5, 20, 40), (1, 1), torch.float32, device)
    assert not is_watched(*inputs, None)
    with OpNames() as forward:
        assert is_watched(*inputs)
        y = gated_linear(*inputs, impl=impl)
    assert "gated_linear.default" in forward.names
    y.backward(dy)
    refs = [t.grad.clone() for t in inputs]
    y = gated_linear(*inputs, impl=impl)
    for t in inputs:
        t.grad = None
    with OpNames() as backward:
        y.backward(dy)
    assert "gated_linear_bwd.default" in backward.names
    for t, ref in zip(inputs, refs, strict=True):
        assert_exact("gradient", t.grad, ref)


SCRATCH = [((9, 64, 96), (1, 1), "multiply"), ((70, 20, 40), (4, 4), "multiply"),
           ((33, 64, 64), (16, 16), "skip"), ((3, 8, 200), (4, 4), "skip")]  # fmt: skip


def test_memory_that_layers_share_leaks_no_values():
    """Layers of several sizes in turn; each graph is walked twice, after all the others."""
    steps = []
    for shape, block, method in SCRATCH:
        for dtype, transposed in itertools.product(DTYPES[::2], (False, True)):
            layout, inputs, dy = make(shape, block, dtype, "cpu")
            if transposed:
                inputs[1] = inputs[1].detach().T.contiguous().T.requires_grad_()
            x, w, gate, bias = inputs
            refs = reference(x, w, gate > 0.5, bias, dy, layout)
            y = gated_linear(*inputs, block, method=method, impl="torch")
            steps.append((f"{shape} {method} {dtype}", inputs, dy, y, refs))
    first = [torch.autograd.grad(y, inputs, dy, retain_graph=True) for _, inputs, dy, y, _ in steps]
    for (name, inputs, dy, y, refs), grads in zip(reversed(steps), reversed(first), strict=True):
        assert_all_exact(f"{name}, again", value_and_grads(y, inputs, dy), refs)
        assert_all_exact(f"{name}, first", (y, *grads), refs)


def test_threads_do_not_share_memory():
    barrier, failures = threading.Barrier(2), []

    def work(seed, shape, block, method):
        generator = torch.Generator().manual_seed(seed)

        def values(*shape, device):
            return torch.randint(-1, 2, shape, generator=generator).float()

        try:
            for _ in range(20):
                layout, inputs, dy = make(shape, block, torch.float32, "cpu", values)
                x, w, gate, bias = inputs
                refs = reference(x, w, gate > 0.5, bias, dy, layout)
                barrier.wait(60)
                y = gated_linear(*inputs, block, method=method, impl="torch")
                barrier.wait(60)
                assert_all_exact(method, value_and_grads(y, inputs, dy), refs)
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(i, *SCRATCH[i])) for i in (0, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
def test_training_after_inference(context):
    """What inference leaves behind can be written to in training."""

    def first():
        layer = GatedLinear(512, 300, block=(4, 4))
        with context():
            layer(torch.ones(2, 512))
        layer(torch.ones(2, 512)).sum().backward()
        assert layer.gate.grad is not None

    thread_error = []

    def run():  # memory is kept for each thread: a new one has none yet
        try:
            first()
        except Exception as error:
            thread_error.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not thread_error, thread_error[0]


def reopening_model(conv):
    model = (
        nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.Flatten(), nn.Linear(16 * 16, 8))
        if conv
        else nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
    )
    sgtriton.patch(model, block=(4, 4), reopen_every=3)
    for layer in (model[0], model[-1]):
        with torch.no_grad():
            layer.gate.copy_(torch.rand_like(layer.gate))
    return model, torch.randn(5, 8, 4, 4) if conv else torch.randn(5, 16)


@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv"])
def test_closed_gates_move_on_each_third_step_only(conv):
    model, x = reopening_model(conv)
    layers = [model[0], model[-1]]
    optimizer = torch.optim.SGD(
        [{"params": [layer.gate for layer in layers], "lr": 1e-6},
         {"params": [layer.weight for layer in layers], "lr": 1e-3}]
    )  # fmt: skip
    for step in range(7):
        losses = {
            "data": model(x).square().sum(),
            "l1": gate_penalty(model, l1=0.1),
            "bimodal": gate_penalty(model, bimodal=0.1),
        }
        gates: list[torch.Tensor] = [layer.get_parameter("gate") for layer in layers]
        for name, loss in losses.items():
            for gate, grad in zip(
                gates, torch.autograd.grad(loss, gates, retain_graph=True), strict=True
            ):
                moved = grad != 0
                assert moved[gate > 0.5].all(), (step, name)
                if step % 3:
                    assert not moved[gate <= 0.5].any(), (step, name)
                else:
                    assert moved[gate <= 0.5].any(), (step, name)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()


def test_gradients_without_reopening_are_those_with_it_elsewhere():
    model, x = reopening_model(False)
    leaves = [*model.parameters()]

    def grads():
        return torch.autograd.grad(model(x).square().sum(), leaves)

    whole = grads()
    for layer in (model[0], model[2]):
        layer.reopens = False
    for (name, leaf), grad, ref in zip(model.named_parameters(), grads(), whole, strict=True):
        if name.endswith("gate"):
            ref = torch.where(leaf > 0.5, ref, 0.0)
        assert_within_twice(name, grad, ref.double(), ref)


def test_controller_lands_although_closed_gates_move_rarely():
    torch.manual_seed(3)
    x, y = torch.randn(128, 16), torch.randn(128, 4)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    sgtriton.patch(model, block=(2, 2), reopen_every=3)
    optimizer = torch.optim.Adam(sgtriton.param_groups(model, 0.03))
    controller = SparsityController(model, 0.6, steps=100)
    for _ in range(100):
        loss = (model(x) - y).square().mean() + controller.penalty()
        loss.backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    assert controller.frozen
    assert controller.density == pytest.approx(0.4, abs=0.005)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"reopen_every": 3, "gate": "bernoulli"}, "reopen_every.*'bernoulli'"),
        ({"reopen_every": 3, "gate": "hard_concrete"}, "reopen_every.*'hard_concrete'"),
        ({"reopen_every": 0}, "reopen_every.*0"),
        ({"reopen_every": True}, "reopen_every.*True"),
        ({"reopen_every": 1.5}, r"reopen_every.*1\.5"),
    ],
)
def test_patch_refuses_reopening(options, match):
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match=match):
        sgtriton.patch(model, (4, 4), **options)
    assert type(model[0]) is nn.Linear
