"""Which candidate a call takes, by whose word; results stay the same whoever decides."""

import dataclasses
import itertools
import json
import random
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_exact, integers
from sgtriton_kernels import BlockSparse, bsr_linear, bsr_torch, lookup, records, shared_memory
from sgtriton_kernels.block_products import multiply
from sgtriton_kernels.bsr_choice import cell_of, choice_for
from sgtriton_kernels.candidate import ANALYTIC
from sgtriton_kernels.candidates import candidates, named
from sgtriton_kernels.cards import card
from sgtriton_kernels.cell import Cell
from sgtriton_kernels.gated_cell import GatedCell
from sgtriton_kernels.lookup import analytic, choose, full_key, recorded, tell
from sgtriton_kernels.tiles import BsrTile

from sgtriton import tuning
from sgtriton.choice_table import file_name, make_table, write_table
from sgtriton.tune_cache import write_record

CPU = torch.device("cpu")
CELL = Cell("bsr_linear fwd", "torch", 100, 256, 320, (16, 16), 60, torch.float32, longest=5)


def write(cell, name, rows=None):
    reason = write_record(records.cache_folder(), full_key(cell, CPU, rows), name, {})
    assert reason is None
    lookup.forget()


def test_reasoning_says_why(cache):
    found = choose(CELL, CPU)
    assert found.source == "analytic"
    assert found.reasons
    assert found == analytic(CELL)
    card = dataclasses.replace(CELL, impl="triton", block=(64, 64), nnz=20, dtype=torch.bfloat16)
    for op in ("bsr_linear fwd", "bsr_linear dx", "bsr_linear dvalues"):
        for m in (1, 32, 5000):
            cell = dataclasses.replace(card, op=op, M=m)
            found = analytic(cell)
            assert found.candidate.tile.name == found.candidate.name
            assert len(found.reasons) > 20


def test_record_of_this_user_comes_before_reasoning(cache):
    other = next(c for c in candidates(CELL) if c != analytic(CELL).candidate)
    write(CELL, other.name)
    found = choose(CELL, CPU)
    assert (found.candidate, found.source) == (other, "cache")


def test_record_may_name_what_reasoning_gives(cache):
    write(CELL, ANALYTIC)
    found = choose(CELL, CPU)
    assert (found.candidate, found.source) == (analytic(CELL).candidate, "cache")


@pytest.mark.parametrize(
    ("m", "rows", "is_asked"),
    [(100, 128, True), (100, 64, True), (100, 256, False), (128, 256, True), (128, 64, True),
     (128, 512, False), (65, 64, True), (65, 128, True), (65, 32, False), (1, 2, True)],
)  # fmt: skip
def test_nearest_record_counts_within_a_factor_of_two(m, rows, is_asked, cache):
    cell = dataclasses.replace(CELL, M=m)
    other = next(c for c in candidates(cell) if c != analytic(cell).candidate)
    write(cell, other.name, rows)
    found = choose(cell, CPU)
    assert (found.source == "cache") == is_asked
    if is_asked:
        bucket = {2: "M 2", 64: "M 33 to 64", 128: "M 65 to 128", 256: "M 129 to 256"}[rows]
        nearest = ", the nearest" if rows != cell.rows else ""
        assert found.reasons == f"this user's record of {bucket}{nearest}"


@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.75, 0.8, 0.9, 0.95, 0.98])
def test_layers_pruned_to_a_usual_share_find_one_record(sparsity):
    """90 % lay on an edge: of two layers pruned alike one took the record and one did not."""
    linear = dataclasses.replace(CELL, N=4096, K=4096)
    step = GatedCell(**vars(linear) | {"op": "gated_linear step"})
    for cell in (linear, step):
        blocks = cell.block_rows * cell.block_cols
        counts = [round(near * (1 - sparsity) * blocks) for near in (0.95, 1, 1.05)]
        found = [dataclasses.replace(cell, nnz=count, longest=None).key() for count in counts]
        assert found[0] == found[1] == found[2]


def test_own_record_comes_before_the_nearest(cache):
    first, second = [c for c in candidates(CELL) if c != analytic(CELL).candidate][:2]
    write(CELL, first.name, 64)
    write(CELL, second.name, 128)
    assert choose(CELL, CPU).candidate == second


