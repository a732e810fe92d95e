"""The open part of a weight: what goes in comes out, and indices that do not fit are refused."""

import itertools

import pytest
import torch
from helpers import DTYPES, assert_exact
from sgtriton_kernels import coverage, expand_gates, gate_layout, gate_weight, use_impl
from sgtriton_kernels.blocks import (
    gates_to_pattern,
    matrix_shape,
    matrix_to_weight,
    pattern_to_gates,
    weight_to_matrix,
)
from sgtriton_kernels.kinds import open_gates

from sgtriton.stored import StoredWeight, served_block

# weight shape, block, groups: linear, ragged, None sides, taps in one and two axes, groups
BLOCKS = [
    ((8, 16), (4, 8), 1),
    ((37, 53), (32, 32), 1),
    ((5, 70), (1, None), 1),
    ((5, 70), (None, 1), 1),
    ((5, 70), (None, None), 1),
    ((6, 4, 3, 2), (4, 3), 1),
    ((6, 5, 3, 3), (2, 2), 2),
    ((6, 4, 3, 2), (1, None), 1),
    ((6, 4, 3, 2), (None, 1), 2),
    ((6, 4, 3, 2), (None, None), 3),
    ((10, 6, 5), (4, 4), 1),
    ((10, 6, 5), (4, 4), 2),
    ((4, 4, 1, 1), (2, None), 1),
]
PER_WEIGHT = [
    ((7, 33), (1, 1), 1),
    ((1, 1), (2, 2), 1),
    ((6, 4, 3, 2), (1, 1), 1),
    ((6, 1, 3, 3), (4, 4), 6),
    ((6, 3, 5), (1, 1), 2),
]
CASES = BLOCKS + PER_WEIGHT


def some_gates(layout, share):
    """Open gates: a share of them; 0 and 1 are none and all."""
    return torch.rand(layout.gate_shape) < share


@pytest.mark.parametrize(("shape", "block", "groups"), BLOCKS)
def test_weight_comes_back_from_its_matrix(shape, block, groups):
    layout = gate_layout(shape, block, groups)
    weight = torch.randn(shape)
    matrix = weight_to_matrix(weight, layout)
    assert tuple(matrix.shape) == matrix_shape(layout)
    assert_exact("weight", matrix_to_weight(matrix, layout), weight)
    assert matrix_to_weight(matrix, layout).is_contiguous()


@pytest.mark.parametrize(("shape", "block", "groups"), BLOCKS)
def test_matrix_blocks_hold_the_weights_of_one_gate(shape, block, groups):
    """A block of the matrix crosses neither a tap nor a group, whatever the raggedness."""
    layout = gate_layout(shape, block, groups)
    ids = 1.0 + torch.arange(coverage(layout).numel()).reshape(layout.gate_shape)
    matrix = weight_to_matrix(expand_gates(ids, layout), layout)
    bn, bk = layout.block
    for n in range(0, matrix.shape[0], bn):
        for k in range(0, matrix.shape[1], bk):
            held = matrix[n : n + bn, k : k + bk].unique()
            assert len(held[held > 0]) == 1  # 0 pads


