"""What a card does in a second, against figures worked out by hand."""

import dataclasses

import pytest
import torch
from sgtriton_kernels.cards import card
from sgtriton_kernels.tiles import BsrTile
from toy_card import FAST, TOY

from sgtriton import card_rates

H100, A100 = card("H100 SXM"), card("A100 SXM 80GB")


@pytest.mark.parametrize(
    ("name", "dtype", "precision", "expected"),
    [
        ("H100 SXM", torch.bfloat16, "ieee", 989.4),
        ("H100 SXM", torch.float16, "tf32", 989.4),
        ("H100 SXM", torch.float32, "ieee", 66.9),
        ("H100 SXM", torch.float32, "tf32", 494.7),
        ("MI300X", torch.float32, "tf32", 163.4),  # which kernels do not ask for there
        ("RX 7900 XTX", torch.float32, "tf32", 61.4),
        ("B200", torch.float32, "ieee", 2 * 128 * 148 * 1.965e-3),  # of which there is no document
    ],
)
def test_peaks_of_dtypes(name, dtype, precision, expected):
    assert card_rates.peak(card(name), dtype, precision) == pytest.approx(expected * 1e12)


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match="dtype must be float32, float16 or bfloat16"):
        card_rates.peak(H100, torch.float64)


def test_fill_bandwidths_are_published_or_said_to_be_assumed():
    assert card_rates.fill_bandwidth(A100) == (pytest.approx(5120 * 1.41e9), "published")
    assert card_rates.fill_bandwidth(H100) == (pytest.approx(40 * 132 * 1.98e9), "assumed")


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
    assert card_rates.matrix_rate(on, BsrTile(n, m, 16, 4, 4, form)) == pytest.approx(expected)


def test_a_step_multiplies_whole_tiles_and_reads_the_rows_that_there_are():
    tile = BsrTile(32, 64, 16, 4, 4)
    multiply, fill = card_rates.step_seconds(TOY, tile, 16, 8)
    assert multiply == pytest.approx(2 * 64 * 32 * 8 * 10 / 1e12)
    assert fill == pytest.approx(2 * (16 + 32) * 8 * 10 / 16e9)
    vector = BsrTile(16, 4, 16, 4, 4, "vector")
    multiply, _ = card_rates.step_seconds(TOY, vector, 3, 8)
    assert multiply == pytest.approx(2 * (3 + 1) * 16 * 8 * 10 / 1e11)


def test_reach_is_the_tiles_intensity_by_the_cards():
    # 128 * 64 / (128 + 64) operations a byte at 10.45 TB/s, of 989.4 TFLOP/s
    assert card_rates.tile_reach(H100, BsrTile(64, 128, 64, 4, 8)) == pytest.approx(0.451, abs=1e-3)
    assert card_rates.tile_reach(FAST, BsrTile(64, 128, 64, 4, 8)) == 1


def test_steps_of_fp32_take_fp32_units_and_twice_the_bytes():
    tile = BsrTile(32, 64, 16, 4, 4)
    multiply, fill = card_rates.step_seconds(TOY, tile, 16, 8, torch.float32)
    assert multiply == pytest.approx(2 * 64 * 32 * 8 * 10 / 1e11)
    assert fill == pytest.approx(4 * (16 + 32) * 8 * 10 / 16e9)
    # nothing is converted
    vector = BsrTile(16, 4, 16, 4, 4, "vector")
    multiply, _ = card_rates.step_seconds(TOY, vector, 3, 8, torch.float32)
    assert multiply == pytest.approx(2 * 3 * 16 * 8 * 10 / 1e11)


def test_tf32_has_matrix_units_and_their_rates():
    narrow = BsrTile(64, 32, 16, 4, 4)
    exact, _ = card_rates.step_seconds(H100, narrow, 32, 8, torch.float32)
    rounded, _ = card_rates.step_seconds(H100, narrow, 32, 8, torch.float32, "tf32")
    assert exact == pytest.approx(2 * 32 * 64 * 8 * 132 / 66.9e12)
    assert rounded == pytest.approx(2 * 32 * 64 * 8 * 132 / (0.63 * 494.7e12))
