"""Gated weights to block-sparse matrices: the same bits as multiplying first and storing then."""

from collections import Counter

import pytest
import torch
from helpers import DTYPES, assert_exact, assert_within_twice, integers, layouts, poisoned
from sgtriton_kernels import BlockSparse, gate_weight
from sgtriton_kernels._triton import INTERPRETED, why_not_triton
from sgtriton_kernels.blocks import expand_gates, gate_layout, gates_to_pattern, weight_to_matrix
from sgtriton_kernels.bsr import validate_index
from sgtriton_kernels.bsr_convert import (
    ConvertTile,
    gated_to_bsr,
    gated_to_bsr_ref,
    tile_for_gated_to_bsr,
)
from sgtriton_kernels.kinds import LOG_ALPHA_LIMIT, OPEN_LOG_ALPHA, eval_gates, open_gates
from test_bsr import patterns
from torch.utils._python_dispatch import TorchDispatchMode

from bench.variants_blocks import gated_to_bsr as gated_to_bsr_variants
from sgtriton.cross_compile import CARDS, compile_for

FIELDS = ("values", "crow", "col", "ccol", "row", "perm", "row_order")
INDEX = FIELDS[1:]
# matrix, block: whole, ragged, sides that are no powers of two, single weights, whole sides
CASES = [
    ((32, 48), (16, 16)),
    ((35, 50), (16, 16)),
    ((33, 31), (16, 31)),
    ((13, 26), (3, 5)),
    ((5, 7), (1, 1)),
    ((5, 7), (5, 1)),
    ((5, 7), (1, 7)),
    ((1, 1), (1, 1)),
]


@pytest.fixture(autouse=True)
def _nan_outputs():
    """Memory that nobody wrote holds NaN: a missed store shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def gates_of(is_open: torch.Tensor, kind: str) -> torch.Tensor:
    """Gates on both sides of what opens them; some closed ones are NaN."""
    spread = torch.rand(is_open.shape)
    if kind == "hard_concrete":
        gate = OPEN_LOG_ALPHA + torch.where(is_open, 1e-3 + 4 * spread, -spread)
    else:
        gate = torch.where(is_open, 0.51 + spread, 0.5 * spread)
    return torch.where(~is_open & (spread < 0.3), float("nan"), gate)


def spoiled(w: torch.Tensor, is_open: torch.Tensor, block, groups: int = 1) -> torch.Tensor:
    """``w`` with NaN and inf where it is closed, and NaN around it."""
    covered = expand_gates(is_open, gate_layout(tuple(w.shape), block, groups))
    wrong = torch.where(torch.rand(w.shape) < 0.5, float("nan"), float("inf"))
    return poisoned(torch.where(covered, w, wrong.to(w.dtype)))


def multiplied_first(w, gate, block, kind, groups=1, impl="torch") -> BlockSparse:
    """The same without this op: the whole weight is multiplied, then open blocks are stored."""
    layout = gate_layout(tuple(w.shape), block, groups)
    pattern = gates_to_pattern(open_gates(gate, kind), layout)
    gate = gate.nan_to_num(-9.0)  # closed in every kind
    kind = "threshold" if kind == "bernoulli" else kind  # so does eval read it
    gated = gate_weight(w, gate, block, groups=groups, kind=kind, impl=impl)
    return BlockSparse.from_dense(weight_to_matrix(gated, layout), layout.block, pattern)


def assert_same(name: str, out: BlockSparse, expected: BlockSparse, fields=FIELDS) -> None:
    assert out.shape == expected.shape
    for field in fields:
        found, wanted = getattr(out, field).cpu(), getattr(expected, field).cpu()
        assert found.dtype == wanted.dtype, f"{name}, {field}: {found.dtype}"
        assert found.is_contiguous(), f"{name}, {field}"
        assert_exact(f"{name}, {field}", found, wanted)
    validate_index(
        out.crow, out.col[: out.nnz],
        nnz=out.nnz, block_rows=out.block_rows, block_cols=out.block_cols,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "block"), CASES, ids=str)
def test_same_bits_as_multiplying_first(shape, block, dtype, device, impl):
    layout = gate_layout(shape, block)
    for number, (name, is_open) in enumerate(patterns(*layout.gate_shape).items()):
        kind = ("threshold", "bernoulli")[number % 2]
        gate = gates_of(is_open, kind)
        w = spoiled(torch.randn(shape).to(dtype), is_open, block)
        out = gated_to_bsr(w.to(device), poisoned(gate.to(device)), block, kind=kind, impl=impl)
        assert out.values.dtype == dtype
        assert out.block == block
        assert out.nnz == int(is_open.sum())
        assert_same(name, out, multiplied_first(w, gate, block, kind))


# weight, block, groups: whole, ragged per group and tap, taps that share gates, one tap
CONVOLUTIONS = [
    ((32, 16, 2, 3), (16, 16), 1),
    ((14, 5, 3), (4, 2), 2),
    ((10, 6, 2, 2), (3, None), 1),
    ((6, 4, 2, 1), (None, 3), 2),
    ((12, 7, 1, 1), (4, 4), 3),
    ((5, 3, 3), (1, 1), 1),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "block", "groups"), CONVOLUTIONS, ids=str)
def test_convolutions_have_the_bits_of_eval(shape, block, groups, dtype, device, impl):
    layout = gate_layout(shape, block, groups)
    for kind, share in (("threshold", 0.4), ("bernoulli", 0), ("hard_concrete", 0.6)):
        is_open = torch.rand(layout.gate_shape) < share
        gate = gates_of(is_open, kind).to(device)
        w = spoiled(torch.randn(shape).to(dtype), is_open, block, groups).to(device)
        out = gated_to_bsr(w, gate, block, groups=groups, kind=kind, impl=impl)
        w = w.nan_to_num(0, 0, 0)  # what is closed
        assert out.block == layout.block
        assert_same(kind, out, multiplied_first(w, gate, block, kind, groups, impl))


def test_order_of_a_convolutions_gates_changes_no_bit(device):
    """A gate's place in memory changes how sigmoid rounds: it is read where eval reads it."""
    w, block, kind = torch.ones(6, 6, 15, device=device), (2, 3), "hard_concrete"
    for _ in range(30):
        gate = torch.randn(3, 2, 15, device=device)
        out = gated_to_bsr(w, gate, block, kind=kind, impl="torch")
        assert_same("ones", out, multiplied_first(w, gate, block, kind))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "block"), [CASES[1], CASES[3], CASES[4]], ids=str)
