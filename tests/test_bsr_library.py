"""One row of x: the library's matrix is taken where it serves, and follows the values."""

import weakref

import pytest
import torch
from helpers import assert_exact, integers, poisoned
from sgtriton_kernels import BlockSparse, bsr_library, bsr_linear, bsr_torch
from sgtriton_kernels.bsr_library import library_matrix
from test_bsr import patterns

pytestmark = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="needs MKL")


def place(open, side, k_side=None):
    """Whole numbers in the open blocks: the container and its dense matrix."""
    k_side = k_side or side
    dense = integers(open.shape[0] * side, open.shape[1] * k_side)
    mask = open.repeat_interleave(side, 0).repeat_interleave(k_side, 1)
    dense = dense.where(mask, 0)
    return BlockSparse.from_dense(dense, (side, k_side), open=open), dense


@pytest.fixture
def taken(monkeypatch):
    """Collects a 1 for each product that the library's matrix computed."""
    calls, real = [], bsr_library.library_product
    monkeypatch.setattr(bsr_torch, "library_product", lambda *a: calls.append(1) or real(*a))
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("side", [2, 16, 32])
def test_every_pattern_is_served(side, dtype, taken):
    for name, open in patterns(12, 11).items():
        open = torch.ones(12, 11, dtype=torch.bool) if open is None else open
        w, dense = place(open, side)
        w, dense = w.to(dtype=dtype), dense.to(dtype)
        x, bias = poisoned(integers(1, 11 * side).to(dtype)), integers(12 * side).to(dtype)
        for added in (None, bias):
            before = len(taken)
            out = bsr_linear(x, w, added, impl="torch")
            assert_exact(name, out, x @ dense.T + (0 if added is None else added))
            assert out.is_contiguous()
            assert len(taken) == before + (w.nnz > 0)


def test_other_sizes_and_layouts_are_computed_otherwise(taken):
    open = torch.rand(12, 11, generator=torch.Generator().manual_seed(0)) < 0.4
    for w, dense in (place(open, 16, 8), place(~open, 64), place(open, 65), place(open, 1)):
        x = integers(1, dense.shape[1])
        assert_exact("out", bsr_linear(x, w, impl="torch"), x @ dense.T)
    w, dense = place(open, 16)
    ragged = BlockSparse(w.values, w.crow, w.col, (190, 170))
    x = integers(1, 176)
    assert_exact("ragged", bsr_linear(x[:, :170], ragged), x[:, :170] @ dense[:190, :170].T)
    assert_exact("nine rows", bsr_linear(x.expand(9, -1), w), (x @ dense.T).expand(9, -1))
    half = bsr_linear(x.half() / 64, w.to(dtype=torch.float16), impl="torch")
    torch.testing.assert_close(half.float(), x @ dense.T / 64, rtol=1e-3, atol=1e-3)
    assert not taken


@pytest.mark.parametrize("m", [0, 1, 5])
def test_more_rows_are_served_where_asked_for(m, taken):
    w, dense = place(torch.rand(12, 11) < 0.4, 16)
    x, bias = poisoned(integers(m, 176)), integers(192)
    for added in (None, bias):
        out = bsr_linear(x, w, added, impl="torch", tile="library")
        assert_exact(f"{m}", out, x @ dense.T + (0 if added is None else added))
        assert out.is_contiguous()
        assert not out._is_view()
    assert len(taken) == 2


def test_values_that_change_are_followed():
    """The library's matrix is kept with the index: it must never be that of other values."""
    w, dense = place(torch.rand(12, 11) < 0.4, 16)
    x = integers(1, 176)
    bsr_linear(x, w)
    w.values.mul_(2)
    assert_exact("in place", bsr_linear(x, w), 2 * (x @ dense.T))
    w.values.data = w.values * 2
    assert_exact("other memory", bsr_linear(x, w), 4 * (x @ dense.T))
    half = w.values.clone() / 4
    first, again = (library_matrix(v, w.index, w.shape) for v in (w.values, half))
    assert again is not first
    assert_exact("other values", torch.mm(again, x.T).T, x @ dense.T)


def test_graph_behind_values_is_not_kept_with_the_index():
    w, _ = place(torch.rand(12, 11) < 0.4, 16)
    values = w.values.clone().requires_grad_() * 1.0
    graph = weakref.ref(values)
    library_matrix(values, w.index, w.shape)
    del values
    assert graph() is None


def test_matrix_made_under_inference_mode_serves_training():
    w, dense = place(torch.rand(12, 11) < 0.4, 16)
    x = integers(1, 176)
    with torch.inference_mode():
        bsr_linear(x, w)
    x.requires_grad_()
    out = bsr_linear(x, w)
    out.backward(torch.ones_like(out))
    assert_exact("dx", x.grad, dense.sum(0, keepdim=True))


@pytest.mark.parametrize("side", [16, 64])
@pytest.mark.parametrize("bias", [False, True])
def test_result_of_one_row_may_be_written_to_in_place(side, bias):
    """It was a view, to which autograd forbids to write: `out.relu_()` raised."""
    w, dense = place(torch.rand(12, 11) < 0.4, side)
    x = integers(1, 11 * side).requires_grad_()
    out = bsr_linear(x, w, integers(12 * side) if bias else None, impl="torch")
    assert not out._is_view()
    out.mul_(2).sum().backward()
    assert_exact("dx", x.grad, 2 * dense.sum(0, keepdim=True))


def test_no_warning_of_the_library_reaches_the_user(recwarn):
    w, _ = place(torch.rand(12, 11) < 0.4, 16)
    bsr_linear(integers(1, 176), w)
    assert not recwarn.list
