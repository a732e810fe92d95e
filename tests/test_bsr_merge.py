"""Merged blocks hold the same weights, in every pattern, and cross neither groups nor taps."""

import pytest
import torch
from helpers import DTYPES, assert_exact, integers
from sgtriton_kernels import BlockSparse, gate_layout
from sgtriton_kernels.blocks import (
    gates_to_pattern,
    matrix_shape,
    matrix_to_weight,
    weight_to_matrix,
)
from sgtriton_kernels.bsr_merge import merge_blocks
from test_bsr_convert import WAITS, calls

# matrix, block, merged block: whole, ragged, one side only, one block for all rows or columns
CASES = [
    ((64, 64), (4, 8), (16, 16)),
    ((37, 53), (4, 4), (16, 32)),
    ((37, 53), (4, 4), (37, 8)),
    ((10, 9), (4, 2), (10, 9)),
    ((33, 17), (1, 2), (16, 16)),
    ((20, 24), (5, 24), (20, 24)),
    ((16, 16), (16, 16), (16, 16)),
    ((1, 1), (1, 1), (1, 1)),
]
PATTERNS = {
    "random": lambda p: torch.rand(p.shape) < 0.3,
    "none": lambda p: p & False,
    "all": lambda p: p | True,
    "one column": lambda p: p.index_fill(1, torch.tensor(0), True),
    "diagonal": lambda p: torch.eye(*p.shape) > 0,
    "empty row": lambda p: (torch.arange(len(p)) % 2 > 0)[:, None].expand(p.shape),
}


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("shape", "block", "merged"), CASES)
def test_merged_matrix_holds_the_same_weights(shape, block, merged, pattern, dtype):
    rows, cols = (-(-size // side) for size, side in zip(shape, block, strict=True))
    is_open = PATTERNS[pattern](torch.zeros(rows, cols, dtype=torch.bool))
    dense = integers(*shape, dtype=dtype)
    dense[dense == 0] = 2  # so that the stored blocks are those that hold something
    w = BlockSparse.from_dense(dense, block, is_open)
    out = merge_blocks(w, merged)
    assert out.block == merged
    assert out.values.dtype == dtype
    assert_exact("weights", out.to_dense(), w.to_dense())
    expected = BlockSparse.from_dense(w.to_dense(), merged)  # no block more than needed
    for name in ("values", "crow", "col", "ccol", "row", "perm", "row_order"):
        assert_exact(name, getattr(out, name), getattr(expected, name))


@pytest.mark.parametrize(
    ("shape", "block", "merged", "groups"),
    [
        ((40, 24, 3, 3), (4, 4), (16, 16), 1),
        ((40, 20, 3, 3), (4, 4), (16, 16), 1),
        ((40, 5, 3), (8, 2), (16, 5), 2),
        ((30, 6, 2, 2), (4, 1), (15, 4), 2),
        ((24, 8, 1, 1), (4, 4), (8, 8), 3),
        ((6, 4, 3, 2), (1, None), (2, 4), 1),
    ],
)
@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_merged_convolution_crosses_neither_taps_nor_groups(shape, block, merged, groups, share):
    layout = gate_layout(shape, block, groups)
    weight = torch.randint(1, 9, shape).float()
    is_open = torch.rand(layout.gate_shape) < share
    matrix = weight_to_matrix(weight, layout)
    w = BlockSparse.from_dense(matrix, layout.block, gates_to_pattern(is_open, layout))
    wide = gate_layout(shape, merged, groups)
    assert wide.block == merged
    out = merge_blocks(w, merged, groups=groups, taps=layout.taps, shape=matrix_shape(wide))
    expected = matrix_to_weight(w.to_dense(), layout)
    assert_exact("weight", matrix_to_weight(out.to_dense(), wide), expected)
    needed = BlockSparse.from_dense(weight_to_matrix(expected, wide), merged)
    for name in ("values", "crow", "col"):
        assert_exact(name, getattr(out, name), getattr(needed, name))


def test_what_lies_beyond_an_edge_stays_beyond_it():
    dense = torch.ones(6, 6)
    w = BlockSparse.from_dense(dense, (4, 4))
    values = w.values.clone()
    values[1, :, 2:] = values[2, 2:] = values[3, 2:] = values[3, :, 2:] = float("nan")
    w = BlockSparse.from_parts(values, w.crow, w.col[:4], (6, 6))
    assert_exact("edge", merge_blocks(w, (6, 6)).to_dense(), dense)
    assert_exact("edge", merge_blocks(w, (4, 6)).to_dense(), dense)


def test_gradients_reach_the_stored_blocks():
    w = BlockSparse.from_dense(torch.rand(12, 10), (4, 2), torch.rand(3, 5) < 0.5)
    values = w.values.clone().requires_grad_()
    factor = torch.rand(12, 10)
    leaf = BlockSparse.from_parts(values, w.crow, w.col[: w.nnz], (12, 10))
    (merge_blocks(leaf, (8, 4)).to_dense() * factor).sum().backward()
    expected = BlockSparse.from_dense(factor, (4, 2), BlockSparse.to_dense(w)[::4, ::2] != 0)
    assert_exact("gradient", values.grad, expected.values)


def test_no_loop_over_blocks_and_one_wait():
    counts = []
    for size in (32, 64):
        w = BlockSparse.from_dense(torch.ones(size, size), (4, 4))
        counts.append(calls(lambda w=w: merge_blocks(w, (16, 8))))
    assert counts[0] == counts[1]
    assert sum(counts[0][name] for name in WAITS) == 1


@pytest.mark.parametrize(
    ("block", "options", "message"),
    [
        ((6, 4), {}, "hold whole blocks, got 6 rows of 4"),
        ((4, 3), {}, "hold whole blocks, got 3 columns of 4"),
        ((2, 4), {}, "got 2 rows of 4"),
        ((0, 4), {}, "got 0 rows"),
        ((32, 4), {}, "block sides must lie in 1 to 16"),
        ((4, 4), {"groups": 3}, "4 block rows cannot fall into 3 equal parts"),
        ((4, 4), {"taps": 0}, "4 block columns cannot fall into 0"),
        ((12, 4), {"groups": 2}, "must hold 24 rows in 2 parts, got 16"),
        ((8, 4), {"shape": (24, 16)}, "must hold 16 rows in 1 parts, got 24"),
        ((8, 4), {"shape": (16, 12)}, "must hold 16 columns in 1 parts, got 12"),
    ],
)
def test_blocks_that_cannot_be_merged_are_refused(block, options, message):
    w = BlockSparse.from_dense(torch.ones(16, 16), (4, 4))
    with pytest.raises(ValueError, match=message):
        merge_blocks(w, block, **options)
