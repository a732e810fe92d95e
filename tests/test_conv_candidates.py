"""Named ways to compute convolutions: each gives the convolution; which is taken, by whose word."""

import dataclasses
import itertools
import json
import random

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_exact, integers
from sgtriton_kernels import BlockSparse, bsr_conv1d, lookup, records
from sgtriton_kernels import conv_blocks as kept
from sgtriton_kernels import conv_candidates as module
from sgtriton_kernels._triton import INTERPRETED
from sgtriton_kernels.blocks import gate_layout, weight_to_matrix
from sgtriton_kernels.bsr_conv_passes import conv_blocks, conv_bwd
from sgtriton_kernels.candidate import ANALYTIC, cut
from sgtriton_kernels.candidates import candidates, named
from sgtriton_kernels.conv_arguments import geometry_of
from sgtriton_kernels.conv_cell import CONV_OPS, ConvCell
from sgtriton_kernels.conv_choice import conv_cell_of
from sgtriton_kernels.conv_geometry import ConvGeometry
from sgtriton_kernels.lookup import analytic, choose, full_key, tell
from sgtriton_kernels.tiles import BsrTile, tile_for_bsr_conv
from test_bsr_conv import GEOMETRIES, Case, identifier

from sgtriton.tune_cache import write_record

CPU = torch.device("cpu")
GEOMETRY = ConvGeometry(64, 128, (3, 3), (1, 1), (1, 1), (1, 1))
CELL = ConvCell(
    "bsr_conv fwd", "torch", 8 * 28 * 28, 128, 576, (32, 32), 20, torch.float32, longest=6,
    geometry=GEOMETRY, images=8, size=(28, 28), channels_last=False,
)  # fmt: skip
# what an interpreter computes in time: ragged channels of two blocks, two taps
SMALL = {"channels": (20, 20), "kernel": (1, 2), "size": (2, 3), "images": 1, "stride": (1, 2),
         "padding": (0, 1), "share": 0.2}  # fmt: skip
CARD = dataclasses.replace(CELL, impl="triton", dtype=torch.bfloat16)


def geometry_of_case(case):
    options, sizes = case.options, case.sizes
    return geometry_of(
        case.x.shape[1], sizes["out_channels"], sizes["kernel_size"], options["stride"],
        options["padding"], options["dilation"], options["groups"], 2,
    )  # fmt: skip


def each_once(found):
    """Those that differ where blocks are 16x16 and nothing is pipelined."""
    kept = {}
    for candidate in found:
        tile = candidate.tile
        if INTERPRETED and tile is not None:
            tile = min(16, tile.BLOCK_N), min(16, tile.BLOCK_K), tile.BLOCK_M, tile.split
        kept.setdefault(tile or candidate.name, candidate)
    return list(kept.values())


@pytest.mark.native
@pytest.mark.parametrize("geometry", [*GEOMETRIES, SMALL], ids=identifier)
def test_every_candidate_gives_the_convolution(geometry, impl, device):
    if impl == "triton" and geometry != SMALL:
        pytest.skip("the tests of the kernels cover it")
    formats = (torch.contiguous_format, torch.channels_last)
    for memory_format in formats[: 1 if impl == "triton" else 2]:
        case = Case(device=device, **geometry)
        case.x = case.x.contiguous(memory_format=memory_format)
        known = named("bsr_conv fwd", impl, impl == "triton" and not INTERPRETED)
        for name in known:
            out = case.out(impl, tile=name)
            assert_exact(name, out, case.torch_out())
            assert out.is_contiguous(memory_format=memory_format)


