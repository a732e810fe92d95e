"""The tuner beside an exhaustive search: what the rows say."""

import pytest

from bench import __main__ as command_line
from bench import tuning
from bench.rows import RESULTS, read


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(tuning, "FITTED", ((64, 96, 16, 0.5),))
    monkeypatch.setattr(tuning, "HELD_OUT", ((60, 50, 4, 0.3),))
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
    assert [c.fitted for c in found] == [1, 1, 0, 0]
    assert {(r.seconds, r.rounds) for r in rows} == {(0.3, 3)}
    text = " ".join(capsys.readouterr().out.split())
    assert "Of 2 cells that the reasoned choice was fitted to, the tuned one" in text
    assert "Of 2 cells that the reasoned choice was not fitted to, the tuned one" in text
    page = tuning.section(rows)
    assert page.count("\n| ") == 5
    assert "4 products on" in page
    assert "makes in 0.3 seconds for each" in " ".join(page.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--rounds", "3"], "--rounds 3 needs --out: tuning.csv is of 61"),
        (["--seconds", "1"], "--seconds 1 needs --out: tuning.csv is of 4"),
    ],
)
def test_other_options_do_not_replace_what_is_kept(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(tuning, "measure", lambda *_: pytest.fail("a cell was measured"))
    monkeypatch.setattr("sys.argv", ["bench", "tuning", *arguments])
    assert command_line.main() == 2
    assert message in capsys.readouterr().err


def test_kept_choices_are_as_near_to_the_fastest_as_is_aimed_at():
    found = tuning.cells(read(RESULTS / "tuning.csv", tuning.Row))
    assert len(found) >= 20
    assert [c for c in found if c.tuned_ratio > tuning.TUNED_WITHIN] == []
    fitted = [c for c in found if c.fitted]
    assert len(fitted) == len(tuning.FITTED) * len(tuning.ROWS)
    assert [c for c in fitted if c.analytic_ratio > tuning.REASONED_WITHIN] == []


def row(name, ratio, tuned=0, analytic=0, m=1):
    return tuning.Row(
        candidate=name, tuned=tuned, analytic=analytic, fitted=1, M=m, N=4, K=4, block=2,
        density=0.5,         ms_p20=ratio, ms_p50=ratio, ms_p80=ratio, ratio=ratio, samples=1,
        seconds=4.0, rounds=61, threads=1, cpu="c", sgtriton="", torch="", python="", commit="",
    )  # fmt: skip


def test_words_count_what_is_missed():
    rows = [
        row("a", 1.0, tuned=1), row("b", 1.2, analytic=1),
        row("a", 1.05, tuned=1, m=2), row("b", 1.0, analytic=1, m=2),
    ]  # fmt: skip
    text = " ".join(tuning.in_words(tuning.cells(rows)).split())
    assert "within 3% of the fastest in 1 (at most 1.05 of its time)" in text
    assert "within 15% in 1 (at most 1.20)" in text
    assert text.endswith("takes longer than the reasoned one in 1.")
