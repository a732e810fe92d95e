"""The part of ``python -m bench card`` that tunes, and the products that it is asked to."""

import contextlib
import csv
import json
import time
from dataclasses import replace

import pytest
import torch
from sgtriton_kernels import lookup
from sgtriton_kernels.candidates import candidates
from sgtriton_kernels.conv_cell import ConvCell
from sgtriton_kernels.gated_cell import GatedCell
from sgtriton_kernels.lookup import Choice, analytic

from bench import card_tuning, standard_products
from bench.__main__ import main  # noqa: F401  (imports every command, as the command line does)
from sgtriton.choice_table import measured_entries
from sgtriton.products import work_of
from sgtriton.tune_report import Tuned, TuneInterrupted
from sgtriton.tuning import tune_products

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small(tmp_path, monkeypatch):
    monkeypatch.setenv("SGTRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("SGTRITON_IMPL", "torch")
    monkeypatch.setattr(lookup, "_told", {})  # what other tests found
    for name, values in {
        "SHAPES": ((128, 128),), "ROWS": (16,), "BLOCKS": (16,), "LAYERS": ((32, 32, 4),),
        "IMAGES": (1,), "STEP_SHAPES": ((128, 64),), "STEP_ROWS": (16,),
    }.items():  # fmt: skip
        monkeypatch.setattr(standard_products, name, values)


def tuned(folder, seconds=120):
    """Rows and the table of a tuning part."""
    steps = list(card_tuning.tuning_part(time.monotonic() + seconds, folder, CPU))
    with open(folder / "tuning.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    (path,) = folder.glob("*.json")
    return rows, json.loads(path.read_text(encoding="utf-8")), steps


def test_the_first_products_tell_most():
    chosen = standard_products.standard_products(trains=False, counted=True)
    assert [standard.behind for standard in chosen] == [0, 1, 1, 1, 2, 2, 2, 3, 3, 4]
    kinds = [next(work_of([s.make(torch.float32, CPU)])).cell for s in chosen]
    assert [(type(cell).__name__, cell.op) for cell in kinds[:3]] == [
        ("Cell", "bsr_linear fwd"), ("Cell", "bsr_linear fwd"), ("ConvCell", "bsr_conv fwd"),
    ]  # fmt: skip
    assert isinstance(kinds[3], GatedCell)
    # one for each bucket of density, far from its edges
    for kind, buckets in ((ConvCell, 3), (GatedCell, 4)):
        assert len({cell.key()["density"] for cell in kinds if isinstance(cell, kind)}) == buckets
    assert len({cell.key()["density"] for cell in kinds if cell.op == "bsr_linear fwd"}) == 3
    # where nobody counts, all densities share a record
    chosen = standard_products.standard_products(trains=False, counted=False)
    assert [s.make(torch.float32, CPU).name for s in chosen].count("training step") == 1


def test_gradients_are_tuned_where_they_have_candidates(monkeypatch):
    monkeypatch.setenv("SGTRITON_IMPL", "triton")
    chosen = standard_products.standard_products(trains=True, counted=False)
    made = [(standard.behind, standard.make(torch.float32, CPU)) for standard in chosen]
    for name, behind in (("linear", [2, 3, 4]), ("3x3 on 4x4", [3, 4, 5])):
        found = [b for b, product in made if product.name == name and product.trains]
        assert found == behind


def test_every_product_that_there_is_time_for_is_reached(tmp_path):
    rows, table, steps = tuned(tmp_path)
    assert (steps[0].done, steps[-1].done, steps[-1].of) == (0, 10, 10)
    assert [row["name"] for row in rows] == [
        "linear", "linear", "3x3 on 4x4", "training step", "linear",
        "3x3 on 4x4", "training step", "3x3 on 4x4", "training step", "training step",
    ]  # fmt: skip
    assert {row["status"] for row in rows} <= {"kept", "changed", "no choice"}
    assert all(float(row["ms"]) > 0 for row in rows if row["status"] != "no choice")
    assert table["status"] == "measured"
    other = {row["candidate"] for row in rows if row["source"] == "cache"}
    named = {entry["candidate"] for entry in table["entries"]} - {"analytic"}
    assert named <= other
    assert set(table["sources"]) == {
        f"{entry['key']['op'].split()[0]} torch" for entry in table["entries"]
    }


def test_steps_whose_open_share_nobody_counts_are_in_no_table():
    """What is the fastest near a target would be taken from the first step on."""
    cell = GatedCell("gated_linear step", "triton", 9, 64, 64, (16, 16), 3, torch.float32)
    for counted in (True, False):
        cell = replace(cell, counted=counted)
        other = next(c for c in candidates(cell) if c != analytic(cell).candidate)
        row = Tuned("", cell, "changed", Choice(other, "cache", ""), 2.0, 1.0, over_reasoned=2.0)
        assert len(measured_entries([row])) == counted


def plant(monkeypatch, after=lambda report: report):
    """A search that finds ``loop`` to be twice as fast."""
    monkeypatch.setattr(standard_products, "LAYERS", ())
    monkeypatch.setattr(standard_products, "STEP_SHAPES", ())
    found = []

    def search(products, seconds, compilers):
        report = tune_products(products, seconds, compilers=compilers)
        (row,) = report.rows
        cell = replace(row.cell, nnz=len(found) + 1, block=(8 << len(found),) * 2)
        loop = next(c for c in candidates(cell) if c.name == "loop")
        choice = replace(row.choice, candidate=loop, source="cache")
        gained = {"gain": 2.0, "over_reasoned": 2.0, "ms": 1.5}
        found.append(replace(row, cell=cell, status="changed", choice=choice, **gained))
        return after(replace(report, rows=(found[-1],)))

    monkeypatch.setattr(card_tuning, "tune_products", search)
    return found


def test_what_was_found_is_written(tmp_path, monkeypatch):
    found = plant(monkeypatch)
    rows, table, _ = tuned(tmp_path)
    assert [(row["candidate"], row["gain"], row["ms"], row["block"]) for row in rows] == [
        ("loop", "2.0", "1.5", block) for block in ("8x8", "16x16", "32x32")
    ]
    assert table["entries"] == [
        {"key": row.cell.key(), "candidate": "loop", "gain": 2.0} for row in found
    ]


def test_a_stop_keeps_what_its_search_had_found(tmp_path, monkeypatch):
    def stop(report):
        raise TuneInterrupted(report)

    plant(monkeypatch, stop)
    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path)
    assert (tmp_path / "tuning.csv").read_text().count("loop") == 1
    assert len(list(tmp_path.glob("*.json"))) == 1


def test_compilers_stay_from_product_to_product_and_start_again(tmp_path, monkeypatch):
    class Compilers:
        ready, started = 2, 0

        def start(self, until):
            assert until <= deadline
            self.ready, self.started = 2, self.started + 1

    kept, seen = Compilers(), []

    @contextlib.contextmanager
    def start(products, seconds):
        assert [cell.op for cell, _ in products] == ["bsr_linear fwd"]
        yield kept

    def search(products, seconds, compilers):
        seen.append((compilers, compilers.ready))
        compilers.ready = len(seen) % 2  # after the second they were ended
        return tune_products(products, seconds)

    monkeypatch.setattr(card_tuning, "compilers_for", start)
    monkeypatch.setattr(card_tuning, "tune_products", search)
    monkeypatch.setattr(card_tuning, "_RESTART", 1e4)
    deadline = time.monotonic() + 121
    tuned(tmp_path)
    assert len(seen) == 10
    assert {compilers for compilers, _ in seen} == {kept}
    assert min(ready for _, ready in seen) > 0
    assert kept.started == 4
