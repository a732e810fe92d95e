"""The block-sparse container: what it refuses, and that patterns of every kind come back."""

import copy
import dataclasses
import itertools
import os
import pickle
import random
import subprocess
import sys

import pytest
import torch
from helpers import DTYPES, assert_exact
from sgtriton_kernels.bsr import BlockSparse, validate_index


def patterns(rows: int, cols: int) -> dict[str, torch.Tensor]:
    """Topologies worth a look, as bool ``[rows, cols]``."""
    r, c = torch.arange(rows)[:, None], torch.arange(cols)
    scattered = torch.rand(rows, cols) < 0.4
    return {
        "random": scattered,
        "empty_row": scattered & (r != rows // 2),
        "full_row": scattered | (r == rows - 1),
        "one_column": (c == cols - 1).expand(rows, cols),
        "none": torch.zeros(rows, cols, dtype=torch.bool),
        "all": torch.ones(rows, cols, dtype=torch.bool),
        "block_diagonal": r * cols // rows == c,
        "banded": (r * cols // rows - c).abs() <= 1,
    }


def masked(weight: torch.Tensor, open: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """The dense weight with closed blocks at 0."""
    wide = open.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return torch.where(wide[: weight.shape[0], : weight.shape[1]], weight, 0)


def slow_verdict(crow, col, nnz, rows, cols) -> bool:
    """Whether an index is sound, one element at a time."""
    if len(crow) != rows + 1 or len(col) != nnz or crow[0] != 0 or crow[-1] != nnz:
        return False
    if any(not 0 <= b - a <= cols for a, b in itertools.pairwise(crow)):
        return False
    for a, b in itertools.pairwise(crow):
        seen = col[a:b]
        if any(not 0 <= c < cols for c in seen) or sorted(set(seen)) != seen:
            return False
    return True


def fuzz_validator(cases: int) -> None:
    """Compare the validator with :func:`slow_verdict` on sound and damaged indices."""
    rng = random.Random(0)
    verdicts = {True: 0, False: 0}
    for case in range(cases):
        rows, cols = rng.randint(1, 5), rng.randint(1, 5)
        per_row = [sorted(rng.sample(range(cols), rng.randint(0, cols))) for _ in range(rows)]
        col = [c for row in per_row for c in row]
        crow = [0]
        for row in per_row:
            crow.append(crow[-1] + len(row))
        nnz = len(col)
        dtype = rng.choice([torch.int32, torch.int64])
        top = torch.iinfo(dtype).max
        for _ in range(rng.randint(0, 3)):
            target = rng.choice([crow, col])
            what = rng.randint(0, 4)
            if what == 0 and target:
                target[rng.randrange(len(target))] += rng.choice([-1, 1])
            elif what == 1 and target:
                wild = [-1, 0, 1, cols, nnz, 999, top, -top - 1]
                target[rng.randrange(len(target))] = rng.choice(wild)
            elif what == 2 and target:
                target.pop()
            elif what == 3:
                target.append(rng.choice([0, nnz, cols]))
            elif what == 4 and len(target) > 1:
                i, j = rng.randrange(len(target)), rng.randrange(len(target))
                target[i], target[j] = target[j], target[i]
        crow = [min(max(v, -top - 1), top) for v in crow]
        col = [min(max(v, -top - 1), top) for v in col]
        expected = slow_verdict(crow, col, nnz, rows, cols)
        verdicts[expected] += 1
        try:
            validate_index(
                torch.tensor(crow, dtype=dtype), torch.tensor(col, dtype=dtype),
                nnz=nnz, block_rows=rows, block_cols=cols,
            )  # fmt: skip
            found = True
        except ValueError:
            found = False
        assert found == expected, f"case {case}: {crow} {col}, nnz {nnz}, {rows} x {cols}"
    assert min(verdicts.values()) > cases // 10, verdicts


def test_validator_agrees_with_a_slow_one_and_never_crashes():
    child = subprocess.run(
        [sys.executable, "-c", "import test_bsr; test_bsr.fuzz_validator(3000)"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr


BAD_INDICES = [
    ([5, 0, -1], [], "start with 0, got 5"),
    ([0, 2, 1], [0], r"rise by 0 to 2 .* got 2 then 1 at block row 1"),
    ([0, 1, 3], [0, 1], "end with the number of blocks, 2, got 3"),
    ([0, 2, 0], [], r"got 2 then 0 at block row 1"),
    ([0, 3, 3], [0, 1, 1], r"rise by 0 to 2 .* got 0 then 3 at block row 0"),
    ([0, 1, 2], [0, 999], r"lie in \[0, 2\), got 999 at block 1"),
    ([0, 1, 2], [-1, 0], "got -1 at block 0"),
    ([0, 1, 2], [2**31 - 1, 0], "got 2147483647 at block 0"),
    ([0, 2, 2], [1, 1], "rise strictly within a block row, got 1 then 1"),
    ([0, 2, 2], [1, 0], "got 1 then 0 at blocks 0 and 1"),
    ([0, 1], [0], "crow must have block rows .* = 3 entries, got 2"),
    ([], [], "crow must have block rows .* = 3 entries, got 0"),
]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(("crow", "col", "message"), BAD_INDICES, ids=str)
def test_indices_that_point_outside_are_refused(crow, col, message, dtype):
    values = torch.ones(len(col), 2, 2)
    crow, col = torch.tensor(crow, dtype=dtype), torch.tensor(col, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        BlockSparse.from_parts(values, crow, col, (4, 4))
    with pytest.raises(ValueError, match=message):
        BlockSparse(values, crow, torch.nn.functional.pad(col, (0, 1)), (4, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.ones(2, 2, 2, dtype=torch.int32)}, "values must be .* floating-point"),
        ({"values": torch.ones(2, 4)}, r"values must be .*\(2, 4\)"),
        ({"values": torch.ones(1, 2, 2)}, "col must have nnz . 1 = 2 entries, got 3"),
        ({"values": torch.ones(2, 5, 2)}, r"block sides .* got \(5, 2\)"),
        ({"values": torch.ones(2, 0, 2)}, r"block sides .* got \(0, 2\)"),
        ({"values": torch.ones(2, 2, 2, device="meta")}, "values and crow must be on one device"),
        ({"crow": torch.tensor([0.0, 1, 2])}, r"crow must be .* torch\.float32"),
        ({"crow": torch.tensor([[0, 1, 2]])}, r"crow must be a 1-d .*\(1, 3\)"),
        ({"col": torch.tensor([0, 1, 0], dtype=torch.int16)}, r"col must be .* torch\.int16"),
        ({"col": torch.tensor([0, 1])}, "col must have nnz . 1 = 3 entries, got 2"),
        ({"col": torch.tensor([0, 1, 7])}, "last entry of col must be 0, got 7"),
        ({"shape": (4,)}, r"shape must be two ints, got \(4,\)"),
        ({"shape": (4, 0)}, r"shape must be at least \(1, 1\), got \(4, 0\)"),
        ({"shape": (4, True)}, "shape must be two ints"),
        ({"shape": (8, 4)}, "crow must have block rows .* = 5 entries, got 3"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_parts_that_do_not_fit_are_refused(change, message):
    parts = {
        "values": torch.ones(2, 2, 2), "crow": torch.tensor([0, 1, 2]),
        "col": torch.tensor([0, 1, 0]), "shape": (4, 4),
    }  # fmt: skip
    BlockSparse(**parts)
    with pytest.raises(ValueError, match=message):
        BlockSparse(**parts | change)


def test_derived_parts_are_not_accepted():
    w = BlockSparse.from_dense(torch.ones(4, 4), (2, 2))
    with pytest.raises(TypeError):
        BlockSparse(w.values, w.crow, w.col, w.shape, ccol=w.ccol)  # pyright: ignore
    with pytest.raises(dataclasses.FrozenInstanceError):
        w.crow = w.ccol  # pyright: ignore


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((64, 96), (32, 32)), ((70, 100), (32, 32)), ((33, 31), (16, 31)), ((5, 7), (1, 1)),
        ((5, 7), (5, 1)), ((5, 7), (1, 7)), ((5, 7), (2, 3)), ((1, 1), (1, 1)),
    ],
    ids=str,
)  # fmt: skip
def test_dense_weights_come_back(shape, block, dtype):
    weight = torch.randn(shape).to(dtype)
    rows, cols = -(-shape[0] // block[0]), -(-shape[1] // block[1])
    for name, open in patterns(rows, cols).items():
        w = BlockSparse.from_dense(weight, block, open)
        expected = masked(weight, open, block)
        assert_exact(name, w.to_dense(), expected)
        assert w.values.dtype == dtype
        assert w.block == block
        assert w.nnz == int(open.sum())
        assert w.values.is_contiguous()
        covered = masked(torch.ones(shape, dtype=torch.float64), open, block).mean().item()
        assert w.density == pytest.approx(covered, abs=1e-12), name
        # the default stores what is not all zero
        found = BlockSparse.from_dense(expected, block)
        assert torch.equal(found.crow, w.crow)
        assert torch.equal(found.col, w.col)
        again = BlockSparse.from_parts(w.values, w.crow, w.col[: w.nnz], list(shape))
        assert_exact(name, again.to_dense(), expected)


def test_transposed_index_and_row_order_are_right():
    for name, open in patterns(5, 7).items():
        w = BlockSparse.from_dense(torch.randn(20, 14), (4, 2), open)
        row, col = open.nonzero(as_tuple=True)
        order = sorted(range(w.nnz), key=lambda i: (int(col[i]), int(row[i])))
        assert w.perm.tolist() == order, name
        assert w.row.tolist() == [*row[order].tolist(), 0], name
        assert w.ccol.tolist() == [0, *open.sum(0).cumsum(0).tolist()], name
        lengths = open.sum(1).tolist()
        assert w.row_order.tolist() == sorted(range(5), key=lambda r: -lengths[r]), name
        for t in (w.crow, w.col, w.ccol, w.row, w.perm, w.row_order):
            assert t.dtype == torch.int32


def test_values_beyond_a_ragged_edge_are_never_used():
    values = torch.full((1, 4, 4), float("nan"))
    values[0, :3, :2] = 1
    w = BlockSparse.from_parts(values, torch.tensor([0, 1]), torch.tensor([0]), (4, 4))
    assert w.density == 1
    w = BlockSparse._from_validated(
        values, w.crow, w.col, (3, 2), w.ccol, w.row, w.perm, w.row_order
    )
    assert_exact("cut", w.to_dense(), torch.ones(3, 2))


def test_indices_are_copied_and_values_are_not():
    values = torch.ones(2, 2, 2)
    crow = torch.tensor([0, 1, 2], dtype=torch.int32)
    col = torch.tensor([0, 1, 0], dtype=torch.int32)
    w = BlockSparse(values, crow, col, (4, 4))
    crow.fill_(999)
    col.fill_(999)
    assert w.crow.tolist() == [0, 1, 2]
    assert w.col.tolist() == [0, 1, 0]
    assert w.values.data_ptr() == values.data_ptr()


def test_copies_and_pickles_pass_the_checks_again():
    w = BlockSparse.from_dense(torch.randn(6, 6), (2, 3))
    for again in (copy.deepcopy(w), pickle.loads(pickle.dumps(w))):
        assert_exact("again", again.to_dense(), w.to_dense())
        assert again.values.data_ptr() != w.values.data_ptr()
    w.col[0] = 999
    with pytest.raises(ValueError, match="got 999"):
        copy.deepcopy(w)
    data = pickle.dumps(w)
    with pytest.raises(ValueError, match="got 999"):
        pickle.loads(data)


def test_layers_can_wrap_buffers_they_hold():
    w = BlockSparse.from_dense(torch.randn(6, 6), (2, 3))
    parts = [getattr(w, f.name) for f in dataclasses.fields(w)]
    again = BlockSparse._from_validated(*parts)
    assert all(getattr(again, f.name) is getattr(w, f.name) for f in dataclasses.fields(w))
    assert_exact("again", again.to_dense(), w.to_dense())


def test_to_moves_and_casts():
    w = BlockSparse.from_dense(torch.randn(5, 6), (2, 3))
    half = w.to(dtype=torch.float16)
    assert half.values.dtype == torch.float16
    assert half.col.dtype == torch.int32
    assert_exact("half", half.to_dense(), w.to_dense().half())
    assert w.to("meta").row_order.device.type == "meta"
    with pytest.raises(ValueError, match=r"dtype must be floating point, got torch\.int8"):
        w.to(dtype=torch.int8)


def test_nbytes_counts_what_a_file_holds():
    w = BlockSparse.from_dense(torch.ones(4, 4, dtype=torch.float16), (2, 2))
    assert w.nbytes == 16 * 2 + 3 * 4 + 4 * 4


@pytest.mark.parametrize(
    ("weight", "block", "open", "message"),
    [
        (torch.ones(4), (2, 2), None, r"weight must be .* \(4,\)"),
        (torch.ones(4, 4, dtype=torch.int64), (2, 2), None, r"weight must be .* torch\.int64"),
        (torch.ones(4, 4), (5, 2), None, r"block sides must lie in 1 to 4 .* got \(5, 2\)"),
        (torch.ones(4, 4), (2, 0), None, r"block sides .* got \(2, 0\)"),
        (torch.ones(4, 4), (2.0, 2), None, "block must be two ints"),
        (torch.ones(4, 4), (2, 2), torch.ones(2, 3, dtype=torch.bool), r"open must be bool"),
        (torch.ones(4, 4), (2, 2), torch.ones(2, 2), r"open must be bool .* torch\.float32"),
    ],
)
def test_from_dense_refuses(weight, block, open, message):
    with pytest.raises(ValueError, match=message):
        BlockSparse.from_dense(weight, block, open)


def test_nan_blocks_are_kept_and_gradients_flow_through_to_dense():
    weight = torch.zeros(4, 4)
    weight[3, 3] = float("nan")
    assert BlockSparse.from_dense(weight, (2, 2)).col.tolist() == [1, 0]
    w = BlockSparse.from_dense(torch.randn(5, 5, requires_grad=True), (2, 2))
    assert not w.values.requires_grad
    w.values.requires_grad_()
    w.to_dense().sum().backward()
    assert w.values.grad is not None
    assert w.values.grad.sum() == 25


def test_dtype_alone_is_taken_as_tensors_take_it():
    w = BlockSparse.from_dense(torch.eye(8), (2, 2))
    assert w.to(torch.bfloat16).values.dtype == torch.bfloat16
    assert w.to("cpu", torch.float64).values.dtype == torch.float64


def test_what_is_no_dense_matrix_or_no_block_is_refused_with_a_clear_error():
    weight = torch.eye(8)
    with pytest.raises(ValueError, match="block must be two ints, got 2"):
        BlockSparse.from_dense(weight, 2)
    with pytest.raises(ValueError, match=r"dense .*weight_to_matrix .* got torch\.sparse_coo"):
        BlockSparse.from_dense(weight.to_sparse(), (2, 2))
    with pytest.raises(ValueError, match=r"weight_to_matrix .* \(4, 4, 3, 3\)"):
        BlockSparse.from_dense(torch.ones(4, 4, 3, 3), (2, 2))
