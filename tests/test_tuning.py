"""sgtriton.tune: which products a model meets, in bounded time, remembered."""

import contextlib
import dataclasses
import os
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_exact
from sgtriton_kernels import lookup, records
from sgtriton_kernels.candidates import candidates
from sgtriton_kernels.cell import Cell
from torch import nn

import sgtriton
from sgtriton import cold, problem, search, tuning
from sgtriton.bsr_problem import BsrLinearProblem
from sgtriton.choice_table import measured_entries
from sgtriton.products import Work
from sgtriton.promising import Promising
from sgtriton.tuning import Tuned, TuneReport, products_of, tune, tune_products


class Net(nn.Module):
    """Two sparse layers, one of which is called twice; a layer without gates; a dropout."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 96), nn.Linear(96, 96)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(96, 5)

    def forward(self, x, scale=1.0):
        x = self.second(self.drop(self.first(x)).relu())
        return self.head(self.second(x[:3]) * scale)


@pytest.fixture
def model():
    net = Net()
    with torch.no_grad():
        for layer in (net.first, net.second):
            mask = torch.rand(layer.weight.shape[0] // 16, layer.weight.shape[1] // 16) < 0.4
            layer.weight.mul_(mask.repeat_interleave(16, 0).repeat_interleave(16, 1))
    return sgtriton.sparsify(net.eval(), block=(16, 16), exclude=["head"], form="sparse")


@pytest.fixture
def timings(monkeypatch):
    """Collects a 1 for each call that is timed."""
    calls, real = [], cold.ColdTimer.ms
    monkeypatch.setattr(cold.ColdTimer, "ms", lambda *a: calls.append(1) or real(*a))
    return calls


def test_products_are_those_that_the_model_meets(model):
    found = {p.name: p.rows for p in products_of(model, torch.randn(2, 7, 64))}
    assert found == {"first": (14,), "second": (14,)}
    found = {p.name: p.rows for p in products_of(model, torch.randn(7, 64))}
    assert found == {"first": (7,), "second": (7, 3)}
    for call in ((torch.randn(4, 64), 2.0), {"x": torch.randn(4, 64), "scale": 2.0}):
        assert [p.rows for p in products_of(model, call)] == [(4,), (4, 3)]


def test_merged_blocks_that_a_layer_computes_with_are_products_too():
    layer = sgtriton.patch(nn.Sequential(nn.Linear(64, 96)), block=(4, 4))
    with torch.no_grad():
        layer[0].gate.copy_((torch.rand_like(layer[0].gate) < 0.1).float())
    model = sgtriton.sparsify(layer.eval(), form="merged")
    found = [(p.matrix.block, p.rows) for p in products_of(model, torch.randn(7, 64))]
    assert found == [((4, 4), (7,)), ((16, 16), (7,))]


def test_layer_that_is_called_by_keyword_is_met(model):
    class ByKeyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = model.first

        def forward(self, x):
            return self.layer(input=x)

    assert [p.rows for p in products_of(ByKeyword(), torch.randn(5, 64))] == [(5,)]


def test_layers_that_multiply_nothing_are_left_out(model):
    assert products_of(model, torch.randn(0, 64)) == []


def test_products_are_tuned_in_the_dtype_of_autocast(model, cache):
    """Each candidate gave 16 bits for an fp32 product, and none was right."""
    with torch.autocast("cpu", torch.bfloat16):
        report = tune(model, torch.randn(9, 64), seconds=30)
    assert {row.cell.dtype for row in report.rows} == {torch.bfloat16}
    assert report.timed == len(report.rows)


def test_model_is_as_it_was(model):
    model.train()
    model.drop.eval()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    tune(model, torch.randn(4, 64), seconds=0.01)
    assert model.training
    assert not model.drop.training
    assert not model.first._forward_pre_hooks
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


@pytest.fixture
def told(monkeypatch):
    """Candidates of a product for a card whose times are told, in a problem without products."""

    class Timer(cold.ColdTimer):
        def __init__(self, device):
            pass

        def ms(self, call):
            return call()

    monkeypatch.setattr(search, "ColdTimer", Timer)
    monkeypatch.setattr(tuning, "work_of", iter)

    def plant(cell, ms):
        found = SimpleNamespace(
            device=torch.device("cpu"), least_seconds=lambda count: 0.0, prepare=lambda: None,
            wrong=lambda candidate: None, call=lambda candidate: ms(candidate.name),
        )  # fmt: skip
        return Work("told", cell, found.device, lambda random: found)

    return plant


TILED = Cell("bsr_linear fwd", "triton", 512, 1024, 1024, (128, 128), 20, torch.bfloat16)


def plant_choice(by, name, monkeypatch):
    """As if a record or a table named a candidate."""
    if by == "record":
        lookup.tell(lookup.full_key(TILED, torch.device("cpu")), name)
    else:
        entry = {"candidate": name, "status": by, "gain": 1.5}
        monkeypatch.setattr(lookup, "is_native", lambda device: False)
        monkeypatch.setattr(lookup, "table_entries", lambda device, keys: [("H200", entry)])
        lookup.forget()


@pytest.mark.parametrize("by", ["record", "predicted", "measured"])
def test_what_reasoning_gives_is_returned_to_where_it_is_faster(by, told, cache, monkeypatch):
    """It was no candidate: a record or a table kept its place whatever was measured."""
    reasoned, named = lookup.analytic(TILED).candidate, candidates(TILED)[3].name
    plant_choice(by, named, monkeypatch)
    assert lookup.choose(TILED, torch.device("cpu")).candidate.name == named
    work = told(TILED, lambda name: 1.0 if name == reasoned.name else 2.0)
    (row,) = tune_products([work], 60, again=True).rows
    assert (row.status, row.choice.candidate, row.gain) == ("changed", reasoned, 2.0)
    assert row.over_reasoned == 1.0
    assert lookup.choose(TILED, torch.device("cpu")).candidate == reasoned
    (record,) = (records.read_json(path, 1 << 14) for path in cache.glob("*.json"))
    assert record["candidate"] == "analytic"
    assert measured_entries([row]) == []


def test_table_says_what_is_gained_over_reasoning_not_over_what_was_taken_before(
    told, cache, monkeypatch
):
    """A candidate that a table named already entered the next one with a gain of 1."""
    reasoned, (third, fourth) = lookup.analytic(TILED).candidate, candidates(TILED)[3:5]
    times = {reasoned.name: 3.0, third.name: 1.5, fourth.name: 1.2}
    plant_choice("measured", third.name, monkeypatch)
    (row,) = tune_products([told(TILED, lambda name: times.get(name, 6.0))], 60, again=True).rows
    assert (row.status, row.gain) == ("changed", pytest.approx(1.25))
    del times[fourth.name]
    lookup.tell(lookup.full_key(TILED, torch.device("cpu")), third.name)
    (same,) = tune_products([told(TILED, lambda name: times.get(name, 6.0))], 60, again=True).rows
    assert (same.status, same.gain) == ("kept", 1.0)
    for found, name, gain in ((row, fourth.name, 2.5), (same, third.name, 2.0)):
        (entry,) = measured_entries([found])
        assert (entry["candidate"], entry["gain"]) == (name, gain)


def test_choice_that_is_no_faster_than_reasoning_is_no_entry_of_a_table(told, cache, monkeypatch):
    """Within the noise the present choice stays; a table need not say 0.98 times as fast."""
    reasoned, third = lookup.analytic(TILED).candidate, candidates(TILED)[3]
    plant_choice("record", third.name, monkeypatch)
    times = {reasoned.name: 1.0, third.name: 1.02}
    (row,) = tune_products([told(TILED, lambda name: times.get(name, 6.0))], 60, again=True).rows
    assert (row.status, row.choice.candidate) == ("kept", third)
    assert row.over_reasoned == pytest.approx(1 / 1.02)
    assert measured_entries([row]) == []


def test_what_the_compiler_refuses_is_skipped_with_a_line(told, cache, monkeypatch):
    reasoned, third = lookup.analytic(TILED).candidate, candidates(TILED)[3]
    asked, said = [], []

    def promising(cell, device, present, compilers, seconds):
        asked.append((present, compilers, seconds))
        return Promising((reasoned, third), {"deep": "8 bytes spilled"})

    @contextlib.contextmanager
    def compilers_for(products, seconds):
        asked.append(products)
        yield "compilers"

    monkeypatch.setattr(tuning, "promising", promising)
    monkeypatch.setattr(tuning, "compilers_for", compilers_for)
    other = dataclasses.replace(TILED, M=2048)
    work = [told(cell, lambda name: 1.0) for cell in (TILED, other, TILED)]
    rows = tune_products(work, 60, say=said.append).rows
    assert [row.skipped for row in rows] == [{"deep": "8 bytes spilled"}] * 3
    assert said == [f"told, M {m}: deep is skipped: 8 bytes spilled" for m in (512, 2048)]
    _, first, second = asked  # the processes are those of the whole search
    assert [found[1] for found in (first, second)] == ["compilers"] * 2
    assert 0 < first[2] < 31  # of two products
    asked.clear()
    assert tune_products(work, 60).timed == 0
    assert asked == [set()]


def test_second_run_times_nothing(model, cache, timings):
    report = tune(model, torch.randn(9, 64), seconds=30)
    assert [row.status for row in report.rows].count("not reached") == 0
    assert report.timed == len(report.rows) == 3
    assert timings
    timings.clear()
    lookup.forget()
    again = tune(model, torch.randn(9, 64), seconds=30)
    assert [row.status for row in again.rows] == ["cached"] * 3
    assert not timings
    assert [row.choice.candidate for row in again.rows] == [
        row.choice.candidate for row in report.rows
    ]
    assert again.timed == 0
    once_more = tune(model, torch.randn(9, 64), seconds=30, again=True)
    assert once_more.timed == 3
    assert timings


def test_results_stay(model, cache):
    x = torch.randint(-1, 2, (9, 64)).float()
    before = model.first(x)
    tune(model, x, seconds=10)
    torch.testing.assert_close(model.first(x), before)


def test_faster_candidate_is_taken_by_the_next_call(model, cache, monkeypatch):
    """As if only multiplying with the zeros filled in were fast."""
    calls, slow = [], {"unpack": 1.0}
    monkeypatch.setattr(
        tuning, "search",
        lambda problem, present, others, until, say, reasoned: tuning.Found(
            next(c for c in others if c.name == "unpack"), 1.0, 2.0, 2.0, 3, {}
        ),
    )  # fmt: skip
    report = tune(model, torch.randn(9, 64), seconds=10)
    assert {row.status for row in report.rows} == {"changed"}
    assert {row.choice.candidate.name for row in report.rows} == set(slow)
    real = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *a: calls.append(1) or real(*a))
    x = torch.randint(-1, 2, (9, 64)).float()
    weight = model.first.to_dense().weight
    assert_exact("y", model.first(x) - model.first.bias, (x @ weight.T + model.first.bias)
                 - model.first.bias)  # fmt: skip
    assert calls


@pytest.fixture
def searched(monkeypatch):
    """Collects the product of each search."""
    cells, real = [], tuning.search
    monkeypatch.setattr(tuning, "search", lambda p, *a: cells.append(p.cell) or real(p, *a))
    return cells


def test_product_that_occurs_twice_is_tuned_once(cache, searched):
    layer = nn.Linear(64, 64, bias=False)
    with torch.no_grad():
        layer.weight[:32] = 0
    model = sgtriton.sparsify(nn.Sequential(layer, layer).eval(), block=(16, 16), form="sparse")
    twice = products_of(model, torch.randn(3, 64)) * 2
    report = tune_products(twice, 10)
    assert [row.status for row in report.rows] == [report.rows[0].status] * 2
    assert len(searched) == 1


@pytest.mark.parametrize("again", [False, True])
def test_of_products_that_share_a_record_one_is_searched(again, cache, searched):
    """Layers with a block more or less were searched each, and the last one's record stayed."""
    layers = [nn.Linear(64, 256, bias=False) for _ in range(4)]
    with torch.no_grad():
        for i, layer in enumerate(layers):
            layer.weight[16 * (10 - i) :] = 0
    products = []
    for layer in layers:
        made = sgtriton.sparsify(nn.Sequential(layer).eval(), block=(16, 16), form="sparse")
        products += products_of(made, torch.randn(3, 64))
    for _ in range(2):
        report = tune_products(products, 30, again=again)
        statuses = [row.status for row in report.rows]
        assert statuses[1:] == ["cached"] * 3
        assert {row.choice.candidate for row in report.rows} == {report.rows[0].choice.candidate}
    assert len(searched) == (2 if again else 1)
    assert len(list(cache.glob("*.json"))) == 1


