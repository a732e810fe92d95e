"""Products with blocks in library calls: each way gives the same, for every pattern and size."""

import pytest
import torch
from helpers import assert_exact, integers, poisoned
from sgtriton_kernels import block_products
from sgtriton_kernels.block_products import BlockIndex, multiply, multiply_bwd
from test_bsr import patterns

WAYS = [*block_products._WAYS]
# rows and columns of the grid, sides of a block, what the last row and column lack
GRIDS = [((5, 4), (16, 16), (0, 0)), ((5, 4), (8, 24), (3, 5)), ((1, 6), (4, 4), (1, 0)),
         ((6, 1), (16, 3), (0, 2)), ((1, 1), (1, 1), (0, 0))]  # fmt: skip


def place(is_open, o, i):
    """Blocks of whole numbers, and the dense matrix ``[rows * o, columns * i]`` that they make."""
    rows, columns = is_open.nonzero().unbind(1)
    index = BlockIndex(rows, columns, tuple(is_open.shape))
    values = integers(len(rows), o, i)
    dense = torch.zeros(is_open.shape[0], o, is_open.shape[1], i)
    dense[rows, :, columns] = values
    return index, values, dense.view(is_open.shape[0] * o, -1)


def cases():
    for grid, (o, i), (less_o, less_i) in GRIDS:
        for name, is_open in patterns(*grid).items():
            is_open = torch.ones(grid, dtype=torch.bool) if is_open is None else is_open
            index, values, dense = place(is_open, o, i)
            values, size, k = values.clone(), grid[0] * o - less_o, grid[1] * i - less_i
            dense = dense[:size, :k]
            yield f"{name} {grid} {o}x{i}", index, values, dense


@pytest.fixture(params=["as they are", "small"])
def limits(request, monkeypatch):
    """Bands, batches and gathered elements so small that there are several of each."""
    if request.param == "small":
        for name in ("ELEMENTS", "_GATHERED"):
            monkeypatch.setattr(block_products, name, 64)
        monkeypatch.setattr(block_products, "_BAND", 4)


@pytest.mark.parametrize("way", [None, *WAYS])
@pytest.mark.parametrize("m", [0, 1, 7])
@pytest.mark.usefixtures("limits")
def test_every_way_gives_the_same(m, way):
    for name, index, values, dense in cases():
        x = poisoned(integers(m, dense.shape[1]))
        bias = integers(len(dense))
        for added in (None, bias):
            out = multiply(x, values.transpose(1, 2), index, len(dense), added, way)
            assert out.is_contiguous()
            expected = x @ dense.T if added is None else x @ dense.T + added
            assert_exact(f"{name} {way}", out, expected)


@pytest.mark.parametrize("way", [None, *WAYS])
def test_weights_may_lie_either_way(way):
    index, values, dense = place(torch.rand(6, 5) < 0.5, 8, 8)
    x = integers(9, 40)
    for weights in (values.transpose(1, 2), values.transpose(1, 2).contiguous()):
        assert_exact(f"{way}", multiply(x, weights, index, 48, None, way), x @ dense.T)


@pytest.mark.parametrize("way", [None, *WAYS])
def test_double_precision_stays(way):
    index, values, dense = place(torch.rand(6, 5) < 0.5, 8, 8)
    x, values = torch.randn(9, 40).double(), values.double() + 1e-12
    dense = torch.where(dense == 0, 0, dense.double() + 1e-12)
    # zeros of the whole numbers are stored too
    rows, columns = index.rows, index.columns
    dense.view(6, 8, 5, 8)[rows, :, columns] = values
    out = multiply(x, values.transpose(1, 2), index, 48, None, way)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, x @ dense.T, rtol=1e-13, atol=1e-12)


def test_each_way_is_taken_somewhere(monkeypatch):
    """Sizes at which the lookup takes each of them; the constants behind it were measured."""
    taken = set()
    for name, function in block_products._WAYS.items():
        monkeypatch.setitem(
            block_products._WAYS, name,
            lambda *a, name=name, function=function: taken.add(name) or function(*a),
        )  # fmt: skip
    for grid, side, share, m in (
        ((9, 300), 16, 0.5, 64), ((32, 9), 32, 0.5, 256), ((9, 9), 64, 0.3, 512),
        ((2, 16), 16, 0.5, 16), ((16, 2), 16, 0.5, 16), ((20, 20), 4, 0.5, 32),
    ):  # fmt: skip
        index, values, dense = place(torch.rand(grid) < share, side, side)
        x = integers(m, dense.shape[1])
        out = multiply(x, values.transpose(1, 2), index, len(dense))
        assert_exact(f"{grid} {side} {m}", out, x @ dense.T)
    assert taken == set(block_products._WAYS)


@pytest.mark.parametrize("m", [0, 1, 9])
@pytest.mark.usefixtures("limits")
def test_gradients(m):
    for name, index, values, dense in cases():
        size, k = dense.shape
        _, o, i = values.shape
        dy, x = poisoned(integers(m, size)), poisoned(integers(m, k))
        dx, d = multiply_bwd(dy, x, values.transpose(1, 2), index, (i, o), k)
        assert_exact(f"{name} dx", dx, dy @ dense)
        rows, columns = index.grid
        whole = torch.zeros(rows * o, columns * i)
        whole[:size, :k] = dy.T @ x
        assert_exact(name, d, whole.view(rows, o, columns, i)[index.rows, :, index.columns])
        assert multiply_bwd(dy, None, values.transpose(1, 2), index, (i, o), k)[1] is None
        assert multiply_bwd(dy, x, None, index, (i, o), k)[0] is None


def test_index_that_was_used_for_one_size_serves_another():
    index, values, dense = place(torch.rand(20, 20) < 0.3, 16, 16)
    for m in (1, 2, 64, 1, 600, 2):
        x = integers(m, 320)
        assert_exact(f"{m}", multiply(x, values.transpose(1, 2), index, 320), x @ dense.T)