@pytest.mark.parametrize("name", ["", "nothing", "x_left_n128_m16_k32_s4_w2", "library"])
def test_record_that_names_what_cannot_serve_is_none(name, cache):
    cell = dataclasses.replace(CELL, block=(16, 32))  # which the library does not take
    write(cell, name)
    assert choose(cell, CPU) == analytic(cell)


@pytest.mark.parametrize(
    "change",
    [{"N": 272}, {"K": 336}, {"block": (16, 32)}, {"dtype": torch.float64}, {"nnz": 200},
     {"longest": 12}, {"M": 300}, {"op": "bsr_linear dx"}],
    ids=str,
)  # fmt: skip
def test_record_of_another_product_is_not_taken(change, cache):
    other = next(c for c in candidates(CELL) if c != analytic(CELL).candidate)
    write(CELL, other.name)
    changed = dataclasses.replace(CELL, **change)
    if changed.op == CELL.op:
        assert choose(changed, CPU).source == "analytic"
    assert changed.key() != CELL.key()


@pytest.mark.parametrize("what", ["device", "architecture", "threads", "library", "source"])
def test_record_of_another_place_is_not_taken(what, cache, monkeypatch):
    other = next(c for c in candidates(CELL) if c != analytic(CELL).candidate)
    write(CELL, other.name)
    real = records.place
    monkeypatch.setattr(lookup, "place", lambda *a: real(*a) | {what: "another"})
    lookup.forget()
    assert choose(CELL, CPU).source == "analytic"


def test_record_is_stale_when_candidates_change(cache, monkeypatch):
    other = next(c for c in candidates(CELL) if c != analytic(CELL).candidate)
    write(CELL, other.name)
    real = named
    monkeypatch.setattr(lookup, "named", lambda *a: real(*a) | {"another": other})
    lookup.forget()
    assert choose(CELL, CPU).source == "analytic"


@pytest.mark.parametrize(
    ("status", "gain", "source"),
    [("measured", 1.01, "table"), ("predicted", 1.3, "predicted"), ("predicted", 1.05, "analytic")],
)
def test_table_that_ships_comes_after_the_users_record(status, gain, source, cache, monkeypatch):
    cell = dataclasses.replace(CELL, impl="triton", block=(64, 64), dtype=torch.bfloat16)
    first, second = [c for c in candidates(cell, True) if c != analytic(cell).candidate][:2]
    entry = {"candidate": first.name, "status": status, "gain": gain}
    monkeypatch.setattr(lookup, "is_native", lambda device: False)
    monkeypatch.setattr(lookup, "table_entries", lambda device, keys: [("H200", entry)])
    found = choose(cell, CPU)
    assert found.source == source
    assert (found.candidate == first) == (source != "analytic")
    assert source == "analytic" or "H200" in found.reasons
    tell(full_key(cell, CPU), second.name)
    assert choose(cell, CPU).candidate == second


def test_entry_that_cannot_serve_gives_way_to_the_next_tables(cache, monkeypatch):
    cell = dataclasses.replace(CELL, impl="triton", block=(64, 64), dtype=torch.bfloat16)
    first, second = [c for c in candidates(cell, True) if c != analytic(cell).candidate][:2]
    entries = [
        ("H200", {"candidate": "nothing", "status": "measured", "gain": 9.0}),
        ("H100 SXM", {"candidate": first.name, "status": "predicted", "gain": 2.0}),
        ("H100 PCIe", {"candidate": second.name, "status": "predicted", "gain": 3.0}),
    ]
    monkeypatch.setattr(lookup, "is_native", lambda device: False)
    monkeypatch.setattr(lookup, "table_entries", lambda device, keys: iter(entries))
    found = choose(cell, CPU)
    assert (found.candidate, found.source) == (first, "predicted")


class Properties:
    """What the driver says of a card."""

    def __init__(self, shared: int | None):
        self.shared_memory_per_block = 48 * 1024
        if shared is not None:
            self.shared_memory_per_block_optin = shared


@pytest.fixture
def on_card(cache, monkeypatch):
    """As if device 0 were a card of an architecture whose programs get so much shared memory."""

    def become(arch: str, shared: int | None) -> torch.device:
        for module in (records, shared_memory):
            monkeypatch.setattr(module, "architecture", lambda device: arch)
        monkeypatch.setattr(records, "device_name", lambda device: f"a card of {arch}")
        found = Properties(shared)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
        lookup.forget()
        return torch.device("cuda", 0)

    yield become
    lookup.forget()


