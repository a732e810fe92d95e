"""Tables for a card that is absent: what is worth an entry, and that lookups find it."""

import dataclasses
import json
import os
import random
import time

import pytest
import torch
from conv_layers import conv_cell
from sgtriton_kernels import BlockSparse, lookup, records
from sgtriton_kernels._triton import version
from sgtriton_kernels.bsr_choice import cell_of
from sgtriton_kernels.candidate import ANALYTIC, UNPACK
from sgtriton_kernels.candidates import candidates
from sgtriton_kernels.cards import CARD_NAMES, card
from sgtriton_kernels.cell import OPS, Cell
from sgtriton_kernels.lookup import analytic, choose

from sgtriton import predicted
from sgtriton.choice_table import (
    Held,
    file_name,
    make_table,
    measured_entries,
    products_held,
    write_table,
)
from sgtriton.compilers import NO_TIME
from sgtriton.offline import Ranked
from sgtriton.predicted import (
    Predicted,
    PredictInterrupted,
    passes,
    predict_cells,
    table_of,
    usual_cells,
)
from sgtriton.tune_report import Tuned

CELL = Cell("bsr_linear fwd", "triton", 64, 1024, 2048, (64, 64), 100, torch.bfloat16)
REASONED = analytic(CELL).candidate
OTHER, THIRD = [c for c in candidates(CELL) if c not in (REASONED, UNPACK)][:2]


def of(gain, cell=CELL, best=OTHER):
    """A prediction that ``best`` is so many times as fast as reasoning."""
    return Predicted(cell, Ranked(best, 1e-5, "memory"), gain * 1e-5, {})


def with_rows(*rows):
    return [dataclasses.replace(CELL, M=m) for m in rows]


@pytest.fixture
def ranking(monkeypatch):
    """Has candidates of each product ranked as a function says; collects what was asked for."""

    def plant(say):
        asked = []

        def rank(card_name, cell, given, compilers, deadline):
            asked.append((card_name, cell, [*given], deadline))
            told = [say(cell, candidate) for candidate in given]
            found = [
                Ranked(c, dropped=t) if isinstance(t, str) else Ranked(c, t, "memory")
                for c, t in zip(given, told, strict=True)
            ]
            # the last given comes first of those that are as fast
            found.reverse()
            return sorted(found, key=lambda r: (r.seconds is None, r.seconds or 0.0))

        monkeypatch.setattr(predicted, "rank", rank)
        return asked

    return plant


@pytest.fixture
def folder(tmp_path, monkeypatch, cache):
    """Where tables that ship are looked for; each one is read again when it is used next."""
    found = tmp_path / "configs"
    found.mkdir()
    monkeypatch.setattr(records, "_TABLES", found)
    records.tables.cache_clear()
    yield found
    records.tables.cache_clear()


@pytest.fixture
def on_card(monkeypatch):
    """Has the device be a card; returns how to choose another one."""

    def take(device_name, architecture):
        monkeypatch.setattr(records, "device_name", lambda device: device_name)
        monkeypatch.setattr(records, "architecture", lambda device: architecture)
        monkeypatch.setattr(lookup, "fits", lambda *_: True)
        lookup.forget()

    take("NVIDIA H200", "sm_90")
    return take


def test_every_number_of_rows_finds_a_usual_product():
    products = [*usual_cells()]
    usual = {records.key_text(cell.key()) for cell in products}
    assert len(usual) == len(products)
    some = [cell for cell in products if cell.M == 1][::7]
    for m in {*range(1, 300), 8191, 8192, *random.Random(0).sample(range(1, 8193), 300)}:
        for product in some:
            cell = dataclasses.replace(product, M=m)
            assert usual & {records.key_text(cell.key(rows)) for rows in cell.near_rows()}, cell


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_usual_products_are_of_each_shape_block_and_density(dtype):
    found = [*usual_cells(dtype)]
    assert {(c.N, c.K) for c in found} == {
        (1024, 1024), (4096, 4096), (14336, 4096), (4096, 14336),
    }  # fmt: skip
    keys = [cell.key() for cell in found]
    assert {key["block"] for key in keys} == {"16x16", "32x32", "64x64", "128x128"}
    assert {key["density"] for key in keys} == {">=0.35", "0.07-0.35", "<0.07"}
    assert {c.dtype for c in found} == {dtype}
    assert all(cell.impl == "triton" and cell.nnz for cell in found)


