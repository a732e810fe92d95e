"""The cost model's constants against what was measured of serving."""

import collections
import statistics

import pytest
import torch

from bench import rows, serving, timed
from bench.serving_tables import side
from sgtriton import cost_model


def factors(dtype):
    """Expected over measured speed-up of the product over blocks, cell by cell."""
    cells = collections.defaultdict(dict)
    for r in rows.read(rows.RESULTS / "serving.csv", serving.Row):
        if r.dtype == dtype and r.op == "bsr_linear" and r.is_measured:
            cells[r.block, r.sparsity, r.M, r.N, r.K][r.provider] = r
    found = []
    for by_name in cells.values():
        r = by_name["sgtriton, product over blocks"]
        expected = cost_model.expected_speedup(
            "sparse", (side(r.block), side(r.block)), r.density, (r.N, r.K), r.M,
            timed.DTYPES[dtype], torch.device("cpu"),
        )  # fmt: skip
        found.append(expected / (by_name["dense"].ms_p50 / r.ms_p50))
    return found


def share_within(found, most):
    return sum(max(f, 1 / f) <= most for f in found) / len(found)


def model_fits():
    """What is promised of the model; the CSV has 0.98 and 1 in fp32, 0.94 in bf16, median 1.00."""
    wide, half = factors("float32"), factors("bfloat16")
    assert len(wide) == len(half) == 144
    return (
        share_within(wide, 1.5) >= 0.95
        and share_within(wide, 2.5) == 1
        and 0.9 <= statistics.median(wide) <= 1.1
        and share_within(half, 1.5) >= 0.92
    )


@pytest.fixture(autouse=True)
def on_the_cpu_that_was_measured(monkeypatch):
    monkeypatch.setattr(cost_model, "_is_slow_at_16_bits", lambda: True)


def test_expected_speedups_are_near_the_measured_ones():
    for dtype in ("float32", "bfloat16"):
        found = factors(dtype)
        shares = ", ".join(
            f"{share_within(found, most):.1%} in {most}" for most in (1.25, 1.5, 2.5)
        )
        print(f"{dtype}: {shares}; median {statistics.median(found):.2f}")
    assert model_fits()


def scaled(kept, factor):
    return {key: factor * value for key, value in kept.items()}


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("_RATES", lambda kept: kept | {"cpu": (2 * kept["cpu"][0], kept["cpu"][1])}),
        ("_RATES", lambda kept: kept | {"cpu": (kept["cpu"][0] / 2, kept["cpu"][1])}),
        ("_RATES", lambda kept: kept | {"cpu": (kept["cpu"][0], 2 * kept["cpu"][1])}),
        ("_RATES", lambda kept: kept | {"cpu": (kept["cpu"][0], kept["cpu"][1] / 3)}),
        ("_REACHED", lambda kept: kept | {"cpu": scaled(kept["cpu"], 1.5)}),
        ("_REACHED", lambda kept: kept | {"cpu": scaled(kept["cpu"], 1 / 1.5)}),
        ("_CALL", lambda kept: kept | {"sparse": 2 * kept["sparse"]}),
        ("_CALL", lambda kept: kept | {"sparse": kept["sparse"] / 2}),
        ("_PACKING", lambda _: 0.0),
        ("_ONE_ROW", lambda _: 0.0),
        ("_SLOW_RATE", lambda kept: 2 * kept),
        ("_SLOW_RATE", lambda kept: kept / 2),
    ],
)
def test_a_wrong_constant_is_noticed(name, wrong, monkeypatch):
    monkeypatch.setattr(cost_model, name, wrong(getattr(cost_model, name)))
    assert not model_fits()
