"""Named candidates: each computes the product wherever it is offered."""

import dataclasses
import itertools

import pytest
import torch
from helpers import assert_exact, integers, poisoned
from sgtriton_kernels import BlockSparse, bsr_linear
from sgtriton_kernels._triton import INTERPRETED
from sgtriton_kernels.bsr_choice import cell_of
from sgtriton_kernels.bsr_linear_passes import linear_dvalues, linear_dx
from sgtriton_kernels.candidate import cut
from sgtriton_kernels.candidates import candidates, named
from sgtriton_kernels.cell import OPS, Cell
from sgtriton_kernels.lookup import full_key, tell

CELL = Cell("bsr_linear fwd", "triton", 64, 4096, 4096, (64, 64), 400, torch.bfloat16)


def matrix(open, side, device):
    dense = integers(open.shape[0] * side, open.shape[1] * side, device=device)
    mask = open.repeat_interleave(side, 0).repeat_interleave(side, 1).to(device)
    return BlockSparse.from_dense(dense.where(mask, 0), (side, side), open=open), dense * mask


@pytest.mark.native
@pytest.mark.parametrize("m", [1, 3, 40])
@pytest.mark.parametrize("side", [16, 64])
def test_every_candidate_gives_the_product(m, side, impl, device):
    # a full block row, an empty one, and one between
    open = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1]]).bool()
    w, dense = matrix(open, side, device)
    x, bias = poisoned(integers(m, 4 * side, device=device)), integers(3 * side, device=device)
    found = candidates(cell_of("fwd", w, impl, x), copy_engine=not INTERPRETED)
    assert len(found) > 2
    for candidate in found:
        out = bsr_linear(x, w, bias, impl=impl, tile=candidate.name)
        assert_exact(candidate.name, out, x @ dense.T + bias)


@pytest.mark.native
@pytest.mark.parametrize("m", [2, 70])
def test_every_candidate_of_backward_gives_the_gradient(m, device, impl):
    if impl == "torch":
        pytest.skip("has one way for each gradient")
    w, dense = matrix(torch.rand(3, 4) < 0.6, 32, device)
    x, dy = integers(m, 128, device=device), integers(m, 96, device=device)
    for candidate in candidates(cell_of("dx", w, impl, dy)):
        assert_exact(candidate.name, linear_dx(dy, w.values, w, candidate), dy @ dense)
    whole = (dy.T @ x).view(3, 32, 4, 32).transpose(1, 2)
    expected = whole[w.block_row.long(), w.col[: w.nnz].long()]
    for candidate in candidates(cell_of("dvalues", w, impl, dy, x)):
        assert_exact(candidate.name, linear_dvalues(dy, x, w.values, w, candidate), expected)


def test_library_may_compute_every_gradient(device, cache):
    """That of the values had no dense candidate: where few blocks are closed it lost to dense."""
    w, dense = matrix(torch.tensor([[1, 0, 1], [1, 1, 0]]).bool(), 16, device)
    x, dy = integers(5, 48, device=device), integers(5, 32, device=device)
    for which, rows in (("dx", (dy,)), ("dvalues", (dy, x))):
        tell(full_key(cell_of(which, w, "triton", *rows), device), "unpack")
    x.requires_grad_()
    values = w.values.requires_grad_()
    y = bsr_linear(x, w, impl="triton")
    with torch.autograd.profiler.profile() as profile:
        dx, dvalues = torch.autograd.grad(y, (x, values), dy)
    asked = [event.name for event in profile.function_events or ()]
    assert_exact("dx", dx, dy @ dense)
    whole = (dy.T @ x.detach()).view(2, 16, 3, 16).transpose(1, 2)
    assert_exact("dvalues", dvalues, whole[w.block_row.long(), w.col[: w.nnz].long()])
    assert asked.count("aten::mm") == 2


@pytest.mark.parametrize("activation", [None, "relu"])
def test_filling_the_zeros_in_adds_what_the_op_adds(activation, impl, device):
    w, dense = matrix(torch.rand(3, 4) < 0.6, 16, device)
    x, bias, residual = (integers(*s, device=device) for s in ((2, 5, 64), (48,), (2, 5, 48)))
    out = bsr_linear(x, w, bias, activation, residual=residual, impl=impl, tile="unpack")
    expected = x @ dense.T + bias + residual
    assert_exact("out", out, expected if activation is None else expected.relu())
    assert out.is_contiguous()


def test_names_are_the_only_thing_that_is_looked_up():
    for op, impl, native in itertools.product(OPS, ("triton", "torch"), (False, True)):
        for name, candidate in named(op, impl, native).items():
            assert name == candidate.name
            assert candidate.tile is None or candidate.tile.name == name


def test_only_what_serves_is_offered_and_no_tile_twice():
    for block, m, aligned in itertools.product(
        ((16, 16), (64, 64), (128, 32)), (1, 16, 4096), (True, False)
    ):
        for op, engine in itertools.product(OPS, (True, False)):
            cell = dataclasses.replace(CELL, op=op, block=block, M=m, aligned=aligned)
            found = candidates(cell, engine)
            launched = [cut(c.tile, cell) for c in found if c.tile is not None]
            assert len(set(launched)) == len(launched) > 0
            assert {c.name for c in found} <= set(named(op, "triton", False))
            bulk = [tile for tile in launched if tile.bulk]
            assert not bulk or (engine and aligned)
            assert all(m <= 8 for tile in launched if tile.form == "vector")
            assert "unpack" in [c.name for c in found]


def test_library_is_offered_where_it_serves():
    torch_cell = dataclasses.replace(CELL, impl="torch", dtype=torch.float32)
    has = torch.backends.mkl.is_available()
    for changes, serves in (
        ({}, has), ({"dtype": torch.bfloat16}, False), ({"block": (64, 32)}, False),
        ({"N": 4095}, False), ({"block": (1, 1)}, False), ({"dtype": torch.float64}, has),
    ):  # fmt: skip
        found = candidates(dataclasses.replace(torch_cell, **changes))
        assert ("library" in [c.name for c in found]) == serves, changes


def test_ways_that_would_be_the_same_are_one():
    small = dataclasses.replace(CELL, impl="torch", M=2, nnz=4)
    names = [c.name for c in candidates(small)]
    assert [name for name in names if name.startswith(("batches", "layers"))] == [
        "batches", "layers",
    ]  # fmt: skip
    large = dataclasses.replace(small, M=512, nnz=2000)
    names = [c.name for c in candidates(large)]
    assert {"batches_256k", "batches_4m", "layers_256k", "layers_4m"} <= set(names)


@pytest.mark.parametrize("name", ["dense ", "x_left", "", "unpack2"])
def test_name_of_no_candidate_is_refused(name, impl, device):
    w, _ = matrix(torch.ones(2, 2, dtype=torch.bool), 16, device)
    with pytest.raises(ValueError, match=r"tile must be a BsrTile or one of .*unpack; got"):
        bsr_linear(torch.ones(2, 32, device=device), w, impl=impl, tile=name)


def test_library_is_refused_where_it_cannot_serve():
    w, _ = matrix(torch.ones(2, 2, dtype=torch.bool), 16, "cpu")
    x = torch.ones(2, 32, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"'library' takes square blocks .*bfloat16"):
        bsr_linear(x, w.to(torch.bfloat16), impl="torch", tile="library")
