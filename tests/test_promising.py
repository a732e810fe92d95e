"""What a search compares: on a card what its compiler takes and its model promises most of."""

import contextlib
import dataclasses
import random

import pytest
import torch
from conv_layers import conv_cell
from sgtriton_kernels import gate_layout, lookup, records, shared_memory
from sgtriton_kernels.candidate import UNPACK, cut
from sgtriton_kernels.candidates import candidates
from sgtriton_kernels.cards import card
from sgtriton_kernels.cell import OPS, Cell
from sgtriton_kernels.conv_cell import CONV_OPS
from sgtriton_kernels.gated_choice import cell_of
from sgtriton_kernels.lookup import analytic

from sgtriton import promising as module
from sgtriton.compilers import NO_TIME
from sgtriton.offline import expected, faults, prediction
from sgtriton.promising import MOST, compilers_for, contenders, promising

CPU = torch.device("cpu")
CELL = Cell("bsr_linear fwd", "triton", 512, 1024, 1024, (128, 128), 20, torch.bfloat16)
REASONED = analytic(CELL).candidate


class Properties:
    """What the driver says of a card."""

    def __init__(self, shared):
        self.shared_memory_per_block = 48 * 1024
        self.shared_memory_per_block_optin = shared


@pytest.fixture
def on_card(cache, monkeypatch):
    """As if device 0 were a card of that name and architecture."""

    def become(name="NVIDIA H200", arch="sm_90", shared=227 * 1024):
        for place in (records, shared_memory, module):
            monkeypatch.setattr(place, "architecture", lambda device: arch)
        for place in (records, module):
            monkeypatch.setattr(place, "device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties(shared))
        lookup.forget()
        return torch.device("cuda", 0)

    yield become
    lookup.forget()


class Fake:
    """Processes that compile nothing; ``reasons`` says what came of a candidate."""

    def __init__(self, monkeypatch, reasons=lambda candidate: None, ready=4):
        self.ready, self.asked, self.reasons = ready, [], reasons
        monkeypatch.setattr(module, "faults", self.faults)

    def faults(self, arch, cell, given, limit, compilers, deadline, ahead):
        assert compilers is self
        assert ahead
        self.asked.append((arch, [*given], limit))
        return [None if c.tile is None else self.reasons(c) for c in given]

    def close(self):
        self.ready = 0

    @property
    def compiled(self):
        return [candidate for _, given, _ in self.asked for candidate in given]


def others_than(*first, cell=CELL, device=CPU):
    return [c for c in contenders(cell, device) if c not in first]


def by_model(name, given, cell=CELL):
    """In the order that the model of a card gives, without those that it says nothing of."""

    def order(candidate):
        if candidate.tile is None:
            return expected(card(name), cell, candidate)[0], 0.0
        found = prediction(card(name), cell, candidate.tile)
        return found.seconds, found.programs

    return sorted((c for c in given if c.tile is None or c.tile.form != "pairs"), key=order)


def test_what_reasoning_gives_is_compared_with_what_records_can_name(cache):
    """It was left out once a record or a table named something else."""
    assert REASONED not in candidates(CELL)
    assert contenders(CELL, CPU)[0] == REASONED
    other = candidates(CELL)[3]
    assert promising(CELL, CPU, other).candidates[:2] == (other, REASONED)
    assert promising(CELL, CPU, REASONED).candidates[0] == REASONED


@pytest.mark.parametrize("op", OPS)
def test_no_two_that_are_compared_are_the_same_launch(op, cache):
    twice = 0
    for m, side in ((16, 32), (64, 32), (64, 64), (512, 64), (512, 128), (4096, 128)):
        blocks = (1024 // side) ** 2
        cell = dataclasses.replace(CELL, op=op, M=m, block=(side, side), nnz=blocks // 2)
        found = contenders(cell, CPU)
        tiles = [cut(c.tile, cell) for c in found if c.tile is not None]
        assert len({*tiles}) == len(tiles)
        named = [cut(c.tile, cell) for c in candidates(cell) if c.tile is not None]
        assert {*named} <= {*tiles}
        twice += tiles[0] in named and analytic(cell).candidate not in candidates(cell)
    assert twice or op != "bsr_linear fwd"


@pytest.mark.parametrize(("arch", "shared"), [("sm_90", 227), ("sm_90", 99), ("sm_80", 64)])
def test_tiles_that_do_not_fit_a_card_are_not_compared(arch, shared, on_card):
    device = on_card("a card", arch, shared * 1024)
    found = contenders(CELL, device)
    assert all(shared_memory.fits(c.tile, CELL, device) for c in found if c.tile is not None)
    every = candidates(CELL, copy_engine=arch == "sm_90")
    assert (len(found) < len(every)) == (shared < 227)
    assert any(c.tile is not None and c.tile.bulk for c in found) == (arch == "sm_90")


def test_those_that_a_card_promises_most_of_come_first(on_card, monkeypatch):
    device, compilers = on_card(), Fake(monkeypatch)
    given = others_than(REASONED, device=device)
    found = promising(CELL, device, REASONED, compilers, 60.0)
    first, *rest = found.candidates
    assert (first, found.refused) == (REASONED, {})
    order = by_model("H200", given)
    assert [c for c in rest if c != UNPACK] == [c for c in order if c != UNPACK][:MOST]
    assert rest[-1] == UNPACK  # which stays in whatever is predicted of it
    assert len(given) > MOST + 1
    assert len(compilers.compiled) <= MOST + compilers.ready  # no more than that is compiled
    assert {(arch, limit) for arch, _, limit in compilers.asked} == {("sm_90", 227 * 1024)}


@pytest.mark.parametrize(
    "cell",
    [
        dataclasses.replace(CELL, M=16, N=14336, K=4096, nnz=1792),
        conv_cell(images=32, size=(56, 56)),
    ],
    ids=["few rows", "few channels"],
)
def test_of_tiles_that_memory_bounds_alike_those_whose_programs_end_first_are_compared(
    cell, on_card
):
    """They were those that are listed first, whatever they read of the caches."""
    device = on_card()
    given = others_than(analytic(cell).candidate, UNPACK, cell=cell, device=device)
    found = promising(cell, device, analytic(cell).candidate).candidates[1:]
    told = [prediction(card("H200"), cell, c.tile) for c in by_model("H200", given, cell)]
    least = told[0].seconds
    alike = [p for p in told if p.seconds == least]
    assert len(alike) > 4
    assert len({p.programs for p in alike}) > 1
    tiles = [prediction(card("H200"), cell, c.tile) for c in found if c != UNPACK]
    assert [p.programs for p in tiles[: len(alike)]] == sorted(p.programs for p in alike)[:MOST]


def test_without_compilers_the_order_is_the_models_all_the_same(on_card):
    device = on_card("NVIDIA A10", "sm_86", 99 * 1024)
    given = others_than(REASONED, device=device)
    found = promising(CELL, device, REASONED)
    order = [c for c in by_model("A10", given) if c != UNPACK]
    assert [c for c in found.candidates[1:] if c != UNPACK] == order[:MOST]


def test_what_the_compiler_refuses_is_left_out_and_others_take_its_place(on_card, monkeypatch):
    device = on_card()
    order = by_model("H200", others_than(REASONED, device=device))
    bad = {c.name for c in order[:6] if c != UNPACK}
    compilers = Fake(monkeypatch, lambda c: "8 bytes spilled" if c.name in bad else None)
    found = promising(CELL, device, REASONED, compilers, 60.0)
    assert found.refused == dict.fromkeys(bad, "8 bytes spilled")
    tiles = [c for c in order if c != UNPACK and c.name not in bad]
    assert [c for c in found.candidates[1:] if c != UNPACK] == tiles[:MOST]


def test_what_is_taken_now_and_what_reasoning_gives_are_compared_whatever_the_compiler_says(
    on_card, monkeypatch
):
    device = on_card()
    compilers = Fake(monkeypatch, lambda candidate: "it does not compile")
    present = others_than(REASONED, UNPACK, device=device)[-1]
    found = promising(CELL, device, present, compilers, 60.0)
    assert found.candidates == (present, REASONED, UNPACK)
    assert not {present.name, REASONED.name} & {*found.refused}


def test_those_that_no_time_was_left_for_come_behind_and_nothing_more_is_started(
    on_card, monkeypatch
):
    device = on_card()
    order = by_model("H200", others_than(REASONED, device=device))
    late = {order[0].name, order[2].name}
    compilers = Fake(monkeypatch, lambda c: NO_TIME if c.name in late else None)
    found = promising(CELL, device, REASONED, compilers, 60.0)
    assert found.refused == {}
    expect = [order[1], order[3], order[0], order[2], *order[4:]]
    tiles = [c for c in expect if c != UNPACK][:MOST]
    assert [c for c in found.candidates[1:] if c != UNPACK] == tiles
    assert compilers.compiled == order[:4]
    promising(CELL, device, REASONED, compilers, 60.0)
    assert compilers.compiled == order[:4]  # its processes were ended


def test_a_product_without_time_compiles_nothing(on_card, monkeypatch):
    device, compilers = on_card(), Fake(monkeypatch)
    for seconds in (0.0, -1.0):
        assert promising(CELL, device, REASONED, compilers, seconds).candidates[0] == REASONED
    assert compilers.asked == []


def test_of_a_card_without_figures_only_what_is_refused_is_left_out(on_card, monkeypatch):
    device = on_card("NVIDIA H100 of another kind")
    given = others_than(REASONED, device=device)
    bad = {c.name for c in random.Random(0).sample(given, 5) if c != UNPACK}
    compilers = Fake(monkeypatch, lambda c: "refused" if c.name in bad else None)
    found = promising(CELL, device, REASONED, compilers, 60.0)
    assert [*found.candidates] == [REASONED, *(c for c in given if c.name not in bad)]
    assert {*found.refused} == bad


@pytest.mark.parametrize("op", CONV_OPS)
def test_tiles_of_a_convolution_are_pruned_and_ordered_as_well(op, on_card, monkeypatch):
    device, cell = on_card(), conv_cell(op.split()[1], channels=(128, 256), block=(128, 128))
    given = others_than(analytic(cell).candidate, cell=cell, device=device)
    order = [c for c in by_model("H200", given, cell) if c != UNPACK]
    assert len({expected(card("H200"), cell, c)[0] for c in order}) > len(order) // 3
    bad = {c.name for c in order[1::4]}
    compilers = Fake(monkeypatch, lambda c: "8 bytes spilled" if c.name in bad else None)
    found = promising(cell, device, analytic(cell).candidate, compilers, 60.0)
    assert {*found.refused} <= bad
    assert next(c.name for c in order if c.name in bad) in found.refused
    tiles = [c for c in found.candidates[1:] if c != UNPACK]
    assert tiles == [c for c in order if c.name not in bad][:MOST]
    assert UNPACK in found.candidates
    assert {(arch, limit) for arch, _, limit in compilers.asked} == {("sm_90", 227 * 1024)}


def gated_cell(device):
    layout = gate_layout((48, 64), (16, 16))
    like = torch.empty(0, dtype=torch.bfloat16)
    cell = cell_of(20, like, like.dtype, layout, "threshold", True, True, True, "triton", 5)
    return cell, device


@pytest.mark.parametrize(
    "make",
    [
        lambda device: (CELL, CPU),
        lambda device: (dataclasses.replace(CELL, native=True), device),
        lambda device: (dataclasses.replace(CELL, impl="torch", dtype=torch.float32), device),
        gated_cell,
        lambda device: (conv_cell(), CPU),
        lambda device: (dataclasses.replace(conv_cell(), native=True), device),
    ],
    ids=["CPU", "native", "torch", "gated", "conv on a CPU", "native conv"],
)
def test_elsewhere_all_are_compared_as_they_are_given(make, on_card, monkeypatch):
    cell, device = make(on_card())
    compilers = Fake(monkeypatch)
    reasoned = analytic(cell).candidate
    found = promising(cell, device, reasoned, compilers, 60.0)
    assert [*found.candidates] == contenders(cell, device)
    assert {*candidates(cell)} <= {*found.candidates, *duplicates(cell, reasoned)}
    assert compilers.asked == []


def duplicates(cell, of):
    """Named tiles that are another one's launch."""
    if of.tile is None:
        return []
    same = cut(of.tile, cell)
    return [c for c in candidates(cell) if c.tile is not None and cut(c.tile, cell) == same]


def test_card_that_no_compiler_knows_is_not_compiled_for(on_card, monkeypatch):
    device, compilers = on_card("NVIDIA V100", "sm_70", 96 * 1024), Fake(monkeypatch)
    found = promising(CELL, device, REASONED, compilers, 60.0)
    assert [*found.candidates] == contenders(CELL, device)
    assert compilers.asked == []


class Processes(contextlib.AbstractContextManager):
    """Counts those that are started, and whether they are ended."""

    made: list["Processes"] = []  # noqa: RUF012
    starts = 2

    def __init__(self):
        self.ended = False
        self.made.append(self)

    def start(self, deadline):
        return self.starts

    def __exit__(self, *_):
        self.ended = True


@pytest.fixture
def processes(monkeypatch):
    monkeypatch.setattr(Processes, "made", [])
    monkeypatch.setattr(module, "Compilers", Processes)
    monkeypatch.setattr(module, "why_not", lambda: None)
    return Processes.made


def test_compilers_are_started_once_and_ended(on_card, processes):
    device = on_card()
    for cell in (CELL, conv_cell()):
        with compilers_for([(cell, CPU), (cell, device)], 60.0) as found:
            assert [found] == processes
            assert not found.ended
        assert found.ended
        processes.clear()


def test_compilers_that_do_not_start_in_time_are_done_without(on_card, processes, monkeypatch):
    monkeypatch.setattr(Processes, "starts", 0)
    with compilers_for([(CELL, on_card())], 60.0) as found:
        assert found is None
    assert [p.ended for p in processes] == [True]


def test_compilers_for_which_there_is_no_memory_are_done_without(on_card, monkeypatch):
    """The error ended the search, which needs none."""

    def refuse(compilers, deadline):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(module, "why_not", lambda: None)
    monkeypatch.setattr(module.Compilers, "start", refuse)
    with compilers_for([(CELL, on_card())], 60.0) as found:
        assert found is None


@pytest.mark.parametrize("why", ["no card", "few seconds", "no compiler", "nothing to tune"])
def test_compilers_are_not_started_for_nothing(why, on_card, processes, monkeypatch):
    device = on_card()
    products = [(CELL, CPU if why == "no card" else device)]
    if why == "no compiler":
        monkeypatch.setattr(module, "why_not", lambda: "this Triton has no compiler")
    products = [] if why == "nothing to tune" else products
    with compilers_for(products, 1.0 if why == "few seconds" else 60.0) as found:
        assert found is None
    assert processes == []


@pytest.mark.compiles
def test_compiler_leaves_out_what_a_card_cannot_run(on_card, monkeypatch):
    device = on_card()
    small = dataclasses.replace(card("H200"), shared_program_kib=48)
    monkeypatch.setattr(module, "card", lambda name: small)
    given = contenders(CELL, device)
    some = [c for c in given[1:] if c.tile is not None and c.tile.BLOCK_M in (64, 128)][:5]
    monkeypatch.setattr(module, "contenders", lambda *_: [given[0], *some, UNPACK])
    with compilers_for([(CELL, device)], 600.0) as compilers:
        assert compilers is not None
        found = promising(CELL, device, given[0], compilers, 600.0)
        reasons = faults("sm_90", CELL, some, 48 * 1024, compilers)
    refused = {c.name: r for c, r in zip(some, reasons, strict=True) if r is not None}
    assert found.refused == refused
    assert 0 < len(refused) < len(some)
    assert {r.split(" ", 1)[1] for r in refused.values()} == {
        "bytes of shared memory, a program can have 49152", "bytes spilled",
    }  # fmt: skip
    assert {*found.candidates} == {given[0], UNPACK, *(c for c in some if c.name not in refused)}
