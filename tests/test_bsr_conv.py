"""``bsr_conv2d`` and ``bsr_conv1d``: values, gradients, refusals, compilation."""

import contextlib
import copy
import itertools
import mmap
import pickle
import threading
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, assert_exact, assert_within_twice, integers, layouts, poisoned
from sgtriton_kernels import (
    _scratch,
    bsr_conv,
    bsr_conv_passes,
    bsr_conv_product,
    bsr_conv_torch,
    conv_candidates,
)
from sgtriton_kernels._impl import use_impl
from sgtriton_kernels._ops import ops
from sgtriton_kernels._triton import INTERPRETED, tl, triton
from sgtriton_kernels.blocks import (
    coverage,
    gate_layout,
    gates_to_pattern,
    matrix_to_weight,
    weight_to_matrix,
)
from sgtriton_kernels.bsr import BlockSparse
from sgtriton_kernels.bsr_conv import bsr_conv1d, bsr_conv2d, bsr_conv2d_ref
from sgtriton_kernels.bsr_conv_passes import conv_blocks
from sgtriton_kernels.candidate import Candidate
from sgtriton_kernels.conv_blocks import ChannelLists, ConvBlocks
from sgtriton_kernels.conv_choice import conv_cell_of
from sgtriton_kernels.conv_geometry import ConvGeometry
from sgtriton_kernels.lookup import analytic, forget
from sgtriton_kernels.tiles import BsrTile, tile_for_bsr_conv
from test_bsr import patterns
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from sgtriton.cross_compile import CARDS, compile_for

FP32, BF16 = torch.float32, torch.bfloat16
# small: quick to compile natively
TILE = BsrTile(BLOCK_N=16, BLOCK_M=16, BLOCK_K=16, num_stages=1, num_warps=1)
NATIVE = not INTERPRETED


@pytest.fixture(autouse=True)
def _nan_outputs(monkeypatch):
    """Memory that nobody wrote holds NaN: a missed store shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    # layers are small here, and the dense one would be taken for each
    reason(monkeypatch, dense=False)
    yield
    monkeypatch.undo()
    reason(monkeypatch)
    torch.use_deterministic_algorithms(False)


def reason(monkeypatch, dense=None, loop=None):
    """Have it reasoned that the dense layer is the faster one, or from how many outputs a loop."""
    if dense is not None:
        monkeypatch.setattr(conv_candidates, "_is_dense_faster", lambda cell: dense)
    if loop is not None:
        monkeypatch.setattr(conv_candidates, "_LOOP", loop)
    analytic.cache_clear()
    forget()


class Case:
    """A convolution with NaN beyond its ragged edges, and what PyTorch makes of it in fp64."""

    def __init__(
        self, channels=(20, 24), kernel=(3, 3), size=(5, 6), images=2, block=(16, 16),
        dtype=FP32, device="cpu", make=integers, share=0.5, pattern=None, **options,
    ):  # fmt: skip
        c, o = channels
        self.options = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1} | options
        self.layout = gate_layout((o, c // self.options["groups"], *kernel), block,
                                  self.options["groups"])  # fmt: skip
        if pattern is None:
            open = torch.rand(self.layout.gate_shape) < share
            open.view(-1)[-1] = True
            pattern = gates_to_pattern(open, self.layout)
        weight = make(*self.layout.weight_shape).to(device, dtype)
        matrix = weight_to_matrix(weight, self.layout)
        self.w = BlockSparse.from_dense(matrix, self.layout.block, pattern)
        self.dense = matrix_to_weight(self.w.to_dense(), self.layout)
        inside = weight_to_matrix(torch.ones_like(weight), self.layout)
        self.inside = self.blocks_of(inside) != 0
        self.w.values[~self.inside] = float("nan")
        self.x = make(images, c, *size).to(device, dtype)
        self.bias = make(o).to(device, dtype)
        self.sizes = {"out_channels": o, "kernel_size": kernel}

    def blocks_of(self, matrix):
        """A matrix at the stored blocks, in their order."""
        (bn, bk), w = self.w.block, self.w
        blocks = matrix.view(w.block_rows, bn, w.block_cols, bk).transpose(1, 2)
        return blocks[torch.repeat_interleave(w.crow.diff()), w.col[: w.nnz]]

    def out(self, impl, x=None, **options):
        x = self.x if x is None else x
        given = {"impl": impl, "tile": TILE} | self.options | self.sizes | options
        return bsr_conv2d(x, self.w, self.bias, **given)

    def torch_out(self, dtype=torch.float64, x=None):
        x = self.x if x is None else x
        return F.conv2d(x.to(dtype), self.dense.to(dtype), self.bias.to(dtype), **self.options)

    def grads(self, dout, impl, activation=None):
        x = self.x.detach().requires_grad_()
        values = self.w.values.detach().clone().requires_grad_()
        bias = self.bias.detach().requires_grad_()
        w = self.w
        w = BlockSparse._from_validated(
            values, w.crow, w.col, w.shape, w.ccol, w.row, w.perm, w.row_order
        )
        given = self.options | self.sizes | {"impl": impl, "tile": TILE, "activation": activation}
        out = bsr_conv2d(x, w, bias, **given)
        return torch.autograd.grad(out, (x, values, bias), dout)

    def torch_grads(self, dout, dtype=torch.float64, activation=lambda y: y):
        """Of the dense layer: the weight's gradient is that at the stored blocks."""
        tensors = (self.x, self.dense, self.bias)
        x, w, bias = (t.detach().to(dtype).requires_grad_() for t in tensors)
        out = activation(F.conv2d(x, w, bias, **self.options))
        dx, dw, dbias = torch.autograd.grad(out, (x, w, bias), dout.to(dtype))
        return dx, self.blocks_of(weight_to_matrix(dw, self.layout)), dbias


def skip_native(impl, condition=True):
    if impl == "triton" and NATIVE and condition:
        pytest.skip("the interpreter covers it")


GEOMETRIES = [
    {"kernel": (3, 3), "padding": 1},
    {"kernel": (3, 3), "padding": (2, 1), "stride": 2, "dilation": (1, 2)},
    {"kernel": (1, 1)},
    {"kernel": (1, 1), "stride": 2, "padding": 1},
    {"kernel": (2, 3), "padding": "same", "dilation": (1, 2)},
    {"kernel": (2, 4), "padding": "same"},
    {"kernel": (3, 2), "padding": "valid", "stride": (1, 3)},
    {"kernel": (3, 3), "padding": 1, "stride": (3, 2), "groups": 2, "channels": (40, 44)},
    {"kernel": (2, 2), "padding": 3, "size": (1, 2)},
    {"kernel": (1, 3), "padding": (0, 1), "size": (1, 1), "images": 1},
]


