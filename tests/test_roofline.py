"""Predictions on paper, against figures worked out by hand."""

import dataclasses
import itertools

import pytest
import torch
from sgtriton_kernels.cards import CARD_NAMES, card
from sgtriton_kernels.cell import Cell
from sgtriton_kernels.tiles import BsrTile
from toy_card import FAST, TOY

from sgtriton import roofline

H100, A100 = card("H100 SXM"), card("A100 SXM 80GB")
MANY = dataclasses.replace(TOY, l2_mb=1000)


def product(M, N, K, block, sparsity=0.0, op="fwd", dtype=torch.bfloat16, **more):
    block = (block, block) if isinstance(block, int) else block
    cell = Cell(f"bsr_linear {op}", "triton", M, N, K, block, 0, dtype, **more)
    return roofline.at_sparsity(cell, sparsity)


@pytest.mark.parametrize(
    ("on", "M", "N", "sparsity", "expected"),
    [
        # 10.64 us of bytes (33.6 + 2.1 MB) by 1.63 us (3.36 + 2.1 MB)
        (H100, 128, 4096, 0.9, 6.5),
        (H100, 128, 4096, 0.5, 1.9),
        (H100, 128, 14336, 0.9, 7.4),
        (H100, 1, 4096, 0.95, 19.8),
        # 17.4 us of products by 3.5 us of bytes
        (H100, 512, 4096, 0.9, 5.0),
        (H100, 8192, 4096, 0.9, 6.8),
        (A100, 512, 4096, 0.9, 9.6),
        (A100, 8192, 4096, 0.9, 10.0),
    ],
)
def test_ideal_speedups_by_hand(on, M, N, sparsity, expected):
    found = roofline.ideal_speedup(on, product(M, N, 4096, 64), sparsity)
    assert found == pytest.approx(expected, abs=0.051)


def test_least_times_by_hand():
    # M = 2, N = 64, K = 32: 8192 operations; 2 (2048 + 64 + 128) bytes
    dense = product(2, 64, 32, 16)
    assert roofline.ideal_dense_seconds(TOY, dense) == pytest.approx(4480e-9)
    assert roofline.ideal_dense_seconds(FAST, dense) == pytest.approx(8192e-12)
    assert roofline.dense_seconds(TOY, dense) == pytest.approx(6480e-9)


@pytest.mark.parametrize(
    ("op", "block", "dtype", "expected"),
    [
        # half of the eight blocks of 16x16: 4 x 4 bytes of columns, 4 x 4 of rows
        ("fwd", 16, torch.bfloat16, 2 * (1024 + 64 + 128) + 16 + 16),
        # of both rows and places in the values, and 2 x 4 of columns
        ("dx", 16, torch.bfloat16, 2 * (1024 + 64 + 128) + 2 * 16 + 8),
        # of columns, rows and places
        ("dvalues", 16, torch.bfloat16, 2 * (1024 + 64 + 128) + 3 * 16),
        ("fwd", (32, 16), torch.bfloat16, 2 * (1024 + 64 + 128) + 8 + 8),
        ("dx", (32, 16), torch.bfloat16, 2 * (1024 + 64 + 128) + 2 * 8 + 8),
        ("fwd", 16, torch.float32, 4 * (1024 + 64 + 128) + 16 + 16),
    ],
)
def test_least_times_of_passes_by_hand(op, block, dtype, expected):
    found = roofline.ideal_seconds(TOY, product(2, 64, 32, block, 0.5, op, dtype))
    assert found == pytest.approx(expected * 1e-9)


def test_least_times_of_fp32_by_hand():
    exact = product(2, 64, 32, 16, dtype=torch.float32)
    assert roofline.ideal_seconds(FAST, exact) == pytest.approx(8192e-11)
    rounded = dataclasses.replace(exact, precision="tf32")
    with_tf32 = dataclasses.replace(FAST, tflops_tf32=0.5)
    assert roofline.ideal_seconds(with_tf32, rounded) == pytest.approx(8192 / 0.5e12)
    assert roofline.dense_seconds(with_tf32, rounded) == pytest.approx(2e-6 + 8192 / 0.5e12)


def test_unpacking_by_hand():
    # zeros, half of the weight read and written; 4 columns and 4 rows; two kernels before dense
    cell = product(2, 64, 32, 16, 0.5)
    expected = (2 * 2048 * 2 + 8 * 4 + 4480) * 1e-9 + 3 * 2e-6
    assert roofline.unpack_seconds(TOY, cell) == pytest.approx(expected)
    assert roofline.unpack_seconds(TOY, dataclasses.replace(cell, op="bsr_linear dx")) == (
        pytest.approx(expected)
    )
    # of the gradient of the values half of it is read and written, by one kernel after dense
    sampled = dataclasses.replace(cell, op="bsr_linear dvalues")
    assert roofline.unpack_seconds(TOY, sampled) == pytest.approx(
        (2048 * 2 + 8 * 4 + 4480) * 1e-9 + 2 * 2e-6
    )