LARGE = Cell("bsr_linear fwd", "triton", 512, 1024, 1024, (128, 128), 20, torch.bfloat16)
DEEP = BsrTile(128, 128, 64, 4, 8, bulk=True).name  # 128 KiB in four buffers, 96 in three


@pytest.mark.parametrize(
    ("arch", "shared", "is_taken"),
    [("sm_90", 227, True), ("sm_90", 99, False), ("sm_120", 99, True), ("sm_80", 64, False),
     ("gfx942", None, False)],
)  # fmt: skip
@pytest.mark.parametrize("source", ["cache", "table"])
def test_record_of_a_tile_that_does_not_fit_the_card_is_not_taken(
    source, arch, shared, is_taken, on_card, monkeypatch
):
    """Its launch failed: out of resource, shared memory."""
    device = on_card(arch, shared and shared * 1024)
    monkeypatch.setattr(lookup, "table_entries", lambda device, keys: [])
    if source == "cache":
        key = full_key(LARGE, device)
        assert write_record(records.cache_folder(), key, DEEP, {}) is None
    else:
        entry = {"candidate": DEEP, "status": "measured", "gain": 2.0}
        monkeypatch.setattr(lookup, "table_entries", lambda device, keys: [("H200", entry)])
    lookup.forget()
    found = choose(LARGE, device)
    assert (found.source == source) == is_taken
    assert (found.candidate.name == DEEP) == is_taken
    assert is_taken or found == analytic(LARGE)


def test_record_of_a_tile_that_does_not_fit_is_tuned_anew(on_card):
    device = on_card("sm_80", 64 * 1024)
    tell(full_key(LARGE, device), DEEP)
    assert recorded(None, full_key(LARGE, device)) == DEEP
    assert not tuning._is_recorded(SimpleNamespace(cell=LARGE, device=device), None)


@pytest.mark.parametrize("shared", [99, 163, 227])
def test_what_reasoning_gives_fits_every_card(shared, on_card):
    arch = {99: "sm_86", 163: "sm_80", 227: "sm_90"}[shared]
    device = on_card(arch, shared * 1024)
    for dtype, block, op, m in itertools.product(
        (torch.bfloat16, torch.float32), (16, 64, 128),
        ("bsr_linear fwd", "bsr_linear dx", "bsr_linear dvalues"), (1, 64, 5000),
    ):  # fmt: skip
        cell = dataclasses.replace(LARGE, dtype=dtype, block=(block, block), op=op, M=m)
        assert shared_memory.fits(analytic(cell).candidate.tile, cell, device)


def test_shipped_entries_fit_their_card():
    """None of them is dropped where it was found."""
    for table in records.tables():
        most = card(table.card).shared_program_kib * 1024
        for text, entry in table.entries.items():
            key = json.loads(text)
            if entry["candidate"] == ANALYTIC:
                continue
            tile = named(key["op"], "triton", False)[entry["candidate"]].tile
            bn, bk = map(int, key["block"].split("x"))
            cell = dataclasses.replace(LARGE, op=key["op"], block=(bn, bk))
            assert key["dtype"] == "bfloat16"
            if tile is not None:
                taken = shared_memory.bytes_of(tile, cell, table.architecture)
                assert taken <= most, (table.card, text)


def test_shipped_tables_name_candidates_and_cards():
    """Every entry is found by the key of some product, and names what can serve it."""
    for table in records.tables():
        assert table.architecture == card(table.card).arch
        for text, entry in table.entries.items():
            key = json.loads(text)
            assert set(key) == set(CELL.key())
            names = {ANALYTIC, *named(key["op"], "triton", False)}
            assert entry["candidate"] in names, (table.card, text)
            assert entry["status"] in ("predicted", "measured")
            assert entry["gain"] >= 1


