"""Products with a block-sparse weight: values in every form, hostile memory, compiled code."""

import itertools
import mmap
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, assert_exact, assert_within_twice, integers, layouts, poisoned
from sgtriton_kernels import bsr_product
from sgtriton_kernels._triton import INTERPRETED, is_native, why_not_triton
from sgtriton_kernels.bsr import BlockSparse
from sgtriton_kernels.bsr_candidates import BSR_LINEAR_CANDIDATES
from sgtriton_kernels.bsr_product import (
    PairedRows,
    bsr_linear_dvalues,
    bsr_linear_dx,
    bsr_linear_fwd,
    bsr_linear_fwd_pairs,
    pair_rows,
)  # fmt: skip
from sgtriton_kernels.tiles import BsrTile, tile_for_bsr_linear
from test_bsr import patterns

from bench import compile_report, variants_blocks
from sgtriton.cross_compile import CARDS

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
# small: quick to compile natively
TILE = BsrTile(BLOCK_N=16, BLOCK_M=16, BLOCK_K=16, num_stages=1, num_warps=1)
FORMS = {
    "x_left": TILE,
    "weight_left": replace(TILE, form="weight_left"),
    "split": replace(TILE, split=3),
    "vector": replace(TILE, BLOCK_M=4, form="vector"),
    "bulk": replace(TILE, bulk=True),
    "pairs": replace(TILE, BLOCK_N=32, form="pairs"),
}  # fmt: skip
BACKWARD = {name: FORMS[name] for name in ("x_left", "weight_left", "split", "bulk")}
# M, N, K: ragged everywhere, one tile, several tiles, one row
SHAPES = [(5, 40, 70), (16, 16, 16), (37, 64, 96), (1, 48, 48)]
EMPTY = [(0, 32, 48)]


@pytest.fixture(autouse=True)
def _nan_outputs(device, request):
    """Memory that nobody wrote holds NaN: a missed store shows."""
    compiles = request.node.get_closest_marker("compiles")
    if not compiles and (reason := why_not_triton(device)):
        pytest.skip(reason)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def forward(w, x, *rest):
    """The launcher of the tile's form; ``w`` has the index and the values."""
    if rest[-1].form == "pairs":
        return bsr_linear_fwd_pairs(x, w.values, pair_rows(w.crow, w.col), *rest)
    return bsr_linear_fwd(x, w.values, w.crow, w.col, w.row_order, *rest)


class Case:
    """A layer with NaN beyond its ragged edges, and what fp64 makes of it."""

    def __init__(self, shape, block, open, dtype, device, make=integers):
        m, n, k = self.shape = shape
        self.w = BlockSparse.from_dense(make(n, k).to(device, dtype), block, open)
        self.dense = self.w.to_dense()
        self.outside = torch.ones_like(self.w.values, dtype=torch.bool)
        for row in range(self.w.block_rows):
            for i in range(int(self.w.crow[row]), int(self.w.crow[row + 1])):
                within_n, within_k = n - row * block[0], k - int(self.w.col[i]) * block[1]
                self.outside[i, :within_n, :within_k] = False
        self.w.values[self.outside] = float("nan")
        self.x, self.dy = make(m, k).to(device, dtype), make(m, n).to(device, dtype)
        self.bias, self.residual = make(n).to(device, dtype), make(m, n).to(device, dtype)

    def fwd(self, tile, activation="none", x=None, bias=True, residual=True):
        return forward(
            self.w, self.x if x is None else x, self.bias if bias else None,
            self.residual if residual else None, self.shape[1], activation, tile,
        )  # fmt: skip

    def dx(self, tile, dy=None):
        w, dy = self.w, self.dy if dy is None else dy
        return bsr_linear_dx(dy, w.values, w.ccol, w.row, w.perm, self.shape[2], tile)

    def dvalues(self, tile, dy=None, x=None):
        w, dy, x = self.w, self.dy if dy is None else dy, self.x if x is None else x
        return bsr_linear_dvalues(dy, x, w.values, w.row, w.col, w.perm, tile)

    def y64(self, wide=torch.float64):
        return F.linear(self.x.to(wide), self.dense.to(wide), self.bias.to(wide)) + self.residual

    def dx64(self):
        return self.dy.double() @ self.dense.double()

    def dvalues64(self):
        return self.blocks_of(self.dy.double().T @ self.x.double())

    def blocks_of(self, d):
        """A dense gradient at the stored blocks, in their order."""
        w, (bn, bk) = self.w, self.w.block
        d = F.pad(d, (0, w.block_cols * bk - d.shape[1], 0, w.block_rows * bn - d.shape[0]))
        blocks = d.view(w.block_rows, bn, w.block_cols, bk).transpose(1, 2)
        row = torch.repeat_interleave(w.crow.diff())
        return blocks[row, w.col[: w.nnz]]