def test_of_products_that_share_a_record_another_is_searched_where_one_is_not_compared(
    cache, monkeypatch, searched
):
    def short(found, *inputs):
        if found.cell.nnz == 40:
            raise torch.OutOfMemoryError("tried to allocate 32 GiB")

    monkeypatch.setattr(BsrLinearProblem, "prepare", short)
    products = []
    for rows in (160, 144, 128):
        layer = nn.Linear(64, 256, bias=False)
        with torch.no_grad():
            layer.weight[rows:] = 0
        made = sgtriton.sparsify(nn.Sequential(layer).eval(), block=(16, 16), form="sparse")
        products += products_of(made, torch.randn(3, 64))
    statuses = [row.status for row in tune_products(products, 30).rows]
    assert statuses[0] == "not compared"
    assert statuses[1] in ("kept", "changed")
    assert statuses[2] == "cached"
    assert [cell.nnz for cell in searched] == [36]


def test_cache_that_cannot_be_written_is_said_once(model, cache, monkeypatch):
    cache.parent.joinpath("tune").write_text("a file where the folder should be")
    report = tune(model, torch.randn(9, 64), seconds=10)
    assert report.timed == 3
    assert len(report.notes) == 1
    assert "kept in this process only" in report.notes[0]
    again = tune(model, torch.randn(9, 64), seconds=10)
    assert again.timed == 0


