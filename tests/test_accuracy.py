import sys

import pytest
import torch

from bench import __main__ as command_line
from bench import accuracy, report, rows
from bench.accuracy import Cell
from sgtriton.demo.data import Digits


def digits() -> Digits:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(40, 1, 28, 28, generator=generator)
    y = torch.arange(40) % 10
    return Digits(dataset="noise", source="made here", train_x=x, train_y=y, test_x=x, test_y=y)


def test_rows_survive_the_csv_and_land_on_the_target(tmp_path):
    path = tmp_path / "results" / "accuracy.csv"
    assert rows.read(path, accuracy.Row) == []
    measured = []
    for cell in (Cell("none", "-", 0.0), Cell("threshold", "4x4", 0.9)):
        measured.append(accuracy.measure("lenet300", digits(), cell, seed=0, epochs=2))
        rows.append(path, measured[-1])
    assert rows.read(path, accuracy.Row) == measured
    dense, gated = measured
    assert dense.sparsity == 0
    assert abs(gated.sparsity - 0.9) <= 0.005
    assert len(gated.open_per_layer.split()) == 3


def test_page_of_measurements_is_what_the_results_give():
    """README_BENCH.md is generated: a figure that is edited by hand fails here."""
    assert report.PAGE.read_text(encoding="utf-8") == report.page()


@pytest.mark.parametrize("option", ["--epochs", "--seeds"])
def test_no_training_at_all_is_refused(option, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(accuracy, "load_digits", lambda _: pytest.fail("data was read"))
    out = tmp_path / "a.csv"
    monkeypatch.setattr(sys, "argv", ["bench", "accuracy", option, "0", "--out", str(out)])
    assert command_line.main() == 2
    assert f"{option} must be at least 1, got 0" in capsys.readouterr().err
    assert not out.exists()