def test_products_are_within_twice_pytorchs_error(shape, block, dtype, device, impl):
    layout, kind = gate_layout(shape, block), "hard_concrete"
    for name, is_open in patterns(*layout.gate_shape).items():
        gate = gates_of(is_open, kind)
        w = spoiled(torch.randn(shape).to(dtype), is_open, block)
        out = gated_to_bsr(w.to(device), gate.to(device), block, kind=kind, impl=impl)
        plain = multiplied_first(w, gate, block, kind)
        assert_same(name, out, plain, INDEX)
        z = expand_gates(eval_gates(gate.double(), kind), layout)
        exact = BlockSparse.from_dense(torch.where(z > 0, w.double() * z, 0), block, is_open)
        assert_within_twice(name, out.values.cpu(), exact.values, plain.values)
        if impl == "torch":
            assert_exact(name, out.values.cpu(), plain.values)
        elif dtype != torch.float32 and out.nnz:  # to nearest: hardly a bit differs
            assert (out.values.cpu() == plain.values).float().mean() > 0.95, name


@pytest.mark.parametrize("kind", ["threshold", "hard_concrete"])
@pytest.mark.parametrize(("shape", "block"), [CASES[1], CASES[3]], ids=str)
def test_reference_goes_gate_by_gate(shape, block, kind, device, impl):
    gate = torch.rand(gate_layout(shape, block).gate_shape, device=device)
    if kind == "hard_concrete":  # z of 0, or 1: products are exact
        gate = torch.where(gate > 0.5, 5.0, -5.0)
    w = integers(*shape, device=device)
    out = gated_to_bsr(w, gate, block, kind=kind, impl=impl)
    assert_same("reference", out, gated_to_bsr_ref(w, gate, block, kind))


@pytest.mark.parametrize(("shape", "block", "groups"), CONVOLUTIONS, ids=str)
def test_reference_of_a_convolution(shape, block, groups, device, impl):
    gate = torch.rand(gate_layout(shape, block, groups).gate_shape, device=device)
    w = integers(*shape, device=device)
    out = gated_to_bsr(w, gate, block, groups=groups, impl=impl)
    assert_same("reference", out, gated_to_bsr_ref(w, gate, block, groups=groups))


