"""Predictions on paper, against figures worked out by hand."""

import dataclasses
import itertools

import pytest
from sgtriton_kernels.cards import CARD_NAMES, Card, card
from sgtriton_kernels.tiles import BsrTile

from sgtriton import roofline

H100, A100 = card("H100 SXM"), card("A100 SXM 80GB")
# 1 GB/s, 1 TFLOP/s on matrix units, 0.1 without; from the cache 10 multiprocessors read 16 GB/s
TOY = Card(
    name="toy", arch="sm_80", multiprocessors=10, boost_mhz=1000, bandwidth_gbs=1, memory_gb=1,
    l2_mb=1, last_level_mb=None, l2_bytes_per_clock=16, shared_kib=100, shared_program_kib=99,
    tflops_16bit=1, tflops_tf32=None, tflops_fp32=0.1, source="", note="",
)  # fmt: skip
FAST = dataclasses.replace(TOY, bandwidth_gbs=1e9, l2_bytes_per_clock=10**9)


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
    found = roofline.ideal_speedup(on, M, N, 4096, 64, sparsity)
    assert found == pytest.approx(expected, abs=0.051)


def test_least_times_by_hand():
    # M = 2, N = 64, K = 32: 8192 operations; 2 (2048 + 64 + 128) bytes
    assert roofline.ideal_seconds(TOY, 2, 64, 32) == pytest.approx(4480e-9)
    # half of the eight blocks of 16x16: 4 x 4 bytes of columns, 4 x 4 of rows
    assert roofline.ideal_seconds(TOY, 2, 64, 32, 0.5, 16) == pytest.approx(2464e-9)
    assert roofline.ideal_seconds(FAST, 2, 64, 32) == pytest.approx(8192e-12)


def test_fill_bandwidths_are_published_or_said_to_be_assumed():
    assert roofline.fill_bandwidth(A100) == (pytest.approx(5120 * 1.41e9), "published")
    assert roofline.fill_bandwidth(H100) == (pytest.approx(40 * 132 * 1.98e9), "assumed")


@pytest.mark.parametrize(
    ("arch", "form", "n", "m", "expected"),
    [
        ("sm_80", "x_left", 16, 16, 1.0),
        ("gfx942", "x_left", 16, 16, 1.0),
        ("sm_90", "x_left", 64, 128, 1.0),
        ("sm_90", "x_left", 32, 64, 16 / 24),
        ("sm_90", "x_left", 16, 64, 8 / 20),
        ("sm_90", "x_left", 64, 32, 0.63),
        ("sm_90", "weight_left", 64, 32, 16 / 24),
        ("sm_100", "x_left", 64, 128, 1.0),
        ("sm_100", "x_left", 128, 64, 0.5),
        ("sm_100", "weight_left", 128, 64, 1.0),
    ],
)
def test_matrix_units_have_a_rate_for_each_shape(arch, form, n, m, expected):
    on = dataclasses.replace(H100, arch=arch)
    assert roofline.matrix_rate(on, BsrTile(n, m, 16, 4, 4, form)) == pytest.approx(expected)


def test_a_step_multiplies_whole_tiles_and_reads_the_rows_that_there_are():
    tile = BsrTile(32, 64, 16, 4, 4)
    multiply, fill = roofline.step_seconds(TOY, tile, 16, 8)
    assert multiply == pytest.approx(2 * 64 * 32 * 8 * 10 / 1e12)
    assert fill == pytest.approx(2 * (16 + 32) * 8 * 10 / 16e9)
    vector = BsrTile(16, 4, 16, 4, 4, "vector")
    multiply, _ = roofline.step_seconds(TOY, vector, 3, 8)
    assert multiply == pytest.approx(2 * (3 + 1) * 16 * 8 * 10 / 1e11)


def test_reach_is_the_tiles_intensity_by_the_cards():
    # 128 * 64 / (128 + 64) operations a byte at 10.45 TB/s, of 989.4 TFLOP/s
    assert roofline.tile_reach(H100, BsrTile(64, 128, 64, 4, 8)) == pytest.approx(0.451, abs=1e-3)
    assert roofline.tile_reach(FAST, BsrTile(64, 128, 64, 4, 8)) == 1