def grid(shape, block):
    return -(-shape[1] // block[0]), -(-shape[2] // block[1])


def topologies(shape):
    """Every pattern on the ragged shape, one on the others: launches are slow in the interpreter"""
    found = patterns(*grid(shape, (16, 16)))
    names = list(found) if shape == SHAPES[0] else ["random"]
    return {name: found[name] for name in names}


def some(shape, block, share=0.5):
    """About ``share`` of the blocks, and at least one."""
    open = torch.rand(grid(shape, block)) < share
    open[-1, -1] = True
    return open


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES + EMPTY, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_forward_is_exact(form, shape, dtype, device):
    if not INTERPRETED and dtype == FP16:
        pytest.skip("the other dtypes and the interpreter cover it")
    for name, open in topologies(shape).items():
        case = Case(shape, (16, 16), open, dtype, device)
        y = case.fwd(FORMS[form])
        assert (y.dtype, y.is_contiguous()) == (dtype, True)
        assert_exact(name, y, case.y64())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES + EMPTY, ids=str)
@pytest.mark.parametrize("form", BACKWARD)
def test_dx_is_exact(form, shape, dtype, device):
    if not INTERPRETED and dtype == FP16:
        pytest.skip("the other dtypes and the interpreter cover it")
    for name, open in topologies(shape).items():
        case = Case(shape, (16, 16), open, dtype, device)
        dx = case.dx(BACKWARD[form])
        assert (dx.dtype, dx.is_contiguous()) == (dtype, True)
        assert_exact(name, dx, case.dx64())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES + EMPTY, ids=str)
