"""Ranking for a card that is absent."""

import dataclasses
import functools

import pytest
import torch
from conv_layers import conv_cell
from sgtriton_kernels import BlockSparse
from sgtriton_kernels.candidate import UNPACK, Candidate
from sgtriton_kernels.candidates import candidates
from sgtriton_kernels.cards import card
from sgtriton_kernels.cell import Cell
from sgtriton_kernels.shared_memory import bytes_of
from sgtriton_kernels.tiles import BsrTile

from sgtriton import conv_roofline, launches, offline, roofline
from sgtriton.bsr_problem import BsrLinearProblem
from sgtriton.compilers import NO_TIME, Built, Compilers
from sgtriton.conv_problem import ConvProblem
from sgtriton.cross_compile import COPY_ENGINES
from sgtriton.launches import Launch
from sgtriton.offline import faults, rank

CELL = Cell("bsr_linear fwd", "triton", 512, 1024, 1024, (128, 128), 16, torch.bfloat16)
GOOD = BsrTile(128, 64, 32, 3, 4)


def tiles(*found: BsrTile) -> list[Candidate]:
    return [Candidate(tile.name, tile) for tile in found]


@pytest.fixture(scope="module")
def compilers():
    with Compilers() as found:
        yield found


@pytest.mark.compiles
def test_planted_candidates_are_dropped_with_their_reasons(compilers):
    planted = {
        "not_a_power_of_two": dataclasses.replace(GOOD, BLOCK_M=24),
        "one_warp": BsrTile(128, 64, 32, 3, 1),
        "deep": dataclasses.replace(GOOD, BLOCK_M=128, BLOCK_K=128, num_stages=4, num_warps=8),
        "thin": BsrTile(16, 16, 16, 3, 8),  # two bytes a thread, which no copy in flight takes
        "good": GOOD,
    }
    given = [Candidate(name, tile) for name, tile in planted.items()]
    good, *dropped = rank("A10", CELL, given, compilers)
    assert (good.candidate.name, good.dropped) == ("good", None)
    assert good.seconds == roofline.predict(card("A10"), CELL, GOOD).seconds
    reasons = {ranked.candidate.name: ranked.dropped for ranked in dropped}
    assert list(reasons) == ["not_a_power_of_two", "one_warp", "deep", "thin"]
    assert reasons["not_a_power_of_two"].startswith("it does not compile: ")
    assert reasons["one_warp"].endswith(" bytes spilled")
    assert reasons["deep"].endswith(f"a program can have {99 * 1024}")
    assert reasons["thin"] == "tiles get 0 buffers, 3 stages take 2"
    assert all(ranked.seconds is ranked.bound is None for ranked in dropped)


@pytest.mark.compiles
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("op", ["fwd", "dx", "dvalues"])
def test_shared_memory_is_no_more_than_reckoned(op, dtype, compilers):
    """And never so much less that a tile is refused which has room."""
    cell = dataclasses.replace(CELL, op=f"bsr_linear {op}", dtype=dtype, block=(64, 64), nnz=26)
    for arch in ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942"):
        some = candidates(cell, copy_engine=arch in COPY_ENGINES)[:24:3]
        tiles = [candidate.tile for candidate in some if candidate.tile is not None]
        launches = [offline._launches(arch, cell, tile)[0] for tile in tiles]
        found = compilers.build([(arch, launch) for launch in launches])
        for tile, built in zip(tiles, found, strict=True):
            if isinstance(built, Built):
                reckoned = bytes_of(tile, cell, arch)
                assert built.shared <= reckoned, (arch, tile.name)
                assert built.shared >= reckoned // 2 or reckoned < 48 * 1024, (arch, tile.name)


@pytest.mark.compiles
@pytest.mark.parametrize("op", ["fwd", "dx", "dvalues"])
@pytest.mark.parametrize("name", ["H100 SXM", "RTX 4090", "MI300X"])
def test_what_ships_is_ranked_by_the_model(op, name, compilers):
    cell = dataclasses.replace(CELL, op=f"bsr_linear {op}", block=(64, 64), nnz=26)
    given = candidates(cell, copy_engine=name == "H100 SXM")
    found = rank(name, cell, given, compilers)
    assert {ranked.candidate for ranked in found} == {*given}
    kept = [ranked for ranked in found if ranked.dropped is None]
    assert len(kept) >= 5
    seconds = [ranked.seconds for ranked in kept]
    assert seconds == sorted(seconds)
    for ranked in kept:
        if ranked.candidate == UNPACK:
            assert ranked.seconds == roofline.unpack_seconds(card(name), cell)
        else:
            assert (
                ranked.seconds == roofline.predict(card(name), cell, ranked.candidate.tile).seconds
            )
    assert UNPACK in [ranked.candidate for ranked in kept]
    dropped = {ranked.candidate.name: ranked.dropped or "" for ranked in found[len(kept) :]}
    for name, reason in dropped.items():
        assert name.startswith("pairs")
        assert "no prediction" in reason


