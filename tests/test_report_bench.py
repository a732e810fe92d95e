"""What is kept of measurements and predictions is what the code makes of it now."""

import dataclasses

import pytest
import test_serving_bench

from bench import report, roofline, rows
from bench.sweep import SWEEPS


def test_the_page_is_what_the_results_give():
    assert report.page() == report.PAGE.read_text(encoding="utf-8"), "run python -m bench report"


def test_kept_predictions_are_those_of_the_model():
    kept = rows.read(rows.RESULTS / "roofline.csv", roofline.Row)
    different = [
        (old, new) for old, new in zip(kept, roofline.predict_rows(), strict=True) if old != new
    ]
    assert not different, f"run python -m bench roofline: {len(different)} rows, {different[0]}"


@pytest.mark.parametrize("name", SWEEPS)
def test_kept_results_are_read_and_shown(name):
    sweep = SWEEPS[name]
    kept = rows.read(rows.RESULTS / f"{sweep.file}.csv", sweep.row)
    assert kept
    # with the file's own name: lines are wrapped around it
    assert sweep.section(kept, "", f"bench/results/{sweep.file}.csv") in report.page()


@pytest.mark.parametrize(
    ("device", "card"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100 SXM 80GB"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("AMD Instinct MI300X", "MI300X"),
        ("AMD Radeon RX 7900 XTX", "RX 7900 XTX"),
    ],
)
def test_a_measured_card_is_not_called_unmeasured(device, card):
    left = report.not_measured([device])
    assert card not in left
    assert len(left) == len(report.CARD_NAMES) - 1


@pytest.mark.parametrize(
    "device",
    ["AMD EPYC", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-40GB", "NVIDIA GeForce RTX 4090 Laptop GPU"],
)
def test_another_device_is_no_card_of_the_list(device):
    assert report.not_measured([device]) == list(report.CARD_NAMES)


def test_results_of_a_card_get_sections_of_their_own(tmp_path, monkeypatch):
    of_card = [
        dataclasses.replace(
            row, device="NVIDIA H100 80GB HBM3", peak_mib=2.0, ms_p50=1.0, ratio=1.0
        )
        for row in test_serving_bench.cell_rows()
    ]
    rows.append(tmp_path / "nvidia-h100-80gb-hbm3" / "serving.csv", *of_card)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    text = report.page()
    assert "## Serving a pruned linear layer on NVIDIA H100 80GB HBM3\n" in text
    assert "python -m bench sweep serve --device cuda" in text
    assert "docs/bench/nvidia-h100-80gb-hbm3_serving_heat_float32.svg" in text
    head = text.split("## What ran where")[0]
    assert "H200" in head
    assert "H100" not in head
    assert "| nvidia-h100-80gb-hbm3/serving.csv |" in text


def test_what_compilers_say_is_counted_by_target_and_version():
    lines = [
        {"target": "sm_80", "triton": "3.6.0", "violations": "-"},
        {"target": "sm_80", "triton": "3.8.0", "violations": ""},
        {"target": "sm_80", "triton": "3.8.0", "violations": "8 bytes spilled"},
        {"target": "sm_90", "triton": "3.8.0", "violations": ""},
    ]
    assert report.compiled_table(lines).splitlines()[2:] == [
        "| sm_80 | 1 (0) | 2 (1) |",
        "| sm_90 | - | 1 (0) |",
    ]
