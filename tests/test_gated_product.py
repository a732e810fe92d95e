"""Products with a gated weight: values, hostile memory, and what the compiler makes of them."""

import re
from dataclasses import astuple

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_exact, assert_within_twice, integers, layouts, poisoned
from sgtriton_kernels import gated_product
from sgtriton_kernels._triton import INTERPRETED, why_not_triton
from sgtriton_kernels.blocks import expand_gates, gate_layout, sum_blocks
from sgtriton_kernels.gate_bits import open_lists, pack_gates
from sgtriton_kernels.gated_product import fused_dw, fused_dx, fused_fwd, skip_dw, skip_dx, skip_fwd
from sgtriton_kernels.tiles import GatedTile, tile_for_gated_linear

from sgtriton.cross_compile import CARDS, compile_for

TILE = GatedTile(BLOCK_N=16, BLOCK_M=16, BLOCK_K=16, num_stages=1, num_warps=1)
# a tile wider than a word of bits
WIDE = GatedTile(BLOCK_N=16, BLOCK_M=16, BLOCK_K=64, num_stages=1, num_warps=1)
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
# dtype of x, of the weight
DTYPES = [(FP32, FP32), (FP16, FP16), (BF16, BF16), (BF16, FP32), (FP16, FP32), (FP32, BF16)]
# M, N, K: ragged everywhere, one tile, many tiles, one of each
SHAPES = [(5, 40, 70), (16, 16, 16), (37, 64, 96), (1, 1, 1)]
EMPTY = [(0, 32, 48), (3, 0, 48), (3, 32, 0)]
# a gate per weight; sides below, at and above the tile's; sides that divide nothing
BLOCKS = [(1, 1), (4, 4), (16, 16), (32, 32), (32, 16), (3, 5), (1, 1000), (48, 16)]
SKIPPED = [(16, 16), (32, 32), (32, 16), (16, 64), (64, 128)]


@pytest.fixture(autouse=True)
def _nan_outputs(device, request):
    """Memory that nobody wrote holds NaN: a missed store shows."""
    compiles = request.node.get_closest_marker("compiles")
    if not compiles and (reason := why_not_triton(device)):
        pytest.skip(reason)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


class Case:
    """One layer's tensors, and what fp64 makes of them."""

    def __init__(self, shape, block, dtypes, device, make=integers):
        m, n, k = shape
        x_dtype, w_dtype = dtypes
        self.layout = gate_layout((n, k), block)
        self.block = self.layout.block
        gate = torch.rand(self.layout.gate_shape, device=device)
        if gate.numel() > 1:
            gate.view(-1)[0], gate.view(-1)[-1] = 0, 1
        self.bits = pack_gates(gate)
        self.blocks = open_lists(self.bits, gate.shape[1])
        self.open = gate > 0.5
        self.mask = expand_gates(self.open, self.layout)
        self.x = make(m, k, device=device).to(x_dtype)
        self.dy = make(m, n, device=device).to(x_dtype)
        self.w = make(n, k, device=device).to(w_dtype)
        self.bias = make(n, device=device).to(x_dtype)
        gated = torch.where(self.mask, self.w.double(), 0)
        d = self.dy.double().T @ self.x.double()
        self.y64 = F.linear(self.x.double(), gated, self.bias.double())
        self.dx64 = self.dy.double() @ gated
        self.dw64 = torch.where(self.mask, d, 0)
        self.dgate64 = sum_blocks(d * self.w.double(), self.layout)

    def fwd(self, tile=TILE, skip=False, bias=True):
        bias = self.bias if bias else None
        if skip:
            return skip_fwd(self.x, self.w, self.blocks, self.block, bias, tile)
        return fused_fwd(self.x, self.w, self.bits, self.block, bias, tile)

    def dx(self, tile=TILE, skip=False):
        if skip:
            return skip_dx(self.dy, self.w, self.blocks, self.block, tile)
        return fused_dx(self.dy, self.w, self.bits, self.block, tile)

    def dw(self, tile=TILE, skip=False, need_dgate=True):
        launch = skip_dw if skip else fused_dw
        return launch(self.dy, self.x, self.w, self.bits, self.block, need_dgate, tile)

    def check(self, tile=TILE, skip=False, name=""):
        """Every launcher is exact."""
        y = self.fwd(tile, skip)
        assert (y.dtype, y.is_contiguous()) == (self.x.dtype, True)
        assert_exact(f"{name} y", y, self.y64)
        dx = self.dx(tile, skip)
        assert (dx.dtype, dx.is_contiguous()) == (self.dy.dtype, True)
        assert_exact(f"{name} dx", dx, self.dx64)
        dw, dgate = self.dw(tile, skip)
        assert (dw.dtype, dw.is_contiguous()) == (self.w.dtype, True)
        assert_exact(f"{name} dw", dw, self.dw64)
        assert (dgate.dtype, dgate.is_contiguous()) == (torch.float32, True)
        expected = torch.where(self.open, self.dgate64, 0) if skip else self.dgate64
        assert_exact(f"{name} dgate", dgate, expected)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gate_per_weight_is_exact(shape, dtypes, device):
    if not INTERPRETED and shape[1] % 16 == 0 and FP16 in dtypes:
        pytest.skip("the ragged shapes and the interpreter cover it")
    Case(shape, (1, 1), dtypes, device).check()


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_block_is_exact(shape, block, device):
    if not INTERPRETED and (shape[1] % 16 == 0 or block not in ((4, 4), (3, 5), (32, 16))):
        pytest.skip("the other cases and the interpreter cover it")
    Case(shape, block, (FP32, FP32), device).check()