def test_without_a_home_choices_are_kept_in_the_process(model, cache, monkeypatch):
    monkeypatch.setattr(tuning, "cache_folder", lambda: None)
    monkeypatch.setattr(lookup, "cache_folder", lambda: None)
    report = tune(model, torch.randn(9, 64), seconds=10)
    assert "no home" in report.notes[0]
    assert tune(model, torch.randn(9, 64), seconds=10).timed == 0


def test_product_that_nothing_computes_rightly_is_not_called_unreached(model, cache, monkeypatch):
    searched = []

    def wrong(problem, candidate):
        searched.append(problem)
        return f"wrong in {len(candidate.name)} elements"

    monkeypatch.setattr(problem.Problem, "wrong", wrong)
    said = []
    report = tune_products(products_of(model, torch.randn(9, 64)), 60, say=said.append)
    assert {row.status for row in report.rows} == {"none right"}
    assert len(set(map(id, searched))) == len(report.rows)  # no search is tried again
    assert (report.timed, report.wrong) == (0, 3)
    row = report.rows[0]
    taken = row.choice.candidate.name
    assert row.skipped[taken] == f"wrong in {len(taken)} elements"
    text = str(report)
    assert "3 that nothing computes rightly" in text
    assert "not reached" not in text
    assert f"of {taken}, which is taken all the same: {row.skipped[taken]}" in text
    assert any(line.endswith(f"{taken} is skipped: {row.skipped[taken]}") for line in said)
    assert not list(cache.glob("*.json"))
    assert lookup.choose(row.cell, torch.device("cpu")) == row.choice


