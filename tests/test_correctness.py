"""What ``python -m bench correctness`` finds: planted faults of every kind, and none elsewhere."""

import csv
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sgtriton_kernels import bsr_matmul
from sgtriton_kernels._triton import INTERPRETED
from sgtriton_kernels.bsr_torch import bsr_linear_torch
from sgtriton_kernels.candidates import named

from bench import checks_large, correctness, judge
from bench.__main__ import main
from bench.judge import Case, Check, Place, SkippedError, WrongError
from bench.workers import Lost, in_processes

CPU = torch.device("cpu")
PLACE = Place(CPU, "torch", quick=True)


def linear_checks():
    return [
        c for c in correctness.checks(PLACE) if c.op == "bsr_linear" and "2^31" not in c.variant
    ]


def statuses(rows):
    return [row.status for row in rows]


def test_every_op_is_right_here():
    chosen = correctness.checks(PLACE)
    assert {check.op for check in chosen} == {
        "gate_weight", "gated_linear", "gate_penalties", "pack_gates", "bsr_linear",
        "bsr_linear fwd", "bsr_conv1d", "bsr_conv2d", "bsr_conv fwd", "bsr_conv dx",
        "bsr_conv dvalues", "gated_to_bsr", "merge_blocks",
    }  # fmt: skip
    rows = list(correctness.run(chosen, PLACE))
    assert [(r.op, r.variant, r.detail) for r in rows if r.status in ("wrong", "failed")] == []
    assert {r.op for r in rows if r.status == "ok"} >= {"gate_weight", "bsr_linear", "bsr_conv2d"}
    reasons = {r.detail for r in rows if r.status == "skipped"}
    assert "for cards: it would take a CPU minutes" in reasons


@pytest.mark.skipif(not INTERPRETED, reason="compiled natively, a card's tiles take minutes")
def test_a_form_of_each_kind_is_right_in_the_interpreter():
    place = Place(CPU, "triton", quick=True)
    tiles = [c for c in correctness.checks(place) if c.op == "bsr_linear fwd"]
    chosen = list({check.variant: check for check in tiles}.values())  # ragged ones
    chosen = [check for check in chosen if check.variant != "unpack"]
    names = " ".join(check.variant for check in chosen)
    for form in ("x_left", "weight_left", "vector", "pairs", "_split", "_bulk"):
        assert form in names
    rows = list(correctness.run(chosen, place))
    assert [(r.variant, r.detail) for r in rows if r.status != "ok"] == []


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_names_are_unique_and_every_candidate_is_there(impl, quick):
    chosen = correctness.checks(Place(CPU, impl, quick))
    names = [check.name for check in chosen]
    assert len(set(names)) == len(names)
    if not quick:
        for op in ("bsr_linear fwd", "bsr_linear dx", "bsr_linear dvalues"):
            pinned = {check.variant for check in chosen if check.op == op}
            native = impl == "triton" and not INTERPRETED
            assert pinned == set(named(op, impl, native))