def test_conv_columns_are_tap_major_with_channels_side_by_side():
    layout = gate_layout((2, 3, 2, 2), (2, 2))
    weight = torch.arange(1.0, 25).reshape(2, 3, 2, 2)
    matrix = weight_to_matrix(weight, layout)
    assert matrix.shape == (2, 4 * 4)
    for o, tap in itertools.product(range(2), range(4)):
        channels = weight[o, :, tap // 2, tap % 2]
        assert_exact("tap", matrix[o, 4 * tap : 4 * tap + 3], channels)
        assert matrix[o, 4 * tap + 3] == 0


def test_group_rows_are_padded_to_whole_blocks():
    layout = gate_layout((6, 1, 1), (2, 1), 2)
    matrix = weight_to_matrix(torch.arange(1.0, 7).reshape(6, 1, 1), layout)
    assert matrix[:, 0].tolist() == [1, 2, 3, 0, 4, 5, 6, 0]


@pytest.mark.parametrize(("shape", "block", "groups"), BLOCKS)
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_gates_come_back_from_their_pattern(shape, block, groups, share):
    layout = gate_layout(shape, block, groups)
    is_open = some_gates(layout, share)
    pattern = gates_to_pattern(is_open, layout)
    rows, cols = matrix_shape(layout)
    assert tuple(pattern.shape) == (-(-rows // layout.block[0]), -(-cols // layout.block[1]))
    assert_exact("gates", pattern_to_gates(pattern, layout), is_open)


def test_shared_gate_is_open_if_one_of_its_taps_is():
    layout = gate_layout((2, 3, 2, 2), (1, None))
    pattern = torch.zeros(2, 4, dtype=torch.bool)
    pattern[1, 2] = True
    assert pattern_to_gates(pattern, layout).flatten().tolist() == [False, True]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("shape", "block", "groups"), CASES)
def test_open_part_comes_back_as_the_masked_weight(shape, block, groups, share, dtype):
    layout = gate_layout(shape, block, groups)
    weight, is_open = torch.randn(shape).to(dtype), some_gates(layout, share)
    before = weight.clone()
    stored = StoredWeight.from_gated(weight, is_open, layout)
    again = StoredWeight.from_tensors(stored.tensors(), layout)
    masked = torch.where(expand_gates(is_open, layout), weight, 0)
    for name, part in (("gated", stored), ("reread", again)):
        dense = part.to_dense()
        assert_exact(name, dense, masked)
        assert dense.dtype == dtype
        assert dense.is_contiguous()
        assert_exact(f"{name} gates", part.open_gates, is_open)
    assert_exact("the weight given", weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["threshold", "bernoulli", "hard_concrete"])
@pytest.mark.parametrize(("shape", "block", "groups"), CASES)
def test_stored_weight_has_the_bits_of_the_gated_one(
    shape, block, groups, kind, dtype, device, impl
):
    layout = gate_layout(shape, block, groups)
    weight, gate = torch.randn(shape, device=device).to(dtype), torch.rand(layout.gate_shape)
    gate = (6 * gate - 5 if kind == "hard_concrete" else gate).to(device)
    with use_impl(impl):
        stored = StoredWeight.from_gated(weight, gate, layout, kind)
        read = "threshold" if kind == "bernoulli" else kind  # so does eval
        gated = gate_weight(weight, gate, block, groups=groups, kind=read)
    assert_exact("weight", stored.to_dense(), gated)
    assert_exact("gates", stored.open_gates, open_gates(gate, kind))


@pytest.mark.parametrize(("shape", "block", "groups"), CASES)
def test_closed_weights_are_not_stored(shape, block, groups):
    """A NaN under a closed gate neither comes back nor lies in any tensor."""
    layout = gate_layout(shape, block, groups)
    is_open = some_gates(layout, 0.4)
    weight = torch.where(expand_gates(is_open, layout), torch.randn(shape), float("nan"))
    stored = StoredWeight.from_gated(weight, is_open, layout)
    assert not any(t.isnan().any() for t in stored.tensors().values())
    assert not stored.to_dense().isnan().any()


def test_open_weights_that_are_zero_are_stored():
    """A kept zero is a kept weight: the gates come back, not the nonzeros."""
    for block in [(1, 1), (2, 2)]:
        layout = gate_layout((4, 4), block)
        stored = StoredWeight.from_gated(
            torch.zeros(4, 4), torch.ones(layout.gate_shape) > 0, layout
        )
        assert stored.open_gates.all()
        assert stored.density == 1


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("shape", "block", "groups"), CASES)
def test_density_counts_the_weights_covered(shape, block, groups, share):
    layout = gate_layout(shape, block, groups)
    is_open = some_gates(layout, share)
    stored = StoredWeight.from_gated(torch.randn(shape), is_open, layout)
    covered = expand_gates(is_open, layout).double().mean().item()  # weight by weight
    assert stored.density == pytest.approx(covered, abs=1e-6)


def test_density_of_a_ragged_layer_is_not_the_share_of_blocks():
    layout = gate_layout((3, 3), (2, 2))
    is_open = torch.tensor([[True, False], [False, False]])
    stored = StoredWeight.from_gated(torch.ones(3, 3), is_open, layout)
    assert stored.density == pytest.approx(4 / 9, abs=1e-6)


def test_bytes_are_those_of_what_is_stored():
    layout = gate_layout((8, 8), (4, 4))
    is_open = torch.tensor([[True, False], [False, True]])
    stored = StoredWeight.from_gated(torch.ones(8, 8), is_open, layout)
    assert stored.nbytes == 2 * 16 * 4 + 3 * 4 + 2 * 4  # values, crow, col
    layout = gate_layout((8, 8), (1, 1))
    stored = StoredWeight.from_gated(torch.ones(8, 8).half(), torch.eye(8) > 0, layout)
    assert stored.nbytes == 8 * 2 + 8  # values, bits


@pytest.mark.parametrize("block", [(1, 1), (4, 4)])
def test_reread_weight_shares_no_memory_with_what_was_given(block):
    layout = gate_layout((8, 8), block)
    stored = StoredWeight.from_gated(torch.randn(8, 8), torch.ones(layout.gate_shape) > 0, layout)
    given = {name: t.clone() for name, t in stored.tensors().items()}
    again = StoredWeight.from_tensors(given, layout)
    for t in given.values():
        t.zero_()
    assert_exact("reread", again.to_dense(), stored.to_dense())


def block_tensors(**changed):
    """Tensors of an 8x8 weight in 4x4 blocks, two of them open, with some exchanged."""
    layout = gate_layout((8, 8), (4, 4))
    is_open = torch.tensor([[True, False], [False, True]])
    tensors = StoredWeight.from_gated(torch.randn(8, 8), is_open, layout).tensors()
    return {k: t for k, t in {**tensors, **changed}.items() if t is not None}, layout


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"col": None},
            r"tensors \['col', 'crow', 'values'\] are needed, got \['crow', 'values'\]",
        ),
        ({"bits": ints(1)}, r"are needed, got \['bits'"),
        ({"values": ints(1, 2)}, "values must be floating point, got torch.int32"),
        ({"values": torch.zeros(2, 4, 4, dtype=torch.complex64)}, "values must be floating point"),
        ({"values": torch.zeros(2, 2, 4)}, r"blocks \(4, 4\), got shape \(2, 2, 4\)"),
        ({"values": torch.zeros(2, 16)}, r"blocks \(4, 4\), got shape \(2, 16\)"),
        ({"values": torch.zeros(())}, r"blocks \(4, 4\), got shape \(\)"),
        ({"values": torch.zeros(1, 4, 4)}, "col must have nnz = 1 entries, got 2"),
        ({"values": torch.zeros(3, 4, 4)}, "col must have nnz = 3 entries, got 2"),
        ({"values": [1.0]}, "values must be a tensor, got list"),
        ({"crow": [0, 1, 2]}, "crow must be a tensor, got list"),
        ({"crow": torch.tensor([0.0, 1.0, 2.0])}, "crow must be a 1-d int32 or int64"),
        ({"crow": ints(0, 1, 2, dtype=torch.int16)}, "crow must be a 1-d int32 or int64"),
        ({"crow": ints(0, 1, 2)[None]}, "crow must be a 1-d int32 or int64"),
        ({"crow": ints(0, 2)}, "crow must have block rows"),
        ({"crow": ints(0, 3, 2)}, "crow must rise"),
        ({"crow": ints(1, 1, 2)}, "crow must start with 0, got 1"),
        ({"crow": ints(0, 1, 3)}, "crow must end with the number of blocks, 2, got 3"),
        ({"crow": ints(0, 1, 2**31 - 1)}, "crow must end with the number of blocks"),
        ({"col": ints(0, 999)}, r"col must lie in \[0, 2\), got 999"),
        ({"col": ints(-1, 1)}, r"col must lie in \[0, 2\), got -1"),
        ({"col": ints(0, 2**31 - 1)}, "col must lie in"),
        ({"col": ints(0, 2**40, dtype=torch.int64)}, "col must lie in"),
        ({"crow": ints(0, 2, 2), "col": ints(1, 1)}, "col must rise strictly"),
        ({"col": ints(0)}, "col must have nnz = 2 entries, got 1"),
        ({"col": ints(0, 1).float()}, "col must be a 1-d int32 or int64"),
    ],
)
def test_block_tensors_that_do_not_fit_are_refused(changed, message):
    tensors, layout = block_tensors(**changed)
    with pytest.raises(ValueError, match=message):
        StoredWeight.from_tensors(tensors, layout)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bits": None}, r"\['bits', 'values'\] are needed, got \['values'\]"),
        ({"crow": ints(0)}, r"are needed, got \['bits', 'crow', 'values'\]"),
        ({"bits": torch.zeros(1, dtype=torch.uint8)}, r"bits must be uint8 \[2\]"),
        ({"bits": torch.zeros(2, dtype=torch.int32)}, r"bits must be uint8 .* torch\.int32"),
        ({"bits": torch.tensor([255, 0], dtype=torch.uint8)}, "one set bit per nonzero, 3, got 8"),
        ({"bits": torch.tensor([3, 128], dtype=torch.uint8)}, "unused bits of the last byte"),
        ({"values": torch.zeros(2)}, "one set bit per nonzero, 2, got 3"),
        ({"values": torch.zeros(3, 1)}, "nonzeros must be 1-d"),
        ({"values": torch.zeros(3, dtype=torch.int64)}, "values must be floating point"),
        ({"bits": b"\x07\x00"}, "bits must be a tensor, got bytes"),
    ],
)
def test_per_weight_tensors_that_do_not_fit_are_refused(changed, message):
    layout = gate_layout((3, 3), (1, 1))
    is_open = torch.tensor([True] * 3 + [False] * 6).reshape(3, 3)
    tensors = StoredWeight.from_gated(torch.randn(3, 3), is_open, layout).tensors()
    tensors = {k: t for k, t in {**tensors, **changed}.items() if t is not None}
    with pytest.raises(ValueError, match=message):
        StoredWeight.from_tensors(tensors, layout)