@pytest.mark.parametrize("kind", ["threshold", "bernoulli", "hard_concrete"])
def test_what_opens_a_gate_is_what_eval_says(kind, device, impl):
    border = torch.tensor([0.5, OPEN_LOG_ALPHA]).repeat_interleave(3)
    border[::3] = border[::3].nextafter(torch.tensor(-9.0))
    border[2::3] = border[2::3].nextafter(torch.tensor(9.0))
    far = [float("nan"), float("inf"), float("-inf"), LOG_ALPHA_LIMIT, -LOG_ALPHA_LIMIT, 0.0, -0.0]
    gate = torch.cat([border, torch.tensor(far)])[None].to(device)
    w = torch.full((1, gate.shape[1]), 2.0, device=device)
    out = gated_to_bsr(w, gate, (1, 1), kind=kind, impl=impl)
    is_open = open_gates(gate, kind)
    assert out.col[: out.nnz].tolist() == is_open[0].nonzero()[:, 0].tolist()
    assert (out.values > 0).all()
    z = eval_gates(gate.double(), kind)[is_open]
    plain = 2 * eval_gates(gate, kind)[is_open]
    assert_within_twice("values", out.values.flatten(), 2 * z, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_layouts_do_not_matter(dtype, device, impl):
    (shape, block), kind = CASES[0], "hard_concrete"
    w, gate = torch.randn(shape, device=device).to(dtype), torch.randn(2, 3, device=device) - 2
    gate[0, 1], gate[1, 2] = 3, -9
    expected = gated_to_bsr(w, gate, block, kind=kind, impl=impl)
    assert 0 < expected.nnz < 6
    for name, view in layouts(w).items():
        assert_same(name, gated_to_bsr(view, gate, block, kind=kind, impl=impl), expected)
    for name, view in layouts(gate).items():
        assert_same(name, gated_to_bsr(w, view, block, kind=kind, impl=impl), expected)
    same = w[:1].expand(shape)
    expected = gated_to_bsr(same.contiguous(), gate, block, kind=kind, impl=impl)
    assert_same("expanded", gated_to_bsr(same, gate, block, kind=kind, impl=impl), expected)


def test_sides_may_be_whole_and_fp64_stays(device):
    w, gate = torch.randn(6, 5, dtype=torch.float64, device=device), torch.tensor([[1.0], [0.3]])
    out = gated_to_bsr(w, gate.to(device), (3, None), impl="torch")
    assert out.block == (3, 5)
    assert_exact("values", out.values, w[None, :3])
    gate = torch.tensor([[5.0], [-1.0]], device=device)
    out = gated_to_bsr(w, gate, (3, None), kind="hard_concrete", impl="torch")
    expected = w.view(2, 3, 5) * eval_gates(gate, "hard_concrete")[:, :, None]
    assert_exact("products", out.values, expected)


@pytest.mark.parametrize(
    "tile",
    [ConvertTile(1, 4, 4, 1), ConvertTile(2, 16, 4, 1), ConvertTile(4, 2, 16, 1),
     ConvertTile(8, 1, 1, 1)],
    ids=lambda t: f"{t.GATES} of {t.BLOCK_R}x{t.BLOCK_C}",
)  # fmt: skip
@pytest.mark.parametrize("block", [(5, 6), (7, 1)], ids=str)
def test_any_tile_gives_the_same(tile, block, device):
    if reason := why_not_triton(device):
        pytest.skip(reason)
    w = torch.randn(14, 34, device=device)
    gate = torch.rand(gate_layout((14, 34), block).gate_shape, device=device)
    out = gated_to_bsr(w, gate, block, impl="triton", tile=tile)
    assert_same("tile", out, gated_to_bsr(w, gate, block, impl="torch"))


def test_tiles_fit_the_block():
    for block, expected in (
        ((64, 64), (1, 32, 64)),
        ((16, 16), (8, 16, 16)),
        ((12, 12), (8, 16, 16)),
        ((1, 1), (2048, 1, 1)),
        ((1, None), (1, 1, 2048)),
        ((None, 1), (1, 2048, 1)),
    ):
        tile = tile_for_gated_to_bsr(gate_layout((4096, 4096), block), torch.device("cuda"))
        assert expected == (tile.GATES, tile.BLOCK_R, tile.BLOCK_C), block
        assert tile.num_warps == 4


@pytest.mark.parametrize("kind", ["threshold", "hard_concrete"])
def test_matrix_is_detached_and_has_memory_of_its_own(kind, device, impl):
    w = torch.ones(4, 4, device=device, requires_grad=True)
    gate = torch.full((2, 2), 5.0, device=device, requires_grad=True)
    out = gated_to_bsr(w, gate, (2, 2), kind=kind, impl=impl)
    assert not out.values.requires_grad
    with torch.no_grad():
        w.zero_()
    assert_exact("values", out.values, torch.ones(4, 2, 2))


class Calls(TorchDispatchMode):
    """Counts the library's calls."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket._qualified_op_name] += 1
        return func(*args, **kwargs or {})


# calls for which the host waits until a card has computed
WAITS = {f"aten::{name}" for name in ("_local_scalar_dense", "nonzero", "bincount", "equal")}


def calls(run) -> Counter:
    with Calls() as mode:
        run()
    return mode.counts


def test_no_loop_over_blocks_and_one_wait(device, impl):
    if impl == "triton" and INTERPRETED:
        pytest.skip("the interpreter copies arguments")
    counts = []
    for size in (32, 64):
        w = torch.ones(size, size, device=device)
        gate = torch.ones(size // 4, size // 4, device=device)
        gated_to_bsr(w, gate, (4, 4), impl=impl)
        counts.append(calls(lambda w=w, gate=gate: gated_to_bsr(w, gate, (4, 4), impl=impl)))
    assert counts[0] == counts[1]
    assert sum(counts[0][name] for name in WAITS) == 1


def test_dense_and_back_take_no_loop_over_blocks(device):
    counts = []
    for size in (8, 32):
        w = torch.ones(size, size, device=device)
        is_open = torch.ones(size // 4, size // 4, dtype=torch.bool, device=device)
        matrix = BlockSparse.from_dense(w, (4, 4), is_open)
        made = calls(lambda w=w, is_open=is_open: BlockSparse.from_dense(w, (4, 4), is_open))
        counts.append((made, calls(matrix.to_dense)))
        assert sum(made[name] for name in WAITS) == 1
        assert not any(counts[-1][1][name] for name in WAITS)
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": torch.ones(4)}, r"has at least 2 dimensions, got shape \(4,\)"),
        ({"w": torch.ones(0, 4)}, r"w must hold at least one weight, got \(0, 4\)"),
        ({"groups": 3}, "groups must divide the 4 output channels, got 3"),
        ({"w": torch.ones(4, 4, dtype=torch.int32)}, "w must be one of .* got torch.int32"),
        ({"w": torch.ones(4, 4, device="meta")}, "must hold data, got meta"),
        ({"gate": torch.ones(2, 3)}, r"gate of a weight .* shape \(2, 2\), got \(2, 3\)"),
        ({"gate": torch.ones(2, 2, dtype=torch.float16)}, "gate must be torch.float32"),
        ({"gate": torch.ones(2, 2, device="meta")}, "must share a device, got cpu and meta"),
        ({"block": (2, 0)}, r"block sides must be integers >= 1 .* got \(2, 0\)"),
        ({"block": 2}, "block must be a pair"),
        ({"kind": "open"}, "gate kind must be one of .* got 'open'"),
        ({"impl": "cuda"}, "implementation must be one of"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_what_does_not_fit_is_refused(change, message):
    given = {"w": torch.ones(4, 4), "gate": torch.ones(2, 2), "block": (2, 2)}
    assert gated_to_bsr(**given).nnz == 4
    with pytest.raises(ValueError, match=message):
        gated_to_bsr(**given | change)


def test_kernels_have_no_fp64(device, impl):
    w, gate = torch.ones(2, 2, dtype=torch.float64, device=device), torch.ones(1, 1, device=device)
    if impl == "torch":
        assert gated_to_bsr(w, gate, (2, 2), impl=impl).values.dtype == torch.float64
    else:
        with pytest.raises(ValueError, match="fp64 is for the torch implementation"):
            gated_to_bsr(w, gate, (2, 2), impl=impl)


@pytest.mark.compiles
@pytest.mark.parametrize("card", CARDS, ids=lambda card: str(card[1]))
def test_kernels_compile_for_every_card(card):
    found = {repr(variant.launch): variant for variant in gated_to_bsr_variants()}
    assert {variant.op for variant in found.values()} == {"gated_to_bsr count", "gated_to_bsr copy"}
    for variant in found.values():
        launch = variant.launch
        code = compile_for(
            card, launch.function(), launch.signature, launch.constexprs, launch.num_warps
        )
        assert code.spills == 0, variant
        if card[0] == "cuda" and variant.wide is not None:
            assert code.accesses.count(16) >= variant.wide, variant