PLANTED = {
    "a little off": (lambda y: y * 1.01, "wrong", "error"),
    "transposed": (lambda y: y.flip(-1), "wrong", "error"),
    "of another dtype": (lambda y: y.double(), "wrong", "torch.float64 instead of torch.bfloat16"),
    "missing a store": (lambda y: y.new_empty(y.shape), "wrong", "not finite"),
    "raising": (lambda y: 1 / 0, "failed", "ZeroDivisionError: division by zero"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found_and_the_next_check_runs(name, monkeypatch):
    change, status, detail = PLANTED[name]
    plain = bsr_linear_torch
    monkeypatch.setattr(bsr_matmul, "bsr_linear_torch", lambda *a: change(plain(*a)))
    chosen = linear_checks()
    merge = [c for c in correctness.checks(PLACE) if c.op == "merge_blocks"][:1]
    with_rows = [c for c in chosen if not c.shape.startswith("0x")]
    rows = list(correctness.run([*with_rows, *merge], PLACE))
    assert set(statuses(rows[:-1])) == {status}
    assert all(detail in row.detail for row in rows[:-1])
    assert rows[-1].status == "ok"
    text = correctness.table(rows)
    assert f"{status}: bsr_linear, 32x32" in text
    assert correctness.is_bad(rows)


def case(run, value=1.0, dtype=torch.float32, inputs=()):
    wanted = torch.full((4,), value, dtype=torch.float64)
    return Case(run, lambda: {"y": wanted}, lambda: {"y": wanted.to(dtype)}, inputs)


def test_runs_that_differ_are_wrong_even_within_the_rule():
    ulp = torch.finfo(torch.float32).eps / 2
    runs = iter([1.0] * 9 + [1.0 - ulp])

    def run():
        return {"y": torch.full((4,), next(runs))}

    with pytest.raises(WrongError, match="run 9 gives other bits than the first"):
        judge.judge(case(run), repeats=9)


def test_an_input_that_was_changed_is_wrong():
    x = torch.zeros(4)

    def run():
        x[0] += 1
        return {"y": torch.ones(4)}

    with pytest.raises(WrongError, match="input 0 was changed"):
        judge.judge(case(run, inputs=(x,)), repeats=1)


def test_new_memory_holds_nan_in_the_first_run_and_no_longer():
    seen = []

    def run():
        seen.append(torch.empty(1000).isnan().all().item())
        return {"y": torch.ones(4)}

    judge.judge(case(run), repeats=2)
    assert seen[0]
    assert not torch.are_deterministic_algorithms_enabled()


def test_bits_tell_zeros_apart_and_nan_from_nothing():
    zero, nan = torch.zeros(2), torch.full((2,), float("nan"))
    assert judge.same_bits(nan, nan.clone())
    assert not judge.same_bits(zero, -zero)
    assert not judge.same_bits(zero, zero.double())
    assert judge.same_bits(zero[:0], zero[:0])


def test_whole_numbers_must_be_equal():
    wanted = torch.arange(-20.0, 20, dtype=torch.float64)
    plain = wanted.bfloat16()
    assert judge.difference(plain, wanted, plain) is None
    off = plain.clone()
    off[3] += 1
    assert judge.difference(off, wanted, plain).startswith("error 1.0")


def test_large_tensors_are_skipped_with_the_reason(monkeypatch):
    check = next(iter(checks_large.large_checks(PLACE)))
    with pytest.raises(SkippedError, match="for cards"):
        check.run()
    card = Place(torch.device("cuda"), "triton")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**30, 2**33))
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda _: 0)
    with pytest.raises(SkippedError, match="1 GiB are free, it takes"):
        next(iter(checks_large.large_checks(card))).run()


@pytest.mark.parametrize("make", [checks_large._linear, checks_large._gate_weight,
                                  checks_large._gated_linear, checks_large._conv])  # fmt: skip
def test_large_cases_are_right_in_small(make, monkeypatch):
    """With fewer rows: what is compared around the 2^31st element is the same code."""
    rows = 2**15 if make is checks_large._conv else 300
    monkeypatch.setattr(checks_large, "_SIDE", 128)
    monkeypatch.setattr(checks_large, "_ROWS", rows)
    monkeypatch.setattr(checks_large, "_MIDDLE", 200)
    if make is checks_large._gated_linear:
        monkeypatch.setattr(checks_large, "_METHOD", None)
    judge.judge(make(PLACE), repeats=1)


def test_checks_without_time_are_skipped():
    rows = list(correctness.run(linear_checks(), PLACE, until=time.monotonic() - 1))
    assert set(statuses(rows)) == {"skipped"}
    assert {row.detail for row in rows} == {"no time left"}
    assert not correctness.is_bad(rows)