def test_a_product_that_trains_has_three_passes():
    """Each is read in wide pieces if the rows that it reads can be, which lookups ask for."""
    w = BlockSparse.from_dense(torch.ones(1024, 1000), (16, 16))
    cell = Cell(OPS[0], "triton", 64, 1024, 1000, w.block, w.nnz, torch.float32, longest=63)
    assert [*passes(cell, False)] == [dataclasses.replace(cell, aligned=False)]
    found = [*passes(cell, True)]
    assert [(c.op, c.aligned) for c in found] == [
        ("bsr_linear fwd", False), ("bsr_linear dx", True), ("bsr_linear dvalues", False),
    ]  # fmt: skip
    x, dy = torch.empty(64, 1000), torch.empty(64, 1024)
    for c, operands in zip(found, [(x,), (dy,), (dy, x)], strict=True):
        assert c.key() == cell_of(c.op.split()[1], w, "triton", *operands).key()
    usual = [*usual_cells(trains=True)]
    assert {c.op for c in usual} == {*OPS}
    assert [c for c in usual if c.op == OPS[0]] == [*usual_cells()]


def test_usual_products_are_as_uneven_as_random_patterns():
    """A lookup asks for even or uneven block rows: tables for even ones only were seldom found."""
    balances = set()
    for cell in [c for c in usual_cells() if c.M == 1]:
        order = torch.rand(cell.block_rows * cell.block_cols).argsort()
        is_open = (order < cell.nnz).view(cell.block_rows, cell.block_cols)
        unevenness = int(is_open.sum(1).max()) * cell.block_rows / cell.nnz
        if not 1.25 < unevenness < 1.75:  # between these it depends on the pattern
            balance = "even" if unevenness < 1.5 else "uneven"
            assert cell.key()["balance"] == balance, cell
            balances.add((cell.key()["density"], balance))
    assert balances >= {(">=0.35", "even"), ("0.07-0.35", "uneven"), ("<0.07", "uneven")}


def test_the_fastest_is_compared_with_what_reasoning_takes(ranking):
    seconds = {REASONED: 3e-5, OTHER: 2e-5, THIRD: "too large"}
    asked = ranking(lambda cell, candidate: seconds.get(candidate, 4e-5))
    (found,) = predict_cells("H200", [CELL])
    assert (found.cell, found.best.candidate, found.reasoned) == (CELL, OTHER, 3e-5)
    assert found.gain == pytest.approx(1.5)
    assert found.dropped == {THIRD.name: "too large"}
    ((card_name, cell, given, deadline),) = asked
    assert (card_name, cell, deadline) == ("H200", CELL, float("inf"))
    assert {*given} == {REASONED, *candidates(CELL, True)}


def test_each_candidate_is_ranked_once(ranking):
    asked = ranking(lambda cell, candidate: 1e-5)
    cell = dataclasses.replace(CELL, N=4096, K=14336, block=(128, 128), nnz=179)
    assert analytic(cell).candidate in candidates(cell, True)
    predict_cells("H200", [CELL, cell])
    for _, cell, given, _ in asked:
        assert len(given) == len({*given} | {analytic(cell).candidate, *candidates(cell, True)})


@pytest.mark.parametrize(("name", "wants"), [("H200", True), ("A10", False), ("MI300X", False)])
def test_candidates_for_a_copy_engine_are_ranked_where_there_is_one(name, wants, ranking):
    asked = ranking(lambda cell, candidate: 1e-5)
    predict_cells(name, [CELL])
    assert any(c.tile is not None and c.tile.bulk for c in asked[0][2]) == wants