@pytest.mark.native
@pytest.mark.parametrize(
    "geometry", [*(GEOMETRIES[i] for i in (0, 1, 5, 7)), SMALL], ids=identifier
)
def test_every_candidate_of_backward_gives_the_gradient(geometry, impl, device):
    if impl == "triton" and geometry != SMALL:
        pytest.skip("the tests of the kernels cover it")
    case = Case(device=device, **geometry)
    shape, w = geometry_of_case(case), case.w
    dout = integers(*case.torch_out().shape, device=device)
    dx, dvalues, _ = case.torch_grads(dout)
    by_dx, by_dvalues = (
        each_once(named(f"bsr_conv {which}", impl, impl == "triton" and not INTERPRETED).values())
        for which in ("dx", "dvalues")
    )
    for one, other in itertools.zip_longest(by_dx, by_dvalues):
        found = conv_bwd(dout, case.x, w.values, w, shape, impl, one, other)
        for name, grad, by, expected in zip(
            ("dx", "dvalues"), found, (one, other), (dx, dvalues), strict=True
        ):
            if by is None:
                assert grad is None
            else:
                assert_exact(f"{name} {by.name}", grad, expected)
    if impl == "torch":  # each by another way
        one, other = by_dx
        found = conv_bwd(dout, case.x, w.values, w, shape, impl, one, other)
        for grad, expected in zip(found, (dx, dvalues), strict=True):
            assert_exact("both", grad, expected)