def identifier(value):
    return "-".join(f"{k}{v}" for k, v in value.items()).replace(" ", "")


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=identifier)
def test_geometries_are_exact(geometry, memory_format, impl, device):
    skip_native(impl, memory_format == torch.contiguous_format and geometry != GEOMETRIES[1])
    case = Case(device=device, **geometry)
    case.x = case.x.contiguous(memory_format=memory_format)
    out, expected = case.out(impl), case.torch_out()
    assert_exact("out", out, expected)
    assert out.is_contiguous(memory_format=memory_format)
    dout = integers(*out.shape, device=device).contiguous(memory_format=memory_format)
    grads, torch_grads = case.grads(dout, impl), case.torch_grads(dout)
    for name, grad, expected in zip(("dx", "dvalues", "dbias"), grads, torch_grads, strict=True):
        assert_exact(name, grad, expected)
    assert (grads[1][~case.inside] == 0).all()


def test_any_geometry_is_exact_in_library_calls(device, monkeypatch):
    grid = itertools.product(
        [(3, 3), (1, 2)], [(1, 1), (2, 3)], [(0, 0), (1, 2)], [(1, 1), (2, 1)], [1, 2],
        [(4, 3), (2, 8)], [0, 1 << 20],
    )  # fmt: skip
    for kernel, stride, padding, dilation, groups, block, loop in grid:
        reason(monkeypatch, loop=loop)
        case = Case(
            (6, 10), kernel, (7, 5), 3, block, stride=stride, padding=padding, dilation=dilation,
            groups=groups, device=device,
        )  # fmt: skip
        assert_exact(f"{case.options} {loop}", case.out("torch"), case.torch_out())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_patterns_are_exact(dtype, impl, device):
    skip_native(impl, dtype == torch.float16)
    for name, pattern in patterns(2, 9).items():
        case = Case((40, 24), (1, 3), padding=(0, 1), pattern=pattern, dtype=dtype, device=device,
                    size=(2, 5))  # fmt: skip
        out = case.out(impl)
        assert out.dtype == dtype
        assert_exact(name, out, case.torch_out())
        assert_exact(f"{name} ref", bsr_conv2d_ref(case.x, case.w, case.bias, **case.options,
                                                   **case.sizes), out)  # fmt: skip
        dout = integers(*out.shape, dtype=dtype, device=device)
        for grad, expected in zip(case.grads(dout, impl), case.torch_grads(dout), strict=True):
            assert grad.dtype == dtype
            assert_exact(name, grad, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_within_twice_that_of_pytorch(dtype, impl, device):
    case = Case((40, 24), padding=1, dtype=dtype, device=device, make=torch.randn)
    out = case.out(impl)
    assert_within_twice("out", out, case.torch_out(), case.torch_out(dtype))
    dout = torch.randn(out.shape, device=device).to(dtype)
    ours, exact, theirs = (
        case.grads(dout, impl), case.torch_grads(dout), case.torch_grads(dout, dtype)
    )  # fmt: skip
    for name, a, b, c in zip(("dx", "dvalues", "dbias"), ours, exact, theirs, strict=True):
        assert_within_twice(name, a, b, c)


ACTIVATIONS = {
    None: lambda y: y, "relu": F.relu, "gelu": F.gelu, "silu": F.silu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_round_once(activation, dtype, impl, device):
    skip_native(impl, activation != "gelu" or dtype != FP32)
    case = Case(size=(3, 3), dtype=dtype, device=device, make=torch.randn)
    act = ACTIVATIONS[activation]
    out = case.out(impl, activation=activation)
    assert_within_twice("out", out, act(case.torch_out()), act(case.torch_out(dtype)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_pass_the_activation(activation, impl, device):
    skip_native(impl)
    case = Case(size=(3, 3), device=device, make=torch.randn)
    dout = torch.randn(2, 24, 1, 1, device=device)
    act = ACTIVATIONS[activation]
    ours = case.grads(dout, impl, activation)
    exact = case.torch_grads(dout, activation=act)
    theirs = case.torch_grads(dout, FP32, act)
    for name, a, b, c in zip(("dx", "dvalues", "dbias"), ours, exact, theirs, strict=True):
        assert_within_twice(name, a, b, c)


WANTED = [which for which in itertools.product((False, True), repeat=3) if any(which)]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("watched", [False, True], ids=["", "watched"])
@pytest.mark.parametrize("dense", [False, True], ids=["", "dense"])
def test_gradients_that_nobody_needs_were_computed(
    dense, watched, memory_format, impl, device, monkeypatch
):
    skip_native(impl)
    if impl == "triton" and dense:
        pytest.skip("for the torch implementation")
    reason(monkeypatch, dense=dense)
    done = []
    real = bsr_conv._backward
    monkeypatch.setattr(bsr_conv, "_backward", lambda *a: done.append(real(*a)) or done[-1])
    launched = []
    for name in ("bsr_conv_dx", "bsr_conv_dvalues"):
        launch = getattr(bsr_conv_passes, name)
        monkeypatch.setattr(
            bsr_conv_passes,
            name,
            lambda *a, launch=launch, name=name: launched.append(name) or launch(*a),
        )
    case = Case(size=(3, 3), device=device, padding=(0, 1))
    case.x = case.x.contiguous(memory_format=memory_format)
    expected = case.torch_grads(torch.ones(2, 24, 1, 3, device=device))
    for which in WANTED:
        done.clear()
        launched.clear()
        tensors = [case.x, case.w.values, case.bias]
        for t, needed in zip(tensors, which, strict=True):
            t.requires_grad_(needed)
        with FlopCounterMode(display=False) if watched else contextlib.nullcontext():
            case.out(impl).sum().backward()
        (found,) = done
        for t, needed, grad, exact in zip(tensors, which, found, expected, strict=True):
            assert grad.numel() == (exact.numel() if needed else 0)
            if needed:
                assert_exact(str(which), t.grad, exact)
            t.grad = None
        if which[0]:
            assert found[0].is_contiguous(memory_format=memory_format)
        if impl == "triton":
            names = ("bsr_conv_dx", "bsr_conv_dvalues")
            wanted = [name for name, need in zip(names, which[:2], strict=True) if need]
            assert launched == wanted


@pytest.mark.parametrize("watched", [False, True], ids=["", "watched"])
def test_what_no_gradient_is_made_of_was_kept_until_backward(watched, impl, device):
    skip_native(impl)
    case, saved = Case((16, 16), (1, 1), (2, 2), device=device), []
    for which in WANTED:
        for t, needed in zip((case.x, case.w.values, case.bias), which, strict=True):
            t.requires_grad_(needed)
        saved.clear()
        with (
            torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
            FlopCounterMode(display=False) if watched else contextlib.nullcontext(),
        ):
            case.out(impl)
        kept = {t.data_ptr() for t in saved}
        assert (case.x.data_ptr() in kept) == which[1]
        assert (case.w.values.data_ptr() in kept) == which[0]


def test_second_derivatives_agree_with_dense(device):
    case = Case((6, 4), (2, 2), (3, 3), 1, (2, 3), padding=1, stride=(1, 2), device=device,
                dtype=torch.float64, make=torch.randn)  # fmt: skip
    values = case.w.values.requires_grad_()

    def run(x, values, bias):
        w = case.w
        w = BlockSparse._from_validated(
            values, w.crow, w.col, w.shape, w.ccol, w.row, w.perm, w.row_order
        )
        return bsr_conv2d(x, w, bias, **case.options, **case.sizes)

    inputs = (case.x.requires_grad_(), values, case.bias.requires_grad_())
    for which in WANTED:  # what needs no gradient is not kept
        for t, needed in zip(inputs, which, strict=True):
            t.requires_grad_(needed)
        assert torch.autograd.gradcheck(run, inputs)
        assert torch.autograd.gradgradcheck(run, inputs)


def test_memory_layouts_do_not_matter(impl, device):
    case = Case((20, 24), (3, 3), (5, 4), padding=1, device=device)
    expected = case.torch_out()
    for name, x in layouts(case.x).items():
        kept = x.clone()
        assert_exact(name, case.out(impl, x), expected)
        assert_exact(f"{name} untouched", x, kept)
    one = case.x[:1].expand(2, -1, -1, -1)
    assert_exact("expanded", case.out(impl, one), case.torch_out(x=one))
    skip_native(impl)
    flat = case.x[:, :1].expand(-1, 20, -1, -1)
    assert_exact("expanded inside", case.out(impl, flat), case.torch_out(x=flat))
    case.bias = poisoned(case.bias)
    assert_exact("bias", case.out(impl), expected)
    dout = integers(2, 24, 5, 4, device=device)
    exact = case.torch_grads(dout)
    xs, douts = layouts(case.x), layouts(dout)
    for (name, case.x), (layout, dy) in zip(xs.items(), reversed(douts.items()), strict=True):
        for grad, expected in zip(case.grads(dy, impl), exact, strict=True):
            assert_exact(f"x {name}, dout {layout}", grad, expected)


def test_memory_format_follows_x_as_in_pytorch(impl, device):
    skip_native(impl)
    case = Case((20, 24), (1, 1), device=device)
    wide = torch.randn(2, 24, 9, 9, device=device).contiguous(memory_format=torch.channels_last)
    candidates = {
        "contiguous": torch.randn(2, 20, 5, 6), "sliced": wide[:, :20, 1:6, 1:7],
        "transposed": torch.randn(20, 2, 5, 6).transpose(0, 1),
        "one pixel": torch.randn(2, 20, 1, 1),
        "expanded": torch.randn(1, 20, 5, 6).expand(2, -1, -1, -1),
    }  # fmt: skip
    for name, x in candidates.items():
        x = x.to(device)
        out = case.out(impl, x)
        assert out.stride() == case.torch_out(FP32, x).stride(), name
        fake = torch.empty(x.shape, device="meta").as_strided(x.shape, x.stride())
        static = (*op_arguments(case, impl)[1:],)
        fake = bsr_conv._bsr_conv_fake(fake, *static)
        assert (fake.stride(), fake.dtype) == (out.stride(), out.dtype), name


def test_unbatched_and_empty_inputs(impl, device):
    case = Case(device=device)
    assert_exact("unbatched", case.out(impl, case.x[0]), case.torch_out()[0])
    empty = case.out(impl, case.x[:0])
    assert empty.shape == (0, 24, 3, 4)
    x = case.x[:0].requires_grad_()
    values = case.w.values.requires_grad_()
    case.out(impl, x).sum().backward()
    assert x.grad is not None
    assert values.grad is not None
    assert x.grad.shape == x.shape
    assert (values.grad == 0).all()


@pytest.mark.parametrize("options", [{}, {"padding": 2, "stride": 2, "dilation": 2},
                                     {"padding": "same"}, {"groups": 2}], ids=str)  # fmt: skip
def test_conv1d_is_exact(options, impl, device):
    skip_native(impl, options != {"groups": 2})
    groups = options.get("groups", 1)
    layout = gate_layout((36, 40 // groups, 3), (16, 16), groups)
    weight = integers(36, 40 // groups, 3, device=device)
    w = BlockSparse.from_dense(weight_to_matrix(weight, layout), layout.block)
    x, bias = integers(2, 40, 9, device=device), integers(36, device=device)
    given = {"out_channels": 36, "kernel_size": 3, "impl": impl, "tile": TILE}
    expected = F.conv1d(x, weight, bias, **options)
    out = bsr_conv1d(x, w, bias, **options, **given)
    assert out.is_contiguous()
    assert_exact("out", out, expected)
    if not (impl == "triton" and NATIVE):
        last = x.transpose(1, 2).contiguous().transpose(1, 2)
        assert_exact("channels last", bsr_conv1d(last, w, bias, **options, **given), expected)
        assert_exact("unbatched", bsr_conv1d(x[0], w, bias, **options, **given), expected[0])


@pytest.mark.parametrize("block", [(32, 32), (16, 64), (64, 16)], ids=str)
def test_every_block_shape_is_exact(block, impl, device):
    skip_native(impl, block != (32, 32))
    case = Case((70, 72), (1, 2), (2, 3), 1, block, device=device)
    tile = replace(TILE, BLOCK_N=32, BLOCK_K=32)  # below, at and above the block's sides
    assert_exact("out", case.out(impl, tile=tile), case.torch_out())
    dout = integers(1, 72, 2, 2, device=device)
    for grad, expected in zip(case.grads(dout, impl), case.torch_grads(dout), strict=True):
        assert_exact(str(block), grad, expected)


@pytest.mark.parametrize("block", [(1, 1), (3, 5), (40, 1), (1, 26), (40, 26), (24, 20)], ids=str)
def test_torch_implementation_serves_any_block(block, device, monkeypatch):
    for dense in (False, True):
        reason(monkeypatch, dense=dense)
        for groups in (1, 2):
            case = Case((26 * groups, 40 * groups), (3, 2), block=block, padding=1, groups=groups,
                        device=device)  # fmt: skip
            assert_exact("out", case.out("torch", activation="relu"), case.torch_out().relu())
            case.x = case.x.contiguous(memory_format=torch.channels_last)
            out = case.out("torch")
            assert out.is_contiguous(memory_format=torch.channels_last)
            assert_exact("channels last", out, case.torch_out())
            dout = integers(*out.shape, device=device)
            grads = case.grads(dout, "torch")
            for grad, expected in zip(grads, case.torch_grads(dout), strict=True):
                assert_exact("grad", grad, expected)
        same = Case((6, 4), (2, 4), block=block, padding="same", device=device)
        assert_exact("same", same.out("torch"), same.torch_out())
        dout = integers(2, 4, 5, 6, device=device)
        for grad, expected in zip(same.grads(dout, "torch"), same.torch_grads(dout), strict=True):
            assert_exact("grad of same", grad, expected)


@pytest.mark.parametrize("dtype", [FP32, torch.float64], ids=str)
def test_one_output_channel_failed_in_backward_with_every_block_stored(dtype, device, monkeypatch):
    reason(monkeypatch, dense=True)
    case = Case((16, 1), block=(1, 16), padding=1, share=1.0, dtype=dtype, device=device)
    case.x = case.x.contiguous(memory_format=torch.channels_last)
    out = case.out("torch")
    assert_exact("out", out, case.torch_out())
    dout = integers(*out.shape, dtype=dtype, device=device)
    for grad, expected in zip(case.grads(dout, "torch"), case.torch_grads(dout), strict=True):
        assert_exact("grad", grad, expected)


def test_torch_implementation_works_in_bounded_pieces(device, monkeypatch):
    case = Case(images=5, padding=1, device=device)
    monkeypatch.setattr(bsr_conv_torch, "PLACES", 100)  # two images at a time, then the last
    dout = integers(5, 24, 5, 6, device=device)
    w, x = case.w, case.x
    geometry = ConvGeometry(20, 24, (3, 3), before=(1, 1), after=(1, 1))
    blocks = ConvBlocks(w.crow, w.col, w.block, geometry)
    for way, elements in (("loop", 100), ("batches", 1)):
        by = Candidate(way, way=way, elements=elements)
        out = bsr_conv_torch.bsr_conv_torch(x, w.values, blocks, case.bias, "none", by)
        assert_exact(way, out, case.torch_out())
    for grad, expected in zip(case.grads(dout, "torch"), case.torch_grads(dout), strict=True):
        assert_exact("grad", grad, expected)


def test_lines_of_one_large_image_stayed_in_memory(device, monkeypatch):
    if device.type != "cpu":
        pytest.skip("memory is kept on a CPU only")
    kept = threading.local()
    monkeypatch.setattr(_scratch, "_kept", kept)
    case = Case((8, 8), (3, 3), (40, 30), 1, (8, 8), share=1.0, padding=1)
    dout = integers(1, 8, 40, 30)
    for limit in (1 << 12, 1 << 30):
        monkeypatch.setattr(bsr_conv_torch, "_KEPT", limit)
        for way in ("loop", "batches"):
            assert_exact("out", case.out("torch", tile=way), case.torch_out())
        for grad, expected in zip(case.grads(dout, "torch"), case.torch_grads(dout), strict=True):
            assert_exact("grad", grad, expected)
        size = sum(buffer.nbytes for buffer in vars(kept).values())
        assert (size == 0) == (limit == 1 << 12)


@pytest.mark.parametrize("dense", [False, True])
def test_what_is_kept_with_a_container_fits_every_call(dense, device, monkeypatch):
    reason(monkeypatch, dense=dense)
    case = Case(device=device)
    wide = Case((40, 48), groups=2, device=device)
    for options in ({}, {"padding": 1}, {"padding": (1, 0), "stride": 2}, {}):
        case.options |= {"padding": 0, "stride": 1} | options
        assert_exact(str(options), case.out("torch"), case.torch_out())
        assert_exact("groups", wide.out("torch"), wide.torch_out())
    case.w.values[case.inside] *= -1  # as an optimizer does
    case.dense.neg_()
    assert_exact("written to", case.out("torch"), case.torch_out())
    again = pickle.loads(pickle.dumps(case.w))
    for name, w in {"pickled": again, "copied": copy.deepcopy(case.w), "moved": case.w.to(device),
                    "cast": case.w.to(dtype=torch.float64)}.items():  # fmt: skip
        assert "_conv_blocks" not in vars(w)
        x, bias = case.x.to(w.values.dtype), case.bias.to(w.values.dtype)
        out = bsr_conv2d(x, w, bias, impl="torch", **case.options, **case.sizes)
        assert_exact(name, out, case.torch_out())


@pytest.mark.parametrize("size", [(0, 4), (4, 0)], ids=str)
def test_image_of_nothing_but_padding_gave_memory_that_nobody_wrote(size, impl, device):
    w = BlockSparse.from_dense(torch.ones(16, 64, device=device), (16, 16))
    given = {"padding": 1, "out_channels": 16, "kernel_size": 2, "impl": impl}
    for images in (0, 1):
        with pytest.raises(ValueError, match=r"x must be empty in no way but without images, got"):
            bsr_conv2d(torch.ones(images, 16, *size, device=device), w, **given)
    assert len(bsr_conv2d(torch.ones(0, 16, 4, 4, device=device), w, **given)) == 0


def test_container_that_fits_another_layer_is_refused_after_it_served_one(device):
    case = Case((16, 16), (1, 2), device=device)
    case.out("torch")
    for change in ({"kernel_size": (2, 2)}, {"out_channels": 32}, {"groups": 2}):
        with pytest.raises(ValueError, match="w must be"):
            bsr_conv2d(case.x, case.w, None, impl="torch", **case.sizes | change)
    with pytest.raises(ValueError, match="x must be large enough"):
        bsr_conv2d(case.x[..., :1], case.w, None, impl="torch", **case.sizes)


def test_numbers_are_checked_whatever_was_called_before(device):
    case = Case(device=device)
    for right in (1, (1, 1), [1, 1]):
        case.out("torch", dilation=right)
    for wrong in (True, 1.0, (True, True), (1, 1.0), [1.0, 1]):
        with pytest.raises(ValueError, match="dilation must be an int or 2 ints >= 1"):
            case.out("torch", dilation=wrong)


def test_dense_layer_is_taken_where_it_is_faster(device, monkeypatch):
    monkeypatch.undo()

    def taken(block, channels, size, share):
        case = Case(channels, (3, 3), size, 1, block, share=share, padding=1, device=device)
        geometry = ConvGeometry(*channels, (3, 3), (1, 1), (1, 1), (1, 1))
        return conv_candidates._is_dense_faster(
            conv_cell_of("fwd", case.w, geometry, "torch", case.x)
        )

    assert not taken((32, 32), (128, 128), (56, 56), 0.1)
    assert taken((32, 32), (128, 128), (56, 56), 1.0)
    assert taken((4, 4), (128, 128), (56, 56), 0.1)
    assert taken((32, 32), (32, 32), (4, 4), 0.1)


@pytest.mark.parametrize("impl_dtype", [torch.float16, BF16], ids=str)
def test_autocast_as_conv2d(impl_dtype, impl, device):
    skip_native(impl)
    case = Case(size=(3, 3), device=device, make=torch.randn)
    with torch.autocast(device.type, impl_dtype):
        outs = [case.out(impl, x) for x in (case.x, case.x.to(impl_dtype))]
        assert case.torch_out(FP32).dtype == impl_dtype
        case.x.requires_grad_()
        case.out(impl).float().sum().backward()
    assert case.x.grad is not None
    assert case.x.grad.dtype == FP32
    x = case.x.detach().to(impl_dtype)
    case.w, case.bias = case.w.to(dtype=impl_dtype), case.bias.to(impl_dtype)
    for out in outs:
        assert torch.equal(out, case.out(impl, x))


def test_double_precision_runs_in_pytorch(device):
    case = Case(dtype=torch.float64, device=device, make=torch.randn)
    torch.testing.assert_close(case.out("torch"), case.torch_out())
    with pytest.raises(ValueError, match=r"bsr_conv2d: .* not torch\.float64"):
        case.out("triton")


@pytest.mark.parametrize("split", [1, 2, 5])
def test_gradient_of_values_is_the_same_however_pixels_are_shared(split, device, impl):
    if impl == "torch":
        pytest.skip("for the kernel")
    case = Case((20, 24), (2, 2), (5, 4), device=device)
    dout = integers(2, 24, 4, 3, device=device)
    geometry = ConvGeometry(20, 24, (2, 2))
    w = case.w
    dvalues = torch.full_like(w.values, float("nan"))
    bsr_conv_product.bsr_conv_dvalues(
        dout, case.x, w.row, w.col, w.perm, geometry, dvalues, replace(TILE, split=split)
    )
    assert_exact("dvalues", dvalues, case.torch_grads(dout)[1])


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_pipeline_depth_does_not_change_values(stages, impl, device):
    if impl == "torch" or (NATIVE and device.type == "cpu"):
        pytest.skip("for the kernel, interpreted or on a card")
    case = Case(size=(3, 4), device=device)
    tile = replace(TILE, num_stages=stages)
    assert_exact("out", case.out(impl, tile=tile), case.torch_out())


def test_fp32_precision_followed_the_switch_of_matrix_products(device, impl, monkeypatch):
    if impl == "torch":
        pytest.skip("for the kernels")
    launches = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: launches.append(kwargs["PRECISION"])

    for which in ("fwd", "dx", "dvalues"):
        monkeypatch.setattr(bsr_conv_product, f"_bsr_conv_{which}_kernel", Recorder())
    case = Case(size=(3, 3), device=device)
    dout = torch.ones(2, 24, 1, 1, device=device)
    cudnn, matmul, everything = torch.backends.cudnn, torch.backends.cuda.matmul, torch.backends
    kept = cudnn.allow_tf32
    tf32 = "tf32" if torch.version.hip is None else "ieee"

    def precision():
        launches.clear()
        case.grads(dout, impl)
        assert len(launches) == 3
        return set(launches)

    try:
        for allow in (False, True):
            cudnn.allow_tf32, matmul.allow_tf32 = allow, not allow
            assert precision() == {tf32 if allow else "ieee"}
        matmul.allow_tf32 = False
        for switch in (everything, cudnn):
            cudnn.conv.fp32_precision = "none"  # as the next switch above that is set
            for name in ("tf32", "ieee"):
                switch.fp32_precision = name
                assert precision() == {tf32 if name == "tf32" else "ieee"}
        cudnn.conv.fp32_precision = "tf32"
        assert precision() == {tf32}
    finally:
        cudnn.fp32_precision = everything.fp32_precision = "none"
        cudnn.allow_tf32, matmul.allow_tf32 = kept, False


def test_default_tile_gives_right_values(impl, device):
    skip_native(impl)
    case = Case((32, 32), size=(4, 4), block=(32, 32), padding=1, device=device)
    assert_exact("out", case.out(impl, tile=None), case.torch_out())


def test_nan_and_infinity_reach_the_outputs_that_meet_them(impl, device):
    case = Case((16, 16), (1, 1), (2, 2), 1, share=1.0, device=device, make=torch.randn)
    case.x[0, 0, 0, 0], case.x[0, 0, 1, 1] = float("nan"), float("inf")
    out = case.out(impl)
    assert out[0, :, 0, 0].isnan().all()
    assert not out[0, :, 1, 1].isfinite().any()
    assert out[0, :, 0, 1].isfinite().all()


FAR = 1 << 32  # elements


@pytest.fixture
def far_memory(device):
    """fp32 elements, more than 32 bits count, of which only a few pages exist."""
    if device.type != "cpu":
        pytest.skip("needs memory that is not there")
    try:
        buffer = mmap.mmap(-1, 4 * (FAR + 512), flags=mmap.MAP_PRIVATE | 0x4020)  # no reserve
    except OSError as error:
        pytest.skip(f"no address space: {error}")
    return torch.frombuffer(buffer, dtype=FP32)


def some_programs(kernel, count):
    """A kernel of which only the first programs run."""
    return type("", (), {"__getitem__": lambda _, grid: kernel[(count,)]})()


@pytest.mark.parametrize("axis", ["images", "lines", "places"])
def test_offsets_of_pixels_beyond_32_bits(axis, far_memory):
    """The kernels themselves, on images whose pixels lie far apart."""
    size, kernel, far = {
        "images": ((5, 16, 2, 2), (2, 2), 0),
        "lines": ((1, 16, 5, 2), (3, 1), 2),
        "places": ((1, 16, 2, 5), (1, 3), 3),
    }[axis]
    case = Case((16, 16), kernel, size[2:], size[0], share=1.0)
    w, geometry = case.w, ConvGeometry(16, 16, kernel)
    strides = [64, 1, 32, 16]
    strides[far] = 1 << 30
    x, out = (
        case.x.contiguous(memory_format=torch.channels_last),
        torch.empty_like(case.torch_out(FP32)),
    )
    dout, dx, dvalues = integers(*out.shape), torch.empty_like(x), torch.empty_like(w.values)
    far_x = far_memory.as_strided(x.shape, strides).copy_(x)
    far_dout = far_memory.as_strided(dout.shape, strides, 256).copy_(dout)
    bsr_conv_product.bsr_conv_fwd(
        far_x, w.values, w.crow, w.col, w.row_order, case.bias, geometry, "none", out, TILE
    )
    assert_exact("out", out, case.torch_out())
    bsr_conv_product.bsr_conv_dx(
        far_dout, w.values, conv_blocks(w, geometry).by_channels, geometry, dx, TILE
    )
    bsr_conv_product.bsr_conv_dvalues(
        far_dout, far_x, w.row, w.col, w.perm, geometry, dvalues, TILE
    )
    for name, grad, expected in zip(
        ("dx", "dvalues"), (dx, dvalues), case.torch_grads(dout)[:2], strict=True
    ):
        assert_exact(name, grad, expected)


def test_offsets_of_values_beyond_32_bits(far_memory, monkeypatch):
    """The kernels themselves, on a stored block that lies far behind."""
    case = Case((16, 16), (1, 1), (2, 3), share=1.0)
    values, geometry = far_memory.view(-1, 16, 16), ConvGeometry(16, 16, (1, 1))
    which = FAR // 256
    values[which] = case.w.values[0]
    crow, col = torch.tensor([which, which + 1]).int(), torch.zeros(which + 2).int()
    row, perm, out = torch.tensor([0, 0]).int(), torch.tensor([which]).int(), case.torch_out(FP32)
    dout, dx = integers(*out.shape), torch.empty_like(case.x)
    exact, (exact_dx, exact_dvalues, _) = case.torch_out(), case.torch_grads(dout)
    bsr_conv_product.bsr_conv_fwd(
        case.x, values, crow, col, row, case.bias, geometry, "none", out.fill_(float("nan")), TILE
    )
    assert_exact("out", out, exact)
    lists = ChannelLists(torch.tensor([0, 1]).int(), row, perm)
    bsr_conv_product.bsr_conv_dx(dout, values, lists, geometry, dx, TILE)
    assert_exact("dx", dx, exact_dx)
    first = some_programs(bsr_conv_product._bsr_conv_dvalues_kernel, 1)
    monkeypatch.setattr(bsr_conv_product, "_bsr_conv_dvalues_kernel", first)
    bsr_conv_product.bsr_conv_dvalues(dout, case.x, row, col, perm, geometry, values, TILE)
    assert_exact("dvalues", values[which], exact_dvalues[0])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_offsets_of_results_beyond_32_bits(memory_format, far_memory, monkeypatch):
    """The kernels themselves, on results of more channels than a test can compute."""
    case = Case((16, 16), (1, 1), (2, 4), share=1.0)
    channels = FAR // 16
    rows, shape = channels // 16, (2, channels, 2, 4)
    strides = torch.empty(shape, device="meta").contiguous(memory_format=memory_format).stride()
    result, w = far_memory.as_strided(shape, strides), case.w
    for name in ("_bsr_conv_fwd_kernel", "_bsr_conv_dx_kernel"):
        first = some_programs(getattr(bsr_conv_product, name), 1)
        monkeypatch.setattr(bsr_conv_product, name, first)
    # the last block row comes first
    crow, order = torch.zeros(rows + 1).int(), torch.tensor([rows - 1]).int()
    crow[-1] = 1
    bsr_conv_product.bsr_conv_fwd(
        case.x, w.values, crow, w.col, order, None, ConvGeometry(16, channels, (1, 1)), "none",
        result, TILE,
    )  # fmt: skip
    assert_exact("out", result[:, -16:], case.torch_out() - case.bias[:, None, None])
    dout = integers(2, 16, 2, 4)
    of_all = ConvGeometry(channels, 16, (1, 1))
    lists = ConvBlocks(w.crow, w.col, w.block, of_all).by_channels
    bsr_conv_product.bsr_conv_dx(dout, w.values, lists, of_all, result, TILE)
    assert_exact("dx", result[:, :16], case.torch_grads(dout)[0])


@triton.jit
def _pixels_kernel(out_ptr, pid, PIXELS, H, W, BLOCK_M: tl.constexpr):
    image, line, place, mask = bsr_conv_product._pixels(pid.to(tl.int64), PIXELS, H, W, BLOCK_M)
    offs = bsr_conv_product._out_offsets(image, line, place, tl.arange(0, 16), H, W, 16, True)
    tl.store(out_ptr + tl.arange(0, BLOCK_M)[:, None] * 16 + tl.arange(0, 16), offs, mask[:, None])


def test_pixels_are_counted_beyond_32_bits(device, impl):
    if impl == "torch":
        pytest.skip("for the kernels")
    pixels = FAR + 3
    for pid in (FAR // 16 - 1, FAR // 16):
        out = torch.full((16, 16), -1, device=device)
        _pixels_kernel[(1,)](out, pid, pixels, 8, 16, BLOCK_M=16)
        expected = torch.arange(256, device=device).view(16, 16) + pid * 256
        expected[max(0, pixels - pid * 16) :] = -1
        assert_exact(str(pid), out, expected)


@pytest.mark.parametrize("size", [(1 << 16, 1 << 15), (1, 1)], ids=["x", "result"])
def test_image_whose_pixels_32_bits_do_not_count_is_refused(size, impl, device):
    if impl == "torch":
        pytest.skip("for the kernels")
    w = BlockSparse.from_dense(torch.ones(16, 16, device=device), (16, 16))
    x = torch.zeros(1, device=device).expand(1, 16, *size)
    padding = 0 if size != (1, 1) else 1 << 15
    with pytest.raises(ValueError, match="at most 2147418112 pixels an image for the Triton"):
        bsr_conv2d(x, w, padding=padding, out_channels=16, kernel_size=1, impl=impl)


BAD = {"nan": float("nan"), "inf": float("inf")}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("which", ["x", "dout", "values"])
@pytest.mark.parametrize("geometry", [GEOMETRIES[i] for i in (0, 1, 5, 7, 8)], ids=identifier)
def test_infinity_gave_nan_to_gradients_that_never_met_it(geometry, which, bad, impl, device):
    """What is beside an image, between two, or beyond a ragged edge is no factor of a product."""
    skip_native(impl, geometry != GEOMETRIES[7] or bad == "nan")
    if which == "values" and impl == "triton":
        pytest.skip("a tile's pixels share the values, those at the border with 0 beside them")
    if impl == "torch" and device.type != "cpu":
        pytest.skip("there nobody waits for the device to see whether all is finite")
    case = Case(**geometry, device=device)
    dout = integers(*case.torch_out().shape, device=device)
    height, width = case.x.shape[2:]
    tensor = {"x": case.x, "dout": dout, "values": case.dense}[which]
    places = {(0, 0), (height - 1, width - 1), (height // 2, 0), (0, width // 2)}
    for place in places if impl == "torch" else {(0, 0)}:
        line, column = (n % size for n, size in zip(place, tensor.shape[2:], strict=True))
        kept = tensor[-1, 1, line, column].clone()
        tensor[-1, 1, line, column] = BAD[bad]
        if which == "values":
            weight = weight_to_matrix(case.dense, case.layout)
            case.w.values[case.inside] = case.blocks_of(weight)[case.inside]
        grads, dense = case.grads(dout, impl), case.torch_grads(dout, FP32)
        for name, grad, expected in zip(("dx", "dvalues", "dbias"), grads, dense, strict=True):
            finite = expected.isfinite()
            assert_exact(f"{name}, {place}", grad[finite], expected[finite])
            if which == "x":
                assert not grad[~finite].isfinite().any(), f"{name}, {place}"
        tensor[-1, 1, line, column] = kept


def test_backward_waited_for_the_device_to_see_infinities(device, monkeypatch):
    case = Case(padding=1, device=device)
    asked = []
    monkeypatch.setattr(bsr_conv_torch, "_is_finite", lambda t: asked.append(t) or True)
    dout = integers(*case.torch_out().shape, device=device)
    case.grads(dout, "torch")
    assert len(asked) == (2 if device.type == "cpu" else 0)
    asked.clear()
    elsewhere = type("", (torch.Tensor,), {"is_cpu": False})
    w = case.w
    blocks = ConvBlocks(
        w.crow, w.col, w.block, ConvGeometry(20, 24, (3, 3), (1, 1), (1, 1), (1, 1))
    )
    x = case.x.as_subclass(elsewhere)
    grads = bsr_conv_torch.bsr_conv_bwd_torch(dout, x, w.values, blocks, "lines", "lines")
    for grad, expected in zip(grads, case.torch_grads(dout), strict=False):
        assert_exact("grad", grad, expected)
    assert not asked


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(4)}, r"x must be \[B, C, H, W\] or \[C, H, W\], got \[4\]"),
        ({"x": torch.ones(1, 5, 5, 5)}, r"w must be \(4, 72\) for 5 input and 4 output .* got"),
        ({"x": torch.ones(1, 4, 2, 5)}, "x must be large enough for one output"),
        ({"x": torch.ones(1, 0, 5, 5)}, r"x must be empty in no way but .* got \[1, 0, 5, 5\]"),
        ({"x": torch.ones(1, 4, 5, 5).half()}, r"one dtype, got x torch\.float16, w torch\.float"),
        ({"x": torch.ones(1, 4, 5, 5, device="meta")}, "one device, got x meta, w cpu"),
        ({"bias": torch.ones(5)}, r"bias must be \[4\], got \[5\]"),
        ({"bias": torch.ones(4).half()}, r"got x torch\.float32, bias torch\.float16"),
        ({"stride": 0}, "stride must be an int or 2 ints >= 1, got 0"),
        ({"stride": (1, 2, 3)}, r"stride must be an int or 2 ints >= 1, got \(1, 2, 3\)"),
        ({"dilation": 1.5}, "dilation must be an int or 2 ints >= 1, got 1.5"),
        ({"padding": -1}, "padding must be an int or 2 ints >= 0, got -1"),
        ({"padding": "full"}, "padding must be ints, 'same' or 'valid', got 'full'"),
        ({"padding": "same", "stride": 2}, "padding 'same' needs a stride of 1"),
        ({"groups": 3}, "groups must divide the 4 channels of x and the 4 output channels, got 3"),
        ({"groups": 0}, "groups must be an int >= 1, got 0"),
        ({"out_channels": True}, "out_channels must be an int >= 1, got True"),
        ({"out_channels": 8}, r"w must be \(8, 36\)"),
        ({"kernel_size": (3,) * 3}, "kernel_size must be an int or 2 ints"),
        ({"kernel_size": 2}, "w must be"),
        ({"activation": "tanh"}, r"activation must be None or one of \('relu', .* got 'tanh'"),
        ({"impl": "cuda"}, r"impl=: implementation must be one of .* 'cuda'"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_wrong_arguments_are_refused(change, message):
    w = BlockSparse.from_dense(torch.ones(4, 36), (4, 4))
    given = {"x": torch.ones(1, 4, 5, 5), "w": w, "out_channels": 4, "kernel_size": 3}
    with pytest.raises(ValueError, match=message):
        bsr_conv2d(**given | change)


def test_wrong_arguments_of_conv1d_are_refused():
    w = BlockSparse.from_dense(torch.ones(4, 12), (4, 4))
    with pytest.raises(ValueError, match=r"x must be \[B, C, L\] or \[C, L\], got \[1, 4, 5, 5\]"):
        bsr_conv1d(torch.ones(1, 4, 5, 5), w, out_channels=4, kernel_size=3)
    with pytest.raises(ValueError, match="stride must be an int >= 1, got 0"):
        bsr_conv1d(torch.ones(1, 4, 5), w, stride=0, out_channels=4, kernel_size=3)


def test_blocks_that_the_kernel_cannot_serve_are_refused_or_said(device, monkeypatch):
    case = Case(block=(8, 20), device=device)
    with pytest.raises(ValueError, match=r"bsr_conv2d: .* impl= cannot run"):
        case.out("triton")
    with use_impl("triton"), pytest.warns(UserWarning, match="using the torch implementation"):
        case.out(None)
    monkeypatch.setenv("SGTRITON_STRICT", "1")
    with use_impl("triton"), pytest.raises(ValueError, match="use_impl cannot run"):
        case.out(None)


def op_arguments(case, impl):
    w = case.w
    geometry = ConvGeometry(20, 24, case.sizes["kernel_size"])
    return (case.x, w.values, case.bias, w.crow, w.col, w.ccol, w.row, w.perm, w.row_order,
            geometry.pack(), "none", impl, TILE.name if impl == "triton" else "loop")  # fmt: skip


def test_ops_are_sound(impl, device):
    skip_native(impl)
    case = Case(kernel=(1, 2), size=(1, 3), device=device, make=torch.randn)
    case.w.values[~case.inside] = 0  # NaN differs from itself
    case.w.values.requires_grad_()
    for memory_format in (torch.contiguous_format, torch.channels_last):
        case.x = case.x.detach().contiguous(memory_format=memory_format).requires_grad_()
        opcheck(bsr_conv._bsr_conv_op, op_arguments(case, impl))
    *inputs, geometry, _, _, tile = op_arguments(case, impl)
    x, values, _, *index = (t.detach() for t in inputs)
    dout = torch.randn(2, 24, 1, 2, device=device)
    for needs in ([True, True, True], [False, True, False]):
        opcheck(bsr_conv._bsr_conv_bwd_op, (dout, x, values, *index, geometry, impl, tile, needs))


def test_calls_that_are_watched_give_what_others_give(impl, device):
    skip_native(impl)
    case = Case(size=(3, 3), device=device)
    tensors = [case.x.requires_grad_(), case.w.values.requires_grad_()]
    dout = integers(2, 24, 1, 1, device=device)
    grads = torch.autograd.grad(case.out(impl), tensors, dout)
    with FlopCounterMode(display=False) as counter:
        watched = torch.autograd.grad(case.out(impl), tensors, dout)
    for a, b in zip(grads, watched, strict=True):
        assert torch.equal(a, b)
    counts = counter.get_flop_counts()["Global"]
    pixels, stored = 2, case.w.nnz * 256
    assert counts[ops.bsr_conv] == 2 * pixels * stored
    assert counts[ops.bsr_conv_bwd] == 4 * pixels * stored


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_without_graph_breaks(backend, impl, device):
    skip_native(impl)
    case = Case(size=(3, 4), device=device)
    case.w.values.requires_grad_()

    @torch.compile(fullgraph=True, backend=backend)
    def run(x):
        return case.out(impl, x, activation="relu", padding=1)

    for x in (case.x, case.x.contiguous(memory_format=torch.channels_last)):
        expected = case.out(impl, x, activation="relu", padding=1)
        out = run(x)
        assert torch.equal(out, expected)
        assert out.stride() == expected.stride()
        (grad,) = torch.autograd.grad(out.sum(), case.w.values)
        (expected,) = torch.autograd.grad(expected.sum(), case.w.values)
        assert torch.equal(grad, expected)


def test_tiles_are_legal():
    sides = (16, 32, 64, 128, 256)
    for which, dtype, bn, bk, pixels, aligned in itertools.product(
        ("fwd", "dx", "dvalues"), DTYPES, sides, sides, (1, 17, 1 << 20), (True, False)
    ):
        tile = tile_for_bsr_conv(which, pixels, (bn, bk), 64, dtype, aligned)
        assert 16 <= tile.BLOCK_N <= bn
        assert 16 <= tile.BLOCK_K <= bk
        assert bn % tile.BLOCK_N == bk % tile.BLOCK_K == 0
        assert 16 <= tile.BLOCK_M <= 128
        operands = {
            "fwd": (tile.BLOCK_M + tile.BLOCK_N) * tile.BLOCK_K,
            "dx": (tile.BLOCK_M + tile.BLOCK_K) * tile.BLOCK_N,
            "dvalues": (tile.BLOCK_N + tile.BLOCK_K) * tile.BLOCK_M,
        }
        assert operands[which] * dtype.itemsize * tile.num_stages <= 64 * 1024


@pytest.mark.compiles
@pytest.mark.parametrize("card", CARDS, ids=lambda card: str(card[1]))
def test_kernels_compile_for_every_card(card):
    from bench.variants import variants

    chosen = [v for v in variants() if v.op.startswith("bsr_conv") and "64x64" in v.name]
    assert {v.op for v in chosen} == {"bsr_conv", "bsr_conv dx", "bsr_conv dvalues"}
    for variant in chosen:
        launch = variant.launch
        code = compile_for(
            card, launch.function(), launch.signature, launch.constexprs, launch.num_warps,
            launch.num_stages,
        )  # fmt: skip
        case = f"{variant.op} {variant.name}: {code.registers} registers, {code.shared} bytes"
        assert code.spills == 0, case
        assert code.shared <= (64 if card[0] == "hip" else 99) * 1024, case
        assert variant.product is not None
        if variant.product.half:
            assert code.matrix_instruction, case


def test_coverage_counts_what_blocks_hold():
    case = Case((20, 24), groups=2)
    counts = coverage(case.layout)
    pattern = gates_to_pattern(torch.ones(case.layout.gate_shape, dtype=torch.bool), case.layout)
    full = Case((20, 24), groups=2, pattern=pattern)
    assert full.inside.sum() == counts.sum()