@pytest.mark.parametrize("others", [1e-5, 2e-5, "it does not compile"])
def test_what_is_no_faster_than_reasoning_gains_nothing(others, ranking):
    ranking(lambda cell, candidate: 1e-5 if candidate == REASONED else others)
    (found,) = predict_cells("H200", [CELL])
    assert (found.best.candidate, found.gain) == (REASONED, 1)
    assert table_of("H200", [found])["entries"] == []


def test_a_product_whose_own_tile_a_card_refuses_is_left_out_with_a_line(ranking):
    """It was an error, and what had been ranked until then was lost."""
    cells, said = with_rows(64, 63, 62), []
    refused = analytic(cells[1]).candidate
    ranking(
        lambda cell, candidate: "8 bytes spilled" if candidate == refused and cell.M == 63 else 1e-5
    )
    for seconds in (float("inf"), 600):
        found = predict_cells("A10", cells, seconds, say=said.append)
        assert [p.cell for p in found] == [cells[0], cells[2]]
    text = f"M 63, weight 1024x2048 is left out: {refused.name}, which reasoning takes, is refused"
    assert said == [f"{text}: 8 bytes spilled"] * 2
    with pytest.raises(ValueError, match="no card is named 'H300'"):
        predict_cells("H300", [])


def test_an_interrupt_keeps_what_was_ranked(ranking):
    def say(cell, candidate):
        if cell.M == 62:
            raise KeyboardInterrupt
        return 1e-5

    ranking(say)
    cells = with_rows(64, 63, 62, 61)
    with pytest.raises(PredictInterrupted) as stop:
        predict_cells("A10", cells)
    assert [p.cell for p in stop.value.found] == cells[:2]


