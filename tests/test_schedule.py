"""Programs and when the last of them ends, against figures worked out by hand."""

import random

import pytest
import torch
from sgtriton_kernels.cell import Cell
from sgtriton_kernels.tiles import BsrTile

from sgtriton import schedule


@pytest.mark.parametrize(
    ("lengths", "parts", "split", "tiles_m", "processors", "expected"),
    [
        ((3, 1, 1, 1), 1, 1, 1, 2, 3),
        ((3, 1, 1, 1), 1, 1, 2, 2, 6),
        ((3, 1, 1, 1), 2, 1, 1, 12, 3),
        ((5, 3), 1, 2, 1, 8, 3),  # 3 + 2, 2 + 1
        ((5, 0), 1, 4, 1, 1, 5),  # 2 + 2 + 1 + nothing
        ((2, 2, 2), 1, 1, 1, 2, 4),
        ((0, 0), 1, 1, 1, 4, 0),
    ],
)
def test_programs_are_handed_out_in_order(lengths, parts, split, tiles_m, processors, expected):
    assert schedule.makespan(lengths, parts, split, tiles_m, processors) == expected


def test_many_programs_end_as_if_each_were_handed_out_alone():
    for seed in range(50):
        random.seed(seed)
        lengths = tuple(random.choices(range(9), k=12))
        split, tiles_m, free = random.choice((1, 4)), random.randrange(1, 40), [0] * (1 + seed % 11)
        for length in lengths:
            share = -(-length // split)
            for i in range(2 * split):  # of two parts
                piece = min(share, max(length - i % split * share, 0))
                for _ in range(tiles_m if piece else 0):
                    free.sort()
                    free[0] += piece
        assert schedule.makespan(lengths, 2, split, tiles_m, len(free)) == max(free)


def test_random_patterns_grow_and_are_as_many_as_asked_for():
    before = (0,) * 8
    for nnz in (0, 1, 13, 40, 79, 80):
        lengths = schedule.row_lengths(8, 10, nnz)
        assert sum(lengths) == nnz
        assert list(lengths) == sorted(lengths, reverse=True)
        assert all(a <= b <= 10 for a, b in zip(before, lengths, strict=True))
        before = lengths


def test_a_transposed_index_has_its_own_order():
    longest = schedule.row_lengths(8, 10, 40)
    own = schedule.row_lengths(8, 10, 40, longest_first=False)
    assert sorted(own, reverse=True) == list(longest) != list(own)


def test_programs_of_a_part_of_a_block_row():
    cell = Cell("bsr_linear fwd", "triton", 100, 256, 128, (64, 32), 6, torch.float16)
    found = schedule.multiplied(cell, BsrTile(32, 64, 16, 2, 4), 4, transposed=False)
    # 4 block rows of 2 parts, 2 tiles of rows: 16 programs on 4, 24 blocks to do
    assert (found.rows, found.depth, found.even, found.waves) == (100, 32, 6, 4 * 6 / 4)
    assert found.last >= found.even
    assert (found.lists, found.list_programs) == (8, 2)


def test_transposed_outputs_are_the_inputs():
    cell = Cell("bsr_linear dx", "triton", 100, 256, 128, (64, 32), 16, torch.float16)
    found = schedule.multiplied(cell, BsrTile(16, 64, 32, 2, 4), 4, transposed=True)
    # 4 block columns of 4 blocks, of one part; 2 tiles of rows
    assert found.tile == BsrTile(32, 64, 16, 2, 4)
    assert (found.depth, found.even, found.waves, found.last) == (64, 8, 8, 8)
    assert (found.lists, found.list_programs) == (4, 2)


def test_programs_at_stored_blocks_are_all_as_long():
    cell = Cell("bsr_linear dvalues", "triton", 100, 256, 128, (64, 32), 6, torch.float16)
    found = schedule.sampled(cell, BsrTile(32, 16, 32, 2, 4, split=2), 5)
    # 6 blocks of 2 parts, twice: 24 programs on 5, each 4 of the 7 steps of 16 rows
    assert (found.rows, found.depth, found.last, found.waves) == (32, 16, 5 * 4, 5 * 4)
    assert found.even == pytest.approx(6 * 2 * 7 / 5)
    assert (found.tile.BLOCK_M, found.tile.BLOCK_N) == (32, 32)
    assert (found.lists, found.list_programs) == (4, 3)
