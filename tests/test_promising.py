"""What a search compares on a device."""

import dataclasses

import pytest
import torch
from sgtriton_kernels import lookup, records, shared_memory
from sgtriton_kernels.bsr_candidates import cut
from sgtriton_kernels.candidates import candidates
from sgtriton_kernels.cell import OPS, Cell
from sgtriton_kernels.lookup import analytic

from sgtriton import promising as module
from sgtriton.promising import contenders

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
        for place in (records,):
            monkeypatch.setattr(place, "device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties(shared))
        lookup.forget()
        return torch.device("cuda", 0)

    yield become
    lookup.forget()


def test_what_reasoning_gives_is_compared_with_what_records_can_name(cache):
    """It was left out once a record or a table named something else."""
    assert REASONED not in candidates(CELL)
    assert contenders(CELL, CPU)[0] == REASONED


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