@pytest.mark.parametrize("shape", EMPTY, ids=str)
@pytest.mark.parametrize("block", [(1, 1), (32, 16)], ids=str)
def test_sizes_of_zero(shape, block, device):
    case = Case(shape, block, (FP32, FP32), device)
    case.check()
    if block != (1, 1):
        case.check(skip=True)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 40, 70), (37, 64, 96)], ids=str)
def test_skipping_is_exact(shape, dtypes, device):
    if not INTERPRETED and shape[1] == 64 and FP16 in dtypes:
        pytest.skip("the ragged shape and the interpreter cover it")
    Case(shape, (16, 32), dtypes, device).check(skip=True)


@pytest.mark.parametrize("block", SKIPPED, ids=str)
@pytest.mark.parametrize("shape", [(5, 40, 70), (16, 16, 16), (33, 128, 192), (1, 1, 1)], ids=str)
def test_skipping_serves_every_block(shape, block, device):
    if not INTERPRETED and (shape[1] < 128 or 16 in block):
        pytest.skip("other tests and the interpreter cover it")
    Case(shape, block, (FP32, FP32), device).check(skip=True)


def test_skipping_with_the_weight_as_left_operand(device):
    tile = GatedTile(BLOCK_N=64, BLOCK_M=16, BLOCK_K=64, num_stages=1, num_warps=1)
    if not INTERPRETED:
        pytest.skip("a large tile for a CPU's compiler")
    for dtypes in ((FP32, FP32), (BF16, FP32), (FP16, FP16)):
        Case((19, 128, 200), (64, 64), dtypes, device).check(tile, skip=True)


@pytest.mark.parametrize("block", [(1, 1), (4, 4), (3, 5), (2, 3), (1, 1000)], ids=str)
def test_tiles_wider_than_a_word_of_bits(block, device):
    if not INTERPRETED:
        pytest.skip("a large tile for a CPU's compiler")
    Case((5, 20, 150), block, (FP32, FP32), device).check(WIDE)