@pytest.mark.compiles
def test_a_kernel_is_compiled_as_the_product_asks(monkeypatch):
    seen = []

    class Recorder:
        def build(self, work, deadline, on_built):
            seen.extend(work)
            return [Built(64, 1024, 0, "mma.sync", (8, 8))] * len(work)

    def launched(name, cell, tile):
        seen.clear()
        (ranked,) = rank(name, cell, tiles(tile), Recorder())
        assert ranked.dropped is None
        return seen

    exact = dataclasses.replace(CELL, dtype=torch.float32)
    for precision in ("ieee", "tf32"):
        cell = dataclasses.replace(exact, precision=precision)
        ((target, launch),) = launched("A100 SXM 80GB", cell, GOOD)
        assert (target, launch.constexprs["PRECISION"]) == ("sm_80", precision)
    bulk = dataclasses.replace(GOOD, bulk=True)
    reads = {
        name: launched(name, CELL, bulk)[0][1].constexprs["READ"]
        for name in ("A100 SXM 80GB", "H100 SXM", "RTX 5090", "MI300X")
    }
    assert reads == {
        "A100 SXM 80GB": "rows", "H100 SXM": "bulk", "RTX 5090": "bulk", "MI300X": "rows",
    }  # fmt: skip
    uneven = dataclasses.replace(CELL, aligned=False)
    assert launched("L40S", uneven, GOOD)[0][1].constexprs["READ"] == "any"
    # the kernel that adds up sums is a launch of the candidate too
    assert len(launched("L40S", CELL, dataclasses.replace(GOOD, split=2))) == 2


@pytest.mark.compiles
def test_planted_candidates_of_a_convolution_are_dropped_with_their_reasons(compilers):
    good = BsrTile(64, 64, 32, 3, 4)
    planted = {
        "good": good,
        "not_a_power_of_two": dataclasses.replace(good, BLOCK_M=24),
        "one_warp": BsrTile(64, 64, 32, 3, 1),
        "deep": BsrTile(64, 64, 64, 8, 4),
        "thin": BsrTile(16, 16, 16, 3, 8),
    }
    given = [Candidate(name, tile) for name, tile in planted.items()]
    cell = conv_cell(channels=(256, 256), block=(128, 128))
    found = dict(
        zip(planted, faults("sm_86", cell, [*given, UNPACK], None, compilers), strict=False)
    )
    assert found["good"] is None
    assert found["not_a_power_of_two"].startswith("it does not compile: ")
    assert found["one_warp"].endswith(" bytes spilled")
    assert found["deep"].endswith(f"a program can have {99 * 1024}")
    assert found["thin"] == "tiles get 0 buffers, 3 stages take 2"


