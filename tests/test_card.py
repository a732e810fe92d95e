"""``python -m bench card``: parts in their time, and nothing lost however it ends."""

import csv
import functools
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import card, card_parts, card_sweeps, correctness
from bench.__main__ import main
from bench.card_parts import Part, Progress

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent
# what the command must do without
EXTRAS = (
    "pandas", "matplotlib", "rich", "tqdm", "scipy", "onnx", "onnxruntime", "torchao", "mlxtend",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SGTRITON_CACHE_DIR", str(tmp_path / "cache"))


def part(name, *steps, share=1.0):
    """A part that yields numbers as progress, calls functions, and writes a line for each."""

    def run(deadline, folder, device):
        for step in steps:
            if callable(step):
                step = step(deadline, folder) or 0
            with open(folder / f"{name}.csv", "a", encoding="utf-8") as file:
                file.write(f"{step}\n")
            yield Progress(step, 3)

    return Part(name, share, run)


def run(parts, folder, minutes=1.0):
    said = []
    lines, status = card.run(parts, minutes, folder, CPU, said.append)
    with open(folder / card.SUMMARY, newline="", encoding="utf-8") as file:
        written = [(row["part"], row["state"], int(row["done"])) for row in csv.DictReader(file)]
    assert written == [(line.part, line.state, line.done) for line in lines]
    return lines, status, said


def test_parts_run_in_order_and_the_summary_is_last(tmp_path):
    lines, status, said = run([part("a", 1, 2, 3), part("b", 2)], tmp_path / "out")
    assert [(line.part, line.state, line.done, line.of) for line in lines] == [
        ("a", "done", 3, 3), ("b", "time was up", 2, 3)]  # fmt: skip
    assert status == 0
    assert said[0].startswith("a: ")
    assert said[-1].endswith("time was up")
    text = card.table(lines, tmp_path / "out")
    assert "a.csv 6 B, b.csv 2 B, summary.csv" in text.splitlines()[-1]
    assert f"PyTorch {torch.__version__}" in text


def test_what_a_part_leaves_goes_to_those_after_it(tmp_path):
    deadlines = []

    def note(deadline, folder):
        deadlines.append(deadline - time.monotonic())

    run([part("a", note), part("b", note, share=3), part("c", note)], tmp_path / "out", 1.0)
    assert deadlines == pytest.approx([12, 45, 60], abs=3)


def test_a_part_that_raises_stops_no_other(tmp_path):
    def fail(deadline, folder):
        raise RuntimeError("no such kernel\nat all")

    lines, status, _ = run([part("a", 1, fail, 2), part("b", 3)], tmp_path / "out")
    assert [(line.state, line.done) for line in lines] == [("failed", 1), ("done", 3)]
    assert "no such kernel" in lines[0].note
    assert status == 1
    assert (tmp_path / "out" / "a.csv").read_text() == "1\n"


def test_failures_in_a_part_give_1(tmp_path):
    bad = Part("a", 1, lambda *_: iter([Progress(3, 3, failed=1)]))
    assert run([bad], tmp_path / "out")[1] == 1


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_keeps_what_there_is(number, status, tmp_path):
    def stop(deadline, folder):
        os.kill(os.getpid(), number)
        time.sleep(10)

    lines, found, _ = run([part("a", 1, 2, stop), part("b", 3)], tmp_path / "out")
    assert found == status
    assert [(line.state, line.done) for line in lines] == [("stopped", 2), ("not begun", 0)]
    assert (tmp_path / "out" / "a.csv").read_text() == "1\n2\n"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_part_that_does_not_end_is_made_to(tmp_path, monkeypatch):
    monkeypatch.setattr(card, "_GRACE", 0.2)

    def hang(deadline, folder):
        time.sleep(60)

    start = time.monotonic()
    lines, _, _ = run([part("a", 1, hang), part("b", 3)], tmp_path / "out", minutes=0.02)
    assert time.monotonic() - start < 30
    assert [(line.state, line.done) for line in lines] == [("time was up", 1), ("done", 3)]
    assert "went on after its time" in lines[0].note


def test_time_that_ends_while_a_line_is_written_costs_no_other_part(tmp_path, monkeypatch):
    monkeypatch.setattr(card, "_GRACE", 0.0)
    monkeypatch.setattr(card, "_EVERY", 0.0)
    write = card.write

    def slow(*given):
        if (tmp_path / "out" / "a.csv").exists() and not (tmp_path / "out" / "b.csv").exists():
            time.sleep(0.7)  # past the end of the first part's share
        return write(*given)

    monkeypatch.setattr(card, "write", slow)
    parts = [part("a", 1, lambda *_: time.sleep(5)), part("b", 3, share=5)]
    lines, status, _ = run(parts, tmp_path / "out", minutes=0.06)
    assert status == 0
    assert [(line.part, line.state, line.done) for line in lines] == [
        ("a", "time was up", 1), ("b", "done", 3)]  # fmt: skip
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_more_than_a_card_may_give_back_is_said(tmp_path, monkeypatch):
    def many(deadline, folder):
        for i in range(8):
            (folder / f"{i}.txt").touch()

    lines, status, _ = run([part("a", many)], tmp_path / "out")
    assert (status, lines[0].state, lines[0].note) == (1, "failed", "10 files, 8 are allowed")

    def deep(deadline, folder):
        (folder / "deep").mkdir()
        (folder / "large.csv").write_bytes(b"12345")

    monkeypatch.setattr(card, "MOST_BYTES", 4)
    lines, _, _ = run([part("b", deep)], tmp_path / "other")
    assert "folders: deep" in lines[0].note
    assert "large.csv" in lines[0].note


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0"], "--minutes must be positive and finite, got 0"),
        (["--minutes", "inf"], "--minutes must be positive and finite, got inf"),
        (["--minutes", "nan"], "--minutes must be positive and finite, got nan"),
        (["--device", "foo"], "--device must be cpu or cuda, got 'foo'"),
        (["--device", "cuda:1"], "CUDA_VISIBLE_DEVICES chooses one"),
        (["--device", "cuda"], "--device cuda needs a GPU"),
        ([], "--out must be an empty folder or none yet"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder = tmp_path if not arguments else tmp_path / "out"
    (tmp_path / "kept").touch()
    monkeypatch.setattr(sys, "argv", ["bench", "card", "--out", str(folder), *arguments])
    assert main() == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize("status", [correctness.SKIPPED, correctness.WRONG])
def test_correctness_without_a_check_that_is_ok_has_failed(status, tmp_path, monkeypatch):
    """Time that sufficed for none ended with 0, as if all had been right."""
    place = correctness.make_place(CPU)
    some = correctness.checks(place)[:2]
    rows = [correctness.row(c, place, status, correctness.NO_TIME, 0.0) for c in some]
    monkeypatch.setattr(correctness, "checks", lambda place: some)
    monkeypatch.setattr(correctness, "run", lambda *_: iter(rows))
    lines, found, _ = run([card_parts.CORRECTNESS], tmp_path / "out")
    assert (found, lines[0].state, lines[0].of) == (1, "failed", 2)
    assert "nothing is known to be right: 0 of 2 checks ok" in lines[0].note


@dataclass
class Timed:
    """A row of a sweep."""

    cell: int
    provider: str
    status: str = "measured"
    seconds: float = 0.0

    @property
    def is_measured(self):
        return self.status == "measured"

    @property
    def is_ours(self):
        return self.provider == "ours"


def sweep(measure, cells=6):
    return SimpleNamespace(
        file="serving", seconds=1.0, quick_seconds=0.1, add_arguments=lambda parser: None,
        tasks=lambda given: [
            SimpleNamespace(key=(i,), measure=functools.partial(measure, i)) for i in range(cells)
        ],
        missing=lambda given: [Timed(0, "scipy BSR", "missing: not installed")],
    )  # fmt: skip


def test_a_sweep_covers_its_grid_and_names_who_is_missing(tmp_path, monkeypatch):
    def measure(i):
        if i == 4:
            raise RuntimeError("out of memory")
        return [Timed(i, "dense"), Timed(i, "ours", "wrong: 3 differ" if i == 1 else "measured")]

    monkeypatch.setattr(card_sweeps, "_sweeps", lambda: {"serve": sweep(measure)})
    serve = card_sweeps.SWEEP_PARTS[0]
    *_, last = serve.run(time.monotonic() + 60, tmp_path, CPU)
    assert (last.done, last.of, last.failed) == (6, 6, 2)
    assert last.missing == ("scipy BSR (not installed)",)
    assert last.note == "(4,): RuntimeError: out of memory"
    with open(tmp_path / "serving.csv", newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    cells = [int(row["cell"]) for row in found if row["provider"] == "dense"]
    assert {row["seconds"] for row in found} == {"0.1"}
    assert cells == [0, 2, 1, 5, 3]  # 4 gave none

    first, *rest = serve.run(time.monotonic() - 1, tmp_path, CPU)
    assert (first.done, first.of, rest) == (0, 6, [])


def test_a_sweep_begins_no_cell_that_would_not_end(tmp_path, monkeypatch):
    def measure(i):
        time.sleep(0.4)
        return [Timed(i, "ours")]

    monkeypatch.setattr(card_sweeps, "_sweeps", lambda: {"serve": sweep(measure)})
    *_, last = card_sweeps.SWEEP_PARTS[0].run(time.monotonic() + 0.6, tmp_path, CPU)
    assert last.done == 1


def test_a_sweep_that_is_not_there_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(card_sweeps, "_sweeps", dict)
    (only,) = card_sweeps.SWEEP_PARTS[0].run(time.monotonic() + 60, tmp_path, CPU)
    assert only.note == "there is no sweep serve"


@pytest.mark.parametrize("count", [0, 1, 2, 5, 8])
def test_every_beginning_of_a_spread_order_covers_the_whole(count):
    order = card_sweeps._spread(range(count))
    assert sorted(order) == list(range(count))
    if count == 8:
        assert order[:4] == [0, 4, 2, 6]


def in_a_process(folder, cache, minutes, before="", **options):
    """The command in a process that lacks all extras."""
    program = f"""
import sys
sys.modules.update(dict.fromkeys({EXTRAS!r}))  # as if not installed
from bench.__main__ import main
{before}
sys.argv = ["bench", "card", "--device", "cpu", "--minutes", "{minutes}", "--out", {str(folder)!r}]
sys.exit(main())
"""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "SGTRITON_CACHE_DIR": str(cache), "SGTRITON_IMPL": "torch",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True,
        check=False, **options,
    )  # fmt: skip


def check_files(folder):
    files = list(folder.iterdir())
    assert len(files) <= card.MOST_FILES
    assert all(path.is_file() and path.stat().st_size <= card.MOST_BYTES for path in files)
    with open(folder / "correctness.csv", newline="", encoding="utf-8") as file:
        statuses = {row["status"] for row in csv.DictReader(file)}
    assert "ok" in statuses
    assert not statuses & {correctness.WRONG, correctness.FAILED}


def test_it_runs_without_any_extra(tmp_path):
    few = """
from bench import card_tuning, correctness, standard_products
every, most = correctness.checks, standard_products.standard_products
correctness.checks = lambda place: every(place)[::40]
standard_products.SHAPES = ((64, 64),)
card_tuning.standard_products = lambda **given: most(**given)[:1]
"""
    ran = in_a_process(tmp_path / "out", tmp_path / "cache", 0.4, few)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("part ")
    check_files(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_minutes_on_a_cpu(tmp_path):
    start = time.monotonic()
    ran = in_a_process(tmp_path / "out", tmp_path / "cache", 2)
    assert ran.returncode == 0, ran.stderr
    assert time.monotonic() - start < 240
    for name in (p.name for p in card.PARTS):
        assert f"\n{name}" in ran.stdout
    assert "failed," not in ran.stderr
    check_files(tmp_path / "out")