def test_tensors_of_another_block_are_refused():
    tensors, _ = block_tensors()
    for block in [(2, 2), (8, 4), (1, 1), (None, None)]:
        with pytest.raises(ValueError, match=r"values must hold blocks|are needed"):
            StoredWeight.from_tensors(tensors, gate_layout((8, 8), block))


@pytest.mark.parametrize(
    ("shape", "block", "groups", "served"),
    [
        ((64, 64), (4, 8), 1, (16, 16)),
        ((64, 64), (32, 2), 1, (32, 16)),
        ((64, 64), (16, 16), 1, None),  # served as it is
        ((64, 64), (3, 4), 1, None),  # no power of two holds whole blocks of 3
        ((20, 64), (8, 4), 1, (16, 16)),
        ((12, 64), (4, 4), 1, None),  # too small
        ((64, 64), (None, 1), 1, (64, 16)),
        ((60, 64), (None, 1), 1, None),
        ((64, 64), (1, 1), 1, None),  # stored as single weights
        ((64, 32, 3, 3), (4, 4), 1, (16, 16)),
        ((64, 32, 3, 3), (4, 4), 4, (16, 16)),
        ((64, 32, 3, 3), (4, 4), 8, None),  # 8 rows in a group
    ],
)
def test_smallest_block_that_kernels_serve(shape, block, groups, served):
    assert served_block(gate_layout(shape, block, groups)) == served