@pytest.mark.parametrize(
    ("device", "arch", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "sm_90", "H100 SXM"), ("NVIDIA H200", "sm_90", "H200"),
        ("NVIDIA H100 PCIe", "sm_90", "H200"),  # the measured one of its architecture
        ("NVIDIA A10", "sm_86", None),
    ],
)  # fmt: skip
def test_table_is_that_of_the_card_or_else_of_its_architecture(
    device, arch, expected, tmp_path, monkeypatch
):
    keys = [CELL.key(64), CELL.key(128)]
    for name, status in (("H100 SXM", "predicted"), ("H200", "measured"), ("L40S", "measured")):
        entries = [{"key": key, "candidate": "unpack", "gain": 2.0} for key in keys[1:]]
        table = make_table(name, card(name).arch, status, entries, {})
        write_table(tmp_path / file_name(name), table)
    monkeypatch.setattr(records, "_TABLES", tmp_path)
    monkeypatch.setattr(records, "device_name", lambda _: device)
    monkeypatch.setattr(records, "architecture", lambda _: arch)
    records.tables.cache_clear()
    try:
        found = next(records.table_entries(torch.device("cuda"), keys), None)
        assert not [*records.table_entries(torch.device("cpu"), keys)]
    finally:
        monkeypatch.undo()
        records.tables.cache_clear()
    assert (found and found[0]) == expected
    assert found is None or found[1]["candidate"] == "unpack"


def container(open, side):
    dense = integers(open.shape[0] * side, open.shape[1] * side)
    mask = open.repeat_interleave(side, 0).repeat_interleave(side, 1)
    return BlockSparse.from_dense(dense.where(mask, 0), (side, side), open=open), dense * mask


def test_choice_that_was_kept_with_a_matrix_gives_way_to_a_new_record(cache, monkeypatch):
    taken, real = [], multiply
    monkeypatch.setattr(bsr_torch, "multiply", lambda *a: taken.append(a[5]) or real(*a))
    w, dense = container(torch.rand(12, 14) < 0.5, 16)
    x = integers(20, 14 * 16)
    cell = cell_of("fwd", w, "torch", x)
    for name in ("loop", "dense", "layers"):
        tell(full_key(cell, CPU), name)
        assert_exact(name, bsr_linear(x, w, impl="torch"), x @ dense.T)
        assert_exact(name, bsr_linear(x, w, impl="torch"), x @ dense.T)
    assert taken == ["loop", "loop", "dense", "dense", "layers", "layers"]


def test_threads_that_meet_other_sizes_do_not_disturb_each_other(cache):
    """A thread that looked through the choices failed when another added one."""
    before, failed = sys.getswitchinterval(), []
    w, _ = container(torch.rand(4, 4) < 0.5, 16)

    def ask(seed):
        try:
            for m in random.Random(seed).choices(range(1, 400), k=600):
                choice_for("fwd", w, "torch", torch.empty(m, 64))
                if m % 50 == 0:
                    lookup.forget()
        except Exception as error:
            failed.append(error)

    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not failed


@pytest.mark.parametrize("change", [{"M": 0}, {"nnz": 0}], ids=str)
def test_products_of_nothing_are_not_looked_up(change, cache):
    """No rows share their bucket with one row, whose record is not theirs."""
    empty = dataclasses.replace(CELL, **{"M": 1} | change)
    other = next(c for c in candidates(empty) if c != analytic(empty).candidate)
    write(empty, other.name)
    assert choose(empty, CPU) == analytic(empty)


def test_callers_choice_comes_before_all(cache, monkeypatch):
    taken, real = [], multiply
    monkeypatch.setattr(bsr_torch, "multiply", lambda *a: taken.append(a[5]) or real(*a))
    w, dense = container(torch.rand(12, 14) < 0.5, 16)
    x = integers(20, 14 * 16)
    tell(full_key(cell_of("fwd", w, "torch", x), CPU), "loop")
    assert_exact("rows", bsr_linear(x, w, impl="torch", tile="rows"), x @ dense.T)
    assert taken == ["rows"]


def test_choices_of_many_sizes_do_not_pile_up(cache):
    w, _ = container(torch.rand(4, 4) < 0.5, 16)
    for m in range(1, 600):
        choice_for("fwd", w, "torch", torch.empty(m, 64))
    assert 0 < len(w.index.choices.of(lookup.now.generation)) <= 256
    assert len(lookup._chosen) <= 4096


def test_lookup_reads_each_file_once(cache, monkeypatch):
    write(CELL, ANALYTIC)
    reads, real = [], records.read_record
    monkeypatch.setattr(lookup, "read_record", lambda *a: reads.append(1) or real(*a))
    for _ in range(5):
        choose(CELL, CPU)
    assert len(reads) == 1