def test_dvalues_are_exact(shape, dtype, device):
    for name, open in topologies(shape).items():
        case = Case(shape, (16, 16), open, dtype, device)
        dvalues = case.dvalues(TILE)
        assert (dvalues.dtype, dvalues.is_contiguous()) == (dtype, True)
        assert_exact(name, dvalues, case.dvalues64())
        assert (dvalues[case.outside] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("split", [3, 16])
def test_dvalues_are_exact_however_rows_are_shared(split, dtype, device):
    """Rows that no share takes whole, fewer steps than shares, one row, none; no block."""
    if not INTERPRETED and dtype == FP16:
        pytest.skip("the other dtypes and the interpreter cover it")
    tile = replace(TILE, split=split)
    for m in (0, 1, 17, 77):
        shape = (m, 40, 70)
        found = patterns(*grid(shape, (16, 32)))
        for name in found if m == 17 else ["random"]:
            open = found[name]
            case = Case(shape, (16, 32), open, dtype, device)
            dvalues = case.dvalues(tile)
            assert (dvalues.dtype, dvalues.is_contiguous()) == (dtype, True)
            assert_exact(f"{m} rows, {name}", dvalues, case.dvalues64())
            assert (dvalues[case.outside] == 0).all()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("split", [1, 3])
def test_infinity_gave_nan_to_dvalues_beyond_a_ragged_edge(split, bad, device):
    for shape in ((5, 40, 70), (5, 40, 64), (5, 48, 70)):
        case = Case(shape, (16, 16), torch.ones(grid(shape, (16, 16))).bool(), FP32, device)
        case.x[0, -1] = case.dy[1, -1] = bad
        dvalues = case.dvalues(replace(TILE, split=split))
        assert (dvalues[case.outside] == 0).all()
        finite = case.dvalues64().isfinite()
        assert_exact(str(shape), dvalues[finite], case.dvalues64()[finite])
        assert not dvalues[~finite].isfinite().any()


def test_shared_rows_are_added_up_in_the_same_order(device):
    shape = (300, 32, 48)
    case = Case(shape, (16, 16), some(shape, (16, 16)), FP32, device, torch.randn)
    outs = [case.dvalues(replace(TILE, split=5)) for _ in range(10)]
    assert all(torch.equal(out, outs[0]) for out in outs)
    torch_out = case.blocks_of(case.dy.T @ case.x)
    assert_within_twice("dvalues", outs[0], case.dvalues64(), torch_out)


BLOCKS = [(16, 16), (32, 32), (16, 64), (64, 16), (64, 64), (128, 32), (256, 16)]


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_every_block_is_exact(form, block, device):
    if not INTERPRETED and block not in ((32, 32), (16, 64), (64, 16)):
        pytest.skip("the other blocks and the interpreter cover it")
    shape = (9, 260, 130)
    case = Case(shape, block, some(shape, block), FP32, device)
    # sides of the tile below, at and above the block's
    tile = replace(FORMS[form], BLOCK_N=32, BLOCK_K=32)
    assert_exact("y", case.fwd(tile), case.y64())
    if form in BACKWARD:
        assert_exact("dx", case.dx(tile), case.dx64())
        assert_exact("dvalues", case.dvalues(tile), case.dvalues64())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_error_is_within_twice_that_of_pytorch(form, dtype, device):
    shape = (7, 72, 100)
    case = Case(shape, (16, 32), some(shape, (16, 32)), dtype, device, torch.randn)
    tile = replace(FORMS[form], BLOCK_K=32)
    torch_y = F.linear(case.x, case.dense, case.bias) + case.residual
    assert_within_twice("y", case.fwd(tile), case.y64(), torch_y)
    if form in BACKWARD:
        assert_within_twice("dx", case.dx(tile), case.dx64(), case.dy @ case.dense)
    torch_d = case.blocks_of(case.dy.T @ case.x)
    assert_within_twice("dvalues", case.dvalues(tile), case.dvalues64(), torch_d)


ACTIVATIONS = {
    "none": lambda y: y, "relu": F.relu, "gelu": F.gelu, "silu": F.silu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
}  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("form", FORMS)
def test_residual_is_added_before_the_activation(form, activation, device):
    if not INTERPRETED and (form != "split" or activation == "silu"):
        pytest.skip("one form compiled, and the interpreter, cover it")
    case = Case((5, 40, 70), (16, 16), some((5, 40, 70), (16, 16)), FP32, device, torch.randn)
    act = ACTIVATIONS[activation]
    y = F.linear(case.x, case.dense, case.bias) + case.residual
    out = case.fwd(FORMS[form], activation)
    assert_within_twice("out", out, act(case.y64()), act(y))


@pytest.mark.parametrize("form", FORMS)
def test_bias_and_residual_may_be_missing(form, device):
    case = Case((5, 40, 70), (16, 16), some((5, 40, 70), (16, 16)), FP32, device)
    product = case.x.double() @ case.dense.double().T
    tile = FORMS[form]
    assert_exact("neither", case.fwd(tile, bias=False, residual=False), product)
    if INTERPRETED:
        assert_exact("bias", case.fwd(tile, residual=False), product + case.bias)
        assert_exact("residual", case.fwd(tile, bias=False), product + case.residual)


@pytest.mark.parametrize("form", FORMS)
def test_memory_layouts_do_not_matter(form, device):
    shape = (6, 48, 80)
    case = Case(shape, (16, 16), some(shape, (16, 16)), FP32, device)
    tile = FORMS[form]
    for name, x in layouts(case.x).items():
        assert_exact(f"y {name}", case.fwd(tile, x=x), case.y64())
    for name, dy in layouts(case.dy).items():
        if form in BACKWARD:
            assert_exact(f"dx {name}", case.dx(tile, dy), case.dx64())
        x = layouts(case.x)[name]
        assert_exact(f"dvalues {name}", case.dvalues(tile, dy, x), case.dvalues64())
    expected = case.y64()
    for name, residual in layouts(case.residual).items():
        case.residual = residual
        assert_exact(f"residual {name}", case.fwd(tile), expected)
    case.x = case.x[:1].expand(6, 80)
    case.bias = poisoned(case.bias)
    case.residual = case.residual[:, :1].expand(6, 48)
    assert_exact("expanded", case.fwd(tile), case.y64())
    case.dy = case.dy[:1, :1].expand(6, 48)
    assert_exact("expanded dx", case.dx(TILE), case.dx64())
    assert_exact("expanded dvalues", case.dvalues(TILE), case.dvalues64())


@pytest.mark.parametrize("stages", range(1, 9))
@pytest.mark.parametrize("form", FORMS)
def test_pipeline_depth_does_not_change_values(form, stages, device):
    if not INTERPRETED and device.type == "cpu" and stages not in (1, 4):
        pytest.skip("the CPU compiler has no pipeline")
    shape = (17, 64, 96)
    case = Case(shape, (16, 16), some(shape, (16, 16)), FP32, device)
    tile = replace(FORMS[form], num_stages=stages)
    assert_exact("y", case.fwd(tile), case.y64())
    if form in BACKWARD:
        assert_exact("dx", case.dx(tile), case.dx64())
    assert_exact("dvalues", case.dvalues(tile), case.dvalues64())


def test_pairs_hold_every_block_once(device):
    for rows, cols in ((1, 1), (5, 3), (6, 4)):
        for name, open in patterns(rows, cols).items():
            dense = torch.ones(rows * 16, cols * 16, device=device)
            w = BlockSparse.from_dense(dense, (16, 16), open)
            pairs = pair_rows(w.crow, w.col)
            assert {t.dtype for t in vars(pairs).values()} == {torch.int32}
            lengths = pairs.starts.diff()
            assert (lengths[pairs.order].diff() <= 0).all()
            assert pairs.order.sort()[0].tolist() == list(range(-(-rows // 2)))
            assert pairs.steps == int(pairs.starts[-1])
            assert int(pairs.col[-1]) == 0
            found = torch.zeros(rows, cols, dtype=torch.int64)
            for p, (start, end) in enumerate(itertools.pairwise(pairs.starts.tolist())):
                assert (pairs.col[start:end].diff() > 0).all()
                for step, half in itertools.product(range(start, end), range(2)):
                    block, row = int(pairs.which[step, half]), 2 * p + half
                    if block >= 0:
                        assert int(w.col[block]) == int(pairs.col[step])
                        assert int(w.crow[row]) <= block < int(w.crow[row + 1])
                        found[row, int(pairs.col[step])] += 1
            assert torch.equal(found, open.long()), name


@pytest.mark.parametrize("m", [1, 17])
def test_copy_engine_serves_every_form(m, device, monkeypatch):
    if is_native(device):
        pytest.skip("a card's")
    made = []
    kept = bsr_product._descriptor
    monkeypatch.setattr(bsr_product, "_descriptor", lambda *a: made.append(a) or kept(*a))
    shape = (m, 64, 96)
    for tile in (
        replace(TILE, bulk=True),
        BsrTile(32, 16, 16, 2, 1, "weight_left", bulk=True),
        BsrTile(16, 32, 32, 3, 1, split=2, bulk=True),
    ):
        case = Case(shape, (32, 32), some(shape, (32, 32)), FP32, device)
        made.clear()
        assert_exact("y", case.fwd(tile), case.y64())
        assert_exact("dx", case.dx(tile), case.dx64())
        assert len(made) == (4 if device.type == "cpu" else len(made))
    # ragged blocks, rows that are not aligned, and no block are read with pointers
    made.clear()
    for shape, columns in (((m, 64, 80), 80), ((m, 64, 96), 100)):
        case = Case(shape, (32, 32), some(shape, (32, 32)), FP32, device)
        x = torch.empty(m + 1, columns, device=device)[1:, : shape[2]].copy_(case.x)
        assert_exact("y", case.fwd(replace(TILE, bulk=True), x=x), case.y64())
    if m > 1:
        assert not made
    case = Case(shape, (32, 32), torch.zeros(2, 3).bool(), FP32, device)
    assert_exact("no block", case.fwd(replace(TILE, bulk=True)), case.y64())


def test_values_that_the_copy_engine_cannot_address_are_read_with_pointers(device, monkeypatch):
    if not INTERPRETED and device.type == "cpu":
        pytest.skip("nothing compiled for a CPU asks the copy engine")
    made = []
    real = bsr_product._descriptor
    monkeypatch.setattr(bsr_product, "_descriptor", lambda *a: made.append(a) or real(*a))
    shape = (20, 64, 96)
    for tile in (FORMS["bulk"], replace(FORMS["bulk"], form="weight_left")):
        case = Case(shape, (32, 32), some(shape, (32, 32)), FP32, device)
        values, w = case.w.values, case.w
        buffer = torch.empty(values.numel() + 1, device=device)
        shifted = buffer[1:].view(values.shape).copy_(values)
        case.w = BlockSparse._from_validated(
            shifted, w.crow, w.col, w.shape, w.ccol, w.row, w.perm, w.row_order
        )
        assert_exact("y", case.fwd(tile), case.y64())
        assert_exact("dx", case.dx(tile), case.dx64())
    assert not made


def test_pairs_of_a_grid_beyond_32_bits_were_lost(device):
    rows, cols = 140_000, 70_000
    crow = torch.zeros(rows + 1, dtype=torch.int32, device=device)
    crow[-1] = 1
    col = torch.tensor([cols - 1, 0], dtype=torch.int32, device=device)
    pairs = pair_rows(crow, col)
    assert pairs.starts.tolist() == [0] * (rows // 2) + [1]
    assert pairs.col.tolist() == [cols - 1, 0]
    assert pairs.which.tolist() == [[-1, 0], [-1, -1]]
    assert pairs.order[0] == rows // 2 - 1


@pytest.mark.parametrize("threads", [2, 3, 16])
@pytest.mark.parametrize("form", ["weight_left", "vector", "split", "pairs"])
def test_block_rows_dealt_out_to_threads_are_all_there(form, threads, device, monkeypatch):
    """As the CPU compiler's programs run, in the interpreter too; tiles that overhang and whole."""
    if not INTERPRETED and form != "weight_left" and threads != 3:
        pytest.skip("one form compiled, and the interpreter, cover it")
    monkeypatch.setattr(bsr_product, "is_native", lambda device: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for shape in ((5, 40, 70), (32, 112, 96), (17, 16, 32)):
        case = Case(shape, (16, 16), some(shape, (16, 16)), FP32, device)
        assert_exact(str(shape), case.fwd(FORMS[form]), case.y64())


@pytest.mark.parametrize("split", [2, 3, 8])
def test_split_sums_are_bitwise_repeatable(split, device):
    shape = (3, 32, 160)
    case = Case(shape, (16, 16), some(shape, (16, 16), 0.7), FP32, device, torch.randn)
    outs = [case.fwd(replace(TILE, split=split), "gelu") for _ in range(10)]
    assert all(torch.equal(out, outs[0]) for out in outs)
    y = F.linear(case.x, case.dense, case.bias) + case.residual
    assert_within_twice("out", outs[0], F.gelu(case.y64()), F.gelu(y))


@pytest.mark.parametrize("form", FORMS)
def test_nan_and_infinity_reach_the_output(form, device):
    case = Case((2, 16, 16), (16, 16), torch.ones(1, 1).bool(), FP32, device)
    case.bias[:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    for activation in ("relu", "none"):
        out = case.fwd(FORMS[form], activation)
        assert out[:, 0].isnan().all()
        assert (out[:, 1] == float("inf")).all()
        assert (out[:, 2] == (0 if activation == "relu" else -float("inf"))).all()
        assert out[:, 3:].isfinite().all()


@pytest.mark.parametrize("which", ["x", "values"])
@pytest.mark.parametrize("form", FORMS)
def test_offsets_beyond_32_bits(form, which, device):
    """The kernels themselves, on buffers of which only a few pages exist."""
    if device.type != "cpu":
        pytest.skip("needs memory that is not there")
    x, values = integers(4, 16), integers(1, 16, 16)
    starts, index = torch.tensor([0, 1]).int(), torch.tensor([0, 0]).int()
    perm = torch.zeros(1, dtype=torch.int32)
    far = 3 << 30
    try:
        buffer = mmap.mmap(-1, 4 * (far + 256), flags=mmap.MAP_PRIVATE | 0x4020)  # no reserve
    except OSError as error:
        pytest.skip(f"no address space: {error}")
    tile, dense = FORMS[form], values[0]
    huge = torch.frombuffer(buffer, dtype=torch.float32)
    if which == "x":
        huge = huge.as_strided((4, 16), (1 << 30, 1))
        huge.copy_(x)
        dvalues = bsr_linear_dvalues(huge, huge, values, perm, index, perm, TILE)
        assert_exact("dvalues", dvalues[0], x.T @ x)
        used = huge
    else:
        first = far // 256
        huge = huge.view(-1, 16, 16)
        huge[first] = values[0]
        used, values = x, huge
        starts, index = torch.tensor([first, first + 1]).int(), torch.zeros(first + 2).int()
    order = torch.zeros(1, dtype=torch.int32)
    if form == "pairs":
        which = torch.tensor([[starts[0], -1], [-1, -1]]).int()
        pairs = PairedRows(torch.tensor([0, 1]).int(), index[:2], which, order)
        out = bsr_linear_fwd_pairs(used, values, pairs, None, None, 16, "none", tile)
    else:
        out = bsr_linear_fwd(used, values, starts, index, order, None, None, 16, "none", tile)
    assert_exact("y", out, x @ dense.T)
    if form in BACKWARD:
        if which == "values":
            perm = torch.full((1,), far // 256, dtype=torch.int32)
            starts = torch.tensor([0, 1]).int()
        out = bsr_linear_dx(used, values, starts, index, perm, 16, tile)
        assert_exact("dx", out, x @ dense)


@pytest.mark.parametrize("which", ["fwd", "dx", "dvalues"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_default_tiles_give_right_values(which, dtype, device):
    for shape in ((1, 64, 96), (5, 40, 70), (20, 64, 96)):
        case = Case(shape, (16, 32), some(shape, (16, 32)), dtype, device)
        m, n, k = shape
        tile = tile_for_bsr_linear(
            which, m, n, k, (16, 32), case.w.nnz, dtype, k % 16 == 0, is_native(device)
        )
        if which == "fwd":
            assert_exact(str(shape), case.fwd(tile), case.y64())
        elif which == "dx":
            assert_exact(str(shape), case.dx(tile), case.dx64())
        else:
            assert_exact(str(shape), case.dvalues(tile), case.dvalues64())


def test_candidates_have_names_and_tiles_come_back_by_them():
    names = [candidate.name for candidate in BSR_LINEAR_CANDIDATES]
    assert len(set(names)) == len(names)
    for tile in (candidate.tile for candidate in BSR_LINEAR_CANDIDATES):
        assert BsrTile.of_name(tile.name) == tile


@pytest.mark.parametrize("name", ["", "unpack", "x_left", "x_left_n16_m16_k16_s2_w1_", "\u0661"])
def test_name_of_no_tile_is_refused(name):
    with pytest.raises(ValueError, match="tile must be named as"):
        BsrTile.of_name(name)


def test_tiles_are_legal():
    sides, sizes = (16, 32, 64, 128, 256), (0, 1, 7, 16, 17, 63, 128, 1 << 20)
    for dtype, bn, bk, m in itertools.product(DTYPES, sides, sides, sizes):
        for which, aligned in itertools.product(("fwd", "dx", "dvalues"), (True, False)):
            tile = tile_for_bsr_linear(which, m, 512, 512, (bn, bk), 64, dtype, aligned)
            n, rows, k = tile.BLOCK_N, tile.BLOCK_M, tile.BLOCK_K
            assert 16 <= n <= min(bn, 128)
            assert 16 <= k <= min(bk, 128)
            assert 2 <= tile.num_stages <= 4
            if tile.form == "vector":
                assert which == "fwd"
                assert max(m, 1) <= rows <= 8
                continue
            assert rows in (16, 32, 64, 128)
            step = {"fwd": (n + rows) * k, "dx": (k + rows) * n, "dvalues": (n + k) * rows}[which]
            assert step * dtype.itemsize * tile.num_stages <= 96 * 1024
            if which == "dvalues":
                assert tile.split in (1, 2, 4, 8, 16)
                assert tile.split == 1 or m >= tile.split * 16 * rows
            else:
                assert tile.split in (1, 2, 4, 8)
                assert tile.split == 1 or m <= 256


def test_few_programs_share_long_rows():
    def split(m, nnz, block=(64, 64)):
        tile = tile_for_bsr_linear("fwd", m, 4096, 4096, block, nnz, BF16)
        return tile.form, tile.split

    assert split(16, 64 * 64) == ("weight_left", 4)  # 64 programs of 64 steps
    assert split(16, 64 * 16) == ("weight_left", 2)
    assert split(16, 64 * 8) == ("weight_left", 1)
    assert split(128, 64 * 64)[0] == "x_left"
    assert split(4096, 64 * 64) == ("x_left", 1)
    assert split(8, 64 * 64) == ("vector", 1)


def test_few_rows_take_parts_of_large_blocks():
    def tile(m, n, dtype=BF16):
        tile = tile_for_bsr_linear("fwd", m, n, 4096, (128, 128), 100, dtype)
        return tile.form, tile.BLOCK_N, tile.BLOCK_M

    assert tile(16, 4096) == ("x_left", 32, 16)  # 128 programs instead of 32
    assert tile(64, 4096) == ("x_left", 32, 64)
    assert tile(16, 14336) == ("weight_left", 64, 16)  # 224 instead of 112
    assert tile(16, 32768) == ("weight_left", 128, 16)
    assert tile(128, 4096) == ("x_left", 128, 128)
    assert tile(64, 4096, FP32)[1] == 128


def test_few_blocks_share_many_rows():
    def split(m, nnz, dtype=BF16, block=(64, 64)):
        return tile_for_bsr_linear("dvalues", m, 4096, 4096, block, nnz, dtype).split

    assert split(1 << 16, 1) == 16
    assert split(4096, 1) == 8  # 128 steps of 32 rows
    assert split(4096, 64) == 4  # 256 programs
    assert split(4096, 512) == 1
    assert split(4096, 8, FP32) == 16  # two tiles a block, 256 steps
    assert split(512, 1) == split(1, 1) == split(0, 1) == 1


def test_fp32_precision_follows_the_switch_of_pytorch(device, monkeypatch):
    launches = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: launches.append(kwargs["PRECISION"])

    monkeypatch.setattr(bsr_product, "_bsr_product_kernel", Recorder())
    w, x = BlockSparse.from_dense(torch.ones(16, 16), (16, 16)), torch.ones(2, 16)
    row_order = torch.zeros(1, dtype=torch.int32)
    try:
        for allow in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = allow
            bsr_product.bsr_linear_fwd(
                x, w.values, w.crow, w.col, row_order, None, None, 16, "none", TILE
            )
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert launches == ["ieee", "tf32" if torch.version.hip is None else "ieee"]


def shipped(which, dtype, block, m, **change):
    """The launches of a pass with the tile that ships."""
    return list(variants_blocks._bsr_product(which, dtype, block, m, **change))


def compiled(chosen, *targets):
    """Variants and what the report says of each."""
    work = compile_report.work_of(chosen, targets)
    rows = {row.key: row for row in compile_report.report(work, 1)}
    return [(variant, rows[empty.key]) for variant, empty in work]


@pytest.mark.compiles
@pytest.mark.parametrize("card", CARDS, ids=lambda card: str(card[1]))
def test_kernels_compile_for_every_card(card):
    target = next(name for name, found in compile_report.TARGETS.items() if found == card)
    chosen = [
        *shipped("fwd", BF16, (64, 64), 8),
        *shipped("fwd", BF16, (64, 64), 16),  # the weight on the left, split sums
        *shipped("fwd", FP16, (64, 64), 512),
        *shipped("fwd", FP16, (16, 16), 128),
        *shipped("fwd", FP32, (64, 64), 512),
        *shipped("fwd", FP16, (64, 64), 512, size=4095),
        *shipped("fwd", BF16, (64, 64), 128, tile=BsrTile(128, 128, 32, 4, 8, "pairs")),
        *shipped("dx", BF16, (64, 64), 16),
        *shipped("dx", BF16, (128, 128), 512),
        *shipped("dvalues", BF16, (64, 64), 512),
        *shipped("dvalues", BF16, (128, 128), 4096, nnz=8),  # programs share the rows
    ]
    for variant, row in compiled(chosen, target):
        case = f"{variant.op} {variant.name} {variant.tile}"
        assert row.violations == "", case
        if variant.product and variant.product.copies and target.startswith("sm_"):
            # the pipeline's depth; where products read registers one stage less is stored
            stages = variant.launch.num_stages
            assert stages is not None
            assert row.buffers in (f"{stages} {stages}", f"{stages - 1} {stages - 1}"), case


@pytest.mark.compiles
@pytest.mark.parametrize("target", compile_report.COPY_ENGINES)
def test_copy_engine_brings_tiles_in(target):
    chosen = [
        *shipped("fwd", BF16, (64, 64), 128, tile=BsrTile(64, 128, 64, 4, 4, bulk=True)),
        *shipped("fwd", BF16, (64, 64), 16, tile=BsrTile(64, 16, 64, 4, 4, "weight_left", 1, True)),
        *shipped("dx", BF16, (64, 64), 128, tile=BsrTile(64, 128, 64, 4, 4, bulk=True)),
    ]
    for _, row in compiled(chosen, target):
        assert row.violations == ""
        assert row.copy == "bulk"
        assert row.buffers == ("3 3" if target == "sm_120" else "4 4")
    assert compile_report.work_of(chosen, ["sm_80"]) == []


@pytest.mark.compiles
@pytest.mark.parametrize("form", ["x_left", "weight_left", "vector"])
def test_deep_pipelines_keep_their_depth(form):
    tile = BsrTile(16 if form == "vector" else 64, 1 if form == "vector" else 16, 64, 8, 4, form)
    (variant,) = shipped("fwd", BF16, (64, 64), 16, tile=tile)
    for _, row in compiled([variant], "sm_80", "sm_90"):
        assert row.buffers in ("7 7", "8 8")
        assert row.copy == "16"
        assert row.spills == 0