@pytest.mark.compiles
@pytest.mark.parametrize("op", ["fwd", "dx", "dvalues"])
def test_what_is_compiled_ahead_is_what_a_search_calls(op, monkeypatch):
    """Forward was compiled with all that it can add, which a search leaves out: all in vain."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    tile, random = BsrTile(32, 64, 32, 3, 4), torch.Generator().manual_seed(0)
    candidate = Candidate(tile.name, tile)
    conv = conv_cell(op, channels=(64, 64), block=(32, 32))
    linear = dataclasses.replace(CELL, op=f"bsr_linear {op}", block=(32, 32), nnz=9)
    for cell, kind in ((conv, ConvProblem), (linear, BsrLinearProblem)):
        grid = torch.zeros(cell.block_rows * cell.block_cols, dtype=torch.bool)
        grid[: cell.nnz] = True
        weight = torch.zeros(cell.N, cell.K, dtype=cell.dtype)
        is_open = grid.view(cell.block_rows, cell.block_cols)
        problem = kind(cell, BlockSparse.from_dense(weight, cell.block, is_open), random)
        given = [v.to("meta") if hasattr(v, "to") else v for v in problem.inputs()]
        ahead = offline._launches("sm_80", cell, tile, plain=True)
        if cell is linear and op == "fwd":  # of meta tensors the op asks for nothing
            flags = ahead[0].constexprs
            added = flags["HAS_BIAS"], flags["HAS_RESIDUAL"], flags["ACTIVATION"]
            assert added == (False, False, "none")
            continue
        called = launches.launches_of(functools.partial(problem.compute, candidate, *given))
        assert called == ahead != []


def test_what_a_search_calls_is_compiled_beside_what_a_layer_may(monkeypatch):
    built = []

    class Compilers:
        def build(self, work, deadline, on_built):
            built.extend(launch for _, launch in work)
            spills = [8 * (launch.constexprs["ACTIVATION"] == "gelu") for launch in built]
            return [Built(99, 0, n, "wgmma", (3, 3)) for n in spills]

    monkeypatch.setattr(offline, "why_not", lambda: None)
    monkeypatch.setattr(offline, "_launches", lambda arch, cell, tile, plain=False: [
        Launch("", "", {}, {"ACTIVATION": "none" if plain else "gelu"}, 4, 3)
    ])  # fmt: skip
    for ahead, kinds in ((False, ["gelu"]), (True, ["gelu", "none"])):
        built.clear()
        # what only a layer's bias and activation spill is refused as well
        assert faults("sm_90", CELL, tiles(GOOD), None, Compilers(), ahead=ahead) == [
            "8 bytes spilled"
        ]
        assert [launch.constexprs["ACTIVATION"] for launch in built] == kinds


@pytest.mark.compiles
@pytest.mark.parametrize("op", ["fwd", "dx", "dvalues"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_what_ships_for_convolutions_is_taken_by_compilers(op, arch, compilers):
    cell = conv_cell(op, channels=(128, 128), block=(64, 64))
    given = candidates(cell)[::4]
    assert faults(arch, cell, given, None, compilers) == [None] * len(given)


@pytest.mark.compiles
@pytest.mark.parametrize("name", ["A100 SXM 80GB", "RX 7900 XTX"])
@pytest.mark.parametrize("op", ["fwd", "dx", "dvalues"])
def test_convolutions_are_ranked_by_their_model(op, name, compilers):
    on, cell = card(name), conv_cell(op, channels=(128, 128), block=(64, 64))
    given = [*candidates(cell)[::3], *([UNPACK] if UNPACK not in candidates(cell)[::3] else [])]
    found = rank(name, cell, given, compilers)
    assert {ranked.candidate for ranked in found} == {*given}
    assert [ranked.dropped for ranked in found] == [None] * len(found)
    seconds = [ranked.seconds for ranked in found]
    assert seconds == sorted(seconds)
    for ranked in found:
        if ranked.candidate.tile is None:
            expected = conv_roofline.unpack_seconds(on, cell), "library"
        else:
            model = conv_roofline.predict(on, cell, ranked.candidate.tile)
            expected = model.seconds, model.bound
        assert (ranked.seconds, ranked.bound) == expected


@pytest.mark.compiles
def test_a_convolution_is_compiled_as_the_layer_asks(monkeypatch):
    seen, small = [], BsrTile(32, 32, 16, 2, 4)

    class Recorder:
        def build(self, work, deadline, on_built):
            seen.extend(work)
            return [Built(64, 1024, 0, "mma.sync", (8, 8))] * len(work)

    def launched(cell, tile=small):
        seen.clear()
        assert faults("sm_90", cell, tiles(tile), None, Recorder()) == [None]
        ((target, launch),) = seen
        assert target == "sm_90"
        assert launch.kernel == f"_bsr_conv_{cell.op.split()[1]}_kernel"
        return launch.constexprs

    for precision in ("ieee", "tf32"):
        cell = conv_cell(dtype=torch.float32, precision=precision)
        assert launched(cell)["PRECISION"] == precision
    for which in ("fwd", "dx"):
        for last in (True, False):
            flags = launched(conv_cell(which, channels_last=last))
            assert (flags["CHANNELS_LAST"], flags["ALIGNED"]) == (last, True)
    assert not launched(conv_cell(channels=(60, 64)))["ALIGNED"]
    assert launched(conv_cell("dvalues"), BsrTile(64, 32, 64, 3, 4, split=4))["SPLIT"] == 4
    cut = launched(conv_cell(block=(64, 16)), BsrTile(128, 64, 64, 3, 4))
    assert (cut["BLOCK_N"], cut["BLOCK_K"]) == (64, 16)


LAUNCH = Launch("module", "kernel", {}, {}, num_warps=4, num_stages=4)


@pytest.mark.parametrize(
    ("arch", "change", "expected"),
    [
        ("sm_80", {}, None),
        ("sm_80", {"buffers": (3, 2)}, "tiles get 2 buffers, 4 stages take 3"),
        ("sm_90", {}, None),
        ("sm_90", {"instruction": "wgmma"}, "tiles get 3 buffers, 4 stages take 4"),
        ("sm_90", {"instruction": "wgmma", "buffers": (4, 4)}, None),
        ("sm_100", {"instruction": "tcgen05.mma"}, "tiles get 3 buffers, 4 stages take 4"),
        ("sm_80", {"instruction": None, "buffers": ()}, "tiles get 0 buffers, 4 stages take 3"),
        ("gfx942", {"buffers": ()}, None),
        ("gfx942", {"spills": 3}, "3 registers spilled"),
        ("sm_80", {"spills": 8, "shared": 5000}, "8 bytes spilled"),
        ("sm_80", {"shared": 5000}, "5000 bytes of shared memory, a program can have 4096"),
    ],
)
def test_faults_of_what_was_compiled(arch, change, expected):
    built = dataclasses.replace(Built(64, 1024, 0, "mma.sync", (3, 3)), **change)
    assert offline._fault(arch, CELL, [LAUNCH], [built], 4096) == expected


def test_rows_that_are_not_aligned_need_no_pipeline():
    built = Built(64, 1024, 0, "mma.sync", ())
    for change in ({"aligned": False}, {"N": 1023}, {"K": 1000}):
        cell = dataclasses.replace(CELL, **change)
        assert offline._fault("sm_80", cell, [LAUNCH], [built], 4096) is None
    one_stage = dataclasses.replace(LAUNCH, num_stages=1)
    assert offline._fault("sm_80", CELL, [one_stage], [built], 4096) is None


def test_channels_that_are_not_aligned_need_no_pipeline():
    built, launch = (
        Built(64, 1024, 0, "mma.sync", (1, 1)),
        dataclasses.replace(LAUNCH, num_stages=3),
    )
    why = "tiles get 1 buffers, 3 stages take 2"
    for channels, expected in (((64, 64), why), ((60, 64), None), ((64, 60), None)):
        cell = conv_cell(channels=channels)
        assert offline._fault("sm_80", cell, [launch], [built], 4096) == expected
    assert offline._fault("gfx942", conv_cell(), [launch], [built], 4096) is None


def test_the_second_kernel_of_a_candidate_counts_but_has_no_pipeline():
    good, bad = Built(64, 1024, 0, "mma.sync", (3, 3)), Built(64, 0, 8, None, ())
    fine = dataclasses.replace(bad, spills=0)
    assert offline._fault("sm_80", CELL, [LAUNCH, LAUNCH], [good, bad], 4096) == "8 bytes spilled"
    other = dataclasses.replace(LAUNCH, kernel="sums")
    assert offline._fault("sm_80", CELL, [LAUNCH, other], [good, fine], 4096) is None


@pytest.mark.compiles
def test_what_there_is_no_time_for_is_dropped_and_the_library_is_left():
    given = [*tiles(dataclasses.replace(GOOD, num_stages=2)), UNPACK]
    library, late = rank("B200", CELL, given, deadline=0.0)
    assert (library.candidate, library.bound) == (UNPACK, "library")
    assert late.dropped == NO_TIME


def test_what_cannot_be_ranked_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="no card is named 'H300'"):
        rank("H300", CELL, [])
    with pytest.raises(ValueError, match="cell must be a product by Triton's kernels"):
        rank("H200", dataclasses.replace(CELL, impl="torch"), [])
    no_conv = dataclasses.replace(CELL, op="bsr_conv fwd")
    with pytest.raises(ValueError, match=r"a ConvCell of one of bsr_conv, got a Cell of bsr_conv"):
        rank("H200", no_conv, [])
    with pytest.raises(ValueError, match="must have a tile or be 'unpack', got loop"):
        rank("H200", CELL, [Candidate("loop", way="loop")])
    monkeypatch.setattr(offline, "why_not", lambda: "no compiler")
    with pytest.raises(ValueError, match="candidates cannot be compiled: no compiler"):
        rank("H200", CELL, tiles(GOOD))
    monkeypatch.setattr(offline, "why_not", lambda: None)
    with pytest.raises(ValueError, match="arch must be one of sm_80, sm_86"):
        faults("sm_70", CELL, tiles(GOOD))
    gated = dataclasses.replace(CELL, op="gated_linear step")
    with pytest.raises(ValueError, match="must be a Cell of a pass of bsr_linear or a ConvCell"):
        faults("sm_80", gated, tiles(GOOD))