@pytest.mark.parametrize(
    ("lengths", "parts", "split", "tiles_m", "processors", "expected"),
    [
        ((3, 1, 1, 1), 1, 1, 1, 2, 3),
        ((3, 1, 1, 1), 1, 1, 2, 2, 6),
        ((3, 1, 1, 1), 2, 1, 1, 12, 3),
        ((5, 3), 1, 2, 1, 8, 3),  # 3 + 2, 2 + 1
        ((5, 0), 1, 4, 1, 1, 5),  # 2 + 2 + 1 + nothing
        ((2, 2, 2), 1, 1, 1, 2, 4),
        ((0, 0), 1, 1, 1, 4, 0),
    ],
)
def test_programs_are_handed_out_in_order(lengths, parts, split, tiles_m, processors, expected):
    assert roofline.makespan(lengths, parts, split, tiles_m, processors) == expected


def test_random_patterns_grow_and_are_as_many_as_asked_for():
    before = (0,) * 8
    for nnz in (0, 1, 13, 40, 79, 80):
        lengths = roofline.row_lengths(8, 10, nnz)
        assert sum(lengths) == nnz
        assert list(lengths) == sorted(lengths, reverse=True)
        assert all(a <= b <= 10 for a, b in zip(before, lengths, strict=True))
        before = lengths


@pytest.mark.parametrize("name", CARD_NAMES)
def test_predictions_stay_within_the_ideal_and_that_within_the_density(name):
    on, sparsities = card(name), (0.05, 0.5, 0.9, 0.95)
    for M, block in itertools.product((1, 16, 64, 4096), (16, 64, 128)):
        size = M, 4096, 2048, block
        ideal = [roofline.ideal_speedup(on, *size, s) for s in sparsities]
        assert ideal == sorted(ideal)
        for s, most in zip(sparsities, ideal, strict=True):
            assert 0 < roofline.predicted_speedup(on, *size, s) <= most
            assert most <= 1 / (1 - s) + 1e-9


@pytest.mark.parametrize("split", [1, 4])
def test_fewer_blocks_never_take_longer_with_the_same_tile(split):
    tile = BsrTile(64, 64, 32, 4, 4, split=split)
    times = [
        roofline.predict(H100, 64, 4096, 4096, 64, s / 100, tile).seconds for s in range(0, 100, 3)
    ]
    assert times == sorted(times, reverse=True)


def test_each_bound_is_named_where_it_bounds():
    wide, tall = BsrTile(64, 128, 64, 4, 8), BsrTile(128, 64, 64, 4, 8)

    def bound(on, M, N, block, sparsity, tile):
        return roofline.predict(on, M, N, 4096, block, sparsity, tile).bound

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
    size = 4096, 2048, 256, 64, 0.5
    held, again = (
        roofline.predict(on, *size, tile).seconds for on in (dataclasses.replace(TOY, l2_mb=2), far)
    )
    # 10 programs are part of a strip of outputs; 32 strips read half of x; 64 blocks in 32 rows
    moved = 2 * (0.5 * 2048 * 256 + 4096 * 2048) + 16 * 2 * 4096 * 256 + 4 * (64 + 32)
    assert again == pytest.approx(moved / 1e9 + 2e-6)
    assert again > held


def test_pairs_are_not_predicted():
    with pytest.raises(ValueError, match="pairs of rows"):
        roofline.predict(H100, 64, 4096, 4096, 64, 0.5, BsrTile(128, 64, 32, 4, 8, "pairs"))


@pytest.mark.parametrize("block", [16, 128])
def test_from_the_break_even_on_nothing_is_slower_than_dense(block):
    size = 512, 4096, 4096, block
    least = round(100 * roofline.break_even(H100, *size))
    assert 1 < least < 100
    speedups = [roofline.predicted_speedup(H100, *size, s / 100) for s in range(least - 1, 100)]
    assert speedups[0] < 1 <= min(speedups[1:])


def test_without_a_break_even_it_is_1():
    # one block takes (64 + 128) 128 2 bytes at 0.1 GB/s, 492 us; dense 134 us
    slow = dataclasses.replace(TOY, bandwidth_gbs=1e9, l2_bytes_per_clock=1)
    assert roofline.break_even(slow, 64, 1024, 1024, 128) == 1