@pytest.mark.parametrize("side", range(1, 40))
def test_words_of_a_tile_are_enough(side):
    for tile in (16, 32, 64, 128):
        words = gated_product._words(side, tile)
        spans = [(k + tile - 1) // side // 32 - k // side // 32 for k in range(0, 128 * tile, tile)]
        assert words >= max(spans) + 1
        assert words <= max(spans) + 2  # and not far more


@pytest.mark.parametrize("skip", [False, True], ids=["fused", "skip"])
@pytest.mark.parametrize("share", [0.0, 1.0], ids=["closed", "open"])
def test_all_closed_and_all_open(share, skip, device):
    case = Case((5, 40, 70), (16, 16), (FP32, FP32), device)
    gate = torch.full(case.layout.gate_shape, share, device=device)
    case.bits, case.open = pack_gates(gate), gate > 0.5
    case.blocks = open_lists(case.bits, gate.shape[1])
    gated = case.w.double() * share
    d = case.dy.double().T @ case.x.double()
    case.y64 = F.linear(case.x.double(), gated, case.bias.double())
    case.dx64, case.dw64 = case.dy.double() @ gated, d * share
    case.check(skip=skip)


@pytest.mark.parametrize("dtypes", [(FP32, FP32), (FP16, FP16), (BF16, BF16)], ids=str)
@pytest.mark.parametrize("skip", [False, True], ids=["fused", "skip"])
def test_error_is_within_twice_that_of_pytorch(dtypes, skip, device):
    case = Case((37, 64, 96), (16, 32) if skip else (1, 1), dtypes, device, torch.randn)
    gated = torch.where(case.mask, case.w, 0)
    assert_within_twice("y", case.fwd(skip=skip), case.y64, F.linear(case.x, gated, case.bias))
    assert_within_twice("dx", case.dx(skip=skip), case.dx64, case.dy @ gated)
    dw, dgate = case.dw(skip=skip)
    d = case.dy.T @ case.x
    assert_within_twice("dw", dw, case.dw64, torch.where(case.mask, d, 0))
    d = case.dy.float().T @ case.x.float()
    dgate64, torch_dgate = case.dgate64, sum_blocks(d * case.w.float(), case.layout)
    if skip:
        dgate64, torch_dgate = (torch.where(case.open, t, 0) for t in (dgate64, torch_dgate))
    assert_within_twice("dgate", dgate, dgate64, torch_dgate)


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_wide_weights_are_rounded_as_by_a_cast(dtype, device):
    case = Case((16, 32, 16), (1, 1), (dtype, FP32), device, torch.randn)
    # one product for each output: nothing but the cast rounds
    case.x = torch.eye(16, device=device).to(dtype)
    gated = torch.where(case.mask, case.w, 0)
    assert_exact("y", case.fwd(bias=False), gated.to(dtype).T)
    case.dy = torch.eye(16, 32, device=device).to(dtype)
    assert_exact("dx", case.dx(), gated[:16].to(dtype))


@pytest.mark.parametrize("skip", [False, True], ids=["fused", "skip"])
def test_memory_layouts_do_not_matter(skip, device):
    case = Case((6, 40, 70), (16, 16) if skip else (1, 1), (FP32, FP32), device)
    for name in ("x", "dy", "w"):
        given = getattr(case, name)
        for layout, view in layouts(given).items():
            kept = view.clone()
            setattr(case, name, view)
            case.check(skip=skip, name=f"{name} {layout}")
            assert_exact("untouched", view, kept)
        setattr(case, name, given)
    case.bias = case.bias.repeat_interleave(2)[::2]
    assert_exact("bias", case.fwd(skip=skip), case.y64)


@pytest.mark.parametrize("which", ["row", "column"])
def test_expanded_inputs(which, device):
    case = Case((6, 32, 48), (1, 1), (FP32, FP32), device)
    for name in ("x", "dy"):
        t = getattr(case, name)
        setattr(case, name, (t[:1] if which == "row" else t[:, :1]).expand_as(t))
    gated = torch.where(case.mask, case.w, 0).double()
    d = case.dy.double().T @ case.x.double()
    case.y64 = F.linear(case.x.double(), gated, case.bias.double())
    case.dx64, case.dw64 = case.dy.double() @ gated, torch.where(case.mask, d, 0)
    case.dgate64 = d * case.w.double()
    case.check()


@pytest.mark.parametrize("block", [(1, 1), (4, 4), (16, 32)], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_what_a_closed_weight_holds_is_never_used(block, value, device):
    case = Case((5, 40, 70), block, (FP32, FP32), device)
    case.w = poisoned(torch.where(case.mask, case.w, value))
    for skip in (False, True) if block == (16, 32) else (False,):
        assert_exact("y", case.fwd(skip=skip), case.y64)
        assert_exact("dx", case.dx(skip=skip), case.dx64)
        assert_exact("dw", case.dw(skip=skip)[0], case.dw64)
        assert_exact("dw", case.dw(skip=skip, need_dgate=False)[0], case.dw64)
    if block == (16, 32):
        dgate = case.dw(skip=True)[1]
        assert_exact("dgate", dgate, torch.where(case.open, case.dgate64, 0))


def test_infinite_gradients_stay_out_of_closed_weights(device):
    case = Case((5, 40, 70), (1, 1), (FP32, FP32), device)
    case.dy = torch.full_like(case.dy, float("inf"))
    dw, _ = case.dw()
    assert (dw[~case.mask] == 0).all()
    assert not dw[case.mask].isfinite().all()


def test_gradient_of_the_gates_may_be_left_out(device):
    case = Case((5, 40, 70), (16, 16), (FP32, FP32), device)
    for skip in (False, True):
        dw, dgate = case.dw(skip=skip, need_dgate=False)
        assert_exact("dw", dw, case.dw64)
        assert dgate.shape == (0,)


def test_bias_may_be_missing_or_wide(device):
    case = Case((5, 40, 70), (1, 1), (FP32, FP32), device)
    assert_exact("none", case.fwd(bias=False), case.y64 - case.bias.double())
    case.bias = case.bias.half()
    assert_exact("fp16", case.fwd(), case.y64)


def test_repeats_are_bitwise_equal(device):
    case = Case((37, 64, 96), (64, 96), (FP32, FP32), device, torch.randn)
    first = case.dw()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(case.dw(), first, strict=True))


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_pipeline_depth_does_not_change_values(stages, device):
    if not INTERPRETED and stages % 2:
        pytest.skip("the others and the interpreter cover it")
    tile = GatedTile(16, 16, 16, stages, 1)
    Case((37, 64, 96), (1, 1), (FP32, FP32), device).check(tile)
    Case((37, 64, 96), (16, 16), (FP32, FP32), device).check(tile, skip=True)


@pytest.mark.parametrize("native", [False, True])
def test_default_tiles_give_right_values(native, device):
    if not INTERPRETED and not native:
        pytest.skip("large tiles for a CPU's compiler")
    m, n, k = 20, 100, 130
    for block, skip in (((1, 1), False), ((64, 64), True), ((None, 16), True)):
        case = Case((m, n, k), block, (FP32, FP32), device)
        prefix = "skip_" if skip else ""
        fwd, dx, dw = (
            tile_for_gated_linear(prefix + which, m, n, k, FP32, FP32, case.block, native=native)
            for which in ("fwd", "dx", "dw")
        )
        assert_exact("y", case.fwd(fwd, skip), case.y64)
        assert_exact("dx", case.dx(dx, skip), case.dx64)
        assert_exact("dw", case.dw(dw, skip)[0], case.dw64)


PASSES = ("fwd", "dx", "dw")
SIDES = (16, 32, 64, 128, 256)


def shipped(which, dtypes):
    """Rows of ``x`` and blocks that give every tile of a pass."""
    blocks = [(1, 1)]
    if which.startswith("skip"):
        blocks = [(a, b) for a in SIDES for b in SIDES]
    found = {}
    for m in (0, 1, 16, 17, 64, 65, 1 << 20):
        for block in blocks:
            tile = tile_for_gated_linear(which, m, 4096, 4096, dtypes[1], dtypes[0], block)
            found.setdefault(tile, (m, block))
    return found


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_tiles_are_legal(dtypes):
    for which in (*PASSES, *(f"skip_{p}" for p in PASSES)):
        for tile, (_, block) in shipped(which, dtypes).items():
            for side in (tile.BLOCK_N, tile.BLOCK_M, tile.BLOCK_K):
                assert side in (16, 32, 64, 128)
            if which.startswith("skip"):
                assert block[0] >= tile.BLOCK_N
                assert block[1] >= tile.BLOCK_K
            assert 2 <= tile.num_stages <= 4


def compiled(card, which, dtypes, tile, block, aligned=True, need_dgate=True):
    """A pass with one tile for ``card``, in a layer much larger than block and tile."""
    skip, which = which.startswith("skip_"), which.removeprefix("skip_")
    size = 1 << 20
    block, (block_n, block_k) = gated_product._sides(tile, block, (size, size), skip)
    kernel = gated_product._gated_product_kernel
    if which == "dw":
        kernel = gated_product._gated_dw_kernel
    name = {FP32: "*fp32", FP16: "*fp16", BF16: "*bf16"}
    x, w = (name[dtype] for dtype in dtypes)
    types = {
        "x_ptr": x, "dy_ptr": x, "bias_ptr": x, "out_ptr": x, "w_ptr": w, "dw_ptr": w,
        "bits_ptr": "*i32", "count_ptr": "*i32", "index_ptr": "*i32", "dgate_ptr": "*fp32",
    }  # fmt: skip
    values = {
        "TRANSPOSED": which == "dx", "SKIP": skip, "HAS_BIAS": which == "fwd",
        "WEIGHT_LEFT": gated_product._weight_left(
            skip, which == "dx", block_k if which == "dx" else block_n
        ),
        "ALIGNED_X": aligned, "ALIGNED_W": aligned, "ALIGNED_DY": aligned, "ALIGNED_OUT": aligned,
        "SOFT_BF16": False, "SOFT_DW": False, "PRECISION": "ieee", "BN": block[0], "BK": block[1],
        "NEED_DGATE": need_dgate, "SUM_N": gated_product._summed(block[0], size, block_n),
        "SUM_K": gated_product._summed(block[1], size, block_k),
        "WORDS": gated_product._words(block[1], block_k),
        "BLOCK_M": tile.BLOCK_M, "BLOCK_N": block_n, "BLOCK_K": block_k,
    }  # fmt: skip
    signature = {a: types.get(a, "i32") for a in kernel.arg_names if a not in values}
    values = {a: v for a, v in values.items() if a in kernel.arg_names}
    return compile_for(
        card, kernel, signature, values, tile.num_warps, tile.num_stages, tile.max_registers
    )


def left_operand_is_in_shared_memory(code) -> bool:
    """Whether a matrix instruction of Hopper or Blackwell reads its left operand from there."""
    if code.matrix_instruction == "wgmma":  # {sums}, {registers} or a descriptor, ...
        operands = re.findall(r"wgmma\.mma_async[^{]*\{[^}]*\}\s*,\s*(.)", code.assembly)
    else:  # [sums], [tensor memory] or a descriptor, ...
        operands = re.findall(r"tcgen05\.mma\.[^\[]*\[[^\]]*\]\s*,\s*(.)", code.assembly)
    assert operands
    return any(first not in "{[" for first in operands)


EXPECTED = {
    80: "mma.sync", 86: "mma.sync", 89: "mma.sync", 90: "wgmma", 100: "tcgen05.mma",
    120: "mma.sync", "gfx942": "v_mfma", "gfx1100": "v_wmma",
}  # fmt: skip


def keeps_its_depth(code, tile):
    """Whether both operands are in the pipeline; products of registers store one stage less."""
    return code.buffers in ((tile.num_stages,) * 2, (tile.num_stages - 1,) * 2)


@pytest.mark.compiles
@pytest.mark.parametrize("card", CARDS, ids=lambda card: str(card[1]))
@pytest.mark.parametrize("which", PASSES)
def test_fused_kernels_compile_for(which, card):
    for dtypes in ((BF16, BF16), (BF16, FP32), (FP32, FP32)):
        for tile in shipped(which, dtypes):
            code = compiled(card, which, dtypes, tile, (1, 1))
            case = f"{dtypes} {astuple(tile)}: {code.registers} registers, {code.shared} bytes"
            assert code.spills == 0, case
            assert code.shared <= (64 if card[0] == "hip" else 99) * 1024, case
            if dtypes[0] == FP32:
                continue
            assert code.matrix_instruction == EXPECTED[card[1]], case
            if which != "dw" and card[1] in (90, 100):
                assert not left_operand_is_in_shared_memory(code), case
            if which != "dw" and card[0] == "cuda":
                # the operands, one stage of them in flight, and a word of bits a row and stage
                x, w = dtypes
                out, depth = tile.BLOCK_N, tile.BLOCK_K
                words = out
                if which == "dx":
                    out, depth = depth, out
                    words = depth * max(1, out // 32)
                stage = (out * w.itemsize + tile.BLOCK_M * x.itemsize) * depth + 4 * words
                epilogue = tile.BLOCK_M * out * 2
                assert code.shared <= max(stage * (tile.num_stages + 1), epilogue) + 64, case
            if which == "dw" and card[0] == "cuda":
                assert keeps_its_depth(code, tile), (case, code.buffers)


@pytest.mark.compiles
@pytest.mark.parametrize("card", CARDS, ids=lambda card: str(card[1]))
def test_gates_of_blocks_compile_for(card):
    for which in PASSES:
        for block, dtypes in (((64, 64), (BF16, FP32)), ((4, 4), (FP16, FP16))):
            tile = tile_for_gated_linear(which, 512, 4096, 4096, dtypes[1], dtypes[0], block)
            code = compiled(card, which, dtypes, tile, block)
            assert code.spills == 0, (which, block)
            assert code.matrix_instruction == EXPECTED[card[1]], (which, block)
            if which != "dw" and card[1] in (90, 100):
                assert not left_operand_is_in_shared_memory(code), (which, block)


@pytest.mark.compiles
@pytest.mark.parametrize("card", CARDS, ids=lambda card: str(card[1]))
@pytest.mark.parametrize("which", [f"skip_{p}" for p in PASSES])
def test_skipping_kernels_compile_for(which, card):
    for m, block, dtypes in (
        (1, (16, 16), (FP16, FP16)), (512, (16, 16), (BF16, BF16)), (1, (64, 64), (BF16, FP32)),
        (512, (64, 64), (BF16, BF16)), (512, (128, 128), (BF16, BF16)),
        (512, (128, 128), (BF16, FP32)), (512, (64, 64), (FP32, FP32)),
    ):  # fmt: skip
        tile = tile_for_gated_linear(which, m, 4096, 4096, dtypes[1], dtypes[0], block)
        code = compiled(card, which, dtypes, tile, block)
        case = f"{block} {dtypes} {astuple(tile)}: {code.registers} registers, {code.shared} bytes"
        assert code.spills == 0, case
        assert code.shared <= (64 if card[0] == "hip" else 99) * 1024, case
        if dtypes[0] != FP32:
            assert code.matrix_instruction, case
        if card[0] == "cuda" and which != "skip_dw":
            # the pipeline's depth; where products read registers one stage less is stored
            side = tile.BLOCK_N if which == "skip_fwd" else tile.BLOCK_K
            depth = tile.BLOCK_K if which == "skip_fwd" else tile.BLOCK_N
            stage = (side * dtypes[1].itemsize + tile.BLOCK_M * dtypes[0].itemsize) * depth
            assert code.shared >= (tile.num_stages - 1) * stage, case
        if card[0] == "cuda" and which == "skip_dw":
            assert keeps_its_depth(code, tile), (case, code.buffers)


@pytest.mark.compiles
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_every_pipeline_depth_compiles(stages):
    for which, tile in (
        ("fwd", GatedTile(128, 128, 32, stages, 8)), ("skip_fwd", GatedTile(64, 64, 64, stages, 4)),
        ("dx", GatedTile(32, 64, 128, stages, 8)), ("dw", GatedTile(128, 32, 64, stages, 8)),
    ):  # fmt: skip
        block = (64, 64) if which == "skip_fwd" else (1, 1)
        code = compiled(("cuda", 90, 32), which, (BF16, BF16), tile, block)
        assert code.spills == 0, which
        assert code.matrix_instruction == "wgmma", which


@pytest.mark.compiles
def test_any_stride_compiles_without_spills():
    for which in PASSES:
        tile = tile_for_gated_linear(which, 512, 4096, 4096, FP16, FP16, (1, 1), aligned=False)
        code = compiled(("cuda", 80, 32), which, (FP16, FP16), tile, (1, 1), aligned=False)
        assert code.spills == 0, which
        assert code.matrix_instruction, which
