"""Sweeps from the command line: a grid whole, narrowed, stopped, gone on with; wrong results."""

import csv
import sys

import pytest
import torch

from bench import __main__ as command_line
from bench import rows, serving, sweep, timed, training

QUICK = ["--quick", "--seconds", "0", "--threads", "1"]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run a sweep of small cells into a file; its exit code."""
    tiny = serving.Grid(("float32",), (16,), (0.5,), ((32, 32), (64, 32)), (1, 3))
    monkeypatch.setattr(serving, "QUICK", tiny)
    monkeypatch.setattr(serving.roofs, "sizes", lambda *_: {"copy": (1, 8, 8), "matmul": (8, 8, 8)})
    monkeypatch.setattr(training, "QUICK_SHAPES", ((4, 32, 64),))
    monkeypatch.setattr(training.peers, "why_not_compile", lambda _: "it takes long")

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", ["bench", "sweep", name, *QUICK, *arguments])
        return command_line.main()

    return run


@pytest.fixture
def out(tmp_path):
    return tmp_path / "folder" / "x.csv"


def columns(path):
    with path.open(newline="", encoding="utf-8") as file:
        return next(csv.reader(file))


def test_a_grid_is_measured_with_its_peers_and_roofs(run, out, capsys):
    assert run("serve", "--out", str(out)) == 0
    found = rows.read(out, serving.Row)
    assert columns(out)[:9] == [
        "op", "provider", "pass", "M", "N", "K", "dtype", "block", "density",
    ]  # fmt: skip
    assert {"copy", "matmul", "bsr_linear"} == {r.op for r in found if r.is_measured}
    products = [r for r in found if r.op == "bsr_linear" and r.M]
    assert [(r.N, r.M) for r in products if r.provider == "dense"] == [
        (32, 1), (32, 3), (64, 1), (64, 3),
    ]  # fmt: skip
    assert {r.triton for r in found} != {""}
    said = capsys.readouterr()
    assert "blksprs (float32): missing: for GPUs only" in said.out
    assert f"wrote {out}" in said.out
    assert "cells 100 %" in said.err
    assert [file.name for file in out.parent.iterdir()] == ["x.csv"]


def test_a_gated_step_is_measured(run, out, capsys):
    assert run("train", "--out", str(out)) == 0
    found = rows.read(out, training.Row)
    assert {(r.gate, r.block) for r in found if r.M} == {
        ("threshold", "1x1"), ("bernoulli", "1x1"), ("threshold", "32x32"),
    }  # fmt: skip
    assert "max-autotune (float32): missing: it takes long" in capsys.readouterr().out


def stop_before(monkeypatch, number):
    """Ctrl-C before that cell is measured; the cells measured so far."""
    seen, measure = [], serving.measure

    def stopping(of, m, *rest):
        if len(seen) == number:
            raise KeyboardInterrupt
        seen.append((len(of.weight), m))
        return measure(of, m, *rest)

    monkeypatch.setattr(serving, "measure", stopping)
    return seen


def test_a_stopped_sweep_goes_on_where_it_was(run, out, monkeypatch, capsys):
    stop_before(monkeypatch, 2)
    assert run("serve", "--out", str(out)) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not out.exists()
    part = out.with_name("x.csv.part")
    before = rows.read(part, serving.Row)
    monkeypatch.undo()

    monkeypatch.setattr(serving, "QUICK", serving.Grid(
        ("float32",), (16,), (0.5,), ((32, 32), (64, 32)), (1, 3)
    ))  # fmt: skip
    monkeypatch.setattr(serving.roofs, "sizes", lambda *_: {"copy": (1, 8, 8), "matmul": (8, 8, 8)})
    seen = stop_before(monkeypatch, 9)
    assert run("serve", "--out", str(out)) == 0
    assert seen == [(64, 1), (64, 3)]
    assert "going on: 4 of 6 cells" in capsys.readouterr().err
    after = rows.read(out, serving.Row)
    assert [r for r in after if r in before] == before
    assert len({(r.op, r.N, r.M) for r in after if r.M}) == 6
    assert not part.exists()

    seen.clear()  # whole now: measured anew, not kept
    assert run("serve", "--out", str(out)) == 0
    assert len(seen) == 4


def test_fresh_does_not_go_on(run, out, monkeypatch):
    stop_before(monkeypatch, 2)
    assert run("serve", "--out", str(out)) == 130
    seen = stop_before(monkeypatch, 0)
    assert run("serve", "--out", str(out), "--fresh") == 130
    assert seen == []
    left = rows.read(out.with_name("x.csv.part"), serving.Row)
    assert {r.op for r in left if r.M} == {"copy", "matmul"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda text: text.replace(torch.__version__, "1.0"), "torch 1.0"),
        (lambda text: text.replace("16x16", "8x8"), "block 8x8"),
        (lambda text: text[: text.rstrip().rindex("\n") + 20], "damaged"),  # within a line
        (lambda text: text.rstrip()[:-1], "damaged"),
        (lambda text: text.replace("provider", "supplier", 1), "damaged"),
    ],
)
def test_what_another_run_left_is_refused(changed, message, run, out, monkeypatch, capsys):
    stop_before(monkeypatch, 2)
    run("serve", "--out", str(out))
    part = out.with_name("x.csv.part")
    part.write_text(changed(part.read_text()))
    text = part.read_text()
    assert run("serve", "--out", str(out)) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "--fresh" in said
    assert part.read_text() == text


def test_samples_of_other_seconds_are_not_gone_on_with(run, out, monkeypatch, capsys):
    stop_before(monkeypatch, 2)
    run("serve", "--out", str(out))
    assert run("serve", "--out", str(out), "--seconds", "0.1") == 2
    assert "what a stop has left is of seconds 0.0, here is 0.1" in capsys.readouterr().err


def test_other_seconds_do_not_replace_what_is_kept(run, monkeypatch, capsys):
    seen = stop_before(monkeypatch, 0)
    monkeypatch.setattr(sys, "argv", ["bench", "sweep", "serve", "--seconds", "0.1"])
    assert command_line.main() == 2
    assert "--seconds 0.1 needs --out: serving.csv is of 0.6" in capsys.readouterr().err
    assert seen == []


def test_a_wrong_op_is_named_and_replaces_nothing(run, out, monkeypatch, capsys):
    assert run("serve", "--out", str(out)) == 0
    kept = out.read_text()
    right = serving.bsr_linear
    monkeypatch.setattr(serving, "bsr_linear", lambda *given: 1.01 * right(*given))
    assert run("serve", "--out", str(out)) == 1
    said = capsys.readouterr()
    assert "bench: error: bsr_linear, sgtriton, product over blocks" in said.err
    assert "wrong: relative error 1.0e-02" in said.err
    assert "sgtriton, product over blocks (float32): wrong" in said.out
    assert out.read_text() == kept
    monkeypatch.setattr(serving, "bsr_linear", right)
    seen = stop_before(monkeypatch, 9)
    assert run("serve", "--out", str(out)) == 0
    assert len(seen) == 4  # none of the cells that held the wrong one is kept


def test_an_op_that_raises_is_named_too(run, out, monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("no such\nkernel")

    monkeypatch.setattr(serving, "bsr_linear", broken)
    assert run("serve", "--out", str(out)) == 1
    assert "failed: RuntimeError: no such\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "0"], "--rows must be at least 1, got 0"),
        (["--blocks", "24"], "--blocks must divide"),
        (["--sparsities", "1"], "--sparsities must close a block of each weight and leave one"),
        (["--sparsities", "nan"], "and leave one, got nan"),
        (["--sparsities", "0.5", "0"], "got 0.0 for the 4 blocks of side 16 of 32x32"),
        (["--sparsities", "0.999"], "got 0.999 for the 4 blocks of side 16 of 32x32"),
        (["--device", "cuda:1"], "--device must be cpu or cuda, got 'cuda:1'"),
        (["--seconds", "nan"], "--seconds must be 0 or more, got nan"),
        (["--threads", "0"], "--threads must be at least 1"),
    ],
)
def test_bad_arguments_are_said(arguments, message, run, out, capsys):
    assert run("serve", *arguments, "--out", str(out)) == 2
    assert message in capsys.readouterr().err
    assert not out.parent.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said(run, out, capsys):
    assert run("serve", "--device", "cuda", "--out", str(out)) == 2
    assert "--device cuda needs a GPU" in capsys.readouterr().err


@pytest.mark.parametrize("name", sweep.SWEEPS)
def test_the_whole_grid_is_the_default(name, tmp_path, monkeypatch):
    monkeypatch.setattr(timed, "RESULTS", tmp_path)
    asked = {}
    monkeypatch.setattr(sweep, "_run", lambda given: asked.setdefault("arguments", given) and 0)
    monkeypatch.setattr(sys, "argv", ["bench", "sweep", name])
    command_line.main()
    one = sweep.SWEEPS[name]
    tasks = sweep.prepare(one, asked["arguments"])
    assert asked["arguments"].out == tmp_path / f"{one.file}.csv"
    assert len(tasks) == len({task.key for task in tasks})
    assert all(len(task.key) == len(one.key) for task in tasks)


def test_a_file_that_cannot_be_written_is_said_before_anything_is_measured(
    run, tmp_path, monkeypatch, capsys
):
    seen = stop_before(monkeypatch, 0)
    (tmp_path / "file").write_text("")
    assert run("serve", "--out", str(tmp_path / "file" / "deep" / "x.csv")) == 2
    assert f"--out must lie in a folder, {tmp_path / 'file'} is a file" in capsys.readouterr().err
    assert run("serve", "--out", str(tmp_path)) == 2
    assert f"--out must be a file, {tmp_path} is a folder" in capsys.readouterr().err
    assert seen == []
    assert not tmp_path.with_name(tmp_path.name + ".part").exists()
