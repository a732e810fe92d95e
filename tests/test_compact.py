"""Weights without dead rows and columns compute what the whole weight does."""

import itertools

import pytest
import torch
from helpers import DTYPES, assert_exact, integers
from torch import nn

from sgtriton.compact import compact
from sgtriton.sparse_layers import compacted_conv, compacted_linear

# which rows and columns are dead
DEAD = {
    "none": [],
    "some": [0, 3, 4],
    "the last": [-1],
    "all": list(range(6)),
    "all but one": [0, 1, 2, 4, 5],
}
CASES = list(itertools.product(DEAD, DEAD))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "cols"), CASES)
def test_linear(rows, cols, bias, dtype):
    weight = torch.randint(1, 3, (6, 6)).to(dtype)
    weight[DEAD[rows]] = 0
    weight[:, DEAD[cols]] = 0
    b = integers(6, dtype=dtype) if bias else None
    parts = compact(weight)
    for shape in [(6,), (0, 6), (5, 6), (2, 3, 6)]:
        x = integers(*shape, dtype=dtype)
        out = compacted_linear(x, b, *parts)
        assert out.dtype == dtype
        assert out.is_contiguous()
        assert_exact(str(shape), out, nn.functional.linear(x, weight, b))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "cols"), CASES)
@torch.no_grad()
def test_convolutions(rows, cols, bias):
    for make, shape in [
        (
            lambda: nn.Conv2d(6, 6, (3, 2), 2, 1, 2, bias=bias, padding_mode="circular"),
            (2, 6, 9, 8),
        ),
        (lambda: nn.Conv2d(6, 6, 3, padding="same", bias=bias), (6, 5, 7)),
        (lambda: nn.Conv1d(6, 6, 3, bias=bias), (2, 6, 9)),
        (lambda: nn.Conv1d(6, 6, 1, bias=bias), (6, 4)),
    ]:
        layer, x = make(), integers(*shape)
        layer.weight.copy_(torch.randint(1, 3, layer.weight.shape))
        layer.weight[DEAD[rows]] = 0
        layer.weight[:, DEAD[cols]] = 0
        if bias:
            layer.bias.copy_(integers(6))
        out = compacted_conv(layer, x, layer.bias, *compact(layer.weight))
        assert_exact(str(layer), out, layer(x))


def test_weights_that_are_left_are_the_smallest_matrix():
    weight = torch.ones(5, 4)
    weight[[1, 3]] = 0
    weight[:, 2] = 0
    small, cols, rows = compact(weight)
    assert small.shape == (4, 3)  # three rows and one of zeros
    assert cols.tolist() == [0, 1, 3]
    assert rows.tolist() == [0, 3, 1, 3, 2]
    assert compact(torch.ones(5, 4))[1:] == (None, None)


def test_row_of_nan_is_not_dead():
    weight = torch.zeros(3, 2)
    weight[1, 0] = float("nan")
    small, cols, rows = compact(weight)
    assert small.shape == (2, 1)
    assert small[0].isnan().all()
    assert cols.tolist() == [0]
    assert rows.tolist() == [1, 0, 1]


def test_gradients_reach_input_and_bias():
    weight = torch.randint(1, 3, (6, 6)).double()
    weight[[0, 4]] = 0
    weight[:, 2] = 0
    x, b, dy = integers(3, 6).double(), integers(6).double(), integers(3, 6).double()
    grads = []
    for call in (
        lambda x, b: compacted_linear(x, b, *compact(weight)),
        lambda x, b: nn.functional.linear(x, weight, b),
    ):
        leaves = [t.clone().requires_grad_() for t in (x, b)]
        grads.append(torch.autograd.grad(call(*leaves), leaves, dy))
    for name, ours, theirs in zip(("dx", "dbias"), *grads, strict=True):
        assert_exact(name, ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_its_dtype(dtype):
    weight, x, b = torch.randint(1, 3, (6, 6)).float(), integers(3, 6), integers(6)
    weight[0] = 0
    with torch.autocast("cpu", dtype):
        out = compacted_linear(x, b, *compact(weight))
        expected = nn.functional.linear(x, weight, b)
    assert out.dtype == dtype
    assert_exact("out", out, expected)