def test_every_candidate_gives_the_convolution_of_one_axis(impl, device):
    layout = gate_layout((36, 20, 3), (16, 16), 2)
    weight = integers(36, 20, 3, device=device)
    known = named("bsr_conv fwd", impl, impl == "triton" and not INTERPRETED)
    matrix = weight_to_matrix(weight, layout)
    w = BlockSparse.from_dense(matrix, layout.block)
    x, bias = integers(3, 40, 19, device=device), integers(36, device=device)
    given = {"stride": 2, "padding": 2, "dilation": 2, "groups": 2}
    expected = F.conv1d(x, weight, bias, **given)
    for name in known if impl == "torch" else ("unpack",):
        out = bsr_conv1d(x, w, bias, **given, out_channels=36, kernel_size=3, tile=name, impl=impl)
        assert_exact(name, out, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dense_convolution_of_16_bits_is_the_librarys(dtype, impl, device):
    case = Case(dtype=dtype, device=device)
    assert_exact("out", case.out(impl, tile="unpack", activation="relu"), case.torch_out().relu())


def test_names_are_the_only_thing_that_is_looked_up():
    for op, impl, native in itertools.product(CONV_OPS, ("triton", "torch"), (False, True)):
        found = named(op, impl, native)
        assert len(found) > 1
        for name, candidate in found.items():
            assert name == candidate.name
            assert candidate.tile is None or candidate.tile.name == name
        if impl == "triton":
            assert "unpack" in found
        else:
            assert "dense" in found


def test_only_what_serves_is_offered_and_no_tile_twice():
    for block, op, aligned, dtype, size in itertools.product(
        ((16, 16), (64, 64), (128, 32)), CONV_OPS, (True, False),
        (torch.float32, torch.bfloat16), ((4, 4), (56, 56)),
    ):  # fmt: skip
        cell = dataclasses.replace(
            CARD, op=op, block=block, aligned=aligned, dtype=dtype, size=size,
            M=8 * size[0] * size[1],
        )  # fmt: skip
        found = candidates(cell)
        tiles = [c.tile for c in found if c.tile is not None]
        launched = [cut(tile, cell) for tile in tiles]
        assert len(set(launched)) == len(launched) > 0
        small = dtype == torch.float32 or not aligned
        assert not small or all(module.is_small(op, tile) for tile in launched)
        assert {c.name for c in found} <= set(named(op, "triton", False))


def test_tiles_for_a_cpu_that_would_be_the_same_are_one():
    cell = dataclasses.replace(CARD, block=(16, 16), native=True)
    assert [c.name for c in candidates(cell)] == [
        "x_left_n16_m16_k16_s1_w1", "x_left_n16_m4_k16_s1_w1", "unpack",
    ]  # fmt: skip


def test_ways_that_would_be_the_same_are_one():
    # one image, few outputs: one band, and all blocks in one batch
    few = dataclasses.replace(CELL, images=1, size=(6, 6), M=36, nnz=4)
    assert [c.name for c in candidates(few)] == ["dense", "loop", "batches"]
    many = [c.name for c in candidates(dataclasses.replace(CELL, images=64, M=64 * 784))]
    # of batches of one block a loop does the same, and copies less
    assert many == ["dense", "loop", "loop_4k", "loop_64k", "batches_4m"]
    half = dataclasses.replace(few, dtype=torch.bfloat16)
    assert "unpack" in [c.name for c in candidates(half)]


def taken_before(cell):
    """The rule before there were candidates, in its own words."""
    g, (height, width), (bn, bk) = cell.geometry, cell.out_size, cell.block
    outputs = cell.images * height * width
    met = g.in_channels // g.groups * g.kernel[0] * g.kernel[1]
    dense = outputs * met * g.out_channels
    if g.in_channels < 8 * g.groups and not cell.channels_last:
        dense *= 4
    copied = cell.images * g.in_channels * cell.size[0] * cell.size[1] + outputs * g.out_channels
    if 12_000_000 + 12 * copied + cell.nnz * outputs * (bn * bk + 600) > dense:
        return "dense"
    if cell.op != "bsr_conv fwd":
        return "lines"
    return "batches" if outputs < 400 else "loop"  # at 400 and 600 zeros between do not decide


def test_reasoning_takes_what_was_taken_before():
    names = set()
    for nnz, size, images, block, op, last in itertools.product(
        (1, 20, 72), ((4, 4), (28, 28), (120, 3)), (1, 6, 64), ((32, 32), (4, 4)), CONV_OPS,
        (True, False),
    ):  # fmt: skip
        geometry = ConvGeometry(512, 512, (3, 3), before=(1, 1), after=(1, 1))
        for g in (geometry, dataclasses.replace(geometry, in_channels=28, groups=4)):
            cell = dataclasses.replace(
                CELL, op=op, nnz=nnz, size=size, images=images, block=block, channels_last=last,
                geometry=g, M=images * size[0] * size[1],
            )  # fmt: skip
            candidate, reasons = module.reasoned(cell)
            assert candidate.name == taken_before(cell)
            assert len(reasons) > 20
            names.add(candidate.name)
    assert names == {"dense", "lines", "batches", "loop"}
    for op, m, aligned in itertools.product(CONV_OPS, (1, 100, 100_000), (True, False)):
        cell = dataclasses.replace(CARD, op=op, M=m, aligned=aligned)
        candidate, reasons = module.reasoned(cell)
        which = op.split()[1]
        assert candidate.tile == tile_for_bsr_conv(
            which, m, cell.block, cell.nnz, cell.dtype, aligned
        )
        assert len(reasons) > 20


def test_keys_differ_where_the_choice_may():
    changes = {
        "op": "bsr_conv dx", "impl": "triton", "dtype": torch.bfloat16, "block": (16, 32),
        "nnz": 60, "M": 100, "size": (14, 14), "channels_last": True, "longest": 20,
        "precision": "tf32", "aligned": False,
    }  # fmt: skip
    shape = {
        "kernel": (1, 9), "stride": (2, 1), "dilation": (1, 2), "groups": 2, "in_channels": 63,
        "out_channels": 127,
    }  # fmt: skip
    cells = [CELL, *(dataclasses.replace(CELL, **{name: to}) for name, to in changes.items())]
    cells += [
        dataclasses.replace(CELL, geometry=dataclasses.replace(GEOMETRY, **{name: to}))
        for name, to in shape.items()
    ]
    keys = [json.dumps(full_key(cell, CPU), sort_keys=True) for cell in cells]
    assert len(set(keys)) == len(keys)
    padded = dataclasses.replace(GEOMETRY, before=(0, 0), after=(0, 0))
    assert full_key(dataclasses.replace(CELL, geometry=padded), CPU) == full_key(CELL, CPU)


class Taken:
    """A small convolution, and the names of the candidates that its calls take."""

    def __init__(self, monkeypatch, impl, device, **options):
        from sgtriton_kernels import bsr_conv

        self.case, self.impl, self.names = Case(device=device, **options), impl, []
        self.expected = self.case.torch_out()
        for name, first in (("conv_fwd", -1), ("conv_bwd", -2)):
            real = getattr(bsr_conv, name)
            monkeypatch.setattr(bsr_conv, name, self.noted(real, first))

    def noted(self, real, first):
        def run(*arguments):
            self.names += [by.name for by in arguments[first:] if by is not None]
            return real(*arguments)

        return run

    def __call__(self, **options):
        """What a call of forward takes."""
        self.names.clear()
        assert_exact("out", self.case.out(self.impl, **{"tile": None} | options), self.expected)
        return list(self.names)

    def cell(self, which):
        case = self.case
        return conv_cell_of(which, case.w, geometry_of_case(case), self.impl, case.x)


@pytest.fixture
def taken(monkeypatch, impl, device):
    return Taken(monkeypatch, impl, device, kernel=(1, 2), padding=1, size=(2, 3))


def test_record_is_taken_by_the_next_call(taken, cache, device):
    cell = taken.cell("fwd")
    before = analytic(cell).candidate
    assert taken() == [before.name] == taken()
    for other in [c for c in candidates(cell) if c != before][:2]:
        tell(full_key(cell, device), other.name)
        assert taken() == [other.name]
    tell(full_key(cell, device), ANALYTIC)
    assert taken() == [before.name]


def test_record_of_a_file_is_taken_and_a_callers_choice_comes_first(taken, cache, device):
    cell = taken.cell("fwd")
    other, third = [c for c in candidates(cell) if c != analytic(cell).candidate][:2]
    assert write_record(records.cache_folder(), full_key(cell, device), other.name, {}) is None
    lookup.forget()
    assert choose(cell, device).source == "cache"
    assert taken() == [other.name]
    assert taken(tile=third.name) == [third.name]


def test_records_of_gradients_are_taken(taken, cache, device):
    case = taken.case
    dout = integers(*taken.expected.shape, device=device)
    expected = case.torch_grads(dout)
    wanted = []
    for which in ("dx", "dvalues"):
        cell = taken.cell(which)
        other = next(c for c in candidates(cell) if c != analytic(cell).candidate)
        tell(full_key(cell, device), other.name)
        wanted.append(other.name)
    x, values = case.x.requires_grad_(), case.w.values.requires_grad_()
    out = case.out(taken.impl, tile=None)
    taken.names.clear()
    grads = torch.autograd.grad(out, (x, values), dout)
    assert taken.names == wanted
    for grad, right in zip(grads, expected, strict=False):
        assert_exact("grad", grad, right)


@pytest.mark.parametrize(
    "name", ["", "nothing", "x_left_n64_m64_k32_s3_w4_split2", "library", "lines", "../../x"]
)
def test_record_that_names_no_candidate_changes_nothing(name, taken, cache, device):
    cell = taken.cell("fwd")
    before = taken()
    assert write_record(records.cache_folder(), full_key(cell, device), name, {}) is None
    lookup.forget()
    assert taken() == before
    assert choose(cell, device).source == "analytic"


def test_hostile_records_change_nothing(taken, cache, device):
    cell, numbers = taken.cell("fwd"), random.Random(0)
    before = taken()
    key = full_key(cell, device)
    path = cache / records.file_name(key)
    cache.mkdir(parents=True)
    known = next(c.name for c in candidates(cell) if [c.name] != before)
    right = {"format": records.FORMAT, "key": key, "candidate": known}
    for _ in range(30):
        bad = dict(right)
        field = numbers.choice(["format", "candidate", "key"])
        bad[field] = numbers.choice([None, -1, 1e99, [], {}, "0", [known], {"name": known}])
        text = json.dumps(bad)
        path.write_text(text[: numbers.choice([len(text), len(text) // 2])], encoding="utf-8")
        lookup.forget()
        assert taken() == before


def test_choice_is_kept_with_the_layer_until_it_may_be_another(monkeypatch, cache, device):
    case, asked = Case(device=device, kernel=(3, 3)), []
    real = lookup.choose
    monkeypatch.setattr(lookup, "choose", lambda *a: asked.append(a) or real(*a))
    for _ in range(3):
        case.out("torch")
    assert len(asked) == 1
    case.out("torch", case.x[:1])
    case.out("torch", case.x.contiguous(memory_format=torch.channels_last))
    assert len(asked) == 3
    case.out("torch")
    assert len(asked) == 3
    lookup.forget()
    case.out("torch")
    assert len(asked) == 4


def test_op_that_is_compiled_takes_records_and_names(taken, cache, device):
    case = taken.case
    cell = taken.cell("fwd")
    other, third = [c for c in candidates(cell) if c != analytic(cell).candidate][:2]
    tell(full_key(cell, device), other.name)

    for tile, name in ((None, other.name), (third.name, third.name)):
        torch.compiler.reset()
        run = torch.compile(
            lambda x, tile=tile: case.out(taken.impl, x, tile=tile), fullgraph=True, backend="eager"
        )
        taken.names.clear()
        assert_exact("compiled", run(case.x), taken.expected)
        assert taken.names == [name]


@pytest.mark.parametrize("name", ["dense ", "x_left", "", "lines"])
def test_name_of_no_candidate_is_refused(name, impl, device):
    case = Case(device=device)
    with pytest.raises(ValueError, match=r"tile must be a BsrTile or one of .*unpack; got"):
        case.out(impl, tile=name)


def test_tile_says_nothing_where_no_kernel_computes(monkeypatch, device):
    taken = Taken(monkeypatch, "torch", device)
    cell = taken.cell("fwd")
    assert taken(tile=BsrTile(16, 16, 16, 1, 1)) == [analytic(cell).candidate.name]


def test_cell_counts_the_pixels_of_the_pass(device):
    case = Case(device=device)
    fwd = conv_cell_of("fwd", case.w, geometry_of_case(case), "torch", case.x)
    assert case.x.shape[0] * 12 == fwd.M
    cell = conv_cell_of("dx", case.w, geometry_of_case(case), "torch", case.x)
    assert case.x.shape[0] * 30 == cell.M
    assert cell.weight == "24x20x3x3"
    assert case.w.shape == (cell.N, cell.K)


@pytest.mark.parametrize("name", ["places", "by_channels"])
def test_what_a_capture_only_records_is_not_kept(name, monkeypatch):
    """An eager call before the graph's first replay scattered blocks by an index never computed."""
    w = BlockSparse.from_dense(torch.randn(32, 48), (16, 16), torch.eye(2, 3) > 0)
    blocks = conv_blocks(w, ConvGeometry(48, 32, (1, 1)))
    monkeypatch.setattr(kept, "is_capturing", lambda device: True)
    captured = getattr(blocks, name)
    assert getattr(blocks, name) is not captured
    monkeypatch.setattr(kept, "is_capturing", lambda device: False)
    found = getattr(blocks, name)
    assert getattr(blocks, name) is found
    expected = {"places": [0, 4], "by_channels": [[0, 1, 2, 2], [0, 1, 0], [0, 1]]}[name]
    assert [t.tolist() for t in found] == expected


def test_a_weight_that_two_layers_share_keeps_what_follows_for_both():
    """The second one's took the place of the first one's, whose memory a captured graph may read.

    It was worked out anew in every call.
    """
    w = BlockSparse.from_dense(torch.randn(32, 48), (16, 16), torch.eye(2, 3) > 0)
    one, other = (ConvGeometry(48, 32, (1, 1), (stride, stride)) for stride in (1, 2))
    first, second = conv_blocks(w, one), conv_blocks(w, other)
    assert (first.geometry, second.geometry) == (one, other)
    assert conv_blocks(w, one) is first
    assert conv_blocks(w, other) is second
