"""The CSV and the tables of what is predicted."""

import sys

from bench import __main__ as command_line
from bench import roofline, rows
from sgtriton.roofline import BOUNDS


def test_rows_are_marked_and_come_back_from_the_csv(tmp_path, monkeypatch, capsys):
    path = tmp_path / "roofline.csv"
    argv = ["bench", "roofline", "--cards", "H200", "MI300X", "--out", str(path)]
    monkeypatch.setattr(roofline, "SHAPES", ((4096, 4096),))
    monkeypatch.setattr(sys, "argv", argv)
    assert command_line.main() == 0
    found = rows.read(path, roofline.Row)
    assert found == roofline.predict_rows(["H200", "MI300X"])
    assert {row.status for row in found} == {"predicted, not measured"}
    assert {row.bound for row in found} <= {*BOUNDS}
    printed = capsys.readouterr().out
    table = roofline.roofline_table(found)
    assert table in printed
    lines = table.splitlines()
    assert "predicted, not measured" in lines[0]
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| H200", "| MI300X"]
    assert {line.count("|") for line in lines} == {5}
    cell = next(
        row for row in found if (row.card, row.M, row.block, row.sparsity) == ("H200", 64, 64, 0.9)
    )
    assert f" / {cell.predicted:.1f} / " in lines[2].split(" | ")[2]