def test_the_command_writes_rows_and_ends_with_1_where_one_is_bad(tmp_path, monkeypatch, capsys):
    path = tmp_path / "rows.csv"
    arguments = ["bench", "correctness", "--device", "cpu", "--impl", "torch", "--quick"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--op", "merge_blocks", "--out", str(path)])
    assert main() == 0
    assert "3 of 3 checks ok, 0 wrong, 0 failed, 0 skipped" in capsys.readouterr().out
    with open(path, newline="", encoding="utf-8") as file:
        assert [row["status"] for row in csv.DictReader(file)] == ["ok"] * 3

    bad = Check("op", "variant", "float32", "1", lambda: 1 / 0)
    monkeypatch.setattr(correctness, "checks", lambda place: [bad])
    monkeypatch.setattr(sys, "argv", arguments)
    assert main() == 1
    assert "failed: op, variant, float32, 1: ZeroDivisionError" in capsys.readouterr().out

    monkeypatch.setattr(sys, "argv", [*arguments, "--op", "nothing"])
    assert main() == 2
    assert "--op must be one of op; got nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "foo"], "--device must be cpu or cuda, got 'foo'"),
        (["--device", "meta"], "--device must be cpu or cuda, got 'meta'"),
        (["--device", "cuda"], "--device cuda needs a GPU"),
        (["--minutes", "0"], "--minutes must be positive and finite, got 0"),
        (["--minutes", "-1"], "--minutes must be positive and finite, got -1"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--out", "FOLDER"], "is a folder"),
        (["--out", "FOLDER/kept"], "--out must not be there yet"),
    ],
)
def test_bad_options_are_refused_before_anything_is_checked(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(correctness, "run", lambda *_: pytest.fail("a check ran"))
    (tmp_path / "kept").write_text("rows of before\n")
    given = [part.replace("FOLDER", str(tmp_path)) for part in arguments]
    monkeypatch.setattr(sys, "argv", ["bench", "correctness", "--quick", "--device", "cpu", *given])
    assert main() == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "kept").read_text() == "rows of before\n"


def test_where_no_check_was_ok_the_command_ends_with_1(monkeypatch, capsys):
    def skip():
        raise SkippedError("not here")

    skipped = Check("op", "variant", "float32", "1", skip)
    monkeypatch.setattr(correctness, "checks", lambda place: [skipped])
    monkeypatch.setattr(sys, "argv", ["bench", "correctness", "--device", "cpu"])
    assert main() == 1
    assert "0 of 1 checks ok" in capsys.readouterr().out


def _task(item):
    """What a process may do with an item."""
    if item == "dies":
        os._exit(7)
    if item == "hangs":
        time.sleep(60)
    return item.upper(), os.getpid()


def test_a_process_that_dies_or_hangs_costs_its_item_alone():
    items = ["a", "dies", "b", "hangs", "c"]
    found = dict(in_processes(_task, items, jobs=2, limit=3))
    assert found["dies"] == Lost("its process ended with 7")
    assert found["hangs"] == Lost("not finished after 3 s")
    assert [found[name][0] for name in "abc"] == ["A", "B", "C"]


def test_a_process_is_replaced_where_asked_and_ended_in_time():
    found = list(in_processes(_task, ["a", "b"], jobs=1, is_last=lambda result: True))
    assert found[0][1][1] != found[1][1][1]
    start = time.monotonic()
    assert list(in_processes(_task, ["hangs"], jobs=1, until=start + 0.5)) == []
    assert time.monotonic() < start + 20


def test_checks_in_processes_give_the_same_rows():
    chosen = [c for c in correctness.checks(PLACE) if c.op == "merge_blocks"]
    alone = {row.variant: row for row in correctness.run(chosen, PLACE)}
    rows = list(correctness.run(chosen, PLACE, jobs=2))
    assert len(rows) == len(chosen)
    for row in rows:
        assert replace(row, seconds=0) == replace(alone[row.variant], seconds=0)


def test_an_implementation_that_cannot_run_is_refused():
    program = [sys.executable, "-m", "bench", "correctness", "--device", "cpu", "--impl", "triton"]
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": "." + os.pathsep + "kernels"}
    if not INTERPRETED:
        pytest.skip("Triton compiles for this CPU")
    ran = subprocess.run(
        program, env=environment, cwd=Path(__file__).parent.parent, capture_output=True, text=True
    )
    assert ran.returncode == 2
    assert "CPU tensors need TRITON_INTERPRET=1" in ran.stderr
