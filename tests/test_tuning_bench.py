"""The tuner beside an exhaustive search: what the rows say."""

import pytest

from bench import __main__ as command_line
from bench import tuning
from bench.rows import read


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(tuning, "WEIGHTS", ((64, 96, 16, 0.5), (60, 50, 4, 0.3)))
    monkeypatch.setattr(tuning, "ROWS", (1, 3))


def test_rows_hold_all_candidates_and_both_choices(small, tmp_path, monkeypatch, capsys):
    out = tmp_path / "t.csv"
    arguments = ["bench", "tuning", "--seconds", "0.3", "--rounds", "3", "--out", str(out)]
    monkeypatch.setattr("sys.argv", arguments)
    assert command_line.main() == 0
    rows = read(out, tuning.Row)
    found = tuning.cells(rows)
    assert [(c.M, c.N, c.K) for c in found] == [(1, 64, 96), (3, 64, 96), (1, 60, 50), (3, 60, 50)]
    assert all(sum((r.M, r.N) == (c.M, c.N) for r in rows) >= 6 for c in found)
    assert min(r.ratio for r in rows) == 1
    text = capsys.readouterr().out
    assert "Of 4 cells the tuned choice" in text
    assert tuning.section(rows).count("\n| ") == 5


def row(name, ratio, tuned=0, analytic=0, m=1):
    return tuning.Row(
        candidate=name, tuned=tuned, analytic=analytic, M=m, N=4, K=4, block=2, density=0.5,
        ms_p20=ratio, ms_p50=ratio, ms_p80=ratio, ratio=ratio, samples=1, threads=1, cpu="c",
        sgtriton="", torch="", python="", commit="",
    )  # fmt: skip


def test_words_count_what_is_missed():
    rows = [
        row("a", 1.0, tuned=1), row("b", 1.2, analytic=1),
        row("a", 1.05, tuned=1, m=2), row("b", 1.0, analytic=1, m=2),
    ]  # fmt: skip
    text = tuning.in_words(tuning.cells(rows))
    assert "within 3% of the fastest in 1 (at most 1.05 of its time)" in text
    assert "within 15% in 1 (at most 1.20)" in text
    assert text.endswith("takes longer than the reasoned one in 1.")
