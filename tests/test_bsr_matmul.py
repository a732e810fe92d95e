"""``bsr_linear``: values, refusals, compilation, and what the compiler makes of the kernel."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, assert_exact, assert_within_twice, integers, layouts, poisoned
from sgtriton_kernels import bsr_matmul, bsr_torch
from sgtriton_kernels._impl import use_impl
from sgtriton_kernels._triton import INTERPRETED, why_not_triton
from sgtriton_kernels.bsr import BlockSparse
from sgtriton_kernels.bsr_checks import why_no_kernel
from sgtriton_kernels.bsr_conv import bsr_conv2d
from sgtriton_kernels.bsr_matmul import bsr_linear, bsr_linear_ref
from sgtriton_kernels.bsr_product import pair_rows
from sgtriton_kernels.tiles import BSR_FORMS, BsrTile
from test_bsr import patterns
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

# small: quick to compile natively
TILE = BsrTile(BLOCK_N=16, BLOCK_M=16, BLOCK_K=16, num_stages=2, num_warps=1)
BLOCK = (16, 16)
# M, N, K: ragged everywhere, one tile, many tiles, one row, no row
SHAPES = [(5, 40, 70), (16, 16, 16), (37, 64, 96), (1, 48, 48), (0, 32, 32)]
ACTIVATIONS = {
    None: lambda y: y, "relu": F.relu, "gelu": F.gelu, "silu": F.silu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _nan_outputs():
    """Memory that nobody wrote holds NaN: a missed store shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def sparse(n, k, block=BLOCK, share=0.5, dtype=torch.float32, device="cpu", make=torch.randn):
    """A weight with about ``share`` of its blocks."""
    open = torch.rand(-(-n // block[0]), -(-k // block[1])) < share
    return BlockSparse.from_dense(make(n, k).to(device, dtype), block, open)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_whole_numbers_are_exact(shape, dtype, impl, device):
    m, n, k = shape
    x = poisoned(integers(m, k, dtype=dtype, device=device))
    bias = integers(n, dtype=dtype, device=device)
    for name, open in patterns(-(-n // 16), -(-k // 16)).items():
        w = BlockSparse.from_dense(integers(n, k, dtype=dtype, device=device), BLOCK, open)
        out = bsr_linear(x, w, bias, impl=impl, tile=TILE)
        assert out.dtype == dtype
        assert out.is_contiguous()
        assert_exact(name, out, x.double() @ w.to_dense().double().T + bias.double())
        assert_exact(f"{name} ref", bsr_linear_ref(x, w, bias), out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 40, 70), (37, 64, 96)], ids=str)
def test_error_is_within_twice_that_of_pytorch(shape, dtype, impl, device):
    m, n, k = shape
    w = sparse(n, k, dtype=dtype, device=device)
    x = torch.randn(m, k, device=device).to(dtype)
    bias = torch.randn(n, device=device).to(dtype)
    dense = w.to_dense()
    ref64 = F.linear(x.double(), dense.double(), bias.double())
    out = bsr_linear(x, w, bias, impl=impl, tile=TILE)
    assert_within_twice("out", out, ref64, F.linear(x, dense, bias))
    assert_within_twice("ref", bsr_linear_ref(x, w, bias), ref64, F.linear(x, dense, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_round_once(activation, dtype, impl, device):
    if impl == "triton" and not INTERPRETED and activation and dtype != torch.float32:
        pytest.skip("the fp32 variants and the interpreter cover it")
    w = sparse(32, 64, dtype=dtype, device=device)
    x = (3 * torch.randn(7, 64, device=device)).to(dtype)
    bias = torch.randn(32, device=device).to(dtype)
    dense, act = w.to_dense(), ACTIVATIONS[activation]
    ref64 = act(F.linear(x.double(), dense.double(), bias.double()))
    out = bsr_linear(x, w, bias, activation, impl=impl, tile=TILE)
    assert_within_twice("out", out, ref64, act(F.linear(x, dense, bias)))


def test_bf16_is_rounded_to_nearest(impl, device):
    eye = BlockSparse.from_dense(torch.eye(16, device=device).bfloat16(), BLOCK)
    x = torch.full((16, 16), 1.0, device=device).bfloat16()
    # 1 + the bias needs one bit more than bf16 has: ties go to even, the rest to the nearest
    steps = torch.arange(-8, 8, device=device) * 0.125 * 2**-7
    bias = steps.bfloat16()
    out = bsr_linear(x, eye, bias, impl=impl, tile=TILE)
    assert_exact("out", out[0], (1 + bias.float()).bfloat16())
    assert bool((out == out[0]).all())


def test_nan_and_infinity_reach_the_output(impl, device):
    for activation in ("relu", None):
        w = BlockSparse.from_dense(torch.eye(16, device=device), BLOCK)
        bias = torch.zeros(16, device=device)
        bias[0], bias[1], bias[2] = float("nan"), float("inf"), -float("inf")
        out = bsr_linear(torch.ones(2, 16, device=device), w, bias, activation, impl=impl,
                         tile=TILE)  # fmt: skip
        assert out[:, 0].isnan().all()
        assert (out[:, 1] == float("inf")).all()
        assert (out[:, 2] == (0 if activation else -float("inf"))).all()
        assert out[:, 3:].isfinite().all()


def test_bias_may_be_missing(impl, device):
    w = sparse(64, 96, make=integers, device=device)
    x = integers(5, 96, device=device)
    assert_exact("out", bsr_linear(x, w, impl=impl, tile=TILE), x @ w.to_dense().T)


def test_memory_layouts_do_not_matter(impl, device):
    w = sparse(40, 70, make=integers, device=device)
    bias = integers(40, device=device)
    x = integers(6, 70, device=device)
    expected = bsr_linear_ref(x, w, bias)
    for name, view in layouts(x).items():
        kept = view.clone()
        assert_exact(name, bsr_linear(view, w, bias, impl=impl, tile=TILE), expected)
        assert_exact(f"{name} untouched", view, kept)
    row = x[:1].expand(6, 70)
    assert_exact(
        "expanded", bsr_linear(row, w, bias, impl=impl, tile=TILE), expected[:1].expand(6, 40)
    )
    column = x[:, :1].expand(6, 70)
    assert_exact("expanded inside", bsr_linear(column, w, bias, impl=impl, tile=TILE),
                 bsr_linear_ref(column, w, bias))  # fmt: skip
    strided_bias = bias.repeat_interleave(2)[::2]
    assert_exact("bias", bsr_linear(x, w, strided_bias, impl=impl, tile=TILE), expected)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3), (0,), (2, 0, 3)], ids=str)
def test_any_leading_sizes(lead, impl, device):
    w = sparse(40, 70, make=integers, device=device)
    bias = integers(40, device=device)
    x = integers(*lead, 70, device=device)
    out = bsr_linear(x, w, bias, impl=impl, tile=TILE)
    assert out.shape == (*lead, 40)
    assert out.is_contiguous()
    assert_exact("out", out, bsr_linear_ref(x, w, bias))
    if len(lead) == 3:
        swapped = x.transpose(0, 2)
        assert_exact("swapped", bsr_linear(swapped, w, bias, impl=impl, tile=TILE),
                     out.transpose(0, 2))  # fmt: skip


@pytest.mark.parametrize("block", [(16, 16), (32, 32), (64, 64), (16, 64), (64, 16), (256, 16)])
def test_every_block_shape_agrees_with_dense(block, impl, device):
    w = sparse(256, 128, block, make=integers, device=device)
    x = integers(9, 128, device=device)
    bias = integers(256, device=device)
    out = bsr_linear(x, w, bias, impl=impl, tile=TILE)
    assert_exact("out", out, bsr_linear_ref(x, w, bias))


@pytest.mark.parametrize(
    "block",
    [(1, 1), (4, 4), (3, 5), (1, 130), (100, 1), (100, 130), (16, 16), (24, 20), (50, 13), (8, 65)],
)
@pytest.mark.parametrize("m", [1, 33, 130])
def test_torch_implementation_serves_any_block(block, m, device):
    x, bias = integers(m, 130, device=device), integers(100, device=device)
    rows, cols = -(-100 // block[0]), -(-130 // block[1])
    for name, open in patterns(rows, cols).items():
        w = BlockSparse.from_dense(integers(100, 130, device=device), block, open)
        out = bsr_linear(x, w, bias, "relu", impl="torch")
        assert_exact(name, out, bsr_linear_ref(x, w, bias, "relu"))


def test_double_precision_runs_in_pytorch(device):
    w = sparse(40, 70, dtype=torch.float64, device=device)
    x = torch.randn(5, 70, dtype=torch.float64, device=device)
    torch.testing.assert_close(bsr_linear(x, w, impl="torch"), bsr_linear_ref(x, w))


@pytest.mark.parametrize("block", [(16, 16), (100, 16), (16, 130)])
def test_padding_beyond_a_ragged_edge_is_never_used(block, impl, device):
    w = sparse(100, 130, block, share=1.0, make=integers, device=device)
    (n, k), (bn, bk) = w.shape, w.block
    for row in range(w.block_rows):
        for i in range(int(w.crow[row]), int(w.crow[row + 1])):
            w.values[i, max(0, n - row * bn) :] = float("nan")
            w.values[i, :, max(0, k - int(w.col[i]) * bk) :] = float("nan")
    x = integers(5, 130, device=device)
    if impl == "triton" and (why_no_kernel(x.dtype, block)):
        pytest.skip("a block for the torch implementation")
    assert_exact("out", bsr_linear(x, w, impl=impl, tile=TILE), bsr_linear_ref(x, w))


def test_layer_with_no_block_returns_its_bias(impl, device):
    w = sparse(64, 64, (32, 32), share=0.0, device=device)
    bias = torch.randn(64, device=device)
    out = bsr_linear(torch.randn(5, 64, device=device), w, bias, impl=impl, tile=TILE)
    assert_exact("out", out, bias.expand(5, 64))
    assert_exact("no bias", bsr_linear(torch.ones(5, 64, device=device), w, impl="torch"),
                 torch.zeros(5, 64))  # fmt: skip


@pytest.mark.parametrize(("n", "k", "block"), [(64, 48, (16, 32)), (64, 8, (16, 8)),
                                               (24, 40, (16, 32))])  # fmt: skip
def test_inner_sizes_that_no_tile_divides_are_repeatable(n, k, block, device):
    w = sparse(n, k, block, dtype=torch.float16, make=integers, device=device)
    x = poisoned(integers(8, k, dtype=torch.float16, device=device))
    for impl in ("torch", "triton"):
        if impl == "triton" and (why_not_triton(device) or k < 16):
            continue
        outs = [bsr_linear(x, w, impl=impl, tile=BsrTile(16, 16, 32, 2, 1)) for _ in range(10)]
        assert_exact(impl, outs[0], bsr_linear_ref(x, w))
        assert all(torch.equal(out, outs[0]) for out in outs)


def test_bf16_whole_numbers_do_not_explode(impl, device):
    w = BlockSparse.from_dense(torch.randint(-2, 3, (16, 16), device=device).bfloat16(), BLOCK)
    x = torch.randint(-2, 3, (16, 16), device=device).bfloat16()
    out = bsr_linear(x, w, torch.zeros(16, device=device).bfloat16(), impl=impl, tile=TILE)
    assert_exact("out", out, x.float() @ w.to_dense().float().T)


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_pipeline_depth_does_not_change_values(stages, device):
    if reason := why_not_triton(device):
        pytest.skip(reason)
    w = BlockSparse.from_dense(integers(64, 64, device=device), BLOCK)
    x = integers(17, 64, device=device)
    out = bsr_linear(x, w, impl="triton", tile=BsrTile(16, 16, 16, stages, 1))
    assert_exact("out", out, bsr_linear_ref(x, w))


def test_default_tile_gives_right_values(impl, device):
    w = sparse(64, 64, (32, 32), make=integers, device=device)
    x = integers(20, 64, device=device)
    assert_exact("out", bsr_linear(x, w, impl=impl), bsr_linear_ref(x, w))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(3, 15)}, r"x must be \[\.\.\., 16\] .* got \[3, 15\]"),
        ({"x": torch.tensor(1.0)}, r"x must be \[\.\.\., 16\] .* got \[\]"),
        ({"x": torch.ones(3, 16).half()}, r"one dtype, got x torch\.float16, w torch\.float32"),
        ({"x": torch.ones(3, 16, device="meta")}, "one device, got x meta, w cpu"),
        ({"bias": torch.ones(15)}, r"bias must be \[32\] .* got \[15\]"),
        ({"bias": torch.ones(32).half()}, r"got x torch\.float32, bias torch\.float16"),
        ({"bias": torch.ones(32, device="meta")}, "got x cpu, bias meta"),
        ({"activation": "tanh"}, r"activation must be None or one of \('relu', .* got 'tanh'"),
        ({"activation": "none", "impl": "cuda"}, r"impl=: implementation must be one of .* 'cuda'"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_wrong_arguments_are_refused(change, message):
    args = {"x": torch.ones(3, 16), "w": sparse(32, 16), "bias": None, "activation": None}
    with pytest.raises(ValueError, match=message):
        bsr_linear(**args | change)


def test_blocks_that_the_kernel_cannot_serve_are_refused_or_said(device, monkeypatch):
    x, w = torch.ones(3, 24, device=device), sparse(24, 24, (8, 24), device=device)
    with pytest.raises(ValueError, match=r"bsr_linear: .* impl= cannot run"):
        bsr_linear(x, w, impl="triton")
    with use_impl("triton"), pytest.warns(UserWarning, match="using the torch implementation"):
        bsr_linear(x, w)
    monkeypatch.setenv("SGTRITON_STRICT", "1")
    with use_impl("triton"), pytest.raises(ValueError, match="use_impl cannot run"):
        bsr_linear(x, w)


def test_integer_inputs_are_refused():
    w = sparse(16, 16)
    w = BlockSparse._from_validated(
        w.values.int(), w.crow, w.col, w.shape, w.ccol, w.row, w.perm, w.row_order
    )
    with pytest.raises(ValueError, match=r"x must be one of .* got torch\.int32"):
        bsr_linear(torch.ones(2, 16).int(), w)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_as_f_linear(dtype, impl, device):
    w = sparse(40, 70, device=device)
    x, bias = torch.randn(5, 70, device=device), torch.randn(40, device=device)
    with torch.autocast(device.type, dtype):
        outs = [bsr_linear(t, w, bias, impl=impl, tile=TILE) for t in (x, x.to(dtype))]
        assert F.linear(x, w.to_dense(), bias).dtype == dtype
    low = w.to(dtype=dtype)
    expected = bsr_linear(x.to(dtype), low, bias.to(dtype), impl=impl, tile=TILE)
    for out in outs:
        assert out.dtype == dtype
        assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_of_whole_numbers_are_exact(shape, dtype, impl, device):
    m, n, k = shape
    for name, open in patterns(-(-n // 16), -(-k // 16)).items():
        w = BlockSparse.from_dense(integers(n, k, dtype=dtype, device=device), BLOCK, open)
        dense = w.to_dense().double().requires_grad_()
        x = poisoned(integers(m, k, dtype=dtype, device=device)).requires_grad_()
        bias = integers(n, dtype=dtype, device=device).requires_grad_()
        residual = integers(m, n, dtype=dtype, device=device).requires_grad_()
        dy = poisoned(integers(m, n, dtype=dtype, device=device))
        w.values.requires_grad_()
        out = bsr_linear(x, w, bias, residual=residual, impl=impl, tile=TILE)
        grads = torch.autograd.grad(out, (x, w.values, bias, residual), dy)
        expected_dx, expected_dw = torch.autograd.grad(
            F.linear(x.double(), dense), (x, dense), dy.double()
        )
        assert_exact(f"{name} dx", grads[0], expected_dx)
        pattern = torch.ones(-(-n // 16), -(-k // 16), dtype=torch.bool) if open is None else open
        expected = BlockSparse.from_dense(expected_dw, BLOCK, pattern.to(device))
        assert_exact(f"{name} dvalues", grads[1], expected.values)
        assert_exact(f"{name} dbias", grads[2], dy.double().sum(0))
        assert_exact(f"{name} dresidual", grads[3], dy)
        for grad, t in zip(grads, (x, w.values, bias, residual), strict=True):
            assert grad.dtype == t.dtype


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_and_residual_have_the_gradients_of_pytorch(activation, impl, device):
    w = sparse(40, 70, dtype=torch.float32, device=device)
    x = torch.randn(2, 3, 70, device=device, requires_grad=True)
    residual = torch.randn(2, 3, 40, device=device, requires_grad=True)
    bias = torch.randn(40, device=device, requires_grad=True)
    dense = w.to_dense()
    dy = torch.randn(2, 3, 40, device=device)
    inputs = (x, bias, residual)

    def grads(dtype):
        xd, bd, rd = (t.detach().to(dtype).requires_grad_() for t in inputs)
        y = ACTIVATIONS[activation](F.linear(xd, dense.to(dtype), bd) + rd)
        return y, *torch.autograd.grad(y, (xd, bd, rd), dy.to(dtype))

    out = bsr_linear(x, w, bias, activation, residual=residual, impl=impl, tile=TILE)
    ours = (out, *torch.autograd.grad(out, inputs, dy))
    for name, a, ref64, plain in zip(
        ("out", "dx", "dbias", "dresidual"), ours, grads(torch.float64), grads(torch.float32),
        strict=True,
    ):  # fmt: skip
        assert_within_twice(name, a, ref64, plain)
    with torch.no_grad():
        fused = bsr_linear(x, w, bias, activation, residual=residual, impl=impl, tile=TILE)
    assert_within_twice("fused", fused, grads(torch.float64)[0], grads(torch.float32)[0])


def test_only_wanted_gradients_are_computed(impl, device):
    w = sparse(32, 48, device=device)
    x = torch.randn(5, 48, device=device)
    for needs in ([True, False], [False, True]):
        inputs = [t.detach().requires_grad_(need) for t, need in zip((x, w.values), needs)]  # noqa: B905
        held = BlockSparse(inputs[1], w.crow, w.col, w.shape)
        bsr_linear(inputs[0], held, impl=impl, tile=TILE).sum().backward()
        assert [t.grad is not None for t in inputs] == needs


def test_values_beyond_a_ragged_edge_get_no_gradient_and_give_none(impl, device):
    w = sparse(40, 70, share=1.0, make=integers, device=device)
    dense = w.to_dense()
    for row in range(w.block_rows):
        for i in range(int(w.crow[row]), int(w.crow[row + 1])):
            w.values[i, max(0, 40 - row * 16) :] = float("nan")
            w.values[i, :, max(0, 70 - int(w.col[i]) * 16) :] = float("nan")
    x = integers(5, 70, device=device).requires_grad_()
    w.values.requires_grad_()
    dy = integers(5, 40, device=device)
    out = bsr_linear(x, w, impl=impl, tile=TILE)
    dx, dvalues = torch.autograd.grad(out, (x, w.values), dy)
    assert_exact("dx", dx, dy @ dense)
    assert_exact("dvalues", dvalues, BlockSparse.from_dense(dy.T @ x, BLOCK).values)


def test_second_derivatives_are_those_of_pytorch(impl, device):
    w = sparse(32, 48, device=device)
    x = torch.randn(3, 48, device=device, requires_grad=True)
    w.values.requires_grad_()

    def penalty(linear):
        out = linear().square().sum()
        grads = torch.autograd.grad(out, (x, w.values), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), (x, w.values))

    ours = penalty(lambda: bsr_linear(x, w, impl=impl, tile=TILE))
    plain = penalty(lambda: F.linear(x, w.to_dense()))
    for name, a, b in zip(("x", "values"), ours, plain, strict=True):
        torch.testing.assert_close(a, b, msg=name, rtol=1e-4, atol=1e-3)


def test_training_the_values_lowers_the_loss_and_keeps_the_pattern(impl, device):
    w = sparse(32, 48, device=device)
    values = torch.nn.Parameter(w.values.clone())
    x, target = torch.randn(16, 48, device=device), torch.randn(16, 32, device=device)
    optimizer = torch.optim.Adam([values], lr=0.05)
    losses = []
    for _ in range(15):
        held = BlockSparse(values, w.crow, w.col, w.shape)
        loss = (bsr_linear(x, held, activation="gelu", impl=impl, tile=TILE) - target).square()
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        losses.append(loss.mean().item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("form", BSR_FORMS)
def test_every_form_can_be_pinned(form, device):
    if reason := why_not_triton(device):
        pytest.skip(reason)
    w = sparse(64, 96, make=integers, device=device)
    x, bias = integers(5, 96, device=device), integers(64, device=device)
    tile = BsrTile(16, 4 if form == "vector" else 16, 16, 2, 1, form=form)
    for _ in range(2):
        out = bsr_linear(x, w, bias, "relu", impl="triton", tile=tile)
        assert_exact(form, out, bsr_linear_ref(x, w, bias, "relu"))


def test_an_update_in_place_reaches_the_next_call(impl, device):
    """Nothing that is kept between calls depends on the values."""
    w, x = sparse(32, 48, device=device, make=integers), integers(5, 48, device=device)
    bsr_linear(x, w, impl=impl, tile=TILE)
    w.values.data.neg_()
    assert_exact("out", bsr_linear(x, w, impl=impl, tile=TILE), bsr_linear_ref(x, w))


def test_results_may_be_written_to_in_place(impl, device):
    w = sparse(32, 48, device=device)
    x = torch.randn(2, 3, 48, device=device, requires_grad=True)
    out = bsr_linear(x, w, impl=impl, tile=TILE)
    out += 1
    out.sum().backward()
    assert x.grad is not None


def op_arguments(x, w, bias, impl):
    return (x, w.values, w.crow, w.col, w.ccol, w.row, w.perm, w.row_order, bias, None,
            w.shape[0], "relu", impl, TILE.name if impl == "triton" else "loop")  # fmt: skip


def test_op_is_sound(impl, device):
    w = sparse(32, 48, device=device)
    for x in (torch.randn(5, 48), torch.randn(48, 5).T, torch.randn(2, 3, 48), torch.randn(48)):
        for bias in (torch.randn(32, device=device), None):
            opcheck(bsr_matmul._bsr_linear_op, op_arguments(x.to(device), w, bias, impl))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_without_graph_breaks(backend, impl, device):
    w, bias = sparse(32, 48, device=device), torch.randn(32, device=device)
    fn = torch.compile(bsr_linear, fullgraph=True, backend=backend)
    for m in (3, 5, 7):
        x = torch.randn(m, 48, device=device)
        expected = bsr_linear(x, w, bias, "relu", impl=impl, tile=TILE)
        assert torch.equal(fn(x, w, bias, "relu", impl=impl, tile=TILE), expected)


def test_candidate_by_name_compiles_without_a_warning(device, recwarn):
    """Dynamo warned of a cache that it traced through."""
    w, x = sparse(32, 48, device=device), torch.randn(3, 48, device=device)
    fn = torch.compile(bsr_linear, fullgraph=True, backend="eager")
    for name in ("rows", "unpack"):
        expected = bsr_linear(x, w, impl="torch", tile=name)
        assert torch.equal(fn(x, w, impl="torch", tile=name), expected)
    assert not [str(warning.message) for warning in recwarn if "cache" in str(warning.message)]


def test_exported_program_keeps_the_name_of_a_candidate(monkeypatch):
    """It kept a number in the list of candidates, which another version reads as another one."""
    w, x = sparse(32, 48, device="cpu"), torch.randn(3, 48)

    class Layer(torch.nn.Module):
        def __init__(self, tile, impl):
            super().__init__()
            self.tile, self.impl = tile, impl

        def forward(self, x):
            return bsr_linear(x, w, impl=self.impl, tile=self.tile)

    def kept(tile, impl):
        program = torch.export.export(Layer(tile, impl), (x,))
        (node,) = [node for node in program.graph.nodes if node.op == "call_function"]
        return node.args[-1], program.module()

    name, program = kept("rows", "torch")
    assert name == "rows"
    taken, real = [], bsr_torch.bsr_linear_torch
    monkeypatch.setattr(
        bsr_matmul, "bsr_linear_torch", lambda *a: taken.append(a[-1].way) or real(*a)
    )
    program(x)
    assert taken == ["rows"]
    if not INTERPRETED:
        return
    tile = BsrTile(16, 32, 16, 2, 1, "weight_left")  # no candidate
    name, program = kept(tile, "triton")
    assert BsrTile.of_name(name) == tile
    dense = w.to_dense()
    assert_within_twice("out", program(x), x.double() @ dense.double().T, x @ dense.T)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_name_that_this_version_does_not_know_is_said(impl):
    w, x = sparse(32, 48, device="cpu"), torch.randn(3, 48)
    index = (w.crow, w.col, w.ccol, w.row, w.perm, w.row_order)
    with pytest.raises(ValueError, match=r"tile must be .*'of_tomorrow'"):
        bsr_matmul._bsr_linear_op(x, w.values, *index, None, None, 32, "none", impl, "of_tomorrow")


def test_compiles_from_the_buffers_of_a_layer(device):
    w, bias = sparse(32, 48, device=device), torch.randn(32, device=device)

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("values", "crow", "col", "ccol", "row", "perm", "row_order"):
                self.register_buffer(name, getattr(w, name))

        def forward(self, x):
            held = self._buffers
            held = BlockSparse._from_validated(shape=(32, 48), **held)  # pyright: ignore
            return bsr_linear(x, held, bias, "silu")

    layer, x = Layer(), torch.randn(3, 48, device=device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(compiled(x), layer(x))


def test_fake_result_has_the_strides_of_the_real_one(impl, device):
    w = sparse(32, 48, device=device)
    for x in (torch.randn(5, 48), torch.randn(48, 3, 2).permute(1, 2, 0), torch.randn(0, 48)):
        out = bsr_linear(x.to(device), w, impl=impl, tile=TILE)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = bsr_linear(mode.from_tensor(x.to(device)), w, impl=impl, tile=TILE)
        assert (fake.shape, fake.stride(), fake.dtype) == (out.shape, out.stride(), out.dtype)


def test_flops_count_stored_weights(device):
    w = sparse(64, 96, device=device)
    with FlopCounterMode(display=False) as counter:
        bsr_linear(torch.ones(2, 5, 96, device=device), w, impl="torch")
    assert counter.get_total_flops() == 2 * 10 * w.nnz * 256


@pytest.mark.parametrize("w", [torch.ones(4, 8), torch.eye(8).to_sparse(), None], ids=type)
def test_weight_that_is_no_container_is_refused_with_a_clear_error(w):
    """It was an AttributeError of a builtin method."""
    with pytest.raises(ValueError, match="w must be a BlockSparse, which"):
        bsr_linear(torch.ones(2, 8), w)
    with pytest.raises(ValueError, match="w must be a BlockSparse"):
        bsr_conv2d(torch.ones(1, 8, 4, 4), w, out_channels=4, kernel_size=1)


@pytest.mark.parametrize("x", [[1.0, 2.0], None])
def test_input_that_is_no_tensor_is_refused_with_a_clear_error(x):
    w = BlockSparse.from_dense(torch.eye(2), (2, 2))
    with pytest.raises(ValueError, match="x must be a tensor, got"):
        bsr_linear(x, w)


@pytest.mark.parametrize("side", [16, 64])
@pytest.mark.parametrize("which", ["x", "values"])
def test_tangents_are_refused_and_not_lost(which, side):
    """One row took the library's matrix of detached values: the result had no tangent."""
    w, x = BlockSparse.from_dense(torch.randn(2 * side, side), (side, side)), torch.randn(1, side)
    given = x if which == "x" else w.values
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(given, torch.ones_like(given))
        if which == "x":
            x = dual
        else:
            w = BlockSparse(dual, w.crow, w.col, w.shape)
        with pytest.raises(NotImplementedError, match="jvp"):
            bsr_linear(x, w)


def test_input_is_not_kept_where_only_its_own_gradient_needs_the_layer():
    """With a frozen weight the gradient of x needs the weight only, as in F.linear."""
    w = BlockSparse.from_dense(torch.randn(32, 32), (16, 16))
    x = torch.randn(4, 32, requires_grad=True)
    inner = x * 1
    kept = weakref.ref(inner)
    out = bsr_linear(inner, w, impl="torch")
    del inner
    assert kept() is None
    (dx,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    torch.testing.assert_close(dx, w.to_dense().sum(0).expand(4, 32))
    bias = torch.zeros(32, requires_grad=True)
    dout = torch.ones(4, 32, requires_grad=True)
    (dx,) = torch.autograd.grad(bsr_linear(x, w, bias), x, dout, create_graph=True)
    (ddout,) = torch.autograd.grad(dx.sum(), dout)
    torch.testing.assert_close(ddout, w.to_dense().sum(1).expand(4, 32))


def test_op_reads_an_index_once_and_again_when_it_changed():
    """A compiled layer made anew, at each call, what library calls make of the index."""
    dense = torch.randn(32, 32)
    dense[:16, 16:] = dense[16:, :16] = 0
    w, x = BlockSparse.from_dense(dense, (16, 16)), torch.randn(3, 32)
    index = (w.crow, w.col, w.ccol, w.row, w.perm, w.row_order)

    def out():
        return bsr_matmul._bsr_linear_op(x, w.values, *index, None, None, 32, "none", "torch", None)

    with torch.no_grad():
        torch.testing.assert_close(out(), x @ dense.T)
        kept = bsr_matmul._indices[w.crow]
        torch.testing.assert_close(out(), x @ dense.T)
        assert bsr_matmul._indices[w.crow] is kept
        w.col[:2] = torch.tensor([1, 0], dtype=torch.int32)
        torch.testing.assert_close(out(), x.roll(16, 1) @ dense.T)


def test_index_that_an_op_read_is_not_kept_longer_than_its_tensors():
    w = BlockSparse.from_dense(torch.eye(16), (16, 16))
    bsr_matmul._container(w.values, w.index_tensors, (16, 16), "torch")
    before, kept = len(bsr_matmul._indices), weakref.ref(bsr_matmul._indices[w.crow][2])
    del w
    assert len(bsr_matmul._indices) < before
    assert kept() is None


def test_pairs_of_an_index_are_listed_once_for_an_op(device, impl, monkeypatch):
    """Compiled calls have no container: they listed the pairs anew, and waited for the device."""
    if impl == "torch":
        pytest.skip("for the kernels")
    w = BlockSparse.from_dense(torch.eye(64, device=device), (16, 16))
    listed, real = [], pair_rows
    monkeypatch.setattr(bsr_matmul, "pair_rows", lambda *a: listed.append(1) or real(*a))
    tile = BsrTile(32, 16, 16, 1, 1, "pairs")
    x = integers(3, 64, device=device)
    for _ in range(3):
        w = BlockSparse._from_index(w.values, w.index_tensors, w.shape)
        assert_exact("y", bsr_linear(x, w, impl=impl, tile=tile), x)
    assert len(listed) == 1
    before = len(bsr_matmul._paired)
    del w
    assert len(bsr_matmul._paired) < before