@pytest.mark.parametrize("name", CARD_NAMES)
def test_predictions_stay_within_the_ideal_and_that_within_the_density(name):
    on, sparsities = card(name), (0.05, 0.5, 0.9, 0.95)
    for M, block in itertools.product((1, 16, 64, 4096), (16, 64, 128)):
        size = M, 4096, 2048, block
        ideal = [roofline.ideal_speedup(on, product(*size), s) for s in sparsities]
        assert ideal == sorted(ideal)
        for s, most in zip(sparsities, ideal, strict=True):
            assert 0 < roofline.predicted_speedup(on, product(*size, s)) <= most
            assert most <= 1 / (1 - s) + 1e-9


@pytest.mark.parametrize("split", [1, 4])
def test_fewer_blocks_never_take_longer_with_the_same_tile(split):
    tile = BsrTile(64, 64, 32, 4, 4, split=split)
    times = [
        roofline.predict(H100, product(64, 4096, 4096, 64, s / 100), tile).seconds
        for s in range(0, 100, 3)
    ]
    assert times == sorted(times, reverse=True)


def test_each_bound_is_named_where_it_bounds():
    wide, tall = BsrTile(64, 128, 64, 4, 8), BsrTile(128, 64, 64, 4, 8)

    def bound(on, M, N, block, sparsity, tile):
        return roofline.predict(on, product(M, N, 4096, block, sparsity), tile).bound

    assert bound(H100, 1, 14336, 64, 0.5, BsrTile(16, 1, 64, 4, 4, "vector")) == "memory"
    assert bound(H100, 1, 1024, 64, 0.9, BsrTile(16, 1, 64, 4, 4, "vector")) == "start"
    assert bound(H100, 4096, 14336, 64, 0.5, wide) == "shared-memory fill"
    assert bound(card("RTX 4090"), 4096, 14336, 64, 0.5, wide) == "compute"
    # 80 programs, one for each multiprocessor or for some of them two
    uneven = dataclasses.replace(FAST, multiprocessors=80)
    assert bound(uneven, 256, 2560, 128, 0.0, tall) == "compute"
    assert bound(dataclasses.replace(uneven, multiprocessors=73), 256, 2560, 128, 0.0, tall) == (
        "waves"
    )
    assert bound(uneven, 256, 2560, 128, 0.9, tall) == "imbalance"
    assert bound(H100, 4096, 4096, 64, 0.99, dataclasses.replace(wide, split=8)) == "sums"
    assert {"memory", "start", "compute", "waves", "imbalance", "sums", "shared-memory fill"} == {
        *roofline.BOUNDS
    }


def test_what_a_cache_does_not_hold_is_read_again():
    tile, far = BsrTile(64, 128, 64, 4, 8), dataclasses.replace(TOY, l2_mb=0)
    cell = product(4096, 2048, 256, 64, 0.5)
    held, again = (roofline.predict(on, cell, tile).seconds for on in (MANY, far))
    # 10 programs are part of a strip of outputs; 32 strips read half of x; 64 blocks in 32 rows
    moved = 2 * (0.5 * 2048 * 256 + 4096 * 2048) + 16 * 2 * 4096 * 256 + 4 * (64 + 32)
    assert again == pytest.approx(moved / 1e9 + 2e-6)
    assert again > held


def test_what_programs_take_is_told_where_memory_bounds():
    cell = product(512, 2048, 256, 64, 0.5)
    found = roofline.predict(TOY, cell, BsrTile(64, 64, 32, 4, 4))
    assert found.bound == "memory"
    fast = dataclasses.replace(TOY, bandwidth_gbs=1e9)
    same = roofline.predict(fast, cell, BsrTile(64, 64, 32, 4, 4))
    assert found.programs == same.programs == pytest.approx(same.seconds - 2e-6)
    assert found.programs < found.seconds


def test_pairs_are_not_predicted():
    with pytest.raises(ValueError, match="pairs of rows"):
        roofline.predict(H100, product(64, 4096, 4096, 64), BsrTile(128, 64, 32, 4, 8, "pairs"))


@pytest.mark.parametrize("block", [16, 128])
def test_from_the_break_even_on_nothing_is_slower_than_dense(block):
    size = 512, 4096, 4096, block

    def speedup(sparsity):
        return roofline.predicted_speedup(H100, product(*size, sparsity))

    least = round(100 * roofline.break_even(speedup))
    assert 1 < least < 100
    speedups = [speedup(s / 100) for s in range(least - 1, 100)]
    assert speedups[0] < 1 <= min(speedups[1:])