@pytest.mark.parametrize(
    ("asked", "served"),
    [
        ((8, 4), (8, 4)),
        ((4, 4), None),
        ((64, 64), (10, 14)),
        ((None, 8), (10, 8)),
        ((12, 4), (10, 4)),
    ],
)
def test_block_that_is_asked_for_is_cut_to_the_layer(asked, served):
    assert served_block(gate_layout((10, 14), (4, 4)), asked) == served


@pytest.mark.parametrize("asked", [(6, 4), (4, 6), (2, 4), (9, 4)])
def test_block_that_is_not_made_of_whole_ones_is_refused(asked):
    with pytest.raises(ValueError, match=r"must be made of whole gate blocks \(4, 4\), got"):
        served_block(gate_layout((10, 14), (4, 4)), asked)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("shape", "block", "groups"), BLOCKS)
def test_merged_weight_is_the_same(shape, block, groups, share):
    layout = gate_layout(shape, block, groups)
    stored = StoredWeight.from_gated(torch.randn(shape), some_gates(layout, share), layout)
    bn, bk = layout.block
    for asked in [(2 * bn, bk), (bn, 3 * bk), (None, bk), (None, None)]:
        wide = stored.merged(served_block(layout, asked) or layout.block)
        assert_exact("weight", wide.to_dense(), stored.to_dense())
        assert wide.density >= stored.density - 1e-6
        assert wide.density <= 1


def test_single_weights_are_not_merged():
    layout = gate_layout((8, 8), (1, 1))
    stored = StoredWeight.from_gated(torch.randn(8, 8), some_gates(layout, 0.5), layout)
    with pytest.raises(ValueError, match="not stored in blocks"):
        stored.merged((4, 4))