@pytest.mark.parametrize("what", ["inputs", "whole_inputs", "expected", "check_work"])
def test_product_that_memory_does_not_suffice_for_is_no_fault_of_its_candidates(
    what, model, cache, monkeypatch
):
    """Each was called wrong; or the search ended, and that for other products with it."""
    real = getattr(BsrLinearProblem, what)

    def short(found, *inputs):
        if found.cell.M == 3:
            raise torch.OutOfMemoryError("tried to allocate 32 GiB\nof 24")
        return real(found, *inputs)

    monkeypatch.setattr(BsrLinearProblem, what, short)
    said = []
    report = tune_products(products_of(model, torch.randn(9, 64)), 60, say=said.append)
    statuses = {row.cell.M: row.status for row in report.rows}
    assert statuses.pop(3) == "not compared"
    assert set(statuses.values()) <= {"kept", "changed"}
    assert (report.timed, report.wrong) == (2, 0)
    why = "second, M 3: nothing could be compared: OutOfMemoryError: tried to allocate 32 GiB"
    assert report.notes == (why,)
    assert not any("M 3" in line for line in said)
    assert len(list(cache.glob("*.json"))) == 2


def test_time_is_kept(model, cache):
    report = tune(model, torch.randn(9, 64), seconds=1e-6)
    assert {row.status for row in report.rows} == {"not reached"}
    assert not cache.exists() or not list(cache.iterdir())
    assert "not reached" in str(report)


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), "3", None])
def test_no_time_is_refused(model, seconds):
    with pytest.raises(ValueError, match="seconds must be positive, got"):
        tune(model, torch.randn(9, 64), seconds=seconds)


