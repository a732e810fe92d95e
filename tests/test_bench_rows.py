"""Files of measurements: when they are replaced, and which commit they name."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import subprocess
import sys

import pytest
from sgtriton_kernels.records import cache_folder

from bench import __main__ as command_line
from bench import conv, models, report, roofline, rows, serving, timed, training


@dataclasses.dataclass(frozen=True)
class Row:
    ms: float


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder in place of the kept results."""
    monkeypatch.setattr(timed, "RESULTS", tmp_path)
    return tmp_path


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    return command_line.main()


def test_a_stop_keeps_the_file_and_what_was_measured(tmp_path):
    path = tmp_path / "x.csv"
    assert rows.write(path, [Row(1.0), Row(2.0)]) == [Row(1.0), Row(2.0)]

    def stopped():
        yield Row(3.0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rows.write(path, stopped())
    assert rows.read(path, Row) == [Row(1.0), Row(2.0)]
    assert rows.read(tmp_path / "x.csv.part", Row) == [Row(3.0)]
    rows.write(path, [Row(4.0)])
    assert rows.read(path, Row) == [Row(4.0)]
    assert [file.name for file in tmp_path.iterdir()] == ["x.csv"]


def test_what_was_not_measured_survives_the_file(tmp_path):
    path = tmp_path / "x.csv"
    rows.append(path, Row(math.nan), Row(1.0))
    assert path.read_text().split() == ["ms", "-", "1.0"]
    assert rows.read(path, Row) == [Row(math.nan), Row(1.0)]


def test_nothing_measured_replaces_nothing(tmp_path):
    path = tmp_path / "x.csv"
    rows.write(path, [Row(1.0)])
    with pytest.raises(ValueError, match="no rows"):
        rows.write(path, [])
    assert rows.read(path, Row) == [Row(1.0)]


@pytest.mark.parametrize(
    "arguments",
    [
        ["sweep", "serve", "--rows", "1"],
        ["sweep", "serve", "--blocks", "16", "32"],
        ["sweep", "serve", "--dtype", "float32"],
        ["sweep", "serve", "--sparsities", "0.9"],
        ["sweep", "conv", "--batch", "1"],
        ["sweep", "conv", "--dtype", "bfloat16"],
        ["sweep", "train", "--quick"],
        ["sweep", "model", "--quick"],
        ["roofline", "--cards", "H200"],
    ],
)
def test_a_part_of_a_grid_needs_a_file_of_its_own(arguments, results, monkeypatch, capsys):
    for module in (serving, conv, training, models):
        monkeypatch.setattr(module, "measure", None)
    monkeypatch.setattr(roofline, "predict", None)
    assert run(monkeypatch, *arguments) == 2
    assert "needs --out" in capsys.readouterr().err
    assert list(results.iterdir()) == []


def test_the_whole_grid_has_a_default(results):
    parser = argparse.ArgumentParser()
    timed.add_arguments(parser, "serving", 1.0, "")
    arguments = parser.parse_args(["--threads", "1"])
    timed.prepare(arguments)
    assert arguments.out == results / "serving.csv"


def test_the_commit_is_asked_for_before_anything_is_timed(results, monkeypatch):
    asked = []
    monkeypatch.setattr(timed, "commit", lambda: asked.append(True))
    parser = argparse.ArgumentParser()
    timed.add_arguments(parser, "serving", 1.0, "")
    timed.prepare(parser.parse_args(["--threads", "1"]))
    assert asked == [True]


def test_results_do_not_mark_a_commit_as_dirty(tmp_path, monkeypatch):
    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(
            ["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    (tmp_path / "bench" / "results").mkdir(parents=True)
    files = ["bench/rows.py", "bench/results/x.csv", "README.md"]
    for name in files:
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(rows, "__file__", str(tmp_path / "bench" / "rows.py"))
    ask = rows.commit.__wrapped__
    git("init", "-q")
    assert ask() == "unknown"
    git("add", ".")
    git("commit", "-qm", "x")
    head = git("rev-parse", "--short", "HEAD")
    for name in files[1:]:
        (tmp_path / name).write_text("2")
    (tmp_path / "bench" / "results" / "x.csv").unlink()
    assert ask() == head
    (tmp_path / "bench" / "rows.py").write_text("2")
    assert ask() == head + "-dirty"


def test_measuring_depends_on_no_record_of_the_user(monkeypatch, tmp_path):
    """Nor does it leave any there."""
    monkeypatch.setenv("SGTRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["bench", "report"])
    folders = []
    monkeypatch.setattr(report, "_run", lambda arguments: folders.append(cache_folder()) or 0)
    assert command_line.main() == 0
    assert folders[0] is not None
    assert tmp_path not in folders[0].parents
    assert os.environ["SGTRITON_CACHE_DIR"] == str(tmp_path)
