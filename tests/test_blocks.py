import itertools
import math

import pytest
import torch
from helpers import assert_exact
from sgtriton_kernels import coverage, expand_gates, gate_layout, sum_blocks
from sgtriton_kernels.blocks import check_block

# weight shape, block, groups -> gate shape, block cut to the layer
LAYOUTS = [
    ((8, 16), (1, 1), 1, (8, 16), (1, 1)),
    ((8, 16), (4, 8), 1, (2, 2), (4, 8)),
    ((37, 53), (32, 32), 1, (2, 2), (32, 32)),
    ((5, 70), (1, None), 1, (5, 1), (1, 70)),
    ((5, 70), (None, 1), 1, (1, 70), (5, 1)),
    ((5, 70), (None, None), 1, (1, 1), (5, 70)),
    ((3, 4), (32, 64), 1, (1, 1), (3, 4)),
    ((1, 1), (2, 2), 1, (1, 1), (1, 1)),
    ((0, 16), (4, 4), 1, (0, 4), (1, 4)),
    ((16, 0), (4, 4), 1, (4, 0), (4, 1)),
    ((6, 4, 3, 2), (1, 1), 1, (6, 4, 3, 2), (1, 1)),
    ((6, 4, 3, 2), (4, 3), 1, (2, 2, 3, 2), (4, 3)),
    ((6, 5, 3, 3), (2, 2), 2, (4, 3, 3, 3), (2, 2)),
    ((6, 1, 3, 3), (4, 4), 6, (6, 1, 3, 3), (1, 1)),
    ((6, 4, 3, 2), (1, None), 1, (6, 1, 1, 1), (1, 4)),
    ((6, 4, 3, 2), (None, 1), 2, (2, 4, 1, 1), (3, 1)),
    ((6, 4, 3, 2), (None, None), 3, (3, 1, 1, 1), (2, 4)),
    ((10, 6, 5), (4, 4), 1, (3, 2, 5), (4, 4)),
    ((10, 6, 5), (4, 4), 2, (4, 2, 5), (4, 4)),
    ((4, 4, 1, 1), (2, None), 1, (2, 1, 1, 1), (2, 4)),
]
CASES = [case[:3] for case in LAYOUTS]


@pytest.mark.parametrize(("shape", "block", "groups", "gate_shape", "cut"), LAYOUTS)
def test_gate_layout_has_the_documented_shape(shape, block, groups, gate_shape, cut):
    layout = gate_layout(shape, block, groups)
    assert layout.gate_shape == gate_shape
    assert layout.block == cut
    assert layout.weight_shape == shape
    assert layout.taps == math.prod(shape[2:])
    assert layout.gate_taps in (1, layout.taps)
    assert layout.per_weight == (gate_shape == shape)


@pytest.mark.parametrize(("shape", "block", "groups"), CASES)
def test_coverage_sums_to_the_number_of_weights(shape, block, groups):
    layout = gate_layout(shape, block, groups)
    covered = coverage(layout)
    assert covered.shape == layout.gate_shape
    assert covered.dtype == torch.float32
    assert covered.sum().item() == math.prod(shape)
    assert (covered > 0).all()


@pytest.mark.parametrize(("shape", "block", "groups"), CASES)
def test_coverage_counts_what_expand_gates_reaches(shape, block, groups):
    layout = gate_layout(shape, block, groups)
    ids = torch.arange(math.prod(layout.gate_shape)).reshape(layout.gate_shape)
    reached = expand_gates(ids, layout)
    assert reached.shape == shape
    counts = torch.bincount(reached.reshape(-1), minlength=ids.numel())
    assert_exact("coverage", coverage(layout).reshape(-1), counts)


@pytest.mark.parametrize(("shape", "block", "groups"), CASES)
def test_each_weight_has_the_gate_of_its_block(shape, block, groups):
    """Element by element, from the definition: blocks restart at each group."""
    layout = gate_layout(shape, block, groups)
    ids = torch.arange(math.prod(layout.gate_shape)).reshape(layout.gate_shape)
    out = expand_gates(ids, layout)
    per_group = shape[0] // groups
    bn, bk = block[0] or per_group, block[1] or shape[1]
    rows = layout.gate_shape[0] // groups
    for n, k, *taps in itertools.product(*map(range, shape)):
        gate_row = n // per_group * rows + n % per_group // bn
        where = [0] * len(taps) if None in block else taps
        assert out[(n, k, *taps)] == ids[(gate_row, k // bk, *where)]


@pytest.mark.parametrize(("shape", "block", "groups"), CASES)
def test_sum_blocks_is_the_adjoint_of_expand_gates(shape, block, groups):
    layout = gate_layout(shape, block, groups)
    gate = torch.randint(-9, 10, layout.gate_shape).double()
    values = torch.randint(-9, 10, shape).double()
    summed = sum_blocks(values, layout)
    assert summed.shape == layout.gate_shape
    left, right = (expand_gates(gate, layout) * values).sum(), (gate * summed).sum()
    assert left.item() == right.item()
    assert_exact("ones", sum_blocks(torch.ones(shape), layout), coverage(layout))


@pytest.mark.parametrize(("shape", "block", "groups"), [CASES[2], CASES[11], CASES[12]])
def test_sum_blocks_takes_any_strides(shape, block, groups):
    layout = gate_layout(shape, block, groups)
    values = torch.randint(-9, 10, shape).double()
    turned = values.transpose(0, 1).contiguous().transpose(0, 1)
    assert_exact("transposed", sum_blocks(turned, layout), sum_blocks(values, layout))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16], ids=str)
def test_expand_gates_keeps_the_dtype(dtype):
    layout = gate_layout((5, 7), (2, 3))
    assert expand_gates(torch.ones(3, 3, dtype=dtype), layout).dtype == dtype


def test_layouts_that_are_cut_to_the_same_blocks_are_equal():
    assert gate_layout((3, 4), (32, 32)) == gate_layout((3, 4), (None, None))
    assert gate_layout((6, 6), (4, 4)) != gate_layout((6, 6), (5, 5))


@pytest.mark.parametrize(
    "block", [(0, 1), (1, 0), (-4, 4), (4, -1), (2.0, 2), (True, 2), ("4", 4), (4, float("nan"))]
)
def test_block_sides_that_are_no_sizes_are_refused(block):
    with pytest.raises(ValueError, match=r"block sides must be integers >= 1 or None.*got"):
        gate_layout((8, 8), block)


@pytest.mark.parametrize("block", [4, None, "44", (4,), (4, 4, 4), (), {4: 4}])
def test_block_that_is_no_pair_is_refused(block):
    with pytest.raises(ValueError, match=r"block must be a pair \(bn, bk\), got"):
        check_block(block)


@pytest.mark.parametrize("groups", [0, -1, 4, 7])
def test_groups_that_do_not_divide_the_channels_are_refused(groups):
    with pytest.raises(ValueError, match=f"groups must divide the 6 output channels, got {groups}"):
        gate_layout((6, 4, 3, 3), (1, 1), groups)


@pytest.mark.parametrize("shape", [(), (4,)])
def test_weight_without_two_dimensions_is_refused(shape):
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        gate_layout(shape, (1, 1))