def test_without_a_break_even_it_is_1():
    # one block takes (64 + 128) 128 2 bytes at 0.1 GB/s, 492 us; dense 134 us
    slow = dataclasses.replace(TOY, bandwidth_gbs=1e9, l2_bytes_per_clock=1)
    size = 64, 1024, 1024, 128
    assert roofline.break_even(lambda s: roofline.predicted_speedup(slow, product(*size, s))) == 1


def test_break_even_is_not_sought_where_no_block_is_left():
    asked = []

    def speedup(sparsity):
        asked.append(sparsity)
        return 2.0 if sparsity >= 0.7 else 0.5

    assert roofline.break_even(speedup, most=0.75) == 0.7
    assert max(asked) == 0.75
    assert roofline.break_even(lambda s: 2.0, most=0.0) == 1  # only dense is left
    assert roofline.break_even(lambda s: 0.5, most=0.5) == 1


def test_a_block_need_not_be_square():
    # 4 block rows of 8 on 10 multiprocessors, one part each: 8 blocks of 2 * 64 * 64 * 32
    found = roofline.predict(FAST, product(64, 256, 256, (64, 32)), BsrTile(128, 64, 64, 4, 4))
    assert found.tile == BsrTile(64, 64, 32, 4, 4)
    assert found.seconds == pytest.approx(8 * 2 * 64 * 64 * 32 * 10 / 1e12 + 2e-6)
    # two parts of a block row: two rounds of 10 for 2 * 8 programs
    halves = roofline.predict(FAST, product(128, 256, 256, (64, 32)), BsrTile(32, 64, 64, 4, 4))
    assert halves.seconds == pytest.approx(2 * 8 * 2 * 64 * 32 * 32 * 10 / 1e12 + 2e-6)


def test_the_gradient_of_x_is_the_product_with_sizes_exchanged():
    tile = BsrTile(64, 64, 32, 4, 4, "weight_left", 2)
    other = dataclasses.replace(tile, BLOCK_N=32, BLOCK_K=64)
    for M in (64, 1000):
        fwd = roofline.predict(FAST, product(M, 256, 512, (32, 64)), tile)
        dx = roofline.predict(FAST, product(M, 512, 256, (64, 32), op="dx"), other)
        assert dx.seconds == pytest.approx(fwd.seconds)
        assert dx.bound == fwd.bound
    # programs start as the index has them, not the longest first
    few = 512, 4096, 4096, 128, 0.9
    fwd = roofline.predict(FAST, product(*few), BsrTile(128, 64, 64, 4, 8))
    dx = roofline.predict(FAST, product(*few, op="dx"), BsrTile(64, 64, 128, 4, 8))
    assert dx.seconds > fwd.seconds


def test_the_gradient_of_the_values_by_hand():
    cell = dataclasses.replace(product(100, 256, 128, (64, 32), op="dvalues"), nnz=6)
    # 6 blocks of 2 parts on 10: two rounds of 7 steps of 16 rows
    whole = roofline.predict(FAST, cell, BsrTile(32, 16, 32, 2, 4))
    assert whole.seconds == pytest.approx(2 * 7 * 2 * 32 * 32 * 16 * 10 / 1e12 + 2e-6)
    # 24 programs: three rounds of 4 steps; sums of 2 * 6 blocks come and go, from a second kernel
    fill = dataclasses.replace(FAST, l2_bytes_per_clock=10**3)
    split = roofline.predict(fill, cell, BsrTile(32, 16, 32, 2, 4, split=2))
    busy = 3 * 4 * max(2 * 32 * 32 * 16 * 10 / 1e12, 2 * (32 + 32) * 16 * 10 / 1e12)
    sums = 2 * 4 * 2 * 6 * 64 * 32 / 1e12
    assert split.seconds == pytest.approx(busy + sums + 2 * 2e-6)


def test_rows_of_dy_are_read_again_where_no_cache_holds_them():
    cell = product(4096, 2048, 256, 64, 0.5, op="dvalues")
    tile, far = BsrTile(64, 32, 64, 4, 4), dataclasses.replace(TOY, l2_mb=0)
    again = roofline.predict(far, cell, tile)
    # 64 blocks in 4 columns; 10 programs are part of a column, whose 16 blocks read 16 strips of 32
    moved = 2 * (0.5 * 2048 * 256 + 4096 * 256) + 2 * 2 * 4096 * 2048 + 4 * 3 * 64
    assert again.bound == "memory"
    assert again.seconds == pytest.approx(moved / 1e9 + 2e-6)
    assert roofline.predict(MANY, cell, tile).seconds < again.seconds


@pytest.mark.parametrize("op", ["fwd", "dx", "dvalues"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_without_rows_or_blocks_there_is_a_start(op, dtype):
    tile = BsrTile(16, 16, 16, 2, 4)
    for M, sparsity in ((0, 0.5), (16, 1.0)):
        cell = product(M, 64, 64, 16, sparsity, op, dtype)
        assert roofline.predict(FAST, cell, tile).seconds == pytest.approx(2e-6, rel=1e-3)
