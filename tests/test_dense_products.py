"""The dense linear layer in other words: the same numbers."""

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, assert_exact, assert_within_twice, integers, layouts
from sgtriton_kernels.dense_products import dense_linear


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("lead", [(), (0,), (1,), (2, 3), (128,), (129,)], ids=str)
@pytest.mark.usefixtures("threads")
def test_whole_numbers_are_exact(lead, dtype):
    wide = torch.promote_types(dtype, torch.float32)
    for n in (1, 6, 35):
        x, w = integers(*lead, 40, dtype=dtype), integers(n, 40, dtype=wide)
        for bias in (None, integers(n, dtype=dtype)):
            out = dense_linear(x, w, bias)
            assert (out.shape, out.dtype) == ((*lead, n), dtype)
            assert out.is_contiguous()
            expected = F.linear(x.double(), w.double(), None if bias is None else bias.double())
            assert_exact(f"{n} {bias is None}", out, expected)


@pytest.mark.parametrize("shape", [(1, 1), (1, 41), (3, 39), (2, 20), (4, 10, 8), ()], ids=str)
@pytest.mark.usefixtures("threads")
def test_input_of_another_width_is_refused(shape):
    """One number was taken for a whole row, and rows were cut anew."""
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., 40\] for a weight of shape"):
        dense_linear(torch.ones(shape), torch.ones(6, 40), None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 5, 200])
def test_error_is_within_twice_that_of_pytorch(m, dtype):
    x, w, bias = (torch.randn(*s).to(dtype) for s in ((m, 96), (64, 96), (64,)))
    out = dense_linear(x, w.float(), bias)
    ref64 = F.linear(x.double(), w.double(), bias.double())
    assert_within_twice("out", out, ref64, F.linear(x, w, bias))


def test_memory_layouts_do_not_matter():
    x, w, bias = integers(6, 40), integers(8, 40), integers(8)
    expected = F.linear(x, w, bias)
    for name, view in layouts(x).items():
        assert_exact(name, dense_linear(view, w, bias), expected)
        assert_exact(name, dense_linear(view[:1], w, bias), expected[:1])
    for name, view in layouts(w).items():
        assert_exact(f"w {name}", dense_linear(x, view, bias), expected)
        assert_exact(f"w {name}", dense_linear(x[:1], view, bias), expected[:1])


def test_input_and_bias_are_left_alone():
    x, w, bias = integers(1, 40), integers(8, 40), integers(8)
    kept = x.clone(), bias.clone()
    dense_linear(x, w, bias)
    assert_exact("x", x, kept[0])
    assert_exact("bias", bias, kept[1])


@pytest.mark.parametrize("shape", [(40,), (1, 40), (3, 40), (2, 3, 40)], ids=str)
@pytest.mark.parametrize("n", [1, 6])
@pytest.mark.usefixtures("threads")
def test_result_may_be_written_to_where_gradients_are_on(shape, n):
    """It was a view that was made under no_grad."""
    with torch.no_grad():
        out = dense_linear(torch.ones(shape), torch.ones(n, 40), None)
    out.add_(torch.ones(n, requires_grad=True))
    assert out.requires_grad


@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.usefixtures("threads")
def test_gradients_are_those_of_the_layer(m):
    x, w, bias = (integers(*s).requires_grad_() for s in ((m, 40), (6, 40), (6,)))
    grads = torch.autograd.grad(dense_linear(x, w, bias).square().sum(), (x, w, bias))
    expected = torch.autograd.grad(F.linear(x, w, bias).square().sum(), (x, w, bias))
    for name, grad, right in zip("xwb", grads, expected, strict=True):
        assert_exact(name, grad, right)