def test_products_that_there_is_no_time_for_are_left_out(ranking, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def say(cell, candidate):
        now[0] += 1 / len({REASONED, *candidates(cell, True)})
        return NO_TIME if now[0] > 102.5 else 1e-5

    asked, cells, seen, said = ranking(say), with_rows(64, 63, 62, 61), [], []
    found = predict_cells("H200", cells, 2.5, lambda *a: seen.append(a), said.append)
    # of the third one some candidates were compiled, reasoning's own among them
    assert [a[1] for a in asked] == cells[:3]
    assert [p.cell for p in found] == cells[:2]
    assert found[0].dropped == found[1].dropped == {}
    (line,) = said
    assert line.startswith("M 62, weight 1024x2048 is left out: no time was left to compile ")
    assert {a[3] for a in asked} == {102.5}
    assert [s[:2] for s in seen] == [(0, 4), (1, 4), (2, 4), (4, 4)]
    assert seen[0][2] == "M 64, weight 1024x2048"
    predict_cells(
        "H200", [dataclasses.replace(CELL, op="bsr_linear dx")], 0, lambda *a: seen.append(a)
    )
    assert seen[-2][2] == "M 64, weight 1024x2048, dx"
    now[0] = 103.0
    assert predict_cells("H200", cells, -1) == []


def test_time_that_ends_before_reasonings_own_candidate_is_no_fault_of_the_card(
    ranking, monkeypatch
):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def say(cell, candidate):
        now[0] += 2
        return NO_TIME

    ranking(say)
    assert predict_cells("H200", [CELL], 1) == []


def test_a_table_holds_what_gains_a_tenth():
    cells = with_rows(16, 64, 256, 1024, 4096)
    found = [of(g, c) for g, c in zip((1.0, 1.09, 1.11, 1.5, 20), cells, strict=True)]
    table = table_of("RTX 4090", found)
    # of even patterns and of uneven ones: of either no more is known
    assert table["entries"] == [
        {"key": cell.key() | {"balance": balance}, "candidate": OTHER.name, "gain": gain}
        for cell, gain in zip(cells[2:], (1.11, 1.5, 20), strict=True)
        for balance in ("even", "uneven")
    ]
    head = {name: value for name, value in table.items() if name != "entries"}
    assert head == {
        "card": "RTX 4090",
        "architecture": "sm_89",
        "status": "predicted",
        "ranked": 5,
        "triton": version(),
        "sources": {"bsr_linear triton": records.source("bsr_linear", "triton")},
    }
    with pytest.raises(ValueError, match="no card is named 'H300'"):
        table_of("H300", found)


def test_a_product_that_reasoning_serves_best_does_not_take_a_neighbours_tile(folder, on_card):
    """Ranked for 64 rows reasoning was the fastest; a call of 64 rows took the entry of 32."""
    own, near, far, alone = with_rows(64, 32, 512, 2048)
    found = [of(3.0, near), of(1.05, own), of(1.05, far), of(2.0, alone)]
    table = table_of("H200", found)
    # no more than what is asked: nothing lies within a factor of 2 of the third
    assert [(e["key"]["rows"], e["candidate"], e["gain"]) for e in table["entries"]] == [
        *[(32, OTHER.name, 3.0)] * 2, *[(2048, OTHER.name, 2.0)] * 2, *[(64, ANALYTIC, 1.0)] * 2,
    ]  # fmt: skip
    ship(folder, "H200", *found)
    cuda = torch.device("cuda")
    assert choose(near, cuda).candidate == OTHER
    for m in (64, 63, 33):
        cell = dataclasses.replace(CELL, M=m)
        taken = choose(cell, cuda)
        assert (taken.candidate, taken.source) == (analytic(cell).candidate, "predicted")
        assert taken.reasons.startswith("predicted for H200: nothing else is faster; ")
    ship(folder, "H200", of(3.0, near))
    assert choose(own, cuda).candidate == OTHER  # nothing is known of it


def test_what_was_measured_to_be_best_by_reasoning_is_not_a_neighbours_either():
    def row(cell, candidate, status="kept"):
        choice = lookup.Choice(candidate, "cache", "")
        return Tuned("", cell, status, choice, 1.5, 1.0, over_reasoned=1.5)

    own, near, far = with_rows(64, 128, 1024)
    rows = [row(own, REASONED), row(near, OTHER), row(far, analytic(far).candidate)]
    found = [(e["key"]["rows"], e["candidate"]) for e in measured_entries(rows)]
    assert found == [(128, OTHER.name), (64, ANALYTIC)]
    rows = [row(own, REASONED, "not reached"), row(near, OTHER)]
    assert [e["key"]["rows"] for e in measured_entries(rows)] == [128]


def test_table_names_the_source_of_what_computes_its_entries():
    """It was that of bsr_linear's kernels whatever the entries were of."""
    entry = {"key": CELL.key(), "candidate": OTHER.name, "gain": 2.0}

    def made(*changes):
        entries = [entry | {"key": entry["key"] | change} for change in changes]
        return make_table("H200", "sm_90", "measured", entries, {})["sources"]

    assert made({}, {"op": "bsr_linear dx"}) == {
        "bsr_linear triton": records.source("bsr_linear", "triton")
    }
    found = made({}, {"impl": "torch"}, {"op": "bsr_conv fwd"}, {"op": "gated_linear step"})
    assert found == {
        f"{op} {impl}": records.source(op, impl)
        for op, impl in (
            ("bsr_linear", "triton"), ("bsr_linear", "torch"), ("bsr_conv", "triton"),
            ("gated_linear", "triton"),
        )
    }  # fmt: skip
    assert len(set(found.values())) == 4
    assert made() == {}


def test_products_that_shipped_tables_were_ranked_for_take_their_own_entry_or_reasoning():
    records.tables.cache_clear()
    for table in records.tables():
        for cell in usual_cells():
            for balance in ("even", "uneven"):
                keys = [cell.key(rows) | {"balance": balance} for rows in cell.near_rows()]
                held = [records.key_text(key) in table.entries for key in keys]
                assert held[0] or not any(held), (table.card, keys[0])


def test_cards_have_files_of_their_own():
    names = [file_name(name) for name in CARD_NAMES]
    assert len({*names}) == len(names)
    assert file_name("H100 SXM") == "h100_sxm.json"
    assert file_name("RX 7900 XTX") == "rx_7900_xtx.json"


def ship(folder, name, *found):
    write_table(folder / file_name(name), table_of(name, found))
    records.tables.cache_clear()
    lookup.forget()


def shipped():
    return {table.card: table.entries for table in records.tables()}


def test_tables_that_are_written_are_read(folder):
    found = [of(1.5), of(2.25, dataclasses.replace(CELL, nnz=20), THIRD)]
    ship(folder, "H200", *found)
    ship(folder, "A10")  # no entry
    tables = shipped()
    assert [*tables] == ["A10", "H200"]
    assert tables["A10"] == {}
    assert tables["H200"] == {
        records.key_text(key): {
            "key": key, "candidate": p.best.candidate.name, "gain": gain, "status": "predicted",
        }
        for p, gain in zip(found, (1.5, 2.25), strict=True)
        for key in (p.cell.key() | {"balance": balance} for balance in ("even", "uneven"))
    }  # fmt: skip
    lines = (folder / "h200.json").read_text().splitlines()
    assert [json.loads(line.rstrip(",")) for line in lines if '"key"' in line] == table_of(
        "H200", found
    )["entries"]
    # a new one takes the place of the old
    ship(folder, "H200", of(1.2))
    assert len(shipped()["H200"]) == 2
    assert sorted(path.name for path in folder.iterdir()) == ["a10.json", "h200.json"]


def test_a_predicted_entry_is_taken_on_its_card(folder, on_card):
    cuda = torch.device("cuda")
    ship(folder, "H200", of(1.5))
    for m in (32, 33, 64, 100, 128):
        found = choose(dataclasses.replace(CELL, M=m), cuda)
        assert (found.candidate, found.source) == (OTHER, "predicted"), m
    assert found.reasons == "predicted for H200: 1.50 times as fast as by reasoning"
    changes = [{"M": 31}, {"M": 129}, {"N": 1040}, {"nnz": 20}, {"dtype": torch.float16}]
    for change in [*changes, {"op": "bsr_linear dx"}]:
        assert choose(dataclasses.replace(CELL, **change), cuda).source == "analytic", change
    assert choose(CELL, torch.device("cpu")).source == "analytic"
    assert choose(dataclasses.replace(CELL, longest=32), cuda).candidate == OTHER  # uneven rows


def test_cards_of_one_architecture_share_a_table_until_they_have_their_own(folder, on_card):
    cuda = torch.device("cuda")
    ship(folder, "H200", of(1.5))
    on_card("NVIDIA H100 80GB HBM3", "sm_90")
    found = choose(CELL, cuda)
    assert (found.candidate, found.source) == (OTHER, "predicted")
    assert "H200" in found.reasons
    ship(folder, "H100 SXM", of(1.3, best=THIRD))
    found = choose(CELL, cuda)
    assert found.candidate == THIRD
    assert "H100 SXM" in found.reasons
    on_card("NVIDIA A10", "sm_86")
    assert choose(CELL, cuda).source == "analytic"


def test_a_record_of_the_user_comes_before_what_is_predicted(folder, on_card):
    cuda = torch.device("cuda")
    ship(folder, "H200", of(1.5))
    lookup.tell(lookup.full_key(CELL, cuda), THIRD.name)
    assert (choose(CELL, cuda).candidate, choose(CELL, cuda).source) == (THIRD, "cache")


def test_a_reader_sees_each_product_and_whether_reasoning_is_followed():
    dx = dataclasses.replace(CELL, op="bsr_linear dx")
    headers, rows = predicted.shown([of(1.5), of(1.0, best=REASONED)])
    assert predicted.shown([of(1.5, dx)])[1] == [["dx", *rows[0][1:]]]
    assert [dict(zip(headers, row, strict=True)) for row in rows] == [
        {
            "pass": "fwd", "M": "64", "N, K": "1024, 2048", "block": "64x64", "density": "0.20",
            "takes": OTHER.name, "us": "10.0", "bound": "memory", "untuned, us": "15.0",
            "gain": "1.50x",
        },
        {
            "pass": "fwd", "M": "64", "N, K": "1024, 2048", "block": "64x64", "density": "0.20",
            "takes": f"{REASONED.name} (analytic)", "us": "10.0", "bound": "memory",
            "untuned, us": "10.0", "gain": "1.00x",
        },
    ]  # fmt: skip


@pytest.mark.compiles
def test_a_convolution_is_compiled_and_ranked_for_a_card_that_is_absent(folder, on_card):
    cell, seen = conv_cell(channels=(32, 32), size=(4, 4), images=2, block=(16, 16)), []
    (found,) = predict_cells("H200", [cell], progress=lambda *a: seen.append(a))
    assert found.cell == cell
    assert found.best.candidate in (analytic(cell).candidate, *candidates(cell))
    assert seen[0][2] == "M 32, weight 32x32x3x3"
    assert choose(cell, torch.device("cuda")).source == "analytic"
    other = next(c for c in candidates(cell) if c != analytic(cell).candidate)
    ship(folder, "H200", of(2.0, cell, other))
    assert choose(cell, torch.device("cuda")).candidate == other


@pytest.mark.compiles
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", ["H100 SXM", "MI300X"])
def test_a_product_is_compiled_and_ranked_for_a_card_that_is_absent(name, op, folder):
    cell = Cell(op, "triton", 16, 128, 128, (32, 32), 4, torch.bfloat16)
    (found,) = predict_cells(name, [cell])
    assert found.cell == cell
    assert found.best.candidate in (analytic(cell).candidate, *candidates(cell, True))
    assert found.best.dropped is None
    assert found.gain >= 1
    assert found.best.candidate.name not in found.dropped
    ship(folder, name, found, dataclasses.replace(found, reasoned=2 * found.reasoned))
    names = [entry["candidate"] for entry in shipped()[name].values()]
    assert names == [found.best.candidate.name] * 2
    assert card(name).arch == json.loads((folder / file_name(name)).read_text())["architecture"]


@pytest.mark.parametrize("gains", [(), (1.5,), (1.5, 2.0)], ids=len)
def test_a_written_table_has_no_blank_line(gains, tmp_path):
    found = [of(gain, cell) for gain, cell in zip(gains, with_rows(64, 1024), strict=False)]
    path, table = tmp_path / "t.json", table_of("A10", found)
    write_table(path, table)
    assert json.loads(path.read_text()) == table
    assert all(line.strip() for line in path.read_text().splitlines())


def test_only_a_predicted_table_of_the_card_counts_as_one(tmp_path):
    path, table = tmp_path / "t.json", table_of("A10", [of(1.0)])
    assert products_held(path, "A10") == Held()
    write_table(path, table)
    assert products_held(path, "A10") == Held(1)
    for change in ({"card": "H200"}, {"status": "measured"}, {"ranked": "1"}, {"ranked": True}):
        write_table(path, table | change)
        with pytest.raises(ValueError, match="must be a new file or a predicted table of A10"):
            products_held(path, "A10")
    path.unlink()
    for make in (lambda: path.write_bytes(b""), lambda: os.mkfifo(path), path.mkdir,
                 lambda: path.write_text("[1]"), lambda: path.write_text("{")):  # fmt: skip
        make()
        with pytest.raises(ValueError, match="must be a new file or a table of choices, got"):
            products_held(path, "A10")
        path.rmdir() if path.is_dir() else path.unlink()