def test_model_without_sparse_layers_is_refused():
    with pytest.raises(ValueError, match="no block-sparse layer"):
        tune(nn.Linear(4, 4), torch.randn(2, 4))


def test_nothing_is_timed_during_a_capture_or_a_trace(model, monkeypatch, timings):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(ValueError, match="while a graph is captured or traced"):
        tune(model, torch.randn(9, 64))
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(ValueError, match="while a graph is captured or traced"):
        tune(model, torch.randn(9, 64))
    assert not timings


@pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="for the interpreter")
def test_interpreted_kernels_are_not_tuned(model, monkeypatch):
    monkeypatch.setenv("SGTRITON_IMPL", "triton")
    with pytest.raises(ValueError, match="interpreted kernels are not tuned"):
        tune(model, torch.randn(9, 64))


def test_error_of_the_model_leaves_it_as_it_was(model):
    model.train()
    with pytest.raises(ValueError, match="64"):
        tune(model, torch.randn(9, 63))
    assert model.training
    assert not model.first._forward_pre_hooks


def test_table_says_what_is_taken(cache):
    cell = Cell("bsr_linear fwd", "torch", 16, 4096, 1024, (32, 32), 410, torch.float32, 12)
    choice = lookup.choose(cell, torch.device("cpu"))
    rows = (
        Tuned("fc1", cell, "changed", choice, 1.234, 0.5678),
        Tuned("fc2", cell, "cached", choice),
    )
    text = str(TuneReport(rows, 12.34, ("a note",)))
    assert "1.23x" in text
    assert "0.568" in text
    assert "cached" in text
    assert text.endswith("1 of 2 products timed, 12.3 s\na note")
    assert max(map(len, text.splitlines())) <= 100
    assert str(TuneReport((), 0.0)).startswith("0 of 0")


def test_file_of_a_record_says_what_was_measured(model, cache):
    tune(model, torch.randn(9, 64), seconds=10)
    found = [records.read_json(path, 1 << 14) for path in cache.glob("*.json")]
    assert found
    for record in found:
        assert record["ms"] > 0
        assert record["timed"] > 1
        assert record["key"]["op"] == "bsr_linear fwd"
